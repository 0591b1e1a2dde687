"""CoDA's pretraining: Qwen3-1.7B made bidirectional (arXiv 2510.03270).

    torchrun --nproc_per_node=8 train.py config/coda_1p7b.py
    torchrun --nproc_per_node=8 train.py config/coda_1p7b_mid.py   # then mid-training

From the paper: 179B tokens of seven sources (data/stack/coda.json), batch 512 x 8192, 50,000 steps
(210B tokens: the data is read 1.17 times), Adafactor with a linear schedule and a peak of 3e-4, no
annealing of the attention. The paper draws its masking strategies per *batch*: S1 (an unmaskable
prefix) or S2 (a truncated suffix) is applied with probability 0.01, and S3 (spans) to the batch
with probability 0.01.

From the released code: S1 and S2 are drawn per *row*, as here. It trains differently from the paper
in other ways, which this file does not follow: 2,000 steps of warmup, a cosine, 210,000 steps. It
ran on TPUs (v4-1024). The published weights have a head of their own, where Qwen3-1.7B ties it.

Ours: S3 is drawn per row too; the length of the learning rate's warmup, weight decay and the last
learning rate, which the paper does not give. The weights are Qwen3's and so is the head, read one
position early (shift). The learning rate is absolute, not relative to the weights.

Memory and time: `python train.py config/coda_1p7b.py --dry_run=true --ranks=8`.
Data: `python -m data.stack.prepare --mixture=data/stack/coda.json --out=data/coda --tokens=179e9 \\
    --tokenizer=Qwen/Qwen3-1.7B`.
"""
out = "out/coda_1p7b"
init_from = "Qwen/Qwen3-1.7B"
data = "data/coda"
mask_token = "<|mask|>"  # new: the first free id of Qwen3's tokenizer, 151669

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 2048, 28, 16, 8, 128, 6144
vocab_size = 151936
rope_theta, norm_eps = 1e6, 1e-6
qk_norm = True
tie_embeddings = True

objective = "bidirectional"
shift = True
schedule = "uniform"
t_min = 1e-3
strategies = ((0.01, 0.01, 0.01),)

context = 8192
batch_tokens = 512 * 8192
micro_batch = 1
max_steps = 50_000
optimizer = "adafactor"
lr = 3e-4
min_lr = 0.0
lr_decay = "linear"
lr_warmup_steps = 500
weight_decay = 0.0
eval_every = 1000
save_every = 500
recompute = "selective"
compile = True
