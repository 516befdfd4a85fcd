"""
Train a GPT. Config files and flags apply from left to right; --help lists every key.

    python train.py config/completep_small.py                               minutes on a laptop CPU
    python train.py config/completep_small.py --n_layer=16 --out_dir=out/16 the same hyperparameters, twice the depth
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py  one machine with 8 GPUs
    python train.py --out_dir=out/16 --init_from=resume                     go on where it stopped
    torchrun --standalone --nproc_per_node=8 train.py config/completep_1p5b_deep.py --parallel=fsdp   sharded
"""
import gc
import math
import os
import runpy
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import checkpoint
import metrics
import parallel
from configurator import UserError, configure, exit_on_user_error, first_line, require_at_least
from dataset import DATA_DIR, Dataset
from faults import StopSignals, lock
from hardware import keep_freed_memory, peak_flops, pick_device, pick_dtype, why_not_compile
from model import GPT, OPTIMIZERS, GPTConfig
from sample import GPT2_NAMES, load_gpt2, print_sample

TRAIN_CHOICES = dict(parallel=parallel.KINDS, schedule=('linear', 'cosine', 'constant'), optimizer=OPTIMIZERS,
                     weight_decay_mode=('coupled', 'independent'))


@dataclass
class TrainConfig:
    # the run
    out_dir: str = 'out'                   # folder for all that the run writes; '': it writes nothing
    overwrite: bool = False                # True: start anew although out_dir holds checkpoints
    init_from: str = 'scratch'             # scratch, resume (go on in out_dir), auto (resume if there is a checkpoint,
    #                                        else scratch), or GPT-2: gpt2, gpt2-medium, ..
    seed: int = 1337                       # weights, data order and dropout
    # data
    dataset: str = 'stdlib'                # a folder of data/, or any folder by its whole path
    block_size: int = 256                  # context, tokens
    batch_tokens: int = 16384              # tokens per optimizer step, over all devices and micro-batches
    batch_size: int = 32                   # sequences per micro-batch and device; accumulation follows
    # duration
    max_iters: int = 1000                  # optimizer steps, unless one of the next two is set
    train_tokens: int = 0                  # duration in tokens
    tokens_per_param: float = 0.0          # duration in tokens per parameter
    # model (see GPTConfig)
    n_layer: int = 2
    n_embd: int = 256
    head_dim: int = 64                     # n_head = n_embd / head_dim
    vocab_size: int = 0                    # 0: the dataset's
    real_vocab_size: int = 0               # 0: the dataset's; ids from here up are never sampled
    dropout: float = 0.0
    bias: bool = True                      # in linear layers and norms
    norm: str = 'layernorm'                # or rmsnorm
    norm_gain: bool = True                 # False: norms have no parameters
    qk_norm: bool = False                  # a norm on every head's queries and keys
    activation: str = 'gelu'               # gelu, relu, relu2 (squared), swiglu
    pos: str = 'learned'                   # positions: learned, rope, alibi, none
    n_kv_head: int = 0                     # heads of keys and values; 0: n_head
    tie_weights: bool = False              # embedding and unembedding share one tensor
    attn_scale: str = 'base'               # of Q K^T: base (see README), 1/sqrt_d, 1/d, 1/N
    unembed_form: str = 'multiplier'       # where 1/m_N is: multiplier (on the logits), weights (in their init and lr)
    zero_init_query: bool = False
    zero_init_unembed: bool = False
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
    weight_decay_mode: str = 'coupled'     # independent: by weight_decay, however high the lr, at the base
    tau_ema: float = 0.0                   # > 0 sets weight_decay = 1 / (tau_ema * learning_rate * steps)
    optimizer: str = 'adamw'               # adamw, lion, muon (AdamW where it is no hidden matrix), sgd
    muon_mult: float = 5.0                 # of Muon's learning rate to AdamW's beside it
    beta1: float = 0.9                     # the momentum of Muon and SGD, too
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0                 # largest norm of the whole gradient; 0: no clipping
    skip_grad_norm: float = 0.0            # a step whose gradient has a larger norm is not taken; 0: every step is
    # the batch and duration at which they were tuned: learning_rate, weight_decay, eps and betas follow; 0: they do not
    base_batch_tokens: int = 0
    base_train_tokens: int = 0
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
    recompute: bool = False                # less memory: the backward runs every block's forward again
    parallel: str = 'ddp'                  # under torchrun: ddp (the model on every device), fsdp (sharded over all
    #                                        of them), hsdp (over those of a machine)
    timeout_s: int = 600                   # a process that waits longer for another one ends the run

    def __post_init__(self):
        """Raises UserError for a value that no run can use; what depends on the data or machine is checked later."""
        require_at_least(self, block_size=1, batch_tokens=1, batch_size=1, max_iters=1, train_tokens=0,
                         tokens_per_param=0, learning_rate=0, weight_decay=0, tau_ema=0, muon_mult=1e-6, eps=1e-38,
                         grad_clip=0, skip_grad_norm=0, base_batch_tokens=0, base_train_tokens=0, eval_interval=0,
                         eval_tokens=1, log_interval=1, sample_tokens=0, seed=0, vocab_size=0, timeout_s=1)
        for key in ('beta1', 'beta2', 'warmup_frac', 'final_lr_frac'):
            value, end = getattr(self, key), ')' if key.startswith('beta') else ']'
            if not 0 <= value <= 1 or (value == 1 and end == ')'):
                raise UserError(f'{key}={value} is not allowed: use a value in [0, 1{end}')
        if self.init_from not in ('scratch', 'resume', 'auto', *GPT2_NAMES):
            raise UserError(f"init_from='{self.init_from}' is not known: use scratch, resume, auto, "
                            f"{', '.join(GPT2_NAMES)}")
        for key, choices in TRAIN_CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key}='{getattr(self, key)}' is not known: use {', '.join(choices)}")
        for key, other, what in (('tau_ema', 'weight_decay', 'decay'),
                                 ('train_tokens', 'tokens_per_param', 'duration')):
            if getattr(self, key) and getattr(self, other):
                raise UserError(f'{key}={getattr(self, key)} and {other}={getattr(self, other)} both set the {what}: '
                                'leave one of them at 0')
        if not self.learning_rate and (self.tau_ema or self.weight_decay and self.weight_decay_mode == 'independent'):
            raise UserError('tau_ema and independent weight decay need learning_rate > 0: they divide by it')
        if self.optimizer == 'muon' and self.parallel != 'ddp':
            raise UserError(f"optimizer='muon' needs whole matrices, parallel='{self.parallel}' shards them: use ddp, "
                            'or another optimizer')
        if self.optimizer != 'adamw' and (self.base_batch_tokens or self.base_train_tokens):
            raise UserError(f"base_batch_tokens and base_train_tokens have rules for AdamW, not for optimizer='"
                            f"{self.optimizer}': leave them at 0")
        if self.base_batch_tokens and not (self.train_tokens or self.tokens_per_param or self.base_train_tokens):
            raise UserError('base_batch_tokens needs a duration in tokens, from which the steps follow: set '
                            'train_tokens or tokens_per_param, or base_train_tokens where max_iters is to stay')
        if self.optimizer == 'sgd' and (self.tau_ema or self.weight_decay_mode == 'independent'):
            raise UserError("optimizer='sgd' decays through its momentum: tau_ema and independent weight decay are for "
                            'the others')


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


