#!/usr/bin/env bash
# A full base backup into a directory, and restoring it: `pgkeep backup` and `restore` (compressed, sealed, verified,
# synced) beside `pg_basebackup` with lz4 into a tar, and unpacking that tar. In turn, on the same server and disk.
#   testenv/bench/backup_plain.sh [SCALE=200] [ROUNDS=3]      (pgbench scale 200 is about 3 GB)
. "$(dirname "$0")/lib.sh"
scale=${1:-200} rounds=${2:-3}
command -v lz4 >/dev/null || { echo "needs lz4 (apt-get install lz4)" >&2; exit 2; }
boot ""
as "$bindir/pgbench" -i -s "$scale" -q >/dev/null 2>&1
sql CHECKPOINT
echo "$(sql "SELECT pg_size_pretty(sum(pg_database_size(oid))) FROM pg_database"), $(nproc) processors, $("$bindir/postgres" --version)"
as mkdir "$WORK/keep"
as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "$WORK/keep/repository" >/dev/null
daemon keep "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" run 2>"$WORK/keep.log"

timed() { local from; from=$(now); "$@"; taken=$(seconds "$from" "$(now)"); }
plain() {
    timed as "$bindir/pg_basebackup" -D "$WORK/plain" -Ft --compress=client-lz4 -X none -c fast 2>/dev/null
    plain_backup=$taken
    as mkdir "$WORK/unpacked"
    timed as sh -c "lz4 -dcq '$WORK/plain/base.tar.lz4' | tar xf - -C '$WORK/unpacked' && sync -f '$WORK/unpacked'"
    plain_restore=$taken
    as rm -rf "$WORK/plain" "$WORK/unpacked"
}
keep() {
    timed as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" backup --full >/dev/null
    keep_backup=$taken
    timed as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" restore --to immediate --pgdata "$WORK/restored" >/dev/null
    keep_restore=$taken
    as rm -rf "$WORK/restored"
}
printf '%-6s %15s %11s %6s   %13s %12s %6s\n' round "pg_basebackup" "backup" ratio "lz4 | tar x" "restore" ratio
for round in $(seq "$rounds"); do
    if [ $((round % 2)) = 1 ]; then plain; keep; else keep; plain; fi
    printf '%-6s %14ss %10ss %6s   %12ss %11ss %6s\n' "$round" "$plain_backup" "$keep_backup" \
        "$(ratio "$keep_backup" "$plain_backup")" "$plain_restore" "$keep_restore" "$(ratio "$keep_restore" "$plain_restore")"
done
echo "ratio: pgkeep / PostgreSQL's own; below 1 is faster"
