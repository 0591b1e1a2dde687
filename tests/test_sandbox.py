"""Verdicts against what `assert` says, plain values against hostile text, and what is left behind.

Where the machine lacks layers, the tests of isolation are skipped, and pytest prints which and why;
those of unsafe execution run everywhere.

Not covered: the attacks (test_attacks.py).
"""
import collections
import enum
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import jail
import questions
from configurator import Mistake
from plain import DEEPEST, NotPlain, decode, encode, from_bytes, to_bytes
from questions import plan
from sandbox import Program, Sandbox
from worker import KEPT_OUTPUT


@pytest.fixture(scope="module")
def box():
    try:
        sandbox = Sandbox(workers=2, seconds=20)
    except Mistake as error:
        pytest.skip(f"THE SANDBOX IS NOT TESTED: {error}")
    with sandbox:
        yield sandbox


def judged(box, code, *tests, **rest):
    return box.submit(Program(code, "f", tests, **rest)).result(100)


# --- plain values ---------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.complex_numbers(
    allow_nan=False), st.fractions(), st.decimals(allow_nan=False))
SCALARS = st.one_of(NUMBERS, st.none(), st.text(), st.binary(), st.just(...))
KEYS = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)), max_leaves=6)
VALUES = st.recursive(KEYS, lambda inner: st.one_of(
    st.lists(inner, max_size=5), st.lists(inner, max_size=5).map(tuple), st.sets(KEYS, max_size=5),
    st.dictionaries(KEYS, inner, max_size=5)), max_leaves=12)


def over_the_wire(value, iterators=False):
    return decode(from_bytes(to_bytes({"value": encode(value, iterators)})[4:])["value"])


@given(VALUES)
@settings(max_examples=60, deadline=None)
def test_plain_values_arrive_as_they_were(value):
    there = over_the_wire(value)
    assert there == value and type(there) is type(value)
    assert repr(there) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


class Color(enum.IntEnum):
    RED = 3


class Liar(int):
    def __eq__(self, other):
        return True

    def __index__(self):
        return 99

    __int__ = __hash__ = __index__


class Pair(collections.namedtuple("Pair", "x y")):
    def __iter__(self):
        return iter("no")


class Items(list):
    def __iter__(self):
        return iter("no")


class Text(str):
    def __str__(self):
        return "no"


@pytest.mark.parametrize("value, wanted", [
    (Color.RED, 3), (Liar(5), 5), (Items([1, "a"]), [1, "a"]), (Pair(1, 2), (1, 2)),
    (Text("a"), "a"), ({Text("k"): Liar(1)}, {"k": 1}),
    (collections.Counter("aab"), {"a": 2, "b": 1}), (collections.OrderedDict(a=1), {"a": 1}),
    (collections.defaultdict(list, a=[1]), {"a": [1]}), (bytearray(b"x"), bytearray(b"x")),
    ({"a": 1}.keys(), {"a"}), ({"a": 1}.items(), {("a", 1)}), (range(3), range(3)),
    (collections.deque([1]), collections.deque([1])), (float("-inf"), float("-inf")),
    (Decimal("1.50"), Decimal("1.5")), (Fraction(1, 3), Fraction(1, 3)), ("\ud800", "\ud800"),
    (2**5000, 2**5000), ([2**60, 1.0, True], [2**60, 1.0, True])], ids=repr)
def test_subclasses_arrive_as_their_base(value, wanted):
    there = over_the_wire(value)
    assert there == wanted
    assert type(there).__module__ in ("builtins", "collections", "decimal", "fractions")


def test_views_and_iterators():
    assert list(over_the_wire({1: [2]}.values())) == [[2]]
    assert list(over_the_wire((n for n in range(3)), iterators=True)) == [0, 1, 2]
    assert str(over_the_wire(float("nan"))) == "nan"


@pytest.mark.parametrize("value", [object(), len, (n for n in "a"), [object()], int, Exception()])
def test_other_values_are_not_plain(value):
    with pytest.raises(NotPlain):
        encode(value)


