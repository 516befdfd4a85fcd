"""Tests of README.md and docs/: every link leads somewhere, every command is one, every figure is that of a result."""
import csv
import json
import math
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import coord_faults
import coord_reliability
import llama_cpp_parity
import pytest
import stress_faults
import stress_hosts

import bench
import coord_check
import export_hf
import gpu_check
import sample
import sweep
from configurator import configure
from nanop.files import read_csv
from nanop.huggingface import TABLE
from tools.sweep_files import read_trials
from tools.sweep_points import TYPES, Sweep
from tools.sweep_report import compare, mean_losses, optimum
from train import TrainConfig, read_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md')), ROOT / 'examples' / 'README.md']


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
    arguments = [word for word in arguments
                 if not word.startswith(('out/', '--init_from=out/')) and '..' not in word.partition('=')[2]]
    if script == 'train.py':
        if not any('resume' in word or 'decay_steps' in word for word in arguments):
            read_config(arguments)
        configure(TrainConfig, arguments)
    elif script == 'sweep.py':
        sweep.read_sweep(arguments)
    elif script == 'bench.py':
        bench.read_bench(arguments)
    else:
        config = {'coord_check.py': coord_check.CoordCheckConfig, 'sample.py': sample.SampleConfig,
                  'export_hf.py': export_hf.ExportConfig, 'gpu_check.py': gpu_check.GpuCheckConfig,
                  'tests/stress_faults.py': stress_faults.StressConfig,
                  'tests/stress_hosts.py': stress_hosts.HostsConfig,
                  'tests/coord_faults.py': coord_faults.FaultsConfig,
                  'tests/coord_reliability.py': coord_reliability.ReliabilityConfig,
                  'tests/llama_cpp_parity.py': llama_cpp_parity.ParityConfig}[script]
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
        if script == 'examples/measure.py':
            assert not arguments
            return
        if script.startswith('data/') or 'train_shakespeare_char.py' in ' '.join(arguments) and '--base_n_layer=2' in \
                arguments:  # these parse their own flags; that one is for the patched nanoGPT
            return
        check_flags(script, arguments)


# -----------------------------------------------------------------------------
# Figures: each is computed from committed results, and the sentence that states it must be in the page

COMMANDS = {  # of results whose sweep.py had more than a config, or a config of another name
    **{f'ablations{more}': f'config/sweep_ablations{more}.py' for more in ('', '_alibi', '_lion', '_seeds')},
    'contract_width': 'config/sweep_base.py --parameterization=sp --n_embd=16,24,32 --base_n_embd=16 --head_dim=8 '
                      '--base_head_dim=8 --batch_tokens=1024 --batch_size=16 --max_iters=120 --eval_tokens=16384',
    'sweep_batch_128': 'config/sweep_batch.py --n_embd=128',
    'sweep_block_size_128': 'config/sweep_block_size.py --n_embd=128',
    'sweep_depth_125': 'config/sweep_depth.py --max_iters=125 --n_layer=2,32 --seed=1,2 '
                       '--parameterization=sp,completep',
    'sweep_depth_500': 'config/sweep_depth.py --max_iters=500 --seed=1',
    'sweep_depth_500_ends': 'config/sweep_depth.py --max_iters=500 --n_layer=2,32 --seed=1,2 '
                            '--learning_rate=0.0078125,0.015625,0.03125,0.0625',
    'sweep_depth_decay': 'config/sweep_depth.py --weight_decay=0.3 --seed=1 '
                         '--learning_rate=0.0078125,0.015625,0.03125,0.0625',
    'sweep_n_over_l_steps': 'config/sweep_n_over_l_steps.py --seed=1',
    'tune_proxy': '--tune config/sweep_base.py --trials=64',
    'tune_direct': '--tune config/sweep_base.py --trials=16 --n_layer=16 --n_embd=64',
}
SWEEPS = sorted(path.parent.name for path in ROOT.glob('results/*/trials.csv'))


