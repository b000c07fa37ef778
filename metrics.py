"""The numbers of a run, in out_dir/metrics.jsonl, one object a line, and TensorBoard; how far long work has come."""

import json
import statistics
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from configurator import UserError
from files import write_text_atomically


class MetricsLog:
    """log(step, loss=..., lr=...) appends to both. A run that resumes at `first_step` first drops what it is about to
    do again, so that each step stands there once. active=False, as in all processes but one, logs nothing."""

    def __init__(self, out_dir, first_step=0, tensorboard=True, active=True):
        self.file, self.writer, self.active = Path(out_dir, 'metrics.jsonl'), None, active
        if not active:
            return
        try:
            lines = self.file.read_text(encoding='utf-8').splitlines() if first_step and self.file.exists() else []
            lines = [line for line in lines if line.endswith('}') and json.loads(line)['step'] < first_step]
            write_text_atomically(self.file, ''.join(f'{line}\n' for line in lines))
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(Path(out_dir, 'tb'), purge_step=first_step)
        except OSError as e:
            raise UserError(f'cannot log to {e.filename or out_dir}: {e.strerror}; remove what is in the way, or '
                            'choose another --out_dir') from None

    def __call__(self, step, **values):
        if not self.active:
            return
        try:
            with open(self.file, 'a', encoding='utf-8') as f:
                f.write(json.dumps({'step': step, **values}) + '\n')
            for key, value in values.items() if self.writer else ():
                self.writer.add_scalar(key, value, step)
        except OSError as e:        # a full disk: the run is worth more than its log
            print(f'warning: nothing more is logged to {self.file}: {e.strerror}', file=sys.stderr, flush=True)
            self.active = False

    def close(self):
        if self.writer:
            self.writer.close()


class TimeToFinish:
    """How long the steps of a run will still take: worth a line after the first ten, and whenever it has changed."""

    def __init__(self):
        self.recent, self.end = deque(maxlen=20), None      # seconds of the latest steps; when it was said to end

    def __call__(self, seconds, steps_left, now=None):
        """Minutes to say after a step that took `seconds`, or None while what was said is less than a quarter off."""
        now = time.monotonic() if now is None else now
        self.recent.append(seconds)
        left = statistics.median_low(self.recent) * steps_left
        off = abs(now + left - self.end) if self.end else 0
        if len(self.recent) < 10 or self.end and off <= max(15, left / 4):
            return None
        self.end = now + left
        return left / 60


def progress_bar(**options):
    """A tqdm bar on standard error; where that is no terminal but a log, a plain line every half minute."""
    if sys.stderr.isatty():
        return tqdm(delay=1, **options)
    return tqdm(file=_Lines(), mininterval=30, delay=30, **options,
                bar_format='{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]')


class _Lines:
    """A file that makes lines of what a bar writes over and over."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass
