"""data/acecode/prepare.py: what its tasks hold, which rows are hard, and what is refused."""
import gzip
import json
import statistics
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import Mistake
from data.acecode import prepare as acecode
from data.acecode.prepare import MODELS, Config, completion_prompt, main
from tasks import read_tasks, reference

GOOD = ("import math\nfrom typing import List\n\n\n@staticmethod\n"
        "def far(points: List[float], limit: float = 1.5,\n        *, signed=False) -> int:\n"
        "    return sum(abs(p) > limit for p in points)\n")
QUESTION = "Count the points that are farther away than a limit.\n\nPoints are numbers."
TESTS = ["assert far([1.0, 2.0]) == 1", "assert far([]) == 0"]


def inference(rate, program=GOOD, model=MODELS[0]):
    return {"completion": program, "completion_id": 0, "model_name": model, "pass_rate": rate}


def row_of(number, rates=(0.0, 1.0), **other):
    """A row in AceCode's schema."""
    row = {"id": f"oss_{number}", "source": "oss", "question": f"{QUESTION} ({number})",
           "test_cases": TESTS, "context_messages": [{"content": QUESTION, "role": "user"}],
           "inferences": [inference(rate, model=MODELS[n % 2]) for n, rate in enumerate(rates)]}
    return row | other


def write_rows(path, rows):
    if path.suffix == ".parquet":
        return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def prepared(folder, rows, **cfg):
    """(lines of tasks.jsonl, meta.json, Tasks) that the rows become."""
    write_rows(folder / "rows.jsonl", rows)
    out = folder / "out"
    acecode.prepare(Config(source=str(folder / "rows.jsonl"), out=str(out),
                           **{"split": "all"} | cfg))
    path = out / "tasks.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return lines, json.loads((out / "meta.json").read_text()), read_tasks(path)


# --- the forms ------------------------------------------------------------------------------------

def test_both_forms_of_a_question(tmp_path):
    lines, meta, (question, completion) = prepared(tmp_path, [row_of(7)])
    assert [line["task_id"] for line in lines] == ["oss_7", "oss_7/completion"]
    assert question.prompt.startswith('"""\nCount the points') and question.family == "oss"
    assert completion.prompt == (
        "from typing import List\n\n\n"
        "def far(points: List[float], limit: float=1.5, *, signed=False) -> int:\n"
        '    """\n    Count the points that are farther away than a limit.\n\n'
        '    Points are numbers. (7)\n    """\n')
    assert completion.setup == "from typing import List\n\n\n"
    for task in (question, completion):
        assert task.tests == tuple(TESTS) and task.entry_point == "far"
        assert "sum(abs(p)" in reference(task)  # its best program passed all tests
    assert (meta["rows"], meta["tasks"], meta["with a reference"]) == (1, 2, 2)


@pytest.mark.parametrize("style, names", [
    ("question", ["oss_0", "oss_1"]), ("completion", ["oss_0"]),
    ("both", ["oss_0", "oss_0/completion", "oss_1"])])
def test_a_question_to_a_reader_has_no_completion_form(tmp_path, style, names):
    rows = [row_of(0), row_of(1, question="You are given points. Count them.")]
    _, meta, tasks = prepared(tmp_path, rows, style=style)
    assert [task.task_id for task in tasks] == names
    assert meta["left_out"] == ({} if style == "question" else {"no completion form": 1})


def test_the_signature_is_that_of_the_first_best_program(tmp_path):
    programs = ["def far(a):\n    return 0\n", "def far(b):\n    return 1\n",
                "```python\ndef far(c):\n    return 2\n```", "def far(d):\n    return 3\n"]
    rates = (0.2, 0.5, 0.7, 0.7)
    row = row_of(0, inferences=[inference(r, p) for r, p in zip(rates, programs)])
    [line], _, _ = prepared(tmp_path, [row], style="completion")
    assert line["prompt"].startswith("def far(c):\n")
    assert "canonical_solution" not in line  # none passed all tests


@pytest.mark.parametrize("code", [
    "", "def near(x):\n    return x\n", "class far:\n    pass\n", "far = lambda x: x\n",
    "async def far(x):\n    return x\n", "def far(x: Node):\n    return x\n",
    "LIMIT = 3\ndef far(x, limit=LIMIT):\n    return x\n",
    "def far(x=1" + " + 1" * 900 + "):\n    return x\n",
], ids=range(8))
def test_programs_without_a_signature_that_stands_alone(code):
    assert completion_prompt("Add.", "far", code) == ""


