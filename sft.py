"""Supervised fine-tuning: from prompts and their answers to rows of which only answers are scored.

    python train.py config/toy_sft.py                # train on data/functions/train.jsonl
    python train.py config/toy_sft.py --show_row=0   # look at a row, its scored tokens marked

A line of a .jsonl file is one sample: {"prompt": …, "completion": …}, or {"messages": [{"role": …,
"content": …}, …]}, which the model's chat template writes. Tokens of the prompt are context: never
masked, never scored. A sample ends with <eos>; several share a row of T tokens and do not see each
other. Rows are Batches, as loader.Windows makes them, so the training loop does not know the
difference.

A folder with train.scored beside train.bin holds samples that are tokens already, for corpora too
large to be read anew at each start (`write`; data/opencoder/prepare.py).

Not covered: chats with tools, weights of samples, mixtures of files.
"""
import hashlib
import sys
from bisect import bisect_left, insort
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import loader
from configurator import Mistake, shortened, visible
from diffusion import stream
from files import read_json_lines, replacing
from loader import Batch, check_window, open_shards, rows_at_step, spread_evenly
from templates import parts_of_chat
from tokenizer import MULTIPLE, check_unicode, dtype_for
from watch import is_live

FILLING = 5  # purpose of a random stream (diffusion.py, loader.py have others)
MOST_EOS = 4  # <eos> after a sample under cross_document, at most (Stable-DiffCoder)
CHUNK = 1000  # samples that are encoded at once, on all cores


# --- from a line to tokens ------------------------------------------------------------------------

def pieces_of(where, record, tok):
    """A sample as a list of (text, scored), and whether its texts hold special tokens.

    where: the line, for messages. record: a dict. Raises Mistake for a record without a prompt and
    a completion, or messages; both must be texts.
    """
    try:
        if "messages" in record:
            if "prompt" in record:
                raise Mistake('it has a "prompt" and "messages": which of them is meant?')
            return parts_of_chat(record["messages"], tok), True
        answer = "completion"
        if answer not in record and "canonical_solution" in record:  # a task of HumanEval's schema
            answer = "canonical_solution"
        for name in ("prompt", answer):
            if not isinstance(record.get(name), str):
                raise Mistake('it must have a "prompt" and a "completion", both texts, or a list '
                              f'of "messages"; its {name} is {shortened(record.get(name))}')
            check_unicode(record[name])
        if not record[answer]:
            raise Mistake(f"its {answer} is empty: leave the line out, or write what the model is "
                          "to answer")
    except Mistake as error:
        raise Mistake(f"{where}: {error}") from error
    return [(record["prompt"], False), (record[answer], True)], False


def encode(samples, tok):
    """Tokens of samples: lists of (ids, scored), both numpy, (length,) integers and bool.

    A prompt and its completion are encoded apart, as they are when the model is asked. samples:
    list of (pieces, whether they hold special tokens), as `pieces_of` returns.
    """
    texts = {True: [], False: []}
    for pieces, special in samples:
        texts[special] += [text for text, _ in pieces]
    ids = {True: iter(tok.encode_rendered(texts[True])),
           False: iter(tok.encode_batch(texts[False]))}
    dtype = dtype_for(tok.vocab_size)
    encoded = []
    for pieces, special in samples:
        bos = []
        if tok.bos_id is not None and not special:  # a template writes its own
            bos = [tok.bos_id]
        tokens, scored = list(bos), [False] * len(bos)
        for _, is_scored in pieces:
            part = next(ids[special])
            tokens += part
            scored += [is_scored] * len(part)
        encoded.append((np.array(tokens, dtype), np.array(scored, bool)))
    return encoded


