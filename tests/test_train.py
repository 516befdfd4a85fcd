"""Tests of train.py, sample.py and the command line: training, exact resume, faults, devices, messages."""
import csv
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train as train_module
from configurator import configure, flags_of
from model import GPT, GPTConfig
from nanop import checkpoint, dataset, machine, parallel
from nanop.dataset import Dataset
from nanop.errors import UserError, exit_on_user_error
from nanop.tokenizer import ByteTokenizer, CharTokenizer, get_tokenizer
from nanop.write_dataset import parquet_documents, write_dataset
from test_model import skip_without_its_package
from train import TrainConfig, lr_fraction, split_batch, train

ROOT = Path(__file__).resolve().parents[1]


def state_of(out_dir):
    """The content of the newest checkpoint; `model` and `optimizer` are {name: tensor}."""
    path, state = checkpoint.newest(out_dir)
    held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in held.items()}
    checkpoint.load_tensors(path, tensors)
    return {**state, **{key: {name.removeprefix(f'{key}.'): value for name, value in tensors.items()
                              if name.startswith(f'{key}.')} for key in ('model', 'optimizer')}}


@pytest.fixture
def optimizers(monkeypatch):
    """A list that collects every optimizer that is made, in order."""
    made, configure_optimizers = [], GPT.configure_optimizers

    def remember(*args):
        made.append(configure_optimizers(*args))
        return made[-1]
    monkeypatch.setattr(GPT, 'configure_optimizers', remember)
    return made


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def names(paths):
    return [path.name for path in paths]


def rows_of(out_dir):
    with open(Path(out_dir) / 'metrics.csv', newline='') as file:
        return list(csv.DictReader(file))


def losses_of(out_dir):
    return [(row['step'], row['loss'], row['val_loss'], row['grad_norm']) for row in rows_of(out_dir)]


def run(script, *args, **env):
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, **env})


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function like run() that runs the script in this process, without another start of Python."""
    def as_main(script, *args):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        capsys.readouterr()  # drop earlier output
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name='__main__')
        return subprocess.CompletedProcess(sys.argv, end.value.code, *capsys.readouterr())
    return as_main


def equal(a, b):
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# -----------------------------------------------------------------------------
# Training


def test_a_run_learns_and_writes_what_it_says(tiny, capsys):
    summary = train(replace(tiny, max_iters=60, eval_interval=30, sample_tokens=20))
    out = capsys.readouterr().out
    assert summary['val_loss'] < 1.5 < 5 < float(rows_of(tiny.out_dir)[0]['loss'])
    assert summary['bits_per_byte'] == pytest.approx(summary['val_loss'] / math.log(2))
    assert summary['diverged_at'] is None and summary['steps'] == 60 and summary['tokens'] == 60 * 128
    assert sorted(names(Path(tiny.out_dir).iterdir())) == [
        '.lock', 'ckpt_000000030', 'ckpt_000000060', 'config.json', 'loss.png', 'metrics.csv', 'model.safetensors',
        'summary.json']
    assert json.loads(Path(tiny.out_dir, 'summary.json').read_text()) == summary
    assert [row['step'] for row in rows_of(tiny.out_dir)] == [str(step) for step in range(61)]
    assert [row['step'] for row in rows_of(tiny.out_dir) if row['val_loss']] == ['0', '30', '60']
    for text in ('hidden_weight', 'lr x wd', '8 sequences of 16 = 1 process(es) x 2 micro-batch(es) x 4', 'loss.png',
                 'a sample of 20 tokens', 'step     60/60 | val loss'):
        assert text in out
    assert Path(tiny.out_dir, 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_eval_interval_0_validates_at_the_end_only(tiny):
    train(replace(tiny, eval_interval=0))
    assert [row['step'] for row in rows_of(tiny.out_dir) if row['val_loss']] == ['8']
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000008']


def test_without_an_out_dir_nothing_is_written(tiny, tmp_path, monkeypatch):
    written = train(tiny)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.out_dir, tmp_path / 'here')
    monkeypatch.chdir(tmp_path / 'here')  # the checkpoints of another run are ignored
    before = sorted(path.name for path in Path('.').iterdir())
    summary = train(replace(tiny, out_dir=''))
    assert sorted(path.name for path in Path('.').iterdir()) == before
    assert summary['val_loss'] == written['val_loss']


@pytest.mark.parametrize('changes', [
    dict(),
    dict(dropout=0.3, parameterization='completep_supar', density=0.5, tie_weights=True, weight_decay=0.1),
    dict(schedule='cosine', batch_size=8, grad_clip=0.0),
    dict(optimizer='muon', weight_decay=0.1, weight_decay_mode='independent', pos='rope', n_kv_head=1),
    dict(optimizer='sgd', learning_rate=0.1, beta1=0.0),
    dict(base_batch_tokens=256, base_train_tokens=4096, beta1=0.8),
    dict(optimizer='lion', norm='rmsnorm', qk_norm=True, activation='swiglu', unembed_form='weights'),
])
def test_resume_is_bitwise(tiny, tmp_path, changes):
    """An uninterrupted run of N steps equals a run that is stopped and resumed from its checkpoint at N/2."""
    skip_without_its_package(changes.get('optimizer'))
    config = replace(tiny, **changes)
    straight = train(config)
    halves = replace(config, out_dir=str(tmp_path / 'halves'))

    class Stopped(Exception):
        pass

    def stop_at_six(config, step, steps):
        if step == 6:
            raise Stopped
        return lr_fraction(config, step, steps)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train_module, 'lr_fraction', stop_at_six)
        train(halves)
    assert len(rows_of(halves.out_dir)) == 6  # two rows are past the checkpoint: the resumed run writes them again
    assert state_of(halves.out_dir)['step'] == 4
    torch.manual_seed(99)  # the global generator must not matter
    resumed = train(replace(halves, init_from='resume'))
    assert resumed['val_loss'] == straight['val_loss']
    a, b = state_of(config.out_dir), state_of(halves.out_dir)
    assert a['step'] == b['step'] == 8 and a['tokens'] == 8 * 128
    for key in ('model', 'optimizer', 'best_val_loss', 'model_config', 'meta'):
        assert equal(a[key], b[key]), key
    assert losses_of(config.out_dir) == losses_of(halves.out_dir)


def test_evaluating_more_often_changes_nothing(tiny, tmp_path):
    train(replace(tiny, dropout=0.2, eval_interval=0))  # validates only at the end
    often = replace(tiny, dropout=0.2, eval_interval=1, eval_tokens=64, out_dir=str(tmp_path / 'often'))
    train(often)
    seldom, often = rows_of(tiny.out_dir), rows_of(often.out_dir)
    assert [(row['loss'], row['grad_norm']) for row in seldom] == [(row['loss'], row['grad_norm']) for row in often]
    assert sum(bool(row['val_loss']) for row in often) == 9


def test_same_seed_same_run_and_other_seed_another(tiny, tmp_path):
    def losses(name, **changes):
        config = replace(tiny, out_dir=str(tmp_path / name), max_iters=3, **changes)
        train(config)
        return losses_of(config.out_dir)
    first = losses('a')
    assert first == losses('b') != losses('c', seed=7)


def test_micro_batches_make_the_same_step(tiny, tmp_path):
    """The logged loss is the mean over all micro-batches, and so is the gradient."""
    train(replace(tiny, batch_size=8))
    train(replace(tiny, batch_size=1, out_dir=str(tmp_path / 'ones')))
    for one, eight in zip(rows_of(tmp_path / 'ones'), rows_of(tiny.out_dir), strict=True):
        for key in ('loss', 'grad_norm', 'val_loss'):
            if eight[key]:
                assert float(one[key]) == pytest.approx(float(eight[key]), rel=1e-4), (eight['step'], key)


def test_validation_loss_is_the_mean_over_the_fixed_tokens(tiny):
    summary = train(tiny)
    state, data = state_of(tiny.out_dir), Dataset(tiny.dataset)
    model = GPT(GPTConfig(**state['model_config'])).eval()
    model.load_state_dict(state['model'])
    starts = data.val_starts(512, 16)
    with torch.no_grad():
        expected = model(*data.batch('val', starts, 16, torch.device('cpu')))[1].item()
    assert len(starts) == 32 and summary['val_loss'] == pytest.approx(expected, rel=1e-5)


def test_first_step_is_the_reference_step(tiny, tmp_path):
    """One step by hand: PyTorch's AdamW in closed form, on the same batch."""
    config = replace(tiny, max_iters=1, warmup_frac=0.0, grad_clip=0.0, weight_decay=0.1, batch_size=8, eps=1e-6)
    train(config)
    data = Dataset(config.dataset)
    model = GPT(GPTConfig.of(config, vocab_size=256),
                torch.Generator().manual_seed(config.seed))
    model(*data.batch('train', data.train_starts(config.seed, 0, 8, 16), 16, torch.device('cpu')))[1].backward()
    after = state_of(config.out_dir)['model']
    for name, lr, decay, eps in (('transformer.wte.weight', 1e-2, 0.1, 5e-7), ('lm_head.weight', 1e-2, 0.1, 5e-7),
                                 ('transformer.h.1.mlp.c_fc.weight', 5e-3, 0.2, 2.5e-7),
                                 ('transformer.h.0.ln_1.weight', 1e-2, 0.0, 2.5e-7)):
        p = model.get_parameter(name)
        expected = p * (1 - lr * decay) - lr * p.grad / (p.grad.abs() + eps)
        torch.testing.assert_close(after[name], expected.detach(), rtol=1e-5, atol=1e-7)


