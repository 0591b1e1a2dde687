"""data/stdlib/prepare.py: what it writes for a small tree of code, and when it writes at all."""
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loader import Windows
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = ["train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json", "tokenizer_config.json", "meta.json"]
TEXTS = {f"{d}m{i}.py": f"def f{i}(x):\r\n\treturn 'é日🙂 <eos>' + x[{i}:]\n" * (i % 4 + 1)
         for d, i in zip(["", "a/", "a/b/"] * 10, range(30))}


def write_tree(source, texts):
    for name, text in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def prepare(source, out, *words, fails=False):
    """Run the script from the repository's root. Returns what it printed, or where it must fail its one line of error."""
    ran = subprocess.run([sys.executable, "-m", "data.stdlib.prepare", f"--source={source}", f"--out={out}", "--vocab_size=280",
                          "--val_percent=40", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ran.returncode != 0) == fails, ran.stderr
    if fails:
        assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    return ran.stderr if fails else ran.stdout


def held_out(path):
    """The rule of the split, written once more: the first 8 bytes of the path's SHA-256, as a share of 2^64."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:16], 16) < 0.4 * 2**64


def documents(out, split):
    """The documents of a split as lists of ids, cut at the offsets."""
    dtype = np.uint16 if json.loads((out / "meta.json").read_text())["vocab_size"] <= 2**16 else np.uint32
    tokens, offsets = np.fromfile(out / f"{split}.bin", dtype), np.fromfile(out / f"{split}.idx", np.int64)
    assert offsets[0] == 0 and offsets[-1] == len(tokens)
    return [tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def texts_of(out, split):
    tok = Tokenizer(out)
    return [tok.decode(d[1:-1]) for d in documents(out, split)]


def stamps(out):
    return {name: (out / name).stat().st_mtime_ns for name in PRODUCTS}


def contents(out):
    return {name: (out / name).read_bytes() for name in PRODUCTS if name != "meta.json"}  # which names the folders


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(source, out, what was printed) of one run over TEXTS and over files that it must leave out. Not to be changed."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("work") / "made" / "by it"
    write_tree(source, TEXTS)
    write_tree(source, {"z_copy.py": TEXTS["m0.py"], "latin.py": "# é\n".encode("latin-1"), "empty.py": b"",
                        "notes.txt": "no code", "folder.py/x.txt": "a folder with a suffix"})
    skipped = ["test", "tests", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idle_test"]
    write_tree(source, {f"{where}{name}/skipped_{name}.py": "skipped = 1\n" for name in skipped for where in ("", "a/")})
    return source, out, prepare(source, out)


@pytest.fixture
def copied(prepared, tmp_path):
    """(source, out) of the same, to be changed."""
    shutil.copytree(prepared[0], tmp_path / "source")
    shutil.copytree(prepared[1], tmp_path / "out", copy_function=shutil.copy2)
    return tmp_path / "source", tmp_path / "out"


def test_it_writes_its_seven_files_and_nothing_else(prepared):
    assert sorted(p.name for p in prepared[1].iterdir()) == sorted(PRODUCTS)


def test_a_document_is_bos_a_files_tokens_and_eos_in_the_order_of_paths(prepared):
    _, out, _ = prepared
    tok = Tokenizer(out)
    for split, wanted in (("train", False), ("val", True)):
        expected = [TEXTS[p] for p in sorted(TEXTS, key=lambda p: Path(p).parts) if held_out(p) == wanted]
        assert documents(out, split) == [[tok.bos_id, *tok.encode(t), tok.eos_id] for t in expected]
        assert texts_of(out, split) == expected
        assert all(set(d[1:-1]).isdisjoint(range(4)) for d in documents(out, split))


def test_duplicates_other_encodings_empty_files_other_suffixes_and_excluded_folders_are_left_out(prepared):
    found = texts_of(prepared[1], "train") + texts_of(prepared[1], "val")
    assert sorted(found) == sorted(TEXTS.values())  # each once, and nothing of the others


def test_meta_says_what_was_made(prepared):
    source, out, printed = prepared
    meta = json.loads((out / "meta.json").read_text())
    assert meta["val_paths"] == [p for p in sorted(TEXTS, key=lambda p: Path(p).parts) if held_out(p)]
    assert (meta["source"], meta["vocab_size"], meta["val_percent"]) == (str(source), 280, 40.0)
    for split in ("train", "val"):
        files = [t for p, t in TEXTS.items() if held_out(p) == (split == "val")]
        tokens = sum(map(len, documents(out, split)))
        assert meta[split] == {"files": len(files), "bytes": sum(len(t.encode()) for t in files), "tokens": tokens}
        assert f"{split} {len(files)} files, {meta[split]['bytes']:,} bytes, {tokens:,} tokens" in printed


def test_the_loader_reads_it(prepared):
    out = prepared[1]
    for split in ("train", "val"):
        windows = Windows(out, split, 16, Tokenizer(out).vocab_size)
        assert len(windows) == sum(map(len, documents(out, split))) // 16


def test_the_tokenizer_is_trained_on_the_train_split_alone(copied, tmp_path):
    source, out = copied
    path = next(p for p in TEXTS if held_out(p))
    (source / path).write_text("quokka_" * 500)
    prepare(source, out)
    assert not any(b"quok" in Tokenizer(out).bytes_of(i) for i in range(280))


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
    write_tree(source, {f"{d}new{i}.py": f"n = {i}\n" for i, d in enumerate(["", "a/", "0/"] * 5)})
    prepare(source, out)
    after = {split: set(texts_of(out, split)) for split in ("train", "val")}
    assert before["train"] < after["train"] and before["val"] < after["val"]
    assert not after["train"] & after["val"] and len(after["train"]) + len(after["val"]) == 45


def test_where_the_text_gives_fewer_ids_than_asked_for_meta_counts_those_there_are(prepared, tmp_path):
    prepare(prepared[0], tmp_path, "--vocab_size=70000")
    tok = Tokenizer(tmp_path)
    assert tok.vocab_size < 1000 and json.loads((tmp_path / "meta.json").read_text())["vocab_size"] == tok.vocab_size
    assert len(Windows(tmp_path, "train", 16, tok.vocab_size)) > 0


def test_another_folders_tokenizer_serves_where_one_is_named(prepared, tmp_path):
    source, out, _ = prepared
    prepare(source, tmp_path / "again", f"--tokenizer={out}", "--suffix=.py")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert contents(tmp_path / "again") == contents(out)
    assert "no tokenizer at" in prepare(source, tmp_path / "more", "--tokenizer=/nowhere", fails=True)


def test_a_tokenizer_of_others_gives_documents_as_its_tokenizer_config_says_and_comes_along(prepared, tmp_path):
    source, out, _ = prepared
    theirs = tmp_path / "theirs"
    shutil.copytree(out, theirs)
    config = {"bos_token": None, "eos_token": "<pad>", "mask_token": "[MASK]", "chat_template": "{{ eos_token }}"}
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))
    prepare(source, tmp_path / "new", f"--tokenizer={theirs}")
    tok = Tokenizer(tmp_path / "new")
    assert (tok.bos_id, tok.eos_id, tok.mask_id) == (None, 3, 280) and tok.chat([{}]) == [3]
    assert json.loads((tmp_path / "new" / "meta.json").read_text())["vocab_size"] == tok.vocab_size == 281
    for split in ("train", "val"):
        assert documents(tmp_path / "new", split) == [[*d[1:-1], 3] for d in documents(out, split)]
    prepare(source, tmp_path / "new")  # and in the same folder, nothing of it is left
    assert contents(tmp_path / "new") == contents(out)


def test_a_tokenizer_without_an_end_of_document_is_refused_and_leaves_what_was_prepared(copied, tmp_path):
    source, out = copied
    whole = contents(out)
    shutil.copytree(out, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    message = prepare(source, out, f"--tokenizer={tmp_path / 'theirs'}", fails=True)
    assert message == f"error: the tokenizer in {tmp_path / 'theirs'} has no eos_token, which ends a document\n"
    assert contents(out) == whole and (out / "meta.json").is_file()


def test_a_mistyped_vocabulary_is_refused_and_leaves_what_was_prepared(copied):
    source, out = copied
    whole = contents(out)
    assert "vocab_size=30 is too small" in prepare(source, out, "--vocab_size=30", fails=True)
    assert contents(out) == whole and (out / "meta.json").is_file()


@pytest.mark.parametrize("tree", [{}, {"notes.txt": "none"}, {"tests/a.py": "x = 1\n"}, {"m0.py": "only = 'one file'\n"}])
def test_a_source_with_too_little_in_it_is_refused_in_one_sentence(tmp_path, tree):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_tree(source, tree)
    message = prepare(source, out, fails=True)
    assert str(source) in message and "for training" in message and not out.exists()


@pytest.mark.parametrize("words, said", [(["--source=/no/such/folder"], "source='/no/such/folder' is not a folder"),
                                         (["--val_percent=0"], "val_percent=0.0 must be between 0 and 100"),
                                         (["--val_percent=100"], "val_percent=100.0 must be between 0 and 100")])
def test_settings_that_cannot_be_are_refused_in_one_sentence(prepared, tmp_path, words, said):
    assert said in prepare(prepared[0], tmp_path / "out", *words, fails=True)
    assert not (tmp_path / "out").exists()
