"""parallel.py and train.py under torchrun: the same numbers on any number of processes, whatever
ends some of them.

One launch of tests/ranks.py runs many jobs in one process group; a launch of its own has only what
ends a process. The fixtures are expensive: the whole file runs on one worker.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_train import OBJECTIVES, TINY, metrics, train, weights
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import huggingface
import parallel
from configurator import Mistake
from diffusion import Recipe
from files import write_json
from model import ModelConfig, Transformer
from optimizers import Adafactor, Muon, orthogonalized

STEPS = ["--max_steps=10", "--eval_every=10", "--save_every=99", "--dtype=float32",
         "--micro_batch=8"]

# what is learned, on one process: the numbers that every split of the work must give
RUNS = {
    **OBJECTIVES,
    "block": [*OBJECTIVES["block"], "--u_warmup_steps=4", "--save_every=5"],
    "adafactor": ["--optimizer=adafactor", "--n_layer=1", "--tie_embeddings=false"],
    # 2 rows of k_proj for up to 4 processes, 45 of gate_proj, 331 of a head of its own,
    # norms of 30, biases
    "uneven": ["--optimizer=adafactor", "--n_layer=1", "--head_dim=2", "--n_head=3",
               "--n_kv_head=1", "--d_model=30", "--d_ff=45", "--vocab_size=331",
               "--tie_embeddings=false", "--qkv_bias=true"],
    "clipped": ["--objective=ar", "--grad_clip=0.1", "--qk_norm=true"],
}

# (processes, run, how it is split); a process has 8 rows a step over the number of processes.
# Four processes split `block` too, when they continue what two have saved.
SPLITS = [
    (2, "ar", ""),
    (2, "ar", "--micro_batch=3 --recompute=selective --reduce_each=true"),
    (2, "block", "--recompute=full --reshard=false"),
    (2, "block", "--micro_batch=1"),
    (2, "bidirectional", "--micro_batch=3 --recompute=selective --reshard=false"),
    (2, "ar_diffusion", "--micro_batch=3 --recompute=full"),
    (2, "adafactor", "--micro_batch=3 --reshard=false"),
    (2, "clipped", "--micro_batch=2"),
    (4, "ar", "--micro_batch=1 --shard_ranks=2 --recompute=selective"),
    (4, "bidirectional", "--shard_ranks=2 --recompute=full --reshard=false"),
    (4, "ar_diffusion", "--micro_batch=1 --shard_ranks=2 --reduce_each=true"),
    (4, "uneven", "--micro_batch=1"),
]

# long enough to be interrupted
LONG = ["--max_steps=60", "--eval_every=20", "--save_every=20", "--keep=99", "--dtype=float32"]
# one file, several tensors per file, nearly every tensor in its own
FILE_SIZES = [5 * 10**9, 40_000, 5_000]
ADAFACTOR = [{"relative": True, "lr": 0.5, "weight_decay": 0.1},
             {"relative": False, "lr": 0.01, "weight_decay": 0.1}]


def split_name(ranks, run, more):
    more = more.replace("--", "").replace("=true", "")
    return f"{ranks} {run} {more}".strip().replace(" ", "-")


STARTED = []


@pytest.fixture(autouse=True)
def no_launch_outlives_its_test():
    yield
    while STARTED:
        if (run := STARTED.pop()).poll() is None:
            run.terminate()
            run.communicate(timeout=60)


def launch(ranks, *script, torchrun=(), **kwargs):
    """Start `torchrun`, on a free port; stdout and stderr of the processes come out of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", *torchrun, *map(str, script)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)
    STARTED.append(run)
    return run


def launch_train(ranks, data, out, *more, **kwargs):
    return launch(ranks, "train.py", *TINY, f"--data={data}", f"--out={out}", *more, **kwargs)


def run_jobs(ranks, jobs, folder):
    """{name: one result of ranks.py per process}. jobs: {name: [function of ranks.py, arguments
    …]}."""
    file = folder / f"jobs_{ranks}.json"
    file.write_text(json.dumps(list(jobs.values()), default=str))  # paths become texts
    run = launch(ranks, "tests/ranks.py", file)
    _, errors = run.communicate(timeout=1800)
    assert run.returncode == 0, errors
    results = [json.loads((folder / f"jobs_{ranks}.json.{r}").read_text()) for r in range(ranks)]
    return dict(zip(jobs, zip(*results, strict=True), strict=True))


