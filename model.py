"""The transformer: Llama, Qwen2 and Qwen3 by configuration; its KV cache; its vocabulary loss.

    tokens (B, S) --embed_tokens--> (B, S, d_model) --n_layer blocks--> hidden --lm_head--> logits

A block is attention over the spans (attention_kernel.py) and a SwiGLU MLP, each behind an RMSNorm
and added to the residual stream. Nothing here knows about noise: what the model predicts, and
where, is the concern of diffusion.py. Modules carry Hugging Face's names, so that a checkpoint's
tensors need no translation.

Not covered: many processes (parallel.py), dropout, mixture of experts, scaled RoPE variants.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention_kernel import attention
from configurator import Float, Int, Mistake, check_fields
from spans import CacheSpans

LOGITS_AT_ONCE = 2**26  # 256 MB: float32 logits of one chunk of the loss


@dataclass
class ModelConfig:
    vocab_size: Int(1, 2**24)
    d_model: Int(1, 2**17)
    n_layer: Int(1, 1000)
    n_head: Int(1, 1024)
    n_kv_head: Int(1, 1024)
    head_dim: Int(2, 1024)
    d_ff: Int(1, 2**20)
    context: Int(1, 2**24)  # longest sequence, in tokens
    rope_theta: Float(1, 1e12) = 1e6
    norm_eps: Float(1e-12, 1) = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool = True

    def __post_init__(self):
        check_fields(self)
        if self.n_head % self.n_kv_head:
            raise Mistake(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}: "
                          "each key/value head serves the same number of query heads")
        if self.head_dim % 2:
            raise Mistake(f"head_dim={self.head_dim} must be even: RoPE rotates pairs of channels")
        if self.qkv_bias and self.qk_norm:
            raise Mistake("qkv_bias (Qwen2) and qk_norm (Qwen3) exclude each other: "
                          "no published family has both")


def rope_angles(positions, head_dim, theta):
    """cos and sin of every position's rotations (RoFormer §3.2.2).

    positions: (B, S), counted in the token's document.
    Returns two (B, 1, S, head_dim/2) float32: pair c of channels rotates by
    position · theta^(-2c / head_dim).
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None, :, None].float() * theta ** (-pairs / head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, heads, S, head_dim) rotated; channel c is paired with c + head_dim/2, as in Llama."""
    a, b = at_least_float32(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        q_width, kv_width = cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        self.q_proj = nn.Linear(cfg.d_model, q_width, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(q_width, cfg.d_model, bias=False)
        if cfg.qk_norm:
            self.q_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)
            self.k_norm = nn.RMSNorm(cfg.head_dim, eps=cfg.norm_eps)

    def forward(self, x, spans, angles, cached=None, queries=None, read=None):
        q = self.heads(self.q_proj(x[:, :queries]))  # (B, n_head, queries or S, head_dim)
        k = self.heads(self.k_proj(x))  # (B, n_kv_head, S, head_dim)
        v = self.heads(self.v_proj(x))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        cos, sin = angles  # (B, 1, S, head_dim/2)
        q = rotate(q, cos[:, :, :queries], sin[:, :, :queries])
        k = rotate(k, cos, sin)
        if cached is not None:
            k, v = cached(k, v)  # (B, n_kv_head, S or the cache's slots, head_dim)
        out = attention(q, k, v, spans)  # (B, n_head, queries or S, head_dim)
        out = out.transpose(1, 2).flatten(2)  # (B, queries or S, n_head · head_dim)
        return self.o_proj(rows(out, read))

    def heads(self, x):
        """(B, S, heads · head_dim) -> (B, heads, S, head_dim)"""
        return x.unflatten(2, (-1, self.cfg.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, spans, angles, cached=None, queries=None, read=None):
        """x: (B, S, d_model). queries, read: see Transformer.forward; for the last block."""
        attended = self.self_attn(self.input_layernorm(x), spans, angles, cached, queries, read)
        x = rows(x[:, :queries], read) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


def rows(x, read):
    """The (N, d) rows of x (B, S, d) that `read` (N,) names, as row · S + position; None: x."""
    return x if read is None else x.flatten(0, 1).index_select(0, read)


class Transformer(nn.Module):
    """cfg: a ModelConfig.

    `model(tokens, spans)` gives hidden states; `model.logits` and `model.token_loss` read them.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # not nn.Embedding(…): it draws weights, and on the meta device that imports torch._dynamo
        nothing_yet = torch.empty(cfg.vocab_size, cfg.d_model)
        self.embed_tokens = nn.Embedding.from_pretrained(nothing_yet, freeze=False)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw all weights anew, in order; on the meta device there is nothing to draw."""
        if self.head.is_meta:
            return
        for name, p in self.named_parameters():
            p.copy_(self.first_weight(name, p.shape))

    def first_weight(self, name, shape):
        """A weight before training, on the CPU: Normal(0, 0.02), smaller by √(2·n_layer) where it
        projects into the residual stream (GPT-2 §2.3). Norms are 1, biases 0."""
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        std = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * self.cfg.n_layer) ** 0.5
        return torch.empty(shape).normal_(std=std)

    def forward(self, tokens, spans, cache=None, slots=None, queries=None, read=None):
        """Hidden states after the final norm.

        tokens: (B, S) int64. spans: Spans of these S tokens, or CacheSpans.
        cache: a KVCache that takes their keys and values, at `slots` (B, S) int64. With Spans the
        tokens see each other alone, with CacheSpans they see the cache, themselves included; where
        there is none, its slots are these tokens.
        The last block can skip positions that nobody reads:
        queries: int, only the first `queries` positions of each row (the noisy half); None: all.
        read: (N,) int64, of those only the ones listed, as row · queries + position.
        Returns (B, S, d_model), or (N, d_model) where `read` is given.
        """
        angles = rope_angles(spans.positions, self.cfg.head_dim, self.cfg.rope_theta)
        x = self.embed_tokens(tokens)  # (B, S, d_model)
        for i, layer in enumerate(self.layers):
            cached = None
            if cache is not None:
                cached = partial(cache.extend, i, slots, isinstance(spans, CacheSpans))
            if i < len(self.layers) - 1:
                x = layer(x, spans, angles, cached)
            else:
                x = layer(x, spans, angles, cached, queries, read)
        return self.norm(x)

    @property
    def head(self):
        """The matrix that projects on the vocabulary, (vocab_size, d_model)."""
        return (self.embed_tokens if self.cfg.tie_embeddings else self.lm_head).weight

    def logits(self, hidden):
        """hidden (..., d_model) -> (..., vocab_size) float32; float64 where the weights are."""
        return at_least_float32(F.linear(hidden, self.head))

    def token_loss(self, hidden, targets, temperature=1.0, banned=None):
        """Cross entropy of each position, in nats, without ever holding all logits.

        hidden: (N, d_model), the scored positions alone. targets: (N,) int64. Returns (N,) float32.
        A chunk of positions at a time is projected on the vocabulary, once more in the backward.
        As decoding samples: the logits are divided by `temperature`, and `banned`, (n,) int64, are
        ids that are never chosen, so no target is one of them.
        """
        chunk = max(1, LOGITS_AT_ONCE // self.cfg.vocab_size)

        def loss_of(h, y):
            logits = self.logits(h)
            if temperature != 1:
                logits = logits / temperature
            if banned is not None:
                logits = logits.index_fill(-1, banned, -torch.inf)
            return F.cross_entropy(logits, y, reduction="none")

        if len(targets) <= chunk:
            return loss_of(hidden, targets)
        chunks = zip(hidden.split(chunk), targets.split(chunk))
        return torch.cat([checkpoint(loss_of, h, y, use_reentrant=False) for h, y in chunks])


class KVCache:
    """Keys and values for every layer, in a fixed number of slots that are overwritten in place.

    Which slots a forward writes, and which ones its queries see, is up to the caller.
    """

    def __init__(self, model, batch, slots):
        cfg = model.cfg
        self.slots = slots
        shape = (cfg.n_layer, batch, cfg.n_kv_head, slots, cfg.head_dim)
        weight = model.embed_tokens.weight
        dtype = weight.dtype
        autocasts = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
        if autocasts:  # keys and values are products
            dtype = torch.get_autocast_dtype(weight.device.type)
        # zeros, since a masked slot has weight 0 in attention, and 0 times NaN is NaN
        self.k = weight.new_zeros(shape, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    def extend(self, layer, slots, seen, k, v):
        """Write k, v (B, n_kv_head, S, head_dim) of S new tokens at `slots` (B, S).

        Returns the keys and values that the tokens see: the whole cache if `seen`, else k and v.
        """
        at = slots[:, None, :, None].expand_as(k)
        self.k[layer].scatter_(2, at, k)
        self.v[layer].scatter_(2, at, v)
        if seen:
            return self.k[layer], self.v[layer]
        return k, v

    def keep(self, rows):
        """Drop all rows of the batch but these, (b,) int64."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


# --- where it runs -------------------------------------------------------------------------------

def pick_device(asked):
    """'cuda', 'mps' or 'cpu': the one asked for, or under 'auto' the first that is available.

    Raises Mistake if it is not available.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if asked == "auto":
        return available[0]
    if asked not in available:
        raise Mistake(f"device={asked!r} is not available here; --device={available[0]} is")
    return asked


def fast_dtype(device):
    """'bfloat16' where the device ('cuda', 'mps' or 'cpu') multiplies it fast, else 'float32'."""
    fast = False
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"
