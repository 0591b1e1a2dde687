"""How big, how fast, before it runs: parameters, FLOPs, hours, and the memory of every process.

    python plan.py config/8b.py --ranks=64     # the same as python train.py config/8b.py --dry_run=true --ranks=64

Memory is the story of a step, and its peak the fullest moment. On GPUs, under FSDP2 (parallel.py), with N weights in L blocks
of b and a root group of r (embedding, head, last norm), cut among R processes (`shard_ranks`, or all), a process holds:

    term                   bytes                              from when to when
    weights                4 · N/R                            always; R equal numbers of rows, the last ones padding
    optimizer              8 · N/R                            always; Adafactor: 4 · (rows/R + columns) of each matrix
    gradients              4 · N/R                            block by block from the last one on, until the update
    summed gradients       4 · N                              of the micro-batches before the last, without `reduce_each`: FSDP2
                                                              keeps whole, in float32, what it has not yet exchanged
    gradients on their way e · b, 4 · b                       as computed, and the float32 copy that is being exchanged; the
                                                              root's at the end: its head's from the loss on
    gathered weights       e · (r + 2b)                       the root's; a block and the next one, fetched early;
                                                              e · N without `reshard`, e · (r + b) if R = 1
    activations, a token   e · (4d + 2q + 2kv + 4f) + 4h + 8  of each block, recompute=none (saved_a_token lists them)
                           e · (3d + 2q + 2kv + 2f) + 4h      selective: the products' and attention's outputs
                           e · d                              full: the block's input
    work, a token          e · (d + 2f)                       gradients of activations, and what recompute computes again
    loss                   12 · logits, or 3e · head          of a chunk, LOGITS_AT_ONCE: log-probabilities and two gradients;
                                                              or, if that is more, gradients of the head being added up

e: bytes of a number in `dtype`, 2 in bfloat16. d, f: d_model, d_ff. q, kv: width of all query, all key heads. h: n_head.
All tokens are taken to be masked: where few documents share a micro-batch, that comes about.

Not covered: the network's speed; memory outside PyTorch's tensors (CUDA itself, NCCL's buffers) and lost between them: leave
a tenth free; torch.compile, which saves other activations; processes without FSDP (a CPU alone).
"""
import os
import runpy
import sys
from dataclasses import fields, replace
from itertools import product
from math import prod
from pathlib import Path

import torch

import huggingface
import model
from diffusion import Recipe, spans_for
from huggingface import load_tokenizer

# dense bfloat16 peak of a device, in TFLOP/s, by a part of its name (the makers' data sheets, without sparsity)
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}


def positions(cfg):
    """Tokens that a step runs through the blocks: block diffusion reads [xt ; x0], 2T a row."""
    return cfg.batch_tokens * (2 if cfg.objective == "block" else 1)


def step_flops(model_cfg, positions, scored, pairs):
    """FLOPs of a step, forward and backward, as MFU counts them: recomputed activations are not work done.

    A product of (m, k) and (k, n) takes 2mkn; the backward pass takes two of them for each one forward. So, a step,

        6 · positions · weights of the blocks' matrices      every token passes every block
        6 · scored · d_model · vocab_size                    the head sees the scored tokens alone
        12 · pairs · n_layer · n_head · head_dim             QKᵀ and PV, for the pairs that the mask lets through

    positions, scored, pairs: of the global batch. pairs: a head and layer, see Spans.pairs.
    """
    c = model_cfg
    block = c.d_model * c.head_dim * (2 * c.n_head + 2 * c.n_kv_head) + 3 * c.d_model * c.d_ff
    return (6 * positions * c.n_layer * block + 6 * scored * c.d_model * c.vocab_size
            + 12 * pairs * c.n_layer * c.n_head * c.head_dim)


def peak_flops(device):
    """The device's peak in FLOP/s, or None where it is not known. device: a torch.device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device):
    """Most memory that this process has held at a time, in bytes: the GPU's tensors, or on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mask_rate(cfg):
    """Share of the maskable tokens that are masked, on average, once the noise's warmup is over. `strategies` are left out.

    With t uniform on (0, 1] and n tokens a block (a row, where a document is one block):

        uniform     E max(t, t_min)                                      = (1 + t_min²) / 2
        count       E ⌈nt⌉ / n                                           = (1 + 1/n) / 2
        clipped     E u + E (1 - u)ⁿ / n,  u = max(t, 1/n)               = (1 + 1/n²) / 2 + ((1-1/n)ⁿ + (1-1/n)ⁿ⁺¹ n/(n+1)) / n²

    the last one since a block that would have no mask, (1 - u)ⁿ, gets one.
    """
    n = cfg.block_size if cfg.objective == "block" else cfg.context
    if cfg.objective == "ar":
        return 1.0
    if cfg.schedule == "uniform":
        return (1 + cfg.t_min**2) / 2
    if cfg.schedule == "count":
        return (1 + 1 / n) / 2
    return (1 + 1 / n**2) / 2 + ((1 - 1 / n) ** n + (1 - 1 / n) ** (n + 1) * n / (n + 1)) / n**2


