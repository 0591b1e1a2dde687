"""data/stack/prepare.py and sources.py: what they read and write, whatever the workers, and
whenever they are killed."""
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer
from configurator import Mistake
from data.stack import prepare as stack
from data.stack.prepare import Config
from data.stack.sources import (
    ENDINGS,
    ZSTANDARD,
    chunks,
    fault,
    lines,
    read_mixture,
    read_texts,
)
from huggingface import load_tokenizer
from loader import Windows
from tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
zstandard = import_module(ZSTANDARD)
ODD = ["é日🙂 <eos>\r\n\tx  ", "a\u2028b\x00c\x85d", "\n\n\n   x", "'\"\\n"]


def texts_of(count, seed=0, size=8):
    """Texts, each unlike all others."""
    draw = random.Random(seed)
    texts = []
    for i in range(count):
        functions = f"def f{i}(x):\n    return x[{i}]\n" * draw.randint(1, size)
        texts.append(f"# {seed} {i} {ODD[i % 4]}\n" + functions)
    return texts


def write_lines(path, texts, **columns):
    """Write texts in the format that the path ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": t, **{k: v[i] for k, v in columns.items()}} for i, t in enumerate(texts)]
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        return pyarrow.parquet.write_table(table, path, row_group_size=7)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        # several members, as of `cat a.gz b.gz`
        content = gzip.compress(content[:50]) + gzip.compress(content[50:])
    elif path.suffix == ".zst":
        frames = (zstandard.compress(c) for c in (content[:50], content[50:]))
        content = b"".join(frames)
    path.write_bytes(content)


def prepare(out, **cfg):
    """Run in this process. Returns the folder as {file name: bytes}."""
    stack.load_tokenizer.cache_clear()
    stack.prepare(Config(**{"out": str(out), "workers": 1, "val_percent": 20.0} | cfg))
    return contents(out)


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def command(out, *words):
    return [sys.executable, "-m", "data.stack.prepare", f"--out={out}", "--val_percent=20", *words]


def run(out, *words, fails=False):
    """Run as a command. Returns what it printed, or where it must fail its one line of error."""
    ran = subprocess.run(command(out, *words), cwd=ROOT, capture_output=True, text=True,
                         timeout=120)
    assert (ran.returncode != 0) == fails, ran.stderr
    last = ran.stderr.splitlines()[-1] if ran.stderr else ""
    if fails:
        assert last.startswith("error: ") and "Traceback" not in ran.stderr
    return last if fails else ran.stdout


def documents(out, split):
    """The documents of a split as lists of ids, and the lengths of its shards."""
    vocab_size = json.loads((out / "meta.json").read_text())["vocab_size"]
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    cut, sizes = [], []
    for path in sorted(out.glob(f"{split}_*.bin")):
        tokens = np.fromfile(path, dtype)
        offsets = np.fromfile(path.with_suffix(".idx"), np.int64)
        assert offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) > 0).all()
        cut += [tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
        sizes.append(len(tokens))
    return cut, sizes


def text_ids(document, tok):
    """A document without its <bos> and its <eos>, which are counted here."""
    end = len(document)
    while document[end - 1] == tok.eos_id:
        end -= 1
    assert document[0] == tok.bos_id
    assert len(document) % 8 == 0 and 1 <= len(document) - end <= 8
    return document[1:end]


def texts(out, split):
    tok = load_tokenizer(out)
    return [tok.decode(text_ids(d, tok)) for d in documents(out, split)[0]]


def mixture(path, *sources):
    listed = [{"name": f"s{i}", "weight": 1, "text": "text"} | s for i, s in enumerate(sources)]
    path.write_text(json.dumps(listed))
    return str(path)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    """A folder with a tokenizer of 300 ids, to spare the tests its training."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(train_tokenizer(texts_of(50), 300).to_str())
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of 8 files in all formats, 40 texts each and 6 that are in every file."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        write_lines(folder / f"f{i}{ENDINGS[i % 4]}", texts_of(40, i) + texts_of(6, 99))
    return folder


# -- what is read

def test_every_format_gives_the_same_bytes_and_every_document_is_its_text(tmp_path, tok):
    wanted, made = texts_of(60), []
    for ending in ENDINGS:
        write_lines(tmp_path / ending / f"a{ending}", wanted)
        source = str(tmp_path / ending)
        made.append(prepare(tmp_path / f"out{ending}", source=source, tokenizer=tok))
        del made[-1]["meta.json"]  # which names the source
    assert all(m == made[0] for m in made)
    assert {"train_00000.bin", "val_00000.idx", "tokenizer.json"} <= made[0].keys()
    out = tmp_path / "out.parquet"
    held_out = [stack.is_val(stack.digest_of(t), 20) for t in wanted]
    assert texts(out, "train") == [t for t, h in zip(wanted, held_out) if not h]
    assert texts(out, "val") == [t for t, h in zip(wanted, held_out) if h] and any(held_out)
    t = load_tokenizer(out)
    assert not any({t.bos_id, t.eos_id} & set(text_ids(d, t)) for d in documents(out, "train")[0])


