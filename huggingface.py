"""Folders of weights as Hugging Face has them, ours and other people's.

A checkpoint is such a folder, so other tools read it: config.json, safetensors (several files
where they are large), the tokenizer's files. `load` reads one, from a run, from a path or from the
Hub; `export` writes one; `verify` compares our logits with those of the folder's own code.

    out/toy/latest           the name of the newest checkpoint, such as step_0000300
    out/toy/step_0000300/    a checkpoint; its state/ is the concern of checkpoint.py

    python huggingface.py verify FOLDER
    python huggingface.py export out/toy --to=FOLDER --dtype=bfloat16   # weights alone, to publish

What may be opened from strangers: any folder, here and in sample.py and with --init_from. JSON and
safetensors hold no code, what they say is checked before memory is taken for it, names of files
cannot lead out of the folder, and a chat template runs in a sandbox with limits (tokenizer.py).
Only `verify` runs a folder's own Python: use it on code that you have read.

Not covered: quantized or pickled weights (pytorch_model.bin), scaled RoPE, biases beyond Qwen2's.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, normalizers

from configurator import Int, Mistake, Name, configure, shortened
from families import ASKED, from_hf_config, recipe_of, to_hf_config
from files import fresh_folder, move_folder, read_json, read_text, sync, umask, write_json
from model import Transformer
from tokenizer import MAX_IDS, Tokenizer, cut_at

FILE_BYTES = 5 * 10**9  # largest file of weights


# --- the tokenizer's files ------------------------------------------------------------------------

# How Qwen2 and its descendants cut text, for those folders that have no tokenizer.json to say so.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def load_tokenizer(folder, bos_token="", mask_token="", add_fim=False):
    """The Tokenizer of a folder, or of the tokenizer.json in it.

    bos_token, mask_token: names to use instead of the folder's; add_fim: see Tokenizer.
    Raises Mistake for files that are missing, damaged or of an unknown kind.
    """
    path = Path(folder)
    if path.suffix == ".jsonl":  # samples, of which the model's tokenizer makes tokens
        raise Mistake(f"{path} has no tokenizer: name the model to fine-tune with "
                      "--init_from=FOLDER")
    if path.suffix != ".json":
        path = path / "tokenizer.json"
    folder = path.parent
    if not path.is_file() and not (folder / "vocab.json").is_file():
        raise Mistake(f"no tokenizer at {path}: the data is not prepared; "
                      "`python -m data.stdlib.prepare` prepares data/stdlib")
    config = tokenizer_config(folder)
    text = read_text(path) if path.is_file() else from_merges(folder, config)
    if config.pop("auto_map", None) or not path.is_file() or not config:
        # transformers' class for a tokenizer.json alone
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["clean_up_tokenization_spaces"] = False
    template = folder / "chat_template.jinja"
    return Tokenizer(text, config, read_text(template) if template.is_file() else None,
                     bos_token, mask_token, read_if_there(folder / "config.json"), folder,
                     read_if_there(folder / "generation_config.json"), add_fim)


def read_if_there(path):
    """The dict in a JSON file; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def tokenizer_config(folder):
    """tokenizer_config.json as a dict, its special tokens as names alone."""
    config = read_if_there(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # only then does transformers read the older file too
        config |= read_if_there(folder / "special_tokens_map.json")
    for key, token in config.items():
        if isinstance(token, dict) and "content" in token:
            config[key] = token["content"]  # tokenizer.json has the rest
    return config


def from_merges(folder, config):
    """The text of the tokenizer.json that a folder of vocab.json and merges.txt (Dream's) lacks.

    config: tokenizer_config.json's dict; its tokenizer_class must be one that cuts at QWEN_SPLIT.
    """
    kind, added = config.get("tokenizer_class"), config.get("added_tokens_decoder")
    if not added or not str(kind).startswith(("Qwen2", "Dream")):
        raise Mistake(f"{folder} has only a vocab.json, of the class {kind}: without "
                      "tokenizer.json only Qwen2's and Dream's with an added_tokens_decoder are "
                      "known; transformers' AutoTokenizer and its save_pretrained write the file")
    try:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"),
                                             str(folder / "merges.txt"))
        highest = max([0, *vocab.values(), *map(int, added)])
        if highest >= MAX_IDS:  # the library's memory grows with the gaps between ids
            raise Mistake(f"{folder} has a token with id {highest}: ids are below {MAX_IDS:,} here")
        hf = tokenizers.Tokenizer(models.BPE(vocab, merges))
        hf.normalizer = normalizers.NFC()
        hf.pre_tokenizer = cut_at(QWEN_SPLIT)
        hf.decoder = decoders.ByteLevel()
        for i, token in sorted(added.items(), key=lambda item: int(item[0])):
            hf.add_tokens([AddedToken(**token)])
            if hf.token_to_id(token["content"]) != int(i):
                raise Mistake(f"{token['content']} in {folder} cannot have id {i}: "
                              "there are ids below it that nothing has")
    except Mistake:
        raise
    except Exception as error:  # the library raises bare Exception; `added` may hold anything
        raise Mistake(f"{folder} has no readable vocab.json, merges.txt and added_tokens_decoder "
                      f"in place of tokenizer.json: {error}") from error
    return hf.to_str(pretty=True)


