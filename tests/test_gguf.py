"""GGUF files: what they say, and that transformers and llama.cpp have the same model, tokens and texts from them."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import export
from checkpoint import save_checkpoint
from configurator import UserError
from model import GPT, GPTConfig
from sample import generate_texts
from scripts import patched, run
from test_huggingface import TEXT
from test_reliability import LIMIT, needs_posix
from tokenizer import from_state, gpt2_tokenizer, train_bpe, train_char

gguf = pytest.importorskip('gguf')

LLAMA = dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False)
SHAPES = {
    'gpt2': dict(block_size=1024),                  # transformers reads no other context of a GPT-2 from such a file
    'llama': dict(LLAMA, n_kv_head=2, tie_weights=False),
    'chinese': dict(LLAMA, rope_theta=5e5),
    'qwen2': dict(LLAMA, n_kv_head=2, qkv_bias=True, norm_eps=1e-6),
    'biases': dict(LLAMA, bias=True),               # which transformers does not read, llama.cpp does
}
TEMPLATE = '用户:{prompt}\n助手:'
CHINESE = [TEMPLATE.format(prompt=question) + answer for question, answer in [
    ('什么是梯度裁剪？', '把梯度的长度限制在一个数以内，免得一步走得太远。'),
    ('softmax 有什么用？', '把分数变成概率，加起来是 1。'),
    ('学习率太大会怎样？', '损失会上下跳，甚至变成 NaN。'),
    ('GPT 怎样写字？', '一个词元接一个词元，每次看前面的全部。')]]
ENGLISH = [TEXT, 'Citizens: we are accounted poor citizens,\n\nthe patricians good. What authority surfeits on would ',
           'relieve us: if they would yield us but 12 or 345 of the superfluity, while it were wholesome, we might ']


@pytest.fixture(scope='module')
def bpes():
    return {'english': train_bpe(ENGLISH * 3, 400), 'chinese': train_bpe(CHINESE * 3, 600, single_han=True)}


def export_to(path, model, tokenizer, kind='f32', **more):
    """The model as a GGUF file; returns its path as a string."""
    export.gguf_type = kind
    export.export_gguf('out/mine/checkpoint.pt', {'model': model.state_dict(), 'model_args': model.model_args(),
                                                  'tokenizer': tokenizer.state(), **more}, path)
    return str(path)


def random_model(shape, tokenizer):
    """A model whose every tensor is random, with a vocabulary that is padded."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=128, n_layer=2, n_head=4, n_embd=64), **shape},
                          vocab_size=64 * (tokenizer.vocab_size // 64 + 1))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope='module')
def learned(bpes):
    """learned(shape): (model, tokenizer, the texts that the model has learned by heart, so that nothing is a tie)."""
    made = {}

    def learn(shape):
        if shape not in made:
            tokenizer, texts = (bpes['chinese'], CHINESE) if shape == 'chinese' else (bpes['english'], ENGLISH)
            model = random_model(SHAPES[shape], tokenizer)
            rows = [(tokenizer.start + tokenizer.encode(text * 4))[:97] for text in texts]
            idx = torch.tensor([(row + row)[at:at + 64] for row in rows for at in (0, 16, 32)])     # (B, T)
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(100):
                model(idx[:, :-1], idx[:, 1:])[1].backward()
                optimizer.step()
                optimizer.zero_grad()
            made[shape] = model, tokenizer, texts
        return made[shape]
    return learn


# -----------------------------------------------------------------------------
# read by others

class LlamaCpp:
    """A GGUF file in llama.cpp, by `llama_cpp` (llama-cpp-python) or `ik_llama_cpp`, a relative of it for CPUs."""

    def __init__(self, name, path, n_ctx=128):
        self.module, self.name = pytest.importorskip(name), name
        if name == 'llama_cpp':
            default = self.module.llama_cpp.llama_model_default_params

            def params():
                made = default()
                made.use_extra_bufts = False        # AMX, which some virtual machines announce and do not have
                return made
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.module.llama_cpp, 'llama_model_default_params', params)
                self.model = self.module.Llama(path, n_ctx=n_ctx, n_threads=1, n_threads_batch=1, verbose=False,
                                               logits_all=True, type_k=0, type_v=0)         # keys, values: float32
        else:
            self.model = self.module.IkLlama(path, n_ctx=n_ctx, n_threads=1, flash_attn=False)

    def tokenize(self, text, start=False):
        return self.model.tokenize(text.encode() if self.name == 'llama_cpp' else text, add_bos=start)

    def logits(self, ids):
        """(T, V) float32 for T token ids."""
        if self.name == 'llama_cpp':
            self.model.reset()
            self.model.eval(ids)
            return np.array(self.model.scores[:len(ids)])
        batch, context = self.module._internals.make_batch_range(ids), self.model._context
        for i in range(len(ids)):
            batch.logits[i] = 1
        context.kv_cache_clear()
        assert context.decode(batch) == 0
        n_vocab = self.model._model.n_vocab
        return np.stack([np.ctypeslib.as_array(context.get_logits(i), (n_vocab,)) for i in range(len(ids))])

    def greedy(self, ids, n, end):
        """Up to n more token ids; `end` ends them."""
        if self.name == 'ik_llama_cpp':
            return self.model.generate(ids, max_tokens=n)
        more = []
        self.model.reset()
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token == end or len(more) == n:
                return more
            more.append(token)


