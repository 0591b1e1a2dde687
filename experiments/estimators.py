"""How far estimates of a completion's log-probability are from it, and how noisy. A table, a plot.

    python -m experiments.estimators                      # out/toy_sft, data/functions/hard.jsonl
    python -m experiments.estimators --init_from=FOLDER --tasks=FILE.jsonl --draws=100

A model writes a completion of each prompt, in an order that depends on the text so far alone. So
`trace` is exact: it is the policy that sampled. Each other estimate (estimators.py) is drawn many
times for the same completions. A forward is a pass over all of them, and more draws may be averaged
at the price of more forwards, so variances are compared times the number of forwards. The ratio of
`independent` to `coupled` costs the same on both sides; its error is a bootstrap over completions.
Writes OUT, bench/results/estimators.md, and the plot beside it, a .png.

A block of a block model sees nothing of how others are masked. So where K is at most 8, each of its
2^K masks is computed once, in all blocks at a time, and draws are looked up.

Not covered: what an estimate does to training (rl.py).
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import huggingface
from configurator import Float, Int, Mistake, Name, Seed, configure
from decode import Decoding
from estimators import Estimate, Pass, check_estimate, log_probs, passes_of
from evaluate import prompt_ids
from files import check_out, write_text
from rollout import rows_of, stacked, write_completions
from tasks import read_tasks

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    init_from: Name = "out/toy_sft"  # folder of a run or checkpoint, or Hub name
    tasks: Name = "data/functions/hard.jsonl"  # see tasks.py
    out: Name = "bench/results/estimators.md"  # the table; the plot is beside it
    completions: Int(2, 2**16) = 192  # one of each of the first tasks
    draws: Int(2, 2**16) = 100  # of each estimate that is random
    pairs: Int(1, 64) = 1  # λ
    confidence: Literal["entropy", "left_to_right", "margin"] = "entropy"  # order of writing
    temperature: Float(0.01, 100) = 1.0  # of the rollouts, and of the estimates
    max_new_tokens: Int(1, 2**20) = 96  # longest completion, in tokens
    batch: Int(1, 2**16) = 16  # completions written, and read, together
    seed: Seed = 1337  # of the rollouts and of the masks
    threads: Int(1, 4096) = 1  # CPU threads


BOOTSTRAPS = 1000
LARGEST_TABLE = 8  # K: 256 masks


def ways_of(cfg):
    """{name: Estimate}, in the order of the table."""
    return {
        "masked": Estimate("masked"),
        "coupled": Estimate("coupled", cfg.pairs),
        "independent": Estimate("independent", cfg.pairs),
        "coupled, released weights": Estimate("coupled", cfg.pairs, "released"),
        "independent, released weights": Estimate("independent", cfg.pairs, "released"),
        "sequence": Estimate("sequence", cfg.pairs),
        "trace": Estimate("trace"),
    }


def prompts_of(tasks, tok, context, max_new_tokens):
    """The ids of each task's prompt, and how many tokens it may be answered in."""
    prompts = [prompt_ids(task, tok) for task in tasks]
    return [(ids, min(max_new_tokens, context - len(ids))) for ids in prompts]


