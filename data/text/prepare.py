"""
Your own text as a dataset: files, folders or glob patterns; .txt, .md, .py, .jsonl and .parquet, each also as .gz.

    python data/text/prepare.py BOOKS/ notes.md 'logs/*.txt.gz' --tokenizer=gpt2
    python data/text/prepare.py train.txt --val valid.txt --tokenizer=byte --out=data/mytext
    python train.py --dataset=mytext

A file with another suffix is read as text if it is given by name, and skipped inside folders. In .jsonl and .parquet
files the column 'text' is read (--column). Without --val, the last --val_frac of the tokens are for validation. Memory
does not grow with the input.
"""
import argparse
import gzip
import json
import os
import sys
from glob import glob
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import UserError, exit_on_user_error, explained, first_line, import_optional  # noqa: E402
from nanop.tokenizer import CharTokenizer, get_tokenizer  # noqa: E402
from nanop.write_dataset import PIECE_CHARS, write_dataset  # noqa: E402

SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.parquet')


def find_files(patterns):
    """The files that paths, folders and glob patterns stand for, sorted within each pattern, without duplicates."""
    files = {}
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else glob(pattern, recursive=True)
        named = [path for path in found if os.path.isfile(path)]
        in_folders = [str(path) for folder in found if os.path.isdir(folder) for path in Path(folder).rglob('*')
                      if path.is_file() and path.name.removesuffix('.gz').endswith(SUFFIXES)]
        if not named + in_folders:
            raise UserError(f"'{pattern}' matches no file (folders are searched for {', '.join(SUFFIXES)}, also .gz)")
        files.update(dict.fromkeys(sorted(named + in_folders)))
    return list(files)


def open_text(path):
    return (gzip.open if path.endswith('.gz') else open)(path, 'rt', encoding='utf-8', errors='replace', newline='')


def pieces(file):
    """Yield (text, ends_document): parts of a text file that give the same tokens as the whole file.

    So it is cut before single spaces only; a long stretch without any is cut where it must be.
    """
    text = ''
    while more := file.read(PIECE_CHARS):
        text += more
        if len(text) >= 2 * PIECE_CHARS:
            cut = text.rfind(' ', PIECE_CHARS, -1)
            while cut != -1 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
                cut = text.rfind(' ', PIECE_CHARS, cut)
            if cut != -1 or len(text) >= 16 * PIECE_CHARS:
                cut = cut if cut != -1 else len(text)
                yield text[:cut], False
                text = text[cut:]
    yield text, True


def rows(path, column):
    """Yield the strings in one column of a .jsonl or .parquet file."""
    problem, use = f"no text under '{column}'", 'name the column with --column'
    if path.removesuffix('.gz').endswith('.jsonl'):
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        yield str(json.loads(line)[column])
                except (ValueError, KeyError, TypeError) as error:  # explained() would cost every line
                    raise UserError(f"'{path}', line {number}: {problem} ({first_line(error)}): {use}") from None
        return
    pyarrow, parquet = (import_optional(name, f"'{path}'", 'pyarrow') for name in ('pyarrow', 'pyarrow.parquet'))
    with explained((KeyError, pyarrow.ArrowException), f"'{path}': {problem}", use):
        with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=256, columns=[column]):
                yield from (str(value) for value in batch.column(column).to_pylist())


def documents(files, column):
    """Yield (split, text, ends_document) for every file of {path: split}."""
    for path, split in files.items():
        with explained((OSError, EOFError), f"'{path}' cannot be read"):
            if path.removesuffix('.gz').endswith(('.jsonl', '.parquet')):
                yield from ((split, text, True) for text in rows(path, column))
            else:
                with open_text(path) as file:
                    yield from ((split, text, ends) for text, ends in pieces(file))


def prepare(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='+', help='files, folders or glob patterns for training')
    parser.add_argument('--val', nargs='+', default=[], help='files, folders or glob patterns for validation')
    parser.add_argument('--val_frac', type=float, default=0.1, help='fraction for validation without --val')
    parser.add_argument('--tokenizer', default='byte', help='byte (the default), char or an encoding of tiktoken')
    parser.add_argument('--column', default='text', help='column to read in .jsonl and .parquet files')
    parser.add_argument('--out', default=Path(__file__).parent, help='folder to write (default: data/text)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tokenizing processes (default: all cores)')
    args = parser.parse_args(argv)
    if not 0 < args.val_frac < 1:
        raise UserError(f'--val_frac={args.val_frac} is not allowed: use a fraction between 0 and 1')
    val = dict.fromkeys(find_files(args.val), 'val')
    files = {path: 'train' for path in find_files(args.inputs) if path not in val} | val
    tokenizer = (CharTokenizer.of(char for _, text, _ in documents(files, args.column) for char in set(text))
                 if args.tokenizer == 'char' else get_tokenizer(args.tokenizer))
    compressed = any(path.endswith(('.gz', '.parquet')) for path in files)  # then the size of the text is not known
    total_chars = None if compressed else sum(map(os.path.getsize, files))
    return write_dataset(args.out, documents(files, args.column), tokenizer, f'{len(files)} local files',
                         val_frac=0 if val else args.val_frac, total_chars=total_chars, workers=args.workers)


if __name__ == '__main__':
    exit_on_user_error(prepare)
