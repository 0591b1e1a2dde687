"""What all tests share: the `slow` mark, one thread per process, a small prepared corpus, signals
as they were."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # parallel runs would fight over the cores

import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parent.parent
SOURCES = ("abc ast bisect calendar copy csv dis enum fractions glob heapq inspect keyword "
           "shlex").split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; `bash test.sh all` runs it")
    # single processes save and load too
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")
    torch.set_num_threads(1)


@pytest.fixture
def handlers_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def prepare(source, out, *settings):
    """data/stdlib/prepare.py on the .py files of a folder."""
    command = [sys.executable, "-m", "data.stdlib.prepare", f"--source={source}", f"--out={out}"]
    subprocess.run([*command, *settings], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out


def make_corpus(folder):
    """A dozen files of the standard library, 320 ids, and their tokenizer, in folder/data."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", source)
    return prepare(source, folder / "data", "--vocab_size=320", "--val_percent=25")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A small prepared corpus, made once for all workers of pytest-xdist. Tests only read it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_corpus(tmp_path_factory.mktemp("corpus"))
    folder = tmp_path_factory.getbasetemp().parent / "corpus"  # the workers' common one
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            folder.mkdir()
            make_corpus(folder)
            (folder / "complete").touch()
    return folder / "data"
