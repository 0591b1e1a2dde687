"""Block-diffusion attention side by side: this kernel, flex-attention, a dense mask, and causal.

    python -m bench.attention    # on a GPU: writes bench/results/attention_<device>.md and .png

All in one process on the same inputs: [xt ; x0] of 2T tokens, 32 query and 8 key/value heads of
128, bfloat16, forward and forward + backward. Rates count the query-key pairs that the mask allows
(4 · head_dim FLOPs per pair forward, 2.5 times that backward), so skipped work earns nothing. The
ceilings are measured in the same run: a large matrix product, and causal SDPA (cuDNN, flash) over
about as many pairs, without any mask but the diagonal's.

Two kinds of documents: one document per row; and rows packed with documents of log-normal lengths
(median 600 tokens). The latter also with another packing at every step, where flex-attention has to
build its block mask again, which is timed with it.

Not covered: KV caches, decoding, several GPUs.
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
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from attention_kernel import attention
from configurator import Int, Mistake, configure
from files import check_out, write_text
from spans import Spans

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# attention_kernel.py switches cuDNN off, which is the fast one for a dense mask with GQA
ANY_BACKEND = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
               SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = ("one document", "packed", "packed anew each step")


@dataclass
class Config:
    sizes: tuple = (1024, 2048, 4096, 8192, 16384, 32768)  # T: clean tokens per row
    blocks: tuple = (4, 32)  # K
    heads: Int(1, 1024) = 32  # query heads
    kv_heads: Int(1, 1024) = 8  # key/value heads
    head_dim: Int(1, 256) = 128  # channels per head
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the inputs
    repeats: Int(1, 10_000) = 20  # timed calls; the median counts
    dense_up_to: Int(0, 2**20) = 8192  # largest T for the dense mask, of 4T² bytes per row
    packings: Int(1, 1000) = 8  # different packings that the changing case walks through
    smoke: bool = False  # tiny sizes, also without a GPU: shows that it runs, not how fast
    out: str = ""  # where the table goes; empty: bench/results/, or nowhere under smoke


def settings(argv):
    """The Config, checked before anything is measured. Raises Mistake."""
    cfg, given = configure(Config, argv)
    if cfg.smoke:
        tiny = {"sizes": (64,), "blocks": (4,), "heads": 2, "kv_heads": 1, "head_dim": 16,
                "dtype": "float32", "repeats": 2, "packings": 2}
        for name, value in tiny.items():
            if name not in given:
                setattr(cfg, name, value)
    elif not CUDA:
        raise Mistake("bench.attention needs a CUDA GPU, and PyTorch sees none here; "
                      "--smoke=true runs a tiny case on the CPU")
    for name, high in (("sizes", 2**20), ("blocks", 2**20)):
        for number in getattr(cfg, name):
            if type(number) is not int or not 1 <= number <= high:
                raise Mistake(f"{name} holds {number!r}; it is a list of ints from 1 to {high:,}")
        if not getattr(cfg, name):
            raise Mistake(f"{name} is empty; it is a list of ints, such as (4,)")
    if cfg.heads % cfg.kv_heads:
        raise Mistake(f"kv_heads={cfg.kv_heads} must divide heads={cfg.heads}")
    if not cfg.out and not cfg.smoke:
        device_name = torch.cuda.get_device_name().lower().replace(" ", "_")
        cfg.out = f"bench/results/attention_{device_name}.md"
    if cfg.out:
        check_out(cfg.out)
    return cfg


# --- the inputs -----------------------------------------------------------------------------------

def document_bounds(T, packed, seed):
    """doc_start and doc_end, (1, T) int32: one document, or documents of log-normal lengths."""
    draw = np.random.default_rng(seed)
    edges = [0]
    if packed:
        while edges[-1] < T:
            edges.append(edges[-1] + max(2, int(draw.lognormal(np.log(600), 1.0))))
        edges = np.minimum(edges, T)
    else:
        edges = np.array([0, T])
    lengths = np.diff(edges)
    doc_start = np.repeat(edges[:-1], lengths).astype(np.int32)
    doc_end = np.repeat(edges[1:], lengths).astype(np.int32)
    return torch.from_numpy(doc_start)[None].to(DEVICE), torch.from_numpy(doc_end)[None].to(DEVICE)


def inputs(S, cfg):
    """q, k, v and an output gradient, (1, heads, S, head_dim)."""
    dtype = getattr(torch, cfg.dtype)
    tensors = []
    for heads in (cfg.heads, cfg.kv_heads, cfg.kv_heads, cfg.heads):
        x = torch.randn(1, S, heads, cfg.head_dim, device=DEVICE).to(dtype)
        tensors.append(x.transpose(1, 2))
    q, k, v, g = tensors
    return (q, k, v), g


def flex_mask(spans):
    """The same mask for flex-attention: a block mask of the 2T × 2T square."""
    T = spans.doc_start.shape[1]

    def sees(b, h, q, k):
        i, j = q % T, k % T
        start, end = spans.block_start[b, i], spans.block_end[b, i]
        on_clean = (j >= spans.doc_start[b, i]) & (j < torch.where(q >= T, end, start))
        on_noisy = (q < T) & (j >= start) & (j < end)
        return torch.where(k >= T, on_clean, on_noisy)

    return create_block_mask(sees, 1, None, 2 * T, 2 * T, device=DEVICE, _compile=CUDA)


# --- the clock ------------------------------------------------------------------------------------

def milliseconds(call, repeats):
    """Median time of a call, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(name, function, qkv, g, pairs, cfg):
    """One row of the table: times, rates and peak memory of function(q, k, v).

    forward: of the forward pass, total: of forward and backward, in ms. Rates in TFLOP/s. MiB.
    """
    leaves = [x.detach().requires_grad_() for x in qkv]

    def both():
        torch.autograd.grad(function(*leaves), leaves, g)

    both()  # a kernel may tune itself at first, which takes memory
    with torch.no_grad():
        forward = milliseconds(lambda: function(*qkv), cfg.repeats)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    total = milliseconds(both, cfg.repeats)
    memory = float("nan")
    if CUDA:
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    flops = 4 * cfg.head_dim * cfg.heads * pairs
    return {"name": name, "forward": forward, "total": total, "memory": memory,
            "forward_rate": flops / forward / 1e9, "total_rate": 3.5 * flops / total / 1e9}


