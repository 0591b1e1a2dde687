"""What several tests share.

What they compare with is written independently of the code, slow and plain: rows of packed
documents, who sees whom pair by pair, and attention as a float64 softmax. At the end, a folder of
a tiny model.
"""
import torch
from hypothesis import strategies as st

from diffusion import Recipe
from huggingface import load_tokenizer, write_model
from model import ModelConfig, Transformer

# objective: (block size, is there a noisy half). "K" is the recipe's, None a whole document.
ATTENTION_OF = {
    "ar": (1, False),
    "ar_diffusion": (1, False),
    "bidirectional": (None, False),
    "block": ("K", True),
}


def packed(*rows, device="cpu"):
    """Rows of document lengths -> doc_start, doc_end, (B, T) int32.

    A negative length is a gap, which is in no document.
    """
    all_starts, all_ends = [], []
    for lengths in rows:
        starts, ends, at = [], [], 0
        for n in lengths:
            end = at if n < 0 else at + n
            starts += [at] * abs(n)
            ends += [end] * abs(n)
            at += abs(n)
        all_starts.append(starts)
        all_ends.append(ends)
    return (torch.tensor(all_starts, dtype=torch.int32, device=device),
            torch.tensor(all_ends, dtype=torch.int32, device=device))


@st.composite
def packings(draw, max_T=16, max_rows=3):
    """Rows of document lengths, of one T: a single document, one-token documents, cuts anywhere."""
    T = draw(st.integers(1, max_T))
    inside = list(range(1, T))
    anywhere = st.sets(st.sampled_from(inside)) if inside else st.just([])
    cuts = st.one_of(st.just([]), st.just(inside), anywhere)
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        edges = sorted({0, T, *draw(cuts)})
        rows.append([b - a for a, b in zip(edges, edges[1:])])
    return rows


def block_of(i, lengths, K):
    """doc_start, doc_end, block_start, block_end of position i, by counting.

    K None: a document is a block.
    """
    a = 0
    for n in lengths:
        if i < a + n:
            K = K or n
            block_start = a + (i - a) // K * K
            return a, a + n, block_start, min(block_start + K, a + n)
        a += n


def who_sees(lengths, K, noisy):
    """(S, S) bool of one row, pair by pair as the table has it; xt comes before x0."""
    halves = ("noisy", "clean") if noisy else ("clean",)
    tokens = [(i, half) for half in halves for i in range(sum(lengths))]
    sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for row, (i, query) in enumerate(tokens):
        doc_start, doc_end, block_start, block_end = block_of(i, lengths, K)
        for col, (j, key) in enumerate(tokens):
            if query == "clean":
                sees[row, col] = key == "clean" and doc_start <= j < block_end
            elif key == "clean":
                sees[row, col] = doc_start <= j < block_start
            else:
                sees[row, col] = block_start <= j < block_end
    return sees


def softmax_attention(q, k, v, mask):
    """Softmax over mask (B, Q, S); queries without a key get zeros. Give it float64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, n_head, Q, S)
    e = torch.exp(scores - scores.amax(-1, keepdim=True)) * mask[:, None]
    return e @ v / e.sum(-1, keepdim=True).clamp(min=1e-300)


def with_gradients(function, q, k, v, g, dtype):
    """Output and the gradients of q, k, v for the output's gradient g, all float64."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), g.to(dtype), materialize_grads=True)
    return [x.detach().double() for x in (out, *grads)]


# --- a folder of a tiny model --------------------------------------------------------------------

def write_tiny_run(run, data_folder, context=64, **recipe):
    """A run with one checkpoint of a block model, K = 4, that writes "x" and "y" and never ends.

    Every hidden state prefers one of these two: their rows of the head are h and -h, all others 0.
    run: a folder, which is made. data_folder: has the tokenizer. recipe: other settings of Recipe.
    Returns the checkpoint's folder.
    """
    tok = load_tokenizer(data_folder)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tok.vocab_size, 16, 2, 2, 1, 8, 24, context,
                                    tie_embeddings=False))
    (x,), (y,) = tok.encode("x"), tok.encode("y")
    with torch.no_grad():
        model.embed_tokens.weight.normal_()
        h = torch.randn(16)
        model.lm_head.weight.zero_()
        model.lm_head.weight[x] = h
        model.lm_head.weight[y] = -h
    folder = run / "step_0000001"
    folder.mkdir(parents=True)
    settings = {"objective": "block", "block_size": 4, "mask_id": tok.mask_id} | recipe
    write_model(folder, model, tok, Recipe(**settings))
    (run / "latest").write_text(folder.name)
    return folder
