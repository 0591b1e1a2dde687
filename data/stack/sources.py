"""What data/stack/prepare.py reads: mixtures, the files they name, and the documents in those files.

A file is streamed: what is in memory of it is a line, a megabyte to find the next ones in, or 128 rows of a parquet file.
Errors name the file, and the line or row.

Not covered: formats other than .jsonl, .jsonl.gz, .jsonl.zst and .parquet; text in nested columns.
"""
import json
import math
import re
from importlib import import_module
from pathlib import Path

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
REQUIRED, OPTIONAL = {"name", "source", "weight", "text"}, {"language_column", "languages", "licence", "note"}
MAX_BLANK = 100_000  # white space in a row; at a million, tiktoken's regex engine gives up and panics


def read_mixture(path, weighed):
    """The sources of a mixture's JSON file as a list of dicts, checked. weighed: whether the weights will be used."""
    try:
        sources = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(sources, list) or not sources or not all(isinstance(s, dict) for s in sources):
        raise ValueError(f"{path} must be a list of sources, each in braces")
    for s in sources:
        where = f"{path}: source {s.get('name', '?')!r}"
        if unknown := s.keys() - REQUIRED - OPTIONAL:
            raise ValueError(f"{where} has an unknown key {min(unknown)!r}; there are {', '.join(sorted(REQUIRED | OPTIONAL))}")
        if missing := REQUIRED - s.keys():
            raise ValueError(f"{where} has no {min(missing)!r}")
        if type(s["weight"]) not in (int, float) or not 0 < s["weight"] < math.inf:
            raise ValueError(f"{where} has weight {s['weight']!r}; it must be a number above 0")
        if ("language_column" in s) != ("languages" in s) or not isinstance(s.get("languages", []), list):
            raise ValueError(f"{where} must have both 'language_column' and 'languages', a list, or neither")
        s["source"] = [s["source"]] if isinstance(s["source"], str) else s["source"]
    if len({s["name"] for s in sources}) < len(sources):
        raise ValueError(f"{path} has two sources of one name")
    if not weighed and len({s["weight"] for s in sources}) > 1:
        raise ValueError(f"{path} has unequal weights, which are shares of --tokens=N; without it every document is taken")
    return sources


def list_files(pattern):
    """[url, size, stamp] of the files that a file name, glob, folder or URL stands for."""
    fsspec = package("fsspec", pattern)
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        if any(c in path for c in "*?["):
            found = fs.glob(path, detail=True)
        else:
            found = fs.find(path, detail=True) if fs.isdir(path) else {path: fs.info(path)} if fs.exists(path) else {}
    except Exception as error:  # each file system has its own: no network, a gated dataset, no such protocol
        raise OSError(f"{pattern} cannot be listed ({brief(error)}); {download_hint(pattern)}") from error
    local = "file" in fs.protocol
    files = [[p if local else fs.unstrip_protocol(p), i.get("size"), str(i.get("mtime") or i.get("blob_id") or i.get("ETag"))]
             for p, i in found.items() if p.endswith(ENDINGS) and i["type"] == "file"]
    if not files:
        raise OSError(f"no file at {pattern} that ends in {', '.join(ENDINGS)}")
    return files


def download_hint(url):
    """What to do where `url` is out of reach."""
    hub = re.match(r"hf://datasets/([^/]+/[^/@]+)(@[^/]+)?/(.+)", url)
    if not hub:
        return "download its files by other means and name their folder as the source"
    return (f"a gated dataset wants its terms accepted and `hf auth login`; without a network here, run `hf download {hub[1]} "
            f"--repo-type dataset --include '{hub[3]}' --local-dir FOLDER` elsewhere and name FOLDER/{hub[3]} as the source")


def package(module, url):
    """The module that reading `url` takes."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: pip install {module.partition('.')[0]}") from error


def brief(error):
    """An error's type and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def read_records(url, columns):
    """(number, a line's bytes or a row's dict) of each row of a file. Raises OSError for whatever keeps it from being read."""
    fsspec, kind = package("fsspec", url), url.rpartition(".")[2]
    module = package({"parquet": "pyarrow.parquet", "zst": "zstandard"}.get(kind, "gzip"), url)
    try:
        with fsspec.open(url, "rb") as file:
            if kind == "parquet":
                yield from enumerate(rows(module.ParquetFile(file), columns), 1)
            else:
                stream = (module.open(file) if kind == "gz" else file if kind == "jsonl" else
                          module.ZstdDecompressor().stream_reader(file, read_across_frames=True))
                yield from enumerate(lines(stream), 1)
    except Exception as error:  # gzip, zlib, zstandard, Arrow and every network client raise what they like
        raise OSError(f"{url} cannot be read ({brief(error)})") from error


def rows(table, columns):
    """The rows of a parquet file as dicts of those of `columns` that it has; of all its columns where it lacks one."""
    names = table.schema_arrow.names
    wanted = columns if set(columns) <= set(names) else names
    for batch in table.iter_batches(128, columns=wanted, use_threads=False):
        yield from batch.to_pylist()


def lines(stream, size=1 << 20):
    """The lines of a stream, of which not every kind has a readline(), or a quick one."""
    rest = []
    while chunk := stream.read(size):
        first, *more = chunk.split(b"\n")
        rest.append(first)
        if more:
            yield b"".join(rest)
            yield from more[:-1]
            rest = more[-1:]
    yield b"".join(rest)


def read_texts(url, source, max_chars):
    """(text, "") of each document of a file, or ("", why it is left out)."""
    columns = [source[key] for key in ("text", "language_column") if key in source]
    for number, row in read_records(url, columns):
        if isinstance(row, bytes):
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{url}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(c in row for c in columns):
            has = ", ".join(row) if isinstance(row, dict) else "no columns at all"
            raise ValueError(f"{url}, row {number}: {' and '.join(map(repr, columns))} wanted, but it has {has}")
        text = row[columns[0]]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{url}, row {number}: column {columns[0]!r} holds {type(text).__name__}, not text")
        why = "other language" if len(columns) > 1 and row[columns[1]] not in source["languages"] else fault(text, max_chars)
        yield ("", why) if why else (text, "")


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
