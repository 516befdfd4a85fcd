"""
Trains several runs of one shape as one batched model, so that tiny models fill a large device.

The runs may differ in whatever is a number to the model or the optimizer: learning rate, weight decay, eps, betas,
schedule, init, multipliers, parameterization, seed. Weights, gradients and batches have a leading dimension K, an entry
for each run; the parameters of every run's own model are views into them, so that its own optimizer, with its own
groups, takes the step.
"""
import math
import time
import warnings
from dataclasses import asdict, replace

import torch
from torch.func import functional_call, stack_module_state, vmap

from model import GPT, GPTConfig
from nanop.dataset import Dataset
from nanop.machine import pick_device, pick_dtype
from train import MODEL_KEYS, at_length, build_model, lr_fraction, num_steps, optimizer_of, split_batch

DIFFERENT = ('seed', 'learning_rate', 'weight_decay', 'tau_ema', 'beta1', 'beta2', 'eps', 'grad_clip', 'init_std',
             'input_mult', 'attn_mult', 'output_mult', 'parameterization', 'alpha', 'base_n_layer', 'base_n_embd',
             'base_head_dim', 'mask_seed', 'warmup_frac', 'schedule', 'final_lr_frac', 'weight_decay_mode', 'muon_mult',
             'base_batch_tokens', 'base_train_tokens')


def stackable(config):
    """What the configs of one stack have in common, as something to compare."""
    return tuple((key, value) for key, value in asdict(config).items() if key not in DIFFERENT)


