"""
Tune small, train large, and show that the optimum stayed where it was: many training runs, and a report of them.

    python sweep.py config/sweep_depth.py                                  learning rate against depth
    python sweep.py config/sweep_depth.py --seed=1,2,3 --workers=2         what is there is kept, the rest is run
    python sweep.py config/sweep_depth.py --storage=URL                    many machines, one database: run it on each
    python sweep.py --tune config/completep_base.py --trials=64            random search; writes best.py for train.py

The keys are those of train.py, which may hold a list of values, and the ones below. A list of n_layer, n_embd, density
or parameterization, and each of `shapes`, makes models to compare; seeds are averaged; any other list is an axis: what
is tuned. Points that come to the same computation, as all parameterizations do at the base shape, are trained once.
"""
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
import torch
from optuna.storages._heartbeat import get_heartbeat_thread, is_heartbeat_enabled
from optuna.trial import TrialState
from tqdm import tqdm

from configurator import check, configure
from model import CHOICES, GPT, GPTConfig
from nanop.errors import UserError, exit_on_user_error, first_line, require_at_least
from nanop.machine import pick_device
from tools.stack import stack_size, stackable, train_stack, why_not_stack
from tools.sweep_report import Report, read_csv, write_csv
from train import (
    MODEL_KEYS,
    TRAIN_CHOICES,
    TrainConfig,
    at_length,
    num_steps,
    open_dataset,
    optimizer_of,
    split_batch,
    train,
)

SAMPLERS = {  # Optuna's, and the package each needs; no seed where workers with the same one would draw the same points
    'tpe': (lambda seed: optuna.samplers.TPESampler(), None), 'gp': (lambda seed: optuna.samplers.GPSampler(), 'scipy'),
    'qmc': (lambda seed: optuna.samplers.QMCSampler(seed=seed), 'scipy'),
    'cmaes': (lambda seed: optuna.samplers.CmaEsSampler(), 'cmaes'),
}
TUNED = dict(  # what --tune searches, where the config gives no list: each log-uniform between the two
    learning_rate=[2**-11, 2**-4], init_std=[0.01, 0.3], input_mult=[0.5, 32.0], attn_mult=[0.25, 4.0],
    output_mult=[0.25, 4.0])


@dataclass
class SweepConfig:
    out_dir: str = 'out/sweep'             # folder for study.db, trials.csv, report.md and the plots
    shapes: list = field(default_factory=list)  # models to compare, as dicts: [dict(n_layer=2, n_embd=256), ..]
    variants: list = field(default_factory=list)  # changes, each a row of the tables: [dict(), dict(norm='rmsnorm')]
    search: str = 'grid'                   # grid: all combinations; random: `trials` points, log-uniform between an
    #                                        axis's least and greatest value, each on every model; or a sampler of
    #                                        Optuna for a single model: tpe, gp, qmc, cmaes
    trials: int = 64                       # points of any search but grid
    search_seed: int = 1                   # of random and qmc
    tune: bool = False                     # random search of the usual axes, then the best as a config: best.py
    # where and how
    storage: str = ''                      # a database for Optuna, or grpc://host:port; '': SQLite in out_dir
    study: str = 'sweep'                   # name of this sweep in the storage
    workers: int = 0                       # processes on this machine; 0: one per GPU, else one per core
    stack: int = 0                         # trials trained as one batched model; 0: chosen by the device
    heartbeat_s: int = 30                  # the trial of a worker not heard of for three times as long is run again

    def __post_init__(self):
        """Raises UserError for a value that no sweep can use."""
        require_at_least(self, trials=1, search_seed=0, workers=0, stack=0, heartbeat_s=1)
        if self.search not in ('grid', 'random', *SAMPLERS):
            raise UserError(f"search='{self.search}' is not known: use grid, random, {', '.join(SAMPLERS)}")
        package = SAMPLERS.get(self.search, (None, None))[1]
        if package and not importlib.util.find_spec(package):
            raise UserError(f"search='{self.search}' needs {package}: pip install {package}")
        if not self.out_dir or not self.study:
            raise UserError('out_dir and study cannot be empty: a sweep keeps its trials')


GRACE = 3  # heartbeats that a worker may miss
ALIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
KEPT = ('bits_per_byte', 'last_train_loss', 'diverged_at', 'tokens', 'params', 'seconds', 'stack', 'dtype', 'device',
        'torch')  # of a run's summary, beside the loss


