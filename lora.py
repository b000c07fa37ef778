"""Low-rank adapters (LoRA, Hu et al. 2021): a GPT's own weights stay as they are, and beside some of its linear layers
two narrow matrices learn what is to be added.

r rank, I and O the numbers of a layer's inputs and outputs: r * (I + O) parameters, beside its own I * O.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from functions import Linear


class LoRALinear(nn.Module):
    """W x + b + (alpha / r) B A x: what the layer of W (O, I) and b does, and what A (r, I) and B (O, r) add to it; at
    first, nothing."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))      # as nn.Linear begins

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A) * self.scale, self.lora_B)


def add_adapters(model: nn.Module, rank: int, alpha: float, targets: str) -> None:
    """Put adapters beside those linear layers of a GPT's blocks that `targets` names, such as 'c_attn,mlp.c_proj', and
    have nothing else trained; in place. Raises ValueError for a name that is none of theirs, or a rank too high."""
    layers = [(part, name, f'{part_name}.{name}') for block in model.transformer.h
              for part_name, part in block.named_children()
              for name, layer in part.named_children() if isinstance(layer, nn.Linear)]
    wanted = [target.strip() for target in targets.split(',')]
    there = dict.fromkeys(name for _, *names in layers for name in names)
    for target in wanted:
        if target not in there:
            raise ValueError(f'lora_targets {target!r} is no linear layer of this model; it has {", ".join(there)}')
    chosen = [(part, name) for part, name, path in layers if name in wanted or path in wanted]
    most = min(min(getattr(part, name).weight.shape) for part, name in chosen)
    if not 1 <= rank <= most:
        raise ValueError(f'lora_rank must be from 1 to {most}, the shortest side of a matrix in {targets}, not {rank}')
    model.requires_grad_(False)
    for part, name in chosen:
        setattr(part, name, LoRALinear(getattr(part, name), rank, alpha))
    model.config.lora_rank, model.config.lora_alpha, model.config.lora_targets = rank, alpha, targets


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Make the adapters of a GPT, if it has any, part of its weights, all of which may be trained again; in place."""
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, LoRALinear):
                O, I = layer.weight.shape
                linear = Linear(I, O, bias=False, device='meta')                            # draws no random numbers
                linear.weight, linear.bias = layer.weight, layer.bias
                linear.weight.add_(layer.lora_B @ layer.lora_A, alpha=layer.scale)
                setattr(part, name, linear)
    model.requires_grad_(True)
    model.config.lora_rank = 0
