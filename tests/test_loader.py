"""loader.py: windows are the shards' tokens, documents are the offsets', and the order is a
function of the step."""
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import Mistake
from loader import END_BYTES, Windows, check_rows, epoch_order, fingerprint, prefetch, rearranged
from tokenizer import document_of, fim_prompt

LENGTH = st.integers(1, 12).map(lambda n: 8 * n)
DOCUMENTS = st.lists(LENGTH, min_size=1, max_size=6)  # their lengths, in one shard
SHARDS = st.lists(DOCUMENTS, min_size=1, max_size=3)
BIG = 2**16 + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


def write_shards(folder, shards, vocab_size, split="train", draw=None):
    """Write shards of documents of these lengths; tokens come from `draw`, or count up.

    Returns the shards' arrays.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    arrays, total = [], 0
    for i, lengths in enumerate(shards):
        n = sum(lengths)
        tokens = np.arange(total, total + n) if draw is None else draw.integers(0, vocab_size, n)
        total += n
        name = split if len(shards) == 1 else f"{split}_{i:03d}"
        dtype = np.uint32 if vocab_size > 2**16 else np.uint16
        tokens.astype(dtype).tofile(folder / f"{name}.bin")
        np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / f"{name}.idx")
        arrays.append(tokens)
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return arrays


def refusal(*arguments):
    """The message of the mistake that opening these windows ends in: always a single line."""
    with pytest.raises(Mistake) as caught:
        Windows(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(max_examples=80, deadline=None)
@given(shards=SHARDS, T=st.sampled_from([8, 16, 24, 72]),
       vocab_size=st.sampled_from([300, 2**16, BIG]), split=st.sampled_from(["train", "val"]),
       cross=st.booleans(), seed=st.integers(0, 99))
def test_a_window_is_the_shards_tokens_with_the_bounds_and_maskables_of_its_documents(
        folder, shards, T, vocab_size, split, cross, seed):
    arrays = write_shards(folder, shards, vocab_size, split, np.random.default_rng(seed))
    expected = []  # a window: [(token, first place of its document in the window, last + 1)]
    for tokens, lengths in zip(arrays, shards):
        document = np.repeat(np.arange(len(lengths)), lengths)
        for start in range(0, len(tokens) - T + 1, T):
            inside = document[start:start + T].tolist()
            bounds = [(0, T)] * T
            if not cross:
                bounds = [(inside.index(d), T - inside[::-1].index(d)) for d in inside]
            expected.append([(t, *b) for t, b in zip(tokens[start:start + T].tolist(), bounds)])
    if not expected:
        message = refusal(folder, split, T, vocab_size)
        assert f"context={T} is longer than every {split} shard" in message
        return
    windows = Windows(folder, split, T, vocab_size, cross)
    assert len(windows) == len(expected)
    b = windows.batch(range(len(windows)))
    rows = torch.stack([b.x0, b.doc_start, b.doc_end], -1).tolist()
    assert rows == [[list(p) for p in w] for w in expected]
    assert b.maskable.tolist() == [[i != p[1] for i, p in enumerate(w)] for w in expected]
    dtypes = (b.x0.dtype, b.doc_start.dtype, b.doc_end.dtype, b.maskable.dtype)
    assert dtypes == (torch.int64, torch.int32, torch.int32, torch.bool)
    some = [len(windows) - 1, 0, 0]
    assert torch.equal(windows.batch(some).x0, b.x0[some])
    assert windows.batch(some).epochs.tolist() == [0, 0, 0]


def test_token_ids_beyond_16_bits_survive(folder):
    write_shards(folder, [[8, 8]], BIG)
    ids = [0, 1, 2**16 - 1, 2**16, 2**16 + 4, 7, 8, 9]
    np.array([*ids, *ids[::-1]], np.uint32).tofile(folder / "train.bin")
    x0 = Windows(folder, "train", 8, BIG).batch([0, 1]).x0
    assert x0.tolist() == [ids, ids[::-1]]


@settings(max_examples=60, deadline=None)
@given(shards=SHARDS, T=st.sampled_from([8, 16]), rows=st.integers(1, 7),
       seed=st.integers(0, 2**40), data=st.data())
def test_every_epoch_visits_every_window_once_and_a_step_depends_on_seed_step_and_rows_alone(
        folder, shards, T, rows, seed, data):
    shards = [[T, *lengths] for lengths in shards]  # at least a window each
    arrays = write_shards(folder, shards, 3000)  # tokens count up, so the first one is unique
    windows = Windows(folder, "train", T, 3000)
    n = len(windows)
    steps = [windows.at_step(seed, s, rows) for s in range(-(-3 * n // rows))]
    visited = torch.cat([b.x0[:, 0] for b in steps])[:3 * n].view(3, n)  # an epoch per row
    starts = [int(a[i]) for a in arrays for i in range(0, len(a) - T + 1, T)]
    assert visited.sort(1).values.tolist() == [starts] * 3
    epochs = np.concatenate([b.epochs for b in steps])[:3 * n]
    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    step = data.draw(st.integers(0, len(steps) - 1))
    subset = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    other_process = Windows(folder, "train", T, 3000)  # it saw no step before
    part = other_process.at_step(seed, step, rows, subset)
    for name in ("x0", "doc_start", "doc_end", "maskable"):
        assert torch.equal(getattr(part, name), getattr(steps[step], name)[subset])
    assert part.epochs.tolist() == steps[step].epochs[subset].tolist()


def test_the_order_differs_by_epoch_and_by_seed_and_is_not_the_files():
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in (0, 1, 2**33) for epoch in (0, 1, 2)}
    assert len(orders) == 9 and tuple(range(100)) not in orders


def test_the_order_of_a_seed_stays_the_same_over_versions_of_this_file():
    assert epoch_order(1337, 0, 10).tolist() == [1, 0, 8, 2, 3, 7, 6, 5, 4, 9]
    assert epoch_order(2**62, 3, 10).tolist() == [6, 8, 7, 1, 5, 2, 0, 3, 9, 4]


@pytest.mark.parametrize("seed", [2**63, 2**64 - 2])
def test_neighboring_seeds_have_different_orders_however_large_they_are(seed):
    assert not np.array_equal(epoch_order(seed, 0, 100), epoch_order(seed + 1, 0, 100))


def test_what_stands_at_a_step_far_away_needs_no_step_before_it(folder):
    write_shards(folder, [[80]], 300)
    b = Windows(folder, "train", 8, 300).at_step(7, 10**9, 3)
    assert b.epochs.tolist() == [3 * 10**9 // 10, (3 * 10**9 + 1) // 10, (3 * 10**9 + 2) // 10]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), count=st.integers(1, 50))
def test_windows_for_evaluation_are_spread_over_the_whole_split(folder, n, count):
    write_shards(folder, [[8 * n]], 1000)
    numbers = Windows(folder, "train", 8, 1000).spread(count)
    assert len(numbers) == len(set(numbers)) == min(n, count) and numbers[0] == 0
    assert count == 1 or numbers[-1] == n - 1
    assert count == 1 or n == 1 or np.ptp(np.diff(numbers)) <= 1


def test_the_loaders_documents_are_those_that_were_filled(folder):
    """Documents as prepare.py writes them, in windows that cut some of them."""
    tok = SimpleNamespace(bos_id=0, eos_id=1)
    documents = [document_of(tok, [2] * n) for n in range(40)]
    write_documents(folder, documents)
    windows = Windows(folder, "train", 24, 300)
    whole = np.concatenate(documents)
    starts = np.cumsum([0] + [len(d) for d in documents])
    for number in range(len(windows)):
        tokens, doc_start, doc_end = windows.window(number)
        assert tokens.tolist() == whole[24 * number:24 * number + 24].tolist()
        cuts = {s - 24 * number for s in starts if 0 < s - 24 * number < 24} | {0}
        assert set(doc_start) == cuts and set(doc_end) == cuts - {0} | {24}
        assert not np.any(doc_start % 8) and not np.any(doc_end % 8)
        assert all(tokens[s] == 0 and tokens[s - 1] == 1 for s in cuts - {0})


# --- filling in the middle ------------------------------------------------------------------------

BOS, EOS, PREFIX, SUFFIX, MIDDLE = 0, 1, 5, 6, 7  # texts are of 10 and more


def filler(has_bos=True):
    bos_id = BOS if has_bos else None
    return SimpleNamespace(bos_id=bos_id, eos_id=EOS, fim=(PREFIX, SUFFIX, MIDDLE))


def write_documents(folder, documents, vocab_size=300):
    """A train shard of these documents, lists of ids."""
    write_shards(folder, [[len(d) for d in documents]], vocab_size)
    np.concatenate(documents).astype(np.uint16).tofile(folder / "train.bin")


def taken_apart(document, has_bos):
    """(prefix, middle, suffix, number of <eos>) of an arrangement, read by its tokens alone."""
    if has_bos:
        assert document[0] == BOS
    assert document[has_bos] == SUFFIX
    for token in (PREFIX, SUFFIX, MIDDLE):
        assert document.count(token) == 1
    prefix, middle = document.index(PREFIX), document.index(MIDDLE)
    end = document.index(EOS)
    assert set(document[end:]) == {EOS}
    return (document[prefix + 1:middle], document[middle + 1:end], document[has_bos + 1:prefix],
            len(document) - end)


CUT = st.floats(0, 1, exclude_max=True)


@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, 60), has_bos=st.booleans(), begun_before=st.booleans(),
       goes_on=st.booleans(), cuts=st.tuples(CUT, CUT), data=st.data())
def test_prefix_middle_and_suffix_are_the_document_up_to_the_suffixes_cut_end(
        length, has_bos, begun_before, goes_on, cuts, data):
    tok = filler(has_bos)
    document = document_of(tok, list(range(10, 10 + length)))
    if begun_before:  # only what stands in the window
        document = document[8 * data.draw(st.integers(0, len(document) // 8 - 1)):]
    if goes_on:
        document = document[:8 * data.draw(st.integers(1, len(document) // 8))]
    text = [token for token in document if token >= 10]
    made = rearranged(list(document), tok, cuts)
    if len(text) < 8:
        assert made == document
        return
    prefix, middle, suffix, filled = taken_apart(made, document[0] == BOS)
    together = prefix + middle + suffix
    assert len(made) == len(document) and together == text[:len(together)]
    spare = document.count(EOS)  # three of them make room for the tokens, and one stays
    assert len(text) - len(together) == max(0, 4 - spare) and filled == max(1, spare - 3)
    if document[0] == BOS or not has_bos:  # as a prompt begins
        assert made[:-filled] == fim_prompt(tok, prefix, suffix) + middle


def test_cuts_are_uniform_over_the_places_between_tokens():
    """Each pair of places as often as two independent uniform draws give, by chi squared."""
    draw, n, tries = np.random.default_rng(0), 12, 40_000
    document = document_of(filler(False), list(range(10, 10 + n)))  # 4 <eos>: nothing is lost
    counts = np.zeros((n + 1, n + 1))
    for cuts in draw.random((tries, 2)):
        prefix, middle, _, _ = taken_apart(rearranged(document, filler(False), cuts), False)
        counts[len(prefix), len(prefix) + len(middle)] += 1
    expected = tries / (n + 1) ** 2 * np.array(
        [[0 if b < a else 2 - (a == b) for b in range(n + 1)] for a in range(n + 1)])
    seen = expected > 0
    chi2 = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert counts[~seen].sum() == 0
    assert chi2 < 150  # 90 degrees of freedom: 1 in 10,000 is beyond 147; the seed is fixed


def lengths_of(count, most=60):
    return np.random.default_rng(3).integers(0, most, count).tolist()


def write_texts(folder, lengths):
    tok = filler()
    documents = [document_of(tok, [10 + (i + j) % 250 for j in range(n)])
                 for i, n in enumerate(lengths)]
    write_documents(folder, documents)


def pieces(batch, row):
    """[(start, end)] of a row's documents."""
    starts = batch.doc_start[row].tolist()
    ends = batch.doc_end[row].tolist()
    return sorted(set(zip(starts, ends)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**6), rate=st.sampled_from([0.3, 1.0]),
       cross=st.booleans(), data=st.data())
