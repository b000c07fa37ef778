"""How often does a model find the ending of a story that makes sense? HellaSwag: Zellers et al. 2019, arXiv:1905.07830.

    python hellaswag.py --init_from=out
    python hellaswag.py --limit=1000 --show=3       the first thousand questions only, and three of them in full
    torchrun --standalone --nproc_per_node=8 hellaswag.py

Each question is a context and four endings, one of them right. The model never sees them as a choice: the ending that
it finds the likeliest continuation is its answer. acc compares the losses of whole endings, acc_norm the losses per
token; acc_norm is the number usually quoted (GPT-2 124M: 0.2955).
"""

import json
import random
import time
from collections import namedtuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import load_for_use
from configurator import UserError, configure
from device import init_distributed, pick_device, pick_dtype
from download import hub_download
from model import KVCache

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint file or folder; auto = out_dir, or the newest run in a folder of it
out_dir = 'out'             # where the run is
data = ''                   # a .jsonl or .parquet with ctx, endings, label; '' = the official validation split
limit = 0                   # ask only the first so many questions; 0 = all
show = 0                    # print so many questions with the losses of their endings
batch_size = 128            # contexts, and then endings, in a forward pass; fewer where they are over 128 tokens
device = 'auto'             # auto, cpu, cuda, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
config = configure(globals())
# -----------------------------------------------------------------------------

REPO, FILE, FOLDER, N_OFFICIAL = 'Rowan/hellaswag', 'data/validation-00000-of-00001.parquet', 'data/hellaswag', 10042

Question = namedtuple('Question', 'context endings label text')     # token ids: a tuple, 4 tuples; 0 to 3; the row
Answer = namedtuple('Answer', 'index sums means')                   # which question; -ln p of its 4 endings, in nats


def load_questions(tokenizer, data='', limit=0):
    """The questions of the file `data` (the official ones, downloaded once, if it is ''), the first `limit` of them
    or all, as a list of Questions in the tokens of `tokenizer`. Raises UserError."""
    path = data or hub_download(REPO, FILE, FOLDER, repo_type='dataset')
    rows = []
    for place, row in read_rows(path):
        try:
            good = [type(row['ctx']), *map(type, row['endings'])] == [str] * 5 and isinstance(row['endings'], list)
            good = good and row['ctx'] and str(row['label']) in ('0', '1', '2', '3')
        except (KeyError, TypeError):
            good = False
        if not good:
            raise UserError(f'{place} is no question: it needs ctx (a text), endings (4 texts) and label (0 to 3)')
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows or not data and not limit and len(rows) != N_OFFICIAL:
        raise UserError(f'{path} has {len(rows):,} questions' + (
            '' if data else f', not {N_OFFICIAL:,}; delete it, and it will be downloaded again'))
    try:
        contexts = tokenizer.encode_batch([row['ctx'] for row in rows])
        endings = tokenizer.encode_batch([' ' + ending for row in rows for ending in row['endings']])
    except UserError as e:
        raise UserError(f'HellaSwag cannot be put to this model: {e}') from None
    bos = getattr(tokenizer, 'bos', None)
    start = () if bos is None else (bos,)
    return [Question((*start, *contexts[i]), tuple(map(tuple, endings[4 * i:4 * i + 4])), int(row['label']), row)
            for i, row in enumerate(rows)]


def read_rows(path):
    """Yields (place, row) for every line of a .jsonl, or row of a .parquet. Raises UserError."""
    try:
        if str(path).endswith('.parquet'):
            import pyarrow.parquet
            yield from ((f'{path}, row {n}', row) for n, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()))
            return
        with open(path, 'rb') as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    try:
                        yield f'{path}:{n}', json.loads(line)
                    except (ValueError, RecursionError) as e:
                        raise UserError(f'{path}:{n} is not JSON: {e}') from None
    except (OSError, ValueError) as e:      # pyarrow's exceptions are ValueErrors, too
        raise UserError(f'{path} cannot be read as questions: {str(e).splitlines()[0]}') from None


def fit(question, block_size):
    """(context, endings) of a question, cut so that the context with any of its endings fits into the model: the
    endings at their end, the context at its beginning, but never to nothing."""
    endings = tuple(ending[:block_size] for ending in question.endings)
    room = block_size + 1 - max(map(len, endings))      # + 1: the last token of an ending is predicted, but not read
    return question.context[-room:], endings


