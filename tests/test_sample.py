"""The command line of decoding: what is printed in every mode, what is read and written, where it
stops, and one sentence for every mistake. How tokens are chosen is tested in test_decode.py.
"""
import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import write_tiny_run

import decode
import infill
import prompts
import sample
import watch
from configurator import Mistake, visible
from diffusion import Recipe
from huggingface import load, load_tokenizer, write_model
from model import ModelConfig, Transformer

CHAT = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
FILE = "def area(r):\n    # first\n    # second\n    return r\n"


@pytest.fixture
def run(data_folder, tmp_path):
    """A block model, K = 4."""
    return write_tiny_run(tmp_path / "out" / "run", data_folder)


@pytest.fixture
def bidirectional(data_folder, tmp_path):
    return write_tiny_run(tmp_path / "out" / "both", data_folder, objective="bidirectional")


@pytest.fixture
def fim(data_folder, tmp_path):
    """A random block model with FIM tokens, which is said to know them."""
    tok = load_tokenizer(data_folder, add_fim=True)
    tok.fim_trained = True
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tok.vocab_size, 16, 2, 2, 1, 8, 24, 64))
    folder = tmp_path / "fim"
    folder.mkdir()
    write_model(folder, model, tok, Recipe("block", False, 4, mask_id=tok.mask_id))
    return folder


@pytest.fixture
def file(tmp_path):
    """A file with four lines."""
    path = tmp_path / "area.py"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def handler_restored():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(capsys):
    """Call sample.py with these words: (exit status, stdout, stderr)."""
    def call(folder, *words):
        capsys.readouterr()
        status = sample.main([f"--init_from={folder}", "--device=cpu", *words])
        out, err = capsys.readouterr()
        return status, out, "".join(line + "\n" for line in err.splitlines()
                                    if not line.startswith("attention: "))
    return call


def stdin_of(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def texts_of(out):
    """The texts after `--- sample i of n`."""
    parts = re.split(r"^--- sample \d+ of \d+\n", out, flags=re.M)[1:]
    parts[-1] = re.split(r"^--- \d+ tokens in ", parts[-1], flags=re.M)[0]
    return [part.removesuffix("\n") for part in parts]


def interrupt_at(monkeypatch, *steps):
    """A real SIGINT after each of these steps, counted over the whole run."""
    taken, write = [], decode.write

    def writing(texts, step):
        write(texts, step)
        taken.append(step)
        if len(taken) in steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sample, "write", writing)


# --- one prompt -----------------------------------------------------------------------------------

def test_the_header_says_all_that_decides_the_text(run, command, monkeypatch):
    monkeypatch.chdir(run.parents[2])  # the newest run is found by itself
    status, out, err = command("", "--prompt=def f(x):", "--max_new_tokens=12", "--samples=2",
                               "--temperature=1", "--steps=2", "--stop=['\\n\\n\\n']", "--seed=7")
    assert (status, err) == (0, "")
    first, second, *_ = out.splitlines()
    assert first == "--- out/run/step_0000001: block, K = 4, no shift, mask 2, float32 on cpu"
    assert second == (r"--- confidence='max_prob', steps=2, block_length=4, cache='exact', "
                      r"temperature=1.0, stop=('\n\n\n',), seed=7, max_new_tokens=12")
    assert out.count("def f(x):") == 2 and "--- sample 2 of 2\n" in out
    assert re.search(r"^--- \d+ tokens in [\d.]+ s, \d+ tokens/s, [\d.]+ tokens per forward$",
                     out.splitlines()[-1])


def test_a_setting_that_does_not_matter_is_not_printed(run, command):
    _, out, _ = command(run, "--threshold=0.9", "--max_new_tokens=4", "--graphs=false")
    assert "threshold=0.9" in out and "steps" not in out and "graphs" not in out
    assert "top_p" not in out and "stop=" not in out


def test_the_text_is_what_decode_writes(run, command):
    words = ["--prompt=def f(x):", "--max_new_tokens=12", "--samples=3", "--temperature=1"]
    _, out, _ = command(run, *words)
    model, tok, recipe = load(run)
    prompt = [tok.bos_id, *tok.encode("def f(x):")]
    ids = decode.generate(model, tok, recipe, [prompt] * 3, decode.Decoding(temperature=1), 12)
    assert [tok.decode(i) for i in ids] == [
        text.removeprefix("def f(x):") for text in texts_of(out)]
    assert len({tuple(i) for i in ids}) == 3


