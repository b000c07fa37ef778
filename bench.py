"""How fast does this train, decode and evaluate on this machine, beside what you would use instead?

    python bench.py --what=train                    the same model and batch, in a plain GPT script and here
    python bench.py --what=decode                   GPT-2 124M in transformers and here; --gguf=FILE: llama.cpp, too
    python bench.py --what=hellaswag                questions a second, one ending a pass, and here
    python bench.py --what=tokenize                 100 MB of text to GPT-2's tokens on disk, in a plain pool, and here
    python bench.py --what=memory                   the most memory that a step of GPT-2 124M needs, of 4 x 1,024 tokens
    python bench.py --what=busy                     a training step beside another program that keeps a core busy
    python bench.py --what=shakespeare              nanoGPT's recipe for a CPU to its loss, in a plain script, and here
    python bench.py --what=all --json=figures.json
    python bench.py --device=cuda                   ours alone: the largest batch that fits, decoding in each precision
    python bench.py --preset=gpt2                   ours alone on a CPU: decoding, in float32, bfloat16 and int8
    python bench.py --costs

Contestants are processes of their own that take turns; the medians are printed, each with its ratio to the first, and
the share it has of the limit: of the matrix products that this machine can do a second (MFU), or of the bytes that it
can read from memory (MBU), both measured in the same run. Look at the load first: one other busy process makes
everything several times slower. --costs prints the README's table; its memory is counted, no GPU needed: the tensors
that the forward pass of one and two layers keeps for the backward pass. Its hours follow from `mfu`.
"""

import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from json import dumps, loads
from pathlib import Path
from pydoc_data.topics import topics

from configurator import UserError, configure       # first: from here on, Ctrl-C is quiet

import torch

import hellaswag
from checkpoint import build_model, pick_checkpoint
from dataset import find_dataset
from device import DTYPES, PEAK_TFLOPS, autocast, peak_flops, pick_compile, pick_device, pick_dtype
from files import write_text_atomically
from layers import to_int8
from model import GPT, PRESETS, GPTConfig, for_any_shape
from peers import run_to_its_end, serve, timed

# -----------------------------------------------------------------------------
what = ''                   # train, decode, hellaswag, memory, busy, tokenize, shakespeare, or all; '' = ours alone
json = ''                   # also write the figures to this file
sizes = '0.8M,3.4M,10.6M,124M'      # the models of train and busy
gguf = ''                   # a GGUF file of a model like SmolLM2-135M, for llama.cpp (ik-llama-cpp-python) to decode
profile = False             # print the ten costliest operators of a step of training, for each of `sizes`
turns = 5                   # how often each contestant has its turn
threads = 0                 # of each contestant; 0 = as many as there are cores
prompt_tokens = 16          # tokens in the prompt
new_tokens = 64             # tokens decoded in a turn
compile = 'auto'            # of training: auto (on a GPU), true, false
# ours alone
init_from = ''              # a checkpoint, or a published model; '' = one of the preset's shape with random weights
preset = 'gpt2'             # the shape: one of model.PRESETS
batch_size = 0              # sequences in a step of training; 0 = on a GPU as many as fit, on a CPU no training
device = 'cpu'              # auto, cpu, cuda, mps
dtype = 'auto'              # of training: auto, float32, bfloat16, float16
# what training costs
costs = False               # print what each GPT-2 preset costs to train, and nothing else
tokens = 10e9               # tokens to train on
mfu = 0.4                   # the part of the GPU's peak that is reached; 0.4 is usual, and an assumption
memory = 80e9               # bytes of the GPU's memory
contestant = ''             # what this process is, when bench.py starts itself
config = configure(globals(), negative=False, at_least={'new_tokens': 1, 'turns': 1}, one_of={
    'preset': PRESETS,
    'what': ('', 'train', 'decode', 'hellaswag', 'memory', 'busy', 'tokenize', 'shakespeare', 'all')})
# -----------------------------------------------------------------------------

# the models of train and busy, as the plain script knows them too; sequences in a step; steps in a turn
SIZES = {
    '0.8M': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12, 40),
    '3.4M': (dict(n_layer=4, n_head=4, n_embd=256, block_size=128, vocab_size=824), 16, 10),
    '10.6M': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 16, 2),
    '124M': (dict(n_layer=12, n_head=12, n_embd=768, block_size=256, vocab_size=50304), 2, 1),
}
SHAKESPEARE_STEPS = 185     # of train_shakespeare_char_cpu.py, to nanoGPT's loss on a CPU
KINDS = {'float32': 4, 'bfloat16': 2, 'int8': 1}     # bytes of a weight
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
SMOLLM2 = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536, block_size=2048, vocab_size=49152,
               norm='rmsnorm', position='rope', mlp='swiglu', bias=False)
