"""From files to batches: windows of T tokens over memory-mapped shards, their order, prefetch.

A folder holds train.bin (token ids) and train.idx (where its documents start), or several shards of
them (train_000.bin, train_000.idx, …); data/*/prepare.py writes them. A window is T consecutive
tokens of one shard. Its documents are known from the offsets alone, never guessed from token
values. Which window is row r of step s is a function of (seed, s, r), so a resumed run needs no
state. So is which of its documents are rearranged for filling in the middle.

Documents and windows are multiples of 8 tokens long, so no block of 2, 4 or 8 is ever cut.
`tokenizer.document_of` says why that matters.

Not covered: rows of prompts with answers (sft.py), mixtures of corpora.
"""
import hashlib
import json
import queue
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from configurator import Mistake, shortened
from diffusion import stream
from files import read_json
from tokenizer import MULTIPLE, dtype_for, fim_prompt

DATA_ORDER, FIM = 3, 4  # purposes of random streams (diffusion.py has the others)
FIM_LEAST = 8  # tokens of text: shorter documents are not rearranged


@dataclass
class Batch:
    """B windows of T tokens."""
    x0: torch.Tensor  # (B, T) int64
    doc_start: torch.Tensor  # (B, T) int32: where each token's document starts in the window
    doc_end: torch.Tensor  # (B, T) int32: and where it ends
    maskable: torch.Tensor  # (B, T) bool: what is learned; not the first token of a document
    epochs: np.ndarray  # (B,) int64: the epoch of each row, from 0

    def select(self, rows):
        """Copies of these rows, a list of numbers."""
        return Batch(**{name: x[rows] for name, x in vars(self).items()})


