"""AR, block diffusion and bidirectional diffusion side by side: one model, data and training time.

    python -m experiments.objectives                 # from out/toy_ar, ten minutes each
    python -m experiments.objectives --seconds=60

Each objective starts from the weights of the same autoregressive model, and is fine-tuned on the
functions for the same number of seconds: its number of steps comes from the speed of a first, short
run. Then evaluate.py writes held-out functions and runs them. Writes FOLDER/objectives.md.

Not covered: the best settings of each. Batch, learning rate and their decay are the same for all.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

import torch

from configurator import Float, Int, Mistake, Name, configure
from files import read_json, write_text


@dataclass
class Config:
    init_from: Name = "out/toy_ar"  # run of the autoregressive model that all start from
    config: Name = "config/toy_sft.py"  # train.py's settings that all share
    out: Name = "out/objectives"  # folder of the runs and the table
    seconds: Float(1, 1e6) = 600.0  # training time of each
    speed_steps: Int(5, 1000) = 30  # steps of the run that measures the speed
    limit: Int(0, 10**6) = 0  # only that many tasks of each file; 0: all


# Fine-tuning with each objective, and how its model writes. A bidirectional model is told how long
# the text may be: 64 masks, which its canvas had room for too.
OBJECTIVES = {
    "ar": (["--objective=ar", "--shift=none"], []),
    "block": (["--objective=block", "--shift=false"], []),
    "bidirectional": (["--objective=bidirectional", "--shift=true", "--canvas=64"],
                      ["--max_new_tokens=64"]),
}
TASKS = {"held-out": "data/functions/test.jsonl", "hard": "data/functions/hard_test.jsonl"}


def run(*words):
    """A command of this repository. Raises Mistake where it fails; it has said why."""
    print("$ python", *words, flush=True)
    if subprocess.run([sys.executable, *map(str, words)]).returncode:
        raise Mistake(f"`python {' '.join(map(str, words))}` failed")


def steps_of(folder):
    """The metrics of a run's training steps and of its last evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return steps, [line for line in lines if "val_nelbo" in line][-1]


def fine_tune(cfg, objective):
    """Train for cfg.seconds. Returns the folder of the run, and its line's first cells."""
    settings, _ = OBJECTIVES[objective]
    train = ["train.py", cfg.config, f"--init_from={cfg.init_from}", *settings]
    speed, folder = (Path(cfg.out) / f"{objective}{suffix}" for suffix in ("_speed", ""))
    if not (speed / "latest").is_file():
        run(*train, f"--out={speed}", f"--max_steps={cfg.speed_steps}", "--eval_every=0")
    seconds = [json.loads(line)["seconds"]
               for line in (speed / "metrics.jsonl").read_text().splitlines()]
    steps = max(1, round(cfg.seconds / median(seconds[3:])))
    run(*train, f"--out={folder}", f"--max_steps={steps}", "--eval_every=100000", "--resume=true")
    steps, scores = steps_of(folder)
    trained = sum(step["seconds"] for step in steps)
    return folder, [f"{len(steps):,}", f"{steps[-1]['tokens'] / 1e6:.2f} M", f"{trained:.0f}",
                    f"{scores['val_nelbo']:.3f}"]


def score(cfg, objective, folder):
    """pass@1 of both files of tasks and the speed on the last, as the line's last cells."""
    _, settings = OBJECTIVES[objective]
    cells = []
    for name, tasks in TASKS.items():
        out = folder / name
        run("evaluate.py", "passk", f"--init_from={folder}", f"--tasks={tasks}", f"--out={out}",
            f"--limit={cfg.limit}", *settings)
        report = read_json(out / "report.json")
        cells.append(f"{report['scores']['pass@1']:.1%}")
    return [*cells, f"{report['speed']['tokens/s per process']:,.0f}",
            f"{report['scores']['tokens per forward']:.2f}"]


HEAD = ["objective", "steps", "tokens", "seconds", "NELBO, nats per token", *TASKS,
        "decoding, tokens/s", "tokens per forward"]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    lines = []
    for objective in OBJECTIVES:
        folder, cells = fine_tune(cfg, objective)
        lines.append([objective, *cells, *score(cfg, objective, folder)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [HEAD, ["---"] * len(HEAD), *lines])
    words = sys.argv[1:] if argv is None else argv
    text = (f"# AR, block and bidirectional diffusion, the same training time\n\n{table}\n\n"
            f"`{shlex.join(['python', '-m', 'experiments.objectives', *words])}`, {date.today()}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}.\n"
            "The held-out and hard functions: pass@1, greedy. AR's figure is its negative "
            "log-likelihood; diffusion's are upper bounds of it, and the bidirectional one is told "
            "the length of the text and also scores the `<eos>` that fill its canvas, so these do "
            "not compare.\n")
    path = Path(cfg.out) / "objectives.md"
    write_text(path, text)
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
