"""The hostile programs of attacks.py, run through sandbox.py, and what they did to the world.

All of them run in a few batches, once for this file; each then has a test of its own that looks
at its verdict. What they did outside is looked at afterwards: a file, servers, a process and a
secret (`Canaries`), and what is left of processes, descriptors, mounts and files. The forgeries
have teeth: judges that are written carelessly, as many are, believe them.

Not covered: what the layers are, how the sandbox speaks to its processes (test_sandbox.py).
"""
import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from attacks import BAD, FAILING, FOLLOWERS, FORGERIES, HONEST, KINDS, NEIGHBORS
from conftest import ROOT

from configurator import Mistake
from sandbox import Program, Sandbox

SECONDS = 1.0  # what a program may take
LATE = 30.0  # a verdict that took longer was held up by its program
MEMORY_MB = 256


def refused():
    """Why this machine cannot isolate programs, or ''."""
    try:
        with Sandbox(workers=1):
            return ""
    except Mistake as error:
        return str(error)


pytestmark = pytest.mark.skipif(bool(refused()), reason="too few layers of isolation here")


# --- what must not be reached ---------------------------------------------------------------------

class Canaries:
    """Things outside the sandbox: what tells the secret, and what must be left as it is.

    seen: names of the servers that somebody reached.
    """
    def __init__(self, folder):
        self.secret = f"canary-{secrets.token_hex(16)}"
        self.mark = f"nano{secrets.token_hex(5)}"
        self.folder = folder / "outside"
        self.folder.mkdir()
        self.file = self.folder / "notes.txt"
        self.file.write_text(self.secret)
        (self.folder / f"{self.secret}.txt").write_text(self.secret)
        self.target = self.folder / "target"
        self.other = os.environ.get("NANO_CANARY", "")  # of another one, if there is one
        os.environ["NANO_CANARY"] = self.secret
        sleeper = [sys.executable, "-c", "import time; time.sleep(900)", self.secret]
        self.process = subprocess.Popen(sleeper)
        self.host = socket.gethostname()
        self.held = [os.open(self.file, os.O_RDWR), os.open(self.folder, os.O_RDONLY)]
        for at in self.held:
            os.set_inheritable(at, True)
        self.seen, self.sockets, self.stop = [], [], False
        self.names = self.serve()

    def serve(self):
        """Start servers that tell the secret, and clients for programs that listen."""
        tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(type=socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        path = tempfile.mktemp(prefix="canary", dir="/tmp")
        unix.bind(path)
        abstract.bind(f"\0{self.mark}")
        with socket.create_server(("127.0.0.1", 0)) as free:
            listen = free.getsockname()[1]
        for name, server in (("tcp", tcp), ("unix", unix), ("abstract", abstract)):
            server.listen()
            self.start(self.tell, name, server)
        self.start(self.tell_datagrams, "udp", udp)
        self.start(self.call, socket.AF_INET, ("127.0.0.1", listen))
        self.start(self.call, socket.AF_UNIX, f"\0{self.mark}-listen")
        self.unix_path = path
        return {"TCP": tcp.getsockname()[1], "UDP": udp.getsockname()[1], "UNIX": path,
                "LISTEN": listen}

    def start(self, function, *values):
        threading.Thread(target=function, args=values, daemon=True).start()

    def tell(self, name, server):
        self.sockets.append(server)
        while True:
            try:
                other, _ = server.accept()
            except OSError:
                return
            self.seen.append(name)
            with contextlib.suppress(OSError):
                other.sendall(self.secret.encode())
            other.close()

    def tell_datagrams(self, name, server):
        self.sockets.append(server)
        while True:
            try:
                _, sender = server.recvfrom(1000)
                if sender is None:  # closed
                    return
                self.seen.append(name)
                server.sendto(self.secret.encode(), sender)
            except OSError:
                return

    def call(self, family, address):
        while not self.stop:
            time.sleep(0.05)
            with socket.socket(family) as client, contextlib.suppress(OSError):
                client.settimeout(0.2)
                client.connect(address)
                self.seen.append(f"listening at {address}")
                client.sendall(self.secret.encode())

    def fill(self, text):
        """A program's text with the names in at signs replaced."""
        if "@" not in text:
            return text
        names = {**self.names, "FILE": self.file, "TARGET": self.target, "PID": self.process.pid,
                 "PARENT": os.getpid(), "MARK": self.mark, "ABSTRACT": self.mark, "REPO": ROOT,
                 "HOME": Path.home(), "HOST": self.host, "TEMP": tempfile.gettempdir()}
        for name, value in names.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def touched(self):
        """What was reached or changed, in words; [] if nothing."""
        wrong = [f"{name} was reached" for name in self.seen]
        if self.process.poll() is not None:
            wrong.append("the process was ended")
        elif state_of(self.process.pid) in "Tt":
            wrong.append("the process was stopped")
        if sorted(os.listdir(self.folder)) != sorted([self.file.name, f"{self.secret}.txt"]):
            wrong.append(f"files outside: {os.listdir(self.folder)}")
        elif self.file.read_text() != self.secret:
            wrong.append("the file was written")
        if socket.gethostname() != self.host:
            wrong.append("the machine's name was changed")
        return wrong

    def close(self):
        self.stop = True
        self.process.kill()
        self.process.wait()
        for server in self.sockets:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # wakes accept
            server.close()
        for at in self.held:
            os.close(at)
        os.unlink(self.unix_path)
        os.environ["NANO_CANARY"] = self.other


# --- what is left behind --------------------------------------------------------------------------

def state_of(pid):
    """R, S, T, Z, …; '' if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def children():
    """{pid: its parent} of all processes; those that end meanwhile are left out."""
    found = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError):
            if name.isdigit():
                text = Path(f"/proc/{name}/stat").read_text()
                found[int(name)] = int(text.rpartition(")")[2].split()[1])
    return found


def descendants():
    """Process ids below this process."""
    parents, below = children(), set()
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent == os.getpid() or parent in below}
        grown = more - below
        below |= more
    return below


def marked(mark):
    """Process ids whose name or command line has the mark."""
    found = set()
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and int(name) != os.getpid():
                text = Path(f"/proc/{name}/comm").read_text()
                text += Path(f"/proc/{name}/cmdline").read_bytes().decode("latin-1")
                if mark in text:
                    found.add(int(name))
    return found


def adopt_orphans():
    """Whatever loses its parent below us becomes our child, so that it is seen."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def lines_of(path):
    try:
        return set(Path(path).read_text().splitlines())
    except OSError:
        return set()


def world():
    """What programs could leave behind: {what: set of things}."""
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
    queues = {line.split()[0] for kind in ("shm", "sem", "msg")
              for line in lines_of(f"/proc/sysvipc/{kind}") if line.split()[0] in
              (str(0x4E44), str(0x4E45), str(0x4E46))}
    mounts = {line.partition(" - ")[0] for line in lines_of("/proc/self/mountinfo")}
    return {"processes": descendants(), "descriptors": descriptors, "mounts": mounts,
            "queues": queues, "files": set(os.listdir(tempfile.gettempdir())),
            "threads": {thread.name for thread in threading.enumerate()},
            "children's environment": set(os.environ)}


def left_over(before, mark, wait=3.0):
    """{what: what is there now and was not before}, once things have had time to go."""
    end = time.monotonic() + wait
    while True:
        reap(before["processes"])
        now = world()
        more = {what: sorted(map(str, now[what] - before[what])) for what in now}
        more["marked"] = sorted(marked(mark))
        for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/dev/mqueue", "/", str(ROOT)):
            if os.path.isdir(folder) and any(mark in name for name in os.listdir(folder)):
                more[folder] = [mark]
        more = {what: things for what, things in more.items() if things}
        if not more or time.monotonic() > end:
            return more
        time.sleep(0.1)


def reap(known):
    """Wait for the orphans that became our children and have ended."""
    for pid in descendants() - known:
        if state_of(pid) == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


# --- running them all -----------------------------------------------------------------------------

def variants(kind, attack):
    """(name, Attack, Program) for each way in which an attack is judged."""
    name = f"{kind}-{attack.name}"
    common = {"entry_point": attack.entry_point, "setup": attack.setup}
    if attack.tests and attack.check:
        yield f"{name}-tests", attack, Program(attack.code, tests=attack.tests, **common)
        yield f"{name}-check", attack, Program(attack.code, check=attack.check, **common)
    else:
        yield name, attack, Program(attack.code, tests=attack.tests, check=attack.check, **common)


EVERY = [variant for kind, attacks in KINDS.items() for attack in attacks
         for variant in variants(kind, attack)]
FAST = [variant for variant in EVERY if not variant[1].slow]


def honest_program(honest, part):
    tests, check = (honest.tests, "") if part == "tests" else ((), honest.check)
    return Program(honest.code, honest.entry_point, tests, check, honest.setup)


CONTROLS = [(f"{honest.name}-{part}", honest_program(honest, part)) for honest in HONEST
            for part in ("tests", "check") if getattr(honest, part) or not honest.entry_point]


@pytest.fixture(scope="module")
def canaries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("canaries")
    (folder / "temp").mkdir()
    before = tempfile.tempdir
    tempfile.tempdir = str(folder / "temp")
    adopt_orphans()
    there = Canaries(folder)
    yield there
    there.close()
    tempfile.tempdir = before


def filled(program, canaries):
    return Program(canaries.fill(program.code), program.entry_point, program.tests, program.check,
                   program.setup)


@pytest.fixture(scope="module")
def results(canaries):
    """{name: verdict} of all that is not slow, what is left over, and how this process grew.

    What could hurt the machine runs only after the mild programs were contained.
    """
    before, verdicts = world(), {}
    # a process with many open files: none of them may reach a program
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(300)]
    with Sandbox(workers=6, seconds=SECONDS, memory_mb=MEMORY_MB) as sandbox:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run_honest(sandbox, verdicts, "before")
        for severe in (False, True):
            chosen = [(name, filled(program, canaries)) for name, attack, program in FAST
                      if attack.severe == severe]
            run(sandbox, verdicts, chosen)
            assert canaries.touched() == [], "not contained: what is severe was not run"
        run_honest(sandbox, verdicts, "after")
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size
    for at in many:
        os.close(at)
    return verdicts, left_over(before, canaries.mark), size


