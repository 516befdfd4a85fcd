"""
Train a GPT. Config files and flags apply from left to right; --help lists every key.

    python train.py config/completep_small.py                                   minutes on a laptop CPU
    python train.py config/completep_small.py --n_layer=16 --out_dir=out/deep   the same hyperparameters, twice as deep
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      one machine with 8 GPUs
    python train.py --out_dir=out/deep --init_from=resume                       go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/completep_1p5b_deep.py --parallel=fsdp   sharded
"""
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from configurator import configure, merge
from model import GPT, OPTIMIZERS, GPTConfig, length_rules
from nanop import checkpoint, parallel
from nanop.dataset import open_dataset
from nanop.errors import UserError, exit_on_user_error, require, require_values
from nanop.huggingface import from_hf, require_start
from nanop.machine import set_up
from nanop.optimizers import clip_gradients
from nanop.parallel import say, split_batch, sum_over_ranks
from nanop.run_folder import Progress, RunFolder, require_fit
from nanop.run_log import Throughput, startup_text
from nanop.sampling import show_sample
from nanop.schedule import SCHEDULES, branch_keys, lr_fraction, require_schedule
from nanop.terminal import StopSignals

OUR_STARTS = 'scratch', 'resume', 'auto'
NOT_RESUMED = {'out_dir', 'init_from', 'overwrite', 'eval_only', 'new_data', 'decay_steps'}
TRAIN_CHOICES = dict(
    optimizer=OPTIMIZERS, clip_norm=('plain', 'scaled'), parallel=parallel.KINDS,
    schedule=SCHEDULES, weight_decay_mode=('coupled', 'independent'))


