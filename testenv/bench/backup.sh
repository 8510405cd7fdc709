#!/usr/bin/env bash
# Base backups and restores beside what others have, in turn, on the same server and disk: PostgreSQL's own tools
# (backup_plain.sh), pgBackRest with full, incremental and delta (backup_pgbackrest.sh), many small tables (backup_tables.sh).
#   testenv/bench/backup.sh [plain|pgbackrest|tables|all] [SCALE=200] [ROUNDS=3] [TABLES=20000]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
what=${1:-all} scale=${2:-200} rounds=${3:-3} tables=${4:-20000}
case $what in plain | pgbackrest | tables | all) ;; *) sed -n '2,4s/^# *//p' "$0" >&2; exit 2 ;; esac
case $what in plain | all) "$here/backup_plain.sh" "$scale" "$rounds" ;; esac
case $what in pgbackrest | all) "$here/backup_pgbackrest.sh" "$scale" "$rounds" ;; esac
case $what in tables | all) "$here/backup_tables.sh" "$tables" "$rounds" ;; esac
