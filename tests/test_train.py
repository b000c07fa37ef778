"""train.py as its users run it: real processes on a small text, stopped, resumed, and divided."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoint import BackgroundSaver, build_model, load_checkpoint, save_checkpoint
from configurator import UserError
from device import load_optimizer, own_copy
from metrics import TimeToFinish
from model import GPT, GPTConfig
from scripts import ROOT, Script, patched, run

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--total_batch_size=0',
        '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_steps=2', '--eval_iters=3', '--device=cpu',
        '--tensorboard=false']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a data set of characters, made from real prose."""
    from pydoc_data.topics import topics
    place = tmp_path_factory.mktemp('train')
    text = ''.join(topics[name] for name in sorted(topics)[:20])[:60000]
    (place / 'text.txt').write_text(text, encoding='utf-8')
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=char',
                  '--out=data/tiny')
    assert done.returncode == 0, done.stderr
    return place


def train(place, out, *args, processes=1):
    done = run(place, 'train.py', '--dataset=tiny', f'--out_dir={out}', *TINY, *args, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(place, out):
    return [json.loads(line) for line in (place / out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def losses(place, out):
    return {m['step']: m['loss'] for m in metrics(place, out) if 'loss' in m}


def stop(place, out, signum, *args, after):
    """Start training and send `signum` once step `after` is in the log; returns the exit status, and the output."""
    script = Script(place, 'train.py', '--dataset=tiny', f'--out_dir={out}', *TINY, *args)
    log = place / out / 'metrics.jsonl'
    deadline = time.time() + 120
    while not (log.exists() and f'"step": {after},' in log.read_text(encoding='utf-8')):
        assert time.time() < deadline
        time.sleep(0.005)
    script.send(signum)
    return script.wait(60), script.out


@pytest.mark.parametrize('options', [('--dtype=float32', '--dropout=0.2'), ('--dtype=bfloat16', '--dropout=0.2'),
                                     ('--dtype=float32', '--optimizer=muon')], ids=' '.join)
def test_killed_and_resumed_is_the_same_run_to_the_last_bit(place, options):
    name = '-'.join(options).replace('=', '')
    options = [*options, '--max_steps=150', '--eval_interval=20']
    train(place, f'out/whole{name}', *options)
    assert stop(place, f'out/cut{name}', signal.SIGKILL, *options, after=50)[0] == -signal.SIGKILL
    interrupted_at = max(losses(place, f'out/cut{name}'))
    assert interrupted_at < 149
    out = train(place, f'out/cut{name}', *options)
    resumed_at = int(re.search(r'resuming from .* at step (\d+)', out)[1])
    assert 0 < resumed_at <= interrupted_at
    whole, cut = losses(place, f'out/whole{name}'), losses(place, f'out/cut{name}')
    assert list(cut) == list(range(150))                # each step stands there once, in order
    assert [x.hex() for x in cut.values()] == [x.hex() for x in whole.values()]
    a, b = (load_checkpoint(place / f'out/{kind}{name}/final_checkpoint.pt')['model'] for kind in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('signum, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_exits(place, signum, status):
    out = f'out/signal{status}'
    options = ['--dtype=float32', '--max_steps=4000', '--eval_interval=0']
    returned, said = stop(place, out, signum, *options, after=20)
    assert returned == status and re.search(r'^total time: [\d.]+ minutes, checkpoints in ', said, re.M), said
    last = max(losses(place, out))
    assert load_checkpoint(place / out / 'checkpoint.pt')['iter_num'] == last + 1


def test_two_processes_give_the_losses_of_one(place):
    options = ['--dtype=float32', '--max_steps=12', '--eval_interval=4', '--total_batch_size=1024']
    train(place, 'out/one', *options)
    out = train(place, 'out/two', *options, processes=2)
    one, two = metrics(place, 'out/one'), metrics(place, 'out/two')
    assert [m['step'] for m in one] == [m['step'] for m in two]         # one log, of one process
    for a, b in zip(one, two, strict=True):
        for key in ('loss', 'val_loss', 'norm'):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5)
    assert out.count('\nvalidation loss') == 4 and out.count('calculated gradient accumulation steps: 4') == 1
    assert sorted(p.name for p in (place / 'out/two').glob('*.pt')) == [
        'best_checkpoint.pt', 'checkpoint.pt', 'final_checkpoint.pt']
    # and one process goes on where two stopped
    options[1] = '--max_steps=15'
    assert 'at step 12' in train(place, 'out/two', *options)


def test_accumulated_micro_batches_equal_one_large_batch(place):
    options = ['--dtype=float32', '--max_steps=6', '--eval_interval=0']
    train(place, 'out/large', *options, '--batch_size=16')
    train(place, 'out/small', *options, '--batch_size=4', '--total_batch_size=512')
    large, small = losses(place, 'out/large'), losses(place, 'out/small')
    assert all(small[k] == pytest.approx(large[k], rel=1e-5) for k in large)


def test_the_log_is_in_the_stable_format_and_agrees_with_metrics_and_tensorboard(place):
    out = train(place, 'out/log', '--max_steps=12', '--eval_interval=6', '--tensorboard=true',
                '--checkpoint_interval=2', '--keep_checkpoints=2', '--sample_interval=6')
    for line in [r'using device: cpu, dtype: (bfloat16|float32), compile: False', r'total desired batch size: 128',
                 r'=> calculated gradient accumulation steps: 1', r'found 1 shards for split train',
                 r'num decayed parameter tensors: 10, with [\d,]+ parameters',
                 r'num non-decayed parameter tensors: 18, with [\d,]+ parameters', r'using fused AdamW: True',
                 r'validation loss: \d\.\d{4} \| ppl: \d+\.\d\d \| bits per byte: \d\.\d{4}',
                 r'total time: .* minutes, best validation loss: \d\.\d{4} \(\d\.\d{4} bits per byte\), .*',
                 r'[\d,]+ parameters \| 128 tokens per step \| .* epochs',
                 r'sample 1: .*', r'estimated time to finish: .*']:
        assert re.search(f'^{line}$', out, re.M), line
    steps = re.findall(r'^step +(\d+) \| loss: (\d+\.\d{6}) \| lr (\d\.\d{4}e-\d\d) \| norm: (\d+\.\d{4}) \| '
                       r'dt: (\d+\.\d\d)ms \| tok/sec: (\d+\.\d\d) \| mfu: (\d+\.\d)%$', out, re.M)
    assert [int(s[0]) for s in steps] == list(range(12))
    logged = [m for m in metrics(place, 'out/log') if 'loss' in m]
    for (_, loss, lr, norm, *_), m in zip(steps, logged, strict=True):
        assert (loss, lr, norm) == (f'{m["loss"]:.6f}', f'{m["lr"]:.4e}', f'{m["norm"]:.4f}')
        assert m.keys() == {'step', 'loss', 'lr', 'norm', 'dt_ms', 'tok_per_sec', 'mfu', 'tokens', 'elapsed_s'}
    assert [m['step'] for m in metrics(place, 'out/log') if 'val_loss' in m] == [0, 6, 12]
    assert all(m['ppl'] == pytest.approx(math.exp(m['val_loss'])) for m in metrics(place, 'out/log') if 'ppl' in m)
    for m in metrics(place, 'out/log'):         # this text is ASCII, and its tokenizer one of characters
        assert 'val_loss' not in m or m['bits_per_byte'] == pytest.approx(m['val_loss'] / math.log(2))
    assert sorted(p.name for p in (place / 'out/log').glob('checkpoint_iter_*')) == [
        'checkpoint_iter_10.pt', 'checkpoint_iter_12.pt']
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(place / 'out/log/tb')).Reload()
    assert [e.value for e in board.Scalars('train/loss')] == pytest.approx([m['loss'] for m in logged])
    assert len(board.Scalars('validation/bits_per_byte')) == 3 and len(board.Scalars('speed/tok_per_sec')) == 12

    def text(tag):
        return [e.tensor_proto.string_val[0].decode() for e in board.Tensors(f'{tag}/text_summary')]

    assert '|max_steps|12|' in text('settings')[0]
    assert text('samples/1') == [m['samples'][1] for m in metrics(place, 'out/log') if 'samples' in m] and (
        f'sample 1: {text("samples/1")[0]}' in out)


def test_patience_ends_a_run_that_no_longer_improves_and_a_finished_one_stays_finished(place):
    options = ['--max_steps=60', '--eval_interval=5', '--learning_rate=0', '--min_lr=0']    # it cannot improve
    assert 'step    59' in train(place, 'out/impatient', *options)
    out = train(place, 'out/patient', *options, '--patience=3')
    assert 'no better validation loss since step 5: this is the end' in out
    assert [m['step'] for m in metrics(place, 'out/patient') if 'val_loss' in m] == [0, 5, 10, 15, 20]
    assert load_checkpoint(place / 'out/patient/final_checkpoint.pt')['iter_num'] == 20
    assert 'already finished at step 20' in train(place, 'out/patient', *options, '--patience=3')
    out = train(place, 'out/patient', *options, '--patience=5')
    assert 'resuming' in out and [m['step'] for m in metrics(place, 'out/patient') if 'val_loss' in m][-1] == 30
    learning = train(place, 'out/learning', '--max_steps=30', '--eval_interval=5', '--patience=3')
    assert 'this is the end' not in learning and 'step    29' in learning


def test_a_terminal_has_a_line_at_its_bottom_and_a_log_has_not(place):
    pty = pytest.importorskip('pty')
    code = (f'import pty, sys; sys.exit(pty.spawn([{sys.executable!r}, {str(ROOT / "train.py")!r}, "--dataset=tiny", '
            f'"--out_dir=out/bottom", *{TINY!r}, "--max_steps=8", "--eval_interval=4", "--log_interval=4"]) >> 8)')
    done = subprocess.run([sys.executable, '-c', code], cwd=place, capture_output=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.decode().replace('\r\n', '\n').split('\n')
    assert done.returncode == 0, lines
    bottom = r'step \d/8 \| loss \d\.\d{4}( \| best val \d\.\d{4})? \| [\d,]+ tok/s \| \d\.\d min left'
    assert pty and any(re.fullmatch(bottom, part) for line in lines for part in line.split('\r'))
    assert lines[-2].split('\r')[-1].startswith('total time:')            # it is wiped out before other lines
    assert sum(line.split('\r')[-1].startswith('step     4 | loss: ') for line in lines) == 1
    assert not any('tok/s |' in line for line in train(place, 'out/log2', '--max_steps=4').splitlines())


def test_the_learning_rate_warms_up_linearly_and_decays_by_cosine(place):
    train(place, 'out/lr', '--max_steps=20', '--warmup_steps=5', '--eval_interval=0')
    lr = [m['lr'] for m in metrics(place, 'out/lr') if 'lr' in m]
    for step in range(20):
        expected = 1e-3 * (step + 1) / 5 if step < 5 else (
            1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * (step - 5) / 15)))
        assert lr[step] == pytest.approx(expected)


def test_steps_that_are_not_finite_never_reach_the_weights(place):
    train(place, 'out/nan', '--max_steps=3', '--eval_interval=0', '--dtype=float32')
    path = place / 'out/nan/checkpoint.pt'
    checkpoint = torch.load(path, weights_only=True)
    good = {k: v.clone() for k, v in checkpoint['model'].items()}
    # a row of data that no model can digest: one embedding is so large that no step which meets it is finite
    checkpoint['model']['transformer.wpe.weight'][5] = 3e38
    torch.save(checkpoint, path)
    done = run(place, 'train.py', '--dataset=tiny', '--out_dir=out/nan', *TINY, '--max_steps=100',
                  '--eval_interval=0', '--dtype=float32', '--init_from=resume')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert '10 steps in a row were not finite' in done.stderr and 'lower --learning_rate' in done.stderr
    after = load_checkpoint(path)['model']
    assert all(torch.equal(after[k], good[k]) for k in good if 'wpe' not in k)


def test_overfitting_one_batch_drives_the_loss_below_a_twentieth(place):
    assert run(place, 'prepare_data.py').returncode == 0
    done = run(place, 'train.py', str(ROOT / 'config/overfit_one_batch.py'), '--tensorboard=false')
    assert done.returncode == 0, done.stderr
    assert losses(place, 'out/overfit_one_batch')[180] < 0.05


def test_the_26m_recipe_has_26m_parameters_and_trains_on_real_text(place):
    # the standard library's own source and comments: real text on every machine
    library = sorted(Path(os.__file__).parent.glob('*.py'))
    (place / 'library.txt').write_text('\n'.join(p.read_text(encoding='utf-8', errors='ignore') for p in library),
                                       encoding='utf-8')
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=library.txt', '--tokenizer=bpe',
                  '--vocab_size=32768', '--out=data/library')
    assert done.returncode == 0, done.stderr
    done = run(place, 'train.py', str(ROOT / 'config/train_26m.py'), '--dataset=library', '--max_steps=2',
                  '--batch_size=2', '--total_batch_size=2048', '--eval_iters=2', '--tensorboard=false')
    assert done.returncode == 0, done.stderr
    parameters = int(re.search(r'^([\d,]+) parameters', done.stdout, re.M)[1].replace(',', ''))
    assert abs(parameters - 26e6) < 0.04 * 26e6
    assert len(re.findall(r'ppl: \d', done.stdout)) == 2


def test_further_training_starts_from_another_runs_weights(place):
    train(place, 'out/base', '--max_steps=5', '--eval_interval=0', '--dtype=float32')
    out = train(place, 'out/further', '--init_from=out/base', '--block_size=16', '--max_steps=3', '--dtype=float32',
                '--n_layer=7')                          # the shape comes from the checkpoint
    assert 'starting from the weights of' in out
    model = build_model(load_checkpoint(place / 'out/further/final_checkpoint.pt'))
    assert (model.config.n_layer, model.config.block_size) == (2, 16)
    assert losses(place, 'out/further')[0] < losses(place, 'out/base')[0]


def test_no_copy_is_left_to_itself_that_may_read_memory_given_back(place):
    # from memory that is not pinned, such a copy to a Mac's GPU may find something else there by the time it begins
    careful = patched(place, 'import torch\nto = torch.Tensor.to\ndef careful(tensor, *args, **options):\n'
                      '    assert not options.get("non_blocking") or tensor.is_pinned()\n'
                      '    return to(tensor, *args, **options)\ntorch.Tensor.to = careful')
    done = run(place, careful, 'train.py', '--dataset=tiny', '--out_dir=out/careful', *TINY, '--max_steps=2')
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_is_what_the_weights_were_when_it_was_asked_for():
    w = torch.ones(3)
    copied = own_copy({'model': {'wte': w, 'lm_head': w, 'part': w[:2]}, 'optimizer': [{'state': {0: w.clone()}}]})
    w.zero_()                                                       # training goes on
    assert [t.tolist() for t in copied['model'].values()] == [[1, 1, 1], [1, 1, 1], [1, 1]]
    assert copied['optimizer'][0]['state'][0].tolist() == [1, 1, 1]
    assert copied['model']['wte'] is copied['model']['lm_head']     # tied weights take the room of one


def test_a_checkpoint_holds_each_weight_and_its_two_moments_once(place):
    train(place, 'out/size', '--max_steps=2', '--eval_interval=0', '--n_embd=128')
    path = place / 'out/size/checkpoint.pt'
    n = build_model(load_checkpoint(path)).num_params()
    assert 12 * n < path.stat().st_size < 12.3 * n + 50_000         # beside the tensors, some 300 bytes for each


def test_what_goes_wrong_with_a_checkpoint_is_raised_once(tmp_path):
    saver = BackgroundSaver(tmp_path / 'none', keep=0)
    saver.save({'model': {}}, ['a.pt'])
    with pytest.raises(UserError, match='cannot write'):
        saver.save({'model': {}}, ['a.pt'])
    saver.finish()


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs to see what is mapped')
def test_a_resumed_run_keeps_no_file_that_it_was_read_from(tmp_path):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=50))
    optimizer, = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', verbose=False)
    model(*torch.randint(50, (2, 1, 8)))[1].backward()
    optimizer.step()
    state = optimizer.state_dict()
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_args': model.model_args(), 'optimizer': [state]},
                    ['checkpoint.pt'])
    loaded = load_checkpoint(tmp_path / 'checkpoint.pt')
    assert 'checkpoint.pt' in Path('/proc/self/maps').read_text(encoding='utf-8')       # eight processes share it
    again, = build_model(loaded).configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', verbose=False)
    load_optimizer(again, loaded['optimizer'][0])
    del loaded
    assert 'checkpoint.pt' not in Path('/proc/self/maps').read_text(encoding='utf-8')
    assert all(torch.equal(a, b) for one, two in zip(state['state'].values(), again.state.values(), strict=True)
               for a, b in zip(one.values(), two.values(), strict=True))


