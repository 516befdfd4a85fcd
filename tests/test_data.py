"""Tests of datasets: tokenizers, preparation against known counts, atomic writes, damaged folders."""
import builtins
import bz2
import codecs
import errno
import gzip
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tarfile
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from nanop import text_files
from nanop import write_dataset as writer
from nanop.dataset import Dataset, content_differs
from nanop.errors import UserError
from nanop.tokenizer import ByteTokenizer, CharTokenizer, get_tokenizer, prompt_ids

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared' / 'data'
SHAKESPEARE = SHARED / 'tinyshakespeare' / 'input.txt'


def script(name, run_name='not main'):
    return runpy.run_path(str(ROOT / 'data' / name / 'prepare.py'), run_name=run_name)


def in_subprocess(name, *args, cwd=None, **env):
    return subprocess.run([sys.executable, ROOT / 'data' / name / 'prepare.py', *map(str, args)], capture_output=True,
                          text=True, cwd=cwd, env={**os.environ, **env})


@pytest.fixture
def run_script(monkeypatch, capsys):
    """A function that runs data/NAME/prepare.py in this process. Returns (exit code, stdout, stderr)."""
    def as_main(name, *args):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
        with pytest.raises(SystemExit) as end:
            script(name, '__main__')
        return end.value.code, *capsys.readouterr()
    return as_main


def ids(folder, split):
    meta = json.loads((Path(folder) / 'meta.json').read_text())
    return np.fromfile(Path(folder) / f'{split}.bin', dtype=meta['dtype'])


def text_of(folder, split):
    tokenizer = Dataset(folder).tokenizer()
    tokens = ids(folder, split).tolist()
    return b''.join(map(tokenizer.token_bytes, tokens)).decode(errors='surrogateescape')


def joined(train, val):
    """The text of both splits, where a character may be cut in two."""
    return (train + val).encode(errors='surrogateescape').decode()


@pytest.fixture
def pyarrow():
    pytest.importorskip('datasets', reason='needs datasets, which brings pyarrow (requirements-dev.txt)')
    import pyarrow
    import pyarrow.parquet
    return pyarrow


@pytest.fixture
def shakespeare_file():
    if not SHAKESPEARE.exists():
        pytest.skip(f'needs the text at {SHAKESPEARE.relative_to(ROOT.parent)} next to the repository')
    return SHAKESPEARE


def small(folder, tokenizer=None, train=b'abc' * 500, val=b'abd' * 100):
    documents = [('train', train.decode(), True), ('val', val.decode(), True)]
    writer.write_dataset(folder, documents, tokenizer or ByteTokenizer(), 'test', workers=1)
    return Path(folder)


# -----------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize('text', ['', 'abc\n', 'naïve 漢字 🙂\r\n\t'])
def test_byte_and_char_round_trips(text):
    for tokenizer in (ByteTokenizer(), CharTokenizer.of(text + 'x')):
        tokens = tokenizer.encode(text).tolist()
        assert b''.join(map(tokenizer.token_bytes, tokens)).decode() == text
        assert len(tokens) == (len(text.encode()) if tokenizer.name == 'byte' else len(text))
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


def test_unknown_characters_are_named():
    for text, bad in (('abz', 'z'), ('aB', 'B'), ('🙂', '🙂')):
        with pytest.raises(UserError, match=f"character '{bad}' is not among the 3"):
            CharTokenizer('abc').encode(text)
    many = CharTokenizer(''.join(map(chr, range(32, 5000))))
    with pytest.raises(UserError, match="character '漢' is not among the 4,968 in the vocabulary") as error:
        many.encode('a漢')
    assert len(str(error.value)) < 300 and '\n' not in str(error.value)


def test_unknown_tokenizer():
    with pytest.raises(UserError, match="tokenizer='gpt22' is not allowed: use one of byte, char, .*gpt2"):
        get_tokenizer('gpt22')


def test_gpt2_tokens(gpt2_tokenizer):
    tokens = gpt2_tokenizer.encode('Hello world<|endoftext|>').tolist()
    assert tokens[:2] == [15496, 995] and 50256 not in tokens  # special tokens in a text are encoded as plain text
    assert prompt_ids(gpt2_tokenizer) == [50256]
    assert prompt_ids(ByteTokenizer()) == [10] and prompt_ids(CharTokenizer('abc')) == [0]


# -----------------------------------------------------------------------------
# Preparation


def test_help_from_another_folder(tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.parent.name for path in (ROOT / 'data').glob('*/prepare.py'))
    assert len(names) == 7
    for name in names:
        monkeypatch.setattr(sys, 'path', [path for path in sys.path if path not in ('', str(ROOT))])
        code, out, err = run_script(name, '--help')
        assert code == 0 and out.startswith('usage: ') and not err, name
        assert sys.path[0] == str(ROOT), name  # the script finds nanop/
    run = in_subprocess('slimpajama', '--help', cwd=tmp_path)
    assert run.returncode == 0 and 'DKYoon/SlimPajama-6B at revision b5f90f4' in run.stdout, run.stderr
    assert not list(tmp_path.iterdir())


def test_shakespeare_char_counts(tmp_path, shakespeare_file):
    meta = writer.write_shakespeare(tmp_path, CharTokenizer.of, ['--input', str(shakespeare_file)])
    assert (meta['train_tokens'], meta['val_tokens'], meta['real_vocab_size']) == (1_003_854, 111_540, 65)
    assert meta['source_sha256'] == writer.SHAKESPEARE_SHA256
    assert text_of(tmp_path, 'train') + text_of(tmp_path, 'val') == shakespeare_file.read_text()


def test_shakespeare_gpt2_counts(tmp_path, shakespeare_file, gpt2_tokenizer):
    run = in_subprocess('shakespeare', '--input', shakespeare_file, '--out', tmp_path)
    assert run.returncode == 0, run.stderr
    meta = json.loads((tmp_path / 'meta.json').read_text())
    assert (meta['train_tokens'], meta['val_tokens']) == (301_966, 36_059)
    assert (meta['vocab_size'], meta['real_vocab_size'], meta['dtype']) == (50304, 50257, 'uint16')
    assert meta['bytes_per_token'] == pytest.approx(111_540 / 36_059)  # plain ASCII
    assert Dataset(tmp_path).bytes_per_token == meta['bytes_per_token']


def test_another_shakespeare_is_refused(tmp_path, run_script):
    (tmp_path / 'input.txt').write_text('To be, or not to be')
    for name, message in (('input.txt', 'is not tiny Shakespeare (19 bytes'), ('nothing.txt', 'cannot be read')):
        code, _, err = run_script('shakespeare_char', '--input', tmp_path / name, '--out', tmp_path / 'out')
        assert code == 2 and message in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_stdlib(tmp_path):
    prepare = script('stdlib')
    files = prepare['source_files']()
    meta = prepare['prepare'](tmp_path)
    assert meta['real_vocab_size'] == 256 and meta['bytes_per_token'] == 1
    assert 5e6 < meta['train_tokens'] < 5e7 and 0.02 < meta['val_tokens'] / meta['train_tokens'] < 0.2
    assert files == sorted(files, key=lambda path: path.parts)
    for path in files:
        assert 'test' not in path.parts and 'site-packages' not in path.parts and '_sysconfigdata' not in path.name
    val = b''.join(path.read_bytes() for path in files[19::20])
    assert ids(tmp_path, 'val').astype(np.uint8).tobytes() == val
    assert prepare['prepare'](tmp_path) == meta  # again, over the first one


