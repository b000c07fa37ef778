"""Where the numbers are crunched: the device, the dtype, the processes that share the work, and the speed limit."""

import contextlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configurator import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense matrix-multiply peaks in TFLOP/s from NVIDIA's data sheets, (16-bit with float32 accumulation, float32 or TF32).
# The first name found in the device's name counts.
PEAK_TFLOPS = {
    'B200': (2250, 1125), 'H200': (989, 495), 'H100 NVL': (835, 418), 'H100 PCIe': (756, 378), 'H100': (989, 495),
    'H800': (989, 495), 'H20': (148, 74), 'A100': (312, 156), 'A800': (312, 156), 'L40S': (362, 183), 'L4': (121, 60),
    'A10G': (70, 35), 'A10': (125, 62.5), 'V100': (125, 15.7), 'T4': (65, 8.1),
    '5090': (209.5, 104.8), '4090': (165.2, 82.6), '3090': (71, 35.6),
}


def pick_device(name='auto', local_rank=0):
    """The torch device string for `name` (auto, cpu, cuda, cuda:1, mps). Raises UserError if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == 'auto':
        name = 'cuda' if cuda else 'mps' if mps else 'cpu'
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
    return name


def pick_dtype(name='auto', device='cpu'):
    """'float32', 'bfloat16' or 'float16': with 'auto' the fastest that is safe on `device`. Raises UserError."""
    kind = torch.device(device).type
    if name == 'auto':
        if kind == 'cuda':      # Volta and Turing claim bfloat16 but emulate it; Ampere (8.0) multiplies it
            return 'bfloat16' if torch.cuda.get_device_capability()[0] >= 8 else 'float16'
        if kind == 'mps':       # autocast is slower than float32 on most Macs; float16 and bfloat16 work if asked for
            return 'float32'
        return 'bfloat16' if cpu_multiplies_bfloat16() else 'float32'
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
    if name == 'float16' and kind == 'cpu':
        raise UserError('float16 training needs a GPU; on a CPU use --dtype=bfloat16 or float32')
    return name


def pick_compile(choice, device):
    """Whether to run the training step through torch.compile. choice: 'auto' (on a GPU), 'true' or 'false'."""
    if choice.lower() not in ('auto', 'true', 'false'):
        raise UserError(f'compile should be auto, true or false, not {choice!r}')
    return torch.device(device).type == 'cuda' if choice == 'auto' else choice.lower() == 'true'


def cpu_multiplies_bfloat16():
    """True if this CPU has bfloat16 dot-product or matrix instructions (AVX512-BF16, AMX), not merely a conversion."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device, dtype):
    """The context in which the forward pass runs: matrix products in `dtype` ('float32' changes nothing)."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=DTYPES[dtype])


def synchronize(device):
    """Wait until `device` has finished what it was given, so that a clock read next tells the truth."""
    kind = torch.device(device).type
    if kind == 'cuda':
        torch.cuda.synchronize()
    elif kind == 'mps':
        torch.mps.synchronize()


def peak_flops(device, dtype):
    """The most floating-point operations a second that matrix products reach here: the data sheet's figure for a GPU
    listed above, otherwise the best of some large products timed now (less than a second, once)."""
    if torch.device(device).type == 'cuda':
        name = torch.cuda.get_device_name(device)
        for key, (half, single) in PEAK_TFLOPS.items():
            if key in name:
                return 1e12 * (single if dtype == 'float32' else half)
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

def init_distributed(device_name):
    """Join the process group that torchrun describes in the environment, if any: (rank, local_rank, world_size)."""
    if 'RANK' not in os.environ:
        return 0, 0, 1
    on_cpu = device_name == 'cpu' or not torch.cuda.is_available()
    local_rank = int(os.environ['LOCAL_RANK'])
    if not on_cpu:
        pick_device('cuda', local_rank)     # before the group is made, so that nccl binds to the right GPU
    # torchrun --max_restarts keeps the store in which processes meet, and in it the addresses of those that have died
    store, rank, world_size = next(rendezvous('env://'))
    alone = os.environ.get('GROUP_WORLD_SIZE', '1') == '1'      # each machine counts only its own restarts
    start = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if alone else 'any'
    dist.init_process_group('gloo' if on_cpu else 'nccl', store=dist.PrefixStore(f'start {start}', store), rank=rank,
                            world_size=world_size)
    return rank, local_rank, world_size


def from_everyone(value):
    """What each process has for `value` (numbers, strings, lists), as a list in the order of their ranks."""
    everyones = [value]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, value)
    return everyones


def leave_distributed(status=0):
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


def load_optimizer(optimizer, state):
    """optimizer.load_state_dict(state), for a ZeroRedundancyOptimizer, too: that one leaves the step counts on the CPU,
    where a fused AdamW for a GPU does not find them, and keeps a second copy of all."""
    optimizer.load_state_dict(state)
    if hasattr(optimizer, 'optim'):
        optimizer.state.clear()
        for p, values in optimizer.optim.state.items():
            values.update({key: t.to(p.device) for key, t in values.items() if torch.is_tensor(t)})


def state_bytes(optimizer):
    """How many bytes the state of an optimizer takes in this process."""
    state = getattr(optimizer, 'optim', optimizer).state        # with ZeRO, the part of this process
    tensors = [t for values in state.values() for t in values.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def all_sum(values, device):
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

    def __init__(self, rank):
        self.number, self.agreed, self.rank, self.since = 0, 0, rank, 0.0

    def listen(self):
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

    def say(self, text):
        """Print on rank 0. Where nobody reads it any more (| head, a closed terminal), the run is to stop."""
        try:
            if self.rank == 0:
                print(text, flush=True)
        except OSError:
            self.number = self.number or self.PIPE
            sys.stdout = open(os.devnull, 'w', encoding='utf-8')

    def flags(self):
        """1 for the signal that came here, 0 for the others; their sums over all processes are for agree()."""
        return [int(self.number == number) for number in (*self.SIGNALS, self.PIPE)]

    def agree(self, sums):
        self.agreed = next((number for number, n in zip((*self.SIGNALS, self.PIPE), sums, strict=True) if n), 0)
