"""How fast does a model of ours decode one text on this machine, in float32, bfloat16 and int8?

    python bench.py --preset=gpt2
    python bench.py --init_from=out/zh

The kinds take turns, several times, and the medians are printed: a busy machine slows all of them alike.
"""

import copy
import statistics
import time

import torch

from checkpoint import build_model, pick_checkpoint
from configurator import UserError, configure
from device import pick_device
from model import GPT, PRESETS, GPTConfig
from quantize import to_int8

# -----------------------------------------------------------------------------
init_from = ''              # a checkpoint file or folder; '' = a model of the preset's shape with random weights
preset = 'gpt2'             # the shape: one of model.PRESETS
prompt_tokens = 16          # tokens in the prompt
new_tokens = 32             # tokens decoded in a turn
turns = 5                   # how often each kind has its turn
device = 'cpu'              # auto, cpu, cuda, mps
config = configure(globals())
# -----------------------------------------------------------------------------


def main():
    if preset not in PRESETS:
        raise UserError(f'there is no preset {preset!r}; choose one of {", ".join(PRESETS)}')
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


if __name__ == '__main__':
    main()
