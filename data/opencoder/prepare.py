"""OpenCoder's questions and answers, or other people's, as samples for sft.py to memory-map.

    python -m data.opencoder.prepare --tokenizer=ByteDance-Seed/Stable-DiffCoder-8B-Instruct
    python -m data.opencoder.prepare --tokenizer=FOLDER --source=stage1 --out=data/opencoder_1
    python -m data.opencoder.prepare --tokenizer=FOLDER --source="/mine/*.parquet" \\
        --question=prompt --answer=response --out=data/mine

--tokenizer names the model that will be tuned: its tokens, and its chat template, which writes each
question and answer as a conversation. --style=base writes both as they are instead.

The data: OpenCoder-LLM/opc-sft-stage1 (4.2 million rows, 5.3 GB) and -stage2 (436 thousand, 0.5 GB)
on the Hugging Face Hub (arXiv 2411.04905), without an account. A source is a stage, one of its
subsets in SUBSETS, or .jsonl, .jsonl.gz, .jsonl.zst or .parquet files as data/stack reads them: a
file, a glob, a folder, a URL; several with commas between. Each row has the columns `instruction`
and `output`. educational_instruct also has `code`, the function alone (--answer=code), with
`entry_point` and `testcase`, a list of assert statements, which are not read here.

License: both pages say MIT. What the rows were made of has terms of its own: evol_instruct comes
from Magicoder-Evol-Instruct, mceval_instruct from McEval-Instruct, realuser_instruct from people's
chats with GPT. Nobody here has checked these; read both pages before you publish a model.

Of equal questions the first stays: a second answer would count the question twice. A hash of the
question decides whether it is held out. Writes train.bin, train.scored, train.idx, val.* (sft.write
says what they hold), the tokenizer's files, and meta.json last: without it loader.py refuses the
folder. Rows are streamed; memory does not grow with their text. An interrupted run starts again.
Samples longer than a row are left out when training begins, which says how many.

Not covered: conversations of several turns (a .jsonl file of "messages" is train.py's own --data),
near-duplicates, running the tests, questions that resemble those of a benchmark.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import hashlib
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

import sft
from configurator import Float, Int, Mistake, Name, check_fields, configure
from data.stack.prepare import claim, digest_of, open_ledger
from data.stack.sources import fault, list_files, parse_line, read_records
from data.stdlib.prepare import find_tokenizer, is_unchanged, open_tokenizer
from files import write_json
from tokenizer import LAYOUT


@dataclass
class Config:
    tokenizer: str = ""  # of the model to tune: a folder, a run or a model on the Hub
    source: Name = "stage2"  # stage1, stage2, a subset, or files; several with commas between
    out: Name = "data/opencoder"  # folder to write to
    question: Name = "instruction"  # column with the question
    answer: Name = "output"  # column with the answer, which alone is scored
    style: Literal["chat", "base"] = "chat"  # through the chat template, or as they are
    val_percent: Float(1e-6, 99.9) = 1.0  # percent of the questions held out; a hash decides which
    max_chars: Int(1, 10**6) = 100000  # longer questions and answers are left out


HUB = "hf://datasets/OpenCoder-LLM"
STAGE1 = ("filtered_infinity_instruct", "largescale_diverse_instruct", "realuser_instruct")
STAGE2 = ("educational_instruct", "evol_instruct", "mceval_instruct", "package_instruct")
SUBSETS = {name: f"{HUB}/opc-sft-stage1/data/{name}-*.parquet" for name in STAGE1}
SUBSETS |= {name: f"{HUB}/opc-sft-stage2/{name}/*.parquet" for name in STAGE2}
STAGES = {"stage1": STAGE1, "stage2": STAGE2}

PRODUCTS = ("train.bin", "train.scored", "train.idx", "val.bin", "val.scored", "val.idx",
            "tokenizer.json", "tokenizer_config.json")


# --- what is read ---------------------------------------------------------------------------------

def find_files(source):
    """[url, size, stamp] of each file of the sources, in their order, each file once."""
    files = {}
    for name in source.split(","):
        for subset in STAGES.get(name.strip(), (name.strip(),)):
            for file in sorted(list_files(SUBSETS.get(subset, subset))):
                files.setdefault(file[0], file)
    return list(files.values())


def read_pairs(url, cfg):
    """(where, question, answer) of each row of a file. where: for messages."""
    columns = [cfg.question, cfg.answer]
    for number, row in read_records(url, columns):
        if isinstance(row, bytes):
            if not row.strip():
                continue
            row = parse_line(row, url, number)
        where = f"{url}, row {number}"
        has = ", ".join(row) if isinstance(row, dict) else "no columns at all"
        for column in columns:
            if not isinstance(row, dict) or column not in row:
                raise Mistake(f"{where}: a column {column!r} is wanted, but it has {has}; "
                              "--question and --answer name them")
            if row[column] is not None and not isinstance(row[column], str):
                raise Mistake(f"{where}: column {column!r} holds {type(row[column]).__name__}, not "
                              "text")
        yield where, row[cfg.question], row[cfg.answer]


def fitting_pairs(files, cfg, db, left_out, bar):
    """read_pairs of all files, less what is left out; `left_out` counts it, by reason.

    db: as open_ledger returns; it remembers the questions.
    """
    place = 0
    for url, _, _ in files:
        bar.set_postfix_str(url.rpartition("/")[2])
        for where, question, answer in read_pairs(url, cfg):
            bar.update()
            place += 1
            why = fault(question, cfg.max_chars) or fault(answer, cfg.max_chars)
            if not why and not claim(digest_of(question), place, db):
                why = "duplicate question"
            if why:
                left_out[why] += 1
                continue
            yield where, question, answer


def record_of(question, answer, style):
    """A question and its answer as a line that sft.py reads, a dict."""
    if style == "base":
        return {"prompt": question + "\n", "completion": answer}
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def encode_pairs(pairs, style, tok):
    """(ids, scored, question) of each pair, as sft.write takes them."""
    while chunk := list(islice(pairs, sft.CHUNK)):
        samples = [sft.pieces_of(where, record_of(question, answer, style), tok)
                   for where, question, answer in chunk]
        for (_, question, _), (ids, scored) in zip(chunk, sft.encode(samples, tok)):
            yield ids, scored, question


# --- what is written ------------------------------------------------------------------------------

def without_val(samples, percent, aside):
    """The samples for training; the others are written to `aside`, an open file, for later."""
    for ids, scored, question in samples:
        if sft.is_held_out(question, percent):
            np.save(aside, ids)
            np.save(aside, scored)
        else:
            yield ids, scored, question


def put_aside(aside):
    """The samples that without_val wrote."""
    end = aside.tell()
    aside.seek(0)
    while aside.tell() < end:
        yield np.load(aside), np.load(aside), ""


def write_splits(files, cfg, tok, db):
    """Write both splits. Returns {split: number of samples}, and what was left out, by reason."""
    left_out = Counter()
    with (tempfile.TemporaryFile(dir=cfg.out) as aside,
          tqdm(desc="reading", unit=" rows", mininterval=0.5) as bar):
        pairs = fitting_pairs(files, cfg, db, left_out, bar)
        samples = encode_pairs(pairs, cfg.style, tok)
        train = without_val(samples, cfg.val_percent, aside)
        counts = {"train": sft.write(cfg.out, "train", train),
                  "val": sft.write(cfg.out, "val", put_aside(aside))}
    return counts, dict(sorted(left_out.items()))


def fingerprint_of(cfg, files, tok):
    """A digest of all that the output depends on."""
    depends_on = (LAYOUT, files, tok.json, tok.config, tok.jinja, cfg.question, cfg.answer,
                  cfg.style, cfg.val_percent, cfg.max_chars)
    return hashlib.sha256(repr(depends_on).encode("utf-8", "surrogatepass")).hexdigest()


def check_free(out):
    """Raise Mistake for a folder that holds what another script prepared."""
    others = [path.name for path in sorted(out.glob("*.bin")) if path.name not in PRODUCTS]
    if (out / "train.bin").is_file() and not (out / "train.scored").is_file():
        others.append("train.bin")
    if others:
        raise Mistake(f"{out} holds {others[0]}, which another script prepared: choose another "
                      "--out")


def find_model_tokenizer(cfg):
    """The Tokenizer that --tokenizer names. Raises Mistake where it cannot do what is asked."""
    if not cfg.tokenizer:
        raise Mistake("--tokenizer=FOLDER is missing: name the model that will be tuned, a folder, "
                      "a run or a model on the Hub")
    tok = open_tokenizer(find_tokenizer(cfg.tokenizer))
    if tok.eos_id is None:
        raise Mistake(f"the tokenizer in {cfg.tokenizer} has no eos_token, which ends a sample")
    if cfg.style == "chat":
        try:
            tok.render([{"role": "user", "content": "?"}])
        except Mistake as error:
            raise Mistake(f"{error}; --style=base does without, and a tokenizer_config.json of an "
                          "instruct model of the same family brings one") from error
    return tok


def prepare(cfg):
    """Make the folder. Raises Mistake for settings and files that do not fit."""
    check_fields(cfg)
    cfg.out = Path(cfg.out)
    check_free(cfg.out)
    tok = find_model_tokenizer(cfg)
    files = find_files(cfg.source)
    fingerprint = fingerprint_of(cfg, files, tok)
    if is_unchanged(cfg.out, PRODUCTS, fingerprint):
        print(f"{cfg.out}: nothing to do, {len(files)} files unchanged")
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    db, _ = open_ledger(cfg.out / "questions.sqlite")  # never committed; keeps a second run out
    try:
        for path in cfg.out.glob(".*.tmp"):  # what a killed run left
            path.unlink()
        (cfg.out / "meta.json").unlink(missing_ok=True)  # from here on, interrupted is unfinished
        tok.save(cfg.out)
        counts, left_out = write_splits(files, cfg, tok, db)
    finally:
        db.close()
    finish(cfg, tok, len(files), counts, left_out, fingerprint)


def finish(cfg, tok, files, counts, left_out, fingerprint):
    """Say what was made, and write meta.json."""
    if not all(counts.values()):
        raise Mistake(f"{cfg.source} gives {counts['train']} samples for training and "
                      f"{counts['val']} for validation; both need at least one: give more text or "
                      "another --val_percent")
    meta = {"vocab_size": tok.vocab_size, "fingerprint": fingerprint, "files": files,
            "left_out": left_out}
    for split, samples in counts.items():
        scored = np.memmap(cfg.out / f"{split}.scored", np.uint8, "r")
        meta[split] = {"samples": samples, "tokens": len(scored),
                       "scored": int(np.count_nonzero(scored))}
        print(f"{cfg.out}: {split} {samples:,} samples, {len(scored):,} tokens, "
              f"{meta[split]['scored'] / len(scored):.0%} of them scored")
    for why, count in left_out.items():
        print(f"{count:,} left out: {why}")
    meta |= asdict(cfg) | {"out": str(cfg.out)}
    for path in cfg.out.glob("questions.sqlite*"):
        path.unlink()
    write_json(cfg.out / "meta.json", meta)


def main(argv=None):
    cfg, _ = configure(Config, argv)
    prepare(cfg)


if __name__ == "__main__":
    main()
