"""A gap in a text: what stands around it, how that is arranged as ids, how long it is, its diff.

Completion is a gap at the end. A bidirectional model sees both sides of a gap where they stand, but
has to be told its length: several are tried, and the likeliest is kept. The other models see only
what comes before: they get suffix, prefix, middle (`fim_prompt`), and end the middle themselves.

Not covered: several gaps at once, texts longer than the model's context.
"""
import difflib
import math
import os
import re
from dataclasses import dataclass

from configurator import Mistake, shortened
from decode import completion
from files import read_text
from tokenizer import fim_prompt

MARKER = "<FILL>"


@dataclass
class Gap:
    """before, after: str, the text around it as it is shown. left, right: lists of int, the ids
    around it. lengths: how many tokens it may have, several where the likelihood decides.
    trained: whether the model is known to be trained to fill it."""
    before: str
    after: str
    left: list
    right: list
    lengths: list
    trained: bool = True

    def ids(self, length):
        """The text with this many tokens to write, as decode takes it."""
        return [*self.left, *[None] * length, *self.right]

    def written(self, ids, stop_ids):
        """The ids in the gap of this text, up to the first stop id or mask."""
        return completion(ids[len(self.left):len(ids) - len(self.right)], stop_ids)

    def end(self, ids, stop_ids):
        """What comes after them in the gap, [a stop id], [None], or [] where the gap is full."""
        begin = len(self.left) + len(self.written(ids, stop_ids))
        return ids[begin:len(ids) - len(self.right)][:1]

    def text(self, ids, tok, strings):
        """What is in the gap, as a str, which ends where the first of these strings would begin."""
        return cut(tok.decode(self.written(ids, tok.stop_ids)), strings)

    def complete(self, ids, tok, strings):
        """Whether nothing more would be written, or only after one of these strings."""
        if self.end(ids, tok.stop_ids) != [None]:
            return True
        return self.text(ids, tok, strings) != self.text(ids, tok, ())


def cut(text, strings):
    """The text before the first of these strings."""
    places = [text.find(string) for string in strings if string in text]
    return text[:min(places)] if places else text


# --- where it is ----------------------------------------------------------------------------------

def read_file(path, lines):
    """A file with a gap: its text, and what stands before and after the gap.

    lines: "10:20", or empty if <FILL> marks the gap. Raises Mistake for a file that is missing or
    no text, and for a gap that is not there.
    """
    text = read_text(path, newline="")  # a diff has to fit the file as it is
    if "\0" in text:
        raise Mistake(f"{path} holds zero bytes: it is no text")
    if not lines:
        return text, *split_at_marker(text, path)
    all_lines = lines_of(text)
    first, last = first_and_last(lines)
    if last > len(all_lines):
        raise Mistake(f"lines={lines} is out of range: {path} has {len(all_lines)} lines")
    replaced = "".join(all_lines[first - 1:last])
    line_end = re.search(r"(\r?\n)?\Z", replaced)[0]  # it stays, so that lines stay lines
    before = "".join(all_lines[:first - 1])
    return text, before, line_end + "".join(all_lines[last:])


def first_and_last(lines):
    """The numbers in "10:20"."""
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", lines)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise Mistake(f"lines={shortened(lines)} must be the first and the last line to replace, "
                      "such as 10:20; the first line of a file is 1")
    return int(match[1]), int(match[2])


def split_at_marker(text, where):
    """What stands before and after the <FILL> of a text."""
    parts = text.split(MARKER)
    if len(parts) == 1:
        raise Mistake(f"{where} has no {MARKER}: write it where the gap is, or name the --lines "
                      "to replace")
    if len(parts) > 2:
        raise Mistake(f"{where} has {len(parts) - 1} {MARKER} markers: one gap at a time")
    return parts


# --- its arrangement ------------------------------------------------------------------------------

