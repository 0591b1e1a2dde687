"""1,000 command lines of train.py and sample.py, drawn with a fixed seed: each one works, prints
help, or ends in a one-line message."""
import contextlib
import io
import os
import signal
import sys
import types
import zlib
from dataclasses import fields
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import settings_of, train

import sample
import train as script
from configurator import Mistake

DRAWS = {"plan": 600, "train": 150, "sample": 250}  # how many command lines of each
NEVER = {"train": {"compile", "dry_run", "data", "out"}, "plan": {"dry_run"}, "sample": set()}

NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "3", "4", "7", "8", "32", "-1", "1e999", "-1e999", "nan",
                     "inf", "1e-400", "0.5", "1.5", "-0.0", "1e20", "1_000_0", "0x10", "1e3",
                     str(10**20), str(2**63), str(2**63 - 1), str(-(2**70)), "9" * 5000]),
    st.floats().map(repr), st.integers(-9, 9).map(str))
TEXTS = st.one_of(
    st.sampled_from(["", " ", "true", "false", "none", "None", "auto", "cpu", "mps", "cuda", "ar",
                     "block", "bidirectional", "ar_diffusion", "uniform", "count", "adafactor",
                     "full", "tensorboard", "wandb", "scratch", "resume", "\0", "\udcff", "é",
                     "<mask>", "<eos>", "<|begin|>", "~", ".", "..", "a" * 5000, "--lr", "=",
                     "lambda: 0", "__import__('os')", "1 +", "{[]: 1}", "'", "b'x'", "...",
                     "(" * 300, "[" * 5000, "-" * 3000 + "1", "1j"]),
    st.text(st.characters(exclude_characters="/"), max_size=6))
LISTS = st.recursive(NUMBERS | st.sampled_from(["'a'", "None", "True"]),
                     lambda inner: st.lists(inner, max_size=4).map(
                         lambda parts: "(" + "".join(f"{p}," for p in parts) + ")"),
                     max_leaves=8)
VALUES = NUMBERS | TEXTS | LISTS


def fitting(kind):
    """Values that a setting of this type takes, as texts; numbers are small, so that it is fast."""
    if get_origin(kind) in (Union, types.UnionType):
        return st.one_of([fitting(part) for part in get_args(kind)])
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is Annotated and get_args(kind)[0] is not str:
        plain, low, high = get_args(kind)
        if plain is int:
            return st.integers(low, min(high, low + 9)).map(str)
        return (st.floats(low, high) | st.sampled_from([low, high])).map(repr)
    if kind is bool:
        return st.sampled_from(["true", "false"])
    return LISTS if kind is tuple else TEXTS


def values_of(field):
    """Mostly of the right kind, so that more than the first check is reached."""
    fits = fitting(field.type)
    return st.one_of(fits, fits, fits, VALUES)


def word(field):
    """A setting as it may be typed: `--name=value`, with a typo, or without its value."""
    name = field.name
    typed = values_of(field).map(lambda value: [f"--{name}={value}"])
    spaced = values_of(field).map(lambda value: [f"--{name}", value])
    odd = st.sampled_from([[f"--{name[1:]}=1"], [f"--{name}"], [f"-{name}=1"], [f"--{name}s=1"],
                           ["--"], ["--=1"], [name], ["--help"], ["nothing.py"], ["--" + name * 9],
                           ["."], ["\udcff.py"], ["-h"]])
    return st.one_of(typed, typed, typed, typed, spaced, odd)


def command_lines(Config, never):
    usable = [f for f in fields(Config) if f.name not in never]
    one_word = st.sampled_from(usable).flatmap(word)
    return st.lists(one_word, min_size=1, max_size=3).map(lambda words: sum(words, []))


def outcome(main, argv):
    """'works', 'help' or 'refused'; any other end is a fault."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main(argv)
    except SystemExit as end:
        assert end.code == 0
        return "help"
    except (Mistake, OSError) as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    return "works"


def fuzz(kind, Config, check):
    """Run `check` on DRAWS[kind] command lines. Returns how many there were of each outcome."""
    count = {"works": 0, "help": 0, "refused": 0}

    @settings(max_examples=DRAWS[kind], deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(command_lines(Config, NEVER[kind]))
    def each(words):
        count[check(words)] += 1

    each()
    return count


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The current folder, for what a command line may name; no network; settings given back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)
    torch.set_num_threads(1)


def test_a_plan_of_any_settings(data_folder, empty_folder):
    """Small models, since a plan of 1,000 layers on 2^20 GPUs takes seconds."""
    def check(words):
        out = empty_folder / "run"
        return outcome(script.main, [*settings_of(data_folder, out), *words, "--dry_run=true"])

    count = fuzz("plan", script.Config, check)
    print(count)
    assert count["works"] > 100 and count["refused"] > 200
    assert list(empty_folder.iterdir()) == []


def test_a_run_with_any_settings(data_folder, empty_folder):
    def check(words):
        out = empty_folder / f"run_{len(os.listdir(empty_folder))}"
        tiny = [*settings_of(data_folder, out), "--max_steps=1", "--eval_windows=1"]
        return outcome(script.main, [*tiny, *words])

    count = fuzz("train", script.Config, check)
    print(count)
    assert count["works"] > 20 and count["refused"] > 40


# What a command line begins with: one for every mode.
MODES = [["--max_new_tokens=9"], ["--max_new_tokens=9", "--objective=bidirectional"],
         ["--max_new_tokens=9", "--prompts=prompts.txt"], ["--prompt=a <FILL> b"],
         ["--infill=gap.py", "--lines=2:2", "--objective=bidirectional", "--max_new_tokens=5"]]


def test_sampling_with_any_settings(data_folder, empty_folder, monkeypatch):
    train(data_folder, empty_folder / "run", "--max_steps=1", "--eval_every=0")
    (empty_folder / "prompts.txt").write_text("def f(x):\n\nx = 1\n")
    (empty_folder / "gap.py").write_text("a = 1\nb = 2\nc = 3\n")
    worked = set()

    def check(words):
        stdin = io.TextIOWrapper(io.BytesIO(b"def f():\n"))
        monkeypatch.setattr(sys, "stdin", stdin)
        number = zlib.crc32(repr(words).encode()) % len(MODES)  # the same whenever they are drawn
        mode = MODES[number]
        end = outcome(sample.main, [f"--init_from={empty_folder / 'run'}", *mode, *words])
        if end == "works":
            worked.add(number)
        return end

    count = fuzz("sample", sample.Config, check)
    print(count, worked)
    assert count["works"] > 20 and count["refused"] > 50 and worked >= {0, 1, 2, 4}
    assert (empty_folder / "gap.py").read_text() == "a = 1\nb = 2\nc = 3\n"


def test_the_number_of_command_lines():
    assert sum(DRAWS.values()) == 1000
