"""rl.py: its loss against the equations written once more in float64, its rollouts, a run that is
stopped, resumed and split among processes, and what it refuses.

The model of these runs writes x and y at random; its reward is the share of x, from a file as users
write it.
"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_decoder import EOS, MASK, Tok, random_model
from reference import write_tiny_run
from safetensors.torch import load_file

import caches
import rl
import rollout
from configurator import Mistake
from decode import Decoding, decode
from diffusion import Recipe
from estimators import GIVEN, NEVER, Estimate, log_probs, passes_of
from experiments import shootout, toy_rl
from huggingface import load, write_model
from model import KVCache
from parallel import World
from report import samples_page
from rewards import Reward
from tasks import Task, message
from watch import Trace, order_of

WALL_CLOCK = {"seconds", "rollout_seconds", "update_seconds", "rollout_tokens_per_s",
              "update_tokens_per_s", "memory_gb"}
TINY = ["--prompts=2", "--completions=4", "--max_new_tokens=16", "--decode_batch=8", "--updates=2",
        "--reference_every=4", "--max_steps=6", "--save_every=3", "--micro_batch=3", "--lr=0.02",
        "--min_lr=0.02", "--grad_clip=10", "--beta=0.1", "--passed_weight=0", "--format_weight=0",
        "--threads=1", "--dtype=float32", "--device=cpu", "--check_references=false"]

pytestmark = pytest.mark.usefixtures("handlers_restored")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_folder):
    """A policy, tasks, and a reward of the user's."""
    folder = tmp_path_factory.mktemp("rl")
    model, tok, recipe = load(write_tiny_run(folder / "tiny", data_folder))
    torch.manual_seed(1)
    for p in model.parameters():  # a gradient that is 0 but for rounding would move it by ± lr
        p.data += 0.1 * torch.randn(p.shape)
    (folder / "policy").mkdir()
    write_model(folder / "policy", model, tok, recipe)
    tasks = [{"task_id": f"t/{i}", "prompt": f"def f{i}(n):\n", "entry_point": f"f{i}",
              "canonical_solution": "    return n\n", "test": "",
              "test_list": [f"assert f{i}({n}) == {n}" for n in range(3)]} for i in range(5)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "share_of_x.py").write_text(
        "def reward(task, completion, verdict):\n"
        "    return completion.count('x') / max(1, len(completion))\n")
    return folder


def settings_of(folder, out, *more):
    return [*TINY, f"--init_from={folder / 'policy'}", f"--tasks={folder / 'tasks.jsonl'}",
            f"--reward={folder / 'share_of_x.py'}", f"--out={out}", *map(str, more)]


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def weights(out):
    return load_file(out / (out / "latest").read_text() / "model.safetensors")


# --- the loss -------------------------------------------------------------------------------------

def straight(new, old, reference, scored, rewards, cfg):
    """The loss of a batch and its gradient, by the equations, in Python's floats.

    rewards: (groups, G). Rows whose group has equal rewards are in neither sum nor count.
    Returns a number and a list like `new`.
    """
    loss, count, G = 0.0, 0, len(rewards[0])
    slope = [[0.0] * len(row) for row in new]
    for b in range(len(new)):
        group = rewards[b // G]
        if max(group) == min(group):
            continue
        others = [r for g, r in enumerate(group) if g != b % G]
        A = group[b % G] - sum(others) / (G - 1)
        parts = [[i] for i in range(len(new[b])) if scored[b][i]]  # what one ratio is of
        if cfg.estimator == "sequence" and parts:
            parts = [[i for [i] in parts]]
        for part in parts:
            ratio = math.exp(sum(new[b][i] - old[b][i] for i in part) / len(part))
            drift = sum(reference[b][i] - new[b][i] for i in part) / len(part)
            low = min(max(ratio, 1 - cfg.epsilon), 1 + cfg.epsilon)
            kl, of_kl = math.exp(drift) - 1 - drift, 1 - math.exp(drift)
            if cfg.estimator == "sequence":
                kl, of_kl = drift**2 / 2, -drift
            is_clipped = low * A < ratio * A  # then the gain is a constant
            of_gain = 0.0 if is_clipped else ratio * A
            loss += cfg.beta * kl - min(ratio * A, low * A)
            count += 1
            for i in part:
                slope[b][i] = (cfg.beta * of_kl - of_gain) / len(part)
    return loss / max(1, count), [[x / max(1, count) for x in row] for row in slope]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 4),
       st.sampled_from([1e-6, 0.2, 0.5, 0.999]), st.sampled_from([0.0, 0.01, 10.0]),
       st.sampled_from(["coupled", "sequence"]))
