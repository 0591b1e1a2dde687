"""Stable-DiffCoder-8B from tests that pass. Ours: its authors publish no reinforcement learning.

    torchrun --nproc_per_node=8 rl.py config/8b_rl.py

After config/diffucoder_7b_rl.py, with eight answers of up to 512 tokens, a clip of 0.2 as is usual
where ratios are exact, 2,000 steps, and what blocks of four make possible: answers are
written left to right with `verified`, several tokens per forward, and `trace` replays them. Four
passes of [xt ; x0] then give the log-probability of the very decisions that were made, exactly
(estimators.py: trace), which needs top_p = 1. A mask id must be named, as the folder does not.

Data: `python -m data.acecode.prepare`. Its references are programs that a model wrote and others
ran, so those that fail here are no reason to stop.
"""
out = "out/8b_rl"
init_from = "ByteDance-Seed/Stable-DiffCoder-8B-Instruct"
mask_token = "<[MASK_TOKEN]>"
tasks = "data/acecode/tasks.jsonl"
style = "instruct"
shown_tests = 1
check_references = False

prompts = 8
completions = 8
max_new_tokens = 512
max_prompt_tokens = 1024
temperature = 1.0
confidence = "left_to_right"
verified = True
decode_batch = 8  # all of a GPU's at once: with the cache, four would take nearly as long

estimator = "trace"
updates = 2
epsilon = 0.2
beta = 0.01
reference_every = 64

max_steps = 2000
micro_batch = 1
lr = 1e-6
min_lr = 1e-7
weight_decay = 0.1
grad_clip = 0.2
recompute = "full"
save_every = 200
keep = 1
