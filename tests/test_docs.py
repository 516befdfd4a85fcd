"""Tests of README.md and docs/: every link leads somewhere, every command is one, every figure is that of a result."""
import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import stress_faults
import stress_hosts

import bench
import coord_check
import sample
import sweep
from configurator import configure
from tools.sweep_report import compare, curve_of, mean_loss, optimum, read_trials
from train import TrainConfig, read_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def text_of(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for text, target in re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)', page.read_text()):
        if target.startswith('https://'):
            continue
        file, _, anchor = target.partition('#')
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), (text, target)
        if anchor and there.suffix == '.md':
            titles = re.findall(r'^#+ (.*)$|^\*\*(.*?)\*\*', there.read_text(), flags=re.M)
            anchors = {re.sub(r'[^\w -]', '', title).strip().lower().replace(' ', '-') for pair in titles
                       for title in pair if title}
            assert anchor in anchors, (target, anchors)


def commands():
    """(page, words) of every command in a plain code block, and in the first words of an inline one."""
    for page in PAGES:
        text = re.sub(r'^ *```python\n.*?^ *```', '', page.read_text(), flags=re.S | re.M)
        blocks = re.findall(r'^```\n(.*?)^```', text, flags=re.S | re.M)
        lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
        lines += re.findall(r'`((?:python|make|pip|sbatch) [^`]+)`', text.replace('\n', ' '))
        for line in lines:
            if re.match(r'(python|torchrun|make|pip|sbatch|git) ', line.strip()):
                yield pytest.param(shlex.split(line, comments=True), id=f'{page.name}: {line.strip()[:70]}')


def check_flags(script, arguments):
    """Let the script read its command line; files that a command before it would have made are left out."""
    if arguments == ['--help']:
        return
    arguments = [word for word in arguments if not word.startswith('out/') and '..' not in word.partition('=')[2]]
    if script == 'train.py':
        if not any('resume' in word for word in arguments):
            read_config(arguments)
        configure(TrainConfig, arguments)
    elif script == 'sweep.py':
        sweep.read_sweep(arguments)
    elif script == 'bench.py':
        bench.read_bench(arguments)
    else:
        config = {'coord_check.py': coord_check.CoordCheckConfig, 'sample.py': sample.SampleConfig,
                  'tests/stress_faults.py': stress_faults.StressConfig,
                  'tests/stress_hosts.py': stress_hosts.HostsConfig}[script]
        config(**configure(config, arguments))


@pytest.mark.parametrize('words', list(commands()))
def test_commands_are_commands(words):
    program, *words = words
    if program == 'make':
        assert f'\n{words[0]}: ' in text_of('Makefile')
    elif program == 'sbatch':
        assert (ROOT / words[0]).exists()
    elif program == 'pip':
        assert words[0] == 'install'
        assert words[1:] in (['.'], ['-r', 'requirements.txt']) or all(word.isidentifier() or '-' in word
                                                                      for word in words[1:])
    elif program == 'git':
        assert words == ['apply', '../nanoP/docs/nanogpt_completep.patch']
    elif words[:2] == ['-m', 'pytest']:
        assert all((ROOT / word).exists() for word in words if word.endswith('.py'))
    else:
        script = next(word for word in words if word.endswith('.py'))
        arguments = words[words.index(script) + 1:]
        assert (ROOT / script).exists(), script
        if script.startswith('data/') or 'train_shakespeare_char.py' in ' '.join(arguments) and '--base_n_layer=2' in \
                arguments:  # these parse their own flags; that one is for the patched nanoGPT
            return
        check_flags(script, arguments)


# -----------------------------------------------------------------------------
# Figures: each is computed from committed results, and the sentence that states it must be in the page

TYPES = dict(n_layer=int, n_embd=int, density=float, parameterization=str, learning_rate=float, seed=int)


def curves(sweep_name, rules, shape_key, least=0.0, most=1.0):
    """The curves over the learning rate of one parameterization, from the first shape of the sweep to its last.

    Rates from least to most, at points that all seeds have run: some folders also hold runs outside the final grid.
    """
    rows = [row for row in read_trials(ROOT / 'results' / sweep_name / 'trials.csv', TYPES)
            if row['parameterization'] == rules and least <= row['learning_rate'] <= most]
    seeds = {}
    for row in rows:
        seeds.setdefault((row[shape_key], row['learning_rate']), set()).add(row['seed'])
    all_seeds = max(seeds.values(), key=len)
    found = {}
    for row in rows:
        if seeds[row[shape_key], row['learning_rate']] == all_seeds:
            found.setdefault(row[shape_key], []).append(row)
    return [curve_of(of_shape, 'learning_rate', []) for of_shape in found.values()]


def best_loss(curve):
    return mean_loss(optimum(curve).losses)


