"""Train a GPT: on a laptop, on one GPU, or on many through torchrun, from the same file.

    python train.py config/train_shakespeare_char_cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The settings below may be changed here, in a config file, or by --key=value. Without any, this is GPT-2 124M on
FineWeb-Edu. A run that was stopped goes on when the same command is given again.
"""

import math
import os
import signal
import statistics
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import eval_zh
import hellaswag
from checkpoint import (BEST, FINAL, LATEST, build_model, find_checkpoints, load_newest, pick_checkpoint,
                        prune_checkpoints, save_checkpoint, tokenizer_of)
from configurator import UserError, configure
from dataset import TokenDataset, dataset_tokenizer, find_dataset, read_meta
from device import (all_sum, autocast, from_everyone, init_distributed, leave_distributed, load_optimizer, peak_flops,
                    pick_device, pick_dtype, state_bytes, synchronize)
from download import DownloadError
from huggingface import same_model
from metrics import MetricsLog
from model import GPT, PRESETS, GPTConfig
from sample import generate_texts

# -----------------------------------------------------------------------------
# I/O
out_dir = 'out'                 # checkpoints, metrics.jsonl and the TensorBoard log go here
init_from = 'auto'              # auto (resume, or else start), scratch, resume, a checkpoint, or gpt2 and other models
eval_interval = 250             # steps from one evaluation, and checkpoint, to the next
eval_iters = 20                 # micro-batches in an evaluation
log_interval = 1                # steps from one line in the log to the next
checkpoint_interval = 0         # steps between checkpoints that are kept under their number; 0 = none
keep_checkpoints = 3            # how many numbered checkpoints are kept; 0 = all
tensorboard = True              # also log to out_dir/tb
sample_interval = 0             # steps between samples printed during training; 0 = none
sample_prompt = '\n'            # what those samples begin with
sample_tokens = 64              # how many tokens each of them has
num_samples = 2                 # how many of them
hellaswag_interval = 0          # steps between HellaSwag evaluations; 0 = never
hellaswag_limit = 0             # ask only the first so many of its questions; 0 = all 10,042
hellaswag_data = ''             # a local file with its questions; '' = download them, once
zh_eval_interval = 0            # steps between counts of the held-out Chinese questions answered right; 0 = never
# data
dataset = 'fineweb_edu_10B'     # a folder under data/, or a path
batch_size = 16                 # sequences in a micro-batch, in each process
block_size = 1024               # tokens in a sequence
total_batch_size = 524288       # tokens in an optimizer step over all processes; 0 = one micro-batch per process
one_batch = False               # train on the first batch again and again: a loss that does not go to 0 means a bug
# model
preset = ''                     # a shape from model.PRESETS (gpt2, gpt2-medium, ...); its values win over those below
n_layer = 12                    # blocks
n_head = 12                     # attention heads
n_kv_head = 0                   # heads of keys and values (grouped-query attention); 0 = n_head
n_embd = 768                    # channels
n_inner = 0                     # width of the MLP; 0 = 4 * n_embd
dropout = 0.0                   # 0 for pretraining; 0.1 and more where the data is seen many times
bias = True                     # biases in linear layers and layer norms
norm = 'layernorm'              # layernorm or rmsnorm
position = 'learned'            # learned or rope
mlp = 'gelu'                    # gelu, gelu_erf, silu, swiglu or relu2
tie_weights = True              # the output layer is the token embedding
qkv_bias = False                # biases for queries, keys and values even where bias is off
qk_norm = False                 # normalise queries and keys
isolate_documents = False       # attention does not look beyond the start of a document; for questions with answers
# optimizer
optimizer = 'adamw'             # adamw, or muon (for the blocks' matrices; AdamW for the rest)
learning_rate = 6e-4            # the peak
weight_decay = 0.1              # on tensors of two dimensions and more
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
grad_clip = 1.0                 # the largest norm of the gradient; 0 = no limit
# schedule
max_steps = 19073               # optimizer steps; 19,073 * 524,288 = 10 billion tokens
warmup_steps = 715              # steps over which the learning rate rises to its peak
min_lr = 6e-5                   # where the cosine ends, at max_steps
# system
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                  # auto, float32, bfloat16, float16
compile = 'auto'                # torch.compile: auto (on a GPU), true, false
zero = 0                        # 1: each process keeps only its part of the optimizer's state (ZeRO stage 1)
seed = 1337                     # of the weights, the order of the data, and dropout
config = configure(globals())   # a config file and --key=value may change any of these
# -----------------------------------------------------------------------------

