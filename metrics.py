"""
metrics.csv: one row per logged step, and the plot of it.
"""
import csv
import os
from pathlib import Path

FIELDS = ('step', 'tokens', 'loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'tokens_per_s')


def read(out_dir):
    """Rows of metrics.csv as dicts of text; none if there is no file."""
    path = Path(out_dir) / 'metrics.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return [row for row in csv.DictReader(file) if (row['step'] or '').isdigit()]


class Metrics:
    """Appends rows to metrics.csv; starting at `first_step` drops the rows from there on, which come again."""

    def __init__(self, out_dir, first_step):
        path = Path(out_dir) / 'metrics.csv'
        kept = [row for row in read(out_dir) if int(row['step']) < first_step]
        temporary = Path(f'{path}.tmp')
        with open(temporary, 'w', newline='') as file:
            writer = csv.DictWriter(file, FIELDS, restval='', extrasaction='ignore')
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, path)
        self.file = open(path, 'a', newline='')
        self.writer = csv.DictWriter(self.file, FIELDS, restval='')

    def write(self, row):
        self.writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value for key, value in row.items()})
        self.file.flush()

    def close(self):
        self.file.close()


def plot(out_dir, title):
    """Draws loss.png from metrics.csv and returns its path, or a line that says why there is none."""
    try:
        import matplotlib
    except ImportError:
        return 'no plot: pip install matplotlib'
    matplotlib.use('Agg')
    from matplotlib import pyplot
    rows = read(out_dir)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout='constrained')
    for key, label, style in (('loss', 'training batch', dict(color='tab:blue', alpha=0.45, linewidth=1)),
                              ('val_loss', 'validation', dict(color='tab:orange', marker='o', markersize=4))):
        points = [(int(row['tokens']), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points), label=label, **style)
    axes.set(xlabel='tokens', ylabel='loss (nats per token)', title=title)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    path = Path(out_dir) / 'loss.png'
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
