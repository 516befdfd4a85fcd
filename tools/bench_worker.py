"""
One contestant of bench.py: a process that builds a model and takes training steps when it is told to.

    python bench_worker.py '{"kind": "ours", "config": {..}}'

Kinds: ours (model.py, stepped by train.update), plain (the same without the multipliers and groups of its rules), peer
(the GPT of a nanoGPT-shaped model.py in the folder `peer`, stepped as nanoGPT's train.py does), products (the matrix
products of a step alone). It says when the first step is done, then answers every line on stdin, a number of steps,
with what they took, as JSON. What a peer would not import, this file does not before it runs.
"""
import inspect
import itertools
import json
import os
import re
import sys
import time
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch

from nanop.dataset import Dataset
from nanop.machine import DTYPES, keep_freed_memory, pick_device, why_not_compile

PARTS = ('data', 'forward', 'backward', 'optimizer')


def wait_for(device):
    """What was given to a GPU runs beside Python: a clock must wait for it."""
    if device.type == 'cuda':
        torch.cuda.synchronize()


def peak_memory(device):
    """Of this process on `device`, bytes."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    status = Path('/proc/self/status')
    if status.exists():  # Linux: getrusage() would begin with the peak of the process that started this one
        return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text()).group(1)) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def load_peer(folder):
    """The module model.py in `folder`."""
    spec = spec_from_file_location('peer_model', Path(folder) / 'model.py')
    module = module_from_spec(spec)
    sys.modules['peer_model'] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def build_peer(folder, shape):
    """A peer's GPT of our GPTConfig's `shape`, a dict: keys that it does not know are left out."""
    peer = load_peer(folder)
    shape = dict(shape, n_head=shape['n_embd'] // shape['head_dim'])
    known = inspect.signature(peer.GPTConfig).parameters
    return peer.GPT(peer.GPTConfig(**{key: value for key, value in shape.items() if key in known}))


def without_rules(model):
    """Takes the multipliers out of our model, but the embedding's: what is left to compare with is a plain GPT."""
    def forward(block, x, cache=None):
        x = x + block.attn(block.ln_1(x))
        return x + block.mlp(block.ln_2(x))
    for block in model.transformer.h:
        block.forward = partial(forward, block)
    model.unembed = model.lm_head


def timed_steps(c, data, device, dtype, model, take):
    """Yields the seconds that each part of a step took; take(losses) takes one, going backward from each loss."""
    clock, sequences = [], c.batch_tokens // c.block_size

    def tick():
        wait_for(device)
        clock.append(time.perf_counter())

    def losses(step):
        starts = data.train_starts(c.seed, step, sequences, c.block_size)
        inputs, targets = data.batch('train', starts, c.block_size, device)
        tick()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(inputs, targets)[1]
        tick()
        yield loss
        tick()  # its backward has run
    for step in itertools.count():
        clock.clear()
        tick()
        take(losses(step))
        tick()
        yield [end - start for start, end in zip(clock, clock[1:])]


def our_model(c, data, device):
    from train import TrainConfig, build_model
    return build_model(TrainConfig(**vars(c)), data).to(device)


def steps_of_ours(c, data, device, dtype, plain):
    """Yields the number of parameters, then the seconds that each part of a step took, train.py's own."""
    from nanop import parallel
    from train import optimizer_of, update
    keep_freed_memory()
    model = our_model(c, data, device)
    optimizer = optimizer_of(model, c, device.type)
    if plain:  # one group with weight decay and one without
        without_rules(model)
        groups = [dict(params=[p for p in model.parameters() if (p.dim() > 1) == decays], weight_decay=decay)
                  for decays, decay in ((True, c.weight_decay), (False, 0.0))]
        optimizer = torch.optim.AdamW([group for group in groups if group['params']], c.learning_rate,
                                      (c.beta1, c.beta2), c.eps, fused=True)
    if c.compile:
        for part in parallel.to_compile(model, device.type):
            part.compile(dynamic=False)

    def take(losses):
        loss, _, diverged = update(model, optimizer, losses, c.grad_clip)
        assert not diverged, f'a step has a loss of {loss}'
    yield model.num_params()
    yield from timed_steps(c, data, device, dtype, model, take)


def steps_of_peer(c, data, device, dtype, folder):
    """The same for a peer: the loop of nanoGPT's train.py on our batches."""
    model = build_peer(folder, dict(vars(c), vocab_size=c.vocab_size or data.vocab_size)).to(device)
    values = dict(weight_decay=c.weight_decay, learning_rate=c.learning_rate, betas=(c.beta1, c.beta2), adam_eps=c.eps,
                  device_type=device.type)
    optimizer = model.configure_optimizers(**{key: values[key] for key in
                                              inspect.signature(model.configure_optimizers).parameters})
    run = torch.compile(model) if c.compile else model

    def take(losses):
        for loss in losses:
            loss.backward()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    yield sum(p.numel() for p in model.parameters())
    yield from timed_steps(c, data, device, dtype, run, take)


def steps_of_products(c, data, device, dtype):
    """The same for the products of a step: of every linear layer the forward, the input's and the weight's gradient."""
    keep_freed_memory()
    weights = [module.weight.detach().to(dtype) for module in our_model(c, data, device).modules()
               if isinstance(module, torch.nn.Linear)]
    inputs, outputs = ([torch.randn(c.batch_tokens, size, device=device).to(dtype) for size in sizes]
                       for sizes in zip(*(weight.shape[::-1] for weight in weights)))
    yield sum(weight.numel() for weight in weights)
    while True:
        parts = []
        for products in ([(x, w.T) for x, w in zip(inputs, weights)],
                         [(dy, w) for dy, w in zip(outputs, weights)], [(dy.T, x) for x, dy in zip(inputs, outputs)]):
            wait_for(device)
            started = time.perf_counter()
            for a, b in products:
                a @ b
            wait_for(device)
            parts.append(time.perf_counter() - started)
        yield [0.0, parts[0], parts[1] + parts[2], 0.0]


def main():
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # what a peer prints goes to stderr
    c, kind = SimpleNamespace(**spec['config']), spec['kind']
    data, device, dtype = Dataset(c.dataset), pick_device(c.device), DTYPES[spec['dtype']]
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('highest' if dtype == torch.float32 else 'high')
    if c.compile and why_not_compile(device):  # a small function is compiled, before any clock of a step runs
        raise SystemExit(f'Error: torch.compile does not work here: {why_not_compile(device)}')
    if kind == 'peer':
        steps = steps_of_peer(c, data, device, dtype, spec['peer'])
    elif kind == 'products':
        steps = steps_of_products(c, data, device, dtype)
    else:
        steps = steps_of_ours(c, data, device, dtype, plain=kind == 'plain')
    print(json.dumps(dict(num_params=next(steps), first_step_alone_s=sum(next(steps)))), file=answers)
    for line in sys.stdin:
        seconds = [next(steps) for _ in range(int(line))]
        print(json.dumps(dict(seconds=seconds, peak_bytes=peak_memory(device))), file=answers)


if __name__ == '__main__':
    main()
