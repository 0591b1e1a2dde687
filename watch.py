"""Watching a text being decoded: in the terminal, as a page with a slider, and as numbers.

    steps = decode(model, tok, recipe, texts, how)
    steps = animate(steps, texts, tok)      # draws the first text in the terminal
    trace = Trace(texts, tok)
    for step in trace.record(steps):        # both pass every step on unchanged
        write(texts, step)
    write_page("trace.html", trace)         # one file that any browser shows
    print(stats(trace))                     # speed, and how close to left to right it was

AR-ness (DiffuCoder, arXiv 2506.20639 §4): how often is what is written what AR would write?

Not covered: what the model computes inside a step; rows other than the first in the terminal.
"""
import atexit
import codecs
import html
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from configurator import visible
from files import read_text, write_text

TOP = 5  # candidates that are kept of each token
TEMPLATE = Path(__file__).parent / "assets" / "trace.html"


# --- what happened --------------------------------------------------------------------------------

@dataclass
class Written:
    """A token that a step wrote."""
    position: int
    token: int
    confidence: float  # by the decoder's measure
    probability: float  # of this token, softmax of the step's logits
    candidates: list  # [(id, probability)], the likeliest TOP, best first


@dataclass
class Moment:
    """What one step did to one text."""
    seconds: float  # since decoding began
    written: list  # of Written
    remasked: list  # of positions


def read(step, lengths):
    """A decode.Step as Python lists: {row: (list of Written, list of remasked positions)}.

    lengths: of the texts; what lies beyond only completes a last block, and is left out, as are
    rows from len(lengths) on. Waits for the device once, then copies a few numbers for each token.
    """
    changed = (step.taken | step.remasked) & (step.rows < len(lengths))[:, None]  # (b, n)
    b, n = changed.nonzero(as_tuple=True)  # (m,) each
    tokens, p = step.tokens[b, n], step.logits[b, n].softmax(-1)  # (m,), (m, vocab)
    best = p.topk(min(TOP, p.shape[-1]))
    whole = [step.rows[b], step.positions[b, n], tokens, step.taken[b, n].long(), *best.indices.T]
    real = [step.confidence[b, n].to(p.dtype), p.gather(1, tokens[:, None])[:, 0], *best.values.T]
    whole, real = torch.stack(whole, 1).tolist(), torch.stack(real, 1).tolist()
    found = {row: ([], []) for row in step.rows.tolist() if row < len(lengths)}
    for (row, position, token, taken, *ids), (sure, probability, *values) in zip(whole, real):
        written, remasked = found[row]
        if position >= lengths[row]:
            continue
        if taken:
            candidates = [(i, value) for i, value in zip(ids, values) if value > 0]
            written.append(Written(position, token, sure, probability, candidates))
        else:
            remasked.append(position)
    return found


class Trace:
    """All that was written, step by step.

    texts: what `decode` was given: lists of ids, None where masked. rows[i]: list of Moment, the
    steps that text i took part in. forwards: int, steps in all. seconds: float, until the last one.
    """

    def __init__(self, texts, tok):
        self.texts = [list(text) for text in texts]
        self.tok = tok
        self.rows = [[] for _ in texts]
        self.forwards, self.seconds = 0, 0.0
        self.began = time.perf_counter()

    def add(self, step):
        """Keep a step: its logits are read now, the next step may overwrite them."""
        found = read(step, [len(text) for text in self.texts])
        self.forwards += 1
        self.seconds = time.perf_counter() - self.began
        for row, (written, remasked) in found.items():
            self.rows[row].append(Moment(self.seconds, written, remasked))

    def record(self, steps):
        """Pass on every step of a generator, and keep it. The consumer's time is not counted."""
        self.began = time.perf_counter()
        for step in steps:
            self.add(step)
            left = time.perf_counter()
            yield step
            self.began += time.perf_counter() - left

    def moments(self, row):
        """A text's moments up to the last one that changed it: a row that is done may stay on."""
        moments = self.rows[row]
        ends = [i for i, m in enumerate(moments, 1) if m.written or m.remasked]
        return moments[:max(ends, default=0)]


def apply(ids, written, remasked):
    """Do to a list of ids what a step did."""
    for w in written:
        ids[w.position] = w.token
    for position in remasked:
        ids[position] = None


