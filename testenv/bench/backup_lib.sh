# Sourced by the benchmarks of backups, after lib.sh: pgkeep and pgBackRest on one server, and what a command cost.
command -v pgbackrest >/dev/null || { echo "needs pgbackrest (apt-get install pgbackrest)" >&2; exit 2; }
[ -x /usr/bin/time ] || { echo "needs time (apt-get install time)" >&2; exit 2; }

# Both archives of the server that `boot` started; pgBackRest encrypts, with two processes and bundles, and blocks where it has them.
archives_begin() {
    version=$(pgbackrest version)
    as mkdir "$WORK/keep" "$WORK/rest" "$WORK/rest/log" "$WORK/rest/lock"
    as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" \
        --repo "$WORK/keep/repository" >/dev/null
    daemon keep "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" run 2>"$WORK/keep.log"
    {
        printf '%s\n' "[global]" "repo1-path=$WORK/rest/repository" "repo1-cipher-type=aes-256-cbc" \
            "repo1-cipher-pass=not-a-secret-of-anybody" "repo1-bundle=y" "compress-type=lz4" "process-max=2" "start-fast=y" \
            "archive-check=n" "log-path=$WORK/rest/log" "lock-path=$WORK/rest/lock" "log-level-console=off" \
            "log-level-stderr=error" "log-level-file=off"
        # 2.46 and later.
        ! dpkg --compare-versions "${version#pgBackRest }" ge 2.46 || echo "repo1-block=y"
        printf '%s\n' "[main]" "pg1-path=$WORK/data" "pg1-socket-path=$WORK" "pg1-port=$PGPORT" "pg1-user=postgres"
    } | as tee "$WORK/rest/pgbackrest.conf" >/dev/null
    rest stanza-create
}
rest() { as pgbackrest --config="$WORK/rest/pgbackrest.conf" --stanza=main "$@"; }
keep() { as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" "$@"; }

# measured COMMAND...: $took and $cpu seconds, $resident MB (the largest of its processes).
measured() {
    local in_user in_system kilobytes
    as touch "$WORK/measured"
    local words=("$@")
    case $1 in
        rest) words=(pgbackrest "--config=$WORK/rest/pgbackrest.conf" --stanza=main "${@:2}") ;;
        keep) words=("$pgkeep" -q --config "$WORK/keep/pgkeep.toml" "${@:2}") ;;
    esac
    as /usr/bin/time -f '%e %U %S %M' -o "$WORK/measured" "${words[@]}" >/dev/null 2>>"$WORK/commands.log" \
        || { tail -5 "$WORK/commands.log" >&2; return 1; }
    read -r took in_user in_system kilobytes <"$WORK/measured"
    cpu=$(awk -v a="$in_user" -v b="$in_system" 'BEGIN { printf "%.2f", a + b }')
    resident=$((kilobytes / 1024))
}
# stored DIR...: megabytes in them.
stored() { { du -cb "$@" 2>/dev/null || true; } | awk 'END { printf "%.1f", $1 / 1e6 }'; }
minus() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.1f", a - b }'; }
reads_all() { measured "$bindir/pg_basebackup" -D - -Ft -X none -c fast; }

# keep_did, rest_did COMMAND...: measured, into $keep_took, $keep_cpu, $keep_resident, $keep_added (MB in the archive); so for rest.
keep_did() {
    local before; before=$(stored "$WORK"/keep/repository/*/*/pack "$WORK"/keep/repository/*/*/backup)
    measured keep "$@"
    keep_took=$took keep_cpu=$cpu keep_resident=$resident
    keep_added=$(minus "$(stored "$WORK"/keep/repository/*/*/pack "$WORK"/keep/repository/*/*/backup)" "$before")
}
rest_did() {
    local before; before=$(stored "$WORK/rest/repository/backup")
    measured rest "$@"
    rest_took=$took rest_cpu=$cpu rest_resident=$resident
    rest_added=$(minus "$(stored "$WORK/rest/repository/backup")" "$before")
}
table_head() {
    printf '%-6s %-14s | %7s | %7s %7s %5s %8s | %7s %7s %5s %8s | %5s %5s %5s %7s\n' round what "read s" \
        "pgkeep" "cpu s" "res." "MB" "pgbackr" "cpu s" "res." "MB" time cpu MB "to read"
}
# table_row ROUND WHAT: of what was measured last; $plain_took is "-" where nothing was read beside it.
table_row() {
    local megabytes="-" to_read="-"
    [ "$rest_added" = 0.0 ] || megabytes=$(ratio "$keep_added" "$rest_added")
    [ "$plain_took" = - ] || to_read=$(ratio "$keep_took" "$plain_took")
    printf '%-6s %-14s | %7s | %7s %7s %5s %8s | %7s %7s %5s %8s | %5s %5s %5s %7s\n' "$1" "$2" "$plain_took" \
        "$keep_took" "$keep_cpu" "$keep_resident" "$keep_added" "$rest_took" "$rest_cpu" "$rest_resident" "$rest_added" \
        "$(ratio "$keep_took" "$rest_took")" "$(ratio "$keep_cpu" "$rest_cpu")" "$megabytes" "$to_read"
}
table_foot() {
    echo "seconds, CPU seconds, MB resident, MB added to the archive; time, cpu, MB: pgkeep / pgBackRest, below 1 is less;"
    echo "to read: pgkeep / pg_basebackup to /dev/null, which is what reading the cluster once costs"
}
