"""Files of tasks, and the programs in answers: what is read, what is refused, what is cut."""
import ast
import gzip
import json
import textwrap

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import Mistake
from extract import extract, fenced_blocks
from files import MAX_LINE
from tasks import Task, called_by, message, prelude, program, read_tasks, reference

OWN = ROOT / "tests" / "tasks"
FILES = sorted(OWN.iterdir())

TASK = Task("t", 'def f(x):\n    """Add one.\n    """\n', "f", tests=("assert f(1) == 2",))
MBPP = Task("m", '"""\nAdd one.\nassert f(1) == 2\n"""\n', "f", tests=("assert f(1) == 2",))
BODY = "    y = x + 1\n    return y\n"
MODULE = "def f(x):\n    y = x + 1\n    return y\n"


def run(code, name="f"):
    """What a module of these tests defines under a name."""
    scope = {}
    exec(code, scope)
    return scope[name]


# --- the schemas ----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_schema_is_read_and_its_references_pass_their_tests(path):
    for task in read_tasks(path):
        scope = {}
        what = program(task, reference(task))
        exec(what.setup + "\n" + what.code, scope)
        assert what.entry_point == task.entry_point and callable(scope[task.entry_point])
        exec("\n".join(what.tests) + "\n" + what.check, scope)
        if what.check:
            scope["check"](scope[task.entry_point])
            with pytest.raises((AssertionError, TypeError)):
                scope["check"](lambda *_: object())
        assert bool(what.check) != bool(what.tests)


def test_what_the_fields_mean():
    total, rotate, countdown = read_tasks(OWN / "humaneval.jsonl")
    assert total.setup == "from typing import List\n\n\n" == prelude(total)
    assert rotate.setup.startswith("import string\n") and "def rotated" in rotate.setup
    assert "def rotate_word" not in rotate.setup and countdown.setup == ""
    words, linked = read_tasks(OWN / "mbpp.jsonl")
    assert (words.task_id, words.entry_point) == ("Mbpp/2001", "capitalized")
    assert linked.entry_point == "total" and "class Node" in linked.setup
    assert words.prompt == ('"""\nWrite a function to find the words of a sentence that begin with '
                            "a capital.\nassert capitalized(\"Ada met Alan\")==['Ada', 'Alan']\n"
                            'assert capitalized("no one")==[]\nassert capitalized("")==[]\n"""\n')
    area, shared = read_tasks(OWN / "mbpp_sanitized.json", shown_tests=1)
    assert area.setup.startswith("import math") and "area(0)" not in area.prompt
    assert shared.entry_point == "shared" and len(shared.tests) == 2
    [plus] = read_tasks(OWN / "mbpp_plus.jsonl")
    assert plus.tests == () and "assert set(shared([1, 2]" in plus.prompt
    assert program(plus, "code").check.startswith("def check(candidate):")


def test_the_message_is_evalplus_s():
    assert message(TASK) == ("Please provide a self-contained Python script that solves the "
                             "following problem in a markdown code block:\n```\ndef f(x):\n"
                             '    """Add one.\n    """\n```\n')


def test_a_test_list_is_judged_case_by_case():
    both = Task("t", "", "f", test="def check(candidate): pass", tests=("assert f(1) == 2",))
    assert program(both, MODULE).check == "" and program(both, MODULE).tests == both.tests


@pytest.mark.parametrize("tests, solution, name", [
    (["assert set(f([1])) == set([1])"], "def f(x): return x", "f"),
    (["assert f([1]) == 1"], "", "f"),
    (["assert abs(f(Node(1))) == 1"], "def f(x): return x", "f"),
    (["assert f(g(1)) == 1"], "def g(x): return x\ndef f(x): return x", "f"),
    (["assert True"], "", ""),
    (["assert f(1)"], "def broken(:", "f"),
])
def test_the_function_that_tests_call(tests, solution, name):
    assert called_by(tests, solution) == name


