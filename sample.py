"""Sample from a trained model: prompts in, text out.

    python sample.py --prompt="Once upon a time" --style=creative
    python sample.py --interactive
    python sample.py --prompts_file=prompts.txt --output_file=answers.txt

Without a checkpoint named, the newest run under out/ is used.
"""

import functools
import json
import math
import re
import sys
import time
import unicodedata
from pathlib import Path

from configurator import UserError, configure      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import load_for_use
from device import pick_device, pick_dtype
from model import for_any_shape

# -----------------------------------------------------------------------------
# which model
init_from = 'auto'          # a checkpoint, a published model, or a folder; auto = out_dir, or the newest run in it
out_dir = 'out'             # where runs are
# what to say
prompt = ''                 # the text to continue, or the question to answer; '' = the start of a document
prompts_file = ''           # a text file with one prompt a line, instead
interactive = False         # ask for prompts on the terminal, instead
num_samples = 1             # continuations of each prompt
max_new_tokens = 200        # the most tokens in each of them
stop = ''                   # end a text before this string
show_label = False          # for questions: print the question and 助手: before the answer
output_file = ''            # also write the texts here; as JSON, one object a line, if it ends in .jsonl
# how
style = 'auto'              # focused, balanced, creative or wild: sets the three below; auto = balanced, and for
                            # questions that have a learned answer, exact: always the likeliest token
temperature = -1.0          # below 1: safer; above 1: bolder; 0 = always the likeliest token; -1 = the style's
top_k = -1                  # choose among so many likeliest tokens; 0 = all; -1 = the style's
top_p = -1.0                # choose among the fewest tokens that have this probability together; -1 = the style's
repetition_penalty = 1.0    # above 1, tokens that were there already become less likely
sure = 0.5                  # for such questions: an answer with a token less likely than this is not given; 0 = any is
seed = 1337                 # the same seed gives the same text
# system
device = 'auto'             # auto, cpu, cuda, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
batch_size = 64             # texts made at a time
config = configure(globals(), negative=False, at_least={'num_samples': 1, 'max_new_tokens': 1, 'batch_size': 1},
                   at_most={'seed': (1 << 63) - 1})
# -----------------------------------------------------------------------------

STYLES = {          # temperature, top_k, top_p
    'exact': (0.0, 0, 1.0),
    'focused': (0.4, 20, 0.8),
    'balanced': (0.8, 50, 0.95),
    'creative': (0.9, 100, 0.95),
    'wild': (1.3, 0, 1.0),
}

ANSWER = 48         # tokens: the room for an answer behind a question


