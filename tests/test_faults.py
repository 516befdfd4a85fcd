"""Tests of faults during a run: signals, a second process, full disks, data that shrinks, kills."""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import stress_faults
import torch

from model import GPT
from nanop import checkpoint, dataset, run_log
from nanop.errors import UserError
from nanop.files import lock
from nanop.run_log import StopSignals
from train import train

ROOT = Path(__file__).resolve().parents[1]


def start(config, **options):
    """Start train.py in a subprocess. Returns the process."""
    return subprocess.Popen([sys.executable, ROOT / 'train.py', *(f'--{key}={value}' for key, value in
                             asdict(config).items() if value != '')], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


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
        monkeypatch.setattr(run_log, 'SAME_S', 0.0)
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


def test_steps_with_a_large_gradient_are_skipped_when_asked(tiny, capsys):
    """Skipping is off by default. A skipped step changes nothing, and the run continues."""
    norms = [float(row['grad_norm']) for row in rows_with_norm(tiny)]
    limit = sorted(norms)[-2] * 1.0001  # only the largest norm of the first run is above
    skipping = replace(tiny, overwrite=True, skip_grad_norm=limit)
    summary = train(skipping)
    worst = norms.index(max(norms))
    after = [float(row['grad_norm']) for row in run_log.read_metrics(tiny.out_dir) if row['grad_norm']]
    assert after[:worst + 1] == norms[:worst + 1] and summary['steps'] == 8 and summary['skipped_steps'] >= 1
    assert f'step {worst} skipped: gradient norm {max(norms):.4g} is above skip_grad_norm=' in capsys.readouterr().out
    summary = train(replace(skipping, skip_grad_norm=1e-9))
    assert summary['skipped_steps'] == 8
    losses = {row['val_loss'] for row in run_log.read_metrics(tiny.out_dir) if row['val_loss']}
    assert len(losses) == 1  # all steps were skipped, so the weights never changed
    assert train(replace(tiny, overwrite=True))['skipped_steps'] == 0


def rows_with_norm(config):
    train(config)
    return [row for row in run_log.read_metrics(config.out_dir) if row['grad_norm']]


def test_a_gradient_that_is_not_finite_still_stops_the_run(tiny, monkeypatch):
    forward = GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda self, *args: (None, forward(self, *args)[1] * math.nan
                                                             if self.training else forward(self, *args)[1]))
    assert train(replace(tiny, skip_grad_norm=1.0))['diverged_at'] == 0


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
