"""Who sees whom: the spans against the table, written out pair by pair."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ATTENTION_OF, block_of, packed, packings, who_sees

from configurator import Mistake
from diffusion import Recipe, spans_for
from spans import CacheSpans, Spans


@settings(deadline=None, max_examples=200)
@given(packings(), st.sampled_from([1, 2, 3, 4, 5, 16, 40, None]), st.booleans())
def test_the_mask_is_the_table(rows, K, noisy):
    spans = Spans.of(*packed(*rows), K, noisy=noisy)
    want = torch.stack([who_sees(lengths, K, noisy) for lengths in rows])
    assert torch.equal(spans.dense_mask(), want)
    assert spans.pairs == want.sum()
    place = [[i - block_of(i, lengths, K)[0] for i in range(sum(lengths))] for lengths in rows]
    place = torch.tensor(place)
    assert torch.equal(spans.positions, place.repeat(1, 2) if noisy else place)


@settings(deadline=None, max_examples=100)
@given(packings(), st.sampled_from(list(ATTENTION_OF)), st.sampled_from([1, 2, 3, 4, 40]))
def test_the_mask_of_each_objective(rows, objective, K):
    size, noisy = ATTENTION_OF[objective]
    spans = spans_for(Recipe(objective, block_size=K, mask_id=0), *packed(*rows))
    block_size = K if size == "K" else size
    want = torch.stack([who_sees(lengths, block_size, noisy) for lengths in rows])
    assert torch.equal(spans.dense_mask(), want)


def test_the_picture_of_the_docstring():
    mask = Spans.of(*packed([8]), 4, noisy=True).dense_mask()[0]
    firsts = (0, 4, 8, 12)  # of each block, noisy and then clean
    shown = ["".join(".#"[int(mask[i, j])] for j in firsts) for i in firsts]
    assert shown == ["#...", ".##.", "..#.", "..##"]


@pytest.mark.parametrize("right", [0, 1, 3, 24])
def test_annealed_spans_lie_between_causal_and_bidirectional(right):
    spans = Spans.annealed(*packed([15, 1, 8]), right)
    causal, bidirectional = (who_sees([15, 1, 8], K, False) for K in (1, None))
    mask = spans.dense_mask()[0]
    assert (mask >= causal).all() and (mask <= bidirectional).all()
    assert torch.equal(mask, causal) == (right == 0)
    assert torch.equal(mask, bidirectional) == (right == 24)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_queries_against_a_cache_see_two_intervals_of_slots(B, Q, slots, seed):
    random = torch.Generator().manual_seed(seed)
    bounds = torch.randint(0, slots + 1, (4, B, Q), generator=random)
    spans = CacheSpans(torch.zeros(B, Q).long(), *bounds, slots)
    assert spans.mask.shape == (B, 1, Q, slots)
    for b in range(B):
        for q in range(Q):
            past_start, past_end, own_start, own_end = bounds[:, b, q].tolist()
            for slot in range(slots):
                sees = slot in range(past_start, past_end) or slot in range(own_start, own_end)
                assert bool(spans.mask[b, 0, q, slot]) == sees


def test_a_gap_sees_nobody_and_is_seen_by_nobody():
    mask = Spans.of(*packed([3, -2, 4]), 2, noisy=True).dense_mask()[0]
    gap = torch.tensor([3, 4, 9 + 3, 9 + 4])
    assert not mask[gap].any() and not mask[:, gap].any()


def test_impossible_block_sizes_are_the_users_mistake():
    with pytest.raises(Mistake, match="block_size=0 must be 1 or more"):
        Spans.of(*packed([8]), 0)
    with pytest.raises(Mistake, match="right=-1 must be 0 or more"):
        Spans.annealed(*packed([8]), -1)
