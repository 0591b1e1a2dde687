"""How good a model is: the likelihood it gives to held-out text, and the programs it writes.

    python evaluate.py likelihood --init_from=out/toy --data=data/stdlib
    python evaluate.py passk --tasks=HumanEval.jsonl.gz --samples=20 --k=1,10 --temperature=0.8
    python evaluate.py check --tasks=mine.jsonl     # do the references pass their own tests?
    torchrun --nproc_per_node=8 evaluate.py passk …     # each process writes its share

Settings are listed by `python evaluate.py passk --help`, `python evaluate.py likelihood --help`
and `python evaluate.py check --help`.

pass@k, from top to bottom: tasks --generate--> answers --extract--> programs --judge--> verdicts
--count--> a report. The sandbox judges while the model writes the next batch.

    OUT/samples.jsonl, verdicts.jsonl, settings.json    as they come (results.py)
    OUT/report.md, report.json, failures.html           at the end (report.py)

The same command goes on where it was stopped or killed. A sample's noise depends on its task's
place in the file and its own number, not on its batch or process.

Not covered: judging samples that another program wrote; models larger than one device.
"""
if __name__ == "__main__":  # before the slow imports: Ctrl-C during them prints no traceback
    from configurator import begin
    begin()

import hashlib
import json
import os
import platform
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import files
import huggingface
import parallel
import report
from configurator import Float, Int, Mistake, Seed, configure, shortened, visible
from decode import Decoding, completion, decode, settled, write
from extract import extract
from families import ASKED
from infill import cut
from likelihood import held_out, score_rows
from model import pick_device
from results import Results, check_settings, weights_fingerprint
from run import Run
from sample import Stop, load
from sandbox import Sandbox, cores
from tasks import MESSAGE, message, program, read_tasks, reference


@dataclass
class Model:
    """Which model, and where it runs."""
    init_from: str = ""  # folder of a run or checkpoint, or Hub name; empty: the newest run in out/
    objective: ASKED["objective"] | None = None  # none: as the folder says
    shift: bool | None = None  # predict token i at position i - 1; none: as the folder says
    block_size: ASKED["block_size"] | None = None  # K; none: as the folder says
    mask_token: str = ""  # name of the mask, where the folder does not say
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on fast GPUs


@dataclass
class Likelihood(Model):
    data: str = "data/stdlib"  # folder of tokens (loader.py), or .jsonl of samples (sft.py)
    split: Literal["train", "val"] = "val"  # which split of the folder
    windows: Int(1, 2**31) = 32  # how many windows or rows, spread evenly over the split
    context: Int(0, 2**20) = 0  # tokens per window; 0: as many as the model reads
    canvas: Int(0, 2**20) = 0  # (samples, bidirectional) tokens of a completion with its <eos>
    left_to_right: bool | None = None  # also this order's; none: for blocks (K forwards, else T)
    draws: Int(2, 2**16) = 8  # masks per window where the NELBO cannot be enumerated
    seed: Seed = 0  # of these masks; 0 is what train.py takes
    batch: Int(1, 2**16) = 8  # windows per forward
    out: str = ""  # file for the figures, as JSON


@dataclass
class Judging:
    """Which tasks, and how programs are run."""
    tasks: str = ""  # file of tasks in HumanEval's or MBPP's schema: .jsonl, .jsonl.gz or .json
    limit: Int(0, 2**31) = 0  # only that many, the first ones; 0: all
    shown_tests: Int(0, 2**10) = 3  # (MBPP) how many of its tests a prompt shows; EvalPlus: 1
    seconds: Float(0.01, 86400) = 3.0  # a program's time
    memory_mb: Int(64, 2**20) = 512  # and memory
    workers: Int(0, 1024) = 0  # programs that a process runs at once; 0: its share of the cores
    unsafe_execution: bool = False  # run programs even where the system cannot contain them


@dataclass
class PassK(Judging, Model, Decoding):
    samples: Int(1, 2**16) = 1  # n, answers per task
    k: Int(1, 2**16) | tuple = 1  # of pass@k, one or several, such as 1,10; none above n
    style: Literal["base", "instruct"] = "base"  # continue the prompt, or answer a chat message
    answer_prefix: str = ""  # (instruct) how the answer begins, such as "```python\n"
    extraction: Literal["auto", "none"] = "auto"  # extract.py; none: the prompt and all of the text
    max_new_tokens: Int(1, 2**20) = 512  # longest answer, in tokens
    check_references: bool = True  # refuse tasks whose reference fails their tests
    batch: Int(1, 2**16) = 16  # answers that are written at once
    out: str = ""  # folder of the results; empty: out/passk_MODEL_TASKS


