"""Tests of bench.py: the plan against figures by hand, against what autograd saves and against a run; benchmarks."""
import json
import math
import platform
import queue
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import sweep
from bench import BenchConfig, append, bench_prepare, bench_sample, bench_step, bench_sweep, read_bench
from model import GPT, GPTConfig
from nanop import parallel
from nanop.dataset import Dataset
from nanop.errors import UserError
from nanop.machine import Machine, flops_per_token
from tools import shapes
from tools.bench_worker import PARTS, timed_steps
from tools.contestants import contestants_of, print_table, timed
from tools.plan import activation_bytes, measure_memory, memory, meta_model, print_plan, run_and_measure, si, traffic
from train import TrainConfig, read_config

ROOT = Path(__file__).resolve().parents[1]
DEEP = [str(ROOT / 'config' / 'completep_1p5b_deep.py'), '--gpus=64', '--vocab_size=50304']


def test_the_deep_model_of_the_paper_on_64_gpus(capsys):
    """By hand: N = 832, L = 179, T = 2048, V = 50304, untied, with biases."""
    settings, config = read_bench(['--plan', *DEEP, '--parallel=fsdp'])
    P_block = 179 * (12 * 832**2 + 9 * 832)
    P = P_block + 179 * 4 * 832 + 2 * 832 + 2 * 50304 * 832 + 2048 * 832
    print_plan(config, settings)
    out = capsys.readouterr().out
    assert f'parameters                      {P:,}' in out
    flops = 6 * (P - 50304 * 832 - 2048 * 832) + 12 * 179 * 832 * 2048
    tokens = round(20 * P / 2**20) * 2**20
    assert f'{tokens:,} in' in out and f'total FLOPs                     {flops * tokens / 1e18:.3g} E' in out
    assert f'{flops * tokens / (64 * 989e12 * 0.4) / 86400:.3g} on 64 GPU(s) of 989 TFLOP/s' in out
    model, _ = meta_model(config)
    rows = memory(model, config, settings, 2)
    assert rows['weights'] == pytest.approx(4 * P / 64) and rows['optimizer state'] == pytest.approx(8 * P / 64)
    assert rows['activations'] == pytest.approx(4 * 2048 * (179 * 36 * 832 + 6 * 832 + 10 * 50304))
    assert rows['activations, --recompute=True'] == pytest.approx(
        4 * 2048 * (179 * 4 * 832 + 36 * 832 + 6 * 832 + 10 * 50304))
    # sent in each of two micro-batches: the blocks' weights twice in bf16, the root's weights and all gradients once in
    # float32; 1/64 stays on a GPU
    sent = 2 * (2 * 2 * P_block + 4 * (P - P_block) + 4 * P) * 63 / 64
    assert traffic(model, config, settings, 2) == pytest.approx(sent)


def test_the_deep_model_fits_the_hardware_that_its_config_names():
    """8 GPUs with 80 GB, without recomputation."""
    settings, config = read_bench([*DEEP[:1], '--plan', '--vocab_size=50304', '--gpus=8', '--parallel=fsdp'])
    assert not config.recompute
    rows = memory(meta_model(config)[0], config, settings, 2)
    assert 45e9 < sum(rows.values()) - rows['activations, --recompute=True'] < 60e9


def test_memory_and_traffic_by_kind_of_parallelism():
    def of(kind, gpus, **changes):
        settings, config = read_bench([*DEEP, f'--gpus={gpus}', f'--parallel={kind}', '--batch_size=1'])
        model, _ = meta_model(replace(config, **changes))
        rows = memory(model, replace(config, **changes), settings, 2)
        return rows, traffic(model, config, settings, 2), model.num_params()
    ddp, sent, P = of('ddp', 8)
    assert ddp['weights'] == 4 * P and ddp["DDP's buckets"] == 4 * P and sent == pytest.approx(8 * P * 7 / 8)
    alone, sent, _ = of('ddp', 1)
    assert alone["DDP's buckets"] == 0 and sent == 0
    fsdp, _, _ = of('fsdp', 64)
    hsdp, sent_hsdp, _ = of('hsdp', 64)
    assert hsdp['weights'] == 8 * fsdp['weights']  # sharded over the 8 GPUs of a host
    one_host, sent_fsdp, _ = of('fsdp', 8)
    assert hsdp['weights'] == one_host['weights']
    assert sent_hsdp / 8 == pytest.approx(sent_fsdp / 64 + 8 * P / 8 * 7 / 8)  # per micro-batch: fsdp + between hosts
    sparse, _, _ = of('fsdp', 64, density=0.5, parameterization='completep_supar')
    assert sparse['weights'] == pytest.approx(fsdp['weights'] + 179 * 12 * 832**2 / 64, rel=1e-3)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('n_layer, n_embd, block_size, vocab_size', [(4, 128, 256, 256), (2, 64, 64, 1024)])
