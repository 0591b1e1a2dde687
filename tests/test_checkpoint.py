"""Checkpoints: what is written comes back, only complete ones are ever seen, old ones go."""

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import huggingface
from configurator import Mistake
from diffusion import Recipe
from huggingface import load_tokenizer
from model import ModelConfig, Transformer
from optimizers import make_optimizer
from train import Config

RECIPE = Recipe("block", mask_id=2, block_size=4)


def small_model(tok, **kwargs):
    return Transformer(ModelConfig(tok.vocab_size, 16, 2, 2, 1, 8, 24, 64, **kwargs))


def save(run, step, model, tok, keep=2):
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(run, step, model, optimizer, tok, RECIPE, {"machine": {}}, keep)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True, "rope_theta": 5e5}],
)
def test_a_saved_model_comes_back_bit_for_bit(data_folder, tmp_path, kwargs):
    tok = load_tokenizer(data_folder)
    model = small_model(tok, **kwargs)
    save(tmp_path / "run", 3, model, tok)
    again, tok2, recipe = huggingface.load(tmp_path / "run")
    assert again.cfg == model.cfg and tok2.json == tok.json
    assert (recipe.objective, recipe.shift, recipe.block_size) == ("block", False, 4)
    for (name, p), (name2, q) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == name2 and torch.equal(p, q)


def test_latest_is_found_old_ones_go_and_the_newest_run_wins(data_folder, tmp_path):
    tok = load_tokenizer(data_folder)
    for step in (1, 2, 3):
        save(tmp_path / "a", step, small_model(tok), tok, keep=2)
    assert sorted(p.name for p in (tmp_path / "a").glob("step_*")) == [
        "step_0000002",
        "step_0000003",
    ]
    assert huggingface.find(tmp_path / "a").name == "step_0000003"
    assert huggingface.find(tmp_path / "a" / "step_0000002").name == "step_0000002"
    save(tmp_path / "b", 1, small_model(tok), tok)
    assert huggingface.newest_run(tmp_path) == tmp_path / "b"


def test_where_there_is_no_run_the_weights_in_the_box_are_meant(tok, tmp_path, monkeypatch):
    box, run = tmp_path / "box", tmp_path / "out" / "run"
    monkeypatch.setattr(huggingface, "BOX", box)
    for out in ("out", "empty"):
        with pytest.raises(Mistake) as error:
            huggingface.newest_run(tmp_path / out)
        assert str(error.value) == (
            f"no trained run in {tmp_path / out}/: `bash demo.sh` trains some, or name one with "
            "--init_from=FOLDER"
        )
    model = small_model(tok)
    box.mkdir()
    huggingface.write_model(box, model, tok, RECIPE)
    assert huggingface.newest_run(tmp_path / "out") == box
    again, _, recipe = huggingface.load(huggingface.newest_run(tmp_path / "out"))
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
    assert recipe.objective == "block"
    save(run, 1, model, tok)
    assert huggingface.newest_run(tmp_path / "out") == run


@pytest.mark.parametrize("broken", ["huggingface.save_file", "torch.save", "os.replace"])
def test_a_save_that_fails_leaves_the_one_before_and_no_litter(
    data_folder, tmp_path, monkeypatch, broken
):
    tok = load_tokenizer(data_folder)
    save(tmp_path / "run", 1, small_model(tok), tok)

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(broken, full)
        with pytest.raises(
            OSError, match="could not save .*No space left.*last good checkpoint is .*step_0000001"
        ):
            save(tmp_path / "run", 2, small_model(tok), tok)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "step_0000001"]
    huggingface.load(tmp_path / "run")


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 0.999))
def test_weights_cut_short_anywhere_are_refused_in_a_sentence(tmp_path_factory, data_folder, share):
    tmp, tok = tmp_path_factory.mktemp("cut"), load_tokenizer(data_folder)
    save(tmp / "run", 1, small_model(tok), tok)
    path = tmp / "run" / "step_0000001" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="is damaged"):
        huggingface.load(tmp / "run")


def test_weights_of_another_shape_are_refused(data_folder, tmp_path):
    tok = load_tokenizer(data_folder)
    save(tmp_path / "run", 1, small_model(tok), tok)
    folder = tmp_path / "run" / "step_0000001"
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 25}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="does not fit its config.json"):
            huggingface.load(folder)
    for rope in ({"type": "linear", "factor": 4.0}, {"rope_type": "yarn"}):
        (folder / "config.json").write_text(
            json.dumps(
                {k: v for k, v in config.items() if k != "rope_parameters"} | {"rope_scaling": rope}
            )
        )
        with pytest.raises(ValueError, match="in config.json is not supported: only"):
            huggingface.load(folder)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "intermediate_size"})
    )
    with pytest.raises(ValueError, match="does not say intermediate_size"):
        huggingface.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(
        ValueError, match="'gpt2' in config.json is not one of .*llama, qwen2, qwen3"
    ):
        huggingface.load(folder)


