"""
Does a parameterization keep its promise as the model grows? Coordinate checks with a verdict, minutes on a CPU.

    python coord_check.py                                               completep_supar: width, depth and density
    python coord_check.py --parameterization=completep --axes=laziness  feature learning in every block
    python coord_check.py --parameterization=mup --axes=depth           must end with FAIL and exit code 1

nanop/coordinates.py says what is measured, and checks any other model; docs/coord_check.md says how to read the plots.
Here are the axes of our own GPT and the slopes that the papers promise on each. Exit code 0: every slope is in its band
and the control's are not; 1: otherwise.
"""
import re
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import configure
from model import GPT, OPTIMIZERS, PARAMETERIZATIONS, ROLES, GPTConfig, role_of
from nanop.coordinates import FLAT, PROBE, Band, around, check, write_slopes
from nanop.dataset import open_dataset
from nanop.errors import UserError, exit_on_user_error, require, require_values
from nanop.files import make_out_dir
from nanop.machine import set_up
from train import make_optimizer, micro_losses, split_batch

AXES = {  # the key with the sizes, the key of GPTConfig that varies, and the control, which must fail
    'width':    ('widths',    'n_embd',  'sp'),         # arXiv:2203.03466
    'depth':    ('depths',    'n_layer', 'mup'),        # arXiv:2505.01618, Fig. 7
    'density':  ('densities', 'density', 'sp'),         # arXiv:2405.15743, Fig. 5
    'laziness': ('depths',    'n_layer', 'depth_mup'),  # arXiv:2505.01618, Fig. 6
}

MODULES = {
    'embedding': r'transformer\.drop',
    'attention': r'transformer\.h\.\d+\.attn',
    'mlp':       r'transformer\.h\.\d+\.mlp',
    'residual':  r'transformer\.h\.\d+',  # the residual stream after each block
    'logits':    r'lm_head',
}

SET_HERE = ('vocab_size', 'real_vocab_size', 'dropout', 'mask_seed', 'base_n_layer', 'base_n_embd', 'base_head_dim')


@dataclass
class CoordCheckConfig(GPTConfig):
    # not to be set: vocab_size, real_vocab_size, dropout, mask_seed, base_n_layer, base_n_embd, base_head_dim
    parameterization: str = 'completep_supar'
    axes: str = 'width,depth,density'      # of width, depth, density, laziness
    control: str = ''                      # '': sp for width and density, mup for depth, depth_mup for laziness; none
    out_dir: str = 'out/coord_check'
    # sizes; the smallest width and depth are the base shape
    widths: str = '64,128,256,512'
    depths: str = '2,4,8,16,32,64'
    densities: str = '0.0625,0.125,0.25,0.5,1'
    n_layer: int = 2                       # where depth does not vary
    n_embd: int = 128                      # where width does not vary
    head_dim: int = 32
    # training
    seeds: int = 3
    steps: int = 10
    dataset: str = 'stdlib'
    block_size: int = 64
    batch_tokens: int = 512
    batch_size: int = 64                   # sequences per micro-batch, at most
    probe_tokens: int = 128
    learning_rate: float = 1e-3            # constant
    init_std: float = 0.05
    input_mult: float = 20.0               # 1 / init_std: with embeddings of size 1, a few layers behave like many
    weight_decay: float = 0.1
    optimizer: str = 'adamw'
    muon_mult: float = 5.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    device: str = 'auto'
    dtype: str = 'float32'                 # of the matrix products in training; the probe is always float32

    def __post_init__(self):
        super().__post_init__()
        least = dict(seeds=2, steps=1, batch_tokens=1, batch_size=1, probe_tokens=1, learning_rate=0, weight_decay=0,
                     muon_mult=1e-6, eps=1e-38)
        choices = dict(optimizer=OPTIMIZERS, control=('', 'none', *PARAMETERIZATIONS))
        require_values(self, least, below_one=('beta1', 'beta2'), choices=choices)
        require(self, 'control', self.control != self.parameterization, 'it is what is checked, use another, or none')
        for axis in self.axes.split(','):
            if axis not in AXES:
                raise UserError(f"axis '{axis}' is not known: use {', '.join(AXES)}, several separated by commas")