def test_a_row_depends_on_seed_step_and_its_number_alone(folder, seed, step, rate, cross, data):
    write_texts(folder, lengths_of(60))
    args = (folder, "train", 64, 300, cross)
    whole = Windows(*args, fim_rate=rate, tok=filler()).at_step(seed, step, 12)
    plain = Windows(*args).at_step(seed, step, 12)
    for name in ("doc_start", "doc_end", "maskable"):
        assert torch.equal(getattr(whole, name), getattr(plain, name))
    rows = data.draw(st.permutations(range(12)))
    cut = data.draw(st.integers(1, 11))
    for mine in (rows[:cut], rows[cut:]):  # two processes, in any order
        part = Windows(*args, fim_rate=rate, tok=filler()).at_step(seed, step, 12, mine)
        assert torch.equal(part.x0, whole.x0[mine])
        assert part.epochs.tolist() == whole.epochs[mine].tolist()
    if rate == 1 and not cross:
        for row in range(12):
            check_all_are_rearranged(plain, whole, row)


def check_all_are_rearranged(plain, whole, row):
    for start, end in pieces(plain, row):
        before, after = plain.x0[row, start:end].tolist(), whole.x0[row, start:end].tolist()
        text = [token for token in before if token >= 10]
        if len(text) < 8:
            assert after == before
            continue
        prefix, middle, suffix, _ = taken_apart(after, before[0] == BOS)
        together = prefix + middle + suffix
        assert together == text[:len(together)] and len(text) - len(together) <= 4


