"""Who sees whom: the spans against the table written out pair by pair, attention against a float64 softmax over the
dense mask, and a whole Transformer against reachability: what a token may not see moves its hidden state by exactly 0.

Run as `python -m pytest tests` from the repository's root.
"""
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings, strategies as st

import attention_kernel
from attention_kernel import Spans, attention
from diffusion import Recipe, spans_for
from model import ModelConfig, Transformer

torch.set_num_threads(1)
ATTENTION_OF = {"ar": (1, False), "ar_diffusion": (1, False), "bidirectional": (None, False), "block": ("K", True)}


def packed(*rows):
    """Lengths of each row's documents -> doc_start, doc_end, (B, T) int32."""
    ends = [[(end, n) for end, n in zip(accumulate(lengths), lengths) for _ in range(n)] for lengths in rows]
    return (torch.tensor([[end - n for end, n in row] for row in ends], dtype=torch.int32),
            torch.tensor([[end for end, n in row] for row in ends], dtype=torch.int32))


@st.composite
def packings(draw, max_T=16, max_rows=3):
    """Rows of document lengths, of one T: a single document, one-token documents, or cuts anywhere."""
    T = draw(st.integers(1, max_T))
    inside = list(range(1, T))
    cuts = st.one_of(st.just([]), st.just(inside), st.sets(st.sampled_from(inside)) if inside else st.just([]))
    edges = [sorted({0, T, *draw(cuts)}) for _ in range(draw(st.integers(1, max_rows)))]
    return [[b - a for a, b in zip(row, row[1:])] for row in edges]


def block_of(i, lengths, K):
    """[doc_start, doc_end) and [block_start, block_end) of position i, by counting. K None: a document is a block."""
    a = 0
    for n in lengths:
        if i < a + n:
            K = K or n
            s = a + (i - a) // K * K
            return a, a + n, s, min(s + K, a + n)
        a += n


def who_sees(lengths, K, noisy):
    """(S, S) bool of one row, pair by pair as the table has it; xt comes before x0."""
    T = sum(lengths)
    tokens = [(i, half) for half in (("noisy", "clean") if noisy else ("clean",)) for i in range(T)]
    sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, (i, query) in enumerate(tokens):
        doc_start, doc_end, block_start, block_end = block_of(i, lengths, K)
        for col, (j, key) in enumerate(tokens):
            if query == "clean":
                sees[row, col] = key == "clean" and doc_start <= j < block_end
            else:
                sees[row, col] = doc_start <= j < block_start if key == "clean" else block_start <= j < block_end
    return sees


def softmax_attention(q, k, v, mask):
    """float64 softmax over mask (B, S, S'); queries without a key get zeros."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    e = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask[:, None]
    return e @ v / e.sum(-1, keepdim=True).clamp(min=1e-300)


def with_gradients(function, q, k, v, g, dtype):
    """Output and the gradients of q, k, v for the output's gradient g, all float64."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), g.to(dtype), materialize_grads=True)
    return [x.detach().double() for x in (out, *grads)]


def compare(spans, n_kv_head, group, tile=attention_kernel.TILE, head_dim=8, floor=0.0):
    """attention() in float32 against softmax_attention: relative errors of output and gradients at most 1e-5.

    floor: the least that a norm counts for, as a share of g's. (The gradient of a query that sees one key is 0: only noise to compare.)
    """
    mask = spans.dense_mask()
    B, S, _ = mask.shape
    torch.manual_seed(S)
    q, g = torch.randn(2, B, n_kv_head * group, S, head_dim)
    k, v = torch.randn(2, B, n_kv_head, S, head_dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernel, "TILE", tile)
        got = with_gradients(lambda *qkv: attention(*qkv, spans), q, k, v, g, torch.float32)
    want = with_gradients(lambda *qkv: softmax_attention(*qkv, mask), q, k, v, g, torch.float64)
    for x, y in zip(got, want):
        assert (x - y).norm() <= 1e-5 * max(y.norm(), floor * g.norm())
    return got


