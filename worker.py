"""Isolated processes from the outside: their servers, what they are asked, how they end.

    Worker    the servers of one verdict at a time; starts them anew when they have died
    Server    a process of cell.py's that makes others
    Child     one of those: requests, replies, what it prints, what ended it

What a child sends may be anything: it is bounded, and parsed as plain values.

Not covered: what is asked, and the verdict (sandbox.py).
"""
import json
import marshal
import math
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jail
from cell import NO_MEMORY, STILL_THERE
from plain import LONGEST, NotPlain, from_bytes

KEPT_OUTPUT = 2**16  # bytes of what a program prints
PATIENCE = 60  # seconds for what is not the program's work: a start on a busy machine
CALLER_MEGABYTES = 2048  # for the tests' own process
# What `random` and `threading` do in the child after every fork takes longer than the fork; a
# server has one thread, and its children seed `random` themselves. So they do not hear of forks.
BOOT = """
import json, os, sys
register, os.register_at_fork = os.register_at_fork, lambda **_: None
sys.path[0] = sys.argv[1]
import cell
cell.preload()
del sys.path[0]
os.register_at_fork = register
cell.main(json.loads(sys.argv[2]))
"""


class Died(Exception):
    """A server is gone, or never came."""


class Stopped(Exception):
    """A program's run ended before its tests did."""

    def __init__(self, status, detail):
        super().__init__(detail)
        self.status, self.detail = status, detail


class Server:
    """A fork server (cell.py) with at most one program's process. Raises Died.

    layers: which are active there.
    """

    def __init__(self, settings):
        self.control, theirs = socket.socketpair()
        settings = {**settings, "control": theirs.fileno()}
        # The order of a set is the same every time; a thread takes no address space for an arena.
        environment = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-X", "utf8", "-c", BOOT, str(Path(__file__).parent),
                 json.dumps(settings)], cwd="/", env=environment, pass_fds=[theirs.fileno()],
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL)
        try:
            self.layers = self.greet()
        except BaseException:
            self.close()
            raise

    def greet(self):
        """Give the server its user ids, if it asks, and hear which layers it has."""
        self.control.settimeout(PATIENCE)
        try:
            heard = self.control.recv(2**16)
            if heard == b"i":
                self.give_ids()
                self.control.sendall(b"i")
                heard = self.control.recv(2**16)
            heard = json.loads(heard)
        except (OSError, ValueError) as error:
            raise Died(f"the sandbox's server did not start: {error}") from error
        if "error" in heard:
            raise Died(heard["error"])
        return heard["layers"]

    def give_ids(self):
        if os.geteuid() == 0:
            try:
                return jail.write_ids(self.process.pid, True)
            except OSError:  # a container's root has no nobody to give
                pass
        return jail.write_ids(self.process.pid, False)

    def run(self, wire, output):
        """Start a process with these descriptors."""
        try:
            socket.send_fds(self.control, [b"R"], [wire, output])
        except OSError as error:
            raise Died("the sandbox's server is gone") from error

    def kill(self):
        """End the process; the next order waits until it has ended."""
        try:
            self.control.sendall(b"K")
        except OSError as error:
            raise Died("the sandbox's server is gone") from error

    def last_words(self):
        """The exit code of a process that has ended; 128 + the signal that ended it."""
        try:
            self.control.sendall(b"W")
            code = self.control.recv(1)
        except OSError:
            code = b""
        if not code:
            raise Died("the sandbox's server is gone")
        return code[0]

    def close(self):
        """End the server and everything below it, and wait until they are gone."""
        try:
            self.control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.control.close()


