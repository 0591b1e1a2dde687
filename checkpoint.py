"""Folders of weights: saving, resuming, finding the newest.

A checkpoint is a Hugging Face folder, so other tools read it: config.json, model.safetensors, tokenizer.json,
tokenizer_config.json. state/ beside them holds what only training needs: the optimizer and how the run was set up.

    out/toy/latest           the name of the newest checkpoint, such as step_0000300
    out/toy/step_0000300/     a checkpoint
    out/toy/metrics.jsonl    a line a step

Each is written under another name and renamed when complete: a run killed at any moment, or a disk that fills up,
leaves the previous checkpoint as it was.

Not covered: sharded training states.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import ModelConfig, Transformer
from tokenizer import Tokenizer

# our name for a size -> Hugging Face's
HF_NAMES = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
            "d_ff": "intermediate_size", "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
            "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What decoding needs to know, kept in config.json; a folder that does not say is a plain autoregressive model.
DIFFUSION_KEYS = {"objective": "ar", "shift": True, "block_size": 1}


def to_hf_config(cfg, tok, recipe):
    """config.json of a model, as a dict: Hugging Face's keys, and ours for the objective."""
    model_type = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    return {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type,
            **{hf: getattr(cfg, ours) for ours, hf in HF_NAMES.items()},
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},  # transformers 5's rope_theta
            "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "float32",
            "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id,
            "mask_token_id": tok.mask_id, **{k: getattr(recipe, k) for k in DIFFUSION_KEYS}}


def from_hf_config(hf):
    """The ModelConfig that a config.json (a dict) describes. Raises ValueError for a family we do not have."""
    if hf.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"model_type={hf.get('model_type')!r} is not one of {', '.join(ARCHITECTURES)}")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if kind != "default":
        raise ValueError(f"rope_type={kind!r} is not supported: only 'default' is")
    hf = {"rope_theta": rope.get("rope_theta", 1e4), "tie_word_embeddings": False, **hf}
    hf = {"num_key_value_heads": hf.get("num_attention_heads"), **hf}
    if hf.get("head_dim") is None and "hidden_size" in hf and "num_attention_heads" in hf:
        hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
    missing = [name for name in HF_NAMES.values() if hf.get(name) is None]
    if missing:
        raise ValueError(f"config.json does not say {', '.join(missing)}")
    return ModelConfig(**{ours: hf[name] for ours, name in HF_NAMES.items()},
                       qkv_bias=hf["model_type"] == "qwen2", qk_norm=hf["model_type"] == "qwen3")


def tensor_name(name):
    """Our parameter's name in a Hugging Face file: all but the head lie under `model.`."""
    return name if name.startswith("lm_head.") else "model." + name


# --- writing ------------------------------------------------------------------------------------------------------

def write_json(path, value):
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def write_model(folder, model, tok, recipe):
    """config.json, model.safetensors and the tokenizer's files, into an existing folder."""
    folder = Path(folder)
    write_json(folder / "config.json", to_hf_config(model.cfg, tok, recipe))
    tied = {"lm_head.weight"} if model.cfg.tie_embeddings else set()
    tensors = {tensor_name(n): t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tok.json, encoding="utf-8")
    names = {"bos_token": tok.bos_id, "eos_token": tok.eos_id, "mask_token": tok.mask_id, "pad_token": tok.pad_id}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **{name: tok.hf.id_to_token(i) for name, i in names.items() if i is not None}})