# --- pruning removes what `save` made, and nothing else -------------------------------------------


@pytest.fixture
def tok(data_folder):
    return load_tokenizer(data_folder)


def names_in(run):
    return sorted(p.name for p in run.iterdir())


def test_pruning_leaves_folders_of_other_names_alone(tok, tmp_path):
    run = tmp_path / "run"
    save(run, 20, small_model(tok), tok, keep=1)
    others = ["step_best", "step_0000015_backup", "step_", "step_15.old", "my_step_0000001"]
    for name in others:
        shutil.copytree(run / "step_0000020", run / name)
    (run / "step_0000001").write_text("a file")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run / "step_0000020", elsewhere)
    (run / "step_0000002").symlink_to(elsewhere)
    save(run, 30, small_model(tok), tok, keep=1)
    assert names_in(run) == sorted(
        [*others, "latest", "step_0000001", "step_0000002", "step_0000030"]
    )
    assert (elsewhere / "config.json").is_file()
    assert huggingface.find(run).name == "step_0000030"


def test_checkpoints_are_pruned_in_the_order_of_their_numbers(tok, tmp_path):
    run = tmp_path / "run"
    for step in (9_999_998, 9_999_999, 10_000_000):
        save(run, step, small_model(tok), tok, keep=2)
    assert names_in(run) == ["latest", "step_10000000", "step_9999999"]


def test_what_latest_names_is_never_pruned(tok, tmp_path):
    """Checkpoints with higher numbers are there: the run went on from an older one."""
    run = tmp_path / "run"
    for step in (20, 30):
        save(run, step, small_model(tok), tok)
    save(run, 10, small_model(tok), tok, keep=1)
    assert names_in(run) == ["latest", "step_0000010", "step_0000030"]
    assert huggingface.find(run).name == "step_0000010"


def test_a_step_that_is_a_link_is_replaced_and_what_it_points_to_stays(tok, tmp_path):
    run = tmp_path / "run"
    save(run, 1, small_model(tok), tok)
    os.replace(run / "step_0000001", tmp_path / "moved")
    (run / "step_0000001").symlink_to(tmp_path / "moved")
    save(run, 1, small_model(tok), tok)
    assert (
        not (run / "step_0000001").is_symlink() and (tmp_path / "moved" / "config.json").is_file()
    )


def test_files_are_on_the_disk_before_the_folder_and_latest_get_their_names(
    tok, tmp_path, monkeypatch
):
    """What a power cut would leave: nothing is renamed before it was synced."""
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(fd):
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def noting_replace(source, target):
        inside = [source] if os.path.isfile(source) else Path(source).rglob("*")
        renamed.append(Path(target).name)
        if Path(target).name != "discarded.tmp":
            assert {str(p) for p in inside} | {str(source)} <= synced, target
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to tell which file is synced")
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    save(tmp_path / "run", 1, small_model(tok), tok)
    assert renamed[-2:] == ["step_0000001", "latest"]
    assert str(tmp_path / "run") in synced


# --- what strangers wrote into state/ runs no code ------------------------------------------------


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tok, tmp_path):
    """(run, model, a new optimizer) of a run with a checkpoint of one optimizer step."""
    model = small_model(tok)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    checkpoint.save(tmp_path / "run", 1, model, optimizer, tok, RECIPE, {"config": {}}, 2)
    optimizer.zero_grad()
    return tmp_path / "run", model, torch.optim.AdamW(model.parameters())


NAME = "step_0000001"


def state_of(run):
    return run / NAME / "state" / "optimizer"


def test_state_comes_back(saved):
    run, model, optimizer = saved
    checkpoint.load_state(run / NAME, model, optimizer)
    state = optimizer.state[model.embed_tokens.weight]
    assert state["step"] == 1 and torch.allclose(state["exp_avg"], torch.tensor(0.1))