def try_measure(name, *arguments):
    """[the row of `measure`], or [] where these inputs do not work or memory is lacking."""
    try:
        return [measure(name, *arguments)]
    except RuntimeError as error:  # so are torch's out-of-memory and not-implemented errors
        print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return []


def matmul_peak(cfg):
    """TFLOP/s of one large product of random matrices in the inputs' dtype."""
    n = 8192 if CUDA else 256
    a, b = torch.randn(2, n, n, device=DEVICE).to(getattr(torch, cfg.dtype))
    return 2 * n**3 / milliseconds(lambda: a @ b, cfg.repeats) / 1e9


# --- the cases ------------------------------------------------------------------------------------

def causal_rows(pairs, cfg):
    """Causal SDPA by each backend that runs here, over about as many pairs."""
    L = max(128, round((2 * pairs) ** 0.5 / 128) * 128)
    qkv, g = inputs(L, cfg)
    rows = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def causal(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        kind = backend.name.split("_")[0].lower()
        causal_pairs = L * (L + 1) // 2
        rows += try_measure(f"causal SDPA, {kind}, L = {L}", causal, qkv, g, causal_pairs, cfg)
    return rows


def fixed_rows(T, K, packed, flex, cfg):
    """Every variant on one packing, the mask prebuilt."""
    spans = Spans.of(*document_bounds(T, packed, seed=0), K, noisy=True)
    qkv, g = inputs(2 * T, cfg)

    def ours(q, k, v):
        return attention(q, k, v, spans)

    rows = try_measure("this kernel", ours, qkv, g, spans.pairs, cfg)
    half_pairs = spans.pairs // 2  # a noisy query sees as many keys as its clean twin
    q, k, v = qkv
    xt_alone, g_of_xt = (q[:, :, :T], k, v), g[:, :, :T]
    rows += try_measure("this kernel, queries of xt", ours, xt_alone, g_of_xt, half_pairs, cfg)
    mask = flex_mask(spans)

    def flexible(q, k, v):
        return flex(q, k, v, block_mask=mask, enable_gqa=True)

    for row in try_measure("flex-attention, mask prebuilt", flexible, qkv, g, spans.pairs, cfg):
        row["mask"] = milliseconds(lambda: flex_mask(spans), cfg.repeats)
        rows.append(row)
    if T <= cfg.dense_up_to:
        dense_mask = spans.dense_mask()[:, None]

        def dense(q, k, v):
            with sdpa_kernel(ANY_BACKEND):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask,
                                                      enable_gqa=True)

        rows += try_measure("SDPA, dense mask", dense, qkv, g, spans.pairs, cfg)
    return rows + causal_rows(spans.pairs, cfg)


