"""
Estimates what a training run needs, and compares the memory with a short run: bench.py --plan.

Memory is for one GPU and a model that is not compiled; torch.compile needs less for activations. The allocator and the
libraries need some more.
"""
import math
import multiprocessing
import os
import time
from dataclasses import replace

import torch

from model import GPT, GPTConfig
from nanop.dataset import DATA_DIR, Dataset
from nanop.errors import UserError, require
from nanop.layers import QUERIES
from nanop.machine import flops_per_token, peak_memory_bytes, pick_device, set_up
from tools.stack import UNKNOWN_VOCAB
from train import TrainConfig, make_optimizer, num_steps, rescaled, split_batch, train


# Memory of one device and traffic of one step, in bytes. P counts all parameters, P_block those in the attention and
# MLP of all blocks.
def activation_bytes(model, tokens, product_bytes, recompute, cpu_bf16=False):
    """What the forward pass over `tokens` tokens keeps for the backward pass: inputs of norms in float32, inputs of
    matrix products in product_bytes each, the logits, and their logarithms in float32 twice, once for their gradient.
    This is the default architecture; print_plan() says which keys change it. In bf16 on a CPU (cpu_bf16)
    nanop/layers.py keeps other tensors."""
    c, p = model.config, product_bytes
    attn, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    norms = c.n_embd * 2 * (4 + p)  # inputs and outputs
    attention = p * (sum(attn.heads) * c.head_dim + c.n_embd)  # queries, keys and values; output
    hidden = p * (mlp.c_fc.out_features + mlp.c_proj.in_features)  # before and after the activation
    block = norms + attention + hidden
    if cpu_bf16:  # attention weights: in each head half of T^2, in pieces of QUERIES queries
        block += c.n_head * p * min(c.block_size, (c.block_size + QUERIES) // 2)
    blocks = c.n_layer * 4 * c.n_embd + block if recompute else c.n_layer * block
    logits = p if cpu_bf16 else 2 * 4 + (p if p < 4 else 0)
    end = c.n_embd * (4 + p) + c.vocab_size * logits  # last norm and logits
    return tokens * (blocks + end)


def count_in_blocks(model):
    """(weights, masked or not, in the attention and MLP of all blocks; masks there, of one byte each)"""
    parameters = [p for block in model.transformer.h for part in (block.attn, block.mlp) for p in part.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained


def ranks_per_copy(config, bench):
    """The number of GPUs that share one copy of the model."""
    return {'ddp': 1, 'fsdp': bench.gpus, 'hsdp': min(bench.gpus, bench.gpus_per_host)}[config.parallel]


def memory(model, config, bench, product_bytes, cpu_bf16=False):
    """{what: bytes} of one device."""
    P, shards = model.num_params(), ranks_per_copy(config, bench)
    P_block, masks = count_in_blocks(model)
    _, local, micro_batches = split_batch(config, bench.gpus)
    tokens = local // micro_batches * config.block_size
    # AdamW has two moments, the others one; Muon leaves the parameters outside the blocks to AdamW
    state = dict(adamw=8 * P, lion=4 * P, sgd=4 * P, muon=8 * P - 4 * P_block)[config.optimizer]
    rows = {'weights': (4 * P + masks) / shards, 'gradients': 4 * P / shards, 'optimizer state': state / shards}
    if config.parallel == 'ddp':
        looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
        rows['weights cast for products'] = product_bytes * (P - looked_up) if product_bytes < 4 else 0
        rows["DDP's buckets"] = 4 * P if bench.gpus > 1 else 0
    else:  # gathered with their gradients: what is outside the blocks stays so, of the blocks two are at a time
        two_blocks = 2 * ((product_bytes + 4) * P_block + masks) / model.config.n_layer
        rows['weights gathered'] = 8 * (P - P_block) + two_blocks
    for name, recompute in (('activations', False), ('activations, --recompute=True', True)):
        rows[name] = activation_bytes(model, tokens, product_bytes, recompute, cpu_bf16)
    return rows


def planned_bytes(model, config, bench, machine):
    """The memory of a run on this machine's device alone."""
    product_bytes = machine.dtype.itemsize
    rows = memory(model, replace(config, parallel='ddp'), replace(bench, gpus=1), product_bytes,
                  cpu_bf16=machine.device.type == 'cpu' and product_bytes == 2)
    del rows['activations' if config.recompute else 'activations, --recompute=True']
    return sum(rows.values())


def traffic(model, config, bench, product_bytes):
    """Bytes that one device sends in a step, in ring algorithms."""
    P, shards = model.num_params(), ranks_per_copy(config, bench)
    copies = bench.gpus // shards
    all_reduce = 2 * 4 * P / shards * (copies - 1) / copies  # of gradients, over the copies
    if config.parallel == 'ddp':
        return all_reduce
    P_block, masks = count_in_blocks(model)
    # every micro-batch gathers the weights, those of the blocks again in the backward, and reduces float32 gradients
    gathers = 2 * (product_bytes * P_block + masks) + 4 * (P - P_block)
    within_copy = (gathers + 4 * P) * (shards - 1) / shards
    return split_batch(config, bench.gpus)[2] * (within_copy + all_reduce)


def si(number, unit=''):
    """A number with an SI prefix: 1.53 G."""
    power = min(6, int(math.log10(number) // 3)) if number >= 1 else 0
    return f"{number / 1000 ** power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}{unit}"


def meta_model(config):
    """(the model of a config on the meta device, a phrase that says where its vocabulary size comes from)"""
    vocab_size, source = config.vocab_size, 'from the config'
    if not vocab_size and (DATA_DIR / config.dataset / 'meta.json').exists():
        vocab_size, source = Dataset(config.dataset).vocab_size, f'from data/{config.dataset}'
    if not vocab_size:
        vocab_size, source = UNKNOWN_VOCAB, f'assumed, because data/{config.dataset} is not prepared'
    with torch.device('meta'):
        return GPT(GPTConfig.of(config, vocab_size=vocab_size)), f'vocabulary of {vocab_size:,}, {source}'


def print_plan(config, bench):
    """Print what training needs: FLOPs, days, traffic and memory."""
    model, vocabulary = meta_model(config)
    steps = num_steps(config, model.num_params())
    make_optimizer(model, rescaled(config, steps), 'meta')  # refuses a config without a rule
    tokens = steps * config.batch_tokens
    sequences, local, micro_batches = split_batch(config, bench.gpus)
    whole_hosts = bench.gpus <= bench.gpus_per_host or bench.gpus % bench.gpus_per_host == 0
    require(bench, 'gpus', config.parallel != 'hsdp' or whole_hosts,
            f"parallel='hsdp' needs a multiple of gpus_per_host={bench.gpus_per_host}")
    flops = flops_per_token(model)
    days = flops * tokens / (bench.gpus * bench.peak_flops * bench.mfu) / 86400
    print(f'{config.parameterization}: {config.n_layer} layers x {config.n_embd}, {vocabulary}')
    for name, value in {
        'parameters': f'{model.num_params():,}',
        'tokens': f'{tokens:,} in {steps:,} steps',
        'batch': f'{sequences:,} sequences of {config.block_size:,} = {bench.gpus} GPU(s) x {micro_batches} '
                 f'micro-batch(es) x {local // micro_batches}',
        'FLOPs per token': si(flops), 'total FLOPs': si(flops * tokens),
        f'days at {bench.mfu:.0%} MFU': f"{days:.3g} on {bench.gpus} GPU(s) of {si(bench.peak_flops, 'FLOP/s')}",
        'sent per step and GPU': si(traffic(model, config, bench, product_bytes=2), 'B'),
    }.items():
        print(f'{name:<32}{value}')

    print(f'\nmemory of one GPU, {config.parallel}, bf16')
    rows = memory(model, config, bench, product_bytes=2)
    for name, value in rows.items():
        print(f"{name:<32}{si(value, 'B')}")
    changed = [key for key in ('norm', 'qk_norm', 'activation', 'pos', 'n_kv_head')
               if getattr(config, key) != getattr(TrainConfig, key)]
    if changed:
        print(f"activations are estimated for the default architecture, without the effect of {', '.join(changed)}")
    recomputed = sum(rows.values()) - rows['activations']
    kept = sum(rows.values()) - rows['activations, --recompute=True']
    print(f"{'total':<32}{si(kept, 'B')}; with --recompute=True {si(recomputed, 'B')}")


def run_and_measure(config, steps, queue):
    """Put into the queue the bytes that `steps` steps need more than a tiny model, whose memory is the libraries'."""
    device = pick_device(config.device)
    torch.set_num_threads(1)
    config = replace(config, out_dir='', parallel='ddp', max_iters=steps, tokens_per_param=0.0, train_tokens=0,
                     base_batch_tokens=0, base_train_tokens=0, rescale=TrainConfig.rescale, eval_interval=0,
                     compile=False, eval_tokens=config.block_size)
    train(replace(config, n_layer=1, n_embd=config.head_dim, n_kv_head=0, base_n_kv_head=0,
                  batch_tokens=config.block_size, max_iters=1))
    if device.type == 'cuda':  # where the peak is one of tensors: what stays of them is the libraries'
        torch.cuda.reset_peak_memory_stats(device)
    tiny = peak_memory_bytes(device)
    train(config)
    queue.put(peak_memory_bytes(device) - tiny)


def measure_memory(config, bench):
    """Train three steps and compare the peak memory with the plan. Returns (planned, measured) bytes."""
    machine = set_up(config.device, config.dtype)
    device = machine.device
    model, _ = meta_model(config)
    planned = planned_bytes(model, config, bench, machine)
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'  # glibc returns freed tensors to the system, so the peak is in use
    context = multiprocessing.get_context('spawn')
    queue, started = context.Queue(), time.perf_counter()
    process = context.Process(target=run_and_measure, args=(config, 3, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f'the run ended with exit code {process.exitcode}, see above')
    measured = queue.get()
    print(f"\n3 steps on {device}, {machine.dtype_name}, {time.perf_counter() - started:.0f} s: peak "
          f"{si(measured, 'B')}, planned {si(planned, 'B')}: off by {planned / measured - 1:+.0%}")
    return planned, measured
