"""Published weights in and out, held against transformers: the same logits, the same tensors, the same text."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast,
                          Qwen2Config)

from checkpoint import load_for_use, pick_checkpoint, save_checkpoint
from configurator import UserError
from hub import Hub
from huggingface import (Unsupported, is_published, load_published, read_config, same_model, save_folder,
                         tokenizer_files)
from model import GPT, GPTConfig
from sample import generate_texts
from scripts import ROOT, run
from tokenizer import conversation, gpt2_tokenizer, train_bpe, train_char

TEXT = 'The first thing to note is that the class is created before the name is bound to it. 龍飛鳳舞 naïve — x=1\n'
LLAMA = dict(vocab_size=300, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
CONFIGS = {
    'gpt2': GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=3, n_head=4),
    'gpt2-untied-narrow': GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=40,
                                     tie_word_embeddings=False, activation_function='gelu'),
    'llama-untied': LlamaConfig(**LLAMA, tie_word_embeddings=False),
    'llama-tied': LlamaConfig(**LLAMA, tie_word_embeddings=True, rope_theta=500000.0),
    'llama-biases': LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    'qwen2': Qwen2Config(**LLAMA, rope_theta=1000000.0),
    'qwen2-tied': Qwen2Config(**LLAMA, tie_word_embeddings=True),
}


def random_model(name, seed=0):
    """A transformers model whose every tensor is random: fresh ones have biases of 0 and norms of 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.1))
    return model


@pytest.fixture(scope='module')
def bpe():
    return train_bpe([TEXT * 3], 300)


@pytest.fixture(params=CONFIGS, scope='module')
def published(request, bpe, tmp_path_factory):
    """(their model, its folder as save_pretrained writes it, with a tokenizer beside it)."""
    model, folder = random_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(bpe.text, encoding='utf-8')
    return model, folder


# -----------------------------------------------------------------------------
# in

@torch.no_grad()
def test_logits_equal_transformers(published):
    theirs, folder = published
    ours = GPT.from_pretrained(str(folder))
    idx = torch.randint(300, (2, 64))
    expected = theirs(idx).logits
    assert expected.std() > 0.5                         # something to compare
    assert (ours(idx)[0] - expected).abs().max() < 1e-4


@torch.no_grad()
def test_greedy_ids_equal_transformers(published):
    theirs, folder = published
    ours = GPT.from_pretrained(str(folder))
    idx = torch.randint(300, (1, 5))
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(idx, 40, temperature=0).tolist() == expected.tolist()


