"""
Checks a GPU: is training on it correct, and how fast is it? One command, nine minutes at most.

    python gpu_check.py                      on a machine with a CUDA device
    python gpu_check.py --peer=../nanoGPT    compares the speed with the model.py of a clone of nanoGPT, too
    python gpu_check.py --dry                runs the code of every stage on the CPU with tiny shapes: no figures

It needs torch, numpy, tqdm, matplotlib, safetensors and filelock. Each stage runs in a process of its own with a time
limit. A stage that fails or hangs does not stop the next one. What a stage has found is added to gpu_check.json when it
ends. Exit code 1: a correctness stage has failed or was not run.
"""
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from configurator import configure
from nanop.errors import exit_on_user_error, explained, require, require_values
from nanop.files import write_atomically
from tools import gpu_checks, gpu_speed
from tools.gpu_stage import Setting, Stage, make_dataset, run_stage

STAGES = (
    Stage('env', 20, gpu_speed.env, 'correctness'),
    Stage('parity', 60, gpu_checks.parity, 'correctness'),
    Stage('eager', 60, gpu_checks.eager, 'correctness'),
    Stage('sampling', 40, gpu_checks.sampling, 'correctness'),
    Stage('resume', 60, gpu_checks.resume, 'correctness'),
    Stage('processes', 90, gpu_checks.processes, 'correctness'),
    Stage('compiled', 90, gpu_speed.compiled, 'correctness'),
    Stage('memory', 70, gpu_speed.memory, 'correctness'),
    Stage('speed', 150, gpu_speed.speed, 'speed'),
    Stage('deep', 80, gpu_speed.deep_speed, 'speed'),
    Stage('stack', 40, gpu_speed.stack, 'speed'),
    Stage('tests', 540, gpu_speed.tests, 'repeat'),
)
DRY_LIMIT_S = 900  # of a stage on a CPU, which may be busy with other work
BARS = (  # what an H100 should reach: the stage and the name of its figure
    ('12 x 768, T 1024: fraction of peak', 'speed', 'fraction of peak', 0.45),
    ('12 x 768, T 1024: times as fast as the peer', 'speed', 'times as fast as the peer', 1.1),
    ('179 x 832, T 2048: fraction of peak', 'deep', 'fraction of peak', 0.40),
)


@dataclass
class GpuCheckConfig:
    peer: str = ''                 # folder with the model.py of a nanoGPT-shaped project, to compare the speed with
    seconds: int = 540             # for everything; what does not fit is reported as not run
    dry: bool = False              # run on the CPU, with tiny shapes and no figures of speed
    stages: str = ''               # only these, separated by commas; '': all
    out: str = 'gpu_check.json'    # file for the results; it must not exist

    def __post_init__(self):
        require_values(self, at_least=dict(seconds=1))
        names = [stage.name for stage in STAGES]
        require(self, 'stages', set(self.stages.split(',')) <= {'', *names}, f"use some of {','.join(names)}")
        require(self, 'peer', not self.peer or Path(self.peer, 'model.py').is_file(), 'it has no model.py')
        require(self, 'out', self.out and not Path(self.out).exists(), 'use a file that does not exist yet')


def text_of(value):
    return '-' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)


def print_table(rows):
    values = {row['stage']: row['values'] for row in rows}
    for name in ('env', 'sampling', 'compiled', 'memory', 'speed', 'deep', 'stack'):
        for figure, value in values.get(name, {}).items():
            print(f'{name:<10}  {figure:<58}  {text_of(value)}')
    print(f"\n{'stage':<10}  {'result':<8}  seconds")
    for row in rows:
        result = {True: 'ok', False: 'FAILED', None: 'not run'}[row['ok']]
        print(f"{row['stage']:<10}  {result:<8}  {row['seconds']:7.1f}  {row['error']}".rstrip())
    print(f"\n{'against the bars of an H100':<46}  {'measured':>24}  bar")
    for what, stage, figure, bar in BARS:
        print(f"{what:<46}  {text_of(values.get(stage, {}).get(figure, 'not run')):>24}  {bar:g}")


def lacking(rows):
    """The stages that keep a check from being passed."""
    return [row['stage'] for row in rows if row['kind'] != 'speed' and row['ok'] is False
            or row['kind'] == 'correctness' and row['ok'] is None]


def run_stages(config, folder):
    """Yield the row of each stage that the config asks for."""
    started, chosen = time.monotonic(), config.stages.split(',') if config.stages else None
    make_dataset(f'{folder}/data')
    for stage in STAGES:
        if chosen and stage.name not in chosen:
            continue
        left = config.seconds - (time.monotonic() - started)
        setting = Setting(f'{folder}/{stage.name}', f'{folder}/data', 'cpu' if config.dry else 'cuda', config.dry,
                          str(Path(config.peer).resolve()) if config.peer else '')
        if config.dry:
            stage, left = stage._replace(limit_s=DRY_LIMIT_S), DRY_LIMIT_S
        if left > 1:
            yield run_stage(stage, setting, left)
        else:
            yield dict(stage=stage.name, kind=stage.kind, ok=None, seconds=0.0, values={}, error='no time was left')


def main():
    """Returns the exit code."""
    config = GpuCheckConfig(**configure(GpuCheckConfig, sys.argv[1:], switches=('dry',)))
    require(config, 'dry', config.dry or torch.cuda.is_available(), 'there is no CUDA device here, use --dry')
    rows, lost = [], None

    def write():
        found = dict(torch=torch.__version__, config=asdict(config), stages=rows)
        write_atomically(config.out, (json.dumps(found, indent=1) + '\n').encode())

    def stop(number, frame):
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)  # an exception, so that the processes of a stage end with this one
    with explained(OSError, f"out='{config.out}' cannot be written"):
        write()
    with tempfile.TemporaryDirectory(prefix='gpu_check_', ignore_cleanup_errors=True) as folder:
        for row in run_stages(config, folder):
            rows.append(row)
            result = {True: 'ok', False: 'FAILED', None: 'not run'}[row['ok']]
            print(f"{row['stage']}: {result}, {row['seconds']:.0f} s {row['error']}".rstrip(), flush=True)
            try:
                write()
            except OSError as error:
                lost = error
                print(f"error: {config.out} cannot be written ({error})", file=sys.stderr)
    print()
    print_table(rows)
    if lost:
        print(f'\nThe results, because {config.out} could not be written:\n{json.dumps(rows)}')
    if missing := lacking(rows):
        print(f"\nFAIL: {', '.join(missing)}")
    else:
        print(f"\nPASS: {', '.join(row['stage'] for row in rows if row['kind'] == 'correctness')}"
              f"{' (dry: on the CPU, this says nothing about a GPU)' if config.dry else ''}")
    return 1 if missing or lost else 0


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; the stages that have ended are in the results')
