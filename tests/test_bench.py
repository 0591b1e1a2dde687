"""bench/ and experiments/: what they refuse, before they measure anything."""
import json

import pytest
import torch
from conftest import ROOT

import model as model_file
from bench import train_cpu, train_gpu, train_ranks
from configurator import Mistake
from diffusion import Draw, Recipe, corrupt, weighted_loss
from experiments import toy_report


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    def measured(*_):
        raise AssertionError("measured")

    monkeypatch.chdir(ROOT)
    for name in ("measure", "falling_loss"):
        for script in (train_cpu, train_gpu):
            monkeypatch.setattr(script, name, measured, raising=False)


@pytest.mark.parametrize("words, said", [
    (["--steps=0"], "steps=0 does not fit: steps is an int from 2 to 100,000"),
    (["--repeats=0"], "repeats=0 does not fit"),
    (["--tokens=100"], "tokens=100 does not fit: tokens is an int from 1,024"),
    (["--tokens=5000"], "tokens=5000 must be a multiple of 1024, such as 5120"),
    (["--tokens=1e30"], "does not fit: tokens is an int"),
    (["--vocab_size=4"], "vocab_size=4 does not fit"),
    (["--out=/nonexistent/x.md"], "there is no folder /nonexistent; make it first"),
])
def test_train_cpu_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_cpu.main(words)


@pytest.mark.parametrize("words, said", [
    (["--runs=0"], "runs=0 does not fit: runs is an int from 1 to 1,000"),
    (["--steps=1"], "steps=1 does not fit"),
    (["--small_steps=-1"], "small_steps=-1 does not fit"),
    (["--data=nope"], "nope"),
])
def test_train_gpu_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_gpu.main(words)


@pytest.mark.parametrize("words, said", [
    (["--steps=0"], "steps=0 does not fit"),
    (["--rounds=0"], "rounds=0 does not fit"),
    (["--context=1"], "context=1 does not fit"),
    (["--out=/nonexistent/x.md"], "there is no folder /nonexistent; make it first"),
])
def test_train_ranks_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_ranks.main(words)


def test_train_ranks_passes_on_what_train_says(tmp_path):
    with pytest.raises(Mistake, match="train.py failed: .*nope") as error:
        train_ranks.main(["--data=nope", "--rounds=1", f"--out={tmp_path}/table.md"])
    assert "\n" not in str(error.value)


def test_the_reason_of_a_failure_is_its_error_line_or_else_its_end():
    assert train_ranks.reason("loading\nerror: no data\nW123 torchrun ends") == "no data"
    assert train_ranks.reason("x" * 5000 + "killed").endswith("xkilled")


@pytest.mark.parametrize("attention", ["tiles", "dense mask"])
def test_all_arms_of_train_cpu_have_the_same_loss(attention, monkeypatch):
    cfg = train_cpu.Config(tokens=64, vocab_size=50)
    monkeypatch.setattr(model_file, "attention", {
        "tiles": train_cpu.tiled_attention, "dense mask": train_cpu.dense_attention}[attention])
    batch = train_cpu.toy_batch(32, cfg, torch.Generator().manual_seed(0))
    recipe = Recipe("block", mask_id=2)
    noised = corrupt(batch, recipe, Draw(seed=0, step=0, rows=range(2), batch_rows=2))
    model = train_cpu.toy_model(32, 50)
    with_saving = weighted_loss(model, noised, recipe)
    without = weighted_loss(train_cpu.WithoutSaving(model), noised, recipe)
    torch.testing.assert_close(with_saving, without, rtol=1e-6, atol=0)


# --- toy_report -----------------------------------------------------------------------------------

STEP = {"step": 0, "loss": 5.0, "tokens": 4096, "tokens_per_s": 100.0, "seconds": 1.0, "mfu": None}
EVALUATION = {"step": 1, "val_nelbo": 5.0, "val_bits_per_byte": 3.0, "val_tokens": 9,
              "seconds": 1.0}
SETTINGS = {"objective": "ar", "context": 8, "batch_tokens": 16, "seed": 1, "eval_windows": 2}


def write_run(folder, config=SETTINGS, metrics=(STEP, EVALUATION)):
    state = folder / "step_0000001" / "state"
    state.mkdir(parents=True)
    (folder / "latest").write_text("step_0000001")
    (folder / "step_0000001" / "config.json").write_text("{}")
    (state / "train.json").write_text(json.dumps({"step": 1, "config": config, "machine": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return str(folder)


def test_toy_report_names_a_run_by_its_own_settings(tmp_path):
    ar = write_run(tmp_path / "toy")
    assert toy_report.read_settings(ar, "ar")["step"] == 1
    with pytest.raises(Mistake, match="was trained with objective='ar', where one with objective"):
        toy_report.main([f"--ar={ar}", f"--block={ar}"])
    block = write_run(tmp_path / "toy_ar", SETTINGS | {"objective": "block"})
    with pytest.raises(Mistake, match="was trained with objective='block'"):
        toy_report.main([f"--ar={block}", f"--block={ar}"])


@pytest.mark.parametrize("config", [None, [], {}, SETTINGS | {"context": "8"},
                                    SETTINGS | {"seed": None}, SETTINGS | {"eval_windows": 1.5}])
def test_toy_report_refuses_damaged_settings(tmp_path, config):
    with pytest.raises(Mistake):
        toy_report.read_settings(write_run(tmp_path / "toy", config), "ar")


@pytest.mark.parametrize("content, said", [
    (b'{"step": 0, "lo', "line 1, is not JSON: was it cut short"),
    (b"5\n", "line 1, is neither a step nor an evaluation"),
    (b"null\n", "line 1, is neither"),
    (b"{}\n", "line 1, is neither"),
    (b"[" * 100_000, "line 1, is not JSON"),
    (b"\xff\n", "is not UTF-8"),
    (b"", "has 0 steps and 0 evaluations"),
    (json.dumps(STEP).encode(), "has 1 steps and 0 evaluations"),
])
def test_toy_report_names_damaged_metrics(tmp_path, content, said):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(Mistake, match=said) as error:
        toy_report.read_metrics(tmp_path)
    assert "metrics.jsonl" in str(error.value)


def test_toy_report_reads_steps_and_evaluations(tmp_path):
    run = write_run(tmp_path / "toy", metrics=[EVALUATION, STEP, STEP, EVALUATION])
    steps, evaluations = toy_report.read_metrics(run)
    assert (len(steps), len(evaluations)) == (2, 2)