def row_pairs(cfg):
    """Query-key pairs of a row that is one document, a head: what more documents a row make fewer."""
    recipe = Recipe(**{f.name: getattr(cfg, f.name) for f in fields(Recipe) if hasattr(cfg, f.name)}, mask_id=0, pad_id=0)
    zero = torch.zeros(1, cfg.context, dtype=torch.int32)
    return spans_for(recipe, zero, zero + cfg.context).pairs


# --- memory -------------------------------------------------------------------------------------------------------

def weight_shapes(model_cfg):
    """Shapes of the weights of FSDP's groups: (the root's, a block's)."""
    with torch.device("meta"):
        one = model.Transformer(replace(model_cfg, n_layer=1))
    shapes = {name: tuple(p.shape) for name, p in one.named_parameters()}
    return ([s for name, s in shapes.items() if not name.startswith("layers.")],
            [s for name, s in shapes.items() if name.startswith("layers.")])


def numel(shapes, sharers=1):
    """Numbers that each of `sharers` processes holds of these weights: its rows, rounded up."""
    return sum(-(-s[0] // sharers) * prod(s[1:]) for s in shapes)


def optimizer_bytes(shapes, sharers, optimizer):
    """Of the first process, which has most rows. AdamW: both moments, a step count a weight. Adafactor: see parallel.py."""
    if optimizer == "adamw":
        return 8 * numel(shapes, sharers) + 4 * len(shapes)
    return sum(4 * (-(-s[0] // sharers) + (s[1] if len(s) == 2 else 0)) + 4 for s in shapes)


def saved_a_token(model_cfg, e, recompute):
    """Activations of a block, in bytes a position: (kept from forward to backward, computed again in the backward pass).

    e: bytes of a number. Norms save their input and, in float32, 1/rms; attention its log-sum-exp. `selective` keeps the
    output of every product, also where none of this needs it (o, down).
    """
    c = model_cfg
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    turned = q + kv  # q and k after their rotation
    norms = e * (q + kv) + 4 * (c.n_head + c.n_kv_head) if c.qk_norm else 0  # q and k before theirs
    everything = (e * 2 * c.d_model + 4  # input; normalised, for q, k, v
                  + norms + e * (turned + kv + q) + 4 * c.n_head  # q, k, v, attention's output, log-sum-exp
                  + e * 2 * c.d_model + 4  # input and attention; normalised, for gate and up
                  + e * 4 * c.d_ff)  # gate; silu(gate), up; their product, for down
    if recompute == "none":
        return everything, 0
    if recompute == "full":
        return e * c.d_model, everything - e * c.d_model
    return e * (3 * c.d_model + 2 * q + 2 * kv + 2 * c.d_ff) + 4 * c.n_head, e * (3 * c.d_model + turned + 2 * c.d_ff) + 8


def number_bytes(cfg):
    return 4 if cfg.dtype == "float32" else 2  # auto is bfloat16 on GPUs


def activation_bytes(model_cfg, cfg, rows):
    """Of a micro-batch of `rows`: (kept by a block, computed again in a block, kept outside the blocks)."""
    e, tokens, n = number_bytes(cfg), rows * cfg.context, rows * cfg.context * positions(cfg) // cfg.batch_tokens
    kept, again = saved_a_token(model_cfg, e, cfg.recompute)
    spans = 16 * tokens  # stacked for the kernel, in each block
    rest = (n * (8 + 4 * model_cfg.head_dim + e * model_cfg.d_model + 4)  # ids, angles, the last norm's input
            + tokens * (30 + 8 + e * model_cfg.d_model))  # the batch; where the loss reads, and what
    return (n * kept + spans, n * again, rest) if cfg.recompute == "none" else (n * kept, n * again + spans, rest)


def memory(model_cfg, cfg, ranks):
    """Bytes of the fullest of `ranks` processes, {moment of a step: {term: bytes}}; see the table at the top of this file."""
    c, L, e = model_cfg, model_cfg.n_layer, number_bytes(cfg)
    root, block = weight_shapes(c)
    whole, r, b, head = root + L * block, numel(root), numel(block), c.vocab_size * c.d_model
    sharers = cfg.shard_ranks or ranks
    rows = cfg.batch_tokens // cfg.context // ranks
    micro = min(cfg.micro_batch, rows)
    several, summing = rows > micro, rows > micro and not cfg.reduce_each
    kept, again, rest = activation_bytes(c, cfg, micro)
    n = micro * cfg.context * positions(cfg) // cfg.batch_tokens
    chunk = max(1, model.LOGITS_AT_ONCE // c.vocab_size)
    chunks, logits = -(-micro * cfg.context // chunk), min(chunk, micro * cfg.context) * c.vocab_size

    def at(left, on_their_way, gathered, blocks, **more):
        """left: blocks whose gradients are still to come. blocks: those whose activations are still there."""
        done = whole if several and cfg.reduce_each else (L - left) * block
        return {"weights": 4 * numel(whole, sharers), "optimizer": optimizer_bytes(whole, sharers, cfg.optimizer),
                "gradients": 4 * numel(done, sharers), "summed gradients": summing * 4 * (r + left * b),
                "gradients on their way": on_their_way, "gathered weights": e * gathered,
                "activations": blocks * kept + rest * (left > 0)} | more

    def gathered(i):  # during the backward pass of block i
        return r + b * (i if not cfg.reshard else min(i, 1 if sharers == 1 else 2))

    def inside(i):  # block i, while the gradients of the one before are exchanged
        return at(i, e * (head + c.d_model * c.d_ff) + 4 * b * (i < L), gathered(i), i,
                  work=again + n * e * (c.d_model + 2 * c.d_ff))

    def end_of(i):  # its gradients are there; summed ones take them in before they are copied
        return at(i, e * head + (4 if summing else e + 4) * b, gathered(i - 1), i - 1, work=n * e * c.d_model)

    def fullest(moment):  # of all blocks: from the second on, it goes in a straight line
        return max({L, max(L - 1, 1), 1}, key=lambda i: sum(moment(i).values()))

    i, j = fullest(inside), fullest(end_of)
    # PyTorch adds the first two gradients of a weight into a third tensor, the others in place
    loss = max(12 * logits + e * head * (chunks > 1), e * logits + e * head * (3 if chunks > 1 else 1))
    heads = 3 if c.tie_embeddings and chunks == 1 else 2  # of the head and of the embedding
    left_over = e * head * (not c.tie_embeddings and sharers > 1)  # a reference that FSDP2 drops late
    temporary = 16 * max(numel([s], sharers) for s in whole) * (cfg.optimizer == "adafactor")  # of the update of one weight
    return {"loss": at(L, 0, r + b * L * (not cfg.reshard), L, loss=loss),
            f"in block {i}": inside(i),
            f"end of {j}": end_of(j),
            "embedding": at(0, e * heads * head + 4 * b, r, 0, work=n * e * c.d_model),
            "exchange": at(0, 4 * r + (0 if summing else max(e * r, left_over + 4 * numel(root, sharers))), 0, 0),
            "update": at(0, 0, 0, 0, work=temporary) | {"gradients": 4 * numel(whole, sharers), "summed gradients": 0}}


def peak(moments):
    return max(sum(terms.values()) for terms in moments.values())


def nearest(model_cfg, cfg, ranks):
    """What to change so that it fits: ({setting: value}, bytes), the fewest changes and then the cheapest; or None.

    Smaller micro-batches and `reduce_each` cost traffic, full recomputation a third of the FLOPs, more processes most.
    """
    rows, modes, found = cfg.batch_tokens // cfg.context, ["none", "selective", "full"], []
    for more, all_share, mode, each, reshard, halvings in product(
            [n for n in range(ranks, rows + 1, ranks) if rows % n == 0], {False, cfg.shard_ranks > 0},
            modes[modes.index(cfg.recompute):], {cfg.reduce_each, True}, {cfg.reshard, True},
            range(cfg.micro_batch.bit_length())):
        new = {"recompute": mode, "micro_batch": cfg.micro_batch >> halvings, "reduce_each": each, "reshard": reshard,
               "shard_ranks": 0 if all_share else cfg.shard_ranks}
        changed = {k: v for k, v in new.items() if v != getattr(cfg, k)}
        found.append(((more, len(changed), mode == "full", all_share, each, halvings), changed))
    for (more, *_), changed in sorted(found, key=lambda one: one[0]):
        needs = peak(memory(model_cfg, replace(cfg, **changed), more))
        if needs <= cfg.gpu_memory * 1e9:
            return changed | ({"ranks": more} if more > ranks else {}), needs
    return None


# --- the plan -----------------------------------------------------------------------------------------------------

def sizes(cfg):
    """The run's ModelConfig: from the folder that it starts from, where that is here, or from the settings."""
    folder = {"scratch": None, "resume": cfg.out}.get(cfg.init_from, cfg.init_from)
    if folder and Path(folder).is_dir():
        return huggingface.read_description(huggingface.find(folder), cfg.mask_token, cfg.bos_token, objective="ar")[0]
    if folder:
        print(f"{folder} is not here: planned with the sizes that the settings give")
    names = {f.name: getattr(cfg, f.name) for f in fields(model.ModelConfig)}
    if not cfg.vocab_size:
        try:
            names["vocab_size"] = load_tokenizer(cfg.data, cfg.bos_token, cfg.mask_token).vocab_size
        except FileNotFoundError as error:
            raise ValueError(f"vocab_size=0 is the tokenizer's in {cfg.data}, and there is none; give --vocab_size") from error
    return model.ModelConfig(**names)


def check(cfg, ranks, rows_of):
    """Raises ValueError where the processes cannot share the work."""
    for name in ("mfu", "gpu_memory"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must be above 0")
    if ranks % (cfg.shard_ranks or ranks):
        near = min((n for n in range(1, ranks + 1) if ranks % n == 0), key=lambda n: abs(n - cfg.shard_ranks))
        raise ValueError(f"shard_ranks={cfg.shard_ranks} must divide the number of processes, {ranks}, as {near} does")
    rows_of(0, ranks, cfg)


def show(cfg, rows_of):
    """Print the plan of a run. cfg, rows_of: train.py's settings, and how it deals out rows.

    Raises ValueError, after the table, where it does not fit: the sentence names the nearest settings that do.
    """
    if os.environ.get("RANK", "0") != "0":  # under torchrun once is enough
        return
    ranks = cfg.ranks or int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, ranks, rows_of)
    c = sizes(cfg)
    root, block = weight_shapes(c)
    rows, total = cfg.batch_tokens // cfg.context, numel(root) + c.n_layer * numel(block)
    micro = min(cfg.micro_batch, rows // ranks)
    head, rate, pairs = c.vocab_size * c.d_model, mask_rate(cfg), rows * row_pairs(cfg)
    flops = step_flops(c, positions(cfg), rate * cfg.batch_tokens, pairs)
    one = (cfg.peak_tflops or PEAK_TFLOPS["H100"]) * 1e12
    seconds = flops / (one * ranks * cfg.mfu)
    device = f"{one / 1e12:g} TFLOP/s" + ("" if cfg.peak_tflops else " (an H100; --peak_tflops for others)")
    print(f"""parameters    {total:,}: embedding {head:,}, {c.n_layer} blocks of {numel(block):,}, {
        'the head is the embedding' if c.tie_embeddings else f'head {head:,}'}, last norm {c.d_model:,}
a step        {rows:,} rows of {cfg.context:,}: {cfg.batch_tokens:,} tokens, {positions(cfg):,} positions in the blocks
a process     rows: {rows // ranks:,}, {micro} at a time (micro-batches: {-(-rows // ranks // micro)}); {ranks:,} processes
scored        {rate:.1%} of the tokens, on average, once the noise's warmup is over
FLOPs         {flops:.3e} a step; attention is {12 * pairs * c.n_layer * c.n_head * c.head_dim / flops:.0%} where each row is {
        ''}one document, the most it can be; 6 · parameters · tokens is {6 * total * cfg.batch_tokens:.3e}
the run       {cfg.max_steps:,} steps, {cfg.max_steps * cfg.batch_tokens:.3e} tokens, {cfg.max_steps * flops:.3e} FLOPs
time          {seconds:.2f} s a step, {cfg.batch_tokens / seconds:,.0f} tokens/s, {cfg.max_steps * seconds / 3600:,.1f} hours, {
        cfg.max_steps * seconds / 3600 * ranks:,.0f} GPU hours
              at an MFU of {cfg.mfu:g} of {device}
""")
    moments = memory(c, cfg, ranks)
    print_table(moments, f"GB, recompute={cfg.recompute}" + (", eager" if cfg.compile else ""))
    most = peak(moments)
    if most <= cfg.gpu_memory * 1e9:
        print(f"\npeak {most / 1e9:.1f} GB of gpu_memory={cfg.gpu_memory:g}")
        return
    fits = nearest(c, cfg, ranks)
    advice = "no recompute, micro_batch or number of ranks makes it fit" if fits is None else (
        " ".join(f"--{k}={str(v).lower()}" for k, v in fits[0].items()) + f" needs {fits[1] / 1e9:.1f} GB")
    raise ValueError(f"peak {most / 1e9:.1f} GB exceeds gpu_memory={cfg.gpu_memory:g}: {advice}")


def print_table(moments, title):
    """Terms by moments, in GB (10⁹ bytes)."""
    print(f"{title:<32}" + "".join(f"{name:>13}" for name in moments))
    for term in dict.fromkeys(term for terms in moments.values() for term in terms):
        print(f"{term:<32}" + "".join(f"{terms.get(term, 0) / 1e9:>13.2f}" for terms in moments.values()))
    print(f"{'sum':<32}" + "".join(f"{sum(terms.values()) / 1e9:>13.2f}" for terms in moments.values()))


if __name__ == "__main__":
    # train.py owns the settings and their checks: it runs with these, plans, and stops
    sys.argv = ["plan.py", *sys.argv[1:], "--dry_run=true"]
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
