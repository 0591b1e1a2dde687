"""The training loop, top to bottom: pretraining from scratch and continual pretraining, of any of the four objectives.

    python train.py config/toy_ar.py                    # a small autoregressive model of real code
    python train.py config/toy.py                       # block diffusion, continued from its weights
    python train.py config/toy.py --resume=true         # go on where it left off, if it was begun: the same numbers
    torchrun --nproc_per_node=8 train.py config/8b.py   # the same loop on eight GPUs; parallel.py says how

However many processes share the work, rows and noise are the same, and losses to float32's or bfloat16's rounding.

Not covered: supervised fine-tuning.
"""
import ctypes
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import huggingface
import parallel
import plan
from attention_kernel import say_if_tiled, why_tiled
from configurator import configure
from diffusion import Recipe, corrupt, largest_block, nelbo, spans_for, u_max, weighted_loss
from huggingface import load_tokenizer
from loader import Windows, prefetch
from model import ModelConfig, Transformer


@dataclass
class Config:
    # the run
    out: str = "out/toy"  # folder of the run: checkpoints and metrics.jsonl
    init_from: str = "scratch"  # 'scratch', 'resume' (out's newest checkpoint), or a folder or Hub name to take weights from
    resume: bool = False  # go on from out's newest checkpoint if it has one, else begin as init_from says: for schedulers
    seed: int = 1337  # of the weights, the data order and the noise
    # data
    data: str = "data/stdlib"  # folder that a prepare.py wrote
    context: int = 256  # T: clean tokens a row
    batch_tokens: int = 4096  # clean tokens an optimizer step, over all rows
    micro_batch: int = 16  # rows a forward pass of one process; more passes accumulate into one step
    cross_document: bool = False  # True: all of a row's documents see each other, as in Stable-DiffCoder's packing
    # model (init_from another folder: its own sizes are used)
    vocab_size: int = 0  # rows of the embedding; 0: as many as the tokenizer has ids
    bos_token: str = ""  # name of the token that begins a document; empty: the tokenizer's, if any; a new name is added
    mask_token: str = ""  # name of the mask; empty: the tokenizer's; a new name is added
    d_model: int = 192  # width of the residual stream
    n_layer: int = 4  # transformer blocks
    n_head: int = 3  # query heads
    n_kv_head: int = 1  # key/value heads, each shared by n_head / n_kv_head query heads
    head_dim: int = 64  # channels a head
    d_ff: int = 512  # width of the MLP
    rope_theta: float = 1e6  # base of the rotary embedding
    norm_eps: float = 1e-6  # epsilon of the RMSNorms
    qkv_bias: bool = False  # biases on q, k, v (Qwen2)
    qk_norm: bool = False  # RMSNorm on q and k (Qwen3)
    tie_embeddings: bool = True  # one matrix for the embedding and the vocabulary projection
    # objective
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] = "block"  # what is learned; see diffusion.py
    shift: bool | None = None  # predict token i at position i - 1; none: only under ar
    block_size: int = 4  # K: tokens a block, under objective=block
    schedule: Literal["uniform", "clipped", "count"] = "clipped"  # mask rate and weight as functions of t
    t_min: float = 1e-3  # smallest mask rate under schedule=uniform
    antithetic: bool = True  # spread t evenly over blocks and rows
    u_warmup_steps: int = 0  # S: steps over which the cap on t rises from u_init to 1, with weights of 1
    u_init: float = 1e-3  # the cap at step 0
    strategies: tuple = ((0.0, 0.0, 0.0),)  # CoDA's rates of S1, S2, S3, one triple an epoch
    anneal_steps: int = 0  # steps over which causal attention opens to the whole document, under objective=bidirectional
    # optimizer
    max_steps: int = 1000  # optimizer steps
    lr: float = 2e-3  # peak learning rate
    min_lr: float = 2e-4  # learning rate at the end of the cosine
    lr_warmup_steps: int = 50  # steps of linear rise to lr
    lr_decay: Literal["cosine", "linear"] = "cosine"  # how it falls from lr to min_lr
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: absolute learning rates, as in CoDA's training
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    # evaluation and saving
    eval_every: int = 250  # steps between evaluations, and one at the end; 0: never
    eval_windows: int = 32  # windows of the val split, spread evenly, the same ones each time
    eval_draws: int = 8  # masks a window where the NELBO cannot be enumerated
    save_every: int = 250  # steps between checkpoints, and one at the end
    keep: int = 2  # newest checkpoints kept
    log: Literal["none", "tensorboard", "wandb"] = "none"  # where the metrics go besides metrics.jsonl
    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 where it is fast
    threads: int = 0  # CPU threads of a process; 0: all cores, or what torchrun gives
    compile: bool = False  # torch.compile of each transformer block, on a CPU with deterministic algorithms
    recompute: Literal["none", "selective", "full"] = "none"  # activations computed again in the backward pass, to save memory
    shard_ranks: int = 0  # processes that share one copy of the weights; 0: all; a node's GPUs: HSDP
    reshard: bool = True  # give back a block's gathered weights after its forward pass; False: keep them for the backward
    reduce_each: bool = False  # exchange gradients after each micro-batch, not each step: more traffic, no full-size gradient
    peak_tflops: float = 0.0  # of one device, for the MFU; 0: looked up by its name, where it is known
    # planning
    dry_run: bool = False  # print what the run would take (see plan.py) and do nothing
    ranks: int = 0  # dry_run: processes to plan for; 0: as many as run
    gpu_memory: float = 80.0  # dry_run: memory of a device, in GB (10⁹ bytes)
    mfu: float = 0.4  # dry_run: share of the device's peak FLOPs that the run is expected to reach


