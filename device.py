"""Where the numbers are crunched: the device, the dtype, the processes that share the work, and the speed limit."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configurator import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense matrix-multiply peaks in TFLOP/s from NVIDIA's data sheets, (16-bit with float32 accumulation, float32 or TF32).
PEAK_TFLOPS = {
    'B200': (2250, 1125), 'GH200': (989, 495), 'H200': (989, 495), 'H200 NVL': (835, 418), 'H100': (989, 495),
    'H100 NVL': (835, 418), 'H100 PCIe': (756, 378), 'H800': (989, 495), 'H800 PCIe': (756, 378), 'H20': (148, 74),
    'A100': (312, 156), 'A800': (312, 156), 'L40S': (362, 183), 'L40': (181, 90.5), 'L4': (121, 60), 'A10': (125, 62.5),
    'A10G': (70, 35), 'V100-SXM2': (125, 15.7), 'V100-PCIE': (112, 14), 'T4': (65, 8.1), 'RTX 5090': (209.5, 104.8),
    'RTX 4090': (165.2, 82.6), 'RTX 4090 D': (147, 73.5), 'RTX 3090': (71, 35.6),
}


def pick_device(name: str = 'auto', local_rank: int = 0) -> str:
    """The torch device string for `name` (auto, cpu, cuda, cuda:1, mps). Raises UserError if it is not there. From then
    on, a process that computes on the CPU shares it well with others."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == 'auto':              # processes that share the work cannot do so on mps
        name = 'cuda' if cuda else 'mps' if mps and 'LOCAL_RANK' not in os.environ else 'cpu'
    kind = name.partition(':')[0]
    here = ['cpu'] + ['cuda'] * cuda + ['mps'] * mps
    try:
        torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {name!r}; choose one of {', '.join(here)}, or auto") from None
    if kind not in here:
        raise UserError(f"device {name!r} is not available here; choose one of {', '.join(here)}, or auto")
    if kind == 'cuda':
        if name == 'cuda' and 'LOCAL_RANK' in os.environ:
            name = f'cuda:{local_rank}'
        index = torch.device(name).index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f'there is no {name}: this machine has {torch.cuda.device_count()} GPU(s); '
                            'lower --nproc_per_node or choose another device')
        torch.cuda.set_device(index)
    elif kind == 'cpu':
        sleep_in_company()
    return name


@functools.cache        # once is enough
def sleep_in_company() -> None:
    """From now on OpenMP's threads sleep while they wait for each other, as long as this process has to share its CPUs.

    Alone they had better spin: they wait for a few microseconds, ten thousand times a second. But one that spins may do
    so on the very CPU that another one needs, which was put aside for another program. libgomp spins next to not
    at all while it has more threads than CPUs, and idle ones are enough for that (gomp_throttled_spin_count_var in its
    config/linux/wait.h); so results stay the same to the last bit. Needs Linux, which tells how long a thread has
    waited; nothing happens elsewhere, or with one thread, which waits for nobody.
    """
    n_threads = torch.get_num_threads()
    if n_threads > 1 and waited_for_cpu():
        spare = len(os.sched_getaffinity(0)) - n_threads
        teams = max(0, spare) // (n_threads - 1) + 1        # whose threads are more than the spare CPUs
        threading.Thread(target=_watch_for_company, args=(teams,), daemon=True).start()


def waited_for_cpu() -> dict[str, int]:
    """{thread: nanoseconds that it could have run but had no CPU}, of this process; {} where nobody counts them."""
    waited = {}
    with contextlib.suppress(OSError, IndexError):
        for thread in os.listdir('/proc/self/task'):
            waited[thread] = int(Path(f'/proc/self/task/{thread}/schedstat').read_text(encoding='utf-8').split()[1])
    return waited


def _watch_for_company(teams, interval=0.5, share=0.1):
    company, before = None, waited_for_cpu()
    while True:
        time.sleep(interval)
        now = waited_for_cpu()
        crowded = any(now[t] - before.get(t, now[t]) > share * interval * 1e9 for t in now)
        before = now
        if crowded and company is None:
            company = threading.Event()
            for _ in range(teams):
                threading.Thread(target=_keep_a_team, args=(company,), daemon=True).start()
        elif not crowded and company is not None:
            company.set()
            company = None


