#!/usr/bin/env bash
# Catching up on WAL: `pgkeep run` (compressed, sealed, synced) beside `pg_receivewal` with lz4 (compressed, synced, not
# encrypted), in turn, on the same server and disk. Prints each run and the ratio; also pgkeep's largest resident size.
#   testenv/bench/catchup.sh [SEGMENTS=100] [ROUNDS=3]
. "$(dirname "$0")/lib.sh"
segments=${1:-100} rounds=${2:-3}
boot "wal_keep_size = 16GB"
sql "CREATE TABLE filler (g bigint, t timestamptz, x text)"
for round in $(seq "$rounds"); do
    sql "SELECT pg_create_physical_replication_slot('plain$round', true), pg_create_physical_replication_slot('keep$round', true)" >/dev/null
done
begin=$(sql "SELECT pg_current_wal_lsn()")
as "$bindir/pgbench" -i -s 30 -q >/dev/null 2>&1
while [ "$(sql "SELECT (pg_current_wal_lsn() - '$begin') / 16777216 < $segments")" = t ]; do
    as "$bindir/pgbench" -n -c 4 -T 10 >/dev/null 2>&1
    sql "INSERT INTO filler SELECT g, now(), md5(g::text) FROM generate_series(1, 400000) g; UPDATE filler SET g = g + 1 WHERE g % 3 = 0"
done
sql "SELECT pg_switch_wal()" >/dev/null
end=$(sql "SELECT pg_current_wal_lsn()")
# pg_receivewal stops when it is beyond its end: it shall not wait for the next segment.
endpos=$(sql "SELECT '$end'::pg_lsn - 100")
bytes=$(sql "SELECT '$end'::pg_lsn - '$begin'::pg_lsn")
echo "$((bytes / 1000000)) MB of WAL, $(nproc) processors, $("$bindir/postgres" --version)"

plain() { # ROUND: seconds in $plain
    as mkdir "$WORK/plain"
    local from
    from=$(now)
    as "$bindir/pg_receivewal" -D "$WORK/plain" -S "plain$1" -Z lz4 --no-loop --endpos="$endpos" 2>/dev/null
    plain=$(seconds "$from" "$(now)")
    as rm -rf "$WORK/plain"
}
keep() { # ROUND: seconds in $keep, kB resident in $resident
    as mkdir "$WORK/keep"
    as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" \
        --repo "$WORK/keep/repository" --slot "keep$1" >/dev/null
    local from pid
    from=$(now)
    daemon keep "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" run 2>"$WORK/keep.log"
    pid=$(cat "$WORK/keep.pid")
    # At a segment's border the slot stays one byte behind on purpose.
    until [ "$(sql "SELECT restart_lsn - '$end'::pg_lsn >= -1 FROM pg_replication_slots WHERE slot_name = 'keep$1'")" = t ]; do
        kill -0 "$pid" || { cat "$WORK/keep.log" >&2; exit 1; }
        sleep 0.05
    done
    keep=$(seconds "$from" "$(now)")
    resident=$(awk '/VmHWM/ { print $2 }' "/proc/$pid/status")
    kill -TERM "$pid"
    wait $! || true
    rm "$WORK/keep.pid"
    as rm -rf "$WORK/keep"
}
printf '%-6s %22s %22s %8s %14s\n' round "pg_receivewal lz4, s" "pgkeep sealed, s" ratio "pgkeep kB"
for round in $(seq "$rounds"); do
    if [ $((round % 2)) = 1 ]; then plain "$round"; keep "$round"; else keep "$round"; plain "$round"; fi
    printf '%-6s %22s %22s %8s %14s\n' "$round" "$plain" "$keep" "$(ratio "$keep" "$plain")" "$resident"
done
echo "ratio: pgkeep / pg_receivewal; below 1 is faster"
