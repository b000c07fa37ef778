"""Settings from a script's own globals, changed by config files and by `--key=value` on the command line.

A script writes its settings as plain assignments at its top, and then one line:

    config = configure(globals())

The names, defaults and comments are read from the script's source, so `--help` cannot disagree with the code.
Later wins: `python train.py config/a.py config/b.py --learning_rate=1e-3`.

Once this module is imported, errors that a user can put right end the process in a line or two, with status 2. Scripts
import it before torch, whose threads then leave room for other programs, and which then keeps memory for the next step.
"""

import ast
import builtins
import ctypes
import difflib
import errno
import io
import math
import os
import re
import sys
import tokenize
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message says what is wrong and what to do, in one or two lines."""


def first_line(error: BaseException) -> str:
    """What an exception says, in at most a line: some say nothing but their names, some a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def configure(namespace: dict, argv: list[str] | None = None, *, presets: dict[str, dict] | None = None,
              negative: bool = True, at_least: dict[str, float] | None = None, at_most: dict[str, float] | None = None,
              one_of: dict[str, Iterable] | None = None, collect: str = '') -> dict:
    """Change the settings in `namespace` as config files and the command line say; return all of them as a dict.

    namespace: the calling script's globals(). argv: the arguments, `sys.argv[1:]` unless given. A script that is
    imported by another one, and so is not the one that the arguments are for, keeps its defaults.
    presets: {name: settings}; `preset=name` stands for these, and what is set after it, or in the same file, wins.
    negative=False: no number may become negative whose default is not. at_least, at_most, one_of: {setting: bound} and
    {setting: choices}. collect: the setting that gathers, with commas between, the arguments that are no config files.
    Raises UserError for an unknown key, a wrong type or value, or a config file that fails; exits 0 after `--help`.
    """
    path = namespace['__file__']
    source = Path(path).read_text(encoding='utf-8')
    comments, sections = _read_comments(source)
    settings = {name: namespace[name] for name in comments}
    defaults = dict(settings)                              # they fix the types, too

    def change(values, where, from_text=False):
        values = {name: _checked(name, value, type(defaults[name]), where, from_text) for name, value in values.items()}
        chosen = values.get('preset') if presets else None
        if chosen and chosen not in presets:
            raise UserError(f'there is no preset {chosen!r}; choose one of {", ".join(presets)}')
        settings.update({**(presets[chosen] if chosen else {}), **values})

    mine = sys.argv[1:] if namespace.get('__name__') == '__main__' else []
    args = list(mine if argv is None else argv)
    while args:
        arg = args.pop(0)
        if arg in ('--help', '-h'):
            print(_help(path, ast.get_docstring(ast.parse(source)), settings, comments, sections, collect))
            raise SystemExit(0)
        if collect and not arg.startswith('--') and not arg.endswith('.py'):
            settings[collect] = ','.join(filter(None, (settings[collect], arg)))
            continue
        if not arg.startswith('--'):
            change(_run_config_file(arg, settings), f'in {arg}')
            continue
        name, equals, text = arg[2:].partition('=')    # only the first `=` divides; a value may hold more of them
        _must_exist(name, settings, 'on the command line')
        if not equals:
            kind = type(defaults[name])
            is_value = bool(args) and (args[0].lower() in _BOOLS if kind is bool else args[0][:2] != '--')
            if is_value:
                text = args.pop(0)
            elif kind is bool:
                text = 'True'
            else:
                raise UserError(f'--{name} needs a value: --{name}={settings[name]}')
        change({name: text}, 'on the command line', from_text=True)

    least = {name: 0 for name, value in defaults.items() if not negative and type(value) in (int, float) and value >= 0}
    for name, bound in {**least, **(at_least or {})}.items():
        if not settings[name] >= bound:
            raise UserError(f'{name} must be at least {bound}, not {settings[name]}')
    for name, bound in (at_most or {}).items():
        if settings[name] > bound:
            raise UserError(f'{name} must be at most {bound:,}, not {settings[name]}')
    for name, choices in (one_of or {}).items():
        if settings[name] not in choices:
            raise UserError(f'{name} {settings[name]!r} is not one of {", ".join(map(str, choices))}')
    namespace.update(settings)
    return settings


_BOOLS = {'true': True, '1': True, 'false': False, '0': False}

