# Sourced by the benchmarks: a throwaway server, and timing. Everything lies under $WORK, which is removed at the end.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

# The newest bin directory of Debian's PostgreSQL, or what PGKEEP_BENCH_BINDIR names: it must be built with lz4.
bindir=${PGKEEP_BENCH_BINDIR:-$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)}
pgkeep=${PGKEEP_BENCH_BINARY:-$root/target/release/pgkeep}
[ -x "$pgkeep" ] || { echo "build it first: cargo build --release" >&2; exit 2; }

WORK=$(mktemp -d "${PGKEEP_BENCH_DIR:-/var/tmp}/pgkeep-bench.XXXXXX")
chmod 755 "$WORK"
if [ "$(id -u)" = 0 ]; then
    user=${PGKEEP_PG_USER:-postgres}
    chown "$user" "$WORK"
    as() { setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups -- "$@"; }
else
    user=$(id -un)
    as() { "$@"; }
fi
finish() {
    [ -f "$WORK/data/postmaster.pid" ] && as "$bindir/pg_ctl" -D "$WORK/data" -m immediate -w stop >/dev/null 2>&1
    for pid in "$WORK"/*.pid; do [ -f "$pid" ] && kill -TERM "$(cat "$pid")" 2>/dev/null; done
    rm -rf "$WORK"
}
trap finish EXIT
export PGHOST=$WORK PGPORT=54999 PGUSER=postgres PGDATABASE=postgres

# boot CONF: a new cluster with these settings, running.
boot() {
    as "$bindir/initdb" -D "$WORK/data" -U postgres -A trust --no-sync -k >/dev/null
    printf '%s\n' "listen_addresses = ''" "unix_socket_directories = '$WORK'" "port = $PGPORT" \
        "shared_buffers = 1GB" "max_wal_size = 20GB" "checkpoint_timeout = 1h" "fsync = off" "$1" >> "$WORK/data/postgresql.conf"
    as "$bindir/pg_ctl" -D "$WORK/data" -l "$WORK/log" -w start >/dev/null
}
sql() { as "$bindir/psql" -XAtqc "$1"; }
# daemon NAME COMMAND...: in the background as the server's user; its own pid in $WORK/NAME.pid.
daemon() {
    local name=$1; shift
    as sh -c 'echo $$ > "$0"; exec "$@"' "$WORK/$name.pid" "$@" &
    until [ -s "$WORK/$name.pid" ]; do sleep 0.01; done
}
now() { date +%s.%N; }
seconds() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", b - a }'; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
