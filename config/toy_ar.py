"""The stage before diffusion: a small autoregressive model of Python's standard library.

It plays the role of Seed-Coder in Stable-DiffCoder's recipe. Two CPU cores, two to four minutes.
Data: `python -m data.stdlib.prepare`.
Memory and time: `python train.py config/toy_ar.py --dry_run=true`.
"""
out = "out/toy_ar"
objective = "ar"

context = 256
batch_tokens = 16 * 256
micro_batch = 16
max_steps = 500
lr = 6e-3
min_lr = 1e-3  # the stage after it starts from a model that still learns (Stable-DiffCoder §3.1)
lr_warmup_steps = 40
eval_every = 250
eval_windows = 96
save_every = 250
