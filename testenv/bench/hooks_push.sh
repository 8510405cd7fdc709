# Sourced by hooks.sh, after lib.sh: archive_command. `push_table [SEGMENTS=200] [ROUNDS=3]`.
#
# A backlog of segments of 16 MB, offered one after the other as PostgreSQL's archiver does (sh, then .ready becomes .done), to
# `cp`, to pgBackRest (asynchronous, two processes, lz4, aes-256-cbc) and to `pgkeep wal push` (lz4, AES-GCM). In turn, on the
# same files, into a directory; with PGKEEP_BENCH_S3 (the example s3_server) and stunnel4 also into a bucket on loopback, both
# through the same TLS: pgBackRest speaks no other.

# The archiver's way: offers what is ready in order. Prints seconds in all, and p50 and p99 of the calls in milliseconds.
cat > "$WORK/archiver.pl" <<'PERL'
use strict; use warnings; use Time::HiRes qw(time sleep);
my ($status, $command, $first, $count) = @ARGV;
opendir(my $dir, $status) or die; my @ready = sort map { /^(.*)\.ready$/ ? $1 : () } readdir $dir;
@ready = splice(@ready, $first, $count);
my ($began, @took) = (time);
for my $name (@ready) {
    (my $call = $command) =~ s/%p/pg_wal\/$name/g; $call =~ s/%f/$name/g;
    for my $try (1 .. 60) {
        my $from = time; my $code = system("/bin/sh", "-c", $call); push @took, 1000 * (time - $from);
        last if $code == 0;
        print STDERR "$call: $code\n"; die "given up" if $try == 60; sleep 1;
    }
    rename "$status/$name.ready", "$status/$name.done" or die;
}
my $all = time - $began; @took = sort { $a <=> $b } @took;
printf "%.2f %.2f %.2f\n", $all, $took[$#took * 0.5], $took[$#took * 0.99];
PERL
offer() { as env -C "$WORK/data" perl "$WORK/archiver.pl" pg_wal/archive_status "$@"; }
ready_again() {
    as env -C "$WORK/data/pg_wal/archive_status" sh -c 'for done in *.done; do [ -e "$done" ] && mv "$done" "${done%.done}.ready"; done; true'
}

# backlog SEGMENTS: a server, and so many segments that are ready.
backlog() {
    boot "archive_mode = on
archive_command = ''
wal_keep_size = 64GB"
    sql "CREATE TABLE filler (g bigint, t timestamptz, x text)"
    local begin; begin=$(sql "SELECT pg_current_wal_lsn()")
    while [ "$(sql "SELECT (pg_current_wal_lsn() - '$begin') / 16777216 < $1")" = t ]; do
        sql "INSERT INTO filler SELECT g, now(), md5(g::text) FROM generate_series(1, 400000) g; UPDATE filler SET g = g + 1 WHERE g % 3 = 0"
    done
    sql "SELECT pg_switch_wal(); CHECKPOINT" >/dev/null
    system=$(sql "SELECT system_identifier FROM pg_control_system()")
}

# What a way is called with, after everything of an earlier round was removed: sets $command.
begin_cp() {
    as rm -rf "$WORK/cp"; as mkdir "$WORK/cp"
    command="exec cp %p $WORK/cp/%f"
}
pgbackrest_conf() {
    as sh -c "cat > '$WORK/pgbackrest.conf'" <<CONF
[global]
spool-path=$WORK/spool
lock-path=$WORK/lock
log-path=$WORK/log-pgbackrest
log-level-file=off
log-level-console=warn
archive-async=y
process-max=2
compress-type=lz4
repo1-cipher-type=aes-256-cbc
repo1-cipher-pass=benchmark
$1
[bench]
pg1-path=$WORK/data
pg1-socket-path=$WORK
pg1-port=$PGPORT
pg1-user=postgres
CONF
}
begin_pgbackrest() {
    as rm -rf "$WORK/pgbackrest" "$WORK/spool" "$WORK/lock"; as mkdir -p "$WORK/pgbackrest" "$WORK/spool" "$WORK/lock" "$WORK/log-pgbackrest"
    pgbackrest_conf "${1:-repo1-path=$WORK/pgbackrest}"
    as pgbackrest --config "$WORK/pgbackrest.conf" --stanza bench stanza-create >/dev/null
    command="exec pgbackrest --config $WORK/pgbackrest.conf --stanza bench archive-push %p"
}
begin_pgbackrest_s3() {
    bucket_begins
    begin_pgbackrest "repo1-type=s3
repo1-path=/pgbackrest
repo1-s3-bucket=$bucket
repo1-s3-endpoint=localhost
repo1-s3-region=$AWS_REGION
repo1-s3-key=$AWS_ACCESS_KEY_ID
repo1-s3-key-secret=$AWS_SECRET_ACCESS_KEY
repo1-s3-uri-style=path
repo1-storage-host=127.0.0.1
repo1-storage-port=54443
repo1-storage-verify-tls=n"
}
begin_pgkeep() {
    as rm -rf "$WORK/keep"; as mkdir "$WORK/keep"
    [ $# -gt 0 ] || set -- "$WORK/keep/repository"
    as "$pgkeep" -q --config "$WORK/keep/pgkeep.toml" init --yes --pg "host=$WORK port=$PGPORT user=postgres" --repo "$@" --slot bench >/dev/null
    sql "SELECT pg_drop_replication_slot('bench')" >/dev/null
    command="exec $pgkeep --config $WORK/keep/pgkeep.toml wal push %p"
}
begin_pgkeep_s3() {
    bucket_begins
    begin_pgkeep "s3://$bucket/keep" --endpoint https://localhost:54443 --path-style --ca-file "$WORK/cert.pem"
}
# An empty bucket behind TLS: objects lie in the server's memory, so that each way has one of its own.
bucket_begins() {
    bucket_ends
    coproc S3 { exec "$PGKEEP_BENCH_S3"; }
    local endpoint
    read -r endpoint bucket AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY <&"${S3[0]}"
    export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_REGION=us-east-1
    echo "$S3_PID" > "$WORK/s3.pid"
    openssl req -x509 -newkey rsa:2048 -nodes -keyout "$WORK/key.pem" -out "$WORK/cert.pem" -days 2 -subj /CN=localhost \
        -addext "subjectAltName=DNS:localhost" -addext "basicConstraints=critical,CA:FALSE" 2>/dev/null
    cat "$WORK/key.pem" "$WORK/cert.pem" > "$WORK/tls.pem"
    printf 'foreground = yes\npid =\n[s3]\naccept = 127.0.0.1:54443\nconnect = %s\ncert = %s\n' "${endpoint#http://}" "$WORK/tls.pem" > "$WORK/stunnel.conf"
    stunnel4 "$WORK/stunnel.conf" 2>"$WORK/stunnel.log" & echo $! > "$WORK/stunnel.pid"
    until grep -q 'Configuration successful' "$WORK/stunnel.log"; do sleep 0.1; done
}
bucket_ends() {
    local pid
    for pid in "$WORK/s3.pid" "$WORK/stunnel.pid"; do
        [ -f "$pid" ] || continue
        kill "$(cat "$pid")" 2>/dev/null || true
        wait "$(cat "$pid")" 2>/dev/null || true
        rm "$pid"
    done
}
# Everything of a way that still runs has ended, so that it costs the next one nothing.
end_way() {
    local left
    for left in $(seq 200); do
        pgrep -f "$WORK.*(archive-push|--helper)" >/dev/null || return 0
        case $left in 1) as rm -f "$WORK/data/pg_wal/.pgkeep/push.sock" ;; esac
        sleep 0.1
    done
    echo "something still runs after $1" >&2; return 1
}

# Rate of a backlog: each way once in a round, in turn; the last beside the one before it.
push_rates() {
    local segments=$1 rounds=$2 round way; shift 2
    local forth=("$@") back=() ways
    for way in "$@"; do back=("$way" "${back[@]}"); done
    printf '%-6s' round; printf ' %18s' "$@"; echo "   last / the one before"
    for round in $(seq "$rounds"); do
        declare -A mb=()
        ways=("${forth[@]}"); [ $((round % 2)) = 1 ] || ways=("${back[@]}")
        for way in "${ways[@]}"; do
            "begin_$way"; ready_again; sync
            read -r all p50 p99 < <(offer "$command" 0 "$segments")
            mb[$way]=$(awk -v n="$segments" -v s="$all" 'BEGIN { printf "%.0f", n * 16.777216 / s }')
            end_way "$way"
        done
        printf '%-6s' "$round"; for way in "$@"; do printf ' %13s MB/s' "${mb[$way]}"; done
        echo "   $(ratio "${mb[${!#}]}" "${mb[${@: -2:1}]}")"
    done
}

# A call that has nothing to wait for: its file was put ahead already. Beside `cp /dev/null`.
push_calls() {
    local segments=$1 rounds=$2 round way
    printf '%-6s %20s %20s %20s   (p50, p99 in ms)\n' round "cp /dev/null" "pgbackrest" "pgkeep"
    for round in $(seq "$rounds"); do
        declare -A ms=()
        for way in pgbackrest pgkeep; do
            "begin_$way"; ready_again
            # The first call starts the helper, the second one sets it going.
            offer "$command" 0 1 >/dev/null
            [ "$way" = pgbackrest ] || until [ -S "$WORK/data/pg_wal/.pgkeep/push.sock" ]; do sleep 0.05; done
            offer "$command" 0 1 >/dev/null
            put_ahead "$way" "$segments"
            read -r all p50 p99 < <(offer "$command" 0 "$segments")
            ms[$way]="$p50 $p99"
            end_way "$way"
        done
        ready_again
        read -r all p50 p99 < <(offer "exec cp /dev/null $WORK/nothing" 0 "$segments")
        ms[cp]="$p50 $p99"
        printf '%-6s %20s %20s %20s\n' "$round" "${ms[cp]}" "${ms[pgbackrest]}" "${ms[pgkeep]}"
    done
}
# Waits until everything is put ahead: as many files as are ready.
put_ahead() {
    local many=0 before=-1
    until [ "$many" -ge "$2" ] && [ "$many" = "$before" ]; do
        sleep 0.5
        before=$many
        case $1 in
            pgbackrest) many=$(find "$WORK/pgbackrest" -name '*.lz4' | wc -l) ;;
            pgkeep) many=$(find "$WORK/keep/repository" -path '*/wal/*' -type f | wc -l) ;;
        esac
    done
}

push_table() {
    local segments=${1:-200} rounds=${2:-3}
    command -v pgbackrest >/dev/null || { echo "needs pgbackrest (apt-get install pgbackrest)" >&2; return 2; }
    backlog "$segments"
    echo "archive_command: $segments segments of 16 MB, $(nproc) processors, $("$bindir/postgres" --version), $(pgbackrest version)"
    push_rates "$segments" "$rounds" cp pgbackrest pgkeep
    if [ -n "${PGKEEP_BENCH_S3:-}" ] && command -v stunnel4 >/dev/null; then
        push_rates "$segments" "$rounds" pgbackrest_s3 pgkeep_s3
        bucket_ends
    fi
    push_calls "$segments" "$rounds"
    as "$bindir/pg_ctl" -D "$WORK/data" -m immediate -w stop >/dev/null
    as rm -rf "$WORK/data"
}