def why_not_stack(config):
    """One line that says why runs like this one cannot be stacked, or None where they can."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if config.qk_norm:
        return 'a norm after the query takes the multiplier of the logits out again'
    if config.optimizer in ('lion', 'muon'):
        return f'{config.optimizer} takes signs or rounds to bfloat16: sums in another order make other steps'
    if config.skip_grad_norm:
        return 'a step is left out by the norm of one run'
    if config.dropout:
        return 'dropout draws from one generator for all'
    if dtype == torch.float16:
        return 'float16 scales the gradients of each run by itself'
    if device.type == 'cpu' and dtype == torch.bfloat16:
        return 'functional.py has no batched form for bfloat16 on a CPU'
    return None


def stack_size(config):
    """How many runs like this one to train at once: what fills a GPU without filling its memory; on a CPU one.

    On a CPU a stack is no faster than one run after the other (see LOG.md); the figure for GPUs is not measured.
    """
    device = pick_device(config.device)
    if device.type != 'cuda' or why_not_stack(config):
        return 1
    with torch.device('meta'):
        num_params = GPT(GPTConfig(**{key: getattr(config, key) for key in MODEL_KEYS if key != 'vocab_size'},
                                   vocab_size=config.vocab_size or 50304)).num_params()
    tokens = min(config.batch_size * config.block_size, config.batch_tokens)
    bytes_each = 16 * num_params + tokens * (68 * config.n_layer * config.n_embd + 8 * (config.vocab_size or 50304))
    fills = math.ceil(2**25 / (tokens * config.n_embd))
    return max(1, min(fills, 64, torch.cuda.mem_get_info(device)[0] // (2 * bytes_each)))


def folded(params, models):
    """`params` with every multiplier of its model folded into the weight beside it, so that one forward serves all."""
    def each(values):
        return torch.tensor(list(values), device=next(iter(params.values())).device)

    config = models[0].config
    attn = [model.transformer.h[0].attn.logit_mult for model in models]
    branch = each(model.transformer.h[0].branch_mult for model in models)
    # in c_attn the rows of the query carry the multiplier of the logits
    keys_and_values = models[0].transformer.h[0].attn.c_attn.out_features - config.n_embd
    query = each([[mult] * config.n_embd + [1.0] * keys_and_values for mult in attn])  # (K, rows of c_attn)
    factors = {'attn.c_attn': query, 'c_proj': branch, 'transformer.wte': each(model.input_mult for model in models),
               'transformer.wpe': each(model.input_mult for model in models),
               'lm_head': each(model.output_mult for model in models)}
    if config.tie_weights:
        params = {**params, 'lm_head.weight': params['transformer.wte.weight']}
    result = {}
    for name, p in params.items():
        factor = next((f for part, f in factors.items() if name.rpartition('.')[0].endswith(part)), None)
        if factor is not None:
            p = p * factor.view(*factor.shape, *[1] * (p.dim() - factor.dim()))
        result[name] = p
    return result


def train_stack(configs):
    """The summaries of the runs of `configs`, which write nothing, in their order: train()'s, run by run.

    A run that diverges stops there; the others go on. Raises UserError.
    """
    c, K = configs[0], len(configs)
    assert len({stackable(config) for config in configs}) == 1, 'only runs of one shape make a stack'
    device = pick_device(c.device)
    dtype = pick_dtype(c.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('highest' if dtype == torch.float32 else 'high')
    sequences, _, micro_batches = split_batch(c, world_size=1)
    data = Dataset(c.dataset)
    models = [build_model(config, data, None).to(device) for config in configs]
    num_params = models[0].num_params()
    steps = num_steps(c, num_params)
    tuned = [at_length(config, steps) for config in configs]

    params, _ = stack_module_state(models)  # each (K, ...)
    masks = {name: params.pop(name) for name in list(params) if not params[name].requires_grad}
    for name, stacked in params.items():
        stacked.grad = torch.zeros_like(stacked)
        for k, model in enumerate(models):
            p = model.get_parameter(name)
            p.data, p.grad = stacked.data[k], stacked.grad[k]
    optimizers = [optimizer_of(model, config, device.type) for model, config in zip(models, tuned)]
    # the model that all are run through: its multipliers are 1, because folded() has put them into the weights
    with torch.device('meta'):
        shape = GPT(replace(models[0].config, tie_weights=False))
    shape.input_mult = shape.output_mult = 1.0
    for block in shape.transformer.h:
        block.branch_mult = block.attn.logit_mult = 1.0
    grad_clip = torch.tensor([config.grad_clip or math.inf for config in configs], device=device)

    warnings.filterwarnings('ignore', 'There is a performance drop')  # on a CPU attention goes one run after the other

    def losses(batches):
        """(K,) mean losses of a list of K batches, each inputs and targets (B, T)."""
        inputs, targets = (torch.stack(tensors) for tensors in zip(*batches))  # (K, B, T)
        with autocast:
            return vmap(lambda state, x, y: functional_call(shape, state, (x, y))[1])(
                {**folded(params, models), **masks}, inputs, targets)

    loss, diverged_at, started = torch.full((K,), math.nan), [None] * K, time.perf_counter()
    for step in range(steps):
        starts = [data.train_starts(config.seed, step, sequences, c.block_size) for config in configs]
        total = torch.zeros(K, device=device)
        for part in range(micro_batches):
            rows = slice(part * (sequences // micro_batches), (part + 1) * (sequences // micro_batches))
            micro = losses([data.batch('train', s[rows], c.block_size, device) for s in starts]) / micro_batches
            micro.sum().backward()
            total += micro.detach()
        norm = sum(stacked.grad.flatten(1).square().sum(1) for stacked in params.values()).sqrt()  # (K,)
        scale = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
        loss, norms = torch.stack([total, norm]).cpu()
        for stacked in params.values():
            stacked.grad.mul_(scale.view(K, *[1] * (stacked.dim() - 1)))
        for k, (config, optimizer) in enumerate(zip(tuned, optimizers)):
            if diverged_at[k] is None and not (loss[k].isfinite() and norms[k].isfinite()):
                diverged_at[k] = step
            if diverged_at[k] is None:
                for group in optimizer.param_groups:
                    group['lr'] = config.learning_rate * group['lr_scale'] * lr_fraction(config, step, steps)
                optimizer.step()
        for stacked in params.values():
            stacked.grad.zero_()
        if None not in diverged_at:
            break

    starts, batch_size = data.val_starts(c.eval_tokens, c.block_size), sequences // micro_batches
    total = torch.zeros(K, device=device)
    with torch.no_grad():
        for i in range(0, len(starts), batch_size):
            batch = data.batch('val', starts[i:i + batch_size], c.block_size, device)
            total += losses([batch] * K) * len(batch[0])
    val_losses = (total / len(starts)).tolist()
    seconds = (time.perf_counter() - started) / K
    summaries = []
    for k, config in enumerate(configs):
        if diverged_at[k] is None and not math.isfinite(val_losses[k]):
            diverged_at[k] = steps
        val_loss = val_losses[k] if diverged_at[k] is None else math.inf
        steps_taken = steps if diverged_at[k] is None else diverged_at[k]
        summaries.append(dict(
            val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token,
            last_train_loss=loss[k].item(), steps=steps_taken, tokens=steps_taken * c.batch_tokens, params=num_params,
            weight_decay=tuned[k].weight_decay, seconds=seconds, diverged_at=diverged_at[k], stack=K,
            dtype=str(dtype)[6:],
            device=torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            torch=torch.__version__, config=asdict(replace(config, **asdict(models[k].config)))))
    return summaries
