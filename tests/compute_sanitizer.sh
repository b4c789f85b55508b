#!/bin/bash
# compute-sanitizer's four tools over small runs of the CUDA engine; logs go to a folder. Ends with 1 on a finding.
#   bash tests/compute_sanitizer.sh [FOLDER]
# memcheck and racecheck find wrong accesses, initcheck reads of memory that nothing wrote, synccheck misused barriers.
set -u
cd "$(dirname "$0")/.."
out=${1:-.}
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not found; it comes with the CUDA toolkit" >&2; exit 2; }
status=0
for tool in memcheck racecheck initcheck synccheck; do
  options=()
  [ $tool = memcheck ] && options=(--leak-check no)
  timeout "${SANITIZER_SECONDS:-90}" compute-sanitizer --tool $tool "${options[@]}" --error-exitcode 9 \
    --target-processes all --launch-timeout 0 python3 tests/cuda_small.py >"$out/sanitizer-$tool.log" 2>&1
  code=$?
  echo "$tool: status $code, $(grep -E "ERROR SUMMARY|RACECHECK SUMMARY" "$out/sanitizer-$tool.log" | tail -1)"
  [ $code = 0 ] || status=1
done
exit $status