def test_values_that_hold_themselves_are_not_plain():
    value = []
    value.append(value)
    with pytest.raises(NotPlain):
        encode(value)


CODED = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
              st.sampled_from(["list", "dict", "set", "int", "keys", "items", "range", "float",
                               "Fraction", "Decimal", "complex", "bytes", "0x1", "iterator"])),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(), inner,
                                                                          max_size=2)))


@given(CODED)
@settings(max_examples=400, deadline=None)
def test_hostile_text_gives_plain_values_or_an_error(coded):
    try:
        value = decode(coded)
    except NotPlain:
        return
    assert type(value).__module__ in ("builtins", "collections", "decimal", "fractions")


@pytest.mark.parametrize("text", [
    b"", b"[1]", b"\xff", b"nan", b'{"a": NaN}', b'{"a": ' + b"1" * 100 + b"}", b"[" * 10**6,
    b'{"a": Infinity}', b'"' + b"x" * 10])
def test_messages_that_are_none(text):
    with pytest.raises(NotPlain):
        from_bytes(text)


def test_text_that_would_take_long_is_refused_at_once():
    same_hash = [["int", hex(n * (2**61 - 1))] for n in range(1, 50_000)]
    deep = ["list"]
    for _ in range(DEEPEST + 2):
        deep = ["list", deep]
    for coded in (["set", *same_hash], ["dict", *[part for key in same_hash for part in (key, 1)]],
                  deep, ["Fraction", "0x" + "f" * 10**6, "0x" + "e" * 10**6]):
        with pytest.raises(NotPlain):
            decode(coded)


# --- what is asked --------------------------------------------------------------------------------

@pytest.mark.parametrize("test, judge", [
    ("assert f(1, [2], k={'a': -1.5}) == {(1,): {2}}", "values"), ("assert 3 == f(1)", "values"),
    ("assert f(1) is None, 'no'", "values"), ("assert not f(set())", "values"),
    ("assert f(1)", "values"), ("assert f(1) != 'a'", "values"), ("assert f(...) is ...", "values"),
    ("assert abs(f(1) - 2) < 1e-6", "caller"), ("assert f(f(1)) == 1", "caller"),
    ("assert f(1) in (1, 2)", "caller"), ("assert f(x for x in [1]) == 1", "caller"),
    ("assert set(f(1)) == {1}", "caller"), ("assert f(*[1]) == 1", "caller"),
    ("assert f(**{}) == 1", "caller"), ("assert f(1) is 1", "caller"), ("f(1)", "caller"),
    ("assert f(1) == f(2)", "caller"), ("assert f(1).lower() == 'a'", "caller"),
    ("import math\nassert math.isclose(f(1), 2)", "caller"), ("assert 1 < f(1) < 3", "caller"),
    ("assert f(1)(2) == 3", "one process"), ("assert f(1).area == 3", "one process"),
    ("assert f(Node(1)) == 3", "one process"), ("assert f.calls == 1", "one process")])
def test_the_text_of_a_test_decides_who_judges(test, judge):
    assert plan("f", (test,), "", "").judged == judge


def test_names_of_the_setup_are_known_and_a_name_is_found():
    assert plan("f", ("assert f(g(1)) == 1",), "", "def g(x): return x").judged == "caller"
    assert plan("f", ("assert f(pi) == 1",), "", "from math import *").judged == "caller"
    assert plan("", ("assert other(1) == 1",), "", "").name == "other"


@pytest.mark.parametrize("tests, check", [(("assert f(",), ""), ((), "def check(c): ("),
                                          (("\0",), "")])
def test_a_task_that_is_not_python_is_a_mistake(tests, check):
    with pytest.raises(Mistake, match="of a task is not Python"):
        plan("f", tests, check, "")


RELATIONS = ["assert f() == {}", "assert {} == f()", "assert f() != {}", "assert f()",
             "assert not f()", "assert f() is None", "assert f() is not None", "assert f() is True"]
ANSWERS = st.one_of(VALUES, st.sampled_from([True, 1, 1.0, 0, None, [], "", (), float("nan")]))


