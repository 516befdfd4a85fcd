"""
Does a parameterization keep its promise as the model grows? Coordinate checks with a verdict, minutes on a CPU.

    python coord_check.py                                               completep_supar: width, depth and density
    python coord_check.py --parameterization=completep --axes=laziness  feature learning in every block
    python coord_check.py --parameterization=mup --axes=depth           must end with FAIL and exit code 1

Models of growing size train for a few steps, several seeds each, and a control that must fail trains beside them. Each
quantity is fitted by size^slope. Exit code 0: every slope is in its band and the control's are not; 1: otherwise.

    activation  mean |x| of a module's output on a probe batch that is never trained on
    change      mean |x - x at step 0| there
    update      RMS of a weight's change since step 0, over the entries that moved
    gradient    RMS of its gradient at step 0, over the entries that are not zero
    grad/eps    that, divided by the eps of its optimizer group
    decay       fraction of a weight that a step without gradient takes away
    distance    of a block's change in one step from its linearization in the block's weights, relative to the latter

For other code, see check().
"""
import csv
import math
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from configurator import configure
from model import GPT, OPTIMIZERS, PARAMETERIZATIONS, ROLES, GPTConfig, role_of
from nanop.errors import UserError, exit_on_user_error, require_at_least
from nanop.machine import pick_device, pick_dtype
from train import MODEL_KEYS, open_dataset, optimizer_of, split_batch, update

# -----------------------------------------------------------------------------
# Measuring one model

PROBE = -1  # loss_fn(PROBE) is the loss on the probe batch, loss_fn(0) that on the first training batch, and so on


def matches(patterns, named):
    """[(group, name)] of the names that a group's pattern matches. Raises UserError for a pattern without a name."""
    found, names = [], [name for name, _ in named]
    for group, pattern in patterns.items():
        hits = [(group, name) for name in names if re.fullmatch(pattern, name)]
        if not hits:
            some = ', '.join(map(repr, names[:6]))
            raise UserError(f"nothing is called '{pattern}' ({group}): the names are {some}, ..; give the module "
                            'itself, not a compiled or wrapped one')
        found += hits
    return found


def record_probes(model, patterns):
    """A dict that every forward in eval mode fills with {(group, name): (args, kwargs, output)} of the modules."""
    seen = {}

    def keep(key, module, args, kwargs, output):
        if not module.training:
            seen[key] = args, kwargs, output[0] if isinstance(output, tuple) else output

    for key in matches(patterns, model.named_modules()):
        model.get_submodule(key[1]).register_forward_hook(partial(keep, key), with_kwargs=True)
    return seen


def rms(x):
    """Root mean square over the entries that are not zero: without masked weights and tokens that did not occur."""
    return x.norm() / x.count_nonzero().clamp(min=1).sqrt()


def distance_from_linearization(module, before, after, args, kwargs={}):
    """|f(after) - f(before) - J (after - before)| / |J (after - before)|, sums of magnitudes, of a module's output f.

    `before` and `after` are its parameters by name; J is exact, forward-mode, in float64. arXiv:2505.01618, Eq. 6.
    """
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    before, after = ({name: p.double() for name, p in params.items()} for params in (before, after))
    args, kwargs = [double(x) for x in args], {key: double(x) for key, x in kwargs.items()}

    def output(params):
        y = functional_call(module, params, tuple(args), kwargs)
        return y[0] if isinstance(y, tuple) else y

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
        at_start, linear = jvp(output, (before,), ({name: after[name] - before[name] for name in before},))
        return (output(after) - at_start - linear).abs().sum() / linear.abs().sum()