# who are we, and what do we compute with?
rank, local_rank, world_size = init_distributed(device)
device = pick_device(device, local_rank)
device_type = torch.device(device).type
dtype = pick_dtype(dtype, device)
if compile not in ('auto', 'true', 'false', 'True', 'False'):
    raise UserError(f'compile should be auto, true or false, not {compile!r}')
compile = device_type == 'cuda' if compile == 'auto' else compile.lower() == 'true'
torch.set_float32_matmul_precision('high')      # TF32, where float32 is asked for on a GPU that has it


def say(text):
    if rank == 0:
        print(text, flush=True)


say(f'using device: {device}, dtype: {dtype}, compile: {compile}')
for name, least in {'batch_size': 1, 'block_size': 1, 'total_batch_size': 0, 'max_steps': 0, 'eval_interval': 0,
                    'eval_iters': 1, 'log_interval': 1, 'warmup_steps': 0, 'grad_clip': 0, 'keep_checkpoints': 0,
                    'checkpoint_interval': 0, 'sample_interval': 0, 'hellaswag_interval': 0, 'hellaswag_limit': 0,
                    'seed': 0}.items():
    if config[name] < least:
        raise UserError(f'{name} must be at least {least}, not {config[name]}')
if seed >= 1 << 31:
    raise UserError(f'seed must be below {1 << 31}, not {seed}')
if zero not in (0, 1):
    raise UserError(f'zero must be 0 or 1, not {zero}')
zero = zero and world_size > 1                  # one process has nothing to share
try:
    os.makedirs(out_dir, exist_ok=True)
except OSError as e:
    raise UserError(f'cannot make the folder out_dir={out_dir!r}: {e.strerror}; choose another --out_dir') from None
tokens_per_micro_step = batch_size * block_size * world_size
total_batch_size = total_batch_size or tokens_per_micro_step
grad_accum_steps = total_batch_size // tokens_per_micro_step
if grad_accum_steps * tokens_per_micro_step != total_batch_size:
    raise UserError(f'total_batch_size {total_batch_size:,} is not a multiple of batch_size * block_size * processes = '
                    f'{tokens_per_micro_step:,};\nfor instance --total_batch_size='
                    f'{max(1, round(total_batch_size / tokens_per_micro_step)) * tokens_per_micro_step}')
say(f'total desired batch size: {total_batch_size}')
say(f'=> calculated gradient accumulation steps: {grad_accum_steps}')

# the model: new, or as a checkpoint left it
folder = find_dataset(dataset)
tokenizer = dataset_tokenizer(folder)
if sample_interval:
    tokenizer.encode(sample_prompt)             # a character that it does not have is better found now than later
vocab_size = tokenizer.vocab_size
if vocab_size > 4096:                           # tensor cores like multiples of 64, and here the padding costs little
    vocab_size = 64 * math.ceil(vocab_size / 64)
if preset and preset not in PRESETS:
    raise UserError(f'there is no preset {preset!r}; choose one of {", ".join(PRESETS)}')
shape = {name: config[name] for name in ('block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_inner', 'dropout',
                                         'bias', 'norm', 'position', 'mlp', 'tie_weights', 'qkv_bias', 'qk_norm')}
shape |= {**PRESETS.get(preset, {}), 'block_size': block_size}
if isolate_documents:
    if tokenizer.eot is None:
        raise UserError(f'isolate_documents needs an end-of-text token, which the tokenizer of {dataset!r} has not')
    shape['document_token'] = tokenizer.eot
try:
    gpt_config = GPTConfig(vocab_size=vocab_size, **shape)
except ValueError as e:
    raise UserError(str(e)) from None

torch.manual_seed(seed)
first_step, best_val_loss, elapsed_before, resumed = 0, float('inf'), 0.0, None
ours = ('auto', 'scratch', 'resume')            # where nobody else's weights are what training starts from
if init_from == 'resume' or init_from != 'scratch' and find_checkpoints(out_dir):
    path, resumed = load_newest(out_dir)
    started_from = resumed.get('config', {}).get('init_from', 'auto')
    if init_from not in ours and not same_model(init_from, started_from):
        raise UserError(f'{out_dir} holds a run that began with init_from={started_from!r}, not {init_from!r};\n'
                        'choose another --out_dir, or delete that folder to begin again')
