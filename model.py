"""
A GPT whose hyperparameters transfer: tune a small model, train a wide, deep or sparse one with the same values.

Read in order: PARAMETERIZATIONS and scaling_rules (the papers' tables, the whole method), ROLES, Block.forward,
GPT.forward, GPT.configure_optimizers. The rest is nanoGPT's GPT, with the same module names.

    B batch    T time    C n_embd    H n_head    D head_dim    V vocab_size

    m_N    width ratio     n_embd   / base_n_embd
    m_L    depth ratio     n_layer  / base_n_layer
    m_D    head ratio      head_dim / base_head_dim
    rho    density         fraction of the attention and MLP weights that are not masked
    alpha  depth exponent  residual branches are multiplied by m_L^-alpha

Papers: CompleteP arXiv:2505.01618, muP (Tensor Programs V) arXiv:2203.03466, SuPar arXiv:2405.15743.
"""
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from functional import causal_attention, cross_entropy, gelu, rotate, swiglu
from optimizers import make_optimizer

# -----------------------------------------------------------------------------
# The parameterization


class Sees(NamedTuple):
    """What a parameterization reacts to: exponents on the ratios, 1 = sees it, 0 = blind; and its alpha."""
    width: int
    depth: int
    density: int
    gpt2_init: int  # GPT-2's 1/sqrt(2 n_layer) on the init of the residual projections
    alpha: float


PARAMETERIZATIONS = {
    #                       width depth density gpt2_init alpha
    'gpt2':            Sees(0,    0,    0,      1,        1.0),  # nanoGPT, for comparison with it
    'sp':              Sees(0,    0,    0,      0,        1.0),  # standard parameterization, column SP of Table 1
    'mup':             Sees(1,    0,    0,      0,        1.0),  # arXiv:2203.03466
    'depth_mup':       Sees(1,    1,    0,      0,        0.5),  # arXiv:2505.01618 with alpha = 1/2
    'completep':       Sees(1,    1,    0,      0,        1.0),  # arXiv:2505.01618
    'supar':           Sees(1,    0,    1,      0,        1.0),  # arXiv:2405.15743
    'completep_supar': Sees(1,    1,    1,      0,        1.0),  # our own combination: both rules multiplied
}


class Rule(NamedTuple):
    """Factors on the base hyperparameters for one role; None where the role has no tensor to apply it to."""
    init_std: float | None = None
    lr: float | None = None
    weight_decay: float | None = None
    eps: float | None = None
    forward: float = 1.0
    muon: tuple | None = None  # (lr, weight_decay, eps) where Muon takes the step


def scaling_rules(m_N, m_L, m_D, rho, alpha, gpt2_init, unembed_form='multiplier'):
    """The factor on every base hyperparameter, by role, for AdamW: Table 1 of arXiv:2505.01618 in its v4 form.

    OPTIMIZERS has what follows from it for others; muon is from Table 4 of arXiv:2603.00541.

    rho enters init and learning rate as in arXiv:2405.15743. That it enters weight decay too, so that a hidden
    weight's lr * weight_decay moves with neither width nor density, is our derivation. The paper scales Q K^T by
    1/n_embd and its code by 1/head_dim; ours is 1/sqrt(head_dim) at the base and falls as 1/head_dim from there, so
    that every parameterization is the same model at the base shape (see test_base_equivalence).
    unembed_form='weights' moves the factor on the logits into the weights, as Table 1 of arXiv:2512.22382: under Adam
    the same training.
    """
    fan_in = m_N * rho            # how many more inputs a hidden unit sums over than in the base model
    std = fan_in ** -0.5          # keeps that sum's size
    branch = m_L ** -alpha        # multiplier on every residual branch
    depth = m_L ** (alpha - 1)    # the lr factor that goes with it: branch * depth = 1 / m_L for every alpha
    muon = depth, 1.0, branch     # a step's size does not depend on fan_in; eps stands beside the whole gradient's norm
    logits, unembed = (1 / m_N, 1.0) if unembed_form == 'multiplier' else (1.0, 1 / m_N)
    return {
        # role                    init_std         lr              weight_decay  eps           forward  muon
        'embedding':         Rule(1.0,             1.0,            1.0,          1 / m_N,      1.0),
        'block_norm':        Rule(0.0,             depth,          0.0,          branch / m_N, 1.0),
        'qk_norm':           Rule(0.0,             depth,          0.0,          branch,       1.0),  # of all heads
        'hidden_weight':     Rule(std,             depth / fan_in, fan_in,       branch / m_N, 1.0, muon),
        'residual_proj':     Rule(std * gpt2_init, depth / fan_in, fan_in,       branch / m_N, 1.0, muon),
        'hidden_bias':       Rule(0.0,             depth,          0.0,          branch / m_N, 1.0),
        'final_norm':        Rule(0.0,             1.0,            0.0,          1 / m_N,      1.0),
        'unembedding':       Rule(unembed,         unembed,        1 / unembed,  logits,       logits),
        # multipliers without a tensor of their own
        'residual_branch':   Rule(forward=branch),
        'attention_logits':  Rule(forward=m_D ** -0.5),      # on top of 1/sqrt(head_dim)
    }