def measure(make, size, seed, modules, parameters, blocks, steps):
    """{(quantity, group, name, step): value} of one model, trained for `steps`; see check() for the arguments."""
    torch.manual_seed(seed)
    model, optimizer, loss_fn = make(size)
    params = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    keys, watched = matches(modules, model.named_modules()), matches(parameters, params.items())
    eps = {p: group.get('eps') for group in optimizer.param_groups for p in group['params']}
    seen, seen_blocks = record_probes(model, modules), record_probes(model, {'block': blocks} if blocks else {})
    values, first = {}, {}  # tensors: numbers are read when the run is over

    def losses(step):
        loss = loss_fn(step)
        return [loss] if isinstance(loss, torch.Tensor) else loss

    model.eval()
    for loss in losses(PROBE):
        loss.backward()
    for group, name in watched:
        p = params[name]
        if p.grad is not None:
            values['gradient', group, name, 0] = rms(p.grad)
            if isinstance(eps.get(p), float):
                values['grad/eps', group, name, 0] = rms(p.grad) / eps[p]
    model.zero_grad()

    for step in range(steps + 1):
        seen.clear()
        with torch.no_grad():
            list(losses(PROBE))
            for key in keys:
                if key not in seen:
                    raise UserError(f"the module '{key[1]}' ({key[0]}) is not called by the loss: leave it out")
                x = seen[key][2].detach().float()
                values['activation', *key, step] = x.abs().mean()
                values['change', *key, step] = (x - first.setdefault(key, x)).abs().mean()
            if step == 0:
                inputs = {key: call[:2] for key, call in seen_blocks.items()}
            if step == 1:
                for key, call in inputs.items():
                    block = model.get_submodule(key[1])
                    after = {name: p.detach() for name, p in block.named_parameters() if p.is_floating_point()}
                    before = {name: start[f'{key[1]}.{name}'] for name in after}
                    values['distance', *key, step] = distance_from_linearization(block, before, after, *call)
        if step < steps:
            model.train()
            _, _, diverged = update(model, optimizer, losses(step))
            model.eval()
            if diverged:  # such a run has no coordinates
                for p in params.values():
                    p.data.fill_(math.nan)
    for group, name in watched:
        values['update', group, name, steps] = rms(params[name].detach() - start[name])

    optimizer.state.clear()  # without moments and gradients, decay is all that a step does
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in eps:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, name in watched:
        lost = (before[name] - params[name].detach()).norm()
        values['decay', group, name, steps] = lost / before[name].norm().clamp(min=1e-30)
    return {key: float(value) for key, value in values.items()}


# -----------------------------------------------------------------------------
# Slopes and verdicts


class Band(NamedTuple):
    """The slopes that pass, from low to high, the one that theory expects, and why."""
    expected: float
    low: float
    high: float
    why: str

    def used(self, slope, stderr):
        """How much of the band slope and stderr take up: above 1 is outside; infinity if they are not finite."""
        used = (abs(slope - (self.low + self.high) / 2) + stderr) / ((self.high - self.low) / 2)
        return used if math.isfinite(used) else math.inf


def around(expected, tolerance, why):
    return Band(expected, expected - tolerance, expected + tolerance, why)


FLAT = around(0, 0.15, 'must not depend on size; finite sizes and few steps move it by up to 0.1')
LAZY = around(0, 0.25, 'no block may come closer to its linearization: -1/2 is lazy')
UPDATE = 'Adam moves a weight by its lr, whatever the size of the gradient'
EPS = around(0, 0.25, 'eps must follow the gradient: one factor forgotten is 1/2 or 1')
HEADS = 'of the heads that share it gradients add up at random at step 0, and once they agree fully'
FEW = 'a few heads, whose random starts do not average out'
KEYS = 'a head of keys and values adds up the gradients of more and more heads of queries'
GRADIENT = 'what it is divided by on its way back, at step 0: m_N, and m_L^alpha inside of the blocks'
DECAY = 'lr x weight decay, up to rounding'


OF_MODULES = ('activation', 'change', 'distance')  # the quantities of modules; the others are those of weights


class Line(NamedTuple):
    """The fit of one quantity over the sizes; `values` are its geometric means over the seeds."""
    quantity: str
    group: str
    step: int
    name: str  # of the module or parameter; where their number depends on size: lowest, highest and last of them
    where: str  # its name, for lowest and highest the one it was at the largest size
    slope: float
    stderr: float
    values: tuple
    band: Band | None  # None: not judged

    @property
    def key(self):
        return self.quantity, self.group, self.step, self.name

    @property
    def used(self):
        """How much of the band is used up: above 1 is a failure."""
        return self.band.used(self.slope, self.stderr) if self.band else 0.0

    def __str__(self):
        return f'{self.quantity} of {self.where} at step {self.step} {self.slope:+.2f}'


