"""run.py: one process per folder, nothing is lost that is there, and what is found there may be
anything."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_train import all_metrics, command, metrics, train, weights

import checkpoint
import parallel
import run
from configurator import Mistake
from files import write_json

ALONE = parallel.World(0, 1, torch.device("cpu"))
posix = pytest.mark.skipif(os.name != "posix", reason="locks files by flock")


def content(folder):
    """{name: bytes} of all files below a folder but the lock."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def saved(data_folder, tmp_path_factory):
    """A run of 10 steps with two checkpoints. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data_folder, folder, "--max_steps=10")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


# --- `latest` -------------------------------------------------------------------------------------

def spoil_empty(latest):
    latest.write_text("")


def spoil_missing(latest):
    latest.unlink()


def spoil_dangling(latest):
    latest.write_text("step_0000099")


def spoil_link(latest):
    latest.unlink()
    latest.symlink_to(latest.parent / "nowhere")


def spoil_not_utf8(latest):
    latest.write_bytes(b"step_\xff\xfe")


def spoil_outside(latest):
    latest.write_text("../run/step_0000010")


def spoil_folder(latest):
    latest.unlink()
    latest.mkdir()


SPOILT = [spoil_empty, spoil_missing, spoil_dangling, spoil_link, spoil_not_utf8, spoil_outside,
          spoil_folder]


@pytest.mark.parametrize("resume", ["--resume=true", "--resume=false"])
@pytest.mark.parametrize("spoil", SPOILT)
def test_a_run_whose_latest_is_unusable_is_not_started_over(data_folder, copy, spoil, resume):
    spoil(copy / "latest")
    before = content(copy)
    with pytest.raises((Mistake, OSError)) as error:
        train(data_folder, copy, resume, "--max_steps=12")
    assert content(copy) == before
    assert "\n" not in str(error.value) and "latest" in str(error.value)
    if spoil is not spoil_missing and spoil is not spoil_folder:
        assert "step_0000005" in str(error.value) and "step_0000010" in str(error.value)


def test_one_of_its_folders_can_be_named_instead(data_folder, copy, tmp_path):
    (copy / "latest").write_text("")
    train(data_folder, tmp_path / "new", f"--init_from={copy / 'step_0000005'}", "--max_steps=1")
    (copy / "latest").write_text("step_0000005")  # or written by hand
    train(data_folder, copy, "--resume=true", "--max_steps=10")
    assert metrics(copy)[-1]["step"] == 10


# --- the lock -------------------------------------------------------------------------------------

@posix
def test_two_processes_cannot_write_one_run(data_folder, tmp_path):
    """The second one is refused, and told by whom. The lock does not outlive the first one."""
    out = tmp_path / "run"
    first = subprocess.Popen(command(data_folder, out, "--max_steps=100000", "--save_every=5"),
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "latest").exists():
            assert first.poll() is None
            time.sleep(0.01)
        for resume in ("true", "false"):
            with pytest.raises(Mistake, match=f"is in use by process {first.pid} of .*--out="):
                train(data_folder, out, f"--resume={resume}", "--max_steps=100000")
        outside = subprocess.run(command(data_folder, out, "--resume=true"), cwd=ROOT,
                                 capture_output=True, text=True)
        assert outside.returncode == 1 and "Traceback" not in outside.stderr
        assert f"in use by process {first.pid}" in outside.stderr
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    step = checkpoint.huggingface.find(out).name
    train(data_folder, out, "--resume=true", f"--max_steps={int(step[5:]) + 2}")
    steps = [m["step"] for m in metrics(out) if "loss" in m]
    assert steps == list(range(len(steps)))


@posix
def test_a_new_folder_is_locked_as_well(tmp_path):
    """Both find it missing; the one that creates it first has it."""
    first, second = (run.Run(tmp_path / "run", False, ALONE) for _ in range(2))
    first.make_folder()
    with pytest.raises(Mistake, match=f"in use by process {os.getpid()} "):
        second.make_folder()
    with first:
        pass
    second.make_folder()
    with second:
        pass


@posix
def test_a_lock_that_is_not_text_still_has_a_holder(tmp_path):
    with run.Run(tmp_path / "run", False, ALONE) as first:
        first.make_folder()
        (tmp_path / "run" / "lock").write_bytes(b"\xff\xfe\0" * 1000)
        with pytest.raises(Mistake, match="is in use by") as error:
            with run.Run(tmp_path / "run", True, ALONE):
                pass
        assert len(str(error.value)) < 2000


def test_handlers_and_files_are_given_back(data_folder, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(data_folder, tmp_path / "run", "--max_steps=1", "--eval_every=0")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    train(data_folder, tmp_path / "run", "--max_steps=2", "--eval_every=0", "--resume=true")


# --- metrics.jsonl --------------------------------------------------------------------------------

FOREIGN = [b"5", b"{}", b"null", b'"step"', b"[]", b'{"step": "3"}', b'{"step": null}',
           b'{"step": 1e999}', b"\xff\xfe", '{"step": 1}'.encode("utf-16"), b"[" * 100_000,
           b'{"step": 2, "lo', b"", b'{"step": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: str(line[:12]))
def test_a_foreign_line_in_the_metrics_goes_and_ours_stay(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    ours = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(6)]
    path.write_bytes(b"\n".join([*ours[:3], line, *ours[3:], line]))
    run.cut_lines(path, 4)
    assert path.read_bytes().splitlines() == ours[:4]


def test_metrics_are_cut_back_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(6)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    run.cut_lines(path, 4)
    assert path.read_text().splitlines() == lines[:4]
    run.cut_lines(tmp_path / "none.jsonl", 4)  # a run that never wrote any
    assert not (tmp_path / "none.jsonl").exists()


def test_a_run_continues_whatever_its_metrics_hold(data_folder, saved, copy):
    (copy / "latest").write_text("step_0000005")
    (copy / "metrics.jsonl").write_bytes(b"\n".join([
        *FOREIGN, *(saved / "metrics.jsonl").read_bytes().splitlines(), *FOREIGN]))
    train(data_folder, copy, "--resume=true", "--max_steps=10")
    assert metrics(copy) == metrics(saved) and weights(copy) == weights(saved)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with run.Run(tmp_path / "run", False, ALONE) as new:
        new.make_folder()
        new.metrics = open(tmp_path / "run" / "metrics.jsonl", "a", buffering=1)
        new.log({"step": 0, "loss": float("nan"), "mfu": None, "lr": float("inf"), "seconds": 1.5})
    expected = {"step": 0, "loss": None, "mfu": None, "lr": None, "seconds": 1.5}
    assert all_metrics(tmp_path / "run") == [expected]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full_names_the_metrics_and_the_last_checkpoint(data_folder, copy):
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to("/dev/full")
    good = weights(copy)
    with pytest.raises(OSError) as error:
        train(data_folder, copy, "--resume=true", "--max_steps=12")
    pattern = (r"could not write .*metrics.jsonl: No space left on device; "
               r"the last good checkpoint is .*step_0000010")
    assert re.fullmatch(pattern, str(error.value)), error.value
    assert weights(copy) == good
    outside = subprocess.run(command(data_folder, copy, "--resume=true", "--max_steps=12"),
                             cwd=ROOT, capture_output=True, text=True)
    assert outside.returncode == 1 and "Traceback" not in outside.stderr
    assert re.fullmatch(f"error: {pattern}", outside.stderr.splitlines()[-1])


# --- the lock -------------------------------------------------------------------------------------

@posix
def test_a_lock_that_is_a_link_or_another_file_is_left_alone(copy, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (copy / "lock").unlink()
    (copy / "lock").symlink_to(victim)
    for _ in range(2):
        with pytest.raises(Mistake, match="lock is not the lock of a run: move it"):
            run.Run(copy, True, ALONE).__enter__()
        assert victim.read_text() == "mine"
        (copy / "lock").unlink()
        (copy / "lock").hardlink_to(victim)
    (copy / "lock").unlink()
    (copy / "lock").mkdir()
    with pytest.raises(Mistake, match="lock is not the lock of a run"):
        run.Run(copy, True, ALONE).__enter__()


@posix
def test_a_run_that_appears_after_the_look_is_not_overwritten(saved, tmp_path):
    with pytest.raises(Mistake, match="another process has just made a run"):
        with run.Run(tmp_path / "run", False, ALONE) as late:
            shutil.copytree(saved, tmp_path / "run")
            late.make_folder()
    assert content(tmp_path / "run") == content(saved)


@posix
def test_only_the_torchrun_that_began_a_run_resumes_it_unasked(saved, tmp_path, monkeypatch):
    """A launch that was refused must not resume, and overwrite, the run when torchrun restarts."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def launched(out):
        with run.Run(out, False, ALONE) as opened:
            return opened.start

    copy = Path(shutil.copytree(saved, tmp_path / "refused"))
    for restarts in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(Mistake, match="already holds a run"):
            launched(copy)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with run.Run(tmp_path / "begun", False, ALONE) as new:
        new.make_folder()
    shutil.copytree(saved, tmp_path / "begun", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("lock"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launched(tmp_path / "begun") == 10 and launched(tmp_path / "begun") == 10
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun
    with pytest.raises(Mistake, match="already holds a run"):
        launched(tmp_path / "begun")


# --- train.json -----------------------------------------------------------------------------------

def damage(copy, text):
    (copy / "step_0000010" / "state" / "train.json").write_bytes(text)


BROKEN = [b"", b"[]", b"[1]", b"null", b"5", b'"text"', b"{}", b"\xff\xfe", b"{", b"[" * 100_000,
          b'{"step": 10}', b'{"step": 10, "config": null, "machine": {}}',
          b'{"step": 10, "config": [], "machine": {}}', b'{"step": "10", "config": {}}',
          b'{"step": -1, "config": {}, "machine": {}}',
          b'{"step": true, "config": {}, "machine": {}}',
          b'{"step": 10, "config": {}, "machine": {"dtype": 5}}',
          b'{"step": 10, "config": {}, "machine": {"dtype": "evil"}}',
          b'{"step": 10, "config": {}, "machine": {"threads": -1}}',
          b'{"step": 10, "config": {}, "machine": {"threads": "many"}}',
          b'{"step": 10, "config": {}, "machine": {"threads": 100000}}',
          b'{"step": 10, "config": {}, "machine": {"threads": 1180591620717411303424}}',
          b'{"step": 10, "config": {}, "machine": 5}', b'{"config": {}, "machine": {}}']


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: str(text[:50]))
def test_a_checkpoint_without_its_settings_cannot_be_resumed(data_folder, copy, text):
    before = content(copy)
    damage(copy, text)
    with pytest.raises(Mistake, match="train.json") as error:
        train(data_folder, copy, "--resume=true", "--max_steps=12", "--dtype=float32")
    assert "\n" not in str(error.value)
    (copy / "step_0000010/state/train.json").write_bytes(before["step_0000010/state/train.json"])
    assert content(copy) == before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["step", "float32", 2**70, -1, 10, "bfloat16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                max_size=3),
    max_leaves=5)
NAMES = st.sampled_from(["step", "config", "machine", "data", "config.seed", "config.context",
                         "machine.dtype", "machine.threads", "config.lr", "machine.torch"])


@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
@example({"config.seed": "1337"})
def test_whatever_a_train_json_holds_there_is_one_line(data_folder, saved, tmp_path, changes):
    """Opening the run and comparing it, as train.py does before it builds the model."""
    copy = tmp_path / "fuzzed"
    state = copy / "step_0000010" / "state"
    state.mkdir(parents=True, exist_ok=True)
    (copy / "latest").write_text("step_0000010")
    values = json.loads((saved / "step_0000010/state/train.json").read_text())
    for name, value in changes.items():
        place = values
        *outer, last = name.split(".")
        for key in outer:
            place = place[key] if isinstance(place[key], dict) else {}
        place[last] = value
    (state / "train.json").write_text(json.dumps(values))
    script = sys.modules["train"]
    cfg = script.Config(data=str(data_folder), out=str(copy))
    try:
        with run.Run(copy, True, ALONE) as again:
            again.check_resumed(cfg, script.FIXED, script.FREE, "0123")
            run.pick_machine(cfg, ALONE, again.saved)
    except Mistake as error:
        assert "\n" not in str(error)
    finally:
        torch.set_num_threads(1)


def test_what_was_saved_is_what_is_read(tmp_path):
    value = {"step": 3, "config": {"lr": 1e-3}, "machine": {"dtype": "float32", "threads": 2}}
    (tmp_path / "state").mkdir()
    write_json(tmp_path / "state" / "train.json", value)
    assert run.read_saved(tmp_path) == value


def test_other_settings_of_a_resumed_run_are_named(data_folder, copy, capsys):
    train(data_folder, copy, "--resume=true", "--max_steps=11", "--lr=0.001", "--dtype=float32")
    said = capsys.readouterr().out
    assert "resuming with other settings: max_steps 10 -> 11, lr 0.002 -> 0.001" in said \
        or "lr 0.002 -> 0.001" in said and "max_steps 10 -> 11" in said
    assert "numbers may differ in their last digits" not in said or "dtype" in said
