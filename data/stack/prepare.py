"""Text files, more than fit in memory, as the shards that loader.py reads.

    python -m data.stack.prepare --source="/corpus/*.jsonl.zst" --text=content --out=data/mine
    python -m data.stack.prepare --mixture=data/stack/code.json --out=data/code --tokens=3e9
    python -m data.stack.prepare --mixture=data/stack/coda.json --out=data/coda --tokens=1e9 \\
        --tokenizer=FOLDER

The first takes every document once, the others take sources by weight. Many processes share the
work; an interrupted run continues with the same command.

A source is .jsonl, .jsonl.gz, .jsonl.zst or .parquet files: a file, a glob, a folder, or a URL
that fsspec opens, such as hf://datasets/OWNER/NAME/data/*.parquet. A mixture is a JSON list of
{"name", "source" (one or a list of them), "weight", "text" (the column with the document)} and,
where wanted, "language_column", "languages" (to keep), "license" and "note". coda.json and
code.json say under what terms their sources come, and what of it could not be confirmed.

Writes train_00000.bin, train_00000.idx, val_00000.bin and so on as data/stdlib/prepare.py does,
tokenizer.json, and meta.json last: without it loader.py refuses the folder. Documents stand in the
order of the mixture, then of the files' names, then of the rows; the loader shuffles. There are two
stages, which overlap:

1. Workers make each input file into a part: out/parts/N.bin (its documents' tokens), N.docs (their
   hashes and lengths) and, when those are complete, N.json. A part depends on its file alone.
2. The main process takes the parts in order, leaves out duplicates of earlier documents (a table in
   sqlite: the first owner wins) and appends the rest to the shards. With each part, sqlite commits
   how long the shards are. A run that was killed cuts them back to that length and continues. So
   neither workers nor interruptions change a byte.

--tokens=N: a source gives N * weight / (sum of weights) tokens, rounded up to a whole document. One
with fewer is read again from its start, except for the documents held out. --tokens=0: every
document once, and the weights must be equal, as they mean nothing.

Not covered: near-duplicates, the quality of a text, several machines, columns within columns.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

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

from configurator import Float, Int, Mistake, Name, check_fields, configure
from data.stack.sources import list_files, read_mixture, read_texts
from data.stdlib.prepare import find_tokenizer, open_tokenizer, shorten_blanks
from files import read_json, read_text, write_text
from tokenizer import LAYOUT, SPLIT, Tokenizer, document_of, dtype_for, train_tokenizer


@dataclass
class Config:
    source: str = ""  # one source: a file, a glob, a folder or a URL
    mixture: str = ""  # or several: a JSON file, such as data/stack/code.json
    text: Name = "text"  # the column with the text, for --source
    out: Name = "data/code"  # folder to write to
    tokens: Int(0, 10**15) = 0  # how many to write, train and val together; 0: every document once
    tokenizer: str = ""  # whose to use: a folder, a run or a model on the Hub; empty: train one
    bos_token: str = ""  # name of the token that begins a document, added if new; empty: its own
    vocab_size: Int(260, 2**20) = 32768  # ids in all, for a tokenizer trained here
    val_percent: Float(1e-6, 99.9) = 0.5  # percent of the documents held out; a hash decides which
    max_chars: Int(1, 2**31) = 1000000  # longer documents are left out
    shard_tokens: Int(1, 10**12) = 100000000  # per shard at most; longer documents are left out
    workers: Int(0, 1024) = 0  # processes that tokenize; 0: one per core


SAMPLE_CHARS = 50_000_000  # how much text a tokenizer is trained on
DOC = np.dtype([("hash", "V16"), ("tokens", "<i8")])  # a document in a part's .docs


def digest_of(text):
    return hashlib.sha256(text.encode()).digest()[:16]


def is_val(digest, percent):
    """Whether the document of this hash is held out: the hash, a number in [0, 1), decides."""
    return int.from_bytes(digest[:8], "big") / 2**64 < percent / 100


# --- parts: what workers make of a file -----------------------------------------------------------

@lru_cache(1)
def load_tokenizer(folder):
    """The Tokenizer that `settle_tokenizer` left in a folder."""
    config = read_json(folder / "tokenizer_config.json")
    return Tokenizer(read_text(folder / "tokenizer.json"), config)


def make_part(stem, url, source, cfg):
    """Tokenize the file `url` into the part `stem`. Returns {why: documents left out of it}."""
    done = stem.with_suffix(".json")
    if done.is_file():
        return read_json(done)
    tok = load_tokenizer(cfg.out)
    dtype = dtype_for(tok.vocab_size)
    left_out = Counter()
    asides = {end: stem.with_suffix(f".{os.getpid()}{end}.tmp") for end in (".bin", ".docs")}
    with open(asides[".bin"], "wb") as tokens, open(asides[".docs"], "wb") as docs:
        for text, why in read_texts(url, source, cfg.max_chars):
            document = [] if why else document_of(tok, tok.encode(text))
            if len(document) > cfg.shard_tokens:
                why = "too long"
            if why:
                left_out[why] += 1
                continue
            tokens.write(np.array(document, dtype).tobytes())
            docs.write(np.array((digest_of(text), len(document)), DOC).tobytes())
        for file in (tokens, docs):
            file.flush()
            os.fsync(file.fileno())
    for end, aside in asides.items():
        os.replace(aside, stem.with_suffix(end))
    write_text(done, json.dumps(left_out))
    return left_out


def start_worker():
    """A new worker leaves Ctrl-C to the main process, and ends when that one is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def make_parts(jobs, wanted, pool, ahead):
    """make_part's result for each job, in order. Jobs no longer wanted are left out.

    jobs: list of make_part's arguments. wanted(source): whether its documents still are.
    pool: None works in this process. ahead: how many jobs are under way at a time.
    """
    jobs, running = deque(jobs), deque()
    try:
        while jobs or running:
            while jobs and len(running) < ahead:
                job = jobs.popleft()
                if wanted(job[2]):
                    running.append((job, pool.submit(make_part, *job) if pool else None))
            if not running:
                return
            job, future = running.popleft()
            if wanted(job[2]):
                yield future.result() if future else make_part(*job)
            elif future:
                future.cancel()
    except BrokenProcessPool as error:
        raise Mistake("a worker was killed, perhaps because memory ran out; the same command goes "
                      "on from here; fewer --workers need less memory") from error


