"""Text to token ids and back: characters, a trained byte-level BPE, or GPT-2's BPE, behind one small interface; and how
a question, or a conversation, is written down for a model that was trained on such.

Every tokenizer has
    kind            'char', 'bpe' or 'gpt2'
    vocab_size      how many ids there are, the end-of-text token included
    eot             the id of the end-of-text token (None if there is none)
    start           the ids before every text: [eot], or [] if there is none, or what a published model wants
    bos             the id among them that is only for beginnings, as Llama has it, or None
    encode(text)    -> list[int]; text that looks like a special token is text, but with special=True is that token
    special_tokens() -> the names of those, which chat templates write out (none of characters)
    encode_batch(texts) -> list[list[int]], on all cores
    decode(ids)     -> str; the end-of-text token decodes to nothing
    token_bytes()   -> list[int]: how many bytes of UTF-8 each id stands for, 0 for special tokens
    state()         -> dict of strings: all of it, for a checkpoint or tokenizer.json; from_state() is the way back
    fingerprint     SHA-256 of state(), in hex
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from configurator import UserError, first_line
from download import DownloadError, hub_download, offline

END_OF_TEXT = '<|endoftext|>'
OTHERS_END_OF_TEXT = ('</s>', '<|end_of_text|>', '<eos>')      # what published tokenizers call it
HALF_PAIR = ('the text holds half of a surrogate pair, which is not valid Unicode; remove it, or read the file '
             'with the right encoding')


class CharTokenizer:
    """One id a character, in the order of `chars`; with `eot`, one more for the end of text."""
    kind = 'char'

    def __init__(self, chars: str, with_eot: bool = True):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        self.eot = len(chars) if with_eot else None
        self.vocab_size = len(chars) + with_eot

    def encode(self, text: str, special: bool = False) -> list[int]:
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = ''.join(sorted(set(text) - set(self.ids)))
            raise UserError(f'the vocabulary of {len(self.chars)} characters does not have {unknown[:20]!r}; leave '
                            'them out, or prepare the data with --tokenizer=bpe, which takes any text') from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return ''.join(self.chars[i] for i in ids if i != self.eot)

    def special_tokens(self) -> list[str]:
        return []

    def token_bytes(self) -> list[int]:
        return [len(c.encode()) for c in self.chars] + [0] * (self.eot is not None)

    def state(self) -> dict[str, str]:
        return {'kind': 'char', 'chars': self.chars, 'eot': '' if self.eot is None else END_OF_TEXT}


class BPETokenizer:
    """Byte-level BPE as Hugging Face `tokenizers` keeps it: `text` is the content of its tokenizer.json."""
    kind = 'bpe'

    def __init__(self, text: str):
        from tokenizers import Tokenizer
        self.text = text
        try:
            self.bpe = Tokenizer.from_str(text)
        except Exception as e:                      # the library raises nothing more particular
            raise UserError(f'this is not the content of a tokenizer.json ({e}); prepare the data again') from None
        self.bpe.encode_special_tokens = True       # as text, but where encode(special=True) is asked
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.vocab_size = self.bpe.get_vocab_size()
        found = [self.bpe.token_to_id(name) for name in (END_OF_TEXT, *OTHERS_END_OF_TEXT)]
        self.eot = next((i for i in found if i is not None), None)

    def encode(self, text: str, special: bool = False) -> list[int]:
        self.bpe.encode_special_tokens = not special
        try:
            return self.encode_batch([text])[0]
        finally:
            self.bpe.encode_special_tokens = True   # "<|endoftext|>" in a text is thirteen characters, not the token

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [e.ids for e in self.bpe.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError):
            raise UserError(HALF_PAIR) from None

    def special_tokens(self) -> list[str]:
        return [token.content for token in self.bpe.get_added_tokens_decoder().values() if token.special]

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> list[int]:
        special = {i for i, token in self.bpe.get_added_tokens_decoder().items() if token.special}
        tokens = [self.bpe.id_to_token(i) or '' for i in range(self.vocab_size)]
        # a byte-level BPE writes each byte as a character; a SentencePiece, spaces as ▁ and lone bytes as <0x0A>
        by_byte = '"ByteLevel"' in self.text
        return [0 if i in special else len(token) if by_byte else 1 if re.fullmatch('<0x..>', token) else
                len(token.replace('▁', ' ').encode()) for i, token in enumerate(tokens)]

    def state(self) -> dict[str, str]:
        return {'kind': 'bpe', 'tokenizer.json': self.text}


# GPT-2's two files: where tiktoken fetches them, what they are called on the Hugging Face hub, and their SHA-256
GPT2_ADDRESS = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
GPT2_FILES = [('encoder.json', 'vocab.json', '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'),
              ('vocab.bpe', 'merges.txt', '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')]


def _fetch_from_mirror():
    """Where HF_ENDPOINT names a mirror of the hub, take GPT-2's files from there, to where tiktoken looks for them."""
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    cache = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', default))
    if os.environ.get('HF_ENDPOINT') and cache and not offline():
        with contextlib.suppress(DownloadError):            # then tiktoken may still have its own way
            for name, hub_name, sha256 in GPT2_FILES:
                key = hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest()
                hub_download('openai-community/gpt2', hub_name, cache, name=key, sha256=sha256)


