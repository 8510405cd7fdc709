#!/usr/bin/env bash
# The hooks beside `cp` and pgBackRest, in turn, on the same data: archive_command (hooks_push.sh) and replay through
# restore_command (hooks_replay.sh).
#   testenv/bench/hooks.sh [push|replay|all] [SEGMENTS=200] [ROUNDS=3]
. "$(dirname "$0")/lib.sh"
what=${1:-all} segments=${2:-200} rounds=${3:-3}
for half in push replay; do
    case $what in "$half" | all) ;; *) continue ;; esac
    [ -f "$here/hooks_$half.sh" ] || continue
    . "$here/hooks_$half.sh"
    "${half}_table" "$segments" "$rounds"
done
