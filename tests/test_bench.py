"""bench/ and experiments/: what they refuse, before they measure anything."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import model as model_file
import rl
import rollout
from bench import rl_gpu, sampling, sampling_gpu, train_cpu, train_gpu, train_ranks
from configurator import Mistake, configure
from decode import Decoding, decode, write
from diffusion import Draw, Recipe, corrupt, weighted_loss
from estimators import GIVEN, Estimate, after_one_clean_text, passes_of
from experiments import toy_report
from huggingface import load_tokenizer
from loader import Windows
from model import ModelConfig


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch):
    def measured(*_):
        raise AssertionError("measured")

    monkeypatch.chdir(ROOT)
    for name in ("measure", "falling_loss"):
        for script in (train_cpu, train_gpu):
            monkeypatch.setattr(script, name, measured, raising=False)


@pytest.mark.parametrize("words, said", [
    (["--steps=0"], "steps=0 does not fit: steps is an int from 2 to 100,000"),
    (["--repeats=0"], "repeats=0 does not fit"),
    (["--tokens=100"], "tokens=100 does not fit: tokens is an int from 1,024"),
    (["--tokens=5000"], "tokens=5000 must be a multiple of 1024, such as 5120"),
    (["--tokens=1e30"], "does not fit: tokens is an int"),
    (["--vocab_size=4"], "vocab_size=4 does not fit"),
    (["--out=/nonexistent/x.md"], "there is no folder /nonexistent; make it first"),
])
def test_train_cpu_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_cpu.main(words)


@pytest.mark.parametrize("words, said", [
    (["--runs=0"], "runs=0 does not fit: runs is an int from 1 to 1,000"),
    (["--steps=1"], "steps=1 does not fit"),
    (["--small_steps=-1"], "small_steps=-1 does not fit"),
    (["--data=nope"], "nope"),
])
def test_train_gpu_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_gpu.main(words)


@pytest.mark.parametrize("words, said", [
    (["--steps=0"], "steps=0 does not fit"),
    (["--rounds=0"], "rounds=0 does not fit"),
    (["--context=1"], "context=1 does not fit"),
    (["--out=/nonexistent/x.md"], "there is no folder /nonexistent; make it first"),
])
def test_train_ranks_refuses_at_once(words, said):
    with pytest.raises(Mistake, match=said):
        train_ranks.main(words)


def test_train_ranks_passes_on_what_train_says(tmp_path):
    with pytest.raises(Mistake, match="train.py failed: .*nope") as error:
        train_ranks.main(["--data=nope", "--rounds=1", f"--out={tmp_path}/table.md"])
    assert "\n" not in str(error.value)


def test_the_reason_of_a_failure_is_its_error_line_or_else_its_end():
    assert train_ranks.reason("loading\nerror: no data\nW123 torchrun ends") == "no data"
    assert train_ranks.reason("x" * 5000 + "killed").endswith("xkilled")


@pytest.mark.parametrize("attention", ["tiles", "dense mask"])
def test_all_arms_of_train_cpu_have_the_same_loss(attention, monkeypatch):
    cfg = train_cpu.Config(tokens=64, vocab_size=50)
    monkeypatch.setattr(model_file, "attention", {
        "tiles": train_cpu.tiled_attention, "dense mask": train_cpu.dense_attention}[attention])
    batch = train_cpu.toy_batch(32, cfg, torch.Generator().manual_seed(0))
    recipe = Recipe("block", mask_id=2)
    noised = corrupt(batch, recipe, Draw(seed=0, step=0, rows=range(2), batch_rows=2))
    model = train_cpu.toy_model(32, 50)
    with_saving = weighted_loss(model, noised, recipe)
    without = weighted_loss(train_cpu.WithoutSaving(model), noised, recipe)
    torch.testing.assert_close(with_saving, without, rtol=1e-6, atol=0)


# --- toy_report -----------------------------------------------------------------------------------

STEP = {"step": 0, "loss": 5.0, "tokens": 4096, "tokens_per_s": 100.0, "seconds": 1.0, "mfu": None}
EVALUATION = {"step": 1, "val_nelbo": 5.0, "val_bits_per_byte": 3.0, "val_tokens": 9,
              "seconds": 1.0}
SETTINGS = {"objective": "ar", "context": 8, "batch_tokens": 16, "seed": 1, "eval_windows": 2}


def write_run(folder, config=SETTINGS, metrics=(STEP, EVALUATION)):
    state = folder / "step_0000001" / "state"
    state.mkdir(parents=True)
    (folder / "latest").write_text("step_0000001")
    (folder / "step_0000001" / "config.json").write_text("{}")
    (state / "train.json").write_text(json.dumps({"step": 1, "config": config, "machine": {}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return str(folder)


def test_toy_report_names_a_run_by_its_own_settings(tmp_path):
    ar = write_run(tmp_path / "toy")
    assert toy_report.read_settings(ar, "ar")["step"] == 1
    with pytest.raises(Mistake, match="was trained with objective='ar', where one with objective"):
        toy_report.main([f"--ar={ar}", f"--block={ar}"])
    block = write_run(tmp_path / "toy_ar", SETTINGS | {"objective": "block"})
    with pytest.raises(Mistake, match="was trained with objective='block'"):
        toy_report.main([f"--ar={block}", f"--block={ar}"])


@pytest.mark.parametrize("config", [None, [], {}, SETTINGS | {"context": "8"},
                                    SETTINGS | {"seed": None}, SETTINGS | {"eval_windows": 1.5}])
def test_toy_report_refuses_damaged_settings(tmp_path, config):
    with pytest.raises(Mistake):
        toy_report.read_settings(write_run(tmp_path / "toy", config), "ar")


@pytest.mark.parametrize("content, said", [
    (b'{"step": 0, "lo', "line 1, is not JSON: was it cut short"),
    (b"5\n", "line 1, is neither a step nor an evaluation"),
    (b"null\n", "line 1, is neither"),
    (b"{}\n", "line 1, is neither"),
    (b"[" * 100_000, "line 1, is not JSON"),
    (b"\xff\n", "is not UTF-8"),
    (b"", "has 0 steps and 0 evaluations"),
    (json.dumps(STEP).encode(), "has 1 steps and 0 evaluations"),
])
def test_toy_report_names_damaged_metrics(tmp_path, content, said):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(Mistake, match=said) as error:
        toy_report.read_metrics(tmp_path)
    assert "metrics.jsonl" in str(error.value)


def test_toy_report_reads_steps_and_evaluations(tmp_path):
    run = write_run(tmp_path / "toy", metrics=[EVALUATION, STEP, STEP, EVALUATION])
    steps, evaluations = toy_report.read_metrics(run)
    assert (len(steps), len(evaluations)) == (2, 2)


def write_scores(folder, scores, count=4):
    """What evaluate.py leaves of `count` samples, as far as the report reads it."""
    (folder / "report.json").write_text(json.dumps({"scores": scores}))
    for name in ("samples", "verdicts"):
        lines = [{"solution": f"def f{i}():\n    pass\n", "status": ["passed", "failed"][i % 2],
                  "detail": f"case {i}"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_toy_report_shows_the_score_and_three_functions_with_their_verdicts(tmp_path):
    scores = {"pass@1": 0.5125, "tasks": 400}
    text = "\n".join(toy_report.solutions(write_scores(tmp_path, scores)))
    assert "functions, 400 of" in text and "pass@1 51.2%. The first three:" in text
    assert text.count("```python") == 3
    assert "\n```python\ndef f1():\n    pass\n```\nfailed case 1" in text
    assert "passed case 2" in text and "case 3" not in text
    one = toy_report.solutions(write_scores(tmp_path, scores, count=1))
    assert "\n".join(one).count("```python") == 1


@pytest.mark.parametrize("scores", [None, [], {}, {"pass@1": 0.5}, {"pass@1": "1", "tasks": 4}])
def test_toy_report_refuses_a_report_without_a_score(tmp_path, scores):
    with pytest.raises(Mistake, match="report.json is not a report of `evaluate.py passk`"):
        toy_report.solutions(write_scores(tmp_path, scores))


# --- sampling -------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    (["--rounds=0"], "rounds=0 does not fit: rounds is an int from 1 to 1,000"),
    (["--new_tokens=7"], "new_tokens=7 does not fit"),
    (["--temperature=nan"], "temperature=.* does not fit"),
    (["--out=/nonexistent/x.md"], "there is no folder /nonexistent; make it first"),
    (["--init_from=nope", "--ar=nope", "--quality=true"], "needs a trained model in nope"),
])
def test_sampling_refuses_at_once(words, said, monkeypatch):
    monkeypatch.setattr(sampling, "measure", None)
    with pytest.raises(Mistake, match=said) as error:
        sampling.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words, said", [
    (["--shape=8b"], "shape=8b needs a CUDA device"),
    (["--shape=2b"], "shape"),
    (["--shape=toy", "--batches=(0,)"], "must be numbers of texts from 1"),
    (["--shape=toy", "--batches=()"], "must be numbers of texts from 1"),
    (["--shape=toy", "--batches=(1.5,)"], "must be numbers of texts from 1"),
    (["--shape=toy", "--out=/nonexistent/x.md"], "there is no folder /nonexistent"),
])
def test_sampling_gpu_refuses_at_once(words, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sampling_gpu, "bandwidths", None)
    with pytest.raises(Mistake, match=said):
        sampling_gpu.main(words)


@pytest.fixture
def tiny(monkeypatch):
    """Toys of 1 layer, so that the scripts run in a second."""
    cfg = ModelConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, n_kv_head=1, head_dim=8,
                      d_ff=16, context=1024)
    monkeypatch.setattr(sampling, "TOY", cfg)
    monkeypatch.setitem(sampling_gpu.SHAPES, "toy", cfg)


def cells(text, title):
    """The numbers of a table's row, as texts."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return row.strip("| ").split(" | ")


