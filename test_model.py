"""Tests of model.py: the rules against numbers typed by hand, against measurement, and against independent code."""
import math
import re
import shutil
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from configurator import configure
from model import GPT, OPTIMIZERS, PARAMETERIZATIONS, ROLES, GPTConfig, role_of
from nanop import run_log, sampling
from nanop.huggingface import from_hf
from nanop.layers import LOGITS, SparseLinear, alibi_slopes, causal_attention, cross_entropy, flex_alibi, gelu
from nanop.machine import flops_per_token
from train import TrainConfig

ROOT = Path(__file__).resolve().parent
TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_embd=32, head_dim=16,
                 base_n_layer=2, base_n_embd=32, base_head_dim=16)
SAME_AT_BASE = ['sp', 'mup', 'depth_mup', 'completep', 'supar', 'completep_supar']


def make(config=TINY, seed=0, **changes):
    return GPT(replace(config, **changes), torch.Generator().manual_seed(seed))


def make_optimizer(model, weight_decay=0.1, learning_rate=1e-2, eps=1e-8):
    return model.configure_optimizers(weight_decay, learning_rate, (0.9, 0.95), eps, 'cpu')


def batch(config=TINY, B=4, seed=0):
    ids = torch.randint(config.vocab_size, (B, config.block_size + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def train_steps(model, optimizer, steps, config=TINY):
    losses = []
    for step in range(steps):
        loss = model(*batch(config, seed=step))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# -----------------------------------------------------------------------------
# The table

# Typed by hand from the papers' tables, for every parameterization at (m_N, m_L, rho) or (m_N, m_L, rho, alpha):
# init std, lr and weight decay of hidden weights; lr of norms and biases in blocks; eps in blocks, eps elsewhere;
# residual multiplier, logits multiplier
GOLDEN = [
    ((4, 8, 0.25), 'sp',              (1, 1, 1), 1, (1, 1), (1, 1)),
    ((4, 8, 0.25), 'gpt2',            (1, 1, 1), 1, (1, 1), (1, 1)),
    ((4, 8, 0.25), 'mup',             (0.5, 0.25, 4), 1, (0.25, 0.25), (1, 0.25)),
    ((4, 8, 0.25), 'depth_mup',       (0.5, 0.08838834764831843, 4), 0.35355339059327373,
                                      (0.08838834764831843, 0.25), (0.35355339059327373, 0.25)),
    ((4, 8, 0.25), 'completep',       (0.5, 0.25, 4), 1, (0.03125, 0.25), (0.125, 0.25)),
    ((4, 8, 0.25), 'supar',           (1, 1, 1), 1, (0.25, 0.25), (1, 0.25)),  # m_N * rho = 1
    ((4, 8, 0.25), 'completep_supar', (1, 1, 1), 1, (0.03125, 0.25), (0.125, 0.25)),
    ((8, 4, 0.5), 'sp',               (1, 1, 1), 1, (1, 1), (1, 1)),
    ((8, 4, 0.5), 'gpt2',             (1, 1, 1), 1, (1, 1), (1, 1)),
    ((8, 4, 0.5), 'mup',              (0.35355339059327373, 0.125, 8), 1, (0.125, 0.125), (1, 0.125)),
    ((8, 4, 0.5), 'depth_mup',        (0.35355339059327373, 0.0625, 8), 0.5, (0.0625, 0.125), (0.5, 0.125)),
    ((8, 4, 0.5), 'completep',        (0.35355339059327373, 0.125, 8), 1, (0.03125, 0.125), (0.25, 0.125)),
    ((8, 4, 0.5), 'supar',            (0.5, 0.25, 4), 1, (0.125, 0.125), (1, 0.125)),
    ((8, 4, 0.5), 'completep_supar',  (0.5, 0.25, 4), 1, (0.03125, 0.125), (0.25, 0.125)),
    # at alpha = 3/4
    ((4, 8, 0.25, 0.75), 'depth_mup', (0.5, 0.14865088937534013, 4), 0.5946035575013605,
                                      (0.05255602595335716, 0.25), (0.21022410381342863, 0.25)),
    ((4, 8, 0.25, 0.75), 'completep', (0.5, 0.14865088937534013, 4), 0.5946035575013605,
                                      (0.05255602595335716, 0.25), (0.21022410381342863, 0.25)),
    ((4, 8, 0.25, 0.75), 'completep_supar', (1, 0.5946035575013605, 1), 0.5946035575013605,
                                            (0.05255602595335716, 0.25), (0.21022410381342863, 0.25)),
]
GPT2_PROJECTIONS = {8: 0.17677669529663687, 4: 0.25}  # 1/sqrt(2 n_layer) for n_layer = 2 m_L
BIG = replace(TINY, n_layer=16, n_embd=128, density=0.25)


@pytest.mark.parametrize('at, name, hidden, vector_lr, eps, forward', GOLDEN)
def test_golden_multipliers(at, name, hidden, vector_lr, eps, forward):
    m_N, m_L, rho, alpha = (*at, 0.0)[:4]
    rules = replace(TINY, n_embd=32 * m_N, n_layer=2 * m_L, density=rho, alpha=alpha, parameterization=name).rules
    std, lr, weight_decay = hidden
    inside, outside = eps
    projections = std * GPT2_PROJECTIONS[m_L] if name == 'gpt2' else std
    expected = dict(
        embedding=(1, 1, 1, outside, 1), block_norm=(0, vector_lr, 0, inside, 1),
        qk_norm=(0, vector_lr, 0, forward[0], 1),  # its eps does not depend on width: arXiv:2512.22382
        hidden_weight=(std, lr, weight_decay, inside, 1), residual_proj=(projections, lr, weight_decay, inside, 1),
        kv_weight=(std, lr, weight_decay, forward[0], 1), kv_bias=(0, vector_lr, 0, forward[0], 1),  # of fixed d_kv
        hidden_bias=(0, vector_lr, 0, inside, 1), final_norm=(0, 1, 0, outside, 1),
        unembedding=(1, 1, 1, outside, forward[1]))
    assert set(expected) == set(ROLES)
    for role in ROLES:
        assert rules[role][:5] == pytest.approx(expected[role], rel=1e-12), role
        muon = (vector_lr, 1, forward[0]) if role in ('hidden_weight', 'residual_proj', 'kv_weight') else None
        assert rules[role].muon == (muon and pytest.approx(muon, rel=1e-12)), role
    assert rules['residual_branch'].forward == pytest.approx(forward[0], rel=1e-12)


def test_golden_multipliers_elsewhere():
    rules = replace(TINY, density=0.125, parameterization='supar').rules  # at the base's width and depth
    assert rules['hidden_weight'].lr == pytest.approx(8, rel=1e-12)
    assert rules['hidden_weight'].init_std == pytest.approx(2.8284271247461903, rel=1e-12)
    assert rules['hidden_weight'].weight_decay == pytest.approx(0.125, rel=1e-12)
    rules = replace(TINY, n_embd=16, n_layer=1, parameterization='completep').rules  # smaller than the base
    assert rules['hidden_weight'][:4] == pytest.approx((2 ** 0.5, 2, 0.5, 4), rel=1e-12)
    assert rules['residual_branch'].forward == 2


# Typed by hand for base 2 layers of 2 heads x 16: eps of shared keys and values is 1 / (their width x depth), as in
# Table 1 of arXiv:2512.05620, and eps of QK norms 1 / (head_dim x depth); the other factors are those of hidden weights
@pytest.mark.parametrize('changes, kv, kv_sgd, qk_norm_eps', [
    (dict(n_kv_head=1), (0.5, 0.25, 4, 0.125), (2, 0.5), 0.125),                       # one head at every width
    (dict(n_kv_head=4, base_n_kv_head=1), (0.5, 0.25, 4, 0.03125), (8, 0.125), 0.125),  # two query heads a group
    (dict(n_kv_head=8, base_n_kv_head=2), (0.5, 0.25, 4, 0.03125), (8, 0.125), 0.125),  # one, as without n_kv_head
    (dict(n_kv_head=2, base_n_kv_head=1), (0.5, 0.25, 4, 0.0625), (4, 0.25), 0.125),
    (dict(n_kv_head=1, head_dim=64), (0.5, 0.25, 4, 0.03125), (8, 0.125), 0.03125),
    (dict(n_kv_head=1, parameterization='mup'), (0.5, 0.25, 4, 1), (0.25, 4), 1),
    (dict(n_kv_head=1, density=0.25, parameterization='supar'), (1, 1, 1, 1), (1, 1), 1),
    (dict(n_kv_head=4, base_n_kv_head=1, head_dim=32, parameterization='sp'), (1, 1, 1, 1), (1, 1), 1)])
def test_golden_multipliers_of_shared_keys_and_values_and_of_qk_norms(changes, kv, kv_sgd, qk_norm_eps):
    rules = replace(TINY, **dict(n_embd=128, n_layer=16) | changes).rules  # 8 heads of 16
    std, lr, decay, eps = kv
    assert rules['kv_weight'][:5] == pytest.approx((std, lr, decay, eps, 1), rel=1e-12)
    assert rules['kv_bias'][:5] == pytest.approx((0, 1, 0, eps, 1), rel=1e-12)
    assert rules['kv_weight'].muon == rules['hidden_weight'].muon
    assert OPTIMIZERS['sgd'](rules['kv_weight'])[:2] == pytest.approx(kv_sgd, rel=1e-12)
    assert rules['qk_norm'].eps == pytest.approx(qk_norm_eps, rel=1e-12)


@pytest.mark.parametrize('alpha', [0.5, 0.6, 0.75, 1.0])
def test_identities_of_the_table(alpha):
    config = replace(TINY, parameterization='completep', alpha=alpha)
    one_hop = replace(config, n_layer=16, n_embd=128).rules
    wide, deep = replace(config, n_embd=128).rules, replace(config, n_layer=16).rules
    for role in ROLES:  # the factors for width and for depth multiply
        for both, w, d in zip(one_hop[role][:5], wide[role], deep[role]):
            assert both == pytest.approx(w * d, rel=1e-12)
    assert deep['residual_branch'].forward * deep['hidden_weight'].lr == pytest.approx(1 / 8, rel=1e-12)
    assert wide['hidden_weight'].lr * wide['hidden_weight'].weight_decay == pytest.approx(1, rel=1e-12)
    if alpha == 1:
        assert all(deep[role].lr == 1 for role in ROLES)


def test_attention_scale_is_relative_to_the_base():
    def scale(name, head_dim):
        return make(parameterization=name, head_dim=head_dim, n_embd=64).transformer.h[0].attn.logit_mult
    for name in PARAMETERIZATIONS:
        assert scale(name, 16) == 0.25  # 1/sqrt(16) at the base head_dim, at any width
    assert scale('sp', 64) == scale('gpt2', 64) == 0.125  # 1/sqrt(64)
    assert scale('completep', 64) == scale('mup', 64) == 0.0625  # 1/4 * 16/64
    assert make(attn_mult=3.0).transformer.h[0].attn.logit_mult == 0.75


# -----------------------------------------------------------------------------
# Roles


@pytest.mark.parametrize('tie_weights', [False, True])
def test_every_parameter_has_one_role_and_every_role_parameters(tie_weights):
    model = make(tie_weights=tie_weights, qk_norm=True, n_kv_head=1)
    roles = {role_of(name) for name, _ in model.weights()}
    assert roles == set(ROLES) - ({'unembedding'} if tie_weights else set())
    groups = make_optimizer(model).param_groups
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for _, p in model.weights())  # every tensor is in exactly one group
    assert len({group['role'] for group in groups}) == len(groups)


def test_a_parameter_without_exactly_one_role_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="'transformer.h.0.attn.c_new.weight' matches 0 roles"):
        role_of('transformer.h.0.attn.c_new.weight')
    monkeypatch.setitem(ROLES, 'greedy', r'lm_head.*')
    with pytest.raises(ValueError, match="'lm_head.weight' matches 2 roles"):
        make()