def test_duration_and_decay_are_derived(tiny, optimizers):
    config = replace(tiny, max_iters=TrainConfig.max_iters, tokens_per_param=0.05, tau_ema=0.5, eval_interval=100)
    summary = train(config)
    params = 2 * 256 * 32 + 16 * 32 + 2 * (12 * 32 ** 2 + 13 * 32) + 2 * 32
    assert summary['params'] == params and summary['steps'] == round(0.05 * params / 128)
    assert summary['weight_decay'] == pytest.approx(1 / (0.5 * 1e-2 * summary['steps']))
    groups = {group['role']: group for group in optimizers[0].param_groups}
    assert groups['embedding']['weight_decay'] == pytest.approx(summary['weight_decay'])
    assert groups['hidden_weight']['weight_decay'] == pytest.approx(2 * summary['weight_decay'])  # m_N = 2
    # the paper's anchor: tau .1407, lr 2^-8, 1144 steps
    assert 1 / (0.1407 * 2 ** -8 * 1144) == pytest.approx(1.59045, rel=1e-4)


def test_schedules():
    def curve(**changes):
        config = replace(TrainConfig(), **changes)
        return [lr_fraction(config, step, 10) for step in range(10)]
    assert curve(warmup_frac=0.2) == pytest.approx([0.5, 1, 1, .875, .75, .625, .5, .375, .25, .125])
    assert curve(warmup_frac=0.0, schedule='constant') == [1.0] * 10
    assert curve(warmup_frac=0.5, schedule='constant') == pytest.approx([.2, .4, .6, .8] + [1] * 6)
    cosine = curve(warmup_frac=0.0, schedule='cosine', final_lr_frac=0.1)
    assert cosine[0] == 1 and cosine[5] == pytest.approx(0.55) and cosine[9] == pytest.approx(0.122, abs=1e-3)
    assert curve(warmup_frac=1.0)[-1] == 1 and min(curve(warmup_frac=1.0)) > 0


def test_schedule_multiplies_each_groups_own_lr(tiny, optimizers):
    train(replace(tiny, max_iters=5, eval_interval=100))
    groups = optimizers[0].param_groups
    last = lr_fraction(tiny, 4, 5)
    for group in groups:
        assert group['lr'] == pytest.approx(1e-2 * group['lr_scale'] * last)
    assert {group['role']: group['lr_scale'] for group in groups}['hidden_weight'] == 0.5


