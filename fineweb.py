"""FineWeb-Edu -> shards of GPT-2 tokens in data/fineweb_edu_10B/, ready for train.py.

    python fineweb.py                                   the 10B sample: 30 GB to fetch, 20 GB of shards
    python fineweb.py --fraction=0.01                   its first 100M tokens, from one file of 2 GB
    python fineweb.py --pretokenized --fraction=0.1     a tenth, in shards that others have made: no tokenizing
    python fineweb.py --input=texts/ --out=data/mine    your own .parquet, .jsonl, .gz or .txt

Stopped at any moment, the same command goes on where it was and has at most one shard to do again. The shards depend on
the settings and the files alone, not on interruptions or on the number of workers. The first shard is for validation,
but no more than a tenth of all tokens: of less text the rest of that shard becomes train_000000.bin.

Several machines: give each its part, --part=1/8 to --part=8/8, and the same other settings. Each takes every eighth
file and a share of max_tokens; part 1 makes the validation shard. In a folder that they share, the last to end finishes
the data set. Of machines apart, copy the folders into one and give any of the commands there again.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from configurator import UserError, configure      # first: from here on, Ctrl-C is quiet

import numpy as np
import tiktoken

from download import hub_download, hub_files
from files import locked, sha256_of, write_text_atomically
from tokenizer import gpt2_tokenizer

if __name__ != '__mp_main__':   # a worker process does without these, and so without the size of PyTorch
    from corpus import find_inputs, read_file
    from dataset import FINEWEB_RECORD, HEADER, ShardWriter, meta_text, open_shard
    from metrics import progress_bar

# -----------------------------------------------------------------------------
# what
sample = '10BT'             # 10BT, 100BT or 350BT: which sample of FineWeb-Edu, by its tokens
fraction = 1.0              # how much of the sample
max_tokens = 0              # the same in tokens, up to the end of the document that reaches it; 0 = all
input = ''                  # your own files instead: one, a folder, a pattern, or several with commas
pretokenized = False        # fetch shards that have been tokenized already instead of texts
# where to
out = ''                    # the folder to make; '' = data/fineweb_edu_10B, _100B or _350B
shard_size = 100_000_000    # tokens in a shard
keep_source = True          # False deletes each downloaded file once its tokens are on disk, for small disks
# how
workers = 0                 # processes that tokenize; 0 = one for each core
part = ''                   # 2/8 = the second of eight parts, each made by a machine of its own
config = configure(globals(), negative=False, one_of={'sample': ('10BT', '100BT', '350BT')}, at_least={'shard_size': 1},
                   at_most={'shard_size': (1 << 31) - 1})      # a shard's header has room for no more
# -----------------------------------------------------------------------------

REPO = 'HuggingFaceFW/fineweb-edu'
SAMPLES = {'10BT': 10_000_000_000, '100BT': 100_000_000_000, '350BT': 350_000_000_000}      # tokens, by their names
PRETOKENIZED = {'10BT': 'kjj0/finewebedu10B-gpt2', '100BT': 'karpathy/fineweb-edu-100B-gpt2-token-shards'}
SOURCE = Path(f'data/fineweb_edu_{sample[:-1]}/source')     # a text is fetched once, whatever --out it is for
EOT = 50256                 # GPT-2's end-of-text token
BATCH = 1 << 20             # characters that a worker is given at a time
FIRST = 'first_000000.bin'  # the first shard, until it is known how much of it will be for validation

# -----------------------------------------------------------------------------
# in the workers: texts -> tokens

encoding: tiktoken.Encoding         # GPT-2's, as soon as a worker is ready


def start_worker() -> None:
    """Get ready to tokenize, leave Ctrl-C to the parent, and end when the parent does, however that is."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    global encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    encoding = tiktoken.get_encoding('gpt2')


def tokenize(batch: list[tuple[bool, str]]) -> np.ndarray:
    """The tokens, uint16, of [(does a document start here?, text)], each document behind an end-of-text token."""
    rows: list = []
    for starts, text in batch:
        if starts:
            rows.append([EOT])
        rows.append(encoding.encode_to_numpy(text, disallowed_special=()))     # what looks like a special token is text
    return np.concatenate(rows).astype('<u2')


@contextmanager
def worker_pool(count: int) -> Iterator[ProcessPoolExecutor]:
    """Gives an executor of `count` processes. Raises UserError when one of them dies."""
    pool = ProcessPoolExecutor(count, multiprocessing.get_context('spawn'), start_worker)
    try:
        if os.name == 'posix':      # the workers inherit this, so that Ctrl-C finds none of them half started
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for _ in range(count):
            pool.submit(int)
        if os.name == 'posix':
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield pool
    except BrokenProcessPool:
        raise UserError('a worker process died, perhaps for want of memory. Run again to go on from the last whole\n'
                        f'shard; --workers={max(1, count // 2)} needs less memory') from None
    finally:
        pool.shutdown(cancel_futures=True)