# --- spans --------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=200)
@given(packings(), st.sampled_from([1, 2, 3, 4, 5, 16, 40, None]), st.booleans())
def test_the_mask_is_the_table(rows, K, noisy):
    spans = Spans.of(*packed(*rows), K, noisy=noisy)
    assert torch.equal(spans.dense_mask(), torch.stack([who_sees(lengths, K, noisy) for lengths in rows]))
    place = torch.tensor([[i - block_of(i, lengths, K)[0] for i in range(sum(lengths))] for lengths in rows])
    assert torch.equal(spans.positions, place.repeat(1, 2) if noisy else place)


@settings(deadline=None, max_examples=100)
@given(packings(), st.sampled_from(list(ATTENTION_OF)), st.sampled_from([1, 2, 3, 4, 40]))
def test_the_mask_of_each_objective(rows, objective, K):
    size, noisy = ATTENTION_OF[objective]
    spans = spans_for(Recipe(objective, block_size=K, mask_id=0), *packed(*rows))
    want = torch.stack([who_sees(lengths, K if size == "K" else size, noisy) for lengths in rows])
    assert torch.equal(spans.dense_mask(), want)


def test_the_picture_of_the_docstring():
    mask = Spans.of(*packed([8]), 4, noisy=True).dense_mask()[0]
    shown = ["".join(".#"[int(mask[i, j])] for j in (0, 4, 8, 12)) for i in (0, 4, 8, 12)]
    assert shown == ["#...", ".##.", "..#.", "..##"]


# --- attention ----------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=200)
@given(packings(max_T=20), st.sampled_from([1, 2, 3, 4, 40, None]), st.booleans(), st.integers(1, 8), st.integers(1, 3),
       st.sampled_from([1, 2, 3, 5, 8, 64]))
def test_tiles_give_the_dense_softmax(rows, K, noisy, group, n_kv_head, tile):
    compare(Spans.of(*packed(*rows), K, noisy=noisy), n_kv_head, group, tile, floor=0.1)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_query_heads(group):
    compare(Spans.of(*packed([9, 1, 14], [24]), 4, noisy=True), 2, group, tile=7)


@pytest.mark.parametrize("K, noisy", [(1, False), (None, False), (4, True), (64, True)])
def test_rows_longer_than_a_default_tile(K, noisy):
    T = 2 * attention_kernel.TILE + 44
    compare(Spans.of(*packed([T], [3, 130, 1, T - 134]), K, noisy=noisy), 1, 2)


@pytest.mark.parametrize("w", [0, 1, 3, 24])
def test_annealed_spans(w):
    """Attention-mask annealing: w more tokens to the right of a causal mask. Blocks are then no partition."""
    doc_start, doc_end = packed([15, 1, 8])
    i = torch.arange(24, dtype=torch.int32)[None]
    spans = Spans(doc_start, doc_end, torch.maximum(doc_start, i - w), torch.minimum(doc_end, i + 1 + w))
    causal, bidirectional = (who_sees([15, 1, 8], K, False) for K in (1, None))
    mask = spans.dense_mask()[0]
    assert (mask >= causal).all() and (mask <= bidirectional).all()
    assert torch.equal(mask, causal) == (w == 0) and torch.equal(mask, bidirectional) == (w == 24)
    compare(spans, 2, 2, tile=5)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("tile", [1, 4, 128])
def test_queries_without_keys(noisy, tile):
    """Row 0 ends in 5 positions with empty spans, row 1 is nothing else: zeros and zero gradients, never NaN."""
    doc_start, doc_end = packed([4, 3, 5], [12])
    empty = torch.zeros(2, 12, dtype=torch.bool)
    empty[0, 7:] = empty[1] = True
    whole = Spans.of(doc_start, doc_end, 2, noisy=noisy)
    doc_end, block_start, block_end = (torch.where(empty, doc_start, x)
                                       for x in (doc_end, whole.block_start, whole.block_end))
    spans = Spans(doc_start, doc_end, block_start, block_end, noisy)
    out, *grads = compare(spans, 2, 2, tile)
    empty = empty.repeat(1, 2) if noisy else empty
    for x in (out, *grads):
        assert (x.transpose(1, 2)[empty] == 0).all() and x.isfinite().all()
        assert (x.transpose(1, 2)[~empty] != 0).any()


