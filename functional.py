"""
Attention and cross-entropy.

They are PyTorch's own, except in bf16 on a CPU: there they are computed in pieces that stay in the cache, attention as
plain products, which are faster than the kernel, and the loss without float32 copies of the logits.
"""
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

QUERIES = 128    # of attention at a time
LOGITS = 2**19   # of cross-entropy in float32 at a time


def in_bf16_on_cpu(x):
    return x.device.type == 'cpu' and x.dtype == torch.bfloat16


# -----------------------------------------------------------------------------
# Attention


def causal_attention(q, k, v, scale, dropout=0.0):
    """softmax(scale Q K^T) V with every position blind to later ones: (B, H, T, D) each -> (B, H, T, D).

    A single query sees all keys: it is the last of their positions.
    """
    assert q.size(2) in (1, k.size(2)), f'{q.size(2)} queries for {k.size(2)} keys: one, or as many'
    if in_bf16_on_cpu(q) and not dropout and q.size(2) > 1:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        return CausalProducts.apply(q, k, v, scale).view(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, scale=scale, dropout_p=dropout)


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
