"""AR-ness against temperature: how close to left to right a model writes. A table and a plot.

    python -m experiments.ar_ness                                  # the newest run in out/
    python -m experiments.ar_ness --prompts=FILE --out=FOLDER --temperatures='[0, 0.5, 1]'

Local and global AR-ness@k (DiffuCoder, arXiv 2506.20639 §4; watch.py) for k = 1 … 8, the mean over
prompts. Writes FOLDER/ar_ness.md and FOLDER/ar_ness.png. A block model can stray from left to right
inside a block alone, so the table also has what a random order inside each block would score.

Not covered: how good the texts are.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import math
import random
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from tqdm import tqdm

import huggingface
from configurator import Float, Int, Mistake, Name, Seed, check_type, configure, shortened
from decode import Decoding, decode
from files import write_text
from model import fast_dtype, pick_device
from prompts import read_prompts
from watch import Trace, global_ar, local_ar, order_of

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    init_from: str = ""  # folder of a run or checkpoint, or Hub name; empty: the newest run in out/
    prompts: str = ""  # file of prompts, see prompts.py; empty: this file's own
    out: Name = "out/ar_ness"  # folder of the table and the plot
    temperatures: tuple = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # from 0 to 100 each
    max_new_tokens: Int(2, 2**20) = 96  # longest completion, in tokens
    samples: Int(1, 1024) = 4  # completions of each prompt; at temperature 0 they are the same
    batch: Int(1, 2**16) = 32  # completions written together
    confidence: Literal["max_prob", "margin", "entropy", "random", "left_to_right"] = "max_prob"
    threshold: Float(0, 1) | None = None  # take all with this confidence; none: one a step
    block_length: Int(0, 2**20) = 0  # tokens decoded together; 0: K, without blocks all of them
    seed: Seed = 1337  # of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where a GPU has it


PROMPTS = ("def area(", "def fibonacci(n):\n", "class Stack:\n    def __init__(self", "import os\n",
           "def read_file(path", "    for line in", "if __name__ == ", "def test_")
MOST = 8  # largest k
RANDOM_ORDERS = 2000


def texts_of(prompts, model, tok, cfg):
    """Each prompt `samples` times, as ids with None where to write. Raises Mistake if too long."""
    texts = []
    for prompt in prompts:
        ids = tok.encode(prompt)
        if tok.bos_id is not None:
            ids = [tok.bos_id, *ids]
        room = min(cfg.max_new_tokens, model.cfg.context - len(ids))
        if room < 2:
            raise Mistake(f"the prompt {shortened(prompt)} has {len(ids)} tokens, the model's "
                          f"context is {model.cfg.context}: shorten it")
        texts += [ids + [None] * room for _ in range(cfg.samples)]
    return texts


def orders_at(temperature, texts, model, tok, recipe, cfg):
    """The order in which each text was written, and tokens per forward of a text."""
    how = Decoding(confidence=cfg.confidence, threshold=cfg.threshold, temperature=temperature,
                   block_length=cfg.block_length, seed=cfg.seed)
    orders, forwards = [], 0
    for start in range(0, len(texts), cfg.batch):
        some = texts[start:start + cfg.batch]
        trace = Trace(some, tok)
        rows = range(start, start + len(some))  # each its own noise
        for step in decode(model, tok, recipe, some, how, rows):
            trace.add(step)
        orders += [order_of(trace, row) for row in range(len(some))]
        forwards += sum(len(trace.moments(row)) for row in range(len(some)))
    return orders, sum(map(len, orders)) / forwards


def scores(orders):
    """Mean local and global AR-ness, {"local": [MOST], "global": [MOST]}; NaN if all are short."""
    found = {"local": [], "global": []}
    for k in range(1, MOST + 1):
        found["local"].append(mean([local_ar(order, k) for order in orders]))
        found["global"].append(mean([global_ar(order, k) for order in orders]))
    return found


def mean(shares):
    """Of those that are numbers."""
    numbers = [share for share in shares if not math.isnan(share)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def random_orders(L, block):
    """Orders of L positions, random inside each block, the blocks from left to right."""
    rng = random.Random(0)
    orders = []
    for _ in range(RANDOM_ORDERS):
        order = []
        for begin_ in range(0, L, block):
            some = list(range(begin_, min(begin_ + block, L)))
            rng.shuffle(some)
            order += some
        orders.append(order)
    return orders


def table(name, rows):
    """Markdown. rows: {label: [MOST]}."""
    ks = " | ".join(f"k = {k}" for k in range(1, MOST + 1))
    lines = [f"| {name} | {ks} |", "|---" * (MOST + 1) + "|"]
    for label, shares in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{share:.3f}" for share in shares) + " |")
    return "\n".join(lines)


def draw(by_temperature, at_random, path):
    """Two panels, local and global, against temperature, a line for each k."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    colors = plt.cm.viridis([k / MOST for k in range(MOST)])
    for axis, kind in zip(axes, ("local", "global")):
        for k in range(1, MOST + 1):
            shares = [found[kind][k - 1] for found in by_temperature.values()]
            axis.plot(list(by_temperature), shares, "o-", ms=3.5, lw=1.2, color=colors[k - 1],
                      label=f"k = {k}")
        axis.axhline(at_random[kind][0], color="gray", ls=":", lw=1.2, label="random, k = 1")
        axis.set(title=f"{kind} AR-ness@k", xlabel="temperature", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean over texts")
    axes[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    cfg, _ = configure(Config, argv)
    temperatures = [check_type("temperatures", t, Float(0, 100)) for t in cfg.temperatures]
    if not temperatures:
        raise Mistake("temperatures=() is empty: '[0, 0.5, 1]' is a list")
    prompts = PROMPTS
    if cfg.prompts:
        prompts = [entry["prompt"] for _, entry in read_prompts(cfg.prompts)]
    device = pick_device(cfg.device)
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else fast_dtype(device)
    name = cfg.init_from or huggingface.newest_run()
    model, tok, recipe = huggingface.load(name, device, getattr(torch, dtype))
    texts = texts_of(prompts, model, tok, cfg)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)

    by_temperature, lengths, per_forward = {}, [], []
    for temperature in tqdm(temperatures, unit="temperature"):
        orders, speed = orders_at(temperature, texts, model, tok, recipe, cfg)
        by_temperature[temperature] = scores(orders)
        lengths.append(sum(map(len, orders)) / len(orders))
        per_forward.append(speed)
    L = round(sum(lengths) / len(lengths))
    block = cfg.block_length or recipe.attention_block or L
    at_random = scores(random_orders(L, block))

    settings = f"confidence {cfg.confidence}, threshold {cfg.threshold}, blocks of {block}"
    typed = " ".join(["python -m experiments.ar_ness", *(sys.argv[1:] if argv is None else argv)])
    lines = [f"# AR-ness against temperature, {date.today()}", "", f"`{typed}`", "",
             f"{name}: {settings}; {len(prompts)} prompts × {cfg.samples} completions of up to "
             f"{cfg.max_new_tokens} tokens, {L} on average; seed {cfg.seed}."]
    for kind in ("local", "global"):
        rows = {f"temperature {t:g}": found[kind] for t, found in by_temperature.items()}
        rows[f"random inside blocks of {block}"] = at_random[kind]
        lines += ["", table(f"{kind} AR-ness", rows)]
    speeds = ", ".join(f"{s:.2f} at {t:g}" for t, s in zip(by_temperature, per_forward))
    lines += ["", f"Tokens per forward of a text, by temperature: {speeds}."]
    report = "\n".join(lines) + "\n"
    print(report)
    write_text(out / "ar_ness.md", report)
    draw(by_temperature, at_random, out / "ar_ness.png")
    print(f"written to {out / 'ar_ness.md'} and {out / 'ar_ness.png'}")


if __name__ == "__main__":
    main()
