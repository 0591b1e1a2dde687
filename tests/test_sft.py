"""sft.py: what of a sample is scored, how rows are packed and filled, what is refused.

Expectations are written out sample by sample. Statistical tests run on fixed seeds; each states its
bound. Losses are compared in float64.
"""
import json
import os
import sys
from dataclasses import replace
from fractions import Fraction
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_diffusion import NOISY, chi2_p, make, small_model
from tokenizers import AddedToken

import sft
from configurator import Mistake
from diffusion import Draw, corrupt, read_at, token_losses, weighted_loss
from sft import Samples, Store, pack
from tokenizer import Tokenizer, train_tokenizer

EOS, PAD, MASK = 9, 10, 11
FILLINGS = {"multiple": {}, "cross": {"cross_document": True}, "canvas": {"canvas": 9}}
# turns of a sample: how many tokens are not scored, how many are, and so on
TURNS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=3)


def fake_tokenizer(vocab_size=12, pad_id=PAD):
    return SimpleNamespace(eos_id=EOS, pad_id=pad_id, vocab_size=vocab_size, folder="nowhere")


def samples_of(all_turns, first_id=0, vocab=9):
    """(ids, scored, question) of samples of these turns; ids count up from `first_id`."""
    made = []
    for turns in all_turns:
        scored = [answer for n in turns for answer in [False] * n[0] + [True] * n[1]]
        ids = (first_id + np.arange(len(scored))) % vocab
        first_id += len(scored)
        made.append((ids.astype(np.uint32), np.array(scored), ""))
    return made


def numbered(all_turns):
    """As samples_of, with ids from 100 on that no two tokens share: they tell where they are from.
    """
    return samples_of(all_turns, first_id=100, vocab=10**6)


def documents(x0):
    """Of the samples in a row of `numbered` ones: where each starts, its text ends, it ends."""
    places, i = [], 0
    while i < len(x0) and x0[i] >= 100:
        start = i
        while x0[i] != EOS:
            i += 1
        text_end = i
        while i < len(x0) and x0[i] == EOS:
            i += 1
        places.append((start, text_end, i))
    return places


def rows_of(data, **kwargs):
    batch = data.batch(range(len(data)), **kwargs)
    return [x.numpy() for x in (batch.x0, batch.doc_start, batch.doc_end, batch.maskable)]


# --- packing --------------------------------------------------------------------------------------

