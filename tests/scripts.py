"""The project's scripts, run as their users run them: as processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(name, *args, processes=1):
    """The command line of a script, or with processes=2 of two by torchrun."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name), *map(str, args)]


def run(place, name, *args, processes=1, env=None, **options):
    """The finished process of a script that ran in the folder `place`; env: variables to add or change."""
    options = dict(text=True, encoding='utf-8', capture_output=True, timeout=300, stdin=subprocess.DEVNULL) | options
    if 'input' in options:
        del options['stdin']
    return subprocess.run(command(name, *args, processes=processes), cwd=place, env={**os.environ, **(env or {})},
                          **options)