ROLES = {  # every parameter's full name must match exactly one pattern
    'embedding':     r'transformer\.(wte|wpe)\.weight',
    'block_norm':    r'transformer\.h\.\d+\.ln_[12]\.(weight|bias)',
    'qk_norm':       r'transformer\.h\.\d+\.attn\.[qk]_norm\.weight',
    'hidden_weight': r'transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_fc)\.weight',
    'residual_proj': r'transformer\.h\.\d+\.(attn|mlp)\.c_proj\.weight',
    'hidden_bias':   r'transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.bias',
    'final_norm':    r'transformer\.ln_f\.(weight|bias)',
    'unembedding':   r'lm_head\.weight',
}


def role_of(name):
    """Role of the parameter called `name`. Raises ValueError unless exactly one pattern in ROLES matches."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    if len(roles) != 1:
        raise ValueError(f"parameter '{name}' matches {len(roles)} roles {roles}, must match exactly one: edit ROLES")
    return roles[0]


OPTIMIZERS = {  # what each makes of a rule: the factors on learning rate, weight decay and eps
    'adamw': lambda rule: (rule.lr, rule.weight_decay, rule.eps),
    'lion':  lambda rule: (rule.lr, rule.weight_decay, None),  # it moves a weight by its lr, as AdamW does
    'muon':  lambda rule: rule.muon or (rule.lr, rule.weight_decay, rule.eps),  # AdamW where it is no hidden matrix
    # it moves a weight by lr * gradient, and gradients fall as AdamW's eps does; lr * weight decay is AdamW's
    'sgd':   lambda rule: (rule.lr / rule.eps, rule.weight_decay * rule.eps, None),
}


# -----------------------------------------------------------------------------
# The config

NORMS = {
    'layernorm': lambda size, gain, bias: nn.LayerNorm(size, elementwise_affine=gain, bias=bias),
    'rmsnorm':   lambda size, gain, bias: nn.RMSNorm(size, eps=1e-5, elementwise_affine=gain),
}
ACTIVATIONS = {
    'gelu':   gelu,
    'relu':   F.relu,
    'relu2':  lambda x: F.relu(x).square(),
    'swiglu': swiglu,
}
ATTN_SCALES = {  # on Q K^T, of head_dim D, n_embd N and the rule of the attention logits
    'base':     lambda D, N, rule: rule * D ** -0.5,
    '1/sqrt_d': lambda D, N, rule: D ** -0.5,
    '1/d':      lambda D, N, rule: 1 / D,
    '1/N':      lambda D, N, rule: 1 / N,
}
CHOICES = dict(parameterization=PARAMETERIZATIONS, norm=NORMS, activation=ACTIVATIONS, attn_scale=ATTN_SCALES,
               pos=('learned', 'rope', 'alibi', 'none'), unembed_form=('multiplier', 'weights'))


@dataclass
class GPTConfig:
    block_size: int = 1024         # longest context, tokens
    vocab_size: int = 50304        # rows of the (un)embedding; GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_embd: int = 768
    head_dim: int = 64             # n_head = n_embd / head_dim; keep it fixed while n_embd grows
    dropout: float = 0.0
    bias: bool = True              # in Linears and LayerNorms, as in GPT-2
    norm: str = 'layernorm'        # or rmsnorm
    norm_gain: bool = True         # False: norms have no parameters
    qk_norm: bool = False          # a norm on every head's queries and keys
    activation: str = 'gelu'       # gelu, relu, relu2 (squared), swiglu (as many weights, two thirds of the units)
    pos: str = 'learned'           # learned, rope, alibi, none
    n_kv_head: int = 0             # heads of keys and values, each for n_head / n_kv_head of the queries'; 0: n_head
    tie_weights: bool = False      # one tensor for wte and lm_head; it then follows the rule of the embedding
    attn_scale: str = 'base'       # of Q K^T: base (1/sqrt(head_dim) there, as 1/head_dim from there), 1/sqrt_d, 1/d,
    #                                1/N (of n_embd)
    unembed_form: str = 'multiplier'  # where 1/m_N is: on the logits, or in the unembedding's weights
    zero_init_query: bool = False
    zero_init_unembed: bool = False
    # base hyperparameters, to be tuned at the base shape (with the learning rate, weight decay and eps)
    init_std: float = 0.02
    input_mult: float = 1.0        # on the embedding
    attn_mult: float = 1.0         # on the attention logits
    output_mult: float = 1.0       # on the logits
    # how they follow the shape
    parameterization: str = 'completep'
    alpha: float = 0.0             # depth exponent in [0.5, 1]; 0: the parameterization's own
    base_n_layer: int = 2          # the shape at which the hyperparameters were tuned
    base_n_embd: int = 256
    base_head_dim: int = 64
    density: float = 1.0           # of attention and MLP weights, in (0, 1]
    mask_seed: int = 1             # draws the sparsity masks; nothing else does
    real_vocab_size: int = 0       # ids from here up are padding and never sampled; 0: none is

    def __post_init__(self):
        """Raises ValueError with what was given, what is allowed and what to do."""
        def require(ok, name, allowed):
            if not ok:
                raise ValueError(f'{name}={getattr(self, name)!r} is not allowed: {allowed}')
        for name, choices in CHOICES.items():
            require(getattr(self, name) in choices, name, f"choose one of {', '.join(choices)}")
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_embd', 'head_dim', 'base_n_layer', 'base_n_embd',
                     'base_head_dim'):
            require(type(getattr(self, name)) is int and getattr(self, name) >= 1, name, 'use an integer of at least 1')
        for name in ('init_std', 'input_mult', 'attn_mult', 'output_mult'):
            require(0 <= getattr(self, name) < math.inf, name, 'use a finite value of at least 0')
        require(self.n_embd % self.head_dim == 0, 'n_embd', f'use a multiple of head_dim={self.head_dim}')
        heads = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
        require(self.n_kv_head in (0, *heads), 'n_kv_head',
                f"use one of {', '.join(map(str, heads))}, which divide n_head={self.n_head}, or 0 for n_head")
        require(self.pos != 'rope' or self.head_dim % 2 == 0, 'head_dim', "pos='rope' rotates pairs, use an even one")
        for name, value in (('zero_init_unembed', True), ('unembed_form', 'weights')):
            require(not self.tie_weights or getattr(self, name) != value, name,
                    'with tie_weights=True it would change the embedding, use another value or untied weights')
        require(0 <= self.real_vocab_size <= self.vocab_size, 'real_vocab_size', f'use 0..{self.vocab_size}')
        require(0 <= self.dropout < 1, 'dropout', 'use a value in [0, 1)')
        require(0 < self.density <= 1, 'density', 'use a value in (0, 1]; 1 is dense')
        require(self.alpha == 0 or 0.5 <= self.alpha <= 1, 'alpha',
                "use a value in [0.5, 1], or 0 for the parameterization's own")
        deep = [name for name, sees in PARAMETERIZATIONS.items() if sees.depth]
        require(self.alpha == 0 or self.parameterization in deep, 'alpha',
                f"parameterization='{self.parameterization}' does not see depth, so alpha would do nothing; "
                f"leave alpha out or use {', '.join(deep)}")

    @property
    def n_head(self):
        return self.n_embd // self.head_dim

    @property
    def rules(self):
        """Rule of every role at this shape: a parameterization is nothing but the exponents on the ratios."""
        sees = PARAMETERIZATIONS[self.parameterization]
        rules = scaling_rules(
            m_N=(self.n_embd / self.base_n_embd) ** sees.width,
            m_L=(self.n_layer / self.base_n_layer) ** sees.depth,
            m_D=(self.head_dim / self.base_head_dim) ** sees.width,
            rho=self.density ** sees.density,
            alpha=self.alpha or sees.alpha,
            gpt2_init=(2 * self.n_layer) ** (-0.5 * sees.gpt2_init),
            unembed_form=self.unembed_form,
        )
        if self.zero_init_unembed:
            rules['unembedding'] = rules['unembedding']._replace(init_std=0.0)
        return rules


# -----------------------------------------------------------------------------
# The model


class SparseLinear(nn.Linear):
    """Linear layer with a static random mask, a frozen parameter: it is saved and sharded as its weight is."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias=bias)
        self.mask = nn.Parameter(torch.ones(out_features, in_features, dtype=torch.bool), requires_grad=False)

    def forward(self, x):
        # the weight is zero wherever the mask is; the product keeps its gradient, so its AdamW step, zero there too
        return F.linear(x, self.weight * self.mask, self.bias)


