#!/usr/bin/env bash
# Rounds of fuzzing over all targets until the time is over; one summary line a target and round in SUMMARY.
#   bash tests/fuzz/long.sh [--hours H] [--summary FILE] [options of run.sh]
# One core is busy; run it with nice. Stops at the first round that finds something.
set -euo pipefail
hours=8
summary=fuzz-summary.txt
rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --hours) hours=$2 ;;
    --summary) summary=$2 ;;
    *) rest+=("$1" "$2") ;;
  esac
  shift 2
done
end=$(($(date +%s) + hours * 3600))
while [ "$(date +%s)" -lt "$end" ]; do
  bash "$(dirname "$0")/run.sh" --seconds 360 --summary "$(realpath "$summary")" "${rest[@]}"
done
awk '{ runs[$2] += $3 } END { for (t in runs) { all += runs[t]; print t, runs[t] }; print "all:", all, "executions" }' "$summary"
