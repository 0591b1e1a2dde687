"""The weights in the box, assets/toy: the demo's three stages, several times as long.

    python train.py config/toy_ar.py --max_steps=1200 --out=out/box_ar
    python train.py config/toy.py --init_from=out/box_ar --max_steps=600 --out=out/box_cpt
    python train.py config/box.py
    python huggingface.py export out/box --to=assets/toy --dtype=bfloat16

Data: `python -m data.stdlib.prepare` and `python -m data.functions.prepare`. Three hours on two
busy CPU cores. Memory and time of this stage: `python train.py config/box.py --dry_run=true`.
"""
out = "out/box"
init_from = "out/box_cpt"
data = "data/functions/train.jsonl"
val_percent = 1.0

objective = "block"
block_size = 4
shift = False
schedule = "count"

context = 256
batch_tokens = 8 * 256
micro_batch = 8
max_steps = 8000
optimizer = "muon"
lr = 6e-3
min_lr = 1e-5
lr_warmup_steps = 20
eval_every = 2000
eval_windows = 64
save_every = 500
