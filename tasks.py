"""Files of programming tasks: what a line holds, what a model is asked, what its program must pass.

    a file  --read_tasks-->  Tasks  --prompt or message-->  what the model reads
    a Task and the program in its answer (extract.py)  --program-->  what the sandbox judges

Two schemas are read, from .jsonl, .jsonl.gz, or a .json file with a list:

    HumanEval, HumanEval+   task_id, prompt, entry_point, canonical_solution, test
    MBPP, full              task_id, text, code, test_list, test_setup_code
    MBPP, sanitized, MBPP+  task_id, prompt, code, test_list, test_imports; MBPP+ has a test, too

data/functions writes HumanEval's fields with MBPP's test_list, and a family.

Not covered: MBPP's challenge_test_list. CRUXEval and CanItEdit: one asks for a value, the other for
an edit of a file, so neither their prompts nor what counts as an answer have a line in common with
this file. EvalPlus's own files of inputs without tests: those on the Hub have a test.
"""
import ast
import builtins
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from configurator import Mistake, shortened
from files import MAX_LINE, parse_json, parse_line, read_json_lines
from sandbox import Program

# The instruct style's message: EvalPlus's wording (evalplus/codegen.py, provider/utility.py).
MESSAGE = ("Please provide a self-contained Python script that solves the following problem in a "
           "markdown code block:\n```\n{prompt}\n```\n")
# What `code` and `text` stand for, and MBPP's docstring prompt (InCoder, arXiv 2204.05999).
DOCSTRING = '"""\n{text}\n{tests}\n"""\n'


@dataclass
class Task:
    """One task. All are texts; what a file does not have is empty.

    prompt: what a base model continues. entry_point: the function that the tests call. solution:
    the reference, which continues the prompt or is a whole module. test: code that defines
    check(candidate). tests: assert statements, one case each. setup: code that the tests may need.
    where: such as "line 3 of tasks.jsonl".
    """
    task_id: str
    prompt: str
    entry_point: str
    solution: str = ""
    test: str = ""
    tests: tuple = ()
    setup: str = ""
    family: str = ""
    where: str = ""


# --- reading --------------------------------------------------------------------------------------

def read_tasks(path, shown_tests=3):
    """The tasks of a file, a list of Task. shown_tests: how many tests MBPP's prompt shows.

    Raises Mistake, one sentence that names file and line: for lines that are no JSON objects, too
    long or not UTF-8, for fields that are missing or of another type, for tests that are missing or
    no Python, and for a task_id that was there before.
    """
    tasks, seen = [], {}
    for where, record in records(path):
        task = task_of(where, record, shown_tests)
        if task.task_id in seen:
            raise Mistake(f"{where} has task_id {shortened(task.task_id)}, and so has "
                          f"{seen[task.task_id]}: each task needs its own")
        seen[task.task_id] = where
        tasks.append(task)
    if not tasks:
        raise Mistake(f"{path} has no tasks: a line is a JSON object, such as HumanEval's")
    return tasks


def records(path):
    """A generator of (where, dict) over a file."""
    if str(path).endswith(".gz"):
        yield from zipped_lines(path)
    elif str(path).endswith(".json"):
        items = parse_json(path)
        if not isinstance(items, list):
            raise Mistake(f"{path} holds a {type(items).__name__}, not a list of tasks; with a "
                          "task a line, call it .jsonl")
        for number, item in enumerate(items, 1):
            where = f"item {number} of {path}"
            if not isinstance(item, dict):
                raise Mistake(f"{where} is a {type(item).__name__}, not an object")
            yield where, item
    else:
        yield from read_json_lines(path)