def num_steps(config, num_params):
    """Optimizer steps of a run."""
    tokens = config.train_tokens or config.tokens_per_param * num_params
    return max(1, round(tokens / config.batch_tokens)) if tokens else config.max_iters


def at_length(config, steps):
    """The config with the learning rate, weight decay, eps and betas that follow from its batch and so many steps.

    They keep the noise of a run of the base's batch and duration: Table 1 of arXiv:2512.22382. Raises UserError.
    """
    c, tokens = config, steps * config.batch_tokens
    m_B = c.batch_tokens / (c.base_batch_tokens or c.batch_tokens)
    m_D = tokens / (c.base_train_tokens or tokens)
    ratio = m_B / m_D
    for key in sorted(('beta1', 'beta2'), key=lambda key: getattr(c, key)):  # the smaller one ends sooner
        largest = 1 / (1 - getattr(c, key))
        if ratio > max(1, largest * (1 - 1e-9)):
            raise UserError(f'batch_tokens is {m_B:g} and the duration {m_D:g} times the base: {key}='
                            f'{getattr(c, key)} has no counterpart there; their ratio must stay below {largest:g}')
    weight_decay = c.weight_decay * ratio ** 0.5
    if c.weight_decay and c.weight_decay_mode == 'independent':
        weight_decay /= c.learning_rate
    learning_rate = c.learning_rate * ratio ** 0.5
    if c.tau_ema:
        weight_decay = 1 / (c.tau_ema * learning_rate * steps)
    return replace(c, learning_rate=learning_rate, weight_decay=weight_decay, tau_ema=0.0, weight_decay_mode='coupled',
                   eps=c.eps * ratio ** -0.5, beta1=c.beta1 + (1 - c.beta1) * (1 - ratio),
                   beta2=c.beta2 + (1 - c.beta2) * (1 - ratio))