def test_stdlib_has_options(tmp_path, run_script):
    code, out, _ = run_script('stdlib', '--out', tmp_path / 'out')
    assert code == 0 and Dataset(tmp_path / 'out').num_tokens['val'] > 0 and str(tmp_path / 'out') in out
    assert run_script('stdlib', '--nonsense')[0] == 2


def test_text_of_every_kind(tmp_path, pyarrow):
    folder = tmp_path / 'in'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'a.txt').write_text('alpha\r\n', newline='')
    (folder / 'b.md').write_text('beta\n')
    (folder / 'sub' / 'c.py').write_text('gamma = 1\n')
    (folder / 'd.jsonl').write_text('{"text": "delta\\n"}\n\n{"text": "epsilon\\n", "x": 1}\n')
    with gzip.open(folder / 'e.txt.gz', 'wt') as file:
        file.write('zeta\n')
    pyarrow.parquet.write_table(pyarrow.table({'text': ['eta\n', 'theta\n']}), folder / 'f.parquet')
    (folder / 'g.bin').write_bytes(b'not text')
    (tmp_path / 'val.weird').write_text('iota\n')
    script('text')['prepare']([str(folder), '--val', str(tmp_path / 'val.*'), '--out', str(tmp_path / 'out')])
    expected = 'alpha\r\n beta\n delta\n epsilon\n zeta\n eta\n theta\n gamma = 1\n'.replace('\n ', '\n')
    assert text_of(tmp_path / 'out', 'train') == expected
    assert text_of(tmp_path / 'out', 'val') == 'iota\n'


def test_text_splits_off_the_tail(tmp_path):
    (tmp_path / 'a.txt').write_text(''.join(f'line {i}\n' for i in range(1000)))
    for tokenizer in ('byte', 'char'):
        out = tmp_path / tokenizer
        script('text')['prepare']([str(tmp_path / 'a.txt'), f'--tokenizer={tokenizer}', '--val_frac=0.2',
                                   f'--out={out}'])
        assert text_of(out, 'train') + text_of(out, 'val') == (tmp_path / 'a.txt').read_text()
        assert len(ids(out, 'val')) == pytest.approx(0.2 * len(ids(out, 'train')) / 0.8, abs=2)


def test_pieces_are_cut_where_tokens_end(gpt2_tokenizer, monkeypatch):
    text = ''.join(f'  indented {i}\n\n\nword,{i}.\n\tend \n \nx{i}\ny   \n' for i in range(200))
    whole = gpt2_tokenizer.encode(text).tolist()
    for size in (50, 64, 100, 333):
        monkeypatch.setattr(text_files, 'PIECE_CHARS', size)
        parts = list(text_files.pieces(text[i:i + size] for i in range(0, len(text), size)))
        assert len(parts) > 5 and ''.join(part for part, _ in parts) == text
        assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
        assert sum((gpt2_tokenizer.encode(part).tolist() for part, _ in parts), []) == whole
        for (part, _), (following, _) in zip(parts, parts[1:]):  # other encodings have tokens of several spaces
            assert not part[-1].isspace() and following[0] == ' ' and not following[1].isspace()


def test_text_in_pieces_and_processes_gives_the_tokens_of_the_whole(tmp_path, gpt2_tokenizer):
    text = ''.join(f'  indented {i}\n\n\nword,{i}.\n\tend \n \nx{i}\ny\n' for i in range(90_000))
    assert len(text) > 3 * writer.PIECE_CHARS
    (tmp_path / 'a.txt').write_text(text)
    script('text')['prepare']([str(tmp_path / 'a.txt'), '--tokenizer=gpt2', f'--out={tmp_path / "out"}', '--workers=2'])
    tokens = np.concatenate([ids(tmp_path / 'out', 'train'), ids(tmp_path / 'out', 'val')])
    whole = gpt2_tokenizer.encode(text)
    assert tokens[-1] == gpt2_tokenizer.end_of_text
    assert np.array_equal(tokens[:-1], whole)


@pytest.mark.parametrize('arguments, message', [
    (['nothing.txt'], "'nothing.txt' matches no file"),
    (['bad.jsonl'], "'bad.jsonl', line 2: no text under 'text'"),
    (['bad.parquet'], "'bad.parquet'"),
    (['bad.txt.gz'], "'bad.txt.gz' cannot be read"),
    (['empty.txt'], 'no text for train.bin'),
    (['good.txt', '--val_frac=2'], '--val_frac=2.0 is not allowed'),
    (['good.txt', '--tokenizer=bytes'], "tokenizer='bytes' is not allowed"),
])
def test_bad_text(tmp_path, arguments, message, monkeypatch, pyarrow):
    monkeypatch.chdir(tmp_path)
    Path('bad.jsonl').write_text('{"text": "ok"}\n{"body": "no"}\n')
    Path('bad.parquet').write_bytes(b'PAR1 but not really')
    Path('bad.txt.gz').write_bytes(b'not gzip')
    Path('empty.txt').write_text('')
    Path('good.txt').write_text('good text\n')
    out = small(tmp_path / 'out')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError) as error:
        script('text')['prepare']([*arguments, f'--out={out}'])
    assert message in str(error.value) and '\n' not in str(error.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # the old dataset is still there


# -----------------------------------------------------------------------------
# Your own text: which files, what is in them, and what is said about it

TEXT = 'Grüße, 漢字 🙂\r\nsecond line\n' * 40
BINARY = bytes(range(256)) * 20


class WithEndOfText(ByteTokenizer):
    """Bytes and a token for the end of a document."""
    name, vocab_size, end_of_text = 'byte and end', 257, 256

    def encode(self, text):
        return super().encode(text).astype(np.uint16)

    def token_bytes(self, token):
        return b'<|endoftext|>' if token == 256 else bytes([token])


@pytest.fixture
def prepare_text(tmp_path, monkeypatch, capsys):
    """A function that runs data/text/prepare.py in `tmp_path`. Returns (training text, validation text, notes)."""
    monkeypatch.chdir(tmp_path)
    prepare = script('text')['prepare']

    def prepared(*arguments):
        prepare([*map(str, arguments), '--out=out'])
        out, err = capsys.readouterr()
        notes = err.splitlines()
        assert out.count('\n') == 1 and all(line.startswith('note: ') for line in notes), (out, err)
        return text_of(tmp_path / 'out', 'train'), text_of(tmp_path / 'out', 'val'), notes
    return prepared


def refusal(prepare_text, *arguments):
    """The error of a preparation, which must be one line and leave no temporary file."""
    with pytest.raises(UserError) as error:
        prepare_text(*arguments)
    assert '\n' not in str(error.value) and not list(Path('out').glob('*.tmp*'))
    return str(error.value)


@pytest.fixture
def spelled(tmp_path):
    """A function that makes a file in `tmp_path` again, under another spelling of its path."""
    def spell(path, how):
        linked = Path('linked')
        if how == 'link':
            linked.symlink_to(path)
        elif how == 'hard link':
            os.link(path, linked)
        elif how == 'linked folder':
            linked.symlink_to(Path(path).parent)
        return {'dot': f'./{path}', 'slashes': path.replace('/', '//'), 'absolute': str(tmp_path / path),
                'up': f'corpus/../{path}', 'linked folder': f'linked/{Path(path).name}'}.get(how, 'linked')
    return spell


SPELLINGS = ['dot', 'slashes', 'absolute', 'up', 'link', 'hard link', 'linked folder']


@pytest.mark.parametrize('how', SPELLINGS)
def test_a_file_is_one_file_however_it_is_spelled(tmp_path, prepare_text, spelled, how):
    (tmp_path / 'corpus').mkdir()
    for name in 'abv':
        (tmp_path / 'corpus' / f'{name}.txt').write_text(f'{name} text\n')
    again = spelled('corpus/v.txt', how)
    train, val, notes = prepare_text('corpus', '--val', again)
    assert (train, val) == ('a text\nb text\n', 'v text\n')
    assert len(notes) == 1 and 'both splits' in notes[0] and ': 1 ' in notes[0]
    train, val, notes = prepare_text('corpus', again, 'corpus/v.txt')
    assert train + val == 'a text\nb text\nv text\n'
    assert len(notes) == 1 and 'count once: 2 ' in notes[0]


def test_all_files_in_both_splits(tmp_path, prepare_text):
    (tmp_path / 'a.txt').write_text('a')
    assert 'also given with --val' in refusal(prepare_text, 'a.txt', '--val', './a.txt')


def test_what_folders_leave_out_is_said(tmp_path, prepare_text, monkeypatch):
    corpus, elsewhere = tmp_path / 'corpus', tmp_path / 'elsewhere'
    for name in ('a.txt', '._a.txt', '.venv/lib.py', 'sub/.ipynb_checkpoints/a.md', '__pycache__/x.py',
                 '__MACOSX/y.txt', 'photo.jpg', 'sub/b.TXT', 'sub/data.json', 'c.Py.XZ', '../elsewhere/d.md'):
        path = corpus / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(b'c\n') if name.endswith('XZ') else f'{path.stem}\n'.encode())
    (corpus / 'sub' / 'elsewhere').symlink_to(elsewhere)
    (elsewhere / 'back').symlink_to(corpus)
    (corpus / 'sub' / 'up').symlink_to('../..')
    (corpus / 'twin').symlink_to('sub')
    (corpus / 'broken.txt').symlink_to('nowhere')
    os.mkfifo(corpus / 'pipe.txt')
    train, val, notes = prepare_text('corpus')
    assert sorted((train + val).split()) == ['a', 'b', 'c', 'd']
    found = {key: next((line for line in notes if key in line), None)
             for key in ('hidden', 'other suffixes', 'links to folders', 'broken links')}
    assert {key: int(line.split(': ')[2].split()[0]) for key, line in found.items()} == {
        'hidden': 5, 'other suffixes': 2, 'links to folders': 3, 'broken links': 2} and len(notes) == 4, notes
    assert "'corpus/" in found['hidden'] and 'photo.jpg' in found['other suffixes']
    monkeypatch.chdir(corpus)
    for folder in ('.', '..', '../corpus/', 'sub/..', 'sub/up'):
        files = dict.fromkeys(text_files.find_files([folder], text_files.Notes()).values(), 'train')
        texts = [text for _, text, _ in text_files.documents(files, 'text', '', text_files.Notes())]
        assert sorted(''.join(texts).split()) == ['a', 'b', 'c', 'd'], folder


