"""How big and how fast, before it runs: parameters, FLOPs, hours, and the memory of each process.

    python train.py config/8b.py --ranks=64 --dry_run=true

The memory plan follows one step on GPUs under FSDP2 (parallel.py); its peak is the fullest moment.
N weights, in L blocks of b and a root group of r (embedding, head, last norm), are cut among R
processes (`shard_ranks`, or all of them). Each process holds, in bytes:

    weights                4N/R         always; equally many rows on each, the last ones padding
    optimizer              8N/R         always; Adafactor: 4 (rows/R + columns) of each matrix
    gradients              4N/R         grow block by block, the last one first, until the update
    accumulated gradients  4N           of all micro-batches but the last, without `reduce_each`:
                                        FSDP2 keeps them whole, in float32, until it exchanges them
    gradients in transit   e·b + 4b     as computed, and the float32 copy that is exchanged; the
                                        root's at the end, its head's from the loss on
    gathered weights       e (r + 2b)   the root, a block, and the next one, fetched early;
                                        e·N without `reshard`, e (r + b) if R = 1
    activations                         see block_activations
    work                   e (d + 2f)   per position: gradients of activations; and what recompute
                                        computes again
    loss                   12 · logits  of a chunk (LOGITS_AT_ONCE): log-probabilities and two
                                        gradients; or 3e · head, its gradients being added up

e: bytes per number in `dtype`, 2 in bfloat16. d, f: d_model, d_ff. All tokens count as masked:
where a micro-batch holds few documents, that happens.

Not covered: the network's speed; memory outside PyTorch's tensors (CUDA itself, NCCL's buffers) and
fragmentation: leave a tenth free; what torch.compile saves instead; activations on CPUs.
"""
import os
import sys
from dataclasses import astuple, fields, replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path

import torch

import huggingface
import model
from configurator import Mistake
from diffusion import Recipe, spans_for

# Dense bfloat16 peak of a device in TFLOP/s, by a part of its name (data sheets, without sparsity).
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}


def positions(cfg):
    """Positions per step that pass through the blocks: [xt ; x0] is 2T per row under `block`."""
    return 2 * cfg.batch_tokens if cfg.objective == "block" else cfg.batch_tokens


def last_queries(cfg):
    """Positions per step that ask in the last block: under `block` only the noisy half is read."""
    return positions(cfg) if cfg.shift else cfg.batch_tokens


def step_flops(model_cfg, positions, scored, pairs, queries):
    """FLOPs of a step, forward and backward, as MFU counts them: recomputation is not counted.

    A product of (m, k) and (k, n) takes 2mkn, and twice that in the backward pass. So a step takes

        6 · positions · (Wq + Wk + Wv + Wo + MLP)                    each block but the last
        6 · (positions (Wk + Wv) + queries · Wq + scored (Wo + MLP))    the last block
        6 · scored · d_model · vocab_size                               the head
        12 · pairs · n_head · head_dim      QKᵀ and PV of a block; queries / positions of it are
                                            left in the last one

    positions, scored, pairs (see Spans.pairs), queries (see last_queries): of the global batch.
    """
    c = model_cfg
    width = c.n_head * c.head_dim
    wq = wo = c.d_model * width
    wk = wv = c.d_model * c.n_kv_head * c.head_dim
    mlp = 3 * c.d_model * c.d_ff
    blocks = (c.n_layer - 1) * positions * (wq + wk + wv + wo + mlp)
    last = positions * (wk + wv) + queries * wq + scored * (wo + mlp)
    head = scored * c.d_model * c.vocab_size
    # a noisy query has as many pairs as its clean twin
    all_pairs = (c.n_layer - 1) * pairs + pairs * queries // positions
    return 6 * (blocks + last + head) + 12 * all_pairs * width


