#!/usr/bin/env bash
# A cluster of many small tables, backed up and restored beside pgBackRest.
#   testenv/bench/backup_tables.sh [TABLES=20000] [ROUNDS=3]
. "$(dirname "$0")/lib.sh"
. "$here/backup_lib.sh"
tables=${1:-20000} rounds=${2:-3}
boot "archive_mode = on
archive_command = 'true'
autovacuum = off
max_locks_per_transaction = 1024"
for first in $(seq 1 1000 "$tables"); do
    sql "DO \$\$ BEGIN FOR i IN $first..least($first + 999, $tables) LOOP
        EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY, x text)', i);
        EXECUTE format('INSERT INTO t%s SELECT g, md5(g::text) FROM generate_series(1, 20) g', i); END LOOP; END \$\$"
done
sql CHECKPOINT
archives_begin
echo "$tables tables, $(find "$WORK/data/base" -type f | wc -l) files," \
    "$(sql "SELECT pg_size_pretty(sum(pg_database_size(oid))) FROM pg_database"), $(nproc) processors," \
    "$("$bindir/postgres" --version), $version"
restored="$WORK/restored"
table_head
for round in $(seq "$rounds"); do
    plain_took=-
    keep_did backup --full; rest_did --type=full backup; table_row "$round" full
    as mkdir -m 700 "$restored.rest"
    sync; keep_did restore --to immediate --pgdata "$restored.keep"
    sync; rest_did "--pg1-path=$restored.rest" restore
    table_row "$round" "full restore"
    as rm -rf "$restored.keep" "$restored.rest"
done
table_foot
