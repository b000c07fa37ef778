"""Nothing lost, nothing believed blindly: runs that diverge, meet each other, are stopped anywhere, or lack room."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, Script, command, run

from checkpoint import BEST, LATEST, find_checkpoints, load_checkpoint, load_newest, save_checkpoint
from configurator import UserError
from dataset import ShardWriter, TokenDataset, mix
from device import StopSignal
from tokenizer import gpt2_tokenizer

A = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
     '--total_batch_size=512', '--device=cpu', '--dtype=float32', '--compile=false', '--tensorboard=false',
     '--eval_iters=2', '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_steps=2']


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


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(place, out):
    path = place / out / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [json.loads(line)['step'] for line in lines if line.endswith('}') and '"loss"' in line]


def begun(place, out, *args, after=5):
    """A run that goes on and on, `after` steps into it."""
    script = Script(place, 'train.py', *A, f'--out_dir={out}', '--max_steps=100000', *args)
    wait_for(lambda: len(steps(place, out)) > after)
    return script


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
    assert float(re.search(r'best validation loss: (\S+),', done.stdout)[1]) < 5


@pytest.mark.parametrize('what', ['rate', 'weight'])
def test_nothing_that_is_not_finite_is_saved_or_pushes_out_what_is_good(place, what):
    out, more = f'out/broken{what}', ['--eval_interval=1', '--checkpoint_interval=1', '--keep_checkpoints=2']
    assert train(place, out, '--max_steps=4', *more).returncode == 0
    if what == 'weight':        # a step that breaks a weight, as a broken machine does
        (place / 'breaks.py').write_text(
            'import runpy, sys\nsys.argv.pop(0)\nsys.path[0] = sys.argv[0][:-len("train.py")]\nimport model, torch\n'
            'clip = torch.nn.utils.clip_grad_norm_\n'
            'def broken(parameters, *rest):\n    parameters = list(parameters)\n'
            '    parameters[3].data.view(-1)[0] = float("inf")\n    return clip(parameters, *rest)\n'
            'torch.nn.utils.clip_grad_norm_ = broken\nrunpy.run_path(sys.argv[0], run_name="__main__")\n',
            encoding='utf-8')
        done = run(place, place / 'breaks.py', ROOT / 'train.py', *A, f'--out_dir={out}', '--max_steps=9', *more)
    else:
        done = train(place, out, '--max_steps=9', '--learning_rate=1e38', *more)
    assert done.returncode == 2 and f'--init_from={out}/best_checkpoint.pt --out_dir=ANOTHER' in done.stderr
    again = train(place, f'{out}2', f'--init_from={out}/best_checkpoint.pt', '--max_steps=9')
    assert again.returncode == 0, again.stderr
    files = sorted((place / out).glob('*.pt'))
    assert {'best_checkpoint.pt', 'checkpoint.pt', 'final_checkpoint.pt'} < {p.name for p in files}
    for path in files:
        assert all(t.isfinite().all() for t in load_checkpoint(path)['model'].values()), path


# -----------------------------------------------------------------------------
# two runs, and which checkpoint is the newest

def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(place):
    first = begun(place, 'out/shared')
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


# -----------------------------------------------------------------------------
# stopping

@pytest.mark.parametrize('numbers', [[signal.SIGTERM] * 2, [signal.SIGHUP], [signal.SIGINT]], ids=str)
def test_a_signal_in_an_evaluation_is_obeyed_soon_and_one_sent_twice_is_one(place, numbers):
    out = f'out/signal{len(numbers)}{int(numbers[0])}'
    script = Script(place, 'train.py', *A, f'--out_dir={out}', '--max_steps=100000', '--eval_interval=0',
                    '--sample_interval=3', '--sample_tokens=1000000', '--num_samples=1')
    wait_for(lambda: steps(place, out)[-1:] == [2])
    time.sleep(0.5)                                     # it is making a sample without end by now
    began = time.monotonic()
    for number in numbers:
        script.send(number)
        time.sleep(0.1)
    assert script.wait(20) == 128 + numbers[0], script.err
    assert time.monotonic() - began < 5
    assert load_checkpoint(place / out / LATEST)['iter_num'] == 3


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
    (place / 'clock.py').write_text(f'import runpy, sys, time\nsys.argv.pop(0)\nsys.path[0] = {str(ROOT)!r}\n{clock}\n'
                                    'runpy.run_path(sys.argv[0], run_name="__main__")\n', encoding='utf-8')
    out = f'out/clock{len(clock)}'
    done = run(place, place / 'clock.py', ROOT / 'train.py', *A, f'--out_dir={out}', '--max_steps=14')
    assert done.returncode == 0, done.stderr
    numbers = [value for line in (place / out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
               for value in json.loads(line).values()]
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


@pytest.mark.parametrize('way', ['metrics.jsonl/', 'tb', 'checkpoint.pt.tmp/'])
def test_what_is_in_the_way_in_out_dir_is_named(place, way):
    out = place / f'out/way{len(way)}'
    out.mkdir(parents=True)
    (out / way).mkdir() if way.endswith('/') else (out / way).write_text('x', encoding='utf-8')
    done = train(place, out, '--max_steps=3', '--tensorboard=true')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert way.strip('/').removesuffix('.tmp') in done.stderr


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is always full')
def test_a_full_disk_under_the_log_costs_the_log_and_not_the_run(place):
    out = place / 'out/fulllog'
    script = begun(place, out, '--eval_interval=0')
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


@pytest.mark.parametrize('changes, named', [
    ({'model_args': [1, 2]}, 'is not a checkpoint'), ({'model': {'w': 'text'}}, 'is not a checkpoint'),
    ({'tokenizer': {'kind': 'char', 'chars': ''.join(map(chr, range(60, 900))), 'eot': ''},
      'tokenizer_fingerprint': None}, 'tokenizer of 840 ids'), ('nan', 'not finite')])
def test_a_checkpoint_that_cannot_be_sampled_from_says_why(place, changes, named):
    if not (place / 'out/odd').exists():
        assert train(place, 'out/odd', '--max_steps=2').returncode == 0
    checkpoint = torch.load(place / 'out/odd' / LATEST, weights_only=True)
    if changes == 'nan':
        checkpoint['model']['transformer.wte.weight'][0, 0] = float('nan')
    else:
        checkpoint |= changes
        if checkpoint['tokenizer_fingerprint'] is None:
            del checkpoint['tokenizer_fingerprint']
    torch.save(checkpoint, place / 'odd.pt')
    done = run(place, 'sample.py', '--init_from=odd.pt', '--device=cpu', '--max_new_tokens=3')
    assert done.returncode == 2 and named in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr


def test_a_temperature_that_is_next_to_nothing_takes_the_likeliest(place):
    texts = {run(place, 'sample.py', '--init_from=out/odd', '--device=cpu', '--dtype=float32', '--prompt=the',
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


def test_every_seed_step_and_process_has_a_dropout_of_its_own():
    # mt19937, the generator on CPUs, keeps the lower 32 bits of a seed
    low = {mix(seed, step, rank) & 0xffffffff for seed in range(20) for step in range(500) for rank in range(4)}
    assert len(low) > 39980
