"""Each estimator against what its docstring derives: every mask of a tiny completion is enumerated,
in float64; the trace is held against one plain forward for each state that decoding went through.

The statistical test runs on a fixed seed, and its bound is 5 standard deviations (two-sided
p = 6e-7 for each of its comparisons).
"""
from dataclasses import replace
from functools import cache
from itertools import permutations
from math import factorial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_decoder import BOS, EOS, MASK, ORDINARY, VOCAB, Tok, banned_ids, random_model

import estimators
import model as model_file
from configurator import Mistake
from decode import Decoding, decode, write
from diffusion import Recipe
from estimators import GIVEN, NEVER, Completions, Estimate, Pass, log_probs, passes_of
from spans import Spans

BANNED = torch.tensor(sorted(banned_ids(Tok, VOCAB + 2, may_end=True)))
ALLOWED = [v for v in range(VOCAB + 2) if v not in BANNED.tolist()]
MODELS = [("block", False), ("block", True), ("bidirectional", False), ("bidirectional", True)]
OF_PAIRS = ["coupled", "independent", "sequence"]
RANDOM = ["masked", *OF_PAIRS]


def recipe_of(objective, shift, K=4):
    return Recipe(objective, shift, K, mask_id=MASK)


def completions_of(recipe, shapes, rows=None, T=0, seed=0):
    """Completions of random tokens.

    shapes: of each row its prompt, its scored tokens, and how many masks were left behind these.
    T: the width, at least that of the longest row.
    """
    lengths = [sum(shape) for shape in shapes]
    if recipe.objective == "block":  # whole blocks, the last of which has the stop id
        K = recipe.block_size
        lengths = [-(-(prompt + scored) // K) * K for prompt, scored, _ in shapes]
    B, T = len(shapes), max(T, *lengths)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(ORDINARY, VOCAB, (B, T), generator=random)
    written = torch.full((B, T), GIVEN)
    scored = torch.zeros(B, T, dtype=torch.bool)
    doc_end = torch.zeros(B, T, dtype=torch.int32)
    for b, ((prompt, count, _), length) in enumerate(zip(shapes, lengths)):
        written[b, prompt:length] = NEVER
        written[b, prompt:prompt + count] = torch.arange(count)
        scored[b, prompt:prompt + count] = True
        doc_end[b, :length] = length
    rows = list(range(B)) if rows is None else rows
    return Completions(tokens, written, scored, torch.zeros_like(doc_end), doc_end, rows)


# --- which masks ----------------------------------------------------------------------------------

shapes_of_rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 11), st.integers(0, 5)),
                          min_size=1, max_size=4)
some_rates = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["block", "bidirectional"]), st.integers(1, 8), shapes_of_rows, some_rates,
       st.integers(1, 3), st.sampled_from(["coupled", "sequence"]), st.integers(0, 2**63 - 1))
def test_a_scored_token_is_masked_in_exactly_one_pass_of_a_pair(
        objective, K, shapes, t, pairs, name, seed):
    recipe = recipe_of(objective, False, K)
    made = completions_of(recipe, shapes)
    how = Estimate(name, pairs, "one", *t)
    passes = passes_of(how, made, recipe, seed, step=3)
    after = (made.written >= 0) & ~made.scored
    if name == "coupled":
        everything, *passes = passes
        assert torch.equal(everything.masked, made.written >= 0)
    assert len(passes) == 2 * pairs
    for first, second in zip(passes[::2], passes[1::2]):
        times = first.masked.int() + second.masked.int()
        assert (times[made.scored] == 1).all()
        assert (times[made.written == GIVEN] == 0).all()  # the prompt, and the padding
        assert (times[after] == 2).all()
        for one in (first, second):
            assert torch.equal(one.weight != 0, one.masked & made.scored)
            if name == "coupled":
                assert (one.weight[one.weight != 0] == torch.tensor(1 / (pairs + 1))).all()


