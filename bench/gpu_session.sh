#!/bin/bash
# Builds with CUDA, checks, then times, in one call on a machine with a GPU; JSON and logs go to $OUT.
#   bench/gpu_session.sh [OPTION...] [-- bench/gpu.py's options]
# --conformance DIR  the published cases
# --site DIR         installs there instead of into python3's own packages
# --no-build, --no-tests, --no-bench
# --sanitize         compute-sanitizer's four tools over small models, beside the tests; a finding fails the run
# --all              every failing test is listed (else it stops after 12)
# --seconds N        all of it: what does not fit is left out, and said
# --commit ID        for the results, where git does not say it
# Without options for bench/gpu.py its parts run one after another, the important ones first, each as a process with a
# limit of its own, so that one that fails or takes too long loses only itself.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
conformance=() target=() commit=()
build=1 tests=1 sanitize=0 bench=1 most=12 seconds=3600
while [ $# -gt 0 ]; do
  case $1 in
    --conformance) conformance=(--conformance "$2"); shift 2 ;;
    --site) target=(--upgrade --target "$2"); export PYTHONPATH=$2${PYTHONPATH:+:$PYTHONPATH}; shift 2 ;;
    --no-build) build=0; shift ;;
    --no-tests) tests=0; shift ;;
    --sanitize) sanitize=1; shift ;;
    --no-bench) bench=0; shift ;;
    --all) most=0; shift ;;
    --seconds) seconds=$2; shift 2 ;;
    --commit) commit=(--commit "$2"); shift 2 ;;
    --) shift; break ;;
    *) echo "bench/gpu_session.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
export PYTHONUNBUFFERED=1
SECONDS=0
left() { echo $((seconds - SECONDS)); }

if [ $build = 1 ]; then
  if ! timeout "$(left)" python3 -m pip install --no-build-isolation --no-deps "${target[@]}" . \
      -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real -C cmake.define.ARMT_CUDA=ON >"$out/build.log" 2>&1; then
    grep -E "error|Error" -A3 "$out/build.log" | head -60
    exit 1
  fi
  echo "built in $SECONDS s"
fi
status=0 sanitizer=
if [ $sanitize = 1 ]; then
  SANITIZER_SECONDS=${SANITIZER_SECONDS:-$((($(left) - 15) / 3))} bash tests/compute_sanitizer.sh "$out" &
  sanitizer=$!
fi
if [ $tests = 1 ]; then
  timeout "$(left)" python3 -m pytest tests/python/test_cuda*.py -v --tb=short --durations=8 --maxfail=$most \
    --junitxml="$out/tests.xml" "${conformance[@]}" >"$out/tests.log" 2>&1
  status=$?
  grep -E "^(FAILED|ERROR) |[0-9]+ (passed|failed)" "$out/tests.log" | cut -c1-220 | tail -60
  echo "tests after $SECONDS s, status $status, $(grep -c " PASSED" "$out/tests.log") passed"
fi
if [ -n "$sanitizer" ]; then
  wait "$sanitizer" || status=1
  echo "compute-sanitizer after $SECONDS s"
fi
[ $status = 0 ] || exit $status  # no number without a green gate
[ $bench = 1 ] || exit 0

# part SECONDS OPTION...
part() {
  local limit=$1
  shift
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 8 ]; then echo "left out, no time: $*"; return; fi
  timeout -k 3 "$limit" python3 bench/gpu.py --out "$out/h200.json" --add "${commit[@]}" "$@" 2>&1 |
    tee -a "$out/bench.log"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { echo "status $code: $*"; status=1; }
  echo "after $SECONDS s: $*"
}
rm -f "$out/h200.json"
if [ $# -gt 0 ]; then
  part "$(left)" "$@"
else
  part 70 --what prefill decode sessions profile --geometries 1b
  part 50 --what prefill decode sessions profile --geometries gpt2
  part 50 --what fp8
  part 65 --what endless
  part 75 --what drift
  part 60 --what segments
  part 25 --what spill
  part 30 --what rival
fi
echo "done after $SECONDS s"
exit $status