def same_numbers(out, reference):
    """The same metrics to 1e-5: float32 sums in another order, let grow for 10 steps. What is
    counted is exactly equal."""
    found, wanted = metrics(out), metrics(reference)
    assert [m["step"] for m in found] == [m["step"] for m in wanted]
    for a, b in zip(found, wanted):
        assert a == pytest.approx(b, rel=1e-5) and a.keys() == b.keys()
        for key in {"lr", "mask_rate", "tokens", "u_max", "val_tokens", "val_bytes"} & a.keys():
            assert a[key] == b[key]


# --- one launch per number of processes -----------------------------------------------------------

@pytest.fixture(scope="module")
def runs(data_folder, tmp_path_factory):
    """A folder of runs on one process, in this one."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in RUNS.items():
        train(data_folder, folder / name, *STEPS, *more)
    return folder


def splits_of(ranks, data, folder):
    jobs = {}
    for split in SPLITS:
        if split[0] == ranks:
            name = split_name(*split)
            more = [*STEPS, *RUNS[split[1]], *split[2].split()]
            jobs[name] = ["train", data, folder / name, *more]
    return jobs


def jobs_of_any_number(ranks, copies, folder):
    """Weights in files of several sizes, and Adafactor."""
    jobs = {}
    for size in FILE_SIZES:
        out = folder / f"by {ranks} in files of {size}"
        jobs[f"files of {size}"] = ["rewrite", folder / "block", out, size]
    for n, kwargs in enumerate(ADAFACTOR):
        jobs[f"adafactor {n}"] = ["adafactor", copies, kwargs]
    jobs["muon"] = ["muon", copies]
    return jobs


@pytest.fixture(scope="module")
def two(data_folder, runs):
    """What two processes did: {job: its results}. Runs are beside those of one process."""
    shutil.copytree(runs / "block", runs / "saved by 1, resumed by 2")
    (runs / "saved by 1, resumed by 2" / "latest").write_text("step_0000005")
    resume = [*STEPS, *RUNS["block"], "--resume=true"]
    saved = runs / split_name(2, "block", "--micro_batch=1")
    return run_jobs(2, {
        **splits_of(2, data_folder, runs),
        "resumed by 2": ["train", data_folder, runs / "saved by 1, resumed by 2", *resume],
        "for 1": ["rewind", saved, runs / "saved by 2, resumed by 1", 5],
        "for 4": ["rewind", saved, runs / "saved by 2, resumed by 4", 5],
        "for 2": ["rewind", saved, runs / "saved by 2, resumed by 2", 5],
        "2 continue": ["train", data_folder, runs / "saved by 2, resumed by 2", *resume,
                       "--micro_batch=1"],
        "undisturbed": ["train", data_folder, runs / "undisturbed", *LONG,
                        f"--init_from={runs / 'ar'}"],
        **jobs_of_any_number(2, 1, runs),
        "9 rows": ["train", data_folder, runs / "nine rows", "--batch_tokens=288"],
        "full disk": ["full_disk", 1, 9000, data_folder, runs / "saved by 2, resumed by 1",
                      *resume],
    }, runs)


@pytest.fixture(scope="module")
def four(data_folder, runs, two):
    """What four processes did, as `two`."""
    resume = [*STEPS, *RUNS["block"], "--resume=true"]
    return run_jobs(4, {
        **splits_of(4, data_folder, runs),
        "resumed by 4": ["train", data_folder, runs / "saved by 2, resumed by 4", *resume,
                         "--micro_batch=1"],
        **jobs_of_any_number(4, 2, runs),
        "1 row": ["train", data_folder, runs / "one row", "--batch_tokens=32"],
    }, runs)


def returned(results):
    """What jobs returned; their error if they have one."""
    assert all("returned" in r for r in results), results
    return [r["returned"] for r in results]


@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def several(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("split", [
    pytest.param(s, id=split_name(*s), marks=[pytest.mark.slow] if s[0] == 4 else [])
    for s in SPLITS])
def test_any_split_of_the_work_gives_the_numbers_of_one_process(request, runs, split):
    name = split_name(*split)
    returned(request.getfixturevalue({2: "two", 4: "four"}[split[0]])[name])
    same_numbers(runs / name, runs / split[1])


@pytest.mark.slow
def test_every_way_to_split_the_work_gives_the_numbers_of_one_process(data_folder, runs, tmp_path):
    """All combinations, 10 steps of each objective's."""
    short = ["--max_steps=10", "--eval_every=5", "--dtype=float32", "--save_every=99",
             "--micro_batch=8"]
    for objective in OBJECTIVES:
        train(data_folder, tmp_path / objective, *short, *OBJECTIVES[objective])
    for ranks in (2, 4):
        jobs = {}
        for n, way in enumerate(ways_to_split(ranks)):
            for m, objective in enumerate(OBJECTIVES):
                if (n + m) % 2 == 0:
                    name = f"{ranks} {objective} {way}"
                    jobs[name] = ["train", data_folder, tmp_path / name, *short,
                                  *OBJECTIVES[objective], *way.split()]
        for name, results in run_jobs(ranks, jobs, tmp_path).items():
            returned(results)
            same_numbers(tmp_path / name, tmp_path / name.split()[1])


