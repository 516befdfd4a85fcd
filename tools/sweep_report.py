"""
What a sweep found: a plot for each axis, and report.md with optimum, drift and regret.

    row      {key: value} of one run: its point (n_layer, learning_rate, seed, ..) and its results
    losses   {seed: loss}: nats per token over the fixed validation tokens after the last step; infinity if it diverged
    curve    {value of an axis: losses}, in ascending order
    rules    the values of a model's `row_keys`, a tuple: parameterization, and what variants change
    shape    the other values in which models differ, as text
"""
import math
import textwrap
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanop import plots


class Optimum(NamedTuple):
    """Where a curve is lowest: `best`, the best value that was run, its `loss`, and `at`, the minimum of a parabola.
    `at` is log2 of the value where that makes sense, see position(). `mark`: '<' or '>' if the first or last value is
    best, so that the optimum may lie beyond it; '~' if a neighbouring run diverged, so that there is no parabola.
    `at_by_seed`: each seed's own minimum, {} unless every seed has a parabola. Where all diverged, `best` is None."""
    best: object
    loss: float
    at: float
    mark: str
    at_by_seed: dict


def is_categorical(values):
    return any(isinstance(value, (str, bool)) for value in values)


def position(value, values):
    """Where a value of an axis is drawn and fitted: its log2 if all are above zero, its rank among text or bools."""
    if is_categorical(values):
        return float(sorted(values).index(value))
    return math.log2(value) if min(values) > 0 else float(value)


def mean_losses(curve):
    """{value: mean over all seeds}. Of a value that only some seeds ran, each loss is first shifted by how far its seed
    lies from the mean at the nearest value that all ran: seeds differ, which must not look like the value's doing."""
    seeds, values, means = set().union(*curve.values()), sorted(curve), {}
    of_all = [i for i, value in enumerate(values) if curve[value].keys() == seeds
              and math.inf not in curve[value].values()]
    for i, value in enumerate(values):
        mean = np.mean(list(curve[value].values()))
        if len(curve[value]) < len(seeds) and of_all:
            nearest = curve[values[min(of_all, key=lambda other: abs(other - i))]]
            mean += np.mean(list(nearest.values())) - np.mean([nearest[seed] for seed in curve[value]])
        means[value] = float(mean)
    return means


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def curve_of(rows, axis, other_axes):
    """The curve of rows along an axis; at each value the other axes are at their best, on average over the seeds."""
    losses_at = {}
    for row in rows:
        setting = (row[axis], *[row[key] for key in other_axes])
        losses_at.setdefault(setting, {})[row['seed']] = row['val_loss']
    means, best = mean_losses(losses_at), {}  # best: {value: its best setting}
    for setting in sorted(losses_at):
        value = setting[0]
        if value not in best or means[setting] < means[best[value]]:
            best[value] = setting
    return {value: losses_at[setting] for value, setting in best.items()}


def minimum(xs, losses):
    """(minimum of the parabola through the least loss and its two neighbours, the mark of an Optimum)."""
    i = int(np.argmin(losses))
    if i in (0, len(xs) - 1):
        return xs[i], '<' if i == 0 else '>'
    near_xs, near_losses = xs[i - 1:i + 2], losses[i - 1:i + 2]
    if not np.isfinite(near_losses).all():
        return xs[i], '~'
    a, b, _ = np.polyfit(np.array(near_xs) - xs[i], near_losses, 2)
    if a <= 0:  # three equal losses
        return xs[i], '~'
    return xs[i] + float(np.clip(-b / (2 * a), near_xs[0] - xs[i], near_xs[2] - xs[i])), ''


def optimum(curve):
    """The Optimum of a curve: fitted to the mean over the seeds, and to each seed."""
    means = mean_losses(curve)
    best = min(means, key=means.get)
    if means[best] == math.inf:
        return Optimum(None, math.inf, math.nan, '', {})
    if is_categorical([best]):
        return Optimum(best, means[best], position(best, curve), '', {})
    xs = {value: position(value, curve) for value in curve}
    at, mark = minimum(list(xs.values()), list(means.values()))
    of_seeds = {}  # {seed: (its minimum, its mark)}
    for seed in curve[best]:
        values = [value for value in curve if seed in curve[value]]
        of_seeds[seed] = minimum([xs[value] for value in values], [curve[value][seed] for value in values])
    all_fitted = not mark and not any(mark for _, mark in of_seeds.values())
    return Optimum(best, means[best], at, mark, {seed: at for seed, (at, _) in of_seeds.items() if all_fitted})


Comparison = namedtuple('Comparison', 'drift drift_error regret_frac regret_error better shared')


