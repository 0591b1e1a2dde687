"""Who attends to whom, as intervals (`Spans`), and attention over them.

Every mask of this project lets a query see an interval of keys, so four integers per position stand for it and no
(T, T) mask is ever built for training. The picture for one document of 8 tokens in blocks of K = 4, where the
sequence is [xt ; x0], the noisy tokens and then the clean ones:

                     keys: noisy       clean
                       0123 4567     0123 4567
    query  noisy 0-3   ####                          its own noisy block: [block_start, block_end)
           noisy 4-7        ####     ####            and the clean past:  [doc_start, block_start)
           clean 0-3                 ####            clean, through its own block:
           clean 4-7                 #### ####                            [doc_start, block_end)

`attention` is the one entry. On CUDA with Triton it is a FlashAttention kernel that reads the spans; everywhere else
it is plain PyTorch, tiles of queries each against only the keys that the tile can see. Changing the documents of a
batch changes four vectors of integers, nothing is built or compiled again.

Neighbours: FlashMask (arXiv 2410.01359) also skips tiles by intervals, but a column's: which queries do *not* see a key,
up to two of them; here it is rows, one interval a half, which is all that block diffusion needs. BD3-LM and SDAR give the
same mask to flex-attention, which builds a block mask for every packing. TileLang's block-diffusion example has fixed
blocks of one length; FlashInfer's block-extend serves inference only.

Not covered: dropout, additive biases, several intervals a half; head_dim above 256, and queries against a
longer KV cache, take the PyTorch path.
"""
import functools
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # macOS, Windows, or not installed: the kernel below is then only text
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)

    def jit(function):
        return function

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels in Python, on CPU tensors: for tests
TILE = 128  # queries a tile of the PyTorch path: fewer skip more of a causal mask, more keep the cores busy


@dataclass(frozen=True)
class Spans:
    """Per clean position i of a row: its document is [doc_start, doc_end), its block [block_start, block_end).

    doc_start, doc_end, block_start, block_end: (B, T) int32, positions in the row.
    noisy: True where the sequence is [xt ; x0], 2T tokens; False where it is the T clean positions alone.
    first: the position of the first of them; not 0 where a KV cache holds the keys of those before it.
    """
    doc_start: torch.Tensor
    doc_end: torch.Tensor
    block_start: torch.Tensor
    block_end: torch.Tensor
    noisy: bool = False
    first: int = 0

    @classmethod
    def of(cls, doc_start, doc_end, block_size=None, noisy=False, first=0):
        """Documents cut into blocks of `block_size` from each one's first token; None: a document is one block.

        block_size=1 is causal attention, None is bidirectional attention. A position with doc_end = doc_start (a gap)
        is in no document: it sees nobody, and nobody sees it.
        """
        if block_size is None:
            return cls(doc_start, doc_end, doc_start, doc_end, noisy, first)
        i = first + torch.arange(doc_start.shape[1], dtype=torch.int32, device=doc_start.device)
        block_start = torch.minimum(i - (i - doc_start) % block_size, doc_end)
        return cls(doc_start, doc_end, block_start, torch.minimum(block_start + block_size, doc_end), noisy, first)

    @classmethod
    def annealed(cls, doc_start, doc_end, right):
        """Causal attention with `right` more tokens revealed: 0 is causal, the length of the row is bidirectional.

        The attention-mask annealing of DiffuLLaMA and DiffuCoder's adaptation, with a difference: DiffuLLaMA's code
        reveals random future keys, here an edge moves. Position i sees [doc_start, i + 1 + right), and is seen by
        [i - right, doc_end): the same tables hold.
        """
        i = torch.arange(doc_start.shape[1], dtype=torch.int32, device=doc_start.device)
        return cls(doc_start, doc_end, torch.minimum(torch.maximum(doc_start, i - right), doc_end),
                   torch.minimum(doc_end, i + 1 + right))

    def stacked(self):
        """(B, 4, T) int32, as the kernel reads them."""
        return torch.stack([self.doc_start, self.doc_end, self.block_start, self.block_end], 1)

    @property
    def positions(self):
        """(B, S) int64: each token's place in its document, for RoPE; a noisy token has its clean twin's."""
        i = self.first + torch.arange(self.doc_start.shape[1], device=self.doc_start.device) - self.doc_start
        return torch.cat([i, i], 1) if self.noisy else i

    @property
    def pairs(self):
        """How many query-key pairs these rows have, a head: what attention costs. A noisy query has as many as its clean twin."""
        return int((self.block_end - self.doc_start).sum()) * (2 if self.noisy else 1)

    def dense_mask(self):
        """(B, S, S) bool, True where a query (dim 1) sees a key (dim 2): the reference, quadratic in memory."""
        T = self.doc_start.shape[1]
        clean = self.sees(0, T, torch.arange(0, T), torch.arange(0))
        if not self.noisy:
            return clean
        noisy = self.sees(0, T, torch.arange(0, T), torch.arange(0, T), noisy=True)
        noisy = torch.cat([noisy[..., T:], noisy[..., :T]], -1)  # its noisy keys come first, as xt does
        return torch.cat([noisy, F.pad(clean, (T, 0))], 1)

    def sees(self, a, b, clean_keys, noisy_keys, noisy=False):
        """(B, b - a, keys) bool: which of these keys, clean ones first, queries a..b see. noisy: of xt, not x0."""
        doc_start, block_start, block_end = (x[:, a:b, None] for x in (self.doc_start, self.block_start, self.block_end))
        c, n = clean_keys.to(doc_start.device), noisy_keys.to(doc_start.device)
        on_clean = (c >= doc_start) & (c < (block_start if noisy else block_end))
        on_noisy = (n >= block_start) & (n < block_end)
        return torch.cat([on_clean, on_noisy], -1) if noisy else on_clean

    @cached_property
    def tiles(self):
        """What `tiled_attention` visits, worked out once a batch and used by every layer.

        A list of (first query, last query + 1, clean keys, noisy keys, mask): the keys are (from, to) of what any query
        of the tile sees in any row, mask is (B, 1, queries, keys) bool, or None where all of them are seen. Queries and
        noisy keys count in xt where `noisy`, whose tiles come first; clean queries then follow at T.
        """
        def span(low, high):
            low, high = int(low.min()), int(high.max())
            return low, max(low, high)

        T, tiles = self.doc_start.shape[1], []
        for noisy in ((True, False) if self.noisy else (False,)):
            for a in range(0, T, TILE):
                b = min(a + TILE, T)
                doc_start, block_start, block_end = (x[:, a:b] for x in (self.doc_start, self.block_start, self.block_end))
                clean = span(doc_start, block_start if noisy else block_end)
                own = span(block_start, block_end) if noisy else (0, 0)
                mask = self.sees(a, b, torch.arange(*clean), torch.arange(*own), noisy)[:, None]
                shift = T if self.noisy and not noisy else 0
                tiles.append((a + shift, b + shift, clean, own, None if mask.all() else mask))
        return tiles