@torch.no_grad()
def test_a_model_in_several_files_is_read_through_its_index(tmp_path):
    theirs = random_model('llama-untied')
    theirs.save_pretrained(tmp_path, max_shard_size='30KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    idx = torch.randint(300, (2, 20))
    assert (GPT.from_pretrained(str(tmp_path))(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_weights_in_bfloat16_are_read_as_they_are(tmp_path):
    random_model('llama-tied').to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    idx = torch.randint(300, (2, 20))
    assert (GPT.from_pretrained(str(tmp_path))(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_openais_own_layout_without_prefix_and_with_masks_is_read(tmp_path):
    theirs = random_model('gpt2')
    theirs.save_pretrained(tmp_path)
    tensors = {k.removeprefix('transformer.'): v for k, v in load_file(tmp_path / 'model.safetensors').items()}
    tensors |= {f'h.{i}.attn.bias': torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(tensors, tmp_path / 'model.safetensors')
    idx = torch.randint(300, (2, 20))
    assert (GPT.from_pretrained(str(tmp_path))(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


@torch.no_grad()
def test_a_long_context_turns_as_far_as_theirs(tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(**{**LLAMA, 'max_position_embeddings': 2048, 'num_hidden_layers': 1}, rope_theta=100000.0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    idx = torch.randint(300, (1, 2048))
    assert (GPT.from_pretrained(str(tmp_path))(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def edited(folder, target, **changes):
    """A copy of a published folder with other values in its config.json."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    (target / 'config.json').write_text(json.dumps(config | changes), encoding='utf-8')
    return target


@pytest.mark.parametrize('start, changes, named', [
    ('llama-untied', {'rope_parameters': None, 'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'llama3'),
    ('llama-untied', {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, 'yarn'),
    ('llama-untied', {'rope_parameters': None, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, 'linear'),
    ('llama-untied', {'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}}, 'partial_rotary'),
    ('llama-untied', {'hidden_act': 'gelu'}, 'hidden_act'),
    ('llama-untied', {'head_dim': 16}, 'head_dim'),
    ('llama-untied', {'sliding_window': 32}, 'sliding_window'),
    ('llama-untied', {'attention_bias': True}, 'attention_bias'),
    ('llama-untied', {'mlp_bias': True}, 'mlp_bias'),
    ('llama-untied', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('llama-untied', {'auto_map': {'AutoModel': 'x.Y'}}, 'auto_map'),
    ('llama-untied', {'model_type': 'mixtral'}, 'mixtral'),
    ('llama-untied', {'tie_word_embeddings': True}, 'tie_word_embeddings'),
    ('qwen2', {'use_sliding_window': True, 'sliding_window': 32}, 'sliding_window'),
    ('qwen2', {'layer_types': ['full_attention', 'sliding_attention', 'full_attention']}, 'layer_types'),
    ('gpt2', {'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
    ('gpt2', {'scale_attn_weights': False}, 'scale_attn_weights'),
    ('gpt2', {'add_cross_attention': True}, 'add_cross_attention'),
    ('gpt2', {'activation_function': 'relu'}, 'activation_function'),
], ids=str)
def test_what_this_model_has_not_is_refused_by_name(tmp_path, start, changes, named):
    random_model(start).save_pretrained(tmp_path / 'good')
    GPT.from_pretrained(str(tmp_path / 'good'))
    with pytest.raises(Unsupported, match=named):
        GPT.from_pretrained(str(edited(tmp_path / 'good', tmp_path / 'other', **changes)))


def test_every_tensor_is_accounted_for(tmp_path):
    random_model('llama-untied').save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = load_file(path)
    save_file(tensors | {'model.layers.0.self_attn.q_norm.weight': torch.ones(8)}, path)
    with pytest.raises(Unsupported, match='q_norm'):
        GPT.from_pretrained(str(tmp_path))
    lost = dict(tensors)
    del lost['model.layers.2.mlp.up_proj.weight']
    save_file(lost, path)
    with pytest.raises(UserError, match='layers.2.mlp.up_proj'):
        GPT.from_pretrained(str(tmp_path))


def test_damaged_missing_and_pickled_weights_are_not_loaded(tmp_path):
    random_model('gpt2').save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match='damaged'):
        GPT.from_pretrained(str(tmp_path))
    path.unlink()
    torch.save({}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='could run code'):
        GPT.from_pretrained(str(tmp_path))
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}', encoding='utf-8')
    with pytest.raises(UserError, match='outside'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text('{', encoding='utf-8')
    with pytest.raises(UserError, match='config.json'):
        GPT.from_pretrained(str(tmp_path))


def test_a_published_configs_cost_and_shape_are_known():
    # as openai-community/gpt2 and HuggingFaceTB/SmolLM2-135M have it, the parts that matter
    gpt2 = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'n_positions': 1024, 'n_ctx': 1024, 'n_embd': 768,
            'n_head': 12, 'n_layer': 12, 'layer_norm_epsilon': 1e-05, 'vocab_size': 50257}
    smol = {'model_type': 'llama', 'attention_bias': False, 'hidden_act': 'silu', 'hidden_size': 576,
            'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192,
            'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3, 'rms_norm_eps': 1e-05,
            'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
            'vocab_size': 49152}
    for config, parameters in ((gpt2, 124_439_808), (smol, 134_515_008)):
        with torch.device('meta'):
            assert GPT(GPTConfig(**{'bias': True, **read_config(config)})).num_params() == parameters


def test_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('out', 'run').mkdir(parents=True)
    assert all(map(is_published, ('gpt2', 'gpt2-xl', 'HuggingFaceTB/SmolLM2-135M')))
    assert not any(map(is_published, ('out/run', 'out/typo', 'data/x', 'run.pt', 'gpt3', 'a/b/c')))
    assert same_model('gpt2', 'openai-community/gpt2') and same_model('out/run/', './out/run')
    assert not same_model('gpt2', 'gpt2-xl')
    with pytest.raises(UserError, match='gpt2-medium'):
        pick_checkpoint('gpt3', 'out')
    with pytest.raises(UserError, match='did you mean out/run?'):       # and nobody is asked for it
        pick_checkpoint('outt/run', 'out')


# -----------------------------------------------------------------------------
# out

SHAPES = {
    'gpt2': dict(vocab_size=320),
    'gpt2-erf-untied': dict(mlp='gelu_erf', tie_weights=False, n_inner=48),
    'llama': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, n_kv_head=2),
    'llama-biases-untied': dict(norm='rmsnorm', position='rope', mlp='swiglu', tie_weights=False, rope_theta=5e5),
    'qwen2': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, qkv_bias=True, norm_eps=1e-6),
}


def our_model(**shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=300, n_layer=2, n_head=4, n_embd=32), **shape})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_out_to_transformers_and_back_is_the_same_to_the_last_bit(shape, bpe, tmp_path):
    ours = our_model(**SHAPES[shape])
    save_folder(tmp_path / 'a', asdict(ours.config), ours.state_dict(), bpe, bpe.start)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'a').eval()
    assert type(theirs).__name__ == {'g': 'GPT2LMHeadModel', 'l': 'LlamaForCausalLM', 'q': 'Qwen2ForCausalLM'}[shape[0]]
    idx = torch.randint(300, (2, 32))
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / 'b')
    again = GPT.from_pretrained(str(tmp_path / 'b'))
    assert asdict(again.config) == asdict(ours.config)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize('shape', ['gpt2', 'llama'])
@pytest.mark.parametrize('kind', ['bpe', 'char', 'gpt2'])
@torch.no_grad()
def test_greedy_text_is_the_same_in_both(shape, kind, bpe, tmp_path):
    tokenizer = {'bpe': bpe, 'char': train_char([TEXT]), 'gpt2': gpt2_tokenizer()}[kind]
    ours = our_model(**{**SHAPES[shape], 'vocab_size': 64 * (tokenizer.vocab_size // 64 + 1)})      # with padding
    ours.transformer.wte.weight[tokenizer.vocab_size:] *= 5                                         # that tempts
    checkpoint = {'model': ours.state_dict(), 'model_args': ours.model_args(), 'iter_num': 1,
                  'tokenizer': tokenizer.state(), 'tokenizer_fingerprint': tokenizer.fingerprint}
    save_checkpoint(tmp_path, checkpoint, ['checkpoint.pt'])
    folder = tmp_path / 'hf'
    save_folder(folder, ours.model_args(), ours.state_dict(), tokenizer, tokenizer.start)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ['The class', 'naïve — x', 'T']
    for init_from in (tmp_path, folder):
        model, codec, *_ = load_for_use(str(init_from), '', 'cpu', 'float32')
        assert codec.start == [tokenizer.eot] and (kind == 'char' or codec.fingerprint == tokenizer.fingerprint)
        texts = generate_texts(prompts, model, codec, temperature=0, max_new_tokens=20)
        for prompt, text in zip(prompts, texts, strict=True):
            encoded = their_tokenizer(prompt, return_tensors='pt')
            out = theirs.generate(**encoded, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
            assert out.max() < tokenizer.vocab_size
            assert their_tokenizer.decode(out, skip_special_tokens=True) == prompt + text


@pytest.mark.parametrize('text', ['', 'plain', ' two  spaces\n\n\tand tabs ', "don't we'll 1234 x=1",
                                  '龍飛鳳舞 naïve — 𠮷👩‍👧', '\u3000\xa0\x85\u2028 \x00'])
def test_the_exported_gpt2_tokenizer_is_tiktokens(text, tmp_path_factory):
    folder = gpt2_folder(tmp_path_factory)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(text, add_special_tokens=False)['input_ids'] == gpt2_tokenizer().encode(text)
    assert theirs(text)['input_ids'] == [50256, *gpt2_tokenizer().encode(text)]
    assert theirs.decode(gpt2_tokenizer().encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == 50256 and len(theirs) == 50257


_folders = {}


@pytest.mark.parametrize('start', [True, False])
def test_a_chat_asks_as_in_training(start, bpe):
    files = tokenizer_files(bpe, bpe.start * start, 64, 'Q: {prompt}\n"A": ')
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(files['tokenizer.json']),
                                     **json.loads(files['tokenizer_config.json']))
    turns = ['the class?', 'Yes.', 'and more?']
    for n in (1, 3):
        talk = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns[:n])]
        ids = theirs.apply_chat_template(talk, tokenize=True)['input_ids']
        assert ids == bpe.start * start + bpe.encode(conversation('Q: {prompt}\n"A": ', turns[:n]))


def gpt2_folder(factory):
    if not _folders:
        _folders['gpt2'] = factory.mktemp('gpt2')
        model = our_model(vocab_size=50257)
        save_folder(_folders['gpt2'], model.model_args(), model.state_dict(), gpt2_tokenizer(), [50256])
    return _folders['gpt2']


def test_an_exported_gpt2_tokenizer_comes_back_as_gpt2s(tmp_path_factory):
    assert load_published(str(gpt2_folder(tmp_path_factory)))['tokenizer'] == {'kind': 'gpt2'}


@pytest.mark.parametrize('switch, shape', [
    ('norm', dict(norm='layernorm', position='rope')), ('position', dict(norm='rmsnorm')),
    ('mlp', dict(norm='rmsnorm', position='rope', mlp='silu')), ('bias', dict(bias=False)),
    ('n_kv_head', dict(n_kv_head=2)), ('mlp', dict(mlp='swiglu')), ('qk_norm', dict(qk_norm=True)),
    ('qk_norm', dict(SHAPES['llama'], qk_norm=True))], ids=str)
def test_a_shape_that_no_class_has_is_refused_naming_the_switch(switch, shape, bpe, tmp_path):
    model = our_model(**shape)
    with pytest.raises(Unsupported, match='position' if switch == 'norm' else switch):
        save_folder(tmp_path / 'out', model.model_args(), model.state_dict(), bpe, bpe.start)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args, weights, named', [
    (dict(norm='powernorm'), {}, "norm='powernorm'"),
    ({}, {'transformer.h.0.ln_1.gate': torch.ones(1)}, 'transformer.h.0.ln_1.gate')])
@pytest.mark.parametrize('shape', ['gpt2', 'llama'])
def test_what_somebody_added_to_the_model_is_not_dropped_from_an_export(args, weights, named, shape, bpe, tmp_path):
    model = our_model(**SHAPES[shape])
    with pytest.raises(Unsupported, match=named):
        save_folder(tmp_path / 'out', model.model_args() | args, model.state_dict() | weights, bpe, bpe.start)
    assert not (tmp_path / 'out').exists()


# -----------------------------------------------------------------------------
# from the hub

def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def visit(hub, patch):
    for name, value in hub.environment.items():
        patch.setenv(name, value)


@torch.no_grad()
def test_gpt2_comes_from_the_mirror_resumed_verified_and_then_works_offline(here, monkeypatch):
    theirs = random_model('gpt2')
    theirs.save_pretrained('source')
    idx = torch.randint(300, (1, 20))
    with Hub({'models/openai-community/gpt2': files_of('source') | {'pytorch_model.bin': b'\x80never'}}) as hub:
        visit(hub, monkeypatch)
        monkeypatch.setenv('HF_TOKEN', 'hf_secret')
        hub.fail('model.safetensors', cut=20000)
        assert (GPT.from_pretrained('gpt2')(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
        assert not any('pytorch_model.bin' in path for path in hub.fetched())
        assert all('hf_secret' not in str(r.headers) for r in hub.requests if r.host == 'store')
        asked = len(hub.requests)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert (GPT.from_pretrained('gpt2')(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    assert len(hub.requests) == asked
    Path('models/openai-community--gpt2/model.safetensors').unlink()
    with pytest.raises(UserError, match='HF_HUB_OFFLINE'):
        GPT.from_pretrained('gpt2')


@torch.no_grad()
def test_a_llama_of_several_files_with_its_tokenizer_comes_from_the_hub(here, monkeypatch, bpe):
    theirs = random_model('llama-tied')
    theirs.save_pretrained('source', max_shard_size='30KB')
    Path('source/tokenizer.json').write_text(bpe.text, encoding='utf-8')
    with Hub({'models/somebody/llama': files_of('source')}) as hub:
        visit(hub, monkeypatch)
        model, tokenizer, *_ = load_for_use('somebody/llama', '', 'cpu', 'float32')
        idx = torch.tensor([tokenizer.encode('The class')])
        assert (model(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
        with pytest.raises(UserError, match='somebody/other'):
            load_for_use('somebody/other', '', 'cpu', 'float32')
    with Hub({'models/somebody/pickled': {'config.json': b'{}', 'pytorch_model.bin': b'\x80never'}}) as hub:
        visit(hub, monkeypatch)
        with pytest.raises(Unsupported, match='could run code'):
            load_for_use('somebody/pickled', '', 'cpu', 'float32')


def test_gpt2s_tokenizer_files_come_from_the_mirror(here, monkeypatch, gpt2_files):
    found = {path.read_bytes()[:1]: path.read_bytes() for path in gpt2_files.iterdir()}
    files = {'vocab.json': found[b'{'], 'merges.txt': found[b'#']}
    code = ('from tokenizer import gpt2_tokenizer; import tiktoken.load as l; '
            "l.read_file = lambda path: 1 / 0; print(gpt2_tokenizer().encode('Hello world'))")
    with Hub({'models/openai-community/gpt2': files}) as hub:
        for cache in ('new', 'new', ''):        # the second time nothing is asked; without a cache, tiktoken's own way
            env = {**os.environ, **hub.environment, 'TIKTOKEN_CACHE_DIR': cache, 'PYTHONPATH': str(ROOT)}
            done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=60)
            assert ('[15496, 995]' in done.stdout) == bool(cache), done.stderr
        assert sorted(hub.fetched()) == ['merges.txt', 'vocab.json']


def test_llama_tokenizers_begin_texts_as_theirs_do_and_keep_the_space_between_words(here):
    # a sentencepiece model as it stands in a tokenizer.json: a space is written as ▁, and <s> begins every text
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '▁', 'a', 'b', '▁a', '▁b', 'ab', '▁ab']
    theirs = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [('▁', 'a'), ('▁', 'b'), ('a', 'b'),
                                  ('▁', 'ab')], byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    theirs.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(' ', 1, 0)])
    theirs.add_special_tokens(['<unk>', '<s>', '</s>'])
    theirs.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    ids = torch.tensor([theirs.encode('a ab').ids])
    for seed in range(20):                                          # one whose text goes on with a space
        model = random_model('llama-untied', seed)
        model.config.eos_token_id, model.config.bos_token_id = 2, 1
        with torch.no_grad():
            model.lm_head.weight[:259] *= 0.01                      # text rather than bytes
        out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0,
                             suppress_tokens=[*range(266, 300)])
        expected = theirs.decode(out[0].tolist())
        if expected.startswith('a ab '):
            break
    model.save_pretrained('llama')
    theirs.save('llama/tokenizer.json')
    loaded, tokenizer, *_ = load_for_use('llama', '', 'cpu', 'float32')
    assert (tokenizer.start, tokenizer.bos, tokenizer.eot) == ([1], 1, 2)
    assert tokenizer.start + tokenizer.encode('a ab') == theirs.encode('a ab').ids
    text, = generate_texts(['a ab'], loaded, tokenizer, temperature=0, max_new_tokens=12)
    assert text.startswith(' ') and 'a ab' + text == expected


# -----------------------------------------------------------------------------
# export.py

@pytest.fixture
def run_folder(here, bpe):
    """A checkpoint as train.py leaves it, in out/."""
    model = our_model(**SHAPES['llama'])
    Path('out').mkdir()
    save_checkpoint('out', {'model': model.state_dict(), 'model_args': model.model_args(), 'iter_num': 300,
                            'best_val_loss': 3.25, 'tokenizer': bpe.state(), 'tokenizer_fingerprint': bpe.fingerprint,
                            'config': {'dataset': 'plays', 'total_batch_size': 8192, 'learning_rate': 6e-4,
                                       'optimizer': 'adamw', 'init_from': 'auto', 'weight_decay': 0.1}},
                    ['checkpoint.pt'])
    return here


def export_script(*args):
    return run('.', 'export.py', '--format=hf', *args, env={'HF_HOME': 'nobody'})


def test_the_model_card_tells_how_the_model_was_trained(run_folder):
    done = export_script('--out=made')
    assert done.returncode == 0, done.stderr
    card = Path('made/README.md').read_text(encoding='utf-8')
    for fact in ('library_name: transformers', '| training data | plays |', '| optimizer steps | 300 |',
                 '| tokens in all | 2,457,600 |', '| peak learning rate | 0.0006 |',
                 '| best validation loss | 3.2500 |'):
        assert fact in card, card
    assert 'started from' not in card and str(run_folder) not in card
    again = export_script('--out=made')                 # an export may be made anew
    assert again.returncode == 0, again.stderr


def test_pushing_without_being_logged_in_says_how_and_keeps_the_folder(run_folder):
    done = export_script('--out=made', '--push=me/mine')
    assert done.returncode == 2 and 'logged in' in done.stderr and 'Traceback' not in done.stderr
    assert GPT.from_pretrained('made').num_params() == our_model(**SHAPES['llama']).num_params()


def test_pushing_makes_the_repository_and_uploads_the_folder(monkeypatch, tmp_path):
    import huggingface_hub

    import export
    calls = []

    class Recorder:
        def __init__(self, endpoint=None):
            calls.append(endpoint)

        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, args, options))

    monkeypatch.setattr(huggingface_hub, 'HfApi', Recorder)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    export.upload(tmp_path, 'me/mine')
    assert calls == ['http://127.0.0.1:9', ('whoami', (), {}), ('create_repo', ('me/mine',), {'exist_ok': True}),
                     ('upload_folder', (), {'repo_id': 'me/mine', 'folder_path': tmp_path})]
