"""
A GPT whose hyperparameters transfer: tune a small model, train a wide, deep or sparse one with the same values.

Read from top to bottom: the rules of the papers (the whole method), the config, then nanoGPT's GPT with the same
module names. The rules act in CausalSelfAttention.logit_mult, Block.forward, GPT.init_weights, GPT.unembed and
GPT.configure_optimizers.

    B batch    T time    C n_embd    H n_head    D head_dim    V vocab_size

    m_N    width ratio     n_embd   / base_n_embd
    m_L    depth ratio     n_layer  / base_n_layer
    m_D    head ratio      head_dim / base_head_dim
    m_K    ratio of d_kv   d_kv     / base_d_kv, the width n_kv_head * head_dim of shared keys and values
    rho    density         fraction of the attention and MLP weights that are not masked
    alpha  depth exponent  residual branches are multiplied by m_L^-alpha

Papers: CompleteP arXiv:2505.01618, muP (Tensor Programs V) arXiv:2203.03466, SuPar arXiv:2405.15743.
"""
import math
import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn as nn

from nanop import layers, sampling
from nanop.errors import UserError, require, require_acting, require_values
from nanop.layers import ACTIVATIONS, ATTN_SCALES, NORMS, CrossEntropy, causal_attention, fill, hidden_linear, rotate
from nanop.optimizers import optimizer_by_name


# -----------------------------------------------------------------------------
# The rules
class ScalesWith(NamedTuple):
    """1: it scales with this ratio to the base (width: and head size). 0: it ignores the ratio (ratio ** 0 = 1)."""
    width: int
    depth: int
    density: int
    gpt2_init: int  # GPT-2's 1/sqrt(2 n_layer) on the init of the residual projections
    alpha: float  # its depth exponent, where it scales with depth


PARAMETERIZATIONS = {
    #                             width depth density gpt2_init alpha
    'gpt2':            ScalesWith(0,    0,    0,      1,        1.0),  # nanoGPT, for comparison
    'sp':              ScalesWith(0,    0,    0,      0,        1.0),  # standard, column SP of Table 1
    'mup':             ScalesWith(1,    0,    0,      0,        1.0),  # arXiv:2203.03466
    'depth_mup':       ScalesWith(1,    1,    0,      0,        0.5),  # arXiv:2505.01618 with alpha = 1/2
    'completep':       ScalesWith(1,    1,    0,      0,        1.0),  # arXiv:2505.01618
    'supar':           ScalesWith(1,    0,    1,      0,        1.0),  # arXiv:2405.15743
    'completep_supar': ScalesWith(1,    1,    1,      0,        1.0),  # our own combination of the two rules
}


class Rule(NamedTuple):
    """Factors on the base hyperparameters for one role. None: the role has no tensor that the factor could act on."""
    init_std: float | None = None
    lr: float | None = None
    weight_decay: float | None = None
    eps: float | None = None
    forward: float = 1.0
    muon: tuple | None = None  # (lr, weight_decay, eps) where Muon takes the step


def scaling_rules(m_N, m_L, m_D, rho, alpha, m_K, proj_std, unembed_form='multiplier'):
    """The factors for every role, for AdamW: Table 1 of arXiv:2505.01618, version 4. eps follows the gradient's size.

    rho acts on init and lr as in arXiv:2405.15743; on weight decay by our derivation, to keep lr * weight_decay.
    Q K^T: CompleteP's paper scales by 1/n_embd, its code by 1/head_dim; ours is 1/sqrt(head_dim) at the base and falls
    as 1/head_dim from there, so that a dense base is the same model under all parameterizations but gpt2, whose
    proj_std is 1/sqrt(2 n_layer). muon: Table 4 of arXiv:2603.00541. unembed_form='weights' moves the factor on the
    logits into the unembedding's weights, as Table 1 of arXiv:2512.22382 does; under Adam training is the same.
    """
    m_in = m_N * rho                 # fan-in ratio: inputs of a hidden unit, relative to the base
    std = m_in ** -0.5               # keeps pre-activations at their size
    branch = m_L ** -alpha           # multiplier on every residual branch
    block_lr = m_L ** (alpha - 1)    # lr factor inside the blocks: branch * block_lr is 1 / m_L, a block's share
    muon = block_lr, 1.0, branch     # orthogonal steps ignore fan-in; eps is compared with a whole gradient's norm
    logits, unembed = (1 / m_N, 1.0) if unembed_form == 'multiplier' else (1.0, 1 / m_N)
    return {
        # role                    init_std         lr               weight_decay  eps           forward  muon
        'embedding':         Rule(1.0,             1.0,             1.0,          1 / m_N,      1.0),
        'block_norm':        Rule(0.0,             block_lr,        0.0,          branch / m_N, 1.0),
        'qk_norm':           Rule(0.0,             block_lr,        0.0,          branch / m_D, 1.0),  # sums over heads
        'hidden_weight':     Rule(std,             block_lr / m_in, m_in,         branch / m_N, 1.0, muon),
        'residual_proj':     Rule(std * proj_std,  block_lr / m_in, m_in,         branch / m_N, 1.0, muon),
        'hidden_bias':       Rule(0.0,             block_lr,        0.0,          branch / m_N, 1.0),
        'kv_weight':         Rule(std,             block_lr / m_in, m_in,         branch / m_K, 1.0, muon),  # sums, too
        'kv_bias':           Rule(0.0,             block_lr,        0.0,          branch / m_K, 1.0),
        'final_norm':        Rule(0.0,             1.0,             0.0,          1 / m_N,      1.0),
        # eps of the unembedding: its gradient carries the factor on the logits
        'unembedding':       Rule(unembed,         unembed,         1 / unembed,  logits,       logits),
        'residual_branch':   Rule(forward=branch),           # this and the next have no tensor
        'attention_logits':  Rule(forward=m_D ** -0.5),      # on top of 1/sqrt(head_dim)
    }


