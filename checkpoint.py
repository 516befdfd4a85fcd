"""
Checkpoints: written in the background, whole or not at all, the last two kept, read without running any code in them.

A checkpoint is a folder: tensors as safetensors, a file for each process that trained, which
torch.distributed.checkpoint writes and any number of processes can read; state.json with the rest; checksums.json. It
has another name until all is on disk. There is no state of a random generator because a run keeps none: data order,
dropout, init and masks are functions of seeds, step and rank (see train.py).
"""
import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as to_safetensors
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from configurator import UserError, first_line
from model import GPT, GPTConfig
from parallel import lost_contact, rank_and_world_size

KEPT = 2
warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process needs none
STATE, CHECKSUMS = 'state.json', 'checksums.json'


def find(out_dir):
    """Checkpoints of a run, newest first, whole or damaged; none for out_dir='', a run that writes nothing."""
    return sorted((path for path in Path(out_dir).glob('ckpt_*') if path.suffix != '.tmp'), reverse=True) \
        if out_dir else []


def cause(error):
    """The exception behind one of DCP's."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Writing


def flush_folder(path):
    """Makes what was created or renamed in a folder durable, where the system can."""
    if hasattr(os, 'O_DIRECTORY'):
        folder = os.open(path, os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
        os.close(folder)


def write_atomically(path, content):
    """Writes bytes to a temporary file and renames it to `path` once it is safely on disk."""
    temporary = Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(Path(path).parent)


def checksum(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class Writer(HuggingFaceStorageWriter):
    """Writes the tensors of every process; when all have, the first adds the rest and gives the folder its name."""

    def __init__(self, path, state):
        super().__init__(f'{path}.tmp', save_distributed=True)
        self.final, self.state = Path(path), state

    def finish(self, metadata, results):
        super().finish(metadata, results)
        folder = Path(self.path)
        write_atomically(folder / STATE, json.dumps(self.state, indent=1).encode())
        sums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1).encode())
        if self.final.exists():  # was passed over, and the run has come here again
            remove(self.final)
        os.rename(folder, self.final)
        flush_folder(self.final.parent)
        # what is newer was passed over, too: it may be somebody's evidence
        for old in [path for path in find(self.final.parent) if path.name <= self.final.name][KEPT:]:
            try:
                remove(old)
            except OSError as error:  # the new one is whole all the same
                print(f'warning: {old} could not be removed: {error}', file=sys.stderr)


class Checkpoints:
    """The checkpoints that one run writes; all of its processes call the same methods."""

    def __init__(self, out_dir, timeout_s):
        self.out_dir, self.writing, self.group = Path(out_dir), None, None
        if dist.is_initialized():  # a group of their own, because training talks while a checkpoint is written
            self.group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout_s))

    def clean(self, step):
        """Removes what an earlier process left half-written, and before the first step all. Raises UserError."""
        try:
            for path in [*self.out_dir.glob('ckpt_*.tmp'), *(find(self.out_dir) if step == 0 else [])]:
                remove(path)
        except OSError as error:
            raise UserError(f"'{path}' cannot be removed: {error}") from None

    def save(self, step, model, optimizer, state):
        """Begins to write a copy of the tensors, and `state`, a dict for JSON; training can go on. Raises UserError."""
        self.wait()
        self.path = self.out_dir / f'ckpt_{step:09d}'
        self.writing = dcp.async_save(tensors_of(model, optimizer), no_dist=self.group is None,
                                      storage_writer=Writer(self.path, {'step': step, **state}),
                                      process_group=self.group)

    def check(self):
        """Raises UserError if the checkpoint that is being written has failed."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self):
        """Until the checkpoint that is being written is on disk. Raises UserError if it cannot be."""
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            if lost_contact(cause(error)):
                raise cause(error) from None
            if rank_and_world_size()[0] == 0:
                shutil.rmtree(f'{self.path}.tmp', ignore_errors=True)  # it may be what fills the disk
            raise UserError(f"'{self.path}' could not be written ({first_line(cause(error))}): make room, go on from "
                            'the one before it with --init_from=resume') from None


# -----------------------------------------------------------------------------
# Reading


def damage(path, names=None):
    """What is wrong with the checkpoint `path`, in a few words, or None if it is as it was written.

    Looks into all files, or those called `names`.
    """
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        if not isinstance(sums, dict) or any(file.name not in sums for file in path.glob('*.safetensors')):
            return f'it does not hold what {CHECKSUMS} lists'
        changed = [name for name in names or sums if checksum(path / name) != sums[name]]
        return f"{', '.join(changed)} changed after it was written" if changed else None
    except (OSError, ValueError, KeyError) as error:
        return first_line(error)


def newest(out_dir):
    """(path, state) of the newest checkpoint that is as it was written; says which are not. Raises UserError."""
    paths = find(out_dir)
    for path in paths:
        problem = damage(path)
        if not problem:
            return path, json.loads((path / STATE).read_text())
        print(f'warning: {path} is damaged ({problem}); trying the one before it', file=sys.stderr)
    found = f'none of the {len(paths)} checkpoints in' if paths else 'no checkpoint in'
    raise UserError(f"{found} '{out_dir}'{' can be used' if paths else ''}: give the --out_dir of a run, or train anew")


def peek(out_dir):
    """The state of the newest checkpoint, its tensors unseen. Raises UserError."""
    for path in find(out_dir):
        if not damage(path, [STATE]):
            return json.loads((path / STATE).read_text())
    return newest(out_dir)[1]  # says what is wrong


def tensors_of(model, optimizer):
    """The weights and masks of a model and the moments of its optimizer, by names; sharded ones stay sharded."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return dict(model=model_state, optimizer=optimizer_state['state'])


def read(path, tensors, alone=False):
    """Fills `tensors`, as of tensors_of(), from a checkpoint; in all processes at once, or in this one `alone`.

    Raises UserError if they are not what is in there.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        reader.read_metadata()  # fails in one line, load() in many
        dcp.load(tensors, storage_reader=reader, no_dist=alone or not dist.is_initialized())
    except (CheckpointException, Exception) as error:  # DCP's own is no Exception
        if lost_contact(cause(error)):
            raise cause(error) from None
        raise UserError(f"'{path}' cannot be read ({first_line(cause(error))}): remove it to go on from the one "
                        'before') from None


def restore(path, model, optimizer):
    """Loads weights, masks and moments; learning rate, weight decay, eps and betas stay those of `optimizer`."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    read(path, dict(model=model_state, optimizer=optimizer_state['state']))
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def load_model(out_dir):
    """(model, state): the model of the newest checkpoint, on the CPU and whole, however many processes trained it.

    Raises UserError.
    """
    path, state = newest(out_dir)
    with torch.device('meta'):
        model = GPT(GPTConfig(**state['model_config']))
    weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.state_dict().items()}
    read(path, dict(model=weights), alone=True)
    model.load_state_dict(weights, assign=True)
    return model, state


def export(out_dir):
    """Writes the weights of the newest checkpoint to model.safetensors, what made them in its header.

    Returns (the model, the path). Raises UserError.
    """
    model, state = load_model(out_dir)
    path = Path(out_dir, 'model.safetensors')
    header = {key: json.dumps(state[key]) for key in ('model_config', 'meta', 'step')}
    try:
        write_atomically(path, to_safetensors({name: p.contiguous().clone() for name, p in model.state_dict().items()},
                                              header))
    except OSError as error:
        raise UserError(f"'{path}' could not be written: {error}") from None
    return model, path