@pytest.mark.parametrize('pattern, read', [
    ('corpus/**/*.txt', 'abcf'), ('**/*.txt', 'abcf'), ('corpus/**/sub/**/*.txt', 'bc'), ('corpus/**/', 'abcf'),
    ('corpus/**', 'abcdf'), ('corpus/**/*', 'abcdf'), ('corpus/*/*.txt', 'bf'), ('co*/**/__pycache__/*', 'e'),
    ('corpus/**/.h/*', 'h'), ('corpus/**/[[]1]/*', 'f'), ('corpus/sub/loop/**/*.txt', 'abcf')])
def test_globs_search_as_folders_are_searched(tmp_path, prepare_text, pattern, read):
    """Links that loop end, each file is read once, hidden files and junk are left out unless the pattern names them."""
    for name in ('a.txt', 'sub/b.txt', 'sub/deep/c.txt', 'd.csv', '__pycache__/e.txt', '[1]/f.txt', '.h/h.txt'):
        (tmp_path / 'corpus' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'corpus' / name).write_text(Path(name).stem * 2)
    for i in range(9):  # 9 ** 40 ways
        (tmp_path / 'corpus' / 'sub' / 'deep' / f'loop{i}').symlink_to('../..')
    (tmp_path / 'corpus' / 'sub' / 'loop').symlink_to('..')
    train, val, _ = prepare_text(pattern)
    assert sorted(train + val) == sorted(read * 2)


def test_what_another_pattern_reads_is_not_left_out(tmp_path, prepare_text):
    for name in ('a.txt', 'b.csv', '.c', '.d/d.txt', '.e.txt', 'f.log', '__pycache__/g.py'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_text(Path(name).stem)
    train, val, notes = prepare_text('in', 'in/*.csv', 'in/.c', './in/.d', '--val', 'in/.e.txt')
    assert (sorted(train), val) == (sorted('abd.c'), '.e')
    assert len(notes) == 2 and '__MACOSX left out (read if given by name): 1 ' in notes[0] + notes[1]
    assert 'other suffixes in folders left out (read if given by name): 1 ' in notes[0] + notes[1]


@pytest.mark.parametrize('name', ['.hidden.txt', '.hidden/a.txt', '__pycache__/a.py', 'a.weird', 'no_suffix'])
def test_what_is_given_by_name_is_read(tmp_path, prepare_text, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('some text')
    assert ''.join(prepare_text(name)[:2]) == 'some text'
    if '/' in name:
        assert ''.join(prepare_text(Path(name).parent)[:2]) == 'some text'
    assert ''.join(prepare_text(f'{name[:-2]}*')[:2]) == 'some text'


@pytest.mark.parametrize('name', ['pipe', 'broken', 'empty', 'other'])
def test_nothing_to_read(tmp_path, prepare_text, name):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'broken').symlink_to('nowhere')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'x.csv').write_text('a,b')
    message = dict(other='other suffixes', empty='matches no file').get(name, 'is a broken link, a pipe or a device')
    assert message in refusal(prepare_text, name)


READABLE = {
    'a.txt': TEXT.encode(), 'UPPER.TXT': TEXT.encode(), 'A.TXT.GZ': gzip.compress(TEXT.encode()),
    'a.bz2': bz2.compress(TEXT.encode()), 'a.Md.Xz': lzma.compress(TEXT.encode()),
    'a.lzma': lzma.compress(TEXT.encode(), lzma.FORMAT_ALONE), 'gzip.txt': gzip.compress(TEXT.encode()),
    'gzip.bz2': gzip.compress(TEXT.encode()), 'bz2.txt': bz2.compress(TEXT.encode()),
    'members.gz': gzip.compress(TEXT[:3].encode()) + gzip.compress(TEXT[3:].encode()),
    'utf8.txt': TEXT.encode('utf-8-sig'), 'utf16.txt': TEXT.encode('utf-16'), 'utf32.txt': TEXT.encode('utf-32'),
    'be16.txt': codecs.BOM_UTF16_BE + TEXT.encode('utf-16-be'), 'utf16.gz': gzip.compress(TEXT.encode('utf-16')),
    'be32.txt': codecs.BOM_UTF32_BE + TEXT.encode('utf-32-be'),
    'real\ufffd.txt': TEXT.encode(), 'new\nline.txt': TEXT.encode(), "it's.txt": TEXT.encode(),
    **{name: (f'{json.dumps(dict(text=TEXT[:9]))}\r\n\r\n{json.dumps(dict(x=1, text=TEXT[9:]))}').encode(encoding)
       for name, encoding in {'X.JSONL': 'utf-8', 'x.ndjson': 'utf-8-sig', 'x.json': 'utf-16'}.items()},
    'x.json.Gz': gzip.compress(json.dumps(dict(text=TEXT)).encode())}


