"""Real training steps on one GPU: MFU, tokens a second, and memory beside the plan.

    python -m bench.train_gpu                    # CoDA-1.7B's shape and config/small.py, each under ar and block
    python -m bench.train_gpu --smoke=true       # the same with a toy's sizes, anywhere: does it run?

Each row is train.py itself, started with that shape's config and stopped once enough steps are in metrics.jsonl; weights are
new ones and the data is data/stdlib, neither of which changes a step's cost. The objectives of a shape are timed in turns.
Then config/small.py trains for a few hundred steps, whose loss is printed. Writes bench/results/train_<device>.md.

Not covered: several GPUs; CPUs (bench/train_cpu.py, bench/train_ranks.py); the kernel alone (bench/attention.py).
"""
import json
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import configure
from loader import Windows
from tokenizer import Tokenizer


@dataclass
class Config:
    steps: int = 8  # measured steps of a run, after 4 that compile and tune
    runs: int = 2  # runs of each row, in turns
    small_steps: int = 300  # steps of config/small.py; 0: none
    data: str = "data/stdlib"  # any prepared folder
    smoke: bool = False  # a toy's sizes instead
    out: str = ""  # where the table goes; empty: bench/results/train_<device>.md


WARMUP = 4
TOY = ("--d_model=64 --n_layer=2 --n_head=2 --n_kv_head=1 --head_dim=32 --d_ff=128 --vocab_size=4096 --context=128 "
       "--batch_tokens=512 --micro_batch=2 --compile=false --lr=1e-3")
OBJECTIVES = {"ar": "--objective=ar --shift=true", "block": "--objective=block --shift=false --block_size=4"}
CODA = "--schedule=clipped --strategies=((0,0,0),) --init_from=scratch --batch_tokens=65536 --micro_batch=1"
SHAPES = {  # name: (config, settings), each then run with each objective
    "CoDA-1.7B, T = 8192, recompute selective": ("config/coda_1p7b.py", CODA),
    "CoDA-1.7B, T = 8192, recompute full": ("config/coda_1p7b.py", f"{CODA} --recompute=full"),
    "small, T = 1024": ("config/small.py", "--init_from=scratch"),
}


def command(config, settings, objective, cfg, out):
    """train.py on this shape, as a list of words."""
    return [sys.executable, "train.py", config, *settings.split(), *OBJECTIVES[objective].split(), "--eval_every=0",
            "--mask_token=<mask>", f"--data={cfg.data}", f"--out={out}", "--save_every=1000000", *(TOY.split() if cfg.smoke else [])]


def run(words, out, steps):
    """Start it, wait for that many lines of metrics, end it. Returns the metrics, a list of dicts."""
    file, log = Path(out) / "metrics.jsonl", Path(out).with_suffix(".log")
    with open(log, "w") as errors:
        process = subprocess.Popen(words, stdout=errors, stderr=errors)
        try:
            while process.poll() is None and (not file.exists() or file.read_text().count("\n") < steps):
                time.sleep(0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    found = [json.loads(line) for line in file.read_text().splitlines()[:steps]] if file.exists() else []
    if len(found) < steps:
        raise OSError(f"`{' '.join(words)}` ended after {len(found)} of {steps} steps: {log.read_text()[-600:]}")
    return found


def planned_peak(words):
    """The plan's peak memory of the same run, in GB, as plan.py prints it."""
    words = [*words, "--dry_run=true", "--ranks=1", "--gpu_memory=100000"]
    printed = subprocess.run(words, capture_output=True, text=True).stdout
    found = re.search(r"peak\D+([\d.,]+) GB", printed)
    return float(found[1].replace(",", "")) if found else float("nan")


def measure(cfg, scratch):
    """{(shape, objective): [metrics of its measured steps]} and {…: planned peak}, the rows taking turns."""
    rows = [(shape, objective) for shape in SHAPES for objective in OBJECTIVES]
    found, planned = {row: [] for row in rows}, {}
    for n in range(cfg.runs):
        for shape, objective in tqdm(rows, desc=f"run {n + 1} of {cfg.runs}"):
            out = scratch / "run"
            words = command(*SHAPES[shape], objective, cfg, out)
            planned[shape, objective] = planned_peak(words)
            found[shape, objective] += run(words, out, WARMUP + cfg.steps)[WARMUP:]
            shutil.rmtree(out)
    return found, planned


def table(found, planned):
    """Markdown lines: one row a shape and objective."""
    lines = ["| run | objective | ms a step, median | quartiles | tokens/s | against ar | MFU | peak GB | planned GB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (shape, objective), steps in found.items():
        seconds = [m["seconds"] for m in steps]
        low, middle, high = statistics.quantiles(seconds, n=4)
        base = statistics.median(m["seconds"] for m in found[shape, "ar"])
        mfu = f"{statistics.median(m['mfu'] for m in steps):.1%}" if steps[0]["mfu"] else "unknown peak"
        lines.append(f"| {shape} | {objective} | {middle * 1e3:,.0f} | {low * 1e3:,.0f} to {high * 1e3:,.0f} | "
                     f"{statistics.median(m['tokens_per_s'] for m in steps):,.0f} | {middle / base:.2f} | {mfu} | "
                     f"{max(m['memory_gb'] for m in steps):.1f} | {planned[shape, objective]:.1f} |")
    return lines


def falling_loss(cfg, scratch):
    """config/small.py on the data at hand: its loss, every tenth of the way."""
    out = scratch / "small"
    steps = run(command("config/small.py", "--init_from=scratch", "block", cfg, out), out, cfg.small_steps)
    every = max(1, cfg.small_steps // 10)
    means = [f"{statistics.mean(m['loss'] for m in steps[a:a + every]):.3f}" for a in range(0, cfg.small_steps, every)]
    return ["", f"config/small.py, block, {cfg.small_steps} steps of {cfg.data}: mean loss of each {every} steps", "",
            "    " + " ".join(means)]


def main():
    cfg, _ = configure(Config)
    Windows(cfg.data, "train", 128, Tokenizer(cfg.data).vocab_size)  # says what to do where there is no data
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    if not torch.cuda.is_available() and not cfg.smoke:
        raise ValueError("no CUDA device here; --smoke=true tries the same with a toy's sizes")
    lines = [f"# Training steps on {name}, {date.today()}", "",
             f"    python -m bench.train_gpu {' '.join(sys.argv[1:])}".rstrip(), "",
             f"Python {platform.python_version()}, torch {torch.__version__}; {cfg.steps} steps of {cfg.runs} runs each, in "
             "turns. MFU counts 2T tokens a row under block, the head for scored tokens alone, attention by the pairs its mask "
             "lets through.", ""]
    with tempfile.TemporaryDirectory() as folder:
        lines += table(*measure(cfg, Path(folder)))
        if cfg.small_steps:
            lines += falling_loss(cfg, Path(folder))
    text = "\n".join(lines) + "\n"
    print(text)
    if not cfg.smoke:
        path = Path(cfg.out or f"bench/results/train_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
