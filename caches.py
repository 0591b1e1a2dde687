"""The forwards of decoding: what a step computes, and what it reads from a cache.

    cache           for                           a step computes             its logits are
    none            all                           the text so far             the reference
    exact           block, ar                     the attention block         exact
    hierarchical    block                         the decoding block in it    approximate
    prefix          bidirectional, ar_diffusion   all from the block on       approximate
    dual            bidirectional, ar_diffusion   the decoding block          approximate

There are two kinds of blocks. *Attention's* block says who sees whom (spans.py): K tokens, one, or
the whole document. *Decoding's* block says which masks may be written now (`block_length`). Models
with attention blocks and models without get their logits in two ways, which stand beside each
other: `BlockReader` and `TextReader`.

`prefix` and `dual` are Fast-dLLM's (arXiv 2505.22618), `hierarchical` is Fast-dLLM v2's (arXiv
2509.26328). Between attention's blocks hierarchical is exact, too. The first step of a decoding
block computes more in each of them: it brings the cache up to date.

Not covered: caches that are shared by several prompts, or paged.
"""
import torch

from diffusion import spans_for
from model import KVCache
from spans import CacheSpans, Spans


def columns_of(wanted):
    """The marked columns of each row of wanted (b, L) bool, in order.

    Returns columns (b, n) int64 and real (b, n) bool: a row of fewer than n is filled up with
    columns that are not marked.
    """
    count = wanted.sum(1, keepdim=True)  # (b, 1)
    columns = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :int(count.max())]
    return columns, torch.arange(columns.shape[1], device=wanted.device) < count


def cached_forward(model, cache, plan):
    """Hidden states (b, Q, d_model) of queries against a cache, which takes their keys and values.

    plan: (7, b, Q) int64: tokens, slots, and the five numbers of CacheSpans.
    """
    tokens, slots, *seen = plan
    return model(tokens, CacheSpans(*seen, cache.slots), cache, slots)


class Graphs:
    """`cached_forward`; on CUDA recorded as a graph once for each shape of `plan`, then replayed.

    Without, a step launches a thousand small kernels, which takes longer than reading the weights.
    """

    def __init__(self, model, cache, how):
        self.model, self.cache = model, cache
        self.used = how.graphs and cache.k.is_cuda
        self.memory = torch.cuda.graph_pool_handle() if self.used else None  # of all the graphs
        self.recorded = {}  # shape: (graph, its input, its output)

    def __call__(self, plan):
        """See cached_forward. What it returns is overwritten by the next call."""
        if not self.used:
            return cached_forward(self.model, self.cache, plan)
        if plan.shape not in self.recorded:
            self.recorded[plan.shape] = self.record(plan.clone())
        graph, static_plan, hidden = self.recorded[plan.shape]
        static_plan.copy_(plan)
        graph.replay()
        return hidden

    def keep(self, rows):
        """Drop all rows of the batch but these, (b,) int64, and the graphs of the larger batch."""
        self.cache.keep(rows)
        self.recorded = {}

    def record(self, plan):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels before the recording
            cached_forward(self.model, self.cache, plan)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            hidden = cached_forward(self.model, self.cache, plan)
        return graph, plan, hidden


