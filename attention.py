"""
softmax(scale Q K^T) V with every position blind to later ones.

PyTorch's own function, except for bf16 on a CPU, where plain matrix products are faster than its kernel: of some
queries at a time with the keys up to the last of them, so that most of the upper triangle is never computed. Unlike the
kernel it rounds the logits to bf16 and keeps the weights, T^2 / 2 for each head, for the backward.
"""
import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

QUERIES = 128  # at a time


def causal_attention(q, k, v, scale, dropout=0.0):
    """Attention of queries, keys and values (B, H, T, D) -> (B, H, T, D)."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and not dropout:
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        return CausalProducts.apply(q, k, v, scale).view(B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, dropout_p=dropout)


class CausalProducts(torch.autograd.Function):
    """On (N, T, D) tensors. The backward adds to K's and V's gradients in place; autograd's own would pad and copy."""

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