def attention(q, k, v, spans):
    """Softmax attention of every query over the keys its span names, scaled by 1/√head_dim.

    q: (B, n_head, S, head_dim); k, v: (B, n_kv_head, S', head_dim), n_kv_head dividing n_head (GQA).
    S = S' = T, or 2T as [xt ; x0] where spans.noisy. Against a KV cache S' may be more than S: the spans of the
    S queries then count positions among the S' keys.
    Returns (B, n_head, S, head_dim). A query that sees no key gets zeros.
    """
    if q.shape[2] == k.shape[2] and q.dtype == k.dtype and why_tiled(q.device.type, q.dtype, q.shape[3]) is None:
        return kernel_forward(q, k, v, spans.stacked(), spans.noisy)[0]
    return tiled_attention(q, k, v, spans)


def why_tiled(device_type, dtype, head_dim):
    """Why the PyTorch path serves such a query, as a few words; None where the kernel does."""
    if triton is None:
        return "triton is not installed"
    if device_type != "cuda" and not INTERPRETED:
        return f"the device is {device_type}, not cuda"
    if not INTERPRETED and older_than_ampere():
        return "this GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel has no {dtype}"
    return None if head_dim <= 256 else f"head_dim {head_dim} is above 256"


@torch.compiler.assume_constant_result  # a question to the driver, which a compiled graph should not ask
def older_than_ampere():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)


def say_if_tiled(device_type, dtype, head_dim):
    """One line on stderr, once, where the PyTorch path serves."""
    why = why_tiled(device_type, dtype, head_dim)
    if why:
        say_once(f"attention: PyTorch tiles, since {why}")


@functools.cache
def say_once(text):
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one
        print(text, file=sys.stderr)