def fit(sizes, values):
    """(slope, standard error, geometric means) of values (seeds, sizes) on logarithmic axes, a fit for each seed."""
    with np.errstate(divide='ignore', invalid='ignore'):
        x, y = np.log2(np.array(sizes, dtype=float)), np.log2(values)
        slopes = (y - y.mean(1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        return slopes.mean(), slopes.std(ddof=1) / len(slopes) ** 0.5, tuple(2 ** y.mean(0))


def lines_of(runs, sizes, seeds, expected):
    """A Line for every quantity in runs[size, seed] = measure(..), judged by `expected`, {pattern: Band or None}.

    What is zero at every size has no slope: it is left out if it may be zero, and has the slope nan, a failure, if not.
    """
    series, where = defaultdict(lambda: np.full((len(seeds), len(sizes)), math.nan)), {}
    names_at = defaultdict(set)  # the names of a group at each size
    for (size, _), run in runs.items():
        for quantity, group, name, _ in run:
            names_at[quantity, group, size].add(name)
    for (size, seed), run in runs.items():  # the last run has the largest size
        at = seeds.index(seed), sizes.index(size)
        layers = defaultdict(dict)
        for (quantity, group, name, step), value in run.items():
            layers[quantity, group, step][name] = value
        for (quantity, group, step), found in layers.items():
            places = {name: name for name in found}
            if any(names_at[quantity, group, other] != set(found) for other in sizes):
                ascending = sorted(found, key=lambda name: (math.isnan(found[name]), found[name]))
                places = dict(lowest=ascending[0], highest=ascending[-1], last=list(found)[-1])
            for place, name in places.items():
                key = quantity, group, step, place
                series[key][at], where[key] = found[name], name
    lines = []
    for key, values in series.items():
        text = ' '.join(str(part) for part in key)
        band = next((band for pattern, band in expected.items() if re.fullmatch(pattern, text)), None)
        may_be_zero = band is None or key[2] == 0
        if np.any(values != 0) or not may_be_zero:
            lines.append(Line(*key, where[key], *fit(sizes, values), band))
    return lines


@dataclass
class Report:
    """What check() found: str() is the table with the verdict."""
    title: str
    size_name: str
    sizes: list
    names: tuple  # of the treatment and, if there is one, the control
    treatment: list  # of Line
    control: list

    @property
    def failures(self):
        """Lines of the treatment outside of their bands, worst first."""
        return sorted((line for line in self.treatment if line.used > 1), key=lambda line: -line.used)

    @property
    def control_failures(self):
        """Lines of the control that show it to fail: changes and distances outside, even less their standard error."""
        lines = [line for line in self.control if line.band and line.quantity in ('change', 'distance')] or self.control
        return [line for line in lines if line.band and not line.band.used(line.slope, -line.stderr) <= 1]

    @property
    def passed(self):
        return not self.failures and (len(self.names) == 1 or bool(self.control_failures))

    def __str__(self):
        row = '{:<11}{:<14}{:<23}{:>4}{:>9}{:>16}{:>16} {:<5}{:>15} {}'.format
        treatment, control = (*self.names, '')[:2]
        text = [self.title, row('quantity', 'of', 'worst line', 'step', 'expected', 'band', treatment, '', control, '')]
        worst, bands = {}, {}
        for line in self.treatment:
            key = line.quantity, line.group
            if line.band and (key not in worst or line.used > worst[key].used):
                worst[key] = line
        in_control = {line.key: line for line in self.control}
        for line in worst.values():
            beside = in_control.get(line.key)
            bands[line.band] = f'{line.band.low:+.2f} .. {line.band.high:+.2f}'
            text.append(row(
                line.quantity, line.group, re.sub(r'^transformer\.|\.weight$', '', line.name), line.step,
                f'{line.band.expected:g}', bands[line.band],
                f'{line.slope:+.2f} ± {line.stderr:.2f}', 'FAIL' if line.used > 1 else 'pass',
                f'{beside.slope:+.2f} ± {beside.stderr:.2f}' if beside else '',
                'outside' if beside and beside.used > 1 else ''))
        text += ['Bands hold a slope and its standard error over the seeds:']
        text += [f'    {shown}  {band.why}' for band, shown in bands.items()]
        judged = sum(line.band is not None for line in self.treatment)
        if self.failures:
            text.append(f'FAIL: {len(self.failures)} of {judged} slopes of {treatment} are outside of their bands: '
                        + ', '.join(str(line) for line in self.failures[:3]))
        elif not self.passed:
            text.append(f'FAIL: the control {control} passes, too, so this check proves nothing: use more sizes, more '
                        'steps or a larger learning rate')
        else:
            beside = f'; the control {control} fails in {len(self.control_failures)}' if control else '; no control ran'
            text.append(f'PASS: all {judged} slopes of {treatment} are inside of their bands{beside}')
        return '\n'.join(line.rstrip() for line in text)

    def plot(self, path):
        """Draws what the modules do over size, a line per step from light to dark, control and treatment side by side.

        Of several layers it shows the one that is worst in the treatment. Returns the path.
        """
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot, ticker
        from PIL import Image  # comes with matplotlib
        models = dict(zip(self.names, (self.treatment, self.control)))
        models = dict(reversed(models.items()))  # the control on the left
        shown = [line for line in self.treatment if line.quantity in OF_MODULES]
        if not shown:
            raise UserError('neither modules nor blocks were measured: there is nothing to plot')
        quantities = list(dict.fromkeys(line.quantity for line in shown))
        groups = list(dict.fromkeys(line.group for line in shown))
        steps = 1 + max(line.step for lines in models.values() for line in lines)
        figure, grid = pyplot.subplots(
            len(groups), len(quantities) * len(models), squeeze=False, sharex=True, layout='constrained',
            figsize=(0.8 + 3 * len(quantities) * len(models), 0.8 + 2.2 * len(groups)))
        for row, group in zip(grid, groups):
            for i, quantity in enumerate(quantities):
                pair = row[i * len(models):][:len(models)]
                of_group = [line for line in shown if (line.quantity, line.group) == (quantity, group)]
                worst = max(of_group, key=lambda line: line.used, default=None)
                lines = {model: [line for line in found if worst and (line.quantity, line.group, line.name) ==
                                 (quantity, group, worst.name)] for model, found in models.items()}
                values = np.array([value for found in lines.values() for line in found for value in line.values])
                values = values[np.isfinite(values) & (values > 0)]
                if not len(values):
                    for axes in pair:
                        axes.set_axis_off()
                    continue
                middle = (values.min() * values.max()) ** 0.5
                # one scale for both, and never less than a factor of 8: what is flat must look flat
                low, high = min(values.min(), middle / 8 ** 0.5) / 1.2, max(values.max(), middle * 8 ** 0.5) * 1.2
                high *= (high / low) ** 0.4  # room for the legend
                for axes, model in zip(pair, models):
                    judged = [line.step for line in lines[model] if line.band]
                    for line in lines[model]:
                        label = f'step {line.step}: slope {line.slope:+.2f} ± {line.stderr:.2f}'
                        axes.plot(self.sizes, line.values, marker='o', markersize=3, linewidth=1.2,
                                  label=label if line.step in (judged[:1] + judged[-1:]) else None,
                                  color=pyplot.cm.viridis_r(0.1 + 0.9 * line.step / steps))
                    one_of_several = any(line.name != worst.name for line in of_group)
                    which = f" ({worst.name.removeprefix('transformer.')})" if one_of_several else ''
                    axes.set_title(f'{quantity} of {group}{which}\n{model}', fontsize=8)
                    axes.set_xscale('log', base=2)
                    axes.set_yscale('log', base=2)
                    axes.set_ylim(low, high)
                    axes.set_xticks(self.sizes, [f'{size:g}' for size in self.sizes])
                    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.3g}'))
                    axes.tick_params(labelsize=7)
                    axes.grid(alpha=0.3)
                    axes.spines[['top', 'right']].set_visible(False)
                    if judged:
                        axes.legend(frameon=False, fontsize=7, loc='upper left')
        for axes in grid[-1]:
            axes.set_xlabel(self.size_name, fontsize=8)
        figure.suptitle(self.title, fontsize=10)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        Image.open(path).quantize(64).save(path, optimize=True)  # a third of the bytes
        return path


def write_csv(path, reports):
    """Writes every line of the reports, {name: Report}: its slope, its band, and its value at each size."""
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['check', 'model', 'quantity', 'group', 'step', 'name', 'where', 'slope', 'stderr', 'expected',
                         'low', 'high', 'verdict', 'sizes', 'values'])
        for name, report in reports.items():
            for model, lines in zip(report.names, (report.treatment, report.control)):
                for line in lines:
                    band = ['', '', '', '']
                    if line.band:
                        band = [line.band.expected, line.band.low, line.band.high, 'fail' if line.used > 1 else 'pass']
                    writer.writerow([name, model, *line.key, line.where, f'{line.slope:.4f}', f'{line.stderr:.4f}',
                                     *band, ' '.join(f'{size:g}' for size in report.sizes),
                                     ' '.join(f'{value:.5g}' for value in line.values)])