@pytest.mark.parametrize('name', READABLE)
def test_what_can_be_read_is_read(tmp_path, prepare_text, name):
    (tmp_path / name).write_bytes(READABLE[name])
    for tokenizer in ('byte', 'char'):
        train, val, notes = prepare_text(name, '--val', name) if 'val' in name else prepare_text(
            name, '--val_frac=0.0005', f'--tokenizer={tokenizer}')
        assert joined(train, val) == TEXT and not notes


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('a.txt', TEXT)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('a.txt'))
    return file.getvalue()


def test_a_file_with_a_slash_at_its_end(tmp_path, prepare_text):
    (tmp_path / 'a.txt').write_text('text')
    for name in ('a.txt/', 'a.txt//', f'{tmp_path}/a.txt/'):
        assert "a.txt' is a file and no folder: leave out the last '/'" in refusal(prepare_text, name)


REFUSED = {
    'zip.txt': (zipped(), 'zip archive'), 'book.EPUB': (zipped(), 'zip archive'), 'tar.txt': (tarred(), 'tar archive'),
    'tar.tar.gz': (gzip.compress(tarred()), 'tar archive'),
    'zstd.jsonl': (b'\x28\xb5\x2f\xfd' + BINARY, 'looks like zstd'),
    'a.pdf': (b'%PDF-1.7\n' + TEXT.encode(), 'PDF'), 'a.png': (b'\x89PNG\r\n' + BINARY, 'image'),
    'twice.gz': (gzip.compress(gzip.compress(TEXT.encode())), 'packed twice'),
    'named.gz': (TEXT.encode(), 'its name says that it is compressed'), 'nothing.xz': (b'', 'its name says'),
    'binary.txt': (BINARY, 'NUL'), 'random.md': (np.random.default_rng(0).bytes(5000), 'is not text in UTF-8'),
    'noBOM16.txt': (TEXT.encode('utf-16-le'), 'UTF-16 without'), 'noBOM32.txt': (TEXT.encode('utf-32-be'), 'NUL'),
    'latin.txt': ('Grüße aus Köln\n'.encode('latin1') * 9, 'iconv -f latin1'),
    'sjis.txt': ('漢字'.encode('sjis') * 9, 'are wrong'),
    'latin.jsonl': ('{"text": "Grüße"}\n'.encode('latin1'), 'iconv -f latin1'),
    'latin.bz2': (bz2.compress('Grüße'.encode('latin1')), 'iconv -f latin1'),
    'end.txt': (b'x' * 5000 + b'\xe9' * 50, 'of 5,050 characters 50 are wrong'),
    'array.json': (b'[{"text": "a"}]', 'line 1: no text under'),
    'pretty.json': (b'{\n"text": "a"\n}', 'one object a line'),
    'text.jsonl': (b'"text"', 'holds a str'), 'text.parquet': (b'text', 'cannot be read'),
    'missing.jsonl': (b'{"text": "ok"}\n\n{"t": 1, "u": 2}', "line 3: no text under 'text' (it holds 't', 'u')"),
    'deep.jsonl': (b'{"text":' + b'[' * 100_000, 'line 1'),
    'digits.jsonl': (b'{"text":' + b'1' * 5000 + b'}', 'line 1'),
    **{f'{name}.jsonl': (json.dumps(dict(text='ok')).encode() + b'\n' + json.dumps(dict(text=value)).encode(),
                         f"line 2: 'text' holds a value of type {name}")
       for name, value in dict(list=['a'], dict=dict(a='b'), int=3, float=1.5, bool=True).items()}}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_text_is_refused(tmp_path, prepare_text, name):
    content, message = REFUSED[name]
    small(tmp_path / 'out')
    (tmp_path / name).write_bytes(content)
    error = refusal(prepare_text, name)
    assert message in error and error.startswith(repr(name))
    assert text_of(tmp_path / 'out', 'val') == 'abd' * 100  # the old dataset


