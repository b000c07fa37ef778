"""Linear layers: ours for decoding, low-rank adapters beside one (LoRA, Hu et al. 2021), and one with int8 weights.

I and O are the numbers of a layer's inputs and outputs, r is the rank of an adapter: r * (I + O) parameters, beside the
layer's own I * O. int8 is for decoding on a CPU, where reading the weights is most of the work: each row of a matrix is
kept as whole numbers from -127 to 127 and one float32 scale, activations are quantized row by row as they come. The
embedding and the output layer are included, tied ones kept once.
"""

import math
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """nn.Linear, but with the weights as the first factor for up to four rows in float32 on a CPU, as in decoding.
    To read the weights is all the work there, and MKL may take two to four times as long over the same product the
    other way round, or with a single column (on AMD it does)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.reshape(-1, self.in_features)                               # (N, I)
        n = len(few)
        if n > 4 or not (torch.is_inference_mode_enabled() and x.device.type == 'cpu'
                         and x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')):
            return super().forward(x)
        few = few if n > 1 else torch.cat([few, few])
        y = (self.weight @ few.t()).t()[:n].contiguous()                    # (N, O)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], self.out_features)


# -----------------------------------------------------------------------------
# low-rank adapters: a GPT's own weights stay as they are, and two narrow matrices learn what is to be added


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


# -----------------------------------------------------------------------------
# int8 weights

# without VNNI the kernel adds two products in 16 bits, into which they fit if activations have 7
REDUCE_RANGE = not torch.cpu._is_vnni_supported()


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 matrix, float32 scales) of a float matrix (O, I): weight is about matrix * scales[:, None]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127                     # (O,)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def pack(weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.ScriptObject | None:
    """The int8 matrix (O, I) with its scales (O,) and a bias, as a CPU's kernel wants it; None where there is none."""
    engine = next((e for e in ('fbgemm', 'onednn') if e in torch.backends.quantized.supported_engines), None)
    if engine is None:                          # the float weights are used then
        return None
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():             # that a later torch will have no such tensors; requirements.txt knows
        warnings.filterwarnings('ignore', message='.*quantized tensor creation.*')
        rows = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros_like(scale).long(), 0)
    return torch.ops.quantized.linear_prepack(rows, bias)


def int8_product(x: torch.Tensor, packed: torch.ScriptObject, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., I) float32, quantized row by row, times the packed matrix (O, I), and the bias it was packed with:
    (..., O) float32."""
    product = torch.ops.quantized.linear_dynamic.default
    if x.numel() == x.size(-1):
        return product(x, packed, REDUCE_RANGE)
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    y = product(x / largest, packed, REDUCE_RANGE)          # for the kernel has one scale for all of x
    return y.mul_(largest) if bias is None else torch.lerp(bias, y, largest)        # (y - bias) * largest + bias


class Int8Linear(nn.Module):
    """What nn.Linear does, with int8 weights. Its buffers are the checkpoint's; what this CPU's kernel wants is made of
    them when it is needed, or where there is no such kernel, float weights, once."""
    weight_int8: torch.Tensor
    scale: torch.Tensor
    packed: torch.ScriptObject | None
    weight: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_int8, scale = quantize_rows(linear.weight)
        self.register_buffer('weight_int8', weight_int8)
        self.register_buffer('scale', scale)
        self.bias, self.out_features = linear.bias, linear.out_features
        self.packed = self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None and self.weight is None:
            self.packed = pack(self.weight_int8, self.scale, self.bias) if x.device.type == 'cpu' else None
            if self.packed is None:
                self.weight = (self.weight_int8 * self.scale[:, None]).to(x.dtype)
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return int8_product(x, self.packed, self.bias)


class Int8Embedding(nn.Module):
    """What nn.Embedding does, with int8 rows (V, C) and their scales (V,), which a tied output layer shares."""
    weight_int8: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight_int8: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.register_buffer('weight_int8', weight_int8)
        self.register_buffer('scale', scale)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.weight_int8[idx] * self.scale[idx].unsqueeze(-1)


def to_int8(model: nn.Module) -> nn.Module:
    """Replace a GPT's linear layers and token embedding by int8 ones, in place, for decoding only; returns it."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    head = model.get_submodule('lm_head')
    rows: tuple = ((head.weight_int8, head.scale) if model.config.tie_weights else
                   quantize_rows(model.get_parameter('transformer.wte.weight')))
    model.set_submodule('transformer.wte', Int8Embedding(*rows))
    return model.eval()
