"""How many questions that it has never seen does a question-and-answer model answer right?

    python eval_zh.py --init_from=out/zh
    python eval_zh.py --show            every question with its answer

All questions are answered greedily, in batches through the KV cache. An answer is right if it is to the letter the one
that belongs to the question, or in small talk another that fits. SETS says what is asked; data/zh_qa/README.md, how the
questions were made.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from configurator import UserError, configure      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import load_for_use
from device import pick_device, pick_dtype
from model import GPT
from sample import generate_answers, manners
from tokenizer import AnyTokenizer

# -----------------------------------------------------------------------------
init_from = 'auto'          # a checkpoint file or folder; auto = out_dir, or the newest run in a folder of it
out_dir = 'out/zh'          # where the run is
data = ''                   # a folder with the questions; '' = data/zh_qa
show = False                # print each question with its answer
max_new_tokens = 96         # the most tokens in an answer
batch_size = 128            # questions answered at a time
device = 'auto'             # auto, cpu, cuda, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
config = configure(globals(), negative=False, at_least={'max_new_tokens': 1, 'batch_size': 1})
# -----------------------------------------------------------------------------

SETS = {'heldout': 'held-out questions', 'heldout_forms': 'unseen forms', 'heldout_slips': 'slips of the pen',
        'heldout_talk': 'small talk', 'heldout_turns': 'second questions', 'heldout_unknown': 'out-of-scope questions',
        'heldout_near': 'near misses'}
SHIPPED = Path(__file__).resolve().parent / 'data' / 'zh_qa'


def load_questions(folder: str | Path = SHIPPED) -> dict[str, list[dict]]:
    """{'heldout': [{'prompt', 'completion'}], ...} from the .jsonl files of `folder`; a prompt is a question, or a list
    of turns of which it is the last (see sample.conversation); 'also' are other answers that fit. Raises UserError."""
    paths = {name: Path(folder, f'{name}.jsonl') for name in SETS}
    return {name: read_questions(paths[name]) for name in [name for name in SETS if paths[name].exists()] or SETS}


def read_questions(path: Path) -> list[dict]:
    """[{'prompt', 'completion'}] from a .jsonl file, see load_questions(). Raises UserError."""
    try:
        with open(path, encoding='utf-8') as f:
            return [as_question(json.loads(line)) for line in f if line.strip()]
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read as questions ({e}); --data names the folder') from None


def as_question(row: dict) -> dict:
    """A line of a .jsonl file as {'prompt', 'completion'}: of a conversation, what was said last is to be answered."""
    if 'conversations' not in row:
        return row
    *turns, answer = [turn['content'] for turn in row['conversations']]
    return {'prompt': turns, 'completion': answer}


def evaluate(model: GPT, tokenizer: AnyTokenizer, asked: dict, questions: dict[str, list[dict]], *,
             rank: int = 0, world_size: int = 1, batch_size: int = 128, max_new_tokens: int = 96,
             should_stop: Callable[[], bool] | None = None) -> dict[str, list[tuple]]:
    """Answer this process's share of `questions`, asked as sample.manners() says. Returns {set: [(prompt, the
    answers that fit, answer), ...]}."""
    mine = [(name, row) for name in questions for row in questions[name]][rank::world_size]
    answers = generate_answers([row['prompt'] for _, row in mine], model, tokenizer, **asked, temperature=0,
                               max_new_tokens=max_new_tokens, batch_size=batch_size, should_stop=should_stop)
    results = {name: [] for name in questions}
    for (name, row), answer in zip(mine, answers, strict=True):
        results[name].append((row['prompt'], [row['completion'], *row.get('also', ())], answer))
    return results


def count_right(model: GPT, tokenizer: AnyTokenizer, asked: dict[str, str], questions: list[dict],
                **share) -> tuple[int, int]:
    """(right, answered) among a list of questions [{'prompt', 'completion'}]; what train.py asks during training."""
    rows = evaluate(model, tokenizer, asked, {'heldout': questions}, **share)['heldout']
    return sum(answer in fitting for _, fitting, answer in rows), len(rows)


def count(results: dict[str, list[tuple]], asked: dict[str, str],
          learned: Iterable[str] = ()) -> dict[str, dict[str, int]]:
    """{set: {'right', 'other', 'declined', 'noise', 'total'}}: an answer that is not right is one that belongs to
    another question, one that declines or asks what is meant (sample.manners()), or noise. learned: answers that the
    model was taught, beside those that are right for a question here."""
    known = {answer for rows in results.values() for _, fitting, _ in rows for answer in fitting} | set(learned)
    declining = {asked['decline'], asked['follow']}
    counts = {}
    for name, rows in results.items():
        wrong = [answer for _, fitting, answer in rows if answer not in fitting]
        declined = sum(answer in declining for answer in wrong)
        noise = sum(answer not in known | declining for answer in wrong)
        counts[name] = {'right': len(rows) - len(wrong), 'other': len(wrong) - declined - noise, 'declined': declined,
                        'noise': noise, 'total': len(rows)}
    return counts


def main() -> None:
    chosen_device = pick_device(device)
    model, tokenizer, checkpoint, description = load_for_use(init_from, out_dir, chosen_device,
                                                             pick_dtype(dtype, chosen_device))
    asked = manners(checkpoint)
    if not asked['template']:
        raise UserError(f'{description} was not trained on questions and answers: its data set has no template')
    questions = load_questions(data or SHIPPED)
    start = time.perf_counter()
    with torch.inference_mode():
        results = evaluate(model, tokenizer, asked, questions, batch_size=batch_size, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    if show:
        for name, rows in results.items():
            for prompt, fitting, answer in rows:
                mark = '✔' if answer in fitting else '✘'
                prompt = prompt if isinstance(prompt, str) else ' '.join(prompt)
                print(f'{mark} [{name}] {prompt} {answer}' + ('' if answer in fitting else f'  (应为：{fitting[0]})'))
    train = Path(data or SHIPPED, 'train.jsonl')
    learned = {row['completion'] for row in read_questions(train)} if train.exists() else ()
    for name, n in count(results, asked, learned).items():
        print(f'{SETS[name]}: {n["right"]}/{n["total"]}={n["right"] / n["total"]:.4f}'
              f' | another answer: {n["other"] / n["total"]:.4f}'
              f' | wrongly declined: {n["declined"] / n["total"]:.4f} | noise: {n["noise"] / n["total"]:.4f}')
    total = sum(map(len, questions.values()))
    print(f'{description}: {total} questions in {seconds:.1f} s')


if __name__ == '__main__':
    main()
