"""Watching: what is kept of each step, AR-ness against its definition, the terminal's frames, and
the page, which a real browser opens, plays and hovers over.
"""
import io
import itertools
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from browser import Browser, Missing
from hypothesis import given, settings
from hypothesis import strategies as st

from watch import (
    Trace,
    animate,
    end_of,
    global_ar,
    laid_out,
    local_ar,
    order_of,
    page,
    spelled,
    stats,
    write_page,
)

BOS, EOS, MASK, PAD = 0, 1, 2, 3


class Tok:
    """Ids 0-3 are specials, then one id for each of the given texts, then the 256 bytes."""

    def __init__(self, *texts):
        self.special_ids = {"<bos>": BOS, "<eos>": EOS, "<mask>": MASK, "<pad>": PAD}
        self.mask_id, self.stop_ids = MASK, frozenset({EOS})
        self.bytes = [b""] * 4 + [text.encode() for text in texts]
        self.bytes += [bytes([byte]) for byte in range(256)]

    def bytes_of(self, i):
        return self.bytes[i]

    def ids(self, *texts):
        """The ids of these texts, byte by byte where they have none."""
        found = []
        for text in texts:
            data = text.encode()
            found += [self.bytes.index(data)] if data in self.bytes else map(self.byte, data)
        return found

    def byte(self, value):
        return len(self.bytes) - 256 + value

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")


def step_of(tok, rows):
    """A decode.Step. rows: {row: [(position, token, probability, "taken" | "remasked" | "")]}."""
    n = max(map(len, rows.values()))
    padded = [list(places) + [(0, 0, 0.5, "")] * (n - len(places)) for places in rows.values()]
    position, token, p, what = (
        [[place[i] for place in places] for places in padded] for i in range(4))
    vocab = len(tok.bytes)
    logits = torch.zeros(len(rows), n, vocab)
    for b, j in itertools.product(range(len(rows)), range(n)):
        odds = p[b][j] / (1 - p[b][j]) * (vocab - 1)  # so that softmax gives the token p
        logits[b, j, token[b][j]] = math.log(odds)
    return SimpleNamespace(
        rows=torch.tensor(list(rows)), positions=torch.tensor(position),
        tokens=torch.tensor(token), confidence=torch.tensor(p), logits=logits,
        taken=torch.tensor([[w == "taken" for w in row] for row in what]),
        remasked=torch.tensor([[w == "remasked" for w in row] for row in what]))


def steps_of(tok, order, ids, at=0):
    """Steps that write ids[i] at position at + i of text 0. order: lists of i, a step each."""
    sure = random.Random(0)
    return [step_of(tok, {0: [(at + i, ids[i], sure.uniform(0.05, 0.95), "taken") for i in some]})
            for some in order]


def trace_of(tok, texts, steps):
    trace = Trace(texts, tok)
    assert list(trace.record(iter(steps))) == steps  # passed on unchanged
    return trace


# --- AR-ness --------------------------------------------------------------------------------------

def local_by_definition(order, k):
    """DESIGN: of the L - k steps with k predecessors, the share whose k predecessors are, in order,
    the k positions directly to its left. order: a permutation of 0 … L - 1."""
    good = 0
    for t in range(k, len(order)):
        if all(order[t - j] == order[t] - j for j in range(1, k + 1)):
            good += 1
    return good / (len(order) - k)


def global_by_definition(order, k):
    """The share of steps that chose one of the k left-most still masked positions."""
    good = 0
    for t, position in enumerate(order):
        still_masked = set(order) - set(order[:t])
        left_most = sorted(still_masked)[:k]
        if position in left_most:
            good += 1
    return good / len(order)


@settings(deadline=None)
@given(st.permutations(range(9)), st.integers(1, 8))
def test_ar_ness_is_its_definition(order, k):
    assert local_ar(order, k) == local_by_definition(order, k)
    assert global_ar(order, k) == global_by_definition(order, k)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 100))
def test_left_to_right_scores_one(L, k, first):
    order = list(range(first, first + L))
    assert global_ar(order, k) == 1
    if L > k:
        assert local_ar(order, k) == 1


