"""
Coordinate checks of any model: does one training step change it equally at every size?

    from nanop.coordinates import check

Models of growing size are trained for a few steps, with several seeds each, and so is a control that must fail. Each
quantity is fitted by size^slope:

    activation  mean |x| of a module's output on a probe batch that is never trained on
    change      mean |x - x at step 0| on the probe batch
    update      RMS of a weight's change since step 0, over the entries that moved
    gradient    RMS of a weight's gradient at step 0, over the entries that are not zero
    grad/eps    gradient divided by the eps of the weight's optimizer group
    decay       fraction of a weight that a step without gradient takes away
    distance    between a block's change in one step and its linearization in the weights, relative to the latter
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
from nanop.errors import UserError, explained
from nanop.files import write_csv

PROBE = -1  # loss_fn(PROBE) is the loss on the probe batch, loss_fn(0) that on the first training batch, and so on

# -----------------------------------------------------------------------------
# Measuring one model
def matching(patterns, named):
    """[(group, name)] of the names that a group's pattern matches; a pattern that matches none is an error."""
    found, names = [], [name for name, _ in named]
    for group, pattern in patterns.items():
        with explained(re.error, f"'{pattern}' ({group}) is not a regular expression"):
            hits = [(group, name) for name in names if re.fullmatch(pattern, name)]
        if not hits:
            some = ', '.join(map(repr, names[:6]))
            raise UserError(f"nothing is called '{pattern}' ({group}): the names are {some}, ..; give the module "
                            'itself, not a compiled or wrapped one')
        found += hits
    return found


def first_of(output):
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, torch.Tensor):
        raise UserError(f'a module returns {type(first).__name__}, not a tensor: name modules that return one')
    return first


def record_calls(model, patterns):
    """A dict that every forward pass in eval mode fills: {(group, name of a module): (args, kwargs, output)}."""
    calls = {}

    def keep(key, module, args, kwargs, output):
        if not module.training:
            calls[key] = args, kwargs, first_of(output)

    for key in matching(patterns, model.named_modules()):
        model.get_submodule(key[1]).register_forward_hook(partial(keep, key), with_kwargs=True)
    return calls


def rms(x):
    """Root mean square over the nonzero entries: masked weights and tokens that did not occur do not count."""
    return x.norm() / x.count_nonzero().clamp(min=1).sqrt()


def distance_from_linearization(module, before, after, args, kwargs={}):
    """|f(after) - f(before) - J (after - before)| / |J (after - before)|, sums of magnitudes, of a module's output f.
    `before` and `after` are its parameters by name. J is exact: forward mode in float64. arXiv:2505.01618, Eq. 6."""
    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    before, after = ({name: p.double() for name, p in params.items()} for params in (before, after))
    args, kwargs = [double(x) for x in args], {key: double(x) for key, x in kwargs.items()}

    def output(params):
        return first_of(functional_call(module, params, tuple(args), kwargs))

    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
        at_start, linear = jvp(output, (before,), ({name: after[name] - before[name] for name in before},))
        return (output(after) - at_start - linear).abs().sum() / linear.abs().sum()


def train_step(model, optimizer, losses):
    """Take one optimizer step. A run that diverges has no coordinates, so its weights become nan."""
    model.train()
    total = 0.0
    for loss in losses:
        loss.backward()
        total = total + loss.detach()
    if math.isfinite(total) and math.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)):
        optimizer.step()
    else:
        for p in model.parameters():
            p.data.fill_(math.nan)
    optimizer.zero_grad(set_to_none=True)
    model.eval()