def save(run, step, model, optimizer, tok, recipe, settings, keep):
    """Checkpoint `step` of the run, then `latest`; of the older ones the newest `keep` - 1 stay.

    run: the run's folder. settings: a dict of JSON values, what the run was started with.
    Raises OSError, in a sentence, when it cannot be written; what was saved before is untouched.
    """
    run, name = Path(run), f"step_{step:07d}"
    aside = run / "saving.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "state").mkdir(parents=True)
        write_model(aside, model, tok, recipe)
        torch.save(optimizer.state_dict(), aside / "state" / "optimizer.pt")
        write_json(aside / "state" / "train.json", {"step": step, **settings})
        discard(run / name)  # left by a run that was killed just before `latest` named it
        os.replace(aside, run / name)
        (run / "latest.tmp").write_text(name)
        os.replace(run / "latest.tmp", run / "latest")
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save has RuntimeError for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"could not save {run / name}: {error}; {last_good(run)}") from error
    for old in sorted(run.glob("step_*"))[:-keep]:
        discard(old)


def discard(folder):
    """Remove a checkpoint, renamed first, so that a kill in between leaves nothing that looks like one."""
    aside = folder.with_name("discarded.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.replace(folder, aside)
        shutil.rmtree(aside)


def last_good(run):
    """'the last good checkpoint is …', for messages of things that went wrong."""
    latest = Path(run) / "latest"
    return f"the last good checkpoint is {latest.parent / latest.read_text()}" if latest.is_file() else \
        "no checkpoint had been saved yet"


# --- reading ------------------------------------------------------------------------------------------------------

def find(path):
    """The checkpoint folder that `path` means: itself, or the latest one of a run's folder."""
    path = Path(path)
    if (path / "latest").is_file():
        return path / (path / "latest").read_text().strip()
    if (path / "config.json").is_file():
        return path
    raise FileNotFoundError(f"no checkpoint in {path}: it has neither `latest` nor config.json; "
                            "`python train.py config/toy_ar.py` trains one in out/toy_ar")


def newest_run(out="out"):
    """The run under `out` that saved last."""
    latest = sorted(Path(out).glob("*/latest"), key=lambda p: p.stat().st_mtime)
    if not latest:
        raise FileNotFoundError(f"no trained run in {out}/: `bash demo.sh` trains two, or name one with --init_from=FOLDER")
    return latest[-1].parent


def read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a whole checkpoint: {path.name} is missing")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load(folder, device="cpu"):
    """A checkpoint folder as (model, tokenizer, config): a Transformer in float32, a Tokenizer, config.json's dict.

    Raises FileNotFoundError or ValueError, in a sentence, for a missing, damaged or foreign folder.
    """
    folder = find(folder)
    hf = read_json(folder / "config.json")
    tok = Tokenizer(folder)
    model = Transformer(from_hf_config(hf))
    if tok.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {tok.vocab_size} ids, its model only {model.cfg.vocab_size}")
    load_weights(folder / "model.safetensors", model)
    return model.to(device), tok, {**DIFFUSION_KEYS, **hf}


def load_weights(path, model):
    """Copy the file's tensors into the model, which must have them all, in these shapes, and no others."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a whole checkpoint: {path.name} is missing")
    ours = {tensor_name(n): p for n, p in model.named_parameters()}  # named_parameters lists tied weights once
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            names = set(f.keys())
            wrong = set(ours) ^ names | {n for n in set(ours) & names
                                         if f.get_slice(n).get_shape() != list(ours[n].shape)}
            if wrong:
                raise ValueError(f"{path} does not fit its config.json: {min(wrong)} is missing, "
                                 "unknown or of another shape")
            for name, p in ours.items():
                p.copy_(f.get_tensor(name))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); an older checkpoint may be in {path.parents[1]}") from error


def load_state(folder, optimizer):
    """The optimizer's state from state/, in place. Returns the dict `save` was given as settings, with `step`."""
    folder = find(folder)
    settings = read_json(folder / "state" / "train.json")
    path = folder / "state" / "optimizer.pt"
    try:
        optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} cannot be resumed: {path.name} is missing") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another model: {error}") from error
    return settings


def cut_metrics(path, step):
    """Drop the lines of metrics.jsonl from `step` on: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # the run was killed while writing it
            continue
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(kept))
    os.replace(aside, path)