# -----------------------------------------------------------------------------
# files -> tokens, in order


def list_files() -> list[dict]:
    """What to make the data set of, in order: [{'path', 'size' in bytes, 'sha256' or None, 'tokens' in it, about}]."""
    if input:
        return [{'path': str(p), 'size': p.stat().st_size, 'sha256': None, 'tokens': 0} for p in find_inputs(input)]
    repo, folder, kind = (PRETOKENIZED[sample], '', '.bin') if pretokenized else (REPO, f'sample/{sample}', '.parquet')
    listed = hub_files(repo, folder, repo_type='dataset', keep=SOURCE / f'{Path(repo).name}.listing')
    files = [file for file in listed if file['path'].endswith(kind)]
    if not files:
        raise UserError(f'{repo} holds no {kind} files {folder and "in " + folder}; check HF_ENDPOINT, if it is set')
    size = max(1, sum(file['size'] for file in files))
    return [{**file, 'tokens': SAMPLES[sample] * file['size'] / size} for file in files]


def fetch(file: dict, repo: str = REPO, folder: Path = SOURCE) -> Path:
    """The Path of a listed file, after downloading and verifying it unless it is there already. Raises UserError."""
    return Path(file['path']) if input else hub_download(repo, file['path'], folder, repo_type='dataset',
                                                         size=file['size'], sha256=file['sha256'])


def in_background(function: Callable, *args) -> Future:
    """A Future of function(*args), which runs in a thread that does not keep the process from ending."""
    def work():
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)

    future = Future()
    threading.Thread(target=work, daemon=True).start()
    return future


def batches(path: Path, first: int) -> Iterator[tuple[int, int, list[tuple[bool, str]]]]:
    """(number of its first piece, bytes of the file read, [(starts, text)]) for a file's pieces from `first` on."""
    with open(path, 'rb') as raw:
        batch, size = [], 0
        for number, (starts, segments) in enumerate(islice(read_file(path, raw), first, None), start=first):
            batch.append((starts, segments[0][0]))
            size += len(segments[0][0])
            if size >= BATCH:
                yield number + 1 - len(batch), raw.tell(), batch
                batch, size = [], 0
        if batch:
            yield number + 1 - len(batch), raw.tell(), batch


