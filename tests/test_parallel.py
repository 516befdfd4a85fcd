"""Tests of training on several processes: the same curve, rules and values, other world sizes, killed ranks."""
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import stress_faults
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from configurator import flags_of
from model import GPT, Block, GPTConfig
from nanop import checkpoint, parallel, run_log
from nanop.errors import UserError
from nanop.files import lock
from nanop.machine import Machine, flops_per_token
from train import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tiny(tmp_path, data_dir):
    """Two micro-batches on each of two ranks, clipped gradients, 33 validation sequences: one rank has fewer."""
    return TrainConfig(
        out_dir=str(tmp_path / 'out'), dataset=data_dir, block_size=16, batch_tokens=128, batch_size=2, max_iters=20,
        n_layer=2, n_embd=32, head_dim=16, base_n_layer=1, base_n_embd=16, base_head_dim=16, learning_rate=1e-2,
        grad_clip=0.1, weight_decay=0.1, eval_interval=10, eval_tokens=528, log_interval=1, compile=False,
        dtype='float32', device='cpu', timeout_s=60)


def launch(config, processes, *torchrun, **env):
    """Start train.py under torchrun. Returns the process of torchrun."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}',
         *(torchrun or ['--standalone']), ROOT / 'train.py',
         *flags_of(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', **env})


def finish(process, code=0, timeout_s=300):
    """Wait until a process exits with `code`. Returns its output."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == code, out[-3000:] + err[-3000:]
    return out + err


def tensors_of(out_dir):
    return checkpoint.load_weights(out_dir)[0]


def assert_same_curve(a, b, rounding=1):
    """Compare rows and weights of two runs up to rounding errors; `rounding` multiplies the usual tolerance."""
    rows, others = run_log.read_metrics(a), run_log.read_metrics(b)
    assert [row['step'] for row in rows] == [row['step'] for row in others]
    for row, other in zip(rows, others):
        for key in ('loss', 'grad_norm', 'val_loss'):
            assert bool(row[key]) == bool(other[key])
            if row[key]:
                assert float(other[key]) == pytest.approx(float(row[key]), rel=1e-4 * rounding), (row['step'], key)
    mine, theirs = tensors_of(a), tensors_of(b)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3 * rounding, atol=1e-4 * rounding)


SHARDS_MASKS = pytest.mark.skipif(torch.__version__ < parallel.SHARDS_MASKS, reason='this torch shards no masks')
SUPAR = dict(parameterization='completep_supar', density=0.5)


@pytest.mark.parametrize('kind, changes', [
    ('ddp', dict(parameterization='completep')), ('ddp', SUPAR), ('ddp', dict(optimizer='muon')),
    ('fsdp', dict(optimizer='sgd', clip_norm='scaled', qk_norm=True, norm='rmsnorm', n_kv_head=1, pos='rope',
                  activation='relu2')),
    pytest.param('fsdp', dict(tie_weights=True, recompute=True, **SUPAR), marks=SHARDS_MASKS)])
