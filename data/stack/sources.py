"""What data/stack/prepare.py reads: mixtures, the files they name, the documents in those files.

A file is streamed. Of a .jsonl file, compressed or not, a line and about a megabyte are in memory;
of a .parquet file, 128 rows. Errors name the file, and the line or row.

Not covered: formats other than .jsonl, .jsonl.gz, .jsonl.zst and .parquet; text in nested columns.
"""
import gzip
import json
import os
import re
import sys
from importlib import import_module

from configurator import Mistake, shortened
from files import parse_json

# Python has it from 3.14 on
ZSTANDARD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
REQUIRED = {"name", "source", "weight", "text"}
OPTIONAL = {"language_column", "languages", "license", "note"}
TEXTS = ("name", "text", "language_column", "license", "note")  # keys whose values are texts
MAX_BLANK = 100_000  # white space in a row; at a million, tiktoken's regex engine panics


# --- mixtures -------------------------------------------------------------------------------------

def read_mixture(path, weighed):
    """The sources of a mixture's JSON file as a list of dicts, checked.

    weighed: whether the weights will be used. Raises Mistake for what does not fit.
    """
    sources = parse_json(path)
    is_list = isinstance(sources, list) and sources
    if not is_list or not all(isinstance(source, dict) for source in sources):
        raise Mistake(f"{path} must be a list of sources, each in braces")
    for source in sources:
        check_source(source, f"{path}: source {shortened(source.get('name', '?'))}")
        if isinstance(source["source"], str):
            source["source"] = [source["source"]]
    if len({source["name"] for source in sources}) < len(sources):
        raise Mistake(f"{path} has two sources of one name")
    if not weighed and len({source["weight"] for source in sources}) > 1:
        raise Mistake(f"{path} has unequal weights, which are shares of --tokens=N; "
                      "without it every document is taken")
    return sources


def check_source(source, where):
    """Check one source of a mixture. where: how an error names it."""
    unknown = source.keys() - REQUIRED - OPTIONAL
    if unknown:
        known = ", ".join(sorted(REQUIRED | OPTIONAL))
        raise Mistake(f"{where} has an unknown key {shortened(min(unknown))}; there are {known}")
    missing = REQUIRED - source.keys()
    if missing:
        raise Mistake(f"{where} has no {min(missing)!r}")
    for key in TEXTS:
        if key in source and not isinstance(source[key], str):
            raise Mistake(f"{where} has {key} {shortened(source[key])}; it must be a text")
    if not is_texts(source["source"]) and not isinstance(source["source"], str):
        raise Mistake(f"{where} has source {shortened(source['source'])}; it must be a file, "
                      "a glob, a folder or a URL, or a list of them")
    weight = source["weight"]
    if type(weight) not in (int, float) or not 0 < weight <= 1e18:
        raise Mistake(f"{where} has weight {shortened(weight)}; it must be a number above 0 "
                      "and up to 1e18")
    has_both = "language_column" in source and is_texts(source.get("languages"))
    if ("language_column" in source or "languages" in source) and not has_both:
        raise Mistake(f"{where} must have both 'language_column' and 'languages', "
                      "a list of texts, or neither")


def is_texts(value):
    """Whether this is a list of texts, and not empty."""
    return isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)


# --- files ----------------------------------------------------------------------------------------

def list_files(pattern):
    """[url, size, stamp] of the files that a file name, glob, folder or URL stands for."""
    fsspec = package("fsspec", pattern)
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        infos = infos_of(fs, path)
    except Exception as error:  # no network, a gated dataset, …: each file system raises its own
        raise Mistake(f"{pattern} cannot be listed ({brief(error)}); "
                      f"{download_hint(pattern)}") from error
    is_local = "file" in fs.protocol
    files = []
    for name, info in infos.items():
        if name.endswith(ENDINGS) and info["type"] == "file":
            url = name if is_local else fs.unstrip_protocol(name)
            stamp = info.get("mtime") or info.get("blob_id") or info.get("ETag")
            files.append([url, info.get("size"), str(stamp)])
    if not files:
        raise Mistake(f"no file at {pattern} that ends in {', '.join(ENDINGS)}")
    return files


def infos_of(fs, path):
    """{name: what the file system says of it} of the files that a path or glob stands for."""
    if any(c in path for c in "*?["):
        return fs.glob(path, detail=True)
    if fs.isdir(path):
        return fs.find(path, detail=True)
    if fs.exists(path):
        return {path: fs.info(path)}
    return {}


