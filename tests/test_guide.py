"""Tests of docs/guide.md and docs/asks.md: every figure is that of a committed result, every row is there."""
import json
import math
import re

import numpy as np
import pytest
from test_coord_check import FAULTS, SEEN
from test_docs import ROOT, best_loss, curves, percent, report_on, text_of

from nanop.files import read_csv
from sweep import TUNED
from tools.sweep_report import compare, curve_of, mean_losses, optimum
from train import TrainConfig

PAGE = 'docs/guide.md'


def drift(found, digits=2):
    error = f' ± {found.drift_error:.{digits}f}' if math.isfinite(found.drift_error) else ''
    return f'{found.drift:+.{digits}f}{error}'


def regret(found):
    error = f' ± {100 * found.regret_error:.1f}' if math.isfinite(found.regret_error) else ''
    return f'{100 * found.regret_frac:.1f}{error}%'


def costs(curve):
    """{log2 of the rate minus that of the best: how much higher its loss is}"""
    means, best = mean_losses(curve), optimum(curve)
    return {round(math.log2(value / best.best)): percent(loss / best.loss - 1) for value, loss in means.items()}


def slopes(rules, check, quantity, group, step):
    """The row of coord_check.csv for the model `rules`, of its last layer."""
    rows = [row for row in read_csv(ROOT / f'results/coord_check/{rules}/coord_check.csv') if (
        row['model'], row['check'], row['quantity'], row['group'], row['step']) == (
        rules, check, quantity, group, str(step))]
    return rows[-1]


def times(row):
    values = [float(value) for value in row['values'].split()]
    return values[-1] / values[0]


def rules_and_pictures():
    width, depth = (compare(curves(f'sweep_{axis}', 'completep')) for axis in ('width', 'depth'))
    density = compare(curves('sweep_density', 'supar'))
    yield (f'over width drift {drift(width)} octaves and regret {regret(width)}, over depth {drift(depth)} and '
           f'{regret(depth)} (three seeds, same folders), over density {drift(density)} octaves and {regret(density)}')
    sp, half = compare(curves('sweep_width', 'sp')), compare(curves('sweep_depth', 'depth_mup'))
    yield f"the first step moves the logits {times(slopes('sp', 'width', 'change', 'logits', 1)):.0f} times as far"
    yield f'drift {drift(sp)} octaves, regret {regret(sp)}, three seeds'
    row = slopes('mup', 'depth', 'change', 'residual', 1)
    assert row['name'] == 'last'
    yield f"moves the last block's output {times(row):.0f} times as far"
    first, *_, last = curves('sweep_depth', 'sp')
    yield f'rises by {best_loss(last) - best_loss(first):.2f} nats; the best rate stays'
    assert optimum(first).best == optimum(last).best
    yield f"linearization falls as depth^{float(slopes('depth_mup', 'laziness', 'distance', 'block', 1)['slope']):.2f}"
    yield f'drift {drift(half)} octaves, regret {regret(half)}, three seeds'
    sparse = curves('sweep_density', 'sp')
    found = compare(sparse)
    assert optimum(sparse[-1]).mark == '>'  # "above"
    yield f'drift above {found.drift:+.1f} octaves, regret {regret(found)}, one seed'
    yield f"better than under `supar`: {best_loss(sparse[-1]):.3f} against "
    yield f"{best_loss(curves('sweep_density', 'supar')[-1]):.3f} nats at 1/8"
    yield f"does not ({drift(compare([first, last]))} octaves, [sweep_depth]"
    example = text_of('results/examples/measure.txt')
    moved = re.search(r'^sp over depth: the best rate moves by (\S+) octaves', example, re.M)
    yield f'with one seed, it does: {moved.group(1)} octaves from 2 to 16 layers'
    eps = next(row for row in read_csv(ROOT / 'results/coord_check/faults.csv') if row['fault'] == 'eps not scaled')
    yield f"falls as width^{eps['faulty']} ([faults.csv]"
    assert TrainConfig().eps == 1e-8 and min(float(value) for value in eps['values_faulty'].split()) > 20_000
    yield 'gradients there are at least 20,000 times as large'