def changing_rows(T, K, flex, cfg):
    """A new packing at every call; what it takes to follow it is part of the time."""
    bounds = [document_bounds(T, True, seed) for seed in range(cfg.packings)]
    pairs = statistics.mean(Spans.of(*b, K, noisy=True).pairs for b in bounds)
    qkv, g = inputs(2 * T, cfg)
    calls = 0

    def next_spans():
        nonlocal calls
        calls += 1
        return Spans.of(*bounds[calls % cfg.packings], K, noisy=True)

    def ours(q, k, v):
        return attention(q, k, v, next_spans())

    def flexible(q, k, v):
        return flex(q, k, v, block_mask=flex_mask(next_spans()), enable_gqa=True)

    rows = try_measure("this kernel", ours, qkv, g, pairs, cfg)
    return rows + try_measure("flex-attention and its mask", flexible, qkv, g, pairs, cfg)


def measure_all(cfg):
    """{case: {T: rows}}."""
    torch._dynamo.config.recompile_limit = 256  # one per T; after 8 it would be eager
    flex = torch.compile(flex_attention, dynamic=False) if CUDA else flex_attention
    results = {}
    work = [(case, K, T) for case in CASES for K in cfg.blocks for T in cfg.sizes]
    for case, K, T in tqdm(work):
        if case == "packed anew each step":
            rows = changing_rows(T, K, flex, cfg)
        else:
            rows = fixed_rows(T, K, case == "packed", flex, cfg)
        results.setdefault(f"{case}, K = {K}", {})[T] = rows
    return results


# --- the report -----------------------------------------------------------------------------------

def table(by_size, peak):
    """The lines of one case's table. by_size: {T: rows}."""
    header = ("T", "what", "forward ms", "TFLOP/s", "of peak", "fwd + bwd ms", "TFLOP/s", "of peak",
              "time / ours", "MiB", "mask ms")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for T, rows in by_size.items():
        for row in rows:
            cells = [
                str(T),
                row["name"],
                f"{row['forward']:.3f}",
                f"{row['forward_rate']:.0f}",
                f"{row['forward_rate'] / peak:.2f}",
                f"{row['total']:.3f}",
                f"{row['total_rate']:.0f}",
                f"{row['total_rate'] / peak:.2f}",
                f"{row['total'] / rows[0]['total']:.2f}",
                f"{row['memory']:.0f}",
                f"{row['mask']:.2f}" if "mask" in row else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(results, peak, cfg, words):
    """The page, as text."""
    device_name = torch.cuda.get_device_name() if CUDA else "cpu"
    triton = sys.modules.get("triton")
    triton_version = triton.__version__ if triton else "none"
    command = " ".join(["python -m bench.attention", *words])
    lines = [
        f"# Attention on {device_name}, {date.today()}",
        "",
        f"    {command}",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton_version}. "
        f"{cfg.heads}/{cfg.kv_heads} heads of {cfg.head_dim}, {cfg.dtype}, median of {cfg.repeats}."
        f" Matrix product in the same run: {peak:.0f} TFLOP/s.",
        "",
    ]
    for case, by_size in results.items():
        lines += [f"## {case}", "", *table(by_size, peak), ""]
    return "\n".join(lines)


def draw(results, peak, path):
    """Forward + backward rate over T, one panel per case."""
    width = 4 * len(results)
    figure, axes = plt.subplots(1, len(results), figsize=(width, 3.6), sharey=True, squeeze=False)
    for axis, (case, by_size) in zip(axes[0], results.items()):
        curves = {}  # name: its points (T, rate)
        for T, rows in by_size.items():
            for row in rows:
                name = row["name"].split(", L = ")[0]
                curves.setdefault(name, []).append((T, row["total_rate"]))
        for name, points in curves.items():
            axis.plot(*zip(*points), "o-", label=name, ms=3)
        axis.axhline(peak, color="gray", lw=0.8, ls="--")
        axis.set(title=case, xlabel="T", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("TFLOP/s, forward + backward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    cfg = settings(argv)
    peak = matmul_peak(cfg)
    results = measure_all(cfg)
    text = report(results, peak, cfg, sys.argv[1:] if argv is None else argv)
    print(text)
    if cfg.out:
        plot = Path(cfg.out).with_suffix(".png")
        write_text(cfg.out, text)
        draw(results, peak, plot)
        print(f"written to {cfg.out} and {plot}")


if __name__ == "__main__":
    main()
