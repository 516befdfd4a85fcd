"""
Checkpoints: written whole or not at all, the last two kept, read without running any code in them.

They hold no state of a random generator because a run keeps none: data order, dropout, init and masks are functions of
seeds, step and rank (see train.py).
"""
import os
import sys
from pathlib import Path

import torch

from configurator import UserError, first_line

KEPT = 2


def find(out_dir):
    """Checkpoint files of a run, newest first; none for out_dir='', a run that writes nothing."""
    return sorted(Path(out_dir).glob('ckpt_*.pt'), reverse=True) if out_dir else []


def write_atomically(path, write):
    """Calls write(file) on a temporary file and renames it to `path` once it is safely on disk."""
    temporary = Path(f'{path}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, 'O_DIRECTORY'):  # make the rename itself durable
        folder = os.open(Path(path).parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def save(out_dir, state):
    """Writes the state after state['step'] steps, then removes all but the newest checkpoints."""
    path = Path(out_dir) / f"ckpt_{state['step']:09d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    for old in find(out_dir)[KEPT:]:
        old.unlink()
    return path


def load(out_dir):
    """(path, state) of the newest checkpoint that can be read, on the CPU; says which ones cannot.

    Raises UserError if there is none.
    """
    paths = find(out_dir)
    for path in paths:
        try:
            return path, torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        except Exception as error:  # a damaged file can fail in any way
            print(f'warning: {path} cannot be read ({first_line(error)}); trying the one before it', file=sys.stderr)
    found = f'none of the {len(paths)} checkpoints in' if paths else 'no checkpoint in'
    raise UserError(f"{found} '{out_dir}'{' can be read' if paths else ''}: give the --out_dir of a run, or train anew")
