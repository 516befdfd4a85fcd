"""
The other stages of gpu_check.py: the machine, torch.compile, memory and speed. Each is a generator of Figures.

They measure with what bench.py measures with: processes that take turns, its plan. In a dry run their code runs on the
CPU with tiny shapes, and no figure of speed is given.
"""
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median

import torch
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from model import GPT, GPTConfig
from nanop import parallel
from nanop.dataset import Dataset
from nanop.errors import UserError
from nanop.machine import flops_per_token, hardware_name, peak_flops, peak_memory_bytes, set_up, why_not_compile
from tools.bench_worker import synchronized_time
from tools.contestants import Contestant, contestants_of, faster_by, take_turns
from tools.gpu_checks import output, small, start
from tools.gpu_stage import ROOT, Figure, NotRun
from tools.plan import measure_memory
from tools.stack import train_stack
from train import build_model, evaluate, make_optimizer, micro_losses, update

KINDS = {  # of kernels, by what their names contain; the first that matches counts
    'attention': ('flash', 'fmha', 'sdpa', 'attention'),
    'fused by the compiler': ('triton_',),
    'matrix products': ('gemm', 'nvjet', 'cutlass', 'xmma', 'cublas', '::mm', '::addmm'),
    'optimizer': ('multi_tensor', 'adam', 'lpnorm'),
    'copies': ('memcpy', 'memset', 'copy'),
}


def large(setting, **changes):
    """nanoGPT's 124M: 12 layers x 768, tied, without biases, and 16,384 tokens a step; tiny in a dry run."""
    shape = {} if setting.dry else dict(n_layer=12, n_embd=768, block_size=1024, batch_tokens=16 * 1024, batch_size=16,
                                        vocab_size=50304)
    return small(setting, '', **dict(dtype='auto', compile=True, bias=False, tie_weights=True) | shape | changes)


def deep(setting, **changes):
    """The deep 1.5B model of arXiv:2505.01618, 179 layers x 832, one sequence a step; tiny in a dry run."""
    shape = {} if setting.dry else dict(n_layer=179, n_embd=832, block_size=2048)
    config = large(setting, **dict(bias=True, tie_weights=False) | shape | changes)
    return replace(config, batch_size=1, batch_tokens=config.block_size)


def training_step(model, optimizer, data, config, machine):
    """A function that takes one training step on its next batch and returns the loss."""
    c, steps = config, iter(range(10**9))

    def take_step():
        starts = data.train_starts(c.seed, next(steps), c.batch_tokens // c.block_size, c.block_size)
        return update(model, optimizer, micro_losses(model, data, starts, c.batch_size, c.block_size, machine))[0]
    return take_step


# -----------------------------------------------------------------------------
# Kernels
def kind_of(kernel):
    return next((kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words)), 'others')


def kernel_times(spans):
    """({kind: time}, time in which any kernel ran) of kernels (start, end, name)."""
    times, busy, until = {}, 0.0, 0.0
    for begin, end, name in sorted(spans):
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + end - begin
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return times, busy


def profiled(setting, take_step, device, steps=3):
    """Figures of what the device does in training steps: its idle share, and ms per step by kind of kernel."""
    on_gpu = device.type == 'cuda'
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        started = synchronized_time(device)
        for _ in range(steps):
            take_step()
        seconds = synchronized_time(device) - started
    spans = [(event.time_range.start, event.time_range.end, event.name) for event in recorded.events()  # in us
             if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU) and not event.is_user_annotation]
    if not spans:
        yield Figure('kernels', 'the profiler saw none: it may need permission for performance counters')
        return
    times, busy = kernel_times(spans)
    yield setting.speed('idle, fraction', 1 - busy / 1e6 / seconds)
    for kind, us in sorted(times.items(), key=lambda item: -item[1]):
        yield setting.speed(f'{kind}, ms per step', us / 1e3 / steps)


