"""The forward process and what it is for: schedules, warmup, masking strategies, the weighted loss, the NELBO.

    x0 --corrupt--> xt, masked, weight --model--> hidden --weighted_loss--> Σ weight · cross entropy

Four objectives share it: they differ in which tokens get noise together (`block_firsts`), who attends to whom
(`spans_for`), and where the model's prediction of a token is read (`read_at`).

    objective       noise            attention         input
    ar              none             causal            x0
    bidirectional   t per document   whole document    xt
    ar_diffusion    t per document   causal            xt
    block           t per K-block    block diffusion   [xt ; x0]

Every draw is a function of (seed, step, global row) alone, by a counter-based generator (Philox), one row at a time:
world size, accumulation, resume and device change nothing.

Not covered: decoding (sample.py), continuous-time schedules other than the linear one (u = t).
"""
from dataclasses import dataclass
from math import comb

import numpy as np
import torch

from spans import Spans

NOISE, ROW_ORDER = 1, 2  # what a stream of draws is for: streams of different purposes never overlap


def stream(seed, purpose, step, row):
    """The random stream of one row at one step: Philox keyed by (seed, purpose), its counter starting at (row, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, row, step]))


@dataclass
class Recipe:
    """What is trained: the objective and its noise. mask_id, pad_id come from the tokenizer."""
    objective: str = "block"
    shift: bool | None = None  # token i is predicted at i - 1 (True, the AR head reused) or at i; None: only in ar
    block_size: int = 4  # K, under `block`
    schedule: str = "clipped"
    t_min: float = 1e-3  # floor of the mask rate under `uniform`
    antithetic: bool = True  # spread t evenly over the blocks of a row and the rows of a batch
    u_warmup_steps: int = 0  # S: t stays below u_max(step) and weights are 1 for this many steps
    u_init: float = 1e-3  # u_max at step 0
    strategies: tuple = ((0.0, 0.0, 0.0),)  # rates of CoDA's S1, S2, S3, a triple an epoch; the last one stays
    anneal_steps: int = 0  # under `bidirectional`: steps over which causal attention opens to the whole document
    mask_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self):
        for name, allowed in (("objective", ("ar", "bidirectional", "ar_diffusion", "block")),
                              ("schedule", ("uniform", "clipped", "count"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        self.shift = self.objective == "ar" if self.shift is None else self.shift
        if self.objective == "ar" and not self.shift:
            raise ValueError("shift=False is not possible with objective='ar': position i - 1 predicts token i")
        if self.objective != "ar" and self.mask_id is None:
            raise ValueError(f"objective={self.objective!r} needs a mask token, and the tokenizer has no <mask>")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be 1 or more")
        for name in ("t_min", "u_init"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1]")
        if self.anneal_steps and self.objective != "bidirectional":
            raise ValueError(f"anneal_steps={self.anneal_steps} needs objective='bidirectional', not {self.objective!r}: only "
                             "there does attention end up open on both sides")

        def is_triple(s):
            return (isinstance(s, (tuple, list)) and len(s) == 3 and all(isinstance(p, (int, float)) and p >= 0 for p in s)
                    and s[0] + s[1] <= 1 and s[2] <= 1)
        if not isinstance(self.strategies, (tuple, list)) or not self.strategies or not all(map(is_triple, self.strategies)):
            raise ValueError(f"strategies={self.strategies} must be one triple (S1, S2, S3) of rates an epoch, "
                             "such as ((0.01, 0.01, 0.05), (0.05, 0.05, 0.1)), with S1 + S2 and S3 at most 1")
        if any(map(any, self.strategies)):
            if self.objective != "bidirectional" or self.schedule != "uniform":
                raise ValueError("strategies other than 0 need objective='bidirectional' and schedule='uniform', not "
                                 f"{self.objective!r} and {self.schedule!r}: CoDA's masking is defined only there")
            if self.pad_id is None:
                raise ValueError("strategies need a pad token, and the tokenizer has no <pad>")


@dataclass
class Noised:
    """Rows ready for the model, each (B, T). weight is float32, 1/u of the token's block where masked, else 0."""
    x0: torch.Tensor
    xt: torch.Tensor
    masked: torch.Tensor
    maskable: torch.Tensor
    weight: torch.Tensor
    doc_start: torch.Tensor
    doc_end: torch.Tensor

    def rows(self, a, b, device):
        """Rows a..b, on a device."""
        return Noised(*(x[a:b].to(device) for x in vars(self).values()))


