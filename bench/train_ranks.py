"""Tokens a second of training on the CPU at one global batch: one process beside two that share the weights.

    python -m bench.train_ranks        # prints a table and writes bench/results/train_ranks.md

All train the toy model with train.py, under torchrun where there are processes to start, a run each in turn. `loader` is the
share of a step spent waiting for its batch. A step is everything that train.py does in one, evaluations and checkpoints aside.
Not covered: GPUs, several machines.
"""
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

from configurator import configure

# name -> (processes, threads of each)
VARIANTS = {"1 process, 1 thread": (1, 1), "2 processes, 1 thread each": (2, 1), "1 process, 2 threads": (1, 2)}
WARMUP = 3  # steps of a run that are not counted


@dataclass
class Config:
    steps: int = 12  # measured steps of a run, after 3 to warm up
    rounds: int = 4  # runs of each variant
    tokens: int = 4096  # clean tokens a step, of all processes together
    context: int = 256  # T
    data: str = "data/stdlib"  # folder that a prepare.py wrote
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 where it is fast
    out: str = "bench/results/train_ranks.md"  # where the table goes


def run(processes, threads, cfg, out):
    """One run. Returns its measured steps, as metrics.jsonl has them, and the machine train.py found."""
    start = [sys.executable] if processes == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    steps = cfg.steps + WARMUP
    subprocess.run([*start, "train.py", "--device=cpu", f"--out={out}", f"--data={cfg.data}", f"--context={cfg.context}",
                    f"--batch_tokens={cfg.tokens}", f"--micro_batch={cfg.tokens // cfg.context}", f"--max_steps={steps}",
                    f"--dtype={cfg.dtype}", f"--threads={threads}", "--eval_every=0", f"--save_every={steps}"],
                   env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARMUP:]
    return metrics, json.loads((out / (out / "latest").read_text() / "state" / "train.json").read_text())["machine"]


def main():
    cfg, _ = configure(Config)
    found = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for i in tqdm(range(cfg.rounds)):
            for name, (processes, threads) in VARIANTS.items():
                metrics, machine = run(processes, threads, cfg, Path(folder) / f"{name} {i}")
                found[name] += metrics

    lines = [f"# Training on the CPU by several processes, {date.today()}", "",
             f"    python -m bench.train_ranks {' '.join(sys.argv[1:])}".rstrip(), "",
             f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, {machine['cpu']}; "
             f"Python {platform.python_version()}, torch {torch.__version__}; {machine['dtype']}. "
             f"The toy model (4 layers, d_model 192, 3 heads, 1 KV head of 64), block objective, K = 4, T = {cfg.context}, "
             f"{cfg.tokens} clean tokens a step, {cfg.rounds} runs of {cfg.steps} steps each, alternating.", "",
             "| | median tokens/s | quartiles | ratio of medians | loader, median share of a step |", "|---|---|---|---|---|"]
    base = np.median([m["tokens_per_s"] for m in next(iter(found.values()))])
    for name, metrics in found.items():
        low, middle, high = np.percentile([m["tokens_per_s"] for m in metrics], [25, 50, 75])
        loader = np.median([m["loader_seconds"] / m["seconds"] for m in metrics])
        lines.append(f"| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {middle / base:.2f} | {loader:.2%} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(cfg.out).write_text(text)


if __name__ == "__main__":
    main()
