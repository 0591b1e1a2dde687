"""Text files, more than fit in memory, as the shards that loader.py reads: by many processes, and resumable.

    python -m data.stack.prepare --source="/corpus/*.jsonl.zst" --text=content --out=data/mine    # every document once
    python -m data.stack.prepare --mixture=data/stack/code.json --out=data/code --tokens=3e9      # sources by weight
    python -m data.stack.prepare --mixture=data/stack/coda.json --out=data/coda --tokens=1e9 --tokenizer=FOLDER

A source is .jsonl, .jsonl.gz, .jsonl.zst or .parquet files: a file, a glob, a folder, or a URL that fsspec opens, such as
hf://datasets/OWNER/NAME/data/*.parquet. A mixture is a JSON list of {"name", "source" (one or a list of them), "weight",
"text" (the column with the document)} and, where wanted, "language_column", "languages" (to keep), "licence" and "note".
coda.json and code.json say under what terms their sources come, and what of it could not be confirmed.

Writes train_00000.bin, train_00000.idx, val_00000.bin and so on as data/stdlib/prepare.py does, tokenizer.json, and
meta.json last: without it loader.py refuses the folder. Documents stand in the order of the mixture, then of the files'
names, then of the rows; the loader shuffles. It takes two steps, which overlap:

1. Workers make each input file into a part: out/parts/N.bin (its documents' tokens), N.docs (their hashes and lengths)
   and, when those are whole, N.json. A part depends on its file alone.
2. The main process takes the parts in order, leaves out documents that were there before (a table in sqlite: the first
   owner wins) and appends the rest to the shards. With each part, sqlite commits how long the shards are; a
   run that was killed cuts them back to that and goes on. So neither workers nor interruptions change a byte.

--tokens=N: a source gives N * weight / (sum of weights) tokens, to the document. One with fewer is read again from its start,
but for the documents held out. --tokens=0: every document once, and the weights must be equal, as they mean nothing.

Not covered: near-duplicates, the quality of a text, several machines, columns within columns.
"""
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import configure
from data.stack.sources import list_files, read_mixture, read_texts
from data.stdlib.prepare import write_aside
from tokenizer import SPLIT, Tokenizer, train_tokenizer


@dataclass
class Config:
    source: str = ""  # one source: a file, a glob, a folder or a URL
    mixture: str = ""  # or several: a JSON file, such as data/stack/code.json
    text: str = "text"  # the column with the text, for --source
    out: str = "data/code"  # folder to write to
    tokens: int = 0  # how many to write, train and val together; 0: every document once
    tokenizer: str = ""  # folder of a tokenizer to use, or a model's name on the Hub; empty: train one
    bos_token: str = ""  # name of the token that begins a document; empty: the tokenizer's, if any; a new name is added
    vocab_size: int = 32768  # ids in all, for a tokenizer trained here
    val_percent: float = 0.5  # share of the documents held out for validation, in percent; a hash of their text decides
    max_chars: int = 1000000  # longer documents are left out
    shard_tokens: int = 100000000  # a shard has no more, and documents that do are left out
    workers: int = 0  # processes that tokenize; 0: one a core


SAMPLE_CHARS = 50_000_000  # how much text a tokenizer is trained on
DOC = np.dtype([("hash", "V16"), ("tokens", "<i8")])  # a document in a part's .docs


def digest_of(text):
    return hashlib.sha256(text.encode()).digest()[:16]


def is_val(digest, percent):
    """Whether the document of this hash is held out: the hash, as a number in [0, 1), decides."""
    return int.from_bytes(digest[:8], "big") / 2**64 < percent / 100


