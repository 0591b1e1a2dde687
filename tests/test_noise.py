"""The random numbers of decoding: Philox as published, one number for each (seed, row, position,
step, draw) whatever is asked for beside it, and the distributions they are said to have.

Bounds of the statistical tests: draws are fixed by their seeds, and a bound is passed by honest
noise with a probability above 0.9999.
"""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import noise

WORD = 2**32


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_published_answers(counter, key, expected):
    """The lines `philox4x32 10` of Random123's tests/kat_vectors."""
    found = noise.philox([torch.tensor(word) for word in words(counter)], words(key))
    assert [int(word) for word in found] == words(expected)


def philox_in_integers(counter, key):
    """Salmon et al. 2011, §3.3 and Figure 1, in Python's integers."""
    R0, L0, R1, L1 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * R0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * R1, WORD)
        R0, L0, R1, L1 = high1 ^ L0 ^ k0, low1, high0 ^ L1 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return [R0, L0, R1, L1]


numbers = st.integers(0, WORD - 1)


@given(st.tuples(numbers, numbers, numbers, numbers), st.tuples(numbers, numbers))
def test_philox_is_the_one_of_the_paper_in_plain_integers(counter, key):
    found = noise.philox([torch.tensor([[word]]) for word in counter], key)
    assert [int(word) for word in found] == philox_in_integers(counter, key)


def one_draw(seed, row, position, step, number):
    """The draw by the definition: counter (number // 4, position, step, row), key the seed."""
    key = seed % WORD, seed // WORD
    word = philox_in_integers([number // 4, position, step, row], key)[number % 4]
    return (2 * (word >> 9) + 1) / 2**24


@settings(max_examples=50)
@given(st.integers(0, 2**63 - 1), numbers, numbers, numbers, st.integers(1, 9),
       st.sampled_from([0, 4, 8, 2**20, 2**30]))
def test_a_draw_is_a_function_of_its_five_numbers(seed, row, position, step, count, first):
    at = [torch.tensor([[x]]) for x in (row, position, step)]
    found = noise.uniform(seed, *at, count, first)
    assert found.shape == (1, 1, count) and found.dtype == torch.float32
    expected = [one_draw(seed, row, position, step, first + n) for n in range(count)]
    assert found.double().flatten().tolist() == expected
    if first:
        from_0 = noise.uniform(seed, *at, first + count) if first < 100 else found
        assert torch.equal(from_0[..., -count:], found)


def test_the_order_and_shape_of_what_is_asked_for_change_nothing():
    rows, positions, steps = (torch.randint(0, 50, (3, 4, 5)) for _ in range(3))
    found = noise.gumbel(7, rows, positions, steps, 13)
    assert found.shape == (3, 4, 5, 13)
    flat = [x.flatten() for x in (rows, positions, steps)]
    order = torch.randperm(60)
    shuffled = noise.gumbel(7, *(x[order] for x in flat), 13)
    assert torch.equal(shuffled, found.flatten(0, 2)[order])
    assert torch.equal(noise.gumbel(7, rows, positions, steps, 6), found[..., :6])
    one_row = noise.gumbel(7, rows[:1, :1, :1], positions, steps, 13)  # shapes broadcast
    same = noise.gumbel(7, rows[:1, :1, :1].expand(3, 4, 5), positions, steps, 13)
    assert torch.equal(one_row, same)


def test_every_one_of_the_five_numbers_matters():
    base = [7, 1, 2, 3, 4]
    draws = set()
    for which in range(5):
        for change in (1, 4, 2**20):
            changed = list(base)
            changed[which] += change
            draws.add(one_of(*changed))
    assert len(draws | {one_of(*base)}) == 16
    assert one_of(7 + 2**32, 1, 2, 3, 4) not in draws  # the seed's high word


def one_of(seed, row, position, step, number):
    at = [torch.tensor([x]) for x in (row, position, step)]
    return noise.uniform(seed, *at, number % 4 + 1, number // 4 * 4)[0, number % 4].item()


def many(seed=5, rows=200, positions=20, steps=10, count=50):
    """(2,000,000,) draws, the numbers that decoding would ask for."""
    at = torch.meshgrid(*map(torch.arange, (rows, positions, steps)), indexing="ij")
    return noise.uniform(seed, *at, count).flatten()


def test_draws_are_uniform_and_never_0_or_1():
    u = many().double()
    n = len(u)
    assert 0 < u.min() < 5e-6 and 1 - 5e-6 < u.max() < 1  # P(not) = e^-10 each, seed fixed
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5  # 4 standard errors
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    cells = 1000
    seen = torch.bincount((u * cells).long(), minlength=cells)
    chi2 = ((seen - n / cells) ** 2).sum() / (n / cells)
    assert abs(chi2 - (cells - 1)) < 4 * (2 * (cells - 1)) ** 0.5


def test_the_extremes_of_the_generator_stay_inside(monkeypatch):
    for word, expected in ((0, 2.0**-24), (WORD - 1, 1 - 2.0**-24)):
        fixed = torch.full((1, 1), word)
        monkeypatch.setattr(noise, "philox", lambda counter, key, x=fixed: (x, x, x, x))
        at = [torch.tensor([0])] * 3
        u, g = noise.uniform(0, *at, 4), noise.gumbel(0, *at, 4)
        assert u.tolist() == [[expected] * 4] and g.isfinite().all()


def test_neighbors_are_independent():
    """Correlations of draws that differ in one of row, position, step and number."""
    u = many(rows=40, positions=40, steps=40, count=40).view(40, 40, 40, 40).double()
    u = (u - 0.5) * 12**0.5
    for dim in range(4):
        for lag in (1, 4):
            a, b = u.narrow(dim, 0, 40 - lag), u.narrow(dim, lag, 40 - lag)
            assert abs((a * b).mean()) < 4 / a.numel() ** 0.5, (dim, lag)
    other_seed = many(seed=6, rows=40, positions=40, steps=40, count=40).view_as(u).double()
    other_seed = (other_seed - 0.5) * 12**0.5
    assert abs((u * other_seed).mean()) < 4 / u.numel() ** 0.5


def test_gumbel_noise_has_its_moments():
    at = torch.meshgrid(*map(torch.arange, (200, 20, 10)), indexing="ij")
    g = noise.gumbel(5, *at, 50).flatten().double()
    n = len(g)
    variance = math.pi**2 / 6
    assert abs(g.mean() - 0.5772156649) < 4 * (variance / n) ** 0.5
    assert abs(g.var() - variance) < 4 * (4.4 * variance**2 / n) ** 0.5  # kurtosis 5.4
    u = noise.uniform(5, *at, 50).flatten().double()
    assert (g + (-u.log()).log()).abs().max() < 1e-5


def test_the_argmax_with_gumbel_noise_is_a_sample_of_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.5, 0.3])
    rows = torch.arange(100_000)
    g = noise.gumbel(3, rows, torch.tensor(17).expand_as(rows), torch.zeros_like(rows), 5)
    seen = torch.bincount((logits + g).argmax(-1), minlength=5).double()
    expected = logits.double().softmax(-1) * len(rows)
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert chi2 < 23.5  # the 0.9999 quantile of χ² with 4 degrees of freedom