@torch.compiler.disable  # the tiles follow the documents of the batch: traced, every packing would recompile
def tiled_attention(q, k, v, spans):
    """`attention` in plain PyTorch: each tile of queries meets only the keys that it can see."""
    say_if_tiled(q.device.type, q.dtype, q.shape[3])
    T = spans.doc_start.shape[1]
    (k_noisy, k_clean), (v_noisy, v_clean) = ((x[:, :, :T], x[:, :, T:]) if spans.noisy else (x[:, :, :0], x)
                                              for x in (k, v))
    out = []
    for a, b, clean, own, mask in spans.tiles:
        keys, values = k_clean[:, :, slice(*clean)], v_clean[:, :, slice(*clean)]
        if own[1] > own[0]:
            keys = torch.cat([keys, k_noisy[:, :, slice(*own)]], 2)
            values = torch.cat([values, v_noisy[:, :, slice(*own)]], 2)
        out.append(grouped_attention(q[:, :, a:b], keys, values, mask))
    return torch.cat(out, 2)  # (B, n_head, S, head_dim)


def grouped_attention(q, k, v, mask):
    """SDPA where n_head / n_kv_head queries share a key: the group becomes more query rows, so K and V stay as they are.

    q: (B, n_head, Q, head_dim). k, v: (B, n_kv_head, L, head_dim). mask: (B, 1, Q, L) bool or None.
    """
    B, n_head, Q, head_dim = q.shape
    group = n_head // k.shape[1]
    if k.shape[2] == 0:
        return q * 0
    mask = mask if mask is None else mask.repeat(1, 1, group, 1)  # (B, 1, group·Q, L)
    out = F.scaled_dot_product_attention(q.reshape(B, -1, group * Q, head_dim), k, v, attn_mask=mask)
    return out.view(B, n_head, Q, head_dim)


# --- the kernel ---------------------------------------------------------------------------------------------------
# FlashAttention-2 with one difference: which keys a tile of queries visits, and which of them it has to compare, is
# read off the spans. If row r of the tile sees keys [start_r, end_r):
#
#     min start            max start              min end            max end
#         |----- border -------|------- inside -------|----- border -----|
#
# Nothing else is loaded; a tile of keys that lies inside is used whole; in the border, two integers are compared.
# The backward pass is two more kernels of the same kind: dQ by queries over keys, and dK, dV by keys over queries,
# whose intervals are the transposed ones:
#
#     clean key j is seen by     clean queries [block_start, doc_end)     noisy queries [block_end, doc_end)
#     noisy key j                none                                     noisy queries [block_start, block_end)
#
# There are no atomics: with the same choice of tiles a run repeats to the bit. Each program takes one tile of one head; the
# heaviest tiles start first, and programs that share K and V (the heads of a group, the noisy and the clean tile of the
# same positions) start close together, to find them in the L2 cache. Each kernel has one loop over tiles, for both halves,
# border and inside: with a copy of the loop for each kind, the compiler spilled several times the registers.

LOG2_E = tl.constexpr(1.4426950408889634)  # the softmax is taken in powers of two: exp2 is the hardware's
DOC_START, DOC_END, BLOCK_START, BLOCK_END = (tl.constexpr(row) for row in range(4))  # as in `Spans.stacked`


