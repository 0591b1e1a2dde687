"""Text to token ids and back; special tokens; chat templates; training a byte-level BPE.

Reads the tokenizer of a Hugging Face folder and writes it back as one: tokenizer.json, the special tokens' names in
tokenizer_config.json, the chat template. Where it is a byte-level BPE cut as ours and its ids are in merge order,
`tiktoken` encodes, which is several times faster and gives the same ids; otherwise Hugging Face's `tokenizers` does.

Not covered: chats with tools, `{% generation %}` in templates, and tokenizers that are not byte-level for anything but
encoding and decoding.
"""
import json
import os
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ("<bos>", "<eos>", "<mask>", "<pad>")
KEYS = ("bos_token", "eos_token", "pad_token", "mask_token")  # theirs in tokenizer_config.json, in transformers' order

# How text is cut before BPE, in classes spelled out so that every regex engine reads them alike: \w, \s and \p{L}
# follow the Unicode version an engine was built with. A "letter" is A-Z, a-z, _ and all beyond ASCII.
LETTER = r"[^\x00-@\[-\^`\{-\x7f]"
SPACE = r"[ \t\n\r\x0b\x0c]"
SPLIT = "|".join([
    rf" ?{LETTER}+",                                 # a word, with the space before it
    r"[0-9]{1,3}",                                   # digits by threes, as in Llama 3 and Seed-Coder
    r" ?[\x00-\x08\x0e-\x1f!-/:-@\[-\^`\{-\x7f]+[\r\n]*",  # punctuation, with the line end after it
    rf"{SPACE}*[\r\n]+",                             # blank lines
    rf"{SPACE}+(?![^ \t\n\r\x0b\x0c])",              # trailing space; indentation up to the word's own space
    rf"{SPACE}+",
])
# How Qwen2 and its descendants cut text, for their folders that have no tokenizer.json to say so.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")


def cut_at(regex):
    """The pre-tokenizer that cuts at a regex and writes the pieces' bytes as characters."""
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE as a `tokenizers.Tokenizer`: specials are ids 0-3, then the 256 bytes, then merges in order.

    texts: iterable of str. vocab_size: how many ids in all, at least 4 + 256.
    """
    if vocab_size < len(SPECIALS) + 256:
        raise ValueError(f"vocab_size={vocab_size} is too small: 4 special tokens and 256 bytes need 260 or more")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = cut_at(SPLIT), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def byte_of_char():
    """{character: byte} of the byte-level alphabet: GPT-2 writes each byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