@given(st.sampled_from(RELATIONS), ANSWERS, ANSWERS)
@settings(max_examples=120, deadline=None)
def test_a_question_holds_where_assert_does(form, expected, answer):
    """The oracle is the assert statement, on the value as the parent rebuilds it."""
    test = form.format(repr(expected))
    asked = plan("f", (test,), "", "").questions
    if not asked:  # nan, inf, Fraction(1, 2): no literals
        return
    try:
        exec(test, {"f": lambda: answer})
        wanted = True
    except AssertionError:
        wanted = False
    assert asked[0].holds(over_the_wire(answer)) == wanted


# --- verdicts -------------------------------------------------------------------------------------

ECHO = "def f(x=None, **rest):\n    return x\n"


@pytest.mark.parametrize("code, test, cases, status", [
    (ECHO, "assert f(True) == 1", (True,), "passed"),
    (ECHO, "assert f([1, (2,)]) == [1, (2,)]", (True,), "passed"),
    (ECHO, "assert f((1,)) == [1]", (False,), "failed"),
    ("from enum import IntEnum\nE = IntEnum('E', 'a')\ndef f(): return [E.a]",
     "assert f() == [1]", (True,), "passed"),
    ("def f():\n    yield 1", "assert f() == [1]", (False,), "failed"),
    ("def f():\n    yield 1", "assert list(f()) == [1]", (True,), "passed"),
    ("import re\ndef f(): return re.match('a', 'a')", "assert f()", (True,), "passed"),
    ("class A:\n    __eq__ = lambda s, o: True\ndef f(): return A()", "assert f() == 1", (False,),
     "failed"),
    ("class A:\n    __bool__ = lambda s: False\ndef f(): return A()", "assert not f()", (False,),
     "failed"),
    ("class A:\n    __bool__ = lambda s: False\ndef f(): return A()", "assert f()", (False,),
     "failed"),
    ("from decimal import Decimal\ndef f(): return Decimal('sNaN')", "assert f() == 1", (False,),
     "failed"),
    ("def f(): raise SystemExit(0)", "assert f() is None", (False,), "failed"),
    ("raise SystemExit(0)", "assert f() is None", (False,), "failed"),
    ("def f(): exit()", "assert abs(f()) == 0", (False,), "failed"),
    ("def f(): return 1 / 0", "assert f() is None", (False,), "failed"),
    ("def g(): pass", "assert f() is None", (False,), "failed"),
    ("def f(:", "assert f() is None", (False,), "failed"),
    ("import os\ndef f(): os._exit(0)", "assert f() is None", (False,), "crash"),
    ("import ctypes\ndef f(): ctypes.string_at(0)", "assert f() is None", (False,), "crash"),
    ("import os\ndef f(): os.close(3)", "assert f() is None", (False,), "crash"),
    ("import os\ndef f(): os.write(3, b'x' * 99)", "assert f() is None", (False,), "failed"),
    ("import ctypes\ndef f(): ctypes.CDLL(None).ptrace(0, 0, 0, 0)", "assert f() is None", (False,),
     "refused"),
    ("def f(): return [0] * 10**9", "assert f() is None", (False,), "memory"),
    ("def f(): return [0] * 10**9", "assert len(f()) == 1", (False,), "memory"),
    ("def f(x): return f(x)", "assert f(1) is None", (False,), "failed"),
    ("x = '\0'", "assert f() is None", (False,), "refused"),
    ("x = '\ud800'", "assert f() is None", (False,), "refused"),
    ("x = 1\n" * 200_000, "assert f() is None", (False,), "refused"),
    ("def f(): return b'x' * 10**7", "assert len(f()) == 10**7", (False,), "failed"),
])
def test_statuses(box, code, test, cases, status):
    verdict = judged(box, code, test)
    assert (verdict.status, verdict.cases) == (status, cases), verdict
    assert (verdict.detail == "") == (status == "passed") and "\n" not in verdict.detail


