"""Tests of faults during a run: signals, a second process, full disks, data that shrinks, kills."""
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stress_faults
import torch

import train as train_module
from configurator import flags_of
from model import GPT
from nanop import checkpoint, dataset, run_log, terminal
from nanop.errors import UserError
from nanop.files import lock
from nanop.terminal import StopSignals
from nanop.tokenizer import ByteTokenizer, CharTokenizer
from nanop.write_dataset import write_dataset
from train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]


def names(paths):
    return [path.name for path in paths]


def start(config, **options):
    """Start train.py in a subprocess. Returns the process."""
    return subprocess.Popen([sys.executable, ROOT / 'train.py', *flags_of(config)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_step(config, step):
    end = time.monotonic() + 120
    while not any(int(row['step']) >= step for row in run_log.read_metrics(config.out_dir)):
        assert time.monotonic() < end, f'the run did not reach step {step} in time'
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# Signals


class At:
    """A stand-in for StopSignals that receives a signal during step `step`."""

    def __init__(self, config, step, number=signal.SIGTERM):
        self.config, self.step, self.number = config, step, number

    @property
    def received(self):
        rows = run_log.read_metrics(self.config.out_dir)
        return self.number if rows and int(rows[-1]['step']) >= self.step else None


@pytest.mark.parametrize('step', [3, 5])
def test_a_stopped_run_is_saved_and_goes_on_bit_for_bit(tiny, tmp_path, capsys, step):
    """The run stops where an evaluation is due (step 3) and between two evaluations (step 5)."""
    undisturbed = replace(tiny, out_dir=str(tmp_path / 'undisturbed'))
    train(undisturbed)
    summary = train(tiny, At(tiny, step))
    assert summary['stopped_by'] == signal.SIGTERM and summary['steps'] == step + 1
    path = checkpoint.find(tiny.out_dir)[0]
    assert path.name == f'ckpt_{step + 1:09d}'
    assert (f'stopped after {step + 1} steps, saved in {path}: go on with python train.py --out_dir={tiny.out_dir} '
            '--init_from=resume') in capsys.readouterr().out
    assert not Path(tiny.out_dir, 'summary.json').exists()
    assert train(replace(tiny, init_from='resume'))['stopped_by'] is None
    assert stress_faults.differences(undisturbed.out_dir, tiny.out_dir) == []


def test_a_run_stopped_before_its_first_step_has_nothing_to_save(tiny, capsys):
    class Now:
        received = signal.SIGINT
    assert train(tiny, Now())['steps'] == 0
    assert 'stopped after 0 steps, not saved' in capsys.readouterr().out and not checkpoint.find(tiny.out_dir)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_signals_finish_the_step_save_and_exit_with_their_code(tiny, number, code):
    config = replace(tiny, max_iters=10**6, eval_interval=0, eval_tokens=16)
    process = start(config)
    wait_for_step(config, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code and 'Traceback' not in err, err
    path, state = checkpoint.newest(config.out_dir)
    assert f"stopped after {state['step']} steps, saved in {path}" in out
    assert int(run_log.read_metrics(config.out_dir)[-1]['step']) == state['step'] - 1


def test_a_second_signal_ends_at_once(monkeypatch, capsys):
    ended = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    monkeypatch.setattr(os, '_exit', ended.append)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a repeat, as when torchrun forwards the signal
        assert stop.received == signal.SIGTERM and not ended
        monkeypatch.setattr(terminal, 'SAME_S', 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGTERM and ended == [130]
    assert capsys.readouterr().out.count('SIGTERM: finishing the step') == 1
    with pytest.raises(KeyboardInterrupt):  # the earlier handler is back
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


# -----------------------------------------------------------------------------
# Folders and disks


def test_a_second_process_refuses_until_the_first_is_dead(tiny):
    config = replace(tiny, max_iters=10**6, eval_interval=0, eval_tokens=16)
    process = start(config)
    try:
        wait_for_step(config, 1)
        for again in (tiny, replace(tiny, overwrite=True), replace(tiny, init_from='auto')):
            with pytest.raises(UserError, match='another process is training in .*: wait for it, or use another'):
                train(again)
    finally:
        process.kill()
        process.communicate()
    assert train(replace(tiny, init_from='auto'))['steps'] == 8


def test_the_lock_is_released_however_a_run_ends(tiny, monkeypatch):
    train(tiny)
    with pytest.raises(UserError, match='holds the checkpoints of a run'):
        train(tiny)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(GPT, 'forward', lambda *args: 1 / 0)
        train(replace(tiny, overwrite=True))
    lock(tiny.out_dir).release()


def test_an_out_dir_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='out_dir=.* cannot be written'):
        train(replace(tiny, out_dir=str(tmp_path / 'file' / 'out')))


def full_disk(limit_bytes):
    """A preexec_fn that lets no file grow beyond the limit."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint(tiny):
    train(replace(tiny, max_iters=4))
    before = {path: path.read_bytes() for path in checkpoint.find(tiny.out_dir)[0].iterdir()}
    assert max(map(len, before.values())) > 300_000
    process = start(replace(tiny, init_from='resume', max_iters=16), preexec_fn=full_disk(100_000))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and 'Traceback' not in err, err
    assert "ckpt_000000008' could not be written (" in err and 'File too large' in err and 'make room' in err
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path(tiny.out_dir).glob('*.tmp'))
    train(replace(tiny, init_from='resume'))
    assert [row['step'] for row in run_log.read_metrics(tiny.out_dir)] == [str(step) for step in range(9)]


def test_a_checkpoint_that_fails_behind_its_back_ends_the_run_at_once(tiny, monkeypatch):
    """The run does not wait for the next checkpoint, which may be hours away."""
    def no_space(self, metadata, results):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint.Writer, 'finish', no_space)
    with pytest.raises(UserError, match="ckpt_000000050' could not be written .*No space left on device.*make room"):
        train(replace(tiny, max_iters=500, eval_interval=50))
    assert 49 <= int(run_log.read_metrics(tiny.out_dir)[-1]['step']) < 95


def test_a_newer_checkpoint_that_was_passed_over_stays_and_counts_for_none(tiny):
    train(replace(tiny, eval_interval=2))
    (checkpoint.find(tiny.out_dir)[0] / 'state.json').unlink()
    train(replace(tiny, eval_interval=2, init_from='resume'), At(tiny, 6))
    assert [path.name[-1] for path in checkpoint.find(tiny.out_dir)] == ['8', '7', '6']
    train(replace(tiny, eval_interval=2, init_from='resume'))
    assert [path.name[-1] for path in checkpoint.find(tiny.out_dir)] == ['8', '7']


def test_a_stray_file_in_a_checkpoint_is_no_damage(tiny):
    train(tiny)
    (checkpoint.find(tiny.out_dir)[0] / '.DS_Store').write_text('')
    assert checkpoint.newest(tiny.out_dir)[1]['step'] == 8


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tiny, monkeypatch, capsys):
    def held(path):
        raise OSError(39, 'Directory not empty')
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'remove', held)
        assert train(replace(tiny, eval_interval=2))['steps'] == 8
    assert 'ckpt_000000002 could not be removed' in capsys.readouterr().err
    assert checkpoint.newest(tiny.out_dir)[1]['step'] == 8


def test_rows_that_were_cut_off_are_none(tmp_path):
    (tmp_path / 'metrics.csv').write_text('step,tokens,loss\n10,20,3.5\n11,2')
    assert [row['step'] for row in run_log.read_metrics(tmp_path)] == ['10']


def test_an_error_is_not_hidden_by_a_checkpoint_that_failed_too(tiny, monkeypatch, capsys):
    def no_space(self, metadata, results):
        time.sleep(0.5)
        raise OSError(28, 'No space left on device')
    forward, calls = GPT.forward, []

    def fails_later(self, *args):
        calls.append(self.training)
        return forward(self, *args) if sum(calls) < 11 else 1 / 0
    monkeypatch.setattr(checkpoint.Writer, 'finish', no_space)
    monkeypatch.setattr(GPT, 'forward', fails_later)
    with pytest.raises(ZeroDivisionError):
        train(tiny)
    assert "error: '" in (err := capsys.readouterr().err) and 'No space left' in err


def test_metrics_that_cannot_be_written(tiny, monkeypatch):
    log = run_log.Metrics  # it flushes every row, so a full disk raises at the row

    def write(self, row):
        self.file.close()
        self.file = open('/dev/full', 'w')
        self.writer.writer = run_log.csv.writer(self.file)
        original(self, row)
    original = log.write
    monkeypatch.setattr(log, 'write', write)
    with pytest.raises(UserError, match='out_dir=.* cannot be written .*No space left.*make room'):
        train(tiny)


# -----------------------------------------------------------------------------
# Data and gradients


def test_data_that_shrinks_or_vanishes_during_the_run(tiny, monkeypatch, tmp_path):
    """With a memory map, SIGBUS would end the process without a message."""
    folder = tmp_path / 'data'
    dataset_folder = Path(tiny.dataset)
    folder.mkdir()
    for name in ('train.bin', 'val.bin', 'meta.json'):
        (folder / name).write_bytes((dataset_folder / name).read_bytes())
    config, train_starts = replace(tiny, dataset=str(folder)), dataset.Dataset.train_starts

    def damage_at_six(self, seed, step, *args):
        if step == 6:
            damage()
        return train_starts(self, seed, step, *args)
    monkeypatch.setattr(dataset.Dataset, 'train_starts', damage_at_six)

    def damage():
        (folder / 'train.bin').unlink()
    assert train(config)['steps'] == 8  # the content of an open file stays until it is closed

    (folder / 'train.bin').write_bytes((dataset_folder / 'train.bin').read_bytes())

    def damage():  # noqa: F811
        os.truncate(folder / 'train.bin', 10)
    with pytest.raises(UserError, match="train.bin' has become shorter: restore it, then go on"):
        train(replace(config, overwrite=True))
    assert checkpoint.newest(tiny.out_dir)[1]['step'] == 4


def test_a_file_that_fails_to_read(tiny):
    data = dataset.Dataset(tiny.dataset)
    data.files['train'].close()
    os_error = dataset.Dataset(tiny.dataset)

    class Failing:
        name = 'train.bin'

        def seek(self, position):
            raise OSError(5, 'Input/output error')
    os_error.files['train'] = Failing()
    with pytest.raises(UserError, match="'train.bin' cannot be read any more .*Input/output error"):
        os_error.batch('train', [0], 16, torch.device('cpu'))


def large_gradients(monkeypatch, steps):
    """Multiply the loss of these training steps, of two micro-batches each, by 100."""
    forward, calls = GPT.forward, []

    def scaled(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(self.training)
        return logits, loss * 100 if self.training and (sum(calls) - 1) // 2 in steps else loss
    monkeypatch.setattr(GPT, 'forward', scaled)


def test_steps_with_a_large_gradient_are_skipped_when_asked(tiny, tmp_path, monkeypatch, capsys):
    """A skipped step changes nothing, and the run goes on. The warm-up is never skipped."""
    config = replace(tiny, max_iters=24, warmup_frac=0.5, eval_interval=1, batch_size=4)
    with monkeypatch.context() as patch:
        large_gradients(patch, steps=(11, 15, 16))
        summary = train(replace(config, skip_grad_norm=5.0))
    rows = run_log.read_metrics(tiny.out_dir)
    val = [row['val_loss'] for row in rows]
    same = [step for step in range(24) if val[step] == val[step + 1]]
    assert same == [15, 16] and summary['skipped_steps'] == 2 and summary['diverged_at'] is None
    out, norms = capsys.readouterr().out, [float(row['grad_norm']) for row in rows[:-1]]
    assert f'step 15 skipped: its gradient norm {norms[15]:.4g} is above {5 * np.median(norms[:15]):.4g}' in out
    large_gradients(monkeypatch, steps=(15, 16))
    assert train(replace(config, out_dir=str(tmp_path / 'off')))['skipped_steps'] == 0


@pytest.mark.parametrize('shape', [dict(), dict(n_embd=64), dict(n_layer=4), dict(init_std=0.2, learning_rate=1e-3)])
def test_no_ordinary_step_is_skipped(tiny, shape):
    """Norms depend on the shape and fall in training; the limit follows them."""
    assert train(replace(tiny, max_iters=40, skip_grad_norm=5.0, **shape))['skipped_steps'] == 0


def test_a_run_does_not_skip_for_ever(tiny, monkeypatch, capsys):
    config = replace(tiny, max_iters=40, skip_grad_norm=5.0)
    with monkeypatch.context() as patch:
        large_gradients(patch, steps=range(15, 100))
        with pytest.raises(UserError, match='10 steps in a row had a gradient norm above .* the state is saved: go on'):
            train(config)
        assert [row['step'] for row in run_log.read_metrics(tiny.out_dir)][-1] == '24'
    summary = train(replace(config, init_from='resume'))
    assert 'at step 25' in capsys.readouterr().out and (summary['steps'], summary['skipped_steps']) == (40, 10)


def test_a_resumed_run_remembers_the_norms(tiny, tmp_path, monkeypatch):
    config = replace(tiny, max_iters=24, skip_grad_norm=5.0, eval_interval=14)
    results = []
    for out_dir, stop in (('whole', None), ('parts', At(replace(config, out_dir=str(tmp_path / 'parts')), 13))):
        with monkeypatch.context() as patch:
            large_gradients(patch, steps=(16,))
            config = replace(config, out_dir=str(tmp_path / out_dir))
            summary = train(config, stop)
            if stop:
                summary = train(replace(config, init_from='resume'))
        results.append((summary['skipped_steps'], summary['val_loss']))
    assert results[0] == results[1] and results[0][0] == 1


def test_a_gradient_that_is_not_finite_still_stops_the_run(tiny, monkeypatch):
    forward = GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda self, *args: (None, forward(self, *args)[1] * math.nan
                                                             if self.training else forward(self, *args)[1]))
    assert train(replace(tiny, skip_grad_norm=1.0))['diverged_at'] == 0


# -----------------------------------------------------------------------------
# The user's own files and other data


@pytest.mark.parametrize('name', [
    'ckpt_best', 'ckpt_000000008_keep', 'ckpt_99', 'ckpt_0000000100', 'ckpt_000000008.bak', 'ckpt_000000008.tmp.old',
    'ckpt_best.tmp', 'ckpt_-00000001', 'ckpt_٠٠٠٠٠٠٠٩٩', 'ckpt_000000008 (copy)', 'ckpt_1e9'])
def test_only_what_the_program_named_is_a_checkpoint(tiny, name):
    train(tiny)
    theirs = Path(tiny.out_dir, name)
    shutil.copytree(Path(tiny.out_dir, 'ckpt_000000004'), theirs)
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000008', 'ckpt_000000004']
    assert train(replace(tiny, init_from='resume', max_iters=24))['steps'] == 24
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000024', 'ckpt_000000020'] and theirs.exists()
    train(replace(tiny, overwrite=True))
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000008', 'ckpt_000000004'] and theirs.exists()


def test_a_renamed_checkpoint_is_passed_over(tiny, capsys):
    train(tiny)
    shutil.copytree(Path(tiny.out_dir, 'ckpt_000000004'), Path(tiny.out_dir, 'ckpt_000000099'))
    assert checkpoint.newest(tiny.out_dir)[0].name == 'ckpt_000000008'
    assert 'ckpt_000000099 is damaged (it is of step 4)' in capsys.readouterr().err


def rewrite_state(path, change):
    """Change the state of a checkpoint, as if it had been written so."""
    state = json.loads((path / 'state.json').read_text())
    change(state)
    (path / 'state.json').write_text(json.dumps(state))
    sums = {file.name: checkpoint.checksum(file) for file in path.iterdir() if file.name != 'checksums.json'}
    (path / 'checksums.json').write_text(json.dumps(sums))


def test_a_duration_in_tokens_of_an_earlier_version(tiny):
    """It kept max_iters beside train_tokens, and ignored it."""
    train(tiny)
    rewrite_state(checkpoint.newest(tiny.out_dir)[0], lambda state: state['config'].update(train_tokens=1280))
    config = train_module.read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume'])
    assert (config.max_iters, config.train_tokens) == (1000, 1280) and train(config)['steps'] == 10


@pytest.mark.parametrize('keys, message', [
    (dict(pos='alibi'), 'other ALiBi slopes'), (dict(n_kv_head=1), 'stored with the queries'),
    (dict(pos='alibi', head_dim=4), None), (dict(pos='rope'), None)])
def test_weights_that_would_mean_something_else_now_are_refused(tiny, keys, message):
    train(replace(tiny, **keys))
    path = checkpoint.newest(tiny.out_dir)[0]
    assert checkpoint.load_weights(tiny.out_dir)[1]['format'] == checkpoint.FORMAT
    rewrite_state(path, lambda state: state.pop('format'))
    for read in (checkpoint.newest, checkpoint.read_state, checkpoint.load_weights):
        if message:
            with pytest.raises(UserError, match=f'by an earlier version, with .*{message}: use that version'):
                read(tiny.out_dir)
        else:
            read(tiny.out_dir)


@pytest.mark.parametrize('content', ['[]', '"x"', 'null', '{"step": 8}', '[' * 100_000, None])
def test_a_checkpoint_that_holds_too_little_is_passed_over(tiny, capsys, content):
    train(tiny)
    path = checkpoint.newest(tiny.out_dir)[0]
    if content is None:
        next(path.glob('*.safetensors')).unlink()
    else:
        (path / 'state.json').write_text(content)
    sums = {file.name: checkpoint.checksum(file) for file in path.iterdir() if file.name != 'checksums.json'}
    (path / 'checksums.json').write_text(json.dumps(sums))
    assert checkpoint.newest(tiny.out_dir)[0].name == 'ckpt_000000004'
    assert 'ckpt_000000008 is damaged' in capsys.readouterr().err


def test_a_link_is_removed_and_not_what_it_leads_to(tiny, tmp_path):
    train(tiny)
    older, theirs = Path(tiny.out_dir, 'ckpt_000000004'), tmp_path / 'elsewhere'
    shutil.move(older, theirs)
    older.symlink_to(theirs)
    Path(tiny.out_dir, 'ckpt_000000012').symlink_to(tmp_path / 'nonesuch')
    Path(tiny.out_dir, 'ckpt_000000016.tmp').symlink_to(theirs)
    train(replace(tiny, init_from='resume', max_iters=16))
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000016', 'ckpt_000000012'] and not older.is_symlink()
    older.symlink_to(theirs)
    train(replace(tiny, overwrite=True, max_iters=4))
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000004'] and (theirs / 'state.json').exists()


def test_an_out_dir_whose_name_is_too_long(tiny):
    for init_from in ('auto', 'resume', 'scratch'):
        with pytest.raises(UserError, match="out_dir='x*' cannot be (read|written)"):
            train_module.train(train_module.read_config([f"--out_dir={'x' * 300}", f'--init_from={init_from}']))


def test_checkpoints_are_ordered_by_step(tmp_path):
    steps = [5, 999_999_999, 1_000_000_000, 20_000_000_000]
    for step in steps:
        checkpoint.path_of(tmp_path, step).mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path)] == steps[::-1]


def test_other_data_in_the_same_folder_is_an_error_unless_asked(tiny, tmp_path, capsys):
    text = 'one two three ' * 500
    other = text[:-1] + '!'
    config = replace(tiny, dataset=str(tmp_path / 'data'))

    def prepare(val):
        write_dataset(tmp_path / 'data', [('train', text, True), ('val', val, True)], ByteTokenizer(), 'words')
    prepare(text)
    train(config)
    prepare(other)
    for again in (replace(config, init_from='resume', max_iters=16), replace(config, init_from='auto', eval_only=True)):
        with pytest.raises(UserError, match=r'was trained on other data than .*_sha256 is .*--new_data=True to go on'):
            train(again)
    resumed = train_module.read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume', '--new_data=True',
                                        '--max_iters=16'])
    assert train(resumed)['steps'] == 16 and 'with max_iters 8 -> 16, other data' in capsys.readouterr().out
    again = train_module.read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume', '--max_iters=24'])
    assert not again.new_data and train(again)['steps'] == 24  # the new data is the run's data now
    prepare(text)
    with pytest.raises(UserError, match='was trained on other data'):
        train(replace(again, max_iters=32))


@pytest.mark.parametrize('content', [
    b'', b'\n', b'step;tokens;loss\n1;2;3\n', b'a,b\n1,2\n', b'step,tokens,loss\n1.0,128,3\n', b'step,tokens\n,\n',
    b'\xff\xfes\x00t\x00', b'\x00' * 64, b'step,tokens,loss\n1,6.4e2,3\n',
    b'step,tokens,loss,val_loss\n1,128,3,good\n', b'step,token,loss\n1,128,3\n',
    b'step,tokens,loss\n2,256,3\n1,128,3\n', 'step,tokens\n¼,128\n'.encode(), b'step,tokens\n"1,128\n'])
def test_metrics_that_cannot_be_read_do_not_block_a_resume(tiny, content, capsys):
    train(tiny)
    path = Path(tiny.out_dir, 'metrics.csv')
    path.write_bytes(content)
    assert train(replace(tiny, init_from='resume', max_iters=12))['steps'] == 12
    assert [int(row['step']) for row in run_log.read_metrics(tiny.out_dir)] == [8, 9, 10, 11, 12]
    aside = Path(tiny.out_dir, 'metrics-old-1.csv')
    assert aside.read_bytes() == content and f'it is {aside} now' in capsys.readouterr().err


def test_a_validation_at_an_earlier_end_is_kept(tiny):
    """The run goes on from a step at which the longer run would not validate."""
    train(replace(tiny, max_iters=7, eval_interval=5))
    last = run_log.read_metrics(tiny.out_dir)[-1]
    train(replace(tiny, max_iters=12, eval_interval=5, init_from='resume'))
    rows = {row['step']: row for row in run_log.read_metrics(tiny.out_dir)}
    assert rows['7']['val_loss'] == last['val_loss'] and rows['7']['loss'] and len(rows) == 13


def test_metrics_that_a_spreadsheet_saved_are_kept(tiny):
    train(tiny)
    path = Path(tiny.out_dir, 'metrics.csv')
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes().replace(b'\n', b'\r\n'))
    train(replace(tiny, init_from='resume', max_iters=12))
    assert [int(row['step']) for row in run_log.read_metrics(tiny.out_dir)] == list(range(13))


def test_tokens_are_those_that_were_trained_on(tiny, tmp_path):
    """Also when the batch changes on the way: the duration in tokens and the schedule follow them."""
    config = replace(tiny, max_iters=TrainConfig.max_iters, train_tokens=2048, warmup_frac=0.0, eval_interval=1)
    train(config, At(config, 3))  # 4 steps of 128 tokens
    summary = train(replace(config, init_from='resume', batch_tokens=256))
    assert (summary['tokens'], summary['steps']) == (2048, 4 + (2048 - 512) // 256)
    rows = run_log.read_metrics(tiny.out_dir)
    tokens = [0, 128, 256, 384, *range(512, 2049, 256)]
    assert [int(row['tokens']) for row in rows] == tokens
    rates = [float(row['lr']) for row in rows[:-1]]
    assert rates == pytest.approx([1e-2 * (1 - n / 2048) for n in tokens[:-1]], rel=1e-4)
    assert state_tokens(tiny.out_dir) == 2048
    smaller = replace(config, init_from='resume', batch_tokens=64, train_tokens=2560)  # and back, with a later end
    assert (train(smaller)['tokens'], state_tokens(tiny.out_dir)) == (2560, 2560)
    with pytest.raises(UserError, match='past the end'):
        train(replace(smaller, train_tokens=1024))
    in_steps = replace(tiny, out_dir=str(tmp_path / 'steps'))
    train(in_steps, At(in_steps, 3))
    summary = train(replace(in_steps, init_from='resume', batch_tokens=256))
    assert (summary['steps'], summary['tokens']) == (8, 4 * 128 + 4 * 256)


def state_tokens(out_dir):
    return checkpoint.newest(out_dir)[1]['tokens']


# -----------------------------------------------------------------------------
# Work that could be lost


@pytest.mark.parametrize('changes, message', [
    (dict(block_size=1024, batch_tokens=1024), 'too few for block_size'), (dict(vocab_size=20), 'ids, the model'),
    (dict(dataset='nonesuch'), 'no dataset in'), (dict(wandb_log=True), 'wandb_log=True needs wandb'),
    (dict(batch_tokens=100), 'is not a multiple'),
    (dict(init_from='gpt2'), 'init_from=.gpt2. needs transformers'), (dict(), 'stopped'), (dict(init_std=1e30), 'nan')])
def test_an_old_run_stays_until_the_first_step_of_the_new_one(tiny, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    monkeypatch.setitem(sys.modules, 'transformers', None)
    write_dataset(tmp_path / 'data', [('train', 'ab' * 900, True), ('val', 'ab' * 300, True)], ByteTokenizer(), '')
    config = replace(tiny, dataset=str(tmp_path / 'data'))
    train(config)
    before = contents(tiny.out_dir)
    if message in ('stopped', 'nan'):
        stop = SimpleNamespace(received=signal.SIGTERM) if message == 'stopped' else None
        assert train(replace(config, overwrite=True, **changes), stop)['steps'] == 0
        assert f"the old run in '{tiny.out_dir}' is as it was" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=message):
            train(replace(config, overwrite=True, **changes))
    assert contents(tiny.out_dir) == before
    assert train(replace(config, overwrite=True, max_iters=4))['steps'] == 4
    assert names(checkpoint.find(tiny.out_dir)) == ['ckpt_000000004']


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def with_bad_val(folder, kind):
    """A dataset whose validation data cannot be used."""
    words = 'abc de ' * 200
    write_dataset(folder, [('train', words, True), ('val', 'abc' if kind == 'short' else words, True)],
                  CharTokenizer.of(words), 'words')
    if kind == 'id':
        ids = np.fromfile(folder / 'val.bin', np.uint16)
        ids[len(ids) // 2:] = 77
        ids.tofile(folder / 'val.bin')
    return str(folder)


@pytest.mark.parametrize('kind, message', [('short', 'too few for block_size=16'), ('id', 'holds id 77')])
@pytest.mark.parametrize('eval_interval', [0, 4])
def test_validation_data_is_checked_before_the_first_step(tiny, tmp_path, kind, message, eval_interval):
    config = replace(tiny, dataset=with_bad_val(tmp_path / 'data', kind), eval_interval=eval_interval)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not Path(tiny.out_dir, 'metrics.csv').exists()


@pytest.mark.parametrize('always', [True, False])
def test_a_validation_that_fails_loses_nothing(tiny, monkeypatch, always):
    def fails(*_):
        raise OSError('the disk is gone')
    monkeypatch.setattr(train_module, 'evaluate', fails)
    with pytest.raises(OSError):
        train(replace(tiny, eval_interval=0, always_save_checkpoint=always))
    assert checkpoint.newest(tiny.out_dir)[1]['step'] == 8


def test_the_validation_before_a_step_that_diverged_is_kept(tiny, monkeypatch):
    forward = GPT.forward

    def bad_after_validating(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        rows = run_log.read_metrics(tiny.out_dir)
        return logits, loss * math.nan if self.training and rows and rows[-1]['step'] == '3' else loss
    monkeypatch.setattr(GPT, 'forward', bad_after_validating)
    assert train(tiny)['diverged_at'] == 4
    last = run_log.read_metrics(tiny.out_dir)[-1]
    assert last['step'] == '4' and last['val_loss'] and not last['loss']


# -----------------------------------------------------------------------------
# The terminal


TERMINALS = ('head', 'full', 'closed', *(pytest.param(kind, marks=pytest.mark.slow)
                                         for kind in ('both closed', 'ascii')))


@pytest.mark.parametrize('kind', TERMINALS)
def test_no_terminal_ends_a_run(tiny, kind):
    config = replace(tiny, max_iters=300, sample_tokens=30)
    command = [sys.executable, str(ROOT / 'train.py'), *flags_of(config)]
    environment = dict(os.environ, PYTHONIOENCODING='ascii' if kind == 'ascii' else 'utf-8', PYTHONUNBUFFERED='1')
    shell = dict(head='{} | head -n 1', full='{} > /dev/full', closed='{} >&-', ascii='{} | cat')
    shell |= {'both closed': '{} >&- 2>&-'}
    line = 'set -o pipefail; ' + shell[kind].format(shlex.join(command))
    result = subprocess.run(['bash', '-c', line], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and 'Traceback' not in result.stderr, result.stderr
    assert json.loads(Path(tiny.out_dir, 'summary.json').read_text())['steps'] == 300
    lost = 'warning: the output can no longer be written ('
    assert result.stderr.count(lost) == (kind in ('head', 'full'))


def hang_up(config, before):
    """(exit code, stdout, stderr) of a run whose terminal hangs up. `before`: what it does about that at its start."""
    process = start(config, preexec_fn=lambda: signal.signal(signal.SIGHUP, before))
    wait_for_step(config, 3)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_terminal_that_hangs_up_stops_the_run_and_it_is_saved(tiny):
    code, out, err = hang_up(replace(tiny, max_iters=100_000, eval_interval=0), signal.SIG_DFL)
    assert code == 128 + signal.SIGHUP and 'saved in' in out and 'Traceback' not in err
    assert checkpoint.newest(tiny.out_dir)[1]['step'] > 3


def test_under_nohup_a_hang_up_is_ignored(tiny):
    code, out, _ = hang_up(replace(tiny, max_iters=2000, eval_interval=0), signal.SIG_IGN)
    assert code == 0 and 'SIGHUP' not in out


# -----------------------------------------------------------------------------
# Kills


def test_three_kills_change_nothing(tmp_path, capsys):
    config = stress_faults.StressConfig(kills=3, out_dir=str(tmp_path / 'stress'), steps_per_kill=60)
    assert stress_faults.stress(config) == []
    out = capsys.readouterr().out
    assert '3 kills (' in out and '180 steps' in out
    assert re.search(r'[1-3] while writing', out)  # the third kill waits for a write; the others may hit one


def test_the_comparison_sees_what_a_bad_resume_would_do(tiny, tmp_path):
    """The comparison reports duplicate rows, a missing row, and the rows, weights and moments of another seed."""
    train(tiny)
    other = replace(tiny, out_dir=str(tmp_path / 'other'))
    train(other)
    differences = stress_faults.differences
    assert differences(tiny.out_dir, other.out_dir) == []
    path = Path(other.out_dir, 'metrics.csv')
    lines = path.read_text().splitlines(keepends=True)
    for rows, words in ((lines + lines[-1:], '9 and 10 rows, 9 different steps'), (lines[:-1], '9 and 8 rows'),
                        (lines[:3] + lines[3:4] + lines[3:], '10 rows, 9 different steps')):
        path.write_text(''.join(rows))
        assert words in differences(tiny.out_dir, other.out_dir)[0]
    path.write_text(''.join(lines))
    train(replace(other, seed=5, overwrite=True))
    found = differences(tiny.out_dir, other.out_dir)
    assert 'metrics.csv' in found[0] and any('exp_avg' in name for name in found)
    assert any(': model.' in name for name in found)
    state = json.loads((checkpoint.find(tiny.out_dir)[0] / 'state.json').read_text())
    assert state['step'] == 8
