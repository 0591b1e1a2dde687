"""Decoding on a GPU: how near a forward comes to the time that reading the weights takes.

    python -m bench.sampling_gpu              # an 8B of random weights in bfloat16, 1 to 64 texts
    python -m bench.sampling_gpu --shape=toy  # a toy's sizes, on a CPU too: does it run?

One token a forward and text needs all weights once. So the floor of a forward is the time to read
them: their bytes over the bandwidth, which is measured in the same run. It is the faster of two:
the copy of a large buffer (its bytes are read, and written) and its maximum (they are only read).
A floor from a copy alone would flatter, since a forward reads only.

How many drafts of `verified` are right is a matter of trained weights (bench/sampling.py). Here a
hook on the logits sets their share, from none to all, and what is measured is the time.

Not covered: trained weights, several GPUs, long texts, whose keys and values are read besides.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from bench.sampling import TOY, random_model, stand_in
from configurator import Int, Mistake, configure, shortened
from decode import Decoding, decode
from diffusion import Recipe
from files import check_out, write_text
from model import ModelConfig


@dataclass
class Config:
    shape: Literal["toy", "1.7b", "8b"] = "8b"  # the model's sizes
    batches: tuple = (1, 2, 4, 8, 16, 32, 64)  # texts decoded together
    prompt: Int(1, 4096) = 64  # tokens of each text before those that are written
    forwards: Int(2, 4096) = 48  # measured forwards of each row, after 12 that record the graphs
    out: str = ""  # where the table goes; empty: bench/results/sampling_<shape>_<device>.md


K = 4  # tokens per block
WARMUP = 12  # forwards: three blocks one token at a time, so every shape has come
SHAPES = {
    "toy": TOY,
    "1.7b": ModelConfig(vocab_size=151936, d_model=2048, n_layer=28, n_head=16, n_kv_head=8,
                        head_dim=128, d_ff=6144, context=40960, qk_norm=True),
    "8b": ModelConfig(vocab_size=155136, d_model=4096, n_layer=32, n_head=32, n_kv_head=8,
                      head_dim=128, d_ff=14336, context=32768, rope_theta=5e5,
                      tie_embeddings=False),
}


def drafts(share):
    """A hook under which this share of all drafted tokens is right, whatever the weights are.

    The right token is a function of the position. A copy says it of its own place always, of those
    behind it with chance `share`, drawn by row, position and copy; see draft.copies.
    """
    def hook(logits, positions, rows):
        part = torch.arange(logits.shape[1], device=logits.device) // K  # 0: the next block
        copies = logits.shape[1] // K - 1
        shown = torch.where(part == 0, 0, K - copies + part - 1)  # (n,) tokens that the copy shows
        draw = (positions * 7919 + shown * 4507 + rows[:, None] * 3571) ** 2 % 1009  # (b, n)
        right = (draw < share * 1009) | (shown == positions % K)
        token = torch.where(right, 10 + positions % 50, 60 + shown)
        return logits.scatter_(2, token[..., None], 1e4)

    return hook


def ways():
    """{title: (Decoding, hook)}, the rows for each batch."""
    how = Decoding(eos_penalty=1e6, confidence="left_to_right")
    verified = replace(how, verified=True)
    found = {
        "one token a forward": (how, None),
        "one token a forward, no graphs": (replace(how, graphs=False), None),
        "one token a forward, temperature 0.8": (replace(how, temperature=0.8), None),
        "verified, no graphs, 50% of drafts right": (replace(verified, graphs=False), drafts(0.5)),
    }
    for share in (0, 0.5, 0.8, 1):
        found[f"verified, {share:.0%} of drafts right"] = verified, drafts(share)
    return found


# --- the floor ------------------------------------------------------------------------------------

def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function, device, repeats=20):
    """Median seconds of a call, finished on the device."""
    seconds = []
    for _ in range(repeats + 3):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])  # the first ones load kernels


def bandwidths(device):
    """Bytes per second of a copy, which are read and written, and of a maximum, which are read."""
    size = 2**31 if device == "cuda" else 2**26  # far larger than the caches
    buffer = torch.randint(2**62, (size // 8,), device=device)
    target = torch.empty_like(buffer)
    return {"copy": 2 * size / seconds_of(lambda: target.copy_(buffer), device),
            "maximum": size / seconds_of(lambda: buffer.amax(), device)}


def streamed_bytes(model):
    """Bytes of the weights that a forward reads: all but a table of which it looks up rows."""
    tensors = dict(model.named_parameters())
    if not model.cfg.tie_embeddings:
        del tensors["embed_tokens.weight"]
    return sum(p.numel() * p.itemsize for p in tensors.values())


# --- the forwards ---------------------------------------------------------------------------------

def measure(model, tok, cfg, b, how, hook):
    """Median seconds of a forward with all that a step does besides, and tokens per forward of a
    text. Each step ends with a read of the host, so a clock suffices."""
    room = K * (WARMUP + cfg.forwards + 2)  # no text ends before the last forward
    draws = np.random.default_rng(0).integers(4, 60, (b, cfg.prompt)).tolist()
    texts = [[*prompt, *[None] * room] for prompt in draws]
    recipe = Recipe("block", block_size=K, mask_id=tok.mask_id)
    clock, taken = [], []
    for step in decode(model, tok, recipe, texts, how, hook=hook):
        clock.append(time.perf_counter())
        taken.append(step.taken.sum())
        if len(clock) > WARMUP + cfg.forwards:
            break
    seconds = np.diff(clock)[WARMUP:]
    tokens = torch.stack(taken[WARMUP + 1:]).sum().item()
    return float(np.median(seconds)), tokens / len(seconds) / b


def table(cfg, model, tok, floor):
    """Markdown lines: a row for each batch and way. floor: seconds."""
    lines = ["| texts | way | ms per forward | share of the floor | tokens per forward of a text | "
             "tokens/s | against one at a time |", "|---|---|---|---|---|---|---|"]
    for b in tqdm(cfg.batches, desc="batches"):
        base = None
        for title, (how, hook) in ways().items():
            seconds, tokens = measure(model, tok, cfg, b, how, hook)
            rate = b * tokens / seconds
            base = base or rate
            lines.append(f"| {b} | {title} | {seconds * 1e3:.3f} | {floor / seconds:.1%} | "
                         f"{tokens:.2f} | {rate:,.1f} | {rate / base:.2f} |")
    return lines


def heading(cfg, name, words, size, rates):
    """Markdown lines: the command, the machine, the floor and what was measured."""
    floor = size / max(rates.values())
    return [f"# Decoding on {name}, {date.today()}", "",
            f"    python -m bench.sampling_gpu {' '.join(words)}".rstrip(), "",
            f"Python {platform.python_version()}, torch {torch.__version__}. Random weights of the "
            f"{cfg.shape} shape in bfloat16, block objective, K = {K}; {cfg.prompt} tokens of "
            f"prompt, then the median of {cfg.forwards} forwards with all that a step does.", "",
            f"A copy moves {rates['copy'] / 1e9:,.0f} GB/s, a maximum reads "
            f"{rates['maximum'] / 1e9:,.0f} GB/s. A forward reads {size / 1e9:.3f} GB of weights: "
            f"the floor is {floor * 1e3:.3f} ms by the faster. Keys and values are not in it, nor "
            "is arithmetic, which takes longer than reading in large batches.", "",
            "The share of right drafts is set by a hook; that of trained weights is another.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not cfg.batches or not all(type(b) is int and 1 <= b <= 4096 for b in cfg.batches):
        raise Mistake(f"batches={shortened(cfg.batches)} must be numbers of texts from 1 to 4096, "
                      "such as (1, 8)")
    if device == "cpu" and cfg.shape != "toy":
        raise Mistake(f"shape={cfg.shape} needs a CUDA device, and there is none here; "
                      "--shape=toy tries the same with a toy's sizes")
    if cfg.prompt + K * (WARMUP + cfg.forwards + 2) > SHAPES[cfg.shape].context:
        raise Mistake(f"forwards={cfg.forwards} write more than the model's context of "
                      f"{SHAPES[cfg.shape].context} holds: ask for fewer")
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    title = re.sub(r"[^a-z0-9]+", "_", f"sampling {cfg.shape} {name}".lower())
    path = Path(cfg.out or f"bench/results/{title}.md")
    check_out(path)
    rates = bandwidths(device)
    model = random_model(SHAPES[cfg.shape], device, torch.bfloat16)
    tok = stand_in(model.cfg.vocab_size)
    size = streamed_bytes(model)
    lines = heading(cfg, name, sys.argv[1:] if argv is None else argv, size, rates)
    lines += table(cfg, model, tok, size / max(rates.values()))
    text = "\n".join(lines) + "\n"
    print(text)
    if device == "cuda" or cfg.out:  # a CPU's figures are no GPU's
        write_text(path, text)


if __name__ == "__main__":
    main()
