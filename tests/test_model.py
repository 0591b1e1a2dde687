"""model.py: the same numbers as transformers' Llama, Qwen2 and Qwen3; documents, cache and chunks that change nothing."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import model as model_file
from spans import Spans
from model import KVCache, ModelConfig, Transformer, rope_angles, rotate
from tokenizer import Tokenizer, train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
SIZES = dict(
    vocab_size=271,
    d_model=32,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    head_dim=8,
    d_ff=48,
    context=64,
    rope_theta=777.0,
    norm_eps=1e-2,
    tie_embeddings=False,
)
VARIANTS = {  # what differs from SIZES, for every family that has it
    "GQA": {},
    "tied": {"tie_embeddings": True},
    "one key/value head": {"n_kv_head": 1},
    "no sharing": {"n_kv_head": 4},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 6, "tie_embeddings": True},
}
CASES = [
    (family, variant)
    for family in FAMILIES
    for variant in VARIANTS
    if family != "qwen2" or "heads" not in variant
]


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    path.write_text(train_tokenizer(["x = 1\n"], 260).to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok(tok_file):
    return Tokenizer(tok_file)


def randomised(module, seed=0):
    """Every parameter random: weights large enough to matter, norms around 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(
                1 + 0.3 * drawn
                if "norm" in name
                else 0.5 * drawn
                if name.endswith("bias")
                else 0.25 * drawn
            )
    return module.eval()


def ours(seed=0, **changes):
    return randomised(Transformer(ModelConfig(**SIZES | changes)), seed)


def spans_of(lengths, K, rows=1):
    """Spans of rows that hold documents of these lengths in blocks of K (None: one block each)."""
    lengths = torch.tensor(lengths)
    ends = lengths.cumsum(0)
    start, end = (
        x.repeat_interleave(lengths).int().repeat(rows, 1) for x in (ends - lengths, ends)
    )
    return Spans.of(start, end, K)


