"""Attention against a float64 softmax over the dense mask, and a whole Transformer against
reachability: what a token may not see moves its hidden state by exactly 0.

Run as `python -m pytest tests` from the repository's root.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ATTENTION_OF, packed, packings, softmax_attention, who_sees, with_gradients

import attention_kernel
import spans as spans_file
from attention_kernel import attention
from configurator import Mistake
from diffusion import Recipe, spans_for
from model import ModelConfig, Transformer
from spans import CacheSpans, Spans

ROOT = Path(__file__).parent.parent


def compare(spans, n_kv_head, group, tile=spans_file.TILE, head_dim=8, floor=0.0, noisy_only=False):
    """attention() in float32 against softmax_attention: relative errors at most 1e-5.

    Output and gradients. noisy_only: the queries are those of the noisy half alone.
    floor: the least that a norm counts for, as a share of g's. (The gradient of a query that sees
    one key is 0: only noise to compare.)
    """
    mask = spans.dense_mask()
    B, S, _ = mask.shape
    Q = S // 2 if noisy_only else S
    torch.manual_seed(S)
    q, g = torch.randn(2, B, n_kv_head * group, Q, head_dim)
    k, v = torch.randn(2, B, n_kv_head, S, head_dim)

    def ours(q, k, v):
        return attention(q, k, v, spans)

    def theirs(q, k, v):
        return softmax_attention(q, k, v, mask[:, :Q])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans_file, "TILE", tile)
        got = with_gradients(ours, q, k, v, g, torch.float32)
    want = with_gradients(theirs, q, k, v, g, torch.float64)
    for x, y in zip(got, want):
        assert (x - y).norm() <= 1e-5 * max(y.norm(), floor * g.norm())
    return got


# --- attention ------------------------------------------------------------------------------------

def test_any_memory_layout_of_sdpas_result_will_do(monkeypatch):
    """CUDA's memory-efficient backend returns (B, S, H, D) transposed."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def transposed(*args, **kwargs):
        return sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", transposed)
    compare(Spans.of(*packed([20]), 4, noisy=True), n_kv_head=2, group=3)


def test_sequences_beyond_32_bit_offsets_take_the_tiles(monkeypatch):
    taken = []
    monkeypatch.setattr(attention_kernel, "why_tiled", lambda *_: None)
    monkeypatch.setattr(attention_kernel, "tiled_attention", lambda *_: taken.append("tiles"))
    monkeypatch.setattr(attention_kernel, "kernel_forward",
                        lambda *_: taken.append("kernel") or [0])
    for T, heads in ((2**18 - 1, 8), (2**18, 8), (2**18 - 1, 64), (2**18, 64), (2**17 - 1, 64)):
        bounds = torch.zeros(1, T, dtype=torch.int32, device="meta")
        spans = Spans(bounds, bounds, bounds, bounds, noisy=True)
        q = torch.empty(1, heads, T, 128, device="meta")
        k = torch.empty(1, 8, 2 * T, 128, device="meta")
        attention(q, k, k, spans)
    assert taken == ["kernel", "tiles", "tiles", "tiles", "kernel"]

group_sizes = st.integers(1, 8)
tile_sizes = st.sampled_from([1, 2, 3, 5, 8, 64])
block_sizes = st.sampled_from([1, 2, 3, 4, 40, None])


@settings(deadline=None, max_examples=200)
@given(packings(max_T=20), block_sizes, st.booleans(), group_sizes, st.integers(1, 3), tile_sizes)
def test_tiles_give_the_dense_softmax(rows, K, noisy, group, n_kv_head, tile):
    compare(Spans.of(*packed(*rows), K, noisy=noisy), n_kv_head, group, tile, floor=0.1)


@settings(deadline=None, max_examples=100)
@given(packings(max_T=20), block_sizes, group_sizes, st.integers(1, 3), tile_sizes)
def test_noisy_queries_alone_give_the_dense_softmax(rows, K, group, n_kv_head, tile):
    spans = Spans.of(*packed(*rows), K, noisy=True)
    compare(spans, n_kv_head, group, tile, floor=0.1, noisy_only=True)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_query_heads(group):
    compare(Spans.of(*packed([9, 1, 14], [24]), 4, noisy=True), 2, group, tile=7)