@settings(deadline=None)
@given(st.sets(st.integers(0, 99), min_size=2), st.integers(1, 8))
def test_left_to_right_scores_one_in_several_holes_too(positions, k):
    order = sorted(positions)
    assert global_ar(order, k) == 1
    assert len(order) <= k or local_ar(order, k) == 1


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 8))
def test_right_to_left(L, k):
    """Nothing follows its left neighbor; only the last k of the steps choose from the k left."""
    order = list(range(L))[::-1]
    assert global_ar(order, k) == min(k, L) / L
    if L > k:
        assert local_ar(order, k) == 0


@pytest.mark.parametrize("order, k, near, far", [
    ([0, 2, 1, 3], 1, 0, 3 / 4),  # 0 is left-most, 2 is not, 1 and 3 are
    ([0, 1, 3, 2], 1, 1 / 3, 3 / 4),  # of three steps, only 1 follows its neighbor
    ([0, 1, 3, 2], 2, 0, 1),
    ([2, 3, 0, 1], 1, 2 / 3, 1 / 2),  # 3 and 1 follow; 0 and 1 are the left-most
    ([0, 1, 2, 4, 3, 5], 2, 1 / 4, 1),  # 2 has 0, 1 before it
    ([0, 1, 2, 4, 3, 5], 3, 0, 1),
    ([10, 11, 12, 20, 21], 2, 1, 1),  # a given text between 12 and 20 does not count
    ([7], 1, math.nan, 1),
    ([3, 1, 2], 3, math.nan, 1),
    ([], 1, math.nan, math.nan),
])
def test_hand_made_orders(order, k, near, far):
    assert local_ar(order, k) == pytest.approx(near, nan_ok=True)
    assert global_ar(order, k) == pytest.approx(far, nan_ok=True)


@pytest.mark.parametrize("L, k", [(6, 1), (6, 2), (6, 6), (17, 1), (17, 2), (17, 4), (17, 8)])
def test_random_orders_score_what_the_closed_forms_say(L, k):
    """4,000 orders with a fixed seed: the mean within five of its own standard errors."""
    rng = random.Random(1)
    orders = [rng.sample(range(L), L) for _ in range(4000)]
    harmonic = [sum(1 / i for i in range(1, n + 1)) for n in range(L + 1)]
    far = (k + k * (harmonic[L] - harmonic[k])) / L
    measured = [(far, [global_ar(order, k) for order in orders])]
    if L > k:
        near = math.factorial(L - k) / math.factorial(L)
        measured.append((near, [local_ar(order, k) for order in orders]))
    for expected, scores in measured:
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
        if expected * len(scores) * (L - k) < 5:  # too rare to be seen often enough
            assert mean < 100 * expected + 1e-3
            continue
        assert abs(mean - expected) <= 5 * math.sqrt(variance / len(scores)) + 1e-12


def test_the_order_of_a_step_is_by_confidence_and_ties_from_left_to_right():
    tok = Tok()
    steps = [step_of(tok, {0: [(1, 9, 0.3, "taken"), (2, 9, 0.6, "taken"), (3, 9, 0.3, "taken")]}),
             step_of(tok, {0: [(5, 9, 0.1, ""), (4, 9, 0.1, "taken")]})]
    assert order_of(trace_of(tok, [[9] + [None] * 5], steps)) == [2, 1, 3, 4]


def test_what_is_masked_again_counts_when_it_was_written_last():
    tok = Tok()
    steps = [step_of(tok, {0: [(1, 9, 0.3, "taken"), (2, 9, 0.6, "taken")]}),
             step_of(tok, {0: [(1, 9, 0.3, "remasked"), (3, 9, 0.6, "taken")]}),
             step_of(tok, {0: [(1, 8, 0.3, "taken"), (3, 9, 0.1, "remasked")]})]
    assert order_of(trace_of(tok, [[9] + [None] * 3], steps)) == [2, 1]


# --- what is kept ---------------------------------------------------------------------------------

