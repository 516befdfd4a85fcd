"""Tests of sweep.py and its modules in tools/: stacked runs, points, queue and workers, searches, the report."""
import collections
import contextlib
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
import torch

from configurator import configure
from model import PARAMETERIZATIONS, Block
from nanop.dataset import open_dataset
from nanop.errors import UserError
from nanop.layers import causal_attention
from nanop.machine import Machine
from nanop.terminal import STOP_SIGNALS
from sweep import TUNED, SweepConfig, main, read_sweep
from tools import sweep_queue
from tools.stack import Stack, stack_size, train_stack, why_not_stack
from tools.sweep_files import read_facts, read_trials, write_trials
from tools.sweep_points import TYPES, Sweep, digest, random_settings
from tools.sweep_queue import data_facts, enqueue, open_datasets, open_study, trials_of
from tools.sweep_report import SweepReport, compare, curve_of, optimum
from train import TrainConfig, build_model, num_steps, train

ROOT = Path(__file__).resolve().parents[1]
COMPLETE, RUNNING, WAITING = (getattr(optuna.trial.TrialState, name) for name in ('COMPLETE', 'RUNNING', 'WAITING'))


@pytest.fixture
def tiny(data_dir):
    """Keys of a run with 2 layers of width 32 that takes a tenth of a second."""
    return dict(dataset=data_dir, block_size=16, batch_tokens=128, batch_size=8, max_iters=8, n_layer=2, n_embd=32,
                head_dim=16, base_n_layer=2, base_n_embd=32, base_head_dim=16, init_std=0.1, eval_tokens=512,
                compile=False, dtype='float32', device='cpu')


@pytest.fixture
def sweep_main(tmp_path, tiny, monkeypatch, capfd):
    """A function that runs sweep.py's main() here with one worker; it returns (exit code or UserError, output)."""
    def call(*flags, out_dir=tmp_path / 'sweep', plots=False, **keys):
        texts = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
                 for key, value in {**tiny, 'workers': 1, 'out_dir': out_dir, **keys}.items() if value is not None]
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['sweep.py', *texts, *flags])
            patch.setattr(os, 'sched_getaffinity', lambda pid: {0}, raising=False)  # one thread
            if not plots:  # plots take longer than the runs
                patch.setattr(SweepReport, 'plot', lambda *args: None)
                patch.setattr(SweepReport, 'plot_shapes', lambda *args: None)
            try:
                code = main()
            except UserError as error:
                code = error
        return code, capfd.readouterr().out
    return call


def in_threads(count, call):
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rows_in(out_dir):
    return read_trials(Path(out_dir) / 'trials.csv', TYPES)


# -----------------------------------------------------------------------------
# Stacked runs


STACKED = [dict(), dict(tie_weights=True), dict(bias=False), dict(density=0.5, parameterization='completep_supar'),
           dict(n_kv_head=1, pos='rope', norm='rmsnorm', activation='swiglu'),
           dict(weight_decay_mode='independent', base_train_tokens=3840), dict(pos='alibi', optimizer='sgd')]


@pytest.mark.parametrize('changes', STACKED)
def test_stacked_runs_are_single_runs(tiny, changes, steps=15):
    """Stacked runs reach the losses of the same runs alone. A run that diverges does not disturb the others."""
    one = TrainConfig(**{**tiny, 'out_dir': '', 'max_iters': steps, 'n_layer': 3, 'base_n_embd': 16, 'batch_size': 4,
                         'learning_rate': 1e-2, 'base_head_dim': 8, 'eval_interval': steps, **changes})
    configs = [
        one,
        replace(one, learning_rate=1e30, grad_clip=0.0),
        replace(one, seed=5, learning_rate=3e-2, weight_decay=0.3, init_std=0.2, mask_seed=3),
        replace(one, parameterization='sp', attn_mult=3.0, output_mult=0.5, input_mult=4.0, grad_clip=0.3),
        replace(one, parameterization='depth_mup', schedule='cosine', warmup_frac=0.3, beta1=0.8, beta2=0.9, eps=1e-3),
    ]
    stacked = train_stack(configs)
    for config, summary in zip(configs, stacked):
        alone = train(config)
        for key in ('steps', 'tokens', 'params', 'weight_decay', 'diverged_at', 'config'):
            assert summary[key] == alone[key], key
        assert summary['val_loss'] == pytest.approx(alone['val_loss'], abs=1e-4)
        if alone['diverged_at'] is None:
            assert summary['last_train_loss'] == pytest.approx(alone['last_train_loss'], abs=1e-4)
    assert stacked[1]['diverged_at'] is not None and stacked[1]['val_loss'] == math.inf
    assert len({round(summary['val_loss'], 4) for summary in stacked}) == 5  # the runs differ


@pytest.mark.parametrize('changes', STACKED)
def test_stacked_runs_multiply_in_bf16_and_name_their_attention(tiny, changes, monkeypatch):
    """With a bias, torch's vmap and autocast together leave float32, whose attention has no backward on CUDA."""
    seen, backends = [], torch.backends.cuda

    def attention(q, k, v, scale, dropout, alibi):
        seen.extend(x.dtype for x in (q, k, v))
        assert backends.flash_sdp_enabled() and backends.math_sdp_enabled()
        assert not backends.mem_efficient_sdp_enabled() and not backends.cudnn_sdp_enabled()
        return causal_attention(*(x.float() for x in (q, k, v)), scale, dropout, alibi).to(q.dtype)
    monkeypatch.setattr('model.causal_attention', attention)  # ours for bf16 on a CPU has no batched form, nor the loss
    monkeypatch.setattr('nanop.layers.in_bf16_on_cpu', lambda x: False)
    c = TrainConfig(**{**tiny, 'base_n_embd': 16, **changes})
    data = open_dataset(c.dataset)
    stack, batch = Stack([build_model(c, data) for _ in range(3)]), data.batch('train', [0, 8], 16, torch.device('cpu'))
    losses = stack.losses([batch] * 3, Machine(torch.device('cpu'), torch.bfloat16))
    losses.sum().backward()
    assert set(seen) == {torch.bfloat16} and losses.isfinite().all() and backends.cudnn_sdp_enabled()
    assert all(p.grad.any() for p in stack.params.values())


@pytest.mark.slow
@pytest.mark.parametrize('changes', STACKED)
def test_long_stacked_runs_are_single_runs(tiny, changes):
    test_stacked_runs_are_single_runs(tiny, changes, steps=50)


@pytest.mark.parametrize('changes, reason', [
    (dict(), None), (dict(dropout=0.1), 'dropout'), (dict(dtype='bfloat16'), 'bfloat16 on a CPU'),
    (dict(qk_norm=True), 'qk_norm removes the factor'), (dict(optimizer='muon'), 'muon takes'),
    (dict(optimizer='lion'), 'lion takes'),
    (dict(skip_grad_norm=5.0), 'a step of one run only')])
def test_what_cannot_be_stacked_says_why(tiny, changes, reason):
    why = why_not_stack(TrainConfig(**{**tiny, **changes}))
    assert why is None if reason is None else reason in why


