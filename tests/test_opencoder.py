"""data/opencoder/prepare.py: what its samples hold, what is left out, and what is refused."""
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loader
import run
import sft
from configurator import Mistake
from data.opencoder import prepare as opencoder
from data.opencoder.prepare import Config
from huggingface import load_tokenizer
from tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHATML = ("{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
          "{% if add_generation_prompt %}<bos>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer of 300 ids and a chat template, all that is needed of a model."""
    folder = tmp_path_factory.mktemp("model")
    texts = [f"def f{i}(x):\n    return x[{i}]\n" for i in range(50)]
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, 300).to_str())
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def rows_of(count, seed=0):
    """Rows in the schema of educational_instruct."""
    return [{"seq_id": i, "instruction": f"Write f{seed}_{i}. é🙂 <eos>",
             "output": f"```python\ndef f{i}(x):\n    return {i}\n```",
             "code": f"def f{i}(x):\n    return {i}", "entry_point": f"f{i}",
             "testcase": [f"assert f{i}(0) == {i}"]} for i in range(count)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        return pyarrow.parquet.write_table(table, path, row_group_size=7)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(model, source, out, **cfg):
    """Run in this process. Returns meta.json."""
    opencoder.prepare(Config(tokenizer=str(model), source=str(source), out=str(out),
                             **{"val_percent": 20.0} | cfg))
    return json.loads((out / "meta.json").read_text())


def samples_of(out, split):
    """[(the text that is not scored, the text that is)], special tokens by name."""
    tok = load_tokenizer(out)
    store = sft.Store.open(out, split, tok.vocab_size)
    found = []
    for number in range(len(store)):
        ids, scored = store.sample(number)
        texts = [tok.hf.decode(ids[part], skip_special_tokens=False) for part in (~scored, scored)]
        found.append(tuple(texts))
    return found


def expected(rows, answer="output", style="chat"):
    """The same, of the rows."""
    if style == "base":
        return [("<bos>" + row["instruction"] + "\n", row[answer]) for row in rows]
    return [(f"<bos>user\n{row['instruction']}<eos><bos>assistant\n", row[answer] + "<eos>")
            for row in rows]


@pytest.mark.parametrize("style, answer", [("chat", "output"), ("base", "code")])
def test_every_row_becomes_a_sample_of_its_split_in_order(tmp_path, model, style, answer):
    rows = rows_of(60)
    write_rows(tmp_path / "in" / "a.parquet", rows[:35])
    write_rows(tmp_path / "in" / "b.jsonl", rows[35:])
    out = tmp_path / "out"
    meta = prepare(model, tmp_path / "in", out, style=style, answer=answer)
    for split, is_val in (("train", False), ("val", True)):
        of_split = [row for row in rows if sft.is_held_out(row["instruction"], 20) == is_val]
        assert samples_of(out, split) == expected(of_split, answer, style)
        assert meta[split]["samples"] == len(of_split) > 0
        assert meta[split]["tokens"] == (out / f"{split}.scored").stat().st_size
    assert meta["left_out"] == {}
    names = {path.name for path in out.iterdir()}
    assert names == {*opencoder.PRODUCTS, "meta.json", "chat_template.jinja"}


def test_the_folder_is_what_a_run_reads(tmp_path, model):
    write_rows(tmp_path / "a.parquet", rows_of(60))
    out = tmp_path / "out"
    prepare(model, tmp_path / "a.parquet", out)
    run.check_tokenizer(out, load_tokenizer(model))
    assert sft.is_supervised(out) and loader.fingerprint(out)
    tok = load_tokenizer(out)
    rows = sft.Samples(sft.Store.open(out, "train", tok.vocab_size), 256, tok)
    assert rows.too_long == 0 and rows.batch([0]).maskable.any()


def test_what_is_left_out_is_counted_by_reason(tmp_path, model):
    fine = rows_of(30)
    again = [{**row, "output": "another answer"} for row in fine[:4]]
    unfit = [{"instruction": "", "output": "x"}, {"instruction": "q", "output": None},
             {"instruction": "q2", "output": " \n"}, {"instruction": "q3", "output": "y" * 600},
             {"instruction": "q4 \ud800", "output": "y"}]
    write_rows(tmp_path / "a.jsonl", fine + unfit + again)
    out = tmp_path / "out"
    meta = prepare(model, tmp_path / "a.jsonl", out, max_chars=500)
    assert meta["left_out"] == {"duplicate question": 4, "empty": 3, "not Unicode": 1,
                                "too long": 1}
    assert Counter(samples_of(out, "train") + samples_of(out, "val")) == Counter(expected(fine))


@settings(max_examples=10, deadline=None)
@given(pairs=st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=30))
def test_any_texts_come_through_and_of_equal_questions_the_first(model, pairs):
    content = "".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in pairs)
    rows = [*rows_of(40), *({"instruction": q, "output": a} for q, a in pairs)]
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(40)) + content
    fsspec.filesystem("memory").pipe("/opc/a.jsonl", lines.encode())
    first = {}
    for row in rows:
        if not opencoder.fault(row["instruction"], 99) and not opencoder.fault(row["output"], 99):
            first.setdefault(row["instruction"], row)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prepare(model, "memory://opc/a.jsonl", out, style="base")
        found = samples_of(out, "train") + samples_of(out, "val")
    assert Counter(found) == Counter(expected(first.values(), style="base"))


