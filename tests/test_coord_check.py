"""Tests of coordinate checks: the numbers against arithmetic, the verdicts against planted faults, the messages."""
import csv
import math
import os
import re
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import run

import coord_check
import model
from configurator import configure
from coord_check import AXES, USED_BY, CoordCheckConfig, checks_of_axis, main
from nanop.coordinates import (
    FLAT,
    REASONS,
    CoordinateReport,
    around,
    check,
    distance_from_linearization,
    fit,
    lines_of,
    measure_coordinates,
    write_slopes,
)
from nanop.dataset import Dataset
from nanop.errors import UserError
from nanop.files import read_csv
from nanop.machine import Machine
from nanop.tokenizer import ByteTokenizer
from nanop.write_dataset import write_dataset
from test_model import VARIANTS, label, skip_without_its_package

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(seeds=3, steps=5, block_size=32, batch_tokens=512, probe_tokens=128, widths='64,128,256', depths='2,4,8,16',
            densities='0.125,0.25,0.5,1', n_embd=64, head_dim=16, device='cpu')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A byte dataset: five words in random order."""
    words = np.random.default_rng(0).choice(['abc ', 'de ', 'fghij ', 'kl ', 'mnopq '], 12_000)
    folder = tmp_path_factory.mktemp('data')
    write_dataset(folder, [('train', ''.join(words[:10_000]), True), ('val', ''.join(words[10_000:]), True)],
                  ByteTokenizer(), 'words')
    return str(folder)


def run_axis(data_dir, axis, **changes):
    """Run the checks of one axis at tiny sizes. Returns {name: report}."""
    config = CoordCheckConfig(axes=axis, dataset=data_dir, **{**TINY, **changes})
    checks = checks_of_axis(config, axis, Dataset(data_dir), Machine(torch.device('cpu'), torch.float32))
    return {name: check(**arguments) for name, arguments in checks.items()}


@pytest.fixture
def reports(data_dir):
    return partial(run_axis, data_dir)


@pytest.fixture(scope='session')
def default_reports(data_dir):
    """A function like `reports` for the defaults only, which runs each axis once."""
    return cache(partial(run_axis, data_dir))


# -----------------------------------------------------------------------------
# The verdict on the real rules, and on planted faults


@pytest.mark.parametrize('axis, quantity, group, step, least', [
    ('width', 'change', 'logits', 1, 0.7), ('width', 'change', 'residual', 5, 0.6),
    ('depth', 'change', 'residual', 5, 0.6), ('density', 'change', 'mlp', 1, 0.7),
    ('laziness', 'distance', 'block', 1, None)])
def test_completep_supar_passes_and_its_control_fails(default_reports, axis, quantity, group, step, least):
    for name, report in default_reports(axis).items():
        assert report.verdict == 'PASS' and report.control_failures, f'{name}\n{report}'
        assert str(report).splitlines()[-1].startswith('PASS')
        slopes = [line.slope for line in report.control if line.key[:3] == (quantity, group, step)]
        if least is None:  # the control is lazy: in theory its slope is -1/2
            assert all(-0.8 < slope < -0.3 for slope in slopes)
        else:
            assert max(slopes) > least


OPTIMIZERS = [dict(optimizer='lion'), dict(optimizer='muon', learning_rate=4e-3),
              dict(optimizer='sgd', learning_rate=0.2, weight_decay=0.0),
              dict(optimizer='sgd', learning_rate=0.2, weight_decay=0.0, alpha=0.5)]


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['width', 'depth'])
@pytest.mark.parametrize('variant', [*VARIANTS, *OPTIMIZERS], ids=label)
def test_every_variant_keeps_the_promise(reports, variant, axis):
    """Each variant passes over width and depth. Its control has the same variant and must fail."""
    skip_without_its_package(variant.get('optimizer'))
    report, = reports(axis, parameterization='completep', seeds=6, probe_tokens=256, **variant).values()
    assert report.verdict == 'PASS', report


# two models that combine most changes, and the variants that the check of one step below cannot judge
QUICK = [(VARIANTS[-2], 'width'), (VARIANTS[-2], 'depth'), (VARIANTS[-1], 'width'),
         (dict(zero_init_unembed=True), 'width'),
         (OPTIMIZERS[1], 'width'), (OPTIMIZERS[2], 'width'), (OPTIMIZERS[3], 'depth')]


@pytest.mark.parametrize('variant, axis', QUICK, ids=[f'{label(v)}-{axis}' for v, axis in QUICK])
def test_some_variants_keep_the_promise(reports, variant, axis):
    """The check above with fewer seeds, for make test. The control must fail."""
    report, = reports(axis, parameterization='completep', probe_tokens=256, **variant).values()
    assert report.verdict == 'PASS' and report.control_failures, f'\n{report}'


@pytest.mark.parametrize('variant', [variant for variant in [*VARIANTS, *OPTIMIZERS[:1]]
                                     if variant != dict(zero_init_unembed=True)], ids=label)
def test_every_variant_takes_the_steps_of_its_rules(reports, variant):
    """A quick check: after one step the updates and the decay of weights have the slopes of the rules; under sp they do
    not. Muon and SGD need more steps and seeds. With a zero unembedding nothing moves in the first step."""
    skip_without_its_package(variant.get('optimizer'))
    quick = dict(seeds=2, steps=1, batch_tokens=128, batch_size=4, control='none')
    failed = {}
    for rules in ('completep', 'sp'):
        report, = reports('width', parameterization=rules, **quick, **variant).values()
        failed[rules] = [str(line) for line in report.failures if line.quantity in ('update', 'decay')]
    assert failed['sp'] and not failed['completep'], failed


def rules_with(monkeypatch, **mutated):
    """Patch scaling_rules: {role: {column: value}, or a function that returns it}, or alpha=number."""
    original = model.scaling_rules

    def scaling_rules(m_N, m_L, m_D, rho, alpha, *rest, **more):
        rules = original(m_N, m_L, m_D, rho, mutated.get('alpha', alpha), *rest, **more)
        for role, change in mutated.items():
            if role != 'alpha':
                changed = change(rules[role], rho, m_N) if callable(change) else change
                rules[role] = rules[role]._replace(**changed)
        return rules
    monkeypatch.setattr(model, 'scaling_rules', scaling_rules)


class OneBadLayer(model.GPT):
    """A GPT whose layer 3 ignores the rules: neither its branches nor the lr of its weights are scaled."""

    def __init__(self, config):
        super().__init__(config)
        if config.n_layer > 3:
            self.transformer.h[3].branch_mult = 1.0

    def configure_optimizers(self, weight_decay, learning_rate, *rest):
        optimizer = super().configure_optimizers(weight_decay, learning_rate, *rest)
        bad = {p for name, p in self.named_parameters() if re.fullmatch(r'transformer\.h\.3\.(attn|mlp).*weight', name)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group['params'] if p in bad]
            if moved:
                group['params'] = [p for p in group['params'] if p not in bad]
                optimizer.add_param_group({**group, 'params': moved, 'lr': learning_rate})
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
        ('hidden_weight', 'residual_proj'), lambda rule, rho, m_N: dict(lr=rule.lr * rho))),
    'alpha off by 0.5': lambda patch: rules_with(patch, alpha=0.5),
    'one layer of eight wrong': lambda patch: patch.setattr(coord_check, 'GPT', OneBadLayer),
}

# {(fault, axis): (quantity, group) that shows it}. An axis cannot show the other faults: there the missing factor is 1
# or cancels.
SEEN = {
    ('hidden lr not scaled', 'width'): ('update', 'hidden_weight'),
    ('hidden lr not scaled', 'density'): ('update', 'hidden_weight'),
    ('residual not scaled', 'depth'): ('change', 'residual'),
    ('logit multiplier missing', 'width'): ('change', 'logits'),
    ('init not scaled', 'width'): ('activation', 'mlp'),
    ('init not scaled', 'density'): ('activation', 'mlp'),
    ('decay not scaled', 'width'): ('decay', 'hidden_weight'),
    ('decay not scaled', 'density'): ('decay', 'hidden_weight'),
    ('eps not scaled', 'width'): ('grad/eps', 'hidden_weight'),
    ('eps not scaled', 'depth'): ('grad/eps', 'hidden_weight'),
    ('density ignored in lr', 'density'): ('update', 'hidden_weight'),
    ('alpha off by 0.5', 'depth'): ('update', 'hidden_weight'),
    ('alpha off by 0.5', 'laziness'): ('distance', 'block'),
    ('one layer of eight wrong', 'width'): ('update', 'hidden_weight'),
    ('one layer of eight wrong', 'depth'): ('gradient', 'hidden_weight'),
    ('one layer of eight wrong', 'density'): ('update', 'hidden_weight'),
}


@pytest.mark.parametrize('axis', AXES)
@pytest.mark.parametrize('fault', FAULTS)
def test_planted_faults(reports, monkeypatch, fault, axis):
    FAULTS[fault](monkeypatch)
    changes = dict(n_layer=8, widths='32,64,128') if fault == 'one layer of eight wrong' else {}
    seeds = 2 if axis == 'laziness' else 3  # its derivatives take long
    found = reports(axis, control='none', steps=2, seeds=seeds, **changes).values()
    failures = [line for report in found for line in report.failures]
    if (fault, axis) in SEEN:
        quantity, group = SEEN[fault, axis]
        assert any(re.search(rf'^{quantity} +{group} .* FAIL', str(report), re.MULTILINE) for report in found), failures
        if fault == 'one layer of eight wrong':
            assert {line.where.split('.')[2] for line in failures if line.group == 'hidden_weight'} == {'3'}
    else:
        assert not failures, 'this axis shows the fault: add it to SEEN'


def steps_of(optimizer, rule_of):
    """A fault that makes the optimizer take its factors from rule_of."""
    return lambda patch: patch.setitem(model.OPTIMIZERS, optimizer, rule_of)


# {name: (variant, fault, axis, (quantity, group) that shows it)}
FAULTS_OF_VARIANTS = {
    'lion, lr not scaled': (dict(optimizer='lion'), steps_of('lion', lambda rule: (1.0, rule.weight_decay, None)),
                            'width', ('update', 'hidden_weight')),
    "muon by AdamW's rule": (OPTIMIZERS[1], steps_of('muon', lambda rule: (rule.lr, rule.weight_decay, rule.eps)),
                             'width', ('update', 'hidden_weight')),
    "muon by AdamW's eps": (OPTIMIZERS[1], steps_of('muon', lambda rule: (1.0, 1.0, rule.eps)),
                            'width', ('grad/eps', 'hidden_weight')),
    "sgd by AdamW's rule, width": (OPTIMIZERS[2], steps_of('sgd', lambda rule: (rule.lr, rule.weight_decay, None)),
                                   'width', ('update', 'embedding')),
    "sgd by AdamW's rule, depth": (OPTIMIZERS[2], steps_of('sgd', lambda rule: (rule.lr, rule.weight_decay, None)),
                                   'depth', ('update', 'hidden_weight')),
    "weights' form, lr not scaled": (dict(unembed_form='weights'), lambda patch: rules_with(
        patch, unembedding=dict(lr=1.0)), 'width', ('update', 'unembedding')),
    "weights' form, init not scaled": (dict(unembed_form='weights'), lambda patch: rules_with(
        patch, unembedding=dict(init_std=1.0)), 'width', ('activation', 'logits')),
    'qk_norm, lr scaled': (dict(qk_norm=True), lambda patch: rules_with(
        patch, qk_norm=lambda rule, rho, m_N: dict(lr=1 / m_N)), 'width', ('update', 'qk_norm')),
}


@pytest.mark.parametrize('fault', FAULTS_OF_VARIANTS)
def test_planted_faults_in_variants(reports, monkeypatch, fault):
    variant, plant, axis, (quantity, group) = FAULTS_OF_VARIANTS[fault]
    plant(monkeypatch)
    report, = reports(axis, parameterization='completep', control='none', steps=2, **variant).values()
    assert re.search(rf'^{quantity} +{group} .* FAIL', str(report), re.MULTILINE), report


def test_the_readme_says_which_fault_is_seen_where():
    """The table of faults in docs/coord_check.md equals SEEN."""
    text = (ROOT / 'docs' / 'coord_check.md').read_text()
    for fault in FAULTS:
        cells = re.search(rf'^\| {fault} \|(.*)\|$', text, re.MULTILINE).group(1).split('|')
        assert [cell.strip() for cell in cells] == [SEEN.get((fault, axis), [''])[0] for axis in AXES]


def test_the_docs_say_which_rules_pass_where():
    """The table of rules in docs/coord_check.md equals the verdicts in results/coord_check."""
    text = (ROOT / 'docs' / 'coord_check.md').read_text()
    for name in model.PARAMETERIZATIONS:
        with open(ROOT / 'results' / 'coord_check' / name / 'coord_check.csv', newline='') as file:
            rows = [row for row in csv.DictReader(file) if row['model'] == name]
        cells = re.search(rf'^\| `{name}` \|(.*)\|$', text, re.MULTILINE).group(1).split('|')
        for axis, cell in zip(AXES, cells, strict=True):
            found = {row['verdict'] for row in rows if row['check'].startswith(axis)} - {'', 'pass'}
            expected = '**FAIL**' if 'fail' in found else 'inconclusive' if found else 'pass'
            assert cell.strip() == expected, (name, axis)


PAPERS_INIT = dict(input_mult=1.0, init_std=0.02)


@pytest.mark.parametrize('axis, verdict, changes', [
    ('depth', 'PASS', dict(parameterization='completep', **PAPERS_INIT)),
    ('depth', 'INCONCLUSIVE', dict(parameterization='completep', learning_rate=1e-2, steps=10)),
    ('width', 'PASS', dict(parameterization='mup', learning_rate=1e-2, steps=10)),
    ('density', 'INCONCLUSIVE', dict(parameterization='supar', learning_rate=1e-2, steps=10,
                                     densities='0.0625,0.125,0.25,0.5,1'))])
def test_right_rules_do_not_fail_at_other_settings(reports, axis, verdict, changes):
    """Where every slope was to be within 0.15, these failed."""
    report, = reports(axis, control='none', **changes).values()
    assert report.verdict == verdict, f'\n{report}'
    assert report.reason == ('' if verdict == 'PASS' else 'saturation')


@pytest.mark.parametrize('fault, axis', [('residual not scaled', 'depth'), ('init not scaled', 'width'),
                                         ('eps not scaled', 'depth'), ('density ignored in lr', 'density')])
@pytest.mark.parametrize('changes', [dict(learning_rate=4e-3, **PAPERS_INIT), dict(
    pos='rope', norm='rmsnorm', activation='swiglu', bias=False)], ids=['papers', 'modern'])
def test_planted_faults_do_not_pass_at_other_settings(reports, monkeypatch, fault, axis, changes):
    FAULTS[fault](monkeypatch)
    report, = reports(axis, control='none', steps=2, densities='0.25,0.5,1', depths='2,4,8', **changes).values()
    assert report.verdict != 'PASS', f'\n{report}'


def test_clipping_is_part_of_the_check(reports):
    """SGD under a plain clip of the whole gradient loses its rule over width; the scaled norm keeps it."""
    sgd = dict(parameterization='completep', control='none', optimizer='sgd', learning_rate=0.2, weight_decay=0.0)
    plain, scaled = (reports('width', grad_clip=1.0, clip_norm=norm, **sgd)['width'] for norm in ('plain', 'scaled'))
    assert plain.verdict == 'FAIL' and ('update', 'residual_proj') in [line.key[:2] for line in plain.failures]
    assert scaled.verdict == 'PASS', f'\n{scaled}'


def reliability_sentence(found):
    return (f"Of {found['right']} checks of right rules in {found['settings']} settings, {found['false_fails']} ended "
            f"with FAIL and {found['undecided']} with INCONCLUSIVE. Of {found['faults']} checks with a fault, "
            f"{found['false_passes']} ended with PASS and {found['undecided_faults']} with INCONCLUSIVE.")


def test_the_docs_say_how_often_it_errs():
    """The sentences in docs/coord_check.md and the README have the figures of reliability.csv."""
    from coord_reliability import rates  # which imports this file
    found = rates(read_csv(ROOT / 'results' / 'coord_check' / 'reliability.csv'))
    text = ' '.join((ROOT / 'docs' / 'coord_check.md').read_text().split())
    assert reliability_sentence(found) in text, reliability_sentence(found)
    short = (f"Of {found['right']} checks of right rules, in {found['settings']} settings, {found['false_fails']} "
             f"ended with FAIL and {found['undecided']} with INCONCLUSIVE; of {found['faults']} with a planted fault "
             f"{found['false_passes']} ended with PASS.")
    assert short in ' '.join((ROOT / 'README.md').read_text().split()), short
    assert found['false_fails'] == found['false_passes'] == 0 and found['settings'] >= 24
    assert found['undecided'] <= 0.1 * found['right']


def test_a_control_that_passes_is_inconclusive(reports):
    # at density 1 the two are the same rules
    report = reports('width', parameterization='completep', control='completep_supar', steps=2)['width']
    assert not report.failures and (report.verdict, report.reason) == ('INCONCLUSIVE', 'control')
    assert 'the control completep_supar passes, too' in str(report) and 'use larger sizes' in str(report)


def test_depth_mup_is_stable_over_depth_but_lazy(reports):
    report = reports('depth', parameterization='depth_mup')['depth']
    assert report.verdict == 'PASS', report
    lazy = reports('laziness', parameterization='depth_mup')  # its control is depth_mup itself, so none runs
    assert not any(report.verdict != 'FAIL' or report.control for report in lazy.values())


def test_mup_fails_over_depth(reports):
    report = reports('depth', parameterization='mup', control='none')['depth']
    assert ('change', 'residual') in [(line.quantity, line.group) for line in report.failures]
    assert 'mup against' not in report.title  # mup is the control itself


# -----------------------------------------------------------------------------
# The numbers


class Scale(nn.Module):
    """y = w x with w = 2, in two consecutive modules: (B, 1) -> (B, 1)."""

    def __init__(self, frozen=1.0):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.first.weight, 2.0)
        nn.init.constant_(self.second.weight, frozen)

    def forward(self, x):
        return self.second(self.first(x))


def test_measured_numbers_by_hand():
    # loss = mean of 2 x over x in {1, -3} = -2 for training and {1, 3} for the probe; gradients w.r.t. first: mean of x
    batches = {0: torch.tensor([[1.0], [-3.0]]), 1: torch.tensor([[1.0], [-3.0]]), -1: torch.tensor([[1.0], [3.0]])}

    def make(size):
        net = Scale()
        net.second.weight.requires_grad_(False)
        optimizer = torch.optim.SGD([net.first.weight], lr=0.5, weight_decay=0.1)
        return net, optimizer, lambda step: net(batches[step]).mean()

    values = measure_coordinates(make, 1, 0, {'out': 'first'}, {'w': r'first\.weight'}, '', 2)
    w1 = 2 - 0.5 * (-1 + 0.1 * 2)        # SGD's decay is part of the gradient: 2.4
    w2 = w1 - 0.5 * (-1 + 0.1 * w1)      # 2.78
    expected = {
        ('gradient', 'w', 'first.weight', 0): 2.0,  # mean of the probe; SGD has no eps, so there is no grad/eps
        ('activation', 'out', 'first', 0): 4.0, ('activation', 'out', 'first', 1): 2 * w1,
        ('activation', 'out', 'first', 2): 2 * w2,
        ('change', 'out', 'first', 0): 0.0, ('change', 'out', 'first', 1): 2 * (w1 - 2),
        ('change', 'out', 'first', 2): 2 * (w2 - 2),
        ('update', 'w', 'first.weight', 2): w2 - 2,
        ('decay', 'w', 'first.weight', 2): 0.05,  # lr x weight decay
    }
    assert values == pytest.approx(expected, rel=1e-5)


def test_eps_is_compared_with_the_gradient_and_masked_entries_do_not_count():
    def make(size):
        net = nn.Linear(4, 1, bias=False)
        optimizer = torch.optim.Adam(net.parameters(), eps=1e-3)
        return net, optimizer, lambda step: net(torch.tensor([[3.0, 3.0, 0.0, 0.0]])).sum()
    values = measure_coordinates(make, 1, 0, {}, {'w': 'weight'}, '', 1)
    assert values['gradient', 'w', 'weight', 0] == pytest.approx(3.0)
    assert values['grad/eps', 'w', 'weight', 0] == pytest.approx(3.0 / 1e-3)
    assert values['update', 'w', 'weight', 1] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step, unmasked entries


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.w ** 2 * x


def test_distance_from_linearization_by_hand():
    w, delta = torch.tensor([1.0, 2.0, 4.0]), 0.5
    # (w + d)^2 - w^2 = 2 w d + d^2: the linear part is 2 w d, the rest d^2
    distance = distance_from_linearization(Square(), {'w': w}, {'w': w + delta}, (torch.ones(3),))
    assert float(distance) == pytest.approx(3 * delta ** 2 / (2 * delta * 7), rel=1e-12)
    linear = nn.Linear(3, 3)
    before = {name: p.detach() for name, p in linear.named_parameters()}
    after = {name: p + 0.1 for name, p in before.items()}
    assert float(distance_from_linearization(linear, before, after, (), dict(input=torch.randn(5, 3)))) < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(0.1, 100), st.integers(2, 5), st.integers(3, 7))
def test_fit_finds_powers(power, factor, seeds, num_sizes):
    sizes = [2.0 ** i for i in range(num_sizes)]
    slope, stderr, values = fit(sizes, np.array([[factor * size ** power for size in sizes]] * seeds))
    assert slope == pytest.approx(power, abs=1e-9) and stderr == pytest.approx(0, abs=1e-9)
    assert values == pytest.approx([factor * size ** power for size in sizes])


def test_fit_agrees_with_numpy():
    sizes, values = [3, 5, 17, 40], np.random.default_rng(0).lognormal(size=(4, 4))
    slopes = [np.polyfit(np.log(sizes), np.log(row), 1)[0] for row in values]
    slope, stderr, _ = fit(sizes, values)
    assert slope == pytest.approx(np.mean(slopes))
    assert stderr == pytest.approx(np.std(slopes, ddof=1) / 2)


def test_bands_hold_the_standard_error_too():
    band = around(-1, '')
    assert (band.low, band.high) == (-1.25, -0.75) and around(-1, '', to=-0.5)[:3] == (-1, -1.25, -0.25)
    assert band.used(-1.0, 0.1) < 1 and band.used(-1.24, 0.1) < 1 and band.used(-0.99, 0.24) < 1
    assert band.used(-1.26, 0.0) > 1 and band.used(-1.2, 0.16) > 1 and band.used(-1.0, 0.26) > 1
    assert band.used(float('nan'), 0.0) == band.used(0.0, float('inf')) == float('inf')


def lines_from(slopes, band=FLAT, sizes=(2, 4, 8, 16, 32), noise=0.0, seeds=3):
    """{step: Line} of a module's change after 1 and 10 steps. `slopes`: between the sizes, or {step: these}."""
    scatter, runs = np.random.default_rng(0).normal(0, 1, (seeds, len(sizes))), {}
    for step, local in (slopes if isinstance(slopes, dict) else {1: slopes}).items():
        values = 2 ** np.concatenate([[0], np.cumsum(np.array(local) * np.diff(np.log2(sizes)))])
        for seed in range(seeds):
            for i, size in enumerate(sizes):
                value = values[i] * 2 ** (noise * scatter[seed, i])
                runs.setdefault((size, seed), {})['change', 'out', 'last', step] = value
    lines = lines_of(runs, list(sizes), list(range(seeds)), {'change .*': band})
    return {line.step: line for line in lines}


@pytest.mark.parametrize('slopes, more, verdict', [
    ([0, 0, 0, 0], {}, 'pass'),
    ([0.1, -0.1, 0.1, 0.05], dict(noise=0.1), 'pass'),
    ([0.2] * 4, {}, 'pass'),                         # nearer to 0 than to 1/2
    ([0.5] * 4, {}, 'fail'),
    ([-0.5] * 4, dict(noise=0.1), 'fail'),
    ([-0.5] * 4, dict(band=around(-0.5, '')), 'pass'),
    ([-0.3] * 4, dict(band=around(0, '', to=-0.5)), 'pass'),
    ([0.15] * 4, dict(band=around(0, '', tolerance=0.1)), 'fail'),
    ([0.3, 0.9, 0.4, 0.6], {}, 'fail'),              # bumpy, but it stays
    ([-0.6, -0.5, -0.2, -0.1], {}, 'pass'),          # vanishes
    ([1.4, 1.2, 0.5, 0.3], {}, 'curvature'),         # half gone, and still outside
    ([0, 0, 0.5, 0.5], {}, 'curvature'),             # comes late
    ([0, 0, 0, 0], dict(noise=2.0), 'noise'),
    ([0.5] * 4, dict(noise=2.0), 'noise'),
    ([math.nan] * 4, {}, 'divergence'),
    ([0.5, 0.5], dict(sizes=(2, 4, 8)), 'fail'),     # three sizes will do
    ([0.5, 0.1], dict(sizes=(2, 4, 8)), 'pass'),
    ([0.5] * 4, dict(seeds=2), 'fail'),
])
def test_verdicts_on_known_slopes(slopes, more, verdict):
    assert lines_from(slopes, **more)[1].verdict == verdict


