"""Text to token ids and back; training a byte-level BPE; the four special tokens.

One format: Hugging Face's `tokenizer.json`. Where it is a byte-level BPE whose ids are in merge order (ours is),
`tiktoken` encodes, which is several times faster and gives the same ids; otherwise Hugging Face's `tokenizers` does.

Not covered: chat templates, and tokenizers that are not byte-level for anything but encoding and decoding.
"""
import json
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<bos>", "<eos>", "<mask>", "<pad>")

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


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE as a `tokenizers.Tokenizer`: specials are ids 0-3, then the 256 bytes, then merges in order.

    texts: iterable of str. vocab_size: how many ids in all, at least 4 + 256.
    """
    if vocab_size < len(SPECIALS) + 256:
        raise ValueError(f"vocab_size={vocab_size} is too small: 4 special tokens and 256 bytes need 260 or more")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def byte_of_char():
    """{character: byte} of the byte-level alphabet: GPT-2 writes each byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


class Tokenizer:
    """A `tokenizer.json` ready to use.

    vocab_size: int. bos_id, eos_id, mask_id, pad_id: int, or None where the vocabulary has no such token.
    token_bytes: (vocab_size,) int64 numpy, how many bytes of text each id stands for; 0 for specials.
    """

    def __init__(self, path):
        """path: a tokenizer.json or a folder that holds one. Raises FileNotFoundError or ValueError, in a sentence."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; `python -m data.stdlib.prepare` writes one")
        try:
            self.json = path.read_text(encoding="utf-8")  # kept, to be saved beside the weights
            self.hf = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises bare Exception for a text that does not parse
            raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
        self.hf.encode_special_tokens = True  # "<eos>" in a text is five characters, never the special token
        self.vocab_size = self.hf.get_vocab_size()
        self.special_ids = {t.content: i for i, t in self.hf.get_added_tokens_decoder().items() if t.special}
        self.bos_id, self.eos_id, self.mask_id, self.pad_id = map(self.special_ids.get, SPECIALS)
        self.tik = as_tiktoken(json.loads(self.json))
        self.token_bytes = np.array([len(self.bytes_of(i)) for i in range(self.vocab_size)])

    def bytes_of(self, i):
        """What one id writes, as bytes; nothing for a special token or an id beyond the vocabulary."""
        if i in self.special_ids.values() or i >= self.vocab_size:
            return b""
        if self.tik:
            return self.tik.decode_single_token_bytes(i)
        token, alphabet = self.hf.id_to_token(i), byte_of_char()
        if isinstance(self.hf.decoder, decoders.ByteLevel) and set(token) <= alphabet.keys():
            return bytes(alphabet[c] for c in token)
        return self.hf.decode([i]).encode()

    def encode(self, text):
        """str -> list of int, no special token among them, none added."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """list of str -> list of lists of int, on all cores."""
        if self.tik:
            return self.tik.encode_ordinary_batch(texts)
        return [e.ids for e in self.hf.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        """ids -> str: exact for what `encode` gave; a broken UTF-8 sequence becomes U+FFFD; specials are left out."""
        if self.tik:
            return b"".join(self.bytes_of(int(i)) for i in ids).decode("utf-8", errors="replace")
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=True)


def as_tiktoken(spec):
    """The tokenizer.json `spec` (a dict) as a `tiktoken.Encoding`, or None where tiktoken could give other ids.

    tiktoken merges the adjacent pair whose joined bytes have the lowest id; BPE, the pair whose merge was learned
    first. They agree when every token is what BPE makes of its own bytes, and ids rise in the order of the merges.
    """
    model, steps = spec["model"], spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    plain = (model["type"] == "BPE" and spec.get("normalizer") is None and not model.get("dropout")
             and not model.get("ignore_merges") and len(steps) == 2
             and steps[0]["type"] == "Split" and "Regex" in steps[0]["pattern"]
             and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
             and steps[1]["type"] == "ByteLevel" and not steps[1]["add_prefix_space"] and not steps[1]["use_regex"])
    if not plain:
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
    return tiktoken.Encoding("tokenizer.json", pat_str=steps[0]["pattern"]["Regex"],
                             mergeable_ranks=ranks, special_tokens={})