def rollouts(cfg, model, tok, recipe):
    """The completions of the first tasks, in batches: a list of Completions."""
    tasks = read_tasks(cfg.tasks)[:cfg.completions]
    prompts = prompts_of(tasks, tok, model.cfg.context, cfg.max_new_tokens)
    if len(prompts) < cfg.completions:
        raise Mistake(f"completions={cfg.completions} is more than the {len(prompts)} tasks of "
                      f"{cfg.tasks}")
    rows = rows_of(0, range(len(prompts)), 1, prompts, recipe.causal_block)
    how = Decoding(confidence=cfg.confidence, temperature=cfg.temperature, seed=cfg.seed)
    parts = write_completions(model, tok, recipe, how, rows, cfg.batch)
    return [stacked(part, recipe.causal_block, tok.stop_ids, "cpu")
            for part in tqdm(parts, total=-(-len(rows) // cfg.batch), desc="rollouts")]


def banned_ids(model, tok):
    """Ids that decoding never chooses, (n,) int64."""
    beyond = range(tok.vocab_size, model.cfg.vocab_size)
    return torch.tensor(sorted({*tok.never_chosen, *beyond}))


@torch.no_grad()
def every_mask(made, model, recipe, banned, cfg):
    """(2^K, B, T): log p of each token, where the bits of the first index say which places of its
    block are masked."""
    place = torch.arange(made.tokens.shape[1]) % recipe.block_size  # (T,)
    found = []
    for pattern in range(2**recipe.block_size):
        hidden = made.completion & ((pattern >> place) & 1).bool()  # (B, T)
        one = Pass(hidden, hidden.float())
        found.append(log_probs(model, made, [one], recipe, cfg.temperature, banned))
    return torch.stack(found)


def looked_up(by_mask, passes, K):
    """What log_probs makes of these passes, (B, T)."""
    place = torch.arange(by_mask.shape[2]) % K  # (T,)
    total = 0
    for one in passes:
        bits = one.masked.long() << place  # (B, T)
        pattern = bits.unflatten(1, (-1, K)).sum(2).repeat_interleave(K, 1)  # (B, T)
        total = total + one.weight * by_mask.gather(0, pattern[None])[0]
    return total


@torch.no_grad()
def measure(how, made, by_mask, model, recipe, banned, cfg):
    """An estimate of each scored token: for each completion (draws, tokens) float64; and how many
    forwards a draw costs. by_mask: see every_mask; None: there is none."""
    drawn = []
    for step in range(1 if how.estimator in ("masked", "trace") else cfg.draws):
        passes = passes_of(how, made, recipe, cfg.seed, step)
        if by_mask is None:
            log_p = log_probs(model, made, passes, recipe, cfg.temperature, banned)  # (B, T)
        else:
            log_p = looked_up(by_mask, passes, recipe.block_size)
        drawn.append(log_p.double().numpy())
    drawn = np.stack(drawn)  # (draws, B, T)
    return [drawn[:, b, row] for b, row in enumerate(made.scored.numpy())], len(passes)


def figures(found, exact):
    """What the table has of one estimate, per completion: a dict of (completions,) arrays.

    bias: Σ over tokens of mean estimate - exact. error: the squared error of a draw's sum. token,
    sum: Σ over tokens of the variance, and the variance of the sum.
    """
    per = {"bias": [], "error": [], "token": [], "sum": []}
    for values, true in zip(found, exact):  # (draws, tokens), (1, tokens)
        sums = values.sum(1)
        per["bias"].append((values - true).mean(0).sum())
        per["error"].append(np.square(sums - true.sum()).mean())
        per["token"].append(values.var(0, ddof=1).sum() if len(values) > 1 else 0.0)
        per["sum"].append(sums.var(ddof=1) if len(values) > 1 else 0.0)
    return {name: np.array(numbers) for name, numbers in per.items()}


def ratio(over, under, seed):
    """Σ over / Σ under of completions' variances, and its standard error by the bootstrap."""
    random = np.random.default_rng(seed)
    chosen = random.integers(len(over), size=(BOOTSTRAPS, len(over)))
    again = over[chosen].sum(1) / under[chosen].sum(1)
    return over.sum() / under.sum(), again.std(ddof=1)


def table(results, tokens, completions):
    """Markdown. results: {name: (figures, forwards)}. tokens: of all completions."""
    lines = ["| estimate | forwards | bias, nats per token | distance of a completion's sum, nats "
             "| variance per token | of the sum, per token | per token × forwards "
             "| of the sum × forwards |", "|---" * 8 + "|"]
    for name, (per, forwards) in results.items():
        token, sum_ = per["token"].sum() / tokens, per["sum"].sum() / tokens
        distance = (per["error"].sum() / completions) ** 0.5
        lines.append(f"| {name} | {forwards} | {per['bias'].sum() / tokens:+.4f} | {distance:.3f} "
                     f"| {token:.4f} | {sum_:.4f} | {token * forwards:.4f} "
                     f"| {sum_ * forwards:.4f} |")
    return lines


def ratios(results, seed):
    """Markdown: independent over coupled, at the same number of forwards."""
    lines = ["| independent / coupled | variance per token | variance of the sum |",
             "|---|---|---|"]
    for label, suffix in (("weights of one", ""), ("released weights", ", released weights")):
        over, under = results["independent" + suffix][0], results["coupled" + suffix][0]
        cells = []
        for kind in ("token", "sum"):
            mean, error = ratio(over[kind], under[kind], seed)
            cells.append(f"{mean:.2f} ± {error:.2f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def draw(results, estimates, tokens, path):
    """Left: estimates against the exact value, per token. Right: variances at equal cost."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    true = np.array([values.mean() for values in estimates["trace"]])
    for name, marker in (("masked", "s"), ("coupled", "o"), ("sequence", "^")):
        left.plot(true, [values.mean() for values in estimates[name]], marker, ms=4, alpha=0.6,
                  label=name)
    ends = [min(true.min(), -0.1), 0]
    left.plot(ends, ends, color="black", lw=0.8, label="trace: exact")
    left.set(xlabel="exact log p, nats per token", ylabel="estimate, mean over draws")
    left.legend(fontsize=8)
    names = [name for name, (per, _) in results.items() if per["sum"].any()]
    place = np.arange(len(names))
    for offset, kind, label in ((-0.2, "token", "per token"), (0.2, "sum", "of the sum")):
        heights = [results[name][0][kind].sum() / tokens * results[name][1] for name in names]
        right.bar(place + offset, heights, 0.4, label=label)
    right.set_xticks(place, [name.replace(", ", ",\n").replace(" ", "\n") for name in names],
                     fontsize=7)
    right.set_ylabel("variance × forwards, nats² per token")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(cfg):
    """({estimate: (figures, forwards)}, {estimate: what `measure` found}, the model's Recipe)."""
    torch.set_num_threads(cfg.threads)
    model, tok, recipe = huggingface.load(cfg.init_from, "cpu", torch.float32)
    ways = ways_of(cfg)
    for how in ways.values():
        check_estimate(how, recipe)
    batches = rollouts(cfg, model, tok, recipe)
    estimates = {name: [] for name in ways}
    forwards = dict.fromkeys(ways, 0)
    banned = banned_ids(model, tok)
    for made in tqdm(batches, desc="estimates"):
        by_mask = None
        if recipe.objective == "block" and recipe.block_size <= LARGEST_TABLE:
            by_mask = every_mask(made, model, recipe, banned, cfg)
        for name, how in ways.items():
            found, passes = measure(how, made, by_mask, model, recipe, banned, cfg)
            estimates[name] += found
            forwards[name] = max(forwards[name], passes)
    results = {name: (figures(found, estimates["trace"]), forwards[name])
               for name, found in estimates.items()}
    if tokens_of(estimates) == 0:
        raise Mistake(f"{cfg.init_from} wrote nothing: all completions are empty")
    return results, estimates, recipe


def tokens_of(estimates):
    """How many tokens all completions have together."""
    return sum(values.shape[1] for values in estimates["trace"])


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check_out(cfg.out)
    results, estimates, recipe = compare(cfg)
    tokens = tokens_of(estimates)
    words = sys.argv[1:] if argv is None else argv
    typed = shlex.join(["python", "-m", "experiments.estimators", *words])
    kind = f"block, K = {recipe.block_size}" if recipe.causal_block else recipe.objective
    about = (f"{cfg.init_from}, {kind}; {cfg.completions} completions of {cfg.tasks}, {tokens} "
             f"scored tokens, written by {cfg.confidence} at temperature {cfg.temperature:g}; λ = "
             f"{cfg.pairs}, {cfg.draws} draws, seed {cfg.seed}. Bias and distance: from `trace`, "
             "the policy that sampled, on the scored tokens. Distance: root mean square over "
             "completions and draws.")
    report = "\n".join([f"# Estimates of a completion's log-probability, {date.today()}", "",
                        f"`{typed}`", "", about, "", *table(results, tokens, cfg.completions), "",
                        *ratios(results, cfg.seed)]) + "\n"
    print(report)
    write_text(cfg.out, report)
    plot = Path(cfg.out).with_suffix(".png")
    draw(results, estimates, tokens, plot)
    print(f"written to {cfg.out} and {plot}")


if __name__ == "__main__":
    main()