def test_loss_and_gradient_equal_the_equations(seed, groups, G, epsilon, beta, estimator):
    """To 1e-8, the gradient at every token."""
    random = torch.Generator().manual_seed(seed)
    B, T = groups * G, 5
    draw = torch.rand(3, B, T, generator=random, dtype=torch.float64)
    new, old, reference = -3 * draw
    scored = torch.rand(B, T, generator=random) < 0.6
    scored[0] = False  # an empty completion
    rewards = torch.randint(0, 3, (groups, G), generator=random).double()
    rewards[-1] = rewards[-1, 0]  # a group without a difference
    cfg = rl.Config(epsilon=epsilon, beta=beta, estimator=estimator)
    differ = (rewards.amax(1) > rewards.amin(1)).repeat_interleave(G)
    new.requires_grad_(True)
    loss, _, _ = rl.clipped_loss(new[differ], old[differ], reference[differ] if beta else None,
                                 scored[differ], rl.advantages(rewards).flatten()[differ], cfg)
    count = scored[differ].any(1).sum() if estimator == "sequence" else scored[differ].sum()
    loss = loss / max(1, int(count))
    loss.backward()
    wanted, slope = straight(new.tolist(), old.tolist(), reference.tolist(), scored.tolist(),
                             rewards.tolist(), cfg)
    assert loss.item() == pytest.approx(wanted, abs=1e-8)
    slope = torch.tensor(slope, dtype=torch.float64)
    torch.testing.assert_close(new.grad, slope, atol=1e-8, rtol=1e-8)


def test_at_the_rollouts_policy_the_gradient_is_the_policy_gradient():
    """ratio = 1: the gradient of a token is -advantage, clipped or not."""
    new = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    loss, kl, clipped = rl.clipped_loss(new, new.detach(), new.detach(),
                                        torch.ones(4, 3, dtype=torch.bool), advantage, rl.Config())
    loss.backward()
    torch.testing.assert_close(new.grad, -advantage[:, None].expand(4, 3))
    assert kl == 0 and clipped == 0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4))
def test_an_advantage_leaves_its_own_reward_out(groups):
    made = rl.advantages(torch.tensor(groups, dtype=torch.float64))
    for group, row in zip(groups, made.tolist()):
        for g, value in enumerate(row):
            others = group[:g] + group[g + 1:]
            assert value == pytest.approx(group[g] - sum(others) / 2, abs=1e-12)


# --- rollouts -------------------------------------------------------------------------------------

