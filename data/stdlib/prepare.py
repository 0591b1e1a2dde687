"""A corpus of real code that is on every machine: the source of the Python that runs this.

    python -m data.stdlib.prepare                                   # about 12 MB
    python -m data.stdlib.prepare --source=FOLDER --out=data/mine   # any other tree of code
    python -m data.stdlib.prepare --source=FOLDER --out=data/more --tokenizer=out/toy  # same ids

Writes train.bin and val.bin (token ids, uint16 or uint32), train.idx and val.idx (where each
document starts, and the end: int64), the tokenizer's files and meta.json. A document is <bos> if
the tokenizer has one, a file's tokens, and <eos> until its length is a multiple of 8. A file goes
to train or val by a hash of its path, so the split is the same every time. If nothing has changed
since the last run, it does nothing.

Not covered: corpora that do not fit in memory, near-duplicates, licenses.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import hashlib
import json
import re
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from configurator import Float, Int, Mistake, Name, configure
from files import read_json, replacing, write_text
from tokenizer import LAYOUT, SPLIT, document_of, dtype_for, train_tokenizer


@dataclass
class Config:
    source: str = ""  # folder of code to read; empty: the standard library of this Python
    out: Name = "data/stdlib"  # folder to write to
    suffix: str = ".py"  # which files to take, by the end of their names
    vocab_size: Int(260, 2**20) = 4096  # ids in all: 4 special tokens, 256 bytes, the rest merges
    tokenizer: str = ""  # whose to use: a folder, a run or a model on the Hub; empty: train one
    val_percent: Float(1e-6, 99.9) = 5.0  # share of the files held out for validation, in percent


PRODUCTS = ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json",
            "tokenizer_config.json")
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages",
                   "__pycache__"}


# --- the files of the corpus ----------------------------------------------------------------------

def read_files(source, suffix):
    """[(relative path, text)] of the UTF-8 files under `source`, sorted, without duplicates."""
    files, seen = [], set()
    paths = [path for path in source.rglob("*") if path.name.endswith(suffix)]
    for path in sorted(paths):
        relative = path.relative_to(source)
        if SKIPPED_FOLDERS & set(relative.parts) or not path.is_file():
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content or digest in seen:
            continue
        try:
            files.append((relative.as_posix(), content.decode("utf-8")))
        except UnicodeDecodeError:  # a few files are in other encodings on purpose
            continue
        seen.add(digest)
    return files


def is_val(path, percent):
    """Whether the file at this relative path is held out: its hash, a number in [0, 1), decides."""
    name = path.encode("utf-8", "surrogateescape")  # the bytes of names that are not UTF-8
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64 < percent / 100


def split_files(files, percent):
    """{"train": texts, "val": texts}, each a list of str."""
    splits = {"train": [], "val": []}
    for path, text in files:
        splits["val" if is_val(path, percent) else "train"].append(text)
    return splits


# --- tokenizers -----------------------------------------------------------------------------------

def find_tokenizer(name):
    """The folder with the tokenizer that `name` means. Raises Mistake where there is none.

    name: a folder, its tokenizer.json, a run such as out/toy, or a model on the Hub.
    """
    from huggingface import TOKENIZER_FILES, fetch, find

    folder = fetch(name, TOKENIZER_FILES)
    if folder.name == "tokenizer.json":
        folder = folder.parent
    if (folder / "latest").is_file():
        folder = find(folder)  # a run's newest checkpoint
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise Mistake(f"--tokenizer={name} has no tokenizer: {folder / 'tokenizer.json'} is "
                      "missing; name a folder that has one, such as out/toy after `bash demo.sh`")
    return folder


def open_tokenizer(folder, bos_token=""):
    """A folder's Tokenizer. bos_token: a name to use instead of the folder's."""
    from huggingface import load_tokenizer  # needs torch, which data.stack's workers do without

    return load_tokenizer(folder, bos_token)


def shorten_blanks(text):
    """A text without long runs of white space: training takes quadratic time in their length."""
    return re.sub(r"(\s{1000})\s+", r"\1", text)


def train_alone(texts, vocab_size):
    """A tokenizer trained on these texts.

    Loaded from an empty folder, so that no earlier tokenizer's settings are picked up.
    """
    with tempfile.TemporaryDirectory() as folder:
        tok = train_tokenizer(map(shorten_blanks, texts), vocab_size)
        tok.save(f"{folder}/tokenizer.json")
        return open_tokenizer(folder)


# --- writing --------------------------------------------------------------------------------------

def write_split(out, split, texts, tok):
    """Write <split>.bin and <split>.idx of these texts. Returns what meta.json records of them."""
    documents = [document_of(tok, ids) for ids in tok.encode_batch(texts)]
    dtype = dtype_for(tok.vocab_size)
    tokens = np.concatenate([np.array(d, dtype) for d in documents])
    offsets = np.cumsum([0] + [len(d) for d in documents], dtype=np.int64)  # (documents + 1,)
    for name, array in ((f"{split}.bin", tokens), (f"{split}.idx", offsets)):
        with replacing(out / name) as file:
            array.tofile(file)
    size = sum(len(text.encode()) for text in texts)
    return {"files": len(texts), "bytes": size, "tokens": len(tokens)}


def check_free(out):
    """Raise Mistake for a folder with token files of another script, such as data/stack's."""
    if not out.is_dir():
        return
    others = [path.name for path in out.glob("*.bin") if path.name not in PRODUCTS]
    others = sorted([*others, *(path.name for path in out.glob("*.scored"))])
    if others:
        raise Mistake(f"{out} holds {others[0]}, which another script prepared: choose another "
                      "--out")