def test_tokens_and_forwards_are_counted(run, command):
    """<bos> and three tokens fill a block; two blocks of four, in 2 and in 1 forward each."""
    tok = load_tokenizer(run)
    assert len(tok.encode("xxx")) == 3
    words = ["--prompt=xxx", "--max_new_tokens=8", "--samples=2"]
    for steps, speed in ((2, "2.00"), (1, "4.00"), (0, "1.00")):
        _, out, _ = command(run, *words, f"--steps={steps}")
        assert "--- 16 tokens in" in out and f" {speed} tokens per forward" in out


def test_a_stop_id_counts_and_is_not_printed(run, command):
    model, tok, recipe = load(run)
    with torch.no_grad():
        model.lm_head.weight[tok.encode("x")[0]] *= 0
        model.lm_head.weight[tok.encode("y")[0]] *= 0
        model.lm_head.weight[tok.eos_id] = 9 * model.embed_tokens.weight[tok.mask_id]
    write_model(run, model, tok, recipe)
    _, out, _ = command(run, "--prompt=xxx", "--max_new_tokens=30")
    assert texts_of(out) == ["xxx"]
    assert re.search(r"--- 1 tokens in .* tokens per forward\n", out)


def test_all_of_stdin_is_the_prompt(run, command, monkeypatch):
    stdin_of(monkeypatch, "def é():\n    é\n".encode())
    _, out, _ = command(run, "--prompt=-", "--max_new_tokens=3")
    assert texts_of(out) == ["def é():\n    é\nxxx"]


def test_a_completion_is_cut_at_a_stop_string(run, command):
    _, out, _ = command(run, "--prompt=x", "--max_new_tokens=30", '--stop=["xxx", "y"]')
    assert texts_of(out) == ["x"]
    _, out, _ = command(run, "--prompt=xxx", "--max_new_tokens=5", '--stop=["y"]')
    assert texts_of(out) == ["xxxxxxxx"]  # the prompt's own text ends nothing


@pytest.mark.parametrize("forwards", [1, 2, 6])
def test_ctrl_c_prints_what_is_written(run, command, monkeypatch, forwards):
    words = ["--prompt=xxx", "--max_new_tokens=40", "--temperature=1"]
    words.append("--confidence=left_to_right")
    _, out, _ = command(run, *words)
    whole, = texts_of(out)
    interrupt_at(monkeypatch, forwards)
    status, out, _ = command(run, *words)
    part, = texts_of(out)
    assert status == 130 and whole.startswith(part) and len(part) < len(whole)
    assert f"--- {forwards} tokens in" in out and out.endswith("tokens per forward, stopped\n")


def test_a_second_ctrl_c_ends_the_program(run, command, monkeypatch):
    look = []

    def never_stops(texts, step):
        look.append(step)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sample, "write", never_stops)
    with pytest.raises(SystemExit) as left:
        command(run, "--max_new_tokens=9")
    assert left.value.code == 130 and len(look) == 1


# --- streaming ------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    """Remembers what was on the screen each time it was flushed."""
    encoding = "utf-8"

    def __init__(self):
        super().__init__()
        self.screens = []

    def isatty(self):
        return True

    def flush(self):
        self.screens.append(self.getvalue())


@pytest.mark.parametrize("words", [
    [], ["--steps=1"], ["--threshold=0.1"], ["--remask=1"], ["--temperature=1", "--remask=2"],
    ["--verified=true", "--temperature=1"], ["--temperature=1", '--stop=["x", "=="]'],
])
@pytest.mark.parametrize("objective", ["block", "bidirectional", "ar_diffusion"])
def test_what_a_terminal_shows_stays_and_is_the_text_that_a_file_gets(run, command, objective,
                                                                      words):
    if objective != "block" and "--verified=true" in words:
        words = []
    words = [*words, f"--objective={objective}", "--max_new_tokens=24", "--block_length=4"]
    _, expected, _ = command(run, *words)
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert sample.main([f"--init_from={run}", "--device=cpu", *words]) == 0
    shown = terminal.getvalue()
    assert shown.rpartition("---")[0] == visible(expected.rpartition("---")[0])
    assert all(shown.startswith(screen) for screen in terminal.screens)
    partly = [screen for screen in terminal.screens if "sample 1" in screen]
    assert len(set(partly)) > (2 if "--stop" not in str(words) else 0)


class Bytes:
    """A tokenizer whose ids are bytes; 256 ends a text."""
    stop_ids = frozenset({256})

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


class Order:
    """What Stream reads of a Step."""
    positions = torch.tensor([[0]])


@settings(deadline=None)
@given(st.text() | st.binary(), st.lists(st.text(max_size=3).filter(bool), max_size=2),
       st.randoms(use_true_random=False))
