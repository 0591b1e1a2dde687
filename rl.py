"""Reinforcement learning from tests that pass: coupled-GRPO (DiffuCoder §5) and its rivals.

    python rl.py config/toy_rl.py
    torchrun --nproc_per_node=8 rl.py config/diffucoder_7b_rl.py --tasks=acecode.jsonl

A rollout is `completions` answers to each of `prompts` tasks, written `decode_batch` at a time; the
sandbox runs a batch while the model writes the next. An answer's advantage is its reward minus the
mean of the other answers' to the same task. Then come `updates` optimizer steps: each estimates the
log-probability of every answer (estimators.py), and moves it by its advantage as far as the clip
allows (`clipped_loss`).

    OUT/samples.jsonl    every answer with its reward
    OUT/samples.html     the newest rollout, to read
    OUT/metrics.jsonl    a line per step, per rollout and per evaluation

A run that is killed at any moment resumes to the same numbers, as far as no program's time limit
decides, and on a GPU up to rounding: a checkpoint holds the reference and a half-used rollout.

Not covered: more tasks than a process can hold in memory; rewards (rewards.py); LoRA.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import hashlib
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import huggingface
import parallel
import plan
import rollout
from configurator import Float, Int, Mistake, Name, Seed, configure
from decode import Confidence, Decoding, check_rules, settled
from diffusion import Recipe
from estimators import Estimate, check_estimate, inexact, log_probs, passes_of, read_by
from evaluate import Judging, open_sandbox, refuse_failing, tasks_of
from families import ASKED
from model import Transformer, pick_device
from optimizers import make_optimizer
from rewards import Rewarding, Rewards, load_own
from run import Run, cut_lines, pick_machine
from tasks import read_tasks
from tokenizer import Tokenizer


@dataclass
class Config(Judging, Estimate, Rewarding):
    # the run
    out: Name = "out/toy_rl"  # folder of the run
    init_from: Name = "out/toy_sft"  # folder or Hub name of the policy to begin with
    resume: bool = False  # go on from out's newest checkpoint; if there is none, begin
    seed: Seed = 1337  # of the tasks' order, the sampling and the masks
    style: Literal["base", "instruct"] = "base"  # continue the prompt, or answer a chat message
    answer_prefix: str = ""  # (instruct) how the answer begins, such as "```python\n"
    check_references: bool = True  # refuse tasks whose reference fails their tests
    mask_token: str = ""  # name of the mask, where the folder does not say
    objective: ASKED["objective"] | None = None  # none: as the folder says
    shift: bool | None = None  # predict token i at position i - 1; none: as the folder says
    block_size: ASKED["block_size"] | None = None  # K; none: as the folder says
    # rollouts
    prompts: Int(1, 2**20) = 8  # tasks of a rollout, over all processes
    completions: Int(1, 2**16) = 10  # G, answers to each; the advantage compares them: 2 at least
    max_new_tokens: Int(1, 2**20) = 256  # longest answer, in tokens
    max_prompt_tokens: Int(0, 2**20) = 0  # tasks with longer prompts are left out; 0: no limit
    temperature: Float(1e-3, 100) = 1.0  # of the sampling, and of the log-probabilities
    top_p: Float(1e-6, 1) = 1.0  # sample from the likeliest tokens that together have this much
    confidence: Confidence = "entropy"  # by what the positions are ranked: the surest come first
    steps: Int(0, 2**20) = 0  # forwards per decoding block, at most its length; 0: one per token
    block_length: Int(0, 2**20) = 0  # tokens decoded together; 0: K, without blocks all of them
    verified: bool = False  # (block) left to right, several tokens per forward: draft.py
    decode_batch: Int(1, 2**16) = 64  # answers that a process writes at once
    # the loss
    updates: Int(1, 1024) = 2  # optimizer steps per rollout, each with masks of its own
    epsilon: Float(1e-6, 0.999) = 0.5  # clip: ratios to 1 - ε … 1 + ε
    beta: Float(0, 1e3) = 0.01  # weight of the KL to the reference; 0: there is no reference
    reference_every: Int(1, 2**31) = 64  # steps after which the reference is the policy again
    # optimizer
    max_steps: Int(1, 2**31) = 100  # optimizer steps
    micro_batch: Int(1, 2**20) = 32  # answers per forward and pass of a process; more accumulate
    lr: Float(1e-30, 1e6) = 1e-6  # peak learning rate
    min_lr: Float(0, 1e6) = 1e-7  # learning rate at the end
    lr_warmup_steps: Int(0, 2**31) = 0  # steps of linear rise to lr
    lr_decay: Literal["cosine", "linear"] = "cosine"  # how it falls from lr to min_lr
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"  # see optimizers.make_optimizer
    weight_decay: Float(0, 1e3) = 0.1  # on matrices only
    beta1: Float(0, 0.999999) = 0.9  # AdamW
    beta2: Float(0, 0.999999) = 0.99  # AdamW
    grad_clip: Float(1e-9, 1e9) = 0.2  # largest norm of the gradient
    # evaluation and saving
    val_tasks: str = ""  # tasks for pass@1 by max_prob, one token a step; empty: no evaluation
    eval_every: Int(0, 2**31) = 20  # steps between evaluations, and one at the end; 0: never
    save_every: Int(1, 2**31) = 20  # steps between checkpoints, and one at the end
    keep: Int(1, 2**31) = 2  # newest checkpoints kept
    log: Literal["none", "tensorboard", "wandb"] = "none"  # metrics go there too
    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is fast
    threads: Int(0, 4096) = 0  # CPU threads of a process; 0: all cores, or what torchrun gives
    compile: bool = False  # torch.compile of each block
    recompute: Literal["none", "selective", "full"] = "none"  # activations, to save memory
    shard_ranks: Int(0, 2**20) = 0  # processes that share a copy of the weights; 0: all; else HSDP
    reshard: bool = True  # free a block's gathered weights after its forward; False: keep them
    reduce_each: bool = False  # exchange gradients per micro-batch: less memory, more traffic


# on resume: settings that must not change, and settings that may change silently
FIXED = ("seed", "style", "answer_prefix", "limit", "shown_tests", "objective", "shift",
         "block_size", "prompts", "completions", "max_new_tokens", "max_prompt_tokens",
         "temperature", "top_p", "confidence", "steps", "block_length", "verified", "updates",
         "reference_every", "estimator", "pairs", "pair_weights", "t_low", "t_high")
FREE = ("init_from", "resume", "out", "tasks", "val_tasks", "threads", "dtype", "device", "workers")


def check(cfg):
    """Settings that cannot go together, found before anything is loaded."""
    if cfg.completions < 2:
        raise Mistake("completions=1 leaves nothing to compare an answer with: its advantage is "
                      "its reward minus the mean of the others'; give --completions=2 or more")
    if cfg.reference_every % cfg.updates:
        raise Mistake(f"reference_every={cfg.reference_every} must be a multiple of updates="
                      f"{cfg.updates}: the reference changes between rollouts")
    if cfg.min_lr > cfg.lr:
        raise Mistake(f"min_lr={cfg.min_lr:g} is above lr={cfg.lr:g}, so the learning rate would "
                      f"rise at the end; give --min_lr={cfg.lr / 10:g} or another below lr")
    if cfg.answer_prefix and cfg.style != "instruct":
        raise Mistake("answer_prefix is for --style=instruct: a base model continues the prompt")
    out = Path(cfg.out)
    if (out / "settings.json").exists() and (out / "samples.jsonl").exists():
        raise Mistake(f"{out} holds the samples of evaluate.py, which a run would overwrite: "
                      "choose another --out")
    check_rules(how_to_write(cfg))


def how_to_write(cfg):
    """The Decoding of a rollout."""
    names = ("temperature", "top_p", "confidence", "steps", "block_length", "verified", "seed")
    return Decoding(**{name: getattr(cfg, name) for name in names})


# --- the loss ------------------------------------------------------------------------------------

def advantages(rewards):
    """Each reward minus the mean of the others' of its group (leave-one-out, DiffuCoder §5).

    rewards: (N, G) float64, G >= 2. Returns (N, G); not divided by the standard deviation.
    """
    G = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (G / (G - 1))


def clipped_loss(new, old, reference, scored, advantage, cfg):
    """The sum of the loss over what counts, of its KL, and how many are clipped.

    new, old, reference: (B, T) log-probabilities of the tokens under the policy, the policy that
    wrote them, and the reference (None where beta is 0). scored: (B, T) bool. advantage: (B,).
    A token's loss is -min(ratio · A, clip(ratio, 1 - ε, 1 + ε) · A) + β · k3, with ratio = new/old
    and the estimate k3 = q - 1 - log q of the KL, q = reference/new (DiffuCoder Eq. 4; Schulman).
    Under `sequence` a row counts once: ratio = exp(mean over its tokens of new - old), and the KL
    is half the square of the mean difference (k2), as in ESPO.
    Returns three scalars, sums over tokens, or under `sequence` over rows.
    """
    change = new - old  # (B, T)
    drift = torch.zeros_like(new) if reference is None else reference - new
    read, advantage = scored, advantage[:, None].expand_as(new)
    if cfg.estimator == "sequence":
        length = scored.sum(1, keepdim=True).clamp(min=1)
        change, drift = ((x * scored).sum(1, keepdim=True) / length for x in (change, drift))
        read, advantage = scored.any(1, keepdim=True), advantage[:, :1]
    change, drift, advantage = change[read], drift[read], advantage[read]  # (N,) each
    ratio = change.exp()
    inside = ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon)
    gain = torch.minimum(ratio * advantage, inside * advantage)
    kl = drift.exp() - 1 - drift
    if cfg.estimator == "sequence":
        kl = drift.square() / 2
    loss = (cfg.beta * kl - gain).sum()
    clipped = inside * advantage < ratio * advantage
    return loss, kl.detach().sum(), clipped.sum()


# --- a rollout -----------------------------------------------------------------------------------

@dataclass
class Policy:
    """The model that learns, and what it takes to run it."""
    model: Transformer
    tok: Tokenizer
    recipe: Recipe
    world: parallel.World
    autocast: partial  # makes a context to run the model in
    banned: torch.Tensor  # (n,) int64, ids that decoding never chooses


def write_and_judge(rows, how, policy, cfg, tasks, rewards):
    """Write these Rows, and judge them while the next are written: {number: Reward}, and the
    seconds of the slowest process's decoding. What one process raises, all raise: they would wait
    for it forever.
    """
    model, world = policy.model, policy.world
    found, seconds, errors, began = {}, 0, [], time.time()
    try:
        with parallel.weights_kept(model, world, cfg.reshard), policy.autocast():
            casts = torch.is_autocast_enabled(world.device.type)
            # FSDP's hooks and autocast's casts do not belong into a recording
            how = replace(how, graphs=world.mesh is None and not casts)
            for batch in rollout.write_completions(model, policy.tok, policy.recipe, how, rows,
                                                   cfg.decode_batch):
                for row in batch:
                    text = cfg.answer_prefix + rollout.text_of(row, policy.tok)
                    rewards.submit(row.number, tasks[row.task], text)
        seconds = time.time() - began
        found = rewards.collect()
    except (Mistake, OSError) as error:
        errors = [error]
    errors = world.gather(errors)
    if errors:
        raise errors[0]
    return found, max(world.gather([seconds]))


def roll_out(number, policy, cfg, tasks, prompts, rewards):
    """Answers to the tasks of rollout `number` and their rewards, of all processes: a Rollout, and
    the seconds of its decoding.

    tasks: of all rollouts. prompts: of each task its ids and how many tokens it may be answered in.
    """
    world, block = policy.world, policy.recipe.causal_block
    chosen = rollout.chosen_tasks(cfg.seed, number, cfg.prompts, len(tasks))
    rows = rollout.rows_of(number, chosen, cfg.completions, prompts, block)
    mine = rows[world.rank * len(rows) // world.size:(world.rank + 1) * len(rows) // world.size]
    found, seconds = write_and_judge(mine, how_to_write(cfg), policy, cfg, tasks, rewards)
    made = rollout.Rollout(number, rows=world.gather(mine),
                           rewards=world.gather([found[row.number] for row in mine]))
    totals = torch.tensor([reward.total for reward in made.rewards], dtype=torch.float64)
    totals = totals.view(cfg.prompts, cfg.completions)
    differ = totals.amax(1) > totals.amin(1)  # (prompts,)
    made.learned = differ.repeat_interleave(cfg.completions).nonzero()[:, 0].tolist()
    made.advantage = advantages(totals)[differ].flatten().tolist()
    return made, seconds


def passes_over(rows, step, policy, cfg):
    """Completions of these rows, and their passes with the masks of this update."""
    batch = rollout.stacked(rows, policy.recipe.causal_block, policy.tok.stop_ids,
                            policy.world.device)
    return batch, passes_of(cfg, batch, policy.recipe, cfg.seed, step)


def remember(made, net, into, steps, policy, cfg):
    """Append to `into`, for each of these updates, log_probs of the learned rows under `net`."""
    share = rollout.my_share(made.learned, policy.world)
    rows = rollout.rows_at(made, share)
    for step in steps:
        values = []
        for start in range(0, len(rows), cfg.micro_batch):
            batch, passes = passes_over(rows[start:start + cfg.micro_batch], step, policy, cfg)
            with torch.no_grad(), policy.autocast():
                logp = log_probs(net, batch, passes, policy.recipe, cfg.temperature, policy.banned)
            lengths = batch.doc_end[:, 0].tolist()
            values += [of_row[:length] for of_row, length in zip(logp.tolist(), lengths)]
        values = [of_row for of_row, place in zip(values, share) if place is not None]
        into.append(policy.world.gather(values))
    parallel.free_gathered(net, policy.world)


# --- the loop ------------------------------------------------------------------------------------

def greedy(policy, cfg, tasks, prompts, rewards):
    """pass@1 of the likeliest answers, a float. The tasks are spread over the processes."""
    world = policy.world
    rows = rollout.rows_of(0, list(range(len(tasks))), 1, prompts, policy.recipe.causal_block)
    mine = rows[world.rank::world.size]
    found, _ = write_and_judge(mine, Decoding(), policy, cfg, tasks, rewards)
    [passed] = world.sum(sum(reward.status == "passed" for reward in found.values()))
    return passed / len(tasks)


def check_decoding(cfg, described, prompts, world):
    """Raises Mistake for settings that do not fit the model; says what they do not give."""
    model_cfg, _, recipe = described
    check_estimate(cfg, recipe)
    ids, room = max(prompts, key=lambda prompt: len(prompt[0]) + prompt[1])
    how = settled(how_to_write(cfg), recipe, [[*ids, *[None] * room]], model_cfg)
    if cfg.estimator != "trace":
        return
    if said := inexact(how.confidence, how.top_p):
        world.say(said)
    if recipe.causal_block is None:
        world.say(f"a model without blocks replays a pass per step: up to {cfg.micro_batch} times "
                  f"{room} rows in a forward; a smaller --micro_batch needs less memory")


def make_policy(cfg, folder, described, world, dtype):
    """The Policy of a folder, with its weights."""
    model_cfg, tok, recipe = described
    huggingface.check_weights(folder, model_cfg)
    plan.check_memory(model_cfg, cfg.optimizer, world.device.type,
                      cfg.beta > 0, "a smaller model, --optimizer=adafactor or --beta=0")
    model = parallel.build(model_cfg, world, dtype, cfg)
    huggingface.load_weights(folder, model, parallel.my_rows)
    never = [i for i in range(model_cfg.vocab_size)
             if i >= tok.vocab_size or i in tok.never_chosen]
    return Policy(model, tok, recipe, world, partial(parallel.autocast, world, dtype),
                  torch.tensor(never, dtype=torch.long, device=world.device))


@torch.no_grad()
def copy_weights(model, into):
    """Give another model of the same shape, and sharded alike, this one's weights."""
    for mine, theirs in zip(into.parameters(), model.parameters()):
        mine.copy_(theirs)


