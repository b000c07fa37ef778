"""Thirty ways in which the world treats a run badly. Prints RELIABILITY.md's table of figures, a line as each is tried:

    python tests/stress/fault_trials.py             all of them, about 20 minutes on two cores
    python tests/stress/fault_trials.py 1 17 30     some

Most are tests of the suite, run here by their names; the others are below. As root on Linux, a few file systems of a
megabyte are mounted, too.
"""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch                                                            # noqa: E402
import test_reliability                                                 # noqa: E402
from scripts import ROOT, Script, command, patched, run                 # noqa: E402
from test_reliability import A, wait_for                                # noqa: E402

from checkpoint import load_checkpoint, load_newest                     # noqa: E402
from configurator import UserError                                      # noqa: E402

ROOT_ON_LINUX = sys.platform == 'linux' and os.geteuid() == 0


def suite(files, names=''):
    """A trial that is a part of the suite: the cases that `names` picks from test files, as pytest's -k does."""
    def trial(_):
        paths = [str(TESTS / f'test_{name}.py') for name in files.split()]
        done = subprocess.run([sys.executable, '-m', 'pytest', '-n0', '-s', *paths, *(['-k', names] if names else [])],
                              cwd=ROOT, text=True, capture_output=True)
        said = re.findall(r'(\d+) (passed|skipped|failed|errors?|deaths)', done.stdout)
        assert done.returncode == 0 and said, done.stdout[-3000:]
        return ', '.join(f'{n} {"cases" if what == "passed" else what}' for n, what in said)
    return trial


# -----------------------------------------------------------------------------
# tools

def make_data(place):
    from pydoc_data.topics import topics
    (place / 'text.txt').write_text(''.join(topics[name] for name in sorted(topics)[:20])[:60000], encoding='utf-8')
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=char', '--out=data/tiny')
    assert done.returncode == 0, done.stderr


