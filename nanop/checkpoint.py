"""
Checkpoints: written in the background, whole or not at all, the newest kept, and read without running code in them.

A checkpoint is a folder: the tensors as safetensors, one file per training process, written by
torch.distributed.checkpoint and readable by any number of processes; state.json with the rest; checksums.json. It is
written under a temporary name and renamed when complete. It holds no state of a random generator, because a run has
none: data order, dropout, init and masks are functions of the seeds, the step and the rank (see train.py).
"""
import json
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as to_safetensors
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from nanop.errors import UserError, explained, first_line, require
from nanop.files import checksum, flush_folder, remove, write_atomically
from nanop.parallel import lost_contact, rank_and_world_size

warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # a single process needs none
STATE, CHECKSUMS = 'state.json', 'checksums.json'
NEEDED = ('step', 'tokens', 'best_val_loss', 'config', 'model_config', 'meta')  # in state.json
FORMAT = 2  # in state.json; 1, or none: keys and values of n_kv_head in c_attn, other ALiBi slopes below 8 heads


def path_of(out_dir, step):
    return Path(out_dir, f'ckpt_{step:09d}')


def step_of(path):
    """The step in the name of a checkpoint, whole or half-written; None for any other name."""
    match = re.fullmatch(r'ckpt_([0-9]{9}|[1-9][0-9]{9,})(\.tmp)?', path.name)
    return int(match[1]) if match else None


def is_one(name):
    """Whether `name` is that of a checkpoint, out/long/ckpt_000002000."""
    return step_of(Path(name)) is not None


def require_source(config):
    """Refuse decay_steps without a checkpoint to branch off, and such a checkpoint without decay_steps."""
    require(config, 'decay_steps', is_one(config.init_from) or not config.decay_steps,
            'it needs init_from=FOLDER/ckpt_.., the checkpoint to branch off')
    require(config, 'init_from', config.decay_steps or not is_one(config.init_from),
            'this is a checkpoint, set decay_steps to branch a decay off it')


def find(out_dir, suffix=''):
    """The checkpoints of a run, newest first, whole or damaged; with suffix='.tmp' the half-written ones. Other names
    are the user's. out_dir='', a run that writes nothing, has none."""
    with explained(OSError, f"out_dir='{out_dir}' cannot be read"):
        paths = [path for path in Path(out_dir).glob('ckpt_*') if path.suffix == suffix] if out_dir else []
    return sorted((path for path in paths if step_of(path) is not None), key=step_of, reverse=True)


