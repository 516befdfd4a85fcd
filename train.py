"""
Train a GPT. Config files and flags apply from left to right; --help lists every key.

    python train.py config/completep_small.py                               minutes on a laptop CPU
    python train.py config/completep_small.py --n_layer=16 --out_dir=out/16 the same hyperparameters, twice the depth
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py  one machine with 8 GPUs
    python train.py --out_dir=out/16 --init_from=resume                     go on where it stopped
"""
import gc
import json
import math
import os
import runpy
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import metrics
from configurator import UserError, configure, exit_on_user_error, require_at_least
from dataset import DATA_DIR, Dataset
from hardware import join_processes, peak_flops, pick_device, pick_dtype, why_not_compile
from model import GPT, GPTConfig
from sample import GPT2_NAMES, load_gpt2, print_sample


@dataclass
class TrainConfig:
    # the run
    out_dir: str = 'out'                   # folder for all that the run writes; '': it writes nothing
    overwrite: bool = False                # True: start anew although out_dir holds checkpoints
    init_from: str = 'scratch'             # scratch, resume (go on in out_dir), or GPT-2: gpt2, gpt2-medium, ..
    seed: int = 1337                       # weights, data order and dropout
    # data
    dataset: str = 'stdlib'                # a folder of data/, or any folder by its whole path
    block_size: int = 256                  # context, tokens
    batch_tokens: int = 16384              # tokens per optimizer step, over all devices and micro-batches
    batch_size: int = 32                   # sequences per micro-batch and device; accumulation follows
    # duration
    max_iters: int = 1000                  # optimizer steps, unless tokens_per_param is set
    tokens_per_param: float = 0.0          # duration in tokens per parameter; 0: max_iters counts
    # model (see GPTConfig)
    n_layer: int = 2
    n_embd: int = 256
    head_dim: int = 64                     # n_head = n_embd / head_dim
    vocab_size: int = 0                    # 0: the dataset's
    real_vocab_size: int = 0               # 0: the dataset's; ids from here up are never sampled
    dropout: float = 0.0
    bias: bool = True                      # in linear layers and norms
    tie_weights: bool = False              # embedding and unembedding share one tensor
    density: float = 1.0                   # fraction of attention and MLP weights that are not masked
    mask_seed: int = 1
    # parameterization and the shape at which the hyperparameters below were tuned
    parameterization: str = 'completep'    # gpt2, sp, mup, depth_mup, completep, supar, completep_supar
    alpha: float = 0.0                     # depth exponent in [0.5, 1]; 0: the parameterization's own
    base_n_layer: int = 2
    base_n_embd: int = 256
    base_head_dim: int = 64
    # base hyperparameters
    init_std: float = 0.02
    input_mult: float = 1.0                # on the embedding
    attn_mult: float = 1.0                 # on the attention logits
    output_mult: float = 1.0               # on the logits
    learning_rate: float = 4e-3            # peak
    weight_decay: float = 0.0              # PyTorch's: a step shrinks weights by lr * weight_decay
    tau_ema: float = 0.0                   # > 0 sets weight_decay = 1 / (tau_ema * learning_rate * steps)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0                 # largest norm of the whole gradient; 0: no clipping
    # schedule, a fraction of every learning rate
    warmup_frac: float = 0.1               # of the steps, linear from zero
    schedule: str = 'linear'               # linear, cosine or constant after the warm-up
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

    def __post_init__(self):
        """Raises UserError for a value that no run can use; what depends on the data or machine is checked later."""
        require_at_least(self, block_size=1, batch_tokens=1, batch_size=1, max_iters=1, tokens_per_param=0,
                         learning_rate=0, weight_decay=0, tau_ema=0, eps=1e-38, grad_clip=0, eval_interval=0,
                         eval_tokens=1, log_interval=1, sample_tokens=0, seed=0, vocab_size=0)
        for key in ('beta1', 'beta2', 'warmup_frac', 'final_lr_frac'):
            value, end = getattr(self, key), ')' if key.startswith('beta') else ']'
            if not 0 <= value <= 1 or (value == 1 and end == ')'):
                raise UserError(f'{key}={value} is not allowed: use a value in [0, 1{end}')
        if self.init_from not in ('scratch', 'resume', *GPT2_NAMES):
            raise UserError(f"init_from='{self.init_from}' is not known: use scratch, resume, {', '.join(GPT2_NAMES)}")
        if self.schedule not in ('linear', 'cosine', 'constant'):
            raise UserError(f"schedule='{self.schedule}' is not known: use linear, cosine or constant")
        if self.tau_ema and self.weight_decay:
            raise UserError(f'tau_ema={self.tau_ema} and weight_decay={self.weight_decay} both set the decay: '
                            'leave one of them at 0')
        if self.tau_ema and not self.learning_rate:
            raise UserError('tau_ema needs learning_rate > 0: weight_decay = 1 / (tau_ema * learning_rate * steps)')


