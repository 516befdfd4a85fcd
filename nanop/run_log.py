"""What a run reports, on the terminal, in files and to Weights & Biases."""
import csv
import io
import itertools
import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from nanop import plots
from nanop.errors import UserError, explained, first_line
from nanop.files import read_csv, write_atomically, write_rows
from nanop.machine import flops_per_token, peak_flops
from nanop.parallel import rank_and_world_size

NUMBER = '{:.4g}'.format
FIELDS = ('step', 'tokens', 'loss', 'val_loss', 'bits_per_byte', 'lr', 'grad_norm', 'tokens_per_s')


def describe(model, optimizer):
    """The table of rules as they apply to this model and optimizer, one line per role, as text.

    lr x wd is the fraction that a step takes from a weight. SGD's decay goes through its momentum, which adds it up.
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
            std = model.config.init_std * model.config.init_std_mult.get(role, 1.0) * rule.init_std
            values = [f"{sum(p.numel() for p in g['params']):,}", NUMBER(std), NUMBER(g['lr']),
                      NUMBER(g['weight_decay']), NUMBER(decay), NUMBER(g['eps']) if 'eps' in g else '-']
        elif role == 'unembedding':  # tied: the tensor counts as the embedding's
            values[0] = '0'
        elif rule.init_std is not None:  # this model has no such parameters: no biases, gains or QK norms
            continue
        lines.append(row(role, *values, NUMBER(forward.get(role, rule.forward))))
    return '\n'.join(lines)


def startup_text(config, rates, steps, length, batch_size, world_size, model, optimizer, machine):
    """What a run says before its first step: parameters, steps, batch, derived values and the table of rules. `length`
    is the duration in steps of this batch."""
    c, sequences = config, config.batch_tokens // config.block_size
    lines = [f'{model.num_params():,} parameters, {steps:,} steps of {c.batch_tokens:,} tokens = {sequences} sequences '
             f'of {c.block_size} = {world_size} process(es) x {sequences // world_size // batch_size} micro-batch(es) '
             f'x {batch_size}; {round(length * c.batch_tokens):,} tokens on {machine.device}, {machine.dtype_name}'
             f"{f', {c.parallel}' if world_size > 1 else ''}"]
    if (rates.beta1, rates.learning_rate) != (c.beta1, c.learning_rate):
        lines.append(f'batch and duration differ from the base: learning_rate {rates.learning_rate:.4g}, weight_decay '
                     f'{rates.weight_decay:.4g}, eps {rates.eps:.4g}, beta1 {rates.beta1:.6g}, beta2 {rates.beta2:.6g}')
    lines.append(f'{c.parameterization}: {c.n_layer} layers x {c.n_embd}, density {c.density:g}; base {c.base_n_layer} '
                 f'x {c.base_n_embd}')
    return '\n'.join([*lines, describe(model, optimizer)])


class Throughput:
    """Training speed since it was last read, over all ranks."""

    def __init__(self, config, model, machine):
        self.tokens_per_step = config.batch_tokens
        peak, world_size = peak_flops(machine.device, machine.dtype), rank_and_world_size()[1]
        self.mfu_per_token_s = flops_per_token(model) / world_size / peak if peak else None
        self.seconds, self.steps = 0.0, 0

    def start_step(self):
        self.started = time.perf_counter()

    def end_step(self):
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def read(self):
        """dict(tokens_per_s), and the fraction of the device's peak FLOP/s as `mfu` where the peak is known."""
        tokens_per_s = self.steps * self.tokens_per_step / self.seconds
        self.seconds, self.steps = 0.0, 0
        mfu = dict(mfu=tokens_per_s * self.mfu_per_token_s) if self.mfu_per_token_s else {}
        return dict(tokens_per_s=tokens_per_s, **mfu)


def read_metrics(out_dir):
    """The rows of metrics.csv as dicts of text; none if there is no file."""
    return read_csv(Path(out_dir) / 'metrics.csv')