@given(st.lists(st.binary(max_size=9)), st.integers(1, 7))
def test_lines_are_those_between_line_ends_whatever_the_chunks(parts, size):
    content = b"\n".join(parts)
    assert list(lines(chunks(io.BytesIO(content), size))) == content.split(b"\n")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=30)))
def test_any_text_comes_through_a_file(texts):
    fs = fsspec.filesystem("memory")
    fs.pipe("/any/a.jsonl", "".join(json.dumps({"text": t}) + "\n\n" for t in texts).encode())
    read = list(read_texts("memory://any/a.jsonl", {"text": "text"}, 1000))
    assert read == [("", fault(t, 1000)) if fault(t, 1000) else (t, "") for t in texts]


def test_urls_globs_folders_and_lists_name_the_same_files(tmp_path, tok):
    fs = fsspec.filesystem("memory")
    for name in "ba":
        write_lines(tmp_path / "in" / f"{name}.jsonl", texts_of(20, ord(name)))
        fs.pipe(f"/in/{name}.jsonl", (tmp_path / "in" / f"{name}.jsonl").read_bytes())
    fs.pipe("/in/README.md", b"not data")
    local = f"{tmp_path}/in"
    made = []
    listed = [f"{local}/b.jsonl", f"{local}/a.jsonl", f"{local}/*.jsonl"]
    sources = [local, f"{local}/*", f"{local}/?.jsonl", f"file://{local}/*.jsonl",
               "memory://in/*", "memory://in", listed]
    for i, source in enumerate(sources):
        path = mixture(tmp_path / "m.json", {"source": source})
        made.append(prepare(tmp_path / f"out{i}", mixture=path, tokenizer=tok))
        del made[-1]["meta.json"]
    assert all(m == made[0] for m in made)
    of_a = [t for t in texts_of(20, ord("a")) if not stack.is_val(stack.digest_of(t), 20)]
    assert texts(tmp_path / "out0", "train")[:len(of_a)] == of_a  # by name: a before b


def test_a_document_in_several_files_and_sources_is_written_where_it_was_first(tmp_path, tok):
    a, b = texts_of(20, 1), texts_of(20, 2)
    write_lines(tmp_path / "1" / "x.jsonl", a + a[:5])
    write_lines(tmp_path / "1" / "y.jsonl.gz", a[3:9] + b[:4])
    write_lines(tmp_path / "2" / "z.parquet", b + a)
    path = mixture(tmp_path / "m.json", {"source": f"{tmp_path}/1"}, {"source": f"{tmp_path}/2"})
    out = tmp_path / "out"
    prepare(out, mixture=path, tokenizer=tok)
    assert texts(out, "train") == [t for t in a + b if not stack.is_val(stack.digest_of(t), 20)]
    sources = json.loads((out / "meta.json").read_text())["sources"]
    assert [s["left_out"] for s in sources] == [{"duplicate": 11}, {"duplicate": 24}]


def test_languages_are_filtered_and_what_is_left_out_is_counted(tmp_path, tok):
    good, languages = texts_of(30), ["Python", "C", None] * 10
    unfit = ["", " \n\t", "x" * 3000, None]
    write_lines(tmp_path / "a.parquet", good + unfit, lang=languages + ["Python"] * 4)
    write_lines(tmp_path / "b.jsonl", ["half a pair: \ud800"], lang=["Python"])
    path = mixture(tmp_path / "m.json", {"source": f"{tmp_path}/[ab].*", "language_column": "lang",
                                         "languages": ["Python", "Go"]})
    prepare(tmp_path / "out", mixture=path, tokenizer=tok, max_chars=2000)
    written = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert sorted(written) == sorted(good[::3])
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["sources"][0]["left_out"] == {
        "empty": 3, "not Unicode": 1, "other language": 20, "too long": 1}


def test_a_million_blanks_which_make_tiktoken_panic_are_left_out_and_said_so(tmp_path, tok, capfd):
    fine = ["x" + " " * 100_000 + "y", "w" * 300_000, *texts_of(20)]
    many = ["x" + "\n\t " * 40_000 + "x", " " * 1_000_001 + "x"]
    write_lines(tmp_path / "a.jsonl", [fine[0], many[1], fine[1], many[0], *fine[2:]])
    prepare(tmp_path / "out", source=f"{tmp_path}/a.jsonl", tokenizer=tok, max_chars=2_000_000)
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")) == sorted(fine)
    assert "; 2 left out: too much white space in a row\n" in capfd.readouterr().out


# -- what is written