@dataclass
class TrainConfig(GPTConfig):
    # the run
    out_dir: str = 'out'                   # folder for everything that the run writes; '': nothing is written
    overwrite: bool = False                # True: start anew although out_dir holds checkpoints
    init_from: str = 'scratch'             # scratch, resume (go on in out_dir), auto (resume if there is a checkpoint,
    #                                        else scratch), gpt2, gpt2-medium, .. or a folder of Hugging Face; with
    #                                        decay_steps a checkpoint, out/long/ckpt_000002000
    decay_steps: int = 0                   # > 0: branch off that checkpoint into out_dir and decay in this many steps
    new_data: bool = False                 # True: resume although the dataset is not the one trained on so far
    seed: int = 1337                       # weights, data order and dropout
    # data
    dataset: str = 'stdlib'                # a folder of data/, or any folder by its whole path
    batch_tokens: int = 16384              # tokens per optimizer step, over all devices and micro-batches
    batch_size: int = 32                   # sequences per micro-batch and device; gradient accumulation follows from it
    # duration
    max_iters: int = 1000                  # optimizer steps, unless one of the next two is set
    train_tokens: int = 0                  # duration in tokens
    tokens_per_param: float = 0.0          # duration in tokens per parameter, masked ones too (arXiv:2405.15743)
    # base hyperparameters of the optimizer
    learning_rate: float = 4e-3            # peak
    weight_decay: float = 0.0              # PyTorch's: a step shrinks weights by lr * weight_decay
    weight_decay_mode: str = 'coupled'     # coupled (by lr * weight_decay), independent (by weight_decay, at the peak)
    tau_ema: float = 0.0                   # > 0: weights average their updates over this fraction of the run, by
    #                                        weight_decay = 1 / (tau_ema * learning_rate * steps)
    optimizer: str = 'adamw'               # adamw, lion, muon (AdamW for all but hidden matrices), sgd
    muon_mult: float = 5.0                 # Muon's learning rate relative to AdamW's
    beta1: float = 0.9                     # also the momentum of Muon and SGD
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0                 # largest norm of the whole gradient; 0: no clipping
    clip_norm: str = 'plain'               # that norm: plain, scaled (the same at every size, by the rules)
    skip_grad_norm: float = 0.0            # after the warm-up, skip a step whose gradient norm is more than this many
    #                                        times the median of the last steps; 0: skip none
    # batch and duration of the tuning run: length_rules rescale learning_rate, weight_decay, eps and betas; 0: do not
    base_batch_tokens: int = 0
    base_train_tokens: int = 0
    rescale: str = 'lr,weight_decay,eps,beta1,beta2'  # what they act on; beta1 loses in longer runs: docs/variants.md
    # schedule: a factor on every learning rate
    warmup_frac: float = 0.1               # fraction of the steps, linear from zero
    schedule: str = 'linear'               # after the warm-up: linear, cosine, constant, wsd (constant, then linear)
    decay_frac: float = 0.0                # wsd: fraction of the steps, at the end, in which the rate falls
    final_lr_frac: float = 0.0             # where linear, cosine and wsd end
    # evaluation, checkpoints and logs
    eval_interval: int = 250               # steps between validations, each followed by a checkpoint; 0: only the last
    eval_tokens: int = 65536               # validation tokens, the same ones every time
    eval_only: bool = False                # validate once and stop
    always_save_checkpoint: bool = True    # False: only when the validation loss is the best so far
    keep_checkpoints: int = 2              # so many stay, the newest; more for export_hf.py --average and decay_steps
    log_interval: int = 10                 # steps between rows of metrics.csv
    sample_tokens: int = 0                 # length of a sample to print at the end
    wandb_log: bool = False                # also log to Weights & Biases
    wandb_project: str = 'nanoP'
    wandb_run_name: str = ''               # '': out_dir
    # machine
    device: str = 'auto'                   # auto, cpu, cuda, cuda:1, mps
    dtype: str = 'auto'                    # of the matrix products: auto, float32, bfloat16, float16
    compile: bool = True                   # torch.compile where a compiler works
    recompute: bool = False                # save memory: run every block's forward again in the backward
    parallel: str = 'ddp'                  # under torchrun: ddp (the model on every device), fsdp (sharded over all
    #                                        devices), hsdp (sharded within a machine, copied between machines)
    timeout_s: int = 600                   # end the run when another process is silent for longer

    one_of = ('max_iters', 'train_tokens', 'tokens_per_param'), ('weight_decay', 'tau_ema')  # keys that set one thing

    def __post_init__(self):
        super().__post_init__()
        require_values(
            self, choices=TRAIN_CHOICES, fractions=('warmup_frac', 'decay_frac', 'final_lr_frac'),
            below_one=('beta1', 'beta2'), at_least=dict(
                decay_steps=0, batch_tokens=1, batch_size=1, max_iters=1, train_tokens=0, tokens_per_param=0,
                learning_rate=0, weight_decay=0, tau_ema=0, muon_mult=1e-6, eps=1e-38, grad_clip=0, skip_grad_norm=0,
                base_batch_tokens=0, base_train_tokens=0, eval_interval=0, eval_tokens=1, log_interval=1,
                sample_tokens=0, seed=0, keep_checkpoints=2, timeout_s=1))
        require_schedule(self)
        checkpoint.require_source(self)
        if not self.decay_steps:
            require_start(self, OUR_STARTS)
        require(self, 'tau_ema', not (self.tau_ema and self.weight_decay),
                f'weight_decay={self.weight_decay} sets the decay, too, leave one of them at 0')
        require(self, 'train_tokens', not (self.train_tokens and self.tokens_per_param),
                f'tokens_per_param={self.tokens_per_param} sets the duration, too, leave one of them at 0')
        require(self, 'max_iters', self.max_iters == TrainConfig.max_iters or not (self.train_tokens or
                self.tokens_per_param), 'train_tokens or tokens_per_param sets the duration, too, leave it out')
        decays = self.tau_ema or self.weight_decay and self.weight_decay_mode == 'independent'
        require(self, 'learning_rate', self.learning_rate or not decays,
                'tau_ema and independent weight decay divide by it, use a value above 0')
        require(self, 'optimizer', self.optimizer != 'sgd' or not self.tau_ema and self.weight_decay_mode == 'coupled',
                'its decay is coupled, leave tau_ema and weight_decay_mode out')
        require(self, 'optimizer', self.optimizer == 'adamw' or not (self.base_batch_tokens or self.base_train_tokens),
                'base_batch_tokens and base_train_tokens have rules for adamw only, leave them at 0')
        require(self, 'optimizer', self.optimizer != 'muon' or self.parallel == 'ddp',
                f"it needs whole matrices and parallel='{self.parallel}' shards them, use ddp or another optimizer")
        durations = self.train_tokens or self.tokens_per_param or self.base_train_tokens
        require(self, 'base_batch_tokens', durations or not self.base_batch_tokens, 'it needs a duration in tokens: '
                'set train_tokens or tokens_per_param, or base_train_tokens to keep max_iters')
        known, named = list(length_rules(1, 1)), self.rescale.split(',')
        require(self, 'rescale', set(named) <= set(known) and len(set(named)) == len(named) and (
                named == known or self.base_batch_tokens or self.base_train_tokens),
                f"use some of {','.join(known)}, each once, beside base_batch_tokens or base_train_tokens")
        require(self, 'clip_norm', self.grad_clip or self.skip_grad_norm or self.clip_norm == 'plain',
                'it would do nothing, set grad_clip or leave it out')


