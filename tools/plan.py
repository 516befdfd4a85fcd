"""
What a training run would need, on paper, and how far that is from what one needs here: bench.py --plan.

Memory is that of one GPU, for a model that is not compiled: torch.compile needs less for activations. What the
allocator and the libraries take is on top.
"""
import math
import multiprocessing
import os
import time
from dataclasses import replace

import torch

from model import GPT
from nanop.dataset import DATA_DIR, Dataset
from nanop.errors import UserError
from nanop.layers import QUERIES
from nanop.machine import pick_device, pick_dtype
from sweep import gpt_config
from tools.bench_worker import peak_memory
from train import TrainConfig, at_length, num_steps, optimizer_of, split_batch, train

UNKNOWN_VOCAB = 50304  # GPT-2's, padded: where the dataset is not here to say

# -----------------------------------------------------------------------------
# Memory of one device and traffic of one step, in bytes; P parameters, P_block of them in the blocks' attention and MLP


def activation_bytes(model, tokens, product_bytes, recompute, cpu_bf16=False):
    """What the backward of `tokens` tokens needs to keep.

    A block keeps, in float32, the input of each norm, and as inputs of products (product_bytes each): the outputs of
    the norms, queries, keys, values, attention's output, and the MLP's hidden layer before and after its activation.
    Other norms, positions and activations keep more or, ReLU, less: plan() says so. At the end there are the last
    norm's input and output, the logits, and their logarithms in float32 twice, once for their gradient. In bf16 on a
    CPU (cpu_bf16) functional.py keeps other things.
    """
    c, p = model.config, product_bytes
    attn, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    block = c.n_embd * (2 * 4 + 2 * p + p) + p * (
        attn.c_attn.out_features + mlp.c_fc.out_features + mlp.c_proj.in_features)
    if cpu_bf16:  # attention's weights: for each head half of T^2, in steps of so many queries
        block += c.n_head * p * min(c.block_size, (c.block_size + QUERIES) // 2)
    blocks = c.n_layer * (4 * c.n_embd) + block if recompute else c.n_layer * block
    logits = p if cpu_bf16 else 2 * 4 + (p if p < 4 else 0)
    end = c.n_embd * (4 + p) + c.vocab_size * logits
    return tokens * (blocks + end)


def in_blocks(model):
    """(weights in the blocks' attention and MLP, masks of a byte each)"""
    parameters = [p for block in model.transformer.h for part in (block.attn, block.mlp) for p in part.parameters()]
    return [sum(p.numel() for p in parameters if p.requires_grad is trained) for trained in (True, False)]


def memory(model, config, bench, product_bytes, cpu_bf16=False):
    """{what: bytes} of one device."""
    P, n = model.num_params(), bench.gpus
    P_block, masks = in_blocks(model)
    over = {'ddp': 1, 'fsdp': n, 'hsdp': min(n, bench.gpus_per_host)}[config.parallel]
    _, local, micro_batches = split_batch(config, n)
    tokens = local // micro_batches * config.block_size
    # two moments of AdamW, one of the others; Muon leaves what is outside of the blocks to AdamW
    state = dict(adamw=8 * P, lion=4 * P, sgd=4 * P, muon=8 * P - 4 * P_block)[config.optimizer]
    rows = {'weights': (4 * P + masks) / over, 'gradients': 4 * P / over, 'optimizer state': state / over}
    if config.parallel == 'ddp':
        looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
        cast = product_bytes * (P - looked_up)
        rows['weights cast for products'] = cast if product_bytes < 4 else 0
        rows["DDP's buckets"] = 4 * P if n > 1 else 0
    else:  # the root's tensors stay gathered, with their gradients; of the blocks' two at a time, one ahead
        rows['weights gathered'] = 8 * (P - P_block) + 2 * ((product_bytes + 4) * P_block + masks) / \
            model.config.n_layer
    for name, recompute in (('activations', False), ('activations, --recompute=True', True)):
        rows[name] = activation_bytes(model, tokens, product_bytes, recompute, cpu_bf16)
    return rows


def traffic(model, config, bench, product_bytes):
    """Bytes that one device sends in a step, by rings."""
    P, n = model.num_params(), bench.gpus
    P_block, masks = in_blocks(model)
    micro_batches = split_batch(config, n)[2]
    if config.parallel == 'ddp':
        return 2 * 4 * P * (n - 1) / n
    over = n if config.parallel == 'fsdp' else min(n, bench.gpus_per_host)
    copies = n // over
    # in each micro-batch: weights for the forward and again, but the root's, for the backward; gradients in float32
    per_micro = (2 * (product_bytes * P_block + masks) + 4 * (P - P_block) + 4 * P) * (over - 1) / over
    return micro_batches * (per_micro + 2 * 4 * P / over * (copies - 1) / copies)


# -----------------------------------------------------------------------------


def si(number, unit=''):
    """A number with a prefix: 1.53 G."""
    power = min(6, int(math.log10(number) // 3)) if number >= 1 else 0
    return f"{number / 1000 ** power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}{unit}"


def meta_model(config):
    """(the model of a config, without weights; a line that says where its vocabulary is from)"""
    vocab_size, where = config.vocab_size, 'of the config'
    if not vocab_size:
        vocab_size, where = UNKNOWN_VOCAB, f"assumed, as data/{config.dataset} is not here"
        if (DATA_DIR / config.dataset / 'meta.json').exists():
            vocab_size, where = Dataset(config.dataset).vocab_size, f'of data/{config.dataset}'
    try:
        with torch.device('meta'):
            return GPT(gpt_config(config, vocab_size)), f'vocabulary of {vocab_size:,}, {where}'
    except ValueError as error:
        raise UserError(error) from None


def plan(config, bench):
    """Prints what training would need. Raises UserError for a batch that the GPUs cannot share, or without a rule."""
    model, vocabulary = meta_model(config)
    steps = num_steps(config, model.num_params())
    optimizer_of(model, at_length(config, steps), 'meta')  # raises for what has no rule
    tokens = steps * config.batch_tokens
    sequences, local, micro_batches = split_batch(config, bench.gpus)
    if config.parallel == 'hsdp' and bench.gpus > bench.gpus_per_host and bench.gpus % bench.gpus_per_host:
        raise UserError(f'gpus={bench.gpus} is no multiple of gpus_per_host={bench.gpus_per_host}, as hsdp needs it')
    flops = model.flops_per_token()
    days = flops * tokens / (bench.gpus * bench.peak_flops * bench.mfu) / 86400
    print(f'{config.parameterization}: {config.n_layer} layers x {config.n_embd}, {vocabulary}')
    for name, value in [
            ('parameters', f'{model.num_params():,}'), ('tokens', f'{tokens:,} in {steps:,} steps'),
            ('a step', f'{sequences:,} sequences of {config.block_size:,} = {bench.gpus} GPU(s) x {micro_batches} '
                       f'micro-batch(es) x {local // micro_batches}'),
            ('FLOPs per token', si(flops)), ('FLOPs in all', si(flops * tokens)),
            (f'days at {bench.mfu:.0%} MFU', f"{days:.3g} on {bench.gpus} GPU(s) of {si(bench.peak_flops, 'FLOP/s')}"),
            ('sent per step and GPU', si(traffic(model, config, bench, 2), 'B'))]:
        print(f'{name:<32}{value}')
    rows = memory(model, config, bench, 2)
    print(f'\nmemory of one GPU, {config.parallel}, bf16')
    for name, value in rows.items():
        print(f"{name:<32}{si(value, 'B')}")
    other = [key for key in ('norm', 'qk_norm', 'activation', 'pos', 'n_kv_head')
             if getattr(config, key) != getattr(TrainConfig, key)]
    if other:
        print(f"activations are the default architecture's: what differs by {', '.join(other)} is not in them")
    kept = [value for name, value in rows.items() if not name.startswith('activations')]
    print(f"{'in all':<32}{si(sum(kept) + rows['activations'], 'B')}; with --recompute=True "
          f"{si(sum(kept) + rows['activations, --recompute=True'], 'B')}")


def run_and_measure(config, steps, queue):
    """For a process of its own: the memory that `steps` steps take on top of one of a tiny model, which the libraries
    need."""
    device = pick_device(config.device)
    torch.set_num_threads(1)
    config = replace(config, out_dir='', parallel='ddp', max_iters=steps, tokens_per_param=0.0, train_tokens=0,
                     base_batch_tokens=0, base_train_tokens=0, eval_interval=0, compile=False,
                     eval_tokens=config.block_size)
    train(replace(config, n_layer=1, n_embd=config.head_dim, batch_tokens=config.block_size, max_iters=1))
    tiny = peak_memory(device)
    train(config)
    queue.put(peak_memory(device) - tiny)


def measure(config, bench):
    """Trains three steps and compares the peak of memory with the plan's; returns (planned, measured) bytes."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, _ = meta_model(config)
    product_bytes = 4 if dtype == torch.float32 else 2
    rows = memory(model, replace(config, parallel='ddp'), replace(bench, gpus=1), product_bytes,
                  cpu_bf16=device.type == 'cpu' and product_bytes == 2)
    del rows['activations' if config.recompute else 'activations, --recompute=True']
    planned = sum(rows.values())
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'  # glibc gives freed tensors back, instead of counting as in use
    context = multiprocessing.get_context('spawn')
    queue, started = context.Queue(), time.perf_counter()
    process = context.Process(target=run_and_measure, args=(config, 3, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f'the run ended with exit code {process.exitcode}, see above')
    measured = queue.get()
    print(f"\n3 steps on {device}, {str(dtype)[6:]}, {time.perf_counter() - started:.0f} s: peak {si(measured, 'B')}, "
          f"planned {si(planned, 'B')}: off by {planned / measured - 1:+.0%}")
    return planned, measured
