"""A corpus -> tokenizer and token shards, in data/<name>/, ready for train.py.

    python prepare_data.py --dataset=python_docs                       needs no network
    python prepare_data.py --dataset=shakespeare_char
    python prepare_data.py --dataset=custom --input=my_texts/ --tokenizer=bpe --vocab_size=8192

Memory stays flat however large the input is. The same input and settings give the same bytes.
"""

import glob
import gzip
import importlib.util
import io
import json
import math
from pathlib import Path

from tqdm import tqdm

from configurator import UserError, configure
from dataset import ShardWriter, clear_dataset, write_meta
from download import download, hub_files, hub_url
from tokenizer import END_OF_TEXT, gpt2_tokenizer, save_tokenizer, train_bpe, train_char

# -----------------------------------------------------------------------------
dataset = 'python_docs'     # shakespeare, shakespeare_char, tinystories, openwebtext, python_docs or custom
input = ''                  # your own .txt, .jsonl or .parquet ("text" field), .gz; a folder; or several, with commas
out = ''                    # the folder to make; '' = data/<dataset>
tokenizer = 'auto'          # char, bpe (trained on this text) or gpt2; auto = what suits the data set
vocab_size = 0              # ids of a trained BPE; 0 = what suits the data set, mostly 32768
val_fraction = 0.1          # the part kept for validation
separator = 'auto'          # what divides the documents in a .txt; '' = a file is one document; auto = what suits
shard_size = 100_000_000    # the most tokens in a shard
config = configure(globals())
# -----------------------------------------------------------------------------

SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
               '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
DEFAULTS = {                # tokenizer, vocab_size, separator
    'shakespeare': ('gpt2', 0, ''),
    'shakespeare_char': ('char', 0, ''),
    'tinystories': ('bpe', 32768, END_OF_TEXT),
    'openwebtext': ('gpt2', 0, ''),
    'python_docs': ('bpe', 2048, ''),
    'custom': ('bpe', 32768, ''),
}
PIECE = 1 << 20             # characters read at a time, and encoded as one string at most
BATCH = 1 << 22             # characters handed to the tokenizer at a time
TOKENIZER_BYTES = 1 << 29   # of a larger input, an evenly spread part of about this size trains the BPE


# -----------------------------------------------------------------------------
# where the text is

def find_inputs(text):
    """The files that --input names, sorted within a folder. Raises UserError."""
    names = [text] if Path(text).exists() else [t.strip() for t in text.split(',') if t.strip()]
    paths = []
    for name in names:
        if Path(name).is_dir():
            found = sorted(p for p in Path(name).rglob('*') if kind_of(p))
        else:
            found = [Path(p) for p in ([name] if Path(name).exists() else sorted(glob.glob(name)))]
        if not found:
            raise UserError(f'no input {name!r}: there is no such file, or no .txt, .jsonl or .parquet in that folder')
        paths += found
    for path in paths:
        if not kind_of(path):
            raise UserError(f'{path}: only .txt, .jsonl, .parquet, .txt.gz, .jsonl.gz are read; rename or convert it')
    return paths


def kind_of(path):
    """'txt', 'jsonl' or 'parquet' by a file's name, '' for another."""
    suffix = Path(path.name.removesuffix('.gz')).suffix.lower()
    return {'.txt': 'txt', '.md': 'txt', '.jsonl': 'jsonl', '.parquet': 'parquet'}.get(suffix, '')


def fetch_corpus(name):
    """Download a named corpus once, into data/<name>/source, and return its files. Raises UserError."""
    folder = Path('data', name.removesuffix('_char'), 'source')
    if name in ('shakespeare', 'shakespeare_char'):
        return [download(SHAKESPEARE[0], folder / 'input.txt', sha256=SHAKESPEARE[1])]
    if name == 'tinystories':
        url = hub_url('roneneldan/TinyStories', 'TinyStoriesV2-GPT4-train.txt', repo_type='dataset')
        return [download(url, folder / 'TinyStoriesV2-GPT4-train.txt')]
    if name == 'openwebtext':
        repo = 'Skylion007/openwebtext'
        files = [f for f in hub_files(repo, repo_type='dataset') if f['path'].endswith('.parquet')]
        return [download(hub_url(repo, f['path'], repo_type='dataset'), folder / Path(f['path']).name,
                         sha256=f['sha256'], size=f['size']) for f in files]
    raise UserError(f'--dataset={name} needs --input=FILE or FOLDER')


