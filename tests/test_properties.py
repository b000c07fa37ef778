"""What holds for every input, tried on inputs that nobody thought of: hypothesis makes them, the same in every run, or
EXAMPLES=5000 python -m pytest tests/test_properties.py many new ones."""

import io
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint
from configurator import UserError, configure
from corpus import _pieces_of, _safe_cut, read_file
from dataset import ShardWriter, TokenDataset, divide_batch, open_shard, read_meta, shuffled
from files import write_atomically
from hellaswag import load_questions
from sample import _settled, begins_badly
from tokenizer import from_state, gpt2_tokenizer, load_tokenizer, normalize_question, train_bpe, train_char

settings.register_profile('here', max_examples=int(os.environ.get('EXAMPLES', 150)), deadline=None, database=None,
                          derandomize='EXAMPLES' not in os.environ, suppress_health_check=list(HealthCheck))
settings.load_profile('here')

TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=200)
PLAIN_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
                          lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@pytest.fixture(scope='module')
def tokenizers():
    prose = 'Words are made of letters, and 词由字组成 <|endoftext|> 1234\n\n' * 20
    return {'gpt2': gpt2_tokenizer(), 'bpe': train_bpe([prose], 400), 'han': train_bpe([prose], 400, single_han=True)}


# -----------------------------------------------------------------------------
# text and tokens

@given(TEXT, st.sampled_from(['gpt2', 'bpe', 'han']))
@example('<|endoftext|>', 'gpt2')
@example('\r\n\x00\u2028\ufeff', 'bpe')
def test_every_text_comes_back_from_its_tokens(tokenizers, text, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode_batch([text, text]) == [ids, ids]
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot for i in ids)
    assert len(tokenizer.decode(ids[1:] + [tokenizer.eot])) <= len(text) + 3        # any ids decode to something


@given(TEXT)
def test_a_tokenizer_of_characters_knows_its_text_and_is_itself_when_it_is_read_again(text):
    tokenizer = train_char([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.fingerprint == tokenizer.fingerprint and again.encode(text) == tokenizer.encode(text)


@given(st.text('ab12 \n.,é中文<|>', min_size=2, max_size=60), st.sampled_from(['gpt2', 'bpe', 'han']))
def test_a_text_cut_where_it_may_be_cut_has_the_same_tokens(tokenizers, text, kind):
    at = _safe_cut(text)
    assume(text[at - 1].isalpha() and not text[at].isalpha())       # elsewhere it is cut only where nothing better is
    encode = tokenizers[kind].encode
    assert encode(text[:at]) + encode(text[at:]) == encode(text)


@given(TEXT, st.integers(2, 50))
def test_the_pieces_of_a_document_are_all_of_it(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('corpus.PIECE', size)
        pieces = list(_pieces_of(text))
    assert ''.join(segments[0][0] for _, segments in pieces) == text
    assert [starts for starts, _ in pieces] == [i == 0 for i in range(len(pieces))]


@given(TEXT, st.text('ab用户', min_size=1, max_size=4), st.data())
def test_text_that_is_shown_is_never_taken_back(text, stop, data):
    text = data.draw(st.sampled_from([text, text + stop[:-1], stop[:1] * 3 + text]))
    assume(stop not in text)
    shown = [_settled(text[:n], stop) for n in range(len(text) + 1) if stop not in text[:n]]
    assert all(b.startswith(a.rstrip('\ufffd')) for a, b in zip(shown, shown[1:], strict=False))


@given(TEXT)
def test_a_question_that_was_normalized_stays_as_it_is(text):
    once = normalize_question(text)
    assert normalize_question(once) == once
    assert isinstance(begins_badly(once), bool)


# -----------------------------------------------------------------------------
# shards and windows

@given(st.lists(st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 1)), max_size=30), min_size=1, max_size=8),
       st.integers(1, 40), st.booleans())
