"""How the demo's models did, and two baselines that need no training: a table and a plot.

    python -m experiments.toy_report    # reads out/toy_ar, out/toy and out/toy_sft/held_out

Writes out/toy/report.md and out/toy/loss.png. The baselines: an interpolated Kneser-Ney 4-gram
model counted on the very windows that the autoregressive stage trained on, and `xz -9` of the
held-out files. The models and the n-gram model are scored on the same held-out windows. Then
pass@1 of the fine-tuned model, if evaluate.py has scored it, and three of its functions.

Not covered: evaluation of any run (that is train.py's and evaluate.py's).
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import lzma
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

import huggingface
from configurator import Mistake, Name, configure, shortened
from files import read_json, read_json_lines, read_text, write_text
from loader import Windows, epoch_order

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    ar: Name = "out/toy_ar"  # run of the autoregressive stage
    block: Name = "out/toy"  # run of the block-diffusion stage
    held_out: Name = "out/toy_sft/held_out"  # folder of evaluate.py's; left out if it is missing


ORDER, DISCOUNT = 4, 0.75


# --- baselines -----------------------------------------------------------------------------------

def count_ngrams(windows):
    """Kneser-Ney counts of (N, T) windows, for each order from ORDER down to 1.

    A table is ({n-gram: count}, {context: total}, {context: distinct next tokens}). Orders below
    the highest count in how many different contexts an n-gram was seen (Kneser & Ney 1995).
    """
    T, tables = windows.shape[1], []
    columns = [windows[:, i:T - ORDER + 1 + i].ravel().tolist() for i in range(ORDER)]
    grams = Counter(zip(*columns))
    for _ in range(ORDER):
        total, distinct = Counter(), Counter()
        for gram, count in grams.items():
            total[gram[:-1]] += count
            distinct[gram[:-1]] += 1
        tables.append((grams, total, distinct))
        grams = Counter(gram[1:] for gram in grams)
    return tables


def ngram_probability(tables, context, token, vocab_size):
    """p(token | context) by interpolation with absolute discounting, from uniform upwards."""
    p = 1 / vocab_size
    for grams, total, distinct in reversed(tables):  # order 1 first
        n = len(next(iter(grams)))
        c = context[len(context) - n + 1:] if n > 1 else ()
        if total[c]:
            count = max(grams[(*c, token)] - DISCOUNT, 0)
            p = (count + DISCOUNT * distinct[c] * p) / total[c]
    return p


def ngram_bits_per_byte(train, val, tok, settings):
    """Bits per byte of the n-gram model, counted over the tokens that train.py evaluates.

    settings: of the autoregressive run, which say which windows it trained on.
    """
    cfg = settings["config"]
    rows = settings["step"] * cfg["batch_tokens"] // cfg["context"]
    numbers = epoch_order(cfg["seed"], 0, len(train))[:rows]
    tables = count_ngrams(np.stack([train.window(number)[0] for number in numbers]))
    bits = size = 0
    batch = val.batch(val.spread(cfg["eval_windows"]))
    windows = list(zip(batch.x0.tolist(), batch.doc_start.tolist(), batch.maskable.tolist()))
    for x0, doc_start, maskable in tqdm(windows, desc="n-gram", leave=False):
        for i in np.flatnonzero(maskable):
            context = tuple(x0[max(doc_start[i], i - ORDER + 1):i])
            # -1 was never seen: shorter contexts take over
            context = (-1,) * (ORDER - 1 - len(context)) + context
            bits -= math.log2(ngram_probability(tables, context, x0[i], tok.vocab_size))
            size += int(tok.token_bytes[x0[i]])
    return bits / size


def xz_bits_per_byte(val, tok):
    """Compressed bits per byte of all held-out files, one stream."""
    text = tok.decode(val.tokens[0]).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


# --- runs -----------------------------------------------------------------------------------------

NUMBERS = ("context", "batch_tokens", "seed", "eval_windows")  # of a run's settings that are read
IN_STEPS = ("loss", "tokens", "tokens_per_s", "seconds")  # values of metrics that are read
IN_EVALUATIONS = ("step", "val_nelbo", "val_bits_per_byte", "val_tokens", "seconds")


def read_settings(run, objective):
    """What a run was trained with: {"step": …, "config": …}. Raises Mistake for another objective.

    The objective is what the run's own settings say, whatever its folder is called.
    """
    path = huggingface.find(run) / "state" / "train.json"
    settings = read_json(path)
    cfg = settings.get("config")
    if not isinstance(cfg, dict) or type(settings.get("step")) is not int:
        raise Mistake(f"{path} is not the settings of a run: it has no config or no step")
    if cfg.get("objective") != objective:
        raise Mistake(f"{run} was trained with objective={shortened(cfg.get('objective'))}, "
                      f"where one with objective={objective!r} belongs: name another run")
    for name in NUMBERS:
        if type(cfg.get(name)) is not int or cfg[name] < 0:
            raise Mistake(f"{path} is damaged: its {name} is {shortened(cfg.get(name))}, "
                          "not an int from 0 up")
    return settings


def read_metrics(run):
    """(steps, evaluations) of a run's metrics.jsonl, two lists of dicts."""
    path = Path(run) / "metrics.jsonl"
    steps, evaluations = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            metrics = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Mistake(f"{path}, line {number}, is not JSON: was it cut short? "
                          "`train.py --resume=true` repairs an unfinished run") from error
        if has_numbers(metrics, IN_STEPS):
            steps.append(metrics)
        elif has_numbers(metrics, IN_EVALUATIONS):
            evaluations.append(metrics)
        else:
            raise Mistake(f"{path}, line {number}, is neither a step nor an evaluation")
    if not steps or not evaluations:
        raise Mistake(f"{path} has {len(steps)} steps and {len(evaluations)} evaluations; "
                      "a report needs both")
    return steps, evaluations


