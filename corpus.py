"""Files of text -> documents -> training and validation -> token shards. What prepare_data.py and prepare_zh.py share.

A document is a row of segments (text, trained): plain text is one segment that is trained on; a question with its
answer is two, and only the answer is. It comes in one piece, or if it is long plain text in several:

    Piece(file, starts, segments)       which file, whether a document starts here, [(text, trained), ...]
"""

import codecs
import glob
import gzip
import itertools
import json
import random
import zlib
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from configurator import UserError, first_line
from dataset import ShardWriter, install_dataset
from metrics import progress_bar
from tokenizer import AnyTokenizer

PIECE = 1 << 20             # characters of plain text read at a time, and encoded as one string at most
BATCH = 1 << 22             # characters handed to the tokenizer at a time
SHUFFLE = 1 << 16           # rows that are shuffled at a time
FEW = 100                   # of fewer questions than this, none is kept from training
KINDS = {'.txt': 'txt', '.md': 'txt', '.jsonl': 'jsonl', '.json': 'jsonl', '.parquet': 'parquet'}

Piece = namedtuple('Piece', 'file starts segments')

# -----------------------------------------------------------------------------
# files -> documents


def find_inputs(text: str) -> list[Path]:
    """The files that --input names: a file, a folder, a pattern, or several with commas between. Raises UserError."""
    names = [text] if Path(text).exists() else [t.strip() for t in text.split(',') if t.strip()]
    paths = []
    if not names:
        raise UserError(f'input {text!r} names no file')
    for name in names:
        if Path(name).is_dir():
            found = sorted(p for p in Path(name).rglob('*') if p.is_file() and kind_of(p))
        else:
            found = [Path(p) for p in ([name] if Path(name).exists() else sorted(glob.glob(name)))]
        if not found:
            raise UserError(f'no input {name!r}: there is no such file, or no .txt, .jsonl or .parquet in that folder')
        paths += found
    for path in paths:
        if not kind_of(path):
            raise UserError(f'{path}: only .txt, .jsonl, .parquet, .txt.gz, .jsonl.gz are read; rename or convert it')
    return paths


def kind_of(path: Path) -> str:
    """'txt', 'jsonl' or 'parquet' by a file's name, '' for another."""
    return KINDS.get(Path(path.name.removesuffix('.gz')).suffix.lower(), '')


def read_documents(paths: list[Path], separator: str = '', template: str = '', encoding: str = 'auto',
                   doing: str = 'reading') -> Iterator[Piece]:
    """All Pieces of the files `paths`, in order, with a progress bar.

    separator: what divides the documents of a .txt, '' if each file is one. template: what a question is put into, in
    place of '{prompt}'. encoding: 'auto' takes UTF-8, with a byte order mark or without, or else GB18030.
    Raises UserError naming file and line for what cannot be read.
    """
    total = sum(p.stat().st_size for p in paths)
    with progress_bar(total=total, desc=doing, unit='B', unit_scale=True) as bar:
        for number, path in enumerate(paths):
            with open(path, 'rb') as raw:
                position = 0
                for starts, segments in read_file(path, raw, separator, template, encoding):
                    yield Piece(number, starts, segments)
                    bar.update(raw.tell() - position)
                    position = raw.tell()


def read_file(path: Path, raw: BinaryIO, separator: str = '', template: str = '',
              encoding: str = 'auto') -> Iterator[tuple]:
    """(starts, segments) of the pieces of one file, opened as `raw`; arguments and errors as in read_documents()."""
    try:
        yield from _READERS[kind_of(path)](path, raw, separator, template, encoding)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f'{path} cannot be read: {e}') from None


def _decoded_lines(path, raw, encoding, limit=-1):
    """(line number, text) for the lines of a file; one longer than `limit` bytes comes in several parts."""
    file = gzip.GzipFile(fileobj=raw) if path.name.endswith('.gz') else raw
    guessed = encoding == 'auto'
    if guessed:
        try:
            codecs.getincrementaldecoder('utf-8')().decode(file.read(PIECE))
            encoding = 'utf-8-sig'
        except UnicodeDecodeError:
            encoding = 'gb18030'
        file.seek(0)
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise UserError(f'there is no encoding {encoding!r}; try utf-8 or gb18030') from None
    number, last = 1, False
    while not last:
        chunk = file.readline(limit)
        last = not chunk
        try:
            text = decoder.decode(chunk, final=last)
        except UnicodeDecodeError as e:
            tried = 'UTF-8 or GB18030' if guessed else encoding
            raise UserError(f'{path}:{number}: byte 0x{e.object[e.start]:02x} is not {tried}; '
                            'convert the file to UTF-8 first, for instance with iconv') from None
        if text:
            yield number, text.replace('\r\n', '\n')
        number += chunk.endswith(b'\n')


