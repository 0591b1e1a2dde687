"""Hugging Face folders in and out.

Written by transformers, read here and written back, not a bit changes, and both give the same
logits. A folder says what it is; what it does not say is asked for by name. Whatever stands in its
files, it is read or refused with a one-line message.
"""

import fnmatch
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tokenizers
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

import families
import huggingface
import sample
import train
from configurator import Mistake
from decode import completion
from huggingface import load_tokenizer
from spans import Spans

transformers = pytest.importorskip("transformers")
AutoModelForCausalLM, AutoTokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
pytestmark = pytest.mark.filterwarnings(
    "ignore:`rope_scaling` is deprecated"
)  # as the published folders have it

FAMILIES = ["llama", "qwen2", "qwen3"]
QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
]  # special tokens: id 0 is eos and pad, there is no bos
SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Two float32 programs add the same numbers in another order: 1e-6 of the largest logit was seen.
# One query that sees one key more or fewer, or a rotary base that is 1% off, is 1e-3 and more.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*a, **k):
        raise AssertionError("a test went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )


# --- folders as they are published ----------------------------------------------------------------


def write_tokenizer(folder, specials=QWEN, **names):
    """A byte-level BPE of about 300 ids that transformers made a folder of."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    hf.train_from_iterator(
        [Path(__file__).read_text()],
        trainers.BpeTrainer(
            vocab_size=len(specials) + 290,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names = {"eos_token": specials[0], "pad_token": specials[0], **names}
    transformers.PreTrainedTokenizerFast(tokenizer_object=hf, **names).save_pretrained(folder)


def random_model(family, dtype=torch.float32, **config):
    """transformers' own, every weight of it random, so that each one shows in the logits."""
    config = transformers.AutoConfig.for_model(
        family, **SIZES | {"tie_word_embeddings": False} | config
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(FAMILIES.index(family))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + name.endswith("norm.weight"))
    return model.to(dtype)


def write(folder, family, dtype=torch.float32, shards="5GB", names=None, **config):
    """A folder as transformers saves it; names: special tokens' names. Returns the folder."""
    random_model(family, dtype, **config).save_pretrained(folder, max_shard_size=shards)
    write_tokenizer(folder, **names or {})
    return folder


def change(path, drop=(), **values):
    """Other values in a JSON file, and some dropped."""
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in found.items() if k not in drop}))


def as_before_transformers_5(folder):
    path = folder / "config.json"
    change(
        path,
        drop=("rope_parameters", "dtype", "layer_types"),
        rope_theta=12345.0,
        rope_scaling=None,
        torch_dtype=json.loads(path.read_text())["dtype"],
    )


# The code in Dream's, CoDA's and SDAR's folders, reduced to what is their own: the attention, the
# classes they are loaded with, the output.
OWN_CODE = {
    "Dream": """
class Config(Qwen2Config):
    model_type = "Dream"

class Model(Qwen2ForCausalLM):
    config_class = Config

    def forward(self, input_ids, attention_mask=None, **kwargs):
        B, T = input_ids.shape
        mask = torch.zeros(B, 1, T, T, dtype=self.dtype)
        return super().forward(input_ids, attention_mask=mask, **kwargs)
""",
    "CoDA": """
class Config(PretrainedConfig):
    model_type = "CoDA"

class Model(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        qwen3 = Qwen3Config(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
        qwen3._attn_implementation = "sdpa"
        self.model = Qwen3Model(qwen3)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        B, T = input_ids.shape
        mask = torch.zeros(B, 1, T, T, dtype=self.dtype)
        return self.lm_head(self.model(input_ids, attention_mask=mask).last_hidden_state), None
""",
    "sdar": """
class Config(Qwen3Config):
    model_type = "sdar"

class Attention(Qwen3Attention):
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask.bool(), enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

class Model(Qwen3ForCausalLM):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.self_attn = Attention(config, i)
        self.post_init()

    def forward(self, input_ids, attention_mask, **kwargs):
        h = self.model.embed_tokens(input_ids)
        angles = self.model.rotary_emb(h, torch.arange(h.shape[1])[None])
        for layer in self.model.layers:
            h = layer(h, attention_mask=attention_mask, position_embeddings=angles)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(h)))
""",
}
IMPORTS = """import torch
from torch import nn
from transformers import (PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM, Qwen3Model)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, apply_rotary_pos_emb
"""


def write_with_own_code(folder, name):
    """A folder laid out as the published ones of this model_type: own code, gaps in config.json."""
    write(
        folder,
        "qwen2" if name == "Dream" else "qwen3",
        names={"specials": [*QWEN, "<|mask|>"]},
        shards="40KB",
    )
    (folder / "own_code.py").write_text(IMPORTS + OWN_CODE[name])
    as_before_transformers_5(folder)
    auto = {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Model"}
    if name == "sdar":
        auto["AutoModelForCausalLM"] = "own_code.Model"
    change(
        folder / "config.json",
        model_type=name,
        architectures=["Model"],
        auto_map=auto,
        **{} if name == "sdar" else {"mask_token_id": 3, "bos_token_id": 0},
        drop=("tie_word_embeddings",) if name == "CoDA" else (),
    )
    if name == "sdar":  # nobody but the tokenizer says which the mask is
        change(folder / "tokenizer_config.json", mask_token="<|mask|>")
    return folder


def write_stable_diffcoder(folder):
    """Its model_type is Seed-Coder's, llama; the older file has the name of its mask."""
    write(folder, "llama", names={"specials": [*QWEN, "[MASK]"]})
    change(folder / "config.json", architectures=["StableDiffcoderForCausalLM"])
    change(folder / "tokenizer_config.json", drop=("eos_token", "pad_token"))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": QWEN[0]}, "mask_token": "[MASK]"})
    )
    return folder