def additive_mask(lengths, K):
    """(1, 1, S, S): 0 where a query sees a key, -inf elsewhere, by the definition: its document, no later block."""
    places = [(d, i // K if K else 0) for d, n in enumerate(lengths) for i in range(n)]
    sees = torch.tensor([[dq == dk and bk <= bq for dk, bk in places] for dq, bq in places])
    return torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]


LAYOUTS = [([13], 1), ([13], None), ([13], 4), ([7, 1, 5], 1), ([7, 1, 5], None), ([7, 1, 5], 3)]


@torch.no_grad()
def check_same_logits(mine, theirs):
    tokens = torch.randint(SIZES["vocab_size"], (2, 13), generator=torch.Generator().manual_seed(1))
    causal = theirs(tokens).logits  # their own default mask and positions
    assert causal.abs().max() > 1, "numbers large enough for a comparison"
    torch.testing.assert_close(
        mine.logits(mine(tokens, spans_of([13], 1, 2))), causal, atol=1e-4, rtol=0
    )
    for lengths, K in LAYOUTS:
        positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
        mask = additive_mask(lengths, K).expand(2, -1, -1, -1)
        expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(
            mine.logits(mine(tokens, spans_of(lengths, K, 2))), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("family, variant", CASES)
def test_transformers_reads_our_folder_and_gives_the_same_logits(tmp_path, tok, family, variant):
    mine = ours(**FAMILIES[family], **VARIANTS[variant])
    checkpoint.write_model(
        tmp_path, mine, tok, SimpleNamespace(objective="block", shift=False, block_size=4)
    )
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert theirs.config.model_type == family and not any(
        info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    )
    check_same_logits(mine, theirs.eval())


@pytest.mark.parametrize("family, variant", CASES)
def test_we_read_transformers_folder_and_give_the_same_logits(tmp_path, tok_file, family, variant):
    sizes = SIZES | VARIANTS[variant]
    hf = {name: sizes[mine] for mine, name in checkpoint.HF_NAMES.items()}
    rope = {"rope_type": "default", "rope_theta": hf.pop("rope_theta")}
    config = transformers.AutoConfig.for_model(
        family, **hf, rope_parameters=rope, bos_token_id=0, eos_token_id=1
    )
    theirs = randomised(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    )
    theirs.save_pretrained(tmp_path)
    shutil.copyfile(tok_file, tmp_path / "tokenizer.json")
    mine, their_tok, _ = checkpoint.load(tmp_path)
    assert mine.cfg == ModelConfig(**sizes, **FAMILIES[family]) and their_tok.vocab_size == 260
    check_same_logits(mine, theirs)


def test_an_older_config_with_rope_theta_at_the_top_and_without_head_dim_reads_the_same(
    tmp_path, tok
):
    mine = ours()
    checkpoint.write_model(
        tmp_path, mine, tok, SimpleNamespace(objective="ar", shift=True, block_size=4)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.load(tmp_path)[0].cfg == mine.cfg


# --- positions and documents --------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    half=st.integers(1, 64),
    theta=st.floats(10, 1e6),
    m=st.integers(0, 500),
    n=st.integers(0, 500),
    by=st.integers(0, 500),
    seed=st.integers(0, 99),
)
def test_rope_keeps_lengths_and_its_products_depend_on_the_distance_alone(
    half, theta, m, n, by, seed
):
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=torch.Generator().manual_seed(seed))

    def at(x, position):
        return rotate(x, *rope_angles(torch.tensor([[position]]), 2 * half, theta))

    near, far = (at(q, m) * at(k, n)).sum(), (at(q, m + by) * at(k, n + by)).sum()
    torch.testing.assert_close(
        near, far, atol=2e-4 * q.norm().item() * k.norm().item(), rtol=0
    )  # float32 angles up to 1000
    torch.testing.assert_close(at(q, m).norm(), q.norm(), rtol=1e-5, atol=0)
    assert torch.equal(at(q, 0), q)


def test_rope_turns_channel_pairs_by_position_times_a_power_of_theta():
    cos, sin = rope_angles(torch.tensor([[0, 3]]), 8, 100.0)
    angles = 3 * 100.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(cos[0, 0], torch.stack([torch.ones(4), angles.cos()]))
    torch.testing.assert_close(sin[0, 0], torch.stack([torch.zeros(4), angles.sin()]))


@pytest.mark.parametrize("noisy", [False, True])
def test_positions_restart_at_documents(monkeypatch, noisy):
    """RoPE is relative, so no output would tell: look at what is turned by how much."""
    seen = []
    monkeypatch.setattr(
        model_file,
        "rope_angles",
        lambda positions, *rest: seen.append(positions) or rope_angles(positions, *rest),
    )
    spans = dataclasses.replace(spans_of([3, 1, 2], 2), noisy=noisy)
    ours()(torch.arange(6).repeat(1 + noisy)[None], spans)
    assert [p.tolist() for p in seen] == [[[0, 1, 2, 0, 0, 1] * (1 + noisy)]]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    K=st.sampled_from([None, 1, 2, 4]),
    family=st.sampled_from([*FAMILIES]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_packed_documents_are_what_each_is_alone(lengths, K, family, seed):
    net = ours(seed, **FAMILIES[family]).double()  # sums of other lengths round otherwise
    tokens = torch.randint(
        SIZES["vocab_size"], (1, sum(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    alone = [net(t, spans_of([t.shape[1]], K)) for t in tokens.split(lengths, 1)]
    torch.testing.assert_close(
        net(tokens, spans_of(lengths, K)), torch.cat(alone, 1), atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_the_clean_half_does_not_see_the_noise_and_the_noisy_half_restarts_its_positions():
    net, lengths, K = ours().double(), [7, 6], 4
    x0, xt = torch.randint(
        SIZES["vocab_size"], (2, 1, 13), generator=torch.Generator().manual_seed(2)
    )
    spans = spans_of(lengths, K)
    both = net(torch.cat([xt, x0], 1), dataclasses.replace(spans, noisy=True))
    torch.testing.assert_close(both[:, 13:], net(x0, spans), atol=1e-6, rtol=0)
    for a, b in (
        (0, 4),
        (4, 7),
        (7, 11),
        (11, 13),
    ):  # a noisy block is that block at the end of clean ones
        text = x0.clone()
        text[:, a:b] = xt[:, a:b]
        torch.testing.assert_close(both[:, a:b], net(text, spans)[:, a:b], atol=1e-6, rtol=0)


# --- KV cache -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(1, 5),
    total=st.integers(1, 24),
    family=st.sampled_from([*FAMILIES]),
    data=st.data(),
)
@torch.no_grad()
def test_chunks_of_whole_blocks_through_the_cache_are_the_full_forward(K, total, family, data):
    net = ours(**FAMILIES[family])
    tokens = torch.randint(
        SIZES["vocab_size"], (2, total), generator=torch.Generator().manual_seed(total)
    )
    full = net(tokens, spans_of([total], K, rows=2))
    cache = KVCache(net.cfg, 2, total)
    cache.k, cache.v = torch.full(
        (2, *cache.shape), float("nan")
    )  # what was never written must never be read

    def forward(a, b, of):
        start = torch.zeros(2, b - a, dtype=torch.int32)
        return net(of[:, a:b], Spans.of(start, start + total, K, offset=a), cache)

    a = 0
    while a < total:
        b = min(total, a + K * data.draw(st.integers(1, 3)))
        for _ in range(
            data.draw(st.integers(0, 2))
        ):  # drafts, as while a block is decoded, and some longer than it
            draft = min(total, a + K * data.draw(st.integers(1, 3)))
            forward(a, draft, (tokens + 1) % SIZES["vocab_size"])
        torch.testing.assert_close(forward(a, b, tokens), full[:, a:b], atol=1e-5, rtol=1e-5)
        a = cache.length = b


@torch.no_grad()
def test_a_forward_writes_behind_the_length_and_nowhere_else():
    net = ours()
    cache = KVCache(net.cfg, 1, 8)
    cache.k, cache.v = torch.zeros(2, *cache.shape)
    cache.length = 2
    net(
        torch.arange(3)[None],
        Spans.of(*torch.tensor([[[0] * 3], [[8] * 3]], dtype=torch.int32), 1, offset=2),
        cache,
    )
    for kept in (cache.k, cache.v):
        assert kept.shape == (2, 1, 2, 8, 8)
        assert (
            (kept[:, :, :, 2:5] != 0).any(-1).all()
            and not kept[:, :, :, :2].any()
            and not kept[:, :, :, 5:].any()
        )
    assert cache.length == 2


# --- the vocabulary loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "n, rows_at_once", [(0, 4), (1, 4), (4, 4), (5, 4), (8, 4), (11, 4), (3, 1), (3, 0.5)]
)
def test_the_loss_in_chunks_is_the_cross_entropy_in_values_and_gradients(
    monkeypatch, n, rows_at_once, tied
):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", int(rows_at_once * SIZES["vocab_size"]) + 3)
    net = ours(tie_embeddings=tied)
    hidden = torch.randn(
        n, SIZES["d_model"], generator=torch.Generator().manual_seed(n)
    ).requires_grad_()
    targets = torch.randint(SIZES["vocab_size"], (n,), generator=torch.Generator().manual_seed(n))
    weight = torch.rand(n) + 0.5  # as the loss is weighted, position by position
    rows = []
    monkeypatch.setattr(net, "logits", lambda h: rows.append(len(h)) or Transformer.logits(net, h))
    loss = net.token_loss(hidden, targets)
    assert loss.shape == (n,) and loss.dtype == torch.float32
    got = torch.autograd.grad((loss * weight).sum(), [hidden, net.head])
    assert max(rows, default=0) <= max(1, rows_at_once), "no more logits at once than allowed"
    expected = F.cross_entropy(hidden @ net.head.T, targets, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weight).sum(), [hidden, net.head])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# --- sizes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        *[
            ({name: bad}, f"{name}={bad} must be 1 or more")
            for bad in (0, -1)
            for name in (
                "vocab_size",
                "d_model",
                "n_layer",
                "n_head",
                "n_kv_head",
                "head_dim",
                "d_ff",
                "context",
            )
        ],
        ({"n_kv_head": 3}, "n_kv_head=3 must divide n_head=4"),
        ({"n_kv_head": 8}, "n_kv_head=8 must divide n_head=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"qkv_bias": True, "qk_norm": True}, "exclude each other"),
    ],
)
def test_impossible_sizes_are_refused_in_one_sentence(changes, said):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**SIZES | changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family, billions, sizes",
    [
        (
            "llama",
            8.25,
            dict(
                vocab_size=155136,
                d_model=4096,
                n_layer=32,
                n_head=32,
                n_kv_head=8,
                head_dim=128,
                d_ff=14336,
                context=8192,
                rope_theta=5e5,
                tie_embeddings=False,
            ),
        ),
        (
            "qwen2",
            7.62,
            dict(
                vocab_size=152064,
                d_model=3584,
                n_layer=28,
                n_head=28,
                n_kv_head=4,
                head_dim=128,
                d_ff=18944,
                context=8192,
                tie_embeddings=False,
            ),
        ),
        (
            "qwen3",
            1.72,
            dict(
                vocab_size=151936,
                d_model=2048,
                n_layer=28,
                n_head=16,
                n_kv_head=8,
                head_dim=128,
                d_ff=6144,
                context=8192,
                tie_embeddings=True,
            ),
        ),
    ],
    ids=["Seed-Coder 8B", "DiffuCoder 7B", "CoDA 1.7B"],
)
def test_the_papers_models_have_as_many_parameters_as_their_configs_say(family, billions, sizes):
    with torch.device("meta"):
        net = Transformer(ModelConfig(**sizes, **FAMILIES[family]))
    s = SimpleNamespace(**sizes)
    q, kv = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
    layer = s.d_model * (2 * q + 2 * kv) + 3 * s.d_model * s.d_ff + 2 * s.d_model
    layer += {"llama": 0, "qwen2": q + 2 * kv, "qwen3": 2 * s.head_dim}[family]
    total = (
        s.n_layer * layer + s.d_model + s.vocab_size * s.d_model * (1 if s.tie_embeddings else 2)
    )
    assert sum(p.numel() for p in net.parameters()) == total
    assert total / 1e9 == pytest.approx(billions, abs=0.005)
    assert all(p.is_meta for p in net.parameters())


def test_tied_embeddings_are_one_parameter_and_norms_start_at_one():
    net = Transformer(ModelConfig(**SIZES | {"tie_embeddings": True}, qkv_bias=True))
    assert net.head is net.embed_tokens.weight
    for name, p in net.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
        else:
            narrow = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert p.std().item() == pytest.approx(0.01 if narrow else 0.02, rel=0.2)
