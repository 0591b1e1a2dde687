"""The forward process, the loss and the likelihood bound, each against a plain second opinion:
loops over blocks, quadrature, enumeration with one forward per mask, a transformer written out in
float64.

Statistical tests run on fixed seeds. Each states its bound: 5 standard deviations (two-sided
p = 6e-7) unless it says otherwise. Where it makes C comparisons, its chance of failing on another
seed is C times that (Bonferroni).
"""
from dataclasses import replace
from itertools import combinations
from math import comb, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ATTENTION_OF, block_of, packed, packings, who_sees

import diffusion
import model
from configurator import Mistake
from diffusion import (
    NOISE,
    Draw,
    Noised,
    Recipe,
    corrupt,
    draw_t,
    evaluate,
    every_mask,
    nelbo,
    paired,
    spans_for,
    stream,
    token_losses,
    u_max,
    weighted_loss,
)
from loader import Batch

torch.set_num_threads(1)
VOCAB, MASK, PAD = 12, 11, 10
NOISY = ["bidirectional", "ar_diffusion", "block"]
ALL_SHIFTS = [("ar", True)] + [(objective, shift) for objective in NOISY for shift in (False, True)]


def make(objective="block", **settings):
    return Recipe(objective, mask_id=MASK, pad_id=PAD, **settings)


def batch(*rows, holes=0.0, seed=0):
    """A Batch of rows of document lengths. holes: the share of further unmaskable tokens."""
    random = torch.Generator().manual_seed(seed)
    doc_start, doc_end = packed(*rows)
    x0 = torch.randint(PAD, doc_start.shape, generator=random)
    solid = torch.rand(doc_start.shape, generator=random) >= holes
    is_first = torch.arange(doc_start.shape[1]) == doc_start
    return Batch(x0, doc_start, doc_end, solid & ~is_first, np.zeros(len(rows), np.int64))


def even_blocks(n, blocks, rows=1):
    """One document per row, of `blocks` blocks of n tokens, all of them maskable."""
    T = n * blocks
    return Batch(x0=torch.zeros(rows, T, dtype=torch.int64),
                 doc_start=torch.zeros(rows, T, dtype=torch.int32),
                 doc_end=torch.full((rows, T), T, dtype=torch.int32),
                 maskable=torch.ones(rows, T, dtype=torch.bool),
                 epochs=np.zeros(rows, np.int64))


def noise(data, recipe, seed=3, step=0):
    rows = len(data.x0)
    return corrupt(data, recipe, Draw(seed, step, range(rows), rows))


def ts_of(seed, step, row, batch_rows, blocks):
    """The t of a row's blocks, as its own stream draws them."""
    draw = Draw(seed, step, range(batch_rows), batch_rows)
    return draw_t(stream(seed, NOISE, step, row), blocks, make(), draw, row)


def blocks_of(lengths, recipe):
    """The positions that share a t, one list per block."""
    K = recipe.block_size if recipe.objective == "block" else None
    starts = [block_of(i, lengths, K)[2] for i in range(sum(lengths))]
    return [[i for i, start in enumerate(starts) if start == a] for a in sorted(set(starts))]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values()))


def over_t(f, floor=0.0):
    """E f(max(t, floor)) for t ~ U(0, 1), by Gauss-Legendre quadrature above the floor."""
    x, w = np.polynomial.legendre.leggauss(64)
    t = floor + (1 - floor) * (x + 1) / 2
    above = (1 - floor) * (w / 2 * f(t)).sum()
    return above + floor * f(floor) if floor else above


def chi2_p(counts, expected):
    """P(chi-squared at least this large) where the counts do have these expectations."""
    statistic = ((np.asarray(counts) - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1).double()
    return torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2)).item()


def small_model(seed=0):
    torch.manual_seed(seed)
    net = model.Transformer(model.ModelConfig(
        vocab_size=VOCAB, d_model=8, n_layer=2, n_head=4, n_kv_head=2, head_dim=4, d_ff=12,
        context=64, tie_embeddings=False))
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.4)
    return net