@cache
def report_on(name):
    """The SweepReport that the present code makes from a committed trials.csv."""
    words = COMMANDS.get(name, f'config/{name}.py').split()
    its_sweep = Sweep(*sweep.read_sweep([str(ROOT / word) if word.startswith('config/') else word for word in words]))
    rows = read_trials(ROOT / 'results' / name / 'trials.csv', TYPES, its_sweep.facts['differ'])
    return sweep.make_report(its_sweep, name, *its_sweep.divide(rows))


@pytest.mark.parametrize('name', SWEEPS)
def test_reports_are_those_of_their_trials(name):
    """Every row of trials.csv that is of the report's models is in it. If not: python sweep.py .. --out_dir=COPY."""
    assert report_on(name).markdown() == text_of(f'results/{name}/report.md')


def curves(name, rules, axis='learning_rate'):
    """The curves of one parameterization, from the first shape of the sweep to its last."""
    return next(list(of_shapes.values()) for label, of_shapes in report_on(name).curves(axis).items()
                if rules in label.split(' = '))


def best_loss(curve):
    return optimum(curve).loss


def percent(fraction, digits=1):
    return f'{100 * fraction:.{digits}f}%'


def steps_saved(shape):
    """The fraction of 250 steps that completep can leave out and be as good as mup after all of them, seed 1."""
    mup, completep = ({steps: losses[1] for steps, losses in curve.items()} for curve in (
        curves('sweep_n_over_l', 'mup')[shape], curves('sweep_n_over_l', 'completep')[shape]))
    (bound,), (last,) = mup.values(), completep.values()
    losses = {steps: by_seed[1] for steps, by_seed in
              curves('sweep_n_over_l_steps', 'completep', 'max_iters')[shape - 1].items()} | {250: last}
    (before, high), (after, low) = next(pair for pair in pairwise(losses.items()) if pair[1][1] <= bound)
    return 1 - (before + (after - before) * (high - bound) / (high - low)) / 250


def wide_and_deep():
    """Sentences on width and depth: (page, its part)."""
    width = {rules: compare(curves('sweep_width', rules)) for rules in ('sp', 'completep')}
    deep = {rules: compare(curves('sweep_depth', rules)) for rules in ('sp', 'depth_mup', 'completep')}
    sp, completep, half = width['sp'], width['completep'], deep['depth_mup']
    for page in ('README.md', 'docs/results.md'):
        yield page, f'falls by {-sp.drift:.2f} ± {sp.drift_error:.2f} octaves'
        yield page, f'drifts by {half.drift:.1f} ± {half.drift_error:.1f} octaves'
    yield 'README.md', f'keeping it gives a {percent(half.regret_frac)} higher loss'
    yield 'README.md', f'best rate gives a {percent(sp.regret_frac, 0)} higher loss'
    yield 'README.md', f'({completep.drift:+.2f} ± {completep.drift_error:.2f}) and keeping it costs nothing'
    yield 'docs/results.md', f'rate costs {percent(half.regret_frac)}'
    yield 'docs/results.md', f'narrowest costs {percent(sp.regret_frac, 0)} of the loss'
    yield 'docs/results.md', f'stays ({completep.drift:+.2f} ± {completep.drift_error:.2f} octaves), and keeping'
    c = deep['completep']
    assert completep.regret_frac == c.regret_frac == 0  # "costs nothing"; the best at 2 layers is the best run at 32
    yield 'docs/results.md', f'(drift {c.drift:+.2f} ± {c.drift_error:.2f} octaves, regret {percent(c.regret_frac, 0)})'
    first, *_, last = curves('sweep_depth', 'sp')
    before, after = mean_losses(first), mean_losses(last)
    lost = [after[rate] - before[rate] for rate in before]
    yield 'docs/results.md', (f'lose {best_loss(last) - best_loss(first):.2f} nats from 2 layers to 32 at their best '
                              f'rates (rate by rate {min(lost):.2f} to {max(lost):+.2f})')
    yield 'docs/results.md', f"({deep['sp'].drift:.2f} ± {deep['sp'].drift_error:.2f} octaves)"


