"""How the demo's two models did, beside two yardsticks that need no training: prints a table, draws a plot.

    python -m experiments.toy_report            # reads out/toy_ar and out/toy, writes out/toy/report.md and loss.png

The yardsticks: an interpolated Kneser-Ney 4-gram model counted on the very windows that the autoregressive stage
trained on, and `xz -9` of the held-out files. The models and the n-gram model are scored on the same held-out windows.

Not covered: evaluation of any run (that is train.py's), pass@k.
"""
import json
import lzma
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import checkpoint
from configurator import configure
from loader import Windows
from sample import generate

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    ar: str = "out/toy_ar"  # run of the autoregressive stage
    block: str = "out/toy"  # run of the block-diffusion stage
    max_new_tokens: int = 48  # length of the three completions


PROMPTS = ("def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n", "import os\nimport sys\n\ndef main(")
ORDER, DISCOUNT = 4, 0.75


def count_ngrams(windows):
    """Kneser-Ney counts of (N, T) windows: per order n, {n-gram: count}, {context: total}, {context: distinct next tokens}.

    Orders below the highest count in how many different contexts an n-gram was seen (Kneser & Ney 1995).
    """
    T, tables = windows.shape[1], []
    grams = Counter(zip(*(windows[:, i:T - ORDER + 1 + i].ravel().tolist() for i in range(ORDER))))
    for _ in range(ORDER):
        total, distinct = Counter(), Counter()
        for g, c in grams.items():
            total[g[:-1]] += c
            distinct[g[:-1]] += 1
        tables.append((grams, total, distinct))
        grams = Counter(g[1:] for g in grams)
    return tables


def ngram_probability(tables, context, token, vocab_size):
    """p(token | context) by interpolation with absolute discounting; the shortest context backs off to uniform."""
    p = 1 / vocab_size
    for grams, total, distinct in reversed(tables):  # order 1 first
        n = len(next(iter(grams)))
        c = context[len(context) - n + 1:] if n > 1 else ()
        if total[c]:
            p = (max(grams[(*c, token)] - DISCOUNT, 0) + DISCOUNT * distinct[c] * p) / total[c]
    return p


def ngram_bits_per_byte(train, val, tok, settings):
    """Bits per byte of the n-gram model on the windows that train.py evaluates on, counting the tokens it scores."""
    cfg = settings["config"]
    rows = settings["step"] * cfg["batch_tokens"] // cfg["context"]
    tables = count_ngrams(np.stack([train.window(w)[0] for w in train.order(cfg["seed"], 0)[:rows]]))
    bits = bytes_ = 0
    batch = val.batch(val.spread(cfg["eval_windows"]))
    for x0, doc_start, maskable in tqdm(list(zip(batch.x0.tolist(), batch.doc_start.tolist(), batch.maskable.tolist())),
                                        desc="n-gram", leave=False):
        for i in np.flatnonzero(maskable):
            context = tuple(x0[max(doc_start[i], i - ORDER + 1):i])
            context = (-1,) * (ORDER - 1 - len(context)) + context  # -1 was never seen: shorter contexts take over
            bits -= math.log2(ngram_probability(tables, context, x0[i], tok.vocab_size))
            bytes_ += int(tok.token_bytes[x0[i]])
    return bits / bytes_


def xz_bits_per_byte(val, tok):
    """Compressed bits per byte of all held-out files, one stream."""
    text = tok.decode(val.tokens[0]).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def read_metrics(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if "loss" in m], [m for m in lines if "val_nelbo" in m]


def draw_losses(runs, path):
    """Training loss and held-out NELBO of each run, in nats a token, over the tokens it trained on."""
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 3.4), sharey=True)
    for axis, (name, run) in zip(axes, runs.items()):
        steps, evaluations = read_metrics(run)
        per_step = steps[0]["tokens"] / 1e6
        axis.plot([m["tokens"] / 1e6 for m in steps], [m["loss"] for m in steps], lw=0.8, label="training loss")
        axis.plot([m["step"] * per_step for m in evaluations], [m["val_nelbo"] for m in evaluations], "o-", label="held-out NELBO")
        axis.set(title=name, xlabel="million tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats a token")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    cfg, _ = configure(Config)
    model, tok, recipe = checkpoint.load(cfg.block)
    ar_settings = checkpoint.read_json(checkpoint.find(cfg.ar) / "state" / "train.json")
    data, T = ar_settings["config"]["data"], ar_settings["config"]["context"]
    train, val = (Windows(data, split, T, tok.vocab_size) for split in ("train", "val"))

    lines = ["| model | bits a byte, held out | tokens a second | seconds |", "|---|---|---|---|"]
    for name, run in (("autoregressive", cfg.ar), (f"block diffusion, K = {recipe.block_size} (NELBO)", cfg.block)):
        steps, evaluations = read_metrics(run)
        speed = np.median([m["tokens_per_s"] for m in steps])
        lines.append(f"| {name} | {evaluations[-1]['val_bits_per_byte']:.3f} | {speed:,.0f} | "
                     f"{sum(m['seconds'] for m in steps + evaluations):.0f} |")
    lines.append(f"| {ORDER}-gram, Kneser-Ney | {ngram_bits_per_byte(train, val, tok, ar_settings):.3f} | | |")
    lines.append(f"| xz -9, all held-out files as one stream | {xz_bits_per_byte(val, tok):.3f} | | |")
    lines.append(f"\nThe autoregressive stage and the {ORDER}-gram saw the same training windows, the block stage then the first of "
                 f"them again; all three are scored on the same {evaluations[-1]['val_tokens']:,} held-out tokens.")

    for prompt in PROMPTS:
        (ids,), _ = generate(model, tok, recipe, [tok.bos_id, *tok.encode(prompt)], max_new_tokens=cfg.max_new_tokens)
        lines.append(f"\n```python\n{prompt}{tok.decode(ids)}\n```")
    report = "\n".join(lines) + "\n"
    print(report)
    (Path(cfg.block) / "report.md").write_text(report)
    draw_losses({"autoregressive": cfg.ar, "block diffusion": cfg.block}, Path(cfg.block) / "loss.png")
    print(f"written to {Path(cfg.block) / 'report.md'} and {Path(cfg.block) / 'loss.png'}")


if __name__ == "__main__":
    main()
