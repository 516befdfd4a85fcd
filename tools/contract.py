"""
A transfer contract: the runs that tell whether the best learning rate of a small model stays the best up to a target
shape, and the report on them. Three shapes are trained; transfer.py holds the statistics.

    shape    {key: value} of the keys that the target changes, from the config's shape to the target
    size     how far a shape lies from the config's, in octaves of the key that changes most
"""
import bisect
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np

from configurator import flat, merge, nested, read_flag
from nanop import plots
from nanop.errors import UserError, explained
from nanop.machine import pick_device
from tools.sweep_points import DEFAULTS, FIXED, TYPES, Sweep, cost
from tools.sweep_queue import open_datasets
from tools.sweep_report import curve_of, mean_losses, number, optimum, plus_minus
from tools.transfer import EXIT_CODES, MOST_COST, judge_curves
from train import TrainConfig

SHAPE_KEYS = ('n_layer', 'n_embd', 'head_dim', 'density')
MOST_REACH = 3  # how many times as far as the largest shape the target may lie
MOST_OCTAVES = 4  # how far from the config's the rates may go


def bracket(losses, centre):
    """The rate to add to one seed's {rate: loss} so that its optimum gets a parabola, in a list. [] if it has one, or
    if that rate is more than MOST_OCTAVES from the `centre`."""
    rates = sorted(losses)
    i = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if i in (0, len(rates) - 1):
        more = rates[0] / 2 if i == 0 else rates[-1] * 2
    elif losses[rates[i + 1]] == math.inf and rates[i + 1] > 1.9 * rates[i]:
        more = rates[i] * math.sqrt(2)
    else:
        return []
    return [more] if abs(math.log2(more / centre)) <= MOST_OCTAVES else []


def next_runs(curve, centre, seeds):
    """The (rate, seed) pairs to run next at one shape: the first seed until its optimum has a parabola, then all seeds
    at the best rate and its neighbours, then further out for those whose own optimum lies there."""
    first, of_seed = seeds[0], {seed: {rate: losses[seed] for rate, losses in curve.items() if seed in losses}
                                for seed in seeds}
    if not of_seed[first]:
        return {(centre * 2.0 ** k, first) for k in (-1, 0, 1)}
    more = {(rate, first) for rate in bracket(of_seed[first], centre)}
    found = optimum({rate: {first: loss} for rate, loss in sorted(of_seed[first].items())})
    if more or not found.at_by_seed:
        return more  # none at the limit, where no other seed can help
    means = mean_losses(curve)
    i = list(means).index(min(means, key=means.get))
    near = list(means)[max(0, i - 1):i + 2]
    return ({(rate, seed) for rate in near for seed in seeds if seed not in curve[rate]}
            or {(rate, seed) for seed in seeds for rate in bracket(of_seed[seed], centre)}
            or {(rate, seed) for rate in bracket(means, centre) for seed in seeds})


def read_target(text):
    """{key: value} of a target such as n_layer=32,n_embd=512."""
    target = {}
    for part in text.split(','):
        key = part.partition('=')[0]
        if key not in SHAPE_KEYS or key in target:
            raise UserError(f"--target={text}: {key!r} is {'there twice' if key in target else 'not one of its keys'}; "
                            f"give any of {', '.join(SHAPE_KEYS)} once, as in n_layer=32,n_embd=512")
        target |= read_flag(f'--{part}', TYPES)
    return target


def name_of(shape):
    return ', '.join(f'{key} {number(value)}' for key, value in shape.items())