@pytest.mark.parametrize('changes, world_size, expected', [
    (dict(batch_tokens=128, block_size=16, batch_size=4), 1, (8, 8, 2)),
    (dict(batch_tokens=128, block_size=16, batch_size=4), 2, (8, 4, 1)),
    (dict(batch_tokens=128, block_size=16, batch_size=100), 1, (8, 8, 1)),
    (dict(batch_tokens=100, block_size=16), 1, 'not a multiple of block_size=16: use 96 or 112'),
    (dict(batch_tokens=8, block_size=16), 1, 'not a multiple of block_size=16: use 16 or 16'),
    (dict(batch_tokens=128, block_size=16), 3, 'which 3 processes cannot share: use a multiple of 48'),
    (dict(batch_tokens=128, block_size=16, batch_size=3), 1, 'not a multiple of batch_size=3: use one of [1, 2, 4, 8]'),
])
def test_batches_are_derived_or_the_numbers_are_shown(changes, world_size, expected):
    config = replace(TrainConfig(), **changes)
    if isinstance(expected, tuple):
        assert split_batch(config, world_size) == expected
    else:
        with pytest.raises(UserError) as error:
            split_batch(config, world_size)
        assert expected in str(error.value)


# -----------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_divergence_stops_before_the_step(tiny, monkeypatch, where):
    forward, calls = GPT.forward, []

    def bad_at_step_six(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(self.training)
        if sum(calls) > 12:  # two micro-batches a step
            loss = loss * math.inf if where == 'loss' else loss + (loss * 0).sqrt()  # the slope of sqrt at 0 is inf
        return logits, loss
    monkeypatch.setattr(GPT, 'forward', bad_at_step_six)
    summary = train(tiny)
    assert summary['diverged_at'] == 6 and summary['val_loss'] == math.inf
    state = state_of(tiny.out_dir)
    assert state['step'] == 4 and all(value.isfinite().all() for value in state['model'].values())
    assert rows_of(tiny.out_dir)[-1]['step'] == '5'
    assert json.loads(Path(tiny.out_dir, 'summary.json').read_text())['val_loss'] is None


def test_weights_that_broke_are_never_saved(tiny, monkeypatch):
    forward, calls = GPT.forward, []

    def nan_when_validating(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(self.training)
        late = sum(calls) == 16  # two micro-batches a step
        return logits, loss * math.nan if late and not self.training else loss
    monkeypatch.setattr(GPT, 'forward', nan_when_validating)
    summary = train(tiny)
    assert summary['diverged_at'] == 8 and summary['best_val_loss'] < 6
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000004']


def test_divergence_exits_with_3_and_says_what_to_try(tiny):
    result = run('train.py', *flags_of(replace(tiny, learning_rate=1e30, grad_clip=0.0)))
    assert result.returncode == 3 and 'Traceback' not in result.stderr
    assert 'was not taken: loss' in result.stdout and 'Try a lower learning_rate' in result.stdout


def damaged(path, how):
    """Damage one file of a checkpoint. Returns its name."""
    shard = next(path.glob('*.safetensors'))
    if how == 'truncated':
        os.truncate(shard, shard.stat().st_size // 2)
    elif how == 'a bit of a weight':
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif how == 'a digit of the state':
        shard = path / 'state.json'
        shard.write_text(shard.read_text().replace('0.01', '0.11', 1))
    elif how == 'no checksums':
        (path / 'checksums.json').unlink()
    elif how == 'a file too many':
        shutil.copy(shard, path / 'shard-00002-model-00001-of-00001.safetensors')
    return shard.name


@pytest.mark.parametrize('how', ['truncated', 'a bit of a weight', 'a digit of the state', 'no checksums',
                                 'a file too many'])
def test_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tiny, capsys, how):
    train(replace(tiny, max_iters=8, eval_interval=2))
    newest, before = checkpoint.find(tiny.out_dir)
    assert (newest.name, before.name) == ('ckpt_000000008', 'ckpt_000000006')
    name = damaged(newest, how)
    train(replace(tiny, eval_interval=2, init_from='resume'))
    captured = capsys.readouterr()
    assert 'ckpt_000000008 is damaged' in captured.err and 'ckpt_000000006 at step 6' in captured.out
    assert name in captured.err or how in ('no checksums', 'a file too many')
    assert state_of(tiny.out_dir)['step'] == 8 and names(checkpoint.find(tiny.out_dir)) == [newest.name, before.name]
    for path in checkpoint.find(tiny.out_dir):
        damaged(path, how)
    with pytest.raises(UserError, match='none of the 2 checkpoints in .* can be used: give the --out_dir of a run'):
        train(replace(tiny, init_from='resume'))


def test_a_half_written_checkpoint_is_none_and_is_cleaned_up(tiny):
    train(replace(tiny, max_iters=4))
    half = Path(tiny.out_dir, 'ckpt_000000008.tmp')
    shutil.copytree(checkpoint.find(tiny.out_dir)[0], half)
    train(replace(tiny, init_from='resume', max_iters=6))
    assert not half.exists() and names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000006', 'ckpt_000000004']


class Attack:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_hold_no_code(tiny, tmp_path, run_here):
    """Planted code never runs, even if the checksums match: an attacker can compute them, too."""
    train(tiny)
    marker = tmp_path / 'attacked'
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists() and not marker.rmdir()  # the control: loading the pickle runs the attack
    for path in checkpoint.find(tiny.out_dir):
        shard = next(path.glob('*.safetensors'))
        torch.save({'model': Attack(marker)}, shard)
        (path / '.metadata').write_bytes(pickle.dumps(Attack(marker)))  # DCP's own format has a pickle here
        sums = {file.name: checkpoint.checksum(file) for file in path.iterdir() if file.name != 'checksums.json'}
        (path / 'checksums.json').write_text(json.dumps(sums))
    for call, resumed in ((run, 'train.py'), (run_here, 'sample.py')):
        result = call(resumed, f'--out_dir={tiny.out_dir}', '--init_from=resume')
        assert result.returncode == 2 and 'Traceback' not in result.stderr, result.stderr
        assert 'cannot be read' in result.stderr and not marker.exists()


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / 'state.json'
    checkpoint.write_atomically(path, b'first')

    def breaks(number):
        raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', breaks)
    with pytest.raises(OSError, match='disk full'):
        checkpoint.write_atomically(path, b'second')
    assert path.read_bytes() == b'first' and names(tmp_path.iterdir()) == ['state.json']


def test_resume_as_another_model_lists_the_keys(tiny):
    train(tiny)
    with pytest.raises(UserError) as error:
        train(replace(tiny, init_from='resume', parameterization='mup', n_layer=4))
    assert "init_from='resume' brings a model" in str(error.value) and 'its n_layer is 2, not 4' in str(error.value)
    assert "its parameterization is 'completep', not 'mup'" in str(error.value)
    assert 'n_embd' not in str(error.value)


def test_resume_on_another_tokenizer_is_an_error(tiny, tmp_path):
    train(tiny)
    write_dataset(tmp_path / 'chars', [(split, 'abc' * 200, True) for split in ('train', 'val')],
                  CharTokenizer.of('abc'), 'test')
    with pytest.raises(UserError, match="its tokenizer is 'byte', not 'char'"):
        train(replace(tiny, init_from='resume', vocab_size=256, real_vocab_size=256, dataset=str(tmp_path / 'chars')))


def test_gpt2_weights_are_for_gpt2_tokens_and_their_own_shape(tiny, monkeypatch, tmp_path):
    def from_hf(name, model_class, config, block_size):
        assert (name, model_class, config.dropout, block_size) == ('gpt2-medium', GPT, 0.0, 16)
        shape = dict(block_size=16, vocab_size=50257, n_layer=1, n_embd=32, head_dim=16, tie_weights=True,
                     parameterization='gpt2', real_vocab_size=50257)
        return GPT(GPTConfig(**shape)), dict(tokenizer='gpt2')
    monkeypatch.setattr(train_module, 'from_hf', from_hf)
    fresh = TrainConfig(init_from='gpt2-medium', block_size=16, batch_tokens=32, max_iters=2, eval_tokens=64,
                        dataset=tiny.dataset, out_dir=tiny.out_dir, compile=False, device='cpu')
    with pytest.raises(UserError, match="its tokenizer is 'gpt2', not 'byte'"):
        train(fresh)
    with pytest.raises(UserError, match='its n_layer is 1, not 7; its tokenizer'):
        train(replace(fresh, n_layer=7))

    class Gpt2Sized(ByteTokenizer):
        name, vocab_size = 'gpt2', 50257

        def token_bytes(self, token):
            return b'x'
    write_dataset(tmp_path / 'gpt2', [(split, 'abc' * 200, True) for split in ('train', 'val')], Gpt2Sized(), 'test',
                  workers=1)
    fresh = replace(fresh, dataset=str(tmp_path / 'gpt2'))
    train(fresh)
    assert train(replace(TrainConfig(**{**state_of(tiny.out_dir)['config'], 'init_from': 'resume'}), max_iters=3,
                         eval_interval=1))['steps'] == 3


def test_resume_takes_this_runs_hyperparameters_and_says_so(tiny, capsys, optimizers):
    """In other codebases, loading the optimizer state silently restores the old weight decay and eps."""
    train(replace(tiny, max_iters=4))
    train(replace(tiny, init_from='resume', weight_decay=0.5, eps=1e-3, max_iters=8))
    assert 'max_iters 4 -> 8' in (out := capsys.readouterr().out) and 'weight_decay 0.0 -> 0.5' in out
    groups = {group['role']: group for group in optimizers[1].param_groups}
    assert groups['hidden_weight']['weight_decay'] == 1.0 and groups['embedding']['eps'] == 5e-4
    with pytest.raises(UserError, match='is at step 8, past the end at 6: raise max_iters'):
        train(replace(tiny, init_from='resume', max_iters=6))


def test_resume_on_the_command_line_needs_no_config(tiny, run_here):
    train(replace(tiny, max_iters=4))
    result = run_here('train.py', f'--out_dir={tiny.out_dir}', '--init_from=resume', '--max_iters=6')
    assert result.returncode == 0, result.stderr
    assert 'at step 4, with max_iters 4 -> 6' in result.stdout
    assert state_of(tiny.out_dir)['step'] == 6 and len(rows_of(tiny.out_dir)) == 7


def test_a_run_is_not_overwritten_unasked(tiny):
    train(tiny)
    before = contents(tiny.out_dir)
    with pytest.raises(UserError, match='holds the checkpoints of a run'):
        train(replace(tiny, seed=5))
    assert contents(tiny.out_dir) == before
    train(replace(tiny, max_iters=2, eval_interval=2, overwrite=True))
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000002']


def test_only_the_best_checkpoint_when_asked(tiny, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 2.0, 6.0])
    forward = GPT.forward

    def fixed_val_loss(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        return logits, loss if self.training else torch.tensor(next(values))
    monkeypatch.setattr(GPT, 'forward', fixed_val_loss)
    summary = train(replace(tiny, eval_interval=2, eval_tokens=64, always_save_checkpoint=False))
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000006', 'ckpt_000000002']
    assert summary['best_val_loss'] == 2.0 and summary['val_loss'] == 6.0


def test_eval_only_writes_nothing(tiny, capsys):
    val_loss = train(tiny)['val_loss']
    before = contents(tiny.out_dir)
    assert train(replace(tiny, init_from='resume', eval_only=True))['val_loss'] == val_loss
    assert f'validation loss {val_loss:.4f}' in capsys.readouterr().out
    assert contents(tiny.out_dir) == before


def test_wandb_is_optional(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # as if it were not installed
    with pytest.raises(UserError, match='wandb_log=True needs wandb: pip install wandb'):
        train(replace(tiny, wandb_log=True))
    calls = []

    class Wandb:
        def init(self, project, name, config):
            calls.append((project, name, config['n_layer']))
            return self

        def log(self, row, step):
            calls.append((step, 'val_loss' in row, 'loss' in row))

        def finish(self):
            calls.append('finish')
    monkeypatch.setitem(sys.modules, 'wandb', Wandb())
    train(replace(tiny, wandb_log=True, wandb_run_name='mine', max_iters=2))
    assert calls == [('nanoP', 'mine', 2), (0, True, True), (1, False, True), (2, True, False), 'finish']


@pytest.mark.parametrize('where, error', [('init', ConnectionError), ('log', SystemExit), ('finish', KeyError)])
def test_wandb_cannot_end_the_run(tiny, monkeypatch, capsys, where, error):
    class Wandb:
        def __getattr__(self, name):
            def function(*_, **__):
                if name == where:
                    raise error('no route')
                return self
            return function
    monkeypatch.setitem(sys.modules, 'wandb', Wandb())
    summary = train(replace(tiny, wandb_log=True))
    assert summary['steps'] == 8 and Path(tiny.out_dir, 'summary.json').exists()
    warnings = re.findall("warning: Weights & Biases failed .'?no route'?.; going on", capsys.readouterr().err)
    assert len(warnings) == 1


@pytest.mark.parametrize('kind, message', [
    ('empty', "has no attribute 'init'"), ('no run', 'init.. returned no run'),
    ('raises', 'cannot be imported .protobuf'), ('lacks', 'wandb_log=True needs nonesuch: pip install nonesuch')])
def test_a_broken_wandb_is_said(tiny, tmp_path, monkeypatch, capsys, kind, message):
    source = dict(empty='', lacks='import nonesuch', raises="raise RuntimeError('protobuf is too old')")
    source['no run'] = 'def init(**_):\n    return None\n'
    (tmp_path / 'wandb.py').write_text(source[kind])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    if kind in ('empty', 'no run'):
        assert train(replace(tiny, wandb_log=True))['steps'] == 8
        assert re.search(f'warning: Weights & Biases failed .*{message}', capsys.readouterr().err)
    else:
        with pytest.raises(UserError, match=message):
            train(replace(tiny, wandb_log=True))
    sys.modules.pop('wandb', None)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match="init_from='gpt2' needs transformers: pip install transformers"):
        train_module.from_hf('gpt2', GPT, GPTConfig())
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match='pip install datasets'):
        list(parquet_documents('a.parquet', 10))
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match="tokenizer 'gpt2' needs tiktoken: pip install tiktoken"):
        get_tokenizer('gpt2')


