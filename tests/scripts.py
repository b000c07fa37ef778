"""The project's scripts, run as their users run them: as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from contextlib import suppress
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESS = {}            # the process that starts scripts for this one, as soon as there is one

# Starting a script takes seconds of imports, and there are hundreds of starts: here they are done once, before forking.
LAUNCHER = '''
import atexit, gc, json, os, runpy, signal, sys, threading, time
import numpy, pyarrow.parquet, safetensors.torch, tiktoken, tokenizers, torch, tqdm
try:
    import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.font_manager
except ImportError:
    pass
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    if 'wait' in job:
        deadline, pid = time.monotonic() + job['timeout'], 0
        while not pid and time.monotonic() < deadline:
            pid, status = os.waitpid(job['wait'], os.WNOHANG)
            time.sleep(0 if pid else 0.002)
        print(os.waitstatus_to_exitcode(status) if pid else 'late', flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)        # a job in the background may have it ignored
os.chdir(job['cwd'])
os.environ.clear()
os.environ.update(job['env'])
for fd in range(3):
    os.dup2(os.open(job['files'][fd], os.O_RDWR | os.O_CREAT), fd)
sys.stdin, sys.argv = open(0, encoding='utf-8'), job['argv']
sys.path[0] = os.path.dirname(job['argv'][0])
status = 0
try:
    try:
        runpy.run_path(job['argv'][0], run_name='__main__')
    except Exception:
        status = 1
        sys.excepthook(*sys.exc_info())
except BaseException as e:
    status = e.code or 0 if isinstance(e, SystemExit) else 130
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)        # to take all modules apart would take longer than the script
'''


def command(name, *args, processes=1):
    """The command line of a script, or with processes=2 of two by torchrun."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, args)]


class Script:
    """A process of a script, running in the folder `place`. env: variables to add or change."""
    numbers = count()

    def __init__(self, place, name, *args, env=None, input=''):
        self.argv = [str(ROOT / name), *map(str, args)]
        self.mark = f'SCRIPT_UNDER_TEST={os.getpid()}.{next(self.numbers)}'      # its workers can be told by this
        self.files = [Path(tempfile.gettempdir(), f'{self.mark[18:]}.{end}') for end in ('in', 'out', 'err')]
        for path in self.files:
            path.write_text(input if path.suffix == '.in' else '', encoding='utf-8')
        env = {**os.environ, **(env or {}), **dict([self.mark.split('=')])}
        self.pid = int(_ask(argv=self.argv, cwd=os.path.abspath(place), env=env, files=list(map(str, self.files))))

    def send(self, signal_number, group=False):
        (os.killpg if group else os.kill)(self.pid, signal_number)

    def wait(self, timeout=300):
        """The exit status, once it has ended; (self.out, self.err) is what it said."""
        status = _ask(wait=self.pid, timeout=timeout)
        self.out, self.err = (path.read_text(encoding='utf-8') for path in self.files[1:])
        if status == 'late':
            self.send(signal.SIGKILL, group=True)
            raise subprocess.TimeoutExpired(self.argv, timeout, self.out, self.err)
        for path in self.files:
            path.unlink()
        return int(status)

    def kill(self):
        """End it and its workers, if they have not ended by themselves."""
        if self.files[0].exists():
            with suppress(ProcessLookupError):
                self.send(signal.SIGKILL, group=True)
            self.wait(10)

    def alive(self):
        """The process ids of its workers, where the system tells."""
        def marked(path):
            with suppress(OSError):
                return self.mark.encode() in path.read_bytes().split(b'\0')
        return [int(path.parent.name) for path in Path('/proc').glob('[0-9]*/environ') if marked(path)]


def _ask(**job):
    if os.getpid() not in PROCESS:
        PROCESS[os.getpid()] = subprocess.Popen([sys.executable, '-c', LAUNCHER], text=True, stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE)
    launcher = PROCESS[os.getpid()]
    launcher.stdin.write(json.dumps(job) + '\n')
    launcher.stdin.flush()
    return launcher.stdout.readline().strip()


def run(place, name, *args, processes=1, env=None, input='', timeout=300):
    """A script that has run in the folder `place`, as a CompletedProcess; env: variables to add or change."""
    if processes > 1 or not hasattr(os, 'fork'):
        return subprocess.run(command(name, *args, processes=processes), cwd=place, env={**os.environ, **(env or {})},
                              input=input, timeout=timeout, text=True, encoding='utf-8', capture_output=True)
    script = Script(place, name, *args, env=env, input=input)
    status = script.wait(timeout)
    return subprocess.CompletedProcess(script.argv, status, script.out, script.err)


def patched(place, code):
    """A script in the folder `place` that runs `code`, and then the script of ours that its first argument names."""
    path = Path(place, f'patched{zlib.crc32(code.encode())}.py')
    path.write_text(f'import os, runpy, sys\nsys.argv.pop(0)\nsys.path[0] = root = {str(ROOT)!r}\n{code}\n'
                    'runpy.run_path(os.path.join(root, sys.argv[0]), run_name="__main__")\n', encoding='utf-8')
    return path
