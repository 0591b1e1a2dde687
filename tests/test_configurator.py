"""configurator.py: what a setting ends up as, and what a user reads when it was written wrongly."""

import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, Optional

import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from configurator import configure

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    lr: float = 1e-3  # peak learning rate
    max_steps: int = 10  # how many updates
    compile: bool = False  # whether to compile (slow at first: worth it later)
    folder: str = "out/x"  # where it goes
    rates: tuple = ((0.0, 1.0),)  # one pair an epoch
    objective: Literal["ar", "block"] = "ar"  # what is learned
    shift: bool | None = None  # where to read
    limit: Optional[int] = None  # at most so many


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "lr": st.floats(allow_nan=False, allow_infinity=False),
    "max_steps": st.integers(),
    "compile": st.booleans(),
    "folder": st.text(st.characters(exclude_categories=["Cs"])).filter(
        lambda s: s not in ("-h", "--help")
    ),
    "rates": st.recursive(
        st.lists(NUMBERS | st.text("ab'\"\\")).map(tuple),
        lambda t: st.lists(t).map(tuple),
        max_leaves=4,
    ),
    "objective": st.sampled_from(["ar", "block"]),
    "shift": st.sampled_from([None, True, False]),
    "limit": st.none() | st.integers(),
}
SOME_VALUES = st.fixed_dictionaries({}, optional=VALUES)


