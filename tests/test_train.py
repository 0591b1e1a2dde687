"""train.py from the outside: the same numbers however it is interrupted or split, and one sentence for every mistake."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT
from loader import Windows
from tokenizer import Tokenizer

WALL_CLOCK = {"seconds", "tokens_per_s", "loader_seconds", "memory_gb", "mfu"}
TINY = [
    "--context=32",
    "--batch_tokens=256",
    "--micro_batch=4",
    "--d_model=32",
    "--n_layer=2",
    "--n_head=2",
    "--n_kv_head=1",
    "--head_dim=16",
    "--d_ff=48",
    "--max_steps=24",
    "--save_every=5",
    "--eval_every=10",
    "--eval_windows=6",
    "--lr_warmup_steps=4",
    "--threads=1",
    "--eval_draws=2",
]


def command(data, out, *more):
    return [sys.executable, "train.py", *TINY, f"--data={data}", f"--out={out}", *more]


def train(data, out, *more):
    """A run to its end, in this process: starting one costs more than these few steps."""
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = command(data, out, *more)[1:]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.argv, sys.excepthook = argv, sys.__excepthook__
        torch.use_deterministic_algorithms(False)
        for s, handler in handlers.items():
            signal.signal(s, handler)


def train_outside(data, out, *more, **kwargs):
    return subprocess.run(
        command(data, out, *more), cwd=ROOT, capture_output=True, text=True, **kwargs
    )


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k not in WALL_CLOCK} for m in lines]


def weights(out):
    return (out / (out / "latest").read_text() / "model.safetensors").read_bytes()


OBJECTIVES = {
    "ar": ["--objective=ar"],
    "block": ["--objective=block", "--u_warmup_steps=12"],
    "bidirectional": [
        "--objective=bidirectional",
        "--schedule=uniform",
        "--strategies=((0.2,0.2,0.3),(0.3,0.3,0.5))",
    ],
    "ar_diffusion": ["--objective=ar_diffusion", "--schedule=count", "--shift=true"],
}


@pytest.mark.parametrize(
    "objective",
    ["block", *(pytest.param(o, marks=pytest.mark.slow) for o in OBJECTIVES if o != "block")],
)
@pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_and_resumed_gives_the_same_bits(
    data_folder, tmp_path, objective, dtype
):
    settings = [*OBJECTIVES[objective], f"--dtype={dtype}"]
    train(data_folder, tmp_path / "whole", *settings)
    kill_at = [
        random.Random(objective + dtype).randrange(9, 20),
        22,
    ]  # metric lines written before the kill; twice
    for n, lines in enumerate(kill_at):
        more = ["--init_from=resume"] if n else []
        run = subprocess.Popen(
            command(data_folder, tmp_path / "killed", *settings, *more),
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        file = tmp_path / "killed" / "metrics.jsonl"
        while run.poll() is None and (not file.exists() or file.read_text().count("\n") < lines):
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    train(data_folder, tmp_path / "killed", *settings, "--init_from=resume")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["safetensors.torch.save_file", "torch.save", "os.replace"])
def test_killed_during_a_save_the_previous_checkpoint_is_intact(data_folder, tmp_path, moment):
    """The n-th call of the function that a save is in the middle of kills the process, half of its work done."""
    script = f"""
import os, signal, sys, runpy, {moment.rsplit(".", 1)[0]} as module
real, name = module.{moment.rsplit(".", 1)[1]}, "{moment.rsplit(".", 1)[1]}"
def deadly(*a, **k):
    latest = "{tmp_path}/run/latest"
    saving_10 = os.path.exists(latest) and open(latest).read() == "step_0000005"
    if saving_10 and (name != "replace" or "latest" in str(a[0])):
        if name != "replace": (a[1] if hasattr(a[1], "write") else open(a[1], "wb")).write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