def test_names_of_stages_and_subsets_are_files_of_the_hub(monkeypatch):
    asked = []

    def list_files(pattern):
        asked.append(pattern)
        return [[f"{pattern}#{n}", 1, ""] for n in (2, 1)]

    monkeypatch.setattr(opencoder, "list_files", list_files)
    files = opencoder.find_files("stage2, realuser_instruct,evol_instruct,mine/*.jsonl")
    hub = "hf://datasets/OpenCoder-LLM/opc-sft-stage"
    assert [f"{hub}2/educational_instruct/*.parquet", f"{hub}2/evol_instruct/*.parquet",
            f"{hub}2/mceval_instruct/*.parquet", f"{hub}2/package_instruct/*.parquet",
            f"{hub}1/data/realuser_instruct-*.parquet", f"{hub}2/evol_instruct/*.parquet",
            "mine/*.jsonl"] == asked
    urls = [file[0] for file in files]
    assert len(urls) == len(set(urls)) == 12 and urls[:2] == [f"{asked[0]}#1", f"{asked[0]}#2"]


def test_unchanged_files_are_not_read_again_and_other_settings_are_seen(
    tmp_path, model, capsys, monkeypatch
):
    write_rows(tmp_path / "a.jsonl", rows_of(40))
    out = tmp_path / "out"
    before = prepare(model, tmp_path / "a.jsonl", out)
    with monkeypatch.context() as patch:
        patch.setattr(opencoder, "read_records", None)  # reading would fail
        assert prepare(model, tmp_path / "a.jsonl", out) == before
    assert "nothing to do, 1 files unchanged" in capsys.readouterr().out
    (out / "val.scored").unlink()
    prepare(model, tmp_path / "a.jsonl", out)
    assert (out / "val.scored").is_file()
    assert prepare(model, tmp_path / "a.jsonl", out, answer="code") != before
    write_rows(tmp_path / "a.jsonl", rows_of(41))
    prepare(model, tmp_path / "a.jsonl", out)
    assert len(samples_of(out, "train") + samples_of(out, "val")) == 41


def test_an_interrupted_run_leaves_no_folder_that_looks_complete(tmp_path, model, monkeypatch):
    write_rows(tmp_path / "a.jsonl", rows_of(40))
    out, whole = tmp_path / "out", tmp_path / "whole"
    prepare(model, tmp_path / "a.jsonl", out)
    prepare(model, tmp_path / "a.jsonl", whole, style="base")
    write = sft.write
    for fails_at in ("train", "val"):
        def stop(folder, split, samples, fails_at=fails_at):
            if split == fails_at:
                raise KeyboardInterrupt
            return write(folder, split, samples)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sft, "write", stop)
            prepare(model, tmp_path / "a.jsonl", out, style="base")
        assert not (out / "meta.json").exists()
        with pytest.raises(Mistake, match=r"no meta\.json"):
            sft.Store.open(out, "train", 300)
    prepare(model, tmp_path / "a.jsonl", out, style="base")
    for name in opencoder.PRODUCTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(out.glob("*.sqlite*"))


@pytest.mark.parametrize("cfg, said", [
    ({"tokenizer": ""}, "--tokenizer=FOLDER is missing"),
    ({"question": "prompt"}, "row 1: a column 'prompt' is wanted, but it has seq_id"),
    ({"answer": "testcase"}, "row 1: column 'testcase' holds list, not text"),
    ({"val_percent": 1e-6}, "0 for validation; both need at least one"),
    ({"source": "stage3"}, "no file at stage3"),
])
def test_a_mistake_is_one_sentence(tmp_path, model, cfg, said):
    write_rows(tmp_path / "a.jsonl", rows_of(20))
    settings = {"tokenizer": str(model), "source": f"{tmp_path}/a.jsonl", "out": f"{tmp_path}/out"}
    with pytest.raises(Mistake) as error:
        opencoder.prepare(Config(**settings | cfg))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_model_without_a_template_is_told_of_the_style_without(tmp_path, model):
    write_rows(tmp_path / "a.jsonl", rows_of(20))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    with pytest.raises(Mistake, match="has no chat template; --style=base does without"):
        prepare(bare, tmp_path / "a.jsonl", tmp_path / "out")
    assert prepare(bare, tmp_path / "a.jsonl", tmp_path / "out", style="base")["left_out"] == {}


@pytest.mark.parametrize("name", ["train.bin", "train_00000.bin"])
def test_another_scripts_folder_is_left_alone(tmp_path, model, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"12")
    with pytest.raises(Mistake, match=f"holds {name}, which another script prepared"):
        prepare(model, tmp_path / "a.jsonl", out)
    assert [path.name for path in out.iterdir()] == [name]


def test_rows_are_read_as_samples_are_taken(tmp_path, model, monkeypatch):
    monkeypatch.setattr(sft, "CHUNK", 10)
    taken = 0

    def pairs():
        nonlocal taken
        for row in rows_of(100):
            taken += 1
            yield "a row", row["instruction"], row["output"]

    samples = opencoder.encode_pairs(pairs(), "chat", load_tokenizer(model))
    with tempfile.TemporaryFile() as aside:
        for number, _ in enumerate(opencoder.without_val(samples, 5, aside), 1):
            assert taken <= number + 20  # a chunk ahead, and some that were held out
    assert taken == 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path, model):
    """40 MB of text take less than 100 MB more than what is imported."""
    with open(tmp_path / "a.jsonl", "w") as file:
        for i in range(800):
            row = {"instruction": f"Write {i}.", "output": f"x{i} = 0\n" * 5000}
            file.write(json.dumps(row) + "\n")
    program = (
        "import resource, sys; from data.opencoder import prepare as p; import sft; sft.CHUNK = 20;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "p.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    words = [f"--tokenizer={model}", f"--source={tmp_path}/a.jsonl", f"--out={tmp_path}/out",
             "--style=base", "--val_percent=5"]
    ran = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(ran.stdout.split()[-1]) * unit < 100e6
    assert np.memmap(tmp_path / "out" / "train.scored", np.uint8).size > 5e6