def gap_of(before, after, loaded, cfg):
    """The Gap between two texts. loaded: what huggingface.load returns. cfg: sample.Config.

    Raises Mistake where the model cannot fill gaps, or not this one.
    """
    model, tok, recipe = loaded
    left, right = tok.encode(before), tok.encode(after)
    native = recipe.objective == "bidirectional"
    if native:
        left, right = both_sides(left, right, tok, bool(cfg.infill))
    elif tok.fim is None:
        raise Mistake(f"objective={recipe.objective!r} sees nothing to the right of a gap, and "
                      f"{tok.folder} has no FIM tokens to give it the suffix first: train with a "
                      "fim_rate, or take a bidirectional model")
    else:
        left, right = fim_prompt(tok, left, right), []
    around, context = len(left) + len(right), model.cfg.context
    room, wanted = context - around, max(1, cfg.fill_tokens)
    if room < wanted:
        raise Mistake(f"the text around the gap has {around} tokens, the model's context only "
                      f"{context}: there is no room for {wanted} more")
    most = min(room, cfg.max_new_tokens)
    lengths = [cfg.fill_tokens or most]
    if native and not cfg.fill_tokens:
        lengths = lengths_up_to(most)
    if len(lengths) > 1 and (cfg.animate or cfg.html or cfg.stats):
        raise Mistake("animate, html and stats show one text, and a gap's length is chosen among "
                      "several: give it with --fill_tokens")
    return Gap(before, after, left, right, lengths, native or tok.fim_trained)


def both_sides(left, right, tok, whole):
    """The ids around a gap, for a model that sees both sides. whole: the text ends in <eos>."""
    if tok.bos_id is not None:
        left = [tok.bos_id, *left]
    if whole and tok.eos_id is not None:
        right = [*right, tok.eos_id]
    if not left:
        raise Mistake(f"nothing stands before the gap, and {tok.folder} has no <bos>: leave a line "
                      "there")
    return left, right


def lengths_up_to(most):
    """1, 2, 4, …, most."""
    lengths = [2**n for n in range(most.bit_length()) if 2**n < most]
    return [*lengths, most]


# --- its length -----------------------------------------------------------------------------------

class Scores:
    """The log-probability with which each token was taken, for texts that are being written."""

    def __init__(self):
        self.known = {}  # (row, position): its log-probability

    def add(self, step, texts):
        """step: decode.Step. A token that was masked again counts as it was written last."""
        row, column = step.taken.nonzero(as_tuple=True)  # (m,) each
        logp = step.logits[row, column].float().log_softmax(-1)  # (m, vocab)
        logp = logp.gather(1, step.tokens[row, column, None])[:, 0]
        where = zip(step.rows[row].tolist(), step.positions[row, column].tolist())
        self.known.update(zip(where, logp.tolist()))

    def mean(self, row):
        """Of the tokens of a row, in nats; -inf where there are none."""
        values = [value for (which, _), value in self.known.items() if which == row]
        return sum(values) / len(values) if values else -math.inf

    def likeliest(self, first, lengths, out):
        """Which of the lengths has the highest mean, as an index; prints them all.

        first: the row of the first length; the others follow.
        """
        means = [self.mean(first + i) for i in range(len(lengths))]
        best = means.index(max(means))
        tried = ", ".join(f"{length}: {mean:.3f}" for length, mean in zip(lengths, means))
        print(f"--- length {lengths[best]} is the likeliest; log-probability per token by length: "
              f"{tried}", file=out)
        return best


# --- its diff -------------------------------------------------------------------------------------

def lines_of(text):
    """The lines of a text with their ends; only \\n ends one."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def diff(path, old, new):
    """A unified diff that `patch -p1` and `git apply` take; empty where nothing changed."""
    name = os.path.relpath(path).replace("\n", " ")
    found = difflib.unified_diff(lines_of(old), lines_of(new), f"a/{name}", f"b/{name}")
    ends = (line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
            for line in found)
    return "".join(ends)