def test_sweep_in_stacks_equals_one_by_one(sweep_main, tmp_path):
    keys = dict(learning_rate=[0.001, 0.01, 0.1], parameterization=['sp', 'completep'], n_layer=[2, 4])
    for size in (1, 4):
        assert sweep_main(out_dir=tmp_path / str(size), stack=size, **keys)[0] == 0
    alone, stacked = rows_in(tmp_path / '1'), rows_in(tmp_path / '4')
    assert len(alone) == len(stacked) == 12
    assert max(row['stack'] or 1 for row in stacked) > 1 == max(row['stack'] or 1 for row in alone)
    for one, other in zip(alone, stacked):
        assert one['val_loss'] == pytest.approx(other['val_loss'], abs=1e-4)
    out = sweep_main(out_dir=tmp_path / 'dropout', stack=4, dropout=0.1, learning_rate=[0.001, 0.01])[1]
    assert 'runs are not stacked: dropout' in out
    assert {row['stack'] for row in rows_in(tmp_path / 'dropout')} == {None}


# -----------------------------------------------------------------------------
# Points


def test_equal_points_are_one_run(tiny):
    """Equal runs have equal losses: all parameterizations at the base shape, and sp and mup at any depth."""
    sweep = Sweep(SweepConfig(), {**tiny, 'parameterization': ['sp', 'mup', 'depth_mup', 'completep'],
                                  'n_layer': [2, 4], 'seed': [1, 2]})
    assert len(sweep.points) == 16 and len({digest(config) for config in sweep.configs}) == 2 * (1 + 3)
    by_run = collections.defaultdict(list)
    for config in sweep.configs:
        by_run[digest(config)].append(config)
    losses = {run: {train(config)['val_loss'] for config in configs} for run, configs in by_run.items()
              if configs[0].seed == 1}
    assert all(len(same) == 1 for same in losses.values())
    assert len(set.union(*losses.values())) == len(losses)


def test_shapes_go_together(tiny):
    sweep = Sweep(SweepConfig(shapes=[dict(n_layer=2, density=1), dict(n_layer=4, density=0.5)]),
                {**tiny, 'parameterization': ['sp', 'supar']})
    assert [(model['parameterization'], model['n_layer'], model['density']) for model in sweep.models] == \
        [('sp', 2, 1.0), ('sp', 4, 0.5), ('supar', 2, 1.0), ('supar', 4, 0.5)]
    assert {type(model['density']) for model in sweep.models} == {float}


def test_a_run_is_known_by_all_that_changes_it(tiny):
    config = TrainConfig(**tiny)
    for changes in (dict(seed=3), dict(eps=1e-9), dict(beta1=0.8), dict(dtype='bfloat16'), dict(n_layer=3),
                    dict(schedule='cosine'), dict(attn_mult=2.0), dict(eval_tokens=256), dict(density=0.5)):
        assert digest(replace(config, **changes)) != digest(config), changes
    for same in (dict(out_dir='elsewhere', keep_checkpoints=9), dict(mask_seed=4),
                 dict(parameterization='gpt2', base_n_layer=2)):
        assert (digest(replace(config, **same)) == digest(config)) == ('parameterization' not in same), same


