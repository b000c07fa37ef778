"""Token shards: writing them, checking them, turning them into batches.

A shard is llm.c's layout: 256 little-endian int32 (magic, version, token count, the rest 0), then the tokens as uint16,
or as uint32 if the vocabulary has more than 65,536 ids. Headerless uint16 files (nanoGPT) and .npy (build-nanogpt)
are read as they are. NAME.mask.bin beside NAME.bin, one byte a token, says which tokens are trained on.

Batches are a pure function of (dataset, seed, step, layout of processes). There is no state to save or to lose.
"""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configurator import UserError
from files import sha256_of, write_text_atomically
from tokenizer import AnyTokenizer, from_state, gpt2_tokenizer, load_tokenizer, save_tokenizer

HEADER = 256                                        # int32
# magic: (version, dtype of a token)
FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype('<u2')), 20240801: (7, np.dtype('<u4'))}
IGNORE = -100                                       # a target that is not trained on, as in F.cross_entropy
ASKED = ('template', 'decline', 'follow', 'alike', 'traditional')      # in meta.json and checkpoints: how to ask

# -----------------------------------------------------------------------------
# writing


class ShardWriter:
    """Writes tokens into `folder`/`split`_000000.bin, 000001, ... of at most `shard_size` tokens each.

    They are named *.bin.tmp until install_dataset() renames them: a run cut short leaves nothing that looks whole.
    first: the number of the first one.
    """

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_size: int = 100_000_000,
                 with_mask: bool = False, first: int = 0):
        self.folder, self.split, self.shard_size, self.with_mask = Path(folder), split, shard_size, with_mask
        self.first = first
        self.magic = 20240520 if vocab_size <= 65536 else 20240801
        self.version, self.dtype = FORMATS[self.magic]
        self.shards, self.files, self.count = [], [], 0     # (path, tokens) so far; open files and tokens of this one

    def write(self, tokens: list[int] | np.ndarray, mask: list[int] | np.ndarray | None = None) -> None:
        """Append a list or array of ids, and one 0 or 1 for each if the data set has masks. Raises ValueError for ids
        that the file's format cannot hold."""
        tokens = np.asarray(tokens)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= np.iinfo(self.dtype).max:
            raise ValueError(f'ids from {tokens.min()} to {tokens.max()} do not fit into {self.dtype}')
        tokens = tokens.astype(self.dtype)
        mask = np.asarray(mask, dtype=np.uint8) if self.with_mask else None
        while len(tokens):
            if not self.files:
                path = self.folder / f'{self.split}_{self.first + len(self.shards):06d}.bin.tmp'
                self.files = [open(path, 'wb')]
                self.files[0].write(bytes(4 * HEADER))
                if self.with_mask:
                    self.files.append(open(_mask_path(path), 'wb'))
                self.shards.append(path)
            room = self.shard_size - self.count
            self.files[0].write(tokens[:room].tobytes())
            if self.with_mask:
                self.files[1].write(mask[:room].tobytes())
                mask = mask[room:]
            self.count += len(tokens[:room])
            tokens = tokens[room:]
            if self.count == self.shard_size:
                self._close_shard()

    def _close_shard(self):
        if self.files:
            header = np.zeros(HEADER, dtype='<i4')
            header[:3] = self.magic, self.version, self.count
            self.files[0].seek(0)
            self.files[0].write(header.tobytes())
            for f in self.files:
                f.flush()
                os.fsync(f.fileno())
                f.close()
            self.files, self.count = [], 0

    def finish(self) -> list[dict]:
        """Close the last shard; return [{'file', 'tokens', 'sha256'}] for install_dataset()."""
        self._close_shard()
        return [{'file': tmp.name.removesuffix('.tmp'), 'sha256': sha256_of(tmp),
                 'tokens': (tmp.stat().st_size - 4 * HEADER) // self.dtype.itemsize} for tmp in self.shards]


def _mask_path(path):
    return path.with_name(path.name.replace('.npy', '.bin').replace('.bin', '.mask.bin'))


def start_dataset(folder: str | Path) -> None:
    """Make `folder` if need be, and clear away what a preparation that was cut short left there.

    A whole data set that is there stays until install_dataset() replaces it. Raises UserError if the folder holds files
    of another project that would be in the way, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob(FINEWEB_RECORD)):
            raise UserError(f'{folder} belongs to fineweb.py; choose another --out, or delete that folder first')
        leftovers = _unfinished(folder)
        if not leftovers and not (folder / 'meta.json').exists():
            foreign = [p.name for pattern in _REPLACED for p in folder.glob(pattern)]
            if foreign:
                raise UserError(f'{folder} holds {foreign[0]}, made by another project; choose another --out')
        for path in leftovers:
            if path.name != 'meta.json.tmp':        # the mark of a half-made data set goes last, in install_dataset()
                path.unlink()
    except OSError as e:
        raise UserError(f'cannot write the folder {folder}: {e.strerror}; choose another with --out') from None


def _unfinished(folder):
    """The files that a preparation under way, or cut short, has in `folder`."""
    return [path for pattern in ('*.bin.tmp', 'meta.json.tmp') for path in folder.glob(pattern)]


_REPLACED = ('train*.bin', 'val*.bin', 'tokenizer.json')
FINEWEB_RECORD = 'progress*.json'                   # in the folders that fineweb.py makes: how far it has come


def install_dataset(folder: str | Path, tokenizer: AnyTokenizer, shards: dict[str, list[dict]], source: str, split: str,
                    asked: dict[str, str] | tuple = ()) -> None:
    """Replace the data set in `folder` by the new shards, {'train': writer.finish(), 'val': ...}, and their tokenizer.

    meta.json is the first to go and the last to come: a folder without it is half made.
    """
    folder = Path(folder)
    text = meta_text(tokenizer, shards, source, split, asked)
    (folder / 'meta.json.tmp').write_text(text, encoding='utf-8')           # until the end, the mark of unfinished work
    (folder / 'meta.json').unlink(missing_ok=True)
    for pattern in _REPLACED:
        for path in folder.glob(pattern):
            path.unlink()
    save_tokenizer(tokenizer, folder)
    for path in folder.glob('*.bin.tmp'):
        path.replace(path.with_name(path.name.removesuffix('.tmp')))
    write_text_atomically(folder / 'meta.json', text)


def meta_text(tokenizer: AnyTokenizer, shards: dict[str, list[dict]], source: str, split: str,
              asked: dict[str, str] | tuple = ()) -> str:
    """The content of meta.json. asked: of questions, what ASKED names, as prepare_zh.py has it."""
    meta = {'format': 1, 'tokenizer': tokenizer.kind, 'fingerprint': tokenizer.fingerprint,
            'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot, **dict(asked or {'template': ''}),
            'source': source, 'split': split, 'shards': shards}
    return json.dumps(meta, ensure_ascii=False, indent=1) + '\n'


# -----------------------------------------------------------------------------
# finding and reading

MADE_BY = {                                         # how to make the data sets that the recipes name
    'zh': 'prepare_zh.py', 'zh_classic': 'prepare_zh.py --vocab_size=824 --out=data/zh_classic',
    'my_facts': 'prepare_zh.py --teach=my_facts.tsv', 'tang': 'prepare_zh.py --input=poems.jsonl --out=data/tang',
    'chats': 'prepare_data.py --dataset=custom --input=my_chats.jsonl --tokenizer=gpt2 --out=data/chats',
    'fineweb_edu_10B': 'fineweb.py',
    'fineweb_edu_100B': 'fineweb.py --sample=100BT', 'fineweb_edu_350B': 'fineweb.py --sample=350BT',
    **{name: f'prepare_data.py --dataset={name}'
       for name in ('shakespeare', 'shakespeare_char', 'tinystories', 'openwebtext', 'python_docs')},
}


def find_dataset(name: str, missing_ok: bool = False) -> Path:
    """The folder for a data set's name (under data/) or path. Raises UserError if it is not there or half made."""
    folder = Path('data', name) if Path('data', name).is_dir() else Path(name)
    if not folder.is_dir():
        if missing_ok:
            return folder
        made = sorted(p.parent.name for p in Path('data').glob('*/meta.json'))
        raise UserError(f'there is no data set {name!r} under data/ and no folder of that name'
                        + (f' (there is: {", ".join(made)})' if made else '') + '\nmake it first: python '
                        + MADE_BY.get(name, f'prepare_data.py --dataset=custom --input=YOUR_TEXT --out=data/{name}'))
    if not (folder / 'meta.json').exists():
        if any(folder.glob(FINEWEB_RECORD)):
            raise UserError(f'{folder} is half made: give its python fineweb.py command again, which goes on with it')
        if _unfinished(folder) or (folder / 'tokenizer.json').exists():
            raise UserError(f'{folder} is half made: its preparation was cut short; run it again')
        if not missing_ok and not any(folder.glob('*.bin')) and not any(folder.glob('*.npy')):
            raise UserError(f'{folder} is empty: it holds no token shards (.bin or .npy)\n'
                            'make them first: python prepare_data.py --help')
    return folder


def read_meta(folder: str | Path) -> dict:
    """meta.json as a dict; {} for shards that another project made."""
    path = Path(folder, 'meta.json')
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        if any(Path(shard['file']).name != shard['file'] for shards in meta['shards'].values() for shard in shards):
            raise ValueError('it names files outside its folder')
        kept = {key: meta[key] for key in ('tokenizer', 'fingerprint', 'vocab_size', 'template', 'shards')}
        return {**{key: meta.get(key, '') for key in ASKED}, **kept}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}); prepare the data again') from None


