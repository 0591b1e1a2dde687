"""Real training steps on one GPU: MFU, tokens per second, and memory compared with the plan.

    python -m bench.train_gpu                # CoDA-1.7B's shape and config/small.py, ar and block
    python -m bench.train_gpu --smoke=true   # the same with a toy's sizes, anywhere: does it run?

Each row is train.py itself, started with that shape's config and stopped once enough steps are in
metrics.jsonl. Weights are new ones and the data is data/stdlib, neither of which changes the cost
of a step. The objectives of a shape are timed in turns. Then config/small.py trains for a few
hundred steps, whose loss is printed. Writes bench/results/train_<device>.md.

Not covered: several GPUs; CPUs (bench/train_cpu.py, bench/train_ranks.py); the kernel alone
(bench/attention.py).
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import platform
import re
import shutil
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

from configurator import Int, Mistake, Name, configure
from files import check_out, write_text
from huggingface import load_tokenizer
from loader import Windows


@dataclass
class Config:
    steps: Int(2, 100_000) = 8  # measured steps of a run, after 4 that compile and tune
    runs: Int(1, 1000) = 2  # runs of each row, in turns
    small_steps: Int(0, 100_000) = 300  # steps of config/small.py; 0: none
    data: Name = "data/stdlib"  # any prepared folder
    smoke: bool = False  # a toy's sizes instead
    out: str = ""  # where the table goes; empty: bench/results/train_<device>.md


WARMUP = 4
TOY = ("--d_model=64 --n_layer=2 --n_head=2 --n_kv_head=1 --head_dim=32 --d_ff=128 "
       "--vocab_size=4096 --context=128 --batch_tokens=512 --micro_batch=2 --compile=false "
       "--lr=1e-3")
OBJECTIVES = {"ar": "--objective=ar --shift=true",
              "block": "--objective=block --shift=false --block_size=4"}
CODA = ("--schedule=clipped --strategies=((0,0,0),) --init_from=scratch --batch_tokens=65536 "
        "--micro_batch=1")
SHAPES = {  # name: (config, settings), each then run with each objective
    "CoDA-1.7B, T = 8192, recompute selective": ("config/coda_1p7b.py", CODA),
    "CoDA-1.7B, T = 8192, recompute full": ("config/coda_1p7b.py", f"{CODA} --recompute=full"),
    "small, T = 1024": ("config/small.py", "--init_from=scratch"),
}


def command(config, settings, objective, cfg, out):
    """train.py on this shape, as a list of words."""
    words = [sys.executable, "train.py", config, *settings.split(),
             *OBJECTIVES[objective].split(), "--eval_every=0", "--mask_token=<mask>",
             f"--data={cfg.data}", f"--out={out}", "--save_every=1000000"]
    if cfg.smoke:
        words += TOY.split()
    return words


def lines_of(path):
    """The complete lines of a file that is being written, a list of str."""
    if not path.exists():
        return []
    return path.read_text().split("\n")[:-1]


def run(words, out, steps):
    """Start it, wait for that many lines of metrics, end it. Returns them as a list of dicts."""
    metrics, log = Path(out) / "metrics.jsonl", Path(out).with_suffix(".log")
    with open(log, "w") as printed:
        process = subprocess.Popen(words, stdout=printed, stderr=printed)
        try:
            while process.poll() is None and len(lines_of(metrics)) < steps:
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    lines = lines_of(metrics)[:steps]
    if len(lines) < steps:
        raise Mistake(f"`{' '.join(words)}` ended after {len(lines)} of {steps} steps: "
                      f"{log.read_text()[-600:]}")
    return [json.loads(line) for line in lines]


def planned_peak(words):
    """The plan's peak memory of the same run, in GB, as a dry run prints it."""
    words = [*words, "--dry_run=true", "--ranks=1", "--gpu_memory=100000"]
    printed = subprocess.run(words, capture_output=True, text=True).stdout
    peak = re.search(r"peak\D+([\d.,]+) GB", printed)
    return float(peak[1].replace(",", "")) if peak else float("nan")


