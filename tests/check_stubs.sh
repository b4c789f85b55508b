#!/usr/bin/env bash
# Regenerates the type stub of the compiled module and compares it with the committed one.
# `tests/check_stubs.sh --write` replaces it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
(cd "$out" && pybind11-stubgen armt._core --output-dir . --exit-code >/dev/null 2>&1)
fresh="$out/armt/_core"
[ -d "$fresh" ] || fresh="$out/armt/_core.pyi"
if [ "${1:-}" = "--write" ]; then
  rm -rf python/armt/_core python/armt/_core.pyi
  cp -r "$fresh" python/armt/
else
  diff -r "$fresh" "python/armt/$(basename "$fresh")" || {
    echo "python/armt/_core stubs are stale: run tests/check_stubs.sh --write" >&2
    exit 1
  }
fi