@pytest.mark.parametrize('how', ['truncated', 'damaged', 'damaged at the start'])
@pytest.mark.parametrize('module', [gzip, bz2, lzma], ids=lambda module: module.__name__)
def test_damaged_compressed_files(tmp_path, prepare_text, module, how):
    content = bytearray(module.compress(np.random.default_rng(0).bytes(3000).hex().encode()))
    if how != 'truncated':
        content[len(content) // 2 if how == 'damaged' else 14] ^= 255
    small(tmp_path / 'out')
    for name in ('a.gz', 'a.txt', 'a.jsonl', 'a.parquet'):
        (tmp_path / name).write_bytes(content[:-9] if how == 'truncated' else content)
        assert f'{name!r} cannot be read' in refusal(prepare_text, name)
    assert text_of(tmp_path / 'out', 'val') == 'abd' * 100


@pytest.mark.parametrize('how', ['damaged', 'cut', 'garbage', 'zeros'])
@pytest.mark.parametrize('module', [bz2, lzma, gzip], ids=lambda module: module.__name__)
def test_damage_after_the_first_stream(tmp_path, prepare_text, module, how):
    first, second = module.compress(b'first' * 900), module.compress(b'second' * 900)
    end = {'damaged': b'\x07' + second[1:], 'cut': second[:9], 'garbage': second + b'garbage', 'zeros': b'\0' * 7}[how]
    (tmp_path / 'a.txt').write_bytes(first + second)
    train, val, notes = prepare_text('a.txt')
    assert train + val == 'first' * 900 + 'second' * 900 and not notes
    (tmp_path / 'a.txt').write_bytes(first + end)
    if module is not gzip or how != 'zeros':  # which may pad it
        assert 'it may be damaged' in refusal(prepare_text, 'a.txt')
    (tmp_path / 'a.txt').write_bytes(first + bytes(8) + second + bytes(4))
    if module is lzma:
        assert ''.join(prepare_text('a.txt')[:2]) == 'first' * 900 + 'second' * 900


def test_packed_parquet(tmp_path, prepare_text, pyarrow):
    pyarrow.parquet.write_table(pyarrow.table({'text': ['some', 'text']}), tmp_path / 'a')
    for module in (bz2, lzma, gzip):
        (tmp_path / 'a.parquet.gz').write_bytes(module.compress((tmp_path / 'a').read_bytes()))
        assert ''.join(prepare_text('a.parquet.gz')[:2]) == 'sometext'


@pytest.mark.parametrize('name, encoding', [('UTF-16', 'utf-16'), ('UTF-32', 'utf-32'), ('UTF-8', 'utf-8-sig')])
def test_damage_names_the_encoding_of_the_mark(tmp_path, prepare_text, name, encoding):
    wrong = {'utf-16': b'\0\xdc', 'utf-32': b'\xff' * 4}.get(encoding, b'\xff')
    (tmp_path / 'a.txt').write_bytes(('x' * 5000).encode(encoding) + wrong)
    assert f'characters that were not {name}, replaced by U+FFFD: 1 ' in prepare_text('a.txt')[2][0]
    (tmp_path / 'a.txt').write_bytes('x'.encode(encoding) + wrong)
    error = refusal(prepare_text, 'a.txt')
    assert f'is not text in {name} (' in error and ('Latin-1' in error) == (name == 'UTF-8')


def test_replaced_characters_are_counted(tmp_path, prepare_text):
    """In files of any size: here of two pieces, the second with too many if it were a file of its own."""
    good = 'x' * (text_files.PIECE_CHARS - 1)
    (tmp_path / 'a.txt').write_bytes(f'{good}\ufffd'.encode() + b'z' * 9000 + b'\xff' * 20)
    (tmp_path / 'b.txt').write_bytes(b'y' * 3000 + b'\xe2\x82' + 'é'.encode() * 3000)
    train, val, notes = prepare_text('a.txt', '--val', 'b.txt')
    assert train == good + '\ufffd' + 'z' * 9000 + '\ufffd' * 20 and val == 'y' * 3000 + '\ufffd' + 'é' * 3000
    assert len(notes) == 1 and 'replaced by U+FFFD: 21 ' in notes[0] and "'a.txt'" in notes[0]


@pytest.mark.parametrize('tokenizer', ['byte', 'char'])
def test_halves_of_surrogate_pairs_are_replaced(tmp_path, prepare_text, tokenizer):
    rest = 'x' * 2000  # a short text with a half is fine in a file with enough text
    (tmp_path / 'a.jsonl').write_text(r'{"text": "a\ud83d\ude00b\ud83dc\ude00"}' + f'\n{{"text": "{rest}"}}')
    train, val, notes = prepare_text('a.jsonl', f'--tokenizer={tokenizer}')
    assert joined(train, val) == 'a😀b\ufffdc\ufffd' + rest
    assert len(notes) == 1 and 'U+FFFD: 2 ' in notes[0] and "'a.jsonl', line 1" in notes[0]
    odd = CharTokenizer.of('a\ud83d')
    assert b''.join(map(odd.token_bytes, odd.encode('\ud83da'))) == b'?a'


@pytest.mark.parametrize('line, words', [
    ('{"x": %s, "text": 1}' % ('9' * 5000), "line 1: 'text' holds a value of type int"),
    (r'{"text": "%s"}' % (r'\u0000' * 20), 'of 20 characters 0 are wrong and 20 NUL'),
    (r'{"text": "%s"}' % (r'\ud83d' * 20), 'of 20 characters 20 are halves of surrogate pairs'),
    (json.dumps({f'key {i}' * 9: i for i in range(5000)}), 'and 4,990 more): name the column'),
    ('\n'.join(['{"text": null}'] * 20), 'no text for train.bin in 1 local files (null values skipped: 20 (such as')])
def test_odd_json_lines(tmp_path, prepare_text, line, words):
    (tmp_path / 'a.jsonl').write_text(line)
    error = refusal(prepare_text, 'a.jsonl')
    assert words in error and len(error) < 1000
    (tmp_path / 'a.jsonl').write_text('{"x": %s, "text": "fine"}' % ('9' * 5000))
    assert ''.join(prepare_text('a.jsonl')[:2]) == 'fine'


def test_null_is_skipped_and_counted(tmp_path, prepare_text):
    (tmp_path / 'a.jsonl').write_text('{"text": null}\n{"text": "abc"}\n{"text": null}\n{"text": ""}\n{"text": "None"}')
    train, val, notes = prepare_text('a.jsonl')
    assert train + val == 'abcNone'
    assert len(notes) == 1 and 'null values skipped: 2 ' in notes[0] and "'a.jsonl', line 1" in notes[0]


@pytest.mark.parametrize('type_', ['string', 'large_string', 'binary', 'large_binary', 'dictionary', 'string_view'])
def test_parquet_columns_of_text(tmp_path, prepare_text, pyarrow, type_):
    """Binary columns are UTF-8, a null is skipped."""
    values = ['alpha', None, 'Grüße', '']
    if 'binary' in type_:
        values = [value and value.encode() for value in values]
    array = pyarrow.array(values, pyarrow.string() if type_ == 'dictionary' else getattr(pyarrow, type_)())
    table = pyarrow.table({'n': [1, 2, 3, 4], 'body': array.dictionary_encode() if type_ == 'dictionary' else array})
    pyarrow.parquet.write_table(table, tmp_path / 'a.Parquet')
    train, val, notes = prepare_text('a.Parquet', '--column=body')
    assert joined(train, val) == 'alphaGrüße'
    assert len(notes) == 1 and "null values skipped: 1 (such as 'a.Parquet', row 2)" in notes[0]


@pytest.mark.parametrize('values, message', [
    ([['a'], ['b']], 'not text: use a column of text'), ([None, 3], 'not text: use a column of text'),
    ([{'a': 'b'}], 'not text: use a column of text'), ([b'fine', BINARY], "row 2: the value under 'text' is not text"),
    (['fine', 'nul\0' * 9], "row 2: the value under 'text' is not text"),
])
def test_parquet_columns_of_other_values(tmp_path, prepare_text, run_script, pyarrow, values, message):
    pyarrow.parquet.write_table(pyarrow.table({'text': values}), tmp_path / 'a.parquet')
    small(tmp_path / 'out')
    assert message in refusal(prepare_text, 'a.parquet')
    code, _, err = run_script('slimpajama', '--input=a.parquet', '--out=out', '--tokenizer=byte', '--workers=1')
    assert code == 2 and err.count('error: ') == 1 and message in err and 'Traceback' not in err
    assert {path.name for path in Path('out').iterdir()} == {'meta.json', 'train.bin', 'val.bin'}
    assert text_of(tmp_path / 'out', 'val') == 'abd' * 100


@pytest.mark.parametrize('type_', ['timestamp[us]', 'timestamp[us, tz=No/Where]', 'date32[day]', 'int64', 'twice',
                                   'damaged'])
def test_parquet_that_cannot_be_converted(tmp_path, prepare_text, pyarrow, type_):
    words = f"'text' holds {type_}, not text: use a column of text"
    array = pyarrow.array([2**62])
    if 'date' in type_:
        array = pyarrow.array([2**30], pyarrow.int32()).cast(pyarrow.date32())
    if 'time' in type_:
        array = array.cast(pyarrow.timestamp('us', 'No/Where' if 'tz' in type_ else None))
    names = ['text', 'text' if type_ == 'twice' else 'other']
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([array, array], names), tmp_path / 'a.parquet')
    if type_ == 'twice':
        words = "more than one column (it holds 'text', 'text')"
    elif type_ == 'damaged':
        (tmp_path / 'a.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:-20])
        words = 'it may be damaged, get it again or leave it out'
    assert words in refusal(prepare_text, 'a.parquet')


@pytest.mark.parametrize('separator', ['<|endoftext|>', '\n\n', ' == ', 'x', 'a a a'])
@pytest.mark.parametrize('size', [7, 20, 50])
def test_a_separator_ends_a_document(monkeypatch, separator, size):
    """Wherever it is: at the ends, twice in a row, across the parts in which a file is read or a text is cut."""
    monkeypatch.setattr(text_files, 'PIECE_CHARS', size)
    rng, notes = np.random.default_rng(size), text_files.Notes()
    for _ in range(100):
        words = rng.choice(['a', ' ', 'word', separator, separator[:-1], separator[1:], '=', '\n'], 60)
        text = ''.join(words)
        expected = text.split(separator)
        parts = text_files.pieces((text[i:i + size] for i in range(0, len(text), size)), separator, 'here', notes)
        found, document = [], ''
        for part, ends in parts:
            document += part
            if ends:
                found.append(document)
                document = ''
        assert not document and found == (expected if expected[-1] else expected[:-1])
    assert notes[text_files.SEPARATORS][0] > 100
    for nothing in ([], ['']):
        assert list(text_files.pieces(nothing, separator, 'here', notes)) == [('', True)]


def test_separators_from_the_command_line(tmp_path, prepare_text, monkeypatch):
    (tmp_path / 'a.txt').write_text('one<|endoftext|>two<|endoftext|>')
    (tmp_path / 'b.jsonl').write_text('{"text": "three<|endoftext|>four"}')
    files = ('a.txt', '--val', 'b.jsonl')
    train, val, notes = prepare_text(*files)
    assert train == 'one<|endoftext|>two<|endoftext|>' and len(notes) == 1
    assert '<|endoftext|> read as plain text (--separator' in notes[0] and ': 3 ' in notes[0]
    train, val, notes = prepare_text(*files, '--separator=<|endoftext|>')
    assert (train, val) == ('onetwo', 'threefour') and len(notes) == 2
    assert 'ended a document: 3 ' in notes[0] and 'tokenizer byte has no token for the end of a document' in notes[1]
    assert 'never occurs' in prepare_text('a.txt', '--separator=###')[2][-1]
    assert "--separator='' is not allowed" in refusal(prepare_text, 'a.txt', '--separator=')
    prepare = script('text')['prepare']
    monkeypatch.setitem(prepare.__globals__, 'get_tokenizer', lambda name: WithEndOfText())
    prepare([*files, '--separator=<|endoftext|>', '--out=out', '--workers=1'])
    assert ids('out', 'train').tolist() == [*b'one', 256, *b'two', 256]
    assert ids('out', 'val').tolist() == [*b'three', 256, *b'four', 256]


@pytest.mark.parametrize('option', ['--val_frac=nan', '--val_frac=0.0', '--val_frac=inf', '--workers=0', '--workers=-1',
                                    '--column=body', '--val_frac=0.1 --val a.txt'])
def test_options_that_cannot_be_followed(tmp_path, prepare_text, option):
    (tmp_path / 'a.txt').write_text('text')
    error = refusal(prepare_text, 'a.txt', *option.split())
    assert error.startswith(f"{option.partition('=')[0]}=") and 'is not allowed' in error


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_split_of_empty_documents_is_refused(tmp_path, split):
    documents = [('val' if split == 'train' else 'train', 'text', True), (split, '', True), (split, '', True)]
    with pytest.raises(UserError, match=f'no text for {split}.bin in test'):
        writer.write_dataset(tmp_path, documents, WithEndOfText(), 'test', workers=1)
    assert not list(tmp_path.iterdir())


def test_vocabularies_beyond_uint16_get_uint32(tmp_path):
    class Big(ByteTokenizer):
        name, vocab_size = 'big', 70_000

        def encode(self, text):
            return np.full(len(text), 69_999, dtype=np.uint32)

        def token_bytes(self, token):
            return b'x'
    small(tmp_path, Big())
    meta = json.loads((tmp_path / 'meta.json').read_text())
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] == 70_016
    data = Dataset(tmp_path)
    assert data.batch('train', [0, 5], 8, torch.device('cpu'))[0].max() == 69_999


