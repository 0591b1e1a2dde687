#!/usr/bin/env bash
# From nothing to a diffusion model that writes working functions: environment, data, an
# autoregressive stage, block diffusion, fine-tuning, pass@1, a report.
# `bash demo.sh rl` then also learns from tests, in 8 to 15 minutes more.
# A second run skips what is done; `rm -r out data/stdlib/*.bin` starts over.
set -euo pipefail
cd "$(dirname "$0")"
[ $# -eq 0 ] || [ "$*" = rl ] || { echo "usage: bash demo.sh [rl]"; exit 2; }
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
say "1/6 data: the standard library's own source, and small functions from a grammar"
"$PY" -m data.stdlib.prepare
"$PY" -m data.functions.prepare
say "2/6 a small autoregressive model (config/toy_ar.py)"
"$PY" train.py config/toy_ar.py --resume=true  # continues an interrupted demo
say "3/6 block diffusion, continued from it (config/toy.py)"
"$PY" train.py config/toy.py --resume=true
say "4/6 fine-tuning on functions, continued from that (config/toy_sft.py)"
"$PY" train.py config/toy_sft.py --resume=true
say "5/6 functions it has never seen: written, then run in a sandbox"
if "$PY" sandbox.py; then
    "$PY" evaluate.py passk --init_from=out/toy_sft --tasks=data/functions/test.jsonl \
        --max_new_tokens=80 --batch=100 --out=out/toy_sft/held_out
else
    echo "so pass@1 is left out: what the model wrote is not run"
fi
"$PY" -c 'import json; print(json.loads(next(open("data/functions/test.jsonl")))["prompt"], end="")' |
    "$PY" sample.py --init_from=out/toy_sft --prompt=- --max_new_tokens=80 \
        --html=out/toy_sft/trace.html
say "6/6 how they did"
"$PY" -m experiments.toy_report
if [ "${1:-}" = rl ]; then
    say "and: answers to harder functions, rewarded by their tests (config/toy_rl.py)"
    if "$PY" sandbox.py; then
        "$PY" rl.py config/toy_rl.py --resume=true
        "$PY" - out/toy_rl/metrics.jsonl <<'END'
import json, sys
lines = map(json.loads, open(sys.argv[1]))
scores = [line["val_pass@1"] for line in lines if "val_pass@1" in line]
print(f"pass@1 on 300 hard functions never seen: {scores[0]:.1%} before, {scores[-1]:.1%} after; "
      "out/toy_rl/samples.html has the last answers with their rewards")
END
    else
        echo "so learning from tests is left out: what the model writes is not run"
    fi
fi
say "done in $((SECONDS - begun)) s; out/toy_sft/trace.html shows how a function was written, and
   out/toy/loss.png the training. Next, let it write:
   source .venv/bin/activate
   python sample.py --prompt \"def count_vowels(text):\""
