"""
Benchmarks training, sampling, data preparation and sweeps, against other code and against what the machine can do.

    python bench.py config/bench_4x128.py                                a training step, part by part
    python bench.py config/bench_4x128.py --peer=../nanoGPT              compared with the model.py of a nanoGPT clone
    python bench.py config/bench_6x384.py --sample [--peer=../nanoGPT]   tokens sampled per second
    python bench.py --prepare --text=big.txt                             tokens prepared per second
    python bench.py config/sweep_base.py --sweep                         trials per minute
    python bench.py config/completep_small.py --plan --measure=True      compares the memory of three steps with a plan
    python bench.py config/completep_1p5b_deep.py --plan --gpus=64 --parallel=fsdp   FLOPs, days, memory and traffic
    python bench.py config/completep_small.py --shapes --params=2e6 --tokens=1e7     shapes of equal size, deep to wide

The contestants alternate, A B A B. A turn is several whole steps. A figure is the median over the turns, printed with
the smallest and the largest. Keys are those of train.py and the ones below.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from configurator import configure_both, flat, nested
from nanop.dataset import open_dataset
from nanop.errors import UserError, exit_on_user_error, require, require_values
from nanop.files import append_csv
from nanop.machine import flops_per_token, hardware_name, peak_flops, set_up, why_not_compile
from tools.bench_worker import PARTS, build_peer, synchronized_time
from tools.contestants import SECONDS, Contestant, contestants_of, faster_by, print_table, spread_of, take_turns, timed
from tools.plan import measure_memory, meta_model, print_plan, si
from tools.shapes import equal_shapes, evidence_on, shape_row
from tools.stack import why_not_stack
from train import TrainConfig, build_model, split_batch

HERE = Path(__file__).resolve().parent
KINDS = ('plan', 'shapes', 'sample', 'prepare', 'sweep')
PREPARE = 'data/text/prepare.py'


def whole_numbers(text):
    """The numbers of a list like '1,8'."""
    try:
        numbers = [int(part) for part in text.split(',')]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"'{text}' is not a list of integers of at least 1, like 1,8")
    return numbers


@dataclass
class BenchConfig:
    out_csv: str = ''                      # CSV file to append the figures to, one row per contestant
    turns: int = 5                         # per contestant
    turn_s: float = 2.0                    # approximate length of a turn, seconds
    peer: str = ''                         # folder with the model.py of a nanoGPT-shaped project, to compare with
    sample: bool = False                   # benchmark sampling instead of a training step
    batch_sizes: str = '1,8'               # for --sample
    lengths: str = '64,256'                # new tokens, for --sample
    prepare: bool = False                  # benchmark data preparation
    text: str = ''                         # .txt file to prepare; '': generated text of text_mb
    text_mb: int = 100                     # MB
    sweep: bool = False                    # benchmark the trials of a sweep
    trials: int = 8
    plan: bool = False                     # print parameters, FLOPs, memory, traffic and days; train nothing
    gpus: int = 1
    gpus_per_host: int = 8                 # number of GPUs that hsdp shards over
    peak_flops: float = 989e12             # dense bf16 FLOP/s of one GPU: an H100
    mfu: float = 0.4                       # fraction of peak_flops that training reaches
    measure: bool = False                  # with --plan: also run three steps here; with --shapes: measure the speed
    shapes: bool = False                   # list shapes of about `params` parameters, for `tokens` tokens of training
    params: float = 0.0
    tokens: float = 0.0

    def __post_init__(self):
        require_values(self, at_least=dict(gpus=1, gpus_per_host=1, peak_flops=1, mfu=1e-6, turns=1, turn_s=1e-3,
                                           trials=1, text_mb=1))
        whole_numbers(self.batch_sizes)
        whole_numbers(self.lengths)
        if sum(getattr(self, kind) for kind in KINDS) > 1:
            raise UserError(f"choose one of {', '.join('--' + kind for kind in KINDS)}")
        require(self, 'text', self.text.endswith('.txt') or not self.text, 'use a .txt file')
        require(self, 'measure', self.plan or self.shapes or not self.measure, 'it goes with --plan or --shapes')
        require(self, 'gpus', self.gpus == 1 or not self.shapes, '--shapes is for one device, --plan for several')
        for key in ('params', 'tokens'):
            value = getattr(self, key)
            require(self, key, 1 <= value < math.inf if self.shapes else not value,
                    'use a finite value of at least 1' if self.shapes else 'it goes with --shapes')
        require(self, 'peer', not (self.peer and (self.plan or self.shapes or self.prepare or self.sweep)),
                'it goes with a training step or --sample, leave it out')
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise UserError(f"peer='{self.peer}' has no model.py: give the folder of a clone of nanoGPT or of a fork")


# -----------------------------------------------------------------------------
# A training step
def step_row(contestant, ours, config, model, product_rate, peak):
    """The figures of one contestant as a row of the table and the CSV file; a figure that it does not have is ''."""
    step_s, trains = median(contestant.step_s), contestant.kind != 'products'
    flops_per_s = flops_per_token(model) * config.batch_tokens / step_s if trains else product_rate
    parts = [median(seconds) for seconds in zip(*contestant.turns)]
    return dict(
        contestant=contestant.name, tokens_per_s=config.batch_tokens / step_s, step_ms=1e3 * step_s,
        step_ms_min=1e3 * min(contestant.step_s), step_ms_max=1e3 * max(contestant.step_s),
        **{f'{part}_ms': 1e3 * seconds for part, seconds in zip(PARTS, parts)}, flops_per_s=flops_per_s,
        of_products_frac=flops_per_s / product_rate if trains else '', of_peak_frac=flops_per_s / peak if peak else '',
        first_step_s=contestant.first_step_s if trains else '', peak_mb=contestant.peak_bytes / 1e6 if trains else '',
        compile_s=contestant.first_step_alone_s - step_s if contestant.compiled else '',
        **faster_by(contestant.step_s, ours.step_s))


def bench_step(config, bench):
    """Benchmark a training step."""
    sequences, _, micro_batches = split_batch(config, 1)
    machine = set_up(config.device, config.dtype)
    if config.recompute or config.parallel != 'ddp' or machine.dtype == torch.float16:
        raise UserError('recompute=True, sharding and dtype=float16 are not benchmarked here: leave them out')
    open_dataset(config.dataset)  # reports a broken dataset before any process starts
    compiles = not why_not_compile(machine.device)
    c = replace(config, batch_size=sequences // micro_batches, compile=config.compile and compiles)
    model, vocabulary = meta_model(c)
    contestants = []
    with ExitStack() as running:
        for name, spec in contestants_of(c, bench.peer, machine, compiles):
            print(f'starting: {name}', file=sys.stderr)
            contestants.append(running.enter_context(closing(Contestant(name, bench.turn_s, **spec))))
            if spec['kind'] == 'peer' and contestants[-1].num_params != model.num_params():
                raise UserError(f"peer='{bench.peer}' has {contestants[-1].num_params:,} parameters here, nanoP "
                                f'{model.num_params():,}: nanoGPT has tie_weights=True and density=1')
        take_turns(bench.turns, {contestant.name: contestant.take_turn for contestant in contestants})

    weights_in_products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    products_s = next(median(contestant.step_s) for contestant in contestants if contestant.kind == 'products')
    product_rate = 6 * c.batch_tokens * weights_in_products / products_s
    peak = peak_flops(machine.device, machine.dtype)
    rows = [step_row(contestant, contestants[0], c, model, product_rate, peak) for contestant in contestants]
    print(f'\n{c.n_layer} layers x {c.n_embd}, {model.num_params():,} parameters, {vocabulary}; steps of '
          f'{micro_batches} micro-batch(es) x {c.batch_size} x {c.block_size} tokens on {machine.device}, '
          f'{machine.dtype_name}')
    print(f"matrix products of these shapes run at {si(product_rate, 'FLOP/s')}"
          + (f", the device's peak is {si(peak, 'FLOP/s')}" if peak else '') + '\n')
    print_table(rows, {
        'tokens/s': '{tokens_per_s:,.0f}', 'ms per step': '{step_ms:,.1f} ({step_ms_min:,.1f}..{step_ms_max:,.1f})',
        'data': '{data_ms:.1f}', 'fwd': '{forward_ms:.1f}', 'bwd': '{backward_ms:.1f}', 'opt': '{optimizer_ms:.1f}',
        'of products': '{of_products_frac:.0%}', 'first step, s': '{first_step_s:.1f}',
        'compile, s': '{compile_s:.1f}', 'peak, MB': '{peak_mb:,.0f}'})
    return rows


# -----------------------------------------------------------------------------
# Sampling, data preparation, sweeps
def without_cache(model, ids, new_tokens):
    """Continue ids (B, T) with the likeliest tokens, without a cache. With the cache they must be the same."""
    for _ in range(new_tokens):
        logits = model.unembed(model.features(ids[:, -model.config.block_size:])[:, -1])
        ids = torch.cat((ids, logits[:, :model.config.real_vocab_size].argmax(-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def bench_sample(config, bench):
    """Benchmark sampling the likeliest tokens after a prompt of one token."""
    machine = set_up(config.device, config.dtype)
    model = build_model(config, open_dataset(config.dataset)).to(machine.device).eval()
    samplers = {'nanoP': (partial(model.generate, top_k=1), machine.autocast()),
                'without its cache': (partial(without_cache, model), machine.autocast())}
    if bench.peer:
        generate = partial(build_peer(bench.peer, asdict(model.config)).to(machine.device).eval().generate, top_k=1)
        shipped = machine.autocast() if machine.device.type == 'cuda' else nullcontext()  # as in nanoGPT's sample.py
        samplers |= {'peer, as shipped': (generate, shipped),
                     f'peer, {machine.dtype_name}': (generate, machine.autocast())}

    def seconds_of(generate, autocast, ids, length):
        started = synchronized_time(machine.device)
        with autocast:
            generate(ids, length)
        return synchronized_time(machine.device) - started

    rows = []
    for batch_size in whole_numbers(bench.batch_sizes):
        for length in whole_numbers(bench.lengths):
            print(f'sampling {batch_size} x {length} tokens', file=sys.stderr)
            ids = torch.zeros(batch_size, 1, dtype=torch.long, device=machine.device)
            taken = take_turns(bench.turns + 1, {name: partial(seconds_of, *sampler, ids, length)
                                                 for name, sampler in samplers.items()})
            # compared in float32: in bf16 two tokens are often equally likely, and after them the texts differ
            cached, uncached = model.generate(ids, length, temperature=0), without_cache(model, ids, length)
            same = (cached == uncached)[:, 1:].float().mean().item()
            for name, (_, *seconds) in taken.items():  # the first turn is a warm-up
                rows.append(dict(contestant=name, batch_size=batch_size, new_tokens=length,
                                 tokens_per_s=batch_size * length / median(seconds), **spread_of(seconds),
                                 **faster_by(seconds, taken['nanoP'][1:]), same_tokens_frac=same))
    per_token = [row | {key: 1e3 * row[key] / row['new_tokens'] for key in ('seconds', 'seconds_min', 'seconds_max')}
                 for row in rows]
    print_table(per_token, {
        'batch': '{batch_size}', 'new tokens': '{new_tokens}', 'tokens/s': '{tokens_per_s:,.0f}',
        'ms per token': SECONDS.replace('.1f', '.2f'), 'equal tokens': '{same_tokens_frac:.1%}'})
    print('equal tokens: with the cache and without it, in float32')
    return rows


PLAIN_LOOP = """
import sys, numpy, tiktoken
encode = tiktoken.get_encoding('gpt2').encode_ordinary
with open(sys.argv[1], encoding='utf-8', errors='replace', newline='') as text, open(sys.argv[2], 'wb') as out:
    while piece := text.read(2**20):
        numpy.array(encode(piece), numpy.uint16).tofile(out)