# --- who shares a t, who sees whom, where a prediction is read ----------------------------------------------------

def block_firsts(doc_start, recipe):
    """(B, T) int64: the first position of each token's noise block, which serves as the block's id.

    A block is a document, or under `block` each K positions of it. doc_start: (B, T) integers.
    """
    if recipe.objective != "block":
        return doc_start.long()
    i = torch.arange(doc_start.shape[1], device=doc_start.device)
    return i - (i - doc_start) % recipe.block_size


def revealed(step, recipe, T):
    """How many tokens to its right a position sees at this step of the annealing (see Spans.annealed); None: all of them."""
    return None if step is None or step >= recipe.anneal_steps else T * step // recipe.anneal_steps


def spans_for(recipe, doc_start, doc_end, step=None):
    """The attention of the objective, over xt (or x0), or over [xt ; x0] under `block`. step: None after training."""
    right = revealed(step, recipe, doc_start.shape[1])
    if right is not None:
        return Spans.annealed(doc_start, doc_end, right)
    block_size = {"ar": 1, "ar_diffusion": 1, "bidirectional": None, "block": recipe.block_size}[recipe.objective]
    return Spans.of(doc_start, doc_end, block_size, noisy=recipe.objective == "block")


def read_at(recipe, doc_start):
    """(B, T) int64: at which of the model's S positions the prediction of each token is read.

    With `shift` the first token of a K-block is read at its left neighbour in the *clean* half: the noisy neighbour
    belongs to another block, which it never saw clean.
    """
    T = doc_start.shape[1]
    i = torch.arange(T, device=doc_start.device).expand(doc_start.shape)
    if not recipe.shift:
        return i
    if recipe.objective != "block":
        return (i - 1).clamp(min=0)
    is_first = i == block_firsts(doc_start, recipe)
    return torch.where(is_first, T + i - 1, i - 1)


# --- the forward process ------------------------------------------------------------------------------------------

def u_max(step, recipe):
    """The warmup's cap on t, 1 from step S on (Stable-DiffCoder Eq. 10)."""
    S = recipe.u_warmup_steps
    return 1.0 if step >= S else recipe.u_init + (1 - recipe.u_init) * step / S


def draw_t(draw, blocks, recipe, seed, step, row, batch_rows):
    """t in (0, 1] for each of the row's blocks, float64 (Stable-DiffCoder §3.2).

    antithetic: the unit interval is cut into n_r parts for the row's n_r blocks, each part into B for the rows of the
    global batch; two permutations deal them out, so that t is uniform at every position.
    """
    n_r = len(blocks)
    U = 1 - draw.random(n_r)  # (0, 1]: never 0, where the weight 1/t would be infinite
    if recipe.antithetic:
        pi = draw.permutation(n_r)
        sigma = stream(seed, ROW_ORDER, step, 0).permutation(batch_rows)[row]
        U = (pi + (sigma + U) / batch_rows) / n_r
    return U * u_max(step, recipe)


def mask_row(draw, maskable, first, t, n, schedule, t_min):
    """masked (T,) bool and u (T,) float64 of one row (Stable-DiffCoder §3.3).

    first: (T,) block ids, contiguous and rising. t, n: (T,), each token's block's noise level and maskable count.
    """
    T = len(maskable)
    r = draw.random(T)
    n = np.maximum(n, 1)  # blocks with nothing maskable are not read
    order = np.lexsort((r, ~maskable, first))  # block by block; in it the maskable tokens by rising r
    rank = np.empty(T, np.int64)
    rank[order] = np.arange(T) - first[order]  # a block's tokens stay in its own places: rank 0 has its smallest r
    if schedule == "count":
        m = np.ceil(n * t)
        return maskable & (rank < m), m / n
    u = np.maximum(t, t_min if schedule == "uniform" else 1 / n)
    masked = maskable & (r < u)
    if schedule == "clipped":
        empty = np.bincount(first, masked, T)[first] == 0
        masked |= maskable & empty & (rank == 0)  # none was below u, so the smallest r is a uniform choice
    return masked, u


