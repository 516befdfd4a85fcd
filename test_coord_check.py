"""Tests of coord_check.py: its numbers against arithmetic, its verdicts against planted faults, its messages."""
import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import coord_check
import model
from configurator import UserError
from coord_check import (FLAT, MODULES, Band, CoordCheckConfig, Line, check, distance_from_linearization, fit, lines_of,
                         measure, plan, write_csv)
from dataset import ByteTokenizer, Dataset
from test_train import run
from write_dataset import write_dataset

ROOT = Path(__file__).resolve().parent
TINY = dict(seeds=3, steps=5, block_size=32, batch_tokens=512, probe_tokens=128, widths='64,128,256', depths='2,4,8,16',
            densities='0.125,0.25,0.5,1', n_embd=64, head_dim=16, device='cpu')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """Bytes of words in random order."""
    words = np.random.default_rng(0).choice(['abc ', 'de ', 'fghij ', 'kl ', 'mnopq '], 12_000)
    folder = tmp_path_factory.mktemp('data')
    write_dataset(folder, [('train', ''.join(words[:10_000]), True), ('val', ''.join(words[10_000:]), True)],
                  ByteTokenizer(), 'words')
    return str(folder)


@pytest.fixture
def reports(data_dir):
    """Runs the checks of one axis at tiny sizes: {name: Report}."""
    def run_axis(axis, **changes):
        config = CoordCheckConfig(axes=axis, dataset=data_dir, **{**TINY, **changes})
        return {name: check(**arguments)
                for name, arguments in plan(config, axis, Dataset(data_dir), torch.device('cpu')).items()}
    return run_axis


# -----------------------------------------------------------------------------
# The verdict on the real rules, and on planted faults


@pytest.mark.parametrize('axis', coord_check.AXES)
def test_completep_supar_passes_and_its_control_fails(reports, axis):
    for name, report in reports(axis).items():
        assert report.passed, f'{name}\n{report}'
        assert report.control_failures and 'PASS' in str(report)


def test_the_controls_fail_by_what_theory_says(reports):
    def control(axis, quantity, group, step):
        lines = [line for report in reports(axis).values() for line in report.sides[1]]
        return max(line.slope for line in lines if line[:3] == (quantity, group, step))
    assert control('width', 'change', 'logits', 1) > 0.7
    assert control('width', 'change', 'residual', 5) > 0.6
    assert control('depth', 'change', 'residual', 5) > 0.6
    assert control('density', 'change', 'mlp', 1) > 0.7


def rules_with(monkeypatch, **mutated):
    """Replaces the rules: {role: {column: value}}, or alpha=number."""
    original = model.scaling_rules

    def scaling_rules(m_N, m_L, m_D, rho, alpha, gpt2_init):
        rules = original(m_N, m_L, m_D, rho, mutated.get('alpha', alpha), gpt2_init)
        for role, change in mutated.items():
            if role != 'alpha':
                changed = change(rules[role], rho) if callable(change) else change
                rules[role] = rules[role]._replace(**changed)
        return rules
    monkeypatch.setattr(model, 'scaling_rules', scaling_rules)


class OneBadLayer(model.GPT):
    """Layer 1 of the others forgets the rules: its branches are not scaled, nor is the lr of its weights."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.h[1].branch_mult = 1.0

    def configure_optimizers(self, weight_decay, learning_rate, *rest):
        optimizer = super().configure_optimizers(weight_decay, learning_rate, *rest)
        for group in [group for group in optimizer.param_groups if group['role'] == 'hidden_weight']:
            bad = [p for name, p in self.named_parameters() if re.fullmatch(r'transformer\.h\.1\..*weight', name)
                   and any(p is other for other in group['params'])]
            group['params'] = [p for p in group['params'] if all(p is not other for other in bad)]
            optimizer.add_param_group({**group, 'params': bad, 'lr': learning_rate})
        return optimizer


def every_hidden(**change):
    return dict(hidden_weight=change, residual_proj=change)


FAULTS = {
    'hidden lr not scaled': lambda patch: rules_with(patch, **every_hidden(lr=1.0)),
    'residual not scaled': lambda patch: rules_with(patch, residual_branch=dict(forward=1.0)),
    'logit multiplier missing': lambda patch: rules_with(patch, unembedding=dict(forward=1.0)),
    'init not scaled': lambda patch: rules_with(patch, **every_hidden(init_std=1.0)),
    'decay not scaled': lambda patch: rules_with(patch, **every_hidden(weight_decay=1.0)),
    'eps not scaled': lambda patch: rules_with(patch, **{role: dict(eps=1.0) for role in model.ROLES}),
    'density ignored in lr': lambda patch: rules_with(patch, **dict.fromkeys(
        ('hidden_weight', 'residual_proj'), lambda rule, rho: dict(lr=rule.lr * rho))),
    'alpha off by 0.5': lambda patch: rules_with(patch, alpha=0.5),
    'one layer wrong': lambda patch: patch.setattr(coord_check, 'GPT', OneBadLayer),
}

# what gives the fault away on each axis; what is not here, that axis cannot see: nothing depends on the wrong factor there
SEEN = {
    ('hidden lr not scaled', 'width'): ('update', 'hidden_weight'),
    ('hidden lr not scaled', 'density'): ('update', 'hidden_weight'),
    ('residual not scaled', 'depth'): ('change', 'residual'),
    ('logit multiplier missing', 'width'): ('change', 'logits'),
    ('init not scaled', 'width'): ('activation', 'mlp'),
    ('init not scaled', 'density'): ('activation', 'mlp'),
    ('decay not scaled', 'width'): ('decay', 'hidden_weight'),
    ('decay not scaled', 'density'): ('decay', 'hidden_weight'),
    ('eps not scaled', 'width'): ('gradient', 'hidden_weight'),
    ('eps not scaled', 'depth'): ('gradient', 'hidden_weight'),
    ('density ignored in lr', 'density'): ('update', 'hidden_weight'),
    ('alpha off by 0.5', 'depth'): ('update', 'hidden_weight'),
    ('alpha off by 0.5', 'laziness'): ('distance', 'block'),
    ('one layer wrong', 'width'): ('update', 'hidden_weight'),
    ('one layer wrong', 'depth'): ('gradient', 'hidden_weight'),
    ('one layer wrong', 'density'): ('update', 'hidden_weight'),
}


@pytest.mark.parametrize('axis', coord_check.AXES)
@pytest.mark.parametrize('fault', FAULTS)
def test_planted_faults(reports, monkeypatch, fault, axis):
    FAULTS[fault](monkeypatch)
    failures = [line for report in reports(axis, control='none').values() for line in report.failures]
    if (fault, axis) in SEEN:
        assert SEEN[fault, axis] in [line[:2] for line in failures], failures
    else:
        assert not failures, 'is seen: write it down in SEEN'