def test_two_processes_train_the_curve_of_one(tiny, tmp_path, kind, changes):
    one = replace(tiny, **{**changes, 'recompute': False})
    train(one)
    two = replace(tiny, **changes, out_dir=str(tmp_path / 'two'), parallel=kind)
    out = finish(launch(two, 2))
    assert f'8 sequences of 16 = 2 process(es) x 2 micro-batch(es) x 2; 2,560 tokens on cpu, float32, {kind}' in out
    assert out.count('hidden_weight') == 1  # only rank 0 prints
    norms = [float(row['grad_norm']) for row in run_log.read_metrics(one.out_dir) if row['grad_norm']]
    assert min(norms) > 0.1  # every gradient is clipped
    assert_same_curve(one.out_dir, two.out_dir, rounding=200 if one.optimizer == 'muon' else 1)  # Muon uses bf16
    shards = sorted(checkpoint.find(two.out_dir)[0].glob('*.safetensors'))
    assert len(shards) == 2
    if kind == 'fsdp' and changes.get('density'):  # each file holds half of a weight, its mask and its moments
        for shard in shards:
            with safe_open(shard, 'pt') as file:
                for name in ('model.{}.weight', 'model.{}.mask', 'optimizer.{}.weight.exp_avg'):
                    assert file.get_slice(name.format('transformer.h.1.mlp.c_fc')).get_shape() == [64, 32]
    with safe_open(Path(two.out_dir, 'model.safetensors'), 'pt') as file:  # one file holds the whole weights
        assert file.get_slice('transformer.h.1.mlp.c_fc.weight').get_shape() == [128, 32]
        assert json.loads(file.metadata()['model_config'])['n_layer'] == 2


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@SHARDS_MASKS
def test_two_hosts_shard_within_and_copy_between(tiny, tmp_path):
    """hsdp on two torchruns of two processes each, which join as two machines would."""
    one = replace(tiny, batch_size=1, **SUPAR)
    train(one)
    two = replace(one, out_dir=str(tmp_path / 'two'), parallel='hsdp')
    meet = ['--nnodes=2', '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{free_port()}', '--rdzv_id=1']
    hosts = [launch(two, 2, *meet) for _ in range(2)]
    out = ''.join(map(finish, hosts))
    assert '4 process(es) x 2 micro-batch(es) x 1; 2,560 tokens on cpu, float32, hsdp' in out
    assert_same_curve(one.out_dir, two.out_dir)
    name, shapes = 'model.transformer.h.1.mlp.c_fc.weight', []
    for shard in checkpoint.find(two.out_dir)[0].glob('*.safetensors'):
        with safe_open(shard, 'pt') as file:
            shapes += [file.get_slice(name).get_shape()] if name in file.keys() else []
    assert shapes == [[64, 32]] * 2  # halves, not quarters, and each half is saved once


@SHARDS_MASKS
@pytest.mark.parametrize('others', [[(1, 'ddp')], pytest.param([(1, 'ddp'), (4, 'fsdp')], marks=pytest.mark.slow)],
                         ids=['one', 'one_and_four'])
def test_a_run_on_two_goes_on_on_one_and_on_four(tiny, tmp_path, others):
    straight = replace(tiny, batch_size=1, out_dir=str(tmp_path / 'straight'), **SUPAR)
    train(straight)
    finish(launch(replace(straight, out_dir=tiny.out_dir, parallel='fsdp'), 2))
    for processes, kind in others:
        moved = replace(straight, out_dir=str(tmp_path / str(processes)), init_from='resume', parallel=kind)
        shutil.copytree(tiny.out_dir, moved.out_dir)
        shutil.rmtree(checkpoint.find(moved.out_dir)[0])
        before = checkpoint.find(moved.out_dir)[0]
        if processes == 1:
            train(moved)
        else:
            assert f'resuming {before} at step 10' in finish(launch(moved, processes))
        assert_same_curve(straight.out_dir, moved.out_dir)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('changes', [
    dict(parameterization='completep'), dict(qk_norm=True, n_kv_head=2),
    pytest.param(dict(tie_weights=True, **SUPAR), marks=SHARDS_MASKS)])
def test_sharding_keeps_values_roles_and_hyperparameters(group, monkeypatch, changes):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
    config = GPTConfig(block_size=16, vocab_size=63, n_layer=4, n_embd=64, head_dim=16, base_n_layer=1, base_n_embd=16,
                       base_head_dim=16, **changes)
    whole = GPT(config, torch.Generator().manual_seed(3))
    with torch.device('meta'):
        sharded = GPT(config)
    parallel.shard(sharded, 'fsdp', Machine(torch.device('cpu'), torch.bfloat16))
    sharded.to_empty(device='cpu')
    sharded.init_weights(torch.Generator().manual_seed(3))
    values = dict(sharded.named_parameters())
    assert values.keys() == dict(whole.named_parameters()).keys()
    for name, p in whole.named_parameters():
        assert isinstance(values[name], DTensor) and torch.equal(values[name].full_tensor(), p), name

    for block in sharded.transformer.h:  # gather one block at a time; only the weights of products are in bf16
        block.attn.unshard()
        assert block.attn.c_attn.weight.dtype == block.mlp.c_fc.weight.dtype == torch.bfloat16
        assert block.ln_1.weight.dtype == torch.float32 and isinstance(block.ln_1.weight, DTensor)
        if block.attn.q_norm:
            assert block.attn.q_norm.weight.dtype == torch.float32
        block.attn.reshard()
        assert isinstance(block.mlp.c_fc.weight, DTensor)

    def rules(model):
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 1e-8, 'cpu')
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)]: [group[key] for key in ('role', 'lr', 'lr_scale', 'weight_decay', 'eps')]
                for group in optimizer.param_groups for p in group['params']}
    assert rules(sharded) == rules(whole) and sharded.num_params() == whole.num_params()
    assert flops_per_token(sharded) == flops_per_token(whole)


