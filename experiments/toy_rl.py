"""What learning from tests changes in a toy: pass@1, AR-ness, what fewer steps cost.

    python -m experiments.toy_rl                                    # three seeds from out/toy_sft
    python -m experiments.toy_rl --init_from='["out/a", "out/b"]' --seeds='[1, 2]'   # one from each

Each seed is a run of rl.py with config/toy_rl.py, several at once, continued where it was stopped.
Before and after, evaluate.py scores greedy answers to functions that no run has seen, with one
forward per token and with fewer; and AR-ness (watch.py) of the order they are written in is
measured, as DiffuCoder §4 does. Writes REPORT and the plot beside it, a .png.

Not covered: which estimator is best (experiments/shootout.py).
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from tqdm import tqdm

import huggingface
import rl
from configurator import Int, Mistake, Name, configure
from decode import Decoding
from experiments.estimators import prompts_of
from files import check_out, read_json, write_text
from rollout import rows_of, write_completions
from run import read_saved
from sandbox import cores
from tasks import read_tasks
from watch import global_ar, local_ar

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    config: Name = "config/toy_rl.py"  # rl.py's settings
    init_from: tuple = ("out/toy_sft",)  # folders to begin with: one for all seeds, or one each
    seeds: tuple = (1337, 1, 2)  # of the runs
    out: Name = "out/rl"  # folder of the runs
    tasks: Name = "data/functions/hard_test.jsonl"  # what is scored before and after
    easier: Name = "data/functions/test.jsonl"  # scored too: what may have been forgotten
    max_new_tokens: Int(1, 2**20) = 96  # longest answer, in tokens
    steps: tuple = (4, 2, 1)  # forwards per block that answers are scored with
    at_once: Int(1, 64) = 2  # runs at the same time, which share the cores
    report: Name = "bench/results/toy_rl.md"  # the table; the plot is beside it


# --- runs of rl.py, several at once ---------------------------------------------------------------

def learn(jobs, at_once):
    """Run rl.py for each of {folder: [words]}, `at_once` at a time, and wait until all are done.

    What they print is in FOLDER.log. Raises Mistake with the end of it where one fails, and where a
    folder has a run with other settings. Ctrl-C lets them save before they end.
    """
    for folder, words in jobs.items():
        refuse_other_settings(folder, words)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `begin` had it end at once
    threads = max(1, cores() // at_once)
    waiting, running = list(jobs.items()), {}
    with tqdm(total=len(jobs), unit="run") as bar:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    folder, words = waiting.pop(0)
                    running[folder] = start(folder, [*words, f"--threads={threads}",
                                                     f"--workers={threads}"])
                time.sleep(1)
                for folder in [name for name, run in running.items() if run.poll() is not None]:
                    if running.pop(folder).returncode:
                        log = Path(f"{folder}.log").read_text()
                        raise Mistake(f"the run in {folder} failed: {log[-600:]}")
                    bar.update()
                done = [f"{Path(name).name} {steps_done(name)}" for name in running]
                bar.set_postfix_str(", ".join(done))
        except KeyboardInterrupt:
            raise Mistake("stopped; the same command continues from here") from None
        finally:
            for run in running.values():
                run.terminate()
                run.wait()


def start(folder, words):
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "rl.py", *words, f"--out={folder}", "--resume=true"], stdout=log,
            stderr=log, start_new_session=True)  # Ctrl-C reaches it through `learn` alone


def refuse_other_settings(folder, words):
    """Raises Mistake where a folder has a run with settings that decide its numbers and are not
    these."""
    if not (Path(folder) / "latest").is_file():
        return
    asked = json.loads(json.dumps(asdict(configure(rl.Config, words)[0])))
    found = read_saved(huggingface.find(folder))["config"]
    silent = {"out", "resume", "threads", "workers", "save_every", "check_references"}
    for name, value in asked.items():
        if name not in silent and found.get(name) != value:
            raise Mistake(f"{folder} has a run with {name}={found.get(name)}, where {name}={value} "
                          "is asked for: choose another --out")


def metrics(folder):
    """The lines of a run's metrics.jsonl, a list of dicts."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def steps_done(folder):
    return sum("update_seconds" in line for line in metrics(folder))


def seconds_of(folder):
    """Seconds of a run's steps, without its evaluations."""
    return sum(line["seconds"] for line in metrics(folder) if "update_seconds" in line)


# --- before and after -----------------------------------------------------------------------------

def pass_at_1(folder, tasks, steps, out, cfg):
    """Greedy pass@1 of a model that takes so many steps per block."""
    words = ["passk", f"--init_from={folder}", f"--tasks={tasks}", f"--out={out}",
             f"--max_new_tokens={cfg.max_new_tokens}", f"--steps={steps}", "--batch=100"]
    done = subprocess.run([sys.executable, "evaluate.py", *words], capture_output=True, text=True)
    if done.returncode:
        raise Mistake(f"`evaluate.py {' '.join(words)}` failed: {done.stderr[-600:]}")
    return read_json(Path(out) / "report.json")["scores"]["pass@1"]


def ar_ness(loaded, temperature, cfg):
    """(local, global) AR-ness@1 of greedy answers, or of samples, the mean over the tasks."""
    model, tok, recipe = loaded
    prompts = prompts_of(read_tasks(cfg.tasks), tok, model.cfg.context, cfg.max_new_tokens)
    rows = rows_of(0, range(len(prompts)), 1, prompts, recipe.causal_block)
    how = Decoding(confidence="entropy", temperature=temperature)
    parts = list(write_completions(model, tok, recipe, how, rows, 100))
    orders = [row.order for part in parts for row in part if len(row.order) > 1]
    return mean(local_ar(order, 1) for order in orders), mean(global_ar(o, 1) for o in orders)


