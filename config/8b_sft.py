"""Stable-DiffCoder-8B on your own questions and answers, or from Base to Instruct.

    torchrun --nproc_per_node=8 train.py config/8b_sft.py --data=mine.jsonl --epochs=3

docs/finetune.md walks through it. The authors' own stage, with OpenCoder's samples for theirs:

    torchrun --nproc_per_node=8 train.py config/8b_sft.py --init_from=weights/8b \\
        --data=data/opencoder --out=out/8b_instruct --epochs=2 --lr_warmup_steps=200

where weights/8b holds Base's weights and the tokenizer of Instruct, which has a chat template; or
--init_from=out/8b, the run of config/8b.py.

From the paper (arXiv 2601.15892, §4.1): samples packed into rows of 8192, 1 to 4 <eos> after each,
K = 4, no shift. The paper's packed samples see each other (--cross_document=true); here they need
not, and <eos> fills each sample to a multiple of 8 tokens.

Ours, since the paper does not say: batch, learning rate, epochs, and the clipped schedule, which is
that of its pretraining. Its samples are Seed-Coder's, which are not published. A step is as small
as rows of 8192 on eight GPUs allow, so that a file of a few thousand lines makes steps enough.

Memory and time: `python train.py config/8b_sft.py --dry_run=true --ranks=8`.
Data: a .jsonl file of yours; or `python -m data.opencoder.prepare \\
    --tokenizer=ByteDance-Seed/Stable-DiffCoder-8B-Instruct`.
"""
out = "out/8b_sft"
init_from = "ByteDance-Seed/Stable-DiffCoder-8B-Instruct"
data = "mine.jsonl"
mask_token = "<[MASK_TOKEN]>"

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 4096, 32, 32, 8, 128, 14336
vocab_size = 155136
rope_theta, norm_eps = 5e5, 1e-6
tie_embeddings = False

objective = "block"
block_size = 4
shift = False
schedule = "clipped"

context = 8192
batch_tokens = 8 * 8192  # ours
micro_batch = 1
epochs = 3.0  # ours
lr = 1e-5  # ours
min_lr = 1e-6
lr_warmup_steps = 10
weight_decay = 0.0  # ours
eval_every = 200
save_every = 500
keep = 1  # a checkpoint takes 99 GB
recompute = "full"
