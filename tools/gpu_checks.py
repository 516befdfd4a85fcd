"""
The correctness stages of gpu_check.py. Each is a generator of Figures; `pytest -m gpu` runs the same functions.

They compare a GPU with the CPU, one kernel with another, a resumed run with an undisturbed one. In a dry run the same
code compares the CPU with itself.
"""
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import flat
from nanop import checkpoint, parallel
from nanop.dataset import Dataset
from nanop.files import read_csv
from nanop.layers import causal_attention
from nanop.machine import Machine, set_up, why_not_compile
from nanop.run_log import read_metrics
from tools.gpu_stage import ROOT, Figure
from tools.stack import train_stack, why_not_stack
from train import TrainConfig, build_model, make_optimizer, micro_losses, train, update

VARIANTS = {
    'completep': {},
    'gpt2, tied, no biases': dict(parameterization='gpt2', tie_weights=True, bias=False),
    'rope, shared keys, qk_norm, swiglu': dict(pos='rope', n_kv_head=1, qk_norm=True, norm='rmsnorm',
                                               activation='swiglu'),
    'alibi, relu2': dict(pos='alibi', activation='relu2'),
    'density': dict(parameterization='completep_supar', density=0.25),
    'sp, no positions, no gains': dict(parameterization='sp', pos='none', norm_gain=False, activation='relu'),
    'depth_mup, factor in the weights': dict(parameterization='depth_mup', unembed_form='weights', attn_scale='1/d'),
    'recomputed': dict(recompute=True),
}
STACKED = 'completep', 'gpt2, tied, no biases', 'alibi, relu2', 'density'
# relative differences in float32; AdamW makes large steps of small gradients, so theirs grow about a hundredfold
SAME_LOSS, SAME_GRADIENT, SAME_UPDATE = 1e-5, 1e-4, 1e-2
DETERMINISTIC = """
import runpy, sys, torch
torch.use_deterministic_algorithms(True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def small(setting, name, **changes):
    """The config of a small run that writes into the folder `name`; '': nothing is written."""
    n_embd, head_dim, block_size = (32, 16, 16) if setting.dry else (256, 64, 128)
    return replace(TrainConfig(
        out_dir=name and f'{setting.folder}/{name}', dataset=setting.dataset, device=setting.device, dtype='float32',
        compile=False, n_layer=4, n_embd=n_embd, head_dim=head_dim, base_n_embd=n_embd // 2, base_head_dim=head_dim,
        block_size=block_size, batch_tokens=8 * block_size, batch_size=4, learning_rate=2e-3, weight_decay=0.1,
        eval_interval=0, eval_tokens=8 * block_size, log_interval=1), **changes)


def flags(config):
    usual = asdict(TrainConfig())
    return [f'--{key}={value}' for key, value in flat(asdict(config)).items() if value != usual.get(key, 1.0)]


def start(setting, log, *command, **env):
    """Start `python command` from the root, with its output in the file `log`. Returns the process."""
    with open(f'{setting.folder}/{log}', 'w') as file:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                env={**os.environ, **env})


def output(setting, log):
    return Path(setting.folder, log).read_text(errors='replace')


def finish(setting, log, process, codes=(0,)):
    """Wait for a process of start(). Returns its exit code. Raises RuntimeError for one that is not in `codes`."""
    code = process.wait()
    if code not in codes:
        lines = output(setting, log).strip().splitlines() or ['']
        raise RuntimeError(f"{log} ended with exit code {code}: {next((x for x in lines if 'Error' in x), lines[-1])}")
    return code


# -----------------------------------------------------------------------------
# Parity
def off(found, expected):
    """The largest difference of two tensors, relative to the largest entry of `expected`."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def worst(found, expected):
    """(largest off() of two dicts of tensors, its key)"""
    return max((off(found[key], expected[key]), key) for key in expected)


def whole(tensors):
    return torch.cat([x.flatten() for x in tensors.values()])


def three_steps(config, machine, data, weights):
    """Losses before and after each of three optimizer steps, gradients before them, and how they move the weights."""
    model = build_model(config, data)
    model.load_state_dict(weights)
    parallel.prepare(model, config, machine)
    optimizer = make_optimizer(model, config, machine.device.type)

    def losses(step):
        starts = data.train_starts(config.seed, step, config.batch_size, config.block_size)
        return micro_losses(model, data, starts, config.batch_size, config.block_size, machine)

    for loss in losses(0):
        loss.backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.weights()}
    optimizer.zero_grad()
    found = torch.tensor([update(model, optimizer, losses(step))[0] for step in range(4)])
    return found, gradients, {name: p.detach().cpu() - weights[name] for name, p in model.weights()}


