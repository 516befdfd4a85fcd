"""Tests of hyperparameters per role: init_std_mult, lr_mult, weight_decay_mult and eps_mult."""
import importlib.util
import json
import math
import shlex
import sys
from dataclasses import replace

import pytest
import torch

import coord_check
import export_hf
import sweep
from configurator import configure, flat, nested, typed
from model import GPT, GPTConfig
from nanop import checkpoint, run_log
from nanop.dataset import Dataset
from nanop.errors import UserError
from nanop.machine import set_up
from tools.stack import train_stack
from tools.sweep_files import read_trials
from tools.sweep_points import TYPES, Sweep, digest
from tools.sweep_report import SweepReport
from train import TrainConfig, make_optimizer, read_config, train

MULTS = dict(init_std_mult=dict(embedding=4.0, hidden_weight=0.5), lr_mult=dict(embedding=3.0, hidden_weight=2.0),
             weight_decay_mult=dict(hidden_weight=5.0, unembedding=0.5),
             eps_mult=dict(hidden_weight=10.0, final_norm=0.1))
SHAPE = dict(vocab_size=64, block_size=16, n_layer=8, n_embd=128, head_dim=16, base_n_layer=2, base_n_embd=32,
             base_head_dim=16, init_std=0.02)


def make(**changes):
    return GPT(GPTConfig(**SHAPE | changes), torch.Generator().manual_seed(0))


def groups_of(model, optimizer='adamw', clip_norm='plain'):
    made = model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, 'cpu', optimizer, 5.0, clip_norm)
    return {group['role']: group for group in made.param_groups}


def has(package):
    return importlib.util.find_spec(package) is not None


def test_values_by_hand():
    """CompleteP at m_N = 4, m_L = 4; base lr 0.01, weight decay 0.1, eps 1e-8, init 0.02."""
    groups = groups_of(make(**MULTS))
    found = {role: tuple(group[key] for key in ('lr', 'weight_decay', 'eps')) for role, group in groups.items()}
    assert found == {
        'embedding': pytest.approx((0.03, 0.1, 2.5e-9)), 'hidden_weight': pytest.approx((0.005, 2.0, 6.25e-9)),
        'residual_proj': pytest.approx((0.0025, 0.4, 6.25e-10)), 'final_norm': pytest.approx((0.01, 0.0, 2.5e-10)),
        'unembedding': pytest.approx((0.01, 0.05, 2.5e-9)), 'block_norm': pytest.approx((0.01, 0.0, 6.25e-10)),
        'hidden_bias': pytest.approx((0.01, 0.0, 6.25e-10))}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'sgd', pytest.param('lion', marks=pytest.mark.skipif(
    not has('lion_pytorch'), reason='needs lion-pytorch'))])
@pytest.mark.parametrize('parameterization', ['sp', 'completep'])
def test_the_rules_multiply_them(optimizer, parameterization):
    """For every optimizer and shape, a group differs from the plain one by its own factors, and in nothing else."""
    mults = {key: value for key, value in MULTS.items() if key != 'eps_mult' or optimizer in ('adamw', 'muon')}
    for shape in (dict(), dict(n_layer=2, n_embd=32)):
        model, plain = make(parameterization=parameterization, **mults, **shape), make(
            parameterization=parameterization, **shape)
        for clip_norm in ('plain', 'scaled'):  # the norm is that of the plain groups: the same at every size
            groups, usual = groups_of(model, optimizer, clip_norm), groups_of(plain, optimizer, clip_norm)
            for role, group in groups.items():
                for key in ('lr', 'weight_decay', 'eps'):
                    factor = mults.get(f'{key}_mult', {}).get(role, 1.0)
                    assert group.get(key, 0) == pytest.approx(factor * usual[role].get(key, 0), rel=1e-12), (role, key)
                assert group['lr'] == pytest.approx(0.01 * group['lr_scale'], rel=1e-12)
                assert group['grad_scale'] == usual[role]['grad_scale']


def test_init_is_multiplied_and_the_table_shows_it_all():
    model, plain = make(**MULTS), make()
    for name, p in plain.named_parameters():
        factor = 4.0 if '.wte.' in name or '.wpe.' in name else 0.5 if name.endswith(('c_attn.weight', 'c_fc.weight')) \
            else 1.0
        torch.testing.assert_close(model.get_parameter(name), factor * p, rtol=1e-6, atol=0)
    optimizer = model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, 'cpu')
    shown = {line.split()[0]: line.split()[2:] for line in run_log.describe(model, optimizer).splitlines()}
    assert shown['embedding'] == '0.08 0.03 0.1 0.003 2.5e-09 1'.split()
    assert shown['hidden_weight'] == '0.005 0.005 2 0.01 6.25e-09 1'.split()
    std = model.get_parameter('transformer.wte.weight').std().item()
    assert std == pytest.approx(float(shown['embedding'][0]), rel=0.05)


