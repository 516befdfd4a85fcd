"""
Finds and reads the text files of data/text/prepare.py. Whatever is left out or replaced is counted in Notes.

The content of a file decides how it is read: gzip, bzip2 and xz are unpacked, a byte-order mark names the encoding,
anything else must be UTF-8. The name says only whether it holds rows (.jsonl, .ndjson, .json, .parquet) or one text.
"""
import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager
from glob import escape, glob, has_magic
from pathlib import Path

import numpy as np

from nanop.errors import UserError, explained, first_line, import_optional

PIECE_CHARS = 1 << 20  # about the size of one work item
LONGEST_LINE = 64 * PIECE_CHARS  # of a .jsonl file: bounds the memory
ONE_IN = 1000  # more than one character in so many replaced, or NUL: then it is not text
SUFFIXES = ('.txt', '.md', '.py', '.jsonl', '.ndjson', '.parquet')  # read inside folders
JSON_LINES = ('.jsonl', '.ndjson', '.json')
COMPRESSED = ('.gz', '.bz2', '.xz', '.lzma')
NO_FILES = 'broken links, pipes and devices left out'
JUNK = ('__pycache__', '__MACOSX')
BY_NAME = 'left out (read if given by name)'
HIDDEN = f"hidden files and folders, {' and '.join(JUNK)} {BY_NAME}"
SEPARATOR = f'[{re.escape(os.sep + (os.altsep or ""))}]'  # of the names in a path
SEPARATORS = 'separators that ended a document'
END_OF_TEXT = '<|endoftext|>'
ENCODINGS = {codecs.BOM_UTF8: 'utf-8-sig', codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
             codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}  # the first match: UTF-16's begin UTF-32's
DAMAGED = 'it may be damaged, get it again or leave it out'
LOOKS_LIKE = {rb'PK(\x03\x04|\x05\x06)': 'a zip archive (.docx and .epub are zip archives)', rb'%PDF-': 'a PDF',
              rb'(?s).{257}ustar': 'a tar archive', rb'\x28\xb5\x2f\xfd': 'zstd', rb'7z\xbc\xaf': 'a 7z archive',
              rb'Rar!\x1a': 'a rar archive', rb'\x04\x22\x4d\x18': 'lz4',
              rb'\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ': 'a file that was packed twice',
              rb'\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*': 'an image', rb'(?s)RIFF.{4}(WAVE|AVI |WEBP)': 'media',
              rb'PAR1\x15': 'parquet without .parquet in its name', rb'\x93NUMPY': 'a numpy array',
              rb'\x7fELF': 'a program', rb'SQLite format 3': 'a database'}


class Notes(dict):
    """What was left out or replaced: {what: [how often, an example]}."""

    def __init__(self):
        super().__init__()
        self.read, self.left_out = set(), {}  # files with their folders; {place: (what, path)}

    def add(self, what, example, count=1):
        if count:
            self.setdefault(what, [0, example])[0] += count

    def leave_out(self, what, path):
        """Count what a search passes, once for each place. What is read all the same is not counted in the end."""
        self.left_out.setdefault(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)),
                                 (what, path))

    def update(self, other):
        for what, (count, example) in other.items():
            self.add(what, example, count)

    def lines(self):
        total = Notes()
        total.update(self)
        for what, path in self.left_out.values():
            if not (BY_NAME in what and os.path.realpath(path) in self.read):
                total.add(what, repr(path))
        return [f'{what}: {count:,} (such as {example})' for what, (count, example) in total.items()]

    def say(self):
        for line in self.lines():
            print(f'note: {line}', file=sys.stderr)


# -----------------------------------------------------------------------------
# Finding files


def kind(path):
    """The suffix of a file's name in small letters, without that of a compression."""
    name = os.path.basename(path).lower()
    stem, suffix = os.path.splitext(name)
    return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def holds_rows(path):
    return kind(path) in ('.parquet', *JSON_LINES)


def is_packed(path):
    """Whether the name of a file says that its text is longer than the file."""
    return path.lower().endswith((*COMPRESSED, '.parquet'))