QUESTIONS = st.text(st.sampled_from(list('ab\\"\'\n\r\t {}#%nuxN{}\0é🙂')), max_size=30)


@settings(max_examples=200, deadline=None)
@given(question=QUESTIONS)
def test_any_question_is_a_docstring_or_has_no_such_form(question):
    prompt = completion_prompt("Say " + question, "far", GOOD)
    if "\0" in question:
        assert prompt == ""
        return
    space = {}
    exec(prompt + "    return 5\n", space)
    assert space["far"]([]) == 5
    said, asked = [text.replace(r'\"\"\"', '"""').split()
                   for text in (space["far"].__doc__, "Say " + question)]
    assert said == asked


# --- which rows -----------------------------------------------------------------------------------

def test_the_hard_split_is_diffucoder_s(tmp_path):
    rates = [(i % 11 / 10, i % 7 / 6, i % 3 / 2) for i in range(300)]
    rows = [row_of(n, found) for n, found in enumerate(rates)]
    for row in rows:  # of other models: not counted
        row["inferences"].append(inference(1.0, model="another"))
    lines, meta, _ = prepared(tmp_path, rows, split="hard", style="question")
    means = [statistics.fmean(found) for found in rates]
    stds = [statistics.pstdev(found) for found in rates]
    low = statistics.quantiles(means, n=100, method="inclusive")[20 - 1]
    high = statistics.quantiles(stds, n=100, method="inclusive")[40 - 1]
    wanted = [f"oss_{n}" for n in range(300)
              if means[n] <= low + 1e-12 and stds[n] >= high - 1e-12]
    assert [line["task_id"] for line in lines] == wanted
    assert 5 < len(wanted) < 60 and meta["rows"] == len(wanted) and meta["usable"] == 300


@settings(max_examples=50, deadline=None)
@given(rates=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=4),
                      min_size=1, max_size=12), percent=st.sampled_from([0.0, 20.0, 60.0, 100.0]))
def test_the_easiest_row_is_never_harder_than_one_that_stays(rates, percent):
    scores = [(statistics.fmean(r), statistics.pstdev(r)) for r in rates]
    kept = acecode.hard(scores, Config(mean_percentile=percent, std_percentile=0.0))
    inside = [mean for (mean, _), keeps in zip(scores, kept) if keeps]
    outside = [mean for (mean, _), keeps in zip(scores, kept) if not keeps]
    assert inside and max(inside) < min(outside, default=2)
    assert percent < 100 or not outside


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    rows = [row_of(0), row_of(0), row_of(1, question=" \n"), row_of(2, question="x" * 600),
            row_of(3, question="\ud800"), row_of(4, test_cases=[]), row_of(5, test_cases=None),
            row_of(6, test_cases=["assert far("]), row_of(7, test_cases=[5]), row_of(8, ()),
            row_of(9, inferences=[inference(0.5, model="another")]), row_of(10, (None, 0.5)),
            row_of(11, test_cases=["# nothing"]), row_of(12, id=None),
            row_of(13, id="oss_0/completion"), row_of(14, (float("nan"),))]
    lines, meta, _ = prepared(tmp_path, rows, split="hard", max_chars=500, mean_percentile=100.0,
                              std_percentile=0.0, style="question")
    assert [line["task_id"] for line in lines] == ["oss_0", "oss_10"]
    assert meta["left_out"] == {
        "a test that is not Python": 3, "empty": 2, "id that was there before": 2, "no tests": 2,
        "no pass rates of qwen_coder_2.5 and llama3_instruct": 3, "not Unicode": 1, "too long": 1}


WORDS = st.sampled_from(["", "far", "ä", "\ud800", "\0", "def far(x):", '"""', "you", "```", "\\"])
JUNK = st.lists(st.fixed_dictionaries({
    "id": st.one_of(st.none(), WORDS, st.text(max_size=3)), "source": st.one_of(st.none(), WORDS),
    "question": st.one_of(st.none(), WORDS, st.text(max_size=9)),
    "test_cases": st.one_of(st.none(), st.lists(st.sampled_from(
        [*TESTS, "assert 1", "x =", "assert \ud800", "\0", 4, None]), max_size=3)),
    "inferences": st.one_of(st.none(), st.lists(st.builds(inference, st.sampled_from(
        [None, 0, 0.5, 1, float("nan")]), st.one_of(st.none(), WORDS, st.just(GOOD)))))}))


