"""From files to batches: windows of T tokens over memory-mapped shards, their documents, their order, prefetch.

A folder holds train.bin (token ids) and train.idx (where its documents start), or several shards of them
(train_000.bin, train_000.idx, …); data/*/prepare.py writes them. A window is T consecutive tokens of one shard;
what stands in it is known from the offsets alone, never guessed from token values. Which window is row r of step s
is a function of (seed, s, r), so a resumed run needs no state.

Not covered: supervised rows with a prompt, infill rows, mixtures of corpora.
"""
import json
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

DATA_ORDER = 3  # the purpose of this random stream (diffusion.py has the others)


@dataclass
class Batch:
    """x0: (B, T) int64. doc_start, doc_end: (B, T) int32. maskable: (B, T) bool. epochs: (B,) int64 numpy."""
    x0: torch.Tensor
    doc_start: torch.Tensor
    doc_end: torch.Tensor
    maskable: torch.Tensor
    epochs: np.ndarray


class Windows:
    """All windows of T tokens of one split of a data folder.

    folder: where prepare.py wrote. split: 'train' or 'val'. T: tokens a window.
    cross_document: a window is one document, as Stable-DiffCoder packs; False: its documents do not see each other.
    Raises FileNotFoundError or ValueError, in a sentence, for a missing, damaged or too small folder.
    """

    def __init__(self, folder, split, T, vocab_size, cross_document=False):
        if T < 2:
            raise ValueError(f"context={T} must be 2 or more: a window's first token is never predicted")
        paths = sorted(Path(folder).glob(f"{split}*.bin"))
        if not paths:
            raise FileNotFoundError(f"no {split}*.bin in {folder}; `python -m data.stdlib.prepare --out={folder}` "
                                    "makes a folder of data")
        dtype = token_dtype(folder, vocab_size)
        self.T, self.cross_document = T, cross_document
        for p in paths:
            if p.stat().st_size == 0 or p.stat().st_size % np.dtype(dtype).itemsize:
                raise ValueError(f"{p} is empty or was cut within a token: prepare the data again")
        self.tokens = [np.memmap(p, dtype, "r") for p in paths]
        self.offsets = [read_offsets(p.with_suffix(".idx"), tokens) for p, tokens in zip(paths, self.tokens)]
        self.ends = np.cumsum([len(t) // T for t in self.tokens])  # windows in the shards up to and with each
        if len(self) == 0:
            raise ValueError(f"context={T} is longer than every {split} shard of {folder} "
                             f"(at most {max(map(len, self.tokens)):,} tokens)")

    def __len__(self):
        return int(self.ends[-1])

    def window(self, w):
        """Window w: its tokens and the bounds of each token's document in it, all (T,) int64."""
        shard = int(np.searchsorted(self.ends, w, "right"))
        start = (w - (self.ends[shard - 1] if shard else 0)) * self.T
        tokens = self.tokens[shard][start:start + self.T].astype(np.int64)
        if self.cross_document:
            return tokens, np.zeros(self.T, np.int64), np.full(self.T, self.T)
        offsets, i = self.offsets[shard], np.arange(start, start + self.T)
        document = np.searchsorted(offsets, i, "right")  # offsets[document - 1] <= i < offsets[document]
        return (tokens, np.maximum(offsets[document - 1] - start, 0),  # a leading fragment starts with the window
                np.minimum(offsets[document] - start, self.T))

    def batch(self, chosen, epochs=None):
        """The windows of these numbers as a Batch. The first token of a document, or of a fragment, is not maskable."""
        x0, doc_start, doc_end = (np.stack(a) for a in zip(*map(self.window, chosen)))
        return Batch(torch.from_numpy(x0), torch.from_numpy(doc_start.astype(np.int32)),
                     torch.from_numpy(doc_end.astype(np.int32)), torch.from_numpy(np.arange(self.T) != doc_start),
                     np.zeros(len(x0), np.int64) if epochs is None else epochs)

    def at_step(self, seed, step, batch_rows, rows=None):
        """The batch of a step: every epoch is a permutation of all windows of its own, drawn from (seed, epoch).

        batch_rows: rows of the global batch. rows: the ones wanted; None: all of them.
        """
        row = np.arange(batch_rows) if rows is None else np.asarray(rows)
        epochs, places = np.divmod(step * batch_rows + row, len(self))
        chosen = [self.order(seed, int(e))[p] for e, p in zip(epochs, places)]
        return self.batch(chosen, epochs)

    def order(self, seed, epoch):
        """The permutation of an epoch, kept until another is asked for."""
        if getattr(self, "kept", (None,))[0] != (seed, epoch):
            draw = np.random.Generator(np.random.Philox(key=[seed, DATA_ORDER], counter=[0, 0, 0, epoch]))
            self.kept = (seed, epoch), draw.permutation(len(self))
        return self.kept[1]

    def spread(self, count):
        """The numbers of `count` windows spread evenly over the split, fewer if there are fewer: for evaluation."""
        return np.unique(np.linspace(0, len(self) - 1, count).astype(int))


def token_dtype(folder, vocab_size):
    """uint16 or uint32, as prepare.py chose by its vocabulary, which must be within the model's."""
    meta = Path(folder) / "meta.json"
    if not meta.is_file():
        raise FileNotFoundError(f"no meta.json in {folder}: its preparation did not finish; run it again")
    try:
        prepared = json.loads(meta.read_text())["vocab_size"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{meta} is damaged ({error!r}): prepare the data again") from error
    if prepared > vocab_size:  # a model may have a <mask> that the data has not
        raise ValueError(f"{folder} was prepared with a vocabulary of {prepared}, the model has one of {vocab_size}")
    return np.uint16 if prepared <= 2**16 else np.uint32


def read_offsets(path, tokens):
    """(documents + 1,) int64, checked against the shard it belongs to."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path} beside its .bin; prepare the data again")
    offsets = np.fromfile(path, np.int64)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) <= 0).any():
        raise ValueError(f"{path} does not fit its .bin of {len(tokens):,} tokens: one was cut short; "
                         "delete both and prepare the data again")
    return offsets


def prefetch(make, first, last, ahead=2):
    """make(step) for first <= step < last, computed by a thread that stays `ahead` steps before the consumer.

    An exception in `make` is raised here, in its place. Leaving the loop early ends the thread.
    """
    ready, stop = queue.Queue(ahead), threading.Event()

    def put(item):
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        for step in range(first, last):
            try:
                put((make(step), None))
            except BaseException as error:
                return put((None, error))
            if stop.is_set():
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(first, last):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