class Child:
    """An isolated process: what it is asked, what it replies, what it prints. Raises Stopped, Died.

    seconds: until it is late, counted from when the process is there.
    """

    def __init__(self, server, seconds):
        self.server = server
        self.incoming, self.outgoing, self.output = bytearray(), bytearray(), bytearray()
        self.began, self.open = False, True
        self.wire, theirs = socket.socketpair()
        self.reading, writing = os.pipe()
        try:
            server.run(theirs.fileno(), writing)
        finally:
            theirs.close()
            os.close(writing)
        self.wire.setblocking(False)
        self.poll = select.poll()
        self.poll.register(self.reading, select.POLLIN)
        self.deadline = time.monotonic() + PATIENCE
        self.hear()  # that it is isolated
        self.began = True
        self.deadline = time.monotonic() + seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.stop()
        except Died:
            pass  # whoever needs the server next finds out

    def stop(self, ended=False):
        """End the process, once. Returns its exit code, if it had `ended` by itself."""
        if not self.open:
            return None
        self.open, code = False, None
        try:
            if ended:
                code = self.server.last_words()
            else:
                self.server.kill()
            self.read_rest()
        finally:
            self.wire.close()
            os.close(self.reading)
        return code

    def read_rest(self):
        """What is left in the pipe, up to its end: the process is gone then."""
        rest, last = select.poll(), time.monotonic() + 10
        rest.register(self.reading, select.POLLIN)
        while time.monotonic() < last and rest.poll(1000) and self.read_output():
            pass

    def read_output(self):
        data = os.read(self.reading, KEPT_OUTPUT)
        room = KEPT_OUTPUT - len(self.output)
        self.output += data[:room]
        return data

    def printed(self):
        text = self.output.decode(errors="replace")
        return text + "\n[cut]" if len(self.output) == KEPT_OUTPUT else text

    def say(self, message):
        """Send a request; this way all is trusted, and marshal is quicker than JSON."""
        text = marshal.dumps(message)
        self.outgoing += len(text).to_bytes(4, "big") + text

    def ask(self, request):
        """The reply to a request that could not be foreseen."""
        nonce = secrets.token_hex(8)
        self.say({**request, "n": nonce})
        return self.heard(nonce)

    def heard(self, nonce):
        reply = self.hear()
        if reply.get("n") != nonce:
            raise Stopped("failed", "the program wrote to the sandbox's pipe")
        return reply

    def hear(self):
        """The next message, while outgoing ones are sent and what is printed is read."""
        while len(self.incoming) < 4:
            self.exchange()
        size = int.from_bytes(self.incoming[:4], "big")
        if size > LONGEST:
            raise Stopped("failed", "the program wrote too much to the sandbox's pipe")
        while len(self.incoming) < size + 4:
            self.exchange()
        text = bytes(self.incoming[4:size + 4])
        del self.incoming[:size + 4]
        try:
            return from_bytes(text)
        except NotPlain as error:
            raise Stopped("failed", f"the program sent {error}") from error

    def exchange(self):
        """Wait until something can be read or written, and do so."""
        left = self.deadline - time.monotonic()
        self.poll.register(self.wire, select.POLLIN | (select.POLLOUT if self.outgoing else 0))
        ready = self.poll.poll(max(0, math.ceil(left * 1000)))
        if left <= 0 or not ready:
            self.stop()
            if not self.began:
                raise Died("a process did not start")
            raise Stopped("timeout", "it took too long")
        for descriptor, event in ready:
            if descriptor == self.reading:
                if not self.read_output():
                    self.poll.unregister(self.reading)
                continue
            try:
                if event & select.POLLOUT:
                    del self.outgoing[:self.wire.send(self.outgoing)]
                data = self.wire.recv(2**16) if event & ~select.POLLOUT else None
            except BlockingIOError:
                continue
            except OSError:  # nobody is there to read
                data = b""
            if data == b"":
                raise self.end_of_program()
            self.incoming += data or b""

    def end_of_program(self):
        """What to say of a process that has ended, or has closed its pipe."""
        code = self.stop(ended=True)
        if not self.began:
            return Died(f"a process could not be isolated (exit code {code})")
        if code == NO_MEMORY:
            return Stopped("memory", "it ran out of memory")
        if code == STILL_THERE:
            return Stopped("crash", "it closed the sandbox's pipe")
        if code < 128:
            return Stopped("crash", f"it left with exit code {code}")
        if code - 128 == signal.SIGSYS:
            return Stopped("refused", "it tried what the sandbox forbids (SIGSYS)")
        if code - 128 == signal.SIGXCPU:
            return Stopped("timeout", "it used too much CPU time")
        return Stopped("crash", f"it was ended by {signal_name(code - 128)}")


def signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:  # those for real time have no names
        return f"signal {number}"


class Worker:
    """Where one verdict at a time is made: a server for programs, another for tests that are code.

    Both are started when they are first needed, and again when they have died.
    """

    def __init__(self, settings, seconds):
        self.settings, self.seconds = settings, seconds
        self.site_folders = site_folders()
        self.servers, self.lock, self.closed = {}, threading.Lock(), False

    def server(self, caller):
        with self.lock:
            if self.closed:
                raise Died("the sandbox has been closed")
            if caller not in self.servers:
                settings = self.settings
                if caller:
                    settings = {**settings, "readable": self.site_folders,
                                "megabytes": CALLER_MEGABYTES}
                self.servers[caller] = Server(settings)
            return self.servers[caller]

    def restart(self):
        with self.lock:
            for server in self.servers.values():
                server.close()
            self.servers = {}

    def close(self):
        with self.lock:
            self.closed = True
        self.restart()


def site_folders():
    """Where this process finds installed packages: the tests, which are trusted, may need numpy."""
    names = ("site-packages", "dist-packages")
    return [path for path in sys.path if Path(path).name in names and Path(path).is_dir()]