setattr(module, name, deadly)
runpy.run_path("train.py", run_name="__main__")
"""
    run = subprocess.run(
        [sys.executable, "-c", script, *command(data_folder, tmp_path / "run")[2:]],
        cwd=ROOT,
        capture_output=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert (tmp_path / "run" / "latest").read_text() == "step_0000005"
    train(data_folder, tmp_path / "run", "--init_from=resume")
    train(data_folder, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("*.tmp")), (
        "leftovers of the interrupted save were not cleared"
    )


def test_ctrl_c_leaves_a_usable_checkpoint(data_folder, tmp_path):
    run = subprocess.Popen(
        command(data_folder, tmp_path / "run", "--save_every=1000"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while run.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    printed, errors = run.communicate()
    assert run.returncode == 130 and "--resume=true" in printed and "Traceback" not in errors
    train(data_folder, tmp_path / "run", "--init_from=resume")
    train(data_folder, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_accumulation_changes_nothing_but_rounding(data_folder, tmp_path):
    for name, rows in (("one", 8), ("many", 1)):
        train(
            data_folder,
            tmp_path / name,
            f"--micro_batch={rows}",
            "--dtype=float32",
            "--eval_every=0",
        )
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)  # 24 steps let float32 rounding grow
        assert a["mask_rate"] == b["mask_rate"]


CHANGING = [
    "--seed=2",
    "--shift=true",
    "--block_size=2",
    "--schedule=count",
    "--antithetic=false",
    "--u_warmup_steps=3",
    "--u_warmup_steps=3 --u_init=0.9",
    "--schedule=uniform",
    "--schedule=uniform --t_min=0.9",
    "--objective=bidirectional",
    "--objective=ar_diffusion",
    "--objective=ar",
    "--rope_theta=100",
    "--norm_eps=0.1",
    "--qkv_bias=true",
    "--qk_norm=true",
    "--tie_embeddings=false",
    "--lr=0.1",
    "--min_lr=0.1",
    "--lr_warmup_steps=0",
    "--weight_decay=9",
    "--beta1=0.1",
    "--beta2=0.1",
    "--grad_clip=0.01",
    "--batch_tokens=128",
    "--d_ff=40",
    "--objective=bidirectional --schedule=uniform --strategies=((0,0,1),)",
    "--objective=bidirectional --anneal_steps=9",
]


def test_every_setting_that_should_change_the_numbers_does(data_folder, tmp_path):
    """A setting that never reached what it sets would leave two of these runs alike."""
    found = {}
    for n, more in enumerate(["", *CHANGING]):
        train(
            data_folder,
            tmp_path / str(n),
            "--max_steps=3",
            "--lr_warmup_steps=1",
            "--eval_every=0",
            "--dtype=float32",
            *more.split(),
        )
        found.setdefault(weights(tmp_path / str(n)), []).append(more)
    assert [alike for alike in found.values() if len(alike) > 1] == []


def test_documents_see_each_other_only_where_asked_for(data_folder, tmp_path):
    for name in ("true", "false"):
        train(
            data_folder,
            tmp_path / name,
            f"--cross_document={name}",
            "--context=512",
            "--batch_tokens=65536",
            "--micro_batch=64",
            "--max_steps=1",
            "--eval_every=0",
        )
    assert weights(tmp_path / "true") != weights(tmp_path / "false")


def test_annealing_begins_as_causal_attention_and_ends_as_bidirectional(data_folder, tmp_path):
    loss = {}
    for name, more in (
        ("causal", ["--objective=ar_diffusion"]),
        ("annealed", ["--objective=bidirectional", "--anneal_steps=9"]),
        ("open", ["--objective=bidirectional"]),
    ):
        train(
            data_folder,
            tmp_path / name,
            "--max_steps=1",
            "--eval_every=0",
            "--schedule=uniform",
            "--dtype=float32",
            *more,
        )
        loss[name] = metrics(tmp_path / name)[0]["loss"]
    assert loss["annealed"] == pytest.approx(loss["causal"], rel=1e-6) and loss[
        "annealed"
    ] != pytest.approx(loss["open"], rel=1e-6)


def test_the_curriculum_follows_the_epochs_of_the_data(data_folder, tmp_path):
    """S1 only in the second epoch: the same numbers before it, others from its first step on."""
    losses = []
    for name, strategies in (("plain", "((0,0,0),)"), ("later", "((0,0,0),(1,0,0))")):
        train(
            data_folder,
            tmp_path / name,
            "--objective=bidirectional",
            "--schedule=uniform",
            f"--strategies={strategies}",
            "--batch_tokens=65536",
            "--context=256",
            "--micro_batch=64",
            "--max_steps=4",
            "--eval_every=0",
            "--dtype=float32",
        )
        losses.append([m["loss"] for m in metrics(tmp_path / name)])
    rows = Windows(data_folder, "train", 256, Tokenizer(data_folder).vocab_size)
    first_of_second = len(rows) // 256  # the step in which the second epoch begins
    assert 0 < first_of_second < 4, "the corpus no longer suits this test"
    assert losses[0][:first_of_second] == losses[1][:first_of_second]
    assert all(a != b for a, b in zip(losses[0][first_of_second:], losses[1][first_of_second:]))


def test_the_linear_schedule_is_a_line_and_adafactor_trains(data_folder, tmp_path):
    train(
        data_folder,
        tmp_path / "run",
        "--lr_decay=linear",
        "--lr=0.004",
        "--min_lr=0.001",
        "--optimizer=adafactor",
        "--eval_every=0",
    )
    lines = metrics(tmp_path / "run")
    rates = [m["lr"] for m in lines[4:]]  # after the warmup
    assert rates == pytest.approx([0.004 - 0.003 * i / 20 for i in range(20)], rel=1e-9)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_an_adafactor_run_goes_on_with_the_same_bits(data_folder, tmp_path):
    same = ["--optimizer=adafactor", "--lr_decay=linear", "--lr=0.001", "--min_lr=0.001"]
    train(data_folder, tmp_path / "whole", *same, "--max_steps=10")
    for steps in (5, 10):
        train(data_folder, tmp_path / "twice", *same, f"--max_steps={steps}", "--resume=true")
    assert weights(tmp_path / "twice") == weights(tmp_path / "whole")


def test_metrics_go_where_they_are_asked_to_and_a_missing_package_is_named(
    data_folder, tmp_path, monkeypatch
):
    shown = []
    writer = SimpleNamespace(
        SummaryWriter=lambda folder: SimpleNamespace(add_scalar=lambda *a: shown.append(a))
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    train(data_folder, tmp_path / "run", "--max_steps=3", "--log=tensorboard")
    assert [(name, step) for name, _, step in shown if name == "loss"] == [
        ("loss", 0),
        ("loss", 1),
        ("loss", 2),
    ]
    assert [value for name, value, _ in shown if name == "loss"] == [
        m["loss"] for m in metrics(tmp_path / "run") if "loss" in m
    ]
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
        with pytest.raises(ValueError, match=f"pip install {name}"):
            train(data_folder, tmp_path / name, "--max_steps=3", f"--log={name}")


def test_flops_and_loader_seconds_are_in_the_metrics(data_folder, tmp_path):
    train(
        data_folder,
        tmp_path / "run",
        "--max_steps=2",
        "--eval_every=0",
        "--objective=block",
        "--peak_tflops=0.001",
    )
    for m in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert 0 <= m["loader_seconds"] < m["seconds"] and m["memory_gb"] > 0
        # 2 layers, d 32, 2 + 2·1 heads of 16 either way, d_ff 48; 512 positions; the head for the masked ones among 320 ids
        matrices = 6 * 512 * 2 * (32 * 16 * 6 + 3 * 32 * 48)
        assert (
            0
            < m["mfu"] * m["seconds"] * 1e9 - matrices
            < 12 * 2 * 2 * 16 * 2 * 256 * 32 + 6 * 256 * 32 * 320
        )


@pytest.mark.slow
def test_compiled_runs_give_the_same_bits_and_the_eager_loss(data_folder, tmp_path):
    for name in ("first", "second"):
        train(data_folder, tmp_path / name, "--compile=true", "--dtype=float32")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    train(data_folder, tmp_path / "eager", "--dtype=float32")
    for a, b in zip(metrics(tmp_path / "first"), metrics(tmp_path / "eager")):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)


def test_one_command_starts_a_run_and_goes_on_with_it(data_folder, tmp_path):
    """What a scheduler repeats: the run's own checkpoint comes before init_from, where there is one."""
    train(data_folder, tmp_path / "start", "--max_steps=5")
    same = [
        f"--init_from={tmp_path / 'start'}",
        "--resume=true",
        "--lr_decay=linear",
        "--lr=0.001",
        "--min_lr=0.001",
    ]
    train(data_folder, tmp_path / "whole", *same)
    for steps in (10, 24):
        train(data_folder, tmp_path / "twice", *same, f"--max_steps={steps}")
    steps = [[m for m in metrics(tmp_path / name) if "loss" in m] for name in ("whole", "twice")]
    assert steps[0] == steps[1]
    with pytest.raises(SystemExit):  # it is done
        train(data_folder, tmp_path / "whole", *same)


