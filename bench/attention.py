"""Block-diffusion attention side by side: this project's kernel, flex-attention, a dense mask, and causal attention.

    python -m bench.attention        # on a CUDA GPU: writes bench/results/attention_<device>.md and .png

All in one process on the same inputs, [xt ; x0] of 2T tokens, 32 query and 8 key/value heads of 128, bfloat16, forward
and forward + backward. Rates count the query-key pairs that the mask allows (4 · head_dim FLOPs a pair forward, 2.5
times that backward), so skipped work earns nothing. The ceilings are measured in the same run: a large matrix product, and
causal SDPA (cuDNN, flash) over about as many pairs, without any mask but the diagonal's.

Two kinds of documents: one document a row; and rows packed with documents of log-normal lengths (median 600 tokens),
another packing every step, where flex-attention has to build its block mask again, which is timed with it.

Not covered: KV caches, decoding, several GPUs. On a CPU it runs to show that it runs; those times mean nothing.
"""
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from attention_kernel import Spans, attention
from configurator import configure

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CUDA = torch.cuda.is_available()


@dataclass
class Config:
    sizes: tuple = (1024, 2048, 4096, 8192, 16384, 32768)  # T: clean tokens a row
    blocks: tuple = (4, 32)  # K
    heads: int = 32  # query heads
    kv_heads: int = 8  # key/value heads
    head_dim: int = 128  # channels a head
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the inputs
    repeats: int = 20  # timed calls; the median counts
    dense_up_to: int = 8192  # largest T for the dense mask, which needs 4T² bytes a row
    packings: int = 8  # different packings that the changing case walks through
    out: str = ""  # where the table goes; empty: bench/results/attention_<device>.md


def document_bounds(T, packed, seed):
    """doc_start and doc_end, (1, T) int32: one document, or documents of log-normal lengths."""
    draw, cuts = np.random.default_rng(seed), [0]
    while packed and cuts[-1] < T:
        cuts.append(cuts[-1] + max(2, int(draw.lognormal(np.log(600), 1.0))))
    cuts = np.minimum(cuts if packed else [0, T], T)
    lengths = np.diff(cuts)
    return (torch.from_numpy(np.repeat(edge, lengths).astype(np.int32))[None].to(device()) for edge in (cuts[:-1], cuts[1:]))


def device():
    return "cuda" if CUDA else "cpu"


def allowed_pairs(spans):
    """How many query-key pairs a head has."""
    s = {n: getattr(spans, n).long() for n in ("doc_start", "block_start", "block_end")}
    clean, noisy = s["block_end"] - s["doc_start"], s["block_start"] - s["doc_start"] + s["block_end"] - s["block_start"]
    return int((clean + noisy).sum())


def flex_mask(spans):
    """The same mask for flex-attention: a block mask of the 2T × 2T square."""
    T = spans.doc_start.shape[1]

    def sees(b, h, q, k):
        i, j = q % T, k % T
        start, end = spans.block_start[b, i], spans.block_end[b, i]
        on_clean = (j >= spans.doc_start[b, i]) & (j < torch.where(q >= T, end, start))
        on_noisy = (q < T) & (j >= start) & (j < end)
        return torch.where(k >= T, on_clean, on_noisy)

    return create_block_mask(sees, 1, None, 2 * T, 2 * T, device=device(), **({"_compile": True} if CUDA else {}))


