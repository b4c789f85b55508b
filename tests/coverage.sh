#!/usr/bin/env bash
# Line and branch coverage of cpp/ (gcov) and python/armt (coverage.py) by the tests:
#   bash tests/coverage.sh [--build DIR] [pytest arguments ...]
# Needs g++ with gcov, and pytest, hypothesis, coverage >= 7.10, gcovr >= 8.4, pybind11 in the Python that runs. CUDA is not measured.
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
# "subprocess": also what the tests start as programs of their own (the command line, the server).
cat >"$build/coveragerc" <<C
[run]
branch = true
source = $face
data_file = $build/python.coverage
parallel = true
patch = subprocess
C
rm -f "$build"/python.coverage*
status=0
PYTHONPATH=$build/face "$python" -m coverage run --rcfile="$build/coveragerc" -m pytest -q -p no:cacheprovider \
  "${tests[@]}" || status=$?

echo "== python/armt"
"$python" -m coverage combine --rcfile="$build/coveragerc" --quiet
"$python" -m coverage report --rcfile="$build/coveragerc" --skip-covered
"$python" -m coverage json --rcfile="$build/coveragerc" --quiet -o "$build/python.json"
echo "== cpp"
# --merge-lines: a line of a template counts once, not once for each tile shape and type it is compiled for.
"$python" -m gcovr --root . --filter 'cpp/' --merge-lines --exclude-throw-branches --exclude-unreachable-branches \
  --gcov-ignore-parse-errors=all --gcov-ignore-errors=all "$build/cpp/cpp" --json-summary "$build/cpp.json" --txt-metric branch --txt -
"$python" - "$build/cpp.json" "$build/python.json" <<'P'
import json, sys
cpp, package = (json.load(open(name)) for name in sys.argv[1:])
lines, branches = (100 * cpp[f"{kind}_covered"] / cpp[f"{kind}_total"] for kind in ("line", "branch"))
print(f"cpp/: lines {lines:.1f} %, branches {branches:.1f} %")
t = package["totals"]
lines = 100 * t["covered_lines"] / t["num_statements"]
branches = 100 * t["covered_branches"] / t["num_branches"]
print(f"python/armt: lines {lines:.1f} %, branches {branches:.1f} %")
P
exit $status
