"""Start here: the smallest complete use of this code base, in one file.

A block-diffusion model with 100,000 weights learns ten snippets of Python by heart. Then it is
given the first line of each and writes the rest, by every way of decoding there is.
"""
import numpy as np
import torch

from decode import Decoding, decode, generate, write
from diffusion import Draw, Recipe, corrupt, weighted_loss
from huggingface import load_tokenizer
from loader import Batch
from model import ModelConfig, Transformer

SNIPPETS = [
    "def add(a, b):\n    return a + b\n",
    "def square(x):\n    return x * x\n",
    "def first(items):\n    return items[0]\n",
    "def is_even(n):\n    return n % 2 == 0\n",
    "def greet(name):\n    print('hello', name)\n",
    "def read(path):\n    with open(path) as f:\n        return f.read()\n",
    "def total(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s\n",
    "class Empty:\n    pass\n",
    "for i in range(10):\n    print(i)\n",
    "try:\n    import numpy\nexcept ImportError:\n    numpy = None\n",
]

WAYS = [
    Decoding(),  # in each block of four the surest token first, one a forward
    Decoding("margin"),  # sure by how far the second-best token is behind
    Decoding("entropy"),
    Decoding("random"),
    Decoding("left_to_right"),
    Decoding(steps=2),  # two tokens a forward
    Decoding(threshold=0.9),  # as many as are this sure
    Decoding("margin", threshold=0.8),
    Decoding("entropy", entropy_bound=0.2),
    Decoding(factor=0.5),
    Decoding(verified=True),  # the text of left_to_right, in fewer forwards
    Decoding(block_length=2),  # half a block at a time
    Decoding(block_length=2, cache="hierarchical"),
    Decoding(cache="none"),  # the whole text in every forward
    Decoding(remask=1),  # the least sure token of a step is written once more
    Decoding(eos_penalty=1.0),
    Decoding(alg_temp=0.3),  # which positions is drawn
    Decoding(temperature=0.2),  # which tokens is drawn, too
    Decoding("left_to_right", temperature=0.2, verified=True),
    Decoding(temperature=1.0, top_p=0.5),
    Decoding(temperature=1.0, top_k=1),
]

def rows_of_snippets(tok, length):
    """A row holds one document: <bos>, the text, and <eos> up to `length` tokens."""
    rows = [[tok.bos_id, *tok.encode(text)] for text in SNIPPETS]
    rows = [ids + [tok.eos_id] * (length - len(ids)) for ids in rows]
    doc_start = torch.zeros(len(rows), length, dtype=torch.int32)
    maskable = torch.ones(len(rows), length, dtype=torch.bool)
    maskable[:, 0] = False  # the first token of a document is given, never predicted
    epochs = np.zeros(len(rows), np.int64)
    return Batch(torch.tensor(rows), doc_start, doc_start + length, maskable, epochs)


def learn(tok, batch, recipe, steps):
    """A model that knows these rows by heart."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tok.vocab_size, d_model=64, n_layer=2, n_head=2, n_kv_head=2,
                                    head_dim=32, d_ff=128, context=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = range(len(batch.x0))
    for step in range(steps):
        noised = corrupt(batch, recipe, Draw(seed=0, step=step, rows=rows, batch_rows=len(rows)))
        loss = weighted_loss(model, noised, recipe) / batch.maskable.sum()  # nats per token
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_a_model_that_has_learned_ten_snippets_writes_them(data_folder):
    tok = load_tokenizer(data_folder)  # about 300 tokens: bytes and the commonest pieces of code
    batch = rows_of_snippets(tok, length=48)

    # What is trained: blocks of four tokens, of which one to four are masked, drawn anew at every
    # step. The model sees all earlier blocks clean and fills in what is masked of this one.
    recipe = Recipe("block", block_size=4, schedule="count", mask_id=tok.mask_id)
    model = learn(tok, batch, recipe, steps=400)

    # Decoding goes block by block, all ten texts at once.
    first_lines = [text[:text.index("\n") + 1] for text in SNIPPETS]
    prompts = [[tok.bos_id, *tok.encode(line)] for line in first_lines]
    for how in WAYS:
        completions = generate(model, tok, recipe, prompts, how, max_new_tokens=44)
        written = [line + tok.decode(ids) for line, ids in zip(first_lines, completions)]
        assert written == SNIPPETS, how

    # The same a step at a time: what is to be written is None, and a step is one forward.
    text = prompts[0] + [None] * 12
    for step in decode(model, tok, recipe, [text], Decoding()):
        write([text], step)
    written = text[:text.index(tok.eos_id)]
    assert tok.decode(written[1:]) == SNIPPETS[0]
