"""How `python sample.py` starts and stops: in processes of their own, with real signals."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from reference import write_tiny_run

STOPPED = 128 + signal.SIGINT
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.checkpoint", "sympy",
         "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "huggingface_hub")
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
    header = process.stdout.readline()  # printed when the writing begins
    assert header.startswith(f"--- {endless}") and "block, K = 4" in header
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
    assert out.splitlines()[2].startswith("# na\\xefve \\u2713")