@pytest.fixture
def local_parquet(tmp_path, pyarrow):
    """A function that writes lists of texts to 0.parquet, 1.parquet, .. in tmp_path."""
    def write(texts):
        for i, part in enumerate(texts):
            table = pyarrow.table({'text': part, 'id': list(range(len(part)))})
            pyarrow.parquet.write_table(table, tmp_path / f'{i}.parquet')
    return write


@pytest.mark.parametrize('name', ['openwebtext', 'fineweb', 'slimpajama'])
def test_parquet_sets(tmp_path, name, gpt2_tokenizer, local_parquet, run_script):
    local_parquet([['first document', 'second one', ''], ['third <|endoftext|> text']])
    code, _, err = run_script(name, '--input', tmp_path / '*.parquet', '--out', tmp_path / 'out', '--workers=1')
    assert code == 0, err

    def encode(text):
        return gpt2_tokenizer.encode(text).tolist() + [gpt2_tokenizer.end_of_text]
    assert ids(tmp_path / 'out', 'train').tolist() == encode('second one') + encode('')
    assert ids(tmp_path / 'out', 'val').tolist() == encode('first document') + encode('third <|endoftext|> text')
    assert Dataset(tmp_path / 'out').bytes_per_token == len('first documentthird <|endoftext|> text') / len(
        ids(tmp_path / 'out', 'val'))
    assert not (tmp_path / 'out' / 'shards').exists()


def test_a_bad_parquet_file_is_one_line(tmp_path, pyarrow, run_script):
    pyarrow.parquet.write_table(pyarrow.table({'body': ['x']}), tmp_path / 'a.parquet')
    code, _, err = run_script('fineweb', '--input', tmp_path / '*.parquet', '--out', tmp_path / 'out',
                              '--tokenizer=byte')
    assert code == 2 and "a.parquet' cannot be read" in err and 'Traceback' not in err
    assert not list((tmp_path / 'out').glob('*.tmp*'))


def test_an_error_while_processes_tokenise_does_not_hang(gpt2_tokenizer, tmp_path):
    def documents():
        for _ in range(30):
            yield 'train', 'word ' * (writer.PIECE_CHARS // 5), True
        raise UserError('enough')
    with pytest.raises(UserError, match='enough'):
        writer.write_dataset(tmp_path, documents(), gpt2_tokenizer, 'test', workers=2)
    for _ in writer.tokenized(documents(), gpt2_tokenizer, 2):
        break  # a reader that stops early
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_one_line(gpt2_tokenizer):
    def documents():
        for number in range(30):
            yield 'train', 'word ' * (writer.PIECE_CHARS // 5), True
            if number == 10:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match='a tokenizing process was killed.*fewer --workers'):
        list(writer.tokenized(documents(), gpt2_tokenizer, 2))


def test_parquet_sets_go_on_after_a_stop(tmp_path, monkeypatch, local_parquet):
    local_parquet([[f'document {i} {j}' for j in range(5)] for i in range(3)])
    arguments = ['--input', str(tmp_path / '*.parquet'), '--tokenizer=byte', '--workers=1']

    def prepare(out):
        return writer.write_parquet(out, 'repo', 'revision', '*.parquet', arguments, val_every=4)
    whole = prepare(tmp_path / 'whole')
    read, real = [], writer.parquet_documents

    def stops_in_the_third(file, val_every):
        read.append(file)
        for number, document in enumerate(real(file, val_every)):
            if file.endswith('2.parquet') and number == 3:
                raise KeyboardInterrupt
            yield document
    monkeypatch.setattr(writer, 'parquet_documents', stops_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / 'out')
    assert not (tmp_path / 'out' / 'meta.json').exists()
    with pytest.raises(UserError, match='no dataset'):
        Dataset(tmp_path / 'out')
    read.clear()
    monkeypatch.setattr(writer, 'parquet_documents', lambda *args: (read.append(args[0]), real(*args))[1])
    assert prepare(tmp_path / 'out') == whole
    assert [Path(file).name for file in read] == ['2.parquet']  # the finished shards are not read again
    for split in ('train', 'val'):
        assert np.array_equal(ids(tmp_path / 'out', split), ids(tmp_path / 'whole', split))


def test_no_network_is_one_line(tmp_path):
    run = in_subprocess('fineweb', '--out', tmp_path, TIKTOKEN_CACHE_DIR=os.environ.get('TIKTOKEN_CACHE_DIR', ''),
                        HF_HUB_OFFLINE='1')
    assert run.returncode == 2 and 'Traceback' not in run.stderr
    assert run.stderr.count('error: ') == 1
    assert any(text in run.stderr for text in ('cannot be listed', 'could not be downloaded', 'pip install datasets'))


def failing_after(calls, function, error):
    """Wrap `function` so that it raises `error` after this many calls."""
    left = iter(range(calls))

    def wrapped(*args, **kwargs):
        if next(left, None) is None:
            raise error
        return function(*args, **kwargs)
    return wrapped


def test_a_stopped_preparation_leaves_no_half_dataset(tmp_path, monkeypatch):
    """After a stop before any rename, the folder holds no dataset or a whole one, old or new."""
    found = []
    for renames in range(4):
        small(tmp_path, train=b'old', val=b'old')
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if renames < 3 else nullcontext():
            patch.setattr(os, 'replace', failing_after(renames, os.replace, KeyboardInterrupt))
            small(tmp_path, train=b'newer', val=b'newer')
        try:
            found.append(text_of(tmp_path, 'train'))
            assert text_of(tmp_path, 'val') == found[-1]
        except UserError as error:
            assert 'no dataset' in str(error)
            found.append(None)
        assert not list(tmp_path.glob('*.tmp*')) or renames < 3
    assert found == [None, None, None, 'newer']


def test_a_full_disk_does_not_cost_the_old_dataset(tmp_path, monkeypatch):
    small(tmp_path, train=b'old', val=b'old')
    full = OSError(errno.ENOSPC, 'No space left on device')
    for written in range(3):  # complete files before the disk is full
        with monkeypatch.context() as patch, pytest.raises((OSError, UserError), match='No space left'):
            patch.setattr(os, 'fsync', failing_after(written, os.fsync, full))
            small(tmp_path, train=b'newer', val=b'newer')
        assert text_of(tmp_path, 'train') == text_of(tmp_path, 'val') == 'old'


def test_any_error_of_the_disk_is_one_line(tmp_path, monkeypatch):
    """Whichever call fails: no temporary file is left, and a dataset, if there is one, is whole."""
    full = OSError(errno.ENOSPC, 'No space left on device')
    failed = 0
    for module, name, most in ((os, 'fsync', 3), (os, 'replace', 3), (builtins, 'open', 9), (Path, 'mkdir', 1),
                               (writer, 'write_durably', 1), (writer, 'count_bytes', 2), (writer, 'move_tail', 1)):
        for calls in range(most + 1):
            folder = small(tmp_path / 'out', train=b'old', val=b'old')
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing_after(calls, getattr(module, name), full))
                try:
                    writer.write_dataset(folder, [('train', 'newer' * 9, True)], ByteTokenizer(), 'test', val_frac=0.5)
                except UserError as error:
                    failed += 1
                    assert 'cannot be written' in str(error) and 'No space left' in str(error)
            assert {path.name for path in folder.iterdir()} <= {'train.bin', 'val.bin', 'meta.json'}
            assert name == 'replace' or text_of(folder, 'train')[:2] in ('ol', 'ne')
    assert failed >= 15