def end_of(given, ids, stop_ids):
    """Where a text ends: the place of its first stop id with nothing masked before it, or None.

    given: the ids before decoding: a stop id in the prompt ends nothing.
    """
    for place, i in enumerate(ids):
        if i is None:
            return None
        if given[place] is None and i in stop_ids:
            return place
    return None


# --- tokens as text -------------------------------------------------------------------------------

@lru_cache(2**18)
def as_utf8(data):
    """Bytes as a str, or None where they are no UTF-8 on their own."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def spelled(tok, ids):
    """What each token shows, list of str, None where masked. All together are the text.

    A character whose bytes are several tokens is shown by the first of them, once all are there;
    until then each part is U+FFFD. Special tokens show nothing.
    """
    shown, parts = [], []  # parts: neighbors that are no UTF-8 on their own
    for i in ids:
        text = None if i is None else as_utf8(tok.bytes_of(i))
        if i is not None and text is None:
            parts.append(tok.bytes_of(i))
            continue
        shown += [*shared(parts), text]
        parts = []
    return shown + shared(parts)


def shared(parts):
    """A list of bytes as a list of str: each character stands where its first byte is."""
    shown = [""] * len(parts)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    began = 0  # where the character in progress began
    for place, data in enumerate(parts):
        for byte in data:
            if not decoder.getstate()[0]:
                began = place
            for character in decoder.decode(bytes([byte])):
                shown[began] += character
                began = place  # after a broken character, this byte is one of its own
    if shown:
        shown[began] += decoder.decode(b"", True)
    return shown


# --- in the terminal ------------------------------------------------------------------------------

COLORS = (166, 172, 137, 103, 68, 33)  # of xterm's 256: from unsure, orange, to sure, blue
GRAY = 244
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
FRAMES_PER_SECOND = 30
PLAIN_FRAMES = 10  # how many there are where they cannot be drawn over each other


def animate(steps, texts, tok, out=None):
    """Pass on every step of a generator, and draw the first text as it is written.

    texts: what `decode` was given. out: a text stream; None: sys.stdout. In a terminal each frame
    is drawn over the last one. Elsewhere, and with TERM=dumb or NO_COLOR, a frame is printed
    whenever a tenth of the tokens has been written. The last frame is the text.
    """
    out = out or sys.stdout
    picture = Picture(list(texts[0]), tok, out)
    if not is_live(out):
        yield from print_frames(steps, picture)
        return
    atexit.register(out.write, SHOW_CURSOR)  # a generator that nobody finishes may never be closed
    out.write(HIDE_CURSOR)
    drawn = 0.0
    try:
        for step in steps:
            picture.update(step)
            if time.perf_counter() - drawn >= 1 / FRAMES_PER_SECOND:
                picture.redraw()
                drawn = time.perf_counter()
            yield step
    finally:  # after Ctrl-C too: what is done stays on the screen
        picture.end()
        picture.redraw(whole=True)
        out.write(SHOW_CURSOR)
        out.flush()
        atexit.unregister(out.write)


def print_frames(steps, picture):
    """`animate` without escape codes."""
    holes, shown = picture.ids.count(None), 0
    try:
        for step in steps:
            picture.update(step)
            done = (holes - picture.ids.count(None)) * PLAIN_FRAMES // holes
            if shown < done < PLAIN_FRAMES:
                picture.print()
                shown = done
            yield step
    finally:
        picture.end()
        picture.print()


def is_live(out):
    """Whether frames can be drawn over each other, in color."""
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return out.isatty() and not plain


class Picture:
    """The first text as a terminal shows it. ids: its tokens, None where masked."""

    def __init__(self, given, tok, out):
        self.given, self.ids, self.tok, self.out = given, list(given), tok, out
        self.encoding = getattr(out, "encoding", None) or "utf-8"
        self.mask = "░" if self.printable("░") == "░" else "."
        self.sure = {}  # position: the probability with which it was written
        self.fresh = set()  # positions that the last step wrote
        self.steps, self.lines = 0, 0  # lines: on the screen, of the last frame
        self.began = time.perf_counter()

    def update(self, step):
        self.steps += 1
        for written, remasked in read(step, [len(self.ids)]).values():
            apply(self.ids, written, remasked)
            self.sure |= {w.position: w.probability for w in written}
            self.fresh = {w.position for w in written}

    def end(self):
        """Leave out what was never written or comes after the text's end."""
        self.fresh = set()
        end = end_of(self.given, self.ids, self.tok.stop_ids)
        if end is not None:
            kept = [p for p, i in enumerate(self.given) if i is not None or p <= end]
            self.sure = {new: self.sure.get(p) for new, p in enumerate(kept)}
            self.ids = [self.ids[p] for p in kept]
            self.given = [self.given[p] for p in kept]

    def printable(self, text):
        """The text with what the stream's encoding cannot write replaced by '?'."""
        return text.encode(self.encoding, "replace").decode(self.encoding)

    def status(self):
        holes, masked = self.given.count(None), self.ids.count(None)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return (f"step {self.steps}: {holes - masked} of {holes} tokens, "
                f"{(holes - masked) / seconds:.0f} tokens/s")

    def print(self):
        """A plain frame."""
        text = "".join(text for text, _ in self.styled())
        if self.out.isatty():
            text = visible(text)
        self.out.write(self.printable(f"--- {self.status()}\n{text}\n"))
        self.out.flush()

    def redraw(self, whole=False):
        """A frame in place of the last one: the end of the text, as much as the screen holds.

        whole: all of it, which may scroll: nothing can be drawn over it afterwards.
        """
        size = shutil.get_terminal_size()
        lines = laid_out(self.styled(), size.columns - 1)
        if not whole:
            lines = lines[-max(1, size.lines - 2):]
        over = f"\x1b[{self.lines}A" if self.lines else ""
        lines.append(f"\x1b[38;5;{GRAY}m{self.status()[:size.columns - 1]}")
        frame = "".join(f"{line}\x1b[0m\x1b[K\n" for line in lines)
        self.out.write(self.printable(f"\r{over}{frame}\x1b[J"))
        self.out.flush()
        self.lines = len(lines)

    def styled(self):
        """(text, escape code) of each token."""
        for place, text in enumerate(spelled(self.tok, self.ids)):
            if text is None:
                yield self.mask, f"\x1b[38;5;{GRAY}m"
            elif self.given[place] is not None:
                yield text, ""
            else:
                level = int((self.sure.get(place) or 0) * len(COLORS))
                code = f"\x1b[38;5;{COLORS[min(level, len(COLORS) - 1)]}m"
                if place in self.fresh:
                    code += "\x1b[7m"  # reversed
                yield text, code


