"""coupled-GRPO at toy scale: the demo's model learns the hard functions from their tests alone.

It goes on from config/toy_sft.py. Nobody shows it a solution: it writes eight answers to a task,
the sandbox runs them, and what does better than its siblings becomes likelier. These numbers are a
first guess: no run has been made to the end. Data: `python -m data.functions.prepare`.

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

estimator = "coupled"
updates = 2
epsilon = 0.5
beta = 0.01
reference_every = 64

max_steps = 200
micro_batch = 32
lr = 1e-4
min_lr = 1e-5
weight_decay = 0.0
grad_clip = 0.2
eval_every = 50
save_every = 50