def test_documents_are_rearranged_one_by_one_also_where_they_see_each_other(folder):
    write_texts(folder, lengths_of(60))
    args = dict(fim_rate=0.5, tok=filler())
    apart = Windows(folder, "train", 64, 300, False, **args).at_step(5, 9, 12)
    joined = Windows(folder, "train", 64, 300, True, **args).at_step(5, 9, 12)
    assert torch.equal(apart.x0, joined.x0)
    assert not torch.equal(apart.x0, Windows(folder, "train", 64, 300).at_step(5, 9, 12).x0)


def test_a_document_is_rearranged_alike_whatever_stands_beside_it(folder):
    """Its draws belong to its place in the row."""
    length = 26  # a document of 32 with its <bos> and five <eos>
    write_texts(folder, [length] * 2)
    first = Windows(folder, "train", 64, 300, fim_rate=1.0, tok=filler()).at_step(3, 4, 1).x0[0]
    write_texts(folder, [6, 6, 6, 6, length])
    second = Windows(folder, "train", 64, 300, fim_rate=1.0, tok=filler()).at_step(3, 4, 1).x0[0]
    places = [[len(part) for part in taken_apart(x0[32:].tolist(), True)[:3]]
              for x0 in (first, second)]
    assert places[0] == places[1] and (second[:32] >= 10).sum() == 24
    other = [len(part) for part in taken_apart(first[:32].tolist(), True)[:3]]
    assert other != places[0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_of_rearranged_documents_is_the_rate(folder, rate):
    """Within 4 standard errors, over independent draws; the seed is fixed."""
    write_texts(folder, [26] * 64)  # two documents a window
    windows = Windows(folder, "train", 64, 300, fim_rate=rate, tok=filler())
    x0 = torch.cat([windows.at_step(11, step, 32).x0 for step in range(40)])
    seen = (x0.view(-1, 32) == SUFFIX).any(1).double()
    assert abs(seen.mean() - rate) < 4 * (rate * (1 - rate) / len(seen)) ** 0.5
    by_place = seen.view(-1, 2)
    both = by_place.prod(1).mean()  # two documents of a row are drawn independently
    assert abs(both - rate**2) < 4 * (rate**2 * (1 - rate**2) / len(by_place)) ** 0.5


def test_steps_seeds_and_rows_rearrange_differently(folder):
    write_texts(folder, [26] * 2)  # one window: always the same documents
    windows = Windows(folder, "train", 64, 300, fim_rate=1.0, tok=filler())
    rows = [tuple(x0.tolist()) for seed in (1, 2, 2**62, 2**62 + 1) for step in (0, 1)
            for x0 in windows.at_step(seed, step, 3).x0]
    assert len(set(rows)) == len(rows) == 24


def test_what_a_seed_rearranges_stays_the_same_over_versions_of_this_file(folder):
    write_texts(folder, [26] * 2)
    windows = Windows(folder, "train", 64, 300, fim_rate=0.7, tok=filler())
    x0 = windows.at_step(1337, 2, 4).x0.view(-1, 32)
    lengths = [[len(part) for part in taken_apart(document, True)[:3]] if SUFFIX in document else 0
               for document in x0.tolist()]
    assert lengths == [0, [8, 17, 1], [9, 6, 11], [6, 17, 3], [5, 13, 8], [6, 19, 1], [22, 2, 2],
                       [3, 11, 12]]


def test_windows_asked_for_by_number_are_never_rearranged(folder):
    """Evaluation reads them so."""
    write_texts(folder, lengths_of(60))
    fim = Windows(folder, "train", 64, 300, fim_rate=1.0, tok=filler())
    plain = Windows(folder, "train", 64, 300)
    numbers = plain.spread(8)
    assert torch.equal(fim.batch(numbers).x0, plain.batch(numbers).x0)


# --- fingerprint ----------------------------------------------------------------------------------

def prepared(folder):
    """A folder as prepare.py writes it, with a shard longer than what a fingerprint reads."""
    write_shards(folder, [[3000, 5000]], 300)
    np.arange(8).astype(np.uint16).tofile(folder / "val.bin")
    np.array([0, 8], np.int64).tofile(folder / "val.idx")
    folders = {"source": "/here", "out": str(folder), "tokenizer": ""}
    meta = {"vocab_size": 300, "suffix": ".py", **folders}
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def change_meta(folder, **values):
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_fingerprint_is_short_and_the_same_for_a_copy_elsewhere(tmp_path):
    mark = fingerprint(prepared(tmp_path / "a"))
    assert len(mark) == 16 and int(mark, 16) >= 0
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")  # other times, another path
    assert fingerprint(tmp_path / "elsewhere" / "b") == mark
    assert fingerprint(str(tmp_path / "a")) == mark
    assert fingerprint(prepared(tmp_path / "c")) == mark  # made again, in another folder
    change_meta(tmp_path / "c", source="/there", tokenizer="/a/tokenizer")
    assert fingerprint(tmp_path / "c") == mark
    (tmp_path / "c" / "notes.txt").write_text("not data")
    assert fingerprint(tmp_path / "c") == mark


@pytest.mark.parametrize("change", [
    lambda folder: change_meta(folder, suffix=".c"),
    lambda folder: change_meta(folder, vocab_size=301),
    lambda folder: change_byte(folder / "train.bin", 0),
    lambda folder: change_byte(folder / "train.bin", END_BYTES - 1),
    lambda folder: change_byte(folder / "train.bin", 16_000 - END_BYTES),
    lambda folder: change_byte(folder / "train.bin", -1),
    lambda folder: change_byte(folder / "train.idx", 8),
    lambda folder: change_byte(folder / "val.bin", 3),
    lambda folder: change_byte(folder / "tokenizer.json", 1),
    lambda folder: (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes() + b"aa"),
    lambda folder: (folder / "val.bin").rename(folder / "val_0.bin"),
    lambda folder: (folder / "val.idx").unlink(),
    lambda folder: (folder / "train_1.bin").write_bytes(b""),
])
def test_a_fingerprint_notices_other_data(tmp_path, change):
    folder = prepared(tmp_path)
    mark = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != mark


def test_a_fingerprint_of_a_folder_without_a_readable_meta_is_refused(tmp_path):
    prepared(tmp_path)
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(Mistake, match="meta.json"):
        fingerprint(tmp_path)


# --- mistakes -------------------------------------------------------------------------------------

def test_a_missing_folder_or_split_says_what_makes_one(folder):
    write_shards(folder, [[8]], 300)
    for where, split in ((Path("no/such/folder"), "train"), (folder, "val")):
        message = refusal(where, split, 8, 300)
        assert f"no {split}*.bin in {where}" in message
        assert f"python -m data.stdlib.prepare --out={where}" in message


def test_an_unfinished_folder_or_a_missing_index_says_to_prepare_again(folder):
    write_shards(folder, [[8]], 300)
    (folder / "train.idx").unlink()
    assert "train.idx" in refusal(folder, "train", 8, 300)
    write_shards(folder, [[8]], 300)
    (folder / "meta.json").unlink()
    assert "no meta.json" in refusal(folder, "train", 8, 300)


@settings(max_examples=40, deadline=None)
@given(shards=SHARDS, name=st.sampled_from(["bin", "idx"]), cut=st.integers(1, 200), data=st.data())
def test_a_shard_or_index_that_was_cut_short_is_noticed_and_named(folder, shards, name, cut, data):
    write_shards(folder, shards, 300)
    path = data.draw(st.sampled_from(sorted(folder.glob(f"*.{name}"))))
    whole = path.read_bytes()
    if name == "bin":
        left = max(len(whole) - 2 * cut, 2)  # a token at least: for less see below
    else:
        left = max(len(whole) - cut, 0)
    if left < len(whole):
        path.write_bytes(whole[:left])
        message = refusal(folder, "train", 8, 300)
        assert str(path.with_suffix(".idx")) in message and "cut short" in message


@pytest.mark.parametrize("size", [0, 7])
def test_a_shard_cut_to_nothing_or_within_a_token_is_noticed_and_named(folder, size):
    write_shards(folder, [[8]], 300)
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:size])
    assert "train.bin is empty or was cut" in refusal(folder, "train", 8, 300)


