"""The control for config/8b.py: the same continual pretraining of Seed-Coder-8B without diffusion.

    torchrun --nproc_per_node=8 train.py config/seed_coder_8b_ar.py

Stable-DiffCoder's paper compares with an autoregressive model trained on the same data with the
same budget; this is that run. Every number is that of config/8b.py except for the objective. A step
takes about half of the time, since a row is T tokens, not 2T.

Memory and time: `python train.py config/seed_coder_8b_ar.py --dry_run=true --ranks=8`.
Data: that of config/8b.py.
"""
out = "out/seed_coder_8b_ar"
init_from = "ByteDance-Seed/Seed-Coder-8B-Base"
data = "data/code_8b"

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 4096, 32, 32, 8, 128, 14336
vocab_size = 155136
rope_theta, norm_eps = 5e5, 1e-6
tie_embeddings = False

objective = "ar"

context = 8192
batch_tokens = 1024 * 8192
micro_batch = 1
max_steps = 155_000  # 1.3T tokens
lr = 3e-5
min_lr = 3e-6
lr_warmup_steps = 2000
eval_every = 1000
save_every = 500
recompute = "full"
compile = True
