#!/bin/bash
# Builds with CUDA, checks, then times, in one call on a machine with a GPU; JSON and logs go to $OUT.
#   bench/gpu_session.sh [--conformance DIR] [--no-tests] [--sanitize] [--no-bench] [bench/gpu.py's options]
# --sanitize runs compute-sanitizer's four tools over a few small tests; a finding fails the run.
set -u
out=${OUT:-bench/results}
mkdir -p "$out"
conformance=()
tests=1 sanitize=0 bench=1
while [ $# -gt 0 ]; do
  case $1 in
    --conformance) conformance=(--conformance "$2"); shift 2 ;;
    --no-tests) tests=0; shift ;;
    --sanitize) sanitize=1; shift ;;
    --no-bench) bench=0; shift ;;
    *) break ;;
  esac
done
export PYTHONUNBUFFERED=1
start=$SECONDS
if ! python3 -m pip install --no-build-isolation --no-deps . -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real \
    -C cmake.define.ARMT_CUDA=ON >"$out/build.log" 2>&1; then
  grep -E "error|Error" -A3 "$out/build.log" | head -60
  exit 1
fi
echo "built in $((SECONDS - start)) s"
if [ $tests = 1 ]; then
  timeout 400 python3 -m pytest tests/python/test_cuda*.py -q --maxfail=12 "${conformance[@]}" >"$out/tests.log" 2>&1
  failed=$?
  grep -E "^(FAILED|ERROR|[0-9]+ (passed|failed))|passed|failed" "$out/tests.log" | cut -c1-220 | tail -40
  echo "tests after $((SECONDS - start)) s, status $failed"
  [ $failed = 0 ] || exit $failed  # no number without a green gate
fi
if [ $sanitize = 1 ]; then
  bash tests/compute_sanitizer.sh "$out" || exit 1
  echo "compute-sanitizer after $((SECONDS - start)) s"
fi
[ $bench = 1 ] && python3 bench/gpu.py --out "$out/gpu.json" "$@"
echo "done after $((SECONDS - start)) s"