def run(sandbox, verdicts, named):
    """Put the verdicts of [(name, program)] into `verdicts`; where there is none, the reason."""
    futures = {name: sandbox.submit(program) for name, program in named}
    for name, future in futures.items():
        try:
            verdicts[name] = future.result(120)
        except Exception as error:
            verdicts[name] = error


def run_honest(sandbox, verdicts, when):
    """All honest programs at once; those that a busy machine made too late once more, alone."""
    run(sandbox, verdicts, [(f"{when}-{name}", program) for name, program in CONTROLS])
    for name, program in CONTROLS:
        for _ in range(3):
            if getattr(verdicts[f"{when}-{name}"], "status", "") == "timeout":
                run(sandbox, verdicts, [(f"{when}-{name}", program)])


def check_verdict(verdict, program, canaries):
    """What every verdict must be, whoever made it necessary."""
    if isinstance(verdict, Exception):
        raise verdict
    expected = len(program.tests) if program.tests else int(bool(program.check))
    assert verdict.status in ("passed", *BAD)
    assert isinstance(verdict.cases, tuple) and len(verdict.cases) == expected
    assert all(type(case) is bool for case in verdict.cases)
    assert (verdict.status == "passed") <= all(verdict.cases)
    assert verdict.judged in ("values", "caller", "one process")
    assert 0 <= verdict.seconds < LATE
    assert type(verdict.detail) is str and len(verdict.detail) < 2000
    assert verdict.detail == "" or verdict.detail.isprintable()  # one line, no terminal codes
    assert type(verdict.output) is str and len(verdict.output) < 1 << 20
    (verdict.detail + verdict.output).encode()  # a file can hold it
    assert canaries.secret not in verdict.detail + verdict.output