def test_what_leaves_its_band_in_later_steps_does_not_fail():
    late = lines_from({1: [0.1] * 4, 10: [0.6] * 4})
    assert (late[1].verdict, late[10].verdict) == ('pass', 'saturation')
    both = lines_from({1: [0.4] * 4, 10: [0.6] * 4})
    assert (both[1].verdict, both[10].verdict) == ('fail', 'fail')


def test_seeds_that_agree_by_chance_are_not_exact():
    """A line's error is at least the usual one of its quantity."""
    noisy = {(size, seed): {('change', 'out', str(i), 1): size ** 0.3 * 2 ** (0.6 * (-1) ** (seed + size.bit_length()))
                            for i in range(9)} for size in (2, 4, 8, 16) for seed in range(2)}
    lucky = {model: {**run, ('change', 'out', 'lucky', 1): model[0] ** 0.3} for model, run in noisy.items()}
    alone = {model: {('change', 'out', 'lucky', 1): model[0] ** 0.3} for model in noisy}
    verdicts = [[line.verdict for line in lines_of(runs, [2, 4, 8, 16], [0, 1], {'change .*': FLAT})
                 if line.name == 'lucky'] for runs in (lucky, alone)]
    assert verdicts == [['noise'], ['fail']]


class Stack(nn.Module):
    """`size` layers; layer `i` multiplies by i + 1. The weights never move."""

    def __init__(self, size):
        super().__init__()
        self.layers = nn.ModuleList(Scale(frozen=(i + 1) / 2) for i in range(size))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def test_where_layers_vary_in_number_the_extremes_are_judged():
    def make(size):
        net = Stack(size)
        return net, torch.optim.SGD(net.parameters(), lr=0.0), lambda step: net(torch.ones(1, 1)).sum()
    report = check(make, [2, 4, 8], {'layer': r'layers\.\d+', 'all': ''}, seeds=2, steps=1)
    found = {line.name: (line.values, line.where) for line in report.treatment
             if line.key[:3] == ('activation', 'layer', 0)}
    assert found == {'lowest': (pytest.approx((1, 1, 1)), 'layers.0'), 'last': (pytest.approx((2, 4, 8)), 'layers.7'),
                     'highest': (pytest.approx((2, 4, 8)), 'layers.7')}


