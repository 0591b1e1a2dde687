"""Text to token ids and back; special tokens; what a document is; training a byte-level BPE.

A `Tokenizer` is made of texts: tokenizer.json, what tokenizer_config.json says, a chat template.
Where they lie in a folder is the concern of huggingface.py, whose `load_tokenizer` reads them.
A byte-level BPE that cuts text as ours does, with ids in merge order, encodes with `tiktoken`:
several times faster, with the same ids. Any other encodes with Hugging Face's `tokenizers`.

Not covered: chats with tools, `{% generation %}` in templates, and tokenizers that are not
byte-level for anything but encoding and decoding.
"""
import json
import re
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from configurator import Mistake, shortened
from files import write_json, write_text
from templates import render

SPECIALS = ("<bos>", "<eos>", "<mask>", "<pad>")  # our names, by id
KEYS = ("bos_token", "eos_token", "pad_token", "mask_token")  # of tokenizer_config.json
END_OF_TURN = (  # names of tokens that end an answer, whatever else a folder says
    "<|im_end|>",  # ChatML: Qwen2.5, Qwen3, Dream, DiffuCoder, CoDA, SDAR
    "<|eot_id|>",  # Llama 3, LLaDA; Seed-Coder's turns end with its eos_token
)
FIM_NAMES = (  # of prefix, suffix and middle, for filling in the middle; the first are added
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Qwen3
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),  # Seed-Coder
)
MULTIPLE = 8  # documents and windows are a multiple of so many tokens long; see `document_of`
LAYOUT = 2  # number of the rules by which documents are laid out; a change needs new data
MAX_IDS = 2**24  # ids in a vocabulary: the largest published ones have about 2^18

# How text is cut before BPE, in classes spelled out so that every regex engine reads them alike:
# \w, \s and \p{L} follow the Unicode version an engine was built with. A "letter" is A-Z, a-z, _
# and everything beyond ASCII.
LETTER = r"[^\x00-@\[-\^`\{-\x7f]"
SPACE = r"[ \t\n\r\x0b\x0c]"
SPLIT = "|".join([
    rf" ?{LETTER}+",                                 # a word, with the space before it
    r"[0-9]{1,3}",                                   # digits by threes: Llama 3 and Seed-Coder
    r" ?[\x00-\x08\x0e-\x1f!-/:-@\[-\^`\{-\x7f]+[\r\n]*",  # punctuation and the line's end
    rf"{SPACE}*[\r\n]+",                             # blank lines
    rf"{SPACE}+(?![^ \t\n\r\x0b\x0c])",              # indentation up to the word's own space
    rf"{SPACE}+",
])
# At a million spaces in a row tiktoken's regex engine gives up and panics, `tokenizers` does not.
MAX_SPACES = 100_000
THREAD_WORTH = 1000  # characters: encoding fewer takes tiktoken less than a thread's start does


def cut_at(regex):
    """The pre-tokenizer that cuts at a regex and writes the pieces' bytes as characters."""
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(texts, vocab_size):
    """Train a byte-level BPE: ids 0-3 are the specials, then 256 bytes, then merges in order.

    texts: iterable of str. vocab_size: how many ids in all, at least 4 + 256.
    Returns a `tokenizers.Tokenizer`. Raises Mistake for a vocab_size below 260.
    """
    if vocab_size < len(SPECIALS) + 256:
        raise Mistake(f"vocab_size={vocab_size} is too small: 4 special tokens and 256 bytes "
                      "need 260 or more")
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = cut_at(SPLIT)
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return hf


