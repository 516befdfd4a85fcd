"""
How fast training, sampling, data preparation and sweeps are here, beside others and beside what the machine can do.

    python bench.py config/bench_4x128.py                                   a training step, part by part
    python bench.py config/bench_4x128.py --peer=../nanoGPT                 beside the model.py of a clone of nanoGPT
    python bench.py config/bench_6x384.py --sample [--peer=../nanoGPT]      tokens sampled per second
    python bench.py --prepare --text=big.txt                                tokens prepared per second
    python bench.py config/sweep_base.py --sweep                            trials per minute
    python bench.py config/completep_1p5b_deep.py --plan --gpus=64 --parallel=fsdp
    python bench.py config/completep_small.py --plan --measure=True         and three of its steps, on this machine

What is compared takes turns, A B A B; every figure is a median over the turns, of whole steps each, with the least and
the largest. Keys are those of train.py and the ones below.
"""
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import torch

from configurator import configure
from nanop.dataset import Dataset
from nanop.errors import UserError, exit_on_user_error, require_at_least
from nanop.machine import keep_freed_memory, peak_flops, pick_device, pick_dtype, why_not_compile
from tools.bench_worker import PARTS, build_peer, wait_for
from tools.plan import measure, meta_model, plan, si
from tools.stack import why_not_stack
from train import TrainConfig, build_model, split_batch

HERE = Path(__file__).resolve().parent
KINDS = ('plan', 'sample', 'prepare', 'sweep')


def whole_numbers(text):
    """The numbers of a list like '1,8'. Raises UserError."""
    try:
        numbers = [int(part) for part in text.split(',')]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"'{text}' is not a list of whole numbers of at least 1, like 1,8")
    return numbers


@dataclass
class BenchConfig:
    out_csv: str = ''                      # file to append the figures to, a row for each contestant
    turns: int = 5                         # of each contestant
    turn_s: float = 2.0                    # about as long as a turn is
    peer: str = ''                         # folder with the model.py of a nanoGPT-shaped project
    sample: bool = False                   # sampling instead of training
    batch_sizes: str = '1,8'               # of --sample
    lengths: str = '64,256'                # new tokens, of --sample
    prepare: bool = False                  # data preparation
    text: str = ''                         # file to prepare; '': text made up, of so many MB:
    text_mb: int = 100
    sweep: bool = False                    # trials of a sweep
    trials: int = 8
    plan: bool = False                     # print parameters, FLOPs, memory, traffic and days
    gpus: int = 1
    gpus_per_host: int = 8                 # what hsdp shards over
    peak_flops: float = 989e12             # of one GPU in bf16, dense: an H100
    mfu: float = 0.4                       # fraction of it that training reaches
    measure: bool = False                  # also run three steps here, in a process of their own

    def __post_init__(self):
        require_at_least(self, gpus=1, gpus_per_host=1, peak_flops=1, mfu=1e-6, turns=1, turn_s=1e-3, trials=1,
                         text_mb=1)
        whole_numbers(self.batch_sizes), whole_numbers(self.lengths)
        if sum(getattr(self, kind) for kind in KINDS) > 1:
            raise UserError(f"choose one of {', '.join('--' + kind for kind in KINDS)}")
        if not self.text.endswith('.txt') and self.text:
            raise UserError(f"text='{self.text}' is not a .txt file")
        if self.measure and not self.plan:
            raise UserError('measure=True goes with --plan')
        if self.peer and (self.plan or self.prepare or self.sweep):
            raise UserError('a peer is for a training step or --sample: leave it out')
        if self.peer and not (Path(self.peer) / 'model.py').is_file():
            raise UserError(f"peer='{self.peer}' has no model.py: give the folder of a clone of nanoGPT or of a fork")


def faster_by(seconds, ours):
    """The figures of how many times longer something took than ours, turn by turn."""
    ratios = [theirs / mine for theirs, mine in zip(seconds, ours)]
    return dict(nanop_is_faster_by=median(ratios), faster_by_min=min(ratios), faster_by_max=max(ratios))


def times(row):
    """Those figures for a table."""
    return f"{row['nanop_is_faster_by']:.2f}x ({row['faster_by_min']:.2f}..{row['faster_by_max']:.2f})"


def spread(values, digits=1):
    """'median (least..largest)'"""
    return f'{median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})'


# -----------------------------------------------------------------------------
# A training step


