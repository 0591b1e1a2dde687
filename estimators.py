"""What a completion's log-probability is estimated from: passes, each with its masks and weights.

    Completions --passes_of--> [Pass, …] --log_probs--> (B, T), Σ over passes of weight · log p

A diffusion model gives a token a probability only after a mask: which other tokens it saw. So the
log-probability of a completion, which the policy gradient needs, has to be estimated, and papers
differ in the masks that they choose:

    estimator     passes    what the model sees of the completion
    masked        1         nothing (as d1, arXiv 2504.12216, whose prompts are masked in part)
    coupled       1 + 2λ    nothing; λ random subsets and their complements (DiffuCoder)
    independent   1 + 2λ    nothing; 2λ random subsets, unrelated: what coupling is compared with
    sequence      2λ        λ subsets and their complements, weighted as the ELBO (ESPO, EBPO)
    trace         steps     what had been written when it was decided (TraceRL, JustGRPO)

Write L_i(u) for the mean of log p_i where token i is masked, and so is every other scored token of
its noise block with probability u. L_i(1) is what one sees where everything is masked. Tokens after
the first stop id are masked in all passes and read in none: if they were clean, they would tell
the model how long the completion is. Only `trace` shows what had really been written there.

Masks are a function of (seed, step, row). `step` counts updates: the old, the new and the reference
model share the masks of an update, and the next update has new ones.

Not covered: rollouts (rollout.py), what is learned from the estimates (rl.py).
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from configurator import Float, Int, Mistake, check_fields
from diffusion import mask_row, noise_blocks, paired, read_at, spans_for, stream
from spans import CacheSpans

PAIRS = 6  # purpose of a random stream (diffusion.py, loader.py, sft.py have others)
GIVEN, NEVER = -1, 2**31 - 1  # of Completions.written
ONE_TEXT = 2048  # tokens of a row up to which passes share a clean text; beyond, the mask is dear


@dataclass
class Estimate:
    """Which estimator, and its masks."""
    estimator: Literal["coupled", "masked", "independent", "sequence", "trace"] = "coupled"
    pairs: Int(1, 64) = 1  # λ: pairs of masks, two forwards each; `masked` and `trace` have none
    pair_weights: Literal["one", "released"] = "one"  # of the pairs; released: 1/t and 1/(1 - t)
    t_low: Float(0, 1) = 0.2  # least t, the share of the tokens that a pair's first mask hides
    t_high: Float(0, 1) = 0.8  # largest t; `sequence` draws from 0 to 1


@dataclass
class Completions:
    """B prompts and what was written after each, one document a row. Tensors share a device.

    tokens: (B, T) int64, prompt and completion; where nothing was written, any id.
    written: (B, T) int64, the step of its noise block (the K-block of a block model, else the whole
        text) at which each token was written, from 0; GIVEN for the prompt and the padding, NEVER
        for what stayed masked.
    scored: (B, T) bool, the completion up to and including its first stop id.
    doc_start, doc_end: (B, T) int32 as in loader.Batch: row b is a document [0, length), of whole
        blocks; the padding on its right has (0, 0).
    rows: each row's number in the random streams, B ints.
    """
    tokens: torch.Tensor
    written: torch.Tensor
    scored: torch.Tensor
    doc_start: torch.Tensor
    doc_end: torch.Tensor
    rows: list

    @property
    def completion(self):
        """(B, T) bool: all that is neither prompt nor padding."""
        return self.written > GIVEN


@dataclass
class Pass:
    """One forward over all rows.

    masked: (B, T) bool, what the model does not see. weight: (B, T) float32, of the log-probability
    that each token has in this pass; 0 where it is not read.
    """
    masked: torch.Tensor
    weight: torch.Tensor


def check_estimate(how, recipe):
    """Raises Mistake for what does not go together. how: an Estimate."""
    check_fields(how)
    if recipe.objective not in ("block", "bidirectional"):
        raise Mistake(f"objective={recipe.objective!r} has no estimator: they are for 'block' and "
                      "'bidirectional'")
    if how.t_low > how.t_high:
        raise Mistake(f"t_low={how.t_low} is above t_high={how.t_high}: t is drawn between them")
    if how.pair_weights == "released" and (how.t_low == 0 or how.t_high == 1):
        raise Mistake(f"pair_weights='released' divides by t and 1 - t: t_low={how.t_low} and "
                      f"t_high={how.t_high} must lie between 0 and 1")


# --- everything masked, and random masks ----------------------------------------------------------

def masked(completions, recipe, how, seed, step):
    """One pass in which everything is masked. It is no random draw: log p_i is L_i(1).

    So all tokens of a noise block are taken to be independent, given what precedes the block. d1
    also masks random tokens of the prompt, anew in each update; here the prompt is clean.
    """
    return [Pass(completions.completion, completions.scored.float())]


def coupled(completions, recipe, how, seed, step):
    """Everything masked, and λ complementary pairs: coupled sampling (DiffuCoder §5).

    log p_i = (log p_i[all masked] + Σ over λ pairs of w · log p_i[where i is masked]) / (λ + 1)

    A pair is a mask, at a rate t ~ U(t_low, t_high) of each noise block, and its complement: each
    token is masked in exactly one of them. Token i is in the first with probability t, and then
    others are masked at rate t; else it is in the second, and others are masked at rate 1 - t.

    pair_weights="one", w = 1: the expectation is an average of log-probabilities,
        (L_i(1) + λ · E_t[t · L_i(t) + (1 - t) · L_i(1 - t)]) / (λ + 1).
    "released", w = 1/t and 1/(1 - t), as in the published code: t cancels, and the expectation is
        (L_i(1) + λ · E_t[L_i(t) + L_i(1 - t)]) / (λ + 1),
    with a sum of weights of (1 + 2λ) / (λ + 1), which is 1.5 log-probabilities at λ = 1.

    The default is one: the ratio of a token under two models is then a geometric mean of ratios of
    probabilities, which is what the clip's ε bounds, and no token counts 1/t_low = 5 times.
    """
    pairs = passes_of_pairs(coupled_pair, completions, recipe, how, seed, step)
    return averaged(masked(completions, recipe, how, seed, step) + pairs, how.pairs + 1)


def independent(completions, recipe, how, seed, step):
    """As `coupled` at the same cost, but a pair's second mask is drawn anew, at rate 1 - t.

    A token is masked in none, one or both of them: in t + (1 - t) = 1 of them on average. So the
    expectation is that of `coupled`, with either weights, and the variance alone differs.
    """
    pairs = passes_of_pairs(independent_pair, completions, recipe, how, seed, step)
    return averaged(masked(completions, recipe, how, seed, step) + pairs, how.pairs + 1)


def sequence(completions, recipe, how, seed, step):
    """The ELBO: an average over λ complementary pairs by the `count` schedule (ESPO, EBPO).

    Of a block's n scored tokens m are masked, m uniform in 1 … n, and in the other pass the other
    n - m; the weights are n/(2m) and n/(2(n - m)), and 1 where m = n. The expectation of token i is
        1/n · Σ over m of the mean of log p_i where i and m - 1 others are masked.
    The weights sum to 1. Its sum over tokens is the ELBO: the mean, over all n! orders in which the
    block can be written one token at a time, of the order's log-probability.
    """
    pairs = passes_of_pairs(sequence_pair, completions, recipe, how, seed, step)
    return averaged(pairs, how.pairs)


def averaged(passes, count):
    """The passes with weights that make a mean of `count` estimates out of their sum."""
    return [Pass(one.masked, one.weight / count) for one in passes]


def passes_of_pairs(draw_pair, completions, recipe, how, seed, step):
    """The 2λ passes of λ pairs. Each row's masks come from its own stream, and from it alone.

    draw_pair(random, scored, block, how): the two passes of one row of n positions, (masked,
    weight) each. scored: (n,) bool. block: (n,) the first position of its noise block.
    """
    scored = completions.scored.cpu().numpy()  # (B, T)
    block = noise_blocks(completions.doc_start, recipe).cpu().numpy()  # (B, T)
    lengths = completions.doc_end[:, 0].tolist()
    masks = np.zeros((2 * how.pairs, *scored.shape), bool)
    weights = np.zeros(masks.shape, np.float32)
    for b, (row, n) in enumerate(zip(completions.rows, lengths)):
        random = stream(seed, PAIRS, step, row)
        for first in range(0, 2 * how.pairs, 2):
            pair = draw_pair(random, scored[b, :n], block[b, :n], how)
            for number, (mask, weight) in enumerate(pair, first):
                masks[number, b, :n] = mask
                weights[number, b, :n] = np.where(mask, weight, 0)
    device = completions.tokens.device
    after = completions.completion & ~completions.scored  # (B, T): behind the first stop id
    return [Pass(torch.from_numpy(mask).to(device) | after, torch.from_numpy(weight).to(device))
            for mask, weight in zip(masks, weights)]


def rates(random, block, how):
    """(n,) float64: t of each position's noise block, U(t_low, t_high)."""
    U = random.random(len(block))
    return (how.t_low + (how.t_high - how.t_low) * U)[block]