def save_beside(folder, policy, reference, made, in_use):
    """What a checkpoint of this run has in addition: the reference, and a rollout in use."""
    world = policy.world
    if reference is not None:
        if world.rank == 0:
            (folder / "reference").mkdir()
        parallel.wait_for_all()
        huggingface.write_model(folder / "reference", reference, policy.tok, policy.recipe,
                                torch.float32, world.rank, world.size, parallel.gathered)
    if world.rank == 0 and in_use:
        made.write(folder / "rollout.json")


def evaluate(step, score, run):
    """Greedy pass@1 of the val_tasks, shown and logged."""
    began = time.time()
    passed = score()
    run.log({"step": step, "val_pass@1": passed, "seconds": time.time() - began})
    if run.world.rank == 0:
        tqdm.write(f"step {step}: greedy pass@1 {passed:.1%}")


def digest(cfg):
    """{name: fingerprint} of what the run learns from."""
    used = {"tasks": cfg.tasks}
    if cfg.reward:
        used["reward"] = cfg.reward
    return {name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
            for name, path in used.items()}


def check_resumed(run, cfg, fingerprint):
    """What a resumed run shares with the one that it continues. Raises Mistake."""
    before = run.saved.get("data") if run.saved else fingerprint
    same_kind = isinstance(before, dict) and "tasks" in before
    if same_kind and before.get("reward") != fingerprint.get("reward"):
        raise Mistake(f"reward={cfg.reward!r} is not the function that the run in {run.folder} was "
                      "trained with: resume with that one, or start another run with --out=FOLDER")
    run.check_resumed(cfg, FIXED, FREE, fingerprint)
    if run.saved and cfg.beta and not (run.checkpoint / "state" / "reference").is_dir():
        raise Mistake(f"beta={cfg.beta:g} needs a reference, and {run.checkpoint} was saved with "
                      "beta=0, without one: resume with --beta=0, or start another run with "
                      f"--out=FOLDER --init_from={run.folder}")


