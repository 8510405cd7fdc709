#!/usr/bin/env bash
# Replay through restore_command: `replay_table [SEGMENTS=200] [ROUNDS=3]`, sourced by hooks.sh after lib.sh; or alone:
#   testenv/bench/hooks_replay.sh [SEGMENTS=200] [ROUNDS=3]
#
# One base backup and the same segments of 16 MB behind it, recovered in turn: the floor (the WAL already in pg_wal, no
# hook), `cp`, pgBackRest (asynchronous, two processes, lz4, aes-256-cbc) and `pgkeep wal fetch` (lz4, AES-GCM). Servers sync.
# Timed by the server's own log, from "redo starts at" to "redo done at". Each with recovery_prefetch as it is by default and,
# from 15 on, the floor and pgkeep with it off, too.
[ "${BASH_SOURCE[0]}" != "$0" ] || . "$(dirname "$0")/lib.sh"

# PGKEEP_BENCH_WAYS names some of them.
read -ra replay_ways <<<"${PGKEEP_BENCH_WAYS:-floor cp pgbackrest pgkeep floor-off pgkeep-off}"

# replay_archive SEGMENTS: a base backup in $WORK/base, and its WAL in three archives. The server is gone then.
replay_archive() {
    as mkdir "$WORK/wal"
    boot "archive_mode = on
archive_command = 'cp %p $WORK/wal/%f'
wal_keep_size = 64GB"
    as "$bindir/pgbench" -i -s 30 -q >/dev/null 2>&1
    sql "CREATE TABLE filler (g bigint, t timestamptz, x text)"
    as "$bindir/pg_basebackup" -D "$WORK/base" -c fast -X none --no-sync 2>/dev/null
    rm -f "$WORK"/wal/*
    local begin; begin=$(sql "SELECT pg_current_wal_lsn()")
    while [ "$(sql "SELECT (pg_current_wal_lsn() - '$begin') / 16777216 < $1")" = t ]; do
        as "$bindir/pgbench" -n -c 4 -T 5 >/dev/null 2>&1
        sql "INSERT INTO filler SELECT g, now(), md5(g::text) FROM generate_series(1, 400000) g; UPDATE filler SET g = g + 1 WHERE g % 3 = 0"
    done
    local last; last=$(sql "SELECT pg_walfile_name(pg_switch_wal())")
    until [ -f "$WORK/wal/$last" ]; do sleep 0.1; done
    as cp -n "$WORK"/data/pg_wal/0000000100000* "$WORK/wal/" 2>/dev/null || true
    local file
    for file in "$WORK"/wal/*; do [ "$(basename "$file")" \> "$last" ] && rm -f "$file"; done
    as mkdir "$WORK/keep" "$WORK/pgbackrest" "$WORK/spool" "$WORK/lock" "$WORK/log-pgbackrest"
    as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" \
        --repo "$WORK/keep/repository" --slot bench >/dev/null
    sql "SELECT pg_drop_replication_slot('bench')" >/dev/null
    as sh -c "cat > '$WORK/pgbackrest.conf'" <<CONF
[global]
spool-path=$WORK/spool
lock-path=$WORK/lock
log-path=$WORK/log-pgbackrest
log-level-file=off
log-level-console=warn
process-max=2
compress-type=lz4
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=benchmark
repo1-path=$WORK/pgbackrest
[bench]
pg1-path=$WORK/data
pg1-socket-path=$WORK
pg1-port=$PGPORT
pg1-user=postgres
CONF
    as pgbackrest --config "$WORK/pgbackrest.conf" --stanza bench stanza-create >/dev/null
    for file in "$WORK"/wal/*; do
        as env -C "$WORK/data" "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" wal push "$file"
        as env -C "$WORK/data" pgbackrest --config "$WORK/pgbackrest.conf" --stanza bench archive-push "$file"
    done
    as "$bindir/pg_ctl" -D "$WORK/data" -m immediate -w stop >/dev/null
    as rm -rf "$WORK/data"
}

# replay_once WAY: seconds of redo, in $took.
replay_once() {
    local way=${1%-off} prefetch=""
    [ "$1" = "$way" ] || prefetch="recovery_prefetch = off"
    as cp -a "$WORK/base" "$WORK/data"
    rm -f "$WORK/log"
    local command
    case $way in
        floor) command=false; as sh -c "cp '$WORK'/wal/* '$WORK/data/pg_wal/'" ;;
        cp) command="cp $WORK/wal/%f %p" ;;
        pgbackrest) command="exec pgbackrest --config $WORK/pgbackrest.conf --stanza bench --archive-async archive-get %f %p" ;;
        pgkeep) command="exec $pgkeep --config $WORK/keep/pgkeep.toml wal fetch %f %p" ;;
    esac
    as sh -c "cat >> '$WORK/data/postgresql.conf'" <<CONF
fsync = on
archive_mode = off
hot_standby = off
log_line_prefix = '%n '
lc_messages = 'C'
restore_command = '$command'
$prefetch
CONF
    # The floor recovers like after a crash: no signal file, no hook.
    [ "$way" = floor ] || as touch "$WORK/data/recovery.signal"
    sync
    as "$bindir/pg_ctl" -D "$WORK/data" -l "$WORK/log" -w -t 600 start >/dev/null
    # It calls a server that replays, and that nobody may ask, started.
    local tries
    for tries in $(seq 6000); do sql "SELECT 1" >/dev/null 2>&1 && break; sleep 0.1; done
    took=$(awk '/redo starts at/ { from = $1 } /redo done at/ { to = $1 } END { printf "%.2f", to - from }' "$WORK/log")
    rows=$(sql "SELECT count(*) || '/' || (SELECT count(*) FROM pgbench_history) FROM filler")
    [ "${expected:=$rows}" = "$rows" ] || { echo "$1 recovered $rows, and not $expected" >&2; return 1; }
    as "$bindir/pg_ctl" -D "$WORK/data" -m immediate -w stop >/dev/null
    local left
    for left in $(seq 100); do pgrep -f "$WORK.*(wal fetch|archive-get)" >/dev/null || break; sleep 0.1; done
    as rm -rf "$WORK/data"; as sh -c "rm -rf '$WORK'/spool/*"
}

# A call's p50 and p99 in milliseconds, by sh as the server calls it: what is not there, and beside it cp of nothing.
replay_missing() {
    as cp -a "$WORK/base" "$WORK/data"
    as touch "$WORK/data/recovery.signal" "$WORK/data/postmaster.pid"
    local fetch="exec $pgkeep --config $WORK/keep/pgkeep.toml wal fetch" first
    first=$(basename "$(ls "$WORK"/wal/* | head -1)")
    as env -C "$WORK/data" sh -c "$fetch $first pg_wal/RECOVERYXLOG"
    until ls "$WORK"/data/pg_wal/.pgkeep/spool-* >/dev/null 2>&1; do sleep 0.1; done
    sleep 2
    local name command
    for name in "cp /dev/null" "not there"; do
        case $name in
            cp*) command="exec cp /dev/null pg_wal/nothing" ;;
            *) command="$fetch 0000000100000FFF00000001 pg_wal/RECOVERYXLOG" ;;
        esac
        as env -C "$WORK/data" perl -MTime::HiRes=time -e '
            my @took; for (1 .. 500) { my $from = time; system("/bin/sh", "-c", $ARGV[1]); push @took, 1000 * (time - $from); }
            @took = sort { $a <=> $b } @took; printf "%-14s p50 %.2f ms  p99 %.2f ms  exit %d\n", $ARGV[0], $took[250], $took[495], $? >> 8;
        ' "$name" "$command"
    done
    as rm "$WORK/data/postmaster.pid"
    while pgrep -f "$WORK.*wal fetch" >/dev/null; do sleep 0.1; done
    as rm -rf "$WORK/data"
}

replay_table() {
    local segments=${1:-200} rounds=${2:-3} round way count
    command -v pgbackrest >/dev/null || { echo "needs pgbackrest (apt-get install pgbackrest)" >&2; return 2; }
    replay_archive "$segments"
    count=$(ls "$WORK/wal" | wc -l)
    echo "restore_command: $count segments of 16 MB, $(nproc) processors, $("$bindir/postgres" --version), $(pgbackrest version)"
    replay_missing
    echo "seconds of redo, and the share of the speed of the first, the floor"
    printf '%-6s' round; printf ' %16s' "${replay_ways[@]}"; echo
    for round in $(seq "$rounds"); do
        declare -A seconds=()
        local order=()
        for way in "${replay_ways[@]}"; do
            if [ $((round % 2)) = 1 ]; then order+=("$way"); else order=("$way" "${order[@]}"); fi
        done
        for way in "${order[@]}"; do replay_once "$way"; seconds[$way]=$took; done
        printf '%-6s' "$round"
        for way in "${replay_ways[@]}"; do printf ' %9s (%s)' "${seconds[$way]}" "$(ratio "${seconds[${replay_ways[0]}]}" "${seconds[$way]}")"; done
        echo
    done
}

[ "${BASH_SOURCE[0]}" != "$0" ] || replay_table "$@"
