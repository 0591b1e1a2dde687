"""model.py: the same numbers as transformers' Llama, Qwen2 and Qwen3; documents, cache and chunks
that change nothing.
"""
import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import families
import huggingface
import model as model_file
from configurator import Mistake
from diffusion import Recipe
from model import KVCache, ModelConfig, Transformer, rope_angles, rotate
from spans import CacheSpans, Spans
from tokenizer import train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
SIZES = {"vocab_size": 271, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 8,
         "d_ff": 48, "context": 64, "rope_theta": 777.0, "norm_eps": 1e-2, "tie_embeddings": False}
VARIANTS = {  # what differs from SIZES, for every family that has it
    "GQA": {},
    "tied": {"tie_embeddings": True},
    "one key/value head": {"n_kv_head": 1},
    "no sharing": {"n_kv_head": 4},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 6, "tie_embeddings": True},
}
CASES = [(family, variant) for family in FAMILIES for variant in VARIANTS
         if family != "qwen2" or "heads" not in variant]


@pytest.fixture(scope="module")
def tok_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    path.write_text(train_tokenizer(["x = 1\n"], 260).to_str(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok(tok_file):
    return huggingface.load_tokenizer(tok_file)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_tokens(*shape, seed):
    return torch.randint(SIZES["vocab_size"], shape, generator=generator(seed))


def randomised(module, seed=0):
    """Every parameter random: weights large enough to matter, norms around 1, biases not 0."""
    random = generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            drawn = torch.randn(p.shape, generator=random)
            if "norm" in name:
                p.copy_(1 + 0.3 * drawn)
            else:
                p.copy_((0.5 if name.endswith("bias") else 0.25) * drawn)
    return module.eval()


def ours(seed=0, **changes):
    return randomised(Transformer(ModelConfig(**SIZES | changes)), seed)


def spans_of(lengths, K, rows=1):
    """Spans of rows that hold documents of these lengths in blocks of K (None: one block each)."""
    lengths = torch.tensor(lengths)
    ends = lengths.cumsum(0)
    doc_start = (ends - lengths).repeat_interleave(lengths).int().repeat(rows, 1)
    doc_end = ends.repeat_interleave(lengths).int().repeat(rows, 1)
    return Spans.of(doc_start, doc_end, K)


def additive_mask(lengths, K):
    """(1, 1, S, S): 0 where a query sees a key, -inf elsewhere.

    By the definition: a query sees its document, and no later block.
    """
    places = [(d, i // K if K else 0) for d, n in enumerate(lengths) for i in range(n)]
    sees = torch.tensor([[dq == dk and bk <= bq for dk, bk in places] for dq, bq in places])
    return torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[None, None]


LAYOUTS = [([13], 1), ([13], None), ([13], 4), ([7, 1, 5], 1), ([7, 1, 5], None), ([7, 1, 5], 3)]


@torch.no_grad()
def check_same_logits(mine, theirs):
    tokens = random_tokens(2, 13, seed=1)
    causal = theirs(tokens).logits  # their own default mask and positions
    assert causal.abs().max() > 1, "numbers large enough for a comparison"
    logits = mine.logits(mine(tokens, spans_of([13], 1, 2)))
    torch.testing.assert_close(logits, causal, atol=1e-4, rtol=0)
    for lengths, K in LAYOUTS:
        positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
        mask = additive_mask(lengths, K).expand(2, -1, -1, -1)
        expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
        logits = mine.logits(mine(tokens, spans_of(lengths, K, 2)))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family, variant", CASES)
def test_transformers_reads_our_folder_and_gives_the_same_logits(tmp_path, tok, family, variant):
    mine = ours(**FAMILIES[family], **VARIANTS[variant])
    huggingface.write_model(tmp_path, mine, tok, Recipe("block", mask_id=tok.mask_id))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    assert theirs.config.model_type == family
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_same_logits(mine, theirs.eval())


@pytest.mark.parametrize("family, variant", CASES)
def test_we_read_transformers_folder_and_give_the_same_logits(tmp_path, tok_file, family, variant):
    sizes = SIZES | VARIANTS[variant]
    hf = {theirs: sizes[mine] for mine, theirs in families.HF_NAMES.items()}
    rope = {"rope_type": "default", "rope_theta": hf.pop("rope_theta")}
    config = transformers.AutoConfig.for_model(family, **hf, rope_parameters=rope, bos_token_id=0,
                                               eos_token_id=1)
    theirs = randomised(transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa"))
    theirs.save_pretrained(tmp_path)
    shutil.copyfile(tok_file, tmp_path / "tokenizer.json")
    mine, their_tok, _ = huggingface.load(tmp_path)
    assert mine.cfg == ModelConfig(**sizes, **FAMILIES[family]) and their_tok.vocab_size == 260
    check_same_logits(mine, theirs)


def test_an_older_config_with_rope_theta_at_the_top_and_without_head_dim_reads_the_same(tmp_path,
                                                                                        tok):
    mine = ours()
    huggingface.write_model(tmp_path, mine, tok, Recipe("ar"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert huggingface.load(tmp_path)[0].cfg == mine.cfg


# --- positions and documents ---------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(half=st.integers(1, 64), theta=st.floats(10, 1e6), m=st.integers(0, 500),
       n=st.integers(0, 500), by=st.integers(0, 500), seed=st.integers(0, 99))
def test_rope_keeps_lengths_and_its_products_depend_on_the_distance_alone(half, theta, m, n, by,
                                                                          seed):
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=generator(seed))

    def at(x, position):
        return rotate(x, *rope_angles(torch.tensor([[position]]), 2 * half, theta))

    near, far = (at(q, m) * at(k, n)).sum(), (at(q, m + by) * at(k, n + by)).sum()
    atol = 2e-4 * q.norm().item() * k.norm().item()  # float32 angles up to 1000
    torch.testing.assert_close(near, far, atol=atol, rtol=0)
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

    def spy(positions, *rest):
        seen.append(positions)
        return rope_angles(positions, *rest)

    monkeypatch.setattr(model_file, "rope_angles", spy)
    spans = dataclasses.replace(spans_of([3, 1, 2], 2), noisy=noisy)
    ours()(torch.arange(6).repeat(1 + noisy)[None], spans)
    assert [p.tolist() for p in seen] == [[[0, 1, 2, 0, 0, 1] * (1 + noisy)]]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
       K=st.sampled_from([None, 1, 2, 4]), family=st.sampled_from([*FAMILIES]),
       seed=st.integers(0, 99))
@torch.no_grad()
def test_packed_documents_are_what_each_is_alone(lengths, K, family, seed):
    net = ours(seed, **FAMILIES[family]).double()  # sums of other lengths round otherwise
    tokens = random_tokens(1, sum(lengths), seed=seed)
    alone = [net(t, spans_of([t.shape[1]], K)) for t in tokens.split(lengths, 1)]
    together = net(tokens, spans_of(lengths, K))
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_clean_half_does_not_see_the_noise_and_the_noisy_half_restarts_its_positions():
    net, lengths, K = ours().double(), [7, 6], 4
    x0, xt = random_tokens(2, 1, 13, seed=2)
    spans = spans_of(lengths, K)
    both = net(torch.cat([xt, x0], 1), dataclasses.replace(spans, noisy=True))
    torch.testing.assert_close(both[:, 13:], net(x0, spans), atol=1e-6, rtol=0)
    for a, b in ((0, 4), (4, 7), (7, 11), (11, 13)):
        text = x0.clone()  # a noisy block is that block at the end of clean ones
        text[:, a:b] = xt[:, a:b]
        alone = net(text, spans)
        torch.testing.assert_close(both[:, a:b], alone[:, a:b], atol=1e-6, rtol=0)


@pytest.mark.parametrize("noisy, queries", [(False, None), (True, None), (True, 13)])
@pytest.mark.parametrize("n_layer", [1, 2])
def test_the_hidden_states_that_are_read_are_those_of_the_whole_forward(n_layer, noisy, queries):
    net = ours(n_layer=n_layer)
    spans = dataclasses.replace(spans_of([7, 6], 4, rows=2), noisy=noisy)
    tokens = random_tokens(2, 13 * (1 + noisy), seed=3)
    whole = net(tokens, spans)[:, :queries]
    torch.testing.assert_close(net(tokens, spans, queries=queries), whole, atol=1e-5, rtol=1e-5)
    whole = whole.flatten(0, 1)
    for read in ([0, 5, 5, len(whole) - 1], []):
        read = torch.tensor(read, dtype=torch.int64)
        part = net(tokens, spans, queries=queries, read=read)
        torch.testing.assert_close(part, whole[read], atol=1e-5, rtol=1e-5)

    def gradients(hidden):
        return torch.autograd.grad(hidden.square().sum(), list(net.parameters()),
                                   allow_unused=True, materialize_grads=True)

    read = torch.tensor([3, 11, 17])
    part = net(tokens, spans, queries=queries, read=read)
    for a, b in zip(gradients(part), gradients(whole[read])):
        assert (a - b).norm() <= 1e-5 * b.norm()


# --- KV cache ------------------------------------------------------------------------------------

def from_to(a, b, total, K, cache):
    """CacheSpans and slots of the columns a to b of two rows of one document."""
    column = torch.arange(a, b).expand(2, b - a)
    zero = torch.zeros_like(column)
    block_end = (column // K * K + K).clamp(max=total)
    return CacheSpans(column, zero, block_end, zero, zero, cache.slots), column


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 5), total=st.integers(1, 24), family=st.sampled_from([*FAMILIES]),
       data=st.data())
@torch.no_grad()
def test_chunks_of_whole_blocks_through_the_cache_are_the_full_forward(K, total, family, data):
    net = ours(**FAMILIES[family])
    tokens = random_tokens(2, total, seed=total)
    full = net(tokens, spans_of([total], K, rows=2))
    cache = KVCache(net, 2, total + 3)
    cache.k.fill_(1e4)  # what was never written must never be read
    cache.v.fill_(1e4)

    def forward(a, b, of):
        spans, slots = from_to(a, b, total, K, cache)
        return net(of[:, a:b], spans, cache, slots)

    def chunk_end(a):
        return min(total, a + K * data.draw(st.integers(1, 3)))

    a = 0
    while a < total:
        b = chunk_end(a)
        # drafts, as while a block is decoded, and some longer than it
        for _ in range(data.draw(st.integers(0, 2))):
            forward(a, chunk_end(a), (tokens + 1) % SIZES["vocab_size"])
        found = forward(a, b, tokens)
        torch.testing.assert_close(found, full[:, a:b], atol=1e-5, rtol=1e-5)
        a = b


@torch.no_grad()
def test_with_spans_of_their_own_tokens_see_each_other_alone_and_fill_the_cache():
    """The prompt's forward, and after it a block against the cache."""
    net = ours()
    tokens = random_tokens(2, 12, seed=1)
    cache = KVCache(net, 2, 16)
    cache.k.fill_(1e4)
    cache.v.fill_(1e4)
    slots = torch.arange(8).expand(2, 8)
    prompt = net(tokens[:, :8], spans_of([8], 4, rows=2), cache, slots)
    full = net(tokens, spans_of([12], 4, rows=2))
    torch.testing.assert_close(prompt, full[:, :8], atol=1e-5, rtol=1e-5)
    spans, slots = from_to(8, 12, 12, 4, cache)
    found = net(tokens[:, 8:], spans, cache, slots)
    torch.testing.assert_close(found, full[:, 8:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_forward_writes_its_slots_and_no_others():
    net = ours()
    cache = KVCache(net, 2, 8)
    slots = torch.tensor([[2, 3, 4], [5, 0, 7]])
    net(torch.arange(6).view(2, 3), spans_of([3], 1, rows=2), cache, slots)
    written = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1, 0, 1]]).bool()
    for kept in (cache.k, cache.v):
        assert kept.shape == (2, 2, 2, 8, 8)  # layers, rows, key heads, slots, channels
        assert torch.equal((kept != 0).any(-1), written[None, :, None].expand(2, 2, 2, 8))
    cache.keep(torch.tensor([1]))
    assert cache.k.shape == (2, 1, 2, 8, 8) and (cache.v[:, 0, :, 7] != 0).any()


# --- the vocabulary loss -------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n, rows_at_once", [
    (0, 4), (1, 4), (4, 4), (5, 4), (8, 4), (11, 4), (3, 1), (3, 0.5)])