def test_checks_repeat_exactly_and_seeds_differ(reports, tmp_path):
    files = []
    for i in range(2):
        write_slopes(tmp_path / f'{i}.csv', reports('width', control='none', steps=2))
        files.append((tmp_path / f'{i}.csv').read_bytes())
    assert files[0] == files[1]
    with open(tmp_path / '0.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert any(float(row['stderr']) > 0 for row in rows)
    assert {row['sizes'] for row in rows} == {'64 128 256'}


# -----------------------------------------------------------------------------
# Other people's models


def toy(learning_rate):
    def make(size):
        net = nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Dropout(0.5), nn.Linear(size, 1))
        optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
        return net, optimizer, lambda step: net(torch.ones(8, 4)).square().mean()
    return make


def test_a_run_that_diverges_decides_nothing_and_is_drawn_all_the_same(tmp_path):
    report = check(toy(1e-3), [4, 8, 16], {'out': '3'}, control=toy(1e30), seeds=2, steps=4)
    assert 'divergence' in [line.verdict for line in report.control_failures]
    assert report.plot(tmp_path / 'a.png').stat().st_size > 5_000
    alone = check(toy(1e30), [4, 8, 16], {'out': '3'}, seeds=2, steps=1)
    assert alone.plot(tmp_path / 'b.png').exists() and 'nan' in str(report)
    assert (alone.verdict, alone.reason) == ('INCONCLUSIVE', 'divergence') and 'a smaller learning rate' in str(alone)