@for_any_shape
def generate_texts(prompts, model, tokenizer, *, template='', decline='', sure=0.5, max_new_tokens=200, temperature=0.8,
                   top_k=50, top_p=0.95, repetition_penalty=1.0, stop='', seed=1337, batch_size=64, on_text=None,
                   should_stop=None):
    """Continue each of `prompts`; returns as many strings, without the prompts.

    model, tokenizer: as load_for_use gives them. template: what a question is put into (see conversation()); then the
    answer is never empty and never begins with punctuation. decline: the answer instead of one with a token whose
    probability is below `sure`; '' = none. stop: a string that ends a text, itself left out. on_text(i, text) is told
    the text of prompt i after every token, as far as it cannot change any more. should_stop(): asked after every token
    whether to leave it at that. The other options are those of GPT.stream.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    if template:
        prompts = [conversation(template, p) for p in prompts]
    suppress_first = not_first(tokenizer) if template else ()
    encoded = [tokenizer.start + tokenizer.encode(p) for p in prompts]      # as every document started in training
    encoded = [ids or ([tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n')) for ids in encoded]

    def text_of(i, ids):        # some tokenizers drop a space where a text begins, so it must begin with the prompt
        return tokenizer.decode(encoded[i] + ids)[len(tokenizer.decode(encoded[i])):]

    texts = [''] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))      # neighbours share a batch
    for first in range(0, len(by_length), batch_size):
        rows = by_length[first:first + batch_size]
        lengths = [len(encoded[i]) for i in rows]
        idx = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for b, i in enumerate(rows):
            idx[b, :lengths[b]] = torch.tensor(encoded[i])
        new_ids, running = [[] for _ in rows], set(range(len(rows)))
        for tokens, fresh in model.stream(idx.to(device), lengths, max_new_tokens, temperature, top_k, top_p,
                                          repetition_penalty, eot=tokenizer.eot, n_vocab=tokenizer.vocab_size,
                                          suppress_first=suppress_first, generator=generator):
            tokens, fresh = tokens.tolist(), fresh.tolist()
            for b in sorted(running):
                if not fresh[b]:
                    continue
                new_ids[b].append(tokens[b])
                if tokens[b] == tokenizer.eot or len(new_ids[b]) == max_new_tokens:
                    running.discard(b)
                if stop or on_text:
                    text = text_of(rows[b], new_ids[b])
                    if stop and stop in text:
                        running.discard(b)
                        new_ids[b] = []
                        texts[rows[b]] = text[:text.index(stop)]
                    if on_text:
                        on_text(rows[b], texts[rows[b]] if not new_ids[b] else _settled(text, stop))
            if not running or (should_stop and should_stop()):
                break
        unsure = doubtful(model, [encoded[i] for i in rows], new_ids, sure) if decline else [False] * len(rows)
        for b, i in enumerate(rows):
            if new_ids[b]:
                texts[i] = decline if unsure[b] else text_of(i, new_ids[b])
            while template and len(texts[i]) > 1 and begins_badly(texts[i]):        # a mark spelt in several tokens
                texts[i] = texts[i][1:]
    return texts


def generate_answers(prompts, model, tokenizer, *, decline='', **options):
    """generate_texts for questions, of which some are lists of turns: such a one is first asked by itself, and only if
    it is declined, as it should be if it names nothing, behind the turns before it."""
    answers = generate_texts([p if isinstance(p, str) else p[-1] for p in prompts], model, tokenizer, decline=decline,
                             **options)
    again = [i for i, p in enumerate(prompts) if answers[i] == decline and not isinstance(p, str) and len(p) > 1]
    behind = generate_texts([prompts[i] for i in again], model, tokenizer, decline=decline, **options)
    for i, answer in zip(again, behind, strict=True):
        answers[i] = answer
    return answers


@torch.no_grad()
def doubtful(model, prompts, answers, sure):
    """For each answer, a list of token ids behind its prompt, whether one of its tokens has a probability below `sure`.
    What a model has learned by heart it says with every token at 0.9 and more; what it makes up begins like one answer
    and ends like another, and at the seam there are many ways on."""
    rows = [(prompt + answer)[-model.config.block_size - 1:] for prompt, answer in zip(prompts, answers, strict=True)]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    targets = torch.full_like(idx, -100)
    for row, ids, answer in zip(range(len(rows)), rows, answers, strict=True):
        idx[row, :len(ids)] = torch.tensor(ids)
        targets[row, len(ids) - len(answer):len(ids)] = torch.tensor(answer)
    device = next(model.parameters()).device
    losses = model(idx[:, :-1].to(device), targets[:, 1:].to(device), reduction='none')[1]       # (B, T)
    return (losses.amax(dim=1) > -math.log(sure)).tolist()


def conversation(template, turns):
    """The text that asks a question: `turns` is one, or [question, answer, question, ...], of which the last is asked.
    Each question is normalized, put into the template's place '{prompt}', and followed by its answer."""
    *before, question = [turns] if isinstance(turns, str) else turns
    asked = ''.join(template.replace('{prompt}', normalize_question(q)) + a + '\n'
                    for q, a in zip(before[::2], before[1::2], strict=True))
    return asked + template.replace('{prompt}', normalize_question(question))


# full-width digits and letters, and the ideographic space, to the half-width ones
HALF = {c: c - 0xfee0 for a, z in ('０９', 'ＡＺ', 'ａｚ') for c in range(ord(a), ord(z) + 1)} | {0x3000: ' '}
HAN = '[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]'      # Chinese characters and the marks between them


def normalize_question(text):
    """A question as those in training are written: half-width letters and digits, full-width marks, no stray spaces."""
    text = re.sub(f'(?<={HAN}) +| +(?={HAN})', '', text.translate(HALF).strip())
    return re.sub(f'(?<={HAN})[,?!:;]', lambda mark: chr(ord(mark[0]) + 0xfee0), text)


def begins_badly(text):
    """Whether no answer begins like this: nothing, white space, or punctuation that opens nothing."""
    return not text.strip() or text[0].isspace() or unicodedata.category(text[0]) in ('Pc', 'Pd', 'Pe', 'Pf', 'Po')


@functools.lru_cache
def not_first(tokenizer):
    """The ids that no answer begins with, end-of-text among them."""
    return tuple(i for i in range(tokenizer.vocab_size) if begins_badly(tokenizer.decode([i])))