def test_cases_are_judged_one_by_one_and_state_stays_between_them(box):
    code = "seen = []\ndef f(x):\n    seen.append(x)\n    print(x)\n    return len(seen)\n"
    verdict = judged(box, code, "assert f(7) == 1", "assert f(8) == 1", "assert f(9) == 3")
    assert verdict.cases == (True, False, True) and verdict.output == "7\n8\n9\n"
    assert (verdict.status, verdict.judged) == ("failed", "values")
    assert verdict.detail == "case 2: wanted 1, got 2"


def test_a_check_calls_the_program_as_it_would_its_own_function(box):
    code = """
        def f(items, extra=0):
            if not items:
                raise KeyError("empty")
            items.sort()
            return (x + extra for x in items)
    """
    check = """
        def check(candidate):
            given = [3, [2], 1][::2]
            assert list(candidate(given, extra=10)) == [11, 13]
            assert given == [1, 3]
            try:
                candidate([])
            except KeyError as error:
                assert str(error) == "'empty'"
                assert candidate(twice([2])) is not None
            else:
                assert False
    """
    setup = "def twice(x):\n    return x * 2\ndef f(items):\n    'not written yet'\n"
    verdict = judged(box, textwrap.dedent(code), check=textwrap.dedent(check), setup=setup)
    assert (verdict.status, verdict.cases, verdict.judged) == ("passed", (True,), "caller"), verdict


def test_tests_that_need_the_programs_objects_run_in_one_process(box):
    code = "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v\n"
    verdict = judged(box, code, "assert f(Node(3)) == 3", "assert f(Node(3)) == 4")
    assert (verdict.judged, verdict.cases) == ("one process", (True, False))
    verdict = judged(box, "def f(g): return g(2)", check="def check(c):\n    assert c(abs) == 2")
    assert (verdict.judged, verdict.status) == ("one process", "passed")
    verdict = judged(box, "def f(n): exit()\nclass Node: pass", "assert f(Node()) == 3")
    assert (verdict.status, verdict.cases) == ("failed", (False,))


def test_an_answer_repeats_the_number_of_its_question(box):
    """Answers to questions that nobody has asked yet are none, however well they are written."""
    code = """
        import os
        def write(text):
            os.write(3, len(text).to_bytes(4, "big") + text)
        def f():
            write(b'{"n":"0123456789abcdef","value":1}')
    """
    verdict = judged(box, textwrap.dedent(code), "assert f() == 1", "assert f() == 1")
    assert (verdict.status, verdict.cases) == ("failed", (False, False))
    assert verdict.detail == "case 1: the program wrote to the sandbox's pipe"


def test_leaving_is_not_raising(box):
    check = "def check(c):\n    try:\n        c(1)\n    except BaseException:\n        return\n"
    check += "    assert False"
    assert judged(box, "def f(x): raise ValueError", check=check).status == "passed"
    assert judged(box, "def f(x): exit()", check=check).status == "failed"


def test_the_unfinished_function_of_a_setup_is_not_the_programs(box):
    setup = "def f(x):\n    'to be written'\ndef helper(x):\n    return x\n"
    check = "def check(c):\n    assert c(1) is None"
    assert judged(box, "", check=check, setup=setup).status == "failed"
    assert judged(box, "", "assert f(1) is None", setup=setup).status == "failed"
    code = "def f(x):\n    return helper(None)"
    assert judged(box, code, check=check, setup=setup).status == "passed"


def test_what_a_program_returns_never_moves_it_to_one_process(box):
    """Otherwise a program could choose the weakest judge."""
    code = "class Any:\n    def __eq__(s, o): return True\ndef f(x):\n    return "
    deep = "[" * DEEPEST + "]" * DEEPEST
    for value in ("Any()", deep, "iter([Any()])", "iter(range(99_999))", "f"):
        for call in ("c(c(1))", "c([c(1)])", "c((n for _ in 'ab' for n in c(1)))"):
            verdict = judged(box, code + value, check=f"def check(c):\n    assert {call} == 3")
            assert (verdict.judged, verdict.status) == ("caller", "failed"), (value, verdict)