def test_sampling_runs_without_trained_models_and_says_so(tiny, tmp_path):
    out = tmp_path / "sampling.md"
    sampling.main(["--init_from=nope", "--ar=nope", "--new_tokens=16", "--rounds=2",
                   f"--out={out}"])
    text = out.read_text()
    assert "block: random weights, for lack of nope; ar: random weights, for lack of nope" in text
    assert "not run on a GPU yet" in text
    assert cells(text, "exact cache")[1:3] == ["16", "1.00"]
    assert cells(text, "text so far")[-1] == "1.00"
    # the ways that must write the same texts did
    assert text.count("2 of 2.") == 4


def test_the_full_canvas_is_computed_in_every_forward(tiny):
    how = Decoding(cache="none")
    recipe = Recipe("block", mask_id=1)
    prompt = list(range(4, 12))
    widths = []

    class Watched(sampling.Transformer):
        def forward(self, tokens, *rest):
            widths.append(tokens.shape[1])
            return super().forward(tokens, *rest)

    model = Watched(sampling.TOY)
    for title in ("full canvas", "text so far"):
        run = sampling.Run(title, model, recipe, sampling.stand_in(64), how, prompt, 8)
        assert run.go_on(3) and not run.go_on(100)
        assert len(run.seconds) == 8 and None not in run.text
    assert widths == [16] * 8 + [12] * 4 + [16] * 4


