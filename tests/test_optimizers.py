"""Tests of the optimizers: rules against numbers typed by hand, steps against PyTorch's and against arithmetic."""
import math
from dataclasses import replace

import pytest
import torch

from model import GPT, OPTIMIZERS, GPTConfig, Rule
from nanop.errors import UserError
from nanop.optimizers import Muon, clip_gradients, orthogonalized
from test_model import TINY, batch, make, skip_without_its_package, train_steps
from tools.stack import train_stack
from tools.sweep_points import digest
from train import TrainConfig, make_optimizer, num_steps, rescaled, train, update

BIG = replace(TINY, n_layer=16, n_embd=128, parameterization='completep')  # m_N = 4, m_L = 8
HIDDEN, VECTORS = ('hidden_weight', 'residual_proj'), ('block_norm', 'hidden_bias')


def groups_of(config, name, **values):
    values = dict(weight_decay=0.1, learning_rate=0.01, betas=(0.9, 0.95), eps=1e-8, device_type='cpu') | values
    skip_without_its_package(name)
    with torch.device('meta'):
        model = GPT(config)
    return {group['role']: group for group in model.configure_optimizers(**values, optimizer=name).param_groups}


# Typed by hand from Table 1 of arXiv:2505.01618, Table 4 and the SGD row of arXiv:2603.00541, for m_N = 4, m_L = 8 and
# alpha: lr of hidden weights, of norms and biases in blocks, of embedding and final norm, of the unembedding
GOLDEN = [('adamw', 1.0, (0.25, 1, 1, 1)), ('lion', 1.0, (0.25, 1, 1, 1)), ('muon', 1.0, (5, 1, 1, 1)),
          ('sgd', 1.0, (8, 32, 4, 4)), ('sgd', 0.5, (1, 4, 4, 4)), ('muon', 0.5, (5 / 8**0.5, 8**-0.5, 1, 1)),
          ('lion', 0.5, (0.25 / 8**0.5, 8**-0.5, 1, 1))]


@pytest.mark.parametrize('name, alpha, lr', GOLDEN)
def test_golden_learning_rates(name, alpha, lr):
    groups = groups_of(replace(BIG, alpha=alpha), name, muon_mult=5.0)
    hidden, vectors, ends, unembedding = (0.01 * factor for factor in lr)
    expected = {role: hidden for role in HIDDEN} | {role: vectors for role in VECTORS} | dict(
        embedding=ends, final_norm=ends, unembedding=unembedding)
    assert {role: group['lr'] for role, group in groups.items()} == pytest.approx(expected)
    for role, group in groups.items():  # lr * weight_decay depends on alpha alone, as for AdamW
        decay = {'embedding': 1, 'unembedding': 1, 'hidden_weight': 8 ** (alpha - 1), 'residual_proj': 8 ** (alpha - 1)}
        assert group['lr'] * group['weight_decay'] == pytest.approx(0.001 * decay.get(role, 0)), role
        assert group['lr_scale'] == pytest.approx(group['lr'] / 0.01)


def test_sgd_over_density_and_form():
    assert groups_of(replace(TINY, density=0.25, parameterization='supar'), 'sgd')['hidden_weight']['lr'] == 0.04
    assert groups_of(replace(BIG, unembed_form='weights'), 'sgd')['unembedding']['lr'] == 0.01 / 4  # TP V, Table 3