def read(path, tok, quiet=False):
    """The samples of a .jsonl file, encoded: a generator of (ids, scored, question).

    question: str, the text that is not scored. quiet: print nothing. Raises Mistake, with the
    number of the line, for what is no sample.
    """
    lines = read_json_lines(path)
    count = partly = 0
    with tqdm(desc=f"reading {path}", unit=" samples", disable=quiet, leave=False) as bar:
        while chunk := list(islice(lines, CHUNK)):
            samples = [pieces_of(where, record, tok) for where, record in chunk]
            encoded = encode(samples, tok)
            for (where, record), (pieces, _), (ids, scored) in zip(chunk, samples, encoded):
                if not scored.any():
                    raise Mistake(f"{where}: the tokenizer in {tok.folder} makes no token of its "
                                  "completion")
                partly += is_partly_scored(record, pieces)
                yield ids, scored, "".join(text for text, is_scored in pieces if not is_scored)
            count += len(chunk)
            bar.update(len(chunk))
    if count == 0:
        raise Mistake(f"{path} is empty: write a sample on each line")
    if partly and not quiet:
        print(f"{path}: {partly:,} of {count:,} samples have answers that are not scored: the chat "
              "template writes them differently once others follow")


def is_partly_scored(record, pieces):
    """Whether a sample is a conversation with an answer that is context: see parts_of_chat."""
    roles = [message["role"] for message in record.get("messages", [])]
    return roles.count("assistant") > sum(scored for _, scored in pieces)


@dataclass
class Store:
    """Samples one after another. tokens, scored: (n,); offsets: (samples + 1,) int64."""
    tokens: np.ndarray
    scored: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, samples):
        """samples: list of (ids, scored, question), at least one."""
        lengths = [len(ids) for ids, _, _ in samples]
        return cls(tokens=np.concatenate([ids for ids, _, _ in samples]),
                   scored=np.concatenate([scored for _, scored, _ in samples]),
                   offsets=np.cumsum([0, *lengths]))

    @classmethod
    def open(cls, folder, split, vocab_size):
        """The samples that `write` wrote, memory-mapped."""
        all_tokens, all_offsets = open_shards(folder, split, vocab_size, multiple=1)
        path = Path(folder) / f"{split}.scored"
        if len(all_tokens) > 1 or not path.is_file() or path.stat().st_size != len(all_tokens[0]):
            raise Mistake(f"{path} does not fit the {split}*.bin beside it: prepare the data again")
        return cls(all_tokens[0], np.memmap(path, np.uint8, "r"), all_offsets[0])

    def __len__(self):
        return len(self.offsets) - 1

    def sample(self, number):
        """(ids, scored) of one sample."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        return self.tokens[part], self.scored[part] != 0


def write(folder, split, samples):
    """Write samples to a folder as they come: <split>.bin, <split>.scored, <split>.idx.

    samples: iterable of (ids, scored, question). Returns how many there were.
    """
    offsets = [0]
    folder = Path(folder)
    with (replacing(folder / f"{split}.bin") as bin_file,
          replacing(folder / f"{split}.scored") as scored_file):
        for ids, scored, _ in samples:
            ids.tofile(bin_file)
            scored.tofile(scored_file)
            offsets.append(offsets[-1] + len(ids))
    with replacing(folder / f"{split}.idx") as file:
        np.array(offsets, np.int64).tofile(file)
    return len(offsets) - 1


# --- from samples to rows -------------------------------------------------------------------------

def pack(lengths, T):
    """Which samples share a row of T tokens: best-fit decreasing.

    Each sample, the longest first, goes to the row with the least room that still holds it.
    lengths: (N,) integers, at most T. Returns (N,) int64, the row of each sample.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows = 0
    with_room = [[] for _ in range(T + 1)]  # with_room[k]: the rows that have room for k tokens
    rooms = []  # the k whose with_room is not empty, rising
    for number in np.argsort(-lengths, kind="stable"):
        place = bisect_left(rooms, lengths[number])
        if place == len(rooms):  # no row has room
            room, row = T, rows
            rows += 1
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        row_of[number] = row
        room -= int(lengths[number])
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(row)
    return row_of