def user_error(error, problem, use):
    """The UserError for an exception while tensors are written or read; a lost rank's exception stays as it is."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error if lost_contact(error) else UserError(f'{problem} ({first_line(error)}): {use}')


# -----------------------------------------------------------------------------
# Writing
def seal(folder, state):
    """Add the state to a folder of tensors, and the checksums of all."""
    write_atomically(folder / STATE, json.dumps(state, indent=1).encode())
    sums = {path.name: checksum(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}
    write_atomically(folder / CHECKSUMS, json.dumps(sums, indent=1).encode())


class Writer(HuggingFaceStorageWriter):
    """Writes the tensors of every rank; then rank 0 adds the state and the name, and removes all but the newest."""

    def __init__(self, path, state, kept):
        super().__init__(f'{path}.tmp', save_distributed=True)
        self.final, self.state, self.kept = Path(path), state, kept

    def finish(self, metadata, results):
        super().finish(metadata, results)
        folder = Path(self.path)
        seal(folder, self.state)
        if os.path.lexists(self.final):  # it was damaged, so the run went back before it and has come here again
            remove(self.final)
        os.rename(folder, self.final)
        flush_folder(self.final.parent)
        # a damaged checkpoint that is newer stays: somebody may want to look at it
        for old in [path for path in find(self.final.parent) if step_of(path) <= step_of(self.final)][self.kept:]:
            try:
                remove(old)
            except OSError as error:  # the new checkpoint is complete nevertheless
                print(f'warning: {old} could not be removed: {error}', file=sys.stderr)


class Checkpoints:
    """The checkpoints that one run writes. All ranks call the same methods."""

    def __init__(self, out_dir, timeout_s, kept):
        self.out_dir, self.kept, self.path, self.writing, self.group = Path(out_dir), kept, None, None, None
        if dist.is_initialized():  # its own group, because training communicates while a checkpoint is written
            self.group = dist.new_group(backend='gloo', timeout=timedelta(seconds=timeout_s))

    def clean(self, step):
        """Remove what an earlier process left half-written; before the first step, remove all checkpoints."""
        for path in [*find(self.out_dir, '.tmp'), *(find(self.out_dir) if step == 0 else [])]:
            with explained(OSError, f"'{path}' cannot be removed"):
                remove(path)

    def save(self, step, model, optimizer, state):
        """Start to write a copy of the tensors and `state`, a dict for JSON. Training can go on meanwhile."""
        self.wait()
        self.path = path_of(self.out_dir, step)
        self.writing = dcp.async_save(tensors_of(model, optimizer), no_dist=self.group is None,
                                      process_group=self.group, storage_writer=Writer(
                                          self.path, {'step': step, 'format': FORMAT, **state}, self.kept))

    def discard(self, step):
        """Remove the checkpoint of `step`, if it was the last to be saved."""
        self.wait()
        if self.path == path_of(self.out_dir, step) and rank_and_world_size()[0] == 0:
            remove(self.path)

    def wait(self):
        """Wait until the checkpoint that is being written is on disk."""
        writing, self.writing = self.writing, None
        try:
            if writing:
                writing.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            error = user_error(error, f"'{self.path}' could not be written", 'make room, go on from the one before it '
                               'with --init_from=resume')
            if isinstance(error, UserError) and rank_and_world_size()[0] == 0:
                shutil.rmtree(f'{self.path}.tmp', ignore_errors=True)  # it may be what fills the disk
            raise error from None


# -----------------------------------------------------------------------------
# Reading
def damage(path, names=None):
    """What is wrong with a checkpoint's files, all or those called `names`, in a few words; None if nothing is."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        if not isinstance(sums, dict) or any(file.name not in sums for file in path.glob('*.safetensors')):
            return f'it does not hold what {CHECKSUMS} lists'
        changed = [name for name in names or sums if checksum(path / name) != sums[name]]
        if changed:
            return f"{', '.join(changed)} changed after it was written"
        state = json.loads((path / STATE).read_text())
        missing = [key for key in NEEDED if key not in state]
        if missing or not any(name.endswith('.safetensors') for name in sums):
            return f"it does not hold {', '.join(missing) or 'tensors'}"
        return None if state['step'] == step_of(path) else f"it is of step {state['step']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return first_line(error)


def require_known(path, state):
    """Refuse a checkpoint whose tensors would mean something else now. Returns its state."""
    c = state['model_config']
    few_heads = c.get('pos') == 'alibi' and c['n_embd'] < 8 * c['head_dim']
    if state.get('format', 1) < 2 and (few_heads or c.get('n_kv_head')):
        what = 'other ALiBi slopes' if few_heads else 'the keys and values of n_kv_head stored with the queries'
        raise UserError(f"'{path}' was written by an earlier version, with {what}: use that version, or train anew")
    return state


def undamaged(out_dir):
    """Yield (path, state) of the undamaged checkpoints, newest first. Prints a warning about each damaged one."""
    for path in find(out_dir):
        problem = damage(path)
        if not problem:
            yield path, require_known(path, json.loads((path / STATE).read_text()))
        else:
            print(f'warning: {path} is damaged ({problem}); trying the one before it', file=sys.stderr)


def newest(out_dir):
    """(path, state) of the newest undamaged checkpoint. Prints a warning about each damaged one."""
    for path, state in undamaged(out_dir):
        return path, state
    paths = find(out_dir)
    found = f'none of the {len(paths)} checkpoints in' if paths else 'no checkpoint in'
    raise UserError(f"{found} '{out_dir}'{' can be used' if paths else ''}: give the --out_dir of a run, or train anew")


def read_state(out_dir):
    """The state of the newest checkpoint, without a check of its tensors."""
    for path in find(out_dir):
        if not damage(path, [STATE]):
            return require_known(path, json.loads((path / STATE).read_text()))
    return newest(out_dir)[1]  # raises and says what is wrong