def test_shards_hold_what_was_written_however_it_was_cut(chunks, shard_size, with_mask):
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(folder, 'train', 65536, shard_size, with_mask)
        for chunk in chunks:
            writer.write([i for i, _ in chunk], [m for _, m in chunk])
        shards = writer.finish()
        whole = [pair for chunk in chunks for pair in chunk]
        assert [shard['tokens'] for shard in shards] == [
            min(shard_size, len(whole) - first) for first in range(0, len(whole), shard_size)]
        read = [int(i) for shard in shards for i in open_shard(Path(folder, shard['file'] + '.tmp'))]
        assert read == [i for i, _ in whole]
        masks = [b for shard in shards for b in Path(folder, shard['file'].replace('.bin', '.mask.bin') + '.tmp')
                 .read_bytes()] if with_mask else []
        assert masks == ([m for _, m in whole] if with_mask else [])


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_an_order_is_a_permutation_entry_by_entry(n, key):
    order = shuffled(np.arange(n), n, key)
    assert sorted(order.tolist()) == list(range(n))
    some = np.arange(0, n, max(1, n // 5))
    assert [int(shuffled(some[i:i + 1], n, key)[0]) for i in range(len(some))] == order[some].tolist()


@given(st.integers(30, 400), st.integers(1, 12), st.integers(1, 3), st.sampled_from([(1, 1), (2, 2), (1, 4), (4, 1)]),
       st.integers(0, 30), st.integers(0, 99))
def test_any_number_of_processes_has_the_windows_of_one(n, block_size, batch_size, layout, step, seed):
    processes, micro_steps = layout
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(n).integers(0, 1000, n).astype('<u2')
        ids.tofile(Path(folder, 'train.bin'))

        def windows(world_size, accumulation):
            data = [TokenDataset(folder, 'train', block_size, 1000, batch_size, seed, accumulation, rank, world_size)
                    for rank in range(world_size)]
            pairs = [d.batch(step, m) for m in range(accumulation) for d in data]
            return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        (x, y), (x1, y1) = windows(processes, micro_steps), windows(1, processes * micro_steps)
        assert torch.equal(x, x1) and torch.equal(y, y1)
        assert torch.equal(x[:, 1:], y[:, :-1])
        text = ids.tobytes()
        assert all(row.numpy().astype('<u2').tobytes() in text for row in torch.cat([x, y[:, -1:]], dim=1))


@given(*[st.integers(1, 4096)] * 4)
def test_a_step_has_the_tokens_that_were_asked_for_or_none(total, batch_size, block_size, world_size):
    try:
        tokens, micro_steps = divide_batch(total, batch_size, block_size, world_size)
    except UserError:
        assert total % (batch_size * block_size * world_size)
    else:
        assert tokens == total == micro_steps * batch_size * block_size * world_size


# -----------------------------------------------------------------------------
# what comes from outside is taken, or refused in words

SETTINGS = "count = 3  # a whole number\nrate = 0.5  # a number\nname = 'x'  # words\nflag = False  # yes or no\n"
ARGUMENT = st.builds('--{}={}'.format, st.sampled_from(['count', 'rate', 'name', 'flag', 'cuont']), TEXT)


@pytest.fixture(scope='module')
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp('script') / 'script.py'
    path.write_text(SETTINGS + 'config = configure(globals())\n', encoding='utf-8')
    return {'count': 3, 'rate': 0.5, 'name': 'x', 'flag': False, '__file__': str(path)}


@given(st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT, st.booleans())
def test_a_setting_is_what_was_written(script, count, rate, name, flag):
    argv = [f'--count={count}', f'--rate={rate!r}', f'--name={name}', f'--flag={flag}']
    assert configure(dict(script), argv) == {'count': count, 'rate': rate, 'name': name, 'flag': flag}
    apart = [word for arg in argv for word in arg.split('=', 1)]
    assume(not name.startswith('--') and name)
    assert configure(dict(script), apart) == {'count': count, 'rate': rate, 'name': name, 'flag': flag}


@given(st.lists(TEXT | ARGUMENT | st.sampled_from(['--count', '--rate', '--name', '--flag', '=']), max_size=4))
def test_any_command_line_is_taken_or_refused_in_words(script, argv):
    assume('--help' not in argv and '-h' not in argv)
    try:
        values = configure(dict(script), argv)
    except UserError as e:
        assert str(e)
    else:
        assert type(values['count']) is int and math.isfinite(values['rate'])
        assert type(values['name']) is str and type(values['flag']) is bool


@given(st.binary(max_size=200) | st.lists(PLAIN_JSON, max_size=3).map(
    lambda rows: '\n'.join(json.dumps(row) for row in rows).encode()), st.sampled_from(['.txt', '.jsonl', '.txt.gz']),
    st.sampled_from(['', 'Q: {prompt}\nA: ']))
def test_any_bytes_are_text_or_refused_by_name(content, end, template):
    path = Path(f'some{end}')
    try:
        pieces = list(read_file(path, io.BytesIO(content), template=template))
    except UserError as e:
        assert path.name in str(e)
    else:
        for _, segments in pieces:
            for text, _ in segments:
                text.encode('utf-8')


@given(st.binary(max_size=100) | PLAIN_JSON.map(lambda value: json.dumps(value).encode()))
def test_any_meta_json_and_tokenizer_json_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        for name, read in (('meta.json', read_meta), ('tokenizer.json', load_tokenizer)):
            Path(folder, name).write_bytes(content)
            try:
                read(folder)
            except UserError as e:
                assert name in str(e) or 'tokenizer' in str(e)


@given(st.dictionaries(st.sampled_from(['ctx', 'endings', 'label']), PLAIN_JSON, max_size=3))
@example({'ctx': 'a b', 'endings': ['c', 'd', 'e', 'f'], 'label': 4})
@example({'ctx': 'a b', 'endings': ['c', 'd', 'e', 'f'], 'label': True})
def test_any_question_is_one_or_refused_with_its_line(tokenizers, row):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'questions.jsonl')
        path.write_text(json.dumps(row) + '\n', encoding='utf-8')
        with pytest.raises(UserError, match='questions.jsonl'):
            load_questions(tokenizers['gpt2'], str(path))
            assert row['label'] in (0, 1, 2, 3, '0', '1', '2', '3') and type(row['label']) in (int, str)
            raise UserError('questions.jsonl is good')


@given(st.integers(0, 2000), st.none() | st.integers(0, 255))
@example(351, 5)                # an error without a message
def test_a_file_with_any_byte_changed_or_cut_off_is_no_other_checkpoint(at, byte):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'c.pt')
        good = {'model': {'w': torch.arange(12.).view(3, 4)}, 'model_args': {'mlp': 'gelu'}, 'iter_num': 7}
        write_atomically(path, lambda f: torch.save(good, f))
        content = bytearray(path.read_bytes())
        assume(at < len(content))
        content[at:] = b'' if byte is None else bytes([byte]) + content[at + 1:]
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except UserError as e:
            assert 'c.pt' in str(e)
        else:
            assert torch.equal(loaded['model']['w'], good['model']['w']) and loaded['iter_num'] == 7
