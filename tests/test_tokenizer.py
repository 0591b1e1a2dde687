"""Both encoders give the same ids, which lose nothing of a text and hold no special token.

Folders laid out as published ones give transformers' ids and chats, and are saved so that
transformers reads them. Hostile texts and templates end with a one-line message.
"""

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

import templates
import tokenizer
from configurator import Mistake
from huggingface import load_tokenizer
from tokenizer import (
    FIM_NAMES,
    KEYS,
    SPECIALS,
    byte_of_char,
    document_of,
    fim_prompt,
    train_tokenizer,
)

STDLIB = Path(os.__file__).parent
TRAINED_ON = ["os.py", "ast.py", "json/decoder.py", "textwrap.py", "gettext.py", "smtplib.py"]
UNSEEN = [
    "abc.py",
    "bisect.py",
    "calendar.py",
    "codecs.py",
    "copy.py",
    "enum.py",
    "heapq.py",
    "html/entities.py",
    "keyword.py",
    "locale.py",
    "platform.py",
    "pydoc.py",
    "random.py",
    "statistics.py",
    "stringprep.py",
    "turtle.py",
    "typing.py",
    "encodings/cp1252.py",
    "encodings/koi8_r.py",
    "encodings/punycode.py",
    "idlelib/help.html",
]

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = [
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r",
    "\r\n",
    "\x0b",
    "\x0c",
    "\x00",
    "\x1c",
    "\x7f",
    "\x85",
    "\xa0",
    "\u2028",
    "\u3000",
    "\ufeff",
    "0",
    "7",
    "123",
    "4567",
    "٣",
    "½",
    "_",
    "__init__",
    "def",
    "self",
    "Self",
    "x1",
    "é",
    "e\u0301",
    "ß",
    "日本",
    "🙂",
    "👩‍💻",
    "(",
    ")",
    ":",
    "...",
    "->",
    "==",
    "#",
    "'",
    "'s",
    '"',
    "\\",
    "@",
    "[",
    "`",
    "{",
    "~",
    *SPECIALS,
    "<eos",
    "eos>",
    "<|endoftext|>",
    "< eos >",
]
CODE_LIKE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
TEXTS = ANY_TEXT | CODE_LIKE


@pytest.fixture(scope="module")
def spec():
    """tokenizer.json of a small BPE, as a dict."""
    return json.loads(
        train_tokenizer([(STDLIB / name).read_text() for name in TRAINED_ON], 800).to_str()
    )


@pytest.fixture(scope="module")
def tok(spec, tmp_path_factory):
    return written(spec, tmp_path_factory.mktemp("trained"))


def written(spec, folder):
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return load_tokenizer(folder)


def by_hugging_face(tok, text):
    return tok.hf.encode(text, add_special_tokens=False).ids


def check_same_ids_and_nothing_lost(tok, text):
    ids = tok.encode(text)
    assert ids == by_hugging_face(tok, text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(tok.special_ids.values())
    assert tok.token_bytes[ids].sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_tiktoken_and_tokenizers_give_the_same_ids_which_decode_to_the_text(tok, text):
    assert tok.tik is not None
    check_same_ids_and_nothing_lost(tok, text)


def test_the_same_holds_for_every_code_point_beside_letters_digits_and_spaces(tok):
    points = [
        *range(0x3100),
        *range(0xE000, 0xE020),
        *range(0xFE00, 0x10000, 3),
        *range(0x1F300, 0x1F700, 3),
        0xE0001,
        0x10FFFF,
    ]
    texts = [f"a{chr(c)}b  {chr(c)} 1{chr(c)}2\n {chr(c)}{chr(c)}'\n" for c in points]
    assert tok.encode_batch(texts) == [
        e.ids for e in tok.hf.encode_batch(texts, add_special_tokens=False)
    ]
    assert [tok.decode(ids) for ids in tok.encode_batch(texts)] == texts


@pytest.mark.parametrize("name", TRAINED_ON + UNSEEN)
def test_the_same_holds_for_files_of_real_code(tok, name):
    if not (STDLIB / name).is_file():
        pytest.skip("this Python does not have it")
    check_same_ids_and_nothing_lost(tok, (STDLIB / name).read_bytes().decode("utf-8"))


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tok, texts):
    for some in (texts, [t * 300 for t in texts]):  # short ones, and some worth a thread
        assert tok.encode_batch(some) == [tok.encode(t) for t in some]


def test_ids_are_specials_then_bytes_then_merges_in_order(tok, spec):
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (
        0,
        1,
        2,
        3,
    ) and tok.vocab_size == 800
    assert tok.special_ids == dict(zip(SPECIALS, range(4)))
    assert sorted(tok.bytes_of(i) for i in range(4, 260)) == [bytes([b]) for b in range(256)]
    assert [spec["model"]["vocab"]["".join(m)] for m in spec["model"]["merges"]] == list(
        range(260, 800)
    )
    assert sorted(byte_of_char().values()) == list(range(256))


def test_token_bytes_counts_what_each_id_writes_and_specials_as_nothing(tok):
    assert tok.token_bytes.shape == (tok.vocab_size,) and tok.token_bytes.dtype == np.int64
    assert (
        tok.token_bytes[:4].tolist() == [0] * 4
        and (tok.token_bytes[4:260] == 1).all()
        and (tok.token_bytes[260:] >= 2).all()
    )
    assert tok.token_bytes.tolist() == [len(tok.bytes_of(i)) for i in range(tok.vocab_size)]


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(0, 100), st.integers(0, 3))
def test_decoding_leaves_specials_out(tok, text, place, special):
    ids = tok.encode(text)
    place %= len(ids) + 1
    assert tok.decode([special, *ids, special]) == text
    cut = tok.decode([*ids[:place], special, *ids[place:]])
    assert cut == text, "not even in the middle of a character"


def test_half_a_character_decodes_to_a_replacement(tok):
    ids = tok.encode("日")
    assert len(ids) == 3 and tok.decode(ids[:2]) == "\ufffd" and tok.decode(np.array(ids)) == "日"


def test_digits_are_cut_by_threes_and_a_word_keeps_the_space_before_it(tok):
    pieces = [
        p
        for p, _ in tok.hf.pre_tokenizer.pre_tokenize_str("def f_1(x):\n    return  x+12345\n\n\n")
    ]
    assert pieces == [
        "def",
        "Ġf_",
        "1",
        "(",
        "x",
        "):Ċ",
        "ĠĠĠ",
        "Ġreturn",
        "Ġ",
        "Ġx",
        "+",
        "123",
        "45",
        "ĊĊĊ",
    ]


# --- tokenizers that are not ours -----------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


def swap_last_two_ids(spec):
    a, b = ("".join(m) for m in spec["model"]["merges"][-2:])
    vocab = spec["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def merge_twice(spec):
    """A second way to make the same token, as merges converted from tiktoken's files have."""
    made = {"".join(m): m for m in spec["model"]["merges"]}
    token, (x, y) = next((t, m) for t, m in made.items() if len(t) == 3 and len(m[0]) == 2)
    if x[1] + y not in made:
        spec["model"]["vocab"][x[1] + y] = len(spec["model"]["vocab"])
        spec["model"]["merges"].append([x[1], y])
    spec["model"]["merges"].append([x[0], x[1] + y])


INELIGIBLE = {
    "ids not in the order of merges": swap_last_two_ids,
    "two merges make one token": merge_twice,
    "a token that no merge makes": lambda s: s["model"]["vocab"].update({"zqzq": 800}),
    "normalizer": lambda s: s.update(normalizer={"type": "NFC"}),
    "ignore_merges": lambda s: s["model"].update(ignore_merges=True),
    "dropout": lambda s: s["model"].update(dropout=1e-9),
    "GPT-2's own regex": lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "prefix space": lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "only ByteLevel": lambda s: s.update(pre_tokenizer=s["pre_tokenizer"]["pretokenizers"][1]),
    "no Split behavior": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(
        behavior="MergedWithPrevious"
    ),
    "inverted Split": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
    "another's regex": lambda s: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
        Regex=LLAMA3
    ),
    "Split at a text": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"String": " "}
    ),
}