def check(make, sizes, modules={}, parameters={}, blocks='', expected={}, control=None, seeds=3, steps=10,
          names=('treatment', 'control'), title='coordinate check', size_name='size'):
    """Trains make(size) for every size and seed, fits every quantity, and returns a Report with the verdict.

    make(size) returns (module, optimizer, loss_fn); torch is seeded before. loss_fn(step) returns the loss on the batch
    of that step, or yields those of its micro-batches; loss_fn(-1) is the probe. `control` is a make that must fail.
    `modules`, `parameters`: {group: pattern of whole names}, whose outputs and weights are measured; `blocks`: pattern
    of modules whose distance from linearization is. `expected`: {pattern: Band, slope or None for not judged}, matched
    against 'quantity group step name'; the first match counts. What matches none is judged as flat if it is an
    activation or a change, at the first and the last step, or a distance, and not at all if it belongs to a weight.
    Raises UserError.
    """
    names = tuple(names) if control else tuple(names)[:1]
    if len(set(names)) != 1 + bool(control):
        raise UserError(f'the names {names} must be different, one for the treatment and one for the control')
    if len(set(sizes)) < 3 or len(set(sizes)) < len(sizes) or min(sizes) <= 0:
        raise UserError(f'sizes {list(sizes)} give no slope: use at least three different positive ones')
    if seeds < 2 or steps < 1:
        raise UserError(f'seeds={seeds} and steps={steps} are too few: use at least 2 seeds, for the standard error, '
                        'and 1 step')
    bands = {pattern: around(band, 0.15, 'as asked for') if isinstance(band, int | float) else band
             for pattern, band in expected.items()}
    for pattern, band in ((rf'activation \S+ (0|{steps}) .*', FLAT), (rf'change \S+ (1|{steps}) .*', FLAT),
                          (r'distance \S+ 1 .*', LAZY)):
        bands.setdefault(pattern, band)
    sizes, seeds, lines = sorted(sizes), list(range(1, seeds + 1)), []
    with tqdm(total=len(names) * len(sizes) * len(seeds), unit='run', disable=None, leave=False) as bar:
        for name, make_one in zip(names, (make, control)):
            runs = {}
            for size in sizes:
                for seed in seeds:
                    bar.set_description(f'{name}, size {size:g}, seed {seed}')
                    runs[size, seed] = measure(make_one, size, seed, modules, parameters, blocks, steps)
                    bar.update()
            lines.append(lines_of(runs, sizes, seeds, bands))
    report = Report(title, size_name, sizes, names, lines[0], lines[1] if control else [])
    texts = [' '.join(str(part) for part in line.key) for line in report.treatment]
    for pattern in expected:
        if not any(re.fullmatch(pattern, text) for text in texts):
            raise UserError(f"expected['{pattern}'] matches nothing that was measured, such as {texts[:1]}")
    if not any(line.band for line in report.treatment):
        raise UserError('nothing is judged: name some modules or blocks, or expected slopes for some parameters')
    return report


