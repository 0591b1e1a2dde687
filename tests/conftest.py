"""What all tests share: the `slow` mark, a small corpus, and one thread per process.

With more, tests that run at the same time would fight over the cores.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; `bash test.sh all` runs it")
    config.addinivalue_line(
        "filterwarnings", "ignore:torch.distributed is disabled"
    )  # single processes save and load too
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A small prepared corpus: some files of the standard library, and a tokenizer of 320 ids."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    names = ("abc ast bisect calendar copy csv dis enum fractions glob heapq inspect keyword "
             "shlex").split()
    for name in names:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", source)
    command = [sys.executable, "-m", "data.stdlib.prepare", f"--source={source}", f"--out={out}",
               "--vocab_size=320", "--val_percent=25"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return out