def dataset_tokenizer(folder: str | Path) -> AnyTokenizer:
    """The tokenizer that made the shards in `folder`: meta.json says which, or nanoGPT's meta.pkl, or it is GPT-2's."""
    folder, meta = Path(folder), read_meta(folder)
    if not meta:
        pickled = folder / 'meta.pkl'
        return _nanogpt_characters(pickled) if pickled.exists() else gpt2_tokenizer()
    tokenizer = from_state({'kind': 'gpt2'}) if meta['tokenizer'] == 'gpt2' else load_tokenizer(folder)
    if tokenizer.fingerprint != meta['fingerprint']:
        raise UserError(f'{folder}/tokenizer.json is not the one that made these shards; prepare the data again')
    return tokenizer


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def _nanogpt_characters(path):
    try:
        with open(path, 'rb') as f:
            itos = _PlainUnpickler(f).load()['itos']
        chars = ''.join(itos[i] for i in range(len(itos)))
        return from_state({'kind': 'char', 'chars': chars, 'eot': ''})
    except Exception as e:                          # a pickle can fail in any way at all
        raise UserError(f"{path} is not nanoGPT's table of characters ({e}); it is not loaded") from None


def open_shard(path: str | Path, headerless_ok: bool = True) -> np.ndarray:
    """The tokens of one shard as a read-only memory map, uint16 or uint32. Raises UserError if the file is damaged."""
    path = Path(path)
    if path.suffix == '.npy':
        try:
            tokens = np.load(path, mmap_mode='r', allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise UserError(f'{path} cannot be read as a .npy file ({e}); make or fetch it again') from None
        if tokens.ndim != 1 or tokens.dtype.kind not in 'ui':
            raise UserError(f'{path} holds {tokens.ndim}-dimensional {tokens.dtype}, not a row of token ids')
        return tokens
    size = path.stat().st_size
    head = np.fromfile(path, dtype='<i4', count=HEADER)
    if len(head) and head[0] in FORMATS:
        version, dtype = FORMATS[head[0]]
        if len(head) < HEADER or head[1] != version:
            raise UserError(f'{path} has a header of version {head[1] if len(head) > 1 else "?"}, not {version}; '
                            'make or fetch it again')
        if size != 4 * HEADER + int(head[2]) * dtype.itemsize:
            raise UserError(f'{path} is cut short or damaged: its header counts {head[2]:,} tokens, the file holds '
                            f'{(size - 4 * HEADER) / dtype.itemsize:,.1f}; make or fetch it again')
        return np.memmap(path, dtype=dtype, mode='r', offset=4 * HEADER, shape=(int(head[2]),))
    looks_like_a_header = len(head) == HEADER and not head[3:].any()
    if looks_like_a_header or not headerless_ok or size % 2 or size == 0:
        raise UserError(f'{path} is not a token shard: magic {head[0] if len(head) else "none"}, not 20240520 or '
                        '20240801; make or fetch it again')
    return np.memmap(path, dtype='<u2', mode='r')   # nanoGPT's: no header, just tokens


def _open_mask(path):
    return np.memmap(path, dtype=np.uint8, mode='r') if path.stat().st_size else np.zeros(0, dtype=np.uint8)


class TokenDataset:
    """The shards of one split as one long row of tokens, cut into windows of block_size inputs and as many targets.

    folder, split: which. batch_size: windows in a micro-batch. A step's global batch is grad_accum_steps micro-batches
    of batch_size windows on each of world_size processes; which windows those are does not depend on the layout.
    """

    def __init__(self, folder: str | Path, split: str, block_size: int, vocab_size: int, batch_size: int,
                 seed: int = 1337, grad_accum_steps: int = 1, rank: int = 0, world_size: int = 1):
        folder, meta = Path(folder), read_meta(folder)
        if meta:
            paths = [folder / shard['file'] for shard in meta['shards'].get(split, [])]
            missing = [p.name for p in paths if not p.exists()]
            if missing:
                raise UserError(f'{folder} lacks {", ".join(missing[:3])}, which meta.json names; prepare it again')
        else:                                       # train.bin, train_000001.bin, edufineweb_train_000001.npy, ...
            paths = sorted(p for kind in ('bin', 'npy') for p in folder.glob(f'*{split}*.{kind}')
                           if not p.name.endswith('.mask.bin'))
        if not paths:
            raise UserError(f'{folder} has no {split} shards (*{split}*.bin or .npy); prepare the data first')
        self.split, self.paths = split, paths
        self.shards = [open_shard(p, headerless_ok=not meta) for p in paths]
        self.ends = np.cumsum([len(s) for s in self.shards])       # where each shard ends in the long row
        self.n_tokens = int(self.ends[-1])
        self.block_size, self.vocab_size, self.batch_size, self.seed = block_size, vocab_size, batch_size, seed
        self.grad_accum_steps, self.rank, self.world_size = grad_accum_steps, rank, world_size
        self.masks = None
        if any(_mask_path(p).exists() for p in paths):
            self.masks = [_open_mask(_mask_path(p)) if _mask_path(p).exists()
                          else np.broadcast_to(np.uint8(1), len(s)) for p, s in zip(paths, self.shards, strict=True)]
            for p, s, m in zip(paths, self.shards, self.masks, strict=True):
                if len(m) != len(s):
                    raise UserError(f'{_mask_path(p)} has {len(m):,} bytes for {len(s):,} tokens; prepare it again')
            self._pack_documents(int(self.shards[0][0]))           # a shard begins with its end-of-text token
        else:
            self.n_windows = (self.n_tokens - 1) // block_size
        for path, shard in zip(paths, self.shards, strict=True) if rank == 0 and not meta else ():
            for at in range(0, len(shard), 1 << 24):        # others' shards: better one pass now than a surprise later
                self._check_ids(shard[at:at + (1 << 24)], path)
        if self.n_windows < 1:
            raise UserError(f'the {split} split of {folder} has {self.n_tokens:,} tokens, too few for one window of '
                            f'block_size {block_size}; lower --block_size, or prepare more text')

    def _pack_documents(self, eot):
        """Masked data: a window holds whole documents, as many as fit, each with the end-of-text token behind it, so no
        question is parted from its answer and every answer is trained on once an epoch. Each document, as they come, is
        put where it leaves the least room (best fit; sorting them first would fill windows a little better, but with
        documents that are alike); one longer than a window fills several. Sets self.windows: for each the (start, stop)
        of its documents in the long row.
        """
        room = self.block_size + 1
        tokens = np.concatenate(self.shards)
        starts = np.flatnonzero(tokens == eot)
        stops = np.append(starts[1:], self.n_tokens - 1 if starts[-1] == self.n_tokens - 1 else self.n_tokens)
        keep = stops > starts                                      # not the end-of-text token that ends the split
        starts, stops = starts[keep], np.minimum(stops[keep] + 1, self.n_tokens)
        self.windows = []
        open_windows = [[] for _ in range(room + 1)]               # the numbers of the windows with so much room left
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            while stop - start > room:
                self.windows.append([(start, start + room)])
                start += self.block_size
            size = stop - start
            # behind other documents its first token stands on their last, both being end-of-text
            left = next((n for n in range(size - 1, room + 1) if open_windows[n]), None)
            if left is None:
                self.windows.append([(start, stop)])
                open_windows[room - size].append(len(self.windows) - 1)
            else:
                number = open_windows[left].pop()
                self.windows[number].append((start, stop))
                open_windows[left - size + 1].append(number)
        self.n_windows = len(self.windows)
        trained = np.concatenate(([0], np.cumsum(np.concatenate(self.masks), dtype=np.int64)))
        self.row_targets = np.array([sum(trained[stop] - trained[start + 1] for start, stop in window)
                                     for window in self.windows])
        if not self.row_targets.sum():
            raise UserError(f'the masks of {self.paths[0].parent} leave nothing to be trained on; prepare it again')

    def _check_ids(self, tokens, path):
        """Raise UserError if a token is none of this vocabulary."""
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(f'{path} holds token {low if low < 0 else high}, outside the vocabulary of '
                            f'{self.vocab_size}; was it made with another tokenizer?')

    def _read(self, arrays, start, stop):
        """arrays[start:stop] of the long row that the shards make up; a range may cross from one shard to the next."""
        shard = int(np.searchsorted(self.ends, start, side='right'))
        pieces = []
        while start < stop:
            base = int(self.ends[shard]) - len(arrays[shard])
            piece = arrays[shard][start - base:stop - base]
            pieces.append(piece)
            start += len(piece)
            shard += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _windows(self, numbers, variants):
        """Inputs and targets (B, T), int64, of the windows with these numbers; targets not trained on are -100.

        A window's variant is how many tokens later it begins; for masked data, which key orders its documents.
        """
        import torch        # what only writes tokens, with many workers, need not wait for it to load

        T = self.block_size
        x = np.zeros((len(numbers), T), np.int64)
        y = np.full((len(numbers), T), IGNORE, np.int64)
        for b, (number, variant) in enumerate(zip(numbers.tolist(), variants.tolist(), strict=True)):
            if self.masks is None:
                ranges = [(number * T + variant, (number + 1) * T + variant + 1)]
            else:       # any of its documents may be the first, and so be read as a question asked by itself is
                ranges = self.windows[number]
                ranges = [ranges[i] for i in shuffled(np.arange(len(ranges)), len(ranges), mix(variant, number))]
            at = 0
            for start, stop in ranges:
                tokens = self._read(self.shards, start, stop).astype(np.int64)
                self._check_ids(tokens, self.paths[int(np.searchsorted(self.ends, start, side='right'))])
                n = len(tokens) - 1
                x[b, at:at + n], y[b, at:at + n] = tokens[:-1], tokens[1:]
                if self.masks is not None:
                    y[b, at:at + n][self._read(self.masks, start + 1, stop) == 0] = IGNORE
                at += n
        return torch.from_numpy(x), torch.from_numpy(y)

    @property
    def windows_per_epoch(self) -> int:
        """How many windows an epoch has. A text of 16 windows and more gives one up, to leave room for the shift."""
        movable = self.masks is None and self.n_windows >= 16
        return (self.n_tokens - self.block_size) // self.block_size if movable else self.n_windows

    def _order(self, first, count):
        """(numbers, variants) of the windows first .. first + count - 1 in the endless row of shuffled epochs.

        Every window comes once an epoch. An epoch after the first cuts the text elsewhere, so that a token is not
        always seen at the same position and with the same context; masked data order their documents anew.
        """
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), self.windows_per_epoch)
        numbers, variants = np.empty_like(places), epochs.copy()
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = shuffled(places[here], self.windows_per_epoch, mix(self.seed, epoch))
            if self.masks is None:
                moves = epoch and self.n_windows >= 16
                variants[here] = mix(self.seed, epoch, 1) % self.block_size if moves else 0
        return numbers, variants

    def batch(self, step: int, micro_step: int = 0) -> tuple:
        """Inputs and targets, each (batch_size, block_size) int64, for this process's part of a micro-step."""
        micro_batch = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank
        return self._windows(*self._order(micro_batch * self.batch_size, self.batch_size))

    def targets_in(self, step: int) -> int:
        """How many targets the whole global batch of `step` trains on, over all micro-steps and processes."""
        count = self.grad_accum_steps * self.world_size * self.batch_size
        if self.masks is None:
            return count * self.block_size
        return max(1, int(self.row_targets[self._order(step * count, count)[0]].sum()))

    def eval_batches(self, eval_iters: int) -> Iterator[tuple]:
        """This process's share of eval_iters * batch_size windows spread evenly over the split, the same every time."""
        n = min(eval_iters * self.batch_size, self.n_windows)
        numbers = (np.arange(n) * self.n_windows // n)[self.rank::self.world_size]
        for first in range(0, len(numbers), self.batch_size):
            chosen = numbers[first:first + self.batch_size]
            yield self._windows(chosen, np.zeros_like(chosen))


def divide_batch(total_batch_size: int, batch_size: int, block_size: int, world_size: int) -> tuple[int, int]:
    """(tokens in an optimizer step, micro-steps that they take), if world_size processes work in micro-batches of
    batch_size * block_size tokens; total_batch_size 0 means one of these each. Raises UserError if it is no multiple.
    """
    tokens = batch_size * block_size * world_size
    total = total_batch_size or tokens
    if total % tokens:
        raise UserError(f'total_batch_size {total:,} is not a multiple of batch_size * block_size * processes = '
                        f'{tokens:,};\nfor instance --total_batch_size={max(1, round(total / tokens)) * tokens}')
    return total, total // tokens


# -----------------------------------------------------------------------------
# a permutation without a table


def mix(*numbers: int) -> int:
    """A well-stirred 64-bit integer from some integers (the finalizer of splitmix64, Steele et al. 2014)."""
    z = 0
    for number in numbers:
        z = (z ^ int(number) & 0xffffffffffffffff) + 0x9e3779b97f4a7c15 & 0xffffffffffffffff
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9 & 0xffffffffffffffff
        z = (z ^ z >> 27) * 0x94d049bb133111eb & 0xffffffffffffffff
        z ^= z >> 31
    return z


def shuffled(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Entries `places` (int64 array) of the pseudo-random permutation of range(n) that `key` picks.

    A Feistel network of six rounds permutes the smallest square of a power of two that holds n; a result outside
    range(n) goes through again until it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    No table: a hundred million windows cost no memory, and no library's random stream can change under a resumed run.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key, r)) for r in range(6)]
    out = np.asarray(places).astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & low
        for k in keys:
            with np.errstate(over='ignore'):
                f = (right ^ k) * np.uint64(0xbf58476d1ce4e5b9)
            f ^= f >> np.uint64(29)
            left, right = right, left ^ (f * np.uint64(0x94d049bb133111eb) >> np.uint64(32)) & low
        out[todo] = left << np.uint64(half) | right
        todo = out >= n
    return out.astype(np.int64)
