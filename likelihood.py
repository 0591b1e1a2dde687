"""The likelihood that a model gives to text it has not seen: the NELBO, and that of one order.

    data --held_out--> rows --score_rows--> nats per token, bits per byte

Figures are per scored token: of documents all but the first, <eos> included; of samples with a
prompt the completion's alone. Bits per byte divides by the bytes of the scored tokens.

Not covered: the NELBO itself (diffusion.py).
"""
import math
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import sft
from diffusion import Noised, largest_block, nelbo, noise_blocks, token_losses
from loader import Windows


@torch.no_grad()
def left_to_right(model, batch, recipe, largest=None):
    """-log p of these rows where each noise block is written from left to right, in nats: a float.

    Token i of a block is predicted with the block's earlier tokens clean and the later ones masked,
    in all blocks at once: as many forwards as the largest block has tokens. That is K for `block`;
    for `bidirectional` and `ar_diffusion`, whose block is a document, one per token.

    The NELBO is the mean of -log p over all n! orders in which a block of n tokens can be written
    (so it is at least -log of the mean of p). This is one of these orders, and may lie on either
    side of the mean: code reads from left to right, so usually it is the lower one.

    batch: a loader.Batch, on the CPU. largest: see diffusion.nelbo.
    """
    device = model.embed_tokens.weight.device
    clean = Noised.clean(batch).rows(0, len(batch.x0), device)
    if recipe.objective == "ar":
        return token_losses(model, clean, recipe).double().sum().item()
    block = noise_blocks(clean.doc_start, recipe)  # (B, T)
    before = clean.maskable.long().cumsum(1) - clean.maskable.long()  # maskable ones to the left
    place = before - before.gather(1, block)  # (B, T): each token's number in its block
    nats = 0.0
    for i in range(largest_block(recipe, batch) if largest is None else largest):
        hidden = clean.maskable & (place >= i)  # (B, T)
        noised = replace(clean, xt=clean.x0.masked_fill(hidden, recipe.mask_id),
                         masked=clean.maskable & (place == i))
        nats += token_losses(model, noised, recipe).double().sum().item()
    return nats


def held_out(cfg, loaded):
    """The rows to score, a loader.Batch on the CPU: windows of documents, or rows of samples.

    cfg: evaluate.Likelihood. Raises Mistake where cfg.data holds neither.
    """
    model, tok, recipe = loaded
    T = cfg.context or model.cfg.context
    if not sft.is_supervised(cfg.data):
        rows = Windows(cfg.data, cfg.split, T, model.cfg.vocab_size)
    else:
        if cfg.data.endswith(".jsonl"):
            store = sft.Store.of(list(sft.read(cfg.data, tok, quiet=True)))
        else:
            store = sft.Store.open(cfg.data, cfg.split, tok.vocab_size)
        canvas = cfg.canvas if recipe.objective == "bidirectional" else 0
        rows = sft.Samples(store, T, tok, canvas=canvas)
    return rows.batch(rows.spread(cfg.windows))


def score_rows(cfg, loaded, rows, world):
    """The figures of these rows, shared out among the processes: {name: number}.

    Bits per byte are NaN where only <eos> is scored.
    """
    model, tok, recipe = loaded
    ordered = cfg.left_to_right
    if ordered is None:
        ordered = recipe.objective == "block"
    largest, token_bytes = largest_block(recipe, rows), torch.from_numpy(tok.token_bytes)
    totals = np.zeros(5)  # nats, their variance, nats from left to right, tokens, bytes
    mine = list(range(world.rank, len(rows.x0), world.size))
    parts = [mine[start:start + cfg.batch] for start in range(0, len(mine), cfg.batch)]
    for numbers in tqdm(parts, unit=" batches", disable=world.rank > 0):
        part = rows.select(numbers)
        nats, variance = nelbo(model, part, recipe, cfg.draws, cfg.seed, numbers, largest)
        in_order = left_to_right(model, part, recipe) if ordered else 0.0
        scored = part.x0[part.maskable]
        totals += [nats, variance, in_order, len(scored), token_bytes[scored].sum()]
    nats, variance, in_order, tokens, bytes_ = world.sum(*totals)
    divisor = bytes_ or math.nan  # where only <eos> is scored, there are no bytes
    scores = {"nelbo": nats / tokens, "nelbo_stderr": variance**0.5 / tokens,
              "bits_per_byte": nats / math.log(2) / divisor}
    if ordered:
        scores["left_to_right"] = in_order / tokens
        scores["left_to_right_bits_per_byte"] = in_order / math.log(2) / divisor
    return scores | {"tokens": int(tokens), "bytes": int(bytes_)}