def test_shards_hold_at_most_so_many_tokens_and_the_loader_reads_them(tmp_path, tok, corpus):
    prepare(tmp_path / "whole", source=str(corpus), tokenizer=tok)
    prepare(tmp_path / "cut", source=str(corpus), tokenizer=tok, shard_tokens=1000)
    for split in ("train", "val"):
        whole = documents(tmp_path / "whole", split)[0]
        cut, sizes = documents(tmp_path / "cut", split)
        assert cut == whole and len(sizes) > 2 and max(sizes) <= 1000
        paths = sorted((tmp_path / "cut").glob(f"{split}_*.idx"))
        firsts = [np.fromfile(path, np.int64)[1] for path in paths]  # lengths of first documents
        # no shard is cut early
        assert all(size + first > 1000 for size, first in zip(sizes, firsts[1:]))
        windows = Windows(tmp_path / "cut", split, 16, 300)
        assert len(windows) == sum(s // 16 for s in sizes)
        windows.batch(range(len(windows)))


def test_a_shard_can_be_full_to_the_last_token(tmp_path, tok):
    length = 16
    encode = load_tokenizer(tok).encode
    candidates = (f"def f(x):  # {i}" for i in range(500))
    same = [text for text in candidates if length - 8 < len(encode(text)) + 2 <= length]
    write_lines(tmp_path / "a.jsonl", same)
    source = str(tmp_path / "a.jsonl")
    prepare(tmp_path / "out", source=source, tokenizer=tok, shard_tokens=2 * length)
    assert set(documents(tmp_path / "out", "train")[1][:-1]) == {2 * length} and len(same) > 10


@pytest.mark.parametrize("shard_tokens, left_out", [(15, 1), (16, 0), (17, 0)])
def test_the_filling_counts_for_what_a_shard_holds(tmp_path, tok, shard_tokens, left_out):
    """Ten tokens and one <bos> need a shard of 16."""
    t = load_tokenizer(tok)
    text = "\1\2\3\4\5\6\7\x0e\x0f\x10"  # a token each
    assert len(t.encode(text)) == 10
    some = (f"#{i}" for i in range(999))
    short = [s for s in some if len(t.encode(s)) <= 6][:40]  # for both splits
    write_lines(tmp_path / "a.jsonl", [text, *short])
    prepare(tmp_path / "out", source=str(tmp_path), tokenizer=tok, shard_tokens=shard_tokens)
    left = json.loads((tmp_path / "out" / "meta.json").read_text())["sources"][0]["left_out"]
    assert left.get("too long", 0) == left_out
    for split in ("train", "val"):
        assert max(documents(tmp_path / "out", split)[1]) <= shard_tokens


def test_data_of_an_older_version_is_refused(tmp_path, tok, monkeypatch):
    """Its documents ended in one <eos>, whatever their length."""
    write_lines(tmp_path / "a.jsonl", texts_of(40))
    cfg, out = dict(source=f"{tmp_path}/a.jsonl", tokenizer=tok), tmp_path / "out"
    monkeypatch.setattr(tokenizer, "MULTIPLE", 1)
    monkeypatch.setattr(stack, "LAYOUT", 1)
    prepare_and_die(tmp_path / "begun", 20, **cfg)
    prepare(out, **cfg)
    monkeypatch.undo()
    with pytest.raises(Mistake, match="an older version prepared them"):
        Windows(out, "train", 16, 300)
    with pytest.raises(Mistake, match="was prepared otherwise: give another --out, or delete"):
        prepare(out, **cfg)
    with pytest.raises(Mistake, match="was begun with other layout"):
        prepare(tmp_path / "begun", **cfg)


def test_a_document_longer_than_a_shard_is_left_out(tmp_path, tok):
    write_lines(tmp_path / "a.jsonl", [*texts_of(30, size=1), "y = 0\n" * 500])
    prepare(tmp_path / "out", source=str(tmp_path / "a.jsonl"), tokenizer=tok, shard_tokens=200)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"][0]["left_out"] == {"too long": 1}


def test_a_source_gives_its_share_and_is_repeated_but_for_what_is_held_out(tmp_path, tok, capsys):
    long, short = texts_of(400, 1), texts_of(20, 2)
    write_lines(tmp_path / "long.jsonl", long)
    # in part the other's, in the same row
    write_lines(tmp_path / "s1.jsonl", long[:1] + short[:12])
    # in part its own again
    write_lines(tmp_path / "s2.jsonl", long[:1] + short[:1] + short[8:] + long[:2])
    path = mixture(tmp_path / "m.json", {"source": f"{tmp_path}/long.jsonl", "weight": 3},
                   {"source": f"{tmp_path}/s*.jsonl", "weight": 1.5})
    out = tmp_path / "out"
    prepare(out, mixture=path, tokenizer=tok, tokens=20_000)
    train, val = texts(out, "train"), texts(out, "val")
    longest = max(len(d) for split in ("train", "val") for d in documents(out, split)[0])
    tally = [s["tokens"] for s in json.loads((out / "meta.json").read_text())["sources"]]
    assert 0 <= tally[0] - 20_000 * 2 / 3 < longest and 0 <= tally[1] - 20_000 / 3 < longest
    assert sum(len(d) for split in ("train", "val") for d in documents(out, split)[0]) == sum(tally)
    mine = [t for t in train if t in short]
    once = [t for t in short if not stack.is_val(stack.digest_of(t), 20)]
    assert len(mine) > 3 * len(once) and mine == (once * 99)[:len(mine)]
    assert train == [t for t in train if t in long] + mine  # the order of the mixture
    assert len(set(val)) == len(val) and set(val) & set(short) and not set(val) & set(train)
    pattern = r"s1: [\d,]+ tokens, of [\d,]+ read ([\d.]+) times"
    times = float(re.search(pattern, capsys.readouterr().out)[1])
    assert times == pytest.approx(len(mine) / len(once), abs=0.15)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.5, 9), min_size=1, max_size=4), st.integers(4000, 9000), st.data())