@pytest.mark.parametrize('recompute', [False, True])
def test_a_sharded_model_compiles_without_a_break(group, monkeypatch, recompute):
    """Whole blocks would break the graph at every gather and, when recomputed, run uncompiled without a warning."""
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
    model = GPT(GPTConfig(block_size=16, vocab_size=63, n_layer=3, n_embd=32, head_dim=16))
    graphs = []
    if recompute:
        parallel.recompute(model)
    for part in parallel.to_compile(model, 'cpu', sharded=True, recompute=recompute):
        part.compile(dynamic=False, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    parallel.shard(model, 'fsdp', Machine(torch.device('cpu'), torch.float32))
    idx = torch.zeros(2, 16, dtype=torch.long)
    for _ in range(2):
        model(idx, idx)[1].backward()
    assert len(graphs) >= 2  # attention and MLP; the layers may share them


@pytest.mark.parametrize('recompute', [False, True])
def test_the_layers_of_a_deep_model_share_their_graphs(recompute):
    def compiled_graphs(device_type, **shape):
        torch.compiler.reset()
        config = GPTConfig(block_size=4, vocab_size=5, n_embd=4, head_dim=2, **shape)
        model, graphs, idx = GPT(config), [], torch.zeros(1, 4, dtype=torch.long)
        expected = model(idx, idx)[1]
        if recompute:
            parallel.recompute(model)

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward
        for part in parallel.to_compile(model, device_type, recompute=recompute):
            part.compile(dynamic=False, fullgraph=True, backend=backend)
        torch.testing.assert_close(model(idx, idx)[1], expected)
        return ['lm_head' in graph.code for graph in graphs]
    assert compiled_graphs('cpu', n_layer=3) == ([False, False] if recompute else [False])
    assert compiled_graphs('cuda', n_layer=3) == [True]
    # a deep model: its blocks or their parts, and the loss
    assert compiled_graphs('cuda', n_layer=parallel.WHOLE + 1) == ([False] * 3 if recompute else [False] * 2)


@torch._dynamo.config.patch(recompile_limit=8)  # monkeypatch would leave torch's module without the value
def test_what_is_compiled_stays_compiled_for_any_number_of_shapes(monkeypatch):
    """By default torch runs a ninth graph uncompiled, with no more than a warning."""
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(Block, 'compile', lambda self, **kwargs: compile_block(self, backend='eager', **kwargs))
    monkeypatch.setattr(parallel, 'why_not_compile', lambda device: None)
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.compiler.reset()
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_embd=4, head_dim=2, n_layer=1))
    parallel.prepare(model, TrainConfig(vocab_size=5), Machine(torch.device('cpu'), torch.float32))
    for B in range(2, 12):
        model(torch.zeros(B, 4, dtype=torch.long))
    assert counters['stats']['unique_graphs'] == 10


@pytest.mark.parametrize('dropout, cudnn', [(0.0, True), (0.125, True), (0.2, False)])
def test_cudnn_attends_only_with_a_rate_of_dropout_that_it_keeps(dropout, cudnn):
    """torch 2.11 rounds the rate to 1/16 there. The choice is torch's own setting, which a CPU has, too."""
    config = TrainConfig(vocab_size=5, n_embd=8, head_dim=8, dropout=dropout, compile=False)
    parallel.prepare(GPT(GPTConfig.of(config)), config, Machine(torch.device('cpu'), torch.float32))
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_sharding_needs_processes_and_for_masks_torch_2_13(tiny, monkeypatch):
    with pytest.raises(UserError, match="parallel='fsdp' shards over the processes of torchrun"):
        train(replace(tiny, parallel='fsdp'))
    machine = Machine(torch.device('cpu'), torch.float32)
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    for version, refused in ('2.11.0', True), ('2.13.0', False):
        monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(version))
        expected = f'masks of density=0.5 with torch {version}: use torch 2.13 or newer, or'
        with pytest.raises(UserError, match=expected) if refused else nullcontext():
            parallel.require_shardable(replace(tiny, parallel='fsdp', **SUPAR), machine)
        parallel.require_shardable(replace(tiny, parallel='fsdp'), machine)
        parallel.require_shardable(replace(tiny, **SUPAR), machine)
    with pytest.raises(UserError, match="parallel='dp' is not allowed: use one of ddp, fsdp, hsdp"):
        replace(tiny, parallel='dp')


