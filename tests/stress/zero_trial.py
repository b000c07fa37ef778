"""How long does a checkpoint take whose optimizer state is divided over two processes? GPT-2 124M; 10 GB of memory.

    python tests/stress/zero_trial.py
"""
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from scripts import ROOT            # noqa: E402
from test_device import ZERO        # noqa: E402

from model import PRESETS           # noqa: E402

ratios = []
for _ in range(3):
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, 'zero.py')
        script.write_text(ZERO.format(root=str(ROOT), shape=PRESETS['gpt2'], steps=1, optimizer='adamw',
                                      out=f'{folder}/z.pt'), encoding='utf-8')
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                               script], text=True, capture_output=True)
        assert done.returncode == 0 and done.stdout.count('the same') == 2, done.stderr[-3000:]
        gathered, written = map(float, re.search(r'gathered in (\S+) s, written in (\S+) s', done.stdout).groups())
        ratios.append((gathered + written) / written)
        print(f'gathered in {gathered:.2f} s, written in {written:.2f} s: {ratios[-1]:.2f} times a plain save',
              flush=True)
print(f'median {statistics.median(ratios):.2f}; the state is the same to the last bit, there and back')