# -----------------------------------------------------------------------------
# Arithmetic on the keys
def num_steps(config, num_params, step=0, tokens=0):
    """The optimizer step at which a run ends that has come to `step` with `tokens`."""
    goal = config.train_tokens or config.tokens_per_param * num_params
    return max(1, step + round((goal - tokens) / config.batch_tokens)) if goal else config.max_iters


def rescaled(config, steps):
    """The config with lr, weight decay, eps and betas for a run of `steps`: model.py's length_rules on the base values.

    tau_ema and independent weight decay become the coupled weight decay that they stand for.
    """
    c, tokens = config, steps * config.batch_tokens
    batch_ratio = c.batch_tokens / (c.base_batch_tokens or c.batch_tokens)
    duration_ratio = tokens / (c.base_train_tokens or tokens)
    factors = {key: factor if key in c.rescale.split(',') else 1.0
               for key, factor in length_rules(batch_ratio, duration_ratio).items()}
    for key in sorted(('beta1', 'beta2'), key=lambda key: getattr(c, key)):  # the smaller beta reaches 0 first
        largest = 1 / (1 - getattr(c, key))
        if factors[key] > max(1, largest * (1 - 1e-9)):  # 1 - beta would exceed 1
            raise UserError(f'batch_tokens is {batch_ratio:g} and the duration {duration_ratio:g} times the base: '
                            f'{key}={getattr(c, key)} has no counterpart there; keep their ratio below {largest:g}')
    learning_rate, weight_decay = c.learning_rate * factors['lr'], c.weight_decay * factors['weight_decay']
    if weight_decay and c.weight_decay_mode == 'independent':
        weight_decay /= c.learning_rate
    if c.tau_ema:
        weight_decay = 1 / (c.tau_ema * learning_rate * steps)
    return replace(c, learning_rate=learning_rate, weight_decay=weight_decay, tau_ema=0.0, weight_decay_mode='coupled',
                   eps=c.eps * factors['eps'], beta1=c.beta1 + (1 - c.beta1) * (1 - factors['beta1']),
                   beta2=c.beta2 + (1 - c.beta2) * (1 - factors['beta2']))


def make_optimizer(model, rates, device_type):
    """The model's optimizer with the values of `rates`, a config from rescaled()."""
    return model.configure_optimizers(rates.weight_decay, rates.learning_rate, (rates.beta1, rates.beta2), rates.eps,
                                      device_type, rates.optimizer, rates.muon_mult, rates.clip_norm)


# -----------------------------------------------------------------------------
# The model and one optimizer step
def build_model(config, data):
    """A model with fresh weights for this dataset, on the meta device if it will be sharded; or one from Hugging Face,
    which must fit the config and the dataset."""
    c = config
    vocab_size = c.vocab_size or data.vocab_size
    shape = GPTConfig.of(c, vocab_size=vocab_size,
                         real_vocab_size=c.real_vocab_size or min(data.real_vocab_size, vocab_size))
    if c.init_from not in OUR_STARTS and not c.decay_steps:
        model, meta = from_hf(c.init_from, GPT, shape, c.block_size)
        usual = GPTConfig()
        require_fit(c.init_from, {key: (value, getattr(shape, key)) for key, value in asdict(model.config).items()
                                  if getattr(c, key) != getattr(usual, key)}, meta or data.meta, data.meta)
    else:
        with torch.device('meta') if c.parallel != 'ddp' else nullcontext():
            model = GPT(shape, torch.Generator().manual_seed(c.seed))
    if data.real_vocab_size > model.config.vocab_size:
        raise UserError(f"dataset '{c.dataset}' has {data.real_vocab_size} ids, the model vocab_size="
                        f"{model.config.vocab_size}: use vocab_size=0 for the dataset's own, or another dataset")
    return model


