"""Which estimate of a log-probability should a diffusion policy be trained with? A table, a plot.

    python -m experiments.shootout                                 # an hour on two cores
    python -m experiments.shootout --budget=1000 --seeds='[1, 2]'

Five runs of rl.py per seed, alike but for the estimator (estimators.py) and the number of steps:
what is cheap may learn from more answers. Each has the same budget of forwards, counted for every
answer of a rollout, as if all answers were learned from, as

    writing   K + 1 in blocks of K: each token is computed K times as noise and once clean
    updates   4 per pass of the estimate: the reference, and the policy that learns, whose backward
              pass counts as two

The clean text that the passes of an answer share (estimators.after_one_clean_text) is not counted.
Bias and variance are those of each estimate on the model that all begin with: how far it is from
the log-probability of the policy that sampled (experiments/estimators.py). Writes REPORT and the
plot beside it, a .png.

Not covered: the best learning rate of each estimator. All share the one of the config.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch

import huggingface
import rl
from configurator import Float, Int, Mistake, Name, configure
from experiments import estimators
from experiments.toy_rl import check_seeds, learn, metrics, seconds_of, smoothed
from files import check_out, write_text
from sandbox import cores

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    config: Name = "config/toy_rl.py"  # rl.py's settings that all share
    init_from: Name = "out/toy_sft"  # folder that all begin with
    seeds: tuple = (1337, 1, 2)  # of the runs
    budget: Float(1, 1e9) = 500.0  # forwards per answer of a rollout, over a whole run
    tasks: Name = "data/functions/hard.jsonl"  # bias and variance are measured on answers to these
    completions: Int(2, 2**16) = 192  # so many of them
    out: Name = "out/shootout"  # folder of the runs
    at_once: Int(1, 64) = 2  # runs at the same time, which share the cores
    report: Name = "bench/results/shootout.md"  # the table; the plot is beside it


NAMES = ("masked", "coupled", "independent", "sequence", "trace")


def passes_per_answer(name, K):
    """How many passes an estimate has, with one pair of masks."""
    return {"masked": 1, "sequence": 2, "trace": K}.get(name, 3)


def rollouts_of(name, K, cfg):
    """How many rollouts the budget holds, with one update of each."""
    return max(1, round(cfg.budget / cost_of(name, K)))


def cost_of(name, K):
    """Forwards of a rollout and its update, per answer."""
    return K + 1 + 4 * passes_per_answer(name, K)


def jobs_of(K, cfg):
    """{folder: [words of rl.py]} of all runs. The seeds take turns, so that a stopped shoot-out has
    whole rounds."""
    jobs = {}
    for seed in cfg.seeds:
        for name in NAMES:
            count = rollouts_of(name, K, cfg)
            jobs[f"{cfg.out}/{name}_{seed}"] = [
                cfg.config, f"--init_from={cfg.init_from}", f"--seed={seed}",
                f"--estimator={name}", "--pairs=1", "--updates=1", f"--max_steps={count}",
                f"--eval_every={-(-count // 3)}", "--save_every=1000000"]
    return jobs


def results_of(name, cfg):
    """{what: a list over seeds} of an estimator's runs."""
    found = {"before": [], "after": [], "seconds": [], "kl": []}
    for seed in cfg.seeds:
        folder = f"{cfg.out}/{name}_{seed}"
        lines = metrics(folder)
        scores = [line["val_pass@1"] for line in lines if "val_pass@1" in line]
        kls = [line["kl"] for line in lines if line.get("kl") is not None]
        found["before"].append(scores[0])
        found["after"].append(scores[-1])
        found["kl"].append(mean(kls[-5:] or [0]))
        found["seconds"].append(seconds_of(folder))
    return found


def spread(numbers):
    """mean ± standard deviation over seeds, of shares, as a cell."""
    if len(numbers) == 1:
        return f"{numbers[0]:.1%}"
    return f"{mean(numbers):.1%} ± {stdev(numbers):.1%}"