def tokenized(pool: ProcessPoolExecutor, path: Path, first: int,
              window: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(number, bytes, tokens) for each of batches(path, first), in order, with at most `window` of them under way."""
    waiting = deque()
    for number, read, batch in batches(path, first):
        waiting.append((number, read, pool.submit(tokenize, batch)))
        if len(waiting) >= window:
            number, read, future = waiting.popleft()
            yield number, read, future.result()
    for number, read, future in waiting:
        yield number, read, future.result()


def token_stream(pool: ProcessPoolExecutor, files: list[dict], place: list[int], count: int, most: int,
                 window: int) -> Iterator[tuple[tuple[int, int, int], int, np.ndarray]]:
    """Yield ((file, piece, offset), bytes read, tokens) on from `place`, where there are `count` tokens, to `most`.

    A place is `offset` tokens behind the start of a file's piece: a document, or a part of a very long one. The next
    file is fetched while this one is tokenized, if it is sure to be needed. most: 0 = all.
    """
    first, piece, offset = place
    coming = None
    for number in range(first, len(files)):
        path = coming.result() if coming else fetch(files[number])
        needed = number + 1 < len(files) and (not most or count + 1.05 * files[number]['tokens'] < most)
        coming = in_background(fetch, files[number + 1]) if needed else None
        before = sum(file['size'] for file in files[:number])
        for at, read, tokens in tokenized(pool, path, piece, window):
            skip = min(offset, len(tokens))
            tokens = tokens[skip:]
            start = max(most - count, 0) if most else len(tokens)
            ends = np.flatnonzero(tokens[start:] == EOT)        # the document that reaches `most` ends at the next one
            if len(ends):
                tokens = tokens[:start + ends[0]]
            yield (number, at, skip), before + read, tokens
            if len(ends):
                return
            count += len(tokens)
            offset -= skip
        if most and count >= most:
            return
        piece = 0

# -----------------------------------------------------------------------------
# tokens -> shards


def make_shards(folder: Path, k: int, tag: str, files: list[dict], record: dict, save: Callable[[], None]) -> None:
    """Write the shards of part k and enter each into the record: a killed run goes on behind the last of them."""
    shards, settings = record['shards'], record['settings']
    most = -(-settings['max_tokens'] // settings['parts'])
    count = sum(shard['tokens'] for split in shards.values() for shard in split)
    n_workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    n_workers = min(n_workers, 61) if os.name == 'nt' else n_workers        # Windows can wait for no more
    all_bytes, writer = sum(file['size'] for file in files), None

    with worker_pool(n_workers) as pool, progress_bar(desc='tokens', initial=count, unit='', unit_scale=True) as bar:
        for (number, piece, offset), read, tokens in token_stream(pool, files, record['place'], count, most,
                                                                  window=3 * n_workers):
            count += len(tokens)
            bar.total = max(count, most or count * all_bytes // max(read, 1))
            bar.update(len(tokens))
            while len(tokens):
                if writer is None:
                    split = 'val' if k == 1 and not shards['val'] else 'train'
                    name, first = ('first', 0) if split == 'val' else (f'train{tag}', len(shards['train']) + 1)
                    writer = ShardWriter(folder, name, EOT + 1, shard_size, first=first)
                room = shard_size - writer.count
                writer.write(tokens[:room])
                offset += len(tokens[:room])
                tokens = tokens[room:]
                if writer.count == 0:       # it was filled, and so is closed
                    shards[split] += install(folder, writer)
                    record['place'], writer = [number, piece, offset], None
                    save()
                    drop_source(files[:number])
    if writer:
        shards[split] += install(folder, writer)
    if shards['val']:
        divide(folder, tag, shards, count * settings['parts'] // 10)
    record.update(place=None, done=True)
    save()
    drop_source(files)


def install(folder: Path, writer: 'ShardWriter') -> list[dict]:
    """Close the writer's shards and give them their names; returns [{'file', 'tokens', 'sha256'}]."""
    written = writer.finish()
    for shard in written:
        os.replace(folder / f'{shard["file"]}.tmp', folder / shard['file'])
    return written


def divide(folder: Path, tag: str, shards: dict[str, list[dict]], most: int) -> None:
    """Of the first shard, leave at most so many tokens to validation; the rest is for training.

    It stays as it is until the record says that this is done, since this, too, may be cut short.
    """
    val, rest = (ShardWriter(folder, name, EOT + 1, shard_size) for name in ('val', f'train{tag}'))
    with open(folder / FIRST, 'rb') as f:
        f.seek(4 * HEADER)
        while len(tokens := np.fromfile(f, '<u2', 1 << 20)):
            val.write(tokens[:most])
            rest.write(tokens[most:])
            most -= len(tokens[:most])
    shards['val'] = install(folder, val)
    shards['train'] = install(folder, rest) + shards['train']


def drop_source(files: list[dict]) -> None:
    for file in [] if keep_source else files:
        (SOURCE / file['path']).unlink(missing_ok=True)


def fetch_shards(folder: Path, k: int, tag: str, files: list[dict], record: dict, save: Callable[[], None]) -> None:
    """Fetch shards that have been tokenized: all for validation, and for training enough to have max_tokens."""
    have = {shard['file']: shard for split in record['shards'].values() for shard in split}
    most = record['settings']['max_tokens']
    for split, shards in record['shards'].items():
        shards.clear()              # they come back at once, as long as their files are there
        for file in (file for file in files if f'_{split}_' in file['path']):
            if split == 'train' and 0 < most <= sum(shard['tokens'] for shard in shards):
                break
            path, shard = folder / file['path'], have.get(file['path'])
            if not shard or not path.is_file() or path.stat().st_size != file['size']:
                tokens = len(open_shard(fetch(file, PRETOKENIZED[sample], folder), headerless_ok=False))
                shard = {'file': file['path'], 'tokens': tokens, 'sha256': file['sha256'] or sha256_of(path)}
            shards.append(shard)
            save()
    record.update(place=None, done=True)
    save()

# -----------------------------------------------------------------------------
# the record of what is done


def read_record(folder: Path, tag: str, settings: dict) -> dict:
    """The record of a part, {} if there is none. Raises UserError if the folder is another's or has other settings."""
    theirs = [p.name for pattern in ('*.bin', '*.bin.tmp', '*.npy', '*.json', 'meta.*') for p in folder.glob(pattern)]
    # in this order: other parts may be starting
    records: dict = {path.name: path for path in folder.glob(FINEWEB_RECORD)}
    if theirs and not records:
        raise UserError(f'{folder} holds {theirs[0]}, which is not of fineweb.py; choose another --out')
    for path in records.values():
        try:
            records[path.name] = record = json.loads(path.read_text(encoding='utf-8'))
            changed = [(key, record['settings'][key], value) for key, value in settings.items()
                       if record['settings'][key] != value]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f'{path} cannot be read ({type(e).__name__}); delete {folder} and run again') from None
        if changed:
            key, old, new = changed[0]
            raise UserError(f'{folder} was begun with {key}={old!r}, and now {key} is {new!r}: go on with the old '
                            'settings,\nor choose another --out, or delete that folder to begin again')
    return records.get(f'progress{tag}.json', {})


