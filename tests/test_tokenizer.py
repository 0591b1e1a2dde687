"""tokenizer.py: both encoders give the same ids, and ids lose nothing of a text and hold no special token."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC

from tokenizer import SPECIALS, Tokenizer, byte_of_char, train_tokenizer

STDLIB = Path(os.__file__).parent
TRAINED_ON = ["os.py", "ast.py", "json/decoder.py", "textwrap.py", "gettext.py", "smtplib.py"]
UNSEEN = ["abc.py", "bisect.py", "calendar.py", "codecs.py", "copy.py", "enum.py", "heapq.py", "html/entities.py", "keyword.py",
          "locale.py", "platform.py", "pydoc.py", "random.py", "statistics.py", "stringprep.py", "turtle.py", "typing.py",
          "encodings/cp1252.py", "encodings/koi8_r.py", "encodings/punycode.py", "idlelib/help.html"]

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PIECES = [" ", "  ", "    ", "\t", "\n", "\n\n", "\r", "\r\n", "\x0b", "\x0c", "\x00", "\x1c", "\x7f", "\x85", "\xa0", "\u2028",
          "\u3000", "\ufeff", "0", "7", "123", "4567", "٣", "½", "_", "__init__", "def", "self", "Self", "x1", "é", "e\u0301",
          "ß", "日本", "🙂", "👩‍💻", "(", ")", ":", "...", "->", "==", "#", "'", "'s", '"', "\\", "@", "[", "`", "{", "~",
          *SPECIALS, "<eos", "eos>", "<|endoftext|>", "< eos >"]
CODE_LIKE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
TEXTS = ANY_TEXT | CODE_LIKE


@pytest.fixture(scope="module")
def spec():
    """tokenizer.json of a small BPE, as a dict."""
    return json.loads(train_tokenizer([(STDLIB / name).read_text() for name in TRAINED_ON], 800).to_str())


@pytest.fixture(scope="module")
def tok(spec, tmp_path_factory):
    return written(spec, tmp_path_factory.mktemp("trained"))


def written(spec, folder):
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return Tokenizer(folder)


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
    points = [*range(0x3100), *range(0xE000, 0xE020), *range(0xFE00, 0x10000, 3), *range(0x1F300, 0x1F700, 3), 0xE0001, 0x10FFFF]
    texts = [f"a{chr(c)}b  {chr(c)} 1{chr(c)}2\n {chr(c)}{chr(c)}'\n" for c in points]
    assert tok.encode_batch(texts) == [e.ids for e in tok.hf.encode_batch(texts, add_special_tokens=False)]
    assert [tok.decode(ids) for ids in tok.encode_batch(texts)] == texts


@pytest.mark.parametrize("name", TRAINED_ON + UNSEEN)
def test_the_same_holds_for_files_of_real_code(tok, name):
    if not (STDLIB / name).is_file():
        pytest.skip("this Python does not have it")
    check_same_ids_and_nothing_lost(tok, (STDLIB / name).read_bytes().decode("utf-8"))


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tok, texts):
    assert tok.encode_batch(texts) == [tok.encode(t) for t in texts]


def test_ids_are_specials_then_bytes_then_merges_in_order(tok, spec):
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (0, 1, 2, 3) and tok.vocab_size == 800
    assert tok.special_ids == dict(zip(SPECIALS, range(4)))
    assert sorted(tok.bytes_of(i) for i in range(4, 260)) == [bytes([b]) for b in range(256)]
    assert [spec["model"]["vocab"]["".join(m)] for m in spec["model"]["merges"]] == list(range(260, 800))
    assert sorted(byte_of_char().values()) == list(range(256))


def test_token_bytes_counts_what_each_id_writes_and_specials_as_nothing(tok):
    assert tok.token_bytes.shape == (tok.vocab_size,) and tok.token_bytes.dtype == np.int64
    assert tok.token_bytes[:4].tolist() == [0] * 4 and (tok.token_bytes[4:260] == 1).all() and (tok.token_bytes[260:] >= 2).all()
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
    pieces = [p for p, _ in tok.hf.pre_tokenizer.pre_tokenize_str("def f_1(x):\n    return  x+12345\n\n\n")]
    assert pieces == ["def", "Ġf_", "1", "(", "x", "):Ċ", "ĠĠĠ", "Ġreturn", "Ġ", "Ġx", "+", "123", "45", "ĊĊĊ"]


# --- tokenizers that are not ours -----------------------------------------------------------------------------------

def swap_last_two_ids(spec):
    a, b = ("".join(m) for m in spec["model"]["merges"][-2:])
    vocab = spec["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def merge_twice(spec):
    """A second way to make the same token, as merges that were converted from tiktoken's files have."""
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
    "no Split behavior": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithPrevious"),
    "inverted Split": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
    "Split at a text": lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": " "}),
}


