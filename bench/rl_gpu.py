"""Rollouts and updates of rl.py on one GPU: seconds, tokens per second, memory and the plan.

    python -m bench.rl_gpu                # CoDA-1.7B's shape, coupled-GRPO
    python -m bench.rl_gpu --smoke=true   # the same with a toy's sizes, anywhere: does it run?

It is rl.py itself, started on a folder of random weights that are read as a block model, and
stopped once enough rollouts are in metrics.jsonl. The answers of random weights all fail their
tests; with equal rewards there would be nothing to learn, and no update. So the run gets a reward
function of the user's kind (`--reward`): a hash of the answer's text, which says nothing about the
answer, but differs between two of them. The sandbox judges all answers nonetheless.

The plan is plan.py's, of a training step whose rows are as long as an update's, and the reference's
weights besides. It takes every token as read, and leaves out the masks of attention, which are
dense here: 2 bytes for each query, key and head of a group, in each block. Rollouts are plain
values in the host's memory. Writes bench/results/rl_<device>.md.

Not covered: several GPUs; what trained weights change: answers that end early, programs that run
for longer than it takes to see that they do not parse, drafts that are right; other estimators.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import platform
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import torch

import plan
import rl
import train
from bench.sampling import random_model
from bench.sampling_gpu import SHAPES
from bench.train_gpu import run
from configurator import Float, Int, Mistake, Name, configure
from diffusion import Recipe
from evaluate import tasks_of
from files import check_out, write_text
from huggingface import load_tokenizer, write_model
from parallel import World
from rollout import end_of, with_prompts


@dataclass
class Config:
    rollouts: Int(1, 1000) = 2  # measured rollouts, after one that loads kernels and tunes
    prompts: Int(1, 4096) = 8  # tasks of a rollout, eight answers each
    max_new_tokens: Int(4, 2**14) = 256  # longest answer, in tokens
    micro_batch: Int(1, 4096) = 8  # answers per forward of an update, in three passes
    recompute: Literal["none", "selective", "full"] = "none"  # activations, to save memory
    beta: Float(0, 1e3) = 0.01  # weight of the KL to the reference; 0: there is no reference
    data: Name = "data/stdlib"  # any prepared folder, for its tokenizer
    tasks: Name = "data/functions/hard.jsonl"  # file of tasks
    unsafe_execution: bool = False  # run programs even where the system cannot contain them
    smoke: bool = False  # a toy's sizes instead
    out: str = ""  # where the table goes; empty: bench/results/rl_<device>.md


K = 4  # tokens per block
UPDATES = 2  # of a rollout
SETTINGS = ("--completions=8 --estimator=coupled --pairs=1 --optimizer=adamw --eval_every=0 "
            f"--limit=64 --max_steps=1000000 --save_every=1000000 --updates={UPDATES}")
TUNED = ("prompts", "max_new_tokens", "micro_batch", "recompute", "beta", "tasks",
         "unsafe_execution")
TOY = "--prompts=2 --completions=4 --limit=4 --max_new_tokens=16 --micro_batch=3"
# as in the 1.7B, the embedding has more rows than the tokenizer has ids
TOY_SHAPE = replace(SHAPES["toy"], vocab_size=5000, d_model=64, n_layer=2, n_head=2, head_dim=32,
                    d_ff=128)
REWARD = '''"""A number from 0 to 1 that differs between answers, and says nothing about them."""
import zlib


def reward(task, completion, verdict):
    return zlib.crc32(completion.encode()) / 2**32
'''


def describe(cfg):
    """The model's config, the tokenizer and the recipe of the policy to begin with."""
    tok = load_tokenizer(cfg.data)
    shape = TOY_SHAPE if cfg.smoke else SHAPES["1.7b"]
    shape = replace(shape, vocab_size=max(shape.vocab_size, tok.vocab_size))
    return shape, tok, Recipe("block", block_size=K, mask_id=tok.mask_id, pad_id=tok.pad_id)


def write_policy(folder, described):
    """A folder with that policy, of random weights, in bfloat16 for the disk's sake."""
    model_cfg, tok, recipe = described
    folder.mkdir()
    write_model(folder, random_model(model_cfg, dtype=torch.bfloat16), tok, recipe, torch.bfloat16)


def command(cfg, scratch):
    """rl.py on the policy in `scratch`, as a list of words."""
    words = [sys.executable, "rl.py", *SETTINGS.split(), f"--init_from={scratch / 'policy'}",
             f"--out={scratch / 'run'}", f"--reward={scratch / 'reward.py'}"]
    words += [f"--{name}={getattr(cfg, name)}" for name in TUNED]
    if cfg.smoke:
        words += TOY.split()
    return words


