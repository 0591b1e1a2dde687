"""The Triton kernel against a float64 softmax: through Triton's interpreter, or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_attention_kernel_triton.py

That is a run of its own, since the variable is process-wide. Without CUDA and without the
interpreter the whole file is skipped.
"""
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import packed, softmax_attention, with_gradients
from torch._dynamo.utils import counters

import attention_kernel
from attention_kernel import (
    INTERPRETED,
    attention,
    kernel_backward,
    kernel_forward,
    tiled_attention,
)
from diffusion import Draw, Recipe, corrupt, weighted_loss
from loader import Batch
from model import ModelConfig, Transformer
from parallel import recompute_blocks
from spans import CacheSpans, Spans

pytest.importorskip("triton")
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED,
                                reason="no CUDA here, and TRITON_INTERPRET=1 is not set")
GROUPS = range(1, 9) if GPU else (1, 2, 3, 5)  # query heads for each head of k and v
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device, which the interpreter is not")
no_bfloat16 = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter multiplies bfloat16's bits as integers")


def spans_of(rows, K, noisy, right):
    doc_start, doc_end = packed(*rows, device=DEVICE)
    if right is None:
        return Spans.of(doc_start, doc_end, K, noisy)
    return Spans.annealed(doc_start, doc_end, right)


def dense(q, k, v, g, spans):
    """Output and gradients in float64. Queries may be those of the noisy half alone."""
    mask = spans.dense_mask()[:, :q.shape[2]]
    return with_gradients(lambda *qkv: softmax_attention(*qkv, mask), q, k, v, g, torch.float64)


def draw_qkv(spans, n_kv_head, group, head_dim, dtype=torch.float32, noisy_only=False):
    B, T = spans.doc_start.shape
    S = 2 * T if spans.noisy else T
    Q = T if noisy_only else S
    n_head = n_kv_head * group
    torch.manual_seed(0)
    shapes = ((Q, n_head), (S, n_kv_head), (S, n_kv_head), (Q, n_head))  # of q, k, v, g
    return [torch.randn(B, length, heads, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
            for length, heads in shapes]


def relative(x, y, floor):
    return ((x.double() - y).norm() / max(y.norm(), floor)).item()


def full_of_nan(x):
    """In place of `heads_last`: what the kernel does not write shows."""
    return torch.full_like(x.transpose(1, 2).contiguous(), torch.nan).transpose(1, 2)


def check(spans, n_kv_head=1, group=1, head_dim=16, dtype=torch.float32, bound=1e-5,
          noisy_only=False):
    """Output and three gradients within `bound`, relative in norm; every element is written."""
    q, k, v, g = draw_qkv(spans, n_kv_head, group, head_dim, dtype, noisy_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_kernel, "heads_last", full_of_nan)
        out, lse = kernel_forward(q, k, v, spans.stacked(), spans.noisy)
        grads = kernel_backward(g, q, k, v, out, lse, spans.stacked(), spans.noisy)
    want = dense(q, k, v, g, spans)
    floor = 0.1 * g.double().norm()  # where each query sees one key, dQ and dK are 0
    for name, x, y in zip(("out", "dq", "dk", "dv"), (out, *grads), want):
        assert not x.isnan().any(), name
        assert relative(x, y, floor) <= bound, (name, relative(x, y, floor))
    mask = spans.dense_mask()[:, :q.shape[2]]
    nobody = ~mask.any(-1)[:, None].expand(lse.shape)  # rows without a key
    assert (out[nobody] == 0).all() and (grads[0][nobody] == 0).all()
    assert torch.equal(lse == torch.inf, nobody)
    unseen = ~mask.any(1)[:, None].expand(k.shape[:3])  # keys without a query
    assert (grads[1][unseen] == 0).all() and (grads[2][unseen] == 0).all()
    return out, grads


def partitions(T):
    """Rows of T positions cut into documents and gaps, from many tiny ones to a single one."""
    one_length = st.one_of(st.just(1), st.integers(1, 9), st.integers(1, T))
    lengths = st.lists(one_length, min_size=1, max_size=T)
    gaps = st.sets(st.integers(0, T), max_size=2)

    def fit(drawn):
        lengths, gaps = drawn
        row, left = [], T
        for n in lengths:
            if left:
                row.append(min(n, left))
                left -= row[-1]
        if left:
            row.append(left)
        return [-n if i in gaps else n for i, n in enumerate(row)]

    return st.tuples(lengths, gaps).map(fit)


@st.composite
def cases(draw):
    T = draw(st.integers(1, 36))  # up to three of the interpreter's tiles
    rows = draw(st.lists(partitions(T), min_size=1, max_size=2))
    K = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 33, 64, None]))
    right = draw(st.none() | st.integers(0, T))  # the annealed edge, without [xt ; x0]
    return rows, K, draw(st.booleans()), right