def length_rules(batch_ratio, duration_ratio):
    """Factors on AdamW's lr, weight decay and eps and on 1 - beta, in every role, for another batch size or duration
    (tokens) than the base's. They keep the gradient noise of a whole run: Table 1 of arXiv:2512.22382."""
    ratio = batch_ratio / duration_ratio
    return dict(lr=ratio ** 0.5, weight_decay=ratio ** 0.5, eps=ratio ** -0.5, beta1=ratio, beta2=ratio)


ROLES = {  # every parameter's full name must match exactly one pattern
    'embedding':     r'transformer\.(wte|wpe)\.weight',
    'block_norm':    r'transformer\.h\.\d+\.ln_[12]\.(weight|bias)',
    'qk_norm':       r'transformer\.h\.\d+\.attn\.[qk]_norm\.weight',
    'hidden_weight': r'transformer\.h\.\d+\.(attn\.c_attn|mlp\.c_fc)\.weight',
    'residual_proj': r'transformer\.h\.\d+\.(attn|mlp)\.c_proj\.weight',
    'hidden_bias':   r'transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.bias',
    'kv_weight':     r'transformer\.h\.\d+\.attn\.c_kv\.weight',
    'kv_bias':       r'transformer\.h\.\d+\.attn\.c_kv\.bias',
    'final_norm':    r'transformer\.ln_f\.(weight|bias)',
    'unembedding':   r'lm_head\.weight',
}