# -----------------------------------------------------------------------------
# Stages
def env(setting):
    """Versions, the device, the kernels of attention that PyTorch chooses, and two rates."""
    machine = set_up(setting.device, 'auto')
    device, dtype = machine.device, machine.dtype
    yield Figure('device', hardware_name(device))
    commit = subprocess.run(['git', '-C', str(ROOT), 'describe', '--always', '--dirty'], capture_output=True, text=True)
    for name, value in {'nanoP': commit.stdout.strip() or 'no git', 'python': sys.version.split()[0],
                        'torch': torch.__version__, 'CUDA': torch.version.cuda,
                        'cuDNN': torch.backends.cudnn.version(), 'dtype': machine.dtype_name}.items():
        yield Figure(name, value)
    if device.type == 'cuda':
        yield Figure('memory, GB', torch.cuda.get_device_properties(device).total_memory / 1e9)
    for name, queries, kv_heads, dropout in (('training', 256, 4, 0.0), ('shared keys', 256, 2, 0.0),
                                             ('dropout', 256, 4, 0.2), ('sampling', 1, 4, 0.0)):
        q, k = (torch.zeros(2, heads, T, 64, device=device, dtype=dtype, requires_grad=queries > 1)
                for heads, T in ((4, queries), (kv_heads, 256)))
        chosen = torch._fused_sdp_choice(q, k, k, None, dropout, queries > 1, scale=1.0, enable_gqa=kv_heads < 4)
        yield Figure(f'attention in {name}', SDPBackend(chosen).name)
    size, repeats = (64, 1) if setting.dry else (8192, 20)
    a, large_one = torch.randn(size, size, device=device, dtype=dtype), torch.empty(size * size * 8, device=device)
    for name, action, amount in (('product, TFLOP/s', lambda: a @ a, 2e-12 * size ** 3),
                                 ('copy, GB/s', large_one.clone, 2e-9 * large_one.nbytes)):
        action()
        started = synchronized_time(device)
        for _ in range(repeats):
            action()
        yield setting.speed(name, amount * repeats / (synchronized_time(device) - started))


