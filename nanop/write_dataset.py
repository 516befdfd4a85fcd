"""
Documents in, a dataset folder out: tokenises on all cores in bounded memory, and commits the folder atomically.

data/*/prepare.py are thin scripts over write_dataset (any documents) and write_parquet (large sets, resumable).
"""
import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import urllib.request
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from glob import glob
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanop.errors import UserError, first_line
from nanop.tokenizer import get_tokenizer

PIECE_CHARS = 1 << 20  # work is handed out in pieces of about this size


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


def tokenised(documents, tokenizer, workers):
    """Yields (split, characters, ids) in the order of `documents`, tokenised by that many processes.

    Raises UserError if one of them dies.
    """
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

    if workers <= 1 or tokenizer.name in ('byte', 'char'):  # these cost less than handing them over
        for batch in batches():
            yield from encode_batch(batch, tokenizer)
        return
    # processes: threads of tiktoken, though it works without Python's lock, get in each other's way; not forked from
    # this one, whose progress bar has a thread; and Ctrl-C is this one's to handle
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('forkserver'), initializer=signal.signal,
                               initargs=(signal.SIGINT, signal.SIG_IGN))
    pending = deque()
    try:
        for batch in batches():
            pending.append(pool.submit(encode_batch, batch, tokenizer))
            if len(pending) > 4 * workers:  # read no further ahead than that
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        pool._call_queue._reader.close()  # or what writes to it waits for ever, before Python 3.11.5: cpython#94777
        raise UserError('a process that tokenised was killed, maybe for lack of memory: give fewer --workers') from None
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(documents, tokenizer, paths, workers, progress):
    """Writes the ids of (split, text, ends_document) triples to paths[split]; returns the text's sha256."""
    sha256 = hashlib.sha256()

    def hashed():
        for document in documents:
            sha256.update(document[1].encode(errors='replace'))
            yield document

    with open(paths['train'], 'wb') as train, open(paths['val'], 'wb') as val:
        files = {'train': train, 'val': val}
        for split, characters, ids in tokenised(hashed(), tokenizer, workers):
            files[split].write(ids.tobytes())
            progress.update(characters)
    return sha256.hexdigest()


def count_bytes(path, tokenizer):
    """UTF-8 bytes of text behind the ids in a file; end-of-text tokens count none."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    if tokenizer.end_of_text is not None:
        lengths[tokenizer.end_of_text] = 0
    total, dtype = 0, id_dtype(tokenizer)
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 24):
            total += int(lengths[np.frombuffer(chunk, dtype)].sum())
    return total


def commit(folder, paths, tokenizer, source, sha256):
    """Makes the finished files of `paths` the dataset of `folder`; meta.json goes first and comes last.

    Raises UserError, and leaves what was there, if a split is empty.
    """
    itemsize = id_dtype(tokenizer).itemsize
    tokens = {split: os.path.getsize(path) // itemsize for split, path in paths.items()}
    for split, count in tokens.items():
        if not count:
            raise UserError(f'no text for {split}.bin in {source}: give more text, or another split')
    counts = {split: count_bytes(path, tokenizer) for split, path in paths.items()}
    real = tokenizer.vocab_size
    meta = dict(
        tokenizer=tokenizer.name, dtype=id_dtype(tokenizer).name,
        vocab_size=real if real <= 1024 else -(-real // 64) * 64,  # large ones padded: faster products
        real_vocab_size=real, train_tokens=tokens['train'], val_tokens=tokens['val'], train_bytes=counts['train'],
        val_bytes=counts['val'], bytes_per_token=counts['val'] / tokens['val'], source=source, source_sha256=sha256)
    if tokenizer.name == 'char':
        meta['chars'] = tokenizer.chars
    meta_path = Path(folder) / 'meta.json'
    temporary = meta_path.with_suffix(f'.tmp.{os.getpid()}')
    temporary.write_text(json.dumps(meta, indent=1))
    for path in (*paths.values(), temporary):
        with open(path, 'rb') as file:
            os.fsync(file.fileno())
    meta_path.unlink(missing_ok=True)  # from here until the last line there is no dataset, never half of one
    for split, path in paths.items():
        os.replace(path, Path(folder) / f'{split}.bin')
    os.replace(temporary, meta_path)
    print(f"{folder}: {tokens['train']:,} training and {tokens['val']:,} validation tokens, tokenizer "
          f"{tokenizer.name} with {real:,} ids, {meta['bytes_per_token']:.3f} bytes per token")
    return meta


def temporary_paths(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    return {split: Path(folder) / f'{split}.tmp.{os.getpid()}' for split in ('train', 'val')}


def write_dataset(folder, documents, tokenizer, source, val_frac=0.0, total_chars=None, workers=None):
    """Makes `folder` a dataset of (split, text, ends_document) triples and returns its meta.

    val_frac > 0 moves that fraction, the last tokens, from train to val. total_chars is for the progress bar.
    Raises UserError; whatever happens, the folder holds a whole dataset or none.
    """
    paths = temporary_paths(folder)
    try:
        with tqdm(total=total_chars, unit='char', unit_scale=True, desc='tokenising', disable=None) as progress:
            sha256 = write_tokens(documents, tokenizer, paths, workers or os.cpu_count(), progress)
        if val_frac:
            move_tail(paths['train'], paths['val'], val_frac, id_dtype(tokenizer).itemsize)
        return commit(folder, paths, tokenizer, source, sha256)
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def move_tail(source, target, fraction, itemsize):
    """Moves the last `fraction` of the ids of one file to the end of another."""
    keep = int(os.path.getsize(source) // itemsize * (1 - fraction)) * itemsize
    with open(source, 'r+b') as tail, open(target, 'ab') as out:
        tail.seek(keep)
        shutil.copyfileobj(tail, out)
        tail.truncate(keep)


# -----------------------------------------------------------------------------
# Large sets of parquet files, here or on the Hugging Face hub


def list_parquet(repo, revision, pattern):
    """Addresses of the parquet files of a hub dataset at a pinned revision, sorted. Raises UserError."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError:
        raise UserError('this needs the Hugging Face libraries: pip install datasets') from None
    try:
        return ['hf://' + path for path in sorted(HfFileSystem().glob(f'datasets/{repo}@{revision}/{pattern}'))]
    except Exception as error:  # whatever the network library raises
        raise UserError(f'{repo} cannot be listed ({type(error).__name__}): go online, or give local files with '
                        "--input 'FOLDER/*.parquet'") from None