def test_activations_are_what_autograd_keeps(dtype, recompute, n_layer, n_embd, block_size, vocab_size):
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_embd=n_embd, head_dim=32))
    if recompute:
        parallel.recompute(model)
    idx, kept = torch.zeros(5, block_size, dtype=torch.long), {}
    not_counted = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {tuple(shape) for p in model.parameters() for shape in (p.shape, p.shape[::-1])}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in not_counted and tuple(x.shape) not in weights:  # weights are counted elsewhere
            kept[storage.data_ptr()] = x, storage.nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), \
            torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
        loss = model(idx, idx)[1]
    product_bytes = 4 if dtype == torch.float32 else 2
    planned = activation_bytes(model, idx.numel(), product_bytes, recompute, cpu_bf16=product_bytes == 2)
    end_bytes = idx.numel() * (n_embd * (4 + product_bytes) + vocab_size * (8 if product_bytes == 4 else 2))
    # the logits are kept until the loss is computed; then their gradient is, in bf16 in the same memory
    found = sum(nbytes for _, nbytes in kept.values()) + product_bytes * vocab_size * idx.numel()
    if recompute:  # plus the block whose forward runs again
        found += (activation_bytes(model, idx.numel(), product_bytes, False, product_bytes == 2) - end_bytes) / n_layer
    assert loss.isfinite() and planned == pytest.approx(found, rel=0.06)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="measure_memory() sets glibc's allocator")
def test_the_plan_holds_for_a_run(data_dir, capsys, monkeypatch):
    monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '')  # measure_memory() sets it; this restores it afterwards
    config = TrainConfig(dataset=data_dir, n_layer=4, n_embd=512, batch_size=4, batch_tokens=2048, dtype='float32',
                         device='cpu')
    planned, measured = measure_memory(config, BenchConfig())
    assert planned == pytest.approx(measured, rel=0.1)
    assert re.search(r'3 steps on cpu, float32, \d+ s: peak .*B, planned .*B: off by [+-]\d+%', capsys.readouterr().out)


def test_on_cuda_the_plan_is_compared_with_what_the_run_takes(monkeypatch):
    """What the tiny model has freed is no part of the libraries' memory. A fake device counts, no CUDA runs."""
    device = dict(kept=8, peak=0)  # GB: a workspace that stays
    monkeypatch.setattr('tools.plan.pick_device', lambda name: torch.device('cuda'))
    monkeypatch.setattr('tools.plan.train',
                        lambda config: device.update(peak=device['kept'] + (3 if config.n_layer == 1 else 20)))
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda _: device['peak'])
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda _: device.update(peak=device['kept']))
    answers = queue.Queue()
    run_and_measure(TrainConfig(), 3, answers)
    assert answers.get() == 20


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *args])
    return bench.main()


