#!/usr/bin/env bash
# Makes the image that the tests in containers start from, and prints the value for PGKEEP_CONTAINERS on standard output
# (everything else goes to standard error):
#
#   export PGKEEP_CONTAINERS="$(testenv/containers.sh)"     pgkeep-test:<hash> 13 15 17 18: an image, and its majors
#   testenv/containers.sh --sweep     removes containers, networks and volumes of tests that no longer run
#
# No registry and no mirror: the image has files of this machine's own Debian packages (libc, which fits the binaries that are
# built here, a shell, coreutils, setpriv, the system's PostgreSQL) and the servers that testenv/servers.sh has made available,
# where PGKEEP_PG_BINDIRS says. It is kept by a tag with a hash of the recipe and of what goes in; what is there already is
# not made again. pgkeep itself is not in it: tests mount the program they test.
#
# Status 3: no Docker engine answers.
set -euo pipefail

readonly label=pgkeep.test
say() { echo "containers: $*" >&2; }

engine() { command -v docker >/dev/null && docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }
engine || { say "no Docker engine answers"; exit 3; }

# The label is <pid>.<start>: a number that was used again has another start.
lives() {
  local stat
  stat=$(cat "/proc/${1%%.*}/stat" 2>/dev/null) || return 1
  stat=${stat##*) }
  # shellcheck disable=SC2086  # the fields behind the name; the start is the 22nd of all
  set -- "${1#*.}" $stat
  [ "$1" = "${21}" ]
}

sweep() {
  local kind id owner format
  for kind in container network volume; do
    format='{{index .Labels "'$label'"}}'
    [ "$kind" != container ] || format='{{index .Config.Labels "'$label'"}}'
    local all=()
    [ "$kind" != container ] || all=(-a)
    for id in $(docker "$kind" ls -q "${all[@]}" --filter "label=$label"); do
      owner=$(docker "$kind" inspect --format "$format" "$id" 2>/dev/null) || continue # gone by itself
      lives "$owner" && continue
      say "removing $kind $id, left by process ${owner%%.*}"
      case $kind in
        container) docker rm -fv "$id" >/dev/null 2>&1 || true ;;
        *) docker "$kind" rm "$id" >/dev/null 2>&1 || true ;;
      esac
    done
  done
}

if [ "${1:-}" = --sweep ]; then
  sweep
  exit
fi