@pytest.mark.parametrize("K, noisy", [(1, False), (None, False), (4, True), (64, True)])
def test_rows_longer_than_a_default_tile(K, noisy):
    T = 2 * spans_file.TILE + 44
    spans = Spans.of(*packed([T], [3, 130, 1, T - 134]), K, noisy=noisy)
    compare(spans, 1, 2)
    if noisy:
        compare(spans, 1, 2, noisy_only=True)


def test_noisy_queries_alone_give_the_same_bits_as_among_all(monkeypatch):
    """And tiles of clean queries are not computed."""
    spans = Spans.of(*packed([9, 1, 14], [24]), 4, noisy=True)
    q, k, v = (torch.randn(2, heads, 48, 8) for heads in (4, 2, 2))
    computed = []
    grouped_attention = attention_kernel.grouped_attention

    def counted(q, *rest):
        computed.append(q.shape[2])
        return grouped_attention(q, *rest)

    monkeypatch.setattr(attention_kernel, "grouped_attention", counted)
    monkeypatch.setattr(spans_file, "TILE", 8)
    whole = attention(q, k, v, spans)
    assert sum(computed) == 48
    computed.clear()
    assert torch.equal(attention(q[:, :, :24], k, v, spans), whole[:, :, :24])
    assert sum(computed) == 24


@pytest.mark.parametrize("w", [0, 1, 3, 24])
def test_annealed_spans(w):
    """Attention-mask annealing: w more tokens to the right. Blocks are then no partition."""
    doc_start, doc_end = packed([15, 1, 8])
    i = torch.arange(24, dtype=torch.int32)[None]
    block_start, block_end = torch.maximum(doc_start, i - w), torch.minimum(doc_end, i + 1 + w)
    spans = Spans(doc_start, doc_end, block_start, block_end)
    causal, bidirectional = (who_sees([15, 1, 8], K, False) for K in (1, None))
    mask = spans.dense_mask()[0]
    assert (mask >= causal).all() and (mask <= bidirectional).all()
    assert torch.equal(mask, causal) == (w == 0)
    assert torch.equal(mask, bidirectional) == (w == 24)
    compare(spans, 2, 2, tile=5)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("tile", [1, 4, 128])
def test_queries_without_keys(noisy, tile):
    """Row 0 ends in 5 positions with empty spans, row 1 is nothing else: zeros, never NaN."""
    doc_start, doc_end = packed([4, 3, 5], [12])
    empty = torch.zeros(2, 12, dtype=torch.bool)
    empty[0, 7:] = True
    empty[1] = True
    whole = Spans.of(doc_start, doc_end, 2, noisy=noisy)
    doc_end = torch.where(empty, doc_start, doc_end)
    block_start = torch.where(empty, doc_start, whole.block_start)
    block_end = torch.where(empty, doc_start, whole.block_end)
    spans = Spans(doc_start, doc_end, block_start, block_end, noisy)
    everyone = empty.repeat(1, 2) if noisy else empty
    for noisy_only in ((False, True) if noisy else (False,)):
        out, dq, dk, dv = compare(spans, 2, 2, tile, noisy_only=noisy_only)
        nobody = empty if noisy_only else everyone  # queries that see nobody
        for x, is_empty in ((out, nobody), (dq, nobody), (dk, everyone), (dv, everyone)):
            assert (x.transpose(1, 2)[is_empty] == 0).all() and x.isfinite().all()
            assert (x.transpose(1, 2)[~is_empty] != 0).any()


def test_nothing_to_see_at_all():
    zero = torch.zeros(1, 6, dtype=torch.int32)
    spans = Spans(zero, zero, zero, zero)
    q, k, v, g = torch.randn(4, 1, 2, 6, 8)
    found = with_gradients(lambda *qkv: attention(*qkv, spans), q, k, v, g, torch.float32)
    assert all((x == 0).all() for x in found)


