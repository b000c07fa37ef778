"""device.py on machines that this one is not: GPUs, Macs, Windows, as far as they can be feigned."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from scripts import ROOT

import device
from configurator import UserError
from device import PEAK_TFLOPS, listed_peak, pick_compile, pick_device, pick_dtype


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(gpus=1, capability=(8, 0), mps=False, ...): torch says that it is on such a machine."""
    (tmp_path / 'Python.h').touch()
    for name in ('LOCAL_RANK', 'RANK', 'CC'):
        monkeypatch.delenv(name, raising=False)

    def be(gpus=0, capability=(8, 0), mps=False, triton=True, compilers=('gcc',), headers=True, local_rank=None):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda index: None)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: capability)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
        monkeypatch.setattr(device.importlib.util, 'find_spec', lambda name: triton or None)
        monkeypatch.setattr(shutil, 'which', lambda name: name if name in compilers else None)
        monkeypatch.setattr(device.sysconfig, 'get_path', lambda *_: str(tmp_path if headers else tmp_path / 'none'))
        if local_rank is not None:
            monkeypatch.setenv('LOCAL_RANK', str(local_rank))
    return be


def test_auto_is_cuda_then_mps_then_the_cpu_and_no_mps_for_several_processes(machine):
    for how, expected in [({'gpus': 1, 'mps': True}, 'cuda'), ({'mps': True}, 'mps'), ({}, 'cpu'),
                          ({'gpus': 4, 'local_rank': 3}, 'cuda:3')]:
        machine(**how)
        assert pick_device('auto', how.get('local_rank', 0)) == expected
    machine(mps=True, local_rank=0)
    assert pick_device('auto') == 'cpu'


@pytest.mark.parametrize('name, how, said', [
    ('cuda', {}, 'not available here; choose one of cpu'), ('mps', {'gpus': 1}, 'choose one of cpu, cuda'),
    ('cuda:2', {'gpus': 2}, 'this machine has 2 GPU'), ('auto', {'gpus': 2, 'local_rank': 5}, 'lower --nproc_per_node'),
    ('gpu', {'gpus': 1}, 'no device')])
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(machine, name, how, said):
    machine(**how)
    with pytest.raises(UserError, match=said):
        pick_device(name, how.get('local_rank', 0))


@pytest.mark.parametrize('where, how, expected', [
    ('cuda', {'gpus': 1, 'capability': (9, 0)}, 'bfloat16'), ('cuda', {'gpus': 1, 'capability': (8, 0)}, 'bfloat16'),
    ('cuda', {'gpus': 1, 'capability': (7, 5)}, 'float16'), ('cuda', {'gpus': 1, 'capability': (6, 1)}, 'float32'),
    ('mps', {'mps': True}, 'float32')])
def test_auto_is_the_fastest_dtype_that_is_safe(machine, where, how, expected):
    machine(**how)
    assert pick_dtype('auto', where) == expected


@pytest.mark.parametrize('how, lacking', [
    ({}, ''), ({'compilers': ('clang',)}, ''), ({'capability': (6, 1)}, 'compute capability 7.0'),
    ({'triton': False}, 'Triton'), ({'compilers': ('cc',)}, 'a C compiler'), ({'headers': False}, 'python3-dev')])
def test_compile_auto_is_on_where_all_is_there_that_it_needs(machine, capsys, how, lacking):
    machine(gpus=1, **how)
    assert pick_compile('auto', 'cuda', 1) == (not lacking)
    said = capsys.readouterr().err
    assert lacking in said and bool(said) == bool(lacking)
    assert pick_compile('true', 'cuda', 1) and not pick_compile('false', 'cuda', 1)


def test_compile_auto_is_on_for_long_runs_on_the_cpus_of_linux_if_it_works_there(machine, monkeypatch, capsys):
    machine()
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    assert pick_compile('auto', 'cpu', 2_000_000) and not pick_compile('auto', 'cpu', 1_999_999)
    assert not pick_compile('auto', 'mps', 10 ** 9)

    def broken(function):
        raise RuntimeError('no compiler\nand more')
    monkeypatch.setattr(torch, 'compile', broken)
    assert capsys.readouterr().err == '' and not pick_compile('auto', 'cpu', 2_000_000)
    assert capsys.readouterr().err == 'not compiling, which is slower: torch.compile fails here: no compiler\n'
    monkeypatch.setattr('sys.platform', 'darwin')
    assert not pick_compile('auto', 'cpu', 2_000_000) and capsys.readouterr().err == ''