def row_length(prompts, passes):
    """Tokens of the longest row of an update: the clean text, and its completion in each pass (see
    estimators.after_one_clean_text). prompts: (ids, room) of each task."""
    texts = [(end_of(ids, room, K), len(ids) // K * K) for ids, room in prompts]
    return max(end for end, _ in texts) + passes * max(end - first for end, first in texts)


def planned(asked, described):
    """GB of an update and, of these, of the reference. asked: rl.py's settings. described: the
    model's config, tokenizer and recipe."""
    model_cfg = described[0]
    _, prompts = with_prompts(tasks_of(asked), described, asked, World(0, 1, torch.device("cpu")))
    length, rows = row_length(prompts, 1 + 2 * asked.pairs), asked.prompts * asked.completions
    # to plan.py, these are rows without a second half, of which every token is read
    step = train.Config(objective="bidirectional", shift=False, context=length,
                        batch_tokens=rows * length, micro_batch=asked.micro_batch,
                        optimizer=asked.optimizer, recompute=asked.recompute)
    root, block = plan.weight_shapes(model_cfg)
    reference = 0
    if asked.beta:
        reference = 4 * (plan.numel(root) + model_cfg.n_layer * plan.numel(block))
    return (plan.peak(plan.memory(model_cfg, step, 1)) + reference) / 1e9, reference / 1e9


def measure(cfg, scratch):
    """rl.py's settings, the metrics of its measured rollouts and of their updates, the plan."""
    words = command(cfg, scratch)
    asked, _ = configure(rl.Config, words[2:])
    described = describe(cfg)
    plans = planned(asked, described)  # first: it reads the tasks, and may refuse them
    write_policy(scratch / "policy", described)
    write_text(scratch / "reward.py", REWARD)
    lines = run(words, scratch / "run", (1 + cfg.rollouts) * (1 + UPDATES))[1 + UPDATES:]
    rollouts = [line for line in lines if "rollout_seconds" in line]
    updates = [line for line in lines if "update_seconds" in line]
    return asked, rollouts, updates, plans


def row(title, seconds, rate):
    """A line of the table. rate: tokens per second, or None."""
    shown = "" if rate is None else f"{rate:,.0f}"
    return (f"| {title} | {statistics.median(seconds):,.2f} | {min(seconds):,.2f} to "
            f"{max(seconds):,.2f} | {shown} |")


def table(asked, rollouts, updates, plans):
    """Markdown lines: seconds of the parts, then the answers and the memory."""
    answers = asked.prompts * asked.completions
    rate = statistics.median(m["rollout_tokens_per_s"] for m in rollouts)
    decoding = [m["length"] * answers / m["rollout_tokens_per_s"] for m in rollouts]
    rest = [m["rollout_seconds"] - seconds for m, seconds in zip(rollouts, decoding)]
    learned = statistics.mean(m["learned"] for m in rollouts)
    length = statistics.mean(m["length"] for m in rollouts)
    per_forward = statistics.mean(m["tokens_per_forward"] for m in rollouts)
    peak = max(m["memory_gb"] for m in updates)
    models = "the policy and the reference" if asked.beta else "the policy"
    return [
        "| part | seconds, median | least to most | tokens/s |", "|---|---|---|---|",
        row("rollout: decoding", decoding, rate),
        row(f"rollout: the last verdicts; log-probabilities under {models}", rest, None),
        row("update", [m["update_seconds"] for m in updates],
            statistics.median(m["update_tokens_per_s"] for m in updates)), "",
        f"{answers} answers of {length:.0f} tokens on average, {per_forward:.2f} tokens per "
        f"forward; an update learns from {learned:.0%} of them, {asked.micro_batch} at a time in "
        f"{1 + 2 * asked.pairs} passes each, recompute={asked.recompute}.", "",
        f"Peak memory {peak:.2f} GB; planned {plans[0]:.2f} GB, {plans[1]:.2f} GB of it the "
        "reference."]


def heading(cfg, name, words):
    """Markdown lines: the command, the machine and what was measured."""
    shape = "a toy" if cfg.smoke else "CoDA-1.7B's shape"
    return [f"# Reinforcement learning on {name}, {date.today()}", "",
            f"    python -m bench.rl_gpu {' '.join(words)}".rstrip(), "",
            f"Python {platform.python_version()}, torch {torch.__version__}; {shape}, random "
            f"weights, blocks of {K}, rewards by a hash; {cfg.rollouts} rollouts of {UPDATES} "
            "updates each, after one that is not counted. Memory is what tensors took at most on "
            "a GPU, and all of the process on a CPU, which the plan does not cover.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not cfg.smoke:
        raise Mistake("no CUDA device here; --smoke=true tries the same with a toy's sizes")
    name = torch.cuda.get_device_name() if has_gpu else platform.machine()
    title = re.sub(r"[^a-z0-9]+", "_", name.lower())
    path = Path(cfg.out or f"bench/results/rl_{title}.md")
    check_out(path)
    words = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(cfg, Path(folder))
    text = "\n".join(heading(cfg, name, words) + table(*measured)) + "\n"
    print(text)
    if not cfg.smoke:
        write_text(path, text)


if __name__ == "__main__":
    main()