# -----------------------------------------------------------------------------
# The points: dicts of the keys in which trials differ

TYPES = {key: type(value) for key, value in asdict(TrainConfig()).items()}
MODEL_AXES = ('n_layer', 'n_embd', 'density', 'parameterization')
ELSEWHERE = ('device', 'compile')  # may differ between the workers of a study
ALONE = dict(out_dir='', init_from='scratch', eval_only=False, eval_interval=0, sample_tokens=0, wandb_log=False)
NOT_SWEPT = (*ALONE, *ELSEWHERE, 'overwrite', 'always_save_checkpoint', 'log_interval', 'wandb_project',
             'wandb_run_name')


def crossed(axes):
    """Every combination of the values in `axes`, as dicts; the last axis changes first."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def drawn(axes, trials, seed):
    """`trials` random points between the least and the greatest values of `axes`; more begin with the same ones.

    Log-uniform where all values are above zero; of integers, the multiples of what the given ones have in common.
    """
    rng = np.random.default_rng(seed)

    def draw(values):
        if isinstance(values[0], (str, bool)):
            return values[rng.integers(len(values))]
        least, most = min(values), max(values)
        value = least * (most / least) ** rng.random() if least > 0 else least + (most - least) * rng.random()
        if isinstance(values[0], int):
            step = math.gcd(*values) or 1
            return round(value / step) * step
        return float(f'{value:.4g}')
    return [{key: draw(values) for key, values in axes.items()} for _ in range(trials)]


def gpt_config(config, vocab_size=1 << 30):
    """The GPTConfig of a TrainConfig; `vocab_size` where the dataset is to say. Raises ValueError."""
    shape = {key: getattr(config, key) for key in MODEL_KEYS}
    return GPTConfig(**{**shape, 'vocab_size': shape['vocab_size'] or vocab_size})


def digest(config):
    """A name for what a run computes: parameterizations enter by their rules, so equal models have equal names."""
    by_rules = ('parameterization', 'alpha', 'base_n_layer', 'base_n_embd', 'base_head_dim')
    unused = ('mask_seed',) if config.density == 1 else ()
    facts = {key: value for key, value in asdict(config).items() if key not in (*NOT_SWEPT, *by_rules, *unused)}
    return hashlib.sha1(json.dumps([facts, gpt_config(config).rules], sort_keys=True).encode()).hexdigest()[:12]


class Plan:
    """What a sweep is to run.

    models: dicts, a line in the plots each; axes: {key: values}; points: dicts of model, axes and seed; configs and
    runs: the TrainConfig of each point and its digest; facts: what all trials share and in which keys they differ, as a
    study keeps it.
    """

    def __init__(self, config, overrides):
        """Raises UserError for a point that cannot run."""
        values = {key: value if isinstance(value, list) else [value] for key, value in overrides.items()}
        for key in ('seed', 'learning_rate', *MODEL_AXES):
            values.setdefault(key, [getattr(TrainConfig, key)])
        unusable = [key for key in NOT_SWEPT if len(values.get(key, [])) > 1]
        if unusable:
            raise UserError(f'{unusable[0]} cannot be swept: give it one value')
        repeated = [key for key, held in values.items() if len(set(held)) < len(held)]
        if repeated:
            raise UserError(f'{repeated[0]}={values[repeated[0]]} holds a value twice: leave one out')
        shapes = self.checked('shapes', config.shapes, overrides)
        usual = {**asdict(TrainConfig()), **overrides}
        changed = {key: usual.get(key) for variant in config.variants for key in variant}
        variants = self.checked('variants', [{**changed, **variant} for variant in config.variants], overrides)
        inside = {*shapes[0], *variants[0]}
        if len(inside) < len(shapes[0]) + len(variants[0]):
            raise UserError(f"{', '.join(sorted({*shapes[0]} & {*variants[0]}))} is in shapes and in variants: leave "
                            'it in one of them')
        grid = crossed({key: values[key] for key in MODEL_AXES if key not in inside})
        self.row_keys = list(dict.fromkeys(('parameterization', *variants[0])))
        self.models = [{**model, **variant, **shape} for model in grid for variant in variants for shape in shapes]
        self.axes = {key: held for key, held in values.items() if (len(held) > 1 or key == 'learning_rate')
                     and key not in ('seed', *MODEL_AXES, *inside)}
        self.sampled = config.search in SAMPLERS
        if self.sampled and len(self.models) * len(values['seed']) > 1:
            raise UserError(f"search='{config.search}' tunes one model, this is {len(self.models)} with "
                            f"{len(values['seed'])} seeds: use grid or random, or a single one of each")
        if config.search != 'grid' and all(len(held) < 2 for held in self.axes.values()):
            raise UserError(f"search='{config.search}' has nothing to search: give an axis its least and greatest "
                            'value, such as --learning_rate=0.0005,0.05')
        settings = drawn(self.axes, config.trials, config.search_seed) if config.search == 'random' else \
            crossed(self.axes)
        # seeds one after the other, so that a sweep that was stopped has whole ones
        self.points = [{**model, **setting, 'seed': seed}
                       for seed in values['seed'] for model in self.models for setting in settings]
        differ = self.axes if self.sampled else self.points[0]
        shared = {**asdict(TrainConfig()), **{key: held[0] for key, held in values.items()}, **self.points[0]}
        self.facts = dict(differ=sorted(differ), search=config.search if self.sampled else 'points',
                          base={key: value for key, value in shared.items() if key not in (*differ, *NOT_SWEPT)})
        self.elsewhere = {key: values[key][0] for key in ELSEWHERE if key in values}
        self.configs = [self.train_config(point) for point in self.points]
        self.runs = [digest(config) for config in self.configs]
        self.digests = {}  # by number of the trial

    @staticmethod
    def checked(name, shapes, overrides):
        """`shapes` with values of the right types, or a single empty one. Raises UserError."""
        if not all(isinstance(shape, dict) and shape and shape.keys() == shapes[0].keys() for shape in shapes):
            raise UserError(f'{name}={shapes} is not allowed: use a list of dicts of the same keys, '
                            '[dict(n_layer=2), dict(n_layer=4)]')
        shapes = shapes or [{}]
        clash = [key for key in shapes[0] if key in ('seed', 'learning_rate', *NOT_SWEPT)
                 or isinstance(overrides.get(key), list)]
        if clash:
            raise UserError(f'{clash[0]} cannot be in {name}'
                            f"{': it has a list of its own' if clash[0] in overrides else ''}")
        return [{key: check(key, value, TYPES, name) for key, value in shape.items()} for shape in shapes]

    def train_config(self, point):
        """The TrainConfig of a point. Raises UserError."""
        try:
            config = TrainConfig(**{**self.facts['base'], **self.elsewhere, **point, **ALONE})
            split_batch(config, world_size=1)
            gpt_config(config)
            if not config.tokens_per_param:
                at_length(config, num_steps(config, 0))
        except ValueError as error:
            raise UserError(f"{error} (in {', '.join(f'{key}={value}' for key, value in point.items())})") from None
        return config

    def point_of(self, trial):
        return {**self.points[0], **trial.params} if self.sampled else trial.params

    def run_of(self, trial):
        """The digest of a trial."""
        if trial.number not in self.digests:
            self.digests[trial.number] = digest(self.train_config(self.point_of(trial)))
        return self.digests[trial.number]


def cost(config, data):
    """FLOPs of one run: what the progress bar counts. Raises UserError for an optimizer or a batch without a rule."""
    with torch.device('meta'):
        model = GPT(gpt_config(config, data.vocab_size))
    steps = num_steps(config, model.num_params())
    optimizer_of(model, at_length(config, steps), 'meta')
    return model.flops_per_token() * (steps * config.batch_tokens + config.eval_tokens / 3)


# -----------------------------------------------------------------------------
# The study: Optuna keeps the queue, the results, and watch over the workers


def open_study(config):
    """Optuna's study, a new one if there is none. Raises UserError if the storage cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings('ignore', 'Heartbeat of storage')  # take() records it
    url = config.storage or f"sqlite:///{Path(config.out_dir, 'study.db').resolve()}"
    try:
        if url.startswith('grpc://'):
            host, _, port = url.removeprefix('grpc://').partition(':')
            storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
        else:
            sqlite = url.startswith('sqlite')
            connect = partial(
                optuna.storages.RDBStorage, url, engine_kwargs=dict(connect_args=dict(timeout=60)) if sqlite else {},
                heartbeat_interval=config.heartbeat_s, grace_period=GRACE * config.heartbeat_s,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=3))
            try:
                storage = connect()
            except sqlalchemy.exc.DatabaseError:  # another process may be making the tables at this moment
                time.sleep(1)
                storage = connect()
            if sqlite:
                lock_before_reading(storage.engine)
        sampler = optuna.samplers.RandomSampler() if config.search in ('grid', 'random') else \
            SAMPLERS[config.search][0](config.search_seed)
        return optuna.create_study(study_name=config.study, storage=storage, sampler=sampler, load_if_exists=True)
    except Exception as error:  # whatever the driver of that database raises
        url = re.sub('(://[^:/]*):[^@/]*@', r'\1:***@', url)
        raise UserError(f"storage '{url}' cannot be used ({type(error).__name__}: {first_line(error)}): use one that "
                        'works, or leave --storage out for a file in out_dir') from None


