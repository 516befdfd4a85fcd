"""
The source text of this Python's standard library, as bytes: real text on every machine without a download.

    python data/stdlib/prepare.py [--out=FOLDER]

About 12 MB, prepared in seconds. The text, and so the loss, differs a little between Python versions. Every 20th file
is for validation. Tests, installed packages and files that the build of Python generates are left out.
"""
import argparse
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nanop.errors import UserError, exit_on_user_error, explained  # noqa: E402
from nanop.tokenizer import ByteTokenizer  # noqa: E402
from nanop.write_dataset import write_dataset  # noqa: E402

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', 'lib-dynload'}
GENERATED = ('_sysconfigdata', 'config-')  # prefixes of names


def source_files():
    """The paths of the library's source files, sorted."""
    root = Path(sysconfig.get_paths()['stdlib'])
    files = sorted((path.relative_to(root) for path in root.rglob('*.py')), key=lambda path: path.parts)
    files = [root / path for path in files
             if not LEFT_OUT & set(path.parts) and not any(part.startswith(GENERATED) for part in path.parts)]
    if len(files) < 100:
        raise UserError(f"this Python has no sources of its standard library in '{root}': use data/shakespeare_char or "
                        'data/text instead')
    return files


def documents():
    """Yield (split, text, ends_document) for every source file."""
    for i, path in enumerate(source_files()):
        with explained(OSError, f'{str(path)!r} cannot be read'):
            yield 'val' if i % 20 == 19 else 'train', path.read_bytes().decode(errors='replace'), True


def prepare(folder=Path(__file__).parent):
    return write_dataset(folder, documents(), ByteTokenizer(), f'standard library of Python {sys.version.split()[0]}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=Path(__file__).parent, help='folder to write (default: data/stdlib)')
    exit_on_user_error(lambda: prepare(parser.parse_args().out))
