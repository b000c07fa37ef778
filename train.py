"""Train a GPT: on a laptop, on one GPU, or on many through torchrun, from the same file.

    python train.py config/train_shakespeare_char_cpu.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The settings below may be changed here, in a config file, or by --key=value. Without any, this is GPT-2 124M on
FineWeb-Edu. A run that was stopped goes on when the same command is given again.
"""

import itertools
import math
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from configurator import UserError, configure      # first: from here on, Ctrl-C is quiet

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import eval_zh
import hellaswag
from checkpoint import BEST, FINAL, LATEST, BackgroundSaver, start_from
from dataset import TokenDataset, dataset_tokenizer, divide_batch, find_dataset, mix, read_meta
from device import (Stopped, StopSignal, all_sum, autocast, from_everyone, init_distributed, leave_distributed,
                    own_copy, peak_flops, pick_compile, pick_device, pick_dtype, state_bytes, synchronize, whole_state)
from files import claim
from metrics import MetricsLog, TimeToFinish
from model import PRESETS
from plot import draw_run
from sample import generate_texts, manners

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
preset = ''                     # a shape from model.PRESETS (gpt2, gpt2-medium, ...); what is set after it wins
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
zero_init = False               # the projections into the residual stream begin as zeros; else as GPT-2's
isolate_documents = False       # attention does not look beyond the start of a document; for questions with answers
# optimizer
optimizer = 'adamw'             # adamw, or muon (for the blocks' matrices; AdamW for the rest)
learning_rate = 6e-4            # the peak
weight_decay = 0.1              # on tensors of two dimensions and more
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
grad_clip = 1.0                 # the largest norm of the gradient; 0 = no limit
# adapters (LoRA, Hu et al. 2021) beside the weights of init_from, which then stay as they are
lora_rank = 0                   # their width; 0 = all weights are trained
lora_alpha = 16                 # what they add is multiplied by lora_alpha / lora_rank
lora_targets = 'c_attn,c_proj,c_fc'     # the linear layers that have them; attn.c_proj and mlp.c_proj name one of two
# schedule
max_steps = 19073               # optimizer steps; 19,073 * 524,288 = 10 billion tokens
patience = 0                    # stop after so many evaluations without a better validation loss; 0 = never
warmup_steps = 715              # steps over which the learning rate rises to its peak
min_lr = 6e-5                   # where the cosine ends, at max_steps
# system
device = 'auto'                 # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'                  # auto, float32, bfloat16, float16
compile = 'auto'                # torch.compile: auto (on a GPU, and for long runs on a CPU), true, false
zero = 0                        # 1: each process keeps only its part of the optimizer's state (ZeRO stage 1)
seed = 1337                     # of the weights, the order of the data, and dropout
config = configure(globals(), presets=PRESETS, negative=False,      # a config file and --key=value may change these
                   at_least={'batch_size': 1, 'block_size': 1, 'eval_iters': 1, 'log_interval': 1, 'lora_alpha': 1},
                   at_most={'seed': (1 << 31) - 1, 'n_layer': 10_000, 'batch_size': 1_000_000},
                   one_of={'optimizer': ('adamw', 'muon'), 'zero': (0, 1)})
# -----------------------------------------------------------------------------

# 1) who are we, and what do we compute with?
rank, local_rank, world_size = init_distributed(device)
here = pick_device(device, local_rank)          # 'cuda:3'
precision = pick_dtype(dtype, here)             # 'bfloat16'
on_gpu = torch.device(here).type == 'cuda'
if on_gpu:
    torch.set_float32_matmul_precision('high')  # TF32, where float32 is asked for and the GPU has it
stop = StopSignal(rank)                         # Ctrl-C and the like; from the loop on: finish the step, save, exit
say = stop.say                                  # print, on one process of all
tokens_per_step, grad_accum_steps = divide_batch(total_batch_size, batch_size, block_size, world_size)
compiling = pick_compile(compile, here, max_steps * tokens_per_step)
say(f'using device: {here}, dtype: {precision}, compile: {compiling}')
config['total_batch_size'] = tokens_per_step
say(f'total desired batch size: {tokens_per_step}')
say(f'=> calculated gradient accumulation steps: {grad_accum_steps}')

# 2) the data
folder = find_dataset(dataset)
tokenizer = dataset_tokenizer(folder)
meta = read_meta(folder)
asked = manners(meta)                           # how questions are put, and what is said to those it does not know
layout = dict(batch_size=batch_size, grad_accum_steps=grad_accum_steps, rank=rank, world_size=world_size, seed=seed)
train_data = TokenDataset(folder, 'train', block_size, tokenizer.vocab_size, **layout)
val_data = TokenDataset(folder, 'val', block_size, tokenizer.vocab_size, **layout)
for data in (train_data, val_data):
    say(f'found {len(data.shards)} shards for split {data.split}')