cfg, given = configure(Config)


def check(cfg):
    """Settings that cannot go together, found before anything is loaded."""
    if cfg.batch_tokens % cfg.context:
        near = max(1, round(cfg.batch_tokens / cfg.context)) * cfg.context
        raise ValueError(f"batch_tokens={cfg.batch_tokens} must be a multiple of context={cfg.context}, such as {near}")
    for name in ("context", "batch_tokens", "micro_batch", "max_steps", "save_every", "keep", "eval_windows"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be 1 or more")
    for name in ("eval_every", "u_warmup_steps", "lr_warmup_steps", "anneal_steps", "threads", "weight_decay", "min_lr", "seed",
                 "vocab_size", "shard_ranks", "peak_tflops", "ranks"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must be 0 or more")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be in [0, 1)")
    if cfg.eval_draws < 2:
        raise ValueError(f"eval_draws={cfg.eval_draws} must be 2 or more: a standard error takes two")
    for name in ("lr", "grad_clip"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must be above 0")


def rows_of(rank, size, cfg):
    """The rows of the global batch that a process computes, a range. Raises ValueError where all cannot have as many."""
    batch_rows = cfg.batch_tokens // cfg.context
    if batch_rows % size:
        near = max(1, round(batch_rows / size)) * size * cfg.context
        fewer = max(n for n in range(1, size) if batch_rows % n == 0)
        raise ValueError(f"batch_tokens={cfg.batch_tokens} is {batch_rows} rows of context={cfg.context}, which {size} "
                         f"processes cannot share evenly; {fewer} can, and batch_tokens={near}")
    return range(rank * batch_rows // size, (rank + 1) * batch_rows // size)


def check_resumed(cfg, saved):
    """A resumed run must go on as the same run; what may change is said. saved: the checkpoint's settings."""
    changed = {k: (saved[k], v) for k, v in json.loads(json.dumps(asdict(cfg))).items() if k in saved and saved[k] != v}
    for key in ("objective", "shift", "block_size", "schedule", "seed", "context", "batch_tokens", "cross_document"):
        if key in changed:
            raise ValueError(f"{key}={changed[key][1]} but the run in {cfg.out} has {key}={changed[key][0]}: resume with the "
                             "same settings, or start another run with --out=FOLDER")
    said = [f"{k} {old} -> {new}" for k, (old, new) in changed.items()
            if k not in ("init_from", "resume", "out", "threads", "dtype", "device")]
    if said:
        say(f"resuming with other settings: {', '.join(said)}")


def pick_machine(cfg, saved):
    """dtype and threads, which decide the bits: from the hardware once, then from the checkpoint.

    saved: what the resumed checkpoint was made with, or None. Returns a dict of JSON values.
    """
    device = world.device.type
    fast_bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                 device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
    found = {"device": device, "dtype": "bfloat16" if fast_bf16 else "float32", "threads": torch.get_num_threads(),
             "processes": world.size, "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if saved:
        found |= {k: saved[k] for k in ("dtype", "threads")}
    found |= {"dtype": cfg.dtype} if cfg.dtype != "auto" else {}
    found |= {"threads": cfg.threads} if cfg.threads else {}
    if saved and saved != found:
        changed = ", ".join(f"{k} {saved.get(k)} -> {found[k]}" for k in found if saved.get(k) != found[k])
        say(f"resuming under other conditions ({changed}): numbers may differ in their last digits")
    return found


def keep_freed_memory():
    """Ask glibc not to hand large buffers back to the system: a CPU step spent a quarter of its time getting them again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: allocations below 1 GB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def describe(cfg, given, folder):
    """What the model will be: (ModelConfig, Tokenizer). folder: of its weights, or None for new ones."""
    data = load_tokenizer(cfg.data)
    if folder is None:
        tok = load_tokenizer(cfg.data, cfg.bos_token, cfg.mask_token)
        sizes = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}
        model_cfg = ModelConfig(**sizes | {"vocab_size": cfg.vocab_size or tok.vocab_size})
    else:
        model_cfg, tok, _ = huggingface.read_description(folder, cfg.mask_token, cfg.bos_token, objective="ar")
        check_fits(cfg, given, folder, model_cfg)
        if not data.hf.get_vocab().items() <= tok.hf.get_vocab().items():  # ours may have a new <mask>
            raise ValueError(f"{cfg.data} was prepared with another tokenizer than the one in {folder}: prepare it "
                             f"again with --tokenizer={folder}, or train from scratch")
    if data.bos_id != tok.bos_id:  # the model would never see how its prompts begin
        raise ValueError(f"documents begin with {data.bos_id} in {cfg.data} and with {tok.bos_id} for the model: "
                         "prepare the data with the same --bos_token")
    return model_cfg, tok


def check_fits(cfg, given, folder, model_cfg):
    """The model of a folder has the sizes that were asked for, and room for the context."""
    for name in given & {f.name for f in fields(ModelConfig)} - {"context"}:
        if getattr(cfg, name) != getattr(model_cfg, name):
            raise ValueError(f"{name}={getattr(cfg, name)} was asked for, but the model in {folder} has "
                             f"{getattr(model_cfg, name)}")
    if cfg.context > model_cfg.context:
        raise ValueError(f"context={cfg.context} is longer than the {model_cfg.context} of the model in {folder}")


def build(cfg, model_cfg, folder):
    """The model on its device, sharded where several processes share it, with the folder's weights or new ones."""
    with torch.device("meta"):  # shapes alone: no process ever holds the whole model
        model = Transformer(model_cfg)
    parallel.recompute_blocks(model, cfg.recompute)
    if cfg.compile:
        torch.use_deterministic_algorithms(world.device.type == "cpu")  # without, two compiled CPU runs were seen to differ
        parallel.compile_blocks(model)
        why = why_tiled(world.device.type, getattr(torch, machine["dtype"]), model_cfg.head_dim)
        if why and cfg.recompute != "none":
            say(f"compile=true compiles nothing with recompute={cfg.recompute} where attention is PyTorch tiles, since {why}")
    if world.mesh is not None:
        parallel.shard(model, world.mesh, getattr(torch, machine["dtype"]), cfg.reshard)
    model.to_empty(device=world.device)
    if folder is None:
        torch.manual_seed(cfg.seed)
        model.init_weights()
    else:
        huggingface.load_weights(folder, model, parallel.my_rows)
    return model


def make_optimizer(cfg, model):
    """AdamW or Adafactor, with weight decay on the matrices alone."""
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    if cfg.optimizer == "adafactor":
        return parallel.Adafactor(groups, lr=cfg.lr, relative=False)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


def tracker(cfg):
    """A function of a dict of metrics that shows them in TensorBoard or Weights & Biases, or does nothing."""
    if cfg.log == "none" or world.rank > 0:
        return lambda found: None
    try:
        if cfg.log == "wandb":
            import wandb
            run = wandb.init(project="nanoDiffCoder", name=out.name, dir=out, config=asdict(cfg), id=out.name, resume="allow")
            return lambda found: run.log(found, step=found["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"log={cfg.log!r} needs a package that is not installed: pip install {cfg.log}") from error
    writer = SummaryWriter(out)
    return lambda found: [writer.add_scalar(name, value, found["step"]) for name, value in found.items() if value is not None]


def learning_rate(step, cfg):
    """Linear warmup to lr, then a cosine or a line down to min_lr at max_steps."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.lr_decay == "cosine" else 1 - done
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


# --- set up -------------------------------------------------------------------------------------------------------
check(cfg)
if cfg.dry_run:
    plan.show(cfg, rows_of)
    sys.exit(0)
out = Path(cfg.out)
world = parallel.start(parallel.pick_device(cfg.device), cfg.shard_ranks)
say = print if world.rank == 0 else lambda *text: None
rows = rows_of(world.rank, world.size, cfg)
batch_rows = cfg.batch_tokens // cfg.context

# torchrun restarts a job that lost a process with the same arguments: the run's own checkpoint then comes first
restarts, = world.sum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))  # only the node that lost one counts it
begun = world.first((out / "latest").read_text().strip() if (out / "latest").exists() else None)
resuming = cfg.init_from == "resume" or bool(begun and (cfg.resume or restarts))
if begun and not resuming:
    raise ValueError(f"{out} already holds a run ({begun}); --resume=true continues it, --out=FOLDER starts another")
folder = (out / begun if resuming and begun else huggingface.find(out) if resuming else
          None if cfg.init_from == "scratch" else huggingface.find(cfg.init_from))
saved = huggingface.read_json(folder / "state" / "train.json") if resuming else None
if resuming:
    check_resumed(cfg, saved["config"])
machine = pick_machine(cfg, saved and saved["machine"])
torch.set_num_threads(machine["threads"])
keep_freed_memory()
model_cfg, tok = describe(cfg, given, folder)
recipe = Recipe(**{f.name: getattr(cfg, f.name) for f in fields(Recipe) if hasattr(cfg, f.name)},
                mask_id=tok.mask_id, pad_id=tok.pad_id)
train_data = Windows(cfg.data, "train", cfg.context, tok.vocab_size, cfg.cross_document)
val_data = Windows(cfg.data, "val", cfg.context, tok.vocab_size, cfg.cross_document)
model = build(cfg, model_cfg, folder)
optimizer = make_optimizer(cfg, model)
start = checkpoint.load_state(folder, model, optimizer)["step"] if resuming else 0

out.mkdir(parents=True, exist_ok=True)
if start >= cfg.max_steps:
    say(f"{out}: its {start} steps are done; a --max_steps above that trains on")
    world.leave()
    sys.exit(0)
if world.rank == 0:
    checkpoint.cut_metrics(out / "metrics.jsonl", start)
metrics = open(out / "metrics.jsonl" if world.rank == 0 else os.devnull, "a", buffering=1)  # line by line on disk
track = tracker(cfg)
peak_flops = cfg.peak_tflops * 1e12 or plan.peak_flops(world.device)
say(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {cfg.objective}, "
    f"{'new' if folder is None else f'from {folder}'}, steps {start} to {cfg.max_steps} of {cfg.batch_tokens} tokens; "
    f"{len(train_data):,} windows an epoch; {world.size} x {machine['device']}, {machine['dtype']}, "
    f"{machine['threads']} threads")
if world.rank == 0:
    say_if_tiled(machine["device"], getattr(torch, machine["dtype"]), model.cfg.head_dim)


def autocast():
    """Without FSDP, which casts weights and so all activations, autocast casts what goes into each matrix product alone."""
    return torch.autocast(world.device.type, torch.bfloat16, enabled=world.mesh is None and machine["dtype"] == "bfloat16")


def make_batch(step):
    """This process's rows of the step, noised, on the CPU, and their query-key pairs: runs in the prefetch thread."""
    b = train_data.at_step(cfg.seed, step, batch_rows, rows)
    noised = corrupt(b.x0, b.doc_start, b.doc_end, b.maskable, recipe, cfg.seed, step, rows, batch_rows, b.epochs)
    return noised, spans_for(recipe, b.doc_start, b.doc_end, step).pairs


def evaluate(step):
    """NELBO of fixed val windows under fixed noise, in nats a token and bits a byte of the scored tokens."""
    began, token_bytes = time.time(), torch.from_numpy(tok.token_bytes)
    nats = variance = tokens = bytes_ = 0
    val = val_data.batch(val_data.spread(cfg.eval_windows))
    largest = largest_block(recipe, val.doc_start, val.maskable)
    share = -(-len(val.x0) // world.size)  # each process runs as many forwards as the others: FSDP gathers weights in each
    mine = range(world.rank * share, (world.rank + 1) * share)
    for a in range(0, share, cfg.micro_batch):
        numbers = [min(row, len(val.x0) - 1) for row in mine[a:a + cfg.micro_batch]]
        new = torch.tensor([row < len(val.x0) for row in mine[a:a + cfg.micro_batch]])  # the last one again counts nothing
        maskable = val.maskable[numbers] & new[:, None]
        batch = (x.to(world.device) for x in (val.x0[numbers], val.doc_start[numbers], val.doc_end[numbers], maskable))
        with autocast():
            part, var = nelbo(model, *batch, recipe, cfg.eval_draws, rows=numbers, largest=largest)
        nats, variance = nats + part, variance + var
        tokens, bytes_ = tokens + maskable.sum().item(), bytes_ + token_bytes[val.x0[numbers]][maskable].sum().item()
    if world.mesh is not None:
        for part in (model, *model.layers):
            part.reshard()  # a forward without a backward leaves gathered what a training step would give back
    nats, variance, tokens, bytes_ = world.sum(nats, variance, tokens, bytes_)
    found = {"step": step, "val_nelbo": nats / tokens, "val_bits_per_byte": nats / math.log(2) / bytes_,
             "val_nelbo_stderr": variance**0.5 / tokens, "val_tokens": int(tokens), "val_bytes": int(bytes_)}
    metrics.write(json.dumps({**found, "seconds": time.time() - began}) + "\n")
    track(found)
    if world.rank == 0:
        tqdm.write(f"step {step}: val NELBO {found['val_nelbo']:.4f} nats a token, "
                   f"{found['val_bits_per_byte']:.4f} bits a byte, ± {found['val_nelbo_stderr']:.4f}")


# Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint. Alone, a second Ctrl-C ends it at once;
# under torchrun the signals come twice, from the terminal and from torchrun, which itself waits only so long.
asked_to_stop = []
for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda s, _: sys.exit(128 + s) if asked_to_stop and world.size == 1 else asked_to_stop.append(s))

# --- train --------------------------------------------------------------------------------------------------------
batches = prefetch(make_batch, start, cfg.max_steps)
with tqdm(total=cfg.max_steps, initial=start, unit="step", mininterval=0.5, dynamic_ncols=True, disable=world.rank > 0) as bar:
    for step in range(start, cfg.max_steps):
        if cfg.eval_every and step % cfg.eval_every == 0:
            evaluate(step)
        began = time.time()
        batch, pairs = next(batches)
        waited = time.time() - began
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)

        # of the global batch, so that neither accumulation nor the number of processes changes anything
        scored, masked, pairs, stop = world.sum(batch.maskable.sum(), batch.masked.sum(), pairs, bool(asked_to_stop))
        loss = torch.zeros((), device=world.device)
        for a in range(0, len(rows), cfg.micro_batch):
            if world.mesh is not None:
                model.set_requires_gradient_sync(cfg.reduce_each or a + cfg.micro_batch >= len(rows))
            with autocast():
                part = weighted_loss(model, batch.rows(a, a + cfg.micro_batch, world.device), recipe, step) / scored
            (part * world.size).backward()  # FSDP takes the mean over the processes, the loss is their sum
            loss += part.detach()
        grad_norm = parallel.gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)).item()
        loss, = world.sum(loss.item())
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise ValueError(f"step {step} went wrong: loss {loss}, gradient norm {grad_norm}, learning rate "
                             f"{learning_rate(step, cfg):.2e}; its update was not made; {checkpoint.last_good(out)}; "
                             "a lower --lr or --grad_clip usually helps")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - began
        flops = plan.step_flops(model.cfg, plan.positions(cfg), masked, pairs)
        found = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": learning_rate(step, cfg),
                 "u_max": u_max(step, recipe), "mask_rate": masked / scored,
                 "tokens": (step + 1) * cfg.batch_tokens, "tokens_per_s": cfg.batch_tokens / seconds, "seconds": seconds,
                 "loader_seconds": waited, "memory_gb": plan.peak_memory(world.device) / 1e9,
                 "mfu": flops / seconds / (peak_flops * world.size) if peak_flops else None}
        metrics.write(json.dumps(found) + "\n")
        track(found)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {cfg.batch_tokens / seconds:,.0f} tokens/s"
                            + (f", MFU {found['mfu']:.1%}" if peak_flops else ""), refresh=False)
        if step + 1 == cfg.max_steps and cfg.eval_every:
            evaluate(cfg.max_steps)  # before the last checkpoint: a run that has it is complete
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.max_steps or stop:
            checkpoint.save(out, step + 1, model, optimizer, tok, recipe, {"machine": machine, "config": asdict(cfg)}, cfg.keep)
        if stop:
            break
world.leave()
if stop:
    say(f"stopped after step {step + 1}; the same command with --resume=true goes on")
    sys.exit(128 + (asked_to_stop or [signal.SIGTERM])[0])  # a process may know it from the others alone
