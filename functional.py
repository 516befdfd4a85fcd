"""
Attention with its positions, GELU, SwiGLU and cross-entropy.

Attention and cross-entropy are PyTorch's own, except in bf16 on a CPU: there they are computed in pieces that stay in
the cache, attention as plain products, which are faster than the kernel, and the loss without float32 copies of the
logits.
"""
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

QUERIES = 128    # of attention at a time
LOGITS = 2**19   # of cross-entropy in float32 at a time


def in_bf16_on_cpu(x):
    return x.device.type == 'cpu' and x.dtype == torch.bfloat16


# -----------------------------------------------------------------------------
# Attention


def rotate(x, start):
    """Rotary positions for (B, H, T, D) of tokens `start` and later, by pairs (d, d + D/2): arXiv:2104.09864."""
    T, D = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (D / 2,)
    angles = torch.arange(start, start + T, device=x.device)[:, None] * frequencies  # (T, D / 2)
    (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def alibi_slopes(n_head, device):
    """2^(-8 h / H) for h = 1 .. H: arXiv:2108.12409, here also where H is no power of two."""
    return 2.0 ** (-8 / n_head * torch.arange(1, n_head + 1, device=device))


def alibi_mask(n_head, T, keys, device):
    """(H, T, keys) to add to the logits of the last T of so many positions: -slope * distance, -inf for the future."""
    distance = torch.arange(keys - T, keys, device=device)[:, None] - torch.arange(keys, device=device)  # (T, keys)
    mask = -alibi_slopes(n_head, device)[:, None, None] * distance
    return mask.masked_fill(distance < 0, -math.inf)


def flex_alibi(q, k, v, scale):
    """Attention with alibi_mask(), which is never made; for torch.compile."""
    slopes = alibi_slopes(q.size(1), q.device)
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.size(2), k.size(2), device=q.device)
    return flex_attention(q, k, v, lambda score, b, h, i, j: score - slopes[h] * (i - j), causal, scale,
                          enable_gqa=q.size(1) != k.size(1))


def causal_attention(q, k, v, scale, dropout=0.0, alibi=False):
    """softmax(scale Q K^T) V with every position blind to later ones: (B, H, T, D) each -> (B, H, T, D).

    A single query sees all keys: it is the last of their positions. Keys and values may have fewer heads, each then
    serves several of the queries. `alibi` adds -slope * distance to the logits.
    """
    (H, T), (kv_heads, keys) = q.shape[1:3], k.shape[1:3]
    assert T in (1, keys), f'{T} queries for {keys} keys: one, or as many'
    if alibi and T > 1 and not dropout and q.is_cuda and q.size(-1) >= 16 and torch.compiler.is_compiling():
        return flex_alibi(q, k, v, scale)
    if alibi:
        mask = alibi_mask(H, T, keys, q.device).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=H != kv_heads)
    if in_bf16_on_cpu(q) and not dropout and T > 1:
        if H != kv_heads:
            k, v = (x.repeat_interleave(H // kv_heads, dim=1) for x in (k, v))
        y = CausalProducts.apply(*(x.flatten(0, 1) for x in (q, k, v)), scale)  # (B * H, T, D) each
        return y.view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=T > 1, scale=scale,
                                          enable_gqa=H != kv_heads)


class CausalProducts(torch.autograd.Function):
    """On (N, T, D) tensors: some queries at a time with the keys up to the last of them, so that most of the upper
    triangle is never computed. Unlike the kernel it rounds the logits to bf16 and keeps the weights, T^2 / 2 for each
    head. The backward adds to K's and V's gradients in place; autograd's own would pad and copy.
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


def gelu(x):
    """GELU in the tanh form that GPT-2 has (arXiv:1606.08415); nanoGPT uses the erf form."""
    if torch.compiler.is_compiling() and x.device.type == 'cpu':  # (1 + tanh(u)) / 2 is sigmoid(2 u), and cheaper
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate='tanh')


def swiglu(x):
    """(.., 2 F) -> (.., F): the second half times SiLU of the first (arXiv:2002.05202)."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


# -----------------------------------------------------------------------------
# Cross-entropy


def cross_entropy(logits, targets):
    """Logits (B, T, V) and targets (B, T) -> mean loss in nats over targets that are not -1; consumes the logits."""
    logits, targets = logits.view(-1, logits.size(-1)), targets.reshape(-1)  # (B * T, V), (B * T,)
    if in_bf16_on_cpu(logits):
        return CrossEntropyInPlace.apply(logits, targets, torch.is_grad_enabled() and logits.requires_grad)
    return F.cross_entropy(logits, targets, ignore_index=-1)


class CrossEntropyInPlace(torch.autograd.Function):
    """On (N, V) and (N,): the logits' gradient takes their place, for which the product that made them has no use."""

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
        assert d_logits is not None, 'a second backward through one loss: its gradient is used up'
        return d_logits.mul_(d_loss), None, None