def laid_out(styled, width):
    """(text, escape code) pairs as the lines of a screen `width` columns wide, list of str."""
    lines, column = [""], 0
    for text, code in styled:
        lines[-1] += code
        for character in text:
            if character == "\t":
                character = " " * (4 - column % 4)
            character = visible(character)
            size = sum(map(width_of, character))
            if character == "\n" or column + size > width:
                lines.append(code)
                column = 0
            if character != "\n":
                lines[-1] += character
                column += size
        lines[-1] += "\x1b[0m" if code else ""
    return lines


def width_of(character):
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) == "Me":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


# --- as a page ------------------------------------------------------------------------------------

def write_page(path, trace, row=0, title="How it was written", settings=None):
    """Write `page` to a file."""
    write_text(path, page(trace, row, title, settings))


def page(trace, row=0, title="How it was written", settings=None):
    """One text's way from masks to code, as a self-contained HTML file (assets/trace.html).

    settings: dict of names and values that the page shows. Returns str. Texts of the model and the
    user are data in it, never HTML.
    """
    data = page_data(trace, row) | {"title": title}
    data["settings"] = [[str(k), str(v)] for k, v in (settings or {}).items()]
    data["settings"] += figures(trace, row)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    for character in "<>&":  # a </script> in a text must not end the script
        text = text.replace(character, f"\\u{ord(character):04x}")
    filled = {"title": html.escape(title), "data": text}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], read_text(TEMPLATE))