# --- likelihood -----------------------------------------------------------------------------------

def likelihood(argv):
    """`evaluate.py likelihood`. Returns the exit status."""
    cfg, _ = configure(Likelihood, argv, "likelihood")
    if cfg.out:
        files.check_out(cfg.out)
    world = parallel.start(pick_device(cfg.device))
    loaded = load(cfg, world.device)
    rows = held_out(cfg, loaded)
    scores = score_rows(cfg, loaded, rows, world)
    settings = model_settings(loaded) | {"data": cfg.data, "split": cfg.split,
                                         "context": rows.x0.shape[1], "windows": len(rows.x0)}
    if cfg.canvas:
        settings["canvas"] = cfg.canvas
    if scores["nelbo_stderr"]:
        settings |= {"draws": cfg.draws, "seed": cfg.seed}
    world.say(report.likelihood_table(scores, settings))
    if cfg.out and world.rank == 0:
        scores = files.without_nan(scores)
        files.write_json(cfg.out, {"scores": scores, "settings": settings})
    world.leave()
    return 0


# --- what decides a score -------------------------------------------------------------------------

def model_settings(loaded):
    """{name: value}: what was loaded, and on what it runs."""
    model, tok, recipe = loaded
    weight = model.embed_tokens.weight
    device = weight.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(weight.device)
    files_of_weights = huggingface.weight_files(tok.folder).values()
    known = {"model": str(tok.folder), "weights": weights_fingerprint(files_of_weights),
             "objective": recipe.objective, "shift": recipe.shift, "mask_id": recipe.mask_id}
    if recipe.objective == "block":
        known["block_size"] = recipe.block_size
    return known | {"dtype": str(weight.dtype).removeprefix("torch."), "device": device,
                    "torch": torch.__version__, "python": platform.python_version()}


def passk_settings(cfg, loaded, layers):
    """{name: value} of all that decides pass@k, as JSON has it. layers: see Sandbox."""
    tok = loaded[1]
    decoding = {f.name: getattr(cfg, f.name) for f in fields(Decoding) if f.name != "graphs"}
    settings = model_settings(loaded) | decoding
    for name in ("max_new_tokens", "samples", "style", "extraction", "limit", "shown_tests"):
        settings[name] = getattr(cfg, name)
    settings["template"] = "none"
    if cfg.style == "instruct":
        template = str(tok.jinja or tok.config.get("chat_template"))
        settings["template"] = hashlib.sha256(template.encode()).hexdigest()[:16]
        settings |= {"message": MESSAGE, "answer_prefix": cfg.answer_prefix}
    digest = hashlib.sha256(Path(cfg.tasks).read_bytes()).hexdigest()
    active = [name for name, is_active in layers.items() if is_active]
    settings |= {"tasks": cfg.tasks, "tasks_sha256": digest, "sandbox_seconds": cfg.seconds,
                 "sandbox_memory_mb": cfg.memory_mb, "sandbox": ", ".join(active) or "none"}
    return json.loads(json.dumps(settings))


# --- pass@k: generate, extract, judge, count ------------------------------------------------------

def prompt_ids(task, tok, style="base", answer_prefix=""):
    """What the model reads of a task, a list of ids."""
    if style == "instruct":
        ids = tok.chat([{"role": "user", "content": message(task)}])
        return ids + tok.encode(answer_prefix)
    ids = tok.encode(task.prompt)
    if tok.bos_id is not None:
        ids = [tok.bos_id, *ids]
    return ids


def prompt_with_room(task, loaded, cfg):
    """The ids of a task's prompt, and how many tokens it may be answered in."""
    model, tok, _ = loaded
    ids, context = prompt_ids(task, tok, cfg.style, cfg.answer_prefix), model.cfg.context
    if len(ids) >= context:
        raise Mistake(f"{task.where}: the prompt of {shortened(task.task_id)} has {len(ids)} "
                      f"tokens, the model's context only {context}: leave the task out")
    return ids, min(cfg.max_new_tokens, context - len(ids))


def generate(loaded, how, texts, rows, stop):
    """Write a batch of texts. Returns (ids, forwards that wrote in each, seconds), or None if
    stopped. texts, ids: lists of lists. rows: their numbers in the random streams."""
    model, tok, recipe = loaded
    ids = [list(text) for text in texts]
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(text) for text in texts], device=device)
    forwards = torch.zeros_like(lengths)
    began = time.perf_counter()
    for step in decode(model, tok, recipe, texts, how, rows):
        write(ids, step)
        inside = step.positions < lengths[step.rows][:, None]  # not what only fills a last block
        forwards[step.rows] += (step.taken & inside).any(1)
        if stop.asked:
            return None
    return ids, forwards.tolist(), time.perf_counter() - began


