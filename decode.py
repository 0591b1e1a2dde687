"""Decoding: how masks become tokens. What the model proposes, and what is taken.

    texts, None where to write  --decode-->  a Step per forward  --write-->  texts

A text is written one decoding block after another. In a block, every step proposes a token for each
position (`propose`), takes some of those still masked (`take`), and yields what it did. Completion
is a text that ends in masks; with masks in the middle it is infilling.

Noise is drawn per (seed, row, position, step) (noise.py): a row's text depends neither on its batch
nor on the number of processes.

Which forwards a step needs is the concern of caches.py. Several tokens of a block in one forward,
exactly as one at a time, are that of draft.py. Not covered: beam search.
"""
from dataclasses import dataclass, replace
from typing import Literal

import torch

import noise
from caches import BlockReader, TextReader, columns_of
from configurator import Float, Int, Mistake, Seed, check_fields, shortened

PLACES = 2**31  # first number of the draws that choose positions: beyond those that choose tokens


Confidence = Literal["max_prob", "margin", "entropy", "random", "left_to_right"]
Cache = Literal["auto", "none", "exact", "hierarchical", "prefix", "dual"]


@dataclass
class Decoding:
    """How to decode. At most one of steps, threshold, entropy_bound, factor, verified is set."""
    confidence: Confidence = "max_prob"  # by what the positions are ranked: the surest come first
    steps: Int(0, 2**20) = 0  # forwards per decoding block, at most its length; 0: one per token
    threshold: Float(0, 1) | None = None  # take all with at least this max_prob or margin
    entropy_bound: Float(0, 1e6) | None = None  # take the surest while Σ H - max H is at most this
    factor: Float(0, 1e6) | None = None  # Fast-dLLM: the largest n with (n + 1)(1 - p_n) < factor
    verified: bool = False  # (block) left_to_right one token at a time, in fewer forwards: draft.py
    block_length: Int(0, 2**20) = 0  # tokens decoded together; 0: K, without blocks all of them
    cache: Cache = "auto"  # see caches.py; auto: exact for block and ar, else none
    refresh: Int(0, 2**20) = 0  # approximate caches: bring up to date every so many steps; 0: once
    temperature: Float(0, 100) = 0.0  # 0: the most likely token; else softmax(logits / temperature)
    top_p: Float(1e-6, 1) = 1.0  # sample from the likeliest tokens that together have this much
    top_k: Int(0, 2**24) = 0  # sample from that many of the likeliest tokens; 0: from all
    alg_temp: Float(0, 100) = 0.0  # sample the positions by softmax(confidence / alg_temp); 0: top
    remask: Int(0, 2**20) = 0  # unsure tokens that a step may mask again, each token once
    eos_penalty: Float(0, 1e6) = 0.0  # subtracted from the logits of tokens that end a text
    stop: tuple = ()  # strings that end a completion, such as ["\ndef ", "\nclass "]
    seed: Seed = 1337  # of the sampling
    graphs: bool = True  # CUDA: record a forward once, then replay it with a single launch


@dataclass
class Step:
    """What one forward did to b of the texts, at n positions of each. Tensors are on the device.

    rows: (b,) int64, which texts. positions: (b, n) int64, places in them; those at or beyond a
    text's length only complete its last block. tokens: (b, n) int64, what is proposed there.
    confidence: (b, n) float32. taken, remasked: (b, n) bool, what was written, and masked again.
    logits: (b, n, vocab) float32, what the tokens were chosen from.
    """
    rows: torch.Tensor
    positions: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    taken: torch.Tensor
    remasked: torch.Tensor
    logits: torch.Tensor


# --- the texts ------------------------------------------------------------------------------------