def test_a_failure_of_compilation_names_the_way_without(tmp_path):
    code = ('import sys\nsys.path.insert(0, sys.argv[1])\nimport configurator\nimport torch\n'
            'def broken(graph, inputs):\n    raise RuntimeError("no such compiler\\nand more")\n'
            'torch.compile(torch.sin, backend=broken)(torch.ones(2))')
    done = subprocess.run([sys.executable, '-c', code, str(ROOT)], text=True, capture_output=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
    assert 'torch.compile failed' in done.stderr and '--compile=false' in done.stderr


# what torch.cuda.get_device_name() says, and the entry of the table that is meant
REAL_NAMES = {
    'NVIDIA H100 80GB HBM3': 'H100', 'NVIDIA H100 PCIe': 'H100 PCIe', 'NVIDIA H100 NVL': 'H100 NVL',
    'NVIDIA H200': 'H200', 'NVIDIA H200 NVL': 'H200 NVL', 'NVIDIA GH200 480GB': 'GH200', 'NVIDIA B200': 'B200',
    'NVIDIA H800': 'H800', 'NVIDIA H800 PCIe': 'H800 PCIe', 'NVIDIA H20': 'H20', 'NVIDIA A100-SXM4-80GB': 'A100',
    'NVIDIA A100-PCIE-40GB': 'A100', 'NVIDIA A100 80GB PCIe': 'A100', 'NVIDIA A800-SXM4-80GB': 'A800',
    'NVIDIA L4': 'L4', 'NVIDIA L40': 'L40', 'NVIDIA L40S': 'L40S', 'NVIDIA A10': 'A10', 'NVIDIA A10G': 'A10G',
    'Tesla V100-SXM2-16GB': 'V100-SXM2', 'Tesla V100-PCIE-32GB': 'V100-PCIE', 'Tesla T4': 'T4',
    'NVIDIA GeForce RTX 4090': 'RTX 4090', 'NVIDIA GeForce RTX 4090 D': 'RTX 4090 D',
    'NVIDIA GeForce RTX 3090': 'RTX 3090', 'NVIDIA GeForce RTX 5090': 'RTX 5090',
    # others, whose names begin or end alike
    'NVIDIA RTX A1000': None, 'NVIDIA T400 4GB': None, 'NVIDIA GeForce RTX 3090 Ti': None,
    'NVIDIA GeForce RTX 4090 Laptop GPU': None, 'NVIDIA A100-SXM4-40GB MIG 1g.5gb': None, 'NVIDIA RTX A4000': None,
    'NVIDIA GeForce RTX 5090 D': None, 'Tesla V100S-PCIE-32GB': None, 'NVIDIA T4G': None, 'AMD Instinct MI300X': None,
    'NVIDIA H100 80GB HBM3 MIG 1g.10gb': None, 'NVIDIA A30': None, 'NVIDIA L20': None, 'NVIDIA GeForce GT 1030': None,
}


def test_every_gpu_has_the_peak_of_its_own_data_sheet_or_none():
    for name, key in REAL_NAMES.items():
        for i, dtype in enumerate(('bfloat16', 'float32')):
            assert listed_peak(name, dtype) == (key and 1e12 * PEAK_TFLOPS[key][i]), name
    assert set(REAL_NAMES.values()) - {None} == PEAK_TFLOPS.keys()


@pytest.mark.parametrize('how, name, backend', [
    ({'gpus': 2, 'local_rank': 1}, 'auto', 'nccl'), ({'gpus': 2, 'local_rank': 1}, 'cuda', 'nccl'),
    ({'gpus': 1, 'local_rank': 1}, 'cuda:0', 'gloo'),       # two processes on one GPU
    ({'gpus': 2, 'local_rank': 1, 'nccl': False}, 'auto', 'gloo'),      # Windows
    ({'mps': True, 'local_rank': 1}, 'auto', 'gloo'), ({'local_rank': 1}, 'auto', 'gloo')])
def test_processes_meet_through_nccl_where_each_has_a_gpu_else_through_gloo(machine, monkeypatch, how, name, backend):
    begun = {}
    machine(**{key: value for key, value in how.items() if key != 'nccl'})
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr(torch.distributed, 'is_nccl_available', lambda: how.get('nccl', True))
    monkeypatch.setattr(device, 'rendezvous', lambda _: iter([(torch.distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda kind, **more: begun.update(kind=kind, **more))
    assert device.init_distributed(name) == (1, 1, 2) and begun['kind'] == backend
    assert begun['device_id'] == (torch.device('cuda:1') if backend == 'nccl' else None)


def test_several_processes_on_mps_are_refused(machine, monkeypatch):
    machine(mps=True, local_rank=0)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError, match='--device=cpu'):
        device.init_distributed('mps')


# -----------------------------------------------------------------------------
# the optimizer's state, divided over processes

ZERO = '''
import sys, time
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from device import init_distributed, load_optimizer, whole_state
from model import GPT, GPTConfig, PRESETS
rank, _, world_size = init_distributed('cpu')
torch.manual_seed(0)
model = GPT(GPTConfig(**{shape}))

def train(zero):
    torch.manual_seed(1)
    optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', {optimizer!r}, zero, verbose=False)
    for step in range({steps}):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for o in optimizers:
            o.step()
    return optimizers

weights = {{k: v.clone() for k, v in model.state_dict().items()}}
plain = train(False)
model.load_state_dict(weights)
divided = train(True)
begun = time.perf_counter()
states = [whole_state(o) for o in divided]
seconds = time.perf_counter() - begun
assert rank == 0 or [whole_state(o) for o in plain] + states == [{{}}] * 2 * len(plain)     # no copy that nobody needs
if rank == 0:
    for o, state in zip(plain, states, strict=True):
        whole = o.state_dict()
        assert [g['params'] for g in state['param_groups']] == [g['params'] for g in whole['param_groups']]
        assert state['param_groups'][0].keys() == whole['param_groups'][0].keys(), state['param_groups'][0].keys()
        assert state['state'].keys() == whole['state'].keys()
        for i, values in whole['state'].items():
            assert all(torch.equal(t, state['state'][i][name]) for name, t in values.items())
    begun = time.perf_counter()
    torch.save({{'model': model.state_dict(), 'optimizer': states}}, {out!r})
    print(f'gathered in {{seconds:.2f}} s, written in {{time.perf_counter() - begun:.2f}} s', flush=True)
dist.barrier()
states = torch.load({out!r}, weights_only=True)['optimizer']
before = [[t.clone() for values in o.optim.state.values() for t in values.values()] for o in divided]
for o, state, tensors in zip(divided, states, before, strict=True):
    for values in o.optim.state.values():
        for t in values.values():
            t.zero_()
    load_optimizer(o, state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, (t for v in o.optim.state.values() for t in v.values())))
print('the same', flush=True)
dist.barrier()
import os
os._exit(0)
'''


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_divided_state_is_the_whole_one_to_the_last_bit_there_and_back(tmp_path, optimizer):
    shape = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100)
    (tmp_path / 'zero.py').write_text(ZERO.format(root=str(ROOT), shape=shape, steps=3, optimizer=optimizer,
                                                  out=str(tmp_path / 'z.pt')), encoding='utf-8')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                           tmp_path / 'zero.py'], text=True, capture_output=True, env={**os.environ})
    assert done.returncode == 0 and done.stdout.count('the same') == 2, done.stderr[-3000:]


