"""Decoding written once more, from its equations: the reference of the decoding tests.

One text at a time, lists and loops, a full forward as in training at every step, no cache, float64
after the model. Beside each step stands how close its decisions were: where two of them nearly tie,
another order of the same sums may decide the other way.

Also here, what several test files share: a tokenizer of forty ids and random tiny models.

Not covered: remasking, and the approximate caches (tests/test_decode.py has those).
"""
import math
from dataclasses import dataclass, field

import torch

import noise
from decode import PLACES
from diffusion import read_at, spans_for
from model import ModelConfig, Transformer

VOCAB, BOS, EOS, MASK, PAD, END = 40, 0, 1, 2, 3, 4
ORDINARY = 5  # the first id that is none of these


class Tok:
    """What decoding reads of a tokenizer: two ids that end a text, two that are never written."""
    vocab_size, bos_id, eos_id, mask_id, pad_id = VOCAB, BOS, EOS, MASK, PAD
    stop_ids = {EOS, END}
    never_chosen = {MASK, PAD}


class Endless(Tok):
    eos_id = None
    stop_ids = set()


def random_model(seed, scale=0.3, dtype=torch.float64, vocab=VOCAB + 2):
    """Two layers with random weights; two rows of the vocabulary belong to no token."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab, 24, 2, 4, 2, 6, 40, 128, qk_norm=True,
                                    tie_embeddings=False))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=scale)
    return model.eval().to(dtype)


@dataclass
class Trace:
    """A decoded text.

    taken: for each forward, {position: token} of what it wrote. margins: how far its decisions were
    from going another way, in the units of what was compared (scores, probabilities, nats).
    """
    text: list
    taken: list = field(default_factory=list)
    margins: list = field(default_factory=list)


# --- what the model says --------------------------------------------------------------------------

@torch.no_grad()
def training_logits(model, recipe, text, mask_id=MASK):
    """(L, vocab) float64: the prediction of every position by one forward as in training.

    text: ids, None where masked. Under `block` that is [xt ; x0], whose clean half nobody reads
    from the first masked block on.
    """
    xt = torch.tensor([[mask_id if token is None else token for token in text]])
    doc_start = torch.zeros(xt.shape, dtype=torch.int32)
    doc_end = doc_start + len(text)
    tokens = xt
    if recipe.objective == "block":
        tokens = torch.cat([xt, xt], 1)
    hidden = model(tokens, spans_for(recipe, doc_start, doc_end))[0]
    return model.logits(hidden[read_at(recipe, doc_start)[0]]).double()


def banned_ids(tok, vocab, may_end):
    """What is never written. may_end: nothing was given to the right, so the text may end here."""
    banned = set(range(tok.vocab_size, vocab)) | {tok.mask_id, tok.pad_id}
    if may_end:
        return banned - {None} - tok.stop_ids  # Qwen pads with <eos>
    return (banned | tok.stop_ids) - {None}


def softmax(scores):
    """scores: {id: float}. Returns {id: probability}."""
    top = max(scores.values())
    e = {v: math.exp(score - top) for v, score in scores.items()}
    total = sum(e.values())
    return {v: x / total for v, x in e.items()}


def kept(scores, how):
    """What top-k, then top-p leave of scores {id: float}, and the smallest gap in deciding so."""
    ranked = sorted(scores, key=lambda v: -scores[v])
    margin = math.inf
    if how.top_k and how.top_k < len(ranked):
        margin = scores[ranked[how.top_k - 1]] - scores[ranked[how.top_k]]
        ranked = ranked[:how.top_k]
    if how.top_p < 1:
        p = softmax({v: scores[v] for v in ranked})
        before, n = 0.0, 0
        while n < len(ranked) and (n == 0 or before < how.top_p):
            before += p[ranked[n]]
            margin = min(margin, abs(before - how.top_p))
            n += 1
        ranked = ranked[:n]
    return {v: scores[v] for v in ranked}, margin


def distribution(logits, tok, how, may_end=True):
    """The scores {id: float} of one position's tokens, and the margin of the filters.

    logits: (vocab,). Temperature 0 leaves them as they are.
    """
    scores = {v: score for v, score in enumerate(logits.tolist())}
    for v in tok.stop_ids:
        scores[v] -= how.eos_penalty
    for v in banned_ids(tok, len(scores), may_end):
        del scores[v]
    if how.temperature > 0:
        scores = {v: score / how.temperature for v, score in scores.items()}
    return kept(scores, how)


def gumbel(how, row, i, s, count, first=0):
    at = [torch.tensor([x]) for x in (row, i, s)]
    return noise.gumbel(how.seed, *at, count, first)[0].double().tolist()


def proposal(logits, tok, how, row, i, s, may_end=True):
    """What is proposed at position i in step s: token, {id: probability}, margin."""
    scores, margin = distribution(logits, tok, how, may_end)
    p = softmax(scores)
    if how.temperature > 0:
        g = gumbel(how, row, i, s, len(logits))
        scores = {v: score + g[v] for v, score in scores.items()}
    best, *others = sorted(scores, key=lambda v: -scores[v])
    if others:
        margin = min(margin, scores[best] - scores[others[0]])
    return best, p, margin


def entropy(p):
    return -sum(x * math.log(x) for x in p.values() if x > 0)


def confidence(how, token, p, row, i, s):
    first, *others = sorted(p.values(), reverse=True)
    if how.confidence == "max_prob":
        return p[token]
    if how.confidence == "margin":
        return first - (others[0] if others else 0)
    if how.confidence == "entropy":
        return -entropy(p)
    if how.confidence == "random":
        at = [torch.tensor([x]) for x in (row, i, s)]
        return noise.uniform(how.seed, *at, 1, PLACES)[0].double().item()
    return -i  # left_to_right


# --- how many -------------------------------------------------------------------------------------

def how_many(how, sure, H, s, masked):
    """How many of the ranked positions are taken, and the margin of that.

    sure, H: confidence and entropy of the masked positions, the surest first. s: the step.
    masked: how many were masked before step 0.
    """
    if how.threshold is not None:
        margin = min(abs(c - how.threshold) for c in sure)
        return max(1, sum(c >= how.threshold for c in sure)), margin
    if how.entropy_bound is not None:
        sums = [sum(H[:n]) - max(H[:n]) for n in range(1, len(H) + 1)]
        margin = min(abs(x - how.entropy_bound) for x in sums)
        return max(1, sum(x <= how.entropy_bound for x in sums)), margin
    if how.factor is not None:
        costs = [(n + 1) * (1 - c) for n, c in enumerate(sure, 1)]
        margin = min(abs(x - how.factor) for x in costs)
        fits = [n for n, cost in enumerate(costs, 1) if cost < how.factor]
        return max(fits, default=1), margin
    steps = min(how.steps or masked, masked)
    return masked // steps + (1 if s < masked % steps else 0), math.inf


def blocks_of(recipe, text, how):
    """The masked positions, in the groups in which they are decoded."""
    holes = [i for i, token in enumerate(text) if token is None]
    size = how.block_length
    if recipe.objective in ("ar", "block"):  # pieces of attention's blocks
        size = size or recipe.attention_block
        groups = {}
        for i in holes:
            groups.setdefault(i // size, []).append(i)
        return list(groups.values())
    size = size or len(holes)
    return [holes[a:a + size] for a in range(0, len(holes), size)]


def has_ended(text, written, tok):
    """Whether a stop id was written with nothing masked to its left."""
    until = text.index(None) if None in text else len(text)
    return any(i in written and text[i] in tok.stop_ids for i in range(until))


def naive_decode(model, tok, recipe, text, how, row=0):
    """The Trace of one text; the last block of a block model is filled, then trimmed."""
    last_given = max(i for i, token in enumerate(text) if token is not None)
    beyond = -len(text) % (recipe.attention_block or 1)
    trace = Trace(list(text) + [None] * beyond)
    decode_blocks(model, tok, recipe, trace, how, row, last_given)
    trace.text = trace.text[:len(text)]
    return trace


def decode_blocks(model, tok, recipe, trace, how, row, last_given):
    """Fill the masks of trace.text, which is the text up to its last block's end. It may end behind
    the last token that was given."""
    written = set()
    for block in blocks_of(recipe, trace.text, how):
        masked = list(block)
        s = 0
        while masked:
            logits = training_logits(model, recipe, trace.text)
            told = {i: proposal(logits[i], tok, how, row, i, s, i > last_given) for i in masked}
            margin = min(m for _, _, m in told.values())
            sure = {i: confidence(how, token, p, row, i, s) for i, (token, p, _) in told.items()}
            score = dict(sure)
            if how.alg_temp > 0:
                for i in masked:
                    score[i] = sure[i] / how.alg_temp + gumbel(how, row, i, s, 1, PLACES)[0]
            ranked = sorted(masked, key=lambda i: (-score[i], i))
            H = [entropy(told[i][1]) for i in ranked]
            n, m = how_many(how, [sure[i] for i in ranked], H, s, len(block))
            margin = min(margin, m)
            if n < len(ranked):
                margin = min(margin, score[ranked[n - 1]] - score[ranked[n]])
            for i in ranked[:n]:
                trace.text[i] = told[i][0]
                masked.remove(i)
                written.add(i)
            trace.taken.append({i: told[i][0] for i in ranked[:n]})
            trace.margins.append(margin)
            if has_ended(trace.text, written, tok):
                return
            s += 1


# --- draft and verify -----------------------------------------------------------------------------

@dataclass
class Drafting:
    """What `verified` decoding of a text does. taken: as in Trace. rejected, accepted: how many of
    the drafted tokens that were looked at turned out wrong and right."""
    text: list
    taken: list = field(default_factory=list)
    rejected: int = 0
    accepted: int = 0


def naive_verified(model, tok, recipe, text, how, row=0):
    """The Drafting of one text by a block model, a forward of copies at a time; no stop id ends it.

    A forward shows the first j drafted tokens in copy j, for every j there is: what is chosen at
    place j there is what left-to-right decoding chooses if they were right. The copy that shows the
    whole block goes on into the next block's masks.
    """
    K = recipe.block_size
    found = Drafting(list(text) + [None] * (-len(text) % K))
    holes = [i for i, token in enumerate(found.text) if token is None]
    first_of = {}  # block: its first masked place, which left-to-right decoding reaches at step 0
    for i in reversed(holes):
        first_of[i // K] = i

    forwards = {}  # shown text: its logits

    def chosen(shown, i):
        """What is proposed at i by a forward over `shown`, with left-to-right decoding's noise."""
        key = tuple(shown)
        if key not in forwards:
            forwards[key] = training_logits(model, recipe, shown)
        return proposal(forwards[key][i], tok, how, row, i, i - first_of[i // K])[0]

    draft = []  # proposals for the places that come next, from the last copy that was right
    while None in found.text:
        begin = found.text.index(None)
        taken, shown = {}, list(found.text)
        for n, guess in enumerate([*draft, None]):  # copy n shows the first n guesses
            i = begin + n
            if i == len(shown):
                break
            taken[i] = chosen(shown, i)
            if guess is None:
                break
            if guess != taken[i]:
                found.rejected += 1
                break
            found.accepted += 1
            shown[i] = guess
        for i, token in taken.items():
            found.text[i] = token
        found.taken.append(taken)
        after = max(taken) + 1  # `shown` is what the copy that decided showed
        end = -(-after // K) * K if after % K else after
        draft = [chosen(shown, i) for i in range(after, end)]
    found.text = found.text[:len(text)]
    return found