def zipped_lines(path):
    """files.read_json_lines for a .jsonl.gz."""
    if not Path(path).is_file():
        raise Mistake(f"{path} is missing, or not a file")
    number = 0
    try:
        with gzip.open(path) as f:
            while line := f.readline(MAX_LINE + 1):
                number += 1
                where = f"line {number} of {path}"
                if len(line) > MAX_LINE:
                    raise Mistake(f"{where} is longer than {MAX_LINE:,} bytes")
                if line.strip():
                    yield where, parse_line(where, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Mistake(f"{path} is damaged after line {number}: {error}") from error


def task_of(where, record, shown_tests):
    """One record as a Task, by its schema."""
    if "entry_point" in record:
        return humaneval_task(where, record)
    if "test_list" in record:
        return mbpp_task(where, record, shown_tests)
    raise Mistake(f"{where} is no task: HumanEval's have an entry_point, prompt and test, MBPP's a "
                  f"test_list and a text; this one has {shortened(sorted(record))}")


def humaneval_task(where, record):
    entry_point = text_in(where, record, "entry_point")
    if not entry_point.isidentifier():
        raise Mistake(f"{where}: entry_point={shortened(entry_point)} is not a function's name")
    task = Task(name_in(where, record), text_in(where, record, "prompt"), entry_point,
                text_in(where, record, "canonical_solution", ""),
                text_in(where, record, "test", ""), tests_in(where, record),
                family=text_in(where, record, "family", ""), where=where)
    if not task.prompt.strip():
        raise Mistake(f"{where} has an empty prompt")
    if not task.test.strip() and not task.tests:
        raise Mistake(f"{where} has no tests: neither a test nor a test_list")
    if task.test.strip():
        task.test = check_of(where, task.test, entry_point)
    task.setup = prelude(task)
    return task


def mbpp_task(where, record, shown_tests):
    field = "text" if "text" in record else "prompt"
    text = text_in(where, record, field)
    tests = tests_in(where, record)
    if not tests:
        raise Mistake(f"{where} has no tests: its test_list is empty")
    solution = text_in(where, record, "code", "")
    imports = record.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise Mistake(f"{where}: test_imports={shortened(imports)} is not a list of texts")
    setup = "\n".join([*imports, text_in(where, record, "test_setup_code", "")])
    entry_point = called_by(tests, solution)
    prompt = DOCSTRING.format(text=text.strip(), tests="\n".join(tests[:shown_tests]))
    test = text_in(where, record, "test", "")
    if test.strip():  # MBPP+: its inputs contain those of test_list
        test, tests = check_of(where, test, entry_point), ()
    return Task(name_in(where, record), prompt, entry_point, solution, test, tests, setup,
                text_in(where, record, "family", ""), where)


def text_in(where, record, name, default=None):
    """The text of a field. default: where the field may be missing."""
    value = record.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        what = "no" if value is None else f"a {type(value).__name__} as its"
        raise Mistake(f"{where} has {what} {name}, which must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" in the JSON
        raise Mistake(f"{where}: {name} is not Unicode text: {error.reason}") from error
    return value


def name_in(where, record):
    """The task_id as a text. MBPP's are numbers, which EvalPlus writes as Mbpp/2."""
    value = record.get("task_id")
    if type(value) is int:
        return f"Mbpp/{value}"
    name = text_in(where, record, "task_id")
    if not name.strip():
        raise Mistake(f"{where} has an empty task_id")
    return name


def tests_in(where, record):
    """test_list as a tuple of statements; empty where there is none."""
    tests = record.get("test_list")
    if tests is None:
        return ()
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise Mistake(f"{where}: test_list={shortened(tests)} is not a list of texts")
    for number, test in enumerate(tests, 1):
        if not tree_of(f"{where}: test {number} of test_list", test).body:
            raise Mistake(f"{where}: test {number} of test_list is empty")
    return tuple(tests)


def tree_of(what, code):
    """The syntax tree of code from a file of tasks."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Mistake(f"{what} is not Python: {error}") from error


def check_of(where, test, entry_point):
    """HumanEval's `test` as it is. MBPP+'s, a script that calls the function by its name, as the
    body of a check(candidate)."""
    tree = tree_of(f"{where}: test", test)
    if any(isinstance(s, ast.FunctionDef) and s.name == "check" for s in tree.body):
        return test
    return f"def check(candidate):\n    exec({test!r}, {{{entry_point!r}: candidate}})\n"


def called_by(tests, solution):
    """The function that these assert statements call: one that the reference defines, or where
    there is none, one that Python does not have. Empty where they call none."""
    called = []
    for test in tests:
        for node in ast.walk(ast.parse(test)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.append(node.func.id)
    try:
        defined = [s.name for s in ast.parse(solution).body if hasattr(s, "name")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        defined = []
    known = [name for name in called if name in defined]
    known += [name for name in called if not hasattr(builtins, name)]
    return known[0] if known else ""


def prelude(task):
    """What stands in a prompt before its function: imports and helpers. Empty if it is no code."""
    for end in ("", "\n    pass\n"):  # a function without a docstring has no body yet
        try:
            body = ast.parse(task.prompt + end).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for statement in body:
            if getattr(statement, "name", None) == task.entry_point:
                first = min([statement.lineno, *(d.lineno for d in statement.decorator_list)])
                return "".join(line + "\n" for line in task.prompt.split("\n")[:first - 1])
    return ""


# --- asking and judging ---------------------------------------------------------------------------

def message(task):
    """What the instruct style asks, as the content of a user's message."""
    return MESSAGE.format(prompt=task.prompt.strip())


def program(task, answer):
    """What the sandbox judges. answer: a whole module, as extract.extract makes it.

    A task with a test_list and a check, as in data/functions, is judged by its test_list: the cases
    are the same, and come out one by one.
    """
    check = "" if task.tests else task.test
    return Program(answer, task.entry_point, task.tests, check, task.setup)


def reference(task):
    """The reference solution as a whole module; empty where the file has none."""
    if not task.solution.strip():
        return ""
    try:
        names = [getattr(statement, "name", None) for statement in ast.parse(task.solution).body]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        names = []  # a function's body
    if task.entry_point in names or not task.entry_point:
        return task.solution
    return task.prompt + task.solution