def test_without_tests_a_program_is_just_run(box):
    assert judged(box, "if __name__ == '__main__': print(1)").output == "1\n"
    assert judged(box, "assert False").status == "failed"
    assert judged(box, "import os; os._exit(0)").status == "crash"


def test_what_programs_import(box):
    code = """
        import asyncio, bz2, ctypes, dataclasses, decimal, hashlib, json, sqlite3, tempfile, zlib
        import threading, typing
        @dataclasses.dataclass
        class A:
            x: "int" = 3
        async def one():
            return A().x
        with tempfile.TemporaryFile() as file:
            file.write(zlib.compress(b"x"))
        thread = threading.Thread(target=print, args=("thread", flush := True))
        thread.start()
        thread.join()
        print(asyncio.run(one()), typing.get_type_hints(A))
    """
    verdict = judged(box, textwrap.dedent(code))
    assert verdict.status == "passed", verdict
    assert verdict.output == "thread True\n3 {'x': <class 'int'>}\n"


def test_chance_and_the_order_of_sets_are_the_same_for_every_program(box):
    code = "import random\nprint(random.random(), set('abcdefgh'))"
    programs = [Program(code)] * 6
    assert len({verdict.output for verdict in box.judge(programs)}) == 1


def test_no_program_sees_another(box):
    code = "import os, sys, math\nprint(os.listdir('/tmp'), hasattr(math, 'mine'), os.getpid())\n"
    leave = "math.mine = 1\nopen('/tmp/x', 'w').close()\nos.environ['X'] = '1'\n"
    outputs = {verdict.output for verdict in box.judge([Program(code + leave)] * 6)}
    assert outputs == {"[] False 2\n"}


def test_output_is_cut(box):
    verdict = judged(box, "print('x' * 10**6)\ndef f(): pass", "assert f() is None")
    assert verdict.status == "passed" and len(verdict.output) < KEPT_OUTPUT + 10


def test_a_setup_that_fails_is_the_tasks_mistake(box):
    with pytest.raises(Mistake, match="setup of a task fails by itself.*no_such_module"):
        judged(box, ECHO, check="def check(c): pass", setup="import no_such_module")


def test_tests_may_use_numpy(box):
    check = "import numpy\ndef check(c):\n    assert numpy.allclose(c([1.0]), [1.0])"
    verdict = judged(box, ECHO, check=check)
    assert verdict.status == "passed", verdict
    assert judged(box, "import numpy").status == "failed"  # programs have the standard library


def test_verdicts_come_in_order_and_programs_are_taken_when_there_is_room(box):
    taken = []

    def programs():
        for number in range(60):
            taken.append(number)
            yield Program(f"import time\ntime.sleep({0.02 * (number % 3)})\nprint({number})")

    verdicts = box.judge(programs())
    assert next(verdicts).output == "0\n" and len(taken) < 20
    assert [int(verdict.output) for verdict in verdicts] == list(range(1, 60))


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(99)",
                                  "while True: print('x' * 10000)"])
def test_a_program_has_its_time(box, code):
    with Sandbox(workers=1, seconds=0.5) as sandbox:
        verdict = judged(sandbox, f"def f():\n    return 1\n{code}", "assert f() == 1")
    assert (verdict.status, verdict.cases) == ("timeout", (False,)) and verdict.seconds > 0.5


def test_settings_out_of_bounds():
    for wrong in ({"workers": -1}, {"seconds": 0}, {"memory_mb": 1}, {"seconds": float("nan")}):
        with pytest.raises(Mistake, match="cannot be"):
            Sandbox(**wrong)


# --- what is left ---------------------------------------------------------------------------------

def below(pid):
    """The ids of all processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2]
                                               .split()[1])
            except OSError:  # it has just ended
                pass
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def runs(pid):
    """Whether a process still does something: not one that has ended and waits to be collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(condition, seconds=60):
    last = time.monotonic() + seconds
    while not condition() and time.monotonic() < last:
        time.sleep(0.02)
    return condition()


