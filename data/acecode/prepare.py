"""AceCode's questions and tests as tasks for reinforcement learning, the hard ones of them.

    python -m data.acecode.prepare                             # streamed from the Hub, 1 GB
    python -m data.acecode.prepare --source="/mine/*.parquet"  # from files
    python -m data.acecode.prepare --source=mine.jsonl --split=all --style=completion

The data: TIGER-Lab/AceCode-87K on the Hugging Face Hub (once AceCode-89K; arXiv 2502.01718), whose
page says MIT, without an account. A row has an id, a source, a question, test_cases (a list of
assert statements, 16 on average) and inferences: programs that models wrote, each with a completion
(the program), a model_name and a pass_rate, the share of the tests that it passed. A source may
also be .jsonl, .jsonl.gz, .jsonl.zst or .parquet files as data/stack reads them: a file, a glob, a
folder, a URL; several with commas between. Later releases call the tests `tests` (--tests=tests).

--split=hard is DiffuCoder's (arXiv 2506.20639, recipes/process_data.py of its code): of the pass
rates of MODELS, those rows stay whose mean is at most the 20th percentile of all usable rows', and
whose standard deviation is at least the 40th percentile of theirs: questions that these models
mostly fail, but not always. (Comments there speak of the top 50 % by deviation; this is what the
code does, the top 60 %.) The paper has 21 thousand samples, which leaves open how many are forms.

--style says in which form a question is written:

    question     MBPP's schema: the question as text, and the tests
    completion   HumanEval's: a signature with the question as its docstring, to be completed
    both         DiffuCoder's: the question, and after it the completion where there is one

The signature is that of the row's best program, the first with the highest pass rate, for the
function that the tests call. Imports that the signature needs come before it. A question that
addresses a reader ("you") is no docstring, and gets no such form, as in the released code. Ours:
the program is parsed, where that code takes what stands before the first colon at a line's end, and
has to define the function that the tests call.
A program that passed all tests is kept as the task's reference. Nothing is run here: `python
evaluate.py check --tasks=data/acecode/tasks.jsonl` says which of them pass in the sandbox.

Writes tasks.jsonl, in the order of the files and rows, and meta.json last. Rows are streamed;
memory holds an id and two numbers of each. If nothing has changed since the last run, it does
nothing.

Not covered: running the tests, questions that resemble those of a benchmark, a held-out split.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import ast
import builtins
import hashlib
import json
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import Float, Int, Mistake, Name, check_fields, configure, shortened
from data.stack.sources import fault, list_files, parse_line, read_records
from data.stdlib.prepare import is_unchanged
from extract import IMPORTS, binds, extract, reads
from files import replacing, write_json
from tasks import Task, called_by


@dataclass
class Config:
    source: Name = "hf://datasets/TIGER-Lab/AceCode-87K/data/train-*.parquet"  # files to read
    out: Name = "data/acecode"  # folder to write to
    split: Literal["hard", "all"] = "hard"  # which rows: by pass rates, or all
    mean_percentile: Float(0, 100) = 20.0  # (hard) rows up to it, by the mean of the pass rates
    std_percentile: Float(0, 100) = 40.0  # (hard) rows from it on, by their standard deviation
    style: Literal["both", "question", "completion"] = "both"  # form of a question
    tests: Name = "test_cases"  # column with the tests
    max_chars: Int(1, 10**6) = 20000  # longer questions are left out


MODELS = ("qwen_coder_2.5", "llama3_instruct")  # whose pass rates say what is hard
PRODUCTS = ("tasks.jsonl",)
VERSION = 1  # of what is written; a higher one makes folders anew


# --- what is read ---------------------------------------------------------------------------------

def find_files(source):
    """[url, size, stamp] of each file of the source, in its order, each file once."""
    files = {}
    for pattern in source.split(","):
        for file in sorted(list_files(pattern.strip())):
            files.setdefault(file[0], file)
    return list(files.values())


def read_rows(url, cfg):
    """(id, family, question, tests, programs) of each row of a file. programs: see programs_of.

    Raises Mistake for columns that are missing or hold something else than they should.
    """
    columns = {"id": str, "question": str, cfg.tests: list}
    wanted = [*columns, "source", "inferences"]
    for number, row in read_records(url, wanted):
        if isinstance(row, bytes):
            if not row.strip():
                continue
            row = parse_line(row, url, number)
        where = f"{url}, row {number}"
        if not isinstance(row, dict) or not all(column in row for column in columns):
            has = ", ".join(row) if isinstance(row, dict) else "no columns at all"
            raise Mistake(f"{where}: columns {', '.join(columns)} are wanted, but it has {has}; "
                          "--tests names the column with the tests")
        for column, kind in {**columns, "source": str, "inferences": list}.items():
            if row.get(column) is not None and not isinstance(row[column], kind):
                raise Mistake(f"{where}: column {column!r} holds {type(row[column]).__name__}, not "
                              + {str: "text", list: "a list"}[kind])
        yield (row["id"], row.get("source") or "", row["question"], row[cfg.tests] or [],
               programs_of(where, row.get("inferences") or []))


def programs_of(where, inferences):
    """[(model, pass rate, program)] of a row; those without a pass rate or a program are not there.

    Raises Mistake where the list holds something else.
    """
    programs = []
    for inference in inferences:
        found = inference if isinstance(inference, dict) else {}
        model, rate, text = (found.get(k) for k in ("model_name", "pass_rate", "completion"))
        kinds = isinstance(text, str | None) and isinstance(rate, int | float | None)
        if rate != rate:  # NaN, which some programs write for none
            rate = None
        if not found or not kinds or rate is not None and not 0 <= rate <= 1:
            raise Mistake(f"{where}: inferences hold {shortened(inference)}, where a completion, a "
                          "model_name and a pass_rate from 0 to 1 are wanted")
        if rate is not None and text is not None:
            programs.append((model, rate, text))
    return programs


def usable_rows(files, cfg, left_out):
    """({what a task is made of}, pass rates of MODELS) of each row; `left_out` counts the others.

    program: the best one, "" where there is none. passes: whether it passed all tests.
    """
    seen = set()
    with tqdm(desc="reading", unit=" rows", mininterval=0.5) as bar:
        for url, _, _ in files:
            for name, family, question, tests, programs in read_rows(url, cfg):
                bar.update()
                rates = [rate for model, rate, _ in programs if model in MODELS]
                why = fault(question, cfg.max_chars) or fault(name, 1000) or fault_of_tests(tests)
                if not why and family:
                    why = fault(family, 1000)
                if not why and cfg.split == "hard" and not rates:
                    why = "no pass rates of " + " and ".join(MODELS)
                if not why and seen & {name, name + "/completion"}:
                    why = "id that was there before"
                if why:
                    left_out[why] += 1
                    continue
                seen |= {name, name + "/completion"}
                _, rate, program = max(programs, key=lambda p: p[1], default=("", 0, ""))
                yield {"id": name, "family": family, "question": question, "tests": tests,
                       "program": program, "passes": rate == 1}, rates


def fault_of_tests(tests):
    """Why a row's tests make no task; empty if they do."""
    if not tests:
        return "no tests"
    for test in tests:
        tree = parsed(test) if isinstance(test, str) else None
        if tree is None or not tree.body:
            return "a test that is not Python"
    return ""


