"""What tests ask of a program: calls with plain values where they are written so, else code to run.

    assert f(1, [2]) == 3           a Question: call f with 1 and [2], and the answer must equal 3
    assert abs(f(2) - 1) < 1e-6     code, which a second process runs; its `f` asks the first
    assert f(1)(2) == 3             code that needs the program's own objects: one process for both

Which of the three it is depends on the text of the tests alone, never on the program under test:
otherwise a program could choose the weakest judge.

Not covered: running anything (cell.py, sandbox.py).
"""
import ast
import builtins
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from configurator import Mistake
from plain import encode

PLAIN_CLASSES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set,
                 frozenset, range, deque)
PLAIN_ATTRIBUTES = {name for kind in PLAIN_CLASSES for name in dir(kind)}
RELATIONS = {ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not"}
CONSTANTS = (None, True, False, ...)  # those that `is` may name


@dataclass
class Question:
    name: str  # of the function to call
    args: list  # encoded
    kwargs: dict  # by name, encoded
    relation: str  # ==, !=, is, is not, or the answer's truth: true, false
    expected: object

    def holds(self, answer):
        """Whether the assert statement would pass, for an answer of plain classes."""
        if self.relation == "==":
            return answer == self.expected
        if self.relation == "!=":
            return answer != self.expected
        if self.relation == "is":
            return answer is self.expected
        if self.relation == "is not":
            return answer is not self.expected
        return bool(answer) == (self.relation == "true")


@dataclass
class Plan:
    judged: str  # "values", "caller" or "one process"
    name: str  # the function that the tests call; "" if there are no tests
    questions: tuple[Question, ...]  # for "values", one for each test
    texts: tuple[str, ...]  # for the others: code, one for each case


@lru_cache(1024)  # many programs have the same tests
def plan(entry_point, tests, check, setup):
    """The Plan of a program's trusted texts. Raises Mistake where they are not Python."""
    trees = [parse(setup, "the setup")]
    trees += [parse(test, f"test {number}") for number, test in enumerate(tests, 1)]
    trees += [parse(check, "the check")] if check else []
    if check and not entry_point:
        raise Mistake("a task with a check needs the name of the function that is checked")
    free = unknown_names(trees)
    name = entry_point or first_called(trees[1:], free)
    if not tests and not check:
        return Plan("values", "", (), ())
    questions = [question(tree, name) for tree in trees[1:]]
    if not check and None not in questions:
        return Plan("values", name, tuple(questions), ())
    texts = (*tests, f"{check}\ncheck({name})") if check else tuple(tests)
    own_objects = free - {name} or any(uses_objects(tree, name) for tree in trees)
    return Plan("one process" if own_objects or not name else "caller", name, (), texts)


def parse(text, what):
    try:
        return ast.parse(text)
    except SystemError:  # CPython 3.11, rarely, while another thread parses too: they share a count
        return parse(text, what)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Mistake(f"{what} of a task is not Python ({error}): mend the task's file") from error


# --- a test as a question -------------------------------------------------------------------------

def question(tree, name):
    """The Question of an `assert` that calls `name` with literals, or None."""
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Assert):
        return None
    try:
        return ask(tree.body[0].test, name)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # not literals
        return None


def ask(test, name):
    """The Question of an expression. Raises ValueError and others where it is not one."""
    if isinstance(test, ast.Call):
        return Question(*call(test, name), "true", None)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Question(*call(test.operand, name), "false", None)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        raise ValueError("neither a call nor a comparison")
    left, right, relation = test.left, test.comparators[0], RELATIONS.get(type(test.ops[0]))
    if relation is None:
        raise ValueError("a comparison that is left to code")
    if isinstance(right, ast.Call) and not isinstance(left, ast.Call):
        left, right = right, left
    expected = ast.literal_eval(right)
    if "is" in relation and not any(expected is constant for constant in CONSTANTS):
        raise ValueError("the identity of a value that is not a constant")
    encode(expected)  # a value of plain classes
    return Question(*call(left, name), relation, expected)


def call(node, name):
    """(name, args, kwargs) of a call of `name` with literals. Raises ValueError."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("not a call by name")
    if node.func.id != name:
        raise ValueError("a call of another function")
    args = [encode(ast.literal_eval(arg)) for arg in node.args]
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("** in the call")
    kwargs = {keyword.arg: encode(ast.literal_eval(keyword.value)) for keyword in node.keywords}
    return name, args, kwargs


# --- what else the tests need ---------------------------------------------------------------------

def bound_names(trees):
    """All names that some statement or function of the texts binds; "*" for an import of it."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def unknown_names(trees):
    """Names that the texts read and do not bind: the program must have them."""
    bound = bound_names(trees)
    if "*" in bound:  # `from math import *` may have bound any
        return set()
    read = {node.id for tree in trees for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - bound - set(dir(builtins)) - {"__name__", "__file__"}


def first_called(trees, free):
    """The first unknown name that a test calls, or ""."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in free:
            return node.func.id
    return ""


def uses_objects(tree, name):
    """Whether a text uses the function or its answer as only the object itself can be used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_call(node.value, name):
            if node.attr not in PLAIN_ATTRIBUTES:
                return True  # f(1).area
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in (name, "candidate"):
                return True  # f.cache_clear
        elif isinstance(node, ast.Call) and is_call(node.func, name):
            return True  # f(1)(2)
    return False


def is_call(node, name):
    return (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            and node.func.id in (name, "candidate"))
