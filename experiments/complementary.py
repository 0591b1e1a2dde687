"""How noisy the training loss is under complementary pairs, independent rows, and `clipped`.

    python -m experiments.complementary                      # out/toy_sft, or out/toy without it
    python -m experiments.complementary --init_from=FOLDER --data=FILE.jsonl --draws=200

Three ways cost the same forwards: 2B rows under masks of their own by `count`, B rows each under a
mask and its complement, 2B rows by `clipped`. Each is measured on the same B rows at every draw
(twice each where there are no pairs), which leaves the noise of the masks alone, and on new rows at
every draw, as in training, where pairs have half as many different rows. The table has the loss
(`count` and pairs: the NELBO, `clipped`: more), its standard deviation, and the variance of the
gradient, the trace of its covariance. Writes bench/results/complementary.md.

Not covered: what it does to a training run.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import sys
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import huggingface
import sft
from configurator import Int, Mistake, Name, Seed, configure
from diffusion import Draw, corrupt, weighted_loss
from files import check_out, write_text


@dataclass
class Config:
    init_from: str = ""  # folder of a run or checkpoint; empty: out/toy_sft, else out/toy
    data: Name = "data/functions/train.jsonl"  # samples, see sft.py
    out: Name = "bench/results/complementary.md"  # the table
    context: Int(8, 2**20) = 128  # tokens per row, a multiple of 8
    rows: Int(1, 4096) = 4  # B
    draws: Int(2, 2**20) = 30  # steps of each way
    seed: Seed = 1337  # of the masks
    threads: Int(1, 4096) = 1  # CPU threads


WAYS = {"count": ("count", False), "count, in pairs": ("count", True),
        "clipped": ("clipped", False)}


def noised_rows(data, recipe, cfg, step, new):
    """2B rows as a step of training masks them: new ones, or the same B twice."""
    draw = Draw.of(recipe, cfg.seed, step, range(2 * cfg.rows), 2 * cfg.rows)
    if new:
        return corrupt(data.at_step(cfg.seed, step, draw.batch_rows, draw.rows), recipe, draw)
    batch = data.batch(data.spread(cfg.rows))
    return corrupt(batch.select([row // 2 for row in range(2 * cfg.rows)]), recipe, draw)


def measure(model, data, recipe, cfg, new):
    """The loss's mean and standard deviation, and the trace of the gradient's covariance."""
    losses = np.zeros(cfg.draws)
    total, squares = 0.0, 0.0  # of the gradient: its sum, and the sum of its squared norm
    for step in tqdm(range(cfg.draws), leave=False):
        noised = noised_rows(data, recipe, cfg, step, new)
        model.zero_grad()
        loss = weighted_loss(model, noised, recipe) / noised.maskable.sum()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        losses[step] = loss.item()
        total = total + gradient
        squares += gradient.square().sum().item()
    mean = total / cfg.draws
    trace = (squares - cfg.draws * mean.square().sum().item()) / (cfg.draws - 1)
    return losses.mean(), losses.std(ddof=1), trace


def chosen_run():
    return "out/toy_sft" if (Path("out/toy_sft") / "latest").is_file() else "out/toy"


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check_out(cfg.out)
    torch.set_num_threads(cfg.threads)
    name = cfg.init_from or chosen_run()
    model, tok, recipe = huggingface.load(name, "cpu", torch.float32)
    if recipe.objective == "ar":
        raise Mistake(f"{name} is autoregressive: masks need a diffusion model")
    data = sft.Samples(sft.Store.of(list(sft.read(cfg.data, tok))), cfg.context, tok)
    if len(data) < cfg.rows:
        raise Mistake(f"rows={cfg.rows} is more than the {len(data)} rows of {cfg.data}")
    lines = ["| rows | masks | loss | its standard deviation | gradient's variance, relative |",
             "|---|---|---|---|---|"]
    for new in (False, True):
        first = None
        for way, (schedule, pairs) in WAYS.items():
            way_recipe = replace(recipe, schedule=schedule, complementary=pairs, u_warmup_steps=0,
                                 strategies=((0.0, 0.0, 0.0),))
            mean, deviation, trace = measure(model, data, way_recipe, cfg, new)
            first = first or trace
            lines.append(f"| {'new' if new else 'the same'} | {way} | {mean:.4f} | "
                         f"{deviation:.4f} | {trace / first:.2f} |")
    typed = " ".join(["python -m experiments.complementary",
                      *(sys.argv[1:] if argv is None else argv)])
    about = (f"{name}, {recipe.objective}, K = {recipe.block_size}; steps of {2 * cfg.rows} rows "
             f"of {cfg.context} tokens of {cfg.data}, {cfg.draws} draws, seed {cfg.seed}. Nats per "
             "token. Relative: to `count` on the same rows, or on new ones at each draw, where "
             "pairs have half as many.")
    report = "\n".join([f"# Complementary masks, {date.today()}", "", f"`{typed}`", "", about, "",
                        *lines]) + "\n"
    print(report)
    write_text(cfg.out, report)


if __name__ == "__main__":
    main()
