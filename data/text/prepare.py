"""
Your own text as a dataset: files, folders or glob patterns; .txt, .md, .py, .jsonl, .ndjson and .parquet, also packed.

    python data/text/prepare.py BOOKS/ notes.md 'logs/*.txt.gz' --tokenizer=gpt2
    python data/text/prepare.py train.txt --val valid.txt --tokenizer=byte --out=data/mytext
    python data/text/prepare.py stories.txt --separator='<|endoftext|>' --tokenizer=gpt2
    python train.py --dataset=mytext

A file with another suffix is read as text if it is given by name, and left out inside folders. .gz, .bz2 and .xz are
unpacked. Text is UTF-8, or has a byte-order mark. In .jsonl, .ndjson and .parquet files the column 'text' is read
(--column). Without --val, the last --val_frac of the tokens are for validation. The last lines say what was left out or
replaced. Memory does not grow with the input.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import UserError, exit_on_user_error, explained  # noqa: E402
from nanop.text_files import SEPARATORS, Notes, documents, find_files, holds_rows, is_packed  # noqa: E402
from nanop.tokenizer import CharTokenizer, get_tokenizer  # noqa: E402
from nanop.write_dataset import refuse_below_one, write_dataset  # noqa: E402


def choose_files(inputs, val, notes):
    """{path: split}; a file that is in both splits is for validation."""
    train, val = find_files(inputs, notes), find_files(val, notes)
    if val and not train.keys() - val.keys():
        raise UserError('every file for training is also given with --val: name other files')
    for found in train.keys() & val.keys():
        notes.add('files given for both splits, which are for validation only', repr(val[found]))
    return {path: 'train' for found, path in train.items() if found not in val} | dict.fromkeys(val.values(), 'val')


def prepare(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='+', help='files, folders or glob patterns for training')
    parser.add_argument('--val', nargs='+', default=[], help='files, folders or glob patterns for validation')
    parser.add_argument('--val_frac', type=float, help='fraction for validation without --val (default: 0.1)')
    parser.add_argument('--tokenizer', default='byte', help='byte (the default), char or an encoding of tiktoken')
    parser.add_argument('--column', help='column to read in .jsonl, .ndjson and .parquet files (default: text)')
    parser.add_argument('--separator', help='text that ends a document wherever it occurs, and is left out')
    parser.add_argument('--out', default=Path(__file__).parent, help='folder to write (default: data/text)')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='tokenizing processes (default: all cores)')
    args, notes = parser.parse_args(argv), Notes()
    val_frac = 0.1 if args.val_frac is None else args.val_frac
    if not 0 < val_frac < 1 or args.val and args.val_frac is not None:
        raise UserError(f'--val_frac={val_frac} is not allowed: use a fraction between 0 and 1, or --val without it')
    if args.separator == '':
        raise UserError("--separator='' is not allowed: use a text, or leave it out")
    refuse_below_one(workers=args.workers)
    files = choose_files(args.inputs, args.val, notes)
    if args.column and not any(map(holds_rows, files)):
        raise UserError(f'--column={args.column!r} is not allowed: no file has columns')

    def texts(notes):
        return documents(files, args.column or 'text', args.separator or '', notes)
    tokenizer = (CharTokenizer.of(char for _, text, _ in texts(Notes()) for char in set(text))
                 if args.tokenizer == 'char' else get_tokenizer(args.tokenizer))
    with explained(OSError, 'the files cannot be read any more'):  # the progress bar takes bytes for characters
        total_chars = None if any(map(is_packed, files)) else sum(map(os.path.getsize, files))
    meta = write_dataset(args.out, texts(notes), tokenizer, f'{len(files)} local files', notes=notes,
                         val_frac=0 if args.val else val_frac, total_chars=total_chars, workers=args.workers)
    notes.say()
    if args.separator and SEPARATORS not in notes:
        print(f'note: --separator={args.separator!r} never occurs', file=sys.stderr)
    elif args.separator and tokenizer.end_of_text is None:
        print(f'note: tokenizer {tokenizer.name} has no token for the end of a document: the separators are left out, '
              'nothing takes their place', file=sys.stderr)
    return meta


if __name__ == '__main__':
    exit_on_user_error(prepare)
