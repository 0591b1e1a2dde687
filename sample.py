"""Writing code with a trained model: the most confident positions first, block by block.

    python sample.py --prompt "def fibonacci(n):"         # the run in out/ that saved last
    python sample.py --init_from=out/toy_ar --temperature=0.8 --samples=3

A block model fills one block after another against a KV cache. The first forward of a block also
reads whatever comes before it and is not cached yet: the prompt at first, the previous block later
on. With block-causal attention that is exact. An autoregressive model is the same with blocks of
one token and `shift`. A bidirectional model sees the whole text in every forward: nothing can be
cached exactly.

Not covered: caches for bidirectional models, infilling, chats of several turns, orders other than
by confidence.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import huggingface
from configurator import Float, Int, Mistake, Seed, configure
from diffusion import read_at, spans_for
from model import KVCache, fast_dtype, pick_device
from spans import Spans


@dataclass
class Config:
    prompt: str = "def fibonacci(n):"  # the text to continue
    init_from: str = ""  # folder of a run or checkpoint, or Hub name; empty: the newest run in out/
    objective: Literal["ar", "bidirectional", "ar_diffusion", "block"] | None = None  # none: own
    shift: bool | None = None  # predict token i at position i - 1; none: as the folder says
    block_size: Int(1, 2**20) | None = None  # K; none: as the folder says
    mask_token: str = ""  # name of the mask, where the folder does not say
    chat: bool = False  # the prompt is a user's message in the folder's chat template
    samples: Int(1, 1024) = 1  # how many completions
    max_new_tokens: Int(1, 2**20) = 128  # longest completion, in tokens
    steps: Int(0, 2**20) = 0  # forwards per block, each unmasking an equal share; 0: one per token
    temperature: Float(0, 100) = 0.0  # 0: the most likely token; else softmax(logits / temperature)
    cache: bool = True  # (ar, block) False: every forward reads the whole text, for the same logits
    seed: Seed = 1337  # of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where a GPU has it


class Draft:
    """A text in the making, (B, L) int64 with <mask> where nothing is written yet, and its logits.

    recipe: the model's objective, shift and block_size. cache: keep keys and values (ar, block).
    """

    def __init__(self, model, text, recipe, cache=True):
        self.model, self.text, self.recipe = model, text, recipe
        self.block_size = recipe.decoding_block
        self.cache = None
        if cache and self.block_size is not None:
            self.cache = KVCache(model.cfg, *text.shape)
        self.boundary = None  # hidden state of the position before the block, which `shift` reads

    def logits(self, start, end):
        """(B, end - start, vocab) float32: the predictions there, all before them being written."""
        if self.block_size is None:
            hidden = self.text_hidden()[:, start:end]
        else:
            hidden = self.block_hidden(start, end)
        return self.model.logits(hidden)

    def text_hidden(self):
        """Without blocks, one forward over the text. (B, L, d_model), where it is read."""
        doc_start = torch.zeros(self.text.shape, dtype=torch.int32, device=self.text.device)
        doc_end = doc_start + self.text.shape[1]
        hidden = self.model(self.text, spans_for(self.recipe, doc_start, doc_end))
        read = read_at(self.recipe, doc_start)  # (B, L)
        return hidden.gather(1, read[..., None].expand_as(hidden))

    def block_hidden(self, start, end):
        """The block [start, end) against all before it.

        Returns (B, end - start, d_model), where each token is predicted.
        """
        offset = self.cache.length if self.cache is not None else 0
        last = end
        if self.recipe.shift and self.block_size == 1:
            last = start  # autoregressive: nobody reads the masked token itself
        shape = (len(self.text), last - offset)
        doc_start = torch.zeros(shape, dtype=torch.int32, device=self.text.device)
        doc_end = doc_start + self.text.shape[1]
        spans = Spans.of(doc_start, doc_end, self.block_size, offset=offset)
        hidden = self.model(self.text[:, offset:last], spans, self.cache)  # (B, last - offset, d)
        if self.cache is not None:
            self.cache.length = start  # the block is still changing: the next forward overwrites it
        if not self.recipe.shift:
            return hidden[:, start - offset:]
        if offset < start:
            self.boundary = hidden[:, start - offset - 1:start - offset]
        elif start == 0:
            self.boundary = hidden[:, :1]  # position 0 is the prompt's: never predicted
        return torch.cat([self.boundary, hidden[:, start - offset:end - offset - 1]], 1)


def choose(logits, temperature, banned, generator):
    """A token for every position, and how sure the model is of it.

    logits: (B, n, vocab) float32. banned: ids that are never chosen (<mask>, <pad>).
    Returns tokens (B, n) int64 and confidence (B, n): the token's probability; untempered at
    temperature 0. Raises Mistake for logits that are not finite.
    """
    if not logits.isfinite().all():
        raise Mistake("the model's logits are not finite: its weights are damaged, or its training "
                      "diverged; --dtype=float32 helps if they overflow in bfloat16")
    logits[..., banned] = float("-inf")
    if temperature < 1e-5:  # below, the division overflows: the most likely token, as at 0
        p = torch.softmax(logits, -1)  # (B, n, vocab)
        tokens = p.argmax(-1)
    else:
        p = torch.softmax(logits / temperature, -1)
        tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
    return tokens, p.gather(2, tokens[..., None])[..., 0]


def share(masked, step, steps):
    """How many of `masked` positions step 0 <= step < steps unmasks: as even as possible, the
    remainder first (LLaDA)."""
    extra = 1 if step < masked % steps else 0
    return masked // steps + extra


@torch.no_grad()
def generate(model, tok, recipe, prompt, cfg, stopped=lambda: False):
    """Complete a prompt.

    prompt: ids, <bos> included. cfg: samples, max_new_tokens, steps, temperature, cache and seed of
    Config. stopped: asked after each forward; True ends it with what is written by then.
    Returns a list of `samples` lists of ids, each ended by the first <eos> that had nothing masked
    to its left, which is left out, or cut at max_new_tokens; and the number of tokens written,
    <eos> included.
    """
    device, n = model.embed_tokens.weight.device, len(prompt)
    length = n + cfg.max_new_tokens
    block = recipe.decoding_block or length
    filled = -(-length // block) * block  # the last block is filled, then trimmed (as SDAR does)
    masked = (torch.arange(filled, device=device) >= n).repeat(cfg.samples, 1)  # (B, L)
    text = masked * (tok.mask_id or 0)  # an autoregressive model may have no <mask>: it reads none
    text[:, :n] = torch.tensor(prompt, device=device)
    draft = Draft(model, text, recipe, cfg.cache)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    banned = list(range(tok.vocab_size, model.cfg.vocab_size))  # rows that only pad the embedding
    banned += {tok.mask_id, tok.pad_id} - {None, tok.eos_id}  # Qwen pads with <eos>
    for start in range(n // block * block, filled, block):  # the prompt's tail shares a block
        end = start + block
        to_fill = int(masked[0, start:end].sum())  # the same in every row
        steps = min(cfg.steps or to_fill, to_fill)
        for step in range(steps):
            logits = draft.logits(start, end)  # (B, block, vocab)
            tokens, confidence = choose(logits, cfg.temperature, banned, generator)
            confidence = confidence.masked_fill(~masked[:, start:end], -1)
            chosen = confidence.topk(share(to_fill, step, steps), 1).indices
            text[:, start:end].scatter_(1, chosen, tokens.gather(1, chosen))
            masked[:, start:end].scatter_(1, chosen, False)
            if stopped() or finished(text[:, n:length], masked[:, n:length], tok.eos_id):
                return completions(text[:, n:length], masked[:, n:length], tok.eos_id)
    return completions(text[:, n:length], masked[:, n:length], tok.eos_id)


def finished(text, masked, eos_id):
    """Whether every row of the completions (B, new) has an <eos> with nothing masked before it."""
    if eos_id is None:
        return False
    return bool(((text == eos_id) & (masked.cumsum(1) == 0)).any(1).all())


def completions(text, masked, eos_id):
    """Each row's ids before its <eos> or its first mask, and how many tokens were written in all.

    text, masked: (B, new), the completions alone.
    """
    rows, written = [], 0
    for ids, hidden in zip(text.tolist(), masked.tolist()):
        if True in hidden:
            ids = ids[:hidden.index(True)]
        if eos_id in ids:
            written += 1
            ids = ids[:ids.index(eos_id)]
        written += len(ids)
        rows.append(ids)
    return rows, written


def prompt_ids(cfg, tok, model):
    """The prompt as ids. Raises Mistake where it is empty, or longer than the model's context."""
    if not cfg.prompt.strip():
        raise Mistake('the prompt is empty; --prompt "def fibonacci(n):" is one')
    if cfg.chat:
        ids = tok.chat([{"role": "user", "content": cfg.prompt}])
    else:
        ids = tok.encode(cfg.prompt)
        if tok.bos_id is not None:
            ids = [tok.bos_id, *ids]
    if not ids:
        raise Mistake("the prompt has no tokens: write another one")
    if len(ids) >= model.cfg.context:
        raise Mistake(f"the prompt has {len(ids)} tokens, the model's context only "
                      f"{model.cfg.context}: shorten it")
    return ids


