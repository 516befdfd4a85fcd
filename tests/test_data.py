"""Tests of datasets: tokenizers, preparation against known counts, atomic writes, damaged folders."""
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from nanop import write_dataset as writer
from nanop.dataset import Dataset
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
    return b''.join(tokenizer.token_bytes(token) for token in ids(folder, split).tolist()).decode()


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


def test_pieces_are_cut_where_tokens_end(gpt2_tokenizer, tmp_path):
    text = ''.join(f'  indented {i}\n\n\nword,{i}.\n\tend \n \nx{i}\ny   \n' for i in range(200))
    (tmp_path / 'a.txt').write_text(text)
    pieces = script('text')['pieces']
    whole = gpt2_tokenizer.encode(text).tolist()
    for size in (50, 64, 100, 333):
        pieces.__globals__['PIECE_CHARS'] = size
        with open(tmp_path / 'a.txt') as file:
            parts = list(pieces(file))
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

    def wrapped(*args):
        if next(left, None) is None:
            raise error
        return function(*args)
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


# -----------------------------------------------------------------------------
# Reading


def damage(folder, how):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text())
    {'no meta': path.unlink,
     'half a meta': lambda: os.truncate(path, 40),
     'no dtype': lambda: path.write_text(json.dumps({key: meta[key] for key in meta if key != 'dtype'})),
     'other dtype': lambda: path.write_text(json.dumps({**meta, 'dtype': 'int8'})),
     'a list': lambda: path.write_text('[]'),
     'no val': (folder / 'val.bin').unlink,
     'truncated': lambda: os.truncate(folder / 'train.bin', 101),
     'empty': lambda: os.truncate(folder / 'val.bin', 0)}[how]()


@pytest.mark.parametrize('how, message', [
    ('no meta', 'no dataset in'), ('half a meta', 'cannot be read'), ('no dtype', "has no usable 'dtype'"),
    ('other dtype', "has no usable 'int8'"), ('a list', 'has no usable'), ('no val', "val.bin' is missing"),
    ('truncated', "train.bin' has 101 bytes, meta.json says 3,000"), ('empty', "val.bin' has 0 bytes"),
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
    with pytest.raises(UserError, match='see data/text/prepare.py'):
        Dataset('nonesuch')


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