def test_rows_leave_and_what_completes_a_block_is_left_out():
    tok = Tok("a", "b")
    a, b = tok.ids("a", "b")
    texts = [[BOS, None], [BOS, None, None, None]]
    steps = [step_of(tok, {0: [(1, a, 0.7, "taken"), (2, b, 0.9, "taken")],
                           1: [(1, b, 0.6, "taken"), (2, b, 0.5, "")]}),
             step_of(tok, {1: [(2, a, 0.8, "taken"), (3, a, 0.2, "")]}),
             step_of(tok, {1: [(2, a, 0.8, ""), (3, a, 0.2, "")]})]
    trace = trace_of(tok, texts, steps)
    assert texts == [[BOS, None], [BOS, None, None, None]]
    assert [order_of(trace, row) for row in (0, 1)] == [[1], [1, 2]]
    assert [len(trace.moments(row)) for row in (0, 1)] == [1, 2]  # the last one changed nothing
    assert trace.forwards == 3
    written = trace.rows[0][0].written[0]
    assert (written.position, written.token) == (1, a)
    assert written.probability == pytest.approx(0.7) == written.confidence
    assert written.candidates[0] == (a, pytest.approx(0.7)) and len(written.candidates) == 5
    seconds = [moment.seconds for moment in trace.rows[1]]
    assert seconds == sorted(seconds) and trace.seconds == seconds[-1]


def test_candidates_are_those_of_the_logits_without_what_is_never_chosen():
    tok = Tok()
    step = step_of(tok, {0: [(1, 9, 0.7, "taken")]})
    step.logits[:] = -torch.inf
    step.logits[0, 0, [7, 9, 8]] = torch.tensor([1.0, 2.0, 3.0])
    written = trace_of(tok, [[5, None]], [step]).rows[0][0].written[0]
    total = sum(map(math.exp, (1, 2, 3)))
    expected = [(8, math.exp(3) / total), (9, math.exp(2) / total), (7, math.exp(1) / total)]
    assert [i for i, _ in written.candidates] == [i for i, _ in expected]
    for (_, found), (_, p) in zip(written.candidates, expected):
        assert found == pytest.approx(p)
    assert written.probability == pytest.approx(math.exp(2) / total)


def test_the_time_that_the_consumer_takes_is_not_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    tok = Tok()

    def decoding():
        for position in (1, 2):
            now[0] += 3
            yield step_of(tok, {0: [(position, 9, 0.5, "taken")]})

    trace = Trace([[5, None, None]], tok)
    for _ in trace.record(decoding()):
        now[0] += 100
    assert [moment.seconds for moment in trace.rows[0]] == [3, 6]


def test_stats_are_the_mean_over_texts():
    tok = Tok()
    steps = [step_of(tok, {0: [(1, 9, 0.5, "taken")], 1: [(2, 9, 0.5, "taken")]}),
             step_of(tok, {0: [(2, 9, 0.5, "taken")], 1: [(1, 9, 0.5, "taken")]})]
    trace = trace_of(tok, [[5, None, None], [5, None, None]], steps)
    lines = stats(trace).splitlines()
    assert lines[0].startswith("2 texts: 4 tokens in ")
    assert lines[0].endswith("1.00 tokens per forward of a text")
    table = {int(k): (near, far) for k, near, far in
             re.findall(r"k = (\d)\s+(\S+)\s+(\S+)", stats(trace))}
    assert list(table) == list(range(1, 9))
    assert table[1] == ("0.500", "0.750") and table[2] == ("–", "1.000")


@pytest.mark.parametrize("text, ids, end", [
    ([5, None, None], [5, 6, EOS], 2),
    ([5, None, None, None], [5, None, EOS, 6], None),
    ([5, EOS, None, None], [5, EOS, EOS, 6], 2),
    ([5, None], [5, 6], None),
])
def test_where_a_text_ends(text, ids, end):
    assert end_of(text, ids, {EOS}) == end


# --- tokens as text -------------------------------------------------------------------------------

def pieces(data, cuts):
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[a:b] for a, b in zip(edges, edges[1:])]


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=12), st.text(max_size=6).map(str.encode)),
       st.lists(st.integers(1, 11)))