def byte_of_char():
    """{character: byte} of the byte-level alphabet: GPT-2 writes each byte as one character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable}
    for i, b in enumerate(others):
        byte_of[chr(256 + i)] = b
    return byte_of


# --- special tokens -------------------------------------------------------------------------------

def specials_of(hf):
    """{name: id} of the special tokens of a `tokenizers.Tokenizer`."""
    added = hf.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.special}


def name_specials(config, model_config, hf):
    """{"bos_token": its name or None, …} for KEYS.

    config, model_config: tokenizer_config.json, config.json as dicts.
    If tokenizer_config.json names any of them it decides, and what it leaves out or has as null is
    none: Qwen's documents have no bos, though its config.json has an id for one. Otherwise the ids
    in config.json decide, the first of several for eos. Otherwise the names are ours. Only a mask
    that is none so far may still be config.json's mask_token_id (Dream, CoDA).
    """
    by_id = {key: name_of_id(model_config.get(key + "_id"), hf) for key in KEYS}
    if any(key in config for key in KEYS):
        names = {key: config.get(key) for key in KEYS}
    elif any(by_id.values()):
        names = by_id
    else:
        ours = [name if name in specials_of(hf) else None for name in SPECIALS]
        names = dict(zip(("bos_token", "eos_token", "mask_token", "pad_token"), ours))
    return names | {"mask_token": names["mask_token"] or by_id["mask_token"]}


def name_of_id(i, hf):
    """The token of an id in config.json, or of the first of several; None for anything else."""
    if isinstance(i, list) and i:
        i = i[0]
    return hf.id_to_token(i) if type(i) is int and 0 <= i < MAX_IDS else None


# --- the tokenizer --------------------------------------------------------------------------------

class Tokenizer:
    """A tokenizer, ready to use. `huggingface.load_tokenizer` makes one of a folder.

    json: str, the tokenizer.json that `save` writes. folder: where it came from, for messages.
    vocab_size: int, the highest id + 1.
    special_ids: {name: id} of the tokens that are never read from a text.
    bos_id, eos_id, mask_id, pad_id: int, or None where there is none. bos_id begins a document: it
    is None too if tokenizer_config.json has `add_bos_token: false`. The tokenizer's post-processor
    (Llama 3's adds bos) is never run: callers prepend bos_id themselves.
    stop_ids: frozenset of the ids that end a text: eos_id, those that the folder calls an end, and
    the END_OF_TURN that it has. Never mask_id, nor a pad_id that is not eos_id.
    never_chosen: frozenset of the ids that decoding never writes: mask_id, and a pad_id that does
    not end a text, as Qwen's does.
    fim: (prefix id, suffix id, middle id), or None where the vocabulary lacks them.
    fim_trained: bool, whether the folder's model is known to have been trained with them.
    token_bytes: (vocab_size,) int64 numpy, bytes of text that each id stands for; 0 for specials
    and unused ids.
    """

    def __init__(self, json_text, config=None, chat_template=None, bos_token="", mask_token="",
                 model_config=None, folder="", generation_config=None, add_fim=False):
        """json_text: a tokenizer.json. config, model_config, generation_config: dicts of
        tokenizer_config.json, config.json and generation_config.json. chat_template: a template
        that goes before the one in `config`, or None. bos_token, mask_token: names to use instead
        of theirs. add_fim: the tokens of `fim` are needed. A special token that the vocabulary
        lacks is added at the next free id, bos before mask before fim.

        Raises Mistake for a text that is not a tokenizer.json and names that cannot be used.
        """
        self.folder = folder
        self.json = json_text
        self.jinja = chat_template
        self.config = dict(config or {})
        self.hf = self.call(tokenizers.Tokenizer.from_str, json_text)
        check_ids(self.hf, folder)
        model_config = model_config or {}
        self.set_specials(bos_token, mask_token, model_config, add_fim)
        self.hf.no_truncation()  # some published files cut every text, or pad it
        self.hf.no_padding()
        self.hf.encode_special_tokens = True  # "<eos>" in a text is five characters
        self.tik = as_tiktoken(self.hf)
        self.byte_level = isinstance(self.hf.decoder, decoders.ByteLevel)
        self.bytes = self.bytes_by_id()
        self.vocab_size = len(self.bytes)
        self.token_bytes = np.array([len(b) for b in self.bytes], dtype=np.int64)
        self.stop_ids = self.find_stop_ids(model_config, generation_config or {})
        self.never_chosen = frozenset({self.mask_id, self.pad_id} - {None, *self.stop_ids})
        self.fim_trained = model_config.get("fim_trained") is True

    def call(self, function, *args, **kwargs):
        """Call the library, which may raise bare exceptions and panics over a folder's file."""
        try:
            return function(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise Mistake(f"{self.folder}/tokenizer.json is not a readable tokenizer.json: "
                          f"{error}") from error

    def set_specials(self, bos_token, mask_token, model_config, add_fim):
        """Set the special tokens' ids; add missing tokens, to what `save` writes too."""
        names = name_specials(self.config, model_config, self.hf)
        for key, name in names.items():
            if name is not None and not isinstance(name, str):
                raise Mistake(f"{key}={shortened(name)} in {self.folder} is not a token's name")
            check_unicode(name or "")
        check_unicode(bos_token + mask_token)
        if bos_token:
            names["bos_token"] = bos_token
        if mask_token:
            names["mask_token"] = mask_token
            why = self.why_no_mask(mask_token, names)
            if why:
                raise Mistake(f"mask_token={mask_token!r} is {why} of {self.folder}: name a token "
                              "of its own; a new name, such as '<|mask|>', is added")
        elif self.why_no_mask(names["mask_token"], names):
            names["mask_token"] = None  # as if the folder named none
        for name in names.values():
            if name:
                self.add_special(name)
        fim_names = self.find_fim(names["mask_token"])
        if add_fim and fim_names is None:
            fim_names = FIM_NAMES[0]
            for name in fim_names:
                self.add_special(name)
        self.fim = None
        if fim_names is not None:
            self.fim = tuple(map(self.hf.token_to_id, fim_names))
        for key, name in names.items():
            if name != self.config.get(key):
                self.config[key] = name
        if bos_token and "add_bos_token" in self.config:
            self.config["add_bos_token"] = True
        self.special_ids = specials_of(self.hf)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (
            self.special_ids.get(names[key]) for key in KEYS)
        if self.config.get("add_bos_token") is False:
            self.bos_id = None

    def find_fim(self, mask_token):
        """The first of FIM_NAMES that the vocabulary has as added tokens, or None."""
        added = {token.content for token in self.hf.get_added_tokens_decoder().values()}
        added.discard(mask_token)  # it has another use
        return next((names for names in FIM_NAMES if added.issuperset(names)), None)

    def find_stop_ids(self, *configs):
        """See stop_ids. configs: dicts with an eos_token_id, which may hold anything."""
        found = [i for i, token in self.hf.get_added_tokens_decoder().items()
                 if token.content in END_OF_TURN]
        for config in configs:
            ids = config.get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
        stop_ids = {i for i in found if type(i) is int and 0 <= i < self.vocab_size}
        stop_ids -= {self.mask_id, self.pad_id}
        if self.eos_id is not None:
            stop_ids.add(self.eos_id)
        return frozenset(stop_ids)

    def why_no_mask(self, name, names):
        """Why a token cannot be the mask, in words, or None.

        A mask hides what stood there: it must not be a token that texts and documents hold.
        """
        for key in ("bos_token", "eos_token", "pad_token"):
            if name is not None and name == names[key]:
                return f"the {key}"
        added = {token.content for token in self.hf.get_added_tokens_decoder().values()}
        if name and name not in added and self.hf.token_to_id(name) is not None:
            return "an ordinary token"
        return None

    def add_special(self, name):
        """Make `name` a special token: the one of that name, or else the next free id."""
        if name in specials_of(self.hf):
            return
        vocab = self.hf.get_vocab()
        self.hf.add_special_tokens([AddedToken(name, normalized=False)])
        next_id = max(vocab.values(), default=-1) + 1
        if self.hf.token_to_id(name) != vocab.get(name, next_id):
            raise Mistake(f"{name} cannot be added to the vocabulary in {self.folder}: "
                          "its ids have gaps")
        self.json = self.hf.to_str(pretty=True)

    def bytes_by_id(self):
        """What each id writes, as a list of bytes."""
        vocab, added = self.hf.get_vocab(), self.hf.get_added_tokens_decoder()
        alphabet = byte_of_char()
        texts = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, i in vocab.items():
            if token in self.special_ids:
                continue
            if i in added:  # these are written as they are
                texts[i] = token.encode()
            elif self.byte_level and alphabet.keys() >= set(token):
                texts[i] = bytes(alphabet[c] for c in token)
            else:
                texts[i] = self.call(self.hf.decode, [i]).encode()
        return texts

    def bytes_of(self, i):
        """What one id writes, as bytes; nothing for a special token or an id not in use."""
        return self.bytes[i] if 0 <= i < self.vocab_size else b""

    def encode(self, text):
        """str -> list of int, no special token among them, none added. Uses one thread.

        An added token that is not special (Qwen's <tool_call>, Qwen2.5-Coder's <|fim_prefix|>) is
        one id wherever its name stands in a text, as in transformers with
        `split_special_tokens=True`. Raises Mistake for a text that is not Unicode.
        """
        check_unicode(text)
        if self.tik and not has_long_blank(text):
            return self.tik.encode_ordinary(text)
        return self.call(self.hf.encode, text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """list of str -> list of lists of int, on all cores. See `encode`."""
        for text in texts:
            check_unicode(text)
        long = sum(map(len, texts)) > THREAD_WORTH * len(texts)
        if self.tik and long and not any(map(has_long_blank, texts)):
            return self.tik.encode_ordinary_batch(texts)
        if self.tik:
            return [self.encode(text) for text in texts]
        return [e.ids for e in self.call(self.hf.encode_batch, texts, add_special_tokens=False)]

    def decode(self, ids):
        """ids -> str: what `encode` read, normalized (Qwen: NFC); specials are left out.

        Broken UTF-8 becomes U+FFFD.
        """
        if self.byte_level:
            text = b"".join(self.bytes_of(int(i)) for i in ids)
            return text.decode("utf-8", errors="replace")
        return self.call(self.hf.decode, [int(i) for i in ids], skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """Messages -> list of int: `render` and `encode_rendered`."""
        return self.encode_rendered([self.render(messages, add_generation_prompt)])[0]

    def render(self, messages, add_generation_prompt=True):
        """Messages -> str, as the chat template writes them, names of special tokens included.

        messages: list of {"role": str, "content": str}. add_generation_prompt: go on to where the
        assistant's answer begins. Raises Mistake where there is no template or it fails; see
        templates.render.
        """
        template = self.jinja or self.config.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[-1].get("template") if named else None
        if not template:
            raise Mistake(f"the tokenizer in {self.folder} has no chat template")
        if not isinstance(template, str):
            raise Mistake(f"chat_template={shortened(template)} in {self.folder} is not a text")
        if not messages:
            raise Mistake("a chat has no messages")
        values = {key: name for key, name in self.config.items()
                  if key.endswith("_token") and isinstance(name, str)}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt,
                   "tools": None, "documents": None}
        try:
            text = render(template, values)
            check_unicode(text)
        except Mistake as error:
            raise Mistake(f"the chat template in {self.folder} refuses these messages: "
                          f"{error}") from error
        return text

    def encode_rendered(self, texts):
        """list of str -> list of lists of int; a special token's name is that token.

        As in transformers, also where a message has the name. See `render`.
        """
        self.hf.encode_special_tokens = False
        try:
            return [e.ids for e in self.call(self.hf.encode_batch, texts, add_special_tokens=False)]
        finally:
            self.hf.encode_special_tokens = True

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json and any chat_template.jinja.

        They load as this tokenizer here and in transformers' AutoTokenizer.
        folder: an existing one.
        """
        folder = Path(folder)
        write_text(folder / "tokenizer.json", self.json)
        write_json(folder / "tokenizer_config.json", self.config)
        if self.jinja is None:
            (folder / "chat_template.jinja").unlink(missing_ok=True)  # another tokenizer's
        else:
            write_text(folder / "chat_template.jinja", self.jinja)


# --- documents ------------------------------------------------------------------------------------

def document_of(tok, ids):
    """A document as it is trained on: <bos> where there is one, its tokens, then <eos>.

    At least one <eos>, and more until the length is a multiple of MULTIPLE. A block model of block
    size K cannot learn to stop in the middle of a block unless it sees blocks that end in <eos>.
    K divides MULTIPLE, so the last block of a document is full, and its text ends anywhere in it.
    ids: list of int. Returns a list of int.
    """
    bos = [] if tok.bos_id is None else [tok.bos_id]
    filling = MULTIPLE - (len(bos) + len(ids)) % MULTIPLE  # 1 to MULTIPLE
    return [*bos, *ids, *[tok.eos_id] * filling]


def fim_prompt(tok, prefix_ids, suffix_ids):
    """What stands before the middle of a text whose both sides are known.

    Suffix, prefix, middle (SPM in Bavarian et al. 2022, arXiv 2207.14255): the middle follows the
    prefix as it does in the text. tok.fim must not be None. Returns a list of int.
    """
    bos = [] if tok.bos_id is None else [tok.bos_id]
    prefix, suffix, middle = tok.fim
    return [*bos, suffix, *suffix_ids, prefix, *prefix_ids, middle]


# --- files and texts ------------------------------------------------------------------------------

def dtype_for(vocab_size):
    """The type of token ids in a data folder's .bin files."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def check_ids(hf, folder):
    """Raise Mistake for ids so high that a table of them would not fit into memory."""
    highest = max(hf.get_vocab().values(), default=0)
    if highest >= MAX_IDS:
        raise Mistake(f"{folder}/tokenizer.json has a token with id {highest}: ids are below "
                      f"{MAX_IDS:,} here")


def check_unicode(text):
    """Raise Mistake for a text that UTF-8 cannot hold: one with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Mistake(f"the text is not Unicode: character {error.start} is "
                      f"{text[error.start]!a}, a lone surrogate") from error


def has_long_blank(text):
    """Whether so many spaces follow each other that tiktoken may panic."""
    if len(text) <= MAX_SPACES:
        return False
    return any(len(blank[0]) > MAX_SPACES for blank in re.finditer(SPACE + "+", text))


def as_tiktoken(hf):
    """A `tokenizers.Tokenizer` as a `tiktoken.Encoding`, or None where ids could differ.

    Only for a tokenizer that cuts at SPLIT: which letters, digits and spaces a published regex
    matches follows the Unicode version of the regex engine, and tiktoken's is not that of
    `tokenizers`. tiktoken merges the adjacent pair whose joined bytes have the lowest id; BPE, the
    pair whose merge was learned first. They agree when every token is what BPE makes of its own
    bytes, and ids rise in the order of the merges.
    """
    spec = json.loads(hf.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("ignore_merges"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if spec["normalizer"]:
        return None
    if spec["pre_tokenizer"] != json.loads(cut_at(SPLIT).__getstate__()):
        return None
    if not all(token["special"] for token in spec["added_tokens"]):
        return None
    vocab, alphabet = model["vocab"], byte_of_char()
    merges = [tuple(pair) for pair in model["merges"]]
    made = [vocab["".join(pair)] for pair in merges]
    if any(a >= b for a, b in zip(made, made[1:])):
        return None
    specials = {token["content"] for token in spec["added_tokens"]}
    plain = {token: i for token, i in vocab.items() if token not in specials}
    if not all(alphabet.keys() >= set(token) for token in plain):
        return None
    bpe = models.BPE(vocab=vocab, merges=merges)
    if any(len(bpe.tokenize(token)) != 1 for token in plain):
        return None  # a token that other merges would take apart
    ranks = {bytes(alphabet[c] for c in token): i for token, i in plain.items()}
    if len(ranks) != 256 + len(merges) or not all(bytes([b]) in ranks for b in range(256)):
        return None
    return tiktoken.Encoding("tokenizer.json", pat_str=SPLIT, mergeable_ranks=ranks,
                             special_tokens={})