def test_the_command_and_its_errors(monkeypatch, capsys):
    assert run_main(monkeypatch, '--plan', *DEEP, '--parallel=fsdp') is None
    out = capsys.readouterr().out
    assert 'total    ' in out and 'with --recompute=True' in out and 'estimated for the default' not in out
    run_main(monkeypatch, '--plan', '--pos=rope', '--activation=swiglu')
    assert 'default architecture, without the effect of activation, pos' in capsys.readouterr().out
    for args, message in ((('--plan', '--gpus=0'), 'gpus=0 is not allowed'),
                          (('--plan', '--gpus=3'), 'which 3 processes cannot share'),
                          (('--plan', '--gpus=12', '--parallel=hsdp', '--batch_tokens=3072'),
                           "gpus=12 is not allowed: parallel='hsdp' needs a multiple of gpus_per_host=8"),
                          (('--plan', '--optimizer=muon', '--density=0.5'), "'muon' has no rule for density=0.5"),
                          (('--plan', '--n_layer=2,4'), 'n_layer=[2, 4] is a list'),
                          (('--plan', '--lr_mult.embedding=1,2'), 'lr_mult.embedding=[1.0, 2.0] is a list'),
                          (('--plan', '--n_embd=100'), 'n_embd=100 is not allowed: use a multiple of head_dim=64'),
                          (('--measure=True',), 'measure=True is not allowed: it goes with --plan'),
                          (('--text=a.md',), "text='a.md' is not allowed: use a .txt file"),
                          (('--peer=nowhere',), "peer='nowhere' has no model.py"), (('--turns=0',), 'turns=0 is not'),
                          (('--sweep', '--sample'), 'choose one of'), (('--lengths=0',), "'0' is not a list"),
                          (('--dataset=nowhere',), 'no dataset in')):
        with pytest.raises(UserError, match=re.escape(message)):
            run_main(monkeypatch, *args)
    result = subprocess.run([sys.executable, ROOT / 'bench.py', '--plan', '--gpus=0'], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith('error: gpus=0') and 'Traceback' not in result.stderr


# -----------------------------------------------------------------------------
# Shapes of equal size
@pytest.mark.parametrize('params, changes', [
    (2e6, dict(head_dim=16, vocab_size=256)), (1e8, dict(vocab_size=50304, head_dim=128)),
    (3e7, dict(tie_weights=True)),
    (3e7, dict(n_kv_head=2, activation='swiglu', pos='rope', norm='rmsnorm', bias=False))])
def test_shapes_have_the_size_and_the_parameters_of_our_model(params, changes, monkeypatch):
    monkeypatch.setattr(shapes, 'product_rate', lambda config, machine: 1e12)
    config = TrainConfig(**dict(vocab_size=4096) | changes)
    found = shapes.equal_shapes(config, params)
    assert len(found) >= 5
    assert [c.n_embd for c in found] == sorted({c.n_embd for c in found})  # from deep to wide
    assert all(c.n_embd % c.head_dim == 0 and c.n_layer <= c.n_embd for c in found)
    settings = BenchConfig(shapes=True, params=params, tokens=20 * params)
    for c in found:
        with torch.device('meta'):
            model = GPT(GPTConfig.of(c))
        exact = sum(p.numel() for p in model.parameters())
        assert abs(exact / params - 1) <= shapes.TOLERANCE
        row = shapes.shape_row(c, settings, Machine(torch.device('cpu'), torch.float32), {})
        assert row['params'] == exact and row['flops'] == flops_per_token(model) * 20 * params
        assert row['tokens_per_param'] == pytest.approx(20 * params / exact) and row['evidence'] == 'none'
        assert row['params_in_blocks'] == sum(p.numel() for name, p in model.named_parameters()
                                              if '.attn.' in name or '.mlp.' in name)


def test_a_shape_of_each_half_octave_that_is_nearest_to_the_size():
    """Against all shapes, with the parameters counted by hand."""
    config, params, best = TrainConfig(head_dim=8, vocab_size=64, block_size=32), 3_000_000, {}
    for n_embd in range(8, 801, 8):
        others, layer = (2 * 64 + 32 + 2) * n_embd, 12 * n_embd**2 + 13 * n_embd
        error, n_layer = min((abs((others + n_layer * layer) / params - 1), n_layer) for n_layer in range(1, 400))
        if error <= 0.05 and n_layer <= n_embd:
            key = round(2 * math.log2(n_embd / n_layer))
            best[key] = min(best.get(key, (1,)), (error, n_layer, n_embd))
    assert len(best) >= 5
    found = [(c.n_layer, c.n_embd) for c in shapes.equal_shapes(config, params)]
    assert found == [best[key][1:] for key in sorted(best)]


def test_the_evidence_is_read_from_the_results(tmp_path, monkeypatch):
    found, largest = shapes.evidence_on('completep')
    assert largest > 0 and found['depth'][1] >= 16  # config/sweep_depth.py: 2 to 32 layers
    assert shapes.evidence_on('gpt2') == ({}, 0)
    (tmp_path / 'sweep_a').mkdir()
    base = dict(base_n_layer=2, base_n_embd=32)
    (tmp_path / 'sweep_a' / 'sweep.json').write_text(json.dumps(dict(base=base, search='points', differ=[])))
    (tmp_path / 'sweep_a' / 'trials.csv').write_text(
        'n_layer,n_embd,parameterization,learning_rate,val_loss,params\n'
        '2,32,completep,0.1,2.0,1000\n8,64,completep,0.1,2.0,3000\n64,512,sp,0.1,2.0,9000\n')
    monkeypatch.setattr(shapes, 'RESULTS', tmp_path)
    found, largest = shapes.evidence_on('completep')
    assert found == {'width': (1, 2), 'depth': (1, 4), 'N:L': (8, 16)} and largest == 3000
    settings, machine = BenchConfig(shapes=True, params=1e6, tokens=1), Machine(torch.device('cpu'), torch.float32)
    for n_layer, n_embd, expected in ((8, 64, 'width, depth, N:L'), (16, 128, 'N:L'), (2, 64, 'width, depth'),
                                      (16, 16, 'none')):
        config = TrainConfig(n_layer=n_layer, n_embd=n_embd, head_dim=16, vocab_size=64, **base)
        assert shapes.shape_row(config, settings, machine, found)['evidence'] == expected


def test_the_shapes_are_listed_and_measured(data_dir, monkeypatch, capsys, tmp_path):
    args = ('--shapes', '--params=2e5', '--tokens=1e6', f'--dataset={data_dir}', '--device=cpu', '--dtype=float32',
            '--head_dim=8', '--block_size=16', '--batch_tokens=64', '--batch_size=2', f'--out_csv={tmp_path}/a.csv')
    monkeypatch.setattr(bench, 'equal_shapes', lambda config, params: shapes.equal_shapes(config, params)[-2:])
    run_main(monkeypatch, *args)
    out = capsys.readouterr().out
    assert out.count(' estimated ') == 2 and '40% (--mfu)' in out and 'N:L 1 to' in out
    run_main(monkeypatch, *args, '--measure=True', '--turns=1', '--turn_s=0.01')
    out = capsys.readouterr().out
    assert out.count(' measured ') == 2 and 'estimated' not in out
    rows = (tmp_path / 'a.csv').read_text().splitlines()
    assert len(rows) == 5 and ',estimated,' in rows[1] and ',measured,' in rows[4]

    def out_of_memory(*_):
        raise UserError('nanoP ended: no memory left')
    monkeypatch.setattr(shapes, 'measured_speed', out_of_memory)
    run_main(monkeypatch, *args, '--measure=True')
    out, err = capsys.readouterr()
    assert out.count(' estimated ') == 2 and 'not measured, so it is estimated: nanoP ended: no memory' in err


def test_measured_speed_counts_the_micro_batches_of_a_step(monkeypatch):
    class Fake:
        turns = [[0.0, 1.0, 2.0, 4.0], [0.0, 1.0, 2.0, 4.0]]  # data, forward, backward, optimizer

        def __init__(self, name, turn_s, kind, config, dtype):
            assert config['batch_tokens'] == 2 * 16

        def take_turn(self):
            pass

        def close(self):
            pass
    monkeypatch.setattr(shapes, 'Contestant', Fake)
    config = TrainConfig(block_size=16, batch_tokens=128, batch_size=2)
    assert shapes.measured_speed(config, BenchConfig(), Machine(torch.device('cpu'), torch.float32)) == 128 / 16


def test_shapes_that_are_refused(monkeypatch):
    both = ('--shapes', '--params=1e6', '--tokens=1e6')
    for args, message in ((('--shapes', '--tokens=1e6'), 'params=0.0 is not allowed: use a finite value of at least 1'),
                          (('--shapes', '--params=1e6'), 'tokens=0.0 is not allowed: use a finite value'),
                          (('--shapes', '--params=nan', '--tokens=1'), 'params=nan is not allowed'),
                          (('--params=1e6',), 'params=1000000.0 is not allowed: it goes with --shapes'),
                          (('--plan', '--tokens=5'), 'tokens=5.0 is not allowed: it goes with --shapes'),
                          ((*both, '--gpus=2'), 'gpus=2 is not allowed: --shapes is for one device'),
                          ((*both, '--plan'), 'choose one of --plan, --shapes'),
                          ((*both, f'--peer={ROOT}'), 'it goes with a training step or --sample'),
                          ((*both, '--measure=True', '--vocab_size=256', '--dataset=nowhere'), 'no dataset in'),
                          ((*both, '--vocab_size=50304'), 'params=1e+06 is the size of no shape with n_layer <= n_embd,'
                           ' n_embd a multiple of 64 and a vocabulary of 50,304, from the config')):
        with pytest.raises(UserError, match=re.escape(message)):
            run_main(monkeypatch, *args)


def test_bench_imports_no_database():
    code = ('import sys, bench, tools.plan, tools.shapes, tools.stack, tools.bench_worker, tools.contestants; '
            "print({'optuna', 'sqlalchemy'} & set(sys.modules))")
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == 'set()\n', result.stderr


def test_si():
    assert [si(x, 'B') for x in (0, 999, 1000, 1.5e9, 2.04e20)] == ['0 B', '999 B', '1 kB', '1.5 GB', '204 EB']


# -----------------------------------------------------------------------------
# Benchmarks

PEER = """
import torch, torch.nn as nn, torch.nn.functional as F
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_head: int = 12
    n_embd: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print('a peer that talks')
        assert config.n_head == 2
        self.wte, self.config = nn.Embedding(config.vocab_size, config.n_embd), config
        self.unused = nn.Parameter(torch.zeros(OTHERS))

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.T
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        assert top_k == 1
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx)[0][:, -1:].argmax(-1)), 1)
        return idx
"""


TINY = dict(n_layer=2, n_embd=32, head_dim=16, base_n_embd=32, base_head_dim=16, block_size=16, batch_tokens=64,
            device='cpu', dtype='float32', compile=False)
OTHERS = 24 * 32 * 32 + 28 * 32 + 16 * 32 + 256 * 32  # parameters of our model without the embedding


@pytest.fixture
def peer(tmp_path):
    (tmp_path / 'model.py').write_text(PEER.replace('OTHERS', str(OTHERS)))
    return str(tmp_path)


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('bench_*.py')), ids=lambda path: path.name)
def test_the_shapes_to_measure(path):
    _, config = read_bench([str(path)])
    model, _ = meta_model(config)
    assert path.name == f'bench_{config.n_layer}x{config.n_embd}.py' and model.config.tie_weights
    assert 'Hardware' in path.read_text().splitlines()[1]