@pytest.mark.parametrize("offsets", [
    [0, 5, 5, 8], [0, 6, 5, 8], [1, 5, 8], [0, 9], [0, 16], [0], [8], [0, -1, 8], [0, 8, 8]])
def test_offsets_that_cannot_be_are_refused(folder, offsets):
    write_shards(folder, [[8]], 300)
    np.array(offsets, np.int64).tofile(folder / "train.idx")
    assert "train.idx does not fit its .bin of 8 tokens" in refusal(folder, "train", 8, 300)


def test_tokens_that_the_tokenizer_does_not_have_are_named(folder):
    write_shards(folder, [[8, 8]], 300)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[11] = 300
    tokens.tofile(folder / "train.bin")
    windows = Windows(folder, "train", 8, 300)
    windows.window(0)
    with pytest.raises(Mistake, match="is damaged: it holds token 300, and its tokenizer has 300"):
        windows.window(1)


@pytest.mark.parametrize("meta", [
    b"[]", b"null", b"5", b'"text"', b"{", b"", b'{"vocab_size": 300', b"\xff\xfe", b"[" * 100_000,
    b"{}", b'{"vocab_size": null}', b'{"vocab_size": "300"}', b'{"vocab_size": true}',
    b'{"vocab_size": 0}', b'{"vocab_size": -1}', b'{"vocab_size": 300.5}', b'{"vocab_size": NaN}',
    b'{"vocab_size": [300]}', b'{"vocab_size": 1e400}', b'{"vocab_size": 9999999999}'])