def parquet_documents(file, val_every):
    """(split, text, True) for the rows of a parquet file, streamed; one row in `val_every` is for validation."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError('this needs the Hugging Face library datasets: pip install datasets') from None
    try:
        rows = load_dataset('parquet', data_files=[file], split='train', streaming=True, columns=['text'])
        for i, row in enumerate(rows):
            yield 'train' if i % val_every else 'val', row['text'] or '', True
    except Exception as error:  # whatever the network or the file does
        raise UserError(f"'{file}' cannot be read ({type(error).__name__}: {first_line(error)}): run this again, "
                        'finished shards are kept') from None


def write_parquet(folder, repo, revision, pattern, argv=None, val_every=2000):
    """Makes `folder` a dataset of a hub dataset's column 'text', with GPT-2's tokens and an end of text per document.

    Each parquet file becomes a shard; shards that are finished are not made again when the script is run again.
    """
    parser = argparse.ArgumentParser(description=f'{repo} at revision {revision}')
    parser.add_argument('--input', help='local parquet files instead of the hub, a glob pattern')
    parser.add_argument('--shards', type=int, help='use only the first N parquet files')
    parser.add_argument('--tokenizer', default='gpt2', help='an encoding of tiktoken, or byte')
    parser.add_argument('--out', default=folder, help='folder to write')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes that tokenise')
    args = parser.parse_args(argv)
    tokenizer = get_tokenizer(args.tokenizer)
    files = sorted(glob(args.input)) if args.input else list_parquet(repo, revision, pattern)
    files = files[:args.shards]
    if not files:
        raise UserError(f'no parquet files match {args.input or pattern}')
    shard_dir = Path(args.out) / 'shards'
    shard_dir.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, file in enumerate(tqdm(files, unit='file', desc='shards', disable=None)):
        name = shard_dir / f'{tokenizer.name}_{i:05d}'
        paths = {split: name.with_suffix(f'.{split}') for split in ('train', 'val')}
        done = name.with_suffix('.json')  # written last: it makes the shard count
        if not (done.exists() and json.loads(done.read_text())['file'] == file):
            with tqdm(unit='char', unit_scale=True, desc=Path(file).name, leave=False, disable=None) as progress:
                sha256 = write_tokens(parquet_documents(file, val_every), tokenizer, paths, args.workers, progress)
            temporary = done.with_suffix('.tmp')
            temporary.write_text(json.dumps(dict(file=file, sha256=sha256)))
            os.replace(temporary, done)
        shards.append((paths, json.loads(done.read_text())['sha256']))
    merged = temporary_paths(args.out)
    try:
        for split, target in merged.items():
            with open(target, 'wb') as out:
                for paths, _ in shards:
                    with open(paths[split], 'rb') as file:
                        shutil.copyfileobj(file, out)
        sha256 = hashlib.sha256(''.join(sha256 for _, sha256 in shards).encode()).hexdigest()
        source = f'{args.input or f"{repo}@{revision}"} ({len(files)} files)'
        meta = commit(args.out, merged, tokenizer, source, sha256)
    finally:
        for path in merged.values():
            path.unlink(missing_ok=True)
    for paths, _ in shards:
        for path in (*paths.values(), paths['train'].with_suffix('.json')):
            path.unlink()
    if not any(shard_dir.iterdir()):
        shard_dir.rmdir()
    return meta


# -----------------------------------------------------------------------------
# Tiny Shakespeare

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def write_shakespeare(folder, make_tokenizer, argv=None):
    """Makes `folder` a dataset of tiny Shakespeare, the last tenth of its characters for validation.

    Raises UserError if the text cannot be had or is not the well-known one.
    """
    parser = argparse.ArgumentParser(description='tiny Shakespeare')
    parser.add_argument('--input', help='a copy of the text, instead of the download')
    parser.add_argument('--out', default=folder, help='folder to write')
    args = parser.parse_args(argv)
    source = args.input or SHAKESPEARE_URL
    try:
        raw = Path(args.input).read_bytes() if args.input else urllib.request.urlopen(source, timeout=60).read()
    except OSError as error:
        raise UserError(f'{source} cannot be read ({error}): check it, or give a copy with --input FILE') from None
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(f'{source} is not the well-known text ({len(raw):,} bytes, another sha256): give a copy of it '
                        'with --input FILE, or prepare any other text with data/text/prepare.py')
    text = raw.decode()
    cut = int(len(text) * 0.9)
    return write_dataset(args.out, [('train', text[:cut], False), ('val', text[cut:], False)], make_tokenizer(text),
                         'tiny Shakespeare', total_chars=len(text))
