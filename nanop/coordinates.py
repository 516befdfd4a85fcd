"""
Coordinate checks of any model: does one training step change it equally at every size?

    from nanop.coordinates import check

Models of growing size train for a few steps, with several seeds each, and a control that must fail trains along. Each
quantity is fitted by size^slope:

    activation  mean |x| of a module's output on a probe batch that is never trained on
    change      mean |x - x at step 0| there
    update      RMS of a weight's change since step 0, over the entries that moved
    gradient    RMS of its gradient at step 0, over the entries that are not zero
    grad/eps    the same, divided by the eps of its optimizer group
    decay       fraction of a weight that a step without gradient takes away
    distance    of a block's change in one step from its linearization in the block's weights, relative to the latter
"""
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from nanop import plots
from nanop.errors import UserError
from nanop.files import write_csv

PROBE = -1  # loss_fn(PROBE) is the loss on the probe batch, loss_fn(0) that on the first training batch, and so on
OF_MODULES = ('activation', 'change', 'distance')  # quantities of modules; the others are of weights

# -----------------------------------------------------------------------------
# Measuring one model
def matching(patterns, named):
    """[(group, name)] of the names that a group's pattern matches; a pattern that matches none is an error."""
    found, names = [], [name for name, _ in named]
    for group, pattern in patterns.items():
        hits = [(group, name) for name in names if re.fullmatch(pattern, name)]
        if not hits:
            some = ', '.join(map(repr, names[:6]))
            raise UserError(f"nothing is called '{pattern}' ({group}): the names are {some}, ..; give the module "
                            'itself, not a compiled or wrapped one')
        found += hits
    return found


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def record_calls(model, patterns):
    """A dict that every forward in eval mode fills with {(group, name): (args, kwargs, output)} of the modules."""
    calls = {}

    def keep(key, module, args, kwargs, output):
        if not module.training:
            calls[key] = args, kwargs, first_of(output)

    for key in matching(patterns, model.named_modules()):
        model.get_submodule(key[1]).register_forward_hook(partial(keep, key), with_kwargs=True)
    return calls


def rms(x):
    """Root mean square over the entries that are not zero, so without masked weights and tokens that did not occur."""
    return x.norm() / x.count_nonzero().clamp(min=1).sqrt()


def distance_from_linearization(module, before, after, args, kwargs={}):
    """|f(after) - f(before) - J (after - before)| / |J (after - before)|, sums of magnitudes, of a module's output f.

    `before` and `after` are its parameters by name. J is exact: forward mode in float64. arXiv:2505.01618, Eq. 6.
    """
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    before, after = ({name: p.double() for name, p in params.items()} for params in (before, after))
    args, kwargs = [double(x) for x in args], {key: double(x) for key, x in kwargs.items()}

    def output(params):
        return first_of(functional_call(module, params, tuple(args), kwargs))

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
        at_start, linear = jvp(output, (before,), ({name: after[name] - before[name] for name in before},))
        return (output(after) - at_start - linear).abs().sum() / linear.abs().sum()


class Measurement:
    """One model in training, and `values`, {(quantity, group, name, step): tensor}, measured on the way."""

    def __init__(self, model, optimizer, loss_fn, modules, parameters, blocks):
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.params = dict(model.named_parameters())
        self.start = {name: p.detach().clone() for name, p in self.params.items()}
        self.outputs = matching(modules, model.named_modules())
        self.weights = matching(parameters, self.params.items())
        self.calls = record_calls(model, modules)
        self.block_calls = record_calls(model, {'block': blocks} if blocks else {})
        self.values, self.first = {}, {}
        model.eval()

    def losses(self, step):
        loss = self.loss_fn(step)
        return [loss] if isinstance(loss, torch.Tensor) else loss

    def gradients(self):
        """Measure gradients at step 0, on the probe."""
        eps = {p: group.get('eps') for group in self.optimizer.param_groups for p in group['params']}
        for loss in self.losses(PROBE):
            loss.backward()
        for group, name in self.weights:
            p = self.params[name]
            if p.grad is not None:
                self.values['gradient', group, name, 0] = rms(p.grad)
                if isinstance(eps.get(p), float):
                    self.values['grad/eps', group, name, 0] = rms(p.grad) / eps[p]
        self.model.zero_grad()

    @torch.no_grad()
    def activations(self, step):
        """Measure the modules on the probe after `step` steps."""
        self.calls.clear()
        list(self.losses(PROBE))
        for group, name in self.outputs:
            if (group, name) not in self.calls:
                raise UserError(f"the module '{name}' ({group}) is not called by the loss: leave it out")
            x = self.calls[group, name][2].detach().float()
            self.values['activation', group, name, step] = x.abs().mean()
            self.values['change', group, name, step] = (x - self.first.setdefault((group, name), x)).abs().mean()

    @torch.no_grad()
    def distances(self, inputs):
        """Measure how far each block's change in step 1 is from its linearization, for its inputs at step 0."""
        for (group, name), (args, kwargs) in inputs.items():
            block = self.model.get_submodule(name)
            after = {key: p.detach() for key, p in block.named_parameters() if p.is_floating_point()}
            before = {key: self.start[f'{name}.{key}'] for key in after}
            self.values['distance', group, name, 1] = distance_from_linearization(block, before, after, args, kwargs)

    def train(self, step):
        """Take one optimizer step; a run that diverges gets nan weights, because it has no coordinates."""
        self.model.train()
        total = 0.0
        for loss in self.losses(step):
            loss.backward()
            total = total + loss.detach()
        trained = [p.grad for p in self.params.values() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in trained]))
        if math.isfinite(total) and math.isfinite(norm):
            self.optimizer.step()
        else:
            for p in self.params.values():
                p.data.fill_(math.nan)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()

    def updates_and_decay(self, steps):
        """Measure how far weights have moved, then what a step without gradients and moments takes away."""
        for group, name in self.weights:
            self.values['update', group, name, steps] = rms(self.params[name].detach() - self.start[name])
        self.optimizer.state.clear()
        before = {name: p.detach().clone() for name, p in self.params.items()}
        for group in self.optimizer.param_groups:
            for p in group['params']:
                p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for group, name in self.weights:
            lost = (before[name] - self.params[name].detach()).norm()
            self.values['decay', group, name, steps] = lost / before[name].norm().clamp(min=1e-30)


