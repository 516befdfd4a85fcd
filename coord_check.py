"""
Does a parameterization keep its promise as the model grows? Coordinate checks with a verdict, minutes on a CPU.

    python coord_check.py                                               completep_supar: width, depth and density
    python coord_check.py --parameterization=completep --axes=laziness  feature learning in every block
    python coord_check.py --parameterization=mup --axes=depth           must end with FAIL and exit code 1
    python coord_check.py --axes=depth --learning_rate=0.01 --auto      runs what decides, if need be

nanop/coordinates.py says what is measured, and checks any other model; docs/coord_check.md says how to read the plots.
Here are the axes of our own GPT and the slopes that the papers promise on each. Exit code 0: PASS, every slope is as
promised and the control's are not; 1: FAIL, one is not; 4: INCONCLUSIVE, which names what would decide. 2: wrong usage.
"""
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import configure
from model import GPT, OPTIMIZERS, PARAMETERIZATIONS, ROLES, GPTConfig, role_of
from nanop.coordinates import FLAT, PROBE, around, check, write_slopes
from nanop.dataset import open_dataset
from nanop.errors import UserError, exit_on_user_error, require, require_values
from nanop.files import make_out_dir
from nanop.machine import set_up
from nanop.optimizers import clip_gradients
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

USED_BY = {  # the axes that a key acts on, for those that do not act on all of them
    'widths': ('width',), 'depths': ('depth', 'laziness'), 'densities': ('density',), 'alpha': ('depth', 'laziness'),
    'n_embd': ('depth', 'density', 'laziness'), 'n_layer': ('width', 'density'),
    'density': ('width', 'depth', 'laziness'), 'steps': ('width', 'depth', 'density')}
MOST_TRIES = 3  # of --auto
EXIT_CODES = dict(PASS=0, INCONCLUSIVE=4, FAIL=1)  # from good to bad

SET_HERE = ('vocab_size', 'real_vocab_size', 'dropout', 'mask_seed', 'base_n_layer', 'base_n_embd', 'base_head_dim')


@dataclass
class CoordCheckConfig(GPTConfig):
    # not to be set: vocab_size, real_vocab_size, dropout, mask_seed, base_n_layer, base_n_embd, base_head_dim
    parameterization: str = 'completep_supar'
    axes: str = 'width,depth,density'      # of width, depth, density, laziness
    auto: bool = False                     # if INCONCLUSIVE, run again with more seeds, larger sizes or a smaller rate
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
    grad_clip: float = 0.0                 # 0: off
    clip_norm: str = 'plain'               # the norm that grad_clip limits: plain, scaled
    device: str = 'auto'
    dtype: str = 'float32'                 # of the matrix products in training; the probe is always float32

    def __post_init__(self):
        super().__post_init__()
        least = dict(seeds=2, steps=1, batch_tokens=1, batch_size=1, probe_tokens=1, learning_rate=1e-30,
                     init_std=1e-30, output_mult=1e-30, weight_decay=0, muon_mult=1e-6, eps=1e-38, grad_clip=0)
        choices = dict(optimizer=OPTIMIZERS, control=('', 'none', *PARAMETERIZATIONS), clip_norm=('plain', 'scaled'))
        require_values(self, least, below_one=('beta1', 'beta2'), choices=choices)
        require(self, 'clip_norm', self.grad_clip or self.clip_norm == 'plain', 'it does nothing without grad_clip')
        require(self, 'control', self.control != self.parameterization, 'it is what is checked, use another, or none')
        axes = self.axes.split(',')
        require(self, 'axes', len(set(axes)) == len(axes), 'it names an axis twice, leave one out')
        for axis in axes:
            if axis not in AXES:
                raise UserError(f"axis '{axis}' is not known: use {', '.join(AXES)}, several separated by commas")