def coupled_pair(random, scored, block, how):
    t = rates(random, block, how)
    mask = scored & (random.random(len(t)) < t)
    first, second = weights_of(t, how)
    return (mask, first), (scored & ~mask, second)


def independent_pair(random, scored, block, how):
    t = rates(random, block, how)
    mask = scored & (random.random(len(t)) < t)
    unrelated = scored & (random.random(len(t)) < 1 - t)
    first, second = weights_of(t, how)
    return (mask, first), (unrelated, second)


def weights_of(t, how):
    """The weights w of a pair's two passes, (n,) each or one number."""
    if how.pair_weights == "one":
        return 1, 1
    return 1 / t, 1 / (1 - t)


def sequence_pair(random, scored, block, how):
    t = (1 - random.random(len(block)))[block]  # (0, 1]: a block has at least one mask
    n = np.bincount(block, scored, len(block))[block]  # (n,): scored tokens of its block
    mask, u = mask_row(random, scored, block, t, n, "count", t_min=0)
    first, _, first_weight = paired(mask, scored, u, complement=False)
    second, _, second_weight = paired(mask, scored, u, complement=True)
    return (first, first_weight), (second, second_weight)


# --- the order in which it was written ------------------------------------------------------------

def trace(completions, recipe, how, seed, step):
    """Replay the recorded order (TraceRL, arXiv 2509.06949; JustGRPO where it is left to right).

    Pass s shows what had been written before step s, and reads what was written at step s. So every
    decision is read once, with weight 1, as the policy saw it when it decided: also those behind a
    stop id that was written later. It is no random draw.

    All blocks of a block model share the passes, so there are at most K, whatever the length. A
    model without blocks needs one pass for each step of the longest row: 256 tokens one at a time
    are 256 passes and as many times the cost of `masked`, in time and, since log_probs runs them as
    one forward, in memory.

    The sum is the log-probability of the decisions made, exact in value and gradient, where what
    was written when depends on the text so far alone: left_to_right, entropy, margin; with top_p =
    1, top_k = 0, alg_temp = 0, without penalties, approximate caches or remasking. (A random order
    adds a constant.) Where the sampled tokens decide the order (max_prob), each log p_i is that of
    its token where it was taken, but their sum leaves out how likely the order itself was. Under
    top_p or top_k the tokens came from a narrower distribution than the one that is read.
    """
    when = completions.written
    decided = completions.completion & (when < NEVER)
    steps = 1  # a pass without anything to read, at least: log_probs then still has a gradient
    if decided.any():
        steps = int(when[decided].max()) + 1
    return [Pass(when >= s, (when == s).float()) for s in range(steps)]


