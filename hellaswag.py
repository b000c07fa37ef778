"""How often does a model find the ending of a story that makes sense? HellaSwag: Zellers et al. 2019, arXiv:1905.07830.

    python hellaswag.py --init_from=out
    python hellaswag.py --limit=1000 --show=3       the first thousand questions only, and three of them in full
    torchrun --standalone --nproc_per_node=8 hellaswag.py

Each question is a context and four endings, one of them right. The model never sees them as a choice: the ending that
it finds the likeliest continuation is its answer. acc compares the losses of whole endings, acc_norm the losses per
token, as build-nanogpt, llm.c and nanochat do (GPT-2 124M: 0.2955). The acc_norm of lm-evaluation-harness, which
leaderboards quote, compares losses per character (0.3114); its task also puts the activity before each question, and
takes out what is in brackets.
"""

import json
import random
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

from configurator import UserError, configure, first_line      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import load_for_use
from device import from_everyone, init_distributed, leave_distributed, pick_device, pick_dtype
from download import DownloadError, hub_download
from metrics import progress_bar
from model import GPT, for_any_shape
from tokenizer import AnyTokenizer

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint, a published model, or a folder; auto = out_dir, or the newest run in it
out_dir = 'out'             # where the run is
data = ''                   # a .jsonl or .parquet with ctx, endings, label; '' = the official validation split
limit = 0                   # ask only the first so many questions; 0 = all
show = 0                    # print so many questions with the losses of their endings
batch_size = 64             # questions in a forward pass; fewer where they are over 256 tokens
device = 'auto'             # auto, cpu, cuda, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
config = configure(globals(), negative=False, at_least={'batch_size': 1})
# -----------------------------------------------------------------------------

REPO, FILE, FOLDER, N_OFFICIAL = 'Rowan/hellaswag', 'data/validation-00000-of-00001.parquet', 'data/hellaswag', 10042

Question = namedtuple('Question', 'context endings label text')     # token ids: a tuple, 4 tuples; 0 to 3; the row
Answer = namedtuple('Answer', 'index sums means')                   # which question; -ln p of its 4 endings, in nats


def load_questions(tokenizer: AnyTokenizer, data: str | Path = '', limit: int = 0) -> list[Question]:
    """The questions of the file `data` (the official ones, downloaded once, if it is ''), the first `limit` of them
    or all, as a list of Questions in the tokens of `tokenizer`. Raises UserError."""
    try:
        path = data or hub_download(REPO, FILE, FOLDER, repo_type='dataset')
    except DownloadError as e:
        raise UserError(f'HellaSwag: {first_line(e)}\nname a local file with --data (of train.py: '
                        '--hellaswag_data), or do without') from None
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
        space = ' '
        if tokenizer.kind == 'bpe' and tokenizer.encode('a b') != tokenizer.encode('a') + tokenizer.encode(' b'):
            space = ''                              # Llama's tokenizer puts one before every text by itself
        endings = tokenizer.encode_batch([space + ending for row in rows for ending in row['endings']])
    except UserError as e:
        raise UserError(f'HellaSwag cannot be put to this model: {e}') from None
    bos = getattr(tokenizer, 'bos', None)
    start = () if bos is None else (bos,)
    return [Question((*start, *contexts[i]), tuple(map(tuple, endings[4 * i:4 * i + 4])), int(row['label']), row)
            for i, row in enumerate(rows)]


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
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
        raise UserError(f'{path} cannot be read as questions: {first_line(e)}') from None


