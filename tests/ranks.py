"""What the processes that tests/test_parallel.py starts do: one job after another in one process group.

    torchrun --nproc_per_node=2 tests/ranks.py JOBS.json

    torchrun --nproc_per_node=2 tests/ranks.py full_disk RANK BYTES SETTINGS     # train.py, as it is, where a disk is full

JOBS.json: a list of [name of a function of this file, its arguments …]; each process writes what they returned, or the error
they ended with, to JOBS.json.RANK. Starting processes costs seconds, a tiny run a fraction of one.
"""

import json
import os
import re
import resource
import runpy
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import parallel
from model import Transformer, my_rows
from test_train import train as train_here

SHAPES = [
    (7, 5),
    (3, 1),
    (2, 40),
    (64, 2),
    (5,),
    (1,),
    (13,),
]  # fewer rows than processes, and uneven ones


def train(data, out, *more):
    """train.py to its end, as this process of the group."""
    torch._dynamo.reset()
    train_here(data, out, *more)


def as_a_script(*settings):
    """train.py with these settings alone, in a process that is to end with it."""
    sys.argv = ["train.py", *settings]
    runpy.run_path("train.py", run_name="__main__")


def rewind(run, copy, step):
    """A copy of a run as it was just after it had saved this step (it must still be kept)."""
    if dist.get_rank() == 0:
        shutil.copytree(run, copy)
        (Path(copy) / "latest").write_text(f"step_{step:07d}")
    dist.barrier()


def limit_files(rank, size):
    """A disk that for the process `rank` is full after `size` bytes of any file."""
    if int(os.environ["RANK"]) == rank:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )


def full_disk(rank, size, *args):
    """train, on a disk that is full for one of the processes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(rank, size)
    try:
        train(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rewrite(run, out, file_bytes):
    """The weights of a run's newest checkpoint, read by all processes and written by all, in files of at most `file_bytes`."""
    folder, default = checkpoint.find(run), checkpoint.FILE_BYTES
    cfg, tok, recipe = checkpoint.describe(folder)
    with torch.device("meta"):
        model = Transformer(cfg)
    parallel.shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), torch.float32)
    model.to_empty(device="cpu")
    checkpoint.load_weights(folder, model)
    if dist.get_rank() == 0:
        Path(out).mkdir()
    dist.barrier()
    checkpoint.FILE_BYTES = file_bytes
    try:
        checkpoint.write_model(out, model, tok, recipe)
    finally:
        checkpoint.FILE_BYTES = default


def adafactor(copies, relative, **settings):
    """Our Adafactor on sharded weights beside one on whole weights: the largest difference, relative to a tensor's largest.

    copies: of the weights among the processes (HSDP); 1: none. The other one is PyTorch's where it has the same rates.
    """
    mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies))
    placements = [Replicate(), Shard(0)]
    draw = torch.Generator().manual_seed(0)
    whole = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    cut = [
        torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in whole
    ]
    ours = parallel.Adafactor(cut, relative=relative, **settings)
    other = (
        torch.optim.Adafactor(whole, **settings)
        if relative
        else parallel.Adafactor(whole, relative=False, **settings)
    )
    for _ in range(20):
        for p, q in zip(whole, cut):
            p.grad = (
                torch.randn(p.shape, generator=draw)
                * torch.rand(p.shape[:1] + (1,) * (p.dim() - 1), generator=draw) ** 8
            )
            q.grad = distribute_tensor(p.grad.clone(), mesh, placements)
        ours.step()
        other.step()
    return max(
        ((p - q.full_tensor()).abs().max() / p.abs().max()).item() for p, q in zip(whole, cut)
    )


def peak_of_import(data, out, folder):
    """Most private memory (RssAnon) this process had while train.py read a folder's weights; its rows must be the folder's.

    The run is stopped where it would make its optimizer. VmHWM will not do: it counts the mapped files as well.
    """
    peak, done, found = [0], threading.Event(), {}

    def watch():
        while not done.wait(0.005):
            peak[0] = max(
                peak[0],
                int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
                * 1024,
            )

    def stop_here(groups, **kwargs):
        done.set()
        found["model"] = sys._getframe(1).f_locals["model"]
        raise InterruptedError("the weights are read")

    real, torch.optim.AdamW = torch.optim.AdamW, stop_here
    threading.Thread(target=watch, daemon=True).start()
    began = time.time()
    try:
        as_a_script(
            f"--data={data}",
            f"--out={out}",
            f"--init_from={folder}",
            "--objective=ar",
            "--dtype=float32",
            "--threads=1",
        )
    except InterruptedError:
        pass
    finally:
        torch.optim.AdamW, sys.excepthook = real, sys.__excepthook__
        done.set()
    seconds, model = time.time() - began, found["model"]
    where = checkpoint.weight_files(Path(folder))
    for name, p in model.named_parameters():
        mine, rows = my_rows(p)
        with checkpoint.safe_open(where[checkpoint.tensor_name(name)], "pt") as f:
            assert torch.equal(mine, f.get_slice(checkpoint.tensor_name(name))[rows].float()), name
    return {
        "peak": peak[0],
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "seconds": seconds,
    }


def main(path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", timeout=timedelta(seconds=60)
    )  # of a process that waits for one that failed
    results = []
    for name, *args in json.loads(Path(path).read_text()):
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        try:
            results.append({"returned": globals()[name](*args, **kwargs)})
        except (
            ValueError,
            OSError,
            SystemExit,
        ) as error:  # any other ends them all: a process may be waiting for this one
            results.append({"error": f"{type(error).__name__}: {error}"})
        Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "full_disk":
        limit_files(int(sys.argv[2]), int(sys.argv[3]))
        as_a_script(*sys.argv[4:])
    else:
        main(sys.argv[1])