# --- shards, and how far they are -----------------------------------------------------------------

class Shards:
    """The shards of one split, to append to.

    state: [number of the last shard, its tokens, its documents]. limit: tokens per shard.
    """

    def __init__(self, out, split, dtype, limit, state):
        self.out, self.split, self.limit = out, split, limit
        self.itemsize = np.dtype(dtype).itemsize
        self.open(*state)

    def open(self, number, tokens=0, documents=0):
        """Open a shard, cut to what was committed of it: to nothing if it is newer than that."""
        self.state = [number, tokens, documents]
        self.files = []
        sizes = {".bin": tokens * self.itemsize, ".idx": 8 + 8 * documents}
        for ending, size in sizes.items():
            path = self.out / f"{self.split}_{number:05d}{ending}"
            if documents and (not path.is_file() or path.stat().st_size < size):
                raise Mistake(f"{path} was lost or cut short: delete {self.out} and start again")
            file = open(path, "r+b" if path.exists() else "w+b")
            file.truncate(size)  # a new .idx begins with the 0 where its first document starts
            file.seek(size)
            self.files.append(file)

    def add(self, document, count):
        """Append a document: its tokens as bytes, and their number."""
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


LEDGER = ("PRAGMA locking_mode=EXCLUSIVE",
          "PRAGMA journal_mode=WAL",
          "PRAGMA synchronous=NORMAL",
          "PRAGMA cache_size=-200000",
          "BEGIN IMMEDIATE",
          "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID",
          "CREATE TABLE IF NOT EXISTS state (one INTEGER PRIMARY KEY, json TEXT)")


def open_ledger(path):
    """(database, state): which documents there were, and how far the shards are; {} at first."""
    db = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        for statement in LEDGER:
            db.execute(statement)
    except sqlite3.DatabaseError as error:
        raise Mistake(f"{path}: {error}; is another run at work in this folder?") from error
    row = db.execute("SELECT json FROM state").fetchone()
    return db, json.loads(row[0]) if row else {}


