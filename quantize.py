"""int8 weights, for decoding on a CPU, where reading the weights is most of the work.

Each row of a weight matrix is kept as whole numbers from -127 to 127 and one float32 scale; activations are quantized
row by row as they come. The embedding and the output layer are included, tied ones kept once.
"""

import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F

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
