#!/usr/bin/env bash
# From nothing to a diffusion model of code: environment, data, an autoregressive stage, block
# diffusion, a report.
# A second run skips what is done; `rm -r out data/stdlib/*.bin` starts over.
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python
if ! cmp -s requirements.txt .venv/installed.txt; then  # the first time, or the requirements changed
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "python3 must be 3.10 or newer"; exit 1; }
    echo "== setting up .venv (once; PyTorch is a large download)"
    python3 -m venv .venv
    "$PY" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
begun=$SECONDS

say() { printf '\n== %s\n' "$*"; }
say "1/4 data: the standard library's own source"
"$PY" -m data.stdlib.prepare
say "2/4 a small autoregressive model (config/toy_ar.py)"
"$PY" train.py config/toy_ar.py --resume=true  # continues an interrupted demo
say "3/4 block diffusion, continued from it (config/toy.py)"
"$PY" train.py config/toy.py --resume=true
say "4/4 how they did"
"$PY" -m experiments.toy_report
say "done in $((SECONDS - begun)) s; the plot is out/toy/loss.png. Next, let it write:
   source .venv/bin/activate
   python sample.py --prompt \"def area(\" --temperature=0.7"
