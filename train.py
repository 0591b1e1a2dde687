"""The training loop, top to bottom: pretraining from scratch and continual pretraining, of any of the four objectives.

    python train.py config/toy_ar.py                    # a small autoregressive model of real code
    python train.py config/toy.py                       # block diffusion, continued from its weights
    python train.py config/toy.py --init_from=resume    # go on where a stopped run left off: the same numbers

One process, one device. Not covered: several processes, supervised fine-tuning.
"""
import ctypes
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
from attention_kernel import say_if_tiled
from configurator import configure
from diffusion import Recipe, corrupt, nelbo, u_max, weighted_loss
from loader import Windows, prefetch
from model import ModelConfig, Transformer
from tokenizer import Tokenizer


@dataclass
class Config:
    # the run
    out: str = "out/toy"  # folder of the run: checkpoints and metrics.jsonl
    init_from: str = "scratch"  # 'scratch', 'resume' (the newest checkpoint in out), or a folder to take weights from
    seed: int = 1337  # of the weights, the data order and the noise
    # data
    data: str = "data/stdlib"  # folder that a prepare.py wrote
    context: int = 256  # T: clean tokens a row
    batch_tokens: int = 4096  # clean tokens an optimizer step, over all rows
    micro_batch: int = 16  # rows a forward pass; more steps accumulate into one
    cross_document: bool = False  # True: all of a row's documents see each other, as in Stable-DiffCoder's packing
    # model (init_from another folder: its own sizes are used)
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
    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; auto: bfloat16 where it is fast
    threads: int = 0  # CPU threads; 0: all cores
    compile: bool = False  # torch.compile, with deterministic algorithms


cfg, given = configure(Config)