def best_fit(lengths, T):
    """Rows that best-fit decreasing needs, by looking at all rows each time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else T) - length)
    return len(rooms)


def next_fit(lengths, T):
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, T
        room -= length
    return rows


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([8, 24, 64]).flatmap(
    lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), min_size=1, max_size=40))))
def test_no_row_overflows_and_best_fit_needs_no_more_rows_than_next_fit(case):
    T, lengths = case
    row_of = pack(np.array(lengths), T)
    filled = np.bincount(row_of, lengths)
    assert filled.max() <= T and filled.min() > 0 and len(row_of) == len(lengths)
    assert len(filled) == best_fit(lengths, T)
    assert ceil(sum(lengths) / T) <= len(filled) <= next_fit(sorted(lengths, reverse=True), T)


@settings(deadline=None, max_examples=60)
@given(st.lists(TURNS, min_size=1, max_size=12), st.sampled_from(list(FILLINGS)),
       st.integers(0, 99))
def test_each_sample_is_in_one_row_whatever_is_drawn_and_too_long_ones_are_counted(
        turns, filling, seed):
    made, T = numbered(turns), 24
    longest = {"multiple": lambda n: n // 8 * 8 + 8, "cross": lambda n: n + 4,
               "canvas": lambda n: n + 1}[filling]
    fitting = [ids.tolist() for ids, _, _ in made if longest(len(ids)) <= T]
    tok = fake_tokenizer(10**6)
    if not fitting:
        with pytest.raises(Mistake, match="context=24 is too short: .* the shortest sample takes"):
            Samples(Store.of(made), T, tok, **FILLINGS[filling])
        return
    data = Samples(Store.of(made), T, tok, **FILLINGS[filling])
    assert data.too_long == len(made) - len(fitting)
    assert ("left out" in data.in_words()) == (data.too_long > 0)
    together = []
    for step in (0, len(data)):  # the same rows, other draws
        batches = [data.at_step(seed, s, 1).x0[0].tolist() for s in range(step, step + len(data))]
        rows = [[x0[a:b] for a, b, _ in documents(x0)] for x0 in batches]
        assert sorted(sum(rows, [])) == sorted(fitting)
        together.append(sorted(sorted(row) for row in rows))
    assert together[0] == together[1]


# --- what is scored -------------------------------------------------------------------------------

def expected_share(turns, share):
    """Scored or not, token by token: the first `share` of what is not an answer is context."""
    total = sum(n for n, _ in turns)
    left, flags = total * share.numerator // share.denominator, []
    for asked, answered in turns:
        for _ in range(asked):
            flags.append(left <= 0)
            left -= 1
        flags += [True] * answered
    return flags


@settings(deadline=None, max_examples=80)
@given(st.lists(TURNS, min_size=1, max_size=6), st.sampled_from(list(FILLINGS)),
       st.fractions(0, 1, max_denominator=50), st.integers(0, 9))
def test_a_row_is_its_samples_their_eos_and_a_rest_of_which_nothing_is_scored(
        turns, filling, share, seed):
    made, T = numbered(turns), 56
    data = Samples(Store.of(made), T, fake_tokenizer(10**6), **FILLINGS[filling])
    by_first = {int(ids[0]): (ids, each) for (ids, _, _), each in zip(made, turns)}
    draws = [np.random.default_rng(seed + n) for n in range(len(data))]
    for x0, starts, ends, maskable in zip(*rows_of(data, draws=draws, share=share)):
        end = 0
        for start, text_end, end in documents(x0):
            ids, each = by_first[int(x0[start])]
            assert x0[start:text_end].tolist() == ids.tolist()
            want = expected_share(each, share) + [True] * (end - text_end)
            assert maskable[start:end].tolist() == [False, *want[1:]]
            room = {"multiple": [len(ids) // 8 * 8 + 8],
                    "cross": range(len(ids) + 1, len(ids) + 5),
                    "canvas": range(len(ids) + 1, max(len(ids) - each[-1][1] + 9, len(ids) + 1)
                                    + 1)}[filling]
            assert end - start in room
            if filling != "cross":
                assert (starts[start:end] == start).all() and (ends[start:end] == end).all()
        assert (x0[end:] == PAD).all() and not maskable[end:].any()
        assert (starts[end:] == end).all() and (ends[end:] == T).all()
        if filling == "cross":
            assert (starts[:end] == 0).all() and (ends[:end] == end).all()


def test_without_a_pad_token_the_rest_is_eos_and_nothing_of_it_is_scored():
    data = Samples(Store.of(samples_of([[(3, 2)]])), 16, fake_tokenizer(pad_id=None))
    x0, starts, ends, maskable = rows_of(data)
    assert x0.tolist() == [[0, 1, 2, 3, 4] + [EOS] * 11]
    assert maskable.tolist() == [[False] * 3 + [True] * 5 + [False] * 8]
    assert starts.tolist() == [[0] * 8 + [8] * 8] and ends.tolist() == [[8] * 8 + [16] * 8]


@pytest.mark.parametrize("filling, lengths", [("canvas", range(6, 13)), ("cross", range(6, 10))])
def test_the_filling_is_drawn_uniformly(filling, lengths):
    """2,000 draws, chi-squared, p > 1e-6."""
    data = Samples(Store.of(samples_of([[(3, 2)]])), 24, fake_tokenizer(), **FILLINGS[filling])
    counts = dict.fromkeys(lengths, 0)
    for step in range(20):
        for row in data.at_step(5, step, 100).x0.tolist():
            counts[24 - row.count(PAD)] += 1
    assert chi2_p(list(counts.values()), 2000 / len(counts)) > 1e-6


@settings(deadline=None, max_examples=40)
@given(st.lists(TURNS, min_size=1, max_size=9), st.sampled_from(["0.1", "0.5", "1", "2.3", "0"]),
       st.integers(1, 4), st.integers(0, 99), st.sampled_from(list(FILLINGS)))
def test_the_ramp_is_as_long_as_it_should_be_at_every_step(turns, epochs, batch_rows, seed,
                                                           filling):
    made = numbered(turns)
    data = Samples(Store.of(made), 56, fake_tokenizer(10**6), **FILLINGS[filling],
                   condition_epochs=float(epochs))
    by_first = {int(ids[0]): each for (ids, _, _), each in zip(made, turns)}
    for step in range(3 * ceil(len(data) / batch_rows)):
        share = Fraction(1)
        if float(epochs):
            share = min(share, Fraction(step * batch_rows) / (Fraction(epochs) * len(data)))
        batch = data.at_step(seed, step, batch_rows)
        for x0, maskable in zip(batch.x0.numpy(), batch.maskable.numpy()):
            for start, text_end, _ in documents(x0):
                want = expected_share(by_first[int(x0[start])], share)
                assert maskable[start:text_end].tolist() == [False, *want[1:]]


def test_the_ramp_loses_no_token_to_rounding():
    """0.29 of 100 tokens are 29, and 0.1 epochs are over after a tenth of an epoch."""
    data = Samples(Store.of(samples_of([[(100, 4)]] * 100)), 112, fake_tokenizer())
    assert len(data) == 100
    for epochs, ends in ((1.0, 100), (0.1, 10), (0.3, 30), (0.7, 70)):
        data.condition_epochs = epochs
        for step in range(ends + 2):
            maskable = data.at_step(0, step, 1).maskable[0, :100]
            context = 100 if step >= ends else 100 * step // ends
            assert maskable.sum() == 100 - max(context, 1), (epochs, step)


@settings(deadline=None, max_examples=40)
@given(st.lists(TURNS, min_size=1, max_size=12), st.sampled_from(list(FILLINGS)),
       st.integers(1, 6), st.integers(0, 2**62), st.data())
def test_a_row_is_a_function_of_seed_step_and_row_alone(turns, filling, batch_rows, seed, data):
    def fresh():
        return Samples(Store.of(numbered(turns)), 56, fake_tokenizer(10**6), **FILLINGS[filling],
                       condition_epochs=1.5)

    samples = fresh()
    steps = -(-2 * len(samples) // batch_rows)
    whole = [samples.at_step(seed, step, batch_rows) for step in range(steps)]
    epochs = np.concatenate([b.epochs for b in whole])[:2 * len(samples)]
    assert epochs.tolist() == [0] * len(samples) + [1] * len(samples)
    firsts = torch.cat([b.x0[:, 0] for b in whole])[:2 * len(samples)]
    assert all(len(set(part.tolist())) == 1 or len(samples) > 1 for part in firsts.split(1))
    step = data.draw(st.integers(0, steps - 1))
    rows = data.draw(st.lists(st.integers(0, batch_rows - 1), min_size=1, max_size=5))
    part = fresh().at_step(seed, step, batch_rows, rows)  # of a process that saw no other step
    for name in ("x0", "doc_start", "doc_end", "maskable"):
        assert torch.equal(getattr(part, name), getattr(whole[step], name)[rows]), name


# --- what the objectives make of it ---------------------------------------------------------------

RECIPES = [make("ar"), *[make(objective, schedule=schedule, shift=shift)
                         for objective in NOISY for schedule in ("uniform", "clipped", "count")
                         for shift in (False, True)],
           *[make(objective, schedule="count", complementary=True) for objective in NOISY]]


def packed_batch(share=1, condition_epochs=0.0, **filling):
    """A Batch of two rows of a few samples each, and their Samples."""
    turns = [[(3, 4)], [(1, 2), (2, 3)], [(5, 1)], [(2, 9)], [(4, 4), (1, 1)], [(0, 3)]]
    data = Samples(Store.of(samples_of(turns)), 40, fake_tokenizer(), **filling,
                   condition_epochs=condition_epochs)
    return data.batch(range(len(data)), share=share), data


class Leaves:
    """A model whose losses are free variables: their gradients say what is scored."""

    def __init__(self, rows, positions):
        self.loss = torch.zeros(rows * positions, requires_grad=True)

    def __call__(self, tokens, spans, queries, read):
        return self.loss[read]

    def token_loss(self, hidden, targets):
        return hidden


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.objective}-{r.schedule}-{r.shift}")
@pytest.mark.parametrize("filling, share", [("multiple", 1), ("multiple", Fraction(1, 2)),
                                            ("cross", 0), ("canvas", Fraction(1, 2))])
def test_context_is_never_masked_and_costs_nothing(recipe, share, filling):
    batch, _ = packed_batch(share, **FILLINGS[filling])
    if recipe.complementary:
        batch = batch.select([row for row in range(len(batch.x0)) for _ in "ab"])
    B, T = batch.x0.shape
    seen = torch.zeros(B, T, dtype=torch.bool)
    for step in range(15):
        noised = corrupt(batch, recipe, Draw.of(recipe, 3, step, range(B), B))
        scored = noised.masked
        assert not (scored & ~batch.maskable).any()
        assert torch.equal(noised.weight != 0, scored)
        if recipe.objective != "ar":
            assert torch.equal(noised.xt[~scored], batch.x0[~scored])
            assert (noised.xt[scored] == MASK).all()
        wide = 2 * T if recipe.objective == "block" and recipe.shift else T
        net = Leaves(B, wide)
        weighted_loss(net, noised, recipe).backward()
        at = read_at(recipe, batch.doc_start) + torch.arange(B)[:, None] * wide
        # with shift, the places of tokens 0 and 1 are one: 0 begins a sample, and is not scored
        assert torch.equal((net.loss.grad[at] != 0)[:, 1:], scored[:, 1:])
        assert not scored[:, 0].any()
        seen |= scored
    if recipe.complementary:  # the two rows of a pair between them
        seen = seen | seen.view(-1, 2, T).flip(1).view(B, T)
    assert torch.equal(seen, batch.maskable)  # and all else is scored at times


def losses_by_token(net, noised, recipe):
    """(B, T) float64: each masked token's loss, 0 elsewhere."""
    found = torch.zeros(noised.x0.shape, dtype=torch.float64)
    found[noised.masked] = token_losses(net, noised, recipe).double()
    return found


