"""Who attends to whom. Four integers per token encode it.

Every mask in this project lets a query see an interval of keys, so no (T, T) mask is ever built for
a training step. (Short rows of rl.py have one: estimators.py.) Below is one document of 8 tokens in
blocks of K = 4. The sequence is [xt ; x0]: the noisy tokens, then the clean ones.

                     keys: noisy       clean
                       0123 4567     0123 4567
    query  noisy 0-3   ####                          its own noisy block: [block_start, block_end)
           noisy 4-7        ####     ####            and the clean past:  [doc_start, block_start)
           clean 0-3                 ####            clean, through its own block:
           clean 4-7                 #### ####                            [doc_start, block_end)

Without the noisy half, blocks of one token are causal attention, and one block per document is
bidirectional attention. Documents packed into one row never see each other.

Not covered: several intervals per half, which block diffusion does not need.
"""
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from configurator import Mistake

TILE = 128  # queries per tile: fewer skip more of a causal mask, more keep the cores busy

@dataclass(frozen=True, eq=False)  # eq=False: a batch's spans are compared and hashed as one object
class Spans:
    """Each clean position's document [doc_start, doc_end) and block [block_start, block_end).

    doc_start, doc_end, block_start, block_end: (B, T) int32, positions in the row.
    noisy: True where the sequence is [xt ; x0], 2T tokens; False where it is T clean tokens alone.
    """
    doc_start: torch.Tensor
    doc_end: torch.Tensor
    block_start: torch.Tensor
    block_end: torch.Tensor
    noisy: bool = False

    @classmethod
    def of(cls, doc_start, doc_end, block_size=None, noisy=False):
        """Documents cut into blocks of `block_size` tokens; None makes each document one block.

        Blocks are counted from the document's first token, and its end cuts the last one.
        A position with doc_end = doc_start is in no document: it sees nobody, nobody sees it.
        Raises Mistake for a block_size below 1.
        """
        if block_size is None:
            return cls(doc_start, doc_end, doc_start, doc_end, noisy)
        if block_size < 1:
            raise Mistake(f"block_size={block_size} must be 1 or more: 1 is causal attention")
        i = row_positions(doc_start)
        block_start = i - (i - doc_start) % block_size
        block_start = torch.minimum(block_start, doc_end)
        block_end = torch.minimum(block_start + block_size, doc_end)
        return cls(doc_start, doc_end, block_start, block_end, noisy)

    @classmethod
    def annealed(cls, doc_start, doc_end, right):
        """Causal attention that also sees `right` more tokens: 0 is causal, T is bidirectional.

        This is the attention-mask annealing of DiffuLLaMA and of DiffuCoder's adaptation, with one
        difference: DiffuLLaMA's code reveals random future keys, here an edge moves. Position i
        sees [doc_start, i + 1 + right) and is seen by [i - right, doc_end), so the two tables of
        intervals, of keys and of queries, hold unchanged. Raises Mistake for a negative `right`.
        """
        if right < 0:
            raise Mistake(f"right={right} must be 0 or more: 0 is causal attention")
        i = row_positions(doc_start)
        block_start = torch.minimum(torch.maximum(doc_start, i - right), doc_end)
        block_end = torch.minimum(doc_end, i + 1 + right)
        return cls(doc_start, doc_end, block_start, block_end)

    @property
    def positions(self):
        """(B, T or 2T) int64: each token's place in its document, for RoPE.

        A noisy token has the place of its clean twin.
        """
        places = (row_positions(self.doc_start) - self.doc_start).long()  # (B, T)
        if self.noisy:
            return torch.cat([places, places], 1)
        return places

    @property
    def pairs(self):
        """How many query-key pairs each head has in these rows: what attention costs.

        A noisy query has as many as its clean twin.
        """
        clean = int((self.block_end - self.doc_start).sum())
        if self.noisy:
            return 2 * clean
        return clean

    def stacked(self):
        """(B, 4, T) int32, as the kernel reads them."""
        return torch.stack([self.doc_start, self.doc_end, self.block_start, self.block_end], 1)

    def sees(self, queries, clean_keys, noisy_keys=(0, 0), noisy=False):
        """(B, queries, keys) bool: which of these keys these queries see, clean keys first.

        queries, clean_keys, noisy_keys: (from, to) positions.
        noisy: the queries are tokens of xt, not of x0. Clean queries see no noisy keys.
        """
        rows = slice(*queries)
        doc_start = self.doc_start[:, rows]
        block_start = self.block_start[:, rows]
        block_end = self.block_end[:, rows]
        if not noisy:
            return between(doc_start, block_end, clean_keys)
        past = between(doc_start, block_start, clean_keys)
        own_block = between(block_start, block_end, noisy_keys)
        return torch.cat([past, own_block], 2)

    def dense_mask(self):
        """(B, S, S) bool, True where a query (dim 1) sees a key (dim 2).

        S is T, or 2T where `noisy`. This is the reference, quadratic in memory.
        """
        T = self.doc_start.shape[1]
        clean = self.sees((0, T), (0, T))
        if not self.noisy:
            return clean
        noisy = self.sees((0, T), (0, T), (0, T), noisy=True)
        noisy = torch.cat([noisy[..., T:], noisy[..., :T]], 2)  # (B, T, 2T), noisy keys first
        clean = F.pad(clean, (T, 0))
        return torch.cat([noisy, clean], 1)

    @cached_property  # worked out once per batch, used by every layer
    def tiles(self):
        """What PyTorch attention visits: a list of (queries, clean keys, noisy keys, mask).

        The first three are slices: of the queries, and of the keys in each half that any of these
        queries sees in any row. mask is (B, 1, queries, keys) bool, clean keys first, or
        None where all of them are seen. Tiles of noisy queries come first, as in [xt ; x0].
        """
        if self.noisy:
            return self.half_tiles(noisy=True) + self.half_tiles(noisy=False)
        return self.half_tiles(noisy=False)

    def half_tiles(self, noisy):
        """The tiles of one half's queries."""
        T = self.doc_start.shape[1]
        half = T if self.noisy and not noisy else 0  # where this half begins in the sequence
        tiles = []
        for a in range(0, T, TILE):
            b = min(a + TILE, T)
            doc_start = self.doc_start[:, a:b]
            block_start = self.block_start[:, a:b]
            block_end = self.block_end[:, a:b]
            if noisy:
                clean_keys = hull(doc_start, block_start)
                noisy_keys = hull(block_start, block_end)
            else:
                clean_keys = hull(doc_start, block_end)
                noisy_keys = (0, 0)
            mask = self.sees((a, b), clean_keys, noisy_keys, noisy)[:, None]
            if mask.all():
                mask = None
            queries = slice(half + a, half + b)
            tiles.append((queries, slice(*clean_keys), slice(*noisy_keys), mask))
        return tiles


