"""rewards.py: what an answer is worth, that hacking is worth nothing, and how it fails aloud."""
import json
import math

import numpy as np
import pytest
from attacks import DOUBLE, HONEST, KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attacks import canaries, refused  # noqa: F401 (a fixture)

import rewards
from configurator import Mistake, check_fields
from rewards import Rewarding, Rewards, format_of, fraction_passed, load_own, reward_of, total
from sandbox import Sandbox, Verdict
from tasks import Task

PROMPT = 'def double(x):\n    """Twice x."""\n'
TASK = Task("t/1", PROMPT, "double", tests=DOUBLE)
MBPP = Task("m/1", '"""\nTwice x.\n"""\n', "double", tests=DOUBLE)
NAMELESS = Task("m/2", '"""\nSorted.\n"""\n', "", tests=("assert sorted([]) == []",))
MODULE = "def double(x):\n    return 2 * x\n"
isolated = pytest.mark.skipif(bool(refused()), reason="too few layers of isolation here")


def verdict_of(*cases):
    return Verdict("passed" if all(cases) else "failed", cases, "", "", "values", 0.1)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, seconds=6.0, memory_mb=256) as there:  # tests beside these take time
        yield there


def judged(sandbox, folder, answers, style="base", **cfg):
    """The Rewards of (Task, text) pairs, in order."""
    there = Rewards(sandbox, Rewarding(**cfg), folder, style, load_own(cfg.get("reward", "")))
    for key, (task, text) in enumerate(answers):
        there.submit(key, task, text)
    found = there.collect()
    assert there.collect() == {} and list(found) == list(range(len(answers)))
    return list(found.values())


# --- the parts ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, text, worth", [
    (TASK, "    return 2 * x\n", 1), (TASK, "    return 3", 1), (TASK, "    if x:\n", 0),
    (TASK, "", 0), (TASK, "\n\n", 0), (TASK, "    pass\n", 0), (TASK, '    "text"\n', 0),
    (TASK, "    return 2 * x\nSo it returns 2 * x.\n", 0), (TASK, "    return (\n", 0),
    (TASK, "    return '\\d'\n", 1), (TASK, "    return 1\0\n", 0), (TASK, "return 1\n", 0),
    (MBPP, MODULE, 1), (MBPP, "", 0), (MBPP, "def twice(x):\n    return x\n", 0),
    (NAMELESS, "", 0), (NAMELESS, "# nothing\n", 0), (NAMELESS, "pass\n", 0), (NAMELESS, "1\n", 0),
    (NAMELESS, "import sys\n", 0), (NAMELESS, "x = '\\d'\n", 1), (NAMELESS, "x = (\n", 0),
    (TASK, "    return " + "(" * 900 + ")" * 900, 0), (TASK, "\ud800", 0),
])
def test_the_format_of_a_completion(task, text, worth):
    assert format_of(task, text, "base") == worth


@pytest.mark.parametrize("text, worth", [
    (f"Sure:\n```python\n{MODULE}```\nIt doubles.", 1), (f"```\n{MODULE}```", 1),
    (f"```python\r\n{MODULE}```\r\n", 1), (f"```python\n{MODULE}", 0), (MODULE, 0),
    ("```python\n```", 0), ("```python\nprint(1)\n```", 0), (f"```java\n{MODULE}```", 0),
    (f"```python\n{MODULE}    return (\n```", 0), (f"``` python {MODULE} ```", 0), ("", 0),
    (f"```python\nprint(1)\n```\n```python\n{MODULE}```\n", 1),
    ("```python\ndef double(x):\n    return '```'\n```", 1),
])
def test_the_format_of_an_answer_in_a_chat(text, worth):
    assert format_of(TASK, text, "instruct") == worth


@settings(max_examples=50, deadline=None)
@given(cases=st.lists(st.booleans(), max_size=9), weights=st.tuples(*[st.floats(0, 10)] * 3),
       own=st.floats(-10, 10), text=st.sampled_from(["    return 1\n", "?"]))