SEEING = [make("ar"), *[make(objective, schedule="count", shift=shift, block_size=K)
                        for objective in NOISY for shift in (False, True) for K in (4,)]]


@pytest.mark.parametrize("recipe", SEEING, ids=lambda r: f"{r.objective}-{r.shift}")
def test_samples_of_a_row_do_not_see_each_other_and_cost_what_each_costs_alone(recipe):
    filling = {"canvas": 9} if recipe.objective == "bidirectional" else {}
    batch, data = packed_batch(Fraction(1, 2), **filling)
    net = small_model().double()
    with torch.no_grad():
        noised = corrupt(batch, recipe, Draw(1, 0, range(len(batch.x0)), len(batch.x0)))
        before = losses_by_token(net, noised, recipe)
        assert (before != 0).sum() > 10
        compared = 0
        for row in range(len(before)):
            for start in set(batch.doc_start[row].tolist()):
                end = int(batch.doc_end[row, start])
                place = (slice(row, row + 1), slice(start, end))
                alone = replace(noised, **{k: v[place] for k, v in vars(noised).items()})
                alone.doc_start, alone.doc_end = alone.doc_start - start, alone.doc_end - start
                diff = losses_by_token(net, alone, recipe) - before[place]
                assert diff.abs().max() < 1e-12
                changed = replace(noised, x0=noised.x0.clone(), xt=noised.xt.clone())
                changed.x0[place] = (noised.x0[place] + 1) % 9
                changed.xt[place] = torch.where(noised.masked[place], MASK, changed.x0[place])
                after = losses_by_token(net, changed, recipe)
                inside = torch.zeros_like(noised.masked)
                inside[place] = True
                assert torch.equal(after[~inside], before[~inside])
                if noised.masked[place].any():
                    assert not torch.equal(after[inside], before[inside])
                    compared += 1
    assert compared >= 5


