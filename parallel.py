"""Many processes, one model: the process group, FSDP2, activation checkpointing, and an Adafactor that is sharded too.

    torchrun --nproc_per_node=8 train.py config/8b.py                        # one node
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/8b.py --shard_ranks=8

(to survive a lost process on several nodes, see `meeting_place`)

Every process runs the same script on its own rows of the global batch. FSDP2 cuts each weight, its gradient and its
optimizer state into equal rows, one part a process (ZeRO-3): a block's weights are gathered when it runs and given back after,
its gradients are summed and cut again. Master weights are float32, the gathered copies in `dtype`, sums in float32.
With `shard_ranks` (HSDP, hybrid sharding) that many processes share a copy, a node's say, and the copies exchange gradients.

gloo on CPUs and NCCL on GPUs run the same code. Not covered: tensor, pipeline and context parallelism, CPU offload.
"""
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attention_kernel  # noqa: F401, defines torch.ops.nanodiffcoder.attention


@dataclass
class World:
    """The processes of a run. rank: this one's number of `size`. mesh: None where the model is not sharded."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group_made: bool = False  # here, and not by whoever called

    def sum(self, *values):
        """The sums of these numbers over all processes, as floats (exact for counts below 2^53)."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)  # on the CPU, through gloo: the GPU need not stop for it
        return total.tolist()

    def first(self, value):
        """What the first process has here, on all of them."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def leave(self):
        """End the process group, at a clean end only: after an error it would wait for processes that wait for this one."""
        if self.group_made:
            dist.destroy_process_group()


def pick_device(asked):
    """'cuda', 'mps' or 'cpu': the one asked for, or under 'auto' the first that is there. Raises ValueError if it is not."""
    there = [name for name, is_there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                                         ("cpu", True)) if is_there]
    if asked not in ("auto", *there):
        raise ValueError(f"device={asked!r} is not available here; --device={there[0]} is")
    return there[0] if asked == "auto" else asked


def start(device, shard_ranks=0):
    """Join the processes that torchrun started, or be the only one. Returns a World.

    device: 'cuda', 'mps' or 'cpu'. shard_ranks: processes that share one copy of the weights; 0: all of them.
    On CUDA a single process is sharded as well, over itself: the same mixed precision everywhere.
    """
    launched = "WORLD_SIZE" in os.environ
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "mps" and size > 1:
        raise ValueError(f"{size} processes need device=cuda or cpu: PyTorch has no collectives on mps")
    if size % (shard_ranks or size):
        raise ValueError(f"shard_ranks={shard_ranks} must divide the number of processes, {size}")
    if not launched and (device != "cuda" or not dist.is_nccl_available()):  # Windows has CUDA without NCCL
        return World(0, 1, torch.device(device))
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: give --nproc_per_node={torch.cuda.device_count()} "
                             "or fewer")
        torch.cuda.set_device(local)
    group_made = not dist.is_initialized()
    if group_made:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting_place() if launched else dist.HashStore(), rank=rank, world_size=size)
    shape = (size // (shard_ranks or size), shard_ranks or size)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
    return World(rank, size, torch.device(device, local if device == "cuda" else None),
                 mesh if shape[0] > 1 else mesh["shard"], group_made)


def meeting_place():
    """The store through which torchrun's processes find each other.

    torchrun restarts a job with the store it had (seen with torch 2.13), where the addresses of the dead would be found
    first: each attempt gets names of its own. Over several nodes the counts of attempts may differ; there torchrun itself
    makes a new store with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.
    """
    nodes, restarts = (int(os.environ.get(name, default)) for name, default in (("GROUP_WORLD_SIZE", 1),
                                                                                ("TORCHELASTIC_MAX_RESTARTS", 0)))
    if nodes > 1 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(f"max-restarts={restarts} on {nodes} nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's "
                         "environment")
    store = next(dist.rendezvous("env://"))[0]
    if nodes > 1:
        return store
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def shard(model, mesh, dtype, reshard=True):
    """Cut the model's weights over the mesh, in place: a group for each transformer block, one for the rest (FSDP2).

    dtype: of the gathered weights, so of activations. reshard: give back a block's weights between its forward and its
    backward pass (ZeRO-3), or keep them (ZeRO-2: more memory, a third less traffic).
    The embedding and the head stay gathered from forward to backward: the loss reads the head outside the model's forward.
    """
    # inputs keep their dtype: the rotary angles are float32
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


# --- what one process of several has -------------------------------------------------------------

def rank_and_size():
    """This process's number and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait_for_all():
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def gathered(p):
    """The whole of a sharded tensor, on every process."""
    return p.full_tensor() if isinstance(p, DTensor) else p