def identity(path):
    """What is the same for every spelling of a path, for links and for hard links."""
    found = os.stat(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def folders_below(folder, notes):
    """Yield (path, names of files) of a folder and its subfolders. Linked ones are searched too, unless they would
    loop."""
    def refuse(error):
        raise UserError(f'{error.filename!r} cannot be read ({first_line(error)}): leave it out')
    searched = set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here, parent = os.path.realpath(path), Path(os.path.realpath(os.path.dirname(path)))
        loops = path != folder and Path(here) in (parent, *parent.parents)  # a link to a folder that it is in
        if loops or here in searched:
            notes.leave_out('links to folders that are searched anyway left out', path)
            folders.clear()
            continue
        searched.add(here)
        hidden = {name for name in folders + names if name.startswith('.') or name in JUNK}
        for name in sorted(hidden):
            notes.leave_out(HIDDEN, os.path.join(path, name))
        folders[:] = sorted(set(folders) - hidden)
        yield path, sorted(set(names) - hidden)


def files_below(folder, notes):
    """Yield the files in a folder and its subfolders."""
    for file in (os.path.join(path, name) for path, names in folders_below(folder, notes) for name in names):
        if not os.path.isfile(file):
            notes.leave_out(NO_FILES, file)
        elif kind(file) in SUFFIXES:
            yield file
        else:
            notes.leave_out(f'files with other suffixes in folders {BY_NAME}', file)


def expanded(pattern, notes):
    """Yield the paths that a glob pattern stands for. glob() itself would follow links that loop under ** forever."""
    before, *after = re.split(f'(?:^|(?<={SEPARATOR}))\\*\\*(?:$|{SEPARATOR}+)', pattern, maxsplit=1)
    if not after:
        for path in glob(pattern):
            if any(name in JUNK and has_magic(part) for name, part in zip(Path(path).parts, Path(pattern).parts)):
                notes.leave_out(HIDDEN, path)
            else:
                yield path
        return
    for folder in filter(os.path.isdir, glob(before or os.curdir)):
        if not after[0] and not pattern.endswith('**'):  # folders only
            yield folder
            continue
        for path, names in folders_below(folder, notes):
            if after[0]:
                yield from expanded(os.path.join(escape(path), after[0]), notes)
            else:
                yield from (os.path.join(path, name) for name in names)


def matches(pattern, notes):
    """The files that a path, a folder or a glob pattern stands for, sorted."""
    files, left_out = set(), Notes()
    for path in [pattern] if os.path.exists(pattern) else expanded(pattern, left_out):
        if os.path.isdir(path):
            files.update(files_below(path, left_out))
        elif os.path.isfile(path):
            files.add(path)
        elif path == pattern:
            raise UserError(f'{path!r} is a broken link, a pipe or a device: use a file or a folder')
        else:
            left_out.leave_out(NO_FILES, path)
    if not files:
        file = re.sub(f'{SEPARATOR}+$', '', pattern)
        if os.path.isfile(file):
            raise UserError(f'{pattern!r} matches no file, {file!r} is a file and no folder: leave out the last '
                            f'{pattern[-1]!r}')
        searched = f"folders are searched for {', '.join(SUFFIXES)}, also packed as {', '.join(COMPRESSED)}"
        raise UserError(f"{pattern!r} matches no file ({'; '.join([searched, *left_out.lines()])})")
    notes.left_out |= left_out.left_out
    notes.read.update(os.path.realpath(path) for path in files)
    notes.read.update([os.path.dirname(path) for path in notes.read])
    return sorted(files)


def find_files(patterns, notes):
    """{identity: path} of all files that paths, folders and glob patterns stand for, in this order."""
    files = {}
    with explained(OSError, 'the files cannot be listed'):
        for path in (path for pattern in patterns for path in matches(pattern, notes)):
            found = identity(path)
            if found in files:
                notes.add('files given or linked more than once, which count once', repr(path))
            files.setdefault(found, path)
    return files


# -----------------------------------------------------------------------------
# Reading bytes as text

REPLACE = 'replace and count'  # the name of an error handler
HALVES = 'halves of surrogate pairs replaced by U+FFFD'
replaced = 0  # sequences of bytes so far, in all files, that were not characters


def replace(error):
    global replaced
    replaced += 1
    return '\ufffd', error.end


codecs.register_error(REPLACE, replace)


def decoded(decode, *args):
    """(text, how many characters in it were replaced) of a call that decodes with 'replace and count'."""
    before = replaced
    return decode(*args), replaced - before


def count_replaced(notes, where, bad, encoding='UTF-8'):
    notes.add(f'characters that were not {encoding}, replaced by U+FFFD', where, bad)


def refuse_unless_text(where, characters, bad, nul, encoding='UTF-8'):
    """Refuse text with too many of its characters replaced or NUL."""
    if ONE_IN * (bad + nul) > characters:
        guess = ('damaged, or its byte-order mark is wrong' if encoding != 'UTF-8' else
                 'like UTF-16 without a byte-order mark (iconv -f utf-16le -t utf-8 converts it) or no text' if nul else
                 'like another encoding, perhaps Latin-1 (iconv -f latin1 -t utf-8 converts it)')
        raise UserError(f'{where} is not text in {encoding} (of {characters:,} characters {bad:,} are wrong and '
                        f'{nul:,} NUL, one in {ONE_IN:,} is allowed): it looks {guess}')


class Streams(io.RawIOBase):
    """The content of packed streams, one after the other. bz2.open and lzma.open drop damaged ones after the first."""

    def __init__(self, file, decompressor):
        self.file, self.decompressor, self.stream = file, decompressor, decompressor()

    def readable(self):
        return True

    def next_stream(self):
        """Begin the next stream and return its first bytes; none at the end."""
        data, zeros = self.stream.unused_data, 0
        while data or (data := self.file.read(PIECE_CHARS)):
            zeros += len(data) - len(data := data.lstrip(b'\0'))
            if data:
                break
        if zeros % 4 or zeros and self.decompressor is not lzma.LZMADecompressor:  # which may be padded
            raise OSError('zeros follow what was packed')
        self.stream = self.decompressor() if data else self.stream
        return data

    def readinto(self, buffer):
        content = b''
        while not content:
            if self.stream.eof:
                data = self.next_stream()
                if not data:
                    break
            else:
                data = self.file.read(PIECE_CHARS) if self.stream.needs_input else b''
                if self.stream.needs_input and not data:
                    raise EOFError('it ends too early')
            content = self.stream.decompress(data, len(buffer))
        buffer[:len(content)] = content
        return len(content)


UNPACK = {rb'\x1f\x8b': gzip.open,
          rb'BZh[1-9](1AY&SY|\x17rE8P\x90)': lambda file: io.BufferedReader(Streams(file, bz2.BZ2Decompressor)),
          rb'\xfd7zXZ\0|\]\0\0': lambda file: io.BufferedReader(Streams(file, lzma.LZMADecompressor))}


@contextmanager
def unpacked(path):
    """Open a file for reading bytes, unpacked if it is compressed. Yields (file, its first bytes)."""
    with open(path, 'rb') as file:
        start = file.read(512)
        file.seek(0)
        unpack = next((unpack for magic, unpack in UNPACK.items() if re.match(magic, start)), None)
        if not unpack:
            if path.lower().endswith(COMPRESSED):
                raise UserError(f'{path!r} cannot be read: its name says that it is compressed, its content is not')
            yield file, start
            return
        with unpack(file) as inner:
            start = inner.read(512)
        file.seek(0)
        with unpack(file) as inner:
            yield inner, start


def chunks(path, notes):
    """Yield the text of a file, PIECE_CHARS characters at a time."""
    with unpacked(path) as (file, start):
        for magic, what in LOOKS_LIKE.items():
            if re.match(magic, start):
                raise UserError(f'{path!r} looks like {what}: unpack it, convert it to text or leave it out')
        encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), 'utf-8')
        name = encoding.upper().removesuffix('-SIG')
        text, totals = io.TextIOWrapper(file, encoding, REPLACE, newline=''), np.zeros(3, np.int64)
        while (found := decoded(text.read, PIECE_CHARS))[0]:
            chunk, bad = found
            totals += len(chunk), bad, chunk.count('\0')
            refuse_unless_text(repr(path), *totals, name)
            count_replaced(notes, repr(path), bad, name)
            yield chunk


