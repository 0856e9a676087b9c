#!/usr/bin/env bash
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own and run the op's tests on
# it. Leak checking is off: the interpreter itself leaks at exit. torch.compile's tests are left out: the code that it
# compiles at run time is not ours and is not built with the sanitizers; and so are Triton's and the reference's.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
work=build/sanitize
mkdir -p "$work"
SORTKD_SANITIZE=1 SORTKD_REQUIRE_EXTENSION=1 python setup.py -q build --build-base "$work" --build-lib "$work/lib"

export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export SORTKD_TEST_PACKAGE="$here/$work/lib"
# The sanitized package comes first on the path; -P keeps the checkout's own out of it.
for capability in avx512 avx2 default; do
  ATEN_CPU_CAPABILITY=$capability PYTHONPATH="$SORTKD_TEST_PACKAGE:$here" python -P -m pytest -o pythonpath= \
    -k "native and not compile" python_tests/test_equivalence.py python_tests/test_pinned_rules.py \
    python_tests/test_layouts.py python_tests/test_topk.py python_tests/test_bucket.py python_tests/test_inplace.py
done