def test_a_hostile_table_of_contents_runs_no_code(saved, tmp_path):
    run, model, optimizer = saved
    (state_of(run) / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(Mistake, match="is damaged .*mkdir, which no checkpoint needs"):
        checkpoint.load_state(run / NAME, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_hostile_values_run_no_code(saved, tmp_path):
    """The numbers beside the tensors, such as the learning rate, are pickled too."""
    run, model, optimizer = saved
    state = checkpoint.optimizer_state(model, optimizer)
    state["param_groups.norm.weight.lr"] = Evil(tmp_path / "ran")
    dcp.save(state, checkpoint_id=str(state_of(run)), no_dist=True)
    with pytest.raises(Mistake, match="is damaged"):
        checkpoint.load_state(run / NAME, model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_tensor_runs_no_code(saved, tmp_path):
    run, model, optimizer = saved
    for path in state_of(run).glob("*.distcp"):
        path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")) * 1000)
    with pytest.raises(Mistake, match="is damaged"):
        checkpoint.load_state(run / NAME, model, optimizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../../stolen", "/etc/passwd", "..", "a/b"])
def test_a_table_of_contents_cannot_point_out_of_its_folder(saved, name):
    run, model, optimizer = saved
    path = state_of(run) / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # ours
    for place in metadata.storage_data.values():
        place.relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(Mistake, match="names a file outside of its folder"):
        checkpoint.load_state(run / NAME, model, optimizer)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.binary(max_size=60), st.floats(0, 0.999))
def test_a_damaged_state_is_one_line(tmp_path_factory, data_folder, junk, share):
    tmp, tok = tmp_path_factory.mktemp("state"), load_tokenizer(data_folder)
    model = small_model(tok)
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp / "run", 1, model, tok)
    path = state_of(tmp / "run") / ".metadata"
    content = path.read_bytes()
    place = int(len(content) * share)
    for damaged in (content[:place], content[:place] + junk + content[place + len(junk) :]):
        path.write_bytes(damaged)
        try:
            checkpoint.load_state(tmp / "run" / NAME, model, optimizer)
        except Mistake as error:
            assert "\n" not in str(error)


def test_a_hostile_table_of_contents_cannot_change_a_class(saved):
    run, model, optimizer = saved
    # the class Path, then (None, {"evil": 1}), then BUILD, which sets attributes
    change = b"\x80\x02cpathlib\nPath\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
    with pytest.raises(pickle.UnpicklingError, match="it would change Path"):
        checkpoint.Unpickler(io.BytesIO(change)).load()
    (state_of(run) / ".metadata").write_bytes(change)
    with pytest.raises(Mistake, match="is damaged .*it would change Path"):
        checkpoint.load_state(run / NAME, model, optimizer)
    assert not hasattr(Path, "evil")
    pickle.loads(change)  # pickle's own reader does change it
    assert Path.evil == 1
    del Path.evil


def test_the_settings_of_a_resumed_optimizer_are_this_runs(saved):
    run, model, _ = saved
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25, betas=(0.3, 0.4))
    checkpoint.load_state(run / NAME, model, optimizer)
    assert optimizer.state[model.embed_tokens.weight]["step"] == 1
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.3, 0.4))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_save_before_the_first_step_changes_nothing(tok, tmp_path, name):
    """Neither for the run that saves nor for one that goes on from there."""
    after = []
    for way in ("no save", "saved", "resumed"):
        torch.manual_seed(0)
        model = small_model(tok)
        optimizer = make_optimizer(model, Config(optimizer=name, lr=0.1))
        if way == "saved":
            checkpoint.save(tmp_path / "run", 1, model, optimizer, tok, RECIPE, {}, 2)
        if way == "resumed":
            checkpoint.load_state(tmp_path / "run" / NAME, model, optimizer)
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            optimizer.step()
            optimizer.zero_grad()
        after.append(model.state_dict())
    for weight, tensor in after[0].items():
        for other in after[1:]:
            assert torch.equal(other[weight], tensor), weight


@pytest.mark.parametrize("name", ["saving.tmp", "discarded.tmp"])
def test_a_link_in_a_runs_folder_is_not_followed(tok, tmp_path, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(mine)
    for step in (1, 2):
        save(tmp_path / "run", step, small_model(tok), tok, keep=1)
    assert names_in(mine) == ["file"] and names_in(tmp_path / "run") == ["latest", "step_0000002"]


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tok, tmp_path, monkeypatch, capsys
):
    save(tmp_path / "run", 1, small_model(tok), tok, keep=1)

    def busy(folder):
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder))

    monkeypatch.setattr(checkpoint, "prune", lambda run, name, keep: busy(run))
    save(tmp_path / "run", 2, small_model(tok), tok, keep=1)
    assert "an old checkpoint could not be removed: " in capsys.readouterr().err
    assert (tmp_path / "run" / "latest").read_text() == "step_0000002"


def test_a_second_ctrl_c_during_a_save_is_no_failed_save(tok, tmp_path, monkeypatch):
    save(tmp_path / "run", 1, small_model(tok), tok)

    def stopped(*args, **kwargs):
        raise checkpoint.CheckpointException("", {0: (SystemExit(130), None)})

    monkeypatch.setattr(checkpoint.dcp, "save", stopped)
    with pytest.raises(SystemExit) as end:
        save(tmp_path / "run", 2, small_model(tok), tok)
    assert end.value.code == 130
    assert names_in(tmp_path / "run") == ["latest", "step_0000001"]