# 3) the model: new, or as a run in out_dir left it, or with somebody's weights
torch.manual_seed(seed)
start = start_from(config, tokenizer)
config['init_from'] = start.init_from
raw_model = start.model.to(here).train()        # evaluation, samples and checkpoints use this one: its shapes may vary
if start.said:
    say(start.said)
say(f'{raw_model.num_params():,} parameters | {tokens_per_step:,} tokens per step | {train_data.n_tokens:,} tokens in '
    f'the data | {max_steps} steps = {max_steps * tokens_per_step / train_data.n_tokens:.2f} epochs')
if not start.path:
    say(f'the first loss should be near ln({tokenizer.vocab_size}) = {math.log(tokenizer.vocab_size):.2f}')

# 4) what moves it: the optimizers, each with what it remembers, and the compiled model on every process
sharded = zero == 1 and world_size > 1          # one process has nothing to share
optimizers = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), torch.device(here).type,
                                            optimizer, sharded, verbose=rank == 0)
scaler = torch.amp.GradScaler(torch.device(here).type, enabled=precision == 'float16')
start.restore(optimizers, scaler)
if start.finished:
    say(f'already finished at step {start.step}; raise --max_steps or choose another --out_dir')
    sys.exit(leave_distributed())
model = raw_model
if compiling:
    say('compiling the model... (takes a minute, once)')
    model = torch.compile(model)
    if here == 'cpu':                           # or its threads add up the embedding's gradient in any order
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # type: ignore[attr-defined]  # costs time
if world_size > 1:
    model = DDP(model, device_ids=[here] if on_gpu else None, gradient_as_bucket_view=True)
    model.broadcast_buffers = False             # the tables of rope are the same everywhere

# 5) what is asked of it on the way
token_bytes = torch.tensor(tokenizer.token_bytes())
if sample_interval:
    tokenizer.encode(sample_prompt)             # a character that it does not have is better found now than later
if zh_eval_interval:
    if not asked['template']:
        raise UserError(f'zh_eval_interval needs a data set of questions and answers, which {dataset!r} is not')
    zh_questions = eval_zh.load_questions()['heldout']
if hellaswag_interval:
    hellaswag_questions = hellaswag.load_questions(tokenizer, hellaswag_data, hellaswag_limit)


def get_batch(step, micro_step):
    """Inputs and targets (B, T) int64 on the device; the copy to a GPU overlaps with what it is doing."""
    x, y = train_data.batch(0 if one_batch else step, micro_step)
    if on_gpu:
        x, y = x.pin_memory(), y.pin_memory()
    return x.to(here, non_blocking=on_gpu), y.to(here, non_blocking=on_gpu)     # from pinned memory only is that safe


def get_lr(step):
    # 1) linear warmup
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    # 2) cosine decay down to min_lr
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


@contextmanager
def evaluating():
    """Inside, the model answers as it will when it is used: no dropout, no gradients. A signal cuts that short."""
    if not stop.agreed:
        raw_model.eval()
        with torch.no_grad(), autocast(here, precision):
            yield
        raw_model.train()
        stop.agree(all_sum(stop.flags(), here))
    if stop.agreed:
        raise Stopped


def estimate_loss():
    """The mean loss over fixed windows of the validation split, their work divided over the processes, and what it
    comes to in bits per byte of text, which compares models with different tokenizers."""
    loss_sum, targets, n_bytes = 0.0, 0, 0
    with evaluating():
        for x, y in itertools.takewhile(lambda _: not stop.number, val_data.eval_batches(eval_iters)):
            loss_sum += raw_model(x.to(here), y.to(here), reduction='sum')[1].item()
            targets += int((y >= 0).sum())
            n_bytes += int(token_bytes[y[y >= 0]].sum())
    loss_sum, targets, n_bytes = all_sum([loss_sum, targets, n_bytes], here)
    return loss_sum / max(1, targets), loss_sum / math.log(2) / max(1, n_bytes)


def accuracy(evaluation, *questions):
    """(right, answered) of an evaluation's questions, each process answering its share."""
    with evaluating():
        right, *_, answered = evaluation.count_right(raw_model, *questions, rank=rank, world_size=world_size,
                                                     should_stop=lambda: stop.number)
    return map(round, all_sum([right, answered], here))


