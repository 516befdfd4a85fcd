"""
Trains several runs of one shape as one batched model, so that tiny models fill a large device.

The runs may differ in everything that is a number to the model or the optimizer: learning rate, weight decay, eps,
betas, schedule, init, multipliers, parameterization, seed. Weights, gradients and batches have a leading dimension K,
one entry per run. The parameters of each run's own model are views into them.
"""
import math
import time
import warnings
from dataclasses import asdict, replace

import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, GPTConfig, role_of
from nanop.dataset import Dataset
from nanop.machine import pick_device, pick_dtype, set_up
from nanop.schedule import lr_fraction
from train import build_model, make_optimizer, num_steps, rescaled, split_batch

DIFFERENT = ('seed', 'learning_rate', 'weight_decay', 'tau_ema', 'beta1', 'beta2', 'eps', 'grad_clip', 'init_std',
             'input_mult', 'attn_mult', 'output_mult', 'parameterization', 'alpha', 'base_n_layer', 'base_n_embd',
             'base_head_dim', 'base_n_kv_head', 'mask_seed', 'warmup_frac', 'schedule', 'final_lr_frac',
             'decay_frac', 'weight_decay_mode', 'muon_mult', 'base_batch_tokens', 'base_train_tokens', 'rescale',
             'clip_norm', 'init_std_mult', 'lr_mult', 'weight_decay_mult', 'eps_mult')
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # the attention that has a backward under vmap on CUDA
UNKNOWN_VOCAB = 50304  # GPT-2's, padded: where only the dataset knows and it is not here


def stackable(config):
    """What all configs of one stack have in common, as a value to compare."""
    return tuple((key, value) for key, value in asdict(config).items() if key not in DIFFERENT)


