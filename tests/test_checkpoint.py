"""Checkpoint folders: what is written comes back, only whole ones are ever seen, old ones go."""
import errno
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import huggingface
from configurator import Mistake
from diffusion import Recipe
from huggingface import load_tokenizer
from model import ModelConfig, Transformer

RECIPE = Recipe("block", mask_id=2, block_size=4)


def small_model(tok, **kwargs):
    return Transformer(ModelConfig(tok.vocab_size, 16, 2, 2, 1, 8, 24, 64, **kwargs))


def save(run, step, model, tok, keep=2):
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(run, step, model, optimizer, tok, RECIPE, {"machine": {}}, keep)


@pytest.mark.parametrize("kwargs", [{}, {"tie_embeddings": False}, {"qkv_bias": True}, {"qk_norm": True, "rope_theta": 5e5}])
def test_a_saved_model_comes_back_bit_for_bit(data_folder, tmp_path, kwargs):
    tok = load_tokenizer(data_folder)
    model = small_model(tok, **kwargs)
    save(tmp_path / "run", 3, model, tok)
    again, tok2, recipe = huggingface.load(tmp_path / "run")
    assert again.cfg == model.cfg and tok2.json == tok.json
    assert (recipe.objective, recipe.shift, recipe.block_size) == ("block", False, 4)
    for (name, p), (name2, q) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == name2 and torch.equal(p, q)


def test_latest_is_found_old_ones_go_and_the_newest_run_wins(data_folder, tmp_path):
    tok = load_tokenizer(data_folder)
    for step in (1, 2, 3):
        save(tmp_path / "a", step, small_model(tok), tok, keep=2)
    assert sorted(p.name for p in (tmp_path / "a").glob("step_*")) == ["step_0000002", "step_0000003"]
    assert huggingface.find(tmp_path / "a").name == "step_0000003"
    assert huggingface.find(tmp_path / "a" / "step_0000002").name == "step_0000002"
    save(tmp_path / "b", 1, small_model(tok), tok)
    assert huggingface.newest_run(tmp_path) == tmp_path / "b"
    with pytest.raises(Mistake, match="no trained run"):
        huggingface.newest_run(tmp_path / "empty")


@pytest.mark.parametrize("broken", ["huggingface.save_file", "torch.save", "os.replace"])
def test_a_save_that_fails_leaves_the_one_before_and_no_litter(data_folder, tmp_path, monkeypatch, broken):
    tok = load_tokenizer(data_folder)
    save(tmp_path / "run", 1, small_model(tok), tok)

    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(broken, full)
        with pytest.raises(OSError, match="could not save .*No space left.*last good checkpoint is .*step_0000001"):
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
    path.write_bytes(whole[:int(len(whole) * share)])
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
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"}
                                                       | {"rope_scaling": rope}))
        with pytest.raises(ValueError, match="in config.json is not supported: only"):
            huggingface.load(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "intermediate_size"}))
    with pytest.raises(ValueError, match="does not say intermediate_size"):
        huggingface.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2' in config.json is not one of .*llama, qwen2, qwen3"):
        huggingface.load(folder)


def test_metrics_are_cut_back_to_the_step_and_a_half_written_line_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in range(6)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    checkpoint.cut_metrics(path, 4)
    assert path.read_text().splitlines() == lines[:4]
    checkpoint.cut_metrics(tmp_path / "none.jsonl", 4)  # a run that never wrote any