class Contestant:
    """A process of bench_worker.py, started now, and what its turns took. Raises UserError if it ends."""

    def __init__(self, name, turn_s, **spec):
        self.name, self.compiled, started = name, spec['config']['compile'], time.perf_counter()
        self.errors, self.cache = tempfile.TemporaryFile('w+'), tempfile.TemporaryDirectory()  # nothing compiled before
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / 'bench_worker.py'), json.dumps(spec)], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, 'TORCHINDUCTOR_CACHE_DIR': self.cache.name})
        try:
            first = self.answer()
            self.first_step_s = time.perf_counter() - started  # from the start of the process
            self.num_params, self.first_step_alone_s = first['num_params'], first['first_step_alone_s']
            self.turns, self.steps = [], 2
            self.turn()  # warm-up
            self.steps, self.turns = max(1, round(turn_s / min(self.step_s))), []
        except BaseException:
            self.end()
            raise

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ['no reason given']
            raise UserError(f"{self.name} ended: {[line for line in lines if 'Error' in line][-1:] or lines[-1:]}")
        return json.loads(line)

    def turn(self):
        print(1 + self.steps, file=self.process.stdin)  # the first is not timed: while others ran, its memory went cold
        answer = self.answer()
        self.turns.append([sum(part) / self.steps for part in zip(*answer['seconds'][1:])])
        self.peak_bytes = answer['peak_bytes']

    @property
    def step_s(self):
        """Seconds of a step, for each turn."""
        return [sum(parts) for parts in self.turns]

    def end(self):
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        self.cache.cleanup()


def contestants_of(config, bench, device, dtype):
    """(name, what bench_worker.py is to be told) of each."""
    dtype, config = str(dtype)[6:], asdict(config)
    yield 'nanoP', dict(kind='ours', config=config, dtype=dtype)
    if config['optimizer'] == 'adamw':
        yield 'nanoP without its rules', dict(kind='plain', config=config, dtype=dtype)
    yield 'its products alone', dict(kind='products', config=dict(config, compile=False), dtype=dtype)
    if bench.peer:
        as_shipped = dtype if device.type == 'cuda' else 'float32'  # on a CPU nanoGPT does not autocast
        compiles = not why_not_compile(device)
        for each, compiled in dict.fromkeys([(as_shipped, compiles), (dtype, False), (dtype, compiles)]):
            yield (f"peer, {each}{', compiled' if compiled else ''}",
                   dict(kind='peer', config=dict(config, compile=compiled), dtype=each, peer=bench.peer))


def bench_step(config, bench):
    """Prints and returns the figures of a training step, a dict for each contestant. Raises UserError.

    A peer ships compiled, on a CPU in float32, and keeps glibc's settings; nanoP's own are those of train.py.
    """
    sequences, _, _ = split_batch(config, 1)
    device = pick_device(config.device)
    c = replace(config, batch_size=sequences, compile=config.compile and not why_not_compile(device))
    dtype, model, vocabulary = pick_dtype(c.dtype, device), *meta_model(c)
    if c.recompute or dtype == torch.float16:
        raise UserError('recompute=True and dtype=float16 are not measured here: leave them out')
    Dataset(c.dataset)  # what is wrong with it is to be said here
    contestants = []
    try:
        for name, spec in contestants_of(c, bench, device, dtype):
            print(f'starting: {name}', file=sys.stderr)
            contestants.append(Contestant(name, bench.turn_s, **spec))
            if spec['kind'] == 'peer' and contestants[-1].num_params != model.num_params():
                raise UserError(f"peer='{bench.peer}' has {contestants[-1].num_params:,} parameters here, nanoP "
                                f'{model.num_params():,}: nanoGPT has tie_weights=True and density=1')
        for _ in range(bench.turns):
            for contestant in contestants:
                contestant.turn()
    finally:
        for contestant in contestants:
            contestant.end()

    flops = c.batch_tokens * model.flops_per_token()
    in_products = sum(6 * c.batch_tokens * module.weight.numel() for module in model.modules()
                      if isinstance(module, torch.nn.Linear))
    best = {contestant.name: median(contestant.step_s) for contestant in contestants}
    product_rate, peak = in_products / best['its products alone'], peak_flops(device, dtype)
    print(f'\n{c.n_layer} layers x {c.n_embd}, {model.num_params():,} parameters, {vocabulary}; '
          f'{c.batch_tokens // c.block_size} x {c.block_size} tokens a step on {device}, {str(dtype)[6:]}')
    print(f"matrix products of these shapes: {si(product_rate, 'FLOP/s')}"
          + (f' of {si(peak, "FLOP/s")}' if peak else '') + '\n')
    print(f"{'':<28}{'tokens/s':>10}  {'ms a step':<28}{'data':>6}{'fwd':>8}{'bwd':>8}{'opt':>8}"
          f"{'of products':>13}{'1st step, s':>13}{'compile, s':>12}{'peak, MB':>10}  nanoP is faster by")
    rows = []
    for contestant in contestants:
        step_s, parts = best[contestant.name], [1e3 * median(part) for part in zip(*contestant.turns)]
        row = dict(
            contestant=contestant.name, tokens_per_s=c.batch_tokens / step_s, step_ms=1e3 * step_s,
            step_ms_min=1e3 * min(contestant.step_s), step_ms_max=1e3 * max(contestant.step_s),
            **{f'{part}_ms': value for part, value in zip(PARTS, parts)}, flops_per_s=flops / step_s,
            of_products_frac=flops / step_s / product_rate, of_peak_frac=flops / step_s / peak if peak else '',
            first_step_s=contestant.first_step_s, peak_mb=contestant.peak_bytes / 1e6,
            compile_s=contestant.first_step_alone_s - step_s if contestant.compiled else '',
            **faster_by(contestant.step_s, contestants[0].step_s))
        if contestant.name == 'its products alone':
            row.update(flops_per_s=product_rate, of_products_frac='', of_peak_frac=product_rate / peak if peak else '',
                       first_step_s='', peak_mb='')
        rows.append(row)
        ms, shown = spread([1e3 * s for s in contestant.step_s]), {
            key: format(value, spec) if value != '' else '' for key, value, spec in (
                ('of', row['of_products_frac'], '.0%'), ('first', row['first_step_s'], '.1f'),
                ('compile', row['compile_s'], '.1f'), ('peak', row['peak_mb'], ',.0f'))}
        print(f"{contestant.name:<28}{row['tokens_per_s']:>10,.0f}  {ms:<28}{parts[0]:>6.1f}{parts[1]:>8.1f}"
              f"{parts[2]:>8.1f}{parts[3]:>8.1f}{shown['of']:>13}{shown['first']:>13}{shown['compile']:>12}"
              f"{shown['peak']:>10}  {times(row)}")
    return rows


