"""Many prompts: a file of them in, a JSON object a line out.

    def fibonacci(n):                         or  {"prompt": "def f(n):", "task_id": "HumanEval/0"}

Not covered: going on where an earlier run was stopped.
"""
import json
import re
import sys

from configurator import Mistake
from files import parse_line, read_text, replacing


def read_stdin():
    """All of it. Raises Mistake where it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise Mistake("stdin is closed: there is nothing to read")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise Mistake(f"stdin is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_prompts(path):
    """A file of prompts as a list of (where, dict with "prompt"). Blank lines are left out.

    It holds JSON if its first line begins like an object. Raises Mistake for anything else.
    """
    text = read_stdin() if path == "-" else read_text(path)
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), 1)
    lines = [(f"line {n} of {path}", line.rstrip("\r")) for n, line in lines if line.strip()]
    if not lines:
        raise Mistake(f"{path} has no prompts: write one a line")
    if not re.match(r'\s*\{\s*"', lines[0][1]):
        return [(where, {"prompt": line}) for where, line in lines]
    return [(where, parsed(where, line)) for where, line in lines]


def parsed(where, line):
    try:
        entry = parse_line(where, line)
    except Mistake as error:
        raise Mistake(f"{error}; a file whose first line begins like a JSON object has one on "
                      "each line") from error
    if not isinstance(entry.get("prompt"), str):
        raise Mistake(f'{where} must be a JSON object with a text as its "prompt"')
    for key in ("completion", "index", "sample"):
        if key in entry:
            raise Mistake(f"{where} has {key!r} already, which the output would replace: rename it")
    return entry


def completions(entries, gaps, tok, how, write_batch):
    """A generator of lines: an entry and its "completion", its "index" and the number of "sample".

    entries: list of (where, dict). gaps: an infill.Gap of each. how: sample.Config. write_batch:
    texts, rows -> (ids, stopped). A text's number in the random streams is that of its prompt and
    sample, so batches change nothing. Where it was stopped, the texts that are complete still come.
    """
    jobs = [(index, sample) for index in range(len(gaps)) for sample in range(how.samples)]
    for start in range(0, len(jobs), how.batch):
        part = jobs[start:start + how.batch]
        texts = [gaps[index].ids(gaps[index].lengths[0]) for index, _ in part]
        rows = [index * how.samples + sample for index, sample in part]
        written, stopped = write_batch(texts, rows)
        for (index, sample), ids in zip(part, written):
            if gaps[index].complete(ids, tok, how.stop):
                text = gaps[index].text(ids, tok, how.stop)
                line = {"completion": text, "index": index, "sample": sample}
                yield json.dumps(entries[index][1] | line)
        if stopped:
            return


def save_lines(path, lines, bar):
    """Write lines to a file. Whatever ends them early, those before it are kept."""
    failure = None
    with replacing(path) as f:
        try:
            for line in lines:
                f.write(line.encode() + b"\n")
                f.flush()
                bar.update()
        except BaseException as error:
            failure = error
        if f.tell() == 0:  # stopped before the first one: an older file stays
            raise failure or SystemExit(130)
    if failure:
        raise failure
