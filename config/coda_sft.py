"""CoDA's post-training: the 1.7B learns to answer (arXiv 2510.03270, §4.5).

    torchrun --nproc_per_node=8 train.py config/coda_sft.py --data=data/opencoder_1
    torchrun --nproc_per_node=8 train.py config/coda_sft.py --init_from=out/coda_sft \\
        --data=data/opencoder --out=out/coda_sft_2 --condition_epochs=0 --lr_warmup_steps=2480

The first command is OpenCoder's first stage, the second one its second, with the same settings but
the conditioning. Your own samples: docs/finetune.md has the command. The published weights, which
it starts from, have a head of their own: --tie_embeddings=false.

From the paper: both stages' samples cut at 1024 tokens, batch 176, AdamW, a peak of 2e-5, a cosine
after 10 % of the steps as warmup, ten epochs with early stopping. Over the first epoch, prompts
become context, from nothing to all of them.

From the released code (post-train): one sample per row; no weight decay, betas 0.9 and 0.999, the
last learning rate 0, which are its trainer's defaults; the answer's end up to 1024 tokens is
scored too; of the second stage's prompts, all is context from the start. There the first stage's
prompts become context over 5 % of the steps, half an epoch: --condition_epochs=0.5.

Ours: samples longer than a row are left out, not cut; an answer is filled with <eos> to a length
drawn up to 1024 tokens, not always to 1024, so that its length is to be learned; the folder's own
chat template, where the release has another.

Memory and time: `python train.py config/coda_sft.py --dry_run=true --ranks=8`.
Data: `python -m data.opencoder.prepare --source=stage1 --tokenizer=out/coda_1p7b_mid \\
    --out=data/opencoder_1`; without --source and --out, the second stage.
"""
out = "out/coda_sft"
init_from = "out/coda_1p7b_mid"
data = "mine.jsonl"  # or data/opencoder_1, as above

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 2048, 28, 16, 8, 128, 6144
vocab_size = 151936
rope_theta, norm_eps = 1e6, 1e-6
qk_norm = True
tie_embeddings = True

objective = "bidirectional"
shift = True
schedule = "uniform"
t_min = 1e-3
canvas = 1024
condition_epochs = 1.0

context = 1024
batch_tokens = 176 * 1024
micro_batch = 22
epochs = 10.0
lr = 2e-5
min_lr = 0.0
lr_warmup_steps = 24_000  # 10 % of ten epochs of 4.2 million rows
beta2 = 0.999
weight_decay = 0.0
eval_every = 1000
save_every = 2000
