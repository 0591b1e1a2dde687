"""How the files are written: short lines, short files, functions that read only what they are
given."""
import ast
import builtins
import subprocess
import sys

import pytest
from conftest import ROOT

LONGEST = {"checkpoint.py": 300, "train.py": 300}  # lines; other files: 500
URL = ("http://", "https://")


def tracked(pattern):
    """Files that git knows, or where there is no git all there are outside hidden folders."""
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return sorted(ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists())
    there = ROOT.rglob(pattern) if "/" not in pattern else ROOT.glob(pattern)
    return sorted(p for p in there if not any(part[0] == "." for part in p.relative_to(ROOT).parts))


PYTHON = tracked("*.py")
ROOT_FILES = [path for path in PYTHON if path.parent == ROOT]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_line_is_longer_than_100_characters(path):
    long = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if len(line) > 100 and not any(start in line for start in URL):
            long.append(f"{path.name}:{number}")
    assert long == []


@pytest.mark.parametrize("path", ROOT_FILES, ids=name_of)
def test_a_file_of_the_root_is_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST.get(path.name, 500)


def test_there_are_files():
    assert len(ROOT_FILES) > 10 and len(PYTHON) > 40


# --- names ----------------------------------------------------------------------------------------

def bound_by(node):
    """Names that this statement or expression binds in its own scope, not in an inner function."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Lambda):
        return set()
    names = set()
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        names.add(node.id)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    if isinstance(node, ast.ExceptHandler) and node.name:
        names.add(node.name)
    for child in ast.iter_child_nodes(node):
        names |= bound_by(child)
    return names


def arguments(function):
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    return {argument.arg for argument in every if argument is not None}


def body_of(function):
    return function.body if isinstance(function.body, list) else [function.body]


def read_too_early(function, outer):
    """(name, line) of what a function reads that is neither its own nor in `outer`.

    outer: names that are bound around it, where it is written. An inner function may read names of
    this one only if they are bound on an earlier line.
    """
    bound = {}  # name: the line that binds it first
    for name in arguments(function):
        bound[name] = function.lineno
    for statement in body_of(function):
        collect(statement, bound)
    wrong = []
    for statement in body_of(function):
        for node in inside(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                if node.id not in bound and node.id not in outer:
                    wrong.append((node.id, node.lineno))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                before = {name for name, line in bound.items() if line <= node.lineno}
                wrong += read_too_early(node, outer | before)
    return wrong


def collect(node, bound):
    """Add to `bound` the first line on which each name is bound, in this scope."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        bound.setdefault(node.name, node.lineno)
        return
    if isinstance(node, ast.Lambda):
        return
    own = bound_by(node) if not list(ast.iter_child_nodes(node)) else set()
    if isinstance(node, (ast.Name, ast.Import, ast.ImportFrom, ast.ExceptHandler)):
        own = bound_by(node)
    for name in own:
        bound[name] = min(node.lineno, bound.get(name, node.lineno))
    for child in ast.iter_child_nodes(node):
        collect(child, bound)


def inside(node):
    """The node and all below it, but not the inside of functions."""
    yield node
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            yield from inside(default)
        return
    for child in ast.iter_child_nodes(node):
        yield from inside(child)


def globals_allowed(tree):
    """Imports, definitions and constants of a module, and what Python has."""
    allowed = set(dir(builtins)) | {"__name__", "__file__", "__doc__"}
    for statement in tree.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            allowed |= {name for name in bound_by(statement) if name.isupper()}
        elif isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            allowed |= bound_by(statement)
    return allowed


def hidden_inputs(text):
    """(name, line) of what functions of a module read that is not in front of the reader."""
    tree = ast.parse(text)
    allowed, wrong = globals_allowed(tree), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            wrong.append((node.names[0], node.lineno))
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            wrong += read_too_early(statement, allowed)
        if isinstance(statement, ast.ClassDef):
            for method in statement.body:
                if isinstance(method, ast.FunctionDef):
                    wrong += read_too_early(method, allowed)
    return wrong


@pytest.mark.parametrize("name", ["train.py", "run.py", "parallel.py", "checkpoint.py",
                                  "sample.py"])
def test_functions_read_only_what_they_are_given(name):
    assert hidden_inputs((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("text, wrong", [
    ("cfg = 1\ndef f():\n    return cfg", [("cfg", 3)]),
    ("LIMIT = 1\ndef f():\n    return LIMIT", []),
    ("def f(cfg):\n    return [cfg for _ in range(3)]", []),
    ("def f():\n    def g():\n        return late\n    late = 1\n    return g", [("late", 3)]),
    ("def f():\n    early = 1\n    def g():\n        return early\n    return g", []),
    ("def f():\n    return lambda: late\n    late = 1", [("late", 2)]),
    ("def f():\n    global x\n    x = 1", [("x", 2)]),
    ("def f():\n    import os\n    with os as a:\n        return [b for b in a if b]", []),
    ("def f(x=y): pass", []),
    ("import a.b\ndef f():\n    try:\n        a.b\n    except OSError as e:\n        e", []),
    ("for model in []: pass\ndef f():\n    return model", [("model", 3)]),
])
def test_the_check_itself(text, wrong):
    assert hidden_inputs(text) == wrong


# --- what is used where ---------------------------------------------------------------------------

def names_used(path):
    """Modules imported, and names and attributes read, in a file."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            used |= {node.module, *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Name):
            used.add(node.id)
    return used


def test_scripts_are_imported_not_run_and_frames_are_not_read():
    users = {path.name for path in PYTHON if "runpy" in names_used(path)}
    assert users == {"configurator.py"}
    assert [path.name for path in PYTHON if "_getframe" in names_used(path)] == []


IMPORTS = """
import importlib, os, signal, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
sys.dont_write_bytecode = True

def state():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.excepthook

import torch.distributed
before = state()
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:  # the kernel, where there is no Triton
        assert "triton" in str(error), error
    assert state() == before, name
    assert os.listdir() == [], name
"""


def test_importing_a_file_does_nothing_visible(tmp_path):
    """It prints nothing, writes nothing, and leaves signals and hooks as they were."""
    names = [path.stem for path in ROOT_FILES]
    ran = subprocess.run([sys.executable, "-c", IMPORTS, str(ROOT), *names], cwd=tmp_path,
                         capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
