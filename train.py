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

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from model import GPT, OPTIMIZERS, GPTConfig, length_rules
from nanop import checkpoint, parallel
from nanop.dataset import open_dataset
from nanop.errors import UserError, exit_on_user_error, require, require_values
from nanop.huggingface import GPT2_NAMES, load_gpt2
from nanop.machine import set_up
from nanop.parallel import say, sum_over_ranks
from nanop.run_folder import RunFolder
from nanop.run_log import StopSignals, Throughput, startup_text
from nanop.sampling import print_sample

TRAIN_CHOICES = dict(
    init_from=('scratch', 'resume', 'auto', *GPT2_NAMES), parallel=parallel.KINDS, optimizer=OPTIMIZERS,
    schedule=('linear', 'cosine', 'constant'), weight_decay_mode=('coupled', 'independent'))


@dataclass
class TrainConfig(GPTConfig):
    # the run
    out_dir: str = 'out'                   # folder for everything that the run writes; '': nothing is written
    overwrite: bool = False                # True: start anew although out_dir holds checkpoints
    init_from: str = 'scratch'             # scratch, resume (go on in out_dir), auto (resume if there is a checkpoint,
    #                                        else scratch), or GPT-2: gpt2, gpt2-medium, ..
    seed: int = 1337                       # weights, data order and dropout
    # data
    dataset: str = 'stdlib'                # a folder of data/, or any folder by its whole path
    batch_tokens: int = 16384              # tokens per optimizer step, over all devices and micro-batches
    batch_size: int = 32                   # sequences per micro-batch and device; gradient accumulation follows from it
    # duration
    max_iters: int = 1000                  # optimizer steps, unless one of the next two is set
    train_tokens: int = 0                  # duration in tokens
    tokens_per_param: float = 0.0          # duration in tokens per parameter
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
    skip_grad_norm: float = 0.0            # skip a step whose gradient norm is larger; 0: skip none
    # batch and duration of the tuning run: length_rules rescale learning_rate, weight_decay, eps and betas; 0: do not
    base_batch_tokens: int = 0
    base_train_tokens: int = 0
    # schedule: a factor on every learning rate
    warmup_frac: float = 0.1               # fraction of the steps, linear from zero
    schedule: str = 'linear'               # after the warm-up: linear, cosine, constant
    final_lr_frac: float = 0.0             # where linear and cosine end
    # evaluation, checkpoints and logs
    eval_interval: int = 250               # steps between validations, each followed by a checkpoint; 0: only the last
    eval_tokens: int = 65536               # validation tokens, the same ones every time
    eval_only: bool = False                # validate once and stop
    always_save_checkpoint: bool = True    # False: only when the validation loss is the best so far
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

    def __post_init__(self):
        super().__post_init__()
        require_values(
            self, choices=TRAIN_CHOICES, fractions=('warmup_frac', 'final_lr_frac'), below_one=('beta1', 'beta2'),
            at_least=dict(batch_tokens=1, batch_size=1, max_iters=1, train_tokens=0, tokens_per_param=0,
                          learning_rate=0, weight_decay=0, tau_ema=0, muon_mult=1e-6, eps=1e-38, grad_clip=0,
                          skip_grad_norm=0, base_batch_tokens=0, base_train_tokens=0, eval_interval=0, eval_tokens=1,
                          log_interval=1, sample_tokens=0, seed=0, timeout_s=1))
        require(self, 'tau_ema', not (self.tau_ema and self.weight_decay),
                f'weight_decay={self.weight_decay} sets the decay, too, leave one of them at 0')
        require(self, 'train_tokens', not (self.train_tokens and self.tokens_per_param),
                f'tokens_per_param={self.tokens_per_param} sets the duration, too, leave one of them at 0')
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


