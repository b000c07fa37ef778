"""Sample from a trained model: prompts in, text out.

    python sample.py --prompt="Once upon a time" --style=creative
    python sample.py --interactive
    python sample.py --prompts_file=prompts.txt --output_file=answers.txt

Without a checkpoint named, the newest run under out/ is used.
"""

import functools
import json
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import permutations
from pathlib import Path

from configurator import UserError, configure      # first: from here on, Ctrl-C is quiet

import torch

from checkpoint import load_for_use
from dataset import ASKED
from device import pick_device, pick_dtype
from model import GPT, for_any_shape
from tokenizer import AnyTokenizer, encode_prompt

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
system = ''                 # what a model that chats is told before the conversation
raw = False                 # continue the prompt as it stands, even if the model was trained to answer questions
output_file = ''            # also write the texts here; as JSON, one object a line, if it ends in .jsonl
# how
style = 'auto'              # focused, balanced, creative or wild: sets the three below; auto = balanced, and for
                            # questions that have a learned answer, exact: always the likeliest token
temperature = -1.0          # below 1: safer; above 1: bolder; 0 = always the likeliest token; -1 = the style's
top_k = -1                  # choose among so many likeliest tokens; 0 = all; -1 = the style's
top_p = -1.0                # choose among the fewest tokens that have this probability together; -1 = the style's
repetition_penalty = 1.0    # above 1, tokens that were there already become less likely
sure = 0.1                  # for such questions: by how much likelier than declining an answer must be; 0 = off
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
NAMELESS = 0.1      # from this chance on that a question names nothing (还有呢？) it is about what was said before
SURE_AGAIN = 0.9    # `sure`, for what may have been meant by a question with a slip of the pen


