"""Settings of a script: defaults < config file < command line, typed and bounded.

A script declares its settings as one dataclass. A trailing comment says what each one means:

    @dataclass
    class Config:
        lr: Float(1e-12, 10) = 1e-3  # peak learning rate

    cfg, given = configure(Config)

and `python script.py config/toy.py --lr=3e-4` (or `--lr 3e-4`) then works, `--help` prints that
comment with the allowed range, and a wrong key, type or number ends with a one-line message. A
config file is Python: `lr = 3e-4`, one assignment per setting; it runs as code.

Here too is `Mistake`, the exception for what a user got wrong, which every file may import.

Not covered: combinations of settings. The script that knows why two exclude each other checks that.
"""
import ast
import difflib
import inspect
import math
import os
import re
import runpy
import signal
import sys
import time
import types
import unicodedata
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin


class Mistake(ValueError):
    """What the user got wrong: the message says what was given, what is allowed, what to type."""


# --- types of settings: numbers have bounds, both included ----------------------------------------

def Int(low, high):
    return Annotated[int, low, high]


def Float(low, high):
    return Annotated[float, low, high]


Seed = Int(0, 2**63 - 1)
Name = Annotated[str, 1, 4096]  # a text that is not empty: a folder, a file


def check_fields(settings):
    """Check every field of a dataclass against its annotation, in place. Raises Mistake.

    Numbers are finite and within bounds. 1e6 becomes an int where one is wanted, a list a tuple.
    """
    for f in fields(settings):
        setattr(settings, f.name, check_type(f.name, getattr(settings, f.name), f.type))


def check_type(key, value, kind):
    """`value` as `kind`, or a Mistake that names both."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        fitting = converted(value, option)
        if fitting is not None or option is type(None) and value is None:
            return fitting
    raise Mistake(f"{key}={shortened(value)} does not fit: {key} is {type_in_words(kind)}")


def converted(value, option):
    """`value` as one plain, Annotated or Literal type; None where it does not fit."""
    if get_origin(option) is Literal:
        alike = [v for v in get_args(option) if v == value and type(v) is type(value)]
        return alike[0] if alike else None
    low, high = None, None
    if get_origin(option) is Annotated:
        option, low, high = get_args(option)
    if isinstance(value, bool) and option is not bool:
        return None
    if option is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if option is float and isinstance(value, int) and abs(value) < 2**63:
        value = float(value)
    if option is tuple and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, option) or isinstance(value, float) and not math.isfinite(value):
        return None
    if low is None:
        return value
    if isinstance(value, str):
        return value if low <= len(value) <= high and "\0" not in value else None
    return value if low <= value <= high else None


def type_in_words(kind):
    """'an int from 1 to 8', 'one of ar, block', 'a float or none': a type as a sentence has it."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_in_words(k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated:
        plain, low, high = get_args(kind)
        if plain is str:
            return "a text that is not empty"
        return f"{type_in_words(plain)} from {low:,} to {high:,}"
    names = {int: "an int", float: "a float", bool: "true or false", str: "a text",
             tuple: "a list in brackets", type(None): "none"}
    return names[kind]


def shortened(value):
    """A value as messages show it: a few dozen characters at most."""
    if isinstance(value, int) and abs(value) > 10**20:
        sign = "-" if value < 0 else ""
        return f"about {sign}2^{abs(value).bit_length() - 1}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- defaults < config file < command line --------------------------------------------------------