def test_a_stream_prints_the_text_in_whatever_order_it_is_written(text, stops, random):
    ids = list(text.encode() if isinstance(text, str) else text)
    tok, how = Bytes(), sample.Config(stop=tuple(stops))
    gap = sample.Gap("before ", " after", [1, 2], [3], [len(ids)])
    whole = visible(gap.text([1, 2, *ids, 3], tok, how.stop))  # no control characters
    written, out = [1, 2, *[None] * len(ids), 3], io.StringIO()
    with contextlib.redirect_stdout(out):
        stream = sample.Stream(gap, tok, how)
        for place in random.sample(range(len(ids)), len(ids)):
            written[2 + place] = ids[place]
            stream.see(Order, [written])
            assert ("before " + whole).startswith(out.getvalue())
        if not ids:
            stream.see(Order, [written])
        stream.finish(whole)
    assert out.getvalue() == "before " + whole + " after\n"


def test_a_text_from_left_to_right_is_printed_at_once(capsys):
    ids = list("aé✓b".encode())
    gap = sample.Gap("", "", [], [], [len(ids)])
    stream = sample.Stream(gap, Bytes(), sample.Config())
    screens, written = [], [None] * len(ids)
    for place, i in enumerate(ids):
        written[place] = i
        stream.see(Order, [written])
        screens.append(capsys.readouterr().out)
    assert screens == ["a", "", "é", "", "", "✓", "b"]


# --- chat -----------------------------------------------------------------------------------------

def test_a_chat_is_a_prompt_in_the_template_and_the_answer_alone_is_printed(run, command,
                                                                            monkeypatch):
    (run / "chat_template.jinja").write_text(CHAT)
    asked, decoding = [], decode.decode
    monkeypatch.setattr(sample, "decode", lambda *a: asked.append(a[3]) or decoding(*a))
    _, out, _ = command(run, "--chat=true", "--prompt=write <FILL> f", "--max_new_tokens=5")
    tok = load_tokenizer(run)
    ids = tok.encode("user: write <FILL> f\nassistant: ")  # in a chat it marks no gap
    assert asked == [[[*ids, *[None] * 5]]]
    assert texts_of(out) == ["xxxxx"]