@pytest.mark.parametrize("recipe", SEEING, ids=lambda r: f"{r.objective}-{r.shift}")
def test_under_cross_document_they_do(recipe):
    batch, data = packed_batch(cross_document=True)
    net = small_model().double()
    with torch.no_grad():
        noised = corrupt(batch, recipe, Draw(1, 0, range(len(batch.x0)), len(batch.x0)))
        before = losses_by_token(net, noised, recipe)
        changed = replace(noised, x0=noised.x0.clone(), xt=noised.xt.clone())
        changed.x0[0, 0] = (noised.x0[0, 0] + 1) % 9
        changed.xt[0, 0] = changed.x0[0, 0]  # context
        difference = (losses_by_token(net, changed, recipe) - before).abs()
    last = noised.masked[0].nonzero().max()
    assert data.numbers[data.starts[0]:data.starts[1]].size > 1 and difference[0, last] > 1e-9
    assert difference[1:].max() == 0


# --- chats ----------------------------------------------------------------------------------------

CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
LLAMA3 = """{{- bos_token -}}{%- for m in messages -%}
{{- '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|end|>\n\n' -}}{%- endif -%}"""
SEED = """{{- bos_token + 'system\nYou are an AI.\n\n' + eos_token -}}{%- for m in messages -%}
{{- bos_token + m.role + '\n' + m.content | trim + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- bos_token + 'assistant\n' -}}{%- endif -%}"""
LLAMA2 = """{%- for m in messages -%}{%- if m.role == 'user' -%}
{{- bos_token + '[INST] ' + m.content + ' [/INST]' -}}
{%- else -%}{{- ' ' + m.content + ' ' + eos_token -}}{%- endif -%}{%- endfor -%}"""
QWEN3 = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- set thought = '' -%}
{%- if '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}
{{- '<think>\n' + thought + '\n</think>\n\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
ENDS = {"chatml": (CHATML, "<|im_end|>\n"), "llama3": (LLAMA3, "<|eot_id|>"),
        "seed": (SEED, "<eos>"), "llama2": (LLAMA2, " <eos>")}
NAMES = ("<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot_id|>")


def tokenizer(template=None, json_text=None, **config):
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "mask")}
    return Tokenizer(json_text, names | config, template, folder="weights")


@pytest.fixture(scope="module")
def vocabulary():
    """The text of a tokenizer.json: a byte-level BPE of 300 ids and the templates' tokens."""
    hf = train_tokenizer(["def f(x):\n    return x + 1\n" * 9], 300)
    hf.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    return hf.to_str()


def chat_of(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def scored_text(messages, tok):
    """The scored parts of a conversation, decoded token by token, and the whole text's ids."""
    [(ids, scored)] = sft.encode([sft.pieces_of("line 1", {"messages": messages}, tok)], tok)
    parts, before = [], False
    for token, is_scored in zip(ids.tolist(), scored):
        if is_scored:
            if not before:
                parts.append("")
            name = tok.hf.id_to_token(token)
            parts[-1] += name if name in tok.special_ids else tok.decode([token])
        before = is_scored
    return parts, ids.tolist()


CODE = st.text("ab1 (\n", min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize("name", ENDS)
@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(CODE, CODE), min_size=1, max_size=3), st.booleans())
def test_the_assistants_words_and_its_end_of_turn_are_scored(vocabulary, name, turns, trailing):
    template, end = ENDS[name]
    tok = tokenizer(template, vocabulary)
    messages = chat_of(*[text for turn in turns for text in turn])
    parts, ids = scored_text([*messages, *chat_of("more?")] if trailing else messages, tok)
    answers = [answer for _, answer in turns]
    if name in ("llama3", "seed"):
        answers = [answer.strip() for answer in answers]
    if name == "llama2":
        answers = [f" {answer}" for answer in answers]
    assert parts == [answer + end for answer in answers]
    # encoded apart and whole are the same text, and the same ids where special tokens are between
    assert tok.hf.decode(ids, skip_special_tokens=False) == tok.render(messages, False)
    if name == "llama3" and not any(t != t.strip() for turn in turns for t in turn):
        assert ids == tok.encode_rendered([tok.render(messages, False)])[0]


def test_ids_are_those_of_the_whole_text_where_special_tokens_are_at_the_seams(vocabulary):
    """A header that ends in a special token, so that no token can reach across."""
    tok = tokenizer(CHATML.replace("m.role + '\\n'", "m.role + '<|end|>'")
                    .replace("assistant\\n", "assistant<|end|>"), vocabulary)
    messages = chat_of("a  ", "\n b", "  c", "d\n")
    parts, ids = scored_text(messages, tok)
    assert parts == ["\n b<|im_end|>\n", "d\n<|im_end|>\n"]
    assert ids == tok.encode_rendered([tok.render(messages, False)])[0]
    assert ids[0] != tok.bos_id  # this template writes none


def test_of_a_template_that_rewrites_answers_the_last_one_is_scored_and_the_others_are_counted(
        vocabulary, tmp_path, capsys):
    tok = tokenizer(QWEN3, vocabulary)
    thoughts = chat_of("q1", "<think>\nhm\n</think>\n\na1", "q2", "<think>\nso\n</think>\n\na2")
    plain = chat_of("q1", "a1", "q2", "a2")
    assert scored_text(thoughts, tok)[0] == ["<think>\nso\n</think>\n\na2<|im_end|>\n"]
    assert scored_text(plain, tok)[0] == ["<think>\n\n</think>\n\na2<|im_end|>\n"]
    path = lines(tmp_path, {"messages": thoughts}, {"messages": plain[:2]}, {"messages": plain})
    assert len(list(sft.read(path, tok))) == 3
    assert "2 of 3 samples have answers that are not scored" in capsys.readouterr().out
    assert len(list(sft.read(path, tok, quiet=True))) == 3
    assert capsys.readouterr().out == ""


NO_PROMPT = CHATML.replace("add_generation_prompt", "false")
REFUSED_TEMPLATES = [
    (None, "the tokenizer in weights has no chat template"),
    (NO_PROMPT, "the chat template in weights ignores add_generation_prompt: the model would be "
     "asked without the words that begin an answer"),
    ("{{ messages[0].content }}", "does not write an answer where it asks for one"),
    ("{{ messages|length }}", "does not write an answer where it asks for one"),
    ("{{ raise_exception('no\nthanks') }}", "the chat template in weights refuses these messages: "
     "no"),
]


@pytest.mark.parametrize("template, says", REFUSED_TEMPLATES)
def test_a_template_that_cannot_say_what_is_an_answer_is_named_with_the_line(
        vocabulary, tmp_path, template, says):
    tok = tokenizer(template, vocabulary)
    path = lines(tmp_path, {"prompt": "a", "completion": "b"}, {"messages": chat_of("q", "a")})
    assert says in refusal(path, tok, 2)


# --- lines of a file ------------------------------------------------------------------------------

def lines(folder, *records, name="mine.jsonl"):
    """A file of these records: dicts, or lines as they are."""
    path = folder / name
    with open(path, "wb") as file:
        for record in records:
            line = json.dumps(record).encode() if isinstance(record, dict) else record
            file.write(line + b"\n")
    return path


def refusal(path, tok, line):
    """The message of the mistake that reading this file ends in: one line, with its number."""
    with pytest.raises(Mistake) as caught:
        list(sft.read(path, tok, quiet=True))
    message = str(caught.value)
    assert message.startswith(f"line {line} of {path}") and "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_a_prompt_and_a_completion_are_bos_and_their_own_tokens_whatever_they_spell(vocabulary,
                                                                                   tmp_path):
    tok = tokenizer(CHATML, vocabulary)
    path = lines(tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "def f", "completion": "(x):\\n"}\r', b"",
                 b"  \t", {"prompt": "", "completion": "<eos>\x00é"},
                 {"prompt": "p", "canonical_solution": "s", "test": 5},
                 b'{"prompt": "1", "completion": "2", "prompt": "3"}')
    path.write_bytes(path.read_bytes()[:-1])  # the last line has no end
    texts = [("def f", "(x):\n"), ("", "<eos>\x00é"), ("p", "s"), ("3", "2")]
    for (ids, scored, question), (prompt, completion) in zip(sft.read(path, tok), texts,
                                                             strict=True):
        asked, answer = tok.encode(prompt), tok.encode(completion)
        assert ids.tolist() == [tok.bos_id, *asked, *answer] and question == prompt
        assert scored.tolist() == [False] * (1 + len(asked)) + [True] * len(answer)
        assert ids.dtype == np.uint16 and tok.eos_id not in ids