def _read_txt(path, raw, separator, template, encoding):
    rest, waiting, size, starts = '', [], 0, True
    lines = _decoded_lines(path, raw, encoding, limit=PIECE)
    while True:
        for _, text in lines:
            waiting.append(text)
            size += len(text)
            if size >= PIECE:
                break
        else:
            lines = None                            # that was all
        rest += ''.join(waiting)
        waiting, size = [], 0
        if separator:
            *whole, rest = rest.split(separator)
            for document in whole:
                document = document.strip() if starts else document.rstrip()
                if document:
                    yield starts, [(document, True)]
                starts = True
            rest = rest.lstrip() if starts else rest
        if lines is None:
            break
        if len(rest) > PIECE + len(separator):
            cut = _safe_cut(rest[:len(rest) - len(separator)])      # a separator may be half read
            yield starts, [(rest[:cut], True)]
            rest, starts = rest[cut:], False
    rest = rest.rstrip() if separator else rest
    if rest:
        yield starts, [(rest, True)]


def _safe_cut(text):
    """Where to cut a long text so that its parts tokenize as the whole would: between a letter and what is none. No
    piece of GPT-2's pre-tokenizer goes on there, and where a piece begins does not depend on what was before it."""
    for at in range(len(text) - 1, 0, -1):
        if text[at - 1].isalpha() and not text[at].isalpha():
            return at
    return max(1, len(text) // 2)


def _pieces_of(text):
    """A document of plain text as (starts, segments), none of them much longer than PIECE."""
    at = 0
    while at < len(text):
        end = at + _safe_cut(text[at:at + PIECE]) if len(text) - at > PIECE else len(text)
        yield at == 0, [(text[at:end], True)]
        at = end


def _read_jsonl(path, raw, separator, template, encoding):
    for number, line in _decoded_lines(path, raw, encoding):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            documents = list(_documents_of(record, template))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            talk = ('or {"prompt": "...", "completion": "..."}\nor {"conversations": [{"role": "user", "content": '
                    '"..."}, ...]}, with strings that are not empty')
            raise UserError(f'{path}:{number}: each line should be an object such as {{"text": "..."}} '
                            + (talk if template else '(questions with answers are for prepare_data.py)')) from None
        yield from documents


def _documents_of(record, template):
    """The documents of one object of a .jsonl: [(starts, segments)]. Raises what indexing and the checks raise."""
    def words(value, required=True):
        if not isinstance(value, str) or required and not value.strip():
            raise TypeError
        value.encode('utf-8')                       # JSON can spell half a surrogate pair; no tokenizer can take it
        return value

    if 'text' in record:
        yield from _pieces_of(words(record['text'], required=False))
    elif not template:
        raise KeyError('text')
    elif 'conversations' in record or 'messages' in record:
        # each answer is a document of its own, behind all that was said before it
        history, system = '', ''
        for turn in record.get('conversations') or record['messages']:
            role, content = turn.get('role') or turn['from'], words(turn.get('content') or turn['value'])
            if role == 'system':
                system = content + '\n'
            elif role in ('assistant', 'gpt'):
                yield True, [(history, False), (content, True)]
                history += content + '\n'
            else:
                history += template.replace('{prompt}', system + content)
                system = ''
        if not history:
            raise KeyError
    elif 'instruction' in record:
        more = words(record.get('input') or '', required=False)
        prompt = words(record['instruction']) + ('\n' + more if more else '')
        yield True, [(template.replace('{prompt}', prompt), False), (words(record['output']), True)]
    else:
        prompt, completion = words(record['prompt']), words(record['completion'])
        yield True, [(template.replace('{prompt}', prompt), False), (completion, True)]


def _read_parquet(path, raw, *_):
    import pyarrow
    import pyarrow.parquet
    try:
        # a megabyte at a time: pyarrow would hold the texts of a row group, and by and by those of the whole file
        file = pyarrow.parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        for batch in file.iter_batches(batch_size=256, columns=['text']):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise TypeError('its text column holds no text')
                yield from _pieces_of(text or '')
    except (pyarrow.ArrowException, OSError, IndexError, TypeError, UnicodeDecodeError) as e:
        why = first_line(e)
        raise UserError(f'{path} cannot be read as parquet with a text column: {why}') from None


_READERS = {'txt': _read_txt, 'jsonl': _read_jsonl, 'parquet': _read_parquet}

# -----------------------------------------------------------------------------
# documents -> training and validation


def split_rule(pieces: Iterable[Piece], fraction: float) -> tuple[str, int | None]:
    """Decide how to split: ('documents', None), or ('characters', n) where n characters are for training.

    Whole documents go to either side: to validation whenever its part of the characters so far is below `fraction`.
    Where a text has too few documents for that, its last characters are for validation.
    """
    documents = characters = 0
    for _, starts, segments in pieces:
        documents += starts
        characters += sum(len(text) for text, _ in segments)
        if documents * fraction >= 2 or len(segments) > 1:
            return 'documents', None
    if characters == 0:
        raise UserError('the input holds no text')
    return 'characters', int(characters * (1 - fraction))


def count_questions(pieces: Iterable[Piece]) -> int:
    """How many of the pieces are questions with answers; it counts no further than FEW."""
    return sum(1 for _ in itertools.islice((piece for piece in pieces if len(piece.segments) > 1), FEW))


def too_few(questions: int) -> bool:
    """Whether there are so few questions that those for validation are to be learned, too; then it says so."""
    if 0 < questions < FEW:
        print(f'only {questions} questions: those for validation are learned, too, so that the validation loss says '
              'little')
    return 0 < questions < FEW


def split_pieces(pieces: Iterable[Piece], fraction: float, rule: str, n_train: int | None,
                 few: bool = False) -> Iterator[tuple[str, Piece]]:
    """(split, piece) for each piece, by split_rule's answer; one may be divided. few: validation's are trained on, too.
    """
    characters, in_val, split = 0, 0, 'train'
    for piece in pieces:
        size = sum(len(text) for text, _ in piece.segments)
        if rule == 'documents':
            if piece.starts:
                split = 'val' if in_val < fraction * characters else 'train'
            in_val += size * (split == 'val')
            yield split, piece
            if few and split == 'val' and len(piece.segments) > 1:
                yield 'train', piece
        else:
            (text, trained), = piece.segments
            at = min(max(n_train - characters, 0), size)
            if at:
                yield 'train', piece._replace(segments=[(text[:at], trained)])
            if at < size:
                yield 'val', Piece(piece.file, piece.starts or split == 'train', [(text[at:], trained)])
                split = 'val'
        characters += size


def shuffled_rows(pairs: Iterable[tuple[str, Piece]], rng: random.Random) -> Iterator[tuple[str, Piece]]:
    """(split, piece) pairs in another order, a buffer at a time, so that what stands together in a window is not of one
    kind. A long text in several pieces becomes several documents."""
    buffer = []
    for name, piece in pairs:
        buffer.append((name, piece._replace(starts=True)))
        if len(buffer) == SHUFFLE:
            rng.shuffle(buffer)
            yield from buffer
            buffer.clear()
    rng.shuffle(buffer)
    yield from buffer


# -----------------------------------------------------------------------------
# documents -> shards


def write_dataset(folder: str | Path, codec: AnyTokenizer, pieces: Iterable[tuple[str, Piece]], source: str, split: str,
                  asked: dict | tuple = (), with_masks: bool = False, longest: int = 0,
                  shard_size: int = 100_000_000) -> None:
    """Tokenize (split, piece) pairs into shards and finish the data set with meta.json; prints what it holds.

    Each document is preceded by the end-of-text token, and the last one followed by it. with_masks also writes which
    tokens are trained on: those of trained segments, and the end-of-text token behind one.
    longest: questions with answers of more tokens are left out, and counted.
    """
    writers = {name: ShardWriter(folder, name, codec.vocab_size, shard_size, with_masks) for name in ('train', 'val')}
    counts, answers, skipped = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}, 0
    behind_trained = {'train': False, 'val': False}     # is the next end-of-text token trained on?
    waiting, size = [], 0

    def write(name, ids, mask):
        writers[name].write(ids, mask if with_masks else None)
        counts[name] += len(ids)

    def flush():
        nonlocal skipped
        encoded = iter(codec.encode_batch([text for _, piece in waiting for text, _ in piece.segments]))
        for name, piece in waiting:
            ids, mask = [], []
            for _, trained in piece.segments:
                tokens = next(encoded)
                ids += tokens
                mask += [trained] * len(tokens)
            if longest and len(piece.segments) > 1 and len(ids) + 2 > longest:
                skipped += 1
                continue
            if piece.starts:
                write(name, [codec.eot], [behind_trained[name]])
            write(name, ids, mask)
            answers[name] += len(piece.segments) > 1
            behind_trained[name] = mask[-1] if mask else False
        waiting.clear()

    for pair in pieces:
        waiting.append(pair)
        size += sum(len(text) for text, _ in pair[1].segments)
        if size >= BATCH:
            flush()
            size = 0
    flush()
    for name, count in counts.items():
        if with_masks and count:
            write(name, [codec.eot], [behind_trained[name]])
        if count < 2:
            raise UserError(f'the {name} split came out empty; give more text, or another --val_fraction')
        print(f'{name} has {count:,} tokens' + (f', {answers[name]:,} questions with answers' if answers[name] else ''))
    if skipped:
        print(f'{skipped:,} questions with answers were left out, being longer than {longest} tokens')
    shards = {name: writer.finish() for name, writer in writers.items()}
    install_dataset(folder, codec, shards, source, split, asked)
    folder = Path(folder)
    print(f'wrote {folder}; train on it with --dataset={folder.name if folder.parent == Path("data") else folder}')