def depth_in_the_papers_architecture():
    """Sentences on results/evidence_depth."""
    curve = {rules: curves('evidence_depth', rules) for rules in ('sp', 'completep')}
    found = {rules: compare(of) for rules, of in curve.items()}
    sp, ours = (f'{found[rules].drift:+.2f} ± {found[rules].drift_error:.2f}' for rules in curve)
    gains = {rules: best_loss(of[0]) - best_loss(of[-1]) for rules, of in curve.items()}
    for page in ('README.md', 'docs/results.md'):
        yield page, f'best rate falls by {sp[1:]} octaves'
        yield page, f'stays ({ours})' if page == 'README.md' else f'stays under `completep` ({ours})'
        yield page, f"32 layers gain {gains['completep']:.3f} nats on 2"
        yield page, f"under `sp` {gains['sp']:.3f}" if page == 'README.md' else f"and {gains['sp']:.3f} under `sp`"
    yield 'docs/guide.md', f"it does: {sp} octaves, three seeds, while `completep`'s stays, {ours}"
    page, c = 'docs/results.md', found['completep']
    yield page, f'costs `completep` {100 * c.regret_frac:.1f} ± {100 * c.regret_error:.1f}%'
    two = mean_losses(curve['sp'][0])
    yield page, f'2^-6 and 2^-5 are {two[2**-5] - two[2**-6]:.3f} nats apart'
    lost = {}
    for rules, of in curve.items():
        means = mean_losses(of[-1])
        lost[rules] = means[2**-4] - min(means.values())
    yield page, f"too high for both, 32 layers lose {lost['sp']:.2f} nats under `sp` and {lost['completep']:.2f}"


def more_depth_and_density():
    deep = ('sp', 'depth_mup', 'completep')
    ends = {rules: curves('sweep_depth_500_ends', rules) for rules in deep}
    gain = {rules: best_loss(of[0]) - best_loss(of[-1]) for rules, of in ends.items()}
    c, half = compare(ends['completep']), compare(ends['depth_mup'])
    yield 'docs/results.md', (f'32 layers are {gain["completep"]:.2f} nats better than 2 under `completep` (drift '
                              f'{c.drift:.1f} ± {c.drift_error:.1f}, regret {percent(c.regret_frac, 0)}) and '
                              f'{-gain["sp"]:.2f} worse under `sp`')
    yield 'docs/results.md', f'`depth_mup` costs {percent(half.regret_frac)[:-1]} ± {percent(half.regret_error)}'
    decay = {rules: compare(curves('sweep_depth_decay', rules)) for rules in deep}
    sp, half, completep = (percent(found.regret_frac) for found in decay.values())
    yield 'docs/results.md', (f'costs {sp} under `sp`, at least {half} under `depth_mup` and {completep} under '
                              f"`completep` (drift {decay['completep'].drift:+.1f})")
    assert optimum(curves('sweep_depth_decay', 'depth_mup')[-1]).mark == '>'  # "at least"
    assert optimum(curves('sweep_depth_decay', 'completep')[-1]).mark == ''
    sparse = {rules: curves('sweep_density', rules) for rules in ('sp', 'mup', 'supar')}
    sp, mup, supar = map(compare, sparse.values())
    yield 'docs/results.md', f'stays ({supar.drift:.2f} octaves, regret {percent(supar.regret_frac, 0)})'
    yield 'README.md', f'the best rate stays ({supar.drift:.2f} octaves)'
    yield 'docs/results.md', f'costs {percent(sp.regret_frac)} and {percent(mup.regret_frac)}'
    yield 'README.md', f'climbs by more than {math.floor(sp.drift)}'
    yield 'docs/results.md', f'climbs by more than {math.floor(sp.drift)} and {math.floor(mup.drift)} octaves'
    sp, mup, supar = (f'{best_loss(of[-1]):.2f}' for of in sparse.values())
    yield 'docs/results.md', f'({sp} and {mup} against {supar} at 1/8)'