def measure_coordinates(make, size, seed, modules, parameters, blocks, steps):
    """{(quantity, group, name, step): value} of one model, trained for `steps`; see check() for the arguments."""
    torch.manual_seed(seed)
    model, optimizer, loss_fn = make(size)
    params = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in params.items()}
    eps = {p: group.get('eps') for group in optimizer.param_groups for p in group['params']}
    outputs, weights = matching(modules, model.named_modules()), matching(parameters, params.items())
    calls, block_calls = record_calls(model, modules), record_calls(model, {'block': blocks} if blocks else {})
    values, first = {}, {}  # tensors until the run is over

    def losses(step):
        loss = loss_fn(step)
        if loss is None or isinstance(loss, float | int):
            raise UserError(f'loss_fn({step}) returns {loss!r}: return the loss as a tensor, without .item()')
        return [loss] if isinstance(loss, torch.Tensor) else loss

    model.eval()
    for loss in losses(PROBE):
        loss.backward()
    for group, name in weights:
        p = params[name]
        if p.grad is not None:
            values['gradient', group, name, 0] = rms(p.grad)
            if isinstance(eps.get(p), float):
                values['grad/eps', group, name, 0] = rms(p.grad) / eps[p]
    model.zero_grad()

    for step in range(steps + 1):
        calls.clear()
        with torch.no_grad():
            list(losses(PROBE))
            for group, name in outputs:
                if (group, name) not in calls:
                    raise UserError(f"the module '{name}' ({group}) is not called by the loss: leave it out")
                x = calls[group, name][2].detach().float()
                values['activation', group, name, step] = x.abs().mean()
                values['change', group, name, step] = (x - first.setdefault((group, name), x)).abs().mean()
            if step == 0:
                inputs = {key: call[:2] for key, call in block_calls.items()}
            if step == 1:
                for (group, name), call in inputs.items():
                    block = model.get_submodule(name)
                    after = {key: p.detach() for key, p in block.named_parameters() if p.is_floating_point()}
                    before = {key: start[f'{name}.{key}'] for key in after}
                    values['distance', group, name, 1] = distance_from_linearization(block, before, after, *call)
        if step < steps:
            train_step(model, optimizer, losses(step))
    for group, name in weights:
        values['update', group, name, steps] = rms(params[name].detach() - start[name])

    optimizer.state.clear()  # without moments and gradients, a step only decays the weights
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in eps:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, name in weights:
        lost = (before[name] - params[name].detach()).norm()
        values['decay', group, name, steps] = lost / before[name].norm().clamp(min=1e-30)
    return {key: float(value) for key, value in values.items()}


# -----------------------------------------------------------------------------
# Slopes and verdicts
HALFWAY = 0.25  # the exponents of rules differ by multiples of 1/2, so a slope this close to one is not another
EXCLUDED = 2    # standard errors that must lie between a slope that passes and the next exponent
OUTSIDE = 3     # standard errors by which a slope must miss its band to fail: a check judges about a hundred slopes

REASONS = {  # what keeps a line, or with 'control' the check, from being judged: (what it means, what decides)
    'divergence': ('training diverges', 'a smaller learning rate'),
    'saturation': ('it starts right and leaves its band in later steps', 'a smaller learning rate'),
    'noise':      ('the seeds differ too much', 'more seeds'),
    'curvature':  ('it is not yet a power of the size, as its slope changes towards the large end', 'larger sizes'),
    'control':    ('nothing shows that this check can fail', 'larger sizes, more steps or a larger learning rate'),
}


class Band(NamedTuple):
    """The slopes that pass, from low to high, the one that theory expects, and why."""
    expected: float
    low: float
    high: float
    why: str

    def off(self, slope):
        """How far a slope is from the middle of the band."""
        return abs(slope - (self.low + self.high) / 2)

    def used(self, slope, stderr):
        """How far a slope uses the band up: 1 at its edge, or where the next exponent is EXCLUDED errors away."""
        off, half = self.off(slope), (self.high - self.low) / 2
        used = max(off / half, (off + EXCLUDED * stderr) / (half + min(half, HALFWAY)))
        return used if math.isfinite(used) else math.inf

    def excludes(self, slope, error):
        """Whether a slope is outside by more than this error."""
        return self.off(slope) - error > (self.high - self.low) / 2


def around(expected, why, to=None, tolerance=HALFWAY):
    """The Band of an exponent, or of one that theory leaves open between `expected` and `to`."""
    ends = expected, expected if to is None else to
    return Band(expected, min(ends) - tolerance, max(ends) + tolerance, why)


FLAT = around(0, 'must not depend on size')
LAZY = around(0, 'blocks must not approach their linearization as the size grows: -1/2 is lazy')


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
    end_slope: float  # of the larger half of the sizes
    end_stderr: float
    start_slope: float  # of the sizes up to these
    band: Band | None  # None: not judged
    verdict: str = ''  # pass, fail, or one of REASONS; '': not judged

    @property
    def key(self):
        return self.quantity, self.group, self.step, self.name

    @property
    def badness(self):
        """Sorts lines: not judged, those that pass, those that decide nothing, those that fail."""
        if not self.band:
            return ()
        used = self.band.used(self.slope, self.stderr), self.band.used(self.end_slope, self.end_stderr)
        return self.verdict == 'fail', self.verdict != 'pass', min(used)

    def __str__(self):
        slopes = f'{self.slope:+.2f}, large end {self.end_slope:+.2f}'
        return f'{self.quantity} of {self.where} at step {self.step} ({slopes})'


