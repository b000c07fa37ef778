"""How fast does a model of ours train and decode on this machine? And what do the presets cost to train?

    python bench.py --device=cuda                   training, and decoding one text in each precision
    python bench.py --preset=gpt2                   on the CPU: decoding, in float32, bfloat16 and int8
    python bench.py --init_from=out/zh --batch_size=32
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
from device import PEAK_TFLOPS, autocast, peak_flops, pick_compile, pick_device, pick_dtype, synchronize
from model import GPT, PRESETS, GPTConfig, for_any_shape
from quantize import to_int8

# -----------------------------------------------------------------------------
init_from = ''              # a checkpoint, or a published model; '' = one of the preset's shape with random weights
preset = 'gpt2'             # the shape: one of model.PRESETS
prompt_tokens = 16          # tokens in the prompt
new_tokens = 32             # tokens decoded in a turn
batch_size = 0              # sequences in a step of training; 0 = on a GPU as many as fit, on a CPU no training
turns = 5                   # how often each kind has its turn
device = 'cpu'              # auto, cpu, cuda, mps
dtype = 'auto'              # of training: auto, float32, bfloat16, float16
compile = 'auto'            # of training: auto (on a GPU), true, false
# what training costs
costs = False               # print what each GPT-2 preset costs to train, and nothing else
tokens = 10e9               # tokens to train on
mfu = 0.4                   # the part of the GPU's peak that is reached; 0.4 is usual, and an assumption
memory = 80e9               # bytes of the GPU's memory
config = configure(globals(), negative=False, one_of={'preset': PRESETS}, at_least={'new_tokens': 1, 'turns': 1})
# -----------------------------------------------------------------------------


def build():
    """The model that is measured, on the CPU."""
    torch.manual_seed(0)
    if init_from:
        path, checkpoint = pick_checkpoint(init_from, init_from)
        return build_model(checkpoint, path)
    return GPT(GPTConfig(**PRESETS[preset])).eval()


def training_speed(model, here, size):
    """Print the median speed of steps of training on `size` random sequences."""
    precision, compiling = pick_dtype(dtype, here), pick_compile(compile, here)
    on_gpu = torch.device(here).type == 'cuda'
    if on_gpu:
        torch.set_float32_matmul_precision('high')
        torch.cuda.reset_peak_memory_stats(here)
    model = copy.deepcopy(model).to(here).train()
    optimizer, = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), torch.device(here).type, verbose=False)
    run = torch.compile(model) if compiling else model
    idx = torch.randint(model.config.vocab_size, (size, model.config.block_size + 1), device=here)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    times = []
    for _ in range(3 + turns):                      # the first three warm up, and compile
        synchronize(here)
        start = time.perf_counter()
        with autocast(here, precision):
            run(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(here)
        times.append(time.perf_counter() - start)
    rate = x.numel() / statistics.median(times[3:])
    mfu = rate * model.flops_per_token() / peak_flops(here, precision)
    memory = f', {torch.cuda.max_memory_allocated(here) / 1e9:.1f} GB' if on_gpu else ''
    print(f'training  {rate:10,.0f} tokens/s, {mfu:.1%} MFU{memory}: {size} x {model.config.block_size} tokens, '
          f'{precision}, compile: {compiling}')


def train_on_what_fits(model, here):
    """training_speed() on 64 sequences, or half as many, and so on."""
    size = batch_size or 64
    while True:
        try:
            return training_speed(model, here, size)
        except RuntimeError as e:
            if batch_size or size == 1 or 'out of memory' not in str(e):
                raise
        size //= 2                                  # outside the handler, which keeps the tensors alive
        torch.accelerator.empty_cache()
        torch.compiler.reset()                      # or else it would compile for any size


def decoding_speed(model, here):
    """Print the median speeds of decoding one text greedily, in several precisions."""
    models = {'float32': model, 'bfloat16': copy.deepcopy(model).to(torch.bfloat16)}
    if here == 'cpu':
        models['int8'] = to_int8(copy.deepcopy(model))
    models = {kind: m.to(here) for kind, m in models.items()}
    idx = torch.randint(model.config.vocab_size, (1, prompt_tokens), device=here)
    rates = {kind: [] for kind in models}
    for turn in range(turns + 1):
        for kind, m in models.items():
            start = time.perf_counter()
            for_any_shape(m.generate)(idx, new_tokens, temperature=0)[0, -1].item()
            if turn:                                # the first turn warms up
                rates[kind].append(new_tokens / (time.perf_counter() - start))
    base = statistics.median(rates['float32'])
    for kind, rate in rates.items():
        print(f'{kind:9} {statistics.median(rate):10,.1f} tokens/s, {statistics.median(rate) / base:.2f} times float32 '
              f'({min(rate):,.1f} to {max(rate):,.1f})')


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
    """(bytes, bytes a sequence) that training in bfloat16 needs on one GPU.

    18 a parameter: the weight, its gradient and AdamW's two moments in float32, a copy of the weight in bfloat16. And
    for each sequence what its forward pass keeps, of which torch.compile needs less, and its logits and their gradient
    in bfloat16; copies of weights, which do not grow with the batch, cancel out.
    """
    def of_a_sequence(n_layer):
        return saved_bytes(shape, n_layer, 2) - saved_bytes(shape, n_layer, 1)

    one, two = of_a_sequence(1), of_a_sequence(2)
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
    logits = 4 * shape['block_size'] * model.config.vocab_size
    return 18 * model.num_params(), one + (shape['n_layer'] - 1) * (two - one) + logits


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
        return training_costs()
    here, model = pick_device(device), build()
    print(f'{model.num_params():,} parameters, {here}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    if here != 'cpu' or batch_size:
        train_on_what_fits(model, here)
    decoding_speed(model, here)


if __name__ == '__main__':
    main()
