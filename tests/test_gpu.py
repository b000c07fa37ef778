"""What only a GPU can show. Skipped without CUDA; with it, a few minutes, offline, and nothing but requirements.txt and
pytest is needed:

    python -m pytest --noconftest -o addopts= -q -s tests/test_gpu.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hellaswag
from functions import LinearCrossEntropy
from model import GPT, PRESETS, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

ROOT = Path(__file__).resolve().parents[1]
SMALL = ['--dataset=tiny', '--device=cuda', '--n_layer=4', '--n_head=4', '--n_embd=256', '--block_size=256',
         '--batch_size=8', '--total_batch_size=4096', '--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_steps=5',
         '--max_steps=30', '--eval_interval=15', '--eval_iters=4', '--tensorboard=false']
CAN_COMPILE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)
HALF = 'bfloat16' if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else 'float16'


def script(place, name, *args, processes=1, **env):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return subprocess.run([sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *args], cwd=place,
                          env={**os.environ, **env}, text=True, encoding='utf-8', capture_output=True, timeout=240)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    from pydoc_data.topics import topics
    place = tmp_path_factory.mktemp('gpu')
    (place / 'text.txt').write_text(''.join(topics[name] for name in sorted(topics))[:400_000], encoding='utf-8')
    done = script(place, 'prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=char',
                  '--out=data/tiny')
    assert done.returncode == 0, done.stderr
    return place


def train(place, out, *args, **how):
    done = script(place, 'train.py', *SMALL, f'--out_dir=out/{out}', *args, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def losses(place, out, key='loss'):
    lines = map(json.loads, (place / 'out' / out / 'metrics.jsonl').read_text(encoding='utf-8').splitlines())
    return {line['step']: line[key] for line in lines if key in line}


@pytest.fixture(scope='module')
def plain(place):
    """The run that the others are held against: float32, not compiled."""
    train(place, 'plain', '--dtype=float32', '--compile=false')
    found = losses(place, 'plain')
    assert found[29] < 0.8 * found[0]
    return found


# -----------------------------------------------------------------------------
# training

@pytest.mark.parametrize('options', [
    ('--dtype=bfloat16', '--compile=false'), ('--dtype=float16', '--compile=false'),
    ('--dtype=float32', '--compile=true'), (f'--dtype={HALF}', '--compile=true'),
    (f'--dtype={HALF}', '--compile=true', '--batch_size=2')], ids=' '.join)
def test_lower_precision_and_compiling_change_no_loss_by_much(place, plain, options):
    if not CAN_COMPILE and '--compile=true' in options:
        pytest.skip('torch.compile needs capability 7.0')
    if HALF == 'float16' and '--dtype=bfloat16' in options:
        pytest.skip('this GPU only emulates bfloat16')
    out = '-'.join(options).replace('=', '')
    done = train(place, out, *options)
    found = losses(place, out)
    assert found.keys() == plain.keys() and 'not finite' not in done.stdout
    if ': skipped, ' in done.stdout:                    # float16 found its scale later: all comes a step or two later
        assert found[29] == pytest.approx(plain[29], rel=0.1)
        return
    assert all(found[step] == pytest.approx(plain[step], rel=0.03) for step in plain)
    print(f'\n{" ".join(options)}: at most {max(abs(found[s] / plain[s] - 1) for s in plain):.1%} from float32')


def test_the_loss_is_the_same_in_slices_at_once_and_compiled():
    torch.manual_seed(0)
    x = torch.randn(700, 64, device='cuda')
    weight, targets = torch.randn(3000, 64, device='cuda') * 0.1, torch.randint(3000, (700,), device='cuda')
    targets[::7] = -100
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, vocab_size=3000, block_size=700)).cuda()
    results = []
    for how in ('slices', 'whole', 'compiled'):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if how == 'slices':
            loss = LinearCrossEntropy.apply(a, w, targets, torch.float32, True)
        elif how == 'whole':
            loss = torch.nn.functional.cross_entropy(a @ w.t(), targets, ignore_index=-100, reduction='sum')
        elif not CAN_COMPILE:
            continue
        else:
            model.lm_head.weight = torch.nn.Parameter(weight.clone())
            loss, w = torch.compile(model.loss)(a[None], targets[None], 'sum'), model.lm_head.weight
        loss.backward()
        results.append((loss, a.grad, w.grad))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def test_float16_with_two_optimizers_scales_its_gradients_and_learns(place, plain):
    done = train(place, 'muon', '--dtype=float16', '--optimizer=muon', '--compile=false')
    found = losses(place, 'muon')
    assert found[29] < 0.8 * found[0] and 'not finite' not in done.stdout
    done = train(place, 'muon', '--dtype=float16', '--optimizer=muon', '--compile=false', '--max_steps=35')
    assert 'at step 30' in done.stdout and losses(place, 'muon')[34] < 0.8 * found[0]      # with scale and moments


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(place, plain):
    line = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--out_dir=out/killed', '--dtype=float32',
            '--compile=false']
    log = place / 'out/killed/metrics.jsonl'
    line += ['--max_steps=100000', '--min_lr=1e-3']
    with subprocess.Popen(line, cwd=place, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 100
            while not (log.exists() and '"step": 40,' in log.read_text(encoding='utf-8')):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()
    step = max(losses(place, 'killed')) + 1
    done = train(place, 'killed', '--dtype=float32', '--compile=false', '--min_lr=1e-3', f'--max_steps={step + 10}')
    assert f'at step {step}' in done.stdout
    train(place, 'whole', '--dtype=float32', '--compile=false', '--min_lr=1e-3', f'--max_steps={step + 10}')
    cut, whole = losses(place, 'killed'), losses(place, 'whole')
    assert list(cut) == list(whole)
    assert all(cut[s] == pytest.approx(whole[s], rel=0.01) for s in whole)
    print(f'\nresumed at {step}: losses within {max(abs(cut[s] / whole[s] - 1) for s in whole):.1e} of the whole run')


@pytest.mark.skipif(not CAN_COMPILE, reason='torch.compile needs capability 7.0')
def test_nothing_is_compiled_again_while_training_evaluates_and_samples(place):
    done = train(place, 'recompiles', '--compile=true', f'--dtype={HALF}', '--sample_interval=10', '--max_steps=20',
                 '--eval_interval=7', TORCH_LOGS='recompiles,graph_breaks')
    assert 'Recompiling' not in done.stderr and 'Graph break' not in done.stderr, done.stderr[-3000:]


def test_two_processes_on_one_gpu_have_the_losses_of_one(place, plain):
    for options in ((), ('--zero=1',)):
        out = f'two{len(options)}'
        done = train(place, out, '--dtype=float32', '--compile=false', '--device=cuda:0', *options, processes=2)
        assert all(losses(place, out)[s] == pytest.approx(plain[s], rel=1e-3) for s in plain), done.stdout
        done = train(place, out, '--dtype=float32', '--compile=false', '--max_steps=32', *options)     # and alone again
        assert 'at step 30' in done.stdout and losses(place, out)[31] < 0.8 * plain[0]
        assert losses(place, out, 'val_loss')[15] == pytest.approx(losses(place, 'plain', 'val_loss')[15], rel=1e-3)


# -----------------------------------------------------------------------------
# using a model

@pytest.fixture(scope='module')
def models():
    """The same model on the CPU and on the GPU, with weights large enough that its choices are clear."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, block_size=128, vocab_size=500, norm='rmsnorm',
                          position='rope', mlp='swiglu')).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    gpu = GPT(model.config).cuda().eval()
    gpu.load_state_dict(model.state_dict())
    return model, gpu