ENGINES = ['llama_cpp', 'ik_llama_cpp']
needs_its_gpt2 = 'ik_llama_cpp takes the second norm of a GPT-2 for an RMS norm, without its biases'


@pytest.mark.parametrize('shape', ['gpt2', 'llama', 'chinese', 'qwen2'])
@torch.no_grad()
def test_transformers_reads_the_same_logits(shape, bpes, tmp_path):
    tokenizer = bpes['chinese' if shape == 'chinese' else 'english']
    model = random_model(SHAPES[shape], tokenizer)
    export_to(tmp_path / 'f32.gguf', model, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='f32.gguf').eval()
    idx = torch.randint(tokenizer.vocab_size, (2, 100))
    expected = model(idx)[0][..., :tokenizer.vocab_size]        # (B, T, V)
    assert expected.std() > 0.5                         # something to compare
    assert (theirs(idx).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('shape', SHAPES)
def test_llama_cpp_writes_the_same_greedy_tokens(shape, engine, learned, tmp_path):
    if (shape, engine) == ('gpt2', 'ik_llama_cpp'):
        pytest.skip(needs_its_gpt2)
    model, tokenizer, texts = learned(shape)
    theirs = LlamaCpp(engine, export_to(tmp_path / 'f32.gguf', model, tokenizer))
    prompts = [texts[0][:6], texts[1][:20], texts[2], texts[1][10:18] + texts[0][:4], 'x ']
    for prompt in prompts:
        ids = tokenizer.start + tokenizer.encode(prompt)
        assert theirs.tokenize(prompt, start=True) == ids
        tokens = model.generate(torch.tensor([ids]), 64, temperature=0, eot=tokenizer.eot,
                                n_vocab=tokenizer.vocab_size)[0, len(ids):].tolist()
        tokens = tokens[:tokens.index(tokenizer.eot)] if tokenizer.eot in tokens else tokens
        assert theirs.greedy(ids, 64, tokenizer.eot) == tokens, prompt


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind, within', [('f32', 1e-3), ('f16', 2e-3), ('q8_0', 5e-3)])
@pytest.mark.parametrize('shape', ['gpt2', 'llama', 'chinese'])
def test_the_loss_in_llama_cpp_is_within_half_a_percent(shape, kind, within, engine, learned, tmp_path):
    if (shape, engine) == ('gpt2', 'ik_llama_cpp'):
        pytest.skip(needs_its_gpt2)
    model, tokenizer, texts = learned(shape)
    theirs = LlamaCpp(engine, export_to(tmp_path / 'f.gguf', model, tokenizer, kind))
    ids = (tokenizer.start + tokenizer.encode(texts[2][::-1] + texts[0] + texts[1]))[:101]      # half of it is new
    ours = model(torch.tensor([ids[:-1]]))[0][0, :, :tokenizer.vocab_size]
    exact, loss = (F.cross_entropy(logits, torch.tensor(ids[1:])).item()
                   for logits in (ours, torch.from_numpy(theirs.logits(ids[:-1]))))
    assert exact > 1 and abs(loss / exact - 1) < within


def test_a_chat_in_llama_cpp_answers_as_sample_py(learned, tmp_path):
    model, tokenizer, texts = learned('chinese')
    theirs = LlamaCpp('llama_cpp', export_to(tmp_path / 'f32.gguf', model, tokenizer, template=TEMPLATE)).model
    for question in ['什么是梯度裁剪？', 'GPT 怎样写字？']:
        told = theirs.create_chat_completion([{'role': 'user', 'content': question}], temperature=0.0, max_tokens=20,
                                             repeat_penalty=1.0)['choices'][0]['message']['content']
        assert [told] == generate_texts([question], model, tokenizer, template=TEMPLATE, temperature=0,
                                        max_new_tokens=20)
        assert told[:4] in ''.join(texts)


WILD = ['', ' two  spaces\n\n\tand tabs ', "don't we'll 1234 x=1", '龍飛鳳舞 naïve — 𠮷👩‍👧',
        '\u3000\xa0\x85\u2028 \x00', 'HELLO of softmax 2024: f(0)<|endoftext|>', '  什么\r\n\r\n是',
        '你好。\n\n　　梯度 12,345.67', '①²½ Привет 한국어 テスト',
        *(''.join(map(chr, range(i, i + 24))) for i in range(32, 0x3100, 24))]


def with_words(bpe, *cuts):
    """The tokenizer with another way to cut words."""
    changed = Tokenizer.from_str(bpe.text)
    changed.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    return from_state({'kind': 'bpe', 'tokenizer.json': changed.to_str()})


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind, name', [('english', 'gpt-2'), ('chinese', 'gpt-2'), ('gpt2', 'gpt-2'),
                                        ('qwen2', 'qwen2'), ('llama3', 'llama-bpe'), ('smollm', 'smollm')])