def test_the_probe_is_taken_without_dropout():
    def make(size):
        net, _, loss_fn = toy(0.0)(size)
        return net, torch.optim.SGD(net.parameters(), lr=0.0), loss_fn
    assert measure_coordinates(make, 64, 0, {'out': '3'}, {}, '', 2)['change', 'out', '3', 2] == 0


def test_what_does_not_move_fails():
    report = check(toy(0.0), [4, 8, 16], {'out': '3'}, parameters={'w': r'3\.weight'}, expected={'update w .*': 0},
                   seeds=2, steps=1)
    assert {(line.quantity, line.step) for line in report.failures if math.isnan(line.slope)} == {
        ('change', 1), ('update', 1)}


def test_a_noisy_control_does_not_count_as_failing():
    flat, noisy, failing = (lines_from(*case)[1] for case in (([0] * 4,), ([0] * 4, FLAT, (2, 4, 8, 16, 32), 2.0),
                                                              ([0.5] * 4,)))
    started_wrong = failing._replace(quantity='activation', step=0)
    def report(*control):
        return CoordinateReport('', 'size', [1, 2, 4], ('a', 'b'), [flat], list(control))
    assert report(noisy).verdict == report(flat, started_wrong).verdict == 'INCONCLUSIVE'
    assert report(noisy, failing).verdict == 'PASS'