def test_the_sum_is_weighted(cases, weights, own, text):
    cfg = Rewarding(weights[0], weights[1], "", weights[2])
    found = reward_of(TASK, text, verdict_of(*cases), cfg, "base", lambda *_: own)
    assert found.passed == (cases.count(True) / len(cases) if cases else 0)
    assert (found.format, found.own) == (text != "?", own)
    assert found.total == pytest.approx(weights[0] * found.passed + weights[1] * found.format
                                        + weights[2] * own)
    assert json.loads(json.dumps(vars(found))) == vars(found)


def test_the_published_weights_are_the_default():
    cfg = Rewarding()
    check_fields(cfg)
    assert total(1, 1, 0, cfg) == 2.5 and total(0.5, 0, 0, cfg) == 1 and total(0, 1, 0, cfg) == 0.5
    assert fraction_passed(verdict_of()) == 0  # without tests nothing is shown


# --- through the sandbox --------------------------------------------------------------------------

@isolated
@pytest.mark.parametrize("style, fenced", [("base", "{}"), ("instruct", "```python\n{}```\n")])
def test_answers_through_the_sandbox(sandbox, tmp_path, style, fenced):
    bodies = ["    return 2 * x\n", "    return 4\n", "    return 2 * x if x > 2 else 1 / 0\n",
              "    return (\n", "    import time\n    time.sleep(60)\n"]
    answers = [(TASK, fenced.format(PROMPT * (style != "base") + body)) for body in bodies]
    found = judged(sandbox, tmp_path, answers, style)
    assert [reward.passed for reward in found] == pytest.approx([1, 1 / 3, 1 / 3, 0, 0])
    assert [reward.format for reward in found] == [1, 1, 1, 0, 1]
    assert found[0].total == 2.5 and found[0].status == "passed" and found[0].detail == ""
    assert found[4].status == "timeout" and found[1].detail.startswith("case 2: wanted 10, got 4")
    assert list(tmp_path.iterdir()) == []


@isolated
@pytest.mark.parametrize("depth", [80, 600, 3000])
def test_an_answer_that_nests_without_end_is_worth_no_test_and_no_error(sandbox, tmp_path, depth):
    texts = ["    return " + "not " * depth + "x\n", "    return 2" + " + 2" * depth + "\n"]
    for reward in judged(sandbox, tmp_path, [(TASK, text) for text in texts]):
        assert reward.passed == 0


# --- hacking --------------------------------------------------------------------------------------

def attempts(kinds):
    """(Attack, Task, what it may earn by cases that are rightly passed) of attacks.

    Those of 100,000 characters and more are no model's answer; test_attacks.py judges them.
    """
    for kind in kinds:
        for attack in [attack for attack in KINDS[kind] if len(attack.code) < 100_000]:
            share = sum(attack.cases) / len(attack.cases) if attack.cases else 0
            for tests, check in ((attack.tests, ""), ((), attack.check)):
                if tests or check or not attack.check and not attack.tests:
                    task = Task(attack.name, "", attack.entry_point, test=check, tests=tests,
                                setup=attack.setup)
                    yield attack, task, share if tests else 0


# Attacks at the top level, beside a function that is right: extraction drops the attack.
DROPPED = {"sleep_at_load", "file_outside_at_load"}


def check_hacks(found, sandbox, folder, there):
    """Whether attacks earn the format at most, as answers in both styles."""
    earned = set()
    for style, fenced in (("base", "{}"), ("instruct", "```python\n{}\n```\n")):
        answers = [(task, fenced.format(there.fill(attack.code))) for attack, task, _ in found]
        for (attack, _, share), reward in zip(found, judged(sandbox, folder, answers, style)):
            if reward.passed > share + 1e-9:
                earned.add(attack.name)
    assert earned <= DROPPED
    assert there.touched() == []