def test_nothing_is_left(box):
    def here():
        ours = [name for name in os.listdir("/tmp") if name.startswith("sandbox-")]
        return len(os.listdir("/proc/self/fd")), below(os.getpid()), ours

    before = here()
    mounts = Path("/proc/self/mounts").read_text()
    programs = [Program(ECHO, "f", ("assert f(1) == 1",)), Program("import os; os._exit(1)"),
                Program("open('/tmp/x', 'w')"), Program(ECHO, "f", ("assert abs(f(1)) == 1",))]
    with Sandbox(workers=2, seconds=20) as sandbox:
        assert len(list(sandbox.judge(programs * 5))) == 20
        assert len(below(os.getpid())) > len(before[1])
    assert here() == before and Path("/proc/self/mounts").read_text() == mounts


PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from sandbox import Program, Sandbox
with Sandbox(workers=2, seconds=60) as sandbox:
    futures = [sandbox.submit(Program("while True: pass")) for _ in range(4)]
    print("running", flush=True)
    futures[0].result()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_its_parent(box, number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(ROOT)], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    assert parent.stdout.readline() == b"running\n"
    wait_until(lambda: len(below(parent.pid)) >= 8, 60)
    family = below(parent.pid)
    assert len(family) == 8  # two watchers, servers, keepers and programs
    parent.send_signal(number)
    parent.wait(20)
    parent.stdout.close()
    assert wait_until(lambda: not any(runs(pid) for pid in family))


def test_a_worker_that_is_killed_is_replaced_and_no_verdict_is_lost(box):
    with Sandbox(workers=1, seconds=20) as sandbox:
        slow = Program("import time\ntime.sleep(0.7)\ndef f(): return 1", "f",
                       ("assert f() == 1",))
        future = sandbox.submit(slow)
        time.sleep(0.3)
        os.kill(sandbox.workers[0].servers[False].process.pid, signal.SIGKILL)
        assert future.result(60).status == "passed"
        assert sandbox.submit(slow).result(60).status == "passed"


def test_after_closing_there_are_no_verdicts(box):
    sandbox = Sandbox(workers=1, seconds=60)
    running = sandbox.submit(Program("while True: pass"))
    time.sleep(0.3)
    sandbox.close()
    assert isinstance(running.exception(10), RuntimeError)
    with pytest.raises(RuntimeError):
        sandbox.submit(Program(""))


# --- layers ---------------------------------------------------------------------------------------

def test_the_layers_are_said(box):
    assert box.layers == {"namespaces": True, "landlock": jail.landlock_version() > 0,
                          "seccomp": True, "rlimits": True}


LOOK = """
import os, resource, socket, sys
def attempt(action):
    try:
        return repr(action())
    except OSError as error:
        return type(error).__name__
print(attempt(lambda: open("/etc/passwd").read()), attempt(lambda: os.listdir("/proc")),
      attempt(socket.socket), attempt(os.fork), attempt(lambda: os.kill(1, 0)),
      attempt(lambda: open(os.__file__, "a")), attempt(lambda: os.listdir(REPO)),
      attempt(lambda: os.execv(sys.executable, ["python"])), dict(os.environ),
      os.getuid(), os.getgid(), os.getgroups(), os.uname().nodename,
      os.statvfs(os.__file__).f_flag & os.ST_RDONLY,
      resource.getrlimit(resource.RLIMIT_CORE))
"""


def test_what_a_program_sees_of_the_machine(box):
    verdict = judged(box, LOOK.replace("REPO", repr(str(ROOT))))
    gone = "FileNotFoundError FileNotFoundError PermissionError PermissionError PermissionError"
    if box.layers["landlock"]:
        gone += " PermissionError"
    else:
        gone += " OSError"
    groups = verdict.output.split(" {} ")[1].split(" sandbox ")[0]
    assert verdict.output == f"{gone} FileNotFoundError PermissionError {{}} {groups} sandbox " \
                             "1 (0, 0)\n"
    assert groups.startswith("65534 65534 ")


