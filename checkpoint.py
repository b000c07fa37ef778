"""Checkpoints: save, verify, load, prune; where a run starts from. They hold tensors, numbers, strings, lists and
dicts, and nothing else, so that loading one never runs code. Writing is atomic: a crash leaves the old file or the new
one."""

import math
import os
import re
import shutil
import sys
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from configurator import UserError, first_line
from dataset import dataset_tokenizer, find_dataset
from device import DTYPES, from_everyone, load_optimizer
from files import beside, replace, write_atomically
from huggingface import GPT2_NAMES, is_published, load_published, near_folder, same_model
from layers import add_adapters, merge_adapters, to_int8
from model import GPT, GPTConfig
from tokenizer import AnyTokenizer, from_state

LATEST, BEST, FINAL = 'checkpoint.pt', 'best_checkpoint.pt', 'final_checkpoint.pt'

# -----------------------------------------------------------------------------
# on disk


def save_checkpoint(out_dir: str | Path, checkpoint: dict, names: list[str]) -> None:
    """Write `checkpoint` once and give it all of `names` in `out_dir` (hard links, or copies where there are none)."""
    first, *others = [Path(out_dir, name) for name in names]
    write_atomically(first, lambda f: torch.save(checkpoint, f))
    for other in others:
        tmp = beside(other, '.tmp')
        try:
            tmp.unlink(missing_ok=True)
            try:
                os.link(first, tmp)
            except OSError:
                shutil.copyfile(first, tmp)
            replace(tmp, other)
        except OSError as e:
            raise UserError(f'cannot write {other}: {e.strerror}; {first} is written') from None