# -----------------------------------------------------------------------------
# The slopes that the papers promise
UPDATE = 'Adam moves a weight by its lr, whatever the size of the gradient'
EPS = 'eps must follow the gradient: a forgotten factor moves the slope by 1/2 or 1'
HEADS = 'the heads share it; their gradients add up at random at step 0, and fully once they agree'
FEW = 'few heads, whose random starts do not average out'
KEYS = 'a key head adds up the gradients of more and more query heads'
GRADIENT = 'at step 0 back-propagation divides it by m_N, and inside the blocks by m_L^alpha'
DECAY = 'lr x weight decay, up to rounding'


def expected_slopes(axis, alpha, config, roles):
    """The `expected` of check(): what differs from flat activations and changes, and the slopes of weights by role.
    From the papers, not model.py. Where the papers leave a slope open, the band is as wide as measured (LOG.md)."""
    c, hidden = config, '(hidden_weight|residual_proj)'
    inside = '(block_norm|qk_norm|hidden_bias|hidden_weight|residual_proj)'
    in_blocks = alpha - 1 if axis == 'depth' else 0  # slope of the lr inside the blocks
    slopes = {}
    if axis in ('width', 'depth') and c.n_kv_head:
        low = alpha - 1.3 if axis == 'depth' else -0.3
        slopes |= {f'(activation|change) attention (0|1|{c.steps}) .*': Band(0, low, 0.3, FEW),
                   **({'update qk_norm .*': around(in_blocks, 0.25, FEW)} if 'qk_norm' in roles else {})}
    if axis in ('width', 'depth') and c.optimizer == 'sgd':
        noisy = 'SGD steps are as noisy as its gradients'
        slopes |= {f'update {role} .*': around(in_blocks if re.fullmatch(inside, role) else 0, 0.25, noisy)
                   for role in roles if not re.fullmatch(hidden, role)}
    if axis == 'width':
        head = 'random logits fall as width^-1/2, a sum of n_embd terms over m_N, until learning hides them'
        if not c.zero_init_unembed:
            slopes |= {'activation logits 0 .*': around(-0.5, 0.15, head)}
        if c.optimizer == 'sgd':
            slopes |= {'change logits 1 .*': Band(0, -0.65, 0.15, head)}
        slopes |= {f'activation logits {c.steps} .*': Band(-0.5, -0.65, 0.15, head),
                   f'change logits (1|{c.steps}) .*': Band(0, -0.35, 0.15, head)}
        if c.unembed_form == 'weights':  # the weights carry 1/m_N
            slopes |= {'gradient unembedding .*': around(0, 0.25, GRADIENT),
                       'update unembedding .*': around(-1, 0.1, UPDATE)}
        if 'qk_norm' in roles:
            slopes |= {'(gradient|grad/eps) qk_norm .*': Band(-0.5, -0.75, 0.25, HEADS)}
        if c.n_kv_head:
            slopes |= {'gradient hidden_(weight|bias) .*attn.*': Band(-0.75, -1.25, -0.5, KEYS),
                       'grad/eps hidden_(weight|bias) .*attn.*': Band(0.25, -0.25, 0.5, KEYS)}
        slopes |= {f'update {hidden} .*': around(-1, 0.1, UPDATE)}
        if c.optimizer == 'muon':
            low_rank = 'entries fall as width^-1/2, as width^-1 if the step has a low rank'
            slopes |= {f'update {hidden} .*': Band(-0.5, -1.1, -0.4, low_rank),
                       f'grad/eps {hidden} .*': around(-1, 0.25, 'eps is compared with the norm of the whole matrix')}
        slopes |= {'gradient .*': around(-1, 0.25, GRADIENT)}
    if axis == 'depth':
        block = "with alpha < 1 a block's own contribution falls with its lr; what it passes through does not"
        slopes |= {'(activation|change) logits .*': None,  # the final norm hides what depth does
                   '(activation|change) residual .* (lowest|highest)': None,  # only the last block is judged
                   f'(activation|change) (attention|mlp) (1|{c.steps}) .*':
                       FLAT if alpha == 1 else Band(alpha - 1, alpha - 1.15, 0.15, block),
                   **({} if c.zero_init_unembed else {f'gradient {inside} .*': around(-alpha, 0.25, GRADIENT)}),
                   'gradient .*': around(0, 0.25, GRADIENT),
                   f'update {inside} .*': around(in_blocks, 0.1, UPDATE)}
        if c.weight_decay:
            slopes |= {f'decay {hidden} .*': around(in_blocks, 0.02, DECAY)}
    if axis == 'density':
        slopes |= {f'update {hidden} .*': around(-1, 0.1, UPDATE), 'gradient .*': around(0, 0.25, GRADIENT)}
    if axis != 'laziness':
        slopes |= {'update .*': around(0, 0.1, UPDATE)}
        if c.optimizer in ('adamw', 'muon'):
            slopes |= {'grad/eps .*': around(0, 0.25, EPS)}
        if c.weight_decay:
            slopes |= {'decay (embedding|hidden_weight|residual_proj|unembedding) .*': around(0, 0.02, DECAY)}
    return slopes


