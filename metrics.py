"""The numbers of a run, in out_dir/metrics.jsonl, one object a line, and TensorBoard; how far long work has come."""

import json
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from configurator import UserError
from files import write_text_atomically


GROUPS = {                  # where TensorBoard shows what; the rest is under train/
    'validation': ('val_loss', 'ppl', 'bits_per_byte', 'hellaswag', 'zh_heldout'),
    'speed': ('dt_ms', 'tok_per_sec', 'mfu', 'elapsed_s'),
}


class MetricsLog:
    """log(step, loss=..., lr=...) appends to both: numbers, or lists of texts. A run that resumes at `first_step` first
    drops what it is about to do again, so that each step stands there once. settings: what the run was started with,
    for TensorBoard. active=False, as in all processes but one, logs nothing."""

    def __init__(self, out_dir: str | Path, first_step: int = 0, tensorboard: bool = True, settings: dict | tuple = (),
                 active: bool = True):
        self.places, self.board = {}, None          # {where: the function that logs there}
        if not active:
            return
        file, self.folder = Path(out_dir, 'metrics.jsonl'), Path(out_dir, 'tb')
        try:
            lines = file.read_text(encoding='utf-8').splitlines() if first_step and file.exists() else []
            lines = [line for line in lines if line.endswith('}') and json.loads(line)['step'] < first_step]
            write_text_atomically(file, ''.join(f'{line}\n' for line in lines))
            self.places[file] = self._append
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.folder, purge_step=first_step)
                self.places[self.folder] = self._add_to_board
                rows = ''.join(f'|{name}|{value}|\n' for name, value in dict(settings).items())
                self.board.add_text('settings', f'|setting|value|\n|---|---|\n{rows}', first_step)
                # its thread hands on what goes wrong there to the next add_scalar(); no need to print it, too
                threading.excepthook = lambda e: e.exc_type is OSError or threading.__excepthook__(e)
        except OSError as e:
            raise UserError(f'cannot log to {e.filename or out_dir}: {e.strerror}; remove what is in the way, or '
                            'choose another --out_dir') from None

    def __call__(self, step: int, **values: float | list[str]) -> None:
        for place, write in list(self.places.items()):
            try:
                write(place, step, values)
            except OSError as e:        # a full disk: the run is worth more than its log
                self._give_up(place, e)

    def _give_up(self, place, error):
        if self.places.pop(place, None):
            print(f'warning: nothing more is logged to {place}: {error.strerror}', file=sys.stderr, flush=True)

    def _append(self, file, step, values):
        with open(file, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'step': step, **values}) + '\n')

    def _add_to_board(self, _, step, values):
        for key, value in values.items():
            group = next((group for group, keys in GROUPS.items() if key in keys), 'train')
            if isinstance(value, list):
                for i, text in enumerate(value):
                    self.board.add_text(f'{key}/{i}', text, step)
            else:
                self.board.add_scalar(f'{group}/{key}', value, step)

    def close(self) -> None:
        try:
            if self.board:
                self.board.close()
        except OSError as e:
            self._give_up(self.folder, e)


class TimeToFinish:
    """How long the steps of a run will still take: worth a line after the first ten, and whenever it has changed."""

    def __init__(self):
        self.recent, self.end = deque(maxlen=20), None      # seconds of the latest steps; when it was said to end

    def __call__(self, seconds: float, steps_left: int, now: float | None = None) -> float | None:
        """Minutes to say after a step that took `seconds`, or None while what was said is less than a quarter off."""
        now = time.monotonic() if now is None else now
        self.recent.append(seconds)
        left = self.left(steps_left)
        off = abs(now + left - self.end) if self.end else 0
        if len(self.recent) < 10 or self.end and off <= max(15, left / 4):
            return None
        self.end = now + left
        return left / 60

    def left(self, steps: int) -> float:
        """Seconds for so many steps, by those of late."""
        return statistics.median_low(self.recent) * steps


def progress_bar(**options) -> tqdm:
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