def optimizer_of(model, config, device_type):
    """The optimizer that a config asks for, with its values as they are, see at_length(). Raises UserError."""
    c = config
    try:
        return model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2), c.eps, device_type,
                                          c.optimizer, c.muon_mult)
    except ValueError as error:
        raise UserError(error) from None


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


def build_model(config, data, saved=None, sharded=False):
    """A new model, GPT-2, or one for the checkpoint whose state is `saved`; the last two must fit config and dataset.

    One that is to be sharded comes on the meta device, without weights. Raises UserError.
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
            with torch.device('meta') if sharded else nullcontext():
                model = GPT(GPTConfig(**shape), torch.Generator().manual_seed(c.seed))
        except ValueError as error:
            raise UserError(error) from None
    if saved:
        tokenizer = saved['meta']
        held = asdict(GPTConfig(**saved['model_config']))  # with the keys that are younger than it
        differ = [f'{key} is {value!r}, not {shape[key]!r}' for key, value in held.items()
                  if shape[key] != value and key != 'dropout']
    differ += [f'{key} is {tokenizer.get(key)!r}, not {data.meta.get(key)!r}' for key in ('tokenizer', 'chars')
               if tokenizer.get(key) != data.meta.get(key)]
    if differ:
        raise UserError(f"init_from='{c.init_from}' brings a model that this config does not describe: its "
                        f"{'; its '.join(differ)}")
    if data.real_vocab_size > model.config.vocab_size:
        raise UserError(f"dataset '{c.dataset}' has {data.real_vocab_size} ids, the model vocab_size="
                        f"{model.config.vocab_size}: use vocab_size=0 for the dataset's own, or another dataset")
    return model


def update(model, optimizer, losses, grad_clip=0.0, skip_grad_norm=0.0, scaler=None, mean_over_ranks=lambda loss: loss):
    """One optimizer step down the sum of `losses`, those of the micro-batches, each taken back before the next is made.

    Returns (loss, gradient norm before clipping, diverged). It has diverged, and no step is taken, when one of them is
    not finite, unless the scaler of float16 may still find a scale at which they are. A finite gradient above
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
    loss, grad_norm = torch.stack([mean_over_ranks(total), grad_norm]).tolist()  # waits for the device
    scaler_may_recover = scaler.is_enabled() and scaler.get_scale() > 1 and math.isfinite(loss)
    diverged = not (scaler_may_recover or math.isfinite(loss) and math.isfinite(grad_norm))
    if not diverged:
        if not grad_norm > (skip_grad_norm or math.inf):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm, diverged


def train(config, stop=None):
    """Runs a training run and returns its summary, also written to out_dir/summary.json unless out_dir is ''.

    A run that diverges returns normally, with diverged_at = the step that was not taken. So does one that `stop`, a
    StopSignals, stops, with stopped_by = the signal; its state is saved, a summary is not. Raises UserError.
    """
    with ExitStack() as at_end:  # gives back what was taken, however it ends
        return run(config, stop, at_end)


