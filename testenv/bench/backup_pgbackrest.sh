#!/usr/bin/env bash
# Backups and restores beside pgBackRest (two processes, lz4, AES-256, bundling; block incremental where its version has that):
# full, after one page in a hundred was changed at random, restored whole, and restored as a delta into the state before the change.
#   testenv/bench/backup_pgbackrest.sh [SCALE=200] [ROUNDS=3]      (pgbench scale 200 is about 3.3 GB)
. "$(dirname "$0")/lib.sh"
. "$here/backup_lib.sh"
scale=${1:-200} rounds=${2:-3}
# pgBackRest wants archiving to be on, and its own check of it would archive WAL, which is not what is measured here.
boot "archive_mode = on
archive_command = 'true'
autovacuum = off"
# Room in each page, so that an updated row stays in its page: then as many pages change as rows are updated.
as "$bindir/pgbench" -i -s "$scale" -F 90 -q >/dev/null 2>&1
sql "VACUUM FREEZE"
sql CHECKPOINT
pages=$(sql "SELECT relpages FROM pg_class WHERE relname = 'pgbench_accounts'")
archives_begin
echo "$(sql "SELECT pg_size_pretty(sum(pg_database_size(oid))) FROM pg_database"), $pages pages of accounts," \
    "$(nproc) processors, $("$bindir/postgres" --version), $version"

change() {
    sql "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid IN
        (SELECT 1 + floor(random() * 100000 * $scale)::int FROM generate_series(1, $pages / 100))"
    sql CHECKPOINT
}
# in_turn ROUND KEEP... -- REST...: pgkeep first in odd rounds.
in_turn() {
    local round=$1 ours=() theirs=(); shift
    while [ "$1" != -- ]; do ours+=("$1"); shift; done; shift; theirs=("$@")
    sync
    if [ $((round % 2)) = 1 ]; then keep_did "${ours[@]}"; sync; rest_did "${theirs[@]}"
    else rest_did "${theirs[@]}"; sync; keep_did "${ours[@]}"; fi
}
restored="$WORK/restored"
table_head
for round in $(seq "$rounds"); do
    reads_all; plain_took=$took
    in_turn "$round" backup --full -- --type=full backup; table_row "$round" full
    plain_took=-
    as mkdir -m 700 "$restored.rest"
    in_turn "$round" restore --to immediate --pgdata "$restored.keep" -- "--pg1-path=$restored.rest" restore
    table_row "$round" "full restore"
    change
    reads_all; plain_took=$took
    in_turn "$round" backup -- --type=incr backup; table_row "$round" "1 % changed"
    plain_took=-
    in_turn "$round" restore --delta --to immediate --pgdata "$restored.keep" -- "--pg1-path=$restored.rest" --delta restore
    table_row "$round" "delta restore"
    as rm -rf "$restored.keep" "$restored.rest"
done
table_foot