GOOD = {"prompt": "p", "completion": "c"}
BAD_LINES = [
    (b"{}", 'must have a "prompt" and a "completion", both texts, or a list of "messages"; its '
     "prompt is None"),
    ({"prompt": "p"}, "its completion is None"),
    ({"completion": "c"}, "its prompt is None"),
    ({"prompt": "p", "completion": None}, "its completion is None"),
    ({"prompt": 5, "completion": "c"}, "its prompt is 5"),
    ({"prompt": ["p"] * 999, "completion": "c"}, "its prompt is ['p', "),
    ({"prompt": "p", "completion": {"a": "\n"}}, "its completion is {"),
    ({"prompt": "p", "canonical_solution": 1}, "its canonical_solution is 1"),
    ({"prompt": "p", "completion": ""}, "its completion is empty"),
    ({"prompt": "p", "messages": []}, 'it has a "prompt" and "messages"'),
    ({"prompt": "\ud800", "completion": "c"}, "the text is not Unicode: character 0 is '\\ud800'"),
    ({"prompt": "p", "completion": "c\udfff"}, "the text is not Unicode: character 1"),
    ({"messages": chat_of("\ud800", "a")}, "the text is not Unicode"),
    ({"messages": None}, 'its "messages" must be a list of objects'),
    ({"messages": []}, "none of its messages is the assistant's"),
    ({"messages": "hello"}, 'its "messages" must be a list of objects'),
    ({"messages": {"role": "user"}}, 'its "messages" must be a list of objects'),
    ({"messages": [{"from": "human", "value": "q"}]}, 'with a "role" and a "content"'),
    ({"messages": [{"role": "user", "content": None}]}, 'with a "role" and a "content"'),
    ({"messages": [{"role": 1, "content": "q"}]}, 'with a "role" and a "content"'),
    ({"messages": chat_of("q")}, "none of its messages is the assistant's"),
    ({"messages": chat_of("q", "a")[1:]}, "begin with the assistant's, before any question"),
    ({"messages": chat_of("q", "")}, "an answer of the assistant's is empty"),
    (b"5", "holds a int"), (b"[]", "holds a list"), (b"null", "holds a NoneType"),
    (b'"{}"', "holds a str"), (b"nonsense", "is not readable JSON"),
    (b'{"prompt": "p", "completion": "c"} {}', "is not readable JSON: Extra data"),
    (b'{"prompt": "p", "completion": "c"', "is not readable JSON"),
    (b'{"prompt": "\xff"}', "is not UTF-8 text"),
    (json.dumps(GOOD).encode("utf-16"), "is not UTF-8 text"),
    (b'{"prompt": "a\x00b", "completion": "c"}', "is not readable JSON"),
    (b'{"prompt": NaN, "completion": "c"}', "is not readable JSON: NaN"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "is not readable JSON: Exceeds the limit"),
    (b'{"prompt": ' + b"[" * 100_000 + b"}", "is not readable JSON"),
    (b'{"prompt": "' + b"x" * 2**24 + b'"}', "is longer than 16,777,216 bytes"),
]


