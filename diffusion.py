"""The forward process and what it is for: schedules, warmup, masking strategies, the weighted loss,
the likelihood bound.

    x0 --corrupt--> xt, masked, weight --model--> hidden --weighted_loss--> Σ weight · cross entropy

Four objectives share it. They differ in which tokens share a noise level (`noise_blocks`), who
attends to whom (`spans_for`), and where the model's prediction of a token is read (`read_at`).

    objective       noise            attention         input
    ar              none             causal            x0
    bidirectional   t per document   whole document    xt
    ar_diffusion    t per document   causal            xt
    block           t per K-block    block diffusion   [xt ; x0]

Every draw is a function of (seed, step, global row) alone, by a counter-based generator (Philox),
one row at a time: world size, accumulation, resume and device change nothing.

Not covered: decoding (decode.py), continuous-time schedules other than the linear one (u = t).
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from math import comb
from typing import Literal

import numpy as np
import torch

from configurator import Float, Int, Mistake, check_fields, shortened
from spans import Spans

NOISE, ROW_ORDER = 1, 2  # what a stream of draws is for: different purposes never overlap


def stream(seed, purpose, step, row):
    """The random stream of one row at one step, by Philox.

    Its key is (seed, purpose), its counter starts at (row, step); all are 64-bit and unsigned.
    """
    key = np.array([seed, purpose], np.uint64)
    counter = np.array([0, 0, row, step], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass
class Recipe:
    """What is trained: the objective and its noise. mask_id, pad_id come from the tokenizer."""
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] = "block"
    shift: bool | None = None  # predict token i at i - 1 (as the AR head) or at i; None: only in ar
    block_size: Int(1, 2**20) = 4  # K, under `block`
    schedule: Literal["uniform", "clipped", "count"] = "clipped"
    t_min: Float(1e-9, 1) = 1e-3  # floor of the mask rate under `uniform`
    antithetic: bool = True  # spread t evenly over the blocks of a row and the rows of a batch
    u_warmup_steps: Int(0, 2**31) = 0  # S: steps in which t <= u_max(step) and weights are 1
    u_init: Float(1e-9, 1) = 1e-3  # u_max at step 0
    strategies: tuple = ((0.0, 0.0, 0.0),)  # rates of CoDA's S1, S2, S3 per epoch; the last stays
    anneal_steps: Int(0, 2**31) = 0  # `bidirectional`: steps in which causal attention opens up
    complementary: bool = False  # a row is read twice, under a mask and under its complement
    mask_id: Int(0, 2**31) | None = None
    pad_id: Int(0, 2**31) | None = None

    @classmethod
    def of(cls, settings, mask_id, pad_id):
        """The recipe among a script's settings."""
        names = [f.name for f in fields(cls) if hasattr(settings, f.name)]
        chosen = {name: getattr(settings, name) for name in names}
        return cls(**chosen, mask_id=mask_id, pad_id=pad_id)

    def __post_init__(self):
        check_fields(self)
        if self.shift is None:
            self.shift = self.objective == "ar"
        if self.objective == "ar" and not self.shift:
            raise Mistake("shift=False is not possible with objective='ar': "
                          "position i - 1 predicts token i")
        if self.objective != "ar" and self.mask_id is None:
            raise Mistake(f"objective={self.objective!r} needs a mask token, "
                          "and the tokenizer has no <mask>")
        if self.anneal_steps and self.objective != "bidirectional":
            raise Mistake(f"anneal_steps={self.anneal_steps} needs objective='bidirectional', not "
                          f"{self.objective!r}: only there does attention end up open on both "
                          "sides")
        self.check_strategies()
        self.check_complementary()

    def check_complementary(self):
        if not self.complementary:
            return
        if self.objective == "ar" or self.schedule != "count":
            raise Mistake("complementary=true needs a diffusion objective and schedule='count', "
                          f"not {self.objective!r} and {self.schedule!r}, where it is biased")
        if self.u_warmup_steps:  # the complement of few masks is many
            raise Mistake(f"complementary=true excludes u_warmup_steps={self.u_warmup_steps}: "
                          "give --u_warmup_steps=0")

    def check_strategies(self):
        if not self.strategies or not all(map(is_triple_of_rates, self.strategies)):
            raise Mistake(f"strategies={shortened(self.strategies)} must be one triple (S1, S2, "
                          "S3) of rates per epoch, such as ((0.01, 0.01, 0.05), (0.05, 0.05, "
                          "0.1)), with S1 + S2 and S3 at most 1")
        if not any(map(any, self.strategies)):
            return
        if self.objective != "bidirectional" or self.schedule != "uniform":
            raise Mistake("strategies other than 0 need objective='bidirectional' and "
                          f"schedule='uniform', not {self.objective!r} and {self.schedule!r}: "
                          "CoDA's masking is defined only there")
        if self.pad_id is None:
            raise Mistake("strategies need a pad token, and the tokenizer has no <pad>")

    @property
    def attention_block(self):
        """Tokens that see each other both ways: K, 1 (causal), or None (the document)."""
        sizes = {"ar": 1, "ar_diffusion": 1, "bidirectional": None, "block": self.block_size}
        return sizes[self.objective]

    @property
    def causal_block(self):
        """Tokens written before all tokens to their right: K, 1, or None (the whole text).

        It is attention's block, but for `ar_diffusion`: its attention is causal, and any masked
        token of the text may be written next.
        """
        return {"ar": 1, "block": self.block_size}.get(self.objective)


