"""What all tests share: the `slow` mark, one thread a process, so that parallel runs do not fight over the cores."""

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
    """A small prepared corpus: a dozen files of the standard library, 320 ids, and their tokenizer."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    for name in "abc ast bisect calendar copy csv dis enum fractions glob heapq inspect keyword shlex".split():
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", source)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data.stdlib.prepare",
            f"--source={source}",
            f"--out={out}",
            "--vocab_size=320",
            "--val_percent=25",
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return out