@torch.inference_mode()
def evaluate(model, questions, *, rank=0, world_size=1, batch_size=128, progress=None):
    """This process's share of `questions`, as a list of Answers, in no particular order.

    A context goes through the model once, into a KV cache, and its endings behind it; questions whose contexts are of
    one length go together, so that no padding stands in between.
    model: a GPT in evaluation mode, perhaps under autocast. batch_size: the most contexts, and the most endings, that
    go through it at a time. progress: is called with the Answers of each batch as soon as they are there.
    """
    device = next(model.parameters()).device
    # padding tokens that take as long as one more forward pass: measured on two cores, estimated for a GPU
    slack = 32 if device.type == 'cpu' else 2048
    fitted = [fit(question, model.config.block_size) for question in questions]

    def context_length(i):
        return len(fitted[i][0])

    mine = sorted(range(len(questions)), key=context_length, reverse=True)[rank::world_size]
    batches = split(mine, context_length, batch_size, slack=0)
    random.Random(0).shuffle(batches)       # short contexts differ from long ones: in order, the first would mislead

    answers = []
    for batch in batches:
        # 1) the contexts, all of length T, into the cache: what they end in is the loss of all first tokens
        contexts = torch.tensor([fitted[i][0] for i in batch], device=device)                   # (n, T)
        n, T = contexts.shape
        cache = KVCache(model.config, n, T)
        logits, _ = model(contexts, cache=cache, last_only=True)                                # (n, 1, V)
        first = -logits[:, 0].float().log_softmax(dim=-1).cpu()                                 # (n, V)
        rows = {(b, ending) for b, i in enumerate(batch) for ending in fitted[i][1]}            # equal ones count once
        losses = {(b, ending): first[b, ending[0]].item() for b, ending in rows}

        # 2) the rest of the endings, each behind its row of the cache, with others of like length
        rows = sorted((row for row in rows if len(row[1]) > 1), key=lambda row: (-len(row[1]), row))
        for part in split(rows, lambda row, T=T: T + len(row[1]), batch_size, slack):
            longest = len(part[0][1])
            padded = [ending + (-100,) * (longest - len(ending)) for _, ending in part]
            padded = torch.tensor(padded, device=device)                                        # (rows, longest)
            behind = cache.pick(torch.tensor([b for b, _ in part], device=device), longest - 1)
            _, loss = model(padded[:, :-1].clamp(min=0), padded[:, 1:], cache=behind, reduction='none')
            for row, rest in zip(part, loss.cpu().double().sum(dim=1).tolist(), strict=True):
                losses[row] += rest

        # 3) what each question got
        for b, i in enumerate(batch):
            sums = [losses[b, ending] for ending in fitted[i][1]]
            answers.append(Answer(i, sums, [s / len(ending) for s, ending in zip(sums, fitted[i][1], strict=True)]))
        if progress:
            progress(answers[-n:])
    return answers


def split(rows, length, batch_size, slack):
    """`rows`, whose length(row) does not rise, in parts that need at most `slack` tokens of padding: of `batch_size`
    rows, or fewer where they are over 128 tokens long, as it is their tokens in the cache that take memory."""
    parts, longest, most, padding = [], 0, 0, 0
    for row in rows:
        padding += longest - length(row)
        if not parts or padding > slack or len(parts[-1]) == most:
            longest, padding = length(row), 0
            most = max(1, batch_size * 128 // max(128, longest))
            parts.append([])
        parts[-1].append(row)
    return parts


def smallest(losses):
    """The index of the smallest loss, the first of equal ones: the ending that the model chooses."""
    return losses.index(min(losses))


def count(answers, questions):
    """(right by acc_norm, right by acc, how many)."""
    return (sum(smallest(a.means) == questions[a.index].label for a in answers),
            sum(smallest(a.sums) == questions[a.index].label for a in answers), len(answers))


def count_right(model, questions, *, rank=0, world_size=1):
    """(right by acc_norm, right by acc, answered) for this process's share; what train.py asks during training."""
    return count(evaluate(model, questions, rank=rank, world_size=world_size), questions)


def main():
    for name, least in {'limit': 0, 'show': 0, 'batch_size': 1}.items():
        if config[name] < least:
            raise UserError(f'{name} must be at least {least}, not {config[name]}')
    rank, local_rank, world_size = init_distributed(device)
    chosen_device = pick_device(device, local_rank)
    model, tokenizer, _, description = load_for_use(init_from, out_dir, chosen_device, pick_dtype(dtype, chosen_device))
    questions = load_questions(tokenizer, data, limit)

    start, so_far = time.time(), []
    share = len(range(rank, len(questions), world_size))
    with tqdm(total=share, desc='HellaSwag', unit='q', disable=None if rank == 0 else True) as bar:
        def progress(new):
            so_far.extend(new)
            bar.set_postfix_str(f'acc_norm {count(so_far, questions)[0] / len(so_far):.4f}', refresh=False)
            bar.update(len(new))
        answers = evaluate(model, questions, rank=rank, world_size=world_size, batch_size=batch_size, progress=progress)
    if world_size > 1:
        everyones = [None] * world_size
        dist.all_gather_object(everyones, answers)
        answers = [answer for theirs in everyones for answer in theirs]
    seconds = time.time() - start

    if rank == 0:
        for answer in sorted(answers)[:show]:
            question = questions[answer.index]
            print(f'[{question.text.get("ind", answer.index)}] {question.text["ctx"]}')
            by_sum, by_mean = smallest(answer.sums), smallest(answer.means)
            for k, ending in enumerate(question.text['endings']):
                print(f'  {" ✔"[k == question.label]} {answer.sums[k]:9.4f}{" ←"[k == by_sum]} '
                      f'{answer.means[k]:8.4f}{" ←"[k == by_mean]} {ending}')
        if show:
            print('✔ the right ending, with its loss in nats, whole and per token; ← the smallest, which is chosen')
        right_norm, right, n = count(answers, questions)
        print(f'{description}: {n} questions in {seconds:.1f} s')
        print(f'acc: {right}/{n}={right / n:.4f} | acc_norm: {right_norm}/{n}={right_norm / n:.4f}')
        print(f'HellaSwag accuracy: {right_norm}/{n}={right_norm / n:.4f}')
    if world_size > 1:
        dist.barrier()                      # gloo aborts if one process leaves while another still listens
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