class Metrics:
    """The log of a run to step `steps`. Before begin() it leaves what an earlier run has written as it is."""

    def __init__(self, out_dir, first_step, steps):
        self.steps, self.out_dir = steps, Path(out_dir)
        self.first_step, self.validated = first_step, {}  # what an earlier end at this step has measured
        self.file = self.wandb = None  # metrics.csv; a run of Weights & Biases
        self.bar = tqdm(total=steps, initial=first_step, unit='step', dynamic_ncols=True,
                        disable=not (sys.stdout.isatty() and sys.stderr.isatty()))

    def earlier_rows(self):
        """The rows of metrics.csv to go on from. If they cannot all be read, the file is renamed and there are none."""
        path = self.out_dir / 'metrics.csv'
        if not self.first_step or not path.exists():
            return []
        try:
            rows = read_metrics(self.out_dir)
            figures = [(int(row['step']), int(row['tokens']), *(float(row[key] or 0) for key in FIELDS[2:]))
                       for row in rows]
            steps = [step for step, *_ in figures]
            if not rows or steps != sorted(steps):
                raise ValueError('its rows are not in the order of their steps')
            return rows
        except (ValueError, KeyError, csv.Error) as error:  # edited by hand, or by a spreadsheet
            asides = (path.with_name(f'metrics-old-{number}.csv') for number in itertools.count(1))
            aside = next(each for each in asides if not each.exists())
            os.replace(path, aside)
            print(f'warning: {path} cannot be read ({type(error).__name__}: {error}); it is {aside} now, and a new one '
                  'begins', file=sys.stderr)
            return []

    def begin(self, config):
        """Keep the rows of metrics.csv before the first step, and remove what else an earlier end has left."""
        path = self.out_dir / 'metrics.csv'
        with self.writing():
            rows = self.earlier_rows()
            kept = [row for row in rows if int(row['step']) < self.first_step]
            self.validated = next(({key: float(row[key]) for key in ('val_loss', 'bits_per_byte')} for row in rows
                                   if int(row['step']) == self.first_step and row['val_loss']), {})
            for name in ('summary.json', 'loss.png', 'model.safetensors'):
                (self.out_dir / name).unlink(missing_ok=True)
            (self.out_dir / 'config.json').write_text(json.dumps(config, indent=1))
            text = io.StringIO(newline='')
            write_rows(text, kept, FIELDS)
            write_atomically(path, text.getvalue().encode())
            self.file = open(path, 'a', newline='')
        self.writer = csv.DictWriter(self.file, FIELDS, restval='', extrasaction='ignore')

    def to_wandb(self, action, *arguments, **options):
        """Call a function of Weights & Biases. What it raises ends only the logging there, with a warning."""
        try:
            return action(*arguments, **options)
        except (Exception, SystemExit) as error:
            self.wandb = None
            print(f'warning: Weights & Biases failed ({first_line(error)}); going on without it', file=sys.stderr)

    def writing(self):
        return explained(OSError, f"out_dir='{self.out_dir}' cannot be written", 'the checkpoints in it are as they '
                         'were; make room, then go on with --init_from=resume')

    def write(self, row):
        """Add a row, a dict of FIELDS and mfu. It is shown in the progress bar on a terminal, elsewhere in a line."""
        with self.writing():
            self.writer.writerow({key: f'{value:.6g}' if isinstance(value, float) else value
                                  for key, value in row.items()})
            self.file.flush()
        if self.wandb:
            self.to_wandb(self.wandb.log, row, step=row['step'])
        self.bar.update(row['step'] - self.bar.n)
        text = f"step {row['step']:>6}/{self.steps}"
        if 'val_loss' in row:
            text += f" | val loss {row['val_loss']:.4f} | {row['bits_per_byte']:.4f} bits per byte"
        if 'loss' in row:
            speed = f"{row['tokens_per_s']:,.0f} tokens/s" + (f" | {row['mfu']:.1%} MFU" if 'mfu' in row else '')
            text += f" | loss {row['loss']:.4f} | lr {row['lr']:.2e} | grad norm {row['grad_norm']:.3f} | {speed}"
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed}")
        if self.bar.disable:
            print(text, flush=True)
        elif 'val_loss' in row:
            self.bar.write(text)

    def flush(self):
        """Wait until all rows are on disk."""
        with self.writing():
            os.fsync(self.file.fileno())

    def close(self):
        self.bar.close()
        if self.file:
            with suppress(OSError):  # rows that could not be written have been reported
                self.file.close()
        if self.wandb:
            self.to_wandb(self.wandb.finish)
            self.wandb = None

    def finish(self, summary, title):
        """Close the log, write summary.json and draw loss.png. Returns the path of the plot."""
        self.close()
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in summary.items()}  # JSON has neither infinity nor nan
        with self.writing():
            (self.out_dir / 'summary.json').write_text(json.dumps(finite, indent=1))
            try:
                return plot_losses(self.out_dir, title)
            except UserError as error:
                return f'none, {error}'


def plot_losses(out_dir, title):
    """Draw loss.png from metrics.csv and return its path."""
    rows, path = read_metrics(out_dir), Path(out_dir) / 'loss.png'
    with plots.figure(path, dpi=150) as (_, [[axes]]):
        from matplotlib.ticker import EngFormatter
        for key, label, style in (('loss', 'training batch', dict(color='tab:blue', alpha=0.45, linewidth=1)),
                                  ('val_loss', 'validation', dict(color='tab:orange', marker='o', markersize=4))):
            points = [(int(row['tokens']), float(row[key])) for row in rows if row[key]]
            if points:
                axes.plot(*zip(*points), label=label, **style)
            if len(points) > 40:  # let the first few steps leave at the top: they would flatten all the rest
                axes.set_ylim(top=1.1 * points[len(points) // 40][1])
        axes.set(xlabel='tokens', ylabel='loss (nats per token)', title=title)
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))  # 1.5M instead of 1.5 and, in the corner, 1e6
        if axes.lines:
            axes.legend(frameon=False)
    return path