def test_own_expectations_come_first():
    report = check(toy(1e-3), [4, 8, 16], {'out': '3'}, seeds=2, steps=2, expected={r'change \S+ (1|2) .*': 7})
    assert {line.band.expected for line in report.treatment if line.quantity == 'change' and line.band} == {7}


def test_a_module_that_is_not_called_is_an_error():
    def make(size):
        net, optimizer, loss_fn = toy(0.1)(size)
        net.spare = nn.Linear(1, 1)
        net.forward = lambda x: nn.Sequential(*list(net)[:4])(x)
        return net, optimizer, loss_fn
    with pytest.raises(UserError, match=re.escape("the module 'spare' (s) is not called by the loss")):
        check(make, [4, 8, 16], {'s': 'spare'}, seeds=2, steps=1)


@pytest.mark.parametrize('arguments, message', [
    (dict(modules={'out': 'nothing'}), "nothing is called 'nothing' (out)"),
    (dict(parameters={'w': 'nothing'}), "nothing is called 'nothing' (w)"),
    (dict(modules={}), 'nothing is judged'),
    (dict(modules={}, parameters={'w': '.*'}), 'nothing is judged'),
    (dict(expected={'activation uot .*': 0}), "expected['activation uot .*'] matches nothing"),
    (dict(control=toy(0.1), names=('a', 'a')), 'must be different'),
    (dict(control=toy(0.1), names=('a',)), 'must be different'),
    (dict(sizes=[4, 8]), 'use at least three'),
    (dict(sizes=[4, 8, 8]), 'use at least three'),
    (dict(sizes=[0, 4, 8]), 'use at least three'),
    (dict(seeds=1), 'at least 2 seeds'),
    (dict(steps=0), '1 step'),
])
def test_check_refuses(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(toy(0.1), **{**dict(sizes=[4, 8, 16], modules={'out': '3'}, steps=1, seeds=2), **arguments})


def test_a_compiled_model_is_an_error_not_an_empty_record():
    def make(size):
        net, optimizer, loss_fn = toy(0.1)(size)
        return torch.compile(net), optimizer, loss_fn
    with pytest.raises(UserError, match='not a compiled or wrapped one'):
        check(make, [4, 8, 16], {'out': '3'})


def test_expected_slopes_can_be_numbers_bands_or_none():
    report = check(toy(1e-3), [4, 8, 16], {'out': '3'}, seeds=2, steps=2,
                   expected={'activation out 0 .*': 5, 'activation .*': None})
    bands = {line.key[:3]: line.band for line in report.treatment}
    assert bands['activation', 'out', 0].expected == 5 and bands['activation', 'out', 2] is None
    assert bands['change', 'out', 2] is FLAT


def readme_examples():
    text = (ROOT / 'docs' / 'coord_check.md').read_text()
    return [code for code in re.findall(r'```python\n(.*?)```', text, re.DOTALL) if 'report = check(' in code]


@pytest.mark.parametrize('i', range(2))
def test_readme_examples(i, capsys):
    """Each example in docs/coord_check.md runs and passes."""
    code = readme_examples()[i]
    assert len(code.splitlines()) <= 31
    exec(compile(code, 'docs/coord_check.md', 'exec'), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith('PASS: all')


@pytest.mark.parametrize('i, changes', [(0, {'lr=0.01': 'lr=0.003', 'std=0.1': 'std=0.02'}),
                                        (1, {'lr=0.003': 'lr=0.001', 'std=0.02': 'std=0.1'})])
def test_readme_examples_at_another_rate_and_init(i, changes, capsys):
    code = readme_examples()[i]
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, 'docs/coord_check.md', 'exec'), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith('PASS: all')


def run_in(folder, code, path):
    """Run code in a folder that has its own modules `model` and `train`, with `path` as PYTHONPATH."""
    for name in ('model', 'train', 'configurator'):
        (folder / f'{name}.py').write_text(f"raise ImportError('the {name}.py of another project')\n")
    (folder / 'mine.py').write_text(code)
    return subprocess.run([sys.executable, 'mine.py'], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(path)})