def dtype_for(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


@lru_cache(1)
def load_tokenizer(folder):
    """(encode, [bos], [eos], dtype). encode uses one thread: there is a process for every core."""
    tok = Tokenizer(folder)
    encode = tok.tik.encode_ordinary if getattr(tok, "tik", None) else lambda text: tok.encode_batch([text])[0]
    return encode, [tok.bos_id] * (tok.bos_id is not None), [tok.eos_id], dtype_for(tok.vocab_size)


def make_part(stem, url, source, cfg):
    """Tokenize the file `url` into the part `stem`. Returns what was left out of it, as {why: documents}."""
    done = stem.with_suffix(".json")
    if done.is_file():
        return json.loads(done.read_text())
    encode, bos, eos, dtype = load_tokenizer(cfg.out)
    left_out = Counter()
    asides = {ending: stem.with_suffix(f".{os.getpid()}{ending}.tmp") for ending in (".bin", ".docs")}
    with open(asides[".bin"], "wb") as tokens, open(asides[".docs"], "wb") as docs:
        for text, why in read_texts(url, source, cfg.max_chars):
            document = [] if why else bos + encode(text) + eos
            if why or len(document) > cfg.shard_tokens:
                left_out[why or "too long"] += 1
                continue
            tokens.write(np.array(document, dtype).tobytes())
            docs.write(np.array((digest_of(text), len(document)), DOC).tobytes())
    for ending, aside in asides.items():
        os.replace(aside, stem.with_suffix(ending))
    write_aside(done, lambda f: f.write(json.dumps(left_out).encode()))
    return left_out


def start_worker():
    """A new worker leaves Ctrl-C to the main process, and ends where that is killed: nobody else would end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_parts(jobs, wanted, pool, ahead):
    """make_part's result for each job, in order; `ahead` jobs are at work at a time. One no longer wanted is left out.

    jobs: list of make_part's arguments. wanted(source): whether its documents still are. pool: None works in this process.
    """
    jobs, running = deque(jobs), deque()
    while jobs or running:
        try:
            while jobs and len(running) < ahead:
                job = jobs.popleft()
                if wanted(job[2]):
                    running.append((job, pool.submit(make_part, *job) if pool else None))
            if not running:
                return
            job, future = running.popleft()
            if not wanted(job[2]):
                if future:
                    future.cancel()
                continue
            yield future.result() if pool else make_part(*job)
        except BrokenProcessPool as error:
            raise OSError("a worker was killed, perhaps for want of memory; the same command goes on, "
                          "with fewer --workers if need be") from error
        except (OSError, ValueError) as error:  # from another process, where the excepthook cannot see whose it is
            raise ValueError(str(error)) from error


class Shards:
    """The shards of one split, to append to. state: [number of the last one, its tokens, its documents]."""

    def __init__(self, out, split, dtype, limit, state):
        self.out, self.split, self.itemsize, self.limit = out, split, np.dtype(dtype).itemsize, limit
        self.open(*state)

    def open(self, number, tokens=0, documents=0):
        """Open shard `number`, cut to what was committed of it: nothing, where it was begun after the last commit."""
        self.state, self.files = [number, tokens, documents], []
        for ending, size in ((".bin", tokens * self.itemsize), (".idx", 8 + 8 * documents)):
            path = self.out / f"{self.split}_{number:05d}{ending}"
            if documents and (not path.is_file() or path.stat().st_size < size):
                raise ValueError(f"{path} was lost or cut short: delete {self.out} and start again")
            self.files.append(open(path, "r+b" if path.exists() else "w+b"))
            self.files[-1].truncate(size)  # a new .idx begins with the 0 where its first document starts
            self.files[-1].seek(size)

    def add(self, document, count):
        """Append a document: its tokens as bytes, and how many they are."""
        if self.state[1] + count > self.limit:
            self.close()
            self.open(self.state[0] + 1)
        number, tokens, documents = self.state
        self.files[0].write(document)
        self.files[1].write((tokens + count).to_bytes(8, "little"))
        self.state = [number, tokens + count, documents + 1]

    def flush(self):
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        self.flush()
        for file in self.files:
            file.close()


def open_ledger(path):
    """(database, state): which documents there were, and how far the shards are; state is {} at first."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        for line in ("PRAGMA locking_mode=EXCLUSIVE", "PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL",
                     "PRAGMA cache_size=-200000", "BEGIN IMMEDIATE",
                     "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID",
                     "CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY, json TEXT)"):
            db.execute(line)
    except sqlite3.DatabaseError as error:
        raise OSError(f"{path}: {error}; is another run at work in this folder?") from error
    found = db.execute("SELECT json FROM state").fetchone()
    return db, json.loads(found[0]) if found else {}