def test_the_loss_in_chunks_is_the_cross_entropy_in_values_and_gradients(monkeypatch, n,
                                                                         rows_at_once, tied):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", int(rows_at_once * SIZES["vocab_size"]) + 3)
    net = ours(tie_embeddings=tied)
    hidden = torch.randn(n, SIZES["d_model"], generator=generator(n)).requires_grad_()
    targets = random_tokens(n, seed=n)
    weight = torch.rand(n) + 0.5  # as the loss is weighted, position by position
    rows = []

    def spy(h):
        rows.append(len(h))
        return Transformer.logits(net, h)

    monkeypatch.setattr(net, "logits", spy)
    loss = net.token_loss(hidden, targets)
    assert loss.shape == (n,) and loss.dtype == torch.float32
    found = torch.autograd.grad((loss * weight).sum(), [hidden, net.head])
    assert max(rows, default=0) <= max(1, rows_at_once), "no more logits at once than allowed"
    expected = F.cross_entropy(hidden @ net.head.T, targets, reduction="none")
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weight).sum(), [hidden, net.head])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# --- sizes ---------------------------------------------------------------------------------------

COUNTS = ("vocab_size", "d_model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_ff", "context")


@pytest.mark.parametrize("changes, said", [
    *[({name: bad}, f"{name}={bad} does not fit: {name} is an int from ")
      for bad in (0, -1) for name in COUNTS],
    ({"d_model": 10**12}, "d_model=1000000000000 does not fit: d_model is an int from 1 to"),
    ({"vocab_size": 10**12}, "does not fit: vocab_size is an int from 1 to"),
    ({"d_model": 32.5}, "d_model=32.5 does not fit: d_model is an int"),
    ({"rope_theta": float("nan")}, "rope_theta=nan does not fit: rope_theta is a float from 1 to"),
    ({"rope_theta": 0.0}, "rope_theta=0.0 does not fit: rope_theta is a float from 1 to"),
    ({"norm_eps": -1.0}, "norm_eps=-1.0 does not fit: norm_eps is a float from 1e-12 to 1"),
    ({"n_kv_head": 3}, "n_kv_head=3 must divide n_head=4"),
    ({"n_kv_head": 8}, "n_kv_head=8 must divide n_head=4"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"qkv_bias": True, "qk_norm": True}, "exclude each other"),
])
def test_impossible_sizes_are_refused_with_a_one_line_message(changes, said):
    with pytest.raises(Mistake) as caught:
        ModelConfig(**SIZES | changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family, billions, sizes", [
    ("llama", 8.25, dict(vocab_size=155136, d_model=4096, n_layer=32, n_head=32, n_kv_head=8,
                         head_dim=128, d_ff=14336, context=8192, rope_theta=5e5,
                         tie_embeddings=False)),
    ("qwen2", 7.62, dict(vocab_size=152064, d_model=3584, n_layer=28, n_head=28, n_kv_head=4,
                         head_dim=128, d_ff=18944, context=8192, tie_embeddings=False)),
    ("qwen3", 1.72, dict(vocab_size=151936, d_model=2048, n_layer=28, n_head=16, n_kv_head=8,
                         head_dim=128, d_ff=6144, context=8192, tie_embeddings=True)),
], ids=["Seed-Coder 8B", "DiffuCoder 7B", "CoDA 1.7B"])
def test_the_papers_models_have_as_many_parameters_as_their_configs_say(family, billions, sizes):
    with torch.device("meta"):
        net = Transformer(ModelConfig(**sizes, **FAMILIES[family]))
    s = net.cfg
    q, kv = s.n_head * s.head_dim, s.n_kv_head * s.head_dim
    layer = s.d_model * (2 * q + 2 * kv) + 3 * s.d_model * s.d_ff + 2 * s.d_model
    layer += {"llama": 0, "qwen2": q + 2 * kv, "qwen3": 2 * s.head_dim}[family]
    embeddings = s.vocab_size * s.d_model * (1 if s.tie_embeddings else 2)
    total = s.n_layer * layer + s.d_model + embeddings
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
