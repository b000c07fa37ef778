"""Nothing lost, nothing believed blindly: runs that diverge, meet each other, are stopped anywhere, or lack room."""

import builtins
import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import ROOT, Script, command, patched, run

from checkpoint import (BEST, FINAL, LATEST, find_checkpoints, load_checkpoint, load_newest, prune_checkpoints,
                        save_checkpoint)
from configurator import UserError
from dataset import ShardWriter, TokenDataset, mix
from device import StopSignal
from files import claim
from tokenizer import gpt2_tokenizer, train_bpe

A = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
     '--total_batch_size=512', '--device=cpu', '--dtype=float32', '--compile=false', '--tensorboard=false',
     '--eval_iters=2', '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_steps=2']

needs_posix = pytest.mark.skipif(os.name != 'posix', reason='Windows has no such thing')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    from pydoc_data.topics import topics
    place = tmp_path_factory.mktemp('reliability')
    text = ''.join(topics[name] for name in sorted(topics)[:20])[:60000]
    (place / 'text.txt').write_text(text, encoding='utf-8')
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=char', '--out=data/tiny')
    assert done.returncode == 0, done.stderr
    return place


def train(place, out, *args):
    return run(place, 'train.py', *A, f'--out_dir={out}', *args)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def metrics(place, out):
    path = place / out / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}')]


def steps(place, out):
    return [line['step'] for line in metrics(place, out) if 'loss' in line]


@pytest.fixture
def begun(place):
    """begun(out): a run that goes on and on, `after` steps into it, and at the latest ends with the test."""
    scripts = []

    def begin(out, *args, after=5):
        scripts.append(Script(place, 'train.py', *A, f'--out_dir={out}', '--max_steps=100000', *args))
        wait_for(lambda: len(steps(place, out)) > after)
        return scripts[-1]
    yield begin
    for script in scripts:
        script.kill()


# -----------------------------------------------------------------------------
# runs that diverge

def test_a_diverged_run_keeps_its_good_checkpoints_and_its_advice_works(place):
    done = train(place, 'out/high', '--learning_rate=1000', '--grad_clip=0', '--norm=rmsnorm', '--warmup_steps=30',
                 '--max_steps=60', '--eval_interval=5')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    for path in (place / 'out/high').glob('*.pt'):
        assert all(t.isfinite().all() for t in load_checkpoint(path)['model'].values()), path
    assert 'start again: --init_from=scratch,\nwith a lower --learning_rate' in done.stderr     # it never was any good
    done = train(place, 'out/high', '--init_from=scratch', '--norm=rmsnorm', '--max_steps=30')
    assert done.returncode == 0, done.stderr
    assert float(re.search(r'best validation loss: (\S+) \(\S+ bits per byte\),', done.stdout)[1]) < 5


@pytest.mark.parametrize('what', ['rate', 'weight'])
def test_nothing_that_is_not_finite_is_saved_or_pushes_out_what_is_good(place, what):
    out, more = f'out/broken{what}', ['--eval_interval=1', '--checkpoint_interval=1', '--keep_checkpoints=2']
    assert train(place, out, '--max_steps=4', *more).returncode == 0
    if what == 'weight':        # a step that breaks a weight, as a broken machine does
        breaks = patched(place, 'import torch\nclip = torch.nn.utils.clip_grad_norm_\n'
                         'def broken(parameters, *rest):\n    parameters = list(parameters)\n'
                         '    parameters[3].data.view(-1)[0] = float("inf")\n    return clip(parameters, *rest)\n'
                         'torch.nn.utils.clip_grad_norm_ = broken')
        done = run(place, breaks, 'train.py', *A, f'--out_dir={out}', '--max_steps=9', *more)
    else:
        done = train(place, out, '--max_steps=9', '--learning_rate=1e38', *more)
    assert done.returncode == 2 and f'--init_from={out}/best_checkpoint.pt --out_dir=ANOTHER' in done.stderr
    again = train(place, f'{out}2', f'--init_from={out}/best_checkpoint.pt', '--max_steps=9')
    assert again.returncode == 0, again.stderr
    files = sorted((place / out).glob('*.pt'))
    assert {'best_checkpoint.pt', 'checkpoint.pt', 'final_checkpoint.pt'} < {p.name for p in files}
    for path in files:
        assert all(t.isfinite().all() for t in load_checkpoint(path)['model'].values()), path


