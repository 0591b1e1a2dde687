"""The files of a score while it is in the making: samples, verdicts, and the settings behind them.

    OUT/settings.json      all that decides the score
    OUT/samples.jsonl      {"task_id", "solution", …} a line, in the form that EvalPlus reads
    OUT/verdicts.jsonl     {"row", "status", …} a line

Lines are appended as they come, so a kill loses at most what is being written. Process 0 writes
these files, process r of several samples.r.jsonl and verdicts.r.jsonl. The next start joins them,
drops a line that a kill cut short, and goes on with what is missing.

Not covered: the lock (run.py), what the lines add up to (report.py).
"""
import hashlib
import json

import files
from configurator import Mistake, shortened

FREE = ("model", "tasks")  # paths: a fingerprint tells whether another thing is there now


class Results:
    """Samples and verdicts by their row, in memory and in a folder.

    Row i · n + j is sample j of task i. samples, verdicts: {row: dict}, as in the files.
    """

    def __init__(self, folder, tasks, n):
        self.folder, self.n = folder, n
        self.names = [task.task_id for task in tasks]
        self.samples, self.verdicts = {}, {}
        self.outputs = {}

    def __len__(self):
        """How many rows there will be."""
        return len(self.names) * self.n

    def read(self):
        """Take in the lines of all processes. The first line of a row counts."""
        for path in sorted(self.folder.glob("samples*.jsonl")):
            for line in whole_lines(path):
                row = line.get("row")
                if self.is_row(row) and line.get("task_id") == self.names[row // self.n]:
                    self.samples.setdefault(row, line)
        for path in sorted(self.folder.glob("verdicts*.jsonl")):
            for line in whole_lines(path):
                if self.is_row(line.get("row")):
                    self.verdicts.setdefault(line["row"], line)

    def is_row(self, row):
        return type(row) is int and 0 <= row < len(self)

    def join(self):
        """Write one file of samples and one of verdicts, by row, in place of those of many."""
        for kind, lines in (("samples", self.samples), ("verdicts", self.verdicts)):
            text = "".join(json.dumps(lines[row]) + "\n" for row in sorted(lines))
            files.write_text(self.folder / f"{kind}.jsonl", text)
            for path in self.folder.glob(f"{kind}.*.jsonl"):
                path.unlink()

    def open(self, rank):
        """Make ready for `add`, as process `rank`."""
        part = f".{rank}" if rank else ""
        for kind in ("samples", "verdicts"):
            path = self.folder / f"{kind}{part}.jsonl"
            self.outputs[kind] = open(path, "a", encoding="utf-8")

    def add(self, kind, line):
        """Append a line. kind: samples or verdicts. line: a dict with its `row`."""
        getattr(self, kind)[line["row"]] = line
        self.outputs[kind].write(json.dumps(line) + "\n")
        self.outputs[kind].flush()

    def close(self):
        for output in self.outputs.values():
            output.close()


def whole_lines(path):
    """The objects in a .jsonl file of ours, without what is none, such as a line cut by a kill."""
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def check_settings(folder, settings):
    """Keep the settings in a new folder. Raises Mistake where another score's are there.

    settings: {name: value}, as JSON has them.
    """
    path = folder / "settings.json"
    if not path.exists():
        if list(folder.glob("samples*.jsonl")):
            raise Mistake(f"{folder} has samples, and no settings.json says how they were made: "
                          "choose another --out")
        files.write_json(path, settings)
        return
    before = files.read_json(path)
    for name in before | settings:
        if name not in FREE and before.get(name) != settings.get(name):
            raise Mistake(f"{name} is {shortened(settings.get(name))}, and was "
                          f"{shortened(before.get(name))} for the samples in {folder}: go on with "
                          "the same settings, or choose another --out")


def weights_fingerprint(paths):
    """A digest of files of weights: their names, sizes, beginnings, middles and ends."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for start in (0, size // 2, max(0, size - 2**20)):
                f.seek(start)
                digest.update(f.read(2**20))
    return digest.hexdigest()[:16]
