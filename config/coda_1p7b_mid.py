"""CoDA's mid-training: progressive masking, harder each epoch (arXiv 2510.03270).

    torchrun --nproc_per_node=8 train.py config/coda_1p7b_mid.py

From the paper: about 21B tokens for five epochs, batch 256 x 8192, 50,000 steps, Adafactor with a
peak of 2e-4, and a curriculum of S1 (unmaskable prefix), S2 (truncated suffix) and S3 (spans):
1, 1, 5 % in the first epoch, 20, 20, 25 % in the fifth. The paper's data for this stage:
RedPajama's arXiv, Gutenberg, python-edu, OpenCoder's annealing corpus, Stack v2's Python. Write its
mixture as data/stack/coda.json is written.

From the released code: documents packed into a row see each other (`seg_attn=false`), which
`cross_document` follows; S1 and S2 are drawn per row, as here. Its rates are constant, where this
file follows the paper's curriculum.

Ours: S3 is drawn per row too; warmup, weight decay and the last learning rate, as in
config/coda_1p7b.py.

Memory and time: `python train.py config/coda_1p7b_mid.py --dry_run=true --ranks=8`.
Data: `python -m data.stack.prepare --mixture=YOURS.json --out=data/coda_mid --tokens=21e9 \\
    --tokenizer=Qwen/Qwen3-1.7B`.
"""
out = "out/coda_1p7b_mid"
init_from = "out/coda_1p7b"
data = "data/coda_mid"

objective = "bidirectional"
shift = True
schedule = "uniform"
t_min = 1e-3
strategies = ((0.01, 0.01, 0.05),
              (0.05, 0.05, 0.10),
              (0.10, 0.10, 0.15),
              (0.15, 0.15, 0.20),
              (0.20, 0.20, 0.25))

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 2048, 28, 16, 8, 128, 6144
vocab_size = 151936
rope_theta, norm_eps = 1e6, 1e-6
qk_norm = True
tie_embeddings = True

context = 8192
cross_document = True  # as in the released code
batch_tokens = 256 * 8192
micro_batch = 1
max_steps = 50_000
optimizer = "adafactor"
lr = 2e-4
min_lr = 0.0
lr_decay = "linear"
lr_warmup_steps = 500
weight_decay = 0.0
eval_every = 1000
save_every = 500
recompute = "selective"
compile = True
