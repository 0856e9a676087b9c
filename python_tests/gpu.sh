#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU can tell, in one folder of at most eight small files: device tests, benchmarks, a
# sanitized few of the tests. Builds nothing; the package must be importable from the checkout. The limits: eight minutes.
#
#     PYTHON=python3 bash python_tests/gpu.sh [FOLDER]        # gpu_results unless named
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-gpu_results}
mkdir -p "$out"
export PYTHONPATH=$PWD TRITON_INTERPRET=0 PYTHONUNBUFFERED=1
failed=()

step() { # NAME SECONDS COMMAND...: what it says goes to NAME.txt as it is said, and its last words stay there
    local name=$1 seconds=$2 file=$out/$1.txt
    shift 2
    echo "== $name"
    # An interrupted pytest still reports; what hangs on the device does not hear, and is killed.
    timeout -s INT -k 15 "$seconds" "$@" 2>&1 | tee "$file" || failed+=("$name")
    tail -n 400 "$file" >"$file.tail" && mv "$file.tail" "$file"
}

options=(-rfEs --tb=short)
"$python" -c "import xdist" 2>/dev/null && options+=(-n 8)
# By a thread: a signal's handler would wait for the device, too. It ends the worker, and xdist starts another.
"$python" -c "import pytest_timeout" 2>/dev/null && options+=(--timeout 60 --timeout-method thread)
# A machine without what the trainer needs still runs the other file.
step tests 170 "$python" -m pytest "${options[@]}" --durations=10 --continue-on-collection-errors \
    python_tests/test_gpu.py python_tests/test_train_gpu.py
step bench_loss 190 "$python" benchmarks/bench_loss.py --output "$out"
if command -v compute-sanitizer >/dev/null; then
    few=("$python" -m pytest -x --tb=short python_tests/test_gpu.py
        -k "native and ((64x100 or 6x129) and (sort or dkd) or 6x4099 and T4-ce-rows)")
    step sanitizer 70 bash -c 'for tool in memcheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 9 "$@" || exit; done' _ "${few[@]}"
fi
step bench_step 30 "$python" benchmarks/bench_step.py --output "$out"
rm -f "$out"/*.png
ls -l "$out"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
