#!/usr/bin/env bash
# Runs the fuzz target with the stable compiler; arguments go to libFuzzer.
set -euo pipefail
cd "$(dirname "$0")"
host=$(rustc -vV | sed -n 's/^host: //p')
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags="$flags -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
RUSTFLAGS="$flags" cargo build --release --target "$host"
mkdir -p found
exec "target/$host/release/wal" "$@" found corpus/wal
