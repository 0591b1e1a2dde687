"""The Triton kernel against a dense softmax in float64: through Triton's interpreter on any machine, or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/test_attention_kernel_triton.py     # a run of its own: it is process-wide

Without CUDA and without the interpreter the whole file is skipped.
"""
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import attention_kernel
from attention_kernel import INTERPRETED, Spans, attention, kernel_backward, kernel_forward, tiled_attention
from diffusion import Recipe, corrupt, weighted_loss
from model import ModelConfig, Transformer
from parallel import recompute_blocks

pytest.importorskip("triton")
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(not GPU and not INTERPRETED, reason="no CUDA here, and TRITON_INTERPRET=1 is not set")
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device; the interpreter has no such thing")


def packed(rows):
    """doc_start and doc_end, (B, T) int32, of rows given as document lengths; a negative one is a gap seen by nobody."""
    bounds = []
    for lengths in rows:
        start, end, at = [], [], 0
        for n in lengths:
            start += [at] * abs(n)
            end += [at if n < 0 else at + n] * abs(n)
            at += abs(n)
        bounds.append((start, end))
    return (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in zip(*bounds))


def spans_of(rows, K, noisy, right):
    doc_start, doc_end = packed(rows)
    return Spans.of(doc_start, doc_end, K, noisy) if right is None else Spans.annealed(doc_start, doc_end, right)