def proxies():
    """Each narrower or shallower model as the proxy of the last one."""
    params = {row['n_embd']: f"{row['params']:,}" for row in report_on('sweep_width').rows}
    of_width = {rules: curves('sweep_width', rules) for rules in ('sp', 'mup')}
    for i, width in enumerate((32, 64, 128)):
        sp, mup = (regret(compare([of[i], of[-1]])) for of in of_width.values())
        found = list(optimum(of_width['mup'][i]).at_by_seed.values())
        error = np.std(found, ddof=1) / len(found) ** 0.5
        yield f'| {width} | {params[width]} | {sp} | {mup} | ± {error:.2f} |'
    assert 16 not in params
    seeds = re.search(r'^\| n_embd 16 \|.*\| (-[^|]*) \|', text_of('results/contract_width/contract.md'), re.M).group(1)
    seeds = [float(seed) for seed in seeds.split(',')]
    yield f'the optima of three seeds up to {max(seeds) - min(seeds):.2f} octaves apart'
    yield '| 16 | | not measured |'
    of_depth = {rules: curves('sweep_depth', rules) for rules in ('sp', 'depth_mup', 'completep')}
    for i, layers in enumerate((2, 4, 8, 16)):
        yield f"| {layers} | {' | '.join(regret(compare([of[i], of[-1]])) for of in of_depth.values())} |"
    best = [math.log2(optimum(curve).best) for curve in of_depth['completep']]
    assert best == [-6, -5, -5, -5, -6]  # "prefer the rate above that of 2 and 32 layers"
    narrow, wide = of_width['mup'][1], costs(of_width['mup'][-1])
    chosen = [min(narrow, key=lambda rate: narrow[rate][seed]) for seed in (1, 2, 3)]
    assert sorted(math.log2(rate) for rate in chosen) == [-6, -6, -5]  # "of three searches one"
    yield f'one picks the next rate and pays {wide[1]}'
    yield f'half the best rate costs {wide[-1]} and twice the best rate {wide[1]}'
    yield f'a quarter costs {wide[-2]} and four times the rate {wide[2]}'
    sp, completep = (regret(compare(curves('sweep_depth_500', rules))) for rules in ('sp', 'completep'))
    yield f'seed 1 alone shows a regret of {sp} for `sp` and {completep} for `completep`'
    assert all(compare(curves('sweep_depth_500_ends', rules)).regret_frac == 0 for rules in ('sp', 'completep'))
    found = compare(list(report_on('sweep_setting').curves('learning_rate')['completep'].values()))
    yield f'carrying the best rate of 32 (the last one run) to 64 costs {regret(found)}'
    mup, completep = ([best_loss(curve) for curve in curves('sweep_n_over_l', rules)] for rules in ('mup', 'completep'))
    ahead = [one - other for one, other in zip(mup, completep)][1:]
    yield f'depth cost `completep` {min(ahead):.2f} to {max(ahead):.2f} nats less than `mup`'
    assert min(mup) == mup[0] and min(completep) == completep[0]
    best = {label: [best_loss(curve) for curve in of.values()]
            for label, of in report_on('ablations').curves('learning_rate').items()}
    pairs = [losses for label, losses in best.items() if not re.search('sp|lion|batch|alibi', label)]
    ranks = [np.argsort(np.argsort(losses)) for losses in zip(*pairs)]
    yield f'Over {len(pairs)} variants, the ranks of the best losses at widths 32 and 128 correlate by '
    yield f'correlate by {np.corrcoef(*ranks)[0, 1]:.2f}, one seed'
    most = max(row['params'] for name in ('sweep_width', 'sweep_depth') for row in report_on(name).rows)
    yield f'8 in width, 16 in depth, 4 in duration, {most / 1e6:.1f} million parameters'


def octaves(values):
    return f'{math.log2(max(values) / min(values)):.1f}'