# Threads that spin 10 million times never sleep here, unless libgomp throttles them.
COMPANY = '''
import os, resource, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import device

share, waited, clock = 0.0, 0.0, time.monotonic()
def feigned():
    global waited, clock
    now = time.monotonic()
    waited, clock = waited + share * (now - clock), now
    return {'1': int(1e9 * waited)}
device.waited_for_cpu = feigned
device.pick_device('cpu')
device.pick_device('cpu')
x = torch.ones(1 << 17)

def look():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(300):
        x.add_(1)
    slept = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
    return len(os.listdir('/proc/self/task')), slept
seen = [look()]
for share, expected in ((0.3, 2), (0.0, 0)):
    deadline = time.monotonic() + 60
    while len(os.listdir('/proc/self/task')) != seen[0][0] + expected and time.monotonic() < deadline:
        time.sleep(0.1)
    seen.append(look())
print(*sum(seen, ()), x[0].item())
'''


@pytest.mark.skipif(not device.waited_for_cpu(), reason='nobody counts how long a thread waits')
def test_threads_sleep_at_barriers_in_company_and_spin_alone():
    done = subprocess.run([sys.executable, '-c', COMPANY, str(ROOT)], text=True, capture_output=True, timeout=200,
                          env={**os.environ, 'OMP_NUM_THREADS': '2', 'GOMP_SPINCOUNT': '10000000'})
    assert done.returncode == 0, done.stderr
    threads, slept, more, often, fewer, again, total = map(float, done.stdout.split())
    assert more == threads + 2 and fewer == threads and total == 901
    assert often > 100 > 10 * max(slept, again), done.stdout


def test_one_thread_waits_for_nobody_and_needs_no_watch():
    code = 'import sys, threading; sys.path.insert(0, sys.argv[1]); import device; device.pick_device("cpu"); ' \
           'print(threading.active_count())'
    done = subprocess.run([sys.executable, '-c', code, str(ROOT)], text=True, capture_output=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.stdout == '1\n', done.stderr