def finish(folder: Path, tag: str, settings: dict) -> None:
    """Write meta.json if all parts are done and here, and say what there is. Raises UserError if a shard is missing."""
    tags = [f'_{i + 1}of{settings["parts"]}' for i in range(settings['parts'])] if tag else ['']
    records = {t: read_record(folder, t, settings) for t in tags}
    waiting = [t[1:].replace('of', '/') for t, record in records.items() if not record.get('done')]
    if waiting:
        print(f'part {part} is done; the data set is whole with {", ".join(waiting)}, too. If they are made elsewhere, '
              f'copy\nwhat they make into {folder}, and give this command again.')
        return
    shards = {split: [s for record in records.values() for s in record['shards'][split]] for split in ('train', 'val')}
    for path, tokens in ((folder / s['file'], s['tokens']) for split in shards.values() for s in split):
        if not path.is_file() or len(open_shard(path, headerless_ok=False)) != tokens:
            raise UserError(f'{path} is missing or was changed: copy it again, or delete {folder} and begin again')
    for split, count in ((split, sum(s['tokens'] for s in shards[split])) for split in shards):
        if count == 0:
            raise UserError(f'the {split} split came out empty; give more text, and another --out')
        print(f'{split} has {count:,} tokens')
    if (folder / 'meta.json').exists():
        print(f'{folder} was whole already: there was nothing to do')
        return
    how = 'the first shard is for validation' + ('' if pretokenized else ', but no more than a tenth of the tokens')
    text = meta_text(gpt2_tokenizer(), shards, settings['source'], how)
    # by way of a name of its own, since two parts may come here at once; they write the same
    write_text_atomically(folder / f'meta{tag}.json', text)
    os.replace(folder / f'meta{tag}.json', folder / 'meta.json')
    print(f'wrote {folder}; train on it with --dataset={folder.name if folder.parent == Path("data") else folder}')


def check_settings() -> tuple[int, int, int]:
    """(part, parts, tokens wanted of all parts together or 0). Raises UserError for settings that cannot be."""
    if not 0 < fraction <= 1:
        raise UserError(f'fraction must be above 0 and at most 1, not {fraction}')
    if fraction < 1 and (input or max_tokens):
        raise UserError('fraction is of the sample, and goes with neither --input nor --max_tokens; '
                        'say how much with --max_tokens alone')
    if pretokenized and (sample not in PRETOKENIZED or input or part):
        raise UserError(f'--pretokenized is there for {" and ".join(PRETOKENIZED)}, and goes with neither --input nor '
                        '--part;\nwithout it this sample is tokenized here')
    if input and not keep_source:
        raise UserError('--keep_source=False deletes what was downloaded; files of --input are yours: leave it out')
    numbers = re.fullmatch('([0-9]{1,4})/([0-9]{1,4})', part or '1/1')
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UserError(f'part {part!r} should be like 2/8, the second of eight')
    most = max_tokens if fraction == 1 else max(1, round(fraction * SAMPLES[sample]))
    return int(numbers[1]), int(numbers[2]), most


def main() -> None:
    k, parts, most = check_settings()
    tag = f'_{k}of{parts}' if parts > 1 else ''
    folder = Path(out) if out else SOURCE.parent
    source = PRETOKENIZED[sample] if pretokenized else f'{REPO} sample/{sample}'
    if input:
        source = ', '.join(path.name for path in find_inputs(input)[:5])
    settings = {'source': source, 'max_tokens': most, 'shard_size': shard_size, 'parts': parts}
    try:
        # 1) what is there to do? whatever is wrong shows before anything is written
        files = []
        if not read_record(folder, tag, settings).get('done'):
            gpt2_tokenizer()
            files = list_files()
            if k > len(files):
                raise UserError(f'part {part} has nothing to do: there are {len(files)} files; make fewer parts')
            listed = json.dumps([[Path(file['path']).name, file['size'], file['sha256']] for file in files])
            settings['files'] = f'{len(files)} files, {hashlib.sha256(listed.encode()).hexdigest()[:16]}'

        # 2) do it, or what is left of it
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f'progress{tag}.json'):
            record = read_record(folder, tag, settings) or {
                'settings': settings, 'shards': {'val': [], 'train': []}, 'place': [0, 0, 0], 'done': False}

            def save():
                text = json.dumps(record, ensure_ascii=False, indent=1)
                write_text_atomically(folder / f'progress{tag}.json', text)

            if not record['done']:
                save()
                make = fetch_shards if pretokenized else make_shards
                make(folder, k, tag, files[k - 1::parts], record, save)
            if k == 1:
                (folder / FIRST).unlink(missing_ok=True)

            # 3) finish the data set
            finish(folder, tag, record['settings'])
    except OSError as e:
        raise UserError(f'{e.filename or folder}: {e.strerror or e}. What was made is kept: run again when that is put '
                        'right') from None


if __name__ == '__main__':
    main()