class BlockReader:
    """Logits of a model with attention blocks (block, ar): nobody sees a later block.

    So the keys and values of a finished block are final, and caching them is exact. The first step
    of the next block computes them too, in the same forward.
    """

    def __init__(self, model, recipe, canvas, how):
        self.model, self.recipe, self.how = model, recipe, how
        self.K = recipe.causal_block
        self.begun = None  # first column of the attention block that the last forward was in
        self.boundary = None  # (b, 1, d_model), hidden state of the position before that block
        self.cache = None
        if how.cache != "none":
            self.cache = KVCache(model, *canvas.tokens.shape)
            self.forward = Graphs(model, self.cache, how)

    def keep(self, rows):
        if self.boundary is not None:
            self.boundary = self.boundary[rows]
        if self.cache is not None:
            self.forward.keep(rows)

    def begin(self, canvas, number, columns):
        """From here on the decoding block is `number`, of these columns (b, block_length)."""
        self.a = canvas.first + number * self.how.block_length
        self.b = self.a + self.how.block_length

    def logits(self, canvas, step):
        """Logits of the decoding block [a, b), (b, b - a, vocab), at a step of it."""
        a, b = self.a, self.b
        begin = a // self.K * self.K  # attention's block is [begin, begin + K)
        alone = self.cache is None or self.begun is None  # without what a cache holds
        from_, to = self.columns(begin, step, alone)
        self.begun = begin
        hidden = self.hidden(canvas, from_, to, alone)  # (b, to - from_, d_model)
        if not self.recipe.shift:
            return self.model.logits(hidden[:, a - from_:b - from_])
        if from_ < begin:
            self.boundary = hidden[:, begin - from_ - 1:begin - from_].clone()
        elif begin == 0:
            self.boundary = hidden[:, :1].clone()  # the first token is given: nobody reads this
        if from_ < a:
            return self.model.logits(hidden[:, a - 1 - from_:b - 1 - from_])
        return self.model.logits(torch.cat([self.boundary, hidden[:, :b - 1 - a]], 1))

    def columns(self, begin, step, alone):
        """Which columns this forward computes, [from, to), in attention's block or before it."""
        to = begin + self.K
        if self.recipe.shift and self.K == 1:
            to = begin  # autoregressive: nobody reads at the masked token itself
        if alone:
            return 0, to
        if self.begun != begin:
            return begin - self.K, to  # the block before it is written, and not yet cached
        if self.how.cache == "hierarchical" and not is_whole(step, self.how):
            if self.recipe.shift and self.a > begin:
                return self.a - 1, self.b
            return self.a, self.b
        return begin, to

    def hidden(self, canvas, from_, to, alone):
        """(b, to - from_, d_model) of these columns, which see all of their blocks."""
        tokens = canvas.tokens[:, from_:to]
        column = torch.arange(from_, to, device=tokens.device).expand_as(tokens)
        if alone:
            spans = Spans.of(*canvas.documents(to), self.K)
            return self.model(tokens, spans, self.cache, column)
        start = canvas.start[:, None].expand_as(tokens)
        seen_to = column // self.K * self.K + self.K
        none = torch.zeros_like(column)
        plan = [tokens, column, column - start, start, seen_to, none, none]
        return self.forward(torch.stack(plan))


class TextReader:
    """Logits of a model that writes its masks in any order (bidirectional, ar_diffusion).

    Whatever is kept of a text may change with the next mask that is written: no cache is exact.
    (But under ar_diffusion, whose attention is causal, for masks at the end of a text.)
    """

    def __init__(self, model, recipe, canvas, how):
        self.model, self.recipe, self.how = model, recipe, how
        self.cache = None
        if how.cache != "none":
            self.cache = KVCache(model, *canvas.tokens.shape)
            self.forward = Graphs(model, self.cache, how)

    def keep(self, rows):
        if self.cache is not None:
            self.forward.keep(rows)

    def begin(self, canvas, number, columns):
        """From here on the decoding block is `number`, of these columns (b, n), see columns_of."""
        self.read = columns
        if self.recipe.shift:  # a token is read at its left neighbor
            self.read = (columns - 1).clamp(min=0)
        if self.cache is None:
            return
        wanted = canvas.block == number  # (b, L), what is not read from the cache
        if self.recipe.shift:
            wanted = wanted | wanted.roll(-1, 1)
        if self.how.cache == "prefix":
            wanted = wanted.cumsum(1) > 0
        columns, real = columns_of(wanted)  # (b, Q)
        last = real.sum(1, keepdim=True).clamp(min=1) - 1
        # a row of fewer columns computes its last one several times, which changes nothing
        self.columns = torch.where(real, columns, columns.gather(1, last))
        place = (wanted.cumsum(1) - 1).clamp(min=0)  # (b, L), of each column among them
        self.place = place.gather(1, self.read)  # (b, n)

    def logits(self, canvas, step):
        """Logits of the decoding block, (b, n, vocab), at a step of it."""
        if self.cache is None or is_whole(step, self.how):
            hidden, read = self.whole(canvas), self.read  # (b, L, d_model)
        else:
            hidden, read = self.part(canvas), self.place  # (b, Q, d_model)
        read = read[..., None].expand(-1, -1, hidden.shape[2])
        return self.model.logits(hidden.gather(1, read))

    def whole(self, canvas):
        """All columns, (b, L, d_model); the cache takes all of their keys and values."""
        L = canvas.tokens.shape[1]
        slots = torch.arange(L, device=canvas.tokens.device).expand_as(canvas.tokens)
        spans = spans_for(self.recipe, *canvas.documents(L))
        return self.model(canvas.tokens, spans, self.cache, slots)

    def part(self, canvas):
        """The columns that are not read from the cache, (b, Q, d_model)."""
        columns = self.columns
        start = canvas.start[:, None].expand_as(columns)
        seen_to = canvas.end[:, None].expand_as(columns)
        if self.recipe.attention_block == 1:
            seen_to = columns + 1
        none = torch.zeros_like(columns)
        tokens = canvas.tokens.gather(1, columns)
        plan = [tokens, columns, columns - start, start, seen_to, none, none]
        return self.forward(torch.stack(plan))


def is_whole(step, how):
    """Whether an approximate cache is brought up to date at this step of a decoding block."""
    return step == 0 or how.refresh > 0 and step % how.refresh == 0