@pytest.mark.parametrize("line, says", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_in_one_sentence(vocabulary, tmp_path, line, says):
    path = lines(tmp_path, GOOD, b"", line, GOOD)
    assert says in refusal(path, tokenizer(CHATML, vocabulary), 3)


@pytest.mark.parametrize("depth", [300, 900, 950, 980, 990, 1000, 1500])
def test_a_line_nested_deeply_is_a_sentence_too(vocabulary, tmp_path, depth):
    path = lines(tmp_path, b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")
    refusal(path, tokenizer(None, vocabulary), 1)


@settings(deadline=None, max_examples=80,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["prompt", "completion", "messages", "role", "content",
                                         "canonical_solution"]), inner, max_size=4), max_leaves=8))
def test_whatever_a_line_holds_there_is_a_sample_or_a_sentence(vocabulary, tmp_path, value):
    path = lines(tmp_path, json.dumps(value).encode())
    tok = tokenizer(None, vocabulary)  # without a template: messages end in a sentence
    try:
        [(ids, scored, _)] = sft.read(path, tok, quiet=True)
        assert len(ids) == len(scored) and scored.any()
    except Mistake as error:
        assert str(error).startswith(f"line 1 of {path}") and "\n" not in str(error)


@pytest.mark.parametrize("make_path, says", [
    (lambda path: path.mkdir(), "is missing, or not a file"),
    (os.mkfifo if hasattr(os, "mkfifo") else lambda path: None, "is missing, or not a file"),
    (lambda path: None, "is missing, or not a file"),
    (lambda path: path.touch(), "is empty: write a sample on each line"),
    (lambda path: path.write_bytes(b"\n \n\xef\xbb\xbf"), "line 3 of .* is not readable JSON"),
    (lambda path: path.write_bytes(b"\xef\xbb\xbf\n \n"), "is empty: write a sample on each line"),
])
@pytest.mark.parametrize("quiet", [False, True])
def test_a_file_that_is_none_is_named(vocabulary, tmp_path, make_path, says, quiet):
    make_path(tmp_path / "mine.jsonl")
    with pytest.raises(Mistake, match=f"mine.jsonl.*{says}|{says}"):
        list(sft.read(tmp_path / "mine.jsonl", tokenizer(None, vocabulary), quiet))


def test_a_completion_without_tokens_and_a_tokenizer_without_eos_are_refused(vocabulary, tmp_path):
    from tokenizers import normalizers
    spec = json.loads(vocabulary)
    hf = Tokenizer(vocabulary).hf
    hf.normalizer = normalizers.Replace("x", "")
    spec["normalizer"] = json.loads(hf.to_str())["normalizer"]
    tok = tokenizer(None, json.dumps(spec))
    assert "makes no token of its completion" in refusal(
        lines(tmp_path, GOOD, {"prompt": "p", "completion": "xx"}), tok, 2)
    store = Store.of(list(sft.read(lines(tmp_path, GOOD), tok)))
    with pytest.raises(Mistake, match="the tokenizer in weights has no eos_token"):
        Samples(store, 8, tokenizer(None, vocabulary, eos_token=None))


