"""A GPT with a few switches, so that one block is GPT-2, a small teaching model, or a Llama-class model.

Shapes: B batch, T time, C = n_embd channels, nh heads, hs head size, V vocabulary.
Parameter names are nanoGPT's (transformer.wte, transformer.h.0.attn.c_attn, ...), so that its checkpoints load.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from functions import LinearCrossEntropy, Muon, dropout, rms_norm, token_losses
from layers import Int8Linear, Linear, add_adapters

# Shapes by name: `GPTConfig(**PRESETS['gpt2'])`, or `python train.py --preset=gpt2`.
PRESETS: dict[str, dict] = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),            # 124M
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024, block_size=1024),    # 350M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280, block_size=1024),     # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024),        # 1558M
    '26m': dict(n_layer=8, n_head=6, n_embd=384, block_size=512),                # 27M with a vocabulary of 32,768
    'char': dict(n_layer=6, n_head=6, n_embd=384, block_size=256),               # 11M with 65 characters
    'teaching': dict(n_layer=4, n_head=4, n_embd=256, block_size=128, norm='rmsnorm', position='rope', mlp='silu'),
}

LARGE = 1 << 21     # tokens of a batch times channels, from which on activations are rather made twice than kept

# What stands between the two matrices of the MLP, and whether it is gated: half of the first product, through the
# function, then multiplies the other half.
MLPS = {
    'gelu': (lambda x: F.gelu(x, approximate='tanh'), False),       # GPT-2's
    'gelu_erf': (F.gelu, False),                                    # exact; nanoGPT's
    'silu': (F.silu, False),
    'relu2': (lambda x: F.relu(x).square(), False),                 # So et al. 2021
    'swiglu': (F.silu, True),                                       # Shazeer 2020; Llama's
}


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304         # GPT-2's 50257, padded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0              # grouped-query attention: heads of keys and values; 0 = n_head
    n_embd: int = 768
    n_inner: int = 0                # width of the MLP; 0 = 4 * n_embd (gated: 8/3 * n_embd, rounded up to 64s)
    dropout: float = 0.0
    bias: bool = True               # in the linear layers and layer norms, as GPT-2
    qkv_bias: bool = False          # for queries, keys and values even where bias is off, as Qwen2
    norm: str = 'layernorm'         # layernorm | rmsnorm
    norm_eps: float = 1e-5
    position: str = 'learned'       # learned | rope
    rope_theta: float = 10000.0
    mlp: str = 'gelu'               # one of MLPS
    tie_weights: bool = True        # the output layer is the token embedding
    qk_norm: bool = False           # RMS-normalise each head's queries and keys
    zero_init: bool = False         # what is added to the residual stream begins as nothing
    document_token: int = -1        # the id that begins a document, which attention does not look beyond; -1 = it may
    lora_rank: int = 0              # width of the adapters, see lora.py; 0 = there are none
    lora_alpha: int = 16
    lora_targets: str = 'c_attn,c_proj,c_fc'

    def __post_init__(self):
        """Fill in what follows from the rest. Raises ValueError for a shape that cannot be."""
        self.n_kv_head = self.n_kv_head or self.n_head
        for name, choices in {'norm': ('layernorm', 'rmsnorm'), 'position': ('learned', 'rope'), 'mlp': MLPS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f'{name} {getattr(self, name)!r} is not one of {", ".join(choices)}')
        _, gated = MLPS[self.mlp]
        self.n_inner = self.n_inner or (64 * math.ceil(8 * self.n_embd / 3 / 64) if gated else 4 * self.n_embd)
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, not {getattr(self, name)}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout must be at least 0 and below 1, not {self.dropout}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}')
        if self.position == 'rope' and (self.n_embd // self.n_head) % 2:
            raise ValueError(f'rope turns pairs of channels: n_embd / n_head, here {self.n_embd // self.n_head}, '
                             'must be even')


class RMSNorm(nn.RMSNorm):

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def build_norm(config: GPTConfig) -> nn.Module:
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_table(block_size: int, head_size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the angles t * theta^(-2i/hs), each (block_size, hs/2) float32. Su et al. 2021."""
    frequency = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angle = torch.arange(block_size, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel i of x (..., T, hs) with channel i + hs/2, by the angle of its position; cos, sin (..., T, hs/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of the tokens so far, in room taken once: per layer two (B, n_kv_head, max_length, hs).
    dtype: what they are kept in, and attention is computed in; None = as they come."""

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, dtype: torch.dtype | None = None):
        self.shape, self.dtype = (batch_size, config.n_kv_head, max_length, config.n_embd // config.n_head), dtype
        self.layers: list = [None] * config.n_layer
        self.length = 0             # tokens already there; GPT.forward moves it on after the last layer

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Put k, v (B, n_kv_head, T, hs) behind what is there; return all of this layer's keys and values."""
        if self.layers[layer] is None:
            self.layers[layer] = [k.new_empty(self.shape, dtype=self.dtype or k.dtype) for _ in 'kv']
        T = k.size(2)                                       # if all rows are alike, B may be 1 here
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept.narrow(2, self.length, T).copy_(new)
        return [kept.narrow(2, 0, self.length + T).narrow(0, 0, len(k)) for kept in self.layers[layer]]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
              p: float = 0.0) -> torch.Tensor:
    """softmax(q k^T / sqrt(hs)) v for q (B, nh, T, hs) and k, v (B, n_kv_head, S, hs): (B, nh, T, hs).
    mask: (B or 1, 1, T, S) bool, who sees whom; without it, everyone sees what came before. p: that of dropout.

    Two ways to the same, which a test holds together: PyTorch's fused kernel, and where its backward pass is slow, for
    short texts on a CPU in bfloat16, three plain products, four times as fast. A change to one is a change to both.
    """
    (B, nh, T, hs), n_kv_head = q.shape, k.size(1)
    plainly = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.requires_grad
    plainly = plainly and T == k.size(2) <= 256
    if not plainly:
        if q.is_cuda and n_kv_head != nh:       # few fused kernels take fewer heads, none in float32 or with a mask
            k, v = (z.repeat_interleave(nh // n_kv_head, dim=1) for z in (k, v))
        # (B, nh, T, hs) x (B, nh, hs, S) -> (B, nh, T, S) -> (B, nh, T, hs), never whole in memory
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                              dropout_p=p, enable_gqa=k.size(1) != nh)
    if n_kv_head != nh:
        k, v = (z.repeat_interleave(nh // n_kv_head, dim=1) for z in (k, v))
    q, k, v = (z.transpose(0, 1).reshape(nh * B, T, hs) for z in (q, k, v))     # without a copy, if it was made before
    if mask is None:
        unseen = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1).expand(nh * B, T, T)
    else:
        unseen = torch.zeros(1, B, T, T, dtype=q.dtype).masked_fill_(~mask.transpose(0, 1), -math.inf)
        unseen = unseen.expand(nh, B, T, T).reshape(nh * B, T, T)
    y = []
    for first, end in [(0, T // 2), (T // 2, T)] if T > 128 else [(0, T)]:     # the first half sees itself only
        scores = torch.baddbmm(unseen[:, first:end, :end], q[:, first:end], k[:, :end].transpose(1, 2),
                               alpha=1 / math.sqrt(hs))
        y.append(dropout(scores.softmax(dim=-1), p) @ v[:, :end])
    return torch.cat(y, dim=1).view(nh, B, T, hs).transpose(0, 1)


def product_of(function: Callable[[torch.Tensor], torch.Tensor], linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """linear(function(x)), for a cheap function. In a large batch, what the function made is not kept for the backward
    pass, but made again there: a third less memory for some hundredths more time. (torch.compile decides by itself.)"""
    if (not x.requires_grad or torch.compiler.is_compiling()
            or x.numel() // x.size(-1) * min(linear.weight.shape) < LARGE):
        return linear(function(x))
    return checkpoint(lambda x: linear(function(x)), x, use_reentrant=False, preserve_rng_state=False)


class CausalSelfAttention(nn.Module):

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.head_size = config.n_embd // config.n_head
        # queries of all heads, then keys, then values, in one matrix product
        self.c_attn = Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_size,
                             bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def queries_keys_values(self, x: torch.Tensor, norm: nn.Module,
                            rope: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """q (B, nh, T, hs), k and v (B, n_kv_head, T, hs) for x (B, T, C), as attention() takes them."""
        B, T, _ = x.shape
        n_head, n_kv_head, hs = self.config.n_head, self.config.n_kv_head, self.head_size
        heads = product_of(norm, self.c_attn, x).view(B, T, n_head + 2 * n_kv_head, hs).permute(2, 0, 1, 3)
        if x.device.type == 'cpu' and x.requires_grad:
            heads = heads.contiguous()                       # one copy here saves three of them in attention()
        q, k, v = heads.split([n_head, n_kv_head, n_kv_head])                   # (nh or n_kv_head, B, T, hs)
        if self.config.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)          # (B, nh or n_kv_head, T, hs)

    def forward(self, x: torch.Tensor, norm: nn.Module, rope: list[torch.Tensor] | None = None,
                cache: KVCache | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(x, norm, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
            q = q.to(k.dtype)
            if 1 < T < k.size(2):   # several new tokens behind cached ones: each sees the cache and its own past
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        y = attention(q, k, v, mask, self.config.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)   # heads side by side again
        y = self.c_proj(y)
        return dropout(y, self.config.dropout) if self.training else y


class MLP(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        _, gated = MLPS[config.mlp]
        self.c_fc = Linear(config.n_embd, 2 * config.n_inner if gated else config.n_inner, bias=config.bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        x = product_of(norm, self.c_fc, x)                   # (B, T, n_inner), twice that if gated
        x = product_of(self.activation, self.c_proj, x)
        return dropout(x, self.config.dropout) if self.training else x

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        function, gated = MLPS[self.config.mlp]
        if not gated:
            return function(x)
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up


class Block(nn.Module):

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, rope: list[torch.Tensor] | None = None, cache: KVCache | None = None,
                mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(x, self.ln_1, rope, cache, mask)
        x = x + self.mlp(x, self.ln_2)
        return x


def for_any_shape(function: Callable) -> Callable:
    """Decorates what runs a model on ever new shapes: there, cuDNN's attention, which is the first choice on new GPUs,
    would spend most of the time on a plan for each."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])(function)


class GPT(nn.Module):
    transformer: Any                # an nn.ModuleDict, which cannot tell what its parts are
    rope_cos: torch.Tensor
    rope_sin: torch.Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == 'learned':
            self.transformer['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.update({
            'h': nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            'ln_f': build_norm(config),
        })
        if config.position == 'rope':
            cos, sin = rope_table(config.block_size, config.n_embd // config.n_head, config.rope_theta)
            self.register_buffer('rope_cos', cos, persistent=False)
            self.register_buffer('rope_sin', sin, persistent=False)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight

        # GPT-2's initialisation: N(0, 0.02), and less for what is added to the residual stream 2 * n_layer times
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.0 if config.zero_init else 0.02 / math.sqrt(2 * config.n_layer))
        if config.lora_rank:
            add_adapters(self, config.lora_rank, config.lora_alpha, config.lora_targets)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None,
                last_only: bool = False, reduction: str = 'mean', positions: torch.Tensor | None = None,
                mask: torch.Tensor | None = None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits, or with targets the loss; the other of the pair (logits, loss) is None.

        idx: (B, T) int64 token ids, T at most block_size (less what the cache holds). targets: (B, T) int64, the ids
        one place further on, -100 where nothing is asked. Logits are (B, T, V), or (B, 1, V) with last_only. The loss
        is a float32 scalar, the mean or sum of -ln p(target) over the targets asked for; or with reduction='none',
        (B, T) float32, those terms themselves, without a gradient.
        cache: a KVCache with the tokens before idx; it takes up those of idx as well.
        positions (B, T) int64 and mask (B, 1, T, T) bool, who sees whom, are for rows that are not simply one text.
        Raises ValueError if the tokens do not fit into block_size.
        """
        x = self.hidden(idx, cache, positions, mask)
        if targets is None:
            return self.lm_head(x[:, -1:] if last_only else x), None
        return None, self.loss(x, targets, reduction)

    def hidden(self, idx: torch.Tensor, cache: KVCache | None = None, positions: torch.Tensor | None = None,
               mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the output layer reads, (B, T, C), for the arguments of forward()."""
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if positions is None and start + T > self.config.block_size:
            raise ValueError(f'{start + T} tokens do not fit into block_size {self.config.block_size}')
        if mask is None and cache is None and self.config.document_token >= 0:
            document = (idx == self.config.document_token).cumsum(1)        # (B, T) which one of its row each is in
            mask = (document[:, :, None] == document[:, None, :]).tril().unsqueeze(1)       # (B, 1, T, T)

        x = self.transformer.wte(idx)                                        # (B, T, C)
        where, rope = slice(start, start + T) if positions is None else positions, None
        if self.config.position == 'learned':
            x = x + self.transformer.wpe.weight[where]                       # (T, C), the same for every row
        else:
            rope = [table[where].to(self._dtype(x)) for table in (self.rope_cos, self.rope_sin)]     # (T or B, T, hs/2)
        x = dropout(x, self.config.dropout) if self.training else x
        for block in self.transformer.h:
            x = block(x, rope, cache, mask)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def loss(self, x: torch.Tensor, targets: torch.Tensor, reduction: str = 'mean') -> torch.Tensor:
        """The loss of the hidden states x (B, T, C) against targets; see forward()."""
        B, T, C = x.shape
        x, wanted = x.view(B * T, C), targets.reshape(-1)
        if reduction == 'none':
            with torch.no_grad():
                return token_losses(x, self.lm_head, wanted).view(B, T)
        dtype = self._dtype(x)
        if x.device.type == 'cpu' and not torch.compiler.is_compiling() and (wanted < 0).any():
            # rows that nothing is asked of cost time; but each new number of rows does, too, and memory: oneDNN makes,
            # and keeps, a product for it. So it is a multiple of 256
            asked = (wanted < 0).sort(stable=True).indices[:256 * math.ceil(int((wanted >= 0).sum()) / 256)]
            x, wanted = x[asked], wanted[asked]
        with torch.autocast(x.device.type, enabled=False):
            if torch.compiler.is_compiling():       # which fuses this, so that the logits are in memory in `dtype` only
                logits = (x.to(dtype) @ self.lm_head.weight.to(dtype).t()).float()
                loss = F.cross_entropy(logits, wanted, ignore_index=-100, reduction='sum')
            else:
                loss = LinearCrossEntropy.apply(x, self.lm_head.weight, wanted, dtype, torch.is_grad_enabled())
        return loss / (targets >= 0).sum() if reduction == 'mean' else loss

    @staticmethod
    def _dtype(x):
        """The dtype of matrix products with x: autocast's, or its own."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    @classmethod
    def from_pretrained(cls, name: str, **changes) -> 'GPT':
        """The model `name`, float32, on the CPU, in evaluation mode: gpt2, gpt2-medium, gpt2-large, gpt2-xl, an
        owner/name on the Hugging Face hub, or a folder as `transformers` saves it. GPT-2 and Llama-class models.

        changes: GPTConfig's arguments, such as dropout=0.1. Raises UserError for a model that this class is not.
        """
        from huggingface import read_model
        args, weights, *_ = read_model(name)
        model = cls(GPTConfig(**{**args, **changes}))
        model.load_state_dict(weights)
        return model.eval()

    # -------------------------------------------------------------------------
    # size and cost

    def num_params(self, non_embedding: bool = False) -> int:
        """How many parameters; non_embedding leaves out those that are looked up and multiply nothing."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= self.transformer.wpe.weight.numel() if self.config.position == 'learned' else 0
            n -= 0 if self.config.tie_weights else self.transformer.wte.weight.numel()
        return n

    def flops_per_token(self) -> int:
        """Floating-point operations of training on one token, forward and backward: 6N + 12 * layers * C * T.

        PaLM (Chowdhery et al. 2022), appendix B: 2 a parameter forwards, 4 backwards, and the attention products.
        Of the 4, those 2 that lead to a weight's own gradient are spared where adapters are trained in its place.
        """
        c, n = self.config, self.num_params(non_embedding=True)
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad) if c.lora_rank else n
        return 4 * n + 2 * trained + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, for instance of published weights, to `block_size` tokens. Raises ValueError."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size {block_size} is more than the {self.config.block_size} this model was made '
                             'with; it can only be cropped')
        self.config.block_size = block_size
        if self.config.position == 'learned':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())
            self.transformer.wpe.num_embeddings = block_size
        else:
            self.rope_cos, self.rope_sin = self.rope_cos[:block_size], self.rope_sin[:block_size]

    def model_args(self) -> dict:
        """The config as a dict of numbers and strings, for a checkpoint."""
        return asdict(self.config)

    # -------------------------------------------------------------------------
    # training

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, optimizer: str = 'adamw', zero: bool = False,
                             verbose: bool = True) -> list[torch.optim.Optimizer]:
        """[AdamW], or with optimizer='muon' [AdamW, Muon], Muon for the blocks' matrices.

        Weight decay is for tensors of two dimensions and more. zero: each process of the group keeps the optimizer's
        state for its part of the tensors only (ZeRO stage 1, Rajbhandari et al. 2020).
        """
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decay = {name: p for name, p in params.items() if p.dim() >= 2}
        rest = [p for p in params.values() if p.dim() < 2]
        fused = device_type in ('cuda', 'cpu', 'mps')
        if verbose:
            print(f'num decayed parameter tensors: {len(decay)}, with {sum(p.numel() for p in decay.values()):,} '
                  'parameters')
            print(f'num non-decayed parameter tensors: {len(rest)}, with {sum(p.numel() for p in rest):,} parameters')
            print(f'using fused AdamW: {fused}')
        hidden = [p for name, p in decay.items() if optimizer == 'muon' and name.startswith('transformer.h.')]
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f'optimizer {optimizer!r} is not one of adamw, muon')
        others = [p for name, p in decay.items() if not (hidden and name.startswith('transformer.h.'))]
        groups = [{'params': others, 'weight_decay': weight_decay}, {'params': rest, 'weight_decay': 0.0}]
        groups = [group for group in groups if group['params']]     # adapters are all matrices, and all in blocks

        def build(kind, params, **options):
            if zero:
                from torch.distributed.optim import ZeroRedundancyOptimizer
                return ZeroRedundancyOptimizer(params, optimizer_class=kind, **options)
            return kind(params, **options)

        optimizers = []
        if groups:
            optimizers.append(build(torch.optim.AdamW, groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused))
        if hidden:
            optimizers.append(build(Muon, hidden, lr=learning_rate, weight_decay=weight_decay))
            if verbose:
                print(f'using Muon: {len(hidden)} tensors, with {sum(p.numel() for p in hidden):,} parameters')
        return optimizers

    # -------------------------------------------------------------------------
    # decoding

    @torch.inference_mode()
    def stream(self, idx: torch.Tensor, lengths: list[int], max_new_tokens: int, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0, eot: int | None = None,
               n_vocab: int | None = None, suppress: Iterable[int] = (), suppress_first: Iterable[int] = (),
               generator: torch.Generator | None = None,
               use_cache: bool = True) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Continue several prompts, one token a step. Yields (tokens, fresh), each (B,): the next token of each row,
        and which rows were not done before it.

        idx: (B, T) int64, prompts on the left, anything behind them. lengths: B prompt lengths, each at least 1.
        temperature 0 takes the likeliest token. top_k 0 and top_p 1 leave all. eot: the token that ends a row.
        n_vocab: sample only ids below it. suppress: ids that are never sampled; suppress_first: not as a row's first.
        use_cache=False recomputes everything, for comparison. A row that grows past block_size goes on with its last
        block_size tokens.
        """
        B, device, block_size = len(idx), idx.device, self.config.block_size
        lengths = [int(length) for length in lengths]
        prompt = max(lengths)
        tokens = idx.new_zeros(B, prompt + max_new_tokens)
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        for b, length in enumerate(lengths):        # all prompts end in one column, with padding before short ones
            tokens[b, prompt - length:prompt] = idx[b, :length]
            seen[b, idx[b, :length]] = True
        padding = prompt - torch.tensor(lengths, device=device) if min(lengths) < prompt else None          # (B,)
        alike = bool((tokens[:, :prompt] == tokens[:1, :prompt]).all()) and padding is None
        room = min(prompt + max_new_tokens, block_size)
        kept = torch.bfloat16 if isinstance(self.lm_head, Int8Linear) else None     # beside int8 weights: half as much
        cache = KVCache(self.config, B, room, kept) if use_cache else None
        done = torch.zeros(B, dtype=torch.bool, device=device)

        for n in range(prompt, prompt + max_new_tokens):        # columns that are known
            if n > block_size:          # the window slides, every position changes, and nothing cached holds any more
                cache = None
            first = cache.length if cache is not None else max(0, n - block_size)
            new = tokens[:1 if alike and n == prompt else B, first:n]           # one prompt of all rows is read once
            logits = self(new, cache=cache, last_only=True, **unpadded(padding, first, n, cache, block_size))[0]
            logits = logits[:, -1, :n_vocab].float().expand(B, -1)                      # (B, V)
            if repetition_penalty != 1.0:
                penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                repeated = seen[:, :n_vocab].clone()
                if eot is not None:
                    repeated[:, eot] = False        # it stands before every document; ending one is no repetition
                logits = torch.where(repeated, penalized, logits)
            banned = {*suppress, *(suppress_first if n == prompt else ())}
            if banned:
                logits = logits.index_fill(1, torch.tensor(sorted(banned), device=device), -math.inf)
            sampled = sample_next(logits, temperature, top_k, top_p, generator)
            tokens[:, n] = sampled
            if repetition_penalty != 1.0:
                seen.scatter_(1, sampled[:, None], True)
            yield sampled, ~done
            if eot is not None:
                done |= sampled == eot
                if done.all():
                    break

    def generate(self, idx: torch.Tensor, max_new_tokens: int, **options) -> torch.Tensor:
        """Prompts idx (B, T) int64, all of one length, with up to max_new_tokens more behind each: (B, T + more).

        The options are those of stream(). Rows that ended early are filled up with what would have followed.
        """
        columns = [tokens.clone() for tokens, _ in self.stream(idx, [idx.size(1)] * idx.size(0), max_new_tokens,
                                                               **options)]
        return torch.cat([idx, torch.stack(columns, dim=1)], dim=1) if columns else idx


def unpadded(padding: torch.Tensor | None, first: int, n: int, cache: KVCache | None, block_size: int) -> dict:
    """The arguments of GPT.forward that make the rows of columns first to n, of which the first padding[b] of row b is
    nothing, what they would be alone: each begins at position 0 and does not see it; {} if padding is None."""
    if padding is None:
        return {}
    begin = padding.clamp(min=n - block_size)[:, None]                          # (B, 1): each row's first column
    query = torch.arange(first, n, device=padding.device)                       # (T,)
    key = query if cache is None else torch.arange(n, device=padding.device)    # (S,)
    sees = (key >= begin)[:, None] & (key <= query[:, None]) | (key == query[:, None])      # padding sees itself
    return {'positions': (query - begin).clamp(min=0), 'mask': sees[:, None]}               # (B, T), (B, 1, T, S)


def sample_next(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                generator: torch.Generator | None = None) -> torch.Tensor:
    """The next token (B,) int64 for logits (B, V) float32, drawn from softmax(logits / temperature), cut to the top_k
    likeliest tokens and to the fewest whose probabilities add up to top_p (Holtzman et al. 2019), the one that crosses
    the threshold included. temperature 0, or so small that float32 cannot divide by it, takes the likeliest."""
    if temperature < 1e-6:
        return logits.max(dim=-1).indices           # the first of equal ones
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = torch.topk(logits, top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1.0:
        ordered, order = torch.sort(logits, dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p               # the probability of all likelier tokens
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)