def fit(question: Question, block_size: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(context, endings) of a question, cut so that the context with any of its endings fits into the model: the
    endings at their end, the context at its beginning, but never to nothing."""
    endings = tuple(ending[:block_size] for ending in question.endings)
    room = block_size + 1 - max(map(len, endings))      # + 1: the last token of an ending is predicted, but not read
    return question.context[-room:], endings


@for_any_shape
@torch.inference_mode()
def evaluate(model: GPT, questions: list[Question], *, rank: int = 0, world_size: int = 1, batch_size: int = 64,
             progress: Callable[[list[Answer]], None] | None = None,
             should_stop: Callable[[], bool] | None = None) -> list[Answer]:
    """This process's share of `questions`, as a list of Answers, in no particular order.

    A question is one row: its context, once, and behind it each of its endings, which sees the context and itself but
    not the others, and has the positions that it would have alone.
    model: a GPT in evaluation mode, perhaps under autocast. batch_size: the most questions that go through it at a
    time. progress: is called with the Answers of each batch as soon as they are there. should_stop(): asked before each
    batch whether to leave it at those that are there.
    """
    device = next(model.parameters()).device
    fitted = [fit(question, model.config.block_size) for question in questions]
    lengths = [len(context) - 1 + sum(map(len, endings)) for context, endings in fitted]
    mine = sorted(range(len(questions)), key=lengths.__getitem__, reverse=True)[rank::world_size]
    batches = split(mine, lengths, batch_size)
    random.Random(0).shuffle(batches)       # short questions differ from long ones: in order, the first would mislead

    answers = []
    for batch in batches:
        if should_stop and should_stop():
            break
        # 1) the rows: the context but for its last token, then for each ending that token and the ending's but the last
        idx, targets, positions, parts = torch.zeros(4, len(batch), lengths[batch[0]], dtype=torch.int64)     # (B, T)
        targets.fill_(-100)
        for b, i in enumerate(batch):
            context, endings = fitted[i]
            at = len(context) - 1
            idx[b, :at], positions[b, :at] = torch.tensor(context[:-1]), torch.arange(at)
            for part, ending in enumerate(endings, 1):
                here = slice(at, at + len(ending))
                idx[b, here], targets[b, here] = torch.tensor(context[-1:] + ending[:-1]), torch.tensor(ending)
                positions[b, here], parts[b, here] = torch.arange(len(ending)) + len(context) - 1, part
                at += len(ending)

        # 2) each token sees what is before it in the context and in its own part
        parts = parts.to(device)
        mask = ((parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])).tril()[:, None]    # (B, 1, T, T)
        _, losses = model(idx.to(device), targets.to(device), positions=positions.to(device), mask=mask,
                          reduction='none')                                                             # (B, T)
        losses, parts = losses.cpu().double(), parts.cpu()
        sums = torch.stack([(losses * (parts == part)).sum(dim=1) for part in range(1, 5)], dim=1)      # (B, 4)

        # 3) what each question got
        for i, row in zip(batch, sums.tolist(), strict=True):
            endings = fitted[i][1]
            row = [row[endings.index(ending)] for ending in endings]        # equal endings have the same loss exactly
            answers.append(Answer(i, row, [loss / len(ending) for loss, ending in zip(row, endings, strict=True)]))
        if progress:
            progress(answers[-len(batch):])
    return answers


def split(rows: list[int], lengths: list[int], batch_size: int) -> list[list[int]]:
    """`rows`, indices into `lengths` from long to short, in batches of batch_size at most, or fewer where they are over
    256 tokens long, and with little padding in each."""
    batches, longest, most, tokens = [], 0, 0, 0
    for i in rows:
        n = len(batches[-1]) + 1 if batches else 0          # so many rows there would be, each as long as the first
        if not batches or n > most or n * longest > 1.05 * (tokens + lengths[i]):
            longest, tokens = lengths[i], 0
            most = max(1, batch_size * 256 // max(256, longest))
            batches.append([])
        batches[-1].append(i)
        tokens += lengths[i]
    return batches


def smallest(losses: list[float]) -> int:
    """The index of the smallest loss, the first of equal ones: the ending that the model chooses."""
    return losses.index(min(losses))


def count(answers: list[Answer], questions: list[Question]) -> tuple[int, ...]:
    """(right by the loss per token, right by all of it, right by the loss per character, how many)."""
    right = [0, 0, 0]
    for answer in answers:
        question = questions[answer.index]
        texts = question.text['endings']
        per_character = [loss / max(1, len(text)) for loss, text in zip(answer.sums, texts, strict=True)]
        for i, losses in enumerate((answer.means, answer.sums, per_character)):
            right[i] += smallest(losses) == question.label
    return *right, len(answers)


def count_right(model: GPT, questions: list[Question], *, rank: int = 0, world_size: int = 1,
                should_stop: Callable[[], bool] | None = None) -> tuple[int, ...]:
    """What count() says of this process's share; what train.py asks during training."""
    return count(evaluate(model, questions, rank=rank, world_size=world_size, should_stop=should_stop), questions)


def main() -> None:
    rank, local_rank, world_size = init_distributed(device)
    chosen_device = pick_device(device, local_rank)
    model, tokenizer, _, description = load_for_use(init_from, out_dir, chosen_device, pick_dtype(dtype, chosen_device))
    questions = load_questions(tokenizer, data, limit)

    start, so_far = time.perf_counter(), []
    share = len(range(rank, len(questions), world_size))
    with progress_bar(total=share, desc='HellaSwag', unit='q', disable=rank > 0) as bar:
        def progress(new):
            so_far.extend(new)
            bar.set_postfix_str(f'acc_norm {count(so_far, questions)[0] / len(so_far):.4f}', refresh=False)
            bar.update(len(new))
        answers = evaluate(model, questions, rank=rank, world_size=world_size, batch_size=batch_size, progress=progress)
    answers = [answer for theirs in from_everyone(answers) for answer in theirs]
    seconds = time.perf_counter() - start

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
        right_norm, right, right_by_character, n = count(answers, questions)
        print(f'{description}: {n} questions in {seconds:.1f} s')
        print(f'acc: {right}/{n}={right / n:.4f} | acc_norm: {right_norm}/{n}={right_norm / n:.4f}')
        print(f'acc_norm per character, as lm-evaluation-harness has it: {right_by_character}/{n}='
              f'{right_by_character / n:.4f}')
        print(f'HellaSwag accuracy: {right_norm}/{n}={right_norm / n:.4f}')
    leave_distributed()


if __name__ == '__main__':
    main()