# what nanoGPT, transformers and others call our settings
_CALLED_ELSEWHERE = {
    'learning_rate': 'lr max_lr', 'min_lr': 'lr_min decay_lr', 'max_steps': 'max_iters lr_decay_iters num_steps epochs '
    'num_train_epochs eval_only', 'warmup_steps': 'warmup_iters warmup_ratio', 'grad_clip': 'max_grad_norm',
    'total_batch_size': 'gradient_accumulation_steps grad_accum_steps', 'weight_decay': 'wd', 'optimizer': 'optim',
    'batch_size': 'per_device_train_batch_size device_batch_size micro_batch_size',
    'block_size': 'context_length seq_len max_seq_len max_seq_length sequence_length max_position_embeddings n_ctx',
    'n_embd': 'hidden_size d_model dim n_embed', 'n_layer': 'num_hidden_layers num_layers n_layers depth',
    'n_head': 'num_attention_heads num_heads n_heads', 'n_kv_head': 'num_key_value_heads n_kv_heads',
    'n_inner': 'intermediate_size', 'mlp': 'hidden_act', 'dtype': 'bf16 fp16 amp precision', 'beta1': 'adam_beta1',
    'eval_interval': 'eval_steps', 'log_interval': 'logging_steps', 'beta2': 'adam_beta2', 'out_dir': 'output_dir',
    'checkpoint_interval': 'save_steps always_save_checkpoint', 'dataset': 'data_dir', 'temperature': 'temp',
    'init_from': 'resume resume_from_checkpoint model model_name_or_path model_path checkpoint ckpt_path',
    'tensorboard': 'wandb_log wandb_project wandb_run_name report_to', 'prompt': 'start',
    'max_new_tokens': 'max_tokens max_length', 'num_samples': 'num_return_sequences', 'lora_rank': 'lora_r r lora',
    'lora_targets': 'target_modules lora_target_modules lora_modules',
}