@dataclass(frozen=True, eq=False)
class CacheSpans:
    """Queries whose keys lie in slots: of a KV cache in decoding (model.KVCache), or where there is
    no cache, the tokens themselves (estimators.py).

    A query sees the slots [past_start, past_end), and [own_start, own_end): the two intervals that
    a noisy token has above. Where one is enough, the second is empty.
    positions: (B, Q) int64, each query's place in its document. The rest: (B, Q) integers.
    slots: how many there are.
    """
    positions: torch.Tensor
    past_start: torch.Tensor
    past_end: torch.Tensor
    own_start: torch.Tensor
    own_end: torch.Tensor
    slots: int

    @cached_property
    def mask(self):
        """(B, 1, Q, slots) bool, True where a query sees a slot."""
        past = between(self.past_start, self.past_end, (0, self.slots))
        own = between(self.own_start, self.own_end, (0, self.slots))
        return (past | own)[:, None]


def row_positions(doc_start):
    """(T,) int32: where the tokens of doc_start (B, T) stand in their row."""
    T = doc_start.shape[1]
    return torch.arange(T, dtype=torch.int32, device=doc_start.device)


def between(start, end, keys):
    """(B, queries, keys) bool: start <= key < end. start, end: (B, queries). keys: (from, to)."""
    key = torch.arange(*keys, dtype=torch.int32, device=start.device)
    return (key >= start[..., None]) & (key < end[..., None])


def hull(start, end):
    """The interval (from, to) that holds all intervals [start, end)."""
    low, high = int(start.min()), int(end.max())
    return low, max(low, high)