def dense(q, k, v, g, spans):
    """Output and gradients in float64; a row that sees no key gets zeros."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    mask = spans.dense_mask()[:, None]
    scores = (q @ k.repeat_interleave(group, 1).mT / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    p = torch.where(mask.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    out = torch.where(p > 0, p, 0.0) @ v.repeat_interleave(group, 1)
    return out.detach(), *(x.nan_to_num() for x in torch.autograd.grad(out, (q, k, v), g.double()))


def draw_qkv(spans, n_kv_head, group, head_dim, dtype=torch.float32, seed=0):
    B, T = spans.doc_start.shape
    S = 2 * T if spans.noisy else T
    torch.manual_seed(seed)
    return [torch.randn(B, S, n, head_dim, device=DEVICE).to(dtype).transpose(1, 2)
            for n in (n_kv_head * group, n_kv_head, n_kv_head, n_kv_head * group)]


def relative(x, y, floor):
    return ((x.double() - y).norm() / max(y.norm(), floor)).item()


def check(spans, n_kv_head=1, group=1, head_dim=16, dtype=torch.float32, bound=1e-5):
    """Output and three gradients within `bound`, relative in norm; every element of every output written."""
    q, k, v, g = draw_qkv(spans, n_kv_head, group, head_dim, dtype)
    with pytest.MonkeyPatch.context() as patch:  # NaN in all fresh memory: what the kernel does not write shows
        patch.setattr(attention_kernel, "heads_last", lambda x: torch.full_like(x.transpose(1, 2).contiguous(),
                                                                               torch.nan).transpose(1, 2))
        out, lse = kernel_forward(q, k, v, spans.stacked(), spans.noisy)
        grads = kernel_backward(g, q, k, v, out, lse, spans.stacked(), spans.noisy)
    want = dense(q, k, v, g, spans)
    floor = 0.1 * g.double().norm()  # where every query sees one key, dQ and dK are 0: nothing to be relative to
    for name, x, y in zip(("out", "dq", "dk", "dv"), (out, *grads), want):
        assert not x.isnan().any(), name
        assert relative(x, y, floor) <= bound, (name, relative(x, y, floor))
    nobody = ~spans.dense_mask().any(-1)[:, None].expand(lse.shape)  # rows without a key
    assert (out[nobody] == 0).all() and (grads[0][nobody] == 0).all()
    assert torch.equal(lse == torch.inf, nobody)
    return out, grads


def partitions(T):
    """Rows of T positions cut into documents and gaps, from many tiny ones to a single one."""
    lengths = st.lists(st.one_of(st.just(1), st.integers(1, 9), st.integers(1, T)), min_size=1, max_size=T)

    def fit(ns):
        out, left = [], T
        for n in ns:
            if left:
                out.append(min(n, left))
                left -= out[-1]
        return out + [left] * (left > 0)

    return st.tuples(lengths.map(fit), st.sets(st.integers(0, T), max_size=2)).map(
        lambda x: [-n if i in x[1] else n for i, n in enumerate(x[0])])


@st.composite
def cases(draw):
    T = draw(st.integers(1, 44))
    rows = draw(st.lists(partitions(T), min_size=1, max_size=2))
    K = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 33, 64, None]))
    right = draw(st.none() | st.integers(0, T))  # the annealed edge, on xt alone
    return rows, K, draw(st.booleans()), right


@settings(deadline=None, max_examples=400 if GPU else 120)
@given(cases(), st.integers(1, 2), st.integers(1, 8), st.sampled_from([16, 8, 24, 32, 40]))
@example(([[20]], 4, True, None), 1, 1, 16)
@example(([[-20], [20]], 4, True, None), 1, 2, 16)
@example(([[1] * 20], 1, True, None), 2, 1, 16)
@example(([[44]], None, False, None), 1, 8, 16)
@example(([[17, 27]], 64, True, None), 1, 1, 16)
@example(([[44]], None, False, 5), 1, 1, 16)
def test_output_and_gradients_equal_the_dense_reference(case, n_kv_head, group, head_dim):
    rows, K, noisy, right = case
    check(spans_of(rows, K, noisy, right), n_kv_head if group < 3 else 1, group, head_dim)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_head_dims_up_to_256(head_dim):
    check(spans_of([[20, 13]], 4, True, None), 1, 2, head_dim)


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_any_tile_size_gives_the_same(monkeypatch, tile):
    if GPU:
        monkeypatch.setattr(attention_kernel, "CHOICES", [dict(M=tile, N=tile, num_warps=4, num_stages=2)])
        attention_kernel.tuned.cache_clear()
    monkeypatch.setattr(attention_kernel, "INTERPRETED_TILE", tile)
    check(spans_of([[70, 26]], 4, True, None))
    check(spans_of([[96]], 1, False, None))
    if GPU:
        attention_kernel.tuned.cache_clear()


def test_tiles_inside_the_spans_are_used_whole():
    """Long enough that border, inside and border all occur, forward and back, clean and noisy."""
    for K, noisy in ((1, False), (4, True), (33, True), (None, False)):
        check(spans_of([[130]], K, noisy, None))


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), pytest.param(torch.bfloat16, 1e-2, marks=pytest.mark.skipif(
    INTERPRETED, reason="the interpreter multiplies bfloat16's bits as integers"))])
def test_half_precision(dtype, bound):
    """8 and 11 significant bits: one rounding of the inputs of each product, 2^-9 and 2^-12, grows to a few of them."""
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
    for x, y in zip(kernel_forward(*loose, spans.stacked(), True), expected):
        assert torch.equal(x, y)


def test_the_custom_ops_are_well_formed():
    spans = spans_of([[9, 8]], 4, True, None)
    q, k, v, _ = (x.requires_grad_() for x in draw_qkv(spans, 1, 2, 16))
    torch.library.opcheck(kernel_forward, (q, k, v, spans.stacked(), True))


def toy(seed=0):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(64, 32, 2, 2, 1, 16, 48, 64)).to(DEVICE)


def toy_batch(step):
    """Four packed rows of 24 tokens, noised."""
    doc_start, doc_end = (x.cpu() for x in packed([[24], [10, 14], [1, 5, 18], [23, 1]]))
    x0 = torch.randint(4, 64, (4, 24), generator=torch.Generator().manual_seed(step))
    maskable = torch.arange(24) != doc_start
    return corrupt(x0, doc_start, doc_end, maskable, RECIPE, 0, step, range(4), 4).rows(0, 4, DEVICE)


RECIPE = Recipe("block", mask_id=2, block_size=4)


def losses(steps, monkeypatch, path, wrap=lambda model: model):
    """The toy's losses over some AdamW steps, with attention by `path`."""
    monkeypatch.setattr("model.attention", path)
    model = toy()
    wrapped, optimizer, out = wrap(model), torch.optim.AdamW(model.parameters(), lr=1e-2), []
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
    assert torch.allclose(losses(steps, monkeypatch, attention), losses(steps, monkeypatch, tiled_attention), rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_are_one_graph_and_give_the_eager_losses(monkeypatch, recompute):
    def compiled(model):
        recompute_blocks(model, recompute)
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, backend="inductor" if GPU else "aot_eager")
        return model

    torch._dynamo.reset()
    counters.clear()
    assert torch.allclose(losses(2, monkeypatch, attention, compiled), losses(2, monkeypatch, attention), rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "the blocks are alike: one graph serves them all"


def test_checkpointed_gradients_equal_eager_ones():
    spans = spans_of([[9, 8]], 4, True, None)
    q, k, v, g = draw_qkv(spans, 1, 2, 16)
    found = []
    for call in (attention, lambda *a: torch.utils.checkpoint.checkpoint(attention, *a, use_reentrant=False)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(call(*leaves, spans), leaves, g))
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_the_kernel_is_what_attention_runs_and_a_cache_takes_the_other_path(monkeypatch):
    called = []
    monkeypatch.setattr(attention_kernel, "kernel_forward", lambda *a: called.append(1) or (a[0], None))
    spans = spans_of([[12]], 4, False, None)
    q, k, v, _ = draw_qkv(spans, 1, 1, 16)
    attention(q, k, v, spans)
    assert called
    new = Spans.of(spans.doc_start[:, 8:], spans.doc_end[:, 8:], 4, first=8)
    assert attention(q[:, :, 8:], k, v, new).shape == (1, 1, 4, 16) and len(called) == 1


@on_gpu
def test_bf16_is_no_worse_than_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    spans = spans_of([[700, 324]], 4, True, None)
    q, k, v, g = draw_qkv(spans, 2, 4, 128, torch.bfloat16)
    want = dense(q, k, v, g, spans)
    mask = spans.dense_mask()
    block_mask = create_block_mask(lambda b, h, i, j: mask[b, i, j], 1, None, 2048, 2048, device="cuda")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    flex = torch.compile(flex_attention)(*leaves, block_mask=block_mask, enable_gqa=True)
    flex_grads = torch.autograd.grad(flex, leaves, g)
    out, grads = check(spans, 2, 4, 128, torch.bfloat16, 1e-2)
    for ours, theirs, y in zip((out, *grads), (flex, *flex_grads), want):
        assert relative(ours, y, 0) <= 1.05 * relative(theirs.detach(), y, 0)  # 5 %: both round, in another order


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