@jit
def program(H, tiles, NOISY: tl.constexpr):
    """Which tile this program takes: (row of the batch, head, place in the order of tiles, 1 if of the noisy half)."""
    bh, place = tl.program_id(0), tl.program_id(1)
    b = (bh // H).to(tl.int64)  # offsets of a row of the batch may pass 2^31
    if NOISY:
        return b, bh % H, place // 2, place % 2
    else:
        return b, bh % H, place, 0


@jit
def interval(bounds, i, T, start_row, end_row, TILE: tl.constexpr):
    """What positions i see, from two rows of `bounds`, and how the loop over it goes in steps of TILE.

    Returns start, end (len(i),) and lo, a, b, hi: steps from lo to hi; those from a to before b lie inside.
    """
    real = i < T
    start = tl.load(bounds + start_row * T + i, mask=real, other=0)
    end = tl.load(bounds + end_row * T + i, mask=real, other=0)
    some = real & (start < end)
    lo = tl.min(tl.where(some, start, T), 0) // TILE * TILE
    hi = tl.max(tl.where(some, end, 0), 0)
    a, b = tl.max(tl.where(real, start, 0), 0), tl.min(tl.where(real, end, T), 0) // TILE * TILE
    return start, end, lo, a, b, hi


@jit
def load_rows(X, i, d, T, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows i of a (T, D) matrix as (len(i), DP), zeros beyond T and D."""
    real = (i < T)[:, None] if D == DP else (i < T)[:, None] & (d < D)[None, :]
    return tl.load(X + i[:, None] * stride + d[None, :], mask=real, other=0.0)


@jit
def store_rows(X, x, i, d, T, stride, D: tl.constexpr):
    tl.store(X + i[:, None] * stride + d[None, :], x.to(X.dtype.element_ty), mask=(i < T)[:, None] & (d < D)[None, :])


@jit
def key_rows(own, noisy):
    """The rows of `bounds` between which a query sees keys: its own block's noisy ones (own = 1) or clean ones (own = 0)."""
    return own * BLOCK_START + (1 - own) * DOC_START, BLOCK_END - (1 - own) * noisy * (BLOCK_END - BLOCK_START)


@jit
def forward_kernel(Q, K, V, O, LSE, bounds, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, H, GROUP, T, BUCKET, scale,
                   NOISY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """O, and the log-sum-exp of the scores in base 2, of one tile of M queries of one head."""
    tiles = tl.cdiv(T, M)
    b, h, place, noisy = program(H, tiles, NOISY)
    i, d = (tiles - 1 - place) * M + tl.arange(0, M), tl.arange(0, DP)  # the last queries see most keys
    S, half = (2 * T, (1 - noisy) * T) if NOISY else (T, 0)  # [xt ; x0]: the clean queries begin at T
    q = load_rows(Q + b * q_b + h * q_h + half * q_s, i, d, T, q_s, D, DP)
    acc, m, l = tl.zeros([M, DP], tl.float32), tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    for own in range(0, 1 + noisy):
        start_row, end_row = key_rows(own, noisy)
        start, end, lo, x, y, hi = interval(bounds + b * 4 * T, i, T, start_row, end_row, N)
        first_key = (1 - own) * T if NOISY else 0
        k_ = K + b * k_b + h // GROUP * k_h + first_key * k_s
        v_ = V + b * v_b + h // GROUP * v_h + first_key * v_s
        for first in range(lo, hi, N):  # the online softmax
            n = first + tl.arange(0, N)
            s = tl.dot(q, tl.trans(load_rows(k_, n, d, T, k_s, D, DP)), input_precision="ieee") * scale  # (M, N)
            if (first < x) | (first >= y):
                s = tl.where((n[None, :] >= start[:, None]) & (n[None, :] < end[:, None]), s, float("-inf"))
            new_m = tl.maximum(m, tl.max(s, 1))
            base = tl.where(new_m == float("-inf"), 0.0, new_m)  # a row that has not seen a key yet
            p, shrink = tl.exp2(s - base[:, None]), tl.exp2(m - base)
            v = load_rows(v_, n, d, T, v_s, D, DP)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            l = l * shrink + tl.sum(p, 1)
            m = new_m
    empty = l == 0
    store_rows(O + b * o_b + h * o_h + half * o_s, acc / tl.where(empty, 1.0, l)[:, None], i, d, T, o_s, D)
    lse = tl.where(empty, float("inf"), m + tl.log2(tl.where(empty, 1.0, l)))  # +inf: exp2(s - lse) is 0 in the backward
    tl.store(LSE + (b * H + h) * S + half + i, lse, mask=i < T)


@jit
def dq_kernel(Q, K, V, DO, LSE, DELTA, DQ, bounds, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, g_b, g_h, g_s,
              H, GROUP, T, BUCKET, scale, NOISY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """dQ of one tile of M queries of one head. o: strides of DO, g: of DQ."""
    tiles = tl.cdiv(T, M)
    b, h, place, noisy = program(H, tiles, NOISY)
    i, d = (tiles - 1 - place) * M + tl.arange(0, M), tl.arange(0, DP)
    S, half = (2 * T, (1 - noisy) * T) if NOISY else (T, 0)
    q = load_rows(Q + b * q_b + h * q_h + half * q_s, i, d, T, q_s, D, DP)
    do = load_rows(DO + b * o_b + h * o_h + half * o_s, i, d, T, o_s, D, DP)
    at = (b * H + h) * S + half + i
    lse = tl.load(LSE + at, mask=i < T, other=float("inf"))
    delta = tl.load(DELTA + at, mask=i < T, other=0.0)
    dq = tl.zeros([M, DP], tl.float32)
    for own in range(0, 1 + noisy):
        start_row, end_row = key_rows(own, noisy)
        start, end, lo, x, y, hi = interval(bounds + b * 4 * T, i, T, start_row, end_row, N)
        first_key = (1 - own) * T if NOISY else 0
        k_ = K + b * k_b + h // GROUP * k_h + first_key * k_s
        v_ = V + b * v_b + h // GROUP * v_h + first_key * v_s
        for first in range(lo, hi, N):
            n = first + tl.arange(0, N)
            k = load_rows(k_, n, d, T, k_s, D, DP)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])  # (M, N)
            if (first < x) | (first >= y):
                p = tl.where((n[None, :] >= start[:, None]) & (n[None, :] < end[:, None]), p, 0.0)
            dp = tl.dot(do, tl.trans(load_rows(v_, n, d, T, v_s, D, DP)), input_precision="ieee")
            dq += tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, input_precision="ieee")
    store_rows(DQ + b * g_b + h * g_h + half * g_s, dq * (scale / LOG2_E), i, d, T, g_s, D)


@jit
def dkdv_kernel(Q, K, V, DO, LSE, DELTA, DK, DV, bounds, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
                g_b, g_h, g_s, H, GROUP, T, BUCKET, scale, NOISY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
                DP: tl.constexpr):
    """dK and dV of one tile of N keys of one key/value head: the sum over its GROUP query heads. g: strides of DK and DV."""
    b, h, place, noisy = program(H // GROUP, tl.cdiv(T, N), NOISY)
    n, d = place * N + tl.arange(0, N), tl.arange(0, DP)  # the first keys are seen by most queries
    S, half = (2 * T, (1 - noisy) * T) if NOISY else (T, 0)
    k = load_rows(K + b * k_b + h * k_h + half * k_s, n, d, T, k_s, D, DP)
    v = load_rows(V + b * v_b + h * v_h + half * v_s, n, d, T, v_s, D, DP)
    dk, dv = tl.zeros([N, DP], tl.float32), tl.zeros([N, DP], tl.float32)
    kinds = 2 - noisy if NOISY else 1  # a clean key is seen by clean and by noisy queries, a noisy one by noisy ones
    for turn in range(0, GROUP * kinds):
        g, later = h * GROUP + turn // kinds, turn % kinds  # later = 1: noisy queries of later blocks, for a clean key
        start_row = BLOCK_START + later * (BLOCK_END - BLOCK_START)
        start, end, lo, x, y, hi = interval(bounds + b * 4 * T, n, T, start_row, DOC_END + noisy * (BLOCK_END - DOC_END), M)
        first_query = (1 - noisy) * (1 - later) * T if NOISY else 0
        q_ = Q + b * q_b + g * q_h + first_query * q_s
        do_ = DO + b * o_b + g * o_h + first_query * o_s
        at = (b * H + g) * S + first_query
        for first in range(lo, hi, M):
            i = first + tl.arange(0, M)
            q, do = load_rows(q_, i, d, T, q_s, D, DP), load_rows(do_, i, d, T, o_s, D, DP)
            lse = tl.load(LSE + at + i, mask=i < T, other=float("inf"))
            delta = tl.load(DELTA + at + i, mask=i < T, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])  # (N, M)
            if (first < x) | (first >= y):
                p = tl.where((i[None, :] >= start[:, None]) & (i[None, :] < end[:, None]), p, 0.0)
            dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dk += tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, input_precision="ieee")
    store_rows(DK + b * g_b + h * g_h + half * g_s, dk * (scale / LOG2_E), n, d, T, g_s, D)
    store_rows(DV + b * g_b + h * g_h + half * g_s, dv, n, d, T, g_s, D)