# --- finding a folder -----------------------------------------------------------------------------

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.py")  # *.py: own code, which `verify` may run


def find(path):
    """The checkpoint folder that `path` means.

    path: that folder, a run's folder (its latest one is meant), or a model's name on the Hub.
    Raises Mistake where there is none.
    """
    path = fetch(path)
    if os.path.lexists(path / "latest"):
        return latest_of(path)
    if (path / "config.json").is_file():
        return path
    why = f"no checkpoint in {path}: it has neither `latest` nor config.json"
    if list(path.glob("step_*")):
        raise Mistake(f"{why}; {steps_in_words(path)}")
    raise Mistake(f"{why}; `bash demo.sh` trains some, and assets/toy has one")


def latest_of(run):
    """The folder that a run's `latest` names. Raises Mistake where it names none."""
    name = None
    for _ in range(5):  # a run in progress may save and remove a checkpoint in between
        before = name
        try:
            name = read_text(run / "latest").strip()
        except Mistake as error:
            raise Mistake(f"{error}; {steps_in_words(run)}") from error
        if is_plain(name) and (run / name).is_dir():
            return run / name
        if name == before:
            break
    raise Mistake(f"{run / 'latest'} names {shortened(name)}, which is not a folder in {run}; "
                  f"{steps_in_words(run)}")


def is_plain(name):
    """Whether a name found in a file is that of a file in the folder, and leads nowhere else."""
    return (isinstance(name, str) and name not in ("", ".", "..")
            and not re.search(r"[/\\:\0]", name))


def steps_in_words(run):
    """What can be named instead of the run, for messages."""
    steps = [p.name for p in Path(run).glob("step_*") if p.is_dir()]
    if not steps:
        return f"there is no step_* folder in {run}"
    return f"name one of its folders instead: {', '.join(str(run / s) for s in sorted(steps))}"


def fetch(name, files=MODEL_FILES):
    """A model of the Hub, such as 'ByteDance-Seed/Seed-Coder-8B-Base', as a local folder.

    It is kept for the next time. Any path stays what it is: what exists, what begins with a folder
    that does, and out/….
    """
    owner = str(name).partition("/")[0]
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)) or owner == "out" or Path(owner).exists():
        return Path(name)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # no network, no such model, no permission: a class for each
        first_line = str(error).strip().partition("\n")[0]
        raise Mistake(
            f"{name} is not a local folder and could not be downloaded from the Hub "
            f"({type(error).__name__}: {first_line}); download {', '.join(files)} of "
            f"huggingface.co/{name} into a folder and name that one instead") from error


BOX = Path(__file__).parent / "assets" / "toy"  # the weights that come with the repository