def compiled(setting):
    """The 124M model compiled: seconds, graphs, recompilation, its loss against the uncompiled one; its kernels."""
    torch.compiler.reset()
    counters.clear()
    config = large(setting)
    machine, data = set_up(config.device, config.dtype), Dataset(config.dataset)
    yield Figure('torch.compile', why_not_compile(machine.device) or 'works', wanted='works')
    counters.clear()  # that was a graph, too
    model = build_model(config, data).to(machine.device)
    starts = data.train_starts(config.seed, 0, config.batch_tokens // config.block_size, config.block_size)
    with torch.no_grad():
        expected = sum(micro_losses(model, data, starts, config.batch_size, config.block_size, machine)).item()
    parallel.prepare(model, config, machine)
    optimizer = make_optimizer(model, config, machine.device.type)
    take_step = training_step(model, optimizer, data, config, machine)

    started = time.perf_counter()
    loss = take_step()
    yield setting.speed('first step, s', time.perf_counter() - started)
    yield Figure('loss against the uncompiled one', loss / expected - 1, 2e-3)

    def graphs():
        """Graphs after a validation and two more steps."""
        evaluate(model, data, config, config.batch_size, machine)
        take_step(), take_step()
        return counters['stats']['unique_graphs']
    first = graphs()
    yield Figure('graphs', first, 4)
    yield Figure('graphs compiled later', graphs() - first, 0)
    yield from profiled(setting, take_step, machine.device)


@dataclass
class OneGPU:
    """What measure_memory() wants to know of bench.py's keys."""
    gpus: int = 1
    gpus_per_host: int = 1


def memory(setting):
    """The peak memory of three steps against the plan, in three processes at once."""
    block_size, wider = large(setting).block_size, dict(n_embd=256) if setting.dry else {}  # a tiny run shows nothing
    configs = {'124M': large(setting, batch_size=8, batch_tokens=8 * block_size, **wider),
               'deep, one sequence': deep(setting, **wider)}
    configs['124M, recomputed'] = replace(configs['124M'], recompute=True)
    with ThreadPoolExecutor() as pool:
        pairs = pool.map(lambda config: measure_memory(config, OneGPU()), configs.values())
        for name, (planned, measured) in zip(configs, pairs):
            yield setting.speed(f'peak, GB, {name}', measured / 1e9)
            yield setting.speed(f'plan is off by, {name}', planned / measured - 1, 0.15)


def speed(setting):
    """The 124M model against a peer's, compiled both, in turns."""
    config = large(setting, compile=not setting.dry)
    machine = set_up(config.device, config.dtype)
    with torch.device('meta'):
        model = GPT(GPTConfig.of(config, vocab_size=config.vocab_size or 256))
    wanted = {name: spec for name, spec in contestants_of(config, setting.peer, machine, config.compile)
              if spec['kind'] in ('ours', 'peer') and spec['dtype'] == machine.dtype_name
              and spec['config']['compile'] == config.compile}
    with ExitStack() as running:
        ours, *peers = [running.enter_context(closing(Contestant(name, 0.1 if setting.dry else 2.0, **spec)))
                        for name, spec in wanted.items()]
        for contestant in (ours, *peers):
            yield Figure(f'parameters, {contestant.name}', contestant.num_params)
            if contestant.num_params != ours.num_params:
                raise UserError(f'nanoP has {ours.num_params:,} parameters here: these two cannot be compared')
            yield setting.speed(f'first step, s, {contestant.name}', contestant.first_step_s)
        take_turns(3, {contestant.name: contestant.take_turn for contestant in (ours, *peers)})
        tokens_per_s = config.batch_tokens / median(ours.step_s)
        for contestant in (ours, *peers):
            yield setting.speed(f'tokens/s, {contestant.name}', config.batch_tokens / median(contestant.step_s))
            yield setting.speed(f'peak, GB, {contestant.name}', contestant.peak_bytes / 1e9)
        yield setting.speed('fraction of peak', of_peak(model, tokens_per_s, machine))
        for peer in peers:
            yield setting.speed('times as fast as the peer', faster_by(peer.step_s, ours.step_s)['nanop_is_faster_by'])
        if not peers:
            yield Figure('times as fast as the peer', 'not compared: no --peer')


def of_peak(model, tokens_per_s, machine):
    """The fraction of the device's peak FLOP/s that training reaches, or None for a device whose peak is not known."""
    peak = peak_flops(machine.device, machine.dtype)
    return flops_per_token(model) * tokens_per_s / peak if peak else None


def compile_parts(model, parts):
    torch.compiler.reset()
    for module in model.modules():
        module._compiled_call_impl = None  # compile() has set it
    for part in parts:
        part.compile(dynamic=False)


def deep_speed(setting):
    """The deep model at several batch sizes, compiled as nanoP does it; at the largest also by parts of its blocks."""
    config = deep(setting)
    machine, data = set_up(config.device, config.dtype), Dataset(config.dataset)
    with torch.device('meta'):
        model = GPT(GPTConfig.of(config, vocab_size=config.vocab_size or data.vocab_size))
    model.to_empty(device=machine.device)
    with torch.no_grad():
        for p in model.parameters():  # init_weights() draws on the CPU, which takes long for so many
            p.normal_(0.0, 0.02)
    optimizer, best = make_optimizer(model, config, machine.device.type), 0.0
    forms = {'as nanoP compiles it': None,
             'parts of blocks': [part for block in model.transformer.h for part in (block.attn, block.mlp)]}
    steps = 1 if setting.dry else 5
    for form, B in ((form, B) for B, names in ((4, forms), (2, [*forms][:1]), (1, [*forms][:1])) for form in names):
        c, name = replace(config, batch_size=B, batch_tokens=B * config.block_size), f'B = {B}, {form}'
        compile_parts(model, forms[form] or [])
        if forms[form] is None:
            parallel.prepare(model, c, machine)
        take_step = training_step(model, optimizer, data, c, machine)
        try:
            take_step(), take_step()
            if machine.device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            started = synchronized_time(machine.device)
            for _ in range(steps):
                take_step()
            seconds = (synchronized_time(machine.device) - started) / steps
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            yield Figure(f'ms per step, {name}', 'out of memory')
            continue
        yield setting.speed(f'ms per step, {name}', 1e3 * seconds)
        yield setting.speed(f'peak, GB, {name}', peak_memory_bytes(machine.device) / 1e9)
        reached = of_peak(model, c.batch_tokens / seconds, machine)
        yield setting.speed(f'fraction of peak, {name}', reached)
        if forms[form] is None:
            best = max(best, reached or 0)
            yield setting.speed('fraction of peak', best or None)
        if B == 4:
            for figure in profiled(setting, take_step, machine.device, steps=1):
                yield figure._replace(name=f'{figure.name}, {name}')


def stack(setting):
    """Steps per second of all runs of a stack together: 2 layers x 128."""
    shape = dict(dtype='float32') if setting.dry else dict(dtype='auto', n_layer=2, n_embd=128, base_n_embd=128)
    config = small(setting, '', max_iters=2 if setting.dry else 50, **shape)
    train_stack([config])  # warm-up
    for K in (1, 2) if setting.dry else (1, 8, 32, 64):
        summary = train_stack([replace(config, seed=seed) for seed in range(K)])[0]
        yield setting.speed(f'steps of a run/s, K = {K}', summary['steps'] / summary['seconds'])


def tests(setting):
    """pytest -m gpu: the correctness stages once more, one after the other in one process."""
    if setting.dry or not find_spec('pytest'):
        raise NotRun('a dry run has no GPU' if setting.dry else 'pytest is not installed')
    process = start(setting, 'tests', '-m', 'pytest', '-q', '-m', 'gpu', 'tests/test_gpu.py')
    yield Figure('exit code', process.wait(), wanted=0, note=(output(setting, 'tests').splitlines() or [''])[-1])