@pytest.mark.parametrize("K", [1, 4, None])
def test_queries_against_a_cache(K):
    """The last S queries alone, against all the keys, get what they got among all the queries."""
    doc_start, doc_end = packed([5, 18], [23])
    q, k, v = (torch.randn(2, heads, 23, 8) for heads in (4, 2, 2))
    whole = attention(q, k, v, Spans.of(doc_start, doc_end, K))
    spans = Spans.of(doc_start, doc_end, K)
    for first in (1, 5, 13, 22):
        zero = torch.zeros(2, 23 - first, dtype=torch.int32)
        last = CacheSpans(spans.positions[:, first:], spans.doc_start[:, first:],
                          spans.block_end[:, first:], zero, zero, 23)
        tail = attention(q[:, :, first:], k, v, last)
        torch.testing.assert_close(tail, whole[:, :, first:])


# --- the whole model ------------------------------------------------------------------------------

@settings(deadline=None, max_examples=200)
@given(packings(max_T=12, max_rows=1), st.sampled_from(list(ATTENTION_OF)),
       st.sampled_from([1, 2, 3, 4, 40]), st.sampled_from([2, 3]), st.sampled_from([3, 128]),
       st.integers(0, 99))
def test_a_hidden_state_moves_only_with_what_it_may_see(rows, objective, K, n_layer, tile, seed):
    """Every token of [xt ; x0] is changed, one at a time. A position none of whose paths of n_layer
    hops leads to it keeps its hidden state to the last bit; one that sees it directly does not."""
    size, noisy = ATTENTION_OF[objective]
    sees = who_sees(rows[0], K if size == "K" else size, noisy)
    S = len(sees)
    one_hop = (sees | torch.eye(S, dtype=torch.bool)).double()
    reaches = torch.linalg.matrix_power(one_hop, n_layer) > 0

    torch.manual_seed(seed)
    cfg = ModelConfig(vocab_size=11, d_model=8, n_layer=n_layer, n_head=2, n_kv_head=1, head_dim=4,
                      d_ff=12, context=32)
    net = Transformer(cfg).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randint(11, (1, S)).expand(S, S)
    changed = (tokens + torch.eye(S, dtype=torch.int64)) % 11  # row j: token j is another one
    doc_start, doc_end = (x.expand(S, -1) for x in packed(*rows))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(spans_file, "TILE", tile)
        spans = spans_for(Recipe(objective, block_size=K, mask_id=0), doc_start, doc_end)
        moved = net(changed, spans) - net(tokens, spans)  # (S, S, d_model), row j: by token j
        moved = moved.abs().amax(-1).T  # [i, j]: hidden state i by token j
    assert (moved[~reaches] == 0).all()
    assert (moved[sees] > 0).all()


