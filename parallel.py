"""
One model on many processes: joining them, copying the model to each or sharding it over them, and agreeing.

    ddp     every process holds the whole model; gradients are averaged
    fsdp    every process holds a part of every tensor; a block's tensors are gathered when it is their turn (FSDP2)
    hsdp    fsdp over the processes of a machine, copied over the machines

torchrun starts the processes; the data that one takes depends on the step, its rank and their number only.
"""
import os
import time
from datetime import timedelta
from functools import partial
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from configurator import UserError

KINDS = ('ddp', 'fsdp', 'hsdp')
WHOLE = 48  # layers up to which a GPU's model is compiled whole: a little faster, but every layer takes its time


def fresh_store(store, rank, world_size, timeout_s):
    """`store` under a prefix that the processes alive have agreed on. Raises DistStoreError after timeout_s.

    torchrun keeps one store over restarts, and a process that finds there the address of one killed before waits for it
    (torch 2.13). So the first process names this life after itself, in answer to a call that no earlier life has made.
    """
    name = uuid4().hex
    if rank:
        store.set(f'call/{rank}', name)
        name = store.get(f'answer/{name}').decode()
        store.set(f'{name}/{rank}', 'heard')
        return dist.PrefixStore(name, store)
    end = time.monotonic() + timeout_s
    for other in range(1, world_size):
        while not store.check([f'{name}/{other}']):  # until then, what is read may be an earlier life's call
            store.set('answer/' + store.get(f'call/{other}').decode(), name)
            time.sleep(0.01)
            if time.monotonic() > end:
                raise dist.DistStoreError(f'process {other} did not join in {timeout_s:g} s')
    return dist.PrefixStore(name, store)


def join_processes(device, timeout_s):
    """Under torchrun: joins the process group and makes this process's GPU the current one. Raises UserError."""
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
    # gloo for what the CPUs tell each other: checkpoints, and whether to stop
    dist.init_process_group('cpu:gloo,cuda:nccl', **group, device_id=torch.device(device))


def lost_contact(error):
    """Whether an exception of PyTorch's says that another process is gone, or silent for longer than the time-out."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and 'gloo' in str(error)


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(function):
    """What function() returns, or the UserError it raises, on the first process; every process gets it."""
    result = None
    if rank_and_world_size()[0] == 0:
        try:
            result = function()
        except UserError as error:
            result = error
    if dist.is_initialized():
        box = [result]
        dist.broadcast_object_list(box, device=torch.device('cpu'))
        result = box[0]
    if isinstance(result, UserError):
        raise result
    return result


def largest(number):
    """The largest `number`, an int, of all processes."""
    if not dist.is_initialized():
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def recompute(model):
    """Keeps only the input of every block for the backward, which runs the block's forward again."""
    for block in model.transformer.h:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)


def to_compile(model, device_type, sharded=False, recompute=False):
    """The modules to give to torch.compile: on a GPU the model, on a CPU its blocks, or the parts of its blocks.

    Blocks share one graph: on a CPU as fast as the whole, for half of the time that compiling takes, and the loss stays
    as it is, a loop that would be unrolled. But they break where sharded ones are gathered, and run uncompiled where
    they are recomputed: there their parts are compiled, which share two graphs. So are those of a deep model on a GPU.
    """
    blocks = model.transformer.h
    if device_type == 'cpu' and not sharded and not recompute:
        return list(blocks)
    if device_type != 'cpu' and not sharded and len(blocks) <= WHOLE:
        return [model]
    return [part for block in blocks for part in (block.attn, block.mlp)]


def shard(model, kind, device, dtype):
    """Shards a model in place, block by block, with blocks' weights sent and used as `dtype`, gradients as float32.

    On the meta device or with weights, the same in every process. Raises UserError.
    """
    world_size, per_host = dist.get_world_size(), int(os.environ['LOCAL_WORLD_SIZE'])
    if kind == 'hsdp':
        if world_size % per_host:
            raise UserError(f"parallel='hsdp' needs as many processes on every machine, not {per_host} of {world_size}")
        mesh = init_device_mesh(device.type, (world_size // per_host, per_host), mesh_dim_names=('copy', 'shard'))
    else:
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=('shard',))
    # norms and embeddings stay in float32, and so does the stream between the blocks, as under autocast
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        if block.attn.q_norm:
            fully_shard([block.attn.q_norm, block.attn.k_norm], mesh=mesh)
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh)


def copied(model, device):
    """The model as DDP calls it: the same module, gradients averaged over the processes."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