def test_all_tokens_together_are_the_text(data, cuts):
    tok = Tok()
    tok.bytes = pieces(data, cuts)
    ids = range(len(tok.bytes))
    assert "".join(spelled(tok, ids)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("parts, shown", [
    ([b"a", b"\xc3", b"\xa9", b"b"], ["a", "é", "", "b"]),
    ([b"\xf0", b"\x9f", b"\x99\x82x"], ["🙂", "", "x"]),
    ([b"a\xc3", b"\xa9b"], ["aé", "b"]),
    ([b"\xc3", None, b"\xa9"], ["\ufffd", None, "\ufffd"]),
    ([b"\xe6", b"\xc3", b"\xa9"], ["\ufffd", "é", ""]),
    ([b"\xc3", b"a"], ["\ufffd", "a"]),
    ([], []),
])
def test_a_character_of_several_tokens_shows_once_it_is_complete(parts, shown):
    tok = Tok()
    tok.bytes = [part or b"" for part in parts]
    ids = [None if part is None else i for i, part in enumerate(parts)]
    assert spelled(tok, ids) == shown


# --- the terminal ---------------------------------------------------------------------------------

class Terminal(io.StringIO):
    """A stream that says it is a terminal."""
    encoding = "utf-8"

    def isatty(self):
        return True


class Screen:
    """What a terminal shows after the escape codes that `animate` writes: a plain reading of them.

    Below `height` lines the screen scrolls: `lines` are all there ever were, top the first seen.
    """

    def __init__(self, written, height):
        self.lines, self.row, self.column, self.cursor = [""], 0, 0, True
        for text, code in re.findall(r"([^\x1b]+)|\x1b\[([?0-9;]*[A-Za-z])", written):
            if text:
                self.type(text)
            elif code.endswith("A"):
                self.row -= int(code[:-1])
                assert self.row >= max(0, len(self.lines) - height), "above the screen"
            elif code == "J":
                self.lines[self.row:] = [self.lines[self.row][:self.column]]
            elif code == "K":
                self.lines[self.row] = self.lines[self.row][:self.column]
            elif code in ("?25l", "?25h"):
                self.cursor = code == "?25h"
            else:
                assert code.endswith("m"), code

    def type(self, text):
        for character in text:
            if character == "\r":
                self.column = 0
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append("")
            else:
                line = self.lines[self.row]
                self.lines[self.row] = line[:self.column] + character + line[self.column + 1:]
                self.column += 1


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns and 8 lines, which would draw every frame."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 8)))
    monkeypatch.setattr("watch.FRAMES_PER_SECOND", 1e9)
    return Terminal()


CODE = ("    return", " a", " +", " é", "\n", "\n\tx", " = 1", "\n")


def example(tok):
    """A text with a prompt, and the steps that write CODE and <eos> after it, out of order."""
    prompt = [BOS, *tok.ids("def f():", "\n")]
    ids = [*tok.ids(*CODE), EOS, *tok.ids("x")]  # é is two tokens
    text = prompt + [None] * (len(ids) + 3)
    order = [[1, 0], [4], [3], [2, 6], [5], [11, 9], [8], [7], [10]]
    return text, steps_of(tok, order, ids, len(prompt))


def a_tok():
    return Tok("def f():", *(text for text in CODE if text != " é"), " ")


def test_the_last_frame_in_a_terminal_is_the_text(terminal):
    tok = a_tok()
    text, steps = example(tok)
    assert list(animate(iter(steps), [text], tok, terminal)) == steps
    screen = Screen(terminal.getvalue(), height=8)
    shown = "def f():\n" + "".join(CODE)
    assert screen.lines[:-2] == shown.replace("\n\t", "\n    ").split("\n")
    assert screen.lines[-2].startswith("step 9: 11 of 11 tokens") and screen.lines[-1] == ""
    assert screen.cursor


def test_a_frame_has_the_masks(terminal):
    tok = a_tok()
    text, steps = example(tok)
    running = animate(iter(steps), [text], tok, terminal)
    next(running)
    screen = Screen(terminal.getvalue(), height=8)
    assert screen.lines[:2] == ["def f():", "    return a" + "░" * 13]
    assert not screen.cursor
    running.close()
    assert Screen(terminal.getvalue(), height=8).cursor


def test_the_color_is_how_sure_the_model_was(terminal):
    tok = Tok()
    written = [(1, tok.byte(97), 0.01, "taken"), (2, tok.byte(98), 0.99, "taken")]
    list(animate(iter([step_of(tok, {0: written})]), [[tok.byte(99), None, None]], tok, terminal))
    last = terminal.getvalue().rpartition("\r")[2]
    assert "c\x1b[38;5;166ma\x1b[0m\x1b[38;5;33mb\x1b[0m" in last  # orange, blue


def test_a_text_longer_than_the_screen_shows_its_end_until_it_is_done(terminal):
    tok = Tok("line\n")
    text, n = [BOS] + [None] * 30, 30
    steps = steps_of(tok, [[i] for i in range(n)], tok.ids("line\n") * n, 1)
    running = animate(iter(steps), [text], tok, terminal)
    for _ in range(20):
        next(running)
    screen = Screen(terminal.getvalue(), height=8)
    assert len(screen.lines) == 8 and screen.lines[0] == "line"
    list(running)
    assert Screen(terminal.getvalue(), height=8).lines[:-2] == ["line"] * n + [""]


def interrupted(tok, steps):
    yield steps[0]
    raise KeyboardInterrupt


def test_ctrl_c_gives_the_cursor_back_and_leaves_what_is_done(terminal):
    tok = a_tok()
    text, steps = example(tok)
    with pytest.raises(KeyboardInterrupt):
        list(animate(interrupted(tok, steps), [text], tok, terminal))
    screen = Screen(terminal.getvalue(), height=8)
    assert screen.cursor and screen.lines[1].startswith("    return a░")


def test_control_characters_of_a_model_do_not_reach_the_terminal(terminal):
    tok = Tok("\x1b[2J", "\r", "a\u202eb", "\x07")
    ids = tok.ids("\x1b[2J", "\r", "a\u202eb", "\x07")
    steps = steps_of(tok, [[0, 1, 2, 3]], ids, 1)
    list(animate(iter(steps), [[BOS] + [None] * 4], tok, terminal))
    assert "\x1b[2J" not in terminal.getvalue() and "\x07" not in terminal.getvalue()
    assert Screen(terminal.getvalue(), height=8).lines[0] == "·[2J·a·b·"


@settings(deadline=None)
@given(st.lists(st.text("ab\n\t日é\u0301", max_size=9), max_size=6), st.integers(4, 20))
def test_no_line_is_wider_than_the_screen(texts, width):
    lines = laid_out([(text, "\x1b[7m") for text in texts], width)
    plain = [re.sub(r"\x1b\[\d+m", "", line) for line in lines]
    wide = [sum({"日": 2, "\u0301": 0}.get(c, 1) for c in line) for line in plain]
    assert max(wide) <= width
    kept = re.sub(r"\s", "", "".join(texts))
    assert re.sub(r"\s", "", "".join(plain)) == kept


def frames(printed):
    """The frames of plain output: (status, text)."""
    parts = re.split(r"^--- (.*)\n", printed, flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2]))