@settings(deadline=None, max_examples=50)
@given(shapes_of_rows, st.sampled_from(RANDOM), st.booleans())
def test_what_is_not_scored_has_no_weight_and_what_follows_is_always_masked(shapes, name, released):
    recipe = recipe_of("bidirectional", False)
    made = completions_of(recipe, shapes)
    weights = "released" if released else "one"
    for one in passes_of(Estimate(name, 2, weights), made, recipe, seed=1, step=0):
        assert one.masked[(made.written >= 0) & ~made.scored].all()
        assert not one.masked[made.written == GIVEN].any()
        assert torch.equal(one.weight != 0, one.masked & made.scored)


def test_released_weights_are_one_over_the_rate():
    """A mask at rate t and weight 1/t: t is the same in a noise block, and 1/w + 1/w' = 1."""
    recipe = recipe_of("block", False)
    made = completions_of(recipe, [(3, 200, 0)])
    how = Estimate("coupled", 1, "released", 0.25, 0.5)
    _, first, second = passes_of(how, made, recipe, seed=1, step=0)
    t = torch.where(first.weight > 0, 1 / (2 * first.weight), 1 - 1 / (2 * second.weight))
    t = torch.cat([t[0, 3:4].expand(3), t[0, 3:203], t[0, 202:203]]).view(-1, 4)  # by K-block
    assert ((t - t[:, :1]).abs() < 1e-5).all()
    assert t.min() > 0.249 and t.max() < 0.501 and t[:, 0].std() > 0.05


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("objective", ["block", "bidirectional"])
def test_a_rows_masks_depend_on_its_number_alone(name, objective):
    recipe = recipe_of(objective, False)
    shapes = [(2, 7, 3), (5, 30, 0), (1, 0, 2), (3, 9, 1)]
    how = Estimate(name, pairs=3)
    rows = [11, 2**32 - 1, 0, 5]
    together = passes_of(how, completions_of(recipe, shapes, rows), recipe, seed=2**63 - 1, step=9)
    for b, (shape, row) in enumerate(zip(shapes, rows)):
        made = completions_of(recipe, [shape], [row], T=13 + b)
        alone = passes_of(how, made, recipe, seed=2**63 - 1, step=9)
        assert len(alone) == len(together)
        length = int(made.doc_end.max())
        for one, all_ in zip(alone, together):
            assert torch.equal(one.masked[0, :length], all_.masked[b, :length])
            assert torch.equal(one.weight[0, :length], all_.weight[b, :length])
    made = completions_of(recipe, shapes, rows)
    for other in (passes_of(how, made, recipe, seed=1, step=9),
                  passes_of(how, made, recipe, seed=2**63 - 1, step=10)):
        assert any(not torch.equal(a.masked, b.masked) for a, b in zip(together, other))
    twins = completions_of(recipe, [shapes[1], shapes[1]], rows=[0, 1])
    assert any(not torch.equal(*one.masked) for one in passes_of(how, twins, recipe, 1, 0))


@pytest.mark.parametrize("name, passes", [("masked", 1), ("coupled", 5), ("independent", 5),
                                          ("sequence", 4), ("trace", 6)])
def test_what_each_costs(name, passes):
    recipe = recipe_of("bidirectional", False)
    made = completions_of(recipe, [(2, 4, 3), (1, 6, 0)])
    assert len(passes_of(Estimate(name, pairs=2), made, recipe, seed=1, step=0)) == passes


# --- the expectation, over all masks --------------------------------------------------------------

def plain_logits(net, recipe, ids, length):
    """(length, vocab): the prediction of each position, by a forward without a clean half.

    ids: (length,) int64, masks among them: in no block but, if there are blocks, the last one.
    """
    zeros = torch.zeros(1, length, dtype=torch.int32)
    K = recipe.block_size if recipe.objective == "block" else None
    hidden = net(ids[None], Spans.of(zeros, zeros + length, K))[0]  # (length, d_model)
    if recipe.shift:
        hidden = torch.cat([hidden[:1], hidden[:-1]])
    return net.logits(hidden)


def plain_log_p(net, recipe, ids, hidden, i, temperature):
    """log p of token i where the tokens `hidden` (T,) are masked, a scalar, the plain way."""
    length = len(ids)
    hidden = hidden.clone()
    if recipe.objective == "block":  # those before the block are clean, those after it unseen
        begin = i // recipe.block_size * recipe.block_size
        length = begin + recipe.block_size
        hidden[:begin] = False
    shown = ids.masked_fill(hidden, MASK)[:length]
    logits = plain_logits(net, recipe, shown, length)[i] / temperature
    return logits[ids[i]] - logits[ALLOWED].logsumexp(0)