def test_llama_cpp_has_the_same_tokens_of_any_text(kind, name, engine, bpes, tmp_path, capsys):
    english, whole = bpes['english'], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    regex = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|"
             r'\s*[\r\n]+|\s+(?!\S)|\s+').replace('DIGITS', '{1,3}' if kind == 'llama3' else '')
    cuts = [pre_tokenizers.Split(Regex(regex), 'isolated'), whole]
    if kind == 'smollm':
        cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = bpes.get(kind) or (gpt2_tokenizer() if kind == 'gpt2' else with_words(english, *cuts))
    path = export_to(tmp_path / 'f16.gguf', random_model(SHAPES['llama'], tokenizer), tokenizer, 'f16')
    said = capsys.readouterr().out
    assert ('note' in said) == (kind == 'chinese')
    assert gguf.GGUFReader(path).fields['tokenizer.ggml.pre'].contents() == name
    theirs = LlamaCpp(engine, path)
    for text in WILD:
        assert theirs.tokenize(text) == tokenizer.encode(text), text


# -----------------------------------------------------------------------------
# the file itself

def contents(path):
    """({key: value}, {tensor name: (type, shape)}) of a GGUF file; shapes as torch has them."""
    reader = gguf.GGUFReader(path)
    return ({key: field.contents() for key, field in reader.fields.items()},
            {t.name: (t.tensor_type.name, tuple(map(int, reversed(t.shape)))) for t in reader.tensors})