def micro_losses(replica, data, starts, batch_size, block_size, machine):
    """Yield the loss of one micro-batch after another; they add up to the mean over the sequences at `starts`."""
    for first in range(0, len(starts), batch_size):
        inputs, targets = data.batch('train', starts[first:first + batch_size], block_size, machine.device)
        # DDP averages gradients in the last backward only; no_sync must be on around forward and backward
        syncs = first + batch_size >= len(starts) or not isinstance(replica, DistributedDataParallel)
        with nullcontext() if syncs else replica.no_sync():
            with machine.autocast():
                loss = replica(inputs, targets)[1] / (len(starts) // batch_size)
            yield loss  # update() runs its backward now, inside no_sync and outside autocast


def update(model, optimizer, losses, grad_clip=0.0, largest_norm=math.inf, scaler=None):
    """Take one optimizer step on the sum of the micro-batch losses, each back-propagated before the next is computed.

    Returns (loss, gradient norm before clipping, diverged). If loss or norm is not finite the run has diverged and no
    step is taken, unless float16's scaler can still find a scale at which they are. A gradient whose norm is above
    `largest_norm` is dropped.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model, optimizer, grad_clip)
    total = sum_over_ranks(total) / parallel.rank_and_world_size()[1]
    loss, grad_norm = torch.stack([total, grad_norm]).tolist()  # waits for the device
    scaler_may_recover = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(loss)
    diverged = not (scaler_may_recover or math.isfinite(loss) and math.isfinite(grad_norm))
    if not diverged:
        if not grad_norm > largest_norm:  # also for nan, which float16's scaler handles
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, diverged


@torch.no_grad()
def evaluate(model, data, config, batch_size, machine):
    """Mean loss over the fixed validation tokens, in nats per token; every rank computes its share."""
    rank, world_size = parallel.rank_and_world_size()
    starts = data.val_starts(config.eval_tokens, config.block_size)
    total = torch.zeros((), device=machine.device)
    model.eval()
    for first in range(0, len(starts), world_size * batch_size):
        mine = starts[first + rank * batch_size:][:batch_size]
        # a rank without sequences still runs a forward pass: under FSDP the others wait for its shard
        inputs, targets = data.batch('val', mine if len(mine) else starts[:1], config.block_size, machine.device)
        with machine.autocast():
            total += model(inputs, targets)[1] * len(mine)
    model.train()
    return sum_over_ranks(total).item() / len(starts)


# -----------------------------------------------------------------------------
# The run
def train(config, stop=None):
    """Train as the config says. Returns a summary, which is also written to out_dir/summary.json, if it is written to.

    A run that diverges returns normally, with diverged_at = the step that was not taken; so does one that is stopped
    through `stop`, a StopSignals, with stopped_by = the signal, but it saves its state and no summary.
    """
    machine = set_up(config.device, config.dtype)
    rank, world_size = parallel.rank_and_world_size()
    sequences, local, accumulation = split_batch(config, world_size)
    batch_size = local // accumulation
    parallel.require_shardable(config, machine)
    data = open_dataset(config.dataset)
    data.check_readable(config.eval_tokens, config.block_size)  # before the first step, not after the last
    with RunFolder(config) as folder:
        # ---- model and optimizer
        model = build_model(config, data)
        c = replace(config, **asdict(model.config))  # with the values that are the dataset's, or a folder's
        parallel.prepare(model, c, machine)  # to the device; recompute, compile, shard
        at = Progress.of(folder.saved)
        first_step, steps = at.step, num_steps(c, model.num_params(), at.step, at.tokens)
        length = at.tokens / c.batch_tokens + steps - at.step  # in steps of this batch, if it was another before
        rates = rescaled(c, length)
        optimizer = make_optimizer(model, rates, machine.device.type)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        folder.resume(c, steps, data, model, optimizer, scaler)
        replica = parallel.replicated(model, c, machine)
        say(startup_text(c, rates, steps, length, batch_size, world_size, model, optimizer, machine))
        folder.open_log(c, first_step, steps)
        throughput = Throughput(c, model, machine)

        def save():
            folder.save(model, optimizer, at, scaler=scaler.state_dict(), config=asdict(c),
                        model_config=asdict(model.config), meta=data.meta)

        # at step k, the loss of batch k and the validation loss belong to the weights before that step
        val_loss, loss, grad_norm, diverged_at, stopped_by = math.inf, math.nan, math.nan, None, 0
        started = time.perf_counter()
        model.train()
        while True:
            row = dict(step=at.step, tokens=at.tokens)

            # ---- stop signals, the same on every rank
            stopped_by = parallel.largest(stop.received or 0) if stop else 0
            if stopped_by and at.step > first_step:
                save()
            if stopped_by:
                break

            # ---- checkpoint and validation
            if at.step == steps or c.eval_only or c.eval_interval and at.step % c.eval_interval == 0:
                new = at.step > first_step
                saved = new and (c.always_save_checkpoint or at.best_val_loss == math.inf)
                if saved:  # first, so that no fault of the validation can lose it
                    save()
                val_loss = evaluate(model, data, c, batch_size, machine)
                if not math.isfinite(val_loss):
                    diverged_at = at.step
                    folder.discard(at.step)
                    break
                row.update(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token)
                improved, at.best_val_loss = val_loss < at.best_val_loss, min(val_loss, at.best_val_loss)
                if new and improved and not saved:
                    save()
            if c.eval_only or at.step == steps:
                folder.write_row(row)
                break

            # ---- one optimizer step
            throughput.start_step()
            position = at.tokens / c.batch_tokens
            fraction = lr_fraction(c, position, length)
            for group in optimizer.param_groups:
                group['lr'] = rates.learning_rate * group['lr_scale'] * fraction
            # dropout's seed, like the data, is a function of (seed, step, rank): a resumed run draws the same
            torch.manual_seed(int(np.random.SeedSequence((c.seed, at.step, rank)).generate_state(1)[0]))
            starts = data.train_starts(c.seed, at.step, sequences, c.block_size)[rank * local:][:local]
            losses = micro_losses(replica, data, starts, batch_size, c.block_size, machine)
            largest = at.largest_norm(c.skip_grad_norm, warming_up=position < c.warmup_frac * length)
            loss, grad_norm, diverged = update(model, optimizer, losses, c.grad_clip, largest, scaler)
            if diverged:
                diverged_at = at.step
                break
            throughput.end_step()

            # ---- log
            if at.step % c.log_interval == 0:
                row.update(loss=loss, lr=rates.learning_rate * fraction, grad_norm=grad_norm, **throughput.read())
            folder.write_row(row)  # if there is more in it than its step
            at.count(c.batch_tokens, grad_norm, largest, save)

        summary = dict(
            val_loss=val_loss, best_val_loss=at.best_val_loss, bits_per_byte=val_loss / math.log(2) /
            data.bytes_per_token, last_train_loss=loss, steps=at.step, tokens=at.tokens, params=model.num_params(),
            weight_decay=rates.weight_decay, seconds=time.perf_counter() - started, diverged_at=diverged_at,
            stopped_by=stopped_by or None, skipped_steps=at.skipped_steps, device=machine.device_name,
            dtype=machine.dtype_name, processes=world_size, torch=torch.__version__, config=asdict(c))
        weights = folder.finish(summary, grad_norm, row)
        if weights and c.sample_tokens:
            show_sample(c, GPT.from_weights(model.config, weights).to(machine.device), data)
        return summary


def read_config(argv):
    """The TrainConfig of a command line; a run that resumes or branches starts from the config in its checkpoint."""
    overrides = configure(TrainConfig, argv)
    out_dir, init_from = overrides.get('out_dir', TrainConfig.out_dir), overrides.get('init_from', '')
    branches = overrides.get('decay_steps', 0) > 0 and checkpoint.is_one(init_from)
    if branches or init_from == 'resume' or init_from == 'auto' and checkpoint.find(out_dir):
        state = checkpoint.state_in(Path(init_from), [checkpoint.STATE]) if branches else checkpoint.read_state(out_dir)
        keys = {each.name for each in fields(TrainConfig)} - NOT_RESUMED
        known = {key: value for key, value in state['config'].items() if key in keys}
        if known.get('train_tokens') or known.get('tokens_per_param'):  # earlier versions ignored it then
            known.pop('max_iters')
        if branches:
            with torch.device('meta'):
                num_params = GPT(GPTConfig(**state['model_config'])).num_params()
            at, long = Progress.of(state), TrainConfig(**known)
            steps = num_steps(long, num_params, at.step, at.tokens)
            known |= branch_keys(long, steps, at.step, at.tokens, overrides)
        overrides = merge(known, overrides, TrainConfig)
    return TrainConfig(**overrides)


def main():
    """Returns the exit code: 0; 3 for a run that diverged; 128 + the signal for a run that was stopped."""
    config = read_config(sys.argv[1:])
    with parallel.processes(config.device, config.timeout_s), StopSignals() as stop:
        summary = train(config, stop)
    if summary['stopped_by']:
        return 128 + summary['stopped_by']
    return 0 if summary['diverged_at'] is None else 3


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; --init_from=resume goes on from the last checkpoint')
