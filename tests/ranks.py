"""What the processes that tests/test_parallel.py starts do: one job after another in one process
group.

    torchrun --nproc_per_node=2 tests/ranks.py JOBS.json

    # train.py, where a disk is full
    torchrun --nproc_per_node=2 tests/ranks.py full_disk RANK BYTES SETTINGS

JOBS.json: a list of [name of a function of this file, its arguments …]; each process writes what
they returned, or the error they ended with, to JOBS.json.RANK. Starting processes costs seconds, a
tiny run a fraction of one.
"""
if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from configurator import begin
    begin()

import json
import os
import re
import resource
import shutil
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from test_train import train as train_here
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import huggingface
import parallel
import train as script
from model import Transformer
from optimizers import Adafactor, Muon

# fewer rows than processes, and uneven ones
SHAPES = [(7, 5), (3, 1), (2, 40), (64, 2), (5,), (1,), (13,)]


def train(data, out, *more):
    """train.py to its end, as this process of the group."""
    torch._dynamo.reset()
    assert train_here(data, out, *more) == 0


def rewind(run, copy, step):
    """A copy of a run as it was just after it had saved this step (it must still be kept)."""
    if dist.get_rank() == 0:
        shutil.copytree(run, copy)
        (Path(copy) / "latest").write_text(f"step_{step:07d}")
    dist.barrier()


def limit_files(rank, size):
    """A disk that for the process `rank` is full after `size` bytes of any file."""
    if int(os.environ["RANK"]) == rank:
        largest = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, largest))


def full_disk(rank, size, *args):
    """train, on a disk that is full for one of the processes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(rank, size)
    try:
        train(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def rewrite(run, out, file_bytes):
    """The weights of a run's newest checkpoint, read by all processes and written by all, in files
    of at most `file_bytes`."""
    folder, default = huggingface.find(run), huggingface.FILE_BYTES
    cfg, tok, recipe = huggingface.read_description(folder)
    with torch.device("meta"):
        model = Transformer(cfg)
    rank, size = parallel.rank_and_size()
    parallel.shard(model, init_device_mesh("cpu", (size,)), torch.float32)
    model.to_empty(device="cpu")
    huggingface.load_weights(folder, model, parallel.my_rows)
    if rank == 0:
        Path(out).mkdir()
    dist.barrier()
    huggingface.FILE_BYTES = file_bytes
    try:
        huggingface.write_model(out, model, tok, recipe, torch.float32, rank, size,
                                parallel.gathered)
    finally:
        huggingface.FILE_BYTES = default


def whole_and_cut(copies, draw):
    """The same random weights twice, whole and sharded: two lists.

    copies: of the weights among the processes (HSDP); 1: none. draw: a torch.Generator.
    """
    mesh = init_device_mesh("cpu", (copies, dist.get_world_size() // copies))
    whole = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    cut = []
    for p in whole:
        part = distribute_tensor(p.detach().clone(), mesh, [Replicate(), Shard(0)])
        cut.append(torch.nn.Parameter(part))
    return whole, cut


def set_gradients(p, q, gradient):
    """Give the whole weight p and the sharded one q the same gradient."""
    p.grad = gradient
    q.grad = distribute_tensor(gradient.clone(), q.device_mesh, q.placements)


def largest_difference(whole, cut):
    """Of whole and sharded weights, relative to a tensor's largest: a float."""
    return max(((p - q.full_tensor()).abs().max() / p.abs().max()).item()
               for p, q in zip(whole, cut))


def adafactor(copies, relative, **settings):
    """Our Adafactor on sharded weights beside one on whole weights: largest_difference.

    copies: see whole_and_cut. The other one is PyTorch's where it has the same rates.
    """
    draw = torch.Generator().manual_seed(0)
    whole, cut = whole_and_cut(copies, draw)
    ours = Adafactor(cut, relative=relative, **settings)
    if relative:
        other = torch.optim.Adafactor(whole, **settings)
    else:
        other = Adafactor(whole, relative=False, **settings)
    for _ in range(20):
        for p, q in zip(whole, cut):
            noise = torch.randn(p.shape, generator=draw)
            size_of_row = torch.rand(p.shape[:1] + (1,) * (p.dim() - 1), generator=draw) ** 8
            set_gradients(p, q, noise * size_of_row)
        ours.step()
        other.step()
    return largest_difference(whole, cut)


def muon(copies):
    """Our Muon on sharded weights beside it on whole ones: largest_difference.

    copies: see whole_and_cut.
    """
    draw = torch.Generator().manual_seed(0)
    whole, cut = whole_and_cut(copies, draw)
    both = []
    for weights in (whole, cut):
        groups = [{"params": [p], "hidden": p.dim() == 2} for p in weights]
        both.append(Muon(groups, lr=0.05, weight_decay=0.1))
    for _ in range(5):
        for p, q in zip(whole, cut):
            set_gradients(p, q, torch.randn(p.shape, generator=draw))
        for optimizer in both:
            optimizer.step()
    return largest_difference(whole, cut)


def private_memory():
    """Bytes of this process that are not mapped files. VmHWM will not do: it counts those too."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def peak_of_import(folder):
    """Most private memory this process had while it read a folder's weights as train.py does.

    Its rows must be the folder's.
    """
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], private_memory())

    threading.Thread(target=watch, daemon=True).start()
    began = time.time()
    try:
        world = parallel.start("cpu")
        model_cfg, _, _ = huggingface.read_description(Path(folder), objective="ar")
        model = parallel.build(model_cfg, world, torch.float32, script.Config())
        huggingface.load_weights(Path(folder), model, parallel.my_rows)
    finally:
        done.set()
    seconds = time.time() - began
    where = huggingface.weight_files(Path(folder))
    for name, p in model.named_parameters():
        mine, rows = parallel.my_rows(p)
        name = huggingface.tensor_name(name)
        with safe_open(where[name], "pt") as f:
            assert torch.equal(mine, f.get_slice(name)[rows].float()), name
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak": peak[0], "model": held, "seconds": seconds}


def main(path):
    torch.set_num_threads(1)
    # of a process that waits for one that failed
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = []
    for name, *args in json.loads(Path(path).read_text()):
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        try:
            results.append({"returned": globals()[name](*args, **kwargs)})
        except (ValueError, OSError, SystemExit) as error:
            # any other ends them all: a process may be waiting for this one
            results.append({"error": f"{type(error).__name__}: {error}"})
        Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "full_disk":
        limit_files(int(sys.argv[2]), int(sys.argv[3]))
        sys.exit(script.main(sys.argv[4:]))
    main(sys.argv[1])
