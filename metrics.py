"""
What a run reports: the table of rules, lines or a progress bar on the terminal, metrics.csv, summary.json, loss.png
and, if asked, Weights & Biases.
"""
import csv
import io
import json
import math
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from checkpoint import write_atomically
from configurator import UserError
from model import ROLES

NUMBER = '{:.4g}'.format
FIELDS = ('step', 'tokens', 'loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'tokens_per_s')


def describe(model, optimizer):
    """The table of rules as it applies to this model and optimizer, a line per role, as text.

    lr x wd is what a step takes from a weight; SGD's decay goes through its momentum, which adds it up.
    """
    row = '{:<17}{:>14}{:>11}{:>11}{:>13}{:>11}{:>11}{:>12}'.format
    lines = [row('role', 'parameters', 'init std', 'lr', 'weight decay', 'lr x wd', 'eps', 'forward x')]
    groups = {group['role']: group for group in optimizer.param_groups}
    forward = {'embedding': model.input_mult, 'unembedding': model.output_mult,
               'attention_logits': model.transformer.h[0].attn.logit_mult}
    for role, rule in model.config.rules.items():
        values = ['-'] * 6
        if role in groups:
            g = groups[role]
            decay = g['lr'] * g['weight_decay'] / (1 - g.get('momentum', 0))
            values = [f"{sum(p.numel() for p in g['params']):,}", NUMBER(model.config.init_std * rule.init_std),
                      NUMBER(g['lr']), NUMBER(g['weight_decay']), NUMBER(decay),
                      NUMBER(g['eps']) if 'eps' in g else '-']
        elif role == 'unembedding':  # tied: its tensor is the embedding's
            values[0] = '0'
        elif role in ROLES:  # no biases, no gains, no QK norm
            continue
        lines.append(row(role, *values, NUMBER(forward.get(role, rule.forward))))
    return '\n'.join(lines)


def read(out_dir):
    """Rows of metrics.csv as dicts of text, but for one that was cut off; none if there is no file."""
    path = Path(out_dir) / 'metrics.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


class Metrics:
    """The rows of a run from `first_step` to `steps`; earlier rows in metrics.csv stay, later ones come again."""

    def __init__(self, out_dir, first_step, steps, config):
        """Writes config.json, too. Raises UserError."""
        self.steps, self.out_dir = steps, Path(out_dir)
        path = self.out_dir / 'metrics.csv'
        kept = [row for row in read(out_dir) if int(row['step']) < first_step]
        with self.writing():
            for name in ('summary.json', 'loss.png', 'model.safetensors'):  # of an earlier end
                (self.out_dir / name).unlink(missing_ok=True)
            (self.out_dir / 'config.json').write_text(json.dumps(config, indent=1))
            text = io.StringIO(newline='')
            writer = csv.DictWriter(text, FIELDS, restval='', extrasaction='ignore')
            writer.writeheader()
            writer.writerows(kept)
            write_atomically(path, text.getvalue().encode())
            self.file = open(path, 'a', newline='')
        self.writer = csv.DictWriter(self.file, FIELDS, restval='')
        self.wandb = None
        self.bar = tqdm(total=steps, initial=first_step, unit='step', dynamic_ncols=True,
                        disable=not (sys.stdout.isatty() and sys.stderr.isatty()))

    @contextmanager
    def writing(self):
        """Turns what can go wrong with a disk into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(f"out_dir='{self.out_dir}' cannot be written ({error}): the checkpoints in it are as they "
                            'were; make room, then go on with --init_from=resume') from None

    def start_wandb(self, project, name, config):
        """Raises UserError if wandb is not installed."""
        try:
            import wandb
        except ImportError:
            raise UserError('wandb_log=True needs wandb: pip install wandb') from None
        self.wandb = wandb.init(project=project, name=name, config=config)

    def write(self, row, note=''):
        """Adds a row, a dict of FIELDS; on a terminal the losses show in the bar, elsewhere in a line."""
        with self.writing():
            self.writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value
                                  for key, value in row.items()})
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row['step'])
        self.bar.update(row['step'] - self.bar.n)
        if 'loss' in row:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s{note}")
        text = f"step {row['step']:>6}/{self.steps}"
        if 'val_loss' in row:
            text += f" | val loss {row['val_loss']:.4f} | {row['bits_per_byte']:.4f} bits per byte"
        if 'loss' in row:
            text += f" | loss {row['loss']:.4f} | lr {row['lr']:.2e} | grad norm {row['grad_norm']:.3f}" \
                    f" | {row['tokens_per_s']:,.0f} tokens/s{note}"
        if self.bar.disable:
            print(text, flush=True)
        elif 'val_loss' in row:
            self.bar.write(text)

    def flush(self):
        """Until all rows are on disk."""
        with self.writing():
            os.fsync(self.file.fileno())

    def close(self):
        self.bar.close()
        with suppress(OSError):  # of rows that could not be written, which has been said
            self.file.close()
        if self.wandb:
            self.wandb.finish()
            self.wandb = None

    def finish(self, summary, title):
        """Closes, writes summary.json and returns the path of the plot."""
        self.close()
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in summary.items()}  # JSON has neither infinity nor nan
        with self.writing():
            (self.out_dir / 'summary.json').write_text(json.dumps(finite, indent=1))
            return plot(self.out_dir, title)


def plot(out_dir, title):
    """Draws loss.png from metrics.csv and returns its path, or a line that says why there is none."""
    try:
        import matplotlib
    except ImportError:
        return 'none, matplotlib is missing: pip install matplotlib'
    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker
    rows = read(out_dir)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout='constrained')
    for key, label, style in (('loss', 'training batch', dict(color='tab:blue', alpha=0.45, linewidth=1)),
                              ('val_loss', 'validation', dict(color='tab:orange', marker='o', markersize=4))):
        points = [(int(row['tokens']), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points), label=label, **style)
        if len(points) > 40:  # let the first few steps run off the top: they would flatten all the rest
            axes.set_ylim(top=1.1 * points[len(points) // 40][1])
    axes.set(xlabel='tokens', ylabel='loss (nats per token)', title=title)
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))  # 1.5M instead of 1.5 and, in the corner, 1e6
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False)
    path = Path(out_dir) / 'loss.png'
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
