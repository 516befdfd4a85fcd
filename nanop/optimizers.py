"""Optimizers by name. How each of them follows the shape of a model is in model.py, OPTIMIZERS."""
import math
from collections import defaultdict

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanop.errors import import_optional


def orthogonalized(x, eps):
    """The matrix x (d_out, d_in), or each of (N, d_out, d_in), with all singular values moved to about 1 (0.7 to 1.2),
    in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315  # of torch.optim.Muon: x -> a x + b x^3 + c x^5 on singular values, 5 times
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    tall = x.size(-2) > x.size(-1)
    y = x.bfloat16().mT if tall else x.bfloat16()
    y = y / y.flatten(-2).norm(dim=-1).clamp(min=eps)[..., None, None]
    for _ in range(5):
        square = y @ y.mT
        y = add_product(y, add_product(square, square, square, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


class Muon(torch.optim.AdamW):
    """Muon for groups that have `rows`, AdamW for the others.

    `rows` lists for each parameter the heights of the matrices stacked in it (query, key and value, for example). Each
    matrix is orthogonalized by itself and moves by lr * sqrt(d_out / d_in) times the result; eps is divided by that
    factor (arXiv:2512.05620, Table 1). torch.optim.Muon treats a stack as one matrix, and its factor is at least 1.
    """

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, 'closures are not supported'
        groups = self.param_groups
        for group in groups:
            alike = defaultdict(list)  # on a GPU, which one matrix does not fill, those of one shape; else each alone
            for p, rows in zip(group['params'], group.get('rows', ())):
                if p.grad is None:
                    continue
                state, beta = self.state[p], group['betas'][0]
                if not state:  # AdamW's names, which it expects when a state is loaded
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p))
                state['step'] += 1
                update = p.grad.lerp(state['exp_avg'].lerp_(p.grad, 1 - beta), beta)  # Nesterov momentum
                p.mul_(1 - group['lr'] * group['weight_decay'])
                for w, u in zip(p.split(rows), update.split(rows)):
                    alike[w.shape if w.is_cuda else len(alike)].append((w, u.bfloat16()))
            for matrices in alike.values():
                weights, updates = zip(*matrices)
                shape, update = weights[0].shape, torch.stack(updates) if len(updates) > 1 else updates[0]
                size = math.sqrt(shape[0] / shape[1])
                moved = orthogonalized(update, group['eps'] / size).view(-1, *shape)  # (N, d_out, d_in)
                for w, u in zip(weights, moved):
                    w.add_(u, alpha=-group['lr'] * size)
        self.param_groups = [group for group in groups if 'rows' not in group]
        super().step()
        self.param_groups = groups


@torch.no_grad()
def clip_gradients(model, optimizer, max_norm):
    """Scale the model's gradients so that their norm is at most `max_norm`, 0 for any. Returns their norm before.

    Within the norm, the gradients of a group are multiplied by its `grad_scale`, 1 without one.
    """
    scales = {p: group.get('grad_scale', 1.0) for group in optimizer.param_groups for p in group['params']}
    grads = defaultdict(list)
    for p in model.parameters():
        if p.grad is not None:
            grads[scales.get(p, 1.0)].append(p.grad)
    norm = torch.stack([scale * get_total_norm(each) for scale, each in grads.items()]).norm()
    clip_grads_with_norm_(model.parameters(), max_norm or math.inf, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def optimizer_by_name(name, groups, learning_rate, betas, eps, device_type):
    """The optimizer called `name` for these parameter groups. beta1 is the momentum of SGD and Muon."""
    if name == 'adamw':
        return torch.optim.AdamW(groups, learning_rate, betas, eps, fused=device_type in ('cuda', 'cpu'))
    if name == 'muon':
        return Muon(groups, learning_rate, betas, eps)
    if name == 'sgd':
        return torch.optim.SGD(groups, learning_rate, momentum=betas[0])
    Lion = import_optional('lion_pytorch', "optimizer='lion'", 'lion-pytorch').Lion
    return Lion(groups, learning_rate or 1.0, betas)  # it refuses 0 here; every group has its own lr