class Contract:
    """What a contract runs, from a SweepConfig and the overrides of TrainConfig. `shapes`: the config's, one half-way,
    and the largest whose run costs at most largest_frac of the target's; `costs`: of a run, in runs of the target."""

    def __init__(self, config, overrides):
        self.config, self.overrides = config, flat(overrides)
        for key, value in self.overrides.items():
            if isinstance(value, list) and key != 'seed':
                raise UserError(f'{key}={value} is a list: a contract takes one value of every key but seed')
        seed = overrides.get('seed', DEFAULTS['seed'])
        self.seeds = seed if isinstance(seed, list) else [seed, seed + 1, seed + 2]
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f'seed={self.seeds} names a seed twice, which is the same run twice: leave one of them out')
        base = TrainConfig(**nested(merge(DEFAULTS, self.overrides, TrainConfig) | dict(seed=self.seeds[0]) | FIXED))
        self.rate, self.target = base.learning_rate, read_target(config.target)
        if not self.rate:
            raise UserError('learning_rate=0.0 is not allowed: a contract runs rates around it')
        self.start = {key: getattr(base, key) for key in self.target}
        for key, value in self.target.items():
            if value == self.start[key] or (value > self.start[key]) == (key == 'density'):
                side = 'below' if key == 'density' else 'above'
                raise UserError(f"--target={config.target}: {key} must be {side} the config's {self.start[key]}; leave "
                                'it out to keep that')
        data = open_datasets([base])[base.dataset]
        pick_device(base.device)
        self.choose_shapes(base, lambda shape: cost(replace(base, **shape), data))

    def shapes_between(self, base):
        """All shapes on the way to the target, a straight line in log2, that can be built."""
        shapes = []
        for fraction in np.linspace(0, 1, 513)[1:-1]:
            shape = {key: value * (self.target[key] / value) ** fraction for key, value in self.start.items()}
            shape |= {key: round(shape[key]) for key in ('n_layer', 'head_dim') if key in shape}
            if 'n_embd' in shape:
                head_dim = shape.get('head_dim', base.head_dim)
                shape['n_embd'] = round(shape['n_embd'] / head_dim) * head_dim
            if 'density' in shape:
                shape['density'] = float(f"{shape['density']:.4g}")
            if shape not in (self.start, self.target, *shapes[-1:]):
                with suppress(UserError):  # that it cannot be built
                    replace(base, **shape)
                    shapes.append(shape)
        return shapes

    def choose_shapes(self, base, cost_of):
        whole, shapes = cost_of(self.target), self.shapes_between(base)
        cheap = shapes[:bisect.bisect_right(shapes, self.config.largest_frac * whole, key=cost_of)]
        self.target_size, way = self.size_of(self.target), self.size_of(cheap[-1] if cheap else self.start)
        if len(cheap) < 2 or way * MOST_REACH < self.target_size:
            raise UserError(f'--target={self.config.target} is too near: {len(cheap)} shapes between cost at most '
                            f'largest_frac={self.config.largest_frac:g} of its run, the largest goes {way:.2f} of '
                            f'{self.target_size:.2f} octaves; a contract needs 2 and {1 / MOST_REACH:.0%} of the way. '
                            'Raise --largest_frac, or sweep the target itself')
        middle = min(cheap[:-1], key=lambda shape: abs(self.size_of(shape) - way / 2))
        self.shapes = [self.start, middle, cheap[-1]]
        self.sizes = [self.size_of(shape) for shape in self.shapes]
        self.costs = [cost_of(shape) / whole for shape in self.shapes]

    def size_of(self, shape):
        whole = {key: math.log2(self.target[key] / value) for key, value in self.start.items()}
        way = sum(math.log2(shape[key] / self.start[key]) * octaves for key, octaves in whole.items())
        return way / sum(octaves ** 2 for octaves in whole.values()) * max(map(abs, whole.values()))

    def plan_text(self):
        least = 3 * len(self.seeds)
        return (
            f"Shapes: {'; '.join(map(name_of, self.shapes))}. Target: {name_of(self.target)}, "
            f'{self.target_size / self.sizes[-1]:.1f} times as far as the largest shape.\n'
            f'Rates: {self.rate:g} and an octave to each side; more while the best is at an edge, up to {MOST_OCTAVES} '
            'octaves away; half an octave up where runs diverge an octave above the best.\n'
            f"Seeds: {', '.join(map(str, self.seeds))}; the first at all rates, the others at the best one and its two "
            'neighbours.\n'
            f"Compute: a run costs {', '.join(f'{each:.2g}' for each in self.costs)} of one run of the target; with at "
            f'least {least} runs of each shape the contract costs {least * sum(self.costs):.1f} runs of the target.')

    def curves_of(self, rows):
        """The curve of each shape, from the rows of trials.csv."""
        return [curve_of([row for row in rows if row['seed'] in self.seeds and shape.items() <= row.items()],
                         'learning_rate', []) for shape in self.shapes]

    def next_sweep(self, rows):
        """The (Sweep, overrides) of the runs that are wanted after these rows; None after the last ones."""
        wanted = {(name_of(shape), rate, seed) for shape, curve in zip(self.shapes, self.curves_of(rows))
                  for rate, seed in next_runs(curve, self.rate, self.seeds)}
        if not wanted:
            return None
        overrides = self.overrides | dict(learning_rate=sorted({rate for _, rate, _ in wanted}),
                                          seed=sorted({seed for _, _, seed in wanted}))
        config = replace(self.config, contract=False, target='', largest_frac=type(self.config).largest_frac,
                         shapes=self.shapes)

        def is_wanted(point):
            return (name_of({key: point[key] for key in self.start}), point['learning_rate'], point['seed']) in wanted
        return Sweep(config, overrides, is_wanted), overrides

    def conclude(self, rows, out_dir):
        """Write contract.md and contract.png. Returns (the text, the exit code)."""
        curves = self.curves_of(rows)
        verdict = judge_curves(self.sizes, curves, self.target_size)
        text = self.markdown(curves, verdict)
        with explained(OSError, f"'{out_dir}/contract.md' cannot be written"):
            (out_dir / 'contract.md').write_text(text)
        if verdict.drift:
            self.plot(curves, verdict, out_dir / 'contract.png')
        return text, EXIT_CODES[verdict.word]

    def markdown(self, curves, verdict):
        def power(pair):
            return plus_minus(*pair, '{:.2f}')
        lines = [f'# Transfer contract: {verdict.word}', '', self.plan_text(), '',
                 '| shape | octaves | runs | optimum, log2 of the rate | of each seed | loss |', '|---' * 6 + '|']
        for shape, size, curve in zip(self.shapes, self.sizes, curves):
            found = optimum(curve)
            of_seeds = ', '.join(f'{at:.2f}' for at in found.at_by_seed.values())
            lines.append(f'| {name_of(shape)} | {size:.2f} | {sum(map(len, curve.values()))} | '
                         f'{found.mark} {found.at:.2f} | {of_seeds} | {found.loss:.4f} |'.replace('|  ', '| '))
        if verdict.drift:
            lines += ['', f'Largest shape, held out: predicted {power(verdict.predicted)}, measured '
                      f'{power(verdict.measured)}.', f'Drift to the target: {power(verdict.drift)} octaves; '
                      f'{verdict.tolerance:.2f} octaves cost {MOST_COST:.1%} of the loss.',
                      '', '![optimum against size](contract.png)']
        rate = {'TRANSFERS': verdict.start, 'SHIFTS': verdict.at_target}.get(verdict.word)
        use = (f'At the target, {self.target_size / self.sizes[-1]:.1f} times as far as the largest shape, use '
               f'learning_rate={2 ** rate[0]:.3g}, 2^({power(rate)})') if rate else verdict.todo
        return '\n'.join([*lines, '', f'{verdict.word}: {verdict.reason}. {use}.']) + '\n'

    def plot(self, curves, verdict, path):
        """Optimum against size: seeds, means, the line to the target, the held-out prediction, what a rate may miss."""
        with plots.figure(path, size=(6.4, 4.2)) as (_, axes):
            panel = axes[0, 0]
            for size, curve in zip(self.sizes, curves):
                optima = optimum(curve).at_by_seed.values()
                panel.plot([size] * len(optima), list(optima), '.', color='C0', alpha=0.5)
            panel.errorbar(self.sizes[-1], verdict.predicted[0], verdict.predicted[1], fmt='s', color='C1',
                           label='held out, predicted')
            ends = [verdict.at_target[0] - verdict.drift[0], verdict.at_target[0]]
            panel.plot([0, self.target_size], ends, '--', color='C0', label='line through the means of the seeds')
            panel.errorbar(self.target_size, *verdict.at_target, fmt='o', color='C0', label='target, extrapolated')
            start, tolerance = verdict.start[0], verdict.tolerance
            panel.axhspan(start - tolerance, start + tolerance, color='C2', alpha=0.15,
                          label=f'costs less than {MOST_COST:.1%} of the loss')
            panel.set(xlabel=f'octaves from {name_of(self.start)}', ylabel='log2 of the best learning rate')
            panel.set_title(f'{verdict.word}: to {name_of(self.target)}', fontsize=10)
            panel.legend(frameon=False, fontsize=8)
