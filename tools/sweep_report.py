"""
What a sweep found: trials.csv, a plot for each axis, and report.md with optimum, drift and regret.

A row is a dict of one run: its point (n_layer, learning_rate, seed, ...) and what came out. Losses are nats per token
over the fixed validation tokens at the end of the schedule; infinity for a run that diverged.
"""
import csv
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = dict(val_loss=float, bits_per_byte=float, last_train_loss=float, diverged_at=int, tokens=int, params=int,
               seconds=float, stack=int, dtype=str, device=str, torch=str, trial=int)


def write_csv(path, rows):
    """All rows; the keys of the points first."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in RESULTS]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, [*keys, *RESULTS], restval='')
        writer.writeheader()
        writer.writerows(rows)  # floats with all their digits: read_csv() gets the same rows back


def read_csv(path, types):
    """The rows of write_csv(), with the keys of `types`, a dict, as those types; none if there is no file."""
    if not Path(path).exists():
        return []

    def value_of(key, text):
        if not text:
            return None
        kind = types.get(key) or RESULTS.get(key, str)
        return text == 'True' if kind is bool else kind(text)
    with open(path, newline='') as file:
        return [{key: value_of(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


# -----------------------------------------------------------------------------
# Optimum, drift, regret


class Optimum(NamedTuple):
    """Where a curve is lowest: `best`, the value run, and `at` +- `error`, a parabola's lowest point.

    `at` is log2 of the value where that makes sense, see scale(). `error` is the standard error over the seeds, nan
    unless every seed has a parabola of its own. `mark`: '<' or '>' if the lowest point is the first or the last value
    run, so that the optimum may lie beyond; '~' if runs beside it diverged, so that there is no parabola.
    """
    best: object
    at: float
    error: float
    mark: str
    losses: dict  # {seed: loss} at `best`


def scale(value, values):
    """Where a value of an axis is drawn and fitted: log2 if all are above zero, its rank if they are no numbers."""
    if any(isinstance(v, (str, bool)) for v in values):
        return float(sorted(values).index(value))
    return math.log2(value) if min(values) > 0 else float(value)


def curve_of(rows, axis, other_axes):
    """{value of `axis`: {seed: loss}}; the other axes are set to what is best, on average over the seeds, there.

    Means are compared over the same seeds: those that have been run at every value, if there are any.
    """
    settings = {}
    for row in rows:
        settings.setdefault((row[axis], *(row[key] for key in other_axes)), {})[row['seed']] = row['val_loss']
    common = set.intersection(*(set(losses) for losses in settings.values()))
    curve = {}
    for (value, *_), losses in sorted(settings.items()):
        losses = {seed: losses[seed] for seed in sorted(common or losses)}
        if value not in curve or mean(losses) < mean(curve[value]):
            curve[value] = losses
    return curve


def mean(losses):
    return sum(losses.values()) / len(losses)


def standard_error(values):
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def lowest(xs, losses):
    """(lowest point of the parabola through the least loss and its two neighbours, the mark of an Optimum)."""
    i = int(np.argmin(losses))
    if i in (0, len(xs) - 1):
        return xs[i], '<' if i == 0 else '>'
    if not np.isfinite(losses[i - 1:i + 2]).all():
        return xs[i], '~'
    a, b, _ = np.polyfit(np.array(xs[i - 1:i + 2]) - xs[i], losses[i - 1:i + 2], 2)
    if a <= 0:  # three equal losses
        return xs[i], '~'
    return xs[i] + float(np.clip(-b / (2 * a), xs[i - 1] - xs[i], xs[i + 1] - xs[i])), ''


def optimum(curve):
    """The Optimum of a curve: of the mean over the seeds, with the spread of each seed's own."""
    values, xs = list(curve), [scale(value, curve) for value in curve]
    best = min(values, key=lambda value: mean(curve[value]))
    if isinstance(best, (str, bool)):
        return Optimum(best, scale(best, curve), math.nan, '', curve[best])
    at, mark = lowest(xs, [mean(curve[value]) for value in values])
    each = []
    for seed in curve[best]:
        of_seed = [(x, curve[value][seed]) for x, value in zip(xs, values) if seed in curve[value]]
        each.append(lowest(*map(list, zip(*of_seed))))
    fitted = not mark and not any(its_mark for _, its_mark in each)
    return Optimum(best, at, standard_error([x for x, _ in each]) if fitted else math.nan, mark, curve[best])