@given(st.integers(0, 2**63 - 1), st.integers(1, 7), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_every_epoch_of_rollouts_visits_every_task_once(seed, prompts, tasks):
    chosen = [task for number in range(2 * tasks)
              for task in rollout.chosen_tasks(seed, number, prompts, tasks)]
    for epoch in range(len(chosen) // tasks):
        assert sorted(chosen[epoch * tasks:(epoch + 1) * tasks]) == list(range(tasks))


def written_rows(recipe, how, batch=3, count=5):
    net = random_model(seed=4, scale=0.25)
    prompts = [([0, 7, 8, 9, 10][:n], 17) for n in (1, 3, 5)]
    rows = rollout.rows_of(2, [0, 1, 2], count, prompts, recipe.causal_block)
    for _ in rollout.write_completions(net, Tok, recipe, how, rows, batch):
        pass
    return rows


BLOCK = Recipe("block", False, 4, mask_id=MASK)
TEXT = Recipe("bidirectional", True, mask_id=MASK)


@pytest.mark.parametrize("recipe", [BLOCK, TEXT])
@pytest.mark.parametrize("confidence", ["entropy", "left_to_right"])
def test_a_row_depends_on_its_number_alone(recipe, confidence):
    how = Decoding(confidence=confidence, temperature=1.0, seed=3)
    alone, together = (written_rows(recipe, how, batch) for batch in (1, 15))
    assert alone == together
    assert len({tuple(map(str, row.ids)) for row in alone}) == 15


@pytest.mark.parametrize("recipe", [BLOCK, TEXT])
def test_what_was_written_when(recipe):
    """Left to right: the n-th token of a noise block at step n. By entropy: each step once."""
    block = recipe.causal_block or 10**6
    for confidence in ("left_to_right", "entropy"):
        for row in written_rows(recipe, Decoding(confidence=confidence, temperature=1.0)):
            assert row.written[:row.prompt] == [GIVEN] * row.prompt
            assert [i is None for i in row.ids] == [when == NEVER for when in row.written]
            of_block = {}
            for i, when in enumerate(row.written):
                if GIVEN < when < NEVER:
                    of_block.setdefault(i // block, []).append(when)
            for steps in of_block.values():
                assert sorted(steps) == list(range(len(steps)))
                assert confidence == "entropy" or steps == sorted(steps)


@pytest.mark.parametrize("recipe, steps", [(BLOCK, 2), (TEXT, 5)])
def test_tokens_of_a_step_are_ordered_as_watch_orders_them(recipe, steps):
    net, how = random_model(seed=4, scale=0.25), Decoding(steps=steps, temperature=1.0)
    prompts = [([0, 7, 8, 9, 10][:n], 17) for n in (1, 3, 5)]
    rows = rollout.rows_of(2, [0, 1, 2], 1, prompts, recipe.causal_block)
    texts = [list(row.ids) for row in rows]
    trace = Trace(texts, Tok)
    for _ in trace.record(decode(net, Tok, recipe, texts, how, [row.number for row in rows])):
        pass
    list(rollout.write_completions(net, Tok, recipe, how, rows, 3))
    assert [row.order for row in rows] == [order_of(trace, i) for i in range(3)]
    assert any(a > b for row in rows for a, b in zip(row.order, row.order[1:]))


def test_verified_rollouts_are_left_to_right_ones():
    one = written_rows(BLOCK, Decoding(confidence="left_to_right", temperature=1.0))
    fast = written_rows(BLOCK, Decoding(verified=True, temperature=1.0))
    assert [(row.ids, row.written) for row in fast] == [(row.ids, row.written) for row in one]
    assert sum(row.forwards for row in fast) < sum(row.forwards for row in one)


@pytest.mark.parametrize("recipe", [BLOCK, TEXT])
def test_stacked_rows_are_what_the_estimators_read(recipe):
    rows = written_rows(recipe, Decoding(confidence="entropy", temperature=1.0))
    made = rollout.stacked(rows, recipe.causal_block, Tok.stop_ids, "cpu")
    for b, row in enumerate(rows):
        end, length = row.end(Tok.stop_ids), int(made.doc_end[b, 0])
        assert made.scored[b].nonzero()[:, 0].tolist() == list(range(row.prompt, end))
        assert all(i not in Tok.stop_ids for i in row.ids[row.prompt:end - 1])
        assert length == (len(row.ids) if recipe is TEXT else -(-end // 4) * 4)
        assert made.doc_end[b].tolist() == [length] * length + [0] * (made.tokens.shape[1] - length)
        assert made.written[b, :length].tolist() == row.written[:length]
    net = random_model(seed=4, scale=0.25)
    passes = passes_of(Estimate("trace"), made, recipe, 0, 0)
    together = log_probs(net, made, passes, recipe, 1.0, torch.tensor([MASK]))
    for b in (0, 7):  # padding changes nothing
        alone = rollout.stacked([rows[b]], recipe.causal_block, Tok.stop_ids, "cpu")
        passes = passes_of(Estimate("trace"), alone, recipe, 0, 0)
        single = log_probs(net, alone, passes, recipe, 1.0, torch.tensor([MASK]))
        torch.testing.assert_close(together[b, :single.shape[1]], single[0], atol=1e-5, rtol=1e-5)


def test_an_idle_row_has_nothing_to_learn_from():
    row = rollout.Row(3, 0, [7, 8, EOS, None], [GIVEN, 0, 1, NEVER], 1)
    made = rollout.stacked([row.idle()], 4, {EOS}, "cpu")
    assert not made.scored.any() and not made.completion.any()
    assert row.end({EOS}) == 3 and row.idle().order == []


# --- runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("estimator", [
    "coupled", *(pytest.param(name, marks=pytest.mark.slow)
                 for name in ("masked", "independent", "sequence", "trace"))])
def test_a_policy_learns_what_is_rewarded(folder, tmp_path, estimator):
    """The share of x, below 30 % at first, is above 80 % after twenty rollouts of 32 answers."""
    rl.main(settings_of(folder, tmp_path / "run", f"--estimator={estimator}", "--max_steps=20",
                        "--updates=1", "--completions=16", "--micro_batch=32", "--decode_batch=32",
                        "--beta=0", "--lr=0.05", "--min_lr=0.01", "--save_every=99"))
    rewards = [line["reward"] for line in metrics(tmp_path / "run") if "reward" in line]
    assert rewards[0] < 0.3 and rewards[-1] > 0.8


def test_a_run_that_is_stopped_and_resumed_gives_the_same_bits(folder, tmp_path):
    """Also in the middle of a rollout: three steps are one and a half. The rollout after it is
    compared with the reference that was saved."""
    more = ["--reference_every=6", "--max_steps=8"]
    rl.main(settings_of(folder, tmp_path / "whole", *more))
    rl.main(settings_of(folder, tmp_path / "parts", *more, "--max_steps=3"))
    assert (tmp_path / "parts" / "step_0000003" / "state" / "rollout.json").is_file()
    rl.main(settings_of(folder, tmp_path / "parts", *more, "--resume=true"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, whole[name]), name
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "parts")]
    assert samples[0] == samples[1] and samples[0].count("\n") == 4 * 8


def test_a_run_killed_anywhere_and_resumed_gives_the_same_bits(folder, tmp_path):
    rl.main(settings_of(folder, tmp_path / "whole"))
    command = [sys.executable, "rl.py", *settings_of(folder, tmp_path / "killed")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "killed" / "metrics.jsonl"
    while run.poll() is None and not (file.exists() and file.read_text().count("\n") >= 7):
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    rl.main(settings_of(folder, tmp_path / "killed", "--resume=true"))
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("whole", "killed")]
    assert samples[0] == samples[1]


def test_rollouts_are_written_in_the_dtype_of_the_updates(folder, tmp_path, monkeypatch):
    found = []

    class Seen(KVCache):
        def __init__(self, model, *shape):
            super().__init__(model, *shape)
            found.append(self.k.dtype)

    monkeypatch.setattr(caches, "KVCache", Seen)
    monkeypatch.setattr("run.fast_dtype", lambda device: "bfloat16")
    for asked, dtype in (("float32", torch.float32), ("auto", torch.bfloat16)):
        rl.main(settings_of(folder, tmp_path / asked, "--max_steps=2", f"--dtype={asked}"))
        assert set(found) == {dtype}
        found.clear()


def test_the_old_policy_is_the_one_that_wrote_under_the_masks_of_the_update(
        folder, tmp_path, monkeypatch):
    """Of two updates, the second compares the policy that moved with the one before. Both masks are
    those of its step; with one rollout, the reference is the policy that wrote, too."""
    seen, clipped_loss = [], rl.clipped_loss

    def watched(new, old, reference, *rest):
        seen.append((new.detach(), old, reference))
        return clipped_loss(new, old, reference, *rest)

    monkeypatch.setattr(rl, "clipped_loss", watched)
    rl.main(settings_of(folder, tmp_path / "run", "--max_steps=2", "--micro_batch=99"))
    (first, before, against), (second, old, reference) = seen
    assert torch.equal(first, before)
    torch.testing.assert_close(before, against)
    torch.testing.assert_close(old, reference)
    assert (second - old).abs().max() > 1e-3 and (old - before).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["coupled", *(pytest.param(name, marks=pytest.mark.slow)
                                                    for name in ("sequence", "trace"))])
def test_two_processes_give_what_one_gives(folder, tmp_path, estimator):
    """To 1e-5, in float32. Of five rows a process has three, the other two and one that is idle,
    alone in its micro-batch."""
    more = [f"--estimator={estimator}", "--lr=0.001", "--min_lr=0.001", "--prompts=1",
            "--completions=5", "--micro_batch=2"]
    rl.main(settings_of(folder, tmp_path / "one", *more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "rl.py", *settings_of(folder, tmp_path / "two", *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    samples = [(tmp_path / run / "samples.jsonl").read_text() for run in ("one", "two")]
    assert samples[0] == samples[1]
    assert [line["learned"] for line in metrics(tmp_path / "one") if "learned" in line] == [1, 1, 1]
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, abs=1e-5, nan_ok=True)
    one, two = (weights(tmp_path / run) for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_processes_without_an_answer_wait_for_the_others(folder, tmp_path):
    """Two answers on three processes: the first has none, to write or to learn from."""
    more = ["--lr=0.001", "--min_lr=0.001", "--prompts=1", "--completions=2", "--max_steps=2"]
    rl.main(settings_of(folder, tmp_path / "one", *more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
               "rl.py", *settings_of(folder, tmp_path / "three", *more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "three"), strict=True):
        assert b == pytest.approx(a, abs=1e-5, nan_ok=True)
    [rollout_line] = [json.loads(line) for line in (tmp_path / "three" / "metrics.jsonl").open()
                      if "rollout_seconds" in line]
    seconds = rollout_line["length"] * 2 / rollout_line["rollout_tokens_per_s"]
    assert seconds <= rollout_line["rollout_seconds"]


def test_the_seconds_of_a_rollout_are_those_of_the_slowest_process():
    world = World(0, 1, torch.device("cpu"))
    world.gather = lambda items: [*items, 60.0] if items else []
    policy = rl.Policy(None, None, None, world, nullcontext, None)
    cfg = SimpleNamespace(reshard=True, decode_batch=1, answer_prefix="")
    _, seconds = rl.write_and_judge([], Decoding(), policy, cfg, [], SimpleNamespace(collect=dict))
    assert seconds == 60


def test_a_model_without_blocks_learns_from_messages(data_folder, folder, tmp_path):
    """The kind of run that config/diffucoder_7b_rl.py is, with evaluations; stopped and resumed."""
    policy = write_tiny_run(tmp_path / "tiny", data_folder, 512, objective="bidirectional",
                            shift=True)
    (policy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
    more = [f"--init_from={policy}", "--style=instruct", "--answer_prefix=x = ", "--max_steps=4",
            f"--val_tasks={folder / 'tasks.jsonl'}", "--eval_every=1", "--max_new_tokens=6",
            "--top_p=0.95", "--limit=2"]
    rl.main(settings_of(folder, tmp_path / "whole", *more))
    rl.main(settings_of(folder, tmp_path / "parts", *more, "--max_steps=3"))
    rl.main(settings_of(folder, tmp_path / "parts", *more, "--resume=true"))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, whole[name]), name
    sample = json.loads((tmp_path / "whole" / "samples.jsonl").open().readline())
    assert sample["answer"].startswith("x = ")
    assert "Please provide" in (tmp_path / "whole" / "samples.html").read_text()


def test_the_tokens_of_an_update_are_tokens_whatever_its_loss_counts(folder, tmp_path):
    counts = []
    for estimator in ("coupled", "sequence", "trace"):
        out = tmp_path / estimator
        rl.main(settings_of(folder, out, f"--estimator={estimator}", "--max_steps=1",
                            "--updates=1", "--beta=0"))
        written, update = metrics(out)
        assert written["learned"] == 1
        counts.append((update["tokens"], written["length"] * 8))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == round(counts[0][1])


def test_groups_without_a_difference_are_left_out(folder, tmp_path):
    """The published reward, which no answer of this model gets: nothing is learned, and said."""
    rl.main(settings_of(folder, tmp_path / "run", "--passed_weight=2", "--format_weight=0.5",
                        "--reward=", "--max_steps=2"))
    lines = metrics(tmp_path / "run")
    assert lines[0]["learned"] == 0
    for name in ("grad_norm", "loss", "kl", "clip_fraction"):
        assert lines[1][name] is None
    before = load_file(folder / "policy" / "model.safetensors")
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, before[name])


def test_a_signal_leaves_a_checkpoint(folder, tmp_path):
    command = [sys.executable, "rl.py", *settings_of(folder, tmp_path / "run", "--max_steps=500")]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    file = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and not (file.exists() and file.read_text().count("\n") >= 2):
        pass
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 130 and "--resume=true continues" in said
    assert (tmp_path / "run" / "latest").is_file()


# --- what is refused ------------------------------------------------------------------------------

MISTAKES = {
    "completions=1 leaves nothing to compare an answer with": ["--completions=1"],
    "epsilon=0 does not fit: epsilon is a float from 1e-06 to 0.999": ["--epsilon=0"],
    "epsilon=-0.1 does not fit: epsilon is a float": ["--epsilon=-0.1"],
    "reference_every=4 must be a multiple of updates=3": ["--updates=3"],
    "min_lr=1 is above lr=0.02": ["--min_lr=1"],
    "t_low=0.9 is above t_high=0.8": ["--t_low=0.9"],
    "confidence='entropy' does not fit verified": ["--verified=true"],
    "steps and verified each say how many": ["--verified=true", "--steps=2"],
    "temperature=0 does not fit": ["--temperature=0"],
    "answer_prefix is for --style=instruct": ["--answer_prefix=x"],
    "nowhere.jsonl is missing": ["--tasks=nowhere.jsonl"],
    "nowhere.py is missing": ["--reward=nowhere.py"],
    "no checkpoint in nowhere: it has neither": ["--init_from=nowhere"],
    "5 of 5 tasks leave no room for an answer": ["--max_new_tokens=1", "--block_size=16"],
}


def refused(folder, out, *more):
    """The one sentence that a run is refused with, before its folder is made."""
    with pytest.raises((Mistake, OSError)) as raised:
        rl.main(settings_of(folder, out, *more))
    assert "\n" not in str(raised.value) and not (out / "lock").exists()
    return str(raised.value)


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_sentence(folder, tmp_path, said):
    assert said in refused(folder, tmp_path / "run", *MISTAKES[said])


def test_tasks_that_cannot_be_learned_from_are_refused(folder, tmp_path):
    lines = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(line | {"test_list": []}) + "\n" for line in lines))
    assert "line 1 of " in (said := refused(folder, tmp_path / "run", f"--tasks={file}"))
    assert said.endswith("has no tests: neither a test nor a test_list")
    wrong = {"canonical_solution": "    return n + 1\n"}
    file.write_text("".join(json.dumps(line | wrong) + "\n" for line in lines))
    said = refused(folder, tmp_path / "run", f"--tasks={file}", "--check_references=true")
    assert "t/0 and 4 more: the reference fails the tests (failed: " in said


def test_a_machine_that_cannot_contain_programs_is_refused(folder, tmp_path, monkeypatch):
    def nothing_here(*args):
        raise Mistake("programs cannot be isolated here (no network namespace)")

    monkeypatch.setattr("evaluate.Sandbox", nothing_here)
    assert refused(folder, tmp_path / "run").startswith("programs cannot be isolated here")


def test_a_machine_without_memory_for_the_reference_is_refused(folder, tmp_path, monkeypatch):
    model, _, _ = load(folder / "policy")
    parameters = sum(p.numel() for p in model.parameters())
    machine = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 18 * parameters}  # 16 bytes each, 4 for its copy
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: machine.get(name) or real(name))
    said = refused(folder, tmp_path / "run")
    assert "for its weights, reference, gradients and optimizer state" in said
    assert said.endswith("--optimizer=adafactor or --beta=0 needs less")
    rl.main(settings_of(folder, tmp_path / "run", "--beta=0", "--max_steps=1"))