# M queries by N keys, warps and pipeline depth to choose among, by measuring once for each shape. Large tiles read K and V
# less often; small ones waste less at the border. For dK and dV, which keep two accumulators, M < N spares registers; what
# spills or does not fit on a chip (float32, head_dim 256) loses by itself.
CHOICES = [dict(M=128, N=128, num_warps=8, num_stages=2), dict(M=128, N=64, num_warps=8, num_stages=3),
           dict(M=64, N=128, num_warps=8, num_stages=2), dict(M=64, N=64, num_warps=4, num_stages=3),
           dict(M=64, N=64, num_warps=8, num_stages=2), dict(M=32, N=128, num_warps=8, num_stages=2),
           dict(M=32, N=64, num_warps=4, num_stages=2), dict(M=32, N=32, num_warps=4, num_stages=2)]
INTERPRETED_TILE = 16  # of M and N where Triton interprets: there is nothing to measure


@functools.cache
def tuned(kernel):
    """The kernel with its choices, kept on disk; a choice that does not fit the chip counts as slowest."""
    configs = [triton.Config({"M": c["M"], "N": c["N"]}, num_warps=c["num_warps"], num_stages=c["num_stages"]) for c in CHOICES]
    return triton.autotune(configs, key=["BUCKET", "D", "NOISY"], cache_results=True,
                           prune_configs_by={"early_config_prune": small_for_float32})(kernel)