def commit(db, shards, state):
    """Make what was done so far last. The shards' bytes go first: sqlite must not know of more than there is."""
    for split, s in shards.items():
        s.flush()
        state[split] = s.state
    db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (json.dumps(state),))
    db.execute("COMMIT")
    db.execute("BEGIN IMMEDIATE")


def readings(source, tally, once):
    """(time, file) as long as the source has not given its quota: all its files in order, then again from the start."""
    for again in itertools.count():
        for f in range(len(source["files"])):
            if tally["tokens"] >= source["quota"]:
                return
            yield again, f
        if once or tally["tokens"] >= source["quota"]:
            return
        if not tally["train"]:
            raise ValueError(f"{source['name']} has nothing to train on, and is to give {math.ceil(source['quota']):,} tokens: "
                             "every document is held out or left out")


def take_part(stem, place, again, source, val_percent, db, shards, tally):
    """Append the documents of a part to the shards, until its source has given its quota.

    place: a number for the part's first document; the next ones count on from it. again: 0 the first time.
    """
    with open(f"{stem}.bin", "rb") as tokens, open(f"{stem}.docs", "rb") as docs:
        while chunk := np.fromfile(docs, DOC, 1 << 14).tolist():
            for digest, count in chunk:
                if tally["tokens"] >= source["quota"]:
                    return
                document, place = tokens.read(count * shards["train"].itemsize), place + 1
                val = is_val(digest, val_percent)
                if again:
                    owner, = db.execute("SELECT place FROM seen WHERE hash = ?", (digest,)).fetchone()
                    if val or owner != place:
                        continue
                elif not db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, place)).rowcount:
                    tally["left_out"]["duplicate"] = tally["left_out"].get("duplicate", 0) + 1
                    continue
                shards["val" if val else "train"].add(document, count)
                tally["tokens"] += count
                if not again:
                    tally["once"] += count
                    tally["train"] += 0 if val else count


def fill_shards(cfg, sources, pool, workers, dtype):
    """Make the parts and take them in order, until every source has given its quota. Returns a tally for each source."""
    out, parts = cfg.out, cfg.out / "parts"
    db, state = open_ledger(parts / "ledger.sqlite")
    state = state or {"done": [-1], "train": [0, 0, 0], "val": [0, 0, 0],
                      "tallies": [{"tokens": 0, "once": 0, "train": 0, "left_out": {}} for _ in sources]}
    shards = {split: Shards(out, split, dtype, cfg.shard_tokens, state[split]) for split in ("train", "val")}
    tallies, numbers = state["tallies"], itertools.count()
    stems = [[parts / f"{next(numbers):07d}" for _ in s["files"]] for s in sources]
    tally_of = {s["name"]: tally for s, tally in zip(sources, tallies)}
    briefs = [{key: value for key, value in s.items() if key != "files"} for s in sources]  # a job is sent to a process
    made = make_parts([(stem, url, briefs[n], cfg) for n, s in enumerate(sources)
                       for f, (stem, (url, _, _)) in enumerate(zip(stems[n], s["files"])) if [n, 0, f] > state["done"]],
                      lambda s: tally_of[s["name"]]["tokens"] < s["quota"], pool, 2 * workers)
    with tqdm(total=cfg.tokens or None, initial=sum(t["tokens"] for t in tallies), unit=" tokens", unit_scale=True) as bar:
        for n, (source, tally) in enumerate(zip(sources, tallies)):
            for again, f in readings(source, tally, once=not cfg.tokens):
                if [n, again, f] <= state["done"]:
                    continue
                if not again:
                    tally["left_out"] = dict(sorted((Counter(tally["left_out"]) + Counter(next(made))).items()))
                take_part(stems[n][f], int(stems[n][f].name) << 40, again, source, cfg.val_percent, db, shards, tally)
                state["done"] = [n, again, f]
                commit(db, shards, state)
                bar.update(sum(t["tokens"] for t in tallies) - bar.n)
            for stem, ending in itertools.product(stems[n], (".json", ".bin", ".docs")):
                stem.with_suffix(ending).unlink(missing_ok=True)
    for s in shards.values():
        s.close()
    db.close()
    return tallies