@pytest.mark.parametrize("why", ["not a terminal", "TERM=dumb", "NO_COLOR=1"])
def test_plain_frames(why, terminal, monkeypatch):
    out = io.StringIO() if why == "not a terminal" else terminal
    if "=" in why:
        monkeypatch.setenv(*why.split("="))
    tok = a_tok()
    text, steps = example(tok)
    assert list(animate(iter(steps), [text], tok, out)) == steps
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    drawn = frames(out.getvalue())
    assert 2 <= len(drawn) <= len(steps)
    assert drawn[0][1] == "def f():\n    return a" + "░" * 13 + "\n"
    assert drawn[-1][1] == "def f():\n" + "".join(CODE) + "\n"


def test_many_steps_are_ten_plain_frames():
    tok, out = Tok("x"), io.StringIO()
    steps = steps_of(tok, [[i] for i in range(200)], tok.ids("x") * 200, 1)
    list(animate(iter(steps), [[BOS] + [None] * 200], tok, out))
    drawn = frames(out.getvalue())
    assert len(drawn) == 10
    assert [text.count("x") for _, text in drawn] == list(range(20, 201, 20))


def test_a_stream_without_unicode_gets_dots():
    tok = a_tok()
    text, steps = example(tok)
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    list(animate(iter(steps), [text], tok, out))
    out.flush()
    printed = raw.getvalue().decode("ascii")
    assert "return a............." in printed and " + ?" in printed