def ways_to_split(ranks):
    """All combinations of the settings that split the work, as texts."""
    ways = product((1, 8), ("none", "selective", "full"), ("true", "false"), ("true", "false"),
                   (0, 2))
    for micro, recompute, reshard, each, share in ways:
        if share < ranks and (each == "false" or micro == 1):
            yield (f"--micro_batch={micro} --recompute={recompute} --reshard={reshard} "
                   f"--reduce_each={each} --shard_ranks={share}")


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_on_several_processes(data_folder, runs, tmp_path):
    jobs = {}
    for recompute, objective in (("none", "block"), ("selective", "ar"),
                                 ("full", "bidirectional")):
        name = f"{recompute} {objective}"
        jobs[name] = ["train", data_folder, tmp_path / name, *STEPS, "--micro_batch=3",
                      "--compile=true", f"--recompute={recompute}", *RUNS[objective]]
    for name, results in run_jobs(2, jobs, tmp_path).items():
        returned(results)
        same_numbers(tmp_path / name, runs / name.split()[1])


# --- saved by some, read by others ----------------------------------------------------------------

def test_a_run_continues_with_another_number_of_processes(data_folder, runs, two):
    train(data_folder, runs / "saved by 2, resumed by 1", *STEPS, *RUNS["block"], "--resume=true")
    returned(two["resumed by 2"])
    for name in ("saved by 1, resumed by 2", "saved by 2, resumed by 1"):
        same_numbers(runs / name, runs / "block")


@pytest.mark.slow
def test_a_run_continues_with_twice_as_many_processes(runs, four):
    returned(four["resumed by 4"])
    same_numbers(runs / "saved by 2, resumed by 4", runs / "block")


def test_a_run_that_continues_with_as_many_processes_gives_the_same_bits(runs, two):
    returned(two["2 continue"])
    undisturbed = runs / split_name(2, "block", "--micro_batch=1")
    assert metrics(runs / "saved by 2, resumed by 2") == metrics(undisturbed)
    assert weights(runs / "saved by 2, resumed by 2") == weights(undisturbed)


def tensor_bytes(path):
    """Bytes of all tensors in a file, as float32."""
    return sum(v.numel() for v in load_file(path).values()) * 4


def test_weights_are_the_same_in_however_many_files(runs, two):
    wanted = load_file(huggingface.find(runs / "block") / "model.safetensors")
    for size in FILE_SIZES:
        returned(two[f"files of {size}"])
        by_2 = runs / f"by 2 in files of {size}"
        files = [p for p in by_2.iterdir() if p.suffix == ".safetensors"]
        largest = max(v.numel() for v in wanted.values()) * 4
        assert all(tensor_bytes(p) <= max(size, largest) for p in files)
        written = {k: v for p in files for k, v in load_file(p).items()}
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[k], wanted[k]) for k in wanted)
        model, _, _ = huggingface.load(by_2)
        for name, p in model.named_parameters():
            assert torch.equal(p, wanted[huggingface.tensor_name(name)])
    assert len(files) > 10


@pytest.mark.slow
def test_weights_are_the_same_whoever_writes_them(runs, two, four):
    for size in FILE_SIZES:
        returned(two[f"files of {size}"] + four[f"files of {size}"])
        by_2, by_4 = (runs / f"by {n} in files of {size}" for n in (2, 4))
        names = sorted(p.name for p in by_2.iterdir())
        assert names == sorted(p.name for p in by_4.iterdir())
        for name in names:
            assert (by_2 / name).read_bytes() == (by_4 / name).read_bytes()


