#!/usr/bin/env bash
# The whole story in a minute: `pgkeep demo`, on a machine that may have nothing but a Rust toolchain.
# Installs the distribution's PostgreSQL server if none is there (Debian and Ubuntu; needs root or sudo), builds pgkeep,
# and hands every argument to `pgkeep demo`. Works as root and as an ordinary user; touches no server that is running.
#
#   testenv/demo.sh          the repository is a directory
#   testenv/demo.sh --s3     the repository is a bucket: on moto, an S3 server from PyPI that is fetched, started on
#                            127.0.0.1 and stopped again
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
command -v cargo >/dev/null || { echo "demo: cargo is missing; see https://rustup.rs" >&2; exit 2; }

on_s3=
arguments=()
for argument in "$@"; do
  if [ "$argument" = --s3 ]; then on_s3=1; else arguments+=("$argument"); fi
done

have_server() {
  local dir
  local IFS=:
  for dir in ${PGKEEP_PG_BINDIRS:-} $PATH /usr/lib/postgresql/*/bin; do
    # The name is in $PATH only as a link, if at all: initdb is what a client's package does not have.
    [ ! -x "$dir/initdb" ] || return 0
  done
  return 1
}

have_server || "$root/testenv/servers.sh" --system-only >/dev/null || {
  echo "demo: no PostgreSQL server was found, and none could be installed" >&2
  exit 2
}
(cd "$root" && cargo build --release --locked --quiet --bin pgkeep)
pgkeep=${CARGO_TARGET_DIR:-$root/target}/release/pgkeep
[ -n "$on_s3" ] || exec "$pgkeep" demo "${arguments[@]}"

moto=$("$root/testenv/moto.sh")
python=$(dirname "$moto")/python
log=$(mktemp)
server=
cleanup() {
  [ -z "$server" ] || { kill "$server" && wait "$server"; } 2>/dev/null || true
  rm -f "$log"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Nobody else's account is used by mistake.
unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3
export AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY=demo AWS_REGION=us-east-1
free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free_port)
"$moto" -H 127.0.0.1 -p "$port" >"$log" 2>&1 &
server=$!
for _ in $(seq 300); do
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
  kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 3; }
  sleep 0.1
done
"$python" - "$port" <<'PY'
import sys
import boto3

client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{sys.argv[1]}", region_name="us-east-1")
client.create_bucket(Bucket="scratch")
PY
echo "An S3 server (moto) listens on 127.0.0.1:$port, with the bucket scratch."
"$pgkeep" demo --repo s3://scratch --endpoint "http://127.0.0.1:$port" "${arguments[@]}"
