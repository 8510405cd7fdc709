#!/usr/bin/env bash
# The archiver in simulation, by seed: the clock, the server, the stores and all threads are replaced, and cuts, kills, lost
# answers, slow stores and promotions befall it as the seed says (docs/architecture.md, Simulation).
#
#   testenv/simulate.sh                     100,000 seeds from 1 on, for a night
#   testenv/simulate.sh COUNT [FIRST]       so many, from FIRST on
#   testenv/simulate.sh --seed SEED         that one, with all that happens
#
# A seed that fails is named, with the line that replays it; its replay is the same on every machine.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v cargo >/dev/null || { echo "simulate: cargo is missing; see https://rustup.rs" >&2; exit 2; }
is_number() { [[ $1 =~ ^[0-9]+$ ]] || { echo "simulate: $1 is no number" >&2; exit 2; }; }

readonly room=archive::tests::simulation
if [ "${1:-}" = --seed ]; then
  is_number "${2:-}"
  PGKEEP_SIM_SEED=$2 exec cargo test --release --lib "$room::one_seed" -- --exact --nocapture
fi
count=${1:-100000} first=${2:-1}
is_number "$count"
is_number "$first"
PGKEEP_SIM_SEEDS=$count PGKEEP_SIM_FIRST=$first exec cargo test --release --lib \
  "$room::p1_p6_p8_what_is_acknowledged_is_restorable_whatever_befalls" -- --exact --nocapture
