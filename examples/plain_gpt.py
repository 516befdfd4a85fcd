"""
A plain GPT with its training loop, as many projects have one: learned positions, LayerNorm, GELU, one init for all
weights, one group of parameters in AdamW.

    B batch    T time    C width    H heads    D width / heads    V vocabulary
"""
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

    def mlp(self, x):
        return self.down(F.gelu(self.up(x), approximate='tanh'))

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


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
                nn.init.normal_(p, std=c.init_std)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, ids, targets=None):
        """Token ids (B, T) -> logits (B, T, V); with targets (B, T) -> the mean loss, nats per token."""
        x = self.tokens(ids) + self.positions.weight[:ids.size(1)]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model, lr, weight_decay=0.1, eps=1e-8):
    return torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), eps, weight_decay)


def train(model, batches, lr, weight_decay=0.1):
    """Take a step on each of the batches, a list of (ids, targets). The rate warms up, then falls towards zero."""
    optimizer = make_optimizer(model, lr, weight_decay)
    for step, (ids, targets) in enumerate(batches):
        fraction = min(10 * (step + 1) / len(batches), 1 - step / len(batches))
        for group in optimizer.param_groups:
            group['lr'] = lr * fraction
        model(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
