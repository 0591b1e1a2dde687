"""Tokens per second of training on the CPU: one process and two that share the same batch.

    python -m bench.train_ranks        # prints a table and writes bench/results/train_ranks.md

All train the toy model with train.py, under torchrun where there are several processes, a run each
in turn. `loader` is the share of a step spent waiting for its batch. A step is everything that
train.py does in one, except for evaluations and checkpoints.

Not covered: GPUs, several machines.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from configurator import Int, Mistake, Name, configure
from files import check_out, read_json, read_text, write_text

# name -> (processes, threads of each)
VARIANTS = {"1 process, 1 thread": (1, 1),
            "2 processes, 1 thread each": (2, 1),
            "1 process, 2 threads": (1, 2)}
WARMUP = 3  # steps of a run that are not counted


@dataclass
class Config:
    steps: Int(1, 100_000) = 12  # measured steps of a run, after 3 to warm up
    rounds: Int(1, 1000) = 4  # runs of each variant
    tokens: Int(1, 2**24) = 4096  # clean tokens per step, of all processes together
    context: Int(2, 2**20) = 256  # T
    data: Name = "data/stdlib"  # folder that a prepare.py wrote
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: if fast
    out: Name = "bench/results/train_ranks.md"  # where the table goes


def command(processes, threads, cfg, out):
    """train.py as a list of words, under torchrun where there are several processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    steps = cfg.steps + WARMUP
    return [*start, "train.py", "--device=cpu", f"--out={out}", f"--data={cfg.data}",
            f"--context={cfg.context}", f"--batch_tokens={cfg.tokens}",
            f"--micro_batch={max(1, cfg.tokens // cfg.context)}", f"--max_steps={steps}",
            f"--dtype={cfg.dtype}", f"--threads={threads}", "--eval_every=0",
            f"--save_every={steps}"]


def run(processes, threads, cfg, out):
    """One run. Returns its measured steps, as metrics.jsonl has them, and train.py's machine.

    Raises Mistake with train.py's own message where it fails.
    """
    words = command(processes, threads, cfg, out)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise Mistake(f"train.py failed: {reason(ran.stderr)}")
    lines = read_text(out / "metrics.jsonl").splitlines()
    folder = out / read_text(out / "latest").strip()
    return ([json.loads(line) for line in lines][WARMUP:],
            read_json(folder / "state" / "train.json")["machine"])


def reason(printed):
    """What a script that failed said: its `error: ` line, else the end of what it printed."""
    for line in printed.splitlines():
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return printed[-2000:]


def table(measured):
    """Markdown lines. measured: {variant: its steps}; ratios are to the first variant."""
    lines = ["| | median tokens/s | quartiles | ratio of medians | "
             "loader, median share of a step |",
             "|---|---|---|---|---|"]
    base = np.median([m["tokens_per_s"] for m in next(iter(measured.values()))])
    for name, steps in measured.items():
        low, middle, high = np.percentile([m["tokens_per_s"] for m in steps], [25, 50, 75])
        loader = np.median([m["loader_seconds"] / m["seconds"] for m in steps])
        lines.append(f"| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | "
                     f"{middle / base:.2f} | {loader:.2%} |")
    return lines


def heading(cfg, machine, words):
    """Markdown lines: the command, the machine and what was measured."""
    return [f"# Training on the CPU by several processes, {date.today()}", "",
            f"    python -m bench.train_ranks {' '.join(words)}".rstrip(), "",
            f"{platform.machine()}, {os.cpu_count()} cores, "
            f"load {os.getloadavg()[0]:.1f} at the end, {machine['cpu']}; "
            f"Python {platform.python_version()}, torch {torch.__version__}; {machine['dtype']}. "
            "The toy model (4 layers, d_model 192, 3 heads, 1 KV head of 64), block objective, "
            f"K = 4, T = {cfg.context}, {cfg.tokens} clean tokens per step, "
            f"{cfg.rounds} runs of {cfg.steps} steps each, alternating.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check_out(cfg.out)
    measured = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for i in tqdm(range(cfg.rounds)):
            for name, (processes, threads) in VARIANTS.items():
                steps, machine = run(processes, threads, cfg, Path(folder) / f"{name} {i}")
                measured[name] += steps
    words = sys.argv[1:] if argv is None else argv
    text = "\n".join(heading(cfg, machine, words) + table(measured)) + "\n"
    print(text)
    write_text(cfg.out, text)


if __name__ == "__main__":
    main()
