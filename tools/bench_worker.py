"""
One contestant of bench.py: a process that takes training steps on command and reports their times.

    python -m tools.bench_worker '{"kind": "ours", "config": {..}, "dtype": "float32"}'

    ours      model.py with the training step of train.py
    plain     the same without the multipliers and the parameter groups of its rules
    peer      the GPT of a nanoGPT-shaped model.py in the folder `peer`, with the training step of nanoGPT's train.py
    products  only the matrix products of a training step

After its first step it writes a line. Then every line that it reads is a number of steps to take, and it answers with
their times, as JSON. It imports train.py only for the kinds that need it, so that a peer's start does not include that.
"""
import inspect
import itertools
import json
import os
import sys
import time
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch

from nanop.dataset import Dataset
from nanop.machine import peak_memory_bytes, set_up, why_not_compile

PARTS = ('data', 'forward', 'backward', 'optimizer')


def synchronized_time(device):
    """The time in seconds, once the device has finished what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def build_peer(folder, shape):
    """The GPT of a peer's model.py; its GPTConfig takes the keys that it knows of `shape`, those of our GPTConfig."""
    spec = spec_from_file_location('peer_model', Path(folder) / 'model.py')
    peer = module_from_spec(spec)
    sys.modules['peer_model'] = peer  # dataclasses look up their module
    spec.loader.exec_module(peer)
    shape = dict(shape, n_head=shape['n_embd'] // shape['head_dim'])
    known = inspect.signature(peer.GPTConfig).parameters
    return peer.GPT(peer.GPTConfig(**{key: value for key, value in shape.items() if key in known}))


def remove_multipliers(model):
    """Turn our model into a plain GPT for comparison. The embedding's multiplier stays."""
    def forward(block, x):
        x = x + block.attn(block.ln_1(x))
        return x + block.mlp(block.ln_2(x))
    for block in model.transformer.h:
        block.forward = partial(forward, block)
    model.unembed = model.lm_head


def timed_steps(c, data, machine, model, take_step):
    """Yield the seconds of the PARTS of each training step, summed over its micro-batches; take_step(losses)
    back-propagates and updates."""
    times, sequences = [], c.batch_tokens // c.block_size  # in micro-batches of c.batch_size

    def tick():
        times.append(synchronized_time(machine.device))

    def losses(step):
        starts = data.train_starts(c.seed, step, sequences, c.block_size)
        for first in range(0, sequences, c.batch_size):
            inputs, targets = data.batch('train', starts[first:first + c.batch_size], c.block_size, machine.device)
            tick()
            with machine.autocast():
                loss = model(inputs, targets)[1] / (sequences // c.batch_size)
            tick()
            yield loss
            tick()  # the backward has run
    for step in itertools.count():
        times.clear()
        tick()
        take_step(losses(step))
        tick()
        *by_micro_batch, optimizer_s = [end - start for start, end in zip(times, times[1:])]
        yield [*(sum(by_micro_batch[part::3]) for part in range(3)), optimizer_s]


# The kinds of contestants. Each returns (number of parameters, iterator of the seconds of each step's parts).
def our_model(c, data):
    from train import TrainConfig, build_model
    return build_model(TrainConfig(**vars(c)), data)


def ours(c, data, machine, plain=False):
    from nanop import parallel
    from train import make_optimizer, update
    model = our_model(c, data)
    if plain:
        remove_multipliers(model)
    parallel.prepare(model, c, machine)
    optimizer = make_optimizer(model, c, machine.device.type)
    if plain:  # one group with weight decay and one without
        decayed = [p for _, p in model.weights() if p.dim() > 1]
        others = [p for _, p in model.weights() if p.dim() == 1]
        groups = [dict(params=decayed), dict(params=others, weight_decay=0.0)]
        optimizer = torch.optim.AdamW(groups, c.learning_rate, (c.beta1, c.beta2), c.eps, c.weight_decay, fused=True)

    def take_step(losses):
        loss, _, diverged = update(model, optimizer, losses, c.grad_clip)
        assert not diverged, f'a step has a loss of {loss}'
    return model.num_params(), timed_steps(c, data, machine, model, take_step)


def peer(c, data, machine):
    model = build_peer(c.peer, dict(vars(c), vocab_size=c.vocab_size or data.vocab_size)).to(machine.device)
    values = dict(weight_decay=c.weight_decay, learning_rate=c.learning_rate, betas=(c.beta1, c.beta2), adam_eps=c.eps,
                  device_type=machine.device.type)
    known = inspect.signature(model.configure_optimizers).parameters
    optimizer = model.configure_optimizers(**{key: values[key] for key in known})

    def take_step(losses):
        for loss in losses:
            loss.backward()
        if c.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    num_params = sum(p.numel() for p in model.parameters())
    return num_params, timed_steps(c, data, machine, torch.compile(model) if c.compile else model, take_step)


def products(c, data, machine):
    linears = [module for module in our_model(c, data).modules() if isinstance(module, torch.nn.Linear)]
    weights = [linear.weight.detach().to(machine.device, machine.dtype) for linear in linears]
    def noise(size):
        return torch.randn(c.batch_size * c.block_size, size, device=machine.device).to(machine.dtype)
    micro_batches = c.batch_tokens // c.block_size // c.batch_size
    inputs = [noise(linear.in_features) for linear in linears]
    grads = [noise(linear.out_features) for linear in linears]  # of the outputs
    forward = [(x, w.T) for x, w in zip(inputs, weights)]
    backward = [(dy, w) for dy, w in zip(grads, weights)] + [(dy.T, x) for dy, x in zip(grads, inputs)]

    def steps():
        while True:
            times = [synchronized_time(machine.device)]
            for pairs in (forward, backward):
                for a, b in pairs * micro_batches:
                    a @ b
                times.append(synchronized_time(machine.device))
            yield [0.0, times[1] - times[0], times[2] - times[1], 0.0]
    return sum(weight.numel() for weight in weights), steps()


def main():
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # what a peer prints goes to stderr
    c, kind = SimpleNamespace(**spec['config']), spec['kind']
    data = Dataset(c.dataset)
    machine = set_up(c.device, spec['dtype'], keep_memory=kind != 'peer')
    if c.compile and why_not_compile(machine.device):  # the compiler starts here, before any step is timed
        raise SystemExit(f'Error: torch.compile does not work here: {why_not_compile(machine.device)}')
    build = dict(ours=ours, plain=partial(ours, plain=True), peer=peer, products=products)[kind]
    num_params, steps = build(c, data, machine)
    print(json.dumps(dict(num_params=num_params, first_step_alone_s=sum(next(steps)))), file=answers)
    for line in sys.stdin:
        seconds = [next(steps) for _ in range(int(line))]
        print(json.dumps(dict(seconds=seconds, peak_bytes=peak_memory_bytes(machine.device))), file=answers)


if __name__ == '__main__':
    main()