def inexact(confidence, top_p):
    """What `trace` leaves out of rollouts that were decoded so, a sentence; empty: nothing."""
    if confidence == "max_prob":
        return ("estimator='trace' with confidence='max_prob': each token's log-probability is "
                "exact where it was taken, but how likely the order was is left out, since the "
                "sampled tokens decide it; 'entropy', 'margin' and 'left_to_right' are exact")
    if top_p < 1:
        return (f"estimator='trace' with top_p={top_p:g}: order and masks are those of the "
                "rollout, but the tokens came from a narrower distribution than the one that is "
                "read; --top_p=1 is exact")
    return ""


# --- what is read from the passes -----------------------------------------------------------------

ESTIMATORS = {"coupled": coupled, "masked": masked, "independent": independent,
              "sequence": sequence, "trace": trace}


def passes_of(how, completions, recipe, seed, step):
    """The passes of how.estimator, a list of Pass.

    how: an Estimate. seed, step: with completions.rows they choose the masks; step: of the updates.
    Raises Mistake for what does not go together.
    """
    check_estimate(how, recipe)
    return ESTIMATORS[how.estimator](completions, recipe, how, seed, step)


def read_by(passes):
    """(B, T) bool: the tokens that some pass reads."""
    return torch.stack([one.weight for one in passes]).ne(0).any(0)