# -----------------------------------------------------------------------------
# the text as a stream of pieces, (starts a document, text)

def read_pieces(paths, separator, bar=None):
    """All text of `paths`, in order. A document larger than a piece comes in several, cut where no tokenizer joins."""
    for path in paths:
        with open(path, 'rb') as raw:
            raw_at = 0
            for piece in _READERS[kind_of(path)](path, raw, separator):
                yield piece
                if bar is not None:
                    bar.update(raw.tell() - raw_at)
                    raw_at = raw.tell()


def _open_text(path, raw):
    raw = gzip.GzipFile(fileobj=raw) if path.name.endswith('.gz') else raw
    return io.TextIOWrapper(raw, encoding='utf-8-sig')


def _read_txt(path, raw, separator):
    rest, starts = '', True
    file = _open_text(path, raw)
    while True:
        try:
            block = file.read(PIECE)
        except UnicodeDecodeError as e:
            raise UserError(f'{path} is not UTF-8: it has a byte 0x{e.object[e.start]:02x} that does not fit; '
                            'convert it first, for instance with iconv') from None
        except (OSError, EOFError) as e:
            raise UserError(f'{path} cannot be read: {e}') from None
        rest += block
        if separator:
            *whole, rest = rest.split(separator)
            for text in whole:
                if text.strip():
                    yield starts, text.strip() if starts else text.rstrip()
                starts = True
        if not block:
            break
        if len(rest) >= PIECE:
            cut = _safe_cut(rest)
            if cut > len(separator):
                yield starts, rest[:cut]
                rest, starts = rest[cut:], False
    if rest.strip() if separator else rest:
        yield starts, rest


def _safe_cut(text):
    """Where to cut a long text so that its halves tokenize as the whole would: before a newline, or else a space, that
    follows something else. GPT-2's pre-tokenizer never joins across such a place, whatever comes before or after."""
    for white in '\n ':
        at = len(text) - 1
        while (at := text.rfind(white, 1, at)) > 0:
            if not text[at - 1].isspace():
                return at
    return len(text) // 2


def _read_jsonl(path, raw, separator):
    number = 0
    try:
        for number, line in enumerate(_open_text(path, raw), 1):    # noqa: B007
            if line.strip():
                text = json.loads(line)['text']
                if not isinstance(text, str):
                    raise TypeError
                if text:
                    yield True, text
    except UnicodeDecodeError:
        raise UserError(f'{path}:{number + 1}: not UTF-8; convert the file first, for instance with iconv') from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path}:{number}: each line should be an object with a "text" field that is a string, such as '
                        '{"text": "..."}') from None
    except (OSError, EOFError) as e:
        raise UserError(f'{path} cannot be read: {e}') from None


def _read_parquet(path, raw, separator):
    import pyarrow
    import pyarrow.parquet
    try:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=256, columns=['text']):
            for text in batch.column(0).to_pylist():
                if text:
                    yield True, text
    except (pyarrow.ArrowException, OSError, IndexError) as e:
        raise UserError(f'{path} cannot be read as parquet with a text column: {str(e).splitlines()[0]}') from None


_READERS = {'txt': _read_txt, 'jsonl': _read_jsonl, 'parquet': _read_parquet}


def python_docs(*_):
    """The help texts inside CPython itself, one document a topic; about 465,000 characters of plain prose."""
    if importlib.util.find_spec('pydoc_data') is None:
        raise UserError('this Python comes without pydoc_data; install its standard library, or take another corpus')
    from pydoc_data.topics import topics
    for name in sorted(topics):
        yield True, topics[name]


# -----------------------------------------------------------------------------
# what is for training and what for validation

def split_rule(pieces, fraction):
    """Decide how to split: ('documents', None), or ('characters', n) where n characters are for training.

    Whole documents go to either side: to validation whenever its part of the characters so far is below `fraction`.
    Where there are too few documents for that, the last characters of the text are for validation.
    """
    documents = characters = 0
    for starts, text in pieces:
        documents += starts
        characters += len(text)
        if documents * fraction >= 2:
            return 'documents', None
    if characters == 0:
        raise UserError('the input holds no text')
    return 'characters', int(characters * (1 - fraction))


