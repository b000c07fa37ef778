"""A checkpoint -> a form for use elsewhere.

    python export.py --init_from=out/zh --format=int8

int8: a checkpoint about a quarter as large, which sample.py and eval_zh.py load as any other and which decodes faster
on a CPU. It holds weights only, each matrix as int8 with a scale for every row, and cannot be trained further.
"""

from pathlib import Path

import torch

from checkpoint import build_model, pick_checkpoint, write_atomically
from configurator import UserError, configure
from quantize import to_int8

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint file or folder; auto = out_dir, or the newest run in a folder of it
out_dir = 'out'             # where runs are
format = 'int8'             # int8
out = ''                    # the file to write; '' = int8.pt beside the checkpoint
config = configure(globals())
# -----------------------------------------------------------------------------


def main():
    if format != 'int8':
        raise UserError(f'format {format!r} is not one of int8')
    path, checkpoint = pick_checkpoint(init_from, out_dir)
    if checkpoint.get('quantized'):
        raise UserError(f'{path} is {checkpoint["quantized"]} already; export from the checkpoint it was made of')
    target = Path(out) if out else path.with_name('int8.pt')
    if not target.parent.is_dir():
        raise UserError(f'there is no folder for out={out!r}; make it first')
    model = build_model(checkpoint, path)
    kept = {key: checkpoint[key] for key in ('model_args', 'iter_num', 'config', 'tokenizer', 'tokenizer_fingerprint',
                                             'template') if key in checkpoint}
    float_bytes = 4 * model.num_params()
    kept |= {'model': to_int8(model).state_dict(), 'quantized': 'int8'}
    write_atomically(target, lambda f: torch.save(kept, f))
    size = target.stat().st_size
    print(f'{path}: {float_bytes / 1e6:.2f} MB of float32 weights')
    print(f'{target}: {size / 1e6:.2f} MB, {size / float_bytes:.3f} of that')


if __name__ == '__main__':
    main()