def test_recomputation_changes_no_bit(tiny, tmp_path):
    train(replace(tiny, dropout=0.2))
    again = replace(tiny, dropout=0.2, recompute=True, out_dir=str(tmp_path / 'again'))
    train(again)
    assert stress_faults.differences(tiny.out_dir, again.out_dir) == []


def test_recomputation_keeps_fewer_activations():
    def kept(recompute):
        model = GPT(GPTConfig(block_size=64, vocab_size=64, n_layer=4, n_embd=64, head_dim=16))
        if recompute:
            parallel.recompute(model)
        idx, sizes = torch.zeros(2, 64, dtype=torch.long), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(idx, idx)
        return sum(sizes)
    assert kept(True) < kept(False) / 4


def children(process):
    """Process ids of the workers of a torchrun."""
    found = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def wait_for_step(config, step, process):
    end = time.monotonic() + 120
    while not any(int(row['step']) >= step for row in run_log.read_metrics(config.out_dir)):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_torchrun_restarts_a_run_whose_rank_was_killed(tiny, tmp_path):
    """The restarted run resumes from the last checkpoint and ends bit for bit as an undisturbed run."""
    config = replace(tiny, max_iters=100, eval_interval=20, init_from='auto')
    undisturbed = replace(config, out_dir=str(tmp_path / 'undisturbed'))
    finish(launch(undisturbed, 2, '--standalone'))
    process = launch(config, 2, '--standalone', '--max-restarts=3')
    wait_for_step(config, 1, process)
    victim = children(process)[-1]
    wait_for_step(config, 30, process)
    os.kill(victim, signal.SIGKILL)
    out = finish(process)
    assert out.count('resuming ') == 1 and out.count('hidden_weight') == 2  # two starts
    assert stress_faults.differences(undisturbed.out_dir, config.out_dir) == []


def join_on_threads(store, ranks, world_size, timeout_s=20):
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: parallel.fresh_store(store, rank, world_size, timeout_s), ranks))


def test_processes_started_again_never_read_what_earlier_ones_left():
    """torchrun reuses its store across restarts: an address in it may belong to a process that was killed."""
    left = dist.HashStore()
    left.set_timeout(timedelta(seconds=20))
    for life in range(3):
        stores = join_on_threads(left, range(3), 3)
        assert not any(store.check(['address']) for store in stores)
        stores[life].set('address', str(life))
        assert [store.get('address') for store in stores] == [str(life).encode()] * 3


def test_a_process_that_never_joins_is_an_error_of_a_known_kind():
    left = dist.HashStore()
    left.set_timeout(timedelta(seconds=0.3))
    join_on_threads(left, range(2), 2)
    for alone in (0, 1):  # the store holds the call, or the answer, of an earlier start
        with pytest.raises(dist.DistStoreError) as error:
            parallel.fresh_store(left, alone, 2, timeout_s=0.3)
        assert parallel.lost_contact(error.value)


def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny, tmp_path):
    config = replace(tiny, max_iters=10**6, eval_interval=0, eval_tokens=16)
    process = launch(config, 2)
    wait_for_step(config, 3, process)
    os.kill(children(process)[0], signal.SIGTERM)
    out = finish(process, code=1)  # torchrun exits with 1 when its workers exit with 143
    path, state = checkpoint.newest(config.out_dir)
    assert f"stopped after {state['step']} steps, saved in {path}" in out and 'exitcode  : 143' in out


def test_errors_of_the_first_process_reach_all(tiny):
    held = lock(tiny.out_dir)
    out = finish(launch(tiny, 2), code=1)
    held.release()
    assert out.count('error: another process is training in') == 2 and 'exitcode  : 2' in out


def test_from_rank_0_and_largest_without_a_group():
    assert parallel.from_rank_0(lambda: 3) == 3 and parallel.largest(7) == 7
    assert parallel.rank_and_world_size() == (0, 1)
    with pytest.raises(UserError, match='no'):
        parallel.from_rank_0(lambda: (_ for _ in ()).throw(UserError('no')))
    assert math.isnan(parallel.from_rank_0(lambda: math.nan))