class Windows:
    """All windows of T tokens of one split of a data folder.

    folder: where prepare.py wrote. split: 'train' or 'val'. T: tokens per window.
    vocab_size: of the model, at least that of the data.
    cross_document: a window is one document, as in Stable-DiffCoder's packing. False: documents do
        not see each other.
    fim_rate: share of the documents that `at_step` rearranges, with the tokens of `tok`.
    Raises Mistake for a missing, damaged or too small folder, and a T that is not a multiple of 8.
    """

    def __init__(self, folder, split, T, vocab_size, cross_document=False, fim_rate=0.0, tok=None):
        check_window(T)
        self.folder, self.T, self.vocab_size = folder, T, vocab_size
        self.cross_document = cross_document
        self.fim_rate, self.tok = fim_rate, tok
        self.tokens, self.offsets = open_shards(folder, split, vocab_size)
        counts = [len(tokens) // T for tokens in self.tokens]
        self.ends = np.cumsum(counts)  # (shards,): windows in each shard and all before it
        if len(self) == 0:
            longest = max(len(tokens) for tokens in self.tokens)
            raise Mistake(f"context={T} is longer than every {split} shard of {folder} "
                          f"(at most {longest:,} tokens)")

    def __len__(self):
        return int(self.ends[-1])

    def place(self, number):
        """Where a window begins: its shard's number, and the token there."""
        shard = int(np.searchsorted(self.ends, number, "right"))
        windows_before = 0 if shard == 0 else self.ends[shard - 1]
        return shard, int(number - windows_before) * self.T

    def bounds(self, number):
        """Where the documents of a window begin in it, and T: (documents + 1,) int64.

        A document that began in the window before begins at 0.
        """
        shard, start = self.place(number)
        offsets = self.offsets[shard]
        first = np.searchsorted(offsets, start, "right")
        last = np.searchsorted(offsets, start + self.T)
        return np.concatenate([[0], offsets[first:last] - start, [self.T]])

    def window(self, number):
        """One window: its tokens, and where each token's document starts and ends in it.

        Returns three (T,) int64 arrays.
        """
        shard, start = self.place(number)
        tokens = self.tokens[shard][start:start + self.T].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise Mistake(f"{self.folder} is damaged: it holds token {tokens.max()}, and its "
                          f"tokenizer has {self.vocab_size} ids; prepare the data again")
        if self.cross_document:
            return tokens, np.zeros(self.T, np.int64), np.full(self.T, self.T)
        bounds = self.bounds(number)
        lengths = np.diff(bounds)
        return tokens, np.repeat(bounds[:-1], lengths), np.repeat(bounds[1:], lengths)

    def batch(self, numbers, epochs=None):
        """The windows of these numbers as a Batch. epochs: (B,) int64; None: 0 for each."""
        windows = [self.window(number) for number in numbers]
        x0, doc_start, doc_end = (np.stack(arrays) for arrays in zip(*windows))  # (B, T) each
        if epochs is None:
            epochs = np.zeros(len(x0), np.int64)
        maskable = np.arange(self.T) != doc_start  # (B, T)
        return Batch(x0=torch.from_numpy(x0),
                     doc_start=torch.from_numpy(doc_start.astype(np.int32)),
                     doc_end=torch.from_numpy(doc_end.astype(np.int32)),
                     maskable=torch.from_numpy(maskable),
                     epochs=epochs)

    def at_step(self, seed, step, batch_rows, rows=None):
        """The Batch of a training step. Every epoch visits all windows in its own random order.

        batch_rows: rows of the global batch. rows: the ones wanted; None: all of them.
        """
        rows, epochs, numbers = rows_at_step(seed, step, batch_rows, rows, len(self))
        batch = self.batch(numbers, epochs)
        if self.fim_rate > 0:
            for x0, number, row in zip(batch.x0.numpy(), numbers, rows):
                self.rearrange(x0, number, stream(seed, FIM, step, row))
        return batch

    def rearrange(self, x0, number, random):
        """Rearrange a share `fim_rate` of a window's documents, in place.

        x0: (T,) the window's tokens. random: a generator. A document's draws depend on its place in
        the window, not on the other documents.
        """
        draws = random.random((self.T // MULTIPLE, 3))  # whether, and two cuts
        bounds = self.bounds(number).tolist()
        for start, end in zip(bounds, bounds[1:]):
            chance, *cuts = draws[start // MULTIPLE]
            if chance < self.fim_rate:
                x0[start:end] = rearranged(x0[start:end].tolist(), self.tok, cuts)

    def spread(self, count):
        """The numbers of `count` windows, or all if there are fewer, spread evenly over the split.

        For evaluation.
        """
        return spread_evenly(count, len(self))


def rows_at_step(seed, step, batch_rows, rows, total):
    """What a training step reads of `total` windows: rows, epochs and the windows' numbers.

    batch_rows, rows: as in Windows.at_step. Returns two (B,) int64 arrays and a list of B ints.
    """
    rows = np.arange(batch_rows) if rows is None else np.asarray(rows)
    epochs, places = np.divmod(step * batch_rows + rows, total)  # (B,) each
    numbers = [epoch_order(seed, int(e), total)[place] for e, place in zip(epochs, places)]
    return rows, epochs, numbers


def spread_evenly(count, total):
    """`count` numbers from 0 to total - 1, or all if there are fewer, rising, spread evenly."""
    return np.unique(np.linspace(0, total - 1, count).astype(int))


@lru_cache(maxsize=1)
def epoch_order(seed, epoch, rows):
    """The order in which an epoch visits `rows` rows, a permutation (rows,) int64."""
    key = np.array([seed, DATA_ORDER], np.uint64)  # a list would round seeds from 2^63 on
    draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, epoch]))
    return draw.permutation(rows)


def check_rows(T, batch_tokens, pairs=False):
    """Raise Mistake for steps of `batch_tokens` tokens that are not whole windows of T tokens.

    pairs: they come in pairs (diffusion.Draw.of).
    """
    check_window(T)
    if batch_tokens % T:
        near = max(1, round(batch_tokens / T)) * T
        raise Mistake(f"batch_tokens={batch_tokens} must be a multiple of context={T}, such as "
                      f"{near}")
    if pairs and batch_tokens // T % 2:
        raise Mistake(f"complementary=true needs an even number of rows per step, not "
                      f"batch_tokens / context = {batch_tokens // T}")


def check_window(T):
    """Raise Mistake for a number of tokens per window that would cut blocks."""
    if T > 0 and T % MULTIPLE == 0:
        return
    below = max(T, 0) // MULTIPLE * MULTIPLE
    near = f"{below} or {below + MULTIPLE}" if below else f"{MULTIPLE}"
    raise Mistake(f"context={T} must be a multiple of {MULTIPLE}, as documents are: give {near}")


def rearranged(document, tok, cuts):
    """A document for filling in the middle, as long as it was: fim_prompt, the middle, <eos>.

    The three tokens that fim_prompt adds take the place of <eos>, of which one stays. Where these
    are too few, and where the window cut the document before its <eos>, the end of the text makes
    room: at most 4 tokens, dropped before the places are chosen. Texts shorter than FIM_LEAST
    tokens stay as they are.
    document: list of int; one that began in the window before has no <bos>. cuts: two numbers in
    [0, 1), for two places among those before, between and after the text's tokens, also within a
    word. Returns a list of int.
    """
    begin, end = 0, len(document)
    if document[0] == tok.bos_id:
        begin = 1
    while end > begin and document[end - 1] == tok.eos_id and len(document) - end < MULTIPLE:
        end -= 1
    if end - begin < FIM_LEAST:
        return document
    text = document[begin:min(end, len(document) - 4)]
    first, second = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    ids = fim_prompt(tok, text[:first], text[second:]) + text[first:second]
    if begin == 0 and tok.bos_id is not None:
        ids = ids[1:]
    return ids + [tok.eos_id] * (len(document) - len(ids))


# --- the files of a folder ------------------------------------------------------------------------

def open_shards(folder, split, vocab_size, multiple=MULTIPLE):
    """The shards of a split, checked: a list of their tokens and a list of their offsets.

    multiple: of what documents' lengths are multiples.

    tokens: (n,) uint16 or uint32, memory-mapped. offsets: (documents + 1,) int64.
    """
    paths = sorted(Path(folder).glob(f"{split}*.bin"))
    if not paths:
        raise Mistake(f"no {split}*.bin in {folder}; "
                      f"`python -m data.stdlib.prepare --out={folder}` makes a folder of data")
    dtype = token_dtype(folder, vocab_size)
    all_tokens, all_offsets = [], []
    for path in paths:
        size = path.stat().st_size
        if size == 0 or size % np.dtype(dtype).itemsize:
            raise Mistake(f"{path} is empty or was cut within a token: prepare the data again")
        tokens = np.memmap(path, dtype, "r")
        all_tokens.append(tokens)
        all_offsets.append(read_offsets(path.with_suffix(".idx"), tokens, multiple))
    return all_tokens, all_offsets


def token_dtype(folder, vocab_size):
    """uint16 or uint32, as prepare.py chose by its vocabulary, which must be within the model's."""
    prepared = read_meta(folder).get("vocab_size")
    if type(prepared) is not int or not 1 <= prepared <= 2**31:
        raise Mistake(f"{folder}/meta.json is damaged: its vocab_size is {shortened(prepared)}, "
                      "not an int from 1 to 2^31; prepare the data again")
    if prepared > vocab_size:  # a smaller one is fine: a model may have added a <mask>
        raise Mistake(f"{folder} was prepared with a vocabulary of {prepared}, "
                      f"the model has one of {vocab_size}")
    return dtype_for(prepared)


def read_meta(folder):
    """What prepare.py wrote last, a dict."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise Mistake(f"no meta.json in {folder}: nothing was prepared there, or its preparation "
                      f"did not finish; `python -m data.stdlib.prepare --out={folder}`, or another "
                      "prepare.py of data/, prepares it")
    return read_json(path)


def read_offsets(path, tokens, multiple):
    """(documents + 1,) int64, checked against the shard that it belongs to."""
    if not path.is_file():
        raise Mistake(f"no {path} next to its .bin; prepare the data again")
    offsets = np.fromfile(path, np.int64)
    fits = len(offsets) >= 2 and offsets[0] == 0 and offsets[-1] == len(tokens)
    if not fits or (np.diff(offsets) <= 0).any():
        raise Mistake(f"{path} does not fit its .bin of {len(tokens):,} tokens: one was cut short; "
                      "delete both and prepare the data again")
    if (offsets % multiple).any():
        raise Mistake(f"{path} has documents that are not filled with <eos> to a multiple of "
                      f"{multiple} tokens: an older version prepared them; prepare the data again")
    return offsets


END_BYTES = 4096  # of a .bin that a fingerprint reads at its beginning and at its end


def fingerprint(folder):
    """A short digest of what a prepared folder holds, the same wherever the folder lies.

    It covers the names and sizes of the shards, their offsets, the beginning and end of their
    tokens, the tokenizer, and meta.json except for the folders that it names. It does not read all
    tokens, so it takes seconds even for a large corpus. Returns 16 hexadecimal digits.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    meta = read_meta(folder)
    for key in ("out", "source", "tokenizer"):  # names of folders
        meta.pop(key, None)
    digest.update(json.dumps(meta, sort_keys=True).encode())
    paths = [*folder.glob("*.bin"), *folder.glob("*.scored"), *folder.glob("*.idx"),
             *folder.glob("tokenizer*.json")]
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            if path.suffix in (".bin", ".scored"):
                digest.update(file.read(END_BYTES))
                file.seek(max(0, size - END_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


# --- ahead of time --------------------------------------------------------------------------------

def prefetch(make, start, end, ahead=2):
    """make(step) for start <= step < end, computed by a thread up to `ahead` steps in advance.

    An exception in `make` is raised here, at its step. Leaving the loop early ends the thread.
    """
    ready, stopped = queue.Queue(ahead), threading.Event()

    def put(item):
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        for step in range(start, end):
            try:
                put((make(step), None))
            except BaseException as error:
                return put((None, error))
            if stopped.is_set():
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(start, end):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
