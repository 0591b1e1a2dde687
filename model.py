"""The transformer: Llama, Qwen2 and Qwen3 by configuration; its KV cache; its vocabulary loss.

    tokens (B, S) --embed_tokens--> (B, S, d_model) --n_layer blocks--> hidden (B, S, d_model) --lm_head--> logits

A block is attention over the spans (attention_kernel.py) and a SwiGLU MLP, each behind an RMSNorm and added to the
residual stream. Nothing here knows about noise: what the model predicts, and where, is diffusion.py's.
Modules carry Hugging Face's names, so a checkpoint's tensors need no translation.

Not covered: dropout, mixture of experts, scaled RoPE variants.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from attention_kernel import attention

LOGITS_AT_ONCE = 2**26  # 256 MB in float32: the most logits that the loss ever holds


@dataclass
class ModelConfig:
    vocab_size: int
    d_model: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_ff: int
    context: int  # longest sequence, in tokens
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    tie_embeddings: bool = True

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_ff", "context")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}: "
                             "each key/value head serves the same number of query heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE turns pairs of channels")
        if self.qkv_bias and self.qk_norm:
            raise ValueError("qkv_bias (Qwen2) and qk_norm (Qwen3) exclude each other: no published family has both")


def rope_angles(positions, head_dim, theta):
    """cos and sin of every position's rotations (RoFormer §3.2.2). positions: (B, S), counted in the token's document.

    Returns two (B, 1, S, head_dim/2) float32: channel pair c turns by position · theta^(-2c / head_dim).
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[:, None, :, None].float() * theta ** (-pairs / head_dim)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (B, heads, S, head_dim) turned by its position's angles, channel c paired with c + head_dim/2 as in Llama."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


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

    def forward(self, x, spans, angles, cached):
        B, S, _ = x.shape
        q, k, v = (proj(x).view(B, S, -1, self.cfg.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, S, head_dim)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cached is not None:
            k, v = cached(k, v)  # (B, n_kv_head, cache length + S, head_dim)
        out = attention(q, k, v, spans)
        return self.o_proj(out.transpose(1, 2).reshape(B, S, -1))


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

    def forward(self, x, spans, angles, cached=None):
        x = x + self.self_attn(self.input_layernorm(x), spans, angles, cached)
        return x + self.mlp(self.post_attention_layernorm(x))


def my_rows(p):
    """A weight as this process holds it: (tensor, slice), its own rows and which ones of the whole they are.

    FSDP splits dimension 0 into equal chunks, the last ones short or empty; a weight that is not sharded is whole.
    """
    if not isinstance(p, DTensor):
        return p, slice(0, p.shape[0])
    split = [isinstance(placement, Shard) for placement in p.placements].index(True)
    chunk = -(-p.shape[0] // p.device_mesh.size(split))
    first = min(p.device_mesh.get_local_rank(split) * chunk, p.shape[0])
    return p.to_local(), slice(first, first + p.to_local().shape[0])


class Transformer(nn.Module):
    """cfg: a ModelConfig. `model(tokens, spans)` gives hidden states; `model.logits` and `model.token_loss` read them."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02), the two projections into the residual stream smaller by √(2·n_layer) (GPT-2 §2.3).

        Each process draws every weight whole, one at a time, and keeps its own rows: the same model however it is sharded.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * self.cfg.n_layer) ** 0.5 if into_residual else 0.02
                whole = torch.empty(p.shape).normal_(std=std)
            else:
                whole = torch.zeros(p.shape) if name.endswith("bias") else torch.ones(p.shape)
            mine, rows = my_rows(p)
            mine.copy_(whole[rows])

    def forward(self, tokens, spans, cache=None):
        """Hidden states after the final norm.

        tokens: (B, S) int64. spans: Spans of these S positions. cache: a KVCache whose first `cache.length` positions
        come before them; theirs are written behind. Returns (B, S, d_model).
        """
        angles = rope_angles(spans.positions, self.cfg.head_dim, self.cfg.rope_theta)
        x = self.embed_tokens(tokens)  # (B, S, d_model)
        for i, layer in enumerate(self.layers):
            x = layer(x, spans, angles, cache and cache.of_layer(i))
        return self.norm(x)

    @property
    def head(self):
        """The matrix that projects on the vocabulary, (vocab_size, d_model)."""
        return (self.embed_tokens if self.cfg.tie_embeddings else self.lm_head).weight

    def logits(self, hidden):
        """hidden (..., d_model) -> (..., vocab_size) float32."""
        return F.linear(hidden, self.head).float()

    def token_loss(self, hidden, targets):
        """Cross entropy of each position, in nats, without ever holding all logits.

        hidden: (N, d_model), the scored positions alone. targets: (N,) int64. Returns (N,) float32.
        A chunk of positions at a time is projected on the vocabulary, and once more in the backward pass.
        """
        chunk = max(1, LOGITS_AT_ONCE // self.cfg.vocab_size)

        def of_chunk(h, y):
            return F.cross_entropy(self.logits(h), y, reduction="none")

        if len(targets) <= chunk:
            return of_chunk(hidden, targets)
        return torch.cat([checkpoint(of_chunk, h, y, use_reentrant=False)
                          for h, y in zip(hidden.split(chunk), targets.split(chunk))])


class KVCache:
    """Keys and values of the tokens decoded so far, for every layer, in buffers of a fixed size.

    A forward of S tokens writes theirs at [length, length + S) and attends to all before. The caller then moves
    `length` over those that will not change; the rest are overwritten by the next forward.
    """

    def __init__(self, cfg, batch, size):
        self.shape = (cfg.n_layer, batch, cfg.n_kv_head, size, cfg.head_dim)
        self.k = self.v = None  # made by the first forward, which knows device and dtype
        self.length = 0

    def of_layer(self, i):
        """A function (k, v) of S new tokens -> (k, v) of all tokens up to and with them."""
        def extend(k, v):
            if self.k is None:
                self.k, self.v = k.new_empty(self.shape), v.new_empty(self.shape)
            end = self.length + k.shape[2]
            self.k[i, :, :, self.length:end], self.v[i, :, :, self.length:end] = k, v
            return self.k[i, :, :, :end], self.v[i, :, :, :end]
        return extend
