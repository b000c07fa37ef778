"""The whole of GPT-2 124M, as config/train_gpt2_smoke.py trains it, in float32: by one process, stopped and resumed, by
two processes, by two torchrun agents that meet on loopback as two machines do, and with the optimizer's state divided.
All must have the same losses and answers. About ten minutes on two cores.

    python tests/stress/gpt2_trial.py --text=input.txt --questions=hellaswag_val.jsonl
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configurator import configure  # noqa: E402

# -----------------------------------------------------------------------------
text = ''                   # a text to train on
questions = ''              # HellaSwag questions, .jsonl
steps = 4                   # optimizer steps
tokens = 2048               # tokens in a step; the recipe has 8192
limit = 6                   # how many questions are asked, twice
config = configure(globals())
# -----------------------------------------------------------------------------


def train(place, name, processes=1, machines=1, **changes):
    """Run the recipe as `name`; returns what it printed."""
    settings = {'dataset': 'trial', 'out_dir': f'out/{name}', 'dtype': 'float32', 'max_steps': steps,
                'total_batch_size': tokens, 'eval_interval': steps // 2, 'eval_iters': 2,
                'sample_interval': steps, 'sample_tokens': 16,
                'hellaswag_interval': steps // 2, 'hellaswag_limit': limit,
                'hellaswag_data': Path(questions).resolve(), 'tensorboard': False, **changes}
    script = [str(ROOT / 'train.py'), str(ROOT / 'config/train_gpt2_smoke.py'), *(f'--{k}={v}' for k, v in
                                                                                  settings.items())]
    launch = [sys.executable]
    if processes > 1:
        launch += ['-m', 'torch.distributed.run', f'--nproc_per_node={processes // machines}']
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            launch += ['--standalone'] if machines == 1 else [
                f'--nnodes={machines}', '--rdzv_backend=c10d', '--local_addr=127.0.0.1',
                f'--rdzv_endpoint=127.0.0.1:{s.getsockname()[1]}']
    env = {**os.environ, 'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // processes))}
    agents = [subprocess.Popen(launch + script, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding='utf-8') for _ in range(machines)]
    outputs = [agent.communicate()[0] for agent in agents]
    if any(agent.returncode for agent in agents):
        raise SystemExit('\n'.join(outputs))
    return '\n'.join(outputs)


def numbers(place, name):
    rows = [json.loads(line) for line in Path(place, 'out', name, 'metrics.jsonl').read_text('utf-8').splitlines()]
    return {(row['step'], key): row[key] for row in rows for key in ('loss', 'val_loss', 'hellaswag') if key in row}


def main():
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, ROOT / 'prepare_data.py', '--dataset=custom', f'--input={Path(text).resolve()}',
                        '--tokenizer=gpt2', '--out=data/trial'], cwd=place, check=True)
        out = train(place, 'one', checkpoint_interval=steps // 2, keep_checkpoints=0)
        print(out, flush=True)
        one = numbers(place, 'one')
        # back to the middle, as if the power had failed there
        Path(place, 'out/resumed').mkdir()
        for name in ('metrics.jsonl', f'checkpoint_iter_{steps // 2}.pt'):
            os.link(Path(place, 'out/one', name), Path(place, 'out/resumed', name))
        resumed = train(place, 'resumed')
        assert f'at step {steps // 2}' in resumed
        sizes = {}
        for name, options in {'resumed': None, 'two': {'processes': 2}, 'machines': {'processes': 2, 'machines': 2},
                              'zero': {'processes': 2, 'zero': 1}}.items():
            if options:
                said = train(place, name, **options)
                sizes[name] = re.search('optimizer state in each process: .*', said)[0]
            other = numbers(place, name)
            assert other.keys() == one.keys()
            worst = max(abs(other[key] - one[key]) / abs(one[key] or 1) for key in one)
            same = all(other[key] == one[key] for key in one)
            print(f'{name}: {len(one)} numbers, the furthest apart by {worst:.1e}' + ', all the same bits' * same,
                  flush=True)
            assert worst < 1e-5
        print('\n'.join(f'{name}: {size}' for name, size in sizes.items()))


if __name__ == '__main__':
    main()
