"""From texts to shards and back: every document whole, the same bytes every time, whatever the form of the input."""
import builtins
import gzip
import hashlib
import json
import random
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hub import Hub

import corpus
from configurator import UserError
from dataset import TokenDataset, dataset_tokenizer, find_dataset
from scripts import ROOT, command, run

SCRIPT = ROOT / 'prepare_data.py'


def prepare(folder, *args, **options):
    return run(folder, 'prepare_data.py', *args, **options)


def make(*args, piece=None):
    """The same in this process, without the seconds that starting takes. Raises what the script would end with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, 'PIECE', piece or corpus.PIECE)
        patch.setattr(sys, 'argv', ['prepare_data.py', *args])
        patch.setattr(sys, 'excepthook', sys.excepthook)
        runpy.run_path(str(SCRIPT), run_name='__main__')


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_shards(folder, split, magic=20240520, dtype='<u2'):
    """All tokens of a split, read by hand."""
    meta = json.loads(Path(folder, 'meta.json').read_text(encoding='utf-8'))
    parts = []
    for shard in meta['shards'][split]:
        data = Path(folder, shard['file']).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard['sha256']
        header = np.frombuffer(data[:1024], '<i4')
        parts.append(np.frombuffer(data[1024:], dtype))
        assert header[0] == magic and header[2] == len(parts[-1]) == shard['tokens']
    return np.concatenate(parts)


def read_documents(folder, split):
    """The texts in a split; each must have its end-of-text token before it."""
    tokens, tokenizer = read_shards(folder, split), dataset_tokenizer(folder)
    assert tokens[0] == tokenizer.eot
    starts = [*np.flatnonzero(tokens == tokenizer.eot), len(tokens)]
    return [tokenizer.decode(tokens[a + 1:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]


def all_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


WORDS = ("the of and don't we'll it's  a 1234 龍飛 鳳舞， 𠮷 👩‍👩‍👧 naïve — … <|endoftext|> \n \n\n \n"
         " \n\t  \n    \u3000 \xa0 x=1; '' ' \x0b \x85 \u2028").split(' ')


def random_text(seed, words, joints=(' ', ' ', ' ', '  ', '\n', '\n\n', ' \n', '\t', '', '\n   ')):
    rng = random.Random(seed)
    return ''.join(rng.choice(WORDS) + rng.choice(joints) for _ in range(words))


DOCUMENTS = [f'{i}: {random_text(i, random.Random(i).randint(1, 200))}.' for i in range(60)]


# -----------------------------------------------------------------------------
# what comes out

def test_python_docs_needs_no_network_and_meta_json_is_right(tmp_path):
    env = dict.fromkeys(('http_proxy', 'https_proxy', 'ALL_PROXY'), 'http://127.0.0.1:9')
    done = prepare(tmp_path, '--dataset=python_docs', '--vocab_size=512', env=env)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'data' / 'python_docs'
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tokenizer = dataset_tokenizer(folder)
    assert (meta['tokenizer'], meta['vocab_size'], meta['eot']) == ('bpe', 512, tokenizer.eot)
    assert meta['fingerprint'] == tokenizer.fingerprint and meta['template'] == ''
    assert 'pydoc_data' in meta['source'] and '0.1' in meta['split']
    from pydoc_data.topics import topics
    documents = [read_documents(folder, split) for split in ('train', 'val')]
    assert sorted(documents[0] + documents[1]) == sorted(topics.values())
    for split in ('train', 'val'):
        tokens = read_shards(folder, split)
        assert f'{split} has {len(tokens):,} tokens' in done.stdout
        assert tokens.max() < 512


def write_documents(form):
    """The documents as files of one form; returns (--input, further arguments)."""
    texts = Path('texts')
    texts.mkdir()
    if form in ('folder', 'names'):
        for i, text in enumerate(DOCUMENTS):
            path = texts / f'{i // 10}' / f'{i:03d}.txt'
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding='utf-8', newline='')
        (texts / 'picture.png').write_bytes(b'\x89PNG')
        return ('texts' if form == 'folder' else ','.join(map(str, sorted(texts.rglob('*.txt'))))), []
    if form in ('txt', 'txt.gz'):
        data = '\n=====\n'.join(DOCUMENTS).encode()
        Path('texts.' + form).write_bytes(gzip.compress(data) if form == 'txt.gz' else data)
        return 'texts.' + form, ['--separator=\\n=====\\n']
    if form in ('jsonl', 'jsonl.gz'):
        data = ''.join(json.dumps({'id': 1, 'text': t}, ensure_ascii=t < '3') + '\n' for t in DOCUMENTS).encode()
        Path('texts.' + form).write_bytes(gzip.compress(data) if form == 'jsonl.gz' else data)
        return 'texts.' + form, []
    if form == 'parquet':
        table = pyarrow.table({'id': list(range(len(DOCUMENTS))), 'text': DOCUMENTS})
        pyarrow.parquet.write_table(table, 'texts.parquet', row_group_size=7)
        return 'texts.parquet', []
    rows = [json.dumps({'text': t}) + '\n' for t in DOCUMENTS]
    Path('a.jsonl').write_text(''.join(rows[:20]), encoding='utf-8')
    Path('b.jsonl').write_text(''.join(rows[20:45]), encoding='utf-8')
    pyarrow.parquet.write_table(pyarrow.table({'text': DOCUMENTS[45:]}), 'c.parquet')
    return 'a.jsonl, b.jsonl,c.parquet', []


@pytest.mark.parametrize('tokenizer, form', [
    *(('bpe', form) for form in ('folder', 'names', 'txt', 'txt.gz', 'jsonl', 'jsonl.gz', 'parquet', 'mixed')),
    ('char', 'jsonl'), ('gpt2', 'txt'), ('gpt2', 'parquet')])
def test_the_shards_decode_to_exactly_the_documents(here, tokenizer, form):
    given, more = write_documents(form)
    make('--dataset=custom', f'--input={given}', '--out=made', f'--tokenizer={tokenizer}', '--vocab_size=300',
         '--shard_size=5000', *more)
    wanted = [t.strip() for t in DOCUMENTS] if more else DOCUMENTS
    train, val = read_documents('made', 'train'), read_documents('made', 'val')
    assert sorted(train + val) == sorted(wanted)
    assert [t for t in wanted if t in set(train)] == train          # in the order of the input
    assert [t for t in wanted if t in set(val)] == val


def test_every_form_of_input_gives_the_same_shards(here):
    made = []
    for form in ('jsonl', 'jsonl.gz', 'parquet'):
        given, _ = write_documents(form)
        make('--dataset=custom', f'--input={given}', '--out=made', '--vocab_size=300')
        made.append({k: v for k, v in all_bytes('made').items() if k != 'meta.json'})
        Path('texts').rmdir()
    assert made[0] == made[1] == made[2]


def test_a_byte_order_mark_is_no_text_and_windows_line_ends_become_plain(here):
    Path('a.txt').write_bytes(b'\xef\xbb\xbfone\r\ntwo\r\nthree four five six seven eight nine ten\r\n')
    make('--dataset=custom', '--input=a.txt', '--out=made', '--tokenizer=char')
    text = ''.join(read_documents('made', 'train') + read_documents('made', 'val'))
    assert text == 'one\ntwo\nthree four five six seven eight nine ten\n'


@pytest.mark.parametrize('piece', [None, 20, 50])
def test_stories_are_divided_at_the_end_of_text_marker(here, piece):
    stories = [f'Story {i}.\n\nOnce there was a {i}.' + ' More of it.' * (i % 9) for i in range(50)]
    Path('stories.txt').write_text('\n<|endoftext|>\n'.join(stories) + '\n<|endoftext|>\n', encoding='utf-8')
    make('--dataset=custom', '--input=stories.txt', '--out=made', '--vocab_size=300', '--separator=<|endoftext|>',
         piece=piece)
    assert sorted(read_documents('made', 'train') + read_documents('made', 'val')) == sorted(stories)


@pytest.mark.parametrize('separator', [
    '\n---\n', '\n\n\n', '=== END OF STORY ===', '\n=====\n=====\n', '＊＊＊', '——龍——'])
@pytest.mark.parametrize('piece', [1000, 45, 23])
def test_any_separator_divides_wherever_the_text_is_read_in_pieces(here, separator, piece):
    stories = [f'Story {i}: ' + ' '.join(f'word{i * j}' for j in range(i % 7 + 1)) for i in range(60)]
    Path('stories.txt').write_text(separator.join(stories) + '\n', encoding='utf-8')
    make('--dataset=custom', '--input=stories.txt', '--out=made', '--tokenizer=char',
         '--separator=' + separator.replace('\n', '\\n'), piece=piece)
    assert sorted(read_documents('made', 'train') + read_documents('made', 'val')) == sorted(stories)


def test_a_divided_document_is_stripped_as_a_small_one_is(here):
    stories = [f'Story {i} ' + 'and so on and so on ' * (i % 5) + 'end.' for i in range(60)]
    Path('stories.txt').write_text(' \n<|endoftext|>\n\n  '.join(['', *stories]), encoding='utf-8')
    for piece in (None, 16):
        make('--dataset=custom', '--input=stories.txt', '--out=made', '--tokenizer=char', '--separator=<|endoftext|>',
             piece=piece)
        assert sorted(read_documents('made', 'train') + read_documents('made', 'val')) == sorted(stories)


# -----------------------------------------------------------------------------
# large texts are encoded in pieces

SPACED = (' ', ' ', '  ', '\t', '\u3000', '')
CHARACTERS = '床前明月光疑是地上霜舉頭望低思故鄉𠮷龍'
CHINESE = ''.join(''.join(random.Random(i).choices(CHARACTERS, k=i % 9 + 1)) + '，。！？；：、'[i % 7]
                  for i in range(2500))


@pytest.mark.parametrize('kind', ['bpe', 'gpt2'])
@pytest.mark.parametrize('text', [
    random_text(1, 4000),
    random_text(2, 4000, ('\n', '\n\n', ' \n ', '\n\t')),
    random_text(3, 4000, SPACED).replace('\n', ' '),
    'word ' * 5000, 'a\n' * 5000, 'two\n\n\nlines   \n   ' * 1500, CHINESE],
    ids=['mixed', 'lines', 'no newlines', 'words', 'short lines', 'runs', 'Chinese without spaces'])
def test_cutting_a_text_does_not_change_its_tokens(here, kind, text):
    Path('text.txt').write_text(text, encoding='utf-8', newline='')
    for piece in (101, 512, 3000):
        make('--dataset=custom', '--input=text.txt', '--out=made', f'--tokenizer={kind}', '--vocab_size=400',
             piece=piece)
        codec, cut = dataset_tokenizer('made'), int(len(text) * 0.9)
        assert read_shards('made', 'train').tolist() == [codec.eot, *codec.encode(text[:cut])]
        assert read_shards('made', 'val').tolist() == [codec.eot, *codec.encode(text[cut:])]


@pytest.mark.parametrize('kind, joints', [
    ('gpt2', (' ', '\n', '\n\n  ')), ('gpt2', SPACED), ('bpe', ('\n', ' ', '\n\n'))])
def test_a_large_text_has_exactly_the_tokens_of_encoding_it_at_once(here, kind, joints):
    text = random_text(4, 60_000, joints)
    text = (text if '\n' in joints else text.replace('\n', ' ')) * 12
    assert len(text) > 2_000_000
    Path('large.txt').write_text(text, encoding='utf-8', newline='')
    make('--dataset=custom', '--input=large.txt', '--out=made', f'--tokenizer={kind}', '--vocab_size=500')
    codec, cut = dataset_tokenizer('made'), int(len(text) * 0.9)
    assert read_shards('made', 'train').tolist() == [codec.eot, *codec.encode(text[:cut])]
    assert read_shards('made', 'val').tolist() == [codec.eot, *codec.encode(text[cut:])]


def test_memory_does_not_grow_with_the_input(tmp_path):
    # VmHWM belongs to the process alone; ru_maxrss begins with what its parent had, which may be more
    program = (f'import re, resource, runpy, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n'
               f'runpy.run_path({str(SCRIPT)!r}, run_name="__main__")\nstatus = Path("/proc/self/status")\n'
               'text = status.read_text(encoding="utf-8") if status.exists() else ""\n'
               'kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
               'print("peak", int((re.search(r"VmHWM:\\s+(\\d+)", text) or [0, kb])[1]))')
    peaks = []
    line = 'It was the best of times, it was the worst of times, it was the age of wisdom.\n'
    for mb in (6, 48):
        (tmp_path / 'in.txt').write_text(line * (mb * 1_000_000 // len(line)), encoding='utf-8')
        done = subprocess.run([sys.executable, '-c', program, '--dataset=custom', '--input=in.txt', '--out=made',
                               '--tokenizer=char'], cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(re.search(r'peak (\d+)', done.stdout)[1]) / 1000)
    assert peaks[1] - peaks[0] < 100, f'{peaks} MB'


# -----------------------------------------------------------------------------
# what is for validation

@pytest.mark.parametrize('fraction', [0.1, 0.05, 0.3])
def test_whole_documents_make_up_the_fraction_for_validation(here, fraction):
    rng = random.Random(5)
    texts = [f'{i} ' + 'x' * rng.randint(1, 3000) for i in range(200)]
    Path('in.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts), encoding='utf-8')
    make('--dataset=custom', '--input=in.jsonl', '--out=made', '--tokenizer=char', f'--val_fraction={fraction}')
    train, val = read_documents('made', 'train'), read_documents('made', 'val')
    assert set(train) | set(val) == set(texts) and len(train) + len(val) == len(texts)
    total, longest = sum(map(len, texts)), max(map(len, texts))
    assert abs(sum(map(len, val)) - fraction * total) <= longest
    places = np.array([texts.index(t) for t in val])
    assert places[len(places) // 2] == pytest.approx(100, abs=40)       # from all over, not from one end


@pytest.mark.parametrize('fraction', [0.1, 0.25])
@pytest.mark.parametrize('piece', [None, 100])
def test_of_a_single_text_exactly_the_last_characters_are_for_validation(here, fraction, piece):
    text = random_text(6, 3000)
    Path('in.txt').write_text(text, encoding='utf-8', newline='')
    make('--dataset=custom', '--input=in.txt', '--out=made', '--tokenizer=char', f'--val_fraction={fraction}',
         piece=piece)
    cut = int(len(text) * (1 - fraction))
    assert read_documents('made', 'train') == [text[:cut]]
    assert read_documents('made', 'val') == [text[cut:]]


def test_shakespeare_is_divided_as_nanogpt_divides_it(here):
    real = ROOT.parent / 'shared' / 'data' / 'tinyshakespeare.txt'
    text = real.read_text(encoding='utf-8') if real.exists() else random_text(7, 5000)
    Path('input.txt').write_text(text, encoding='utf-8', newline='')
    make('--dataset=shakespeare_char', '--input=input.txt')
    chars = sorted(set(text))
    ids = [chars.index(c) for c in text]
    cut = int(0.9 * len(text))
    assert read_shards('data/shakespeare_char', 'train').tolist() == [len(chars), *ids[:cut]]
    assert read_shards('data/shakespeare_char', 'val').tolist() == [len(chars), *ids[cut:]]


# -----------------------------------------------------------------------------
# cut short, run twice, run into somebody else's files

def test_the_same_input_and_settings_give_the_same_bytes(here):
    given, _ = write_documents('jsonl')
    make('--dataset=custom', f'--input={given}', '--out=one', '--vocab_size=400', '--shard_size=3000')
    done = prepare(here, '--dataset=custom', f'--input={given}', '--out=two', '--vocab_size=400', '--shard_size=3000')
    assert done.returncode == 0, done.stderr
    assert all_bytes('one') == all_bytes('two')
    make('--dataset=custom', f'--input={given}', '--out=one', '--vocab_size=300')       # fewer, larger shards
    make('--dataset=custom', f'--input={given}', '--out=three', '--vocab_size=300')
    assert all_bytes('one') == all_bytes('three')


def test_killed_at_any_moment_it_leaves_nothing_that_looks_whole_and_the_next_run_is_as_if_undisturbed(here):
    text = [random_text(seed, 2500) for seed in range(100)]
    Path('in.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in text), encoding='utf-8')
    args = ('--dataset=custom', '--input=in.jsonl', '--vocab_size=400', '--shard_size=20000')
    start = time.monotonic()
    assert prepare(here, *args, '--out=whole').returncode == 0
    seconds = time.monotonic() - start
    rng = random.Random(8)
    for _ in range(5):
        process = subprocess.Popen(command('prepare_data.py', *args, '--out=killed'), cwd=here,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds * rng.uniform(0.4, 1))
        process.kill()
        process.wait()
        if not Path('killed', 'meta.json').exists():
            with pytest.raises(UserError):
                TokenDataset(find_dataset('killed'), 'train', 16, 400, 1)
        else:
            read_shards('killed', 'train'), read_shards('killed', 'val')
    assert prepare(here, *args, '--out=killed').returncode == 0
    assert all_bytes('killed') == all_bytes('whole')


@pytest.mark.parametrize('tokenizer', ['char', 'gpt2'])
@pytest.mark.parametrize('victim', ['unlink', 'replace', 'open'])
def test_cut_short_at_any_file_operation_it_leaves_nothing_that_looks_whole(here, monkeypatch, tokenizer, victim):
    given, _ = write_documents('jsonl')
    args = ('--dataset=custom', f'--input={given}', '--out=made', f'--tokenizer={tokenizer}', '--shard_size=4000')
    make(*args)
    whole = all_bytes('made')
    owner = builtins if victim == 'open' else Path
    real = getattr(owner, victim)
    for nth in range(100):
        calls = 0

        def dies(path, *rest, _nth=nth, **options):
            nonlocal calls
            if 'made' in str(path):
                calls += 1
                if calls > _nth:
                    raise KeyboardInterrupt
            return real(path, *rest, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, victim, dies)
            try:
                make(*args)
            except KeyboardInterrupt:
                pass
            else:
                break
        if not Path('made', 'meta.json').exists():
            with pytest.raises(UserError):
                TokenDataset(find_dataset('made'), 'train', 16, 60000, 1)
        else:
            read_shards('made', 'train'), read_shards('made', 'val')
        make(*args)
        assert all_bytes('made') == whole
    assert 0 < nth < 99


@pytest.mark.parametrize('theirs', [
    'train.bin', 'val.bin', 'fineweb_val_000000.bin', 'train_000001.bin', 'tokenizer.json', 'notes.tmp'])
def test_files_that_another_project_made_are_not_deleted(here, theirs):
    folder = Path('nanogpt')
    folder.mkdir()
    (folder / theirs).write_bytes(b'precious')
    Path('in.txt').write_text(random_text(9, 500), encoding='utf-8')
    before = all_bytes(folder)
    try:
        make('--dataset=custom', '--input=in.txt', '--out=nanogpt', '--tokenizer=char')
    except UserError as error:
        assert 'nanogpt' in str(error)
        assert all_bytes(folder) == before
    assert all_bytes(folder)[theirs] == b'precious'


@pytest.mark.parametrize('wrong', [
    ['--input=nowhere.txt'], ['--input='], ['--tokenizer=elf'], ['--val_fraction=0'], ['--val_fraction=1'],
    ['--shard_size=0'], ['--shard_size=3000000000'], ['--tokenizer=bpe', '--vocab_size=100'], ['--input=empty.txt'],
    ['--input=neither.txt'], ['--input=broken.txt.gz'], ['--input=flipped.txt.gz'], ['--input=flipped.jsonl.gz'],
    ['--input=list.jsonl'], ['--input=number.jsonl'], ['--input=cut.jsonl'], ['--input=surrogate.jsonl'],
    ['--input=surrogate.jsonl', '--tokenizer=bpe'], ['--input=no.parquet'], ['--input=other.parquet'],
    ['--input=numbers.parquet'], ['--input=picture.png']], ids=' '.join)
def test_a_mistake_costs_one_message_and_nothing_that_was_there(here, wrong):
    Path('good.txt').write_text('some text that is good enough ' * 9, encoding='utf-8')
    make('--dataset=custom', '--input=good.txt', '--out=made', '--tokenizer=char')
    before = all_bytes('made')
    Path('empty.txt').write_bytes(b'')
    Path('neither.txt').write_bytes(b'neither UTF-8 nor GB18030: \xff\xff ' * 9)
    packed = gzip.compress(random.Random(1).randbytes(4000).hex().encode())
    Path('broken.txt.gz').write_bytes(packed[:1000])
    for name in ('flipped.txt.gz', 'flipped.jsonl.gz'):
        Path(name).write_bytes(packed[:10] + b'\xff' * 40 + packed[50:])
    Path('list.jsonl').write_bytes(b'["text"]\n')
    Path('number.jsonl').write_bytes(b'{"text": 5}\n')
    Path('cut.jsonl').write_bytes(b'{"text": "one"}\n{"text": "tw')
    Path('surrogate.jsonl').write_bytes(b'{"text": "half a pair: \\ud800, and some more of it"}\n' * 30)
    Path('no.parquet').write_bytes(b'PAR1 not really')
    pyarrow.parquet.write_table(pyarrow.table({'words': ['a', 'b']}), 'other.parquet')
    pyarrow.parquet.write_table(pyarrow.table({'text': [1, 2]}), 'numbers.parquet')
    Path('picture.png').write_bytes(b'')
    with pytest.raises(UserError) as error:
        make('--dataset=custom', '--input=good.txt', '--out=made', '--tokenizer=char', *wrong)
    assert 0 < len(str(error.value).splitlines()) <= 2
    assert all_bytes('made') == before


def test_a_mistake_ends_the_script_with_status_2_and_no_traceback(tmp_path):
    done = prepare(tmp_path, '--dataset=custom', '--input=nowhere.txt')
    assert done.returncode == 2
    assert done.stderr.startswith('error: ') and 'nowhere.txt' in done.stderr and 'Traceback' not in done.stderr


# -----------------------------------------------------------------------------
# named corpora

@pytest.fixture
def hub(monkeypatch, here):
    """A Hugging Face hub of two data sets on this machine."""
    files = {'README.md': b'hello'}
    for i in range(2):
        path = here / f'{i}.parquet'
        pyarrow.parquet.write_table(pyarrow.table({'text': DOCUMENTS[i * 30:i * 30 + 30]}), path)
        files[f'plain_text/train-{i:05d}.parquet'] = path.read_bytes()
    stories = '\n<|endoftext|>\n'.join(DOCUMENTS[:40]).replace('\r', '').encode()
    with Hub({'datasets/Skylion007/openwebtext': files,
              'datasets/roneneldan/TinyStories': {'TinyStoriesV2-GPT4-train.txt': stories}}, page_size=1) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        yield hub


def test_openwebtext_comes_from_the_hub_all_files_of_all_pages_once(hub):
    for _ in range(2):
        make('--dataset=openwebtext')
        train, val = read_documents('data/openwebtext', 'train'), read_documents('data/openwebtext', 'val')
        assert sorted(train + val) == sorted(DOCUMENTS)
    assert dataset_tokenizer('data/openwebtext').kind == 'gpt2'
    assert len(hub.fetched()) == 2                                      # the second time they were there


def test_openwebtext_that_was_fetched_is_prepared_without_the_network(hub, monkeypatch):
    make('--dataset=openwebtext')
    hub.requests.clear()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    make('--dataset=openwebtext', '--out=again')
    assert hub.requests == []
    assert all_bytes('again') == all_bytes('data/openwebtext')


def test_tinystories_come_from_the_hub_and_are_divided(hub):
    make('--dataset=tinystories', '--vocab_size=300')
    folder = Path('data/tinystories')
    train, val = read_documents(folder, 'train'), read_documents(folder, 'val')
    wanted = [part.strip() for text in DOCUMENTS[:40] for part in text.split('<|endoftext|>') if part.strip()]
    assert sorted(train + val) == sorted(wanted)
    assert dataset_tokenizer(folder).kind == 'bpe'


def test_offline_with_nothing_on_disk_the_error_says_what_is_missing(here, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for name in ('tinystories', 'openwebtext', 'shakespeare_char'):
        with pytest.raises(UserError, match='HF_HUB_OFFLINE'):
            make(f'--dataset={name}')
