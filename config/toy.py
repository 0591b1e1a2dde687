"""Stable-DiffCoder's recipe at toy scale: block diffusion from the weights of config/toy_ar.py.

K = 4, clipped schedule, ELBO weights after a warmup of the noise (Stable-DiffCoder §3). Two CPU
cores, two to five minutes. Data: `python -m data.stdlib.prepare`.
Memory and time: `python train.py config/toy.py --dry_run=true`.
"""
out = "out/toy"
init_from = "out/toy_ar"
objective = "block"
block_size = 4
shift = False
schedule = "clipped"
u_warmup_steps = 40

context = 256
batch_tokens = 16 * 256
micro_batch = 16
max_steps = 300
lr = 4e-3
min_lr = 2e-4
lr_warmup_steps = 20
eval_every = 150
eval_windows = 96
save_every = 150
