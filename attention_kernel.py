"""Softmax attention over the keys that each query's spans name (spans.py).

`attention` is the one entry. On CUDA with Triton it is a FlashAttention kernel that reads the
spans. Everywhere else it is plain PyTorch: tiles of queries, each against only the keys it can see.
When the documents of a batch change, four vectors of integers change; nothing is compiled again.

Neighbors: FlashMask (arXiv 2410.01359) skips tiles by intervals too, but per column: which queries
do *not* see a key, up to two intervals. Here they are per row, one per half of the sequence, which
is all that block diffusion needs. BD3-LM and SDAR give the same mask to flex-attention, which
builds a block mask for every packing. TileLang's example has fixed blocks of one length.

Not covered: dropout, additive biases. A head_dim above 256 takes the PyTorch path. Queries with
CacheSpans, in decoding and in short rows of rl.py, are one call of PyTorch's SDPA, on every device.
"""
import functools
import os
import sys
from contextlib import suppress
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from spans import CacheSpans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # in Python, on CPU tensors: for tests
triton, tl = None, SimpleNamespace(constexpr=lambda value: value)  # the kernels are then only text

# Importing Triton takes 0.2 s: only where a kernel can run, or where someone has already done it.
if INTERPRETED or torch.cuda.is_available() or "triton" in sys.modules:
    with suppress(ImportError):  # Windows, or not installed
        import triton
        import triton.language as tl
torch.backends.cuda.enable_cudnn_sdp(False)  # its gradient may be NaN: pytorch's issue 196678


def jit(function):
    return function if triton is None else triton.jit(function)


def attention(q, k, v, spans):
    """Softmax attention of every query over the keys its span names, scaled by 1/√head_dim.

    q: (B, n_head, Q, head_dim). k, v: (B, n_kv_head, S, head_dim), n_kv_head dividing n_head (GQA).
    spans: Spans, with Q = S = T, or 2T as [xt ; x0] where they are noisy; there Q = T asks for the
    noisy half alone, against all the keys. Or CacheSpans, with S slots.
    Returns (B, n_head, Q, head_dim). A query that sees no key gets zeros.
    """
    if isinstance(spans, CacheSpans):
        return grouped_attention(q, k, v, spans.mask)
    # beyond, the kernel's offsets in a row of the batch pass 2^31, or its tiles CUDA's largest grid
    too_long = k.shape[2] * q.shape[1] * q.shape[3] >= 2**31 or k.shape[2] >= 2**19
    if too_long or q.dtype != k.dtype or why_tiled(q.device.type, q.dtype, q.shape[3]):
        return tiled_attention(q, k, v, spans)
    return kernel_forward(q, k, v, spans.stacked(), spans.noisy)[0]


def why_tiled(device_type, dtype, head_dim):
    """Why the PyTorch path serves such a query, as a few words; None where the kernel does."""
    if device_type != "cuda" and not INTERPRETED:
        return f"the device is {device_type}, not cuda"
    if triton is None:
        return "triton is not installed"
    if not INTERPRETED and older_than_ampere():
        return "this GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel has no {dtype}"
    if head_dim > 256:
        return f"head_dim {head_dim} is above 256"
    return None


def older_than_ampere():
    # torch.compile knows these two calls and takes what they return as constants
    return torch.cuda.is_available() and torch.cuda.get_device_properties("cuda").major < 8


def say_if_tiled(device_type, dtype, head_dim):
    """Print one line on stderr, once, where the PyTorch path serves."""
    if why := why_tiled(device_type, dtype, head_dim):
        say_once(f"attention: PyTorch tiles, since {why}")


@functools.cache
def say_once(text):
    if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes
        print(text, file=sys.stderr)


# --- the PyTorch path -----------------------------------------------------------------------------