def run(config, stop, at_end):
    c = config
    rank, world_size = parallel.rank_and_world_size()
    main_process = rank == 0
    say = print if main_process else (lambda *args: None)
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    keep_freed_memory()
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        # TF32 for what autocast leaves in float32
        torch.set_float32_matmul_precision('highest' if dtype == torch.float32 else 'high')
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    sequences, local_sequences, accumulation = split_batch(c, world_size)
    batch_size = local_sequences // accumulation
    sharded = c.parallel != 'ddp'
    if sharded and (not dist.is_initialized() or dtype == torch.float16):
        raise UserError(f"parallel='{c.parallel}' shards over the processes of torchrun (see --help) and has no "
                        "gradient scaling for float16: start it with torchrun, and with dtype=bfloat16")

    # data, folder, checkpoint: the first process looks, all go by what it found
    data = open_dataset(c.dataset)
    writes = bool(c.out_dir) and not c.eval_only

    def look():
        if writes:
            at_end.callback(lock(c.out_dir).release)
        found = checkpoint.find(c.out_dir)
        resumes = c.init_from == 'resume' or found and c.init_from == 'auto'
        return found, *(checkpoint.newest(c.out_dir) if resumes else (None, None))
    found, saved_path, saved = parallel.from_first(look)
    if found and not (saved or c.overwrite or c.eval_only):
        raise UserError(f"'{c.out_dir}' holds the checkpoints of a run: use --init_from=resume to go on with it, "
                        'another --out_dir, or --overwrite=True to lose them')

    # model, optimizer
    model = build_model(c, data, saved, sharded)
    c = replace(c, **asdict(model.config))  # what was 0 for "the dataset's" or came with GPT-2 is known now
    reason = why_not_compile(device) if c.compile else None
    if c.recompute:
        parallel.recompute(model)
    if c.compile and not reason:
        for part in parallel.to_compile(model, device.type, sharded, c.recompute):
            part.compile(dynamic=False)
    if sharded:
        parallel.shard(model, c.parallel, device, dtype)
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        model.init_weights(torch.Generator().manual_seed(c.seed))
    model.to(device)
    steps = num_steps(c, model.num_params())
    tuned = at_length(c, steps)
    optimizer = optimizer_of(model, tuned, device.type)
    first_step, best_val_loss = 0, math.inf
    if saved:
        first_step, best_val_loss = saved['step'], saved['best_val_loss']
        before = {**asdict(TrainConfig()), **saved['config']}  # with the keys that are younger than the checkpoint
        trained, now = (f"optimizer='{name}'{' without momentum' if name == 'sgd' and not beta1 else ''}"
                        for name, beta1 in ((before['optimizer'], before['beta1']), (c.optimizer, c.beta1)))
        if trained != now:
            raise UserError(f"'{c.out_dir}' was trained with {trained}, whose state {now} cannot go on from: use the "
                            'same')
        if first_step > steps:
            raise UserError(f"'{c.out_dir}' is at step {first_step}, past the end at {steps}: raise max_iters, "
                            'or train_tokens or tokens_per_param where they are set')
        checkpoint.restore(saved_path, model, optimizer)  # but this run's lr, weight decay, eps and betas
        if saved['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(saved['scaler'])
        changed = [f'{key} {before[key]} -> {value}' for key, value in asdict(c).items()
                   if before[key] != value and key not in ('init_from', 'out_dir', 'overwrite')]
        say(f"resuming {saved_path} at step {first_step}{', with ' if changed else ''}{', '.join(changed)}")

    say(f'{model.num_params():,} parameters, {steps:,} steps of {c.batch_tokens:,} tokens = {sequences} sequences of '
        f'{c.block_size} = {world_size} process(es) x {accumulation} micro-batch(es) x {batch_size}; '
        f'{steps * c.batch_tokens:,} tokens on {device}, {str(dtype)[6:]}{f", {c.parallel}" if world_size > 1 else ""}')
    if (tuned.beta1, tuned.learning_rate) != (c.beta1, c.learning_rate):
        say(f'batch and duration against the base: learning_rate {tuned.learning_rate:.4g}, weight_decay '
            f'{tuned.weight_decay:.4g}, eps {tuned.eps:.4g}, beta1 {tuned.beta1:.6g}, beta2 {tuned.beta2:.6g}')
    say(f'{c.parameterization}: {c.n_layer} layers x {c.n_embd}, density {c.density:g}; base {c.base_n_layer} x '
        f'{c.base_n_embd}\n{metrics.describe(model, optimizer)}')
    if c.compile:
        say(f'running without torch.compile: {reason}' if reason else 'compiling: the first steps take longer')
    # calling it averages gradients over the processes; a sharded model does so by itself
    replica = parallel.copied(model, device) if world_size > 1 and not sharded else model
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
        for first in range(0, len(starts), world_size * batch_size):
            mine = starts[first + rank * batch_size:][:batch_size]
            # with nothing left for it, a rank goes through the model all the same: others need its shard
            inputs, targets = data.batch('val', mine if len(mine) else starts[:1], c.block_size, device)
            with autocast:
                total += model(inputs, targets)[1] * len(mine)
        model.train()
        return sum_over_ranks(total).item() / len(starts)

    def micro_losses(starts):
        """Yields the loss of one micro-batch after the other; they add up to this rank's mean."""
        for micro in range(accumulation):
            inputs, targets = data.batch('train', starts[micro * batch_size:(micro + 1) * batch_size], c.block_size,
                                         device)
            last = micro == accumulation - 1
            with nullcontext() if last or replica is model else replica.no_sync():  # sum gradients over ranks once
                with autocast:
                    loss = replica(inputs, targets)[1] / accumulation
                yield loss  # its backward runs here, inside no_sync and outside autocast

    def save(step):
        if log:
            log.flush()  # the rows before a checkpoint are as safe as itself
        checkpoints.save(step, model, optimizer, dict(
            tokens=step * c.batch_tokens, best_val_loss=best_val_loss, scaler=scaler.state_dict(), config=asdict(c),
            model_config=asdict(model.config), meta=data.meta))

    log, checkpoints = None, checkpoint.Checkpoints(c.out_dir, c.timeout_s) if writes else None

    def settle():
        """After an error, which must not be hidden by what the checkpoint that is being written may raise."""
        try:
            checkpoints.wait()
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
        if log:
            log.close()

    def open_log():
        nonlocal log
        checkpoints.clean(first_step)
        log = metrics.Metrics(c.out_dir, first_step, steps, asdict(c))
        if c.wandb_log:
            log.start_wandb(c.wandb_project, c.wandb_run_name or c.out_dir, asdict(c))
    if writes:
        parallel.from_first(open_log)
        at_end.callback(settle)

    # the loop: at step k the loss of batch k, and the validation loss, belong to the weights after k updates
    val_loss, loss, grad_norm, diverged_at, stopped_by, skipped_steps = math.inf, math.nan, math.nan, None, None, 0
    train_s, timed_steps, started = 0.0, 0, time.perf_counter()
    model.train()
    for step in range(first_step, steps + 1):
        stopped_by = parallel.largest(stop.received or 0) if stop else 0
        if stopped_by:
            break
        row = dict(step=step, tokens=step * c.batch_tokens)
        if step == steps or c.eval_only or c.eval_interval and step % c.eval_interval == 0:
            val_loss = evaluate()
            if not math.isfinite(val_loss):
                diverged_at = step
                break
            row.update(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token)
            improved, best_val_loss = val_loss < best_val_loss, min(val_loss, best_val_loss)
            if writes and step > first_step and (improved or c.always_save_checkpoint):
                save(step)
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
            group['lr'] = tuned.learning_rate * group['lr_scale'] * fraction
        # dropout's random state, like the data, is a function of (seed, step, rank): a resumed run has the same
        torch.manual_seed(int(np.random.SeedSequence((c.seed, step, rank)).generate_state(1)[0]))
        starts = data.train_starts(c.seed, step, sequences, c.block_size)[rank * local_sequences:]
        loss, grad_norm, diverged = update(
            model, optimizer, micro_losses(starts), c.grad_clip, c.skip_grad_norm, scaler,
            mean_over_ranks=lambda loss: sum_over_ranks(loss) / world_size)
        if diverged:
            diverged_at = step
            break
        if math.isfinite(grad_norm) and grad_norm > c.skip_grad_norm > 0:
            skipped_steps += 1
            say(f'step {step} skipped: gradient norm {grad_norm:.4g} is above skip_grad_norm={c.skip_grad_norm:g}')
        if writes:
            checkpoints.check()

        train_s += time.perf_counter() - step_started
        timed_steps += 1
        note = ''
        if step % c.log_interval == 0:
            tokens_per_s = timed_steps * c.batch_tokens / train_s
            row.update(loss=loss, lr=tuned.learning_rate * fraction, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
            train_s, timed_steps = 0.0, 0
            if peak:
                note = f' | {model.flops_per_token() * tokens_per_s / world_size / peak:.1%} MFU'
        if log and len(row) > 2:
            log.write(row, note)

    if writes:
        if stopped_by and step > first_step:
            save(step)
        checkpoints.wait()
    kept = checkpoint.find(c.out_dir)
    if stopped_by:
        saved_in = (f'saved in {kept[0]}: go on with python train.py --out_dir={c.out_dir} --init_from=resume' if kept
                    else 'not saved')
        say(f'stopped after {step} steps, {saved_in}')
    if diverged_at is not None:
        say(f'step {step} was not taken: loss {loss}, gradient norm {grad_norm}, validation loss {val_loss}. '
            f"{f'The last good checkpoint is {kept[0]}. ' if kept else 'There is no checkpoint yet. '}"
            'Try a lower learning_rate, a longer warmup_frac, a smaller grad_clip, or dtype=float32.')
        val_loss = math.inf
    summary = dict(
        val_loss=val_loss, best_val_loss=best_val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token,
        last_train_loss=loss, steps=step, tokens=step * c.batch_tokens, params=model.num_params(),
        weight_decay=tuned.weight_decay, seconds=time.perf_counter() - started, diverged_at=diverged_at,
        stopped_by=stopped_by or None, skipped_steps=skipped_steps,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type, dtype=str(dtype)[6:],
        processes=world_size, torch=torch.__version__, config=asdict(c))
    if log and not stopped_by:
        title = f'{c.parameterization}, {c.n_layer} layers x {c.n_embd}, {model.num_params():,} parameters'
        say(f'loss curve: {log.finish(summary, title)}')
        if kept and diverged_at is None:
            whole, path = checkpoint.export(c.out_dir)
            say(f'weights: {path}')
            if c.sample_tokens:
                say(f'a sample of {c.sample_tokens} tokens (python sample.py --out_dir={c.out_dir} for more):')
                print_sample(whole.to(device).eval(), data.tokenizer(), '', c.sample_tokens, seed=c.seed)
    return summary


def read_config(argv):
    """TrainConfig from the command line; a resumed run starts from the config in its checkpoint. Raises UserError."""
    overrides = configure(TrainConfig, argv)
    out_dir, init_from = overrides.get('out_dir', TrainConfig.out_dir), overrides.get('init_from')
    if init_from == 'resume' or init_from == 'auto' and checkpoint.find(out_dir):
        keys = {field.name for field in fields(TrainConfig)} - {'out_dir', 'overwrite', 'eval_only'}
        known = checkpoint.peek(out_dir)['config']
        overrides = {**{key: value for key, value in known.items() if key in keys}, **overrides}
    return TrainConfig(**overrides)


def main():
    """Returns the exit code: 0, 3 for a run that diverged, 128 + the signal that stopped it. Raises UserError."""
    config = read_config(sys.argv[1:])
    try:
        parallel.join_processes(config.device, config.timeout_s)
        with StopSignals() as stop:
            summary = train(config, stop)
    except Exception as error:
        if not parallel.lost_contact(error):
            raise
        raise UserError(f'lost contact with another process ({first_line(error)}): see what became of it, or raise '
                        'timeout_s; --init_from=resume goes on from the last checkpoint') from None
    if dist.is_initialized():
        gc.collect()  # DDP's cycles hold the group: without this its threads can outlive it and abort the process
        dist.destroy_process_group()
    if summary['stopped_by']:
        return 128 + summary['stopped_by']
    return 0 if summary['diverged_at'] is None else 3


if __name__ == '__main__':
    exit_on_user_error(main, 'stopped; --init_from=resume goes on from the last checkpoint')