def hidden_linear(in_features, out_features, config):
    Linear = SparseLinear if config.density < 1 else nn.Linear
    return Linear(in_features, out_features, bias=config.bias)


class KeyValueCache:
    """Keys and values of the tokens that one layer has gone through, so that sampling computes each only once."""

    def __init__(self, size):
        self.size, self.length, self.kv = size, 0, None

    def append(self, k, v):
        """All keys and all values, (B, H, tokens so far, D) each, with those of the new tokens (B, H, T, D)."""
        if self.kv is None:
            self.kv = [x.new_empty(*x.shape[:2], self.size, x.size(-1)) for x in (k, v)]
        start, self.length = self.length, self.length + k.size(2)
        for kept, new in zip(self.kv, (k, v)):
            kept[:, :, start:self.length] = new
        return [kept[:, :, :self.length] for kept in self.kv]


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head, *[config.n_kv_head or config.n_head] * 2  # of queries, keys and values
        self.head_dim, self.dropout, self.pos = config.head_dim, config.dropout, config.pos
        self.c_attn = hidden_linear(config.n_embd, sum(self.heads) * config.head_dim, config)  # all three in one
        self.q_norm, self.k_norm = (  # no biases: softmax does not see what all keys share
            NORMS[config.norm](config.head_dim, config.norm_gain, bias=False) if config.qk_norm else None
            for _ in range(2))
        self.c_proj = hidden_linear(config.n_embd, config.n_embd, config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.logit_mult = config.attn_mult * ATTN_SCALES[config.attn_scale](
            config.head_dim, config.n_embd, config.rules['attention_logits'].forward)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, all heads, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), and (B, n_kv_head, T, D) twice
        if self.q_norm:
            wide = torch.promote_types(q.dtype, torch.float32)  # the stream, which other norms see, is no bf16
            q, k = self.q_norm(q.to(wide)).to(q.dtype), self.k_norm(k.to(wide)).to(q.dtype)
        if self.pos == 'rope':
            start = cache.length if cache else 0
            q, k = rotate(q, start), rotate(k, start)
        if cache:
            k, v = cache.append(k, v)
        y = causal_attention(q, k, v, self.logit_mult, self.dropout if self.training else 0.0, self.pos == 'alibi')
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, H * D)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        gated = config.activation == 'swiglu'  # two products before it, each 8/3 n_embd wide
        d_ff = 8 * round(config.n_embd / 3) if gated else 4 * config.n_embd
        self.c_fc = hidden_linear(config.n_embd, d_ff * (1 + gated), config)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = hidden_linear(d_ff, config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config.norm_gain, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config.norm_gain, config.bias)
        self.mlp = MLP(config)
        self.branch_mult = config.rules['residual_branch'].forward

    def forward(self, x, cache=None):
        x = x + self.branch_mult * self.attn(self.ln_1(x), cache)
        x = x + self.branch_mult * self.mlp(self.ln_2(x))
        return x