def split_pieces(pieces, fraction, rule, n_train):
    """(split, starts, text) for each piece, by split_rule's answer; a piece may be divided."""
    characters, in_val, split = 0, 0, 'train'
    for starts, text in pieces:
        if rule == 'documents':
            if starts:
                split = 'val' if in_val < fraction * characters else 'train'
            characters += len(text)
            in_val += len(text) * (split == 'val')
            yield split, starts, text
        else:
            at = min(max(n_train - characters, 0), len(text))
            characters += len(text)
            if at:
                yield 'train', starts, text[:at]
            if at < len(text):
                yield 'val', starts or split == 'train', text[at:]
                split = 'val'


def main():
    if dataset not in DEFAULTS:
        raise UserError(f'dataset {dataset!r} is not one of {", ".join(DEFAULTS)}; for your own text: --dataset=custom '
                        '--input=...')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction must be between 0 and 1, not {val_fraction}')
    if shard_size < 1:
        raise UserError(f'shard_size must be at least 1, not {shard_size}')
    kind, ids, divider = DEFAULTS[dataset]
    kind = kind if tokenizer == 'auto' else tokenizer
    ids = vocab_size or ids or 32768
    divider = divider if separator == 'auto' else separator.encode().decode('unicode_escape')
    if kind not in ('char', 'bpe', 'gpt2'):
        raise UserError(f'tokenizer {kind!r} is not one of char, bpe, gpt2')
    folder = Path(out or f'data/{dataset}')
    clear_dataset(folder)

    if input or dataset != 'python_docs':
        paths = find_inputs(input) if input else fetch_corpus(dataset)
        total, source = sum(p.stat().st_size for p in paths), ', '.join(p.name for p in paths[:5])
    else:
        paths, total, source = None, None, 'pydoc_data.topics'

    def pieces(doing):
        """The whole text again, with a progress bar that says what is done with it."""
        with tqdm(total=total, desc=doing, unit='B', unit_scale=True, disable=None, delay=1) as bar:
            yield from read_pieces(paths, divider, bar) if paths else python_docs()

    # 1) how to split; for few documents this reads to the end
    rule, n_train = split_rule(pieces('reading'), val_fraction)

    # 2) the tokenizer
    if kind == 'char':
        codec = train_char(text for _, text in pieces('collecting characters'))
    elif kind == 'bpe':
        every = math.ceil((total or 0) / TOKENIZER_BYTES) or 1
        train_text = (text for i, (split, _, text) in enumerate(split_pieces(pieces('training the tokenizer'),
                                                                             val_fraction, rule, n_train))
                      if split == 'train' and i % every == 0)
        codec = train_bpe(train_text, ids)
    else:
        codec = gpt2_tokenizer()
    save_tokenizer(codec, folder)
    print(f'tokenizer: {codec.kind}, {codec.vocab_size:,} ids')

    # 3) the shards
    writers = {split: ShardWriter(folder, split, codec.vocab_size, shard_size) for split in ('train', 'val')}
    counts = {'train': 0, 'val': 0}
    waiting, size = [], 0

    def flush():
        for (split, starts, _), tokens in zip(waiting, codec.encode_batch([text for _, _, text in waiting]),
                                              strict=True):
            tokens = [codec.eot, *tokens] if starts else tokens
            writers[split].write(tokens)
            counts[split] += len(tokens)
        waiting.clear()

    for piece in split_pieces(pieces('encoding'), val_fraction, rule, n_train):
        waiting.append(piece)
        size += len(piece[2])
        if size >= BATCH:
            flush()
            size = 0
    flush()
    for split, count in counts.items():
        if count < 2:
            raise UserError(f'the {split} split came out empty; give more text, or another --val_fraction')
        print(f'{split} has {count:,} tokens')
    described = {split: writer.finish() for split, writer in writers.items()}
    how = ('documents: whole ones for validation, evenly spread' if rule == 'documents'
           else f'characters: the first {n_train} are for training')
    write_meta(folder, codec, described, source, f'{how}; val_fraction={val_fraction}')
    print(f'wrote {folder}; train on it with --dataset={folder.name if folder.parent == Path("data") else folder}')


if __name__ == '__main__':
    main()