def as_text(value, column, where, notes):
    """The text of a value in a column: bytes are decoded as UTF-8, null gives None, other values are refused."""
    if isinstance(value, bytes):
        value, bad = decoded(value.decode, 'utf-8', REPLACE)
        refuse_unless_text(f'{where}: the value under {column!r}', len(value), bad, value.count('\0'))
        count_replaced(notes, where, bad)
        return value
    if isinstance(value, str):
        refuse_unless_text(f'{where}: the value under {column!r}', len(value), 0, value.count('\0'))
        if not value.isascii():
            value, halves = re.subn(r'[\ud800-\udfff]', '\ufffd', value)
            notes.add(HALVES, where, halves)
        return value
    if value is not None:
        raise UserError(f'{where}: {column!r} holds a value of type {type(value).__name__}, not text: use a '
                        'column of text')
    notes.add('null values skipped', where)


# -----------------------------------------------------------------------------
# Reading documents


def lines(path, notes):
    """Yield the lines of a text file."""
    rest = ''
    for chunk in chunks(path, notes):
        *whole, rest = (rest + chunk).split('\n')
        yield from whole
        if len(rest) > LONGEST_LINE:
            raise UserError(f'{path!r} has a line of more than {LONGEST_LINE:,} characters: write one object a line')
    yield rest


JSON = json.JSONDecoder(parse_int=lambda digits: 0)  # of a number only the type counts, it may be of any length