def statements():
    """(page, a sentence's part with its figures computed)"""
    width = {rules: compare(curves('sweep_width', rules, 'n_embd')) for rules in ('sp', 'completep')}
    deep = {rules: compare(curves('sweep_depth', rules, 'n_layer')) for rules in ('sp', 'depth_mup', 'completep')}
    ends = {rules: curves('sweep_depth_500_ends', rules, 'n_layer', 2**-7, 2**-4) for rules in deep}
    decay = {rules: compare(curves('sweep_depth_decay', rules, 'n_layer', 2**-7, 2**-4)) for rules in deep}
    sparse = {rules: curves('sweep_density', rules, 'density') for rules in ('sp', 'mup', 'supar')}
    sp, completep, half = width['sp'], width['completep'], deep['depth_mup']
    falls = f'falls by {-sp.drift:.2f} ± {sp.drift_error:.2f} octaves'
    for page in ('README.md', 'docs/results.md'):
        yield page, falls
        yield page, f'rate costs {100 * half.regret_frac:.1f}%' if page != 'README.md' else \
            f'keeping it gives a {100 * half.regret_frac:.1f}% higher loss'
        yield page, f'drifts by {half.drift:.1f} ± {half.drift_error:.1f} octaves'
    yield 'README.md', f'best rate gives a {100 * sp.regret_frac:.0f}% higher loss'
    yield 'README.md', f'({completep.drift:+.2f} ± {completep.drift_error:.2f}) and keeping it costs nothing'
    yield 'docs/results.md', f'narrowest costs {100 * sp.regret_frac:.0f}% of the loss'
    yield 'docs/results.md', f'stays ({completep.drift:+.2f} ± {completep.drift_error:.2f} octaves)'
    c = deep['completep']
    yield 'docs/results.md', f'(drift {c.drift:+.2f} ± {c.drift_error:.2f} octaves, regret {100 * c.regret_frac:.0f}%)'
    lost = curves('sweep_depth', 'sp', 'n_layer')
    yield 'docs/results.md', f'lose {best_loss(lost[-1]) - best_loss(lost[0]):.2f} nats from 2 layers to 32'
    yield 'docs/results.md', f"({deep['sp'].drift:.2f} ± {deep['sp'].drift_error:.2f} octaves)"
    gain = {rules: best_loss(of[0]) - best_loss(of[-1]) for rules, of in ends.items()}
    c = compare(ends['completep'])
    yield 'docs/results.md', (f'32 layers are {gain["completep"]:.2f} nats better than 2 under `completep` (drift '
                              f'{c.drift:.1f} ± {c.drift_error:.1f}, regret {100 * c.regret_frac:.0f}%) and '
                              f'{-gain["sp"]:.2f} worse under `sp`')
    c = compare(ends['depth_mup'])
    yield 'docs/results.md', f'`depth_mup` costs {100 * c.regret_frac:.1f} ± {100 * c.regret_error:.1f}%'
    sp, half, completep = (f'{100 * decay[rules].regret_frac:.1f}%' for rules in decay)
    yield 'docs/results.md', f'costs {sp} under `sp`, {half} under `depth_mup` and {completep} under `completep`'
    c = compare(sparse['supar'])
    yield 'docs/results.md', f'stays ({c.drift:.2f} octaves, regret {100 * c.regret_frac:.0f}%)'
    yield 'README.md', f'the best rate stays ({c.drift:.2f} octaves)'
    costs = [f"{100 * compare(sparse[rules]).regret_frac:.1f}%" for rules in ('sp', 'mup')]
    yield 'docs/results.md', f"costs {' and '.join(costs)}"
    assert compare(sparse['sp']).drift > 3 and compare(sparse['mup']).drift > 2  # "more than 3 and 2 octaves"
    sp, mup, supar = (f'{best_loss(of[-1]):.2f}' for of in sparse.values())
    yield 'docs/results.md', f'({sp} and {mup} against {supar} at 1/8)'
    demo = json.loads(text_of('results/completep_small/summary.json'))
    yield 'README.md', f"{demo['val_loss']:.2f} nats ({demo['bits_per_byte']:.2f} bits per byte)"
    yield 'README.md', f"{demo['params']:,} parameters, {demo['steps']:,} steps"
    target = json.loads(text_of('results/tune_proxy/target_summary.json'))['val_loss']
    direct = [row['val_loss'] for row in read_trials(ROOT / 'results/tune_direct/trials.csv', TYPES)]
    searches = [min(direct[i:i + 4]) for i in range(0, 16, 4)]
    yield 'README.md', f'give {target:.3f} nats at 16 x 64'
    yield 'README.md', f'the best of 4 gives {sum(searches) / 4:.3f} on average'
    yield 'docs/sweeps.md', f'| the small model | 64 | **{target:.3f}** |'
    yield 'docs/sweeps.md', f'| 4 | {sum(searches) / 4:.3f} on average over four such searches |'
    yield 'docs/sweeps.md', f'| 16 | {min(direct):.3f} |'


@pytest.mark.parametrize('page, part', list(statements()))
def test_figures_are_those_of_the_results(page, part):
    assert part in ' '.join(text_of(page).split())


@pytest.mark.parametrize('shape', ['4x128', '6x384', '12x768'])
def test_speeds_are_those_of_the_benchmarks(shape):
    """A cell of docs/speed.md is the range of the medians of all compiled runs against that peer."""
    with open(ROOT / 'results/bench/steps.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['shape'] == shape and row['compile'] == 'True']
    line = next(line for line in text_of('docs/speed.md').splitlines()
                if line.startswith(f"| {shape.replace('x', ' x ')} |"))
    cells = [cell.strip() for cell in line.strip('|').split('|')][1:]
    for i, peer in enumerate(('nanoGPT', 'nanoGPT-mup')):
        runs = {}
        for row in rows:
            if row['peer'] == peer and row['contestant'].startswith('peer'):
                runs.setdefault(row['commit'], {})[row['contestant']] = float(row['nanop_is_faster_by'])
        shipped = [run['peer, float32, compiled'] for run in runs.values()]
        best = [min(speed for name, speed in run.items() if 'bfloat16' in name) for run in runs.values()]
        for cell, speeds in ((cells[2 * i], shipped), (cells[2 * i + 1], best)):
            ends = list(dict.fromkeys(f'{speed:.1f}x' for speed in (min(speeds), max(speeds))))
            assert cell == ' to '.join(ends), (peer, cell, speeds)