if resumed:
    new_start = 'repeat the settings it was made with, choose another --out_dir, or start over: --init_from=scratch'
    for name, value in GPTConfig(**resumed['model_args']).__dict__.items():
        fixed = name != 'dropout' if started_from in ours else name == 'block_size'
        if fixed and value != getattr(gpt_config, name):
            raise UserError(f'{path} has {name}={value}, these settings have {name}={getattr(gpt_config, name)};\n'
                            + new_start)
    if tokenizer_of(resumed, path).fingerprint != tokenizer.fingerprint:
        raise UserError(f'{path} was trained with another tokenizer than that of dataset {dataset!r};\n' + new_start)
    model = build_model(resumed, path, dropout=dropout)
    first_step, best_val_loss = resumed['iter_num'], float(resumed['best_val_loss'])
    config['init_from'] = started_from          # a later resume needs to know, too
    elapsed_before = resumed.get('elapsed_s', 0.0)
    if first_step > max_steps:
        raise UserError(f'{path} is already at step {first_step}; raise --max_steps, now {max_steps}, to train on')
    say(f'resuming from {path} at step {first_step}')
elif init_from in ours:
    model = GPT(gpt_config)
else:                                           # somebody's weights, to be trained further, from step 0
    path, start = pick_checkpoint(init_from, init_from)
    if start.get('quantized'):
        raise UserError(f'{path} holds {start["quantized"]} weights, which cannot be trained; start from its original')
    if tokenizer_of(start, path).fingerprint != tokenizer.fingerprint:
        raise UserError(f'{path} was trained with another tokenizer than that of dataset {dataset!r};\n'
                        'prepare the data with its own: prepare_data.py --tokenizer=FOLDER/tokenizer.json')
    isolated = {'document_token': tokenizer.eot} if isolate_documents else {}
    model = build_model(start, path, dropout=dropout, **isolated)
    if block_size != model.config.block_size:
        try:
            model.crop_block_size(block_size)
        except ValueError as e:
            raise UserError(str(e)) from None
    say(f'starting from the weights of {path}')
if len(set(from_everyone(first_step))) > 1:
    raise UserError(f'the processes would not start at the same step: out_dir={out_dir!r} must be one folder for all\n'
                    'machines, or hold the same checkpoints on each')
model.to(device).train()
raw_model = model                               # evaluation, samples and checkpoints use this one: its shapes may vary

try:
    optimizers = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer,
                                                zero, verbose=rank == 0)
except ValueError as e:
    raise UserError(str(e)) from None
scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
if resumed:
    states = resumed['optimizer'] if isinstance(resumed['optimizer'], list) else [resumed['optimizer']]
    if len(states) != len(optimizers):
        raise UserError(f'{path} was trained with another optimizer than {optimizer!r};\n' + new_start)
    for o, state in zip(optimizers, states, strict=True):
        load_optimizer(o, state)
    scaler.load_state_dict(resumed.get('scaler') or scaler.state_dict())
resumed = start = states = state = None         # free the memory
if compile:
    say('compiling the model... (takes a minute, once)')
    model = torch.compile(model)
if world_size > 1:
    model = DDP(model, device_ids=[local_rank] if device_type == 'cuda' else None, gradient_as_bucket_view=True)

# the data
layout = dict(batch_size=batch_size, grad_accum_steps=grad_accum_steps, rank=rank, world_size=world_size, seed=seed)
train_data = TokenDataset(folder, 'train', block_size, tokenizer.vocab_size, **layout)
val_data = TokenDataset(folder, 'val', block_size, tokenizer.vocab_size, **layout)
for data in (train_data, val_data):
    say(f'found {len(data.shards)} shards for split {data.split}')
say(f'{raw_model.num_params():,} parameters | {total_batch_size:,} tokens per step | {train_data.n_tokens:,} tokens in '
    f'the data | {max_steps} steps = {max_steps * total_batch_size / train_data.n_tokens:.2f} epochs')
if first_step == 0 and init_from in ours:
    say(f'the first loss should be near ln({tokenizer.vocab_size}) = {math.log(tokenizer.vocab_size):.2f}')


template = read_meta(folder).get('template', '')     # what questions are put into, if the data are questions
if zh_eval_interval:
    if not template:
        raise UserError(f'zh_eval_interval needs a data set of questions and answers, which {dataset!r} is not')
    zh_questions = eval_zh.load_questions()['heldout']
if hellaswag_interval:
    try:
        hellaswag_questions = hellaswag.load_questions(tokenizer, hellaswag_data, hellaswag_limit)
    except DownloadError as e:
        raise UserError(f'HellaSwag: {str(e).splitlines()[0]}\nname a local file with --hellaswag_data, or train '
                        'without: --hellaswag_interval=0') from None