def test_a_finished_run_has_nothing_to_resume(data_folder, tmp_path, capsys):
    train(data_folder, tmp_path / "run", "--max_steps=5")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert json.loads(before.splitlines()[-1])["val_tokens"] > 0  # it ended with an evaluation
    with pytest.raises(SystemExit) as end:
        train(data_folder, tmp_path / "run", "--max_steps=5", "--init_from=resume")
    assert end.value.code == 0 and "its 5 steps are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_block_diffusion_continues_from_autoregressive_weights(data_folder, tmp_path):
    train(data_folder, tmp_path / "ar", "--objective=ar", "--lr=0.01", "--max_steps=40")
    train(data_folder, tmp_path / "block", f"--init_from={tmp_path / 'ar'}", "--objective=block")
    train(data_folder, tmp_path / "fresh", "--objective=block")
    last = {
        name: [m for m in metrics(tmp_path / name) if "val_nelbo" in m][-1]["val_nelbo"]
        for name in ("block", "fresh")
    }
    assert last["block"] < last["fresh"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data_folder, tmp_path
):
    train(data_folder, tmp_path / "run", "--max_steps=5")
    good = weights(tmp_path / "run")
    run = train_outside(
        data_folder,
        tmp_path / "run",
        "--init_from=resume",
        "--lr=1e30",
        "--grad_clip=1e30",
        "--weight_decay=0",
    )
    error = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert error.startswith("error: step ") and "step_0000005" in error
    assert weights(tmp_path / "run") == good