@pytest.mark.parametrize("name, attack, program", FAST, ids=[name for name, _, _ in FAST])
def test_an_attack_does_not_pass(results, canaries, name, attack, program):
    verdict = results[0][name]
    print(verdict)
    check_verdict(verdict, program, canaries)
    assert verdict.status in attack.statuses
    if attack.cases and program.tests:
        assert verdict.cases == attack.cases
    else:
        assert not any(verdict.cases)
    for text in attack.absent:
        assert text not in verdict.output


SLOW = [variant for variant in EVERY if variant[1].slow]


@pytest.mark.slow
@pytest.mark.parametrize("name, attack, program", SLOW, ids=[name for name, _, _ in SLOW])
def test_a_slow_attack_does_not_pass(canaries, name, attack, program):
    with Sandbox(workers=1, seconds=SECONDS, memory_mb=MEMORY_MB) as sandbox:
        verdict = sandbox.submit(filled(program, canaries)).result(30)
    check_verdict(verdict, program, canaries)
    assert verdict.status in attack.statuses


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name, program", CONTROLS, ids=[name for name, _ in CONTROLS])
def test_an_honest_program_passes_before_and_after_the_attacks(results, canaries, when, name,
                                                               program):
    verdict = results[0][f"{when}-{name}"]
    print(verdict)
    check_verdict(verdict, program, canaries)
    assert verdict.status == "passed", verdict


def test_nothing_outside_was_reached(results, canaries):
    assert canaries.touched() == []


def test_the_attacks_leave_nothing_behind(results):
    assert results[1] == {}