def test_held_out_pieces_lie_in_one_document_and_hold_no_end(data_folder):
    tok = load_tokenizer(data_folder)
    windows = Windows(data_folder, "val", 72, tok.vocab_size)
    whole = {tuple(windows.window(n)[0]) for n in range(len(windows))}
    pieces = sampling.held_out(data_folder, tok, 72, 5)
    assert pieces.shape == (5, 72) and (pieces != tok.eos_id).all()
    assert (pieces[:, 1:] != tok.bos_id).all()
    assert whole.issuperset(map(tuple, pieces))
    with pytest.raises(Mistake, match="and not 100000: ask for fewer"):
        sampling.held_out(data_folder, tok, 72, 100_000)


def test_quality_counts_forwards_per_text_and_right_tokens(data_folder, tiny, tmp_path):
    tok = load_tokenizer(data_folder)
    model = sampling.random_model(replace(sampling.TOY, vocab_size=tok.vocab_size))
    recipe = Recipe("block", mask_id=tok.mask_id)
    pieces = sampling.held_out(data_folder, tok, 72, 5)
    how = Decoding(eos_penalty=1e6)
    for steps in (4, 2, 1):  # of each block of 4
        speed, _, _ = sampling.score(model, recipe, tok, replace(how, steps=steps), pieces, batch=2)
        assert speed == 4 / steps
    # one right token in 8, in each of these texts
    texts = [[*piece[:-8].tolist(), *[None] * 8] for piece in pieces]
    for step in decode(model, tok, recipe, texts, replace(how, steps=1)):
        write(texts, step)
    wanted = np.array(texts)
    wanted[:, -7:] = tok.bos_id
    expected = (np.array(texts)[:, -8:] == wanted[:, -8:]).mean()
    _, share, error = sampling.score(model, recipe, tok, replace(how, steps=1), wanted)
    assert share == expected and 1 / 8 <= share < 1 and error < 0.1
    path = tmp_path / "plot.png"
    cfg = sampling.Config(data=str(data_folder), prefixes=3)
    lines = sampling.quality(cfg, model, recipe, tok, path)
    assert path.stat().st_size > 1000
    assert cells("\n".join(lines), "left_to_right 1")[1] == "1.00"