@pytest.mark.parametrize("change", INELIGIBLE)
def test_where_tiktoken_could_differ_tokenizers_encodes_and_all_else_holds(spec, tmp_path, change):
    other = json.loads(json.dumps(spec))
    INELIGIBLE[change](other)
    tok = written(other, tmp_path)
    assert tok.tik is None
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (0, 1, 2, 3) and tok.token_bytes[:4].tolist() == [0] * 4

    @settings(max_examples=25, deadline=None)
    @given(TEXTS)
    def holds(text):
        ids = tok.encode(text)
        assert ids == by_hugging_face(tok, text) and not set(ids) & set(range(4))
        if change != "prefix space":  # there decode cannot know which spaces were the text's
            assert tok.decode([0, *ids, 1]) == (NFC().normalize_str(text) if change == "normalizer" else text)

    holds()


def test_a_tokenizer_without_our_specials_has_none_of_their_ids(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["added_tokens"] = [t | {"content": "<|endoftext|>"} for t in other["added_tokens"][:1]]
    for special in SPECIALS:
        other["model"]["vocab"].pop(special)
    other["model"]["vocab"] = {t: i - 4 for t, i in other["model"]["vocab"].items()} | {"<|endoftext|>": 796}
    other["added_tokens"][0]["id"] = 796
    tok = written(other, tmp_path)
    assert (tok.bos_id, tok.eos_id, tok.mask_id, tok.pad_id) == (None,) * 4 and tok.vocab_size == 797
    check_same_ids_and_nothing_lost(tok, "def f():\n    return '<|endoftext|> <eos>'\n")
    assert tok.decode([*tok.encode("x"), 796]) == "x"


def test_an_added_token_that_is_not_special_is_one_id_as_in_tokenizers(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["added_tokens"].append(other["added_tokens"][0] | {"id": 800, "content": "<tool>", "special": False})
    tok = written(other, tmp_path)
    assert tok.encode("a<tool>b") == by_hugging_face(tok, "a<tool>b")


def test_merges_that_no_training_would_give_still_encode_as_tokenizers_does(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    merges = [["a", "b"], ["b", "c"], ["a", "bc"]]  # BPE writes "abc" as ab, c; tiktoken as abc
    base = {t: i for t, i in other["model"]["vocab"].items() if i < 260}
    other["model"] |= {"merges": merges, "vocab": base | {"".join(m): 260 + i for i, m in enumerate(merges)}}
    tok = written(other, tmp_path)
    assert tok.encode("abc") == by_hugging_face(tok, "abc")


def test_token_bytes_of_a_byte_level_fallback_count_bytes_too(spec, tmp_path):
    other = json.loads(json.dumps(spec))
    other["normalizer"] = {"type": "NFC"}  # as in Qwen's
    tok = written(other, tmp_path)
    assert tok.token_bytes[tok.encode("naïve 日本")].sum() == len("naïve 日本".encode())


# --- errors ---------------------------------------------------------------------------------------------------------

def test_a_missing_file_or_folder_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "tokenizer.json"):
        with pytest.raises(FileNotFoundError) as caught:
            Tokenizer(path)
        message = str(caught.value)
        assert message.startswith(f"no tokenizer at {tmp_path}") and "\n" not in message and "data.stdlib.prepare" in message


@pytest.mark.parametrize("cut", ["half of it", "nothing", "{}", "[1, 2]", "\x00\x01", '{"model": {"type": "Nope"}}'])
def test_a_file_that_does_not_parse_is_one_sentence(spec, tmp_path, cut):
    path = tmp_path / "tokenizer.json"
    path.write_text({"half of it": json.dumps(spec)[:5000], "nothing": ""}.get(cut, cut))
    with pytest.raises(ValueError) as caught:
        Tokenizer(path)
    assert str(caught.value).startswith(f"{path} is not a readable tokenizer.json: ") and "\n" not in str(caught.value)


def test_a_file_that_is_not_utf_8_is_one_sentence(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\x80\x02 a pickle, say")
    with pytest.raises(ValueError, match="is not a readable tokenizer.json"):
        Tokenizer(path)


@pytest.mark.parametrize("size", [-1, 0, 4, 256, 259])
def test_a_vocabulary_with_no_room_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"vocab_size={size} is too small: .* need 260 or more"):
        train_tokenizer(["x = 1"], size)


@settings(max_examples=30, deadline=None)
@given(text=TEXTS, size=st.integers(260, 300))
def test_the_smallest_vocabularies_encode_everything(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "smallest.json"
    path.write_text(train_tokenizer(["for i in range(10):\n    print(i)\n" * 3], size).to_str(), encoding="utf-8")
    tok = Tokenizer(path)
    assert 260 <= tok.vocab_size <= size
    check_same_ids_and_nothing_lost(tok, text)