def commit(db, shards, state):
    """Commit progress. The shards first: sqlite must never claim more than they hold."""
    for split, s in shards.items():
        s.flush()
        state[split] = s.state
    db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (json.dumps(state),))
    db.execute("COMMIT")
    db.execute("BEGIN IMMEDIATE")


# --- from parts to shards -------------------------------------------------------------------------

def readings(source, tally, once):
    """(time, file) while the source is below its quota: all files in order, then all again."""
    for again in itertools.count():
        for f in range(len(source["files"])):
            if tally["tokens"] >= source["quota"]:
                return
            yield again, f
        if once or tally["tokens"] >= source["quota"]:
            return
        if not tally["train"]:
            raise Mistake(f"{source['name']} has nothing to train on, and is to give "
                          f"{math.ceil(source['quota']):,} tokens: "
                          "every document is held out or left out")


def take_part(stem, place, again, source, val_percent, db, shards, tally):
    """Append the documents of a part to the shards, until its source has given its quota.

    place: the number before that of the part's first document.
    again: 0 the first time.
    """
    with open(f"{stem}.bin", "rb") as tokens, open(f"{stem}.docs", "rb") as docs:
        while True:
            documents = np.fromfile(docs, DOC, 1 << 14).tolist()
            if not documents:
                return
            for digest, count in documents:
                if tally["tokens"] >= source["quota"]:
                    return
                document = tokens.read(count * shards["train"].itemsize)
                place += 1
                val = is_val(digest, val_percent)
                if again:
                    if val or owner_of(digest, db) != place:
                        continue
                elif not claim(digest, place, db):
                    tally["left_out"]["duplicate"] = tally["left_out"].get("duplicate", 0) + 1
                    continue
                shards["val" if val else "train"].add(document, count)
                tally["tokens"] += count
                if not again:
                    tally["once"] += count
                    if not val:
                        tally["train"] += count


def owner_of(digest, db):
    """The place where the document of this hash was first."""
    owner, = db.execute("SELECT place FROM seen WHERE hash = ?", (digest,)).fetchone()
    return owner


def claim(digest, place, db):
    """Note where a document is. Returns False where it was elsewhere before."""
    return db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, place)).rowcount == 1


def new_state(sources):
    """The state before the first part: what is done, the shards, and a tally for each source."""
    tallies = [{"tokens": 0, "once": 0, "train": 0, "left_out": {}} for _ in sources]
    return {"done": [-1], "train": [0, 0, 0], "val": [0, 0, 0], "tallies": tallies}


def jobs_left(cfg, sources, stems, done):
    """make_part's arguments for every file after `done`, a [source, time, file] that is done."""
    jobs = []
    for n, source in enumerate(sources):
        brief = {key: value for key, value in source.items() if key != "files"}  # jobs are sent
        for f, (url, _, _) in enumerate(source["files"]):
            if [n, 0, f] > done:
                jobs.append((stems[n][f], url, brief, cfg))
    return jobs


def fill_shards(cfg, sources, pool, workers, dtype):
    """Make the parts and take them in order, until every source has given its quota.

    Returns a tally for each source.
    """
    parts = cfg.out / "parts"
    db, state = open_ledger(parts / "ledger.sqlite")
    if not state:
        state = new_state(sources)
    shards = {split: Shards(cfg.out, split, dtype, cfg.shard_tokens, state[split])
              for split in ("train", "val")}
    tallies = state["tallies"]
    tally_of = {source["name"]: tally for source, tally in zip(sources, tallies)}
    numbers = itertools.count()
    stems = [[parts / f"{next(numbers):07d}" for _ in source["files"]] for source in sources]

    def is_wanted(source):
        return tally_of[source["name"]]["tokens"] < source["quota"]

    def written():
        return sum(tally["tokens"] for tally in tallies)

    jobs = jobs_left(cfg, sources, stems, state["done"])
    made = make_parts(jobs, is_wanted, pool, 2 * workers)
    with tqdm(total=cfg.tokens or None, initial=written(), unit=" tokens", unit_scale=True) as bar:
        for n, (source, tally) in enumerate(zip(sources, tallies)):
            for again, f in readings(source, tally, once=not cfg.tokens):
                if [n, again, f] <= state["done"]:
                    continue
                if not again:
                    left_out = Counter(tally["left_out"]) + Counter(next(made))
                    tally["left_out"] = dict(sorted(left_out.items()))
                place = int(stems[n][f].name) << 40  # no part has 2^40 documents
                take_part(stems[n][f], place, again, source, cfg.val_percent, db, shards, tally)
                state["done"] = [n, again, f]
                commit(db, shards, state)
                bar.update(written() - bar.n)
            for stem, ending in itertools.product(stems[n], (".json", ".bin", ".docs")):
                stem.with_suffix(ending).unlink(missing_ok=True)
    for s in shards.values():
        s.close()
    db.close()
    return tallies