@pytest.mark.parametrize('steps_bad', [(4,), range(4, 100)], ids=['once', 'again and again'])
def test_what_is_not_finite_on_one_process_is_skipped_on_all(place, steps_bad):
    out = f'out/rank{len(steps_bad)}'
    # the second process's gradient is not finite: found as in the first, since gradients are averaged
    bad = patched(place, 'import torch\nbackward, calls = torch.Tensor.backward, [0]\n'
                  'def broken(loss):\n    calls[0] += 1\n'
                  f'    factor = "nan" if os.environ["RANK"] == "1" and (calls[0] - 1) // 2 in {steps_bad} else 1\n'
                  '    backward(loss * float(factor))\ntorch.Tensor.backward = broken')
    done = run(place, bad, 'train.py', *A, f'--out_dir={out}', '--max_steps=20', '--eval_interval=2', processes=2)
    assert done.stdout.count(': skipped, ') == min(len(steps_bad), 10)
    if len(steps_bad) == 1:
        assert done.returncode == 0, done.stderr
        assert load_checkpoint(place / out / LATEST)['iter_num'] == 20
    else:
        assert done.returncode != 0 and 'error: 10 steps in a row were not finite' in done.stderr
        assert load_checkpoint(place / out / LATEST)['iter_num'] == 4


def test_looking_at_a_run_changes_nothing_of_it(place):
    logs = {}
    for i, looks in enumerate([('--eval_interval=0', '--log_interval=1'),
                               ('--eval_interval=1', '--eval_iters=7', '--checkpoint_interval=3', '--tensorboard=true',
                                '--sample_interval=2', '--sample_tokens=5'),
                               ('--eval_interval=4', '--log_interval=3')]):
        assert train(place, f'out/look{i}', '--max_steps=12', '--dropout=0.2', *looks).returncode == 0
        logs[i] = {line['step']: line['loss'] for line in metrics(place, f'out/look{i}') if 'loss' in line}
        logs[i]['weights'] = [t.sum().item() for t in load_checkpoint(place / f'out/look{i}' / FINAL)['model'].values()]
    assert logs[0] == logs[1] and len(logs[0]) == 13
    assert logs[2] == {step: logs[0][step] for step in (0, 3, 6, 9, 'weights')}


def test_a_run_goes_on_with_fewer_processes_and_the_same_losses(place):
    assert train(place, 'out/alone', '--max_steps=12', '--eval_interval=4', '--min_lr=1e-3').returncode == 0
    for processes, until in ((4, 4), (2, 8), (1, 12)):
        done = run(place, 'train.py', *A, '--out_dir=out/fewer', '--eval_interval=4', f'--max_steps={until}',
                   '--min_lr=1e-3', processes=processes)
        assert done.returncode == 0, done.stderr
    alone, fewer = (metrics(place, out) for out in ('out/alone', 'out/fewer'))
    assert [line['step'] for line in alone] == [line['step'] for line in fewer]
    for a, b in zip(alone, fewer, strict=True):
        for key in a.keys() & {'loss', 'val_loss', 'norm'}:
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a, b)