# -----------------------------------------------------------------------------
# The checks of nanoP's own GPT


class Axis(NamedTuple):
    """What grows along an axis, and the parameterization that must fail there."""
    key: str  # of CoordCheckConfig, with the sizes
    varies: str  # of GPTConfig
    control: str


AXES = {
    'width':    Axis('widths',    'n_embd',  'sp'),         # arXiv:2203.03466
    'depth':    Axis('depths',    'n_layer', 'mup'),        # arXiv:2505.01618, Fig. 7
    'density':  Axis('densities', 'density', 'sp'),         # arXiv:2405.15743, Fig. 5
    'laziness': Axis('depths',    'n_layer', 'depth_mup'),  # arXiv:2505.01618, Fig. 6
}

MODULES = {
    'embedding': r'transformer\.drop',
    'attention': r'transformer\.h\.\d+\.attn',
    'mlp':       r'transformer\.h\.\d+\.mlp',
    'residual':  r'transformer\.h\.\d+',  # the stream after each block
    'logits':    r'lm_head',
}


@dataclass
class CoordCheckConfig:
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
    alpha: float = 0.0                     # depth exponent in [0.5, 1]; 0: the parameterization's own
    # model (see GPTConfig)
    bias: bool = True
    norm: str = 'layernorm'
    norm_gain: bool = True
    qk_norm: bool = False
    activation: str = 'gelu'
    pos: str = 'learned'
    n_kv_head: int = 0
    tie_weights: bool = False
    attn_scale: str = 'base'
    unembed_form: str = 'multiplier'
    zero_init_query: bool = False
    zero_init_unembed: bool = False
    # training
    seeds: int = 3
    steps: int = 10
    dataset: str = 'stdlib'
    block_size: int = 64
    batch_tokens: int = 512
    batch_size: int = 64                   # most sequences in a micro-batch
    probe_tokens: int = 128
    learning_rate: float = 1e-3            # constant
    init_std: float = 0.05
    input_mult: float = 20.0               # 1 / init_std: with embeddings of size 1 few layers behave like many
    weight_decay: float = 0.1
    optimizer: str = 'adamw'
    muon_mult: float = 5.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    device: str = 'auto'
    dtype: str = 'float32'                 # of the products in training; the probe is always float32

    def __post_init__(self):
        """Raises UserError for a value that no check can use."""
        require_at_least(self, seeds=2, steps=1, block_size=1, batch_tokens=1, batch_size=1, probe_tokens=1,
                         learning_rate=0, weight_decay=0, muon_mult=1e-6, beta1=0, beta2=0, eps=1e-38)
        for key in ('beta1', 'beta2'):
            if getattr(self, key) >= 1:
                raise UserError(f'{key}={getattr(self, key)} is not allowed: use a value in [0, 1)')
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer='{self.optimizer}' is not known: use {', '.join(OPTIMIZERS)}")
        if self.control not in ('', 'none', *PARAMETERIZATIONS):
            raise UserError(f"control='{self.control}' is not known: use none, {', '.join(PARAMETERIZATIONS)}")
        if self.control == self.parameterization:
            raise UserError(f"control='{self.control}' is what is checked: use another, or none")
        for axis in self.axes.split(','):
            if axis not in AXES:
                raise UserError(f"axis '{axis}' is not known: use {', '.join(AXES)}, several separated by commas")