def test_this_process_does_not_grow_with_what_programs_send(results):
    assert results[2] < 300 * 1024  # KiB; the largest program sends 150 MB, some send without end


def test_there_are_enough_of_them():
    attacks = [attack for attacks in KINDS.values() for attack in attacks]
    assert len({attack.name for attack in attacks}) == len(attacks) >= 130
    assert len(FORGERIES) >= 35 and len(HONEST) >= 15
    assert len(FOLLOWERS) + len(NEIGHBORS) >= 20


# --- pairs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def followers(canaries):
    """[(verdict of the first, of the second)], all on one worker."""
    with Sandbox(workers=1, seconds=SECONDS, memory_mb=MEMORY_MB) as sandbox:
        programs = []
        for pair in FOLLOWERS:
            programs.append(Program(canaries.fill(pair.first), "f", pair.first_tests))
            programs.append(Program(canaries.fill(pair.second), "f", pair.tests))
            programs.append(honest_program(HONEST[0], "tests"))
        verdicts = list(sandbox.judge(programs))
    return list(zip(verdicts[::3], verdicts[1::3], verdicts[2::3]))


@pytest.mark.parametrize("number", range(len(FOLLOWERS)), ids=[pair.name for pair in FOLLOWERS])
def test_a_program_finds_nothing_of_the_one_before(followers, canaries, number):
    first, second, honest = followers[number]
    print(first, second, honest)
    check_verdict(second, Program("", "f", FOLLOWERS[number].tests), canaries)
    assert second.status != "passed" and not any(second.cases)
    assert honest.status == "passed", honest


@pytest.fixture(scope="module")
def neighbors(canaries):
    """[(verdict of the victim, of the attacker)], each two at the same time."""
    with Sandbox(workers=6, seconds=3 * SECONDS, memory_mb=MEMORY_MB) as sandbox:
        found = []
        for start in range(0, len(NEIGHBORS), 3):
            running = [(sandbox.submit(Program(canaries.fill(pair.first), "f", pair.first_tests)),
                        sandbox.submit(Program(canaries.fill(pair.second), "f", pair.tests)))
                       for pair in NEIGHBORS[start:start + 3]]
            found += [(first.result(60), second.result(60)) for first, second in running]
    return found


@pytest.mark.parametrize("number", range(len(NEIGHBORS)), ids=[pair.name for pair in NEIGHBORS])
def test_programs_beside_each_other_are_strangers(neighbors, number):
    victim, attacker = neighbors[number]
    print(victim, attacker)
    assert victim.status == "passed", victim
    assert attacker.status != "passed"


# --- housekeeping ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_after_a_thousand_mixed_programs_nothing_is_left(canaries):
    before, rng = world(), random.Random(5)
    quick = [(name, program) for name, attack, program in FAST
             if not attack.severe and "timeout" not in attack.statuses[:1]]
    hostile = rng.sample(quick, 150)
    failing = [(attack.name, Program(attack.code, attack.entry_point, attack.tests, attack.check))
               for attack in FAILING]
    honest = [(f"honest {name}", program) for name, program in CONTROLS]
    repeated = itertools.islice(itertools.cycle(honest + failing), 1000 - len(hostile))
    mixed = hostile + list(repeated)
    rng.shuffle(mixed)
    with Sandbox(workers=4, seconds=8 * SECONDS, memory_mb=MEMORY_MB) as sandbox:
        programs = (filled(program, canaries) for _, program in mixed)
        verdicts = list(sandbox.judge(programs))
        during = world()
    assert len(verdicts) == len(mixed) == 1000
    wrong = [(name, verdict) for (name, _), verdict in zip(mixed, verdicts)
             if (verdict.status == "passed") != name.startswith("honest ")]
    assert wrong == []
    assert len(during["descriptors"]) < len(before["descriptors"]) + 60  # nothing for each program
    assert canaries.touched() == []
    assert left_over(before, canaries.mark) == {}


# --- the forgeries have teeth ---------------------------------------------------------------------

# Judges as they are often written; never given anything that could do harm.
EXIT_CODE = "the exit code of the program with its tests behind it"
ONE_PROCESS = r'''
import json, sys
task = json.load(sys.stdin)
space = {"__name__": "__main__"}
cases = []
try:
    exec(task["code"], space)
    for test in task["tests"]:
        try:
            exec(test, space)
            cases.append(True)
        except Exception as error:
            cases.append(False)
    if task["check"]:
        exec(task["check"], space)
        space["check"](space[task["entry_point"]])
        cases.append(True)
except Exception as error:
    cases.append(False)
print(json.dumps({"status": "passed" if all(cases) else "failed", "cases": cases}))
'''
THROUGH_JSON = r'''
import ast, json, sys
task = json.load(sys.stdin)
space = {}
exec(task["code"], space)
values = []
for test in task["tests"]:
    call = ast.get_source_segment(test, ast.parse(test).body[0].test.left)
    values.append(eval(call, space))
print(json.dumps(values, default=list))
'''


