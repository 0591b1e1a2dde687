"""Start here: the smallest complete use of this code base, in one test.

A block-diffusion model with 100,000 weights learns ten snippets of Python by heart. Then it is
given the first line of each and writes the rest.
"""
import numpy as np
import torch

import sample
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


def test_a_model_that_has_learned_ten_snippets_writes_them(data_folder):
    tok = load_tokenizer(data_folder)  # about 300 tokens: bytes and the commonest pieces of code
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tok.vocab_size, d_model=64, n_layer=2, n_head=2, n_kv_head=2,
                                    head_dim=32, d_ff=128, context=128))

    # A row holds one document: <bos>, the text, and <eos> up to the length of the longest one.
    texts = [[tok.bos_id, *tok.encode(text), tok.eos_id] for text in SNIPPETS]
    T = -(-max(map(len, texts)) // 8) * 8
    rows = [ids + [tok.eos_id] * (T - len(ids)) for ids in texts]
    B = len(rows)
    doc_start = torch.zeros(B, T, dtype=torch.int32)
    maskable = torch.ones(B, T, dtype=torch.bool)
    maskable[:, 0] = False  # the first token of a document is given, never predicted
    batch = Batch(torch.tensor(rows), doc_start, doc_start + T, maskable, np.zeros(B, np.int64))

    # What is trained: blocks of four tokens, of which one to four are masked, drawn anew at every
    # step. The model sees all earlier blocks clean and fills in what is masked of this one.
    recipe = Recipe("block", block_size=4, schedule="count", mask_id=tok.mask_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(400):
        noised = corrupt(batch, recipe, Draw(seed=0, step=step, rows=range(B), batch_rows=B))
        loss = weighted_loss(model, noised, recipe) / maskable.sum()  # nats per token
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # Decoding goes block by block, in each one the surest token first.
    cfg = sample.Config(max_new_tokens=T)
    for text in SNIPPETS:
        first_line = text[:text.index("\n") + 1]
        prompt = [tok.bos_id, *tok.encode(first_line)]
        (ids,), _ = sample.generate(model, tok, recipe, prompt, cfg)
        assert first_line + tok.decode(ids) == text
