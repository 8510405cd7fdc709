#!/usr/bin/env bash
# What a synchronous archive costs a commit: latency (p50, p99) and throughput of pgbench, with no synchronous standby, with
# pg_receivewal --synchronous as the standby (plain files, no encryption), and with pgkeep on a directory and on an S3 server
# of the tests' own (loopback, objects in memory: the protocol's cost and ours, not a provider's latency). In turns, on the
# same server with fsync on and the same disk for all.
#   testenv/bench/sync.sh [SECONDS=10] [ROUNDS=1] [CLIENTS="1 8 32"] [SCRIPT=simple-update] [SCALE=20]
# PGKEEP_BENCH_INTERVALS: values of range_interval for the bucket, "default" for none (default 0s). A round takes SECONDS
# for each kind and number of clients. Latencies are those of single transactions (pgbench --log), without the first second.
. "$(dirname "$0")/lib.sh"
duration=${1:-10} rounds=${2:-1} clients=${3:-1 8 32} script=${4:-simple-update} scale=${5:-20}
intervals=${PGKEEP_BENCH_INTERVALS:-default 0s}
server=${PGKEEP_BENCH_S3:-$root/target/release/examples/s3_server}
[ -x "$server" ] || { echo "build it first: cargo build --release --example s3_server" >&2; exit 2; }
coproc S3 { exec "$server"; }
read -r endpoint bucket AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY <&"${S3[0]}"
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION=us-east-1
exec {answers}<&"${S3[0]}" {questions}>&"${S3[1]}" # what coproc gives is not passed on to pipes
requests() { echo >&"$questions"; local line; read -r line <&"$answers"; echo "$line"; }
puts() { requests | tr ' ' '\n' | awk -F= '$1 == "PutObject" { print $2 }'; }

boot "fsync = on
max_connections = 60
checkpoint_completion_target = 0.5"
as "$bindir/pgbench" -i -s "$scale" -q >/dev/null 2>&1
sql "CHECKPOINT" >/dev/null
echo "pgbench $script, scale $scale, $duration s each, $(nproc) processors, $("$bindir/postgres" --version)"

runs=0
# standby KIND: becomes the synchronous standby; its daemon's name in $running, empty for none.
standby() {
    local kind=$1 name=pgkeep file
    running=
    case $kind in
        none) return ;;
        receivewal)
            name=pg_receivewal
            as mkdir -p "$WORK/received"
            sql "SELECT pg_create_physical_replication_slot('receivewal', true)
                 WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = 'receivewal')" >/dev/null
            daemon "$kind" "$bindir/pg_receivewal" -D "$WORK/received" -S receivewal --synchronous 2>"$WORK/$kind.log"
            ;;
        dir | s3*)
            runs=$((runs + 1))
            as mkdir "$WORK/run"
            file=$WORK/run/pgkeep.toml
            if [ "$kind" = dir ]; then repo=("$WORK/run/repository"); else repo=(s3://"$bucket/run$runs" --endpoint "$endpoint"); fi
            as "$pgkeep" -q --config "$file" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "${repo[@]}" >/dev/null
            echo 'synchronous = true' >> "$file"
            case $kind in s3-default | dir) ;; *) echo "range_interval = \"${kind#s3-}\"" >> "$file" ;; esac
            daemon "$kind" "$pgkeep" -q --config "$file" run 2>"$WORK/$kind.log"
            ;;
    esac
    running=$kind
    sql "ALTER SYSTEM SET synchronous_standby_names = '$name'" >/dev/null
    sql "SELECT pg_reload_conf()" >/dev/null
    for _ in $(seq 600); do
        [ "$(sql "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")" = 1 ] && return
        kill -0 "$(cat "$WORK/$kind.pid")" || break
        sleep 0.1
    done
    cat "$WORK/$kind.log" >&2
    exit 1
}
alone() {
    sql "ALTER SYSTEM RESET synchronous_standby_names" >/dev/null
    sql "SELECT pg_reload_conf()" >/dev/null
    [ -n "$running" ] || return 0
    local pid; pid=$(cat "$WORK/$running.pid")
    kill -INT "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
    rm -f "$WORK/$running.pid"
    # What it leaves behind must not hold the next one up.
    as rm -rf "$WORK/received" "$WORK/run"
    until [ "$(sql "SELECT count(*) FROM pg_stat_replication")" = 0 ]; do sleep 0.05; done
    sql "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots" >/dev/null
}
# measure CLIENTS: tps, p50 and p99 in ms.
measure() {
    local count=$1 jobs=2
    [ "$count" -ge "$jobs" ] || jobs=1
    as rm -rf "$WORK/logs"; as mkdir "$WORK/logs"
    as sh -c 'cd "$0" && exec "$@"' "$WORK/logs" "$bindir/pgbench" -n -M prepared -b "$script" -c "$count" -j "$jobs" \
        -T "$((duration + 1))" --log >/dev/null 2>"$WORK/pgbench.log" || { cat "$WORK/pgbench.log" >&2; exit 1; }
    # client, number, microseconds, script, second, microsecond
    cat "$WORK"/logs/pgbench_log.* | awk -v seconds="$duration" '
        NR == 1 || $5 + $6 / 1e6 - $3 / 1e6 < first { first = $5 + $6 / 1e6 - $3 / 1e6 }
        { end[NR] = $5 + $6 / 1e6; took[NR] = $3 }
        END { for (i = 1; i <= NR; i++) if (end[i] >= first + 1 && end[i] < first + 1 + seconds) print took[i] }' |
        sort -n | awk -v seconds="$duration" '{ all[NR] = $1 }
        END { printf "%.0f %.2f %.2f", NR / seconds, all[int((NR + 1) / 2)] / 1000, all[int(NR * 0.99 + 0.999999)] / 1000 }'
}

kinds=(none receivewal dir)
for interval in $intervals; do kinds+=("s3-$interval"); done
for count in $clients; do
    printf '\n%-12s %9s %9s %9s   %9s %9s %9s   %s\n' "$count clients" tps "p50 ms" "p99 ms" "tps" "p50" "p99" "beside pg_receivewal"
    for round in $(seq "$rounds"); do
        order=("${kinds[@]}")
        [ $((round % 2)) = 1 ] || { order=(); for kind in "${kinds[@]}"; do order=("$kind" "${order[@]}"); done; }
        declare -A result=()
        for kind in "${order[@]}"; do
            standby "$kind"
            before=$(puts)
            read -r tps p50 p99 <<<"$(measure "$count")"
            result[$kind]="$tps $p50 $p99 $(($(puts) - before))"
            alone
        done
        read -r tps0 p500 p990 _ <<<"${result[receivewal]}"
        for kind in "${kinds[@]}"; do
            read -r tps p50 p99 put <<<"${result[$kind]}"
            said=
            case $kind in s3*) said="$(ratio "$put" "$((duration + 1))") puts a second" ;; esac
            printf '%-12s %9s %9s %9s   %8sx %8sx %8sx   %s\n' "$kind" "$tps" "$p50" "$p99" \
                "$(ratio "$tps" "$tps0")" "$(ratio "$p50" "$p500")" "$(ratio "$p99" "$p990")" "$said"
        done
    done
done