def role_of(name):
    """The role of the parameter called `name`. Raises ValueError unless exactly one pattern in ROLES matches."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    if len(roles) != 1:
        raise ValueError(f"parameter '{name}' matches {len(roles)} roles {roles}, must match exactly one: edit ROLES")
    return roles[0]


OPTIMIZERS = {  # the factors on lr, weight decay and eps (None: has no eps) that each takes from a rule
    'adamw': lambda rule: (rule.lr, rule.weight_decay, rule.eps),
    'lion':  lambda rule: (rule.lr, rule.weight_decay, None),  # moves a weight by its lr, as AdamW does
    'muon':  lambda rule: rule.muon or (rule.lr, rule.weight_decay, rule.eps),  # AdamW steps what is no hidden matrix
    'sgd':   lambda rule: (rule.lr / rule.eps, rule.weight_decay * rule.eps, None),  # by lr * gradient, falling as eps
}

# -----------------------------------------------------------------------------
# The config
CHOICES = dict(parameterization=PARAMETERIZATIONS, norm=NORMS, activation=ACTIVATIONS, attn_scale=ATTN_SCALES,
               pos=('learned', 'rope', 'alibi', 'none'), unembed_form=('multiplier', 'weights'))


@dataclass
class GPTConfig:
    block_size: int = 256              # context, tokens
    vocab_size: int = 0                # rows of embedding and unembedding; train.py replaces 0 by the dataset's
    real_vocab_size: int = 0           # ids from here up are padding and never sampled; train.py replaces 0, too
    n_layer: int = 2
    n_embd: int = 256
    head_dim: int = 64                 # n_head = n_embd / head_dim; keep it fixed while n_embd grows
    n_kv_head: int = 0                 # heads of keys and values, shared by groups of query heads; 0: n_head
    dropout: float = 0.0
    bias: bool = True                  # in linear layers and LayerNorms, as in GPT-2
    norm: str = 'layernorm'            # layernorm, rmsnorm
    norm_gain: bool = True             # False: norms have no parameters
    qk_norm: bool = False              # a norm on the queries and keys of every head
    activation: str = 'gelu'           # gelu, relu, relu2 (squared), swiglu (with as many weights as the others)
    pos: str = 'learned'               # positions: learned, rope, alibi, none
    tie_weights: bool = False          # embedding and unembedding share one tensor, under the embedding's rule
    attn_scale: str = 'base'           # factor on Q K^T: base (see scaling_rules), 1/sqrt_d, 1/d, 1/N (n_embd)
    unembed_form: str = 'multiplier'   # where 1/m_N acts: multiplier (on the logits), weights (in their init and lr)
    zero_init_query: bool = False
    zero_init_unembed: bool = False
    density: float = 1.0               # fraction of attention and MLP weights that are not masked, in (0, 1]
    mask_seed: int = 1                 # seed of the masks, and of nothing else
    # base hyperparameters, tuned at the base shape (learning_rate, weight_decay and eps are in train.py)
    init_std: float = 0.02
    input_mult: float = 1.0            # on the embedding
    attn_mult: float = 1.0             # on the attention logits
    output_mult: float = 1.0           # on the logits
    init_std_mult: dict = field(default_factory=dict)      # a role's own factor on its init_std: dict(embedding=4.0)
    lr_mult: dict = field(default_factory=dict)            # on its learning_rate; the roles are in ROLES
    weight_decay_mult: dict = field(default_factory=dict)
    eps_mult: dict = field(default_factory=dict)
    # the rules, and the shape at which the base hyperparameters were tuned
    parameterization: str = 'completep'  # gpt2, sp, mup, depth_mup, completep, supar, completep_supar
    alpha: float = 0.0                 # depth exponent in [0.5, 1]; 0: the parameterization's own
    base_n_layer: int = 2
    base_n_embd: int = 256
    base_head_dim: int = 64
    base_n_kv_head: int = 0            # 0: n_kv_head, for a number that stays while n_embd grows

    def __post_init__(self):
        for key in ('block_size', 'n_layer', 'n_embd', 'head_dim', 'base_n_layer', 'base_n_embd', 'base_head_dim'):
            value = getattr(self, key)
            require(self, key, type(value) is int and 1 <= value < 2**63, 'use an integer of at least 1, below 2**63')
        require_values(self, choices=CHOICES, below_one=['dropout'], at_least=dict(
            vocab_size=0, n_kv_head=0, base_n_kv_head=0, init_std=0, input_mult=0, attn_mult=1e-6, output_mult=0),
            factors=dict.fromkeys(('init_std_mult', 'lr_mult', 'weight_decay_mult', 'eps_mult'), ROLES))
        require(self, 'n_embd', self.n_embd % self.head_dim == 0, f'use a multiple of head_dim={self.head_dim}')
        require(self, 'n_kv_head', self.n_head % (self.n_kv_head or 1) == 0, f'use a divisor of n_head={self.n_head}')
        require(self, 'base_n_kv_head', self.n_kv_head or not self.base_n_kv_head, 'set n_kv_head, too')
        require(self, 'qk_norm', not (self.qk_norm and self.zero_init_query), 'it blows up the step from zero queries')
        require(self, 'head_dim', self.pos != 'rope' or self.head_dim % 2 == 0, "pos='rope' needs an even one")
        for key, value in (('zero_init_unembed', True), ('unembed_form', 'weights')):
            require(self, key, not self.tie_weights or getattr(self, key) != value,
                    'with tie_weights=True it would change the embedding, use another value or untied weights')
        ids = self.vocab_size or math.inf
        require(self, 'real_vocab_size', 0 <= self.real_vocab_size <= ids, f'use 0..{ids}')
        require(self, 'density', 0 < self.density <= 1, 'use a value in (0, 1]; 1 is dense')
        require(self, 'alpha', self.alpha == 0 or 0.5 <= self.alpha <= 1,
                "use a value in [0.5, 1], or 0 for the parameterization's own")
        require(self, 'alpha', self.alpha == 0 or PARAMETERIZATIONS[self.parameterization].depth,
                f"parameterization='{self.parameterization}' ignores depth, so alpha would do nothing; leave it out or "
                'use depth_mup, completep or completep_supar')

    @classmethod
    def of(cls, config, **changes):
        """The GPTConfig in a larger config, such as train.py's."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)} | changes)

    @property
    def n_head(self):
        return self.n_embd // self.head_dim

    @property
    def rules(self):
        """{role: Rule} at this shape."""
        scales_with = PARAMETERIZATIONS[self.parameterization]
        kv_ratio = (self.n_kv_head or 1) / (self.base_n_kv_head or self.n_kv_head or 1)
        rules = scaling_rules(
            m_N=(self.n_embd / self.base_n_embd) ** scales_with.width,
            m_L=(self.n_layer / self.base_n_layer) ** scales_with.depth,
            m_D=(self.head_dim / self.base_head_dim) ** scales_with.width,
            rho=self.density ** scales_with.density,
            alpha=self.alpha or scales_with.alpha, unembed_form=self.unembed_form,
            m_K=(self.head_dim / self.base_head_dim * kv_ratio) ** scales_with.width,
            proj_std=(2 * self.n_layer) ** (-0.5 * scales_with.gpt2_init))
        if self.zero_init_unembed:
            rules['unembedding'] = rules['unembedding']._replace(init_std=0.0)
        return rules


