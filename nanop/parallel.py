"""
One model on many processes: joining them, copying or sharding the model, and agreeing on values.

    ddp     every rank holds the whole model; gradients are averaged
    fsdp    every rank holds a part of every tensor; a block's tensors are gathered when it is its turn (FSDP2)
    hsdp    fsdp over the ranks of a machine, copies over the machines

torchrun starts the processes. Which data a rank takes depends only on the step, its rank and the world size.
"""
import gc
import os
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from nanop.errors import UserError, first_line
from nanop.machine import why_not_compile

KINDS = ('ddp', 'fsdp', 'hsdp')
SHARDS_MASKS = 2, 13  # the first version of torch that shards masks; earlier ones shard only floats
WHOLE = 48  # a GPU's model of up to this many layers is compiled whole: a little faster, but compile time grows with it

# -----------------------------------------------------------------------------
# Joining
def fresh_store(store, rank, world_size, timeout_s):
    """`store` under a prefix that all living ranks have agreed on. Raises DistStoreError after timeout_s.

    torchrun reuses one key-value store across restarts, so a new process can read the address of a killed one and hang
    (torch 2.13). Rank 0 picks a fresh prefix for this start and sends it to every rank that asks.
    """
    name = uuid4().hex
    if rank:
        store.set(f'call/{rank}', name)
        name = store.get(f'answer/{name}').decode()
        store.set(f'{name}/{rank}', 'heard')
        return dist.PrefixStore(name, store)
    end = time.monotonic() + timeout_s
    for other in range(1, world_size):
        while not store.check([f'{name}/{other}']):  # until then the call that is read may be from an earlier start
            store.set('answer/' + store.get(f'call/{other}').decode(), name)
            time.sleep(0.01)
            if time.monotonic() > end:
                raise dist.DistStoreError(f'process {other} did not join in {timeout_s:g} s')
    return dist.PrefixStore(name, store)


def join_processes(device, timeout_s):
    """Under torchrun: join the process group and make this rank's GPU the current one."""
    if 'RANK' not in os.environ:
        return
    if device not in ('auto', 'cuda', 'cpu'):
        raise UserError(f"device='{device}' is not for several processes: use auto, cuda or cpu")
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous('env://', timeout=timeout))
    store = fresh_store(store, rank, world_size, timeout_s)
    group = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device == 'cpu' or not torch.cuda.is_available():
        dist.init_process_group('gloo', **group)
        return
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    # gloo for messages between CPUs: checkpoints, and whether to stop
    dist.init_process_group('cpu:gloo,cuda:nccl', **group, device_id=torch.device(device))


def leave_processes():
    if dist.is_initialized():
        gc.collect()  # DDP's cycles hold the group: without this its threads can outlive it and abort the process
        dist.destroy_process_group()


@contextmanager
def processes(device, timeout_s):
    """While entered, this process is part of torchrun's group, if there is one."""
    try:
        join_processes(device, timeout_s)
        yield
    except UserError:
        leave_processes()
        raise
    except Exception as error:
        if not lost_contact(error):
            raise
        raise UserError(f'lost contact with another process ({first_line(error)}): see what became of it, or raise '
                        'timeout_s; --init_from=resume goes on from the last checkpoint') from None
    leave_processes()


def lost_contact(error):
    """Whether an exception of PyTorch's says that another rank is gone, or silent for longer than the time-out."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and 'gloo' in str(error)


# -----------------------------------------------------------------------------
# Agreeing
def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text):
    """Print on rank 0."""
    if rank_and_world_size()[0] == 0:
        print(text)


def from_rank_0(function):
    """Call function() on rank 0; every rank gets its result, or the UserError that it raised."""
    box = [None]
    if rank_and_world_size()[0] == 0:
        try:
            box = [function()]
        except UserError as error:
            box = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device('cpu'))
    if isinstance(box[0], UserError):
        raise box[0]
    return box[0]


def largest(number):
    """The largest `number`, an int, of all ranks."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def sum_over_ranks(value):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def split_batch(config, world_size):
    """(sequences per step, sequences per step and rank, micro-batches per step and rank)."""
    c = config
    sequences, rest = divmod(c.batch_tokens, c.block_size)
    if rest or not sequences:
        raise UserError(f'batch_tokens={c.batch_tokens} is not a multiple of block_size={c.block_size}: use '
                        f'{max(1, sequences) * c.block_size} or {(sequences + 1) * c.block_size}')
    if sequences % world_size:
        raise UserError(f'batch_tokens={c.batch_tokens} is {sequences} sequences of {c.block_size}, which {world_size} '
                        f'processes cannot share: use a multiple of {world_size * c.block_size}')
    local = sequences // world_size
    batch_size = min(c.batch_size, local)
    if local % batch_size:
        raise UserError(f'{local} sequences per step and process ({c.batch_tokens} tokens / {c.block_size} / '
                        f'{world_size} processes) are not a multiple of batch_size={c.batch_size}: use one of '
                        f'{[n for n in range(1, local + 1) if local % n == 0]}')
    return sequences, local, local // batch_size


