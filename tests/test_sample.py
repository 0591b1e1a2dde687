"""Decoding: the cache changes nothing, the logits are those of training, every step unmasks what
it should, and what cannot be done is said with a one-line message.
"""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import write_tiny_run

import sample
from configurator import Mistake
from diffusion import Recipe, read_at, spans_for
from model import ModelConfig, Transformer

VOCAB, BOS, EOS, MASK, PAD = 40, 0, 1, 2, 3


class Tok:
    vocab_size, bos_id, eos_id, mask_id, pad_id = VOCAB, BOS, EOS, MASK, PAD


class Endless(Tok):
    eos_id = None


def random_model(seed):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(VOCAB, 24, 2, 4, 2, 6, 40, 64, qk_norm=True,
                                    tie_embeddings=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def block_recipe(K=4, shift=False):
    return Recipe("block", shift, K, mask_id=MASK)


def training_logits(model, text, a, b, recipe):
    """Logits of positions a to b by one forward as in training.

    Under `block` that is [xt ; x0], the block as it stands and all else clean.
    """
    B, L = text.shape
    start = torch.zeros(B, L, dtype=torch.int32)
    spans = spans_for(recipe, start, torch.full_like(start, L))
    tokens = text
    if recipe.objective == "block":
        tokens = torch.cat([text, text.masked_fill(text == MASK, PAD)], 1)
    where = read_at(recipe, start)[:, a:b, None]
    hidden = model(tokens, spans)
    return model.logits(hidden.gather(1, where.expand(-1, -1, hidden.shape[-1])))


recipes = st.builds(
    lambda objective, shift, K: Recipe(objective, objective == "ar" or shift, K, mask_id=MASK),
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
    drafts = [sample.Draft(model, text, recipe, cache) for cache in (True, False)]
    K = drafts[0].block_size or n + new
    for a in range(n // K * K, n + new, K):
        b = min(a + K, n + new)
        real = slice(1 if a == 0 and recipe.shift else 0, None)  # position 0 is never predicted
        while (text[:, a:b] == MASK).any():
            cached, plain = (draft.logits(a, b) for draft in drafts)
            bound = 1e-5 * (1 + plain.abs().max())
            assert (cached - plain).abs().max() < bound
            reference = training_logits(model, text, a, b, recipe)
            if b - a > real.start:
                assert (plain - reference)[:, real].abs().max() < bound
            for row in text:  # write somewhere, as decoding would
                still_masked = (row[a:b] == MASK).nonzero()[:, 0]
                i = still_masked[torch.randint(len(still_masked), ())]
                row[a + i] = torch.randint(4, VOCAB, ())


def test_autoregressive_decoding_is_the_plain_greedy_loop():
    model, recipe = random_model(5), Recipe("ar")
    ids = [BOS, 7, 8, 9]
    cfg = sample.Config(max_new_tokens=20)
    (found,), written = sample.generate(model, Tok, recipe, ids, cfg)
    expected = list(ids)
    with torch.no_grad():
        for _ in range(20):
            x = torch.tensor([expected])
            start = torch.zeros(x.shape, dtype=torch.int32)
            hidden = model(x, spans_for(recipe, start, start + x.shape[1]))
            logits = model.logits(hidden)[0, -1]
            logits[[MASK, PAD]] = -torch.inf
            expected.append(int(logits.argmax()))
            if expected[-1] == EOS:
                break
    assert found == [i for i in expected[4:] if i != EOS] and written == len(expected) - 4


def test_an_autoregressive_model_whose_vocabulary_has_no_mask_samples_too():
    class Plain(Tok):
        mask_id = pad_id = None

    for eos in (EOS, None):
        Plain.eos_id = eos
        cfg = sample.Config(max_new_tokens=12)
        (ids,), _ = sample.generate(random_model(5), Plain, Recipe("ar"), [BOS, 7, 8], cfg)
        assert len(ids) == 12 or eos is not None


@settings(deadline=None, max_examples=60)
@given(recipes, st.integers(1, 9), st.integers(1, 17), st.integers(0, 9),
       st.sampled_from([0.0, 0.7]), st.integers(0, 10**6))
def test_whatever_the_settings_every_position_is_written_and_never_with_mask_or_pad(
        recipe, n, new, steps, temperature, seed):
    model = random_model(seed % 5)
    prompt = [BOS, *range(5, 4 + n)]
    K = {"ar": 1, "block": recipe.block_size}.get(recipe.objective, new)

    def generate(cache=True, tok=Tok):
        cfg = sample.Config(samples=3, max_new_tokens=new, steps=min(steps, K),
                            temperature=temperature, seed=seed, cache=cache)
        return sample.generate(model, tok, recipe, prompt, cfg)

    found, written = generate()
    assert len(found) == 3 and written <= 3 * new
    for ids in found:
        assert len(ids) <= new and not {MASK, PAD, EOS} & set(ids)
    assert generate() == (found, written)
    assert generate(cache=False) == (found, written)
    found, written = generate(tok=Endless)
    assert [len(ids) for ids in found] == [new] * 3 and written == 3 * new


@pytest.mark.parametrize("tok", [Tok, Endless])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_a_shorter_text_is_the_beginning_of_a_longer_one(shift, cache, tok):
    """The last block is filled and then trimmed: what is asked for does not change its logits."""
    model, recipe = random_model(3), block_recipe(shift=shift)
    for n in range(1, 6):
        prompt = [BOS, *range(5, 4 + n)]
        whole_blocks = 12 - n

        def text(new):
            cfg = sample.Config(max_new_tokens=new, cache=cache)
            return sample.generate(model, tok, recipe, prompt, cfg)[0][0]

        longest = text(whole_blocks)
        for new in range(1, whole_blocks):
            assert text(new) == longest[:new]


@given(st.integers(1, 300), st.integers(1, 300))
def test_steps_share_the_positions_evenly_and_the_first_take_the_remainder(masked, steps):
    steps = min(masked, steps)
    shares = [sample.share(masked, s, steps) for s in range(steps)]
    assert sum(shares) == masked and max(shares) - min(shares) <= 1 and min(shares) >= 1
    assert shares == sorted(shares, reverse=True)


def test_the_most_confident_positions_are_unmasked_first(monkeypatch):
    """Logits fixed by hand: two steps of a block of four write 3 and 1, then 0 and 2."""
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, range(4), [10, 11, 12, 13]] = torch.tensor([1.0, 4.0, 0.5, 9.0])
    seen = []

    def fixed(draft, a, b):
        seen.append(draft.text[0, a:b].tolist())
        return logits.clone()

    monkeypatch.setattr(sample.Draft, "logits", fixed)
    cfg = sample.Config(max_new_tokens=4, steps=2)
    sample.generate(random_model(0), Tok, block_recipe(), [BOS, 5, 6, 7], cfg)
    assert seen == [[MASK] * 4, [MASK, 11, MASK, 13]]


def test_decoding_stops_at_an_eos_with_nothing_masked_to_its_left(monkeypatch):
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, range(4), [10, EOS, 12, 13]] = torch.tensor([1.0, 9.0, 2.0, 0.5])
    calls = []

    def fixed(draft, a, b):
        calls.append(a)
        return logits.clone()

    monkeypatch.setattr(sample.Draft, "logits", fixed)
    cfg = sample.Config(max_new_tokens=40)
    found, written = sample.generate(random_model(0), Tok, block_recipe(), [BOS, 5, 6, 7], cfg)
    assert found == [[10]] and written == 2 and calls == [4, 4, 4]  # <eos>, 12, then 10 before it


@pytest.mark.parametrize("text, masked, row, written", [
    ([5, 6, 7, 8], [0, 0, 0, 0], [5, 6, 7, 8], 4),
    ([5, 6, EOS, 8], [0, 0, 0, 0], [5, 6], 3),  # <eos> is counted, what follows it is not
    ([5, 6, 7, EOS], [0, 1, 0, 0], [5], 1),  # stopped: nothing behind the first hole
    ([5, EOS, 7, 8], [0, 0, 1, 0], [5], 2),
    ([5, 6, 7, 8], [1, 1, 1, 1], [], 0),
])
def test_a_completion_ends_at_eos_or_at_the_first_mask(text, masked, row, written):
    text, masked = torch.tensor([text]), torch.tensor([masked]).bool()
    assert sample.completions(text, masked, EOS) == ([row], written)


@pytest.mark.parametrize("recipe", [block_recipe(), Recipe("ar")])
def test_stopping_keeps_what_has_been_written(recipe):
    """Asked after every forward; the text is the beginning of the whole one, up to a hole."""
    model, prompt, cfg = random_model(1), [BOS, 5, 6, 7], sample.Config(max_new_tokens=12)
    (whole,), _ = sample.generate(model, Endless, recipe, prompt, cfg)
    for forwards in range(1, 13):
        asked = []

        def stopped():
            asked.append(1)
            return len(asked) == forwards

        (ids,), written = sample.generate(model, Endless, recipe, prompt, cfg, stopped)
        assert len(asked) == forwards and written == len(ids)
        assert ids == whole[:len(ids)]
        whole_blocks = forwards // recipe.block_size * recipe.block_size
        if recipe.objective == "ar":
            whole_blocks = forwards
        assert whole_blocks <= len(ids) <= forwards


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_with_a_one_line_message(bad, temperature):
    model = random_model(0)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = bad
    cfg = sample.Config(max_new_tokens=4, temperature=temperature)
    with pytest.raises(Mistake, match="logits are not finite") as caught:
        sample.generate(model, Tok, block_recipe(), [BOS, 5, 6], cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-6, 1e-5, 100.0])