def test_a_damaged_meta_is_named(folder, meta):
    write_shards(folder, [[8]], 300)
    (folder / "meta.json").write_bytes(meta)
    assert str(folder / "meta.json") in refusal(folder, "train", 8, 2**70)


def test_another_vocabulary_than_the_models_is_refused(folder):
    write_shards(folder, [[8]], 300)
    assert "vocabulary of 300, the model has one of 299" in refusal(folder, "train", 8, 299)
    # a larger one has new tokens; the files stay as they are
    assert len(Windows(folder, "train", 8, 2**16 + 1)) == 1


def test_a_window_longer_than_every_shard_is_refused_and_says_how_long_they_are(folder):
    write_shards(folder, [[8, 16], [32]], 300)
    assert len(Windows(folder, "train", 32, 300)) == 1
    message = refusal(folder, "train", 40, 300)
    assert "context=40 is longer than every train shard" in message and "32 tokens" in message


@pytest.mark.parametrize("T, near", [(-3, "8"), (0, "8"), (1, "8"), (7, "8"), (9, "8 or 16"),
                                     (100, "96 or 104"), (255, "248 or 256"), (-8, "8")])
def test_a_window_that_is_not_a_multiple_of_8_is_refused_and_told_the_nearest_ones(folder, T, near):
    write_shards(folder, [[400]], 500)
    message = refusal(folder, "train", T, 500)
    assert message == f"context={T} must be a multiple of 8, as documents are: give {near}"