def lock_before_reading(engine):
    """SQLite takes its lock at the first write: without this two workers read that a trial waits, and both run it."""
    @sqlalchemy.event.listens_for(engine, 'connect')
    def leave_transactions_to_us(connection, _):
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, 'begin')
    def lock(connection):
        connection.exec_driver_sql('BEGIN IMMEDIATE')
    engine.dispose()  # the connection made before


def trials_of(study, *states):
    return study.get_trials(deepcopy=False, states=states or None)


def distribution(key, values, log=False):
    """Optuna's description of a key; the text ones cannot grow later, so they start with all that is allowed."""
    texts = {**CHOICES, **TRAIN_CHOICES}
    if isinstance(values[0], (str, bool)):
        allowed = (False, True) if isinstance(values[0], bool) else texts.get(key) or sorted(set(values))
        return optuna.distributions.CategoricalDistribution(tuple(allowed))
    if isinstance(values[0], float):
        return optuna.distributions.FloatDistribution(min(values), max(values), log=log and min(values) > 0)
    step = math.gcd(*values) or 1
    return optuna.distributions.IntDistribution(min(values), max(values), step=step)


def enqueue(study, plan, out_dir):
    """Adds the points that the study does not have yet; a new study starts with the trials.csv in `out_dir`.

    Raises UserError for a study, or a trials.csv, of another sweep.
    """
    path, known = Path(out_dir, 'sweep.json'), study.user_attrs.get('sweep')
    rows = [] if known else read_csv(Path(out_dir, 'trials.csv'), TYPES)
    whose = f"study '{study.study_name}'"
    if rows:
        whose = f"'{Path(out_dir, 'trials.csv')}'"
        if not path.exists():
            raise UserError(f"{whose} has no sweep.json beside it that says of what: use another --out_dir")
        known = json.loads(path.read_text())
    if known:
        require_same(known, plan.facts, whose)
    queue = [({key: row[key] for key in plan.facts['differ']}, dict(state=TrialState.COMPLETE, value=row['val_loss']),
              {key: row[key] for key in KEPT}) for row in {row['trial']: row for row in rows}.values()]
    queue += [(point, dict(state=TrialState.WAITING), {}) for point in plan.points if not plan.sampled]
    there = {plan.run_of(trial) for trial in trials_of(study, *ALIVE)}
    held = {key: [point[key] for point, _, _ in queue] for key in plan.facts['differ']}
    for point, state, results in queue:
        run = digest(plan.train_config({**plan.points[0], **point}))
        if run in there:
            continue
        there.add(run)
        try:
            study.add_trial(optuna.create_trial(
                **state, params=point, user_attrs=results,
                distributions={key: distribution(key, held[key], log=plan.sampled) for key in point}))
        except ValueError as error:
            raise UserError(f"{whose} cannot take {point} ({first_line(error)}): use another --out_dir or "
                            '--study') from None
    study.set_user_attr('sweep', plan.facts)