PUBLISHED = {  # name: (who writes such a folder, the words that have to be said, what it is then)
    "Seed-Coder": (lambda folder: write(folder, "llama"), [], ("ar", True, 1, None)),
    "Stable-DiffCoder": (write_stable_diffcoder, [], ("block", False, 4, 3)),
    "Dream": (
        lambda folder: write_with_own_code(folder, "Dream"),
        [],
        ("bidirectional", True, 1, 3),
    ),
    "CoDA": (lambda folder: write_with_own_code(folder, "CoDA"), [], ("bidirectional", True, 1, 3)),
    "SDAR": (
        lambda folder: write_with_own_code(folder, "sdar"),
        ["--block_size=4"],
        ("block", False, 4, 3),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of PUBLISHED and of FAMILIES, which have a mask."""
    root = tmp_path_factory.mktemp("published")
    found = {name: make(root / name) for name, (make, _, _) in PUBLISHED.items()}
    for family in FAMILIES:
        found[family] = write(
            root / family,
            family,
            tie_word_embeddings=family == "qwen2",
            names={"specials": [*QWEN, "<|mask|>"], "mask_token": "<|mask|>"},
        )
    return found


@pytest.fixture
def command(monkeypatch):
    """A script's main() with these words, in this process. Returns the exit status."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        try:
            return main() or 0
        except SystemExit as stop:
            return stop.code or 0
        finally:
            sys.excepthook = sys.__excepthook__
        return 0

    return run


# --- import, export, import -----------------------------------------------------------------------


def tensors(folder):
    """{name: tensor} of a folder's files."""
    return {
        name: t
        for path in sorted(folder.glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


def check_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, t in one.items():
        assert t.dtype == other[name].dtype and torch.equal(
            t.view(torch.uint8), other[name].view(torch.uint8)
        ), name


KINDS = [  # dtype, tied, files, config.json as before transformers 5, head_dim given
    ("float32", False, "one", False, True),
    ("float32", True, "several", True, False),
    ("bfloat16", True, "one", True, True),
    ("bfloat16", False, "several", False, False),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tied, files, old, head_dim", KINDS)
def test_a_folder_read_and_written_back_is_the_same_bit_for_bit(
    tmp_path, monkeypatch, command, family, dtype, tied, files, old, head_dim
):
    folder = write(
        tmp_path / "theirs",
        family,
        getattr(torch, dtype),
        "30KB" if files == "several" else "5GB",
        tie_word_embeddings=tied,
        head_dim=16 if head_dim else 8,
        names={"chat_template": CHATML},
    )
    if old:
        as_before_transformers_5(folder)
        change(
            folder / "config.json", drop=() if head_dim or family == "qwen3" else ("head_dim",)
        )  # qwen3 without it means 128
    if files == "several":
        monkeypatch.setattr(huggingface, "FILE_BYTES", 40_000)
    assert len(list(folder.glob("*.safetensors"))) > 1 or files == "one"
    assert (
        command(huggingface.main, "export", folder, f"--to={tmp_path / 'ours'}", f"--dtype={dtype}")
        == 0
    )
    ours = tmp_path / "ours"
    check_same_bits(tensors(folder), tensors(ours))

    config = json.loads((ours / "config.json").read_text())  # says it in the words of both
    assert (
        config["rope_theta"]
        == config["rope_parameters"]["rope_theta"]
        == (12345.0 if old else 10000.0)
    )

    model, tok, _ = huggingface.load(folder)
    again, tok_again, _ = huggingface.load(ours)
    assert again.cfg == model.cfg and tok_again.json == tok.json
    check_same_bits(model.state_dict(), again.state_dict())

    theirs, exported = (
        AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval() for f in (folder, ours)
    )
    assert type(exported) is type(theirs) and exported.dtype == theirs.dtype == getattr(
        torch, dtype
    )
    check_same_bits(theirs.state_dict(), exported.state_dict())
    tokens = torch.arange(40)[None] * 7
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, exported(tokens).logits)
    text, chat = "def f(x):\n    return x  # <|im_end|> é🙂", [{"role": "user", "content": "hi"}]
    one, other = (AutoTokenizer.from_pretrained(f) for f in (folder, ours))
    assert other(text)["input_ids"] == one(text)["input_ids"]
    assert other.apply_chat_template(chat, tokenize=False) == one.apply_chat_template(
        chat, tokenize=False
    )
    assert (other.bos_token, other.eos_token, other.pad_token, other.mask_token) == (
        None,
        QWEN[0],
        QWEN[0],
        None,
    )


def test_weights_go_in_files_of_at_most_that_many_bytes_and_the_index_tells_which(
    folders, tmp_path, monkeypatch
):
    for file_bytes, whole in ((10**9, 1), (30_000, None), (1, None)):
        monkeypatch.setattr(huggingface, "FILE_BYTES", file_bytes)
        model, tok, recipe = huggingface.load(folders["llama"])
        out = tmp_path / str(file_bytes)
        out.mkdir()
        huggingface.write_weights(out, weights_of(model), torch.float32)
        files = sorted(out.glob("*.safetensors"))
        check_same_bits(tensors(folders["llama"]), tensors(out))
        if whole:
            assert [p.name for p in out.iterdir()] == ["model.safetensors"]
            continue
        sizes = [[t.nbytes for t in load_file(p).values()] for p in files]
        assert all(sum(s) <= file_bytes or len(s) == 1 for s in sizes)  # one tensor is never split
        assert (
            all(sum(a) + b[0] > file_bytes or max(b) > file_bytes for a, b in zip(sizes, sizes[1:]))
            or file_bytes > 1
        )
        assert [p.name for p in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert index["weight_map"] == {name: p.name for p in files for name in load_file(p)}


def test_bfloat16_weights_are_the_float32_ones_rounded(folders, tmp_path, command):
    assert (
        command(
            huggingface.main,
            "export",
            folders["qwen3"],
            f"--to={tmp_path / 'b'}",
            "--dtype=bfloat16",
        )
        == 0
    )
    check_same_bits(
        {n: t.bfloat16() for n, t in tensors(folders["qwen3"]).items()}, tensors(tmp_path / "b")
    )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_exported_folder_says_by_itself_what_it_is(folders, tmp_path, command, name):
    _, words, (objective, shift, block_size, mask) = PUBLISHED[name]
    assert (
        command(huggingface.main, "export", folders[name], f"--to={tmp_path / 'ours'}", *words) == 0
    )
    for folder, asked in (
        (folders[name], {"block_size": 4} if words else {}),
        (tmp_path / "ours", {}),
    ):
        cfg, tok, recipe = huggingface.read_description(folder, **asked)
        assert how(recipe) == (objective, shift, block_size)
        assert tok.mask_id == mask and tok.eos_id == 0 and not cfg.tie_embeddings
    check_same_bits(tensors(folders[name]), tensors(tmp_path / "ours"))
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "ends, expected",
    [(2, {0, 2}), ([0, 1], {0, 1, 2}), ([1, -1, 10**6, None], {0, 1, 2}), (None, {0, 2})],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_exported_folder_ends_texts_where_the_folder_did(
    folders, tmp_path, command, ends, expected, file
):
    """Where eos is id 0, a list in either file, and <|im_end|>, id 2, by its name."""
    theirs = tmp_path / "theirs"
    shutil.copytree(folders["Seed-Coder"], theirs)
    change(theirs / file, eos_token_id=ends)
    assert load_tokenizer(theirs).stop_ids == expected
    for n in (1, 2):  # an export of the export too
        came_from = theirs if n == 1 else tmp_path / "1"
        assert command(huggingface.main, "export", came_from, f"--to={tmp_path / str(n)}") == 0
        tok = load_tokenizer(tmp_path / str(n))
        assert tok.stop_ids == expected and tok.eos_id == 0
    read = transformers.GenerationConfig.from_pretrained(tmp_path / "2")
    assert (set(read.eos_token_id), read.bos_token_id, read.pad_token_id) == (expected, None, 0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    assert set(model.generation_config.eos_token_id) == expected
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[0] == 1


def test_an_export_may_be_told_another_objective_and_a_new_mask(folders, tmp_path, command):
    words = ["--objective=block", "--block_size=6", "--shift=true", "--mask_token=<|mask|>"]
    assert (
        command(
            huggingface.main, "export", folders["Seed-Coder"], f"--to={tmp_path / 'ours'}", *words
        )
        == 0
    )
    _, tok, recipe = huggingface.read_description(tmp_path / "ours")
    assert how(recipe) == ("block", True, 6)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (
        theirs.mask_token == "<|mask|>"
        and theirs.mask_token_id == tok.mask_id == tok.vocab_size - 1
    )


def test_a_folders_own_code_is_never_run_but_by_verify(folders, tmp_path, command):
    folder = shutil.copytree(folders["Dream"], tmp_path / "Dream")
    (folder / "own_code.py").write_text("raise AssertionError('run')")
    assert command(huggingface.main, "export", folder, f"--to={tmp_path / 'ours'}") == 0
    assert command(sample.main, f"--init_from={folder}", "--max_new_tokens=2", "--device=cpu") == 0
    with pytest.raises(Mistake, match="add --trust_remote_code=true"):
        command(huggingface.main, "verify", folder)
    with pytest.raises(Mistake, match="AssertionError: run"):
        command(huggingface.main, "verify", folder, TRUST)
    assert (
        command(huggingface.main, "verify", tmp_path / "ours", "--objective=ar") == 0
    )  # an export has none: Qwen2's layers


# --- the same logits ------------------------------------------------------------------------------


def weights_of(model):
    return {huggingface.tensor_name(n): p.detach() for n, p in model.named_parameters()}


def difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def pairs(folders):
    """{family: (our model, transformers')}."""
    return {
        f: (
            huggingface.load(folders[f])[0],
            AutoModelForCausalLM.from_pretrained(folders[f]).eval(),
        )
        for f in FAMILIES
    }


@torch.no_grad()
def logits_of(model, tokens, block_size):
    start = torch.zeros(tokens.shape, dtype=torch.int32)
    return model.logits(model(tokens, Spans.of(start, start + tokens.shape[1], block_size)))


def additive(B, T, block_size):
    """The mask that transformers adds to the scores, (B, 1, T, T), written without Spans."""
    mask = torch.zeros(T, T)
    for i in range(T):
        for j in range(T):
            if block_size and j // block_size > i // block_size:
                mask[i, j] = torch.finfo(torch.float32).min
    return mask.expand(B, 1, T, T)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block_size", [1, 4, 3, None])
@torch.no_grad()
def test_logits_are_transformers_under_causal_block_and_full_attention(pairs, family, block_size):
    ours, theirs = pairs[family]
    for T in (22, 1, 12):  # 22 leaves a ragged block at the end of both K
        tokens = torch.randint(512, (3, T), generator=torch.Generator().manual_seed(T))
        found, expected = (
            logits_of(ours, tokens, block_size),
            theirs(tokens, attention_mask=additive(3, T, block_size)).logits,
        )
        assert difference(found, expected) < TOLERANCE
        if block_size == 1:
            assert difference(found, theirs(tokens).logits) < TOLERANCE
    for other in {1, 2, 4, 3, None} - {block_size}:  # and no other attention's
        assert difference(logits_of(ours, tokens, other), expected) > 10 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 0.3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_in_config_json_is_heeded(tmp_path, family, config):
    write(tmp_path / "f", family, **config)
    tokens = torch.randint(512, (2, 30), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "f").eval()
    assert (
        difference(logits_of(huggingface.load(tmp_path / "f")[0], tokens, 1), theirs(tokens).logits)
        < TOLERANCE
    )


# --- verify ---------------------------------------------------------------------------------------

TRUST = "--trust_remote_code=true"
OBJECTIVES = [
    ["--objective=ar"],
    ["--objective=ar_diffusion"],
    ["--objective=bidirectional"],
    ["--objective=block", "--block_size=4"],
    ["--objective=block", "--block_size=3", "--tokens=40"],
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", OBJECTIVES)
def test_verify_agrees_with_transformers(folders, command, capsys, family, words):
    assert command(huggingface.main, "verify", folders[family], *words) == 0
    said = capsys.readouterr().out
    assert (
        families.ARCHITECTURES[family] in said
        and words[0].split("=")[1] in said
        and "100.0% of the tokens" in said
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_verify_agrees_with_the_code_a_folder_brings(folders, command, capsys, name):
    _, words, (objective, *_) = PUBLISHED[name]
    assert command(huggingface.main, "verify", folders[name], TRUST, *words) == 0
    said = capsys.readouterr().out
    assert objective in said and "100.0% of the tokens" in said
    assert ("Model in" in said) == (name in ("Dream", "CoDA", "SDAR"))  # its own class was run


def test_verify_holds_in_bfloat16_within_its_wider_limit(folders, command, capsys):
    for family in FAMILIES:
        assert command(huggingface.main, "verify", folders[family], "--dtype=bfloat16") == 0
    assert "limit 1e-01" in capsys.readouterr().out


def one_number_off(folder):
    path = folder / "model.safetensors"
    found = load_file(path)
    found["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(found, path, metadata={"format": "pt"})


def other_rope_theta(folder):
    change(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 11000.0})


def other_epsilon(folder):
    change(folder / "config.json", rms_norm_eps=1e-2)


@pytest.mark.parametrize("alter", [one_number_off, other_rope_theta, other_epsilon])
def test_verify_disagrees_with_exit_status_1_when_what_transformers_reads_is_not_what_we_read(
    folders, tmp_path, monkeypatch, command, capsys, alter
):
    folder, load = shutil.copytree(folders["qwen3"], tmp_path / "f"), huggingface.load
    assert command(huggingface.main, "verify", folder) == 0

    def load_then_alter(*a, **k):
        found = load(*a, **k)
        alter(folder)
        return found

    monkeypatch.setattr(huggingface, "load", load_then_alter)
    assert command(huggingface.main, "verify", folder) == 1
    assert "largest difference of two logits" in capsys.readouterr().out


def test_verify_disagrees_when_the_attention_is_another(folders, monkeypatch, command):
    for more, said in (
        (["--objective=ar"], "sees the whole text"),
        (["--tokens=1"], "tokens is an int from 2"),
        (["--tokens=97"], "context of 96"),
    ):
        with pytest.raises(ValueError, match=said):
            command(huggingface.main, "verify", folders["Dream"], TRUST, *more)
    dense_mask = Spans.dense_mask
    monkeypatch.setattr(
        Spans, "dense_mask", lambda self: dense_mask(self).tril()
    )  # what theirs is told to see
    for name in ("SDAR", "llama"):
        assert (
            command(
                huggingface.main,
                "verify",
                folders[name],
                TRUST,
                "--objective=block",
                "--block_size=4",
            )
            == 1
        )
        assert command(huggingface.main, "verify", folders[name], TRUST, "--objective=ar") == 0


def with_code(folders, folder, code="", **config):
    """A copy of the Dream folder, with more lines of code and other values in config.json."""
    shutil.copytree(folders["Dream"], folder)
    with (folder / "own_code.py").open("a") as f:
        f.write(code)
    change(folder / "config.json", **config)
    return folder


def fault_of_verify(command, folder, *words):
    """The one line that verify ends with."""
    with pytest.raises(Mistake) as error:
        command(huggingface.main, "verify", folder, TRUST, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_verify_names_every_file_it_would_run_before_it_reads_the_weights(
    folders, tmp_path, command
):
    elsewhere = {
        "AutoConfig": "own_code.Config",
        "AutoModel": "a/b--modeling.Model",
        "AutoTokenizer": ["x.Slow", None],
    }
    folder = with_code(folders, tmp_path / "f", auto_map=elsewhere)
    (folder / "helper.py").write_text("raise AssertionError('run')")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(Mistake) as error:
        command(huggingface.main, "verify", folder)
    assert str(error.value) == (
        f"{folder} brings its own code, which verify would run: helper.py, modeling.py of "
        "huggingface.co/a/b, own_code.py; read it, then add --trust_remote_code=true"
    )


@pytest.mark.parametrize("auto_map", [{}, {"AutoTokenizer": "own_code.Tokenizer"}])
def test_a_folder_without_code_for_the_model_needs_no_trust(folders, tmp_path, command, auto_map):
    folder = shutil.copytree(folders["llama"], tmp_path / "f")
    (folder / "own_code.py").write_text("raise AssertionError('run')")
    change(folder / "config.json", auto_map=auto_map)
    assert command(huggingface.main, "verify", folder) == 0


FORWARD = """
def forward(self, input_ids, **kwargs):
    {}

Model.forward = forward
"""


@pytest.mark.parametrize(
    "code, said",
    [
        (
            "import no_such_package",
            "(ImportError: This modeling file requires the following packages",
        ),
        ("raise KeyError('default')", "(KeyError: 'default')"),
        ("raise ValueError('one\\ntwo')", "(ValueError: one)"),
        ("Model = None", "(AttributeError: 'NoneType' object has no attribute"),
        (FORWARD.format("raise TypeError('no mask')"), "(TypeError: no mask)"),
        (
            FORWARD.format("return self"),
            "(AttributeError: 'Model' object has no attribute 'logits'",
        ),
        (
            FORWARD.format("return (torch.zeros(3, 4), None)"),
            "(ValueError: its logits have shape (3, 4))",
        ),
    ],
)
def test_a_failure_of_a_folders_own_code_is_one_sentence(folders, tmp_path, command, code, said):
    folder = with_code(folders, tmp_path / "f", code, transformers_version="4.46.2")
    found = fault_of_verify(command, folder)
    assert f"{folder}: its own code failed under transformers {transformers.__version__} " in found
    assert said in found
    assert found.endswith(
        "; its config.json was written by another: `pip install "
        '"transformers==4.46.*"` into an environment of its own and verify there'
    )


@pytest.mark.parametrize("version", [transformers.__version__, None, "new", 4.46])
def test_no_other_version_is_named_where_config_json_names_none(
    folders, tmp_path, command, version
):
    folder = with_code(
        folders, tmp_path / "f", "raise KeyError('default')", transformers_version=version
    )
    asked_for = '`pip install "transformers==4.46.*"`' if version == 4.46 else "no other version"
    assert asked_for in fault_of_verify(command, folder)


def test_a_failure_of_transformers_itself_is_one_sentence(folders, monkeypatch, command):
    def fail(*a, **k):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    found = fault_of_verify(command, folders["llama"])
    assert (
        f"transformers' code for it failed under transformers {transformers.__version__}" in found
    )
    assert "(RuntimeError: no kernel); its config.json names no other version to try" in found


def test_without_transformers_verify_says_what_to_install(folders, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = fault_of_verify(command, folders["llama"])
    assert "cannot be imported" in found and found.endswith("`pip install transformers`")


def test_no_memory_left_is_not_taken_for_a_failure_of_their_code(folders, tmp_path, command):
    folder = with_code(folders, tmp_path / "f", FORWARD.format("raise MemoryError"))
    with pytest.raises(MemoryError):
        command(huggingface.main, "verify", folder, TRUST)


TIES = """
def eval(self):
    self.lm_head.weight = self.model.embed_tokens.weight
    return self

Model.eval = eval
"""


def test_a_head_that_transformers_tied_is_the_files_again(folders, tmp_path, command, capsys):
    folder = shutil.copytree(folders["CoDA"], tmp_path / "f")
    with (folder / "own_code.py").open("a") as f:
        f.write(TIES)
    assert "tie_word_embeddings" not in json.loads((folder / "config.json").read_text())
    assert command(huggingface.main, "verify", folder, TRUST) == 0
    assert "tied its head to its embedding and was given the file's" in capsys.readouterr().out


def test_a_head_that_the_folder_ties_stays_tied(folders, command, capsys):
    assert command(huggingface.main, "verify", folders["qwen2"]) == 0
    assert "was given the file's" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "version, keyword",
    [
        ("4.46.3", "torch_dtype"),
        ("4.51.0", "torch_dtype"),
        ("4.55.4", "torch_dtype"),
        ("4.56.0", "dtype"),
        ("4.57.0.dev0", "dtype"),
        ("5.0.0rc1", "dtype"),
        ("5.23.0", "dtype"),
    ],
)
def test_the_type_of_the_weights_is_named_as_that_version_knows_it(
    folders, monkeypatch, command, version, keyword
):
    asked = {}

    def record(*a, **k):
        asked.update(k)
        raise RuntimeError("enough was seen")

    monkeypatch.setattr("transformers.__version__", version)  # of the module as verify imports it
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", record)
    assert "enough was seen" in fault_of_verify(command, folders["llama"])
    assert asked == {
        "trust_remote_code": False,
        keyword: torch.float32,
        "attn_implementation": "eager",
    }


def test_a_disagreement_names_the_version_config_json_was_written_by(
    folders, tmp_path, command, capsys
):
    folder = with_code(
        folders,
        tmp_path / "f",
        transformers_version="4.46.2",
        code="""
theirs = Model.forward

def forward(self, input_ids, **kwargs):
    output = theirs(self, input_ids, **kwargs)
    output.logits[0, 0, 0] += 100
    return output

Model.forward = forward
""",
    )
    assert command(huggingface.main, "verify", folder, TRUST) == 1
    assert '`pip install "transformers==4.46.*"`' in capsys.readouterr().out


@pytest.fixture
def shell(tmp_path):
    """huggingface.py with these words, as a shell starts it."""

    def run(*words):
        env = {
            "PATH": "/usr/bin",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, "huggingface.py", *map(str, words)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )

    return run


def test_the_commands_from_outside(folders, tmp_path, shell):
    """As a shell sees them: exit statuses, and a sentence for a mistake."""
    found = shell("export", folders["SDAR"], f"--to={tmp_path / 'published'}", "--block_size=4")
    assert found.returncode == 0 and (tmp_path / "published" / "config.json").is_file()
    found = shell("verify", folders["Dream"])
    assert found.returncode == 1 and found.stderr == (
        f"error: {folders['Dream']} brings its own code, which verify would "
        "run: own_code.py; read it, then add --trust_remote_code=true\n"
    )


@pytest.mark.slow  # it imports transformers anew; other tests verify in this process
def test_verify_from_outside(folders, shell):
    found = shell("verify", folders["Dream"], TRUST)
    assert found.returncode == 0 and "100.0% of the tokens" in found.stdout
    found = shell("verify", folders["SDAR"], TRUST)
    assert found.returncode == 1 and found.stderr == (
        "error: objective='block' needs a block_size, which config.json does not "
        "say: give --block_size, such as 4\n"
    )


# --- what a folder says of itself, and what must be asked -----------------------------------------

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OURS = LLAMA | {"objective": "block", "shift": True, "block_size": 8}
MASKED = SimpleNamespace(mask_id=5, folder="FOLDER")  # as much of a tokenizer as is asked


def how(recipe):
    return recipe.objective, recipe.shift, recipe.block_size


DIFFCODER = "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"  # its architectures are LLAMA's


@pytest.mark.parametrize(
    "hf, asked, expected",
    [
        (LLAMA, {}, ("ar", True, 1)),
        ({"model_type": "qwen2"}, {}, ("ar", True, 1)),
        ({"model_type": "qwen3"}, {}, ("ar", True, 1)),
        ({"model_type": "Dream"}, {}, ("bidirectional", True, 1)),
        ({"model_type": "CoDA"}, {}, ("bidirectional", True, 1)),
        (
            {"model_type": "llama", "architectures": ["StableDiffcoderForCausalLM"]},
            {},
            ("block", False, 4),
        ),
        (LLAMA | {"auto_map": {"AutoModelForCausalLM": DIFFCODER}}, {}, ("block", False, 4)),
        ({"model_type": "sdar"}, {"block_size": 16}, ("block", False, 16)),
        (
            {"model_type": "sdar", "block_size": 8},
            {},
            ("block", False, 8),
        ),  # config.json goes before the table,
        (
            {"model_type": "sdar", "block_size": 8},
            {"block_size": 16},
            ("block", False, 16),
        ),  # the user before config.json
        (OURS, {}, ("block", True, 8)),
        (LLAMA | {"objective": "block", "block_size": 4}, {}, ("block", False, 4)),
        (LLAMA | {"objective": "bidirectional"}, {}, ("bidirectional", False, 1)),
        (OURS, {"block_size": 2, "shift": False}, ("block", False, 2)),
        (OURS, {"objective": "block"}, ("block", True, 8)),
        (
            OURS,
            {"objective": "ar"},
            ("ar", True, 1),
        ),  # another objective takes nothing of the folder's
        (OURS, {"objective": "bidirectional"}, ("bidirectional", False, 1)),
        (OURS, {"objective": "ar_diffusion", "shift": True}, ("ar_diffusion", True, 1)),
        (LLAMA, {"objective": "block", "block_size": 4}, ("block", False, 4)),
        ({"model_type": "Dream"}, {"objective": "ar_diffusion"}, ("ar_diffusion", False, 1)),
        ({"model_type": "Dream"}, {"shift": False}, ("bidirectional", False, 1)),
        (LLAMA | {"objective": None, "shift": None, "block_size": None}, {}, ("ar", True, 1)),
    ],
)
def test_the_user_goes_before_config_json_and_config_json_before_its_model_type(
    hf, asked, expected
):
    assert how(families.recipe_of(hf, MASKED, **asked)) == expected


@pytest.mark.parametrize(
    "hf, asked",
    [
        ({"model_type": "sdar"}, {}),
        (LLAMA, {"objective": "block"}),
        (OURS | {"objective": "ar"}, {"objective": "block"}),
        ({"model_type": "CoDA"}, {"objective": "block", "shift": True}),
    ],
)
def test_a_block_size_that_nobody_says_is_asked_for(hf, asked):
    with pytest.raises(
        ValueError, match="needs a block_size, which config.json does not say: give --block_size"
    ):
        families.recipe_of(hf, MASKED, **asked)


@pytest.mark.parametrize(
    "hf, asked, said",
    [
        (
            LLAMA,
            {"objective": "block", "block_size": 0},
            "block_size=0 does not fit: block_size is an int from 1",
        ),
        (LLAMA, {"shift": False}, "shift=False is not possible"),
        (LLAMA | {"objective": "magic"}, {}, "objective='magic' does not fit: .* is one of ar, "),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(hf, asked, said):
    with pytest.raises(ValueError, match=said):
        families.recipe_of(hf, MASKED, **asked)


def test_a_mask_that_nobody_names_is_asked_for_and_taken_by_name(folders):
    for objective in ("block", "bidirectional", "ar_diffusion"):
        with pytest.raises(
            ValueError, match=f"{objective}.*names none: say which with --mask_token"
        ):
            huggingface.load(folders["Seed-Coder"], objective=objective, block_size=4)
        _, tok, _ = huggingface.load(
            folders["Seed-Coder"], objective=objective, block_size=4, mask_token="<|mask|>"
        )
        assert (
            tok.mask_id == tok.vocab_size - 1 == load_tokenizer(folders["Seed-Coder"]).vocab_size
        )  # the next id, a row that padded
    assert huggingface.load(folders["Seed-Coder"], mask_token="<|im_start|>")[1].mask_id == 1


def test_a_mask_for_which_the_model_has_no_row_is_refused(tmp_path):
    write_tokenizer(tmp_path / "f")
    full = load_tokenizer(tmp_path / "f").vocab_size
    write(tmp_path / "f", "llama", vocab_size=full)
    huggingface.load(tmp_path / "f")
    with pytest.raises(
        ValueError, match=f"its tokenizer has {full + 1} ids, its model only {full}"
    ):
        huggingface.load(tmp_path / "f", objective="block", block_size=4, mask_token="<|mask|>")


def test_embeddings_are_tied_exactly_where_config_json_does_not_say_and_no_head_is_there(tmp_path):
    for tied in (True, False):
        for shards in ("5GB", "40KB"):
            folder = write(
                tmp_path / f"{tied}{shards}", "llama", shards=shards, tie_word_embeddings=tied
            )
            change(folder / "config.json", drop=("tie_word_embeddings",))
            assert huggingface.load(folder)[0].cfg.tie_embeddings == tied


# --- one sentence for what cannot be --------------------------------------------------------------


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / f"copy of {name}")


@pytest.mark.parametrize(
    "name, values, said",
    [
        (
            "llama",
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "model_type='gpt2' in config.json is not one of .*llama, qwen2",
        ),
        (
            "llama",
            {"model_type": "mixtral", "architectures": None},
            "model_type='mixtral' in config.json is not one of",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}},
            "rope_type='llama3' in config.json is not supported",
        ),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
            "rope_type='yarn' in config.json is not supported",
        ),
        (
            "qwen2",
            {"use_sliding_window": True},
            "use_sliding_window=True in config.json is not supported: only False is",
        ),
        (
            "llama",
            {"attention_bias": True},
            "attention_bias=True in config.json is not supported: only False is",
        ),
        (
            "qwen3",
            {"attention_bias": True},
            "attention_bias=True in config.json is not supported: only False is",
        ),
        (
            "qwen2",
            {"attention_bias": False},
            "attention_bias=False in config.json is not supported: only True is",
        ),
        ("llama", {"mlp_bias": True}, "mlp_bias=True in config.json is not supported"),
        (
            "llama",
            {"hidden_act": "gelu"},
            "hidden_act='gelu' in config.json is not supported: only 'silu' is",
        ),
        ("llama", {"rms_norm_eps": None}, "config.json does not say rms_norm_eps"),
        ("llama", {"hidden_size": 48}, "does not fit its config.json: model.*shape"),
        (
            "llama",
            {"tie_word_embeddings": True, "num_hidden_layers": 3},
            "model.layers.2.input_layernorm.weight is missing",
        ),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is unknown"),
        ("qwen2", {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ("llama", {"vocab_size": 200}, "its tokenizer has .* ids, its model only 200"),
    ],
)
def test_a_config_json_that_we_cannot_follow_is_one_sentence(copy_of, name, values, said):
    folder = copy_of(name)
    change(folder / "config.json", **values)
    with pytest.raises(ValueError, match=said) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)


def shard(folder, number):
    return sorted(folder.glob("model-*.safetensors"))[number]


def altered(path, change):
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "spoil, error, said",
    [
        (
            lambda f: shard(f, 1).unlink(),
            Mistake,
            "is incomplete: model-00002-of-0.*safetensors is missing",
        ),
        (
            lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-7]),
            ValueError,
            "model-00002-of-0.*is damaged",
        ),
        (
            lambda f: shard(f, 0).write_bytes(b"\xff" * 400),
            ValueError,
            "model-00001-of-0.*is damaged",
        ),
        (lambda f: altered(shard(f, 1), lambda t: t.pop(min(t))), ValueError, "is damaged"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            ValueError,
            "index.json is not readable JSON",
        ),
        (
            lambda f: (f / "config.json").write_text("{"),
            ValueError,
            "config.json is not readable JSON",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), Mistake, "no tokenizer at"),
        (
            lambda f: altered(shard(f, 0), lambda t: t.update({min(t): torch.zeros(3, 2)})),
            ValueError,
            r"has shape \[3, 2\], not \[",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_one_sentence(copy_of, spoil, error, said):
    folder = copy_of("SDAR")  # in several files
    spoil(folder)
    with pytest.raises(error, match=said):
        huggingface.load(folder, block_size=4)


def test_a_tensor_too_many_or_too_few_is_one_sentence(copy_of):
    folder = copy_of("qwen3")
    altered(
        folder / "model.safetensors",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
    )
    with pytest.raises(ValueError, match="model.layers.0.self_attn.q_proj.bias is unknown"):
        huggingface.load(folder)
    altered(
        folder / "model.safetensors",
        lambda t: [t.pop(n) for n in list(t) if "q_proj.bias" in n or "1.self_attn.k_norm" in n],
    )
    with pytest.raises(ValueError, match="model.layers.1.self_attn.k_norm.weight is missing"):
        huggingface.load(folder)


def test_pickled_weights_alone_are_not_read(copy_of):
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(Mistake, match="model.safetensors is missing"):
        huggingface.load(folder)


def test_a_name_on_the_hub_is_fetched_once_without_what_is_not_read(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **k: asked.append((name, k)) or str(folders["CoDA"]),
    )
    assert huggingface.find("Salesforce/CoDA-v0-Base") == folders["CoDA"]
    ((name, options),) = asked
    assert name == "Salesforce/CoDA-v0-Base" and "pytorch_model.bin" not in str(options)
    needed = [p.name for p in folders["CoDA"].iterdir()] + [
        "merges.txt",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
    ]
    assert all(any(fnmatch.fnmatch(n, p) for p in options["allow_patterns"]) for n in needed)
    assert huggingface.load("Salesforce/CoDA-v0-Base")[2].objective == "bidirectional"


def test_without_network_the_error_says_what_to_download_from_where(monkeypatch, command):
    def fail(*a, **k):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand many more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Mistake) as error:
        command(huggingface.main, "verify", "ByteDance-Seed/Seed-Coder-8B-Base")
    said = str(error.value)
    assert (
        "We couldn't connect" in said
        and "*.safetensors" in said
        and "*.json" in said
        and "\n" not in said
    )
    assert "huggingface.co/ByteDance-Seed/Seed-Coder-8B-Base into a folder and name that" in said


@pytest.mark.parametrize(
    "name",
    [
        "out/toy",
        "out/toy/step_0000100",
        "nowhere",
        "./a/b",
        "/no/where",
        "a/b/c",
        "tests/nothing",
        "../x/y",
    ],
)
def test_what_is_no_name_on_the_hub_is_never_looked_up_there(monkeypatch, tmp_path, name):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("went to the Hub")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    with pytest.raises(Mistake, match=f"no checkpoint in .*{name.split('/')[-1]}"):
        huggingface.find(name)


def test_an_export_goes_only_where_nothing_is_yet(folders, tmp_path, command):
    (tmp_path / "there").mkdir()
    for words in ([], [f"--to={tmp_path / 'there'}"]):
        with pytest.raises(
            ValueError, match="must name a folder that does not exist yet: --to=FOLDER"
        ):
            command(huggingface.main, "export", folders["llama"], *words)
    assert list((tmp_path / "there").iterdir()) == []
    assert (
        command(huggingface.main, "export", folders["llama"], f"--to={tmp_path / 'a' / 'new'}/")
        == 0
    )  # as a shell completes it
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"] and huggingface.load(
        tmp_path / "a" / "new"
    )


@pytest.mark.parametrize(
    "words", [["verify"], ["verify", "--dtype=bfloat16"], ["import", "x"], ["x"]]
)
def test_a_command_that_is_none_says_which_are(command, words):
    with pytest.raises(
        ValueError,
        match="is incomplete: `python huggingface.py verify FOLDER` and .* are the commands",
    ):
        command(huggingface.main, *words)


# --- importing, and files of strangers ------------------------------------------------------------


def test_importing_it_loads_neither_torchs_distributed_checkpoints_nor_its_compiler():
    program = (
        "import sys, huggingface; print([m for m in ('torch.distributed.checkpoint', "
        "'torch.distributed.tensor', 'torch._dynamo', 'transformers', 'jinja2') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done


@pytest.mark.parametrize(
    "values, said",
    [
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"hidden_size": 32.5}, "hidden_size=32.5 does not fit"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 900}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
        ({"num_attention_heads": [4], "head_dim": None}, r"num_attention_heads=\[4\]"),
        ({"vocab_size": 2**24}, r"embed_tokens.weight has shape \[512, 32\], not \[16777216, 32\]"),
        ({"intermediate_size": 2**20}, "has shape"),
        ({"architectures": 5}, "architectures=5 .* is not a list"),
        ({"architectures": [[1]], "model_type": ["llama"]}, "model_type="),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] .* is not an object"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "NaN is not a finite number"),
        ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta='1'"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"shift": "no"}, "shift='no' does not fit"),
        ({"shift": 1}, "shift=1 does not fit"),
        ({"objective": "block", "block_size": "4"}, "block_size='4' does not fit"),
        ({"objective": ["ar"]}, r"objective=\['ar'\] does not fit"),
        ({"block_size": 0}, "block_size=0"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not read"),
    ],
)
def test_values_of_config_json_that_cannot_be_are_refused_before_memory_is_taken(
    copy_of, monkeypatch, values, said
):
    folder = copy_of("llama")
    change(folder / "config.json", **values)
    empty = torch.empty

    def no_memory(*a, **k):
        tensor = empty(*a, **k)
        assert tensor.is_meta, "took memory"
        return tensor

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(Mistake, match=said) as error:
        huggingface.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        [],
        5,
        "x",
        {"a": 5},
        {"a": None},
        {"a": ["b"]},
        {"a": "../stolen.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "."},
        {"a": ""},
        {"a": "b\\c"},
        {"a": ".."},
    ],
)
def test_a_weight_map_gives_each_tensor_a_file_beside_it(copy_of, weight_map):
    folder = copy_of("SDAR")
    change(folder / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(Mistake, match="index.json is damaged: weight_map must give each tensor"):
        huggingface.load(folder, block_size=4)


def test_weights_outside_of_the_folder_are_not_read(copy_of, tmp_path):
    folder = copy_of("SDAR")
    file = shard(folder, 0).name
    shutil.move(folder / file, tmp_path / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, of in index["weight_map"].items():
        index["weight_map"][name] = f"../{of}" if of == file else of
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Mistake, match="a file in the same folder"):
        huggingface.load(folder, block_size=4)


def test_quantized_weights_are_refused_though_their_shapes_fit(copy_of):
    folder = copy_of("llama")
    altered(
        folder / "model.safetensors",
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
    )
    with pytest.raises(Mistake, match="has quantized weights, .* model.norm.weight is I8"):
        huggingface.load(folder)


@pytest.fixture
def run_folder(folders, tmp_path):
    """A run of two checkpoints."""
    run = tmp_path / "run"
    for step in (1, 2):
        shutil.copytree(folders["llama"], run / f"step_000000{step}")
    (run / "latest").write_text("step_0000002")
    return run


def spoil_latest(run, content):
    (run / "latest").unlink()
    if content == "link":
        (run / "latest").symlink_to(run / "nowhere")
    elif content == "folder":
        (run / "latest").mkdir()
    elif content is not None:
        (run / "latest").write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"step_0000003",
        b"\xff\xfe",
        b"link",
        b"..",
        b"../run/step_0000002",
        b".",
        b"/etc",
        b"a\0b",
        b"step_0000002/../step_0000001",
    ],
)
def test_a_latest_that_names_no_checkpoint_says_which_are_there(run_folder, content):
    spoil_latest(run_folder, "link" if content == b"link" else content)
    with pytest.raises(Mistake, match="latest.*step_0000001, .*step_0000002$") as error:
        huggingface.find(run_folder)
    assert "\n" not in str(error.value)


def test_a_run_that_lost_its_latest_says_which_checkpoints_are_there(run_folder):
    spoil_latest(run_folder, None)
    with pytest.raises(Mistake, match="no checkpoint in .*step_0000001, .*step_0000002"):
        huggingface.find(run_folder)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_looked_up_again(run_folder, monkeypatch):
    """As a run with keep=1 does: it saves the next one, names it, and removes the one before."""
    (run_folder / "latest").write_text("step_0000001")
    check_weights = huggingface.check_weights

    def remove_first(folder, cfg):
        if folder.name == "step_0000001":
            (run_folder / "latest").write_text("step_0000002")
            shutil.rmtree(folder)
        return check_weights(folder, cfg)

    monkeypatch.setattr(huggingface, "check_weights", remove_first)
    _, tok, _ = huggingface.load(run_folder)
    assert tok.folder == run_folder / "step_0000002"
    with pytest.raises(Mistake, match="config.json is missing|no checkpoint in"):
        huggingface.load(run_folder / "step_0000001")  # named itself, it is not replaced


def test_a_checkpoint_that_is_removed_between_latest_and_its_folder_is_looked_up_again(
    run_folder, monkeypatch
):
    answers = iter(["step_0000007", "step_0000002"])
    monkeypatch.setattr(huggingface, "read_text", lambda path: next(answers))
    assert huggingface.find(run_folder).name == "step_0000002"


# --- export: nothing of anybody's is removed, and nothing is left behind --------------------------


def test_an_export_leaves_other_peoples_folders_alone(folders, tmp_path, command):
    stranger = tmp_path / "out.tmp"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("years of work")
    assert command(huggingface.main, "export", folders["llama"], f"--to={tmp_path / 'out'}") == 0
    assert (stranger / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.tmp"]


def test_a_full_disk_ends_an_export_with_one_line_and_leaves_nothing(folders, tmp_path):
    """A limit on the size of files stands for the disk."""
    program = (
        "import resource, sys, huggingface; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "from configurator import begin; begin(); huggingface.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "export", folders["llama"], f"--to={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: could not write {tmp_path / 'out'}: ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_exported_files_have_the_permissions_that_the_umask_says(folders, tmp_path, command, mask):
    before = os.umask(mask)
    try:
        command(huggingface.main, "export", folders["llama"], f"--to={tmp_path / 'out'}")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


# --- whatever stands in its files, a folder is read or refused with a one-line message ------------

JUNK = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31 - 1,
        2**32,
        2**64,
        10**12,
        -(10**30),
        1e308,
        0.5,
        -1e-6,
        float("nan"),
        float("inf"),
        "",
        "no",
        "4",
        "<eos>",
        "\ud800",
        "../x",
        "a\0b",
        [],
        [1],
        [[1]],
        ["x"],
        {},
        {"a": 1},
        [{}],
        {"content": 5},
        {"content": "<|x|>"},
        {"type": "yarn"},
        [["a", "b"]],
    ]
)
JUNK |= st.recursive(
    JUNK,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "type", "content", "id", "rope_theta", "default"]),
            inner,
            max_size=3,
        )
    ),
)
JUNK = JUNK.map(deepcopy)  # what is drawn may be changed
FILES = [
    "config.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "latest",
]
NEW_KEYS = [
    "mask_token",
    "mask_token_id",
    "bos_token",
    "chat_template",
    "add_bos_token",
    "shift",
    "block_size",
    "objective",
    "rope_scaling",
    "quantization_config",
    "auto_map",
    "model",
    "added_tokens_decoder",
    "tokenizer_class",
    "normalizer",
    "post_processor",
    "decoder",
]