def test_each_turn_sees_those_before_it(run, capsys, monkeypatch):
    (run / "chat_template.jinja").write_text(CHAT)
    asked, decoding = [], decode.decode
    monkeypatch.setattr(sample, "decode", lambda *a: asked.append(a[3:]) or decoding(*a))
    stdin_of(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    typed = iter(["a", "b", ""])
    monkeypatch.setattr("builtins.input", lambda sign: next(typed))
    assert sample.main([f"--init_from={run}", "--chat=true", "--max_new_tokens=3"]) == 0
    tok = load_tokenizer(run)
    first = "user: a\nassistant: "
    second = "user: a\nassistant: xxx\nuser: b\nassistant: "
    assert [texts for texts, *_ in asked] == [[[*tok.encode(text), None, None, None]]
                                              for text in (first, second)]
    assert [list(rows) for *_, rows in asked] == [[0], [2]]  # other noise in each turn


def test_a_special_tokens_name_is_text_in_a_prompt_and_that_token_in_a_chat(run):
    (run / "chat_template.jinja").write_text("{{ messages[0].content }}")
    loaded = load(run)
    tok = loaded[1]
    gap = sample.prompt_gap("a<mask>b", loaded, sample.Config())
    assert tok.mask_id not in gap.left and tok.decode(gap.left) == "a<mask>b"
    gap = sample.prompt_gap("a<mask>b", loaded, sample.Config(chat=True))
    assert tok.mask_id in gap.left


# --- many prompts ---------------------------------------------------------------------------------

def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_each_gives_a_json_object_each(run, command, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("def f(x):\n\n{} = 1\r\né\n", newline="")
    status, out, err = command(run, f"--prompts={path}", "--max_new_tokens=4", "--samples=2")
    assert status == 0 and lines_of(out) == [
        {"prompt": prompt, "completion": "xxxx", "index": index, "sample": sample}
        for index, prompt in enumerate(["def f(x):", "{} = 1", "é"]) for sample in range(2)]
    assert f"--- {run}: block, K = 4" in err and "temperature=0.0" in err and "6/6" in err


def test_json_objects_keep_what_else_they_hold(run, command, tmp_path, monkeypatch):
    entries = [{"task_id": "HumanEval/0", "prompt": "def f():\n"}, {"prompt": "x"}]
    stdin_of(monkeypatch, b"\xef\xbb\xbf" + "\n".join(map(json.dumps, entries)).encode())
    out = tmp_path / "out.jsonl"
    status, printed, _ = command(run, "--prompts=-", f"--out={out}", "--max_new_tokens=2")
    assert (status, printed) == (0, "")
    assert lines_of(out.read_text()) == [
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "index": 0, "completion": "xx",
         "sample": 0},
        {"prompt": "x", "completion": "xx", "index": 1, "sample": 0}]
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("objective", ["block", "bidirectional", "ar_diffusion"])
def test_batches_change_no_text(run, command, tmp_path, objective):
    path = tmp_path / "prompts.txt"
    path.write_text("".join("x = " * n + "1\n" for n in (1, 9, 2, 12, 3)))
    words = [f"--prompts={path}", "--max_new_tokens=6", "--samples=3", "--temperature=1",
             f"--objective={objective}"]
    _, expected, _ = command(run, *words, "--batch=1")
    for batch in (2, 7, 16):
        assert command(run, *words, f"--batch={batch}")[1] == expected
    assert len({line["completion"] for line in lines_of(expected)}) > 10
    path.write_text("x = 1\n")
    _, out, _ = command(run, "--prompt=x = 1", *words[1:])
    first = [line["prompt"] + line["completion"] for line in lines_of(expected)[:3]]
    assert texts_of(out) == first  # a prompt of its own is the file's first


def test_stop_strings_and_the_context_end_completions(run, command, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("x\n" + "y" * 60 + "\n")
    _, out, _ = command(run, f"--prompts={path}", "--max_new_tokens=20", "--steps=4")
    assert [len(line["completion"]) for line in lines_of(out)] == [20, 3]  # <bos> and 60 of 64
    _, out, _ = command(run, f"--prompts={path}", "--max_new_tokens=20", "--stop=['xx']")
    assert [line["completion"] for line in lines_of(out)] == ["", ""]


@pytest.mark.parametrize("steps, done", [(1, 0), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_an_interrupted_run_keeps_what_is_complete(run, command, tmp_path, monkeypatch, steps,
                                                   done):
    """Two at once: one of 8 tokens, one of 9, so it takes a step more."""
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("xxx\n" * 5)
    out.write_text("older")
    entries = prompts.read_prompts(str(path))
    assert len(entries) == 5
    gap, lengths = sample.prompt_gap, iter([8, 9, 8, 9, 8])

    def of_two_lengths(*a):
        found = gap(*a)
        found.lengths = [next(lengths)]
        return found

    monkeypatch.setattr(sample, "prompt_gap", of_two_lengths)
    interrupt_at(monkeypatch, steps)
    words = [f"--prompts={path}", f"--out={out}", "--batch=2", "--objective=ar"]
    if done == 0:
        with pytest.raises(SystemExit) as left:
            command(run, *words)
        assert left.value.code == 130 and out.read_text() == "older"
    else:
        assert command(run, *words)[0] == 130
        assert [line["index"] for line in lines_of(out.read_text())] == list(range(done))
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_failure_in_the_middle_keeps_what_is_done(run, command, tmp_path, monkeypatch):
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("x\n" * 5)
    calls, writing = [], sample.run

    def failing(*a):
        calls.append(a)
        if len(calls) == 3:
            raise MemoryError
        return writing(*a)

    monkeypatch.setattr(sample, "run", failing)
    with pytest.raises(MemoryError):
        command(run, f"--prompts={path}", f"--out={out}", "--batch=1", "--max_new_tokens=3")
    assert len(lines_of(out.read_text())) == 2


@pytest.mark.parametrize("text, says", [
    ("", "has no prompts: write one a line"),
    ("\n \n", "has no prompts: write one a line"),
    ("x\n" + "y" * 90, "line 2 of .*: the prompt has 91 tokens, the model's context only 64"),
    ('{"prompt": "x"}\nx', "line 2 of .* is not readable JSON"),
    ('{"prompt": "x"}\n[1]', "line 2 of .* holds a list, not an object"),
    ('{"prompt": 5}', "line 1 of .* must be a JSON object"),
    ('{"text": "x"}', "line 1 of .* must be a JSON object"),
    ('{"prompt": " "}', "line 1 of .*: the prompt is empty"),
    ('{"prompt": "x", "a": NaN}', "line 1 of .* is not readable JSON: NaN is not a finite number"),
    ('{"prompt": "\\ud800"}', "line 1 of .*: the text is not Unicode"),
    ('{"prompt": ' + "[" * 100_000, "line 1 of .* is not readable JSON"),
])
def test_a_mistake_in_a_file_of_prompts_names_its_line(run, tmp_path, monkeypatch, text, says):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    monkeypatch.setattr(sample, "decode", None)
    with pytest.raises(Mistake, match=says) as caught:
        sample.main([f"--init_from={run}", f"--prompts={path}"])
    assert "\n" not in str(caught.value)


# --- infilling ------------------------------------------------------------------------------------

def test_lines_are_replaced_between_both_sides(bidirectional, command, file):
    before = file.stat()
    _, out, _ = command(bidirectional, f"--infill={file}", "--lines=2:3", "--fill_tokens=5")
    assert texts_of(out) == ["def area(r):\nxxxxx\n    return r\n"]
    assert file.read_text() == FILE and file.stat().st_mtime_ns == before.st_mtime_ns


def test_the_model_sees_both_sides_and_the_end(bidirectional, command, file, monkeypatch):
    asked, decoding = [], decode.decode
    monkeypatch.setattr(sample, "decode", lambda *a: asked.append(a[3]) or decoding(*a))
    command(bidirectional, f"--infill={file}", "--lines=2:3", "--fill_tokens=3")
    tok = load_tokenizer(bidirectional)
    left, right = tok.encode("def area(r):\n"), tok.encode("\n    return r\n")
    assert asked == [[[tok.bos_id, *left, None, None, None, *right, tok.eos_id]]]


@pytest.mark.parametrize("marked, expected", [
    ("a = <FILL>\nb", "a = xx\nb"), ("<FILL>", "xx"), ("<FILL>\n", "xx\n"),
    ("a\n<FILL>", "a\nxx"),
])
def test_a_marker_is_replaced_in_a_file_and_in_a_prompt(bidirectional, command, tmp_path, marked,
                                                        expected):
    path = tmp_path / "marked.py"
    path.write_text(marked)
    _, out, _ = command(bidirectional, f"--infill={path}", "--fill_tokens=2")
    assert texts_of(out) == [expected]
    _, out, _ = command(bidirectional, f"--prompt={marked}", "--fill_tokens=2")
    assert texts_of(out) == [expected]


def test_the_likeliest_length_is_chosen(bidirectional, command):
    """Against the probabilities that watch.py notes, one length at a time."""
    words = ["--prompt=x =<FILL>y", "--max_new_tokens=11", "--temperature=1"]
    status, out, _ = command(bidirectional, *words, "--samples=3")
    loaded = load(bidirectional)
    model, tok, recipe = loaded
    lengths, chosen = [1, 2, 4, 8, 11], re.findall(r"--- length (\d+) is the likeliest", out)
    assert status == 0 and len(chosen) == 3
    for sampled in range(3):
        means = {}
        for i, length in enumerate(lengths):
            cfg = sample.Config(fill_tokens=length, temperature=1)
            gap = infill.gap_of("x =", "y", loaded, cfg)
            texts = [gap.ids(length)]
            trace = watch.Trace(texts, tok)
            steps = decode.decode(model, tok, recipe, texts, cfg, [sampled * len(lengths) + i])
            list(trace.record(steps))
            logs = [math.log(w.probability) for m in trace.rows[0] for w in m.written]
            assert len(logs) == length
            means[length] = sum(logs) / length
        printed = out.split("by length: ")[1 + sampled].splitlines()[0]
        found = {int(n): float(mean) for n, mean in re.findall(r"(\d+): (-[\d.]+)", printed)}
        assert found == pytest.approx(means, abs=6e-4)
        assert int(chosen[sampled]) == max(means, key=means.get)
    assert "max_new_tokens=11" in out


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", ["true", "false"])
def test_approximate_caches_take_lengths_side_by_side_too(bidirectional, command, cache, shift):
    words = ["--prompt=x =<FILL>y", "--max_new_tokens=11", f"--cache={cache}", f"--shift={shift}"]
    for more in ([], ["--block_length=4"]):
        status, out, _ = command(bidirectional, *words, *more)
        assert status == 0 and "is the likeliest" in out


def test_a_block_model_gets_suffix_prefix_middle(fim, command, monkeypatch, file):
    asked, decoding = [], decode.decode
    monkeypatch.setattr(sample, "decode", lambda *a: asked.append(a[3]) or decoding(*a))
    status, out, _ = command(fim, f"--infill={file}", "--lines=2:3", "--max_new_tokens=6")
    tok = load_tokenizer(fim)
    prefix, suffix, middle = tok.fim
    left, right = tok.encode("def area(r):\n"), tok.encode("\n    return r\n")
    assert asked == [[[tok.bos_id, suffix, *right, prefix, *left, middle, *[None] * 6]]]
    text, = texts_of(out)
    assert status == 0 and text.startswith("def area(r):\n") and text.endswith("\n    return r\n")
    assert "not known to be trained" not in out


@pytest.mark.parametrize("objective", ["ar", "ar_diffusion", "block"])
def test_a_folder_that_does_not_know_gaps_is_named(fim, command, objective):
    config = json.loads((fim / "config.json").read_text()) | {"fim_trained": False}
    (fim / "config.json").write_text(json.dumps(config))
    words = ["--prompt=a<FILL>b", "--fill_tokens=4", f"--objective={objective}"]
    if objective == "ar":
        words.append("--shift=true")
    _, out, _ = command(fim, *words)
    assert out.count("is not known to be trained to fill gaps: expect little\n") == 1


@pytest.mark.parametrize("text, lines", [
    (FILE, "2:3"), (FILE, "1:1"), (FILE, "4:4"), (FILE, "1:4"), (FILE.rstrip("\n"), "4:4"),
    (FILE.replace("\n", "\r\n"), "2:3"), (FILE.replace("\n", "\r\n"), "4:4"), ("a\n", "1:1"),
    ("a\fb\x1cc\u2028d\n\n", "1:1"), (FILE, ""),
])
@pytest.mark.parametrize("tool", [["patch", "-p1", "--binary"], ["git", "apply"]])
def test_a_diff_makes_the_file_that_is_printed_without_it(bidirectional, command, tmp_path,
                                                          monkeypatch, text, lines, tool):
    if shutil.which(tool[0]) is None:
        pytest.skip(f"there is no {tool[0]}")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.py"
    path.write_bytes((text if lines else text.replace("# first", "<FILL>")).encode())
    words = ["--infill=a.py", f"--lines={lines}", "--fill_tokens=3"]
    _, out, _ = command(bidirectional, *words)
    status, change, notes = command(bidirectional, *words, "--diff=true")
    assert status == 0 and "--- sample 1 of 1" in notes and "tokens/s" in notes
    subprocess.run(tool, check=True, cwd=tmp_path, input=change.encode(), capture_output=True)
    now, = texts_of(out)
    assert path.read_bytes().decode() == now


def test_a_gap_that_is_filled_with_what_was_there_has_no_diff():
    assert infill.diff("a.py", FILE, FILE) == ""


@settings(deadline=None)
@given(st.text(alphabet="ab\n\r\f\u2028", min_size=1, max_size=20), st.data())
def test_the_lines_before_and_after_a_gap_stay(tmp_path_factory, text, data):
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    first = data.draw(st.integers(1, len(lines)))
    last = data.draw(st.integers(first, len(lines)))
    path = tmp_path_factory.getbasetemp() / "gap.py"
    path.write_bytes(text.encode())
    read, before, after = infill.read_file(path, f"{first}:{last}")
    assert read == text and text.startswith(before) and text.endswith(after)
    assert before.count("\n") == first - 1 and (before + "x" + after).count("\n") == (
        text.count("\n") - (last - first))
    replaced = text[len(before):len(text) - len(after)]
    assert (replaced + after).startswith("".join(lines[first - 1:last]))
    assert after == "" or after.startswith(("\n", "\r\n"))


# --- watching -------------------------------------------------------------------------------------

def test_the_text_is_drawn_as_it_is_written(run, command):
    _, out, _ = command(run, "--prompt=xxx", "--max_new_tokens=8", "--animate=true")
    frames = re.findall(r"^--- step \d+: (\d+) of 8 tokens", out, re.M)
    assert frames == sorted(frames, key=int) and frames[-1] == "8" and len(frames) > 3
    assert texts_of(out) == ["x" * 11]


def test_a_page_and_the_figures_of_how_it_was_written(run, command, tmp_path):
    path = tmp_path / "trace.html"
    _, out, _ = command(run, "--prompt=xxx", "--max_new_tokens=8", f"--html={path}",
                        "--stats=true")
    page = path.read_text()
    assert "<html" in page and "block_length" in page and f"--- {path} shows" in out
    assert "AR-ness   local  global" in out and "tokens per forward of a text" in out


def test_the_figures_of_a_file_of_prompts_are_of_all_its_texts(run, command, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("x\n" * 5)
    words = [f"--prompts={path}", "--stats=true", "--max_new_tokens=6", "--batch=2"]
    _, out, err = command(run, *words, "--confidence=left_to_right")
    assert len(lines_of(out)) == 5
    assert "5 texts: 30 tokens in" in err and re.search(r"k = 1 +1.000 +1.000\n", err)


# --- mistakes -------------------------------------------------------------------------------------

GAP = "--prompt=a<FILL>b"


@pytest.mark.parametrize("arguments, says", [
    (["--prompt="], "the prompt is empty"),
    (["--prompt=   "], "the prompt is empty"),
    (["--prompt=" + "def f(x):\n" * 100], "the model's context only 64"),
    (["--prompt=x\udcff"], "the text is not Unicode: character 1 is"),
    (["--chat=true", "--prompt=x"], "has no chat template"),
    (["--prompt", "--samples=2"], "--prompt needs a value, and '--samples=2' is another setting"),
    (["--steps=5"], "more than the 4 tokens of a block"),
    (["--steps=2", "--threshold=0.5"], "threshold and steps each say how many"),
    (["--confidence=random", "--threshold=0.5"], "confidence='random' does not fit threshold"),
    (["--confidence=random", "--remask=1"], "remask=1 needs a confidence of the model's"),
    (["--confidence=best"], "does not fit: confidence is one of max_prob, margin"),
    (["--threshold=nan"], "threshold='nan' does not fit: threshold is a float from 0 to 1"),
    (["--threshold=1.5"], "threshold=1.5 does not fit: threshold is a float from 0 to 1"),
    (["--entropy_bound=1e999"], "entropy_bound=inf does not fit: entropy_bound is a float from 0"),
    (["--top_p=0.5"], "top_p and top_k change nothing at temperature 0"),
    (["--top_p=0", "--temperature=1"], "top_p=0 does not fit"),
    (["--block_length=3"], "block_length=3 must divide block_size=4"),
    (["--cache=dual"], "cache='dual' does not fit objective='block'"),
    (["--stop=x"], "stop='x' does not fit: stop is a list in brackets"),
    (["--stop=['']"], "must be a list of texts that are not empty"),
    (["--verified=true", "--block_size=16"], "verified needs blocks of at most 8 tokens, not 16"),
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
    (["--prompts=/nowhere.txt"], "/nowhere.txt is missing"),
    (["--prompts=p.txt", "--prompt=x"], "prompt and prompts each say what to write: give one"),
    (["--prompts=p.txt", "--infill=x"], "prompts and infill each say what to write: give one"),
    (["--prompts=\0"], r"prompts='\\x00' cannot be the name of a file"),
    (["--prompts=\ud800"], r"prompts='\\ud800' cannot be the name of a file"),
    (["--html=" + "a" * 300], "cannot be the name of a file"),
    (["--html=/nowhere/trace.html"], "/nowhere/trace.html cannot be written"),
    (["--prompts=x", "--out=/nowhere/x.jsonl"], "/nowhere/x.jsonl cannot be written"),
    (["--out=x.jsonl"], "out='x.jsonl' goes with --prompts=FILE"),
    (["--lines=1:2"], "lines='1:2' goes with --infill=FILE"),
    (["--animate=true", "--samples=2"], "animate shows a single text"),
    (["--prompts=x", "--html=x.html"], "html shows a single text"),
    (["--diff=true"], "diff and fill_tokens are for a gap"),
    (["--fill_tokens=3"], "diff and fill_tokens are for a gap"),
    (["--prompt=<FILL> <FILL>"], "the prompt has 2 <FILL> markers: one gap at a time"),
    ([GAP], "sees nothing to the right of a gap, and .* has no FIM tokens"),
    ([GAP, "--objective=bidirectional", "--stats=true"], "give it with --fill_tokens"),
    ([GAP, "--objective=bidirectional", "--fill_tokens=63"], "there is no room for 63 more"),
    (["--prompt=" + "ab" * 99 + "<FILL>", "--objective=bidirectional"],
     "the text around the gap has .* tokens, the model's context only 64: there is no room for 1"),
    (["--infill=x", "--chat=true"], "chat and infill exclude each other"),
    (["--infill=/nowhere.py"], "/nowhere.py is missing"),
])
def test_mistakes_end_with_a_one_line_message_before_anything_is_sampled(run, monkeypatch,
                                                                         arguments, says):
    # so that asking for it is a mistake everywhere
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(sample, "decode", None)
    with pytest.raises(Mistake, match=says) as caught:
        sample.main([f"--init_from={run}", *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content, lines, says", [
    (FILE.encode(), "0:1", "lines='0:1' must be the first and the last line"),
    (FILE.encode(), "3:2", "lines='3:2' must be the first and the last line"),
    (FILE.encode(), "2", "lines='2' must be the first and the last line"),
    (FILE.encode(), "-1:2", "lines='-1:2' must be"),
    (FILE.encode(), "1:²", "lines='1:²' must be"),
    (FILE.encode(), "1:" + "9" * 5000, "must be the first and the last line"),
    (FILE.encode(), "1:5", "lines=1:5 is out of range: .* has 4 lines"),
    (b"", "1:1", "out of range: .* has 0 lines"),
    (FILE.encode(), "", "has no <FILL>: write it where the gap is, or name the --lines"),
    (b"<FILL>\n<FILL>", "", "has 2 <FILL> markers: one gap at a time"),
    (b"\x80abc", "1:1", "is not UTF-8 text: invalid start byte at byte 0"),
    (b"\x7fELF\0\0", "1:1", "holds zero bytes: it is no text"),
])
def test_a_gap_that_is_not_there_is_one_sentence(bidirectional, tmp_path, content, lines, says):
    path = tmp_path / "file.py"
    path.write_bytes(content)
    with pytest.raises(Mistake, match=says) as caught:
        sample.main([f"--init_from={bidirectional}", f"--infill={path}", f"--lines={lines}"])
    assert "\n" not in str(caught.value)


def test_what_stdin_holds_may_be_a_mistake(run, monkeypatch):
    for data, says in ((b"", "the prompt is empty"), (b"\xff", "stdin is not UTF-8 text"),
                       (b"x" * 9000, "the model's context only 64")):
        stdin_of(monkeypatch, data)
        with pytest.raises(Mistake, match=says):
            sample.main([f"--init_from={run}", "--prompt=-"])


def test_nothing_before_a_gap_needs_a_bos(bidirectional, command):
    config = json.loads((bidirectional / "tokenizer_config.json").read_text())
    config["add_bos_token"] = False
    (bidirectional / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(Mistake, match="nothing stands before the gap, and .* has no <bos>"):
        command(bidirectional, "--prompt=<FILL>x")


def test_a_folder_without_a_mask_is_one_sentence(run):
    config = json.loads((run / "tokenizer_config.json").read_text())
    config["mask_token"] = None
    (run / "tokenizer_config.json").write_text(json.dumps(config))
    config = json.loads((run / "config.json").read_text())
    config["mask_token_id"] = None
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(Mistake, match="needs a mask token") as caught:
        sample.main([f"--init_from={run}"])
    assert "\n" not in str(caught.value)


def test_a_prompt_of_no_tokens_is_one_sentence(run):
    (run / "chat_template.jinja").write_text("{# #}")
    with pytest.raises(Mistake, match="the prompt has no tokens"):
        sample.main([f"--init_from={run}", "--chat=true", "--prompt=x"])


def test_what_is_piped_into_a_chat_is_its_message(run, command, monkeypatch):
    (run / "chat_template.jinja").write_text("{{ messages[0].content }}")
    stdin_of(monkeypatch, b"hello")
    said = []
    monkeypatch.setattr(sample, "prompt_gap", lambda text, *_: said.append(text) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(run, "--chat=true")
    assert said == ["hello"]


def test_a_model_cannot_command_the_terminal():
    text = "\x1b]0;title\x07\x1b[2J a\tb\n\u202e"
    assert visible(text) == "·]0;title··[2J a\tb\n·"


@pytest.mark.parametrize("key", ["completion", "index", "sample"])
def test_no_field_of_an_object_is_replaced(run, tmp_path, key):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x", key: 1}))
    with pytest.raises(Mistake, match=f"has '{key}' already"):
        sample.main([f"--init_from={run}", f"--prompts={path}"])


def test_neither_the_prompts_nor_anything_but_a_file_is_replaced(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("x")
    with pytest.raises(Mistake, match="is what is read, too"):
        sample.main([f"--init_from={run}", f"--prompts={path}", f"--out={path}"])
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "."):
        with pytest.raises(Mistake, match="is not a regular file, and is not replaced"):
            sample.main([f"--init_from={run}", f"--prompts={path}", f"--out={tmp_path / name}"])
    assert path.read_text() == "x"


def test_logits_that_are_not_finite_are_one_sentence(run):
    model, tok, recipe = load(run)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    write_model(run, model, tok, recipe)
    with pytest.raises(Mistake, match="logits are not finite") as caught:
        sample.main([f"--init_from={run}"])
    assert "\n" not in str(caught.value)


def test_a_config_file_cannot_make_the_temperature_nan(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "decode", None)
    (tmp_path / "hot.py").write_text("temperature = float('nan')\n")
    with pytest.raises(Mistake, match="temperature=nan does not fit: temperature is a float"):
        sample.main([str(tmp_path / "hot.py"), f"--init_from={run}"])
