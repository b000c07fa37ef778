"""The numbers of a run: out_dir/metrics.jsonl, one object a line, and the same for TensorBoard in out_dir/tb."""

import json
from pathlib import Path

from files import write_text_atomically


class MetricsLog:
    """log(step, loss=..., lr=...) appends to both. A run that resumes at `first_step` first drops what it is about to
    do again, so that each step stands there once."""

    def __init__(self, out_dir, first_step=0, tensorboard=True):
        self.file, self.writer = Path(out_dir, 'metrics.jsonl'), None
        lines = self.file.read_text(encoding='utf-8').splitlines() if first_step and self.file.exists() else []
        lines = [line for line in lines if line.endswith('}') and json.loads(line)['step'] < first_step]
        write_text_atomically(self.file, ''.join(f'{line}\n' for line in lines))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(Path(out_dir, 'tb'), purge_step=first_step)

    def __call__(self, step, **values):
        with open(self.file, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'step': step, **values}) + '\n')
        if self.writer:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def close(self):
        if self.writer:
            self.writer.close()
