#!/usr/bin/env bash
# The tests, on all cores: `bash test.sh` in about 8 minutes on two of them, `bash test.sh all` with
# those marked slow. The Triton kernel has its own half: its interpreter is on for a whole process.
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python
export OMP_NUM_THREADS=1  # every process would take all cores

if ! cmp -s requirements.txt .venv/installed.txt; then  # the first time, or they have changed
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "python3 must be 3.10 or newer"; exit 1; }
    echo "== setting up .venv (once; PyTorch is a large download)"
    python3 -m venv .venv
    "$PY" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

"$PY" -m ruff check .

marks="not slow"
[ "${1:-}" != all ] || marks="slow or not slow"
kernel=  # the process of the kernel's half, if there is one
printed=$(mktemp)
stop() {
    trap - EXIT
    [ -z "$kernel" ] || kill "$kernel" 2>/dev/null || true
    rm -f "$printed"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if "$PY" -c 'import triton' 2>/dev/null; then
    TRITON_INTERPRET=1 "$PY" -m pytest -q -p no:logging -m "$marks" \
        tests/test_attention_kernel_triton.py \
        > "$printed" 2>&1 &
    kernel=$!
fi

failed=0
# A file stays on one worker, with its expensive fixtures; the longest one starts first.
"$PY" -m pytest -q -p no:logging -n auto --dist=loadfile --no-loadscope-reorder -m "$marks" \
    --durations=15 tests/test_parallel.py tests || failed=1

if [ -n "$kernel" ]; then
    wait "$kernel" || failed=1
    kernel=
    echo "== the Triton kernel, through Triton's interpreter"
    cat "$printed"
else
    echo "== triton is not installed here: the kernel's tests were left out"
fi
exit "$failed"