def test_factors_of_one_change_nothing():
    ones = {key: dict.fromkeys([*roles, 'kv_weight'], 1.0) for key, roles in MULTS.items()}
    model, plain = make(**ones), make()
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())
    for role, group in groups_of(plain).items():
        assert {**groups_of(model)[role], 'params': []} == {**group, 'params': []}


REFUSED = [
    (dict(lr_mult=dict(embeding=2.0)), "'embeding' is unknown, use some of embedding, block_norm"),
    (dict(lr_mult=dict(residual_branch=2.0)), "'residual_branch' is unknown"),
    *((dict(eps_mult=dict(embedding=bad)), 'use a finite number above 0 for embedding')
      for bad in (0.0, -1.0, math.inf, math.nan, True, '2')),
    (dict(init_std_mult=3.0), 'use a dict such as dict(embedding=2.0)'),
    (dict(lr_mult=dict(kv_weight=2.0)), 'it would do nothing for kv_weight, leave that out; here it acts on embedding, '
                                        'block_norm, hidden_weight'),
    (dict(lr_mult=dict(unembedding=2.0), tie_weights=True), 'it would do nothing for unembedding'),
    (dict(lr_mult=dict(hidden_bias=2.0), bias=False), 'it would do nothing for hidden_bias'),
    (dict(init_std_mult=dict(block_norm=2.0)), 'it would do nothing for block_norm'),
    (dict(init_std_mult=dict(unembedding=2.0), zero_init_unembed=True), 'it would do nothing for unembedding'),
    (dict(weight_decay_mult=dict(hidden_bias=2.0)), 'it would do nothing for hidden_bias'),
    (dict(weight_decay_mult=dict(embedding=2.0), weight_decay=0.0),
     'it would do nothing for embedding, leave that out; here it acts on no role'),
    (dict(eps_mult=dict(embedding=2.0), optimizer='sgd'), 'it would do nothing for embedding'),
]


@pytest.mark.parametrize('changes, message', REFUSED)
def test_what_does_nothing_is_refused(tiny, changes, message):
    """By train() before its first step, by a sweep before it begins, and by the coordinate check."""
    keys = dict(weight_decay=0.1) | changes
    with pytest.raises(UserError) as error:
        train(replace(tiny, **keys))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert not checkpoint.find(tiny.out_dir)
    with pytest.raises(UserError) as error:
        config = coord_check.CoordCheckConfig(dataset=tiny.dataset, device='cpu', **keys)
        coord_check.checks_of_axis(config, 'width', Dataset(tiny.dataset), set_up('cpu', 'float32'))
    assert message in str(error.value)


def test_the_coordinate_check_trains_with_them(tiny):
    config = coord_check.CoordCheckConfig(dataset=tiny.dataset, device='cpu', **MULTS)
    arguments = coord_check.checks_of_axis(config, 'width', Dataset(tiny.dataset), set_up('cpu', 'float32'))['width']
    torch.manual_seed(1)
    _, optimizer, *_ = arguments['make'](128)
    groups = {group['role']: group for group in optimizer.param_groups}
    assert groups['embedding']['lr'] == 3 * groups['unembedding']['lr']