def compare(curves):
    """Drift, its error, regret (a fraction of the loss), its error, and at how many values each shape beats the last.

    `curves` are of one parameterization, from the base's to the target's. The regret is the target's: its loss at the
    value that is best for the base, minus its own best.
    """
    first, last = optimum(curves[0]), optimum(curves[-1])
    drift, drift_error = last.at - first.at, math.hypot(first.error, last.error)
    at_base = curves[-1].get(first.best)
    regret = regret_error = math.nan
    if at_base:
        regret = mean(at_base) / mean(last.losses) - 1
        if math.isfinite(regret):
            shared = at_base.keys() & last.losses.keys()
            regret_error = standard_error([at_base[seed] / last.losses[seed] - 1 for seed in shared])
    shared = [value for value in curves[0] if all(value in curve for curve in curves)]
    better = sum(all(mean(after[value]) < mean(before[value]) for before, after in zip(curves, curves[1:]))
                 for value in shared)
    return drift, drift_error, regret, regret_error, (better, len(shared))


# -----------------------------------------------------------------------------
# The report


def number(value):
    return f'{value:g}' if isinstance(value, float) else str(value)


def power(value, values):
    """A value as text, 2^k where that is exact."""
    if isinstance(value, float) and min(values) > 0 and math.log2(value) == round(math.log2(value)):
        return f'2^{round(math.log2(value))}'
    return number(value)


def plus_minus(value, error, form):
    return form.format(value) + (f' ± {form.format(error).lstrip("+")}' if math.isfinite(error) else '')


LEGEND = """\
Optimum: the lowest point of a parabola in log2 through the best value and its neighbours, on the mean over the seeds, ±
the standard error of the seeds' own; after it the loss at the best value run. < and >: the best value is the first or
last one run, the optimum may lie beyond; ~: a run beside it diverged, there is no parabola. Drift: last shape minus
first. Regret: how much more the last shape loses at the value best for the first than at its own best. Where there are
several axes, the others are at their best."""
SEARCH_LEGEND = """\
Each cell: the best value found, with its loss. Regret: how much more the last shape loses at the value best for the
first than at its own best."""