def require_same(known, facts, whose):
    """Raises UserError if two sweeps differ in what all their trials share, or in which keys those differ."""
    def of(facts):
        named = {key: f'is {value!r}' for key, value in facts['base'].items()}
        return {**named, **{key: 'varies' for key in facts['differ']}, 'search': f"is {facts['search']!r}"}
    there, here = of(known), of(facts)
    defaults = of(dict(facts, base=asdict(TrainConfig())))  # for keys that are younger than the study
    differ = [f'{key} {there.get(key, defaults[key])} there and {value} here' for key, value in here.items()
              if there.get(key, defaults[key]) != value]
    if differ:
        raise UserError(f"{whose} is of another sweep: {'; '.join(differ)}. Use another --out_dir or --study")


# -----------------------------------------------------------------------------
# Workers


def bury_the_dead(study, config):
    """Puts the trials of workers that died back into the queue."""
    optuna.storages.fail_stale_trials(study)  # no heartbeat for long
    for trial in trials_of(study, TrialState.RUNNING):  # died before the first one
        age_s = (datetime.now() - trial.datetime_start).total_seconds()
        if 'worker' not in trial.user_attrs and age_s > GRACE * config.heartbeat_s:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)


def take(study, plan, config, device, trials, beats):
    """Appends to `trials` those to run next, with their heartbeats in `beats`: one stack's, or none if none is left."""
    wanted = 1
    while len(trials) < wanted:
        if not trials_of(study, TrialState.WAITING) and (not plan.sampled or sampled_so_far(study) >= config.trials):
            return
        trial = study.ask({key: distribution(key, held, log=True) for key, held in plan.axes.items()}
                          if plan.sampled else None)
        beats.enter_context(get_heartbeat_thread(trial._trial_id, study._storage))
        trial.set_user_attr('worker', f'{platform.node()}:{os.getpid()}')
        trials.append(trial)
        if plan.sampled:
            superfluous = sampled_so_far(study, before=trial.number) >= config.trials
        else:  # another worker took the last one, or another machine queued the same point
            superfluous = not trial.params or any(
                other.number < trial.number and plan.run_of(other) == plan.run_of(trial)
                for other in trials_of(study, TrialState.RUNNING, TrialState.COMPLETE))
        if superfluous:
            study.tell(trials.pop(), state=TrialState.PRUNED)
            continue
        try:
            newest = replace(plan.train_config(plan.point_of(trial)), device=device)
        except UserError as error:  # a sampler does not know which values go together
            tell(study, trials.pop(), dict(error=str(error)), state=TrialState.FAIL)
            continue
        if len(trials) == 1:
            wanted = config.stack or stack_size(newest)