def sample_of(task, row, written, cfg, tok):
    """A line of samples.jsonl. written: the ids after the prompt, None where nothing is written."""
    ids = completion(written, tok.stop_ids)
    whole = tok.decode(ids)
    text = cut(whole, cfg.stop)
    ended = len(ids) < len(written) and written[len(ids)] is not None  # by a stop id, which counts
    code, found = task.prompt + text, True
    if cfg.extraction == "auto":
        code, found = extract(task, cfg.answer_prefix + text)
    return {"task_id": task.task_id, "solution": code, "row": row, "sample": row % cfg.samples,
            "answer": text, "found": found, "tokens": len(ids) + ended,
            "truncated": len(ids) == len(written) and text == whole,
            "all_eos": not ids and ended}


class Judge:
    """Programs on their way through the sandbox, and the bar that shows how many passed."""

    def __init__(self, tasks, results, sandbox, bar):
        self.tasks, self.results, self.sandbox, self.bar = tasks, results, sandbox, bar
        self.waiting = {}  # row: Future
        self.tokens, self.seconds = 0, 1e-9  # written since the start

    def submit(self, row):
        task = self.tasks[row // self.results.n]
        code = self.results.samples[row]["solution"]
        self.waiting[row] = self.sandbox.submit(program(task, code))

    def collect(self):
        """Write down the verdicts that are there."""
        done = [row for row, future in self.waiting.items() if future.done()]
        for row in done:
            verdict = self.waiting.pop(row).result()
            self.results.add("verdicts", {"row": row} | asdict(verdict))
        known = self.results.verdicts.values()
        passed = sum(verdict["status"] == "passed" for verdict in known) / max(1, len(known))
        speed = self.tokens / self.seconds
        self.bar.set_postfix_str(f"passed {passed:.1%}, {speed:.0f} tokens/s", refresh=False)
        self.bar.update(len(done))


def score_tasks(cfg, loaded, tasks, prompts, results, sandbox, world, stop):
    """Write and judge what is missing, this process's share of it, until it is done or stopped."""
    n = cfg.samples
    rows = [row for row in range(len(results)) if row not in results.verdicts]
    rows = rows[world.rank::world.size]
    missing = [row for row in rows if row not in results.samples]
    with tqdm(total=len(rows), unit=" samples", disable=world.rank > 0) as bar:
        judge = Judge(tasks, results, sandbox, bar)
        for row in rows:
            if row in results.samples:  # written before a kill
                judge.submit(row)
        for start in range(0, len(missing), cfg.batch):
            part = missing[start:start + cfg.batch]
            texts = [[*ids, *[None] * room] for ids, room in (prompts[row // n] for row in part)]
            written = generate(loaded, cfg, texts, part, stop)
            if written is None:
                break
            all_ids, forwards, seconds = written
            for place, row in enumerate(part):
                task, begin = tasks[row // n], len(prompts[row // n][0])
                line = sample_of(task, row, all_ids[place][begin:], cfg, loaded[1])
                line |= {"forwards": forwards[place], "seconds": seconds / len(part)}
                results.add("samples", line)
                judge.submit(row)
                judge.tokens += line["tokens"]
            judge.seconds += seconds
            judge.collect()
        while judge.waiting and not stop.asked:
            time.sleep(0.01)
            judge.collect()


def wait_for_others(results, stop):
    """Read what the other processes write until it is all there. Returns whether it is."""
    while not stop.asked:
        results.read()
        if len(results.verdicts) == len(results):
            return True
        time.sleep(0.2)
    return False


# --- pass@k: the command --------------------------------------------------------------------------

def check_passk(cfg):
    """Raise Mistake for settings that do not fit each other. Returns the ks of pass@k."""
    ks = cfg.k if isinstance(cfg.k, tuple) else (cfg.k,)
    for k in ks:
        if type(k) is not int or not 1 <= k <= cfg.samples:
            raise Mistake(f"k={shortened(k)} must be a whole number from 1 to samples="
                          f"{cfg.samples}: pass@k needs at least k samples of a task")
    if cfg.samples > 1 and cfg.temperature < 1e-5 and not cfg.alg_temp:
        raise Mistake(f"samples={cfg.samples} at temperature 0 are the same answer every time: "
                      "give --temperature=0.8 or another")
    if cfg.answer_prefix and cfg.style != "instruct":
        raise Mistake("answer_prefix is for --style=instruct: a base model continues the prompt")
    return sorted(set(ks))


def tasks_of(cfg):
    if not cfg.tasks:
        raise Mistake("no tasks: name a file of them with --tasks=FILE.jsonl, such as "
                      "data/functions/test.jsonl")
    return read_tasks(cfg.tasks, cfg.shown_tests)[:cfg.limit or None]


def open_sandbox(cfg):
    """A Sandbox. Raises Mistake where programs cannot be contained here."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's on this machine
    workers = cfg.workers or max(1, cores() // processes)
    return Sandbox(workers, cfg.seconds, cfg.memory_mb, cfg.unsafe_execution)


def failing_references(tasks, sandbox):
    """[(Task, Verdict)] of those whose own reference does not pass their tests."""
    known = [task for task in tasks if reference(task)]
    verdicts = sandbox.judge(program(task, reference(task)) for task in known)
    return [(task, v) for task, v in zip(known, verdicts) if v.status != "passed"]


def refuse_failing(tasks, sandbox):
    failing = failing_references(tasks, sandbox)
    if failing:
        task, verdict = failing[0]
        others = f" and {len(failing) - 1} more" if len(failing) > 1 else ""
        raise Mistake(f"{task.where}: {task.task_id}{others}: the reference fails the tests "
                      f"({verdict.status}: {verdict.detail}); `python evaluate.py check` lists "
                      "them all, --check_references=false scores them as they are")


def check(argv):
    """`evaluate.py check`. Returns the exit status."""
    cfg, _ = configure(Judging, argv, "check")
    tasks = tasks_of(cfg)
    with open_sandbox(cfg) as sandbox:
        failing = failing_references(tasks, sandbox)
    for task, verdict in failing:
        print(f"{task.where}: {task.task_id}: {verdict.status}: {visible(verdict.detail)}")
    known = sum(bool(reference(task)) for task in tasks)
    print(f"{len(tasks)} tasks, {known} with a reference, {len(failing)} of these fail")
    return 1 if failing else 0


def open_results(folder, cfg, settings, tasks, run, world):
    """The Results of a folder, made or found, ready for what is missing."""
    results = Results(folder, tasks, cfg.samples)

    def prepare():
        below = next(path for path in (folder, *folder.parents) if path.exists())
        if not below.is_dir():
            raise Mistake(f"out={shortened(str(folder))} cannot be a folder: {below} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        run.take_lock()
        check_settings(folder, settings)
        results.read()
        results.join()

    world.first(prepare)
    results.read()
    parallel.wait_for_all()  # nobody writes before all have read
    results.open(world.rank)
    return results


def passk(argv):
    """`evaluate.py passk`. Returns the exit status."""
    cfg, _ = configure(PassK, argv, "passk")
    ks, tasks = check_passk(cfg), tasks_of(cfg)
    world, stop = parallel.start(pick_device(cfg.device)), Stop()
    with ExitStack() as stack:
        sandbox = stack.enter_context(open_sandbox(cfg))  # before the model: it forks
        if cfg.check_references:
            world.first(lambda: refuse_failing(tasks, sandbox))
        name = Path(cfg.init_from or huggingface.newest_run()).name
        out = cfg.out or f"out/passk_{name}_{Path(cfg.tasks).name.partition('.')[0]}"
        loaded = load(cfg, world.device)
        prompts = [prompt_with_room(task, loaded, cfg) for task in tasks]
        texts = [[*ids, *[None] * room] for ids, room in prompts]
        cfg = settled(cfg, loaded[2], texts, loaded[0].cfg)
        settings = passk_settings(cfg, loaded, sandbox.layers)
        run = Run(out, True, world)
        stack.callback(run.close, after_error=False)
        results = open_results(run.folder, cfg, settings, tasks, run, world)
        stack.callback(results.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        world.say(report.settings_line(settings))
        score_tasks(cfg, loaded, tasks, prompts, results, sandbox, world, stop)
        if world.rank == 0 and wait_for_others(results, stop):
            results.join()
            print(report.write(run.folder, tasks, results, ks, settings))
    if stop.asked:
        world.say(f"stopped: {len(results.samples)} of {len(results)} samples are in {run.folder}; "
                  "the same command goes on")
        return 130
    world.leave()
    return 0


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"likelihood": likelihood, "passk": passk, "check": check}
    if not words or words[0] in ("--help", "-h"):
        print(__doc__)
        return 0
    if words[0] not in commands:
        raise Mistake(f"{shortened(words[0])} is no command: likelihood, passk and check are; "
                      "`python evaluate.py passk --help` lists the settings")
    return commands[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main())
