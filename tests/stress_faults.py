"""
Kills a training run again and again, and compares the result with an undisturbed run.

    python tests/stress_faults.py --kills=100

Every start resumes from the last checkpoint (init_from=auto) and ends with SIGKILL at a random moment; every third kill
hits while a checkpoint is being written. In the end weights, optimizer state and the rows of metrics.csv must equal
those of the undisturbed run bit for bit; only tokens_per_s may differ. Exit code 1 if anything differs.
"""
import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure  # noqa: E402
from nanop import checkpoint, run_log  # noqa: E402
from nanop.errors import UserError, exit_on_user_error, require_values  # noqa: E402
from nanop.tokenizer import ByteTokenizer  # noqa: E402
from nanop.write_dataset import write_dataset  # noqa: E402
from train import TrainConfig, train  # noqa: E402


@dataclass
class StressConfig:
    kills: int = 100
    out_dir: str = 'out/stress_faults'     # holds both runs and their data; emptied first
    seed: int = 1                          # of the random moments
    steps_per_kill: int = 40               # length of the run
    latest_s: float = 0.5                  # latest moment of a kill, from the first sign of training

    def __post_init__(self):
        require_values(self, at_least=dict(kills=1, seed=0, steps_per_kill=1, latest_s=0.01))


def squares(folder):
    """Make a small dataset; returns its whole path."""
    text = ''.join(f'{i} squared is {i * i}.\n' for i in range(5000))
    write_dataset(folder, [('train', text, True), ('val', text, True)], ByteTokenizer(), 'squares', workers=1)
    return str(Path(folder).resolve())


def train_silently(config):
    torch.set_num_threads(1)
    with open(os.devnull, 'w') as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        train(config)


def wait_for(condition, process, limit_s):
    """Wait until condition() is true; returns whether that happened while the process lived and within the limit."""
    end = time.monotonic() + limit_s
    while process.is_alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def was_doing(out_dir, eval_interval):
    """What a killed run was doing, judged by what it left behind."""
    if list(Path(out_dir).glob('*.tmp')):
        return 'writing'
    rows = run_log.read_metrics(out_dir)
    return 'evaluating' if not rows or (int(rows[-1]['step']) + 1) % eval_interval == 0 else 'training'


def kill_often(config, stress):
    """Start `config` again and again until it ends; returns a Counter of what it was doing when it was killed."""
    rng, context, doing = random.Random(stress.seed), multiprocessing.get_context('fork'), Counter()
    out_dir = Path(config.out_dir)
    sign_of_training = out_dir / 'config.json'
    for number in tqdm(range(stress.kills + 1), unit='start', disable=not sys.stderr.isatty()):
        process = context.Process(target=train_silently, args=(config,))
        process.start()
        if number < stress.kills:
            started = time.time()
            wait_for(lambda: sign_of_training.exists() and sign_of_training.stat().st_mtime >= started, process, 60)
            wait_for(lambda: False, process, rng.uniform(0, stress.latest_s))
            if number % 3 == 2:
                wait_for(lambda: any(out_dir.glob('ckpt_*.tmp')), process, 10)
                wait_for(lambda: False, process, rng.uniform(0, 0.005))  # a write takes little longer
            process.kill()
        process.join()
        if number < stress.kills:
            if process.exitcode != -9:
                raise UserError(f'the run ended (exit code {process.exitcode}) after {number} kills: use more '
                                'steps_per_kill or a smaller latest_s')
            doing[was_doing(out_dir, config.eval_interval)] += 1
    return doing


def differences(a, b):
    """Lines that say where two finished runs differ: rows, weights, optimizer state."""
    found = []
    rows = [[{key: value for key, value in row.items() if key != 'tokens_per_s'}
             for row in run_log.read_metrics(out_dir)] for out_dir in (a, b)]
    if rows[0] != rows[1]:
        steps = [[row['step'] for row in each] for each in rows]
        found.append(f'metrics.csv: {len(steps[0])} and {len(steps[1])} rows, {len(set(steps[1]))} different steps')
    (path_a, state_a), (path_b, state_b) = checkpoint.newest(a), checkpoint.newest(b)
    if (state_a['step'], state_a['best_val_loss']) != (state_b['step'], state_b['best_val_loss']):
        found.append(f"step {state_a['step']} and {state_b['step']}")
    tensors_a, tensors_b = ({f'{file.name}: {name}': value for file in sorted(path.glob('*.safetensors'))
                             for name, value in load_file(file).items()} for path in (path_a, path_b))
    if tensors_a.keys() != tensors_b.keys():
        return [*found, 'names of tensors']
    return found + [name for name, value in tensors_a.items() if not torch.equal(value, tensors_b[name])]


def stress(config):
    """Kill, compare, print; returns the lines of differences()."""
    out_dir = Path(config.out_dir)
    shutil.rmtree(out_dir, ignore_errors=True)
    undisturbed = TrainConfig(
        out_dir=str(out_dir / 'undisturbed'), init_from='auto', dataset=squares(out_dir / 'data'), block_size=16,
        batch_tokens=256, batch_size=8, max_iters=config.steps_per_kill * config.kills, n_layer=2, n_embd=64,
        head_dim=16, base_n_embd=16, base_head_dim=16, density=0.5, parameterization='completep_supar', dropout=0.1,
        weight_decay=0.1, learning_rate=1e-2, eval_interval=10, eval_tokens=4096, log_interval=1, compile=False,
        dtype='float32', device='cpu')
    killed = replace(undisturbed, out_dir=str(out_dir / 'killed'))
    process = multiprocessing.get_context('fork').Process(target=train_silently, args=(undisturbed,))
    process.start()
    process.join()
    doing = kill_often(killed, config)
    found = differences(undisturbed.out_dir, killed.out_dir)
    same = 'weights, optimizer state and metrics equal those of the undisturbed run'
    print(f"{config.kills} kills ({', '.join(f'{n} while {what}' for what, n in doing.most_common())}), "
          f"{undisturbed.max_iters} steps: {'DIFFERENT: ' + '; '.join(found[:5]) if found else same}")
    return found


def main():
    return 1 if stress(StressConfig(**configure(StressConfig, sys.argv[1:]))) else 0


if __name__ == '__main__':
    exit_on_user_error(main)
