"""
Layers that model.py chooses from: norms, activations, attention with its positions, cross-entropy.

Attention and cross-entropy are PyTorch's own, except in bf16 on a CPU. There both are computed in pieces that fit the
cache: attention as plain matrix products, the loss without a float32 copy of all logits.
"""
import math
from functools import lru_cache

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

QUERIES = 128    # attention in pieces: queries per piece
LOGITS = 2**19   # cross-entropy in pieces: float32 logits per piece


def in_bf16_on_cpu(x):
    return x.device.type == 'cpu' and x.dtype == torch.bfloat16


class SparseLinear(nn.Linear):
    """Linear layer with a static random mask. The mask is a frozen parameter, so it is saved and sharded."""

    def __init__(self, in_features, out_features, bias):
        super().__init__(in_features, out_features, bias=bias)
        self.mask = nn.Parameter(torch.ones(out_features, in_features, dtype=torch.bool), requires_grad=False)

    def forward(self, x):
        # masked weights are zero already; the product also masks their gradients, and so their optimizer steps
        return F.linear(x, self.weight * self.mask, self.bias)


def hidden_linear(in_features, rows, config):
    """A linear layer. `rows`: heights of the matrices stacked in its weight (q, k, v); Muon steps each by itself."""
    linear = (SparseLinear if config.density < 1 else nn.Linear)(in_features, sum(rows), bias=config.bias)
    linear.rows = rows
    return linear


@torch.no_grad()
def fill(tensor, values):
    """Copy `values`, the same on every rank, into a tensor; into a sharded tensor each rank copies its own part."""
    if isinstance(tensor, DTensor):  # src_data_rank=None: nothing is sent
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


@torch.no_grad()
def draw_masks(model, density, seed):
    """Draw the masks of a model's SparseLinear layers, and set masked weights to zero; on the meta device draw none."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, SparseLinear) and not module.mask.is_meta:
            fill(module.mask, torch.rand(module.mask.shape, generator=generator) < density)
            module.weight.mul_(module.mask)


# -----------------------------------------------------------------------------
# Norms, activations, attention scales by name
def gelu(x):
    """GELU in the tanh form of GPT-2 (arXiv:1606.08415). nanoGPT uses the erf form."""
    if torch.compiler.is_compiling() and x.device.type == 'cpu':  # (1 + tanh(u)) / 2 = sigmoid(2 u), which is cheaper
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate='tanh')


def swiglu(x):
    """SwiGLU (arXiv:2002.05202): SiLU of the first half times the second half, (..., 2 F) -> (..., F)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


NORMS = dict(
    layernorm=lambda size, gain, bias: nn.LayerNorm(size, elementwise_affine=gain, bias=bias),
    rmsnorm=lambda size, gain, bias: nn.RMSNorm(size, eps=1e-5, elementwise_affine=gain))
ACTIVATIONS = dict(gelu=gelu, relu=F.relu, relu2=lambda x: F.relu(x).square(), swiglu=swiglu)
ATTN_SCALES = {  # factor on Q K^T, from head_dim D, n_embd N and the rule for attention logits
    'base':     lambda D, N, rule: rule * D ** -0.5,
    '1/sqrt_d': lambda D, N, rule: D ** -0.5,
    '1/d':      lambda D, N, rule: 1 / D,
    '1/N':      lambda D, N, rule: 1 / N}

# -----------------------------------------------------------------------------
# Attention
def rotate(x, start):
    """Apply rotary positions (arXiv:2104.09864) from `start` on to x (B, H, T, D). Rotated pairs are (d, d + D/2)."""
    T, D = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D / 2,)
    angles = torch.arange(start, start + T, device=x.device)[:, None] * frequencies  # (T, D / 2)
    (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def alibi_slopes(n_head, device):
    """ALiBi slopes 2^(-8 h / H) for h = 1 .. H (arXiv:2108.12409), here for any H, not only powers of two. Fewer than 8
    heads get the range of 8, 1/2 .. 1/256: under the formula they would have no local head."""
    return 2.0 ** -torch.linspace(8 / max(n_head, 8), 8, n_head, device=device)


def alibi_mask(n_head, T, keys, device, dtype):
    """Bias (H, T, keys) for the logits of the last T positions: -slope * distance, and -inf for the future."""
    distance = torch.arange(keys - T, keys, device=device)[:, None] - torch.arange(keys, device=device)  # (T, keys)
    mask = -alibi_slopes(n_head, device)[:, None, None] * distance
    return mask.masked_fill(distance < 0, -math.inf).to(dtype)


shared_alibi_mask = lru_cache(maxsize=1)(alibi_mask)  # the layers keep one for their backward, not one each


def flex_alibi(q, k, v, scale):
    """Attention with the ALiBi bias, which is never stored. For compiled models on a GPU."""
    slopes = alibi_slopes(q.size(1), q.device)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.size(2), k.size(2), device=q.device)
    return flex_attention(q, k, v, lambda score, b, h, i, j: score - slopes[h] * (i - j), causal, scale,
                          enable_gqa=q.size(1) != k.size(1))