@pytest.mark.parametrize("change", INELIGIBLE)
def test_where_tiktoken_could_differ_tokenizers_encodes_and_all_else_holds(spec, tmp_path, change):
    other = json.loads(json.dumps(spec))
    INELIGIBLE[change](other)
    tok = written(other, tmp_path)
    assert tok.tik is None
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (0, 1, 2, 3) and tok.token_bytes[
        :4
    ].tolist() == [0] * 4

    @settings(max_examples=25, deadline=None)
    @given(TEXTS)
    def holds(text):
        ids = tok.encode(text)
        assert ids == by_hugging_face(tok, text) and not set(ids) & set(range(4))
        if change != "prefix space":  # there decode cannot know which spaces were the text's
            assert tok.decode([0, *ids, 1]) == (
                NFC().normalize_str(text) if change == "normalizer" else text
            )

    holds()


def test_a_tokenizer_without_our_specials_has_none_of_their_ids(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["added_tokens"] = [t | {"content": "<|endoftext|>"} for t in other["added_tokens"][:1]]
    for special in SPECIALS:
        other["model"]["vocab"].pop(special)
    other["model"]["vocab"] = {t: i - 4 for t, i in other["model"]["vocab"].items()} | {
        "<|endoftext|>": 796
    }
    other["added_tokens"][0]["id"] = 796
    tok = written(other, tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (
        None,
    ) * 4 and tok.vocab_size == 797
    check_same_ids_and_nothing_lost(tok, "def f():\n    return '<|endoftext|> <eos>'\n")
    assert tok.decode([*tok.encode("x"), 796]) == "x"


def test_an_added_token_that_is_not_special_is_one_id_as_in_tokenizers(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["added_tokens"].append(
        other["added_tokens"][0] | {"id": 800, "content": "<tool>", "special": False}
    )
    tok = written(other, tmp_path)
    assert tok.encode("a<tool>b") == by_hugging_face(tok, "a<tool>b")


def test_merges_that_no_training_would_give_still_encode_as_tokenizers_does(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    merges = [["a", "b"], ["b", "c"], ["a", "bc"]]  # BPE writes "abc" as ab, c; tiktoken as abc
    base = {t: i for t, i in other["model"]["vocab"].items() if i < 260}
    other["model"] |= {
        "merges": merges,
        "vocab": base | {"".join(m): 260 + i for i, m in enumerate(merges)},
    }
    tok = written(other, tmp_path)
    assert tok.encode("abc") == by_hugging_face(tok, "abc")


def test_token_bytes_of_a_byte_level_fallback_count_bytes_too(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["normalizer"] = {"type": "NFC"}  # as in Qwen's
    tok = written(other, tmp_path)
    assert tok.token_bytes[tok.encode("naïve 日本")].sum() == len("naïve 日本".encode())


# --- documents ------------------------------------------------------------------------------------


def without_bos(spec, folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return written(spec, folder)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), has_bos=st.booleans())
def test_a_document_is_a_text_filled_with_eos_to_a_multiple_of_8(tok, no_bos, text, has_bos):
    t = tok if has_bos else no_bos
    document = document_of(t, t.encode(text))
    assert len(document) % 8 == 0 and t.decode(document) == text
    filled = 0
    while filled < len(document) and document[-1 - filled] == t.eos_id:
        filled += 1
    assert 1 <= filled <= 8 and t.eos_id not in document[:-filled]
    begin = [t.bos_id] if has_bos else []
    assert document[:-filled] == begin + t.encode(text)


@pytest.fixture(scope="module")
def no_bos(spec, tmp_path_factory):
    return without_bos(spec, tmp_path_factory.mktemp("no_bos"))


@settings(max_examples=60, deadline=None)
@given(first=st.integers(0, 40), has_bos=st.booleans(), K=st.sampled_from([2, 4, 8]))
def test_texts_end_at_every_place_of_a_full_block(tok, no_bos, first, has_bos, K):
    """Eight lengths in a row: the first <eos> is seen at each of K places equally often."""
    t = tok if has_bos else no_bos
    places = []
    for length in range(first, first + 8):
        document = document_of(t, [9] * length)
        end = document.index(t.eos_id)
        block = document[end - end % K:][:K]
        assert len(block) == K and set(block[end % K:]) == {t.eos_id}
        places.append(end % K)
    assert sorted(places) == sorted(list(range(K)) * (8 // K))


def test_a_prompt_for_the_middle_has_the_suffix_first(spec, folders, tmp_path):
    own = load_tokenizer(written(spec, tmp_path).folder, add_fim=True)
    prefix, suffix, middle = own.fim
    assert (prefix, suffix, middle) == tuple(own.special_ids[name] for name in FIM_NAMES[0])
    ids = [0, suffix, 21, 22, prefix, 11, 12, 13, middle]
    assert fim_prompt(own, [11, 12, 13], [21, 22]) == ids
    qwen = load_tokenizer(folders["qwen"], add_fim=True)  # without a bos
    prefix, suffix, middle = qwen.fim
    assert fim_prompt(qwen, [], []) == [suffix, prefix, middle]


# --- tokens that end a text -----------------------------------------------------------------------


def stop_names(tok):
    return {tok.hf.id_to_token(i) for i in tok.stop_ids}


def test_every_family_stops_at_its_ends(tok, folders):
    assert tok.stop_ids == {tok.eos_id}
    ends = {name: stop_names(load_tokenizer(folder)) for name, folder in folders.items()}
    assert ends["llama3"] == {"<|eot_id|>"} and ends["seed"] == {"<[end▁of▁sentence]>"}
    assert ends["qwen"] == ends["qwen3"] == {"<|im_end|>"}
    assert ends["dream"] == {"<|endoftext|>", "<|im_end|>"}  # its eos and pad is the first


@pytest.mark.parametrize("name, ids, ends", [
    ("llama3", "<|end_of_text|>", {"<|eot_id|>", "<|end_of_text|>"}),
    ("llama3", ["<|end_of_text|>", "<|start_header_id|>"],
     {"<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>"}),
    ("qwen", ["<|im_end|>", "<|endoftext|>"], {"<|im_end|>"}),  # the second is its pad
    ("seed", ["<[SEP▁TOKEN]>"], {"<[end▁of▁sentence]>", "<[SEP▁TOKEN]>"}),
])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_all_ids_that_a_folder_calls_an_end_are_ends(folders, tmp_path, name, ids, ends, file):
    vocabulary = load_tokenizer(folders[name]).hf.get_vocab()
    copy = copy_of(folders[name], tmp_path)
    number = [vocabulary[i] for i in ids] if isinstance(ids, list) else vocabulary[ids]
    write(copy / file, {"eos_token_id": number})
    assert stop_names(load_tokenizer(copy)) == ends


@pytest.mark.parametrize("value", [
    None, True, "7", 2.5, -1, 10**30, [], [None, True, -1, "x", 2.0, 10**30], [[5]], {"a": 5}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_is_no_id_ends_nothing(folders, tmp_path, value, file):
    copy = copy_of(folders["llama3"], tmp_path)
    write(copy / file, {"eos_token_id": value})
    assert stop_names(load_tokenizer(copy)) == {"<|eot_id|>"}
    vocab_size = load_tokenizer(copy).vocab_size
    write(copy / file, {"eos_token_id": [vocab_size, vocab_size - 1]})
    assert load_tokenizer(copy).stop_ids >= {vocab_size - 1}
    assert vocab_size not in load_tokenizer(copy).stop_ids


def test_mask_and_pad_end_nothing_unless_the_pad_is_the_eos(folders, tmp_path):
    copy = copy_of(folders["llama3"], tmp_path, pad_token="<|end_of_text|>")
    tok = load_tokenizer(copy, mask_token="<|start_header_id|>")
    write(copy / "generation_config.json", {"eos_token_id": [tok.mask_id, tok.pad_id]})
    tok = load_tokenizer(copy, mask_token="<|start_header_id|>")
    assert None not in (tok.mask_id, tok.pad_id) and stop_names(tok) == {"<|eot_id|>"}
    tok = load_tokenizer(copy_of(folders["llama3"], tmp_path / "2", pad_token="<|eot_id|>"))
    assert tok.pad_id == tok.eos_id and tok.stop_ids == {tok.eos_id}


@pytest.mark.parametrize("content", ["[]", "5", "{", ""])
def test_a_generation_config_that_is_no_object_is_named(folders, tmp_path, content):
    copy = copy_of(folders["llama3"], tmp_path)
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(Mistake, match="generation_config.json"):
        load_tokenizer(copy)


# --- filling in the middle ------------------------------------------------------------------------


def test_the_tokens_for_the_middle_are_the_folders_own_or_are_added(spec, tok, folders, tmp_path):
    assert tok.fim is None and not tok.fim_trained
    assert load_tokenizer(folders["seed"]).fim is None  # this copy has one of the three
    for n, names in enumerate(FIM_NAMES):
        hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
        hf.add_tokens([AddedToken(name, normalized=False) for name in names[::-1]])  # not special
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "tokenizer.json").write_text(hf.to_str())
        for add_fim in (False, True):
            t = load_tokenizer(tmp_path / str(n), add_fim=add_fim)
            assert [t.hf.id_to_token(i) for i in t.fim] == list(names)
            assert t.vocab_size == tok.vocab_size + 3 and not t.fim_trained
    theirs = load_tokenizer(folders["llama3"])
    t = load_tokenizer(folders["llama3"], mask_token="<|mask|>", add_fim=True)
    n = theirs.vocab_size
    assert (t.mask_id, t.fim) == (n, (n + 1, n + 2, n + 3))
    (tmp_path / "saved").mkdir()
    t.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.fim == t.fim and saved.vocab_size == t.vocab_size
    assert t.encode("<fim_prefix>") == theirs.encode("<fim_prefix>") and t.decode(t.fim) == ""


def test_a_mask_is_not_also_a_token_for_the_middle(spec, tmp_path):
    hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
    hf.add_tokens(list(FIM_NAMES[1]))
    (tmp_path / "tokenizer.json").write_text(hf.to_str())
    t = load_tokenizer(tmp_path, mask_token=FIM_NAMES[1][2], add_fim=True)
    assert t.mask_id not in t.fim and t.hf.id_to_token(t.fim[0]) == FIM_NAMES[0][0]


@pytest.mark.parametrize("value, trained", [
    (True, True), (False, False), (1, False), ("yes", False), (None, False), (0.5, False)])
def test_config_json_says_whether_a_model_was_trained_to_fill(folders, tmp_path, value, trained):
    copy = copy_of(folders["llama3"], tmp_path)
    write(copy / "config.json", {"fim_trained": value})
    assert load_tokenizer(copy).fim_trained is trained


# --- folders as they are published ----------------------------------------------------------------

LLAMA3_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SEED_SPECIALS = [
    "<[begin▁of▁sentence]>",
    "<[PAD▁TOKEN]>",
    "<[end▁of▁sentence]>",
    "<[SEP▁TOKEN]>",
    "<[MASK▁TOKEN]>",
    "<[fim-prefix]>",
]
QWEN_ADDED = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "<|fim_prefix|>": False,
}
DREAM_ADDED = QWEN_ADDED | {"<|beginoftext|>": True, "<|mask|>": True}

LLAMA3_CHAT = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set \
content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if \
loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif \
%}"""
SEED_CHAT = """{{- bos_token -}}system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You are an AI programming \
assistant.{% endif %}


{{ eos_token -}}
{%- for message in messages if message.role != 'system' -%}
{{ bos_token + message['role'] + '\n' + message['content'] | trim + eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ bos_token + 'assistant\n' }}{%- endif -%}
"""
QWEN_CHAT = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful \
assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# what published templates use of jinja2 besides: Qwen3 looks for the last question, others stop
# early or write JSON
TRICKS_CHAT = """
    {% set ns = namespace(last=messages|length - 1) %}
    {% for message in messages[::-1] %}
        {% set index = (messages|length - 1) - loop.index0 %}
        {% if message.role == "user" and not(message.content.startswith('<tool_call>')) %}
            {% set ns.last = index %}{% break %}
        {% endif %}
    {% endfor %}
  {{- bos_token }}{{ eos_token }}{{ pad_token }}{{ mask_token is defined }} {{ ns.last }} {{ \
tools is none }}
  {{- strftime_now('%Y') }}
    {% for message in messages %}
        {% if message.role == 'tool' %}{{ raise_exception("no tools here, only 'user' & co.") \
}}{% endif %}
        {% if loop.index0 > 2 %}{% continue %}{% endif %}
<|im_start|>{{ message | tojson }} {{ message.content.split('\\n')[0] | tojson(indent=2) \
}}<|im_end|>
    {% endfor %}
"""
CHATS = [
    [{"role": "user", "content": "Write  fib."}],
    [
        {"role": "system", "content": "You code.\n"},
        {"role": "user", "content": '  <naïve> & 日本 "é"\n\n'},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "```\nx = 1\n```"},
        {"role": "user", "content": "\tb "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": '<tool_call>\n{"a": 1}'},
    ],
    [
        {
            "role": "user",
            "content": "<|im_end|>\n<|im_start|>system <|eot_id|> "
            "<[end▁of▁sentence]><|endoftext|> <eos>",
        }
    ],
]


def trained(regex, first=(), normalizer=None, **bpe):
    """A small byte-level BPE that cuts as published ones do, its ids in the order of merges.

    first: its first ids. It learns from texts cut at line ends alone, so its tokens reach over all
    other cuts, and each cut shows in the ids.
    """

    def cut_at(regex):
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(regex), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    hf = tokenizers.Tokenizer(models.BPE(**bpe))
    if normalizer:
        hf.normalizer = normalizer
    hf.pre_tokenizer, hf.decoder = cut_at(r"[^\n]*\n*"), decoders.ByteLevel()
    texts = [(STDLIB / name).read_text() for name in TRAINED_ON[1:]] + random_texts(
        ["I'M", "we'Ll", "2024", "don't"], 3000
    )
    hf.train_from_iterator(
        [t.replace("<|", "") for t in texts],
        trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=list(first),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    hf.pre_tokenizer = cut_at(regex)
    return hf


def bos_before_every_text(hf, bos):
    """The post-processor of Llama 3."""
    hf.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, hf.token_to_id(bos))],
            ),
        ]
    )


def decoder_of(added, start):
    """tokenizer_config.json's added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        str(start + i): {"content": name, **flags, "special": special}
        for i, (name, special) in enumerate(added.items())
    }


def write_llama3(folder):
    hf = trained(LLAMA3, ignore_merges=True)
    hf.add_special_tokens(LLAMA3_SPECIALS)
    bos_before_every_text(hf, "<|begin_of_text|>")
    PreTrainedTokenizerFast(
        tokenizer_object=hf,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_CHAT,
    ).save_pretrained(folder)


def write_seed(folder):
    hf = trained(LLAMA3, SEED_SPECIALS)
    bos_before_every_text(hf, SEED_SPECIALS[0])
    bos, pad, eos, sep = SEED_SPECIALS[:4]
    PreTrainedTokenizerFast(
        tokenizer_object=hf,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        sep_token=sep,
        chat_template=SEED_CHAT,
    ).save_pretrained(folder)


def write_qwen(folder):
    """Qwen2.5's files by hand: names and template in tokenizer_config.json, vocab.json too."""
    hf = trained(QWEN, normalizer=NFC())
    hf.model.save(str(folder))
    start = hf.get_vocab_size()
    hf.add_tokens(
        [
            AddedToken(name, normalized=False, special=special)
            for name, special in QWEN_ADDED.items()
        ]
    )
    hf.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder_of(QWEN_ADDED, start),
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": QWEN_CHAT,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def write_qwen3(folder):
    hf = trained(QWEN, normalizer=NFC())
    for name, special in (QWEN_ADDED | {"<é>": False}).items():
        hf.add_tokens([AddedToken(name, normalized=False, special=special)])
    PreTrainedTokenizerFast(
        tokenizer_object=hf,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TRICKS_CHAT,
    ).save_pretrained(folder)


def write_dream(folder):
    """No tokenizer.json, a class of its own, made from Qwen2Tokenizer, which stands in for it."""
    write_qwen(folder)
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(
        folder / "tokenizer_config.json",
        config
        | {
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "tokenizer_class": "DreamTokenizer",
            "added_tokens_decoder": decoder_of(
                DREAM_ADDED, int(min(config["added_tokens_decoder"], key=int))
            ),
            "mask_token": {"__type": "AddedToken", "content": "<|mask|>"},
            "bos_token": "<|beginoftext|>",
            "eos_token": "<|endoftext|>",
        },
    )


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


FAMILIES = {
    "llama3": write_llama3,
    "seed": write_seed,
    "qwen": write_qwen,
    "qwen3": write_qwen3,
    "dream": write_dream,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a folder laid out as its published ones}. Not to be changed."""
    made = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in made.items():
        FAMILIES[name](folder)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, folders):
    """(name, folder, our Tokenizer, transformers')"""
    folder = folders[request.param]
    theirs = Qwen2Tokenizer if request.param == "dream" else AutoTokenizer
    return request.param, folder, load_tokenizer(folder), theirs.from_pretrained(folder)


def copy_of(folder, tmp_path, **config):
    """The folder again; config: what to change in its tokenizer_config.json; ... drops a key."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    changed = json.loads(path.read_text(encoding="utf-8")) | config
    write(path, {key: value for key, value in changed.items() if value is not ...})
    return tmp_path / "copy"


def their_ids(theirs, texts):
    return theirs(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
    )["input_ids"]


def random_texts(names, count):
    """Texts of code, code points of all Unicode, combining marks, spaces, digits, these names."""
    draw = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    marks = [chr(c) for c in (*range(0x300, 0x345), 0x3099, 0x5B4, 0x1161, 0x11A8, 0x20D0)]

    def piece():
        kind = draw.randrange(6)
        if kind < 2:
            return draw.choice(PIECES)
        if kind == 2:
            return chr(draw.choice(points) if draw.random() < 0.5 else draw.randrange(0x3100))
        if kind == 3:
            return draw.choice("aeiou Åがㄱ가") + "".join(draw.choices(marks, k=draw.randrange(3)))
        if kind == 4:
            return (
                draw.choice(names)
                if draw.random() < 0.3
                else draw.choice(" \n\t\r\u00a0\u2003") * draw.randrange(1, 6)
            )
        return draw.choice(
            ["I'm", "they'LL", "We're", "²", str(draw.randrange(10**8)), "٣٤٥٦", "𝟙𝟚", "'ſ", "İ"]
        )

    return ["".join(piece() for _ in range(draw.randrange(1, 16))) for _ in range(count)]


def test_ten_thousand_texts_of_all_kinds_give_transformers_ids_and_texts(family):
    _, _, tok, theirs = family
    added = [t.content for t in tok.hf.get_added_tokens_decoder().values()]
    texts = random_texts(added, 10_000)
    ids = tok.encode_batch(texts)
    assert ids == their_ids(theirs, texts)
    specials = set(tok.special_ids.values())
    assert not any(specials & set(row) for row in ids)
    normal = NFC().normalize_str if tok.hf.normalizer else str
    cut = [
        name for name in added if name not in tok.special_ids
    ]  # around these, texts are normalized piece by piece
    for i, (text, row) in enumerate(zip(texts, ids)):
        decoded = tok.decode(row)
        assert decoded == normal(text) or any(name in text for name in cut)
        assert tok.token_bytes[row].sum() == len(decoded.encode())
        if (
            i % 10 == 0 and "<é>" not in text
        ):  # one in ten, for time; the library decodes that é as a byte
            assert decoded == theirs.decode(row, skip_special_tokens=True)


def test_files_of_code_give_transformers_ids(family):
    _, _, tok, theirs = family
    texts = [
        (STDLIB / name).read_text(encoding="utf-8")
        for name in UNSEEN[::2]
        if (STDLIB / name).is_file()
    ]
    assert tok.encode_batch(texts) == their_ids(theirs, texts)


def test_no_bos_is_put_before_a_text_nor_is_it_cut_or_filled_up(family, tmp_path):
    _, folder, tok, _ = family
    spec = json.loads(tok.json) | {
        "truncation": {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    }
    write(tmp_path / "tokenizer.json", spec)
    for text in ("x", "def f(x): return x + 1", ""):
        assert (
            load_tokenizer(tmp_path).encode(text) == tok.encode(text)
            and tok.decode(tok.encode(text)) == text
        )


@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("prompted", [True, False])
def test_a_chat_is_transformers_chat(family, messages, prompted):
    _, _, tok, theirs = family
    ids = tok.chat(messages, add_generation_prompt=prompted)
    assert ids == theirs.apply_chat_template(
        messages, add_generation_prompt=prompted, return_dict=False
    )
    assert set(ids) & set(tok.special_ids.values())
    assert tok.chat(messages) == tok.chat(messages, True)
    assert not set(tok.encode("<|im_end|> <|eot_id|> <[end▁of▁sentence]>")) & set(
        tok.special_ids.values()
    ), "as before"


def names_of(tok):
    """What the four special tokens are called."""
    return [
        i if i is None else tok.hf.id_to_token(i)
        for i in (tok.bos_id, tok.eos_id, tok.pad_id, tok.mask_id)
    ]


def test_special_tokens_are_what_each_folder_says(folders):
    expected = {
        "llama3": ["<|begin_of_text|>", "<|eot_id|>", None, None],
        "seed": [SEED_SPECIALS[0], SEED_SPECIALS[2], SEED_SPECIALS[1], None],
        "qwen": [None, "<|im_end|>", "<|endoftext|>", None],
        "qwen3": [None, "<|im_end|>", "<|endoftext|>", None],
        "dream": [None, "<|endoftext|>", "<|endoftext|>", "<|mask|>"],
    }  # its tokenizer_config.json adds no bos
    assert {name: names_of(load_tokenizer(folder)) for name, folder in folders.items()} == expected
    assert names_of(load_tokenizer(folders["seed"] / "tokenizer.json")) == expected["seed"]


def same(a, b):
    """Whether two Tokenizers do the same."""
    texts = random_texts([*a.special_ids, *SPECIALS, "<tool_call>"], 300)
    return (
        a.json == b.json
        and a.config == b.config
        and a.jinja == b.jinja
        and names_of(a) == names_of(b)
        and a.vocab_size == b.vocab_size
        and a.special_ids == b.special_ids
        and (a.token_bytes == b.token_bytes).all()
        and a.encode_batch(texts) == b.encode_batch(texts)
    )


def check_saved(tok, folder, **config):
    """What `tok` saves loads again as itself, here and in transformers. config: config.json's."""
    folder.mkdir()
    tok.save(folder)
    if config:
        write(folder / "config.json", config)
    again, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert same(tok, again)
    assert not list(folder.glob("*.tmp"))
    texts = random_texts([*tok.special_ids, "<tool_call>"], 500)
    assert tok.encode_batch(texts) == their_ids(theirs, texts)
    assert len(theirs) == tok.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (
        tok.eos_id,
        tok.pad_id,
        tok.mask_id,
    )
    assert tok.bos_id in (None, theirs.bos_token_id)
    parsed = theirs("".join(tok.special_ids), add_special_tokens=False)["input_ids"]
    assert parsed == list(tok.special_ids.values())
    for messages in CHATS if theirs.chat_template else []:
        assert (
            tok.chat(messages)
            == again.chat(messages)
            == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
    return again, theirs


def test_what_is_saved_loads_as_the_same_here_and_in_transformers(family, tmp_path):
    name, folder, tok, theirs = family
    again, saved = check_saved(tok, tmp_path / "saved")
    check_saved(
        tok,
        tmp_path / "model",
        model_type={"llama3": "llama", "seed": "llama", "qwen3": "qwen3"}.get(name, "qwen2"),
    )
    assert saved.chat_template == theirs.chat_template is not None
    assert saved.bos_token == theirs.bos_token
    if name != "dream":
        assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (
            folder / "tokenizer.json"
        ).read_bytes()
        assert json.loads(
            (tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")
        ) == json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (tmp_path / "saved" / "chat_template.jinja").is_file() == (
        folder / "chat_template.jinja"
    ).is_file()


def test_a_folder_with_code_of_its_own_is_saved_as_one_that_needs_none(folders, tmp_path):
    alone = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    assert load_tokenizer(folders["dream"]).config.items() >= alone.items()
    assert "auto_map" not in load_tokenizer(folders["dream"]).config
    assert (
        load_tokenizer(copy_of(folders["dream"], tmp_path, auto_map=...)).config.items()
        >= alone.items()
    )
    (tmp_path / "again").mkdir()
    copy = copy_of(
        folders["qwen"], tmp_path / "again", auto_map={"AutoTokenizer": ["tokenization_x.X", None]}
    )
    assert (
        load_tokenizer(copy).config.items() >= alone.items()
        and "auto_map" not in load_tokenizer(copy).config
    )
    assert load_tokenizer(folders["qwen"]).config["tokenizer_class"] == "Qwen2Tokenizer"


def test_our_own_is_saved_byte_for_byte_with_its_names(spec, tok, tmp_path):
    again, theirs = check_saved(tok, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8") == json.dumps(spec)
    assert [theirs.bos_token, theirs.eos_token, theirs.mask_token, theirs.pad_token] == list(
        SPECIALS
    )
    assert again.tik and not theirs.chat_template and theirs.clean_up_tokenization_spaces is False


def test_bos_and_mask_that_are_missing_become_the_next_ids_in_this_order(family, tmp_path):
    name, folder, plain, _ = family
    tok = load_tokenizer(folder, bos_token="<|beginoftext|>", mask_token="<|mask|>")
    assert names_of(tok) == ["<|beginoftext|>", names_of(plain)[1], names_of(plain)[2], "<|mask|>"]
    if name != "dream":  # which has both
        n = plain.vocab_size
        assert (tok.bos_id, tok.mask_id, tok.vocab_size) == (n, n + 1, n + 2)
        assert tok.special_ids == plain.special_ids | {"<|beginoftext|>": n, "<|mask|>": n + 1}
        assert tok.token_bytes.tolist() == plain.token_bytes.tolist() + [0, 0]
    assert not tok.hf.get_added_tokens_decoder()[tok.mask_id].normalized
    text = "def f():\n    return '<|mask|><|beginoftext|>é'\n"
    assert tok.encode(text) == plain.encode(text) and tok.decode(
        [tok.bos_id, *tok.encode(text), tok.mask_id]
    ) == plain.decode(plain.encode(text))
    again, theirs = check_saved(tok, tmp_path / "saved")
    assert (theirs.bos_token, theirs.mask_token) == ("<|beginoftext|>", "<|mask|>")
    assert (
        tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).token_to_id(
            "<|mask|>"
        )
        == tok.mask_id
    )
    assert same(again, load_tokenizer(tmp_path / "saved", mask_token="<|mask|>")), (
        "a name it already has changes nothing"
    )


def test_names_that_are_there_are_taken_even_if_they_were_not_special(folders, tmp_path):
    tok = load_tokenizer(folders["seed"], mask_token="<[MASK▁TOKEN]>")
    assert tok.mask_id == 4 and tok.json == (folders["seed"] / "tokenizer.json").read_text(
        encoding="utf-8"
    )
    assert tok.config["mask_token"] == "<[MASK▁TOKEN]>"
    tok = load_tokenizer(folders["qwen"], mask_token="<|fim_prefix|>")
    plain = load_tokenizer(folders["qwen"])
    assert tok.vocab_size == plain.vocab_size and tok.mask_id == plain.encode("<|fim_prefix|>")[0]
    assert tok.mask_id not in tok.encode("<|fim_prefix|>") and tok.token_bytes[tok.mask_id] == 0
    check_saved(tok, tmp_path / "saved")
    tok = load_tokenizer(folders["qwen"], bos_token="!")  # the very first token of the vocabulary
    assert tok.bos_id == plain.encode("!")[0] == 0


def test_our_own_takes_other_names_too_and_stays_with_tiktoken(tok, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tok.json, encoding="utf-8")
    other = load_tokenizer(tmp_path, mask_token="[MASK]")
    assert (other.bos_id, other.eos_id, other.pad_id, other.mask_id, other.vocab_size) == (
        0,
        1,
        3,
        800,
        801,
    ) and other.tik
    check_same_ids_and_nothing_lost(other, "<mask> [MASK] <bos>")
    check_saved(other, tmp_path / "saved")


@pytest.mark.parametrize(
    "config, names",
    [
        ({"bos_token": "<|endoftext|>"}, ["<|endoftext|>", "<|im_end|>", "<|endoftext|>", None]),
        (
            {"bos_token": "<|endoftext|>", "add_bos_token": ...},
            ["<|endoftext|>", "<|im_end|>", "<|endoftext|>", None],
        ),
        (
            {"bos_token": "<|endoftext|>", "add_bos_token": False},
            [None, "<|im_end|>", "<|endoftext|>", None],
        ),
        ({"bos_token": ..., "add_bos_token": ...}, [None, "<|im_end|>", "<|endoftext|>", None]),
        (
            {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": None},
            [None, "<|endoftext|>", None, None],
        ),
        ({"mask_token": "<|im_start|>"}, [None, "<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    ],
)
def test_tokenizer_config_decides_over_config_json(folders, tmp_path, config, names):
    copy = copy_of(folders["qwen"], tmp_path, **{"add_bos_token": True, **config})
    assert names_of(load_tokenizer(copy)) == names
    ids = load_tokenizer(copy).special_ids
    write(
        copy / "config.json",
        {"bos_token_id": ids["<|im_end|>"], "eos_token_id": [5, 6], "pad_token_id": 7},
    )
    assert names_of(load_tokenizer(copy)) == names


def test_config_json_tells_a_mask_that_has_no_name(folders, tmp_path):
    copy = copy_of(folders["qwen"], tmp_path)
    i = load_tokenizer(copy).special_ids["<|im_start|>"]
    for value, mask in [
        (i, i),
        (10**6, None),
        (-1, None),
        (None, None),
        ("<|im_start|>", None),
        (1.5, None),
    ]:
        write(copy / "config.json", {"mask_token_id": value})
        assert load_tokenizer(copy).mask_id == mask
    write(copy / "config.json", {"mask_token_id": i})
    (tmp_path / "named").mkdir()
    named = copy_of(copy, tmp_path / "named", mask_token="<|fim_prefix|>")
    assert load_tokenizer(named).mask_id == load_tokenizer(named).special_ids["<|fim_prefix|>"], (
        "a name goes before it"
    )
    check_saved(load_tokenizer(copy), tmp_path / "saved")
    assert load_tokenizer(copy, mask_token="<|mask|>").mask_id == load_tokenizer(copy).vocab_size


def test_without_tokenizer_config_the_older_file_then_config_json_then_our_names_decide(
    folders, tmp_path
):
    shutil.copy(folders["seed"] / "tokenizer.json", tmp_path)
    assert names_of(load_tokenizer(tmp_path)) == [None] * 4
    write(
        tmp_path / "config.json",
        {"bos_token_id": 0, "eos_token_id": [2, 3], "pad_token_id": None, "mask_token_id": 4},
    )
    assert names_of(load_tokenizer(tmp_path)) == [
        SEED_SPECIALS[0],
        SEED_SPECIALS[2],
        None,
        SEED_SPECIALS[4],
    ]
    check_saved(load_tokenizer(tmp_path), tmp_path / "saved")
    write(tmp_path / "config.json", {"eos_token_id": []})
    write(
        tmp_path / "special_tokens_map.json",
        {"eos_token": {"content": SEED_SPECIALS[3]}, "additional_special_tokens": []},
    )
    assert names_of(load_tokenizer(tmp_path)) == [None, SEED_SPECIALS[3], None, None]
    check_saved(load_tokenizer(tmp_path), tmp_path / "saved again")
    write(
        tmp_path / "tokenizer_config.json",
        {"eos_token": SEED_SPECIALS[2], "added_tokens_decoder": {}},
    )
    assert names_of(load_tokenizer(tmp_path)) == [None, SEED_SPECIALS[2], None, None]


def test_a_token_that_is_only_named_is_added_as_transformers_does(folders, tmp_path):
    copy = copy_of(folders["qwen3"], tmp_path, pad_token="[PAD]", mask_token="[MASK]")
    tok, theirs = load_tokenizer(copy), AutoTokenizer.from_pretrained(copy)
    assert (
        (tok.pad_id, tok.mask_id)
        == (theirs.pad_token_id, theirs.mask_token_id)
        == (tok.vocab_size - 2, tok.vocab_size - 1)
    )


def test_added_tokens_that_are_not_special_have_their_bytes(folders):
    tok = load_tokenizer(folders["qwen3"])
    for name in ("<tool_call>", "<|fim_prefix|>", "<é>"):
        (i,) = tok.encode(name)
        assert (
            tok.bytes_of(i) == name.encode()
            and tok.token_bytes[i] == len(name.encode())
            and tok.decode([i]) == name
        )
    assert tok.bytes_of(tok.vocab_size) == tok.bytes_of(-1) == b""


def test_ids_with_gaps(folders, tmp_path):
    spec = json.loads((folders["llama3"] / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"], spec["post_processor"] = [], None
    last = max(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"][last] += 1000
    tok = written(spec, tmp_path)
    assert tok.vocab_size == 2200 == tok.hf.get_vocab_size() + 1000
    assert (
        tok.token_bytes[1199:2199].sum() == 0
        and tok.bytes_of(2000) == b""
        and tok.decode([2000]) == ""
    )
    assert (
        tok.decode(tok.encode("def f():")) == "def f():"
        and tok.token_bytes[2199] == len(tok.bytes_of(2199)) > 1
    )
    with pytest.raises(Mistake, match="<m> cannot be added .* its ids have gaps$"):
        load_tokenizer(tmp_path, mask_token="<m>")


# --- chats ----------------------------------------------------------------------------------------


def test_a_template_in_its_own_file_goes_before_the_one_in_tokenizer_config(folders, tmp_path):
    copy = copy_of(folders["qwen"], tmp_path)
    inside = load_tokenizer(copy).chat(CHATS[0])
    (copy / "chat_template.jinja").write_text(
        "{{ messages[0].content }}<|im_end|>", encoding="utf-8"
    )
    tok = load_tokenizer(copy)
    assert tok.decode(tok.chat(CHATS[0])) == CHATS[0][0]["content"] and tok.chat(CHATS[0]) != inside
    _, theirs = check_saved(tok, tmp_path / "saved")
    assert theirs.chat_template == tok.jinja
    load_tokenizer(folders["qwen"]).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat(CHATS[0]) == inside, (
        "nothing of the other one stays"
    )


def test_of_several_templates_the_default_is_used(folders, tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": QWEN_CHAT}]
    copy = copy_of(folders["qwen"], tmp_path, chat_template=several)
    assert load_tokenizer(copy).chat(CHATS[2]) == load_tokenizer(folders["qwen"]).chat(CHATS[2])
    check_saved(load_tokenizer(copy), tmp_path / "saved")


@pytest.mark.parametrize(
    "template, messages, said",
    [
        (..., CHATS[0], "the tokenizer in .* has no chat template$"),
        ([{"name": "tool_use", "template": "x"}], CHATS[0], "has no chat template$"),
        (QWEN_CHAT, [], "a chat has no messages$"),
        (
            TRICKS_CHAT,
            [{"role": "tool", "content": "x"}],
            "refuses these messages: no tools here, only 'user' & co.$",
        ),
        ("{% for %}", CHATS[0], "refuses these messages: "),
        ("{{ messages[7].content }}", CHATS[0], "refuses these messages: "),
        ("{{ 'a' + none }}", CHATS[0], "refuses these messages: "),
        ("{{ messages.append(1) }}", CHATS[0], "refuses these messages: .* unsafe"),
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            CHATS[0],
            "refuses these messages: .* unsafe",
        ),
    ],
)
def test_a_chat_that_cannot_be_is_one_sentence(folders, tmp_path, template, messages, said):
    tok = load_tokenizer(copy_of(folders["qwen"], tmp_path, chat_template=template))
    with pytest.raises(Mistake, match=said) as caught:
        tok.chat(messages)
    assert "\n" not in str(caught.value) and not set(tok.encode("<|im_end|>")) & set(
        tok.special_ids.values()
    )


# --- what only a hostile or damaged text does -----------------------------------------------------


@pytest.mark.parametrize("spaces", [" " * 1_000_100, " \t\x0b" * 333_400])
def test_a_million_spaces_are_encoded_as_tokenizers_does(tok, spaces):
    text = f"x = 1\r\n{spaces}y\n"
    (ids,) = tok.encode_batch([text])
    assert ids == by_hugging_face(tok, text)
    assert tok.decode(ids) == text


def test_the_guard_for_long_blanks_looks_at_blanks_alone(tok, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_SPACES", 10)
    for text in ("a" * 99, " \n" * 5, "x" + " " * 10 + "y" * 10 + "\t" * 10, "  x" * 9):
        assert not tokenizer.has_long_blank(text)
        check_same_ids_and_nothing_lost(tok, text)
    for text in (" " * 11, "x" + " \n\t\r\x0b\x0c" * 2 + "y"):
        assert tokenizer.has_long_blank(text)
        check_same_ids_and_nothing_lost(tok, text)
        assert tok.encode_batch(["a  b", text]) == [tok.encode("a  b"), tok.encode(text)]


@pytest.mark.parametrize("text", ["\ud800", "x = '\udcff'\n", "\ude00\ud83d"])
def test_a_lone_surrogate_is_refused_with_a_one_line_message(tok, folders, text):
    place = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    for of in (tok, load_tokenizer(folders["qwen"])):
        for encode in (of.encode, lambda t, of=of: of.encode_batch(["x", t])):
            with pytest.raises(Mistake, match=f"not Unicode: character {place} is .* surrogate$"):
                encode(text)
    with pytest.raises(Mistake, match="refuses these messages: the text is not Unicode"):
        load_tokenizer(folders["qwen"]).chat([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    "family, name, said",
    [
        ("ours", "<eos>", "is the eos_token of"),
        ("ours", "<pad>", "is the pad_token of"),
        ("ours", "<bos>", "is the bos_token of"),
        ("ours", "def", "is an ordinary token of"),
        ("qwen", "<|im_end|>", "is the eos_token of"),
        ("qwen", "<|endoftext|>", "is the pad_token of"),
        ("qwen", "!", "is an ordinary token of"),
        ("seed", "Ġ", "is an ordinary token of"),
    ],
)
def test_a_mask_that_texts_or_documents_hold_is_refused(folders, tok, family, name, said):
    folder = tok.folder if family == "ours" else folders[family]
    with pytest.raises(
        Mistake, match=f"{said} .*a new name, such as '<|mask|>', is added"
    ) as caught:
        load_tokenizer(folder, mask_token=name)
    assert "\n" not in str(caught.value)


def test_a_mask_may_not_be_the_new_bos_either(folders):
    with pytest.raises(Mistake, match="is the bos_token of"):
        load_tokenizer(folders["qwen"], bos_token="<|x|>", mask_token="<|x|>")


@pytest.mark.parametrize("value", [5, ["<eos>"], True, {"name": "<eos>"}, 1.5])
@pytest.mark.parametrize("key", KEYS)
def test_a_special_token_that_is_not_a_name_is_refused(folders, tmp_path, key, value):
    copy = copy_of(folders["qwen"], tmp_path, **{key: value})
    with pytest.raises(Mistake, match=f"{key}=.* is not a token's name"):
        load_tokenizer(copy)


@pytest.mark.parametrize("where", ["vocabulary", "added tokens"])
def test_an_id_of_two_billion_is_refused_before_a_table_is_made(spec, tmp_path, where):
    other = json.loads(json.dumps(spec))
    if where == "vocabulary":
        other["model"]["vocab"]["zqzq"] = 2**31 - 1
    else:
        other["model"]["vocab"]["<far>"] = 2**31 - 1
        other["added_tokens"].append(
            other["added_tokens"][0] | {"id": 2**31 - 1, "content": "<far>"}
        )
    with pytest.raises(Mistake, match="has a token with id 2147483647: ids are below"):
        written(other, tmp_path)


def test_a_tokenizer_json_without_a_model_type_is_read_as_tokenizers_reads_it(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    del other["model"]["type"]
    check_same_ids_and_nothing_lost(written(other, tmp_path), "def f(x):\n    return x\n")


HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "an endless sum": "{{ 10 ** (10 ** 10) }}",
    "a text without end": "{% set n = namespace(s='x') %}{% for i in range(99) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "a long line": "{{ 'x'.center(10 ** 11) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("thread", ["main", pytest.param("another", marks=pytest.mark.slow)])
def test_a_chat_template_that_would_never_end_is_stopped(
    folders, tmp_path, monkeypatch, name, thread
):
    """At most five seconds here; the template after it is not affected."""
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 5)
    tok = load_tokenizer(copy_of(folders["qwen"], tmp_path, chat_template=HOSTILE[name]))
    errors, began = [], time.monotonic()

    def chat():
        with pytest.raises(
            Mistake, match="refuses these messages: it .*(stopped|memory)"
        ) as caught:
            tok.chat(CHATS[0])
        errors.append(str(caught.value))

    if thread == "main":
        chat()
    else:
        other = threading.Thread(target=chat)
        other.start()
        other.join()
    assert len(errors) == 1 and "\n" not in errors[0] and time.monotonic() - began < 15
    good = load_tokenizer(folders["qwen"])
    assert good.decode(good.chat(CHATS[0])).endswith("assistant\n")


def test_a_template_that_writes_millions_of_characters_is_refused(folders, tmp_path):
    tok = load_tokenizer(copy_of(folders["qwen"], tmp_path, chat_template="{{ 'x ' * 2000000 }}"))
    began = time.monotonic()
    with pytest.raises(Mistake, match="it writes 4,000,000 characters, more than 1,000,000"):
        tok.chat(CHATS[0])
    assert time.monotonic() - began < 5


def test_an_interrupted_chat_is_not_the_answer_to_the_next(monkeypatch):
    real = templates.worker_process()
    assert templates.render("{{ x }}", {"x": 1}) == "1"

    class Interrupted:
        """The worker, whose answer Ctrl-C keeps from being read."""
        stdin, kill, wait, poll = real.stdin, real.kill, real.wait, real.poll

        class stdout:
            def readline():
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(templates, "worker_process", lambda: Interrupted)
        with pytest.raises(KeyboardInterrupt):
            templates.render("{{ x }}", {"x": "first"})
    assert templates.render("{{ x }}", {"x": "second"}) == "second"


def test_a_chat_is_rendered_by_a_process_that_is_kept(folders):
    tok = load_tokenizer(folders["qwen"])
    first = tok.chat(CHATS[0])
    process = templates.workers[os.getpid()]
    began = time.monotonic()
    assert all(tok.chat(CHATS[0]) == first for _ in range(50))
    assert templates.workers[os.getpid()] is process and time.monotonic() - began < 5


def test_a_renderer_that_was_killed_is_started_again(folders):
    tok = load_tokenizer(folders["qwen"])
    first = tok.chat(CHATS[0])
    templates.workers[os.getpid()].kill()
    templates.workers[os.getpid()].wait()
    assert tok.chat(CHATS[0]) == first


@pytest.mark.parametrize("template", [5, {"a": 1}, [5, "x", None], True])
def test_a_chat_template_that_is_no_text_is_refused(folders, tmp_path, template):
    tok = load_tokenizer(copy_of(folders["qwen"], tmp_path, chat_template=template))
    with pytest.raises(Mistake, match="is not a text$|has no chat template$"):
        tok.chat(CHATS[0])


# --- errors ---------------------------------------------------------------------------------------


def test_a_missing_file_or_folder_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "tokenizer.json"):
        with pytest.raises(Mistake) as caught:
            load_tokenizer(path)
        message = str(caught.value)
        assert (
            message.startswith(f"no tokenizer at {tmp_path}")
            and "\n" not in message
            and "data.stdlib.prepare" in message
        )


@pytest.mark.parametrize(
    "cut", ["half of it", "nothing", "{}", "[1, 2]", "\x00\x01", '{"model": {"type": "Nope"}}']
)
def test_a_file_that_does_not_parse_is_one_sentence(spec, tmp_path, cut):
    path = tmp_path / "tokenizer.json"
    path.write_text({"half of it": json.dumps(spec)[:5000], "nothing": ""}.get(cut, cut))
    with pytest.raises(Mistake) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(
        f"{path} is not a readable tokenizer.json: "
    ) and "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\x80\x02 a pickle, say")
    with pytest.raises(Mistake, match="tokenizer.json is not UTF-8 text: "):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"tokenizer_class": "GPT2Tokenizer"},
            "has only a vocab.json, of the class GPT2Tokenizer: .* save_pretrained write the file",
        ),
        ({"tokenizer_class": ...}, "has only a vocab.json, of the class None"),
        ({"added_tokens_decoder": ...}, "has only a vocab.json, of the class DreamTokenizer"),
        (
            {"added_tokens_decoder": {"900": {"content": "<|x|>", "special": True}}},
            r"<\|x\|> in .* cannot have id 900",
        ),
    ],
)
def test_a_vocabulary_without_tokenizer_json_that_is_not_known_is_one_sentence(
    folders, tmp_path, change, said
):
    with pytest.raises(Mistake, match=said) as caught:
        load_tokenizer(copy_of(folders["dream"], tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_a_damaged_or_missing_file_beside_it_is_one_sentence(folders, tmp_path):
    copy = copy_of(folders["dream"], tmp_path)
    (copy / "merges.txt").unlink()
    with pytest.raises(Mistake, match="has no readable vocab.json, merges.txt .* in place of"):
        load_tokenizer(copy)
    for text, said in (
        (b'{"eos_token": ', "is not readable JSON: "),
        (b"[1, 2]", "holds a list, not an"),
        (b"7", "holds a int, not an object"),
        (b"\x80\x02", "is not UTF-8 text"),
    ):
        (copy / "tokenizer_config.json").write_bytes(text)
        with pytest.raises(Mistake, match=f"tokenizer_config.json {said}") as caught:
            load_tokenizer(copy)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [-1, 0, 4, 256, 259])
def test_a_vocabulary_with_no_room_for_the_bytes_is_refused(size):
    with pytest.raises(Mistake, match=f"vocab_size={size} is too small: .* need 260 or more"):
        train_tokenizer(["x = 1"], size)


@settings(max_examples=30, deadline=None)
@given(text=TEXTS, size=st.integers(260, 300))
def test_the_smallest_vocabularies_encode_everything(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "smallest.json"
    path.write_text(
        train_tokenizer(["for i in range(10):\n    print(i)\n" * 3], size).to_str(),
        encoding="utf-8",
    )
    tok = load_tokenizer(path)
    assert 260 <= tok.vocab_size <= size
    check_same_ids_and_nothing_lost(tok, text)


# --- files of the library's format that it cannot use ---------------------------------------------

def spoil(folder, tmp_path, change):
    """A copy of a folder whose tokenizer.json `change` has edited."""
    out = shutil.copytree(folder, tmp_path / "spoiled")
    spec = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    write(out / "tokenizer.json", spec)
    return out


def test_a_vocabulary_without_its_unknown_token_is_one_sentence(folders, tmp_path):
    def change(spec):
        spec["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
        spec["added_tokens"] = []

    with pytest.raises(Mistake, match="spoiled/tokenizer.json is not a readable tokenizer.json"):
        load_tokenizer(spoil(folders["qwen"], tmp_path, change)).encode("something new")


def test_a_panic_of_the_library_is_one_sentence(folders, tmp_path):
    def change(spec):
        spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}

    with pytest.raises(Mistake, match="spoiled/tokenizer.json is not a readable tokenizer.json"):
        load_tokenizer(spoil(folders["qwen"], tmp_path, change)).encode("some text")


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_pieces_that_are_marked_are_left_to_the_library(data_folder, tmp_path, key):
    def change(spec):
        spec["model"][key] = "##"
        spec["model"]["merges"] = []

    tok = load_tokenizer(spoil(data_folder, tmp_path, change))
    assert tok.tik is None


def test_a_vocabulary_without_one_of_the_bytes_is_left_to_the_library(data_folder, tmp_path):
    def change(spec):
        vocab = spec["model"]["vocab"]
        vocab["~~~~"] = vocab.pop("~")

    assert load_tokenizer(data_folder).tik is not None
    assert load_tokenizer(spoil(data_folder, tmp_path, change)).tik is None


@pytest.mark.parametrize("place", ["vocab.json", "tokenizer_config.json"])
def test_ids_without_end_are_refused_before_memory_is_taken(folders, tmp_path, place):
    out = shutil.copytree(folders["dream"], tmp_path / "copy")
    spec = json.loads((out / place).read_text(encoding="utf-8"))
    if place == "vocab.json":
        spec["far"] = 2**31
    else:
        spec["added_tokens_decoder"][str(2**31)] = {"content": "<far>"}
    write(out / place, spec)
    began = time.monotonic()
    with pytest.raises(Mistake, match="has a token with id 2147483648: ids are below 16,777,216"):
        load_tokenizer(out)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("mask", ["<eos>", "def", "<pad>"])
def test_a_folders_own_mask_that_texts_hold_is_none(data_folder, tmp_path, mask):
    assert load_tokenizer(data_folder).hf.token_to_id(mask) is not None
    out = shutil.copytree(data_folder, tmp_path / "copy")
    config = json.loads((out / "tokenizer_config.json").read_text())
    write(out / "tokenizer_config.json", config | {"mask_token": mask})
    tok = load_tokenizer(out)
    assert tok.mask_id is None and tok.vocab_size == load_tokenizer(data_folder).vocab_size
    assert tok.encode("def") == load_tokenizer(data_folder).encode("def")
    assert load_tokenizer(out, mask_token="<mask>").mask_id == load_tokenizer(data_folder).mask_id