def test_a_key_of_a_shape_variant_or_axis_wins_over_what_it_replaces(tiny, tmp_path):
    """tiny has max_iters=8: 8 steps of 128 tokens."""
    def steps(overrides=tiny, **keys):
        return [num_steps(config, 0) for config in Sweep(SweepConfig(**keys), overrides).configs]
    assert steps(shapes=[dict(train_tokens=1280), dict(train_tokens=2560)]) == [10, 20]
    assert steps(shapes=[dict(train_tokens=1280, batch_tokens=128), dict(train_tokens=2560, batch_tokens=640)],
                 variants=[dict(), dict(norm='rmsnorm')]) == [10, 4, 10, 4]
    assert steps(variants=[dict(), dict(train_tokens=1280), dict(max_iters=9)]) == [8, 10, 9]
    decays = Sweep(SweepConfig(variants=[dict(), dict(weight_decay=0.2)]), {**tiny, 'tau_ema': 0.5}).configs
    assert [(config.weight_decay, config.tau_ema) for config in decays] == [(0.0, 0.5), (0.2, 0.0)]
    (tmp_path / 'base.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in tiny.items()))
    _, overrides = read_sweep([str(tmp_path / 'base.py'), '--train_tokens=1280,2560'])
    assert steps(overrides) == [10, 20]
    with pytest.raises(UserError, match='max_iters=9 is not allowed'):
        steps(shapes=[dict(train_tokens=1280, max_iters=9)])


def test_random_points_are_log_uniform_and_the_first_ones_stay():
    axes = dict(learning_rate=[2**-12, 2**-4], batch_tokens=[256, 4352], schedule=['linear', 'cosine'],
                final_lr_frac=[0., 1.])
    points = random_settings(axes, 2000, seed=1)
    assert points[:10] == random_settings(axes, 10, seed=1) != random_settings(axes, 10, seed=2)
    logs = np.array([math.log2(point['learning_rate']) for point in points])
    assert logs.min() > -12.01 and logs.max() < -3.99
    counts = np.histogram(logs, bins=8, range=(-12, -4))[0]
    assert counts.min() > 190 and counts.max() < 315  # 250 +- 15 each
    assert {point['batch_tokens'] for point in points} == {256 * k for k in range(1, 18)}  # multiples of gcd 256
    assert {point['schedule'] for point in points} == {'linear', 'cosine'}
    assert 0.45 < np.mean([point['final_lr_frac'] for point in points]) < 0.55


@pytest.mark.parametrize('keys, words', [
    (dict(n_embd=[32, 40]), 'n_embd=40 is not allowed: use a multiple of head_dim=16 (in n_layer=2, n_embd=40'),
    (dict(parameterization=['sp', 'mu']), "parameterization='mu' is not allowed"),
    (dict(batch_tokens=[128, 130]), 'batch_tokens=130 is not a multiple of block_size=16'),
    (dict(out_dir=['a', 'b']), 'out_dir must be str'),
    (dict(dtype=['float32', 'float32']), 'holds a value twice'),
    (dict(init_from=['scratch', 'gpt2']), 'init_from cannot be swept'),
    (dict(learning_rate=[]), 'learning_rate is an empty list'),
    (dict(shapes=[dict(n_layers=2)]), "shapes: unknown key 'n_layers'"),
    (dict(shapes=[2, 4]), 'use a list of dicts of the same keys'),
    (dict(shapes=[dict(n_layer=2), dict(n_embd=32)]), 'use a list of dicts of the same keys'),
    (dict(shapes=[dict(n_layer=2)], n_layer=[2, 4]), 'n_layer cannot be in shapes: it has a list of its own'),
    (dict(shapes=[dict(seed=2)]), 'seed cannot be in shapes'),
    (dict(lerning_rate=[0.1]), "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    (dict(search='best'), "search='best' is not allowed: use one of grid, random, tpe"),
    (dict(search='tpe', n_layer=[2, 4], learning_rate=[0.1, 0.2]), 'tunes one model, this is 2'),
    (dict(search='random'), 'has nothing to search'),
    (dict(n_layer=[2, 'four']), 'n_layer must be int'),
    (dict(trials=0), 'trials=0 is not allowed'),
    (dict(storage='sqlite:////no/such/folder/a.db'), "storage 'sqlite:////no/such/folder/a.db' cannot be used"),
    (dict(storage='nonsense'), "storage 'nonsense' cannot be used"),
])
def test_mistakes_are_one_line_and_change_nothing(tiny, tmp_path, keys, words):
    file = tmp_path / 'sweep_mistake.py'
    file.write_text('\n'.join(f'{key} = {value!r}' for key, value in {**tiny, **keys}.items()))
    with pytest.raises(UserError) as error:
        config, overrides = read_sweep([str(file), f'--out_dir={tmp_path}'][:1 + ('out_dir' not in keys)])
        Sweep(config, overrides)
        open_study(config)
    assert words in str(error.value) and '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_mistake_on_the_command_line_ends_with_2(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'sweep.py', f'--out_dir={tmp_path}/out', '--n_embd=32,40',
                           '--head_dim=16'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and len(done.stderr.splitlines()) == 1


# -----------------------------------------------------------------------------
# The queue


def test_a_sweep_runs_once_and_grows(sweep_main, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(sweep_queue, 'train', lambda config: trained.append(config) or train(config))
    keys = dict(parameterization=['sp', 'completep'], n_layer=[2, 4], learning_rate=[0.001, 0.01, 0.1, 1e30], seed=1)
    code, out = sweep_main(**keys, grad_clip=0.0, plots=True)
    assert code == 0 and len(trained) == 12 and '4 model(s) x 4 = 16 points, 12 different runs, 12 to do' in out
    rows = rows_in(tmp_path / 'sweep')
    assert len(rows) == 16
    for row in rows:
        assert (row['val_loss'] == math.inf) == (row['learning_rate'] == 1e30) == (row['diverged_at'] is not None)
        config = TrainConfig(**{**{key: value for key, value in trained[0].__dict__.items()},
                                **{key: row[key] for key in ('n_layer', 'parameterization', 'learning_rate')}})
        assert train(config)['val_loss'] == row['val_loss']
    assert '4 diverged' in out and '| sp |' in out and '| completep |' in out
    assert out.split('# sweep')[1].strip() in (tmp_path / 'sweep/report.md').read_text()
    assert (tmp_path / 'sweep/learning_rate.png').read_bytes().startswith(b'\x89PNG')

    trained.clear()
    assert sweep_main(**keys, grad_clip=0.0)[0] == 0 and trained == []
    assert rows_in(tmp_path / 'sweep') == rows
    assert len(trials_of(open_study(SweepConfig(out_dir=str(tmp_path / 'sweep'))))) == 12
    assert sweep_main(**{**keys, 'learning_rate': [0.001, 0.03], 'seed': [1, 2]}, grad_clip=0.0)[0] == 0
    assert sorted((config.seed, config.learning_rate) for config in trained) == \
        3 * [(1, 0.03)] + 3 * [(2, 0.001)] + 3 * [(2, 0.03)]
    # earlier runs stay in the report: 12 of the first points are ones that this sweep does not name
    assert len(rows_in(tmp_path / 'sweep')) == 16 + 12
    assert '28 points, 21 runs' in (tmp_path / 'sweep/report.md').read_text()

    trained.clear()
    (tmp_path / 'sweep/study.db').unlink()  # trials.csv and sweep.json are enough to continue
    assert sweep_main(**keys, grad_clip=0.0)[0] == 0 and trained == []


def test_a_study_of_another_sweep_is_left_alone(sweep_main, tmp_path):
    keys = dict(learning_rate=[0.001, 0.01])
    assert sweep_main(**keys)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / 'sweep').iterdir() if path.suffix != '.db'}
    for other, words in ((dict(max_iters=9), 'max_iters is 8 there and is 9 here'),
                         (dict(beta1=0.8), 'beta1 is 0.9 there and is 0.8 here'),
                         (dict(init_std=[0.1, 0.2]), 'init_std is 0.1 there and varies here'),
                         (dict(eps=[1e-8, 1e-7]), 'eps is 1e-08 there and varies here'),  # a default value counts, too
                         (dict(search='tpe'), "search is 'points' there and is 'tpe' here")):
        error, _ = sweep_main(**{**keys, **other})
        assert isinstance(error, UserError) and words in str(error) and 'of another sweep' in str(error)
    (tmp_path / 'sweep/study.db').unlink()
    error, _ = sweep_main(**keys, max_iters=9)
    assert isinstance(error, UserError) and "trials.csv' is of another" in str(error)
    assert 'max_iters is 8 there and is 9 here' in str(error)
    assert before == {path: path.read_bytes() for path in (tmp_path / 'sweep').iterdir() if path.suffix != '.db'}


@pytest.fixture
def named_data(data_dir, tmp_path):
    """A copy of the dataset, and a function that changes the hash in its meta.json: None takes it away."""
    folder = Path(shutil.copytree(data_dir, tmp_path / 'named'))

    def set_hash(text):
        meta = json.loads((folder / 'meta.json').read_text())
        meta = {key: value for key, value in meta.items() if not key.endswith('sha256')}
        (folder / 'meta.json').write_text(json.dumps(meta | (dict(data_sha256=text) if text else {})))
    set_hash('a' * 64)
    return str(folder), set_hash


def test_a_study_knows_its_data_by_their_content(sweep_main, named_data, tmp_path):
    name, set_hash = named_data
    keys, out_dir = dict(learning_rate=[0.001, 0.01]), tmp_path / 'sweep'
    assert sweep_main(**keys, dataset=name)[0] == 0
    facts = json.loads((out_dir / 'sweep.json').read_text())
    assert facts['data'][name]['data_sha256'] == 'a' * 64 and facts['data'][name]['train_tokens'] > 9000
    set_hash('b' * 64)
    for _ in range(2):  # the study knows, and so does sweep.json
        error, _ = sweep_main(**keys, dataset=name, seed=2)
        assert isinstance(error, UserError) and f"has trained on other data called '{name}'" in str(error)
        assert 'data_sha256 is aaaaaaaaaaaa.., not bbbbbbbbbbbb..' in str(error) and '\n' not in str(error)
        (out_dir / 'study.db').unlink(missing_ok=True)
    assert len(rows_in(out_dir)) == 2
    (out_dir / 'study.db').unlink(missing_ok=True)
    for data in ({}, dict(data={name: {}})):  # an old sweep.json goes on, and stays unknown
        (out_dir / 'sweep.json').write_text(json.dumps({key: facts[key] for key in facts if key != 'data'} | data))
        code, out = sweep_main(**keys, dataset=name)
        assert code == 0 and f"does not say what was in the data '{name}'" in out and '0 to do' in out
        assert json.loads((out_dir / 'sweep.json').read_text())['data'] == {name: {}}
        (out_dir / 'study.db').unlink()


def test_datasets_may_differ_between_points(sweep_main, named_data, data_dir, tmp_path):
    name, set_hash = named_data
    keys = dict(learning_rate=0.01)
    assert sweep_main(**keys, dataset=data_dir)[0] == 0
    (tmp_path / 'data.py').write_text(f'variants = [dict(dataset={data_dir!r}), dict(dataset={name!r})]')
    for _ in range(2):
        assert sweep_main(str(tmp_path / 'data.py'), **keys, dataset=None, out_dir=tmp_path / 'two')[0] == 0
    set_hash('b' * 64)
    error, _ = sweep_main(str(tmp_path / 'data.py'), **keys, dataset=None, out_dir=tmp_path / 'two')
    assert f"other data called '{name}'" in str(error)


def test_a_worker_with_other_data_refuses_before_it_trains(tiny, named_data, tmp_path):
    """As on a second machine, whose folder of that name holds something else."""
    name, set_hash = named_data
    config, overrides = SweepConfig(out_dir=str(tmp_path)), {**tiny, 'dataset': name}
    sweep = Sweep(config, overrides)
    sweep.facts['data'] = data_facts(open_datasets(sweep.configs))
    enqueue(open_study(config), sweep, tmp_path)
    set_hash('b' * 64)
    with pytest.raises(UserError, match='has trained on other data'):
        sweep_queue.work(config, overrides, 'cpu')
    assert len(trials_of(open_study(config), WAITING)) == len(trials_of(open_study(config))) == 1
    set_hash('a' * 64)
    sweep_queue.work(config, overrides, 'cpu')
    assert len(trials_of(open_study(config), COMPLETE)) == 1


@pytest.mark.parametrize('name', ['a?b', 'a#b', 'a%20b', 'a b', "it's", 'größe', 'a{x}b', 'a&mode=ro', 'a:b@c'])
def test_every_folder_name_keeps_its_own_study(tmp_path, name):
    config = SweepConfig(out_dir=str(tmp_path / name / 'sweep'))
    Path(config.out_dir).mkdir(parents=True)
    open_study(config).set_user_attr('here', name)
    assert [path.relative_to(tmp_path / name) for path in tmp_path.rglob('*.db')] == [Path('sweep/study.db')]
    assert open_study(config).user_attrs == dict(here=name)


def damaged(text):
    """(what happened to a trials.csv, its bytes, words of the error or None if it can be read for certain)"""
    head, first, *rest = text.splitlines()
    keys = head.split(',')
    rate, loss = keys.index('learning_rate'), keys.index('val_loss')

    def with_cell(at, cell):
        return '\n'.join([head, ','.join([*first.split(',')[:at], cell, *first.split(',')[at + 1:]]), *rest, ''])
    yield 'a byte-order mark', '\ufeff' + text, None
    yield 'line ends of Unix', text.replace('\r\n', '\n'), None
    yield 'an empty line', text + '\n\n', None
    yield 'a column more', '\n'.join(line + ',note' for line in text.splitlines()) + '\n', None
    yield 'another order', '\n'.join(','.join(line.split(',')[::-1]) for line in text.splitlines()) + '\n', None
    yield 'upper case and decimals', with_cell(keys.index('n_layer'), '2.0').replace('True', 'TRUE'), None
    yield 'the last end of line cut off', text.rstrip(), None
    yield 'cut off in the last row', text.rstrip()[:-30], 'line 3: this last row was cut off and is left out'
    yield 'semicolons', text.replace(',', ';').replace('.', ','), "line 1: no column density, learning_rate"
    yield 'a decimal comma', with_cell(rate, '"0,001"'), "line 2: learning_rate must be float, got '0,001'"
    yield 'a date', with_cell(loss, '2-Jan'), "line 2: val_loss must be float, got '2-Jan'"
    yield 'rounded integers', with_cell(keys.index('tokens'), '1.0E+03'), "line 2: tokens must be int, got '1.0E+03'"
    yield 'an empty cell', with_cell(loss, ''), "line 2: val_loss must be float, got ''"
    yield 'nan', with_cell(loss, 'nan'), "line 2: val_loss must be float, got 'nan'"
    for key, cell in dict(val_loss='-inf', tokens='-1', seconds='-0.5', last_train_loss='-3').items():
        yield f'{key} below 0', with_cell(keys.index(key), cell), f"line 2: {key} must not be below 0, got '{cell}'"
    yield 'two losses of a point', text + with_cell(loss, '9.5').splitlines()[1] + '\n', 'line 4: val_loss is 9.5, but'
    yield 'a row cut short', '\n'.join([head, first[:40], *rest, '']), 'line 2: it has'
    yield 'a quote', with_cell(rate, '"0.001'), 'line 3: '
    yield 'a column missing', '\n'.join(line.split(',', 1)[1] for line in text.splitlines()), 'no column n_layer'
    yield 'a column twice', '\n'.join(line + ',' + line for line in text.splitlines()), 'the same column twice'
    yield 'latin-1', text.replace('cpu', 'cpü').encode('latin-1'), 'line 2: it is not UTF-8 text'
    yield 'UTF-16', text.encode('utf-16'), 'line 1: it is not UTF-8 text'


def test_a_trials_csv_that_a_spreadsheet_touched(sweep_main, tiny, tmp_path, capfd):
    """What is certain is read, the rest is one line that names file and line; the file is left as it is."""
    needed = 'density', 'learning_rate', 'n_layer', 'parameterization'
    keys = dict(learning_rate=0.01, bias=[True, False])
    assert sweep_main(**keys)[0] == 0
    file = tmp_path / 'sweep/trials.csv'
    whole, rows = file.read_bytes().decode(), rows_in(tmp_path / 'sweep')
    for what, content, words in damaged(whole):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            found, error = read_trials(file, TYPES, needed), None
        except UserError as refused:
            found, error = None, str(refused)
        if words is None or 'left out' in words:
            expected = rows if words is None else rows[:1]
            assert [{key: row[key] for key in rows[0]} for row in found or []] == expected, (what, error)
            assert (words or '') in capfd.readouterr().out, what
        else:
            assert error and words in error and str(file) in error and '\n' not in error, (what, error)
    facts, study = tmp_path / 'sweep/sweep.json', tmp_path / 'sweep/study.db'
    for content in (b'', b'{"base": {', b'[]', b'{"base": 1}', b'\xff\xfe{', b'null'):
        facts.write_bytes(content)
        with pytest.raises(UserError, match="^'.*sweep.json', which describes the trials.csv beside it, .*$"):
            read_facts(facts)
    study.unlink()
    file.write_bytes(('\ufeff' + whole.replace('completep', 'spp')).encode())
    error, _ = sweep_main(**keys)
    assert isinstance(error, UserError) and 'sweep.json' in str(error)
    facts.write_text(json.dumps(Sweep(SweepConfig(), {**tiny, **keys}).facts))
    error, _ = sweep_main(**keys)
    assert isinstance(error, UserError) and str(file) in str(error) and "parameterization='spp' is not" in str(error)
    file.write_bytes(('\ufeff' + whole).encode())
    assert '0 to do' in sweep_main(**keys)[1]


def test_a_storage_that_is_locked_is_one_line(sweep_main, tmp_path, monkeypatch):
    keys, locks = dict(learning_rate=[0.001, 0.01]), []

    def train_and_lock(config):
        locks.append(sqlite3.connect(tmp_path / 'sweep/study.db'))
        locks[0].execute('BEGIN EXCLUSIVE')
        return train(config)
    monkeypatch.setattr(sweep_queue, 'LOCK_S', 1)
    monkeypatch.setattr(sweep_queue, 'train', train_and_lock)
    error, _ = sweep_main(**keys)
    assert isinstance(error, UserError) and 'the storage failed' in str(error) and 'locked' in str(error)
    error, _ = sweep_main(**keys)
    assert isinstance(error, UserError) and 'locked' in str(error) and '\n' not in str(error)
    locks[0].close()


@pytest.mark.parametrize('threads, cores, workers, places', [
    (1, 2, 1, [1]), (8, 2, 1, [2]), (8, 4, 2, [2, 2]), (1, 4, 2, [1, 1]), (8, 4, 3, [1, 1, 1]), (8, 2, 0, [1, 1])])
def test_workers_share_the_cores_and_heed_omp_num_threads(monkeypatch, threads, cores, workers, places):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(cores), raising=False)
    assert sweep_queue.worker_places(workers, 'cpu') == [('cpu', count) for count in places]