def test_a_checkpoint_of_another_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "policy")
    path = tmp_path / "policy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 9}))
    said = refused(folder, tmp_path / "run", f"--init_from={tmp_path / 'policy'}")
    assert "its tokenizer has " in said and said.endswith(" ids, its model only 9")


def test_the_folder_of_an_evaluation_is_refused(folder, tmp_path):
    for name in ("settings.json", "samples.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert "holds the samples of evaluate.py" in refused(folder, tmp_path)
    assert (tmp_path / "samples.jsonl").read_text() == "{}\n"


def test_tasks_without_room_are_left_out_and_said(folder, tmp_path, capsys):
    lines = (folder / "tasks.jsonl").read_text().splitlines()
    long = json.loads(lines[0]) | {"task_id": "long", "prompt": "x" * 9999 + "\ndef f0(n):\n"}
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join([json.dumps(long), *lines]) + "\n")
    rl.main(settings_of(folder, tmp_path / "run", f"--tasks={file}", "--max_steps=2"))
    assert "1 of 6 tasks leave no room for an answer" in capsys.readouterr().out


@pytest.mark.parametrize("more, said", [
    (["--confidence=max_prob"], "how likely the order was is left out"),
    (["--top_p=0.9"], "a narrower distribution"), ([], "")])
def test_what_trace_leaves_out_is_said(folder, tmp_path, capsys, more, said):
    rl.main(settings_of(folder, tmp_path / "run", "--max_steps=2", "--estimator=trace", *more))
    out = capsys.readouterr().out
    assert said in out and ("estimator='trace'" in out) == bool(said)


