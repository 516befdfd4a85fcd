"""
Measures the coordinate check as an instrument: how often it errs about rules that are right, and about planted faults.

    python tests/coord_reliability.py

Every setting below is one that a user may have, and its rules are right: a FAIL is false. The faults of
tests/test_coord_check.py are planted into eight of the settings: there a PASS is false. Every finished check appends a
row to reliability.csv in out_dir, and checks that have a row are skipped, so that the run can be stopped and continued;
about half an hour on one core. The datasets shakespeare_char and wikitext-2 must be there (docs/data.md).
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_coord_check import FAULTS, SEEN  # noqa: E402

from configurator import configure  # noqa: E402
from coord_check import CoordCheckConfig, checks_of_axis  # noqa: E402
from nanop import plots  # noqa: E402
from nanop.coordinates import check  # noqa: E402
from nanop.dataset import open_dataset  # noqa: E402
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.files import append_csv, make_out_dir, read_csv  # noqa: E402
from nanop.machine import set_up  # noqa: E402


@dataclass
class ReliabilityConfig:
    out_dir: str = 'results/coord_check'   # of reliability.csv and reliability.png


MODERN = dict(norm='rmsnorm', pos='rope', activation='swiglu', bias=False)
SMALL = dict(n_embd=64, head_dim=16, widths='32,64,128,256', depths='1,2,4,8,16')
PAPERS = dict(input_mult=1.0, init_std=0.02)
SHORT = dict(n_embd=64, head_dim=16, block_size=32, widths='64,128,256', depths='2,4,8,16',
             densities='0.125,0.25,0.5,1')
DEEP = dict(depths='2,4,8,16,32', widths='64,128,256')
ALL = 'width,depth,density'

SETTINGS = {  # {name: (axes, keys)}; the parameterization is completep_supar unless given
    # of the first ten rows, the first six were judged right before, the next four were false FAILs
    'wikitext-2':               (ALL, dict(dataset='wikitext-2', **DEEP)),
    'shakespeare_char':         (ALL, dict(dataset='shakespeare_char', **DEEP)),
    'rmsnorm, rope, swiglu':    (ALL, dict(**MODERN, **DEEP)),
    'alibi, relu2':             (ALL, dict(pos='alibi', activation='relu2', **DEEP)),
    'widths 48 to 384':         ('width', dict(parameterization='completep', widths='48,96,192,384', head_dim=16)),
    'depth_mup':                ('width,depth', dict(parameterization='depth_mup')),
    "papers' init":             ('width,depth', dict(parameterization='completep', **PAPERS)),
    'rate 1e-2, depth':         ('depth', dict(parameterization='completep', learning_rate=1e-2)),
    'rate 1e-2, width':         ('width', dict(parameterization='mup', learning_rate=1e-2, steps=30)),
    'rate 1e-2, density':       ('density', dict(parameterization='supar', learning_rate=1e-2)),
    'defaults':                 ('width,depth,density,laziness', dict()),
    'rate 5e-4':                (ALL, dict(learning_rate=5e-4, **SHORT)),
    'rate 2e-3':                (ALL, dict(learning_rate=2e-3, **SHORT)),
    'rate 4e-3':                (ALL, dict(learning_rate=4e-3, **SHORT)),
    "papers' init, sparse":     ('width,density', dict(**PAPERS, **SHORT)),
    'small base':               (ALL, SMALL),
    'large base':               (ALL, dict(n_embd=256, head_dim=64, widths='128,256,512', depths='2,4,8',
                                           densities='0.125,0.25,0.5,1')),
    'lion':                     ('width,depth', dict(parameterization='completep', optimizer='lion',
                                                     learning_rate=3e-4, **SHORT)),
    'muon':                     ('width,depth', dict(parameterization='completep', optimizer='muon',
                                                     learning_rate=4e-3, **SHORT)),
    'sgd':                      ('width,depth', dict(parameterization='completep', optimizer='sgd', learning_rate=0.2,
                                                     weight_decay=0.0, **SHORT)),
    'no gains, no positions':   (ALL, dict(norm='rmsnorm', norm_gain=False, pos='none', activation='relu', **SHORT)),
    'layernorm without gains':  ('width,depth', dict(norm_gain=False, pos='rope', **SHORT)),
    'zero queries, unembedding': ('width,depth', dict(zero_init_query=True, zero_init_unembed=True, **SHORT)),
    "weights' form":            ('width', dict(unembed_form='weights', **SHORT)),
    'tied embeddings':          ('width,depth', dict(tie_weights=True, **SHORT)),
    '30 steps':                 ('width,density', dict(steps=30, **SHORT)),
    '3 steps, small batch':     (ALL, dict(steps=3, batch_tokens=128, batch_size=2, **SHORT)),
    'density 1/2, multipliers 2': ('width,depth', dict(density=0.5, attn_mult=2.0, output_mult=2.0, **SHORT)),
    "papers' init, few depths": ('depth', dict(parameterization='completep', depths='2,4,8,16', **PAPERS)),
    "papers' init, small base": ('width,depth', dict(**PAPERS, **SMALL)),
    'alpha 3/4':                ('depth', dict(parameterization='completep', alpha=0.75, depths='2,4,8,16')),
    'no decay, eps 1e-12':      (ALL, dict(weight_decay=0.0, eps=1e-12, beta2=0.999, **SHORT)),
    'query and key norms':      ('width,depth', dict(qk_norm=True, pos='rope', **SHORT)),
    'init 0.1':                 (ALL, dict(init_std=0.1, input_mult=10.0, **SHORT)),
    'few sizes':                (ALL, dict(widths='64,128,256', depths='2,4,8', densities='0.25,0.5,1')),
    'five seeds':               ('depth,density', dict(seeds=5, learning_rate=4e-3, **SHORT)),
    'one head for keys':        ('width,depth', dict(n_kv_head=1, parameterization='completep', **SHORT)),
}
FAULTY = ('defaults', "papers' init", 'rmsnorm, rope, swiglu', 'alibi, relu2', 'rate 4e-3', 'small base',
          'shakespeare_char', 'density 1/2, multipliers 2')


def checks():
    """(setting, fault or '', axis, keys) of every check, the most important first."""
    for setting, (axes, keys) in SETTINGS.items():
        for axis in axes.split(','):
            yield setting, '', axis, keys
    yield 'depth_mup', 'blocks that become linear', 'laziness', SETTINGS['depth_mup'][1]
    for setting in FAULTY:
        for fault, axis in SEEN:
            if axis == 'density' and 'density' in SETTINGS[setting][1]:
                continue
            deep = dict(n_layer=8, widths='32,64,128') if fault == 'one layer of eight wrong' else {}
            yield setting, fault, axis, {**SETTINGS[setting][1], **deep, 'parameterization': 'completep_supar',
                                         'depths': '2,4,8,16', 'control': 'none', 'steps': 3}


def rows_of(setting, fault, axis, keys):
    """The rows of reliability.csv for one axis, whose name may stand for two checks."""
    config = CoordCheckConfig(**{'parameterization': 'completep_supar', **keys, 'axes': axis})
    with pytest.MonkeyPatch.context() as patch:
        FAULTS.get(fault, lambda patch: None)(patch)
        found = checks_of_axis(config, axis, open_dataset(config.dataset), set_up('cpu', config.dtype))
        reports = {name: check(**arguments) for name, arguments in found.items()}
    flags = ' '.join(f'--{key}={value}' for key, value in keys.items())
    return [dict(setting=setting, fault=fault, axis=axis, check=name, verdict=report.verdict, reason=report.reason,
                 says=report.summary(), flags=flags) for name, report in reports.items()]


def rates(rows):
    """How often the check errs: counts of checks without and with a fault, and of the verdicts that should not be."""
    right, wrong = [row for row in rows if not row['fault']], [row for row in rows if row['fault']]
    return dict(right=len(right), settings=len({row['setting'] for row in right}),
                false_fails=sum(row['verdict'] == 'FAIL' for row in right),
                undecided=sum(row['verdict'] == 'INCONCLUSIVE' for row in right),
                faults=len(wrong), false_passes=sum(row['verdict'] == 'PASS' for row in wrong),
                undecided_faults=sum(row['verdict'] == 'INCONCLUSIVE' for row in wrong))


def draw(path, rows):
    """One square for each axis of a setting, by its worst verdict: left the right rules, right the planted faults."""
    from matplotlib.colors import ListedColormap
    levels = ['PASS', 'INCONCLUSIVE', 'FAIL']
    names = {False: lambda row: (row['setting'], row['axis']),
             True: lambda row: (f"{row['fault']}, {row['axis']}", row['setting'])}
    with plots.figure(path, 1, 2, size=(11, 8), dpi=100) as (figure, axes):
        for panel, (faulty, name) in zip(axes[0], names.items()):
            shown = [row for row in rows if bool(row['fault']) == faulty]
            down, across = (list(dict.fromkeys(name(row)[i] for row in shown)) for i in range(2))
            cells = np.full((len(down), len(across)), math.nan)
            for row in shown:
                at = down.index(name(row)[0]), across.index(name(row)[1])
                cells[at] = np.fmax(cells[at], levels.index(row['verdict']))
            panel.imshow(cells, cmap=ListedColormap(['tab:green', 'gold', 'tab:red']), vmin=0, vmax=2, aspect='auto',
                         alpha=0.7)
            panel.set_yticks(range(len(down)), down, fontsize=7)
            panel.set_xticks(range(len(across)), across, fontsize=7, rotation=30, ha='right')
            panel.set_title('planted faults' if faulty else 'rules that are right', fontsize=9)
            panel.grid(False)
        figure.suptitle('green PASS, yellow INCONCLUSIVE, red FAIL', fontsize=9)


def main():
    config = ReliabilityConfig(**configure(ReliabilityConfig, sys.argv[1:]))
    folder = make_out_dir(config.out_dir)
    path = folder / 'reliability.csv'
    done = {(row['setting'], row['fault'], row['axis']) for row in read_csv(path)}
    todo = [one for one in checks() if one[:3] not in done]
    for i, (setting, fault, axis, keys) in enumerate(todo):
        rows = rows_of(setting, fault, axis, keys)
        append_csv(path, rows)
        print(f"{i + 1}/{len(todo)} {setting}, {fault or 'right'}, {axis}: {', '.join(row['verdict'] for row in rows)}",
              flush=True)
    draw(folder / 'reliability.png', read_csv(path))
    print(rates(read_csv(path)))


if __name__ == '__main__':
    exit_on_user_error(main)
