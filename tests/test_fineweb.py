"""FineWeb-Edu to shards: exactly the documents' tokens, whatever stops it on the way, from a hub on this machine."""
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import tracemalloc
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hub import Hub
from pydoc_data.topics import topics

import configurator
import dataset
import download
from configurator import UserError
from dataset import TokenDataset, dataset_tokenizer, find_dataset
from metrics import progress_bar
from scripts import ROOT, Script

SCRIPT = ROOT / 'fineweb.py'
EOT = 50256
REPO = 'datasets/HuggingFaceFW/fineweb-edu'
RNG = random.Random(1)


def unicode_text(characters):
    """Letters of many scripts, spaces of many kinds, what looks like a special token, and unassigned characters."""
    ranges = [(32, 127), (32, 127), (0xa0, 0x250), (0x370, 0x530), (0x900, 0x980), (0x2000, 0x2070), (0x4e00, 0x9fff),
              (0xac00, 0xd7a3), (0x1f300, 0x1faff), (0x10000, 0x10100)]
    text = ''.join(chr(RNG.randrange(*RNG.choice(ranges))) for _ in range(characters))
    return text.replace('z', ' <|endoftext|> ').replace('q', "\n\n  it's ")


SMALL = [[unicode_text(RNG.randrange(1, 1500)) for _ in range(12)] for _ in range(4)]   # the documents of four files
SMALL[0][3:5] = ['', None]
SMALL[1][-1] = ''
SMALL[2][6] = unicode_text(9000)
LARGE = [[topics[name] for name in sorted(topics)] * 2 + SMALL[i] for i in range(4)]      # 3.8 million characters


def parquet(documents, row_group_size=5):
    file = io.BytesIO()
    table = pyarrow.table({'id': [str(i) for i in range(len(documents))],
                           'text': pyarrow.array(documents, pyarrow.string()), 'score': [1.5] * len(documents)})
    pyarrow.parquet.write_table(table, file, row_group_size=row_group_size)
    return file.getvalue()


def files_of(documents):
    return {f'sample/10BT/{i:03d}_00000.parquet': parquet(texts) for i, texts in enumerate(documents)}


def tokens_of(documents):
    """What must come out: a plain loop over the documents of all files."""
    gpt2, tokens = tiktoken.get_encoding('gpt2'), []
    for text in (text for texts in documents for text in texts):
        if text:
            tokens += [gpt2.eot_token, *gpt2.encode_ordinary(text)]
    return tokens


@pytest.fixture(scope='module')
def small():
    return tokens_of(SMALL)


@pytest.fixture(scope='module')
def large():
    return tokens_of(LARGE)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, 'BACKOFF', 0.001)
    monkeypatch.setattr(os, 'fsync', lambda fd: None)       # a tenth of a second on a busy disk
    return tmp_path


@pytest.fixture
def hub(here, monkeypatch):
    """A hub with the small files, which HF_ENDPOINT names."""
    with Hub({REPO: {**files_of(SMALL), 'README.md': b'hello', 'data/CC-MAIN/0.parquet': b'another sample'},
              'datasets/kjj0/finewebedu10B-gpt2': pretokenized_shards()}) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        yield hub


class InlinePool:
    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def make(*args, batch=3000):
    """The script in this process, with no worker processes and in small batches. Raises what it would end with."""
    spec = importlib.util.spec_from_file_location('fineweb_under_test', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, 'configure', functools.partial(configurator.configure, argv=list(args)))
        spec.loader.exec_module(module)

    @contextmanager
    def inline(count):
        yield InlinePool()
    module.encoding, module.worker_pool, module.BATCH = tiktoken.get_encoding('gpt2'), inline, batch
    module.main()


def start(*args, cwd='.'):
    if not hasattr(os, 'fork'):
        pytest.skip('there is no fork')
    return Script(cwd, 'fineweb.py', *args)


def wait(script):
    """The exit status. None of its processes is left."""
    script.status = script.wait()
    deadline = time.monotonic() + 20
    while script.alive():
        assert time.monotonic() < deadline, 'processes are left behind'
        time.sleep(0.005)
    return script.status


@pytest.fixture
def run(here):
    def run(*args, cwd='.'):
        script = start(*args, cwd=cwd)
        wait(script)
        return script
    return run