def dense_log_p(net, tokens, positions, sees):
    """(S, vocab) log-probabilities of one row: the model's formulas written out in float64.

    tokens, positions: (S,). sees: (S, S) bool.
    """
    c, S = net.cfg, len(tokens)
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2).double() / c.head_dim)
    angle = positions[:, None] * frequency  # (S, head_dim / 2)
    turn = torch.polar(torch.ones_like(angle), angle)

    def norm(x, layer):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * layer.weight.double()

    def heads(x, layer, rotated):
        x = (x @ layer.weight.double().T).view(S, -1, c.head_dim).transpose(0, 1)
        if rotated:
            z = torch.complex(*x.chunk(2, -1)) * turn
            x = torch.cat([z.real, z.imag], -1)
        return x.repeat_interleave(c.n_head // len(x), 0)  # (n_head, S, head_dim)

    x = F.embedding(tokens, net.embed_tokens.weight.double())  # (S, d_model)
    for layer in net.layers:
        a, h = layer.self_attn, norm(x, layer.input_layernorm)
        q, k, v = heads(h, a.q_proj, True), heads(h, a.k_proj, True), heads(h, a.v_proj, False)
        scores = (q @ k.mT / c.head_dim**0.5).masked_fill(~sees, -torch.inf)  # (n_head, S, S)
        read = (scores.softmax(-1) @ v).transpose(0, 1).reshape(S, -1)
        x = x + read @ a.o_proj.weight.double().T
        h, mlp = norm(x, layer.post_attention_layernorm), layer.mlp
        gate, up = h @ mlp.gate_proj.weight.double().T, h @ mlp.up_proj.weight.double().T
        x = x + (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().T
    return (norm(x, net.norm) @ net.head.double().T).log_softmax(-1)


# --- recipes -------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    (dict(objective="ar", shift=False), "shift=False is not possible with objective='ar'"),
    (dict(objective="block", mask_id=None), "needs a mask token"),
    (dict(objective="bidirectional", mask_id=None), "needs a mask token"),
    (dict(block_size=0), "block_size=0 does not fit: block_size is an int from 1 to"),
    (dict(block_size=10**20), "does not fit: block_size is an int from 1 to"),
    (dict(t_min=0.0), "t_min=0.0 does not fit: t_min is a float from 1e-09 to 1"),
    (dict(t_min=1.5), "t_min=1.5 does not fit: t_min is a float from 1e-09 to 1"),
    (dict(t_min=float("nan")), "t_min=nan does not fit"),
    (dict(u_init=0.0), "u_init=0.0 does not fit: u_init is a float from 1e-09 to 1"),
    (dict(objective="blok"), "objective='blok' does not fit: .* one of ar, bidirectional"),
    (dict(schedule="cliped"), "schedule='cliped' does not fit: schedule is one of uniform"),
    (dict(anneal_steps=5), "anneal_steps=5 needs objective='bidirectional'"),
    (dict(strategies=()), "must be one triple"),
    (dict(strategies=0.1), "strategies=0.1 does not fit: strategies is a list in brackets"),
    (dict(strategies=(("a", "b", "c"),)), "must be one triple"),
    (dict(strategies=(0.1, 0.1, 0.1)), "must be one triple"),
    (dict(strategies=((0.1, 0.1),)), "must be one triple"),
    (dict(strategies=((-0.1, 0.0, 0.0),)), "must be one triple"),
    (dict(strategies=((float("nan"), 0.0, 0.0),)), "must be one triple"),
    (dict(strategies=((0.6, 0.6, 0.0),)), "S1 \\+ S2 and S3 at most 1"),
    (dict(strategies=((0.0, 0.0, 1.1),)), "S1 \\+ S2 and S3 at most 1"),
    (dict(strategies=((0.1, 0.0, 0.0),), schedule="uniform"), "not 'block' and 'uniform'"),
    (dict(objective="ar_diffusion", strategies=((0, 0, 0), (0, 0, 1)), schedule="uniform"),
     "not 'ar_diffusion'"),
    (dict(objective="bidirectional", strategies=((0.0, 0.0, 0.1),), schedule="count"),
     "not 'bidirectional' and 'count'"),
    (dict(objective="bidirectional", strategies=((0.0, 0.1, 0.0),), schedule="uniform",
          pad_id=None), "need a pad token"),
    (dict(complementary=True), "complementary=true needs a diffusion objective and schedule='count'"
     ", not 'block' and 'clipped'"),
    (dict(complementary=True, schedule="uniform"), "not 'block' and 'uniform'"),
    (dict(complementary=True, schedule="count", objective="ar"), "not 'ar' and 'count'"),
    (dict(complementary=True, schedule="count", u_warmup_steps=5),
     "complementary=true excludes u_warmup_steps=5: give --u_warmup_steps=0"),
])
def test_impossible_recipes_are_refused(settings, words):
    with pytest.raises(Mistake, match=words) as caught:
        Recipe(**{"mask_id": MASK, "pad_id": PAD, **settings})
    assert "\n" not in str(caught.value)


def test_shift_is_on_only_in_ar_unless_asked_for():
    assert Recipe("ar").shift
    assert not any(make(objective).shift for objective in NOISY)
    assert all(make(objective, shift=True).shift for objective in NOISY)


# --- what is masked ------------------------------------------------------------------------------

@settings(deadline=None, max_examples=100)
@given(packings(), st.sampled_from(NOISY), st.sampled_from([1, 2, 3, 4, 40]),
       st.sampled_from(["clipped", "count"]), st.booleans(), st.integers(0, 999))
def test_a_block_with_something_maskable_is_never_empty(rows, objective, K, schedule, antithetic,
                                                        seed):
    recipe = make(objective, block_size=K, schedule=schedule, antithetic=antithetic,
                  u_warmup_steps=5)
    data = batch(*rows, holes=0.4, seed=seed)
    noised = noise(data, recipe, seed, step=5 + seed % 3)
    for row, lengths in enumerate(rows):
        for block in blocks_of(lengths, recipe):
            n, masked = int(data.maskable[row, block].sum()), noised.masked[row, block]
            if n == 0:
                assert not masked.any()
                continue
            u = 1 / noised.weight[row, block][masked].double()  # none masked: the next line fails
            assert len(u) and (u == u[0]).all() and 1 / n - 1e-6 <= u[0] <= 1 + 1e-6
            assert schedule == "clipped" or round(float(u[0]) * n, 5) == masked.sum()


@settings(deadline=None, max_examples=100)
@given(packings(), st.sampled_from(NOISY), st.sampled_from(["uniform", "clipped", "count"]),
       st.integers(0, 999), st.booleans())
def test_unmaskable_tokens_are_left_alone(rows, objective, schedule, seed, strategies):
    coda = strategies and objective == "bidirectional" and schedule == "uniform"
    coda = coda and sum(rows[0]) > 1
    rates = (0.3, 0.3, 0.5) if coda else (0, 0, 0)
    recipe = make(objective, schedule=schedule, strategies=(rates,))
    data = batch(*rows, holes=0.4, seed=seed)
    noised = noise(data, recipe, seed)
    assert not (noised.masked & ~noised.maskable).any()
    assert not (noised.maskable & ~data.maskable).any()
    assert torch.equal(noised.xt, torch.where(noised.masked, MASK, noised.x0))
    assert torch.equal(noised.weight > 0, noised.masked) and noised.weight.dtype == torch.float32
    if not coda:
        assert torch.equal(noised.x0, data.x0) and torch.equal(noised.maskable, data.maskable)