def page_data(trace, row):
    """What the page's script reads; assets/trace.html says what it is."""
    tok, ids, moments = trace.tok, list(trace.texts[row]), trace.moments(row)
    specials = {i: name for name, i in tok.special_ids.items()}
    names, writes, latest = {}, [], {}  # names: id: its number; latest: position: number of write

    def shown():
        texts = spelled(tok, ids)
        return [{"special": specials[i]} if i in specials else text for i, text in zip(ids, texts)]

    now = shown()
    places = [[{"step": 0, "text": text, "write": -1}] for text in now]
    for number, moment in enumerate(moments, 1):
        apply(ids, moment.written, moment.remasked)
        for w in moment.written:
            latest[w.position] = len(writes)
            candidates = [[names.setdefault(i, len(names)), rounded(p)] for i, p in w.candidates]
            writes.append({"step": number, "name": names.setdefault(w.token, len(names)),
                           "probability": rounded(w.probability),
                           "confidence": rounded(w.confidence), "candidates": candidates})
        before, now = now, shown()
        new = {w.position for w in moment.written}
        for place, text in enumerate(now):
            if text != before[place] or place in new:  # a part of a character may change unwritten
                entry = {"step": number, "text": text, "write": latest.get(place, -1)}
                places[place].append(entry)
    given = trace.texts[row]
    end = end_of(given, ids, tok.stop_ids)
    tail = [] if end is None else [p for p in range(end + 1, len(ids)) if given[p] is None]
    return {"places": places, "writes": writes, "names": [label(tok, i, specials) for i in names],
            "seconds": [rounded(m.seconds) for m in moments], "holes": given.count(None),
            "written": [len(m.written) for m in moments], "end": end, "tail": tail}


def label(tok, i, specials):
    """A token on its own: a str, with \\x.. for bytes that are no UTF-8, or {"special": name}."""
    if i in specials:
        return {"special": specials[i]}
    return tok.bytes_of(i).decode("utf-8", "backslashreplace")


def rounded(x):
    """Four digits of a number; None for what JSON does not have."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def figures(trace, row):
    """(name, value) pairs of one text."""
    order, forwards = order_of(trace, row), sum(bool(m.written) for m in trace.rows[row])
    return [["tokens per forward", f"{len(order) / max(1, forwards):.2f}"],
            ["local AR-ness@1", averaged([local_ar(order, 1)])],
            ["global AR-ness@1", averaged([global_ar(order, 1)])]]


# --- AR-ness --------------------------------------------------------------------------------------

def order_of(trace, row=0):
    """The positions of a text in the order in which they were written, list of int.

    Those of one step are ordered by confidence, ties from left to right. A position that was masked
    again counts when it was written last.
    """
    keys = {}
    for number, moment in enumerate(trace.rows[row]):
        for w in moment.written:
            keys[w.position] = (number, -w.confidence, w.position)
        for position in moment.remasked:
            keys.pop(position, None)
    return sorted(keys, key=keys.get)


def local_ar(order, k):
    """Local AR-ness@k: how often the k positions written last are, in order, those to the left.

    order: list of distinct positions. Neighbors are neighbors among these, so a given text between
    two holes does not count. Returns the share of the L - k steps that have k steps before them;
    NaN if there are none. 1 for left to right; (L - k)! / L! is expected of a random order.
    """
    place = {position: rank for rank, position in enumerate(sorted(order))}
    ranks = [place[position] for position in order]
    steps = range(k, len(ranks))
    hits = [ranks[t - k:t] == list(range(ranks[t] - k, ranks[t])) for t in steps]
    return sum(hits) / len(hits) if hits else math.nan


def global_ar(order, k):
    """Global AR-ness@k: how often the position written is one of the k left-most masked ones.

    order: list of distinct positions. Returns the share of the L steps, NaN if L = 0. 1 for left to
    right; (k + k (H_L - H_k)) / L is expected of a random order, L >= k, with H harmonic numbers.
    """
    masked, hits = sorted(order), 0
    for position in order:
        rank = bisect_left(masked, position)
        hits += rank < k
        del masked[rank]
    return hits / len(order) if order else math.nan


def averaged(shares):
    """The mean of those that are numbers, as a text."""
    numbers = [share for share in shares if not math.isnan(share)]
    return f"{sum(numbers) / len(numbers):.3f}" if numbers else "–"


def stats(trace, most=8):
    """A text: speed, and AR-ness for k = 1 … `most`, the mean over the texts."""
    orders = [order_of(trace, row) for row in range(len(trace.rows))]
    written = sum(map(len, orders))
    forwards = sum(bool(m.written) for moments in trace.rows for m in moments)
    texts = "1 text" if len(orders) == 1 else f"{len(orders)} texts"
    lines = [f"{texts}: {written} tokens in {trace.seconds:.2f} s, "
             f"{written / max(trace.seconds, 1e-9):.0f} tokens/s, "
             f"{written / max(1, forwards):.2f} tokens per forward of a text",
             "AR-ness   local  global"]
    for k in range(1, most + 1):
        near = averaged([local_ar(order, k) for order in orders])
        far = averaged([global_ar(order, k) for order in orders])
        lines.append(f"  k = {k:<3} {near:>6} {far:>7}")
    return "\n".join(lines)
