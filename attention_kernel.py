"""Who attends to whom, as intervals (`Spans`), and attention over them.

Every mask of this project lets a query see an interval of keys, so four integers per position stand for it and no
(T, T) mask is ever built for training. The picture for one document of 8 tokens in blocks of K = 4, where the
sequence is [xt ; x0], the noisy tokens and then the clean ones:

                     keys: noisy       clean
                       0123 4567     0123 4567
    query  noisy 0-3   ####                          its own noisy block: [block_start, block_end)
           noisy 4-7        ####     ####            and the clean past:  [doc_start, block_start)
           clean 0-3                 ####            clean, through its own block:
           clean 4-7                 #### ####                            [doc_start, block_end)

`attention` is the one entry. It runs tiles of queries, each against only the keys the tile can see, in plain PyTorch,
on any device.

Not covered: dropout, additive biases, sliding windows (their spans would be intervals too).
"""
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

TILE = 128  # queries a tile: small enough to skip most of what a causal mask forbids, large enough to keep cores busy


@dataclass(frozen=True)
class Spans:
    """Per clean position i of a row: its document is [doc_start, doc_end), its block [block_start, block_end).

    doc_start, doc_end, block_start, block_end: (B, T) int32, positions in the row.
    noisy: True where the sequence is [xt ; x0], 2T tokens; False where it is the T clean positions alone.
    first: the position of the first of them; not 0 where a KV cache holds the keys of those before it.
    """
    doc_start: torch.Tensor
    doc_end: torch.Tensor
    block_start: torch.Tensor
    block_end: torch.Tensor
    noisy: bool = False
    first: int = 0

    @classmethod
    def of(cls, doc_start, doc_end, block_size=None, noisy=False, first=0):
        """Documents cut into blocks of `block_size` from each one's first token; None: a document is one block.

        block_size=1 is causal attention, None is bidirectional attention.
        """
        if block_size is None:
            return cls(doc_start, doc_end, doc_start, doc_end, noisy, first)
        i = first + torch.arange(doc_start.shape[1], dtype=torch.int32, device=doc_start.device)
        block_start = i - (i - doc_start) % block_size
        return cls(doc_start, doc_end, block_start, torch.minimum(block_start + block_size, doc_end), noisy, first)

    @property
    def positions(self):
        """(B, S) int64: each token's place in its document, for RoPE; a noisy token has its clean twin's."""
        i = self.first + torch.arange(self.doc_start.shape[1], device=self.doc_start.device) - self.doc_start
        return torch.cat([i, i], 1) if self.noisy else i

    def to(self, device):
        names = ("doc_start", "doc_end", "block_start", "block_end")
        return Spans(*(getattr(self, n).to(device, non_blocking=True) for n in names), self.noisy, self.first)

    def dense_mask(self):
        """(B, S, S) bool, True where a query (dim 1) sees a key (dim 2): the reference, quadratic in memory."""
        T = self.doc_start.shape[1]
        clean = self.sees(0, T, torch.arange(0, T), torch.arange(0))
        if not self.noisy:
            return clean
        noisy = self.sees(0, T, torch.arange(0, T), torch.arange(0, T), noisy=True)
        noisy = torch.cat([noisy[..., T:], noisy[..., :T]], -1)  # its noisy keys come first, as xt does
        return torch.cat([noisy, F.pad(clean, (T, 0))], 1)

    def sees(self, a, b, clean_keys, noisy_keys, noisy=False):
        """(B, b - a, keys) bool: which of these keys, clean ones first, queries a..b see. noisy: of xt, not x0."""
        doc_start, block_start, block_end = (x[:, a:b, None] for x in (self.doc_start, self.block_start, self.block_end))
        c, n = clean_keys.to(doc_start.device), noisy_keys.to(doc_start.device)
        on_clean = (c >= doc_start) & (c < (block_start if noisy else block_end))
        on_noisy = (n >= block_start) & (n < block_end)
        return torch.cat([on_clean, on_noisy], -1) if noisy else on_clean

    @cached_property
    def tiles(self):
        """What `tiled_attention` visits, worked out once a batch and used by every layer.

        A list of (first query, last query + 1, clean keys, noisy keys, mask): the keys are (from, to) of what any query
        of the tile sees in any row, mask is (B, 1, queries, keys) bool, or None where all of them are seen. Queries and
        noisy keys count in xt where `noisy`, whose tiles come first; clean queries then follow at T.
        """
        def span(low, high):
            low, high = int(low.min()), int(high.max())
            return low, max(low, high)

        T, tiles = self.doc_start.shape[1], []
        for noisy in ((True, False) if self.noisy else (False,)):
            for a in range(0, T, TILE):
                b = min(a + TILE, T)
                doc_start, block_start, block_end = (x[:, a:b] for x in (self.doc_start, self.block_start, self.block_end))
                clean = span(doc_start, block_start if noisy else block_end)
                own = span(block_start, block_end) if noisy else (0, 0)
                mask = self.sees(a, b, torch.arange(*clean), torch.arange(*own), noisy)[:, None]
                shift = T if self.noisy and not noisy else 0
                tiles.append((a + shift, b + shift, clean, own, None if mask.all() else mask))
        return tiles


def attention(q, k, v, spans):
    """Softmax attention of every query over the keys its span names, scaled by 1/√head_dim.

    q: (B, n_head, S, head_dim); k, v: (B, n_kv_head, S', head_dim), n_kv_head dividing n_head (GQA).
    S = S' = T, or 2T as [xt ; x0] where spans.noisy. Against a KV cache S' may be more than S: the spans of the
    S queries then count positions among the S' keys.
    Returns (B, n_head, S, head_dim). A query that sees no key gets zeros.
    """
    return tiled_attention(q, k, v, spans)


@torch.compiler.disable  # the tiles follow the documents of the batch: traced, every packing would recompile
def tiled_attention(q, k, v, spans):
    """`attention` in plain PyTorch: each tile of queries meets only the keys that it can see."""
    T = spans.doc_start.shape[1]
    (k_noisy, k_clean), (v_noisy, v_clean) = ((x[:, :, :T], x[:, :, T:]) if spans.noisy else (x[:, :, :0], x)
                                              for x in (k, v))
    out = []
    for a, b, clean, own, mask in spans.tiles:
        keys, values = k_clean[:, :, slice(*clean)], v_clean[:, :, slice(*clean)]
        if own[1] > own[0]:
            keys = torch.cat([keys, k_noisy[:, :, slice(*own)]], 2)
            values = torch.cat([values, v_noisy[:, :, slice(*own)]], 2)
        out.append(grouped_attention(q[:, :, a:b], keys, values, mask))
    return torch.cat(out, 2)  # (B, n_head, S, head_dim)


def grouped_attention(q, k, v, mask):
    """SDPA where n_head / n_kv_head queries share a key: the group becomes more query rows, so K and V stay as they are.

    q: (B, n_head, Q, head_dim). k, v: (B, n_kv_head, L, head_dim). mask: (B, 1, Q, L) bool or None.
    """
    B, n_head, Q, head_dim = q.shape
    group = n_head // k.shape[1]
    if k.shape[2] == 0:
        return q * 0
    mask = mask if mask is None else mask.repeat(1, 1, group, 1)  # (B, 1, group·Q, L)
    out = F.scaled_dot_product_attention(q.reshape(B, -1, group * Q, head_dim), k, v, attn_mask=mask)
    return out.view(B, n_head, Q, head_dim)