def all_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def read_tokens(folder, split):
    """All tokens of a split, read by hand, after checking all that meta.json says."""
    meta = json.loads(Path(folder, 'meta.json').read_text(encoding='utf-8'))
    parts = []
    for shard in meta['shards'][split]:
        data = Path(folder, shard['file']).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard['sha256']
        header = np.frombuffer(data[:1024], '<i4')
        parts.append(np.frombuffer(data[1024:], '<u2'))
        assert header[:3].tolist() == [20240520, 1, shard['tokens']] and not header[3:].any()
        assert len(parts[-1]) == shard['tokens']
    assert (meta['tokenizer'], meta['vocab_size'], meta['eot'], meta['template']) == ('gpt2', 50257, EOT, '')
    return np.concatenate(parts).tolist()


def all_tokens(folder):
    return read_tokens(folder, 'val') + read_tokens(folder, 'train')


# -----------------------------------------------------------------------------
# what comes out

@pytest.mark.parametrize('workers', [1, 2])
def test_the_shards_hold_exactly_the_tokens_of_the_documents_in_order(run, hub, large, workers):
    hub.repos[REPO].update(files_of(LARGE))
    done = run(f'--workers={workers}', '--shard_size=20000')
    assert done.status == 0, done.err
    folder = Path('data/fineweb_edu_10B')
    train, val = read_tokens(folder, 'train'), read_tokens(folder, 'val')
    assert val == large[:20000] and train == large[20000:]
    n = -(-len(train) // 20000)
    assert sorted(p.name for p in folder.glob('*.*')) == [
        'meta.json', 'progress.json', *(f'train_{i + 1:06d}.bin' for i in range(n)), 'val_000000.bin']
    assert f'train has {len(train):,} tokens\nval has 20,000 tokens\n' in done.out
    assert f'wrote {folder}; train on it with --dataset=fineweb_edu_10B\n' in done.out
    assert done.err == ''                                               # a log is not filled with bars
    data = TokenDataset(find_dataset('fineweb_edu_10B'), 'train', 64, 50257, 4)
    assert data.n_tokens == len(train) and data.batch(0)[0].shape == (4, 64)
    assert dataset_tokenizer(folder).kind == 'gpt2'


@pytest.mark.parametrize('shard_size, most', [(1, 12), (7, 100), (1000, 0), (10 ** 8, 0)])
def test_documents_may_be_longer_or_shorter_than_a_shard_or_empty(hub, shard_size, most):
    texts = [[None, 'x', '', *documents] for documents in SMALL]
    hub.repos[REPO] = files_of(texts)
    make(f'--shard_size={shard_size}', f'--max_tokens={most}')
    tokens = all_tokens('data/fineweb_edu_10B')
    assert tokens == tokens_of(texts)[:len(tokens)] and len(tokens) >= (most or len(tokens_of(texts)))


@pytest.mark.parametrize('batch', [1, 100, 10 ** 9])
def test_the_shards_do_not_depend_on_how_the_work_is_cut_up(hub, batch):
    make('--shard_size=5000', '--out=a')
    make('--shard_size=5000', '--out=b', batch=batch)
    assert all_bytes('a')['meta.json'] == all_bytes('b')['meta.json']


def test_every_form_of_input_gives_the_same_shards(here, small):
    texts = [text for documents in SMALL for text in documents if text]
    lines = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
    Path('a.jsonl').write_bytes(lines)
    Path('a.jsonl.gz').write_bytes(gzip.compress(lines))
    Path('parquet').mkdir()
    for name, data in files_of(SMALL).items():
        Path('parquet', Path(name).name).write_bytes(data)
    for given in ('a.jsonl', 'a.jsonl.gz', 'parquet', 'parquet/*.parquet', f'{here}/parquet'):
        make(f'--input={given}', '--out=made', '--shard_size=4000')
        assert all_tokens('made') == small
        assert not Path('data').exists()
        shutil.rmtree('made')


def test_a_text_of_any_length_is_read_in_pieces_that_give_the_tokens_of_the_whole(here, monkeypatch):
    import corpus
    monkeypatch.setattr(corpus, 'PIECE', 1000)
    text = '\n'.join(topics[name] for name in sorted(topics)[:20])
    Path('a.parquet').write_bytes(parquet([text, 'short', text]))
    Path('a.jsonl').write_text(json.dumps({'text': text}) + '\n', encoding='utf-8')
    pieces = [piece for piece in corpus.read_documents([Path('a.parquet'), Path('a.jsonl')])]
    assert max(len(text) for piece in pieces for text, _ in piece.segments) <= 1000
    assert [piece.starts for piece in pieces].count(True) == 4
    make('--input=a.parquet,a.jsonl', '--out=made', '--shard_size=9000')
    assert all_tokens('made') == tokens_of([[text, 'short', text, text]])


@pytest.mark.parametrize('args, shard_size', [
    (['--shard_size=2000'], 2000), ([], 10 ** 8), (['--shard_size=90000'], 90000), (['--fraction=1e-6'], 10 ** 8),
    (['--max_tokens=10000', '--shard_size=5000'], 5000), (['--max_tokens=10000', '--shard_size=500'], 500)], ids=str)
def test_validation_is_the_first_shard_but_no_more_than_a_tenth(hub, small, args, shard_size):
    make(*args)
    train, val = (read_tokens('data/fineweb_edu_10B', split) for split in ('train', 'val'))
    assert val + train == small[:len(val + train)] and len(val + train) >= 10000
    assert len(val) == min(shard_size, len(val + train) // 10)
    for split in ('train', 'val'):
        assert TokenDataset(find_dataset('fineweb_edu_10B'), split, 64, 50257, 1).n_windows > 1


def ends_of(documents):
    """How many tokens there are up to the end of each document."""
    starts = np.flatnonzero(np.array(tokens_of(documents)) == EOT)
    return [*starts[1:].tolist(), len(tokens_of(documents))]


def test_max_tokens_ends_with_the_document_that_reaches_it(hub, small):
    ends = ends_of(SMALL)
    in_file = ends_of(SMALL[:1])[-1]
    for most in (20, ends[3] - 1, ends[3], ends[3] + 1, in_file - 1, in_file, in_file + 1, len(small), len(small) + 1):
        make(f'--max_tokens={most}', '--shard_size=1500', '--out=made')
        wanted = next((end for end in ends if end >= most), len(small))
        assert all_tokens('made') == small[:wanted], most
        shutil.rmtree('made')


def test_only_the_files_that_max_tokens_needs_are_fetched(hub):
    ends = [ends_of(SMALL[:n])[-1] for n in (1, 2, 3, 4)]
    fetched = []
    for most, files in ((20, 1), (ends[0], 1), (ends[0] + 1, 2), (ends[2], 3), (ends[2] + 1, 4)):
        make(f'--max_tokens={most}', f'--out=made{files}{most}')
        fetched = hub.fetched()
        assert fetched == sorted(files_of(SMALL))[:files]               # each once, for all --out together
    assert not [r for r in hub.requests if 'README' in r.path or 'CC-MAIN' in r.path]


def test_the_next_file_is_fetched_while_one_is_tokenized(hub):
    hub.repos[REPO].update(files_of(LARGE))
    opened = Event()
    hub.fail('/datasets/.*001_00000.parquet.signature', hold=opened)
    script = start('--shard_size=20000', '--workers=1')
    wait_for(lambda: len(list(Path('data/fineweb_edu_10B').glob('train_*.bin'))) > 5)       # of the first file
    assert hub.fetched() == sorted(files_of(SMALL))[:2]
    opened.set()
    assert wait(script) == 0


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -----------------------------------------------------------------------------
# stopped on the way

@pytest.fixture(scope='module')
def unbroken(tmp_path_factory, large):
    """A folder with large parquet files, and all bytes of the data set that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp('unbroken')
    for name, data in files_of(LARGE).items():
        (folder / Path(name).name).write_bytes(data)
    make(f'--input={folder}', f'--out={folder}/made', '--shard_size=15000', batch=1 << 20)
    assert all_tokens(folder / 'made') == large
    return folder, all_bytes(folder / 'made')


@pytest.mark.parametrize('workers', [1, 2])
def test_killed_twenty_times_it_makes_the_same_bytes_and_leaves_no_process_behind(run, unbroken, workers):
    folder, wanted = unbroken
    args = (f'--input={folder}/*.parquet', '--out=made', '--shard_size=15000', f'--workers={workers}')
    rng, kills, status = random.Random(workers), 0, None
    while kills < 20 or status != 0:
        if status == 0:                                                 # it was done before it was killed
            assert all_bytes('made') == wanted
            shutil.rmtree('made')
        if kills == 20:                                                 # undisturbed, at last
            status = run(*args).status
            assert status == 0
            continue
        script = start(*args)
        target = len(list(Path('made').glob('*.bin'))) + rng.randrange(4)   # when so many are there, or soon after
        deadline = time.monotonic() + rng.choice([rng.uniform(0.02, 1), 5])
        while len(list(Path('made').glob('*.bin'))) < target and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.choice([0, rng.uniform(0, 0.01)]))
        script.send(signal.SIGKILL)
        status = wait(script)
        if status != 0:
            assert status == -signal.SIGKILL
            kills += 1
            if not Path('made/meta.json').exists():                     # which may be there, as the very last thing
                with pytest.raises(UserError, match='half made.*fineweb.py|is empty|no data set'):
                    find_dataset('made')
    assert all_bytes('made') == wanted


@pytest.mark.parametrize('victim', ['unlink', 'replace', 'open', 'fsync'])
@pytest.mark.parametrize('part', ['', '1/2'])
def test_cut_short_at_any_file_operation_it_goes_on_to_the_same_bytes(here, monkeypatch, victim, part):
    Path('in').mkdir()
    for name, data in files_of([texts[:4] for texts in SMALL[:3]]).items():
        Path('in', Path(name).name).write_bytes(data)
    args = ('--input=in', '--out=made', '--shard_size=600', f'--part={part}')
    if part:
        make(*args[:-1], '--part=2/2', batch=200)
        shutil.copytree('made', 'other')
    make(*args, batch=200)
    whole = all_bytes('made')
    owner = {'unlink': Path, 'replace': os, 'open': dataset, 'fsync': os}[victim]
    real, nth, n_cut = getattr(owner, victim, open), 0, 0
    while True:
        shutil.rmtree('made')
        if part:
            shutil.copytree('other', 'made')
        calls = 0

        def dies(*args, _nth=nth, **options):
            nonlocal calls
            if not str(args[0]).endswith('.lock'):      # death would let go of the lock, which an exception here cannot
                calls += 1
                if calls > _nth:
                    raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, victim, dies, raising=False)
            try:
                make(*args, batch=200)
            except KeyboardInterrupt:
                n_cut += 1
            else:
                break
        if not Path('made', 'meta.json').exists():
            with pytest.raises(UserError):
                find_dataset('made')
        make(*args, batch=[50, 900][nth % 2])                           # cut up in another way
        assert all_bytes('made') == whole, nth
        nth += 1 if nth < 8 else 5
    assert n_cut >= (1 if victim == 'unlink' else 5)


def test_a_restart_does_again_no_more_than_the_last_shard(hub, monkeypatch):
    """Counted in tokens: what the second run encodes is what was missing, a shard, and a batch."""
    saved, real = 0, os.replace

    def dies_later(*args):
        nonlocal saved
        saved += 'progress.json' in str(args[1])
        if saved == 15:                                                 # while it enters the 14th shard
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', dies_later)
        with pytest.raises(KeyboardInterrupt):
            make('--shard_size=1000', '--out=made')
    record = json.loads(Path('made/progress.json').read_text(encoding='utf-8'))
    done = sum(shard['tokens'] for split in record['shards'].values() for shard in split)
    assert done == 13000
    hub.requests.clear()
    encoded, encode = 0, tiktoken.Encoding.encode_to_numpy

    def counts(*args, **options):
        nonlocal encoded
        encoded += len(encode(*args, **options))
        return encode(*args, **options)

    monkeypatch.setattr(tiktoken.Encoding, 'encode_to_numpy', counts)
    make('--shard_size=1000', '--out=made')
    assert len(all_tokens('made')) - done <= encoded <= len(all_tokens('made')) - done + 1000 + 3000 + 9000
    assert len(hub.fetched()) < 4                                       # and no file is fetched twice


def test_ctrl_c_ends_with_130_and_it_goes_on(run, unbroken):
    folder, wanted = unbroken
    args = (f'--input={folder}/*.parquet', '--out=made', '--shard_size=15000', '--workers=2')
    for n_shards in (0, 1):                                             # while the workers start, and later
        script = start(*args)
        wait_for(lambda n=n_shards, alive=script.alive: len(list(Path('made').glob('*.bin'))) >= n and len(alive()) > 2)
        script.send(signal.SIGINT, group=True)                          # as a terminal does, to all its processes
        assert wait(script) == 130
        assert 'Traceback' not in script.err
    assert run(*args).status == 0
    assert all_bytes('made') == wanted


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='no way to find the workers')
def test_a_worker_that_dies_ends_it_in_words_and_it_goes_on(run, unbroken):
    folder, wanted = unbroken
    args = (f'--input={folder}/*.parquet', '--out=made', '--shard_size=15000', '--workers=2')
    script = start(*args)
    wait_for(lambda: Path('made/train_000001.bin').exists())
    for pid in script.alive():
        command = Path(f'/proc/{pid}/cmdline').read_bytes()
        if b'spawn_main' in command:
            os.kill(pid, signal.SIGKILL)
            break
    assert wait(script) == 2
    assert 'a worker process died' in script.err and 'Traceback' not in script.err
    assert len(script.err.splitlines()) == 2
    assert run(*args).status == 0
    assert all_bytes('made') == wanted


def test_a_finished_data_set_is_left_alone_and_needs_no_network(hub, monkeypatch, capsys):
    make('--shard_size=5000')
    folder = Path('data/fineweb_edu_10B')
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix != '.lock'}
    hub.requests.clear()
    capsys.readouterr()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    make('--shard_size=5000')
    assert 'whole already' in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before and hub.requests == []


@pytest.mark.parametrize('then, names', [
    (['--shard_size=1000'], 'shard_size=5000'), (['--max_tokens=99', '--shard_size=5000'], 'max_tokens=0'),
    (['--part=1/2', '--shard_size=5000'], 'parts=1'), (['--input=a.jsonl', '--shard_size=5000'], 'a.jsonl'),
    (['--pretokenized', '--shard_size=5000'], 'finewebedu10B')])
@pytest.mark.parametrize('finished', [True, False])
def test_with_other_settings_the_difference_is_told_and_nothing_is_touched(hub, then, names, finished):
    Path('a.jsonl').write_text('{"text": "x"}\n', encoding='utf-8')
    make('--shard_size=5000', '--out=made')
    if not finished:
        record = json.loads(Path('made/progress.json').read_text(encoding='utf-8'))
        Path('made/progress.json').write_text(json.dumps({**record, 'done': False}), encoding='utf-8')
        Path('made/meta.json').unlink()
    before = all_bytes('made')
    with pytest.raises(UserError, match=names) as error:
        make('--out=made', *then)
    assert len(str(error.value).splitlines()) <= 2
    assert all_bytes('made') == before


def test_other_files_at_the_source_are_not_mixed_in(here):
    Path('in').mkdir()
    for name, data in files_of(SMALL).items():
        Path('in', Path(name).name).write_bytes(data)
    Path('in/002_00000.parquet').write_bytes(b'PAR1 damaged')
    with pytest.raises(UserError, match='002_00000.parquet'):
        make('--input=in', '--out=made', '--shard_size=2000')
    assert len(list(Path('made').glob('*.bin'))) > 3
    before = all_bytes('made')
    Path('in/002_00000.parquet').write_bytes(parquet(SMALL[3]))
    with pytest.raises(UserError, match='files'):
        make('--input=in', '--out=made', '--shard_size=2000')
    assert all_bytes('made') == before


def test_a_shard_that_went_missing_is_told(hub):
    make('--shard_size=5000', '--out=made')
    Path('made/train_000002.bin').unlink()
    with pytest.raises(UserError, match='train_000002.bin'):
        make('--shard_size=5000', '--out=made')


@pytest.mark.parametrize('theirs', ['train.bin', 'fineweb_val_000000.bin', 'meta.json', 'train_000000.bin.tmp', 'a.npy',
                                    'tokenizer.json'])
def test_what_others_made_is_neither_mixed_in_nor_deleted(hub, theirs):
    Path('theirs').mkdir()
    Path('theirs', theirs).write_bytes(b'precious')
    with pytest.raises(UserError, match=re.escape(theirs)):
        make('--out=theirs')
    assert all_bytes('theirs') == {theirs: b'precious'}


@pytest.mark.parametrize('finished', [True, False])
def test_prepare_data_does_not_delete_it(hub, finished):
    make('--shard_size=5000', '--out=made')
    if not finished:
        Path('made/meta.json').unlink()
        Path('made/train_000003.bin').rename('made/train_000003.bin.tmp')
    before = all_bytes('made')
    with pytest.raises(UserError, match='fineweb.py'):
        dataset.start_dataset('made')
    assert all_bytes('made') == before


# -----------------------------------------------------------------------------
# small disks, parts

def test_downloaded_files_are_deleted_when_their_tokens_are_safe(hub, small, monkeypatch):
    source, saves, real = Path('data/fineweb_edu_10B/source/sample/10BT'), 0, os.replace

    def dies(*args):
        nonlocal saves
        saves += 'progress.json' in str(args[1])
        if saves % 5 == 0 and 'progress.json' in str(args[1]):
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(os, 'replace', dies)
    most = 0
    for _ in range(100):
        try:
            make('--shard_size=1000', '--keep_source=False')
            break
        except KeyboardInterrupt:
            most = max(most, len(list(source.glob('*.parquet'))))
    assert 0 < most <= 2                                                # one under way, one fetched ahead
    assert list(source.iterdir()) == []
    assert all_tokens('data/fineweb_edu_10B') == small
    assert hub.fetched() == sorted(files_of(SMALL))                     # none of them twice


@pytest.mark.parametrize('apart', [False, True])
def test_parts_together_have_every_document_once(hub, small, apart, capsys):
    for k in (2, 3, 1):
        Path(f'm{k}').mkdir(exist_ok=True)
        make(f'--part={k}/3', '--shard_size=1000', f'--out={f"m{k}" if apart else "together"}/d')
        if k != 1:
            assert f'part {k}/3 is done' in capsys.readouterr().out
    if apart:
        for k in (1, 2, 3):
            with pytest.raises(UserError, match='half made'):
                find_dataset(f'm{k}/d')
            shutil.copytree(f'm{k}/d', 'together/d', dirs_exist_ok=True)
        capsys.readouterr()
        make('--part=2/3', '--shard_size=1000', '--out=together/d')
    assert 'wrote ' in capsys.readouterr().out
    wanted = tokens_of([SMALL[i] for i in (0, 3, 1, 2)])
    assert all_tokens('together/d') == wanted
    assert read_tokens('together/d', 'val') == wanted[:1000]
    TokenDataset(find_dataset('together/d'), 'train', 64, 50257, 1)
    names = [s['file'] for s in json.loads(Path('together/d/meta.json').read_text(encoding='utf-8'))['shards']['train']]
    assert len(set(names)) == len(names) and names == sorted(names)


def test_parts_that_end_at_the_same_time_both_end_well(hub, small):
    for i in range(2):
        scripts = [start(f'--part={k}/4', '--shard_size=1000', f'--out=d{i}', '--workers=1')
                   for k in (1, 2, 3, 4)]
        assert [wait(script) for script in scripts] == [0] * 4, [script.err for script in scripts]
        assert all_tokens(f'd{i}') == small
        assert all_bytes(f'd{i}').keys() == all_bytes('d0').keys()


def test_parts_share_max_tokens(hub):
    for k in (1, 2):
        make(f'--part={k}/2', '--max_tokens=6000', '--shard_size=2000', '--out=d')
    tokens = all_tokens('d')
    ends = [ends_of([SMALL[0], SMALL[2]]), ends_of([SMALL[1], SMALL[3]])]
    assert len(tokens) == sum(next(end for end in e if end >= 3000) for e in ends)


@pytest.mark.parametrize('settings', ['--shard_size=999', '--part=2/4', '--max_tokens=5000'])
def test_parts_of_different_settings_are_not_joined(hub, settings):
    make('--part=1/3', '--shard_size=1000', '--out=d')
    before = all_bytes('d')
    with pytest.raises(UserError, match=settings[2:].split('=')[0]):
        make(*['--part=2/3', '--shard_size=1000', settings], '--out=d')
    assert all_bytes('d') == before


# -----------------------------------------------------------------------------
# shards that others tokenized, and no network

def pretokenized_shards():
    shards = {}
    for name in ('val_000000', 'train_000001', 'train_000002', 'train_000003'):
        header = np.zeros(256, '<i4')
        tokens = np.random.default_rng(len(shards)).integers(0, 50257, 500).astype('<u2')
        header[:3] = 20240520, 1, len(tokens)
        shards[f'finewebedu_{name}.bin'] = header.tobytes() + tokens.tobytes()
    return {**shards, '.gitattributes.md': b'', 'README.md': b'hello'}


@pytest.mark.parametrize('args, train', [
    ([], 3), (['--max_tokens=1'], 1), (['--max_tokens=500'], 1), (['--max_tokens=501'], 2), (['--fraction=1e-7'], 2),
    (['--max_tokens=9999'], 3)])
def test_pretokenized_shards_are_fetched_as_many_as_are_needed(hub, args, train, capsys):
    make('--pretokenized', *args)
    shards, folder = pretokenized_shards(), Path('data/fineweb_edu_10B')
    names = ['finewebedu_val_000000.bin', *(f'finewebedu_train_{i + 1:06d}.bin' for i in range(train))]
    assert hub.fetched() == names
    assert {name: data for name, data in all_bytes(folder).items() if '.json' not in name} == {
        name: shards[name] for name in names}
    assert len(read_tokens(folder, 'train')) == 500 * train and len(read_tokens(folder, 'val')) == 500
    data = TokenDataset(find_dataset('fineweb_edu_10B'), 'train', 64, 50257, 1)
    assert data.n_tokens == 500 * train
    assert f'train has {500 * train:,} tokens' in capsys.readouterr().out


def test_a_pretokenized_shard_that_is_not_what_was_published_is_refused_and_it_goes_on(hub):
    hub.fail('train_000002.bin.signature', times=2, body=pretokenized_shards()['finewebedu_train_000003.bin'])
    with pytest.raises(UserError, match='train_000002.bin.*SHA-256'):
        make('--pretokenized', '--out=d')
    with pytest.raises(UserError, match='half made'):
        find_dataset('d')
    hub.requests.clear()
    make('--pretokenized', '--out=d')
    assert hub.fetched() == ['finewebedu_train_000002.bin', 'finewebedu_train_000003.bin']
    assert len(read_tokens('d', 'train')) == 1500


def test_a_pretokenized_file_that_is_no_shard_is_refused(hub):
    hub.repos['datasets/kjj0/finewebedu10B-gpt2']['finewebedu_train_000001.bin'] = b'x' * 2024
    with pytest.raises(UserError, match='train_000001.bin'):
        make('--pretokenized', '--out=d')


def test_a_bad_connection_is_survived_and_the_token_stays_at_the_hub(hub, small, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    hub.fail('/tree/', status=429, headers={'Retry-After': '0'})
    hub.fail('000_00000.parquet.signature', cut=500)
    hub.fail('resolve/main/sample/10BT/001', status=503)
    hub.fail('002_00000.parquet.signature', body=b'wrong')
    make('--shard_size=3000')
    assert all_tokens('data/fineweb_edu_10B') == small
    assert {r.headers.get('Authorization') for r in hub.requests if r.host == 'hub'} == {'Bearer hf_secret'}
    assert {r.headers.get('Authorization') for r in hub.requests if r.host == 'store'} == {None}
    stored = [r.path for r in hub.requests if r.host == 'store']
    assert [sum(f'00{i}_00000.parquet' in path for path in stored) for i in range(3)] == [2, 1, 2]
    assert sum('/tree/' in r.path for r in hub.requests) == 1 + 2       # five entries in pages of two, and one refusal


def test_offline_what_is_on_disk_is_used_and_what_is_missing_is_named(hub, small, monkeypatch):
    first_file = ends_of(SMALL[:1])[-1]
    make(f'--max_tokens={first_file}', '--out=a')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    hub.requests.clear()
    make(f'--max_tokens={first_file - 1}', '--out=b')
    assert all_tokens('b') == all_tokens('a') == small[:first_file]
    with pytest.raises(UserError, match='001_00000.parquet is missing') as error:
        make('--out=c', '--shard_size=1000')
    assert len(str(error.value).splitlines()) <= 2
    assert hub.requests == []
    monkeypatch.delenv('HF_HUB_OFFLINE')
    make('--out=c', '--shard_size=1000')
    assert all_tokens('c') == small


@pytest.mark.parametrize('damage', [
    '', '[', '{}', '[]', '[{"path": "x"}]', '[{"path": 1, "size": 2, "sha256": null}]', None])
def test_offline_without_a_whole_list_of_files_it_says_so(hub, monkeypatch, damage):
    make('--max_tokens=10', '--out=a')
    listing = Path('data/fineweb_edu_10B/source/fineweb-edu.listing')
    listing.unlink() if damage is None else listing.write_text(damage, encoding='utf-8')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UserError, match='HF_HUB_OFFLINE.*HuggingFaceFW/fineweb-edu'):
        make('--out=b')
    assert not Path('b').exists()


# -----------------------------------------------------------------------------
# wrong command lines

@pytest.mark.parametrize('args, names', [
    ('--sample=20BT', ['20BT', '10BT, 100BT, 350BT']),
    ('--fraction=0', ['fraction', '0']),
    ('--fraction=1.5', ['fraction', '1.5']),
    ('--fraction=nan', ['fraction', 'nan']),
    ('--fraction=0.5 --max_tokens=5', ['fraction', 'max_tokens']),
    ('--fraction=0.5 --input=a.jsonl', ['fraction', '--max_tokens']),
    ('--max_tokens=-1', ['max_tokens', '-1']),
    ('--workers=-2', ['workers', '-2']),
    ('--shard_size=0', ['shard_size', '0']),
    ('--shard_size=3000000000', ['shard_size', '3000000000']),
    ('--part=3/2', ['3/2', '2/8']),
    ('--part=0/2', ['0/2']),
    ('--part=2', ["'2'"]),
    ('--part=5/5 --input=a.jsonl', ['5/5', '1 file']),
    ('--pretokenized --sample=350BT', ['10BT and 100BT']),
    ('--pretokenized --input=a.jsonl', ['--pretokenized', '--input']),
    ('--pretokenized --part=1/2', ['--pretokenized', '--part']),
    ('--input=a.jsonl --keep_source=False', ['keep_source']),
    ('--input=nowhere.parquet', ['nowhere.parquet']),
    ('--input=picture.png', ['picture.png']),
    ('--input=a.jsonl --out=a.jsonl', ['a.jsonl']),
    ('--input=a.jsonl --worker=3', ['worker', 'workers']),
    ('--input=a.jsonl --sampel=10BT', ['sampel', 'sample']),
])
def test_a_wrong_command_line_ends_in_words_with_status_2_and_writes_nothing(run, hub, args, names):
    Path('a.jsonl').write_text('{"text": "one"}\n', encoding='utf-8')
    Path('picture.png').write_bytes(b'')
    before = {p for p in Path().rglob('*') if not p.name.startswith('log')}
    done = run(*args.split())
    assert done.status == 2
    assert done.err.startswith('error: ') and 'Traceback' not in done.err and len(done.err.splitlines()) <= 2
    assert all(name in done.err for name in names), done.err
    assert {p for p in Path().rglob('*') if not p.name.startswith('log')} == before
    assert hub.requests == []


@pytest.mark.parametrize('texts', [[], [''], ['x']])
def test_too_little_text_is_told(here, texts):
    Path('a.parquet').write_bytes(parquet(texts))
    with pytest.raises(UserError, match='empty; give more text'):
        make('--input=a.parquet', '--out=made')
    with pytest.raises(UserError, match='half made'):
        find_dataset('made')


@pytest.mark.parametrize('damage', ['no text', 'numbers', 'not utf-8', 'cut'])
def test_a_file_that_cannot_be_read_is_named(here, damage):
    bad = {'no text': pyarrow.table({'words': ['a']}), 'numbers': pyarrow.table({'text': [1]}),
           'not utf-8': pyarrow.table({'text': pyarrow.Array.from_buffers(pyarrow.string(), 1, [
               None, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b'\xff\xff')])}),
           'cut': pyarrow.table({'text': ['a']})}[damage]
    pyarrow.parquet.write_table(bad, 'bad.parquet')
    if damage == 'cut':
        Path('bad.parquet').write_bytes(Path('bad.parquet').read_bytes()[:-20])
    with pytest.raises(UserError, match='bad.parquet') as error:
        make('--input=bad.parquet', '--out=made')
    assert len(str(error.value).splitlines()) <= 2


def test_a_full_disk_is_told_in_words_and_it_goes_on(hub, small, monkeypatch):
    writes = 0

    def full(self, tokens, mask=None, real=dataset.ShardWriter.write):
        nonlocal writes
        writes += 1
        if writes == 9:
            raise OSError(28, 'No space left on device')
        real(self, tokens, mask)

    with monkeypatch.context() as patch:
        patch.setattr(dataset.ShardWriter, 'write', full)
        with pytest.raises(UserError, match='No space left on device'):
            make('--shard_size=1000', '--out=made')
    make('--shard_size=1000', '--out=made')
    assert all_tokens('made') == small


@pytest.mark.parametrize('row_group_size', [100, 10 ** 9])
def test_of_a_parquet_file_only_a_little_is_in_memory_at_a_time(here, row_group_size):
    from corpus import read_file
    Path('a.parquet').write_bytes(parquet([RNG.randbytes(5000).hex() for _ in range(3000)], row_group_size))
    assert Path('a.parquet').stat().st_size > 25_000_000
    with open('a.parquet', 'rb') as raw:
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        n = sum(len(segments[0][0]) for _, segments in read_file(Path('a.parquet'), raw))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert n == 30_000_000
    assert peak < 12_000_000 and pyarrow.total_allocated_bytes() - before < 12_000_000


# -----------------------------------------------------------------------------
# what is shown

@pytest.mark.parametrize('terminal', [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_in_a_log(monkeypatch, terminal):
    now, stream = 0, io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr('tqdm.std.time', lambda: now)
    monkeypatch.setattr(sys, 'stderr', stream)
    with progress_bar(desc='tokens', initial=50_000, total=300_000, unit='', unit_scale=True) as bar:
        for _ in range(100):                    # 1,000 tokens a second, from the 50,000th on
            now += 1
            bar.update(1000)
    shown = stream.getvalue()
    if terminal:
        assert '\r' in shown
    else:
        assert '\r' not in shown and 3 <= len(shown.splitlines()) <= 4
        assert shown.startswith('tokens: 80.0k/300k [00:30<03:40, 1.00k/s]\n')
