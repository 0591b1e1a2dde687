"""The plan against what happens: FLOPs that PyTorch counts, bytes of really sharded models, the
tensors that live during a step.

A GPU's step is rehearsed on tensors without data (FakeTensorMode) and in processes that do not
exist (the `fake` backend). FSDP2, autograd and checkpointing are the real ones; `Living` counts the
bytes. Two things stand in for CUDA: the kernel's own fake versions (TRITON_INTERPRET=1 chooses its
path on a CPU), and FusedNorm for the RMSNorm that PyTorch has only there.
"""
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import parallel
import plan
import train
from configurator import Mistake, report
from loader import Batch
from model import ModelConfig, Transformer
from optimizers import Adafactor


@dataclass
class Settings:
    """What plan.py reads of train.py's settings, at a toy's size; rows: of a process."""
    vocab_size: int = 1000
    d_model: int = 64
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2
    head_dim: int = 16
    d_ff: int = 160
    context: int = 64
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    objective: str = "block"
    shift: bool | None = None
    block_size: int = 4
    schedule: str = "clipped"
    t_min: float = 1e-3
    batch_tokens: int = 0
    micro_batch: int = 2
    rows: int = 2
    ranks: int = 8
    recompute: str = "none"
    shard_ranks: int = 0
    reshard: bool = True
    reduce_each: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    gpu_memory: float = 80.0

    def __post_init__(self):
        self.batch_tokens = self.rows * self.ranks * self.context

    @property
    def model(self):
        names = [f.name for f in fields(ModelConfig) if hasattr(self, f.name)]
        return ModelConfig(**{name: getattr(self, name) for name in names})


# the 8B's widths; each test chooses the `n_layer` that it can afford
EIGHT_B = dict(vocab_size=155136, d_model=4096, n_layer=2, n_head=32, n_kv_head=8, head_dim=128,
               d_ff=14336, context=8192, micro_batch=1)


# --- in processes of their own --------------------------------------------------------------------
# `python tests/test_plan.py FUNCTION ARGUMENTS` prints what the function returns