def measure(cfg, scratch):
    """{(shape, objective): [metrics of its steps]} and {…: planned peak}, the rows taking turns."""
    rows = [(shape, objective) for shape in SHAPES for objective in OBJECTIVES]
    measured, planned = {row: [] for row in rows}, {}
    for n in range(cfg.runs):
        for shape, objective in tqdm(rows, desc=f"run {n + 1} of {cfg.runs}"):
            out = scratch / "run"
            words = command(*SHAPES[shape], objective, cfg, out)
            planned[shape, objective] = planned_peak(words)
            measured[shape, objective] += run(words, out, WARMUP + cfg.steps)[WARMUP:]
            shutil.rmtree(out)
    return measured, planned


def table(measured, planned):
    """Markdown lines: one row per shape and objective."""
    lines = ["| run | objective | ms per step, median | quartiles | tokens/s | against ar | MFU | "
             "peak GB | planned GB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (shape, objective), steps in measured.items():
        low, middle, high = statistics.quantiles([m["seconds"] for m in steps], n=4)
        base = statistics.median(m["seconds"] for m in measured[shape, "ar"])
        mfu = "unknown peak"
        if steps[0]["mfu"]:
            mfu = f"{statistics.median(m['mfu'] for m in steps):.1%}"
        rate = statistics.median(m["tokens_per_s"] for m in steps)
        peak = max(m["memory_gb"] for m in steps)
        lines.append(f"| {shape} | {objective} | {middle * 1e3:,.0f} | "
                     f"{low * 1e3:,.0f} to {high * 1e3:,.0f} | {rate:,.0f} | {middle / base:.2f} | "
                     f"{mfu} | {peak:.1f} | {planned[shape, objective]:.1f} |")
    return lines


def falling_loss(cfg, scratch):
    """Markdown lines: the loss of config/small.py on the data at hand, every tenth of the way."""
    out = scratch / "small"
    words = command("config/small.py", "--init_from=scratch", "block", cfg, out)
    steps = run(words, out, cfg.small_steps)
    every = max(1, cfg.small_steps // 10)
    means = [statistics.mean(m["loss"] for m in steps[start:start + every])
             for start in range(0, cfg.small_steps, every)]
    return ["", f"config/small.py, block, {cfg.small_steps} steps of {cfg.data}: "
            f"mean loss of each {every} steps", "",
            "    " + " ".join(f"{mean:.3f}" for mean in means)]


def heading(cfg, name, words):
    """Markdown lines: the command, the machine and what was measured."""
    return [f"# Training steps on {name}, {date.today()}", "",
            f"    python -m bench.train_gpu {' '.join(words)}".rstrip(), "",
            f"Python {platform.python_version()}, torch {torch.__version__}; {cfg.steps} steps of "
            f"{cfg.runs} runs each, in turns. MFU counts 2T tokens per row under block, the head "
            "for scored tokens alone, attention by the pairs its mask lets through.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    vocab_size = load_tokenizer(cfg.data).vocab_size
    Windows(cfg.data, "train", 128, vocab_size)  # says what to do where there is no data
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not cfg.smoke:
        raise Mistake("no CUDA device here; --smoke=true tries the same with a toy's sizes")
    name = torch.cuda.get_device_name() if has_gpu else platform.machine()
    title = re.sub(r"[^a-z0-9]+", "_", name.lower())
    path = Path(cfg.out or f"bench/results/train_{title}.md")
    check_out(path)
    words = sys.argv[1:] if argv is None else argv
    lines = heading(cfg, name, words)
    with tempfile.TemporaryDirectory() as folder:
        lines += table(*measure(cfg, Path(folder)))
        if cfg.small_steps:
            lines += falling_loss(cfg, Path(folder))
    text = "\n".join(lines) + "\n"
    print(text)
    if not cfg.smoke:
        write_text(path, text)


if __name__ == "__main__":
    main()