PLAINLY = dict(bias=False, mlp='gelu_erf')          # what the plain script's models are, too


# -----------------------------------------------------------------------------
# ours: each returns a function that has a turn, and returns how much it did a second; shape None: the model of `preset`

def build(shape: dict | None) -> GPT:
    """The model that is measured, on the CPU."""
    torch.manual_seed(0)
    if shape is None and init_from:
        path, checkpoint = pick_checkpoint(init_from, init_from)
        return build_model(checkpoint, path)
    return GPT(GPTConfig(**(shape or PRESETS[preset]))).eval()


def training(shape: dict | None, batch_size: int, steps: int, precision: str, compiling: bool = False,
             here: str = 'cpu') -> Callable[[], float]:
    """Tokens a second of training on random sequences."""
    if torch.device(here).type == 'cuda':
        torch.set_float32_matmul_precision('high')
    model = build(shape).to(here).train()
    optimizer, = model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), torch.device(here).type, verbose=False)
    run = torch.compile(model) if compiling else model
    idx = torch.randint(model.config.vocab_size, (batch_size, model.config.block_size + 1), device=here)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()

    def work():
        for _ in range(steps):
            with autocast(here, precision):
                loss = run(x, y)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()                             # which waits for a GPU, too
    return timed(work, steps * x.numel())


def decoding(shape: dict | None, n_prompts: int, kind: str, here: str = 'cpu') -> Callable[[], float]:
    """Tokens a second of greedy decoding. kind: float32, bfloat16 or int8."""
    model = build(shape)
    if kind == 'int8':
        to_int8(model)
    model.to(here, DTYPES.get(kind))
    idx = torch.randint(model.config.vocab_size, (n_prompts, prompt_tokens), device=here)
    generate = for_any_shape(model.generate)
    return timed(lambda: generate(idx, new_tokens, temperature=0)[0, -1].item(), n_prompts * new_tokens)


def answering(shape: dict | None, questions: list, precision: str) -> Callable[[], float]:
    """HellaSwag questions a second. questions: [(tokens of the context, [tokens of each ending])]."""
    model = build(shape)
    asked = [hellaswag.Question(tuple(context), tuple(map(tuple, endings)), 0, {}) for context, endings in questions]

    def work():
        with autocast('cpu', precision):
            hellaswag.evaluate(model, asked)
    return timed(work, len(asked))


def tokenizing(path: str, workers: int) -> Callable[[], float]:
    """Megabytes a second from a .jsonl file to shards on disk."""
    def work():
        with tempfile.TemporaryDirectory() as folder:
            run_to_its_end([sys.executable, str(Path(__file__).with_name('fineweb.py')), f'--input={path}',
                            f'--out={folder}/made', f'--workers={workers}'])
    return timed(work, Path(path).stat().st_size / 1e6)


