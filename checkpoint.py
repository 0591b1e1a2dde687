"""Folders of weights: saving, resuming, and Hugging Face folders in and out.

A checkpoint is a Hugging Face folder, so other tools read it: config.json, safetensors (several files where they are
large), the tokenizer's files. state/ beside them holds what only training needs: the optimizer's state, as
torch.distributed.checkpoint writes it, and how the run was set up.

    out/toy/latest           the name of the newest checkpoint, such as step_0000300
    out/toy/step_0000300/     a checkpoint
    out/toy/metrics.jsonl    a line a step

Each is written under another name and renamed when complete: a run killed at any moment, or a disk that fills up,
leaves the previous checkpoint as it was. Every process reads and writes its own part, so a run goes on with another
number of processes, and none ever holds the whole model.

    python checkpoint.py verify FOLDER --trust_remote_code=true          # our logits beside those of the folder's own code
    python checkpoint.py export out/toy --to=FOLDER --dtype=bfloat16     # the weights alone, to publish

Not covered: quantized weights, pickled ones (pytorch_model.bin), scaled RoPE, biases beyond Qwen2's.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import json
import os
import pickle
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from attention_kernel import Spans
from configurator import Mistake, configure, out_of_memory
from diffusion import Recipe
from model import ModelConfig, Transformer, my_rows
from tokenizer import Tokenizer

FILE_BYTES = 5 * 10**9  # largest file of weights
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of every single process: it is what we want there

# our name for a size -> Hugging Face's
HF_NAMES = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
            "d_ff": "intermediate_size", "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
            "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# architecture or model_type in a config.json -> (whose layers it has, objective, shift, block_size); what config.json says
# under these names, as our own folders do, and what the user says come first
MODEL_TYPES = {
    "StableDiffcoderForCausalLM": ("llama", "block", False, 4),  # its model_type is llama
    "llama": ("llama", "ar", True, 1),  # Seed-Coder
    "qwen2": ("qwen2", "ar", True, 1),  # Qwen2.5-Coder
    "qwen3": ("qwen3", "ar", True, 1),
    "Dream": ("qwen2", "bidirectional", True, 1),  # Dream, DiffuCoder
    "CoDA": ("qwen3", "bidirectional", True, 1),
    "sdar": ("qwen3", "block", False, None),  # published with several block sizes
}


def to_hf_config(cfg, tok, recipe, dtype):
    """config.json of a model, as a dict: Hugging Face's keys, and ours for the objective."""
    model_type = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    return {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type,
            **{hf: getattr(cfg, ours) for ours, hf in HF_NAMES.items()},
            "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},  # transformers 5's rope_theta
            "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id, "mask_token_id": tok.mask_id,
            "objective": recipe.objective, "shift": recipe.shift, "block_size": recipe.block_size}


def family_of(hf):
    """The row of MODEL_TYPES of a config.json (a dict). Raises ValueError for a family we do not have."""
    for name in (*(hf.get("architectures") or ()), hf.get("model_type")):
        if name in MODEL_TYPES:
            return MODEL_TYPES[name]
    raise ValueError(f"model_type={hf.get('model_type')!r} is not one of {', '.join(MODEL_TYPES)}")