def train(place, out, *args, **how):
    done = run(place, 'train.py', *A, f'--out_dir=out/{out}', *args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done


def metrics(place, out):
    return test_reliability.metrics(place, f'out/{out}')


def steps(place, out):
    return test_reliability.steps(place, f'out/{out}')


def same_run(place, a, b):
    """Whether two runs have the same losses, weights and optimizer states, to the last bit."""
    losses = [[line.get('loss', line.get('val_loss')).hex() for line in metrics(place, out)] for out in (a, b)]
    one, two = (load_checkpoint(place / 'out' / out / 'final_checkpoint.pt') for out in (a, b))
    tensors = [[*c['model'].values(), *(t for o in c['optimizer'] for s in o['state'].values() for t in s.values())]
               for c in (one, two)]
    return losses[0] == losses[1] and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@contextmanager
def file_system(folder, options):
    """A file system in memory of its own, where root may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(['umount', folder], check=True)


def kill_again_and_again(place, out, times, rng, *args):
    """Start a run and kill -9 it, `times` times, each a random moment after it has begun to train; the steps made."""
    for _ in range(times):
        before = len(steps(place, out))
        script = Script(place, 'train.py', *A, f'--out_dir=out/{out}', *args)
        wait_for(lambda before=before: len(steps(place, out)) != before)
        time.sleep(rng.uniform(0, 0.4))
        script.send(signal.SIGKILL)
        assert script.wait() == -signal.SIGKILL, script.err        # it was still training
    return len(steps(place, out))


# -----------------------------------------------------------------------------
# trials

def fifty_kills(place):
    options = ['--dropout=0.1', '--eval_interval=1', '--checkpoint_interval=1', '--min_lr=1e-3']
    made = kill_again_and_again(place, 'killed', 50, random.Random(1), *options, '--max_steps=100000')
    end = f'--max_steps={made + 20}'            # at a constant rate it matters to no step where the end is
    resumed = train(place, 'killed', *options, end).stdout
    train(place, 'whole', *options, end)
    assert re.search('resuming from .* at step', resumed) and same_run(place, 'whole', 'killed')
    return f'50 kills within {made} steps; {made + 20} losses, weights and optimizer states equal to the bit'


def full_disks(place):
    figure = suite('reliability', 'full')(place)
    if not ROOT_ON_LINUX:
        return figure + '; tmpfs only as root'
    with file_system(place / 'out/small', 'size=900k'):             # one checkpoint fits, and half of the next
        options = ['--eval_interval=5', '--max_steps=40']
        done = run(place, 'train.py', *A, '--out_dir=out/small', *options, '--n_embd=48')
        assert done.returncode == 2 and 'No space left' in done.stderr and 'Traceback' not in done.stderr, done.stderr
        step = load_newest(place / 'out/small')[1]['iter_num']
        subprocess.run(['mount', '-o', 'remount,size=9m', place / 'out/small'], check=True)
        train(place, 'small', *options, '--n_embd=48')
        train(place, 'roomy', *options, '--n_embd=48')
        assert same_run(place, 'small', 'roomy')
    return f'{figure}; on a tmpfs that was full at step {step} it went on when there was room, equal to the bit'


def unwritable(place):
    figure = suite('reliability', 'in_the_way or without_room')(place)
    if ROOT_ON_LINUX:
        for options in ('ro', 'nr_inodes=1', 'size=64k'):
            with file_system(place / 'out/odd', options):
                if options.startswith('size'):
                    (place / 'out/odd/fill').write_bytes(bytes(65536))
                done = run(place, 'train.py', *A, '--out_dir=out/odd', '--max_steps=3')
                assert done.returncode == 2 and 'step     0' not in done.stdout, done.stdout + done.stderr
                assert len(done.stderr.splitlines()) == 1
        figure += '; read-only, full, and without inodes on a tmpfs'
    return figure


def flips(place):
    train(place, 'flips', '--max_steps=2')
    good, rng = (place / 'out/flips/final_checkpoint.pt').read_bytes(), random.Random(2)
    weights, bad = load_checkpoint(place / 'out/flips/final_checkpoint.pt'), place / 'bad.pt'
    refused, same = 0, 0

    def look(content):
        nonlocal refused, same
        bad.write_bytes(content)
        try:
            loaded = load_checkpoint(bad)
        except UserError:
            refused += 1
        else:
            same += 1
            assert all(torch.equal(loaded['model'][k], t) for k, t in weights['model'].items())
    directory = good.index(b'PK\x01\x02')
    bits = [rng.randrange(8 * len(good)) for _ in range(200)] + list(range(8 * directory, 8 * len(good)))
    for bit in bits:
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        look(content)
    for _ in range(200):
        look(good[:rng.randrange(len(good))])
    return (f'200 random flips, all {8 * (len(good) - directory):,} of the directory, 200 cuts: {refused:,} refused, '
            f'{same:,} loaded, all right')


def anywhere(place):
    stops, numbers = 0, itertools.cycle((signal.SIGTERM, signal.SIGKILL, signal.SIGINT))
    for i, options in enumerate([('--dtype=float32',), ('--dtype=bfloat16',), ('--optimizer=muon',),
                                 ('--dtype=bfloat16', '--optimizer=muon', '--norm=rmsnorm', '--position=rope')]):
        options = [*options, '--dropout=0.1', '--max_steps=40', '--eval_interval=7']
        train(place, f'whole{i}', *options)
        for step, number in zip((3, 11, 18, 26, 33), numbers, strict=False):
            script = Script(place, 'train.py', *A, f'--out_dir=out/stopped{i}', *options)
            wait_for(lambda step=step, i=i: steps(place, f'stopped{i}')[-1:] >= [step])
            script.send(number)
            status = script.wait(60)
            if status:
                assert status in (128 + number, -number), script.err
                stops += 1
        train(place, f'stopped{i}', *options)
        assert same_run(place, f'whole{i}', f'stopped{i}')
    return f'{stops} stops in 4 settings, equal to the bit'


def killed_preparations(place):
    figure = suite('fineweb prepare_data', 'killed or cut_short')(place)
    whole, rng = None, random.Random(4)
    args = ['--dataset=custom', '--input=text.txt', '--vocab_size=1000', '--shard_size=5000']
    start = time.monotonic()
    assert run(place, 'prepare_data.py', *args, '--out=whole').returncode == 0
    seconds = time.monotonic() - start
    for _ in range(20):
        script = Script(place, 'prepare_data.py', *args, '--out=killed')
        time.sleep(rng.uniform(0, seconds))
        with suppress(ProcessLookupError):
            script.send(signal.SIGKILL)
        script.wait()
    assert run(place, 'prepare_data.py', *args, '--out=killed').returncode == 0
    whole, killed = ({p.name: p.read_bytes() for p in (place / name).iterdir()} for name in ('whole', 'killed'))
    assert whole == killed
    return f'{figure}; 20 kills, the same bytes'


def signals(place):
    figure = suite('reliability train', 'signal or torchrun or reading or ctrl_c or seconds_after')(place)
    rng, options = random.Random(5), ['--eval_interval=1', '--checkpoint_interval=1', '--max_steps=100000']
    for i in range(20):                                     # most of the time is saving: so most come while it saves
        script = Script(place, 'train.py', *A, '--out_dir=out/saving', *options)
        before = len(steps(place, 'saving'))
        wait_for(lambda before=before: len(steps(place, 'saving')) > before)
        time.sleep(rng.uniform(0, 0.1))
        script.send(signal.SIGTERM)
        assert script.wait(30) == 143, script.err
        assert load_newest(place / 'out/saving')[1]['iter_num'] == max(steps(place, 'saving')) + 1, i
    return f'{figure}; 20 within saves'


def restarts(place):
    options = ['--eval_interval=5', '--max_steps=60', '--dropout=0.1']
    train(place, 'alone', *options, processes=2)
    wounded = patched(place, 'import torch\nclip = torch.nn.utils.clip_grad_norm_\ncalls = [0]\n'
                      'def dies(*a):\n    calls[0] += 1\n    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])\n'
                      '    if again < 3 and os.environ["RANK"] == str(again % 2) and calls[0] == 13:\n'
                      '        os.kill(os.getpid(), 9)\n    return clip(*a)\ntorch.nn.utils.clip_grad_norm_ = dies')
    line = command('train.py', *A, '--out_dir=out/restarted', *options, processes=2)
    at = line.index(str(ROOT / 'train.py'))
    line[at:at + 1] = ['--max_restarts=3', str(wounded), 'train.py']
    done = subprocess.run(line, cwd=place, text=True, capture_output=True, timeout=300)
    resumed = [int(s) for s in re.findall(r'resuming from .* at step (\d+)', done.stdout)]
    assert done.returncode == 0 and len(resumed) == 3, done.stdout[-2000:] + done.stderr[-2000:]
    assert same_run(place, 'alone', 'restarted')
    return f'3 workers killed, torchrun restarted them, resumed at {", ".join(map(str, resumed))}; equal to the bit'


def endurance(place):
    options = ['--eval_interval=25', '--checkpoint_interval=25', '--log_interval=1', '--max_steps=100000']
    made = kill_again_and_again(place, 'long', 60, random.Random(6), *options)
    script = Script(place, 'train.py', *A, '--out_dir=out/long', *options, '--tensorboard=true')
    first, figures = None, []
    for target in (500, 1000, 2000, 3000, 4000, 5000):
        wait_for(lambda target=target: steps(place, 'long') and len(steps(place, 'long')) - made >= target, 600)
        rss = int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{script.pid}/status').read_text(encoding='utf-8'))[1])
        figures.append((rss / 1024, len(os.listdir(f'/proc/{script.pid}/fd'))))
    script.send(signal.SIGTERM)
    assert script.wait(60) == 143
    (first, files), (last, files_then) = figures[0], figures[-1]
    assert last < 1.03 * first + 5 and files_then == files, figures
    left = [p.name for p in (place / 'out/long').iterdir() if p.suffix in ('.tmp', '.lock')]
    assert not left, left
    return (f'60 kills; over 5,000 steps with 200 saves {first:.0f} MB became {last:.0f} MB, {files} open files stayed '
            f'{files_then}')


TRIALS = [
    ('fifty `kill -9`', fifty_kills),
    ('death at every operation of a save', suite('reliability files', 'death or failed_write')),
    ('a full disk while saving, in the log, in TensorBoard', full_disks),
    ('an `out_dir` that cannot be written', unwritable),
    ('flipped bits and cut files', flips),
    ('stop anywhere and resume', anywhere),
    ('looking at a run changes nothing', suite('reliability', 'looking')),
    ('pickles that would run code', suite('sample dataset', 'plain_data or pickle')),
    ('two runs in one folder', suite('reliability files', 'second_run or lock')),
    ('windows over shards and processes', suite('dataset properties', 'window or batch or target or permutation')),
    ('4, then 2, then 1 process', suite('reliability', 'fewer_processes')),
    ('damaged shards', suite('dataset reliability', 'damaged or refused or shard or mask')),
    ('ids at the edge', suite('reliability dataset', 'ids_that or outside_the_vocabulary or layout')),
    ('dirty text', suite('prepare_data zh reliability properties', 'mistake or input or bracket or surrogate')),
    ('a preparation killed 20 times', killed_preparations),
    ('NaN on one process, again and again, in the weights', suite('reliability train', 'finite or diverged')),
    ('signals: alone, under torchrun, to all, while saving, SIGHUP, a broken pipe', signals),
    ('workers killed, and restarted by torchrun', restarts),
    ('out of memory', suite('reliability', 'out_of_memory')),
    ('clocks that jump or stand', suite('reliability train', 'clock or time_to_finish')),
    ('downloads: cut, silent, resumed', suite('download', 'cut or silent or resumed or left or killed or tries')),
    ('downloads: wrong, damaged', suite('download', 'wrong or corrupted or checksum or size or login or whole')),
    ('downloads: refused, busy, rate-limited', suite('download', 'busy or retry or refusal or bounded or again')),
    ('downloads: redirects, tokens, secrets', suite('download', 'token or secret or redirect or stays_in')),
    ('downloads: full disk, offline, eight at once', suite('download', 'disk or offline or eight or xet or folder')),
    ('wrong settings', suite('wrong_commands reliability configurator', 'wrong or setting')),
    ('sampling from what cannot be sampled', suite('reliability sample', 'sampled or temperature or refused')),
    ('HellaSwag files', suite('hellaswag properties', 'file or line or question')),
    ('properties, 2,000 examples of each', suite('properties')),
    ('sixty kills, then 5,000 steps', endurance),
]


if __name__ == '__main__':
    chosen = [int(arg) for arg in sys.argv[1:]] or range(1, len(TRIALS) + 1)
    failed = []
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name))
        print('| | trial | figure |\n|---|---|---|', flush=True)
        for number in chosen:
            what, trial = TRIALS[number - 1]
            if number == 29:
                os.environ['EXAMPLES'] = '2000'
            begun = time.monotonic()
            try:
                figure = trial(Path(name))
            except AssertionError as e:
                failed.append(number)
                figure = f'**FAILED** {str(e)[-1500:]}'
            print(f'| {number} | {what} | {figure} |', flush=True)
            print(f'{number}: {time.monotonic() - begun:.0f} s', file=sys.stderr)
            shutil.rmtree(Path(name, 'out'), ignore_errors=True)
    sys.exit(f'failed: {failed}' if failed else 0)