# A process that may not make namespaces: by seccomp, as in many containers, or by a system's limit.
WITHOUT_UNSHARE = """
import ctypes, platform, struct, sys
sys.path.insert(0, sys.argv[1])
import jail
unshare = (272, 97)[jail.ARCHITECTURES[platform.machine()][0]]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
header = struct.pack("HP", len(steps), ctypes.addressof(program))
jail.system("prctl", 38, 1, 0, 0, 0)
jail.system("prctl", 22, 2, header, 0, 0)
"""
WITHOUT_NAMESPACES = """
import sys
sys.path.insert(0, sys.argv[1])
open("/proc/sys/user/max_user_namespaces", "w").write("0")
"""
TRY = """
import json, os
from configurator import Mistake
from sandbox import Program, Sandbox
try:
    Sandbox(workers=1)
    refusal = None
except Mistake as error:
    refusal = str(error)
with Sandbox(workers=2, seconds=20, unsafe_execution=True) as box:
    code = "import os\\nopen('here', 'w').close()\\nprint(os.listdir('.'), [*os.environ])\\n"
    tests = "assert f(1) == 1", "assert f(1) == 2"
    programs = [Program(code + "def f(x): return x", "f", tests),
                Program("def f(x): return x", "f", ("assert abs(f(-1)) == -1",)),
                Program("import os\\nos._exit(0)"), Program("import os\\nos.kill(os.getpid(), 11)"),
                Program("x = [0] * 10**10"), Program("import time\\ntime.sleep(0)")]
    verdicts = [[v.status, v.cases, v.output] for v in box.judge(programs)]
with Sandbox(workers=1, seconds=0.5, unsafe_execution=True) as quick:
    late = quick.submit(Program("while True: pass")).result().status
left = os.listdir(os.environ["TMPDIR"])
print(json.dumps([refusal, box.layers, verdicts, late, left]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes layers away, which Linux alone has")
@pytest.mark.parametrize("how", ["seccomp", "limit"])
def test_too_few_layers_are_refused_and_unsafe_execution_does_without(how, tmp_path):
    command = [sys.executable, "-c", (WITHOUT_UNSHARE if how == "seccomp" else WITHOUT_NAMESPACES)
               + TRY, str(ROOT)]
    if how == "limit":
        if not shutil.which("unshare") or subprocess.run(["unshare", "-Ur", "true"]).returncode:
            pytest.skip("no user namespace can be made, whose limit the test would lower")
        command = ["unshare", "-Ur", *command]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100,
                         env={**os.environ, "TMPDIR": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr
    refusal, layers, verdicts, late, left = json.loads(ran.stdout)
    assert refusal.startswith("programs cannot be isolated here (") and "unshare" in refusal
    assert "--unsafe_execution=true" in refusal
    assert layers == {"namespaces": False, "landlock": False, "seccomp": False, "rlimits": True}
    assert [status for status, _, _ in verdicts] == ["failed", "failed", "crash", "crash", "memory",
                                                     "passed"]
    assert verdicts[0][1:] == [[True, False], "['here'] ['TMPDIR']\n"]
    assert (late, left) == ("timeout", [])


def runs_as_nobody(python):
    ran = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"],
                         user=65534, group=65534, extra_groups=[], capture_output=True)
    return ran.returncode == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="the other tests run as an ordinary user already")
def test_an_ordinary_user_has_the_same_sandbox(box, tmp_path):
    pythons = [name for name in (sys.executable, "/usr/bin/python3") if Path(name).exists()]
    usable = []
    for python in pythons:
        try:
            usable += [python] if runs_as_nobody(python) else []
        except PermissionError:
            pass
    if not usable:
        pytest.skip(f"the user nobody can run none of {pythons}, which lie in root's folders")
    folder = Path("/tmp", f"sandbox-test-{os.getpid()}")
    folder.mkdir()
    try:
        folder.chmod(0o755)
        for name in "cell configurator jail plain questions sandbox worker".split():
            shutil.copy(ROOT / f"{name}.py", folder)
        script = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from sandbox import Program, Sandbox
with Sandbox(workers=1, seconds=20) as box:
    print(box.layers == {box.layers!r})
    print(box.submit(Program({LOOK.replace("REPO", repr(str(ROOT)))!r})).result().output)
"""
        ran = subprocess.run([usable[0], "-B", "-c", script], user=65534, group=65534, cwd="/",
                             extra_groups=[], capture_output=True, text=True, timeout=100)
    finally:
        shutil.rmtree(folder)
    here = judged(box, LOOK.replace("REPO", repr(str(ROOT)))).output
    assert ran.stdout == f"True\n{here}\n", ran.stderr