# -----------------------------------------------------------------------------
# The models
def make_gpt(config, data, machine, shape, varies, size):
    """A GPT of this shape but with `varies` = size, its optimizer and its losses, for check()."""
    c = config
    seed = torch.initial_seed()  # check() has set it
    model = GPT(replace(shape, **{varies: size}, mask_seed=seed)).to(machine.device)
    optimizer = make_optimizer(model, c, machine.device.type)
    sequences, _, micro_batches = split_batch(c, world_size=1)

    def losses(step):
        if step == PROBE:
            length = min(c.block_size, c.probe_tokens)
            return model(*data.batch('val', data.val_starts(c.probe_tokens, length), length, machine.device))[1]
        starts = data.train_starts(seed, step, sequences, c.block_size)
        return micro_losses(model, data, starts, sequences // micro_batches, c.block_size, machine)

    return model, optimizer, losses


class ToyResidualNet(nn.Module):
    """The network of arXiv:2505.01618, Fig. 6: (B, 784) -> (B, 10). A residual block is (ReLU, Linear) twice."""

    def __init__(self, n_layer, n_embd, branch_mult):
        super().__init__()
        self.branch_mult = branch_mult
        self.readin, self.readout = nn.Linear(784, n_embd, bias=False), nn.Linear(n_embd, 10, bias=False)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Linear(n_embd, n_embd, bias=False),
                          nn.ReLU(), nn.Linear(n_embd, n_embd, bias=False)) for _ in range(n_layer))
        for name, p in self.named_parameters():
            std = {'readin': 784 ** -0.5, 'branches': (2 / n_embd) ** 0.5, 'readout': 1 / n_embd}[name.split('.')[0]]
            nn.init.normal_(p, std=std)

    def forward(self, x):
        x = self.readin(x)
        for branch in self.branches:
            x = x + self.branch_mult * branch(x)
        return self.readout(x)


def make_toy(parameterization, alpha, n_layer, n_embd=256, learning_rate=2e-4):
    """The toy network, for check(). As in the paper only one weight of the second block is trained; the data is noise.
    The paper's learning rate is smaller: its steps switch no ReLU, so that all distance would be rounding."""
    rules = GPTConfig(n_layer=n_layer, n_embd=n_embd, base_n_embd=n_embd, parameterization=parameterization,
                      alpha=alpha).rules
    model = ToyResidualNet(n_layer, n_embd, rules['residual_branch'].forward).requires_grad_(False)
    weight = model.branches[1][1].weight.requires_grad_(True)
    rule = rules['hidden_weight']
    optimizer = torch.optim.Adam([weight], lr=learning_rate * rule.lr, eps=1e-8 * rule.eps)
    inputs, targets = torch.randn(128, 784), torch.randint(10, (128,))
    return model, optimizer, lambda step: F.cross_entropy(model(inputs), targets)


# -----------------------------------------------------------------------------
# From the command line to check()
def sizes_of(config, key):
    text = getattr(config, key)
    kind = float if key == 'densities' else int
    try:
        sizes = [kind(part) for part in text.split(',')]
    except ValueError:
        raise UserError(f"{key}='{text}' is not a list of {kind.__name__}s: write --{key}="
                        f'{getattr(type(config), key)}') from None
    require(config, key, len(set(sizes)) == len(sizes) >= 3, 'it gives no slope, use at least three different sizes')
    return sizes


