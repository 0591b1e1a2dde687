#!/usr/bin/env bash
# The tests: `bash test.sh` in under 10 minutes on two cores, `bash test.sh all` with those marked slow.
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python
if ! cmp -s requirements.txt .venv/installed.txt; then  # the first time, or the requirements changed
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "python3 must be 3.10 or newer"; exit 1; }
    echo "== setting up .venv (once; PyTorch is a large download)"
    python3 -m venv .venv
    "$PY" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
[ "${1:-}" = all ] && marks="slow or not slow" || marks="not slow"
"$PY" -m pytest -q -m "$marks" tests
if "$PY" -c 'import triton' 2>/dev/null; then
    echo "== the Triton kernel, through Triton's interpreter"
    TRITON_INTERPRET=1 "$PY" -m pytest -q tests/test_attention_kernel_triton.py
else
    echo "== triton is not installed here: the kernel's tests were left out"
fi