@settings(deadline=None, max_examples=400 if GPU else 48)
@given(cases(), st.integers(1, 2), st.sampled_from(GROUPS), st.sampled_from([16, 8, 24, 32, 40]))
@example(([[20]], 4, True, None), 1, 1, 16)
@example(([[-20], [20]], 4, True, None), 1, 2, 16)
@example(([[1] * 20], 1, True, None), 2, 1, 16)
@example(([[44]], None, False, None), 1, 8, 16)
@example(([[17, 27]], 64, True, None), 1, 1, 16)
@example(([[44]], None, False, 5), 1, 1, 16)
def test_output_and_gradients_equal_the_dense_reference(case, n_kv_head, group, head_dim):
    rows, K, noisy, right = case
    check(spans_of(rows, K, noisy, right), n_kv_head if group < 3 else 1, group, head_dim)


@settings(deadline=None, max_examples=200 if GPU else 24)
@given(cases(), st.integers(1, 2), st.integers(1, 4), st.sampled_from([16, 24]))
@example(([[20]], 4, True, None), 1, 1, 16)
@example(([[-20], [20]], 4, True, None), 1, 2, 16)
@example(([[1] * 20], 1, True, None), 2, 1, 16)
@example(([[17, 27]], 64, True, None), 1, 1, 16)
def test_noisy_queries_alone_equal_the_dense_reference(case, n_kv_head, group, head_dim):
    """As in the last block, where the clean half's queries are not read."""
    rows, K, _, _ = case
    check(spans_of(rows, K, True, None), n_kv_head, group, head_dim, noisy_only=True)


def test_noisy_queries_alone_give_the_same_bits_as_among_all():
    spans = spans_of([[40, 24]], 4, True, None)
    q, k, v, _ = draw_qkv(spans, 2, 2, 16)
    whole, whole_lse = kernel_forward(q, k, v, spans.stacked(), True)
    half, half_lse = kernel_forward(q[:, :, :64], k, v, spans.stacked(), True)
    if not GPU:  # there the two may choose different tiles
        assert torch.equal(half, whole[:, :, :64])
        assert torch.equal(half_lse, whole_lse[:, :, :64])


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_head_dims_up_to_256(head_dim):
    check(spans_of([[20, 13]], 4, True, None), 1, 2, head_dim)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_any_tile_size_gives_the_same(monkeypatch, tile):
    if GPU:
        monkeypatch.setattr(attention_kernel, "CHOICES", [(tile, tile, 4, 2)])
        attention_kernel.tuned.cache_clear()
    monkeypatch.setattr(attention_kernel, "INTERPRETED_TILE", tile)
    check(spans_of([[70, 26]], 4, True, None))
    check(spans_of([[70, 26]], 4, True, None), noisy_only=True)
    check(spans_of([[96]], 1, False, None))
    if GPU:
        attention_kernel.tuned.cache_clear()


def test_tiles_inside_the_spans_are_used_whole():
    """Long enough that border, inside and border all occur, forward and back, clean and noisy."""
    for K, noisy in ((1, False), (4, True), (33, True), (None, False)):
        check(spans_of([[130]], K, noisy, None))
        if noisy:
            check(spans_of([[130]], K, noisy, None), noisy_only=True)


@pytest.mark.parametrize("dtype, bound", [
    (torch.float16, 2e-3), pytest.param(torch.bfloat16, 1e-2, marks=no_bfloat16)])
def test_half_precision(dtype, bound):
    """8 and 11 significant bits: rounding each product's inputs, 2^-9 and 2^-12, grows to a few."""
    check(spans_of([[40, 24]], 4, True, None), 1, 2, 32, dtype, bound)


def test_a_run_repeats_to_the_bit():
    spans = spans_of([[40, 24]], 4, True, None)
    (a, more), (b, again) = check(spans, 2, 2), check(spans, 2, 2)
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(more, again))


def test_non_contiguous_inputs():
    spans = spans_of([[33]], 4, True, None)
    q, k, v, _ = draw_qkv(spans, 1, 2, 16)
    loose = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]  # last stride 2
    expected = kernel_forward(q, k, v, spans.stacked(), True)
    found = kernel_forward(*loose, spans.stacked(), True)
    for x, y in zip(found, expected):
        assert torch.equal(x, y)


def test_the_custom_ops_are_well_formed():
    spans = spans_of([[9, 8]], 4, True, None)
    for noisy_only in (False, True):
        q, k, v, _ = draw_qkv(spans, 1, 2, 16, noisy_only=noisy_only)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(kernel_forward, (*leaves, spans.stacked(), True))


def toy(seed=0):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(64, 32, 2, 2, 1, 16, 48, 64)).to(DEVICE)