def test_nothing_to_see_at_all():
    zero = torch.zeros(1, 6, dtype=torch.int32)
    q, k, v, g = torch.randn(4, 1, 2, 6, 8)
    assert all((x == 0).all() for x in with_gradients(lambda *qkv: attention(*qkv, Spans(*[zero] * 4)), q, k, v, g,
                                                      torch.float32))


@pytest.mark.parametrize("K", [1, 4, None])
def test_queries_against_a_cache(K):
    """The last S queries alone, against all the keys, get what they got among all the queries."""
    doc_start, doc_end = packed([5, 18], [23])
    q, k, v = (torch.randn(2, heads, 23, 8) for heads in (4, 2, 2))
    whole = attention(q, k, v, Spans.of(doc_start, doc_end, K))
    for first in (1, 5, 13, 22):
        tail = attention(q[:, :, first:], k, v, Spans.of(doc_start[:, first:], doc_end[:, first:], K, first=first))
        torch.testing.assert_close(tail, whole[:, :, first:])


# --- the whole model ----------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=200)
@given(packings(max_T=12, max_rows=1), st.sampled_from(list(ATTENTION_OF)), st.sampled_from([1, 2, 3, 4, 40]),
       st.sampled_from([2, 3]), st.sampled_from([3, 128]), st.integers(0, 99))
def test_a_hidden_state_moves_only_with_what_it_may_see(rows, objective, K, n_layer, tile, seed):
    """Every token of [xt ; x0] is changed, one at a time. A position none of whose paths of n_layer hops leads to it
    keeps its hidden state to the last bit; one that sees it directly does not."""
    size, noisy = ATTENTION_OF[objective]
    sees = who_sees(rows[0], K if size == "K" else size, noisy)
    S = len(sees)
    reaches = torch.linalg.matrix_power((sees | torch.eye(S, dtype=torch.bool)).double(), n_layer) > 0

    torch.manual_seed(seed)
    net = Transformer(ModelConfig(vocab_size=11, d_model=8, n_layer=n_layer, n_head=2, n_kv_head=1, head_dim=4, d_ff=12,
                                  context=32)).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(11, (1, S)).expand(S, S)
    changed = (tokens + torch.eye(S, dtype=torch.int64)) % 11  # row j: token j is another one
    doc_start, doc_end = (x.expand(S, -1) for x in packed(*rows))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_kernel, "TILE", tile)
        spans = spans_for(Recipe(objective, block_size=K, mask_id=0), doc_start, doc_end)
        moved = (net(changed, spans) - net(tokens, spans)).abs().amax(-1).T  # [i, j]: hidden i by token j
    assert (moved[~reaches] == 0).all()
    assert (moved[sees] > 0).all()


# --- the kernel, as far as a machine without a GPU can tell ----------------------------------------------------------

@pytest.mark.skipif(attention_kernel.triton is None or attention_kernel.INTERPRETED, reason="needs triton as a compiler")
@pytest.mark.parametrize("kernel", ["forward_kernel", "dq_kernel", "dkdv_kernel"])
@pytest.mark.parametrize("dtype, head_dim, capability", [("bf16", 128, 90), ("fp32", 40, 90), ("fp16", 64, 80)])
def test_the_kernels_compile_for_hopper_and_ampere(kernel, dtype, head_dim, capability):
    from bench.kernel_resources import compiled
    for noisy in (True, False):
        binary = compiled(getattr(attention_kernel, kernel), dict(M=32, N=32, num_warps=4, num_stages=2), head_dim, dtype,
                          noisy, capability)
        assert len(binary.asm["cubin"]) > 0


def test_where_the_kernel_does_not_serve_one_line_says_why(capsys, monkeypatch):
    attention_kernel.say_once.cache_clear()
    monkeypatch.setattr(attention_kernel, "INTERPRETED", False)
    for _ in range(2):
        compare(Spans.of(*packed([9]), 4), 1, 1)
    said = capsys.readouterr().err
    assert said.count("attention: PyTorch tiles, since ") == 1
    assert attention_kernel.triton is None or attention_kernel.why_tiled("cuda", torch.bfloat16, 128) is None
    monkeypatch.setattr(attention_kernel, "triton", None)
    assert attention_kernel.why_tiled("cuda", torch.bfloat16, 128) == "triton is not installed"