def test_the_embedded_dataset_is_prepared_when_it_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / 'stdlib').mkdir()
    shutil.copy(ROOT / 'data' / 'stdlib' / 'prepare.py', tmp_path / 'stdlib')
    monkeypatch.setattr(dataset, 'DATA_DIR', tmp_path)
    data = dataset.open_dataset('stdlib')
    assert data.tokenizer_name == 'byte' and 'preparing data/stdlib' in capsys.readouterr().out
    dataset.open_dataset('stdlib')
    assert 'preparing' not in capsys.readouterr().out


def test_every_model_key_reaches_the_model(tiny):
    """No key is silently ignored."""
    by_name = {field.name: field for field in fields(TrainConfig)}
    assert {field.name for field in fields(GPTConfig)} <= set(by_name)
    changed = dict(dropout=0.1, bias=False, tie_weights=True, density=0.5, mask_seed=3, parameterization='depth_mup',
                   alpha=0.75, base_n_layer=4, base_n_embd=64, base_head_dim=8, init_std=0.1, input_mult=2.0,
                   attn_mult=2.0, output_mult=2.0, vocab_size=300, real_vocab_size=299, n_layer=3, n_embd=48,
                   head_dim=24, block_size=8, norm='rmsnorm', norm_gain=False, activation='relu2',
                   pos='rope', n_kv_head=1, base_n_kv_head=4, attn_scale='1/d', zero_init_query=True,
                   init_std_mult=dict(embedding=2.0), lr_mult=dict(kv_weight=3.0), weight_decay_mult={},
                   eps_mult=dict(embedding=4.0, final_norm=0.5))
    untied = dict(tie_weights=False, unembed_form='weights', zero_init_unembed=True, zero_init_query=False,
                  qk_norm=True)
    assert {*changed, *untied} == {field.name for field in fields(GPTConfig)}
    for values in (changed, {**changed, **untied}):
        model = train_module.build_model(replace(tiny, **values), Dataset(tiny.dataset))
        assert {key: value for key, value in asdict(model.config).items() if key in values} == values


