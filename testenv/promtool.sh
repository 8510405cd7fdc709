#!/usr/bin/env bash
# Makes promtool available, which checks the metrics page and the rules, and prints the path of its program on standard output
# (everything else goes to standard error):
#
#   export PGKEEP_PROMTOOL="$(testenv/promtool.sh)"
#
# From Debian's package `prometheus`, by this machine's apt; it is unpacked beside the servers of testenv/servers.sh
# ($PGKEEP_CACHE, or /var/tmp/pgkeep-servers-<uid>) and not installed: no service starts. What is there already is not
# fetched again.
set -euo pipefail

cache=${PGKEEP_CACHE:-/var/tmp/pgkeep-servers-$(id -u)}
dest=$cache/promtool

say() { echo "promtool: $*" >&2; }

if installed=$(command -v promtool); then echo "$installed"; exit 0; fi
if [ ! -x "$dest/promtool" ]; then
  command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { say "no apt here"; exit 1; }
  mkdir -p "$cache"
  [ -O "$cache" ] && [ ! -L "$cache" ] || { say "$cache is not ours: set PGKEEP_CACHE"; exit 1; }
  work=$(mktemp -d "$cache/.promtool.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  say "fetching Debian's package prometheus"
  (cd "$work" && apt-get -q download prometheus >&2) || { say "apt cannot have it (apt-get update?)"; exit 1; }
  dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool
  mkdir -p "$dest"
  mv "$work/usr/bin/promtool" "$dest/promtool"
  "$dest/promtool" --version >/dev/null 2>&1 || { rm -rf "$dest"; say "it does not run here"; exit 1; }
fi
say "$("$dest/promtool" --version 2>&1 | head -n 1)"
echo "$dest/promtool"