def test_the_file_says_what_the_model_is(bpes, tmp_path):
    tokenizer, shape = bpes['english'], dict(SHAPES['llama'], n_inner=80, rope_theta=5e5, norm_eps=1e-6)
    said, tensors = contents(export_to(tmp_path / 'x.gguf', random_model(shape, tokenizer), tokenizer, 'q8_0'))
    n = tokenizer.vocab_size
    for key, value in {'general.architecture': 'llama', 'general.name': 'mine', 'general.file_type': 7,
                       'llama.context_length': 128, 'llama.embedding_length': 64, 'llama.block_count': 2,
                       'llama.attention.head_count': 4, 'llama.attention.head_count_kv': 2, 'llama.vocab_size': n,
                       'llama.feed_forward_length': 80, 'llama.rope.dimension_count': 16, 'llama.rope.freq_base': 5e5,
                       'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.bos_token_id': tokenizer.eot,
                       'tokenizer.ggml.eos_token_id': tokenizer.eot, 'tokenizer.ggml.add_bos_token': True}.items():
        assert said[key] == value, key
    assert said['llama.attention.layer_norm_rms_epsilon'] == pytest.approx(1e-6)
    assert len(said['tokenizer.ggml.tokens']) == len(said['tokenizer.ggml.token_type']) == n
    assert said['tokenizer.ggml.token_type'].count(3) == 1          # <|endoftext|>, the only one that controls
    assert said['tokenizer.chat_template'].startswith('{{ bos_token }}{% for ')
    assert tensors['token_embd.weight'] == tensors['output.weight'] == ('Q8_0', (n, 64))        # without padding
    assert tensors['blk.1.attn_norm.weight'] == ('F32', (64,)) and tensors['blk.1.attn_k.weight'] == ('Q8_0', (32, 64))
    assert tensors['blk.1.ffn_down.weight'] == ('F16', (64, 80))    # 80 is no multiple of 32


def test_a_gpt2_is_tied_and_keeps_positions_and_biases_in_float32(bpes, tmp_path):
    said, tensors = contents(export_to(tmp_path / 'x.gguf', random_model({}, bpes['english']), bpes['english'], 'f16'))
    assert said['general.architecture'] == 'gpt2' and said['general.file_type'] == 1
    assert said['gpt2.attention.layer_norm_epsilon'] == pytest.approx(1e-5)
    assert 'output.weight' not in tensors and tensors['position_embd.weight'] == ('F32', (128, 64))
    assert tensors['blk.0.attn_qkv.weight'] == ('F16', (192, 64)) and tensors['blk.0.attn_qkv.bias'] == ('F32', (192,))


def test_chinese_characters_are_tokens_that_are_found_before_words_are_cut(bpes, tmp_path):
    said, _ = contents(export_to(tmp_path / 'x.gguf', random_model(SHAPES['chinese'], bpes['chinese']), bpes['chinese'],
                                 template=TEMPLATE))
    tokens = dict(zip(said['tokenizer.ggml.tokens'], said['tokenizer.ggml.token_type'], strict=True))
    assert tokens['梯'] == tokens['学'] == 4 and tokens['Ġ'] == 1 and tokens['ï¼Į'] == 1         # ，
    assert json.dumps('用户:', ensure_ascii=False) in said['tokenizer.chat_template']


