"""Decoding: the cache changes nothing, the logits are those of training, every step unmasks what it should."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from diffusion import Recipe, read_at, spans_for
from model import ModelConfig, Transformer

VOCAB, BOS, EOS, MASK, PAD = 40, 0, 1, 2, 3


class Tok:
    vocab_size, bos_id, eos_id, mask_id, pad_id = VOCAB, BOS, EOS, MASK, PAD


def random_model(seed):
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig(VOCAB, 24, 2, 4, 2, 6, 40, 64, qk_norm=True, tie_embeddings=False)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def training_logits(model, text, a, b, recipe):
    """Logits of positions a..b by one forward as in training: [xt ; x0] with the block as it stands, all else clean."""
    B, L = text.shape
    start = torch.zeros(B, L, dtype=torch.int32)
    spans = spans_for(recipe, start, torch.full_like(start, L))
    x = (
        torch.cat([text, text.masked_fill(text == MASK, PAD)], 1)
        if recipe.objective == "block"
        else text
    )
    where = read_at(recipe, start)[:, a:b, None]
    hidden = model(x, spans)
    return model.logits(hidden.gather(1, where.expand(-1, -1, hidden.shape[-1])))


recipes = st.builds(
    lambda objective, shift, K: Recipe(
        objective, True if objective == "ar" else shift, K, mask_id=MASK
    ),
    st.sampled_from(["ar", "block", "bidirectional", "ar_diffusion"]),
    st.booleans(),
    st.integers(1, 7),
)


@settings(deadline=None, max_examples=60)
@given(recipes, st.integers(1, 13), st.integers(1, 15), st.integers(0, 10**6))
@torch.no_grad()
def test_cached_uncached_and_training_logits_are_the_same(recipe, n, new, seed):
    model = random_model(seed)
    text = torch.randint(4, VOCAB, (2, n + new))
    text[:, n:] = MASK
    decodings = [sample.Decoding(model, text, recipe, cache) for cache in (True, False)]
    K = decodings[0].K or n + new
    for a in range(n // K * K, n + new, K):
        b = min(a + K, n + new)
        while (text[:, a:b] == MASK).any():
            cached, plain = (d.logits(a, b) for d in decodings)
            assert (cached - plain).abs().max() < 1e-5 * (1 + plain.abs().max())
            reference = training_logits(model, text, a, b, recipe)
            real = slice(1 if a == 0 and recipe.shift else 0, None)  # position 0 is never predicted
            assert (
                (plain - reference)[:, real].abs().max() < 1e-5 * (1 + plain.abs().max())
                if b - a > real.start
                else True
            )
            for row in text:  # write somewhere, as decoding would
                open_ = (row[a:b] == MASK).nonzero()[:, 0]
                row[a + open_[torch.randint(len(open_), ())]] = torch.randint(4, VOCAB, ())


def test_autoregressive_decoding_is_the_plain_greedy_loop():
    model = random_model(5)
    ids = [BOS, 7, 8, 9]
    (found,), written = sample.generate(model, Tok, Recipe("ar"), ids, max_new_tokens=20)
    expected = list(ids)
    with torch.no_grad():
        for _ in range(20):
            x = torch.tensor([expected])
            start = torch.zeros(x.shape, dtype=torch.int32)
            logits = model.logits(model(x, spans_for(Recipe("ar"), start, start + x.shape[1])))[
                0, -1
            ]
            logits[[MASK, PAD]] = -torch.inf
            expected.append(int(logits.argmax()))
            if expected[-1] == EOS:
                break
    assert found == [i for i in expected[4:] if i != EOS] and written == len(expected) - 4


def test_an_autoregressive_model_whose_vocabulary_has_no_mask_samples_too():
    class Plain:
        vocab_size, bos_id, eos_id, mask_id, pad_id = VOCAB, BOS, EOS, None, None

    for eos in (EOS, None):
        Plain.eos_id = eos
        (ids,), _ = sample.generate(
            random_model(5), Plain, Recipe("ar"), [BOS, 7, 8], max_new_tokens=12
        )
        assert len(ids) == 12 or eos is not None


@settings(deadline=None, max_examples=60)
@given(
    recipes,
    st.integers(1, 9),
    st.integers(1, 17),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 10**6),
)
def test_whatever_the_settings_every_position_is_written_and_never_with_mask_or_pad(
    recipe, n, new, steps, temperature, seed
):
    model = random_model(seed % 5)
    prompt = [BOS, *range(5, 4 + n)]
    K = {"ar": 1, "block": recipe.block_size}.get(recipe.objective, new)
    arguments = (model, Tok, recipe, prompt, 3, new, min(steps, K), temperature)
    found, written = sample.generate(*arguments, seed=seed)
    assert len(found) == 3 and written <= 3 * new
    for ids in found:
        assert len(ids) <= new and not {MASK, PAD, EOS} & set(ids)
    assert sample.generate(*arguments, seed=seed) == (found, written)
    assert sample.generate(*arguments, seed=seed, cache=False) == (found, written)


@given(st.integers(1, 300), st.integers(1, 300))
def test_steps_share_the_positions_evenly_and_the_first_take_the_remainder(masked, steps):
    steps = min(masked, steps)
    shares = [sample.share(masked, s, steps) for s in range(steps)]
    assert sum(shares) == masked and max(shares) - min(shares) <= 1 and min(shares) >= 1
    assert shares == sorted(shares, reverse=True)


def test_the_most_confident_positions_are_unmasked_first(monkeypatch):
    """With logits fixed by hand, two steps of a block of four write positions 3 and 1, then 0 and 2."""
    sure = torch.tensor([1.0, 4.0, 0.5, 9.0])
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, range(4), [10, 11, 12, 13]] = sure
    seen = []

    def fixed(self, a, b):
        seen.append(self.text[0, a:b].tolist())
        return logits.clone()

    monkeypatch.setattr(sample.Decoding, "logits", fixed)
    recipe = Recipe("block", block_size=4, mask_id=MASK)
    sample.generate(random_model(0), Tok, recipe, [BOS, 5, 6, 7], max_new_tokens=4, steps=2)
    assert seen == [[MASK] * 4, [MASK, 11, MASK, 13]]


def test_decoding_stops_at_an_eos_with_nothing_masked_to_its_left(monkeypatch):
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, range(4), [10, EOS, 12, 13]] = torch.tensor([1.0, 9.0, 2.0, 0.5])
    calls = []
    monkeypatch.setattr(
        sample.Decoding, "logits", lambda self, a, b: calls.append(a) or logits.clone()
    )
    recipe = Recipe("block", block_size=4, mask_id=MASK)
    found, written = sample.generate(
        random_model(0), Tok, recipe, [BOS, 5, 6, 7], max_new_tokens=40
    )
    assert found == [[10]] and written == 2 and calls == [4, 4, 4]  # <eos>, 12, then 10 before it


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--prompt="], "the prompt is empty"),
        (["--prompt=   "], "the prompt is empty"),
        (["--prompt=" + "def f(x):\n" * 100], "the model's context only 64"),
        (["--steps=5"], "more than the 4 tokens of a block"),
        (["--samples=0"], "samples=0 must be 1 or more"),
        (["--temperature=-1"], "temperature=-1.0"),
        (["--init_from=/nowhere"], "no checkpoint in /nowhere"),
        (["--device=mps"], "device='mps' is not available here"),
        (["--promt=x"], "did you mean 'prompt'"),
    ],
)
def test_mistakes_end_in_one_sentence(data_folder, tmp_path, monkeypatch, arguments, says):
    from tokenizer import Tokenizer
    import test_checkpoint

    monkeypatch.setattr(
        torch.backends.mps, "is_available", lambda: False
    )  # so that asking for it is a mistake everywhere
    tok = Tokenizer(data_folder)
    test_checkpoint.save(tmp_path / "run", 1, test_checkpoint.small_model(tok), tok)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--init_from={tmp_path / 'run'}", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises((ValueError, OSError), match=says):
        sample.main()


def test_the_script_prints_prompt_completion_and_speed(data_folder, tmp_path, monkeypatch, capsys):
    from tokenizer import Tokenizer
    import test_checkpoint

    tok = Tokenizer(data_folder)
    test_checkpoint.save(tmp_path / "out" / "run", 1, test_checkpoint.small_model(tok), tok)
    monkeypatch.chdir(tmp_path)  # the newest run is found by itself
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sample.py",
            "--prompt=def f(x):",
            "--max_new_tokens=12",
            "--samples=2",
            "--temperature=1",
        ],
    )
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    sample.main()
    printed = capsys.readouterr().out
    assert printed.count("def f(x):") == 2 and "sample 2 of 2" in printed and "tokens/s" in printed