def milliseconds(call, repeats):
    """Median time of a call, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def measure(name, function, qkv, g, pairs, cfg):
    """One row of the table: forward and forward + backward of function(q, k, v), and the peak memory of both."""
    leaves = [x.detach().requires_grad_() for x in qkv]

    def both():
        torch.autograd.grad(function(*leaves), leaves, g)

    with torch.no_grad():
        forward = milliseconds(lambda: function(*qkv), cfg.repeats)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    total = milliseconds(both, cfg.repeats)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20 if CUDA else float("nan")
    flops = 4 * cfg.head_dim * cfg.heads * pairs
    return {"name": name, "forward": forward, "total": total, "memory": memory,
            "forward_rate": flops / forward / 1e9, "total_rate": 3.5 * flops / total / 1e9}


def tried(rows, name, *arguments):
    """`measure`, its row added to `rows`; a rival that does not take these inputs here, or runs out of memory, is named."""
    try:
        rows.append(measure(name, *arguments))
    except RuntimeError as error:  # torch's out-of-memory and not-implemented errors are RuntimeErrors
        print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)


def inputs(S, cfg):
    """q, k, v and an output gradient, (1, heads, S, head_dim), fresh."""
    heads = (cfg.heads, cfg.kv_heads, cfg.kv_heads, cfg.heads)
    q, k, v, g = (torch.randn(1, S, n, cfg.head_dim, device=device()).to(getattr(torch, cfg.dtype)).transpose(1, 2) for n in heads)
    return (q, k, v), g


def causal_ceilings(rows, pairs, cfg):
    """Causal SDPA by each backend that runs here, over about as many pairs, added to `rows`."""
    L = max(128, round((2 * pairs) ** 0.5 / 128) * 128)
    qkv, g = inputs(L, cfg)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def causal(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        tried(rows, f"causal SDPA, {backend.name.split('_')[0].lower()}, L = {L}", causal, qkv, g, L * (L + 1) // 2, cfg)


def fixed_rows(T, K, packed, flex, cfg):
    """Every variant on one packing, the mask prebuilt."""
    spans = Spans.of(*document_bounds(T, packed, seed=0), K, noisy=True)
    pairs, (qkv, g) = allowed_pairs(spans), inputs(2 * T, cfg)
    rows = [measure("this kernel", lambda q, k, v: attention(q, k, v, spans), qkv, g, pairs, cfg)]
    mask = flex_mask(spans)
    tried(rows, "flex-attention, mask prebuilt", lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True),
          qkv, g, pairs, cfg)
    if rows[-1]["name"].startswith("flex"):
        rows[-1]["mask"] = milliseconds(lambda: flex_mask(spans), cfg.repeats)
    if T <= cfg.dense_up_to:
        dense = spans.dense_mask()[:, None]
        tried(rows, "SDPA, dense mask", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True),
              qkv, g, pairs, cfg)
    causal_ceilings(rows, pairs, cfg)
    return rows


def changing_rows(T, K, flex, cfg):
    """A new packing at every call; what it takes to follow it is part of the time."""
    bounds = [tuple(document_bounds(T, True, seed)) for seed in range(cfg.packings)]
    pairs = statistics.mean(allowed_pairs(Spans.of(*b, K, noisy=True)) for b in bounds)
    (qkv, g), turn = inputs(2 * T, cfg), {"n": 0}

    def next_spans():
        turn["n"] += 1
        return Spans.of(*bounds[turn["n"] % cfg.packings], K, noisy=True)

    rows = [measure("this kernel", lambda q, k, v: attention(q, k, v, next_spans()), qkv, g, pairs, cfg)]
    tried(rows, "flex-attention and its mask", lambda q, k, v: flex(q, k, v, block_mask=flex_mask(next_spans()), enable_gqa=True),
          qkv, g, pairs, cfg)
    return rows


def matmul_peak(cfg):
    """TFLOP/s of one large product of random matrices in the inputs' dtype."""
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=device()).to(getattr(torch, cfg.dtype)) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, cfg.repeats) / 1e9


def draw(results, peak, path):
    """Forward + backward rate over T, one panel a case."""
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.6), sharey=True, squeeze=False)
    for axis, (case, by_size) in zip(axes[0], results.items()):
        names = dict.fromkeys(r["name"].split(", L")[0] for rows in by_size.values() for r in rows)
        for name in names:
            points = [(T, r["total_rate"]) for T, rows in by_size.items() for r in rows if r["name"].split(", L")[0] == name]
            axis.plot(*zip(*points), "o-", label=name, ms=3)
        axis.axhline(peak, color="grey", lw=0.8, ls="--")
        axis.set(title=case, xlabel="T", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("TFLOP/s, forward + backward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    cfg, _ = configure(Config)
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    out = Path(cfg.out or f"bench/results/attention_{name.lower().replace(' ', '_')}.md")
    torch._dynamo.config.recompile_limit = 256  # every T is compiled for itself; the default of 8 would end in eager mode
    flex = torch.compile(flex_attention, dynamic=False) if CUDA else flex_attention
    peak, results = matmul_peak(cfg), {}
    work = [(case, K, T) for case in ("one document", "packed", "packed anew each step") for K in cfg.blocks for T in cfg.sizes]
    for case, K, T in tqdm(work):
        rows = changing_rows(T, K, flex, cfg) if case == "packed anew each step" else fixed_rows(T, K, case == "packed", flex, cfg)
        results.setdefault(f"{case}, K = {K}", {})[T] = rows

    triton_version = sys.modules["triton"].__version__ if "triton" in sys.modules else "none"
    lines = [f"# Attention on {name}, {date.today()}", "", f"    python -m bench.attention {' '.join(sys.argv[1:])}".rstrip(), "",
             f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}. {cfg.heads}/{cfg.kv_heads} heads "
             f"of {cfg.head_dim}, {cfg.dtype}, median of {cfg.repeats}. Matrix product in the same run: {peak:.0f} TFLOP/s.", ""]
    for case, by_size in results.items():
        lines += [f"## {case}", "", "| T | what | forward ms | TFLOP/s | of peak | fwd + bwd ms | TFLOP/s | of peak | time / ours | MiB | mask ms |",
                  "|---|---|---|---|---|---|---|---|---|---|---|"]
        for T, rows in by_size.items():
            for r in rows:
                mask = f"{r['mask']:.2f}" if "mask" in r else ""
                lines.append(f"| {T} | {r['name']} | {r['forward']:.3f} | {r['forward_rate']:.0f} | {r['forward_rate'] / peak:.2f} | "
                             f"{r['total']:.3f} | {r['total_rate']:.0f} | {r['total_rate'] / peak:.2f} | "
                             f"{r['total'] / rows[0]['total']:.2f} | {r['memory']:.0f} | {mask} |")
        lines.append("")
    print("\n".join(lines))
    out.write_text("\n".join(lines))
    draw(results, peak, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
