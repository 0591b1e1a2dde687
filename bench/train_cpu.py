"""Tokens per second of a training step on the CPU: tiles or a dense mask, and a saving.

    python -m bench.train_cpu        # prints tables and writes bench/results/train_cpu.md

Attention is either tiles of spans or one dense 2T × 2T mask. The saving is the last block's: it
computes only the positions that the loss reads. Four arms, {tiles, dense mask} × {with, without},
train models of the same weights on the same batches in one process, a step each in turn. A step is
noise, forward, backward and AdamW.

Not covered: GPUs (bench/train_gpu.py), several processes (bench/train_ranks.py), data loading.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import platform
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as model_file
from attention_kernel import tiled_attention
from configurator import Int, Mistake, Name, configure
from diffusion import Draw, Recipe, corrupt, weighted_loss
from files import check_out, write_text
from loader import Batch
from model import ModelConfig, Transformer, fast_dtype


@dataclass
class Config:
    steps: Int(2, 100_000) = 16  # measured steps of each arm in a repeat, after 3 to warm up
    repeats: Int(1, 1000) = 3  # how often all is measured, each time from new weights
    tokens: Int(1024, 2**24) = 4096  # clean tokens per step, a multiple of 1024
    vocab_size: Int(8, 2**20) = 4096  # ids, as data/stdlib has
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: if fast
    out: Name = "bench/results/train_cpu.md"  # where the tables go


LENGTHS = (256, 1024)  # T
WARMUP = 3  # steps that are not counted
ARMS = ("tiles, saving", "tiles", "dense mask, saving", "dense mask")
RATIOS = (  # what the tables compare: tokens/s of the first over tokens/s of the second
    ("tiles against dense mask, with the saving", "tiles, saving", "dense mask, saving"),
    ("tiles against dense mask, without it", "tiles", "dense mask"),
    ("the saving, under tiles", "tiles, saving", "tiles"),
    ("the saving, under dense mask", "dense mask, saving", "dense mask"),
    ("both against neither", "tiles, saving", "dense mask"),
)


def dense_attention(q, k, v, spans):
    """What most published code does: one SDPA call under the whole mask, built once per batch."""
    if not hasattr(spans, "mask"):
        object.__setattr__(spans, "mask", spans.dense_mask()[:, None])  # (B, 1, S, S)
    mask = spans.mask[:, :, :q.shape[2]]  # with the saving, the last block asks for fewer queries
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class WithoutSaving:
    """A model that computes all hidden states, and gives those that are read afterwards."""

    def __init__(self, model):
        self.model = model
        self.token_loss = model.token_loss

    def __call__(self, tokens, spans, queries, read):
        hidden = self.model(tokens, spans)[:, :queries]  # (B, queries, d_model)
        return hidden.flatten(0, 1).index_select(0, read)  # (N, d_model)


def toy_model(T, vocab_size):
    """The model of config/toy.py, with the same weights each time."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(vocab_size=vocab_size, d_model=192, n_layer=4, n_head=3,
                                   n_kv_head=1, head_dim=64, d_ff=512, context=T))


def toy_batch(T, cfg, generator):
    """Rows of two documents, cut at random."""
    B = cfg.tokens // T
    cut = torch.randint(1, T, (B, 1), generator=generator)
    i = torch.arange(T)
    doc_start = torch.where(i < cut, 0, cut).int()  # (B, T)
    doc_end = torch.where(i < cut, cut, T).int()  # (B, T)
    x0 = torch.randint(4, cfg.vocab_size, (B, T), generator=generator)
    return Batch(x0=x0, doc_start=doc_start, doc_end=doc_end, maskable=i != doc_start,
                 epochs=np.zeros(B, np.int64))