def test_eps_of_muon_is_for_the_whole_matrix():
    groups = groups_of(BIG, 'muon')
    assert groups['hidden_weight']['eps'] == pytest.approx(1e-8 / 8)  # arXiv:2512.05620: 1/L at any width
    assert groups['embedding']['eps'] == pytest.approx(1e-8 / 4)
    for shape, size in (((64, 16), 2.0), ((16, 64), 0.5)):  # times sqrt(d_in / d_out) of the matrix
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([dict(params=[p], rows=[[shape[0]]], lr=1.0, weight_decay=0.0, eps=100.0)], betas=(0.0, 0.95)).step()
        assert torch.equal(-p.detach(), size * orthogonalized(p.grad[None], 100.0 / size)[0].float())
        assert not torch.equal(-p.detach(), size * orthogonalized(p.grad[None], 100.0)[0].float())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_parameterization_is_one_at_the_base(name):
    skip_without_its_package(name)

    def losses(parameterization):
        model = make(parameterization=parameterization)
        return train_steps(model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu', name), 5)
    assert losses('sp') == losses('completep_supar') == losses('mup')
    assert losses('sp') != losses('gpt2')


def test_a_role_without_a_rule_is_an_error(monkeypatch):
    rules = TINY.rules
    monkeypatch.setattr(GPTConfig, 'rules', rules | dict(block_norm=Rule()))
    for name in OPTIMIZERS:
        with pytest.raises(ValueError, match=f"role 'block_norm' has no rule for optimizer='{name}'"):
            make().configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu', name)
    for missing in ('lr', 'weight_decay', 'eps'):  # one missing factor is an error, too
        incomplete = rules['final_norm']._replace(**{missing: None})
        monkeypatch.setattr(GPTConfig, 'rules', rules | dict(final_norm=incomplete))
        with pytest.raises(ValueError, match="role 'final_norm' has no rule for optimizer='sgd'"):
            make().configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu', 'sgd')
    monkeypatch.undo()
    with pytest.raises(ValueError, match="optimizer='muon' has no rule for density=0.5"):
        make(density=0.5).configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu', 'muon')


@pytest.mark.parametrize('shape', [(32, 32), (64, 16), (16, 64)])
def test_orthogonalized_matrices(shape):
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(x, 1e-7).float())
    assert 0.6 < values.min() and values.max() < 1.3
    assert torch.equal(orthogonalized(1024 * x, 1e-7), orthogonalized(x, 1e-7))
    assert not orthogonalized(0 * x, 1e-7).any()


def test_matrices_of_one_shape_are_orthogonalized_at_once_on_a_gpu(monkeypatch):
    """As bits, they are what they are one by one, and there are as many products as shapes: here, of three layers."""
    def moved():
        model, calls = make(n_layer=3, n_kv_head=1), []
        monkeypatch.setattr('nanop.optimizers.orthogonalized', lambda x, eps: calls.append(x.shape) or
                            orthogonalized(x, eps))
        train_steps(model, model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 1e-8, 'cpu', 'muon'), 2)
        return dict(model.named_parameters()), calls
    alone, one_by_one = moved()
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    at_once, by_shape = moved()
    assert all(torch.equal(p, at_once[name]) for name, p in alone.items())
    assert {len(shape) for shape in one_by_one} == {2} and len(one_by_one) == 2 * 3 * 6  # q, k, v, 3 others
    # 32 x 32: of hidden_weight q, of residual_proj the attention's; 16 x 32: of kv_weight k and v
    assert sorted(by_shape[:len(by_shape) // 2]) == [(3, 32, 32), (3, 32, 32), (3, 32, 128), (3, 128, 32), (6, 16, 32)]


@pytest.mark.parametrize('shape', [(32, 32), (64, 16)])  # where PyTorch's factor is sqrt(d_out / d_in), too
def test_steps_are_those_of_torchs_muon(shape):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    values = dict(lr=0.1, weight_decay=0.1, eps=1e-7)
    optimizers = [Muon([dict(params=[ours], rows=[[shape[0]]], **values)], betas=(0.95, 0.95)),
                  torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn='original', **values)]
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)  # the bf16 products are in another order
    assert (ours - 1).abs().max() > 0.05


def test_stacked_matrices_are_orthogonalized_one_by_one():
    """Query, key and value (with fewer key and value heads), the two halves of SwiGLU, and the projections."""
    model = make(n_kv_head=1, activation='swiglu', bias=False, norm_gain=False)
    optimizer = model.configure_optimizers(0.0, 0.01, (0.0, 0.95), 1e-8, 'cpu', 'muon')
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model, optimizer, 1)
    for name, rows in (('attn.c_attn', [32]), ('attn.c_kv', [16, 16]), ('mlp.c_fc', [88, 88]), ('mlp.c_proj', [32]),
                       ('attn.c_proj', [32])):
        name = f'transformer.h.0.{name}.weight'
        for moved in (model.get_parameter(name).detach() - before[name]).split(rows):
            values = torch.linalg.svdvals(moved) / 0.01 / math.sqrt(moved.size(0) / moved.size(1))
            assert 0.6 < values[:8].min() and values.max() < 1.3, name  # the gradient has at least rank 8
    moved = (model.lm_head.weight.detach() - before['lm_head.weight']).abs()
    assert moved.max() == pytest.approx(0.01, rel=1e-3)  # AdamW's first step


