#!/usr/bin/env bash
# A base backup after one page in a hundred was changed at random, and the full one before it: `pgkeep backup` beside
# pgBackRest (two processes, lz4, AES-256, bundling; block incremental where its version has that) and beside
# `pg_basebackup` to /dev/null, which is what reading the cluster once costs. In turn, on the same server and disk.
#   testenv/bench/backup_pgbackrest.sh [SCALE=200] [ROUNDS=3]      (pgbench scale 200 is about 3.3 GB)
. "$(dirname "$0")/lib.sh"
scale=${1:-200} rounds=${2:-3}
command -v pgbackrest >/dev/null || { echo "needs pgbackrest (apt-get install pgbackrest)" >&2; exit 2; }
# pgBackRest wants archiving to be on, and its own check of it would archive WAL, which is not what is measured here.
boot "archive_mode = on
archive_command = 'true'
autovacuum = off"
# Room in each page, so that an updated row stays in its page: then as many pages change as rows are updated.
as "$bindir/pgbench" -i -s "$scale" -F 90 -q >/dev/null 2>&1
sql "VACUUM FREEZE; CHECKPOINT"
pages=$(sql "SELECT relpages FROM pg_class WHERE relname = 'pgbench_accounts'")
version=$(pgbackrest version)
echo "$(sql "SELECT pg_size_pretty(sum(pg_database_size(oid))) FROM pg_database"), $pages pages of accounts," \
    "$(nproc) processors, $("$bindir/postgres" --version), $version"

as mkdir "$WORK/keep" "$WORK/rest" "$WORK/rest/log" "$WORK/rest/lock"
as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "$WORK/keep/repository" >/dev/null
daemon keep "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" run 2>"$WORK/keep.log"
{
    printf '%s\n' "[global]" "repo1-path=$WORK/rest/repository" "repo1-cipher-type=aes-256-cbc" \
        "repo1-cipher-pass=not-a-secret-of-anybody" "repo1-bundle=y" "compress-type=lz4" "process-max=2" "start-fast=y" \
        "archive-check=n" "log-path=$WORK/rest/log" "lock-path=$WORK/rest/lock" "log-level-console=off" \
        "log-level-stderr=error" "log-level-file=off"
    # 2.46 and later.
    dpkg --compare-versions "${version#pgBackRest }" ge 2.46 && echo "repo1-block=y"
    printf '%s\n' "[main]" "pg1-path=$WORK/data" "pg1-socket-path=$WORK" "pg1-port=$PGPORT" "pg1-user=postgres"
} | as tee "$WORK/rest/pgbackrest.conf" >/dev/null
rest() { as pgbackrest --config="$WORK/rest/pgbackrest.conf" --stanza=main "$@"; }
rest stanza-create

TIMEFORMAT='%R %U %S'
# measured COMMAND...: $took and $cpu seconds.
measured() {
    local times user system
    times=$({ time "$@" >/dev/null 2>>"$WORK/commands.log"; } 2>&1)
    read -r took user system <<<"$times"
    cpu=$(awk -v a="$user" -v b="$system" 'BEGIN { printf "%.2f", a + b }')
}
# stored DIR...: megabytes in them.
stored() { du -cb "$@" 2>/dev/null | awk 'END { printf "%.1f", $1 / 1e6 }'; }
keep_stored() { stored "$WORK"/keep/repository/*/*/pack "$WORK"/keep/repository/*/*/backup; }
rest_stored() { stored "$WORK/rest/repository/backup"; }
minus() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.1f", a - b }'; }
reading() { "$bindir/pg_basebackup" -D - -Ft -X none -c fast; }
export -f reading; export bindir

keep() { # full or incr
    local before; before=$(keep_stored)
    case $1 in
        full) measured as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" backup --full ;;
        incr) measured as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" backup ;;
    esac
    keep_took=$took keep_cpu=$cpu keep_added=$(minus "$(keep_stored)" "$before")
}
other() {
    local before; before=$(rest_stored)
    measured rest --type="$1" backup
    rest_took=$took rest_cpu=$cpu rest_added=$(minus "$(rest_stored)" "$before")
}
plain() { measured as bash -c reading; plain_took=$took plain_cpu=$cpu; }

printf '%-6s %-5s | %9s %9s | %9s %9s %9s | %9s %9s %9s | %6s %6s %6s %8s\n' round type "read s" "cpu s" "pgkeep s" "cpu s" \
    "MB" "pgbackr s" "cpu s" "MB" time cpu MB "to read"
for round in $(seq "$rounds"); do
    for type in full incr; do
        if [ "$type" = incr ]; then
            sql "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid IN
                (SELECT 1 + floor(random() * 100000 * $scale)::int FROM generate_series(1, $pages / 100)); CHECKPOINT"
        fi
        if [ $((round % 2)) = 1 ]; then plain; keep "$type"; other "$type"; else other "$type"; keep "$type"; plain; fi
        printf '%-6s %-5s | %9s %9s | %9s %9s %9s | %9s %9s %9s | %6s %6s %6s %8s\n' "$round" "$type" "$plain_took" "$plain_cpu" \
            "$keep_took" "$keep_cpu" "$keep_added" "$rest_took" "$rest_cpu" "$rest_added" \
            "$(ratio "$keep_took" "$rest_took")" "$(ratio "$keep_cpu" "$rest_cpu")" "$(ratio "$keep_added" "$rest_added")" \
            "$(ratio "$keep_took" "$plain_took")"
    done
done
echo "time, cpu, MB: pgkeep / pgBackRest, below 1 is less; to read: pgkeep / pg_basebackup to /dev/null"