def measure(make, size, seed, modules, parameters, blocks, steps):
    """{(quantity, group, name, step): value} of one model, trained for `steps`; see check() for the arguments."""
    torch.manual_seed(seed)
    run = Measurement(*make(size), modules, parameters, blocks)
    run.gradients()
    for step in range(steps + 1):
        run.activations(step)
        if step == 0:
            inputs = {key: call[:2] for key, call in run.block_calls.items()}
        if step == 1:
            run.distances(inputs)
        if step < steps:
            run.train(step)
    run.updates_and_decay(steps)
    return {key: float(value) for key, value in run.values.items()}


# -----------------------------------------------------------------------------
# Slopes and verdicts
class Band(NamedTuple):
    """The slopes that pass, from low to high, the one that theory expects, and why."""
    expected: float
    low: float
    high: float
    why: str

    def used(self, slope, stderr):
        """The fraction of the band that slope and stderr use up: above 1 is outside, infinity if they are not finite.
        """
        used = (abs(slope - (self.low + self.high) / 2) + stderr) / ((self.high - self.low) / 2)
        return used if math.isfinite(used) else math.inf


def around(expected, tolerance, why):
    return Band(expected, expected - tolerance, expected + tolerance, why)


FLAT = around(0, 0.15, 'must not depend on size; finite sizes and few steps move it by up to 0.1')
LAZY = around(0, 0.25, 'no block may come closer to its linearization with size: -1/2 is lazy')


class Line(NamedTuple):
    """The fit of one quantity over the sizes; `values` are its geometric means over the seeds."""
    quantity: str
    group: str
    step: int
    name: str  # of the module or parameter; if their number depends on size: lowest, highest, last
    where: str  # the full name; for lowest and highest the one at the largest size
    slope: float
    stderr: float
    values: tuple
    band: Band | None  # None: not judged

    @property
    def key(self):
        return self.quantity, self.group, self.step, self.name

    @property
    def used(self):
        """The fraction of the band that is used up: above 1 is a failure."""
        return self.band.used(self.slope, self.stderr) if self.band else 0.0

    def __str__(self):
        return f'{self.quantity} of {self.where} at step {self.step} {self.slope:+.2f}'