# --- the data of a run ----------------------------------------------------------------------------

def settings_for(data, **more):
    return SimpleNamespace(**{"data": str(data), "val_data": "", "val_percent": 30.0, "context": 32,
                              "objective": "block", "canvas": 16, "cross_document": False,
                              "condition_epochs": 0.0, "fim_rate": 0.0} | more)


def many(count=60):
    return [{"prompt": f"p{i % 40}", "completion": "c" * (1 + i % 9)} for i in range(count)]


def test_equal_questions_share_a_split_and_new_lines_move_none(vocabulary, tmp_path):
    tok = tokenizer(None, vocabulary)

    def splits(*records):
        train, val = sft.divide(list(sft.read(lines(tmp_path, *records), tok)),
                                settings_for("mine.jsonl"))
        return [{question for _, _, question in part} for part in (train, val)]

    train, val = splits(*many())
    assert train | val == {f"p{i}" for i in range(40)} and not train & val and 4 < len(val) < 20
    more = splits({"prompt": "new", "completion": "c"}, *many()[::-1])
    assert more[0] - {"new"} == train and more[1] - {"new"} == val


def test_a_val_percent_that_leaves_nothing_to_train_on_is_refused(vocabulary, tmp_path):
    path = lines(tmp_path, *many(2))
    with pytest.raises(Mistake, match="val_percent=99.9 leaves none of the 2 samples of .* for "
                       "training: give less, or name a file with --val_data"):
        sft.open_splits(settings_for(path, val_percent=99.9), tokenizer(None, vocabulary))


def test_a_small_file_has_a_val_split_too(vocabulary, tmp_path):
    """Where no hash is below val_percent, the question with the lowest is held out, wherever it
    stands and however often."""
    tok = tokenizer(None, vocabulary)
    samples = list(sft.read(lines(tmp_path, *many(9), *many(9)), tok))
    train, val = sft.divide(samples, settings_for("mine.jsonl", val_percent=1e-6))
    assert len(train) == 16 and len(val) == 2 and len({question for _, _, question in val}) == 1
    again, same = sft.divide(samples[::-1], settings_for("mine.jsonl", val_percent=1e-6))
    assert [question for _, _, question in same] == [question for _, _, question in val]
    with pytest.raises(Mistake, match="leaves none of the 1 samples"):
        sft.divide(samples[:1], settings_for("mine.jsonl", val_percent=1e-6))


def test_a_val_file_is_all_of_the_val_split_and_never_ramped(vocabulary, tmp_path):
    tok = tokenizer(None, vocabulary)
    train, val = sft.open_splits(settings_for(
        lines(tmp_path, *many()), val_data=str(lines(tmp_path, *many(7), name="val.json")),
        condition_epochs=1.0, objective="bidirectional"), tok)
    assert len(train.numbers) == 60 and len(val.numbers) == 7
    assert train.share(0, 2) == 0 and val.share(0, 2) == 1
    assert train.canvas == val.canvas == 16


