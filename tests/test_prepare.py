"""data/stdlib/prepare.py: what it writes for a small tree of code, and when it writes at all."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tokenizer
from configurator import Mistake
from data.stdlib import prepare as stdlib
from huggingface import load_tokenizer
from loader import Windows

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = ["train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json",
            "tokenizer_config.json", "meta.json"]
TEXTS = {f"{d}m{i}.py": f"def f{i}(x):\r\n\treturn 'é日🙂 <eos>' + x[{i}:]\n" * (i % 4 + 1)
         for d, i in zip(["", "a/", "a/b/"] * 10, range(30))}


def write_tree(source, texts):
    for name, text in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def prepare(source, out, *words, fails=False):
    """Run the script from the repository's root.

    Returns what it printed, or where it must fail its one line of error.
    """
    command = [sys.executable, "-m", "data.stdlib.prepare", f"--source={source}", f"--out={out}",
               "--vocab_size=280", "--val_percent=40", *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode != 0) == fails, ran.stderr
    if fails:
        assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    return ran.stderr if fails else ran.stdout


def held_out(path):
    """The rule of the split, written again: 8 bytes of the path's SHA-256, as a share of 2^64."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) < 0.4 * 2**64


def documents(out, split):
    """The documents of a split as lists of ids, cut at the offsets."""
    vocab_size = json.loads((out / "meta.json").read_text())["vocab_size"]
    tokens = np.fromfile(out / f"{split}.bin", np.uint16 if vocab_size <= 2**16 else np.uint32)
    offsets = np.fromfile(out / f"{split}.idx", np.int64)
    assert offsets[0] == 0 and offsets[-1] == len(tokens)
    return [tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def text_ids(document, bos=1, eos=1):
    """A document without its <bos> and its <eos>, which are counted here."""
    end = len(document)
    while document[end - 1] == eos:
        end -= 1
    assert len(document) % 8 == 0 and 1 <= len(document) - end <= 8
    return document[bos:end]


def texts_of(out, split):
    tok = load_tokenizer(out)
    return [tok.decode(text_ids(d)) for d in documents(out, split)]


def stamps(out):
    return {name: (out / name).stat().st_mtime_ns for name in PRODUCTS}


def contents(out):
    """All products but meta.json, which names the folders."""
    return {name: (out / name).read_bytes() for name in PRODUCTS if name != "meta.json"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(source, out, what was printed) of one run over TEXTS and over files that it must leave out.

    Not to be changed.
    """
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("work") / "made" / "by it"
    write_tree(source, TEXTS)
    write_tree(source, {"z_copy.py": TEXTS["m0.py"], "latin.py": "# é\n".encode("latin-1"),
                        "empty.py": b"", "notes.txt": "no code",
                        "folder.py/x.txt": "a folder with a suffix"})
    skipped = ["test", "tests", "site-packages", "dist-packages", "__pycache__", "lib2to3",
               "idle_test"]
    write_tree(source, {f"{where}{name}/skipped_{name}.py": "skipped = 1\n"
                        for name in skipped for where in ("", "a/")})
    return source, out, prepare(source, out)


@pytest.fixture
def copied(prepared, tmp_path):
    """(source, out) of the same, to be changed."""
    shutil.copytree(prepared[0], tmp_path / "source")
    shutil.copytree(prepared[1], tmp_path / "out", copy_function=shutil.copy2)
    return tmp_path / "source", tmp_path / "out"


def test_it_writes_its_seven_files_and_nothing_else(prepared):
    assert sorted(p.name for p in prepared[1].iterdir()) == sorted(PRODUCTS)


def expected_texts(split):
    """The texts of a split in the order of their paths."""
    paths = sorted(TEXTS, key=lambda p: Path(p).parts)
    return [TEXTS[p] for p in paths if held_out(p) == (split == "val")]


def test_a_document_is_bos_a_files_tokens_and_eos_to_a_multiple_of_8_in_the_order_of_paths(
        prepared):
    _, out, _ = prepared
    tok = load_tokenizer(out)
    for split in ("train", "val"):
        expected = expected_texts(split)
        ids = [[tok.bos_id, *tok.encode(text), tok.eos_id] for text in expected]
        for document in ids:
            while len(document) % 8:
                document.append(tok.eos_id)
        assert documents(out, split) == ids
        assert texts_of(out, split) == expected
        assert all(set(text_ids(d)).isdisjoint(range(4)) for d in documents(out, split))


def test_duplicates_other_encodings_empty_files_other_suffixes_and_excluded_folders_are_left_out(
        prepared):
    texts = texts_of(prepared[1], "train") + texts_of(prepared[1], "val")
    assert sorted(texts) == sorted(TEXTS.values())  # each once, and nothing of the others


def test_meta_says_what_was_made(prepared):
    source, out, printed = prepared
    meta = json.loads((out / "meta.json").read_text())
    paths = sorted(TEXTS, key=lambda p: Path(p).parts)
    assert meta["val_paths"] == [p for p in paths if held_out(p)]
    assert (meta["source"], meta["vocab_size"], meta["val_percent"]) == (str(source), 280, 40.0)
    for split in ("train", "val"):
        files = [t for p, t in TEXTS.items() if held_out(p) == (split == "val")]
        tokens = sum(map(len, documents(out, split)))
        size = sum(len(t.encode()) for t in files)
        assert meta[split] == {"files": len(files), "bytes": size, "tokens": tokens}
        assert f"{split} {len(files)} files, {size:,} bytes, {tokens:,} tokens" in printed


def test_the_loader_reads_it(prepared):
    out = prepared[1]
    for split in ("train", "val"):
        windows = Windows(out, split, 16, load_tokenizer(out).vocab_size)
        assert len(windows) == sum(map(len, documents(out, split))) // 16


def test_the_tokenizer_is_trained_on_the_train_split_alone(copied, tmp_path):
    source, out = copied
    path = next(p for p in TEXTS if held_out(p))
    (source / path).write_text("quokka_" * 500)
    prepare(source, out)
    assert not any(b"quok" in load_tokenizer(out).bytes_of(i) for i in range(280))


def test_the_second_run_does_nothing_and_says_so(copied):
    source, out = copied
    before = stamps(out)
    assert prepare(source, out) == f"{out}: nothing to do, 30 files unchanged\n"
    assert stamps(out) == before


def test_a_run_from_nothing_gives_the_same_bytes(prepared, tmp_path):
    source, out, _ = prepared
    prepare(source, tmp_path)
    assert contents(tmp_path) == contents(out)


@pytest.mark.parametrize("change", ["a file's text", "a file's name", "a setting"])
def test_a_change_of_the_source_or_of_a_setting_is_noticed(copied, change):
    source, out = copied
    path = source / next(p for p in TEXTS if not held_out(p) and "/" not in p)
    if change == "a file's text":
        path.write_text("changed = True\n")
    elif change == "a file's name":
        path.rename(source / "renamed.py")
    before = stamps(out)
    printed = prepare(source, out, *["--vocab_size=281"] * (change == "a setting"))
    assert "nothing to do" not in printed and "training a tokenizer" in printed
    assert all(new > before[name] for name, new in stamps(out).items())
    if change == "a file's text":
        assert "changed = True\n" in texts_of(out, "train")


def test_data_of_an_older_version_is_refused_by_the_loader_and_made_again(copied, monkeypatch):
    """Its documents ended in one <eos>, whatever their length."""
    source, out = copied
    whole = contents(out)
    monkeypatch.setattr(tokenizer, "MULTIPLE", 1)
    monkeypatch.setattr(stdlib, "LAYOUT", 1)
    words = [f"--source={source}", f"--out={out}", "--vocab_size=280", "--val_percent=40"]
    stdlib.main(words)
    assert all(d.count(1) == 1 for d in documents(out, "train"))
    monkeypatch.undo()
    with pytest.raises(Mistake, match="an older version prepared them; prepare the data again"):
        Windows(out, "train", 16, 280)
    assert "nothing to do" not in prepare(source, out)
    assert contents(out) == whole


@pytest.mark.parametrize("lost", ["meta.json", "val.idx", "tokenizer_config.json"])
def test_an_interrupted_run_or_a_lost_product_is_made_again(copied, lost):
    source, out = copied
    whole = contents(out)
    (out / lost).unlink()
    (out / "train.bin").write_bytes(b"half")
    assert "training a tokenizer" in prepare(source, out)
    assert contents(out) == whole and "nothing to do" in prepare(source, out)


def test_a_file_stays_on_its_side_of_the_split_when_others_come_and_no_text_is_on_both(copied):
    source, out = copied
    before = {split: set(texts_of(out, split)) for split in ("train", "val")}
    folders = ["", "a/", "0/"] * 5
    write_tree(source, {f"{folder}new{i}.py": f"n = {i}\n" for i, folder in enumerate(folders)})
    prepare(source, out)
    after = {split: set(texts_of(out, split)) for split in ("train", "val")}
    assert before["train"] < after["train"] and before["val"] < after["val"]
    assert not after["train"] & after["val"] and len(after["train"]) + len(after["val"]) == 45


def test_where_the_text_gives_fewer_ids_than_asked_for_meta_counts_those(prepared, tmp_path):
    prepare(prepared[0], tmp_path, "--vocab_size=70000")
    tok = load_tokenizer(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert tok.vocab_size < 1000 and meta["vocab_size"] == tok.vocab_size
    assert len(Windows(tmp_path, "train", 16, tok.vocab_size)) > 0


def test_another_folders_tokenizer_serves_where_one_is_named(prepared, tmp_path):
    source, out, _ = prepared
    prepare(source, tmp_path / "again", f"--tokenizer={out}", "--suffix=.py")
    assert contents(tmp_path / "again") == contents(out)
    message = prepare(source, tmp_path / "more", "--tokenizer=/nowhere", fails=True)
    assert "--tokenizer=/nowhere has no tokenizer: /nowhere/tokenizer.json is missing" in message


def test_another_tokenizer_at_the_same_path_is_noticed(prepared, tmp_path):
    source, out, _ = prepared
    shutil.copytree(out, tmp_path / "theirs")
    words = (source, tmp_path / "more", f"--tokenizer={tmp_path / 'theirs'}")
    prepare(*words)
    assert "nothing to do" in prepare(*words)
    prepare(source, tmp_path / "small", "--vocab_size=270")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "small" / name, tmp_path / "theirs" / name)
    assert "nothing to do" not in prepare(*words)
    assert contents(tmp_path / "more") == contents(tmp_path / "small")


def test_a_folder_with_anothers_shards_is_refused_and_left_as_it_was(prepared, tmp_path):
    source, out, _ = prepared
    shutil.copytree(out, tmp_path / "shards")
    (tmp_path / "shards" / "train.bin").rename(tmp_path / "shards" / "train_00000.bin")
    before = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    message = prepare(source, tmp_path / "shards", fails=True)
    assert "holds train_00000.bin, which another script prepared" in message
    after = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert after == before


def test_a_run_names_the_tokenizer_of_its_newest_checkpoint(prepared, tmp_path):
    source, out, _ = prepared
    checkpoint = tmp_path / "run" / "step_0000020"
    checkpoint.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / name, checkpoint)
    (checkpoint / "config.json").write_text("{}")
    (tmp_path / "run" / "latest").write_text("step_0000020\n")
    prepare(source, tmp_path / "more", f"--tokenizer={tmp_path / 'run'}")
    assert contents(tmp_path / "more") == contents(out)


def test_a_folder_without_a_tokenizer_is_not_called_unprepared_data(prepared, tmp_path):
    (tmp_path / "run").mkdir()
    message = prepare(prepared[0], tmp_path / "out", f"--tokenizer={tmp_path}/run", fails=True)
    assert f"--tokenizer={tmp_path}/run has no tokenizer" in message
    assert "data is not prepared" not in message


def test_a_tokenizer_of_others_gives_documents_as_its_tokenizer_config_says_and_comes_along(
        prepared, tmp_path):
    source, out, _ = prepared
    theirs = tmp_path / "theirs"
    shutil.copytree(out, theirs)
    config = {"bos_token": None, "eos_token": "<pad>", "mask_token": "[MASK]",
              "chat_template": "{{ eos_token }}"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))
    prepare(source, tmp_path / "new", f"--tokenizer={theirs}")
    tok = load_tokenizer(tmp_path / "new")
    assert (tok.bos_id, tok.eos_id, tok.mask_id) == (None, 3, 280) and tok.chat([{}]) == [3]
    meta = json.loads((tmp_path / "new" / "meta.json").read_text())
    assert meta["vocab_size"] == tok.vocab_size == 281
    for split in ("train", "val"):
        theirs_and_ours = zip(documents(tmp_path / "new", split), documents(out, split))
        assert all(text_ids(d, 0, 3) == text_ids(e) for d, e in theirs_and_ours)
    prepare(source, tmp_path / "new")  # and in the same folder, nothing of it is left
    assert contents(tmp_path / "new") == contents(out)


def test_a_tokenizer_without_an_end_of_document_is_refused_and_leaves_what_was_prepared(
        copied, tmp_path):
    source, out = copied
    whole = contents(out)
    shutil.copytree(out, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    theirs = tmp_path / "theirs"
    message = prepare(source, out, f"--tokenizer={theirs}", fails=True)
    assert message == (f"error: the tokenizer in {theirs} has no eos_token, "
                       "which ends a document\n")
    assert contents(out) == whole and (out / "meta.json").is_file()


@pytest.mark.parametrize("size", [30, 10**7, 10**12, 10**20])
def test_a_mistyped_vocabulary_is_refused_and_leaves_what_was_prepared(copied, size):
    source, out = copied
    whole = contents(out)
    message = prepare(source, out, f"--vocab_size={size}", fails=True)
    assert "vocab_size is an int from 260 to 1,048,576" in message
    assert contents(out) == whole and (out / "meta.json").is_file()


@pytest.mark.parametrize("meta", [b"[]", b"null", b"5", b"{", b"", b"\xff\xfe", b"{}"])
def test_a_damaged_meta_is_made_again(copied, meta):
    source, out = copied
    whole = contents(out)
    (out / "meta.json").write_bytes(meta)
    assert "training a tokenizer" in prepare(source, out)
    assert contents(out) == whole and "nothing to do" in prepare(source, out)


def test_a_file_name_that_is_not_utf_8_is_a_name_too(copied):
    source, out = copied
    for i in range(9):  # some for each split
        with open(os.fsencode(source) + b"/odd\xff%d.py" % i, "w") as file:
            file.write(f"odd = {i}\n")
    prepare(source, out)
    odd = {f"odd = {i}\n" for i in range(9)}
    train, val = set(texts_of(out, "train")), set(texts_of(out, "val"))
    assert odd <= train | val and odd & train and odd & val
    paths = json.loads((out / "meta.json").read_text())["val_paths"]
    assert sum("odd\udcff" in path for path in paths) == len(odd & val)
    assert "nothing to do" in prepare(source, out)


@pytest.mark.parametrize("suffix", ["**", "*", "[", "/", "a/../b", "\\"])
def test_a_suffix_is_an_end_of_names_and_no_pattern(prepared, tmp_path, suffix):
    message = prepare(prepared[0], tmp_path / "out", f"--suffix={suffix}", fails=True)
    assert f"has 0 {suffix} files for training" in message


def test_millions_of_spaces_in_a_row_are_text_too(copied):
    source, out = copied
    text = "x = 1" + " " * 3_000_000 + "\n"
    (source / "spaces.py").write_text(text)
    prepare(source, out)
    assert text in texts_of(out, "train") + texts_of(out, "val")


@pytest.mark.parametrize("tree", [
    {}, {"notes.txt": "none"}, {"tests/a.py": "x = 1\n"}, {"m0.py": "only = 'one file'\n"}])
def test_a_source_with_too_little_in_it_is_refused_with_one_line(tmp_path, tree):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_tree(source, tree)
    message = prepare(source, out, fails=True)
    assert str(source) in message and "for training" in message and not out.exists()


ALLOWED_PERCENT = "val_percent is a float from 1e-06 to 99.9"


@pytest.mark.parametrize("words, said", [
    (["--source=/no/such/folder"], "source='/no/such/folder' is not a folder"),
    (["--val_percent=0"], f"val_percent=0 does not fit: {ALLOWED_PERCENT}"),
    (["--val_percent=100"], f"val_percent=100 does not fit: {ALLOWED_PERCENT}"),
    (["--val_percent=1e999"], f"val_percent=inf does not fit: {ALLOWED_PERCENT}"),
    (["--out="], "out='' does not fit: out is a text that is not empty"),
])
def test_settings_out_of_bounds_are_refused_with_one_line(prepared, tmp_path, words, said):
    assert said in prepare(prepared[0], tmp_path / "out", *words, fails=True)
    assert not (tmp_path / "out").exists()