def from_hf_config(hf):
    """The ModelConfig that a config.json (a dict) describes. Raises ValueError for what we do not have."""
    layout = family_of(hf)[0]
    hf = {key: value for key, value in hf.items() if value is not None}
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" before transformers 4.43
    if kind != "default":
        raise ValueError(f"rope_type={kind!r} is not supported: only 'default' is")
    for key, allowed in {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": False,
                         "attention_bias": layout == "qwen2"}.items():
        if hf.get(key, allowed) != allowed:
            raise ValueError(f"{key}={hf[key]!r} in config.json is not supported: only {allowed!r} is")
    hf["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 1e4))
    if "num_attention_heads" in hf:
        hf.setdefault("num_key_value_heads", hf["num_attention_heads"])
        hf.setdefault("head_dim", hf.get("hidden_size", 0) // hf["num_attention_heads"])
    missing = [name for name in HF_NAMES.values() if not isinstance(hf.get(name), (int, float))]
    if missing:
        raise ValueError(f"config.json does not say {', '.join(missing)}, or not as a number")
    return ModelConfig(**{ours: hf[name] for ours, name in HF_NAMES.items()},
                       qkv_bias=layout == "qwen2", qk_norm=layout == "qwen3")


def recipe_of(hf, tok, objective=None, shift=None, block_size=None):
    """The Recipe of a folder: as asked for, else as its config.json says, else by its model_type.

    hf: config.json's dict. Another objective than the folder's takes nothing else from it. Raises ValueError, in a sentence,
    for what nobody says.
    """
    asked = {"objective": objective, "shift": shift, "block_size": block_size}
    told = dict(zip(asked, family_of(hf)[1:])) | {k: hf[k] for k in asked if hf.get(k) is not None}
    if objective not in (None, told["objective"]):
        told = {"objective": objective, "shift": None, "block_size": 1 if objective != "block" else None}
    found = told | {k: v for k, v in asked.items() if v is not None}
    if found["block_size"] is None:
        raise ValueError("objective='block' needs a block_size, which config.json does not say: give --block_size, such as 4")
    if found["objective"] != "ar" and tok.mask_id is None:
        raise ValueError(f"objective={found['objective']!r} needs a mask token, and the tokenizer in {tok.folder} names none: "
                         "say which with --mask_token")
    return Recipe(**found, mask_id=tok.mask_id)


def tensor_name(name):
    """Our parameter's name in a Hugging Face file: all but the head lie under `model.`."""
    return name if name.startswith("lm_head.") else "model." + name


def rank_and_size():
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


# --- writing ------------------------------------------------------------------------------------------------------

def write_json(path, value):
    """Write aside, then rename."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def write_model(folder, model, tok, recipe, dtype=torch.float32):
    """config.json, the weights in `dtype` and the tokenizer's files, into an existing folder. All processes take part."""
    folder = Path(folder)
    write_weights(folder, model, dtype)
    if rank_and_size()[0] == 0:
        write_json(folder / "config.json", to_hf_config(model.cfg, tok, recipe, dtype))
        tok.save(folder)


def write_weights(folder, model, dtype):
    """model.safetensors, or numbered files of at most FILE_BYTES and their index. The processes write a file each in turn."""
    rank, size = rank_and_size()
    weights = {tensor_name(n): p.detach() for n, p in model.named_parameters()}
    files, room = [], 0
    for name, p in weights.items():
        room -= p.numel() * dtype.itemsize
        if not files or room < 0:
            files.append([])
            room = FILE_BYTES - p.numel() * dtype.itemsize
        files[-1].append(name)
    titles = ["model.safetensors"] if len(files) == 1 else \
        [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]

    mine = {}
    for i, names in enumerate(files):
        for name in names:
            tensor = gathered(weights[name])
            if i % size == rank:
                mine[name] = tensor.to("cpu", dtype).contiguous()
        if i % size == size - 1 or i == len(files) - 1:  # each has its file: write them at the same time
            if mine:
                save_file(mine, folder / titles[i // size * size + rank], metadata={"format": "pt"})
            mine = {}
    if rank == 0 and len(files) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(p.numel() for p in weights.values()) * dtype.itemsize},
            "weight_map": {name: title for title, names in zip(titles, files) for name in names}})


def gathered(p):
    """The whole of a sharded tensor, on every process."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def save(run, step, model, optimizer, tok, recipe, settings, keep):
    """Checkpoint `step` of the run, then `latest`; of the older ones the newest `keep` - 1 stay. All processes take part.

    run: the run's folder. settings: a dict of JSON values, what the run was started with.
    Raises OSError, in a sentence, when it cannot be written; what was saved before is untouched.
    """
    run, name = Path(run), f"step_{step:07d}"
    aside, first = run / "saving.tmp", rank_and_size()[0] == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "state").mkdir(parents=True)
        together()
        write_model(aside, model, tok, recipe)
        alone = not dist.is_initialized()
        dcp.save(optimizer_state(model, optimizer), checkpoint_id=aside / "state" / "optimizer", no_dist=alone)
        if first:
            write_json(aside / "state" / "train.json", {"step": step, **settings})
        together()
        if first:
            discard(run / name)  # left by a run that was killed just before `latest` named it
            os.replace(aside, run / name)
            (run / "latest.tmp").write_text(name)
            os.replace(run / "latest.tmp", run / "latest")
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"could not save {run / name}: {reason(error)}; {last_good(run)}") from error
    for old in sorted(run.glob("step_*"))[:-keep] if first else []:
        discard(old)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # one key a tensor, named after its weight


def optimizer_state(model, optimizer):
    """{'state.layers.0.….exp_avg': tensor, …}: every process's own part of it."""
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def inner(error):
    """The error itself: torch.distributed.checkpoint wraps those of all processes into one."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def reason(error):
    """What went wrong, in a line."""
    return str(inner(error)).partition("\n")[0]


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
    """The checkpoint folder that `path` means: itself, the latest one of a run's folder, or a model's name on the Hub."""
    path = fetch(path)
    if (path / "latest").is_file():
        return path / (path / "latest").read_text().strip()
    if (path / "config.json").is_file():
        return path
    raise FileNotFoundError(f"no checkpoint in {path}: it has neither `latest` nor config.json; `bash demo.sh` trains two, "
                            "out/toy_ar and out/toy")


TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt"]


def fetch(name, files=(*TOKENIZER_FILES, "*.safetensors", "*.py")):  # *.py: the folder's own code, which only `verify` runs
    """A model of the Hub, such as 'ByteDance-Seed/Seed-Coder-8B-Base', as a local folder, kept for the next time.

    A path here stays what it is: what exists, what begins with a folder that does, and out/….
    """
    owner = str(name).partition("/")[0]
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) or owner == "out" or Path(owner).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # no network, no such model, no permission, a full disk: the library has a class for each
        first_line = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no folder here, and could not be had from the Hub ({type(error).__name__}: {first_line}); download "
            f"{', '.join(files)} of huggingface.co/{name} into a folder and name that one instead") from error


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
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def load(folder, device="cpu", dtype=torch.float32, mask_token="", **asked):
    """A checkpoint folder, or a model's name on the Hub, as (Transformer, Tokenizer, Recipe).

    dtype: of the weights held. asked: objective, shift, block_size where the user says them.
    Raises FileNotFoundError or ValueError, in a sentence, for a missing, damaged or foreign folder.
    """
    folder = find(folder)
    cfg, tok, recipe = describe(folder, mask_token, **asked)
    with torch.device("meta"):  # shapes alone
        model = Transformer(cfg)
    model.to(dtype).to_empty(device=device)
    load_weights(folder, model)
    return model, tok, recipe


def describe(folder, mask_token="", bos_token="", **asked):
    """What a folder says of itself, without its weights: (ModelConfig, Tokenizer, Recipe). See `load`."""
    hf = read_json(folder / "config.json")
    if "tie_word_embeddings" not in hf:  # CoDA's does not say, and has a head of its own
        hf["tie_word_embeddings"] = "lm_head.weight" not in weight_files(folder)
    cfg, tok = from_hf_config(hf), Tokenizer(folder, bos_token=bos_token, mask_token=mask_token)
    if tok.vocab_size > cfg.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {tok.vocab_size} ids, its model only {cfg.vocab_size}")
    return cfg, tok, recipe_of(hf, tok, **asked)


def weight_files(folder):
    """{tensor's name: the file it is in}. Raises FileNotFoundError or ValueError for a folder that is not whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        where = {name: folder / file for name, file in read_json(index).get("weight_map", {}).items()}
    else:
        path = folder / "model.safetensors"
        where = {"": path}
        if path.is_file():
            with opened(path) as f:
                where = dict.fromkeys(f.keys(), path)
    missing = sorted({path.name for path in where.values() if not path.is_file()})
    if missing:
        pickled = "; pytorch_model.bin is not read: transformers' save_pretrained writes safetensors"
        raise FileNotFoundError(f"{folder} is not a whole checkpoint: {', '.join(missing)} is missing"
                                + pickled * (folder / "pytorch_model.bin").is_file())
    return where


@contextmanager
def opened(path):
    """A safetensors file. Raises ValueError, in a sentence, for a damaged one."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except SafetensorError as error:
        older = f"; an older checkpoint may be in {path.parents[1]}" * (path.parents[1] / "latest").is_file()
        raise ValueError(f"{path} is damaged ({error}){older}") from error


@torch.no_grad()
def load_weights(folder, model):
    """Fill the model from a folder's safetensors: each process reads the rows it holds, one tensor at a time.

    The folder must have every weight, in its shape, and no others (but for a head beside tied embeddings).
    """
    folder = Path(folder)
    where = weight_files(folder)
    weights = {tensor_name(n): p for n, p in model.named_parameters()}
    wrong = set(weights) ^ set(where) - ({"lm_head.weight"} if model.cfg.tie_embeddings else set())
    if wrong:
        raise ValueError(f"{folder} does not fit its config.json: {min(wrong)} is "
                         f"{'missing' if min(wrong) in weights else 'unknown'}")
    for path in sorted(set(where.values())):
        with opened(path) as f:
            for name, p in weights.items():
                if where[name] != path:
                    continue
                part = f.get_slice(name)
                if part.get_shape() != list(p.shape):
                    raise ValueError(f"{folder} does not fit its config.json: {name} has shape {part.get_shape()}, "
                                     f"not {list(p.shape)}")
                mine, rows = my_rows(p)
                mine.copy_(part[rows])


def load_state(folder, model, optimizer):
    """The optimizer's state from state/, in place. Returns the dict `save` was given as settings, with `step`."""
    folder = find(folder)
    settings = read_json(folder / "state" / "train.json")
    path = folder / "state" / "optimizer"
    if not (path / ".metadata").is_file():
        raise FileNotFoundError(f"{folder} cannot be resumed: {path.name}/.metadata is missing")
    state = optimizer_state(model, optimizer)  # of the right shapes, to be read into
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (CheckpointException, RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        if isinstance(inner(error), dist.DistError):  # another process is gone: the checkpoint is as it was
            raise
        raise ValueError(f"{path} is damaged or of another optimizer: {reason(error)}") from error
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
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


# --- verify -------------------------------------------------------------------------------------

OWN_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")  # of auto_map, those verify loads
LIMITS = {"float32": 1e-4, "bfloat16": 0.1}  # largest difference of two logits / largest logit


def own_classes(hf):
    """{transformers' class: the class that replaces it} of a config.json with code of its own.

    A class is "modeling_dream.DreamModel", or "owner/repo--modeling_dream.DreamModel" where the
    code is another folder's on the Hub.
    """
    auto_map = hf.get("auto_map")
    if not isinstance(auto_map, dict):
        return {}
    return {name: auto_map[name] for name in OWN_CLASSES if isinstance(auto_map.get(name), str)}


def check_own_code(cfg):
    """Raise Mistake if verify would run a folder's own code without being asked to."""
    folder = find(cfg.folder)
    classes = own_classes(read_json(folder / "config.json"))
    if not classes or cfg.trust_remote_code:
        return
    files = {path.name for path in folder.glob("*.py")}
    for reference in classes.values():
        repo, dashes, local = reference.rpartition("--")
        file = local.partition(".")[0] + ".py"
        files.add(f"{file} of huggingface.co/{repo}" if dashes else file)
    raise Mistake(f"{folder} brings its own code, which verify would run: "
                  f"{', '.join(sorted(files))}; read it, then add --trust_remote_code=true")


@torch.no_grad()
def verify(cfg, model, tok, recipe):
    """Compare our logits with those of the folder's own code on two random texts.

    That code is run by `transformers`: the folder's where it brings some, else transformers' own.
    Both models see what the objective sees: the past, the whole text, or blocks of K tokens.
    Prints the difference and returns whether it is within LIMITS.
    Raises Mistake for what cannot be compared, and for any failure of the other code.
    """
    folder = find(cfg.folder)
    hf = read_json(folder / "config.json")
    if not 2 <= cfg.tokens <= model.cfg.context:
        raise Mistake(f"tokens={cfg.tokens} must be from 2 to the model's context of "
                      f"{model.cfg.context}")
    if hf.get("model_type") in ("Dream", "CoDA") and recipe.objective != "bidirectional":
        raise Mistake(f"the code of a {hf['model_type']} folder sees the whole text: "
                      f"objective={recipe.objective!r} is not what it does")

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(tok.vocab_size, (2, cfg.tokens), generator=generator)  # (2, T)
    spans = spans_of(recipe, tokens)
    ours = model.logits(model(tokens, spans))  # (2, T, vocab)
    theirs, name, version = their_logits(cfg, folder, hf, tokens, spans.dense_mask())

    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    limit = LIMITS[cfg.dtype]
    print(f"{folder}: {name} in {cfg.dtype}, {recipe.objective}, {version}; largest difference of "
          f"two logits {error:.1e} of the largest logit (limit {limit:.0e}), the same first choice "
          f"at {same:.1%} of the tokens")
    if error <= limit:
        return True
    if other_version(hf):
        print(f"config.json was written by another transformers: {other_version(hf)}")
    return False


def spans_of(recipe, tokens):
    """The attention of the objective over texts (B, T) without noise."""
    block_size = {"ar": 1, "ar_diffusion": 1, "bidirectional": None, "block": recipe.block_size}
    start = torch.zeros(tokens.shape, dtype=torch.int32)
    return Spans.of(start, start + tokens.shape[1], block_size[recipe.objective])


def their_logits(cfg, folder, hf, tokens, sees):
    """The folder's logits for tokens (B, T) as transformers computes them.

    sees: (B, T, T) bool, who attends to whom.
    Returns ((B, T, vocab) float32, the class' name, the version in words). Raises Mistake if it
    fails.
    """
    try:
        import transformers
    except ImportError as error:
        raise Mistake(f"verify runs transformers, which cannot be imported ({first_line(error)}); "
                      "`pip install transformers`") from error
    try:
        theirs = load_theirs(cfg, folder, hf)
        version = f"transformers {transformers.__version__}"
        if untie(theirs, folder, hf):
            version += ", which tied its head to its embedding and was given the file's"
        output = theirs(tokens, use_cache=False, **their_mask(hf, sees, theirs.dtype))
        logits = (output[0] if isinstance(output, tuple) else output.logits).float()
        if logits.shape[:2] != tokens.shape:
            raise ValueError(f"its logits have shape {tuple(logits.shape)}")
    except Exception as error:  # code of other people's: anything can be raised
        if out_of_memory(type(error), error):
            raise
        raise Mistake(failure(folder, hf, error)) from error
    return logits, type(theirs).__name__, version


def load_theirs(cfg, folder, hf):
    """The folder's model, loaded by transformers.

    Attention is eager, the one kind that every class has: CoDA's refuses SDPA under some versions.
    """
    import transformers
    classes = own_classes(hf)
    loader = transformers.AutoModelForCausalLM
    if classes and "AutoModelForCausalLM" not in classes:
        loader = transformers.AutoModel
    keyword = "dtype" if major_minor(transformers.__version__) >= (4, 56) else "torch_dtype"
    options = {keyword: getattr(torch, cfg.dtype), "attn_implementation": "eager"}
    own_code = bool(classes) and cfg.trust_remote_code
    return loader.from_pretrained(str(folder), trust_remote_code=own_code, **options).eval()


def untie(theirs, folder, hf):
    """Give a model the head of the folder's file if it tied its head to its embedding instead.

    Returns whether it had to. CoDA's config.json does not say `tie_word_embeddings`, the default of
    its code is to tie, and transformers 4.54 to 4.57 do so although the file has a head.
    """
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    in_files = weight_files(folder)
    if head is not embedding or hf.get("tie_word_embeddings") or "lm_head.weight" not in in_files:
        return False
    with opened(in_files["lm_head.weight"]) as f:
        tensor = f.get_tensor("lm_head.weight").to(head.dtype)
    theirs.lm_head.weight = torch.nn.Parameter(tensor)
    return True


def their_mask(hf, sees, dtype):
    """What the other model's forward() wants as attention_mask, as a dict of arguments.

    sees: (B, T, T) bool. dtype: of that model's weights.
    """
    if hf.get("model_type") in ("Dream", "CoDA"):  # every token sees the whole text
        return {}
    if hf.get("model_type") == "sdar":  # takes a mask of true and false
        return {"attention_mask": sees[:, None]}  # (B, 1, T, T)
    # transformers' own classes add the mask to the scores
    mask = torch.zeros(sees.shape, dtype=dtype)
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None]}  # (B, 1, T, T)


def failure(folder, hf, error):
    """What went wrong in other people's code, and which transformers to try, in a sentence."""
    import transformers
    whose = "its own code" if own_classes(hf) else "transformers' code for it"
    said = (f"{folder}: {whose} failed under transformers {transformers.__version__} "
            f"({type(error).__name__}: {first_line(error)})")
    if other_version(hf):
        return f"{said}; its config.json was written by another: {other_version(hf)}"
    return f"{said}; its config.json names no other version to try"


def other_version(hf):
    """What to install if config.json was written by another transformers than the installed one.

    Returns '' where it was not, or does not say. Patch releases count as the same version.
    """
    import transformers
    wanted = major_minor(hf.get("transformers_version"))
    if wanted is None or wanted == major_minor(transformers.__version__):
        return ""
    return (f"`pip install \"transformers=={wanted[0]}.{wanted[1]}.*\"` into an environment of its "
            "own and verify there")


def major_minor(version):
    """(4, 57) of '4.57.6'; None of what is no version."""
    match = re.match(r"(\d+)\.(\d+)", str(version))
    return (int(match[1]), int(match[2])) if match else None


def first_line(error):
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]


