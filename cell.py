"""What runs behind the sandbox's walls: the fork server, and the processes that it makes.

    server       one for each worker: makes a process for every program, and nothing else; it never
                 reads what a program writes
    keeper       the first process in a program's pid namespace, asleep: when it is killed, all in
                 there end
    the program  loads the code it is sent, and answers requests: a call, a value
    the caller   in a world of its own: runs the trusted code of a test, whose `candidate` asks the
                 program through sandbox.py

`sandbox.py` starts this file as `python -c` in a fresh interpreter. Everything in the memory of the
program's process can be read and changed by the program, so nothing here decides on a verdict.

Not covered: the verdict (sandbox.py); what isolates the processes (jail.py).
"""
import builtins
import gc
import importlib
import json
import marshal
import os
import random
import select
import signal
import socket
import sys
import time
import types

import jail
from plain import LONGEST, NotPlain, decode, encode, to_bytes

WIRE = 3  # the descriptor on which a process is asked, and answers
# Exit codes: of a process that failed to shut itself in, or ran out of memory, or had to be killed
NOT_ISOLATED, NO_MEMORY, STILL_THERE = 111, 112, 113
READY = to_bytes({"ready": True})
PRELOADED = """abc array bisect collections copy datetime functools heapq itertools math operator re
    string typing""".split()


# --- the fork server ------------------------------------------------------------------------------

def preload():
    """Import what programs often do: their imports then take no time."""
    for name in PRELOADED:
        importlib.import_module(name)


