"""`verified` decoding writes the text of left-to-right decoding, one token at a time, token for
token, in fewer forwards.

Random models in float64 that reject a good part of what is drafted, which is measured here. How
many forwards it takes is that of an independent count (naive_decoder.py: naive_verified).
"""
from dataclasses import replace

import pytest
import torch
from naive_decoder import (
    BOS,
    END,
    EOS,
    MASK,
    ORDINARY,
    VOCAB,
    Endless,
    Tok,
    naive_decode,
    naive_verified,
    random_model,
)
from test_decode import follow, parts_at_a_tie, text_of

from configurator import Mistake
from decode import Decoding, decode, generate
from diffusion import Recipe

GREEDY, SAMPLED = Decoding("left_to_right"), Decoding("left_to_right", temperature=0.8)
HOWS = pytest.mark.parametrize("how", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
SHIFTS = pytest.mark.parametrize("shift", [False, True], ids=["no_shift", "shift"])


def recipe_of(K, shift):
    return Recipe("block", shift, K, mask_id=MASK)


def model_of(K, shift, dtype=torch.float64):
    """A random model whose drafts are rejected neither always nor never.

    Its attention is sharp. With `shift`, the token left of a mask decides most about what is
    drafted: there the tokens are made more alike.
    """
    model = random_model(K, 0.5, torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # norms
                p.fill_(2.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0)
        if shift:
            tokens = model.embed_tokens.weight  # (vocab, d_model)
            tokens.copy_(tokens[0] + 0.7 * tokens)
    return model.to(dtype)


@SHIFTS
@HOWS
def test_nothing_is_written_behind_a_stop_id(how, shift):
    """The very ids, with None where nothing was written. The hook makes texts end."""
    recipe, ended = recipe_of(8, shift), 0

    def hook(logits, positions, rows):
        logits = logits.clone()
        logits[..., EOS] += 2.5
        return logits

    for seed in range(3):
        texts = prompts(12, 20, seed)
        one_by_one = follow(model_of(8, shift), Tok, recipe, texts, how, None, hook)
        verified = follow(model_of(8, shift), Tok, recipe, texts, replace(how, verified=True), None,
                          hook)
        for left_to_right, found in zip(one_by_one, verified):
            assert found.text == left_to_right.text
            ended += None in found.text
    assert ended > 5


def prompts(number, new, seed=0):
    """Texts of 1 to 11 given tokens and `new` masks."""
    random = torch.Generator().manual_seed(seed)
    return [text_of(random, 1 + n % 11, new) for n in range(number)]


def both(model, recipe, texts, how, tok=Tok, rows=None):
    """Traces of left-to-right decoding and of verified decoding, and their numbers of forwards."""
    one_by_one = follow(model, tok, recipe, texts, how, rows)
    verified = follow(model, tok, recipe, texts, replace(how, verified=True), rows)
    return one_by_one, verified


def equal(one_by_one, verified):
    """Same text up to where it ends, written left to right, in no more forwards."""
    for a, b in zip(one_by_one, verified):
        until = len(written(a))
        assert b.text[:until] == a.text[:until]
        assert until == len(a.text) or a.text[until - 1] in Tok.stop_ids
        writes = [i for taken in b.taken for i in sorted(taken)]
        assert writes == sorted(writes)
        assert len(b.taken) <= len(a.taken)


def written(trace):
    """A text without the masks behind its end, if it has ended."""
    if None in trace.text:
        return trace.text[:trace.text.index(None)]
    return trace.text


def forwards(model, tok, recipe, texts, how):
    return sum(1 for _ in decode(model, tok, recipe, [list(text) for text in texts], how))


def compare_many(number, new, batch, tok, K, shift, how):
    """Assert that `number` prompts have the same text both ways. Returns how many tokens verified
    decoding wrote, and how many forwards wrote some, text by text."""
    recipe = recipe_of(K, shift)
    model = model_of(K, shift)
    texts = prompts(number, new, seed=K)
    tokens = writing = 0
    for start in range(0, number, batch):
        some = texts[start:start + batch]
        numbers = list(range(start, start + len(some)))
        one_by_one, verified = both(model, recipe, some, how, tok, numbers)
        equal(one_by_one, verified)
        tokens += sum(len(taken) for trace in verified for taken in trace.taken)
        writing += sum(len(trace.taken) for trace in verified)
    return tokens, writing


@HOWS
@SHIFTS
@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_hundred_texts_are_those_of_one_token_at_a_time(K, shift, how):
    """Ragged prompts in batches of 25, texts that stop early among them."""
    tokens, writing = compare_many(100, 13, 25, Tok, K, shift, how)
    assert 1 < tokens / writing <= K


@pytest.mark.slow
@HOWS
@SHIFTS
@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_thousand_texts_are_those_of_one_token_at_a_time(K, shift, how, record_property):
    tokens, writing = compare_many(1000, 26, 100, Endless, K, shift, how)
    record_property("tokens_per_forward", f"{tokens / writing:.2f}")
    assert 1 < tokens / writing <= K


@HOWS
@SHIFTS
@pytest.mark.parametrize("K", [2, 4, 8])
def test_the_models_reject_20_to_80_percent_of_the_drafts(K, shift, how, record_property):
    """And decoding takes exactly the forwards of the naive count, writing the same in each."""
    recipe, model = recipe_of(K, shift), model_of(K, shift)
    rejected = accepted = 0
    for row, text in enumerate(prompts(8, 17, seed=K)):
        naive = naive_verified(model, Endless, recipe, text, how, row)
        rejected, accepted = rejected + naive.rejected, accepted + naive.accepted
        (found,) = follow(model, Endless, recipe, [text], replace(how, verified=True), [row])
        assert found.text == naive.text
        assert found.taken == naive.taken
    share = rejected / (rejected + accepted)
    record_property("rejected", f"{share:.2f} of {rejected + accepted}")
    assert 0.2 < share < 0.8


@HOWS
@SHIFTS
def test_the_naive_decoder_writes_the_same(shift, how):
    """Left to right, one at a time, without a cache: so does `verified`."""
    recipe, model = recipe_of(4, shift), model_of(4, shift)
    texts = prompts(8, 11, seed=3)
    found = follow(model, Tok, recipe, texts, replace(how, verified=True))
    for row, text in enumerate(texts):
        naive = naive_decode(model, Tok, recipe, text, how, row)
        until = len(written(naive))
        assert found[row].text[:until] == naive.text[:until]


@HOWS
@SHIFTS
@pytest.mark.parametrize("K", [1, 3, 8])
def test_every_block_size_batch_and_order(K, shift, how):
    recipe, model = recipe_of(K, shift), model_of(K, shift)
    texts = prompts(4, K + 4, seed=K)
    for tok in (Tok, Endless):
        one_by_one, together = both(model, recipe, texts, how, tok)
        equal(one_by_one, together)
        verified = replace(how, verified=True)
        numbers = list(range(len(texts)))
        reverse = follow(model, tok, recipe, texts[::-1], verified, numbers[::-1])[::-1]
        assert list(map(written, reverse)) == list(map(written, together))
        for row, text in enumerate(texts):
            (alone,) = follow(model, tok, recipe, [text], verified, [row])
            assert written(alone) == written(together[row])


@SHIFTS
@pytest.mark.parametrize("filters", [
    {"temperature": 1.3, "top_p": 0.8}, {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.9, "eos_penalty": 4.0}, {"temperature": 2.0, "seed": 2**40 + 1},
])
def test_with_every_way_to_sample(shift, filters):
    how = Decoding("left_to_right", **filters)
    for K in (4, 8):
        model = model_of(K, shift)
        equal(*both(model, recipe_of(K, shift), prompts(10, 14, seed=1), how))


def test_a_hook_is_asked_for_the_same_logits():
    """One that depends on position and row, as a grammar's would."""
    def hook(logits, positions, rows):
        logits = logits.clone()
        favored = ORDINARY + (positions * 7 + rows[:, None] * 3) % (VOCAB - ORDINARY)
        return logits.scatter_add(2, favored[..., None], torch.full_like(logits[..., :1], 1.5))

    model, recipe, texts = model_of(4, False), recipe_of(4, False), prompts(6, 12)
    a, b = (follow(model, Tok, recipe, texts, replace(SAMPLED, verified=way), None, hook)
            for way in (False, True))
    equal(a, b)


@HOWS
@SHIFTS
@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_a_model_that_never_rejects_writes_K_tokens_a_forward(K, shift, how):
    """Its logits are the same wherever: the ceiling. The first forward writes only one token."""
    model = random_model(1)
    with torch.no_grad():
        model.embed_tokens.weight[:] = model.embed_tokens.weight[0]
    recipe = recipe_of(K, shift)
    for blocks in (1, 3, 6):
        for given_at_first in (K, 2 * K):
            text = [BOS] * given_at_first + [None] * blocks * K
            found = forwards(model, Endless, recipe, [text], replace(how, verified=True))
            assert found == blocks + (K > 1)
            assert forwards(model, Endless, recipe, [text], how) == blocks * K
    texts = [[BOS] * K + [None] * 6 * K] * 3
    assert forwards(model, Endless, recipe, texts, replace(how, verified=True)) == 6 + (K > 1)


@HOWS
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_never_more_forwards_than_one_at_a_time(scale, how):
    """However bad the drafts are; in a batch, too."""
    for K in (2, 8):
        for shift in (False, True):
            model, recipe = random_model(K, scale), recipe_of(K, shift)
            texts = prompts(3, 2 * K + 1, seed=K)
            for some in (texts[:1], texts):
                verified = forwards(model, Endless, recipe, some, replace(how, verified=True))
                assert verified <= forwards(model, Endless, recipe, some, how)


@SHIFTS
def test_in_float32_texts_part_only_at_near_ties(shift, record_property):
    """From the naive decoder in float64, both ways."""
    parted = number = 0
    for K in (2, 4, 8):
        exact = model_of(K, shift)
        model = model_of(K, shift, torch.float32)
        texts = prompts(6, 12, seed=K)
        one_by_one, verified = both(model, recipe_of(K, shift), texts, SAMPLED)
        for row, text in enumerate(texts):
            naive = naive_decode(exact, Tok, recipe_of(K, shift), text, SAMPLED, row)
            parted += parts_at_a_tie(one_by_one[row], naive)
            parted += differs_at_a_tie(verified[row], naive)
            number += 2
    record_property("parted", f"{parted} of {number}")
    assert parted <= 2


def differs_at_a_tie(found, naive):
    """As parts_at_a_tie, for a Trace of verified decoding, which writes several at a time."""
    written = {}
    for taken in found.taken:
        written.update(taken)
    for taken, margin in zip(naive.taken, naive.margins):
        ((i, token),) = taken.items()
        if written.get(i) != token:
            assert margin < 1e-4
            return True
    return False


def test_completions_end_where_those_of_left_to_right_do():
    model, recipe = model_of(4, False), recipe_of(4, False)
    some = [[i for i in text if i is not None] for text in prompts(40, 1)]
    for how in (GREEDY, replace(SAMPLED, temperature=1.5)):
        a, b = (generate(model, Tok, recipe, some, replace(how, verified=way), 30)
                for way in (False, True))
        assert a == b
        assert not any({EOS, END} & set(ids) for ids in a)
    assert any(len(ids) < 30 for ids in a)


@pytest.mark.parametrize("recipe, how, words", [
    (Recipe("bidirectional", mask_id=MASK), {}, ["verified", "block"]),
    (Recipe("ar_diffusion", mask_id=MASK), {}, ["verified", "block"]),
    (recipe_of(16, False), {}, ["verified", "8"]),
    (recipe_of(4, False), {"threshold": 0.5}, ["verified", "threshold"]),
    (recipe_of(4, False), {"remask": 1}, ["verified", "remask"]),
])
def test_what_it_cannot_do_is_one_sentence(recipe, how, words):
    text = [BOS] * 5 + [None] * 20
    with pytest.raises(Mistake) as caught:
        next(iter(decode(random_model(0), Tok, recipe, [text], Decoding(verified=True, **how))))
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words)