def peak_flops(device):
    """The peak of a torch.device in FLOP/s, or None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(device):
    """Most memory this process has held, in bytes: a GPU's tensors, or on a CPU all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # Windows does not tell
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def mask_rate(cfg):
    """Expected share of the maskable tokens that are masked, after warmup, without `strategies`.

    t is uniform on (0, 1]; n is the tokens per block, or per row where a document is one block:

        uniform     E max(t, t_min)          = (1 + t_min²) / 2
        count       E ⌈nt⌉ / n               = (1 + 1/n) / 2
        clipped     E u + E (1 - u)ⁿ / n     u = max(t, 1/n); an empty block gets one mask
    """
    if cfg.objective == "ar":
        return 1.0
    if cfg.schedule == "uniform":
        return (1 + cfg.t_min**2) / 2
    n = cfg.block_size if cfg.objective == "block" else cfg.context
    if cfg.schedule == "count":
        return (1 + 1 / n) / 2
    rest = 1 - 1 / n
    return (1 + 1 / n**2) / 2 + (rest**n + rest ** (n + 1) * n / (n + 1)) / n**2


def row_pairs(cfg):
    """Query-key pairs per head of a row that is one document; more documents have fewer pairs."""
    zero = torch.zeros(1, cfg.context, dtype=torch.int32)
    return spans_for(Recipe.of(cfg, mask_id=0, pad_id=0), zero, zero + cfg.context).pairs


# --- memory: what the pieces take -----------------------------------------------------------------

def weight_shapes(model_cfg):
    """Shapes of the weights of FSDP's groups: (the root's, one block's)."""
    return shapes_of(astuple(replace(model_cfg, n_layer=1)))


@cache  # `nearest` asks hundreds of times
def shapes_of(sizes):
    """`weight_shapes` of a ModelConfig's values."""
    with torch.device("meta"):
        one_block = model.Transformer(model.ModelConfig(*sizes))
    root = [tuple(p.shape) for name, p in one_block.named_parameters() if "layers." not in name]
    return root, [tuple(p.shape) for p in one_block.layers.parameters()]