@for_any_shape
def generate_texts(prompts: list, model: GPT, tokenizer: AnyTokenizer, *, template: str = '', system: str = '',
                   decline: str = '', sure: float = 0.1, max_new_tokens: int = 200, temperature: float = 0.8,
                   top_k: int = 50, top_p: float = 0.95, repetition_penalty: float = 1.0, stop: str = '',
                   seed: int = 1337, batch_size: int = 64, on_text: Callable | None = None,
                   should_stop: Callable | None = None) -> list[str]:
    """Continue each of `prompts`; returns as many strings, without the prompts.

    model, tokenizer: as load_for_use gives them. template, system: see encode_prompt(); what answers a '{prompt}' is
    never empty and never begins with punctuation. decline: the answer instead of one that is not by `sure` more
    probable than it; '' = none. stop: a string that ends a text, itself left out. on_text(i, text) is told the text of
    prompt i after every token, as far as it cannot change any more. should_stop(): asked after every token whether to
    leave it at that. The other options are those of GPT.stream.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    asked = '{prompt}' in template
    suppress_first = not_first(tokenizer) if asked else ()
    encoded = [encode_prompt(p, tokenizer, template, system) for p in prompts]

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
            ids, going_on = tokens.tolist(), fresh.tolist()
            for b in sorted(running):
                if not going_on[b]:
                    continue
                new_ids[b].append(ids[b])
                if ids[b] == tokenizer.eot or len(new_ids[b]) == max_new_tokens:
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
        doubted = [False] * len(rows)
        if decline:     # what is learned is near 1; what is made up is shared out among the answers that it could be
            questions, declining = [encoded[i] for i in rows], tokenizer.encode(decline) + [tokenizer.eot]
            chances = zip(probabilities(model, questions, new_ids),
                          probabilities(model, questions, [declining] * len(rows)), strict=True)
            doubted = [given - declined < sure for given, declined in chances]
        for b, i in enumerate(rows):
            if new_ids[b]:
                texts[i] = decline if doubted[b] else text_of(i, new_ids[b])
            while asked and len(texts[i]) > 1 and begins_badly(texts[i]):        # a mark spelt in several tokens
                texts[i] = texts[i][1:]
    return texts


def manners(source: dict) -> dict[str, str]:
    """How questions are asked of a model, by its checkpoint or its data's meta.json: what ASKED names, for
    generate_answers(), '' where there is none."""
    return {key: source.get(key, '') for key in ASKED}


def generate_answers(prompts: list, model: GPT, tokenizer: AnyTokenizer, *, decline: str = '', follow: str = '',
                     alike: str = '', traditional: str = '', batch_size: int = 64,
                     on_follow: Callable | None = None, **options) -> list[str]:
    """generate_texts for questions, of which some are lists of turns. Such a one is first asked by itself; if `follow`
    has there a probability of NAMELESS or more, as it is trained to have where a question names nothing, it is asked
    behind the turns before it, too, unless it is declined there. on_follow(i) is told that the answer to question i is
    about what was said before. Without `follow`, `decline` takes its place. What is declined by itself is asked again
    as it may have been meant, see undo_slips(); there the model must be surer of the answer, by SURE_AGAIN."""
    def ask(questions, **more):
        return generate_texts(questions, model, tokenizer, decline=decline, batch_size=batch_size, **options | more)

    alone = [p if isinstance(p, str) else p[-1] for p in prompts]
    asking_back = tokenizer.encode(follow or decline) + [tokenizer.eot]
    answers, behind = ask(alone), []
    meant = [(i, question) for i, answer in enumerate(answers) if answer == decline
             for question in undo_slips(alone[i], alike, traditional)]
    for (i, _), answer in zip(meant, ask([question for _, question in meant], sure=SURE_AGAIN), strict=True):
        if answers[i] == decline and answer != follow:
            answers[i] = answer
    turns = [i for i, p in enumerate(prompts) if not isinstance(p, str) and len(p) > 1]
    for first in range(0, len(turns), batch_size):
        some = turns[first:first + batch_size]
        questions = [encode_prompt(prompts[i][-1], tokenizer, options['template']) for i in some]
        chances = probabilities(model, questions, [asking_back] * len(some))
        behind += [i for i, chance in zip(some, chances, strict=True) if chance >= NAMELESS]
    for i, answer in zip(behind, ask([prompts[i] for i in behind]), strict=True):
        if answer != decline:
            answers[i] = answer
            if on_follow:
                on_follow(i)
    return answers


@torch.no_grad()
def probabilities(model: GPT, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """The probability of each answer, a list of token ids behind its prompt: the product of its tokens'."""
    rows = [(prompt + answer)[-model.config.block_size - 1:] for prompt, answer in zip(prompts, answers, strict=True)]
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    targets = torch.full_like(idx, -100)
    for row, ids, answer in zip(range(len(rows)), rows, answers, strict=True):
        begins = max(1, len(ids) - len(answer))             # the answer, or as much of its end as the model can see
        idx[row, :len(ids)] = torch.tensor(ids)
        targets[row, begins:len(ids)] = torch.tensor(ids[begins:])
    device = next(model.parameters()).device
    losses = model(idx[:, :-1].to(device), targets[:, 1:].to(device), reduction='none')[1]       # (B, T)
    return losses.sum(dim=1).neg().exp().tolist()


def undo_slips(question: str, alike: str, traditional: str) -> list[str]:
    """What may have been meant: `question` in simplified characters, and with each character put for one that it may be
    mistyped for, or left out if it is there twice. alike: pairs of characters that are mistyped for each other;
    traditional: pairs of a simplified one and its traditional one; with spaces between the pairs."""
    plain = question.translate({ord(pair[1]): pair[0] for pair in traditional.split()})
    others: dict[str, str] = {}
    for pair in alike.split():
        for a, b in permutations(pair):
            others[a] = others.get(a, '') + b
    found = [plain[:i] + other + plain[i + 1:] for i, c in enumerate(plain) for other in others.get(c, '')]
    found += [plain[:i] + plain[i + 1:] for i in range(1, len(plain)) if plain[i] == plain[i - 1]]
    return [plain] * (plain != question) + found