# -----------------------------------------------------------------------------
# Sampling, data preparation, sweeps


def take_turns(turns, contestants):
    """{name: seconds of its turns} for {name: what it does in a turn}, which returns the seconds it took."""
    taken = {name: [] for name in contestants}
    for _ in range(turns):
        for name, turn in contestants.items():
            taken[name].append(turn())
    return taken


def without_cache(model, ids, new_tokens):
    """Greedy continuation of ids (B, T) by the whole context for each token: what the cache must not change."""
    for _ in range(new_tokens):
        logits = model.unembed(model.features(ids[:, -model.config.block_size:])[:, -1])
        ids = torch.cat((ids, logits[:, :model.config.real_vocab_size].argmax(-1, keepdim=True)), dim=1)
    return ids


@torch.no_grad()
def bench_sample(config, bench):
    """Prints and returns the figures of sampling, likeliest tokens after a prompt of one. Raises UserError."""
    device = pick_device(config.device)
    dtype, data = pick_dtype(config.dtype, device), Dataset(config.dataset)
    keep_freed_memory()
    model = build_model(config, data).to(device).eval()
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    peer = build_peer(bench.peer, asdict(model.config)).to(device).eval() if bench.peer else None
    rows = []
    print(f"{'batch':>5}{'new tokens':>12}  {'':<30}{'tokens/s':>10}  {'ms a token':<26}nanoP is faster by")
    for batch_size in whole_numbers(bench.batch_sizes):
        for length in whole_numbers(bench.lengths):
            ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)

            def turn(generate, context):
                def run():
                    wait_for(device)
                    started = time.perf_counter()
                    with context:
                        generate(ids, length)
                    wait_for(device)
                    return time.perf_counter() - started
                return run
            contestants = {'nanoP': turn(lambda ids, n: model.generate(ids, n, top_k=1), autocast),
                           'without its cache': turn(lambda ids, n: without_cache(model, ids, n), autocast)}
            if peer:
                plain = nullcontext() if device.type != 'cuda' else autocast  # as its sample.py does
                for name, context in (('peer, as shipped', plain), (f'peer, {str(dtype)[6:]}', autocast)):
                    contestants[name] = turn(lambda ids, n: peer.generate(ids, n, top_k=1), context)
            taken = take_turns(bench.turns + 1, contestants)
            # in float32: in bf16 two tokens are often equally likely, and from then on all differ
            same = (model.generate(ids, length, temperature=0) == without_cache(model, ids, length))[:, 1:]
            same = same.float().mean().item()
            for name, seconds in taken.items():
                seconds = seconds[1:]  # the first was to warm up
                rows.append(dict(contestant=name, batch_size=batch_size, new_tokens=length,
                                 tokens_per_s=batch_size * length / median(seconds), seconds=median(seconds),
                                 seconds_min=min(seconds), seconds_max=max(seconds),
                                 **faster_by(seconds, taken['nanoP'][1:]), same_tokens_frac=same))
                print(f"{batch_size:>5}{length:>12}  {name:<30}{rows[-1]['tokens_per_s']:>10,.0f}  "
                      f"{spread([1e3 * s / length for s in seconds], 2):<26}{times(rows[-1])}")
            print(f'{"":>17}  {same:.1%} of the tokens are the same with the cache and without, in float32')
    return rows


MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""  # a small process between: a child begins with the peak of the one that starts it

PLAIN_LOOP = """
import sys, numpy, tiktoken
encode = tiktoken.get_encoding('gpt2').encode_ordinary
with open(sys.argv[1], encoding='utf-8', errors='replace', newline='') as text, open(sys.argv[2], 'wb') as out:
    while piece := text.read(2**20):
        numpy.array(encode(piece), numpy.uint16).tofile(out)
"""


def make_up_text(path, num_bytes):
    """A file of so many bytes: the sources of Python's standard library, over and over."""
    sources = [file.read_bytes() for file in sorted(Path(os.__file__).parent.glob('*.py'))]
    with open(path, 'wb') as file:
        while file.tell() < num_bytes:
            for source in sources:
                file.write(source[:num_bytes - file.tell()])


def timed(command, allowed=(0,)):
    """Runs a command; (seconds, peak of the largest of its processes in bytes). Raises UserError if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile('w+') as output, tempfile.NamedTemporaryFile('r') as peak:
        code = subprocess.run([sys.executable, '-c', MEASURED, peak.name, *command], stdout=output,
                              stderr=output).returncode
        if code not in allowed:
            output.seek(0)
            raise UserError(f"'{' '.join(command)}' failed: {(output.read().strip().splitlines() or [''])[-1]}")
        return time.perf_counter() - started, int(peak.read()) * (1 if sys.platform == 'darwin' else 1024)


def bench_prepare(config, bench):
    """Prints and returns the figures of preparing a text file with GPT-2's tokens. Raises UserError."""
    with tempfile.TemporaryDirectory() as folder:
        text = bench.text
        if not text:
            text = os.path.join(folder, 'text.txt')
            make_up_text(text, bench.text_mb * 10**6)
        peaks, out = {}, os.path.join(folder, 'out')

        def turn(name, *command):
            def run():
                seconds, peak = timed([sys.executable, *command])
                peaks[name] = max(peaks.get(name, 0), peak)
                return seconds
            return run
        taken = take_turns(bench.turns, {
            'data/text/prepare.py': turn('data/text/prepare.py', str(HERE / 'data/text/prepare.py'), text,
                                         '--tokenizer=gpt2', f'--out={out}'),
            'one process, a plain loop': turn('one process, a plain loop', '-c', PLAIN_LOOP, text, out + '.bin')})
        meta = json.loads((Path(out) / 'meta.json').read_text())
        tokens, mb = meta['train_tokens'] + meta['val_tokens'], os.path.getsize(text) / 1e6
    print(f'{mb:,.0f} MB of text, {tokens:,} tokens, {os.cpu_count()} cores\n')
    print(f"{'':<28}{'tokens/s':>12}{'a core':>12}  {'s':<26}{'peak, MB':>10}  nanoP is faster by")
    rows = []
    for name, seconds in taken.items():
        cores = os.cpu_count() if name.startswith('data') else 1
        rows.append(dict(contestant=name, text_mb=mb, tokens_per_s=tokens / median(seconds),
                         tokens_per_s_and_core=tokens / median(seconds) / cores, seconds=median(seconds),
                         seconds_min=min(seconds), seconds_max=max(seconds), peak_mb=peaks[name] / 1e6,
                         **faster_by(seconds, taken['data/text/prepare.py'])))
        print(f"{name:<28}{rows[-1]['tokens_per_s']:>12,.0f}{rows[-1]['tokens_per_s_and_core']:>12,.0f}  "
              f"{spread(seconds):<26}{peaks[name] / 1e6:>10,.0f}  {times(rows[-1])}")
    return rows