def numel(shapes, sharers=1):
    """Numbers in these weights that each of `sharers` processes holds: its rows, rounded up."""
    return sum(-(-s[0] // sharers) * prod(s[1:]) for s in shapes)


def optimizer_bytes(shapes, sharers, optimizer):
    """Optimizer state of the first process, which has the most rows."""
    if optimizer != "adafactor":  # two moments, and a step count per weight; Muon's is less
        return 8 * numel(shapes, sharers) + 4 * len(shapes)
    rows_and_columns = sum(-(-s[0] // sharers) + sum(s[1:]) for s in shapes)
    return 4 * rows_and_columns + 4 * len(shapes)


def block_activations(model_cfg, e, recompute, n, queries, read, copied=0):
    """A block's activations in bytes: (kept from forward to backward, computed again there).

    e: bytes per number. n: positions. queries: those with a query; read: those that go through o
    and the MLP; the last block has fewer of both. copied: bytes of what it copies to select them.
    Norms save their input and 1/rms in float32, attention its log-sum-exp. `selective` keeps the
    outputs of matrix products and attention, read or not.
    """
    c = model_cfg
    d, f = c.d_model, c.d_ff
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    entered = n * e * d
    normalized = n * (e * d + 4)
    rotated = e * (queries * q + n * kv)
    attended = queries * (e * q + 4 * c.n_head)  # and the log-sum-exp
    second_norm = read * (2 * e * d + 4)  # input plus attention; normalized, for gate and up
    mlp = read * e * 4 * f  # gate; silu(gate), up; their product, for down
    everything = entered + normalized + rotated + n * e * kv + attended + copied + second_norm + mlp
    if c.qk_norm:  # q and k before their norms
        everything += rotated + 4 * (queries * c.n_head + n * c.n_kv_head)
    if recompute == "none":
        return everything, 0
    if recompute == "full":
        return entered, everything - entered
    kept = entered + rotated + n * e * kv + attended + read * e * (2 * d + 2 * f)
    again = normalized + rotated + copied + second_norm + read * e * 2 * f
    return kept, again


def number_bytes(cfg):
    """Bytes per number of activations and gathered weights."""
    return 4 if cfg.dtype == "float32" else 2  # auto is bfloat16 on GPUs


def activation_bytes(model_cfg, cfg, rows):
    """Of a micro-batch of `rows`: a block's (kept, computed again), the last block's, and the bytes
    kept outside the blocks."""
    e, d, h = number_bytes(cfg), model_cfg.d_model, model_cfg.head_dim
    tokens = rows * cfg.context  # all of them are scored
    n = tokens * positions(cfg) // cfg.batch_tokens
    queries = tokens * last_queries(cfg) // cfg.batch_tokens
    copied = tokens * e * model_cfg.n_head * h  # of attention's output
    if queries < n and rows > 1:
        copied += queries * e * d  # of the normalized input, for q
    blocks = []
    for sizes_of_block in ((n, n, n), (n, queries, tokens, copied)):
        kept, again = block_activations(model_cfg, e, cfg.recompute, *sizes_of_block)
        spans = 16 * tokens  # stacked for the kernel
        blocks.append((kept + spans, 0) if cfg.recompute == "none" else (kept, again + spans))
    outside = n * (8 + 4 * h)  # ids, angles
    outside += tokens * (2 * e * d + 4)  # the last norm's input and output
    outside += tokens * (30 + 8)  # the batch; where the loss reads
    return *blocks, outside


# --- memory: the moments of a step ----------------------------------------------------------------

class Step:
    """One step of the fullest of `ranks` processes: sizes first, then its moments in order.

    A moment is {term: bytes}. Blocks count from 1; the backward pass goes from n_layer down to 1.
    """

    def __init__(self, model_cfg, cfg, ranks):
        self.cfg, self.model_cfg = cfg, model_cfg
        self.L, self.e = model_cfg.n_layer, number_bytes(cfg)
        self.sharers = cfg.shard_ranks or ranks
        # numbers in the root's, a block's and the head's weights; in this process's part of them
        root, block = self.shapes = weight_shapes(model_cfg)
        self.r, self.b = numel(root), numel(block)
        self.head = model_cfg.vocab_size * model_cfg.d_model
        self.my_r, self.my_b = numel(root, self.sharers), numel(block, self.sharers)
        self.my_weights = self.my_r + self.L * self.my_b
        self.optimizer = optimizer_bytes(root, self.sharers, cfg.optimizer)
        self.optimizer += self.L * optimizer_bytes(block, self.sharers, cfg.optimizer)
        # micro-batches: rows, tokens, positions
        rows = cfg.batch_tokens // cfg.context // ranks
        micro = min(cfg.micro_batch, rows)
        self.several = rows > micro
        self.accumulates = self.several and not cfg.reduce_each
        self.tokens = micro * cfg.context
        self.n = self.tokens * positions(cfg) // cfg.batch_tokens
        one_block, last_block, self.outside = activation_bytes(model_cfg, cfg, micro)
        self.kept, self.again = one_block
        self.last_kept, self.last_again = last_block
        # the loss holds the logits of a chunk of tokens at a time
        chunk = max(1, model.LOGITS_AT_ONCE // model_cfg.vocab_size)
        self.chunks = -(-self.tokens // chunk)
        self.logits = min(chunk, self.tokens) * model_cfg.vocab_size

    def at(self, left, in_transit, gathered, blocks, **more):
        """A moment. left: blocks whose gradients are to come. blocks: those with activations."""
        gradients = 4 * (self.L - left) * self.my_b
        if self.several and self.cfg.reduce_each:
            gradients = 4 * self.my_weights
        accumulated = 4 * (self.r + left * self.b) if self.accumulates else 0
        activations = blocks * self.kept
        if blocks == self.L:
            activations += self.last_kept - self.kept
        if left > 0:
            activations += self.outside
        return {
            "weights": 4 * self.my_weights,
            "optimizer": self.optimizer,
            "gradients": gradients,
            "accumulated gradients": accumulated,
            "gradients in transit": in_transit,
            "gathered weights": self.e * gathered,
            "activations": activations,
        } | more

    def gathered(self, i):
        """Numbers in the gathered weights during the backward pass of block i."""
        most = 1 if self.sharers == 1 else 2
        blocks = min(i, most) if self.cfg.reshard else i
        return self.r + blocks * self.b

    def loss(self):
        gathered = self.r if self.cfg.reshard else self.r + self.L * self.b
        # PyTorch adds the first two gradients of a weight into a third tensor, the others in place
        added, all_three = (1, 3) if self.chunks > 1 else (0, 1)
        of_logits = 12 * self.logits + added * self.e * self.head
        of_head = self.e * self.logits + all_three * self.e * self.head
        return self.at(self.L, 0, gathered, self.L, loss=max(of_logits, of_head))

    def in_block(self, i):
        """Inside block i, while the gradients of the one after it are exchanged."""
        d, f = self.model_cfg.d_model, self.model_cfg.d_ff
        exchanged = 4 * self.b if i < self.L else 0
        again, in_mlp = (self.again, self.n) if i < self.L else (self.last_again, self.tokens)
        work = again + in_mlp * self.e * (d + 2 * f)
        in_transit = self.e * (self.head + d * f) + exchanged
        return self.at(i, in_transit, self.gathered(i), i, work=work)

    def end_of_block(self, i):
        """Block i's gradients are there; accumulated ones take them in before they are copied."""
        copies = 4 if self.accumulates else self.e + 4
        in_transit = self.e * self.head + copies * self.b
        work = self.n * self.e * self.model_cfg.d_model
        return self.at(i, in_transit, self.gathered(i - 1), i - 1, work=work)

    def embedding(self):
        """The embedding's gradient meets the head's; tied ones are added into a third tensor."""
        gradients = 3 if self.model_cfg.tie_embeddings and self.chunks == 1 else 2
        in_transit = self.e * gradients * self.head + 4 * self.b
        work = self.n * self.e * self.model_cfg.d_model
        return self.at(0, in_transit, self.r, 0, work=work)

    def exchange(self):
        """The root's gradients are exchanged."""
        in_transit = 4 * self.r
        if not self.accumulates:
            late = not self.model_cfg.tie_embeddings and self.sharers > 1
            left_over = self.e * self.head if late else 0  # a reference that FSDP2 drops late
            in_transit += max(self.e * self.r, left_over + 4 * self.my_r)
        return self.at(0, in_transit, 0, 0)

    def update(self):
        work = 0
        if self.cfg.optimizer == "adafactor":  # temporary tensors of one weight's update
            work = 16 * max(numel([shape], self.sharers) for shape in sum(self.shapes, []))
        terms = self.at(0, 0, 0, 0, work=work)
        return terms | {"gradients": 4 * self.my_weights, "accumulated gradients": 0}


def memory(model_cfg, cfg, ranks):
    """The plan of the fullest of `ranks` processes: {moment of a step: {term: bytes}}."""
    step = Step(model_cfg, cfg, ranks)
    # between the second block and the one before the last, memory changes in a straight line
    blocks = {1, min(2, step.L), max(step.L - 1, 1), step.L}
    i = max(blocks, key=lambda i: sum(step.in_block(i).values()))
    j = max(blocks, key=lambda j: sum(step.end_of_block(j).values()))
    return {
        "loss": step.loss(),
        f"in block {i}": step.in_block(i),
        f"end of {j}": step.end_of_block(j),
        "embedding": step.embedding(),
        "exchange": step.exchange(),
        "update": step.update(),
    }


def peak(moments):
    """Bytes of the fullest moment."""
    return max(sum(terms.values()) for terms in moments.values())


def check_memory(model_cfg, optimizer, device_type, reference=False,
                 advice="a smaller --d_model, --n_layer or --vocab_size"):
    """Raises Mistake if weights, gradients, optimizer state and, with `reference`, a frozen float32
    copy of the weights exceed the memory of a CPU. advice: what needs less."""
    if device_type != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return  # GPUs have allocators that say so; Windows does not tell
    root, block = weight_shapes(model_cfg)
    shapes = root + model_cfg.n_layer * block
    parameters = numel(shapes)
    needs = (12 if reference else 8) * parameters + optimizer_bytes(shapes, 1, optimizer)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of several machines each holds its share
    needs = needs * here // int(os.environ.get("WORLD_SIZE", here))
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needs > has:
        state = f"weights, {'reference, ' if reference else ''}gradients and optimizer state"
        raise Mistake(f"a model of {parameters:,} parameters needs {needs / 1e9:,.1f} GB for its "
                      f"{state}; this machine has {has / 1e9:,.1f} GB; {advice} needs less")


def nearest(model_cfg, cfg, ranks):
    """The cheapest changes that make it fit, `ranks` last: ({setting: value}, bytes), or None."""
    rows = cfg.batch_tokens // cfg.context
    counts = [n for n in range(ranks, min(rows, 2**20) + 1, ranks) if rows % n == 0]
    changes = possible_changes(cfg, min(cfg.micro_batch, rows // ranks))
    for more in counts[:64]:
        for changed in changes:
            needs = peak(memory(model_cfg, replace(cfg, **changed), more))
            if needs <= cfg.gpu_memory * 1e9:
                return changed if more == ranks else changed | {"ranks": more}, needs
    return None


def possible_changes(cfg, micro_batch):
    """All changes that may save memory, [{setting: value}], fewest settings first, then cheapest.

    micro_batch: rows that are really computed at a time. Smaller micro-batches and `reduce_each`
    cost traffic, full recomputation a third of the FLOPs.
    """
    modes = ["none", "selective", "full"]
    halved = [micro_batch >> n for n in range(1, micro_batch.bit_length())]
    choices = {
        "recompute": modes[modes.index(cfg.recompute):],
        "micro_batch": [cfg.micro_batch, *halved],
        "reduce_each": {cfg.reduce_each, True},
        "reshard": {cfg.reshard, True},
        "shard_ranks": {cfg.shard_ranks, 0},
    }
    changes = []
    for values in product(*choices.values()):
        changes.append({k: v for k, v in zip(choices, values) if v != getattr(cfg, k)})

    def cost(changed):
        full = changed.get("recompute") == "full"
        smaller = -changed.get("micro_batch", cfg.micro_batch)
        return len(changed), full, "shard_ranks" in changed, "reduce_each" in changed, smaller

    return sorted(changes, key=cost)


# --- the plan -------------------------------------------------------------------------------------

def sizes(cfg):
    """The run's ModelConfig: of the folder it starts from, if that is local, or of the settings."""
    folder = "" if cfg.init_from == "scratch" else cfg.init_from
    if folder and Path(folder).is_dir():
        asked = (cfg.mask_token, cfg.bos_token, cfg.fim_rate > 0)
        return huggingface.read_description(huggingface.find(folder), *asked, objective="ar")[0]
    if folder:
        print(f"{folder} is not a local folder: planned with the sizes in the settings")
    settings = {f.name: getattr(cfg, f.name) for f in fields(model.ModelConfig)}
    if not cfg.vocab_size:
        try:
            tok = huggingface.load_tokenizer(cfg.data, cfg.bos_token, cfg.mask_token,
                                             cfg.fim_rate > 0)
        except Mistake as error:
            raise Mistake(f"vocab_size=0 takes the tokenizer's size, but {error}; to plan without "
                          "it, give --vocab_size") from error
        settings["vocab_size"] = tok.vocab_size
    return model.ModelConfig(**settings)


def check(cfg, ranks, rows_of):
    """Raises Mistake if the processes cannot share the work."""
    if cfg.shard_ranks and ranks % cfg.shard_ranks:
        near = min((n for n in range(1, ranks + 1) if ranks % n == 0),
                   key=lambda n: abs(n - cfg.shard_ranks))
        raise Mistake(f"shard_ranks={cfg.shard_ranks} must divide the number of processes, "
                      f"{ranks}, as {near} does")
    rows_of(0, ranks, cfg)


def show(cfg, rows_of):
    """Print the plan of a run. cfg, rows_of: train.py's settings, and how it deals out rows.

    Raises Mistake, after the table, if it does not fit; it names the nearest settings that do.
    """
    if os.environ.get("RANK", "0") != "0":  # under torchrun, printing once is enough
        return
    ranks = cfg.ranks or int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, ranks, rows_of)
    model_cfg = sizes(cfg)
    print_numbers(cfg, model_cfg, ranks)
    moments = memory(model_cfg, cfg, ranks)
    print_table(moments, f"GB, recompute={cfg.recompute}{', eager' if cfg.compile else ''}")
    most = peak(moments)
    if most <= cfg.gpu_memory * 1e9:
        print(f"\npeak {most / 1e9:.1f} GB of gpu_memory={cfg.gpu_memory:g}")
        return
    advice = "no recompute, micro_batch or number of ranks makes it fit"
    settings, needs = nearest(model_cfg, cfg, ranks) or ({}, 0)
    if settings:
        words = [f"--{name}={str(value).lower()}" for name, value in settings.items()]
        advice = f"{' '.join(words)} needs {needs / 1e9:.1f} GB"
    raise Mistake(f"peak {most / 1e9:.1f} GB exceeds gpu_memory={cfg.gpu_memory:g}: {advice}")


def print_numbers(cfg, model_cfg, ranks):
    """Parameters, rows, FLOPs and hours, a line for each."""
    c, tokens, steps = model_cfg, cfg.batch_tokens, cfg.max_steps
    root, block = (numel(shapes) for shapes in weight_shapes(c))
    total = root + c.n_layer * block
    embedding = c.vocab_size * c.d_model
    head = "the head is the embedding" if c.tie_embeddings else f"head {embedding:,}"
    print(f"parameters    {total:,}: embedding {embedding:,}, {c.n_layer} blocks of {block:,}, "
          f"{head}, last norm {c.d_model:,}")
    rows = tokens // cfg.context
    mine = rows // ranks
    micro = min(cfg.micro_batch, mine)
    print(f"step          {rows:,} rows of {cfg.context:,}: {tokens:,} tokens, {positions(cfg):,} "
          "positions in the blocks")
    print(f"process       {mine:,} rows, {micro} at a time (micro-batches: {-(-mine // micro)}); "
          f"{ranks:,} processes")
    scored, pairs = mask_rate(cfg) * tokens, rows * row_pairs(cfg)
    flops = step_flops(c, positions(cfg), scored, pairs, last_queries(cfg))
    attention = flops - step_flops(c, positions(cfg), scored, 0, last_queries(cfg))
    print(f"scored        {scored / tokens:.1%} of the tokens, on average, after warmup")
    print(f"FLOPs         {flops:.3e} per step (6 · parameters · tokens: {6 * total * tokens:.3e})")
    print(f"              attention takes {attention / flops:.0%} if each row is one document, "
          "less if it holds more")
    print(f"run           {steps:,} steps, {steps * tokens:.3e} tokens, {steps * flops:.3e} FLOPs")
    tflops = cfg.peak_tflops or PEAK_TFLOPS["H100"]
    seconds = flops / (tflops * 1e12 * ranks * cfg.mfu)
    hours = steps * seconds / 3600
    device = "" if cfg.peak_tflops else " (an H100; --peak_tflops for others)"
    print(f"time          {seconds:.2f} s per step, {tokens / seconds:,.0f} tokens/s, "
          f"{hours:,.1f} hours, {hours * ranks:,.0f} GPU hours")
    print(f"              at an MFU of {cfg.mfu:g} of {tflops:g} TFLOP/s{device}\n")


def print_table(moments, title):
    """Terms by moments, in GB (10⁹ bytes)."""
    names = dict.fromkeys(term for terms in moments.values() for term in terms)
    rows = {name: [terms.get(name, 0) for terms in moments.values()] for name in names}
    rows["sum"] = [sum(terms.values()) for terms in moments.values()]
    print(f"{title:<32}" + "".join(f"{moment:>13}" for moment in moments))
    for name, values in rows.items():
        print(f"{name:<32}" + "".join(f"{value / 1e9:>13.2f}" for value in values))