# --- processes that die, or are asked to leave ----------------------------------------------------

needs_proc = pytest.mark.skipif(sys.platform != "linux",
                                reason="finds the processes that torchrun started in /proc")


def lines_of(out):
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(run, condition):
    until = time.time() + 120
    while not condition():
        assert run.poll() is None, f"the run ended too soon: {run.communicate()[1]}"
        assert time.time() < until
        time.sleep(0.002)


def process(run, rank):
    """The id of one of the processes that torchrun started."""
    for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if f"RANK={rank}".encode() in environment:
            return int(pid)
    return None


def left(pids):
    """Whether all of these processes are gone, or soon are."""
    until = time.time() + 20
    while time.time() < until:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.02)
    return False


def no_traceback_of_ours(errors):
    """torchrun has tracebacks of its own, of files that are not ours."""
    return not re.search(rf'File "{re.escape(str(ROOT))}/\w+\.py"', errors)


def end_and_let_torchrun_restart(data, out, ends, *settings):
    """A run to its end.

    ends: (signal, rank that gets it, a function of the run's folder that says when).
    """
    run = launch_train(2, data, out, *settings, torchrun=[f"--max-restarts={len(ends)}"])
    for sig, rank, when in ends:
        wait_for(run, lambda: when(out) and process(run, rank))
        pid = process(run, rank)
        os.kill(pid, sig)
        wait_for(run, lambda: process(run, rank) not in (None, pid))
    errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors


def latest_is(step):
    def says(out):
        latest = out / "latest"
        return latest.exists() and latest.read_text() == f"step_{step:07d}"
    return says


@pytest.mark.slow
@needs_proc
def test_torchrun_restarts_what_lost_a_process_from_its_own_checkpoint(
        data_folder, runs, two, tmp_path):
    """Killed before its first checkpoint, although --init_from names another folder's weights.

    Then one process alone asked to leave: all save a checkpoint and leave, which torchrun takes for
    a failure as well.
    """
    returned(two["undisturbed"])
    ends = [(signal.SIGKILL, 0, lambda out: lines_of(out) >= 6),
            (signal.SIGTERM, 1, lambda out: latest_is(20)(out) and 25 <= lines_of(out) < 38)]
    end_and_let_torchrun_restart(data_folder, tmp_path / "run", ends, *LONG,
                                 f"--init_from={runs / 'ar'}")
    assert metrics(tmp_path / "run") == metrics(runs / "undisturbed")
    assert weights(tmp_path / "run") == weights(runs / "undisturbed")
    saved = [p.name for p in (tmp_path / "run").glob("step_*")]  # at 20, 40, 60 and then
    assert len(saved) == 4, "the one asked to leave did not make the others save"


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("first, second", [(0, 1), (1, 0)])
def test_torchrun_restarts_a_new_run_and_a_resumed_one(data_folder, tmp_path, first, second):
    whole, new, resumed = (tmp_path / name for name in ("whole", "new", "resumed"))
    assert launch_train(2, data_folder, whole, *LONG).wait() == 0
    ends = [(signal.SIGKILL, first, lambda out: latest_is(20)(out) and lines_of(out) >= 30),
            (signal.SIGKILL, second, latest_is(40))]
    end_and_let_torchrun_restart(data_folder, new, ends, *LONG)
    shutil.copytree(whole, resumed)
    (resumed / "latest").write_text("step_0000020")
    ends = [(signal.SIGKILL, second, lambda out: 23 <= lines_of(out) <= 40),
            (signal.SIGKILL, first, latest_is(40))]
    end_and_let_torchrun_restart(data_folder, resumed, ends, *LONG, "--resume=true")
    for out in (new, resumed):
        assert metrics(out) == metrics(whole) and weights(out) == weights(whole)


