"""The training loop, top to bottom: from scratch or from other weights, any of the four objectives.

    python train.py config/toy_ar.py                    # a small autoregressive model of real code
    python train.py config/toy.py                       # block diffusion, from its weights
    python train.py config/toy.py --resume=true         # go on with it, if it was begun
    python train.py config/toy_sft.py                   # prompts and answers (sft.py)
    torchrun --nproc_per_node=8 train.py config/8b.py   # the same loop on eight GPUs (parallel.py)
    python train.py config/8b.py --dry_run=true         # what a run would take (plan.py)

However many processes share the work, rows and noise are the same, and losses agree to rounding.

Not covered: reinforcement learning.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import huggingface
import loader
import optimizers
import parallel
import plan
import sft
from attention_kernel import say_if_tiled
from configurator import Float, Int, Mistake, Name, Seed, configure
from diffusion import Draw, Recipe, corrupt, evaluate, spans_for, u_max, weighted_loss
from model import pick_device
from run import Run, pick_machine, pick_model


@dataclass
class Config:
    # the run
    out: Name = "out/toy"  # folder of the run: checkpoints and metrics.jsonl
    init_from: Name = "scratch"  # 'scratch', or a folder or Hub name to take weights from
    resume: bool = False  # go on from out's newest checkpoint; if there is none, begin
    seed: Seed = 1337  # of the weights, the data order and the noise
    # data
    data: Name = "data/stdlib"  # folder that a prepare.py wrote, or a .jsonl file of samples
    val_data: str = ""  # (samples) another .jsonl file to validate on; empty: a part of `data`
    val_percent: Float(1e-6, 99.9) = 5.0  # (samples) the part, in percent
    context: Int(8, 2**24) = 256  # T: clean tokens per row, a multiple of 8
    batch_tokens: Int(2, 2**28) = 4096  # clean tokens per optimizer step, over all rows
    micro_batch: Int(1, 2**20) = 16  # rows per forward pass of one process; more accumulate
    cross_document: bool = False  # True: a row's documents see each other (Stable-DiffCoder)
    fim_rate: Float(0, 1) = 0.0  # share of documents as suffix, prefix, middle (loader.rearranged)
    canvas: Int(1, 2**24) = 256  # (samples, bidirectional) <eos> fills a completion to a drawn size
    condition_epochs: Float(0, 1e6) = 0.0  # (samples) in which prompts become context; CoDA: 1
    # model (with init_from=FOLDER: that folder's sizes)
    vocab_size: Int(0, 2**24) = 0  # rows of the embedding; 0: as many as the tokenizer has ids
    bos_token: str = ""  # name of the token that begins a document; empty: the tokenizer's, if any
    mask_token: str = ""  # name of the mask; empty: the tokenizer's; a new name is added
    d_model: Int(1, 2**17) = 192  # width of the residual stream
    n_layer: Int(1, 1000) = 4  # transformer blocks
    n_head: Int(1, 1024) = 3  # query heads
    n_kv_head: Int(1, 1024) = 1  # key/value heads, each shared by n_head / n_kv_head query heads
    head_dim: Int(2, 1024) = 64  # channels per head
    d_ff: Int(1, 2**20) = 512  # width of the MLP
    rope_theta: Float(1, 1e12) = 1e6  # base of the rotary embedding
    norm_eps: Float(1e-12, 1) = 1e-6  # epsilon of the RMSNorms
    qkv_bias: bool = False  # biases on q, k, v (Qwen2)
    qk_norm: bool = False  # RMSNorm on q and k (Qwen3)
    tie_embeddings: bool = True  # one matrix for the embedding and the vocabulary projection
    # objective
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] = "block"  # see diffusion.py
    shift: bool | None = None  # predict token i at position i - 1; none: only under ar
    block_size: Int(1, 2**20) = 4  # K: tokens per block, under objective=block
    schedule: Literal["uniform", "clipped", "count"] = "clipped"  # mask rate and weight, given t
    t_min: Float(1e-9, 1) = 1e-3  # smallest mask rate under schedule=uniform
    antithetic: bool = True  # spread t evenly over blocks and rows
    u_warmup_steps: Int(0, 2**31) = 0  # S: steps in which the cap on t rises to 1, weights are 1
    u_init: Float(1e-9, 1) = 1e-3  # the cap at step 0
    strategies: tuple = ((0.0, 0.0, 0.0),)  # CoDA's rates of S1, S2, S3, one triple per epoch
    anneal_steps: Int(0, 2**31) = 0  # steps from causal to full attention (objective=bidirectional)
    complementary: bool = False  # rows in pairs, under a mask and its complement (schedule=count)
    # optimizer
    max_steps: Int(1, 2**31) = 1000  # optimizer steps
    epochs: Float(0, 1e6) = 0.0  # passes over the data; 0: max_steps says how long to train
    lr: Float(1e-30, 1e6) = 2e-3  # peak learning rate
    min_lr: Float(0, 1e6) = 2e-4  # learning rate at the end
    lr_warmup_steps: Int(0, 2**31) = 50  # steps of linear rise to lr
    lr_decay: Literal["cosine", "linear"] = "cosine"  # how it falls from lr to min_lr
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"  # see optimizers.make_optimizer
    weight_decay: Float(0, 1e3) = 0.1  # on matrices only
    beta1: Float(0, 0.999999) = 0.9  # AdamW
    beta2: Float(0, 0.999999) = 0.95  # AdamW
    grad_clip: Float(1e-9, 1e9) = 1.0  # largest norm of the gradient
    # evaluation and saving
    eval_every: Int(0, 2**31) = 250  # steps between evaluations, and one at the end; 0: never
    eval_windows: Int(1, 2**20) = 32  # windows of the val split, spread evenly, the same each time
    eval_draws: Int(2, 2**16) = 8  # masks per window where the NELBO cannot be enumerated
    save_every: Int(1, 2**31) = 250  # steps between checkpoints, and one at the end
    keep: Int(1, 2**31) = 2  # newest checkpoints kept
    log: Literal["none", "tensorboard", "wandb"] = "none"  # metrics go there too
    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: what is fast
    threads: Int(0, 4096) = 0  # CPU threads of a process; 0: all cores, or what torchrun gives
    compile: bool = False  # torch.compile of each block, on a CPU with deterministic algorithms
    recompute: Literal["none", "selective", "full"] = "none"  # activations, to save memory
    shard_ranks: Int(0, 2**20) = 0  # processes that share a copy of the weights; 0: all; else HSDP
    reshard: bool = True  # free a block's gathered weights after its forward; False: keep them
    reduce_each: bool = False  # exchange gradients per micro-batch: less memory, more traffic
    peak_tflops: Float(0, 1e6) = 0.0  # of one device, for the MFU; 0: looked up by its name
    # planning
    show_row: Int(0, 2**40) | None = None  # print a row, scored tokens in color, or in ⟦⟧ in a pipe
    dry_run: bool = False  # print what the run would take (plan.py) and do nothing
    ranks: Int(0, 2**20) = 0  # dry_run: processes to plan for; 0: as many as run
    gpu_memory: Float(0.001, 1e6) = 80.0  # dry_run: memory of a device, in GB (10⁹ bytes)
    mfu: Float(1e-6, 1) = 0.4  # dry_run: share of the device's peak FLOPs that the run reaches


# on resume: settings that must not change, and settings that may change silently
FIXED = ("objective", "shift", "block_size", "schedule", "seed", "context", "batch_tokens",
         "cross_document", "canvas", "condition_epochs", "complementary")
FREE = ("init_from", "resume", "out", "data", "val_data", "threads", "dtype", "device")


def check(cfg):
    """Settings that cannot go together, found before anything is loaded."""
    loader.check_rows(cfg.context, cfg.batch_tokens, cfg.complementary)
    sft.check(cfg)
    if cfg.min_lr > cfg.lr:
        raise Mistake(f"min_lr={cfg.min_lr:g} is above lr={cfg.lr:g}, so the learning rate would "
                      f"rise at the end; give --min_lr={cfg.lr / 10:g} or another below lr")


def open_data(cfg, tok, world):
    """The train and the val split: rows of samples (sft.py), or windows of documents (loader.py).

    Either has `at_step` and `batch`, which return Batches.
    """
    if sft.is_supervised(cfg.data):
        train_data, val_data = sft.open_splits(cfg, tok, quiet=world.rank > 0)
        world.say(f"{cfg.data}: {train_data.in_words()}; to validate, {val_data.in_words()}")
        return train_data, val_data
    windows = partial(loader.Windows, cfg.data, T=cfg.context, vocab_size=tok.vocab_size,
                      cross_document=cfg.cross_document)
    train_data = windows(split="train", fim_rate=cfg.fim_rate, tok=tok)
    return train_data, windows(split="val")  # never rearranged: its scores stay comparable


def show_row(cfg, given, world):
    """Print a row that a new run would train on. Touches no run."""
    folder = None if cfg.init_from == "scratch" else huggingface.find(cfg.init_from)
    _, tok = pick_model(cfg, given, folder)
    train_data, _ = open_data(cfg, tok, world)
    world.first(partial(sft.show_row, train_data, cfg.show_row, tok))
    world.leave()


def make_batch(step, data, recipe, cfg, rows):
    """This process's rows of a step, noised, on the CPU, and their query-key pairs.

    It runs in the prefetch thread.
    """
    draw = Draw.of(recipe, cfg.seed, step, rows, cfg.batch_tokens // cfg.context)
    batch = data.at_step(cfg.seed, step, draw.batch_rows, draw.rows)
    noised = corrupt(batch, recipe, draw)
    return noised, spans_for(recipe, batch.doc_start, batch.doc_end, step).pairs


def say_what_starts(cfg, world, run, machine, model, folder, epoch):
    """One line about the run, and one where attention takes the slower path."""
    weights = sum(p.numel() for p in model.parameters())
    origin = "new" if folder is None else f"from {folder}"
    world.say(f"{cfg.out}: {weights / 1e6:.2f} M parameters, {cfg.objective}, {origin}, "
              f"steps {run.start} to {cfg.max_steps} of {cfg.batch_tokens} tokens; "
              f"{epoch:,} rows per epoch; {world.size} x {machine['device']}, "
              f"{machine['dtype']}, {machine['threads']} threads")
    if world.rank == 0:
        say_if_tiled(machine["device"], getattr(torch, machine["dtype"]), model.cfg.head_dim)


def train(cfg, given, world, run):
    """Set up, then one optimizer step after another. Returns the exit code."""
    rows = parallel.rows_of(world.rank, world.size, cfg)
    fingerprint = world.first(partial(sft.fingerprint, cfg))
    run.check_resumed(cfg, FIXED, FREE, fingerprint)
    machine = pick_machine(cfg, world, run.saved)
    dtype = getattr(torch, machine["dtype"])
    # data, model, optimizer
    folder = run.checkpoint
    if folder is None and cfg.init_from != "scratch":
        folder = huggingface.find(cfg.init_from)
    model_cfg, tok = pick_model(cfg, given, folder)
    recipe = Recipe.of(cfg, tok.mask_id, tok.pad_id)
    train_data, val_data = open_data(cfg, tok, world)
    held_out = val_data.batch(val_data.spread(cfg.eval_windows))
    asked = cfg  # what a checkpoint keeps: a resumed run finds the same settings
    if cfg.epochs:
        batch_rows = Draw.of(recipe, cfg.seed, 0, rows, cfg.batch_tokens // cfg.context).batch_rows
        steps = max(1, round(cfg.epochs * len(train_data) / batch_rows))
        warmup = min(cfg.lr_warmup_steps, steps // 10)  # a small file may make a few steps only
        cfg = replace(cfg, max_steps=steps, lr_warmup_steps=warmup)
    plan.check_memory(model_cfg, cfg.optimizer, world.device.type)
    model = parallel.build(model_cfg, world, dtype, cfg)
    if folder is None:
        parallel.init_weights(model, cfg.seed)
    else:
        huggingface.load_weights(folder, model, parallel.my_rows)
    optimizer = optimizers.make_optimizer(model, cfg)
    if run.checkpoint is not None:
        checkpoint.load_state(run.checkpoint, model, optimizer)
    if run.start >= cfg.max_steps:
        world.say(f"{cfg.out}: its {run.start} steps are done; a --max_steps above that trains on")
        return 0

    run.begin(cfg)
    say_what_starts(cfg, world, run, machine, model, folder, len(train_data))
    peak_flops = cfg.peak_tflops * 1e12 or plan.peak_flops(world.device)
    autocast = partial(parallel.autocast, world, dtype)
    score = partial(evaluate, batch=held_out, recipe=recipe, draws=cfg.eval_draws,
                    token_bytes=torch.from_numpy(tok.token_bytes), micro_batch=cfg.micro_batch,
                    world=world, autocast=autocast)
    make = partial(make_batch, data=train_data, recipe=recipe, cfg=cfg, rows=rows)
    batches = loader.prefetch(make, run.start, cfg.max_steps)
    with tqdm(total=cfg.max_steps, initial=run.start, unit="step", mininterval=0.5,
              dynamic_ncols=True, disable=world.rank > 0) as bar:
        for step in range(run.start, cfg.max_steps):
            if cfg.eval_every and step % cfg.eval_every == 0:
                run.evaluate(step, model, score)
            began = time.time()
            batch, pairs = next(batches)
            waited = time.time() - began

            # of the global batch: accumulation and the world size do not change the loss
            maskable, masked, pairs, stop = world.sum(
                batch.maskable.sum(), batch.masked.sum(), pairs, bool(run.stop_signals))
            loss = torch.zeros((), device=world.device)
            for start, end in parallel.micro_batches(model, world, len(rows), cfg):
                with autocast():
                    micro_batch = batch.rows(start, end, world.device)
                    part = weighted_loss(model, micro_batch, recipe, step) / maskable
                (part * world.size).backward()  # FSDP averages over processes, the loss is a sum
                loss += part.detach()
            [loss] = world.sum(loss.item())
            lr = parallel.learning_rate(step, cfg)
            grad_norm = parallel.update(model, optimizer, step, loss, lr, cfg.grad_clip)

            seconds = time.time() - began
            mfu = None
            if peak_flops:
                flops = plan.step_flops(model_cfg, plan.positions(cfg), masked, pairs,
                                        plan.last_queries(cfg))
                mfu = flops / seconds / (peak_flops * world.size)
            tokens_per_s = cfg.batch_tokens / seconds
            run.log({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr,
                     "u_max": u_max(step, recipe), "mask_rate": masked / maskable,
                     "tokens": (step + 1) * cfg.batch_tokens, "tokens_per_s": tokens_per_s,
                     "seconds": seconds, "loader_seconds": waited,
                     "memory_gb": plan.peak_memory(world.device) / 1e9, "mfu": mfu})
            bar.update()
            shown = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s"
            if mfu is not None:
                shown += f", MFU {mfu:.1%}"
            bar.set_postfix_str(shown, refresh=False)

            done = step + 1 == cfg.max_steps
            if done and cfg.eval_every:  # before the last save: whoever has that has the scores too
                run.evaluate(cfg.max_steps, model, score)
            if done or stop or (step + 1) % cfg.save_every == 0:
                run.save(step + 1, model, optimizer, tok, recipe, asked, machine, fingerprint)
            if stop:
                world.say(f"stopped after step {step + 1}; the same command with --resume=true "
                          "continues")
                return run.exit_code()
    return 0


def main(argv=None):
    cfg, given = configure(Config, argv)
    check(cfg)
    if cfg.dry_run:
        plan.show(cfg, parallel.rows_of)
        if cfg.epochs:
            print(f"epochs={cfg.epochs:g}  the data says how many steps that is; the hours above "
                  f"are for max_steps={cfg.max_steps}")
        return 0
    world = parallel.start(pick_device(cfg.device), cfg.shard_ranks)
    if cfg.show_row is not None:
        return show_row(cfg, given, world)
    with Run(cfg.out, cfg.resume, world) as run:
        code = train(cfg, given, world, run)
    world.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
