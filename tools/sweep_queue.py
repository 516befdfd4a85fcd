"""
The queue of a sweep and its workers: Optuna's study keeps the trials, their results and the workers' heartbeats.

A trial is a point that waits, runs, or has ended. Its params are the keys in which trials differ, its value is the
validation loss, and its user attributes hold the worker, the other results (KEPT), or the error.
"""
import contextlib
import io
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path

import optuna
import sqlalchemy
import torch
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import get_heartbeat_thread, is_heartbeat_enabled
from optuna.trial import TrialState
from tqdm import tqdm

from model import CHOICES
from nanop.dataset import CONTENT, content_differs, open_dataset
from nanop.errors import UserError, exit_on_user_error, explained, first_line
from nanop.machine import pick_device
from nanop.terminal import STOP_SIGNALS
from tools.stack import stack_size, stackable, train_stack, why_not_stack
from tools.sweep_files import RESULTS, read_facts, read_trials
from tools.sweep_points import DEFAULTS, NO_MULT, TYPES, Sweep
from train import TRAIN_CHOICES, TrainConfig, train

SAMPLERS = {  # Optuna's, and the package each needs; no seed where workers with the same one would draw the same points
    'tpe': (lambda seed: optuna.samplers.TPESampler(), None), 'gp': (lambda seed: optuna.samplers.GPSampler(), 'scipy'),
    'qmc': (lambda seed: optuna.samplers.QMCSampler(seed=seed), 'scipy'),
    'cmaes': (lambda seed: optuna.samplers.CmaEsSampler(), 'cmaes'),
}
STORAGE_ERRORS = sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError
COUNTED = ('tokens', 'seconds')  # results that the report needs of every run
LOCK_S = 60  # how long to wait for another process that writes to SQLite
KEEP_S = 5  # between two writes of trials.csv while runs finish
GRACE = 3  # heartbeats that a worker may miss
ALIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
KEPT = [key for key in RESULTS if key not in ('val_loss', 'trial')]  # from a run's summary


def open_study(config):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings('ignore', 'Heartbeat of storage')  # take() starts the heartbeat itself
    file = sqlalchemy.URL.create('sqlite', database=str(Path(config.out_dir, 'study.db').resolve()))
    url = config.storage or file.render_as_string()  # any character may be in a folder's name
    try:
        make_sampler, _ = SAMPLERS.get(config.search, (lambda seed: optuna.samplers.RandomSampler(), None))
        return optuna.create_study(study_name=config.study, storage=open_storage(url, config.heartbeat_s),
                                   sampler=make_sampler(config.search_seed), load_if_exists=True)
    except Exception as error:  # whatever the driver of that database raises
        url = re.sub('(://[^:/]*):[^@/]*@', r'\1:***@', url)  # without the password
        raise UserError(f"storage '{url}' cannot be used ({type(error).__name__}: {first_line(error)}): use one that "
                        'works, or leave --storage out for a file in out_dir') from None


def open_storage(url, heartbeat_s):
    if url.startswith('grpc://'):
        host, _, port = url.removeprefix('grpc://').partition(':')
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port or 13000))
    sqlite = url.startswith('sqlite')
    options = dict(
        engine_kwargs=dict(connect_args=dict(timeout=LOCK_S)) if sqlite else {}, heartbeat_interval=heartbeat_s,
        grace_period=GRACE * heartbeat_s, heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3))
    try:
        storage = optuna.storages.RDBStorage(url, **options)
    except sqlalchemy.exc.DatabaseError:  # another process may be creating the tables right now
        time.sleep(1)
        storage = optuna.storages.RDBStorage(url, **options)
    if sqlite:
        lock_before_reading(storage.engine)
    return storage


def lock_before_reading(engine):
    """Lock SQLite when a transaction begins, not at its first write: else two workers could take the same trial."""
    # isolation_level None: the driver leaves transactions to us
    sqlalchemy.event.listen(engine, 'connect', lambda connection, _: setattr(connection, 'isolation_level', None))
    sqlalchemy.event.listen(engine, 'begin', lambda connection: connection.exec_driver_sql('BEGIN IMMEDIATE'))
    engine.dispose()  # close the connection that was made without these two


@contextlib.contextmanager
def storage_errors_explained():
    try:
        yield
    except STORAGE_ERRORS as error:  # Optuna's own does not say why
        raise UserError(f'the storage failed ({first_line(error.__cause__ or error)}): see that it can be written and '
                        'that no other process locks it, then run the same command again') from None


def trials_of(study, *states):
    """The trials in one of these states; all trials if none is given."""
    return study.get_trials(deepcopy=False, states=states or None)


