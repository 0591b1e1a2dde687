"""Verified decoding: the text of one token at a time, from left to right, in fewer forwards.

A block model can write a whole block in one forward, but then no token has seen the others. Here
such a block is only a draft, and the next forward verifies it. This is lossless draft-and-verify,
after FreeDave (arXiv 2510.00294). For K = 4, after a forward that has drafted a b c d:

    copy      shows      says which token comes at
    1         a . . .    place 1, if a is right
    2         a b . .    place 2, if a b are right
    3         a b c .    place 3, if a b c are right
    4         a b c d    place 0 of the next block, and drafts the rest of it

All copies are in one forward. Place 0 is right: nothing comes before it. If copy 1 says b, then b
is right and copy 2 counts, and so on. The first copy that says something else has the right token
there, and its other predictions are the next draft: it is the forward that one token at a time
would do. If all agree, copy 4 has written the block's keys and values, and has drafted the next one
in the same forward. So each forward yields 1 to K tokens.

Sampling is exact in the same way: a token is the argmax of logits + noise, and the noise of a place
is that of the step at which one token at a time reaches it. Same seed, same text.

A copy of K tokens more costs little where reading the weights sets the pace: one text on a GPU. It
does not pay where arithmetic does, as in large batches.

Not covered: blocks of more than 8 tokens. A forward has K copies and the next block's masks,
K(K + 1) tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from caches import Graphs
from decode import Step, adjusted, check_finite, confidence_of, hooked, propose
from model import KVCache
from spans import Spans


@dataclass
class Draft:
    """The block that each row is writing: its first column, begin (b, 1), and its tokens (b, K), of
    which the first `known` (b, 1) are right."""
    begin: torch.Tensor
    tokens: torch.Tensor
    known: torch.Tensor


@dataclass
class Proposed:
    """What a forward says of some columns (b, n): tokens and confidence (b, n), logits (b, n,
    vocab), and finite, whether all logits were."""
    columns: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    logits: torch.Tensor
    finite: torch.Tensor


def draft_and_verify(model, tok, recipe, canvas, how, hook):
    """Write the masks of the canvas's texts: a generator of Step, one per forward. See decode."""
    K = recipe.block_size
    make_room(canvas, K)
    cache = KVCache(model, len(canvas.rows), canvas.tokens.shape[1] + (K - 1) * K)
    forward = Graphs(model, cache, how)
    stop_ids = torch.tensor(sorted(tok.stop_ids), dtype=torch.long, device=canvas.tokens.device)

    proposed = first_forward(model, tok, recipe, canvas, cache, how, hook)
    draft, taken = first_draft(proposed, canvas)
    while True:
        taken &= canvas.masked.gather(1, proposed.columns)  # the last block has no next one
        stops = torch.isin(proposed.tokens, stop_ids) & taken
        stops &= canvas.may_end.gather(1, proposed.columns)
        taken &= stops.cumsum(1) - stops.int() == 0  # nothing behind a stop id
        canvas.write(proposed.columns, proposed.tokens, taken, torch.zeros_like(taken))
        canvas.end_rows(stop_ids)
        if how.stop:
            canvas.end_at_strings(tok, how.stop)
        left = canvas.masked.any(1)  # (b,) rows with something to write
        least = torch.where(left, draft.known[:, 0], K).amin()
        least, finite, *left = torch.stack([least, proposed.finite, *left]).tolist()
        check_finite(finite)
        yield Step(canvas.rows, proposed.columns - canvas.start[:, None], proposed.tokens,
                   proposed.confidence, taken, torch.zeros_like(taken), proposed.logits)
        if not any(left):
            return
        if not all(left):
            rows = [row for row, more in enumerate(left) if more]
            rows = torch.tensor(rows, device=taken.device)
            canvas.keep(rows)
            forward.keep(rows)
            draft = Draft(draft.begin[rows], draft.tokens[rows], draft.known[rows])

        hidden = forward(copies(draft, canvas, least))  # (b, (2 + n) · K, d_model)
        logits = model.logits(predicting(hidden, K, recipe.shift))  # (b, (1 + n) · K, vocab)
        place = torch.arange(K, device=taken.device)
        columns = draft.begin + torch.cat([place + K] + [place] * (K - least))
        proposed = choose(logits, columns, canvas, tok, how, hook)
        proposed, taken, draft = verify(proposed, draft, least)


def make_room(canvas, K):
    """One more block of columns, for the draft behind the last block. It is never written."""
    canvas.tokens = F.pad(canvas.tokens, (0, K))
    canvas.masked = F.pad(canvas.masked, (0, K), value=False)
    canvas.given = F.pad(canvas.given, (0, K), value=True)
    canvas.may_end = F.pad(canvas.may_end, (0, K), value=True)