# -----------------------------------------------------------------------------
# Arithmetic on the keys
def lr_fraction(config, step, steps):
    """Fraction of the peak learning rate at `step` of `steps`, above zero at every step that is taken."""
    warmup = round(config.warmup_frac * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    decayed = {'constant': 1.0, 'linear': 1 - progress, 'cosine': 0.5 * (1 + math.cos(math.pi * progress))}
    floor = 0.0 if config.schedule == 'constant' else config.final_lr_frac
    return floor + (1 - floor) * decayed[config.schedule]


def num_steps(config, num_params):
    """Optimizer steps of a run."""
    tokens = config.train_tokens or config.tokens_per_param * num_params
    return max(1, round(tokens / config.batch_tokens)) if tokens else config.max_iters


def rescaled(config, steps):
    """The config with lr, weight decay, eps and betas for a run of `steps`: model.py's length_rules on the base values.

    tau_ema and independent weight decay become the coupled weight decay that they stand for.
    """
    c, tokens = config, steps * config.batch_tokens
    batch_ratio = c.batch_tokens / (c.base_batch_tokens or c.batch_tokens)
    duration_ratio = tokens / (c.base_train_tokens or tokens)
    lr, decay, eps, beta_factor = length_rules(batch_ratio, duration_ratio)
    for key in sorted(('beta1', 'beta2'), key=lambda key: getattr(c, key)):  # the smaller beta reaches 0 first
        largest = 1 / (1 - getattr(c, key))
        if beta_factor > max(1, largest * (1 - 1e-9)):  # 1 - beta would exceed 1
            raise UserError(f'batch_tokens is {batch_ratio:g} and the duration {duration_ratio:g} times the base: '
                            f'{key}={getattr(c, key)} has no counterpart there; keep their ratio below {largest:g}')
    learning_rate, weight_decay = c.learning_rate * lr, c.weight_decay * decay
    if weight_decay and c.weight_decay_mode == 'independent':
        weight_decay /= c.learning_rate
    if c.tau_ema:
        weight_decay = 1 / (c.tau_ema * learning_rate * steps)
    return replace(c, learning_rate=learning_rate, weight_decay=weight_decay, tau_ema=0.0, weight_decay_mode='coupled',
                   eps=c.eps * eps, beta1=c.beta1 + (1 - c.beta1) * (1 - beta_factor),
                   beta2=c.beta2 + (1 - c.beta2) * (1 - beta_factor))


def make_optimizer(model, rates, device_type):
    """The model's optimizer with the values of `rates`, a config from rescaled()."""
    return model.configure_optimizers(rates.weight_decay, rates.learning_rate, (rates.beta1, rates.beta2), rates.eps,
                                      device_type, rates.optimizer, rates.muon_mult)


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
# The model and one optimizer step
def build_model(config, data, saved=None):
    """A model with fresh weights, on the meta device if it will be sharded, or GPT-2. GPT-2, or the checkpoint whose
    state is `saved` and whose weights come later, must fit the config and the dataset."""
    c, tokenizer, differ = config, data.meta, []
    vocab_size = c.vocab_size or data.vocab_size
    shape = GPTConfig.of(c, vocab_size=vocab_size,
                         real_vocab_size=c.real_vocab_size or min(data.real_vocab_size, vocab_size))
    if c.init_from in GPT2_NAMES:
        held, weights = load_gpt2(c.init_from, c.dropout, c.block_size)
        model, tokenizer = GPT.from_weights(GPTConfig(**held), weights), dict(tokenizer='gpt2')
        differ = [f'{key} is {value!r}, not {getattr(shape, key)!r}' for key, value in asdict(model.config).items()
                  if getattr(c, key) not in (value, getattr(TrainConfig, key))]
    else:
        with torch.device('meta') if c.parallel != 'ddp' else nullcontext():
            model = GPT(shape, torch.Generator().manual_seed(c.seed))
    if saved:
        tokenizer = saved['meta']
        held = asdict(GPTConfig(**saved['model_config']))  # keys added since it was saved get their defaults
        differ = [f'{key} is {value!r}, not {getattr(shape, key)!r}' for key, value in held.items()
                  if getattr(shape, key) != value and key != 'dropout']
    differ += [f'{key} is {tokenizer.get(key)!r}, not {data.meta.get(key)!r}' for key in ('tokenizer', 'chars')
               if tokenizer.get(key) != data.meta.get(key)]
    if differ:
        raise UserError(f"init_from='{c.init_from}' brings a model that this config does not describe: its "
                        f"{'; its '.join(differ)}")
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


def update(model, optimizer, losses, grad_clip=0.0, skip_grad_norm=0.0, scaler=None):
    """Take one optimizer step on the sum of the micro-batch losses, each back-propagated before the next is computed.

    Returns (loss, gradient norm before clipping, diverged). If loss or norm is not finite the run has diverged and no
    step is taken, unless float16's scaler can still find a scale at which they are. A gradient whose norm is above
    `skip_grad_norm` is dropped.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    total = sum_over_ranks(total) / parallel.rank_and_world_size()[1]
    loss, grad_norm = torch.stack([total, grad_norm]).tolist()  # waits for the device
    scaler_may_recover = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(loss)
    diverged = not (scaler_may_recover or math.isfinite(loss) and math.isfinite(grad_norm))
    if not diverged:
        if not grad_norm > (skip_grad_norm or math.inf):  # also for nan, which float16's scaler handles
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

    A run that diverges returns normally, with diverged_at = the step that was not taken. A run that is stopped through
    `stop`, a StopSignals, returns normally, too, with stopped_by = the signal; it saves its state but no summary.
    """
    machine = set_up(config.device, config.dtype)
    rank, world_size = parallel.rank_and_world_size()
    sequences, local_sequences, accumulation = split_batch(config, world_size)
    batch_size = local_sequences // accumulation
    parallel.require_shardable(config, machine)
    data = open_dataset(config.dataset)
    with RunFolder(config) as folder:
        # ---- model and optimizer
        model = build_model(config, data, folder.saved)
        c = replace(config, **asdict(model.config))  # with the values that are the dataset's, or GPT-2's
        parallel.prepare(model, c, machine)  # to the device; recompute, compile, shard
        steps = num_steps(c, model.num_params())
        rates = rescaled(c, steps)
        optimizer = make_optimizer(model, rates, machine.device.type)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        first_step, best_val_loss = folder.resume(c, steps, model, optimizer, scaler)
        replica = parallel.replicated(model, c, machine)
        say(startup_text(c, rates, steps, batch_size, world_size, model, optimizer, machine))
        folder.open_log(c, first_step, steps)
        throughput = Throughput(c, model, machine)

        def save(step):
            folder.save(step, model, optimizer, tokens=step * c.batch_tokens, best_val_loss=best_val_loss,
                        scaler=scaler.state_dict(), config=asdict(c), model_config=asdict(model.config), meta=data.meta)

        # at step k, the loss of batch k and the validation loss belong to the weights before that step
        val_loss, loss, grad_norm, diverged_at, stopped_by, skipped_steps = math.inf, math.nan, math.nan, None, 0, 0
        started = time.perf_counter()
        model.train()
        for step in range(first_step, steps + 1):
            row = dict(step=step, tokens=step * c.batch_tokens)

            # ---- stop signals, the same on every rank
            stopped_by = parallel.largest(stop.received or 0) if stop else 0
            if stopped_by:
                if step > first_step:
                    save(step)
                break

            # ---- validation and checkpoint
            if step == steps or c.eval_only or c.eval_interval and step % c.eval_interval == 0:
                val_loss = evaluate(model, data, c, batch_size, machine)
                if not math.isfinite(val_loss):
                    diverged_at = step
                    break
                row.update(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token)
                improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
                if step > first_step and (improved or c.always_save_checkpoint):
                    save(step)
            if c.eval_only:
                say(f"validation loss {val_loss:.4f}, {row['bits_per_byte']:.4f} bits per byte")
            if c.eval_only or step == steps:
                folder.write_row(row)
                break

            # ---- one optimizer step
            throughput.start_step()
            fraction = lr_fraction(c, step, steps)
            for group in optimizer.param_groups:
                group['lr'] = rates.learning_rate * group['lr_scale'] * fraction
            # dropout's seed, like the data, is a function of (seed, step, rank): a resumed run draws the same
            torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))
            starts = data.train_starts(c.seed, step, sequences, c.block_size)[rank * local_sequences:][:local_sequences]
            losses = micro_losses(replica, data, starts, batch_size, c.block_size, machine)
            loss, grad_norm, diverged = update(model, optimizer, losses, c.grad_clip, c.skip_grad_norm, scaler)
            if diverged:
                diverged_at = step
                break
            if math.isfinite(grad_norm) and grad_norm > c.skip_grad_norm > 0:
                skipped_steps += 1
                say(f'step {step} skipped: gradient norm {grad_norm:.4g} is above skip_grad_norm={c.skip_grad_norm:g}')
            folder.raise_if_failed()  # the checkpoint that is written in the background

            # ---- log
            throughput.end_step()
            if step % c.log_interval == 0:
                row.update(loss=loss, lr=rates.learning_rate * fraction, grad_norm=grad_norm, **throughput.read())
            folder.write_row(row)  # if there is more in it than its step

        summary = dict(
            val_loss=val_loss, best_val_loss=best_val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token,
            last_train_loss=loss, steps=step, tokens=step * c.batch_tokens, params=model.num_params(),
            weight_decay=rates.weight_decay, seconds=time.perf_counter() - started, diverged_at=diverged_at,
            stopped_by=stopped_by or None, skipped_steps=skipped_steps, device=machine.device_name,
            dtype=machine.dtype_name, processes=world_size, torch=torch.__version__, config=asdict(c))
        weights = folder.finish(summary, grad_norm)
        if weights and c.sample_tokens:
            say(f'a sample of {c.sample_tokens} tokens (python sample.py --out_dir={c.out_dir} for more):')
            whole = GPT.from_weights(model.config, weights).to(machine.device).eval()
            print_sample(whole, data.tokenizer(), '', c.sample_tokens, seed=c.seed)
        return summary


def read_config(argv):
    """The TrainConfig of a command line; a resumed run starts from the config in its checkpoint."""
    overrides = configure(TrainConfig, argv)
    out_dir, init_from = overrides.get('out_dir', TrainConfig.out_dir), overrides.get('init_from')
    if init_from == 'resume' or init_from == 'auto' and checkpoint.find(out_dir):
        keys = {field.name for field in fields(TrainConfig)} - {'out_dir', 'overwrite', 'eval_only'}
        known = checkpoint.read_state(out_dir)['config']
        overrides = {**{key: value for key, value in known.items() if key in keys}, **overrides}
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