def print_samples(step):
    """Sample from the model as it is now, each process its share."""
    with evaluating():
        texts = [generate_texts([sample_prompt], raw_model, tokenizer, max_new_tokens=sample_tokens, top_k=50,
                                seed=seed + step + i, should_stop=lambda: stop.number)[0]
                 for i in range(rank, num_samples, world_size)]
    everyones = from_everyone(texts)
    samples = [sample_prompt + everyones[i % world_size][i // world_size] for i in range(num_samples)]
    for i, text in enumerate(samples):
        say(f'sample {i}: {text}')
    log_metrics(step, samples=samples)


def save(step, *names):
    """Write all that is needed to go on from `step`, or to sample, to checkpoint.pt and under each of `names`."""
    if diverging or not all(p.isfinite().all() for p in raw_model.parameters()):
        raise diverged(f'step {step}: the weights, or what they lead to, are not finite')
    saver.finish()                              # one copy at a time
    optimizer_states = [whole_state(o) for o in optimizers]     # each process sends its part
    if rank == 0:
        saver.save({
            'model': own_copy(raw_model.state_dict()), 'optimizer': optimizer_states,
            'scaler': scaler.state_dict(), 'model_args': raw_model.model_args(), 'iter_num': step,
            'best_val_loss': best_val_loss, 'config': config, 'tokenizer': tokenizer.state(),
            'tokenizer_fingerprint': tokenizer.fingerprint, **asked,
            'best_step': best_step, 'elapsed_s': elapsed(), 'finished': FINAL in names,
        }, [*names, LATEST])                    # the latest last: what it says is the best is there by then


def diverged(what):
    """The error that ends a run which cannot go on, with the file that is good and the way on from it."""
    stop.show('')
    saver.finish()
    from_everyone(None)                         # nobody leaves before it is on the disk
    learned = best_val_loss < untrained_loss or math.isinf(untrained_loss)
    good = next((path for path in (Path(out_dir, BEST), Path(out_dir, LATEST)) if learned and path.is_file()), None)
    again = f'go on from the last good one: --init_from={good} --out_dir=ANOTHER' if good else (
        'start again: --init_from=scratch')
    return UserError(f'{what}. Nothing more was saved; {again},\nwith a lower --learning_rate, or --dtype=float32')


def elapsed():
    return start.elapsed_s + time.perf_counter() - start_time


def due(interval):
    """Whether what is done every `interval` steps (0 = never), and at the end, is to be done now."""
    return interval > 0 and (last_step or (step > 0 and step % interval == 0))


# -----------------------------------------------------------------------------
# training; the loop runs once more than it trains, so that the end is evaluated, too

x, y = get_batch(start.step, 0)
room = sum(4 * p.numel() * (1 + p.requires_grad) for p in raw_model.parameters())      # bytes: weights, and a moment
release = claim(out_dir, room) if rank == 0 else None       # one run at a time in a folder
log_metrics = MetricsLog(out_dir, start.step, tensorboard, config, active=rank == 0)
saver = BackgroundSaver(out_dir, keep_checkpoints)
stop.listen()
time_to_finish = TimeToFinish()
peak = peak_flops(here, precision) * world_size
start_time = time.perf_counter()
best_val_loss, best_bits = start.best_val_loss, None        # the loss, and if it is of this process, in bits per byte
best_step = start.best_step                     # when that was
untrained_loss = math.inf                       # what a model is worth that has learned nothing, if it was evaluated
skipped = 0                                     # steps in a row whose loss or gradient was not finite
diverging = False                               # whether that is more than float16 finding its scale
max_skipped = 10                                # so many, and the run ends

for step in range(start.step, max_steps + 1):
    last_step = step == max_steps

    # look up from the work now and then: how good is it, and is it safe on disk?
    names = []                                  # what this step is to be kept as, besides checkpoint.pt
    evaluated = last_step or (eval_interval > 0 and step % eval_interval == 0)
    with suppress(Stopped):
        if evaluated:
            val_loss, bits = estimate_loss()
            ppl = math.exp(min(val_loss, 700))
            say(f'validation loss: {val_loss:.4f} | ppl: {ppl:.2f} | bits per byte: {bits:.4f}')
            log_metrics(step, val_loss=val_loss, ppl=ppl, bits_per_byte=bits)
            if step == 0:
                untrained_loss = val_loss
            elif val_loss < best_val_loss and not diverging:        # what is not saved is not the best, either
                best_val_loss, best_bits, best_step = val_loss, bits, step
                names.append(BEST)
            if patience and step - best_step >= patience * eval_interval and not last_step:
                say(f'no better validation loss since step {best_step}: this is the end')
                last_step = True
        if due(hellaswag_interval):
            right, total = accuracy(hellaswag, hellaswag_questions)
            say(f'HellaSwag accuracy: {right}/{total}={right / total:.4f}')
            log_metrics(step, hellaswag=right / total)
        if due(zh_eval_interval):
            right, total = accuracy(eval_zh, tokenizer, asked, zh_questions)
            say(f'held-out questions: {right}/{total}={right / total:.4f} | elapsed: {elapsed():.1f}s')
            log_metrics(step, zh_heldout=right / total)
        if due(sample_interval):
            print_samples(step)
    if checkpoint_interval and step % checkpoint_interval == 0:
        names.append(f'checkpoint_iter_{step}.pt')
    if last_step and not stop.agreed:
        names.append(FINAL)
    if step > 0 and (evaluated or names or stop.agreed) and (last_step or not diverging):
        save(step, *names)
    if last_step or stop.agreed:
        break

    synchronize(here)
    step_start = time.perf_counter()
    lr = get_lr(step)
    for o in optimizers:
        for group in o.param_groups:
            group['lr'] = lr
    torch.manual_seed(mix(seed, step, rank))    # dropout depends on the step, not on its past

    # 1) accumulate the gradient of one global batch, micro-batch by micro-batch
    targets = train_data.targets_in(0 if one_batch else step)
    loss_sum = torch.zeros((), device=here)
    for micro_step in range(grad_accum_steps):
        last_micro_step = micro_step == grad_accum_steps - 1
        if world_size > 1:
            model.require_backward_grad_sync = last_micro_step      # gradients travel once a step
        with autocast(here, precision):
            _, micro_loss = model(x, y, reduction='sum')
        # fetch the next micro-batch while the GPU is busy with this one
        x, y = get_batch(step + 1, 0) if last_micro_step else get_batch(step, micro_step + 1)
        micro_loss = micro_loss / targets           # so they add up to the mean over the global batch
        loss_sum += micro_loss.detach()
        scaler.scale(micro_loss * world_size).backward()    # DDP will divide the sum over processes by world_size

    # 2) clip the gradient
    for o in optimizers:
        scaler.unscale_(o)
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or float('inf')).item()
    loss, *flags = all_sum([loss_sum.item(), *stop.flags()], here)
    stop.agree(flags)

    # 3) step, unless something is not finite: then this step never happened, on any process
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if finite:
        for o in optimizers:
            scaler.step(o)
    scaler.update()
    for o in optimizers:
        o.zero_grad(set_to_none=True)
    skipped = 0 if finite else skipped + 1
    diverging = skipped > 0
    if not finite:
        why = f'{skipped} in a row: the loss ({loss}) or its gradient ({grad_norm}) is not finite'
        if scaler.is_enabled() and math.isfinite(loss):         # so it begins, and now and then, with no harm done
            why, diverging = f'while float16 gradients find their scale, now {scaler.get_scale():g}', False
        say(f'step {step}: skipped, {why}')
        if skipped == max_skipped:
            raise diverged(f'{skipped} steps in a row were not finite')

    # 4) log
    synchronize(here)
    dt = max(time.perf_counter() - step_start, 1e-9)        # seconds; some clocks are coarse
    tok_per_sec = tokens_per_step / dt
    flops = raw_model.flops_per_token() * tok_per_sec
    peak = max(peak, flops)                     # if it was timed here, perhaps while the machine was busy
    if step % log_interval == 0:
        say(f'step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {grad_norm:.4f} | dt: {dt * 1000:.2f}ms | '
            f'tok/sec: {tok_per_sec:.2f} | mfu: {flops / peak * 100:.1f}%')
        log_metrics(step, loss=loss, lr=lr, norm=grad_norm, dt_ms=dt * 1000, tok_per_sec=tok_per_sec, mfu=flops / peak,
                    tokens=(step + 1) * tokens_per_step, elapsed_s=elapsed())
    if step == start.step and world_size > 1:
        sizes = ', '.join(f'{size / 1e6:.1f}' for size in from_everyone(sum(map(state_bytes, optimizers))))
        say(f'optimizer state in each process: {sizes} MB')
    if minutes := time_to_finish(dt, max_steps - step - 1):
        say(f'estimated time to finish: {minutes:.1f} minutes')
    best = f' | best val {best_val_loss:.4f}' if math.isfinite(best_val_loss) else ''
    stop.show(f'step {step + 1}/{max_steps} | loss {loss:.4f}{best} | {tok_per_sec:,.0f} tok/s | '
              f'{time_to_finish.left(max_steps - step - 1) / 60:.1f} min left')

saver.finish()
stop.show('')
best = f', best validation loss: {best_val_loss:.4f}' if math.isfinite(best_val_loss) else ''
best += f' ({best_bits:.4f} bits per byte)' if best_bits is not None else ''
say(f'total time: {elapsed() / 60:.2f} minutes{best}, checkpoints in {out_dir}')
log_metrics.close()
if rank == 0:
    draw_run(out_dir)                           # loss.png, where matplotlib is installed
    release()
sys.exit(leave_distributed(128 + stop.agreed if stop.agreed else 0))