def configure(Config, argv=None, usage="[config/file.py]"):
    """Build a `Config` from its defaults, an optional config file and the command line.

    Config: a dataclass; its fields are annotated Int(…), Float(…), bool, str, Name, tuple,
        Literal[…], or `X | None`.
    argv: list of str; default sys.argv[1:]. usage: what --help says to write before the settings.
    Returns (config, given): `given` is the set of keys that a file or the command line set.
    Raises Mistake for an unknown key, a wrong type, a number out of bounds or a missing value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print_help(Config, usage)
        raise SystemExit(0)
    types_of = {f.name: f.type for f in fields(Config)}
    in_file, typed = {}, {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            in_file.update(read_file(word, types_of))
            continue
        key, has_value, text = word[2:].partition("=")
        check_key(key, types_of, "the command line")
        if not has_value:
            text = next_word(key, words, types_of, Config)
        typed[key] = parse(key, text, types_of[key])
    values = in_file | typed
    return Config(**values), set(values)


def next_word(key, words, types_of, Config):
    """The value of `--key value`, taken from the words that follow."""
    is_flag = bool in (types_of[key], *get_args(types_of[key]))
    suggested = "true" if is_flag else getattr(Config, key, "…")  # a flag written alone means yes
    if not words:
        raise Mistake(f"--{key} needs a value: --{key}={suggested}")
    name = words[0][2:].partition("=")[0]
    if words[0].startswith("--") and name in types_of:
        if is_flag:
            raise Mistake(f"--{key} needs a value: --{key}={suggested}")
        raise Mistake(f"--{key} needs a value, and {words[0]!r} is another setting; "
                      f"to mean that text write --{key}={words[0]!r}")
    return words.pop(0)


def read_file(path, types_of):
    """Settings of a config file, {key: value}; _names and imported modules are its own."""
    if not Path(path).is_file():
        known = [str(p) for p in Path("config").glob("*.py")]
        near = difflib.get_close_matches(path, known, 1, 0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise Mistake(f"no config file {path!r}{hint}")
    try:
        names = runpy.run_path(path)
    except Exception as error:  # the file is code of the user's: anything can be raised
        raise Mistake(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    settings = {}
    for key, value in names.items():
        if key.startswith("_") or inspect.ismodule(value):
            continue
        check_key(key, types_of, path)
        settings[key] = check_type(key, value, types_of[key])
    return settings


def check_key(key, types_of, where):
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them all."
        raise Mistake(f"unknown setting {shortened(key)} in {where}; {hint}")


def parse(key, text, kind):
    """The value of the command line's `text`: a Python literal where one fits, else the text."""
    if kind in (str, Name):
        return check_type(key, text, kind)
    word = {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return check_type(key, text, kind)
    try:
        return check_type(key, value, kind)
    except Mistake:
        texts = [k for k in (kind, *get_args(kind)) if k is str or get_origin(k) is Literal]
        if not texts:
            raise
        return check_type(key, text, kind)  # 'none' may be meant as a text: Literal["none", "dual"]


def print_help(Config, usage):
    """Every key with its default, type and meaning; the meaning is the comment after the field.

    A script's own settings come before those that its Config inherits.
    """
    spec = sys.modules["__main__"].__spec__  # set under python -m data.stdlib.prepare
    name = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    print(f"usage: python {name} {usage} [--key=value ...]\n")
    inherited = [c for c in Config.__mro__[1:] if is_dataclass(c)]
    source = "".join(map(inspect.getsource, [Config, *inherited]))
    own = inspect.get_annotations(Config)
    for f in sorted(fields(Config), key=lambda f: f.name not in own):  # its own come first
        comment = re.search(rf"^ +{f.name} *:[^#\n]*# *(.*)$", source, re.M)
        meaning = comment[1] if comment else ""
        print(f"  --{f.name}={f.default}\n        {type_in_words(f.type)}; {meaning}")


# --- how a script ends ----------------------------------------------------------------------------

def begin():
    """What every script does first, before its slow imports.

    From here on neither a mistake nor Ctrl-C prints a traceback, and any character can be printed.
    """
    sys.excepthook = report
    signal.signal(signal.SIGINT, leave_at_once)
    if sys.stdout is None:  # closed by whoever started it
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def visible(text):
    """A text whose control characters are dots: they could set a terminal's title, or clear it."""
    hidden = {c for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
    return text.translate(dict.fromkeys(map(ord, hidden), "·"))


def leave_at_once(*_):
    """SIGINT while nothing has begun. Whatever is being imported might swallow an exception."""
    os.write(2, b"stopped\n")
    os._exit(128 + signal.SIGINT)


def report(kind, error, trace):
    """sys.excepthook: a line for what a user can mend, a traceback for a bug, or if TRACEBACK=1."""
    if os.environ.get("TRACEBACK"):
        sys.__excepthook__(kind, error, trace)
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)  # the first process says the same or the cause; torchrun then ends this one
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):  # such as `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(128 + signal.SIGPIPE)
    elif issubclass(kind, (Mistake, OSError)):
        print(f"error: {error}", file=sys.stderr)
    elif out_of_memory(kind, error):
        first_line = (str(error) or "the system has none left").splitlines()[0]
        print(f"error: out of memory: {first_line}; a smaller model, batch or context needs less",
              file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def out_of_memory(kind, error):
    """Python's MemoryError, CUDA's OutOfMemoryError, or what PyTorch's CPU allocator raises."""
    return (issubclass(kind, MemoryError) or kind.__name__ == "OutOfMemoryError"
            or issubclass(kind, RuntimeError) and "can't allocate memory" in str(error))
