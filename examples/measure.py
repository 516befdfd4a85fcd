"""
Is the port right? Checks plain_gpt.py and plain_gpt_completep.py with the coordinate checker over width and depth, then
trains both at a few learning rates and measures how far the best one moves. Minutes on one core, without a download.

    python examples/measure.py
"""
import math
import sys
from pathlib import Path

import plain_gpt
import plain_gpt_completep
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanop.coordinates import around, check  # noqa: E402
from nanop.errors import UserError, exit_on_user_error  # noqa: E402
from tools.sweep_report import compare  # noqa: E402

FILES = {'sp': plain_gpt, 'completep': plain_gpt_completep}
CHECKED = dict(width=(64, 128, 256, 512), depth=(2, 4, 8, 16))
TRAINED = dict(width=(32, 128), depth=(2, 16))  # the base, and a target
IDS, CONTEXT = 32, 32
RATES, SEED, STEPS, SEQUENCES = [2.0 ** k for k in range(-9, -3)], 1, 200, 16
WEIGHTS = {'embeddings': r'tokens\.weight', 'hidden': r'blocks\..*\.weight', 'head': r'head\.weight'}
MODULES = {'attention': r'blocks\.\d+\.out', 'mlp': r'blocks\.\d+\.down', 'residual': r'blocks\.\d+', 'logits': 'head'}


def config_of(file, axis, size, **keys):
    """The base shape with another width, in heads of the base's size, or another depth."""
    shape = dict(width=size, heads=size // 16) if axis == 'width' else dict(depth=size)
    return file.Config(vocabulary=IDS, context=CONTEXT, **shape, **keys)


def random_batches(count, sequences, seed):
    """[(ids, targets)], each (B, T): any two ids in a row have two successors, equally likely, so no model can reach a
    loss below log(2), and one that does not look back by two stays far above it."""
    successors = torch.randint(IDS, (IDS, IDS, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = list(torch.randint(IDS, (2, count, sequences), generator=generator))
    while len(ids) < CONTEXT + 1:
        ids.append(successors[ids[-2], ids[-1], torch.randint(2, (count, sequences), generator=generator)])
    rows = torch.stack(ids, dim=-1)  # (count, B, T + 1)
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def check_coordinates(axis, name, control=None, sizes=None, seeds=3, steps=5, lr=1e-3):
    """The CoordinateReport of a file over width or depth. Its bands are for embeddings of size 1."""
    batches = random_batches(steps + 1, 16, seed=0)  # the last one, -1, is the probe

    def make_with(file):
        def make(size):
            model = file.GPT(config_of(file, axis, size, embedding_std=1.0))
            return model, file.make_optimizer(model, lr), lambda step: model(*batches[step])
        return make
    expected = {'grad/eps .*': around(0, 'eps must follow the gradient')}
    if axis == 'width':
        logits = around(0, 'what is random in the logits falls as width^-1/2, until learning hides it', to=-0.5)
        expected |= {'activation logits .*': logits, f'change logits (1|{steps}) .*': logits}
    else:  # the final norm hides from the logits what depth does; of the stream only the last block is judged
        expected |= {'(activation|change) (logits .*|residual .* (lowest|highest))': None}
    return check(make_with(FILES[name]), sizes or CHECKED[axis], MODULES, WEIGHTS, r'blocks\.\d+' * (axis == 'depth'),
                 expected, make_with(FILES[control]) if control else None, seeds, steps, (name, control),
                 f'{name} over {axis}', axis)


def loss_after_training(file, config, lr, seed, steps):
    """Loss on sequences that are not trained on, nats per token; infinity if training diverged."""
    torch.manual_seed(seed)
    model = file.GPT(config)
    file.train(model, random_batches(steps, SEQUENCES, seed), lr)
    with torch.no_grad():
        loss = torch.stack([model(*batch) for batch in random_batches(8, 64, seed=0)]).mean().item()
    return loss if loss == loss else float('inf')


def print_drifts():
    """Train both files at every rate and size; print the losses and how far the best rate moves."""
    for axis, sizes in TRAINED.items():
        print(f"{'loss by rate':<22}", *(f'2^{math.log2(lr):<3.0f}' for lr in RATES))
        for name, file in FILES.items():
            curves = []
            for size in sizes:
                losses = [loss_after_training(file, config_of(file, axis, size), lr, SEED, STEPS) for lr in RATES]
                print(f"{f'{name}, {axis} {size}':<22}", *(f'{loss:.3f}' for loss in losses), flush=True)
                curves.append({lr: {SEED: loss} for lr, loss in zip(RATES, losses)})
            found = compare(curves)
            print(f'{name} over {axis}: the best rate moves by {found.drift:+.2f} octaves, and to keep it costs '
                  f'{found.regret_frac:.1%}')


def main():
    if sys.argv[1:]:
        raise UserError(f"'{sys.argv[1]}' is not allowed: there are no flags, change the constants in the file")
    for axis in CHECKED:
        print(check_coordinates(axis, 'completep', control='sp'), '\n')
        print(check_coordinates(axis, 'sp').summary(), '\n')
    print_drifts()


if __name__ == '__main__':
    exit_on_user_error(main)