# -----------------------------------------------------------------------------
# Command line, checkpoints, export
def test_the_command_line_sets_entries(tmp_path):
    (tmp_path / 'a.py').write_text('lr_mult = dict(embedding=4, unembedding=2.0)\n')
    (tmp_path / 'b.py').write_text("lr_mult = {'block_norm+final_norm': 0.5}\neps_mult = dict(embedding=3.0)\n")
    files = [str(tmp_path / name) for name in ('a.py', 'b.py')]
    norms = dict(block_norm=0.5, final_norm=0.5)
    assert configure(TrainConfig, files) == dict(
        lr_mult=dict(embedding=4.0, unembedding=2.0, **norms), eps_mult=dict(embedding=3.0))
    assert configure(TrainConfig, [*files, '--lr_mult.embedding+final_norm=8'])['lr_mult'] == dict(
        embedding=8.0, unembedding=2.0, block_norm=0.5, final_norm=8.0)
    assert flat(nested({'a': 1, 'b.x+y': 2.0})) == {'a': 1, 'b.x': 2.0, 'b.y': 2.0}
    for argument, message in {
            '--lr_mult=4': "lr_mult holds a number for each name, got '4'",
            '--lr_mult.embedding=x': "lr_mult.embedding must be float, got 'x' (str)",
            '--lr_mlt.embedding=3': "unknown key 'lr_mlt'; did you mean 'lr_mult'?",
            '--lr_mult.embedding': "has no value; write --lr_mult.embedding=VALUE",
            '--lr_mult.embedding=1,2': "lr_mult.embedding must be float, got '1,2' (str)"}.items():
        with pytest.raises(UserError) as error:
            configure(TrainConfig, [argument])
        assert message in str(error.value)
    with pytest.raises(UserError, match='lr_mult.embedding is set twice, leave one of them out'):
        typed('lr_mult', {'embedding+unembedding': 2.0, 'embedding': 3.0}, {'lr_mult': dict}, 'a.py')
    with pytest.raises(UserError, match='b.x is set twice, leave one of them out'):
        nested({'b.x': 1.0, 'b.x+y': 2.0})


def test_resume_keeps_them_and_refuses_others(tiny):
    config = replace(tiny, weight_decay=0.1, **MULTS)
    whole = train(config)
    state = json.loads((checkpoint.newest(tiny.out_dir)[0] / 'state.json').read_text())
    assert {key: state['model_config'][key] for key in MULTS} == {key: state['config'][key] for key in MULTS} == MULTS
    resumed = read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume', '--lr_mult.embedding=3'])
    assert {key: getattr(resumed, key) for key in MULTS} == MULTS
    assert train(resumed)['val_loss'] == whole['val_loss'] != train(replace(tiny, out_dir=''))['val_loss']
    other = read_config([f'--out_dir={tiny.out_dir}', '--init_from=resume', '--lr_mult.final_norm=3'])
    with pytest.raises(UserError, match="its lr_mult is .*, not .*'final_norm': 3.0"):
        train(other)


def test_the_model_card_and_its_command_have_them(tiny):
    train(config := replace(tiny, weight_decay=0.1, **MULTS))
    gpt, _, state, data = export_hf.load(export_hf.ExportConfig(out_dir=tiny.out_dir))
    text = export_hf.card(export_hf.ExportConfig(out_dir=tiny.out_dir), state, gpt, 'X', [], [])
    for key, value in flat(MULTS).items():
        assert f'{key} {value}' in text and f'--{key}={value}' in text
    words = [word for word in shlex.split(export_hf.command(state['config'], data.meta))[2:] if 'dataset' not in word]
    again = read_config([*words, f'--dataset={tiny.dataset}', f'--out_dir={tiny.out_dir}'])
    assert replace(again, overwrite=False) == config
    started = state['config'] | dict(init_from='/home/me/hf')  # what it started from belongs to how it was trained
    assert '--init_from=hf' in export_hf.command(started, data.meta)


# -----------------------------------------------------------------------------
# Sweeps
TINY = dict(block_size=16, batch_tokens=128, batch_size=8, max_iters=3, n_layer=2, n_embd=32, head_dim=16,
            base_n_layer=2, base_n_embd=32, base_head_dim=16, init_std=0.1, eval_tokens=512, compile=False,
            dtype='float32', device='cpu')


def test_stacked_runs_have_their_own(tiny):
    config = replace(tiny, out_dir='', weight_decay=0.1, eval_interval=8)
    configs = [config, replace(config, **MULTS), replace(config, lr_mult=dict(final_norm=9.0))]
    losses = [summary['val_loss'] for summary in train_stack(configs)]
    assert losses == pytest.approx([train(each)['val_loss'] for each in configs], abs=1e-4)
    assert len({round(loss, 4) for loss in losses}) == 3