# -----------------------------------------------------------------------------
# Machine


def test_compiled_training_is_the_same(tiny, tmp_path):
    if reason := machine.why_not_compile(torch.device('cpu')):
        pytest.skip(f'torch.compile does not work here: {reason}')
    train(replace(tiny, max_iters=4))
    train(replace(tiny, max_iters=4, compile=True, out_dir=str(tmp_path / 'compiled')))
    for a, b in zip(rows_of(tiny.out_dir), rows_of(tmp_path / 'compiled'), strict=True):
        assert not a['loss'] or float(a['loss']) == pytest.approx(float(b['loss']), rel=1e-4)
    assert set(state_of(tmp_path / 'compiled')['model']) == set(state_of(tiny.out_dir)['model'])


def test_eager_with_a_reason_where_no_compiler_works(tiny, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError('no C++ compiler\nlong story')
    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setattr(parallel, 'why_not_compile', machine.why_not_compile.__wrapped__)  # without its cache
    assert train(replace(tiny, max_iters=1, compile=True))['steps'] == 1
    assert 'running without torch.compile: RuntimeError: no C++ compiler\n' in capsys.readouterr().out


def test_bf16_autocast_is_used_on_the_cpu(tiny, monkeypatch):
    seen = set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, 'linear', lambda *args: (out := linear(*args), seen.add(out.dtype))[0])
    train(replace(tiny, max_iters=1, dtype='bfloat16'))
    assert seen == {torch.bfloat16}