def limited(command, size):
    """Run a command that cannot write files of more than `size` bytes."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit,
                          env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})


def test_a_disk_that_is_really_full(tmp_path):
    (tmp_path / 'a.txt').write_text('text ' * 50_000)
    out = small(tmp_path / 'out')
    run = limited([sys.executable, ROOT / 'data/text/prepare.py', tmp_path / 'a.txt', f'--out={out}'], 100_000)
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'cannot be written' in run.stderr, run.stderr
    assert {path.name for path in out.iterdir()} == {'train.bin', 'val.bin', 'meta.json'}
    assert text_of(out, 'val') == 'abd' * 100


@pytest.mark.parametrize('name', ['text', 'stdlib', 'shakespeare_char', 'fineweb'])
def test_out_must_be_a_folder(tmp_path, run_script, local_parquet, name, monkeypatch):
    local_parquet([['a document'] * 9])
    (tmp_path / 'file').write_text('keep me')
    monkeypatch.setattr(writer, 'SHAKESPEARE_SHA256', hashlib.sha256(b'keep me').hexdigest())
    arguments = {'text': [tmp_path / 'file'], 'shakespeare_char': ['--input', tmp_path / 'file'],
                 'fineweb': ['--input', tmp_path / '*.parquet', '--tokenizer=byte']}.get(name, [])
    for out, words in {'file': "file' is a file): name a folder", 'file/below': "file' is a file): name a folder",
                       'x' * 300: 'too long'}.items():
        code, _, err = run_script(name, *arguments, '--out', tmp_path / out)
        assert code == 2 and err.count('\n') == 1 and 'cannot be written' in err and words in err, err
    assert (tmp_path / 'file').read_text() == 'keep me'


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
sys.path.insert(0, {root!r})
from nanop.errors import exit_on_user_error
from nanop.tokenizer import get_tokenizer
from nanop.write_dataset import write_dataset
def documents():
    for i in range(1000):
        yield 'train', 'word ' * 300_000, True
        if i == 6:
            print('ready', flush=True)
        time.sleep(0.01 if i < 6 else 0.2)
exit_on_user_error(lambda: write_dataset({out!r}, documents(), get_tokenizer({name!r}), 'test', workers=2))
"""


@pytest.mark.parametrize('number, code, tokenizer', [
    (signal.SIGTERM, 143, 'byte'), (signal.SIGINT, 130, 'byte'), (signal.SIGHUP, 129, 'byte'),
    (signal.SIGTERM, 143, 'gpt2')])  # which tokenizes in other processes