# -----------------------------------------------------------------------------
# Base equivalence


@pytest.mark.parametrize('tie_weights', [False, True])
def test_base_equivalence(tie_weights):
    def run(name):
        model = make(parameterization=name, tie_weights=tie_weights, input_mult=1.5, output_mult=2.0)
        optimizer = make_optimizer(model)
        groups = [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]
        logits = model(batch()[0])[0]
        return model.state_dict(), logits, groups, train_steps(model, optimizer, 10), model.state_dict()
    reference = run('sp')
    for name in SAME_AT_BASE[1:]:
        init, logits, groups, losses, trained = run(name)
        assert groups == reference[2], name
        assert torch.equal(logits, reference[1]), name
        assert losses == reference[3], name
        for state, expected in ((init, reference[0]), (trained, reference[4])):
            assert all(torch.equal(state[key], expected[key]) for key in expected), name
    assert run('gpt2')[3] != reference[3]  # the comparison can fail: gpt2 has another init


def test_parameterizations_differ_away_from_the_base():
    shape = dict(n_embd=64, n_layer=4, density=0.5)
    losses = {name: tuple(train_steps(m := make(parameterization=name, **shape), make_optimizer(m), 3))
              for name in PARAMETERIZATIONS}
    assert len(set(losses.values())) == len(PARAMETERIZATIONS)


# -----------------------------------------------------------------------------
# Init and optimizer, measured