def distribution(key, values, log=False):
    """Optuna's description of a key. A categorical one cannot grow later, so it starts with every value allowed."""
    if isinstance(values[0], (str, bool)):
        allowed = (False, True) if isinstance(values[0], bool) else (CHOICES | TRAIN_CHOICES).get(key)
        allowed = allowed or sorted(set(values))
        return optuna.distributions.CategoricalDistribution(tuple(allowed))
    if isinstance(values[0], float):
        return optuna.distributions.FloatDistribution(min(values), max(values), log=log and min(values) > 0)
    return optuna.distributions.IntDistribution(min(values), max(values), step=math.gcd(*values) or 1)


def enqueue(study, sweep, out_dir):
    """Add the points that the study does not have yet. A new study starts with the trials.csv in `out_dir`."""
    whose, known = f"study '{study.study_name}'", study.user_attrs.get('sweep')
    rows = [] if known else read_trials(Path(out_dir, 'trials.csv'), TYPES, (*sweep.facts['differ'], *COUNTED))
    if rows:
        whose, known = f"'{Path(out_dir, 'trials.csv')}'", read_facts(Path(out_dir, 'sweep.json'))
    if known:
        require_same_sweep(known, sweep.facts, whose)
        say_what_cannot_be_compared(known, sweep.facts, whose)
    queue = [(row, dict(state=TrialState.COMPLETE, value=row['val_loss'],
                        user_attrs={key: row.get(key) for key in KEPT})) for row in rows]
    queue += [(point, dict(state=TrialState.WAITING)) for point in sweep.points if not sweep.sampled]
    held = {key: [point[key] for point, _ in queue] for key in sweep.facts['differ']}
    there = {sweep.digest_of(trial) for trial in trials_of(study, *ALIVE)}
    for point, state in queue:
        params = {key: point[key] for key in held}
        with explained(ValueError, f'{whose} cannot take {params}', 'use another --out_dir or --study'):
            run = sweep.digest_at(point)
            if run not in there:  # equal points share a trial
                distributions = {key: distribution(key, held[key], log=sweep.sampled) for key in held}
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, **state))
            there.add(run)
    if known:  # what an old study did not say of its data stays unknown
        sweep.facts['data'] |= known.get('data', dict.fromkeys(sweep.facts['data'], {}))
    study.set_user_attr('sweep', sweep.facts)


def require_same_sweep(known, facts, whose):
    """Refuse two sweeps whose trials share other values, or differ in other keys."""
    def described(facts):
        replaced = {key for group in TrainConfig.one_of if not set(facts['differ']).isdisjoint(group) for key in group}
        texts = {key: f'is {value!r}' for key, value in facts['base'].items() if key not in replaced}
        return texts | dict.fromkeys(facts['differ'], 'varies') | dict(search=f"is {facts['search']!r}")
    here, there = described(facts), described(known)
    mults = {key: f'is {NO_MULT!r}' for key in [*here, *there] if '.' in key}
    here, there = mults | here, described(dict(facts, base=DEFAULTS)) | mults | there  # or the default
    changes = [f'{key} {there[key]} there and {here[key]} here' for key in here if there[key] != here[key]]
    if changes:
        raise UserError(f"{whose} is of another sweep: {'; '.join(changes)}. Use another --out_dir or --study")
    for name, its_data in facts['data'].items():
        texts = content_differs(known.get('data', {}).get(name, {}), its_data)
        if texts:
            raise UserError(f"{whose} has trained on other data called '{name}': {'; '.join(texts)}. Prepare the data "
                            'again, or use another --out_dir or --study')


def say_what_cannot_be_compared(known, facts, whose):
    for name, its_data in facts['data'].items():
        there = known.get('data', {name: {}}).get(name, its_data)  # of a new name there is nothing to compare
        if not {'data_sha256', 'source_sha256'} & its_data.keys() & there.keys():
            print(f"{whose} does not say what was in the data '{name}': whether it is the same now cannot be compared")


def open_datasets(configs):
    """{name: Dataset} of these TrainConfigs."""
    return {name: open_dataset(name) for name in dict.fromkeys(config.dataset for config in configs)}


def data_facts(datasets):
    """What a study keeps of {name: Dataset}: {name: {key of meta.json: value}}."""
    return {name: {key: data.meta[key] for key in CONTENT if key in data.meta} for name, data in datasets.items()}


def require_data(study, sweep, configs):
    """Refuse data that differs from the study's, before training on it: this machine may have its own."""
    if any(config.dataset not in sweep.facts['data'] for config in configs):
        sweep.facts['data'] |= data_facts(open_datasets(configs))
        require_same_sweep(study.user_attrs.get('sweep', sweep.facts), sweep.facts, f"study '{study.study_name}'")


