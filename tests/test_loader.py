"""loader.py: windows are the shards' tokens, documents are the offsets', and the order is a
function of the step."""
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import Mistake
from loader import END_BYTES, Windows, fingerprint, prefetch

DOCUMENTS = st.lists(st.integers(1, 12), min_size=1, max_size=6)  # their lengths, in one shard
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
@given(shards=SHARDS, T=st.integers(2, 9), vocab_size=st.sampled_from([300, 2**16, BIG]),
       split=st.sampled_from(["train", "val"]), cross=st.booleans(), seed=st.integers(0, 99))
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
    write_shards(folder, [[3, 5]], BIG)
    ids = [0, 1, 2**16 - 1, 2**16, 2**16 + 4, 7, 8, 9]
    np.array(ids, np.uint32).tofile(folder / "train.bin")
    x0 = Windows(folder, "train", 4, BIG).batch([0, 1]).x0
    assert x0.tolist() == [[0, 1, 65535, 65536], [65540, 7, 8, 9]]


@settings(max_examples=60, deadline=None)
@given(shards=SHARDS, T=st.integers(2, 4), rows=st.integers(1, 7), seed=st.integers(0, 2**40),
       data=st.data())
def test_every_epoch_visits_every_window_once_and_a_step_depends_on_seed_step_and_rows_alone(
        folder, shards, T, rows, seed, data):
    shards = [[T, *lengths] for lengths in shards]  # at least a window each
    arrays = write_shards(folder, shards, 300)  # tokens count up, so the first one is unique
    windows = Windows(folder, "train", T, 300)
    n = len(windows)
    steps = [windows.at_step(seed, s, rows) for s in range(-(-3 * n // rows))]
    visited = torch.cat([b.x0[:, 0] for b in steps])[:3 * n].view(3, n)  # an epoch per row
    starts = [int(a[i]) for a in arrays for i in range(0, len(a) - T + 1, T)]
    assert visited.sort(1).values.tolist() == [starts] * 3
    epochs = np.concatenate([b.epochs for b in steps])[:3 * n]
    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    step = data.draw(st.integers(0, len(steps) - 1))
    subset = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows))
    other_process = Windows(folder, "train", T, 300)  # it saw no step before
    part = other_process.at_step(seed, step, rows, subset)
    for name in ("x0", "doc_start", "doc_end", "maskable"):
        assert torch.equal(getattr(part, name), getattr(steps[step], name)[subset])
    assert part.epochs.tolist() == steps[step].epochs[subset].tolist()


def test_the_order_differs_by_epoch_and_by_seed_and_is_not_the_files(folder):
    write_shards(folder, [[200]], 300)
    windows = Windows(folder, "train", 2, 300)
    orders = {tuple(windows.order(seed, epoch)) for seed in (0, 1, 2**33) for epoch in (0, 1, 2)}
    assert len(orders) == 9 and tuple(range(100)) not in orders
    assert np.array_equal(windows.order(1, 2), Windows(folder, "train", 2, 300).order(1, 2))


def test_the_order_of_a_seed_stays_the_same_over_versions_of_this_file(folder):
    write_shards(folder, [[20]], 300)
    windows = Windows(folder, "train", 2, 300)
    assert windows.order(1337, 0).tolist() == [1, 0, 8, 2, 3, 7, 6, 5, 4, 9]
    assert windows.order(2**62, 3).tolist() == [6, 8, 7, 1, 5, 2, 0, 3, 9, 4]


@pytest.mark.parametrize("seed", [2**63, 2**64 - 2])
def test_neighboring_seeds_have_different_orders_however_large_they_are(folder, seed):
    write_shards(folder, [[200]], 300)
    windows = Windows(folder, "train", 2, 300)
    assert not np.array_equal(windows.order(seed, 0), windows.order(seed + 1, 0))


def test_what_stands_at_a_step_far_away_needs_no_step_before_it(folder):
    write_shards(folder, [[20]], 300)
    b = Windows(folder, "train", 2, 300).at_step(7, 10**9, 3)
    assert b.epochs.tolist() == [3 * 10**9 // 10, (3 * 10**9 + 1) // 10, (3 * 10**9 + 2) // 10]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), count=st.integers(1, 50))
def test_windows_for_evaluation_are_spread_over_the_whole_split(folder, n, count):
    write_shards(folder, [[2 * n]], 300)
    numbers = Windows(folder, "train", 2, 300).spread(count)
    assert len(numbers) == len(set(numbers)) == min(n, count) and numbers[0] == 0
    assert count == 1 or numbers[-1] == n - 1
    assert count == 1 or n == 1 or np.ptp(np.diff(numbers)) <= 1


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
        message = refusal(where, split, 4, 300)
        assert f"no {split}*.bin in {where}" in message
        assert f"python -m data.stdlib.prepare --out={where}" in message


def test_an_unfinished_folder_or_a_missing_index_says_to_prepare_again(folder):
    write_shards(folder, [[8]], 300)
    (folder / "train.idx").unlink()
    assert "train.idx" in refusal(folder, "train", 4, 300)
    write_shards(folder, [[8]], 300)
    (folder / "meta.json").unlink()
    assert "no meta.json" in refusal(folder, "train", 4, 300)


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
        message = refusal(folder, "train", 2, 300)
        assert str(path.with_suffix(".idx")) in message and "cut short" in message


@pytest.mark.parametrize("size", [0, 7])
def test_a_shard_cut_to_nothing_or_within_a_token_is_noticed_and_named(folder, size):
    write_shards(folder, [[8]], 300)
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:size])
    assert "train.bin is empty or was cut" in refusal(folder, "train", 2, 300)


@pytest.mark.parametrize("offsets", [
    [0, 5, 5, 8], [0, 6, 5, 8], [1, 5, 8], [0, 9], [0], [8], [0, -1, 8]])
def test_offsets_that_cannot_be_are_refused(folder, offsets):
    write_shards(folder, [[8]], 300)
    np.array(offsets, np.int64).tofile(folder / "train.idx")
    assert "train.idx does not fit its .bin of 8 tokens" in refusal(folder, "train", 2, 300)


def test_tokens_that_the_tokenizer_does_not_have_are_named(folder):
    write_shards(folder, [[6, 6]], 300)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[7] = 300
    tokens.tofile(folder / "train.bin")
    windows = Windows(folder, "train", 4, 300)
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
    assert str(folder / "meta.json") in refusal(folder, "train", 4, 2**70)


def test_another_vocabulary_than_the_models_is_refused(folder):
    write_shards(folder, [[8]], 300)
    assert "vocabulary of 300, the model has one of 299" in refusal(folder, "train", 4, 299)
    # a larger one has new tokens; the files stay as they are
    assert len(Windows(folder, "train", 4, 2**16 + 1)) == 2


def test_a_window_longer_than_every_shard_is_refused_and_says_how_long_they_are(folder):
    write_shards(folder, [[3, 4], [9]], 300)
    assert len(Windows(folder, "train", 9, 300)) == 1
    message = refusal(folder, "train", 10, 300)
    assert "context=10 is longer than every train shard" in message and "9 tokens" in message


@pytest.mark.parametrize("T", [1, 0, -3])
def test_a_window_with_nothing_to_predict_is_refused(folder, T):
    write_shards(folder, [[8]], 300)
    assert f"context={T} must be 2 or more" in refusal(folder, "train", T, 300)


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