def places(value, path=()):
    """The path of every value in a JSON value; of long lists and dicts, of the first ones."""
    yield path
    if isinstance(value, (dict, list)):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(inside)[:25]:
            yield from places(part, (*path, key))


def put(value, path, junk, drop):
    """Replace or drop what stands at a path."""
    for key in path[:-1]:
        value = value[key]
    if drop:
        del value[path[-1]]
    else:
        value[path[-1]] = junk


def changed_text(draw, text):
    """A file's bytes: cut, with bytes that are not UTF-8, or with values replaced or dropped."""
    kind = draw(st.sampled_from(["values"] * 6 + ["cut", "bytes", "all"]))
    if kind == "cut":
        return text.encode()[: draw(st.integers(0, len(text)))]
    if kind == "bytes":
        place = draw(st.integers(0, len(text)))
        return (
            text.encode()[:place] + draw(st.binary(min_size=1, max_size=4)) + text.encode()[place:]
        )
    try:
        value = json.loads(text)
    except ValueError:  # `latest`
        return str(draw(JUNK)).encode(errors="surrogatepass")
    if kind == "all":
        return json.dumps(draw(JUNK)).encode()
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            value[draw(st.sampled_from(NEW_KEYS))] = draw(JUNK)
        path = draw(st.sampled_from([p for p in places(value) if p]))
        put(value, path, draw(JUNK), draw(st.booleans()))
        if not value:
            break
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run whose checkpoint has every kind of file that is read; it is small, for speed."""
    run = tmp_path_factory.mktemp("fuzz") / "run"
    folder = run / "step_0000001"
    write(folder, "llama", shards="20KB", names={"chat_template": CHATML})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": QWEN[0]}}))
    (run / "latest").write_text("step_0000001")
    return run


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_a_folder_with_anything_in_its_files_is_read_or_refused(small_run, data):
    name = data.draw(st.sampled_from(FILES))
    path = small_run / name if name == "latest" else small_run / "step_0000001" / name
    before = path.read_text()
    path.write_bytes(changed_text(data.draw, before))
    try:
        model, tok, recipe = huggingface.load(small_run)
        tok.decode(tok.encode("def f(x):\n    return x"))
    except (Mistake, OSError) as error:
        assert "\n" not in str(error)
    finally:
        path.write_text(before)


# --- sampling and training from a folder ----------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """The ids that sample.py drew, a list that fills."""
    found, run = [], sample.run

    def noting(loaded, how, texts, *a, **k):
        batch = run(loaded, how, texts, *a, **k)
        for text, ids in zip(texts, batch.ids):
            found.append(completion(ids[text.index(None):], loaded[1].stop_ids))
        return batch

    monkeypatch.setattr(sample, "run", noting)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_sample_writes_with_each_folder_as_its_objective_has_it(
    folders, command, capsys, drawn, name
):
    _, words, (objective, shift, block_size, mask) = PUBLISHED[name]
    assert (
        command(
            sample.main,
            f"--init_from={folders[name]}",
            "--prompt=def f",
            "--max_new_tokens=12",
            "--device=cpu",
            *words,
        )
        == 0
    )
    said = capsys.readouterr().out
    how = f"block, K = {block_size}" if objective == "block" else objective
    assert (
        f"{folders[name]}: {how}, {'shift' if shift else 'no shift'}, mask {mask}, float32 on cpu"
        in said
    )
    assert "--- sample 1 of 1\ndef f" in said and "tokens/s" in said
    (ids,), tok = drawn, load_tokenizer(folders[name])
    assert tok.decode(ids) in said and len(ids) <= 12


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_that_pad_the_embedding_are_never_drawn(folders, command, drawn, name):
    """At this temperature a draw is nearly uniform over 512 rows; the tokenizer has some 300."""
    _, words, (*_, mask) = PUBLISHED[name]
    command(
        sample.main,
        f"--init_from={folders[name]}",
        "--prompt=x",
        "--max_new_tokens=24",
        "--samples=4",
        "--temperature=50",
        "--device=cpu",
        *words,
    )
    ids, size = sum(drawn, []), load_tokenizer(folders[name]).vocab_size
    assert size < 320 and len(ids) > 10 and max(ids) < size and mask not in ids and max(ids) > 100


def test_a_chat_is_a_prompt_in_the_folders_template(tmp_path, command, capsys, monkeypatch):
    folder = write(tmp_path / "f", "qwen2", names={"chat_template": CHATML})
    prompts, run = [], sample.run

    def noting(loaded, how, texts, *a, **k):
        prompts.extend(text[:text.index(None)] for text in texts)
        return run(loaded, how, texts, *a, **k)

    monkeypatch.setattr(sample, "run", noting)
    assert (
        command(
            sample.main,
            f"--init_from={folder}",
            "--prompt=write f",
            "--chat=true",
            "--max_new_tokens=5",
            "--device=cpu",
        )
        == 0
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "write f"}], add_generation_prompt=True, tokenize=False
    )
    assert prompts == [theirs(expected)["input_ids"]]
    assert "write f" not in capsys.readouterr().out  # the answer alone
    with pytest.raises(ValueError, match="has no chat template"):
        command(
            sample.main,
            f"--init_from={write(tmp_path / 'g', 'qwen2')}",
            "--chat=true",
            "--prompt=x",
            "--device=cpu",
        )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data_folder):
    """A llama folder and data in its ids, which have no mask."""
    root = tmp_path_factory.mktemp("continued")
    folder = write(root / "folder", "llama")
    source = root / "source"
    source.mkdir()
    for i, name in enumerate(
        [
            "huggingface.py",
            "sample.py",
            "loader.py",
            "model.py",
            "plan.py",
            "parallel.py",
            "configurator.py",
        ]
    ):
        shutil.copy(ROOT / name, source / f"f{i}.py")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data.stdlib.prepare",
            f"--source={source}",
            f"--out={root / 'data'}",
            f"--tokenizer={folder}",
            "--val_percent=30",
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder, root / "data"


def run_train(*words):
    """train.py with these words, in this process, to its end."""
    settings = [
        "--context=32",
        "--batch_tokens=128",
        "--micro_batch=4",
        "--eval_every=2",
        "--eval_windows=2",
        "--eval_draws=2",
        "--lr_warmup_steps=1",
        "--threads=1",
        "--dtype=float32",
    ]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert train.main([*settings, *map(str, words)]) == 0
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_training_goes_on_from_a_folder_with_a_new_mask_and_the_run_samples_verifies_and_resumes(
    prepared, tmp_path, command, capsys
):
    folder, data = prepared
    words = [
        f"--data={data}",
        f"--out={tmp_path / 'run'}",
        "--objective=block",
        "--block_size=3",
        "--mask_token=<|mask|>",
    ]
    run_train(
        *words,
        f"--init_from={folder}",
        "--max_steps=2",
        "--lr=1e-12",
        "--lr_warmup_steps=2000000000",
        "--min_lr=0",
        "--weight_decay=0",
    )
    run = huggingface.find(tmp_path / "run")
    check_same_bits(
        tensors(folder), tensors(run)
    )  # steps of no length: what training began with is the folder's
    mask = load_tokenizer(folder).vocab_size
    cfg, tok, recipe = huggingface.read_description(run)
    assert (how(recipe), tok.mask_id) == (("block", False, 3), mask) and cfg.vocab_size == 512
    assert (
        AutoTokenizer.from_pretrained(run).mask_token_id
        == json.loads((run / "config.json").read_text())["mask_token_id"]
        == mask
    )

    run_train(*words, "--resume=true", "--max_steps=4", "--lr=1e-2")
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in lines if "loss" in m] == [0, 1, 2, 3]
    assert [m["step"] for m in lines if "val_nelbo" in m] == [0, 2, 4]
    changed = {
        n
        for n, t in tensors(huggingface.find(tmp_path / "run")).items()
        if not torch.equal(t, tensors(folder)[n])
    }
    assert changed == tensors(folder).keys()
    embed = (
        tensors(huggingface.find(tmp_path / "run"))["model.embed_tokens.weight"]
        - tensors(folder)["model.embed_tokens.weight"]
    )
    assert embed[mask].abs().max() > 1e-3  # the new token was in the input

    assert (
        command(
            sample.main, f"--init_from={tmp_path / 'run'}", "--max_new_tokens=9", "--device=cpu"
        )
        == 0
    )
    assert f"block, K = 3, no shift, mask {mask}" in capsys.readouterr().out
    assert command(huggingface.main, "verify", tmp_path / "run") == 0
    assert "LlamaForCausalLM in float32, block" in capsys.readouterr().out
    assert (
        command(huggingface.main, "export", tmp_path / "run", f"--to={tmp_path / 'published'}") == 0
    )
    check_same_bits(tensors(huggingface.find(tmp_path / "run")), tensors(tmp_path / "published"))


def test_training_from_a_folder_refuses_other_sizes_other_data_and_a_longer_context(
    prepared, data_folder, tmp_path
):
    folder, data = prepared
    words = [
        f"--out={tmp_path / 'run'}",
        f"--init_from={folder}",
        "--objective=block",
        "--max_steps=1",
    ]
    for more, said in (
        ([f"--data={data}"], "needs a mask token"),
        (
            [f"--data={data}", "--mask_token=<|mask|>", "--d_model=64"],
            "d_model=64 was asked for, but the model in .* has 32",
        ),
        (
            [f"--data={data}", "--mask_token=<|mask|>", "--qkv_bias=true"],
            "qkv_bias=True was asked for, but .* has False",
        ),
        (
            [f"--data={data}", "--mask_token=<|mask|>", "--context=128"],
            "context=128 is longer than the 96",
        ),
        ([f"--data={data_folder}", "--mask_token=<|mask|>"], "was prepared with another tokenizer"),
        (
            [f"--data={data}", "--mask_token=<|mask|>", "--bos_token=<|bos|>"],
            "documents begin with None in .*bos_token",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            run_train(*words, *more)
    assert not (tmp_path / "run" / "latest").exists()