def test_shares_are_kept_to_the_document_whatever_the_weights(tok, weights, tokens, data):
    fs = fsspec.filesystem("memory")
    fs.rm("/mix", recursive=True) if fs.exists("/mix") else None
    sources = []
    for i, weight in enumerate(weights):
        for f in range(data.draw(st.integers(1, 3))):
            rows = [json.dumps({"text": t}) + "\n" for t in texts_of(9, 10 * i + f)]
            fs.pipe(f"/mix/{i}/{f}.jsonl", "".join(rows).encode())
        sources.append({"source": f"memory://mix/{i}", "weight": weight})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        path = mixture(Path(folder) / "m.json", *sources)
        prepare(out, mixture=path, tokenizer=tok, tokens=tokens)
        longest = max(len(d) for split in ("train", "val") for d in documents(out, split)[0])
        for s, weight in zip(json.loads((out / "meta.json").read_text())["sources"], weights):
            assert 0 <= s["tokens"] - tokens * weight / sum(weights) < longest


def test_a_tokenizer_is_trained_on_the_first_documents_that_are_not_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(stack, "SAMPLE_CHARS", 6000)
    a, b = texts_of(100, 1), texts_of(100, 2)
    held_out = next(i for i, t in enumerate(a) if stack.is_val(stack.digest_of(t), 20))
    while not stack.is_val(stack.digest_of("quokka_" * 400 + f"{held_out}"), 20):
        held_out += 1
    write_lines(tmp_path / "a.jsonl", ["quokka_" * 400 + f"{held_out}"] + a)
    write_lines(tmp_path / "b.jsonl", b + ["wombat_" * 400])
    path = mixture(tmp_path / "m.json", {"source": f"{tmp_path}/a.jsonl", "weight": 2},
                   {"source": f"{tmp_path}/b.jsonl"})
    sources = read_mixture(path, True)
    for s, f in zip(sources, "ab"):
        s["files"] = [[f"{tmp_path}/{f}.jsonl", 0, ""]]
    sample = list(stack.sample(Config(val_percent=20.0), sources))
    sizes = [sum(len(t) for t in sample if t in own) for own in (a, b)]
    assert 4000 <= sizes[0] < 4400 and 2000 <= sizes[1] < 2400
    assert len(sample) == sum(t in a or t in b for t in sample)
    made = prepare(tmp_path / "out", mixture=path, vocab_size=290, tokens=3000)
    assert made == prepare(tmp_path / "again", mixture=path, vocab_size=290, tokens=3000)
    trained = load_tokenizer(tmp_path / "out")
    assert trained.vocab_size == 290
    assert json.loads(made["meta.json"])["vocab_size"] == 290
    assert not any(b"quok" in trained.bytes_of(i) for i in range(290))


# -- workers and interruptions

def test_workers_change_nothing(tmp_path, tok, corpus):
    words = [f"--source={corpus}", f"--tokenizer={tok}", "--tokens=60000", "--shard_tokens=9000"]
    for n in (1, 3):
        run(tmp_path / f"w{n}", *words, f"--workers={n}")
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3")
    assert "nothing to do, 8 files unchanged" in run(tmp_path / "w3", *words, "--workers=2")
    assert not (tmp_path / "w3" / "parts").exists()


def prepare_and_die(out, calls, **cfg):
    """Run in a fork that ends at the calls-th commit, finished part or written document.

    Nothing is flushed or closed.
    """
    if pid := os.fork():
        return os.waitpid(pid, 0)
    left = [calls]

    def mortal(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(0)
            return function(*args, **kwargs)
        return wrapped
    for name in ("commit", "write_text"):
        setattr(stack, name, mortal(getattr(stack, name)))
    stack.Shards.add = mortal(stack.Shards.add)
    try:
        prepare(out, **cfg)
    finally:
        os._exit(0)


@settings(max_examples=8, deadline=None)
@given(deaths=st.lists(st.integers(0, 900), min_size=1, max_size=4))
def test_a_run_that_dies_anywhere_goes_on_to_the_same_bytes(undisturbed, deaths):
    with tempfile.TemporaryDirectory() as folder:
        for calls in deaths:
            prepare_and_die(Path(folder) / "out", calls, **undisturbed[0])
        assert prepare(Path(folder) / "out", **undisturbed[0]) == undisturbed[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tok, corpus):
    """(settings, the folder's bytes) of a run that repeats its source."""
    cfg = dict(source=str(corpus), tokenizer=tok, tokens=45_000, shard_tokens=9000)
    return cfg, prepare(tmp_path_factory.mktemp("work") / "out", **cfg)


def killed_runs(out, words, kills, draw, longest):
    """Kill runs of the command at random times, and see that no worker outlives them.

    Returns how many were cut short.
    """
    cut = 0
    for _ in range(kills):
        process = subprocess.Popen(command(out, *words), cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, longest))
        children, cut = children_of(process), cut + (process.poll() is None)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until = time.time() + 10
        while any(alive(pid) for pid in children):
            assert time.time() < until, "a worker outlived the main process"
            time.sleep(0.05)
    return cut