def has_numbers(metrics, names):
    return isinstance(metrics, dict) and all(type(metrics.get(n)) in (int, float) for n in names)


def draw_losses(runs, path):
    """Training and held-out loss of two runs, in nats per token, over the tokens each has read.

    runs: (folder of the autoregressive run, folder of the block-diffusion run). The held-out loss
    of the former is its negative log-likelihood (NLL), that of the latter a bound on it (NELBO).
    """
    panels = (("autoregressive", "NLL"), ("block diffusion", "NELBO"))
    figure, axes = plt.subplots(1, len(runs), figsize=(9, 3.4), sharey=True)
    for axis, (name, held_out), run in zip(axes, panels, runs):
        steps, evaluations = read_metrics(run)
        per_step = steps[0]["tokens"] / 1e6
        axis.plot([m["tokens"] / 1e6 for m in steps], [m["loss"] for m in steps], lw=0.8,
                  label="training loss")
        axis.plot([m["step"] * per_step for m in evaluations],
                  [m["val_nelbo"] for m in evaluations], "o-", label=f"held-out {held_out}")
        axis.set(title=name, xlabel="million tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("nats per token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- the report -----------------------------------------------------------------------------------

def table_row(name, run):
    """A run's line of the table."""
    steps, evaluations = read_metrics(run)
    speed = np.median([m["tokens_per_s"] for m in steps])
    seconds = sum(m["seconds"] for m in steps + evaluations)
    return (f"| {name} | {evaluations[-1]['val_bits_per_byte']:.3f} | {speed:,.0f} | "
            f"{seconds:.0f} |")


def solutions(folder):
    """Markdown: pass@1 of the functions in a folder of evaluate.py's, and three with verdicts."""
    scores = read_json(folder / "report.json").get("scores")
    if not has_numbers(scores, ("pass@1", "tasks")):
        raise Mistake(f"{folder / 'report.json'} is not a report of `evaluate.py passk`")
    lines = [f"\nHeld-out functions, {scores['tasks']} of combinations of ideas that no training "
             f"sample has: pass@1 {scores['pass@1']:.1%}. The first three:"]
    samples, verdicts = (list(read_json_lines(folder / f"{name}.jsonl"))
                         for name in ("samples", "verdicts"))
    for (_, sample), (_, verdict) in list(zip(samples, verdicts))[:3]:
        lines.append(f"\n```python\n{sample.get('solution')}```\n{verdict.get('status')} "
                     f"{verdict.get('detail')}")
    return lines


def main(argv=None):
    cfg, _ = configure(Config, argv)
    settings = read_settings(cfg.ar, "ar")
    read_settings(cfg.block, "block")
    _, tok, recipe = huggingface.load(cfg.block)
    data, T = settings["config"].get("data"), settings["config"]["context"]
    if not isinstance(data, str):
        raise Mistake(f"the settings of {cfg.ar} name no data folder: data is {shortened(data)}")
    train, val = (Windows(data, split, T, tok.vocab_size) for split in ("train", "val"))

    diffusion = f"block diffusion, K = {recipe.block_size} (NELBO)"
    ngram = ngram_bits_per_byte(train, val, tok, settings)
    scored = read_metrics(cfg.block)[1][-1]["val_tokens"]
    lines = ["| model | held-out bits per byte | training tokens/s | seconds, with evaluation |",
             "|---|---|---|---|",
             table_row("autoregressive", cfg.ar),
             table_row(diffusion, cfg.block),
             f"| {ORDER}-gram, Kneser-Ney | {ngram:.3f} | | |",
             f"| xz -9, all held-out files as one stream | {xz_bits_per_byte(val, tok):.3f} | | |",
             f"\nThe autoregressive stage and the {ORDER}-gram saw the same training windows. The "
             "block stage then saw the first of them again. All three are scored on the same "
             f"{scored:,} held-out tokens."]
    if (Path(cfg.held_out) / "report.json").is_file():
        lines += solutions(Path(cfg.held_out))
    report = "\n".join(lines) + "\n"
    print(report)
    out = Path(cfg.block)
    write_text(out / "report.md", report)
    draw_losses((cfg.ar, cfg.block), out / "loss.png")
    print(f"written to {out / 'report.md'} and {out / 'loss.png'}")


if __name__ == "__main__":
    main()