def tiled_attention(q, k, v, spans):
    """`attention` in plain PyTorch: each tile of queries meets only the keys that it can see."""
    if torch.compiler.is_compiling():  # traced, it would be compiled again for every packing
        return torch.compiler.disable(tiled_attention)(q, k, v, spans)
    say_if_tiled(q.device.type, q.dtype, q.shape[3])
    clean_at = spans.doc_start.shape[1] if spans.noisy else 0  # where the clean keys begin
    k_noisy, k_clean = k[:, :, :clean_at], k[:, :, clean_at:]
    v_noisy, v_clean = v[:, :, :clean_at], v[:, :, clean_at:]
    out = []
    for queries, clean_keys, noisy_keys, mask in spans.tiles:
        if queries.start >= q.shape[2]:
            break  # the clean queries, which nobody asked for
        keys, values = k_clean[:, :, clean_keys], v_clean[:, :, clean_keys]
        if noisy_keys.stop > noisy_keys.start:
            keys = torch.cat([keys, k_noisy[:, :, noisy_keys]], 2)
            values = torch.cat([values, v_noisy[:, :, noisy_keys]], 2)
        out.append(grouped_attention(q[:, :, queries], keys, values, mask))
    return torch.cat(out, 2)  # (B, n_head, Q, head_dim)


def grouped_attention(q, k, v, mask):
    """SDPA of query heads that share a key head: they become more query rows, K and V stay.

    q: (B, n_head, Q, head_dim). k, v: (B, n_kv_head, L, head_dim). mask: (B, 1, Q, L) bool or None.
    """
    B, n_head, Q, head_dim = q.shape
    group = n_head // k.shape[1]
    if k.shape[2] == 0:
        return q * 0
    if mask is not None:
        mask = mask.repeat(1, 1, group, 1)  # (B, 1, group·Q, L)
    rows = q.reshape(B, -1, group * Q, head_dim)  # (B, n_kv_head, group·Q, head_dim)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.reshape(B, n_head, Q, head_dim)  # its strides depend on SDPA's backend


# --- the kernel -----------------------------------------------------------------------------------
# FlashAttention-2 with one difference: the spans say which keys a tile of queries visits, and which
# of them it has to compare. If row r of the tile sees keys [start_r, end_r):
#
#     min start            max start              min end            max end
#         |----- border -------|------- inside -------|----- border -----|
#
# Nothing else is loaded. A tile of keys that lies inside is used whole; in the border, two integers
# are compared. The backward pass is two more kernels of the same kind: dQ by queries over keys, and
# dK, dV by keys over queries, whose intervals are the transposed ones:
#
#                    is seen by clean queries     and by noisy queries
#     clean key j    [block_start, doc_end)       [block_end, doc_end)
#     noisy key j    none                         [block_start, block_end)
#
# There are no atomics: with the same choice of tiles a run repeats to the bit. Each program takes
# one tile of one head; the heaviest tiles start first. Programs that share K and V (the heads of a
# group, the noisy and the clean tile of the same positions) are launched next to each other: their
# loads hit in the L2 cache. Each kernel has one loop over tiles, for both halves, border and
# inside: with a copy of the loop for each kind, the compiler spilled several times as many
# registers.
#
# Names: M queries by N keys are a tile. D is head_dim, DP is D up to a power of two. H query heads,
# GROUP of them share a key head. x_b, x_h, x_s are a tensor's strides from one row of the batch,
# head and token to the next. NOISY: the keys are [xt ; x0]. CLEAN_QUERIES: so are the queries;
# without, they are xt alone. `noisy` is 1 where a program's tile lies in xt.

LOG2_E = tl.constexpr(1.4426950408889634)  # the softmax uses powers of two: exp2 is the hardware's
DOC_START, DOC_END = tl.constexpr(0), tl.constexpr(1)  # the rows of `bounds`, as in Spans.stacked
BLOCK_START, BLOCK_END = tl.constexpr(2), tl.constexpr(3)