def _must_exist(name, settings, where):
    if name not in settings:
        near = [ours for ours, theirs in _CALLED_ELSEWHERE.items() if name in theirs.split() and ours in settings]
        near = near or difflib.get_close_matches(name.replace('-', '_'), settings, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else '--help lists all of them'
        raise UserError(f'unknown setting {name!r} {where}; {hint}')


def _checked(name, value, kind, where, from_text=False):
    """`value` as the type `kind`, or UserError. Text is read as the type; a config file's value must be of it."""
    try:
        if kind is str:
            return value if isinstance(value, str) else str(value)
        if kind is bool:
            return _BOOLS[value.lower()] if from_text else {True: True, False: False}[value]
        if isinstance(value, (bool, type(None), list, dict, tuple)):
            raise ValueError
        if isinstance(value, str) and not from_text:
            raise ValueError
        if kind is int:
            try:
                return int(value) if from_text else _whole(value)
            except ValueError:
                return _whole(value)                   # 1e3 is an int if it is whole
        if kind is float and math.isfinite(float(value)):
            return float(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        pass
    article = {int: 'a whole number', float: 'a number', bool: 'true or false'}.get(kind, kind.__name__)
    raise UserError(f'{name} should be {article}, not {value!r} ({where})')


def _whole(number):
    if not float(number).is_integer():
        raise ValueError
    return int(number) if isinstance(number, int) else int(float(number))


def _run_config_file(path, settings):
    """Execute a config file the user wrote and return the settings it assigned; it may use those set so far.

    `include('other.py')` in it runs another file of its folder, as if that one's lines stood there.
    """
    if not os.path.isfile(path):
        known = [p.as_posix() for p in Path('config').glob('*.py')]
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
        hint = f'did you mean {near[0]}?' if near else 'settings are given as --key=value'
        raise UserError(f'no config file {path!r}; {hint}')
    running, assigned = [], set()

    def run(path):
        running.append(path)
        tree = ast.parse(Path(path).read_text(encoding='utf-8'), path)
        assigned.update(node.id for node in ast.walk(tree)
                        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        exec(builtins.compile(tree, path, 'exec'), scope)

    def include(name):
        run(str(Path(path).with_name(name)))

    scope = dict(settings, __file__=path, __name__='__config__', include=include)
    try:
        run(path)
    except Exception as e:
        at = [(f.filename, f.lineno) for f in traceback.extract_tb(e.__traceback__) if f.filename in running]
        where, line = (running[-1], e.lineno) if isinstance(e, SyntaxError) else at[-1] if at else (path, 1)
        raise UserError(f'{where}, line {line}: {type(e).__name__}: {getattr(e, "msg", None) or e}') from None
    changed = {}
    for name, value in scope.items():
        if name.startswith('_') or name not in settings and (callable(value) or type(value).__name__ == 'module'):
            continue                                   # helpers and imports of the file's own are not settings
        _must_exist(name, settings, f'in {path}')
        if name in assigned or value is not settings[name]:
            changed[name] = value
    return changed


def _read_comments(source):
    """The settings in `source`, before it calls configure: {name: comment} and {name: heading above it}, in order."""
    lines = source.splitlines()
    trailing = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            trailing[token.start[0]] = token.string.lstrip('# ')
    comments, sections, heading, last_line = {}, {}, '', 0
    for node in ast.parse(source).body:
        is_assignment = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if is_assignment and isinstance(node.value, ast.Call):
            if getattr(node.value.func, 'id', '') == 'configure':
                break
        if not is_assignment or node.targets[0].id.startswith('_'):
            last_line = node.end_lineno
            continue
        above = [l.lstrip('# ') for l in lines[last_line:node.lineno - 1] if l.startswith('# ') and '---' not in l]
        heading = ' '.join(above) if above else heading
        name = node.targets[0].id
        comments[name], sections[name] = trailing.get(node.end_lineno, ''), heading
        last_line = node.end_lineno
    return comments, sections


def _help(path, docstring, settings, comments, sections, collect=''):
    script = os.path.basename(path)
    arguments = f'[{collect} ...] ' if collect else ''
    out = [docstring or '', '', f'usage: python {script} {arguments}[config/file.py ...] [--key=value ...]']
    width = max(len(f'--{name}={value!r}') for name, value in settings.items())
    heading = None
    for name, value in settings.items():
        if sections[name] != heading:
            heading = sections[name]
            out += ['', heading]
        out.append(f'  {f"--{name}={value!r}":<{min(width, 40)}}  {comments[name]}')
    return '\n'.join(out)


_DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT)


def _end_kindly(kind, value, trace):
    """sys.excepthook: what is in the user's hands ends the process in words and status 2, Ctrl-C with status 130."""
    said = f'{kind.__name__}: {value}'
    if issubclass(kind, KeyboardInterrupt):
        status, message = 130, ''
    elif issubclass(kind, BrokenPipeError):                     # | head: who read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status, message = 141, ''
    elif issubclass(kind, UserError):
        status, message = 2, f'error: {value}\n'
    elif issubclass(kind, MemoryError) or re.search("out ?of ?memory|can't allocate memory", said, re.I):
        # torch.OutOfMemoryError, numpy's MemoryError, and the RuntimeErrors of CPU allocator and CUDA
        status, message = 2, (f'error: out of memory: {said.splitlines()[0][:200]}\nlower batch_size or block_size '
                              '(in training, accumulation keeps total_batch_size as it is), or take a smaller model\n')
    elif kind.__module__.startswith(('torch._dynamo', 'torch._inductor', 'triton')):
        status, message = 2, f'error: torch.compile failed: {first_line(value)}\ngo on without it: --compile=false\n'
    elif issubclass(kind, OSError) and (value.filename or value.errno in _DISK_ERRORS):
        status, message = 2, f'error: {value.strerror}: {value.filename or "writing a file"}\n'
    else:
        return sys.__excepthook__(kind, value, trace)
    sys.__stderr__.write(message)       # the true one: torch.distributed calls this with another, which is then lost
    raise SystemExit(status)


sys.excepthook = _end_kindly
# OpenMP's threads wait for the last of them by spinning, for some milliseconds, although another program may need the
# very core that the last one is waiting for; a fraction of a millisecond costs nothing alone and far less in company
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '10000')
# Linux clears memory page by page whenever it is taken anew, in every step: rather in large pages, and what has been
# freed is kept for the next step
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')          # torch's own; read when it is loaded
if sys.platform == 'linux' and not any(name.startswith('MALLOC_') for name in os.environ):
    with suppress(OSError, AttributeError):                 # a libc that is not GNU's
        for option, value in ((-4, 0), (-1, (1 << 31) - 1)):            # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
for _stream in (sys.stdout, sys.stderr):
    if _stream.encoding and _stream.encoding.lower().replace('-', '') != 'utf8':
        _stream.reconfigure(encoding='utf-8', errors='replace')         # a Windows console may be set to GBK
