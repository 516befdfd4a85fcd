"""
A plain GPT with its training loop, as many projects have one: learned positions, LayerNorm, GELU, one init for all
weights, one group of parameters in AdamW.

    B batch    T time    C width    H heads    D width / heads    V vocabulary
"""
import re  # for edit 5
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    vocabulary: int = 256
    context: int = 64
    depth: int = 2
    width: int = 32
    heads: int = 2
    init_std: float = 0.1
    embedding_std: float = 0.1
    # edits 1 to 6 need the base, the shape at which init_std, lr, weight_decay and eps were tuned, and the ratios to it
    base_depth: int = 2
    base_width: int = 32
    base_heads: int = 2

    @property
    def m_N(self):
        return self.width / self.base_width

    @property
    def m_L(self):
        return self.depth / self.base_depth


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.norm_1, self.norm_2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv, self.out = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def attention(self, x):
        heads = self.qkv(x).unflatten(-1, (3, self.config.heads, -1))  # (B, T, 3, H, D)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # edit 4, attention: 1/sqrt(D) at the base and 1/D from there; it changes nothing while D stays
        scale = (self.config.base_width / self.config.base_heads) ** 0.5 / q.size(-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

    def mlp(self, x):
        return self.down(F.gelu(self.up(x), approximate='tanh'))

    def forward(self, x):
        # edit 2, residual branches: all of them together move the stream as much at every depth
        x = x + self.attention(self.norm_1(x)) / self.config.m_L
        return x + self.mlp(self.norm_2(x)) / self.config.m_L


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.tokens, self.positions = nn.Embedding(c.vocabulary, c.width), nn.Embedding(c.context, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.vocabulary, bias=False)
        for name, p in self.named_parameters():  # gains of norms are 1
            if name in ('tokens.weight', 'positions.weight'):
                nn.init.normal_(p, std=c.embedding_std)
            elif p.dim() == 2:
                # edit 1, init: hidden weights sum over m_N times more inputs; the head keeps its init
                nn.init.normal_(p, std=c.init_std if p is self.head.weight else c.init_std * c.m_N ** -0.5)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, ids, targets=None):
        """Token ids (B, T) -> logits (B, T, V); with targets (B, T) -> the mean loss, nats per token."""
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        # edit 3, logits: in training and in sampling
        logits = self.head(self.norm(x) / self.config.m_N)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model, lr, weight_decay=0.1, eps=1e-8):
    # edit 5, optimizer groups: one for each role; biases and norms do not decay
    m_N, m_L = model.config.m_N, model.config.m_L
    rules = {  # the names of a role: factor on lr, weight decay, eps
        r'(tokens|positions)\.weight':             (1,       weight_decay,       eps / m_N),
        r'blocks\.\d+\.norm_[12]\.(weight|bias)':  (1,       0,                  eps / m_N / m_L),
        r'blocks\.\d+\.(qkv|out|up|down)\.weight': (1 / m_N, weight_decay * m_N, eps / m_N / m_L),
        r'blocks\.\d+\.(qkv|out|up|down)\.bias':   (1,       0,                  eps / m_N / m_L),
        r'norm\.(weight|bias)':                    (1,       0,                  eps / m_N),
        r'head\.weight':                           (1,       weight_decay,       eps / m_N),
    }
    groups = {names: dict(params=[], lr=lr * lr_scale, lr_scale=lr_scale, weight_decay=decay, eps=group_eps)
              for names, (lr_scale, decay, group_eps) in rules.items()}
    for name, p in model.named_parameters():
        fitting = [names for names in groups if re.fullmatch(names, name)]
        if len(fitting) != 1:
            raise ValueError(f"parameter '{name}' fits {len(fitting)} roles, must fit one: edit rules")
        groups[fitting[0]]['params'].append(p)
    return torch.optim.AdamW(groups.values(), lr, (0.9, 0.95))


def train(model, batches, lr, weight_decay=0.1):
    """Take a step on each of the batches, a list of (ids, targets). The rate warms up, then falls towards zero."""
    optimizer = make_optimizer(model, lr, weight_decay)
    for step, (ids, targets) in enumerate(batches):
        fraction = min(10 * (step + 1) / len(batches), 1 - step / len(batches))
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_scale'] * fraction  # edit 6, schedule: keeps the groups' rates apart
        model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