class GPT2Tokenizer:
    """GPT-2's BPE through `tiktoken`, which downloads two small files once and keeps them in TIKTOKEN_CACHE_DIR."""
    kind = 'gpt2'

    def __init__(self):
        import tiktoken
        try:
            _fetch_from_mirror()
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as e:                      # whatever went wrong on the way: no network, a proxy, a full disk
            raise UserError(f"GPT-2's tokenizer could not be fetched ({type(e).__name__}). Set TIKTOKEN_CACHE_DIR "
                            'to a folder that holds them (copied from a machine with network), or '
                            'HF_ENDPOINT\nto a mirror of the hub; --tokenizer=bpe or char when preparing data work '
                            'offline') from None
        self.vocab_size = self.bpe.n_vocab
        self.eot = self.bpe.eot_token

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.bpe.encode(_whole(text), allowed_special='all' if special else set(), disallowed_special=())

    def special_tokens(self) -> list[str]:
        return [END_OF_TEXT]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.bpe.encode_ordinary_batch([_whole(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode([i for i in ids if i != self.eot])

    def token_bytes(self) -> list[int]:
        return [0 if i == self.eot else len(self.bpe.decode_single_token_bytes(i)) for i in range(self.vocab_size)]

    def state(self) -> dict[str, str]:
        return {'kind': 'gpt2'}


AnyTokenizer = CharTokenizer | BPETokenizer | GPT2Tokenizer


def _whole(text):
    """`text`, or a UserError for half a surrogate pair, which tiktoken would replace without a word."""
    try:
        text.encode('utf-8')
        return text
    except UnicodeEncodeError:
        raise UserError(HALF_PAIR) from None


def from_state(state: dict[str, str]) -> AnyTokenizer:
    """The tokenizer that `state()` described. Raises UserError if it describes none."""
    try:
        kind = state['kind']
        if kind == 'char':
            return _finished(CharTokenizer(state['chars'], with_eot=bool(state['eot'])))
        if kind == 'bpe':
            return _finished(BPETokenizer(state['tokenizer.json']))
        if kind == 'gpt2':
            return _finished(GPT2Tokenizer())
    except (KeyError, TypeError) as e:
        raise UserError(f'a tokenizer without {e}; prepare the data again') from None
    raise UserError(f'unknown tokenizer kind {kind!r}; it is char, bpe or gpt2')


def _finished(tokenizer):
    canonical = json.dumps(tokenizer.state(), sort_keys=True, ensure_ascii=False)
    tokenizer.fingerprint = hashlib.sha256(canonical.encode('utf-8', 'surrogatepass')).hexdigest()
    tokenizer.start, tokenizer.bos = [] if tokenizer.eot is None else [tokenizer.eot], None
    return tokenizer


def gpt2_tokenizer() -> AnyTokenizer:
    return from_state({'kind': 'gpt2'})


def train_char(texts: Iterable[str], with_eot: bool = True) -> AnyTokenizer:
    """A character tokenizer for all characters in an iterable of texts."""
    chars = set()
    for text in texts:
        chars.update(text)
    if any('\ud800' <= c <= '\udfff' for c in chars):
        raise UserError(HALF_PAIR)
    return from_state({'kind': 'char', 'chars': ''.join(sorted(chars)), 'eot': END_OF_TEXT if with_eot else ''})


def train_bpe(texts: Iterable[str], vocab_size: int, single_han: bool = False) -> AnyTokenizer:
    """A byte-level BPE of at most `vocab_size` ids (256 bytes, end-of-text, and merges) from an iterable of texts.

    The byte-level alphabet, pre-tokenizer and decoder are GPT-2's, so any text round-trips, rare characters included.
    single_han keeps every Chinese character by itself, as no merge reaches beyond it: then a word is cut in the same
    way whatever stands beside it, which helps a small model to know it again.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    if vocab_size < 257:
        raise UserError(f'vocab_size {vocab_size} is too small: a byte-level BPE has 256 bytes and the end-of-text '
                        'token; use --vocab_size=1024 or more')
    bpe = Tokenizer(models.BPE())
    words: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if single_han:
        alone = pre_tokenizers.Split(Regex(r'[\u3400-\u9fff\x{20000}-\x{3ffff}]'), 'isolated')
        words = pre_tokenizers.Sequence([alone, words])
    # the time that training takes grows with the square of a word's length: there, no word is longer than this
    short = pre_tokenizers.Split(Regex('\\S{1000}|\\s{1000}'), 'isolated')
    bpe.pre_tokenizer = pre_tokenizers.Sequence([short, words])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    try:
        bpe.train_from_iterator(texts, trainer)
    except UnicodeEncodeError:
        raise UserError(HALF_PAIR) from None
    bpe.pre_tokenizer = words
    return from_state({'kind': 'bpe', 'tokenizer.json': bpe.to_str()})


def save_tokenizer(tokenizer: AnyTokenizer, folder: str | Path) -> None:
    """Write `folder`/tokenizer.json, unless the tokenizer is GPT-2's, whose name says it all."""
    state = tokenizer.state()
    if state['kind'] == 'gpt2':
        return
    text = state.get('tokenizer.json') or json.dumps(state, ensure_ascii=False, indent=1)
    Path(folder, 'tokenizer.json').write_text(text, encoding='utf-8', newline='\n')


def load_tokenizer(path: str | Path) -> AnyTokenizer:
    """The tokenizer in a tokenizer.json, or in the folder that holds one. Raises UserError."""
    path = Path(path)
    path = path / 'tokenizer.json' if path.is_dir() else path
    try:
        text = path.read_text(encoding='utf-8')
        state = json.loads(text)
    except (OSError, ValueError) as e:
        raise UserError(f'{path} could not be read as a tokenizer ({e})') from None
    if isinstance(state, dict) and 'chars' in state:
        return from_state(state)
    tokenizer = from_state({'kind': 'bpe', 'tokenizer.json': text})
    vocab = tokenizer.bpe.get_vocab()
    if len(vocab) == 50257 and vocab.get('Ġthe') == 262 and vocab.get(END_OF_TEXT) == 50256:
        with contextlib.suppress(UserError):        # GPT-2's own, under the name that our data sets know it by
            return gpt2_tokenizer()
    return tokenizer


# -----------------------------------------------------------------------------
# questions and conversations

# full-width digits and letters, and the ideographic space, to the half-width ones
HALF = {c: c - 0xfee0 for a, z in ('０９', 'ＡＺ', 'ａｚ') for c in range(ord(a), ord(z) + 1)} | {0x3000: ' '}
HAN = '[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]'      # Chinese characters and the marks between them


def encode_prompt(prompt: str | list[str], tokenizer: AnyTokenizer, template: str = '', system: str = '') -> list[int]:
    """The ids that a model reads before it goes on. prompt: a text; or with a template, which the model was trained on,
    a question, or turns [question, answer, question, ...], of which the last is asked. A template either has a place
    '{prompt}' for each question, or is a chat template in jinja. system: what is said before all of it."""
    turns = [prompt] if isinstance(prompt, str) else prompt
    if not template:
        ids = tokenizer.start + tokenizer.encode(turns[-1])                 # as every document started in training
        return ids or ([tokenizer.eot] if tokenizer.eot is not None else tokenizer.encode('\n'))
    if '{prompt}' in template:
        return tokenizer.start + tokenizer.encode(conversation(template, turns, system))
    control = '|'.join(map(re.escape, tokenizer.special_tokens())) or '$^'  # nobody types these into a chat
    messages = [{'role': 'system', 'content': system}] if system else []
    messages += [{'role': ('user', 'assistant')[i % 2], 'content': re.sub(control, '', turn)}
                 for i, turn in enumerate(turns)]
    return tokenizer.encode(render_chat(template, messages), special=True)


def conversation(template: str, turns: str | list[str], system: str = '') -> str:
    """The text that asks a question: each of `turns` is normalized, put into the template's place '{prompt}', and
    followed by its answer."""
    *before, question = [turns] if isinstance(turns, str) else turns
    asked = [*before[::2], question]
    asked[0] = f'{system}\n{asked[0]}' if system else asked[0]
    asked = [template.replace('{prompt}', normalize_question(q)) for q in asked]
    return ''.join(q + a + '\n' for q, a in zip(asked, before[1::2], strict=False)) + asked[-1]


@functools.lru_cache
def _chat_environment():
    """What transformers renders chat templates in: a sandbox, in which a template reaches and changes nothing."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):            # {% generation %}, which says what an assistant says
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(['name:endgeneration'], drop_needle=True), lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                        extensions=[Generation, ext.loopcontrols])
    environment.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {'raise_exception': raise_exception,
                            'strftime_now': lambda format: time.strftime(format)}
    return environment


def render_chat(template: str, messages: list[dict]) -> str:
    """The text of a chat, up to where the assistant is to speak, by a chat template in jinja.
    messages: [{'role': 'system', 'user' or 'assistant', 'content': text}, ...]. Raises UserError if the template, which
    came with the model, has mistakes, refuses these messages, or reaches for what is none of its business."""
    try:
        return _chat_environment().from_string(template).render(messages=messages, add_generation_prompt=True,
                                                               tools=None, documents=None)
    except Exception as e:                      # whatever a stranger's code may raise
        raise UserError(f'the chat template of this model does not work for this conversation: {first_line(e)}\n'
                        'go on without it: --raw=true') from None


def normalize_question(text: str) -> str:
    """A question as those in training are written: half-width letters and digits, full-width marks, no stray spaces."""
    text = re.sub(f'(?<={HAN}) +| +(?={HAN})', '', text.translate(HALF).strip())
    return re.sub(f'(?<={HAN})[,?!:;]', lambda mark: chr(ord(mark[0]) + 0xfee0), text)
