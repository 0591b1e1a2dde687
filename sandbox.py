"""Run untrusted Python and come back with a verdict.

    with Sandbox() as sandbox:
        for verdict in sandbox.judge([Program(code, "f", tests=("assert f(1) == 2",))]):
            print(verdict.status)

`python sandbox.py` says which layers of isolation this machine has.

Each program runs in a process of its own, which the kernel isolates (jail.py, cell.py). The verdict
is made here: this process asks the program's function for values, rebuilds them as plain values
(plain.py), and compares (questions.py). What is compared with never enters the program's process.
docs/sandbox.md says what this stops and what it does not.

Not covered: reading tasks (tasks.py); languages other than Python.
"""
if __name__ == "__main__":  # a mistake prints no traceback
    from configurator import begin
    begin()

import builtins
import math
import os
import platform
import queue
import reprlib
import secrets
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jail
from cell import Opaque
from configurator import Mistake, shortened, visible
from plain import NotPlain, decode, encode
from questions import plan
from worker import PATIENCE, Child, Died, Stopped, Worker

LONGEST_CODE = 2**20  # characters of a program
TRIES = 3  # workers for one program, if they die
TMP_MEGABYTES = 64  # of files that a program may write
AHEAD = 4  # programs for each worker, taken from an iterable before their turn


@dataclass
class Program:
    code: str  # the candidate's whole module
    entry_point: str = ""  # the function the tests call
    tests: tuple[str, ...] = ()  # one assert statement each
    check: str = ""  # code that defines check(candidate)
    setup: str = ""  # trusted code that tests may need: imports, helper functions


@dataclass
class Verdict:
    status: str  # passed, failed, timeout, memory, crash or refused
    cases: tuple[bool, ...]  # of `tests`, one each; of `check`, one for all
    detail: str  # one line: what went wrong first; "" if nothing did
    output: str  # what the program printed, cut
    judged: str  # "values", "caller" or "one process"
    seconds: float


# --- judging a program ----------------------------------------------------------------------------