def unfinished(out, plan, mark):
    """Whether there is work to do in `out`, where the plan is then kept. Raises ValueError where another plan was at work.

    plan: all that the output depends on, as a dict. mark: its fingerprint.
    """
    meta, begun = out / "meta.json", out / "parts" / "plan.json"
    if meta.is_file():
        made = json.loads(meta.read_text())
        if made.get("fingerprint") != mark:
            raise ValueError(f"{out} holds data that was prepared otherwise: give another --out, or delete {out} first")
        for split in ("train", "val"):
            size = sum(path.stat().st_size for path in out.glob(f"{split}_*.bin"))
            if size != made[split]["tokens"] * np.dtype(dtype_for(made["vocab_size"])).itemsize:
                raise ValueError(f"{out} has lost some of its {split} shards: delete {out} and run this again")
    elif begun.is_file():
        other = json.loads(begun.read_text())
        if changed := [key for key in plan if plan[key] != other.get(key)]:
            raise ValueError(f"{out} was begun with other {', '.join(changed)}: give what it was begun with, or another --out, "
                             f"or delete {out} first")
    elif any(out.glob("*.bin")):
        raise ValueError(f"{out} holds data of another script: give another --out, or delete {out} first")
    else:
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_aside(begun, lambda f: f.write(json.dumps(plan).encode()))
    return not meta.is_file()


def sample(cfg, sources):
    """Texts to train a tokenizer on: the first ones of every source, as much as its weight says; none that is held out."""
    for source in sources:
        room = SAMPLE_CHARS * source["weight"] / sum(s["weight"] for s in sources)
        for text, why in itertools.chain.from_iterable(read_texts(url, source, cfg.max_chars) for url, _, _ in source["files"]):
            if room <= 0:
                break
            if not why and not is_val(digest_of(text), cfg.val_percent):
                room -= len(text)
                yield text


def settle_tokenizer(cfg, sources):
    """The tokenizer of the folder: the one given, or else one trained here, once."""
    trained = cfg.out / "parts" / "tokenizer.json"
    if not cfg.tokenizer and not trained.is_file():
        print(f"{cfg.out}: training a tokenizer of {cfg.vocab_size} ids on the first documents")
        text = train_tokenizer(sample(cfg, sources), cfg.vocab_size).to_str(pretty=True)
        write_aside(trained, lambda f: f.write(text.encode()))
    tok = Tokenizer(cfg.tokenizer or trained, cfg.bos_token)
    if tok.eos_id is None:
        raise ValueError(f"{cfg.tokenizer} has no <eos>, which ends a document")
    tok.save(cfg.out)
    return tok


