#!/usr/bin/env bash
# Builds the fuzz targets with clang and runs each for a share of the time, under ASan and UBSan.
#   bash tests/fuzz/run.sh [--seconds N] [--build DIR] [--corpus DIR] [--targets "json state"] [--summary FILE]
#                          [--seed N]
# New inputs go to --corpus (default: DIR/corpus, outside the repository); the seeds in tests/fuzz/corpus are only read.
# Ends with 1 if a target finds something (its input is kept in DIR/findings), with 77 if clang or libFuzzer is absent.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=60
build=${ARMT_FUZZ_BUILD:-${TMPDIR:-/tmp}/armt-fuzz}
corpus=
summary=
seed=0  # 0: another one each time
targets="json safetensors state config load session"
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=$2 ;;
    --build) build=$2 ;;
    --corpus) corpus=$2 ;;
    --targets) targets=$2 ;;
    --summary) summary=$2 ;;
    --seed) seed=$2 ;;
    *) echo "unknown option $1; see the head of tests/fuzz/run.sh" >&2; exit 2 ;;
  esac
  shift 2
done
corpus=${corpus:-$build/corpus}
mkdir -p "$build/findings" "$build/logs"

clang=$(command -v clang++ || true)
if [ -z "$clang" ] || ! echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
  "$clang" -x c++ -fsanitize=fuzzer,address - -o "$build/probe" 2>/dev/null; then
  echo "not run: clang++ with libFuzzer is absent (Debian: apt-get install clang libclang-rt-14-dev)"
  exit 77
fi
cmake -S tests/fuzz -B "$build" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=RelWithDebInfo >"$build/logs/configure"
names=$(for target in $targets; do echo "fuzz_$target"; done)
# shellcheck disable=SC2086
cmake --build "$build" --parallel "$(nproc)" --target $names >"$build/logs/build" || { tail -40 "$build/logs/build"; exit 1; }

count=$(echo "$targets" | wc -w)
each=$((seconds / count > 0 ? seconds / count : 1))
status=0
for target in $targets; do
  mkdir -p "$corpus/$target"
  seeds=()
  [ -d "tests/fuzz/corpus/$target" ] && seeds+=("tests/fuzz/corpus/$target")
  if [ "$target" = state ]; then
    for folder in tests/data/states/*/*/; do seeds+=("$folder"); done
  fi
  longest=4096
  [ "$target" = state ] && longest=16384
  [ "$target" = json ] && longest=512
  [ "$target" = config ] && longest=256
  [ "$target" = session ] && longest=400
  extra=()
  [ "$target" = session ] && extra=(-entropic=0)  # its weighing of inputs takes as long as running them
  case $target in json | safetensors | load) extra=(-dict=tests/fuzz/json.dict) ;; esac
  log=$build/logs/$target
  if ! "$build/fuzz_$target" -seed="$seed" -max_total_time="$each" -max_len="$longest" -timeout=25 -rss_limit_mb=2048 \
    -malloc_limit_mb=512 -print_final_stats=1 "${extra[@]}" -artifact_prefix="$build/findings/$target-" \
    "$corpus/$target" "${seeds[@]}" >"$log" 2>&1; then
    status=1
    echo "FOUND by fuzz_$target:"
    grep -aE "broken promise|ERROR|SUMMARY|runtime error|Test unit" "$log" | head -12
  fi
  runs=$(grep -a "stat::number_of_executed_units" "$log" | awk '{print $2}')
  rate=$(grep -a "stat::average_exec_per_sec" "$log" | awk '{print $2}')
  line="$target: ${runs:-?} executions in ${each} s, ${rate:-?} a second"
  echo "$line"
  [ -n "$summary" ] && echo "$(date -u +%FT%TZ) $line" >>"$summary"
done
exit $status