def table(results, estimates, K, cfg):
    """Markdown: a line for each estimator."""
    figures, of_each, _ = estimates
    tokens = estimators.tokens_of(of_each)
    lines = ["| estimator | forwards per answer and update | rollouts | bias, nats per token "
             "| variance per token | of the sum, per token | greedy pass@1 | by seed | KL "
             "| seconds per run |", "|---" * 10 + "|"]
    for name in NAMES:
        per, passes = figures[name]
        found = results[name]
        cells = [name, passes, rollouts_of(name, K, cfg), f"{per['bias'].sum() / tokens:+.4f}",
                 f"{per['token'].sum() / tokens:.4f}", f"{per['sum'].sum() / tokens:.4f}",
                 spread(found["after"]), ", ".join(f"{score:.1%}" for score in found["after"]),
                 f"{mean(found['kl']):.3f}", f"{mean(found['seconds']):.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def draw(results, K, cfg, path):
    """pass@1 over forwards, and reward over forwards, means over seeds; pass@1 of each run."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    for place, name in enumerate(NAMES):
        cost = cost_of(name, K)
        runs = [metrics(f"{cfg.out}/{name}_{seed}") for seed in cfg.seeds]
        for axis, key in ((left, "val_pass@1"), (middle, "reward")):
            curves = [[line[key] for line in run if key in line] for run in runs]
            steps = [line["step"] for line in runs[0] if key in line]
            values = [mean(at) for at in zip(*curves)]
            if key == "reward":
                values = smoothed(values)
            axis.plot([step * cost for step in steps], values, "o-" if axis is left else "-", ms=4,
                      label=name)
        right.plot([place] * len(cfg.seeds), results[name]["after"], "o")
    right.axhline(results[NAMES[0]]["before"][0], color="black", lw=0.8, label="before")
    right.set_xticks(range(len(NAMES)), NAMES, fontsize=8)
    left.set(title="greedy pass@1, mean of seeds", xlabel="forwards")
    middle.set(title="reward, mean of seeds and of 5 rollouts", xlabel="forwards")
    right.set(title="greedy pass@1 at the end, each seed")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check_seeds(cfg.seeds)
    check_out(cfg.report)
    learns, _ = configure(rl.Config, [cfg.config])
    if not learns.val_tasks or not learns.eval_every or not learns.beta:
        raise Mistake(f"{cfg.config} must have val_tasks, eval_every and beta: the table shows "
                      "what they measure")
    _, _, recipe = huggingface.read_description(huggingface.find(cfg.init_from))
    K = recipe.block_size
    if recipe.objective != "block":
        raise Mistake(f"{cfg.init_from} has objective={recipe.objective!r}: `trace` would need a "
                      "pass for every token; name a model that writes in blocks")
    estimates = estimators.compare(estimators.Config(
        cfg.init_from, cfg.tasks, completions=cfg.completions, threads=cores()))
    learn(jobs_of(K, cfg), cfg.at_once)
    results = {name: results_of(name, cfg) for name in NAMES}

    words = sys.argv[1:] if argv is None else argv
    text = "\n".join([
        f"# Five estimators under one budget of forwards, {date.today()}", "",
        f"`{shlex.join(['python', '-m', 'experiments.shootout', *words])}`", "",
        f"{cfg.config} from {cfg.init_from}, one update per rollout, seeds "
        f"{', '.join(map(str, cfg.seeds))}; {cfg.budget:g} forwards per answer of a rollout, of "
        f"which writing takes {K + 1}. Greedy pass@1 on its val_tasks, "
        f"{results['trace']['before'][0]:.1%} before: mean ± standard deviation over seeds. KL to "
        "the reference, in nats per token (`sequence`: half a squared mean difference). Seconds: "
        f"{cfg.at_once} runs at a time on {cores()} cores, without evaluations. torch "
        f"{torch.__version__}.", "", *table(results, estimates, K, cfg)]) + "\n"
    print(text)
    write_text(cfg.report, text)
    plot = Path(cfg.report).with_suffix(".png")
    draw(results, K, cfg, plot)
    print(f"written to {cfg.report} and {plot}")


if __name__ == "__main__":
    main()