def check(cfg):
    """Settings that cannot go together, found before anything is loaded."""
    if cfg.batch_tokens % cfg.context:
        near = max(1, round(cfg.batch_tokens / cfg.context)) * cfg.context
        raise ValueError(f"batch_tokens={cfg.batch_tokens} must be a multiple of context={cfg.context}, such as {near}")
    for name in ("context", "batch_tokens", "micro_batch", "max_steps", "save_every", "keep", "eval_windows"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be 1 or more")
    for name in ("eval_every", "u_warmup_steps", "lr_warmup_steps", "anneal_steps", "threads", "weight_decay", "min_lr", "seed"):
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


def check_resumed(cfg, saved):
    """A resumed run must go on as the same run; what may change is said. saved: the checkpoint's settings."""
    changed = {k: (saved[k], v) for k, v in json.loads(json.dumps(asdict(cfg))).items() if k in saved and saved[k] != v}
    for key in ("objective", "shift", "block_size", "schedule", "seed", "context", "batch_tokens", "cross_document"):
        if key in changed:
            raise ValueError(f"{key}={changed[key][1]} but the run in {cfg.out} has {key}={changed[key][0]}: resume with the same "
                             "settings, or start another run with --out=FOLDER")
    said = [f"{k} {old} -> {new}" for k, (old, new) in changed.items() if k not in ("init_from", "out", "threads", "dtype", "device")]
    if said:
        print(f"resuming with other settings: {', '.join(said)}")


def pick_machine(cfg, saved):
    """Device, dtype and threads, which decide the bits: from the hardware once, then dtype and threads from the checkpoint.

    saved: what the resumed checkpoint was made with, or None. Returns a dict of JSON values.
    """
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = here if cfg.device == "auto" else cfg.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device]:
        raise ValueError(f"device={device!r} is not available here; --device={here} is")
    fast_bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else
                 device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
    found = {"device": device, "dtype": "bfloat16" if fast_bf16 else "float32", "threads": torch.get_num_threads(),
             "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if saved:
        found |= {k: saved[k] for k in ("dtype", "threads")}
    found |= {"dtype": cfg.dtype} if cfg.dtype != "auto" else {}
    found |= {"threads": cfg.threads} if cfg.threads else {}
    if saved and saved != found:
        changed = ", ".join(f"{k} {saved[k]} -> {found[k]}" for k in found if saved.get(k) != found[k])
        print(f"resuming under other conditions ({changed}): numbers may differ in their last digits")
    return found


def keep_freed_memory():
    """Ask glibc not to hand large buffers back to the system: a CPU step spent a quarter of its time getting them again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: allocations below 1 GB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def build(cfg, given):
    """The model and its tokenizer, as init_from says. Returns (model, tokenizer)."""
    if cfg.init_from == "scratch":
        tok = Tokenizer(cfg.data)
        torch.manual_seed(cfg.seed)
        sizes = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig) if f.name != "vocab_size"}
        return Transformer(ModelConfig(vocab_size=tok.vocab_size, **sizes)), tok
    folder = cfg.out if cfg.init_from == "resume" else cfg.init_from
    model, tok, _ = checkpoint.load(folder)
    for name in given & {f.name for f in fields(ModelConfig)} - {"context"}:
        if getattr(cfg, name) != getattr(model.cfg, name):
            raise ValueError(f"{name}={getattr(cfg, name)} was asked for, but the model in {folder} has "
                             f"{getattr(model.cfg, name)}")
    if cfg.context > model.cfg.context:
        raise ValueError(f"context={cfg.context} is longer than the {model.cfg.context} of the model in {folder}")
    if Tokenizer(cfg.data).hf.get_vocab() != tok.hf.get_vocab():
        raise ValueError(f"{cfg.data} was prepared with another tokenizer than the one in {folder}: prepare it "
                         f"again with --tokenizer={checkpoint.find(folder)}, or train from scratch")
    return model, tok


def learning_rate(step, cfg):
    """Linear warmup to lr, then a cosine down to min_lr at max_steps."""
    if step < cfg.lr_warmup_steps:
        return cfg.lr * (step + 1) / cfg.lr_warmup_steps
    done = (step - cfg.lr_warmup_steps) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
    return cfg.min_lr + 0.5 * (cfg.lr - cfg.min_lr) * (1 + math.cos(math.pi * done))


# --- set up -------------------------------------------------------------------------------------------------------
check(cfg)
out = Path(cfg.out)
resuming = cfg.init_from == "resume"
if not resuming and (out / "latest").exists():
    raise ValueError(f"{out} already holds a run ({(out / 'latest').read_text()}); --init_from=resume continues it, "
                     "--out=FOLDER starts another")
saved = checkpoint.read_json(checkpoint.find(out) / "state" / "train.json") if resuming else None
if resuming:
    check_resumed(cfg, saved["config"])
machine = pick_machine(cfg, saved and saved["machine"])
device = torch.device(machine["device"])
torch.set_num_threads(machine["threads"])
keep_freed_memory()
model, tok = build(cfg, given)
model.to(device)
recipe = Recipe(**{f.name: getattr(cfg, f.name) for f in fields(Recipe) if hasattr(cfg, f.name)},
                mask_id=tok.mask_id, pad_id=tok.pad_id)
train_data = Windows(cfg.data, "train", cfg.context, tok.vocab_size, cfg.cross_document)
val_data = Windows(cfg.data, "val", cfg.context, tok.vocab_size, cfg.cross_document)
batch_rows = cfg.batch_tokens // cfg.context

decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                               {"params": others, "weight_decay": 0.0}],
                              lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
start = checkpoint.load_state(out, optimizer)["step"] if resuming else 0
if cfg.compile:
    torch.use_deterministic_algorithms(True)  # without it two compiled CPU runs were seen to differ in their bits
    model.compile()

out.mkdir(parents=True, exist_ok=True)
if start >= cfg.max_steps:
    print(f"{out}: its {start} steps are done; a --max_steps above that trains on")
    sys.exit(0)
checkpoint.cut_metrics(out / "metrics.jsonl", start)
metrics = open(out / "metrics.jsonl", "a", buffering=1)  # a line is on disk when it is written
n_params = sum(p.numel() for p in model.parameters())
print(f"{out}: {n_params / 1e6:.2f} M parameters, {cfg.objective}, steps {start} to {cfg.max_steps} of {cfg.batch_tokens} "
      f"tokens; {len(train_data):,} windows an epoch; {machine['device']}, {machine['dtype']}, {machine['threads']} threads")
say_if_tiled(machine["device"], getattr(torch, machine["dtype"]), model.cfg.head_dim)


def autocast():
    return torch.autocast(device.type, torch.bfloat16, enabled=machine["dtype"] == "bfloat16")


def make_batch(step):
    """The step's rows, noised, on the CPU: runs in the prefetch thread."""
    b = train_data.at_step(cfg.seed, step, batch_rows)
    return corrupt(b.x0, b.doc_start, b.doc_end, b.maskable, recipe, cfg.seed, step, range(batch_rows), batch_rows, b.epochs)


def evaluate(step):
    """NELBO of fixed val windows under fixed noise, in nats a token and bits a byte of the scored tokens."""
    began, token_bytes = time.time(), torch.from_numpy(tok.token_bytes)
    nats = variance = tokens = bytes_ = 0
    windows = val_data.spread(cfg.eval_windows)
    for a in range(0, len(windows), cfg.micro_batch):
        b = val_data.batch(windows[a:a + cfg.micro_batch])
        with autocast():
            part, var = nelbo(model, b.x0.to(device), b.doc_start.to(device), b.doc_end.to(device), b.maskable.to(device),
                              recipe, cfg.eval_draws, rows=range(a, a + len(b.x0)))
        nats, variance = nats + part, variance + var
        tokens, bytes_ = tokens + b.maskable.sum().item(), bytes_ + token_bytes[b.x0][b.maskable].sum().item()
    found = {"step": step, "val_nelbo": nats / tokens, "val_bits_per_byte": nats / math.log(2) / bytes_,
             "val_nelbo_stderr": variance**0.5 / tokens, "val_tokens": tokens, "val_bytes": bytes_}
    metrics.write(json.dumps({**found, "seconds": time.time() - began}) + "\n")
    tqdm.write(f"step {step}: val NELBO {found['val_nelbo']:.4f} nats a token, "
               f"{found['val_bits_per_byte']:.4f} bits a byte, ± {found['val_nelbo_stderr']:.4f}")


# Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint; a second Ctrl-C ends it at once.
asked_to_stop = []
for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda s, _: asked_to_stop.append(s) if not asked_to_stop else sys.exit(128 + s))

