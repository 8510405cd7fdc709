#!/usr/bin/env bash
# Makes moto available, an S3 server that others wrote, and prints the path of its program on standard output (everything
# else goes to standard error):
#
#   export PGKEEP_MOTO="$(testenv/moto.sh)"
#
# From PyPI, into a virtual environment of its own beside the servers of testenv/servers.sh: $PGKEEP_CACHE, or
# /var/tmp/pgkeep-servers-<uid>. What is there already is not fetched again.
set -euo pipefail

readonly version=5.2.5
cache=${PGKEEP_CACHE:-/var/tmp/pgkeep-servers-$(id -u)}
dest=$cache/moto-$version

say() { echo "moto: $*" >&2; }

works() { [ -x "$dest/bin/moto_server" ] && "$dest/bin/moto_server" --help >/dev/null 2>&1; }

umask 022
if ! works; then
  command -v python3 >/dev/null || { say "no python3 here"; exit 1; }
  mkdir -p "$cache"
  [ -O "$cache" ] && [ ! -L "$cache" ] || { say "$cache is not ours: set PGKEEP_CACHE"; exit 1; }
  exec 9>"$cache/.moto.lock"
  flock 9 2>/dev/null || true # two who come at once: the second finds it there
fi
if ! works; then
  # Scripts in it name its path, so it cannot be renamed into place; what is not whole is made anew.
  rm -rf "$dest"
  say "fetching moto $version"
  # Debian's python3 has venv but not always ensurepip: then the pip that is there installs into it.
  python3 -m venv "$dest" >/dev/null 2>&1 || python3 -m venv --without-pip "$dest" >&2 \
    || { say "python3 cannot make a virtual environment: install python3-venv"; exit 1; }
  if [ -x "$dest/bin/pip" ]; then pip=("$dest/bin/python" -m pip)
  else pip=(python3 -m pip --python "$dest/bin/python")
  fi
  "${pip[@]}" install --quiet --disable-pip-version-check --no-input "moto[server]==$version" >&2 \
    || { rm -rf "$dest"; say "cannot have moto $version"; exit 1; }
  works || { say "moto $version does not run here"; exit 1; }
fi
say "moto $version in $dest"
echo "$dest/bin/moto_server"