@pytest.fixture(autouse=True)
def excepthook_restored(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


def config_file(folder, values):
    path = folder / "some.py"
    path.write_text("".join(f"{k} = {v!r}\n" for k, v in values.items()), encoding="utf-8")
    return str(path)


def words_of(values, spaced=False):
    """The command line that sets these values, as `--key=value` or `--key value`."""
    texts = {k: v if isinstance(v, str) else repr(v) for k, v in values.items()}
    return [w for k, t in texts.items() for w in ([f"--{k}", t] if spaced else [f"--{k}={t}"])]


def refusal(*words):
    """The message of the ValueError that these words end in: always a single line."""
    with pytest.raises(ValueError) as caught:
        configure(Config, list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run(*words, env=None):
    """Run Python on `words` from the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


@settings(max_examples=60, deadline=None)
@forall(in_file=SOME_VALUES, in_words=SOME_VALUES, spaced=st.booleans())
def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(
    folder, in_file, in_words, spaced
):
    cfg, given = configure(Config, [config_file(folder, in_file), *words_of(in_words, spaced)])
    expected = asdict(Config()) | in_file | in_words
    assert asdict(cfg) == expected
    assert {k: type(v) for k, v in asdict(cfg).items()} == {k: type(v) for k, v in expected.items()}
    assert given == set(in_file) | set(in_words)


def test_the_command_line_wins_over_a_file_that_is_named_after_it(folder):
    assert configure(Config, ["--lr=0.5", config_file(folder, {"lr": 0.25})])[0].lr == 0.5


def test_of_two_files_and_of_two_flags_the_last_one_wins(folder, tmp_path):
    first, second = (
        config_file(folder, {"lr": 0.25, "max_steps": 1}),
        config_file(tmp_path, {"lr": 0.5}),
    )
    cfg, _ = configure(Config, [first, second, "--limit=1", "--limit=2"])
    assert (cfg.lr, cfg.max_steps, cfg.limit) == (0.5, 1, 2)


def test_without_words_the_defaults_stand_and_nothing_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert configure(Config) == (Config(), set())


@settings(deadline=None)
@forall(n=st.integers(-(2**53), 2**53))
def test_a_whole_float_is_an_int_and_an_int_is_a_float_where_asked_for(n):
    cfg, _ = configure(Config, [f"--max_steps={float(n)!r}", f"--limit={float(n)!r}", f"--lr={n}"])
    assert (cfg.max_steps, cfg.limit, cfg.lr) == (n, n, float(n))
    assert [type(v) for v in (cfg.max_steps, cfg.limit, cfg.lr)] == [int, int, float]


@pytest.mark.parametrize(
    "word, value",
    [
        ("--max_steps=1e6", 1_000_000),
        ("--max_steps=1_000", 1000),
        ("--lr=-1e-3", -1e-3),
        ("--compile=true", True),
        ("--compile=FALSE", False),
        ("--shift=none", None),
        ("--shift=None", None),
        ("--rates=[[1, 2], [3, 4]]", ([1, 2], [3, 4])),
        ("--rates=()", ()),
        ("--folder=1e6", "1e6"),
        ("--folder=none", "none"),
        ("--folder=", ""),
        ("--folder=a=b", "a=b"),
    ],
)
def test_a_value_reads_as_people_write_it(word, value):
    found = getattr(configure(Config, [word])[0], word[2:].partition("=")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["none", "1", "True"])
def test_a_literal_or_optional_text_that_looks_like_python_stays_a_text(text):
    @dataclass
    class Choice:
        cache: Literal["none", "1", "True"] = "none"
        name: str | None = None

    cfg, _ = configure(Choice, [f"--cache={text}"] + ([f"--name={text}"] if text != "none" else []))
    assert cfg.cache == text and cfg.name == (None if text == "none" else text)


@pytest.mark.parametrize(
    "key, text, allowed",
    [
        ("lr", "fast", "a float"),
        ("lr", "True", "a float"),
        ("lr", "none", "a float"),
        ("max_steps", "1.5", "an int"),
        ("max_steps", "true", "an int"),
        ("max_steps", "1e400", "an int"),
        ("max_steps", "many", "an int"),
        ("compile", "1", "true or false"),
        ("compile", "yes", "true or false"),
        ("rates", "1", "a list in brackets"),
        pytest.param("rates", "{[]: 1}", "a list in brackets"),
        ("objective", "arr", "one of ar, block"),
        ("objective", "none", "one of ar, block"),
        ("shift", "maybe", "true or false or none"),
        ("limit", "0.5", "an int or none"),
    ],
)
def test_a_wrong_type_is_refused_in_one_sentence_with_the_value_and_what_is_allowed(
    key, text, allowed
):
    message = refusal(f"--{key}={text}")
    assert message.endswith(f"{key} is {allowed}")
    shown = re.search(rf"{key}=(.*) does not fit", message)[1]
    assert shown.strip("'").lower() in (text.lower(), str(float(text)) if text == "1e400" else text)


@pytest.mark.parametrize(
    "line", ["lr = 'fast'", "max_steps = True", "compile = 1", "objective = 'arr'", "folder = 3"]
)
def test_a_wrong_type_in_a_file_is_refused_just_as_on_the_command_line(tmp_path, line):
    (tmp_path / "c.py").write_text(line)
    key, _, value = line.partition(" = ")
    assert f"{key}={value} does not fit: {key} is " in refusal(str(tmp_path / "c.py"))


@settings(max_examples=60, deadline=None)
@forall(
    key=st.sampled_from([f.name for f in fields(Config) if len(f.name) > 2]),
    place=st.integers(0, 20),
    double=st.booleans(),
)
def test_an_unknown_key_names_the_nearest(folder, key, place, double):
    i = place % len(key)
    typo = key[:i] + key[i] * 2 * double + key[i + 1 :]  # one letter dropped or doubled
    assert f"unknown setting {typo!r} in the command line; did you mean {key!r}?" == refusal(
        f"--{typo}=1"
    )
    path = config_file(folder, {typo: 1})
    assert f"unknown setting {typo!r} in {path}; did you mean {key!r}?" == refusal(path)


def test_an_unknown_key_like_no_other_points_to_help():
    assert "--help" in refusal("--zzzzzzzz=1")


def test_a_key_without_its_value_is_refused():
    assert "--lr needs a value: --lr=0.001" in refusal("--max_steps=3", "--lr")
    assert "'--lr=3' is another setting" in refusal("--folder", "--lr=3")


@dataclass
class Flags:
    off: bool = False
    on: bool = True
    unset: bool | None = None
    other: int = 1


@pytest.mark.parametrize("flag", ["off", "on", "unset"])
@pytest.mark.parametrize("after", [[], ["--other=3"], ["--other", "3"], ["--on"]])
def test_a_flag_without_its_value_is_told_how_to_say_true(flag, after):
    with pytest.raises(ValueError) as error:
        configure(Flags, ["--other=2", f"--{flag}", *after])
    suggested = f"--{flag}=true"
    assert str(error.value) == f"--{flag} needs a value: {suggested}"
    assert getattr(configure(Flags, [suggested])[0], flag) is True


def test_a_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    for name in ("toy.py", "small.py"):
        (tmp_path / "config" / name).write_text("")
    assert refusal("config/tiy.py") == "no config file 'config/tiy.py'; did you mean config/toy.py?"
    assert "did you mean config/small.py?" in refusal("small.py")
    assert refusal("zzzzzz") == "no config file 'zzzzzz'"


def test_a_file_keeps_its_private_names_and_modules_and_may_compute(tmp_path):
    (tmp_path / "c.py").write_text(
        "import math\n_rows = 16\nmax_steps = _rows * 256\nlr = math.sqrt(4)\n"
    )
    cfg, given = configure(Config, [str(tmp_path / "c.py")])
    assert (cfg.max_steps, cfg.lr, given) == (4096, 2.0, {"max_steps", "lr"})


@pytest.mark.parametrize(
    "text, kind",
    [("lr = ", "SyntaxError"), ("lr = 1 / 0", "ZeroDivisionError"), ("lr = rate", "NameError")],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, text, kind):
    (tmp_path / "c.py").write_text(text)
    assert refusal(str(tmp_path / "c.py")).startswith(
        f"{tmp_path / 'c.py'} cannot be read: {kind}: "
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_prints_every_key_its_default_and_its_comment(word, capsys):
    with pytest.raises(SystemExit) as left:
        configure(Config, ["--lr=1", word])
    assert left.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    comments = [
        "peak learning rate",
        "how many updates",
        "whether to compile (slow at first: worth it later)",
        "where it goes",
        "one pair an epoch",
        "what is learned",
        "where to read",
        "at most so many",
    ]
    for f, comment in zip(fields(Config), comments, strict=True):
        at = printed.index(f"  --{f.name}={f.default}")
        assert printed[at + 1].endswith("; " + comment)


@dataclass
class Base:
    shared: int = 1  # what both have
    limit: int = 2  # of the base


@dataclass
class Derived(Base):
    own: int = 3  # its own
    limit: int = 4  # of the script


def test_help_has_inherited_settings_too_after_those_of_the_script(capsys):
    with pytest.raises(SystemExit):
        configure(Derived, ["--help"])
    lines = capsys.readouterr().out.splitlines()[2:]
    keys = [line.strip() for line in lines[::2]]
    assert keys == ["--limit=4", "--own=3", "--shared=1"]
    assert [line.split("; ", 1)[1] for line in lines[1::2]] == [
        "of the script",
        "its own",
        "what both have",
    ]


def test_inherited_settings_are_set_and_checked_like_its_own():
    assert configure(Derived, ["--shared=7", "--own=8"])[0] == Derived(shared=7, own=8)
    with pytest.raises(ValueError, match="unknown setting 'share' .* did you mean 'shared'"):
        configure(Derived, ["--share=7"])


def test_every_setting_of_sample_has_a_comment():
    lines = run("sample.py", "--help").stdout.splitlines()[2:]
    settings_, meanings = lines[::2], [line.split("; ", 1)[-1] for line in lines[1::2]]
    assert settings_[0].startswith("  --prompt=") and "  --temperature=0.0" in settings_
    missing = [key for key, meaning in zip(settings_, meanings) if not meaning.strip()]
    assert missing == []


@pytest.mark.parametrize(
    "script", [["train.py"], ["-m", "data.stdlib.prepare"]], ids=lambda s: s[-1]
)
def test_help_of_a_script_says_how_to_run_it_and_has_a_comment_for_every_key(script):
    ran = run(*script, "--help")
    assert ran.returncode == 0 and not ran.stderr
    assert ran.stdout.startswith(
        f"usage: python {' '.join(script)} [config/file.py] [--key=value ...]"
    )
    source = (ROOT / (script[-1] if script[0] != "-m" else "data/stdlib/prepare.py")).read_text()
    body = source.split("class Config:\n")[1].split("\n\n")[0]
    expected = re.findall(r"^    (\w+):.*?# (.*)$", body, re.M)
    lines = ran.stdout.splitlines()[2:]
    assert [re.match(r"  --(\w+)=", k)[1] for k in lines[::2]] == [k for k, _ in expected]
    assert [m.split("; ", 1)[1] for m in lines[1::2]] == [c for _, c in expected]


def test_a_mistake_of_the_user_is_one_line_on_stderr():
    ran = run("train.py", "--objectve=ar")
    assert ran.returncode != 0
    assert (
        ran.stderr
        == "error: unknown setting 'objectve' in the command line; did you mean 'objective'?\n"
    )
    assert ran.stdout == ""


SCRIPT = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from configurator import begin, configure

begin()

@dataclass
class Config:
    lr: float = 1.0  # rate

cfg, _ = configure(Config)
"""


@pytest.mark.parametrize(
    "ending, error",
    [
        ("{}['lr']", "KeyError"),
        ("assert cfg.lr > 2", "AssertionError"),
        ("cfg.rate", "AttributeError"),
        ("int('x')", "ValueError"),
        ("import numpy; numpy.zeros(3).reshape(2)", "ValueError"),
    ],
)
def test_a_bug_keeps_its_traceback(tmp_path, ending, error):
    (tmp_path / "script.py").write_text(SCRIPT + ending)
    ran = run(tmp_path / "script.py")
    assert ran.returncode == 1
    assert ran.stderr.startswith("Traceback (most recent call last)") and ran.stderr.splitlines()[
        -1
    ].startswith(error)


@pytest.mark.parametrize(
    "ending, said",
    [
        ("open('/no/such/file')", "error: [Errno 2] No such file or directory: '/no/such/file'\n"),
        ("configure(Config, ['--lr=x'])", "error: lr='x' does not fit: lr is a float\n"),
        ("raise KeyboardInterrupt", "stopped\n"),
    ],
)
def test_what_is_for_the_user_is_one_line_and_keeps_its_traceback_only_when_asked(
    tmp_path, ending, said
):
    (tmp_path / "script.py").write_text(SCRIPT + ending)
    ran = run(tmp_path / "script.py")
    assert ran.returncode not in (0, None) and ran.stderr == said
    if said.startswith("error"):
        assert "Traceback" in run(tmp_path / "script.py", env={"TRACEBACK": "1"}).stderr