def download_hint(url):
    """What to do where `url` is out of reach."""
    hub = re.match(r"hf://datasets/([^/]+/[^/@]+)(@[^/]+)?/(.+)", url)
    if not hub:
        return "download its files by other means and name their folder as the source"
    return ("a gated dataset wants its terms accepted and `hf auth login`; without a network "
            f"here, run `hf download {hub[1]} --repo-type dataset --include '{hub[3]}' "
            f"--local-dir FOLDER` elsewhere and name FOLDER/{hub[3]} as the source")


def package(module, url):
    """The module that reading `url` takes."""
    try:
        return import_module(module)
    except ImportError as error:
        raise Mistake(f"{url} needs a package that is not installed: "
                      f"pip install {module.removesuffix('.parquet')}") from error


def brief(error):
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# --- rows and lines -------------------------------------------------------------------------------

def read_records(url, columns):
    """(number, a line's bytes or a row's dict) of each row of a file, numbered from 1.

    Raises Mistake for whatever keeps it from being read, a file that was cut short among them.
    """
    fsspec, kind = package("fsspec", url), url.rpartition(".")[2]
    needed = {"parquet": "pyarrow.parquet", "zst": ZSTANDARD}.get(kind)
    module = package(needed, url) if needed else None
    try:
        with fsspec.open(url, "rb") as file:
            if kind == "parquet":
                yield from enumerate(parquet_rows(file, module, columns), 1)
            elif kind == "zst":
                yield from enumerate(lines(chunks(module.open(file))), 1)
            elif kind == "gz":
                yield from enumerate(lines(gzip_chunks(file)), 1)
            else:
                yield from enumerate(lines(chunks(file)), 1)
    except EOFError as error:
        raise Mistake(f"{url} is truncated ({brief(error)}): copy or download it again") from error
    except Exception as error:  # gzip, zlib, Zstandard, Arrow, every network client: anything
        raise Mistake(f"{url} cannot be read ({brief(error)})") from error


def parquet_rows(file, pyarrow_parquet, columns):
    """The rows of a parquet file as dicts of `columns`; of all its columns where it lacks one.

    Raises EOFError for a file that was cut short.
    """
    if file.read(4) == b"PAR1":  # the format begins and ends with it
        file.seek(-4, os.SEEK_END)
        if file.read(4) != b"PAR1":
            raise EOFError("its end is missing")
    file.seek(0)
    table = pyarrow_parquet.ParquetFile(file)
    names = table.schema_arrow.names
    wanted = columns if set(columns) <= set(names) else names
    for batch in table.iter_batches(128, columns=wanted, use_threads=False):
        yield from batch.to_pylist()


def chunks(stream, size=1 << 20):
    """What a stream holds, as bytes of at most `size`."""
    while True:
        chunk = stream.read(size)
        if not chunk:
            return
        yield chunk


def gzip_chunks(file):
    """The content of a gzip file. Raises EOFError where it was cut short."""
    yield from chunks(gzip.open(file))
    if file.tell() == 0:
        raise EOFError("it is empty")


def lines(parts):
    """The lines, without their ends, of a text that comes as chunks of bytes."""
    line = []  # parts of a line whose end has not come yet
    for part in parts:
        head, *more = part.split(b"\n")
        line.append(head)
        if more:
            yield b"".join(line)
            yield from more[:-1]
            line = more[-1:]
    yield b"".join(line)


# --- documents ------------------------------------------------------------------------------------

def read_texts(url, source, max_chars):
    """(text, "") of each document of a file, or ("", why it is left out)."""
    columns = [source[key] for key in ("text", "language_column") if key in source]
    for number, row in read_records(url, columns):
        if isinstance(row, bytes):
            if not row.strip():
                continue
            row = parse_line(row, url, number)
        if not isinstance(row, dict) or not all(column in row for column in columns):
            wanted = " and ".join(map(repr, columns))
            has = ", ".join(row) if isinstance(row, dict) else "no columns at all"
            raise Mistake(f"{url}, row {number}: {wanted} wanted, but it has {has}")
        text = row[columns[0]]
        if text is not None and not isinstance(text, str):
            raise Mistake(f"{url}, row {number}: column {columns[0]!r} holds "
                          f"{type(text).__name__}, not text")
        if len(columns) > 1 and row[columns[1]] not in source["languages"]:
            yield "", "other language"
            continue
        why = fault(text, max_chars)
        yield ("", why) if why else (text, "")


def parse_line(line, url, number):
    """The JSON value in a line of a .jsonl file."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{url}, line {number}, is not JSON: {error}") from error


def fault(text, max_chars):
    """Why a text is left out; empty if it is not."""
    if not text or text.isspace():
        return "empty"
    if len(text) > max_chars:
        return "too long"
    if len(text) > MAX_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > MAX_BLANK:
        return "too much white space in a row"
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return "not Unicode"
    return ""
