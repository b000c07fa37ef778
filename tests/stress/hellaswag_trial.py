"""HellaSwag questions a second: hellaswag.evaluate against the plain loop over transformers, one ending at a time.

    python tests/stress/hellaswag_trial.py                      about 3 minutes on two cores with nothing else to do
    python tests/stress/hellaswag_trial.py --commonest=false    the first questions instead, whatever their lengths

A GPT-2 of 124M with fixed random weights, float32, on the CPU. The two ask the same questions, turn and turn about,
and must choose the same endings by both measures. The ratio is that of the medians.

The official file has some hundred questions to each length of context, which are asked together; the first 60 of them
have one or two. So that a few questions tell what many would, they are taken from the commonest lengths: 60 out of a
sample of 300 then have ten each.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import torch  # noqa: E402
from test_hellaswag import choices, choices_of, plain_losses, real_questions, transformers_model, write  # noqa: E402

from configurator import UserError, configure  # noqa: E402
from hellaswag import evaluate, load_questions  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tokenizer import gpt2_tokenizer  # noqa: E402

# -----------------------------------------------------------------------------
data = ''               # a .jsonl or .parquet of questions; '' = those of the tests
n = 60                  # questions
rounds = 3              # how often each of the two answers all of them
commonest = True        # questions whose contexts are of the commonest lengths; false = the first n
threads = 0             # of PyTorch; 0 = as many as it likes; 1 is steadier where others are at work, too
batch_size = 64         # hellaswag.py's
config = configure(globals())
# -----------------------------------------------------------------------------


def main():
    torch.set_num_threads(threads or torch.get_num_threads())
    tokenizer = gpt2_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        questions = load_questions(tokenizer, data or write(Path(folder, 'questions.jsonl'), real_questions()))
    if commonest:
        often = Counter(len(question.context) for question in questions)
        questions.sort(key=lambda question: (-often[len(question.context)], len(question.context)))
    questions = questions[:n]
    torch.manual_seed(0)
    ours = GPT(GPTConfig(vocab_size=50257)).eval()
    theirs = transformers_model(ours)
    rows = [question.text for question in questions]
    lengths = len({len(question.context) for question in questions})
    print(f'{len(rows)} questions, contexts of {lengths} lengths, {ours.num_params():,} parameters, '
          f'{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}')

    def plain():
        return choices_of(plain_losses(lambda ids, n: theirs(ids).logits[:, -n:], rows, tokenizer.encode))

    def fast():
        return choices(evaluate(ours, questions, batch_size=batch_size))

    seconds, cpu_seconds, chosen = {plain: [], fast: []}, {plain: [], fast: []}, []
    for i in range(rounds):
        for way, times in seconds.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            chosen.append(way())
            times.append(time.perf_counter() - start)
            cpu_seconds[way].append(time.process_time() - cpu_start)
        print(f'round {i + 1}: ' + ', '.join(f'{way.__name__} {len(rows) / times[-1]:.3f} questions/s'
                                             for way, times in seconds.items()), flush=True)
    rate = {way.__name__: len(rows) / statistics.median(times) for way, times in seconds.items()}
    print(f'transformers, one ending at a time: {rate["plain"]:.3f} questions/s')
    print(f'hellaswag.evaluate:                 {rate["fast"]:.3f} questions/s')
    cpu = statistics.median(cpu_seconds[plain]) / statistics.median(cpu_seconds[fast])
    print(f'ratio of the medians: {rate["fast"] / rate["plain"]:.2f} (by processor time {cpu:.2f}, which tells more '
          'on a busy machine)')
    if any(c != chosen[0] for c in chosen):
        raise UserError('the choices differ')
    print(f'all {len(rows)} choices agree, by acc and by acc_norm')


if __name__ == '__main__':
    main()