def parity_of_variants(setting, machine):
    data, cpu = Dataset(setting.dataset), torch.device('cpu')
    for name, changes in VARIANTS.items():
        # a large eps: noise in a gradient that should be zero, that of a key's bias, must not become a whole step
        config = small(setting, '', eps=1e-4, **changes)
        weights = build_model(config, data).state_dict()
        losses, gradients, moved = three_steps(config, Machine(cpu, torch.float32), data, weights)
        for kernel, chosen in (('default', nullcontext()), ('MATH', sdpa_kernel(SDPBackend.MATH))):
            with chosen:
                losses_2, gradients_2, moved_2 = three_steps(config, machine, data, weights)
            yield Figure(f'losses, {name}, {kernel}', (losses_2 / losses - 1).abs().max().item(), SAME_LOSS)
            gradient, which = worst(gradients_2, gradients)
            yield Figure(f'gradients, {name}, {kernel}', gradient, SAME_GRADIENT, note=which)
            yield Figure(f'weights after 3 steps, {name}, {kernel}', off(whole(moved_2), whole(moved)), SAME_UPDATE)
        error, on_cpu = ((whole(three_steps(config, Machine(device, torch.bfloat16), data, weights)[1])
                          - whole(gradients)).norm() for device in (machine.device, cpu))
        yield Figure(f"error of bf16 gradients / the CPU's, {name}", (error / on_cpu).item(), 2.0)