def other_questions():
    page = 'docs/results.md'
    first, *_, last = curves('sweep_init_std', 'completep', 'init_std')
    rules = [curves('sweep_init_std', other, 'init_std')[-1] for other in ('sp', 'depth_mup')]
    assert all(last[value][1] < other[value][1] for other in rules for value in last)  # "ahead at every init"
    values = list(last)
    moved = values.index(optimum(last).best) - values.index(optimum(first).best)
    yield page, f'moves by {moved} grid points, {optimum(first).best:g} to {optimum(last).best:g}'
    mup, completep = ([best_loss(curve) for curve in curves('sweep_n_over_l', rules)] for rules in ('mup', 'completep'))
    ahead = [one - other for one, other in zip(mup, completep)][1:]
    yield page, f'costs `completep` {min(ahead):.2f} to {max(ahead):.2f} nats less than `mup`'
    saved = [steps_saved(shape) for shape in range(1, 5)]
    yield page, f'with {percent(saved[0], 0)} (5 layers) to {percent(saved[-1], 0)} (32) fewer steps'
    assert saved == sorted(saved) and mup[0] == min(mup) and completep[0] == min(completep)  # "the widest shape wins"
    moves = [compare(curves(name, 'mup')) for name in SWEEPS if re.fullmatch('sweep_(batch|block_size)(_128)?', name)]
    assert len(moves) == 4 and all(abs(found.drift) < 1 for found in moves)  # "by less than an octave"
    yield page, f'which costs 0 to {percent(max(found.regret_frac for found in moves))}'
    assert {optimum(curve).best for curve in curves('sweep_schedule', 'mup', 'schedule')} == {'constant'}
    regret = compare(curves('sweep_output_mult', 'mup', 'output_mult')).regret_frac
    yield page, f'the same multiplier but for {percent(regret)}'


def durations():
    page, base = 'docs/variants.md', 'completep, base_train_tokens 1024000'
    pieces = {'nothing': 'completep', 'all five': base} | {
        f'`{names}`': f'{base}, rescale {names}' for names in ('lr', 'lr,weight_decay', 'lr,weight_decay,eps,beta2')}
    longest = {name: curves('sweep_duration_pieces', label) for name, label in pieces.items()}
    best = {name: best_loss(of[-1]) for name, of in longest.items()}
    for name, of in longest.items():
        found = compare(of)
        drift = f'{found.drift:+.2f} ± {found.drift_error:.2f}' if not optimum(of[-1]).mark else f'> {found.drift:+.0f}'
        yield page, f'| {name} | {drift} | {mean_losses(of[-1])[optimum(of[0]).best]:.3f} | {best[name]:.3f} |'
    without_beta1 = best['`lr,weight_decay,eps,beta2`']
    yield page, f'gain {best["nothing"] - without_beta1:.3f} nats'
    yield page, f'beta1 costs {best["all five"] - without_beta1:.2f}'
    assert all(mean_losses(of[-1])[optimum(of[0]).best] > best['nothing'] for name, of in longest.items()
               if name != 'nothing')  # "too low": at the base's best rate, all pieces are worse than nothing


def exports():
    page, texts = 'docs/export.md', {name: text_of(f'results/export/{name}.txt') for name in (
        'export', 'export_bfloat16', 'export_average')}
    yield page, ' '.join(texts['export'].split())
    change = float(re.search(r'changed by (\S+);', texts['export_bfloat16'])[1])
    assert abs(change) < 1e-4
    yield page, "the demo's by less than 0.0001 nats"
    alone, average = re.findall(r'validation loss (\S+)', texts['export_average'])[:2]
    yield page, f"The demo's, at {alone}, become worse, {average}"
    found = json.loads(text_of('results/export/lm_eval.json'))
    assert abs(found['bits_per_byte'] / found['nanop_bits_per_byte'] - 1) < 1e-6
    yield page, f"lm_eval finds {found['bits_per_byte']:.6f} bits per byte"