def _keep_a_team(gone):
    torch.ones(1 << 17).add_(1)         # large enough to be shared: the team of threads stays until this one ends
    gone.wait()


def pick_dtype(name: str = 'auto', device: str = 'cpu') -> str:
    """'float32', 'bfloat16' or 'float16': with 'auto' the fastest that is safe on `device`. Raises UserError."""
    kind = torch.device(device).type
    if name == 'auto':
        if kind == 'cuda':      # Volta and Turing (7) claim bfloat16 but emulate it; older ones are slow in both
            generation, _ = torch.cuda.get_device_capability(device)
            return 'bfloat16' if generation >= 8 else 'float16' if generation == 7 else 'float32'
        if kind == 'mps':       # autocast is slower than float32 on most Macs; float16 and bfloat16 work if asked for
            return 'float32'
        return 'bfloat16' if cpu_multiplies_bfloat16() else 'float32'
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    if name == 'float16' and kind == 'cpu':
        raise UserError('float16 training needs a GPU; on a CPU use --dtype=bfloat16 or float32')
    return name


def pick_compile(choice: str, device: str, tokens: int) -> bool:
    """Whether to run the training step through torch.compile. choice: 'true', 'false', or 'auto': on a GPU, and on a
    CPU, on Linux, if the run is to see 2 million `tokens` or more, over which the half minute pays; wherever all is
    there that it needs."""
    if choice.lower() not in ('auto', 'true', 'false'):
        raise UserError(f'compile should be auto, true or false, not {choice!r}')
    kind = torch.device(device).type
    pays = kind == 'cuda' or kind == 'cpu' and sys.platform == 'linux' and tokens >= 2e6
    if choice.lower() != 'auto' or not pays:
        return choice.lower() == 'true'
    if kind == 'cpu':
        why_not = _compiling_fails()
    elif torch.cuda.get_device_capability(device) < (7, 0):
        why_not = 'torch.compile needs a GPU of compute capability 7.0'
    elif importlib.util.find_spec('triton') is None:
        why_not = 'torch.compile needs Triton'
    else:
        why_not = _lacking_for_triton() if os.name == 'posix' else ''
    if why_not and os.environ.get('RANK', '0') == '0':
        print(f'not compiling, which is slower: {why_not}', file=sys.stderr)
    return not why_not


def _compiling_fails():
    """What comes of the attempt to compile something small on a CPU: '' or the beginning of the error."""
    try:
        torch.compile(torch.sin)(torch.ones(16))
    except Exception as e:      # no C++ compiler or an old one, no headers, no room, ...: nobody lists them all
        return f'torch.compile fails here: {e}'.partition('\n')[0]
    return ''


def _lacking_for_triton():
    """What Triton's own small extension cannot be built without, if it is not there: '' or a sentence."""
    compilers = [os.environ['CC']] if 'CC' in os.environ else ['gcc', 'clang']
    if not any(map(shutil.which, compilers)):
        return 'torch.compile needs a C compiler'
    header = Path(sysconfig.get_path('include', 'posix_prefix'), 'Python.h')
    return '' if header.exists() else f"torch.compile needs Python's headers ({header}; the package python3-dev)"


def cpu_multiplies_bfloat16() -> bool:
    """True if this CPU has bfloat16 dot-product or matrix instructions (AVX512-BF16, AMX), not merely a conversion."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """The context in which the forward pass runs: matrix products in `dtype` ('float32' changes nothing)."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype])


def synchronize(device: str) -> None:
    """Wait until `device` has finished what it was given, so that a clock read next tells the truth."""
    kind = torch.device(device).type
    if kind == 'cuda':
        torch.cuda.synchronize()
    elif kind == 'mps':
        torch.mps.synchronize()