# -----------------------------------------------------------------------------
# Clipping

@pytest.mark.parametrize('max_norm', [0.3, 100.0, 0.0])
def test_plain_clipping_is_torchs(max_norm):
    """Bit for bit, also where an optimizer knows no roles; and what is not finite is returned as such."""
    def with_gradients():
        model = make(BIG, init_std=0.1)
        model(*batch(BIG))[1].backward()
        return model
    ours, plain, theirs, broken = (with_gradients() for _ in range(4))
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or math.inf)
    assert norm > 0.5
    optimizer = ours.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu')
    for model, optimizer in ((ours, optimizer), (plain, torch.optim.SGD(plain.parameters(), 0.1))):
        assert torch.equal(clip_gradients(model, optimizer, max_norm), norm)
        for name, p in theirs.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, p.grad), name
    for bad, is_bad in ((math.inf, torch.isinf), (math.nan, torch.isnan)):
        broken.transformer.ln_f.bias.grad[0] = bad
        assert is_bad(clip_gradients(broken, optimizer, max_norm))


# The factors on gradients within the scaled norm, typed by hand for m_N = 4, m_L = 8, rho = 1/4. A role's gradient
# falls as AdamW's eps, its norm as eps * sqrt(entries): hidden matrices of completep have 4 * 4 * 8 times the entries
SCALED = [('completep', {}, (2, 32**0.5, 8**0.5, 2)), ('completep', dict(alpha=0.5), (2, 2, 1, 2)),
          ('completep', dict(unembed_form='weights'), (2, 32**0.5, 8**0.5, 0.5)), ('mup', {}, (2, 2, 1, 2)),
          ('completep_supar', dict(density=0.25), (2, 32**0.5, 32**0.5, 2)), ('sp', {}, (1, 1, 1, 1))]


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_golden_scales_of_gradients(name):
    for parameterization, changes, (ends, vectors, hidden, unembedding) in SCALED:
        config = replace(BIG, parameterization=parameterization, **changes)
        if name == 'muon' and config.density < 1:
            continue
        expected = dict.fromkeys(HIDDEN, hidden) | dict.fromkeys(VECTORS, vectors) | dict(
            embedding=ends, final_norm=ends, unembedding=unembedding)
        groups = groups_of(config, name, clip_norm='scaled')
        assert {role: group['grad_scale'] for role, group in groups.items()} == pytest.approx(expected)
        plain = {role: group['grad_scale'] for role, group in groups_of(config, name).items()}
        assert plain == dict.fromkeys(expected, 1) | dict(unembedding=0.25 if config.unembed_form == 'weights' else 1)


@pytest.mark.parametrize('clip_norm', ['plain', 'scaled'])
@pytest.mark.parametrize('name', ['adamw', 'sgd'])
def test_both_forms_of_the_unembedding_are_clipped_alike(monkeypatch, name, clip_norm):
    """docs/variants.md: with the defaults of train.py, clipping among them, the two forms are the same training."""
    def run(form):
        c = TrainConfig(**vars(BIG) | dict(n_layer=2, init_std=0.1, output_mult=2.0, unembed_form=form, optimizer=name),
                        clip_norm=clip_norm)
        model = make(GPTConfig.of(c))
        optimizer = make_optimizer(model, c, 'cpu')
        return [update(model, optimizer, [model(*batch(seed=step))[1]], c.grad_clip)[:2] for step in range(12)]
    losses, norms = zip(*run('multiplier'))
    losses_of_weights, norms_of_weights = zip(*run('weights'))
    assert max(norms) > 1.5 and norms_of_weights == pytest.approx(norms, rel=1e-4)  # clipped
    assert losses_of_weights == pytest.approx(losses, abs=1e-5)
    monkeypatch.setattr('train.clip_gradients', lambda model, optimizer, max_norm: torch.nn.utils.clip_grad_norm_(
        model.parameters(), max_norm))
    assert [loss for loss, _ in run('weights')] != pytest.approx(losses, abs=1e-3)  # torch's own clipping is not alike