def requeue_stale_trials(study, heartbeat_s):
    """Put the trials of workers that died back into the queue."""
    optuna.storages.fail_stale_trials(study)  # those without a heartbeat for too long
    for trial in trials_of(study, TrialState.RUNNING):
        age_s = (datetime.now() - trial.datetime_start).total_seconds()
        if 'worker' not in trial.user_attrs and age_s > GRACE * heartbeat_s:  # died before its first heartbeat
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            RetryHeartbeatStaleTrialCallback()(study, trial)


def num_sampled(study, before=math.inf):
    """How many points a sampler chose before trial number `before`. Failed ones count, so that every search ends."""
    trials = [trial for trial in trials_of(study) if trial.number < before]
    return sum(trial.state in ALIVE or 'error' in trial.user_attrs for trial in trials)


def take(study, sweep, trials, heartbeats):
    """Append the trials of the next stack to `trials`, none if none is left; the ExitStack `heartbeats` ends theirs."""
    distributions = {key: distribution(key, values, log=True) for key, values in sweep.axes.items()}
    wanted = 1
    while len(trials) < wanted:
        may_sample = sweep.sampled and num_sampled(study) < sweep.config.trials
        if not may_sample and not trials_of(study, TrialState.WAITING):
            return
        trial = study.ask(distributions if sweep.sampled else None)
        heartbeats.enter_context(get_heartbeat_thread(trial._trial_id, study._storage))
        trial.set_user_attr('worker', f'{platform.node()}:{os.getpid()}')
        trials.append(trial)
        if sweep.sampled:
            superfluous = num_sampled(study, before=trial.number) >= sweep.config.trials
        else:  # Optuna makes an empty trial if another worker took the last one; two machines may queue the same point
            superfluous = not trial.params or any(
                other.number < trial.number and sweep.digest_of(other) == sweep.digest_of(trial)
                for other in trials_of(study, TrialState.RUNNING, TrialState.COMPLETE))
        if superfluous:
            study.tell(trials.pop(), state=TrialState.PRUNED)
            continue
        try:
            config = sweep.train_config(sweep.point_of(trial))
            require_data(study, sweep, [config])
        except UserError as error:  # a sampler does not know which values are allowed together
            tell(study, trials.pop(), dict(error=str(error)), state=TrialState.FAIL)
            continue
        if len(trials) == 1:
            wanted = sweep.config.stack or stack_size(config)


def stacks_of(trials, sweep):
    """The trials in stacks: lists of (trial, TrainConfig) that one batched model can train, often of length 1."""
    stacks, size, shape = [], 0, None
    for trial in trials:
        config = sweep.train_config(sweep.point_of(trial))
        if not stacks or len(stacks[-1]) == size or stackable(config) != shape:
            stacks.append([])
            size = 1 if why_not_stack(config) else sweep.config.stack or stack_size(config)
            shape = stackable(config)
        stacks[-1].append((trial, config))
    return stacks


def run_next(study, sweep):
    """Take the next trials, train them and tell the study. Returns whether there were any."""
    trials = []
    with contextlib.ExitStack() as heartbeats:
        try:
            take(study, sweep, trials, heartbeats)
            for stack in stacks_of(trials, sweep):
                train_and_tell(study, stack)
            return bool(trials)
        except BaseException:  # such as Ctrl-C: fail what has not finished, so that the next start runs it at once
            for trial in trials:
                tell(study, trial, state=TrialState.FAIL)
            raise


def train_and_tell(study, stack):
    """Train a stack, or its runs one by one if they do not fit. An error ends its own run, not the sweep."""
    trials, configs = zip(*stack)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            summaries = train_stack(configs) if len(configs) > 1 else [train(configs[0])]
    except Exception as error:
        if len(stack) == 1:
            error = f'{type(error).__name__}: {first_line(error)}'
            return tell(study, trials[0], dict(error=error), state=TrialState.FAIL)
        print(f'a stack of {len(stack)} failed, now training its runs one by one: {first_line(error)}', file=sys.stderr)
        for one in stack:
            train_and_tell(study, [one])
    else:
        for trial, summary in zip(trials, summaries):
            tell(study, trial, {key: summary.get(key) for key in KEPT}, values=summary['val_loss'])


def tell(study, trial, attrs={}, **outcome):
    """Tell the study how a trial ended, unless it has ended already: another worker may have run it again."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        for key, value in attrs.items():  # JSON has neither infinity nor nan
            trial.set_user_attr(key, None if isinstance(value, float) and not math.isfinite(value) else value)
        study.tell(trial, skip_if_finished=True, **outcome)


def work(config, overrides, device, threads=0, after_each=lambda: None):
    """Run trials until none is left, and none runs in another worker that may still die. threads=0: torch's choice."""
    if threads:
        torch.set_num_threads(threads)
    sweep, study = Sweep(config, overrides | dict(device=device)), open_study(config)
    has_heartbeat, parent = is_heartbeat_enabled(study._storage), multiprocessing.parent_process()
    with storage_errors_explained():
        require_data(study, sweep, sweep.configs)
        while not stopped and (not parent or parent.is_alive()):
            requeue_stale_trials(study, config.heartbeat_s)
            if run_next(study, sweep):
                after_each()
            elif has_heartbeat and trials_of(study, TrialState.RUNNING):
                time.sleep(min(1, config.heartbeat_s))
            else:
                return