def attention_and_gradients(attention, q, k, v):
    """Outputs and gradients by name, for the loss sum of cos."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    y = attention(q, k, v)
    y.float().cos().sum().backward()
    return dict(y=y, dq=q.grad, dk=k.grad, dv=v.grad)


def parity_of_attention(setting, device):
    def qkv(T, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(2, 4, T, 64, generator=generator).to(device, dtype) for _ in range(3)]

    why_not = why_not_compile(device)
    alibi = partial(causal_attention, scale=1 / 8, alibi=True)
    for T in [] if why_not else (16,) if setting.dry else (64, 256, 1000):
        torch.compiler.reset()
        error, which = worst(attention_and_gradients(torch.compile(alibi, dynamic=False), *qkv(T)),
                             attention_and_gradients(alibi, *qkv(T)))
        yield Figure(f'compiled ALiBi against its mask, T = {T}', error, SAME_GRADIENT, note=which)
    yield Figure('torch.compile', why_not or 'works', wanted='works')

    causal = partial(causal_attention, scale=1 / 8)
    inputs = qkv(64 if setting.dry else 1024, torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        exact = attention_and_gradients(causal, *(x.float() for x in inputs))
    for kernel in ('FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'CUDNN_ATTENTION', 'MATH'):
        try:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                error, which = worst(attention_and_gradients(causal, *inputs), exact)
        except RuntimeError as refusal:
            if 'No available kernel' not in str(refusal):
                raise
            yield Figure(f'bf16 {kernel} against float32', 'not available here')
        else:
            yield Figure(f'bf16 {kernel} against float32', error, 0.02, note=which)  # 5 roundings to 8 bits


def dropout_rate(setting, machine, rate=0.2):
    """The fraction of attention weights that a model drops: keys and queries are zero, so all weights are equal, and
    values and projection are the identity, so the output is the weights."""
    size = 64
    config = small(setting, '', dropout=rate, bias=False, n_layer=1, n_embd=size, head_dim=size, base_n_embd=size,
                   block_size=size, batch_tokens=size)
    model = build_model(config, Dataset(setting.dataset))
    parallel.prepare(model, config, machine)
    attn, eye = model.train().transformer.h[0].attn, torch.eye(size, device=machine.device)
    attn.resid_dropout.p = 0.0
    torch.manual_seed(1)
    with torch.no_grad():
        attn.c_attn.weight.copy_(torch.cat((0 * eye, 0 * eye, eye)))
        attn.c_proj.weight.copy_(eye)
    with machine.autocast():  # with gradients, as in training: PyTorch's choice of a kernel may depend on it
        weights = attn(eye.expand(1024, size, size))  # (B, T, C) = (B, queries, keys)
    return (weights[:, torch.ones_like(eye).tril().bool()] == 0).float().mean().item()


def parity(setting):
    """The model on the device against the CPU; the kernels of attention against each other; the rate of dropout."""
    machine = set_up(setting.device, 'float32')  # 'highest': no TF32
    yield from parity_of_variants(setting, machine)
    yield from parity_of_attention(setting, machine.device)
    for dtype in (torch.float32, torch.bfloat16):
        found = dropout_rate(setting, machine._replace(dtype=dtype))
        yield Figure(f'dropout of 0.2 is off by, {dtype}', found - 0.2, 0.002)  # 7 standard errors; 3/16 is 0.0125 off


# -----------------------------------------------------------------------------
# Training without a compiler
def eager(setting):
    """Two steps, a checkpoint and two more steps of every variant and optimizer; stacks; the laziness check."""
    more = {'muon': dict(optimizer='muon'), 'sgd': dict(optimizer='sgd', learning_rate=1e-3),
            'dropout': dict(dropout=0.1), 'float16': dict(dtype='float16')}
    for name, changes in (VARIANTS | more).items():
        if setting.device == 'cpu' and name == 'float16':
            yield Figure('float16', 'needs CUDA')
            continue
        config = small(setting, name, **{'dtype': 'auto', 'max_iters': 2, **changes})
        train(config)
        summary = train(replace(config, init_from='resume', max_iters=4))
        yield Figure(f'validation loss after 2 + 2 steps, {name}', summary['val_loss'], 2 * math.log(256))
        yield Figure(f'steps, {name}', summary['steps'], wanted=4)
    for name in STACKED:
        for dtype, most in (('float32', 1e-4), ('bfloat16', 0.02)):
            config = small(setting, '', dtype=dtype, max_iters=4, **VARIANTS[name])
            runs = [replace(config, seed=seed, learning_rate=seed * 1e-3) for seed in range(1, 5)]
            what, why_not = f'stack of 4 against single runs, {name}, {dtype}', why_not_stack(config)
            if why_not:
                yield Figure(what, f'not stacked: {why_not}')
                continue
            pairs = zip(train_stack(runs), map(train, runs))
            yield Figure(what, max(abs(a['val_loss'] / b['val_loss'] - 1) for a, b in pairs), most)
    check = start(setting, 'laziness', 'coord_check.py', '--axes=laziness', '--depths=2,4,8', '--n_embd=64',
                  '--seeds=2', f'--dataset={setting.dataset}', f'--device={setting.device}',
                  f'--out_dir={setting.folder}/laziness_check')
    code = finish(setting, 'laziness', check, codes=(0, 1, 4))
    verdict = {0: 'PASS', 1: 'FAIL', 4: 'INCONCLUSIVE'}[code]
    yield Figure('laziness: fails', verdict == 'FAIL', wanted=False, note=verdict)


def sampling(setting):
    """Tokens with the cache of keys and values, and without it, in float32; tokens per second."""
    shape = dict(n_layer=2, block_size=16) if setting.dry else dict(n_layer=12, n_embd=768, block_size=256)
    for dtype in ('float32', 'bfloat16'):
        csv, length = f'{setting.folder}/{dtype}.csv', 8 if setting.dry else 200
        bench = start(setting, dtype, 'bench.py', '--sample', '--turns=1', '--batch_sizes=1', f'--lengths={length}',
                      f'--out_csv={csv}', *flags(small(setting, '', dtype=dtype, **shape)))
        finish(setting, dtype, bench)
        ours = read_csv(csv)[0]
        if dtype == 'float32':
            yield Figure('tokens that differ without the cache', 1 - float(ours['same_tokens_frac']), 0.0)
        yield setting.speed(f'sampled tokens/s, {dtype}', float(ours['tokens_per_s']))


# -----------------------------------------------------------------------------
# Resuming, and several processes
def wait_for_step(setting, name, process, step, timeout_s=300):
    """Wait until a run has logged this step. Raises RuntimeError if it ends first or takes too long."""
    end = time.monotonic() + timeout_s
    while not any(int(row['step']) >= step for row in read_metrics(f'{setting.folder}/{name}')):
        if process.poll() is not None or time.monotonic() > end:
            lines = output(setting, f'{name}.log').strip().splitlines() or ['']
            raise RuntimeError(f'{name} did not reach step {step}: {lines[-1]}')
        time.sleep(0.01)


def weights_of(config):
    return checkpoint.load_weights(config.out_dir)[0]


def resume(setting):
    """A run that SIGTERM stops and that goes on must end bit for bit as an undisturbed one, with deterministic
    algorithms, in float32 and with dropout."""
    straight = small(setting, 'straight', max_iters=300, dropout=0.1)
    stopped = replace(straight, out_dir=f'{setting.folder}/stopped')

    def launch(config, log):
        return start(setting, log, '-c', DETERMINISTIC, 'train.py', *flags(config), CUBLAS_WORKSPACE_CONFIG=':4096:8')

    undisturbed, process = launch(straight, 'straight.log'), launch(stopped, 'stopped.log')
    wait_for_step(setting, 'stopped', process, 10)
    process.send_signal(signal.SIGTERM)
    yield Figure('exit code after SIGTERM', process.wait(), wanted=143)
    steps = checkpoint.newest(stopped.out_dir)[1]['step']
    yield Figure('stopped at step', steps)
    finish(setting, 'rest.log', launch(replace(stopped, init_from='resume'), 'rest.log'))
    finish(setting, 'straight.log', undisturbed)
    expected, found = weights_of(straight), weights_of(stopped)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    yield Figure('tensors that differ', len(different), wanted=0, note=', '.join(different[:3]))


def children(pid):
    """The processes that `pid` has started, on Linux."""
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended
            if int(stat.read_text().rpartition(')')[2].split()[1]) == pid:
                yield int(stat.parent.name)


def curve_off(found, expected):
    """The largest difference of losses in the logs of two runs, relative."""
    rows, others = read_metrics(found.out_dir), read_metrics(expected.out_dir)
    assert [row['step'] for row in rows] == [row['step'] for row in others], 'the logs have other steps'
    return max(abs(float(row[key]) / float(other[key]) - 1) for row, other in zip(rows, others)
               for key in ('loss', 'val_loss') if other[key])


def processes(setting):
    """One process under torchrun, in every kind of parallelism, against the curve without it; a killed run."""
    plain = small(setting, 'plain', max_iters=20)
    sparse = small(setting, 'sparse', max_iters=20, **VARIANTS['density'])
    undisturbed = replace(plain, out_dir=f'{setting.folder}/undisturbed', max_iters=400, eval_interval=50)
    runs = {'ddp': (plain, {}), 'fsdp, density': (sparse, dict(parallel='fsdp'))}
    if not setting.dry:  # tests/test_parallel.py has the others on the CPU
        runs |= {'ddp, density': (sparse, {}), 'fsdp': (plain, dict(parallel='fsdp')),
                 'hsdp': (plain, dict(parallel='hsdp')),
                 'fsdp, compiled': (plain, dict(parallel='fsdp', compile=True))}

    def launch(config, log, *torchrun):
        return start(setting, log, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1', *torchrun,
                     'train.py', *flags(config))

    killed = replace(undisturbed, out_dir=f'{setting.folder}/killed', init_from='auto')
    victim = launch(killed, 'killed.log', '--max-restarts=1')
    started = {}
    for name, (expected, changes) in runs.items():
        config = replace(expected, out_dir=f'{setting.folder}/{name}', **changes)
        started[name] = config, launch(config, f'{name}.log')
    wait_for_step(setting, 'killed', victim, 120)
    for pid in children(victim.pid):
        os.kill(pid, signal.SIGKILL)
    for config in (plain, sparse, undisturbed):
        train(config)
    for name, (config, process) in started.items():
        # torch 2.11 cannot shard masks: there a refusal is right, a wrong curve or a crash is not
        code = finish(setting, f'{name}.log', process, codes=(0, 1) if name == 'fsdp, density' else (0,))
        refusal = [line for line in output(setting, f'{name}.log').splitlines() if line.startswith('error: ')]
        if code and not refusal:
            finish(setting, f'{name}.log', process)  # raises
        yield Figure(f'curve of {name}', refusal[0]) if code else \
            Figure(f'curve of {name}', curve_off(config, runs[name][0]), 1e-4)
    finish(setting, 'killed.log', victim)
    yield Figure('starts from a checkpoint after kill -9', output(setting, 'killed.log').count('resuming '), wanted=1)
    ends = [float(read_metrics(config.out_dir)[-1]['val_loss']) for config in (killed, undisturbed)]
    yield Figure('validation loss at the end of the killed run, off by', ends[0] / ends[1] - 1, 0.01)