# -----------------------------------------------------------------------------
# Preparing a model
def recompute(model):
    """Keep only the input of every block for the backward, which runs the block's forward again."""
    for block in model.transformer.h:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def to_compile(model, device_type, sharded=False, recompute=False):
    """The modules to give to torch.compile: on a GPU the whole model, on a CPU and in a deep model its blocks, which
    share one graph. On a CPU this is as fast as the whole model and compiles in half the time.

    Sharded blocks break the graph where they are gathered, and recomputed blocks run uncompiled; then their attention
    and MLP are compiled, two graphs. On a GPU the loss is compiled in any case, or it would keep the logits in float32;
    on a CPU it keeps its loop, which would be unrolled.
    """
    blocks, on_cpu = model.transformer.h, device_type == 'cpu'
    if not on_cpu and not sharded and len(blocks) <= WHOLE:
        return [model]
    parts = [part for block in blocks for part in (block.attn, block.mlp)] if sharded or recompute else list(blocks)
    return parts if on_cpu else [*parts, model.cross_entropy]


def shard(model, kind, machine):
    """Shard a model in place, block by block. It is on the meta device, or has the same weights on every rank."""
    world_size, per_host = dist.get_world_size(), int(os.environ['LOCAL_WORLD_SIZE'])
    if kind == 'hsdp' and world_size % per_host:
        raise UserError(f"parallel='hsdp' needs as many processes on every machine, not {per_host} of {world_size}")
    sizes = (world_size // per_host, per_host) if kind == 'hsdp' else (world_size,)
    mesh = init_device_mesh(machine.device.type, sizes, mesh_dim_names=('copy', 'shard')[-len(sizes):])
    # blocks gather and use their weights in machine.dtype, and reduce gradients in float32; norms, embeddings and the
    # residual stream stay in float32, as under autocast
    precision = MixedPrecisionPolicy(param_dtype=machine.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        if block.attn.q_norm:
            fully_shard([block.attn.q_norm, block.attn.k_norm], mesh=mesh)
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh)


def require_shardable(config, machine):
    """Refuse parallel=fsdp or hsdp where it cannot work."""
    if config.parallel != 'ddp' and (not dist.is_initialized() or machine.dtype == torch.float16):
        raise UserError(f"parallel='{config.parallel}' shards over the processes of torchrun (see --help) and has no "
                        "gradient scaling for float16: start it with torchrun, and with dtype=bfloat16")
    if config.parallel != 'ddp' and config.density < 1 and torch.__version__ < SHARDS_MASKS:
        raise UserError(f"parallel='{config.parallel}' cannot shard the masks of density={config.density} with torch "
                        f"{torch.__version__}: use torch {SHARDS_MASKS[0]}.{SHARDS_MASKS[1]} or newer, or "
                        "parallel='ddp'")


def prepare(model, config, machine):
    """Put a model on its device as the config asks: recomputed, compiled, sharded."""
    sharded = config.parallel != 'ddp'
    # in torch 2.11 cuDNN's attention rounds the rate of dropout to 1/16
    torch.backends.cuda.enable_cudnn_sdp(config.dropout * 16 % 1 == 0)
    if config.recompute:
        recompute(model)
    if config.compile:
        reason = why_not_compile(machine.device)
        say(f'running without torch.compile: {reason}' if reason else 'compiling: the first steps take longer')
        if not reason:  # all layers and all models of a process share a count of graphs; after 8 torch compiles no more
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
        for part in [] if reason else to_compile(model, machine.device.type, sharded, config.recompute):
            part.compile(dynamic=False)
    if sharded:
        shard(model, config.parallel, machine)
    if next(model.parameters()).is_meta:
        model.to_empty(device=machine.device)
        model.init_weights(torch.Generator().manual_seed(config.seed))
    model.to(machine.device)


def replicated(model, config, machine):
    """The model to call in training: under ddp it averages gradients over the ranks; a sharded model does so itself."""
    if rank_and_world_size()[1] == 1 or config.parallel != 'ddp':
        return model
    return DistributedDataParallel(model, device_ids=[machine.device] if machine.device.type == 'cuda' else None)