def test_what_is_the_best_is_on_the_disk_even_if_a_step_was_skipped_before_it(place):
    # the fifth step is not finite, so that the evaluation behind it is not saved; the sixth makes the model worse
    bad = patched(place, 'import torch\nclip, calls = torch.nn.utils.clip_grad_norm_, [0]\n'
                  'def odd(parameters, *rest):\n    parameters = list(parameters)\n    calls[0] += 1\n'
                  '    for p in parameters if calls[0] == 6 else ():\n        p.data += 0.3 * torch.randn_like(p)\n'
                  '    return clip(parameters, *rest) * (float("nan") if calls[0] == 5 else 1)\n'
                  'torch.nn.utils.clip_grad_norm_ = odd')
    done = run(place, bad, 'train.py', *A, '--out_dir=out/best', '--eval_interval=5', '--max_steps=6')
    assert done.returncode == 0 and done.stdout.count(': skipped, ') == 1, done.stderr
    best, latest = (load_checkpoint(place / 'out/best' / name) for name in (BEST, LATEST))
    val_loss = {line['step']: line['val_loss'] for line in metrics(place, 'out/best') if 'val_loss' in line}
    assert val_loss[5] < val_loss[6] == latest['best_val_loss'] == best['best_val_loss'] and best['iter_num'] == 6


# -----------------------------------------------------------------------------
# two runs, and which checkpoint is the newest

def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(place, begun):
    first = begun('out/shared')
    second = train(place, 'out/shared', '--max_steps=3')
    assert second.returncode == 2 and 'Traceback' not in second.stderr
    assert f'a run on {socket.gethostname()}, process {first.pid}, is writing to out/shared' in second.stderr
    first.send(signal.SIGKILL)
    first.wait()
    assert steps(place, 'out/shared') == sorted(set(steps(place, 'out/shared')))
    assert train(place, 'out/shared', '--max_steps=3').returncode == 0      # the lock died with its process
    assert not (place / 'out/shared/run.lock').exists()
    (place / 'out/shared/run.lock').write_text('elsewhere 1234', encoding='utf-8')     # left by a machine that crashed
    refused = train(place, 'out/shared', '--max_steps=5')
    assert refused.returncode == 2 and 'elsewhere, process 1234' in refused.stderr
    assert 'delete out/shared/run.lock' in refused.stderr
    (place / 'out/shared/run.lock').unlink()
    assert train(place, 'out/shared', '--max_steps=5').returncode == 0


def test_the_newest_checkpoint_is_the_one_of_the_highest_step_whatever_its_time(place):
    assert train(place, 'out/times', '--max_steps=6', '--checkpoint_interval=2', '--eval_interval=0').returncode == 0
    os.utime(place / 'out/times/checkpoint_iter_2.pt', (4e9, 4e9))
    assert find_checkpoints(place / 'out/times')[-1].name == 'checkpoint_iter_2.pt'
    path, newest = load_newest(place / 'out/times')
    assert (path.name, newest['iter_num']) == (LATEST, 6)


def test_the_best_checkpoint_is_there_before_the_latest_says_how_good_it_is(tmp_path, monkeypatch):
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (replaced.append(Path(b).name), replace(a, b)))
    save_checkpoint(tmp_path, {'x': 1}, [BEST, LATEST])
    assert replaced == [BEST, LATEST]
    saves = re.findall(r'\}, \[(.*?)\]\)', (ROOT / 'train.py').read_text(encoding='utf-8'))
    assert saves == ['*names, LATEST']


