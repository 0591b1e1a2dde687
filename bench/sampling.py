"""Decoding, side by side: forwards, their time, tokens per second; speed against quality.

    python -m bench.sampling                  # the demo's two models: writes a table
    python -m bench.sampling --quality=true   # also the share of right tokens, with its plot

All ways to decode take turns, in one process with the same threads. Tokens that end a text are
never chosen (eos_penalty=1e6), so that every text is as long as asked. Where a model's folder is
not there, random weights of config/toy.py's size take its place, and the table says so: their times
count, their tokens per forward do not.

Not covered: GPUs (bench/sampling_gpu.py), training (bench/train_cpu.py), pass@k.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import platform
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import decode as decode_file
import huggingface
from caches import BlockReader
from configurator import Float, Int, Mistake, Name, configure
from decode import Decoding, decode, write
from diffusion import Recipe
from files import check_out, write_text
from loader import Windows
from model import ModelConfig, Transformer

matplotlib.use("Agg")  # draws to files, on machines without a screen too
import matplotlib.pyplot as plt


@dataclass
class Config:
    init_from: Name = "out/toy"  # the block model's folder
    ar: Name = "out/toy_ar"  # the autoregressive model's folder
    data: Name = "data/stdlib"  # prepared folder whose held-out code is gone on with
    new_tokens: Int(8, 2**16) = 256  # tokens written in each text
    rounds: Int(1, 1000) = 3  # how often all is measured, each time with another prompt
    threads: Int(1, 1024) = 1  # of PyTorch; on a busy machine more are slower
    temperature: Float(1e-4, 100) = 0.8  # of the rows that sample
    quality: bool = False  # also measure and draw speed against quality
    prefixes: Int(1, 2**20) = 256  # held-out prefixes, for quality
    out: Name = "bench/results/sampling.md"  # where the tables go; the plot beside them, as .png


TURN = 8  # forwards of one way, before it is another's turn
PROMPT = 64  # tokens before those that are written
TARGET = 8  # tokens that are compared with the file's, after each prefix
TOY = ModelConfig(vocab_size=4096, d_model=192, n_layer=4, n_head=3, n_kv_head=1, head_dim=64,
                  d_ff=512, context=2**17)


# --- the models -----------------------------------------------------------------------------------

def random_model(cfg, device="cpu", dtype=torch.float32):
    """A model of random weights, drawn where it will run."""
    with torch.device("meta"):  # shapes alone
        model = Transformer(cfg)
    generator = torch.Generator(device).manual_seed(0)
    weights = {name: torch.ones(p.shape, dtype=dtype, device=device)
               for name, p in model.named_parameters()}
    for p in weights.values():
        if p.dim() == 2:
            p.normal_(std=0.02, generator=generator)
    model.load_state_dict(weights, assign=True)
    return model


def stand_in(vocab_size):
    """What decoding reads of a tokenizer, where there is none."""
    return SimpleNamespace(vocab_size=vocab_size, mask_id=1, pad_id=2, eos_id=3, stop_ids={3},
                           never_chosen={1, 2})


def load_models(cfg):
    """{objective: (model, recipe)}, a tokenizer, and which are random, in words."""
    models, notes, tok = {}, [], None
    for objective, folder in (("block", cfg.init_from), ("ar", cfg.ar)):
        if not Path(folder).is_dir():
            notes.append(f"{objective}: random weights, for lack of {folder}")
            continue
        model, own_tok, recipe = huggingface.load(folder)
        if recipe.objective != objective:
            raise Mistake(f"{folder} was trained with objective={recipe.objective!r}, and one "
                          f"with {objective!r} is needed")
        if tok is not None and own_tok.vocab_size != tok.vocab_size:
            raise Mistake(f"{cfg.init_from} and {cfg.ar} have vocabularies of {tok.vocab_size} and "
                          f"{own_tok.vocab_size} ids: give two models of the same tokenizer")
        tok, models[objective] = own_tok, (model, recipe)
        notes.append(f"{objective}: {folder}")
    tok = tok or stand_in(TOY.vocab_size)
    for objective in ("block", "ar", "bidirectional"):
        if objective not in models:
            model = random_model(replace(TOY, vocab_size=tok.vocab_size))
            models[objective] = model, Recipe(objective, mask_id=tok.mask_id)
        models[objective][0].cfg.context = TOY.context  # far positions take as long as trained ones
    return models, tok, "; ".join([*notes, "bidirectional: random weights"])


def held_out(folder, tok, length, count):
    """`count` pieces of held-out documents, evenly spread, without ends: (count, length) int64."""
    windows = Windows(folder, "val", length, tok.vocab_size)
    pieces = [windows.window(n)[0] for n in range(len(windows))]
    pieces = [piece for piece in pieces if tok.eos_id not in piece]  # which ends each document
    if len(pieces) < count:
        raise Mistake(f"{folder} has {len(pieces)} held-out pieces of {length} tokens, and not "
                      f"{count}: ask for fewer rounds or prefixes")
    return np.stack(pieces)[np.linspace(0, len(pieces) - 1, count).astype(int)]


def prompts_for(cfg, tok):
    """One prompt for each round, lists of PROMPT ids, and what they are, in words."""
    if not isinstance(tok, SimpleNamespace) and Path(cfg.data, "meta.json").is_file():
        return held_out(cfg.data, tok, PROMPT, cfg.rounds).tolist(), "held-out code"
    draws = np.random.default_rng(0).integers(4, tok.vocab_size, (cfg.rounds, PROMPT))
    return draws.tolist(), "random tokens"


# --- ways to decode -------------------------------------------------------------------------------

class CanvasReader(BlockReader):
    """The whole canvas in every forward, with the masks behind the block, as a naive decoder."""

    def __init__(self, model, recipe, canvas, how):
        super().__init__(model, recipe, canvas, how)
        self.length = canvas.tokens.shape[1]

    def columns(self, *_):
        return 0, self.length


BASE, EXACT, AR = "text so far", "exact cache", "autoregressive, cache"
VERIFIED, ONE_BY_ONE = "verified", "left to right, one token a step"


def ways(cfg):
    """{title: (objective, Decoding)}, the rows of the table."""
    how = Decoding(eos_penalty=1e6)
    sampled = replace(how, temperature=cfg.temperature)
    return {
        "full canvas": ("block", replace(how, cache="none")),
        BASE: ("block", replace(how, cache="none")),
        EXACT: ("block", how),
        "threshold 0.9": ("block", replace(how, threshold=0.9)),
        ONE_BY_ONE: ("block", replace(how, confidence="left_to_right")),
        VERIFIED: ("block", replace(how, verified=True)),
        f"{ONE_BY_ONE}, sampled": ("block", replace(sampled, confidence="left_to_right")),
        f"{VERIFIED}, sampled": ("block", replace(sampled, verified=True)),
        AR: ("ar", how),
        f"{AR}, sampled": ("ar", sampled),
        "bidirectional, whole text as a block": ("bidirectional", how),
        "bidirectional, blocks of 32": ("bidirectional", replace(how, block_length=32)),
        "bidirectional, prefix": ("bidirectional", replace(how, block_length=32, cache="prefix")),
        "bidirectional, dual": ("bidirectional", replace(how, block_length=32, cache="dual")),
    }


RATIOS = (  # what the second table compares: the first's over the second's
    ("tokens/s", EXACT, BASE),
    ("tokens/s", BASE, "full canvas"),
    ("tokens/s", VERIFIED, ONE_BY_ONE),
    ("tokens/s", f"{VERIFIED}, sampled", f"{ONE_BY_ONE}, sampled"),
    ("ms per forward", EXACT, AR),
    ("ms per forward", f"{ONE_BY_ONE}, sampled", f"{AR}, sampled"),
    ("ms per forward", VERIFIED, ONE_BY_ONE),
)


class Run:
    """A text that one way writes, a few forwards at a time. seconds, tokens: of each forward."""

    def __init__(self, title, model, recipe, tok, how, prompt, new_tokens):
        self.text = [*prompt, *[None] * new_tokens]
        self.reader = CanvasReader if title == "full canvas" else BlockReader
        self.steps = decode(model, tok, recipe, [list(self.text)], how)
        self.seconds, self.tokens = [], []

    def go_on(self, forwards):
        """At most so many more forwards. Returns whether there may be others."""
        decode_file.BlockReader = self.reader
        try:
            for _ in range(forwards):
                began = time.perf_counter()
                step = next(self.steps, None)
                if step is None:
                    return False
                self.seconds.append(time.perf_counter() - began)
                self.tokens.append(self.text.count(None))
                write([self.text], step)
                self.tokens[-1] -= self.text.count(None)
        finally:
            decode_file.BlockReader = BlockReader
        return True

    def columns(self):
        return {"forwards": len(self.seconds),
                "tokens per forward": sum(self.tokens[1:]) / max(1, len(self.tokens) - 1),
                "ms per forward": statistics.mean(self.seconds) * 1e3,
                "tokens/s": sum(self.tokens) / sum(self.seconds)}


def measure(cfg, models, tok, prompts):
    """{title: [columns of each round]} and {title: [text of each round]}.

    The ways take turns of a few forwards, so that a busy moment of the machine meets all of them.
    """
    measured, texts = {title: [] for title in ways(cfg)}, {title: [] for title in ways(cfg)}
    for number, prompt in enumerate(tqdm([prompts[0], *prompts], desc="rounds")):
        new_tokens = cfg.new_tokens if number else 8  # at first to warm up
        runs = {title: Run(title, *models[objective], tok, how, prompt, new_tokens)
                for title, (objective, how) in ways(cfg).items()}
        left = list(runs)
        while left:
            left = [title for title in left if runs[title].go_on(TURN)]
        for title, run in runs.items():
            if number:
                measured[title].append(run.columns())
                texts[title].append(run.text)
    return measured, texts


def ratios(measured, name, title, base):
    return [a[name] / b[name] for a, b in zip(measured[title], measured[base])]


def table(measured, texts):
    """Markdown lines: medians over the rounds, ratios within each, and which texts are the same."""
    names = ("forwards", "tokens per forward", "ms per forward", "tokens/s")
    lines = [f"| way | {' | '.join(names)} | against {BASE} |", "|---|---|---|---|---|---|"]
    for title, rounds in measured.items():
        middle = {name: statistics.median(r[name] for r in rounds) for name in names}
        ratio = statistics.median(ratios(measured, "tokens/s", title, BASE))
        lines.append(f"| {title} | {middle['forwards']:g} | {middle['tokens per forward']:.2f} | "
                     f"{middle['ms per forward']:.2f} | {middle['tokens/s']:,.1f} | {ratio:.2f} |")
    lines += ["", "| ratio | median of the rounds | range |", "|---|---|---|"]
    for name, title, base in RATIOS:
        found = ratios(measured, name, title, base)
        lines.append(f"| {name}: {title} / {base} | {statistics.median(found):.2f} | "
                     f"{min(found):.2f} to {max(found):.2f} |")
    for title, base in (("full canvas", EXACT), (BASE, EXACT), (VERIFIED, ONE_BY_ONE),
                        (f"{VERIFIED}, sampled", f"{ONE_BY_ONE}, sampled")):
        same = sum(a == b for a, b in zip(texts[title], texts[base]))
        lines += ["", f"Texts of `{title}` equal to those of `{base}`: {same} of "
                  f"{len(texts[base])}."]
    return lines


# --- speed and quality ----------------------------------------------------------------------------

def rules(K):
    """{family: {label: Decoding}}, by block size."""
    how = Decoding(eos_penalty=1e6)
    return {
        "steps": {f"{n}": replace(how, steps=n) for n in (8, 4, 2, 1) if n <= K},
        "threshold": {f"{x}": replace(how, threshold=x)
                      for x in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)},
        "entropy_bound": {f"{x}": replace(how, entropy_bound=x) for x in (0.3, 1.0, 3.0, 6.0)},
        "factor": {f"{x}": replace(how, factor=x) for x in (0.5, 1.0, 2.0, 3.0)},
        "left_to_right": {"1": replace(how, confidence="left_to_right")},
        "verified": {"": replace(how, verified=True)},
    }


def score(model, recipe, tok, how, pieces, batch=32):
    """Tokens per forward of a text, the share that is right and its standard error, when the last
    TARGET tokens of pieces (N, length) int64 are decoded from those before."""
    forwards, shares = 0, []
    for start in range(0, len(pieces), batch):
        wanted = pieces[start:start + batch].tolist()
        texts = [piece[:-TARGET] + [None] * TARGET for piece in wanted]
        for step in decode(model, tok, recipe, texts, how):
            write(texts, step)
            forwards += int(step.taken.any(1).sum())  # a text that is done has no more of them
        same = np.array(texts)[:, -TARGET:] == np.array(wanted)[:, -TARGET:]
        shares += same.mean(1).tolist()
    error = np.std(shares) / len(shares)**0.5
    return len(pieces) * TARGET / forwards, float(np.mean(shares)), float(error)


def quality(cfg, model, recipe, tok, path):
    """Markdown lines: the table of all rules. Draws it into `path`."""
    pieces = held_out(cfg.data, tok, PROMPT + TARGET, cfg.prefixes)
    lines = ["", f"The next {TARGET} tokens of {len(pieces)} held-out prefixes of {PROMPT} tokens, "
             f"K = {recipe.block_size}, greedy, in batches of 32. Forwards are counted per text, "
             "the prompt's included. ±: standard error over the prefixes.", "",
             "| rule | tokens per forward | tokens equal to the file's |", "|---|---|---|"]
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for family, members in tqdm(rules(recipe.block_size).items(), desc="rules"):
        points = []
        for label, how in members.items():
            speed, share, error = score(model, recipe, tok, how, pieces)
            points.append((speed, share, error))
            lines.append(f"| {family} {label} | {speed:.2f} | {share:.2%} ± {error:.2%} |")
        axis.errorbar(*zip(*points), fmt="o-", ms=4, lw=1, elinewidth=0.4, label=family)
    axis.set(xlabel="tokens per forward", ylabel=f"share of {TARGET} tokens equal to the file's")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return lines + ["", f"![speed and quality]({path.name})"]


# --- all of it ------------------------------------------------------------------------------------

def heading(cfg, words, notes, kind):
    """Markdown lines: the command, the machine and what was measured."""
    return [f"# Decoding on the CPU, {date.today()}", "",
            f"    python -m bench.sampling {' '.join(words)}".rstrip(), "",
            f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}, "
            f"torch {torch.__version__}; float32. {notes}. {cfg.rounds} rounds of one text each, "
            f"{PROMPT} tokens of {kind} and {cfg.new_tokens} that are written, the ways taking "
            f"turns of {TURN} forwards. Sampled: temperature {cfg.temperature}. Tokens per forward "
            "are those after the prompt's forward; random weights' mean nothing.", ""]


def main(argv=None):
    cfg, _ = configure(Config, argv)
    path = Path(cfg.out)
    check_out(path)
    torch.set_num_threads(cfg.threads)
    models, tok, notes = load_models(cfg)
    prompts, kind = prompts_for(cfg, tok)
    if cfg.quality and kind == "random tokens":
        raise Mistake(f"quality needs a trained model in {cfg.init_from} and code in {cfg.data}")
    words = sys.argv[1:] if argv is None else argv
    lines = heading(cfg, words, notes, kind) + table(*measure(cfg, models, tok, prompts))
    if cfg.quality:
        lines += quality(cfg, *models["block"], tok, path.with_suffix(".png"))
    on_gpu = ", ".join(sorted(found.name for found in path.parent.glob("sampling_*.md")))
    text = "\n".join([*lines, "", "On a GPU: `python -m bench.sampling_gpu`: "
                      f"{on_gpu or 'not run on a GPU yet'}.", ""])
    print(text)
    write_text(path, text)


if __name__ == "__main__":
    main()