def test_the_fingerprint_follows_the_samples_and_not_where_they_lie(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = lines(tmp_path, *many(5))
    base = sft.fingerprint(settings_for(path))
    assert base == sft.fingerprint(settings_for(lines(tmp_path / "elsewhere", b"", *many(5))))
    assert base != sft.fingerprint(settings_for(lines(tmp_path, *many(4), name="b.jsonl")))
    assert base != sft.fingerprint(settings_for(path, val_percent=31.0))
    val = str(lines(tmp_path, *many(2), name="val.jsonl"))
    with_val = sft.fingerprint(settings_for(path, val_data=val))
    assert with_val != base
    assert with_val == sft.fingerprint(settings_for(path, val_data=val, val_percent=31.0))
    moved = settings_for(lines(tmp_path, *many(7)[:5], many(2)[0], name="c.jsonl"),
                         val_data=str(lines(tmp_path, many(2)[1], name="d.jsonl")))
    assert sft.fingerprint(moved) != with_val  # a line went from one file to the other


def folder_of(tmp_path, tok, records):
    """A folder of samples, train and val alike."""
    path = lines(tmp_path, *records)
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        assert sft.write(folder, split, sft.read(path, tok, quiet=True)) == len(records)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": tok.vocab_size}))
    return path, folder


@pytest.mark.parametrize("objective", ["block", "bidirectional"])
def test_a_folder_of_samples_gives_the_rows_of_its_file(vocabulary, tmp_path, objective):
    tok = tokenizer(CHATML, vocabulary)
    chats = [{"messages": chat_of("q", "a", "q2", "a2")}]
    path, folder = folder_of(tmp_path, tok, [*many(), *chats])
    assert sft.is_supervised(folder) and sft.is_supervised(path)
    assert not sft.is_supervised(tmp_path)
    store, read = Store.open(folder, "train", tok.vocab_size), list(sft.read(path, tok))
    assert len(store) == 61
    for number, (ids, scored, _) in enumerate(read):
        found = store.sample(number)
        assert np.array_equal(found[0], ids) and np.array_equal(found[1], scored)
    cfg = settings_for(path, objective=objective, condition_epochs=1.0)
    train = Samples(Store.of(read), 32, tok, canvas=16 if objective == "bidirectional" else 0,
                    condition_epochs=1.0)
    cfg.data = str(folder)
    other, _ = sft.open_splits(cfg, tok)
    for step in (0, 3):
        a, b = train.at_step(1, step, 4), other.at_step(1, step, 4)
        assert torch.equal(a.x0, b.x0) and torch.equal(a.maskable, b.maskable)
        assert torch.equal(a.doc_end, b.doc_end)
    before = sft.fingerprint(cfg)
    flipped = bytearray((folder / "train.scored").read_bytes())
    flipped[0] ^= 1
    (folder / "train.scored").write_bytes(flipped)
    assert sft.fingerprint(cfg) != before


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


DAMAGES = [
    (lambda folder: cut(folder / "val.scored"), "val.scored does not fit the val.*bin beside it"),
    (lambda folder: (folder / "val.scored").unlink(), "val.scored does not fit"),
    (lambda folder: cut(folder / "train.bin"), "does not fit|cut within a token"),
    (lambda folder: cut(folder / "train.idx"), "train.idx|buffer|element"),
    (lambda folder: (folder / "train.idx").unlink(), "no .*train.idx next to its .bin"),
    (lambda folder: (folder / "val.bin").unlink(), r"no val\*.bin in"),
    (lambda folder: (folder / "meta.json").unlink(), "no meta.json in"),
    (lambda folder: (folder / "meta.json").write_text('{"vocab_size": 9999}'), "a vocabulary of"),
    (lambda folder: (folder / "train_1.bin").write_bytes(b"abcd"), "train_1.idx|does not fit"),
    (lambda folder: (folder / "train.bin").write_bytes(b""), "is empty or was cut"),
]


@pytest.mark.parametrize("damage, says", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_folder_of_samples_is_named(vocabulary, tmp_path, damage, says):
    tok = tokenizer(None, vocabulary)
    _, folder = folder_of(tmp_path, tok, many(9))
    damage(folder)
    with pytest.raises(Mistake, match=says) as caught:
        sft.open_splits(settings_for(folder), tok)
    assert "\n" not in str(caught.value)


def test_a_folder_with_tokens_beyond_the_vocabulary_is_refused(vocabulary, tmp_path):
    tok = tokenizer(None, vocabulary)
    _, folder = folder_of(tmp_path, tok, many(9))
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[:] = 60_000
    tokens.tofile(folder / "train.bin")
    train, _ = sft.open_splits(settings_for(folder), tok)
    with pytest.raises(Mistake, match="damaged: they hold token 60000, and their tokenizer has"):
        train.at_step(0, 0, 2)


# --- a row to look at -----------------------------------------------------------------------------

def pretend_terminal(monkeypatch):
    """Have standard output say that it is a terminal in color."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize("why", ["not a terminal", "TERM=dumb", "NO_COLOR=1"])
def test_where_there_is_no_color_brackets_hold_what_is_scored(vocabulary, capsys, monkeypatch,
                                                              why):
    pretend_terminal(monkeypatch)
    if why == "not a terminal":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    else:
        monkeypatch.setenv(*why.split("="))
    tok = tokenizer(CHATML, vocabulary)
    pieces = [sft.pieces_of("", {"prompt": "def", "completion": "(x)\n"}, tok)]
    [(ids, scored)] = sft.encode(pieces, tok)
    data = Samples(Store.of([(ids, scored, "")] * 2), 32, tok)
    sft.show_row(data, 0, tok)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    one = "[<bos>]def⟦(x)\n" + "[<eos>]" * (len(ids) // 8 * 8 + 8 - len(ids)) + "⟧"
    documents = [text.split("\n", 1)[1] for text in shown.split("--- document at ")[1:3]]
    assert documents[0] == one + "\n" and documents[1].startswith(one)
    assert "tokens are scored: ⟦text⟧ and ⟦[special tokens]⟧" in shown


def test_a_row_is_shown_with_what_is_scored_in_color(vocabulary, capsys, monkeypatch):
    pretend_terminal(monkeypatch)
    tok = tokenizer(CHATML, vocabulary)
    pieces = [sft.pieces_of("", {"prompt": "def\x1b", "completion": "(x)\n"}, tok)]
    [(ids, scored)] = sft.encode(pieces, tok)
    data = Samples(Store.of([(ids, scored, "")] * 2), 32, tok)
    sft.show_row(data, 0, tok)
    shown = capsys.readouterr().out
    text = shown.partition("row 0")[0]
    for color in (sft.SCORED, sft.FILLED, sft.CONTEXT, sft.PLAIN):
        text = text.replace(color, {sft.SCORED: "+", sft.FILLED: "=", sft.CONTEXT: "-"}.get(color,
                                                                                            ""))
    count = len(ids) // 8 * 8 + 8 - len(ids)
    assert "\x1b" not in text and "-·" in text and "-[<bos>]" in text
    assert text.count("=[<eos>]") == 2 * count and text.count("--- document at") >= 2
    assert "+(" in text and "+x" in text and "+)" in text
    assert f"{2 * (count + int(scored.sum()))} of 32 tokens are scored" in shown
    with pytest.raises(Mistake, match="show_row=1 is beyond the last row, 0"):
        sft.show_row(data, 1, tok)