def log_probs(model, completions, passes, recipe, temperature, banned):
    """Σ over passes of weight · log p of each token, (B, T) float32, 0 where it is never read.

    float64 where the model's weights are; the gradient flows. log p: of softmax(logits /
    temperature) without the ids that decoding never chooses, as decode.adjusted has it.
    temperature: above 0. banned: (n,) int64.

    All passes are *one* forward: whatever its rows are, each process makes the same number of
    forwards, and FSDP gathers the weights once. Hidden states are projected on the vocabulary only
    where a token is read, a chunk at a time.
    """
    masked = torch.stack([one.masked for one in passes])  # (P, B, T)
    weight = torch.stack([one.weight for one in passes])  # (P, B, T)
    xt = completions.tokens.masked_fill(masked, recipe.mask_id)  # (P, B, T)
    lay_out = a_row_each
    if recipe.objective == "block" and (len(passes) + 1) * xt.shape[2] <= ONE_TEXT:
        lay_out = after_one_clean_text
    rows, spans, place = lay_out(completions, xt, recipe)  # place: (P, B, T)
    read = weight != 0
    hidden = model(rows, spans, read=place[read])  # (N, d_model)
    targets = completions.tokens.expand_as(xt)[read]  # (N,)
    losses = model.token_loss(hidden, targets, temperature, banned)  # (N,)
    weighted = losses.new_zeros(weight.shape)
    weighted[read] = -losses * weight[read]
    return weighted.sum(0)


def a_row_each(completions, xt, recipe):
    """Every pass is a text of its own: xt, or [xt ; x0] under block diffusion.

    xt: (P, B, T). Returns the rows (P · B, T or 2T), their Spans, and the place, among all tokens
    of these rows, at which each token's prediction is read, (P, B, T) int64.
    """
    P, B, T = xt.shape
    rows = xt.flatten(0, 1)  # (P · B, T)
    if recipe.objective == "block":
        rows = torch.cat([rows, completions.tokens.repeat(P, 1)], 1)  # (P · B, 2T)
    doc_start, doc_end = completions.doc_start.repeat(P, 1), completions.doc_end.repeat(P, 1)
    spans = spans_for(recipe, doc_start, doc_end)
    before = torch.arange(P * B, device=xt.device)[:, None] * rows.shape[1]  # tokens before a row
    return rows, spans, (before + read_at(recipe, doc_start)).view(P, B, T)


def after_one_clean_text(completions, xt, recipe):
    """Block diffusion in fewer tokens: [x0 ; xt of pass 1 ; … ; xt of pass P] in one row.

    The clean text is the same in all passes, so it is computed once. Of each pass follow the
    blocks that hold something of the completion, C tokens: nobody reads noise of the prompt.

        query              sees clean          and noisy
        clean              [0, block_end)
        noisy, of pass p   [0, block_start)    its own block in pass p

    It is the same function as P rows of [xt ; x0], at the price of one clean half and P short ones.
    These are more intervals than Spans has. CacheSpans can name them: without a cache, its slots
    are the row's own tokens. Its mask is dense, which is cheap up to ONE_TEXT tokens alone.
    Returns what a_row_each does, for rows (B, T + P · C).
    """
    P, B, T = xt.shape
    clean = spans_for(recipe, completions.doc_start, completions.doc_end)
    place = torch.arange(T, device=xt.device).expand(B, T)
    length = completions.doc_end[:, :1]  # (B, 1)
    first = torch.where(completions.completion, clean.block_start, length).amin(1, keepdim=True)
    C = int((length - first).max())
    S = T + P * C

    i = first + torch.arange(C, device=xt.device)  # (B, C): places of the noisy tokens
    inside = i < length
    i = torch.where(inside, i, 0)
    block_start = torch.where(inside, clean.block_start.gather(1, i), 0)  # (B, C)
    block_end = torch.where(inside, clean.block_end.gather(1, i), 0)
    to_twin = [T + p * C - first for p in range(P)]  # (B, 1) each: from a place to its noisy twin's
    own_start = [torch.where(inside, block_start + by, 0) for by in to_twin]  # P of (B, C)
    own_end = [torch.where(inside, block_end + by, 0) for by in to_twin]

    nothing = torch.zeros_like(clean.block_end)  # (B, T)
    spans = CacheSpans(positions=torch.cat([place, *[i] * P], 1),  # (B, S) each
                       past_start=torch.zeros_like(place[:, :1]).expand(B, S),
                       past_end=torch.cat([clean.block_end, *[block_start] * P], 1),
                       own_start=torch.cat([nothing, *own_start], 1),
                       own_end=torch.cat([nothing, *own_end], 1), slots=S)
    noisy = [pass_xt.gather(1, i) for pass_xt in xt]  # P of (B, C)

    twin = torch.stack([place + by for by in to_twin])  # (P, B, T)
    if recipe.shift:  # read at the left neighbor, which for a block's first token is clean
        twin = torch.where(place == clean.block_start, (place - 1).clamp(min=0), twin - 1)
    row = torch.arange(B, device=xt.device)[:, None]
    return torch.cat([completions.tokens, *noisy], 1), spans, row * S + twin
