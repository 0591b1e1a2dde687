"""A block-diffusion coder of 126 M parameters on one GPU, in hours. Planned, not trained yet.

    python -m data.stack.prepare --mixture=data/stack/code.json --out=data/code --tokens=3e9
    python train.py config/small.py --objective=ar --out=out/small_ar --max_steps=3000
    python train.py config/small.py --init_from=out/small_ar

The first of the two runs is the autoregressive stage before diffusion, the second block diffusion
from its weights. All numbers are ours; the recipe is Stable-DiffCoder's (K = 4, clipped, warmup, no
shift). On eight GPUs: `torchrun --nproc_per_node=8 train.py config/small.py`.

Memory and time: `python train.py config/small.py --dry_run=true --ranks=1`.
"""
out = "out/small"
data = "data/code"

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 768, 16, 12, 4, 64, 2048
vocab_size = 32768
tie_embeddings = True

objective = "block"
block_size = 4
schedule = "clipped"
u_warmup_steps = 250

context = 1024
batch_tokens = 512 * 1024
micro_batch = 16
max_steps = 5000  # 2.6B tokens
lr = 1e-3
min_lr = 1e-4
lr_warmup_steps = 250
eval_every = 500
save_every = 500
compile = True