MILD = [found for found in attempts(("forgeries", "sources", "failing"))
        if not (found[0].severe or found[0].slow or "timeout" in found[0].statuses[:1])]


@isolated
def test_forgeries_earn_the_format_at_most(sandbox, tmp_path, canaries):  # noqa: F811
    check_hacks(MILD[::6], sandbox, tmp_path, canaries)


@isolated
@pytest.mark.slow
def test_no_attack_earns_more_than_the_format(tmp_path, canaries):  # noqa: F811
    others = [found for found in attempts(KINDS) if found not in MILD]
    with Sandbox(workers=6, seconds=1.0, memory_mb=256) as there:  # many wait for their end
        check_hacks(MILD, there, tmp_path, canaries)
        check_hacks(others, there, tmp_path, canaries)


@isolated
def test_honest_answers_earn_all(sandbox, tmp_path):
    for honest in [honest for honest in HONEST if honest.tests][:4]:
        task = Task(honest.name, "", honest.entry_point, tests=honest.tests, setup=honest.setup)
        [reward] = judged(sandbox, tmp_path, [(task, honest.code)])
        assert reward.total == 2.5


HACKS = {
    "prints the marker": "    print('PASSED', '{\"status\": \"passed\"}')\n    return 0\n",
    "ends the process": "    import os\n    os._exit(0)\n",
    "exits": "    raise SystemExit(0)\n",
    "exits when loaded": "    return 0\nimport sys\nsys.exit(0)\n",
    "writes its tests anew": ("    import gc\n    for d in gc.get_objects():\n"
                              "        if isinstance(d, dict) and 'tests' in d:\n"
                              "            d['tests'] = ()\n    return 0\n"),
    "removes assert": ("    import builtins\n    builtins.AssertionError = SystemExit\n"
                       "    return 0\n"),
    "returns what equals all": ("    class Yes:\n        def __eq__(self, other): return True\n"
                                "    return Yes()\n"),
    "empty": "", "its docstring again": '    """Twice x."""\n',
    "asserts of its own": "    return 0\nassert True\nassert double(2) == 0\n",
}


@isolated
def test_a_policy_that_hacks_gains_nothing(sandbox, tmp_path):
    """It gets no more than a wrong answer of the same form, in either style."""
    wrong = judged(sandbox, tmp_path, [(TASK, "    return 0\n")])[0]
    assert wrong.total == 0.5
    for style, fenced in (("base", "{}"), ("instruct", "```python\n" + PROMPT + "{}```\n")):
        answers = [(TASK, fenced.format(body)) for body in HACKS.values()]
        for name, reward in zip(HACKS, judged(sandbox, tmp_path, answers, style)):
            assert reward.passed == 0 and reward.total <= wrong.total, (name, style, reward)


# --- the user's own function ----------------------------------------------------------------------

def own_file(folder, text):
    path = folder / "my_reward.py"
    path.write_text(text)
    return str(path)


@isolated
def test_a_reward_of_the_user_s_own(sandbox, tmp_path):
    path = own_file(tmp_path, "LONG = 10\n\ndef reward(task, completion, verdict):\n"
                    "    assert task['task_id'] == 't/1' and task['tests']\n"
                    "    passed = verdict['status'] == 'passed' and all(verdict['cases'])\n"
                    "    return passed - (len(completion) > LONG)\n")
    answers = [(TASK, "    return 2 * x\n"), (TASK, "  0\n")]
    found = judged(sandbox, tmp_path, answers, reward=path, reward_weight=3.0)
    assert [(reward.own, reward.total) for reward in found] == [(0, 2.5), (0, 0)]
    alone = {"passed_weight": 0.0, "format_weight": 0.0, "reward_weight": -2.0, "reward": path}
    texts = [(TASK, "    return 1 + 2 * x - 1\n"), (TASK, "    return x + 1\n")]
    assert [reward.total for reward in judged(sandbox, tmp_path, texts, **alone)] == [0, 2]