def parsed(code):
    """The syntax tree of code; None where it is not Python."""
    try:
        code.encode()
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# --- which rows stay ------------------------------------------------------------------------------

def hard(scores, cfg):
    """Which rows are hard, a list of bool. scores: (mean, standard deviation) of each row."""
    if not scores:
        return []
    means, stds = np.array(scores).T  # (rows,) each
    low = means <= np.percentile(means, cfg.mean_percentile)
    return (low & (stds >= np.percentile(stds, cfg.std_percentile))).tolist()


# --- what is written ------------------------------------------------------------------------------

def tasks_of_row(row, style, left_out):
    """The lines that a row becomes, dicts as tasks.read_tasks takes them."""
    code, found = extract(Task("", "", ""), row["program"])
    code = code if found and parsed(code) else ""
    name = called_by(row["tests"], code)
    common = {"test_list": row["tests"], "family": row["family"]}
    question = {"task_id": row["id"], "text": row["question"], **common}
    if row["passes"] and code:
        question["code"] = code
    if style == "question":
        return [question]
    prompt = completion_prompt(row["question"], name, code)
    if not prompt:
        left_out["no completion form"] += 1
        return [question] if style == "both" else []
    task_id = row["id"] if style == "completion" else row["id"] + "/completion"
    completion = {"task_id": task_id, "prompt": prompt, "entry_point": name, **common}
    if row["passes"]:
        completion["canonical_solution"] = code
    return [question, completion] if style == "both" else [completion]


