"""Settings of a script: defaults < config file < command line, typed.

A script declares its settings as one dataclass whose fields carry their meaning in a trailing comment:

    @dataclass
    class Config:
        lr: float = 1e-3  # peak learning rate

    cfg, given = configure(Config)

and `python script.py config/toy.py --lr=3e-4` (or `--lr 3e-4`) then works, `--help` prints that very comment,
and a wrong key or type ends in one sentence. A config file is Python: `lr = 3e-4`, one assignment a setting.

Not covered: combinations of settings. What may not go together is checked by the script that knows why.
"""
import ast
import difflib
import inspect
import linecache
import os
import re
import runpy
import sys
import time
import types
from dataclasses import fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

HERE = Path(__file__).resolve().parent


def configure(Config, argv=None, usage="[config/file.py]"):
    """Build a `Config` from its defaults, an optional config file and the command line.

    Config: a dataclass; every field annotated int, float, bool, str, tuple, Literal[...] or `X | None`.
    argv:   list of str; default sys.argv[1:]. usage: what --help says to write before the settings.
    Returns (config, given): `given` is the set of keys that a file or the command line set.
    Raises ValueError, in one sentence, for an unknown key, a wrong type or a missing value.
    Side effect: from here on, an error of the user's ends the script with a sentence, not a traceback.
    """
    sys.excepthook = one_sentence
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
            if not words:
                raise ValueError(f"--{key} needs a value: --{key}={getattr(Config, key, '…')}")
            text = words.pop(0)
        typed[key] = parse(key, text, types_of[key])
    values = in_file | typed
    return Config(**values), set(values)


def read_file(path, types_of):
    """Settings of a config file, as {key: value}; names that start with _ and imported modules are its own."""
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path("config").glob("*.py")], 1, 0.4)
        raise ValueError(f"no config file {path!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        found = runpy.run_path(path)
    except Exception as error:  # whatever the file's own code raises is the file's author's to read
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    settings = {k: v for k, v in found.items() if not k.startswith("_") and not inspect.ismodule(v)}
    for key, value in settings.items():
        check_key(key, types_of, path)
        settings[key] = check_type(key, value, types_of[key])
    return settings


def check_key(key, types_of, where):
    if key not in types_of:
        near = difflib.get_close_matches(key, types_of, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them all."
        raise ValueError(f"unknown setting {key!r} in {where}; {hint}")


def parse(key, text, kind):
    """The value that the command line's `text` stands for: a Python literal where one fits, else itself."""
    if kind is str:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, TypeError):
        return check_type(key, text, kind)
    try:
        return check_type(key, value, kind)
    except ValueError:
        if get_origin(kind) is None:
            raise
        return check_type(key, text, kind)  # 'none' and '12' can be meant as texts, as in Literal["none", "dual"]


def check_type(key, value, kind):
    """`value` as `kind`, or a ValueError that names both. 1e6 is an int where it is whole, 1 is a float."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif option is type(None):
            if value is None:
                return value
        elif option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif option is tuple and isinstance(value, list):
            return tuple(value)
        elif isinstance(value, option) and not (isinstance(value, bool) and option is not bool):
            return value
    raise ValueError(f"{key}={value!r} does not fit: {key} is {describe(kind)}")


def describe(kind):
    """'an int', 'one of ar, block', 'an int or none': a type as a sentence has it."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    names = {int: "an int", float: "a float", bool: "true or false", str: "a text",
             tuple: "a list in brackets", type(None): "none"}
    return names[kind]


def print_help(Config, usage):
    """Every key with its default, type and meaning; the meaning is the comment beside the field."""
    spec = sys.modules["__main__"].__spec__  # set where the script runs as python -m data.stdlib.prepare
    name = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    print(f"usage: python {name} {usage} [--key=value ...]\n")
    source = inspect.getsource(Config)
    for f in fields(Config):
        comment = re.search(rf"^ +{f.name} *:[^#\n]*# *(.*)$", source, re.M)
        print(f"  --{f.name}={f.default}\n        {describe(f.type)}; {comment[1] if comment else ''}")


def one_sentence(kind, error, trace):
    """sys.excepthook: an OSError, or a ValueError that a `raise` of this project's made, is for the user: a sentence will do.

    Anything else is a bug and keeps its traceback; so does everything under TRACEBACK=1.
    """
    innermost = trace
    while innermost.tb_next:
        innermost = innermost.tb_next
    path, line = innermost.tb_frame.f_code.co_filename, innermost.tb_lineno
    ours = Path(path).resolve().is_relative_to(HERE) and linecache.getline(path, line).lstrip().startswith("raise")
    for_user = issubclass(kind, OSError) or issubclass(kind, ValueError) and ours
    if for_user and not os.environ.get("TRACEBACK"):
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)  # a mistake that all processes meet: torchrun ends this one before it says it again
        print(f"error: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