def holds(names):
    """The names of columns, shortened, for an error."""
    more = f' and {len(names) - 10:,} more' if len(names) > 10 else ''
    return '(it holds ' + (', '.join(repr(name[:60]) for name in names[:10]) or 'nothing') + more + ')'


def json_values(path, column, notes):
    """Yield (line number, value) of one column in a file of JSON objects, one a line."""
    for number, line in enumerate(lines(path, notes), 1):
        if line.strip():
            where, use = f'{path!r}, line {number}: no text under {column!r}', 'write one object a line, as .jsonl'
            try:
                row = JSON.decode(line)
            except (ValueError, RecursionError) as error:  # explained() would cost every line
                raise UserError(f'{where} ({first_line(error)}): {use}') from None
            if not isinstance(row, dict):
                raise UserError(f'{where} (it holds a {type(row).__name__}): {use}')
            if column not in row:
                raise UserError(f'{where} {holds(list(row))}: name the column with --column')
            yield number, row[column]


def parquet_values(path, column):
    """Yield (row number, value) of one column in a parquet file."""
    pyarrow, parquet = (import_optional(name, repr(path), 'pyarrow') for name in ('pyarrow', 'pyarrow.parquet'))
    with explained((UnicodeError, pyarrow.ArrowException), f'{path!r} cannot be read', DAMAGED), \
            unpacked(path) as (file, _), tempfile.TemporaryFile() as copy:
        if not file.seekable():
            shutil.copyfileobj(file, copy)
        table = parquet.ParquetFile(file if file.seekable() else copy)
        names = table.schema_arrow.names
        if names.count(column) != 1:
            problem = 'more than one column' if column in names else f'no text under {column!r}'
            raise UserError(f'{path!r}: {problem} {holds(names)}: name the column with --column')
        type_ = table.schema_arrow.field(column).type
        values_are = str(getattr(type_, 'value_type', type_))  # in a dictionary
        if type_.num_fields or not re.match('(large_)?(string|binary)|fixed_size_binary|null', values_are):
            raise UserError(f'{path!r}: {column!r} holds {str(type_)[:60]}, not text: use a column of text')
        values = (value for batch in table.iter_batches(batch_size=256, columns=[column])
                  for value in batch.column(column).to_pylist())
        yield from enumerate(values, 1)


def pieces(texts, separator='', where='', notes=None):
    """Yield (text, ends_document): parts of a text, given in any parts, that give the same tokens as the whole.

    So it is cut before single spaces only; a long stretch without any is cut where it must be. Each `separator`, which
    is left out and counted, ends a document.
    """
    text, ended = '', False
    may_begin = max(len(separator) - 1, 1)  # a separator may begin in so many last characters
    for more in texts:
        text += more
        if separator and separator in text:
            *documents, text = text.split(separator)
            yield from ((document, True) for document in documents)
            notes.add(SEPARATORS, where, len(documents))
            ended = True
        if len(text) >= 2 * PIECE_CHARS:
            cut = text.rfind(' ', PIECE_CHARS, -may_begin)
            while cut != -1 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
                cut = text.rfind(' ', PIECE_CHARS, cut)
            if cut != -1 or len(text) >= 16 * PIECE_CHARS:
                cut = cut if cut != -1 else len(text) - may_begin
                yield text[:cut], False
                text, ended = text[cut:], False
    if text or not ended:
        yield text, True


def row_pieces(path, column, separator, notes):
    """Yield (text, ends_document) for the rows of a file."""
    characters, before = 0, notes.get(HALVES, [0])[0]
    unit = 'row' if kind(path) == '.parquet' else 'line'
    for number, value in parquet_values(path, column) if unit == 'row' else json_values(path, column, notes):
        where = f'{path!r}, {unit} {number}'
        text = as_text(value, column, where, notes)
        if text is not None:
            characters += len(text)
            yield from pieces([text], separator, where, notes)
    halves = notes.get(HALVES, [0])[0] - before
    if ONE_IN * halves > characters:
        raise UserError(f'{path!r} is not text (of {characters:,} characters {halves:,} are halves of surrogate pairs, '
                        f'one in {ONE_IN:,} is allowed): write whole characters, or leave it out')


def documents(files, column, separator, notes):
    """Yield (split, text, ends_document) for every file of {path: split}."""
    for path, split in files.items():
        with explained((OSError, EOFError, zlib.error, lzma.LZMAError), f'{path!r} cannot be read',
                       DAMAGED):
            parts = (row_pieces(path, column, separator, notes) if holds_rows(path) else
                     pieces(chunks(path, notes), separator, repr(path), notes))
            for text, ends in parts:
                notes.add(f'{END_OF_TEXT} read as plain text (--separator lets it end a document)', repr(path),
                          text.count(END_OF_TEXT))
                yield split, text, ends