# --- train --------------------------------------------------------------------------------------------------------
with tqdm(total=cfg.max_steps, initial=start, unit="step", mininterval=0.5, dynamic_ncols=True) as bar:  # closed, it ends its line
    for step, batch in zip(range(start, cfg.max_steps), prefetch(make_batch, start, cfg.max_steps)):
        began = time.time()
        if cfg.eval_every and step % cfg.eval_every == 0:
            evaluate(step)
            began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)

        scored = batch.maskable.sum()  # of the global batch, so that accumulation changes nothing
        loss = torch.zeros((), device=device)
        for a in range(0, batch_rows, cfg.micro_batch):
            with autocast():
                part = weighted_loss(model, batch.rows(a, a + cfg.micro_batch, device), recipe, step) / scored
            part.backward()
            loss += part.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        if not math.isfinite(loss.item()) or not math.isfinite(grad_norm.item()):
            raise ValueError(f"step {step} went wrong: loss {loss.item()}, gradient norm {grad_norm.item()}, learning rate "
                             f"{learning_rate(step, cfg):.2e}; its update was not made; {checkpoint.last_good(out)}; "
                             "a lower --lr or --grad_clip usually helps")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - began
        metrics.write(json.dumps({
            "step": step, "loss": loss.item(), "grad_norm": grad_norm.item(), "lr": learning_rate(step, cfg),
            "u_max": u_max(step, recipe), "mask_rate": (batch.masked.sum() / scored).item(),
            "tokens": (step + 1) * cfg.batch_tokens, "tokens_per_s": cfg.batch_tokens / seconds, "seconds": seconds}) + "\n")
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}, {cfg.batch_tokens / seconds:,.0f} tokens/s", refresh=False)
        if step + 1 == cfg.max_steps and cfg.eval_every:
            evaluate(cfg.max_steps)  # before the last checkpoint: a run that has it is complete
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.max_steps or asked_to_stop:
            checkpoint.save(out, step + 1, model, optimizer, tok, recipe, {"machine": machine, "config": asdict(cfg)}, cfg.keep)
        if asked_to_stop:
            break
if asked_to_stop:
    print(f"stopped after step {step + 1}; the same command with --init_from=resume goes on")
    sys.exit(128 + asked_to_stop[0])