def finish(cfg, tok, sources, tallies, mark):
    """Write meta.json, say what was made, and delete the parts."""
    meta = {"vocab_size": tok.vocab_size, "fingerprint": mark, "sources": []}
    for split in ("train", "val"):
        offsets = [np.fromfile(path, np.int64) for path in sorted(cfg.out.glob(f"{split}_*.idx"))]
        meta[split] = {"documents": sum(len(o) - 1 for o in offsets), "tokens": sum(int(o[-1]) for o in offsets)}
        if not meta[split]["documents"]:
            raise ValueError(f"no document fell to {split}: delete {cfg.out}, and give more text or another --val_percent")
        print(f"{cfg.out}: {split} {meta[split]['documents']:,} documents, {meta[split]['tokens']:,} tokens, "
              f"{len(offsets)} shard{'s' * (len(offsets) > 1)}")
    for s, t in zip(sources, tallies):
        times = round(1 + (t["tokens"] - t["once"]) / max(t["train"], 1), 2)
        meta["sources"].append({k: s[k] for k in ("name", "source", "weight", "licence", "note") if k in s}
                               | {"tokens": t["tokens"], "times_read": times, "left_out": t["left_out"]})
        print(f"{s['name']}: {t['tokens']:,} tokens" + f", of {t['once']:,} read {times} times" * (times > 1)
              + "".join(f"; {count:,} left out: {why}" for why, count in t["left_out"].items()))
    meta |= {key: value for key, value in asdict(cfg).items() if key not in ("out", "workers")}
    meta["vocab_size"] = tok.vocab_size  # which can be less than was asked for
    write_aside(cfg.out / "meta.json", lambda f: f.write(json.dumps(meta, indent=1).encode()))
    shutil.rmtree(cfg.out / "parts")


def prepare(cfg):
    """Do what the head of this file says."""
    if bool(cfg.source) == bool(cfg.mixture):
        raise ValueError("give either --source=GLOB or --mixture=FILE.json")
    if not 0 < cfg.val_percent < 100:
        raise ValueError(f"val_percent={cfg.val_percent} must be between 0 and 100")
    if min(cfg.tokens, cfg.workers) < 0 or min(cfg.max_chars, cfg.shard_tokens) < 1:
        raise ValueError("tokens and workers must be 0 or more, max_chars and shard_tokens 1 or more")
    cfg.out = Path(cfg.out)
    sources = (read_mixture(cfg.mixture, cfg.tokens > 0) if cfg.mixture else
               [{"name": cfg.source, "source": [cfg.source], "weight": 1, "text": cfg.text}])
    for s in sources:
        s["files"] = sorted({file[0]: file for pattern in s["source"] for file in list_files(pattern)}.values())
    if cfg.tokenizer:
        from checkpoint import (  # here, for it brings what a worker need not wait for
            TOKENIZER_FILES,
            fetch,
        )
        cfg.tokenizer = str(fetch(cfg.tokenizer, TOKENIZER_FILES))
    given = Tokenizer(cfg.tokenizer, cfg.bos_token) if cfg.tokenizer else None
    given = f"{given.json}{given.bos_id}{given.eos_id}" if given else SPLIT
    plan = {key: getattr(cfg, key) for key in ("tokens", "vocab_size", "val_percent", "max_chars", "shard_tokens")}
    plan |= {"tokenizer": hashlib.sha256(given.encode()).hexdigest(),
             "sources": [{key: s[key] for key in s if key not in ("licence", "note")} for s in sources]}
    mark, files = hashlib.sha256(json.dumps(plan).encode()).hexdigest(), sum(len(s["files"]) for s in sources)
    if not unfinished(cfg.out, plan, mark):
        shutil.rmtree(cfg.out / "parts", ignore_errors=True)
        return print(f"{cfg.out}: nothing to do, {files} files unchanged")
    for s in sources:
        s["quota"] = cfg.tokens * s["weight"] / sum(s["weight"] for s in sources) if cfg.tokens else math.inf
    tok, workers = settle_tokenizer(cfg, sources), min(cfg.workers or os.cpu_count(), files)
    for path in (cfg.out / "parts").glob("*.tmp"):
        path.unlink()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) if workers > 1 else None
    try:
        tallies = fill_shards(cfg, sources, pool, workers, dtype_for(tok.vocab_size))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()  # what it is at is not wanted any more, or will be made again
            process.join()
    finish(cfg, tok, sources, tallies, mark)


def main():
    cfg, _ = configure(Config)
    prepare(cfg)


if __name__ == "__main__":
    main()
