"""A checkpoint -> a form for use elsewhere.

    python export.py --init_from=out/zh --format=int8
    python export.py --init_from=out/gpt2 --format=hf --out=my-gpt2 [--push=user/name]

int8: a checkpoint about a quarter as large, which sample.py and eval_zh.py load as any other and which decodes faster
on a CPU. It holds weights only, each matrix as int8 with a scale for every row, and cannot be trained further.
hf: a folder that `transformers` loads with no code of ours: GPT-2 shapes as GPT2LMHeadModel, Llama-class shapes as
LlamaForCausalLM, with the tokenizer and a model card. The way back: --init_from=FOLDER.
"""

import os
from dataclasses import asdict
from pathlib import Path

from configurator import UserError, configure, first_line      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import build_model, pick_checkpoint, tokenizer_of
from download import offline
from files import write_atomically
from huggingface import save_folder
from quantize import to_int8

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint, a published model, or a folder; auto = out_dir, or the newest run in it
out_dir = 'out'             # where runs are
format = 'int8'             # int8 or hf
out = ''                    # what to write; '' = int8.pt, or the folder hf, beside the checkpoint
push = ''                   # for hf: upload the folder to this user/name on the Hugging Face hub, too
config = configure(globals(), one_of={'format': ('int8', 'hf')})
# -----------------------------------------------------------------------------


def export_int8(path, checkpoint, target):
    model = build_model(checkpoint, path)
    kept = {key: checkpoint[key] for key in ('model_args', 'iter_num', 'config', 'tokenizer', 'tokenizer_fingerprint',
                                             'template', 'start', 'eot') if key in checkpoint}
    float_bytes = 4 * model.num_params()
    kept |= {'model': to_int8(model).state_dict(), 'quantized': 'int8'}
    write_atomically(target, lambda f: torch.save(kept, f))
    size = target.stat().st_size
    print(f'{path}: {float_bytes / 1e6:.2f} MB of float32 weights')
    print(f'{target}: {size / 1e6:.2f} MB, {size / float_bytes:.3f} of that')


def export_hf(path, checkpoint, target):
    if target.exists() and (not target.is_dir() or any(target.iterdir()) and not (target / 'config.json').is_file()):
        raise UserError(f'{target} holds something else than an export; choose another --out')
    model, tokenizer = build_model(checkpoint, path), tokenizer_of(checkpoint, path)
    save_folder(target, asdict(model.config), model.state_dict(), tokenizer, tokenizer.start,
                checkpoint.get('template', ''), model_card(path, checkpoint, model))
    print(f'{target}: {model.num_params():,} parameters, for AutoModelForCausalLM.from_pretrained({str(target)!r})')


def model_card(path, checkpoint, model):
    """README.md of the folder: what the model is and how it was trained, as far as the checkpoint says."""
    settings, shape = checkpoint.get('config', {}), model.config
    facts = {'parameters': f'{model.num_params():,}',
             'shape': f'{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} channels, context '
                      f'{shape.block_size:,}, vocabulary {shape.vocab_size:,}',
             'made from': Path(path).name}
    if settings:
        steps, per_step = checkpoint.get('iter_num', 0), settings.get('total_batch_size', 0)
        started = settings.get('init_from')
        facts |= {'training data': settings.get('dataset'), 'optimizer steps': f'{steps:,}',
                  'tokens per step': f'{per_step:,}' if per_step else None,
                  'tokens in all': f'{steps * per_step:,}' if per_step else None,
                  'optimizer': settings.get('optimizer'), 'peak learning rate': settings.get('learning_rate'),
                  'weight decay': settings.get('weight_decay'),
                  'started from': started if started not in ('auto', 'scratch', 'resume') else None}
    if checkpoint.get('best_val_loss', float('inf')) < float('inf'):
        facts['best validation loss'] = f'{checkpoint["best_val_loss"]:.4f}'
    rows = ''.join(f'| {name} | {value} |\n' for name, value in facts.items() if value not in (None, ''))
    return ('---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# A GPT\n\n| | |\n|---|---|\n'
            + rows + '\n```python\nfrom transformers import pipeline\n\n'
              "print(pipeline('text-generation', 'THIS FOLDER')('Once upon a time', max_new_tokens=50))\n```\n\n"
              'It continues text as its training data go on. It has not been tuned to be safe or truthful.\n')


def upload(folder, repo):
    """Put the folder on the hub as `repo`. Raises UserError, and leaves the folder, if that cannot be."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError
    try:
        api = HfApi(endpoint=os.environ.get('HF_ENDPOINT') or None)
        api.whoami()
        api.create_repo(repo, exist_ok=True)
        print(api.upload_folder(repo_id=repo, folder_path=folder))
    except LocalTokenNotFoundError:
        raise UserError(f'{folder} is written, but nobody is logged in to the hub: run `hf auth login`, or set '
                        'HF_TOKEN') from None
    except Exception as e:                          # of whatever library it talks through: no network, no right, ...
        why = first_line(e)
        raise UserError(f'{folder} is written, but the hub did not take it as {repo}: {why}') from None


def main():
    if push:
        if format != 'hf':
            raise UserError('push uploads a Hugging Face folder: say --format=hf')
        if offline():
            raise UserError(f'{offline()} forbids --push; unset the variable')
    path, checkpoint = pick_checkpoint(init_from, out_dir)
    if checkpoint.get('quantized'):
        raise UserError(f'{path} is {checkpoint["quantized"]} already; export from the checkpoint it was made of')
    beside = Path(out_dir) if not Path(path).exists() else Path(path) if Path(path).is_dir() else Path(path).parent
    target = Path(out) if out else beside / ('int8.pt' if format == 'int8' else 'hf')
    if not target.parent.is_dir():
        raise UserError(f'there is no folder for out={str(target)!r}; make it first')
    if format == 'int8':
        export_int8(path, checkpoint, target)
    else:
        export_hf(path, checkpoint, target)
        if push:
            upload(target, push)


if __name__ == '__main__':
    main()