def state_in(path, names=None):
    """The state of one checkpoint, whose files are checked: all, or those called `names`."""
    problem = damage(path, names)
    if problem:
        raise UserError(f"'{path}' is no checkpoint that can be used ({problem}): use another")
    return require_known(path, json.loads((path / STATE).read_text()))


def branch(source, out_dir, config):
    """Begin the run of `config`, a dict, in the folder out_dir with a copy of the checkpoint `source` and of the log
    beside it, so that it can resume as if it had come to this step by itself."""
    final, log = path_of(out_dir, step_of(source)), source.parent / 'metrics.csv'
    copy = Path(f'{final}.tmp')
    try:
        with explained(OSError, f"'{source}' cannot be copied to '{out_dir}'", 'use another checkpoint, or make room'):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy)
            seal(copy, state_in(copy) | dict(config=config))  # its run may have removed files meanwhile
            if log.exists():
                shutil.copy(log, out_dir)
            os.rename(copy, final)
            flush_folder(final.parent)
    except UserError:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def tensors_of(model, optimizer):
    """Weights and masks of a model and the moments of its optimizer, by name; sharded ones stay sharded."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return dict(model=model_state, optimizer=optimizer_state['state'])


@contextmanager
def reading(path):
    """Turn what can go wrong while `path` is read into a UserError."""
    try:
        yield
    except (CheckpointException, Exception) as error:  # CheckpointException is not an Exception
        raise user_error(error, f"'{path}' cannot be read", 'remove it to go on from the one before') from None


def load_tensors(path, tensors):
    """Fill `tensors`, as of tensors_of(), from a checkpoint, on all ranks at once."""
    reader = HuggingFaceStorageReader(str(path))
    with reading(path):
        reader.read_metadata()  # a damaged file fails here in one line, in load() in many
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def restore(path, model, optimizer):
    """Load weights, masks and moments. lr, weight decay, eps and betas stay those of `optimizer`."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    load_tensors(path, dict(model=model_state, optimizer=optimizer_state['state']))
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def read_weights(path):
    """Weights and masks of one checkpoint: whole tensors by name on the CPU, however many processes trained."""
    reader = HuggingFaceStorageReader(str(path))
    with reading(path):
        held = reader.read_metadata().state_dict_metadata
        weights = {name.removeprefix('model.'): torch.empty(entry.size, dtype=entry.properties.dtype)
                   for name, entry in held.items() if name.startswith('model.')}
        dcp.load(dict(model=weights), storage_reader=reader, no_dist=True)  # on this rank alone
    return weights


def load_weights(out_dir):
    """(weights, state) of the newest checkpoint, as read_weights() gives them."""
    path, state = newest(out_dir)
    return read_weights(path), state


def average_weights(out_dir, count):
    """(mean weights, steps) of the newest `count` undamaged checkpoints; masks, which never change, stay as they are.

    Raises UserError if there are fewer.
    """
    found = list(islice(undamaged(out_dir), count))
    if len(found) < count:
        raise UserError(f"average={count} is more than the {len(found)} usable checkpoints in '{out_dir}': use at most "
                        f'that, or train with --keep_checkpoints={count}')
    config = found[0][1]['model_config']
    for path, state in found[1:]:
        other = [key for key, value in state['model_config'].items() if config.get(key, value) != value]
        if set(other) - {'dropout'}:
            raise UserError(f"'{path}' is of another run than '{found[0][0]}', its {other[0]} is another: use "
                            '--average=1, or remove it')
    mean, *others = (read_weights(path) for path, _ in found)
    for weights in others:
        for name, total in mean.items():
            if total.is_floating_point():
                total += weights[name]
    for total in mean.values():
        if total.is_floating_point():
            total /= count
    return mean, [state['step'] for _, state in found]


def write_weights(out_dir, weights, state):
    """Write weights to model.safetensors, with the model's config and its data in the header. Returns the path."""
    path = Path(out_dir, 'model.safetensors')
    header = {key: json.dumps(state[key]) for key in ('model_config', 'meta', 'step')}
    content = to_safetensors({name: p.contiguous().clone() for name, p in weights.items()}, header)
    with explained(OSError, f"'{path}' could not be written"):
        write_atomically(path, content)
    return path
