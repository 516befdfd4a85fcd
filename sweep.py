"""
Tune a small model, train a large one, and check that the optimum stayed: many training runs, and a report on them.

    python sweep.py config/sweep_depth.py                                  learning rate against depth
    python sweep.py config/sweep_depth.py --seed=1,2,3 --workers=2         keeps finished runs, adds the missing ones
    python sweep.py config/sweep_depth.py --storage=URL                    many machines, one database: run it on each
    python sweep.py --tune config/completep_base.py --trials=64            random search; writes best.py for train.py
    python sweep.py --contract config/completep_base.py --target n_layer=32,n_embd=1024     will the best rate stay?

The keys are the ones below and those of train.py, which may hold lists of values. A list of n_layer, n_embd, density or
parameterization makes models to compare, and so do `shapes` and `variants`. Seeds are averaged. Any other list is an
axis: it is tuned. Points that are the same computation, as sp and completep at the base shape, are trained once.
"""
import importlib.util
import json
import math
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from optuna.trial import TrialState

from configurator import configure_both
from nanop.errors import UserError, exit_on_user_error, explained, require, require_values
from nanop.files import make_out_dir
from nanop.machine import pick_device
from tools.contract import Contract
from tools.stack import why_not_stack
from tools.sweep_files import write_trials
from tools.sweep_points import DEFAULTS, NO_MULT, NOT_SWEPT, Sweep, cost
from tools.sweep_queue import (
    SAMPLERS,
    data_facts,
    enqueue,
    num_to_do,
    open_datasets,
    open_study,
    rows_of,
    run_workers,
    stoppable,
    storage_errors_explained,
    trials_of,
)
from tools.sweep_report import SweepReport, mean_losses
from train import TrainConfig

TUNED = dict(  # what --tune searches unless the config has a list: log-uniform between the two values
    learning_rate=[2**-11, 2**-4], init_std=[0.01, 0.3], input_mult=[0.5, 32.0], attn_mult=[0.25, 4.0],
    output_mult=[0.25, 4.0])


@dataclass
class SweepConfig:
    out_dir: str = 'out/sweep'             # folder for study.db, trials.csv, report.md and the plots
    shapes: list = field(default_factory=list)  # models to compare, as dicts: [dict(n_layer=2, n_embd=256), ..]
    variants: list = field(default_factory=list)  # changes, a table row each: [dict(), dict(norm='rmsnorm')]
    search: str = 'grid'                   # grid: all combinations; random: `trials` points, log-uniform between an
    #                                        axis's least and greatest value, each on every model; or a sampler of
    #                                        Optuna for a single model: tpe, gp, qmc, cmaes
    trials: int = 64                       # number of points, for every search but grid
    search_seed: int = 1                   # of random and qmc
    tune: bool = False                     # search the usual axes at random and write the best as a config, best.py
    contract: bool = False                 # run what tells whether the best rate stays up to the target; docs/sweeps.md
    target: str = ''                       # its shape: --target n_layer=32,n_embd=512; also head_dim, density
    largest_frac: float = 0.125            # most that a run of a contract costs, as a fraction of one of the target
    storage: str = ''                      # a database for Optuna, or grpc://host:port; '': SQLite in out_dir
    study: str = 'sweep'                   # name of this sweep in the storage
    workers: int = 0                       # processes on this machine; 0: one per GPU, else one per core
    stack: int = 0                         # trials trained as one batched model; 0: as suits the device
    heartbeat_s: int = 30                  # a trial runs again if its worker is silent for three times as long

    def __post_init__(self):
        require_values(self, at_least=dict(trials=1, search_seed=0, workers=0, stack=0, heartbeat_s=1),
                       choices=dict(search=('grid', 'random', *SAMPLERS)))
        _, package = SAMPLERS.get(self.search, (None, None))
        require(self, 'target', bool(self.target) == self.contract, '--contract and --target need each other')
        without = ('largest_frac',), ('tune', 'search', 'trials', 'search_seed', 'shapes', 'variants')
        for key in without[self.contract]:
            require(self, key, getattr(self, key) == getattr(SweepConfig, key, []),  # its default
                    f"it does nothing {'with' if self.contract else 'without'} --contract, leave it out")
        require(self, 'largest_frac', 0 < self.largest_frac < 1, 'use a value between 0 and 1')
        require(self, 'search', not package or importlib.util.find_spec(package),
                f'it needs {package}, pip install {package}')
        for key in ('out_dir', 'study'):
            require(self, key, getattr(self, key), 'a sweep keeps its trials, give it a name')