def test_own_code_has_its_own_model_and_train(tmp_path):
    """The first example in docs/coord_check.md runs in a folder with its own model.py and train.py, as in nanoGPT."""
    done = run_in(tmp_path, readme_examples()[0], ROOT)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith('PASS: all'), done.stderr


def test_pip_installs_the_library_alone(tmp_path):
    pytest.importorskip('setuptools', '70.1', reason='without pip build isolation it needs this setuptools, or wheel')
    source, target = tmp_path / 'source', tmp_path / 'target'
    shutil.copytree(ROOT / 'nanop', source / 'nanop', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md'):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-build-isolation',
                           f'--target={target}', source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in target.iterdir() if not path.name.endswith('.dist-info')) == ['nanop']
    code = 'from nanop.coordinates import check; import nanop.coordinates; print(nanop.coordinates.__file__)'
    done = run_in(tmp_path, code, target)
    assert done.stdout.startswith(str(target)), done.stderr


# -----------------------------------------------------------------------------
# The command


def test_the_depth_grid_of_the_paper():
    config = CoordCheckConfig(**configure(CoordCheckConfig, [str(ROOT / 'config' / 'coord_check_depth.py')]))
    assert (config.n_embd, config.head_dim, config.batch_tokens, config.block_size) == (256, 64, 8 * 1024, 1024)
    assert config.depths == '2,4,8,16,32,64' and config.steps == 10 and config.seeds == 3


def flags(data_dir, tmp_path, **changes):
    values = {**TINY, **dict(dataset=data_dir, out_dir=tmp_path / 'out', steps=2, seeds=2, axes='width')}
    axes = {*changes.get('axes', 'width').split(',')}
    return [f'--{key}={value}' for key, value in {**values, **changes}.items()
            if key in changes or not axes & {*AXES} or axes & {*USED_BY.get(key, AXES)}]


def test_exit_codes_and_files(data_dir, tmp_path, monkeypatch, capsys):
    def main_with(**changes):
        monkeypatch.setattr(sys, 'argv', ['coord_check.py', *flags(data_dir, tmp_path, **changes)])
        return main(), capsys.readouterr().out
    code, out = main_with(axes='laziness,density', parameterization='completep_supar', depths='2,4,8,16', seeds=3)
    assert code == 0 and out.count('\nPASS  ') == 3, out
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'coord_check.csv', 'density.png', 'laziness.png', 'laziness_toy.png']
    code, out = main_with(axes='depth', depths='2,4,8', parameterization='mup', control='none')
    assert code == 1 and 'FAIL: ' in out and 'FAIL  depth: mup' in out
    code, out = main_with(axes='width', control='completep_supar', parameterization='completep')
    assert code == 4 and 'INCONCLUSIVE: the control' in out and 'INCONCLUSIVE  width: completep' in out
    done = run('coord_check.py', '--axes=width,hight')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and "axis 'hight' is not known" in done.stderr


@pytest.mark.parametrize('reason, axis, changes', [
    ('saturation', 'width', dict(learning_rate=2.5e-4)), ('divergence', 'depth', dict(learning_rate=2.5e-4)),
    ('noise', 'laziness', dict(seeds=6)), ('curvature', 'width', dict(widths='64,128,256,512,1024')),
    ('control', 'laziness', dict(depths='2,4,8,16,32,64,128')), ('curvature', 'density', dict(n_embd=256))])
def test_what_decides(reason, axis, changes):
    assert reason in REASONS and coord_check.deciding(CoordCheckConfig(), axis, reason) == changes