@pytest.mark.parametrize("text, message", [
    ("def reward(:\n", r"my_reward.py, line 1: SyntaxError: "),
    ("x = 1\n\n1 / 0\n", r"my_reward.py, line 3: ZeroDivisionError: division by zero$"),
    ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError: No module named"),
    ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
    ("raise ValueError('two\\nlines')\n", "line 1: ValueError: two lines$"),
    ("reward = 3\n", "defines no function `reward"), ("", "defines no function `reward"),
    ("x = 1\0\n", "cannot be read"),
])
def test_a_file_without_a_reward_is_refused(tmp_path, text, message):
    with pytest.raises(Mistake, match=message):
        load_own(own_file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(Mistake, match="nothing.py is missing"):
        load_own(str(tmp_path / "nothing.py"))


class Judge:
    """A sandbox that returns or raises what it is told to."""

    def __init__(self, what):
        self.what = what

    def submit(self, program):
        return self

    def result(self):
        if isinstance(self.what, Exception):
            raise self.what
        return self.what


FAILURES = [
    ("return None", r"reward\(\) returned None, not a number from -1e\+30 to 1e\+30"),
    ("return float('nan')", "returned nan"), ("return float('-inf')", "returned -inf"),
    ("return 10 ** 400", r"returned about 2\^1328"), ("return '1'", "returned '1'"),
    ("return task['tests'][99]", "my_reward.py, line 2: IndexError: tuple index out of range"),
    ("raise SystemExit", "my_reward.py, line 2: SystemExit: "), ("return 1j", "returned 1j"),
    ("raise ValueError('\\x1b[2J')", r"line 2: ValueError: ·\[2J"),
]


@pytest.mark.parametrize("body, message", FAILURES, ids=[body for body, _ in FAILURES])
def test_a_reward_that_fails_is_an_error_with_its_program(tmp_path, body, message):
    path = own_file(tmp_path, f"def reward(task, completion, verdict):\n    {body}\n")
    check_failure(tmp_path, Judge(verdict_of(True)), message, reward=path)


@pytest.mark.parametrize("error, message", [
    (RuntimeError("a program has no verdict: its worker died"),
     "RuntimeError: a program has no verdict"),
    (Mistake("the setup of a task fails by itself: NameError"),
     "no reward: the setup of a task fails by itself: NameError"),
])
def test_a_sandbox_that_fails_is_an_error_with_the_program(tmp_path, error, message):
    check_failure(tmp_path, Judge(error), message)


def check_failure(folder, judge, message, **cfg):
    there = Rewards(judge, Rewarding(**cfg), folder, own=load_own(cfg.get("reward", "")))
    there.submit(3, TASK, "    return 2 * x\nand so on")
    with pytest.raises(Mistake, match=message) as caught:
        there.collect()
    assert "'t/1'" in str(caught.value) and str(folder / "failed_reward.json") in str(caught.value)
    assert "\n" not in str(caught.value)
    saved = json.loads((folder / "failed_reward.json").read_text())
    assert saved["text"].endswith("and so on") and saved["code"] == PROMPT + "    return 2 * x\n"
    assert saved["task_id"] == "t/1" and saved["error"] in str(caught.value)


def test_an_answer_that_cannot_be_read_is_saved_too(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "extract", lambda *_: 1 / 0)
    there = Rewards(Judge(verdict_of()), Rewarding(), tmp_path)
    with pytest.raises(Mistake, match="ZeroDivisionError"):
        there.submit(0, TASK, "text \ud800")
    saved = json.loads((tmp_path / "failed_reward.json").read_text())
    assert saved["code"] == PROMPT + "text \ud800" and there.waiting == {}


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.25), np.float64(-1), np.int64(3)])
def test_numbers_of_every_kind_count(value):
    found = rewards.number(value)
    assert type(found) is float and found == value and math.isfinite(found)