@jit
def program(heads, NOISY: tl.constexpr, CLEAN: tl.constexpr):
    """Which tile this program takes: (row of the batch, head, place in the order of tiles, noisy).

    NOISY, CLEAN: which halves there are to choose from.
    """
    batch_and_head, place = tl.program_id(0), tl.program_id(1)
    b = (batch_and_head // heads).to(tl.int64)  # offsets of a row of the batch may pass 2^31
    h = batch_and_head % heads
    if NOISY and CLEAN:
        return b, h, place // 2, place % 2
    elif NOISY:
        return b, h, place, 1
    else:
        return b, h, place, 0


@jit
def clean_at(is_clean, T, NOISY: tl.constexpr):
    """Where a half of the sequence begins: in [xt ; x0] the clean one begins at T."""
    return tl.where(is_clean, T, 0) if NOISY else 0


@jit
def interval(bounds, i, T, start_row, end_row, STEP: tl.constexpr):
    """What positions i see, between two rows of `bounds`, and how to loop over it by STEP.

    start, end (len(i),): position r sees [start_r, end_r). Steps go from loop_from to loop_to;
    those from inside_from to before inside_to lie inside, where nothing has to be compared.
    """
    real = i < T
    start = tl.load(bounds + start_row * T + i, mask=real, other=0)
    end = tl.load(bounds + end_row * T + i, mask=real, other=0)
    sees_some = real & (start < end)
    loop_from = tl.min(tl.where(sees_some, start, T), 0) // STEP * STEP
    loop_to = tl.max(tl.where(sees_some, end, 0), 0)
    inside_from = tl.max(tl.where(real, start, 0), 0)
    inside_to = tl.min(tl.where(real, end, T), 0) // STEP * STEP
    return start, end, loop_from, inside_from, inside_to, loop_to


@jit
def key_rows(own, noisy):
    """Between which rows of `bounds` a query's keys lie: noisy ones (own = 1) or clean ones."""
    # arithmetic: with tl.where, as in query_rows, the forward kernel spilled registers
    start_row = own * BLOCK_START + (1 - own) * DOC_START
    end_row = BLOCK_END - (1 - own) * noisy * (BLOCK_END - BLOCK_START)
    return start_row, end_row


@jit
def query_rows(later, noisy):
    """Between which rows of `bounds` the queries that see a key lie. later: see `dkdv_kernel`."""
    start_row = tl.where(later == 1, BLOCK_END, BLOCK_START)
    end_row = tl.where(noisy == 1, BLOCK_END, DOC_END)
    return start_row, end_row


@jit
def load_rows(X, i, d, T, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of a (T, D) matrix as (len(i), DP), zeros beyond T and D."""
    real = (i < T)[:, None]
    if D != DP:
        real = real & (d < D)[None, :]
    return tl.load(X + i[:, None] * stride + d[None, :], mask=real, other=0.0)


@jit
def store_rows(X, x, i, d, T, stride, D: tl.constexpr):
    real = (i < T)[:, None] & (d < D)[None, :]
    tl.store(X + i[:, None] * stride + d[None, :], x.to(X.dtype.element_ty), mask=real)


@jit
def forward_kernel(
    Q, K, V, O, LSE, bounds,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    o_b, o_h, o_s,
    H, GROUP, T, BUCKET, scale,
    NOISY: tl.constexpr, CLEAN_QUERIES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):
    """O, and the log-sum-exp of the scores in base 2, of one tile of M queries of one head."""
    tiles = tl.cdiv(T, M)
    b, h, place, noisy = program(H, NOISY, CLEAN_QUERIES)
    i = (tiles - 1 - place) * M + tl.arange(0, M)  # the last queries see most keys
    d = tl.arange(0, DP)
    half = clean_at(noisy == 0, T, NOISY)
    q = load_rows(Q + b * q_b + h * q_h + half * q_s, i, d, T, q_s, D, DP)  # (M, DP)
    acc = tl.zeros([M, DP], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    for own in range(0, 1 + noisy):
        start_row, end_row = key_rows(own, noisy)
        start, end, loop_from, inside_from, inside_to, loop_to = interval(
            bounds + b * 4 * T, i, T, start_row, end_row, N)
        keys_at = clean_at(own == 0, T, NOISY)
        K_half = K + b * k_b + h // GROUP * k_h + keys_at * k_s
        V_half = V + b * v_b + h // GROUP * v_h + keys_at * v_s
        for tile in range(loop_from, loop_to, N):  # the online softmax
            n = tile + tl.arange(0, N)
            k = load_rows(K_half, n, d, T, k_s, D, DP)  # (N, DP)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (M, N)
            if (tile < inside_from) | (tile >= inside_to):
                seen = (n[None, :] >= start[:, None]) & (n[None, :] < end[:, None])
                s = tl.where(seen, s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has not seen a key yet
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(m - base)
            v = load_rows(V_half, n, d, T, v_s, D, DP)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            l = l * shrink + tl.sum(p, 1)
            m = new_m
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    store_rows(O + b * o_b + h * o_h + half * o_s, acc / l[:, None], i, d, T, o_s, D)
    lse = tl.where(empty, float("inf"), m + tl.log2(l))  # +inf: exp2(s - lse) is 0 in the backward
    Q_len = 2 * T if NOISY and CLEAN_QUERIES else T
    tl.store(LSE + (b * H + h) * Q_len + half + i, lse, mask=i < T)


@jit
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, bounds,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    do_b, do_h, do_s, dq_b, dq_h, dq_s,
    H, GROUP, T, BUCKET, scale,
    NOISY: tl.constexpr, CLEAN_QUERIES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):
    """dQ of one tile of M queries of one head."""
    tiles = tl.cdiv(T, M)
    b, h, place, noisy = program(H, NOISY, CLEAN_QUERIES)
    i = (tiles - 1 - place) * M + tl.arange(0, M)
    d = tl.arange(0, DP)
    half = clean_at(noisy == 0, T, NOISY)
    q = load_rows(Q + b * q_b + h * q_h + half * q_s, i, d, T, q_s, D, DP)  # (M, DP)
    do = load_rows(DO + b * do_b + h * do_h + half * do_s, i, d, T, do_s, D, DP)
    Q_len = 2 * T if NOISY and CLEAN_QUERIES else T
    at = (b * H + h) * Q_len + half + i
    lse = tl.load(LSE + at, mask=i < T, other=float("inf"))
    delta = tl.load(DELTA + at, mask=i < T, other=0.0)
    dq = tl.zeros([M, DP], tl.float32)
    for own in range(0, 1 + noisy):
        start_row, end_row = key_rows(own, noisy)
        start, end, loop_from, inside_from, inside_to, loop_to = interval(
            bounds + b * 4 * T, i, T, start_row, end_row, N)
        keys_at = clean_at(own == 0, T, NOISY)
        K_half = K + b * k_b + h // GROUP * k_h + keys_at * k_s
        V_half = V + b * v_b + h // GROUP * v_h + keys_at * v_s
        for tile in range(loop_from, loop_to, N):
            n = tile + tl.arange(0, N)
            k = load_rows(K_half, n, d, T, k_s, D, DP)  # (N, DP)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (M, N)
            p = tl.exp2(s - lse[:, None])
            if (tile < inside_from) | (tile >= inside_to):
                seen = (n[None, :] >= start[:, None]) & (n[None, :] < end[:, None])
                p = tl.where(seen, p, 0.0)
            v = load_rows(V_half, n, d, T, v_s, D, DP)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    store_rows(DQ + b * dq_b + h * dq_h + half * dq_s, dq * (scale / LOG2_E), i, d, T, dq_s, D)


@jit
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, bounds,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    do_b, do_h, do_s, dkv_b, dkv_h, dkv_s,
    H, GROUP, T, BUCKET, scale,
    NOISY: tl.constexpr, CLEAN_QUERIES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):
    """dK and dV of one tile of N keys of one key/value head: the sum over its GROUP query heads.

    A noisy key is seen by noisy queries, a clean one by two kinds in turn: clean queries, and noisy
    queries of later blocks (later = 1).
    """
    b, h, place, noisy = program(H // GROUP, NOISY, True)
    n = place * N + tl.arange(0, N)  # the first keys are seen by most queries
    d = tl.arange(0, DP)
    half = clean_at(noisy == 0, T, NOISY)
    k = load_rows(K + b * k_b + h * k_h + half * k_s, n, d, T, k_s, D, DP)  # (N, DP)
    v = load_rows(V + b * v_b + h * v_h + half * v_s, n, d, T, v_s, D, DP)
    dk = tl.zeros([N, DP], tl.float32)
    dv = tl.zeros([N, DP], tl.float32)
    kinds = 2 - noisy if NOISY and CLEAN_QUERIES else 1
    Q_len = 2 * T if NOISY and CLEAN_QUERIES else T
    for turn in range(0, GROUP * kinds):
        q_head = h * GROUP + turn // kinds
        later = turn % kinds if CLEAN_QUERIES else 1 - noisy
        start_row, end_row = query_rows(later, noisy)
        start, end, loop_from, inside_from, inside_to, loop_to = interval(
            bounds + b * 4 * T, n, T, start_row, end_row, M)
        queries_at = clean_at((noisy == 0) & (later == 0), T, NOISY)
        Q_half = Q + b * q_b + q_head * q_h + queries_at * q_s
        DO_half = DO + b * do_b + q_head * do_h + queries_at * do_s
        at = (b * H + q_head) * Q_len + queries_at
        for tile in range(loop_from, loop_to, M):
            i = tile + tl.arange(0, M)
            q = load_rows(Q_half, i, d, T, q_s, D, DP)  # (M, DP)
            do = load_rows(DO_half, i, d, T, do_s, D, DP)
            lse = tl.load(LSE + at + i, mask=i < T, other=float("inf"))
            delta = tl.load(DELTA + at + i, mask=i < T, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (N, M)
            p = tl.exp2(s - lse[None, :])
            if (tile < inside_from) | (tile >= inside_to):
                seen = (i[None, :] >= start[:, None]) & (i[None, :] < end[:, None])
                p = tl.where(seen, p, 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    place_in_grads = b * dkv_b + h * dkv_h + half * dkv_s
    store_rows(DK + place_in_grads, dk * (scale / LOG2_E), n, d, T, dkv_s, D)
    store_rows(DV + place_in_grads, dv, n, d, T, dkv_s, D)


# --- launching it ---------------------------------------------------------------------------------
# Tile sizes, warps and pipeline depth to choose among, by measuring once for each shape. Large
# tiles read K and V less often; small ones waste less at the border. For dK and dV, which keep two
# accumulators, M < N saves registers. What spills or does not fit on a chip (float32, head_dim 256)
# loses by itself.
CHOICES = [  # M, N, warps, stages
    (128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (64, 64, 4, 3),
    (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2),
]
INTERPRETED_TILE = 16  # M and N where Triton interprets: there is nothing to measure


@functools.cache
def tuned(kernel):
    """The kernel with its choices. One that does not fit the chip counts as slowest."""
    configs = []
    for M, N, warps, stages in CHOICES:
        configs.append(triton.Config({"M": M, "N": N}, num_warps=warps, num_stages=stages))
    shape = ["BUCKET", "D", "NOISY", "CLEAN_QUERIES"]
    prune = {"early_config_prune": small_for_float32}
    return triton.autotune(configs, shape, prune_configs_by=prune, cache_results=True)(kernel)


def small_for_float32(configs, arguments, **_):
    """Large tiles of float32 (IEEE, not TF32: no matrix unit) spill, and compile for minutes."""
    small = [c for c in configs if c.kwargs["M"] * c.kwargs["N"] <= 32 * 64]
    return small if small and arguments["Q"].dtype == torch.float32 else configs


def launch(kernel, side, tensors, bounds, strided, noisy):
    """Run `kernel` over its tiles of queries (side "M") or of keys (side "N"), of every head.

    tensors: the kernel's, q and k first. strided: those whose strides it takes, in its order.
    """
    q, k = tensors[:2]
    T = bounds.shape[2]
    B, heads, length, head_dim = (q if side == "M" else k).shape
    bucket = max(256, triton.next_power_of_2(T))  # these lengths share a choice; no kernel reads it
    strides = [stride for x in strided for stride in x.stride()[:3]]
    group = q.shape[1] // k.shape[1]
    scale = LOG2_E.value / head_dim**0.5
    arguments = [*tensors, bounds, *strides, q.shape[1], group, T, bucket, scale]
    padded = max(16, triton.next_power_of_2(head_dim))
    all_queries = q.shape[2] == k.shape[2]
    constants = {"NOISY": noisy, "CLEAN_QUERIES": all_queries, "D": head_dim, "DP": padded}

    def grid(sizes):
        return B * heads, triton.cdiv(T, sizes[side]) * (length // T)

    if INTERPRETED:
        sizes = {"M": INTERPRETED_TILE, "N": INTERPRETED_TILE}
        kernel[grid(sizes)](*arguments, **constants, **sizes)
    else:
        tuned(kernel)[grid](*arguments, **constants)


def rows_contiguous(*tensors):
    """The tensors, copied where their last stride is not 1."""
    return [x if x.stride(3) == 1 else x.contiguous() for x in tensors]


def heads_last(x):
    """An empty tensor like x (B, heads, S, head_dim), in memory (B, S, heads, head_dim)."""
    B, heads, S, head_dim = x.shape
    return x.new_empty(B, S, heads, head_dim).transpose(1, 2)


# Custom ops, so that torch.compile and activation checkpointing see them as they see PyTorch's own.
@torch.library.custom_op("nanodiffcoder::attention", mutates_args=())
def kernel_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, noisy: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` by the kernel. bounds: Spans.stacked(). noisy: Spans.noisy.

    Returns the output and its log-sum-exp in base 2, (B, n_head, Q) float32.
    """
    q, k, v = rows_contiguous(q, k, v)
    out, lse = heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = [q, k, v, out, lse]
    launch(forward_kernel, "M", tensors, bounds.contiguous(), [q, k, v, out], noisy)
    return out, lse


@torch.library.custom_op("nanodiffcoder::attention_backward", mutates_args=())
def kernel_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, bounds: torch.Tensor, noisy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV of `attention` from `do`, its output's gradient (FlashAttention-2, Alg. 2)."""
    q, k, v, do = rows_contiguous(q, k, v, do)
    bounds = bounds.contiguous()
    delta = (do.float() * out.float()).sum(-1).contiguous()  # (B, n_head, Q)
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    inputs = [q, k, v, do, lse, delta]
    launch(dq_kernel, "M", [*inputs, dq], bounds, [q, k, v, do, dq], noisy)
    launch(dkdv_kernel, "N", [*inputs, dk, dv], bounds, [q, k, v, do, dk], noisy)
    return dq, dk, dv


@kernel_forward.register_fake
def forward_shapes(q, k, v, bounds, noisy):
    return heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@kernel_backward.register_fake
def backward_shapes(do, q, k, v, out, lse, bounds, noisy):
    return heads_last(q), heads_last(k), heads_last(v)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.noisy = inputs
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx, do, _):
    q, k, v, bounds, out, lse = ctx.saved_tensors
    dq, dk, dv = kernel_backward(do, q, k, v, out, lse, bounds, ctx.noisy)
    return dq, dk, dv, None, None


kernel_forward.register_autograd(differentiate, setup_context=keep_for_backward)