def test_auto_runs_what_decides(data_dir, tmp_path, monkeypatch, capsys):
    """Over density at the rate 1e-2 nothing is decided; at a quarter of it the rules pass."""
    arguments = flags(data_dir, tmp_path, axes='density', parameterization='supar', learning_rate=1e-2, steps=10,
                      seeds=3, densities='0.0625,0.125,0.25,0.5,1', control='none', auto=True)
    monkeypatch.setattr(sys, 'argv', ['coord_check.py', *arguments])
    code, out = main(), capsys.readouterr().out
    assert code == 0 and out.count('INCONCLUSIVE: ') == 1 and out.count('PASS: all') == 1
    assert '\nauto: once more, with learning_rate=0.0025\n' in out
    assert re.fullmatch('PASS  density: supar.* auto: learning_rate=0.0025', out.splitlines()[-1])


@pytest.mark.parametrize('changes, message', [
    (dict(axes=''), "axis '' is not known: use width, depth, density, laziness"),
    (dict(widths='64,100,128'), 'n_embd=100 is not allowed: use a multiple of head_dim=16'),
    (dict(widths='64,128'), "widths='64,128' is not allowed: it gives no slope, use at least three different sizes"),
    (dict(widths='64,wide,128'), "widths='64,wide,128' is not a list of ints: write --widths=64,128,256,512"),
    (dict(axes='depth', depths='2,4,4'), 'use at least three different sizes'),
    (dict(axes='depth', depths='0,2,4'), 'n_layer=0 is not allowed'),
    (dict(axes='density', densities='0.5,1,2'), 'density=2.0 is not allowed: use a value in (0, 1]'),
    (dict(axes='density', densities='0,0.5,1'), 'density=0.0 is not allowed'),
    (dict(parameterization='mu'), "parameterization='mu' is not allowed"),
    (dict(control='mu'), "control='mu' is not allowed: use one of '', none, gpt2, sp"),
    (dict(control='completep_supar'), "control='completep_supar' is not allowed: it is what is checked"),
    (dict(beta1=1.0), 'beta1=1.0 is not allowed: use a value in [0, 1)'),
    (dict(axes='laziness', depths='1,2,4'), 'at least 2 layers'),
    (dict(depths='2,4,8'), "depths='2,4,8' is not allowed: it does nothing with axes='width', leave it out or add "),
    (dict(n_embd=64), "n_embd=64 is not allowed: it does nothing with axes='width'"),
    (dict(axes='depth,laziness', n_layer=4), "n_layer=4 is not allowed: it does nothing with axes='depth,laziness'"),
    (dict(axes='density', density=0.5), "density=0.5 is not allowed: it does nothing with axes='density'"),
    (dict(axes='laziness', steps=5), "steps=5 is not allowed: it does nothing with axes='laziness'"),
    (dict(parameterization='completep', alpha=0.75), "alpha=0.75 is not allowed: it does nothing with axes='width'"),
    (dict(clip_norm='scaled'), "clip_norm='scaled' is not allowed: it does nothing without grad_clip"),
    (dict(learning_rate=0.0), 'learning_rate=0.0 is not allowed'),
    (dict(parameterization='mup', alpha=0.75), "ignores depth"),
    (dict(seeds=1), 'seeds=1 is not allowed: use a finite value of at least 2'),
    (dict(steps=0), 'steps=0 is not allowed'),
    (dict(batch_tokens=100), 'batch_tokens=100'),
    (dict(probe_tokens=0), 'probe_tokens=0'),
    (dict(learning_rate=-1.0), 'learning_rate=-1.0'),
    (dict(dataset='nowhere'), 'no dataset'),
    (dict(base_n_embd=256), 'base_n_embd=256 is not allowed: the check sets it'),
    (dict(mask_seed=2), 'mask_seed=2 is not allowed: the check sets it'),
    (dict(dtype='float8'), "dtype='float8' is not allowed"),
    (dict(out_dir='/proc/nowhere'), "out_dir='/proc/nowhere' cannot be written"),
])
def test_bad_input_is_one_line(data_dir, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(sys, 'argv', ['coord_check.py', *flags(data_dir, tmp_path, **{'axes': 'width', **changes})])
    with pytest.raises(UserError, match=re.escape(message)) as error:
        main()
    assert '\n' not in str(error.value)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return dict(hidden=self.linear(x))


@pytest.mark.parametrize('modules, loss, message', [
    (dict(all=''), lambda y: y.sum(), 'a module returns dict, not a tensor'),
    (dict(h='linear'), lambda y: y.sum().item(), 'return the loss as a tensor, without .item'),
    (dict(h='linear'), lambda y: None, r'loss_fn\(-1\) returns None'),
    (dict(h='(linear'), lambda y: y.sum(), "'.linear' .h. is not a regular expression")])
def test_what_cannot_be_measured_is_said(modules, loss, message):
    def make(size):
        model = Pair()
        return model, torch.optim.SGD(model.parameters(), 0.1), lambda step: loss(model(torch.ones(2, 4))['hidden'])
    with pytest.raises(UserError, match=message):
        check(make, [1, 2, 4], modules=modules)


@pytest.mark.parametrize('key, value', [('init_std', 0.0), ('output_mult', 0.0), ('axes', 'width,width')])
def test_values_that_cannot_be_checked(key, value):
    with pytest.raises(UserError, match=f'{key}=.{{1,15}} is not allowed'):
        CoordCheckConfig(**{key: value})