def checks_of_axis(config, axis, data, machine):
    """{name: arguments of check()} for one axis."""
    c = config
    split_batch(c, world_size=1)
    sizes_key, varies, control = AXES[axis]
    sizes = sizes_of(c, sizes_key)
    if axis == 'laziness':
        require(c, sizes_key, min(sizes) >= 2, 'the laziness axis needs at least 2 layers')
    require(c, 'dtype', machine.dtype != torch.float16, 'float16 needs gradient scaling, use float32 or bfloat16')
    require(c, 'axes', machine.device.type != 'mps' or axis != 'laziness',
            'laziness needs float64, which mps does not have, use device=cpu')
    names = [c.parameterization]
    if c.control != 'none' and (c.control or control) != c.parameterization:  # nothing is a control of itself
        names.append(c.control or control)
    smallest = GPTConfig.of(c, vocab_size=data.vocab_size, base_head_dim=c.head_dim, **{varies: min(sizes)})
    base = dict(base_n_layer=smallest.n_layer, base_n_embd=smallest.n_embd)
    shapes = [replace(smallest, **base, parameterization=name, alpha=c.alpha if name == c.parameterization else 0.0)
              for name in names]
    for size in sizes:  # refuse a size that cannot be built before any model trains
        for shape in shapes:
            with torch.device('meta'):
                model = GPT(replace(shape, **{varies: size}))
            make_optimizer(model, c, 'meta')
    # alpha as the papers promise it, not as model.py has it: that is under test
    alpha = c.alpha or (0.5 if c.parameterization == 'depth_mup' else 1.0)
    fixed = ', '.join(f'{key}={getattr(c, key)}' for key in ('n_layer', 'n_embd') if key != varies)
    there = {role_of(name) for name, _ in model.weights()}
    roles = {role: pattern for role, pattern in ROLES.items() if role in there}
    expected = expected_slopes(axis, alpha, c, roles)

    def arguments(makes, what, steps, **more):
        title = f"{axis}: {' against '.join(names)}, {what}, {c.seeds} seeds, {steps} step{'s' * (steps > 1)}"
        return dict(make=makes[0], control=(*makes, None)[1], sizes=sizes, size_name=varies, seeds=c.seeds,
                    steps=steps, names=names, title=title, **more)

    gpts = [partial(make_gpt, c, data, machine, shape, varies) for shape in shapes]
    if axis != 'laziness':
        return {axis: arguments(gpts, fixed, c.steps, modules=MODULES, parameters=roles, expected=expected)}
    toys = [partial(make_toy, shape.parameterization, shape.alpha) for shape in shapes]
    return {'laziness_toy': arguments(toys, "the paper's toy network", 1, blocks=r'branches\.1'),
            'laziness': arguments(gpts, fixed, 1, blocks=r'transformer\.h\.\d+')}


def main():
    """Returns the exit code: 0 if every check passes, 1 if one fails."""
    overrides = configure(CoordCheckConfig, sys.argv[1:])
    for key in SET_HERE:
        if key in overrides:
            raise UserError(f'{key}={overrides[key]!r} is not allowed: the check sets it, leave it out')
    config = CoordCheckConfig(**overrides)
    machine = set_up(config.device, config.dtype)
    data = open_dataset(config.dataset)
    checks = {}
    for axis in config.axes.split(','):
        checks |= checks_of_axis(config, axis, data, machine)
    out_dir = make_out_dir(config.out_dir)
    reports = {}
    for name, arguments in checks.items():
        started = time.perf_counter()
        report = reports[name] = check(**arguments)
        print(f"{report}\n({time.perf_counter() - started:.0f} s; {report.plot(out_dir / f'{name}.png')})\n")
        write_slopes(out_dir / 'coord_check.csv', reports)
    for report in reports.values():
        print(f"{'PASS' if report.passed else 'FAIL'}  {report.title}")
    return 0 if all(report.passed for report in reports.values()) else 1


if __name__ == '__main__':
    exit_on_user_error(main)