def causal_attention(q, k, v, scale, dropout=0.0, alibi=False):
    """softmax(scale Q K^T + bias) V with a causal mask: q (B, H, T, D), k and v (B, n_kv_head, T, D) -> (B, H, T, D).

    A single query is at the last position, so it sees all keys. With fewer key heads than query heads, each key head
    serves a group of query heads. `alibi` adds the bias -slope * distance.
    """
    (H, T), (kv_heads, keys) = q.shape[1:3], k.shape[1:3]
    assert T in (1, keys), f'{T} queries for {keys} keys: expected one query, or one for each key'
    if alibi and T > 1 and not dropout and q.is_cuda and q.size(-1) >= 16 and torch.compiler.is_compiling():
        return flex_alibi(q, k, v, scale)
    in_pieces = in_bf16_on_cpu(q) and not alibi and not dropout and T > 1
    if H != kv_heads and (in_pieces or q.is_cuda and q.dtype == torch.float32):  # CUDA's for float32 know no groups
        k, v = (x.repeat_interleave(H // kv_heads, dim=1) for x in (k, v))
    if in_pieces:
        return CausalProducts.apply(*(x.flatten(0, 1) for x in (q, k, v)), scale).view(q.shape)  # of (B * H, T, D)
    make_mask = alibi_mask if torch.compiler.is_compiling() else shared_alibi_mask
    mask = make_mask(H, T, keys, q.device, q.dtype) if alibi else None
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=T > 1 and not alibi, scale=scale,
                                          enable_gqa=H != k.size(1))


class CausalProducts(torch.autograd.Function):
    """Causal attention on (N, T, D) tensors, a piece of the queries at a time.

    Each piece is multiplied with the keys up to its last query only, so most of the upper triangle is never computed.
    Unlike PyTorch's kernel this rounds the logits to bf16 and keeps the attention weights, T^2 / 2 per head. The
    backward adds to the gradients of K and V in place, where autograd would pad and copy.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):
        y, weights = torch.empty_like(q), []
        for start in range(0, q.size(1), QUERIES):
            end = min(start + QUERIES, q.size(1))
            future = torch.full((end - start, end), -math.inf, dtype=q.dtype).triu(start + 1)
            p = torch.baddbmm(future, q[:, start:end], k[:, :end].mT, alpha=scale).softmax(dim=-1)  # (N, queries, keys)
            y[:, start:end] = p @ v[:, :end]
            weights.append(p)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv, end = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), 0
        for p in weights:
            start, end = end, end + p.size(1)
            dv[:, :end].baddbmm_(p.mT, dy[:, start:end])
            dp = dy[:, start:end] @ v[:, :end].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:end] = ctx.scale * (ds @ k[:, :end])
            dk[:, :end].baddbmm_(ds.mT, q[:, start:end], alpha=ctx.scale)
        return dq, dk, dv, None


# -----------------------------------------------------------------------------
# Cross-entropy
def cross_entropy(logits, targets):
    """Mean loss in nats of logits (B, T, V) and targets (B, T). Targets of -1 are left out; the logits are used up."""
    logits, targets = logits.view(-1, logits.size(-1)), targets.reshape(-1)  # (B * T, V), (B * T,)
    if in_bf16_on_cpu(logits):
        return CrossEntropyInPlace.apply(logits, targets, torch.is_grad_enabled() and logits.requires_grad)
    return F.cross_entropy(logits, targets, ignore_index=-1)


class CrossEntropy(nn.Module):
    """cross_entropy() as a module, which can be compiled by itself."""

    def forward(self, logits, targets):
        return cross_entropy(logits, targets)


class CrossEntropyInPlace(torch.autograd.Function):
    """Cross-entropy on (N, V) and (N,) that overwrites the logits, which nothing else needs, with their gradient."""

    @staticmethod
    def forward(ctx, logits, targets, wants_grad):
        counts = (targets != -1).float()
        total, shares, rows = 0.0, counts / counts.sum(), max(1, LOGITS // logits.size(1))
        for z, target, share in zip(logits.split(rows), targets.split(rows), shares.split(rows)):
            log_p, target = z.float().log_softmax(-1), target.where(target != -1, 0)[:, None]
            total = total - log_p.gather(1, target)[:, 0].mul_(share).sum()
            if wants_grad:  # softmax, minus one at the target
                z.copy_(log_p.exp_().scatter_add_(1, target, torch.full(target.shape, -1.0)).mul_(share[:, None]))
        ctx.d_logits = logits
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        d_logits, ctx.d_logits = ctx.d_logits, None
        assert d_logits is not None, 'second backward through one loss: its gradient has been used up'
        return d_logits.mul_(d_loss), None, None