def test_a_crash_while_saving_leaves_the_checkpoint_before_it(place):
    train(place, 'out/crash', '--max_steps=4', '--eval_interval=0')
    out = place / 'out/crash'
    (out / 'checkpoint.pt.tmp').write_bytes(b'half a file')             # as a crash in the middle of writing leaves it
    damaged = (out / 'checkpoint.pt').read_bytes()
    (out / 'checkpoint.pt').unlink()                                    # its other names keep the old content
    flipped = bytearray(damaged)
    flipped[len(flipped) // 2] ^= 1
    (out / 'checkpoint.pt').write_bytes(flipped)
    done = run(place, 'train.py', '--dataset=tiny', '--out_dir=out/crash', *TINY, '--max_steps=6',
                  '--eval_interval=0')
    assert done.returncode == 0, done.stderr
    assert 'checkpoint.pt is damaged' in done.stderr and '_checkpoint.pt at step 4' in done.stdout


def test_a_finished_run_is_left_as_it_is_and_a_resumed_one_says_what_changed(place):
    options = ['--eval_interval=0', '--dtype=float32', '--preset=teaching', '--n_layer=1', '--mlp=swiglu',
               '--n_embd=32', '--block_size=32']
    train(place, 'out/done', *options, '--max_steps=3')
    model = build_model(load_checkpoint(place / 'out/done/final_checkpoint.pt'))
    assert (model.config.n_layer, model.config.mlp, model.config.norm) == (1, 'swiglu', 'rmsnorm')    # later wins

    before = [(p, p.read_bytes(), p.stat().st_mtime_ns) for p in (place / 'out/done').iterdir()]
    changed = ['--learning_rate=1e-4', '--dropout=0.3']
    out = train(place, 'out/done', *options, *changed, '--max_steps=3')
    assert out.endswith('already finished at step 3; raise --max_steps or choose another --out_dir\n')
    assert before == [(p, p.read_bytes(), p.stat().st_mtime_ns) for p in (place / 'out/done').iterdir()]
    out = train(place, 'out/done', *options, *changed, '--max_steps=5')
    assert 'at step 3, with dropout 0.0 -> 0.3, learning_rate 0.001 -> 0.0001, max_steps 3 -> 5\n' in out


def test_mfu_stays_below_all_there_is_even_if_the_peak_was_timed_on_a_busy_machine(place):
    busy = patched(place, 'import device\ndevice.peak_flops = lambda *_: 1.0')
    done = run(place, busy, 'train.py', '--dataset=tiny', '--out_dir=out/busy', *TINY, '--max_steps=3',
               '--eval_interval=0')
    assert done.returncode == 0, done.stderr
    mfu = [m['mfu'] for m in metrics(place, 'out/busy') if 'mfu' in m]
    assert mfu[0] == 1 and max(mfu) <= 1


def test_the_time_to_finish_is_said_again_when_it_has_changed():
    clock, said = 0, {}
    time_to_finish = TimeToFinish()
    for step in range(1000):
        seconds = 1 if step < 300 else 5                        # from here on, somebody else uses the machine
        clock += seconds
        minutes = time_to_finish(seconds, 999 - step, now=clock)
        if minutes is not None:
            said[step] = minutes * 60
    assert said[9] == 990 and len(said) == 2                    # once, and once more
    (_, again), = ((step, s) for step, s in said.items() if step > 9)
    assert again == pytest.approx(5 * 690, rel=0.02)


# -----------------------------------------------------------------------------
# GPT-2's own tokenizer, published weights, HellaSwag, and many processes

GPT2 = ['--dataset=words', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=2',
        '--total_batch_size=256', '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_steps=2', '--eval_iters=4',
        '--device=cpu', '--dtype=float32', '--max_steps=8', '--eval_interval=4', '--hellaswag_interval=4',
        '--hellaswag_data=questions.jsonl', '--sample_interval=4', '--sample_tokens=8',
        "--sample_prompt=Hello, I'm a language model,"]


@pytest.fixture(scope='module')
def words(place):
    """The same prose in GPT-2's tokens, and questions like HellaSwag's."""
    done = run(place, 'prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=gpt2',
                  '--out=data/words')
    assert done.returncode == 0, done.stderr
    sentences = re.findall(r'[^.\n]{20,80}', (place / 'text.txt').read_text(encoding='utf-8'))[:100]
    rows = [{'ctx': sentences[i], 'endings': sentences[i + 1:i + 5], 'label': str(i % 4)} for i in range(0, 95, 5)]
    (place / 'questions.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    done = run(place, 'train.py', *GPT2, '--out_dir=out/words')
    assert done.returncode == 0, done.stderr
    return place


def numbers(place, out):
    """{(step, key): value} of all that must not depend on how many processes there are."""
    return {(m['step'], key): m[key] for m in metrics(place, out) for key in ('loss', 'norm', 'val_loss', 'hellaswag')
            if key in m}


def same_numbers(place, a, b):
    a, b = numbers(place, a), numbers(place, b)
    assert a.keys() == b.keys() and len(a) == 8 * 2 + 3 + 2
    for key in a:
        assert b[key] == pytest.approx(a[key], rel=1e-4 if key[1] == 'norm' else 1e-5), key
    return True


def test_a_run_of_gpt2s_recipe_evaluates_asks_hellaswag_samples_and_resumes(words):
    out = run(words, 'train.py', *GPT2, '--out_dir=out/resumed', '--max_steps=8').stdout
    assert re.search(r'^HellaSwag accuracy: (\d+)/19=0\.\d{4}$', out, re.M) and out.count('HellaSwag accuracy') == 2
    assert out.count("sample 0: Hello, I'm a language model,") == 2
    hellaswag = [m['hellaswag'] for m in metrics(words, 'out/resumed') if 'hellaswag' in m]
    assert [f'{x:.4f}' for x in hellaswag] == re.findall(r'HellaSwag accuracy: .*=(.*)', out)
    (words / 'out/resumed/final_checkpoint.pt').unlink()
    # back to step 4, which the best checkpoint may not be: take the numbered one
    run(words, 'train.py', *GPT2, '--out_dir=out/cut', '--checkpoint_interval=4')
    for path in (words / 'out/cut').glob('*.pt'):
        if path.name != 'checkpoint_iter_4.pt':
            path.unlink()
    done = run(words, 'train.py', *GPT2, '--out_dir=out/cut')
    assert 'at step 4' in done.stdout, done.stderr
    assert numbers(words, 'out/cut') == numbers(words, 'out/words')


@pytest.mark.parametrize('options', [(), ('--zero=1',), ('--zero=1', '--optimizer=muon')], ids=str)
def test_two_processes_give_the_same_losses_and_accuracies_with_and_without_zero(words, options):
    name = 'out/both' + '-'.join(options)
    one = 'out/words'
    if 'muon' in name:
        one = 'out/muon'
        run(words, 'train.py', *GPT2, '--optimizer=muon', f'--out_dir={one}')
    done = run(words, 'train.py', *GPT2, *options, f'--out_dir={name}', processes=2)
    assert done.returncode == 0, done.stderr
    assert same_numbers(words, one, name)


def test_zero_halves_the_optimizer_state_of_two_processes(place):
    options = ['--max_steps=2', '--eval_interval=0', '--n_embd=128']
    sizes = {}
    for zero in (0, 1):
        out = train(place, f'out/state{zero}', *options, f'--zero={zero}', processes=2)
        sizes[zero] = [float(s) for s in re.search(r'optimizer state in each process: (.*) MB', out)[1].split(', ')]
    whole = sum(t.numel() * t.element_size() for o in load_checkpoint(place / 'out/state0/checkpoint.pt')['optimizer']
                for values in o['state'].values() for t in values.values()) / 1e6
    assert whole > 3 and sizes[0] == pytest.approx([whole, whole], abs=0.1)
    assert sizes[1] == pytest.approx([whole / 2, whole / 2], rel=0.1)


def test_a_run_with_zero_goes_on_without_it_and_the_reverse(words):
    halfway = ['--checkpoint_interval=4', '--keep_checkpoints=0']
    for first, then in ((2, 1), (1, 2)):
        out = f'out/zero{first}{then}'
        run(words, 'train.py', *GPT2, *halfway, f'--out_dir={out}', '--zero=1', processes=first)
        for path in (words / out).glob('*.pt'):
            if path.name != 'checkpoint_iter_4.pt':
                path.unlink()
        done = run(words, 'train.py', *GPT2, f'--out_dir={out}', '--zero=1', processes=then)
        assert 'at step 4' in done.stdout, done.stderr
        assert same_numbers(words, 'out/words', out)


def machines(place, folders, *args):
    """Two torchrun agents that meet on loopback, as two machines do over a network; their outputs."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
              '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', '--local_addr=127.0.0.1']
    agents = [subprocess.Popen([*launch, str(ROOT / 'train.py'), *args], cwd=place / folder,
                               text=True, encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
              for folder in folders]
    return [(agent.communicate(timeout=200)[0], agent.returncode) for agent in agents]


def test_two_machines_give_the_losses_of_one_and_need_a_common_folder_to_resume(words):
    for name in ('machine1', 'machine2'):           # each with its own copy of the data, and its own disk
        shutil.copytree(words / 'data', words / name / 'data')
        shutil.copy(words / 'questions.jsonl', words / name)
    outputs = machines(words, ['machine1', 'machine2'], *GPT2, '--out_dir=out/run')
    assert [status for _, status in outputs] == [0, 0], outputs
    ran = [name for name in ('machine1', 'machine2') if (words / name / 'out/run/metrics.jsonl').exists()]
    assert len(ran) == 1                            # one process writes
    assert same_numbers(words, 'out/words', f'{ran[0]}/out/run')
    outputs = machines(words, ['machine1', 'machine2'], *GPT2, '--out_dir=out/run', '--max_steps=9')
    assert all(status for _, status in outputs)
    assert any('must be one folder for all' in text for text, _ in outputs), outputs


def test_finetuning_published_weights_starts_there_and_goes_on_where_it_stopped(words):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50257, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(words / 'published')
    options = [*GPT2, '--init_from=published', '--out_dir=out/finetuned', '--hellaswag_interval=0']
    done = run(words, 'train.py', *options, '--dropout=0.1', '--max_steps=4')
    assert 'starting from the weights of published' in done.stdout, done.stderr
    assert '\nvalidation loss' in done.stdout.split('step     0')[0]            # before any training
    model = build_model(load_checkpoint(words / 'out/finetuned/checkpoint.pt'))
    assert (model.config.n_layer, model.config.block_size, model.config.vocab_size) == (1, 32, 50257)
    done = run(words, 'train.py', *options, '--dropout=0.1')
    assert 'resuming from' in done.stdout and 'at step 4' in done.stdout, done.stderr
    done = run(words, 'train.py', *options, '--dropout=0.1', '--init_from=resume', '--max_steps=10')
    assert 'at step 8' in done.stdout, done.stderr
    done = run(words, 'train.py', *options, '--block_size=16')
    assert done.returncode == 2 and 'block_size' in done.stderr
    before = (words / 'out/finetuned/checkpoint.pt').read_bytes()
    done = run(words, 'train.py', *options, '--init_from=out/finetuned/checkpoint.pt')      # not what it began with
    assert done.returncode == 2 and 'published' in done.stderr and '--out_dir' in done.stderr
    assert (words / 'out/finetuned/checkpoint.pt').read_bytes() == before