class Run:
    """One program's way to a verdict, in one worker. Raises Died and Mistake."""

    def __init__(self, worker, program):
        self.worker, self.program = worker, program
        self.plan = plan(program.entry_point, tuple(program.tests), program.check, program.setup)
        self.judged, self.cases, self.output = self.plan.judged, [], ""
        self.status, self.detail = "passed", ""

    def verdict(self):
        began = time.monotonic()
        total = len(self.plan.questions) + len(self.plan.texts)
        try:
            self.check_code()
            if self.plan.questions:
                self.ask_for_values()
            elif self.judged == "caller":
                self.let_caller_ask()
            else:
                self.run_together()
        except Stopped as stopped:
            self.fail(stopped.status, stopped.detail)
        self.cases += [False] * (total - len(self.cases))
        return Verdict(self.status, tuple(self.cases), self.detail, self.output, self.judged,
                       time.monotonic() - began)

    def fail(self, status, detail):
        """Note the first thing that went wrong."""
        if self.status == "passed":
            if self.plan.questions or self.plan.texts:
                detail = f"case {len(self.cases) + 1}: {detail}"
            line = visible(" ".join(detail.split()))
            self.status, self.detail = status, line if len(line) <= 500 else line[:497] + "..."

    def check_code(self):
        """Raise Stopped for what is not a Python file."""
        code = self.program.code
        if len(code) > LONGEST_CODE:
            raise Stopped("refused", f"the program has more than {LONGEST_CODE:,} characters")
        if "\0" in code:
            raise Stopped("refused", "the program has a NUL character")
        try:
            code.encode()
        except UnicodeEncodeError as error:
            raise Stopped("refused", "the program is not UTF-8 text") from error

    def load(self, child):
        """Run the program's module."""
        tested = self.plan.questions or self.plan.texts
        names = [self.plan.name] if self.plan.name else []
        reply = child.ask({"do": "load", "code": self.program.code, "names": names,
                           "setup": self.program.setup,
                           "module": "candidate" if tested else "__main__"})
        if "raised" in reply:
            raise Stopped(*explain(reply))
        if reply.get("missing"):
            raise Stopped("failed", f"the program has no {self.plan.name}")

    def child(self, caller=False):
        if caller:
            return Child(self.worker.server(True), PATIENCE)
        return Child(self.worker.server(False), self.worker.seconds)

    def ask_for_values(self):
        with self.child() as child:
            try:
                self.load(child)
                for question in self.plan.questions:
                    reply = child.ask({"do": "call", "name": question.name, "args": question.args,
                                       "kwargs": question.kwargs, "iterators": False})
                    self.judge(question, reply)
            finally:
                child.stop()
                self.output = child.printed()

    def judge(self, question, reply):
        """One case: compare what the program returned."""
        if "raised" in reply:
            self.fail(*explain(reply))
            self.cases.append(False)
            return
        foreign = "opaque" in reply
        answer = Opaque(word(reply, "opaque"), reply.get("true") is True) if foreign else (
            value_of(reply))
        try:
            holds = question.holds(answer)
        except Exception:  # Decimal("sNaN") == 1 raises, and so would the assert statement
            holds = False
        if not holds:
            self.fail("failed", f"wanted {wanted(question)}, got {brief(answer)}")
        self.cases.append(holds)

    def let_caller_ask(self):
        with self.child(caller=True) as caller:
            caller.say({"do": "prepare", "setup": self.program.setup, "name": self.plan.name,
                        "path": self.worker.site_folders})
            reply = caller.hear()
            if "raised" in reply:
                raise Mistake(f"the setup of a task fails by itself: {explain(reply)[1]}")
            with self.child() as child:
                try:
                    self.load(child)
                    split = self.relay(caller, child)
                finally:
                    child.stop()
                    self.output = child.printed()
        if not split:
            self.judged, self.cases, self.status, self.detail = "one process", [], "passed", ""
            self.run_together()

    def relay(self, caller, child):
        """Carry calls from the tests to the program. Returns whether they could be carried."""
        caller.deadline = child.deadline
        caller.say({"do": "tests", "texts": list(self.plan.texts)})
        full = False
        while len(self.cases) < len(self.plan.texts):
            message = caller.hear()
            if "unsplit" in message:
                return False
            if "stopped" in message:
                raise Stopped("failed", f"the program returned {word(message, 'stopped')}")
            if "case" in message:
                if "raised" in message:
                    status, detail = explain(message)
                    self.fail("memory" if full else status, detail)
                self.cases.append("raised" not in message)
                continue
            reply = child.ask({"do": "call", "name": self.plan.name, "iterators": True,
                               "args": message["args"], "kwargs": message["kwargs"]})
            full = full or reply.get("raised") == "MemoryError"
            caller.say(clean(reply))
        return True

    def run_together(self):
        with self.child() as child:
            try:
                self.load(child)
                nonce = secrets.token_hex(16)
                child.say({"do": "judge", "n": nonce, "name": self.plan.name,
                           "setup": self.program.setup, "texts": list(self.plan.texts)})
                for number in range(len(self.plan.texts)):
                    reply = child.heard(nonce)
                    if reply.get("case") != number:
                        raise Stopped("failed", "the program wrote to the sandbox's pipe")
                    if "raised" in reply:
                        self.fail(*explain(reply))
                    self.cases.append("raised" not in reply)
            finally:
                child.stop()
                self.output = child.printed()


class Brief(reprlib.Repr):
    """Values in a line."""

    def repr_int(self, value, level):
        return shortened(value)


def brief(value):
    how = Brief()
    how.maxstring = how.maxother = 60
    return how.repr(value)


def wanted(question):
    if question.relation in ("true", "false"):
        return "a value that is " + question.relation
    return ("" if question.relation == "==" else question.relation + " ") + brief(question.expected)


def word(reply, key):
    """A text of a reply that may hold anything."""
    found = reply.get(key)
    return found if type(found) is str else "something"


def explain(reply):
    """(status, detail) of what was raised."""
    kind, text = word(reply, "class"), word(reply, "text")
    status = "memory" if reply.get("raised") == "MemoryError" else "failed"
    return status, f"{kind}: {text}" if text else kind


def value_of(reply):
    try:
        return decode(reply.get("value"))
    except NotPlain as error:
        raise Stopped("failed", f"the program sent {error}") from error