def test_long_prompts_are_left_out_where_that_is_asked_for(folder, tmp_path, capsys):
    lines = (folder / "tasks.jsonl").read_text().splitlines()
    long = json.loads(lines[0]) | {"task_id": "long", "prompt": "x = 'x'\n\ndef f0(n):\n"}
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join([*lines, json.dumps(long)]))
    more = [f"--tasks={file}", f"--val_tasks={file}", "--eval_every=0", "--max_steps=1"]
    longest = max(len(load(folder / "policy")[1].encode(json.loads(line)["prompt"])) + 1
                  for line in lines)
    rl.main(settings_of(folder, tmp_path / "run", *more, f"--max_prompt_tokens={longest}"))
    said = f"1 of 6 tasks .*, or have more than max_prompt_tokens={longest}, and are left out"
    assert len(re.findall(said, capsys.readouterr().out)) == 1  # evaluations keep them
    rl.main(settings_of(folder, tmp_path / "all", *more))
    assert "left out" not in capsys.readouterr().out
    said = refused(folder, tmp_path / "none", *more, "--max_prompt_tokens=1")
    assert said.startswith("6 of 6 tasks") and said.endswith("or --max_prompt_tokens")


@pytest.mark.slow
def test_what_fails_on_one_process_ends_all_in_a_sentence(folder, tmp_path):
    """A reward that raises on the second: the first must not wait for it."""
    file = tmp_path / "fails.py"
    file.write_text("import os\n\ndef reward(task, completion, verdict):\n"
                    "    return 1 / (os.environ['RANK'] == '0')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "rl.py", *settings_of(folder, tmp_path / "run", f"--reward={file}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert "DistBackendError" not in done.stderr and "Connection closed" not in done.stderr


def test_a_page_shows_what_was_asked():
    task = Task("t/1", "PROMPT", "f", tests=("assert f()",))
    line = {"step": 0, "rollout": 0, "row": 3, "answer": "prefix and answer", "advantage": 0.5,
            **vars(Reward(1.0, 0.5, 1.0, 0.0, "passed", ""))}
    asked = json.dumps(message(task)).strip('"')
    assert asked in samples_page([line], [task], "instruct")
    assert asked not in samples_page([line], [task], "base")


def test_resuming_refuses_other_masks_or_tasks(folder, tmp_path):
    rl.main(settings_of(folder, tmp_path / "run", "--max_steps=2"))
    with pytest.raises(Mistake, match="completions=5"):
        rl.main(settings_of(folder, tmp_path / "run", "--resume=true", "--completions=5"))
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "tasks.jsonl").read_text().replace("t/3", "t/33"))
    with pytest.raises(Mistake, match="prepared anew"):
        rl.main(settings_of(folder, tmp_path / "run", "--resume=true", f"--tasks={other}"))
    with pytest.raises(Mistake, match="reward=.* is not the function"):
        rl.main(settings_of(folder, tmp_path / "run", "--resume=true", "--reward="))


