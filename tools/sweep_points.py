"""
The points of a sweep: the models to compare, the values to tune, and which points are the same computation.

    model    {key: value}: n_layer, n_embd, density, parameterization, and the keys of a shape and of a variant
    axes     {key: [value, ..]}: what is tuned; an entry of a dict is a key of its own: lr_mult.embedding
    point    {key: value}: a model, one value of every axis, and a seed
    digest   a name for what a run computes; points with equal digests are trained once
"""
import hashlib
import itertools
import json
import math
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import torch

from configurator import field_types, flat, merge, nested, typed
from model import GPT, GPTConfig
from nanop.errors import UserError
from nanop.machine import flops_per_token
from train import TrainConfig, make_optimizer, num_steps, rescaled, split_batch

TYPES = field_types(TrainConfig)
DEFAULTS = flat(asdict(TrainConfig()))
NO_MULT = 1.0  # the default of an entry of a dict, none of which is in DEFAULTS
MODEL_AXES = ('n_layer', 'n_embd', 'density', 'parameterization')
WORKER_KEYS = ('device', 'compile')  # may differ between the workers of a study
FIXED = dict(out_dir='', init_from='scratch', eval_only=False, eval_interval=0, sample_tokens=0, wandb_log=False)
NOT_SWEPT = (*FIXED, *WORKER_KEYS, 'overwrite', 'always_save_checkpoint', 'keep_checkpoints', 'log_interval',
             'wandb_project', 'wandb_run_name')