def program_of(attack, use_check):
    """The program, its tests behind it, as one text."""
    if use_check:
        return f"{attack.code}\n{attack.check}\ncheck({attack.entry_point})\n"
    return "\n".join([attack.code, *attack.tests, ""])


def naive(judge, attack, use_check):
    """Whether a careless judge lets the attack pass."""
    text = program_of(attack, use_check)
    task = json.dumps({"code": attack.code, "tests": () if use_check else attack.tests,
                       "check": attack.check if use_check else "",
                       "entry_point": attack.entry_point})
    start = [sys.executable, "-I"]
    if judge == "exit code":
        return run_naive([*start, "-c", text]).returncode == 0
    if judge == "marker":
        return "PASSED" in run_naive([*start, "-c", text + "\nprint('PASSED')"]).stdout
    if judge == "exec":
        return '"status": "passed"' in run_naive([*start, "-c", ONE_PROCESS], task).stdout
    if judge == "json":
        values = json.loads(run_naive([*start, "-c", THROUGH_JSON], task).stdout)
        right = [test.partition(" == ")[2] for test in attack.tests]
        return values == [json.loads(json.dumps(eval(text), default=list)) for text in right]
    raise ValueError(judge)


def run_naive(command, given=""):
    """Run a command in a fresh folder: what a program writes is gone with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=20,
                              errors="replace", cwd=folder)


FOOLING = [attack for attack in FORGERIES if attack.fools]
THIRD = [pytest.param(attack, id=attack.name, marks=[pytest.mark.slow] if number % 3 else [])
         for number, attack in enumerate(FOOLING)]


@pytest.mark.parametrize("attack", THIRD)
def test_a_forgery_deceives_a_careless_judge(canaries, attack):
    for judge in attack.fools.split(", "):
        assert naive(judge, attack, use_check=not attack.tests)


def test_the_careless_judges_know_right_from_wrong():
    right = next(honest for honest in HONEST if honest.name == "double")
    wrong = next(attack for attack in FAILING if attack.name == "wrong_answer")
    for judge in ("exit code", "marker", "exec", "json"):
        assert naive(judge, right, use_check=False)
        assert not naive(judge, wrong, use_check=False)


def test_enough_forgeries_deceive_a_careless_judge():
    assert len(FOOLING[::3]) >= 20


# --- the attacks have teeth -----------------------------------------------------------------------

# What does no harm on its own, and is seen if nothing contains it.
HARMLESS = """
etc_passwd etc_passwd_by_system_call etc_passwd_by_symlink etc_passwd_by_mmap canary_file
canary_file_at_load canary_file_through_proc_root canary_file_by_climbing_up
canary_file_by_inherited_folder canary_file_by_include folder_of_the_canary_listed repository
repository_listed environment environment_by_shell environment_of_processes
command_lines_of_processes canary_process_in_proc own_memory_for_secrets descriptors_inherited
network_tables_of_the_machine file_outside file_outside_by_shell file_outside_by_symlink
canary_file_overwritten canary_file_truncated moved_outside new_privileges_possible tcp
tcp_fast_open tcp_by_urllib tcp_by_asyncio udp unix_socket unix_socket_abstract netlink listening
listening_abstract canary_process_killed test_process_stopped priorities_of_others
limits_of_others door_ptrace_traceme door_unshare_user door_clone_new_user door_clone3_new_user
door_personality door_memfd_executed door_kcmp
""".split()
CONTAINED = [attack for attacks in KINDS.values() for attack in attacks if attack.name in HARMLESS]


@pytest.mark.slow
@pytest.mark.parametrize("attack", CONTAINED, ids=[attack.name for attack in CONTAINED])
def test_an_attack_succeeds_where_nothing_contains_it(tmp_path, attack):
    there = Canaries(tmp_path)
    code = there.fill(attack.code) + "\nprint('answer', f())\n"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True,
                              timeout=20, cwd=tmp_path, close_fds=False)
        told = "answer escaped" in done.stdout or there.secret in done.stdout
        assert told or there.touched() != [], done
    finally:
        there.close()


def test_the_harmless_attacks_exist():
    assert sorted(attack.name for attack in CONTAINED) == sorted(HARMLESS)