def test_a_disk_that_fills_up_while_saving_loses_nothing(data_folder, tmp_path):
    resource = pytest.importorskip("resource")
    train(data_folder, tmp_path / "run", "--max_steps=5")
    good = weights(tmp_path / "run")
    limit = len(good) // 2  # no file may grow larger: writing the weights fails half way
    run = train_outside(
        data_folder,
        tmp_path / "run",
        "--init_from=resume",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "could not save" in run.stderr and "step_0000005" in run.stderr.splitlines()[-1]
    assert weights(tmp_path / "run") == good and not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize(
    "more, says",
    [
        (["--data=/nowhere"], "no tokenizer at /nowhere"),
        (["--n_head=3", "--n_kv_head=2"], "n_kv_head=2 must divide n_head=3"),
        (["--batch_tokens=100"], "multiple of context=32, such as 96"),
        (["--context=100000000", "--batch_tokens=100000000"], "context=100000000 is longer than"),
        (["--objectve=ar"], "did you mean 'objective'"),
        (["--max_steps=many"], "max_steps='many' does not fit: max_steps is an int"),
        (["--objective=arr"], "objective is one of ar, bidirectional"),
        (["--objective=ar", "--shift=false"], "shift=False is not possible"),
        (["--objective=block", "--strategies=((0.1,0.1,0.1),)"], "need objective='bidirectional'"),
        (["--lr=-1"], "lr=-1.0 must be above 0"),
        (["--beta1=1.5"], "beta1=1.5 must be in"),
        (["--eval_draws=1"], "eval_draws=1 must be 2 or more"),
        (["--anneal_steps=5"], "anneal_steps=5 needs objective='bidirectional'"),
        (["--init_from=/nowhere"], "no checkpoint in /nowhere"),
        (["--init_from=resume"], "no checkpoint in"),
        (["--bos_token=<|begin|>"], "documents begin with 0 in"),
        (["--device=cuda"], "device='cuda' is not available"),
    ],
)
def test_mistakes_end_in_one_sentence(data_folder, tmp_path, more, says):
    if "--device=cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises((ValueError, OSError), match=says.replace("(", r"\(")) as error:
        train(data_folder, tmp_path / "run", *more)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_cannot_be_written_ends_before_training(data_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    run = train_outside(data_folder, tmp_path / "file" / "run")
    assert (
        run.returncode == 1 and "Traceback" not in run.stderr and run.stderr.startswith("error: ")
    )


def test_a_finished_run_is_not_overwritten_and_foreign_or_damaged_checkpoints_are_refused(
    data_folder, tmp_path
):
    train(data_folder, tmp_path / "run", "--max_steps=5")
    with pytest.raises(ValueError, match="already holds a run"):
        train(data_folder, tmp_path / "run")
    with pytest.raises(ValueError, match="seed=5 but the run in .* has seed=1337"):
        train(data_folder, tmp_path / "run", "--init_from=resume", "--seed=5")
    with pytest.raises(ValueError, match="objective=ar but the run in"):
        train(data_folder, tmp_path / "run", "--init_from=resume", "--objective=ar")
    with pytest.raises(ValueError, match="n_layer=3 was asked for"):
        train(data_folder, tmp_path / "new", f"--init_from={tmp_path / 'run'}", "--n_layer=3")

    other = tmp_path / "other_data"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data.stdlib.prepare",
            f"--source={ROOT}",
            f"--out={other}",
            "--vocab_size=300",
            "--val_percent=30",
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        train(other, tmp_path / "new", f"--init_from={tmp_path / 'run'}")

    checkpoint = tmp_path / "run" / "step_0000005"
    for name in ("model.safetensors", "state/optimizer/.metadata", "config.json"):
        whole = (checkpoint / name).read_bytes()
        os.truncate(checkpoint / name, len(whole) // 2)
        with pytest.raises((ValueError, OSError), match="damaged"):
            train(data_folder, tmp_path / "run", "--init_from=resume")
        (checkpoint / name).unlink()
        with pytest.raises((ValueError, OSError), match="missing|no checkpoint"):
            train(data_folder, tmp_path / "run", "--init_from=resume")
        (checkpoint / name).write_bytes(whole)