class Samples:
    """Rows of T tokens that hold samples: what loader.Windows is for documents.

    store: a Store. tok: a Tokenizer.
    cross_document: the samples of a row see each other, and 1 to 4 <eos> follow each, drawn anew
        each time (Stable-DiffCoder). False: <eos> fills a sample to a multiple of 8 tokens, and
        samples do not see each other.
    canvas: under `bidirectional` a completion is written onto a canvas of masks, so its <eos> must
        not tell where it ends: they fill it to a length drawn uniformly, up to this many tokens.
        0: none is drawn.
    condition_epochs: how long the share of the prompt that is context grows from 0 to 1; the rest
        is masked and scored like the completion (CoDA). 0: all of it, always.
    too_long: how many samples were left out because a row does not hold them.
    Which samples share a row is decided once, with room for the most <eos> that can be drawn.
    """

    def __init__(self, store, T, tok, cross_document=False, canvas=0, condition_epochs=0.0):
        check_window(T)
        if tok.eos_id is None:
            raise Mistake(f"the tokenizer in {tok.folder} has no eos_token, which ends each sample")
        self.store, self.T, self.tok = store, T, tok
        self.cross_document, self.canvas = cross_document, canvas
        self.condition_epochs = condition_epochs
        self.least, self.most = self.filled()
        fitting = np.flatnonzero(self.most <= T)
        self.too_long = len(store) - len(fitting)
        if len(fitting) == 0:
            raise Mistake(f"context={T} is too short: with its <eos>, the shortest sample takes "
                          f"{self.most.min():,} tokens")
        row_of = pack(self.most[fitting], T)
        by_row = np.argsort(row_of, kind="stable")
        self.numbers = fitting[by_row]  # (samples that fit,): row by row
        self.starts = np.searchsorted(row_of[by_row], np.arange(row_of.max() + 2))  # (rows + 1,)

    def __len__(self):
        return len(self.starts) - 1

    def filled(self):
        """The fewest and the most tokens of each sample with its <eos>: (samples,) int64 each."""
        lengths = np.diff(self.store.offsets)
        if self.cross_document:
            return lengths + 1, lengths + MOST_EOS
        if not self.canvas:
            filled = (lengths // MULTIPLE + 1) * MULTIPLE
            return filled, filled
        least = lengths + 1
        prompts = [prompt_length(self.store.sample(i)[1]) for i in range(len(lengths))]
        return least, np.maximum(least, np.minimum(self.T, np.array(prompts) + self.canvas))

    def row(self, number, random, share=1):
        """One row: tokens, where each token's document starts and ends, whether it is maskable.

        random: the generator of its draws. share: the part of each prompt that is context, from
        the left. What is left of the row is a document of its own, of which nothing is scored.
        Returns three (T,) int64 arrays and a (T,) bool array.
        """
        rest = self.tok.pad_id
        if rest is None:
            rest = self.tok.eos_id
        x0 = np.full(self.T, rest)
        doc_start, doc_end = np.zeros(self.T, np.int64), np.full(self.T, self.T)
        maskable = np.zeros(self.T, bool)
        start = 0
        samples = self.numbers[self.starts[number]:self.starts[number + 1]]
        for sample in random.permutation(samples):
            ids, scored = self.store.sample(sample)
            if ids.max() >= self.tok.vocab_size:
                raise Mistake(f"the samples are damaged: they hold token {ids.max()}, and their "
                              f"tokenizer has {self.tok.vocab_size} ids; prepare the data again")
            free = self.most[sample] - self.least[sample] + 1
            end = start + self.least[sample] + int(random.random() * free)
            text_end = start + len(ids)
            x0[start:text_end] = ids
            x0[text_end:end] = self.tok.eos_id
            maskable[start:text_end] = scored | ~context(scored, share)
            maskable[text_end:end] = True
            maskable[start] = False  # nothing comes before it
            doc_start[start:end], doc_end[start:end] = start, end
            start = end
        doc_start[start:] = start
        if self.cross_document:
            doc_start[:start], doc_end[:start] = 0, start
        return x0, doc_start, doc_end, maskable

    def batch(self, numbers, epochs=None, draws=None, share=1):
        """The rows of these numbers as a Batch.

        epochs: (B,) int64; None: 0 for each. draws: (B,) generators; None: the same each time.
        """
        if epochs is None:
            epochs = np.zeros(len(numbers), np.int64)
        if draws is None:
            draws = [stream(0, FILLING, 0, number) for number in numbers]
        rows = [self.row(number, random, share) for number, random in zip(numbers, draws)]
        x0, doc_start, doc_end, maskable = (np.stack(arrays) for arrays in zip(*rows))  # (B, T)
        return Batch(x0=torch.from_numpy(x0.astype(np.int64)),
                     doc_start=torch.from_numpy(doc_start.astype(np.int32)),
                     doc_end=torch.from_numpy(doc_end.astype(np.int32)),
                     maskable=torch.from_numpy(maskable),
                     epochs=epochs)

    def at_step(self, seed, step, batch_rows, rows=None):
        """The Batch of a training step, as loader.Windows.at_step returns it."""
        rows, epochs, numbers = rows_at_step(seed, step, batch_rows, rows, len(self))
        draws = [stream(seed, FILLING, step, row) for row in rows]
        return self.batch(numbers, epochs, draws, self.share(step, batch_rows))

    def share(self, step, batch_rows):
        """The part of each prompt that is context at a step (CoDA's progressive conditioning).

        Exact, a Fraction: a float's rounding would cost a token.
        """
        rows = Fraction(str(self.condition_epochs)) * len(self)  # in which it grows
        if step * batch_rows >= rows:
            return 1
        return Fraction(step * batch_rows) / rows

    def spread(self, count):
        """The numbers of `count` rows, or all if there are fewer, spread evenly over the split."""
        return spread_evenly(count, len(self))

    def in_words(self):
        """How many samples and rows there are, how full these are, and what was left out."""
        tokens = np.diff(self.store.offsets)[self.numbers].sum()
        words = (f"{len(self.numbers):,} samples in {len(self):,} rows of {self.T} tokens, "
                 f"{tokens / len(self) / self.T:.0%} of them text")
        if self.too_long:
            words += f"; {self.too_long:,} samples are longer than that and were left out"
        return words


def prompt_length(scored):
    """Tokens before a sample's last completion. scored: (n,) bool."""
    not_scored = np.flatnonzero(~scored)
    if len(not_scored) == 0:
        return 0
    return not_scored[-1] + 1


def context(scored, share):
    """Which tokens of a sample are context: the first `share` of those that are not scored.

    scored: (n,) bool. share: 1, or a Fraction below it. Returns (n,) bool.
    """
    before = np.cumsum(~scored) - ~scored  # (n,) of the tokens to the left, those not scored
    return ~scored & (before < int(share * int(np.count_nonzero(~scored))))


# --- the data of a run ----------------------------------------------------------------------------

def is_supervised(data):
    """Whether --data names samples, and not documents: a .jsonl file, or a folder of samples."""
    return str(data).endswith(".jsonl") or (Path(data) / "train.scored").is_file()


def open_splits(cfg, tok, quiet=False):
    """The train and the val split of a run's data as Samples.

    cfg: train.py's settings. Without --val_data, a part of a .jsonl file is held out.
    """
    if not cfg.data.endswith(".jsonl"):
        stores = [Store.open(cfg.data, split, tok.vocab_size) for split in ("train", "val")]
    elif cfg.val_data:
        stores = [Store.of(list(read(path, tok, quiet))) for path in (cfg.data, cfg.val_data)]
    else:
        stores = map(Store.of, divide(list(read(cfg.data, tok, quiet)), cfg))
    canvas = cfg.canvas if cfg.objective == "bidirectional" else 0
    train, val = (Samples(store, cfg.context, tok, cfg.cross_document, canvas) for store in stores)
    train.condition_epochs = cfg.condition_epochs
    return train, val


def divide(samples, cfg):
    """Samples for training and for validation: two lists, neither empty."""
    train = [sample for sample in samples if not is_held_out(sample[2], cfg.val_percent)]
    val = [sample for sample in samples if is_held_out(sample[2], cfg.val_percent)]
    if not val:  # of a small file, the question with the lowest hash
        lowest = min(place_of(question) for _, _, question in samples)
        train = [sample for sample in samples if place_of(sample[2]) > lowest]
        val = [sample for sample in samples if place_of(sample[2]) == lowest]
    if not train:
        raise Mistake(f"val_percent={cfg.val_percent:g} leaves none of the {len(samples)} samples "
                      f"of {cfg.data} for training: give less, or name a file with --val_data")
    return train, val


def is_held_out(question, percent):
    """Whether a sample belongs to the val split: a hash of its question decides.

    So equal questions share a split, and adding lines moves none of the others.
    """
    return place_of(question) < percent / 100


def place_of(question):
    """A number in [0, 1), the hash of a text."""
    digest = hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fingerprint(cfg):
    """A short digest of the files that a run's samples come from, 16 hexadecimal digits."""
    if not cfg.data.endswith(".jsonl"):
        return loader.fingerprint(cfg.data)
    digest = hashlib.sha256()
    for path in filter(None, (cfg.data, cfg.val_data)):
        digest.update(b"a file\n")
        for _, record in read_json_lines(path):
            digest.update(f"{record}\n".encode("utf-8", "surrogatepass"))
    if not cfg.val_data:
        digest.update(f"{cfg.val_percent}".encode())
    return digest.hexdigest()[:16]


# --- a row to look at -----------------------------------------------------------------------------

SCORED, FILLED, CONTEXT, PLAIN = "\x1b[30;42m", "\x1b[30;46m", "\x1b[2m", "\x1b[0m"


def texts_of(batch, row, tok):
    """A row of a Batch, token by token: (position, text, is special, is scored, begins a document).

    Control characters are dots; special tokens are names in brackets.
    """
    x0, maskable = batch.x0[row].tolist(), batch.maskable[row].tolist()
    starts = batch.doc_start[row].tolist()
    for i, (token, scored) in enumerate(zip(x0, maskable)):
        special = token in tok.special_ids.values()
        text = f"[{tok.hf.id_to_token(token)}]" if special else visible(tok.decode([token]))
        yield i, text, special, scored, i == 0 or starts[i] != starts[i - 1]


def colored(batch, row, tok):
    """A row as text for a terminal: scored tokens on green, scored special tokens on blue."""
    lines = []
    for i, text, special, scored, begins in texts_of(batch, row, tok):
        if begins:
            lines.append(f"\n{PLAIN}--- document at {i}\n")
        color = CONTEXT
        if scored:
            color = FILLED if special else SCORED
        lines.append(f"{PLAIN}{color}{text}")
    return "".join(lines) + PLAIN


def bracketed(batch, row, tok):
    """A row as text for a pipe or a file: each run of scored tokens between ⟦ and ⟧."""
    lines, closing = [], ""
    for i, text, _, scored, begins in texts_of(batch, row, tok):
        if begins or not scored:
            lines.append(closing)
            closing = ""
        if begins:
            lines.append(f"\n--- document at {i}\n")
        if scored and not closing:
            text, closing = f"⟦{text}", "⟧"
        lines.append(text)
    return "".join(lines) + closing


def show_row(data, number, tok):
    """Print a row: what a model would learn from it. data: Samples, or loader.Windows.

    In color on a terminal; in a pipe, or with NO_COLOR or TERM=dumb, with brackets.
    """
    if number >= len(data):
        raise Mistake(f"show_row={number} is beyond the last row, {len(data) - 1}")
    batch = data.batch([number])
    text, legend = bracketed(batch, 0, tok), "⟦text⟧ and ⟦[special tokens]⟧"
    if is_live(sys.stdout):
        text = colored(batch, 0, tok)
        legend = f"{SCORED}text{PLAIN} and {FILLED}[special tokens]{PLAIN}"
    count = int(batch.maskable.sum())
    print(f"{text}\nrow {number}: {count} of {data.T} tokens are scored: {legend}")


def check(cfg):
    """Raise Mistake for settings of train.py that cannot go together with samples, or without."""
    if is_supervised(cfg.data):
        if cfg.fim_rate > 0:
            raise Mistake(f"fim_rate={cfg.fim_rate:g} rearranges documents, and {cfg.data} holds "
                          "prompts with answers: give --fim_rate=0")
        if cfg.val_data and not cfg.data.endswith(".jsonl"):
            raise Mistake(f"val_data={cfg.val_data} goes with a .jsonl file as --data: the folder "
                          f"{cfg.data} has a val split of its own")
    elif (cfg.val_data or cfg.condition_epochs) and (Path(cfg.data) / "train.bin").is_file():
        name = "val_data" if cfg.val_data else "condition_epochs"
        raise Mistake(f"{name}={getattr(cfg, name)} goes with samples, and data={cfg.data} is not "
                      "a .jsonl file or a folder of them")