def cut_row(draw, x0, maskable, rates, pad_id):
    """CoDA's S1 (an unmaskable prefix) and S2 (a suffix of pad), at most one of them. Returns x0 and maskable, (T,)."""
    T, r = len(x0), draw.random()
    cut = draw.integers(1, T)
    if r < rates[0]:
        maskable = maskable & (np.arange(T) >= cut)
    elif r < rates[0] + rates[1]:
        maskable = maskable & (np.arange(T) < cut)
        x0 = np.where(np.arange(T) < cut, x0, pad_id)
    return x0, maskable


def span_mask_row(draw, maskable, doc_start, t):
    """CoDA's S3 (block masking): spans of k tokens, in every document, so that each is masked with probability t.

    Spans start at every place from k - 1 before the document's first token to its last: a token is left alone only if
    none of k independent starts happened, (1 - p)^k = 1 - t.
    """
    k = draw.choice([2, 4, 8])
    masked = np.zeros_like(maskable)
    for a in np.unique(doc_start):
        inside = np.flatnonzero(doc_start == a)
        p = 1 - (1 - t[inside[0]]) ** (1 / k)
        starts = draw.random(len(inside) + k - 1) < p
        masked[inside] = np.convolve(starts, np.ones(k), "valid") > 0.5
    return masked & maskable


def corrupt_row(x0, first, doc_start, maskable, recipe, seed, step, row, batch_rows, epoch):
    """One row through the forward process. first: (T,) block ids; the rest, and the results, as `corrupt`'s: numpy."""
    draw = stream(seed, NOISE, step, row)
    rates = recipe.strategies[min(epoch, len(recipe.strategies) - 1)]
    if rates[0] or rates[1]:
        x0, maskable = cut_row(draw, x0, maskable, rates, recipe.pad_id)
    by_spans = rates[2] > 0 and draw.random() < rates[2]

    count = np.bincount(first, maskable, len(x0))  # maskable tokens of each block, at its id
    blocks = np.flatnonzero(count)
    t = np.zeros(len(x0))
    t[blocks] = draw_t(draw, blocks, recipe, seed, step, row, batch_rows)
    t = t[first]
    if by_spans:
        u = np.maximum(t, recipe.t_min)
        masked = span_mask_row(draw, maskable, doc_start, u)
    else:
        masked, u = mask_row(draw, maskable, first, t, count[first], recipe.schedule, recipe.t_min)
    weight = np.zeros(len(x0), np.float32)
    weight[masked] = 1 if step < recipe.u_warmup_steps else 1 / u[masked]
    return x0, np.where(masked, recipe.mask_id, x0), masked, maskable, weight


def corrupt(x0, doc_start, doc_end, maskable, recipe, seed, step, rows, batch_rows, epochs=None):
    """The forward process on a batch (Stable-DiffCoder §3.2-3.3, CoDA's progressive masking).

    x0: (B, T) int64. doc_start, doc_end: (B, T) int32. maskable: (B, T) bool. All torch, on the CPU.
    rows: (B,) each row's number in the global batch of `batch_rows`. epochs: (B,) ints, for `strategies`; None: 0.
    Returns a Noised. Under `ar`, xt = x0 and every maskable token is scored with weight 1.
    """
    if recipe.objective == "ar":
        return Noised(x0, x0, maskable, maskable, maskable.float(), doc_start, doc_end)
    epochs = np.zeros(len(x0), int) if epochs is None else epochs
    host = [x.numpy() for x in (x0, block_firsts(doc_start, recipe), doc_start, maskable)]
    parts = [corrupt_row(*row, recipe, seed, step, int(r), batch_rows, int(e))
             for *row, r, e in zip(*host, rows, epochs)]
    x0, xt, masked, maskable, weight = (torch.from_numpy(np.stack(p)) for p in zip(*parts))
    return Noised(x0, xt, masked, maskable, weight, doc_start, doc_end)


# --- the loss -----------------------------------------------------------------------------------------------------

def token_losses(model, noised, recipe, step=None):
    """Cross entropy of every masked token, in nats, (N,) float32, in the order of noised.masked.nonzero()."""
    tokens = torch.cat([noised.xt, noised.x0], 1) if recipe.objective == "block" else noised.xt
    hidden = model(tokens, spans_for(recipe, noised.doc_start, noised.doc_end, step))  # (B, S, d_model)
    b, i = noised.masked.nonzero(as_tuple=True)
    where = b * hidden.shape[1] + read_at(recipe, noised.doc_start)[b, i]  # the vocabulary meets scored tokens only
    return model.token_loss(hidden.flatten(0, 1).index_select(0, where), noised.x0[b, i])


