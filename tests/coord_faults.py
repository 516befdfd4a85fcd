"""
Draws what a coordinate check shows of each planted fault: the right rules against the same rules with the fault.

    python tests/coord_faults.py

The faults are those of tests/test_coord_check.py, each on one axis that shows it. Tiny models, two steps and two seeds,
the least for a verdict, on the stdlib dataset, in float32 on a CPU; a few minutes. Writes faults.csv and faults.png.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_coord_check import FAULTS, SEEN, TINY  # noqa: E402

from configurator import configure  # noqa: E402
from coord_check import CoordCheckConfig, checks_of_axis  # noqa: E402
from nanop import plots  # noqa: E402
from nanop.coordinates import check  # noqa: E402
from nanop.dataset import open_dataset  # noqa: E402
from nanop.errors import exit_on_user_error  # noqa: E402
from nanop.files import make_out_dir, read_csv, write_csv  # noqa: E402
from nanop.machine import set_up  # noqa: E402


@dataclass
class FaultsConfig:
    out_dir: str = 'results/coord_check'  # of faults.csv and faults.png


KEYS = ('fault', 'axis', 'quantity', 'group', 'where', 'expected', 'right', 'faulty', 'verdict', 'sizes',
        'values_right', 'values_faulty')


def row_of(fault, axis):
    """The line of SEEN that fails most under the fault, beside the same line of the right rules."""
    quantity, group = SEEN[fault, axis]
    deep = dict(n_layer=8, widths='32,64,128') if fault == 'one layer of eight wrong' else {}
    config = CoordCheckConfig(**{**TINY, **deep, 'seeds': 2, 'steps': 2}, axes=axis, control='none')
    reports = []
    for plant in (lambda patch: None, FAULTS[fault]):
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            checks = checks_of_axis(config, axis, open_dataset(config.dataset), set_up('cpu', config.dtype))
            reports.append(check(**list(checks.values())[-1]))
    right, faulty = reports
    line = next(line for line in faulty.failures if (line.quantity, line.group) == (quantity, group))
    same = next(other for other in right.treatment if other.key == line.key)
    return dict(fault=fault, axis=axis, quantity=quantity, group=group, where=line.where, expected=line.band.expected,
                right=f'{same.slope:.2f}', faulty=f'{line.slope:.2f}', verdict=faulty.verdict,
                sizes=' '.join(map(str, faulty.sizes)), values_right=' '.join(f'{value:.5g}' for value in same.values),
                values_faulty=' '.join(f'{value:.5g}' for value in line.values))


def draw(path, rows):
    """A panel for each fault: the quantity that shows it relative to its value at the smallest size."""
    with plots.figure(path, 3, 3, size=(10, 8), dpi=90) as (figure, axes):
        for panel, row in zip(axes.flat, rows, strict=True):
            sizes = [float(size) for size in row['sizes'].split()]
            for name, style in (('right', 'o--'), ('faulty', 'o-')):
                values = np.array(row[f'values_{name}'].split(), dtype=float)
                panel.loglog(sizes, values / values[0], style, base=2, markersize=4,
                             label=f'{name}: {float(row[name]):+.2f}',
                             color={'right': 'gray', 'faulty': 'tab:red'}[name])
            panel.set_xticks(sizes, [f'{size:g}' for size in sizes])
            panel.set_title(f"{row['fault']}\n{row['quantity']} of {row['group']} over {row['axis']}", fontsize=9)
            panel.legend(frameon=False, fontsize=8)
        figure.suptitle('relative to the smallest size; in the legend the slope', fontsize=9)


def main():
    folder = make_out_dir(FaultsConfig(**configure(FaultsConfig, sys.argv[1:])).out_dir)
    first = {fault: axis for fault, axis in reversed(SEEN)}  # the first axis that shows a fault
    rows = []
    for fault in FAULTS:
        rows.append(row_of(fault, first[fault]))
        print(*rows[-1].values(), sep=', ', flush=True)
    write_csv(folder / 'faults.csv', rows, KEYS)
    draw(folder / 'faults.png', read_csv(folder / 'faults.csv'))


if __name__ == '__main__':
    exit_on_user_error(main)
