"""Writing code with a trained model: the most confident positions first, block by block.

    python sample.py --prompt "def fibonacci(n):"                   # the run in out/ that saved last
    python sample.py --init_from=out/toy_ar --temperature=0.8 --samples=3

A block model fills one block after another against a KV cache. The first forward of a block takes along whatever
comes before it and is not cached yet, the prompt at first, the block just finished later on: with block-causal
attention that is exact. An autoregressive model is the same with blocks of one token and `shift`. A bidirectional
model sees the whole text in every forward, so there is nothing it could cache exactly.

Not covered: caches for bidirectional models, infilling, chats of several turns, orders other than by confidence.
"""
import time
from dataclasses import dataclass
from typing import Literal

import torch

import huggingface
from attention_kernel import Spans
from configurator import configure
from diffusion import read_at, spans_for
from model import KVCache
from parallel import pick_device


@dataclass
class Config:
    prompt: str = "def fibonacci(n):"  # the text to go on from
    init_from: str = ""  # folder of a run or a checkpoint, or a model's name on the Hub; empty: the run in out/ that saved last
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] | None = None  # none: as the folder says
    shift: bool | None = None  # predict token i at position i - 1; none: as the folder says
    block_size: int | None = None  # K; none: as the folder says
    mask_token: str = ""  # name of the mask, where the folder does not say
    chat: bool = False  # the prompt is a user's message in the folder's chat template
    samples: int = 1  # how many completions
    max_new_tokens: int = 128  # longest completion, in tokens
    steps: int = 0  # forwards a block, each unmasking an equal share; 0: one for every token
    temperature: float = 0.0  # 0: the most likely token, else sampled from softmax(logits / temperature)
    cache: bool = True  # False: every forward sees the whole text again, for the same logits
    seed: int = 1337  # of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 on a GPU that has it


class Decoding:
    """A text in the making, (B, L) int64 with <mask> where nothing is written yet, and how to get its logits.

    recipe: the model's objective, shift and block_size. cache: whether to keep keys and values (ar and block only).
    """

    def __init__(self, model, text, recipe, cache=True):
        self.model, self.text, self.recipe = model, text, recipe
        self.K = {"ar": 1, "block": recipe.block_size}.get(recipe.objective)  # None: the whole text is one block
        self.cache = None
        if cache and self.K:
            self.cache = KVCache(model.cfg, *text.shape)
        self.boundary = None  # hidden state of the last position before the block, which `shift` reads

    def logits(self, a, b):
        """(B, b - a, vocab) float32: what the model says of positions a..b, all before them being written."""
        return self.model.logits(self.block_hidden(a, b) if self.K else self.text_hidden()[:, a:b])

    def text_hidden(self):
        """Without blocks: one forward over all of the text. (B, L, d_model), read where each token is predicted."""
        start = torch.zeros(self.text.shape, dtype=torch.int32, device=self.text.device)
        h = self.model(self.text, spans_for(self.recipe, start, start + self.text.shape[1]))
        return h.gather(1, read_at(self.recipe, start)[..., None].expand_as(h))

    def block_hidden(self, a, b):
        """The block a..b against everything before it. (B, b - a, d_model), read where each token is predicted."""
        first = self.cache.length if self.cache else 0
        end = a if self.recipe.shift and self.K == 1 else b  # autoregressive: nobody reads the masked token itself
        start = torch.zeros(len(self.text), end - first, dtype=torch.int32, device=self.text.device)
        spans = Spans.of(start, start + self.text.shape[1], self.K, first=first)
        h = self.model(self.text[:, first:end], spans, self.cache)
        if self.cache:
            self.cache.length = a  # the block itself is still changing: the next forward overwrites it
        if not self.recipe.shift:
            return h[:, a - first:]
        if first < a:
            self.boundary = h[:, a - first - 1:a - first]
        elif a == 0:
            self.boundary = h[:, :1]  # position 0 has no left neighbour; it is the prompt's and never read
        return torch.cat([self.boundary, h[:, a - first:b - first - 1]], 1)


def choose(logits, temperature, banned, generator):
    """A token for every position, and how sure the model is of it.

    logits: (B, n, vocab) float32. banned: ids that are never chosen (<mask>, <pad>).
    Returns tokens (B, n) int64 and confidence (B, n): the token's probability; untempered at temperature 0.
    """
    logits[..., banned] = float("-inf")
    sampled = temperature > 1e-5  # below, the division overflows: the most likely token, as at 0
    p = torch.softmax(logits / (temperature if sampled else 1.0), -1)
    if sampled:
        tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    else:
        tokens = p.argmax(-1)
    return tokens, p.gather(2, tokens[..., None])[..., 0]


def share(masked, step, steps):
    """How many of `masked` positions step 0 ≤ step < steps unmasks: as even as possible, the remainder first (LLaDA)."""
    return masked // steps + (step < masked % steps)


