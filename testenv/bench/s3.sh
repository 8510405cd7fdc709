#!/usr/bin/env bash
# A bucket beside a directory: catching up on WAL, a full base backup, and restoring it, in turn, on the same server; and
# the requests that each costs. The S3 server is the tests' own, on loopback, objects in memory: what is measured is the
# protocol's cost and ours, not a provider's latency.
#   testenv/bench/s3.sh [SCALE=100] [SEGMENTS=40] [ROUNDS=3]     (pgbench scale 100 is about 1.5 GB)
. "$(dirname "$0")/lib.sh"
scale=${1:-100} segments=${2:-40} rounds=${3:-3}
server=${PGKEEP_BENCH_S3:-$root/target/release/examples/s3_server}
[ -x "$server" ] || { echo "build it first: cargo build --release --example s3_server" >&2; exit 2; }
coproc S3 { exec "$server"; }
read -r endpoint bucket AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY <&"${S3[0]}"
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION=us-east-1
requests() { echo >&"${S3[1]}"; local line; read -r line <&"${S3[0]}"; echo "$line"; }
# since BEFORE AFTER: what came in between, by kind.
since() {
    printf '%s\n' "$1" "$2" | awk '{ for (i = 1; i <= NF; i++) { split($i, a, "="); if (NR == 1) was[a[1]] = a[2];
        else if (a[2] > was[a[1]]) printf "%s %d  ", a[1], a[2] - was[a[1]] } }'
}
boot "wal_keep_size = 16GB"
as "$bindir/pgbench" -i -s "$scale" -q >/dev/null 2>&1
sql "CREATE TABLE filler (g bigint, t timestamptz, x text)"
for round in $(seq "$rounds"); do
    sql "SELECT pg_create_physical_replication_slot('dir$round', true), pg_create_physical_replication_slot('s3$round', true)" >/dev/null
done
begin=$(sql "SELECT pg_current_wal_lsn()")
while [ "$(sql "SELECT (pg_current_wal_lsn() - '$begin') / 16777216 < $segments")" = t ]; do
    sql "INSERT INTO filler SELECT g, now(), md5(g::text) FROM generate_series(1, 400000) g; UPDATE filler SET g = g + 1 WHERE g % 3 = 0"
done
sql "SELECT pg_switch_wal(); CHECKPOINT" >/dev/null
end=$(sql "SELECT pg_current_wal_lsn()")
wal=$(sql "SELECT '$end'::pg_lsn - '$begin'::pg_lsn")
data=$(sql "SELECT sum(pg_database_size(oid)) FROM pg_database")
echo "$((data / 1000000)) MB of data, $((wal / 1000000)) MB of WAL, $(nproc) processors, $("$bindir/postgres" --version)"

# job KIND ROUND: seconds in $streamed, $taken, $restored.
job() {
    local kind=$1 name=$1$2 from pid
    as mkdir "$WORK/$name"
    local file=$WORK/$name/pgkeep.toml
    if [ "$kind" = s3 ]; then repo=(s3://"$bucket/$name" --endpoint "$endpoint"); else repo=("$WORK/$name/repository"); fi
    as "$pgkeep" -q --config "$file" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "${repo[@]}" --slot "$name" >/dev/null
    before=$(requests)
    from=$(now)
    daemon "$name" "$pgkeep" -q --config "$file" run 2>"$WORK/$name.log"
    pid=$(cat "$WORK/$name.pid")
    until [ "$(sql "SELECT restart_lsn - '$end'::pg_lsn >= -1 FROM pg_replication_slots WHERE slot_name = '$name'")" = t ]; do
        kill -0 "$pid" || { cat "$WORK/$name.log" >&2; exit 1; }
        sleep 0.05
    done
    streamed=$(seconds "$from" "$(now)")
    after_wal=$(requests)
    from=$(now)
    as "$pgkeep" -q --config "$file" backup >/dev/null
    taken=$(seconds "$from" "$(now)")
    after_backup=$(requests)
    from=$(now)
    as "$pgkeep" -q --config "$file" restore --to immediate --pgdata "$WORK/restored" >/dev/null
    restored=$(seconds "$from" "$(now)")
    after_restore=$(requests)
    as rm -rf "$WORK/restored"
    kill -TERM "$pid"
    wait $! || true
    rm "$WORK/$name.pid"
    as rm -rf "${WORK:?}/$name"
}
printf '%-6s %10s %10s %6s  %10s %10s %6s  %10s %10s %6s\n' round "WAL dir" "WAL S3" ratio "backup dir" "backup S3" ratio "rest. dir" "rest. S3" ratio
for round in $(seq "$rounds"); do
    kinds=(dir s3)
    [ $((round % 2)) = 1 ] || kinds=(s3 dir)
    for kind in "${kinds[@]}"; do
        job "$kind" "$round"
        if [ "$kind" = dir ]; then d=("$streamed" "$taken" "$restored"); else s=("$streamed" "$taken" "$restored"); fi
        [ "$kind" = dir ] || counts=("$(since "$before" "$after_wal")" "$(since "$after_wal" "$after_backup")" "$(since "$after_backup" "$after_restore")")
    done
    printf '%-6s %9ss %9ss %6s  %9ss %9ss %6s  %9ss %9ss %6s\n' "$round" "${d[0]}" "${s[0]}" "$(ratio "${s[0]}" "${d[0]}")" \
        "${d[1]}" "${s[1]}" "$(ratio "${s[1]}" "${d[1]}")" "${d[2]}" "${s[2]}" "$(ratio "${s[2]}" "${d[2]}")"
done
echo "ratio: bucket / directory; requests of the last round: WAL ($((wal / 1000000)) MB): ${counts[0]}"
echo "backup ($((data / 1000000)) MB of data): ${counts[1]}"
echo "restore: ${counts[2]}"