@pytest.mark.parametrize('key, sizes', [('n_embd', (32, 128)), ('n_layer', (2, 16))])
def test_the_scaled_norm_does_not_depend_on_the_size(key, sizes):
    """At init and after steps, with embeddings of size 1. The plain norm falls with width."""
    def norms(clip_norm, size):
        model = make(init_std=0.1, input_mult=10.0, **{key: size})
        optimizer = model.configure_optimizers(0.0, 2**-8, (0.9, 0.95), 1e-8, 'cpu', clip_norm=clip_norm)
        return [update(model, optimizer, [model(*batch(B=8))[1]])[1] for _ in range(5)]
    base, large = (norms('scaled', size) for size in sizes)
    assert base == norms('plain', sizes[0])  # bit for bit
    assert large == pytest.approx(base, rel=0.06)
    plain = max(abs(math.log(a / b)) for a, b in zip(norms('plain', sizes[1]), base))
    assert plain > (0.5 if key == 'n_embd' else 0.05)


def test_steps_of_sgd_follow_the_rules_under_the_scaled_norm():
    """Every step is clipped: to 4 times the width, hidden weights move by 1/4 as much; with the plain norm, by more."""
    def moved(clip_norm, size):
        model = make(init_std=0.1, input_mult=10.0, n_embd=size)
        optimizer = model.configure_optimizers(0.0, 0.1, (0.9, 0.95), 1e-8, 'cpu', 'sgd', clip_norm=clip_norm)
        weight = model.transformer.h[1].mlp.c_fc.weight
        before = weight.detach().clone()
        for _ in range(5):
            assert update(model, optimizer, [model(*batch(B=8))[1]], grad_clip=0.2)[1] > 0.2
        return (weight.detach() - before).square().mean().sqrt().item() * size
    base = moved('plain', 32)
    assert moved('scaled', 128) == pytest.approx(base, rel=0.05)
    assert moved('plain', 128) > 1.4 * base


def test_a_stack_clips_as_single_runs_do(tiny):
    one = replace(tiny, out_dir='', eval_interval=0, grad_clip=0.3, unembed_form='weights', optimizer='sgd',
                  learning_rate=0.1)
    configs = [one, replace(one, clip_norm='scaled'), replace(one, clip_norm='scaled', parameterization='mup'),
               replace(one, grad_clip=0.0)]
    stacked, alone = train_stack(configs), [train(config) for config in configs]
    losses = [summary['val_loss'] for summary in alone]
    assert [summary['val_loss'] for summary in stacked] == pytest.approx(losses, abs=1e-5)
    assert len({round(loss, 4) for loss in losses}) == 4  # the runs differ


# -----------------------------------------------------------------------------
# Batch and duration

BASE = TrainConfig(batch_tokens=16384, max_iters=1000, base_batch_tokens=16384, base_train_tokens=16384 * 1000,
                   learning_rate=0.004, weight_decay=0.1, eps=1e-8)

# Typed by hand from Table 1 of arXiv:2512.22382, for (m_B, m_D): learning rate, decay, eps, beta1, beta2, steps
LENGTHS = [((1, 1), (1, 1, 1, 0.9, 0.95, 1000)), ((4, 1), (2, 2, 0.5, 0.6, 0.8, 250)),
           ((0.25, 1), (0.5, 0.5, 2, 0.975, 0.9875, 4000)), ((1, 4), (0.5, 0.5, 2, 0.975, 0.9875, 4000)),
           ((1, 16), (0.25, 0.25, 4, 0.99375, 0.996875, 16000)), ((4, 4), (1, 1, 1, 0.9, 0.95, 1000)),
           ((8, 1), (8**0.5, 8**0.5, 8**-0.5, 0.2, 0.6, 125))]