def small_for_float32(configs, arguments, **_):
    """float32 has no matrix unit here (IEEE, not TF32): its large tiles take minutes to compile and spill everything."""
    if arguments["Q"].dtype != torch.float32:
        return configs
    return [c for c in configs if c.kwargs["M"] * c.kwargs["N"] <= 32 * 64] or configs


def launch(kernel, tile, programs, T, noisy, *arguments, **constants):
    """Run `kernel` on a grid of (programs, tiles of its `tile`, "M" or "N", over T, twice where noisy)."""
    halves = 2 if noisy else 1
    if INTERPRETED:
        constants |= {"M": INTERPRETED_TILE, "N": INTERPRETED_TILE}
        kernel[programs, triton.cdiv(T, INTERPRETED_TILE) * halves](*arguments, NOISY=noisy, **constants)
    else:
        tuned(kernel)[lambda meta: (programs, triton.cdiv(T, meta[tile]) * halves)](*arguments, NOISY=noisy, **constants)


def bucket(T):
    """T up to a power of two, 256 or more: lengths that share a choice of tiles. The kernels do not read it."""
    return max(256, triton.next_power_of_2(T))


def strided(*tensors):
    """The tensors' strides but for the last, which must be 1."""
    return [s for x in tensors for s in x.stride()[:3]]


def heads_last(x):
    """An empty tensor like x (B, heads, S, head_dim), laid out as (B, S, heads, head_dim), as the projections want it."""
    B, n, S, D = x.shape
    return x.new_empty(B, S, n, D).transpose(1, 2)


# Two custom ops, so that torch.compile and activation checkpointing see them as they see PyTorch's own.
@torch.library.custom_op("nanodiffcoder::attention", mutates_args=())
def kernel_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor,
                   noisy: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` by the kernel. bounds: Spans.stacked(). Returns the output and its log-sum-exp, base 2, (B, n_head, S)."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    (B, H, S, D), T = q.shape, bounds.shape[2]
    out, lse = heads_last(q), q.new_empty(B, H, S, dtype=torch.float32)
    launch(forward_kernel, "M", B * H, T, noisy, q, k, v, out, lse, bounds.contiguous(), *strided(q, k, v, out),
           H, H // k.shape[1], T, bucket(T), LOG2_E.value / D**0.5, D=D, DP=max(16, triton.next_power_of_2(D)))
    return out, lse


@torch.library.custom_op("nanodiffcoder::attention_backward", mutates_args=())
def kernel_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                    bounds: torch.Tensor, noisy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV of `attention` from the gradient `do` of its output (FlashAttention-2, Algorithm 2)."""
    q, k, v, do = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, do))
    (B, H, _, D), T = q.shape, bounds.shape[2]
    delta = (do.float() * out.float()).sum(-1).contiguous()  # (B, n_head, S)
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(v)
    shared = (H, H // k.shape[1], T, bucket(T), LOG2_E.value / D**0.5)
    constants = {"D": D, "DP": max(16, triton.next_power_of_2(D))}
    launch(dq_kernel, "M", B * H, T, noisy, q, k, v, do, lse, delta, dq, bounds.contiguous(), *strided(q, k, v, do, dq),
           *shared, **constants)
    launch(dkdv_kernel, "N", B * k.shape[1], T, noisy, q, k, v, do, lse, delta, dk, dv, bounds.contiguous(),
           *strided(q, k, v, do, dk), *shared, **constants)
    return dq, dk, dv


@kernel_forward.register_fake
def _(q, k, v, bounds, noisy):
    return heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@kernel_backward.register_fake
def _(do, q, k, v, out, lse, bounds, noisy):
    return heads_last(q), heads_last(k), heads_last(v)


def keep_for_backward(ctx, inputs, output):
    *tensors, ctx.noisy = inputs
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx, do, _):
    q, k, v, bounds, out, lse = ctx.saved_tensors
    return *kernel_backward(do, q, k, v, out, lse, bounds, ctx.noisy), None, None


kernel_forward.register_autograd(differentiate, setup_context=keep_for_backward)
