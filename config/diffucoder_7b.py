"""DiffuCoder's adaptation: Qwen2.5-Coder-7B from causal to bidirectional (arXiv 2506.20639).

    torchrun --nproc_per_node=8 train.py config/diffucoder_7b.py

Any number of GPUs works that divides its 160 rows: 8, 16, 32, 40, 80.

From the paper (§3 and appendix B.1): 65B tokens in 100,000 steps of 160 rows of 4096 (80 H100, two
rows each, about 40 hours), Adam with a peak of 2e-5 after 20,000 steps of warmup and a cosine to
10 %, attention annealed from causal to open over 10,000 steps, 1 % of the rows truncated, 1 % with
a prefix that gets no noise, the head read one position early (shift). The paper says that more
tokens made it worse. Ours: weight decay 0.

Its second stage, mid-training on 16B tokens for four epochs, is the same with other numbers:
    train.py config/diffucoder_7b.py --init_from=out/diffucoder_7b --out=out/diffucoder_7b_mid \\
        --data=data/annealing --anneal_steps=0 --lr=1e-5 --min_lr=1e-6 --lr_warmup_steps=2000

Memory and time: `python train.py config/diffucoder_7b.py --dry_run=true --ranks=80`.
Data: the first stage's (RefineCode and web pages of code) is published only as lists of files;
data/stack/code.json is open. `python -m data.stack.prepare --mixture=data/stack/code.json \\
    --out=data/code_7b --tokenizer=Qwen/Qwen2.5-Coder-7B --bos_token="<|beginoftext|>"`.
"""
out = "out/diffucoder_7b"
init_from = "Qwen/Qwen2.5-Coder-7B"
data = "data/code_7b"
bos_token = "<|beginoftext|>"  # new, as in Dream, whose tokenizer this is: id 151665
mask_token = "<|mask|>"  # and 151666

d_model, n_layer, n_head, n_kv_head, head_dim, d_ff = 3584, 28, 28, 4, 128, 18944
vocab_size = 152064
rope_theta, norm_eps = 1e6, 1e-6
qkv_bias = True
tie_embeddings = False

objective = "bidirectional"
shift = True
schedule = "uniform"
t_min = 1e-3
strategies = ((0.01, 0.01, 0.0),)
anneal_steps = 10_000

context = 4096
batch_tokens = 160 * 4096
micro_batch = 2
max_steps = 100_000
lr = 2e-5
min_lr = 2e-6
lr_warmup_steps = 20_000
weight_decay = 0.0
eval_every = 1000
save_every = 500
recompute = "full"
compile = True
