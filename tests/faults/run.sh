#!/usr/bin/env bash
# Fault injection (see faults.cpp), under ASan, LeakSanitizer and UBSan: bash tests/faults/run.sh [--build DIR]
# Shares its build folder with tests/fuzz/run.sh. Ends with 77 if clang is absent.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${ARMT_FUZZ_BUILD:-${TMPDIR:-/tmp}/armt-fuzz}
[ "${1:-}" = --build ] && build=$2
clang=$(command -v clang++ || true)
if [ -z "$clang" ]; then
  echo "not run: clang++ is absent (Debian: apt-get install clang libclang-rt-14-dev)"
  exit 77
fi
mkdir -p "$build/logs"
cmake -S tests/fuzz -B "$build" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo >"$build/logs/configure"
cmake --build "$build" --parallel "$(nproc)" --target faults >"$build/logs/build" ||
  { tail -40 "$build/logs/build"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$build/faults" "$folder"
