#!/usr/bin/env bash
# The test programs and the Python suite under sanitizers that end the process at the first fault.
#   bash tests/sanitize.sh [address] [thread] [python] [--build DIR]      (all three without a name)
# address: tests/cpp under ASan, LeakSanitizer and UBSan; thread: tests/cpp under TSan; python: the tests named in
# ARMT_SANITIZE_TESTS (default: those of files, states, sessions and threads) on a module built with ASan and UBSan.
# Needs g++ with its sanitizers; python needs pybind11, numpy and pytest in the Python that runs.
set -euo pipefail
cd "$(dirname "$0")/.."

build=${TMPDIR:-/tmp}/armt-sanitize
jobs=()
while [ $# -gt 0 ]; do
  case $1 in
    --build) build=$2; shift ;;
    address | thread | python) jobs+=("$1") ;;
    *) echo "unknown argument $1; see the head of tests/sanitize.sh" >&2; exit 2 ;;
  esac
  shift
done
[ ${#jobs[@]} -eq 0 ] && jobs=(address thread python)
# allocator_may_return_null: tests ask for more memory than there is, and expect an exception.
export ASAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1:abort_on_error=1:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export TSAN_OPTIONS=allocator_may_return_null=1:halt_on_error=1:second_deadlock_stack=1
programs=(backend_test kernels_test schedule_test session_test threads_test)

# -O1: the kernels' templates take minutes otherwise. UBSan reports are errors.
configure() {
  cmake -S . -B "$build/$1" -DARMT_CUDA=OFF -DCMAKE_BUILD_TYPE=None "${@:3}" -DARMT_SANITIZE="$2" \
    -DCMAKE_CXX_FLAGS="-O1 -fno-sanitize-recover=all" >"$build/$1.configure"
}
build_targets() {
  cmake --build "$build/$1" --parallel "$(nproc)" --target "${@:2}" >"$build/$1.build" 2>&1 ||
    { tail -40 "$build/$1.build"; exit 1; }
}
run_programs() {
  for program in "${programs[@]}"; do "$build/$1/tests/cpp/$program"; done
}

mkdir -p "$build"
for job in "${jobs[@]}"; do
  echo "== $job"
  case $job in
    thread)
      configure thread thread -DARMT_BUILD_TESTS=ON -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON
      build_targets thread "${programs[@]}"
      run_programs thread
      ;;
    address)
      configure address address,undefined -DARMT_BUILD_TESTS=ON -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON
      build_targets address "${programs[@]}"
      run_programs address
      ;;
    python)
      python=$(command -v python || command -v python3)
      configure address address,undefined -DARMT_BUILD_TESTS=ON -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=OFF \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$python"
      build_targets address _core
      face=$build/face/armt
      rm -rf "$build/face" && mkdir -p "$face"
      for entry in python/armt/*; do ln -s "$PWD/$entry" "$face/"; done
      cp "$build"/address/cpp/bindings/_core*.so "$face/"
      # Python itself keeps memory to its end, so leaks are looked for in the programs and fuzz targets only.
      preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
      # Left out: a bound of one second, which instrumented code misses.
      # shellcheck disable=SC2086
      ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 LD_PRELOAD=$preload PYTHONMALLOC=malloc PYTHONPATH=$build/face \
        "$python" -m pytest -q -p no:cacheprovider -k "not a_hundred_thousand_unknown" ${ARMT_SANITIZE_TESTS:-tests/python/test_safetensors.py \
        tests/python/test_state_file.py tests/python/test_state_faults.py tests/python/test_state_disk.py \
        tests/python/test_state_corpus.py tests/python/test_api.py tests/python/test_invariance.py \
        tests/python/test_many_sessions.py tests/python/test_checkpoint_faults.py tests/python/test_security.py}
      ;;
  esac
done
echo "sanitize: passed"