def test_ar_scores_every_maskable_token_with_weight_1():
    data = batch([5, 1, 6], holes=0.2)
    noised = noise(data, Recipe("ar", u_warmup_steps=9))
    assert torch.equal(noised.xt, data.x0) and torch.equal(noised.masked, data.maskable)
    assert torch.equal(noised.weight, data.maskable.float())


@pytest.mark.parametrize("n", [2, 4, 8])
def test_uniform_leaves_one_block_in_n_plus_1_empty(n):
    """t_min, here 1e-9, takes n·t_min²/2 off that rate: nothing.

    Bound: 5 sigma of the binomial, 0.0075 at n = 2.
    """
    N = 100_000
    recipe = make(block_size=n, schedule="uniform", t_min=1e-9, antithetic=False)
    empty = ~noise(even_blocks(n, N), recipe).masked.view(N, n).any(1)
    p = 1 / (n + 1)
    assert abs(empty.double().mean() - p) < 5 * (p * (1 - p) / N) ** 0.5


@pytest.mark.parametrize("schedule", ["uniform", "clipped", "count"])
def test_each_pattern_of_masks_has_its_probability(schedule):
    """1e5 blocks of 4, chi-squared over the 16 patterns, bound: p > 1e-6."""
    n, N = 4, 100_000
    recipe = make(block_size=n, schedule=schedule, antithetic=False)
    noised = noise(even_blocks(n, N // 4, rows=4), recipe)
    patterns = noised.masked.view(N, n).long() @ torch.tensor([1, 2, 4, 8])
    m = np.array([pattern.bit_count() for pattern in range(16)])
    if schedule == "count":
        p = np.array([0 if k == 0 else 1 / (n * comb(n, k)) for k in m])
    else:
        floor = 1e-3 if schedule == "uniform" else 1 / n
        p = np.array([over_t(lambda u: u**k * (1 - u) ** (n - k), floor) for k in m])
        if schedule == "clipped":  # an empty block gets one mask, in any of its n places
            p = np.where(m == 1, p + p[0] / n, p) * (m > 0)
    assert abs(p.sum() - 1) < 1e-12
    counts = np.bincount(patterns, minlength=16)
    assert counts[p == 0].sum() == 0 and chi2_p(counts[p > 0], N * p[p > 0]) > 1e-6


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_weights_of_count(n):
    """n/m on each of m tokens: a block's weights sum to n.

    Per position the mean is 1 and the second moment is H_n: 5 sigma.
    """
    N = 50_000
    recipe = make(block_size=n, schedule="count", antithetic=False)
    w = noise(even_blocks(n, N), recipe).weight.view(N, n).double()
    assert (w.sum(1) - n).abs().max() < 1e-5
    H = sum(1 / m for m in range(1, n + 1))
    for x, mean in ((w, 1.0), (w**2, H)):
        assert ((x.mean(0) - mean).abs() <= 5 * x.std(0) / N**0.5 + 1e-6).all()


class OneNat:
    """A model whose loss is exactly 1 nat per token."""

    def __call__(self, tokens, spans, queries, read):
        return torch.zeros(len(read), 1)  # a hidden state for each position that is read

    def token_loss(self, hidden, targets):
        return torch.ones(len(targets))


@pytest.mark.parametrize("n, reads", [(2, 1.159), (4, 1.113), (8, 1.065)])
def test_clipped_is_biased_by_a_known_factor(n, reads):
    """A loss of exactly 1 nat per token reads as more than 1: the closed form, within 5 sigma."""
    N = 100_000
    data = even_blocks(n, N)
    # (nu + P(empty)) / (nu), over u = max(t, 1/n)
    exact = over_t(lambda u: 1 + (1 - u) ** n / (n * u), 1 / n)
    assert round(exact, 3) == reads
    for schedule, want in (("clipped", exact), ("uniform", 1.0), ("count", 1.0)):
        recipe = make(block_size=n, schedule=schedule, antithetic=False)
        noised = noise(data, recipe)
        sigma = noised.weight.double().view(N, n).sum(1).std().item() / n / N**0.5
        found = weighted_loss(OneNat(), noised, recipe).item() / (n * N)
        assert abs(found - want) < 5 * sigma + 1e-5


# --- warmup --------------------------------------------------------------------------------------

@pytest.mark.parametrize("antithetic", [False, True])
def test_t_stays_under_the_cap_of_the_warmup(antithetic):
    S, u_init = 10, 0.02
    recipe = make(u_warmup_steps=S, u_init=u_init, antithetic=antithetic)
    for step in (0, S // 2, S - 1, S, S + 1):
        cap = u_init + (1 - u_init) * min(1, step / S)
        assert u_max(step, recipe) == pytest.approx(cap, rel=1e-15)
        t = draw_t(stream(0, NOISE, step, 1), 5000, recipe, Draw(0, step, range(2), 2), 1)
        assert t.min() > 0 and 0.99 * cap < t.max() <= cap
        assert abs(t.mean() / cap - 0.5) < 5 / (12 * 5000) ** 0.5
    assert u_max(0, make()) == 1  # no warmup


@pytest.mark.parametrize("schedule", ["uniform", "clipped", "count"])
def test_weights_are_1_during_the_warmup_and_1_over_u_after(schedule, monkeypatch):
    seen = []

    def spy(*args):
        seen.append(draw_t(*args))
        return seen[-1]

    monkeypatch.setattr(diffusion, "draw_t", spy)
    recipe = make(schedule=schedule, u_warmup_steps=10)
    for step in (0, 5, 9, 10, 11):
        seen.clear()
        noised = noise(even_blocks(4, 50), recipe, step=step)
        t = torch.from_numpy(seen[0])[:, None].expand(50, 4).reshape(1, 200)
        u = {"uniform": t.clamp(min=1e-3), "clipped": t.clamp(min=0.25),
             "count": (4 * t).ceil() / 4}[schedule]
        want = torch.ones_like(t) if step < 10 else 1 / u
        assert t.max() <= u_max(step, recipe)
        assert torch.equal(noised.weight, torch.where(noised.masked, want, 0.0).float())


@pytest.mark.parametrize("schedule, rate, variance", [
    # 33 %: max(1, Binomial(4, 1/4)) / 4
    ("clipped", 0.25 + 0.75**4 / 4, (1.75 + 0.75**4 - (1 + 0.75**4) ** 2) / 16),
    ("count", 0.25, 0.0),
    ("uniform", 0.001, 0.001 * 0.999 / 4),
])
def test_mask_rate_at_the_start_of_the_warmup(schedule, rate, variance):
    """u_max = 0.1 %, but u has its floor 1/n, n = 4.

    Bound: 5 sigma of the mean over the blocks, 0.0051 for the 33 %.
    """
    N = 20_000
    noised = noise(even_blocks(4, N), make(schedule=schedule, u_warmup_steps=100), step=0)
    assert abs(noised.masked.double().mean() - rate) <= 5 * (variance / N) ** 0.5


# --- antithetic t --------------------------------------------------------------------------------

def test_antithetic_t_is_uniform_at_every_position():
    """Kolmogorov-Smirnov distance of each of 15 positions over 3000 steps.

    Bound: Dvoretzky-Kiefer-Wolfowitz, P(D > sqrt(ln(2/a) / 2N)) <= a, at a = 1e-6 / 15.
    """
    B, n_r, N = 3, 5, 3000
    t = np.array([[ts_of(7, step, row, B, n_r) for row in range(B)] for step in range(N)])
    t, i = np.sort(t, 0), np.arange(N)[:, None, None]
    distance = np.maximum((i + 1) / N - t, t - i / N).max(0)  # (B, n_r)
    assert distance.max() < (log(2 * B * n_r / 1e-6) / (2 * N)) ** 0.5


def test_antithetic_mask_counts_are_uniform_at_every_position():
    """The same through `corrupt`: `count` masks m ~ U{1..4} of each block.

    Chi-squared at each of 12 positions over 1200 steps, bound: p > 1e-6 / 12.
    """
    B, n_r, N = 3, 4, 1200
    data, recipe = even_blocks(4, n_r, rows=B), make(schedule="count")
    masked = torch.stack([noise(data, recipe, step=step).masked for step in range(N)])
    m = masked.view(N, B * n_r, 4).sum(2)
    for k in range(B * n_r):
        counts = torch.bincount(m[:, k], minlength=5)[1:].numpy()
        assert chi2_p(counts, N / 4) > 1e-6 / 12


@settings(deadline=None, max_examples=60)
@given(packings(max_T=24, max_rows=5), st.sampled_from(NOISY), st.sampled_from([1, 2, 4]),
       st.integers(0, 99))
def test_antithetic_t_is_stratified_exactly(rows, objective, K, step):
    """A row's n_r values fall one into each ((k-1)/n_r, k/n_r].

    All fall into the same of its B parts, and each row has another part.
    """
    recipe, B = make(objective, block_size=K), len(rows)
    data = batch(*rows, holes=0.3, seed=step)
    seen = {}

    def spy(random, blocks, recipe, draw, row):
        assert draw.batch_rows == B
        seen[row] = draw_t(random, blocks, recipe, draw, row)
        return seen[row]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "draw_t", spy)
        noised = noise(data, recipe, step=step)
    parts = set()
    for row, lengths in enumerate(rows):
        blocks = [b for b in blocks_of(lengths, recipe) if data.maskable[row, b].any()]
        t = seen[row]
        stratum = np.ceil(t * len(blocks))
        assert sorted(stratum) == list(range(1, len(blocks) + 1))
        place = (t * len(blocks) - stratum + 1) * B
        part = set(np.ceil(place))
        assert len(part) <= 1 and not part & parts and part <= set(range(1, B + 1))
        parts |= part
        assert len(set(np.round(place, 9))) == len(blocks)  # U is each block's own
        for b, t_b in zip(blocks, t):  # and each block gets its own
            u = np.float32(1 / max(t_b, 1 / int(data.maskable[row, b].sum())))
            want = torch.where(noised.masked[row, b], float(u), 0.0)
            assert (noised.weight[row, b] == want).all()


def test_rows_do_not_share_their_order():
    """Two rows put 5 blocks into the same order once in 120 steps. Bound: 5 sigma."""
    N = 3000
    t = np.array([[ts_of(1, step, row, 4, 5) for row in (0, 1)] for step in range(N)])
    together = (t.argsort(-1)[:, 0] == t.argsort(-1)[:, 1]).all(-1).mean()
    assert abs(together - 1 / 120) < 5 * (1 / 120 / N) ** 0.5


# --- every draw is a function of (seed, step, global row) ----------------------------------------

@pytest.mark.parametrize("recipe", [
    make(),
    make(schedule="count"),
    make("ar_diffusion", antithetic=False),
    make("bidirectional", schedule="uniform", strategies=((0, 0, 0), (0.3, 0.3, 0.5))),
])
def test_any_rank_can_compute_its_own_rows(recipe):
    data = batch([40], [1] * 40, [13, 2, 25], [30, 10], [7, 33], [20, 20], holes=0.2)
    data.epochs = np.array([0, 1, 1, 0, 1, 1])
    whole = noise(data, recipe, seed=3, step=4)
    for rows in ([0], [2, 3], [5, 0, 3], [3, 4, 5]):
        part = corrupt(data.select(rows), recipe, Draw(3, 4, rows, 6))
        assert same(part, Noised(**{name: x[rows] for name, x in vars(whole).items()}))


def test_draws_depend_on_seed_step_and_row():
    data, recipe = even_blocks(4, 32, rows=3), make()
    masks = []
    for seed, step in ((3, 0), (3, 1), (4, 0), (0, 3)):
        masks += noise(data, recipe, seed, step).masked
    assert len(masks) == 12
    assert not any(torch.equal(a, b) for a, b in combinations(masks, 2))
    assert same(noise(data, recipe), noise(data, recipe))


def test_large_seeds_do_not_share_their_noise():
    """As floats, 2^63 - 1 and its neighbors would be one number."""
    data, recipe = even_blocks(4, 32), make()
    near = [noise(data, recipe, seed=2**63 - 1 - i).masked for i in range(3)]
    assert not any(torch.equal(a, b) for a, b in combinations(near, 2))


# --- CoDA's progressive masking ------------------------------------------------------------------

def test_s3_masks_every_token_at_its_documents_rate(monkeypatch):
    """Packed documents, their first and last tokens too, holes among them.

    t is 0.2, 0.5, 0.9, 0.35 in the four. 6000 rows, 5 sigma, at 32 tokens and for pairs at 4
    distances, which tell that k is uniform in {2, 4, 8}.
    """
    N, lengths, rates = 6000, [1, 2, 9, 20], np.array([0.2, 0.5, 0.9, 0.35])
    monkeypatch.setattr(diffusion, "draw_t", lambda random, blocks, *_: rates[:blocks])
    data = batch(*[lengths] * N)
    data.x0 = torch.zeros(N, 32, dtype=torch.int64)
    data.maskable = torch.ones(N, 32, dtype=torch.bool)
    data.maskable[:, [7, 31]] = False
    recipe = make("bidirectional", schedule="uniform", strategies=((0.0, 0.0, 1.0),))
    noised = noise(data, recipe, seed=5)

    t = np.repeat(rates, lengths)
    want = np.where(data.maskable[0], t, 0)
    masked = noised.masked.numpy()
    assert (np.abs(masked.mean(0) - want) <= 5 * np.sqrt(want * (1 - want) / N)).all()
    weight = torch.from_numpy(1 / t).float()
    assert torch.equal(noised.weight, torch.where(noised.masked, weight, 0))
    # k + min(d, k) starts leave alone two tokens of the last document that are d apart
    for d in (1, 2, 4, 8):
        alone = (~masked[:, 12:31 - d] & ~masked[:, 12 + d:31]).mean(1)  # (N,)
        want = np.mean([(1 - 0.35) ** (1 + min(d, k) / k) for k in (2, 4, 8)])
        assert abs(alone.mean() - want) <= 5 * alone.std() / N**0.5


def test_s1_s2_s3_rates(monkeypatch):
    """3000 rows at 30 %, 20 % and 40 %, 5 sigma. S1 and S2 never meet; S3 comes on its own.

    Where the two cut is uniform in [1, T): chi-squared, p > 1e-6.
    """
    N, T, rates = 3000, 24, (0.3, 0.2, 0.4)
    by_spans, span_mask_row, corrupt_row = [], diffusion.span_mask_row, diffusion.corrupt_row

    def one_more_row(*args):
        by_spans.append(False)
        return corrupt_row(*args)

    def this_one_by_spans(*args):
        by_spans[-1] = True
        return span_mask_row(*args)

    monkeypatch.setattr(diffusion, "corrupt_row", one_more_row)
    monkeypatch.setattr(diffusion, "span_mask_row", this_one_by_spans)
    recipe = make("bidirectional", schedule="uniform", strategies=(rates,))
    noised = noise(even_blocks(T, 1, rows=N), recipe)
    s1, s2, s3 = ~noised.maskable[:, 0], noised.x0[:, -1] == PAD, torch.tensor(by_spans)
    assert not (s1 & s2).any()
    for rows, p in ((s1, 0.3), (s2, 0.2), (s3, 0.4), (s1 & s3, 0.12), (s2 & s3, 0.08)):
        assert abs(rows.double().mean() - p) < 5 * (p * (1 - p) / N) ** 0.5

    i, cut = torch.arange(T), noised.maskable.sum(1, keepdim=True)
    assert torch.equal(noised.maskable[s1], (i >= T - cut)[s1])
    assert torch.equal(noised.maskable[s2], (i < cut)[s2])
    assert noised.maskable[~s1 & ~s2].all()
    assert torch.equal(noised.x0 == PAD, s2[:, None] & (i >= cut))
    assert torch.equal(noised.xt == PAD, noised.x0 == PAD)
    assert (noised.x0[noised.x0 != PAD] == 0).all()
    for rows in (s1, s2):
        counts = torch.bincount(cut[rows, 0], minlength=T)[1:].numpy()
        assert len(counts) == T - 1 and counts.min() > 0
        assert chi2_p(counts, rows.sum().item() / (T - 1)) > 1e-6


def test_the_epoch_picks_the_rates_and_the_last_ones_stay():
    recipe = make("bidirectional", schedule="uniform", strategies=((0, 0, 0), (1, 0, 0), (0, 1, 0)))
    data = replace(even_blocks(16, 1, rows=5), epochs=np.array([0, 1, 2, 3, 9]))
    noised = noise(data, recipe)
    assert (~noised.maskable[:, 0]).tolist() == [False, True, False, False, False]
    assert (noised.x0[:, -1] == PAD).tolist() == [False, False, True, True, True]
    assert noise(even_blocks(16, 1), recipe).maskable.all()  # epoch 0: the first


# --- complementary pairs --------------------------------------------------------------------------

def pairs_of(data, recipe, seed=3, step=0, numbers=None):
    """The rows of a batch twice each, noised as rows 2p and 2p + 1 of a step, or these of them."""
    B = 2 * len(data.x0)
    numbers = range(B) if numbers is None else numbers
    draw = Draw.of(recipe, seed, step, numbers, B)
    assert draw.rows == [n // 2 for n in numbers] and draw.batch_rows == len(data.x0)
    return corrupt(data.select(draw.rows), recipe, draw)


@settings(deadline=None, max_examples=100)
@given(packings(), st.sampled_from(NOISY), st.sampled_from([1, 2, 4, 40]), st.booleans(),
       st.integers(0, 999))
def test_a_pair_masks_every_maskable_token_once_and_counts_it_once(rows, objective, K, antithetic,
                                                                    seed):
    recipe = make(objective, block_size=K, schedule="count", antithetic=antithetic,
                  complementary=True)
    data = batch(*rows, holes=0.4, seed=seed)
    noised = pairs_of(data, recipe, seed)
    masked = noised.masked.view(-1, 2, data.x0.shape[1])
    assert torch.equal(masked.sum(1), data.maskable.long())
    assert noised.maskable.sum() == data.maskable.sum()  # the loss is over this number
    plain = noise(data, replace(recipe, complementary=False), seed)
    assert torch.equal(masked[:, 0], plain.masked)
    for row, lengths in enumerate(rows):
        for block in blocks_of(lengths, recipe):
            n = int(data.maskable[row, block].sum())
            for half in (2 * row, 2 * row + 1):
                weights = noised.weight[half, block][noised.masked[half, block]]
                m = len(weights)
                want = 1.0 if m == n else n / (2 * max(m, 1))
                assert weights.tolist() == pytest.approx([want] * m, rel=1e-6)


def test_a_pair_is_the_same_however_rows_are_split_among_processes():
    recipe = make(block_size=4, schedule="count", complementary=True)
    data = batch([8, 8], [16], [12, 4])
    whole = pairs_of(data, recipe, step=7)
    for split in ([range(0, 3), range(3, 6)], [[5], [0, 4], [3, 1, 2]], [[n] for n in range(6)]):
        for numbers in split:
            part = pairs_of(data, recipe, step=7, numbers=numbers)
            for name, x in vars(part).items():
                assert torch.equal(x, getattr(whole, name)[list(numbers)]), name


def test_rows_are_in_pairs_only_where_asked_for():
    draw = Draw.of(make(schedule="count"), 1, 2, range(3, 5), 8)
    assert draw == Draw(1, 2, range(3, 5), 8, None)


@pytest.mark.parametrize("objective, lengths, shift", [
    ("bidirectional", [7], False), ("bidirectional", [4, 3], True), ("ar_diffusion", [5], True),
    ("block", [6], False), ("block", [5], True)])
def test_the_expected_loss_of_a_pair_is_the_nelbo_of_each_block(objective, lengths, shift):
    """All masks of every block, m uniform in 1 to n as `count` draws it: 1e-10 in float64."""
    recipe = make(objective, block_size=6, shift=shift, schedule="count", complementary=True)
    data, net = batch(lengths, seed=4), small_model().double()
    clean = Noised.clean(data)

    def losses(masked):
        """(T,) float64: each masked token's."""
        xt = data.x0.masked_fill(masked, MASK)
        found = torch.zeros(data.x0.shape[1], dtype=torch.float64)
        with torch.no_grad():
            found[masked[0]] = token_losses(net, replace(clean, xt=xt, masked=masked), recipe)
        return found

    for block in blocks_of(lengths, recipe):
        inside = [i for i in block if data.maskable[0, i]]
        n = len(inside)
        exact, expected, tokens = 0.0, 0.0, 0.0
        for m in range(1, n + 1):
            for chosen in combinations(inside, m):
                first = np.zeros(data.x0.shape[1], bool)
                first[list(chosen)] = True
                maskable = np.zeros_like(first)
                maskable[inside] = True
                exact += losses(torch.from_numpy(first)[None]).sum() / (m * comb(n, m))
                p = 1 / (n * comb(n, m))
                for complement in (False, True):
                    masked, counted, weight = paired(first, maskable, np.full(len(first), m / n),
                                                     complement)
                    weight = torch.from_numpy(np.broadcast_to(weight, masked.shape).copy())
                    expected += p * (losses(torch.from_numpy(masked)[None]) * weight).sum()
                    tokens += p * counted.sum()
        assert n and abs(expected - exact) < 1e-10 * abs(exact) and abs(tokens - n) < 1e-10


# --- the loss ------------------------------------------------------------------------------------

def plain_loss(net, noised, recipe, rows):
    """Σ weight · -log p from all the logits of one row after another.

    They are read where the objectives' definition says.
    """
    size, noisy = ATTENTION_OF[recipe.objective]
    K, total = recipe.block_size if size == "K" else size, 0.0
    for r, lengths in enumerate(rows):
        T = sum(lengths)
        positions = torch.tensor([i - block_of(i, lengths, K)[0] for i in range(T)])
        tokens = noised.xt[r]
        if noisy:
            tokens, positions = torch.cat([tokens, noised.x0[r]]), positions.repeat(2)
        log_p = dense_log_p(net, tokens, positions, who_sees(lengths, K, noisy))
        for i in noised.masked[r].nonzero()[:, 0].tolist():
            at = i - 1 if recipe.shift else i
            if recipe.shift and noisy and block_of(i, lengths, K)[2] == i:
                at = T + i - 1  # the clean half's
            total = total - noised.weight[r, i].double() * log_p[at, noised.x0[r, i]]
    return total


def gradients(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("chunk", [3, None])
@pytest.mark.parametrize("objective, shift", ALL_SHIFTS)
def test_weighted_loss_and_gradients_from_full_logits(objective, shift, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(model, "LOGITS_AT_ONCE", chunk * VOCAB + 1)
    rows, net = [[9, 1, 11], [21], [4, 4, 13]], small_model()
    recipe = make(objective, shift=shift, block_size=3)
    noised = noise(batch(*rows, holes=0.1), recipe)
    assert noised.masked.sum() > 10
    losses = token_losses(net, noised, recipe)
    assert losses.shape == (int(noised.masked.sum()),) and losses.dtype == torch.float32
    got, want = weighted_loss(net, noised, recipe), plain_loss(net, noised, recipe, rows)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    for a, b in zip(gradients(got, net), gradients(want, net)):
        assert (a - b).norm() <= 2e-5 * b.norm()


@pytest.mark.parametrize("objective, shift", ALL_SHIFTS)
def test_micro_batches_sum_to_the_whole(objective, shift):
    net, recipe = small_model(), make(objective, shift=shift)
    noised = noise(batch([9, 1, 11], [21], [4, 4, 13], [2] * 10 + [1], [20, 1]), recipe)
    whole = weighted_loss(net, noised, recipe)
    cuts = ((0, 2), (2, 3), (3, 5))
    parts = sum(weighted_loss(net, noised.rows(a, b, "cpu"), recipe) for a, b in cuts)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(gradients(parts, net), gradients(whole, net)):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("objective, shift", ALL_SHIFTS)
def test_nothing_to_score_is_a_loss_of_0(objective, shift):
    net, recipe = small_model(), make(objective, shift=shift)
    loss = weighted_loss(net, noise(batch([1, 1, 1]), recipe), recipe)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in net.parameters() if p.grad is not None)


# --- the likelihood bound ------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 9))
def test_every_mask_has_the_integral_as_its_weight(n):
    """1/(m·C(n,m)) against quadrature of t^(m-1) (1-t)^(n-m), to 1e-10, and every mask once."""
    data = batch([1, n + 1])  # the document's first token is context
    all_noised = list(every_mask(Noised.clean(data), make("bidirectional"), n))
    found = {tuple(noised.masked[0, 2:].tolist()) for noised in all_noised}
    subsets = [chosen for m in range(1, n + 1) for chosen in combinations(range(n), m)]
    assert found == {tuple(i in chosen for i in range(n)) for chosen in subsets}
    assert len(all_noised) == 2**n - 1
    for noised in all_noised:
        m = int(noised.masked.sum())
        integral = over_t(lambda t: t ** (m - 1) * (1 - t) ** (n - m))
        assert abs(1 / (m * comb(n, m)) - integral) < 1e-10
        weights = noised.weight[noised.masked].tolist()  # float32
        assert weights == pytest.approx([integral] * m, rel=1e-7)
        assert torch.equal(noised.xt, torch.where(noised.masked, MASK, data.x0))


def brute_nelbo(net, data, recipe, rows):
    """Block after block, mask after mask: a forward of the clean past and the block alone.

    Its attention is block-causal.
    """
    size, total = ATTENTION_OF[recipe.objective][0], 0.0
    for r, lengths in enumerate(rows):
        for block in blocks_of(lengths, recipe):
            doc, end = block_of(block[0], lengths, None)[0], block[-1] + 1
            chosen = [i for i in block if data.maskable[r, i]]
            position = torch.arange(end - doc)
            K = {"K": recipe.block_size, None: len(position), 1: 1}[size]
            sees = position < position[:, None] // K * K + K
            for m in range(1, len(chosen) + 1):
                for masked in combinations(chosen, m):
                    tokens = data.x0[r, doc:end].clone()
                    tokens[[i - doc for i in masked]] = MASK
                    log_p = dense_log_p(net, tokens, position, sees)
                    read = [log_p[i - doc - recipe.shift, data.x0[r, i]].item() for i in masked]
                    total -= sum(read) / (m * comb(len(chosen), m))
    return total


@pytest.mark.parametrize("objective, K, shift", [
    ("block", 2, False), ("block", 2, True), ("block", 3, False), ("block", 3, True),
    ("block", 4, False), ("block", 4, True), ("bidirectional", 1, False), ("ar_diffusion", 1, True),
])
def test_the_nelbo_is_exact_in_short_blocks(objective, K, shift):
    rows = [[6, 1, 2, 5], [14]] if objective == "block" else [[6, 1, 2, 5]]
    net, data = small_model(), batch(*rows, holes=0.1)
    recipe = make(objective, block_size=K, shift=shift)
    nats, variance = nelbo(net, data, recipe)
    with torch.no_grad():
        assert nats == pytest.approx(brute_nelbo(net, data, recipe, rows), rel=1e-5)
    assert variance == 0


@pytest.mark.parametrize("objective, lengths, exact_up_to", [
    ("bidirectional", [7, 4, 3], 0),
    ("bidirectional", [11, 4], 10),
    ("ar_diffusion", [11, 4], 10),
    ("block", [9, 7], 0),
])
def test_the_nelbo_by_monte_carlo_agrees_with_the_exact_one(objective, lengths, exact_up_to,
                                                            monkeypatch):
    """A document of 10 maskable tokens is enumerated after all, or shorter ones are not.

    Bound: 5 standard errors.
    """
    net, data, recipe = small_model(), batch(lengths), make(objective, block_size=3)
    if exact_up_to:
        mean, variance = nelbo(net, data, recipe, draws=500)
        monkeypatch.setattr(diffusion, "EXACT_UP_TO", exact_up_to)
        exact, zero = nelbo(net, data, recipe)
    else:
        exact, zero = nelbo(net, data, recipe)
        monkeypatch.setattr(diffusion, "EXACT_UP_TO", 0)
        mean, variance = nelbo(net, data, recipe, draws=500)
    assert zero == 0 and 0 < variance**0.5 < 0.01 * exact and abs(mean - exact) < 5 * variance**0.5


def test_the_nelbo_enumerates_up_to_8_and_each_row_has_its_own_masks():
    net, recipe = small_model(), make("bidirectional")
    assert nelbo(net, batch([9]), recipe)[1] == 0 < nelbo(net, batch([10]), recipe)[1]
    data = batch([12], [10, 2], [12])
    whole = nelbo(net, data, recipe, seed=2)[0]
    parts = [nelbo(net, data.select([row]), recipe, seed=2, rows=[row])[0] for row in range(3)]
    assert whole == pytest.approx(sum(parts), rel=1e-6)
    assert whole != pytest.approx(nelbo(net, data, recipe, seed=3)[0], rel=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_at_block_size_1_the_nelbo_is_the_chain_rule(shift):
    """-Σ log p(x_i | x_<i, <mask> at i), a causal forward for each i.

    With shift it is the likelihood of `ar`, too.
    """
    rows = [[7, 1, 5], [13]]
    net, data = small_model(), batch(*rows)
    nats, variance = nelbo(net, data, make(block_size=1, shift=shift))
    want = 0.0
    with torch.no_grad():
        for r, lengths in enumerate(rows):
            for i in range(13):
                a = block_of(i, lengths, None)[0]
                if i > a:
                    tokens = torch.cat([data.x0[r, a:i], torch.tensor([MASK])])
                    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
                    log_p = dense_log_p(net, tokens, torch.arange(len(tokens)), causal)
                    want -= log_p[-2 if shift else -1, data.x0[r, i]].item()
        assert nats == pytest.approx(want, rel=1e-5) and variance == 0
        if shift:
            ar = make("ar")
            assert nats == pytest.approx(nelbo(net, data, ar)[0], rel=1e-5)
            loss = weighted_loss(net, noise(data, ar), ar).item()
            assert nats == pytest.approx(loss, rel=1e-5)


class Ranks:
    """The processes of a world, one after another: each gets the sum up to itself."""

    def __init__(self, size):
        self.size, self.rank, self.totals = size, 0, None

    def sum(self, *values):
        values = np.array(values)
        self.totals = values if self.totals is None else self.totals + values
        return self.totals


@pytest.mark.parametrize("objective", ["ar", "block", "bidirectional"])
def test_evaluation_is_the_same_however_the_rows_are_shared_out(objective):
    """By one process or three, of which the last has repeated rows alone; 4 rows at a time or 1."""
    net, recipe = small_model(), make(objective)
    data = batch([9, 12], [21], [20, 1], [4, 17], holes=0.1)
    token_bytes = np.arange(VOCAB) % 3
    nats, variance = nelbo(net, data, recipe, draws=3)
    scored = data.x0[data.maskable]
    wanted = {"tokens": len(scored), "bytes": int(token_bytes[scored].sum()),
              "nelbo": pytest.approx(nats / len(scored), rel=1e-6),
              "nelbo_stderr": pytest.approx(variance**0.5 / len(scored), rel=1e-6)}
    for size, micro_batch in ((1, 4), (1, 3), (3, 1), (3, 4)):
        world = Ranks(size)
        for rank in range(size):
            world.rank = rank
            found = evaluate(net, data, recipe, token_bytes, 3, micro_batch, world)
        bits = found.pop("bits_per_byte")
        assert found == wanted
        assert bits == pytest.approx(nats / log(2) / wanted["bytes"], rel=1e-6)


def test_tokens_without_bytes_have_no_bits_per_byte():
    """Held-out samples of which nothing but <eos> is scored."""
    world = SimpleNamespace(rank=0, size=1, sum=lambda *values: [float(v) for v in values])
    found = evaluate(small_model(), batch([4]), make(), torch.zeros(VOCAB, dtype=torch.int64), 2, 1,
                     world)
    assert found["bits_per_byte"] != found["bits_per_byte"] and found["nelbo"] > 0


# --- attention-mask annealing --------------------------------------------------------------------

def test_annealing_opens_causal_attention_to_bidirectional_one_token_at_a_time():
    recipe, (doc_start, doc_end) = make("bidirectional", anneal_steps=10), packed([7, 13], [20])
    masks = [spans_for(recipe, doc_start, doc_end, step).dense_mask() for step in range(11)]
    causal = spans_for(make("ar_diffusion"), doc_start, doc_end).dense_mask()
    full = spans_for(make("bidirectional"), doc_start, doc_end).dense_mask()
    assert torch.equal(masks[0], causal) and torch.equal(masks[10], full)
    i = torch.arange(20)
    for step, mask in enumerate(masks[:10]):
        assert torch.equal(mask, full & (i[None, :] <= i[:, None] + 2 * step))
