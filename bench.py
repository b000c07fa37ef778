"""How fast does a model of ours decode one text on this machine, in float32, bfloat16 and int8? And what do the
presets cost to train?

    python bench.py --preset=gpt2
    python bench.py --init_from=out/zh
    python bench.py --costs

The kinds take turns, several times, and the medians are printed: a busy machine slows all of them alike.
--costs prints the README's table. Its memory is counted on this machine, no GPU needed: the tensors that the forward
pass of one and two layers keeps for the backward pass. Its hours follow from the model FLOPs utilisation in `mfu`.
"""

import copy
import statistics
import time

from configurator import configure      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import build_model, pick_checkpoint
from device import PEAK_TFLOPS, pick_device
from model import GPT, PRESETS, GPTConfig
from quantize import to_int8

# -----------------------------------------------------------------------------
init_from = ''              # a checkpoint, or a published model; '' = one of the preset's shape with random weights
preset = 'gpt2'             # the shape: one of model.PRESETS
prompt_tokens = 16          # tokens in the prompt
new_tokens = 32             # tokens decoded in a turn
turns = 5                   # how often each kind has its turn
device = 'cpu'              # auto, cpu, cuda, mps
# what training costs
costs = False               # print what each GPT-2 preset costs to train, and nothing else
tokens = 10e9               # tokens to train on
mfu = 0.4                   # the part of the GPU's peak that is reached; 0.4 is usual, and an assumption
memory = 80e9               # bytes of the GPU's memory
config = configure(globals(), negative=False, one_of={'preset': PRESETS}, at_least={'new_tokens': 1, 'turns': 1})
# -----------------------------------------------------------------------------


def decoding_speed():
    torch.manual_seed(0)
    if init_from:
        path, checkpoint = pick_checkpoint(init_from, init_from)
        model = build_model(checkpoint, path)
    else:
        model = GPT(GPTConfig(**PRESETS[preset])).eval()
    print(f'{model.num_params():,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}')
    chosen = pick_device(device)
    models = {'float32': model, 'bfloat16': copy.deepcopy(model).to(torch.bfloat16),
              'int8': to_int8(copy.deepcopy(model))}
    models = {kind: m.to(chosen) for kind, m in models.items()}
    idx = torch.randint(model.config.vocab_size, (1, prompt_tokens), device=chosen)
    rates = {kind: [] for kind in models}
    for turn in range(turns + 1):
        for kind, m in models.items():
            start = time.perf_counter()
            m.generate(idx, new_tokens, temperature=0)[0, -1].item()
            if turn:                                # the first turn warms up
                rates[kind].append(new_tokens / (time.perf_counter() - start))
    base = statistics.median(rates['float32'])
    for kind, rate in rates.items():
        print(f'{kind:9} {statistics.median(rate):8.1f} tokens/s, {statistics.median(rate) / base:.2f} times float32 '
              f'({min(rate):.1f} to {max(rate):.1f})')


def saved_bytes(shape, n_layer, batch_size):
    """Bytes that a forward pass in bfloat16 keeps for the backward pass, parameters left out, of a tiny vocabulary."""
    model = GPT(GPTConfig(**{**shape, 'n_layer': n_layer, 'vocab_size': 64}))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage          # alive, so that no other gets its address
        return tensor

    idx = torch.zeros(batch_size, shape['block_size'], dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast('cpu', torch.bfloat16):
        model(idx, idx)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


def training_bytes(shape):
    """(bytes, bytes a sequence) that training in bfloat16 needs on one GPU, without torch.compile, which needs less.

    18 a parameter: the weight, its gradient and AdamW's two moments in float32, a copy of the weight in bfloat16; once
    more the gradient of the output layer, and the slices of logits beside it, see LinearCrossEntropy. And for each
    sequence what its forward pass keeps; copies of weights, which do not grow with the batch, cancel out.
    """
    def of_a_sequence(n_layer):
        return saved_bytes(shape, n_layer, 2) - saved_bytes(shape, n_layer, 1)

    one, two = of_a_sequence(1), of_a_sequence(2)
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
    fixed = 18 * model.num_params() + 4 * model.lm_head.weight.numel() + 12 * (1 << 28)
    return fixed, one + (shape['n_layer'] - 1) * (two - one)


def training_costs():
    peak = 1e12 * PEAK_TFLOPS['H100'][0]
    print(f'| preset | parameters | GFLOP per token | micro-batch and its memory | 1 GPU | 8 GPUs |\n{"|---" * 6}|')
    for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
        shape = PRESETS[name]
        with torch.device('meta'):
            model = GPT(GPTConfig(**shape))
        fixed, sequence = training_bytes(shape)
        batch_size = 64
        while batch_size > 1 and fixed + batch_size * sequence > 0.75 * memory:      # room for what is not counted
            batch_size //= 2
        hours = model.flops_per_token() * tokens / (peak * mfu) / 3600
        print(f'| {name} | {model.num_params():,} | {model.flops_per_token() / 1e9:.2f} | {batch_size} x '
              f'{shape["block_size"]}: {(fixed + batch_size * sequence) / 1e9:.0f} GB | {hours:.1f} h | '
              f'{hours / 8:.1f} h |')
    print(f'\n{tokens / 1e9:g}B tokens, H100 or H200 ({peak / 1e12:.0f} TFLOP/s in bfloat16) at {mfu:.0%} MFU, '
          f'{memory / 1e9:g} GB')


def main():
    if costs:
        training_costs()
    else:
        decoding_speed()


if __name__ == '__main__':
    main()
