"""
For any command line, config, data and checkpoint, a run works or ends with an error of one line.

FUZZ_EXAMPLES=500 python -m pytest -q tests/test_fuzz.py tries 500 cases in each test instead of a few dozen.
"""
import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sample
from nanop import checkpoint
from nanop.dataset import Dataset, content_differs
from nanop.errors import UserError
from nanop.text_files import ENCODINGS as MARKS
from nanop.text_files import Notes, documents
from nanop.tokenizer import ByteTokenizer
from nanop.write_dataset import write_dataset
from train import TrainConfig, read_config, train

MANY = settings(max_examples=int(os.environ.get('FUZZ_EXAMPLES', 30)), deadline=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# values that keep every case fast; they come last on the command line, so they override what is tried
SMALL = dict(max_iters=2, eval_tokens=64, compile=False, device='cpu', wandb_log=False, tokens_per_param=0.0,
             sample_tokens=0, vocab_size=0, timeout_s=60)


@pytest.fixture(scope='module')
def good_run(tmp_path_factory):
    """(folder of a dataset, folder of a run with two checkpoints); no case may change them."""
    folder = tmp_path_factory.mktemp('fuzz')
    text = 'the quick brown fox jumps over the lazy dog. ' * 40
    write_dataset(folder / 'data', [(split, text, True) for split in ('train', 'val')], ByteTokenizer(), 'fuzz',
                  workers=1)
    train(TrainConfig(out_dir=str(folder / 'run'), dataset=str(folder / 'data'), **SHAPE, **{**SMALL, 'max_iters': 4}))
    assert len(checkpoint.find(folder / 'run')) == 2
    return folder / 'data', folder / 'run'


SHAPE = dict(block_size=8, batch_tokens=32, batch_size=2, n_layer=1, n_embd=16, head_dim=8, base_n_layer=1,
             base_n_embd=8, base_head_dim=8, eval_interval=2, dtype='float32')


def contents(*folders):
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob('*') if path.is_file()}