class FusedNorm(torch.autograd.Function):
    """Shapes of CUDA's RMSNorm: it saves its input and 1/rms, a CPU saves each of its steps."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32), weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, _, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Living(TorchDispatchMode):
    """Counts the bytes of all living tensors that were made under it or shown to it.

    now: their bytes at present. most: at the fullest moment so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.now, self.most = {}, 0, 0
        self.paused = False

    def see(self, storage):
        if id(storage) not in self.bytes:
            self.bytes[id(storage)] = 0
            weakref.finalize(storage, self.forget, id(storage))
        self.now += storage.nbytes() - self.bytes[id(storage)]
        self.bytes[id(storage)] = storage.nbytes()
        self.most = max(self.most, self.now)

    def forget(self, key):
        self.now -= self.bytes.pop(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor first: its local operations then come by
        out = op(*args, **(kwargs or {}))
        if self.paused:
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_
        self.propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize_(storage, size):  # FSDP2 frees gathered weights by this, which no mode sees
            self.resize(storage, size)
            if id(storage) in self.bytes:
                self.see(storage)

        def propagate(propagator, schema):
            # DTensor learns an operation's output shape by running it once on fake tensors of the
            # whole weights. They take no memory, and in a rehearsal they would look like the
            # others: torch 2.11 does this for the optimizer's update too.
            self.paused = True
            try:
                return self.propagate(propagator, schema)
            finally:
                self.paused = False

        torch.UntypedStorage.resize_ = resize_
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self.propagate
        return super().__exit__(*error)


def rehearse(cfg, rank=0):
    """Join cfg.ranks processes that do not exist. Returns the mesh, as parallel.start has it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cfg.ranks)
    sharers = cfg.shard_ranks or cfg.ranks
    shape = (cfg.ranks // sharers, sharers)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return mesh if cfg.ranks > sharers else mesh["shard"]


def build(cfg, mesh):
    net = Transformer(cfg.model)
    parallel.recompute_blocks(net, cfg.recompute)
    if mesh is not None:
        parallel.shard(net, mesh, getattr(torch, cfg.dtype), cfg.reshard)
    return net


def make_optimizer(cfg, net):
    if cfg.optimizer == "adafactor":
        return Adafactor(net.parameters(), relative=False)
    return torch.optim.AdamW(net.parameters(), fused=True)


def losses(cfg, net, rows, device="cpu"):
    """diffusion.token_losses of rows whose tokens are all masked, without looking at data."""
    x0, xt = torch.zeros(2, rows, cfg.context, dtype=torch.long, device=device)
    start = torch.zeros(rows, cfg.context, dtype=torch.int32, device=device)
    recipe = diffusion.Recipe(cfg.objective, shift=cfg.shift, mask_id=0)
    tokens, queries = xt, cfg.context
    if cfg.objective == "block":
        tokens = torch.cat([xt, x0], 1)
        if cfg.shift:
            queries = 2 * cfg.context
    spans = diffusion.spans_for(recipe, start, start + cfg.context)
    read = torch.arange(rows * cfg.context, device=device)
    hidden = net(tokens, spans, queries=queries, read=read)
    return net.token_loss(hidden, x0.flatten())


def step(cfg, net, optimizer, device="cpu"):
    """A training step as train.py makes it."""
    for a in range(0, cfg.rows, cfg.micro_batch):
        net.set_requires_gradient_sync(cfg.reduce_each or a + cfg.micro_batch >= cfg.rows)
        losses(cfg, net, min(cfg.micro_batch, cfg.rows - a), device).sum().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def rehearsed_peaks(cases):
    """The most bytes in the second step of each: its optimizer state exists from the first one."""
    nn.RMSNorm.forward = lambda self, x: FusedNorm.apply(x, self.weight)
    torch.Tensor.item = lambda self: 1.0  # Adafactor asks for its step
    found = []
    for cfg in cases:
        mesh = rehearse(cfg)
        with FakeTensorMode():
            net = build(cfg, mesh)
            optimizer, living = make_optimizer(cfg, net), Living()
            for p in net.parameters():
                living.see(p.to_local().untyped_storage())
            with living:
                step(cfg, net, optimizer)
                living.most = living.now
                step(cfg, net, optimizer)
        found.append(living.most)
        dist.destroy_process_group()
    return found


def saved_bytes(cases, real):
    """Of each case, the bytes that cfg.rows rows keep for the backward pass.

    Counted twice: [tensors that live on, tensors that autograd was seen to save].
    real: for each case, whether its tensors have numbers, and Triton interprets the kernel.
    """
    nn.RMSNorm.forward = lambda self, x: FusedNorm.apply(x, self.weight)
    found = []
    for cfg, with_numbers in zip(cases, real):
        torch.set_default_dtype(getattr(torch, cfg.dtype))
        with nullcontext() if with_numbers else FakeTensorMode():
            net, storages = build(cfg, None), {}
            ours = {p.untyped_storage()._cdata for p in net.parameters()}

            def pack(x):
                storages[x.untyped_storage()._cdata] = x.untyped_storage()
                return x
            living = Living()
            for p in net.parameters():
                living.see(p.untyped_storage())
            weights = living.now
            with living, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = losses(cfg, net, cfg.rows)
                gc.collect()
        saved = sum(s.nbytes() for key, s in storages.items() if key not in ours)
        found.append([living.now - weights, saved])
        del loss
    return found


def local_numbers(cases):
    """Of each case, for its first and last process: [numbers it holds, numbers of all weights]."""
    found = []
    for cfg in cases:
        for rank in (0, cfg.ranks - 1):
            with torch.device("meta"):
                net = Transformer(cfg.model)
            whole = sum(p.numel() for p in net.parameters())
            parallel.shard(net, rehearse(cfg, rank), torch.bfloat16)
            found.append([sum(p.to_local().numel() for p in net.parameters()), whole])
            dist.destroy_process_group()
    return found


def sharded_bytes(cases, store):
    """One of several real processes (gloo).

    Of each case, the bytes of [weights, gradients, optimizer, sums that are not yet exchanged].
    """
    rank, size, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)

    def held(tensors):
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        storages = [t.untyped_storage() for t in local]
        return sum({s._cdata: s.nbytes() for s in storages}.values())

    for cfg in cases:
        net = build(cfg, parallel.start("cpu", cfg.shard_ranks).mesh)
        optimizer = make_optimizer(cfg, net)
        net.set_requires_gradient_sync(False)
        losses(cfg, net, 1).sum().backward()
        states = [net._get_fsdp_state(), *(layer._get_fsdp_state() for layer in net.layers)]
        weights = [p for state in states for p in state._fsdp_param_group.fsdp_params]
        if cfg.dtype == "bfloat16":
            sums = held(p.unsharded_accumulated_grad for p in weights)
        else:
            sums = held(p._unsharded_param.grad for p in weights)
        net.set_requires_gradient_sync(True)
        losses(cfg, net, 1).sum().backward()
        gradients = held(p.grad for p in net.parameters())
        optimizer.step()
        moments = held(t for state in optimizer.state.values() for t in state.values())
        found.append([held(net.parameters()), gradients, moments, sums])
    dist.destroy_process_group()
    return found


def on_a_gpu(cases):
    """The most bytes in the second step of each on a GPU: the first chooses the kernel's tiles."""
    found = []
    for cfg in cases:
        world = parallel.start("cuda")
        with torch.device("meta"):
            net = build(cfg, world.mesh)
        net.to_empty(device=world.device).init_weights()
        optimizer = make_optimizer(cfg, net)
        step(cfg, net, optimizer, world.device)
        torch.cuda.reset_peak_memory_stats()
        step(cfg, net, optimizer, world.device)
        found.append(plan.peak_memory(world.device))
        del net, optimizer
    return found


def outside(function, cases, *more, **environment):
    """Start function(cases, *more) in a process of its own."""
    arguments = json.dumps([[asdict(cfg) for cfg in cases], *more])
    command = [sys.executable, __file__, function.__name__, arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def result(process):
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


# --- memory ---------------------------------------------------------------------------------------

UNEVEN = Settings(vocab_size=37, d_model=24, n_head=3, n_kv_head=1, head_dim=10, d_ff=17, n_layer=2,
                  context=8)


def sharded(cases, processes, tmp_path):
    environment = dict(WORLD_SIZE=str(processes), MASTER_ADDR="", MASTER_PORT="")
    store = str(tmp_path / "store")
    started = [outside(sharded_bytes, cases, store, RANK=str(rank), **environment)
               for rank in range(processes)]
    first, *_, last = [result(process) for process in started]
    for cfg, (weights, gradients, optimizer, sums), others in zip(cases, first, last):
        run = replace(cfg, rows=2, micro_batch=1, ranks=processes)
        planned = plan.memory(cfg.model, run, processes)
        assert weights == planned["update"]["weights"] == others[0]
        assert gradients == planned["update"]["gradients"] == others[1]
        assert optimizer == planned["update"]["optimizer"] >= others[2]
        root, block = plan.weight_shapes(cfg.model)
        whole = plan.numel(root + cfg.n_layer * block)
        assert sums == 4 * whole == planned["loss"]["accumulated gradients"]


@pytest.mark.slow
def test_weights_gradients_and_optimizer_of_two_processes_take_the_planned_bytes(tmp_path):
    others = [replace(UNEVEN, optimizer="adafactor", tie_embeddings=True, qkv_bias=True),
              replace(UNEVEN, qk_norm=True, dtype="float32", objective="ar")]
    sharded([UNEVEN, *others], 2, tmp_path)


@pytest.mark.slow
def test_so_do_those_of_four_processes_in_pairs_that_share_a_copy(tmp_path):
    uneven = replace(UNEVEN, shard_ranks=2)
    sharded([uneven, replace(uneven, optimizer="adafactor")], 4, tmp_path)


def test_the_8b_is_sharded_into_the_planned_parts():
    cases = [Settings(**EIGHT_B | {"n_layer": 32}, ranks=ranks) for ranks in (8, 64)]
    found = result(outside(local_numbers, cases))
    for cfg, (first, whole), (last, _) in zip(cases, found[::2], found[1::2]):
        root, block = plan.weight_shapes(cfg.model)
        assert whole == plan.numel(root) + 32 * plan.numel(block) == 8_250_462_208
        part = plan.numel(root, cfg.ranks) + 32 * plan.numel(block, cfg.ranks)
        assert first == last == part == whole // cfg.ranks


MODELS = [dict(objective="ar", qkv_bias=True), dict(objective="bidirectional", qk_norm=True),
          dict(objective="block"), dict(objective="block", shift=True)]


def to_save(half):
    """Half of all cases: each model with each `recompute`, in either of two dtypes."""
    cases = []
    for r, recompute in enumerate(("none", "selective", "full")):
        for m, of_model in enumerate(MODELS):
            dtype = ("bfloat16", "float32")[(r + m + half) % 2]
            cases.append(Settings(**of_model, recompute=recompute, dtype=dtype))
    return cases


def interpreter_fails():
    """triton 3.6 interprets `int(array of one number)`, which numpy 2.4 refuses."""
    triton = pytest.importorskip("triton")
    return triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.slow
def test_a_rehearsal_counts_what_real_tensors_take():
    if interpreter_fails():
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    tiny = [replace(cfg, context=16, rows=1, vocab_size=50, n_layer=1) for cfg in to_save(0)[::5]]
    assert {cfg.dtype for cfg in tiny} == {"bfloat16"}
    real = [False] * len(tiny) + [True] * len(tiny)
    found = result(outside(saved_bytes, tiny + tiny, real, TRITON_INTERPRET="1"))
    assert found[:len(tiny)] == found[len(tiny):]


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_activations_take_the_planned_bytes(half):
    cases = to_save(half)
    found = result(outside(saved_bytes, cases, [False] * len(cases), TRITON_INTERPRET="1"))
    for cfg, (living, saved) in zip(cases, found, strict=True):
        (kept, _), (last, _), rest = plan.activation_bytes(cfg.model, cfg, cfg.rows)
        log_probabilities = 4 * cfg.rows * cfg.context * cfg.vocab_size
        planned = (cfg.n_layer - 1) * kept + last + rest + log_probabilities
        assert planned == pytest.approx(living, rel=0.02), cfg
        if cfg.recompute == "none":  # autograd's hooks do not see what checkpointing keeps
            assert planned == pytest.approx(saved, rel=0.02), cfg


SMALL = dict(vocab_size=32000, head_dim=64, context=1024, ranks=1, tie_embeddings=True,
             qkv_bias=True)
PEAKS = [  # between them, they peak in every moment of a step
    Settings(**EIGHT_B, ranks=64, recompute="selective", qk_norm=True),
    Settings(**EIGHT_B, ranks=64, rows=1, recompute="full"),
    Settings(**EIGHT_B | {"context": 256}, objective="ar", tie_embeddings=True, reduce_each=True,
             optimizer="adafactor"),
    Settings(**EIGHT_B | {"context": 256, "n_layer": 4}, ranks=8, rows=3, objective="ar"),
    # from here on, slow
    Settings(**EIGHT_B | {"context": 512}, ranks=1, rows=1, recompute="full",
             optimizer="adafactor"),
    Settings(**EIGHT_B | {"context": 1024, "n_layer": 4}, ranks=64, rows=1, objective="ar",
             reshard=False),
    Settings(**EIGHT_B | {"vocab_size": 2000}, ranks=2, rows=2, objective="ar", reduce_each=True),
    Settings(**SMALL, d_model=256, n_layer=2, n_head=4, n_kv_head=2, d_ff=768, micro_batch=4,
             rows=8),
    Settings(**EIGHT_B | {"context": 1024}, ranks=4, shard_ranks=2, rows=1,
             objective="bidirectional"),
    Settings(**EIGHT_B | {"n_layer": 5}, ranks=8, rows=1, reshard=False, recompute="full"),
    Settings(**EIGHT_B | {"context": 512, "n_layer": 5}, ranks=8, objective="ar",
             tie_embeddings=True, recompute="selective"),
    Settings(**EIGHT_B | {"context": 2048}, ranks=8, rows=1, dtype="float32"),
    Settings(**EIGHT_B | {"vocab_size": 2000, "n_layer": 3}, ranks=64, rows=4, objective="ar",
             reduce_each=True),
    Settings(**SMALL, d_model=768, n_layer=12, n_head=12, n_kv_head=4, d_ff=2048, micro_batch=8,
             rows=16),
]


@pytest.mark.parametrize("cases", [PEAKS[:2], pytest.param(PEAKS[2:], marks=pytest.mark.slow)])
def test_the_peak_of_a_step_is_the_planned_one(cases):
    planned = [plan.peak(plan.memory(cfg.model, cfg, cfg.ranks)) for cfg in cases]
    rehearsed = result(outside(rehearsed_peaks, cases, TRITON_INTERPRET="1"))
    ratios = [a / b for a, b in zip(planned, rehearsed)]
    assert ratios == pytest.approx([1] * len(cases), rel=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_the_planned_one():
    cases = [replace(PEAKS[-1], recompute=mode) for mode in ("none", "selective", "full")]
    planned = [plan.peak(plan.memory(cfg.model, cfg, 1)) for cfg in cases]
    ratios = [a / b for a, b in zip(planned, result(outside(on_a_gpu, cases)))]
    assert ratios == pytest.approx([1] * 3, rel=0.1)


@pytest.mark.parametrize("optimizer, needs", [("adamw", 132.0), ("adafactor", 66.0)])
def test_a_model_that_exceeds_a_cpus_memory_is_refused(monkeypatch, optimizer, needs):
    model_cfg = Settings(**EIGHT_B | {"n_layer": 32}).model

    def check(gigabytes, device_type="cpu"):
        machine = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 1e9 / 4096}
        monkeypatch.setattr(os, "sysconf", machine.get)
        plan.check_memory(model_cfg, optimizer, device_type)

    says = (f"a model of 8,250,462,208 parameters needs {needs} GB for its weights, gradients and "
            f"optimizer state; this machine has {needs - 0.1:.1f} GB; .* needs less")
    with pytest.raises(Mistake, match=says):
        check(needs - 0.1)
    check(needs + 0.1)
    check(needs - 0.1, "cuda")  # the GPU's allocator says so


def test_a_reference_is_another_copy_of_the_weights(monkeypatch):
    model_cfg = Settings(**EIGHT_B | {"n_layer": 32}).model
    machine = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 164.9e9 / 4096}  # 132.0 GB and 33.0 GB
    monkeypatch.setattr(os, "sysconf", machine.get)
    plan.check_memory(model_cfg, "adamw", "cpu", reference=False)
    says = "needs 165.0 GB for its weights, reference, gradients and optimizer state; .* 164.9 GB"
    with pytest.raises(Mistake, match=says):
        plan.check_memory(model_cfg, "adamw", "cpu", reference=True)
    machine["SC_PHYS_PAGES"] = 165.1e9 / 4096
    plan.check_memory(model_cfg, "adamw", "cpu", reference=True)


def test_each_of_several_machines_needs_memory_for_its_share(monkeypatch):
    model_cfg = Settings(**EIGHT_B | {"n_layer": 32}).model
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 35e9 / 4096}.get)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plan.check_memory(model_cfg, "adamw", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(Mistake, match="needs 66.0 GB .* has 35.0 GB"):
        plan.check_memory(model_cfg, "adamw", "cpu")


# --- FLOPs and rates ------------------------------------------------------------------------------

@pytest.mark.parametrize("objective, shift", [
    ("bidirectional", False), ("block", False), ("block", True)])
def test_the_flops_of_a_step_are_those_that_pytorch_counts(objective, shift):
    # with one block per row every tile of queries sees all of its keys: no masked pair is computed
    cfg = Settings(objective=objective, shift=shift, block_size=64, context=64, rows=2, ranks=1)
    net, start = Transformer(cfg.model), torch.zeros(2, cfg.context, dtype=torch.int32)
    recipe = diffusion.Recipe(objective, shift=shift, block_size=64, mask_id=0)
    spans = diffusion.spans_for(recipe, start, start + cfg.context)
    everywhere, queries = plan.positions(cfg), plan.last_queries(cfg)
    tokens = torch.zeros(2, everywhere // 2, dtype=torch.long)
    counter, in_bmm = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counter, in_bmm:
        hidden = net(tokens, spans, queries=queries // 2, read=torch.arange(29))
        net.token_loss(hidden, torch.zeros(29, dtype=torch.long)).sum().backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm")
    others = sum(counts.values())
    assert others == plan.step_flops(cfg.model, everywhere, 29, 0, queries)
    assert others + attention == plan.step_flops(cfg.model, everywhere, 29, spans.pairs, queries)
    assert spans.pairs == 2 * plan.row_pairs(cfg) == everywhere * cfg.context
    assert (queries < everywhere) == (objective == "block" and not shift)


@pytest.mark.parametrize("schedule, objective, block_size", [
    ("uniform", "block", 4), ("count", "block", 4), ("clipped", "block", 4),
    ("clipped", "block", 2), ("clipped", "block", 1), ("clipped", "bidirectional", 4),
    ("count", "ar_diffusion", 4), ("clipped", "ar", 4)])
def test_the_expected_mask_rate_is_that_of_the_noise(schedule, objective, block_size):
    noise = dict(objective=objective, block_size=block_size, schedule=schedule, t_min=0.2)
    rows = 400
    start = torch.zeros(rows, 32, dtype=torch.int32)
    batch = Batch(x0=start.long(), doc_start=start, doc_end=start + 32, maskable=start == 0,
                  epochs=np.zeros(rows, int))
    draw = diffusion.Draw(seed=0, step=0, rows=range(rows), batch_rows=rows)
    noised = diffusion.corrupt(batch, diffusion.Recipe(**noise, mask_id=0), draw)
    planned = plan.mask_rate(Settings(**noise, context=32))
    assert noised.masked.float().mean() == pytest.approx(planned, abs=0.008)
    assert plan.mask_rate(Settings()) == pytest.approx(0.563, abs=5e-4)


# --- the printed plan -----------------------------------------------------------------------------

BIG = ["--vocab_size=155136", "--d_model=4096", "--n_layer=32", "--n_head=32", "--n_kv_head=8",
       "--head_dim=128", "--d_ff=14336", "--tie_embeddings=false", "--context=8192",
       "--batch_tokens=8388608", "--micro_batch=1", "--max_steps=100000"]
FULL = ["--recompute=full"]
FULL_EACH = [*FULL, "--reduce_each=true"]


def plan_of(capsys, *argv):
    """(what it prints, its error as the user reads it)."""
    try:
        assert not train.main([*argv, "--dry_run=true"])
    except Mistake as mistake:
        report(Mistake, mistake, None)
    out, error = capsys.readouterr()
    return out, error.strip()


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_the_8b_is_planned(capsys, ranks):
    out, error = plan_of(capsys, *BIG, *FULL, f"--ranks={ranks}")
    assert not error and "8,250,462,208" in out
    assert f"{ranks:,} processes" in out and out.endswith("gpu_memory=80\n")


@pytest.mark.parametrize("settings, says", [
    (["--ranks=64"], "exceeds gpu_memory=80: --recompute=full needs 4"),
    (["--ranks=64", *FULL, "--gpu_memory=40"], "exceeds gpu_memory=40: --reduce_each=true needs "),
    (["--ranks=64", *FULL, "--gpu_memory=3"],
     "no recompute, micro_batch or number of ranks makes it fit"),
    (["--ranks=8", *FULL_EACH, "--gpu_memory=26"], ": --ranks=16 needs "),
    (["--ranks=8", *FULL_EACH, "--gpu_memory=26", "--batch_tokens=196608"], ": --ranks=24 needs "),
    (["--ranks=8", "--shard_ranks=2", *FULL, "--gpu_memory=70"], ": --shard_ranks=0 needs "),
    (["--ranks=64", "--micro_batch=8", *FULL, "--gpu_memory=60"], ": --micro_batch=2 needs "),
    (["--ranks=7"], "7 processes cannot share evenly; 4 can, and batch_tokens=8372224"),
    (["--ranks=64", "--shard_ranks=7"],
     "shard_ranks=7 must divide the number of processes, 64, as 8 does"),
    (["--ranks=64", "--mfu=0"], "mfu=0 does not fit: mfu is a float from 1e-06 to 1"),
    (["--ranks=1000000000"], "ranks is an int from 0 to 1,048,576"),
    (["--vocab_size=0", "--data=/nowhere"], "give --vocab_size"),
])
def test_what_cannot_work_is_refused_with_what_can(capsys, settings, says):
    _, error = plan_of(capsys, *BIG, *settings)
    assert error.startswith("error: ") and says in error and "\n" not in error
    words = error.partition(": ")[2].split()
    advice = [word for word in words if word.startswith("--") and "=" in word]
    if advice:
        out, error = plan_of(capsys, *BIG, *settings, *advice)
        assert not error and "\npeak " in out


def test_samples_have_no_tokenizer_to_plan_with(capsys):
    _, error = plan_of(capsys, *BIG, "--vocab_size=0", "--data=data/mine/train.jsonl")
    assert error == (
        "error: vocab_size=0 takes the tokenizer's size, but data/mine/train.jsonl has no "
        "tokenizer: name the model to fine-tune with --init_from=FOLDER; to plan without it, give "
        "--vocab_size")


@pytest.mark.parametrize("name, value", [
    ("context", "0"), ("context", "1"), ("block_size", "0"), ("mfu", "0"), ("mfu", "1e999"),
    ("peak_tflops", "1e999"), ("gpu_memory", "0"), ("gpu_memory", "1e999"), ("ranks", "-1"),
    ("micro_batch", "0"), ("batch_tokens", "0"), ("vocab_size", "-1")])
def test_numbers_that_cannot_be_planned_with_are_named(capsys, name, value):
    _, error = plan_of(capsys, *BIG, "--ranks=64", f"--{name}={value}")
    assert error.startswith(f"error: {name}=") and "\n" not in error


def test_advice_comes_soon_however_much_there_is_to_try(capsys):
    began = time.process_time()
    _, error = plan_of(capsys, *BIG, "--n_layer=1000", "--context=256", "--batch_tokens=184504320",
                       "--micro_batch=1048576", "--shard_ranks=1", "--ranks=1", "--gpu_memory=0.01")
    assert "no recompute, micro_batch or number of ranks makes it fit" in error
    assert time.process_time() - began < 20  # seconds; 720,720 rows have 240 divisors


def test_the_command_ends_with_one_line():
    command = [sys.executable, "train.py", *BIG, "--ranks=7", "--dry_run=true"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


if __name__ == "__main__":
    name, (cases, *more) = sys.argv[1], json.loads(sys.argv[2])
    known = {f.name for f in fields(Settings)}
    cases = [Settings(**{k: v for k, v in case.items() if k in known}) for case in cases]
    print(json.dumps(globals()[name](cases, *more)))