# -----------------------------------------------------------------------------
# The slopes that the papers promise
EXACT = 0.1  # the tolerance of exponents that finite sizes hardly touch
UPDATE = 'Adam moves a weight by its lr, whatever the size of the gradient'
EPS = 'eps must follow the gradient: a forgotten factor moves the slope by 1/2 or 1'
HEADS = 'heads share it; their gradients add up at random at step 0, and fully once they agree'
QUERIES = '1/n_embd on the attention logits divides gradients of queries once more, which eps does not follow'
GRADIENT = 'at step 0 back-propagation divides it by m_N, and inside the blocks by m_L^alpha'
DECAY = 'lr x weight decay, up to rounding'
HEAD = 'what is random in the logits falls as width^-1/2, a sum of n_embd terms over m_N, until learning hides it'
LOW_RANK = 'entries fall as width^-1/2, as width^-1 if the step has a low rank'
SHARE = 'L random branches add up to m_L^(1/2 - alpha), the embedding to 1; the final norm divides gradients by both'


def expected_slopes(axis, alpha, config, roles):
    """The `expected` of check(): what differs from flat activations and changes, and the slopes of weights by role.
    From the papers, not model.py. Where theory leaves an exponent open, the band holds both ends."""
    c, hidden = config, '(hidden_weight|kv_weight|residual_proj)'
    inside = f'(block_norm|qk_norm|hidden_bias|kv_bias|{hidden})'
    in_blocks = alpha - 1 if axis == 'depth' else 0  # slope of the lr inside the blocks
    slopes = {}
    if c.zero_init_unembed:  # no gradient passes a zero unembedding
        slopes |= {'change (embedding|attention|mlp|residual) 1 .*': None}
    if axis == 'width':
        logits = around(0, HEAD, to=-0.5)
        if not c.zero_init_unembed:
            slopes |= {'activation logits 0 .*': around(-0.5, HEAD)}
        slopes |= {f'activation logits {c.steps} .*': logits, f'change logits (1|{c.steps}) .*': logits}
        if c.unembed_form == 'weights':  # the weights carry 1/m_N
            slopes |= {'gradient unembedding .*': around(0, GRADIENT), 'update unembedding .*': around(-1, UPDATE)}
        if c.attn_scale == '1/N' and c.n_kv_head:  # then c_attn holds queries alone
            slopes |= {'gradient hidden_(weight|bias) .*attn.*': around(-1, QUERIES, to=-2),
                       'grad/eps hidden_(weight|bias) .*attn.*': around(0, QUERIES, to=-1)}
        if {'qk_norm', 'kv_weight'} & {*roles}:
            slopes |= {'(gradient|grad/eps) (qk_norm|kv_weight|kv_bias) .*': around(0, HEADS, to=-0.5)}
        slopes |= {f'update {hidden} .*': around(-1, UPDATE, tolerance=EXACT)}
        if c.optimizer == 'muon':
            slopes |= {f'update {hidden} .*': around(-0.5, LOW_RANK, to=-1),
                       f'grad/eps {hidden} .*': around(-1, 'eps is compared with the norm of the whole matrix')}
        slopes |= {'gradient .*': around(-1, GRADIENT)}
    if axis == 'depth':
        block = "with alpha < 1 a block's own contribution falls with its lr; what it passes through does not"
        slopes |= {'(activation|change) logits .*': None,  # the final norm hides what depth does
                   '(activation|change) residual .* (lowest|highest)': None}  # only the last block is judged
        at_start = around(-alpha, GRADIENT)
        if c.init_std * c.input_mult < 1:
            share = 0.5 - alpha  # slope of L random branches, each multiplied by m_L^-alpha
            at_start = around(-alpha, SHARE, to=-alpha - share)
            slopes |= {'(activation residual 0|change residual 1) .*': around(0, SHARE, to=share),
                       f'grad/eps {inside} .*': around(0, SHARE, to=-share)}
        slopes |= {f'(activation|change) (attention|mlp) (1|{c.steps}) .*':
                       FLAT if alpha == 1 else around(0, block, to=alpha - 1),
                   **({} if c.zero_init_unembed else {f'gradient {inside} .*': at_start}),
                   'gradient .*': around(0, GRADIENT),
                   f'update {hidden} .*': around(in_blocks, UPDATE, tolerance=EXACT),
                   f'update {inside} .*': around(in_blocks, UPDATE)}
        if c.weight_decay:
            slopes |= {f'decay {hidden} .*': around(in_blocks, DECAY, tolerance=EXACT)}
    if axis == 'density':
        slopes |= {f'update {hidden} .*': around(-1, UPDATE, tolerance=EXACT), 'gradient .*': around(0, GRADIENT)}
    if axis != 'laziness':
        slopes |= {'update .*': around(0, UPDATE)}
        if c.optimizer in ('adamw', 'muon'):
            slopes |= {'grad/eps .*': around(0, EPS)}
        if c.weight_decay:
            slopes |= {f'decay (embedding|unembedding|{hidden}) .*': around(0, DECAY, tolerance=EXACT)}
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

    def clip(*_):
        clip_gradients(model, optimizer, c.grad_clip)

    def losses(step):
        if step == PROBE:
            length = min(c.block_size, c.probe_tokens)
            return model(*data.batch('val', data.val_starts(c.probe_tokens, length), length, machine.device))[1]
        starts = data.train_starts(seed, step, sequences, c.block_size)
        return micro_losses(model, data, starts, sequences // micro_batches, c.block_size, machine)

    if c.grad_clip:
        optimizer.register_step_pre_hook(clip)
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


def deciding(config, axis, reason):
    """The keys to change to decide what was inconclusive for this reason, one of nanop.coordinates.REASONS."""
    c, sizes_key = config, AXES[axis][0]
    if reason in ('divergence', 'saturation'):
        return dict(learning_rate=c.learning_rate / 4)
    if reason == 'noise':
        return dict(seeds=2 * c.seeds)
    if axis == 'density':  # cannot exceed 1: what few inputs do vanishes with more of them
        return dict(n_embd=2 * c.n_embd)
    return {sizes_key: f'{getattr(c, sizes_key)},{2 * max(sizes_of(c, sizes_key))}'}


def main():
    """Returns the exit code."""
    overrides = configure(CoordCheckConfig, sys.argv[1:], switches=('auto',))
    for key in SET_HERE:
        if key in overrides:
            raise UserError(f'{key}={overrides[key]!r} is not allowed: the check sets it, leave it out')
    config = CoordCheckConfig(**overrides)
    axes = config.axes.split(',')
    for key in USED_BY:
        if key in overrides and not {*axes} & {*USED_BY[key]}:
            raise UserError(f"{key}={overrides[key]!r} is not allowed: it does nothing with axes='{config.axes}', "
                            f"leave it out or add one of {', '.join(USED_BY[key])}")
    machine = set_up(config.device, config.dtype)
    data = open_dataset(config.dataset)
    checks = [(axis, name, arguments) for axis in axes
              for name, arguments in checks_of_axis(config, axis, data, machine).items()]
    out_dir = make_out_dir(config.out_dir)
    reports = {}
    for axis, name, arguments in checks:
        changes = {}
        for tries_left in reversed(range(1 + MOST_TRIES * config.auto)):
            started = time.perf_counter()
            report = reports[name] = check(**arguments)
            print(f"{report}\n({time.perf_counter() - started:.0f} s; {report.plot(out_dir / f'{name}.png')})\n")
            write_slopes(out_dir / 'coord_check.csv', reports)
            if not report.reason or not tries_left:
                break
            changes |= deciding(replace(config, **changes), axis, report.reason)
            said = ', '.join(f'{key}={value}' for key, value in changes.items())
            print(f'auto: once more, with {said}\n')
            arguments = checks_of_axis(replace(config, **changes), axis, data, machine)[name]
            arguments['title'] += f', auto: {said}'
    for report in reports.values():
        print(f'{report.verdict}  {report.title}')
    return EXIT_CODES[max((report.verdict for report in reports.values()), key=[*EXIT_CODES].index)]


if __name__ == '__main__':
    exit_on_user_error(main)