def sampled_so_far(study, before=math.inf):
    """Points that a sampler has chosen: also those that failed, or a search in which all do would not end."""
    return sum(trial.state in ALIVE or 'error' in trial.user_attrs
               for trial in trials_of(study) if trial.number < before)


def run_next(study, plan, config, device):
    """Takes the next trials, trains them and tells the study; returns whether there were any."""
    trials = []
    with contextlib.ExitStack() as beats:
        try:
            take(study, plan, config, device, trials, beats)
            configs = {trial.number: replace(plan.train_config(plan.point_of(trial)), device=device)
                       for trial in trials}
            for _, group in itertools.groupby(list(trials), key=lambda trial: stackable(configs[trial.number])):
                group = list(group)
                first = configs[group[0].number]
                size = 1 if why_not_stack(first) else config.stack or stack_size(first)
                for i in range(0, len(group), size):
                    train_and_tell(study, group[i:i + size], configs)
            return bool(trials)
        except BaseException:  # Ctrl-C, for one: the next start is to run at once what is left of them
            for trial in trials:
                tell(study, trial, state=TrialState.FAIL)
            raise


def train_and_tell(study, trials, configs):
    """Trains trials as a stack, or one by one if they do not fit; an error of a run ends that run, not the sweep."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            of = [configs[trial.number] for trial in trials]
            summaries = train_stack(of) if len(of) > 1 else [train(of[0])]
    except Exception as error:
        if len(trials) == 1:
            tell(study, trials[0], dict(error=f'{type(error).__name__}: {first_line(error)}'), state=TrialState.FAIL)
            return
        print(f'a stack of {len(trials)} failed, its runs go one by one: {first_line(error)}', file=sys.stderr)
        for trial in trials:
            train_and_tell(study, [trial], configs)
        return
    for trial, summary in zip(trials, summaries):
        tell(study, trial, {key: summary.get(key) for key in KEPT}, values=summary['val_loss'])


def tell(study, trial, attrs={}, **outcome):
    """Tells the study how a trial ended, unless it has an end already: given up for dead and run by another, say."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        for key, value in attrs.items():
            trial.set_user_attr(key, None if isinstance(value, float) and not math.isfinite(value) else value)
        study.tell(trial, skip_if_finished=True, **outcome)