def why_not_stack(config):
    """One line that says why runs like this one cannot be stacked, or None where they can."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    reasons = {
        'qk_norm removes the factor on the logits that a stack puts into the weights of the queries': config.qk_norm,
        f'{config.optimizer} takes signs or rounds to bfloat16: sums in another order make other steps':
            config.optimizer in ('lion', 'muon'),
        'skip_grad_norm skips a step of one run only': config.skip_grad_norm,
        'dropout draws from one generator for all runs': config.dropout,
        'float16 needs a gradient scale for each run': dtype == torch.float16,
        'our attention and loss have no batched form for bfloat16 on a CPU':
            device.type == 'cpu' and dtype == torch.bfloat16,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def stack_size(config):
    """How many runs like this one to train at once: as many as fill a GPU, but not its memory (an estimate, not
    measured); 1 on a CPU, where a stack is no faster than one run after the other (see LOG.md)."""
    device = pick_device(config.device)
    if device.type != 'cuda' or why_not_stack(config):
        return 1
    vocab_size = config.vocab_size or UNKNOWN_VOCAB
    with torch.device('meta'):
        num_params = GPT(GPTConfig.of(config, vocab_size=vocab_size)).num_params()
    tokens = min(config.batch_size * config.block_size, config.batch_tokens)
    bytes_per_run = 16 * num_params + tokens * (68 * config.n_layer * config.n_embd + 8 * vocab_size)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    fills = math.ceil(2**25 / (tokens * config.n_embd))
    return max(1, min(fills, 64, free_bytes // (2 * bytes_per_run)))


class Stack:
    """K models of one shape as one batched model: `params` and `masks` are {name: (K, ...)}, and all K are run through
    `shared`, a model without weights and with multipliers of 1."""

    def __init__(self, models):
        self.models = models
        stacked, _ = stack_module_state(models)
        self.params = {name: p for name, p in stacked.items() if p.requires_grad}
        self.masks = {name: p for name, p in stacked.items() if not p.requires_grad}  # of sparse layers
        self.roles = {name: role_of(name) for name in self.params}
        for name, p in self.params.items():
            p.grad = torch.zeros_like(p)
            for k, model in enumerate(models):
                model.get_parameter(name).data = p.data[k]
        with torch.device('meta'):
            self.shared = GPT(replace(models[0].config, tie_weights=False))
        self.shared.input_mult = self.shared.output_mult = 1.0
        for block in self.shared.transformer.h:
            block.branch_mult = block.attn.logit_mult = 1.0
        # each model's multipliers become factors on its weights, (K,) or (K, rows), by the end of the module's name;
        # the factor on the attention logits goes to the rows of c_attn that make the queries
        n_embd, blocks = models[0].config.n_embd, [model.transformer.h[0] for model in models]
        other_rows = blocks[0].attn.c_attn.out_features - n_embd
        inputs = [model.input_mult for model in models]
        factors = {'attn.c_attn': [[block.attn.logit_mult] * n_embd + [1.0] * other_rows for block in blocks],
                   'c_proj': [block.branch_mult for block in blocks], 'transformer.wte': inputs,
                   'transformer.wpe': inputs, 'lm_head': [model.output_mult for model in models]}
        self.factors = {end: torch.tensor(values, device=p.device) for end, values in factors.items()}

    def multiplied_params(self, dtype):
        """`params` times their factors, so that the shared model computes what each of the K computes. Biases of linear
        layers are in `dtype`: under vmap autocast leaves them in float32, and with them what they are added to (pytorch
        #192617)."""
        params = dict(self.params)
        if self.models[0].config.tie_weights:
            params['lm_head.weight'] = params['transformer.wte.weight']
        for name, p in params.items():
            module = name.rpartition('.')[0]
            for end, factor in self.factors.items():
                if module.endswith(end):
                    params[name] = p * factor.view(*factor.shape, *[1] * (p.dim() - factor.dim()))
            if self.roles.get(name, '').endswith('_bias'):
                params[name] = params[name].to(dtype)
        return params

    def losses(self, batches, machine):
        """Mean losses (K,) of K batches, each a pair of inputs (B, T) and targets (B, T)."""
        inputs, targets = (torch.stack(each) for each in zip(*batches))  # (K, B, T)
        with machine.autocast(), sdpa_kernel(KERNELS):
            return vmap(lambda weights, x, y: functional_call(self.shared, weights, (x, y))[1])(
                self.multiplied_params(machine.dtype) | self.masks, inputs, targets)

    def clip_gradients(self, largest, grad_scales):
        """nanop.optimizers.clip_gradients with `largest` (K,) and {role: (K,)}. Returns the norms (K,)."""
        norms = sum(p.grad.flatten(1).square().sum(1) * grad_scales[self.roles[name]].square()
                    for name, p in self.params.items()).sqrt()
        scales = (largest / (norms + 1e-6)).clamp(max=1.0)
        for p in self.params.values():
            p.grad.mul_(scales.view(-1, *[1] * (p.dim() - 1)))
        return norms


def adamw_step(p, mean, square, kept, share1, share2, unbiased, eps, rate):
    mean.lerp_(p.grad, share1)
    square.lerp_(p.grad.square(), share2)
    p.mul_(kept).sub_(mean.mul(rate).div_(square.sqrt().mul_(unbiased).add_(eps)))


def sgd_step(p, mean, _, weight_decay, momentum, rate):
    mean.mul_(momentum).add_(p.grad + weight_decay * p)
    p.sub_(rate * mean)


class StackOptimizer:
    """The optimizers of K runs, torch.optim's AdamW or SGD, as one: a step of all runs is one on (K, ...) tensors."""

    def __init__(self, stack, optimizers):
        groups = list(zip(*(each.param_groups for each in optimizers)))  # of every role, K
        self.steps, self.by_sgd = 0, isinstance(optimizers[0], torch.optim.SGD)
        self.values = {key: torch.tensor([[group[key] for group in each] for each in groups], dtype=torch.float64)
                       for key in ('lr_scale', 'weight_decay', 'eps', 'betas', 'momentum') if key in groups[0][0]}
        self.params = [[(p, torch.zeros_like(p), torch.zeros_like(p)) for name, p in stack.params.items()
                        if stack.roles[name] == each[0]['role']] for each in groups]

    @torch.no_grad()
    def step(self, lr):
        """Take a step; `lr` lists the K learning rates before the factors of the roles."""
        self.steps += 1
        known = self.values  # (roles, K) each, in float64 on the CPU
        rate = torch.tensor(lr, dtype=torch.float64) * known['lr_scale']
        if self.by_sgd:
            values = known['weight_decay'], known['momentum'], rate
        else:
            beta1, beta2 = known['betas'].unbind(-1)
            values = (1 - rate * known['weight_decay'], 1 - beta1, 1 - beta2, (1 - beta2 ** self.steps).rsqrt(),
                      known['eps'], rate / (1 - beta1 ** self.steps))
        values = torch.stack(values, dim=1).to(self.params[0][0][0])  # (roles, values, K), sent to the device at once
        take = sgd_step if self.by_sgd else adamw_step
        for params, of_role in zip(self.params, values):
            for p, *moments in params:
                take(p, *moments, *of_role.view(*of_role.shape, *[1] * (p.dim() - 1)))  # values (K, 1, ..)


@torch.no_grad()
def stack_val_losses(stack, data, config, batch_size, machine):
    starts = data.val_starts(config.eval_tokens, config.block_size)
    total = torch.zeros(len(stack.models), device=machine.device)
    for first in range(0, len(starts), batch_size):
        batch = data.batch('val', starts[first:first + batch_size], config.block_size, machine.device)
        total += stack.losses([batch] * len(stack.models), machine) * len(batch[0])
    return (total / len(starts)).tolist()


def train_stack(configs):
    """Train a stack, writing nothing. Returns what train() returns for each config; if one diverges, others go on."""
    c, K = configs[0], len(configs)
    assert len({stackable(config) for config in configs}) == 1, 'only runs of one shape make a stack'
    warnings.filterwarnings('ignore', 'There is a performance drop')  # on a CPU, attention has no batched form
    machine = set_up(c.device, c.dtype)
    sequences, _, micro_batches = split_batch(c, world_size=1)
    batch_size = sequences // micro_batches
    data = Dataset(c.dataset)
    stack = Stack([build_model(config, data).to(machine.device) for config in configs])
    num_params = stack.models[0].num_params()
    steps = num_steps(c, num_params)
    rates = [rescaled(config, steps) for config in configs]
    optimizers = [make_optimizer(model, each, machine.device.type) for model, each in zip(stack.models, rates)]
    optimizer = StackOptimizer(stack, optimizers)
    grad_clip = torch.tensor([config.grad_clip or math.inf for config in configs], device=machine.device)
    grad_scales = {groups[0]['role']: grad_clip.new_tensor([group['grad_scale'] for group in groups])
                   for groups in zip(*(each.param_groups for each in optimizers))}
    loss, diverged_at, started = torch.full((K,), math.nan), [None] * K, time.perf_counter()
    for step in range(steps):
        starts = [data.train_starts(config.seed, step, sequences, c.block_size) for config in configs]
        total = torch.zeros(K, device=machine.device)
        for first in range(0, sequences, batch_size):
            batches = [data.batch('train', each[first:first + batch_size], c.block_size, machine.device)
                       for each in starts]
            losses = stack.losses(batches, machine) / micro_batches
            losses.sum().backward()
            total += losses.detach()
        loss, norms = torch.stack([total, stack.clip_gradients(grad_clip, grad_scales)]).cpu()
        for k in range(K):
            if diverged_at[k] is None and not (loss[k].isfinite() and norms[k].isfinite()):
                diverged_at[k] = step  # it takes further steps, which no other run sees
        optimizer.step([each.learning_rate * lr_fraction(config, step, steps) for each, config in zip(rates, configs)])
        for p in stack.params.values():
            p.grad.zero_()
        if None not in diverged_at:
            break
    val_losses = stack_val_losses(stack, data, c, batch_size, machine)
    seconds = (time.perf_counter() - started) / K
    summaries = []
    for k, config in enumerate(configs):
        if diverged_at[k] is None and not math.isfinite(val_losses[k]):
            diverged_at[k] = steps
        val_loss, steps_taken = (val_losses[k], steps) if diverged_at[k] is None else (math.inf, diverged_at[k])
        summaries.append(dict(
            val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / data.bytes_per_token,
            last_train_loss=loss[k].item(), steps=steps_taken, tokens=steps_taken * c.batch_tokens, params=num_params,
            weight_decay=rates[k].weight_decay, seconds=seconds, diverged_at=diverged_at[k], stack=K,
            dtype=machine.dtype_name, device=machine.device_name, torch=torch.__version__,
            config=asdict(replace(config, **asdict(stack.models[k].config)))))
    return summaries
