"""Depth x width shapes of equal size, what each needs, and how near the evidence is to them: bench.py --shapes."""
import math
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

from nanop.errors import UserError
from nanop.machine import flops_per_token
from tools.bench_worker import synchronized_time
from tools.contestants import Contestant
from tools.plan import count_in_blocks, meta_model, planned_bytes
from tools.sweep_files import read_facts, read_trials
from tools.sweep_points import TYPES
from train import split_batch

RESULTS = Path(__file__).resolve().parents[1] / 'results'
TOLERANCE = 0.05  # shapes differ from the size that was asked for by at most this fraction of it


def equal_shapes(config, num_params):
    """The config at shapes of about `num_params` parameters with n_layer <= n_embd, from deep to wide: for every half
    octave of n_embd / n_layer the shape that is nearest to this size."""
    nearest, n_embd, one_layer = {}, 0, 0
    step = config.head_dim * (config.n_kv_head or 1)  # the key heads divide the heads
    while one_layer <= (1 + TOLERANCE) * num_params:
        n_embd += step
        one_layer, two_layers = (meta_model(replace(config, n_layer=n_layer, n_embd=n_embd))[0].num_params()
                                 for n_layer in (1, 2))
        more_layers = max(0, round((num_params - one_layer) / (two_layers - one_layer)))
        error = abs((one_layer + more_layers * (two_layers - one_layer)) / num_params - 1)
        if error <= TOLERANCE and 1 + more_layers <= n_embd:
            half_octave = round(2 * math.log2(n_embd / (1 + more_layers)))
            nearest[half_octave] = min(nearest.get(half_octave, (math.inf,)), (error, 1 + more_layers, n_embd))
    if not nearest:
        raise UserError(f'params={num_params:g} is the size of no shape with n_layer <= n_embd, n_embd a multiple of '
                        f'{step} and a {meta_model(config)[1]}: use other params, head_dim or vocab_size')
    return [replace(config, n_layer=n_layer, n_embd=n_embd) for _, (_, n_layer, n_embd) in sorted(nearest.items())]


def product_rate(config, machine):
    """FLOP/s of the first product of the MLP on this device, for 1024 tokens: the best of ten."""
    x, w = (torch.randn(rows, config.n_embd, device=machine.device, dtype=machine.dtype)
            for rows in (1024, 4 * config.n_embd))
    seconds = []
    for _ in range(10):
        started = synchronized_time(machine.device)
        x @ w.T
        seconds.append(synchronized_time(machine.device) - started)
    return 2 * x.numel() * len(w) / min(seconds)


def measured_speed(config, bench, machine):
    """Tokens per second of training, not compiled, from steps of one micro-batch; the optimizer counts once a step."""
    _, local, micro_batches = split_batch(config, 1)
    one = replace(config, batch_tokens=local // micro_batches * config.block_size, compile=False)
    with closing(Contestant('nanoP', bench.turn_s, kind='ours', config=asdict(one), dtype=machine.dtype_name)) as ours:
        for _ in range(bench.turns):
            ours.take_turn()
    *of_micro_batch, optimizer_s = (median(seconds) for seconds in zip(*ours.turns))
    return config.batch_tokens / (micro_batches * sum(of_micro_batch) + optimizer_s)


def ratios(n_layer, n_embd, base_n_layer, base_n_embd, **_):
    return {'width': n_embd / base_n_embd, 'depth': n_layer / base_n_layer, 'N:L': n_embd / n_layer}


def evidence_on(parameterization):
    """({ratio: (smallest, largest)} of the trials in results/ under these rules, parameters of the largest model)"""
    found = {}
    for path in sorted(RESULTS.glob('*/trials.csv')):
        base = read_facts(path.with_name('sweep.json'))['base']
        for row in read_trials(path, TYPES):
            if row['parameterization'] == parameterization:
                for key, value in dict(ratios(**base | row), params=row['params'] or 0).items():
                    low, high = found.get(key, (value, value))
                    found[key] = min(low, value), max(high, value)
    return found, found.pop('params', (0, 0))[1]


def shape_row(config, bench, machine, found):
    """What training of one shape needs here, as a row of the table and of the CSV file."""
    model, _ = meta_model(config)
    flops, how = flops_per_token(model), 'estimated'
    speed = bench.mfu * product_rate(config, machine) / flops
    if bench.measure:
        print(f'measuring {config.n_layer} x {config.n_embd}', file=sys.stderr)
        try:
            speed, how = measured_speed(config, bench, machine), 'measured'
        except UserError as error:  # too little memory, for example
            print(f'not measured, so it is estimated: {error}', file=sys.stderr)
    inside = [key for key, value in ratios(**asdict(config)).items() if key in found
              and found[key][0] <= value <= found[key][1]]
    return dict(
        contestant='nanoP', shape=f'{config.n_layer}x{config.n_embd}', n_embd_per_layer=config.n_embd / config.n_layer,
        params=model.num_params(), params_in_blocks=count_in_blocks(model)[0], flops=flops * bench.tokens,
        planned_bytes=planned_bytes(model, config, bench, machine), tokens_per_s=speed, speed=how,
        hours=bench.tokens / speed / 3600, tokens_per_param=bench.tokens / model.num_params(),
        evidence=', '.join(inside) or 'none')