def work(config, overrides, device, threads, after_each=lambda: None):
    """Runs trials until none is left, here or with another worker who may die yet. Raises UserError."""
    if threads:
        torch.set_num_threads(threads)
    plan, study = Plan(config, overrides), open_study(config)
    if any(one.compile for one in plan.configs):  # how many graphs, one for each model, torch keeps before it gives up
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    watched, parent = is_heartbeat_enabled(study._storage), multiprocessing.parent_process()
    try:
        while not parent or parent.is_alive():
            bury_the_dead(study, config)
            if run_next(study, plan, config, device):
                after_each()
            elif watched and trials_of(study, TrialState.RUNNING):
                time.sleep(min(1, config.heartbeat_s))
            else:
                return
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise UserError(f'the storage failed ({first_line(error)}): the same command goes on when it works') from None


def worker_main(*arguments):
    with contextlib.suppress(KeyboardInterrupt):  # the parent says that it stopped
        exit_on_user_error(lambda: work(*arguments))


def places(config, device):
    """(device, threads) of each worker on this machine; threads 0: as many as torch takes."""
    if pick_device(device).type == 'cuda':
        gpus = [f'cuda:{i}' for i in range(torch.cuda.device_count())] if device in ('auto', 'cuda') else [device]
        return [(gpus[i % len(gpus)], 0) for i in range(config.workers or len(gpus))]
    if pick_device(device).type != 'cpu':
        return [(device, 0)] * (config.workers or 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    workers = config.workers or cores  # small models leave a second thread idle: see LOG.md
    return [(device, max(1, cores // workers))] * workers


def run(config, overrides, plan, study, costs):
    """Starts the workers and shows their progress until they end. Raises UserError."""
    each = max(costs.values())  # for the points that a sampler has yet to choose
    planned, total = (config.trials, config.trials * each) if plan.sampled else (len(costs), sum(costs.values()))
    where = places(config, plan.configs[0].device)
    print(f"{len(where)} worker{'s' * (len(where) > 1)}, {where[0][1] or 'all'} thread(s) each", flush=True)
    interval_s, shown = 0.5 if sys.stderr.isatty() else 60, [0.0]
    bar = tqdm(total=round(total / 1e9), dynamic_ncols=True,
               bar_format='{l_bar}{bar}| {elapsed} gone, {remaining} left{postfix}')

    def show():
        done = [trial for trial in trials_of(study, TrialState.COMPLETE)
                if plan.sampled or plan.run_of(trial) in costs]
        spent = sum(each if plan.sampled else costs[plan.run_of(trial)] for trial in done)
        diverged = sum(trial.value == math.inf for trial in done)
        bar.n = round(spent / 1e9)
        bar.set_postfix_str(f'{len(done)} of {planned} runs, {diverged} diverged', refresh=False)
        if time.monotonic() - shown[0] > interval_s or len(done) == planned:
            bar.refresh()
            shown[0] = time.monotonic()

    with bar:
        show()
        bar.initial = bar.n  # what was done before tells nothing about the time that is left
        if len(where) == 1:
            work(config, overrides, *where[0], show)
            return
        context = multiprocessing.get_context('spawn')
        workers = [context.Process(target=worker_main, args=(config, overrides, *place)) for place in where]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(timeout=1)
                show()


# -----------------------------------------------------------------------------
# Results


def rows_of(study, plan):
    """A row for each point of the plan that has been run, equal points with the same trial; and rows for all others."""
    finished = trials_of(study, TrialState.COMPLETE)

    def row(point, trial):
        return dict(point, val_loss=trial.value, trial=trial.number, **{key: trial.user_attrs.get(key) for key in KEPT})
    if plan.sampled:
        return [row(plan.point_of(trial), trial) for trial in finished], []
    by_run = {plan.run_of(trial): trial for trial in reversed(finished)}
    return ([row(point, by_run[run]) for point, run in zip(plan.points, plan.runs) if run in by_run],
            [row(plan.point_of(trial), trial) for trial in finished if plan.run_of(trial) not in plan.runs])


def write_best(path, plan, rows, overrides):
    """Writes a config for train.py with the best point of the first model, on average over the seeds. Raises UserError.
    """
    settings = {}
    for row in rows:
        if all(row[key] == value for key, value in plan.models[0].items()):
            settings.setdefault(tuple(row[key] for key in plan.axes), []).append(row)
    most = max(map(len, settings.values()))

    def mean_loss(rows):
        return sum(row['val_loss'] for row in rows) / len(rows)
    best = min((rows for rows in settings.values() if len(rows) == most), key=mean_loss)
    if mean_loss(best) == math.inf:
        raise UserError(f'all {len(settings)} points diverged: search lower learning rates')
    config = plan.train_config({key: best[0][key] for key in plan.points[0]})
    unswept = {key: overrides[key] for key in NOT_SWEPT if key in overrides and key not in ('out_dir', 'overwrite')}
    always = ('n_layer', 'n_embd', 'head_dim', 'base_n_layer', 'base_n_embd', 'base_head_dim', *plan.axes)
    values = {key: value for key, value in asdict(config).items() if key not in (*NOT_SWEPT, 'seed') and
              (key in always or value != getattr(TrainConfig, key))}
    lines = [f'# The best of {len(settings)} points: validation loss {mean_loss(best):.4f} at {config.n_layer} layers '
             f'x {config.n_embd}. The values are those of the base, {config.base_n_layer} x {config.base_n_embd}.',
             f'# Train it larger with the same values: python train.py {path} --n_layer=.. --n_embd=..',
             *(f'{key} = {value!r}' for key, value in {**values, **unswept}.items()),
             f"out_dir = '{Path(path).with_suffix('')}'"]
    Path(path).write_text('\n'.join(lines) + '\n')


def read_sweep(argv):
    """(SweepConfig, overrides of TrainConfig) from the command line. Raises UserError."""
    argv = ['--tune=True' if argument == '--tune' else argument for argument in argv]
    overrides = configure(SweepConfig, argv, axes=TrainConfig)
    own = {key: overrides.pop(key) for key in list(overrides) if key in {field.name for field in fields(SweepConfig)}}
    if own.get('tune'):
        flags = {argument[2:].partition('=')[0] for argument in argv if argument.startswith('--')}
        if 'out_dir' not in flags:
            own['out_dir'] = 'out/tune'  # not the one that the config gives to train.py
        own.setdefault('search', 'random')
        for key, ends in TUNED.items():
            if key not in flags and not isinstance(overrides.get(key), list):
                overrides[key] = ends
    return SweepConfig(**own), overrides


def main():
    """Returns the exit code: 0, or 1 if runs failed. Raises UserError."""
    config, overrides = read_sweep(sys.argv[1:])
    plan = Plan(config, overrides)
    data = [open_dataset(name) for name in dict.fromkeys(one.dataset for one in plan.configs)][0]
    pick_device(plan.configs[0].device)
    costs = {run: cost(one, data) for run, one in dict(zip(plan.runs, plan.configs)).items()}
    out_dir = Path(config.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / 'trials.csv').touch()
    except OSError as error:
        raise UserError(f"out_dir='{out_dir}' cannot be written: {error}") from None
    study = open_study(config)
    enqueue(study, plan, out_dir)
    (out_dir / 'sweep.json').write_text(json.dumps(plan.facts, indent=1))
    if plan.sampled:
        print(f'{config.trials} runs, {max(0, config.trials - sampled_so_far(study))} to do')
    else:
        done = {plan.run_of(trial) for trial in trials_of(study, TrialState.COMPLETE)}
        print(f'{len(plan.models)} model(s) x {len(plan.points) // len(plan.models)} = {len(plan.points)} points, '
              f'{len(costs)} different runs, {len(costs.keys() - done)} to do')
    if config.stack > 1 and why_not_stack(plan.configs[0]):
        print(f'runs are not stacked: {why_not_stack(plan.configs[0])}')
    run(config, overrides, plan, study, costs)

    rows, others = rows_of(study, plan)
    missing = config.trials - len(rows) if plan.sampled else \
        len(costs.keys() - {plan.run_of(trial) for trial in trials_of(study, TrialState.COMPLETE)})
    errors = [trial.user_attrs['error'] for trial in trials_of(study, TrialState.FAIL) if 'error' in trial.user_attrs]
    reason = errors[-1] if errors else 'they were stopped'
    if not rows:
        raise UserError(f'no run has finished: {reason}')
    write_csv(out_dir / 'trials.csv', rows + others)
    shared = {key: value for key, value in plan.facts['base'].items() if value != getattr(TrainConfig, key)}
    report = Report(out_dir.name, rows, plan.models, plan.axes, shared, config.search == 'grid', plan.row_keys)
    print(report.write(out_dir))
    if config.tune:
        best = out_dir / 'best.py'
        write_best(best, plan, rows, overrides)
        print(f'{best} has the best values: python train.py {best} --n_layer=.. --n_embd=..')
    if missing > 0:
        print(f'{missing} runs are missing ({reason}); the same command runs them again', file=sys.stderr)
    return 1 if missing > 0 else 0


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; the same command goes on')
