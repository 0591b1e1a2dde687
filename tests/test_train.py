"""train.py from the outside: the same numbers however it is interrupted or split, and a one-line
message for every mistake."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from conftest import ROOT, prepare
from safetensors.torch import load_file, save_file

import parallel
import plan
import train as script
from configurator import Mistake
from loader import Windows

WALL_CLOCK = {"seconds", "tokens_per_s", "loader_seconds", "memory_gb", "mfu"}
TINY = ["--context=32", "--batch_tokens=256", "--micro_batch=4", "--d_model=32", "--n_layer=2",
        "--n_head=2", "--n_kv_head=1", "--head_dim=16", "--d_ff=48", "--max_steps=24",
        "--save_every=5", "--eval_every=10", "--eval_windows=6", "--lr_warmup_steps=4",
        "--threads=1", "--eval_draws=2"]


def settings_of(data, out, *more):
    return [*TINY, f"--data={data}", f"--out={out}", *map(str, more)]


def command(data, out, *more):
    return [sys.executable, "train.py", *settings_of(data, out, *more)]


def train(data, out, *more):
    """A run to its end, in this process: starting one costs more than these few steps.

    Returns the exit code.
    """
    return script.main(settings_of(data, out, *more))


def train_outside(data, out, *more, **kwargs):
    return subprocess.run(command(data, out, *more), cwd=ROOT, capture_output=True, text=True,
                          **kwargs)


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def all_metrics(out):
    """The lines of metrics.jsonl, by a parser that knows no NaN."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def metrics(out):
    """What does not depend on the clock."""
    return [{k: v for k, v in m.items() if k not in WALL_CLOCK} for m in all_metrics(out)]


def weights(out):
    return (out / (out / "latest").read_text() / "model.safetensors").read_bytes()


OBJECTIVES = {
    "ar": ["--objective=ar"],
    "block": ["--objective=block", "--u_warmup_steps=12", "--fim_rate=0.5"],
    "bidirectional": ["--objective=bidirectional", "--schedule=uniform",
                      "--strategies=((0.2,0.2,0.3),(0.3,0.3,0.5))"],
    "ar_diffusion": ["--objective=ar_diffusion", "--schedule=count", "--shift=true"],
}
SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES if name != "block"}


# --- interrupted ----------------------------------------------------------------------------------

