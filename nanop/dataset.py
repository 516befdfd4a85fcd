"""Reads datasets: folders of token ids, train.bin and val.bin, with a meta.json (written by nanop/write_dataset.py)."""
import json
import math
import os
import runpy
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nanop.errors import UserError, explained
from nanop.tokenizer import get_tokenizer

DATA_DIR = Path(__file__).resolve().parents[1] / 'data'
CONTENT = ('data_sha256', 'source_sha256', 'train_tokens', 'val_tokens')  # keys of meta.json that say what is in it


def open_dataset(name):
    """The dataset called `name`. The embedded one, stdlib, is prepared by the first process that misses it."""
    if name == 'stdlib' and os.environ.get('LOCAL_RANK', '0') == '0' and not (DATA_DIR / name / 'meta.json').exists():
        print('preparing data/stdlib, the source text of the Python standard library (once)')
        runpy.run_path(str(DATA_DIR / name / 'prepare.py'))['prepare']()
    if dist.is_initialized():
        dist.barrier()
    return Dataset(name)


def content_differs(meta, other):
    """How the content of one dataset's meta differs from another's, a list of texts. Older ones name less of it."""
    def short(value):
        return f'{value[:12]}..' if isinstance(value, str) else str(value)
    return [f'{key} is {short(meta[key])}, not {short(other[key])}' for key in CONTENT
            if key in meta and key in other and meta[key] != other[key]]


class Dataset:
    """The token ids of data/NAME, or of a folder given by its whole path, and batches of them."""

    def __init__(self, name):
        self.folder = DATA_DIR / name
        prepare = self.folder / 'prepare.py'
        again = f'run python data/{name}/prepare.py' if prepare.exists() else 'see data/text/prepare.py'
        try:
            self.meta = json.loads((self.folder / 'meta.json').read_text())
            self.dtype = np.dtype({'uint16': np.uint16, 'uint32': np.uint32}[self.meta['dtype']])
            self.vocab_size, self.real_vocab_size = int(self.meta['vocab_size']), int(self.meta['real_vocab_size'])
            self.bytes_per_token = float(self.meta['bytes_per_token'])
            if not 0 < self.bytes_per_token < math.inf:
                raise ValueError(f'bytes_per_token={self.bytes_per_token}')
            self.tokenizer_name = str(self.meta['tokenizer'])
            self.num_tokens = {split: int(self.meta[f'{split}_tokens']) for split in ('train', 'val')}
        except FileNotFoundError:
            raise UserError(f'no dataset in {str(self.folder)!r} (no meta.json): {again}') from None
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{f'{self.folder}/meta.json'!r} cannot be read ({error}): {again}") from None
        except (KeyError, TypeError) as error:
            raise UserError(f"{f'{self.folder}/meta.json'!r} has no usable {error}: {again}") from None
        self.files = {}
        for split, num_tokens in self.num_tokens.items():
            path = self.folder / f'{split}.bin'
            found = path.stat().st_size if path.is_file() else None
            if found != num_tokens * self.dtype.itemsize or num_tokens < 1:
                raise UserError(f"{str(path)!r} {'is missing' if found is None else f'has {found:,} bytes'}, meta.json "
                                f'says {num_tokens * self.dtype.itemsize:,}: {again}')
            with explained(OSError, f'{str(path)!r} cannot be read'):
                self.files[split] = open(path, 'rb', buffering=0)  # closed with the dataset

    def tokenizer(self):
        return get_tokenizer(self.tokenizer_name, self.meta.get('chars'))

    def train_starts(self, seed, step, num_sequences, block_size):
        """The first positions of the sequences in one step's global batch. They depend on the arguments only."""
        last = self.last_start('train', block_size)
        return np.random.default_rng((seed, step)).integers(0, last + 1, size=num_sequences)

    def val_starts(self, num_tokens, block_size):
        """The first positions of the validation sequences: always the same, evenly spread, without overlap."""
        last = self.last_start('val', block_size)
        num_sequences = max(1, min(num_tokens // block_size, last // block_size + 1))
        return np.linspace(0, last, num_sequences).astype(np.int64)

    def last_start(self, split, block_size):
        """The last position from which block_size inputs and their targets fit."""
        last = self.num_tokens[split] - block_size - 1
        if last < 0:
            raise UserError(f"{f'{self.folder}/{split}.bin'!r} has {self.num_tokens[split]:,} tokens, too few for "
                            f'block_size={block_size}: use a smaller block_size or more data')
        return last

    def check_readable(self, eval_tokens, block_size):
        """Refuse data that is too short, or whose validation tokens cannot be read."""
        self.last_start('train', block_size)
        starts = self.val_starts(eval_tokens, block_size)
        for first in range(0, len(starts), 64):
            self.batch('val', starts[first:first + 64], block_size, torch.device('cpu'))

    def read_ids(self, split, start, num_tokens):
        """`num_tokens` ids from position `start`. If the file has shrunk, a memory map would kill the process here."""
        ids, file = np.empty(num_tokens, self.dtype), self.files[split]
        file.seek(int(start) * self.dtype.itemsize)
        if file.readinto(ids) < ids.nbytes:
            raise UserError(f"'{file.name}' has become shorter: restore it, then go on with --init_from=resume")
        return ids

    def batch(self, split, starts, block_size, device):
        """Inputs and targets of the sequences that begin at `starts`, (B, T) int64 each."""
        with explained(OSError, f"'{self.files[split].name}' cannot be read any more",
                       'go on with --init_from=resume when it can'):
            ids = np.stack([self.read_ids(split, start, block_size + 1) for start in starts]).astype(np.int64)
        if ids.max() >= self.real_vocab_size:
            raise UserError(f"{f'{self.folder}/{split}.bin'!r} holds id {ids.max()}, outside its vocabulary of "
                            f'{self.real_vocab_size}: prepare it again')
        ids = torch.from_numpy(ids)  # (B, T + 1)
        ids = (ids.pin_memory() if device.type == 'cuda' else ids).to(device, non_blocking=True)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