def test_a_reference_that_was_not_saved_is_missed_in_a_sentence(folder, tmp_path):
    rl.main(settings_of(folder, tmp_path / "run", "--max_steps=2", "--beta=0"))
    with pytest.raises(Mistake, match="beta=0.1 needs a reference, and .* without one"):
        rl.main(settings_of(folder, tmp_path / "run", "--resume=true"))


def test_a_damaged_rollout_is_named(folder, tmp_path):
    rl.main(settings_of(folder, tmp_path / "run", "--max_steps=3"))
    path = tmp_path / "run" / "step_0000003" / "state" / "rollout.json"
    whole = json.loads(path.read_text())
    cut = [json.dumps(whole | {name: whole[name][1:]}) for name in
           ("rewards", "learned", "advantage", "old", "reference")]
    beyond = json.dumps(whole | {"learned": [8, *whole["learned"][1:]]})
    for text in ("{", "[]", '{"number": 1}', '{"rows": [3], "rewards": []}', *cut, beyond):
        path.write_text(text)
        with pytest.raises(Mistake, match="rollout.json"):
            rl.main(settings_of(folder, tmp_path / "run", "--resume=true"))


# --- experiments ----------------------------------------------------------------------------------

@pytest.fixture
def config(folder, tmp_path):
    """A config file of the tiny settings, with an evaluation at the end."""
    words = [*settings_of(folder, ""), f"--val_tasks={folder / 'tasks.jsonl'}"]
    settings = [word.removeprefix("--").split("=", 1) for word in words]
    lines = ["check_references = False"]
    for name, value in settings:
        if name not in ("out", "threads", "check_references"):
            lines.append(f"{name} = {value if value[0].isdigit() else repr(value)}")
    path = tmp_path / "tiny.py"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_the_report_of_a_toy_run_has_what_its_runs_measured(folder, config, tmp_path):
    tasks, report = folder / "tasks.jsonl", tmp_path / "report.md"
    toy_rl.main([f"--config={config}", f"--init_from=(\"{folder / 'policy'}\",)", "--seeds=(1, 2)",
                 f"--out={tmp_path / 'runs'}", f"--tasks={tasks}", f"--easier={tasks}",
                 "--max_new_tokens=16", "--steps=(4, 1)", f"--report={report}"])
    text = report.read_text()
    for line in ("pass@1, forwards per block: 4", "local AR-ness@1, temperature 1"):
        assert re.search(rf"\| {re.escape(line)} (\| \d+.\d% → \d+.\d% ){{3}}\|", text), text
    assert toy_rl.steps_done(tmp_path / "runs" / "seed_2") == 6
    with pytest.raises(Mistake, match="seed_1 has a run with max_steps=6, where max_steps=7"):
        toy_rl.learn({tmp_path / "runs" / "seed_1": [str(config), "--seed=1", "--max_steps=7",
                                                     f"--init_from={folder / 'policy'}"]}, 1)
    assert report.with_suffix(".png").is_file()


