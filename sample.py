"""Writing code with a trained model, from the command line: prompts in, text out.

    python sample.py --prompt "def fibonacci(n):"         # the run in out/ that saved last
    python sample.py --init_from=out/toy_ar --temperature=0.8 --samples=3
    cat file.py | python sample.py --prompt=-             # all of stdin is the prompt
    python sample.py --prompts=prompts.txt --out=completions.jsonl
    python sample.py --infill=file.py --lines=10:20 --diff=true
    python sample.py --chat=true                          # a conversation, in a terminal

How tokens are chosen is the concern of decode.py, whose settings are settings here too; gaps inside
a text are that of infill.py, pictures that of watch.py. The first Ctrl-C ends the writing and keeps
what is written, a second one ends the program.

Not covered: a server; docs/serving.md says which engines run an exported folder.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from typing import Literal

import torch
from tqdm import tqdm

import huggingface
from configurator import Int, Mistake, configure, shortened, visible
from decode import Decoding, decode, settled, write
from families import ASKED
from files import check_out
from infill import MARKER, Gap, Scores, cut, diff, gap_of, read_file, split_at_marker
from model import fast_dtype, pick_device
from prompts import completions, read_prompts, read_stdin, save_lines


@dataclass
class Config(Decoding):
    prompt: str = "def fibonacci(n):"  # the text to continue, or with a <FILL> to fill; -: stdin
    prompts: str = ""  # file of prompts, a line or a JSON object each, for JSON lines; -: stdin
    out: str = ""  # (prompts) file for the JSON lines; empty: stdout
    batch: Int(1, 2**16) = 16  # (prompts) how many texts are written at once
    infill: str = ""  # file with a gap, which --lines or a <FILL> in it says; it is only read
    lines: str = ""  # (infill) the first and the last line to replace, such as 10:20
    fill_tokens: Int(0, 2**20) = 0  # in a gap; 0: the likeliest length, or where the model ends it
    diff: bool = False  # print what filling the gap changes, as a unified diff
    init_from: str = ""  # folder of a run or checkpoint, or Hub name; empty: the newest run in out/
    objective: ASKED["objective"] | None = None  # none: as the folder says
    shift: bool | None = None  # predict token i at position i - 1; none: as the folder says
    block_size: ASKED["block_size"] | None = None  # K; none: as the folder says
    mask_token: str = ""  # name of the mask, where the folder does not say
    chat: bool = False  # the prompt is a user's message in the folder's chat template
    samples: Int(1, 1024) = 1  # how many completions
    max_new_tokens: Int(1, 2**20) = 128  # longest completion, in tokens
    animate: bool = False  # draw the text in the terminal while it is written
    html: str = ""  # file for a page that shows, step by step, how the text was written
    stats: bool = False  # print how close to left to right the text was written
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where a GPU has it


# --- what is asked --------------------------------------------------------------------------------

def check(cfg, given):
    """Raise Mistake for settings that exclude each other. given: set of the keys that were set."""
    sources = [name for name in ("prompt", "prompts", "infill") if name in given]
    if len(sources) > 1:
        raise Mistake(f"{' and '.join(sources)} each say what to write: give one")
    if cfg.chat and cfg.infill:
        raise Mistake("chat and infill exclude each other: an answer stands at the end of a text")
    for name, needed in (("lines", "infill"), ("out", "prompts")):
        if getattr(cfg, name) and not getattr(cfg, needed):
            raise Mistake(f"{name}={shortened(getattr(cfg, name))} goes with --{needed}=FILE")
    for name in ("animate", "html"):
        if getattr(cfg, name) and (cfg.prompts or cfg.samples > 1):
            raise Mistake(f"{name} shows a single text: it goes with neither prompts nor samples")
    for name in ("prompts", "out", "infill", "html"):
        check_name(name, getattr(cfg, name))
    for path in (cfg.out, cfg.html):
        if path:
            check_out(path)
            if os.path.realpath(path) in map(os.path.realpath, (cfg.prompts, cfg.infill)):
                raise Mistake(f"{path} is what is read, too: choose another name")


def check_name(setting, path):
    """Raise Mistake for what no file can be called."""
    try:
        name = os.fsencode(os.path.basename(path))
    except UnicodeEncodeError:
        name = b"\0"
    if "\0" in path or b"\0" in name or len(name) > 200:
        raise Mistake(f"{setting}={shortened(path)} cannot be the name of a file")


def prompt_gap(text, loaded, cfg, earlier=()):
    """A Gap at the end of a prompt. earlier: the messages before it in a conversation.

    A special token's name in a message is that token (Tokenizer.chat); in other prompts it is text.
    Raises Mistake where the prompt is empty, or longer than the model's context.
    """
    model, tok, _ = loaded
    if not text.strip():
        raise Mistake('the prompt is empty; --prompt "def fibonacci(n):" is one')
    if cfg.chat:
        ids = tok.chat([*earlier, {"role": "user", "content": text}])
        text = ""  # the answer alone is printed
    else:
        ids = tok.encode(text)
        if tok.bos_id is not None:
            ids = [tok.bos_id, *ids]
    if not ids:
        raise Mistake("the prompt has no tokens: write another one")
    context = model.cfg.context
    if len(ids) >= context:
        raise Mistake(f"the prompt has {len(ids)} tokens, the model's context only {context}: "
                      "shorten it")
    return Gap(text, "", ids, [], [min(cfg.max_new_tokens, context - len(ids))])


def begin_with(loaded, cfg, gap, out):
    """The settings with nothing left open, once they are printed. gap: the longest one."""
    model, tok, recipe = loaded
    how = settled(cfg, recipe, [gap.ids(n) for n in gap.lengths], model.cfg)
    kind = recipe.objective
    if kind == "block":
        kind = f"block, K = {recipe.block_size}"
    shift = "shift" if recipe.shift else "no shift"
    weight = model.embed_tokens.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    print(f"--- {tok.folder}: {kind}, {shift}, mask {tok.mask_id}, {dtype} on "
          f"{weight.device.type}", file=out)
    chosen = ", ".join(f"{name}={value!r}" for name, value in decisive(how).items())
    print(f"--- {chosen}", file=out, flush=True)
    return how


def decisive(how):
    """{name: value} of the settings that decide the text: some always, the others if changed."""
    names = ["confidence", "block_length", "cache", "temperature", "seed"]
    if not how.verified and (how.threshold, how.entropy_bound, how.factor) == (None, None, None):
        names.append("steps")
    chosen = {}
    for f in fields(Decoding):
        value = getattr(how, f.name)
        if f.name in names or value != f.default and f.name != "graphs":
            chosen[f.name] = value
    return chosen | {"max_new_tokens": how.max_new_tokens}


# --- writing a batch ------------------------------------------------------------------------------

class Stop:
    """The handler of Ctrl-C and SIGTERM: the first asks for an end, the next one is the end."""
    asked = False

    def __call__(self, number, frame):
        if self.asked:
            sys.exit(128 + number)
        self.asked = True


@dataclass
class Batch:
    """Texts that were written. ids: lists of int, None where a mask is left. seconds: float.
    forwards: int, the forwards that wrote in a text, of all texts. trace: watch.Trace or None."""
    ids: list
    seconds: float
    forwards: int
    trace: object


def run(loaded, how, texts, stop, rows=None, look=()):
    """Write texts in one batch. rows: see decode. look: functions of each step and the texts."""
    model, tok, recipe = loaded
    steps = decode(model, tok, recipe, texts, how, rows)
    trace = None
    if how.html or how.stats:
        from watch import Trace
        trace = Trace(texts, tok)
        steps = trace.record(steps)
    if how.animate:
        from watch import animate
        steps = animate(steps, texts, tok)
    ids = [list(text) for text in texts]
    lengths = torch.tensor([len(text) for text in texts], device=model.embed_tokens.weight.device)
    forwards, began = 0, time.perf_counter()
    for step in steps:
        write(ids, step)
        inside = step.positions < lengths[step.rows][:, None]  # not what only fills a last block
        forwards += (step.taken & inside).any(1).sum()
        for see in look:
            see(step, ids)
        if stop.asked:
            break
    steps.close()
    return Batch(ids, time.perf_counter() - began, int(forwards), trace)


def speed(gap, batch, tok, stopped):
    """The last line of what is printed. Stop ids count."""
    count = 0
    for ids in batch.ids:
        end = gap.end(ids, tok.stop_ids)
        count += len(gap.written(ids, tok.stop_ids)) + (end not in ([], [None]))
    seconds = max(batch.seconds, 1e-9)
    stopped = ", stopped" if stopped else ""
    return (f"--- {count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s, "
            f"{count / max(1, batch.forwards):.2f} tokens per forward{stopped}")


class Stream:
    """Prints a text from left to right, as far as it is final."""

    def __init__(self, gap, tok, how):
        self.gap, self.tok, self.how = gap, tok, how
        self.begin, self.end = 0, 0  # of the ids that were added last
        self.text, self.printed = "", 0
        self.held = max([1, *map(len, how.stop)]) - 1  # characters that may begin a stop string
        self.begun = False

    def see(self, step, texts):
        """Print what this step made final."""
        if not self.begun:  # here, since the first forward may print a note
            print(self.gap.before, end="", flush=True)
            self.begun = True
        ids = self.gap.written(texts[0], self.tok.stop_ids)
        if self.how.remask:  # until its block is done, a token may be masked again
            ids = ids[:max(0, int(step.positions.min()) - len(self.gap.left))]
        known = self.tok.decode(ids[self.begin:self.end])
        more = self.tok.decode(ids[self.begin:])[len(known):]
        if not more or more.endswith("\ufffd"):  # the first bytes of a character
            return
        self.begin, self.end = self.end, len(ids)
        self.text += more
        self.print_to(min(len(cut(self.text, self.how.stop)), len(self.text) - self.held))

    def print_to(self, end):
        if end > self.printed:
            print(visible(self.text[self.printed:end]), end="", flush=True)
            self.printed = end

    def finish(self, text):
        """text: all that is in the gap. Print what is missing of it, and what comes after."""
        print(visible(text[self.printed:]) + self.gap.after, flush=True)


# --- one text, a conversation, many ---------------------------------------------------------------

def answer(loaded, how, gap, stop, old=None, number=0, titles=True):
    """Write a gap and print it, how.samples times. Returns what is in it the last time, a str.

    old: the text with the gap as it was, for a diff. number: of the first in the random streams.
    """
    tok, several = loaded[1], len(gap.lengths) > 1
    notes = sys.stderr if how.diff else sys.stdout
    texts = [gap.ids(length) for _ in range(how.samples) for length in gap.lengths]
    scores, stream, look = Scores(), None, []
    if several:
        look.append(scores.add)
    elif sys.stdout.isatty() and len(texts) == 1 and not how.animate and not how.diff:
        if titles:
            print("--- sample 1 of 1")
        stream = Stream(gap, tok, how)
        look.append(stream.see)
    batch = run(loaded, how, texts, stop, range(number, number + len(texts)), look)
    for sample in range(how.samples):
        row = sample * len(gap.lengths)
        if several and not stop.asked:
            row += scores.likeliest(row, gap.lengths, notes)
        text = gap.text(batch.ids[row], tok, how.stop)
        if stream:
            stream.finish(text)
            break
        if titles:
            print(f"--- sample {sample + 1} of {how.samples}", file=notes, flush=True)
        whole = gap.before + text + gap.after
        if how.diff:
            print(diff(how.infill or "prompt", old, whole), end="", flush=True)
        elif sys.stdout.isatty():
            print(visible(whole), flush=True)
        else:
            print(whole, flush=True)
    print(speed(gap, batch, tok, stop.asked), file=notes)
    show(how, batch.trace, notes)
    return text


def show(how, trace, out):
    """What html and stats ask for. trace: watch.Trace, or None where they ask for nothing."""
    if how.html:
        from watch import write_page
        write_page(how.html, trace, settings=decisive(how))
        print(f"--- {how.html} shows how it was written", file=out)
    if how.stats:
        from watch import stats
        print(stats(trace), file=out)


def converse(loaded, cfg, stop):
    """Several turns in a terminal; an empty line ends it. Returns the exit status."""
    if cfg.samples > 1:
        raise Mistake(f"samples={cfg.samples} is for a --prompt: a turn has one answer")
    how = begin_with(loaded, cfg, prompt_gap("hello", loaded, cfg), sys.stdout)
    messages = []
    while True:
        stop.asked = True  # here a single Ctrl-C ends the program
        try:
            line = input("> ")
        except EOFError:
            line = ""
        except UnicodeDecodeError as error:
            raise Mistake(f"this is not UTF-8 text: {error.reason}") from error
        if not line.strip():
            return 0
        try:
            gap = prompt_gap(line, loaded, cfg, messages)
        except Mistake as error:
            print(f"--- {error}")
            if messages:
                messages = []
                print("--- a new conversation begins")
            continue
        stop.asked = False
        text = answer(loaded, how, gap, stop, number=len(messages), titles=False)
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


def many(loaded, cfg, stop, entries):
    """Complete all prompts, one JSON object a line. Returns the exit status."""
    gaps, traces = [], []
    for where, entry in entries:
        try:
            if MARKER in entry["prompt"] and not cfg.chat:
                raise Mistake(f"{MARKER} is for a single --prompt")
            gaps.append(prompt_gap(entry["prompt"], loaded, cfg))
        except Mistake as error:
            raise Mistake(f"{where}: {error}") from error
    how = begin_with(loaded, cfg, max(gaps, key=lambda gap: gap.lengths), sys.stderr)

    def write_batch(texts, rows):
        batch = run(loaded, how, texts, stop, rows)
        traces.append(batch.trace)
        return batch.ids, stop.asked

    lines = completions(entries, gaps, loaded[1], how, write_batch)
    with tqdm(total=len(gaps) * how.samples, unit=" texts") as bar:
        if cfg.out:
            save_lines(cfg.out, lines, bar)
        else:
            for line in lines:
                bar.write(line)  # to stdout
                bar.update()
    show(how, joined(traces), sys.stderr)
    return 130 if stop.asked else 0


def joined(traces):
    """Those of several batches as one, a watch.Trace, or None if they are None."""
    whole = traces[0]
    if whole is None:
        return None
    for trace in traces[1:]:
        whole.texts += trace.texts
        whole.rows += trace.rows
        whole.forwards += trace.forwards
        whole.seconds += trace.seconds
    return whole


# --- the script -----------------------------------------------------------------------------------

def load(cfg, device):
    """(Transformer, Tokenizer, Recipe) of the folder that cfg names. device: a torch.device."""
    dtype = cfg.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else fast_dtype(device.type)
    asked = {"objective": cfg.objective, "shift": cfg.shift, "block_size": cfg.block_size}
    return huggingface.load(cfg.init_from or huggingface.newest_run(), device,
                            getattr(torch, dtype), cfg.mask_token, **asked)


def main(argv=None):
    cfg, given = configure(Config, argv)
    check(cfg, given)
    if cfg.prompt == "-":
        cfg.prompt = read_stdin()
    sides, old, entries = None, cfg.prompt, None
    if cfg.prompts:
        entries = read_prompts(cfg.prompts)
    elif cfg.infill:
        old, *sides = read_file(cfg.infill, cfg.lines)
    elif MARKER in cfg.prompt and not cfg.chat:
        sides = split_at_marker(cfg.prompt, "the prompt")
    if sides is None and (cfg.diff or cfg.fill_tokens):
        raise Mistake(f"diff and fill_tokens are for a gap: --infill=FILE, or a {MARKER} in the "
                      "prompt")

    loaded = load(cfg, torch.device(pick_device(cfg.device)))
    stop = Stop()
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    if entries:
        return many(loaded, cfg, stop, entries)
    if cfg.chat and "prompt" not in given:
        if sys.stdin is not None and sys.stdin.isatty():
            return converse(loaded, cfg, stop)
        cfg.prompt = read_stdin()
    if sides is None:
        gap = prompt_gap(cfg.prompt, loaded, cfg)
    else:
        gap = gap_of(*sides, loaded, cfg)
    notes = sys.stderr if cfg.diff else sys.stdout
    how = begin_with(loaded, cfg, gap, notes)
    if sides and not gap.trained:
        print(f"--- {loaded[1].folder} is not known to be trained to fill gaps: expect little",
              file=notes, flush=True)
    answer(loaded, how, gap, stop, old)
    return 130 if stop.asked else 0


if __name__ == "__main__":
    sys.exit(main())
