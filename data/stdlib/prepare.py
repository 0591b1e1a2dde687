"""A corpus of real code that is on every machine: the source of the Python that runs this.

    python -m data.stdlib.prepare                                        # the standard library, about 12 MB
    python -m data.stdlib.prepare --source=/path/to/code --out=data/mine # any other tree of code
    python -m data.stdlib.prepare --source=/path/to/code --out=data/more --tokenizer=out/toy/step_0000300  # same ids

Writes train.bin and val.bin (token ids, uint16 or uint32), train.idx and val.idx (where each document starts, and
the end: int64), the tokenizer's files and meta.json. A document is <bos> if the tokenizer has one, a file's tokens,
<eos>. A file goes to train or val by a hash of its path, so the split is the same every time. Run again with nothing
changed, it does nothing.

Not covered: corpora that do not fit in memory, near-duplicates, licences.
"""
import hashlib
import json
import os
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from configurator import configure
from huggingface import load_tokenizer
from tokenizer import SPLIT, train_tokenizer


@dataclass
class Config:
    source: str = ""  # folder of code to read; empty: the standard library of this Python
    out: str = "data/stdlib"  # folder to write to
    suffix: str = ".py"  # which files to take, by the end of their names
    vocab_size: int = 4096  # ids in all: 4 special tokens, 256 bytes, the rest merges
    tokenizer: str = ""  # folder of a tokenizer to use; empty: train one
    val_percent: float = 5.0  # share of the files held out for validation, in percent


SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def read_files(source, suffix):
    """[(relative path, text)] of the UTF-8 files under `source`, sorted by path, exact duplicates dropped."""
    found, seen = [], set()
    for path in sorted(source.rglob("*" + suffix)):
        relative = path.relative_to(source)
        if SKIPPED_FOLDERS & set(relative.parts) or not path.is_file():
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content or digest in seen:
            continue
        try:
            found.append((relative.as_posix(), content.decode("utf-8")))
        except UnicodeDecodeError:  # a few files are in other encodings on purpose
            continue
        seen.add(digest)
    return found


def is_val(path, percent):
    """Whether the file at this relative path is held out: its hash, as a number in [0, 1), decides."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64 < percent / 100


def write_aside(path, write):
    """Let `write(file)` fill a temporary file, then rename it to `path`: there is never half a file."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as f:
        write(f)
    os.replace(aside, path)


def write_split(out, split, texts, tok):
    """<split>.bin and <split>.idx of these texts. Returns what meta.json records of them."""
    bos = [] if tok.bos_id is None else [tok.bos_id]
    documents = [[*bos, *ids, tok.eos_id] for ids in tok.encode_batch(texts)]
    dtype = np.uint16 if tok.vocab_size <= 2**16 else np.uint32
    tokens = np.concatenate([np.array(d, dtype) for d in documents])
    offsets = np.cumsum([0] + [len(d) for d in documents], dtype=np.int64)
    write_aside(out / f"{split}.bin", tokens.tofile)
    write_aside(out / f"{split}.idx", offsets.tofile)
    return {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": len(tokens)}


def main():
    cfg, _ = configure(Config)
    source = Path(cfg.source or sysconfig.get_paths()["stdlib"])
    out = Path(cfg.out)
    if not source.is_dir():
        raise ValueError(f"source={str(source)!r} is not a folder")
    if not 0 < cfg.val_percent < 100:
        raise ValueError(f"val_percent={cfg.val_percent} must be between 0 and 100")

    files = read_files(source, cfg.suffix)
    fingerprint = hashlib.sha256(repr((files, cfg.suffix, cfg.vocab_size, cfg.val_percent, cfg.tokenizer, SPLIT)).encode()).hexdigest()
    meta_path = out / "meta.json"
    products = [out / f for f in ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json", "tokenizer_config.json")]
    if meta_path.is_file() and json.loads(meta_path.read_text()).get("fingerprint") == fingerprint:
        if all(p.is_file() for p in products):
            return print(f"{out}: nothing to do, {len(files)} files unchanged")

    splits = {"train": [t for p, t in files if not is_val(p, cfg.val_percent)],
              "val": [t for p, t in files if is_val(p, cfg.val_percent)]}
    if not splits["train"] or not splits["val"]:
        raise ValueError(f"{source} has {len(splits['train'])} {cfg.suffix} files for training and {len(splits['val'])} "
                         "for validation after filtering; both need one or more")
    out.mkdir(parents=True, exist_ok=True)
    if cfg.tokenizer:
        tok = load_tokenizer(cfg.tokenizer)
    else:
        print(f"{out}: training a tokenizer of {cfg.vocab_size} ids on {len(splits['train'])} files of {source}")
        with tempfile.TemporaryDirectory() as alone:  # not `out`, where another tokenizer's names may be from before
            train_tokenizer(splits["train"], cfg.vocab_size).save(f"{alone}/tokenizer.json")
            tok = load_tokenizer(alone)
    if tok.eos_id is None:
        raise ValueError(f"the tokenizer in {cfg.tokenizer} has no eos_token, which ends a document")
    meta_path.unlink(missing_ok=True)  # interrupted from here on, the folder counts as unfinished
    tok.save(out)
    meta = {name: write_split(out, name, texts, tok) for name, texts in splits.items()}
    for name, m in meta.items():
        print(f"{out}: {name} {m['files']} files, {m['bytes']:,} bytes, {m['tokens']:,} tokens")
    meta |= {**asdict(cfg), "source": str(source), "vocab_size": tok.vocab_size, "fingerprint": fingerprint,
             "val_paths": [p for p, _ in files if is_val(p, cfg.val_percent)]}
    write_aside(meta_path, lambda f: f.write(json.dumps(meta, indent=1).encode()))


if __name__ == "__main__":
    main()