def what_to_tune():
    base = costs(curves('sweep_width', 'mup')[0])
    yield f'half the best costs {base[-1]}, twice {base[1]}, three seeds'
    inits = curves('sweep_init_std', 'completep', 'init_std')
    at = mean_losses(inits[0])
    assert optimum(inits[0]).best == 0.05 and optimum(inits[-1]).best == 0.2
    yield f'{at[0.05]:.3f} nats at 0.05, {at[0.0125]:.3f} at 0.0125, {at[0.4]:.3f} at 0.4'
    yield f'it moves from 0.05 to 0.2, regret {regret(compare(inits))}'
    mults = curves('sweep_output_mult', 'mup', 'output_mult')
    at = mean_losses(mults[0])
    yield f'{at[1.0]:.3f} at 1, {at[4.0]:.3f} at 4, one seed'
    yield f'{optimum(mults[0]).best:g} to {optimum(mults[-1]).best:g}, regret {regret(compare(mults))}'
    decays, = curves('sweep_weight_decay', 'completep', 'weight_decay')
    rows = report_on('sweep_weight_decay').rows
    at = {decay: curve_of([row for row in rows if row['weight_decay'] == decay], 'learning_rate', [])
          for decay in (0.0, 0.3, 1.0)}
    yield ', '.join(f"{best_loss(curve):.3f} at {decay:g}" for decay, curve in at.items()) + ', two seeds'
    assert optimum(decays).best == 0.3
    yield f'raises the best rate from 2^{optimum(at[0.0]).at:.2f} to 2^{optimum(at[0.3]).at:.2f} (two seeds'
    rows = sorted(report_on('tune_proxy').rows, key=lambda row: row['val_loss'])
    assert len(rows) == 64
    yield f"| searched | {' | '.join(octaves(ends) for ends in TUNED.values())} |"
    yield f"| spanned by the eight best | {' | '.join(octaves([row[key] for row in rows[:8]]) for key in TUNED)} |"
    assert report_on('tune_proxy').varied == [*TUNED]
    assert (TUNED['learning_rate'], TUNED['init_std'], TUNED['output_mult'][1]) == ([2**-11, 2**-4], [0.01, 0.3], 4)
    target = json.loads(text_of('results/tune_proxy/target_summary.json'))['val_loss']
    direct = [row['val_loss'] for row in report_on('tune_direct').rows]
    searches = [min(direct[i:i + 4]) for i in range(0, 16, 4)]
    yield f'trains 16 x 64 to {target:.3f} nats'
    yield f'target itself: {sum(searches) / 4:.3f} on average'
    yield f'four times the compute, reach {min(direct):.3f} '
    yield f'({min(direct):.3f} and {target:.3f} nats, section 3)'
    best = sorted(report_on('evidence_tune').rows, key=lambda row: row['val_loss'])[:8]
    yield f"eight trials within {octaves([row['learning_rate'] for row in best])} octaves of rate"
    assert min(row['weight_decay'] for row in best) > 0.3
    yield f"losses within {best[-1]['val_loss'] - best[0]['val_loss']:.3f} nats of each other"


def what_transfers():
    two = {name: compare(curves(name, 'mup')) for name in (
        'sweep_batch', 'sweep_batch_128', 'sweep_block_size', 'sweep_block_size_128')}
    for row, name in (('batch 1,024 to 8,192 tokens, steps fixed', 'sweep_batch'),
                      ('sequences of 16 to 256 tokens, tokens per step fixed', 'sweep_block_size')):
        narrow, wide = two[name], two[f'{name}_128']
        yield f'| {row} | {drift(narrow)} at width 32, {drift(wide)} at 128 | {regret(narrow)}, {regret(wide)} | 1 |'
    label = 'completep, base_batch_tokens 0, base_train_tokens 0'
    base, batch, _ = curves('sweep_batch_and_duration', label)
    found, (_, with_rules, _) = compare([base, batch]), curves('sweep_batch_and_duration', 'completep')
    yield f'so a quarter of the steps | {drift(found)} | {regret(found)} | 1 |'
    rate = optimum(base).best
    yield f'the loss rises from {best_loss(base):.3f} to {best_loss(batch):.3f} nats'
    yield f'win {mean_losses(batch)[rate] - mean_losses(with_rules)[rate]:.2f} of it back at that rate'
    pieces = {name: curves('sweep_duration_pieces', f'completep{more}') for name, more in (
        ('nothing', ''), ('all', ', base_train_tokens 1024000'), ('lr', ', base_train_tokens 1024000, rescale lr'))}
    nothing = compare(pieces['nothing'])
    yield f'nothing rescaled | {drift(nothing)} | {regret(nothing)} | 3 |'
    kept = {name: mean_losses(of[-1])[optimum(of[0]).best] for name, of in pieces.items()}
    assert optimum(pieces['all'][-1]).mark == '>'
    yield (f"more than {compare(pieces['all']).drift:+.1f} | {kept['all']:.3f} nats against {kept['nothing']:.3f} "
           'without them | 3 |')
    yield f"the rule for the rate alone costs {regret(compare(pieces['lr']))}"
    decay = compare(curves('ablations_seeds', 'mup, weight_decay 0.3'))
    yield f'weight decay 0.3, `mup` | {drift(decay)} | {regret(decay)} | 2 |'
    sp, completep = (compare(curves('sweep_depth_decay', rules)) for rules in ('sp', 'completep'))
    yield f'weight decay 0.3, `completep` | {drift(completep)} | {regret(completep)}; under `sp` {regret(sp)} | 1 |'
    fixed = [curve_of([row for row in report_on('sweep_schedule').rows if (row['schedule'], row['n_embd']) == (
        'constant', width) and row['parameterization'] == 'mup'], 'learning_rate', []) for width in (32, 128)]
    yield f'a constant rate, `mup` | {drift(compare(fixed))} | {regret(compare(fixed))} | 1 |'
    for curve in curves('sweep_schedule', 'mup', 'schedule'):
        assert sorted(curve, key=mean_losses(curve).get) == ['constant', 'linear', 'cosine']
    for rules in ('completep', 'sp'):
        texts = [regret(compare(curves(name, rules))) for name in (
            'sweep_depth_125', 'sweep_depth', 'sweep_depth_500_ends')]
        yield f"{texts[0]}, {texts[1]} and {texts[2]} under `{rules}`"
    assert (TrainConfig().warmup_frac, TrainConfig().grad_clip) == (0.1, 1.0)
    assert not any(re.search('^(warmup_frac|grad_clip) =', path.read_text(), re.M)
                   for path in ROOT.glob('config/*.py') if path.name.startswith(('sweep_', 'evidence_')))
    tied = compare(curves('ablations_seeds', 'mup, tie_weights True'))
    yield f'regret {regret(tied)}, two seeds'