def is_unchanged(out, products, fingerprint):
    """Whether `out` holds all that a run with this fingerprint writes: meta.json and `products`.

    Other prepare.py files ask it too. products: names of files.
    """
    try:
        meta = read_json(out / "meta.json")
    except Mistake:  # missing or damaged: everything is made again
        return False
    complete = all((out / name).is_file() for name in products)
    return complete and meta.get("fingerprint") == fingerprint


def main(argv=None):
    cfg, _ = configure(Config, argv)
    source = Path(cfg.source or sysconfig.get_paths()["stdlib"])
    out = Path(cfg.out)
    if not source.is_dir():
        raise Mistake(f"source={str(source)!r} is not a folder")

    check_free(out)
    files = read_files(source, cfg.suffix)
    tok = open_tokenizer(find_tokenizer(cfg.tokenizer)) if cfg.tokenizer else None
    tokenizer = (tok.json, tok.bos_id, tok.eos_id) if tok else (SPLIT, cfg.vocab_size)
    depends_on = (LAYOUT, files, cfg.suffix, cfg.val_percent, tokenizer)
    fingerprint = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    if is_unchanged(out, PRODUCTS, fingerprint):
        print(f"{out}: nothing to do, {len(files)} files unchanged")
        return

    splits = split_files(files, cfg.val_percent)
    if not splits["train"] or not splits["val"]:
        raise Mistake(f"{source} has {len(splits['train'])} {cfg.suffix} files for training and "
                      f"{len(splits['val'])} for validation after filtering; both need at least "
                      "one")
    out.mkdir(parents=True, exist_ok=True)
    if tok is None:
        print(f"{out}: training a tokenizer of {cfg.vocab_size} ids "
              f"on {len(splits['train'])} files of {source}")
        tok = train_alone(splits["train"], cfg.vocab_size)
    if tok.eos_id is None:
        raise Mistake(f"the tokenizer in {cfg.tokenizer} has no eos_token, which ends a document")

    (out / "meta.json").unlink(missing_ok=True)  # from here on an interrupted run is unfinished
    tok.save(out)
    meta = {split: write_split(out, split, texts, tok) for split, texts in splits.items()}
    for split, counts in meta.items():
        print(f"{out}: {split} {counts['files']} files, {counts['bytes']:,} bytes, "
              f"{counts['tokens']:,} tokens")
    val_paths = [path for path, _ in files if is_val(path, cfg.val_percent)]
    meta |= asdict(cfg)
    meta |= {"source": str(source), "vocab_size": tok.vocab_size, "fingerprint": fingerprint,
             "val_paths": val_paths}
    write_text(out / "meta.json", json.dumps(meta, indent=1))  # ASCII: names need not be UTF-8


if __name__ == "__main__":
    main()