def prune_checkpoints(out_dir: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoint_iter_N.pt in `out_dir`; keep=0 keeps all."""
    numbered = sorted((int(p.stem.rsplit('_', 1)[1]), p) for p in Path(out_dir).glob('checkpoint_iter_*.pt')
                      if re.fullmatch(r'checkpoint_iter_\d+', p.stem))
    for _, path in numbered[:-keep] if keep else []:
        path.unlink(missing_ok=True)


def average_with(before: str | Path, run: str | Path, share: float) -> None:
    """Make the weights of the run in folder `run` the average of themselves, with weight `share`, and of those in the
    folder `before`, which it began with: what fine-tuning made it forget comes mostly back, what it learned mostly
    stays (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"). Raises UserError."""
    (_, old), (_, taught) = pick_checkpoint('auto', before), pick_checkpoint('auto', run)
    taught['model'] = {name: torch.lerp(old['model'][name], new, share) for name, new in taught['model'].items()}
    save_checkpoint(run, taught, [LATEST, BEST, FINAL])


class BackgroundSaver:
    """Saves while training goes on, one checkpoint at a time, the `keep` newest numbered ones of which stay. What went
    wrong with one is raised by the next, or by finish(), which waits for it."""
    writing: Future | None = None

    def __init__(self, out_dir: str | Path, keep: int):
        self.out_dir, self.keep, self.pool = out_dir, keep, ThreadPoolExecutor(1)

    def save(self, checkpoint: dict, names: list[str]) -> None:
        """As save_checkpoint(); nobody may change the tensors of `checkpoint` any more, see own_copy()."""
        self.finish()
        self.writing = self.pool.submit(self._write, checkpoint, names)

    def finish(self) -> None:
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _write(self, checkpoint, names):
        save_checkpoint(self.out_dir, checkpoint, names)
        prune_checkpoints(self.out_dir, self.keep)


def load_checkpoint(path: str | Path) -> dict:
    """The dict in a checkpoint file, on the CPU. Raises UserError if it is missing, damaged, or more than data."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'there is no checkpoint file {path}')
    try:
        with zipfile.ZipFile(path) as archive:
            # torch skips what claims to be a folder or packed, and leaves whatever is in memory there
            odd = (entry.filename for entry in archive.infolist() if entry.external_attr or entry.compress_type)
            bad = next(odd, None) or archive.testzip()      # reads everything, comparing checksums
        if bad is not None:
            raise zipfile.BadZipFile(f'the checksum of {bad} does not match')
        # as a memory map, which processes share; but Windows replaces no file that is mapped anywhere
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=os.name == 'posix')
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, KeyError) as e:
        raise UserError(f'{path} is damaged ({first_line(e)}); use another checkpoint') from None
    except Exception as e:                          # UnpicklingError: it holds objects whose loading would run code
        raise UserError(f'{path} holds more than tensors and plain values, so it is not loaded '
                        f'({first_line(e)})') from None
    parts = [checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ('model', 'model_args')]
    if not all(isinstance(part, dict) for part in parts) or not all(map(torch.is_tensor, parts[0].values())):
        raise UserError(f'{path} is not a checkpoint of a GPT: it has no model and model_args')
    if not all(tensor.isfinite().all() for tensor in parts[0].values()):
        raise UserError(f'{path} holds weights that are not finite; use another checkpoint')
    # nanoGPT's files carry torch.compile's prefix, and have no switches: there the GELU is the exact one
    model = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
    checkpoint['model'] = {k: v for k, v in model.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
    if 'mlp' not in checkpoint['model_args']:
        checkpoint['model_args']['mlp'] = 'gelu_erf'
    return checkpoint


def find_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoint files in `out_dir` as a run would resume from them, the furthest first: by their steps, since a
    file's time changes when it is copied, or the clock is put back."""
    found = list(Path(out_dir).glob('*checkpoint*.pt')) + list(Path(out_dir).glob('ckpt.pt'))
    return sorted(found, key=lambda path: (_step_of(path), path.name == LATEST), reverse=True)


def _step_of(path):
    """The step of a checkpoint, without reading its tensors; -1 for a damaged file."""
    try:
        return int(torch.load(path, map_location='cpu', weights_only=True, mmap=True)['iter_num'])
    except Exception:                               # whatever is wrong, load_checkpoint() will say it
        return -1


def load_newest(out_dir: str | Path) -> tuple[Path, dict]:
    """(path, checkpoint) of the newest good checkpoint in `out_dir`; damaged ones are named and passed over."""
    for path in find_checkpoints(out_dir):
        try:
            return path, load_checkpoint(path)
        except UserError as e:
            print(f'warning: {e}', file=sys.stderr)
    raise UserError(f'there is no usable checkpoint in {out_dir}; train first, or name another with --init_from')


# -----------------------------------------------------------------------------
# for sampling and evaluating


def pick_checkpoint(init_from: str, out_dir: str | Path) -> tuple[str | Path, dict]:
    """(path, checkpoint) for sampling or evaluating. `init_from` is a file, a folder, a published model, or 'auto':
    `out_dir`, and if nothing is there, the newest run in a folder of it. A folder's best checkpoint counts, or else its
    newest."""
    if init_from != 'auto':
        if is_published(init_from):
            return init_from, load_published(init_from)
        if Path(init_from).is_file():
            return Path(init_from), load_checkpoint(init_from)
        if not Path(init_from).is_dir():
            near = near_folder(init_from)
            raise UserError(f'there is no checkpoint file or folder {init_from!r}; '
                            + (f'did you mean {near}?' if near else 'the published models are '
                               f'{", ".join(GPT2_NAMES)}, or owner/name on the hub'))
        out_dir = init_from
    folder = Path(out_dir)
    if not find_checkpoints(folder):
        runs = [files[0] for d in folder.glob('*/') if (files := find_checkpoints(d))]
        if init_from == 'auto' and runs:
            folder = max(runs, key=lambda p: p.stat().st_mtime_ns).parent
            if len(runs) > 1:
                print(f'{folder} is the newest of {len(runs)} runs in {out_dir}; --init_from={folder} or another names '
                      'one', file=sys.stderr)
    if (folder / BEST).is_file():
        try:
            return folder / BEST, load_checkpoint(folder / BEST)
        except UserError as e:
            print(f'warning: {e}', file=sys.stderr)
    return load_newest(folder)


def build_model(checkpoint: dict, path: str | Path = 'checkpoint', merged: bool = True, **changes) -> GPT:
    """The GPT that a checkpoint holds, on the CPU, in evaluation mode; `changes` are settings such as dropout=0.1.
    If it has adapters, they become part of the weights, but for merged=False.

    Raises UserError if weights are missing, superfluous or of another shape.
    """
    try:
        model = GPT(GPTConfig(**{**checkpoint['model_args'], **changes}))
        if checkpoint.get('quantized') == 'int8':
            to_int8(model)
        model.load_state_dict(checkpoint['model'])
    except (RuntimeError, ValueError, TypeError) as e:
        raise UserError(f'{path} does not fit this model: {" ".join(str(e).split())[:300]}') from None
    if merged and model.config.lora_rank:
        merge_adapters(model)
    return model.eval()


def load_for_use(init_from: str, out_dir: str | Path, device: str, dtype: str) -> tuple[GPT, AnyTokenizer, dict, str]:
    """(model, tokenizer, checkpoint, description) for sampling or evaluating on `device`; see pick_checkpoint.

    The weights are cast to `dtype` ('float32', ...), but for int8 ones, which stay as they are.
    """
    path, checkpoint = pick_checkpoint(init_from, out_dir)
    tokenizer, model = tokenizer_of(checkpoint, path), build_model(checkpoint, path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f'{path} has a tokenizer of {tokenizer.vocab_size:,} ids and a model of '
                        f'{model.config.vocab_size:,}: they do not belong together; use another checkpoint')
    kind = checkpoint.get('quantized') or dtype
    model = model.to(device) if checkpoint.get('quantized') else model.to(device=device, dtype=DTYPES[dtype])
    age = f'step {checkpoint["iter_num"]}' if 'iter_num' in checkpoint else 'published weights'
    return model, tokenizer, checkpoint, f'{path}: {age} ({device}, {kind})'


def tokenizer_of(checkpoint: dict, path: str | Path = 'checkpoint') -> AnyTokenizer:
    """The tokenizer kept in a checkpoint. nanoGPT's checkpoints keep none: theirs is found through the data set."""
    if 'tokenizer' in checkpoint:
        if checkpoint['tokenizer'] is None:
            raise UserError(f'{path} has no tokenizer.json, so its ids mean nothing; put its own there')
        tokenizer = from_state(checkpoint['tokenizer'])
        if tokenizer.fingerprint != checkpoint.get('tokenizer_fingerprint', tokenizer.fingerprint):
            raise UserError(f'the tokenizer in {path} does not match its fingerprint; use another checkpoint')
        tokenizer.start = checkpoint.get('start', tokenizer.start)  # a published model may begin its texts otherwise
        tokenizer.eot = tokenizer.eot if checkpoint.get('eot') is None else checkpoint['eot']
        tokenizer.bos = next((i for i in tokenizer.start if i != tokenizer.eot), None)
        return tokenizer
    return dataset_tokenizer(find_dataset(checkpoint.get('config', {}).get('dataset', 'openwebtext'), missing_ok=True))


# -----------------------------------------------------------------------------
# for training: where a run starts from

OURS = ('auto', 'scratch', 'resume')        # init_from where nobody else's weights are what training starts from
NEW_START = 'repeat the settings it was made with, choose another --out_dir, or start over: --init_from=scratch'


@dataclass
class Start:
    """Where a run starts: its model, on the CPU, and what an earlier part of the run has left."""
    model: GPT
    init_from: str                          # what the run began with; a later resume needs to know
    said: str = ''                          # about all this, for the log
    path: Path | str = ''                   # the checkpoint it comes from
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0                      # when that was
    elapsed_s: float = 0.0
    finished: bool = False                  # there is nothing left to do
    states: tuple | None = None             # of optimizers and scaler, until restore() hands them over

    def restore(self, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
        """Give optimizers and scaler the states that they had, if they had any, and let go of the memory."""
        if self.states is None:
            return
        states, scaler_state = self.states
        for optimizer, state in zip(optimizers, states, strict=True):
            load_optimizer(optimizer, state)
        scaler.load_state_dict(scaler_state or scaler.state_dict())
        self.states = None


def start_from(config: dict, tokenizer: AnyTokenizer) -> Start:
    """The Start of a run with the settings `config` of train.py, on data in the tokens of `tokenizer`: a new model, or
    what a run in out_dir left, or somebody's weights. Raises UserError for settings that do not go together."""
    init_from, out_dir = config['init_from'], config['out_dir']
    shape = {field.name: config[field.name] for field in fields(GPTConfig) if field.name in config}
    shape['vocab_size'] = tokenizer.vocab_size
    if tokenizer.vocab_size > 4096:         # tensor cores like multiples of 64, and here the padding costs little
        shape['vocab_size'] = 64 * math.ceil(tokenizer.vocab_size / 64)
    if config['isolate_documents']:
        if tokenizer.eot is None:
            raise UserError('isolate_documents needs an end-of-text token, which the tokenizer of '
                            f'{config["dataset"]!r} has not')
        shape['document_token'] = tokenizer.eot
    try:
        wanted = GPTConfig(**shape)
        if init_from == 'resume' or (init_from != 'scratch' and find_checkpoints(out_dir)):
            start = _resumed(config, wanted, tokenizer)
        elif init_from in OURS:
            if wanted.lora_rank:
                raise UserError(f'lora_rank={wanted.lora_rank} trains adapters beside weights that are trained; '
                                'name those:\n--init_from=gpt2, or a checkpoint')
            start = Start(GPT(wanted), init_from)
        else:
            start = _with_weights(config, wanted, tokenizer)
    except ValueError as e:
        raise UserError(str(e)) from None
    if len(set(from_everyone(start.step))) > 1:
        raise UserError(f'the processes would not start at the same step: out_dir={out_dir!r} must be one folder for '
                        'all\nmachines, or hold the same checkpoints on each')
    return start


def _resumed(config, wanted, tokenizer):
    """The Start from the newest checkpoint in out_dir, as it was left, or a UserError that says what does not fit."""
    path, checkpoint = load_newest(config['out_dir'])
    before, init_from = checkpoint.get('config', {}), config['init_from']
    began = before.get('init_from', 'auto')
    if init_from not in OURS and not same_model(init_from, began):
        raise UserError(f'{config["out_dir"]} holds a run that began with init_from={began!r}, not {init_from!r};\n'
                        'choose another --out_dir, or delete that folder to begin again')
    for name, value in GPTConfig(**checkpoint['model_args']).__dict__.items():
        fixed = name != 'dropout' if began in OURS else name == 'block_size' or name.startswith('lora_')
        if fixed and value != getattr(wanted, name):
            raise UserError(f'{path} has {name}={value}, these settings have {name}={getattr(wanted, name)};\n'
                            + NEW_START)
    _same_tokenizer(checkpoint, path, tokenizer, config, NEW_START)
    if before.get('optimizer', 'adamw') != config['optimizer']:
        raise UserError(f'{path} was trained with optimizer={before.get("optimizer", "adamw")}, not '
                        f'{config["optimizer"]};\n{NEW_START}')
    step, max_steps = checkpoint['iter_num'], config['max_steps']
    if step > max_steps:
        raise UserError(f'{path} is already at step {step}; raise --max_steps, now {max_steps}, to train on')
    changed = [f'{name} {before[name]} -> {value}' for name, value in config.items()
               if name != 'init_from' and before.get(name, value) != value]
    states, best_step = checkpoint['optimizer'], checkpoint.get('best_step', step)
    given_up = step - best_step >= config['patience'] * config['eval_interval'] > 0
    return Start(build_model(checkpoint, path, merged=False, dropout=config['dropout']), began, path=path, step=step,
                 said=f'resuming from {path} at step {step}' + (f', with {", ".join(changed)}' if changed else ''),
                 best_val_loss=float(checkpoint['best_val_loss']), best_step=best_step,
                 elapsed_s=checkpoint.get('elapsed_s', 0.0),
                 finished=checkpoint.get('finished', False) and (step == max_steps or given_up),
                 states=(states if isinstance(states, list) else [states], checkpoint.get('scaler')))


def _with_weights(config, wanted, tokenizer):
    """The Start from somebody's weights, to be trained further, from step 0: their shape, our dropout and context."""
    path, checkpoint = pick_checkpoint(config['init_from'], config['init_from'])
    if checkpoint.get('quantized'):
        raise UserError(f'{path} holds {checkpoint["quantized"]} weights, which cannot be trained; start from its '
                        'original')
    _same_tokenizer(checkpoint, path, tokenizer, config,
                    'prepare the data with its own: prepare_data.py --tokenizer=FOLDER/tokenizer.json')
    isolated = {'document_token': wanted.document_token} if config['isolate_documents'] else {}
    model = build_model(checkpoint, path, dropout=config['dropout'], **isolated)
    if config['block_size'] != model.config.block_size:
        model.crop_block_size(config['block_size'])
    said = f'starting from the weights of {path}'
    if wanted.lora_rank:
        before = model.num_params()
        add_adapters(model, wanted.lora_rank, wanted.lora_alpha, wanted.lora_targets)
        said += f', beside which {model.num_params() - before:,} are trained, {model.num_params() / before - 1:.2%}'
    return Start(model, config['init_from'], said, path)


def _same_tokenizer(checkpoint, path, tokenizer, config, advice):
    if tokenizer_of(checkpoint, path).fingerprint != tokenizer.fingerprint:
        raise UserError(f'{path} was trained with another tokenizer than that of dataset {config["dataset"]!r};\n'
                        + advice)