def _settled(text, stop):
    """`text` without an end that the next token may change: half a character, or the beginning of `stop`."""
    text = text.rstrip('\ufffd')
    for n in range(min(len(stop), len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return text[:-n]
    return text


def main():
    by_hand = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
    for name, good, rule in [('style', style in (*STYLES, 'auto'), f'auto, {", ".join(STYLES)}'),
                             ('temperature', temperature == -1 or temperature >= 0, 'at least 0'),
                             ('top_k', top_k >= -1, 'at least 0'),
                             ('top_p', top_p == -1 or 0 < top_p <= 1, 'above 0 and at most 1'),
                             ('sure', 0 <= sure < 1, 'at least 0 and below 1'),
                             ('repetition_penalty', repetition_penalty > 0, 'above 0')]:
        if not good:
            raise UserError(f'{name} must be {rule}, not {config[name]}')
    prompts = [prompt]
    if prompts_file:
        try:
            lines = Path(prompts_file).read_text(encoding='utf-8-sig').splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'the prompts in {prompts_file!r} cannot be read as UTF-8: {e}') from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f'{prompts_file} has no prompts: write one a line')
    if output_file and (Path(output_file).is_dir() or not Path(output_file).parent.is_dir()):
        raise UserError(f'there is no folder for output_file {output_file!r}; make it first')

    chosen_device = pick_device(device)
    model, tokenizer, checkpoint, description = load_for_use(init_from, out_dir, chosen_device,
                                                             pick_dtype(dtype, chosen_device))
    template, decline = checkpoint.get('template', ''), checkpoint.get('decline', '') if sure else ''
    print(description, file=sys.stderr)
    chosen = style if style != 'auto' else 'exact' if decline else 'balanced'
    options = {name: value if value != -1 else usual
               for (name, value), usual in zip(by_hand.items(), STYLES[chosen], strict=True)}
    options |= dict(max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, stop=stop, seed=seed,
                    template=template, decline=decline, sure=sure, batch_size=batch_size)

    def answer(prompts, before=()):
        """The texts for `prompts`, num_samples each, streamed to the terminal if there is one text and a terminal.
        before: a question and its answer, which are still in mind."""
        each = [p for p in prompts for _ in range(num_samples)]
        streaming = len(each) == 1 and sys.stdout.isatty() and not decline
        shown = len(heading(0, each[0])) if streaming else 0
        if streaming:
            print(heading(0, each[0]), end='', flush=True)

        def show(_, text):
            nonlocal shown
            whole = heading(0, each[0]) + text
            print(whole[shown:], end='', flush=True)
            shown = max(shown, len(whole))

        start = time.perf_counter()
        if decline:
            texts = generate_answers([[*before, in_room(p)] for p in each], model, tokenizer, **options)
        else:
            asked = list(map(in_room, each)) if template else each
            texts = generate_texts(asked, model, tokenizer, on_text=show if streaming else None, **options)
        seconds = max(time.perf_counter() - start, 1e-9)
        if streaming:
            print((heading(0, each[0]) + texts[0])[shown:])
        else:
            for i, (p, text) in enumerate(zip(each, texts, strict=True)):
                print(heading(i, p) + text)
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        print(f'({tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s)', file=sys.stderr)
        return list(zip(each, texts, strict=True))

    def tokens_of(turns):
        return len(tokenizer.encode(conversation(template, turns)))

    def in_room(question):
        """The end of a question, if the model cannot see all of it and an answer."""
        excess = tokens_of(question) - (model.config.block_size - ANSWER)
        if excess <= 0:
            return question
        print(f'(the question is too long for this model, which was not given its first {excess} characters)',
              file=sys.stderr)
        return question[excess:]

    def heading(i, p):
        before = p if not template else template.replace('{prompt}', p) if show_label else ''
        return f'[Sample {i + 1}] {before}'

    results = []
    if interactive:
        print('type a prompt and Enter; an empty line or Ctrl-D ends', file=sys.stderr)
        before = ()                 # the last question and its answer, if the model was trained on such, and has room
        while line := _ask():
            if before and tokens_of([*before, line]) > model.config.block_size - ANSWER:
                before = ()
            results += answer([line], before)
            before = results[-1] if decline and results[-1][1] != decline else ()
    else:
        results = answer(prompts)
    if output_file:
        if output_file.endswith('.jsonl'):
            lines = [json.dumps({'prompt': p, 'text': t}, ensure_ascii=False) for p, t in results]
        else:
            lines = [heading(i, p) + t for i, (p, t) in enumerate(results)]
        Path(output_file).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('✔ Generation complete.')


def _ask():
    try:
        return input('> ').strip()
    except EOFError:
        return ''


if __name__ == '__main__':
    main()