def test_a_gradient_under_a_mask_is_finite_where_all_logits_are_low():
    """In bfloat16 cuDNN's is not, for lengths like 704 (pytorch issue 196678): never chosen."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, k, v = 0.1 * torch.randn(3, 1, 1, 704, 64, device=device, dtype=torch.bfloat16)
    q[..., 0], k[..., 0] = 1, -960  # logits of about -120
    inputs = [x.requires_grad_() for x in (q, k, v)]
    i = torch.arange(704, device=device)[None]
    none = torch.zeros_like(i)
    out = attention(*inputs, CacheSpans(i, none, i + 1, none, none, 704))
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all()


# --- the benchmark, as far as it goes without a GPU -----------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["--smoke=true", "--out=/no/such/folder/x.md"], "/no/such/folder/x.md cannot be written"),
    (["--smoke=true", "--repeats=0"], "repeats is an int from 1"),
    (["--smoke=true", "--sizes=[64, 0]"], "sizes holds 0"),
    (["--smoke=true", "--blocks=[]"], "blocks is empty"),
    (["--smoke=true", "--heads=3", "--kv_heads=2"], "kv_heads=2 must divide heads=3"),
    pytest.param([], "needs a CUDA GPU", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one")),
])
def test_the_benchmark_measures_nothing_before_its_settings_are_right(words, message, monkeypatch):
    from bench import attention as bench

    monkeypatch.setattr(bench, "milliseconds", None)
    with pytest.raises(Mistake, match=message):
        bench.main(words)


def test_the_table_of_resources_is_not_computed_for_a_file_that_cannot_be_written(monkeypatch):
    from bench import kernel_resources

    monkeypatch.setattr(kernel_resources, "compiled", None)
    with pytest.raises(Mistake, match="cannot be written"):
        kernel_resources.main(["--out=/no/such/folder/x.md"])


# --- the kernel, as far as a machine without a GPU can tell ---------------------------------------

KERNELS = ("forward_kernel", "dq_kernel", "dkdv_kernel")
CHIPS = [("bf16", 128, 90), ("fp32", 40, 90), ("fp16", 64, 80)]  # dtype, head_dim, capability
HALVES = [(True, True), (True, False), (False, True)]  # NOISY, CLEAN_QUERIES
COMPILE = """
import itertools
from bench.kernel_resources import attention_kernel, compiled
for kernel, chip, halves in itertools.product({kernels}, {chips}, {halves}):
    binary = compiled(getattr(attention_kernel, kernel), (32, 32, 4, 2), *chip, *halves)
    assert len(binary.asm["cubin"]) > 0
    print("compiled", kernel, *chip, *halves)
"""


def run_python(code):
    """In a process of its own, which does not interpret Triton. Returns what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           env=env)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_the_kernels_compile_for_hopper_and_ampere():
    pytest.importorskip("triton")
    printed = run_python(COMPILE.format(kernels=KERNELS, chips=CHIPS, halves=HALVES))
    assert printed.count("compiled") == len(KERNELS) * len(CHIPS) * len(HALVES)


USE = """
import sys
import torch
from attention_kernel import attention
from spans import Spans
doc_start = torch.zeros(1, 4, dtype=torch.int32)
q = torch.ones(1, 1, 4, 8)
attention(q, q, q, Spans.of(doc_start, doc_start + 4, 1))
print("torch._dynamo" in sys.modules, "triton" in sys.modules and not torch.cuda.is_available())
"""


def test_neither_the_compiler_nor_a_triton_without_a_gpu_is_loaded():
    assert run_python(USE) == "False False\n"


def test_where_the_kernel_does_not_serve_one_line_says_why(capsys, monkeypatch):
    attention_kernel.say_once.cache_clear()
    monkeypatch.setattr(attention_kernel, "INTERPRETED", False)
    for _ in range(2):
        compare(Spans.of(*packed([9]), 4), 1, 1)
    said = capsys.readouterr().err
    assert said.count("attention: PyTorch tiles, since ") == 1
    monkeypatch.setattr(attention_kernel, "triton", object())  # as if it were installed
    assert attention_kernel.why_tiled("cuda", torch.bfloat16, 128) is None
    assert attention_kernel.why_tiled("cuda", torch.bfloat16, 264) == "head_dim 264 is above 256"
    assert attention_kernel.why_tiled("cpu", torch.bfloat16, 128) == "the device is cpu, not cuda"
    monkeypatch.setattr(attention_kernel, "triton", None)
    assert attention_kernel.why_tiled("cuda", torch.bfloat16, 128) == "triton is not installed"


def test_compiled_tiles_give_the_eager_numbers_for_every_packing():
    """And the tiles are left out of the graph: a new packing is not compiled again."""
    from torch._dynamo.utils import counters

    def block(q, k, v, spans):
        return 2 * attention(q + 1, k, v, spans)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager")
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    graphs = []
    for row in ([16], [3, 13], [8, 8], [1] * 16, [5, 11], [2, 14]):
        spans = Spans.of(*packed(row), 4)
        assert torch.equal(compiled(q, k, v, spans), block(q, k, v, spans))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0]