@pytest.mark.parametrize("T, batch_tokens, said", [
    (32, 100, "batch_tokens=100 must be a multiple of context=32, such as 96"),
    (32, 8, "batch_tokens=8 must be a multiple of context=32, such as 32"),
    (30, 60, "context=30 must be a multiple of 8, as documents are: give 24 or 32"),
    (0, 64, "context=0 must be a multiple of 8")])
def test_steps_are_whole_windows(T, batch_tokens, said):
    check_rows(32, 96)
    with pytest.raises(Mistake, match=said):
        check_rows(T, batch_tokens)


@settings(max_examples=40, deadline=None)
@given(shards=SHARDS, data=st.data())
def test_documents_that_are_not_filled_are_of_an_older_version(folder, shards, data):
    shard = data.draw(st.integers(0, len(shards) - 1))
    document = data.draw(st.integers(0, len(shards[shard]) - 1))
    shards[shard][document] += data.draw(st.sampled_from([-7, -4, -1, 1, 6]))
    write_shards(folder, shards, 5000)
    message = refusal(folder, "train", 8, 5000)
    assert "an older version prepared them; prepare the data again" in message
    assert str(sorted(folder.glob("train*.idx"))[shard]) in message


# --- prefetch -------------------------------------------------------------------------------------

def wait_until(condition, seconds=5):
    until = time.time() + seconds
    while not condition() and time.time() < until:
        time.sleep(0.005)
    assert condition()