def train(cfg, world, run, rewards, tasks, val_tasks):
    """Set up, then one optimizer step after another. Returns the exit code."""
    fingerprint = world.first(partial(digest, cfg))
    check_resumed(run, cfg, fingerprint)
    machine = pick_machine(cfg, world, run.saved)
    dtype = getattr(torch, machine["dtype"])
    folder = run.checkpoint or huggingface.find(cfg.init_from)
    described = huggingface.read_description(folder, cfg.mask_token, objective=cfg.objective,
                                             shift=cfg.shift, block_size=cfg.block_size)
    tasks, prompts = rollout.with_prompts(tasks, described, cfg, world)
    val_tasks, val_prompts = rollout.with_prompts(
        val_tasks, described, replace(cfg, max_prompt_tokens=0), world)
    check_decoding(cfg, described, prompts + val_prompts, world)
    policy = make_policy(cfg, folder, described, world, dtype)
    model, tok = policy.model, policy.tok
    optimizer = make_optimizer(model, cfg)
    reference, made = None, None
    if cfg.beta:
        reference = parallel.build(model.cfg, world, dtype, cfg).requires_grad_(False)
        copy_weights(model, reference)
    if run.checkpoint is not None:
        checkpoint.load_state(run.checkpoint, model, optimizer)
        state = run.checkpoint / "state"
        if reference is not None:
            huggingface.load_weights(state / "reference", reference, parallel.my_rows)
        if run.start % cfg.updates:
            made = rollout.Rollout.read(state / "rollout.json", cfg.updates, cfg.beta > 0)
    if run.start >= cfg.max_steps:
        world.say(f"{cfg.out}: its {run.start} steps are done; a --max_steps above that trains on")
        return 0

    run.begin(cfg)
    world.first(partial(cut_lines, run.folder / "samples.jsonl", run.start))
    plain = Rewards(rewards.sandbox, Rewarding(), run.folder, cfg.style)
    score = partial(greedy, policy, cfg, val_tasks, val_prompts, plain)
    with tqdm(total=cfg.max_steps, initial=run.start, unit="step", mininterval=0.5,
              dynamic_ncols=True, disable=world.rank > 0) as bar:
        for step in range(run.start, cfg.max_steps):
            if val_tasks and cfg.eval_every and step % cfg.eval_every == 0:
                evaluate(step, score, run)
            began = time.time()
            update = step % cfg.updates
            if update == 0:  # a new rollout
                if reference is not None and step % cfg.reference_every == 0:
                    copy_weights(model, reference)
                made, seconds = roll_out(step // cfg.updates, policy, cfg, tasks, prompts, rewards)
                steps = range(step, step + cfg.updates)
                remember(made, model, made.old, steps[1:], policy, cfg)
                if reference is not None:
                    remember(made, reference, made.reference, steps, policy, cfg)
                figures = rollout.figures(made, tok)
                run.log({"step": step, **figures, "rollout_seconds": time.time() - began,
                         "rollout_tokens_per_s": figures["length"] * len(made.rows) / seconds})
                world.first(partial(rollout.keep_samples, run.folder, made, step, tasks, tok,
                                    cfg))

            # the update, over all answers of the rollout from which there is something to learn
            learning = time.time()
            share = rollout.my_share(made.learned, world)
            rows = rollout.rows_at(made, share)
            learned = [made.rows[i] for i in made.learned]
            total = sum(rollout.terms_of(row, tok.stop_ids, cfg.estimator) for row in learned)
            tokens = sum(row.length(tok.stop_ids) for row in learned)
            sums = torch.zeros(3)
            for start, end in parallel.micro_batches(model, world, len(rows), cfg):
                places = share[start:end]
                batch, passes = passes_over(rows[start:end], step, policy, cfg)
                advantage = rollout.padded([[a] for a in made.advantage], places,
                                           batch.tokens[:, :1])
                with policy.autocast():
                    new = log_probs(model, batch, passes, policy.recipe, cfg.temperature,
                                    policy.banned)
                    old = new.detach()  # at first, the policy is still the one that wrote
                    if update:
                        old = rollout.padded(made.old[update - 1], places, new)
                    against = None
                    if reference is not None:
                        against = rollout.padded(made.reference[update], places, new)
                    loss, kl, clipped = clipped_loss(new, old, against, read_by(passes),
                                                     advantage[:, 0], cfg)
                (loss / total * world.size).backward()  # FSDP averages over processes
                sums += torch.stack([loss.detach(), kl, clipped]).cpu()
            *losses, stop = world.sum(*(sums / max(1, total)), bool(run.stop_signals))
            lr, grad_norm = parallel.learning_rate(step, cfg), None
            if rows:
                grad_norm = parallel.update(model, optimizer, step, losses[0], lr, cfg.grad_clip)
            loss, kl, clipped = losses if rows else (None, None, None)
            taken = time.time() - learning
            run.log({"step": step, "loss": loss, "kl": kl, "clip_fraction": clipped, "lr": lr,
                     "grad_norm": grad_norm, "tokens": tokens, "seconds": time.time() - began,
                     "update_seconds": taken, "update_tokens_per_s": tokens / taken,
                     "memory_gb": plan.peak_memory(world.device) / 1e9})
            bar.update()
            solved = rollout.mean(reward.status == "passed" for reward in made.rewards)
            bar.set_postfix_str(f"solved {solved:.1%}, KL {kl or 0:.3f}", refresh=False)

            done = step + 1 == cfg.max_steps
            if done and val_tasks and cfg.eval_every:
                evaluate(cfg.max_steps, score, run)
            if done or stop or (step + 1) % cfg.save_every == 0:
                beside = partial(save_beside, policy=policy, reference=reference, made=made,
                                 in_use=(step + 1) % cfg.updates > 0)
                run.save(step + 1, model, optimizer, tok, policy.recipe, cfg, machine, fingerprint,
                         beside)
            if stop:
                world.say(f"stopped after step {step + 1}; the same command with --resume=true "
                          "continues")
                return run.exit_code()
    return 0


def main(argv=None):
    cfg, _ = configure(Config, argv)
    check(cfg)
    tasks = tasks_of(cfg)
    val_tasks = read_tasks(cfg.val_tasks, cfg.shown_tests) if cfg.val_tasks else []
    own = load_own(cfg.reward)
    world = parallel.start(pick_device(cfg.device), cfg.shard_ranks)
    with (open_sandbox(cfg) as sandbox,  # before the model: it forks
          Run(cfg.out, cfg.resume, world) as run):
        if cfg.check_references and run.checkpoint is None:
            world.first(lambda: refuse_failing(tasks + val_tasks, sandbox))
        rewards = Rewards(sandbox, cfg, run.folder, cfg.style, own)
        code = train(cfg, world, run, rewards, tasks, val_tasks)
    world.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