def children_of(process):
    """The ids of a running process' children; [] where there is no /proc to say so."""
    try:
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]
    except OSError:
        return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_killed_at_random_times_goes_on_to_the_same_bytes(
        tmp_path, tok, corpus, undisturbed):
    words = [f"--{key}={value}" for key, value in undisturbed[0].items()] + ["--workers=2"]
    killed_runs(tmp_path / "out", words, 4, random.Random(7), 0.7)
    run(tmp_path / "out", *words)
    assert contents(tmp_path / "out") == undisturbed[1]


@pytest.mark.slow
def test_a_longer_run_killed_thirty_times_goes_on_to_the_same_bytes(tmp_path, tok):
    for i in range(12):
        write_lines(tmp_path / "in" / f"{i:02d}.jsonl", texts_of(4000, i, 20))
    words = [f"--source={tmp_path}/in", f"--tokenizer={tok}", "--tokens=12000000",
             "--shard_tokens=500000"]
    run(tmp_path / "calm", *words, "--workers=1")
    cut = killed_runs(tmp_path / "out", [*words, "--workers=3"], 30, random.Random(8), 1.5)
    run(tmp_path / "out", *words, "--workers=2")
    assert cut >= 5 and contents(tmp_path / "out") == contents(tmp_path / "calm")


def test_finished_parts_are_kept(tmp_path, tok, corpus, monkeypatch):
    out, made, real = tmp_path / "out", [], stack.write_text
    # before the first part's .json: it does not count
    prepare_and_die(out, 1, source=str(corpus), tokenizer=tok)
    assert sorted(p.name for p in out.glob("parts/0*")) == ["0000000.bin", "0000000.docs"]
    prepare_and_die(out, 1, source=str(corpus), tokenizer=tok)  # after it

    def counted(path, text):
        made.append(path.name)
        real(path, text)

    monkeypatch.setattr(stack, "write_text", counted)
    prepare(out, source=str(corpus), tokenizer=tok)
    assert made == [f"{n:07d}.json" for n in range(1, 8)] + ["meta.json"]