def newest_run(out="out"):
    """The run under `out` that saved last; where there is none, the weights in the box."""
    latest = sorted(Path(out).glob("*/latest"), key=lambda p: p.lstat().st_mtime)
    if latest:
        return latest[-1].parent
    if (BOX / "config.json").is_file():
        return BOX
    raise Mistake(f"no trained run in {out}/: `bash demo.sh` trains some, or name one with "
                  "--init_from=FOLDER")


# --- reading --------------------------------------------------------------------------------------

def load(folder, device="cpu", dtype=torch.float32, mask_token="", **asked):
    """A checkpoint folder, a run or a model's name on the Hub as (Transformer, Tokenizer, Recipe).

    dtype: of the weights held. asked: objective, shift, block_size where the user says them.
    The folder that was read is the tokenizer's `folder`. Raises Mistake for a missing, damaged or
    foreign folder. A run may be training: if it removes the checkpoint, the next one is read.
    """
    for _ in range(5):
        place = find(folder)
        try:
            return load_folder(place, device, dtype, mask_token, asked)
        except (Mistake, OSError):
            if place.is_dir() or place == Path(folder):
                raise
    raise Mistake(f"the checkpoints of {folder} are removed faster than they can be read: copy "
                  "one and name the copy")


def load_folder(folder, device, dtype, mask_token, asked):
    """See `load`. Memory is taken after everything has been checked."""
    cfg, tok, recipe = read_description(folder, mask_token, **asked)
    check_weights(folder, cfg)
    with torch.device("meta"):  # shapes alone
        model = Transformer(cfg)
    # not model.to_empty(): of a meta tensor, that imports sympy for 0.5 s
    memory = {name: torch.empty(p.shape, dtype=dtype, device=device)
              for name, p in model.named_parameters()}
    model.load_state_dict(memory, assign=True)
    load_weights(folder, model)
    return model, tok, recipe


def read_description(folder, mask_token="", bos_token="", add_fim=False, **asked):
    """What a folder says of itself, without its weights: (ModelConfig, Tokenizer, Recipe).

    See `load`. Raises Mistake.
    """
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    if "tie_word_embeddings" not in hf:  # CoDA's does not say, and has a head of its own
        hf["tie_word_embeddings"] = "lm_head.weight" not in weight_files(folder)
    cfg = from_hf_config(hf)
    tok = load_tokenizer(folder, bos_token, mask_token, add_fim)
    if tok.vocab_size > cfg.vocab_size:
        wanted = ""
        if add_fim:
            wanted = ("; fim_rate may have added three tokens: train that model with a fim_rate, "
                      "or with a --vocab_size that leaves room for them")
        raise Mistake(f"{folder}: its tokenizer has {tok.vocab_size} ids, its model only "
                      f"{cfg.vocab_size}{wanted}")
    return cfg, tok, recipe_of(hf, tok, **asked)


def tensor_name(name):
    """Our parameter's name in a Hugging Face file: all but the head lie under `model.`."""
    return name if name.startswith("lm_head.") else "model." + name


def weight_files(folder):
    """{tensor's name: the file it is in}. Raises Mistake for an incomplete folder."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(map(is_plain, file_of.values())):
            raise Mistake(f"{index} is damaged: weight_map must give each tensor the name of a "
                          "file in the same folder")
    else:
        file_of = {"": "model.safetensors"}
    missing = sorted({file for file in file_of.values() if not (folder / file).is_file()})
    if missing:
        pickled = ""
        if (folder / "pytorch_model.bin").is_file():
            pickled = ("; pytorch_model.bin is not read: transformers' save_pretrained writes "
                       "safetensors")
        raise Mistake(f"{folder} is incomplete: {', '.join(missing[:5])} is missing{pickled}")
    if not index.is_file():
        with opened(folder / "model.safetensors") as f:
            file_of = dict.fromkeys(f.keys(), "model.safetensors")
    return {name: folder / file for name, file in file_of.items()}


@contextmanager
def opened(path):
    """A safetensors file. Raises Mistake for a damaged one."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except SafetensorError as error:
        older = ""
        if (path.parents[1] / "latest").is_file():
            older = f"; an older checkpoint may be in {path.parents[1]}"
        raise Mistake(f"{path} is damaged ({error}){older}") from error