def compare(curves):
    """The Comparison of the curves of one parameterization, from the base shape to the target.
    Drift: of the optimum. Regret: how much higher the target's loss is at the base's best value than at its own.
    Errors: of the differences that each seed has between the two, or nan. All shapes ran `shared` values; at `better`,
    each beats the shape before it."""
    first, last, means = optimum(curves[0]), optimum(curves[-1]), list(map(mean_losses, curves))
    drift, both = last.at - first.at, first.at_by_seed.keys() & last.at_by_seed.keys()
    drift_error = standard_error([last.at_by_seed[seed] - first.at_by_seed[seed] for seed in both])
    regret_frac = regret_error = math.nan
    if last.best is not None and first.best in curves[-1]:
        kept, own = curves[-1][first.best], curves[-1][last.best]
        regret_frac = means[-1][first.best] / last.loss - 1
        if math.isfinite(regret_frac):
            regret_error = standard_error([kept[seed] / own[seed] - 1 for seed in kept.keys() & own.keys()])
    shared = [[each[value] for each in means] for value in curves[0] if all(value in curve for curve in curves)]
    better = sum(all(after < before for before, after in zip(each, each[1:])) for each in shared)
    return Comparison(drift, drift_error, regret_frac, regret_error, better, len(shared))


def number(value):
    return f'{value:g}' if isinstance(value, float) else str(value)


def plus_minus(value, error, form):
    return form.format(value) + (f' ± {form.format(error).lstrip("+")}' if math.isfinite(error) else '')


LEGEND = """\
Optimum: the minimum of a parabola in log2 through the best value and its two neighbours, fitted to the mean over the
seeds, ± the standard error of the seeds' own optima; then the loss at the best value that was run. < and >: the best
value is the first or last one that was run, so the optimum may lie beyond it. ~: a neighbouring run diverged, so there
is no parabola. Drift: optimum of the last shape minus that of the first, ± the standard error of the seeds' own drifts.
Regret: how much higher the loss of the last shape is at the best value of the first shape than at its own. The other
axes, if any, are at their best."""
UNEVEN = """\
Some values ran with some of the seeds only. Their means are shifted by how far these seeds lie from the mean of all at
the nearest value that all ran; if there is none, they are not shifted."""
SEARCH_LEGEND = """\
Each cell: the best value that was found, and its loss. Regret: how much higher the loss of the last shape is at the
best value of the first shape than at its own."""