def the_check():
    out = text_of('results/coord_check/guide.txt').splitlines()
    block = re.search(r'```\n(depth: .*?)```', text_of(PAGE), re.S).group(1).splitlines()
    assert len(block) == 10 and [line for line in out if line in block] == block
    of = {(line.split()[0], line.split()[1]): re.findall(r'[+-]\d\.\d\d(?: ± \d\.\d\d)?', line) for line in block[2:-1]}
    gradient, ratio, change, mlp = (of[key] for key in (
        ('gradient', 'hidden_weight'), ('grad/eps', 'hidden_weight'), ('change', 'residual'), ('change', 'mlp')))
    yield f'-1 expected, {gradient[2]} measured'
    yield f"stays at {gradient[4].split()[0]}. So here"
    yield f"must be flat, for both: {ratio[2].split()[0]} and {ratio[4].split()[0]}"
    yield f'after one step: {change[2]} against {change[4]}'
    yield f"`mup`'s {mlp[4]} is *curvature*"


def planted_faults():
    rows = read_csv(ROOT / 'results/coord_check/faults.csv')
    assert [row['fault'] for row in rows] == [*FAULTS]
    for row in rows:
        assert (row['quantity'], row['group']) == SEEN[row['fault'], row['axis']] and row['verdict'] == 'FAIL'
        right, faulty = (f"{float(row[key]) + 0:+.2f}".replace('-0.00', '+0.00') for key in ('right', 'faulty'))
        for name, slope in (('right', right), ('faulty', faulty)):  # the slopes are those of the values
            x, y = (np.log2(np.array(row[key].split(), dtype=float)) for key in ('sizes', f'values_{name}'))
            assert abs(np.polyfit(x, y, 1)[0] - float(slope)) < 0.01
        yield f"| **{row['fault']}**: `{row['quantity']}` of "
        yield f"over {row['axis']} | {right}, {faulty} |"


def statements():
    for parts in (rules_and_pictures, proxies, what_to_tune, what_transfers, the_check, planted_faults):
        for part in parts():
            yield pytest.param(part, id=f'{parts.__name__}: {part[:60]}')


@pytest.mark.parametrize('part', list(statements()))
def test_figures_of_the_guide_are_those_of_the_results(part):
    assert part in ' '.join(text_of(PAGE).split())


def test_every_figure_of_the_guide_has_its_results():
    """A paragraph with its table, or a list, links the results of its figures or names the section that does."""
    blocks = re.sub(r'\n\n(?=\|)', '\n', re.search('## 1.*(?=## 5)', text_of(PAGE), re.S).group()).split('\n\n')
    stating = [block for block in blocks if re.search(r'\d\.\d+( ± \d\.\d+)?(%| nats| octaves)', block)]
    assert len(stating) > 8
    for block in stating:
        assert re.search(r'\(\.\./results/|section \d|same folders', block), block


def test_fifteen_traps_and_every_ask():
    traps = re.search(r'^## 7.*?(?=^## 8)', text_of(PAGE), re.S | re.M).group()
    assert re.findall(r'^\| (\d+) \|', traps, re.M) == [str(i) for i in range(1, 16)]
    code = '\n'.join(path.read_text() for path in [ROOT / 'test_model.py', *ROOT.glob('tests/test_*.py')])
    assert all(f'def {name}(' in code for name in re.findall(r'`(test_\w+)`', traps))
    rows = re.findall(r'^\| (\d+) \|.*\| ([^|]+) \|$', text_of('docs/asks.md'), re.M)
    assert [number for number, _ in rows] == [str(i) for i in range(1, 40)]
    assert all(re.search(r'\]\([^)]+\)', where) for _, where in rows)  # test_docs.py follows the links