def other_threads(before):
    return [t for t in threading.enumerate() if t not in before]


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 5), n=st.integers(0, 12), ahead=st.integers(1, 4))
def test_prefetch_yields_every_step_in_order_and_its_thread_ends(start, n, ahead):
    before = threading.enumerate()
    squares = list(prefetch(lambda step: step * step, start, start + n, ahead))
    assert squares == [step * step for step in range(start, start + n)]
    wait_until(lambda: not other_threads(before))


@pytest.mark.parametrize("failing", [0, 3])
@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, MemoryError])
def test_prefetch_raises_the_error_of_a_step_in_its_place(failing, kind):
    def make(step):
        if step == failing:
            raise kind("this one")
        return step

    def consume():
        try:
            for item in prefetch(make, 0, 10):
                seen.append(item)
        except kind as error:
            seen.append(error)

    before, seen = threading.enumerate(), []
    # in a thread of its own: an error that got lost would hang the tests
    threading.Thread(target=consume, daemon=True).start()
    wait_until(lambda: not other_threads(before))
    assert seen[:-1] == list(range(failing)) and seen[-1].args == ("this one",)


def test_prefetch_makes_ahead_in_another_thread_but_not_without_end():
    made = []

    def make(step):
        made.append((step, threading.current_thread()))

    steps = prefetch(make, 0, 1000, ahead=3)
    next(steps)
    wait_until(lambda: len(made) >= 4)
    time.sleep(0.05)
    assert [s for s, _ in made] == list(range(len(made)))
    assert len(made) <= 5  # one taken, three ready, one waiting for room
    assert threading.current_thread() not in {t for _, t in made}
    steps.close()


@pytest.mark.parametrize("leave", ["close", "break", "error"])
def test_the_thread_ends_when_the_consumer_stops_early(leave):
    before, made = threading.enumerate(), []
    steps = prefetch(made.append, 0, 10**6)
    if leave == "error":
        with pytest.raises(ZeroDivisionError):
            for _ in steps:
                raise ZeroDivisionError
        del steps
    elif leave == "break":
        for _ in steps:
            break
        del steps
    else:
        next(steps)
        steps.close()
    wait_until(lambda: not other_threads(before))
    assert len(made) < 10