def fit(sizes, values):
    """(slope, standard error, geometric means) of values (seeds, sizes) on logarithmic axes, with a fit per seed."""
    with np.errstate(divide='ignore', invalid='ignore'):
        x, y = np.log2(np.array(sizes, dtype=float)), np.log2(values)
        slopes = (y - y.mean(1, keepdims=True)) @ (x - x.mean()) / ((x - x.mean()) ** 2).sum()
        return slopes.mean(), slopes.std(ddof=1) / len(slopes) ** 0.5, tuple(2 ** y.mean(0))


def line_of(key, where, sizes, values, band):
    """The Line of values (seeds, sizes). The large end is the larger half of the sizes, and at least three of four."""
    first = len(sizes) - min(max(3, (len(sizes) + 1) // 2), len(sizes) - 1)
    end, start = fit(sizes[first:], values[:, first:]), fit(sizes[:first + 1], values[:, :first + 1])
    return Line(*key, where, *fit(sizes, values), *end[:2], start[0], band)


def verdict_of(line, noise, started_right):
    """pass, fail, or one of REASONS. `noise` is the usual standard error of such lines: seeds may agree by chance.
    `started_right`: the module was inside its band after the first step.

    A line passes if its slope at the large end is inside the band, or that over all sizes is and the large end does not
    contradict. It fails if both are outside, the latter by OUTSIDE errors, from the first step on, and if that lasts:
    at the large end the deviation is more than half of what it was before."""
    if not np.isfinite(line.values).all():
        return 'divergence'
    if not math.isfinite(line.slope):  # it is zero
        return 'fail'
    band, error = line.band, max(line.end_stderr, noise)
    contradicts = len(line.values) > 3 and band.excludes(line.end_slope, OUTSIDE * error)  # a slope of two is no slope
    if band.used(line.end_slope, line.end_stderr) <= 1 or not contradicts and band.used(line.slope, line.stderr) <= 1:
        return 'pass'
    if started_right:
        return 'saturation'
    outside = band.excludes(line.slope, OUTSIDE * max(line.stderr, noise)) and band.excludes(line.end_slope, error)
    lasts = band.off(line.end_slope) > band.off(line.start_slope) / 2
    return 'fail' if outside and lasts else 'curvature' if outside or contradicts else 'noise'


def judged(lines):
    """The lines, which are in the order of their steps, with their verdicts."""
    errors, started_right = defaultdict(list), {}
    for line in lines:
        errors[line.quantity, line.step] += [line.stderr] if math.isfinite(line.stderr) else []
    for i, line in enumerate(lines):
        if line.band:
            noise = np.square(errors[line.quantity, line.step] or [0]).mean() ** 0.5
            later = line.quantity in ('activation', 'change') and started_right.get((line.group, line.name), False)
            line = lines[i] = line._replace(verdict=verdict_of(line, noise, later))
            if line.quantity == 'change':
                started_right.setdefault((line.group, line.name), line.verdict == 'pass')
    return lines


def places_of(layers, same_everywhere):
    """{place: name} of the layers, {name: value}, to follow over sizes: all of them, or the extremes and the last."""
    if same_everywhere:
        return {name: name for name in layers}
    ascending = sorted(layers, key=lambda name: (math.isnan(layers[name]), layers[name]))
    return dict(lowest=ascending[0], highest=ascending[-1], last=list(layers)[-1])


def lines_of(runs, sizes, seeds, expected):
    """A Line for every quantity in runs[size, seed], judged by `expected`, {pattern: Band or None}.
    A quantity that is zero at every size has no slope: it is left out if it may be zero, else it fails with nan."""
    measured = defaultdict(lambda: defaultdict(dict))  # {(quantity, group, step): {(size, seed): {name: value}}}
    for model, run in runs.items():
        for (quantity, group, name, step), value in run.items():
            measured[quantity, group, step][model][name] = value
    series, where = defaultdict(lambda: np.full((len(seeds), len(sizes)), math.nan)), {}
    for kind, models in measured.items():
        same_everywhere = len({frozenset(layers) for layers in models.values()}) == 1
        for (size, seed), layers in models.items():  # the last one has the largest size
            for place, name in places_of(layers, same_everywhere).items():
                key = *kind, place
                series[key][seeds.index(seed), sizes.index(size)], where[key] = layers[name], name
    lines = []
    for key, values in series.items():
        text = ' '.join(map(str, key))
        band = next((band for pattern, band in expected.items() if re.fullmatch(pattern, text)), None)
        may_be_zero = band is None or key[2] == 0
        if np.any(values != 0) or not may_be_zero:
            lines.append(line_of(key, where[key], sizes, values, band))
    return judged(lines)


@dataclass
class CoordinateReport:
    """What check() found. str() is the table with the verdict."""
    title: str
    size_name: str
    sizes: list
    names: tuple  # of the treatment and, if there is one, of the control
    treatment: list  # of Line
    control: list

    def having(self, *verdicts):
        """Lines of the treatment with one of these verdicts, worst first."""
        found = [line for line in self.treatment if line.verdict in verdicts]
        return sorted(found, key=lambda line: line.badness, reverse=True)

    @property
    def failures(self):
        return self.having('fail')

    @property
    def control_failures(self):
        """Lines that show that the control fails, over all sizes: changes and distances, if there are any."""
        lines = [line for line in self.control if line.band and line.quantity in ('change', 'distance')] or self.control
        return [line for line in lines if line.band and not (
            math.isfinite(line.slope) and not line.band.excludes(line.slope, OUTSIDE * line.stderr))]

    @property
    def reason(self):
        """The first of REASONS that keeps the check from a verdict, or ''."""
        found = {line.verdict for line in self.treatment}
        if len(self.names) > 1 and not self.control_failures:
            found.add('control')
        return '' if self.failures else next((reason for reason in REASONS if reason in found), '')

    @property
    def verdict(self):
        """PASS, FAIL or INCONCLUSIVE."""
        return 'FAIL' if self.failures else 'INCONCLUSIVE' if self.reason else 'PASS'

    def __str__(self):
        row = '{:<11}{:<14}{:<22}{:>4}{:>16}{:>15}{:>15} {:<11}{:>14} {}'.format
        treatment, control = (*self.names, '')[:2]
        text = [self.title, row('quantity', 'of', 'worst line', 'step', 'band', treatment[:14], 'large end', '',
                                control[:13], '')]
        worst, bands = {}, {}
        for line in sorted(self.treatment, key=lambda line: line.badness):
            if line.band:
                worst[line.quantity, line.group] = line
        in_control = {line.key: line for line in self.control}
        for line in sorted(worst.values(), key=self.treatment.index):
            other = in_control.get(line.key)
            bands[line.band] = f'{line.band.low:+.2f} .. {line.band.high:+.2f}'
            text.append(row(
                line.quantity, line.group, re.sub(r'^transformer\.|\.weight$', '', line.name), line.step,
                bands[line.band], f'{line.slope:+.2f} ± {line.stderr:.2f}',
                f'{line.end_slope:+.2f} ± {line.end_stderr:.2f}', line.verdict.replace('fail', 'FAIL'),
                f'{other.slope:+.2f} ± {other.stderr:.2f}' if other else '',
                other.verdict.replace('pass', '') if other else ''))
        text += ['The slope over all sizes, or at the large end, must be inside its band:']
        text += [f'    {shown}  {band.why}' for band, shown in bands.items()]
        return '\n'.join(line.rstrip() for line in [*text, self.summary()])

    def summary(self):
        """The last line of the table."""
        judged = sum(line.band is not None for line in self.treatment)
        treatment, control = (*self.names, '')[:2]
        if self.failures:
            worst = ', '.join(str(line) for line in self.failures[:3])
            return f'FAIL: {len(self.failures)} of {judged} slopes of {treatment} are outside their bands: {worst}'
        if self.reason:
            lines = self.having(*REASONS)
            which = (f'{len(lines)} of {judged} slopes of {treatment} decide nothing, such as {lines[0]}' if lines else
                     f'the control {control} passes, too')
            return 'INCONCLUSIVE: {}: {}; use {}'.format(which, *REASONS[self.reason])
        fails = f'; the control {control} fails in {len(self.control_failures)}' if control else '; no control ran'
        return f'PASS: all {judged} slopes of {treatment} are inside their bands{fails}'

    def plot(self, path):
        """Draw the modules over size, one line per step from light to dark, control and treatment side by side. Of
        several layers, the one that is worst in the treatment is shown. Returns the path."""
        from PIL import Image  # comes with matplotlib
        models = dict(reversed([*zip(self.names, (self.treatment, self.control))]))  # the control on the left
        shown = [line for line in self.treatment if line.quantity in ('activation', 'change', 'distance')]
        if not shown:
            raise UserError('neither modules nor blocks were measured: there is nothing to plot')
        quantities = list(dict.fromkeys(line.quantity for line in shown))
        groups = list(dict.fromkeys(line.group for line in shown))
        across = len(quantities) * len(models)
        size = 0.8 + 3 * across, 0.8 + 2.2 * len(groups)
        with plots.figure(path, len(groups), across, size=size, dpi=110, sharex=True) as (figure, grid):
            for row, group in zip(grid.reshape(len(groups), len(quantities), len(models)), groups):
                for panels, quantity in zip(row, quantities):
                    self.plot_pair(panels, models, quantity, group)
            for panel in grid[-1]:
                panel.set_xlabel(self.size_name, fontsize=8)
            figure.suptitle(self.title, fontsize=10)
        Image.open(path).quantize(64).save(path, optimize=True)  # a third of the bytes
        return path

    def plot_pair(self, panels, models, quantity, group):
        """Draw the layer that is worst in the treatment, for each of the models, {name: lines}, on a common scale."""
        layers = [line for line in self.treatment if (line.quantity, line.group) == (quantity, group)]
        worst = max(layers, key=lambda line: line.badness, default=None)
        lines = {model: [line for line in found if worst and (line.quantity, line.group, line.name) ==
                         (quantity, group, worst.name)] for model, found in models.items()}
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
        several = any(line.name != worst.name for line in layers)
        which = f" ({worst.name.removeprefix('transformer.')})" if several else ''
        for panel, model in zip(panels, models):
            self.plot_steps(panel, lines[model])
            panel.set_title(f'{quantity} of {group}{which}\n{model}', fontsize=8)
            panel.set_ylim(low, high)

    def plot_steps(self, panel, lines):
        """Draw one line per step, with the slopes of the first and the last judged step in the legend."""
        from matplotlib import pyplot, ticker
        steps = 1 + max(line.step for line in [*self.treatment, *self.control])
        judged = [line.step for line in lines if line.band]
        for line in lines:
            label = f'step {line.step}: slope {line.slope:+.2f} ± {line.stderr:.2f}'
            panel.loglog(self.sizes, line.values, base=2, marker='o', markersize=3, linewidth=1.2,
                         label=label if line.step in (judged[:1] + judged[-1:]) else None,
                         color=pyplot.cm.viridis_r(0.1 + 0.9 * line.step / steps))
        panel.set_xticks(self.sizes, [f'{size:g}' for size in self.sizes])
        panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.3g}'))
        panel.tick_params(labelsize=7)
        if judged:
            panel.legend(frameon=False, fontsize=7, loc='upper left')


def write_slopes(path, reports):
    """Write every line of the reports, {name: report}: its slope, its band, and its value at each size."""
    rows = []
    for name, report in reports.items():
        for model, lines in zip(report.names, (report.treatment, report.control)):
            for line in lines:
                slopes = {key: f'{getattr(line, key):.4f}' for key in ('slope', 'stderr', 'end_slope', 'end_stderr')}
                rows.append(line._asdict() | (line.band._asdict() if line.band else {}) | slopes | dict(
                    check=name, model=model,
                    sizes=' '.join(f'{size:g}' for size in report.sizes),
                    values=' '.join(f'{value:.5g}' for value in line.values)))
    write_csv(path, rows, ('check', 'model', 'quantity', 'group', 'step', 'name', 'where', 'slope', 'stderr',
                           'end_slope', 'end_stderr', 'expected', 'low', 'high', 'verdict', 'sizes', 'values'))


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
        raise UserError(f'seeds={seeds} with steps={steps} is too few: use at least 2 seeds and 1 step')
    bands = {pattern: around(band, 'as asked for') if isinstance(band, int | float) else band
             for pattern, band in expected.items()}
    usual = {rf'activation \S+ (0|{steps}) .*': FLAT, rf'change \S+ (1|{steps}) .*': FLAT, r'distance \S+ 1 .*': LAZY}
    bands |= {pattern: band for pattern, band in usual.items() if pattern not in bands}
    sizes, seeds, lines = sorted(sizes), list(range(1, seeds + 1)), []
    with tqdm(total=len(names) * len(sizes) * len(seeds), unit='run', disable=None, leave=False) as bar:
        for name, make_one in zip(names, (make, control)):
            runs = {}
            for size in sizes:
                for seed in seeds:
                    bar.set_description(f'{name}, size {size:g}, seed {seed}')
                    runs[size, seed] = measure_coordinates(make_one, size, seed, modules, parameters, blocks, steps)
                    bar.update()
            lines.append(lines_of(runs, sizes, seeds, bands))
    report = CoordinateReport(title, size_name, sizes, names, lines[0], lines[1] if control else [])
    texts = [' '.join(map(str, line.key)) for line in report.treatment]
    for pattern in expected:
        if not any(re.fullmatch(pattern, text) for text in texts):
            raise UserError(f"expected['{pattern}'] matches nothing that was measured, such as {texts[:1]}")
    if not any(line.band for line in report.treatment):
        raise UserError('nothing is judged: name some modules or blocks, or expected slopes for some parameters')
    return report