def choose(logits, columns, canvas, tok, how, hook):
    """Proposed tokens of these columns (b, n), by the noise of one token at a time.

    It writes a block from left to right: a place's step is the number of masks to its left.
    """
    positions = columns - canvas.start[:, None]
    logits, finite = hooked(logits, positions, canvas, hook)
    logits = adjusted(logits, columns, canvas, tok, how)
    K = how.block_length
    prompt_end = canvas.first_mask[:, None]  # (b, 1)
    steps = (columns - torch.maximum(columns // K * K, prompt_end)).clamp(min=0)
    where = how.seed, canvas.numbers[:, None], positions, steps
    tokens, p = propose(logits, how, where)
    confidence = confidence_of(how.confidence, p, tokens, where)
    return Proposed(columns, tokens, confidence, logits, finite)


# --- the first forward: what one token at a time begins with, too ---------------------------------

def first_forward(model, tok, recipe, canvas, cache, how, hook):
    """The prompt and the block that it ends in. Proposed of that block, (b, K)."""
    K = recipe.block_size
    to = canvas.first + K
    slots = torch.arange(to, device=canvas.tokens.device).expand(len(canvas.rows), to)
    spans = Spans.of(*canvas.documents(to), K)
    hidden = model(canvas.tokens[:, :to], spans, cache, slots)  # (b, to, d_model)
    read = slots[:, -K:]
    if recipe.shift:
        read = (read - 1).clamp(min=0)
    logits = model.logits(hidden[:, read[0]])
    return choose(logits, slots[:, -K:], canvas, tok, how, hook)


def first_draft(proposed, canvas):
    """Draft, and taken (b, K) bool: the place behind the prompt, which is right."""
    given = canvas.given.gather(1, proposed.columns)  # (b, K)
    tokens = torch.where(given, canvas.tokens.gather(1, proposed.columns), proposed.tokens)
    known = given.sum(1, keepdim=True)  # (b, 1)
    place = torch.arange(given.shape[1], device=given.device)
    return Draft(proposed.columns[:, :1], tokens, known + 1), place == known


# --- all the others: copies of the block, side by side --------------------------------------------

def copies(draft, canvas, least):
    """A plan for caches.cached_forward, (7, b, (2 + n) · K): the whole block, masks for the next
    one, and the n = K - least copies that show the first `least`, least + 1, … tokens.

    The whole block is written into its own slots of the cache, and seen by the next one's masks.
    The copies have slots behind the text's. They see the text before the block, and themselves.
    """
    b, K = draft.tokens.shape
    place = torch.arange(K, device=draft.tokens.device)
    start = canvas.start[:, None].expand(b, K)
    column = draft.begin + place  # (b, K)
    masks = torch.full_like(column, canvas.mask_id)
    none = torch.zeros_like(column)
    begin, end = draft.begin.expand(b, K), draft.begin.expand(b, K) + K

    def part(tokens, column, slots, past_end, own_start=none, own_end=none):
        return torch.stack([tokens, slots, column - start, start, past_end, own_start, own_end])

    plan = [part(draft.tokens, column, column, end),
            part(masks, column + K, column + K, end + K)]
    own = torch.full_like(column, canvas.tokens.shape[1])  # first slot of the next copy
    for shown in range(least, K):
        tokens = torch.where(place < shown, draft.tokens, masks)
        plan.append(part(tokens, column, own + place, begin, own, own + K))
        own = own + K
    return torch.cat(plan, 2)


def predicting(hidden, K, shift):
    """Hidden states where the next block's and the copies' tokens are predicted.

    hidden: (b, (2 + n) · K, d_model), as in `copies`. Returns (b, (1 + n) · K, d_model).
    """
    if not shift:
        return hidden[:, K:]
    hidden = hidden.unflatten(1, (-1, K))  # (b, 2 + n, K, d_model)
    others = hidden[:, 1:]
    # before place 0 of the next block is the whole one's end; place 0 of a copy is known
    before = hidden[:, :1, -1:].expand(-1, others.shape[1], -1, -1)
    return torch.cat([before, others[:, :, :-1]], 2).flatten(1, 2)


def verify(proposed, draft, least):
    """Compare what the copies say with the draft.

    proposed: of the next block and the n copies, (b, (1 + n) · K).
    Returns Proposed of the block and the next one, (b, 2K), taken (b, 2K) bool, and the new Draft.
    """
    K = draft.tokens.shape[1]
    place = torch.arange(K, device=draft.tokens.device)
    own = (1 + place - least) * K + place  # of copy `place`, what it says of that place
    pick = torch.cat([torch.where(place >= least, own, 0), place])  # the known ones are not read
    columns = torch.cat([draft.begin + place, draft.begin + K + place], 1)
    decided = Proposed(columns, proposed.tokens[:, pick], proposed.confidence[:, pick],
                       proposed.logits[:, pick], proposed.finite)

    differs = (decided.tokens[:, :K] != draft.tokens) & (place >= draft.known)  # (b, K)
    agreed = torch.where(differs.any(1), differs.int().argmax(1), K)[:, None]  # (b, 1)
    whole = agreed == K  # then the next block has begun
    taken = torch.cat([(place >= draft.known) & (place <= agreed), whole & (place == 0)], 1)

    # the copy that differs first has the right token there, and a new draft of all behind it
    copy = (1 + agreed - least).clamp(max=K - least)  # (b, 1)
    corrected = proposed.tokens.gather(1, copy * K + place)  # (b, K)
    corrected = torch.where(place < agreed, draft.tokens, corrected)
    new = Draft(torch.where(whole, draft.begin + K, draft.begin),
                torch.where(whole, proposed.tokens[:, :K], corrected),
                torch.where(whole, 1, agreed + 1))
    return decided, taken, new