@pytest.mark.slow
@needs_proc
def test_a_run_that_is_preempted_or_stopped_saves_a_checkpoint_and_all_leave(
        data_folder, runs, two, tmp_path):
    """SIGTERM to torchrun, as a scheduler sends; then Ctrl-C, which a terminal sends to every
    process of the group."""
    returned(two["undisturbed"])
    out, same = tmp_path / "run", [*LONG, "--save_every=999", f"--init_from={runs / 'ar'}"]
    for ask, at in ((signal.SIGTERM, 5), (signal.SIGINT, 25)):
        run = launch_train(2, data_folder, out, *same, start_new_session=True)
        wait_for(run, lambda: lines_of(out) >= at and process(run, 0) and process(run, 1))
        pids = process(run, 0), process(run, 1)
        if ask == signal.SIGTERM:
            run.send_signal(ask)
        else:
            os.killpg(run.pid, ask)
        printed, errors = run.communicate(timeout=120)
        assert run.returncode != 0 and left(pids) and no_traceback_of_ours(errors), errors
        assert printed.count("the same command with --resume=true continues") == 1
        saved = int((out / "latest").read_text()[-7:])
        assert at - 3 <= saved < 60  # a few lines are evaluations
        assert metrics(out) == metrics(runs / "undisturbed")[:lines_of(out)]
        same = [*LONG, "--save_every=999", "--resume=true"]
    train(data_folder, out, *LONG, "--resume=true")
    same_numbers(out, runs / "undisturbed")


# --- every process the same model -----------------------------------------------------------------

@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 7), st.integers(1, 2), st.integers(1, 30), st.booleans())
def each_holds_its_rows_of_one_model(processes, copies, odd, untied):
    """processes: that share a copy. What FSDP cuts from a whole model is what new weights are made
    of, process by process."""
    cfg = ModelConfig(odd, 10, 1, 3, 1, 2, odd + 3, 64, qkv_bias=untied, tie_embeddings=not untied)
    whole = Transformer(cfg)
    parallel.init_weights(whole, seed=5)
    wanted = dict(whole.named_parameters())
    held = {name: [] for name in wanted}
    for place in range(processes * copies):
        # this process in every place of the mesh
        numbers = torch.arange(processes * copies) + dist.get_rank() - place
        mesh = DeviceMesh("cpu", numbers.view(copies, processes),
                          mesh_dim_names=("replicate", "shard"))
        mesh = mesh if copies > 1 else mesh["shard"]
        cut = deepcopy(whole)
        with torch.device("meta"):
            made = Transformer(cfg)
        for model in (cut, made):
            parallel.shard(model, mesh, torch.float32)
        made.to_empty(device="cpu")
        parallel.init_weights(made, seed=5)
        for (name, p), q in zip(cut.named_parameters(), made.parameters()):
            assert torch.equal(p.to_local(), q.to_local()), name
            mine, rows = parallel.my_rows(p)
            assert torch.equal(mine, wanted[name][rows]) and len(mine) == rows.stop - rows.start
            held[name] += range(rows.start, rows.stop)
    for name, rows in held.items():
        assert sorted(rows) == sorted([*range(len(wanted[name]))] * copies), name


def test_each_process_holds_its_rows_of_one_model_however_many_there_are():
    """In a group of which this is the only real process: its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=13, world_size=27)
    try:
        each_holds_its_rows_of_one_model()
    finally:
        dist.destroy_process_group()


# --- Adafactor ------------------------------------------------------------------------------------

def test_sharded_adafactor_is_adafactor(several):
    """To 1e-5 of a tensor's largest weight: sums of sums in float32."""
    for n in range(len(ADAFACTOR)):
        assert max(returned(several[f"adafactor {n}"])) < 1e-5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=3),
       st.integers(0, 2**31), st.sampled_from([1e-3, 0.3, 2.0]), st.sampled_from([0.0, 0.1]),
       st.sampled_from([1e-8, 1.0, 1e4]), st.booleans(), st.sampled_from([-0.8, -0.5]),
       st.sampled_from([1.0, 2.0]))
def test_adafactor_is_torch_optim_adafactor(shapes, seed, lr, weight_decay, scale, zeros,
                                            beta2_decay, clip):
    """To 1e-5 of the largest that a weight has been on its way: one that passes near 0 keeps the
    rounding of where it was."""
    draw = torch.Generator().manual_seed(seed)
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    same = {"lr": lr, "weight_decay": weight_decay, "beta2_decay": beta2_decay}
    optimizers = (torch.optim.Adafactor(theirs, d=clip, **same),
                  Adafactor(ours, clip=clip, **same))
    largest = [p.detach().abs().max() for p in theirs]
    for _ in range(5):
        for p, q in zip(theirs, ours):
            p.grad = scale * torch.randn(p.shape, generator=draw)
            if zeros:
                p.grad[0] = 0
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        largest = [max(size, p.detach().abs().max()) for size, p in zip(largest, theirs)]
    for p, q, size in zip(theirs, ours, largest):
        assert (p - q).abs().max() <= 1e-5 * size