# --- the page as a file ---------------------------------------------------------------------------

class Elements(HTMLParser):
    """Tags, attributes and scripts of a page, as a parser that is not a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.values, self.scripts, self.title = [], [], [], ""
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += attrs
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data


NASTY = "</script><script>alert(1)</script><!-- {{data}} {{title}} &amp; \" ' \u2028 \\"


def nasty_trace():
    tok = Tok(NASTY, "</pre>")
    text = [*tok.ids(NASTY), None, None]
    return trace_of(tok, [text], steps_of(tok, [[1], [0]], tok.ids(NASTY, "</pre>"), 1))


def test_texts_are_data_in_the_page_never_html():
    text = page(nasty_trace(), title=NASTY, settings={NASTY: NASTY, "temperature": 0.5})
    found = Elements(text)
    assert len(found.scripts) == 2 and "alert" not in found.scripts[1]
    assert found.title == NASTY
    assert not re.search("[<>&]", found.scripts[0])
    data = json.loads(found.scripts[0])
    assert data["title"] == NASTY
    assert data["settings"][:2] == [[NASTY, NASTY], ["temperature", "0.5"]]
    assert [entries[-1]["text"] for entries in data["places"]] == [NASTY, NASTY, "</pre>"]
    expected = ("html head meta link title style body header div h1 dl pre button main noscript "
                "span i input label select option p kbd script")
    assert set(found.tags) == set(expected.split())


def test_the_page_loads_nothing_from_anywhere():
    text = page(nasty_trace())
    found = Elements(text)
    for name, value in found.values:
        if name in ("src", "href", "action", "data", "srcset"):
            assert value == "data:,"
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]  # a name
    for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "innerHTML", "import("):
        assert word not in text
    assert "default-src 'none'" in text


def data_of(trace, row=0):
    return json.loads(Elements(page(trace, row)).scripts[0])


def test_the_data_say_when_each_place_changed():
    tok = Tok()
    e, accent = tok.byte(0xC3), tok.byte(0xA9)
    steps = [step_of(tok, {0: [(2, accent, 0.9, "taken")]}),
             step_of(tok, {0: [(1, e, 0.8, "taken"), (2, accent, 0.9, "")]}),
             step_of(tok, {0: [(3, EOS, 0.7, "taken"), (1, e, 0.8, "remasked")]})]
    data = data_of(trace_of(tok, [[BOS, None, None, None, None]], steps))
    found = [[(entry["step"], entry["text"]) for entry in place] for place in data["places"]]
    assert found == [
        [(0, {"special": "<bos>"})],
        [(0, None), (2, "é"), (3, None)],
        [(0, None), (1, "\ufffd"), (2, ""), (3, "\ufffd")],
        [(0, None), (3, {"special": "<eos>"})],
        [(0, None)],
    ]
    assert [data["names"][write["name"]] for write in data["writes"]] == [
        "\\xa9", "\\xc3", {"special": "<eos>"}]
    assert [write["step"] for write in data["writes"]] == [1, 2, 3]
    assert data["places"][2][2]["write"] == 0  # it changed, and was not written again
    assert data["written"] == [1, 1, 1] and data["holes"] == 4 and data["end"] is None


def test_numbers_that_json_lacks_are_none():
    tok = Tok()
    step = step_of(tok, {0: [(1, 9, 0.5, "taken")]})
    step.confidence[:] = -math.inf
    assert data_of(trace_of(tok, [[5, None]], [step]))["writes"][0]["confidence"] is None


def test_a_text_that_nothing_was_written_in_has_a_page_too():
    assert data_of(Trace([[BOS, None]], Tok()))["seconds"] == []


# --- the page in a browser ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chromium():
    try:
        browser = Browser()
    except Missing as reason:
        pytest.skip(str(reason))
    with browser:
        yield browser


@pytest.fixture
def opened(chromium, tmp_path):
    """A browser that shows the example; `expected` has the text after each step."""
    tok = a_tok()
    text, steps = example(tok)
    step = step_of(tok, {0: [(4, text[1], 0.5, "remasked")]})  # " a" is masked again
    again = step_of(tok, {0: [(4, tok.ids(" a")[0], 0.85, "taken")]})
    path = tmp_path / "page.html"
    settings_ = {"prompt": "def f():", "evil": NASTY}
    trace = trace_of(tok, [text], [*steps[:3], step, *steps[3:], again])
    write_page(path, trace, title="An example", settings=settings_)
    chromium.chrome("Emulation.setEmulatedMedia",
                    features=[{"name": "prefers-color-scheme", "value": "light"}])
    chromium.size(1000, 900)
    chromium.console()
    chromium.open(path)
    yield chromium
    assert chromium.console() == []


SHOWN = """return [...document.querySelectorAll('#text .cell')].map(cell =>
    cell.classList.contains('masked') ? '░' : cell.textContent).join('')"""


def shown(browser):
    return browser.run(SHOWN)


def current(browser):
    return int(browser.run("return document.getElementById('slider').value"))


FIRST = "<bos>def f():\n" + "░" * 15
LAST = "<bos>def f():\n" + "".join(CODE) + "<eos>x░░░"


def test_it_opens_on_the_whole_text(opened):
    assert shown(opened) == LAST and current(opened) == 11
    assert opened.run("return document.title") == "An example"
    assert opened.run("return document.getElementById('settings').textContent").count(NASTY) == 1
    assert opened.run("return document.scripts.length") == 2  # nothing came in through the texts
    after = "return document.querySelector('.after').textContent"
    assert opened.run(after) == "x"  # what comes after <eos>


def test_keys_go_through_the_steps(opened):
    opened.press("home")
    assert current(opened) == 0 and shown(opened) == FIRST
    opened.press("right")
    assert current(opened) == 1 and shown(opened) == FIRST.replace("░░", "    return a", 1)
    assert opened.run("return document.querySelectorAll('#text .now').length") == 2
    opened.press("right", "right")
    assert "\ufffd" in shown(opened)  # a part of é
    opened.press("right")
    assert current(opened) == 4 and shown(opened).count("░") == 12
    assert opened.run("return document.querySelector('#text .again').className").count("masked")
    opened.press("left", "left", "left")
    assert current(opened) == 1 and shown(opened) == FIRST.replace("░░", "    return a", 1)
    opened.press("end", "right")
    assert current(opened) == 11 and shown(opened) == LAST


def test_the_slider_is_dragged_and_the_plot_clicked(opened):
    opened.pointer("#slider", "down", (-300, 0), "up")  # its middle is step 5.5
    assert current(opened) == 2
    opened.press("right")  # with the focus on the slider: one step, not two
    assert current(opened) == 3
    width = opened.run("return document.querySelector('#plot svg').getBoundingClientRect().width")
    opened.click("#plot", at=(round(width * (6.5 / 11 - 0.5)), 5))
    assert current(opened) == 7
    status = opened.run("return document.getElementById('count').textContent")
    assert status.startswith("step 7 of 11 · 8 of 15 tokens")


def test_it_plays_and_pauses(opened):
    opened.run("document.getElementById('speed').value = '5'; window.seen = []; "
               "const before = show; show = wanted => { seen.push(wanted); before(wanted); };")
    opened.click("#play")  # from the end: begins anew
    opened.wait("return step === 11 && !playing")
    seen = opened.run("return seen")
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 11 and len(seen) > 3
    assert shown(opened) == LAST
    opened.run("document.getElementById('speed').value = '1'; document.activeElement.blur()")
    opened.press("home", "space")
    assert opened.run("return playing")
    opened.press("space")
    assert not opened.run("return playing") and current(opened) < 11
    opened.run("document.getElementById('speed').value = 'real'")
    opened.press("space")
    opened.wait("return step === 11 && !playing")


CARD = """const card = document.getElementById('card');
    return card.hidden ? null : card.innerText"""


def test_hovering_shows_the_candidates_of_the_step_that_wrote_the_token(opened):
    assert opened.run(CARD) is None
    opened.pointer("[data-place='6']")
    card = opened.run(CARD)
    assert card.startswith("Written in step 3, confidence 0.") and "␣" in card
    assert opened.run("return document.querySelectorAll('#card tr').length") == 5
    assert opened.run("return document.querySelectorAll('#card tr.chosen').length") == 1
    opened.run("show(2)")
    assert opened.run(CARD) == "Masked until step 3."
    opened.pointer("[data-place='1']")
    assert opened.run(CARD) == "Given, not written by the model."
    opened.pointer("[data-place='4']")
    assert opened.run(CARD).startswith("Written in step 1,")
    opened.run("show(11)")
    assert opened.run(CARD).startswith("Written in step 11, confidence 0.85")
    opened.pointer("h1")
    assert opened.run(CARD) is None


def test_focus_and_tap_show_the_candidates_too(opened):
    opened.click("[data-place='3']")
    assert opened.run(CARD).startswith("Written in step 1,")
    opened.press("down", "down")
    assert opened.run("return document.activeElement.dataset.place") == "5"
    assert opened.run(CARD).startswith("Written in step 5,")
    assert opened.run("return document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    opened.press("escape")
    assert opened.run(CARD) is None


PAINT = """return getComputedStyle(document.querySelector('[data-place="3"]')).backgroundColor"""
PAPER = "return getComputedStyle(document.body).backgroundColor"


def test_c_toggles_the_color_and_t_the_theme(opened):
    by_step, light = opened.run(PAINT), opened.run(PAPER)
    opened.press("c")
    assert opened.run("return document.getElementById('colors').value") == "confidence"
    assert opened.run("return document.getElementById('low').textContent") == "unsure, 0 %"
    assert opened.run(PAINT) != by_step
    opened.press("c")
    assert opened.run(PAINT) == by_step
    opened.press("t")
    dark = opened.run(PAPER)
    assert dark != light and opened.run(PAINT) != by_step
    opened.click("#theme")
    assert opened.run(PAPER) == light
    opened.press("space")  # the button has the focus: the space is its
    assert opened.run(PAPER) == dark and not opened.run("return playing")
    opened.press("t")
    opened.chrome("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark"}])
    opened.run("location.reload()")
    opened.wait("return document.readyState === 'complete'")
    assert opened.run(PAPER) == dark


CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = color => {  // as it is painted, whatever way it is written
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = color => rgb(color).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const cell = document.querySelector('[data-place="3"]');
let least = 99;
for (const by of ['step', 'confidence'])
    for (let x = 0; x <= 1; x += .1) {
        document.body.dataset.colors = by;
        cell.style.setProperty('--step', x);
        cell.style.setProperty('--sure', x);
        const style = getComputedStyle(cell);
        const [a, b] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
        least = Math.min(least, (b + .05) / (a + .05));
    }
return least"""