# -----------------------------------------------------------------------------
# The model
class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_kv_head = config.n_kv_head or config.n_head
        self.heads = config.n_head, n_kv_head, n_kv_head  # of queries, keys and values
        self.head_dim, self.dropout, self.pos = config.head_dim, config.dropout, config.pos
        rows = [heads * config.head_dim for heads in self.heads]
        self.c_attn = hidden_linear(config.n_embd, rows[:1] if config.n_kv_head else rows, config)
        self.c_kv = hidden_linear(config.n_embd, rows[1:], config) if config.n_kv_head else None
        self.q_norm, self.k_norm = (  # without biases, as is common
            NORMS[config.norm](config.head_dim, config.norm_gain, bias=False) if config.qk_norm else None
            for _ in range(2))
        self.c_proj = hidden_linear(config.n_embd, [config.n_embd], config)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.logit_mult = config.attn_mult * ATTN_SCALES[config.attn_scale](
            config.head_dim, config.n_embd, config.rules['attention_logits'].forward)
        self.cache = None  # a KeyValueCache while sampling

    def forward(self, x):
        B, T, C = x.shape
        qkv = torch.cat((self.c_attn(x), self.c_kv(x)), dim=-1) if self.c_kv else self.c_attn(x)
        qkv = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads of q, k and v, T, D)
        q, k, v = qkv.split(self.heads, dim=1)  # (B, H, T, D), and (B, n_kv_head, T, D) twice
        if self.q_norm:  # autocast may have made q and k bf16; normalize them in float32 like the residual stream
            float32 = torch.promote_types(q.dtype, torch.float32)  # or float64
            q, k = self.q_norm(q.to(float32)).to(q.dtype), self.k_norm(k.to(float32)).to(q.dtype)
        if self.pos == 'rope':
            start = self.cache.length if self.cache else 0
            q, k = rotate(q, start), rotate(k, start)
        if self.cache:
            k, v = self.cache.append(k, v)
        y = causal_attention(q, k, v, self.logit_mult, self.dropout if self.training else 0.0, self.pos == 'alibi')
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, H * D)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        gated = config.activation == 'swiglu'  # two input matrices, each 8/3 n_embd wide
        d_ff = 8 * round(config.n_embd / 3) if gated else 4 * config.n_embd
        self.c_fc = hidden_linear(config.n_embd, [d_ff] * (1 + gated), config)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = hidden_linear(d_ff, [config.n_embd], config)
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

    def forward(self, x):
        x = x + self.branch_mult * self.attn(self.ln_1(x))
        return x + self.branch_mult * self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config, generator=None):
        """A model with fresh weights, drawn by a CPU `generator` or the global one. Under torch.device('meta') nothing
        is drawn: fill such a model with to_empty() and init_weights()."""
        super().__init__()
        require(config, 'vocab_size', config.vocab_size, "a model needs its number of ids, a dataset's or your own")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **(dict(wpe=nn.Embedding(config.block_size, config.n_embd)) if config.pos == 'learned' else {}),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config.n_embd, config.norm_gain, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.input_mult = config.input_mult * config.rules['embedding'].forward
        self.output_mult = config.output_mult * config.rules['unembedding'].forward
        self.init_weights(generator)

    @classmethod
    def from_weights(cls, config, weights):
        """A model of trained weights, {name: tensor}, which it takes over without a copy."""
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(weights, assign=True)
        model.tie()
        return model

    def tie(self):
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draw all weights and masks, in the order of named_parameters(), over PyTorch's own init."""
        self.tie()  # to_empty() unties
        c, rules = self.config, self.config.rules
        for name, p in self.weights():
            role = role_of(name)
            if p.dim() == 1:  # norms start as the identity, biases at zero
                p.fill_(1.0 if role.endswith('norm') and name.endswith('weight') else 0.0)
            elif not p.is_meta:  # drawn on the CPU at full size, so the values do not depend on device or world size
                std = c.init_std * c.init_std_mult.get(role, 1.0) * rules[role].init_std
                values = torch.empty(p.shape).normal_(0.0, std, generator=generator)
                if c.zero_init_query and name.endswith('attn.c_attn.weight'):
                    values[:c.n_embd] = 0.0  # the rows of the queries
                fill(p, values)
        drawn = dict.fromkeys(role_of(name) for name, p in self.weights() if p.dim() > 1)
        require_acting(c, 'init_std_mult', [role for role in drawn if rules[role].init_std])
        layers.draw_masks(self, c.density, c.mask_seed)

    def weights(self):
        """(name, parameter) of everything that is trained: all parameters but the masks."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def features(self, idx):
        """The final norm's output (B, T, C) for token ids (B, T). Raises ValueError for more than block_size tokens."""
        cache = self.transformer.h[0].attn.cache
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f'sequence of {end} tokens is longer than block_size={self.config.block_size}: crop it')
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == 'learned':
            x = x + self.transformer.wpe.weight[start:end]  # (T, C)
        x = self.transformer.drop(self.input_mult * x)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def unembed(self, x):
        """Logits (..., V) of features (..., C), for training and sampling alike."""
        return self.lm_head(self.output_mult * x)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean loss in nats per token, over
        targets that are not -1)."""
        logits = self.unembed(self.features(idx))
        return (logits, None) if targets is None else (None, self.cross_entropy(logits, targets))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Token ids (B, T) -> (B, T + max_new_tokens). Call eval() first; `generator` lives on the model's device."""
        return torch.cat([idx, *sampling.stream(self, idx, max_new_tokens, temperature, top_k, generator)], dim=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, eps, device_type, optimizer='adamw',
                             muon_mult=1.0, clip_norm='plain'):
        """The optimizer, with one parameter group per role. The arguments are base values.

        A group holds its `role`, `lr`, `weight_decay`, `eps`, `grad_scale` for clip_gradients, and `lr_scale` =
        lr / learning_rate. A schedule sets lr = learning_rate * lr_scale * fraction, or it would undo the rules.
        """
        if optimizer == 'muon' and self.config.density < 1:
            raise UserError(f"optimizer='muon' has no rule for density={self.config.density}: its steps would fill "
                            'masked weights; use density=1 or another optimizer')
        c, groups, rules = self.config, {}, self.config.rules
        for name, p in self.weights():
            role = role_of(name)
            if None in (rules[role].lr, rules[role].weight_decay, rules[role].eps):
                raise ValueError(f"role '{role}' has no rule for optimizer='{optimizer}': give it one in scaling_rules")
            lr, decay, eps_factor = OPTIMIZERS[optimizer](rules[role])
            lr, decay = lr * c.lr_mult.get(role, 1.0), decay * c.weight_decay_mult.get(role, 1.0)  # the role's own
            by_muon = optimizer == 'muon' and rules[role].muon
            if by_muon:  # lr * weight_decay stays the same
                lr, decay = lr * muon_mult, decay / muon_mult
            grad_scale = rules[role].lr if role == 'unembedding' else 1.0  # the multiplier's gradient in both forms
            if clip_norm == 'scaled':  # SGD's lr x norm^2 is a role's share in the fall of the loss, at every size
                grad_scale = OPTIMIZERS['sgd'](rules[role])[0] ** 0.5
            group = groups.setdefault(role, dict(
                params=[], role=role, lr_scale=lr, lr=learning_rate * lr, weight_decay=weight_decay * decay,
                **(dict(eps=eps * c.eps_mult.get(role, 1.0) * eps_factor) if eps_factor else {}),
                **(dict(rows=[]) if by_muon else {}), grad_scale=grad_scale))
            group['params'].append(p)
            if by_muon:
                group['rows'].append(self.get_submodule(name.removesuffix('.weight')).rows)
        for key in ('lr', 'weight_decay', 'eps'):
            require_acting(c, f'{key}_mult', [role for role, group in groups.items() if group.get(key)])
        return optimizer_by_name(optimizer, list(groups.values()), learning_rate, betas, eps, device_type)

    def num_params(self):
        """Number of parameters without the masks; weights that a mask sets to zero count."""
        return sum(p.numel() for _, p in self.weights())