@pytest.mark.parametrize("objective", ["block", *SLOW.values()])
@pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_and_resumed_gives_the_same_bits(data_folder, tmp_path, objective,
                                                               dtype):
    settings = [*OBJECTIVES[objective], f"--dtype={dtype}"]
    train(data_folder, tmp_path / "whole", *settings)
    killed = tmp_path / "killed"
    # metric lines written before the kill; twice
    kill_at = [random.Random(objective + dtype).randrange(9, 20), 22]
    for n, lines in enumerate(kill_at):
        more = ["--resume=true"] if n else []
        run = subprocess.Popen(command(data_folder, killed, *settings, *more), cwd=ROOT,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        file = killed / "metrics.jsonl"
        while run.poll() is None:
            if file.exists() and file.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    train(data_folder, killed, *settings, "--resume=true")
    assert metrics(killed) == metrics(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")


DEADLY = """
import os, signal, sys
import {module} as module
real = module.{name}

def deadly(*args, **kwargs):
    latest = "{out}/latest"
    saving_10 = os.path.exists(latest) and open(latest).read() == "step_0000005"
    if saving_10 and "{name}" != "replace":
        file = args[1] if hasattr(args[1], "write") else open(args[1], "wb")
        file.write(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    if saving_10 and "latest" in str(args[0]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

module.{name} = deadly
import train
sys.exit(train.main())
"""


@pytest.mark.parametrize("moment", [
    "os.replace", *(pytest.param(name, marks=pytest.mark.slow)
                    for name in ("safetensors.torch.save_file", "torch.save"))])
def test_killed_during_a_save_the_previous_checkpoint_is_intact(data_folder, tmp_path, moment):
    """The function that a save is in the middle of kills the process, half of its work done."""
    module, _, name = moment.rpartition(".")
    text = DEADLY.format(module=module, name=name, out=tmp_path / "run")
    run = subprocess.run([sys.executable, "-c", text, *settings_of(data_folder, tmp_path / "run")],
                         cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert (tmp_path / "run" / "latest").read_text() == "step_0000005"
    train(data_folder, tmp_path / "run", "--resume=true")
    train(data_folder, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    leftovers = list((tmp_path / "run").glob("*.tmp"))
    assert not leftovers, "leftovers of the interrupted save were not cleared"


def test_ctrl_c_leaves_a_usable_checkpoint(data_folder, tmp_path):
    run = subprocess.Popen(command(data_folder, tmp_path / "run", "--save_every=1000"), cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    printed, errors = run.communicate()
    assert run.returncode == 130 and "--resume=true" in printed and "Traceback" not in errors
    train(data_folder, tmp_path / "run", "--resume=true")
    train(data_folder, tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


IMPORTED = ["torch._utils", "torch.nn.functional", "tokenizers", "safetensors", "run"]


@pytest.mark.parametrize("module", IMPORTED)
def test_ctrl_c_while_it_starts_prints_no_traceback(data_folder, tmp_path, module):
    """Interrupted as soon as this module has been imported."""
    line = [sys.executable, "-X", "importtime", *command(data_folder, tmp_path / "run")[1:]]
    run = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    for printed in run.stderr:
        if printed.rpartition("|")[2].strip() == module:
            break
    else:
        pytest.fail(f"{module} is no longer imported")
    run.send_signal(signal.SIGINT)
    rest, errors = run.communicate()
    said = [text for text in errors.splitlines() if not text.startswith("import time:")]
    assert run.returncode == 130 and said[-1] == "stopped" and "Traceback" not in errors
    assert not (tmp_path / "run").exists() and rest == ""


# --- numbers --------------------------------------------------------------------------------------

def test_accumulation_changes_nothing_but_rounding(data_folder, tmp_path):
    for name, rows in (("one", 8), ("many", 1)):
        train(data_folder, tmp_path / name, f"--micro_batch={rows}", "--dtype=float32",
              "--eval_every=0")
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)  # 24 steps let float32 rounding grow
        assert a["mask_rate"] == b["mask_rate"]


CHANGING = [
    "--seed=2", "--shift=true", "--block_size=2", "--schedule=count", "--antithetic=false",
    "--u_warmup_steps=3", "--u_warmup_steps=3 --u_init=0.9", "--schedule=uniform",
    "--schedule=uniform --t_min=0.9", "--objective=bidirectional", "--objective=ar_diffusion",
    "--objective=ar", "--rope_theta=100", "--norm_eps=0.1", "--qkv_bias=true", "--qk_norm=true",
    "--tie_embeddings=false", "--lr=0.1", "--min_lr=0.001", "--lr_warmup_steps=0",
    "--weight_decay=9", "--beta1=0.1", "--beta2=0.1", "--grad_clip=0.01", "--batch_tokens=128",
    "--d_ff=40", "--objective=bidirectional --schedule=uniform --strategies=((0,0,1),)",
    "--objective=bidirectional --anneal_steps=9", "--fim_rate=0.3", "--fim_rate=1",
]


def test_every_setting_that_should_change_the_numbers_does(data_folder, tmp_path):
    """A setting that never reached what it sets would leave two of these runs alike."""
    settings_by_weights = {}
    for n, more in enumerate(["", *CHANGING]):
        train(data_folder, tmp_path / str(n), "--max_steps=3", "--lr_warmup_steps=1",
              "--eval_every=0", "--dtype=float32", *more.split())
        settings_by_weights.setdefault(weights(tmp_path / str(n)), []).append(more)
    assert [alike for alike in settings_by_weights.values() if len(alike) > 1] == []


def test_the_largest_seeds_give_different_numbers(data_folder, tmp_path):
    """As float64, which a list of numbers becomes in numpy, they would all be 2^63."""
    losses, rates = set(), set()
    for seed in (2**63 - 1, 2**63 - 2, 2**63 - 3):
        train(data_folder, tmp_path / str(seed), "--max_steps=1", "--eval_every=0",
              "--schedule=uniform", f"--seed={seed}")
        line, = metrics(tmp_path / str(seed))
        losses.add(line["loss"])
        rates.add(line["mask_rate"])
    assert len(losses) == 3 and len(rates) > 1


def test_documents_see_each_other_only_where_asked_for(data_folder, tmp_path):
    for name in ("true", "false"):
        train(data_folder, tmp_path / name, f"--cross_document={name}", "--context=512",
              "--batch_tokens=65536", "--micro_batch=64", "--max_steps=1", "--eval_every=0")
    assert weights(tmp_path / "true") != weights(tmp_path / "false")


def test_annealing_begins_as_causal_attention_and_ends_as_bidirectional(data_folder, tmp_path):
    objectives = {"causal": ["--objective=ar_diffusion"],
                  "annealed": ["--objective=bidirectional", "--anneal_steps=9"],
                  "open": ["--objective=bidirectional"]}
    loss = {}
    for name, more in objectives.items():
        train(data_folder, tmp_path / name, "--max_steps=1", "--eval_every=0",
              "--schedule=uniform", "--dtype=float32", *more)
        loss[name] = metrics(tmp_path / name)[0]["loss"]
    assert loss["annealed"] == pytest.approx(loss["causal"], rel=1e-6)
    assert loss["annealed"] != pytest.approx(loss["open"], rel=1e-6)


def test_the_curriculum_follows_the_epochs_of_the_data(data_folder, tmp_path):
    """S1 only in the second epoch: the same numbers before it, others from its first step on."""
    losses = []
    for name, strategies in (("plain", "((0,0,0),)"), ("later", "((0,0,0),(1,0,0))")):
        train(data_folder, tmp_path / name, "--objective=bidirectional", "--schedule=uniform",
              f"--strategies={strategies}", "--batch_tokens=65536", "--context=256",
              "--micro_batch=64", "--max_steps=4", "--eval_every=0", "--dtype=float32")
        losses.append([m["loss"] for m in metrics(tmp_path / name)])
    windows = Windows(data_folder, "train", 256, vocabulary(data_folder))
    first_of_second = len(windows) // 256  # the step in which the second epoch begins
    assert 0 < first_of_second < 4, "the corpus no longer suits this test"
    plain, later = losses
    assert plain[:first_of_second] == later[:first_of_second]
    pairs = zip(plain[first_of_second:], later[first_of_second:], strict=True)
    assert all(a != b for a, b in pairs)


def vocabulary(data):
    return script.huggingface.load_tokenizer(data).vocab_size


def test_the_linear_schedule_is_a_line_and_adafactor_trains(data_folder, tmp_path):
    train(data_folder, tmp_path / "run", "--lr_decay=linear", "--lr=0.004", "--min_lr=0.001",
          "--optimizer=adafactor", "--eval_every=0")
    lines = metrics(tmp_path / "run")
    rates = [m["lr"] for m in lines[4:]]  # after the warmup
    assert rates == pytest.approx([0.004 - 0.003 * i / 20 for i in range(20)], rel=1e-9)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_run_with_another_optimizer_continues_with_the_same_bits(data_folder, tmp_path,
                                                                   optimizer):
    same = [f"--optimizer={optimizer}", "--lr_decay=linear", "--lr=0.001", "--min_lr=0.001"]
    train(data_folder, tmp_path / "whole", *same, "--max_steps=10")
    for steps in (5, 10):
        train(data_folder, tmp_path / "twice", *same, f"--max_steps={steps}", "--resume=true")
    assert weights(tmp_path / "twice") == weights(tmp_path / "whole")


def test_metrics_go_where_they_are_asked_to_and_a_missing_package_is_named(
        data_folder, tmp_path, monkeypatch):
    shown = []
    writer = SimpleNamespace(add_scalar=lambda *values: shown.append(values))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer))
    train(data_folder, tmp_path / "run", "--max_steps=3", "--log=tensorboard")
    losses = [(value, step) for name, value, step in shown if name == "loss"]
    assert [step for _, step in losses] == [0, 1, 2]
    logged = [m["loss"] for m in metrics(tmp_path / "run") if "loss" in m]
    assert [value for value, _ in losses] == logged
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
        with pytest.raises(Mistake, match=f"pip install {name}"):
            train(data_folder, tmp_path / name, "--max_steps=3", f"--log={name}")


def test_flops_and_loader_seconds_are_in_the_metrics(data_folder, tmp_path, monkeypatch):
    counted, step_flops = [], plan.step_flops

    def noting(model_cfg, positions, scored, pairs, queries):
        counted.append((positions, queries))
        return step_flops(model_cfg, positions, scored, pairs, queries)

    monkeypatch.setattr(plan, "step_flops", noting)
    train(data_folder, tmp_path / "run", "--max_steps=2", "--eval_every=0", "--objective=block",
          "--peak_tflops=0.001")
    lines = all_metrics(tmp_path / "run")
    assert len(lines) == 2 and counted == [(512, 256)] * 2
    for m in lines:
        assert 0 <= m["loader_seconds"] < m["seconds"] and m["memory_gb"] > 0
        # 2 layers, d 32, 2 + 2·1 heads of 16 either way, d_ff 48; 256 noisy and 256 clean
        # positions. The last layer: keys and values of all, queries of the noisy ones, and the
        # rest of the masked ones, as has the head of 320 ids
        matrices = 6 * 512 * (32 * 16 * 6 + 3 * 32 * 48)
        matrices += 6 * 512 * 32 * 16 * 2 + 6 * 256 * 32 * 16 * 2
        most = 12 * 2 * 2 * 16 * 2 * 256 * 32 + 6 * 256 * (32 * 16 * 2 + 3 * 32 * 48 + 32 * 320)
        assert 0 < m["mfu"] * m["seconds"] * 1e9 - matrices < most


COMPILED = """
import sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from test_train import train
data, folder = map(Path, sys.argv[1:])
for name in ("first", "second"):
    torch._dynamo.reset()
    train(data, folder / name, "--compile=true", "--dtype=float32")
"""


@pytest.mark.slow
def test_compiled_runs_give_the_same_bits_and_the_eager_loss(data_folder, tmp_path):
    """In a process of their own: they turn PyTorch's deterministic algorithms on for good."""
    line = [sys.executable, "-c", COMPILED, str(data_folder), str(tmp_path)]
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    train(data_folder, tmp_path / "eager", "--dtype=float32")
    for a, b in zip(metrics(tmp_path / "first"), metrics(tmp_path / "eager"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)


# --- begun and resumed ----------------------------------------------------------------------------

def test_one_command_starts_a_run_and_continues_it(data_folder, tmp_path, capsys):
    """What a scheduler repeats: the run's own checkpoint, if there is one, beats init_from."""
    train(data_folder, tmp_path / "start", "--max_steps=5")
    same = [f"--init_from={tmp_path / 'start'}", "--resume=true", "--lr_decay=linear",
            "--lr=0.001", "--min_lr=0.001"]
    train(data_folder, tmp_path / "whole", *same)
    for steps in (10, 24):
        train(data_folder, tmp_path / "twice", *same, f"--max_steps={steps}")
    whole, twice = ([m for m in metrics(tmp_path / name) if "loss" in m]
                    for name in ("whole", "twice"))
    assert whole == twice
    capsys.readouterr()
    assert train(data_folder, tmp_path / "whole", *same) == 0
    assert "its 24 steps are done" in capsys.readouterr().out


def test_a_finished_run_has_nothing_to_resume(data_folder, tmp_path, capsys):
    train(data_folder, tmp_path / "run", "--max_steps=5")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert json.loads(before.splitlines()[-1])["val_tokens"] > 0  # it ended with an evaluation
    assert train(data_folder, tmp_path / "run", "--max_steps=5", "--resume=true") == 0
    assert "its 5 steps are done" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_block_diffusion_continues_from_autoregressive_weights(data_folder, tmp_path):
    train(data_folder, tmp_path / "ar", "--objective=ar", "--lr=0.01", "--max_steps=40")
    train(data_folder, tmp_path / "block", f"--init_from={tmp_path / 'ar'}", "--objective=block")
    train(data_folder, tmp_path / "fresh", "--objective=block")
    last = {}
    for name in ("block", "fresh"):
        scores = [m["val_nelbo"] for m in metrics(tmp_path / name) if "val_nelbo" in m]
        last[name] = scores[-1]
    assert last["block"] < last["fresh"]


# --- numbers that are not finite, full disks ------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
        data_folder, tmp_path):
    train(data_folder, tmp_path / "run", "--max_steps=5")
    good = weights(tmp_path / "run")
    run = train_outside(data_folder, tmp_path / "run", "--resume=true", "--lr=1e6",
                        "--grad_clip=1e9", "--weight_decay=1e3")
    error = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert error.startswith("error: step ") and "step_0000005" in error
    assert weights(tmp_path / "run") == good
    assert len(all_metrics(tmp_path / "run")) >= 5


def folder_with_a_large_unused_row(data, folder):
    """A checkpoint whose embedding has a row that no token reads: it overflows unnoticed."""
    train(data, folder / "start", "--max_steps=1", "--eval_every=0", "--tie_embeddings=false",
          f"--vocab_size={vocabulary(data) + 1}")
    path = folder / "start" / "step_0000001" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][-1] = 1e30
    save_file(tensors, path, metadata={"format": "pt"})
    return folder / "start"


def test_weights_that_overflow_in_the_last_update_are_not_saved(data_folder, tmp_path):
    """Loss and gradients are finite: nothing else would notice."""
    start = folder_with_a_large_unused_row(data_folder, tmp_path)
    with pytest.raises(Mistake, match="weights' norm is inf.*not saved.*no checkpoint had been"):
        train(data_folder, tmp_path / "run", f"--init_from={start}", "--max_steps=1",
              "--eval_every=0", "--lr=1e6", "--lr_warmup_steps=0", "--weight_decay=1e3")
    line, = all_metrics(tmp_path / "run")
    assert all(value is not None for name, value in line.items() if name != "mfu")
    assert not list((tmp_path / "run").glob("step_*"))
    assert not (tmp_path / "run" / "latest").exists()


FLOATS = [f.name for f in fields(script.Config) if float in (f.type, *get_args(f.type))]


@pytest.mark.parametrize("name", FLOATS)
def test_settings_are_finite_on_the_command_line_and_in_a_file(data_folder, tmp_path, name):
    for text in ("1e999", "-1e999", "nan", "inf", "-inf"):
        with pytest.raises(Mistake, match=f"{name}=.* does not fit: {name} is a float from"):
            train(data_folder, tmp_path / "run", f"--{name}={text}")
        (tmp_path / "config.py").write_text(f"{name} = float({text!r})")
        with pytest.raises(Mistake, match=f"{name}=.* does not fit: {name} is a float from"):
            train(data_folder, tmp_path / "run", tmp_path / "config.py")
    assert not (tmp_path / "run").exists()


def test_all_settings_that_are_numbers_have_bounds():
    assert len(FLOATS) > 12
    for f in fields(script.Config):
        assert f.type not in (int, float), f.name


def test_a_disk_that_fills_up_while_saving_loses_nothing(data_folder, tmp_path):
    resource = pytest.importorskip("resource")
    train(data_folder, tmp_path / "run", "--max_steps=5")
    good = weights(tmp_path / "run")
    limit = len(good) // 2  # no file may grow larger: writing the weights fails half way

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = train_outside(data_folder, tmp_path / "run", "--resume=true", preexec_fn=limit_files)
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert "could not save" in run.stderr and "step_0000005" in run.stderr.splitlines()[-1]
    assert weights(tmp_path / "run") == good and not list((tmp_path / "run").glob("*.tmp"))


# --- filling in the middle ------------------------------------------------------------------------

def described(run):
    return script.huggingface.read_description(script.huggingface.find(run))


def fim_words(rate, objective="block"):
    return [f"--objective={objective}", f"--fim_rate={rate}", "--max_steps=3", "--eval_every=2",
            "--dtype=float32"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_rearranges_has_three_more_tokens_and_says_so(data_folder, tmp_path, objective):
    train(data_folder, tmp_path / "plain", *fim_words(0, objective))
    train(data_folder, tmp_path / "fim", *fim_words(0.5, objective))
    cfg, tok, _ = described(tmp_path / "plain")
    assert (cfg.vocab_size, tok.fim, tok.fim_trained) == (320, None, False)
    cfg, tok, _ = described(tmp_path / "fim")
    assert (cfg.vocab_size, tok.fim, tok.fim_trained) == (323, (320, 321, 322), True)
    rates = [[m["mask_rate"] for m in metrics(tmp_path / run) if "mask_rate" in m]
             for run in ("plain", "fim")]
    assert rates[0] == rates[1]  # the noise is the same
    assert [m["val_tokens"] for m in metrics(tmp_path / "plain") if "val_tokens" in m] == [
        m["val_tokens"] for m in metrics(tmp_path / "fim") if "val_tokens" in m]


def test_held_out_windows_are_never_rearranged(data_folder, tmp_path, monkeypatch):
    """Even with fim_rate=1 no evaluation sees one of the three tokens; every step does."""
    scored, trained = [], []
    evaluate, corrupt = script.evaluate, script.corrupt

    def noting_evaluate(model, batch, **kwargs):
        scored.append(batch.x0)
        return evaluate(model, batch=batch, **kwargs)

    def noting_corrupt(batch, *args):
        trained.append(batch.x0)
        return corrupt(batch, *args)

    monkeypatch.setattr(script, "evaluate", noting_evaluate)
    monkeypatch.setattr(script, "corrupt", noting_corrupt)
    train(data_folder, tmp_path / "run", *fim_words(1.0))
    assert scored and all((x0 < 320).all() for x0 in scored)
    assert all((x0 >= 320).any() for x0 in trained)


def test_a_model_without_rows_for_the_tokens_is_refused_and_one_with_them_goes_on(
        data_folder, tmp_path):
    train(data_folder, tmp_path / "full", *fim_words(0))
    with pytest.raises(Mistake, match="323 ids, its model only 320; fim_rate may have added"):
        train(data_folder, tmp_path / "new", f"--init_from={tmp_path / 'full'}", *fim_words(0.5))
    with pytest.raises(Mistake, match="323 ids, its model only 320; fim_rate may have added"):
        train(data_folder, tmp_path / "full", "--resume=true", *fim_words(0.5))
    assert not (tmp_path / "new").exists()
    train(data_folder, tmp_path / "roomy", "--vocab_size=328", *fim_words(0))
    train(data_folder, tmp_path / "filler", f"--init_from={tmp_path / 'roomy'}", *fim_words(0.5))
    train(data_folder, tmp_path / "later", f"--init_from={tmp_path / 'filler'}", *fim_words(0))
    found = [described(tmp_path / run)[1] for run in ("roomy", "filler", "later")]
    assert [tok.fim for tok in found] == [None, (320, 321, 322), (320, 321, 322)]
    assert [tok.fim_trained for tok in found] == [False, True, True]
    script.huggingface.main(["export", str(tmp_path / "filler"), f"--to={tmp_path / 'published'}"])
    assert described(tmp_path / "published")[1].fim_trained


def test_a_tokenizer_alone_is_not_trained(data_folder, tmp_path):
    """Data prepared with a run's tokenizer has its tokens, but a new model has not learned them."""
    train(data_folder, tmp_path / "run", *fim_words(0.5))
    source = data_folder.parent / "source"
    data = prepare(source, tmp_path / "data", f"--tokenizer={tmp_path / 'run'}",
                   "--val_percent=25")
    train(data, tmp_path / "new", *fim_words(0))
    _, tok, _ = described(tmp_path / "new")
    assert tok.fim == (320, 321, 322) and not tok.fim_trained


# --- prompts and answers --------------------------------------------------------------------------

SFT = {
    "block": ["--objective=block", "--schedule=count", "--complementary=true",
              "--condition_epochs=1.5"],
    "ar": ["--objective=ar", "--cross_document=true"],
    "bidirectional": ["--objective=bidirectional", "--schedule=uniform", "--canvas=12",
                      "--strategies=((0.1,0,0.3),(0.3,0,0.5))", "--condition_epochs=2"],
    "ar_diffusion": ["--objective=ar_diffusion", "--shift=true", "--val_percent=20"],
}
SAME = ["--dtype=float32", "--max_steps=12", "--lr=0.01", "--min_lr=0.001"]


@pytest.fixture(scope="module")
def samples(data_folder, tmp_path_factory):
    """A folder with a run to start from, train.jsonl of 60 samples and val.jsonl of 9."""
    folder = tmp_path_factory.mktemp("samples")
    train(data_folder, folder / "start", "--max_steps=1", "--eval_every=0")
    for name, first, count in (("train", 0, 60), ("val", 500, 9)):
        records = [{"prompt": f"def f{i}(x):\n", "completion": "    return x" + f" + {i}" * (i % 3)}
                   for i in range(first, first + count)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def tune(samples, out, objective, *more, run=train):
    words = [f"--init_from={samples / 'start'}", *SFT[objective], *SAME, *more]
    if "--val_" not in " ".join(words):
        words.append(f"--val_data={samples / 'val.jsonl'}")
    return run(samples / "train.jsonl", out, *words)


@pytest.mark.parametrize("objective", SFT)
def test_fine_tuning_learns_and_goes_on_from_a_checkpoint_with_the_same_bits(samples, tmp_path,
                                                                             objective, capsys):
    tune(samples, tmp_path / "whole", objective, "--keep=99")
    assert "samples in" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "latest").write_text("step_0000010")
    moved = tmp_path / "moved.jsonl"
    shutil.copy(samples / "train.jsonl", moved)  # the same samples elsewhere are the same data
    tune(samples, tmp_path / "cut", objective, "--resume=true", "--keep=99", f"--data={moved}")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    scores = [m["val_nelbo"] for m in metrics(tmp_path / "whole") if "val_nelbo" in m]
    assert scores[-1] < scores[0]


@pytest.mark.slow
def test_fine_tuning_killed_and_resumed_gives_the_same_bits(samples, tmp_path):
    tune(samples, tmp_path / "whole", "block")
    killed = tmp_path / "killed"

    def start(*args):
        return subprocess.Popen(command(*args), cwd=ROOT, stderr=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL)

    run = tune(samples, killed, "block", run=start)
    file = killed / "metrics.jsonl"
    while run.poll() is None and not (file.exists() and file.read_text().count("\n") >= 7):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    tune(samples, killed, "block", "--resume=true")
    assert metrics(killed) == metrics(tmp_path / "whole")
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["block", "ar", "bidirectional"])
def test_two_processes_fine_tune_as_one_does(samples, tmp_path, objective):
    """Rows of a pair may be on different processes: micro-batches of 3 of 4 rows."""
    def launch(*args):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node=2", *command(*args)[1:]]
        return subprocess.run(torchrun, cwd=ROOT, capture_output=True, text=True, timeout=300)

    tune(samples, tmp_path / "one", objective)
    run = tune(samples, tmp_path / "two", objective, "--micro_batch=3", run=launch)
    assert run.returncode == 0, run.stderr
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and a.get("mask_rate") == b.get("mask_rate")


@pytest.mark.parametrize("objective, rows_per_step", [("block", 4), ("ar_diffusion", 8)])
@pytest.mark.parametrize("epochs", [0.01, 1.0])
def test_epochs_are_counted_in_rows_of_the_data(samples, tmp_path, capsys, objective, rows_per_step,
                                                epochs):
    """With pairs a step has half as many rows of the data."""
    tune(samples, tmp_path / "run", objective, f"--epochs={epochs}", "--eval_every=0",
         "--lr_warmup_steps=0")
    rows = int(re.search(r"samples in (\d+) rows", capsys.readouterr().out)[1])
    lines = metrics(tmp_path / "run")
    assert len(lines) == max(1, round(epochs * rows / rows_per_step))
    assert len(lines) < 5 or lines[-1]["lr"] < 0.002  # it has fallen by then
    if epochs == 1.0:
        capsys.readouterr()
        tune(samples, tmp_path / "run", objective, "--epochs=1", "--resume=true", "--eval_every=0",
             "--lr_warmup_steps=0")
        assert "steps are done" in capsys.readouterr().out


@pytest.mark.parametrize("epochs, asked", [(4.0, 9), (4.0, 1), (0.5, 9)])
def test_warmup_is_at_most_a_tenth_of_the_steps_that_the_epochs_are(samples, tmp_path, epochs,
                                                                    asked):
    tune(samples, tmp_path / "run", "ar_diffusion", f"--epochs={epochs}", "--eval_every=0",
         f"--lr_warmup_steps={asked}")
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert (len(rates) >= 20) == (epochs == 4)
    warmup = min(asked, len(rates) // 10)
    rising = [0.01 * n / warmup for n in range(1, warmup + 1)]
    assert rates[:warmup + 1] == pytest.approx([*rising, 0.01])
    assert rates[warmup + 1] < rates[warmup]


def test_a_row_is_shown_and_nothing_else_happens(samples, data_folder, tmp_path, capsys):
    tune(samples, tmp_path / "run", "block", "--show_row=0")
    assert "tokens are scored" in capsys.readouterr().out and not (tmp_path / "run").exists()
    before = sorted((samples / "start").rglob("*"))
    tune(samples, samples / "start", "block", "--show_row=1")  # where a run is already
    assert "row 1: " in capsys.readouterr().out
    assert sorted((samples / "start").rglob("*")) == before
    train(data_folder, tmp_path / "run", "--show_row=2")  # windows of documents
    assert "row 2: " in capsys.readouterr().out
    with pytest.raises(Mistake, match="show_row=99999 is beyond the last row"):
        tune(samples, tmp_path / "run", "block", "--show_row=99999")


def test_fine_tuning_does_not_continue_on_other_samples(samples, tmp_path):
    tune(samples, tmp_path / "run", "block", "--max_steps=2", "--eval_every=0")
    changed = tmp_path / "changed.jsonl"
    changed.write_text((samples / "train.jsonl").read_text().replace("f7(x)", "f7(y)"))
    for more, says in ((f"--data={changed}", "is not what the run in .* was trained on"),
                       ("--condition_epochs=1", "condition_epochs=1.0 but the run in"),
                       ("--canvas=9", "canvas=9 but the run in"),
                       ("--complementary=false", "complementary=False but the run in")):
        with pytest.raises(Mistake, match=says):
            tune(samples, tmp_path / "run", "block", "--resume=true", "--max_steps=4", more)


SFT_MISTAKES = [
    ("--data=nowhere.jsonl", "nowhere.jsonl is missing, or not a file"),
    ("--val_data=nowhere.jsonl", "nowhere.jsonl is missing, or not a file"),
    ("--val_data=tests", "tests is missing, or not a file"),
    ("--init_from=scratch", "has no tokenizer: name the model to fine-tune with --init_from"),
    ("--fim_rate=0.5", "fim_rate=0.5 rearranges documents"),
    ("--val_percent=0", "val_percent=0 does not fit"),
    ("--val_percent=100", "val_percent=100 does not fit"),
    ("--context=8 --batch_tokens=64", "context=8 is too short: with its <eos>, the shortest"),
    ("--batch_tokens=224", "complementary=true needs an even number of rows per step, not "
     "batch_tokens / context = 7"),
    ("--schedule=clipped", "complementary=true needs a diffusion objective and schedule='count'"),
    ("--objective=ar", "complementary=true needs a diffusion objective"),
    ("--u_warmup_steps=3", "complementary=true excludes u_warmup_steps=3"),
    ("--condition_epochs=-1", "condition_epochs=-1 does not fit"),
    ("--canvas=0", "canvas=0 does not fit: canvas is an int from 1"),
    ("--show_row=-1", "show_row=-1 does not fit"),
    ("--epochs=nan", "epochs='nan' does not fit"),
]


@pytest.mark.parametrize("more, says", SFT_MISTAKES)
def test_mistakes_of_fine_tuning_end_in_a_one_line_message(samples, tmp_path, more, says):
    words = more.split()
    if "val_percent" not in more and "val_data" not in more:
        words.append("--val_percent=20")
    with pytest.raises(Mistake, match=re.escape(says)) as error:
        tune(samples, tmp_path / "run", "block", *words)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_condition_epochs_without_samples_is_refused(data_folder, tmp_path):
    with pytest.raises(Mistake, match="condition_epochs=1.0 goes with samples, and data=.* is not"):
        train(data_folder, tmp_path / "run", "--condition_epochs=1")


def test_a_bad_line_ends_a_run_before_it_begins(samples, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((samples / "train.jsonl").read_text() + '{"prompt": "p"}\n')
    with pytest.raises(Mistake, match=f"^line 61 of {bad}: it must have a \"prompt\" and a"):
        tune(samples, tmp_path / "run", "block", f"--data={bad}")
    assert not (tmp_path / "run").exists()


# --- mistakes -------------------------------------------------------------------------------------

HUGE = f"1{'0' * 20}"
MISTAKES = [
    ("--data=/nowhere", "/nowhere"),
    ("--n_head=3 --n_kv_head=2", "n_kv_head=2 must divide n_head=3"),
    ("--batch_tokens=100", "multiple of context=32, such as 96"),
    ("--context=10000000 --batch_tokens=10000000", "context=10000000 is longer than"),
    ("--context=100000000 --batch_tokens=100000000", "context is an int from 8 to 16,777,216"),
    ("--context=100 --batch_tokens=1000", "context=100 must be a multiple of 8, as documents are: "
     "give 96 or 104"),
    ("--context=9", "context=9 must be a multiple of 8, as documents are: give 8 or 16"),
    ("--context=9 --dry_run=true", "context=9 must be a multiple of 8"),
    ("--fim_rate=1.5", "fim_rate=1.5 does not fit: fim_rate is a float from 0 to 1"),
    ("--fim_rate=-0.1", "fim_rate=-0.1 does not fit"),
    ("--fim_rate=nan", "fim_rate='nan' does not fit"),
    ("--objectve=ar", "did you mean 'objective'"),
    ("--max_steps=many", "max_steps='many' does not fit: max_steps is an int"),
    ("--objective=arr", "objective is one of ar, bidirectional"),
    ("--objective=ar --shift=false", "shift=False is not possible"),
    ("--objective=block --strategies=((0.1,0.1,0.1),)", "need objective='bidirectional'"),
    ("--lr=-1", "lr=-1 does not fit: lr is a float from 1e-30"),
    ("--lr=0.0001", "min_lr=0.0002 is above lr=0.0001"),
    ("--beta1=1.5", "beta1=1.5 does not fit: beta1 is a float from 0 to 0.999999"),
    ("--eval_draws=1", "eval_draws=1 does not fit: eval_draws is an int from 2"),
    ("--anneal_steps=5", "anneal_steps=5 needs objective='bidirectional'"),
    ("--init_from=/nowhere", "no checkpoint in /nowhere"),
    ("--init_from=resume", "no checkpoint in resume"),
    ("--bos_token=<|begin|>", "documents begin with 0 in"),
    ("--device=cuda", "device='cuda' is not available"),
    ("--context=0", "context=0 does not fit: context is an int from 8"),
    ("--context=1", "context=1 does not fit: context is an int from 8"),
    ("--batch_tokens=0", "batch_tokens=0 does not fit"),
    ("--micro_batch=0", "micro_batch=0 does not fit"),
    ("--vocab_size=10", "vocab_size=10 is less than the 320 ids of the tokenizer"),
    (f"--block_size={HUGE}", "block_size=100000000000000000000 does not fit"),
    (f"--block_size={HUGE}0", "block_size=about 2^69 does not fit"),
    ("--block_size=0", "block_size=0 does not fit"),
    (f"--d_model={HUGE}", "d_model=100000000000000000000 does not fit"),
    (f"--vocab_size={HUGE}", "vocab_size=100000000000000000000 does not fit"),
    (f"--batch_tokens={HUGE}", "batch_tokens=100000000000000000000 does not fit"),
    (f"--max_steps={HUGE}", "max_steps=100000000000000000000 does not fit"),
    ("--d_model=131072 --n_layer=1000", "a smaller --d_model, --n_layer"),
    ("--vocab_size=16777216 --d_model=131072", "a smaller --d_model, --n_layer"),
    (f"--seed={2**70}", "seed=about 2^70 does not fit: seed is an int from 0"),
    (f"--seed={2**63}", "seed=9223372036854775808 does not fit: seed is an int from 0"),
    ("--seed=-1", "seed=-1 does not fit"),
    ("--rope_theta=0", "rope_theta=0 does not fit: rope_theta is a float from 1"),
    ("--norm_eps=-1", "norm_eps=-1 does not fit: norm_eps is a float from"),
    ("--data=", "data='' does not fit: data is a text that is not empty"),
    ("--init_from=", "init_from='' does not fit"),
]


@pytest.mark.parametrize("more, says", MISTAKES)
def test_mistakes_end_in_a_one_line_message(data_folder, tmp_path, more, says):
    if "--device=cuda" in more and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises((Mistake, OSError), match=re.escape(says)) as error:
        train(data_folder, tmp_path / "run", *more.split())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_output_folder_is_refused(data_folder, tmp_path, monkeypatch):
    """It would be the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake, match="out='' does not fit: out is a text that is not empty"):
        train(data_folder, "")
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused_before_the_model_is_built(
        data_folder, tmp_path, monkeypatch):
    def build(*_):
        raise AssertionError("the model is being built")

    monkeypatch.setattr(parallel, "build", build)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("not a folder")
    for out in ("README.md", "README.md/run", tmp_path / "README.md"):
        with pytest.raises(Mistake, match="cannot be a folder: .*README.md is a file"):
            train(data_folder, out)
    assert (tmp_path / "README.md").read_text() == "not a folder"


def test_an_output_folder_that_cannot_be_written_ends_before_training(data_folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    run = train_outside(data_folder, tmp_path / "file" / "run")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: ")


def test_a_finished_run_is_not_overwritten_and_foreign_or_damaged_checkpoints_are_refused(
        data_folder, tmp_path):
    run = tmp_path / "run"
    train(data_folder, run, "--max_steps=5")
    with pytest.raises(Mistake, match="already holds a run"):
        train(data_folder, run)
    with pytest.raises(Mistake, match="seed=5 but the run in .* has seed=1337"):
        train(data_folder, run, "--resume=true", "--seed=5")
    with pytest.raises(Mistake, match="objective=ar but the run in"):
        train(data_folder, run, "--resume=true", "--objective=ar")
    with pytest.raises(Mistake, match="n_layer=3 was asked for"):
        train(data_folder, tmp_path / "new", f"--init_from={run}", "--n_layer=3")

    other = prepare(ROOT, tmp_path / "other_data", "--vocab_size=300", "--val_percent=30")
    with pytest.raises(Mistake, match="another tokenizer"):
        train(other, tmp_path / "new", f"--init_from={run}")

    checkpoint = run / "step_0000005"
    for name in ("model.safetensors", "state/optimizer/.metadata", "config.json"):
        whole = (checkpoint / name).read_bytes()
        os.truncate(checkpoint / name, len(whole) // 2)
        with pytest.raises((Mistake, OSError), match="damaged|not readable JSON"):
            train(data_folder, run, "--resume=true")
        (checkpoint / name).unlink()
        with pytest.raises((Mistake, OSError), match="missing|no checkpoint"):
            train(data_folder, run, "--resume=true")
        (checkpoint / name).write_bytes(whole)


def test_a_run_does_not_continue_on_other_data(data_folder, tmp_path):
    """Prepared anew, even with the same sizes; the same data elsewhere is the same data."""
    data = tmp_path / "data"
    shutil.copytree(data_folder, data)
    train(data, tmp_path / "run", "--max_steps=5")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for name in ("train_000.bin", "val_000.bin"):
        file = next(iter(sorted(data.glob(name[:3] + "*.bin"))))
        whole = file.read_bytes()
        file.write_bytes(whole[:40] + whole[42:44] + whole[42:])
        assert file.stat().st_size == len(whole)
        with pytest.raises(Mistake, match="is not what the run in .* was trained on.*anew"):
            train(data, tmp_path / "run", "--resume=true")
        file.write_bytes(whole)
    shutil.rmtree(data)
    prepare(data_folder.parent / "source", data, "--vocab_size=320", "--val_percent=50")
    with pytest.raises(Mistake, match="is not what the run in .* was trained on.*anew"):
        train(data, tmp_path / "run", "--resume=true")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert train(data_folder, tmp_path / "run", "--resume=true", "--max_steps=7") == 0
