"""How much slower are training steps beside another program that keeps one core busy, with the spinning that
configurator.py asks OpenMP for, and as OpenMP does by itself? Needs a quiet machine, and some minutes.

    python tests/stress/busy_trial.py 0.8M 3            which shape, how many rounds
"""
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {      # of the model; sequences in a step; steps; dtype
    '0.8M': (dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, bias=False), 12, 150, 'float32'),
    '3.8M': (dict(n_layer=4, n_head=4, n_embd=256, block_size=128, vocab_size=2496, norm='rmsnorm', position='rope',
                  mlp='relu2'), 16, 25, 'float32'),
    '10.6M': (dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False), 4, 10, 'float32'),
    '124M': (dict(n_layer=12, n_head=12, n_embd=768, block_size=256, vocab_size=50304), 1, 8, 'float32'),
}
STEPS = '''
import statistics, sys, time
sys.path.insert(0, sys.argv[1])
import configurator
import torch
from device import autocast
from model import GPT, GPTConfig
shape, batch_size, steps, dtype = eval(sys.argv[2])
torch.manual_seed(0)
model = GPT(GPTConfig(**shape))
optimizer, = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu', verbose=False)
x, y = torch.randint(shape['vocab_size'], (2, batch_size, shape['block_size']))
times = []
for _ in range(3 + steps):
    start = time.perf_counter()
    with autocast('cpu', dtype):
        model(x, y)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
print(1000 * statistics.mean(times[3:]))
'''
WAYS = {'as it is': {}, 'default': {'GOMP_SPINCOUNT': '300000'}, 'no spin': {'GOMP_SPINCOUNT': '0'}}

name, rounds = sys.argv[1], int(sys.argv[2])
figures = {(way, others): [] for way in WAYS for others in (0, 1)}
clean = {key: value for key, value in os.environ.items() if not key.startswith(('OMP_', 'GOMP_'))}
for _ in range(rounds):
    for way, others in figures:
        busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(others)]
        try:
            done = subprocess.run([sys.executable, '-c', STEPS, str(ROOT), repr(SHAPES[name])],
                                  env={**clean, **WAYS[way]}, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        figures[way, others].append(float(done.stdout))
alone = statistics.median(figures['default', 0])
for (way, others), found in figures.items():
    print(f'{name} {way:9} {"beside one program" if others else "alone":18} {statistics.median(found):8.1f} ms a step, '
          f'{statistics.median(found) / alone:.2f} times the default alone')