def test_committed_documents_are_kept(tmp_path, tok, corpus):
    # in the third part, of 48 calls each or fewer
    prepare_and_die(tmp_path / "out", 100, source=str(corpus), tokenizer=tok)
    db, state = stack.open_ledger(tmp_path / "out" / "parts" / "ledger.sqlite")
    assert state["done"] == [0, 0, 1] and state["train"][1] > 1000
    seen, = db.execute("SELECT count(*) FROM seen").fetchone()
    assert seen == state["train"][2] + state["val"][2] == 86
    db.close()


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, tok):
    for i in range(2):
        # seconds of work, on a busy machine too
        write_lines(tmp_path / f"{i}.jsonl", texts_of(200, i, 20) * 400)
    out = tmp_path / "out"
    words = [f"--source={tmp_path}/*.jsonl", f"--tokenizer={tok}", "--workers=2"]
    process = subprocess.Popen(command(out, *words), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    while len(begun := list(out.glob("parts/*.docs.tmp"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for path in begun:
        os.kill(int(path.name.split(".")[1]), signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None  # it is not for a worker to stop
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    printed = process.communicate(timeout=30)[1]
    assert process.returncode == 1, printed
    assert printed.splitlines()[-1] == "stopped; the same command continues from here", printed
    assert "Traceback" not in printed
    assert not list(out.glob("parts/*.json"))[1:]  # plan.json: nobody waited for the workers
    run(out, *words)


def test_two_runs_do_not_share_a_folder(tmp_path, tok, corpus):
    out = tmp_path / "out"
    (out / "parts").mkdir(parents=True)
    db, _ = stack.open_ledger(out / "parts" / "ledger.sqlite")
    message = run(out, f"--source={corpus}", f"--tokenizer={tok}", fails=True)
    assert "is another run at work in this folder?" in message
    db.close()


# -- memory

def peak(url, tok, out):
    """The peak memory, in MiB, of a process that makes a part of this file."""
    code = ("import sys; from pathlib import Path; from data.stack.prepare import *\n"
            "out = Path(sys.argv[2]); (out / 'parts').mkdir(parents=True)\n"
            "open_tokenizer(sys.argv[3]).save(out)\n"
            "make_part(out / 'parts' / 'p', sys.argv[1], {'text': 'text'}, Config(out=out))\n"
            # getrusage has the parent's peak in it
            "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
            "print(int(status['VmHWM'].split()[0]) / 1024)")
    words = [sys.executable, "-c", code, url, str(out), tok]
    return float(subprocess.run(words, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="asks Linux for a process' peak memory")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_workers_memory_does_not_grow_with_its_file(tmp_path, tok, ending):
    some, peaks = texts_of(2000, 1, 40), []
    for name, times in (("small", 5), ("large", 80)):  # 120 MB
        path = tmp_path / f"{name}{ending}"
        if ending == ".parquet":
            schema = pyarrow.schema([("text", pyarrow.string())])
            with pyarrow.parquet.ParquetWriter(path, schema) as writer:
                for _ in range(times):
                    writer.write_table(pyarrow.table({"text": some}), row_group_size=1000)
        else:
            chunk = "".join(json.dumps({"text": t}) + "\n" for t in some).encode()
            opener = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
            with opener(path, "wb") as f:
                for _ in range(times):
                    f.write(chunk)
        peaks.append(peak(str(path), tok, tmp_path / f"out_{name}"))
    assert (tmp_path / "out_large" / "parts" / "p.bin").stat().st_size > 80e6
    assert peaks[1] < peaks[0] + 20, peaks


# -- what is refused

def test_another_setting_on_a_folder_is_refused_and_leaves_it_as_it_was(tmp_path, tok, corpus):
    cfg, out = dict(source=str(corpus), tokenizer=tok), tmp_path / "out"
    prepare_and_die(out, 20, **cfg)
    with pytest.raises(Mistake, match="begun with other tokens, shard_tokens"):
        prepare(out, **cfg, tokens=10_000, shard_tokens=900)
    whole = prepare(out, **cfg)
    changes = [{"tokens": 10_000}, {"tokenizer": "", "vocab_size": 290},
               {"source": f"{corpus}/f1*"}, {"val_percent": 3.0}, {"bos_token": "<start>"}]
    said = "holds data that was prepared otherwise: give another --out, or delete"
    for change in changes:
        with pytest.raises(Mistake, match=said):
            prepare(out, **cfg | change)
    assert contents(out) == whole
    (out / "train_00000.bin").write_bytes(b"cut")
    with pytest.raises(Mistake, match="has lost some of its train shards"):
        prepare(out, **cfg)


def test_a_changed_input_file_and_a_folder_of_another_script_are_refused(
        tmp_path, tok, data_folder):
    write_lines(tmp_path / "a.jsonl", texts_of(40))
    prepare(tmp_path / "out", source=f"{tmp_path}/a.jsonl", tokenizer=tok)
    write_lines(tmp_path / "a.jsonl", texts_of(41))
    with pytest.raises(Mistake, match="prepared otherwise"):
        prepare(tmp_path / "out", source=f"{tmp_path}/a.jsonl", tokenizer=tok)
    shutil.copytree(data_folder, tmp_path / "other")
    with pytest.raises(Mistake, match="prepared otherwise"):
        prepare(tmp_path / "other", source=f"{tmp_path}/a.jsonl", tokenizer=tok)
    (tmp_path / "other" / "meta.json").unlink()
    with pytest.raises(Mistake, match="holds data of another script"):
        prepare(tmp_path / "other", source=f"{tmp_path}/a.jsonl", tokenizer=tok)


BROKEN = {
    "a.jsonl": (b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3, is not JSON: "),
    "b.jsonl": (b'{"text": "a"}\n{"body": "b", "id": 1}\n',
                "b.jsonl, row 2: 'text' wanted, but it has body, id"),
    "c.jsonl": (b'["text"]\n', "c.jsonl, row 1: 'text' wanted, but it has no columns at all"),
    "d.jsonl": (b'{"text": 7}\n', "d.jsonl, row 1: column 'text' holds int, not text"),
    "e.jsonl": (b'{"text": "\xff"}\n', "e.jsonl, line 1, is not JSON: "),
    "f.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
                   "f.jsonl.gz is truncated (EOFError: "),
    "g.jsonl.zst": (b"no zstandard", "g.jsonl.zst cannot be read (ZstdError: "),
    "i.jsonl.gz": (b"", "i.jsonl.gz is truncated (EOFError: it is empty"),
    "j.jsonl.zst": (b"", "j.jsonl.zst is truncated (EOFError: "),
    "k.parquet": (b"PAR1" + bytes(99), "k.parquet is truncated (EOFError: its end is missing"),
    "h.parquet": (b"no parquet", "h.parquet cannot be read (ArrowInvalid: "),
}


@pytest.mark.parametrize("name", ["a.jsonl", "h.parquet"])
def test_a_workers_error_is_one_line(tmp_path, tok, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    write_lines(tmp_path / "z.jsonl", texts_of(9))
    words = [f"--source={tmp_path}", f"--tokenizer={tok}", "--workers=2"]
    assert said in run(tmp_path / "out", *words, fails=True)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, tok, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Mistake) as error:
        prepare(tmp_path / "out", source=str(tmp_path), tokenizer=tok)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("count", [3, 400])  # one block of Zstandard, and several
def test_a_file_cut_anywhere_is_truncated_and_never_gives_fewer_documents(tmp_path, ending, count):
    path, texts = tmp_path / f"a{ending}", [text * 9 for text in texts_of(count)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if ending == ".parquet":
        write_lines(path, texts)
        whole = path.read_bytes()
    elif ending == ".jsonl.gz":
        whole = gzip.compress(rows)
    else:
        whole = zstandard.compress(rows)
    steps = max(1, len(whole) // 60)
    ends = {0, 4, *range(8, len(whole), steps), *range(len(whole) - 9, len(whole))}
    for end in sorted(ends):
        path.write_bytes(whole[:end])
        with pytest.raises(Mistake, match=re.escape(str(path))) as error:
            list(read_texts(str(path), {"text": "text"}, 10**6))
        if end >= 12:
            assert "is truncated" in str(error.value)


def test_a_cut_file_of_one_block_stops_a_run(tmp_path, tok):
    write_lines(tmp_path / "a.jsonl.zst", texts_of(20))
    write_lines(tmp_path / "b.jsonl.zst", texts_of(20, 1))
    path = tmp_path / "b.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-3])
    message = run(tmp_path / "out", f"--source={tmp_path}/*.zst", f"--tokenizer={tok}", fails=True)
    assert f"{path} is truncated" in message
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_of_nothing_and_frames_to_skip_are_fine(tmp_path, frames):
    row = zstandard.compress(b'{"text": "a"}\n')
    nothing = zstandard.compress(b"")
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes((row + nothing + skipped) * frames)
    assert list(read_texts(str(path), {"text": "text"}, 99)) == [("a", "")] * frames


DAMAGED = [b"[]", b"null", b"5", b"{", b"", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_plan_or_meta_is_named(tmp_path, tok, content):
    write_lines(tmp_path / "a.jsonl", texts_of(40))
    out, cfg = tmp_path / "out", dict(source=f"{tmp_path}/a.jsonl", tokenizer=tok)
    prepare_and_die(out, 20, **cfg)
    (out / "parts" / "plan.json").write_bytes(content)
    with pytest.raises(Mistake, match="parts/plan.json"):
        prepare(out, **cfg)
    (out / "meta.json").write_bytes(content)
    with pytest.raises(Mistake, match="out/meta.json"):
        prepare(out, **cfg)


@pytest.mark.parametrize("change", [{"train": None}, {"val": {"tokens": None}}, {"val": 5},
                                    {"train": {}}, {"vocab_size": "300"}])
def test_a_meta_without_its_numbers_is_named(tmp_path, tok, change):
    write_lines(tmp_path / "a.jsonl", texts_of(40))
    out, cfg = tmp_path / "out", dict(source=f"{tmp_path}/a.jsonl", tokenizer=tok)
    prepare(out, **cfg)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(Mistake, match="meta.json is damaged: delete"):
        prepare(out, **cfg)


def test_a_file_name_that_is_not_utf_8_is_a_name_too(tmp_path, tok):
    folder = os.fsencode(tmp_path) + b"/odd\xff"
    os.mkdir(folder)
    write_lines(Path(os.fsdecode(folder)) / "a.jsonl", texts_of(40))
    words = [f"--source={os.fsdecode(folder)}", f"--tokenizer={tok}"]
    run(tmp_path / "out", *words)
    assert "nothing to do, 1 files unchanged" in run(tmp_path / "out", *words)


def test_a_folder_without_a_tokenizer_is_not_called_unprepared_data(tmp_path):
    write_lines(tmp_path / "a.jsonl", texts_of(4))
    (tmp_path / "run").mkdir()
    with pytest.raises(Mistake, match=f"--tokenizer={tmp_path}/run has no tokenizer"):
        prepare(tmp_path / "out", source=f"{tmp_path}/a.jsonl", tokenizer=f"{tmp_path}/run")


def test_a_parquet_file_without_the_column_says_what_it_has(tmp_path, tok):
    write_lines(tmp_path / "a.parquet", texts_of(3), lang=["C"] * 3)
    with pytest.raises(Mistake, match=r"a.parquet, row 1: 'content' wanted, but it has text, lang"):
        prepare(tmp_path / "out", source=str(tmp_path), tokenizer=tok, text="content")


FINE = {"name": "a", "source": "x", "weight": 1, "text": "text"}
MIXTURES = {
    "unknown key": ([FINE | {"wieght": 2}], "source 'a' has an unknown key 'wieght'"),
    "no name": ([{"source": "x", "weight": 1, "text": "text"}], "source '?' has no 'name'"),
    "weight 0": ([FINE | {"weight": 0}], "has weight 0; it must be a number above 0"),
    "weight -1": ([FINE | {"weight": -1}], "has weight -1"),
    "weight text": ([FINE | {"weight": "1"}], "has weight '1'"),
    "weight true": ([FINE | {"weight": True}], "has weight True"),
    "weight nan": ([FINE | {"weight": float("nan")}], "NaN is not a finite number"),
    "weight huge": ([FINE | {"weight": 10**400}], "a number above 0 and up to 1e18"),
    "source a number": ([FINE | {"source": 5}], "source 'a' has source 5; it must be a file"),
    "source null": ([FINE | {"source": None}], "source 'a' has source None; it must be a file"),
    "source of lists": ([FINE | {"source": [["x"]]}], "source 'a' has source [['x']]; it must be"),
    "source empty": ([FINE | {"source": []}], "source 'a' has source []; it must be a file"),
    "name a list": ([FINE | {"name": [1]}], "source [1] has name [1]; it must be a text"),
    "text an object": ([FINE | {"text": {}}], "source 'a' has text {}; it must be a text"),
    "license a number": ([FINE | {"license": 4}], "source 'a' has license 4; it must be a text"),
    "column a number": ([FINE | {"language_column": 1, "languages": ["C"]}],
                        "source 'a' has language_column 1; it must be a text"),
    "languages of numbers": ([FINE | {"language_column": "lang", "languages": [1]}],
                             "'languages', a list of texts"),
    "null": (None, "must be a list of sources"),
    "numbers": ([1], "must be a list of sources"),
    "languages": ([FINE | {"languages": ["C"]}], "must have both 'language_column'"),
    "one language": ([FINE | {"languages": "C", "language_column": "lang"}],
                     "must have both 'language_column'"),
    "twice": ([FINE, FINE], "two sources of one name"),
    "no list": (FINE, "must be a list of sources"),
    "empty": ([], "must be a list of sources"),
    "unequal": ([FINE, FINE | {"name": "b", "weight": 2}], "has unequal weights"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_an_impossible_mixture_is_refused(tmp_path, name):
    sources, said = MIXTURES[name]
    (tmp_path / "m.json").write_text(json.dumps(sources))
    with pytest.raises(Mistake, match=re.escape(said)):
        prepare(tmp_path / "out", mixture=str(tmp_path / "m.json"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cfg, said", [
    ({}, "give either --source=GLOB or --mixture=FILE.json"),
    ({"source": "a", "mixture": "b"}, "give either --source=GLOB or --mixture=FILE.json"),
    ({"source": "/no/such.jsonl"}, "no file at /no/such.jsonl that ends in .jsonl, "),
    ({"source": "/no/such/*.parquet"}, "no file at /no/such/*.parquet that ends in"),
    ({"source": "nosuch://a/b.jsonl"},
     "nosuch://a/b.jsonl cannot be listed (ValueError: Protocol not known"),
    ({"mixture": "/no/such.json"}, "/no/such.json"),
    ({"source": "a", "val_percent": 100.0}, "val_percent=100.0 does not fit: val_percent is a"),
    ({"source": "a", "val_percent": float("nan")}, "val_percent=nan does not fit"),
    ({"source": "a", "tokens": -1}, "tokens=-1 does not fit: tokens is an int from 0 to "),
    ({"source": "a", "workers": -1}, "workers=-1 does not fit: workers is an int from 0"),
    ({"source": "a", "max_chars": 0}, "max_chars=0 does not fit: max_chars is an int from 1"),
    ({"source": "a", "shard_tokens": 0}, "shard_tokens=0 does not fit: shard_tokens is an int"),
    ({"source": "a", "vocab_size": 10**12}, "vocab_size is an int from 260 to 1,048,576"),
])
def test_impossible_settings_are_refused(tmp_path, cfg, said):
    with pytest.raises(Mistake, match=re.escape(said)):
        prepare(tmp_path / "out", **cfg)
    assert not (tmp_path / "out").exists()


def test_a_source_with_nothing_for_a_split_or_for_its_share_is_refused(tmp_path, tok):
    held_out = [t for t in texts_of(40) if stack.is_val(stack.digest_of(t), 20)]
    write_lines(tmp_path / "a.jsonl", held_out)
    with pytest.raises(Mistake, match="has nothing to train on, and is to give 9,000 tokens"):
        prepare(tmp_path / "out", source=f"{tmp_path}/a.jsonl", tokenizer=tok, tokens=9000)
    with pytest.raises(Mistake, match="no document fell to train"):
        prepare(tmp_path / "once", source=f"{tmp_path}/a.jsonl", tokenizer=tok)


def test_the_hub_out_of_reach_is_one_line_that_says_what_to_download(tmp_path, tok, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    source = "hf://datasets/bigcode/the-stack-dedup/data/python/*.parquet"
    said = run(tmp_path / "out", f"--source={source}", f"--tokenizer={tok}",
               fails=True)
    command = ("hf download bigcode/the-stack-dedup --repo-type dataset "
               "--include 'data/python/*.parquet' --local-dir FOLDER")
    assert f"run `{command}` elsewhere" in said
    assert "name FOLDER/data/python/*.parquet as the source" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, module", [
    ("a.parquet", "pyarrow"), ("a.jsonl.zst", ZSTANDARD), ("a.jsonl", "fsspec")])
def test_a_missing_package_is_named(tmp_path, tok, monkeypatch, name, module):
    write_lines(tmp_path / name, texts_of(3))
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(Mistake, match=f"is not installed: pip install {module}"):
        prepare(tmp_path / "out", source=str(tmp_path), tokenizer=tok)


@pytest.mark.parametrize("name, count", [("coda", 7), ("code", 1)])
def test_the_mixtures_here_are_valid_and_state_their_licenses(name, count):
    sources = read_mixture(ROOT / "data" / "stack" / f"{name}.json", True)
    assert len(sources) == count and all(s["license"] and s["note"] for s in sources)