def test_signals_leave_the_old_dataset(tmp_path, request, number, code, tokenizer):
    if tokenizer == 'gpt2':
        request.getfixturevalue('gpt2_tokenizer')
    out = small(tmp_path / 'out')
    process = subprocess.Popen([sys.executable, '-c', SLOW.format(root=str(ROOT), out=str(out), name=tokenizer)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n' and list(out.glob('*.tmp.*'))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and err.strip() == 'stopped', err
    assert {path.name for path in out.iterdir()} == {'train.bin', 'val.bin', 'meta.json'}
    assert text_of(out, 'val') == 'abd' * 100


def test_signals_are_given_back(tmp_path):
    """Whoever calls the preparation keeps a handler of his own."""
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        small(tmp_path)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        small(tmp_path)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, mine)


# -----------------------------------------------------------------------------
# Parquet scripts


@pytest.mark.parametrize('arguments, message', [
    (['--tokenizer=char'], "tokenizer='char' needs the characters of the text"), (['--shards=0'], '--shards=0 is not'),
    (['--shards=-1'], '--shards=-1 is not'), (['--workers=0'], '--workers=0 is not'),
    (['--input=nothing*.parquet'], 'matches no file')])
def test_bad_options_of_the_parquet_scripts(tmp_path, run_script, local_parquet, arguments, message):
    local_parquet([['a document']])
    code, _, err = run_script('openwebtext', '--input', tmp_path / '*.parquet', '--out', tmp_path / 'out',
                              '--tokenizer=byte', *arguments)
    assert code == 2 and err.count('\n') == 1 and message in err
    assert not (tmp_path / 'out').exists()


def test_parquet_scripts_skip_null_and_count_files_once(tmp_path, capsys, pyarrow, local_parquet):
    """Also if the run was stopped between the shards."""
    local_parquet([['a', None, 'b', None], [None, 'c', 'd']])
    (tmp_path / 'again.parquet').symlink_to('0.parquet')
    arguments = ['--input', str(tmp_path / '*.parquet'), '--tokenizer=byte', '--workers=1']
    for stop in (True, False):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            if stop:
                patch.setattr(writer, 'write_shard', failing_after(1, writer.write_shard, KeyboardInterrupt))
            writer.write_parquet(tmp_path / 'out', 'repo', 'revision', '*.parquet', arguments, val_every=2)
    err = capsys.readouterr().err
    assert 'note: null values skipped: 3 (such as ' in err and 'count once: 1 (such as ' in err
    assert (text_of(tmp_path / 'out', 'train'), text_of(tmp_path / 'out', 'val')) == ('c', 'abd')


def test_a_shard_is_on_disk_before_its_mark(tmp_path, monkeypatch, local_parquet):
    local_parquet([['a', 'b', 'c']])
    done, fsync, mark = [], os.fsync, writer.write_atomically
    monkeypatch.setattr(os, 'fsync', lambda file: (done.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(writer, 'write_atomically', lambda *args: (done.append('mark'), mark(*args)))
    writer.write_shard(tmp_path / 'shard', str(tmp_path / '0.parquet'), ByteTokenizer(), 1, 2)
    assert done[:3] == [2, 4, 'mark']  # bytes of the token files


def test_a_shard_that_fails_leaves_nothing(tmp_path, monkeypatch, local_parquet):
    local_parquet([['a', 'b', 'c']])
    monkeypatch.setattr(writer, 'write_atomically', failing_after(0, None, OSError('full')))
    with pytest.raises(UserError, match='cannot be written'):
        writer.write_parquet(tmp_path / 'out', 'repo', 'revision', '*',
                             ['--input', str(tmp_path / '0.parquet'), '--tokenizer=byte'], val_every=2)
    assert not list((tmp_path / 'out').iterdir())


# -----------------------------------------------------------------------------
# What meta.json says of the content


def test_meta_names_the_content(tmp_path, local_parquet):
    """By the sha256 of the token ids, train.bin then val.bin, whichever function wrote them."""
    local_parquet([['one', 'two', 'three']])
    arguments = ['--input', str(tmp_path / '*.parquet'), '--tokenizer=byte', '--workers=1']
    metas = [writer.write_parquet(tmp_path / 'parquet', 'repo', 'revision', '*', arguments, val_every=2)]
    for name, train in (('same', 'two'), ('other', 'owt')):
        documents = [('train', train, True), ('val', 'onethree', True)]
        metas.append(writer.write_dataset(tmp_path / name, documents, ByteTokenizer(), 'test', workers=1))
    for name, meta in zip(('parquet', 'same', 'other'), metas):
        both = b''.join((tmp_path / name / f'{split}.bin').read_bytes() for split in ('train', 'val'))
        assert meta['data_sha256'] == hashlib.sha256(both).hexdigest()
        assert meta == Dataset(tmp_path / name).meta
    parquet, same, other = metas
    assert parquet['data_sha256'] == same['data_sha256'] != other['data_sha256']
    assert content_differs(same, same) == []
    assert content_differs(same, other) == [f'{key} is {same[key][:12]}.., not {other[key][:12]}..'
                                            for key in ('data_sha256', 'source_sha256')]
    old = {key: value for key, value in same.items() if key != 'data_sha256'}  # written before the key was there
    assert content_differs(old, same) == content_differs(same, old) == content_differs({}, same) == []
    assert content_differs(old, {**other, 'train_tokens': 4, 'val_tokens': 9}) == [
        f"source_sha256 is {same['source_sha256'][:12]}.., not {other['source_sha256'][:12]}..",
        'train_tokens is 3, not 4', 'val_tokens is 8, not 9']


@pytest.mark.parametrize('value', [0, float('nan'), float('inf'), -1])
def test_bytes_per_token_must_be_usable(tmp_path, value):
    path = small(tmp_path) / 'meta.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'bytes_per_token': value}))
    with pytest.raises(UserError, match='bytes_per_token.*see data/text/prepare.py'):
        Dataset(tmp_path)


def test_char_without_characters_is_refused(tmp_path):
    path = small(tmp_path, CharTokenizer('abcd')) / 'meta.json'
    meta = json.loads(path.read_text())
    for chars in (None, '', 5, ['a']):
        path.write_text(json.dumps({**meta, 'chars': chars}))
        with pytest.raises(UserError, match="tokenizer='char' needs the characters"):
            Dataset(tmp_path).tokenizer()


# -----------------------------------------------------------------------------
# Reading


def damage(folder, how):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    {'no meta': path.unlink,
     'half a meta': lambda: os.truncate(path, 40),
     'no dtype': lambda: path.write_text(json.dumps({key: meta[key] for key in meta if key != 'dtype'})),
     'other dtype': lambda: path.write_text(json.dumps({**meta, 'dtype': 'int8'})),
     'infinite': lambda: path.write_text(json.dumps({**meta, 'vocab_size': float('inf')})),
     'a list': lambda: path.write_text('[]'),
     'no val': (folder / 'val.bin').unlink,
     'truncated': lambda: os.truncate(folder / 'train.bin', 101),
     'empty': lambda: os.truncate(folder / 'val.bin', 0)}[how]()


@pytest.mark.parametrize('how, message', [
    ('no meta', 'no dataset in'), ('half a meta', 'cannot be read'), ('no dtype', "has no usable 'dtype'"),
    ('other dtype', "has no usable 'int8'"), ('a list', 'has no usable'), ('no val', "val.bin' is missing"),
    ('truncated', "train.bin' has 101 bytes, meta.json says 3,000"), ('empty', "val.bin' has 0 bytes"),
    ('infinite', 'cannot be read'),
])
def test_damaged_folders(tmp_path, how, message):
    damage(small(tmp_path), how)
    with pytest.raises(UserError) as error:
        Dataset(tmp_path)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_too_short_and_out_of_range(tmp_path):
    data = Dataset(small(tmp_path))
    with pytest.raises(UserError, match='val.bin.* has 300 tokens, too few for block_size=300'):
        data.val_starts(1000, 300)
    assert data.val_starts(1000, 299).tolist() == [0]
    np.full(1500, 999, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    with pytest.raises(UserError, match='holds id 999, outside its vocabulary of 256'):
        Dataset(tmp_path).batch('train', [0], 8, torch.device('cpu'))


def test_unknown_dataset_says_what_to_run():
    with pytest.raises(UserError, match='run python data/openwebtext/prepare.py|see data/text'):
        Dataset('openwebtext')
    for name in ('nonesuch', 'none\nsuch', 'none\0such'):
        with pytest.raises(UserError, match='see data/text/prepare.py') as error:
            Dataset(name)
        assert '\n' not in str(error.value)


def test_batches(tmp_path):
    data = Dataset(small(tmp_path, train=bytes(range(128)) * 8))
    starts = data.train_starts(seed=1, step=2, num_sequences=64, block_size=16)
    assert np.array_equal(starts, data.train_starts(1, 2, 64, 16))
    assert not np.array_equal(starts, data.train_starts(1, 3, 64, 16))
    assert not np.array_equal(starts, data.train_starts(2, 2, 64, 16))
    assert 0 <= starts.min() and starts.max() <= 1024 - 17
    reached = {start for step in range(300) for start in data.train_starts(0, step, 64, 1000).tolist()}
    assert reached == set(range(1024 - 1000))  # including the first and the last position
    inputs, targets = data.batch('train', starts, 16, torch.device('cpu'))
    assert inputs.shape == targets.shape == (64, 16) and inputs.dtype == torch.int64
    assert torch.equal(targets, (inputs + 1) % 128)
    assert inputs[:, 0].tolist() == (starts % 128).tolist()


def test_validation_starts_are_fixed_and_do_not_overlap(tmp_path):
    data = Dataset(small(tmp_path))
    starts = data.val_starts(num_tokens=160, block_size=16)
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] == 300 - 17
    assert (np.diff(starts) >= 16).all()
    every = data.val_starts(10**9, 16)
    assert (np.diff(every) >= 16).all() and len(every) == 18


def test_source_hash_is_of_the_text(tmp_path):
    meta = json.loads((small(tmp_path, train=b'one', val=b'two') / 'meta.json').read_text())
    assert meta['source_sha256'] == hashlib.sha256(b'onetwo').hexdigest()