@torch.no_grad()
def generate(model, tok, recipe, prompt, samples=1, max_new_tokens=128, steps=0, temperature=0.0, cache=True, seed=1337):
    """Complete a prompt. prompt: ids, <bos> included. steps: forwards a block, 0 for one a token.

    Returns a list of `samples` lists of ids, each ended by the first <eos> that had nothing masked to its left, which
    is left out, or cut at max_new_tokens; and the number of tokens written, <eos> included.
    """
    device, n = model.embed_tokens.weight.device, len(prompt)
    masked = (torch.arange(n + max_new_tokens, device=device) >= n).repeat(samples, 1)  # (B, L)
    text = masked * (tok.mask_id or 0)  # an autoregressive model may have no <mask>: it never reads what is not written
    text[:, :n] = torch.tensor(prompt, device=device)
    decoding = Decoding(model, text, recipe, cache)
    generator = torch.Generator(device).manual_seed(seed)
    banned = [i for i in (tok.mask_id, tok.pad_id) if i not in (None, tok.eos_id)]  # Qwen pads with its end of text
    banned += range(tok.vocab_size, model.cfg.vocab_size)  # rows that pad the embedding stand for no token
    K = decoding.K or text.shape[1]
    for a in range(n // K * K, text.shape[1], K):  # the prompt's ragged tail shares its block with the first new tokens
        b = min(a + K, text.shape[1])
        to_fill = int(masked[0, a:b].sum())  # the same in every row
        steps_here = min(steps or to_fill, to_fill)
        for step in range(steps_here):
            tokens, confidence = choose(decoding.logits(a, b), temperature, banned, generator)
            chosen = confidence.masked_fill(~masked[:, a:b], -1).topk(share(to_fill, step, steps_here), 1).indices
            text[:, a:b].scatter_(1, chosen, tokens.gather(1, chosen))
            masked[:, a:b].scatter_(1, chosen, False)
            if finished(text[:, n:], masked[:, n:], tok.eos_id):
                return completions(text, n, tok)
    return completions(text, n, tok)


def finished(text, masked, eos_id):
    """Whether every row of the completions (B, new) has an <eos> with nothing masked to its left, nor on it."""
    if eos_id is None:
        return False
    return bool(((text == eos_id) & (masked.cumsum(1) == 0)).any(1).all())


def completions(text, n, tok):
    """Each row's ids after the prompt and before its <eos>, and how many tokens were written in all."""
    rows = [row[n:].tolist() for row in text]
    cut = [row[:row.index(tok.eos_id)] if tok.eos_id in row else row for row in rows]
    return cut, sum(min(len(c) + 1, len(r)) for c, r in zip(cut, rows))


def main():
    cfg, _ = configure(Config)
    for name in ("samples", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be 1 or more")
    if not cfg.prompt.strip():
        raise ValueError('the prompt is empty; --prompt "def fibonacci(n):" is one')
    if cfg.temperature < 0 or cfg.steps < 0:
        raise ValueError(f"temperature={cfg.temperature} and steps={cfg.steps} must be 0 or more")
    device = pick_device(cfg.device)
    fast_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, cfg.dtype) if cfg.dtype != "auto" else torch.bfloat16 if fast_bf16 else torch.float32

    folder = huggingface.find(cfg.init_from or huggingface.newest_run())
    model, tok, recipe = huggingface.load(folder, device, dtype, cfg.mask_token, objective=cfg.objective, shift=cfg.shift,
                                         block_size=cfg.block_size)
    if cfg.chat:
        prompt = tok.chat([{"role": "user", "content": cfg.prompt}])
    else:
        prompt = ([] if tok.bos_id is None else [tok.bos_id]) + tok.encode(cfg.prompt)
    room = model.cfg.context - len(prompt)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the model's context only {model.cfg.context}: shorten it")
    new = min(cfg.max_new_tokens, room)
    K = {"ar": 1, "block": recipe.block_size}.get(recipe.objective, new)
    if cfg.steps > K:
        raise ValueError(f"steps={cfg.steps} is more than the {K} tokens of a block: each step unmasks one or more")

    began = time.time()
    texts, written = generate(model, tok, recipe, prompt, cfg.samples, new, cfg.steps, cfg.temperature, cfg.cache, cfg.seed)
    seconds = time.time() - began
    how = {"ar": "ar", "block": f"block, K = {recipe.block_size}"}.get(recipe.objective, recipe.objective)
    print(f"--- {folder}: {how}, {'shift' if recipe.shift else 'no shift'}, mask {tok.mask_id}, {str(dtype)[6:]} on {device}")
    for i, ids in enumerate(texts):
        print(f"--- sample {i + 1} of {cfg.samples}")
        print(("" if cfg.chat else cfg.prompt) + tok.decode(ids))
    print(f"--- {written} tokens in {seconds:.2f} s, {written / seconds:.0f} tokens/s")


if __name__ == "__main__":
    main()
