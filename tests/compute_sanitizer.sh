#!/bin/bash
# compute-sanitizer's four tools over small runs of the CUDA engine; logs go to a folder. Ends with 1 on a finding, or
# where a tool did not come to its end.
#   bash tests/compute_sanitizer.sh [FOLDER]
# SANITIZER_SECONDS: the most that each run takes; SANITIZER_JOBS: how many run beside each other;
# SANITIZER_MODELS: numbers of the models of tests/cuda_small.py, all by default.
#
# memcheck   wrong accesses, in the engine as it is used.
# synccheck  misused barriers in this package's kernels, as they are used; those of libraries would take most of its time.
# racecheck  races in shared memory of this package's kernels, taken one at a time (ARMT_NO_OVERLAP, blocking launches):
#            over kernels that overlap it has ended with an internal error of its own. If it breaks nonetheless, each
#            kernel that uses shared memory is looked at in a run of its own, and those that break it are named.
#            Before 2026.1 it reports races that are none around mbarriers and warpgroups (its release notes).
# initcheck  reads of memory that nothing wrote. It does not see what kernels store by the tensor copy engine, as
#            cuBLASLt's do (its known limitations), so our plain product stands in for the library (ARMT_PLAIN_PRODUCTS).
#            Before 2025.4 it did not see cp.async.bulk either, by which the 8-bit product stores: that model is left out.
# Not looked at: cuBLASLt's kernels, by any but memcheck; what the tensor copy engine reads (gated.cu, fp8_product.cu), by
# initcheck; races in global memory, by any.
set -u
cd "$(dirname "$0")/.."
out=${1:-.}
mkdir -p "$out"
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer: not found; it comes with the CUDA toolkit" >&2; exit 2; }
version=$(compute-sanitizer --version | grep -oE "[0-9]{4}\.[0-9]+" | head -1)
echo "compute-sanitizer $version"
models=${SANITIZER_MODELS:-$(seq 0 $(($(python3 tests/cuda_small.py --count) - 1)))} || exit 2
shared=(few_kernel flash_kernel hopper_kernel norm_kernel few_product_kernel stream_kernel simple_kernel greatest_kernel
  bins_kernel likelihood_kernel draw_kernel read_features read_exact read_mma write_features write_update write_delta
  write_matrix write_rest write_few read_queries decode_kernel gated_kernel fp8_kernel quantise)

# check TOOL MODEL NAME OPTION...
check() {
  local tool=$1 model=$2 name=$3
  local log=$out/sanitizer-$name-$model.log
  shift 3
  timeout -k 5 "${SANITIZER_SECONDS:-120}" compute-sanitizer --tool "$tool" "$@" --error-exitcode 9 --print-limit 40 \
    --target-processes all --launch-timeout 0 python3 tests/cuda_small.py --case "$model" >"$log" 2>&1
  local code=$? why=
  [ $code = 124 ] && why="out of time, "
  grep -q "Internal Sanitizer Error" "$log" && why="the tool broke, "
  grep -q "^ran " "$log" || [ $code = 0 ] || why+="the run did not come to its end, "
  echo "$name, model $model: status $code, $why$(grep -E "(ERROR|RACECHECK) SUMMARY: [0-9]+ (error|hazard)" "$log" | head -1), $SECONDS s"
  if [ $code = 0 ] && ! grep -q "^ran " "$log"; then echo "$name, model $model: nothing ran"; code=8; fi
  return $code
}

races() { # model, name, kernels
  ARMT_NO_OVERLAP=1 check racecheck "$1" "$2" --kernel-name "kernel_substring=$3" --force-blocking-launches
}

uninitialised() { # model
  if [[ $(python3 tests/cuda_small.py --describe "$1") == *fp8* && $version < 2025.4 ]]; then
    echo "initcheck, model $1: left out, compute-sanitizer $version does not see what it stores"
    return 0
  fi
  ARMT_PLAIN_PRODUCTS=1 check initcheck "$1" initcheck
}

status=0 running=0
end_one() {
  wait -n || status=1
  running=$((running - 1))
}
start() {
  [ $running -lt "${SANITIZER_JOBS:-8}" ] || end_one
  "$@" & running=$((running + 1))
}
finish() {
  while [ $running -gt 0 ]; do end_one; done
}
for model in $models; do
  start uninitialised "$model"
  start races "$model" racecheck armt
  start check memcheck "$model" memcheck --leak-check no
  start check synccheck "$model" synccheck --kernel-name kernel_substring=armt
done
finish
for model in $models; do
  grep -q "Internal Sanitizer Error" "$out/sanitizer-racecheck-$model.log" || continue
  for kernel in "${shared[@]}"; do start races "$model" "racecheck-$kernel" "$kernel"; done
done
finish
exit $status