def bench_sweep(config, bench):
    """Prints and returns the trials per minute of a sweep over learning rates, start included. Raises UserError."""
    rates = [config.learning_rate * 2 ** (k / 8) for k in range(bench.trials)]
    not_stacked = why_not_stack(config)
    with tempfile.TemporaryDirectory() as folder:
        path, runs = os.path.join(folder, 'base.py'), iter(range(10**6))
        Path(path).write_text(''.join(f'{key} = {value!r}\n' for key, value in asdict(config).items()
                                      if key not in ('out_dir', 'init_from', 'overwrite')))

        def a_process_each():
            return sum(timed([sys.executable, str(HERE / 'train.py'), path, f'--learning_rate={rate}',
                              f'--out_dir={folder}/{next(runs)}'], allowed=(0, 3))[0] for rate in rates)

        def one_sweep(*flags):
            return timed([sys.executable, str(HERE / 'sweep.py'), path, f"--learning_rate={','.join(map(str, rates))}",
                          f'--out_dir={folder}/{next(runs)}', *flags])[0]
        contestants = {'a process a trial': a_process_each, 'sweep.py': one_sweep}
        if not not_stacked:
            contestants['sweep.py, stacked'] = lambda: one_sweep(f'--stack={bench.trials}', '--workers=1')
        taken = take_turns(bench.turns, contestants)
    print(f"{'':<22}{'trials/minute':>14}  {'s':<26}sweep.py is faster by")
    rows = []
    for name, seconds in taken.items():
        rows.append(dict(contestant=name, trials=bench.trials, trials_per_minute=60 * bench.trials / median(seconds),
                         seconds=median(seconds), seconds_min=min(seconds), seconds_max=max(seconds),
                         **faster_by(seconds, taken['sweep.py'])))
        print(f"{name:<22}{rows[-1]['trials_per_minute']:>14.1f}  {spread(seconds):<26}{times(rows[-1])}")
    if not_stacked:
        print(f'not stacked: {not_stacked}')
    return rows


# -----------------------------------------------------------------------------


def commit(folder=HERE):
    """The commit of the repository in `folder`, with a plus if files differ from it; '' outside of git."""
    def git(*words):
        return subprocess.run(['git', '-C', str(folder), *words], capture_output=True, text=True).stdout.strip()
    try:
        return git('rev-parse', '--short', 'HEAD') + ('+' if git('status', '--porcelain', '--', '*.py') else '')
    except OSError:
        return ''


def machine(device):
    """The name of what computes."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text()) if info.exists() else None
    return f"{found.group(1) if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def append(path, rows, **common):
    """Appends rows, dicts with the same keys, to a CSV file, each with versions and commit. Raises UserError."""
    rows = [{key: f'{value:.6g}' if isinstance(value, float) else value for key, value in
             dict(commit=commit(), torch=torch.__version__, **common, **row).items()} for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ','.join(rows[0])
    known = path.read_text().splitlines()[:1] if path.exists() else []
    if known and known != [header]:
        raise UserError(f"out_csv='{path}' holds figures of another kind: choose another file")
    with open(path, 'a', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        if not known:
            writer.writeheader()
        writer.writerows(rows)


def read_bench(argv):
    """(BenchConfig, TrainConfig) from the command line. Raises UserError."""
    argv = [f'{argument}=True' if argument.lstrip('-') in KINDS else argument for argument in argv]
    overrides = configure(BenchConfig, argv, axes=TrainConfig)
    own = {key: overrides.pop(key) for key in list(overrides) if key in {field.name for field in fields(BenchConfig)}}
    lists = [key for key, value in overrides.items() if isinstance(value, list)]
    if lists:
        raise UserError(f'{lists[0]}={overrides[lists[0]]} is a list: give one value')
    return BenchConfig(**own), TrainConfig(**overrides)


def main():
    bench, config = read_bench(sys.argv[1:])
    if bench.plan:
        plan(config, bench)
        if bench.measure:
            measure(config, bench)
        return
    what = next((kind for kind in KINDS if getattr(bench, kind)), 'step')
    rows = dict(step=bench_step, sample=bench_sample, prepare=bench_prepare, sweep=bench_sweep)[what](config, bench)
    if bench.out_csv:
        device = pick_device(config.device)
        shape = {} if bench.prepare else dict(
            shape=f'{config.n_layer}x{config.n_embd}', batch_tokens=config.batch_tokens, block_size=config.block_size,
            dtype=str(pick_dtype(config.dtype, device))[6:], compile=config.compile,
            peer=f'{Path(bench.peer).name} {commit(bench.peer)}'.strip() if bench.peer else '')
        append(bench.out_csv, rows, machine=machine(device), threads=torch.get_num_threads(), **shape)


if __name__ == '__main__':
    exit_on_user_error(main)