# --- a run ----------------------------------------------------------------------------------------

def is_finished(out, plan, mark):
    """Whether `out` holds what this plan makes. If not, the plan is kept there.

    plan: all that the output depends on, as a dict. mark: its fingerprint.
    Raises Mistake where another plan was at work.
    """
    meta, begun = out / "meta.json", out / "parts" / "plan.json"
    if meta.is_file():
        check_finished(out, read_json(meta), mark)
        return True
    if begun.is_file():
        other = read_json(begun)
        changed = [key for key in plan if plan[key] != other.get(key)]
        if changed:
            raise Mistake(f"{out} was begun with other {', '.join(changed)}: give what it was "
                          f"begun with, or another --out, or delete {out} first")
    elif any(out.glob("*.bin")):
        raise Mistake(f"{out} holds data of another script: give another --out, "
                      f"or delete {out} first")
    else:
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_text(begun, json.dumps(plan))
    return False


def check_finished(out, meta, mark):
    """Check that the shards in `out` are those of this plan, and as many as meta.json says."""
    if meta.get("fingerprint") != mark:
        raise Mistake(f"{out} holds data that was prepared otherwise: give another --out, "
                      f"or delete {out} first")
    for split in ("train", "val"):
        try:
            expected = meta[split]["tokens"] * np.dtype(dtype_for(meta["vocab_size"])).itemsize
        except (KeyError, TypeError) as error:
            raise Mistake(f"{out / 'meta.json'} is damaged: delete {out} "
                          "and run this again") from error
        if sum(path.stat().st_size for path in out.glob(f"{split}_*.bin")) != expected:
            raise Mistake(f"{out} has lost some of its {split} shards: delete {out} "
                          "and run this again")


def sample(cfg, sources):
    """Texts to train a tokenizer on: the first ones of every source that are not held out.

    A source gives as much as its weight says.
    """
    total = sum(source["weight"] for source in sources)
    for source in sources:
        room = SAMPLE_CHARS * source["weight"] / total
        files = (read_texts(url, source, cfg.max_chars) for url, _, _ in source["files"])
        for text, why in itertools.chain.from_iterable(files):
            if room <= 0:
                break
            if not why and not is_val(digest_of(text), cfg.val_percent):
                room -= len(text)
                yield text


def settle_tokenizer(cfg, sources):
    """The tokenizer of the folder: the one given, or else one trained here, once."""
    parts = cfg.out / "parts"
    if not cfg.tokenizer and not (parts / "tokenizer.json").is_file():
        print(f"{cfg.out}: training a tokenizer of {cfg.vocab_size} ids on the first documents")
        tok = train_tokenizer(map(shorten_blanks, sample(cfg, sources)), cfg.vocab_size)
        write_text(parts / "tokenizer.json", tok.to_str(pretty=True))
    tok = open_tokenizer(cfg.tokenizer or parts, cfg.bos_token)
    if tok.eos_id is None:
        raise Mistake(f"{cfg.tokenizer} has no <eos>, which ends a document")
    tok.save(cfg.out)
    return tok


def count_documents(out, split):
    """(documents, tokens, shards) of a split."""
    documents = tokens = shards = 0
    for path in out.glob(f"{split}_*.idx"):
        offsets = np.fromfile(path, np.int64)
        documents += len(offsets) - 1
        tokens += int(offsets[-1])
        shards += 1
    return documents, tokens, shards


