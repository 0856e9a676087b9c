#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU can tell, in one folder of at most eight small files: device tests, a sanitized few
# of them, benchmarks. Builds nothing; the package must be importable from the checkout.
#
#     PYTHON=python3 bash python_tests/gpu.sh [FOLDER]        # gpu_results unless named
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-gpu_results}
mkdir -p "$out"
export PYTHONPATH=$PWD TRITON_INTERPRET=0
failed=()

step() { # NAME SECONDS COMMAND...: its last words go to NAME.txt
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee /dev/stderr | tail -n 400 >"$out/$name.txt" || failed+=("$name")
}

workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
step tests 240 "$python" -m pytest -q -rs -p no:cacheprovider "${workers[@]}" python_tests/test_gpu.py --durations=10
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider \
        python_tests/test_gpu.py -k "native and (64x100 or 6x129) and (sort or dkd)"
fi
step bench_loss 180 "$python" benchmarks/bench_loss.py --output "$out"
step bench_step 60 "$python" benchmarks/bench_step.py --output "$out"
rm -f "$out"/*.png
ls -l "$out"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
