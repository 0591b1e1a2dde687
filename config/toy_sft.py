"""Supervised fine-tuning at toy scale: the demo's model learns to write functions that work.

It goes on from config/toy.py with the same objective, block diffusion with K = 4. Each sample is a
signature and a docstring, the prompt, with a body, which alone is scored. Two CPU cores, about
four minutes. Data: `python -m data.functions.prepare`.
A row of it: `python train.py config/toy_sft.py --show_row=0`.
"""
out = "out/toy_sft"
init_from = "out/toy"
data = "data/functions/train.jsonl"
val_data = "data/functions/val.jsonl"

objective = "block"
block_size = 4
shift = False
schedule = "count"
complementary = True

context = 256
batch_tokens = 16 * 256
micro_batch = 16
max_steps = 500
lr = 4e-3
min_lr = 2e-4
lr_warmup_steps = 20
eval_every = 250
eval_windows = 64
save_every = 250
