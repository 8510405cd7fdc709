#!/usr/bin/env bash
# The whole test suite, against real PostgreSQL servers; makes available what is missing (testenv/servers.sh).
# The last lines say which majors of PostgreSQL and which S3 servers were covered, and what ran in containers. Fewer than
# three majors, no 15, or no S3 server that others wrote (moto: testenv/moto.sh), is a failure; so are fewer than three majors in
# containers where a Docker engine answers (testenv/containers.sh). Without an engine those tests are skipped, and it is said.
#
#   testenv/test.sh                 everything
#   testenv/test.sh FILTER...       only what matches (cargo's or nextest's words); coverage is shown, not judged
#
# Works as root and as an ordinary user. PGKEEP_PG_BINDIRS, if set, is looked at first. PGKEEP_GARAGE, if set, names a
# `garage`, which is tested against too; it takes eight minutes to build and is not fetched here.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly wanted_majors=(13 14 15 16 17 18) needed=3 always=15

command -v cargo >/dev/null || { echo "test: cargo is missing; see https://rustup.rs" >&2; exit 2; }

found=$(testenv/servers.sh) || echo "test: no servers beyond those that are set" >&2
export PGKEEP_PG_BINDIRS="${PGKEEP_PG_BINDIRS:+$PGKEEP_PG_BINDIRS:}$found"

[ -n "${PGKEEP_MOTO:-}" ] || PGKEEP_MOTO=$(testenv/moto.sh) || echo "test: no moto" >&2
export PGKEEP_MOTO=${PGKEEP_MOTO:-}

[ -n "${PGKEEP_PROMTOOL:-}" ] || PGKEEP_PROMTOOL=$(testenv/promtool.sh) || echo "test: no promtool" >&2
if [ -n "${PGKEEP_PROMTOOL:-}" ]; then export PGKEEP_PROMTOOL; else unset PGKEEP_PROMTOOL; fi

engine=yes
if [ -z "${PGKEEP_CONTAINERS:-}" ]; then
  PGKEEP_CONTAINERS=$(testenv/containers.sh) || { [ $? -ne 3 ] || engine=no; PGKEEP_CONTAINERS=; }
fi
export PGKEEP_CONTAINERS

coverage=${CARGO_TARGET_DIR:-$PWD/target}/coverage-of-majors
rm -rf "$coverage"
mkdir -p "$coverage"
export PGKEEP_COVERAGE_DIR=$coverage

status=0
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run "$@" || status=$?
else
  cargo test --lib --bins --tests --no-fail-fast "$@" || status=$?
fi
[ $# -gt 0 ] || cargo test --doc --quiet || status=$?

echo
echo "PostgreSQL majors covered:"
covered=0 always_covered=no
for major in "${wanted_majors[@]}"; do
  # A note is: major, version, test. A test that met a server twice is one test.
  notes=$(find "$coverage" -name '*.txt' -exec cat {} + | awk -v major="$major" '$1 == major {print $2, $3}' | sort -u)
  if [ -z "$notes" ]; then
    printf '  %-3s MISSING: no test ran against it\n' "$major"
    continue
  fi
  covered=$((covered + 1))
  [ "$major" != "$always" ] || always_covered=yes
  versions=$(awk '{print $1}' <<<"$notes" | sort -u | paste -sd ' ')
  printf '  %-3s %3d tests (%s)\n' "$major" "$(awk '{print $2}' <<<"$notes" | sort -u | wc -l)" "$versions"
done
if [ $# -eq 0 ] && { [ "$covered" -lt "$needed" ] || [ "$always_covered" = no ]; }; then
  echo "FAILED: $covered majors were covered; at least $needed are needed, $always among them (testenv/servers.sh says why)"
  [ "$status" -ne 0 ] || status=1
fi

echo "S3 servers covered:"
moto_covered=no
for server in s3-in-process s3-moto s3-garage; do
  notes=$(find "$coverage" -name '*.txt' -exec cat {} + | awk -v server="$server" '$1 == server {print $2, $3}' | sort -u)
  case $server in
    s3-in-process) name='in-process endpoint' versions='' ;;
    *) name=${server#s3-} versions=" $(awk '{print $1}' <<<"$notes" | sort -u | paste -sd ' ')" ;;
  esac
  if [ -n "$notes" ]; then
    printf '  %s%s: %d tests\n' "$name" "$versions" "$(awk '{print $2}' <<<"$notes" | sort -u | wc -l)"
    [ "$server" != s3-moto ] || moto_covered=yes
  elif [ "$server" = s3-garage ] && [ -z "${PGKEEP_GARAGE:-}" ]; then
    printf '  %s: left out, PGKEEP_GARAGE is not set\n' "$name"
  else
    printf '  %s MISSING: no test ran against it\n' "$name"
  fi
done
if [ $# -eq 0 ] && [ "$moto_covered" = no ]; then
  echo "FAILED: no S3 server that others wrote was covered (testenv/moto.sh says why)"
  [ "$status" -ne 0 ] || status=1
fi

notes=$(find "$coverage" -name '*.txt' -exec cat {} + | awk '$1 == "containers" {print $2, $3}' | sort -u)
in_containers=$(awk '{print $1}' <<<"$notes" | sort -un | paste -sd ' ')
if [ "$engine" = no ]; then
  echo "containers: SKIPPED, no Docker engine"
elif [ -z "$notes" ]; then
  echo "containers: NONE ran, and a Docker engine answers"
else
  echo "containers: $(awk '{print $2}' <<<"$notes" | sort -u | wc -l) tests, majors $in_containers"
fi
[ "$engine" = no ] || testenv/containers.sh --sweep
if [ $# -eq 0 ] && [ "$engine" = yes ] && [ "$(wc -w <<<"$in_containers")" -lt "$needed" ]; then
  echo "FAILED: $needed majors are needed in containers where there is a Docker engine (testenv/containers.sh says why)"
  [ "$status" -ne 0 ] || status=1
fi
[ "$status" -eq 0 ] && echo "all tests passed" || echo "FAILED: see above"
exit "$status"