def main(settings):
    """Settle in, tell sandbox.py which layers are active, then serve it until it hangs up."""
    control = socket.socket(fileno=os.dup(settings["control"]))  # a low number: see `live`
    os.close(settings["control"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # keepers must handle no signal
    try:
        settle(control, settings)
    except OSError as error:
        control.sendall(json.dumps({"error": str(error)}).encode())
        return
    isolated = settings["isolated"]
    rules = jail.file_rules(settings["readable"]) if isolated else None
    if isolated:
        settings["steps"] = jail.shutting(settings["cpu_seconds"], settings["processes"], rules,
                                          jail.seccomp_filter())
    layers = {"namespaces": isolated, "landlock": rules is not None, "seccomp": isolated,
              "rlimits": True}
    megabytes = settings["megabytes"] << 20
    jail.limit(AS=megabytes, FSIZE=16 << 20, NOFILE=64, CORE=0, STACK=8 << 20, MEMLOCK=0,
               MSGQUEUE=0, RTPRIO=0)  # of all processes from here on
    control.sendall(json.dumps({"layers": layers}).encode())
    os.environ.clear()
    for name in ("__main__", "cell", "jail", "plain"):
        sys.modules.pop(name, None)
    sys.argv[:] = [""]
    builtins.exit = builtins.quit = sys.exit  # Python's own need the module site
    random.seed(0)  # for all programs: verdicts do not depend on chance
    gc.freeze()
    serve(control, settings)


def settle(control, settings):
    """Move to a world of its own, if asked to. Raises OSError where the kernel does not let it."""
    if not settings["isolated"]:
        return
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # if memory runs out, this one goes first

    def ask_for_ids():
        control.sendall(b"i")
        if control.recv(1) != b"i":
            os._exit(1)

    jail.enter_namespaces(ask_for_ids)
    parent = os.getppid()
    server = os.fork()
    if server:
        control.close()
        watch(parent, server)
        os._exit(0)
    jail.die_with_parent()
    standard = {path for path in sys.path if os.path.isdir(path)}
    packages = {f"{path}/{name}" for path in standard for name in ("site-packages",
                                                                   "dist-packages")}
    wanted = set(settings["readable"])
    settings["readable"] = standard | library_folders() | wanted
    jail.build_files(settings["readable"], packages - wanted)


def watch(parent, server):
    """Wait for the server's end; end it when sandbox.py's process is gone."""
    if hasattr(os, "pidfd_open"):
        both = select.poll()
        both.register(os.pidfd_open(parent), select.POLLIN)
        both.register(os.pidfd_open(server), select.POLLIN)
        both.poll()
        os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


def library_folders():
    """Where the shared libraries of this process lie."""
    with open("/proc/self/maps") as f:
        paths = {line.split(maxsplit=5)[5].strip() for line in f if ".so" in line}
    return {os.path.dirname(path) for path in paths}


def serve(control, settings):
    """Obey orders of one byte: R (run, with two descriptors), K (kill), W (wait a little, kill,
    say how it ended)."""
    cell, files = None, None
    while True:
        order, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if order == b"R":
            if settings["isolated"]:
                files = empty_files(files, settings["tmp_megabytes"])
            cell = Cell(settings, descriptors)
        elif order == b"K":  # nobody waits for it
            cell.end(0)
        elif order == b"W":
            control.sendall(bytes([cell.end(0.5)]))
        else:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    if cell is not None:
        cell.end(0)


def empty_files(seen, megabytes):
    """A /tmp that no program has changed: the last one's, or a new one. Returns how it looks."""
    if seen is not None:
        if jail.untouched(seen):
            return seen
        jail.uncover_files()
    return jail.cover_files(megabytes)


class Cell:
    """A program's process, with its keeper, or without namespaces its folder.

    pid, keeper: 0 if there is none.
    """

    def __init__(self, settings, descriptors):
        self.pid = self.keeper = 0
        self.folder = None
        try:
            if settings["isolated"]:
                self.keeper = jail.start_keeper()
                jail.enter_processes(self.keeper)
            else:
                self.folder = own_folder(settings["temp"])
            self.pid = os.fork()
        except OSError:  # no memory, no processes left: `end` says so
            return
        if self.pid == 0:
            become(settings, descriptors, self.folder)
        if self.keeper:
            jail.enter_processes(os.getpid())

    def end(self, seconds):
        """End the processes. Returns an exit code, or 128 + a signal's number.

        seconds: to wait first, if the program is said to have ended.
        """
        code = self.wait(seconds) if self.pid else NOT_ISOLATED
        if self.keeper:
            os.kill(self.keeper, signal.SIGKILL)
            os.waitpid(self.keeper, 0)
        if self.folder is not None:
            kill_group(self.pid)  # what the program may have started
            remove_folder(self.folder)
        self.pid = self.keeper = 0
        return code

    def wait(self, seconds):
        last = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else min(code, 127)
            if time.monotonic() >= last:
                os.kill(self.keeper or self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return STILL_THERE
            time.sleep(0.001)


def own_folder(inside):
    import tempfile  # where namespaces are missing alone: every child would have to copy it
    return tempfile.mkdtemp(prefix="sandbox-", dir=inside)


def remove_folder(folder):
    import shutil
    shutil.rmtree(folder, ignore_errors=True)


def kill_group(leader):
    try:
        os.killpg(leader, signal.SIGKILL)
    except OSError:
        pass  # there is no other process


# --- from a fork to a program's process -----------------------------------------------------------

def become(settings, descriptors, folder):
    """Never returns: the forked process becomes the program's."""
    code = NOT_ISOLATED
    try:
        if settings["isolated"]:
            jail.shut_in(settings["steps"])
        else:
            os.setsid()
            os.chdir(folder)
            os.environ["TMPDIR"] = folder
            jail.limit(CPU=settings["cpu_seconds"], NPROC=settings["processes"])
        live(*descriptors)
    except MemoryError:
        code = NO_MEMORY
    finally:
        os._exit(code)


def live(wire, output):
    """Answer requests until there are no more."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(wire, WIRE)  # the rules of Landlock may have had this number
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # its flags are nobody else's
    os.closerange(WIRE + 1, 256)  # there are no higher ones: RLIMIT_NOFILE is 64
    os.write(WIRE, READY)
    names = {}
    for request in iter(receive, None):
        REQUESTS[request["do"]](names, request)
    os._exit(0)


def send(message):
    rest = memoryview(to_bytes(message))
    while rest:
        rest = rest[os.write(WIRE, rest):]


def receive():
    """The next request of sandbox.py's; None when there are no more."""
    size = int.from_bytes(read(4), "big")
    text = read(size)
    return marshal.loads(text) if text else None


def read(size):
    """So many bytes of the wire; b"" at its end."""
    parts = []
    while size > 0:
        part = os.read(WIRE, size)
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- requests to a program ------------------------------------------------------------------------

def load(names, request):
    """Run the module. The setup's names are there, but not the function that is to be written."""
    module = types.ModuleType(request["module"])
    sys.modules[request["module"]] = module
    if request["setup"]:
        attempt(lambda: exec(compile(request["setup"], "<setup>", "exec"), module.__dict__))
    for name in request["names"]:
        module.__dict__.pop(name, None)
    _, raised = attempt(lambda: exec(compile(request["code"], "<program>", "exec",
                                             dont_inherit=True), module.__dict__))
    names["of the program"] = module.__dict__
    missing = [name for name in request["names"] if name not in module.__dict__]
    flush()
    send({"n": request["n"], "missing": missing, **raised})


def call(names, request):
    """Call a function with plain values, and say what it returned."""
    function = names["of the program"].get(request["name"])
    args = [decode(arg) for arg in request["args"]]
    kwargs = {name: decode(arg) for name, arg in request["kwargs"].items()}
    value, reply = attempt(lambda: function(*args, **kwargs))
    flush()
    if not reply:
        reply = answer(value, request["iterators"])
    if request["iterators"]:  # the caller's own arguments change with these
        after, raised = attempt(lambda: [encode(arg, True) for arg in args])
        if not raised and after != request["args"]:
            reply["after"] = after
    text = to_bytes({"n": request["n"], **reply})
    if len(text) > LONGEST:
        reply = {"opaque": f"a value of more than {LONGEST >> 20} MB", "true": True}
    send({"n": request["n"], **reply})


def answer(value, iterators):
    """A reply with a value, or with what there is to say of one that is not plain."""
    try:
        return {"value": encode(value, iterators)}
    except NotPlain as error:
        text = str(error)
    except BaseException as error:  # of an iterator
        return describe(error)
    truth, raised = attempt(lambda: bool(value))
    return raised or {"opaque": text, "true": truth}


def attempt(action):
    """(what an action returned, {}), or (None, what it raised)."""
    try:
        return action(), {}
    except BaseException as error:  # SystemExit and others too: nothing ends in passing
        return None, describe(error)


def describe(error):
    """An exception as plain values: the nearest class of Python's own, and a line of text."""
    own = [OWN_CLASSES[id(kind)] for kind in type.mro(type(error)) if id(kind) in OWN_CLASSES]
    text, args = "", []
    try:
        text = str(error)[:1000]
        args = [encode(arg) for arg in error.args]
    except BaseException:
        pass  # a class of the program's, or something that is not plain
    return {"raised": own[0], "class": type(error).__name__[:100], "text": text, "args": args}


OWN_CLASSES = {id(kind): name for name, kind in vars(builtins).items() if isinstance(kind, type)}


def flush():
    for stream in (sys.stdout, sys.stderr):
        attempt(lambda: stream.flush())


def judge(names, request):
    """All in one process: as strong as a process can be that may rewrite its own tests."""
    space = names["of the program"]
    function = space.get(request["name"])
    _, raised = attempt(lambda: exec(compile(request["setup"], "<setup>", "exec"), space))
    if function is not None:
        space[request["name"]] = function  # a setup may hold the unfinished one
    for number, text in enumerate(request["texts"]):
        reply = raised or attempt(lambda: exec(compile(text, "<test>", "exec"), space))[1]
        flush()
        send({"n": request["n"], "case": number, **reply})


# --- requests to the caller, which runs trusted code ----------------------------------------------

class Opaque:
    """What the program returned and cannot be sent: equal to nothing, without methods.

    It can be true: the program could have returned True. It is never taken to be false.
    """

    def __init__(self, text, truth):
        self.text, self.truth = text, truth

    def __bool__(self):
        if not self.truth:
            raise TypeError(f"{self} is neither true nor false")
        return True

    def __repr__(self):
        return f"<{self.text}>"


def prepare(names, request):
    """Run the setup, and put a function in place that asks the program."""
    sys.path += request["path"]
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    names["of the tests"] = module.__dict__
    module.__name__ = "tests"
    _, raised = attempt(lambda: exec(compile(request["setup"], "<setup>", "exec"),
                                     module.__dict__))
    module.__dict__[request["name"]] = candidate
    send({"prepared": True, **raised})


def run_tests(names, request):
    for number, text in enumerate(request["texts"]):
        _, raised = attempt(lambda: exec(compile(text, "<test>", "exec"), names["of the tests"]))
        send({"case": number, **raised})


def candidate(*args, **kwargs):
    """The program's function, as the tests see it."""
    try:
        coded = [encode(arg, True) for arg in args]
        named = {name: encode(arg, True) for name, arg in kwargs.items()}
    except NotPlain as error:
        # The program must not choose its judge: what it returned, however deep, is its own doing.
        own = error.foreign is None or isinstance(error.foreign, Opaque)
        send({"stopped" if own else "unsplit": str(error)})
        os._exit(0)
    send({"args": coded, "kwargs": named})
    reply = receive()
    for arg, after in zip(args, reply.get("after", ())):
        write_back(arg, decode(after))
    if "raised" in reply:
        raise rebuilt(reply)
    if "opaque" in reply:
        return Opaque(reply["opaque"], reply["true"])
    return decode(reply["value"])


def write_back(old, new):
    """Change a list, dict or set in place, as the program changed its copy."""
    if isinstance(old, list) and isinstance(new, list):
        for place, (before, after) in enumerate(zip(old, new)):
            if type(before) is type(after) and isinstance(after, (list, dict, set)):
                write_back(before, after)
                new[place] = before
        old[:] = new
    elif isinstance(old, (dict, set)) and isinstance(new, (dict, set)):
        old.clear()
        old.update(new)


def rebuilt(reply):
    """An exception of Python's own class, for the one that the program raised."""
    kind = getattr(builtins, reply["raised"], Exception)
    for args in ([decode(arg) for arg in reply["args"]], [reply["text"]]):
        try:
            return kind(*args)
        except Exception:  # an ExceptionGroup wants exceptions
            pass
    return Exception(reply["text"])


REQUESTS = {"load": load, "call": call, "judge": judge, "prepare": prepare, "tests": run_tests}