@pytest.mark.slow
def test_a_shoot_out_spends_its_budget(folder, config, tmp_path):
    """A rollout costs K + 1 for writing, and 4 per pass."""
    report, K = tmp_path / "report.md", load(folder / "policy")[2].block_size
    shootout.main([f"--config={config}", f"--init_from={folder / 'policy'}", "--seeds=(1,)",
                   f"--out={tmp_path / 'runs'}", "--budget=50", f"--report={report}",
                   f"--tasks={folder / 'tasks.jsonl'}", "--completions=5"])
    passes = {"masked": 1, "coupled": 3, "independent": 3, "sequence": 2, "trace": K}
    for name, count in passes.items():
        steps = max(1, round(50 / (K + 1 + 4 * count)))
        lines = toy_rl.metrics(tmp_path / "runs" / f"{name}_1")
        assert sum("update_seconds" in line for line in lines) == steps
        after = [line["val_pass@1"] for line in lines if "val_pass@1" in line][-1]
        assert re.search(rf"\| {name} \| {count} \| {steps} .*\| {after:.1%} \|",
                         report.read_text())
    assert report.with_suffix(".png").is_file()


def test_a_run_that_fails_shows_the_end_of_what_it_printed(tmp_path):
    with pytest.raises(Mistake, match="run in .* failed: .*completions=1 leaves nothing"):
        toy_rl.learn({str(tmp_path / "run"): ["--completions=1"]}, 2)


@pytest.mark.parametrize("words, says", [
    (["--init_from=('a', 'b')"], "must be one folder, or one for each of the seeds"),
    (["--steps=(0,)"], "steps=.* must be whole numbers above 0"),
    (["--seeds=()"], "seeds=.* must be whole numbers, one at least, and none twice"),
    (["--seeds=(1, 1)"], "seeds=.* and none twice"),
])
def test_experiments_refuse_at_once(words, says):
    with pytest.raises(Mistake, match=says):
        toy_rl.main(words)