def test_text_can_be_read_on_every_color(opened):
    """WCAG 2 AA: a contrast of at least 4.5 to 1."""
    assert opened.run(CONTRAST) >= 4.5
    opened.press("t")
    assert opened.run(CONTRAST) >= 4.5


def test_a_narrow_window_does_not_scroll_sideways(opened):
    opened.size(360, 700)
    assert opened.run("return document.documentElement.scrollWidth <= innerWidth")
    opened.run("show(2); describe(cells[15])")  # near the right edge
    right = "return document.getElementById('card').getBoundingClientRect().right"
    assert opened.run(right) <= opened.run("return document.documentElement.clientWidth")


def test_a_thousand_tokens_and_steps(chromium, tmp_path):
    tok = Tok("word ", "\n    ")
    ids = tok.ids("word ", "word ", "word ", "\n    ") * 250
    order = list(range(1000))
    random.Random(3).shuffle(order)
    trace = trace_of(tok, [[BOS] + [None] * 1000], steps_of(tok, [[i] for i in order], ids, 1))
    write_page(tmp_path / "page.html", trace)
    chromium.open(tmp_path / "page.html")
    text = "<bos>" + tok.decode(ids)
    assert shown(chromium) == text and current(chromium) == 1000
    for step in (0, 250, 1000):
        chromium.run("show(arguments[0])", step)
        written = {order[i] for i in range(step)}
        expected = "".join(tok.decode([i]) if n in written else "░" for n, i in enumerate(ids))
        assert shown(chromium) == "<bos>" + expected
    chromium.run("document.getElementById('speed').value = '60'; show(940); play()")
    chromium.wait("return step === 1000 && !playing")