def expected_slopes(axis, alpha, config, roles):
    """What check() is to expect of weights with these roles, beside flat activations and changes.

    From the papers, not from model.py; bands of what papers leave open are as wide as was measured (LOG.md).
    """
    c, hidden = config, '(hidden_weight|residual_proj)'
    inside = '(block_norm|qk_norm|hidden_bias|hidden_weight|residual_proj)'
    in_blocks = alpha - 1 if axis == 'depth' else 0  # how the lr of what is in blocks falls
    slopes = {}
    if axis in ('width', 'depth') and c.n_kv_head:
        low = alpha - 1.3 if axis == 'depth' else -0.3
        slopes |= {f'(activation|change) attention (0|1|{c.steps}) .*': Band(0, low, 0.3, FEW),
                   **({'update qk_norm .*': around(in_blocks, 0.25, FEW)} if 'qk_norm' in roles else {})}
    if axis in ('width', 'depth') and c.optimizer == 'sgd':
        noisy = 'steps of SGD are as noisy as its gradients'
        slopes |= {f'update {role} .*': around(in_blocks if re.fullmatch(inside, role) else 0, 0.25, noisy)
                   for role in roles if not re.fullmatch(hidden, role)}
    if axis == 'width':
        head = 'the random part of the logits falls as width^-1/2, n_embd terms over m_N, until learning hides it'
        if not c.zero_init_unembed:
            slopes |= {'activation logits 0 .*': around(-0.5, 0.15, head)}
        if c.optimizer == 'sgd':
            slopes |= {'change logits 1 .*': Band(0, -0.65, 0.15, head)}
        slopes |= {f'activation logits {c.steps} .*': Band(-0.5, -0.65, 0.15, head),
                   f'change logits (1|{c.steps}) .*': Band(0, -0.35, 0.15, head)}
        if c.unembed_form == 'weights':  # which then carry 1/m_N
            slopes |= {'gradient unembedding .*': around(0, 0.25, GRADIENT),
                       'update unembedding .*': around(-1, 0.1, UPDATE)}
        if 'qk_norm' in roles:
            slopes |= {'(gradient|grad/eps) qk_norm .*': Band(-0.5, -0.75, 0.25, HEADS)}
        if c.n_kv_head:
            slopes |= {'gradient hidden_(weight|bias) .*attn.*': Band(-0.75, -1.25, -0.5, KEYS),
                       'grad/eps hidden_(weight|bias) .*attn.*': Band(0.25, -0.25, 0.5, KEYS)}
        slopes |= {f'update {hidden} .*': around(-1, 0.1, UPDATE)}
        if c.optimizer == 'muon':
            slopes |= {f'update {hidden} .*': Band(-0.5, -1.1, -0.4, 'entries are width^-1/2, width^-1 if of low rank'),
                       f'grad/eps {hidden} .*': around(-1, 0.25, 'eps stands beside the whole matrix')}
        slopes |= {'gradient .*': around(-1, 0.25, GRADIENT)}
    if axis == 'depth':
        block = 'with alpha < 1 what a block adds of its own falls as its lr, what it passes on is flat'
        slopes |= {'(activation|change) logits .*': None,  # the final norm hides what depth does
                   '(activation|change) residual .* (lowest|highest)': None,  # the first block of many is no last one
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
            slopes |= {'grad/eps .*': EPS}
        if c.weight_decay:
            slopes |= {'decay (embedding|hidden_weight|residual_proj|unembedding) .*': around(0, 0.02, DECAY)}
    return slopes


def make_gpt(config, data, device, autocast, shape, varies, size):
    """A GPT with `varies`=size, its optimizer and its losses, for check()."""
    c = config
    seed = torch.initial_seed()  # check() has set it
    model = GPT(GPTConfig(**{**shape, varies: size, 'mask_seed': seed})).to(device)
    optimizer = optimizer_of(model, c, device.type)
    sequences, _, micro_batches = split_batch(c, world_size=1)
    batch_size = sequences // micro_batches

    def losses(step):
        if step == PROBE:
            length = min(c.block_size, c.probe_tokens)
            yield model(*data.batch('val', data.val_starts(c.probe_tokens, length), length, device))[1]
            return
        starts = data.train_starts(seed, step, sequences, c.block_size)
        for i in range(0, sequences, batch_size):
            with autocast:
                loss = model(*data.batch('train', starts[i:i + batch_size], c.block_size, device))[1]
            yield loss / micro_batches

    return model, optimizer, losses


class ToyResidualNet(nn.Module):
    """The network of arXiv:2505.01618, Fig. 6: (B, 784) -> (B, 10) through residual blocks of two (ReLU, Linear)."""

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
    """A toy net of which, as in the paper, one weight of the second block is trained, on noise of MNIST's shape.

    The learning rate is not the paper's: a step so small crosses no kink of a ReLU, and its distance is rounding.
    """
    rules = GPTConfig(n_layer=n_layer, n_embd=n_embd, base_n_embd=n_embd, parameterization=parameterization,
                      alpha=alpha).rules
    model = ToyResidualNet(n_layer, n_embd, rules['residual_branch'].forward).requires_grad_(False)
    weight = model.branches[1][1].weight.requires_grad_(True)
    rule = rules['hidden_weight']
    optimizer = torch.optim.Adam([weight], lr=learning_rate * rule.lr, eps=1e-8 * rule.eps)
    inputs, targets = torch.randn(128, 784), torch.randint(10, (128,))
    return model, optimizer, lambda step: F.cross_entropy(model(inputs), targets)


def numbers(config, key):
    """The list in config.key. Raises UserError."""
    text = getattr(config, key)
    kind = float if key == 'densities' else int
    try:
        return [kind(part) for part in text.split(',')]
    except ValueError:
        raise UserError(f"{key}='{text}' is not a list of {kind.__name__}s: write --{key}="
                        f'{getattr(type(config), key)}') from None


def plan(config, axis, data, device):
    """The calls of check() for one axis: {name: arguments}. Raises UserError for whatever none can use."""
    c = config
    split_batch(c, world_size=1)
    keys, varies, control = AXES[axis]
    sizes = numbers(c, keys)
    shape = {key: getattr(c, key) for key in MODEL_KEYS if hasattr(c, key)}
    shape.update(vocab_size=data.vocab_size, base_head_dim=c.head_dim)
    smallest = {**shape, varies: min(sizes)}
    shape.update(base_n_layer=smallest['n_layer'], base_n_embd=smallest['n_embd'])
    names = [c.parameterization]
    if c.control != 'none' and (c.control or control) != c.parameterization:  # what is checked is no control of itself
        names.append(c.control or control)
    shapes = [dict(shape, parameterization=name, alpha=0.0) for name in names]
    shapes[0]['alpha'] = c.alpha
    try:
        for size in sizes:
            for kwargs in shapes:
                with torch.device('meta'):
                    model = GPT(GPTConfig(**{**kwargs, varies: size}))
                optimizer_of(model, c, 'meta')
    except ValueError as error:
        raise UserError(error) from None
    if len(set(sizes)) < 3 or len(set(sizes)) < len(sizes):
        raise UserError(f'{keys}={getattr(c, keys)} gives no slope: use at least three different sizes')
    if axis == 'laziness' and min(sizes) < 2:
        raise UserError(f'{keys}={getattr(c, keys)} is not allowed: the laziness axis needs at least 2 layers')
    dtype = pick_dtype(c.dtype, device)
    if dtype == torch.float16:
        raise UserError("dtype='float16' needs the gradient scaling of train.py: use float32 or bfloat16")
    if device.type == 'mps' and axis == 'laziness':
        raise UserError('the laziness axis needs float64, which mps does not have: use --device=cpu')
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # alpha as the papers promise it, not as model.py has it: that is under test
    alpha = c.alpha or (0.5 if c.parameterization == 'depth_mup' else 1.0)
    fixed = ', '.join(f'{key}={shape[key]}' for key in ('n_layer', 'n_embd') if key != varies)
    there = {role_of(name) for name, _ in model.weights()}
    roles = {role: pattern for role, pattern in ROLES.items() if role in there}
    expected = expected_slopes(axis, alpha, c, roles)
    common = dict(sizes=sizes, size_name=varies, seeds=c.seeds, names=names)

    def arguments(makes, what, steps, **more):
        title = f"{axis}: {' against '.join(names)}, {what}, {c.seeds} seeds, {steps} step{'s' * (steps > 1)}"
        control = makes[1] if len(makes) > 1 else None
        return dict(common, make=makes[0], control=control, title=title, steps=steps, **more)

    gpts = [partial(make_gpt, c, data, device, autocast, kwargs, varies) for kwargs in shapes]
    if axis != 'laziness':
        return {axis: arguments(gpts, fixed, c.steps, modules=MODULES, parameters=roles, expected=expected)}
    toys = [partial(make_toy, kwargs['parameterization'], kwargs['alpha']) for kwargs in shapes]
    return {'laziness_toy': arguments(toys, "the paper's toy network", 1, blocks=r'branches\.1'),
            'laziness': arguments(gpts, fixed, 1, blocks=r'transformer\.h\.\d+')}


def main():
    """Returns the exit code: 0 if every check passes, 1 if one fails. Raises UserError."""
    config = CoordCheckConfig(**configure(CoordCheckConfig, sys.argv[1:]))
    device = pick_device(config.device)
    data = open_dataset(config.dataset)
    plans = {}
    for axis in config.axes.split(','):
        plans |= plan(config, axis, data, device)
    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_csv(out_dir / 'coord_check.csv', {})
    except OSError as error:
        raise UserError(f"out_dir='{out_dir}' cannot be written: {error}") from None
    reports = {}
    for name, arguments in plans.items():
        started = time.perf_counter()
        report = reports[name] = check(**arguments)
        print(f"{report}\n({time.perf_counter() - started:.0f} s; {report.plot(out_dir / f'{name}.png')})\n")
        write_csv(out_dir / 'coord_check.csv', reports)
    for report in reports.values():
        print(f"{'PASS' if report.passed else 'FAIL'}  {report.title}")
    return 0 if all(report.passed for report in reports.values()) else 1


if __name__ == '__main__':
    exit_on_user_error(main)
