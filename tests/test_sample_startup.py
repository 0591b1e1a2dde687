"""How `python sample.py` starts and stops: in processes of their own, with real signals, pipes and
terminals."""
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from reference import write_tiny_run

STOPPED = 128 + signal.SIGINT
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "sympy",
         "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "huggingface_hub",
         "watch")
TILES = "attention: PyTorch tiles, since the device is cpu, not cuda\n"


@pytest.fixture(scope="module")
def endless(data_folder, tmp_path_factory):
    """A run of a model that writes 100,000 tokens, which takes minutes."""
    run = tmp_path_factory.mktemp("endless") / "run"
    write_tiny_run(run, data_folder, context=100_000)
    return run


def start(*arguments, python=(), **environment):
    return subprocess.Popen(
        [sys.executable, *python, "sample.py", "--device=cpu", *arguments], cwd=ROOT, text=True,
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """Returns (exit status, stdout, stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_after_the_first_completion_neither_compiler_nor_checkpoints_are_loaded(endless):
    script = (f"import sys, sample\n"
              f"sample.main(['--init_from={endless}', '--max_new_tokens=6', '--device=cpu'])\n"
              f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "--- 6 tokens in" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_ctrl_c_while_sampling_prints_what_has_been_written(endless):
    process = start(f"--init_from={endless}", "--prompt=def f(n):", "--max_new_tokens=100000")
    header = process.stdout.readline()
    assert header.startswith(f"--- {endless}") and "block, K = 4" in header
    assert "max_new_tokens=" in process.stdout.readline()  # then the writing begins
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, err) == (STOPPED, TILES)
    title, text, speed = out.splitlines()
    assert title == "--- sample 1 of 1"
    written = text.removeprefix("def f(n):")
    assert len(written) + len("def f(n):") == len(text) and written and set(written) <= {"x", "y"}
    assert speed.startswith(f"--- {len(written)} tokens in")
    assert speed.endswith(", stopped")


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.8, 1.5])
def test_ctrl_c_in_the_first_seconds_prints_no_traceback(endless, seconds):
    """-X importtime tells when configurator.py has been read, the first file of ours."""
    process = start(f"--init_from={endless}", "--max_new_tokens=100000",
                    python=("-X", "importtime"))
    for line in process.stderr:
        if line.split("|")[-1].strip() == "configurator":
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    said = [line for line in err.splitlines()
            if not line.startswith(("import time:", "attention:"))]
    said += [line.rpartition(", ")[2] for line in out.splitlines()[-1:]]  # it may sample by then
    assert status == STOPPED and said == ["stopped"]


@pytest.mark.parametrize("arguments, says", [
    (["--prompt", "--samples=2"], "--prompt needs a value, and '--samples=2' is another setting"),
    ([b"--prompt=x\xff = 1"], "error: the text is not Unicode: character 1 is '\\udcff'"),
    (["--temperature=1e39"], "error: temperature=1e+39 does not fit: temperature is a float from"),
    (["--samples=1000000000000"], "does not fit: samples is an int from 1 to 1,024"),
])
def test_mistakes_are_one_line_before_anything_is_sampled(endless, arguments, says):
    status, out, err = finish(start(f"--init_from={endless}", *arguments))
    assert status == 1 and out == ""
    assert says in err and err.count("\n") == 1


def test_a_terminal_that_knows_only_ascii_gets_the_text_all_the_same(endless):
    process = start(f"--init_from={endless}", "--prompt=# naïve ✓", "--max_new_tokens=4",
                    PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    status, out, err = finish(process)
    assert (status, err) == (0, TILES)
    assert out.splitlines()[3].startswith("# na\\xefve \\u2713")


def test_a_second_ctrl_c_ends_the_program(endless):
    process = start(f"--init_from={endless}", "--max_new_tokens=100000", "--steps=1",
                    "--block_size=100000")  # a forward of minutes
    for _ in range(2):
        process.stdout.readline()
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    status, out, err = finish(process)
    assert status == STOPPED and "tokens in" not in out and "Traceback" not in err


# --- pipes ----------------------------------------------------------------------------------------

def test_completion_from_a_pipe(endless):
    done = subprocess.run(
        f"printf 'def f(n):' | {sys.executable} sample.py --init_from={endless} --prompt=- "
        "--max_new_tokens=4 --device=cpu", shell=True, cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, TILES)
    assert done.stdout.splitlines()[3] == "def f(n):xxxx"


def test_many_prompts_in_a_pipe_give_json_lines_alone(endless):
    done = subprocess.run(
        f"printf 'a\nb\n' | {sys.executable} sample.py --init_from={endless} --prompts=- "
        "--max_new_tokens=4 --device=cpu", shell=True, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["prompt"], line["completion"]) for line in found] == [("a", "xxxx"),
                                                                        ("b", "xxxx")]


def test_a_reader_that_leaves_ends_it_without_a_word(endless):
    process = start(f"--init_from={endless}", "--prompt=x", "--max_new_tokens=40", "--samples=9")
    process.stdout.close()
    assert process.wait(120) == 128 + signal.SIGPIPE
    assert process.stderr.read() in ("", TILES)  # it may leave before the first forward


@pytest.mark.parametrize("words, status, says", [
    ("- <&-", 1, "stdin is closed"), ("x >&-", 0, TILES)])
def test_streams_that_are_closed_from_the_start(endless, words, status, says):
    command = f"{sys.executable} sample.py --init_from={endless} --max_new_tokens=4 --prompt="
    command += words
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == status and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_prompts_that_are_done(endless, tmp_path, number):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\n" * 10_000)
    process = start(f"--init_from={endless}", f"--prompts={prompts}", f"--out={out}",
                    "--max_new_tokens=8", "--batch=1")
    deadline = time.time() + 60
    while time.time() < deadline:
        aside = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
        if aside and aside[0].stat().st_size > 100:
            break
        time.sleep(0.05)
    assert not out.exists()
    process.send_signal(number)
    status, printed, err = finish(process)
    assert (status, printed) == (STOPPED, "") and "Traceback" not in err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < len(found) < 10_000
    assert [line["index"] for line in found] == list(range(len(found)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


# --- in a terminal --------------------------------------------------------------------------------

class Terminal:
    """`python sample.py` in a terminal of its own. screen: all that it has shown, one str."""

    def __init__(self, *arguments):
        self.screen = ""
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "sample.py", "--device=cpu", *arguments],
                                        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
                                        start_new_session=True, preexec_fn=own_terminal)
        os.close(theirs)
        self.ours = ours

    def read(self, wanted=None, seconds=60):
        """Read until `wanted` is shown, or to the end."""
        deadline = time.time() + seconds
        since = len(self.screen)
        while time.time() < deadline and (wanted is None or wanted not in self.screen[since:]):
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    data = os.read(self.ours, 65536)
                except OSError:  # Linux: nobody holds the other end any more
                    break
                if not data:
                    break
                self.screen += data.decode()
        assert wanted is None or wanted in self.screen[since:], self.screen
        return self.screen[since:]

    def type(self, text):
        os.write(self.ours, text.encode())

    def close(self):
        """Returns the exit status."""
        self.read()
        os.close(self.ours)
        return self.process.wait(timeout=60)


def own_terminal():
    """In the child: its stdin is the terminal whose Ctrl-C it gets."""
    import fcntl
    import termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def talking(endless):
    """The same run with a chat template."""
    (endless / "step_0000001" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    return endless


def test_a_terminal_shows_the_text_as_it_is_written(endless):
    terminal = Terminal(f"--init_from={endless}", "--prompt=def f(n):", "--max_new_tokens=100000")
    terminal.read("def f(n):xxxx")  # long before the end
    terminal.type("\x03")
    assert terminal.close() == STOPPED
    assert "--- sample 1 of 1\r\n" in terminal.screen
    assert terminal.screen.rstrip().endswith(", stopped") and "Traceback" not in terminal.screen


def test_a_conversation_keeps_what_was_said(talking, monkeypatch):
    terminal = Terminal(f"--init_from={talking}", "--chat=true", "--max_new_tokens=6")
    terminal.read("> ")
    terminal.type("first\n")
    assert "xxxxxx\r\n--- 6 tokens in" in terminal.read("> ")
    terminal.type("second\n")
    assert "xxxxxx\r\n--- 6 tokens in" in terminal.read("> ")
    terminal.type("\n")
    assert terminal.close() == 0
    assert terminal.screen.count("--- ") == 4 and "sample 1" not in terminal.screen


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_program(talking):
    terminal = Terminal(f"--init_from={talking}", "--chat=true", "--max_new_tokens=50000")
    terminal.read("> ")
    terminal.type("first\n")
    terminal.read("xxxx")
    terminal.type("\x03")
    assert ", stopped" in terminal.read("> ")
    terminal.type("second\n")
    terminal.read("xxxx")
    terminal.type("\x03")
    terminal.read("> ")
    time.sleep(0.5)  # a signal between the prompt and its read would wait for the next key
    terminal.type("\x03")
    assert terminal.close() == STOPPED and "Traceback" not in terminal.screen


def test_ctrl_d_ends_a_conversation(talking):
    terminal = Terminal(f"--init_from={talking}", "--chat=true", "--max_new_tokens=6")
    terminal.read("> ")
    terminal.type("\x04")
    assert terminal.close() == 0 and "Traceback" not in terminal.screen


@pytest.mark.parametrize("settings, says", [
    (["--samples=2"], "error: samples=2 is for a --prompt: a turn has one answer"),
    (["--steps=9"], "error: steps=9 is more than the 4 tokens of a block"),
])
def test_a_mistake_is_known_before_anything_is_typed(talking, settings, says):
    terminal = Terminal(f"--init_from={talking}", "--chat=true", *settings)
    assert terminal.close() == 1 and says in terminal.screen and "> " not in terminal.screen


def test_a_conversation_that_outgrows_the_context_begins_anew(data_folder, tmp_path):
    folder = write_tiny_run(tmp_path / "run", data_folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}")
    terminal = Terminal(f"--init_from={folder}", "--chat=true", "--max_new_tokens=30")
    terminal.read("> ")
    terminal.type("x" * 20 + "\n")
    terminal.read("> ")
    terminal.type("x" * 40 + "\n")
    terminal.read("> ")
    assert "--- the prompt has 90 tokens, the model's context only 64" in terminal.screen
    assert "--- a new conversation begins" in terminal.screen
    terminal.type("\x04")
    assert terminal.close() == 0