stopped = []  # signals that came: a KeyboardInterrupt inside a destructor or a callback from C is lost


@contextlib.contextmanager
def stoppable():
    """While entered, every signal that stops a run is a KeyboardInterrupt, as Ctrl-C is, at the latest in the end."""
    def stop(number, frame):
        stopped.append(number)
        raise KeyboardInterrupt
    stopped.clear()
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
        if stopped:
            raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def worker_main(*arguments):
    def main():
        with contextlib.suppress(KeyboardInterrupt), stoppable():  # the parent prints that the sweep was stopped
            work(*arguments)
    exit_on_user_error(main)


def worker_places(num_workers, device):
    """(device, threads) of each worker; num_workers=0: one per GPU or core; threads 0: torch's choice."""
    kind, devices = pick_device(device).type, [device]
    if kind == 'cuda' and ':' not in device:
        devices = [f'cuda:{number}' for number in range(torch.cuda.device_count())]
    if kind != 'cpu':
        return [(devices[number % len(devices)], 0) for number in range(num_workers or len(devices))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    num_workers = num_workers or cores  # small models leave a second thread idle: see LOG.md
    return [(device, max(1, min(torch.get_num_threads(), cores // num_workers)))] * num_workers


def run_workers(study, sweep, overrides, costs, keep):
    """Start the workers, show their progress and keep() what has finished, until they end or this process is stopped.
    `costs` is {digest: FLOPs}."""
    config, places = sweep.config, worker_places(sweep.config.workers, sweep.configs[0].device)
    print(f"{len(places)} worker{'s' * (len(places) > 1)}, {places[0][1] or 'all'} thread(s) each", flush=True)
    most = max(costs.values())  # for points that a sampler has yet to choose
    total = sum(costs.values()) if not sweep.sampled else sweep.num_runs * most
    kept_at = time.monotonic()

    def show():
        nonlocal kept_at
        finished = finished_trials(study, sweep)
        diverged = sum(trial.value == math.inf for trial in finished)
        bar.set_postfix_str(f'{len(finished)} of {sweep.num_runs} runs, {diverged} diverged', refresh=False)
        spent = sum(costs.get(sweep.digest_of(trial), most) for trial in finished)
        bar.update(round(spent / 1e9) - bar.n)
        if time.monotonic() > kept_at + KEEP_S:
            keep()
            kept_at = time.monotonic()

    with tqdm(total=round(total / 1e9), dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60, miniters=0,
              bar_format='{l_bar}{bar}| {elapsed} elapsed, {remaining} left{postfix}') as bar:
        show()
        bar.initial = bar.n  # earlier work must not enter the estimate of the time left
        if len(places) == 1:
            return work(config, overrides, *places[0], show)
        context = multiprocessing.get_context('spawn')
        workers = [context.Process(target=worker_main, args=(config, overrides, *place)) for place in places]
        on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the workers: this process stops them
        for worker in workers:
            worker.start()
        signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            for worker in workers:
                while worker.is_alive() and not stopped:
                    worker.join(timeout=1)
                    show()
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join(timeout=30)
                worker.kill()  # if it did not hear


def finished_trials(study, sweep):
    """The finished trials of this sweep, one for each digest; a study may hold those of other points, too."""
    finished = trials_of(study, TrialState.COMPLETE)
    if sweep.sampled:
        return finished
    first = {sweep.digest_of(trial): trial for trial in reversed(finished)}
    return [first[run] for run in dict.fromkeys(sweep.digests) if run in first]


def rows_of(study, sweep):
    """(rows of this sweep's models, rows of other finished trials), see Sweep.divide()."""
    return sweep.divide([
        dict(sweep.point_of(trial), val_loss=trial.value, **{key: trial.user_attrs.get(key) for key in KEPT},
             trial=trial.number) for trial in trials_of(study, TrialState.COMPLETE)])


def num_to_do(study, sweep):
    """How many runs this sweep still needs. A point that a sampler chose and that failed is not run again."""
    if not sweep.sampled:
        return sweep.num_runs - len(finished_trials(study, sweep))
    done = sum(trial.state == TrialState.COMPLETE or 'error' in trial.user_attrs for trial in trials_of(study))
    return max(0, sweep.num_runs - done)