@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1e-2]))
@settings(deadline=None, max_examples=20)
def test_an_absolute_learning_rate_is_torch_optim_adafactors_over_the_weights_size(seed, lr):
    draw = torch.Generator().manual_seed(seed)
    theirs = torch.nn.Parameter(torch.randn(5, 4, generator=draw))
    ours = torch.nn.Parameter(theirs.detach().clone())
    optimizer = torch.optim.Adafactor([theirs])
    mine = Adafactor([ours], lr=lr, relative=False)
    for _ in range(5):
        theirs.grad = torch.randn(5, 4, generator=draw)
        ours.grad = theirs.grad.clone()
        optimizer.param_groups[0]["lr"] = lr / theirs.detach().square().mean().sqrt().item()
        optimizer.step()
        mine.step()
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()


# --- Muon -----------------------------------------------------------------------------------------

def test_sharded_muon_is_muon(several):
    """Every process orthogonalizes the same whole matrix, so but for the last bits nothing
    differs."""
    assert max(returned(several["muon"])) < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(2, 12), min_size=1, max_size=2), min_size=1, max_size=3),
       st.integers(0, 2**31), st.sampled_from([1e-3, 0.1]), st.sampled_from([0.0, 0.1]),
       st.sampled_from([1e-3, 1.0, 1e3]))
def test_muon_is_torch_optim_muon_and_adamw(shapes, seed, lr, weight_decay, scale):
    """To 1e-5 of the largest weight, in float32. The bfloat16 inside gives the same bits, as the
    operations are the same."""
    draw = torch.Generator().manual_seed(seed)
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    optimizers = [Muon([{"params": [p], "hidden": p.dim() == 2} for p in ours], lr=lr,
                       weight_decay=weight_decay)]
    for p in theirs:
        if p.dim() == 2:
            optimizers.append(torch.optim.Muon([p], lr=lr, weight_decay=weight_decay,
                                               adjust_lr_fn="match_rms_adamw"))
        else:
            optimizers.append(torch.optim.AdamW([p], lr=lr, weight_decay=weight_decay,
                                                betas=(0.9, 0.95)))
    for _ in range(3):
        for p, q in zip(theirs, ours):
            p.grad = scale * torch.randn(p.shape, generator=draw)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(theirs, ours):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max()


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_an_orthogonalized_matrix_has_singular_values_near_one(rows, columns, seed):
    """And the singular vectors it had: U S Vᵀ becomes U S' Vᵀ, S' near 1. The iteration lifts
    every singular value above 1/50 of the norm; bfloat16 adds a few percent."""
    draw = torch.Generator().manual_seed(seed)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=draw), full_matrices=False)
    given_values = 0.3 + torch.rand(min(rows, columns), generator=draw)
    made = orthogonalized(u * given_values @ vt)
    assert made.shape == (rows, columns)
    inside = u.T @ made @ vt.T
    assert (inside.diag() > 0.6).all() and (inside.diag() < 1.3).all()
    assert (inside - inside.diag().diag()).abs().max() < 0.1


# --- mistakes, a full disk ------------------------------------------------------------------------

def test_rows_that_cannot_be_dealt_out_name_a_batch_that_can(runs, two):
    for result in two["9 rows"]:
        assert result["error"] == (
            "Mistake: batch_tokens=288 is 9 rows of context=32, which 2 processes cannot share "
            "evenly; 1 can, and batch_tokens=256")
    assert not (runs / "nine rows").exists()


@pytest.mark.slow
def test_a_row_that_four_processes_cannot_share_names_a_batch_that_can(runs, four):
    for result in four["1 row"]:
        says = "which 4 processes cannot share evenly; 1 can, and batch_tokens=128"
        assert says in result["error"]
    assert not (runs / "one row").exists()


