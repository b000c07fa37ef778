"""Muon, the optimizer for a model's hidden matrices, with equal shapes in one product."""

import torch

AT_A_TIME = 1 << 26             # elements that are made orthogonal together: 128 MB of them in bfloat16


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), which takes one matrix at a time, hundreds of small products: here those
    of one shape, or its transpose, go together. The update is scaled to AdamW's root mean square (Liu et al. 2025,
    "Muon is scalable"), so that one learning rate serves both. Settings, state and results are torch's.
    """

    def __init__(self, params, **options):
        super().__init__(params, adjust_lr_fn='match_rms_adamw', **options)

    @torch.no_grad()
    def step(self, closure=None):
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

    def update(self, params, group):
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