def combinations(axes):
    """Every combination of the values in `axes`, as dicts; the last axis changes first."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def random_settings(axes, count, seed):
    """`count` dicts with a random value of each axis; a larger count begins with the same ones. Numbers lie between the
    least and the greatest value, log-uniform if all are above zero; integers are multiples of their common divisor."""
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
    return [{key: draw(values) for key, values in axes.items()} for _ in range(count)]


def digest(config):
    """The digest of a TrainConfig. Parameterizations enter by their rules, so equal models have equal digests, and so
    do base batches and durations."""
    if not config.tokens_per_param:  # else the number of steps depends on the model
        config = replace(rescaled(config, num_steps(config, 0)), base_batch_tokens=0, base_train_tokens=0,
                         rescale=DEFAULTS['rescale'])
    ignored = {*NOT_SWEPT, 'parameterization', 'alpha', 'base_n_layer', 'base_n_embd', 'base_head_dim'}
    if config.density == 1:
        ignored.add('mask_seed')
    facts = {key: value for key, value in flat(asdict(config)).items()
             if key not in ignored and not ('.' in key and value == NO_MULT)}
    text = json.dumps([facts, config.rules], sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def cost(config, data):
    """FLOPs of one run. Refuses an optimizer or a batch for which there is no rule."""
    with torch.device('meta'):
        model = GPT(GPTConfig.of(config, vocab_size=config.vocab_size or data.vocab_size))
    steps = num_steps(config, model.num_params())
    make_optimizer(model, rescaled(config, steps), 'meta')
    return flops_per_token(model) * (steps * config.batch_tokens + config.eval_tokens / 3)


def listed_values(overrides):
    """{key: [value, ..]} of the overrides, with the defaults of the keys that every sweep has."""
    usual = {key: DEFAULTS[key] for key in ('seed', 'learning_rate', *MODEL_AXES) if key not in overrides}
    values = {key: value if isinstance(value, list) else [value] for key, value in (overrides | usual).items()}
    for key, held in values.items():
        if key in NOT_SWEPT and len(held) > 1:
            raise UserError(f'{key} cannot be swept: give it one value')
        if len(set(held)) < len(held):
            raise UserError(f'{key}={held} holds a value twice: leave one out')
    return values


def typed_dicts(name, dicts, overrides, complete=False):
    """`dicts` with values of the right types, or [{}] if there are none. All must have the same keys; with `complete`,
    a dict that lacks a key of another one gets the usual value."""
    ok = all(isinstance(each, dict) for each in dicts)
    if ok:
        dicts = [flat({key: typed(key, value, TYPES, name) for key, value in each.items()}) for each in dicts]
    if ok and complete:
        usual = DEFAULTS | overrides
        whole = [merge(usual, each, TrainConfig) for each in dicts]
        changed = dict.fromkeys([key for each in dicts for key in each] +  # and what these replace
                                [key for each in whole for key in usual if each[key] != usual[key]])
        dicts = [{key: each.get(key, NO_MULT) for key in changed} for each in whole]
    if not ok or not all(each and each.keys() == dicts[0].keys() for each in dicts):
        raise UserError(f'{name}={dicts} is not allowed: use a list of dicts of the same keys, '
                        '[dict(n_layer=2), dict(n_layer=4)]')
    for key in dicts[0] if dicts else []:
        if key in ('seed', 'learning_rate', *NOT_SWEPT) or isinstance(overrides.get(key), list):
            raise UserError(f"{key} cannot be in {name}{': it has a list of its own' if key in overrides else ''}")
    return dicts or [{}]


class Sweep:
    """What a sweep runs, from a SweepConfig and the overrides of TrainConfig, which may hold lists.

    configs, digests       the TrainConfig and the digest of each of the `points`
    row_keys               the keys that make the rows of the report's tables: parameterization and those of variants
    wanted                 a function that says which points run; all, unless it is given
    sampled                a sampler of Optuna chooses the points; `points` are the corners of what it searches
    facts                  what a study keeps: `base`, the values that all trials share; `differ`, other keys; search;
                           data, see data_facts()
    """

    def __init__(self, config, overrides, wanted=lambda point: True):
        self.config, self.sampled = config, config.search not in ('grid', 'random')
        overrides = flat(overrides)
        values = listed_values(overrides)
        shapes = typed_dicts('shapes', config.shapes, overrides)
        variants = typed_dicts('variants', config.variants, overrides, complete=True)
        both = sorted(shapes[0].keys() & variants[0].keys())
        if both:
            raise UserError(f"{', '.join(both)} is in shapes and in variants: leave it in one of them")
        grid = combinations({key: values[key] for key in MODEL_AXES if key not in shapes[0] | variants[0]})
        self.models = [model | variant | shape for model in grid for variant in variants for shape in shapes]
        self.row_keys = list(dict.fromkeys(['parameterization', *variants[0]]))
        self.axes = {key: held for key, held in values.items() if key not in ('seed', *self.models[0])
                     and (len(held) > 1 or key == 'learning_rate')}
        self.points = list(filter(wanted, self.make_points(values['seed'])))
        self.worker_values = {key: values[key][0] for key in WORKER_KEYS if key in values}
        differ = sorted(self.axes if self.sampled else self.points[0])
        set_by_points = {key: next(filter(None, (point[key] for point in self.points)), None) for key in self.points[0]}
        shared = merge(DEFAULTS | {key: held[0] for key, held in values.items()}, set_by_points, TrainConfig)
        base = {key: value for key, value in shared.items() if key not in differ and key not in NOT_SWEPT}
        self.facts = dict(differ=differ, search=config.search if self.sampled else 'points', base=base, data={})
        self.configs = [self.train_config(point) for point in self.points]
        self.digests = list(map(digest, self.configs))
        self.num_runs = config.trials if self.sampled else len(set(self.digests))
        self.known_digests = {}  # by the values of the keys that differ

    def make_points(self, seeds):
        search = self.config.search
        if self.sampled and len(self.models) * len(seeds) > 1:
            raise UserError(f"search='{search}' tunes one model, this is {len(self.models)} with {len(seeds)} seeds: "
                            'use grid or random, or a single one of each')
        if search != 'grid' and all(len(held) < 2 for held in self.axes.values()):
            raise UserError(f"search='{search}' has nothing to search: give an axis its least and greatest value, such "
                            'as --learning_rate=0.0005,0.05')
        settings = combinations(self.axes)
        if search == 'random':
            settings = random_settings(self.axes, self.config.trials, self.config.search_seed)
        # one seed after the other, so that a sweep that was stopped has whole ones
        return [model | setting | dict(seed=seed) for seed in seeds for model in self.models for setting in settings]

    def train_config(self, point):
        """The TrainConfig of a point. Refuses one that cannot be trained."""
        try:
            config = TrainConfig(**nested(self.facts['base'] | self.worker_values | point | FIXED))
            split_batch(config, world_size=1)
            if not config.tokens_per_param:  # else the number of steps depends on the model
                rescaled(config, num_steps(config, 0))
        except UserError as error:
            raise UserError(f"{error} (in {', '.join(f'{key}={value}' for key, value in point.items())})") from None
        return config

    def digest_at(self, point):
        """The digest of a point, which may be one of another sweep in the same study."""
        params = {key: point[key] for key in self.facts['differ']}
        at = tuple(params.values())
        if at not in self.known_digests:
            self.known_digests[at] = digest(self.train_config(self.points[0] | params))
        return self.known_digests[at]

    def divide(self, rows):
        """(rows of this sweep's models, rows of other ones) from one row, a dict, for each finished run. The first are
        one row for each point: models that compute the same share a run. Points of earlier calls are among them."""
        if self.sampled:
            return rows, []
        runs = {}  # {digest: row}
        for row in rows:
            runs.setdefault(self.digest_at(row), row)
        settings = {tuple(row[key] for key in (*self.axes, 'seed')): row for row in rows}.values()
        others = [model | {key: row[key] for key in (*self.axes, 'seed')} for model in self.models for row in settings]
        used = {}  # {point as a tuple: (point, its run)}
        for point in self.points + others:
            with suppress(UserError):  # what cannot be trained has not been
                if (run := self.digest_at(point)) in runs:
                    used[tuple(point.values())] = point, run
        theirs = runs.keys() - {run for _, run in used.values()}
        return ([{**point, **runs[run], **point} for point, run in used.values()],
                [row for run, row in runs.items() if run in theirs])

    def point_of(self, trial):
        return self.points[0] | trial.params if self.sampled else trial.params

    def digest_of(self, trial):
        return self.digest_at(self.point_of(trial))