def test_every_temperature_that_is_allowed_gives_tokens(temperature):
    """The coldest are the most likely tokens, without an overflow."""
    logits = torch.randn(2, 4, VOCAB, generator=torch.Generator().manual_seed(0)) * 1e4
    best = logits.argmax(-1)
    random = torch.Generator().manual_seed(0)
    tokens, confidence = sample.choose(logits.clone(), temperature, [MASK], random)
    assert confidence.isfinite().all() and (tokens != MASK).all()
    if temperature < 1:
        assert torch.equal(tokens, best)


# --- the script ----------------------------------------------------------------------------------

@pytest.fixture
def run(data_folder, tmp_path):
    write_tiny_run(tmp_path / "out" / "run", data_folder)
    return tmp_path / "out" / "run"


@pytest.mark.parametrize("arguments, says", [
    (["--prompt="], "the prompt is empty"),
    (["--prompt=   "], "the prompt is empty"),
    (["--prompt=" + "def f(x):\n" * 100], "the model's context only 64"),
    (["--prompt=x\udcff"], "the text is not Unicode: character 1 is"),
    (["--chat=true"], "has no chat template"),
    (["--prompt", "--samples=2"], "--prompt needs a value, and '--samples=2' is another setting"),
    (["--steps=5"], "more than the 4 tokens of a block"),
    (["--samples=0"], "samples=0 does not fit: samples is an int from 1 to 1,024"),
    (["--samples=1000000000000"], "does not fit: samples is an int from 1 to 1,024"),
    (["--max_new_tokens=0"], "max_new_tokens=0 does not fit"),
    (["--temperature=-1"], "temperature=-1 does not fit: temperature is a float from 0 to 100"),
    (["--temperature=nan"], "temperature='nan' does not fit: temperature is a float"),
    (["--temperature=1e39"], "temperature=1e\\+39 does not fit: temperature is a float"),
    (["--temperature=1e999"], "temperature=inf does not fit: temperature is a float"),
    (["--seed=-1"], "seed=-1 does not fit: seed is an int from 0"),
    ([f"--seed={2**63}"], "does not fit: seed is an int from 0"),
    (["--block_size=100000000000000000000"], "does not fit: block_size is an int from 1"),
    (["--init_from=/nowhere"], "no checkpoint in /nowhere"),
    (["--device=mps"], "device='mps' is not available here"),
    (["--promt=x"], "did you mean 'prompt'"),
])
def test_mistakes_end_with_a_one_line_message_before_anything_is_sampled(run, monkeypatch,
                                                                         arguments, says):
    # so that asking for it is a mistake everywhere
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(sample, "generate", None)
    with pytest.raises(Mistake, match=says) as caught:
        sample.main([f"--init_from={run}", *arguments])
    assert "\n" not in str(caught.value)


def test_a_prompt_of_no_tokens_is_one_sentence(run):
    checkpoint = next(run.glob("step_*"))
    (checkpoint / "chat_template.jinja").write_text("{# #}")
    with pytest.raises(Mistake, match="the prompt has no tokens"):
        sample.main([f"--init_from={run}", "--chat=true"])


def test_a_config_file_cannot_make_the_temperature_nan(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "hot.py").write_text("temperature = float('nan')\n")
    with pytest.raises(Mistake, match="temperature=nan does not fit: temperature is a float"):
        sample.main([str(tmp_path / "hot.py"), f"--init_from={run}"])


def test_the_script_prints_prompt_completion_and_speed(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])  # the newest run is found by itself
    handler = sample.signal.getsignal(sample.signal.SIGINT)
    try:
        status = sample.main(["--prompt=def f(x):", "--max_new_tokens=12", "--samples=2",
                              "--temperature=1"])
    finally:
        sample.signal.signal(sample.signal.SIGINT, handler)
    printed = capsys.readouterr().out
    assert status == 0
    assert printed.count("def f(x):") == 2 and "sample 2 of 2" in printed and "tokens/s" in printed
    assert "--- 24 tokens in" in printed and "stopped" not in printed
