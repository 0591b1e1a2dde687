"""Atomic writes, and checked reads of files that may hold anything.

What is written is written aside, synced to the disk and renamed: a kill or a power cut leaves
either the old file or the new one. What is read may hold anything: it is checked here once, and a
Mistake names the file.

Not covered: token files (loader.py) and weights (huggingface.py), which are checked there.
"""
import json
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from configurator import Mistake


def read_text(path, newline=None):
    """The text of a UTF-8 file. Raises Mistake where it is missing or holds anything else.

    newline: as in `open`; "" leaves the ends of lines as they are.
    """
    try:
        with open(path, encoding="utf-8", newline=newline) as f:
            return f.read()
    except FileNotFoundError as error:
        raise Mistake(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise Mistake(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_json(path):
    """The value in a JSON file. Raises Mistake where there is none, or one that is not finite."""
    text = read_text(path)
    try:
        return json.loads(text, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{path} is not readable JSON: {error}") from error


def finite(text):
    """A float. Raises ValueError for NaN and infinity, which `write_json` could not write."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def read_json(path):
    """The object in a JSON file, as a dict. Raises Mistake where there is none."""
    value = parse_json(path)
    if not isinstance(value, dict):
        raise Mistake(f"{path} holds a {type(value).__name__}, not an object of names and values")
    return value


MAX_LINE = 2**24  # bytes in a line of a .jsonl file


def read_json_lines(path):
    """The objects in a .jsonl file, one per line: a generator of (where, dict), line by line.

    where: such as "line 3 of tasks.jsonl", for messages. Blank lines are left out. Raises Mistake
    for a missing file, and at a line that is longer than MAX_LINE, not UTF-8 or not an object.
    """
    if not Path(path).is_file():
        raise Mistake(f"{path} is missing, or not a file")
    with open(path, "rb") as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1
            where = f"line {number} of {path}"
            if len(line) > MAX_LINE:
                raise Mistake(f"{where} is longer than {MAX_LINE:,} bytes: is each object on a "
                              "line of its own?")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark some editors begin with
            if line.strip():
                yield where, parse_line(where, line)


def parse_line(where, line):
    """The object in one line of JSON, bytes or str. Raises Mistake where there is none."""
    try:
        text = line.decode() if isinstance(line, bytes) else line
        value = json.loads(text, parse_float=finite, parse_constant=finite)
    except UnicodeDecodeError as error:
        raise Mistake(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise Mistake(f"{where} holds a {type(value).__name__}, not an object of names and values")
    return value


@contextmanager
def replacing(path):
    """A binary file to write in place of `path`, which stays as it was if anything goes wrong."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # there only if something went wrong
    sync(path.parent)


def write_text(path, text):
    """Replace a file's text, or leave it as it was."""
    with replacing(path) as f:
        f.write(text.encode())


def write_json(path, value):
    """Like write_text. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def without_nan(values):
    """A dict of numbers as JSON can have it: None where one is NaN or infinite."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()}


def check_out(path):
    """Raise Mistake for a file that could not be written: call it before the work, not after."""
    folder = Path(path).parent
    if os.path.lexists(path) and (Path(path).is_symlink() or not Path(path).is_file()):
        raise Mistake(f"{path} is not a regular file, and is not replaced: choose another name")
    if not folder.is_dir():
        raise Mistake(f"{path} cannot be written: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise Mistake(f"{path} cannot be written: it must be a file in a folder of yours")


def fresh_folder(beside):
    """A new empty folder next to the path `beside`, to be filled and moved there."""
    beside = Path(beside)
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}.", suffix=".tmp", dir=beside.parent))
    folder.chmod(0o777 & ~umask())  # mkdtemp makes it private
    return folder


def umask():
    """The permissions that new files of this process lack. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sync(path):
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name != "posix":  # Windows opens no folders
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def move_folder(aside, path):
    """Rename a complete folder, once all of it is on the disk. `path` must not exist."""
    for folder, _, names in os.walk(aside):
        for name in names:
            sync(Path(folder) / name)
        sync(folder)
    os.replace(aside, path)
    sync(Path(path).parent)
