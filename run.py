"""A run: its folder, resuming, signals, metrics, its model's sizes: what surrounds a training loop.

    out/toy/latest            the name of the newest checkpoint, such as step_0000300
    out/toy/step_0000300/     a checkpoint (checkpoint.py)
    out/toy/metrics.jsonl     one line per step or evaluation
    out/toy/lock              held by the process that writes here

A run that is killed at any moment resumes from its newest checkpoint; what came after is computed
again, with the same numbers.

Not covered: what is in a checkpoint.
"""
import ctypes
import json
import math
import os
import re
import signal
import socket
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from uuid import uuid4

import torch
from tqdm import tqdm

import checkpoint
import files
import huggingface
import parallel
from configurator import Mistake
from model import ModelConfig, fast_dtype


class Run:
    """The folder of a run, opened: `with Run(out, resume, world) as run:`.

    folder: Path. checkpoint: the folder to resume from, or None for a new run. saved: what that
    checkpoint was saved with (see `save`), or None. start: the step to begin with, 0 for a new run.
    stop_signals: the SIGINT and SIGTERM that have come since `begin`; the loop looks at them.
    """

    def __init__(self, out, resume, world):
        self.folder, self.resume, self.world = Path(out), resume, world
        self.checkpoint = self.saved = None
        self.start = 0
        self.lock = self.metrics = None
        self.begun_here = False  # whether this torchrun began the run: see take_lock
        self.track = ignore
        self.handlers = {}
        self.stop_signals = []

    def __enter__(self):
        """Raises Mistake where the folder cannot hold this run. Creates no folder yet."""
        try:
            self.find_checkpoint()
        except BaseException:
            self.close(after_error=True)
            raise
        return self

    def find_checkpoint(self):
        [restarts] = self.world.sum(restarts_of_this_node())
        newest = self.world.first(self.newest_checkpoint)
        begun_here = self.world.first(lambda: self.begun_here)
        if newest is None:
            return
        self.checkpoint = Path(newest)
        if not self.resume and not (restarts and begun_here):
            raise Mistake(f"{self.folder} already holds a run ({self.checkpoint.name}); "
                          "--resume=true continues it, --out=FOLDER starts another")
        self.saved = read_saved(self.checkpoint)
        self.start = self.saved["step"]

    def newest_checkpoint(self):
        """The checkpoint that `latest` names, as a text, or None where no run has begun.

        Takes the lock if there is a folder, so that nobody writes here from now on.
        """
        below = next((p for p in (self.folder, *self.folder.parents) if p.exists()), None)
        if below is not None and not below.is_dir():
            raise Mistake(f"out={str(self.folder)!r} cannot be a folder: {below} is a file")
        if not self.folder.is_dir():
            return None
        self.take_lock()
        names = [p.name for p in self.folder.iterdir()]
        if "latest" in names or any(re.fullmatch(r"step_[0-9]+", name) for name in names):
            return str(huggingface.latest_of(self.folder))
        return None

    def take_lock(self):
        """Two processes that write one run would destroy each other's files.

        The first line of the lock's file names its holder. The second one names the torchrun that
        began the run: after a restart, the same torchrun may continue it without --resume.
        """
        if self.lock is not None or os.name != "posix":
            return
        import fcntl
        path = self.folder / "lock"
        if path.is_symlink() or path.exists() and not path.is_file():
            raise Mistake(f"{path} is not the lock of a run: move it, or choose another --out")
        self.lock = open(path, "a+", encoding="utf-8", errors="replace")
        self.lock.seek(0)
        text = self.lock.read(1000)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            self.lock = None
            holder = text.partition("\n")[0][:200] or "another process"
            raise Mistake(f"{self.folder} is in use by {holder}; wait until it ends, or start "
                          "another run with --out=FOLDER") from None
        except OSError as error:  # a file system without locks
            print(f"{self.folder} cannot be locked ({error.strerror}): "
                  "make sure that no other process writes there", file=sys.stderr)
        if text and not text.startswith("process "):
            raise Mistake(f"{path} is not the lock of a run: move it, or choose another --out")
        self.begun_here = this_launch() in text.splitlines()
        self.write_lock()

    def write_lock(self):
        if self.lock is None:
            return
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        if self.begun_here:
            self.lock.write(this_launch() + "\n")
        self.lock.flush()

    def check_resumed(self, cfg, fixed, free, data):
        """A resumed run must continue as the same run. Other settings may change; that is printed.

        cfg: the settings now. fixed: names of those that must not change. free: names of those that
        may change silently. data: loader.fingerprint of the data now.
        """
        if self.saved is None:
            return
        before, now = self.saved["config"], json.loads(json.dumps(asdict(cfg)))
        changed = [name for name in now if name in before and before[name] != now[name]]
        for name in fixed:
            if name in changed:
                raise Mistake(f"{name}={now[name]} but the run in {self.folder} has "
                              f"{name}={before[name]}: resume with the same settings, or start "
                              "another run with --out=FOLDER")
        if self.saved.get("data", data) != data:
            raise Mistake(f"the data is not what the run in {self.folder} was trained on: it was "
                          "prepared anew. Prepare it as it was, or start "
                          f"another run with --out=FOLDER --init_from={self.folder}")
        news = [f"{name} {before[name]} -> {now[name]}" for name in changed if name not in free]
        if news:
            self.world.say(f"resuming with other settings: {', '.join(news)}")

    def begin(self, cfg):
        """Make the folder, open the metrics, and install the signal handlers.

        From here on SIGINT and SIGTERM save a checkpoint and end the run, after at most one more
        step. In a single process a second signal ends it at once. Under torchrun signals come
        twice, from the terminal and from torchrun, which itself waits only so long.
        """
        def ask_to_stop(number, frame):
            if self.stop_signals and self.world.size == 1:
                sys.exit(128 + number)
            self.stop_signals.append(number)

        self.world.first(self.make_folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, ask_to_stop)
        path = self.folder / "metrics.jsonl" if self.world.rank == 0 else os.devnull
        self.metrics = open(path, "a", buffering=1, encoding="utf-8")  # line by line on the disk
        if self.world.rank == 0:
            self.track = tracker(cfg.log, self.folder, self.start, asdict(cfg))

    def exit_code(self):
        """128 + the signal that ended the run; SIGTERM where only another process received it."""
        number = self.stop_signals[0] if self.stop_signals else signal.SIGTERM
        return 128 + number

    def make_folder(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.take_lock()
        if self.checkpoint is None and self.newest_checkpoint() is not None:
            raise Mistake(f"another process has just made a run in {self.folder}; "
                          "--resume=true continues it, --out=FOLDER starts another")
        self.begun_here = True
        self.write_lock()
        of_ours = r"\.(latest|metrics\.jsonl|samples\.(jsonl|html))\.[0-9]+\.tmp"
        for path in self.folder.iterdir():  # what a process left that was killed while writing it
            if re.fullmatch(of_ours, path.name):
                path.unlink()
        cut_lines(self.folder / "metrics.jsonl", self.start)

    def log(self, values):
        """Write a line of metrics, {name: number} with a `step`. Raises OSError, saying where."""
        finite = files.without_nan(values)
        try:
            self.metrics.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise self.unwritten(error) from error
        self.track(finite)

    def unwritten(self, error):
        """The OSError for metrics that could not be written."""
        return OSError(f"could not write {self.metrics.name}: {error.strerror}; "
                       f"{checkpoint.last_good(self.folder)}")

    def evaluate(self, step, model, score):
        """Score the held-out windows, show and log it. score: a call of diffusion.evaluate."""
        began = time.time()
        scores = score(model)
        parallel.free_gathered(model, self.world)
        values = {f"val_{name}": value for name, value in scores.items()}
        self.log({"step": step, **values, "seconds": time.time() - began})
        if self.world.rank == 0:
            tqdm.write(f"step {step}: val NELBO {scores['nelbo']:.4f} nats per token, "
                       f"{scores['bits_per_byte']:.4f} bits per byte, "
                       f"± {scores['nelbo_stderr']:.4f}")

    def save(self, step, model, optimizer, tok, recipe, cfg, machine, data, beside=None):
        """A checkpoint after `step` steps, with what a resumed run compares itself with.

        beside: see checkpoint.save.

        Raises Mistake, saving nothing, where a weight is not finite.
        """
        norm = parallel.weights_norm(model)
        if not math.isfinite(norm):
            raise Mistake(f"after step {step - 1} the weights' norm is {norm}: they were not "
                          "saved; a lower --lr or --weight_decay usually helps")
        if self.world.rank == 0:
            try:
                os.fsync(self.metrics.fileno())
            except OSError as error:
                raise self.unwritten(error) from error
        settings = {"machine": machine, "config": asdict(cfg), "data": data}
        checkpoint.save(self.folder, step, model, optimizer, tok, recipe, settings, cfg.keep,
                        beside)

    def close(self, after_error):
        """Leave signals as they were, and the folder to others."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for file in (self.metrics, self.lock):
            try:
                if file is not None:
                    file.close()
            except OSError:  # what could not be written cannot be now; that has been said
                if not after_error:
                    raise

    def __exit__(self, kind, error, trace):
        self.close(after_error=error is not None)
        if self.metrics is not None and isinstance(error, Mistake):
            raise Mistake(f"{error}; {checkpoint.last_good(self.folder)}") from error


def this_launch():
    """The torchrun that started this process, as the lock's second line names it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"begun by process {os.getpid()}"
    return f"begun by torchrun {os.getppid()} of {socket.gethostname()}"


def restarts_of_this_node():
    """How often torchrun restarted the job here: only the node that lost a process counts it.

    It restarts with the same arguments, and the run's own checkpoint then comes first.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def read_saved(folder):
    """What a checkpoint was saved with. Raises Mistake for a folder that no run has saved."""
    path = folder / "state" / "train.json"
    saved = files.read_json(path)
    kinds = {"step": int, "config": dict, "machine": dict}
    for name, kind in kinds.items():
        if not isinstance(saved.get(name), kind):
            raise Mistake(f"{folder} cannot be resumed: {path} has no {name}")
    machine = saved["machine"]
    threads = machine.get("threads", 1)
    sound = {"step": type(saved["step"]) is int and saved["step"] >= 0,
             "dtype": machine.get("dtype", "float32") in ("float32", "bfloat16"),
             "threads": type(threads) is int and 1 <= threads <= 4096}
    for name, is_sound in sound.items():
        if not is_sound:
            raise Mistake(f"{folder} cannot be resumed: {path} is damaged, its {name} is not one "
                          "that a run writes")
    return saved


def cut_lines(path, step):
    """Drop the lines of a .jsonl file from `step` on: a resumed run computes these steps again.

    What is not one of our lines goes too, such as a line that a kill cut short.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            continue
        if values["step"] < step:
            kept.append(line.decode() + "\n")
    files.write_text(path, "".join(kept))


def ignore(values):
    """The tracker that does nothing."""


def tracker(log, folder, start, settings):
    """A function of a dict of metrics that shows them in TensorBoard or Weights & Biases.

    log: 'none', 'tensorboard' or 'wandb'. start: the step to begin with. Raises Mistake where its
    package is not installed.
    """
    if log == "none":
        return ignore
    try:
        if log == "wandb":
            import wandb
            identity = folder / "wandb_id"  # two runs may have folders of the same name
            if not identity.exists():
                files.write_text(identity, uuid4().hex)
            shown = wandb.init(project="nanoDiffCoder", name=folder.name, dir=folder,
                               config=settings, id=identity.read_text(), resume="allow")
            return lambda values: shown.log(values, step=values["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Mistake(f"log={log!r} needs a package that is not installed: "
                      f"pip install {log}") from error
    writer = SummaryWriter(folder, purge_step=start)

    def write(values):
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(name, value, values["step"])
    return write


def pick_machine(cfg, world, saved):
    """Choose dtype and threads, which affect rounding: from the settings, else from the resumed
    checkpoint, else what suits the hardware. Sets the threads, and keeps freed memory.

    saved: see Run.saved. Returns a dict of JSON values.
    """
    device = world.device.type
    machine = {"device": device, "dtype": fast_dtype(device), "threads": torch.get_num_threads(),
               "processes": world.size, "torch": torch.__version__,
               "cpu": torch.backends.cpu.get_cpu_capability()}
    before = saved["machine"] if saved else machine
    for name in ("dtype", "threads"):
        machine[name] = before.get(name, machine[name])
    if cfg.dtype != "auto":
        machine["dtype"] = cfg.dtype
    if cfg.threads:
        machine["threads"] = cfg.threads
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in machine.items()
               if before.get(name) != value]
    if saved and changed:
        world.say(f"resuming under other conditions ({', '.join(changed)}): numbers may differ in "
                  "their last digits")
    torch.set_num_threads(machine["threads"])
    keep_freed_memory()
    return machine


def keep_freed_memory():
    """Ask glibc to keep large buffers: reallocating them took a quarter of a CPU step's time."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: allocations below 1 GB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def pick_model(cfg, given, folder):
    """The model's config and tokenizer: of `folder`, or of the settings where that is None.

    cfg: train.py's settings. given: the set of those that were set.
    """
    if folder is None:
        tok = huggingface.load_tokenizer(cfg.data, cfg.bos_token, cfg.mask_token, cfg.fim_rate > 0)
        sizes = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}
        sizes["vocab_size"] = cfg.vocab_size or tok.vocab_size
        model_cfg = ModelConfig(**sizes)
        if model_cfg.vocab_size < tok.vocab_size:
            raise Mistake(f"vocab_size={cfg.vocab_size} is less than the {tok.vocab_size} ids of "
                          f"the tokenizer in {cfg.data}; 0 takes as many")
    else:
        model_cfg, tok, _ = huggingface.read_description(folder, cfg.mask_token, cfg.bos_token,
                                                         cfg.fim_rate > 0, objective="ar")
        check_fits(cfg, given, folder, model_cfg)
        huggingface.check_weights(folder, model_cfg)  # before memory is allocated for them
    if not cfg.data.endswith(".jsonl"):
        check_tokenizer(cfg.data, tok)
    tok.fim_trained = tok.fim_trained or cfg.fim_rate > 0
    return model_cfg, tok


def check_fits(cfg, given, folder, model_cfg):
    """The model of a folder has the sizes that were asked for, and room for the context."""
    sizes = given & {f.name for f in fields(ModelConfig)} - {"context"}
    if cfg.vocab_size == 0:  # the folder's own
        sizes -= {"vocab_size"}
    for name in sorted(sizes):
        if getattr(cfg, name) != getattr(model_cfg, name):
            raise Mistake(f"{name}={getattr(cfg, name)} was asked for, but the model in {folder} "
                          f"has {getattr(model_cfg, name)}")
    if cfg.context > model_cfg.context:
        raise Mistake(f"context={cfg.context} is longer than the {model_cfg.context} of the model "
                      f"in {folder}")


def check_tokenizer(data, tok):
    """Raise Mistake where the tokens in a folder of data are not those of the model."""
    prepared = huggingface.load_tokenizer(data)
    vocabulary = tok.hf.get_vocab()  # it may have a <mask> that the data's has not
    if not prepared.hf.get_vocab().items() <= vocabulary.items():
        raise Mistake(f"{data} was prepared with another tokenizer than the one in {tok.folder}: "
                      f"prepare it again with --tokenizer={tok.folder}, or train from scratch")
    if prepared.bos_id != tok.bos_id:  # the model would never see how its prompts begin
        raise Mistake(f"documents begin with {prepared.bos_id} in {data} and with {tok.bos_id} for "
                      "the model: prepare the data with the same --bos_token")