@pytest.mark.parametrize('name', PARAMETERIZATIONS)
def test_measured_init_std(name):
    model = make(n_layer=4, n_embd=128, vocab_size=256, block_size=64, density=0.25, parameterization=name)
    rules = model.config.rules
    for key, p in model.weights():
        role = role_of(key)
        if p.dim() == 2:
            values = p[p != 0]  # without the masked entries
            expected = 0.02 * rules[role].init_std
            assert values.std().item() == pytest.approx(expected, rel=0.05), key
            assert abs(values.mean().item()) < 0.1 * expected, key
        else:
            assert torch.equal(p, torch.ones_like(p) if role.endswith('norm') and 'weight' in key else
                               torch.zeros_like(p)), key
    gpt2 = math.sqrt(8) if name == 'gpt2' else 1
    assert rules['residual_proj'].init_std == pytest.approx(rules['hidden_weight'].init_std / gpt2)


def test_exact_hyperparameters_per_tensor():
    """The real optimizer's groups at m_N = 4, m_L = 4, rho = 1/2, for base values lr 0.01, decay 0.1, eps 1e-8."""
    model = make(n_layer=8, n_embd=128, density=0.5, parameterization='completep_supar')
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group['lr'], group['weight_decay'], group['eps'])
             for group in make_optimizer(model).param_groups for p in group['params']}
    expected = {
        'transformer.wte.weight': (0.01, 0.1, 2.5e-9), 'transformer.wpe.weight': (0.01, 0.1, 2.5e-9),
        'transformer.ln_f.weight': (0.01, 0, 2.5e-9), 'transformer.ln_f.bias': (0.01, 0, 2.5e-9),
        'lm_head.weight': (0.01, 0.1, 2.5e-9)}
    for layer in range(8):
        for part in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'):
            expected[f'transformer.h.{layer}.{part}.weight'] = (0.005, 0.2, 6.25e-10)
            expected[f'transformer.h.{layer}.{part}.bias'] = (0.01, 0, 6.25e-10)
        for part in ('ln_1', 'ln_2'):
            for kind in ('weight', 'bias'):
                expected[f'transformer.h.{layer}.{part}.{kind}'] = (0.01, 0, 6.25e-10)
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    for group in make_optimizer(model).param_groups:
        assert group['lr'] == pytest.approx(0.01 * group['lr_scale'], rel=1e-12)
    for device_type, fused in (('cpu', True), ('cuda', True), ('mps', False)):
        assert model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, device_type).defaults['fused'] is fused


def test_describe_shows_what_the_optimizer_has():
    model = make(n_layer=8, n_embd=128, parameterization='completep')
    lines = run_log.describe(model, make_optimizer(model)).splitlines()
    row = next(line for line in lines if line.startswith('hidden_weight')).split()
    assert row == ['hidden_weight', f'{8 * 7 * 128 * 128:,}', '0.01', '0.0025', '0.4', '0.001', '6.25e-10', '1']
    assert [line.split()[0] for line in lines[1:]] == [
        role for role in model.config.rules if role not in ('qk_norm', 'kv_weight', 'kv_bias')]
    bare = make(qk_norm=True, norm_gain=False, bias=False, tie_weights=True)
    shown = [line.split()[0] for line in run_log.describe(bare, make_optimizer(bare)).splitlines()[1:]]
    assert shown == ['embedding', 'hidden_weight', 'residual_proj', 'unembedding', 'residual_branch',
                     'attention_logits']
    assert next(line for line in lines if line.startswith('residual_branch')).split()[-1] == '0.25'
    other = make(n_layer=8, n_embd=128, parameterization='completep', zero_init_unembed=True)
    for name, hidden, unembedding in (
            ('sgd', '0.01 0.04 0.025 0.01 - 1', '0 0.04 0.025 0.01 - 0.25'),
            ('muon', '0.01 0.05 0.02 0.001 2.5e-09 1', '0 0.01 0.1 0.001 2.5e-09 0.25')):
        optimizer = other.configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, 'cpu', name, 5.0)
        shown = {line.split()[0]: line.split()[2:] for line in run_log.describe(other, optimizer).splitlines()}
        assert (shown['hidden_weight'], shown['unembedding']) == (hidden.split(), unembedding.split()), name


def gradient_rms(**shape):
    """RMS of the gradient at init by role, over three seeds."""
    total = {}
    for seed in range(3):
        model = make(seed=seed, vocab_size=256, block_size=64, qk_norm=True, **shape)
        model(*batch(model.config, B=8, seed=seed))[1].backward()
        for name, p in model.weights():
            if not name.endswith('c_attn.bias'):  # the key bias has no gradient: softmax does not depend on it
                total.setdefault(role_of(name), []).append(p.grad.square().mean())
    return {role: torch.stack(values).mean().sqrt().item() for role, values in total.items()}


def slope(sizes, values):
    """Least-squares slope of log value over log size."""
    x = torch.tensor(sizes).double().log()
    y = torch.tensor(values).double().log()
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def attention_gradients(n_embd, seed, steps, **shape):
    """RMS of the gradients of queries, shared keys and shared values after AdamW steps on one batch."""
    model = make(vocab_size=256, block_size=64, init_std=0.1, seed=seed, n_embd=n_embd, base_n_embd=64, **shape)
    optimizer, data = make_optimizer(model, weight_decay=0.0, learning_rate=2**-6, eps=1e-12), batch(model.config, B=8)
    for step in range(steps + 1):
        optimizer.zero_grad()
        model(*data)[1].backward()
        if step < steps:
            optimizer.step()
    grads = {}
    for name, p in model.named_parameters():
        if name.endswith(('c_attn.weight', 'c_kv.weight')):
            for part, grad in zip('q' if 'c_attn' in name else 'kv', p.grad.split(model.get_submodule(name[:-7]).rows)):
                grads.setdefault(part, []).append(grad.square().mean())
    return {part: torch.stack(values).mean().sqrt().item() for part, values in grads.items()}


def test_shared_keys_and_values_get_the_eps_of_heads_that_agree():
    """While two key heads serve more and more query heads, gradients of keys and values rise against the queries': as
    width^1/2 at init, where heads add up at random, and those of values as width once they agree. eps follows that."""
    sizes = [64, 128, 256]

    def rise(part, steps):
        runs = [[attention_gradients(n, seed, steps, n_kv_head=2) for seed in range(3)] for n in sizes]
        return slope(sizes, [sum(run[part] for run in each) / sum(run['q'] for run in each) for each in runs])
    rules = [replace(TINY, n_embd=n, base_n_embd=64, n_kv_head=2).rules for n in sizes]
    eps = slope(sizes, [each['kv_weight'].eps / each['hidden_weight'].eps for each in rules])
    assert rise('v', 0) == pytest.approx(0.5, abs=0.2) and rise('k', 0) == pytest.approx(0.5, abs=0.2)
    assert rise('v', 1) == pytest.approx(eps, abs=0.25) and 0.4 < rise('k', 1) < eps + 0.25