# every rank has the same buffers, the masks: DDP need not send them; torch 2.13 renamed the option
SYNC_BUFFERS = 'forward_sync_buffers' if 'forward_sync_buffers' in signature(DistributedDataParallel).parameters \
    else 'broadcast_buffers'
MODEL_KEYS = [field.name for field in fields(GPTConfig)]


def lr_fraction(config, step, steps):
    """Fraction of the peak learning rate at `step` of `steps`; never zero."""
    warmup = round(config.warmup_frac * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    left = {'constant': 1.0, 'linear': 1 - progress, 'cosine': 0.5 * (1 + math.cos(math.pi * progress))}
    floor = 0.0 if config.schedule == 'constant' else config.final_lr_frac
    return floor + (1 - floor) * left[config.schedule]


def duration(config, num_params):
    """(optimizer steps, weight decay) of a run: those given, or those that follow from the size of the model."""
    c = config
    steps = c.max_iters
    if c.tokens_per_param:
        steps = max(1, round(c.tokens_per_param * num_params / c.batch_tokens))
    return steps, 1 / (c.tau_ema * c.learning_rate * steps) if c.tau_ema else c.weight_decay


def split_batch(config, world_size):
    """(sequences per step, sequences per step and device, micro-batches). Raises UserError for what does not divide."""
    c = config
    sequences, rest = divmod(c.batch_tokens, c.block_size)
    if rest or not sequences:
        raise UserError(f'batch_tokens={c.batch_tokens} is no multiple of block_size={c.block_size}: use '
                        f'{max(1, sequences) * c.block_size} or {(sequences + 1) * c.block_size}')
    if sequences % world_size:
        raise UserError(f'batch_tokens={c.batch_tokens} is {sequences} sequences of {c.block_size}, which {world_size} '
                        f'processes cannot share: use a multiple of {world_size * c.block_size}')
    local = sequences // world_size
    batch_size = min(c.batch_size, local)
    if local % batch_size:
        raise UserError(f'{local} sequences per step and process ({c.batch_tokens} tokens / {c.block_size} / '
                        f'{world_size} processes) are no multiple of batch_size={c.batch_size}: use one of '
                        f'{[n for n in range(1, local + 1) if local % n == 0]}')
    return sequences, local, local // batch_size


def open_dataset(name):
    """The dataset called `name`; the embedded one is prepared when it is missing. Raises UserError."""
    if name == 'stdlib' and os.environ.get('LOCAL_RANK', '0') == '0' and not (DATA_DIR / name / 'meta.json').exists():
        print('preparing data/stdlib, the source text of the Python standard library (once)')
        runpy.run_path(str(DATA_DIR / name / 'prepare.py'))['prepare']()
    if dist.is_initialized():
        dist.barrier()
    return Dataset(name)


def build_model(config, data, saved):
    """A new model, GPT-2, or the one in the checkpoint `saved`; the last two must fit the config and the dataset.

    Raises UserError where they do not.
    """
    c = config
    shape = {key: getattr(c, key) for key in MODEL_KEYS}
    shape['vocab_size'] = c.vocab_size or data.vocab_size
    shape['real_vocab_size'] = c.real_vocab_size or min(data.real_vocab_size, shape['vocab_size'])
    tokenizer, differ = data.meta, []
    if c.init_from in GPT2_NAMES:
        model = load_gpt2(c.init_from, dropout=c.dropout, block_size=c.block_size)
        tokenizer = dict(tokenizer='gpt2')
        differ = [f'{key} is {value!r}, not {shape[key]!r}' for key, value in asdict(model.config).items()
                  if getattr(c, key) not in (value, getattr(TrainConfig, key))]
    else:
        try:
            model = GPT(GPTConfig(**shape), torch.Generator().manual_seed(c.seed))
        except ValueError as error:
            raise UserError(error) from None
    if saved:
        tokenizer = saved['meta']
        differ = [f'{key} is {value!r}, not {shape.get(key)!r}' for key, value in saved['model_config'].items()
                  if shape.get(key) != value and key != 'dropout']
    differ += [f'{key} is {tokenizer.get(key)!r}, not {data.meta.get(key)!r}' for key in ('tokenizer', 'chars')
               if tokenizer.get(key) != data.meta.get(key)]
    if differ:
        raise UserError(f"init_from='{c.init_from}' brings a model that this config does not describe: its "
                        f"{'; its '.join(differ)}")
    if data.real_vocab_size > model.config.vocab_size:
        raise UserError(f"dataset '{c.dataset}' has {data.real_vocab_size} ids, the model vocab_size="
                        f"{model.config.vocab_size}: use vocab_size=0 for the dataset's own, or another dataset")
    if saved:
        model.load_state_dict(saved['model'])
    return model


def update(model, optimizer, losses, grad_clip=0.0, scaler=None, mean_over_ranks=lambda loss: loss):
    """One optimizer step down the sum of `losses`, those of the micro-batches, each taken back before the next is made.

    Returns (loss, gradient norm before clipping, diverged). It has diverged, and no step is taken, when one of them is
    not finite, unless the scaler of float16 may still find a scale at which they are.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    loss, grad_norm = torch.stack([mean_over_ranks(total), grad_norm]).tolist()  # waits for the device
    scaler_may_recover = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(loss)
    diverged = not (scaler_may_recover or math.isfinite(loss) and math.isfinite(grad_norm))
    if not diverged:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, diverged


def train(config):
    """Runs a training run and returns its summary, also written to out_dir/summary.json unless out_dir is ''.

    A run that diverges returns normally, with diverged_at = the step that was not taken. Raises UserError.
    """
    c = config
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    main_process = rank == 0
    say = print if main_process else (lambda *args: None)
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        # TF32 for what autocast leaves in float32
        torch.set_float32_matmul_precision('highest' if dtype == torch.float32 else 'high')
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    sequences, local_sequences, accumulation = split_batch(c, world_size)
    batch_size = local_sequences // accumulation

    # data, model, optimizer
    data = open_dataset(c.dataset)
    saved_path, saved = checkpoint.load(c.out_dir) if c.init_from == 'resume' else (None, None)
    if not saved and checkpoint.find(c.out_dir) and not (c.overwrite or c.eval_only):
        raise UserError(f"'{c.out_dir}' holds the checkpoints of a run: use --init_from=resume to go on with it, "
                        'another --out_dir, or --overwrite=True to lose them')
    model = build_model(c, data, saved).to(device)
    c = replace(c, **asdict(model.config))  # what was 0 for "the dataset's" or came with GPT-2 is known now
    steps, weight_decay = duration(c, model.num_params())
    optimizer = model.configure_optimizers(weight_decay, c.learning_rate, (c.beta1, c.beta2), c.eps, device.type)
    first_step, best_val_loss = 0, math.inf
    if saved:
        first_step, best_val_loss = saved['step'], saved['best_val_loss']
        if first_step > steps:
            raise UserError(f"'{c.out_dir}' is at step {first_step}, past the end at {steps}: raise max_iters")
        # its moments, but this run's lr, weight decay, eps and betas
        optimizer.load_state_dict({**saved['optimizer'], 'param_groups': optimizer.state_dict()['param_groups']})
        if saved['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(saved['scaler'])
        changed = [f'{key} {saved["config"].get(key)} -> {value}' for key, value in asdict(c).items()
                   if saved['config'].get(key) != value and key not in ('init_from', 'out_dir', 'overwrite')]
        say(f"resuming {saved_path} at step {first_step}{', with ' if changed else ''}{', '.join(changed)}")
        saved = None  # frees the memory

    say(f'{model.num_params():,} parameters, {steps:,} steps of {c.batch_tokens:,} tokens = {sequences} sequences of '
        f'{c.block_size} = {world_size} process(es) x {accumulation} micro-batch(es) x {batch_size}; '
        f'{steps * c.batch_tokens:,} tokens on {device}, {str(dtype)[6:]}')
    say(f'{c.parameterization}: {c.n_layer} layers x {c.n_embd}, density {c.density:g}; base {c.base_n_layer} x '
        f'{c.base_n_embd}\n{metrics.describe(model, optimizer)}')
    if c.compile:
        reason = why_not_compile(device)
        if reason:
            say(f'running without torch.compile: {reason}')
        else:
            say('compiling: the first steps take longer')
            model.compile(dynamic=False)
    ddp_model = model
    if world_size > 1:
        ddp_model = DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None,
                                            **{SYNC_BUFFERS: False})
    peak = peak_flops(device, dtype)

    def sum_over_ranks(value):
        if world_size > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def evaluate():
        """Mean loss over the fixed validation tokens, nats per token; every rank takes its share."""
        starts = data.val_starts(c.eval_tokens, c.block_size)
        total = torch.zeros((), device=device)
        model.eval()
        for i in range(rank * batch_size, len(starts), world_size * batch_size):
            inputs, targets = data.batch('val', starts[i:i + batch_size], c.block_size, device)
            with autocast:
                total += model(inputs, targets)[1] * len(inputs)
        model.train()
        return sum_over_ranks(total).item() / len(starts)

    def micro_losses(starts):
        """Yields the loss of one micro-batch after the other; they add up to this rank's mean."""
        for micro in range(accumulation):
            inputs, targets = data.batch('train', starts[micro * batch_size:(micro + 1) * batch_size], c.block_size,
                                         device)
            last = micro == accumulation - 1
            with nullcontext() if last or world_size == 1 else ddp_model.no_sync():  # sum gradients over ranks once
                with autocast:
                    loss = ddp_model(inputs, targets)[1] / accumulation
                yield loss  # its backward runs here, inside no_sync and outside autocast

    log = None
    if main_process and c.out_dir and not c.eval_only:
        try:
            os.makedirs(c.out_dir, exist_ok=True)
            Path(c.out_dir, 'config.json').write_text(json.dumps(asdict(c), indent=1))
            log = metrics.Metrics(c.out_dir, first_step, steps)
        except OSError as error:
            raise UserError(f"out_dir='{c.out_dir}' cannot be written: {error}") from None
        if c.wandb_log:
            log.start_wandb(c.wandb_project, c.wandb_run_name or c.out_dir, asdict(c))
        for old in checkpoint.find(c.out_dir) if first_step == 0 else []:
            old.unlink()  # overwrite=True

    # the loop: at step k the loss of batch k, and the validation loss, belong to the weights after k updates
    val_loss, loss, grad_norm, diverged_at = math.inf, math.nan, math.nan, None
    train_s, timed_steps, started = 0.0, 0, time.perf_counter()
    model.train()
    for step in range(first_step, steps + 1):
        row = dict(step=step, tokens=step * c.batch_tokens)
        if step == steps or c.eval_only or c.eval_interval and step % c.eval_interval == 0:
            val_loss = evaluate()
            if not math.isfinite(val_loss):
                diverged_at = step
                break
            row.update(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token)
            improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            if log and step > first_step and (improved or c.always_save_checkpoint):
                checkpoint.save(c.out_dir, dict(
                    step=step, tokens=step * c.batch_tokens, best_val_loss=best_val_loss, model=model.state_dict(),
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), config=asdict(c),
                    model_config=asdict(model.config), meta=data.meta))
        if c.eval_only:
            say(f"validation loss {val_loss:.4f}, {row['bits_per_byte']:.4f} bits per byte")
            break
        if step == steps:
            if log:
                log.write(row)
            break

        step_started = time.perf_counter()
        fraction = lr_fraction(c, step, steps)
        for group in optimizer.param_groups:
            group['lr'] = c.learning_rate * group['lr_scale'] * fraction
        # dropout's random state, like the data, is a function of (seed, step, rank): a resumed run has the same
        torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))
        starts = data.train_starts(c.seed, step, sequences, c.block_size)[rank * local_sequences:]
        loss, grad_norm, diverged = update(model, optimizer, micro_losses(starts), c.grad_clip, scaler,
                                           lambda loss: sum_over_ranks(loss) / world_size)
        if diverged:
            diverged_at = step
            break

        train_s += time.perf_counter() - step_started
        timed_steps += 1
        note = ''
        if step % c.log_interval == 0:
            tokens_per_s = timed_steps * c.batch_tokens / train_s
            row.update(loss=loss, lr=c.learning_rate * fraction, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
            train_s, timed_steps = 0.0, 0
            if peak:
                note = f' | {model.flops_per_token() * tokens_per_s / world_size / peak:.1%} MFU'
        if log and len(row) > 2:
            log.write(row, note)

    if diverged_at is not None:
        kept = checkpoint.find(c.out_dir)
        say(f'step {step} was not taken: loss {loss}, gradient norm {grad_norm}, validation loss {val_loss}. '
            f"{f'The last good checkpoint is {kept[0]}. ' if kept else 'There is no checkpoint yet. '}"
            'Try a lower learning_rate, a longer warmup_frac, a smaller grad_clip, or dtype=float32.')
        val_loss = math.inf
    summary = dict(
        val_loss=val_loss, best_val_loss=best_val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token,
        last_train_loss=loss, steps=step, tokens=step * c.batch_tokens, params=model.num_params(),
        weight_decay=weight_decay, seconds=time.perf_counter() - started, diverged_at=diverged_at,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type, dtype=str(dtype)[6:],
        processes=world_size, torch=torch.__version__, config=asdict(c))
    if log:
        title = f'{c.parameterization}, {c.n_layer} layers x {c.n_embd}, {model.num_params():,} parameters'
        say(f'loss curve: {log.finish(summary, title)}')
        if c.sample_tokens and diverged_at is None:
            say(f'a sample of {c.sample_tokens} tokens (python sample.py --out_dir={c.out_dir} for more):')
            print_sample(model.eval(), data.tokenizer(), '', c.sample_tokens, seed=c.seed)
    return summary


def read_config(argv):
    """TrainConfig from the command line; a resumed run starts from the config in its checkpoint. Raises UserError."""
    overrides = configure(TrainConfig, argv)
    if overrides.get('init_from') == 'resume':
        known = checkpoint.load(overrides.get('out_dir', TrainConfig.out_dir))[1]['config']
        keys = {field.name for field in fields(TrainConfig)} - {'out_dir', 'overwrite', 'eval_only'}
        overrides = {**{key: value for key, value in known.items() if key in keys}, **overrides}
    return TrainConfig(**overrides)


def main():
    """Returns the exit code: 0, or 3 for a run that diverged. Raises UserError."""
    config = read_config(sys.argv[1:])
    summary = train(replace(config, device=join_processes(config.device)))
    if dist.is_initialized():
        gc.collect()  # DDP's cycles hold the group: without this its threads can outlive it and abort the process
        dist.destroy_process_group()
    return 0 if summary['diverged_at'] is None else 3


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; --init_from=resume goes on from the last checkpoint')