def test_sampling_gpu_runs_a_toy_and_its_hook_sets_how_many_drafts_are_right(tiny, tmp_path):
    out = tmp_path / "gpu.md"
    sampling_gpu.main(["--shape=toy", "--batches=(1, 2)", "--forwards=8", f"--out={out}"])
    text = out.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "drafts right" in line]
    per_forward = {row[1]: float(row[4]) for row in rows if row[0] == "2"}
    assert per_forward["verified, 0% of drafts right"] == 1
    assert per_forward["verified, 100% of drafts right"] == 4
    assert 1 < per_forward["verified, 80% of drafts right"] < 4


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_share_of_right_drafts_is_the_one_asked_for(share):
    """Six drafts in each of 20,000 blocks: a standard error of at most 0.0015; 0.02 is allowed."""
    rows = torch.arange(20_000)
    positions = torch.arange(4).repeat(4) + 4 * rows[:, None]
    logits = sampling_gpu.drafts(share)(torch.zeros(20_000, 16, 64), positions, rows)
    token = logits.argmax(-1).unflatten(1, (4, 4))  # (b, part, place)
    right = token == (10 + positions % 50).unflatten(1, (4, 4))
    shown = torch.tensor([0, 1, 2, 3])
    place = torch.arange(4)
    own = shown[:, None] == place
    assert right[:, own].all()
    behind = shown[:, None] < place
    assert abs(right[:, behind].float().mean() - share) < 0.02


def test_the_floor_counts_the_weights_that_a_forward_reads():
    tied = sampling.random_model(sampling.TOY)
    assert sampling_gpu.streamed_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    untied = sampling.random_model(replace(sampling.TOY, tie_embeddings=False))
    assert sampling_gpu.streamed_bytes(untied) == sampling_gpu.streamed_bytes(tied)
    assert min(sampling_gpu.bandwidths("cpu").values()) > 1e8


