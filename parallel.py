"""Many processes, one model: the process group, FSDP2, activation checkpointing, micro-batches, the
update, and an Adafactor that is sharded too.

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
Not covered: tensor, pipeline and context parallelism, CPU offload.
"""
import math
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
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
        raise Mistake(f"WORLD_SIZE={size} is set and RANK is not: start train.py with torchrun")
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

    dtype: of the gathered weights. cfg: recompute, compile and reshard of train.py's settings.
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


def make_optimizer(model, cfg):
    """AdamW, Adafactor or Muon by cfg.optimizer, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    if cfg.optimizer == "adafactor":
        return Adafactor(groups, lr=cfg.lr, relative=False)
    if cfg.optimizer == "muon":
        inside = {p for p in model.layers.parameters() if p.dim() >= 2}
        outside = [p for p in matrices if p not in inside]  # embeddings: their rows are apart
        groups[0]["params"] = outside
        groups.append({"params": list(inside), "weight_decay": cfg.weight_decay, "hidden": True})
        return Muon(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


# --- Adafactor -----------------------------------------------------------------------------------

def summed(x):
    """x with the processes' parts of a sum added up, the same on all of them."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def rms(x):
    """Root mean square."""
    return (summed(x.square().sum()) / x.numel()).sqrt()


class Adafactor(torch.optim.Optimizer):
    """Adam's second moment as a row times a column (Shazeer & Stern 2018, Algorithms 4 and 5),
    sharded like the weights.

    The same numbers as torch.optim.Adafactor, which refuses sharded weights. It is written in
    whole-tensor operations: on DTensors, sums over rows and columns become sums over processes.

    relative: lr is multiplied by the weight's root mean square and capped at 1/√step, as in the
    paper; False: lr is absolute, as in CoDA's training. beta2_decay: the second moment's decay is
    1 - step^beta2_decay. clip: largest root mean square of an update.
    """

    def __init__(self, params, lr=1e-2, weight_decay=0.0, relative=True, beta2_decay=-0.8,
                 eps=(2**-23, 1e-3), clip=1.0):
        defaults = {"lr": lr, "weight_decay": weight_decay, "relative": relative,
                    "beta2_decay": beta2_decay, "eps": eps, "clip": clip}
        self.settings = tuple(defaults)  # PyTorch adds to its `defaults` when a state is loaded
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint names it, nobody here passes one
        for group in self.param_groups:
            settings = {name: group[name] for name in self.settings}
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], **settings)

    def update(self, p, g, state, lr, weight_decay, relative, beta2_decay, eps, clip):
        if not state:
            state["step"] = torch.zeros(())
            if p.dim() == 2:
                state["row"] = torch.zeros_like(g[:, :1])  # mean of g² along each row, (rows, 1)
                state["col"] = torch.zeros_like(summed(g.sum(0, keepdim=True)))  # (1, columns)
            else:
                state["variance"] = torch.zeros_like(g)
        state["step"] += 1
        step = state["step"].item()
        rate = lr
        if relative:
            rate = min(lr, step**-0.5) * rms(p).clamp(min=eps[1])
        p.mul_(1 - lr * weight_decay)
        fresh = step**beta2_decay
        squared = g.square()
        if p.dim() == 2:
            state["row"].lerp_(squared.sum(1, keepdim=True) / p.shape[1], fresh)
            state["col"].lerp_(summed(squared.sum(0, keepdim=True)) / p.shape[0], fresh)
            mean = summed(state["row"].sum(0, keepdim=True)) / p.shape[0]  # (1, 1)
            variance = state["row"] * state["col"] / mean.clamp(min=eps[0])
        else:
            variance = state["variance"].lerp_(squared, fresh)
        update = g * variance.clamp(min=eps[0] ** 2).rsqrt()
        p.sub_(update * (rate / (rms(update) / clip).clamp(min=1)))


# --- Muon ----------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups of matrices with hidden=True, AdamW for the others.

    A matrix moves by its momentum, orthogonalized: all directions alike. As in Moonlight (Liu et
    al. 2025, arXiv 2502.16982, Eq. 4) that is scaled to the size of AdamW's updates, so both share
    a learning rate. The same numbers as torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and
    torch.optim.AdamW. On sharded weights every process orthogonalizes the whole matrix and keeps
    its rows.
    """
    MOMENTUM, EPS = 0.95, 1e-8

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, hidden=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay,
                                  "hidden": hidden})

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint names it, nobody here passes one
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["hidden"]:
                    update = self.orthogonal(p.grad, self.state[p])
                else:
                    update = self.adam(p.grad, self.state[p], *group["betas"])
                p.sub_(update, alpha=group["lr"])

    def orthogonal(self, g, state):
        """Nesterov momentum of gradient g, (rows, columns), orthogonalized and scaled."""
        if not state:
            state["momentum"] = torch.zeros_like(g)
        state["momentum"].lerp_(g, 1 - self.MOMENTUM)
        update = g.lerp(state["momentum"], self.MOMENTUM)
        scale = 0.2 * math.sqrt(max(g.shape))
        if not isinstance(update, DTensor):
            return scale * orthogonalized(update)
        whole = orthogonalized(update.full_tensor())
        everywhere = [Replicate()] * g.device_mesh.ndim
        whole = DTensor.from_local(whole, g.device_mesh, everywhere, run_check=False)
        return scale * whole.redistribute(placements=g.placements)

    def adam(self, g, state, beta1, beta2):
        """AdamW's update of gradient g, without the learning rate."""
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(g)
            state["square"] = torch.zeros_like(g)
        state["step"] += 1
        step = state["step"].item()
        mean = state["mean"].lerp_(g, 1 - beta1) / (1 - beta1**step)
        square = state["square"].lerp_(g.square(), 1 - beta2) / (1 - beta2**step)
        return mean / (square.sqrt() + self.EPS)


def orthogonalized(g):
    """The matrix U Vᵀ of g = U S Vᵀ, roughly: five steps of a Newton-Schulz iteration.

    Its singular values end up between 0.7 and 1.2. The coefficients are Jordan's. In bfloat16, as
    in the original. g: (rows, columns).
    """
    x = g.bfloat16() / (g.bfloat16().norm() + 1e-7)
    if len(g) > g.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)
    if len(g) > g.shape[1]:
        x = x.T
    return x.to(g.dtype)