def measure(folder, name, cfg):
    """{what: number} of a model: pass@1 by steps, AR-ness by temperature."""
    found = {steps: pass_at_1(folder, cfg.tasks, steps, Path(cfg.out) / f"{name}_{steps}", cfg)
             for steps in cfg.steps}
    out = Path(cfg.out) / f"{name}_easier"
    found["easier"] = pass_at_1(folder, cfg.easier, max(cfg.steps), out, cfg)
    loaded = huggingface.load(folder, "cpu", torch.float32)
    for temperature in (0, 1):
        local, whole = ar_ness(loaded, temperature, cfg)
        found |= {f"local {temperature}": local, f"global {temperature}": whole}
    return found


# --- the report -----------------------------------------------------------------------------------

def table(before, after, cfg):
    """Markdown: every measure before and after, by seed and as a mean. before, after: of seeds."""
    names = {steps: f"pass@1, forwards per block: {steps}" for steps in cfg.steps}
    names["easier"] = f"pass@1 of {cfg.easier}"
    for kind in ("local", "global"):
        names |= {f"{kind} {t}": f"{kind} AR-ness@1, temperature {t}" for t in (0, 1)}
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in cfg.seeds)} | mean |",
             "|---" * (len(cfg.seeds) + 2) + "|"]
    for key, name in names.items():
        pairs = [(old[key], new[key]) for old, new in zip(before, after)]
        pairs.append(tuple(mean(side) for side in zip(*pairs)))
        cells = [f"{old:.1%} → {new:.1%}" for old, new in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def smoothed(values, width=5):
    """The mean of the last `width` values at each."""
    return [mean(values[max(0, n - width + 1):n + 1]) for n in range(len(values))]


def draw(folders, before, after, cfg, path):
    """Reward, KL and pass@1 over a run, and pass@1 against forwards per block."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3))
    for folder, seed in zip(folders, cfg.seeds):
        found = metrics(folder)
        rewards = [(line["step"], line["reward"]) for line in found if "reward" in line]
        kls = [(line["step"], line["kl"]) for line in found if line.get("kl") is not None]
        scores = [(line["step"], line["val_pass@1"]) for line in found if "val_pass@1" in line]
        for axis, points, marker in zip(axes, (rewards, kls, scores), ("", "", "o")):
            x, y = [x for x, _ in points], [y for _, y in points]
            axis.plot(x, y if marker else smoothed(y), marker=marker, ms=4, label=f"seed {seed}")
    for values, label in ((before, "before"), (after, "after")):
        axes[3].plot(cfg.steps, [mean(one[steps] for one in values) for steps in cfg.steps], "o-",
                     label=label)
    axes[0].set(title="reward, mean of 5 rollouts", xlabel="step")
    axes[1].set(title="KL to the reference, mean of 5", xlabel="step")
    axes[2].set(title="greedy pass@1, unseen functions", xlabel="step")
    axes[3].set(title="pass@1, mean of seeds", xlabel="forwards per block of K tokens")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[3].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_seeds(seeds):
    whole = all(type(seed) is int for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise Mistake(f"seeds={seeds} must be whole numbers, one at least, and none twice")


def check(cfg):
    """The folder that each seed begins with. Raises Mistake for settings that do not fit."""
    check_seeds(cfg.seeds)
    if len(cfg.init_from) not in (1, len(cfg.seeds)):
        raise Mistake(f"init_from={cfg.init_from} must be one folder, or one for each of the seeds "
                      f"{cfg.seeds}")
    if not cfg.steps or any(type(steps) is not int or steps < 1 for steps in cfg.steps):
        raise Mistake(f"steps={cfg.steps} must be whole numbers above 0")
    check_out(cfg.report)
    return cfg.init_from * (len(cfg.seeds) // len(cfg.init_from))


def main(argv=None):
    cfg, _ = configure(Config, argv)
    begin_with = check(cfg)
    folders = [f"{cfg.out}/seed_{seed}" for seed in cfg.seeds]
    learn({folder: [cfg.config, f"--init_from={first}", f"--seed={seed}"]
           for folder, first, seed in zip(folders, begin_with, cfg.seeds)}, cfg.at_once)
    names = {first: f"before_{n}" for n, first in enumerate(dict.fromkeys(begin_with))}
    names |= {folder: f"after_{seed}" for folder, seed in zip(folders, cfg.seeds)}
    found = {folder: measure(folder, name, cfg)
             for folder, name in tqdm(names.items(), desc="before and after", unit="model")}
    before = [found[first] for first in begin_with]
    after = [found[folder] for folder in folders]

    words = sys.argv[1:] if argv is None else argv
    taken = ", ".join(f"{seconds_of(folder):.0f}" for folder in folders)
    text = "\n".join([
        f"# Learning from tests, a toy, {date.today()}", "",
        f"`{shlex.join(['python', '-m', 'experiments.toy_rl', *words])}`", "",
        f"{cfg.config}, from {', '.join(cfg.init_from)}; {steps_done(folders[0])} steps. Scored on "
        f"{cfg.tasks}, greedy by max_prob; AR-ness of answers written by entropy. Seconds of the "
        f"runs, {cfg.at_once} at a time on {cores()} cores, without evaluations: {taken}. torch "
        f"{torch.__version__}.", "", *table(before, after, cfg)]) + "\n"
    print(text)
    write_text(cfg.report, text)
    plot = Path(cfg.report).with_suffix(".png")
    draw(folders, before, after, cfg, plot)
    print(f"written to {cfg.report} and {plot}")


if __name__ == "__main__":
    main()