def shakespeare(folder: str, steps: int) -> Callable[[], float]:
    """Times an hour that the recipe for a CPU, cut to `steps`, reaches nanoGPT's loss there, start-up not counted."""
    def turn():
        with tempfile.TemporaryDirectory() as out:
            run_to_its_end([sys.executable, str(Path(__file__).with_name('train.py')),
                            str(Path(__file__).parent / 'config/train_shakespeare_char_cpu.py'), f'--dataset={folder}',
                            f'--out_dir={out}/run', f'--max_steps={steps}', '--eval_interval=0', '--log_interval=1'])
            rows = [loads(line) for line in Path(out, 'run/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
        if rows[-1]['val_loss'] > 1.8857:
            raise SystemExit(f'it only came to {rows[-1]["val_loss"]:.4f}')
        return 3600 / rows[-2]['elapsed_s']
    return turn


# -----------------------------------------------------------------------------
# side by side

def ours(function: str, **arguments) -> list[str]:
    return [__file__, f'--contestant={dumps([function, arguments])}', f'--prompt_tokens={prompt_tokens}',
            f'--new_tokens={new_tokens}']


def peers(function: str, **arguments) -> list[str]:
    return [str(Path(__file__).with_name('peers.py')), function, dumps(arguments)]


def contest(title: str, unit: str, contestants: dict[str, list[str]],
            limits: dict[str, tuple[str, float]] | None = None, turns: int = turns) -> dict[str, dict]:
    """Let contestants, {name: command}, take turns, print how they compare, and return {name: figures}.

    limits: {name: (what a share of the limit is called, the limit)}.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ('GOMP_SPINCOUNT', 'THP_MEM_ALLOC_ENABLE')}
    environment['OMP_NUM_THREADS'] = str(threads or os.cpu_count())     # what our settings did to our own is undone
    running, rates, figures = {}, {name: [] for name in contestants}, {}
    with ExitStack() as stack:
        for name, command in contestants.items():
            errors = stack.enter_context(tempfile.TemporaryFile('w+', encoding='utf-8'))
            process = subprocess.Popen([sys.executable, *command], env=environment, text=True, stderr=errors,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running[name] = process, errors
        for turn in range(turns + 1):               # the first, which warms up, begins by itself
            for name, (process, errors) in list(running.items()):
                if turn:
                    print(file=process.stdin, flush=True)
                line = process.stdout.readline()
                if not line:
                    process.wait()
                    errors.seek(0)
                    print(f'{title}: without {name}: {(errors.read().strip() or "it ended").splitlines()[-1][:200]}')
                    del running[name]
                    figures.pop(name, None)
                elif turn:
                    figures[name] = loads(line)
                    rates[name].append(figures[name]['rate'])
    if not running:
        raise UserError(f'{title}: nobody could start')
    base = statistics.median(rates[next(iter(running))])
    for name in running:
        rate = statistics.median(rates[name])
        figures[name].update(rate=rate, lowest=min(rates[name]), highest=max(rates[name]), ratio=rate / base, unit=unit)
        share = ''
        if limits and name in limits:
            called, limit = limits[name]
            figures[name][called] = rate / limit
            share = f', {rate / limit:.1%} {called}'
        print(f'{title:22} {name:24} {rate:10,.1f} {unit}, {rate / base:.2f} times ({min(rates[name]):,.1f} to '
              f'{max(rates[name]):,.1f}){share}', flush=True)
    return figures


def train_side_by_side(size: str) -> dict[str, dict]:
    shape, batch, steps = SIZES[size]
    precision = pick_dtype(dtype, 'cpu')
    limit = peak_flops('cpu', precision) / build({**shape, **PLAINLY}).flops_per_token()
    contestants = {'plain script, float32': peers('plain_training', shape=shape, batch_size=batch, steps=steps)}
    for compiling in (False, True) if compile == 'true' else (False,):
        name = f'ours, {precision}{", compiled" * compiling}'
        contestants[name] = ours('training', shape={**shape, **PLAINLY}, batch_size=batch, steps=steps,
                                 precision=precision, compiling=compiling)
    return contest(f'training {size}', 'tokens/s', contestants,
                   {name: ('MFU', limit) for name in contestants if name.startswith('ours')})


def decode_side_by_side(n_prompts: int) -> dict[str, dict]:
    weights = build(GPT2).num_params()
    bandwidth = memory_bandwidth()
    contestants = {f'transformers, {kind}': peers('transformers_decoding', shape=GPT2, n_prompts=n_prompts, dtype=kind,
                                                  prompt_tokens=prompt_tokens, new_tokens=new_tokens)
                   for kind in ('float32', 'bfloat16')}
    contestants |= {f'ours, {kind}': ours('decoding', shape=GPT2, n_prompts=n_prompts, kind=kind) for kind in KINDS}
    limits = {f'ours, {kind}': ('MBU', n_prompts * bandwidth / (weights * size)) for kind, size in KINDS.items()}
    return contest(f'decoding 124M, {n_prompts} at once', 'tokens/s', contestants, limits)


def decode_beside_llama_cpp() -> dict[str, dict]:
    n = threads or os.cpu_count()
    contestants = {'llama.cpp': peers('llama_cpp_decoding', gguf=gguf, prompt_tokens=prompt_tokens,
                                      new_tokens=new_tokens, threads=n)}
    limit = memory_bandwidth() / build(SMOLLM2).num_params()
    contestants |= {f'ours, {kind}': ours('decoding', shape=SMOLLM2, n_prompts=1, kind=kind) for kind in KINDS}
    return contest('decoding 135M', 'tokens/s', contestants,
                   {f'ours, {kind}': ('MBU', limit / size) for kind, size in KINDS.items()})


def hellaswag_side_by_side() -> dict[str, dict]:
    draw = random.Random(0)         # of the lengths that the questions have: 40 tokens and then 4 times 25, on average

    def text(low, high):
        return [draw.randrange(50257) for _ in range(draw.randint(low, high))]
    questions = [(text(10, 70), [text(10, 40) for _ in range(4)]) for _ in range(16)]
    contestants = {'one ending a pass': peers('plain_hellaswag', shape=GPT2, questions=questions)}
    contestants |= {f'ours, {kind}': ours('answering', shape=GPT2, questions=questions, precision=kind)
                    for kind in dict.fromkeys(['float32', pick_dtype(dtype, 'cpu')])}
    return contest('HellaSwag 124M', 'questions/s', contestants)


def tokenize_side_by_side(megabytes: float = 100) -> dict[str, dict]:
    text, n = '\n'.join(topics.values()), threads or os.cpu_count()        # Python's own help texts, over and over
    documents = [dumps({'text': text[i:i + 3500]}) for i in range(0, len(text), 3500)]      # as long as a web page
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'texts.jsonl')
        path.write_text('\n'.join(documents * (1 + int(1e6 * megabytes) // len(text))), encoding='utf-8')
        contestants = {f'{k} at a time in a pool': peers('plain_tokenizing', path=str(path), workers=n, at_a_time=k)
                       for k in (1, 16)}
        contestants['ours'] = ours('tokenizing', path=str(path), workers=n)
        return contest('tokenizing 100 MB', 'MB/s', contestants)


def shakespeare_side_by_side() -> dict[str, dict]:
    folder = str(find_dataset('shakespeare_char').resolve())
    return contest('Shakespeare to 1.8857', 'runs/hour', {
        "nanoGPT's recipe, plain": peers('plain_shakespeare', folder=folder),
        'ours': ours('shakespeare', folder=folder, steps=SHAKESPEARE_STEPS)})


def memory_side_by_side() -> dict[str, dict]:
    precision = pick_dtype(dtype, 'cpu')
    contestants = {'plain script': peers('plain_training', shape=GPT2, batch_size=4, steps=1),
                   'ours': ours('training', shape={**GPT2, **PLAINLY}, batch_size=4, steps=1, precision=precision)}
    figures = contest('training 124M, 4x1024', 'tokens/s', contestants, turns=1)
    base = figures.get('plain script', {}).get('gigabytes') or 1       # it may not have found the room
    for name, figure in figures.items():
        figure['memory_ratio'] = figure['gigabytes'] / base
        print(f'{"memory of that":22} {name:24} {figure["gigabytes"]:10.2f} GB, {figure["memory_ratio"]:.2f} times')
    return figures


def busy_side_by_side(size: str) -> dict[str, dict]:
    """Steps of training, alone and beside a program that keeps one core busy, with our settings and without."""
    shape, batch, steps = SIZES[size]
    command = ours('training', shape={**shape, **PLAINLY}, batch_size=batch, steps=steps,
                   precision=pick_dtype(dtype, 'cpu'))
    plain = peers('plain_training', shape=shape, batch_size=batch, steps=steps)
    found = {}
    for together in (False, True):
        with ExitStack() as stack:
            if together:
                other = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
                stack.callback(other.wait)
                stack.callback(other.kill)
            name = f'{size}, {"beside one" if together else "alone"}'
            found[name] = contest(name, 'tokens/s', {'plain script': plain, 'ours': command})
    alone, beside = found.values()
    for name in alone.keys() & beside.keys():
        alone[name]['slowdown'] = alone[name]['rate'] / beside[name]['rate']
        print(f'{"slower beside one":22} {name:24} {alone[name]["slowdown"]:10.2f} times')
    return found


def memory_bandwidth() -> float:
    """The bytes a second that a sum over 400 MB reads from memory, the best of some."""
    x = torch.ones(100_000_000)
    turn = timed(lambda: x.sum(), 4 * x.numel())
    return max(turn() for _ in range(9))


def print_profile(size: str) -> None:
    """The ten costliest operators of a step of training."""
    shape, batch, _ = SIZES[size]
    turn = training({**shape, **PLAINLY}, batch, 3, pick_dtype(dtype, 'cpu'))
    turn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        turn()
    print(f'{size}, three steps:')
    print(profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=10, max_name_column_width=40))


# -----------------------------------------------------------------------------
# ours alone, on any device

def train_on_what_fits(here: str) -> None:
    """Print the speed of training on batch_size sequences, or on 64, or half as many, and so on."""
    precision, compiling, size = pick_dtype(dtype, here), pick_compile(compile, here, 0), batch_size or 64
    on_gpu = torch.device(here).type == 'cuda'
    while True:
        try:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(here)
            turn = training(None, size, 1, precision, compiling, here)
            for _ in range(3):                      # to warm up, and to compile
                turn()
            rate = statistics.median(turn() for _ in range(turns))
            break
        except RuntimeError as e:
            if batch_size or size == 1 or 'out of memory' not in str(e):
                raise
        size //= 2                                  # outside the handler, which keeps the tensors alive
        torch.accelerator.empty_cache()
        torch.compiler.reset()                      # or else it would compile for any size
    model = build(None)
    share = rate * model.flops_per_token() / peak_flops(here, precision)
    used = f', {torch.cuda.max_memory_allocated(here) / 1e9:.1f} GB' if on_gpu else ''
    print(f'training  {rate:10,.0f} tokens/s, {share:.1%} MFU{used}: {size} x {model.config.block_size} tokens, '
          f'{precision}, compile: {compiling}')


def decode_in_each_precision(here: str) -> None:
    speeds = {kind: decoding(None, 1, kind, here) for kind in KINDS if kind != 'int8' or here == 'cpu'}
    rates = {kind: [] for kind in speeds}
    for n in range(turns + 1):
        for kind, turn in speeds.items():
            rate = turn()
            if n:                                   # the first turn warms up
                rates[kind].append(rate)
    base = statistics.median(rates['float32'])
    for kind, found in rates.items():
        print(f'{kind:9} {statistics.median(found):10,.1f} tokens/s, {statistics.median(found) / base:.2f} times '
              f'float32 ({min(found):,.1f} to {max(found):,.1f})')


# -----------------------------------------------------------------------------
# what training costs

def saved_bytes(shape: dict, n_layer: int, batch_size: int) -> int:
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


def training_bytes(shape: dict) -> tuple[int, int]:
    """(bytes, bytes a sequence) that training in bfloat16 needs on one GPU.

    18 a parameter: the weight, its gradient and AdamW's two moments in float32, a copy of the weight in bfloat16. And
    for each sequence what its forward pass keeps, of which torch.compile needs less, and its logits and their gradient
    in bfloat16; copies of weights, which do not grow with the batch, cancel out.
    """
    def of_a_sequence(n_layer):
        return saved_bytes(shape, n_layer, 4) - saved_bytes(shape, n_layer, 3)      # so many are made twice

    one, two = of_a_sequence(1), of_a_sequence(2)
    with torch.device('meta'):
        model = GPT(GPTConfig(**shape))
    logits = 4 * shape['block_size'] * model.config.vocab_size
    return 18 * model.num_params(), one + (shape['n_layer'] - 1) * (two - one) + logits


def training_costs() -> None:
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


def main() -> None:
    if contestant:
        pick_device('cpu')                          # as our scripts do, to share it well with others
        function, arguments = loads(contestant)
        kinds = {f.__name__: f for f in (training, decoding, answering, tokenizing, shakespeare)}
        return serve(kinds[function](**arguments))
    if costs:
        return training_costs()
    chosen = [size.strip() for size in sizes.split(',')]
    if unknown := [size for size in chosen if size not in SIZES]:
        raise UserError(f'sizes has {unknown[0]!r}; choose from {", ".join(SIZES)}')
    if profile:
        for size in chosen:
            print_profile(size)
        return
    if not what:
        here, model = pick_device(device), build(None)
        print(f'{model.num_params():,} parameters, {here}, {torch.get_num_threads()} threads, torch '
              f'{torch.__version__}')
        if here != 'cpu' or batch_size:
            train_on_what_fits(here)
        return decode_in_each_precision(here)

    load = f', load {os.getloadavg()[0]:.2f}' if hasattr(os, 'getloadavg') else ''
    print(f'{threads or os.cpu_count()} threads, torch {torch.__version__}, {platform.machine()}{load}')
    contests = {
        'train': lambda: {size: train_side_by_side(size) for size in chosen},
        'decode': lambda: {'1': decode_side_by_side(1), '8': decode_side_by_side(8),
                           **({'llama.cpp': decode_beside_llama_cpp()} if gguf else {})},
        'hellaswag': hellaswag_side_by_side,
        'memory': memory_side_by_side,
        'busy': lambda: {size: busy_side_by_side(size) for size in chosen},
        'tokenize': tokenize_side_by_side,
        'shakespeare': shakespeare_side_by_side,
    }
    figures = {}
    for name, run in contests.items():
        if what in (name, 'all'):
            figures[name] = run()
            if json:
                write_text_atomically(Path(json), dumps(figures, indent=1))


if __name__ == '__main__':
    main()