def check_weights(folder, cfg):
    """Compare the files' headers with config.json: every weight of a model of `cfg`, in its shape.

    Any other tensor is an error, except lm_head.weight where embeddings are tied. Takes no memory:
    call it before a model is allocated. Raises Mistake. Returns {tensor's name: its file}.
    """
    where = weight_files(folder)
    layers = {name.split(".")[2] for name in where if name.startswith("model.layers.")}
    if cfg.n_layer > len(layers):  # before a model of 10^12 layers is outlined
        raise unfit(folder, f"model.layers.{len(layers)}.input_layernorm.weight is missing")
    with torch.device("meta"):
        model = Transformer(cfg)
    shapes = {tensor_name(name): list(p.shape) for name, p in model.named_parameters()}
    if cfg.tie_embeddings:
        where.pop("lm_head.weight", None)
    wrong = sorted(shapes.keys() ^ where.keys())
    if wrong:
        raise unfit(folder, f"{wrong[0]} is {'missing' if wrong[0] in shapes else 'unknown'}")
    for path in sorted(set(where.values())):
        with opened(path) as f:
            for name in (n for n in shapes if where[n] == path):
                part = f.get_slice(name)
                if part.get_shape() != shapes[name]:
                    raise unfit(folder, f"{name} has shape {part.get_shape()}, not {shapes[name]}")
                if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
                    raise Mistake(f"{folder} has quantized weights, which are not read: {name} "
                                  f"is {part.get_dtype()}")
    return where


def unfit(folder, why):
    return Mistake(f"{folder} does not fit its config.json: {why}")


def held_whole(p):
    """A weight as this process holds it: (tensor, slice of the rows it has), here all of them."""
    return p, slice(0, p.shape[0])


@torch.no_grad()
def load_weights(folder, model, held=held_whole):
    """Fill a model from a folder's safetensors, one tensor at a time.

    held: what part of a weight this process holds, as (local tensor, slice of rows); of a sharded
    model parallel.my_rows: each process then reads its own rows. Raises Mistake; see check_weights.
    """
    where = check_weights(folder, model.cfg)
    for path in sorted(set(where.values())):
        with opened(path) as f:
            for name, p in model.named_parameters():
                if where[tensor_name(name)] == path:
                    mine, rows = held(p)
                    mine.copy_(f.get_slice(tensor_name(name))[rows])


# --- writing --------------------------------------------------------------------------------------

def itself(p):
    return p


def write_model(folder, model, tok, recipe, dtype=torch.float32, rank=0, size=1, whole=itself):
    """config.json, the weights in `dtype` and the tokenizer's files, into an existing folder.

    generation_config.json names the stop ids, for us and for others.
    rank, size, whole: see write_weights. All processes take part.
    """
    folder = Path(folder)
    weights = {tensor_name(name): p.detach() for name, p in model.named_parameters()}
    write_weights(folder, weights, dtype, rank, size, whole)
    if rank == 0:
        config = to_hf_config(model.cfg, tok, recipe, dtype) | {"fim_trained": tok.fim_trained}
        write_json(folder / "config.json", config)
        ends = {"bos_token_id": tok.bos_id, "eos_token_id": sorted(tok.stop_ids) or None,
                "pad_token_id": tok.pad_id}
        write_json(folder / "generation_config.json", ends)
        tok.save(folder)


