#!/usr/bin/env bash
# Plants each bug of this folder in a copy of the sources and shows that the suite finds it:
#   bash tests/planted/run.sh [--build DIR] [--seconds N]
# --seconds is what a fuzz target gets for one bug. Ends with 1 if a bug stays hidden, 77 if clang is absent.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
build=${TMPDIR:-/tmp}/armt-planted
seconds=120
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=$2 ;;
    --seconds) seconds=$2 ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift 2
done
clang=$(command -v clang++ || true)
[ -n "$clang" ] || { echo "not run: clang++ is absent (Debian: apt-get install clang libclang-rt-14-dev)"; exit 77; }

rm -rf "$build/source"
mkdir -p "$build/source"
cp -rp CMakeLists.txt cpp cuda tests "$build/source/"
cd "$build/source"

fuzz() {  # target
  cmake -S tests/fuzz -B "$build/fuzz" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
  cmake --build "$build/fuzz" --parallel "$(nproc)" --target "fuzz_$1" >"$build/log.build" 2>&1 || { tail "$build/log.build"; exit 2; }
  local seeds=("tests/fuzz/corpus/$1")
  [ "$1" = state ] && seeds=(tests/data/states/*/*/)
  mkdir -p "$build/new"
  "$build/fuzz/fuzz_$1" -max_total_time="$seconds" -max_len=8192 -timeout=60 -artifact_prefix="$build/" \
    "$build/new" "${seeds[@]}"
}
threads() {
  cmake -S . -B "$build/thread" -DARMT_CUDA=OFF -DCMAKE_BUILD_TYPE=None -DARMT_BUILD_TESTS=ON -DARMT_SANITIZE=thread \
    -DCMAKE_CXX_FLAGS=-O1 -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON >/dev/null
  cmake --build "$build/thread" --parallel "$(nproc)" --target session_test >"$build/log.build" 2>&1 || { tail "$build/log.build"; exit 2; }
  TSAN_OPTIONS=halt_on_error=1 "$build/thread/tests/cpp/session_test"
}

status=0
try() {  # name, command ...
  local name=$1 log=$build/$1.log start
  shift
  patch -s -p1 <"$root/tests/planted/$name.patch"
  rm -rf "$build/new"
  start=$(date +%s)
  if "$@" >"$log" 2>&1; then
    echo "$name: HIDDEN from: $*"
    status=1
  else
    echo "$name: found by '$*' ($(($(date +%s) - start)) s with the build): $(grep -aoE -m1 \
      'broken promise.*|ERROR: .*|WARNING: ThreadSanitizer.*|runtime error.*' "$log" | head -1)"
  fi
  patch -s -R -p1 <"$root/tests/planted/$name.patch"
}
try bound_check fuzz safetensors
try off_by_one fuzz state
try missing_lock threads
exit $status
