#!/usr/bin/env bash
# The index of transactions: its bytes per GB of WAL, what making it costs while WAL streams, and how long `pgkeep log` takes.
# The same WAL is streamed in turn with `index = false`, for the CPU; PGKEEP_BENCH_BASELINE names another pgkeep for that, or
# `none`. With PGKEEP_BENCH_PERF=1 perf says which share of the CPU went to decoding and indexing, for a pgkeep that
# cannot leave it.
# A checkpoint every ten seconds makes most of the WAL full-page images, as in life; with PGKEEP_BENCH_DENSE=1 there is none, and
# a transaction takes 600 bytes: the densest WAL there is, and slow to make.
#   testenv/bench/log.sh [GB=10] [ROUNDS=3]
. "$(dirname "$0")/lib.sh"
gigabytes=${1:-10} rounds=${2:-3} scale=${PGKEEP_BENCH_SCALE:-100}
boot "wal_keep_size = 32GB"
as "$bindir/pgbench" -i -s "$scale" -q >/dev/null 2>&1
for round in $(seq "$rounds"); do
    sql "SELECT pg_create_physical_replication_slot('new$round', true), pg_create_physical_replication_slot('base$round', true)" >/dev/null
done
sql "CHECKPOINT"
begin=$(sql "SELECT pg_current_wal_lsn()")
while [ "$(sql "SELECT (pg_current_wal_lsn() - '$begin') < $gigabytes * 1000000000.0")" = t ]; do
    [ -n "${PGKEEP_BENCH_DENSE:-}" ] || sql "CHECKPOINT"
    as "$bindir/pgbench" -n -c 4 -T 10 >/dev/null 2>&1
done
sql "SELECT pg_switch_wal()" >/dev/null
sql "CREATE TABLE last_one (n int)"
end=$(sql "SELECT pg_current_wal_lsn()")
bytes=$(sql "SELECT '$end'::pg_lsn - '$begin'::pg_lsn")
echo "$((bytes / 1000000)) MB of WAL by pgbench, $(nproc) processors, $("$bindir/postgres" --version)"

caught_up() { [ "$(sql "SELECT restart_lsn - '$end'::pg_lsn >= -1 FROM pg_replication_slots WHERE slot_name = '$1'")" = t ]; }
baseline=${PGKEEP_BENCH_BASELINE:-$pgkeep}
# stream BINARY SLOT DIRECTORY [SETTING]: CPU seconds in $cpu, kB resident in $resident
stream() {
    as mkdir -p "$3"
    as "$1" -q --config "$3/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "$3/repository" --slot "$2" >/dev/null
    [ -z "${4:-}" ] || echo "$4" >> "$3/pgkeep.toml" # the cluster is the last section
    daemon "$2" "$1" -q --config "$3/pgkeep.toml" run 2>"$3/log"
    local job=$! pid
    pid=$(cat "$WORK/$2.pid")
    if [ -n "${PGKEEP_BENCH_PERF:-}" ]; then
        perf record -q -e cpu-clock -F 99 --call-graph dwarf,16384 -o "$WORK/perf.data" -p "$pid" 2>/dev/null &
        perf=$!
    fi
    until caught_up "$2"; do
        kill -0 "$pid" || { cat "$3/log" >&2; exit 1; }
        sleep 0.05
    done
    cpu=$(awk -v hz="$(getconf CLK_TCK)" '{ printf "%.2f", ($14 + $15) / hz }' "/proc/$pid/stat")
    resident=$(awk '/VmHWM/ { print $2 }' "/proc/$pid/status")
    if [ -n "${PGKEEP_BENCH_PERF:-}" ]; then
        kill -INT "$perf"
        wait "$perf" || true
        echo "shares of the CPU, with what is called from there:"
        perf report -i "$WORK/perf.data" --no-inline --children --no-demangle -g none --percent-limit 0 --stdio 2>/dev/null |
            grep -E '7indexer|5index5build|3wal5audit|10WalAudit|4seal|3lz4' | head -30 || true
    fi
    kill -TERM "$pid"
    wait "$job" || true
    rm "$WORK/$2.pid"
}
for round in $(seq "$rounds"); do
    if [ "$baseline" != none ]; then
        stream "$baseline" "base$round" "$WORK/base" "$([ "$baseline" != "$pgkeep" ] || echo "index = false")"
        base=$cpu
        as rm -rf "$WORK/base"
    fi
    stream "$pgkeep" "new$round" "$WORK/new"
    echo "round $round: streaming took ${cpu} s of CPU, $resident kB resident${base:+; without an index $base s, ratio $(ratio "$cpu" "$base")}"
    [ "$round" = "$rounds" ] || as rm -rf "$WORK/new"
done
keep() { as "$pgkeep" -q --config "$WORK/new/pgkeep.toml" "$@"; }
index_bytes() { find "$WORK/new/repository" -path '*/index/*' -type f -printf '%s\n' | awk '{ sum += $1; n += 1 } END { print sum + 0, n + 0 }'; }
read -r streamed objects <<<"$(index_bytes)"
echo "while streaming: $objects objects of index, $((streamed * 1000 / (bytes / 1000000))) bytes per GB of WAL"
from=$(now)
keep index rebuild >/dev/null
echo "index rebuild of what was missing: $(seconds "$from" "$(now)") s"
read -r all objects <<<"$(index_bytes)"
echo "in all: $objects objects of index, $((all * 1000 / (bytes / 1000000))) bytes per GB of WAL"
file=$(sql "SELECT d.dattablespace || '/' || d.oid || '/' || pg_relation_filenode('last_one') FROM pg_database d WHERE datname = 'postgres'")
middle=$(sql "SELECT to_json(clock_timestamp() - interval '1 minute')" | tr -d '"')
timed() { # WHAT ARGUMENTS...
    local what=$1 from; shift
    for _ in 1 2 3; do
        from=$(now)
        keep log "$@" >/dev/null || true
        printf '%-46s %8s s\n' "$what" "$(seconds "$from" "$(now)")"
    done
}
timed "the newest" --limit 20
timed "around a moment" --around "$middle"
timed "what a relation saw, through all of it" --relation "$file"
timed "every DDL, through all of it" --kind ddl,drop,truncate