class SweepReport:
    """The tables and plots of a sweep. `models` go from base to target; `axes` are what is tuned; `shared` are the keys
    that all runs share; with `fit` the axes are grids, to which parabolas are fitted. Models that differ in `row_keys`
    get different rows of the tables and panels of the plots. `others` are the rows of trials.csv that are not used."""

    def __init__(self, name, rows, models, axes, shared, fit=True, row_keys=('parameterization',), others=()):
        self.name, self.rows, self.models, self.axes, self.shared = name, rows, models, list(axes), shared
        self.fit, self.row_keys, self.others = fit, row_keys, others
        same = {}  # {trials: [rules, ..]}; rules that came to the same runs are one row: sp = mup
        for rules in dict.fromkeys(self.rules_of(model) for model in models):
            trials = tuple(row['trial'] for row in rows if self.rules_of(row) == rules)
            same.setdefault(trials or rules, []).append(rules)
        self.rules = {' = '.join(map(self.label, group)): group[0] for group in same.values()}  # of each row
        several = {key for key in models[0] if len({model[key] for model in models}) > 1}
        self.shape_keys = [key for key in models[0] if key in several and key not in row_keys]
        self.shapes = list(dict.fromkeys(self.shape_of(model) for model in models))
        self.varied = [axis for axis in self.axes if len({row[axis] for row in rows}) > 1]

    def rules_of(self, model):
        return tuple(model[key] for key in self.row_keys)

    def shape_of(self, model):
        return ', '.join(f'{key} {number(model[key])}' for key in self.shape_keys) or 'one shape'

    def label(self, rules):
        """The parameterization, and what else differs from the first row."""
        others = list(zip(self.row_keys, rules, self.rules_of(self.models[0])))[1:]
        return ', '.join([rules[0], *(f'{key} {number(value)}' for key, value, usual in others if value != usual)])

    def curves(self, axis):
        """{label: {shape: curve}} of the models that have been run."""
        curves, others = {label: {} for label in self.rules}, [key for key in self.axes if key != axis]
        for label, rules in self.rules.items():
            for model in self.models:
                rows = [row for row in self.rows if all(row[key] == value for key, value in model.items())]
                if self.rules_of(model) == rules and rows:
                    curves[label][self.shape_of(model)] = curve_of(rows, axis, others)
        return curves

    def optimum_text(self, curve):
        best = optimum(curve)
        if best.best is None:
            return 'none: diverged'
        if not self.fit or is_categorical(curve) or len(curve) < 3:
            exact = isinstance(best.best, float) and min(curve) > 0 and math.log2(best.best).is_integer()
            value = f'2^{math.log2(best.best):.0f}' if exact else number(best.best)
            return f'{value}: {best.loss:.4f}'
        power, form = ('2^', '{:.2f}') if min(curve) > 0 else ('', '{:.3g}')
        mark, error = f'{best.mark} ' if best.mark else '', standard_error(list(best.at_by_seed.values()))
        return f'{mark}{power}{plus_minus(best.at, error, form)}: {best.loss:.4f}'

    def comparison_texts(self, curves):
        """Drift, loss at the first shape's best value, regret, and how often each shape is better, as text."""
        found, first, last = compare(curves), optimum(curves[0]), optimum(curves[-1])
        if first.best is None or last.best is None:
            return ['none', 'diverged' if first.best in curves[-1] else 'none', 'none',
                    f'{found.better} of {found.shared}']
        if not self.fit or is_categorical(curves[0]) or min(curves[0]) <= 0:
            drift = f'{number(first.best)} to {number(last.best)}'
        else:
            drift = plus_minus(found.drift, found.drift_error, '{:+.2f}')
            if first.mark or last.mark:
                drift += f" ({' '.join(dict.fromkeys(first.mark + last.mark))})"
        loss = regret = 'not run'
        if first.best in curves[-1]:
            loss = f'{mean_losses(curves[-1])[first.best]:.4f}'.replace('inf', 'diverged')
            regret = plus_minus(100 * found.regret_frac, 100 * found.regret_error, '{:.1f}') + '%'
            regret = 'diverged' if found.regret_frac == math.inf else regret
        return [drift, loss, regret, f'{found.better} of {found.shared}']

    def table(self, axis):
        """Lines of Markdown: for each row of rules the optimum of every shape, drift and regret."""
        heads = ['rules', *self.shapes]
        compared = len(self.shapes) > 1 and axis in self.varied
        if compared:
            heads += ['drift, octaves', "at the first's best", 'regret', 'each better than the one before']
        lines = [f"| {' | '.join(heads)} |", '|---' * len(heads) + '|']
        for label, curves in self.curves(axis).items():
            cells = [label] + [self.optimum_text(curves[shape]) if shape in curves else '' for shape in self.shapes]
            if compared and len(curves) == len(self.shapes):
                cells += self.comparison_texts(list(curves.values()))
            cells += [''] * (len(heads) - len(cells))
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def markdown(self):
        diverged, seeds = sum(row['val_loss'] == math.inf for row in self.rows), {row['seed'] for row in self.rows}
        seconds = {row['trial']: row['seconds'] for row in self.rows}
        tokens = sorted({row['tokens'] for row in self.rows if row['val_loss'] < math.inf})
        tokens = ' to '.join(f'{n:,}' for n in dict.fromkeys(tokens[:1] + tokens[-1:]))
        shared = ', '.join(f'{key}={number(value)}' for key, value in sorted(self.shared.items()) if value != '')
        lines = [f'# {self.name}', '',
                 f'{len(self.rows)} points, {len(seconds)} runs (equal ones are trained once), {diverged} diverged, '
                 f'{len(seeds)} seed(s); {tokens} training tokens a run; {sum(seconds.values()) / 3600:.2f} hours '
                 'of training in all.', '', f'Shared by all: {shared}.', '']
        if self.others:
            models = {tuple(f'{key} {number(row[key])}' for key in self.models[0]) for row in self.others}
            wanted = {f'{key} {number(model[key])}' for model in self.models for key in model}
            foreign = sorted({text for model in models for text in model} - wanted) or ['other combinations']
            lines += [f"{len(self.others)} more rows of trials.csv are not used: their models are not in this sweep "
                      f"({', '.join(foreign)}).", '']
        for axis in self.varied or self.axes[:1]:
            lines += [f'## {axis}', '', *self.table(axis), '']
            lines += [f'![{axis}]({axis}.png)', ''] if axis in self.varied and diverged < len(self.rows) else []
        if self.shape_keys and diverged < len(self.rows):
            lines += ['![every shape with the values that are best for the first](shapes.png)', '']
        if any(len({*map(frozenset, curve.values())}) > 1 for axis in self.varied for curves in
               self.curves(axis).values() for curve in curves.values()):
            lines += [UNEVEN, '']
        return '\n'.join([*lines, LEGEND if self.fit else SEARCH_LEGEND]) + '\n'

    def plot(self, axis, path):
        """Loss against one axis: a panel for each row of rules, a line for each shape, with its minimum marked."""
        panels, values = self.curves(axis), sorted({row[axis] for row in self.rows})
        drawn = [curve for curves in panels.values() for curve in curves.values()]
        means = [list(mean_losses(curve).values()) for curve in drawn]
        finite = [loss for each in means for loss in each if loss < math.inf]
        # every minimum must show; a few runs that barely learned would flatten the curves
        low, high = min(finite), max(np.quantile(finite, 0.9), *[min(each) for each in means if min(each) < math.inf])
        limits = low - 0.05 * (high - low), high + 0.12 * (high - low) + 1e-6
        rows, columns = math.ceil(len(panels) / 5), min(len(panels), 5)
        size = max(5.2, 3.7 * columns), 4.2 if rows == 1 else 3.6 * rows
        with plots.figure(path, rows, columns, size, sharey=True) as (_, axes):
            for panel in axes.flat[len(panels):]:
                panel.set_visible(False)
            for panel, (label, curves) in zip(axes.flat, panels.items()):
                for color, (shape, curve) in zip(plots.colors(len(curves)), curves.items()):
                    self.draw_curve(panel, curve, values, limits[1], color, shape)
                title = textwrap.fill(label, 40)
                if len(curves) == len(self.shapes) > 1 and self.fit:
                    drift, _, regret, _ = self.comparison_texts(list(curves.values()))
                    title += f"\ndrift {drift}, regret {regret}"
                panel.set_title(title, fontsize=10)
                if is_categorical(values):
                    panel.set_xticks(range(len(values)), [str(value) for value in values])
                panel.set(ylim=limits, xlabel=axis if is_categorical(values) or values[0] <= 0 else f'log2 {axis}')
            for row in axes:
                row[0].set_ylabel('validation loss (nats per token)')
            axes.flat[len(panels) - 1].legend(frameon=False, fontsize=8)

    def draw_curve(self, panel, curve, values, top, color, label):
        """Draw mean losses, the range over the seeds, the minimum, and diverged runs as crosses at the `top`."""
        xs = np.array([position(value, values) for value in curve])
        means = np.array(list(mean_losses(curve).values()))
        finite = means < math.inf
        if self.fit:
            panel.plot(xs, np.where(finite, means, math.nan), '.-', color=color, label=label)
            least, most = ([end(losses.values()) for losses in curve.values()] for end in (min, max))
            panel.fill_between(xs, np.where(finite, least, math.nan), np.where(finite, most, math.nan), color=color,
                               alpha=0.15, linewidth=0)
        else:
            panel.plot(xs, means, '.', color=color, label=label, alpha=0.6)
        for x in xs[~finite]:
            panel.plot(x, top, 'x', color=color, clip_on=False)
        if finite.any():
            best = np.argmin(means)
            panel.plot(xs[best], means[best], 'o', color=color, markersize=9, markeredgecolor='black')

    def plot_shapes(self, path):
        """Loss against shape, a line for each row of rules: at the value that is best for the first shape (transfer);
        dotted: at each shape's own best value. The gap is the regret."""
        axis = (self.varied or self.axes)[0]
        with plots.figure(path, size=(6.4, 4.2)) as (_, axes):
            panel = axes[0, 0]
            for i, (label, curves) in enumerate(self.curves(axis).items()):
                if self.shapes[0] not in curves or i >= 10:  # more colors could not be told apart
                    continue
                first_best = optimum(curves[self.shapes[0]]).best
                kept = {shape: mean_losses(curve)[first_best] for shape, curve in curves.items() if first_best in curve}
                tuned = {shape: optimum(curve).loss for shape, curve in curves.items()}
                for losses, style, name in ((kept, 'o-', label), (tuned, ':', None)):
                    xs = [self.shapes.index(shape) for shape in losses]
                    means = [loss if loss < math.inf else math.nan for loss in losses.values()]
                    panel.plot(xs, means, style, color=f'C{i}', label=name, markersize=5)
            panel.set_xticks(range(len(self.shapes)), [shape.replace(', ', '\n') for shape in self.shapes])
            panel.set_ylabel('validation loss (nats per token)')
            panel.set_title(f'at the {axis} that is best for the first shape; dotted: at its own best', fontsize=10)
            panel.legend(frameon=False)

    def write(self, out_dir):
        """Write report.md, a plot for each axis and one over the shapes. Returns the text of the report."""
        out_dir, text = Path(out_dir), self.markdown()
        (out_dir / 'report.md').write_text(text)
        if all(row['val_loss'] == math.inf for row in self.rows):
            return text
        for axis in self.varied:
            self.plot(axis, out_dir / f'{axis}.png')
        if self.shape_keys:
            self.plot_shapes(out_dir / 'shapes.png')
        return text
