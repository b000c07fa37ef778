"""What PyTorch has, too, done in less memory or in less time. Tests hold each to PyTorch's own.

N rows, C channels, V vocabulary.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn import functional as F

SLICE = {'cpu': 1 << 20, 'mps': 1 << 26}        # logits made at a time: what a CPU's cache holds; 2**28 on other GPUs
AT_A_TIME = 1 << 26             # elements that are made orthogonal together: 128 MB of them in bfloat16


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of `x @ weight.T` against `targets`, without ever holding all logits.

    For GPT-2 the logits of a batch are far larger than the rest of its activations. So they are made for some rows at
    a time, in float32, and turned at once into the gradient, softmax(logits) - onehot(target); backward only scales it.
    It is for what is not compiled: on CPUs it is the fastest there is, elsewhere it saves memory. torch.compile makes
    something faster of plain cross_entropy (36 against 57 ms: github.com/pytorch/pytorch/issues/124480).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype,
                with_grad: bool) -> torch.Tensor:
        # x (N, C), weight (V, C), targets (N) int64 with -100 for none; the products run in `dtype`
        # every slice reads all weights, so that it should not be too thin
        rows = max(512, SLICE.get(x.device.type, 1 << 28) // weight.size(0))
        rows = min(rows, 8192) if dtype == torch.float16 else rows      # sums over more of them may overflow
        grad_x, grad_w = torch.empty_like(x), None
        x, w = x.to(dtype), weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for i in range(0, x.size(0), rows):
            xi, target = x[i:i + rows], targets[i:i + rows, None]
            wanted = target >= 0
            target = target.clamp(min=0)
            p = F.log_softmax((xi @ w.t()).float(), dim=-1)                         # (n, V), logarithms still
            loss = loss - (p.gather(1, target) * wanted).sum()
            if with_grad:
                p.exp_().scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
                p = p.mul_(wanted).to(dtype)
                grad_x[i:i + rows] = p @ w
                if ctx.needs_input_grad[1]:                  # with adapters, nobody asks
                    part = p.t() @ xi                        # (V, C)
                    grad_w = part.to(weight.dtype) if grad_w is None else grad_w.add_(part)
            p = part = None                                  # before the next are made
        ctx.grads = grad_x, grad_w
        return loss

    @staticmethod
    def backward(ctx, grad_loss: torch.Tensor) -> tuple:
        (grad_x, grad_w), ctx.grads = ctx.grads, None        # scaled in place, and so for one backward pass only
        return grad_x.mul_(grad_loss), None if grad_w is None else grad_w.mul_(grad_loss), None, None, None


def token_losses(x: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """-ln p of each target (N,) int64, float32 and 0 where it is -100, for x (N, C) through the output layer `head`.
    Without gradients, and without ever holding all logits."""
    losses = torch.zeros(targets.shape, device=x.device)
    wanted = (targets >= 0).nonzero().squeeze(1)
    for rows in wanted.split(max(512, (1 << 24 if x.device.type == 'cpu' else 1 << 28) // head.out_features)):
        losses[rows] = F.cross_entropy(head(x[rows]).float(), targets[rows], reduction='none')
    return losses


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: Zhang and Sennrich 2019. x (..., C); weight (C) or
    None; eps: None is float32's smallest step."""
    if x.device.type == 'cpu' and x.requires_grad and not torch.compiler.is_compiling():
        return RMSNormOnCPU.apply(x, weight, torch.finfo(torch.float32).eps if eps is None else eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNormOnCPU(torch.autograd.Function):
    """On CPUs, PyTorch has a kernel for layer_norm's gradient, but not for this one, which takes it six times as long.
    With a mean of 0, layer_norm's is this one less the gradient's mean."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        r = r.square_().div_(x.size(-1)).add_(eps).rsqrt_()                         # (..., 1)
        ctx.save_for_backward(x, weight, r)
        y = x * r
        return (y if weight is None else y.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        x, weight, r = ctx.saved_tensors
        w, grad = None if weight is None else weight.to(r.dtype), grad.to(r.dtype)
        grad_x, grad_w, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x.to(r.dtype), x.shape[-1:], torch.zeros_like(r), r, w, None, [True, w is not None, False])
        mean = (grad.sum(-1, keepdim=True) if w is None else (grad @ w).unsqueeze(-1)) / x.size(-1)
        return grad_x.addcmul_(mean, r).to(x.dtype), None if w is None else grad_w.to(weight.dtype), None


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """x with each element 0 with probability p, and the others divided by 1 - p; Srivastava et al. 2014."""
    if p == 0:
        return x
    if x.device.type != 'cpu':
        return F.dropout(x, p)
    return x * kept_by_dropout(x.detach(), p).to(x.dtype).mul_(1 / (1 - p))


@torch.library.custom_op('gpt::kept_by_dropout', mutates_args=())
def kept_by_dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, otherwise 1, in x's shape; uint8. NumPy's SFC64, which PyTorch's generator gives its seed,
    throws eight dice of 256 faces with each 64 bits; how many faces are bad is 256 p, rounded up or down by a throw for
    each thousand of them. F.dropout takes ten times as long on a CPU; torch.compile cannot look in here."""
    generator, n = np.random.Generator(np.random.SFC64(int(torch.randint(1 << 62, ())))), x.numel()
    dice = generator.integers(-1 << 63, 1 << 63, (n // 1024 + 1, 128)).view(np.uint8)              # (rows, 1024)
    bad = (256 * p + generator.random((len(dice), 1))).astype(np.uint8)
    return torch.from_numpy((dice >= bad).reshape(-1)[:n]).view(torch.uint8).view(x.shape)


@kept_by_dropout.register_fake
def _(x, p):
    return torch.empty_like(x, dtype=torch.uint8)


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), which takes one matrix at a time, hundreds of small products: here those
    of one shape, or its transpose, go together. The update is scaled to AdamW's root mean square (Liu et al. 2025,
    "Muon is scalable"), so that one learning rate serves both. Settings, state and results are torch's.
    """

    def __init__(self, params: Iterable, **options):
        super().__init__(params, adjust_lr_fn='match_rms_adamw', **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            alike = {}
            for p in group['params']:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                    alike.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, params in alike.items():
                n = max(1, AT_A_TIME // (shape[0] * shape[1]))
                for i in range(0, len(params), n):
                    self.update(params[i:i + n], group)

    def update(self, params: list[torch.Tensor], group: dict) -> None:
        """One step of `params`, matrices of one shape or its transpose, with the settings of their group."""
        gradients, momenta = [p.grad for p in params], [self.state[p]['momentum_buffer'] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group['momentum'])
        directions = torch._foreach_lerp(gradients, momenta, group['momentum'])         # Nesterov's

        # five steps of Newton and Schulz bring the singular values near 1: x <- a x + (b g + c g g) x, with g = x x^T
        x = torch.stack([d if d.size(0) <= d.size(1) else d.T for d in directions]).bfloat16()     # (n, rows, columns)
        x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=group['eps'])
        a, b, c = group['ns_coefficients']
        for _ in range(group['ns_steps']):
            g = x @ x.mT                                                                # (n, rows, rows)
            x = torch.baddbmm(x, torch.baddbmm(g, g, g, beta=b, alpha=c), x, beta=a)

        scale = 0.2 * max(params[0].shape) ** 0.5
        for p, direction in zip(params, x, strict=True):
            p.mul_(1 - group['lr'] * group['weight_decay'])
            p.add_(direction if p.size(0) <= p.size(1) else direction.T, alpha=-group['lr'] * scale)