def train_step(arm, model, optimizer, batch, step, bf16):
    """One step of one arm. Returns its seconds."""
    model_file.attention = tiled_attention if arm.startswith("tiles") else dense_attention
    called = model if arm.endswith("saving") else WithoutSaving(model)
    recipe = Recipe("block", mask_id=2)
    rows = len(batch.x0)
    began = time.perf_counter()
    noised = corrupt(batch, recipe, Draw(seed=0, step=step, rows=range(rows), batch_rows=rows))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = weighted_loss(called, noised, recipe) / noised.maskable.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


def measure(T, cfg, bf16, seed):
    """{arm: [tokens/s of each measured step]}, the arms taking turns."""
    models = {arm: toy_model(T, cfg.vocab_size) for arm in ARMS}
    optimizers = {arm: torch.optim.AdamW(models[arm].parameters(), fused=True) for arm in ARMS}
    generator = torch.Generator().manual_seed(seed)
    rates = {arm: [] for arm in ARMS}
    original = model_file.attention
    try:
        for step in tqdm(range(WARMUP + cfg.steps), desc=f"T = {T}", leave=False):
            batch = toy_batch(T, cfg, generator)
            turn = step % len(ARMS)  # each arm is the first as often as the others
            for arm in ARMS[turn:] + ARMS[:turn]:
                seconds = train_step(arm, models[arm], optimizers[arm], batch, step, bf16)
                if step >= WARMUP:
                    rates[arm].append(cfg.tokens / seconds)
    finally:
        model_file.attention = original
    return rates


def rate_table(results):
    """Markdown lines: tokens/s of each arm. results: {T: [rates of a repeat]}."""
    lines = ["| T | arm | median tokens/s | quartiles |", "|---|---|---|---|"]
    for T, repeats in results.items():
        for arm in ARMS:
            rates = [rate for repeat in repeats for rate in repeat[arm]]
            low, middle, high = np.percentile(rates, [25, 50, 75])
            lines.append(f"| {T} | {arm} | {middle:,.0f} | {low:,.0f} to {high:,.0f} |")
    return lines


def ratio_table(results):
    """Markdown lines: ratios of medians, over all repeats and their range from repeat to repeat."""
    lines = ["| T | ratio | median of the repeats | range over the repeats |", "|---|---|---|---|"]
    for T, repeats in results.items():
        for title, arm, base in RATIOS:
            ratios = [statistics.median(repeat[arm]) / statistics.median(repeat[base])
                      for repeat in repeats]
            lines.append(f"| {T} | {title} | {statistics.median(ratios):.2f} | "
                         f"{min(ratios):.2f} to {max(ratios):.2f} |")
    return lines


def heading(cfg, bf16, words):
    """Markdown lines: the command, the machine and what was measured."""
    dtype = "bfloat16" if bf16 else "float32"
    return [f"# A training step on the CPU, {date.today()}", "",
            f"    python -m bench.train_cpu {' '.join(words)}".rstrip(), "",
            f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}, "
            f"torch {torch.__version__}; {dtype}. The toy model (4 layers, d_model 192, 3 heads, "
            f"1 KV head of 64, vocabulary {cfg.vocab_size}), block objective, K = 4, "
            f"{cfg.tokens} clean tokens per step, {cfg.repeats} repeats of {cfg.steps} steps of "
            "each arm, alternating. Saving: the last block computes only what the loss reads.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    if cfg.tokens % max(LENGTHS):
        raise Mistake(f"tokens={cfg.tokens} must be a multiple of {max(LENGTHS)}, such as "
                      f"{-(-cfg.tokens // max(LENGTHS)) * max(LENGTHS)}")
    check_out(cfg.out)
    bf16 = (fast_dtype("cpu") if cfg.dtype == "auto" else cfg.dtype) == "bfloat16"
    results = {T: [] for T in LENGTHS}
    for repeat in range(cfg.repeats):
        for T in LENGTHS:
            results[T].append(measure(T, cfg, bf16, seed=repeat))
    words = sys.argv[1:] if argv is None else argv
    lines = heading(cfg, bf16, words) + rate_table(results) + [""] + ratio_table(results)
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(cfg.out, text)


if __name__ == "__main__":
    main()