def is_triple_of_rates(triple):
    if not isinstance(triple, (tuple, list)) or len(triple) != 3:
        return False
    if not all(isinstance(rate, (int, float)) and 0 <= rate <= 1 for rate in triple):
        return False
    return triple[0] + triple[1] <= 1


@dataclass
class Draw:
    """Which random numbers a batch gets: those of its rows' streams at this step.

    rows: each row's number in the global batch of `batch_rows` rows. complement: for each row,
    whether it gets the complement of its mask; None: none does.
    """
    seed: int
    step: int
    rows: range | list
    batch_rows: int
    complement: list | None = None

    @classmethod
    def of(cls, recipe, seed, step, rows, batch_rows):
        """The draw of these rows of a step; the result's `rows` are those of the data.

        With `complementary` rows 2p and 2p + 1 are a pair: row p of the data, of half as many.
        """
        if not recipe.complementary:
            return cls(seed, step, rows, batch_rows)
        return cls(seed, step, [row // 2 for row in rows], batch_rows // 2,
                   [row % 2 == 1 for row in rows])


@dataclass
class Noised:
    """Rows ready for the model, each (B, T).

    weight is float32, 1/u of the token's block where masked, else 0.
    """
    x0: torch.Tensor
    xt: torch.Tensor
    masked: torch.Tensor
    maskable: torch.Tensor
    weight: torch.Tensor
    doc_start: torch.Tensor
    doc_end: torch.Tensor

    @classmethod
    def clean(cls, batch):
        """Without noise and with every maskable token scored, as `ar` reads it."""
        return cls(x0=batch.x0, xt=batch.x0, masked=batch.maskable, maskable=batch.maskable,
                   weight=batch.maskable.float(), doc_start=batch.doc_start, doc_end=batch.doc_end)

    def rows(self, start, end, device):
        """Rows from `start` to before `end`, on a device."""
        return Noised(**{name: x[start:end].to(device) for name, x in vars(self).items()})


# --- who shares a t, who sees whom, where a prediction is read -----------------------------------

def noise_blocks(doc_start, recipe):
    """(B, T) int64: the first position of each token's noise block, which serves as the block's id.

    A noise block is a document, or under `block` each K positions of it.
    doc_start: (B, T) integers.
    """
    if recipe.objective != "block":
        return doc_start.long()
    i = torch.arange(doc_start.shape[1], device=doc_start.device)
    return i - (i - doc_start) % recipe.block_size


def revealed(step, recipe, T):
    """How many tokens to its right a position sees at this step of the annealing; None: all.

    See Spans.annealed. step: None after training.
    """
    if step is None or step >= recipe.anneal_steps:
        return None
    return T * step // recipe.anneal_steps


def spans_for(recipe, doc_start, doc_end, step=None):
    """The attention of the objective, over xt (or x0), or over [xt ; x0] under `block`.

    doc_start, doc_end: (B, T) int32. step: of the training; None: it is over.
    """
    right = revealed(step, recipe, doc_start.shape[1])
    if right is not None:
        return Spans.annealed(doc_start, doc_end, right)
    return Spans.of(doc_start, doc_end, recipe.attention_block, noisy=recipe.objective == "block")


def read_at(recipe, doc_start):
    """(B, T) int64: at which of the model's S positions the prediction of each token is read.

    With `shift` the first token of a K-block is read at its left neighbor in the *clean* half: the
    noisy neighbor belongs to another block, which it never saw clean.
    """
    T = doc_start.shape[1]
    i = torch.arange(T, device=doc_start.device).expand(doc_start.shape)
    if not recipe.shift:
        return i
    if recipe.objective != "block":
        return (i - 1).clamp(min=0)
    is_first = i == noise_blocks(doc_start, recipe)
    return torch.where(is_first, T + i - 1, i - 1)


# --- the forward process -------------------------------------------------------------------------

def u_max(step, recipe):
    """The warmup's cap on t, 1 from step S on (Stable-DiffCoder Eq. 10)."""
    S = recipe.u_warmup_steps
    if step >= S:
        return 1.0
    return recipe.u_init + (1 - recipe.u_init) * step / S


def draw_t(random, blocks, recipe, draw, row):
    """t in (0, 1] for each of the row's `blocks` blocks, float64 (Stable-DiffCoder §3.2).

    antithetic: the unit interval is cut into n_r parts for the row's n_r blocks, each part into B
    for the rows of the global batch. Two permutations deal them out, so that t is uniform at every
    position.
    """
    n_r = blocks
    U = 1 - random.random(n_r)  # (0, 1]: never 0, where the weight 1/t would be infinite
    if recipe.antithetic:
        pi = random.permutation(n_r)
        B = draw.batch_rows
        sigma = stream(draw.seed, ROW_ORDER, draw.step, 0).permutation(B)[row]
        U = (pi + (sigma + U) / B) / n_r
    return U * u_max(draw.step, recipe)


def mask_row(random, maskable, block, t, n, schedule, t_min):
    """masked (T,) bool and u (T,) float64 of one row (Stable-DiffCoder §3.3).

    block: (T,) block ids, contiguous and rising.
    t, n: (T,), the noise level and the maskable count of each token's block.
    """
    T = len(maskable)
    r = random.random(T)
    n = np.maximum(n, 1)  # blocks with nothing maskable are not read
    order = np.lexsort((r, ~maskable, block))  # block by block; in it the maskable ones by rising r
    rank = np.empty(T, np.int64)
    rank[order] = np.arange(T) - block[order]  # rank 0 of a block has its smallest r
    if schedule == "count":
        m = np.ceil(n * t)
        return maskable & (rank < m), m / n
    u = np.maximum(t, t_min if schedule == "uniform" else 1 / n)
    masked = maskable & (r < u)
    if schedule == "clipped":
        empty = np.bincount(block, masked, T)[block] == 0
        masked |= maskable & empty & (rank == 0)  # nothing below u: the smallest r is uniform
    return masked, u


def cut_row(random, x0, maskable, rates, pad_id):
    """CoDA's S1 (an unmaskable prefix) and S2 (a suffix of pad), at most one of them.

    Returns x0 and maskable, (T,).
    """
    T = len(x0)
    r = random.random()
    cut = random.integers(1, T)
    before_cut = np.arange(T) < cut
    if r < rates[0]:
        return x0, maskable & ~before_cut
    if r < rates[0] + rates[1]:
        return np.where(before_cut, x0, pad_id), maskable & before_cut
    return x0, maskable


def span_mask_row(random, maskable, doc_start, t):
    """CoDA's S3 (block masking): spans of k tokens, masking every token with probability t.

    Spans start at every place from k - 1 before the document's first token to its last. A token is
    left alone only if none of k independent starts happened: (1 - p)^k = 1 - t.
    """
    k = random.choice([2, 4, 8])
    masked = np.zeros_like(maskable)
    for start in np.unique(doc_start):
        inside = np.flatnonzero(doc_start == start)
        p = 1 - (1 - t[inside[0]]) ** (1 / k)
        starts = random.random(len(inside) + k - 1) < p
        masked[inside] = np.convolve(starts, np.ones(k), "valid") > 0.5
    return masked & maskable


def paired(masked, maskable, u, complement):
    """One half of a complementary pair: masked, maskable (T,) bool and weight (T,).

    Of n tokens one half masks m, the other n - m. Weights of n/2m = 1/(2u) and n/2(n - m), and of 1
    where m = n, make the exact ELBO of their sum. A pair counts its tokens once.
    masked, u: as mask_row returns them under `count`.
    """
    if complement:
        return maskable & ~masked, np.zeros_like(maskable), 1 / (2 * np.maximum(1 - u, 1e-9))
    return masked, maskable, np.where(u < 1, 1 / (2 * u), 1)


def corrupt_row(x0, block, doc_start, maskable, epoch, recipe, draw, row, complement):
    """One row through the forward process.

    x0, block, doc_start, maskable: (T,) numpy. epoch: int, for `strategies`. row: its number.
    complement: whether this is the second row of a complementary pair.
    Returns x0, xt, masked, maskable, weight, (T,) each: numpy, as in Noised.
    """
    random = stream(draw.seed, NOISE, draw.step, row)
    rates = recipe.strategies[min(epoch, len(recipe.strategies) - 1)]
    if rates[0] or rates[1]:
        x0, maskable = cut_row(random, x0, maskable, rates, recipe.pad_id)
    by_spans = rates[2] > 0 and random.random() < rates[2]

    count = np.bincount(block, maskable, len(x0))  # maskable tokens of each block, at its id
    filled = np.flatnonzero(count)
    t = np.zeros(len(x0))
    t[filled] = draw_t(random, len(filled), recipe, draw, row)
    t = t[block]
    if by_spans:
        u = np.maximum(t, recipe.t_min)
        masked = span_mask_row(random, maskable, doc_start, u)
    else:
        schedule, t_min = recipe.schedule, recipe.t_min
        masked, u = mask_row(random, maskable, block, t, count[block], schedule, t_min)
    u = np.where(maskable, u, 1)
    weight = np.ones_like(u) if draw.step < recipe.u_warmup_steps else 1 / u
    if recipe.complementary:
        masked, maskable, weight = paired(masked, maskable, u, complement)
    weight = np.where(masked, weight, 0).astype(np.float32)
    return x0, np.where(masked, recipe.mask_id, x0), masked, maskable, weight


def corrupt(batch, recipe, draw):
    """The forward process on a batch (Stable-DiffCoder §3.2-3.3, CoDA's progressive masking).

    batch: a loader.Batch on the CPU: x0 (B, T) int64; doc_start, doc_end (B, T) int32; maskable
    (B, T) bool; epochs (B,) ints, for `strategies`.
    Returns a Noised. Under `ar`, xt = x0 and every maskable token is scored with weight 1.
    """
    if recipe.objective == "ar":
        return Noised.clean(batch)
    block = noise_blocks(batch.doc_start, recipe)
    per_row = zip(batch.x0.numpy(), block.numpy(), batch.doc_start.numpy(), batch.maskable.numpy(),
                  map(int, batch.epochs))
    complement = draw.complement or [False] * len(draw.rows)
    noised_rows = [corrupt_row(*arrays, recipe, draw, int(row), second)
                   for arrays, row, second in zip(per_row, draw.rows, complement)]
    x0, xt, masked, maskable, weight = (torch.from_numpy(np.stack(x)) for x in zip(*noised_rows))
    return Noised(x0=x0, xt=xt, masked=masked, maskable=maskable, weight=weight,
                  doc_start=batch.doc_start, doc_end=batch.doc_end)


# --- the loss ------------------------------------------------------------------------------------

def token_losses(model, noised, recipe, step=None):
    """Cross entropy of every masked token in nats, (N,) float32, ordered as masked.nonzero().

    step: of the training, where attention is being annealed; None: it no longer is.
    """
    tokens = noised.xt
    queries = noised.xt.shape[1]
    if recipe.objective == "block":
        tokens = torch.cat([noised.xt, noised.x0], 1)  # (B, 2T)
        if recipe.shift:
            queries = tokens.shape[1]  # the first token of a block is read in the clean half
    spans = spans_for(recipe, noised.doc_start, noised.doc_end, step)
    row, i = noised.masked.nonzero(as_tuple=True)
    read = row * queries + read_at(recipe, noised.doc_start)[row, i]  # (N,)
    hidden = model(tokens, spans, queries=queries, read=read)  # (N, d_model)
    return model.token_loss(hidden, noised.x0[row, i])


def weighted_loss(model, noised, recipe, step=None):
    """Σ weight · cross entropy over these rows' masked tokens, a scalar (Stable-DiffCoder §3.3).

    The training loss is this over the number of maskable tokens of the *global* batch, which the
    caller knows. step: see token_losses.
    """
    return (token_losses(model, noised, recipe, step) * noised.weight[noised.masked]).sum()


# --- the likelihood bound ------------------------------------------------------------------------

EXACT_UP_TO = 8  # maskable tokens in a block: 2^8 - 1 = 255 forwards


def largest_block(recipe, batch):
    """How many maskable tokens the largest noise block of these rows has."""
    block = noise_blocks(batch.doc_start, recipe)
    return int(torch.zeros_like(block).scatter_add(1, block, batch.maskable.long()).max())


def every_mask(clean, recipe, largest):
    """Noised rows that together run every block through each of its 2^n - 1 masks.

    A mask of m of the block's n tokens has weight ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m · C(n, m)).
    largest: no n is above it.
    """
    block = noise_blocks(clean.doc_start, recipe)
    count = torch.zeros_like(block).scatter_add(1, block, clean.maskable.long())
    before = clean.maskable.long().cumsum(1) - clean.maskable.long()  # maskable ones to the left
    place = before - before.gather(1, block)  # this one's number in its block
    n = count.gather(1, block)
    for pattern in range(1, 2**largest):
        m = pattern.bit_count()
        masked = clean.maskable & ((pattern >> place) & 1).bool() & (pattern < 2**n)
        weights = [1 / (m * comb(size, m)) if size >= m else 0.0 for size in range(largest + 1)]
        yield replace(clean, xt=clean.x0.masked_fill(masked, recipe.mask_id), masked=masked,
                      weight=torch.tensor(weights).to(n.device)[n])


@torch.no_grad()
def nelbo(model, batch, recipe, draws=8, seed=0, rows=None, largest=None):
    """The negative evidence lower bound of these rows, in nats: an upper bound on -log p(x0).

    batch: a loader.Batch, on the CPU. Exact under `ar` (the likelihood itself) and where no noise
    block has more than 8 maskable tokens; else `draws` Monte Carlo masks by the `count` schedule,
    whose weight is n / m.
    rows: (B,) the rows' numbers in their random streams; None: 0, 1, …
    largest: largest_block of all processes' rows, where these must run alike; None: of these rows.
    Returns (nats, variance): floats, the sum over all maskable tokens and the variance of that
    estimate, 0 where exact.
    """
    device = model.embed_tokens.weight.device
    B = len(batch.x0)
    clean = Noised.clean(batch).rows(0, B, device)
    if recipe.objective == "ar":
        return weighted_loss(model, clean, recipe).item(), 0.0
    if largest is None:
        largest = largest_block(recipe, batch)
    if largest <= EXACT_UP_TO:
        masks = every_mask(clean, recipe, largest)
        return sum((weighted_loss(model, noised, recipe).item() for noised in masks), 0.0), 0.0

    plain = Recipe(recipe.objective, recipe.shift, recipe.block_size, "count", antithetic=False,
                   mask_id=recipe.mask_id)
    nats = torch.zeros(draws, B, dtype=torch.float64)  # by row: no batching changes the variance
    for n in range(draws):
        draw = Draw(seed, n, range(B) if rows is None else rows, batch_rows=1)
        noised = corrupt(batch, plain, draw).rows(0, B, device)
        weighted = token_losses(model, noised, plain) * noised.weight[noised.masked]
        nats[n].index_add_(0, noised.masked.nonzero()[:, 0].cpu(), weighted.double().cpu())
    return nats.mean(0).sum().item(), (nats.var(0) / draws).sum().item()


def evaluate(model, batch, recipe, token_bytes, draws, micro_batch, world, autocast=nullcontext):
    """The NELBO of held-out rows under fixed noise, shared out among the processes.

    batch: a loader.Batch of all rows, on the CPU. token_bytes: (vocab,) int64, bytes per token.
    draws: masks per row where the NELBO cannot be enumerated. micro_batch: rows per forward.
    world: a parallel.World, which knows this process's rank. autocast: makes a context to run in.
    Returns a dict: nats per token, its standard error, bits per byte of the scored tokens' bytes,
    and how many tokens and bytes that was.
    """
    totals = np.zeros(4)  # nats, their variance, tokens, bytes
    rows = len(batch.x0)
    largest = largest_block(recipe, batch)
    share = math.ceil(rows / world.size)  # forwards of each process: FSDP gathers weights in each
    end = (world.rank + 1) * share
    for start in range(world.rank * share, end, micro_batch):
        numbers = range(start, min(start + micro_batch, end))
        part = batch.select([min(row, rows - 1) for row in numbers])
        repeated = torch.tensor([row >= rows for row in numbers])  # padding: the last row again
        part.maskable &= ~repeated[:, None]
        with autocast():
            nats, variance = nelbo(model, part, recipe, draws, rows=numbers, largest=largest)
        scored = part.x0[part.maskable]
        totals += [nats, variance, len(scored), token_bytes[scored].sum()]
    nats, variance, tokens, bytes_ = world.sum(*totals)
    return {"nelbo": nats / tokens, "bits_per_byte": nats / math.log(2) / (bytes_ or math.nan),
            "nelbo_stderr": variance**0.5 / tokens, "tokens": int(tokens), "bytes": int(bytes_)}
