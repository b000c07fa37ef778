"""Cross-entropy for large vocabularies: the loss of a model without all of its logits in memory at once.

N rows, C channels, V vocabulary.
"""

import torch
from torch.nn import functional as F

SLICE = {'cpu': 1 << 20, 'mps': 1 << 26}        # logits made at a time: what a CPU's cache holds; 2**28 on other GPUs


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of `x @ weight.T` against `targets`, without ever holding all logits.

    For GPT-2 the logits of a batch are far larger than the rest of its activations. So they are made for some rows at
    a time, in float32, and turned at once into the gradient, softmax(logits) - onehot(target); backward only scales it.
    It is for what is not compiled: on CPUs it is the fastest there is, elsewhere it saves memory. torch.compile makes
    something faster of plain cross_entropy (36 against 57 ms: github.com/pytorch/pytorch/issues/124480).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_grad):
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
    def backward(ctx, grad_loss):
        (grad_x, grad_w), ctx.grads = ctx.grads, None        # scaled in place, and so for one backward pass only
        return grad_x.mul_(grad_loss), None if grad_w is None else grad_w.mul_(grad_loss), None, None, None


def token_losses(x, head, targets):
    """-ln p of each target (N,) int64, float32 and 0 where it is -100, for x (N, C) through the output layer `head`.
    Without gradients, and without ever holding all logits."""
    losses = torch.zeros(targets.shape, device=x.device)
    wanted = (targets >= 0).nonzero().squeeze(1)
    for rows in wanted.split(max(512, (1 << 24 if x.device.type == 'cpu' else 1 << 28) // head.out_features)):
        losses[rows] = F.cross_entropy(head(x[rows]).float(), targets[rows], reduction='none')
    return losses
