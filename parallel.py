"""Many processes, one model: the process group, FSDP2, activation checkpointing, micro-batches,
updates.

    torchrun --nproc_per_node=8 train.py config/8b.py                         # one node
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py config/8b.py --shard_ranks=8                                 # eight nodes

(To survive a lost process on several nodes, see `meeting_place`.)

Every process runs the same script on its own rows of the global batch. FSDP2 cuts each weight, its
gradient and its optimizer state into equal parts by rows, one per process (ZeRO-3): a block's
weights are gathered when it runs and freed after, its gradients are reduce-scattered. Master
weights are float32, the gathered copies have `dtype`, sums are float32. With `shard_ranks` (HSDP,
hybrid sharding) that many processes share a copy, and the copies exchange gradients.

gloo on CPUs and NCCL on GPUs run the same code.
Not covered: optimizers (optimizers.py); tensor, pipeline and context parallelism, CPU offload.
"""
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from attention_kernel import why_tiled
from configurator import Mistake
from model import Transformer

# --- the processes -------------------------------------------------------------------------------

@dataclass
class World:
    """The processes of a run. rank: this one's number of `size`.

    mesh: None where the model is not sharded. owns_group: whether `start` created the group.
    """
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    owns_group: bool = False

    def sum(self, *values):
        """The sums of these numbers over all processes, as floats (exact for counts below 2^53)."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)  # on the CPU, through gloo: the GPU need not stop for it
        return total.tolist()

    def first(self, ask):
        """Call ask() on rank 0; all ranks get its result, or raise its Mistake or OSError."""
        answer = [None]
        if self.rank == 0:
            try:
                answer = [ask()]
            except (Mistake, OSError) as error:
                answer = [error]
        if self.size > 1:
            dist.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def gather(self, items):
        """The lists of all processes as one list, in the order of their ranks; on every process."""
        if self.size == 1:
            return list(items)
        lists = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def say(self, text):
        """Print a line, once."""
        if self.rank == 0:
            print(text, flush=True)

    def leave(self):
        """End the process group. At a clean end only: after an error it would wait for others."""
        if self.owns_group:
            dist.destroy_process_group()


def start(device, shard_ranks=0):
    """Join the processes that torchrun started, or be the only one. Returns a World.

    device: 'cuda', 'mps' or 'cpu'. shard_ranks: processes that share a copy of the weights; 0: all.
    On CUDA a single process is sharded as well, over itself: the same mixed precision everywhere.
    Raises Mistake where the processes cannot be arranged so.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if size > 1 and not launched:
        raise Mistake(f"WORLD_SIZE={size} is set and RANK is not: start the script with "
                      "torchrun")
    if device == "mps" and size > 1:
        raise Mistake(f"{size} processes need device=cuda or cpu: PyTorch has no collectives on "
                      "mps")
    if size % (shard_ranks or size):
        raise Mistake(f"shard_ranks={shard_ranks} must divide the number of processes, {size}")
    needs_group = device == "cuda" and dist.is_nccl_available()  # Windows has CUDA without NCCL
    if not launched and not needs_group:
        return World(0, 1, torch.device(device))
    rank = int(os.environ["RANK"]) if launched else 0
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(device)
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise Mistake(f"process {local} of this machine has no GPU: give "
                          f"--nproc_per_node={torch.cuda.device_count()} or fewer")
        place = torch.device(device, local)
        torch.cuda.set_device(place)
    owns_group = not dist.is_initialized()
    if owns_group:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        store = meeting_place() if launched else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    shape = (size // (shard_ranks or size), shard_ranks or size)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    if shape[0] == 1:
        mesh = mesh["shard"]
    return World(rank, size, place, mesh, owns_group)


def rows_of(rank, size, cfg):
    """The rows of the global batch that a process computes, a range.

    Raises Mistake if the rows do not divide evenly.
    """
    batch_rows = cfg.batch_tokens // cfg.context
    if batch_rows % size:
        near = max(1, round(batch_rows / size)) * size * cfg.context
        fewer = max(n for n in range(1, size) if batch_rows % n == 0)
        raise Mistake(f"batch_tokens={cfg.batch_tokens} is {batch_rows} rows of "
                      f"context={cfg.context}, which {size} processes cannot share evenly; "
                      f"{fewer} can, and batch_tokens={near}")
    return range(rank * batch_rows // size, (rank + 1) * batch_rows // size)


def meeting_place():
    """The store through which torchrun's processes find each other.

    torchrun restarts a job with the store it had (seen with torch 2.13), in which processes would
    read the addresses of dead ones. So each attempt gets names of its own. On several nodes the
    counts of attempts may differ; there torchrun itself makes a new store with
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
    """
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if nodes > 1 and restarts and shared:
        raise Mistake(f"max-restarts={restarts} on {nodes} nodes needs "
                      "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment")
    store = next(dist.rendezvous("env://"))[0]
    if nodes > 1:
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def rank_and_size():
    """This process's number and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait_for_all():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


# --- weights in parts ----------------------------------------------------------------------------

def build(model_cfg, world, dtype, cfg):
    """The model on its device, without weights yet, sharded where several processes share it.

    dtype: of the gathered weights. cfg: settings with recompute, compile and reshard.
    """
    with torch.device("meta"):  # shapes alone: no process ever holds the whole model
        model = Transformer(model_cfg)
    recompute_blocks(model, cfg.recompute)
    if cfg.compile:
        # without, two compiled CPU runs were seen to differ
        torch.use_deterministic_algorithms(world.device.type == "cpu")
        compile_blocks(model)
        why = why_tiled(world.device.type, dtype, model_cfg.head_dim)
        if why and cfg.recompute != "none":
            world.say(f"compile=true compiles nothing with recompute={cfg.recompute} where "
                      f"attention is PyTorch tiles, since {why}")
    if world.mesh is not None:
        shard(model, world.mesh, dtype, cfg.reshard)
    return model.to_empty(device=world.device)


def autocast(world, dtype):
    """Without FSDP, which casts weights and so activations, autocast casts products' inputs."""
    wanted = world.mesh is None and dtype == torch.bfloat16
    return torch.autocast(world.device.type, torch.bfloat16, enabled=wanted)


def shard(model, mesh, dtype, reshard=True):
    """Shard the model over the mesh, in place (FSDP2).

    Each transformer block is a group that is gathered together, and the rest is another.
    dtype: of the gathered weights, so of activations. reshard: free a block's gathered weights
    between its forward and its backward pass (ZeRO-3), or keep them (ZeRO-2: more memory, a third
    less traffic). The embedding and the head stay gathered from forward to backward: the loss reads
    the head outside the model's forward.
    """
    # inputs keep their dtype: the rotary angles are float32
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def my_rows(p):
    """A weight as this process holds it: (tensor, slice), its own rows and which of the whole.

    FSDP splits dimension 0 into equal chunks, the last ones short or empty. A weight that is not
    sharded is whole.
    """
    if not isinstance(p, DTensor):
        return p, slice(0, p.shape[0])
    split = next(i for i, placement in enumerate(p.placements) if isinstance(placement, Shard))
    chunk = -(-p.shape[0] // p.device_mesh.size(split))
    start = min(p.device_mesh.get_local_rank(split) * chunk, p.shape[0])
    local = p.to_local()
    return local, slice(start, start + local.shape[0])


def gathered(x):
    """The whole of a sharded tensor, on every process; parts of a sum are added up."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def init_weights(model, seed):
    """New weights: each process draws every one whole, in order, and keeps its rows.

    So the model is the same however it is sharded.
    """
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        mine, rows = my_rows(p)
        mine.copy_(model.first_weight(name, p.shape)[rows])


def free_gathered(model, world):
    """Free what a forward pass without a backward pass has left gathered."""
    if world.mesh is not None:
        for part in (model, *model.layers):
            part.reshard()


@contextmanager
def weights_kept(model, world, reshard):
    """Inside, all weights stay gathered: forwards exchange nothing, so that each process may make
    as many as it needs. Without gradients. Takes the memory of a whole model in its dtype.

    reshard: as the model was built with, and is again afterwards.
    """
    if world.mesh is None:
        yield
        return
    parts = (model, *model.layers)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for layer in model.layers:
            layer.set_reshard_after_forward(reshard, recurse=False)


# --- memory for time: activation checkpointing ---------------------------------------------------

aten = torch.ops.aten
KEPT = {  # under 'selective', what is expensive to recompute: matrix products and attention
    aten.mm.default,
    aten.addmm.default,
    torch.ops.nanodiffcoder.attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}


def keep_expensive(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(model, mode):
    """Keep fewer activations of each block for the backward pass, which recomputes the rest
    (Chen et al. 2016).

    mode: 'none'; 'selective', keep matrix products and attention; 'full', keep each block's input.
    """
    if mode == "none":
        return
    how = {"use_reentrant": False}
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, keep_expensive)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **how)


def compile_blocks(model):
    """torch.compile of each block: they are alike, so one compilation serves all."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)


# --- a step --------------------------------------------------------------------------------------

def micro_batches(model, world, rows, cfg):
    """The (start, end) of each micro-batch of this process's `rows` rows.

    Gradients are exchanged in the backward pass of the last one, or with reduce_each of each.
    """
    for start in range(0, rows, cfg.micro_batch):
        end = min(start + cfg.micro_batch, rows)
        if world.mesh is not None:
            model.set_requires_gradient_sync(cfg.reduce_each or end == rows)
        yield start, end


def learning_rate(step, cfg):
    """Linear warmup to lr, then a cosine or a line down to min_lr at max_steps."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    left = 1 - done
    if cfg.lr_decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def update(model, optimizer, step, loss, lr, grad_clip):
    """One optimizer step with the gradients clipped to a norm of `grad_clip`. Returns their norm.

    Raises Mistake, without the update, where the loss (a float) or the norm is not finite.
    """
    norm = gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Mistake(f"step {step} went wrong: loss {loss}, gradient norm {norm}, learning rate "
                      f"{lr:.2e}; its update was not made; a lower --lr or --grad_clip usually "
                      "helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def weights_norm(model):
    """The Euclidean norm of all weights, a float: not finite where one of them is not."""
    return gathered(torch.nn.utils.get_total_norm(model.parameters())).item()