def toy_batch(step):
    """Two packed rows of 24 tokens, noised."""
    doc_start, doc_end = packed([23, 1], [1, 5, 18])
    x0 = torch.randint(4, 64, (2, 24), generator=torch.Generator().manual_seed(step))
    maskable = torch.arange(24) != doc_start
    batch = Batch(x0, doc_start, doc_end, maskable, np.arange(2))
    noised = corrupt(batch, RECIPE, Draw(seed=0, step=step, rows=range(2), batch_rows=2))
    return noised.rows(0, 2, DEVICE)


RECIPE = Recipe("block", mask_id=2, block_size=4)


def losses(steps, monkeypatch, path, wrap=lambda model: model):
    """The toy's losses over some AdamW steps, with attention by `path`."""
    monkeypatch.setattr("model.attention", path)
    model = toy()
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    out = []
    for step in range(steps):
        batch = toy_batch(step)
        loss = weighted_loss(wrapped, batch, RECIPE) / batch.maskable.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return torch.tensor(out)


def test_training_with_the_kernel_gives_the_loss_curve_of_the_reference(monkeypatch):
    steps = 50 if GPU else 5
    kernel = losses(steps, monkeypatch, attention)
    tiles = losses(steps, monkeypatch, tiled_attention)
    assert torch.allclose(kernel, tiles, rtol=1e-4)


@pytest.mark.parametrize("recompute", [
    "selective", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("none", "full"))])
def test_compiled_blocks_are_one_graph_and_give_the_eager_losses(monkeypatch, recompute):
    backend = "inductor" if GPU else "aot_eager"

    def compiled(model):
        recompute_blocks(model, recompute)
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend=backend)
        return model

    torch._dynamo.reset()
    counters.clear()
    found = losses(2, monkeypatch, attention, compiled)
    # all blocks but the last, the last with a number of positions to read, and with any number
    assert counters["stats"]["unique_graphs"] == 3
    assert torch.allclose(found, losses(2, monkeypatch, attention), rtol=1e-5)


def test_checkpointed_gradients_equal_eager_ones():
    spans = spans_of([[9, 8]], 4, True, None)
    q, k, v, g = draw_qkv(spans, 1, 2, 16)

    def checkpointed(*arguments):
        return torch.utils.checkpoint.checkpoint(attention, *arguments, use_reentrant=False)

    found = []
    for call in (attention, checkpointed):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(call(*leaves, spans), leaves, g))
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_the_kernel_is_what_attention_runs_and_a_cache_takes_the_other_path(monkeypatch):
    called = []

    def counted(q, *rest):
        called.append(q.shape[2])
        return q, None

    monkeypatch.setattr(attention_kernel, "kernel_forward", counted)
    spans = spans_of([[12]], 4, False, None)
    q, k, v, _ = draw_qkv(spans, 1, 1, 16)
    attention(q, k, v, spans)
    assert called == [12]
    last = CacheSpans(spans.positions[:, 8:], spans.doc_start[:, 8:], spans.block_end[:, 8:],
                      spans.doc_start[:, 8:], spans.doc_start[:, 8:], 12)
    assert attention(q[:, :, 8:], k, v, last).shape == (1, 1, 4, 16) and called == [12]
    spans = spans_of([[12]], 4, True, None)
    q, k, v, _ = draw_qkv(spans, 1, 1, 16, noisy_only=True)
    attention(q, k, v, spans)
    assert called == [12, 12]


@on_gpu
def test_bf16_is_no_worse_than_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    spans = spans_of([[700, 324]], 4, True, None)
    q, k, v, g = draw_qkv(spans, 2, 4, 128, torch.bfloat16)
    want = dense(q, k, v, g, spans)
    mask = spans.dense_mask()

    def sees(b, h, i, j):
        return mask[b, i, j]

    block_mask = create_block_mask(sees, 1, None, 2048, 2048, device="cuda")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    flex = torch.compile(flex_attention)(*leaves, block_mask=block_mask, enable_gqa=True)
    flex_grads = torch.autograd.grad(flex, leaves, g)
    out, grads = check(spans, 2, 4, 128, torch.bfloat16, 1e-2)
    for ours, theirs, y in zip((out, *grads), (flex, *flex_grads), want):
        # 5 %: both round, in another order
        assert relative(ours, y, 0) <= 1.05 * relative(theirs.detach(), y, 0)


@on_gpu
def test_memory_is_linear_in_T():
    peaks = []
    for T in (4096, 8192):
        spans = spans_of([[T]], 4, True, None)
        q, k, v, g = draw_qkv(spans, 2, 4, 64, torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = kernel_forward(q, k, v, spans.stacked(), True)
        kernel_backward(g, q, k, v, out, lse, spans.stacked(), True)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.1 * peaks[0]
