"""A model and its optimizer on disk: saved by all processes, resumed by any number of them.

A checkpoint is a folder of weights as Hugging Face has them (huggingface.py), and next to them
state/, which only training needs: the optimizer's state, as torch.distributed.checkpoint writes it,
and how the run was set up.

    out/toy/latest                 the name of the newest checkpoint, such as step_0000300
    out/toy/step_0000300/          its weights, config.json and tokenizer
    out/toy/step_0000300/state/    train.json, optimizer/

Each is written under another name, synced to the disk, and renamed when complete: a run killed at
any moment, a power cut, or a disk that fills up leaves the previous checkpoint as it was. Every
process reads and writes its own part, so a run may continue with another number of processes, and
none holds more than one file of weights.

What may be opened from strangers: state/ too. PyTorch pickles the optimizer's table of contents and
its numbers; here the first may hold nothing but the classes of `PICKLED`, and the rest is read as
tensors and plain values (`weights_only`), so that no code in them runs.

Not covered: the folder of a whole run (run.py), weights without state (huggingface.py).
"""
import io
import os
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import FunctionType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import huggingface
from configurator import Mistake
from files import move_folder, write_json, write_text
from parallel import gathered, rank_and_size, wait_for_all

# expected with a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # a key per tensor, after its weight


# --- writing --------------------------------------------------------------------------------------

def save(run, step, model, optimizer, tok, recipe, settings, keep, beside=None):
    """Save checkpoint `step` of the run, then name it in `latest`. All processes take part.

    run: the run's folder. settings: a dict of JSON values, what the run was started with.
    keep: how many checkpoints stay, the newest ones and this one among them.
    beside(folder): writes what else a run needs into its state/, on all processes.
    Raises OSError when it cannot be written; what was saved before is untouched.
    """
    run, name = Path(run), f"step_{step:07d}"
    rank, size = rank_and_size()
    aside = run / "saving.tmp"
    try:
        if rank == 0:
            clear(aside)  # of a run that was killed
            (aside / "state").mkdir(parents=True)
        wait_for_all()
        huggingface.write_model(aside, model, tok, recipe, torch.float32, rank, size, gathered)
        dcp.save(optimizer_state(model, optimizer), no_dist=not dist.is_initialized(),
                 checkpoint_id=str(aside / "state" / "optimizer"))
        if beside is not None:
            beside(aside / "state")
        if rank == 0:
            write_json(aside / "state" / "train.json", {"step": step, **settings})
        wait_for_all()
        if rank == 0:
            discard(run / name)  # of a run that was killed just before `latest` named it
            move_folder(aside, run / name)
            write_text(run / "latest", name)
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        clear(aside)
        if isinstance(inner(error), (SystemExit, KeyboardInterrupt)):  # a second Ctrl-C
            raise inner(error) from None
        raise OSError(f"could not save {run / name}: {reason(error)}; {last_good(run)}") from error
    if rank == 0:
        try:
            prune(run, name, keep)
        except OSError as error:  # the new one is saved: no reason to stop
            print(f"an old checkpoint could not be removed: {error}", file=sys.stderr)


def prune(run, latest, keep):
    """Remove all but the newest `keep` checkpoints, and never the one named `latest`.

    Only folders that are named as `save` names them count: step_ and digits, no symbolic links.
    """
    steps = {p: int(p.name.removeprefix("step_")) for p in run.iterdir()
             if re.fullmatch(r"step_[0-9]+", p.name) and p.is_dir() and not p.is_symlink()}
    for old in sorted(steps, key=steps.get)[:-keep]:
        if old.name != latest:
            discard(old)


def discard(folder):
    """Remove a checkpoint, renamed first: a kill in between leaves nothing that looks like one."""
    if folder.is_symlink():
        folder.unlink()  # what it points to is somebody else's
    if not folder.exists():
        return
    aside = folder.with_name("discarded.tmp")
    clear(aside)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def clear(aside):
    """Remove what a killed process left under this name; of a link, the link alone."""
    if aside.is_symlink():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def optimizer_state(model, optimizer):
    """{'state.layers.0.….exp_avg': tensor, …}: this process's own part of it."""
    fresh = not optimizer.state
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    if fresh:  # PyTorch has made a step of length 0 to see its tensors: it must not count
        for values in optimizer.state.values():
            if "step" in values:
                values["step"].zero_()
        state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    return state


def inner(error):
    """The error itself: torch.distributed.checkpoint wraps those of all processes into one."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def reason(error):
    """What went wrong, in one line."""
    error = inner(error)
    return str(error).partition("\n")[0] or type(error).__name__


def last_good(run):
    """'the last good checkpoint is …', for messages about things that went wrong."""
    try:
        return f"the last good checkpoint is {huggingface.latest_of(Path(run))}"
    except Mistake:
        return "no checkpoint had been saved yet"


# --- reading --------------------------------------------------------------------------------------

def load_state(folder, model, optimizer):
    """Read the optimizer's state from a checkpoint's state/, in place. All processes take part.

    The optimizer's settings, such as its weight decay, stay those it was made with. Raises Mistake
    for a damaged state.
    """
    path = Path(folder) / "state" / "optimizer"
    if not (path / ".metadata").is_file():
        raise Mistake(f"{folder} cannot be resumed: {path.name}/.metadata is missing")
    state = optimizer_state(model, optimizer)  # of the right shapes, to be read into
    try:
        reader = Reader(path)
        reader.read_metadata()  # torch 2.11 would hide what is wrong with it
        dcp.load(state, storage_reader=reader, planner=Planner(),
                 no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # a damaged file can cause anything
        if isinstance(inner(error), (SystemExit, KeyboardInterrupt, dist.DistError)):
            raise  # stopped, or another process ended: nothing is damaged
        raise Mistake(f"{path} is damaged or of another optimizer: {reason(error)}") from error
    settings = [{k: v for k, v in group.items() if k != "params"}
                for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)  # the file's are those of the run before


METADATA = "torch.distributed.checkpoint.metadata"
PICKLED = {  # (module, name) of all that a .metadata of ours refers to
    *((METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"), ("torch", "float32"),
    *((module, name) for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath")),
}


class Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be replaced
    """Unpickles nothing but what PICKLED lists: a pickle that names anything else is refused."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if (module, name) not in PICKLED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def load_build(self):
        """Sets attributes: of new objects, never of a class or a function."""
        if isinstance(self.stack[-2], (type, FunctionType)):
            raise pickle.UnpicklingError(f"it would change {self.stack[-2].__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class Reader(dcp.FileSystemReader):
    """PyTorch's reader of state/optimizer, which trusts the file: here .metadata runs no code."""

    def read_metadata(self, *args, **kwargs):
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        for place in metadata.storage_data.values():
            if not huggingface.is_plain(place.relative_path):
                raise pickle.UnpicklingError("it names a file outside of its folder")
        return metadata


class Planner(DefaultLoadPlanner):
    """PyTorch's planner, which unpickles whatever is no tensor: here it runs no code."""

    def load_bytes(self, read_item, value):
        content = torch.load(value, weights_only=True)
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, content)