def test_a_zipped_file_and_a_byte_order_mark(tmp_path):
    lines = (OWN / "humaneval.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    names = ["Own/0", "Own/1", "Own/2"]
    for path in tmp_path.iterdir():
        assert [task.task_id for task in read_tasks(path)] == names


GOOD = {"task_id": "a", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c): pass"}
MBPP_GOOD = {"task_id": 1, "text": "Add.", "code": "def f(x): pass", "test_list": ["assert f(1)"]}


@pytest.mark.parametrize("record, words", [
    ({"prompt": None}, "has no prompt, which must be a text"),
    ({"prompt": 5}, "has a int as its prompt"),
    ({"prompt": "  "}, "has an empty prompt"),
    ({"task_id": None}, "has no task_id"),
    ({"task_id": True}, "has a bool as its task_id"),
    ({"task_id": ""}, "empty task_id"),
    ({"entry_point": "f(x)"}, "is not a function's name"),
    ({"entry_point": ["f"]}, "a list as its entry_point"),
    ({"test": ""}, "has no tests"),
    ({"test": "def check(:"}, "test is not Python"),
    ({"test": 3}, "a int as its test"),
    ({"test_list": "assert f(1)"}, "is not a list of texts"),
    ({"test_list": ["assert f(1", "x"]}, "test 1 of test_list is not Python"),
    ({"test_list": ["assert f(1)", "# nothing"]}, "test 2 of test_list is empty"),
    ({"family": {}}, "a dict as its family"),
    ({"prompt": "def f(x): # \ud800"}, "prompt is not Unicode text"),
    ({"test": "assert (" * 10_000}, "test is not Python"),
])
def test_a_bad_line_is_named(tmp_path, record, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD | {"task_id": "first"}) + "\n" + json.dumps(GOOD | record))
    with pytest.raises(Mistake) as caught:
        read_tasks(path)
    assert f"line 2 of {path}" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("record, words", [
    ({"test_list": []}, "has no tests"),
    ({"text": None}, "has no text"),
    ({"test_imports": "import math"}, "is not a list of texts"),
    ({"test_setup_code": 5}, "a int as its test_setup_code"),
    ({"code": []}, "a list as its code"),
])
def test_a_bad_line_of_mbpp_is_named(tmp_path, record, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([MBPP_GOOD, MBPP_GOOD | {"task_id": 2} | record]))
    with pytest.raises(Mistake, match="item 2 of .*bad.json") as caught:
        read_tasks(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("data, words", [
    (b"", "has no tasks"),
    (b"\n \n", "has no tasks"),
    (b"[1]", "line 1 of .* holds a list"),
    (b'{"prompt": "x"', "line 1 of .* is not readable JSON"),
    (b"[" * 100_000, "line 1 of .* is not readable JSON"),
    (b'\n\n{"a": "\xff"}', "line 3 of .* is not UTF-8"),
    (b'{"a": NaN}', "line 1 of .* is not readable JSON"),
    (b'{"a": "' + b"x" * MAX_LINE, "line 1 of .* is longer than"),
    (b'{"task_id": "a", "prompt": "x"}', "line 1 of .* is no task"),
    (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode(),
     "line 2 of .* has task_id 'a', and so has line 1"),
])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_is_none(tmp_path, data, words, zipped):
    path = tmp_path / ("bad.jsonl.gz" if zipped else "bad.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(Mistake, match=words):
        read_tasks(path)


def test_other_files_that_are_none(tmp_path):
    with pytest.raises(Mistake, match="missing"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(Mistake, match="missing"):
        read_tasks(tmp_path / "none.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not zipped")
    with pytest.raises(Mistake, match="is damaged after line 0"):
        read_tasks(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-9])
    with pytest.raises(Mistake, match="is damaged"):
        read_tasks(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.json").write_text('{"a": 1}')
    with pytest.raises(Mistake, match="not a list of tasks"):
        read_tasks(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[5]")
    with pytest.raises(Mistake, match="item 1 of .* is a int"):
        read_tasks(tmp_path / "d.json")


# --- extraction: whatever surrounds it, the code comes back unchanged -----------------------------

STATEMENTS = ["    y = x + 1", "    if x:\n        return 2", "    # a ``` in a comment", "",
              "    s = 'print(f(1))'", '    s = """\n```\nnot the end\n```\n"""',
              "    y = helper(x)",
              "    for i in range(x):\n        y = i\n\n    else:\n        y = LIMIT",
              "    def inner(a):\n        return a"]
BEFORE = ["import math", "from typing import List", "LIMIT = 3", "def helper(x):\n    return LIMIT"]


@st.composite
def modules(draw):
    """A module that defines f, with what it needs before or after it."""
    body = draw(st.lists(st.sampled_from(STATEMENTS), max_size=5))
    function = "\n".join(["def f(x):", *body, "    return x"])
    needed = ["LIMIT = 3"]
    if "helper(x)" in function:
        needed.append(BEFORE[3])
    if "LIMIT" not in function and "helper" not in function:
        needed = []
    imports = draw(st.lists(st.sampled_from(BEFORE[:2]), max_size=2))
    parts = draw(st.permutations([*needed, function]))
    return "\n\n".join([*imports, *parts]) + "\n"


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="`~\r\n"), max_size=40)
PROSE = st.lists(WORDS, max_size=4).map("\n".join)


@given(code=modules(), before=PROSE, after=PROSE, mark=st.sampled_from(["```", "````", "~~~"]),
       name=st.sampled_from(["", "python", "py", "Python3", " python"]), same_line=st.booleans(),
       task=st.sampled_from([TASK, MBPP]))
@settings(max_examples=150, deadline=None)
def test_a_fenced_module_comes_back_unchanged(code, before, after, mark, name, same_line, task):
    start = before if same_line else before + "\n"
    text = f"{start}{mark}{name}\n{code}{mark}\n{after}"
    assert extract(task, text) == (code, True)
    assert extract(task, text.replace("\n", "\r\n")) == (code, True)


@given(code=modules(), before=PROSE, task=st.sampled_from([TASK, MBPP]))
@settings(max_examples=50, deadline=None)
def test_a_fence_without_an_end(code, before, task):
    assert extract(task, f"{before}\n```python\n{code}") == (code, True)


@given(code=modules(), other=modules(), prose=PROSE)
@settings(max_examples=50, deadline=None)
def test_of_several_blocks_the_first_with_the_function_counts(code, other, prose):
    usage = "```python\nprint(f(3))\n```\n"
    text = f"{prose}\n```bash\npip install x\n```\n{usage}```python\n{code}```\n{prose}\n"
    assert extract(TASK, f"{text}```python\n{other}```\n{usage}") == (code, True)


LINES = ["def f(x):", "    return 5", "```python", "```", "<think>", "</thin", "", "So, hm."]
THOUGHTS = st.lists(st.sampled_from(LINES), max_size=9).map("\n".join)


@given(code=modules(), thoughts=THOUGHTS, blank=st.sampled_from(["", "\n", " \n\n"]),
       task=st.sampled_from([TASK, MBPP]))
@settings(max_examples=100, deadline=None)
def test_thoughts_before_an_answer_are_not_read(code, thoughts, blank, task):
    thinking = f"{blank}<think>\n{thoughts}"
    for answer in (code, f"So:\n```python\n{code}```\nAfter </think>, the code."):
        assert extract(task, f"{thinking}\n</think>\n\n{answer}") == (code, True)
    cut_off = f"{thinking}\n```python\n{code}```\n"
    assert extract(task, cut_off) == (task.prompt + cut_off, False)


def test_thoughts_before_a_body_are_not_read_and_elsewhere_the_tag_is_text():
    for body in (BODY, "y = x + 1\nreturn y", f"```python\n{MODULE}```"):
        code, found = extract(TASK, f"<think>\nreturn 5\n</think>\n\n{body}")
        assert found and run(code)(1) == 2
    code = "def f(x):\n    return '<think>' + x\n"
    assert extract(TASK, f"The tag <think> is a word.\n```python\n{code}```") == (code, True)
    assert extract(Task("t", "def f(x):\n    return 1\n", "f"), "<think>")[1] is False


LETTERS = st.text("abcdefghijklmnop ,.'", min_size=1, max_size=40).map(lambda s: s.strip() or "a")


@given(code=modules(), before=LETTERS, after=LETTERS)
@settings(max_examples=50, deadline=None)
def test_a_module_without_fences(code, before, after):
    text = f"Here is it: {before}\n\n{code}\nHope that helps: {after}"
    assert extract(TASK, text) == (code, True)


TAILS = ["", "\n\ndef g(x):\n    return 1\n", "\ndef f(x):\n    return 'again'\n",
         "\nprint(f(3))\n", "\nassert f(3) == 7\n",
         "\n\nif __name__ == '__main__':\n    f(input())\n", "\n(((",
         "\n\ndef cut_off(x):\n    retur", "\n```\nThat is all.", "\nx = int(input())\nprint(x)\n",
         "\n# Test\nclass TestF(unittest.TestCase):\n    def test(self): f(1)\nunittest.main()\n",
         "\ndef test():\n    assert f(1) == 2\ntest()\n", "\n\n\"\"\"\nWrite another function",
         "\nwhile True:\n    pass\n", "\x00\x00"]


@pytest.mark.parametrize("tail", TAILS)
def test_a_completion_ends_where_its_function_does(tail):
    code, found = extract(TASK, BODY + tail)
    assert found and code.startswith(TASK.prompt + BODY) and run(code)(1) == 2
    for word in ("print", "assert", "input", "main", "while", "again", "cut_off", "That"):
        assert word not in code[len(TASK.prompt):]


@pytest.mark.parametrize("tail", TAILS[:-1])
def test_a_module_ends_where_its_function_does(tail):
    for text in (MODULE + tail, f"```python\n{MODULE}{tail}"):
        code, found = extract(MBPP, text)
        assert found and run(code)(1) == 2


@pytest.mark.parametrize("text", [
    BODY,
    "y = x + 1\n    return y",  # the first line's indentation lost
    "y = x + 1\nreturn y",  # all of it
    "```\n" + BODY + "```",
    "Sure:\n```python\ny = x + 1\nreturn y\n```\n",
    "```python\n\n    y = x + 1\n    return y\n",
    "return x + 1\n\n\ndef g(x):\n    return 5\n",
    "1. this:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. done",
    '    """Again."""\n    return x + 1',
    "```python\n" + TASK.prompt + BODY + "```",
    TASK.prompt + BODY,
    "The code:\n\n" + TASK.prompt + BODY + "\nThis adds one.",
    "if x:\n    x += 0\nreturn x + 1",
    "\n\n    return x + 1",
])
def test_a_body_or_a_signature_again(text):
    code, found = extract(TASK, text)
    assert found and run(code)(1) == 2


def test_what_a_function_needs_stays():
    code = ("import sys\nsys.setrecursionlimit(9999)\nMEMO = {0: 1}\nMEMO[1] = 1\nUNUSED = 1\n"
            "for i in range(3):\n    MEMO[i] = i\nMEMO.setdefault(4, 4)\n\n\n"
            "@decorated\ndef f(x):\n    return MEMO[x] + late(x)\n\n\n"
            "def late(x):\n    return 0\n\n\ndef decorated(g):\n    return g\n")
    found = extract(MBPP, f"```python\n{code}print(f(1))\n```")[0]
    assert found == code.replace("UNUSED = 1\n", "")


def test_a_local_name_needs_no_global_of_the_same_name():
    function = "def f(x):\n    n = x + 1\n    return n\n"
    assert extract(MBPP, f"n = int(input())\n{function}print(f(n))\n")[0] == function


def test_the_imports_of_the_prompt_are_there_where_the_answer_forgets_them():
    total = read_tasks(OWN / "humaneval.jsonl")[0]
    with_type = "def running_total(numbers: List[int]):\n    return [sum(numbers)]\n"
    assert extract(total, with_type)[0] == total.setup + with_type
    without = "def running_total(numbers):\n    return [sum(numbers)]\n"
    assert extract(total, without)[0] == without
    own = "from typing import List\n" + with_type
    assert extract(total, own)[0] == own


@pytest.mark.parametrize("text", [
    "", " \n", "I cannot do that.", "```python\n```", "def g(x):\n    return x\n", "def f(x):",
    "```python\ndef f(x:\n```", "(" * 9999, "\ud800", "```", "9" * 5000,
    "```python\ndef f(x):\n    pass\n```"])
def test_an_answer_without_a_program(text):
    code, found = extract(MBPP, text)
    assert not found and code == MBPP.prompt + text


def test_where_the_function_is_not_known_any_code_will_do():
    task = Task("t", '"""\nDo.\n"""\n', "")
    assert extract(task, "```python\nprint(1)\n```") == ("print(1)\n", True)
    assert extract(task, "print(1)") == ("print(1)", True)


@given(st.text(st.sampled_from("`~p \nf()x:=\"'\\#de\t\r"), max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_answer_breaks_it(text):
    code, found = extract(TASK, text)
    if found:
        names = [s.name for s in ast.parse(code).body if isinstance(s, ast.FunctionDef)]
        assert "f" in names
    for block in fenced_blocks(text):
        assert textwrap.dedent(block) is not None


def test_every_reference_is_found_in_every_form():
    for path in FILES:
        for task in read_tasks(path):
            whole = reference(task).replace("\r\n", "\n")
            wanted = [s for s in ast.parse(whole).body
                      if getattr(s, "name", "") == task.entry_point][-1]
            answers = [f"Sure!\n```python\n{whole}\n```\nDone.", f"```python\n{whole}", whole]
            if task.prompt in whole:
                answers.append(task.solution + "\n\nprint(1)\n")
            for answer in answers:
                code, found = extract(task, answer)
                got = [s for s in ast.parse(code).body
                       if getattr(s, "name", "") == task.entry_point][-1]
                assert found and ast.dump(got) == ast.dump(wanted)