def fit(sizes, values):
    """(slope, standard error, geometric means) of values (seeds, sizes) on logarithmic axes, with a fit per seed."""
    with np.errstate(divide='ignore', invalid='ignore'):
        x, y = np.log2(np.array(sizes, dtype=float)), np.log2(values)
        slopes = (y - y.mean(1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        return slopes.mean(), slopes.std(ddof=1) / len(slopes) ** 0.5, tuple(2 ** y.mean(0))


def places_of(layers, same_everywhere):
    """{place: name} of the layers, {name: value}, to follow over sizes: all of them, or the extremes and the last."""
    if same_everywhere:
        return {name: name for name in layers}
    ascending = sorted(layers, key=lambda name: (math.isnan(layers[name]), layers[name]))
    return dict(lowest=ascending[0], highest=ascending[-1], last=list(layers)[-1])


def lines_of(runs, sizes, seeds, expected):
    """A Line for every quantity in runs[size, seed] = measure(..), judged by `expected`, {pattern: Band or None}.

    A quantity that is zero at every size has no slope. It is left out if it may be zero; else its slope is nan, which
    fails.
    """
    names_at = defaultdict(set)  # the names of a group at each size
    for (size, _), run in runs.items():
        for quantity, group, name, _ in run:
            names_at[quantity, group, size].add(name)
    series, where = defaultdict(lambda: np.full((len(seeds), len(sizes)), math.nan)), {}
    for (size, seed), run in runs.items():  # the last run has the largest size
        at = seeds.index(seed), sizes.index(size)
        found = defaultdict(dict)
        for (quantity, group, name, step), value in run.items():
            found[quantity, group, step][name] = value
        for (quantity, group, step), layers in found.items():
            same_everywhere = all(names_at[quantity, group, other] == set(layers) for other in sizes)
            for place, name in places_of(layers, same_everywhere).items():
                key = quantity, group, step, place
                series[key][at], where[key] = layers[name], name
    lines = []
    for key, values in series.items():
        text = ' '.join(str(part) for part in key)
        band = next((band for pattern, band in expected.items() if re.fullmatch(pattern, text)), None)
        may_be_zero = band is None or key[2] == 0
        if np.any(values != 0) or not may_be_zero:
            lines.append(Line(*key, where[key], *fit(sizes, values), band))
    return lines


@dataclass
class CoordinateReport:
    """What check() found. str() is the table with the verdict."""
    title: str
    size_name: str
    sizes: list
    names: tuple  # of the treatment and, if there is one, of the control
    treatment: list  # of Line
    control: list

    @property
    def failures(self):
        """Lines of the treatment outside their bands, worst first."""
        return sorted((line for line in self.treatment if line.used > 1), key=lambda line: -line.used)

    @property
    def control_failures(self):
        """Lines that show the control to fail: changes and distances outside their bands by more than their error."""
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
            other = in_control.get(line.key)
            bands[line.band] = f'{line.band.low:+.2f} .. {line.band.high:+.2f}'
            text.append(row(
                line.quantity, line.group, re.sub(r'^transformer\.|\.weight$', '', line.name), line.step,
                f'{line.band.expected:g}', bands[line.band],
                f'{line.slope:+.2f} ± {line.stderr:.2f}', 'FAIL' if line.used > 1 else 'pass',
                f'{other.slope:+.2f} ± {other.stderr:.2f}' if other else '',
                'outside' if other and other.used > 1 else ''))
        text += ['A band holds a slope plus and minus its standard error over the seeds:']
        text += [f'    {shown}  {band.why}' for band, shown in bands.items()]
        return '\n'.join(line.rstrip() for line in [*text, self.verdict()])

    def verdict(self):
        """The last line of the table."""
        judged = sum(line.band is not None for line in self.treatment)
        treatment, control = (*self.names, '')[:2]
        if self.failures:
            worst = ', '.join(str(line) for line in self.failures[:3])
            return f'FAIL: {len(self.failures)} of {judged} slopes of {treatment} are outside their bands: {worst}'
        if not self.passed:
            return (f'FAIL: the control {control} passes, too, so this check proves nothing: use more sizes, more '
                    'steps or a larger learning rate')
        fails = f'; the control {control} fails in {len(self.control_failures)}' if control else '; no control ran'
        return f'PASS: all {judged} slopes of {treatment} are inside their bands{fails}'

    def plot(self, path):
        """Draw the modules over size, one line per step from light to dark, control and treatment side by side.

        Of several layers, the one that is worst in the treatment is shown. Returns the path.
        """
        from PIL import Image  # comes with matplotlib
        models = dict(zip(self.names, (self.treatment, self.control)))
        models = dict(reversed(models.items()))  # the control on the left
        shown = [line for line in self.treatment if line.quantity in OF_MODULES]
        if not shown:
            raise UserError('neither modules nor blocks were measured: there is nothing to plot')
        quantities = list(dict.fromkeys(line.quantity for line in shown))
        groups = list(dict.fromkeys(line.group for line in shown))
        across = len(quantities) * len(models)
        size = 0.8 + 3 * across, 0.8 + 2.2 * len(groups)
        with plots.figure(path, len(groups), across, size=size, dpi=110, sharex=True) as (figure, grid):
            for row, group in zip(grid, groups):
                for i, quantity in enumerate(quantities):
                    of_group = [line for line in shown if (line.quantity, line.group) == (quantity, group)]
                    self.plot_pair(row[i * len(models):][:len(models)], models, of_group)
            for panel in grid[-1]:
                panel.set_xlabel(self.size_name, fontsize=8)
            figure.suptitle(self.title, fontsize=10)
        Image.open(path).quantize(64).save(path, optimize=True)  # a third of the bytes
        return path

    def plot_pair(self, panels, models, of_group):
        """Draw the worst of the lines `of_group` in each of the models, {name: lines}, on a common scale."""
        worst = max(of_group, key=lambda line: line.used, default=None)
        lines = {model: [line for line in found if worst and (line.quantity, line.group, line.name) ==
                         (worst.quantity, worst.group, worst.name)] for model, found in models.items()}
        values = np.array([value for found in lines.values() for line in found for value in line.values])
        values = values[np.isfinite(values) & (values > 0)]
        if not len(values):
            for panel in panels:
                panel.set_axis_off()
            return
        # the scale spans at least a factor of 8, so that a flat line looks flat
        middle = (values.min() * values.max()) ** 0.5
        low, high = min(values.min(), middle / 8 ** 0.5) / 1.2, max(values.max(), middle * 8 ** 0.5) * 1.2
        high *= (high / low) ** 0.4  # room for the legend
        several = any(line.name != worst.name for line in of_group)
        which = f" ({worst.name.removeprefix('transformer.')})" if several else ''
        for panel, model in zip(panels, models):
            self.plot_steps(panel, lines[model])
            panel.set_title(f'{worst.quantity} of {worst.group}{which}\n{model}', fontsize=8)
            panel.set_ylim(low, high)

    def plot_steps(self, panel, lines):
        """Draw one line per step, with the slopes of the first and the last judged step in the legend."""
        from matplotlib import pyplot, ticker
        steps = 1 + max(line.step for line in [*self.treatment, *self.control])
        judged = [line.step for line in lines if line.band]
        for line in lines:
            label = f'step {line.step}: slope {line.slope:+.2f} ± {line.stderr:.2f}'
            panel.plot(self.sizes, line.values, marker='o', markersize=3, linewidth=1.2,
                       label=label if line.step in (judged[:1] + judged[-1:]) else None,
                       color=pyplot.cm.viridis_r(0.1 + 0.9 * line.step / steps))
        panel.set_xscale('log', base=2)
        panel.set_yscale('log', base=2)
        panel.set_xticks(self.sizes, [f'{size:g}' for size in self.sizes])
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.3g}'))
        panel.tick_params(labelsize=7)
        if judged:
            panel.legend(frameon=False, fontsize=7, loc='upper left')


SLOPE_FIELDS = ('check', 'model', 'quantity', 'group', 'step', 'name', 'where', 'slope', 'stderr', 'expected', 'low',
                'high', 'verdict', 'sizes', 'values')


def write_slopes(path, reports):
    """Write every line of the reports, {name: report}: its slope, its band, and its value at each size."""
    rows = []
    for name, report in reports.items():
        for model, lines in zip(report.names, (report.treatment, report.control)):
            for line in lines:
                row = dict(check=name, model=model, **dict(zip(SLOPE_FIELDS[2:6], line.key)), where=line.where,
                           slope=f'{line.slope:.4f}', stderr=f'{line.stderr:.4f}',
                           sizes=' '.join(f'{size:g}' for size in report.sizes),
                           values=' '.join(f'{value:.5g}' for value in line.values))
                if line.band:
                    row.update(expected=line.band.expected, low=line.band.low, high=line.band.high,
                               verdict='fail' if line.used > 1 else 'pass')
                rows.append(row)
    write_csv(path, rows, SLOPE_FIELDS)


def check(make, sizes, modules={}, parameters={}, blocks='', expected={}, control=None, seeds=3, steps=10,
          names=('treatment', 'control'), title='coordinate check', size_name='size'):
    """Train make(size) for every size and seed, fit every quantity, and return a CoordinateReport with the verdict.

    make(size) returns (module, optimizer, loss_fn); torch is seeded before. loss_fn(step) returns the loss on the batch
    of that step, or yields the losses of its micro-batches; loss_fn(-1) is the probe. `control` is a make that must
    fail. `modules` and `parameters`, {group: pattern of whole names}, choose what is measured; `blocks`, a pattern,
    chooses modules whose distance from linearization is measured. `expected`, {pattern: Band, slope or None}, is
    matched against 'quantity group step name'; the first match counts, and None is not judged. Without a match,
    activations and changes at the first and the last step must be flat, distances too, and weights are not judged.
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
    report = CoordinateReport(title, size_name, sizes, names, lines[0], lines[1] if control else [])
    texts = [' '.join(str(part) for part in line.key) for line in report.treatment]
    for pattern in expected:
        if not any(re.fullmatch(pattern, text) for text in texts):
            raise UserError(f"expected['{pattern}'] matches nothing that was measured, such as {texts[:1]}")
    if not any(line.band for line in report.treatment):
        raise UserError('nothing is judged: name some modules or blocks, or expected slopes for some parameters')
    return report