def clean(reply):
    """A reply of the program's as the caller may have it: parsed, and written anew."""
    try:
        fresh = {key: [encode(decode(coded), True) for coded in reply[key]]
                 for key in ("after", "args") if type(reply.get(key)) is list}
        if "raised" not in reply and "opaque" not in reply:
            return {**fresh, "value": encode(decode(reply.get("value")), True)}
    except NotPlain as error:
        raise Stopped("failed", f"the program sent {error}") from error
    if "opaque" in reply:
        return {**fresh, "opaque": word(reply, "opaque"), "true": reply.get("true") is True}
    kind = getattr(builtins, word(reply, "raised"), None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        raise Stopped(*explain(reply))  # SystemExit and its like end more than the call
    return {"args": [], **fresh, "raised": kind.__name__, "text": word(reply, "text")}


# --- many at once ---------------------------------------------------------------------------------

class Sandbox:
    """Runs programs, one in each worker at a time. Close it, or use it in a `with` statement.

    workers: 0 for one per core. seconds: wall-clock time of a program with all of its tests.
    memory_mb: its address space. unsafe_execution: where the kernel cannot isolate programs, run
    them all the same, with limits only.
    layers: {name: whether it is active}. Raises Mistake where too few are.
    """

    def __init__(self, workers=0, seconds=3.0, memory_mb=512, unsafe_execution=False):
        if not (0 <= workers <= 1024 and 0 < seconds <= 86400 and 64 <= memory_mb <= 2**20):
            raise Mistake(f"a sandbox with workers={workers}, seconds={seconds}, memory_mb="
                          f"{memory_mb} cannot be: workers are 0 to 1,024, seconds at most 86,400, "
                          "and memory_mb 64 to 1,048,576")
        settings = settings_for(seconds, memory_mb)
        first, missing = first_worker(settings, seconds)
        if missing and not unsafe_execution:
            raise Mistake(f"programs cannot be isolated here ({missing}): use a Linux machine that "
                          "allows user namespaces, or give --unsafe_execution=true to run them "
                          "with your own rights")
        if missing:
            settings = {**settings, "isolated": False, "processes": 0}
            first = Worker(settings, seconds)
        self.layers = first.server(False).layers
        count = workers or cores()
        self.workers = [first, *[Worker(settings, seconds) for _ in range(count - 1)]]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)
        self.pool = ThreadPoolExecutor(count, "sandbox")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End all processes, at once; verdicts that are not there yet will not be."""
        for worker in self.workers:
            worker.close()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, program):
        """A Future of the program's Verdict. It raises Mistake where a task itself is wrong."""
        return self.pool.submit(self.run, program)

    def judge(self, programs):
        """Yield the Verdicts of an iterable of programs, in order. Takes few before their turn."""
        waiting = deque()
        try:
            for program in programs:
                waiting.append(self.submit(program))
                while waiting[0].done() or len(waiting) >= AHEAD * len(self.workers):
                    yield waiting.popleft().result()
                    if not waiting:
                        break
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def run(self, program):
        """The Verdict of a program, from the first worker that is free."""
        worker = self.idle.get()
        try:
            for attempt in range(1, TRIES + 1):
                try:
                    return Run(worker, program).verdict()
                except Died as died:
                    if worker.closed or attempt == TRIES:
                        raise RuntimeError(f"a program has no verdict: {died}") from died
                    worker.restart()
        finally:
            self.idle.put(worker)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_for(seconds, memory_mb):
    """What a server is told."""
    return {"isolated": True, "readable": [], "processes": 64, "megabytes": memory_mb,
            "tmp_megabytes": TMP_MEGABYTES, "temp": tempfile.gettempdir(),
            "cpu_seconds": math.ceil(seconds) + 1}


def first_worker(settings, seconds):
    """(a worker that isolates, ""), or (None, why there is none)."""
    if sys.platform != "linux":
        return None, f"{sys.platform} has no namespaces"
    if jail.seccomp_filter() is None:
        return None, f"the system calls of {platform.machine()} are not known"
    worker = Worker(settings, seconds)
    try:
        worker.server(False)
    except (Died, OSError) as error:
        worker.close()
        return None, str(error)
    return worker, ""


def main():
    with Sandbox(workers=1) as sandbox:
        active = [name for name, is_active in sandbox.layers.items() if is_active]
    print(f"programs are isolated by {', '.join(active)}")


if __name__ == "__main__":
    main()