def main(argv=None):
    cfg, _ = configure(Config, argv)
    device = pick_device(cfg.device)
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else fast_dtype(device)
    name = cfg.init_from or huggingface.newest_run()
    asked = {"objective": cfg.objective, "shift": cfg.shift, "block_size": cfg.block_size}
    weights = getattr(torch, dtype)
    model, tok, recipe = huggingface.load(name, device, weights, cfg.mask_token, **asked)
    prompt = prompt_ids(cfg, tok, model)
    cfg.max_new_tokens = min(cfg.max_new_tokens, model.cfg.context - len(prompt))
    block = recipe.decoding_block or cfg.max_new_tokens
    if cfg.steps > block:
        raise Mistake(f"steps={cfg.steps} is more than the {block} tokens of a block: each step "
                      "unmasks one or more")

    asked_to_stop = []  # the first Ctrl-C ends the writing, a second one the program

    def ask_to_stop(number, frame):
        if asked_to_stop:
            sys.exit(130)
        asked_to_stop.append(number)

    signal.signal(signal.SIGINT, ask_to_stop)
    how = recipe.objective
    if how == "block":
        how = f"block, K = {recipe.block_size}"
    shift = "shift" if recipe.shift else "no shift"
    print(f"--- {tok.folder}: {how}, {shift}, mask {tok.mask_id}, {dtype} on {device}", flush=True)
    began = time.time()
    rows, written = generate(model, tok, recipe, prompt, cfg, lambda: bool(asked_to_stop))
    seconds = time.time() - began
    for i, ids in enumerate(rows):
        print(f"--- sample {i + 1} of {cfg.samples}")
        print(("" if cfg.chat else cfg.prompt) + tok.decode(ids))
    print(f"--- {written} tokens in {seconds:.2f} s, {written / seconds:.0f} tokens/s"
          + (", stopped" if asked_to_stop else ""))
    return 130 if asked_to_stop else 0


if __name__ == "__main__":
    sys.exit(main())