def test_gradient_of_qk_norms_falls_as_eps_does_with_head_dim():
    sizes = [16, 32, 64]
    runs = [gradient_rms(n_embd=128, head_dim=size)['qk_norm'] for size in sizes]
    eps = [replace(TINY, n_embd=128, head_dim=size, qk_norm=True).rules['qk_norm'].eps for size in sizes]
    assert slope(sizes, runs) == pytest.approx(slope(sizes, eps), abs=0.15)
    blind = [gradient_rms(n_embd=128, head_dim=size, parameterization='sp')['qk_norm'] for size in sizes]
    assert slope(sizes, blind) > -0.7  # the control: logits that fall as head_dim^-1/2


def test_gradient_falls_as_eps_does_with_width():
    sizes = [64, 128, 256, 512]
    runs = [gradient_rms(n_embd=n, n_layer=2, base_n_embd=64, base_head_dim=16, parameterization='completep')
            for n in sizes]
    for role in set(ROLES) - {'kv_weight', 'kv_bias'}:  # of which is the test above
        # The heads that share a QK norm have uncorrelated gradients here, which gives -0.5. Its rule, 0, is for heads
        # whose gradients agree.
        expected = -0.5 if role == 'qk_norm' else -1
        assert slope(sizes, [run[role] for run in runs]) == pytest.approx(expected, abs=0.15), role
    blind = [gradient_rms(n_embd=n, n_layer=2, parameterization='sp') for n in sizes[:3]]
    assert abs(slope(sizes[:3], [run['unembedding'] for run in blind])) < 0.15  # the control stays flat


@pytest.mark.parametrize('name, inside, tolerance', [('completep', -1, 0.25), ('depth_mup', -0.5, 0.15)])
def test_gradient_falls_as_eps_does_with_depth(name, inside, tolerance):
    sizes = [2, 4, 8, 16]
    runs = [gradient_rms(n_embd=64, n_layer=n, n_kv_head=2, parameterization=name) for n in sizes]
    for role in ROLES:
        expected, within = (0, 0.15) if role in ('embedding', 'final_norm', 'unembedding') else (inside, tolerance)
        assert slope(sizes, [run[role] for run in runs]) == pytest.approx(expected, abs=within), role


@pytest.mark.parametrize('alpha', [1.0, 0.5])
def test_first_step_moves_hidden_weights_by_their_learning_rate(alpha):
    """AdamW's first step moves every element by about lr, which scales as 1/m_N and m_L^(alpha - 1)."""
    def moved(**shape):
        model = make(parameterization='completep', alpha=alpha, **shape)
        optimizer = make_optimizer(model, weight_decay=0.0, eps=1e-16)
        before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
        train_steps(model, optimizer, 1)
        return (model.transformer.h[0].mlp.c_fc.weight - before).square().mean().sqrt().item()
    base = moved()
    assert moved(n_embd=128) / base == pytest.approx(1 / 4, rel=0.02)
    assert moved(n_layer=8) / base == pytest.approx(4 ** (alpha - 1), rel=0.02)


# -----------------------------------------------------------------------------
# Forward