def test_dtype_and_device_are_picked_or_refused(monkeypatch):
    cpu = torch.device('cpu')
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(machine, 'cpu_has_bf16', lambda has=has: has)
        assert machine.pick_dtype('auto', cpu) == expected
    assert machine.pick_dtype('auto', torch.device('mps')) == torch.float32
    with pytest.raises(UserError, match="dtype='float16' needs the gradient scaling of a CUDA device, this is cpu"):
        machine.pick_dtype('float16', cpu)
    with pytest.raises(UserError, match="dtype='fp32' is not allowed: use one of auto, float32"):
        machine.pick_dtype('fp32', cpu)
    with pytest.raises(UserError, match="device='gpu' does not work here"):
        machine.pick_device('gpu')
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda' does not work here"):
            machine.pick_device('cuda')
    assert machine.peak_flops(cpu, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert machine.pick_dtype('auto', torch.device('cuda')) == torch.float16  # this GPU only emulates bf16


def test_a_cuda_device_has_its_index(monkeypatch):
    class OnTheFirst:
        device = torch.device('cuda', 0)
    monkeypatch.setattr(torch, 'empty', lambda *size, device: OnTheFirst)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert machine.pick_device('auto') == torch.device('cuda', 0)  # set_device refuses a device without an index
    with pytest.raises(UserError, match="device='cuda:1' is not for several processes"):
        monkeypatch.setenv('RANK', '0')
        parallel.join_processes('cuda:1', 60)


@pytest.mark.parametrize('name, flops', [
    ('NVIDIA H200', 989e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA B200', 2.25e15),
    ('NVIDIA GB200', 2.5e15), ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA A10G', 70e12), ('NVIDIA A10', 125e12),
    ('NVIDIA RTX A1000', None), ('NVIDIA RTX A4000', None), ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('NVIDIA L4', 121e12), ('NVIDIA L40S', 362e12), ('NVIDIA GeForce RTX 4090', 165e12), ('Tesla T4', 65e12),
    ('Some Future Chip', None)])
def test_peak_flops_by_name(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    assert machine.peak_flops(torch.device('cuda'), torch.bfloat16) == flops
    assert machine.peak_flops(torch.device('cuda'), torch.float32) is None


# -----------------------------------------------------------------------------
# Command line


@dataclass
class Defaults:
    """Keys for the tests of the command line."""
    learning_rate: float = 1e-3
    max_iters: int = 10
    compile: bool = True
    out_dir: str = 'out'
    train_tokens: int = 0
    one_of = [('max_iters', 'train_tokens')]


@pytest.mark.parametrize('argument, expected', [
    ('--learning_rate=1', dict(learning_rate=1.0)),
    ('--learning_rate=1e-4', dict(learning_rate=1e-4)),
    ('--max_iters=5', dict(max_iters=5)),
    ('--max_iters=5_000', dict(max_iters=5000)),
    ('--compile=False', dict(compile=False)),
    ('--compile=false', dict(compile=False)),
    ('--compile=True', dict(compile=True)),
    ('--out_dir=a=b', dict(out_dir='a=b')),
    ('--out_dir=123', dict(out_dir='123')),
    ('--out_dir=', dict(out_dir='')),
    ('--leraning_rate=1', "'--leraning_rate=1': unknown key 'leraning_rate'; did you mean 'learning_rate'?"),
    ('--zzz=1', "'--zzz=1': unknown key 'zzz'; see --help for all keys"),
    ('--max_iters=two', "'--max_iters=two': max_iters must be int, got 'two' (str)"),
    ('--max_iters=1.5', "'--max_iters=1.5': max_iters must be int, got '1.5' (str)"),
    ('--learning_rate=', "'--learning_rate=': learning_rate must be float, got '' (str)"),
    ('--compile=1', "'--compile=1': compile must be bool, got '1' (str)"),
    ('--compile', "'--compile' has no value; write --compile=VALUE"),
    ('nothing.py', "no file 'nothing.py'; flags are written --key=value"),
    ('max_iters=5', "no file 'max_iters=5'; flags are written --key=value"),
    ('typo.py', "typo.py: unknown key 'leraning_rate'; did you mean 'learning_rate'?"),
    ('text.py', "text.py: learning_rate must be float, got '0.001' (str)"),
    ('bool.py', 'bool.py: max_iters must be int, got True (bool)'),
    ('syntax.py', 'syntax.py, line 2: '),
    ('raises.py', "raises.py: NameError: name 'nonesuch' is not defined"),
    ('like.yaml', 'like.yaml: sets no key; a config is Python, a line like n_layer = 3 for each key'),
    ('good.py', dict(learning_rate=2.0, max_iters=30)),
    ('based.py', dict(learning_rate=2.0, max_iters=7)),
    ('helpers.py', dict(learning_rate=2.0, max_iters=2)),
    ('huge.py', 'huge.py: learning_rate must be float, got 1000'),
    ('a_class.py', "a_class.py: max_iters must be int, got <class 'int'> (type)"),
    ('exits.py', 'exits.py: SystemExit: 0'),
    ('both.py', 'both.py: max_iters and train_tokens set one thing: leave one of them out'),
])
def test_configurator(tmp_path, monkeypatch, argument, expected):
    monkeypatch.chdir(tmp_path)
    Path('typo.py').write_text('leraning_rate = 1e-3\n')
    Path('text.py').write_text("learning_rate = '0.001'\n")
    Path('bool.py').write_text('max_iters = True\n')
    Path('like.yaml').write_text('max_iters: 3\n')
    Path('syntax.py').write_text('max_iters = 1\nlearning_rate 2\n')
    Path('raises.py').write_text('max_iters = nonesuch\n')
    Path('good.py').write_text('import math\n_half = 15\nmax_iters = 2 * _half\nlearning_rate = 2\n')
    Path('based.py').write_text('from good import *\nmax_iters = 7\n')
    Path('helpers.py').write_text('from math import pi, sqrt\nfrom pathlib import Path\nimport os.path as somewhere\n'
                                  'learning_rate = sqrt(4)\nhalf = lambda x: x // 2\nmax_iters = half(4)\n')
    Path('a_class.py').write_text('max_iters = int\n')
    Path('huge.py').write_text('learning_rate = 10**400\n')
    Path('exits.py').write_text('import sys\nmax_iters = 3\nsys.exit(0)\n')
    Path('both.py').write_text('from good import *\ntrain_tokens = 5\n')
    if isinstance(expected, dict):
        assert configure(Defaults, [argument]) == expected
        assert 'good' not in sys.modules
    else:
        with pytest.raises(UserError) as error:
            configure(Defaults, [argument])
        assert expected in str(error.value) and '\n' not in str(error.value)


def test_files_and_flags_apply_from_left_to_right(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text('max_iters = 3\n')
    assert configure(Defaults, ['--max_iters=1', str(file)]) == dict(max_iters=3)
    assert configure(Defaults, [str(file), '--max_iters=1']) == dict(max_iters=1)


def test_of_two_keys_that_set_one_thing_the_flag_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('steps.py').write_text('max_iters = 3\n')
    Path('tokens.py').write_text('train_tokens = 300\n')
    assert configure(Defaults, ['steps.py', '--train_tokens=5']) == dict(max_iters=10, train_tokens=5)
    assert '--train_tokens=5 replaces max_iters=3' in capsys.readouterr().out
    assert configure(Defaults, ['tokens.py', '--max_iters=5']) == dict(max_iters=5, train_tokens=0)
    assert configure(Defaults, ['tokens.py', 'steps.py']) == dict(max_iters=3, train_tokens=0)
    assert configure(Defaults, ['tokens.py', '--train_tokens=0']) == dict(train_tokens=0)
    assert configure(Defaults, ['tokens.py', '--train_tokens=0', '--max_iters=4']) == dict(max_iters=4, train_tokens=0)
    for argv in (['--max_iters=5', '--train_tokens=5'], ['--train_tokens=5', 'steps.py'],
                 ['--max_iters=5', 'tokens.py']):
        with pytest.raises(UserError, match='max_iters and train_tokens set one thing'):
            configure(Defaults, argv)


@pytest.mark.parametrize('config, argv, duration', [
    (dict(max_iters=6), ['--train_tokens=1280'], dict(max_iters=1000, train_tokens=1280, tokens_per_param=0.0)),
    (dict(max_iters=1000, train_tokens=768), ['--max_iters=10'], dict(max_iters=10, train_tokens=0)),
    (dict(max_iters=1000, tokens_per_param=0.03), ['--max_iters=10'], dict(max_iters=10, tokens_per_param=0.0)),
    (dict(max_iters=1000, train_tokens=768), ['--tokens_per_param=1'], dict(train_tokens=0, tokens_per_param=1.0)),
])
def test_a_resumed_run_takes_the_flags_duration(tiny, config, argv, duration):
    train(replace(tiny, **config))
    argv = [f'--out_dir={tiny.out_dir}', '--init_from=resume', *argv]
    resumed = train_module.read_config(argv)
    assert {key: getattr(resumed, key) for key in duration} == duration


def test_a_resumed_run_takes_the_flags_decay(tiny):
    train(replace(tiny, weight_decay=0.1))
    resumed = train_module.read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume', '--tau_ema=0.2'])
    assert (resumed.weight_decay, resumed.tau_ema) == (0.0, 0.2)


@pytest.mark.parametrize('key, value, message', [
    ('schedule', 'step', "schedule='step' is not allowed: use one of linear, cosine, constant, wsd"),
    ('optimizer', 'adam', "optimizer='adam' is not allowed: use one of adamw, lion, muon, sgd"),
    ('weight_decay_mode', 'decoupled', "weight_decay_mode='decoupled' is not allowed: use one of coupled, independent"),
    ('base_batch_tokens', -1, 'base_batch_tokens=-1 is not allowed'),
    ('learning_rate', -1.0, 'learning_rate=-1.0 is not allowed: use a finite value of at least 0'),
    ('learning_rate', math.inf, 'learning_rate=inf is not allowed'),
    ('attn_mult', 0.0, 'attn_mult=0.0 is not allowed'),
    ('eps', 0.0, 'eps=0.0 is not allowed'),
    ('init_from', 'resum', "init_from='resum' is not allowed: use one of scratch, resume, auto, gpt2, gpt2-medium"),
    ('learning_rate', math.nan, 'learning_rate=nan is not allowed'),
    ('beta1', 1.0, 'beta1=1.0 is not allowed: use a value in [0, 1)'),
    ('warmup_frac', 2.0, 'warmup_frac=2.0 is not allowed: use a value in [0, 1]'),
    ('max_iters', 0, 'max_iters=0 is not allowed: use a finite value of at least 1'),
    ('seed', -1, 'seed=-1 is not allowed'),
])
def test_values_no_run_can_use(key, value, message):
    with pytest.raises(UserError) as error:
        replace(TrainConfig(), **{key: value})
    assert message in str(error.value)
    with pytest.raises(UserError, match='tau_ema=0.1 is not allowed: weight_decay=0.2 sets the decay, too'):
        TrainConfig(tau_ema=0.1, weight_decay=0.2)
    for duration in (dict(train_tokens=5), dict(tokens_per_param=5.0)):
        with pytest.raises(UserError, match='max_iters=7 is not allowed: train_tokens or tokens_per_param sets'):
            TrainConfig(max_iters=7, **duration)
    with pytest.raises(UserError, match="final_lr_frac=0.1 is not allowed: schedule='constant' ends at the peak"):
        TrainConfig(final_lr_frac=0.1, schedule='constant')


def test_user_errors_are_one_line_and_exit_code_2(tiny, tmp_path, run_here):
    file = tmp_path / 'file'
    file.write_text('')
    cases = {
        ('--n_embd=100',): 'error: n_embd=100 is not allowed: use a multiple of head_dim=16\n',
        ('--dataset=nonesuch',): "error: no dataset in '",
        ('--vocab_size=100',): 'has 256 ids, the model vocab_size=100: use vocab_size=0',
        ('--init_from=resume',): f"no checkpoint in '{tiny.out_dir}': give the --out_dir of a run, or",
        (f'--out_dir={file}/out',): f"error: out_dir='{file}/out' cannot be written",
    }
    for args, message in cases.items():
        result = (run if args == ('--vocab_size=100',) else run_here)('train.py', *flags_of(tiny), *args)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_exit_codes(capsys):
    def ends_with(outcome):
        def main():
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        with pytest.raises(SystemExit) as exit:
            exit_on_user_error(main, 'stopped; resume')
        return exit.value.code, capsys.readouterr().err
    assert ends_with(0) == ends_with(None) == ends_with({'meta': 1}) == (0, '')
    assert ends_with(3) == (3, '')
    assert ends_with(UserError('what to do')) == (2, 'error: what to do\n')
    assert ends_with(KeyboardInterrupt()) == (130, '\nstopped; resume\n')


def test_help_is_the_manual(run_here):
    for call, script in ((run, 'train.py'), (run_here, 'sample.py')):
        result = call(script, '--help')
        assert result.returncode == 0 and 'python ' + script in result.stdout and 'out_dir: str' in result.stdout
        assert 'raise' not in result.stdout


# -----------------------------------------------------------------------------
# Sampling


def test_sample(tiny, tmp_path, run_here):
    train(replace(tiny, max_iters=60, eval_interval=60))
    (tmp_path / 'prompt.txt').write_text('abc fg')

    def sample(*args, call=run_here):
        result = call('sample.py', f'--out_dir={tiny.out_dir}', '--max_new_tokens=40', '--device=cpu', *args)
        assert result.returncode == 0, result.stderr
        return result.stdout
    text = sample('--start=abc fg', call=run)
    assert text.startswith('abc fg') and len(text) == 6 + 40 + 1 and set(text) <= set('abcdefghij \n')
    assert text == sample('--start=FILE:' + str(tmp_path / 'prompt.txt')) != sample('--start=abc fg', '--seed=1')
    assert sample('--temperature=0').strip() == sample('--temperature=0', '--seed=2').strip() != ''
    assert len(sample('--temperature=1e308')) > 20
    for cold in ('1e-40', '1e-320', '1e-9'):
        assert sample(f'--temperature={cold}') == sample('--temperature=0')
    assert len(sample('--temperature=1e30')) > 20
    two = sample('--num_samples=2')
    assert '--- sample 1' in two and '--- sample 2' in two
    for args, message in ((['--start=FILE:nonesuch'], 'cannot be read'), (['--out_dir=nonesuch'], 'no checkpoint'),
                          (['--temperature=-1'], 'temperature=-1.0 is not allowed'),
                          (['--init_from=gpt3'], "init_from='gpt3' is not allowed")):
        result = run_here('sample.py', f'--out_dir={tiny.out_dir}', *args)
        assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_sample_for_any_terminal(tiny, tmp_path):
    words, splits = 'aé→😀 ' * 400, ('train', 'val')
    write_dataset(tmp_path / 'chars', [(split, words, True) for split in splits], CharTokenizer.of(words), 'w')
    train(replace(tiny, dataset=str(tmp_path / 'chars'), max_iters=2))
    command = shlex.join([sys.executable, str(ROOT / 'sample.py'), f'--out_dir={tiny.out_dir}', '--device=cpu',
                          '--max_new_tokens=300', '--start=é→'])
    for shell, encoding, code, out, err in (
            ('{}', 'ascii', 0, '??', ''), ('{}', 'latin-1', 0, 'é?', ''), ('{}', 'utf-8', 0, 'é→', ''),
            ('{} | head -c 4', 'utf-8', 141, '', ''), ('{} >&-', 'utf-8', 0, '', ''),
            ('{} > /dev/full', 'utf-8', 141, '', 'error: the output can no longer be written (')):
        result = subprocess.run(['bash', '-c', 'set -o pipefail; ' + shell.format(command)], capture_output=True,
                                env=dict(os.environ, PYTHONIOENCODING=encoding))
        assert (result.returncode, result.stdout.decode(encoding, 'replace')[:len(out)]) == (code, out), shell
        assert result.stderr.decode().startswith(err) and len(result.stderr.splitlines()) == bool(err), result.stderr


def test_weights_that_are_not_finite_are_not_sampled(tiny):
    model = GPT(GPTConfig(vocab_size=9, n_embd=64))
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match='logits are not finite'):
            model.generate(torch.tensor([[1]]), 2, temperature)


def test_sample_of_a_char_model_names_unknown_characters(tiny, tmp_path, run_here):
    write_dataset(tmp_path / 'chars', [(split, 'abcé' * 200, True) for split in ('train', 'val')],
                  CharTokenizer.of('abcé'), 'test')
    train(replace(tiny, dataset=str(tmp_path / 'chars'), max_iters=2, sample_tokens=5))
    result = run_here('sample.py', f'--out_dir={tiny.out_dir}', '--start=aé', '--max_new_tokens=10')
    assert result.returncode == 0 and set(result.stdout.strip()) <= set('abcé')  # the tokenizer is in the checkpoint
    shutil.rmtree(tmp_path / 'chars')
    assert run_here('sample.py', f'--out_dir={tiny.out_dir}', '--start=a').returncode == 0
    result = run('sample.py', f'--out_dir={tiny.out_dir}', '--start=xyz')
    assert result.returncode == 2 and "character 'x' is not among the 4" in result.stderr


# -----------------------------------------------------------------------------
# Configs and the first minute


CONFIGS = sorted(path.name for path in (ROOT / 'config').glob('*.py')  # the configs of train.py
                 if not path.name.startswith(('bench_', 'coord_check', 'sweep_', 'evidence_'))
                 or path.name in ('sweep_base.py', 'evidence_base.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_loads_and_builds(name):
    path = ROOT / 'config' / name
    head = path.read_text().splitlines()
    assert head[0].startswith('# ') and 'Hardware' in head[1] + head[2]
    config = TrainConfig(**configure(TrainConfig, [str(path)]))
    for world_size in (1, 2, 4, 8):
        split_batch(config, world_size)
    if config.init_from == 'scratch':
        with torch.device('meta'):
            assert GPT(GPTConfig.of(config, vocab_size=config.vocab_size or 50304)).num_params() > 1000


def test_the_papers_shapes_have_the_papers_size():
    """1.5B non-embedding parameters, wide and deep (arXiv:2505.01618)."""
    for name in ('completep_1p5b_wide', 'completep_1p5b_deep'):
        config = TrainConfig(**configure(TrainConfig, [str(ROOT / 'config' / f'{name}.py')]))
        assert 12 * config.n_layer * config.n_embd ** 2 == pytest.approx(1.5e9, rel=0.02)


def test_the_demo_of_the_makefile(tmp_path):
    """`make demo` at a tiny size, without the installation."""
    if not shutil.which('make'):
        pytest.skip('needs make')
    out = tmp_path / 'demo'
    tiny = '--n_layer=1 --n_embd=64 --max_iters=4 --eval_tokens=1024 --batch_tokens=1024 --batch_size=4'
    result = subprocess.run(
        ['make', '-o', f'{sys.prefix}/.run', 'demo', f'VENV={sys.prefix}', f'OUT={out}', f'FLAGS={tiny}'],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f'The loss curve is {out}/loss.png' in result.stdout and 'residual_branch' in result.stdout
    assert (out / 'loss.png').exists() and 'def ' in result.stdout