def my_rows(p):
    """A weight as this process holds it: (tensor, slice), its rows and which of the whole they are.

    FSDP splits dimension 0 into equal chunks, the last ones short or empty; a weight that is not
    sharded is whole.
    """
    if not isinstance(p, DTensor):
        return p, slice(0, p.shape[0])
    is_split = [isinstance(placement, Shard) for placement in p.placements]
    split = is_split.index(True)
    chunk = -(-p.shape[0] // p.device_mesh.size(split))
    first = min(p.device_mesh.get_local_rank(split) * chunk, p.shape[0])
    mine = p.to_local()
    return mine, slice(first, first + mine.shape[0])


# --- memory for time: activation checkpointing --------------------------------------------------------------------

aten = torch.ops.aten
KEPT = {  # under 'selective': what is dear to compute; norms, rotations and products of two tensors are computed again
    aten.mm.default, aten.addmm.default, torch.ops.nanodiffcoder.attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default}


def keep_dear(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(model, mode):
    """Keep fewer activations of each block between forward and backward, computing the rest again (Chen et al. 2016).

    mode: 'none'; 'selective', keep matrix products and attention; 'full', keep only each block's input.
    """
    if mode == "none":
        return
    more = {"context_fn": partial(create_selective_checkpoint_contexts, keep_dear)} if mode == "selective" else {}
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, **more)


def compile_blocks(model):
    """torch.compile of each block: they are alike, so the first one's code serves all."""
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward)


# --- Adafactor ----------------------------------------------------------------------------------------------------

def whole(x):
    """x with the processes' parts of a sum added up, the same on all of them."""
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim) if isinstance(x, DTensor) else x


def rms(x):
    """Root mean square."""
    return (whole(x.square().sum()) / x.numel()).sqrt()


class Adafactor(torch.optim.Optimizer):
    """Adam's second moment as a row times a column (Shazeer & Stern 2018, Algorithms 4 and 5), sharded like the weights.

    The same numbers as torch.optim.Adafactor, which refuses sharded weights. Written in whole-tensor operations: where they are
    DTensors, the sums over rows and columns become sums over processes.

    relative: lr is multiplied by the weight's root mean square and capped at 1/√step, as in the paper; False: lr is absolute,
    as in CoDA's training. beta2_decay: the second moment's decay is 1 - step^beta2_decay. clip: largest root mean square of
    an update.
    """

    def __init__(self, params, lr=1e-2, weight_decay=0.0, relative=True, beta2_decay=-0.8, eps=(2**-23, 1e-3), clip=1.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "relative": relative, "beta2_decay": beta2_decay,
                                  "eps": eps, "clip": clip})

    @torch.no_grad()
    def step(self, closure=None):  # nobody here gives one; torch.distributed.checkpoint names it
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], **{k: v for k, v in group.items() if k in self.defaults})

    def update(self, p, g, state, lr, weight_decay, relative, beta2_decay, eps, clip):
        if not state:
            state["step"] = torch.zeros(())
            if p.dim() == 2:
                state["row"] = torch.zeros_like(g[:, :1])  # mean of g² along each row, (rows, 1)
                state["col"] = torch.zeros_like(whole(g.sum(0, keepdim=True)))  # and along each column, (1, cols)
            else:
                state["variance"] = torch.zeros_like(g)
        state["step"] += 1
        step = state["step"].item()
        rate = min(lr, step**-0.5) * rms(p).clamp(min=eps[1]) if relative else lr
        p.mul_(1 - lr * weight_decay)
        fresh = step**beta2_decay
        squared = g.square()
        if p.dim() == 2:
            state["row"].lerp_(squared.sum(1, keepdim=True) / p.shape[1], fresh)
            state["col"].lerp_(whole(squared.sum(0, keepdim=True)) / p.shape[0], fresh)
            mean = whole(state["row"].sum(0, keepdim=True)) / p.shape[0]
            variance = state["row"] * state["col"] / mean.clamp(min=eps[0])
        else:
            variance = state["variance"].lerp_(squared, fresh)
        update = g * variance.clamp(min=eps[0] ** 2).rsqrt()
        p.sub_(update * (rate / (rms(update) / clip).clamp(min=1)))
