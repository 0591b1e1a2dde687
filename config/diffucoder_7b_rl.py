"""coupled-GRPO as DiffuCoder was aligned (arXiv 2506.20639, §5): a 7B learns from AceCode's tests.

    torchrun --nproc_per_node=8 rl.py config/diffucoder_7b_rl.py

From the released code (apple/ml-diffucoder, recipes/config_coupled_code.yaml): ten answers to a
question at temperature 1.0 and top-p 0.95, by entropy, one token per forward of a canvas of 256;
one all-masked pass and one complementary pair with t from 0.2 to 0.8; clip 0.5, beta 0.01, the
reference renewed every 64 steps, two updates per rollout; AdamW with betas 0.9 and 0.99, weight
decay 0.1, gradients clipped at 0.2, a cosine from 1e-6 to a tenth. Eight GPUs with five answers
each, accumulated twice, are eight questions per step. One epoch of 21 thousand tasks.

What differs from the release. TRL, which it builds on, mixes 0.6 of the policy into the reference
(ref_model_mixup_alpha), and ours copies the policy. The release cuts prompts to their last 200
tokens; ours leaves out tasks whose prompt has more than 512. It draws one t for a batch, ours one
for an answer. With two micro-batches and two updates, its code gives an answer the same masks in
both updates; here each update draws its own. It masks tokens behind <eos> at random like the
others, ours in every pass. Groups whose rewards are all equal count in its mean, and their KL is in
the loss; ours leaves them out. It averages over the tokens of a process's micro-batch, ours over
those of all. Ids that decoding never chooses have no probability here. A question stands in
EvalPlus's message. As in the release, it shows one of its tests, which is scored too, and a
signature to complete shows none. The release's top_p is in coupled_grpo.py, not in its recipe.

The release weighs the passes of a pair by 1/t and 1/(1 - t): --pair_weights=released. The default,
one, gives an average of log-probabilities (estimators.py: coupled).

Data: `python -m data.acecode.prepare`. Its references are programs that a model wrote and others
ran, so those that fail here are no reason to stop.
"""
out = "out/diffucoder_7b_rl"
init_from = "apple/DiffuCoder-7B-Instruct"
tasks = "data/acecode/tasks.jsonl"
style = "instruct"
shown_tests = 1
check_references = False

prompts = 8
completions = 10
max_new_tokens = 256
max_prompt_tokens = 512
temperature = 1.0
top_p = 0.95
confidence = "entropy"
decode_batch = 5  # of ten per GPU: five are judged while the others are written

estimator = "coupled"
pairs = 1
t_low, t_high = 0.2, 0.8
updates = 2
epsilon = 0.5
beta = 0.01
reference_every = 64
passed_weight, format_weight = 2.0, 0.5

max_steps = 5200  # 21 thousand tasks, eight per rollout, two updates each
micro_batch = 5
lr = 1e-6
min_lr = 1e-7
beta1, beta2 = 0.9, 0.99
weight_decay = 0.1
grad_clip = 0.2
recompute = "full"
save_every = 200
keep = 1