class Report:
    """The tables of a sweep. `models` from base to target; `axes` are what is tuned; `fit`: a grid, not a search.

    A row of the tables, a panel of the plots, is what the models have under `row_keys`: their rules, and variants.
    """

    def __init__(self, name, rows, models, axes, base, fit=True, row_keys=('parameterization',)):
        self.name, self.rows, self.models, self.axes, self.base, self.fit = name, rows, models, list(axes), base, fit
        self.row_keys = row_keys
        groups = {}  # parameterizations that came to the same runs throughout are shown as one
        for rules in dict.fromkeys(map(self.rules_of, models)):
            runs = tuple(row['trial'] for row in rows if self.rules_of(row) == rules)
            groups.setdefault(runs or rules, []).append(rules)
        self.rules = {' = '.join(map(self.label, group)): group[0] for group in groups.values()}
        self.shape_keys = [key for key in models[0] if key not in row_keys and
                           len({model[key] for model in models}) > 1]
        self.seeds = sorted({row['seed'] for row in rows})
        self.varied = [axis for axis in self.axes if len({row[axis] for row in rows}) > 1]

    def rules_of(self, model):
        return tuple(model[key] for key in self.row_keys)

    def label(self, rules):
        """The parameterization, and what is not as in the first row."""
        first = self.rules_of(self.models[0])
        changes = [f'{key} {number(value)}' for key, value, usual in zip(self.row_keys[1:], rules[1:], first[1:])
                   if value != usual]
        return ', '.join([rules[0], *changes])

    def shape(self, model):
        return ', '.join(f'{key} {number(model[key])}' for key in self.shape_keys) or 'one shape'

    def curves(self, rules, axis):
        """{shape: curve} of one row, in the order of the models, of what has been run."""
        others = [key for key in self.axes if key != axis]
        curves = {}
        for model in self.models:
            rows = [row for row in self.rows if all(row[key] == value for key, value in model.items())]
            if self.rules_of(model) == rules and rows:
                curves[self.shape(model)] = curve_of(rows, axis, others)
        return curves

    def optimum_text(self, curve):
        best = optimum(curve)
        if not self.fit or isinstance(best.best, (str, bool)) or len(curve) < 3:
            return f'{power(best.best, curve)}: {mean(best.losses):.4f}'
        if min(curve) > 0:
            at = f'2^{best.at:.2f}' + (f' ± {best.error:.2f}' if math.isfinite(best.error) else '')
        else:
            at = plus_minus(best.at, best.error, '{:.3g}')
        return f'{best.mark and best.mark + " "}{at}: {mean(best.losses):.4f}'

    def table(self, axis):
        """Lines of Markdown: for each parameterization the optimum of every shape, drift, regret."""
        shapes = list(dict.fromkeys(self.shape(model) for model in self.models))
        curves = {name: self.curves(rules, axis) for name, rules in self.rules.items()}
        heads = ['rules', *shapes]
        compared = len(shapes) > 1 and axis in self.varied
        if compared:
            heads += ['drift, octaves', "at the first's best", 'regret', 'each better than the one before']
        lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
        for name, of in curves.items():
            cells = [name] + [self.optimum_text(of[shape]) if shape in of else '' for shape in shapes]
            if compared and len(of) == len(shapes):
                cells += self.comparison(list(of.values()))
            lines.append('| ' + ' | '.join(cells + [''] * (len(heads) - len(cells))) + ' |')
        return lines

    def comparison(self, curves):
        drift, drift_error, regret, regret_error, (better, shared) = compare(curves)
        first, last = optimum(curves[0]), optimum(curves[-1])
        if not self.fit or isinstance(first.best, (str, bool)) or min(curves[0]) <= 0:
            moved = f'{number(first.best)} to {number(last.best)}'
        else:
            marks = dict.fromkeys(first.mark + last.mark)
            moved = plus_minus(drift, drift_error, '{:+.2f}') + (f" ({' '.join(marks)})" if marks else '')
        at_base = curves[-1].get(first.best)
        lost = 'diverged' if regret == math.inf else plus_minus(100 * regret, 100 * regret_error, '{:.1f}') + '%'
        return [moved, f'{mean(at_base):.4f}' if at_base else 'not run', lost if at_base else 'not run',
                f'{better} of {shared}']

    def markdown(self):
        diverged = sum(row['val_loss'] == math.inf for row in self.rows)
        trained_s = {row['trial']: row['seconds'] for row in self.rows}
        tokens = [f'{n:,}' for n in sorted({row['tokens'] for row in self.rows if row['val_loss'] < math.inf})]
        shared = ', '.join(f'{key}={number(value)}' for key, value in sorted(self.base.items()) if value != '')
        lines = [
            f'# {self.name}', '',
            f'{len(self.rows)} points, {len(trained_s)} runs (equal ones are trained once), {diverged} diverged, '
            f"{len(self.seeds)} seed(s); {' to '.join(dict.fromkeys(tokens[:1] + tokens[-1:]))} training "
            f'tokens a run; {sum(trained_s.values()) / 3600:.2f} hours of training in all.', '',
            f'Shared by all: {shared}.', '']
        for axis in self.varied or self.axes[:1]:
            lines += [f'## {axis}', '', *self.table(axis), '']
            if axis in self.varied:
                lines += [f'![{axis}]({axis}.png)', '']
        if self.shape_keys:
            lines += ['![every shape with the values that are best for the first](shapes.png)', '']
        return '\n'.join([*lines, LEGEND if self.fit else SEARCH_LEGEND]) + '\n'

    def plot(self, axis, path):
        """Loss against one axis: a panel for each parameterization, a line for each shape, every minimum marked."""
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
        panels = {name: self.curves(rules, axis) for name, rules in self.rules.items()}
        values = sorted({row[axis] for row in self.rows})
        lines = [list(map(mean, curve.values())) for of in panels.values() for curve in of.values()]
        finite = [y for means in lines for y in means if y < math.inf]
        if not finite:
            return None
        # the minima are what matters: a few runs that barely learned would flatten them
        low, high = min(finite), max(np.quantile(finite, 0.9), *(min(ys) for ys in lines if min(ys) < math.inf))
        bottom, top = low - 0.05 * (high - low), high + 0.12 * (high - low) + 1e-6
        across = min(len(panels), 5)
        down = -(-len(panels) // across)
        figure, axes = pyplot.subplots(down, across, figsize=(max(5.2, 3.7 * across), 4.2 if down == 1 else 3.6 * down),
                                       sharey=True, squeeze=False, layout='constrained')
        for panel in axes.flat[len(panels):]:
            panel.set_visible(False)
        for panel, (title, of) in zip(axes.flat, panels.items()):
            title = textwrap.fill(title, 40)
            colors = pyplot.get_cmap('viridis')(np.linspace(0, 0.88, max(1, len(of))))
            for color, (shape, curve) in zip(colors, of.items()):
                xs = [scale(value, values) for value in curve]
                means = [mean(losses) for losses in curve.values()]
                if self.fit:
                    panel.plot(xs, [y if y < math.inf else math.nan for y in means], '.-', color=color, label=shape)
                    panel.fill_between(xs, *([end(losses.values()) if mean(losses) < math.inf else math.nan
                                              for losses in curve.values()] for end in (min, max)),
                                       color=color, alpha=0.15, linewidth=0)
                else:
                    panel.plot(xs, means, '.', color=color, label=shape, alpha=0.6)
                for x, y in zip(xs, means):
                    if y == math.inf:
                        panel.plot(x, top, 'x', color=color, clip_on=False)
                best = optimum(curve)
                if mean(best.losses) < math.inf:
                    panel.plot(scale(best.best, values), mean(best.losses), 'o', color=color, markersize=9,
                               markeredgecolor='black')
            if len(of) > 1 and len(of) == len({self.shape(model) for model in self.models}) and self.fit:
                drift, _, regret, _ = self.comparison(list(of.values()))
                title += f'\ndrift {drift.split(" (")[0]}, regret {regret}'
            panel.set_title(title, fontsize=10)
            panel.set_xlabel(f'log2 {axis}' if not any(isinstance(v, (str, bool)) for v in values) and min(values) > 0
                             else axis)
            if any(isinstance(v, (str, bool)) for v in values):
                panel.set_xticks(range(len(values)), map(str, sorted(values)))
            panel.set_ylim(bottom, top)
            panel.grid(alpha=0.3)
            panel.spines[['top', 'right']].set_visible(False)
        for row in axes:
            row[0].set_ylabel('validation loss (nats per token)')
        axes.flat[len(panels) - 1].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)
        return path

    def plot_shapes(self, path):
        """Loss against shape, a line for each parameterization: what is best for the first shape, and each one's best.

        The first is the transfer; the gap to the second is its regret.
        """
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
        axis = (self.varied or self.axes)[0]
        shapes = list(dict.fromkeys(self.shape(model) for model in self.models))
        figure, panel = pyplot.subplots(figsize=(6.4, 4.2), layout='constrained')
        for color, (name, rules) in zip(pyplot.get_cmap('tab10').colors, self.rules.items()):
            curves = self.curves(rules, axis)
            if shapes[0] not in curves:
                continue
            base = optimum(curves[shapes[0]]).best
            for label, style, value_of in ((name, 'o-', lambda curve: base),
                                           ('', ':', lambda curve: optimum(curve).best)):
                points = [(shapes.index(shape), mean(curve[value_of(curve)])) for shape, curve in curves.items()
                          if value_of(curve) in curve]
                panel.plot(*zip(*[(x, y if y < math.inf else math.nan) for x, y in points]), style, color=color,
                           label=label or None, markersize=5)
        panel.set_xticks(range(len(shapes)), [shape.replace(', ', '\n') for shape in shapes])
        panel.set_ylabel('validation loss (nats per token)')
        panel.set_title(f'at the {axis} that is best for the first shape; dotted: at its own best', fontsize=10)
        panel.grid(alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
        panel.legend(frameon=False)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)

    def write(self, out_dir):
        """Writes report.md, a plot for each axis and one over the shapes; returns the text of the report."""
        out_dir = Path(out_dir)
        text = self.markdown()
        (out_dir / 'report.md').write_text(text)
        for axis in self.varied:
            self.plot(axis, out_dir / f'{axis}.png')
        if self.shape_keys:
            self.plot_shapes(out_dir / 'shapes.png')
        return text