def reference_logits(model, idx):
    """Logits of a second implementation, written from the papers: matrix products, none of the model's modules."""
    c, p = model.config, dict(model.named_parameters())
    m_N, m_L, alpha = c.n_embd / c.base_n_embd, c.n_layer / c.base_n_layer, c.alpha or 1.0
    T = idx.shape[1]

    def norm(x, name):
        if c.norm == 'layernorm':
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * p.get(f'{name}.weight', 1) + p.get(f'{name}.bias', 0)

    def linear(x, name):
        return x @ p[f'{name}.weight'].T + p.get(f'{name}.bias', 0)

    def activation(y):
        if c.activation == 'swiglu':
            gate, y = y.tensor_split(2, dim=-1)
            return y * gate / (1 + (-gate).exp())
        if c.activation == 'gelu':
            return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3)))
        return y.clamp(min=0) ** (2 if c.activation == 'relu2' else 1)

    def turned(x):  # RoPE in complex numbers, position by position
        if c.pos != 'rope':
            return x
        z = torch.complex(x[..., :c.head_dim // 2], x[..., c.head_dim // 2:])
        z = torch.stack([z[:, t] * torch.tensor([complex(math.cos(t * w), math.sin(t * w)) for w in (
            10000 ** (-2 * i / c.head_dim) for i in range(c.head_dim // 2))]) for t in range(T)], dim=1)
        return torch.cat([z.real, z.imag], -1)

    scale = {'base': math.sqrt(c.base_head_dim) / c.head_dim, '1/sqrt_d': c.head_dim ** -0.5, '1/d': 1 / c.head_dim,
             '1/N': 1 / c.n_embd}[c.attn_scale]
    positions = p['transformer.wpe.weight'][:T] if c.pos == 'learned' else 0
    x = c.input_mult * (p['transformer.wte.weight'][idx] + positions)
    kv_heads = c.n_kv_head or c.n_head
    for layer in range(c.n_layer):
        h = f'transformer.h.{layer}'
        y = norm(x, f'{h}.ln_1')
        q, k, v = torch.cat([linear(y, f'{h}.attn.{name}') for name in ('c_attn', 'c_kv')[:1 + bool(c.n_kv_head)]],
                            dim=-1).split([c.n_embd, kv_heads * c.head_dim, kv_heads * c.head_dim], dim=-1)
        heads = []
        for head in range(c.n_head):
            shared = head // (c.n_head // kv_heads)
            q_h = q[..., head * c.head_dim:(head + 1) * c.head_dim]
            k_h, v_h = (y[..., shared * c.head_dim:(shared + 1) * c.head_dim] for y in (k, v))
            if c.qk_norm:
                q_h, k_h = norm(q_h, f'{h}.attn.q_norm'), norm(k_h, f'{h}.attn.k_norm')
            scores = turned(q_h) @ turned(k_h).mT * c.attn_mult * scale
            if c.pos == 'alibi':
                slope = {4: [1 / 2, 2 ** (-10 / 3), 2 ** (-17 / 3), 1 / 256]}[c.n_head][head]  # of 1/2 .. 1/256
                scores = scores - slope * torch.tensor(
                    [[float(i - j) for j in range(T)] for i in range(T)])
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v_h)
        x = x + m_L ** -alpha * linear(torch.cat(heads, -1), f'{h}.attn.c_proj')
        x = x + m_L ** -alpha * linear(activation(linear(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')), f'{h}.mlp.c_proj')
    unembed = c.output_mult / (m_N if c.unembed_form == 'multiplier' else 1)
    return norm(x, 'transformer.ln_f') @ p.get('lm_head.weight', p['transformer.wte.weight']).T * unembed


VARIANTS = [  # each change from the default alone, then the combinations that the studies use
    dict(norm='rmsnorm'), dict(norm_gain=False), dict(norm='rmsnorm', norm_gain=False), dict(qk_norm=True),
    dict(bias=False), dict(activation='relu'), dict(activation='relu2'), dict(activation='swiglu'), dict(pos='rope'),
    dict(pos='alibi'), dict(pos='none'), dict(n_kv_head=1), dict(n_kv_head=2), dict(attn_scale='1/sqrt_d'),
    dict(attn_scale='1/d'), dict(attn_scale='1/N'), dict(unembed_form='weights'), dict(zero_init_query=True),
    dict(zero_init_unembed=True), dict(tie_weights=True),
    dict(norm='rmsnorm', qk_norm=True, pos='rope', n_kv_head=1, activation='swiglu', bias=False),
    dict(pos='alibi', activation='relu2', attn_scale='1/N', n_kv_head=2, norm='rmsnorm')]


def skip_without_its_package(optimizer):
    if optimizer == 'lion':
        pytest.importorskip('lion_pytorch', reason='needs lion-pytorch (requirements-dev.txt)')


def label(variant):
    return ','.join(f'{key}={value}' for key, value in variant.items())


def stir(model):
    """Add noise to all parameters, so that gains are not ones and biases are not zeros. Returns the model."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize('variant', [{}, dict(alpha=0.5), *VARIANTS], ids=label)
def test_forward_against_a_second_implementation(variant):
    model = stir(make(n_layer=6, n_embd=128, head_dim=32, input_mult=3.0, attn_mult=2.0, output_mult=5.0, init_std=0.3,
                      **variant))
    with torch.no_grad():
        idx = batch()[0]
        expected = reference_logits(model, idx)
        torch.testing.assert_close(model(idx)[0], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('variant', VARIANTS, ids=label)
def test_every_variant_is_one_model_at_the_base_and_keeps_the_rules_elsewhere(variant):
    def run(name, **shape):
        model = make(parameterization=name, **variant, **shape)
        losses = train_steps(model, make_optimizer(model), 3)
        return losses, model
    assert all(run(name)[0] == run('sp')[0] for name in SAME_AT_BASE[1:])
    density = dict(density=0.5) if 'bias' not in variant else {}
    losses, model = run('completep_supar', n_embd=64, n_layer=4, **density)
    assert losses != run('sp', n_embd=64, n_layer=4, **density)[0] and losses[0] == pytest.approx(math.log(64), rel=0.1)
    before = model(batch()[0])[0]
    changed = batch()[0].clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 64
    torch.testing.assert_close(model(changed)[0][:, :10], before[:, :10])  # causal
    assert not torch.allclose(model(changed)[0][:, 10:], before[:, 10:])


def test_the_two_forms_of_the_unembedding_train_alike():
    """abc symmetry: under Adam, a factor on the logits is a factor on init and lr, and its inverse on decay and eps."""
    shape = dict(n_embd=128, init_std=0.1, output_mult=2.0)
    models = [make(unembed_form=form, **shape) for form in ('multiplier', 'weights')]
    assert models[1].config.rules['unembedding'][:5] == pytest.approx((1 / 4, 1 / 4, 4, 1, 1))  # init variance 1/16
    assert models[0].config.rules['unembedding'][:5] == pytest.approx((1, 1, 1, 1 / 4, 1 / 4))
    torch.testing.assert_close(4 * models[1].lm_head.weight, models[0].lm_head.weight)
    losses = [train_steps(model, make_optimizer(model, eps=1e-3), 20) for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] - 0.05
    torch.testing.assert_close(4 * models[1].lm_head.weight, models[0].lm_head.weight, rtol=1e-3, atol=1e-4)


def test_zero_init():
    for variant in (dict(), dict(n_kv_head=1)):
        model, plain = make(zero_init_query=True, zero_init_unembed=True, **variant), make(**variant)
        for name, p in plain.weights():
            ours = model.get_parameter(name)
            if name.endswith('attn.c_attn.weight'):
                assert not ours[:32].any() and torch.equal(ours[32:], p[32:]) and p[:32].any()
            else:
                assert torch.equal(ours, p if name != 'lm_head.weight' else torch.zeros_like(p))
        train_steps(model, make_optimizer(model), 3)
        assert model.transformer.h[0].attn.c_attn.weight[:32].any() and model.lm_head.weight.any()


def test_zero_queries_go_with_any_multiplier_of_their_logits():
    models = [make(zero_init_query=True, attn_mult=mult) for mult in (0.5, 8.0)]
    first, second = (train_steps(model, make_optimizer(model), 4) for model in models)
    assert first[0] == second[0] and first[3] != second[3]  # logits are zero for any multiplier until queries move


def test_counts_of_variants():
    """Counted by hand for N = 32: c_attn has 3 N^2 weights, the MLP 8 N^2."""
    def differ(**variant):
        return make().num_params() - make(**variant).num_params()
    assert differ(pos='rope') == differ(pos='alibi') == differ(pos='none') == 16 * 32
    assert flops_per_token(make(pos='none')) == flops_per_token(make())
    assert differ(n_kv_head=1) == 2 * 2 * (16 * 32 + 16)  # one key head and one value head fewer, with biases
    assert differ(norm_gain=False) == 5 * 2 * 32 and differ(norm='rmsnorm') == 5 * 32
    assert differ(qk_norm=True) == -2 * 2 * 16
    assert differ(activation='swiglu', bias=False) - differ(bias=False) == 2 * 32 * (8 * 32 - 3 * 88)  # 8/3 N = 85.3
    assert make(activation='swiglu', n_embd=96, head_dim=16, bias=False).num_params() == make(
        n_embd=96, head_dim=16, bias=False).num_params()


@pytest.mark.parametrize('name', PARAMETERIZATIONS)
def test_training_and_sampling_see_the_same_logits(name):
    """At m_N = 8, where a logit multiplier that is applied only when targets are given would show."""
    model = make(n_embd=256, parameterization=name, init_std=0.2)
    inputs, targets = batch()
    logits, no_loss = model(inputs)
    assert no_loss is None and logits.shape == (4, 16, 64)
    loss = model(inputs, targets)[1]
    assert loss.item() == pytest.approx(F.cross_entropy(logits.view(-1, 64), targets.reshape(-1)).item(), rel=1e-6)
    greedy = model.generate(inputs, 1, temperature=0)
    assert torch.equal(greedy[:, -1], logits[:, -1].argmax(-1))
    sharp = model.unembed(model.features(inputs))
    assert torch.equal(sharp, logits)


def test_targets_of_minus_one_are_ignored():
    model = make()
    inputs, targets = batch()
    masked = targets.clone()
    masked[:, 8:] = -1
    logits = model(inputs)[0][:, :8]
    expected = F.cross_entropy(logits.reshape(-1, 64), targets[:, :8].reshape(-1))
    assert model(inputs, masked)[1].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize('T, kv_heads', [(1, 4), (5, 4), (128, 2), (300, 4), (300, 1)])
def test_attention_on_a_cpu_in_bf16(T, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(2, heads, T, 16, dtype=torch.float64, generator=generator)
                   for heads in (4, kv_heads, kv_heads, 4))

    def run(attention, dtype):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs)
        y.backward(dy.to(dtype))
        return [y.detach().double(), *(x.grad.double() for x in inputs)]

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    def ours(q, k, v):
        return causal_attention(q, k, v, scale=0.3)

    exact = run(torchs, torch.float64)
    for expected, x, other in zip(exact, run(ours, torch.bfloat16), run(torchs, torch.bfloat16)):
        error, torchs_error = ((value - expected).norm() for value in (x, other))
        assert error <= 2 * torchs_error + 1e-3 * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(exact, run(ours, torch.float64)))


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_alibi_by_flex_attention_is_alibi_by_a_mask(kv_heads, monkeypatch):
    """The GPU path gives the same result on the CPU, uncompiled, and compiles into one graph."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 64, 16, generator=generator) for heads in (4, kv_heads, kv_heads))
    expected = causal_attention(q, k, v, 0.3, alibi=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # flex_attention warns that it is slow uncompiled
        torch.testing.assert_close(flex_alibi(q, k, v, 0.3), expected)
    torch.compiler.reset()
    graphs = []
    compiled = torch.compile(flex_alibi, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(q, k, v, 0.3), expected)
    assert len(graphs) == 1
    assert not torch.allclose(causal_attention(q, k, v, 0.3), expected, atol=1e-2)  # without ALiBi the result differs


def test_layers_share_one_alibi_mask(monkeypatch):
    """An uncompiled model keeps one mask for its backward, not one in each layer."""
    masks, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, mask, *rest, **options: masks.append(mask) or
                        attention(q, k, v, mask, *rest, **options))
    make(n_layer=3, pos='alibi')(*batch())
    assert masks[0].shape == (2, 16, 16) and len(masks) == 3 and all(mask is masks[0] for mask in masks)


@pytest.mark.parametrize('dtype, kv_heads', [(torch.float32, 4), (torch.bfloat16, 2)])
def test_shared_keys_have_a_kernel_on_cuda(dtype, kv_heads, monkeypatch):
    """In float32 no kernel of CUDA knows groups of query heads, so keys are repeated. Shapes only, without a GPU."""
    seen = []
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, *_, enable_gqa, **__: seen.extend(
        (k.size(1), enable_gqa)) or q)
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, 8, 16, dtype=dtype, device='cuda') for heads in (4, 2))
        causal_attention(q, k, k, 0.3)
    assert seen == [kv_heads, kv_heads == 2]


@pytest.mark.parametrize('n_head, exponents', [
    (1, [1]), (2, [1, 8]), (3, [1, 4.5, 8]), (8, [1, 2, 3, 4, 5, 6, 7, 8]),  # fewer than 8 heads keep the range of 8
    (16, [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8])])  # the paper's
def test_alibi_slopes(n_head, exponents):
    assert torch.equal(alibi_slopes(n_head, 'cpu'), torch.tensor([2.0 ** -e for e in exponents]))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gelu_traced_on_a_cpu_is_gpt2s(dtype, tolerance):
    graphs = []
    torch.compiler.reset()
    traced = torch.compile(gelu, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    x = torch.linspace(-30, 30, 6001, dtype=dtype, requires_grad=True)
    y, expected = traced(x), F.gelu(x, approximate='tanh')
    assert 'sigmoid' in graphs[0].code
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    slope, other = (torch.autograd.grad(value.sum(), x)[0] for value in (y, expected))
    torch.testing.assert_close(slope, other, rtol=10 * tolerance, atol=10 * tolerance)
    assert torch.equal(gelu(x), expected)  # uncompiled, gelu is PyTorch's


@pytest.mark.parametrize('rows', [1, 3.5])  # as multiples of the rows that are computed at a time
def test_cross_entropy_on_a_cpu_in_bf16(rows):
    generator = torch.Generator().manual_seed(0)
    V = 1000
    logits = torch.randn(2, int(rows * (LOGITS // V)) // 2, V, generator=generator).bfloat16() * 3
    targets = torch.randint(0, V, logits.shape[:2], generator=generator)
    targets[0, 3:50] = -1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.view(-1, V), targets.view(-1), ignore_index=-1)
    (expected / 4).backward()
    with torch.no_grad():
        kept = logits.clone()
        assert cross_entropy(kept, targets).item() == pytest.approx(expected.item(), rel=1e-6)
        assert torch.equal(kept, logits)  # overwritten only if a gradient is needed
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf * 1, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss / 4).backward()
    assert (leaf.grad - exact.grad).abs().max() < 2**-8 * exact.grad.abs().max()
    assert (leaf.grad[0, 3:50] == 0).all()
    targets[0, 0] = -100  # only -1 is ignored
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(logits, targets)


def test_causality():
    model = make()
    idx = batch()[0]
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 64
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_too_long_a_sequence_is_an_error():
    with pytest.raises(ValueError, match='17 tokens is longer than block_size=16'):
        make()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize('name', PARAMETERIZATIONS)
def test_overfits_one_batch(name):
    model = make(parameterization=name, n_layer=4, n_embd=64)
    optimizer = make_optimizer(model, weight_decay=0.0)
    first = model(*batch())[1].item()
    for _ in range(60):
        loss = model(*batch())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first > 4 and loss.item() < 0.2


# -----------------------------------------------------------------------------
# Sparsity


def masks(model):
    return {name: m.mask for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def test_masks_depend_on_mask_seed_alone_and_have_the_density():
    first, other_init, other_mask = make(BIG, seed=0), make(BIG, seed=1), make(BIG, mask_seed=2)
    assert len(masks(first)) == 16 * 4
    total = sum(mask.numel() for mask in masks(first).values())
    kept = sum(mask.sum().item() for mask in masks(first).values())
    assert abs(kept - total / 4) < 4 * math.sqrt(total * 0.25 * 0.75)
    for name, mask in masks(first).items():
        assert torch.equal(mask, masks(other_init)[name])
        assert not torch.equal(mask, masks(other_mask)[name])


def test_mask_survives_save_and_load():
    model = make(density=0.5)
    other = make(density=0.5, mask_seed=9, seed=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(batch()[0])[0], other(batch()[0])[0])
    assert 'transformer.h.0.attn.c_attn.mask' in model.state_dict()


def test_masked_weights_stay_exactly_zero():
    model = make(density=0.5, parameterization='supar')
    before = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    train_steps(model, make_optimizer(model, weight_decay=0.5), 5)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            assert module.weight[~module.mask].abs().max() == 0
            assert (module.weight != before[name])[module.mask].float().mean() > 0.99


def test_density_one_has_no_masks():
    assert not masks(make(parameterization='supar'))


# -----------------------------------------------------------------------------
# Sampling


def test_sampling_is_without_cudnn(monkeypatch):
    """cuDNN would make a plan for every number of keys. What the caller does between two tokens is as he set it."""
    model, seen = make(), []
    features = model.features
    monkeypatch.setattr(model, 'features', lambda ids: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or
                        features(ids))
    for _ in sampling.stream(model.eval(), batch(B=1)[0][:, :3], 4):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [False] * 4


def test_generate_never_samples_padding():
    model = make(real_vocab_size=10, init_std=2.0)
    with torch.no_grad():
        model.lm_head.weight[10:] *= 100  # padding would win if it were allowed
    ids = model.generate(torch.zeros(8, 1, dtype=torch.long), 30, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (8, 31) and ids.max() < 10
    assert model.generate(ids, 5, temperature=0).max() < 10
    assert make(init_std=2.0).generate(ids, 30).max() >= 10


@pytest.mark.parametrize('prompt', [1, 5, 16, 20])  # below, at and above block_size = 16
@pytest.mark.parametrize('dtype, variant', [
    (torch.float32, {}), (torch.bfloat16, {}), (torch.float32, dict(pos='rope', n_kv_head=1, qk_norm=True)),
    (torch.float32, dict(pos='alibi')), (torch.bfloat16, dict(pos='alibi', n_kv_head=1))])
def test_sampling_with_cached_keys_and_values_is_sampling_without(prompt, dtype, variant):
    model = make(init_std=0.5, **variant)
    ids, tokens = torch.randint(0, 64, (3, prompt), generator=torch.Generator().manual_seed(0)), []
    seen, features = [], model.features
    model.features = lambda idx: seen.append(idx.size(1)) or features(idx)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        cached = model.generate(ids, 20, temperature=0)
        model.features = features
        for _ in range(20):
            logits = model(ids[:, -16:])[0][:, -1]
            top = logits.topk(2).values
            tokens.append(top[:, 0] - top[:, 1] > (1e-4 if dtype == torch.float32 else 0.1))  # near ties are skipped
            ids = cached[:, :ids.size(1) + 1]
            assert torch.equal(ids[:, -1][tokens[-1]], logits.argmax(-1)[tokens[-1]])
    assert torch.stack(tokens).float().mean() > 0.8
    assert seen == [min(prompt, 16)] + [1 if prompt + n <= 16 else 16 for n in range(1, 20)]


def test_generate_is_determined_by_its_generator_and_top_k():
    model = make(init_std=0.5)
    start = batch()[0][:1]

    def sample(seed, **options):
        return model.generate(start, 20, generator=torch.Generator().manual_seed(seed), **options).tolist()
    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_k=1) == sample(2, top_k=1) == sample(3, temperature=0)
    assert sample(1, top_k=10**6) == sample(1)


# -----------------------------------------------------------------------------
# Sizes, config, import


def test_counts():
    """Counted by hand for V = 64, T = 16, N = 32, L = 2: 2VN + TN + L(12 N^2 + 13 N) + 2N."""
    assert make().num_params() == 2 * 64 * 32 + 16 * 32 + 2 * (12 * 32 ** 2 + 13 * 32) + 2 * 32 == 30080
    assert make(tie_weights=True).num_params() == 30080 - 64 * 32
    assert flops_per_token(make()) == 6 * (30080 - 64 * 32 - 16 * 32) + 12 * 2 * 32 * 16
    assert flops_per_token(make(tie_weights=True)) == flops_per_token(make())


@pytest.mark.parametrize('tie_weights', [False, True])
def test_a_meta_model_can_be_filled_later(tie_weights):
    config = replace(TINY, density=0.5, tie_weights=tie_weights)
    with torch.device('meta'):
        model = GPT(config)
    model.to_empty(device='cpu').init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, make(config).state_dict()[key]) for key, value in model.state_dict().items())
    assert model.num_params() == make(config).num_params()


@pytest.mark.parametrize('changes, message', [
    (dict(parameterization='mpu'), "parameterization='mpu' is not allowed: use one of gpt2, sp, mup"),
    (dict(n_embd=40), 'n_embd=40 is not allowed: use a multiple of head_dim=16'),
    (dict(n_layer=0), 'n_layer=0 is not allowed: use an integer of at least 1'),
    (dict(n_layer='12'), "n_layer='12' is not allowed"),
    (dict(n_embd=32.0), 'n_embd=32.0 is not allowed'),
    (dict(n_layer=True), 'n_layer=True is not allowed'),
    (dict(output_mult=math.inf), 'output_mult=inf is not allowed'),
    (dict(base_n_embd=0), 'base_n_embd=0 is not allowed'),
    (dict(density=0.0), 'density=0.0 is not allowed: use a value in'),
    (dict(density=-0.5), 'density=-0.5 is not allowed'),
    (dict(density=1.5), 'density=1.5 is not allowed'),
    (dict(density=math.nan), 'density=nan is not allowed'),
    (dict(dropout=1.0), 'dropout=1.0 is not allowed'),
    (dict(init_std=-1.0), 'init_std=-1.0 is not allowed'),
    (dict(alpha=0.4), 'alpha=0.4 is not allowed: use a value in'),
    (dict(alpha=0.5, parameterization='mup'), "ignores depth, so alpha would do nothing; leave it out or use "
                                              "depth_mup, completep or completep_supar"),
    (dict(real_vocab_size=65), 'real_vocab_size=65 is not allowed: use 0..64'),
    (dict(norm='batchnorm'), "norm='batchnorm' is not allowed: use one of layernorm, rmsnorm"),
    (dict(activation='silu'), "activation='silu' is not allowed: use one of gelu, relu, relu2, swiglu"),
    (dict(pos='nope'), "pos='nope' is not allowed: use one of learned, rope, alibi, none"),
    (dict(attn_scale='1/n'), "attn_scale='1/n' is not allowed: use one of base, 1/sqrt_d, 1/d, 1/N"),
    (dict(unembed_form='init'), "unembed_form='init' is not allowed: use one of multiplier, weights"),
    (dict(n_embd=96, n_kv_head=4), 'n_kv_head=4 is not allowed: use a divisor of n_head=6'),
    (dict(n_embd=16 * (2**59 - 1), n_kv_head=6), 'n_kv_head=6 is not allowed'),  # at once, whatever the width
    (dict(n_kv_head=-1), 'n_kv_head=-1 is not allowed'),
    (dict(n_layer=2**63), 'is not allowed: use an integer of at least 1, below 2**63'),
    (dict(base_n_kv_head=1), 'base_n_kv_head=1 is not allowed: set n_kv_head, too'),
    (dict(zero_init_query=True, qk_norm=True), 'qk_norm=True is not allowed: it blows up'),
    (dict(pos='rope', head_dim=1), "head_dim=1 is not allowed: pos='rope' needs an even one"),
    (dict(tie_weights=True, zero_init_unembed=True), 'zero_init_unembed=True is not allowed: with tie_weights=True'),
    (dict(tie_weights=True, unembed_form='weights'), "unembed_form='weights' is not allowed: with tie_weights=True"),
])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError) as error:
        replace(TINY, **changes)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.fixture(scope='module')
def tiny_gpt2(tmp_path_factory):
    transformers = pytest.importorskip('transformers', reason='needs transformers (requirements-dev.txt)')
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=100, n_positions=32, initializer_range=0.4)).eval()
    with torch.no_grad():  # the biases start at zero: draw them, too
        for name, p in hf.named_parameters():
            if name.endswith('bias'):
                p.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp('gpt2')
    hf.save_pretrained(folder)
    return hf, str(folder)


def import_gpt2(name, dropout=0.0, block_size=None):
    return from_hf(name, GPT, GPTConfig(parameterization='gpt2', dropout=dropout), block_size)[0]


def test_gpt2_import(tiny_gpt2, tmp_path):
    hf, folder = tiny_gpt2
    model = import_gpt2(folder).eval()
    assert model.lm_head.weight is model.transformer.wte.weight  # still tied: finetuning must not untie them
    idx = torch.randint(100, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(idx).logits
        torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        cropped = import_gpt2(folder, block_size=8).eval()
        torch.testing.assert_close(cropped(idx[:, :8])[0], expected[:, :8], rtol=0,
                                   atol=1e-5 * expected.abs().max().item())
    old = {name.removeprefix('transformer.'): value for name, value in load_file(f'{folder}/model.safetensors').items()}
    masks = {'h.0.attn.bias': torch.ones(1, 1, 32, 32), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    shutil.copytree(folder, tmp_path / 'old')
    save_file(old | masks, tmp_path / 'old' / 'model.safetensors', dict(format='pt'))  # as OpenAI's are stored
    assert torch.equal(import_gpt2(str(tmp_path / 'old')).eval()(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match='block_size=64 is more than the 32 positions'):
        import_gpt2(folder, block_size=64)
    for key, value in dict(n_inner=100, layer_norm_epsilon=1e-6, scale_attn_by_inverse_layer_idx=True).items():
        other = type(hf.config)(n_layer=1, n_embd=64, n_head=4, vocab_size=10, **{key: value})
        type(hf)(other).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"' has {key}={value}, it must be "):
            import_gpt2(str(tmp_path))
    assert model.config.n_head == 4 and model.config.parameterization == 'gpt2'
    assert import_gpt2(folder, dropout=0.3).transformer.drop.p == 0.3


def test_readme_points_at_the_right_lines():
    """docs/rules.md links each row of the papers' tables to its line in model.py."""
    lines = (ROOT / 'model.py').read_text().splitlines()
    rules = (ROOT / 'docs' / 'rules.md').read_text()
    links = re.findall(r'\[model\.py:(\d+)\]\(\.\./model\.py#L(\d+)\) `([^`]+)`', rules)
    assert len(links) == rules.count('model.py#L') > 10
    for shown, anchor, code in links:
        assert shown == anchor and code in lines[int(shown) - 1], (shown, code)


COLUMNS = {'SP': 'sp', 'muP': 'mup', 'CompleteP': 'completep', 'SuPar': 'supar'}
ROWS = {  # row of the README's table: (role, column) of its factor in the rules
    'init std of hidden weights': ('hidden_weight', 'init_std'),
    'learning rate of hidden weights': ('hidden_weight', 'lr'),
    'weight decay of hidden weights': ('hidden_weight', 'weight_decay'),
    "AdamW's eps in the blocks": ('hidden_weight', 'eps'), "AdamW's eps elsewhere": ('embedding', 'eps'),
    'residual branches': ('residual_branch', 'forward'), 'logits': ('unembedding', 'forward'),
    'attention logits, after 1/sqrt(head_dim)': ('attention_logits', 'forward')}


def test_readme_shows_the_rules():
    """Every cell of the README's table is evaluated and compared with scaling_rules."""
    table = re.search(r'\n\| factor on the base value.*?\n\n', (ROOT / 'README.md').read_text(), flags=re.S).group()
    head, _, *rows = [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in table.strip().splitlines()]
    assert head[1:] == list(COLUMNS) and sorted(row[0] for row in rows) == sorted(ROWS)
    for name, *cells in rows:
        role, key = ROWS[name]
        for column, cell in zip(head[1:], cells):
            rules = replace(BIG, head_dim=64, parameterization=COLUMNS[column]).rules
            factor = eval(cell, dict(m_N=4, m_L=8, m_D=4, rho=0.25))
            assert getattr(rules[role], key) == pytest.approx(factor, rel=1e-12), (name, column)


def test_readme_ports_the_same_rules():
    """The parameter groups of the port in docs/rules.md equal the groups of model.py."""
    rules = (ROOT / 'docs' / 'rules.md').read_text()
    code = textwrap.dedent(re.search(r'```python\n(.*?)```', rules, flags=re.S).group(1))
    roles = dict(embeddings='embedding', block_norms='block_norm', hidden_weights='hidden_weight',
                 hidden_biases='hidden_bias', final_norm='final_norm', unembedding='unembedding')
    config = replace(BIG, parameterization='completep_supar', alpha=0.75)
    names = dict(m_N=4, m_L=8, rho=0.25, alpha=0.75, lr=0.01, wd=0.1, eps=1e-8, **{name: name for name in roles})
    exec(code, names)
    ours = {group['role']: group for group in make_optimizer(make(config)).param_groups}
    assert [group['params'] for group in names['groups']] == list(roles)
    for group in names['groups']:
        for key in ('lr', 'weight_decay', 'eps', 'lr_scale'):
            assert group[key] == pytest.approx(ours[roles[group['params']]][key], rel=1e-12), (group['params'], key)


@pytest.mark.parametrize('n_layer, num_params', [
    (2, 27_311_616), (4, 28_891_136), (8, 32_050_176), (16, 38_368_256), (32, 51_004_416), (64, 76_276_736),
    (128, 126_821_376)])
def test_the_papers_anchor_has_the_papers_sizes(n_layer, num_params):
    path = ROOT / 'config' / 'completep_paper_anchor.py'
    config = TrainConfig(**configure(TrainConfig, [str(path), f'--n_layer={n_layer}']))
    with torch.device('meta'):
        model = GPT(GPTConfig.of(config))
    assert model.num_params() == num_params
    assert config.batch_tokens * config.max_iters == 299_892_736
    assert (config.learning_rate, config.eps, config.init_std, config.warmup_frac, config.final_lr_frac,
            config.schedule, config.activation, config.pos, config.bias, config.norm, config.tie_weights) == (
        2**-8, 1e-16, 0.02, 0.1, 0.0, 'linear', 'relu2', 'alibi', True, 'layernorm', False)
    assert model.transformer.h[0].attn.logit_mult == 1 / 256