def test_decoding_is_that_of_the_cpu_in_float32_past_block_size_too(models):
    prompts = torch.randint(500, (3, 20), generator=torch.Generator().manual_seed(1))
    one, other = (m.generate(prompts.to(next(m.parameters()).device), 150, temperature=0).cpu() for m in models)
    assert torch.equal(one, other)


def test_hellaswag_chooses_as_on_the_cpu(models):
    g = torch.Generator().manual_seed(2)

    def ids(low, high):
        return tuple(torch.randint(500, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist())
    questions = [hellaswag.Question(ids(5, 60), tuple(ids(3, 30) for _ in range(4)), 0, {}) for _ in range(60)]
    cpu, gpu = ({a.index: a for a in hellaswag.evaluate(m, questions)} for m in models)
    for i in cpu:
        assert gpu[i].sums == pytest.approx(cpu[i].sums, rel=1e-4)
        assert hellaswag.smallest(gpu[i].means) == hellaswag.smallest(cpu[i].means)


def test_a_script_samples_on_the_gpu(place, plain):
    done = script(place, 'sample.py', '--init_from=out/plain', '--device=cuda', '--num_samples=3', '--prompt=The ')
    assert done.returncode == 0 and done.stdout.count('[Sample') == 3, done.stderr


# -----------------------------------------------------------------------------
# memory and speed: printed, to be written down

def test_what_a_step_of_gpt2_takes():
    total = torch.cuda.get_device_properties(0).total_memory
    for compiled in (False, CAN_COMPILE):
        batch_size = 16 if total > 30e9 else 4
        torch.cuda.reset_peak_memory_stats()
        model = GPT(GPTConfig(**PRESETS['gpt2'])).cuda()
        optimizer, = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cuda', verbose=False)
        step = torch.compile(model) if compiled else model
        idx = torch.randint(50257, (batch_size, 1025), device='cuda')
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            with torch.autocast('cuda', dtype=getattr(torch, HALF)):
                _, loss = step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated()
        assert loss.isfinite() and peak < total
        print(f'\nGPT-2 124M, {batch_size} x 1024, {HALF}, compile {compiled}: {peak / 1e9:.1f} GB, '
              f'{batch_size * 1024 / min(times):,.0f} tokens/s')
        del model, optimizer, step, loss
        torch.cuda.empty_cache()


def test_bench_measures_the_gpu(place):
    done = script(place, 'bench.py', '--device=cuda', '--preset=26m', '--turns=1')
    assert done.returncode == 0, done.stderr
    assert re.search(rf'training .*tokens/s.*MFU.* GB: .*{HALF}, compile: ', done.stdout), done.stdout
    assert len(re.findall(r'^(float32|bfloat16) .*tokens/s', done.stdout, re.M)) == 2
    print(f'\n{done.stdout}')
