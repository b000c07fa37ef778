"""A corpus -> tokenizer and token shards, in data/<name>/, ready for train.py.

    python prepare_data.py --dataset=python_docs                       needs no network
    python prepare_data.py --dataset=shakespeare_char
    python prepare_data.py --dataset=custom --input=my_texts/ --tokenizer=bpe --vocab_size=8192
    python prepare_data.py --dataset=custom --input=my_chats.jsonl --tokenizer=gpt2 --out=data/chats

A line of a .jsonl is {"text"}, or a conversation: {"messages": [{"role", "content"}, ...]}, {"conversations": ...},
{"prompt", "completion"} or {"instruction", "input", "output"}. Of those, only the answers, and their ends, are learned.
Memory stays flat however large the input is. The same input and settings give the same bytes.
"""

import importlib.util
import math
import random
from collections.abc import Iterator
from pathlib import Path

from configurator import UserError, configure, first_line
from corpus import (Piece, count_questions, find_inputs, kind_of, read_documents, shuffled_rows, split_pieces,
                    split_rule, too_few, write_dataset)
from dataset import start_dataset
from download import DownloadError, download, hub_download, hub_files
from tokenizer import END_OF_TEXT, gpt2_tokenizer, load_tokenizer, train_bpe, train_char

# -----------------------------------------------------------------------------
dataset = 'python_docs'     # shakespeare, shakespeare_char, tinystories, openwebtext, python_docs or custom
input = ''                  # your own .txt, .jsonl or .parquet ("text" field), .gz; a folder; or several, with commas
out = ''                    # the folder to make; '' = data/<dataset>
tokenizer = 'auto'          # char, bpe (trained on this text), gpt2, or a tokenizer.json; auto = what suits the data
vocab_size = 0              # ids of a trained BPE; 0 = what suits the data set, mostly 32768
val_fraction = 0.1          # the part kept for validation
template = 'User: {prompt}\nAssistant:'   # what a question is put into, in training and in sampling
block_size = 1024           # questions that have more tokens than this with their answers are left out, and counted
separator = 'auto'          # what divides the documents in a .txt; '' = a file is one document; auto = what suits
shard_size = 100_000_000    # the most tokens in a shard
seed = 1337                 # of the order of conversations; texts keep theirs
config = configure(globals(), negative=False, at_least={'shard_size': 1, 'block_size': 8},
                   at_most={'shard_size': (1 << 31) - 1})      # a shard's header has room for no more
# -----------------------------------------------------------------------------

TOKENIZER_BYTES = 1 << 29   # of a larger input, an evenly spread part of about this size trains the BPE


def shakespeare(folder: Path) -> list[Path]:
    try:
        return [download('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
                         folder / 'input.txt', size=1_115_394,
                         sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')]
    except DownloadError as e:
        raise UserError(f'{first_line(e)}\nor fetch it in another way, and name it: --dataset={dataset} '
                        '--input=FILE') from None


def tinystories(folder: Path) -> list[Path]:
    return [hub_download('roneneldan/TinyStories', 'TinyStoriesV2-GPT4-train.txt', folder, repo_type='dataset')]


def openwebtext(folder: Path) -> list[Path]:
    repo = 'Skylion007/openwebtext'
    listed = hub_files(repo, repo_type='dataset', keep=folder / 'openwebtext.listing')
    return [hub_download(repo, f['path'], folder, name=Path(f['path']).name, repo_type='dataset', sha256=f['sha256'],
                         size=f['size']) for f in listed if f['path'].endswith('.parquet')]


def nowhere(folder: Path) -> list[Path]:
    raise UserError('--dataset=custom needs --input=FILE or FOLDER')


CORPORA = {                 # what fetches its files into a folder; tokenizer, vocab_size, what divides its documents
    'shakespeare': (shakespeare, 'gpt2', 0, ''),
    'shakespeare_char': (shakespeare, 'char', 0, ''),
    'tinystories': (tinystories, 'bpe', 32768, END_OF_TEXT),
    'openwebtext': (openwebtext, 'gpt2', 0, ''),
    'python_docs': (lambda folder: [], 'bpe', 2048, ''),        # its documents come with Python: see below
    'custom': (nowhere, 'bpe', 32768, ''),
}


def python_docs() -> Iterator[Piece]:
    """The help texts inside CPython itself, one document a topic; about 465,000 characters of plain prose."""
    if importlib.util.find_spec('pydoc_data') is None:
        raise UserError('this Python comes without pydoc_data; install its standard library, or take another corpus')
    from pydoc_data.topics import topics
    for name in sorted(topics):
        yield Piece(0, True, [(topics[name], True)])


def main():
    if dataset not in CORPORA:
        raise UserError(f'dataset {dataset!r} is not one of {", ".join(CORPORA)}; for your own text: --dataset=custom '
                        '--input=...')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction must be between 0 and 1, not {val_fraction}')
    if '{prompt}' not in template:
        raise UserError("template must contain {prompt}, which the question takes the place of")
    fetch_corpus, kind, ids, divider = CORPORA[dataset]
    kind = kind if tokenizer == 'auto' else tokenizer
    ids = vocab_size or ids or 32768
    divider = divider if separator == 'auto' else separator.replace('\\n', '\n')
    if kind not in ('char', 'bpe', 'gpt2') and not Path(kind).exists():
        raise UserError(f'tokenizer {kind!r} is not one of char, bpe, gpt2, and no tokenizer.json')
    paths = find_inputs(input) if input else fetch_corpus(Path('data', dataset.removesuffix('_char'), 'source'))
    source = ', '.join(p.name for p in paths[:5]) or 'pydoc_data.topics'
    folder = Path(out or f'data/{dataset}')
    start_dataset(folder)

    def documents(doing):
        return read_documents(paths, divider, template, doing=doing) if paths else python_docs()

    # 1) how to split; for few documents this reads to the end
    rule = split_rule(documents('reading'), val_fraction)
    talks = [p for p in paths if kind_of(p) == 'jsonl']         # which may hold conversations
    questions = count_questions(read_documents(talks, template=template)) if talks else 0
    few = too_few(questions)

    def split_documents(doing):
        return split_pieces(documents(doing), val_fraction, *rule, few)

    # 2) the tokenizer
    if kind == 'char':
        codec = train_char(text for piece in documents('collecting characters') for text, _ in piece.segments)
    elif kind == 'bpe':
        every = max(1, math.ceil(sum(p.stat().st_size for p in paths) / TOKENIZER_BYTES))
        codec = train_bpe((text for i, (split, piece) in enumerate(split_documents('training the tokenizer'))
                           if split == 'train' and i % every == 0 for text, _ in piece.segments), ids)
    elif kind == 'gpt2':
        codec = gpt2_tokenizer()
    else:                                           # that of a published model, to train it further
        codec = load_tokenizer(kind)
        if codec.eot is None:
            raise UserError(f'{kind} has no end-of-text token that is known here; documents could not be told apart')
    print(f'tokenizer: {codec.kind}, {codec.vocab_size:,} ids')

    # 3) the shards
    how = ('documents: whole ones for validation, evenly spread' if rule[0] == 'documents'
           else f'characters: the first {rule[1]} are for training')
    pairs = split_documents('encoding')
    if questions:
        pairs = shuffled_rows(pairs, random.Random(seed))
    write_dataset(folder, codec, pairs, source, f'{how}; val_fraction={val_fraction}',
                  {'template': template} if questions else (), questions > 0, block_size, shard_size)


if __name__ == '__main__':
    main()