@contextlib.contextmanager
def at_most_a_user_error():
    """Accept a UserError of one line and hide the output. Any other exception fails the test."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except UserError as error:
            assert '\n' not in str(error), 'an error is one line'


# -----------------------------------------------------------------------------
# Command lines and configs

SIZES = st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 16, 24, 64])
NUMBERS = st.sampled_from([-1.0, -0.0, 0.0, 1e-45, 1e-9, 0.3, 0.5, 1.0, 1.5, 1e9, 1e30, 1e308, float('inf'),
                           float('-inf'), float('nan')])
WORDS = st.sampled_from(['', 'auto', 'scratch', 'resume', 'gpt3', 'completep', 'supar', 'sp', 'depth_mup', 'linear',
                         'cosine', 'ddp', 'fsdp', 'float16', 'bfloat16', 'stdlib/../x', '\x00', 'ü', ' ', 'no such'])


def values_of(field):
    """Right and wrong values for a key, as text."""
    right = {bool: st.booleans(), int: SIZES, float: NUMBERS, str: WORDS, dict: NUMBERS}[field.type]
    return st.one_of(right, right, right, NUMBERS, st.text(max_size=5)).map(str)


FIELDS = [field for field in fields(TrainConfig) if field.name not in ('out_dir', 'dataset', *SMALL)]
NAMES = st.sampled_from(['.embedding', '.block_norm', '.hidden_weight+residual_proj', '.kv_weight', '.', '.x', ''])
CHANGES = st.lists(st.sampled_from(FIELDS).flatmap(lambda field: st.tuples(
    NAMES if field.type is dict else st.just(''), values_of(field)).map(
        lambda of: f'--{field.name}{of[0]}={of[1]}')), min_size=1, max_size=4)


@MANY
@given(CHANGES)
def test_any_command_line_runs_or_says_why_not(good_run, changes):
    data, run = good_run
    before = contents(data, run)
    fixed = [f'--{key}={value}' for key, value in SMALL.items()]
    with at_most_a_user_error():
        train(read_config([f'--{key}={value}' for key, value in SHAPE.items()] +
                          [f'--dataset={data}', f'--out_dir={run.parent / "other"}', '--overwrite=True', *changes,
                           *fixed]))
    with at_most_a_user_error():  # in a folder that holds a run, without permission to overwrite it
        train(read_config([f'--dataset={data}', f'--out_dir={run}', *[change for change in changes if not any(
            word in change for word in ('overwrite', 'resume', 'auto'))], *fixed]))
    assert contents(data, run) == before


@MANY
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from([f'--{field.name}' for field in fields(TrainConfig)]),
                          st.text(max_size=12).map('--'.__add__)), max_size=4))
def test_any_words_on_the_command_line(words):
    with at_most_a_user_error():
        with contextlib.suppress(SystemExit):  # --help
            read_config(words)


@MANY
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from(
    ['n_layer = 3', 'n_layer = "3"', 'n_layer = [1, 2]', 'import os', 'x', 'learning_rate = 1/0', 'n_layers = 2', '(',
     'max_iters = None', 'def f(): pass', 'seed = True', 'n_layer: 3', '\tseed = 1']), max_size=4).map('\n'.join)))
def test_any_config_file(tmp_path, text):
    path = tmp_path / 'any.py'
    path.write_text(text, encoding='utf-8', errors='replace')
    with at_most_a_user_error():
        read_config([str(path)])


# -----------------------------------------------------------------------------
# Texts to prepare

NAMES = st.sampled_from(['a.txt', 'a.TXT.gz', 'a.bz2', 'a.weird', 'a.jsonl', 'a.json', 'a.ndjson.xz', 'a.parquet'])
ENCODINGS = st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be', 'utf-32', 'latin1', 'cp1252', 'shift_jis'])
PACK = st.sampled_from([bytes, bytes, bytes, gzip.compress, bz2.compress, lzma.compress])
VALUES = st.recursive(st.none() | st.floats() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=2),
                      max_leaves=4)
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict(text=VALUES, other=VALUES)), max_size=3)
TEXTS = st.text(max_size=80) | ROWS.map(lambda rows: '\r\n'.join(map(json.dumps, rows)))


@MANY
@given(name=NAMES, encoding=ENCODINGS, pack=PACK, text=TEXTS, raw=st.none() | st.binary(max_size=80))
def test_any_file_is_read_as_it_is_or_refused(tmp_path, name, encoding, pack, text, raw):
    """Whatever is prepared without a note is, byte for byte, a text that the file can stand for."""
    content = text.encode(encoding, 'ignore') if raw is None else raw
    (tmp_path / name).write_bytes(pack(content))
    notes = Notes()
    with at_most_a_user_error():
        found = ''.join(text for _, text, _ in documents({str(tmp_path / name): 'train'}, 'text', '', notes))
        if notes:
            return
        if 'json' in name:
            decoded = content.decode('utf-8-sig' if raw is not None or encoding.startswith('utf-8') else encoding)
            rows = [json.loads(line)['text'] for line in decoded.split('\n') if line.strip()]
            assert found == ''.join(rows)
        else:
            marked = next((codec for mark, codec in MARKS.items() if content.startswith(mark)), 'utf-8')
            assert found == content.decode(marked)


# -----------------------------------------------------------------------------
# Damaged files


@st.composite
def damage(draw):
    """A function that takes the bytes of a file and returns damaged ones, or None to remove the file."""
    how = draw(st.sampled_from(['flip', 'cut', 'grow', 'swap', 'zeros', 'gone']))
    where, what = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))

    def apply(content):
        i = int(where * len(content))
        head, tail = content[:i], content[i:]
        return dict(flip=head + bytes([tail[0] ^ what]) + tail[1:], cut=head, grow=head + bytes([what]) + tail,
                    swap=tail + head, zeros=head + bytes(min(what, len(tail))) + tail[what:], gone=None)[how]
    return apply


def fresh_copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def apply_to(path, change):
    """Damage a file. Returns whether its content changed."""
    before = path.read_bytes()
    after = change(before)
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)
    return before != after


@MANY
@given(name=st.sampled_from(['meta.json', 'train.bin', 'val.bin']), change=damage())
def test_any_damage_to_a_dataset(good_run, tmp_path, name, change):
    folder = fresh_copy(good_run[0], tmp_path / 'data')
    apply_to(folder / name, change)
    with at_most_a_user_error():
        data = Dataset(folder)
        for split, starts in (('train', data.train_starts(1, 0, 4, 8)), ('val', data.val_starts(64, 8))):
            inputs, _ = data.batch(split, starts, 8, torch.device('cpu'))
            assert 0 <= inputs.min() and inputs.max() < data.vocab_size
        data.tokenizer()


KEYS = ['dtype', 'vocab_size', 'real_vocab_size', 'bytes_per_token', 'tokenizer', 'train_tokens', 'val_tokens',
        'data_sha256', 'source_sha256', 'chars']
JSON = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5),
                 st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2))


@MANY
@given(change=st.one_of(JSON, st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3)))
def test_any_value_in_meta_json(good_run, tmp_path, change):
    folder = fresh_copy(good_run[0], tmp_path / 'data')
    meta = json.loads((folder / 'meta.json').read_text())
    changed = {**meta, **change} if isinstance(change, dict) else change
    (folder / 'meta.json').write_text(json.dumps(changed))
    with at_most_a_user_error():
        data = Dataset(folder)
        assert all(text.split()[0] in change for text in content_differs(data.meta, meta))
        data.batch('train', data.train_starts(1, 0, 4, 8), 8, torch.device('cpu'))
        data.tokenizer()


@MANY
@given(which=st.integers(0, 2), change=damage())
def test_any_damage_to_a_checkpoint_is_seen(good_run, tmp_path, which, change):
    """Training and sampling then use the checkpoint before it and do not change it."""
    out_dir = fresh_copy(good_run[1], tmp_path / 'run')
    newest, before = checkpoint.find(out_dir)
    good = contents(before)
    changed = apply_to(sorted(newest.iterdir())[which], change)
    with at_most_a_user_error():
        path, state = checkpoint.newest(out_dir)
        assert path == (before if changed else newest) and checkpoint.read_state(out_dir)['step'] in (state['step'], 4)
        sample.load(sample.SampleConfig(out_dir=str(out_dir)))
        assert contents(before) == good
        train(read_config([f'--out_dir={out_dir}', '--init_from=resume']))
        assert checkpoint.newest(out_dir)[1]['step'] == 4
        return
    pytest.fail('refused, although one checkpoint is undamaged')