def weighted_loss(model, noised, recipe, step=None):
    """Σ weight · cross entropy over these rows' masked tokens, a scalar (Stable-DiffCoder §3.3, the ELBO's weights).

    The training loss is this over the number of maskable tokens of the *global* batch, which the caller knows. step: of
    the training, where attention is being annealed; None: it no longer is.
    """
    return (token_losses(model, noised, recipe, step) * noised.weight[noised.masked]).sum()


# --- the likelihood bound -----------------------------------------------------------------------------------------

EXACT_UP_TO = 8  # maskable tokens in a block: 2^8 - 1 = 255 forwards


def largest_block(recipe, doc_start, maskable):
    """How many maskable tokens the largest block of these rows has."""
    first = block_firsts(doc_start, recipe)
    return int(torch.zeros_like(first).scatter_add(1, first, maskable.long()).max())


def every_mask(noised, recipe, largest):
    """Noised rows that together run every block through each of its 2^n - 1 masks, with the NELBO's weights.

    A mask of m of the block's n tokens has weight ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m · C(n, m)). largest: no n is above it.
    """
    first = block_firsts(noised.doc_start, recipe)
    count = torch.zeros_like(first).scatter_add(1, first, noised.maskable.long())
    before = noised.maskable.long().cumsum(1) - noised.maskable.long()  # maskable tokens of the row to the left
    place = before - before.gather(1, first)  # this one's number in its block
    n = count.gather(1, first)
    for pattern in range(1, 2**largest):
        m = pattern.bit_count()
        masked = noised.maskable & ((pattern >> place) & 1).bool() & (pattern < 2**n)
        coefficient = torch.tensor([1 / (m * comb(size, m)) if size >= m else 0.0 for size in range(largest + 1)])
        xt = noised.x0.masked_fill(masked, recipe.mask_id)
        yield Noised(noised.x0, xt, masked, noised.maskable, coefficient.to(n.device)[n], noised.doc_start, noised.doc_end)


@torch.no_grad()
def nelbo(model, x0, doc_start, doc_end, maskable, recipe, draws=8, seed=0, rows=None, largest=None):
    """The negative evidence lower bound of these rows, in nats: -log p(x0) is at most this much.

    x0, doc_start, doc_end, maskable: (B, T), on the model's device. Exact under `ar` (the likelihood itself) and where
    no block has more than 8 maskable tokens; else `draws` Monte Carlo masks by the `count` schedule, whose weight is
    n / m. rows: (B,) numbers of the rows in their random streams; None: 0, 1, …
    largest: maskable tokens of the largest block, of all processes' rows where these must run alike; None: of these rows.
    Returns (nats, variance): floats, the sum over all maskable tokens and the estimate's variance, 0 where exact.
    """
    clean = Noised(x0, x0, maskable, maskable, maskable.float(), doc_start, doc_end)
    if recipe.objective == "ar":
        return weighted_loss(model, clean, recipe).item(), 0.0
    largest = largest_block(recipe, doc_start, maskable) if largest is None else largest
    if largest <= EXACT_UP_TO:
        return sum((weighted_loss(model, noised, recipe).item() for noised in every_mask(clean, recipe, largest)), 0.0), 0.0

    plain = Recipe(recipe.objective, recipe.shift, recipe.block_size, "count", antithetic=False, mask_id=recipe.mask_id)
    host = [x.cpu() for x in (x0, doc_start, doc_end, maskable)]
    rows = range(len(x0)) if rows is None else rows
    sums = torch.zeros(draws, len(x0), dtype=torch.float64)  # a row's own variance: which rows run together changes nothing
    for draw in range(draws):
        noised = corrupt(*host, plain, seed, draw, rows, batch_rows=1).rows(0, len(x0), x0.device)
        weighted = token_losses(model, noised, plain) * noised.weight[noised.masked]
        sums[draw].index_add_(0, noised.masked.nonzero()[:, 0].cpu(), weighted.double().cpu())
    return sums.mean(0).sum().item(), (sums.var(0) / draws).sum().item()