def read_json(path):
    """The dict in a JSON file, empty where there is no such file. Raises ValueError, in a sentence."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not readable JSON of names and values: {error}") from error


def from_merges(folder, config):
    """The text of the tokenizer.json that a folder of vocab.json and merges.txt (Dream's) lacks.

    config: tokenizer_config.json as a dict; its tokenizer_class must be one that cuts at QWEN_SPLIT.
    """
    kind, added = config.get("tokenizer_class"), config.get("added_tokens_decoder")
    if not added or not str(kind).startswith(("Qwen2", "Dream")):
        raise ValueError(f"there is only vocab.json, of a {kind}, and only Qwen2's and Dream's with an added_tokens_decoder are "
                         "known here; load it with transformers' AutoTokenizer, whose save_pretrained writes the file")
    hf = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    hf.normalizer, hf.pre_tokenizer, hf.decoder = normalizers.NFC(), cut_at(QWEN_SPLIT), decoders.ByteLevel()
    for i, token in sorted(added.items(), key=lambda item: int(item[0])):
        hf.add_tokens([AddedToken(**token)])
        if hf.token_to_id(token["content"]) != int(i):
            raise ValueError(f"{token['content']} cannot have id {i}, there being ids below it that nothing has")
    return hf.to_str(pretty=True)


def name_specials(config, model_config, hf):
    """{"bos_token": its name or None, …} for KEYS. config, model_config: tokenizer_config.json, config.json as dicts.

    If tokenizer_config.json names any it decides, and what it leaves out or has as null is none: Qwen's documents have
    no bos, though its config.json has an id for one. Else the ids in config.json decide, the first of several for eos.
    Else the names are ours. Only a mask that is none so far may still be config.json's mask_token_id (Dream, CoDA).
    """
    ids = {key: model_config.get(key + "_id") for key in KEYS}
    ids = {key: i[0] if isinstance(i, list) and i else i for key, i in ids.items()}
    by_id = {key: hf.id_to_token(i) if isinstance(i, int) and i >= 0 else None for key, i in ids.items()}
    if any(key in config for key in KEYS):
        names = {key: config.get(key) for key in KEYS}
    elif any(by_id.values()):
        names = by_id
    else:
        names = {f"{name[1:-1]}_token": name if name in specials_of(hf) else None for name in SPECIALS}
    return names | {"mask_token": names["mask_token"] or by_id["mask_token"]}


def specials_of(hf):
    """{name: id} of the special tokens of a `tokenizers.Tokenizer`."""
    return {token.content: i for i, token in hf.get_added_tokens_decoder().items() if token.special}


@cache
def compiled(template):
    """A chat template, by jinja2 set up as transformers has it."""
    import jinja2.sandbox  # a template came with a downloaded folder

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return env.from_string(template)


class Tokenizer:
    """A folder's tokenizer, ready to use.

    vocab_size: int, the highest id + 1. special_ids: {name: id} of the tokens that are never read from a text.
    bos_id, eos_id, mask_id, pad_id: int, or None where there is none. bos_id is what a document begins with: None too
    if tokenizer_config.json has `add_bos_token: false`. That Llama 3's post-processor puts bos before every text says
    the same in another way; it is never run: who writes documents and prompts puts bos_id there.
    token_bytes: (vocab_size,) int64 numpy, how many bytes of text each id stands for; 0 for specials and unused ids.
    """

    def __init__(self, path, bos_token="", mask_token=""):
        """path: a folder, or the tokenizer.json in it. bos_token, mask_token: names to use instead of the folder's.

        A special token that the vocabulary lacks is added at the next free id, bos before mask.
        Raises FileNotFoundError or ValueError, in a sentence.
        """
        path = Path(path)
        path = path if path.suffix == ".json" else path / "tokenizer.json"
        folder = self.folder = path.parent
        if not path.is_file() and not (folder / "vocab.json").is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: the data is not prepared; `python -m data.stdlib.prepare` prepares data/stdlib")
        self.config = read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in self.config:  # transformers too reads the older file only then
            self.config |= read_json(folder / "special_tokens_map.json")
        for key, token in self.config.items():
            if isinstance(token, dict) and "content" in token:  # of a special token its name does; tokenizer.json has the rest
                self.config[key] = token["content"]
        try:
            self.json = path.read_text(encoding="utf-8") if path.is_file() else from_merges(folder, self.config)
            self.hf = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises bare Exception for a text that does not parse
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        if self.config.pop("auto_map", None) or not path.is_file() or not self.config:  # the class for a tokenizer.json alone
            self.config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        template = folder / "chat_template.jinja"
        self.jinja = template.read_text(encoding="utf-8") if template.is_file() else None
        self.set_specials(bos_token, mask_token)
        self.hf.no_truncation()  # some published files cut every text, or fill it up
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # "<eos>" in a text is five characters, never the special token
        self.tik = as_tiktoken(json.loads(self.json))
        self.byte_level = isinstance(self.hf.decoder, decoders.ByteLevel)
        self.bytes = self.bytes_by_id()
        self.vocab_size, self.token_bytes = len(self.bytes), np.array([len(b) for b in self.bytes])

    def set_specials(self, bos_token, mask_token):
        """Set the special tokens' ids, adding tokens that are missing to what `save` writes too."""
        names = name_specials(self.config, read_json(self.folder / "config.json"), self.hf)
        names |= {"bos_token": bos_token or names["bos_token"], "mask_token": mask_token or names["mask_token"]}
        for name in filter(None, names.values()):
            if name in specials_of(self.hf):
                continue
            vocab = self.hf.get_vocab()
            self.hf.add_special_tokens([AddedToken(name, normalized=False)])
            if self.hf.token_to_id(name) != vocab.get(name, max(vocab.values(), default=-1) + 1):
                raise ValueError(f"{name} cannot be added to the vocabulary in {self.folder}: its ids have gaps")
            self.json = self.hf.to_str(pretty=True)
        self.config |= {key: name for key, name in names.items() if name != self.config.get(key)}
        if bos_token and "add_bos_token" in self.config:
            self.config["add_bos_token"] = True
        self.special_ids = specials_of(self.hf)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (self.special_ids.get(names[key]) for key in KEYS)
        if self.config.get("add_bos_token") is False:
            self.bos_id = None

    def bytes_by_id(self):
        """What each id writes, as a list of bytes."""
        vocab, added, alphabet = self.hf.get_vocab(), self.hf.get_added_tokens_decoder(), byte_of_char()
        found = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            if token in self.special_ids:
                continue
            if i in added:  # these are written as they are
                found[i] = token.encode()
            elif self.byte_level and alphabet.keys() >= set(token):
                found[i] = bytes(alphabet[c] for c in token)
            else:
                found[i] = self.hf.decode([i]).encode()
        return found

    def bytes_of(self, i):
        """What one id writes, as bytes; nothing for a special token or an id that is not in use."""
        return self.bytes[i] if 0 <= i < self.vocab_size else b""

    def encode(self, text):
        """str -> list of int, no special token among them, none added.

        An added token that is not special (Qwen's <tool_call>, Qwen2.5-Coder's <|fim_prefix|>) is one id wherever its
        name stands in a text, as for transformers with `split_special_tokens=True`.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """list of str -> list of lists of int, on all cores."""
        if self.tik:
            return self.tik.encode_ordinary_batch(texts)
        return [e.ids for e in self.hf.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        """ids -> str: what `encode` read, normalized (Qwen: NFC); broken UTF-8 becomes U+FFFD; specials are left out."""
        if self.byte_level:
            return b"".join(self.bytes_of(int(i)) for i in ids).decode("utf-8", errors="replace")
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """Messages -> list of int, as the folder's chat template writes them, special tokens included.

        messages: list of {"role": str, "content": str}; a special token's name in them is that token, as in transformers.
        add_generation_prompt: go on to where the assistant's answer begins.
        """
        template = self.jinja or self.config.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not template or not messages:
            raise ValueError("a chat has no messages" if template else f"the tokenizer in {self.folder} has no chat template")
        names = {key: name for key, name in self.config.items() if key.endswith("_token") and isinstance(name, str)}
        try:
            text = compiled(template).render(**names, messages=messages, add_generation_prompt=add_generation_prompt,
                                             tools=None, documents=None)
        except Exception as error:  # whatever the template's own code runs into
            raise ValueError(f"the chat template in {self.folder} refuses these messages: {error}") from error
        self.hf.encode_special_tokens = False
        ids = self.hf.encode(text, add_special_tokens=False).ids
        self.hf.encode_special_tokens = True
        return ids

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json and any chat_template.jinja, each aside and then renamed.

        They load as this tokenizer here and in transformers' AutoTokenizer. folder: an existing one.
        """
        texts = {"tokenizer.json": self.json, "chat_template.jinja": self.jinja,
                 "tokenizer_config.json": json.dumps(self.config, indent=1, ensure_ascii=False)}
        for name, text in texts.items():
            if text is None:
                (Path(folder) / name).unlink(missing_ok=True)  # of another tokenizer that was here
                continue
            (Path(folder) / f"{name}.tmp").write_text(text, encoding="utf-8")
            os.replace(Path(folder) / f"{name}.tmp", Path(folder) / name)


def as_tiktoken(spec):
    """The tokenizer.json `spec` (a dict) as a `tiktoken.Encoding`, or None where tiktoken could give other ids.

    Only for a tokenizer that cuts at SPLIT: which letters, digits and spaces a published regex matches follows the
    Unicode version of the regex engine, and tiktoken's is not that of `tokenizers`.
    tiktoken merges the adjacent pair whose joined bytes have the lowest id; BPE, the pair whose merge was learned
    first. They agree when every token is what BPE makes of its own bytes, and ids rise in the order of the merges.
    """
    model = spec["model"]
    if (model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges") or spec.get("normalizer")
            or spec.get("pre_tokenizer") != json.loads(cut_at(SPLIT).__getstate__())):
        return None
    vocab, alphabet = model["vocab"], byte_of_char()
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [vocab["".join(m)] for m in merges]
    if any(a >= b for a, b in zip(made, made[1:])) or not all(t["special"] for t in spec["added_tokens"]):
        return None
    specials = {t["content"] for t in spec["added_tokens"]}
    bpe = models.BPE(vocab=vocab, merges=[tuple(m) for m in merges])
    if any(len(bpe.tokenize(token)) != 1 for token in vocab if token not in specials):
        return None  # a token that other merges would take apart
    ranks = {bytes(alphabet[c] for c in token): i for token, i in vocab.items() if token not in specials}
    if len(ranks) != 256 + len(merges):
        return None
    return tiktoken.Encoding("tokenizer.json", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