def begins_badly(text: str) -> bool:
    """Whether no answer begins like this: nothing, white space, or punctuation that opens nothing."""
    return not text.strip() or text[0].isspace() or unicodedata.category(text[0]) in ('Pc', 'Pd', 'Pe', 'Pf', 'Po')


@functools.lru_cache
def not_first(tokenizer: AnyTokenizer) -> tuple[int, ...]:
    """The ids that no answer begins with, end-of-text among them."""
    return tuple(i for i in range(tokenizer.vocab_size) if begins_badly(tokenizer.decode([i])))


def _settled(text, stop):
    """`text` without an end that the next token may change: half a character, or the beginning of `stop`."""
    text = text.rstrip('\ufffd')
    for n in range(min(len(stop), len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return text[:-n]
    return text


def sampling_options(settings: dict, exact: bool) -> dict:
    """What generate_texts is to be told of `settings`; exact: what style 'auto' is. Raises UserError."""
    rules = {'style': (lambda x: x in (*STYLES, 'auto'), f'auto, {", ".join(STYLES)}'),
             'temperature': (lambda x: x == -1 or x >= 0, 'at least 0'),
             'top_k': (lambda x: x >= -1, 'at least 0'),
             'top_p': (lambda x: x == -1 or 0 < x <= 1, 'above 0 and at most 1'),
             'sure': (lambda x: 0 <= x < 1, 'at least 0 and below 1'),
             'max_new_tokens': (lambda x: x >= 1, 'at least 1'),
             'repetition_penalty': (lambda x: x > 0, 'above 0')}
    for name, (good, rule) in rules.items():
        if not good(settings[name]):
            raise UserError(f'{name} must be {rule}, not {settings[name]}')
    style = settings['style'] if settings['style'] != 'auto' else 'exact' if exact else 'balanced'
    of_style = dict(zip(('temperature', 'top_k', 'top_p'), STYLES[style], strict=True))
    others = ('max_new_tokens', 'repetition_penalty', 'stop', 'seed', 'sure', 'batch_size', 'system')
    return {name: settings[name] if settings[name] != -1 else usual for name, usual in of_style.items()} | {
        name: settings[name] for name in others}


def read_prompts() -> list[str]:
    """The prompts that the settings name. Raises UserError."""
    if not prompts_file:
        return [prompt]
    try:
        lines = Path(prompts_file).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'the prompts in {prompts_file!r} cannot be read as UTF-8: {e}') from None
    if not any(line.strip() for line in lines):
        raise UserError(f'{prompts_file} has no prompts: write one a line')
    return [line for line in lines if line.strip()]


def main():
    sampling_options(config, exact=False)       # a mistake in them is better found now
    prompts = read_prompts()
    if output_file and (Path(output_file).is_dir() or not Path(output_file).parent.is_dir()):
        raise UserError(f'there is no folder for output_file {output_file!r}; make it first')
    chosen_device = pick_device(device)
    model, tokenizer, checkpoint, description = load_for_use(init_from, out_dir, chosen_device,
                                                             pick_dtype(dtype, chosen_device))
    manner = manners({} if raw else checkpoint)
    template, decline = manner['template'], manner['decline'] if sure else ''
    print(description, file=sys.stderr)

    followed = []           # filled if the last question was about what was said before, such as 还有呢？

    def answer(prompts, before=()):
        """The texts for `prompts`, num_samples each, streamed to the terminal if there is one text and a terminal.
        before: questions and answers that are still in mind."""
        options = sampling_options(config, exact=bool(decline))
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

        followed.clear()
        start = time.perf_counter()
        asked = [[*before, in_room(p)] for p in each] if template else each
        if decline:
            texts = generate_answers(asked, model, tokenizer, on_follow=followed.append, **manner, **options)
        else:
            texts = generate_texts(asked, model, tokenizer, template=template, on_text=show if streaming else None,
                                   **options)
        seconds = max(time.perf_counter() - start, 1e-9)
        if streaming:
            print((heading(0, each[0]) + texts[0])[shown:])
        else:
            for i, (p, text) in enumerate(zip(each, texts, strict=True)):
                print(heading(i, p) + text)
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        print(f'({tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s)', file=sys.stderr)
        return list(zip(each, texts, strict=True))

    def excess(turns):
        """How many tokens too long a conversation is for the model to see all of it and an answer."""
        block_size = model.config.block_size
        room = min(config['max_new_tokens'], block_size // 3)
        return len(encode_prompt(turns, tokenizer, template, system)) + room - block_size

    def in_room(question):
        """The end of a question, if it is too long by itself."""
        if (n := excess(question)) <= 0:
            return question
        print(f'(the question is too long for this model, which was not given its first {n} characters)',
              file=sys.stderr)
        return question[n:]

    def heading(i, p):
        before = p if not template else template.replace('{prompt}', p) if show_label and '{prompt}' in template else ''
        return f'[Sample {i + 1}] {before}'

    results = []
    if interactive:
        before = []                 # questions and answers that are still in mind
        for line in typed_lines():
            try:
                if line.startswith('/'):
                    before = [] if line == '/reset' else before
                    obey(line)
                    continue
                while before and excess([*before, line]) > 0:
                    before = before[2:]
                results += answer([line], before)
            except KeyboardInterrupt:
                print('(left at that)', file=sys.stderr)
                continue
            except UserError as e:
                print(e, file=sys.stderr)
                continue
            if template and not decline:
                before = [*before, *results[-1]]
            elif decline and results[-1][1] != manner['follow'] and not followed:
                # such a model knows one question before
                before = results[-1] if results[-1][1] != decline else []
    else:
        results = answer(prompts)
    if output_file:
        if output_file.endswith('.jsonl'):
            lines = [json.dumps({'prompt': p, 'text': t}, ensure_ascii=False) for p, t in results]
        else:
            lines = [heading(i, p) + t for i, (p, t) in enumerate(results)]
        Path(output_file).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    print('✔ Generation complete.')


# -----------------------------------------------------------------------------
# conversation on a terminal

HELP = ('/reset forgets the conversation, /quit or Ctrl-D ends; /style creative, /temperature 0.7, /top_k, /top_p,\n'
        '/repetition_penalty, /max_new_tokens and /seed set what they name')


def typed_lines() -> Iterator[str]:
    """What is typed, line by line, until /quit or the end. Arrow keys edit a line, and fetch earlier ones."""
    with suppress(ImportError):                 # Windows' terminal does that by itself
        import readline                         # noqa: F401
    if sys.stdin.isatty():
        print(f'type a prompt and Enter; Ctrl-C ends an answer\n{HELP}', file=sys.stderr)
    while True:
        if sys.stdin.isatty() and not sys.stdout.isatty():          # what is piped on is to have the texts alone
            print('> ', end='', file=sys.stderr, flush=True)
        try:
            line = input('> ' if sys.stdin.isatty() and sys.stdout.isatty() else '').strip()
        except EOFError:
            return
        if line == '/quit':
            return
        if line:
            yield line


def obey(line: str) -> None:
    """A line that begins with a stroke: /reset is done, /temperature 0.7 sets that in `config`. Raises UserError."""
    name, _, value = line[1:].partition(' ')
    if name in ('style', 'temperature', 'top_k', 'top_p', 'repetition_penalty', 'max_new_tokens', 'seed'):
        try:
            new = {**config, name: type(config[name])(value)}
        except ValueError:
            raise UserError(f'{name} should be a number, not {value!r}') from None
        sampling_options(new, exact=False)
        config.update(new)
    elif name != 'reset':
        raise UserError(HELP)


if __name__ == '__main__':
    main()