# --- rl_gpu ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, said", [
    (["--rollouts=0"], "rollouts=0 does not fit: rollouts is an int from 1 to 1,000"),
    (["--recompute=some"], "recompute='some' does not fit"),
    (["--smoke=true", "--data=nope"], "nope"),
    (["--smoke=true", "--tasks=nope.jsonl"], "nope.jsonl"),
    (["--smoke=true", "--out=/nonexistent/x.md"], "there is no folder /nonexistent"),
    ([], "no CUDA device here; --smoke=true"),
])
def test_rl_gpu_refuses_before_it_draws_weights(words, said, data_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rl_gpu, "random_model", None)
    with pytest.raises(Mistake, match=said) as error:
        rl_gpu.main([f"--data={data_folder}", *words])
    assert "\n" not in str(error.value)


def write_tasks(folder):
    """A file of five tasks. Returns its path, a str."""
    names = [f"double_{n}" for n in range(5)]
    tasks = [{"task_id": name, "prompt": f"def {name}(n):\n", "entry_point": name, "test": "",
              "canonical_solution": "    return 2 * n\n", "test_list": [f"assert {name}(2) == 4"]}
             for name in names]
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return str(path)


def test_rl_gpu_makes_rollouts_and_updates_of_a_toy(data_folder, tmp_path, monkeypatch, capsys):
    found = []

    def table(*measured):
        found.extend(measured)
        return whole_table(*measured)

    whole_table = rl_gpu.table
    monkeypatch.setattr(rl_gpu, "table", table)
    rl_gpu.main(["--smoke=true", "--rollouts=1", f"--data={data_folder}",
                 f"--tasks={write_tasks(tmp_path)}"])
    _, [written], updates, _ = found
    assert (written["step"], [update["step"] for update in updates]) == (2, [2, 3])
    assert written["learned"] == 1  # no two answers to a task have the same reward
    assert 0 < written["reward"] < 1.5 and written["solved"] == 0
    assert all(update["grad_norm"] > 0 and update["memory_gb"] > 0 for update in updates)
    text = capsys.readouterr().out
    seconds = [float(cells(text, part)[1]) for part in ("rollout: decoding", "update")]
    assert all(value > 0 for value in seconds)
    assert "8 answers of " in text and "learns from 100% of them, 3 at a time in 3 passes" in text


def test_rl_gpu_as_it_is_leaves_a_tenth_of_80_gb_free(data_folder, tmp_path):
    plans = {}
    for beta in (0.01, 0.0):
        cfg = rl_gpu.Config(beta=beta, data=str(data_folder), tasks=write_tasks(tmp_path))
        asked, _ = configure(rl.Config, rl_gpu.command(cfg, tmp_path)[2:])
        plans[beta] = rl_gpu.planned(asked, rl_gpu.describe(cfg))
    (whole, reference), (without, none) = plans.values()
    assert whole < 72 and none == 0
    assert whole - without == pytest.approx(reference) == 4 * 1.720574976


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.tuples(st.integers(1, 9), st.integers(4, 13)), min_size=1, max_size=4))
def test_rl_gpu_plans_rows_as_long_as_those_of_an_update(texts):
    prompts = [([5] * length, room) for length, room in texts]
    rows = rollout.rows_of(0, list(range(len(texts))), 1, prompts, rl_gpu.K)
    for row in rows:  # as a model writes that never ends
        row.ids = [token or 6 for token in row.ids]
        row.written = [step if step == GIVEN else 0 for step in row.written]
    recipe = Recipe("block", block_size=rl_gpu.K, mask_id=1)
    batch = rollout.stacked(rows, rl_gpu.K, {3}, "cpu")
    passes = passes_of(Estimate("coupled"), batch, recipe, seed=0, step=0)
    xt = torch.stack([one.masked for one in passes]).long()
    computed, _, _ = after_one_clean_text(batch, xt, recipe)
    assert computed.shape == (len(texts), rl_gpu.row_length(prompts, len(passes)))