def get_batch(step, micro_step):
    """Inputs and targets (B, T) int64 on the device; the copy to a GPU overlaps with what it is doing."""
    x, y = train_data.batch(0 if one_batch else step, micro_step)
    if device_type == 'cuda':
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def get_lr(step):
    # 1) linear warmup
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    # 2) cosine decay down to min_lr
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss():
    """The mean loss over fixed windows of the validation split, their work divided over the processes."""
    raw_model.eval()
    loss_sum, targets = 0.0, 0
    for x, y in val_data.eval_batches(eval_iters):
        with autocast(device, dtype):
            _, loss = raw_model(x.to(device), y.to(device), reduction='sum')
        loss_sum += loss.item()
        targets += int((y >= 0).sum())
    raw_model.train()
    loss_sum, targets = all_sum([loss_sum, targets], device)
    return loss_sum / max(1, targets)


def print_samples(step):
    """Sample from the model as it is now, each process its share."""
    raw_model.eval()
    mine = range(rank, num_samples, world_size)
    with autocast(device, dtype):
        texts = [generate_texts([sample_prompt], raw_model, tokenizer, max_new_tokens=sample_tokens, top_k=50,
                                seed=seed + step + i)[0] for i in mine]
    raw_model.train()
    everyones = from_everyone(texts)
    for i in range(num_samples):
        say(f'sample {i}: {sample_prompt}{everyones[i % world_size][i // world_size]}')


def accuracy(evaluation, *questions):
    """(right, answered) of an evaluation's questions, each process answering its share."""
    raw_model.eval()
    with autocast(device, dtype):
        right, *_, answered = evaluation.count_right(raw_model, *questions, rank=rank, world_size=world_size)
    raw_model.train()
    return map(round, all_sum([right, answered], device))


def save(step, names):
    """Write everything that is needed to go on from `step`, or to sample, under each of `names` in out_dir."""
    for o in optimizers if zero else []:
        o.consolidate_state_dict(to=0)          # each process sends its part of the state
    if rank == 0:
        save_checkpoint(out_dir, {
            'model': raw_model.state_dict(), 'optimizer': [o.state_dict() for o in optimizers],
            'scaler': scaler.state_dict(), 'model_args': raw_model.model_args(), 'iter_num': step,
            'best_val_loss': best_val_loss, 'config': {**config, 'total_batch_size': total_batch_size},
            'tokenizer': tokenizer.state(),
            'tokenizer_fingerprint': tokenizer.fingerprint, 'template': template,
            'elapsed_s': elapsed(),
        }, names)
        prune_checkpoints(out_dir, keep_checkpoints)


def elapsed():
    return elapsed_before + time.time() - start_time


# metrics.jsonl and TensorBoard
metrics_log = MetricsLog(out_dir, first_step, tensorboard) if rank == 0 else None


def log_metrics(step, **values):
    if rank == 0:
        metrics_log(step, **values)


# Ctrl-C and SIGTERM: finish the step, save, exit; a second one ends at once
stop_signal = 0


def request_stop(signum, frame):
    global stop_signal
    stop_signal = signum
    signal.signal(signum, signal.SIG_DFL)
    say('stopping after this step; once more to quit at once')


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, request_stop)

# -----------------------------------------------------------------------------
# training; the loop runs once more than it trains, so that the end is evaluated, too

peak = peak_flops(device, dtype) * world_size
start_time = time.time()
step_times = []                                 # seconds of the steps so far in this process
skipped = 0                                     # steps in a row whose loss or gradient was not finite
max_skipped = 10                                # so many, and the run ends
stopping = 0                                    # the signal to stop for, once all processes know of it
x, y = get_batch(first_step, 0)

