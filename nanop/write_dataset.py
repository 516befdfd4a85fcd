"""
Turns documents into a dataset folder: tokenizes on all cores in bounded memory and replaces the old dataset at the end.

The scripts data/*/prepare.py call write_dataset (any documents), write_parquet (large, resumable) or write_shakespeare.
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import urllib.request
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanop.errors import UserError, explained, import_optional
from nanop.files import write_atomically, write_durably
from nanop.text_files import PIECE_CHARS, Notes, as_text, find_files
from nanop.tokenizer import get_tokenizer


def id_dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_batch(batch, tokenizer):
    """(split, text, ends_document) triples -> (split, characters, ids)."""
    encoded = []
    for split, text, ends_document in batch:
        ids = tokenizer.encode(text)
        if ends_document and tokenizer.end_of_text is not None:
            ids = np.append(ids, tokenizer.end_of_text)
        encoded.append((split, len(text), ids.astype(id_dtype(tokenizer))))
    return encoded


def tokenized(documents, tokenizer, workers):
    """Tokenize in `workers` processes. Yields (split, characters, ids) in the order of `documents`."""
    def batches():
        batch, size = [], 0
        for document in documents:
            batch.append(document)
            size += len(document[1])
            if size >= PIECE_CHARS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    if workers <= 1 or tokenizer.name in ('byte', 'char'):  # encoding these is cheaper than sending them to a process
        for batch in batches():
            yield from encode_batch(batch, tokenizer)
        return
    # Processes, because tiktoken's threads slow each other down although they release the GIL. forkserver, because
    # the progress bar runs a thread and a fork of a threaded process can hang. Only the parent handles Ctrl-C.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('forkserver'), initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_IGN))
    pending = deque()
    try:
        for batch in batches():
            pending.append(pool.submit(encode_batch, batch, tokenizer))
            if len(pending) > 4 * workers:  # bounds the text in memory
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        if sys.version_info < (3, 11, 5):  # there the pool's writer would wait forever: cpython#94777
            pool._call_queue._reader.close()
        raise UserError('a tokenizing process was killed, perhaps for lack of memory: use fewer --workers') from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(documents, tokenizer, paths, workers, title, total_chars=None, leave=True):
    """Write the ids of (split, text, ends_document) triples to paths[split], with a progress bar. Returns a sha256."""
    sha256 = hashlib.sha256()

    def hashed():
        for document in documents:
            sha256.update(document[1].encode(errors='replace'))
            yield document

    with tqdm(total=total_chars, unit='char', unit_scale=True, desc=title, leave=leave, disable=None) as progress, \
            open(paths['train'], 'wb') as train, open(paths['val'], 'wb') as val:
        files = dict(train=train, val=val)
        for split, characters, ids in tokenized(hashed(), tokenizer, workers):
            files[split].write(ids.tobytes())
            progress.update(characters)
    return sha256.hexdigest()


def move_tail(source, target, fraction, itemsize):
    """Move the last `fraction` of the ids in one file to the end of another."""
    keep = int(os.path.getsize(source) // itemsize * (1 - fraction)) * itemsize
    with open(source, 'r+b') as tail, open(target, 'ab') as out:
        tail.seek(keep)
        shutil.copyfileobj(tail, out)
        tail.truncate(keep)


def count_bytes(path, tokenizer, sha256):
    """The UTF-8 bytes of the text that a file of ids stands for; end-of-text tokens count as none. Adds to a sha256."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    total, dtype = 0, id_dtype(tokenizer)
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 24):
            sha256.update(chunk)
            total += int(lengths[np.frombuffer(chunk, dtype)].sum())
    return total


def flush(paths):
    """Wait until files are on disk."""
    for path in paths:
        with open(path, 'rb') as file:
            os.fsync(file.fileno())


@contextmanager
def signals_raise():
    """Let SIGTERM and SIGHUP, where nobody handles them, raise SystemExit as Ctrl-C raises KeyboardInterrupt."""
    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
        stopped.append(number)
        raise SystemExit(128 + number)
    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    free = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL
            and threading.current_thread() is threading.main_thread()]
    stopped = []
    for number in free:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
        if stopped:
            print('stopped', file=sys.stderr)


@contextmanager
def temporary_files(folder):
    """Make `folder` and yield {split: path of a temporary file in it}. In the end, no temporary file is there.

    An error of the file system in here becomes a UserError.
    """
    folder = Path(folder)
    there = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
    if os.path.lexists(there) and not os.path.isdir(there):
        what = 'is a file' if os.path.isfile(there) else 'is no folder'
        raise UserError(f'{str(folder)!r} cannot be written ({str(there)!r} {what}): name a folder with --out')
    try:
        with signals_raise(), explained(OSError, f'{str(folder)!r} cannot be written',
                                        'make room on the disk, or use another folder with --out'):
            folder.mkdir(parents=True, exist_ok=True)
            yield {split: folder / f'{split}.tmp.{os.getpid()}' for split in ('train', 'val')}
    finally:
        for name in ('train', 'val', 'meta') if os.path.isdir(folder) else ():
            (folder / f'{name}.tmp.{os.getpid()}').unlink(missing_ok=True)