def completion_prompt(question, name, code):
    """A signature with the question as its docstring, as HumanEval has it; "" where there is none.

    name: the function that the tests call. code: a program that defines it.
    """
    body = parsed(code).body
    functions = [s for s in body if isinstance(s, ast.FunctionDef) and s.name == name]
    if "you" in question.lower() or not functions:
        return ""
    function = functions[0]
    function.body, function.decorator_list = [ast.Pass()], []
    needed = reads(function) - set(dir(builtins))  # by annotations and defaults
    imports = [s for s in body if isinstance(s, IMPORTS) and binds(s) & needed]
    if needed - set().union(*map(binds, imports)):
        return ""
    try:
        header = ast.unparse(function).removesuffix("\n    pass")
    except RecursionError:
        return ""
    before = "".join(ast.unparse(s) + "\n" for s in imports) + ("\n\n" if imports else "")
    raw = "r" if "\\" in question else ""
    text = indent(question.strip().replace('"""', r'\"\"\"'), "    ")
    prompt = f'{before}{header}\n    {raw}"""\n{text}\n    """\n'
    return prompt if parsed(prompt) else ""


def write_tasks(files, cfg):
    """Write tasks.jsonl. Returns what meta.json says of it."""
    left_out, scores, counts = Counter(), [], Counter()
    with (tempfile.TemporaryFile("w+", dir=cfg.out) as aside,
          replacing(cfg.out / "tasks.jsonl") as out):
        for row, rates in usable_rows(files, cfg, left_out):
            aside.write(json.dumps(row) + "\n")
            scores.append((np.mean(rates), np.std(rates)) if rates else (0.0, 0.0))
        kept = hard(scores, cfg) if cfg.split == "hard" else [True] * len(scores)
        aside.seek(0)
        for line, keeps in zip(aside, kept):
            if not keeps:
                continue
            counts["rows"] += 1
            for task in tasks_of_row(json.loads(line), cfg.style, left_out):
                counts["tasks"] += 1
                counts["with a reference"] += "code" in task or "canonical_solution" in task
                out.write((json.dumps(task) + "\n").encode())
        if not counts["tasks"]:
            reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            raise Mistake(f"{cfg.source} gives no tasks with --split={cfg.split}: of "
                          f"{len(scores):,} usable rows {counts['rows']:,} are kept; left out: "
                          f"{reasons or 'none'}")
    return {"usable": len(scores), **counts, "left_out": dict(sorted(left_out.items()))}


def fingerprint_of(cfg, files):
    """A digest of all that the output depends on."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("source", "out")}
    depends_on = (VERSION, files, settings)
    return hashlib.sha256(repr(depends_on).encode("utf-8", "surrogatepass")).hexdigest()


def prepare(cfg):
    """Make the folder. Raises Mistake for settings and files that do not fit."""
    check_fields(cfg)
    cfg.out = Path(cfg.out)
    files = find_files(cfg.source)
    fingerprint = fingerprint_of(cfg, files)
    if is_unchanged(cfg.out, PRODUCTS, fingerprint):
        print(f"{cfg.out}: nothing to do, {len(files)} files unchanged")
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    (cfg.out / "meta.json").unlink(missing_ok=True)  # from here on, interrupted is unfinished
    counts = write_tasks(files, cfg)
    print(f"{cfg.out}: {counts['tasks']:,} tasks of {counts['rows']:,} rows, of "
          f"{counts['usable']:,} that are usable; {counts['with a reference']:,} tasks have a "
          "reference")
    for why, count in counts["left_out"].items():
        print(f"{count:,} left out: {why}")
    settings = asdict(cfg) | {"out": str(cfg.out)}
    write_json(cfg.out / "meta.json", settings | counts | {"files": len(files),
                                                           "fingerprint": fingerprint})


def main(argv=None):
    cfg, _ = configure(Config, argv)
    prepare(cfg)


if __name__ == "__main__":
    main()