def listed_peak(gpu: str, dtype: str) -> float | None:
    """The data sheet's floating-point operations a second of the GPU that calls itself `gpu`, or None if it is not in
    the table above: not for other products whose names begin alike, nor for a part of one (MIG)."""
    found = [key for key in PEAK_TFLOPS
             if re.search(rf'\b{key}\b(?! (D|Ti|SUPER|Laptop|with Max-Q)\b)', gpu) and 'MIG' not in gpu]
    return 1e12 * PEAK_TFLOPS[max(found, key=len)][dtype == 'float32'] if found else None


def peak_flops(device: str, dtype: str) -> float:
    """The most floating-point operations a second that matrix products reach here: the data sheet's figure for a GPU
    listed above, otherwise the best of some large products timed now (less than a second, once)."""
    listed = torch.device(device).type == 'cuda' and listed_peak(torch.cuda.get_device_name(device), dtype)
    if listed:
        return listed
    n = 1024 if torch.device(device).type == 'cpu' else 4096
    a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    best = float('inf')
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / max(best, 1e-9)     # some clocks are coarse


# -----------------------------------------------------------------------------
# several processes, as torchrun starts them

def init_distributed(device_name: str) -> tuple[int, int, int]:
    """Join the process group that torchrun describes in the environment, if any: (rank, local_rank, world_size)."""
    if 'RANK' not in os.environ:
        return 0, 0, 1
    local_rank = int(os.environ['LOCAL_RANK'])
    here = torch.device(pick_device(device_name, local_rank))
    if here.type == 'mps':
        raise UserError('on a Mac, several processes can only share the work on the CPU: --device=cpu')
    # nccl wants a GPU for each process, and is not on Windows; gloo can do with less
    nccl = here.type == 'cuda' and device_name in ('auto', 'cuda') and dist.is_nccl_available()
    # torchrun --max_restarts keeps the store in which processes meet, and in it the addresses of those that have died
    store, rank, world_size = next(rendezvous('env://'))
    alone = os.environ.get('GROUP_WORLD_SIZE', '1') == '1'      # each machine counts only its own restarts
    start = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else 'any'
    dist.init_process_group('nccl' if nccl else 'gloo', store=dist.PrefixStore(f'start {start}', store), rank=rank,
                            world_size=world_size, device_id=here if nccl else None)
    return rank, local_rank, world_size


def from_everyone(value: Any) -> list:
    """What each process has for `value` (numbers, strings, lists), as a list in the order of their ranks."""
    everyones = [value]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, value)
    return everyones


def leave_distributed(status: int = 0) -> int:
    """Leave the process group, all together; nothing if there is none; returns `status`. With gloo the process ends
    here, with that status: its threads abort now and then if they are taken apart while another still listens."""
    if dist.is_initialized():
        dist.barrier()
        if dist.get_backend() == 'gloo':
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


def own_copy(value: Any, copies: dict | None = None) -> Any:
    """Nested dicts and lists, with copies on the CPU of the tensors in them; what was one tensor twice is so again."""
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {key: own_copy(v, copies) for key, v in value.items()}
    if isinstance(value, list):
        return [own_copy(v, copies) for v in value]
    if not torch.is_tensor(value):
        return value
    key = value.data_ptr(), value.shape, value.stride(), value.dtype
    if key not in copies or not value.numel():
        copies[key] = value.detach().to('cpu', copy=True)
    return copies[key]


