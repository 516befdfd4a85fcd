"""
One contestant of bench.py: a process that builds a model and takes training steps when it is told to.

    python bench_worker.py '{"kind": "ours", "config": {..}}'

Kinds: ours (model.py, stepped by train.update), peer (the GPT of a nanoGPT-shaped model.py in the folder `peer`,
stepped as nanoGPT's train.py does, in `dtype` and compiled or not), products (its matrix products alone). It says when
the first step is done, then answers every line on stdin, a number of steps, with what they took, as JSON.
"""
import inspect
import json
import os
import re
import sys
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch

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


def steps_of_ours(c, data, device):
    """Yields the seconds that each part of a step took: train.py's own step."""
    from hardware import keep_freed_memory, pick_dtype, why_not_compile
    from train import TrainConfig, build_model, update
    keep_freed_memory()
    c = TrainConfig(**vars(c))
    dtype = pick_dtype(c.dtype, device)
    model = build_model(c, data).to(device)
    if c.compile and not why_not_compile(device):
        model.compile(dynamic=False)
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2), c.eps, device.type)
    sequences, clock = c.batch_tokens // c.block_size, []

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
        tick()
    step = 0
    while True:
        clock.clear()
        tick()
        update(model, optimizer, losses(step), c.grad_clip)
        tick()
        step += 1
        yield [end - start for start, end in zip(clock, clock[1:])]


def steps_of_peer(c, data, device, folder, dtype):
    """The same for a peer: the loop of nanoGPT's train.py on our batches."""
    model = build_peer(folder, dict(vars(c), vocab_size=c.vocab_size or data.vocab_size)).to(device)
    values = dict(weight_decay=c.weight_decay, learning_rate=c.learning_rate, betas=(c.beta1, c.beta2), adam_eps=c.eps,
                  device_type=device.type)
    optimizer = model.configure_optimizers(**{key: values[key] for key in
                                              inspect.signature(model.configure_optimizers).parameters})
    run = torch.compile(model) if c.compile else model
    dtype, step, sequences = getattr(torch, dtype), 0, c.batch_tokens // c.block_size

    def tick():
        wait_for(device)
        clock.append(time.perf_counter())
    while True:
        clock = []
        tick()
        starts = data.train_starts(c.seed, step, sequences, c.block_size)
        inputs, targets = data.batch('train', starts, c.block_size, device)
        tick()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = run(inputs, targets)[1]
        tick()
        loss.backward()
        tick()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick()
        step += 1
        yield [end - start for start, end in zip(clock, clock[1:])]


def steps_of_products(c, data, device):
    """The same for the products of a step: of every linear layer the forward, the input's and the weight's gradient."""
    from hardware import keep_freed_memory, pick_dtype
    from train import TrainConfig, build_model
    keep_freed_memory()
    dtype = pick_dtype(c.dtype, device)
    model = build_model(TrainConfig(**vars(c)), data)
    weights = [module.weight.detach().to(device, dtype) for module in model.modules()
               if isinstance(module, torch.nn.Linear)]
    inputs, outputs = ([torch.randn(c.batch_tokens, size, device=device).to(dtype) for size in sizes]
                       for sizes in zip(*(weight.shape[::-1] for weight in weights)))
    while True:
        parts = [0.0]
        for products in ([(x, w.T) for x, w in zip(inputs, weights)],
                         [(dy, w) for dy, w in zip(outputs, weights)], [(dy.T, x) for x, dy in zip(inputs, outputs)]):
            wait_for(device)
            started = time.perf_counter()
            for a, b in products:
                a @ b
            wait_for(device)
            parts.append(time.perf_counter() - started)
        yield [0.0, parts[1], parts[2] + parts[3], 0.0]


def main():
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # what a peer prints goes to stderr
    from dataset import Dataset
    from hardware import pick_device
    c = SimpleNamespace(**spec['config'])
    data, device = Dataset(c.dataset), pick_device(c.device)
    if spec['kind'] == 'peer':
        steps = steps_of_peer(c, data, device, spec['peer'], spec['dtype'])
    else:
        steps = {'ours': steps_of_ours, 'products': steps_of_products}[spec['kind']](c, data, device)
    print(json.dumps(dict(first_step_s=sum(next(steps)))), file=answers)
    for line in sys.stdin:
        seconds = [next(steps) for _ in range(int(line))]
        print(json.dumps(dict(seconds=seconds, peak_bytes=peak_memory(device))), file=answers)


if __name__ == '__main__':
    main()
