"""
Does the best learning rate stay as a model grows? Statistics on the optima of a few shapes; the largest is held out.

    size      how far a shape lies from the smallest one, in octaves
    optimum   log2 of the best learning rate of one seed at one shape: the lowest point of a parabola in log2
    curve     {rate: {seed: loss}} of one shape, see sweep_report.py
"""
import math
from typing import NamedTuple

import numpy as np

from tools.sweep_report import mean_losses, optimum

MOST_COST = 0.005  # fraction of the loss that keeping a rate may cost
GRID_ERROR = 0.05  # octaves by which a parabola's lowest point depends on where the rates lie
MOST_SEEDS = 20    # to ask for
EXIT_CODES = dict(TRANSFERS=0, SHIFTS=3, UNKNOWN=4)
RUN_OTHER_RATES = 'Run it again around another rate, --learning_rate'
MARKS = {  # {mark of an Optimum: (what is wrong, what to run)}
    '<': ('its best rate may lie below those that were run', RUN_OTHER_RATES),
    '>': ('its best rate may lie above those that were run', RUN_OTHER_RATES),
    '~': ('runs diverge next to its best rate', 'Run it again with a longer warm-up or with clipping'),
    '': ('a seed has no optimum of its own', RUN_OTHER_RATES)}


class Verdict(NamedTuple):
    """`word`: a key of EXIT_CODES; its `reason`; `todo`: what to run to know. Where optima are known, pairs of a value
    and its standard error, in octaves: `start`, the optimum of the smallest shape; `predicted`, that of the held-out
    shape by the line through the others; `measured`, the same, as it is; `drift`, to the target; `at_target`, the
    optimum there by the line through all, whose error holds how far the held-out shape lies off its prediction.
    `tolerance`: the octaves that cost MOST_COST of the loss."""
    word: str
    reason: str
    todo: str = ''
    start: tuple = ()
    predicted: tuple = ()
    measured: tuple = ()
    drift: tuple = ()
    at_target: tuple = ()
    tolerance: float = math.nan


def line_weights(sizes, size):
    """Factors on the optima at `sizes` that add up to the least-squares line at `size`."""
    centred = np.array(sizes) - np.mean(sizes)
    return 1 / len(sizes) + (size - np.mean(sizes)) * centred / (centred @ centred)


def judge(sizes, optima, target_size, curvature, loss):
    """The Verdict on `optima`, (seeds, shapes), at ascending `sizes` from 0; the last is held out. A rate x octaves off
    the optimum costs curvature * x**2; `loss` is that of the largest shape, both in nats."""
    optima = np.array(optima, dtype=float)
    num_seeds, means = len(optima), optima.mean(0)
    # all shapes share one spread over the seeds: a few seeds do not tell it for each
    variance = optima.var(0, ddof=1).mean() if num_seeds > 1 else math.nan
    sigma = math.sqrt(variance / num_seeds + GRID_ERROR ** 2)  # of one shape's mean

    def pair(weights):
        return float(weights @ means), float(sigma * np.linalg.norm(weights))
    first, last = np.eye(len(sizes))[[0, -1]]
    held_out, at_target = np.append(line_weights(sizes[:-1], sizes[-1]), 0), line_weights(sizes, target_size)
    moves = at_target - line_weights(sizes, 0)
    (miss, miss_error), (drift, error) = pair(last - held_out), pair(moves)
    tolerance = math.sqrt(MOST_COST * loss / curvature)
    facts = dict(start=pair(first), predicted=pair(held_out), measured=pair(last), drift=(drift, error),
                 at_target=(float(at_target @ means), math.hypot(pair(at_target)[1], miss)), tolerance=tolerance)
    if num_seeds == 1:
        return Verdict('UNKNOWN', 'one seed does not tell the noise', 'Run more seeds, --seed=1,2,3', **facts)
    so_far, moved = means[-1] - means[0], abs(drift) > 2 * error
    transfers = abs(drift) + error <= tolerance
    if abs(miss) > 2 * miss_error or moved and not transfers and abs(miss) > abs(so_far) / 2:
        how = 'which does not confirm the drift'
        if abs(miss) > 2 * miss_error:
            grows = abs(so_far) > abs(so_far - miss)
            how = f"for the drift {'accelerates' if grows else 'does not go on as it began'}"
        return Verdict('UNKNOWN', f'the held-out shape is {miss:+.2f} ± {miss_error:.2f} octaves off its prediction, '
                       f'{how}', 'Run larger shapes, --largest_frac, or sweep the target itself', **facts)
    if transfers:
        return Verdict('TRANSFERS', f'drift and error together cost less than {MOST_COST:.1%} of the loss', **facts)
    if moved:
        return Verdict('SHIFTS', f'the drift is over twice its error and may cost over {MOST_COST:.1%} of the loss',
                       **facts)
    enough = (max(tolerance - abs(drift), abs(drift) / 2) / np.linalg.norm(moves)) ** 2 - GRID_ERROR ** 2
    needed = max(num_seeds + 1, math.ceil(variance / enough)) if enough > 0 else math.inf
    seeds = f'about {needed} seeds, --seed, or ' if needed <= MOST_SEEDS else ''
    return Verdict('UNKNOWN', 'the noise is larger than the effect', f'Run {seeds}larger shapes, --largest_frac',
                   **facts)


def curvature_of(curve):
    """Nats per octave squared of the parabola through the best rate of a curve and its neighbours."""
    means = mean_losses(curve)
    i = list(means).index(min(means, key=means.get))
    rates, losses = np.log2(list(means)[i - 1:i + 2]), list(means.values())[i - 1:i + 2]
    return float(np.polyfit(rates - rates[1], losses, 2)[0])


def judge_curves(sizes, curves, target_size):
    """The Verdict on a curve for each size. The steepest one says what an octave costs."""
    found = list(map(optimum, curves))
    for size, each in zip(sizes, found):
        if not each.at_by_seed or each.at_by_seed.keys() != found[0].at_by_seed.keys():
            problem, todo = MARKS['<' if each.best is None else each.mark]
            return Verdict('UNKNOWN', f'of the shape at {size:.2f} octaves, {problem}', todo)
    optima = [[each.at_by_seed[seed] for each in found] for seed in found[0].at_by_seed]
    return judge(sizes, optima, target_size, max(map(curvature_of, curves)), found[-1].loss)