for step in range(first_step, max_steps + 1):
    last_step = step == max_steps

    # look up from the work now and then: how good is it, and is it safe on disk?
    names = []
    if (eval_interval and step % eval_interval == 0 or last_step) and not stopping:
        val_loss = estimate_loss()
        ppl = math.exp(min(val_loss, 700))
        say(f'validation loss: {val_loss:.4f} | ppl: {ppl:.2f}')
        log_metrics(step, val_loss=val_loss, ppl=ppl)
        if step > 0:
            names = [LATEST]
        if step > 0 and val_loss < best_val_loss:
            best_val_loss = val_loss
            names.append(BEST)
    if hellaswag_interval and (step % hellaswag_interval == 0 and step > 0 or last_step) and not stopping:
        right, total = accuracy(hellaswag, hellaswag_questions)
        say(f'HellaSwag accuracy: {right}/{total}={right / total:.4f}')
        log_metrics(step, hellaswag=right / total)
    if zh_eval_interval and (step % zh_eval_interval == 0 and step > 0 or last_step) and not stopping:
        right, total = accuracy(eval_zh, tokenizer, template, zh_questions)
        say(f'held-out questions: {right}/{total}={right / total:.4f} | elapsed: {elapsed():.1f}s')
        log_metrics(step, zh_heldout=right / total)
    if checkpoint_interval and step % checkpoint_interval == 0 and step > 0:
        names += [LATEST, f'checkpoint_iter_{step}.pt']
    if last_step and step > 0:
        names += [LATEST, FINAL]
    if stopping:
        names.append(LATEST)
    if names:
        save(step, dict.fromkeys(names))
    if sample_interval and (step % sample_interval == 0 and step > 0 or last_step) and not stopping:
        print_samples(step)
    if last_step or stopping:
        break

    synchronize(device)
    step_start = time.time()
    lr = get_lr(step)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = lr
    torch.manual_seed((seed << 32) + step * world_size + rank)      # dropout depends on the step, not on its past

    # 1) accumulate the gradient of one global batch, micro-batch by micro-batch
    targets = train_data.targets_in(0 if one_batch else step)
    loss_sum = torch.zeros((), device=device)
    for micro_step in range(grad_accum_steps):
        last_micro_step = micro_step == grad_accum_steps - 1
        if world_size > 1:
            model.require_backward_grad_sync = last_micro_step      # gradients travel once a step
        with autocast(device, dtype):
            _, loss = model(x, y, reduction='sum')
        # fetch the next micro-batch while the GPU is busy with this one
        x, y = get_batch(step + 1, 0) if last_micro_step else get_batch(step, micro_step + 1)
        loss = loss / targets                       # so the micro-batches add up to the mean over the global batch
        loss_sum += loss.detach()
        scaler.scale(loss * world_size).backward()  # DDP will divide the sum over processes by world_size

    # 2) clip the gradient
    for o in optimizers:
        scaler.unscale_(o)
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf')).item()
    loss, *signals = all_sum([loss_sum.item(), stop_signal == signal.SIGINT, stop_signal == signal.SIGTERM], device)
    stopping = signal.SIGINT if signals[0] else signal.SIGTERM if signals[1] else 0

    # 3) step, unless something is not finite: then this step never happened, on any process
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for o in optimizers:
            scaler.step(o)
    scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)
    skipped = 0 if finite else skipped + 1
    if not finite:
        say(f'step {step}: the loss ({loss}) or its gradient ({norm}) is not finite; skipped, {skipped} in a row')
        if skipped == max_skipped:
            raise UserError(f'{skipped} steps in a row were not finite. The last good checkpoint is in {out_dir};\n'
                            'lower --learning_rate, or try --dtype=float32')

    # 4) log
    synchronize(device)
    dt = time.time() - step_start
    step_times.append(dt)
    tok_per_sec = total_batch_size / dt
    mfu = raw_model.flops_per_token() * tok_per_sec / peak
    if step % log_interval == 0:
        say(f'step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | dt: {dt * 1000:.2f}ms | '
            f'tok/sec: {tok_per_sec:.2f} | mfu: {mfu * 100:.1f}%')
        log_metrics(step, loss=loss, lr=lr, norm=norm, dt_ms=dt * 1000, tok_per_sec=tok_per_sec, mfu=mfu,
                    tokens=(step + 1) * total_batch_size, elapsed_s=elapsed())
    if len(step_times) == 1 and world_size > 1:
        sizes = ', '.join(f'{size / 1e6:.1f}' for size in from_everyone(sum(map(state_bytes, optimizers))))
        say(f'optimizer state in each process: {sizes} MB')
    if len(step_times) == 10:
        seconds = statistics.median(step_times) * (max_steps - step)
        say(f'estimated time to finish: {seconds / 60:.1f} minutes')

say(f'total time: {elapsed() / 60:.2f} minutes, best validation loss: {best_val_loss:.4f}, checkpoints in {out_dir}')
if rank == 0:
    metrics_log.close()
leave_distributed(128 + stopping if stopping else 0)
if stopping:
    sys.exit(128 + stopping)
