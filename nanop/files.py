"""Files that are whole or absent: atomic writes, the lock of a folder, checksums, CSV."""
import csv
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanop.errors import UserError, explained


def flush_folder(path):
    """Make files created or renamed in a folder survive a power cut, where the system can."""
    if hasattr(os, 'O_DIRECTORY'):
        folder = os.open(path, os.O_DIRECTORY)
        with suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
        os.close(folder)


def write_durably(path, content):
    """Write bytes to a file and wait until they are on disk."""
    with open(path, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path, content):
    """Write bytes to a temporary file and rename it to `path` once it is on disk."""
    temporary = Path(f'{path}.tmp')
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(Path(path).parent)


def checksum(path):
    """The sha256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def remove(path):
    """Remove a file, a whole folder, or a link but not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def make_out_dir(path):
    """Make the folder that a script writes to, and make sure that it can be written. Returns it as a Path."""
    path = Path(path)
    with explained(OSError, f"out_dir='{path}' cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f'.write-test-{os.getpid()}'
        probe.touch()
        probe.unlink()
    return path


def lock(out_dir, name='.lock', work='training in'):
    """Lock a folder for one kind of work. The lock ends with `.release()` or with the process; its empty
    file stays."""
    held = FileLock(make_out_dir(out_dir) / name)
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is {work} '{out_dir}': wait for it, or use another --out_dir") from None
    except OSError as error:
        raise UserError(f"out_dir='{out_dir}' cannot be written: {error}") from None
    return held


def write_rows(file, rows, fields):
    """Write a header and dicts as CSV to an open text file, floats with all digits, keys not in `fields` left out."""
    writer = csv.DictWriter(file, fields, extrasaction='ignore')
    writer.writeheader()
    writer.writerows(rows)


def write_csv(path, rows, fields=None):
    """Write dicts as a CSV file; the fields are the keys of the first one, unless given."""
    with open(path, 'w', newline='') as file:
        write_rows(file, rows, fields or rows[0])


def read_csv(path):
    """The rows of a CSV file as dicts of text. A last row that was cut off is left out; no file gives no rows. Raises
    ValueError for a file that has been changed so that its other rows cannot all be read."""
    if not Path(path).exists():
        return []
    with open(path, newline='', encoding='utf-8-sig') as file:  # spreadsheets write a byte-order mark
        rows, reader = [], csv.DictReader(file, strict=True)
        for row in reader:
            if rows and None in rows[-1].values() or None in row:
                raise ValueError(f'line {reader.line_num} has more or fewer values than the header')
            rows.append(row)
    return rows[:-1] if rows and None in rows[-1].values() else rows


def append_csv(path, rows):
    """Append dicts with the same keys to a CSV file, which must have these keys as its header."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text().splitlines()[:1] if path.exists() else []
    if known and known != [','.join(rows[0])]:
        raise UserError(f"'{path}' holds figures of another kind: choose another file")
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        if not known:
            writer.writeheader()
        writer.writerows(rows)