bindirs() { # major, version, directory: the newest minor of each major
  local dir version
  { tr : '\n' <<<"${PGKEEP_PG_BINDIRS:-}"; ls -d /usr/lib/postgresql/*/bin 2>/dev/null || true; } | while read -r dir; do
    [ -x "$dir/postgres" ] && [ -x "$dir/initdb" ] || continue
    version=$("$dir/postgres" -V 2>/dev/null | awk '{print $3}') || continue
    echo "${version%%.*} $version $(readlink -f "$dir")"
  done | sort -k1,1n -k2,2Vr | awk '!seen[$1]++'
}

readonly programs=(bash sh cat chmod chown cp dd df echo env id install ls mkdir mv rm sleep sync tail touch true setpriv)
readonly libraries=(libgcc_s.so.1 libm.so.6 libdl.so.2 libpthread.so.0 librt.so.1 libresolv.so.2 libnss_files.so.2 libnss_dns.so.2)

servers=$(bindirs)
[ -n "$servers" ] || { say "no PostgreSQL server: run testenv/servers.sh, and set PGKEEP_PG_BINDIRS"; exit 1; }
recipe=$({
  cat "${BASH_SOURCE[0]}"
  echo "$servers"
  ldd --version | head -n 1
  stat -L -c '%n %s %Y' "$(command -v bash)" "$(command -v setpriv)" "$(command -v sleep)"
} | sha256sum | cut -c1-12)
readonly image=pgkeep-test:$recipe
answer="$image $(awk '{print $1}' <<<"$servers" | paste -sd ' ')"

# Paths without links in their folders: /lib is a link in the image, too.
plain() { local path; while read -r path; do echo "$(readlink -f "$(dirname "$path")")/$(basename "$path")"; done; }
needs() { ldd "$@" 2>/dev/null | awk '$2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\// && $1 !~ /:$/ {print $1}' | sort -u; }

build() {
  local work begun=$SECONDS major version bindir top
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # now, not later
  trap "rm -rf '$work'" EXIT
  mkdir -p "$work"/root/{etc,tmp,proc,sys,dev,run,root,servers,usr/{bin,sbin,lib,lib64,local/bin},var/tmp}
  chmod 1777 "$work/root/tmp" "$work/root/var/tmp"
  ln -s usr/bin usr/sbin usr/lib usr/lib64 "$work/root/"
  printf 'root:x:0:0:root:/root:/bin/bash\npostgres:x:70:70:postgres:/tmp:/bin/bash\n' > "$work/root/etc/passwd"
  printf 'root:x:0:\npostgres:x:70:\n' > "$work/root/etc/group"
  printf 'passwd: files\ngroup: files\nhosts: files dns\n' > "$work/root/etc/nsswitch.conf"

  # One certificate: nobody is to be trusted here, but a debug build of the S3 client wants one, and reads all there are.
  mkdir -p "$work/root/etc/ssl/certs"
  sed '/END CERTIFICATE/q' /etc/ssl/certs/ca-certificates.crt > "$work/root/etc/ssl/certs/ca-certificates.crt" || true

  local folders=() closure=()
  [ ! -d /usr/share/zoneinfo ] || folders+=(/usr/share/zoneinfo)
  while read -r major version bindir; do
    say "PostgreSQL $version from $bindir"
    ln -s "$bindir" "$work/root/servers/$major"
    case $bindir in
      /usr/lib/postgresql/*) # this system's own: its libraries are this system's
        folders+=("$bindir" "/usr/lib/postgresql/$major/lib" "/usr/share/postgresql/$major")
        closure+=("$bindir"/* "/usr/lib/postgresql/$major/lib"/{libpqwalreceiver,plpgsql,dict_snowball,pgoutput}.so)
        ;;
      */usr/lib/postgresql/*) # unpacked packages, with libraries of their own
        top=${bindir%/usr/lib/postgresql/*}
        folders+=("$top")
        ;;
      *) # a wheel
        folders+=("$(dirname "$bindir")")
        closure+=("$bindir/postgres")
        ;;
    esac
  done <<<"$servers"

  for name in "${programs[@]}"; do command -v "$name" || true; done | grep ^/ | plain > "$work/files"
  for name in "${libraries[@]}"; do ldconfig -p | awk -v name="$name" '$1 == name && !found {print $NF; found = 1}'; done \
    | plain >> "$work/files"
  # shellcheck disable=SC2046  # one word per program
  needs $(cat "$work/files") "${closure[@]}" | plain >> "$work/files"
  sort -u -o "$work/files" "$work/files"

  tar -C "$work/root" --owner=0 --group=0 -cf "$work/image.tar" .
  tar -C / --owner=0 --group=0 -h -rf "$work/image.tar" -T <(sed 's|^/||' "$work/files")
  # Left out: JIT, translations, documentation, scripting languages.
  tar -C / --owner=0 --group=0 -rf "$work/image.tar" --exclude='*llvmjit*' --exclude='*/bitcode' --exclude='*/share/doc' \
    --exclude='*/share/locale' --exclude='*/share/man' --exclude='*/share/info' --exclude='*/gconv' --exclude='*/perl*' \
    --exclude='*/include' -T <(printf '%s\n' "${folders[@]}" | sed 's|^/||')
  docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin' "$work/image.tar" "$image" >/dev/null
  say "made $image of $(du -m "$work/image.tar" | cut -f1) MiB in $((SECONDS - begun)) s"
}

sweep
lock=${TMPDIR:-/tmp}/pgkeep-test-image-$(id -u).lock
exec 9>"$lock"
flock 9 # two who come at once: the second finds it there
docker image inspect "$image" >/dev/null 2>&1 || build
say "$answer"
echo "$answer"
