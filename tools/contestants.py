"""What the benchmarks of bench.py share: processes to measure, turns, figures and tables."""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

from nanop.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SECONDS = '{seconds:,.1f} ({seconds_min:,.1f}..{seconds_max:,.1f})'

RUN_AND_WRITE_PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


class Contestant:
    """A running process of bench_worker.py and the times of its turns."""

    def __init__(self, name, turn_s, **spec):
        started = time.perf_counter()
        self.name, self.kind, self.compiled = name, spec['kind'], spec['config']['compile']
        self.errors = tempfile.TemporaryFile('w+')
        self.cache = tempfile.TemporaryDirectory()  # empty, so that compilation takes its whole time
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tools.bench_worker', json.dumps(spec)], text=True, bufsize=1, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': self.cache.name})
        try:
            first = self.read_answer()
            self.first_step_s = time.perf_counter() - started  # from the start of the process
            self.num_params, self.first_step_alone_s = first['num_params'], first['first_step_alone_s']
            self.steps, self.turns = 2, []
            self.take_turn()  # warm-up
            self.steps, self.turns = max(1, round(turn_s / self.step_s[0])), []
        except BaseException:
            self.close()
            raise

    def read_answer(self):
        """The next answer of the process, or a UserError with the last error that it printed."""
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ['no reason given']
            errors = [line for line in lines if 'Error' in line]
            raise UserError(f'{self.name} ended: {(errors or lines)[-1]}')
        return json.loads(line)

    def take_turn(self):
        """Take `steps` steps and keep the mean time of each part."""
        print(1 + self.steps, file=self.process.stdin)  # the first step is not timed: it warms the caches up again
        answer = self.read_answer()
        parts = zip(*answer['seconds'][1:])
        self.turns.append([sum(seconds) / self.steps for seconds in parts])
        self.peak_bytes = answer['peak_bytes']

    @property
    def step_s(self):
        """Seconds per step in each turn."""
        return [sum(parts) for parts in self.turns]

    def close(self):
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        self.cache.cleanup()


def contestants_of(config, peer, machine, compiles):
    """Yield (name, what bench_worker.py is told) of each contestant in a training step. A peer runs as it ships,
    compiled where a compiler works and on a CPU in float32, and with our dtype."""
    dtype, config = machine.dtype_name, asdict(config)
    yield 'nanoP', dict(kind='ours', config=config, dtype=dtype)
    if config['optimizer'] == 'adamw':
        yield 'nanoP without its rules', dict(kind='plain', config=config, dtype=dtype)
    yield 'its products alone', dict(kind='products', config=dict(config, compile=False), dtype=dtype)
    if not peer:
        return
    shipped_dtype = dtype if machine.device.type == 'cuda' else 'float32'  # nanoGPT does not autocast on a CPU
    for peer_dtype, compiled in dict.fromkeys([(shipped_dtype, compiles), (dtype, False), (dtype, compiles)]):
        name = f"peer, {peer_dtype}{', compiled' if compiled else ''}"
        peer_config = dict(config, compile=compiled, peer=str(Path(peer).resolve()))
        yield name, dict(kind='peer', config=peer_config, dtype=peer_dtype)


def timed(command, allowed=(0,)):
    """Run a command. Returns (seconds, peak bytes of its largest process). Refuses exit codes not in `allowed`."""
    started = time.perf_counter()
    with tempfile.TemporaryFile('w+') as output, tempfile.NamedTemporaryFile('r') as peak:
        # a small process in between: a process's peak starts at the size of the process that started it
        code = subprocess.run([sys.executable, '-c', RUN_AND_WRITE_PEAK, peak.name, *command], stdout=output,
                              stderr=output).returncode
        seconds = time.perf_counter() - started
        if code not in allowed:
            output.seek(0)
            raise UserError(f"'{' '.join(command)}' failed: {(output.read().strip().splitlines() or [''])[-1]}")
        return seconds, int(peak.read()) * (1 if sys.platform == 'darwin' else 1024)


def take_turns(turns, contestants):
    """Call {name: function} one after the other, `turns` times. Returns {name: list of what the function returned}."""
    taken = {name: [] for name in contestants}
    for _ in range(turns):
        for name, take_turn in contestants.items():
            taken[name].append(take_turn())
    return taken


def spread_of(seconds):
    return dict(seconds=median(seconds), seconds_min=min(seconds), seconds_max=max(seconds))


def faster_by(seconds, ours):
    """How many times as long as ours something took, turn by turn."""
    ratios = [theirs / mine for theirs, mine in zip(seconds, ours)]
    return dict(nanop_is_faster_by=median(ratios), faster_by_min=min(ratios), faster_by_max=max(ratios))


def print_table(rows, columns, ours='nanoP'):
    """Print dicts as a table; `columns` are {title: format string}. A figure that a row does not have stays empty."""
    faster = '{nanop_is_faster_by:.2f}x ({faster_by_min:.2f}..{faster_by_max:.2f})'
    columns = {'': '{contestant}', **columns, f'{ours} is faster by': faster}

    def cell(text, row):
        try:
            return text.format(**row)
        except ValueError:  # '' is not a number
            return ''

    lines = [list(columns)] + [[cell(text, row) for text in columns.values()] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(*lines)]
    for first, *others in lines:
        print('  '.join([first.ljust(widths[0])] + [text.rjust(width) for text, width in zip(others, widths[1:])]))