PROMPT, COUNT = 3, 6  # under K = 4: blocks of one, four, and one scored token


def one_completion(recipe):
    return completions_of(recipe, [(PROMPT, COUNT, 3)], seed=5)


def places(subset):
    """The positions of a subset of the scored tokens, the bits of a number."""
    return [PROMPT + k for k in range(COUNT) if subset >> k & 1]


def hidden_by(made, subset):
    """(T,) bool: the subset, and what follows the stop id."""
    hidden = (made.written[0] >= 0) & ~made.scored[0]
    hidden[places(subset)] = True
    return hidden


@cache
@torch.no_grad()
def table_of(objective, shift, temperature=0.7):
    """{(subset, i): log p of token i where that subset of the scored tokens is masked}."""
    recipe, net, found = recipe_of(objective, shift), random_model(1), {}
    made = one_completion(recipe)
    for subset in range(1, 2**COUNT):
        hidden = hidden_by(made, subset)
        for i in places(subset):
            log_p = plain_log_p(net, recipe, made.tokens[0], hidden, i, temperature)
            found[subset, i] = log_p.item()
    return found


def group_of(recipe, i):
    """The scored tokens of token i's noise block, as a subset."""
    K = recipe.block_size if recipe.objective == "block" else 10**6
    return sum(1 << k for k in range(COUNT) if (PROMPT + k) // K == i // K)


def subsets_with(i, group):
    """All subsets of a group that hold token i."""
    own = 1 << (i - PROMPT)
    return [s for s in range(2**COUNT) if s & own and s & ~group == 0]


def L(table, recipe, i, u):
    """L_i(u): the mean of log p_i, the others of its noise block masked with probability u."""
    group = group_of(recipe, i)
    others = group.bit_count() - 1
    total = 0.0
    for subset in subsets_with(i, group):
        m = subset.bit_count() - 1
        total += u**m * (1 - u)**(others - m) * table[subset, i]
    return total


def elbo(table, recipe, i):
    """1/n · Σ over m of the mean of log p_i where i and m - 1 others of its block are masked."""
    group = group_of(recipe, i)
    n = group.bit_count()
    by_size = {m: [] for m in range(1, n + 1)}
    for subset in subsets_with(i, group):
        by_size[subset.bit_count()].append(table[subset, i])
    return sum(np.mean(found) for found in by_size.values()) / n


def nodes(low, high):
    """Points and weights of the mean over t ~ U(low, high), exact for polynomials of degree 13."""
    x, w = np.polynomial.legendre.leggauss(7)
    return low + (high - low) * (x + 1) / 2, w / 2


def derived(table, recipe, i, how):
    """The expectation of token i's estimate, as the docstrings of estimators.py have it."""
    if how.estimator == "masked":
        return L(table, recipe, i, 1.0)
    if how.estimator == "sequence":
        return elbo(table, recipe, i)
    mean = 0.0
    for t, share in zip(*nodes(how.t_low, how.t_high)):
        first, second = (1, 1) if how.pair_weights == "released" else (t, 1 - t)
        mean += share * (first * L(table, recipe, i, t) + second * L(table, recipe, i, 1 - t))
    return (L(table, recipe, i, 1.0) + how.pairs * mean) / (how.pairs + 1)


class Script:
    """A random generator that draws what it was told to, in turn, again and again."""

    def __init__(self, *draws):
        self.draws, self.next = draws, 0

    def random(self, n):
        drawn = self.draws[self.next % len(self.draws)]
        self.next += 1
        return np.broadcast_to(np.asarray(drawn, float), n).copy()


LENGTH = 12  # of the row


def at_places(subset):
    """(LENGTH,) draws: below any rate at the subset's positions, above it elsewhere."""
    r = np.full(LENGTH, 1 - 1e-12)
    r[places(subset)] = 1e-12
    return r


def outcomes(how):
    """All that an estimator can draw for a pair: a list of (probability, draws)."""
    if how.estimator == "masked":
        return [(1.0, ())]
    if how.estimator == "sequence":
        return outcomes_by_count()
    found, none = [], at_places(0)
    for t, share in zip(*nodes(how.t_low, how.t_high)):
        U = (t - how.t_low) / (how.t_high - how.t_low)
        for subset in range(2**COUNT):
            m = subset.bit_count()
            first = share * t**m * (1 - t)**(COUNT - m)
            second = share * (1 - t)**m * t**(COUNT - m)
            if how.estimator == "coupled":
                found.append((first, (U, at_places(subset))))
            else:  # f(first mask) + g(second mask): one of them moves while the other is empty
                found.append((first, (U, at_places(subset), none)))
                found.append((second, (U, none, at_places(subset))))
        if how.estimator == "independent":
            found.append((-share, (U, none, none)))
    return found


def outcomes_by_count():
    """t in twelve equal parts, which makes every count of 1, 4 or 6 tokens as likely, and all
    orders in which the tokens may be chosen."""
    found = []
    for order in permutations(range(COUNT)):
        r = np.ones(LENGTH)
        r[PROMPT:PROMPT + COUNT] = np.array(order) / COUNT
        found += [(1 / 12 / factorial(COUNT), (1 - (k + 0.5) / 12, r)) for k in range(12)]
    return found


def estimates(how, objective, rows):
    """(rows, COUNT) float64: what the passes of `rows` equal rows make of each token."""
    recipe = recipe_of(objective, True)
    lookup = np.zeros((2**COUNT, COUNT))
    for (subset, i), value in table_of(objective, True).items():
        lookup[subset, i - PROMPT] = value
    many = completions_of(recipe, [(PROMPT, COUNT, 3)] * rows)
    assert many.tokens.shape[1] == LENGTH
    found = np.zeros((rows, COUNT))
    for one in passes_of(how, many, recipe, seed=3, step=0):
        masked = one.masked[:, PROMPT:PROMPT + COUNT].numpy()
        subset = masked @ (1 << np.arange(COUNT))  # (rows,)
        found += one.weight[:, PROMPT:PROMPT + COUNT].numpy() * lookup[subset]
    return found


def expectations(how, objective):
    recipe, table = recipe_of(objective, True), table_of(objective, True)
    return [derived(table, recipe, PROMPT + k, how) for k in range(COUNT)]


ESTIMATES = [
    Estimate("masked"), Estimate("coupled"), Estimate("coupled", 2, "released", 0.4, 0.9),
    Estimate("independent"), Estimate("independent", 1, "released", 0.1, 0.7),
    Estimate("sequence"), Estimate("sequence", 3)]


@pytest.mark.parametrize("objective", ["block", "bidirectional"])
@pytest.mark.parametrize("how", ESTIMATES, ids=str)
def test_the_expectation_over_all_masks_is_the_derived_one(objective, how, monkeypatch):
    """All draws of a pair are enumerated, a row each; λ pairs of a row draw the same, which changes
    no expectation of their sum."""
    chances, draws = zip(*outcomes(how))
    assert abs(sum(chances) - 1) < 1e-12
    monkeypatch.setattr(estimators, "stream", lambda seed, purpose, step, row: Script(*draws[row]))
    mean = np.array(chances) @ estimates(how, objective, len(draws))  # (COUNT,)
    np.testing.assert_allclose(mean, expectations(how, objective), rtol=3e-7)  # float32 weights


@pytest.mark.parametrize("objective", ["block", "bidirectional"])
@pytest.mark.parametrize("how", ESTIMATES[1:], ids=str)
def test_so_it_is_under_the_masks_that_are_really_drawn(objective, how):
    """The mean over rows that differ in their numbers alone, within 5 sigma per token."""
    found = estimates(how, objective, rows=2000)
    sigma = found.std(0, ddof=1) / len(found)**0.5
    off = np.abs(found.mean(0) - expectations(how, objective))
    assert (off <= 5 * sigma + 1e-6).all()


def test_the_sums_of_weights():
    """Of a model for which log p is 1: an average, and 1.5 times that with the released weights."""
    recipe = recipe_of("bidirectional", False)
    constant = {(s, i): 1.0 for s in range(2**COUNT) for i in places(s)}
    for how, wanted in [(Estimate("coupled"), 1), (Estimate("coupled", 4), 1),
                        (Estimate("coupled", 1, "released"), 1.5),
                        (Estimate("independent", 1, "released"), 1.5),
                        (Estimate("coupled", 2, "released"), 5 / 3), (Estimate("sequence"), 1),
                        (Estimate("masked"), 1)]:
        assert abs(derived(constant, recipe, PROMPT, how) - wanted) < 1e-12


# --- the sum over passes --------------------------------------------------------------------------

def gradient_of(value, net):
    grads = torch.autograd.grad(value, list(net.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("objective, shift", MODELS)
@pytest.mark.parametrize("chunk, one_text", [(2**26, 2**26), (100, 2**26), (2**26, 0)])
def test_log_probs_are_what_one_plain_forward_for_each_token_says(
        objective, shift, chunk, one_text, monkeypatch):
    """Random passes over ragged rows: value and gradient, also where the head works in chunks, and
    where each pass has a clean text of its own."""
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", chunk)
    monkeypatch.setattr(estimators, "ONE_TEXT", one_text)
    recipe, net, temperature = recipe_of(objective, shift), random_model(2), 1.3
    made = completions_of(recipe, [(3, 6, 2), (1, 4, 3), (5, 8, 0), (4, 3, 1)])
    random = torch.Generator().manual_seed(1)
    passes = []
    for _ in range(2):
        drawn = torch.rand(made.tokens.shape, generator=random)
        hidden = (made.written >= 0) & ((drawn < 0.6) | ~made.scored)
        passes.append(Pass(hidden, torch.where(hidden & made.scored, drawn, 0)))
    factor = torch.rand(made.tokens.shape, generator=random).double()
    found = log_probs(net, made, passes, recipe, temperature, BANNED)
    assert found.dtype == torch.float64
    rows = []
    for b in range(len(made.tokens)):
        length = int(made.doc_end[b, 0])
        row = [torch.zeros(()) for _ in range(made.tokens.shape[1])]
        for one in passes:
            for i in one.weight[b].nonzero()[:, 0].tolist():
                log_p = plain_log_p(net, recipe, made.tokens[b, :length], one.masked[b, :length],
                                    i, temperature)
                row[i] = row[i] + one.weight[b, i] * log_p
        rows.append(torch.stack([x.double() for x in row]))
    wanted = torch.stack(rows)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient_of((found * factor).sum(), net),
                               gradient_of((wanted * factor).sum(), net), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("objective, shift", MODELS)
@pytest.mark.parametrize("name", [*RANDOM, "trace"])
def test_nothing_to_read_is_zero_and_has_a_gradient(objective, shift, name):
    recipe, net = recipe_of(objective, shift), random_model(2, dtype=torch.float32)
    made = completions_of(recipe, [(4, 0, 3), (3, 0, 1)])
    passes = passes_of(Estimate(name), made, recipe, seed=0, step=0)
    found = log_probs(net, made, passes, recipe, 1.0, BANNED)
    assert found.shape == made.tokens.shape and found.dtype == torch.float32
    assert (found == 0).all()
    found.sum().backward()
    for p in net.parameters():
        assert p.grad is None or (p.grad == 0).all()
    assert net.layers[0].mlp.up_proj.weight.grad is not None


def test_it_is_one_forward_for_all_passes_and_one_clean_text():
    recipe, net, calls = recipe_of("block", False), random_model(2), []
    made = completions_of(recipe, [(3, 6, 0), (2, 9, 0)])
    net.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    passes = passes_of(Estimate("coupled", pairs=2), made, recipe, seed=0, step=0)
    log_probs(net, made, passes, recipe, 1.0, BANNED)
    assert calls == [(2, made.tokens.shape[1] + 5 * 12)]  # the blocks from the prompt's last one


# --- the order in which it was written ------------------------------------------------------------

def rollout(net, recipe, prompts, length, how):
    """Write completions by decode.decode, up to `length` tokens with the prompt.

    Returns Completions, and the decisions of each row: lists of (text before, {place: token},
    Σ log p by the logits that decoding itself saw).
    """
    texts = [[*prompt, *[None] * (length - len(prompt))] for prompt in prompts]
    written = [[GIVEN if i is not None else NEVER for i in text] for text in texts]
    decisions = [[] for _ in texts]
    steps = {}  # (row, noise block): how many have been done
    size = recipe.block_size if recipe.objective == "block" else length
    for step in decode(net, Tok, recipe, texts, how):
        log_p = (step.logits / how.temperature).log_softmax(-1)  # (b, n, vocab)
        before = [list(text) for text in texts]
        for b, row in enumerate(step.rows.tolist()):
            at = step.taken[b].nonzero()[:, 0].tolist()
            taken = {int(step.positions[b, n]): int(step.tokens[b, n]) for n in at}
            if not taken:
                continue
            key = row, min(taken) // size
            for i in taken:
                written[row][i] = steps.get(key, 0)
            steps[key] = steps.get(key, 0) + 1
            said = sum(log_p[b, n, step.tokens[b, n]].item() for n in at)
            decisions[row].append((before[row], taken, said))
        write(texts, step)
    return recorded(recipe, texts, written, [len(prompt) for prompt in prompts]), decisions


def recorded(recipe, texts, written, prompts):
    """Completions of rows that decoding has written."""
    B, T = len(texts), len(texts[0])
    tokens = torch.tensor([[token or 0 for token in text] for text in texts])
    scored = torch.zeros(B, T, dtype=torch.bool)
    doc_end = torch.zeros(B, T, dtype=torch.int32)
    for b, (text, prompt) in enumerate(zip(texts, prompts)):
        stops = [i for i in range(prompt, T) if text[i] in Tok.stop_ids]
        end = stops[0] + 1 if stops else T
        length = T
        if recipe.objective == "block":
            length = -(-end // recipe.block_size) * recipe.block_size
        scored[b, prompt:end] = True
        doc_end[b, :length] = length
    written = torch.tensor(written).where(doc_end > 0, GIVEN)
    return Completions(tokens, written, scored, torch.zeros_like(doc_end), doc_end, list(range(B)))


def straight_line(net, recipe, decisions, temperature):
    """Σ log p of a row's decisions: one plain forward for each state that decoding was in."""
    total = torch.zeros((), dtype=torch.float64)
    for text, taken, _ in decisions:
        ids = torch.tensor([MASK if i is None else i for i in text])
        hidden = torch.tensor([i is None for i in text])
        for i, token in taken.items():
            with_it = ids.clone()
            with_it[i] = token
            total = total + plain_log_p(net, recipe, with_it, hidden, i, temperature)
    return total


PROMPTS = [[BOS, 7, 9], [BOS, 30], [BOS, 8, 8, 12, 21]]
ORDERS = {
    "left_to_right": Decoding("left_to_right"), "entropy": Decoding("entropy"),
    "two a step": Decoding("entropy", steps=2), "margin": Decoding("margin"),
    "entropy_bound": Decoding("entropy", entropy_bound=3.0),
    "pieces": Decoding("entropy", block_length=2),
}


def rollout_of(objective, shift, order, seed):
    """A model, its recipe, and what it wrote at temperature 1. It likes to stop early."""
    recipe, net = recipe_of(objective, shift), random_model(seed, scale=0.4)
    with torch.no_grad():
        net.lm_head.weight[EOS] *= 2
    return net, recipe, *rollout(net, recipe, PROMPTS, 12,
                                 replace(ORDERS[order], temperature=1.0, seed=seed))


def sums_of_trace(net, recipe, made, temperature=1.0):
    passes = passes_of(Estimate("trace"), made, recipe, seed=0, step=0)
    return log_probs(net, made, passes, recipe, temperature, BANNED).sum(1), len(passes)


CASES = [(order, 1) for order in ORDERS]
CASES += [(order, seed) for order in ("left_to_right", "entropy") for seed in (2, 3)]


@pytest.mark.parametrize("order, seed", CASES)
@pytest.mark.parametrize("objective, shift", MODELS)
def test_the_trace_is_the_log_probability_of_the_decisions_made(objective, shift, order, seed):
    """To 1e-6, in value and gradient, in all rows; the value also by decoding's own logits."""
    net, recipe, made, decisions = rollout_of(objective, shift, order, seed)
    found, passes = sums_of_trace(net, recipe, made)
    assert passes <= (4 if objective == "block" else 12)
    wanted = torch.stack([straight_line(net, recipe, row, 1.0) for row in decisions])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    said = torch.tensor([sum(said for _, _, said in row) for row in decisions])
    torch.testing.assert_close(found.float(), said, atol=1e-5, rtol=1e-5)
    factor = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)  # of the rows
    gradient = gradient_of((wanted * factor).sum(), net)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(gradient_of((found * factor).sum(), net), gradient, atol=1e-6,
                               rtol=0)


def test_the_rollouts_have_all_that_can_go_wrong():
    """Rows that stop early, tokens behind the stop id, masks that stay, orders that are mixed."""
    stopped = behind = stayed = mixed = 0
    for objective, shift in MODELS:
        for seed in (1, 2, 3):
            _, _, made, _ = rollout_of(objective, shift, "entropy", seed)
            after = (made.written >= 0) & ~made.scored
            stopped += int(after.any(1).sum())
            behind += int((after & (made.written < NEVER)).sum())
            stayed += int((after & (made.written == NEVER)).sum())
            when = made.written.masked_fill(made.written == NEVER, 99)
            mixed += int((when.diff() < 0).any(1).sum())
    assert min(stopped, behind, stayed, mixed) > 3


@pytest.mark.parametrize("objective, shift", MODELS)
@pytest.mark.parametrize("fault", ["reversed", "late", "without what is behind the stop id"])
def test_another_order_is_another_number(objective, shift, fault):
    """The comparison sees what it should: each fault is far beyond 1e-6, in most of the rows."""
    differences = []
    for seed in (1, 2, 3):
        net, recipe, made, decisions = rollout_of(objective, shift, "entropy", seed)
        when, decided = made.written, (made.written >= 0) & (made.written < NEVER)
        if fault == "reversed":
            when = torch.where(decided, when.max().clamp(max=11) - when, when)
        elif fault == "late":  # everything is decided in the first step
            when = torch.where(decided, 0, when)
        else:
            when = torch.where(made.scored | (when < 0), when, NEVER)
        found, _ = sums_of_trace(net, recipe, replace(made, written=when))
        for b, row in enumerate(decisions):
            differences.append(abs(found[b].item() - sum(said for _, _, said in row)))
    few = 0.2 if fault.startswith("without") else 0.7  # rows have nothing behind their stop id
    assert np.mean(np.array(differences) > 1e-4) > few


@pytest.mark.parametrize("shift", [False, True])
def test_in_blocks_of_one_token_a_single_pass_is_exact(shift):
    """At K = 1 `masked` is the trace."""
    recipe, net = recipe_of("block", shift, K=1), random_model(3)
    made, decisions = rollout(net, recipe, PROMPTS, 9, Decoding(temperature=1.0, seed=4))
    for name in ("trace", "masked"):
        passes = passes_of(Estimate(name), made, recipe, seed=0, step=0)
        assert len(passes) == 1
        found = log_probs(net, made, passes, recipe, 1.0, BANNED).sum(1)
        for b, row in enumerate(decisions):
            assert abs(found[b].item() - sum(said for _, _, said in row)) < 1e-5


# --- what does not go together --------------------------------------------------------------------

@pytest.mark.parametrize("objective, settings, words", [
    ("ar", {}, "objective='ar' has no estimator"),
    ("ar_diffusion", {}, "they are for 'block' and 'bidirectional'"),
    ("block", {"t_low": 0.9}, "t_low=0.9 is above t_high=0.8"),
    ("block", {"t_low": 0.0, "pair_weights": "released"}, "t_low=0.0 and t_high=0.8 must lie"),
    ("block", {"t_high": 1.0, "pair_weights": "released"}, "divides by t and 1 - t"),
    ("block", {"t_low": float("nan")}, "t_low=nan does not fit"),
    ("block", {"pairs": 0}, "pairs=0 does not fit"),
    ("block", {"estimator": "copled"}, "estimator='copled' does not fit"),
])
def test_what_does_not_go_together_is_one_sentence(objective, settings, words):
    recipe = recipe_of(objective, objective == "ar")
    with pytest.raises(Mistake) as caught:
        passes_of(Estimate(**settings), one_completion(recipe), recipe, seed=0, step=0)
    assert words in str(caught.value) and "\n" not in str(caught.value)