def test_one_factor_for_two_roles():
    _, config = read_bench(['--plan', '--lr_mult.hidden_weight+residual_proj=2'])
    assert config.lr_mult == dict(hidden_weight=2.0, residual_proj=2.0)


def fits_results(name, rows):
    """Whether rows can be appended to results/bench/NAME.csv."""
    header = (ROOT / 'results' / 'bench' / f'{name}.csv').read_text().splitlines()[0]
    return header.endswith(',contestant,' + ','.join(list(rows[0])[1:]))


def test_a_step_beside_a_peer(data_dir, peer, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr('bench.why_not_compile', lambda device: 'not in this test')
    monkeypatch.chdir(peer)  # so that `import model` would find the peer's in the working directory
    config = TrainConfig(dataset=data_dir, **TINY)
    # a turn of many steps: in a few of them, next to other tests, one part can take all of a pause
    rows = bench_step(config, BenchConfig(peer='.', turns=3, turn_s=0.3))
    assert [row['contestant'] for row in rows] == ['nanoP', 'nanoP without its rules', 'its products alone',
                                                  'peer, float32']
    assert fits_results('steps', rows)
    for row in rows:
        parts = sum(row[f'{part}_ms'] for part in ('data', 'forward', 'backward', 'optimizer'))
        assert row['step_ms_min'] <= row['step_ms'] <= row['step_ms_max']
        assert parts == pytest.approx(row['step_ms'], rel=0.5)
        assert row['tokens_per_s'] == pytest.approx(64e3 / row['step_ms'])
        assert row['faster_by_min'] <= row['nanop_is_faster_by'] <= row['faster_by_max']
        assert row['faster_by_min'] <= row['step_ms'] / rows[0]['step_ms_min']
        assert row is not rows[0] or row['faster_by_min'] == row['faster_by_max'] == 1
        if row is not rows[2]:
            assert row['peak_mb'] > 100 and row['first_step_s'] > 0.5 and row['compile_s'] == ''
    model, _ = meta_model(config)
    products = 6 * 64 * (2 * 12 * 32 * 32 + 256 * 32) / rows[2]['step_ms'] * 1e3
    assert rows[0]['flops_per_s'] == pytest.approx(64e3 * flops_per_token(model) / rows[0]['step_ms'])
    assert rows[0]['of_products_frac'] == pytest.approx(rows[0]['flops_per_s'] / products)
    assert rows[2]['step_ms'] < rows[0]['step_ms']
    out = capsys.readouterr().out
    assert 'peer, float32' in out and 'a peer that talks' not in out

    for _ in range(2):
        append(tmp_path / 'new' / 'steps.csv', rows, shape='2x32')
    lines = (tmp_path / 'new' / 'steps.csv').read_text().splitlines()
    assert len(lines) == 9 and lines[0].startswith('commit,torch,shape,contestant,tokens_per_s')
    assert lines[1] == lines[5] and torch.__version__ in lines[1]


@pytest.mark.parametrize('batch_size, sizes', [(32, [4]), (2, [2, 2])])
def test_a_step_is_taken_in_micro_batches(data_dir, monkeypatch, batch_size, sizes):
    """A step of many tokens needs the memory of one micro-batch, as in train.py, and is the same step."""
    told, seen, weight = [], [], torch.ones((), requires_grad=True)
    monkeypatch.setattr('bench.contestants_of', lambda config, *others: told.append(config) or [])
    with pytest.raises(StopIteration):  # there is no contestant
        bench_step(TrainConfig(dataset=data_dir, batch_size=batch_size, **TINY), BenchConfig())

    def model(inputs, targets):
        seen.append(inputs)
        return None, weight * inputs.float().mean()

    def take_step(losses):
        for loss in losses:
            loss.backward()
    steps = timed_steps(told[0], Dataset(data_dir), Machine(torch.device('cpu'), torch.float32), model, take_step)
    assert len(next(steps)) == len(PARTS) and [len(inputs) for inputs in seen] == sizes
    assert weight.grad.item() == pytest.approx(torch.cat(seen).float().mean().item())


def test_a_peer_that_cannot_be_compared_is_a_line(data_dir, peer, monkeypatch):
    monkeypatch.setattr('bench.why_not_compile', lambda device: 'not in this test')
    monkeypatch.setattr('bench.contestants_of', lambda *args: list(contestants_of(*args))[-1:])  # only the peer
    for changes, message in ((dict(head_dim=32), 'peer, float32 ended.*AssertionError'),
                             (dict(tie_weights=True), 'has 42,368 parameters here, nanoP 34,176'),
                             (dict(batch_tokens=72), 'batch_tokens=72 is not a multiple of block_size=16'),
                             (dict(recompute=True), 'not benchmarked here'),
                             (dict(parallel='fsdp'), 'not benchmarked here')):
        with pytest.raises(UserError, match=message):
            bench_step(TrainConfig(dataset=data_dir, **{**TINY, **changes}), BenchConfig(peer=peer, turns=1))


def test_the_command_appends_to_the_results(monkeypatch, tmp_path):
    path = Path(shutil.copy(ROOT / 'results' / 'bench' / 'steps.csv', tmp_path))
    before = path.read_text().splitlines()
    columns = before[0].partition(',contestant,')[2].split(',')
    monkeypatch.setattr('bench.bench_step', lambda config, settings: [dict.fromkeys(['contestant', *columns], 1 / 3)])
    run_main(monkeypatch, str(ROOT / 'config' / 'bench_4x128.py'), f'--out_csv={path}', '--dtype=float32')
    *kept, row = path.read_text().splitlines()
    assert kept == before and ',4x128,4096,256,float32,True,,0.333333,' in row and torch.__version__ in row


def test_a_table_leaves_out_figures_that_a_row_does_not_have(capsys):
    speed = dict(nanop_is_faster_by=2, faster_by_min=1, faster_by_max=3)
    print_table([dict(name='a', s=1.25, **speed), dict(name='long', s='', **speed)], {'': '{name}', 's': '{s:.1f}'})
    assert capsys.readouterr().out.splitlines() == ['        s  nanoP is faster by', 'a     1.2  2.00x (1.00..3.00)',
                                                    'long       2.00x (1.00..3.00)']


def test_figures_of_two_kinds_do_not_share_a_file(tmp_path):
    append(tmp_path / 'a.csv', [dict(x=1)])
    with pytest.raises(UserError, match='figures of another kind'):
        append(tmp_path / 'a.csv', [dict(y=1)])


def test_the_peak_of_a_command_is_its_own():
    kept = torch.ones(10**8)  # 400 MB in this process
    _, peak = timed([sys.executable, '-c', 'pass'])
    assert 3e6 < peak < 1e8 and len(kept)
    with pytest.raises(UserError, match='failed: no luck'):
        timed([sys.executable, '-c', 'exit("no luck")'])


def test_sampling_beside_a_peer(data_dir, peer):
    rows = bench_sample(TrainConfig(dataset=data_dir, **TINY),
                        BenchConfig(peer=peer, turns=1, batch_sizes='1,3', lengths='5,20'))
    assert [(row['batch_size'], row['new_tokens']) for row in rows[::4]] == [(1, 5), (1, 20), (3, 5), (3, 20)]
    assert {row['contestant'] for row in rows} == {'nanoP', 'without its cache', 'peer, as shipped', 'peer, float32'}
    assert all(row['same_tokens_frac'] == 1 and row['tokens_per_s'] > 0 for row in rows)
    assert fits_results('sample', rows)


def test_preparation_beside_a_loop(gpt2_tokenizer):
    rows = bench_prepare(TrainConfig(), BenchConfig(text_mb=1, turns=1))
    assert [row['text_mb'] for row in rows] == [1, 1] and all(row['tokens_per_s'] > 1e4 for row in rows)
    assert fits_results('prepare', rows)


@pytest.mark.parametrize('duration', [dict(max_iters=2), dict(train_tokens=1024), dict(tokens_per_param=0.1)])
def test_the_commands_of_a_sweep_benchmark(data_dir, monkeypatch, duration):
    """train.py, sweep.py and a stack get the same runs. No command is started."""
    config, commands = TrainConfig(dataset=data_dir, **duration, **TINY), []

    def record(command, allowed=(0,)):
        script, argv = Path(command[1]).name, command[2:]
        assert allowed == ((0, 3) if script == 'train.py' else (0,))
        if script == 'train.py':
            run = read_config(argv)
            assert run == replace(config, out_dir=run.out_dir, learning_rate=run.learning_rate)
            commands.append((script, run.learning_rate))
        else:
            own, overrides = sweep.read_sweep(argv)
            commands.append((script, own.stack, overrides['learning_rate']))
        return len(commands), 0

    monkeypatch.setattr('bench.timed', record)
    rows = bench_sweep(config, BenchConfig(trials=2, turns=1))
    rates = [4e-3, 4e-3 * 2 ** (1 / 8)]
    assert commands == [*(('train.py', rate) for rate in rates), ('sweep.py', 0, rates), ('sweep.py', 2, rates)]
    assert [row['seconds'] for row in rows] == [1 + 2, 3, 4] and rows[2]['nanop_is_faster_by'] == 4 / 3
    assert fits_results('sweep', rows)


@pytest.mark.slow
def test_a_sweep_beside_a_process_for_each_trial(data_dir, capsys):
    rows = bench_sweep(TrainConfig(dataset=data_dir, max_iters=2, **TINY), BenchConfig(trials=2, turns=1))
    assert [row['contestant'] for row in rows] == ['a process a trial', 'sweep.py', 'sweep.py, stacked']
    assert all(row['trials_per_minute'] == pytest.approx(120 / row['seconds']) for row in rows)