def models_named(rows, first):
    """Of the first row's model all words, of the others those that are not the first's; '-' for no rows."""
    known = set(first['model'].split(', '))
    return '; '.join(row['model'] if row is first else ', '.join(
        word for word in row['model'].split(', ') if word not in known) for row in rows) or '-'


def models_in_llama_cpp():
    """A line of the table for every target: what has nanoP's logits, how exactly, what is refused, what is wrong."""
    targets = {}
    for row in read_csv(ROOT / 'results/export_llama_cpp/table.csv'):
        targets.setdefault(row['target'] if row['tokenizer'] == 'gpt2' else 'byte', []).append(row)
    (byte,) = targets.pop('byte')
    assert byte['converts'] == 'False' and 'pre-tokenizer was not recognized' in byte['note']
    assert list(targets) == list(TABLE)
    for target, rows in targets.items():
        refused = [row for row in rows if row['loads'] == 'False']
        same = [row for row in rows if row not in refused and float(row['difference']) < 1e-3]
        wrong = [row for row in rows if row not in refused and float(row['difference']) > 1e-2]
        assert len(refused) + len(same) + len(wrong) == len(rows)
        assert all(row['greedy_equal'] == row['tokens_equal'] == 'True' for row in same)
        most = f"{max(float(row['difference']) for row in same):.0e}" if same else '-'
        named = [models_named(kind, rows[0]) for kind in (same, refused, wrong)]
        yield 'docs/export.md', f'| {target} | {named[0]} | {most} | {named[1]} | {named[2]} |'
    exact, older = (read_csv(ROOT / f'results/export_llama_cpp/{name}/table.csv')
                    for name in ('gelu_in_float32', 'transformers_4'))
    most = max(float(row['difference']) for row in exact if row['loads'] == 'True' and row['target'] != 'arcee')
    yield 'docs/export.md', f'the same logits differ by at most {most:.0e}'  # arcee has relu2 there, as in the table
    assert {row['target'] for row in older} == {'gpt_neox'} and older[0]['model'] == 'gelu, untied, biases'
    assert all(row['loads'] == 'False' or float(row['difference']) > 1e-2 for row in older[1:])
    yield 'docs/export.md', f"with GELU and biases differs by {float(older[0]['difference']):.0e}"


def examples():
    found = {(name, axis): (drift, regret) for name, axis, drift, regret in re.findall(
        r'(\w+) over (\w+): the best rate moves by (\S+) octaves, and to keep it costs (\S+)',
        text_of('results/examples/measure.txt'))}
    for axis, shape, more in ('width', '2 x 128', ('to keep the rate costs ', ' of the loss')), (
            'depth', '16 x 32', ('', '')):
        (sp, sp_regret), (ours, regret) = found['sp', axis], found['completep', axis]
        yield 'examples/README.md', f'| {shape} | {sp} octaves, {sp_regret.join(more)} | {ours} octaves, {regret} |'


def statements():
    """(page, a sentence's part with its figures computed)"""
    yield from (*wide_and_deep(), *depth_in_the_papers_architecture(), *more_depth_and_density(), *other_questions(),
                *durations(), *exports(), *models_in_llama_cpp(), *examples())
    demo = json.loads(text_of('results/completep_small/summary.json'))
    yield 'README.md', f"{demo['val_loss']:.2f} nats ({demo['bits_per_byte']:.2f} bits per byte)"
    yield 'README.md', f"{demo['params']:,} parameters, {demo['steps']:,} steps"
    target = json.loads(text_of('results/tune_proxy/target_summary.json'))['val_loss']
    direct = [row['val_loss'] for row in report_on('tune_direct').rows]
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