def finish(cfg, tok, sources, tallies, mark):
    """Write meta.json, say what was made, and delete the parts."""
    meta = {"vocab_size": tok.vocab_size, "fingerprint": mark, "sources": []}
    for split in ("train", "val"):
        documents, tokens, shards = count_documents(cfg.out, split)
        meta[split] = {"documents": documents, "tokens": tokens}
        if not documents:
            raise Mistake(f"no document fell to {split}: delete {cfg.out}, and give more text "
                          "or another --val_percent")
        plural = "s" if shards > 1 else ""
        print(f"{cfg.out}: {split} {documents:,} documents, {tokens:,} tokens, "
              f"{shards} shard{plural}")
    for source, tally in zip(sources, tallies):
        times = round(1 + (tally["tokens"] - tally["once"]) / max(tally["train"], 1), 2)
        about = {key: source[key] for key in ("name", "source", "weight", "license", "note")
                 if key in source}
        meta["sources"].append({**about, "tokens": tally["tokens"], "times_read": times,
                                "left_out": tally["left_out"]})
        line = f"{source['name']}: {tally['tokens']:,} tokens"
        if times > 1:
            line += f", of {tally['once']:,} read {times} times"
        for why, count in tally["left_out"].items():
            line += f"; {count:,} left out: {why}"
        print(line)
    meta |= {key: value for key, value in asdict(cfg).items() if key not in ("out", "workers")}
    meta["vocab_size"] = tok.vocab_size  # which can be less than was asked for
    write_text(cfg.out / "meta.json", json.dumps(meta, indent=1))
    shutil.rmtree(cfg.out / "parts")


def find_sources(cfg):
    """The sources asked for, each with its "files": a list of [url, size, stamp], sorted."""
    if cfg.mixture:
        sources = read_mixture(cfg.mixture, cfg.tokens > 0)
    else:
        sources = [{"name": cfg.source, "source": [cfg.source], "weight": 1, "text": cfg.text}]
    for source in sources:
        files = {}
        for pattern in source["source"]:
            for file in list_files(pattern):
                files[file[0]] = file
        source["files"] = sorted(files.values())
    return sources


def plan_of(cfg, sources):
    """All that the output depends on, as a dict."""
    tokenizer = SPLIT
    if cfg.tokenizer:
        tok = open_tokenizer(cfg.tokenizer, cfg.bos_token)
        tokenizer = f"{tok.json}{tok.bos_id}{tok.eos_id}"
    settings = ("tokens", "vocab_size", "bos_token", "val_percent", "max_chars", "shard_tokens")
    plan = {"layout": LAYOUT} | {key: getattr(cfg, key) for key in settings}
    plan["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
    plan["sources"] = [{key: source[key] for key in source if key not in ("license", "note")}
                       for source in sources]
    return plan


def prepare(cfg):
    """Make the shards. Raises Mistake for settings and files that do not fit."""
    check_fields(cfg)
    if bool(cfg.source) == bool(cfg.mixture):
        raise Mistake("give either --source=GLOB or --mixture=FILE.json")
    cfg.out = Path(cfg.out)
    sources = find_sources(cfg)
    if cfg.tokenizer:
        cfg.tokenizer = str(find_tokenizer(cfg.tokenizer))
    plan = plan_of(cfg, sources)
    mark = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    files = sum(len(source["files"]) for source in sources)
    if is_finished(cfg.out, plan, mark):
        shutil.rmtree(cfg.out / "parts", ignore_errors=True)
        print(f"{cfg.out}: nothing to do, {files} files unchanged")
        return
    total = sum(source["weight"] for source in sources)
    for source in sources:
        source["quota"] = cfg.tokens * source["weight"] / total if cfg.tokens else math.inf
    tok = settle_tokenizer(cfg, sources)
    for path in (cfg.out / "parts").glob("*.tmp"):
        path.unlink()
    tallies = run_workers(cfg, sources, min(cfg.workers or os.cpu_count(), files), tok)
    finish(cfg, tok, sources, tallies, mark)


def run_workers(cfg, sources, workers, tok):
    """Run fill_shards with `workers` processes and end them on exit."""
    pool = None
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, start_worker)
    try:
        return fill_shards(cfg, sources, pool, workers, dtype_for(tok.vocab_size))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command continues from here") from None
    finally:
        for process in multiprocessing.active_children():
            process.terminate()  # its work is no longer wanted, or will be done again
            process.join()


def main(argv=None):
    cfg, _ = configure(Config, argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `begin` had it end at once
    prepare(cfg)


if __name__ == "__main__":
    main()