def whole_state(optimizer: torch.optim.Optimizer) -> dict:
    """On process 0 a copy of optimizer.state_dict() on the CPU, of a ZeroRedundancyOptimizer with the states of all
    processes; the others get {}. To be called by all. (Its own consolidate_state_dict() sends byte by byte.)"""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not hasattr(optimizer, 'optim'):
        return {} if rank else own_copy(optimizer.state_dict())
    params = [p for group in optimizer.param_groups for p in group['params']]
    mine = {i: optimizer.optim.state[p] for i, p in enumerate(params) if p in optimizer.optim.state}
    kinds = {i: {name: (t.shape, t.dtype) for name, t in values.items()} for i, values in mine.items()}
    where = 'cpu' if dist.get_backend() == 'gloo' else params[0].device      # gloo cannot send from a GPU
    state = {}
    for owner, theirs in enumerate(from_everyone(kinds)):
        for i, tensors in theirs.items():
            for name, (shape, dtype) in tensors.items():
                if rank == owner and rank != 0:
                    dist.send(mine[i][name].to(where), dst=0)
                elif rank == 0 and rank != owner:
                    tensor = torch.empty(shape, dtype=dtype, device=where)
                    dist.recv(tensor, src=owner)
                    state.setdefault(i, {})[name] = tensor.cpu()
    if rank:
        return {}
    count = itertools.count()
    groups = [{**group, 'params': [next(count) for _ in group['params']]} for group in optimizer.param_groups]
    return {'state': state | own_copy(mine), 'param_groups': groups}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """optimizer.load_state_dict(state), with tensors of its own: what was read as a memory map would keep its file. And
    a ZeroRedundancyOptimizer leaves the step counts on the CPU, where a fused AdamW for a GPU does not find them, and
    keeps a second copy of all."""
    optimizer.load_state_dict(state)
    if hasattr(optimizer, 'optim'):
        optimizer.state.clear()
    for p, values in getattr(optimizer, 'optim', optimizer).state.items():
        values.update({key: t.to(p.device, copy=True) for key, t in values.items() if torch.is_tensor(t)})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """How many bytes the state of an optimizer takes in this process."""
    state = getattr(optimizer, 'optim', optimizer).state        # with ZeRO, the part of this process
    tensors = [t for values in state.values() for t in values.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def all_sum(values: list[float], device: str) -> list[float]:
    """The element-wise sum of a list of numbers over all processes, as a list of floats."""
    kind = torch.float32 if torch.device(device).type == 'mps' else torch.float64
    total = torch.tensor(values, dtype=kind, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


class Stopped(Exception):
    """Raised in all processes when an evaluation has been cut short."""


class StopSignal:
    """The signals that end a run, noted: `number` is the first that came here, or 0, `agreed` the one that all
    processes know of. One more ends the process at once, unless it comes so soon that a scheduler sent both."""
    SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
    PIPE = 13                                               # SIGPIPE: who read our output has gone
    PATIENCE = 2.0                                          # seconds

    def __init__(self, rank: int):
        self.number, self.agreed, self.rank, self.since = 0, 0, rank, 0.0
        self.bottom, self.shown = '', 0.0       # what show() keeps below all other lines, and since when

    def listen(self) -> None:
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self)                 # but under nohup a closed terminal stays ignored

    def __call__(self, number, frame):
        now = time.monotonic()
        if self.number and now - self.since > self.PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.number:
            self.number, self.since = number, now
            if self.rank == 0:          # not by print(), which the signal may have interrupted
                with contextlib.suppress(OSError):
                    os.write(1, b'stopping after this step; once more to quit at once\n')

    def say(self, text: str) -> None:
        """Print on rank 0. Where nobody reads it any more (| head, a closed terminal), the run is to stop."""
        self._print(f'{self._blank()}{text}\n{self.bottom}')

    def show(self, text: str, every: float = 0.2) -> None:
        """On a terminal, keep `text` as its last line, renewed every so many seconds, below what is said; '' ends."""
        if self.rank == 0 and sys.stdout.isatty() and (not text or time.monotonic() - self.shown > every):
            blank, self.bottom = self._blank(), text[:shutil.get_terminal_size().columns - 1]
            self._print(blank + self.bottom)
            self.shown = time.monotonic()

    def _blank(self):
        return f'\r{" " * len(self.bottom)}\r' if self.bottom else ''

    def _print(self, text):
        try:
            if self.rank == 0:
                print(text, end='', flush=True)
        except OSError:
            self.number = self.number or self.PIPE
            sys.stdout = open(os.devnull, 'w', encoding='utf-8')

    def flags(self) -> list[int]:
        """1 for the signal that came here, 0 for the others; their sums over all processes are for agree()."""
        return [int(self.number == number) for number in (*self.SIGNALS, self.PIPE)]

    def agree(self, sums: list[float]) -> None:
        self.agreed = next((number for number, n in zip((*self.SIGNALS, self.PIPE), sums, strict=True) if n), 0)
