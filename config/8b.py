"""Stable-DiffCoder's continual pretraining: an 8B autoregressive coder learns block diffusion.

    torchrun --nproc_per_node=8 train.py config/8b.py

From the paper (arXiv 2601.15892, §3 and §4): Seed-Coder's sizes, K = 4, T = 8192 packed, no shift,
the clipped schedule and its weight (§3.3), warmup from u_init = 1e-3 (Eq. 10), 1.3T tokens. The
paper's packed samples see each other (--cross_document=true); here they need not.

Ours, since the paper does not say: batch, learning rate, optimizer, and S, the length of the
warmup. The paper starts from Seed-Coder's checkpoint before annealing, which is not published; this
starts from the published base model. The mask is named as in Stable-DiffCoder's tokenizer (id 5
there). Where Seed-Coder's has no such token, it is added at the next free id.

Memory and time: `python train.py config/8b.py --dry_run=true --ranks=8`. One node of eight 80 GB
GPUs holds it; 1.3T tokens take a cluster.
Data: `python -m data.stack.prepare --mixture=data/stack/code.json --out=data/code_8b \\
    --tokenizer=ByteDance-Seed/Seed-Coder-8B-Base`.
"""
out = "out/8b"
init_from = "ByteDance-Seed/Seed-Coder-8B-Base"
data = "data/code_8b"
mask_token = "<[MASK_TOKEN]>"

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 4096, 32, 32, 8, 128, 14336
vocab_size = 155136
rope_theta, norm_eps = 5e5, 1e-6
tie_embeddings = False

objective = "block"
block_size = 4
shift = False
schedule = "clipped"
u_warmup_steps = 2000  # ours
u_init = 1e-3

context = 8192
batch_tokens = 1024 * 8192  # ours
micro_batch = 1
max_steps = 155_000  # 1.3T tokens
lr = 3e-5  # ours
min_lr = 3e-6
lr_warmup_steps = 2000
eval_every = 1000
save_every = 500
recompute = "full"
compile = True
