"""coupled-GRPO at toy scale: the demo's model learns the hard functions from their tests alone.

It goes on from config/toy_sft.py. Nobody shows it a solution: it writes eight answers to a task,
the sandbox runs them, and what does better than its siblings becomes likelier. Each rollout is used
for one update, since new answers are cheap here. With lr=1e-3, updates=2 and no warmup the policy
was worse after 16 steps than before. Two CPU cores, 8 to 15 minutes.
Data: `python -m data.functions.prepare`.

    python rl.py config/toy_rl.py
"""
out = "out/toy_rl"
init_from = "out/toy_sft"
tasks = "data/functions/hard.jsonl"
val_tasks = "data/functions/hard_test.jsonl"

prompts = 16
completions = 8
max_new_tokens = 96
temperature = 1.0
confidence = "entropy"
decode_batch = 128
dtype = "float32"  # of the numbers in docs/rl.md; bfloat16, where a CPU has it, is a fifth faster

estimator = "coupled"
updates = 1
epsilon = 0.5
beta = 0.01
reference_every = 64

max_steps = 80
micro_batch = 32
lr = 3e-4
min_lr = 3e-5
lr_warmup_steps = 4
weight_decay = 0.0
grad_clip = 0.2
eval_every = 20
save_every = 20