def test_points_of_a_sweep():
    axis = {'hidden_weight+residual_proj': [0.25, 4.0], 'embedding': 2.0}
    points = Sweep(sweep.SweepConfig(search='random', trials=8), dict(lr_mult=axis))
    assert {*points.axes} == {'learning_rate', 'lr_mult.hidden_weight+residual_proj'}
    values = [config.lr_mult for config in points.configs]
    assert all(mult['hidden_weight'] == mult['residual_proj'] and mult['embedding'] == 2.0 for mult in values)
    assert all(0.25 <= mult['hidden_weight'] <= 4 for mult in values) and len(set(points.digests)) == 8
    config = TrainConfig()
    assert digest(replace(config, lr_mult=dict(embedding=1.0))) == digest(config)
    for key in MULTS:
        assert digest(replace(config, **{key: dict(embedding=2.0)})) != digest(config)
    rows = Sweep(sweep.SweepConfig(variants=[dict(), dict(lr_mult=dict(embedding=2.0))]), {})
    assert [config.lr_mult for config in rows.configs] == [dict(embedding=1.0), dict(embedding=2.0)]
    with pytest.raises(UserError, match='lr_mult.embedding is set twice'):
        Sweep(sweep.SweepConfig(), dict(lr_mult={'embedding': 2.0, 'embedding+unembedding': [1.0, 2.0]}))
    with pytest.raises(UserError, match='lr_mult.embedding cannot be in variants: it has a list of its own'):
        Sweep(sweep.SweepConfig(variants=[dict(lr_mult=dict(embedding=2.0))]), dict(lr_mult=dict(embedding=[1.0, 2.0])))


def run_sweep(monkeypatch, *flags):
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'argv', ['sweep.py', *flags])
        patch.setattr(SweepReport, 'plot', lambda *args: None)
        return sweep.main()


def test_a_sweep_searches_them(data_dir, tmp_path, monkeypatch, capsys):
    """A grid, its report, its trials.csv read again; another sweep in its folder is refused."""
    usual = [f'--{key}={value}' for key, value in TINY.items()] + [f'--dataset={data_dir}', '--workers=1']
    grid = [*usual, f'--out_dir={tmp_path / "grid"}', '--lr_mult.embedding+unembedding=0.5,2', '--eps_mult.embedding=3']
    assert run_sweep(monkeypatch, *grid) == 0
    axis = 'lr_mult.embedding+unembedding'
    report = (tmp_path / 'grid' / 'report.md').read_text()
    assert f'## {axis}' in report and 'eps_mult.embedding=3' in report and f'![{axis}]({axis}.png)' in report
    rows = read_trials(tmp_path / 'grid' / 'trials.csv', TYPES, [axis])
    assert sorted(row[axis] for row in rows) == [0.5, 2.0] and rows[0]['val_loss'] != rows[1]['val_loss']
    (tmp_path / 'grid' / 'study.db').unlink()
    capsys.readouterr()
    assert run_sweep(monkeypatch, *grid) == 0 and '0 to do' in capsys.readouterr().out
    with pytest.raises(UserError, match='eps_mult.embedding is 3.0 there and is 1.0 here'):
        run_sweep(monkeypatch, *grid[:-1])
    with pytest.raises(UserError, match='lr_mult.final_norm is 1.0 there and varies here'):
        run_sweep(monkeypatch, *grid, '--lr_mult.final_norm=0.5,2')
    with pytest.raises(UserError, match='it would do nothing for kv_weight'):
        run_sweep(monkeypatch, *usual, f'--out_dir={tmp_path / "none"}', '--lr_mult.kv_weight=0.5,2')
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('search', ['random', 'tpe'])
def test_tune_writes_them_to_best(data_dir, tmp_path, monkeypatch, search):
    (tmp_path / 'base.py').write_text(
        '\n'.join(f'{key} = {value!r}' for key, value in TINY.items()) + f'\ndataset = {data_dir!r}\n'
        "lr_mult = {'embedding': [0.25, 16.0], 'hidden_weight+residual_proj': [0.25, 4.0], 'final_norm': 0.5}\n")
    out_dir = tmp_path / 'tune'
    assert run_sweep(monkeypatch, '--tune', str(tmp_path / 'base.py'), '--trials=3', f'--search={search}',
                     '--workers=1', f'--out_dir={out_dir}') == 0
    rows = read_trials(out_dir / 'trials.csv', TYPES)
    best = min(rows, key=lambda row: row['val_loss'])
    config = read_config([str(out_dir / 'best.py'), '--n_layer=4', '--n_embd=64'])
    hidden = best['lr_mult.hidden_weight+residual_proj']
    assert config.lr_mult == dict(embedding=best['lr_mult.embedding'], hidden_weight=hidden, residual_proj=hidden,
                                  final_norm=0.5)
    model = GPT(GPTConfig.of(config, vocab_size=256))
    groups = {group['role']: group for group in make_optimizer(model, config, 'cpu').param_groups}
    assert groups['hidden_weight']['lr'] == pytest.approx(config.learning_rate * hidden / 2)