def save_and_die(folder, checkpoint, names, n, links):
    """In a process of its own: save and prune, and die at the n-th operation on files; whether it lived on."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    left = [n]

    def mortal(real, *args, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return real(*args, **options)

    class MortalFile(io.FileIO):                # without a buffer, so that every write is one
        def write(self, data):
            if left[0] == 0:                    # the last one gets half of its bytes to the disk
                super().write(bytes(data)[:len(data) // 2])
            return mortal(super().write, data)

    def no_links(*_):
        raise OSError(errno.EPERM, 'no links here')

    builtins.open = lambda path, mode: mortal(MortalFile, path, mode[0])
    for name in ('replace', 'fsync', 'link', 'unlink', 'open', 'close'):
        setattr(os, name, partial(mortal, no_links if name == 'link' and not links else getattr(os, name)))
    save_checkpoint(folder, checkpoint, names)
    prune_checkpoints(folder, 2)
    os._exit(0)


@needs_posix
@pytest.mark.parametrize('links', [True, False])
def test_death_at_any_operation_of_a_save_leaves_the_old_state_or_the_new(tmp_path, links):
    def state(step):
        return {'model': {'w': torch.full((30, 40), float(step))}, 'model_args': {'mlp': 'gelu'}, 'iter_num': step}

    for n in range(1000):
        folder = tmp_path / str(n)
        folder.mkdir()
        for step in (1, 2):
            save_checkpoint(folder, state(step), [f'checkpoint_iter_{step}.pt', BEST, LATEST])
        if save_and_die(folder, state(3), ['checkpoint_iter_3.pt', BEST, LATEST], n, links):
            break
        steps = {path.name: load_checkpoint(path)['iter_num'] for path in folder.glob('*.pt')}
        assert 2 <= steps[LATEST] <= steps[BEST] <= 3 and steps['checkpoint_iter_2.pt'] == 2, (n, steps)
        assert load_newest(folder)[1]['iter_num'] == max(steps.values())
        save_checkpoint(folder, state(5), [LATEST])     # what was left behind is in nobody's way
        assert load_newest(folder)[1]['iter_num'] == 5
    assert 30 < n < 999
    print(f'{n} deaths')


# -----------------------------------------------------------------------------
# stopping

@pytest.mark.parametrize('numbers', [[signal.SIGTERM] * 2, [signal.SIGHUP], [signal.SIGINT]], ids=str)
def test_a_signal_in_an_evaluation_is_obeyed_soon_and_one_sent_twice_is_one(place, begun, numbers):
    if signal.getsignal(numbers[0]) == signal.SIG_IGN:
        pytest.skip('these tests were started by nohup, which training obeys, too')
    out = f'out/signal{len(numbers)}{int(numbers[0])}'
    script = begun(out, '--eval_interval=0', '--sample_interval=3', '--sample_tokens=1000000', '--num_samples=1',
                   after=2)
    time.sleep(0.5)                                     # it is making a sample without end by now
    began = time.monotonic()
    for number in numbers:
        script.send(number)
        time.sleep(0.1)
    assert script.wait(20) == 128 + numbers[0], script.err
    assert time.monotonic() - began < 5
    assert load_checkpoint(place / out / LATEST)['iter_num'] == 3


@needs_posix
@pytest.mark.parametrize('to', ['torchrun', 'a worker', 'all'])
def test_a_signal_under_torchrun_saves_one_checkpoint_and_leaves_no_process(place, to):
    out, quiet = place / f'out/to-{to}', {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    with subprocess.Popen(command('train.py', *A, f'--out_dir={out}', '--max_steps=100000', processes=2), cwd=place,
                          start_new_session=True, **quiet) as agent:
        try:
            wait_for(lambda: len(steps(place, out)) > 5)
            worker = int((out / 'run.lock').read_text(encoding='utf-8').split()[1])
            if to == 'all':                             # and torchrun, as it does, signals its workers once more
                os.killpg(agent.pid, signal.SIGTERM)
            else:
                os.kill(agent.pid if to == 'torchrun' else worker, signal.SIGTERM)
            agent.wait(timeout=30)                      # schedulers kill what is still there
            with pytest.raises(ProcessLookupError):
                os.killpg(agent.pid, 0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert load_checkpoint(out / LATEST)['iter_num'] == max(steps(place, out)) + 1
    assert not (out / 'run.lock').exists()


@needs_posix
def test_workers_that_torchrun_restarts_go_on_where_they_were(place):
    wounded = patched(place, 'import torch\nclip, calls = torch.nn.utils.clip_grad_norm_, [0]\n'
                      'def dies(*args):\n    calls[0] += 1\n    again = os.environ["TORCHELASTIC_RESTART_COUNT"]\n'
                      '    if again == os.environ["RANK"] == "0" and calls[0] == 8:\n        os.kill(os.getpid(), 9)\n'
                      '    return clip(*args)\n'
                      'torch.nn.utils.clip_grad_norm_ = dies')
    line = command(wounded, 'train.py', *A, '--out_dir=out/restarted', '--eval_interval=5', '--max_steps=9',
                   processes=2)
    line.insert(line.index('--standalone'), '--max_restarts=1')
    done = subprocess.run(line, cwd=place, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and 'at step 5' in done.stdout, done.stderr
    assert steps(place, 'out/restarted') == list(range(9))


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs to see what a process has loaded')
def test_ctrl_c_while_a_script_loads_ends_it_without_a_word(place):
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)      # a background job may not be
    with subprocess.Popen(command('train.py', *A), cwd=place, stderr=subprocess.PIPE, text=True,
                          preexec_fn=listening) as process:
        wait_for(lambda: 'libtorch' in Path(f'/proc/{process.pid}/maps').read_text(encoding='utf-8'))
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        assert process.stderr.read() == '' and process.returncode == 130


def test_who_stops_reading_the_output_does_not_lose_the_run(place):
    with subprocess.Popen(command('train.py', *A, '--out_dir=out/piped', '--max_steps=100000', '--eval_interval=0'),
                          cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not process.stdout.readline().startswith('step     3'):
            pass
        process.stdout.close()
        assert process.wait(60) == 141 and process.stderr.read() == ''
    assert load_checkpoint(place / 'out/piped' / LATEST)['iter_num'] == max(steps(place, 'out/piped')) + 1


def test_a_signal_seconds_after_the_first_ends_the_process(monkeypatch):
    sent, now = [], [0.0]
    monkeypatch.setattr(os, 'kill', lambda pid, number: sent.append(number))
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(rank=1)
    for at in (0.0, 0.1, 1.9, 2.5):
        assert sent == []
        now[0] = at
        stop(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, before)
    assert sent == [signal.SIGTERM] and stop.number == signal.SIGTERM


# -----------------------------------------------------------------------------
# clocks, memory, disk

@pytest.mark.parametrize('clock', ['time.time = lambda t=time.time, n=[0]: n.append(0) or t() - 3600 * len(n)',
                                   'time.perf_counter = lambda: 1.0; time.monotonic = lambda: 1.0'])
def test_a_clock_that_goes_back_or_stands_still_gives_no_nonsense(place, clock):
    out = f'out/clock{len(clock)}'
    done = run(place, patched(place, f'import time\n{clock}'), 'train.py', *A, f'--out_dir={out}', '--max_steps=14')
    assert done.returncode == 0, done.stderr
    numbers = [value for line in metrics(place, out) for value in line.values()]
    assert min(numbers) >= 0 and not re.search(r'[ :]-\d', done.stdout)


@pytest.mark.parametrize('error', [
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")', 'MemoryError()',
    'RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can\'t allocate memory: you tried to")',
    'RuntimeError("CUDA error: out of memory")', 'RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")',
    'numpy._core._exceptions._ArrayMemoryError((10**9,), numpy.dtype("f8"))'])
def test_every_kind_of_out_of_memory_is_told_in_two_lines(tmp_path, error):
    (tmp_path / 'greedy.py').write_text(f'import sys\nsys.path.append({str(ROOT)!r})\nimport numpy\nimport torch\n'
                                        'from configurator import configure\nsize = 1  # how much\n'
                                        f'config = configure(globals())\nraise {error}\n', encoding='utf-8')
    done = run(tmp_path, tmp_path / 'greedy.py')
    assert done.returncode == 2 and done.stderr.startswith('error: out of memory') and 'batch_size' in done.stderr
    assert len(done.stderr.splitlines()) == 2


def standing_in_the_way(out, kind):
    """Make `out` one of the folders that no run can write to; returns its path."""
    out.parent.mkdir(exist_ok=True)
    if kind == 'a file':
        out.write_text('x', encoding='utf-8')
    elif kind == 'below a file':
        out.write_text('x', encoding='utf-8')
        return out / 'below'
    elif kind == 'a link to nowhere':
        out.symlink_to('nowhere')
    elif kind == 'a link to itself':
        out.symlink_to(out)
    elif kind == 'too long a name':
        return out.parent / ('n' * 300)
    elif kind == 'no name':
        return ''
    elif kind == 'tb is a file':
        out.mkdir()
        (out / 'tb').write_text('x', encoding='utf-8')
    elif kind == 'read-only':
        out.mkdir(mode=0o555)
    else:
        (out / kind).mkdir(parents=True)
    return out


@pytest.mark.parametrize('kind', [
    'a file', 'below a file', 'a link to nowhere', 'a link to itself', 'too long a name', 'no name', 'tb is a file',
    'read-only', 'metrics.jsonl', 'metrics.jsonl.tmp', 'run.lock', 'checkpoint.pt', 'checkpoint.pt.tmp',
    'best_checkpoint.pt', 'final_checkpoint.pt.tmp', 'checkpoint_iter_100.pt'])
def test_what_is_in_the_way_in_out_dir_is_named_before_training(place, kind):
    if kind == 'read-only' and os.name == 'posix' and os.geteuid() == 0:
        pytest.skip('root may write anywhere')
    out = standing_in_the_way(place / f'out/way-{kind}', kind)
    done = train(place, out, '--max_steps=3', '--tensorboard=true')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'step     0' not in done.stdout, done.stderr
    assert (str(out) or '--out_dir') in done.stderr and len(done.stderr.splitlines()) <= 2


def test_a_disk_without_room_for_a_checkpoint_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=5_000_000))
    claim(tmp_path / 'fits', room=5_000_000)()
    with pytest.raises(UserError, match='takes 5.0 MB and more, of which 5.0 MB are left'):
        claim(tmp_path / 'out', room=5_000_001)


LIMIT = ('import resource\nsoft, hard = resource.getrlimit(resource.{0})\n'
         'resource.setrlimit(resource.{0}, ({1}, hard))')


@needs_posix
def test_a_disk_that_is_full_when_saving_costs_nothing_that_was_there(place):
    more = ['--out_dir=out/fulldisk', '--eval_interval=0', '--checkpoint_interval=5', '--keep_checkpoints=2']
    assert run(place, 'train.py', *A, *more, '--max_steps=10').returncode == 0
    before = {p.name: p.read_bytes() for p in (place / 'out/fulldisk').glob('*.pt*')}
    done = run(place, patched(place, LIMIT.format('RLIMIT_FSIZE', 100_000)), 'train.py', *A, *more, '--max_steps=20')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and len(done.stderr.splitlines()) == 1
    assert 'checkpoint_iter_10.pt' in done.stderr and 'what was there before is untouched' in done.stderr
    assert {p.name: p.read_bytes() for p in (place / 'out/fulldisk').glob('*.pt*')} == before
    assert run(place, 'train.py', *A, *more, '--max_steps=20').returncode == 0      # there is room again


@needs_posix
def test_a_full_disk_under_tensorboard_costs_its_log_and_not_the_run(tmp_path):
    code = ('import sys, resource\nsys.path.insert(0, sys.argv[1])\nfrom metrics import MetricsLog\n'
            'log = MetricsLog(".")\nlog.board.flush()\nlog.places = {log.folder: log.places[log.folder]}\n'
            'resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n'
            'for i in range(int(sys.argv[2])):\n    log(i, loss=0.0, lr=0.0)\nlog.close()')
    for lines in (2000, 45):                # it is seen while logging, and when the file is closed
        done = subprocess.run([sys.executable, '-c', code, str(ROOT), str(lines)], cwd=tmp_path, text=True,
                              capture_output=True)
        assert (done.returncode, done.stderr) == (0, 'warning: nothing more is logged to tb: File too large\n')


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs limits on memory')
@pytest.mark.parametrize('args', [
    ('train.py', *A, '--out_dir=out/greedy', '--batch_size=400000', '--total_batch_size=0'),
    ('train.py', *A, '--out_dir=out/greedy', '--n_embd=20000'),
    ('sample.py', '--init_from=out/odd', '--device=cpu', '--num_samples=10000000000'),
    ('sample.py', '--init_from=out/odd', '--device=cpu', '--num_samples=100000', '--batch_size=100000')], ids=str)
def test_a_script_that_runs_out_of_memory_says_so_in_two_lines(odd, args):
    used = 'int(open("/proc/self/statm", encoding="ascii").read().split()[0]) * resource.getpagesize() + (1 << 28)'
    done = run(odd, patched(odd, f'import torch\n{LIMIT.format("RLIMIT_AS", used)}'), *args)
    assert done.returncode == 2, done.stderr
    assert re.search(r'^error: out of memory.*\nlower batch_size.*\n\Z', done.stderr, re.M), done.stderr


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is always full')
def test_a_full_disk_under_the_log_costs_the_log_and_not_the_run(place, begun):
    out = place / 'out/fulllog'
    script = begun(out, '--eval_interval=0')
    (out / 'metrics.jsonl').rename(out / 'before.jsonl')
    (out / 'metrics.jsonl').symlink_to('/dev/full')
    time.sleep(1)
    script.send(signal.SIGTERM)
    assert script.wait(30) == 143 and script.err.count('warning: nothing more is logged') == 1
    assert load_checkpoint(out / LATEST)['iter_num'] > 5


# -----------------------------------------------------------------------------
# damaged checkpoints, seeds

def test_no_flipped_bit_in_the_directory_of_a_checkpoint_loads_other_weights(tmp_path):
    good = {'model': {f'w{i}': torch.randn(3, 4) for i in range(3)}, 'model_args': {'mlp': 'gelu'}, 'iter_num': 1}
    torch.save(good, tmp_path / 'good.pt')
    data = (tmp_path / 'good.pt').read_bytes()
    start = data.index(b'PK\x01\x02')                  # the first entry of the zip's directory
    loaded = 0
    for at in range(8 * start, 8 * len(data), 5):       # every fifth bit: all of them are a trial of minutes
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        (tmp_path / 'bad.pt').write_bytes(flipped)
        try:
            model = load_checkpoint(tmp_path / 'bad.pt')['model']
        except UserError:
            continue
        loaded += 1
        assert all(torch.equal(model[k], good['model'][k]) for k in good['model']), at
    assert loaded                                       # bits that mean nothing


@pytest.fixture(scope='module')
def odd(place):
    """A folder with a checkpoint, to be made odd, or sampled from in odd ways."""
    assert train(place, 'out/odd', '--max_steps=6', '--checkpoint_interval=2').returncode == 0
    return place


@pytest.mark.parametrize('changes, named', [
    ({'model_args': [1, 2]}, 'is not a checkpoint'), ({'model': {'w': 'text'}}, 'is not a checkpoint'),
    ({'tokenizer': {'kind': 'char', 'chars': ''.join(map(chr, range(60, 900))), 'eot': ''},
      'tokenizer_fingerprint': None}, 'tokenizer of 840 ids'), ('nan', 'not finite')])
def test_a_checkpoint_that_cannot_be_sampled_from_says_why(odd, changes, named):
    checkpoint = torch.load(odd / 'out/odd' / LATEST, weights_only=True)
    if changes == 'nan':
        checkpoint['model']['transformer.wte.weight'][0, 0] = float('nan')
    else:
        checkpoint |= changes
        if checkpoint['tokenizer_fingerprint'] is None:
            del checkpoint['tokenizer_fingerprint']
    torch.save(checkpoint, odd / 'odd.pt')
    done = run(odd, 'sample.py', '--init_from=odd.pt', '--device=cpu', '--max_new_tokens=3')
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr


def test_a_temperature_that_is_next_to_nothing_takes_the_likeliest(odd):
    texts = {run(odd, 'sample.py', '--init_from=out/odd', '--device=cpu', '--dtype=float32', '--prompt=the',
                 f'--temperature={t}', '--max_new_tokens=20').stdout for t in ('0', '1e-300', '1e-40')}
    assert len(texts) == 1 and 'Generation complete' in texts.pop()


@pytest.mark.parametrize('settings, named', [
    ('--learning_rate=inf', 'learning_rate'), ('--weight_decay=nan', 'weight_decay'), ('--grad_clip=inf', 'grad_clip'),
    ('--weight_decay=-1', 'weight_decay'), ('--min_lr=-1e-4', 'min_lr'), ('--num_samples=-1', 'num_samples'),
    (f'--n_layer={10**20}', 'n_layer'), ('x' * 300, 'no config file'), ('latin.py', 'latin.py, line 1')])
def test_wrong_settings_end_at_once_in_words(place, settings, named):
    (place / 'latin.py').write_bytes('# été\n'.encode('latin-1'))
    done = train(place, 'out/never', settings)
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
    assert not (place / 'out/never').exists()


def test_ids_that_do_not_fit_are_refused_on_the_way_in_and_on_the_way_out(tmp_path):
    for ids in ([65536], [-1], [1, 2, 70000]):
        with pytest.raises(ValueError, match='do not fit'):
            ShardWriter(tmp_path, 'train', 50257).write(ids)
    for split in ('train', 'val'):
        np.save(tmp_path / f'{split}.npy', np.array([1, 2, -3, 4] * 20))
    for vocab_size, said in ((10, 'token -3'), (3, 'token -3')):
        with pytest.raises(UserError, match=f'{said}, outside the vocabulary of {vocab_size}'):
            TokenDataset(tmp_path, 'train', 8, vocab_size, batch_size=1)        # before any window is drawn
    np.save(tmp_path / 'train.npy', np.array([1, 2, 3, 4] * 20 + [99]))
    with pytest.raises(UserError, match='token 99'):
        TokenDataset(tmp_path, 'train', 8, 10, batch_size=1)


@pytest.mark.parametrize('shards', [[], None, {'train': [{}], 'val': []}, {'train': [{'file': '../x.bin'}]},
                                    {'train': 3}])
def test_odd_shards_in_meta_json_are_refused(place, tmp_path, shards):
    folder = shutil.copytree(place / 'data/tiny', tmp_path / 'odd')
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    (folder / 'meta.json').write_text(json.dumps(meta | {'shards': shards}), encoding='utf-8')
    with pytest.raises(UserError, match='meta.json cannot be read'):
        TokenDataset(folder, 'train', 8, 100, batch_size=1)


@pytest.mark.parametrize('mask', [b'', bytes(80)])
def test_a_mask_that_is_empty_or_leaves_nothing_to_train_on_is_refused(tmp_path, mask):
    for split in ('train', 'val'):
        np.array([0, 2, 3, 4] * 20, dtype='<u2').tofile(tmp_path / f'{split}.bin')
        (tmp_path / f'{split}.mask.bin').write_bytes(mask)
    with pytest.raises(UserError, match='mask'):
        TokenDataset(tmp_path, 'train', 8, 10, batch_size=1)


def test_gpt2s_tokenizer_refuses_half_a_surrogate():
    for encode in (gpt2_tokenizer().encode, lambda text: gpt2_tokenizer().encode_batch([text])):
        with pytest.raises(UserError, match='surrogate'):
            encode('half a pair: \ud800')


def test_a_line_of_brackets_is_named(place):
    (place / 'deep.jsonl').write_text('{"text": "fine"}\n' + '[' * 100_000 + '\n', encoding='utf-8')
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=deep.jsonl', '--tokenizer=char', '--out=data/d')
    assert done.returncode == 2 and 'deep.jsonl:2' in done.stderr and 'Traceback' not in done.stderr


def test_words_without_an_end_do_not_stop_the_training_of_a_bpe():
    begun = time.monotonic()
    bpe = train_bpe(['a' * 400_000, '=' * 400_000, ' ' * 400_000, 'a few words'], 300)
    assert time.monotonic() - begun < 20            # it was minutes: the time grew with the square of the length
    text = 'a' * 5000 + '=' * 5000
    assert bpe.decode(bpe.encode(text)) == text and len(bpe.encode(text)) < 200
    assert 'Split' not in bpe.text                  # only the training cuts them


def test_every_seed_step_and_process_has_a_dropout_of_its_own():
    # mt19937, the generator on CPUs, keeps the lower 32 bits of a seed
    low = {mix(seed, step, rank) & 0xffffffff for seed in range(20) for step in range(500) for rank in range(4)}
    assert len(low) > 39980
