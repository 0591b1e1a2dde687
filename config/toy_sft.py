"""Supervised fine-tuning at toy scale: the demo's model learns to write functions that work.

It goes on from config/toy.py with the same objective, block diffusion with K = 4. A sample is a
signature and a docstring, the prompt, with a body, which alone is scored. Muon reads half as much
text as AdamW for the same loss here. Two busy CPU cores, ten minutes.
Data: `python -m data.functions.prepare`. Look at it: `python train.py config/toy_sft.py \\
    --show_row=0`.
Memory and time: `python train.py config/toy_sft.py --dry_run=true`.
"""
out = "out/toy_sft"
init_from = "out/toy"
data = "data/functions/train.jsonl"
val_percent = 1.0

objective = "block"
block_size = 4
shift = False
schedule = "count"

context = 256
batch_tokens = 8 * 256
micro_batch = 8
max_steps = 1200
optimizer = "muon"
lr = 6e-3
min_lr = 1e-5
lr_warmup_steps = 20
eval_every = 600
eval_windows = 32
save_every = 300