class Canvas:
    """A batch of texts in the making, (b, L), padded on the left.

    tokens: int64. masked: bool, where a token is still to be written. given: bool, where it came
    with the text; padding counts as given. block: int64, the number of each column's decoding
    block, -1 before the first. start, end: (b,) the columns of each text. rows: (b,) which texts.
    numbers: (b,) their numbers in the random streams. first_mask: (b,) column of the first one.
    may_end: bool, where the text may end, since nothing is given to the right.
    """

    def __init__(self, texts, numbers, recipe, block_length, device):
        """Padding keeps attention's blocks aligned: a block has the same columns in every row, and
        each text's first mask lies in the first block to write. The last one is filled up."""
        K = recipe.causal_block
        self.mask_id = recipe.mask_id or 0  # an autoregressive model may have none: it reads none
        begins = [text.index(None) for text in texts]
        ends = [len(text) for text in texts]
        if K is None:
            pads = [max(ends) - end for end in ends]
        else:
            begins = [begin // K * K for begin in begins]
            pads = [max(begins) - begin for begin in begins]
            ends = [-(-end // K) * K for end in ends]
        self.first = max(begins)  # column of the first block to write, in models with blocks
        L = max(pad + end for pad, end in zip(pads, ends))
        tokens = torch.zeros(len(texts), L, dtype=torch.long)
        masked = torch.zeros(len(texts), L, dtype=torch.bool)
        for row, (text, pad, end) in enumerate(zip(texts, pads, ends)):
            filled = text + [None] * (end - len(text))
            masked[row, pad:pad + end] = torch.tensor([i is None for i in filled])
            tokens[row, pad:pad + end] = torch.tensor([i or 0 for i in filled])
        self.masked = masked.to(device)
        self.given = ~self.masked
        self.tokens = torch.where(self.masked, self.mask_id, tokens.to(device))
        if K is None:
            rank = self.masked.cumsum(1) - 1  # (b, L): of each mask in its row
            self.block = torch.where(self.masked, rank // block_length, -1)
        else:
            column = torch.arange(L, device=device).expand_as(self.tokens)
            self.block = torch.where(column < self.first, -1, (column - self.first) // block_length)
        self.start = torch.tensor(pads, device=device)
        self.end = self.start + torch.tensor(ends, device=device)
        self.rows = torch.arange(len(texts), device=device)
        self.numbers = torch.tensor(numbers, device=device)
        self.first_mask = self.masked.int().argmax(1)
        last_given = [max(i for i, token in enumerate(text) if token is not None) for text in texts]
        last_given = self.start + torch.tensor(last_given, device=device)
        self.may_end = torch.arange(L, device=device) > last_given[:, None]

    def keep(self, rows):
        """Drop all rows but these, (b,) int64."""
        for name in ("tokens", "masked", "given", "block", "start", "end", "rows", "numbers",
                     "first_mask", "may_end"):
            setattr(self, name, getattr(self, name)[rows])

    def documents(self, end):
        """doc_start, doc_end (b, end) int32 of the first columns, as Spans take them."""
        column = torch.arange(end, device=self.start.device)
        padding = column < self.start[:, None]  # (b, end)
        doc_start = self.start[:, None].masked_fill(padding, 0)
        doc_end = self.end[:, None].masked_fill(padding, 0)
        return doc_start.int(), doc_end.int()

    def write(self, columns, tokens, taken, remasked):
        """columns, tokens (b, n) int64; taken, remasked (b, n) bool."""
        here = torch.where(taken, tokens, self.tokens.gather(1, columns))
        here = torch.where(remasked, self.mask_id, here)
        masked = self.masked.gather(1, columns) & ~taken | remasked
        self.tokens.scatter_(1, columns, here)
        self.masked.scatter_(1, columns, masked)

    def end_rows(self, stop_ids):
        """Nothing more is written in a row that has a stop id with nothing masked before it.

        stop_ids: (n,) int64.
        """
        stops = torch.isin(self.tokens, stop_ids) & self.may_end & (self.masked.cumsum(1) == 0)
        self.masked &= ~stops.any(1, keepdim=True)

    def end_at_strings(self, tok, strings):
        """Nothing more is written in a row whose completion holds one of these strings."""
        for row in range(len(self.rows)):
            ids = self.tokens[row][~self.given[row] & (self.masked[row].cumsum(0) == 0)]
            text = tok.decode(ids.tolist())
            if any(string in text for string in strings):
                self.masked[row] = False


# --- what the model proposes ----------------------------------------------------------------------

def hooked(logits, positions, canvas, hook):
    """What the hook makes of logits (b, n, vocab), which may be -inf, and whether all are numbers.

    positions: (b, n). The second is a tensor: the host reads it later.
    """
    finite = logits.isfinite().all()
    if hook is None:
        return logits, finite
    logits = hook(logits, positions, canvas.rows).clone()  # the hook's own stay as they are
    return logits, finite & (logits < torch.inf).all()


def adjusted(logits, columns, canvas, tok, how):
    """Logits (b, n, vocab) without what is never chosen, and with the penalty on stop ids.

    Never chosen: <mask>, <pad>, ids beyond the tokenizer's, and stop ids where the text goes on.
    columns: (b, n).
    """
    logits[..., tok.vocab_size:] = -torch.inf
    for i in tok.never_chosen:
        logits[..., i] = -torch.inf
    penalty = torch.where(canvas.may_end.gather(1, columns), how.eos_penalty, torch.inf)  # (b, n)
    for i in tok.stop_ids:
        logits[..., i] -= penalty
    return logits


def propose(logits, how, where):
    """A token for every position, and the distribution it was chosen from.

    logits: (b, n, vocab). where: which noise they get, the first four arguments of noise.uniform.
    Returns tokens (b, n) int64 and p (b, n, vocab), which at temperature 0 is untempered.
    """
    if how.temperature < 1e-5:  # below, the division overflows
        return logits.argmax(-1), logits.softmax(-1)
    logits = kept(logits / how.temperature, how.top_k, how.top_p)
    tokens = (logits + noise.gumbel(*where, logits.shape[-1])).argmax(-1)
    return tokens, logits.softmax(-1)


def kept(logits, top_k, top_p):
    """Logits (b, n, vocab), -inf for all but the top_k likeliest and their equals (0: all), and of
    those for all but the likeliest that reach the probability top_p together (nucleus sampling)."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # those before it reach top_p already
        logits = logits.scatter(-1, order, ordered.masked_fill(beyond, -torch.inf))
    return logits


def entropy_of(p):
    """In nats. p: (..., vocab). Returns (...)."""
    return -torch.xlogy(p, p).sum(-1)


def confidence_of(name, p, tokens, where):
    """How sure the model is of each token, (b, n): the higher, the sooner it is taken.

    p: (b, n, vocab). tokens: (b, n). where: see propose. In Dream's code the first three are
    maskgit_plus, topk_margin and entropy.
    """
    if name == "max_prob":
        return p.gather(-1, tokens[..., None])[..., 0]
    if name == "margin":
        two = p.topk(2, -1).values
        return two[..., 0] - two[..., 1]
    if name == "entropy":
        return -entropy_of(p)
    if name == "random":
        return noise.uniform(*where, 1, PLACES)[..., 0]
    _, _, positions, _ = where
    return -positions.to(p.dtype)  # left_to_right


# --- what is taken --------------------------------------------------------------------------------

def take(open_, confidence, p, count, how, where):
    """Which of the masked positions a step writes, (b, n) bool: one of each row at least.

    open_: (b, n) bool, those still masked. confidence: (b, n). p: (b, n, vocab). count: (b, 1), how
    many, where `steps` decides. where: see propose.
    """
    if how.alg_temp >= 1e-5:  # below, the division overflows. Their top: without replacement
        confidence = confidence / how.alg_temp + noise.gumbel(*where, 1, PLACES)[..., 0]
    confidence = confidence.masked_fill(~open_, -torch.inf)
    order = confidence.argsort(dim=1, descending=True, stable=True)  # ties from left to right
    rank = order.argsort(1)  # (b, n): 0 is the surest
    if how.threshold is not None:
        chosen = confidence >= how.threshold
    elif how.entropy_bound is not None:  # EB-Sampler, arXiv 2505.24857
        H = entropy_of(p).gather(1, order)
        spent = H.cumsum(1) - H.cummax(1).values  # all but the largest, up to each rank
        chosen = (spent <= how.entropy_bound).gather(1, rank)
    elif how.factor is not None:  # Fast-dLLM §3.3: the n-th surest
        chosen = (rank + 2) * (1 - confidence) < how.factor
    else:
        chosen = rank < count
    return open_ & (chosen | (rank == 0))


def share(left, step, steps):
    """How many of the `left` masks step 0 <= step < steps takes: as even as possible, the remainder
    first (LLaDA). left, steps: (b, 1)."""
    steps_left = (steps - step).clamp(min=1)
    return (left + steps_left - 1) // steps_left


def unsure(written, confidence, taken, sure, limit):
    """Which tokens are masked again, (b, n) bool: at most `limit` of each row, those written with
    less confidence than all that this step takes. They are the least sure in today's context.

    written: (b, n) bool, tokens of earlier steps that may be masked again. sure: (b, n), their
    confidence then.
    """
    bar = confidence.masked_fill(~taken, torch.inf).amin(1, keepdim=True)  # (b, 1)
    weak = written & (sure < bar) & taken.any(1, keepdim=True)
    rank = sure.masked_fill(~weak, torch.inf).argsort(dim=1, stable=True).argsort(1)
    return weak & (rank < limit)


# --- the generator --------------------------------------------------------------------------------

@torch.no_grad()
def decode(model, tok, recipe, texts, how, rows=None, hook=None):
    """Write the masks of a batch of texts: a generator of Step, one per forward.

    texts: lists of ids, None where a token is to be written. how: a Decoding. rows: each text's
    number in the random streams; None: 0, 1, … hook(logits, positions, rows) -> logits is called on
    the logits of each step. A row ends at a stop id with nothing masked before it. Rows that are
    done leave the batch between blocks. Raises Mistake for what does not go together.
    """
    how = settled(how, recipe, texts, model.cfg)
    rows = list(range(len(texts)) if rows is None else rows)
    if not all(0 <= row < 2**32 for row in rows):
        raise Mistake("rows must be numbers from 0 to 2^32 - 1: each has its own noise")
    canvas = Canvas(texts, rows, recipe, how.block_length, model.embed_tokens.weight.device)
    if how.verified:
        from draft import draft_and_verify  # here, since it needs this file
        yield from draft_and_verify(model, tok, recipe, canvas, how, hook)
        return
    kind = TextReader if recipe.causal_block is None else BlockReader
    reader = kind(model, recipe, canvas, how)
    for number in range(int(canvas.block.max()) + 1):
        yield from decode_block(reader, tok, canvas, how, number, hook)
        if how.stop:
            canvas.end_at_strings(tok, how.stop)
        left = canvas.masked.any(1).nonzero()[:, 0]  # rows with something to write
        if len(left) == 0:
            return
        if len(left) < len(canvas.rows):
            canvas.keep(left)
            reader.keep(left)


def decode_block(reader, tok, canvas, how, number, hook):
    """Write one decoding block in all rows, a Step at a time."""
    stop_ids = torch.tensor(sorted(tok.stop_ids), dtype=torch.long, device=canvas.tokens.device)
    columns, real = columns_of(canvas.block == number)  # (b, n)
    positions = columns - canvas.start[:, None]
    open_ = canvas.masked.gather(1, columns) & real  # still masked
    if not open_.any():  # a part of a block that the prompt fills
        return
    to_write = open_.sum(1, keepdim=True)  # (b, 1)
    steps = to_write.clamp(max=how.steps)
    sure = torch.zeros(columns.shape, device=columns.device)  # of what is written: how sure then
    may_remask = open_
    reader.begin(canvas, number, columns)
    step = 0
    while True:
        where = how.seed, canvas.numbers[:, None], positions, torch.full_like(positions, step)
        logits = reader.logits(canvas, step)  # (b, n, vocab)
        logits, finite = hooked(logits, positions, canvas, hook)
        logits = adjusted(logits, columns, canvas, tok, how)
        tokens, p = propose(logits, how, where)
        confidence = confidence_of(how.confidence, p, tokens, where)
        count = torch.ones_like(steps)
        if how.steps:
            count = share(open_.sum(1, keepdim=True), step, steps)
        taken = take(open_, confidence, p, count, how, where)
        remasked = torch.zeros_like(taken)
        if how.remask:
            remasked = unsure(may_remask & ~open_, confidence, taken, sure, how.remask)
            if how.steps:
                remasked &= step + 1 < steps  # the last step writes the last token
            may_remask = may_remask & ~remasked
        sure = torch.where(taken, confidence, sure)
        canvas.write(columns, tokens, taken, remasked)
        canvas.end_rows(stop_ids)
        open_ = canvas.masked.gather(1, columns) & real
        left, finite = torch.stack([open_.any(), finite]).tolist()  # a step's only read by the host
        check_finite(finite)
        yield Step(canvas.rows, positions, tokens, confidence, taken, remasked, logits)
        if not left:
            return
        step += 1


def check_finite(finite):
    if not finite:
        raise Mistake("the model's logits are not finite: its weights are damaged, or its training "
                      "diverged; --dtype=float32 helps if they overflow in bfloat16")


def settled(how, recipe, texts, model_cfg):
    """A Decoding with nothing left open. Raises Mistake for what does not go together."""
    check_fields(how)
    check_rules(how)
    check_texts(texts, recipe, model_cfg)
    K = recipe.causal_block
    block_length = how.block_length or K or max(text.count(None) for text in texts)
    if K is not None and K > model_cfg.context:
        raise Mistake(f"block_size={K} is more than the model's context of {model_cfg.context}")
    if K is not None and K % block_length:
        raise Mistake(f"block_length={how.block_length} must divide block_size={K}: a block of the "
                      "model is decoded in equal parts")
    if how.steps > block_length and (how.block_length or K):  # else: at most what is masked
        raise Mistake(f"steps={how.steps} is more than the {block_length} tokens of a block: each "
                      "step writes one or more")
    cache = how.cache
    if cache == "auto":
        cache = "none" if K is None else "exact"
    fitting = {"block": ("none", "exact", "hierarchical"), "ar": ("none", "exact")}
    fitting = fitting.get(recipe.objective, ("none", "prefix", "dual"))
    if cache not in fitting:
        raise Mistake(f"cache={cache!r} does not fit objective={recipe.objective!r}: "
                      f"{', '.join(fitting)} do")
    if how.refresh and cache not in ("hierarchical", "prefix", "dual"):
        raise Mistake(f"refresh={how.refresh} is for caches that are approximate, and cache="
                      f"{cache!r} is not one: leave it at 0")
    confidence = how.confidence
    if how.verified:
        check_verified(how, recipe, cache)
        confidence = "left_to_right"
    steps = min(how.steps, block_length)
    return replace(how, confidence=confidence, steps=steps, block_length=block_length, cache=cache)


def check_rules(how):
    """Settings that exclude each other whatever the model."""
    rules = [name for name in ("threshold", "entropy_bound", "factor")
             if getattr(how, name) is not None]
    if how.steps:
        rules.append("steps")
    if how.verified:
        rules.append("verified")
    if len(rules) > 1:
        raise Mistake(f"{' and '.join(rules)} each say how many tokens a step takes: give one")
    certain = ("max_prob", "margin", "entropy")
    fits = {"threshold": certain[:2], "factor": certain[:1], "entropy_bound": certain,
            "verified": ("max_prob", "left_to_right")}
    for rule in rules:
        if how.confidence not in fits.get(rule, (how.confidence,)):
            raise Mistake(f"confidence={how.confidence!r} does not fit {rule}: "
                          f"{' or '.join(fits[rule])} does")
    for name in ("alg_temp", "remask"):
        if getattr(how, name) and how.confidence not in certain:
            raise Mistake(f"{name}={getattr(how, name)} needs a confidence of the model's, one of "
                          f"{', '.join(certain)}, not {how.confidence!r}")
    if how.alg_temp and set(rules) - {"steps"}:
        raise Mistake(f"alg_temp={how.alg_temp} draws the positions, and {rules[0]} chooses them "
                      "by its own rule: give one")
    if how.temperature < 1e-5 and (how.top_p < 1 or how.top_k):
        raise Mistake("top_p and top_k change nothing at temperature 0, which takes the most "
                      "likely token: give --temperature=1 or another")
    if not all(isinstance(text, str) and text for text in how.stop):
        raise Mistake(f"stop={shortened(how.stop)} must be a list of texts that are not empty, "
                      r"""such as '["\ndef ", "\nclass "]'""")


def check_texts(texts, recipe, model_cfg):
    if not texts:
        raise Mistake("there are no texts to write")
    for text in texts:
        ids = [i for i in text if i is not None]
        if not all(isinstance(i, int) and 0 <= i < model_cfg.vocab_size for i in ids):
            raise Mistake(f"a text is a list of None and ids below {model_cfg.vocab_size}")
        if len(ids) == len(text) or text[0] is None:
            raise Mistake("a text begins with a token and has a place to write")
        if len(text) > model_cfg.context:
            raise Mistake(f"a text of {len(text)} tokens is longer than the model's context of "
                          f"{model_cfg.context}")
        if recipe.causal_block and any(i is not None for i in text[text.index(None):]):
            raise Mistake(f"objective={recipe.objective!r} sees nothing to the right of what it "
                          "writes: a gap inside a text is arranged as suffix, prefix, middle")


def check_verified(how, recipe, cache):
    K = recipe.block_size
    if recipe.objective != "block":
        raise Mistake(f"verified needs objective='block', not {recipe.objective!r}: it is about "
                      "the order of tokens inside a block")
    if K > 8:
        raise Mistake(f"verified needs blocks of at most 8 tokens, not {K}: a forward has K "
                      "copies of a block")
    if how.block_length not in (0, K) or how.remask or cache != "exact":
        raise Mistake("verified goes with neither block_length, remask nor another cache than "
                      "exact: it is left_to_right, one token at a time")


# --- the whole of it, for those who want no steps -------------------------------------------------

def write(texts, step):
    """Put what a step has written into the texts, lists of ids; None again where it masked."""
    rows = step.rows[:, None].expand_as(step.positions)
    fields = [rows, step.positions, step.tokens, step.taken.long(), step.remasked.long()]
    changed = step.taken | step.remasked
    for row, place, token, _, remasked in torch.stack(fields, -1)[changed].tolist():
        if place < len(texts[row]):
            texts[row][place] = None if remasked else token


def completion(ids, stop_ids):
    """What is written: the ids before the first stop id or None."""
    ends = [n for n, i in enumerate(ids) if i is None or i in stop_ids]
    return ids[:ends[0]] if ends else ids


def generate(model, tok, recipe, prompts, how, max_new_tokens, rows=None):
    """Complete prompts, lists of ids, in one batch. Returns the completions, lists of ids.

    A completion ends before a stop id, after max_new_tokens, or where the context does. A stop
    string is looked for after each block, so some text may stand behind it. how, rows: see decode.
    """
    texts = []
    for prompt in prompts:
        room = min(max_new_tokens, model.cfg.context - len(prompt))
        if room < 1:
            raise Mistake(f"a prompt of {len(prompt)} tokens leaves no room in the model's context "
                          f"of {model.cfg.context}: shorten it")
        texts.append([*prompt, *[None] * room])
    for step in decode(model, tok, recipe, texts, how, rows):
        write(texts, step)
    return [completion(text[len(p):], tok.stop_ids) for text, p in zip(texts, prompts)]
