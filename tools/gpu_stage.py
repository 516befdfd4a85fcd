"""What the stages of gpu_check.py share, the process that runs one of them, and how it is started and ended."""
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np

from nanop.errors import first_line
from nanop.tokenizer import ByteTokenizer
from nanop.write_dataset import write_dataset

ROOT = Path(__file__).resolve().parents[1]
MARK = 'NANOP_GPU_CHECK'  # environment variable that all processes of a stage have, whoever starts them


class Stage(NamedTuple):
    name: str
    limit_s: float
    function: Callable  # Setting -> iterator of Figures
    kind: str  # correctness, speed, or repeat (of correctness stages: with the time that is left)


class Figure(NamedTuple):
    """One value that a stage has found. It is wrong if it is above `most` or not equal to `wanted`, where given."""
    name: str
    value: object
    most: float | None = None
    wanted: object = None
    note: str = ''  # for the reader of a failure

    @property
    def why_wrong(self):
        """One line that says what is wrong, or '' if nothing is."""
        if self.most is None:
            right, wanted = self.wanted in (None, self.value), repr(self.wanted)
        else:
            right, wanted = abs(self.value) <= self.most, f'at most {self.most:g}'  # wrong for nan
        note = f' ({self.note})' if self.note else ''
        return '' if right else f'{self.name} is {self.value!r}, must be {wanted}{note}'


class NotRun(Exception):
    """A stage that cannot run here, and why; that is not a failure."""


@dataclass
class Setting:
    """Where a stage runs."""
    folder: str           # a folder of its own for the files that the stage writes
    dataset: str          # see make_dataset()
    device: str = 'cuda'
    dry: bool = False     # tiny shapes and no figures of speed
    peer: str = ''        # folder with the model.py of a nanoGPT-shaped project

    def speed(self, name, value, most=None):
        """A Figure that means nothing in a dry run, so there it has no value."""
        return Figure(name, None) if self.dry else Figure(name, value, most)


def make_dataset(folder):
    """Write a dataset of bytes that a model can learn: words in random order. No download, no tokenizer's file."""
    words = np.random.default_rng(0).choice(['abc ', 'de ', 'fghij '], 150_000)
    write_dataset(folder, [('train', ''.join(words[:130_000]), True), ('val', ''.join(words[130_000:]), True)],
                  ByteTokenizer(), 'words in random order', workers=1)


def plain(value):
    """A value as JSON can hold it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main():
    """Run one stage and write each Figure at once, a line of JSON each; what ends the stage is in the last line."""
    spec = json.loads(sys.argv[1])
    with open(spec['results'], 'w', buffering=1) as results:
        def write(**line):
            print(json.dumps(line), file=results)
        try:
            stage = getattr(importlib.import_module(spec['module']), spec['function'])
            for figure in stage(Setting(**spec['setting'])):
                write(name=figure.name, value=plain(figure.value), why_wrong=figure.why_wrong)
        except NotRun as reason:
            write(not_run=str(reason))
        except Exception as error:
            traceback.print_exc()
            write(error=f'{type(error).__name__}: {first_line(error)}')
        else:
            write(error='')


# -----------------------------------------------------------------------------
# The process of a stage, seen from gpu_check.py
def marked(mark):
    """The processes that have this mark in their environment, on Linux."""
    for environ in Path('/proc').glob('[0-9]*/environ'):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if f'{MARK}={mark}'.encode() in environ.read_bytes():
                yield int(environ.parent.name)


def end_processes(process, mark):
    """Kill the process of a stage and all that it has started. torchrun puts its workers into groups of their own, so
    these are found by their mark."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave any of them
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 10
    while left := list(marked(mark)):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            print(f'warning: the processes {left} cannot be killed', file=sys.stderr)
            break
        time.sleep(0.05)
    signal.signal(signal.SIGINT, before)


def read_figures(path):
    """The lines that a stage has written so far, each a dict; a line that was cut off is left out."""
    lines = []
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def how_it_ended(stage, code, figures, last_line, left):
    """(ok, one line that says why not) of a stage; its exit code is None if it was stopped. ok is None: not run."""
    wrong = [figure['why_wrong'] for figure in figures if figure.get('why_wrong')]
    end = figures[-1] if figures and 'name' not in figures[-1] else {}
    if wrong:
        return False, f"{wrong[0]}{f'; {len(wrong) - 1} more' if len(wrong) > 1 else ''}"
    if code is None and left < stage.limit_s:
        return None, f'not finished in the last {left:.0f} s of --seconds'
    if code is None:
        return False, f'stopped at its limit of {stage.limit_s:g} s'
    if code < 0:
        return False, f'killed by {signal.Signals(-code).name}'
    if code or not end:
        return False, f'ended early with exit code {code}: {last_line}'
    if 'not_run' in end:
        return None, end['not_run']
    return not end['error'], end['error']


def run_stage(stage, setting, left):
    """Run a stage in a process of its own, for at most `left` seconds. Returns its row in the results."""
    folder, mark = Path(setting.folder), uuid4().hex
    folder.mkdir()
    (folder / 'tmp').mkdir()
    results, log = folder / 'figures.jsonl', folder / 'output.log'
    spec = dict(module=stage.function.__module__, function=stage.function.__name__, results=str(results),
                setting=asdict(setting))
    started = time.monotonic()
    with open(log, 'w') as file:
        process = subprocess.Popen(
            [sys.executable, '-c', 'from tools.gpu_stage import main; main()', json.dumps(spec)], cwd=ROOT, stdout=file,
            stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, MARK: mark, 'TMPDIR': str(folder / 'tmp')})
    try:
        code = process.wait(min(stage.limit_s, left))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_processes(process, mark)
    figures = read_figures(results)
    last_line = (log.read_text(errors='replace').strip().splitlines() or ['no output'])[-1]
    ok, error = how_it_ended(stage, code, figures, last_line, left)
    return dict(stage=stage.name, kind=stage.kind, ok=ok, seconds=round(time.monotonic() - started, 1),
                values={figure['name']: figure['value'] for figure in figures if 'name' in figure}, error=error)