@pytest.mark.parametrize("processes, more, says", [
    (3, ["--shard_ranks=2"], "shard_ranks=2 must divide the number of processes, 3"),
    (2, ["--shard_ranks=4"], "shard_ranks=4 must divide the number of processes, 2"),
    (1, ["--shard_ranks=2"], "shard_ranks=2 must divide the number of processes, 1"),
    (2, ["--device=mps"], "2 processes need device=cuda or cpu: PyTorch has no collectives on mps"),
])
def test_mistakes_in_the_number_of_processes_end_in_a_one_line_message(
        data_folder, tmp_path, monkeypatch, processes, more, says):
    """Found before a process waits for the others, so one is enough to see it."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(Mistake, match=says):
        train(data_folder, tmp_path / "run", "--device=cpu", *more)
    assert not (tmp_path / "run").exists() and not dist.is_initialized()


def test_a_scheduler_may_set_the_number_of_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parallel.start("cpu").size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Mistake, match="WORLD_SIZE=2 is set and RANK is not"):
        parallel.start("cpu")


def test_one_process_whose_disk_is_full_leaves_all_with_the_checkpoint_before(runs, two):
    """The second of two cannot write its part of the optimizer's state."""
    for result in two["full disk"]:
        pattern = (r"OSError: could not save .*step_0000010: .*File too large.*; "
                   r"the last good checkpoint is .*step_0000005")
        assert re.fullmatch(pattern, result["error"])


@pytest.mark.slow
def test_the_writer_of_the_weights_with_a_full_disk_ends_the_run_with_the_checkpoint_before(
        data_folder, runs, two, tmp_path):
    """The first of two: the other one is left alone in the middle of the save, and must not wait
    for ever."""
    returned(two["undisturbed"])
    out = tmp_path / "run"
    shutil.copytree(runs / "undisturbed", out)
    (out / "latest").write_text("step_0000040")
    good = weights(out)
    run = launch(2, "tests/ranks.py", "full_disk", 0, len(good) // 2, *TINY,
                 f"--data={data_folder}", f"--out={out}", *LONG, "--save_every=1",
                 "--resume=true")
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and no_traceback_of_ours(errors), errors
    pattern = (r"rank0\]: error: could not save .*step_0000041: .*File too large.*"
               r"step_0000040$")
    assert re.search(pattern, errors, re.M), errors
    assert weights(out) == good and not list(out.glob("*.tmp"))


# --- a large model --------------------------------------------------------------------------------

SIZES = {"vocab_size": 40_000, "d_model": 2048, "n_layer": 14, "n_head": 16, "n_kv_head": 8,
         "head_dim": 128, "d_ff": 9216, "context": 256}


def write_large_model(data, folder):
    """2 GB of bfloat16 weights in five files. Returns how many weights there are."""
    tok, cfg = huggingface.load_tokenizer(data), ModelConfig(**SIZES, tie_embeddings=False)
    with torch.device("meta"):
        model = Transformer(cfg)
    shapes = {huggingface.tensor_name(n): p.shape for n, p in model.named_parameters()}
    # large enough for every weight, each from another place of it
    pool = torch.randn(2**27).bfloat16()
    names, where = list(shapes), {}
    folder.mkdir()
    for i in range(5):
        file, tensors = f"model-{i + 1:05d}-of-00005.safetensors", {}
        for n, name in enumerate(names[i::5]):
            values = pool[1000 * n + i:][:shapes[name].numel()]
            tensors[name] = values.reshape(shapes[name]).clone()
            where[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": where})
    config = huggingface.to_hf_config(cfg, tok, Recipe("ar"), torch.bfloat16)
    write_json(folder / "config.json", config)
    tok.save(folder)
    return sum(shape.numel() for shape in shapes.values())


@pytest.mark.slow
@needs_proc
def test_a_process_reads_its_share_of_a_folder_without_ever_holding_the_whole(
        data_folder, tmp_path):
    """Held in float32 by two processes: at most 0.6 of it each, and 1 GB."""
    folder = tmp_path / "published"
    parameters = write_large_model(data_folder, folder)
    on_disk = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    results = run_jobs(2, {"import": ["peak_of_import", folder]}, tmp_path)["import"]
    for rank, result in enumerate(returned(results)):
        print(f"process {rank}: {on_disk / 1e9:.2f} GB of files, {result['model'] / 1e9:.2f} GB "
              f"held by two processes, at most {result['peak'] / 1e9:.2f} GB private in this one, "
              f"{result['seconds']:.0f} s")
        assert on_disk > 2e9 and result["model"] == 4 * parameters
        assert result["peak"] <= 0.6 * result["model"] + 1e9
    shutil.rmtree(folder)