def test_a_way_to_cut_words_that_llama_cpp_has_not_is_noted(bpes, tmp_path, capsys):
    odd = with_words(bpes['english'], pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    export_to(tmp_path / 'x.gguf', random_model({}, odd), odd)
    assert 'note: llama.cpp has no name' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# what cannot be

@pytest.mark.parametrize('shape, named', [
    (dict(mlp='gelu_erf'), "mlp='gelu_erf'(.|\n)*architecture of llama.cpp(.|\n)*mlp=gelu "),
    (dict(mlp='relu2'), 'mlp'), (dict(mlp='silu'), 'mlp'),
    (dict(SHAPES['llama'], mlp='silu'), 'mlp=swiglu'), (dict(qk_norm=True), 'qk_norm'),
    (dict(SHAPES['llama'], qk_norm=True), 'qk_norm'), (dict(SHAPES['llama'], position='learned'), 'position=rope'),
    (dict(bias=False), 'bias'), (dict(n_kv_head=2), 'n_kv_head')], ids=str)
def test_what_llama_cpp_has_not_is_refused_by_name(shape, named, bpes, tmp_path):
    with pytest.raises(UserError, match=named):
        export_to(tmp_path / 'x.gguf', random_model(shape, bpes['english']), bpes['english'])
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizers_are_refused(bpes, tmp_path):
    spec = {**json.loads(bpes['english'].text),
            'decoder': {'type': 'Metaspace', 'replacement': '▁', 'split': True, 'prepend_scheme': 'always'}}
    words = from_state({'kind': 'bpe', 'tokenizer.json': json.dumps(spec)})
    for tokenizer in (train_char(ENGLISH), train_char(ENGLISH, with_eot=False), words):
        with pytest.raises(UserError, match=f"kind '{tokenizer.kind}'(.|\n)*--tokenizer=bpe or gpt2"):
            export_to(tmp_path / 'x.gguf', random_model({}, tokenizer), tokenizer)
    with pytest.raises(UserError, match='do not belong together'):
        export_to(tmp_path / 'x.gguf', random_model({}, train_char('ab')), bpes['english'])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run_folder(bpes, tmp_path):
    """A checkpoint as train.py leaves it, in out/mine."""
    model, bpe = random_model(SHAPES['chinese'], bpes['chinese']), bpes['chinese']
    (tmp_path / 'out/mine').mkdir(parents=True)
    save_checkpoint(tmp_path / 'out/mine', {'model': model.state_dict(), 'model_args': model.model_args(),
                                            'iter_num': 3, 'best_val_loss': 1.0, 'tokenizer': bpe.state(),
                                            'tokenizer_fingerprint': bpe.fingerprint, 'template': TEMPLATE,
                                            'config': {}}, ['checkpoint.pt'])
    return tmp_path


def test_the_script_writes_the_file_beside_the_checkpoint(run_folder):
    done = run(run_folder, 'export.py', '--init_from=out/mine', '--format=gguf')
    assert done.returncode == 0, done.stderr
    assert 'out/mine/q8_0.gguf: ' in done.stdout and 'note: several blanks' in done.stdout
    said, _ = contents(run_folder / 'out/mine/q8_0.gguf')
    assert said['general.name'] == 'mine' and '助手:' in said['tokenizer.chat_template']
    done = run(run_folder, 'export.py', '--init_from=out/mine', '--format=gguf', '--gguf_type=f16', '--out=x.gguf')
    assert done.returncode == 0 and 'F16' in {kind for kind, _ in contents(run_folder / 'x.gguf')[1].values()}


def test_without_the_package_the_error_says_how_to_get_it(run_folder):
    without = patched(run_folder, 'sys.modules["gguf"] = None')
    done = run(run_folder, without, 'export.py', '--init_from=out/mine', '--format=gguf')
    assert done.returncode == 2 and 'pip install gguf' in done.stderr and len(done.stderr.splitlines()) == 1


@needs_posix
def test_a_disk_that_is_full_leaves_what_was_there(run_folder):
    (run_folder / 'out/mine/q8_0.gguf').write_bytes(b'old')
    full = patched(run_folder, LIMIT.format('RLIMIT_FSIZE', 20_000))
    done = run(run_folder, full, 'export.py', '--init_from=out/mine', '--format=gguf')
    assert done.returncode == 2 and 'cannot write out/mine/q8_0.gguf: ' in done.stderr and 'None' not in done.stderr
    assert sorted(p.name for p in (run_folder / 'out/mine').iterdir()) == ['checkpoint.pt', 'q8_0.gguf']
    assert (run_folder / 'out/mine/q8_0.gguf').read_bytes() == b'old'