# --- the command line ---------------------------------------------------------------------------------------------

@dataclass
class Config:
    folder: str = ""  # a run, a checkpoint, or a model's name on the Hub: the word after the command
    to: str = ""  # export: the folder to write
    dtype: Literal["float32", "bfloat16"] = "float32"  # export: of the weights written; verify: of both models
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] | None = None  # none: as the folder says
    shift: bool | None = None  # none: as the folder says
    block_size: int | None = None  # K; none: as the folder says
    mask_token: str = ""  # the mask's name, where the folder does not say
    tokens: int = 64  # verify: length of the random texts
    trust_remote_code: bool = False  # verify: run the Python files that the folder brings


def export(cfg, model, tok, recipe):
    """The weights, config.json and tokenizer of a checkpoint in a folder of their own, without the training's state."""
    if not cfg.to or Path(cfg.to).exists():
        raise ValueError(f"to={cfg.to!r} must name a folder that does not exist yet: --to=FOLDER")
    aside = Path(f"{Path(cfg.to)}.tmp")  # a Path has no / at its end
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_model(aside, model, tok, recipe, getattr(torch, cfg.dtype))
    os.replace(aside, cfg.to)
    print(f"{cfg.to}: {sum(p.numel() for p in model.parameters()):,} weights in {cfg.dtype}, "
          f"{sum(p.stat().st_size for p in Path(cfg.to).iterdir()):,} bytes")


def main():
    commands = {"verify": verify, "export": export}
    words = sys.argv[1:] or ["--help"]
    if {"-h", "--help"} & set(words) or words[0] not in commands or len(words) < 2 or words[1].startswith("--"):
        configure(Config, ["--help"] if {"-h", "--help"} & set(words) else [], "verify|export FOLDER")
        raise ValueError(f"{' '.join(words)!r} is not whole: `python checkpoint.py verify FOLDER` and "
                         "`python checkpoint.py export FOLDER --to=FOLDER` are")
    cfg, _ = configure(Config, [f"--folder={words[1]}", *words[2:]])
    if words[0] == "verify":
        check_own_code(cfg)  # before the weights are loaded, which takes minutes
    dtype = torch.float32 if words[0] == "export" else getattr(torch, cfg.dtype)
    loaded = load(cfg.folder, "cpu", dtype, cfg.mask_token, objective=cfg.objective, shift=cfg.shift, block_size=cfg.block_size)
    sys.exit(0 if commands[words[0]](cfg, *loaded) in (None, True) else 1)


if __name__ == "__main__":
    main()