def read_sweep(argv):
    """(SweepConfig, overrides of TrainConfig, which may hold lists) from the command line."""
    if '--target' in argv[:-1]:  # a space instead of =
        at = argv.index('--target')
        argv = [*argv[:at], f'--target={argv[at + 1]}', *argv[at + 2:]]
    own, overrides = configure_both(SweepConfig, TrainConfig, argv, switches=('tune', 'contract'))
    flags = {argument[2:].partition('=')[0] for argument in argv if argument.startswith('--')}
    if 'out_dir' not in flags and (own.get('tune') or own.get('contract')):  # the config's out_dir is for train.py
        own['out_dir'] = 'out/tune' if own.get('tune') else 'out/contract'
    if own.get('tune'):
        own.setdefault('search', 'random')
        for key, ends in TUNED.items():
            if key not in flags and not isinstance(overrides.get(key), list):
                overrides[key] = ends
    return SweepConfig(**own), overrides


def best_setting(sweep, rows):
    """(the first model's axis values with the least mean loss over the seeds, that loss, number of values compared)."""
    losses = {}  # {values of the axes: {seed: loss}}
    for row in rows:
        if all(row[key] == value for key, value in sweep.models[0].items()):
            losses.setdefault(tuple(row[key] for key in sweep.axes), {})[row['seed']] = row['val_loss']
    means = mean_losses(losses)
    best = min(means, key=means.get)
    return dict(zip(sweep.axes, best)), means[best], len(losses)


def write_best(path, sweep, rows, overrides):
    """Write the best point as a config for train.py."""
    setting, loss, num_points = best_setting(sweep, rows)
    config = sweep.train_config(sweep.points[0] | setting)
    always = ('n_layer', 'n_embd', 'head_dim', 'base_n_layer', 'base_n_embd', 'base_head_dim', *sweep.axes)
    values = {key: value for key, value in asdict(config).items()
              if (key in always or value != DEFAULTS.get(key, {})) and key not in (*NOT_SWEPT, 'seed')}
    values.update({key: overrides[key] for key in NOT_SWEPT if key in overrides and key != 'overwrite'})  # for train.py
    values['out_dir'] = str(Path(path).with_suffix(''))
    lines = [f'# The best of {num_points} points: validation loss {loss:.4f} at {config.n_layer} layers x '
             f'{config.n_embd}. Values at the base shape, {config.base_n_layer} x {config.base_n_embd}.',
             f'# Train a larger model with the same values: python train.py {path} --n_layer=.. --n_embd=..']
    lines += [f'{key} = {value!r}' for key, value in values.items()]
    Path(path).write_text('\n'.join(lines) + '\n')


def keep(study, sweep, out_dir):
    """Write what has finished to trials.csv. Returns the rows, see rows_of()."""
    rows, others = rows_of(study, sweep)
    if rows:
        with explained(OSError, f"'{out_dir}/trials.csv' cannot be written"):
            write_trials(out_dir / 'trials.csv', rows + others)
    return rows, others


def make_report(sweep, name, rows, others):
    """The SweepReport on rows of this sweep, see Sweep.divide()."""
    shared = {key: value for key, value in sweep.facts['base'].items() if value != DEFAULTS.get(key, NO_MULT)}
    return SweepReport(name, rows, sweep.models, sweep.axes, shared, sweep.config.search == 'grid', sweep.row_keys,
                       others)