def fill(tensor, values):
    """Copies `values` into a tensor; into one that is sharded over processes, the part of each."""
    if isinstance(tensor, DTensor):  # every process has drawn the same values: none are sent
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


class GPT(nn.Module):

    def __init__(self, config, generator=None):
        """A freshly initialised model; `generator` (CPU) draws the weights, the global one if None.

        Under `torch.device('meta')` nothing is drawn: call to_empty() and init_weights() to fill it.
        """
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **(dict(wpe=nn.Embedding(config.block_size, config.n_embd)) if config.pos == 'learned' else {}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config.n_embd, config.norm_gain, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.input_mult = config.input_mult * config.rules['embedding'].forward
        self.output_mult = config.output_mult * config.rules['unembedding'].forward
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draws every weight and every mask, in the order of their names: the only place that initialises."""
        if self.config.tie_weights:  # here, because to_empty() unties
            self.lm_head.weight = self.transformer.wte.weight
        c, rules = self.config, self.config.rules
        for name, p in self.weights():
            role = role_of(name)
            if p.is_meta:
                continue
            if p.dim() == 1:  # norms start as the identity, biases at zero
                p.fill_(1.0 if role.endswith('norm') and name.endswith('weight') else 0.0)
            else:  # drawn whole and on the CPU: the same values on every device and every number of them
                values = torch.empty(p.shape).normal_(0.0, c.init_std * rules[role].init_std, generator=generator)
                if c.zero_init_query and name.endswith('attn.c_attn.weight'):
                    values[:c.n_embd] = 0.0  # the rows of the queries
                fill(p, values)
        mask_generator = torch.Generator().manual_seed(c.mask_seed)
        for module in self.modules():
            if isinstance(module, SparseLinear) and not module.mask.is_meta:
                fill(module.mask, torch.rand(module.mask.shape, generator=mask_generator) < c.density)
                module.weight.mul_(module.mask)

    def weights(self):
        """(name, parameter) of all that is trained; the masks are parameters, too."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def features(self, idx, caches=None):
        """Output of the final norm (B, T, C) for token ids (B, T), which follow those in `caches`, one of each layer.

        Raises ValueError for more than block_size tokens.
        """
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'sequence of {end} tokens is longer than block_size={self.config.block_size}: crop it')
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe.weight[start:end]  # (T, C)
        x = self.transformer.drop(self.input_mult * x)
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer):
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def unembed(self, x):
        """Logits (..., V) of features (..., C); training and sampling both come through here."""
        return self.lm_head(self.output_mult * x)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> (logits (B, T, V), None), or with targets (B, T) -> (None, mean loss in nats per token).

        Targets of -1 are left out of the mean.
        """
        logits = self.unembed(self.features(idx))
        return (logits, None) if targets is None else (None, cross_entropy(logits, targets))

    def matrices(self, name, p):
        """Heights of the matrices that are stacked in the hidden weight `p` called `name`."""
        if name.endswith('attn.c_attn.weight'):
            return [heads * self.config.head_dim for heads in self.transformer.h[0].attn.heads]
        gated = self.config.activation == 'swiglu' and name.endswith('mlp.c_fc.weight')
        return [p.size(0) // 2] * 2 if gated else [p.size(0)]

    def configure_optimizers(self, weight_decay, learning_rate, betas, eps, device_type, optimizer='adamw',
                             muon_mult=1.0):
        """The optimizer with one parameter group per role; the arguments are base values.

        A group holds its `role`, its own `lr`, `weight_decay` and `eps`, and `lr_scale` = lr / learning_rate for
        schedules, which must multiply each group's lr instead of setting it. Raises ValueError.
        """
        if optimizer == 'muon' and self.config.density < 1:
            raise ValueError(f"optimizer='muon' has no rule for density={self.config.density}: its steps fill what is "
                             'masked; use density=1 or another optimizer')
        groups, rules = {}, self.config.rules
        for name, p in self.weights():
            role = role_of(name)
            if None in (rules[role].lr, rules[role].weight_decay, rules[role].eps):
                raise ValueError(f"role '{role}' has no rule for optimizer='{optimizer}': give it one in scaling_rules")
            lr, decay, eps_factor = OPTIMIZERS[optimizer](rules[role])
            by_muon = optimizer == 'muon' and rules[role].muon
            if by_muon:  # lr * weight_decay stays
                lr, decay = lr * muon_mult, decay / muon_mult
            group = groups.setdefault(role, dict(
                params=[], role=role, lr_scale=lr, lr=learning_rate * lr, weight_decay=weight_decay * decay,
                **(dict(eps=eps * eps_factor) if eps_factor else {}), **(dict(rows=[]) if by_muon else {})))
            group['params'].append(p)
            if by_muon:
                group['rows'].append(self.matrices(name, p))
        return make_optimizer(optimizer, list(groups.values()), learning_rate, betas, eps,
                              fused=device_type in ('cuda', 'cpu'))

    def num_params(self):
        """Number of trained parameters, embeddings and masked weights included."""
        return sum(p.numel() for _, p in self.weights())

    def flops_per_token(self):
        """FLOPs of one training token, forward and backward: 6 per weight in a product, plus attention
        (arXiv:2204.02311, Appendix B). Masked weights count: they are multiplied all the same."""
        c = self.config
        looked_up = c.n_embd * (c.vocab_size * (not c.tie_weights) + c.block_size * (c.pos == 'learned'))
        return 6 * (self.num_params() - looked_up) + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Yields one new token (B, 1) after the other, continuing ids (B, T); temperature 0 takes the likeliest."""
        size, caches = self.config.block_size, None
        for _ in range(max_new_tokens):
            if caches is None or caches[0].length == size:  # once the window moves, every token's position changes
                caches, new = [KeyValueCache(size) for _ in self.transformer.h], idx[:, -size:]
            logits = self.unembed(self.features(new, caches)[:, -1]).float()  # (B, V)
            logits[:, self.config.real_vocab_size or self.config.vocab_size:] = -math.inf
            if top_k:
                smallest = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
                logits[logits < smallest] = -math.inf
            if temperature == 0:
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                next_id = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            idx, new = torch.cat((idx, next_id), dim=1), next_id
            yield next_id

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Token ids (B, T) -> (B, T + max_new_tokens). Call eval() first; `generator` lives on the model's device."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, generator)], dim=1)

    @classmethod
    def from_pretrained(cls, model_type, dropout=0.0, block_size=None):
        """GPT-2 weights by name ('gpt2' .. 'gpt2-xl') or folder, through transformers; block_size crops the context.

        Raises ValueError if block_size is more than the weights have, or for a model of another kind.
        """
        from transformers import GPT2LMHeadModel
        hf = GPT2LMHeadModel.from_pretrained(model_type)
        if (block_size or 0) > hf.config.n_positions:
            raise ValueError(f'block_size={block_size} is more than the {hf.config.n_positions} positions of '
                             f"'{model_type}': use at most that")
        for key, values in dict(
                activation_function=['gelu_new'], layer_norm_epsilon=[1e-5], n_inner=[None, 4 * hf.config.n_embd],
                tie_word_embeddings=[True], scale_attn_weights=[True], scale_attn_by_inverse_layer_idx=[False]).items():
            if getattr(hf.config, key) not in values:
                raise ValueError(f"'{model_type}' has {key}={getattr(hf.config, key)}, it must be {values[0]}")
        shape = dict(n_layer=hf.config.n_layer, n_embd=hf.config.n_embd, head_dim=hf.config.n_embd // hf.config.n_head)
        config = GPTConfig(
            block_size=block_size or hf.config.n_positions, vocab_size=hf.config.vocab_size,
            real_vocab_size=hf.config.vocab_size, tie_weights=True, dropout=dropout, parameterization='gpt2', **shape,
            **{f'base_{key}': value for key, value in shape.items()})
        weights = {}
        for name, value in hf.state_dict().items():
            if re.search(r'(c_attn|c_proj|c_fc)\.weight$', name):
                value = value.t()  # Conv1D stores (in, out), Linear (out, in)
            if name == 'transformer.wpe.weight':
                value = value[:config.block_size]
            if not name.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks that old versions save
                weights[name] = value
        model = cls(config)
        model.load_state_dict(weights)
        return model
