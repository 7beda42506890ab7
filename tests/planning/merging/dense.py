"""Merge methods on whole tensors in float64, as their papers and mergekit 0.1.5 define them.

Tensors are stacked: x is [models, ...], differences from a base where there is one.
"""

import torch
from torch import Tensor


def slerp(x: Tensor, t: float) -> Tensor:
    a, b = x.flatten(1)
    dot = (a / a.norm()) @ (b / b.norm())
    if abs(dot) > 0.9995:
        return (1 - t) * x[0] + t * x[1]
    theta = torch.acos(dot)
    return (torch.sin((1 - t) * theta) * x[0] + torch.sin(t * theta) * x[1]) / torch.sin(theta)


def nuslerp(x: Tensor, t: float, dim: int | None = None) -> Tensor:
    """Along a dimension; None for the whole tensor."""
    if dim is None:
        return nuslerp(x.flatten(1), t, 0).view_as(x[0])
    a, b = x
    dot = (
        torch.nn.functional.normalize(a, dim=dim) * torch.nn.functional.normalize(b, dim=dim)
    ).sum(dim, keepdim=True)
    theta = torch.acos(dot.clamp(-1, 1))
    curved = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    return torch.where(1 - dot**2 <= 1e-16, (1 - t) * a + t * b, curved)


def multislerp(x: Tensor, weights: Tensor) -> Tensor:
    """With the step along the sphere, which is none but for rounding."""
    flat = x.flatten(1)
    w = (weights / weights.sum())[:, None]
    norms = flat.norm(dim=1, keepdim=True)
    units = flat / norms
    mean = (w * units).sum(0)
    mean = mean / mean.norm()
    tangent = (w * (units - (units @ mean)[:, None] * mean)).sum(0)
    length = tangent.norm() + 1e-12
    made = (mean * torch.cos(length) + tangent * torch.sin(length) / length) * (w * norms).sum()
    shaped: Tensor = made.reshape(x[0].shape)
    return shaped


def karcher(x: Tensor, steps: int = 200, tolerance: float = 1e-12) -> Tensor:
    flat = x.flatten(1)
    norms = flat.norm(dim=1)
    units = flat[norms > 0] / norms[norms > 0, None]
    mean = units.mean(0)
    mean = mean / mean.norm()
    for _ in range(steps):
        dots = (units @ mean).clamp(-1, 1)
        angles = torch.acos(dots)
        ratio = torch.where(angles < 1e-9, 1.0, angles / torch.sin(angles))
        step = (ratio[:, None] * (units - dots[:, None] * mean)).mean(0)
        if step.norm() < tolerance:
            break
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm()
    made = norms.mean() * mean
    shaped: Tensor = made.reshape(x[0].shape)
    return shaped


def model_stock(x: Tensor, *, rows: bool = False) -> Tensor:
    """Of differences; the difference of the result."""
    flat = x if rows and x.dim() > 2 else x.flatten(1)[:, None]
    n = len(flat)
    units = flat / flat.norm(dim=-1, keepdim=True)
    pairs = [(units[i] * units[j]).sum(-1) for i in range(n) for j in range(i + 1, n)]
    cosine = torch.stack(pairs).mean(0)
    t = n * cosine / (1 + (n - 1) * cosine)
    made = t[..., None] * flat.mean(0)
    shaped: Tensor = made.reshape(x[0].shape)
    return shaped


def kept(x: Tensor, n: int) -> Tensor:
    """Which are the n largest in magnitude, earlier ones first, bool."""
    order = x.flatten().abs().argsort(descending=True, stable=True)
    made = torch.zeros(x.numel(), dtype=torch.bool)
    made[order[:n]] = True
    return made.view_as(x)


def agreed(x: Tensor, weights: Tensor, *, normalize: bool, by_count: bool = False) -> Tensor:
    """The sum of what has the elected sign; or its mean."""
    each = x * weights.view(-1, *[1] * (x.dim() - 1))
    votes = each.sign() if by_count else each
    direction = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = each.sign() == direction
    total = (each * agrees).sum(0)
    if not normalize:
        return total
    left = (agrees * weights.view(-1, *[1] * (x.dim() - 1))).sum(0)
    return total / torch.where(left == 0, 1, left)