def write_weights(folder, weights, dtype, rank=0, size=1, whole=itself):
    """model.safetensors, or numbered files of at most FILE_BYTES and their index.

    weights: {name: tensor}. Process `rank` of `size` writes every size-th file; at most `size`
    files are in memory at a time, one in each. whole(p): all of a sharded tensor, on every process.
    """
    folder = Path(folder)
    groups = group_by_size(weights, dtype)
    titles = ["model.safetensors"]
    if len(groups) > 1:
        titles = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for first in range(0, len(groups), size):  # a file for each process, written at the same time
        mine = {}
        for i, names in enumerate(groups[first:first + size]):
            for name in names:
                tensor = whole(weights[name])
                if i == rank:
                    mine[name] = tensor.to("cpu", dtype).contiguous()
        if mine:
            path = folder / titles[first + rank]
            save_file(mine, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~umask())  # the library makes it private
            sync(path)
    if rank == 0 and len(groups) > 1:
        weight_map = {name: title for title, names in zip(titles, groups) for name in names}
        total = sum(p.numel() for p in weights.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def group_by_size(weights, dtype):
    """The tensors' names, as lists of neighbors that make at most FILE_BYTES each."""
    groups, room = [], 0
    for name, p in weights.items():
        room -= p.numel() * dtype.itemsize
        if not groups or room < 0:
            groups.append([])
            room = FILE_BYTES - p.numel() * dtype.itemsize
        groups[-1].append(name)
    return groups


# --- the command line -----------------------------------------------------------------------------

@dataclass
class Config:
    folder: Name = "out"  # a run, a checkpoint, or a name on the Hub: the word after the command
    to: str = ""  # export: the folder to write
    dtype: Literal["float32", "bfloat16"] = "float32"  # export: of the weights; verify: of both
    objective: ASKED["objective"] | None = None  # none: as the folder says
    shift: bool | None = None  # none: as the folder says
    block_size: ASKED["block_size"] | None = None  # K; none: as the folder says
    mask_token: str = ""  # the mask's name, where the folder does not say
    tokens: Int(2, 2**20) = 64  # verify: length of the random texts
    trust_remote_code: bool = False  # verify: run the Python files that the folder brings


def export(cfg, model, tok, recipe):
    """The weights, config.json and tokenizer of a checkpoint in a folder of their own.

    The training's state stays behind. Raises Mistake where `to` exists, OSError where it cannot be
    written; nothing is left behind then.
    """
    to = Path(cfg.to)
    if not cfg.to or os.path.lexists(to):
        raise Mistake(f"to={cfg.to!r} must name a folder that does not exist yet: --to=FOLDER")
    aside = fresh_folder(to)
    try:
        write_model(aside, model, tok, recipe, getattr(torch, cfg.dtype))
        move_folder(aside, to)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            first_line = str(error).partition("\n")[0]
            raise OSError(f"could not write {to}: {first_line}; nothing was kept") from error
        raise
    size = sum(p.stat().st_size for p in to.iterdir())
    print(f"{to}: {sum(p.numel() for p in model.parameters()):,} weights in {cfg.dtype}, "
          f"{size:,} bytes")


def main(argv=None):
    """`verify FOLDER`, with exit status 1 for a difference, or `export FOLDER --to=FOLDER`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or "--help" in words or "-h" in words:
        configure(Config, ["--help"], "verify|export FOLDER")
    if words[0] not in ("verify", "export") or len(words) < 2 or words[1].startswith("--"):
        raise Mistake(f"{' '.join(words)!r} is incomplete: `python huggingface.py verify FOLDER` "
                      "and `python huggingface.py export FOLDER --to=FOLDER` are the commands")
    cfg, _ = configure(Config, [f"--folder={words[1]}", *words[2:]])
    asked = {"objective": cfg.objective, "shift": cfg.shift, "block_size": cfg.block_size}
    if words[0] == "export":
        export(cfg, *load(cfg.folder, "cpu", torch.float32, cfg.mask_token, **asked))
        return 0
    from verify import check_own_code, verify  # here, since it needs this file
    check_own_code(cfg)  # before the weights are loaded, which takes minutes
    loaded = load(cfg.folder, "cpu", getattr(torch, cfg.dtype), cfg.mask_token, **asked)
    return 0 if verify(cfg, *loaded) else 1


if __name__ == "__main__":
    sys.exit(main())