"""


def write_text(path, num_bytes):
    """Write a file of `num_bytes`: the sources of Python's standard library, repeated."""
    sources = b''.join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob('*.py')))
    with open(path, 'wb') as file:
        for start in range(0, num_bytes, len(sources)):
            file.write(sources[:num_bytes - start])


def bench_prepare(config, bench):
    """Benchmark the tokenization of a text file with GPT-2's tokens."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = bench.text or f'{folder}/text.txt', f'{folder}/out'
        if not bench.text:
            write_text(text, bench.text_mb * 10**6)
        ours = [sys.executable, str(HERE / PREPARE), text, '--tokenizer=gpt2', f'--out={out}']
        loop = [sys.executable, '-c', PLAIN_LOOP, text, f'{out}.bin']
        taken = take_turns(bench.turns, {PREPARE: partial(timed, ours),
                                         'one process, a plain loop': partial(timed, loop)})
        meta = json.loads(Path(out, 'meta.json').read_text())
        tokens, mb = meta['train_tokens'] + meta['val_tokens'], os.path.getsize(text) / 1e6
    rows, our_seconds = [], [seconds for seconds, _ in taken[PREPARE]]
    for name, turns in taken.items():
        seconds, peaks = zip(*turns)
        rate, cores = tokens / median(seconds), os.cpu_count() if name == PREPARE else 1
        rows.append(dict(contestant=name, text_mb=mb, tokens_per_s=rate, tokens_per_s_and_core=rate / cores,
                         **spread_of(seconds), peak_mb=max(peaks) / 1e6, **faster_by(seconds, our_seconds)))
    print(f'{mb:,.0f} MB of text, {tokens:,} tokens, {os.cpu_count()} cores\n')
    print_table(rows, {'tokens/s': '{tokens_per_s:,.0f}', 'per core': '{tokens_per_s_and_core:,.0f}', 's': SECONDS,
                       'peak, MB': '{peak_mb:,.0f}'})
    return rows


def bench_sweep(config, bench):
    """Benchmark a sweep over learning rates, with the start of its processes, against one process per trial."""
    rates = [config.learning_rate * 2 ** (k / 8) for k in range(bench.trials)]
    not_stacked = why_not_stack(config)
    left_out = {'out_dir', 'init_from', 'overwrite'} | (
        {'max_iters'} if config.train_tokens or config.tokens_per_param else set())  # which set the duration
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, 'base.py')
        base.write_text(''.join(f'{key} = {value!r}\n' for key, value in asdict(config).items()
                                if key not in left_out))

        def seconds_of(script, rates, *flags, allowed=(0,)):
            learning_rate, out_dir = ','.join(map(str, rates)), tempfile.mkdtemp(dir=folder)
            return timed([sys.executable, str(HERE / script), str(base), f'--learning_rate={learning_rate}',
                          f'--out_dir={out_dir}', *flags], allowed)[0]

        def a_process_each():
            return sum(seconds_of('train.py', [rate], allowed=(0, 3)) for rate in rates)  # 3: it diverged

        sweep = partial(seconds_of, 'sweep.py', rates)
        contestants = {'a process a trial': a_process_each, 'sweep.py': sweep}
        if not not_stacked:
            contestants['sweep.py, stacked'] = partial(sweep, f'--stack={bench.trials}', '--workers=1')
        taken = take_turns(bench.turns, contestants)
    rows = [dict(contestant=name, trials=bench.trials, trials_per_minute=60 * bench.trials / median(seconds),
                 **spread_of(seconds), **faster_by(seconds, taken['sweep.py'])) for name, seconds in taken.items()]
    print_table(rows, {'trials/minute': '{trials_per_minute:.1f}', 's': SECONDS}, ours='sweep.py')
    if not_stacked:
        print(f'not stacked: {not_stacked}')
    return rows


def bench_shapes(config, bench):
    """List shapes of about `params` parameters, trained on `tokens` tokens on this device."""
    machine, shapes = set_up(config.device, config.dtype), equal_shapes(config, bench.params)
    if bench.measure:
        open_dataset(config.dataset)  # reports a broken dataset before any process starts
    found, largest = evidence_on(config.parameterization)
    rows = [shape_row(shape, bench, machine, found) for shape in shapes]
    line = '{:>10} {:>6} {:>14} {:>14} {:>8} {:>9} {:>10} {:<9} {:>10} {:>12}  {}'.format
    print(f'{config.parameterization}, base {config.base_n_layer} x {config.base_n_embd}, {meta_model(config)[1]}, '
          f'{bench.tokens:,.0f} tokens on {machine.device}, {machine.dtype_name}\n')
    print(line('shape', 'N:L', 'parameters', 'in blocks', 'FLOPs', 'memory', 'tokens/s', '', 'hours', 'tokens/param',
               'evidence'))
    for row in rows:
        print(line(row['shape'], f"{row['n_embd_per_layer']:,.1f}", f"{row['params']:,}",
                   f"{row['params_in_blocks']:,}", si(row['flops']), si(row['planned_bytes'], 'B'),
                   f"{row['tokens_per_s']:,.0f}", row['speed'], f"{row['hours']:,.2f}",
                   f"{row['tokens_per_param']:,.1f}", row['evidence']))
    if any(row['speed'] == 'estimated' for row in rows):
        print(f"\nestimated: {bench.mfu:.0%} (--mfu) of the rate of the shape's matrix products here; "
              '--measure=True trains each shape instead')
    spans = ', '.join(f'{key} {low:.3g} to {high:.3g}' for key, (low, high) in found.items())
    print('evidence: which ratios of the shape, each by itself, lie within those of the trials in results/ under these '
          f'rules: {spans}; their largest model has {largest:,} parameters' if found else
          'evidence: results/ has no trial under these rules')
    return rows


def git_commit(folder=HERE):
    """The commit of the repository in `folder`, with a plus if Python files differ from it; '' outside git."""
    def git(*words):
        return subprocess.run(['git', '-C', str(folder), *words], capture_output=True, text=True).stdout.strip()
    try:
        return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '--', '*.py') else '')
    except OSError:
        return ''


def append(path, rows, **common):
    """Append rows of figures to a CSV file, each with the commit, the version of torch and the `common` figures."""
    common = dict(commit=git_commit(), torch=torch.__version__, **common)
    append_csv(path, [{key: f'{value:.6g}' if isinstance(value, float) else value
                       for key, value in (common | row).items()} for row in rows])


def read_bench(argv):
    own, train = configure_both(BenchConfig, TrainConfig, argv, switches=KINDS)
    for key, value in flat(train).items():
        if isinstance(value, list):
            raise UserError(f'{key}={value} is a list: give one value')
    return BenchConfig(**own), TrainConfig(**nested(flat(train)))


def main():
    bench, config = read_bench(sys.argv[1:])
    if bench.plan:
        print_plan(config, bench)
        if bench.measure:
            measure_memory(config, bench)
        return
    benches = dict(shapes=bench_shapes, sample=bench_sample, prepare=bench_prepare, sweep=bench_sweep)
    chosen = next((benches[kind] for kind in benches if getattr(bench, kind)), bench_step)
    rows = chosen(config, bench)
    if bench.out_csv:
        machine = set_up(config.device, config.dtype)
        common = dict(machine=hardware_name(machine.device), threads=torch.get_num_threads())
        if not bench.prepare:
            common.update(
                shape=f'{config.n_layer}x{config.n_embd}', batch_tokens=config.batch_tokens,
                block_size=config.block_size, dtype=machine.dtype_name, compile=config.compile,
                peer=f'{Path(bench.peer).name} {git_commit(bench.peer)}'.strip() if bench.peer else '')
        append(bench.out_csv, rows, **common)


if __name__ == '__main__':
    exit_on_user_error(main)