def test_the_filter_allows_what_is_listed_and_nothing_else():
    """The filter's own instructions, run here for every call's number."""
    code = jail.seccomp_filter()
    if code is None:
        pytest.skip("the system calls of this machine are not listed")
    column, architecture = jail.ARCHITECTURES[os.uname().machine]
    allowed, attacks = (set(jail.numbers(table, column)) for table in (jail.ALLOWED, jail.ATTACKS))
    assert not allowed & attacks and len(allowed) > 90
    for number in range(600):
        action = run_filter(code, architecture, number, (0xFFFF, 0xFFFF))
        if number in allowed:
            assert action == jail.ALLOW, number
        elif number in attacks:
            assert action == jail.KILL, number
        else:
            assert action in (jail.NOT_PERMITTED, jail.NOT_THERE), number
    assert run_filter(code, architecture ^ 1, 0, (0, 0)) == jail.KILL
    clone, prlimit, socketpair, ioctl, _ = [calls[column] for calls in jail.CONDITIONAL]
    for number, arguments, wanted in (
            (clone, (0x3D0F00, 0), jail.ALLOW), (clone, (17, 0), jail.NOT_PERMITTED),
            (clone, (0x3D0F00 | jail.NEW_USER, 0), jail.NOT_PERMITTED),
            (prlimit, (0, 0), jail.ALLOW), (prlimit, (1, 0), jail.NOT_PERMITTED),
            (socketpair, (1, 1), jail.ALLOW), (socketpair, (2, 1), jail.NOT_PERMITTED),
            (ioctl, (0, 0x5401), jail.ALLOW), (ioctl, (0, 0x5412), jail.NOT_PERMITTED)):
        assert run_filter(code, architecture, number, arguments) == wanted, (number, arguments)


def run_filter(code, architecture, number, arguments):
    """What a classic BPF program returns; the instructions that jail.py uses."""
    data = {0: number, 4: architecture, 16: arguments[0], 24: arguments[1]}
    size, at, loaded = 8, 0, 0
    while True:
        step = code[at * size:(at + 1) * size]
        kind, yes, no = int.from_bytes(step[:2], sys.byteorder), step[2], step[3]
        value = int.from_bytes(step[4:], sys.byteorder)
        at += 1
        if kind == jail.RETURN:
            return value
        if kind == jail.LOAD:
            loaded = data[value]
        elif kind == jail.AND:
            loaded &= value
        elif kind == jail.EQUAL:
            at += yes if loaded == value else no
        else:
            assert kind == jail.AT_LEAST
            at += yes if loaded >= value else no


def test_descriptors_that_a_program_sends_go_nowhere(box):
    code = """
        import array, os, socket
        wire = socket.socket(fileno=3)
        text = b"{}"
        message = len(text).to_bytes(4, "big") + text
        wire.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [1]))])
        wire.detach()
        def f():
            return 1
    """
    before = len(os.listdir("/proc/self/fd"))
    assert judged(box, textwrap.dedent(code), "assert f() == 1").status == "failed"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_text_is_parsed_again_where_another_thread_disturbed_the_parser(monkeypatch):
    """CPython 3.11's SystemError: "AST constructor recursion depth mismatch"."""
    real, failures = questions.ast.parse, [SystemError("recursion depth mismatch")]

    def disturbed(text):
        if failures:
            raise failures.pop()
        return real(text)

    monkeypatch.setattr(questions.ast, "parse", disturbed)
    assert len(questions.parse("x = 1\n", "a test").body) == 1 and not failures