@pytest.mark.parametrize('number', STOP_SIGNALS)
def test_every_stop_signal_keeps_trials_and_report(sweep_main, tmp_path, monkeypatch, number):
    before, out_dir = signal.getsignal(number), tmp_path / 'sweep'

    def stop_at_the_last(config):
        if config.learning_rate == 0.1:
            assert len(rows_in(out_dir)) == 1  # trials.csv grows while the sweep runs
            os.kill(os.getpid(), number)
        return train(config)
    monkeypatch.setattr(sweep_queue, 'KEEP_S', 0)
    monkeypatch.setattr(sweep_queue, 'train', stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        sweep_main(learning_rate=[0.001, 0.1])
    assert signal.getsignal(number) == before
    assert '1 points, 1 runs' in (out_dir / 'report.md').read_text() and len(rows_in(out_dir)) == 1
    assert trials_of(open_study(SweepConfig(out_dir=str(out_dir))), RUNNING, WAITING) == []


@pytest.mark.slow
def test_a_stop_ends_the_workers_and_writes_the_report(tiny, tmp_path):
    flags = [f'--{key}={value}' for key, value in {**tiny, 'max_iters': 100, 'workers': 2}.items()]
    rates, out_dir = ','.join(str(0.001 * k) for k in range(1, 41)), tmp_path / 'sweep'
    script = 'import tools.sweep_queue as q, sweep; q.KEEP_S = 0; sweep.exit_on_user_error(sweep.main, "stopped")'
    process = subprocess.Popen(
        [sys.executable, '-c', script, *flags, f'--learning_rate={rates}', f'--out_dir={out_dir}'], text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.time() + 90
    while not (out_dir / 'trials.csv').exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130 and 'Traceback' not in err and 'runs are missing' in err, err
    finished = trials_of(open_study(SweepConfig(out_dir=str(out_dir))), COMPLETE)
    assert trials_of(open_study(SweepConfig(out_dir=str(out_dir))), RUNNING) == []
    assert 1 <= len(finished) == len(rows_in(out_dir)) < 40
    assert f'{len(finished)} points' in (out_dir / 'report.md').read_text()


def test_a_run_that_fails_is_said_and_run_again(sweep_main, tmp_path, monkeypatch, capfd):
    def fail_at_one_rate(config):
        if config.learning_rate == 0.01:
            raise RuntimeError('CUDA out of memory.\nTried to allocate')
        return train(config)
    monkeypatch.setattr(sweep_queue, 'train', fail_at_one_rate)
    keys = dict(learning_rate=[0.001, 0.01, 0.1])
    assert sweep_main(**keys)[0] == 1
    assert [row['learning_rate'] for row in rows_in(tmp_path / 'sweep')] == [0.001, 0.1]
    monkeypatch.setattr(sweep_queue, 'train', train)
    assert sweep_main(**keys)[0] == 0 and len(rows_in(tmp_path / 'sweep')) == 3


def test_two_workers_never_take_the_same_trial(tiny, tmp_path):
    """Without lock_before_reading, SQLite gives some trials to two workers."""
    config = SweepConfig(out_dir=str(tmp_path))
    sweep = Sweep(config, {**tiny, 'learning_rate': [0.001 * k for k in range(1, 61)]})
    enqueue(open_study(config), sweep, config.out_dir)
    taken, start = collections.Counter(), threading.Barrier(4)

    def pop():
        study = open_study(config)
        start.wait()
        while trials_of(study, WAITING):
            with contextlib.ExitStack() as beats:
                sweep_queue.take(study, sweep, trials := [], beats)
                taken.update(trial.number for trial in trials)
                for trial in trials:
                    study.tell(trial, 1.0)
    in_threads(4, pop)
    assert len(taken) == 60 and set(taken.values()) == {1}


def test_the_same_point_queued_twice_runs_once(tiny, tmp_path):
    """This happens when two machines start the same sweep at the same moment."""
    config = SweepConfig(out_dir=str(tmp_path))
    sweep = Sweep(config, {**tiny, 'learning_rate': [0.001, 0.01]})
    study = open_study(config)
    enqueue(study, sweep, config.out_dir)
    for trial in trials_of(study):
        study.add_trial(optuna.create_trial(state=WAITING, params=trial.params,
                                            distributions=trial.distributions, user_attrs=trial.user_attrs))
    sweep_queue.work(config, {**tiny, 'learning_rate': [0.001, 0.01]}, 'cpu', 0)
    assert [trial.number for trial in trials_of(study, COMPLETE)] == [0, 1]


def test_a_worker_that_died_before_its_first_heartbeat_is_noticed(sweep_main, tiny, tmp_path):
    """So is a worker that died later. The trials of both run again, once."""
    rates = [0.001, 0.01, 0.1]
    config = SweepConfig(out_dir=str(tmp_path / 'sweep'), heartbeat_s=1)
    (tmp_path / 'sweep').mkdir()
    study = open_study(config)
    enqueue(study, Sweep(config, {**tiny, 'learning_rate': rates}), config.out_dir)
    assert study.ask().number == 0
    later = study.ask()
    study._storage.record_heartbeat(later._trial_id)
    later.set_user_attr('worker', 'host:1')
    assert sweep_main(learning_rate=rates, heartbeat_s=1)[0] == 0
    assert [row['learning_rate'] for row in rows_in(tmp_path / 'sweep')] == rates
    finished = trials_of(study, COMPLETE)
    assert sorted(trial.params['learning_rate'] for trial in finished) == rates
    assert sorted(trial.system_attrs.get('failed_trial', -1) for trial in finished) == [-1, 0, 1]


def test_what_is_interrupted_is_run_at_once_by_the_next_start(sweep_main, tmp_path, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt
    keys = dict(learning_rate=[0.001, 0.01], n_layer=[2, 4], stack=4)
    monkeypatch.setattr(sweep_queue, 'train_stack', interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep_main(**keys)
    assert trials_of(open_study(SweepConfig(out_dir=str(tmp_path / 'sweep'))), RUNNING) == []
    monkeypatch.setattr(sweep_queue, 'train_stack', train_stack)
    assert sweep_main(**keys)[0] == 0 and len(rows_in(tmp_path / 'sweep')) == 4


def test_a_stack_that_fails_goes_one_by_one(sweep_main, tmp_path, monkeypatch, capfd):
    def out_of_memory(configs):
        raise RuntimeError('CUDA out of memory.')
    monkeypatch.setattr(sweep_queue, 'train_stack', out_of_memory)
    assert sweep_main(learning_rate=[0.001, 0.01], stack=2)[0] == 0
    assert {row['stack'] for row in rows_in(tmp_path / 'sweep')} == {None}


def test_a_trials_csv_of_unknown_origin_is_refused(sweep_main, tmp_path):
    keys = dict(learning_rate=[0.001, 0.01])
    assert sweep_main(**keys)[0] == 0
    (tmp_path / 'sweep/study.db').unlink()
    (tmp_path / 'sweep/sweep.json').unlink()
    error, _ = sweep_main(**keys)
    assert isinstance(error, UserError) and 'sweep.json' in str(error) and 'No such file' in str(error)


def test_a_storage_that_another_process_is_making_is_tried_again(tmp_path, monkeypatch):
    connect, tries = optuna.storages.RDBStorage.__init__, []

    def refuse_once(*args, **kwargs):
        tries.append(args)
        if len(tries) == 1:
            raise sqlalchemy.exc.IntegrityError('CREATE', {}, Exception('UNIQUE constraint failed'))
        connect(*args, **kwargs)
    monkeypatch.setattr(optuna.storages.RDBStorage, '__init__', refuse_once)
    assert open_study(SweepConfig(out_dir=str(tmp_path))).trials == [] and len(tries) == 2


def test_two_processes_share_a_sweep(tiny, tmp_path):
    """The workers are processes, which import their code from tools/."""
    flags = [f'--{key}={value}' for key, value in tiny.items()]
    done = subprocess.run([sys.executable, ROOT / 'sweep.py', *flags, '--learning_rate=0.001,0.01,0.1,1', '--workers=2',
                           f'--out_dir={tmp_path}/sweep'], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and '2 workers' in done.stdout, done.stderr
    assert [row['learning_rate'] for row in rows_in(tmp_path / 'sweep')] == [0.001, 0.01, 0.1, 1.0]
    workers = [trial.user_attrs['worker'] for trial in open_study(SweepConfig(out_dir=f'{tmp_path}/sweep')).trials]
    assert not any(worker.endswith(f':{os.getpid()}') for worker in workers)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('pgrep'), reason='finds the worker with pgrep')
def test_a_killed_worker_costs_nothing(tiny, tmp_path):
    """One of three workers is killed with SIGKILL during a run. Every point still finishes exactly once."""
    flags = [f'--{key}={value}' for key, value in {**tiny, 'max_iters': 60, 'batch_tokens': 512}.items()]
    out_dir = tmp_path / 'sweep'
    process = subprocess.Popen(
        [sys.executable, ROOT / 'sweep.py', *flags, '--learning_rate=' + ','.join(str(0.001 * k) for k in range(1, 25)),
         '--workers=3', '--heartbeat_s=1', f'--out_dir={out_dir}'], stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    config, deadline = SweepConfig(out_dir=str(out_dir)), time.time() + 90
    while not (out_dir / 'study.db').exists() or 'sweep' not in open_study(config).user_attrs:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.2)
    study = open_study(config)
    while len(trials_of(study, COMPLETE)) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    victim = int(subprocess.run(['pgrep', '-P', str(process.pid), '-f', 'spawn_main'], capture_output=True,
                                text=True).stdout.split()[0])
    while not any(trial.user_attrs.get('worker', '').endswith(f':{victim}') for trial in trials_of(study, RUNNING)):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    finished = [trial.params['learning_rate'] for trial in trials_of(study, COMPLETE)]
    assert len(finished) == len(set(finished)) == 24
    retried = [trial for trial in trials_of(study, COMPLETE) if 'failed_trial' in trial.system_attrs]
    assert len(retried) == 1
    assert len(rows_in(out_dir)) == 24


def test_a_model_is_compiled_once_for_many_runs(sweep_main, monkeypatch):
    """18 runs with 5 multipliers need 2 graphs each, to train and to validate: more than torch keeps by default."""
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(Block, 'compile', lambda self, **kwargs: compile_model(self, backend='eager', **kwargs))
    monkeypatch.setattr('nanop.parallel.why_not_compile', lambda device: None)
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.compiler.reset()
    assert sweep_main(n_layer=[2, 3, 4, 5, 6], parameterization=['sp', 'completep'], compile=True, max_iters=2,
                      learning_rate=0.001, seed=[1, 2])[0] == 0
    assert counters['stats']['unique_graphs'] == 2 * 5


# -----------------------------------------------------------------------------
# Searches


@pytest.mark.parametrize('search', ['random', 'tpe'])
def test_searches_run_the_trials_asked_for(sweep_main, tmp_path, search):
    for trials in (4, 6):
        code, out = sweep_main(search=search, trials=trials, learning_rate=[0.001, 0.1], init_std=[0.05, 0.2],
                               plots=trials == 6 and search == 'random')
        rows = rows_in(tmp_path / 'sweep')
        assert code == 0 and len(rows) == trials == len({row['learning_rate'] for row in rows})
        assert all(0.001 <= row['learning_rate'] <= 0.1 and 0.05 <= row['init_std'] <= 0.2 for row in rows)
    assert '## init_std' in out and (tmp_path / 'sweep/init_std.png').exists() == (search == 'random')


def test_tune_writes_a_config_that_train_takes_larger(sweep_main, tmp_path, tiny):
    code, out = sweep_main('--tune', trials=5, eval_interval=4)
    assert code == 0 and 'best.py' in out
    searched = [key for key in TUNED if key != 'init_std']  # the command line sets init_std
    best = tmp_path / 'sweep/best.py'
    rows = rows_in(tmp_path / 'sweep')
    row = min(rows, key=lambda row: row['val_loss'])
    assert len(rows) == 5 and len({row['attn_mult'] for row in rows}) == 5
    config = TrainConfig(**configure(TrainConfig, [str(best), f'--out_dir={tmp_path}/again']))
    assert [getattr(config, key) for key in searched] == [row[key] for key in searched]
    assert config.init_std == 0.1 and config.eval_interval == 4 and config.parameterization == 'completep'
    assert train(config)['val_loss'] == row['val_loss']
    larger = configure(TrainConfig, [str(best), '--n_layer=4', '--n_embd=64', f'--out_dir={tmp_path}/larger'])
    summary = train(TrainConfig(**larger))
    assert summary['config']['base_n_layer'] == 2 and summary['config']['n_layer'] == 4 and summary['val_loss'] < 5


def test_nothing_is_best_if_all_diverge(sweep_main, tmp_path):
    """Neither by --tune nor by the report, nor is the exit code 0."""
    code, out = sweep_main('--tune', trials=2, learning_rate=[1e29, 1e30], grad_clip=0.0)
    assert code == 3 and '| completep | none: diverged |' in out and 'inf' not in out
    assert not (tmp_path / 'sweep/best.py').exists()
    assert '2 diverged' in (tmp_path / 'sweep/report.md').read_text()


def test_a_search_knows_its_model(sweep_main):
    keys = dict(search='tpe', trials=2, learning_rate=[0.001, 0.1])
    assert sweep_main(**keys)[0] == 0
    for other, words in ((dict(n_layer=4), 'n_layer is 2 there and is 4 here'), (dict(seed=9), 'seed is 1337 there'),
                         (dict(search='grid'), "search is 'tpe' there")):
        error, _ = sweep_main(**{**keys, **other})
        assert isinstance(error, UserError) and words in str(error)


def test_a_search_in_which_all_fails_ends(sweep_main, monkeypatch):
    def fail(config):
        raise RuntimeError('no')
    monkeypatch.setattr(sweep_queue, 'train', fail)
    error, _ = sweep_main(search='tpe', trials=3, learning_rate=[0.001, 0.1])
    assert isinstance(error, UserError) and 'no run has finished: RuntimeError: no' in str(error)


def test_a_search_does_not_count_what_failed_as_to_do(sweep_main, monkeypatch):
    def fail_once(config):
        monkeypatch.setattr(sweep_queue, 'train', train)
        raise RuntimeError('no')
    monkeypatch.setattr(sweep_queue, 'train', fail_once)
    keys = dict(search='tpe', trials=3, learning_rate=[0.001, 0.1])
    code, out = sweep_main(**keys)
    assert code == 1 and '3 runs, 3 to do' in out
    code, out = sweep_main(**keys)
    assert code == 1 and '3 runs, 0 to do' in out and '2 points, 2 runs' in out


def test_two_workers_do_not_search_too_much(tiny, tmp_path):
    config = SweepConfig(out_dir=str(tmp_path), search='tpe', trials=5)
    overrides = {**tiny, 'learning_rate': [0.001, 0.1]}
    enqueue(open_study(config), Sweep(config, overrides), config.out_dir)
    in_threads(4, lambda: sweep_queue.work(config, overrides, 'cpu', 0))
    assert len(trials_of(open_study(config), COMPLETE)) == 5


# -----------------------------------------------------------------------------
# The report


def curve(at, losses_at=(0.0,), lowest=2.0, curvature=0.1, values=tuple(2.0**k for k in range(-9, -3))):
    """{value: {seed: loss}}: for each seed a parabola in log2(value), lowest at `at` plus that seed's `losses_at`."""
    return {value: {seed: lowest + curvature * (math.log2(value) - at - shift)**2
                    for seed, shift in enumerate(losses_at)} for value in values}


def test_optimum_is_the_parabolas_lowest_point():
    for at in (-7.0, -6.3, -5.51):
        found = optimum(curve(at))
        assert found.at == pytest.approx(at) and found.mark == '' and found.best == 2.0**round(at)
        assert found.loss == pytest.approx(2.0 + 0.1 * (at - round(at))**2)
    found = optimum(curve(-6.2, losses_at=(-0.3, 0.0, 0.3)))
    assert found.at == pytest.approx(-6.2) and found.at_by_seed == pytest.approx({0: -6.5, 1: -6.2, 2: -5.9})
    assert optimum(curve(-3.0)).mark == '>' and optimum(curve(-11.0)).mark == '<'
    diverging = curve(-6.4)
    diverging[2.0**-5] = {0: math.inf}
    found = optimum(diverging)
    assert found.at == -6.0 and found.mark == '~'  # no parabola fits infinity: take the best value that was run
    diverging = curve(-6.4, (0.0, 0.1))
    diverging[2.0**-5][1] = math.inf
    assert optimum(diverging).at_by_seed == {}
    uneven = curve(-6.0, (0.0, 0.0))
    for value in list(uneven)[:3]:  # the second seed is worse and ran at low values only
        uneven[value][1] += 0.05
    for value in list(uneven)[3:]:
        del uneven[value][1]
    rows = [dict(lr=value, seed=seed, val_loss=loss) for value, losses in uneven.items()
            for seed, loss in losses.items()]
    found = optimum(curve_of(rows, 'lr', []))
    assert found.at == pytest.approx(-6.0) and found.loss == pytest.approx(2.025)  # of both seeds, every row counts


def test_drift_and_regret_by_hand():
    """The target's optimum is 2 octaves below the base's: at the base's value its loss is 2 + 0.1 * 2^2."""
    found = compare([curve(-5.0), curve(-7.0)])
    assert found.drift == pytest.approx(-2) and math.isnan(found.drift_error)
    assert found.regret_frac == pytest.approx(0.4 / 2.0)
    assert (found.better, found.shared) == (3, 6)  # at 2^-9, 2^-8, 2^-7 the second is lower; at 2^-6 they are equal
    found = compare([curve(-6.0, (-0.3, 0.3)), curve(-6.0, (-0.3, 0.3), lowest=1.9)])
    assert found.drift == pytest.approx(0) and found.drift_error == pytest.approx(0)  # of each seed, too
    assert found.regret_frac == found.regret_error == 0
    found = compare([curve(-6.0, (-0.3, 0.3)), curve(-6.0, (0.3, -0.3))])  # the seeds drift by 0.6 and -0.6
    assert found.drift_error == pytest.approx(0.6)
    diverged = curve(-8.0)
    diverged[2.0**-5] = {0: math.inf}
    assert compare([curve(-5.0), diverged]).regret_frac == math.inf


def test_report_of_two_axes_takes_the_best_of_the_other(tmp_path):
    models = [dict(n_layer=n, n_embd=32, density=1.0, parameterization=name) for name in ('sp', 'completep')
              for n in (2, 32)]
    rows = []
    for model in models:
        drift = -2.0 if model == models[1] else 0.0
        for lr in (2.0**k for k in range(-9, -3)):
            for init_std in (0.05, 0.1, 0.2):
                for seed in (1, 2):
                    loss = 2 + 0.1 * (math.log2(lr) + 6 - drift)**2 + abs(math.log2(init_std / 0.1)) + 0.001 * seed
                    rows.append(dict(model, learning_rate=lr, init_std=init_std, seed=seed, trial=len(rows), tokens=1,
                                     seconds=1.0, val_loss=math.inf if lr == 2**-4 and drift else loss))
    report = SweepReport('name', rows, models, ['learning_rate', 'init_std'], dict(max_iters=3))
    text = report.write(tmp_path)
    table = [line for line in text.splitlines() if line.startswith(('| sp', '| completep'))]
    assert '| 2^-6.00 ± 0.00: 2.0015 | 2^-8.00 ± 0.00: 2.0015 | -2.00 ± 0.00 | 2.4015 |' in table[0]
    assert ' | 20.0 ± 0.0% |' in table[0]
    assert '| +0.00 ± 0.00 | 2.0015 | 0.0 ± 0.0% |' in table[1]
    assert '2^-3.32' in table[2]  # init_std 0.1
    assert '6 diverged' in text and '2 seed(s)' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['init_std.png', 'learning_rate.png', 'report.md',
                                                                'shapes.png']


def test_variants_are_rows_of_their_own(sweep_main, tiny, tmp_path):
    variants = [dict(), dict(norm='rmsnorm', n_kv_head=1), dict(parameterization='sp'), dict(optimizer='muon')]
    (tmp_path / 'variants.py').write_text(f'variants = {variants}')
    code, out = sweep_main(str(tmp_path / 'variants.py'), n_embd=64, base_n_embd=32)
    assert code == 0
    rows = [line.split(' | ')[0] for line in out.splitlines() if line.startswith('| ')]
    assert rows == ['| rules', '| completep', '| completep, norm rmsnorm, n_kv_head 1', '| sp',
                    '| completep, optimizer muon']
    sweep = Sweep(SweepConfig(out_dir=str(tmp_path), variants=variants), {**tiny, 'n_embd': [16, 32]})
    with pytest.raises(UserError, match='n_kv_head, norm is in shapes and in variants'):
        Sweep(SweepConfig(variants=variants[:2], shapes=[dict(norm='rmsnorm', n_kv_head=0)]), tiny)
    with pytest.raises(UserError, match='beta1=0.9 has no counterpart there'):
        Sweep(SweepConfig(), {**tiny, 'base_batch_tokens': 8, 'base_train_tokens': 1024})
    assert [(one.n_embd, one.parameterization, one.norm, one.n_kv_head, one.optimizer) for one in sweep.configs] == [
        (n_embd, *variant) for n_embd in (16, 32) for variant in (
            ('completep', 'layernorm', 0, 'adamw'), ('completep', 'rmsnorm', 1, 'adamw'),
            ('sp', 'layernorm', 0, 'adamw'), ('completep', 'layernorm', 0, 'muon'))]


@pytest.mark.parametrize('keys, message', [
    (dict(optimizer='muon', density=[0.5, 1.0]), "optimizer='muon' has no rule for density=0.5"),
    (dict(tokens_per_param=1.0, max_iters=None, base_batch_tokens=4), 'beta1=0.9 has no counterpart there')])
def test_what_has_no_rule_ends_a_sweep_before_it_begins(sweep_main, tmp_path, keys, message):
    code, _ = sweep_main(**keys, out_dir=str(tmp_path / 'never'))
    assert isinstance(code, UserError) and message in str(code)
    assert not (tmp_path / 'never').exists()


def test_a_model_that_diverged_everywhere_has_no_optimum(tmp_path):
    models = [dict(n_layer=n, n_embd=32, density=1.0, parameterization='sp') for n in (2, 4)]
    for diverged in (models[:1], models[1:]):
        rows = [dict(model, learning_rate=lr, seed=1, trial=i, tokens=512, seconds=1.0,
                     val_loss=math.inf if model in diverged else 2.0 + lr)
                for i, model in enumerate(models) for lr in (0.01, 0.02, 0.04)]
        text = SweepReport('name', rows, models, ['learning_rate'], {}).write(tmp_path)
        cells = [cell.strip() for cell in text.split('| sp |')[1].split('\n')[0].split('|')]
        assert cells[models.index(diverged[0])] == 'none: diverged' and 'inf' not in text and 'nan' not in text
        assert cells[2:5] == ['none', 'diverged' if diverged == models[1:] else 'none', 'none']


def test_rows_of_other_models_are_counted_not_used(sweep_main, tmp_path):
    keys = dict(learning_rate=[0.001, 0.01], n_layer=[2, 4], parameterization=['sp', 'mup'])
    assert sweep_main(**keys)[0] == 0
    code, out = sweep_main(**{**keys, 'learning_rate': 0.01, 'n_layer': 2})
    assert code == 0 and '4 points, 2 runs' in out  # also at the rate that this call does not name, for each rules
    assert '2 more rows of trials.csv are not used: their models are not in this sweep (n_layer 4)' in out
    assert len(rows_in(tmp_path / 'sweep')) == 4 + 2
    assert 'not used' not in sweep_main(**keys)[1]


def test_report_without_an_axis_compares_shapes_only(tmp_path):
    models = [dict(n_layer=n, n_embd=32, density=1.0, parameterization='sp') for n in (2, 4)]
    rows = [dict(model, learning_rate=0.01, seed=1, trial=i, tokens=(512, 1024)[i], seconds=1.0, val_loss=3.0 - i)
            for i, model in enumerate(models)]
    text = SweepReport('name', rows, models, ['learning_rate'], {}).write(tmp_path)
    assert '| sp | 0.01: 3.0000 | 0.01: 2.0000 |\n' in text and 'octaves |' not in text
    assert '512 to 1,024 training tokens' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ['report.md', 'shapes.png']


def test_parameterizations_of_the_same_runs_are_one_row(sweep_main):
    keys = dict(learning_rate=[0.001, 0.01], parameterization=['sp', 'mup', 'completep'])
    assert '| sp = mup = completep | ' in sweep_main(**keys)[1]
    out = sweep_main(**keys, n_layer=[2, 4])[1]
    assert '| sp = mup | ' in out and '| completep | ' in out


def test_csv_gives_the_same_rows_back(tmp_path):
    rows = [dict(n_layer=2, learning_rate=2**-9 / 3, schedule='linear', tie_weights=False, val_loss=1 / 3, trial=4,
                 diverged_at=None), dict(n_layer=4, learning_rate=1e-5, schedule='cosine', tie_weights=True,
                                         val_loss=math.inf, trial=5, diverged_at=3)]
    write_trials(tmp_path / 'trials.csv', rows)
    types = dict(n_layer=int, learning_rate=float, schedule=str, tie_weights=bool)
    again = read_trials(tmp_path / 'trials.csv', types)
    assert [{key: row[key] for key in rows[0]} for row in again] == rows
    assert read_trials(tmp_path / 'none.csv', types) == []


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('sweep_*.py')))
def test_configs_of_sweeps(name):
    path = ROOT / 'config' / name
    assert path.read_text().startswith('# ') and 'Hardware' in ''.join(path.read_text().splitlines()[1:3])
    assert Sweep(*read_sweep([str(path)])).points


def test_every_parameterization_can_join_a_study_later(tiny, tmp_path):
    config = SweepConfig(out_dir=str(tmp_path))
    for count in (1, len(PARAMETERIZATIONS)):
        sweep = Sweep(config, {**tiny, 'parameterization': list(PARAMETERIZATIONS)[:count], 'n_layer': [4]})
        enqueue(open_study(config), sweep, config.out_dir)
    assert len(trials_of(open_study(config))) == len({digest(one) for one in sweep.configs})
    assert json.loads(json.dumps(sweep.facts)) == open_study(config).user_attrs['sweep']


def test_fit_of_stack_size_is_one_on_a_cpu(tiny):
    assert stack_size(TrainConfig(**tiny)) == 1