def finish_dataset(folder, paths, tokenizer, source, sha256, notes):
    """Make the finished files `paths` the dataset in `folder`, and return its meta. An empty split is refused."""
    dtype, real = id_dtype(tokenizer), tokenizer.vocab_size
    tokens = {split: os.path.getsize(path) // dtype.itemsize for split, path in paths.items()}
    data_sha256 = hashlib.sha256()  # of train.bin and val.bin, one after the other
    counts = {split: count_bytes(path, tokenizer, data_sha256) for split, path in paths.items()}
    for split, count in counts.items():
        if not count:
            why = f" ({'; '.join(notes.lines())})" if notes.lines() else ''
            raise UserError(f'no text for {split}.bin in {source}{why}: use more text or another split')
    padded = real if real <= 1024 else -(-real // 64) * 64  # matrix products are faster at a multiple of 64
    meta = dict(
        tokenizer=tokenizer.name, dtype=dtype.name, vocab_size=padded, real_vocab_size=real,
        train_tokens=tokens['train'], val_tokens=tokens['val'], train_bytes=counts['train'], val_bytes=counts['val'],
        bytes_per_token=counts['val'] / tokens['val'], source=source, source_sha256=sha256,
        data_sha256=data_sha256.hexdigest())
    if tokenizer.name == 'char':
        meta['chars'] = tokenizer.chars
    meta_path = Path(folder) / 'meta.json'
    temporary = meta_path.with_suffix(f'.tmp.{os.getpid()}')
    # all new files are on disk before the old dataset is removed: if the disk is full, the old one stays
    write_durably(temporary, json.dumps(meta, indent=1).encode())
    flush(paths.values())
    meta_path.unlink(missing_ok=True)  # from here to the last rename there is no dataset, and never half of one
    for split, path in paths.items():
        os.replace(path, Path(folder) / f'{split}.bin')
    os.replace(temporary, meta_path)
    print(f"{str(folder)!r}: {tokens['train']:,} training and {tokens['val']:,} validation tokens, tokenizer "
          f"{tokenizer.name} with {real:,} ids, {meta['bytes_per_token']:.3f} bytes per token")
    return meta


def write_dataset(folder, documents, tokenizer, source, val_frac=0.0, total_chars=None, workers=None, notes=Notes()):
    """Make `folder` a dataset of (split, text, ends_document) triples and return its meta.

    If this stops or fails, the folder holds a whole dataset or none. val_frac moves that part, the last tokens, to val.
    """
    with temporary_files(folder) as paths:
        sha256 = write_tokens(documents, tokenizer, paths, workers or os.cpu_count(), 'tokenizing', total_chars)
        if val_frac:
            move_tail(paths['train'], paths['val'], val_frac, id_dtype(tokenizer).itemsize)
        return finish_dataset(folder, paths, tokenizer, source, sha256, notes)


# -----------------------------------------------------------------------------
# Large datasets as parquet files, local or on the Hugging Face hub
def list_parquet(repo, revision, pattern):
    """Addresses of a hub dataset's parquet files at a pinned revision, sorted."""
    hub = import_optional('huggingface_hub', 'the download', 'datasets').HfFileSystem()
    with explained(Exception, f'{repo} cannot be listed',  # whatever the network library raises
                   "go online, or use local files with --input='FOLDER/*.parquet'"):
        return ['hf://' + path for path in sorted(hub.glob(f'datasets/{repo}@{revision}/{pattern}'))]


def parquet_documents(file, val_every):
    """Yield (split, value, True) for the rows of a parquet file; one row in `val_every` is for validation."""
    datasets = import_optional('datasets', 'a parquet file')
    with explained(Exception, f'{file!r} cannot be read',  # whatever the network library or a damaged file raises
                   'run the command again, finished shards are kept'):
        rows = datasets.load_dataset('parquet', data_files=[file], split='train', streaming=True, columns=['text'])
        for i, row in enumerate(rows):
            yield 'train' if i % val_every else 'val', row['text'], True


def write_shard(name, file, tokenizer, workers, val_every):
    """Tokenize a parquet file to NAME.train and NAME.val unless that is done. Returns (these paths, sha256, Notes)."""
    paths = {split: name.with_suffix(f'.{split}') for split in ('train', 'val')}
    done = name.with_suffix('.json')  # written last: now the shard is finished
    if not (done.exists() and json.loads(done.read_text())['file'] == file):
        notes, rows = Notes(), enumerate(parquet_documents(file, val_every), 1)
        texts = ((split, as_text(value, 'text', f'{file!r}, row {row}', notes), ends)
                 for row, (split, value, ends) in rows)
        try:
            sha256 = write_tokens((text for text in texts if text[1] is not None), tokenizer, paths, workers,
                                  repr(Path(file).name), leave=False)
            flush(paths.values())
            write_atomically(done, json.dumps(dict(file=file, sha256=sha256, notes=notes)).encode())
        except BaseException:
            for path in paths.values():
                path.unlink(missing_ok=True)
            raise
    done = json.loads(done.read_text())
    return paths, done['sha256'], done.get('notes', {})


def refuse_below_one(**numbers):
    """Refuse numbers of the command line that are given and below 1."""
    for key, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f'--{key}={number} is not allowed: use at least 1')


def write_parquet(folder, repo, revision, pattern, argv=None, val_every=2000):
    """Make `folder` a dataset of a hub dataset's column 'text', one shard per parquet file, and return its meta."""
    parser = argparse.ArgumentParser(
        description=f'{repo} at revision {revision}. Needs pip install datasets. The download is streamed, not stored. '
        'If it was stopped, run the same command again: finished shards are kept.')
    parser.add_argument('--input', help="local parquet files instead of the download, such as 'FOLDER/*.parquet'")
    parser.add_argument('--shards', type=int, help='use only the first SHARDS parquet files')
    parser.add_argument('--tokenizer', default='gpt2', help='byte or an encoding of tiktoken (default: gpt2)')
    parser.add_argument('--out', default=folder, help='folder to write (default: the folder of this script)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tokenizing processes (default: all cores)')
    args = parser.parse_args(argv)
    refuse_below_one(shards=args.shards, workers=args.workers)
    tokenizer, notes, shards = get_tokenizer(args.tokenizer), Notes(), []
    files = list(find_files([args.input], notes).values()) if args.input else list_parquet(repo, revision, pattern)
    if not files:
        raise UserError(f'no parquet files match {pattern}')
    files, shard_dir = files[:args.shards], Path(args.out) / 'shards'
    with temporary_files(args.out) as merged:
        shard_dir.mkdir(exist_ok=True)
        try:
            for i, file in enumerate(tqdm(files, unit='file', desc='shards', disable=None)):
                shards.append(write_shard(shard_dir / f'{tokenizer.name}_{i:05d}', file, tokenizer, args.workers,
                                          val_every))
                notes.update(shards[-1][2])
            for split, target in merged.items():
                with open(target, 'wb') as out:
                    for paths, _, _ in shards:
                        with open(paths[split], 'rb') as file:
                            shutil.copyfileobj(file, out)
            sha256 = hashlib.sha256(''.join(sha256 for _, sha256, _ in shards).encode()).hexdigest()
            source = f'{args.input or f"{repo}@{revision}"} ({len(files)} files)'
            meta = finish_dataset(args.out, merged, tokenizer, source, sha256, notes)
            for paths, _, _ in shards:
                for path in (*paths.values(), paths['train'].with_suffix('.json')):
                    path.unlink()
        finally:
            if not any(shard_dir.iterdir()):
                shard_dir.rmdir()
    notes.say()
    return meta


# -----------------------------------------------------------------------------
# Tiny Shakespeare
SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def write_shakespeare(folder, make_tokenizer, argv=None):
    """Make `folder` a dataset of tiny Shakespeare, the last tenth of its characters for validation."""
    parser = argparse.ArgumentParser(description='Tiny Shakespeare (1.1 MB), the last tenth for validation.')
    parser.add_argument('--input', help='a local copy of the text instead of the download')
    parser.add_argument('--out', default=folder, help='folder to write (default: the folder of this script)')
    args = parser.parse_args(argv)
    source = args.input or SHAKESPEARE_URL
    with explained((OSError, HTTPException), f'{source!r} cannot be read',
                   'check it, or use a local copy with --input=FILE'):
        raw = Path(args.input).read_bytes() if args.input else urllib.request.urlopen(source, timeout=60).read()
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f'{source!r} is not tiny Shakespeare ({len(raw):,} bytes, wrong sha256): use the original text '
                        'with --input=FILE, or prepare other texts with data/text/prepare.py')
    text = raw.decode()
    cut = int(len(text) * 0.9)
    return write_dataset(args.out, [('train', text[:cut], False), ('val', text[cut:], False)], make_tokenizer(text),
                         'tiny Shakespeare', total_chars=len(text))