@pytest.mark.parametrize('ratios, expected', LENGTHS)
def test_golden_batch_and_duration(ratios, expected):
    (m_B, m_D), (lr, decay, eps, beta1, beta2, steps) = ratios, expected
    config = replace(BASE, batch_tokens=int(m_B * 16384), train_tokens=m_D * 16384 * 1000)
    assert num_steps(config, 10**6) == steps
    c = rescaled(config, steps)
    assert (c.learning_rate, c.weight_decay, c.eps, c.beta1, c.beta2) == pytest.approx(
        (0.004 * lr, 0.1 * decay, 1e-8 * eps, beta1, beta2), rel=1e-12)
    assert c.learning_rate * c.weight_decay * steps == pytest.approx(0.004 * 0.1 * 1000)
    off = replace(config, base_batch_tokens=0, base_train_tokens=0)
    assert rescaled(off, steps) == off
    if ratios == (1, 1):
        assert rescaled(config, steps) == config  # bit for bit


@pytest.mark.parametrize('names', [('lr',), ('lr', 'weight_decay'), ('beta2', 'eps'), ('beta1',)])
def test_only_what_is_named_is_rescaled(names):
    """By hand for 4 times the duration: lr and decay halve, eps doubles, 1 - beta is a quarter."""
    config = replace(BASE, train_tokens=4 * 16384 * 1000, max_iters=TrainConfig.max_iters, rescale=','.join(names))
    expected = dict(learning_rate=0.004, weight_decay=0.1, eps=1e-8, beta1=0.9, beta2=0.95)
    rescaled_ones = dict(lr=0.002, weight_decay=0.05, eps=2e-8, beta1=0.975, beta2=0.9875)
    expected |= {'learning_rate' if name == 'lr' else name: rescaled_ones[name] for name in names}
    c = rescaled(config, num_steps(config, 1))
    assert {key: getattr(c, key) for key in expected} == pytest.approx(expected, rel=1e-12)


def test_runs_of_equal_values_have_one_digest():
    """At the base's duration nothing is rescaled; half the rate by hand is half the rate by the rule."""
    base = TrainConfig(train_tokens=16384 * 1000, learning_rate=0.004, weight_decay=0.1)
    ruled = replace(base, base_train_tokens=base.train_tokens)
    assert digest(base) == digest(ruled) == digest(replace(ruled, rescale='lr'))
    longer = dict(train_tokens=4 * base.train_tokens)
    by_hand, by_rule = replace(base, **longer, learning_rate=0.002), replace(ruled, **longer, rescale='lr')
    assert digest(by_hand) == digest(by_rule) != digest(replace(base, **longer))
    assert digest(replace(by_rule, rescale='lr,weight_decay')) != digest(by_rule)


def test_decay_by_time_scale_and_independent_decay():
    config = replace(BASE, weight_decay=0.0, tau_ema=0.1407, learning_rate=2**-8, max_iters=1144,
                     base_train_tokens=16384 * 1144)
    assert rescaled(config, 1144).weight_decay == pytest.approx(1.59045, rel=1e-5)
    longer = rescaled(config, 4 * 1144)  # tau is a fraction of the run
    assert longer.weight_decay * longer.learning_rate * 4 * 1144 == pytest.approx(1 / 0.1407)
    config = replace(BASE, weight_decay=1e-4, weight_decay_mode='independent')
    for lr in (0.001, 0.1):
        c = rescaled(replace(config, learning_rate=lr), 1000)
        assert c.learning_rate * c.weight_decay == pytest.approx(1e-4)
        for name in ('adamw', 'lion', 'muon'):
            groups = groups_of(TINY, name, learning_rate=c.learning_rate, weight_decay=c.weight_decay, muon_mult=5.0)
            for role in ('embedding', 'hidden_weight'):
                assert groups[role]['lr'] * groups[role]['weight_decay'] == pytest.approx(1e-4)


