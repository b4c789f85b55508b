#!/usr/bin/env bash
# Line and branch coverage of cpp/ (gcov) and python/armt (coverage.py) by the tests:
#   bash tests/coverage.sh [--build DIR] [pytest arguments ...]
# Needs g++ with gcov, and pytest, hypothesis, coverage, gcovr, pybind11 in the Python that runs. CUDA is not measured.
set -euo pipefail
cd "$(dirname "$0")/.."
build=${TMPDIR:-/tmp}/armt-coverage
[ "${1:-}" = --build ] && { build=$2; shift 2; }
python=$(command -v python || command -v python3)
"$python" -c "import coverage, gcovr, pybind11" || { echo "not run: pip install coverage gcovr pybind11"; exit 77; }
mkdir -p "$build"

cmake -S . -B "$build/cpp" -DARMT_CUDA=OFF -DARMT_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_CXX_FLAGS="-O1 --coverage -fprofile-update=atomic" -DCMAKE_EXE_LINKER_FLAGS=--coverage \
  -DCMAKE_MODULE_LINKER_FLAGS=--coverage -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$python" >"$build/configure"
cmake --build "$build/cpp" --parallel "$(nproc)" >"$build/build" 2>&1 || { tail -40 "$build/build"; exit 1; }
find "$build/cpp" -name '*.gcda' -delete

face=$build/face/armt
rm -rf "$build/face" && mkdir -p "$face"
cp -r python/armt/. "$face/"  # not links: coverage looks at real paths
cp "$build"/cpp/cpp/bindings/_core*.so "$face/"

for program in backend_test kernels_test schedule_test session_test threads_test; do "$build/cpp/tests/cpp/$program"; done
tests=("$@")
[ ${#tests[@]} -eq 0 ] && tests=(tests/python)
status=0
COVERAGE_FILE=$build/python.coverage PYTHONPATH=$build/face "$python" -m coverage run --branch \
  --source="$face" -m pytest -q -p no:cacheprovider "${tests[@]}" || status=$?

echo "== python/armt"
COVERAGE_FILE=$build/python.coverage "$python" -m coverage report --skip-covered | tail -40
echo "== cpp"
"$python" -m gcovr --root . --filter 'cpp/' --exclude-throw-branches --exclude-unreachable-branches \
  --gcov-ignore-parse-errors=all --gcov-ignore-errors=all "$build/cpp/cpp" --json-summary "$build/cpp.json" --txt-metric branch --txt -
"$python" - "$build/cpp.json" <<'P'
import json, sys
s = json.load(open(sys.argv[1]))
print(f"cpp: lines {s['line_percent']} %, branches {s['branch_percent']} %")
P
exit $status
