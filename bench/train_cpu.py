"""Tokens a second of a whole training step on the CPU: tiles of spans beside one dense 2T × 2T mask.

    python -m bench.train_cpu        # prints a table and writes bench/results/train_cpu.md

Both variants train the toy model on the same batches, a step each in turn, in one process; only `attention` differs.
A step is noise, forward, backward and AdamW. Not covered: GPUs, data loading.
"""
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as model_file
from attention_kernel import tiled_attention
from configurator import configure
from diffusion import Recipe, corrupt, weighted_loss


@dataclass
class Config:
    steps: int = 24  # measured steps of each variant, after 3 to warm up
    tokens: int = 4096  # clean tokens a step
    vocab_size: int = 4096  # ids, as data/stdlib has
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 where it is fast
    out: str = "bench/results/train_cpu.md"  # where the table goes


def dense_attention(q, k, v, spans):
    """What most published code does: one SDPA call under the whole mask, built once a batch."""
    if not hasattr(spans, "mask"):
        object.__setattr__(spans, "mask", spans.dense_mask()[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=spans.mask, enable_gqa=True)


def toy_batch(T, cfg):
    """Rows of two documents cut at random: (x0, doc_start, doc_end, maskable)."""
    B = cfg.tokens // T
    cut = torch.randint(1, T, (B, 1))
    i = torch.arange(T)
    doc_start = torch.where(i < cut, 0, cut).int()
    doc_end = torch.where(i < cut, cut, T).int()
    return torch.randint(4, cfg.vocab_size, (B, T)), doc_start, doc_end, i != doc_start


def measure(T, cfg, bf16):
    """{variant: [tokens/s of each measured step]}, the variants taking turns."""
    variants = {"tiles": tiled_attention, "dense mask": dense_attention}
    torch.manual_seed(0)
    net = model_file.Transformer(model_file.ModelConfig(cfg.vocab_size, 192, 4, 3, 1, 64, 512, T))
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    recipe = Recipe("block", mask_id=2)
    found = {name: [] for name in variants}
    for step in tqdm(range(cfg.steps + 3), desc=f"T = {T}", leave=False):
        batch = toy_batch(T, cfg)
        for name, function in variants.items():
            model_file.attention = function
            began = time.perf_counter()
            noised = corrupt(*batch, recipe, 0, step, range(len(batch[0])), len(batch[0]))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = weighted_loss(net, noised, recipe) / noised.maskable.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 3:
                found[name].append(cfg.tokens / (time.perf_counter() - began))
    return found


def main():
    cfg, _ = configure(Config)
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    bf16 = bf16 if cfg.dtype == "auto" else cfg.dtype == "bfloat16"
    lines = [f"# A training step on the CPU, {date.today()}", "", f"    python -m bench.train_cpu {' '.join(sys.argv[1:])}".rstrip(), "",
             f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}; "
             f"Python {platform.python_version()}, torch {torch.__version__}; {'bfloat16' if bf16 else 'float32'}. "
             f"The toy model (4 layers, d_model 192, 3 heads, 1 KV head of 64, vocabulary {cfg.vocab_size}), "
             f"block objective, K = 4, {cfg.tokens} clean tokens a step, {cfg.steps} steps each, alternating.", "",
             "| T | attention | median tokens/s | quartiles | ratio of medians |", "|---|---|---|---|---|"]
    for T in (256, 1024):
        found = measure(T, cfg, bf16)
        base = statistics.median(found["dense mask"])
        for name, rates in found.items():
            low, middle, high = np.percentile(rates, [25, 50, 75])
            lines.append(f"| {T} | {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {middle / base:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    Path(cfg.out).write_text(text)


if __name__ == "__main__":
    main()