def conclude(study, sweep, out_dir, overrides):
    """Write trials.csv, report and plots of what has finished, and best.py. Returns the exit code of main()."""
    rows, others = keep(study, sweep, out_dir)
    errors = [trial.user_attrs['error'] for trial in trials_of(study, TrialState.FAIL) if 'error' in trial.user_attrs]
    reason = errors[-1] if errors else 'they were stopped'
    if not rows:
        raise UserError(f'no run has finished: {reason}')
    print(make_report(sweep, out_dir.name, rows, others).write(out_dir))
    all_diverged = all(row['val_loss'] == math.inf for row in rows)
    if all_diverged:
        print(f'all {len(rows)} points diverged, so there is no best one: search lower learning rates', file=sys.stderr)
    elif sweep.config.tune:
        best = out_dir / 'best.py'
        write_best(best, sweep, rows, overrides)
        print(f'{best} has the best values: python train.py {best} --n_layer=.. --n_embd=..')
    missing, failed = num_to_do(study, sweep), len(errors) if sweep.sampled else 0
    if missing:
        print(f'{missing} runs are missing ({reason}); the same command runs them again', file=sys.stderr)
    if failed:
        print(f'{failed} of the runs failed ({reason})', file=sys.stderr)
    return 1 if missing or failed else 3 if all_diverged else 0


def require_runnable(sweep):
    """{digest: FLOPs} of the runs. Refuses what cannot run, before anything is written."""
    datasets = open_datasets(sweep.configs)
    pick_device(sweep.configs[0].device)
    sweep.facts['data'] = data_facts(datasets)
    return {run: cost(each, datasets[each.dataset]) for run, each in dict(zip(sweep.digests, sweep.configs)).items()}


def run_points(study, sweep, out_dir, overrides, costs, what=''):
    """Run the points that the study has not run yet. If this is stopped, report what has finished."""
    enqueue(study, sweep, out_dir)
    with explained(OSError, f"'{out_dir}/sweep.json' cannot be written"):
        (out_dir / 'sweep.json').write_text(json.dumps(sweep.facts, indent=1))
    print(f"{what}{sweep.num_runs} {'' if sweep.sampled else 'different '}runs, {num_to_do(study, sweep)} to do")
    if sweep.config.stack > 1 and why_not_stack(sweep.configs[0]):
        print(f'runs are not stacked: {why_not_stack(sweep.configs[0])}')
    try:
        with stoppable():
            run_workers(study, sweep, overrides, costs, lambda: keep(study, sweep, out_dir))
    except KeyboardInterrupt:
        with suppress(UserError):  # that no run has finished
            conclude(study, sweep, out_dir, overrides)
        raise


def run_contract(config, overrides):
    """Run a transfer contract, one sweep after another in the same study. Returns the exit code of main()."""
    contract, rows = Contract(config, overrides), []
    print(contract.plan_text())
    out_dir = make_out_dir(config.out_dir)
    study = open_study(config)
    with storage_errors_explained():
        while following := contract.next_sweep(rows):
            sweep, overrides = following
            run_points(study, sweep, out_dir, overrides, require_runnable(sweep))
            rows, others = keep(study, sweep, out_dir)
            if num_to_do(study, sweep):
                return conclude(study, sweep, out_dir, overrides)
        make_report(sweep, out_dir.name, rows, others).write(out_dir)
    text, code = contract.conclude(rows, out_dir)
    print(text)
    return code


def main():
    """Returns the exit code: 0; 1 if runs failed or are missing; 3 if all diverged; that of a contract's verdict."""
    config, overrides = read_sweep(sys.argv[1:])
    if config.contract:
        return run_contract(config, overrides)
    sweep = Sweep(config, overrides)
    costs = require_runnable(sweep)
    out_dir = make_out_dir(config.out_dir)
    study = open_study(config)
    points, models = len(sweep.points), len(sweep.models)
    what = '' if sweep.sampled else f'{models} model(s) x {points // models} = {points} points, '
    with storage_errors_explained():
        run_points(study, sweep, out_dir, overrides, costs, what)
        return conclude(study, sweep, out_dir, overrides)


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; run the same command again to go on')