@settings(max_examples=50, deadline=None)
@given(junk=JUNK, style=st.sampled_from(["both", "question", "completion"]))
def test_whatever_is_written_can_be_read(junk, style):
    with tempfile.TemporaryDirectory() as folder:
        _, meta, tasks = prepared(Path(folder), [row_of("sure"), *junk], style=style)
    assert tasks[0].task_id == "oss_sure" and len(tasks) == meta["tasks"]
    forms = meta["left_out"].pop("no completion form", 0)
    assert meta["usable"] + sum(meta["left_out"].values()) == 1 + len(junk)
    assert len(tasks) == {"both": 2 * meta["rows"] - forms, "question": meta["rows"],
                          "completion": meta["rows"] - forms}[style]


# --- files ----------------------------------------------------------------------------------------

def test_every_format_gives_the_same_tasks_in_order(tmp_path):
    rows, texts = [row_of(n) for n in range(9)], []
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "a.parquet", rows[:4])
    write_rows(tmp_path / "in" / "b.jsonl.gz", rows[4:6])
    write_rows(tmp_path / "in" / "c.jsonl", rows[6:])
    write_rows(tmp_path / "whole.parquet", rows)
    first = f"{tmp_path}/in/a.parquet, {tmp_path}/in/*"
    for n, source in enumerate((tmp_path / "in", tmp_path / "whole.parquet", first)):
        acecode.prepare(Config(source=str(source), out=str(tmp_path / str(n)), split="all"))
        texts.append((tmp_path / str(n) / "tasks.jsonl").read_bytes())
    assert texts[0] == texts[1] == texts[2] and texts[0].count(b"\n") == 18


def test_a_second_run_does_nothing_until_something_changes(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [row_of(n) for n in range(4)])
    words = [f"--source={tmp_path}/a.jsonl", f"--out={tmp_path}/out", "--split=all"]
    main(words)
    assert "8 tasks of 4 rows, of 4 that are usable; 8 tasks have" in capsys.readouterr().out
    main(words)
    assert "nothing to do, 1 files unchanged" in capsys.readouterr().out
    main([*words, "--style=question"])
    assert "4 tasks of 4 rows" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["meta.json", "tasks.jsonl"]


@pytest.mark.parametrize("line, message", [
    ("5", "row 2: columns id, question, test_cases are wanted, but it has no columns at all"),
    ('{"id": "a", "question": "b"}', "row 2: columns .* but it has id, question; --tests names"),
    ("{", "line 2, is not JSON"),
    (json.dumps(row_of(1, question=5)), "row 2: column 'question' holds int, not text"),
    (json.dumps(row_of(1, test_cases="assert 1")), "column 'test_cases' holds str, not a list"),
    (json.dumps(row_of(1, id=[1])), "row 2: column 'id' holds list, not text"),
    (json.dumps(row_of(1, inferences={"a": 1})), "'inferences' holds dict, not a list"),
    (json.dumps(row_of(1, inferences=[5])), "row 2: inferences hold 5, where a completion"),
    (json.dumps(row_of(1, (1.5,))), "row 2: inferences hold .* a pass_rate from 0 to 1"),
    (json.dumps(row_of(1, ("0.5",))), "row 2: inferences hold .* a pass_rate from 0 to 1"),
])
def test_what_is_no_row_is_refused_with_its_place(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row_of(0)) + "\n" + line + "\n")
    with pytest.raises(Mistake, match=f"(?s)a.jsonl.*{message}"):
        acecode.prepare(Config(source=str(path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "meta.json").exists()
    assert not (tmp_path / "out" / "tasks.jsonl").exists()


def test_files_that_are_not_there_and_files_without_tasks(tmp_path):
    with pytest.raises(Mistake, match="no file at .*nowhere"):
        acecode.prepare(Config(source=str(tmp_path / "nowhere"), out=str(tmp_path / "out")))
    with pytest.raises(Mistake, match="gives no tasks with --split=all: of 1 usable rows 1 are "
                                      "kept; left out: 1 no completion form"):
        prepared(tmp_path, [row_of(0, ())], style="completion")
    write_rows(tmp_path / "a.jsonl", [row_of(0, ())])
    with pytest.raises(Mistake, match="of 0 usable rows 0 are kept; left out: 1 no pass rates"):
        acecode.prepare(Config(source=str(tmp_path / "a.jsonl"), out=str(tmp_path / "out")))


def test_other_columns(tmp_path):
    row = row_of(0)
    row["tests"] = row.pop("test_cases")
    del row["source"], row["inferences"]
    [line], _, [task] = prepared(tmp_path, [row], tests="tests")
    assert line["test_list"] == TESTS and task.family == "" and task.entry_point == "far"