@pytest.mark.parametrize('changes, message', [
    (dict(batch_tokens=10 * 16384), 'beta1=0.9 has no counterpart there; keep their ratio below 10'),
    (dict(batch_tokens=24 * 16384, beta1=0.99), 'beta2=0.95 has no counterpart there; keep their ratio below 20'),
    (dict(batch_tokens=12 * 16384, beta2=0.5), 'beta2=0.5 has no counterpart there; keep their ratio below 2'),
])
def test_a_batch_without_betas_is_an_error(changes, message):
    config = replace(BASE, train_tokens=16384 * 1000, **changes)
    with pytest.raises(UserError) as error:
        rescaled(config, num_steps(config, 1))
    assert message in str(error.value)


@pytest.mark.parametrize('changes, message', [
    (dict(train_tokens=1000, tokens_per_param=1.0), 'tokens_per_param=1.0 sets the duration, too'),
    (dict(learning_rate=0.0, weight_decay=0.1, weight_decay_mode='independent'),
     "independent weight decay divide by it"),
    (dict(optimizer='lion', base_batch_tokens=8192), "base_train_tokens have rules for adamw only"),
    (dict(base_batch_tokens=8192), 'base_batch_tokens=8192 is not allowed: it needs a duration in tokens'),
    (dict(rescale='lr'), "rescale='lr' is not allowed: use some of lr,weight_decay,eps,beta1,beta2, each once, beside"),
    (dict(rescale='', base_train_tokens=8192), "rescale='' is not allowed: use some of lr,"),
    (dict(rescale='lr,lr', base_train_tokens=8192), "rescale='lr,lr' is not allowed"),
    (dict(rescale='lr,learning_rate', base_train_tokens=8192), "rescale='lr,learning_rate' is not allowed"),
    (dict(clip_norm='role'), "clip_norm='role' is not allowed: use one of plain, scaled"),
    (dict(clip_norm='scaled', grad_clip=0.0), "clip_norm='scaled' is not allowed: it would do nothing, set grad_clip"),
    (dict(optimizer='sgd', tau_ema=0.1), "optimizer='sgd' is not allowed: its decay is coupled"),
    (dict(optimizer='muon', parallel='fsdp'), "it needs whole matrices and parallel='fsdp' shards them"),
])
def test_what_does_not_go_together(changes, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**changes)
    assert message in str(error.value)


def test_another_optimizers_state_is_an_error_not_a_damaged_checkpoint(tiny):
    train(replace(tiny, max_iters=4))
    with pytest.raises(UserError, match="was trained with optimizer='adamw', whose state optimizer='muon' cannot"):
        train(replace(tiny, optimizer='muon', init_from='resume'))
    sgd = replace(tiny, max_iters=4, optimizer='sgd', overwrite=True)
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        train(replace(sgd, beta1=before))
        with pytest.raises(UserError, match='without momentum.* cannot go on from: use the same'):
            train(replace(sgd, beta1=after, init_from='resume', overwrite=False))


def test_zero_is_a_beta_and_a_learning_rate():
    config = TrainConfig(beta1=0.0, beta2=0.0)
    assert rescaled(config, 10) == config
    config = TrainConfig(learning_rate=0.0, weight_decay_mode='independent')
    assert rescaled(config, 10).weight_decay == 0
    for name in OPTIMIZERS:
        assert {group['lr'] for group in groups_of(TINY, name, learning_rate=0.0).values()} == {0.0}


def test_a_run_says_what_it_derived(tiny, capsys):
    tokens = dict(base_batch_tokens=tiny.batch_tokens // 4, train_tokens=2 * tiny.batch_tokens)
    train(replace(tiny, weight_decay=0.1, max_iters=TrainConfig.max_iters, **tokens))
    # m_B = 4, m_D = 1: by hand from Table 1 of arXiv:2512.22382
    values = 'learning_rate 0.02, weight_decay 0.2, eps 5e-09, beta1 0.6, beta2 0.8\n'
    assert f'batch and duration differ from the base: {values}' in capsys.readouterr().out
    train(replace(tiny, max_iters=2, out_dir=''))
    assert 'from the base: learning_rate' not in capsys.readouterr().out
