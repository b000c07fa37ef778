"""Low-rank adapters: what they train and what they leave alone, merged and not, resumed, and as PEFT reads them."""

import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from checkpoint import build_model, load_checkpoint
from export import export_lora
from huggingface import Unsupported, load_published, save_folder
from layers import add_adapters, merge_adapters
from model import GPT, PRESETS, GPTConfig
from scripts import run
from tokenizer import train_bpe

SHAPES = {
    'gpt2': dict(n_layer=2, n_head=4, n_embd=32, block_size=32),
    'llama': dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=56, block_size=32, norm='rmsnorm',
                  position='rope', mlp='swiglu', bias=False, tie_weights=False),
    'qwen2': dict(n_layer=2, n_head=4, n_kv_head=1, n_embd=32, block_size=32, norm='rmsnorm', position='rope',
                  mlp='swiglu', bias=False, qkv_bias=True),
}
TARGETS = 'c_attn,c_proj,c_fc'


def random_model(shape):
    """A model of which every tensor is random: fresh ones have biases of 0 and norms of 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, **SHAPES[shape])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def teach(model):
    """As if adapters had been trained: B is no longer 0."""
    for name, p in model.named_parameters():
        if name.endswith('lora_B'):
            torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.fixture(scope='module')
def idx():
    return torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))


# -----------------------------------------------------------------------------
# the adapters

@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_adapters_change_no_logit_at_first_and_no_name_of_the_base(shape, idx):
    model = random_model(shape)
    before, names = model(idx)[0], model.state_dict().keys()
    add_adapters(model, 4, 16, TARGETS)
    assert torch.equal(model(idx)[0], before)
    added = model.state_dict().keys() - names
    assert names <= model.state_dict().keys() and len(added) == 2 * 4 * 2
    assert {name.rpartition('.')[2] for name in added} == {'lora_A', 'lora_B'}


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('shape', SHAPES)
def test_only_adapters_have_gradients_and_change(shape, optimizer, idx):
    model = teach(random_model(shape))
    add_adapters(model, 4, 16, TARGETS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', optimizer, verbose=False)
    seen = [p for o in optimizers for group in o.param_groups for p in group['params']]
    assert {id(p) for p in seen} == {id(p) for name, p in model.named_parameters() if 'lora_' in name}
    for _ in range(2):                                  # in the first, A has no gradient yet: B is 0
        model.train()(idx[:, :-1], idx[:, 1:])[1].backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            name for name in before if 'lora_' in name}
        for o in optimizers:
            o.step()
            o.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ('lora_' not in name), name


def test_gpt2_with_rank_8_trains_as_many_parameters_as_the_readme_says():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257, **PRESETS['gpt2'], lora_rank=8))
        plain = GPT(GPTConfig(vocab_size=50257, **PRESETS['gpt2']))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 16 * 8 * 768 * 12 == 1_179_648
    assert model.num_params() - trained == plain.num_params() == 124_439_808
    assert 0.67 < model.flops_per_token() / plain.flops_per_token() < 0.72      # 4 for a weight, where there were 6


@pytest.mark.parametrize('targets, layers', [('c_attn', {'attn.c_attn'}), ('c_proj', {'attn.c_proj', 'mlp.c_proj'}),
                                             ('mlp.c_proj, c_attn', {'attn.c_attn', 'mlp.c_proj'})])
def test_targets_name_layers_or_one_of_two(targets, layers):
    model = random_model('gpt2')
    add_adapters(model, 2, 16, targets)
    assert {re.search(r'\.\d+\.(.*)\.lora_A', name)[1] for name in model.state_dict() if 'lora_A' in name} == layers


@pytest.mark.parametrize('rank, targets, named', [
    (4, 'c_attn,q_proj', "'q_proj' .* c_attn, attn.c_attn, c_proj, attn.c_proj, c_fc, mlp.c_fc, mlp.c_proj$"),
    (4, 'lm_head', 'lm_head'), (4, '', "''"), (33, TARGETS, 'from 1 to 32.* not 33'), (-1, TARGETS, 'not -1')])
def test_a_wrong_target_or_rank_is_told_with_what_there_is(rank, targets, named):
    model = random_model('gpt2')
    with pytest.raises(ValueError, match=named):
        add_adapters(model, rank, 16, targets)
    assert all(p.requires_grad for p in model.parameters()) and model.config.lora_rank == 0


@pytest.mark.parametrize('shape', SHAPES)
@torch.no_grad()
def test_merged_equals_unmerged(shape, idx):
    model = random_model(shape)
    base, names = model(idx)[0], model.state_dict().keys()
    add_adapters(model, 4, 8, TARGETS)
    apart = teach(model)(idx)[0]
    assert (apart - base).abs().max() > 0.1                 # something to compare
    merge_adapters(model)
    assert (model(idx)[0] - apart).abs().max() < 1e-4
    assert model.state_dict().keys() == names and all(p.requires_grad for p in model.parameters())
    assert {type(m).__name__ for m in model.modules() if hasattr(m, 'weight')} <= {
        'Linear', 'Embedding', 'LayerNorm', 'RMSNorm'}


# -----------------------------------------------------------------------------
# as PEFT reads them

@pytest.mark.parametrize('targets', [TARGETS, 'mlp.c_proj,c_attn'])
@pytest.mark.parametrize('shape', SHAPES)
def test_peft_loads_the_adapters_beside_the_base_with_the_same_logits(shape, targets, idx, tmp_path, recwarn):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    model, tokenizer = random_model(shape), train_bpe(['the cat sat on the mat. ' * 20], 300)
    save_folder(tmp_path / 'base', model.model_args(), model.state_dict(), tokenizer, tokenizer.start)
    add_adapters(model, 4, 8, targets)
    teach(model)
    checkpoint = {'model': model.state_dict(), 'model_args': model.model_args(),
                  'config': {'init_from': str(tmp_path / 'base')}}
    export_lora('run', checkpoint, tmp_path / 'lora')
    assert json.loads((tmp_path / 'lora/adapter_config.json').read_text())['base_model_name_or_path'] == str(
        tmp_path / 'base')
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'lora').eval()
    assert not [str(w.message) for w in recwarn if 'missing' in str(w.message) or 'fan_in' in str(w.message)]
    with torch.no_grad():
        expected = model(idx)[0]
        assert (theirs(idx).logits - expected).abs().max() < 1e-4
        assert (theirs.merge_and_unload()(idx).logits - expected).abs().max() < 1e-4
        assert (build_model(load_published(str(tmp_path / 'base')))(idx)[0] - expected).abs().max() > 0.1


def test_adapters_of_a_shape_that_transformers_has_not_are_refused_before_anything_is_written(tmp_path):
    odd = GPT(GPTConfig(vocab_size=300, **PRESETS['teaching'], lora_rank=2))
    with pytest.raises(Unsupported, match='mlp'):
        export_lora('run', {'model': odd.state_dict(), 'model_args': odd.model_args()}, tmp_path / 'lora')
    assert not (tmp_path / 'lora').exists()


# -----------------------------------------------------------------------------
# runs

TINY = ['--batch_size=8', '--block_size=64', '--total_batch_size=0', '--eval_iters=20', '--device=cpu',
        '--dtype=float32', '--tensorboard=false', '--log_interval=50', '--warmup_steps=10', '--eval_interval=0']
ADAPTED = ['--dataset=code', '--init_from=out/base', '--lora_rank=1', '--learning_rate=6e-3', '--min_lr=6e-4',
           '--weight_decay=0']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with two data sets of the same characters, prose and Python, and a base that has read the prose."""
    from pydoc_data.topics import topics
    place = tmp_path_factory.mktemp('lora')
    letters = ''.join(map(chr, [10, *range(32, 127)])) + '\n'
    code = sorted(Path(sysconfig.get_path('stdlib')).glob('[a-c]*.py'))
    for name, texts in (('prose', topics.values()), ('code', (p.read_text(encoding='utf-8') for p in code))):
        text = letters + ''.join(c for c in ''.join(texts) if c in letters)[:200_000]
        (place / f'{name}.txt').write_text(text, encoding='utf-8')
        done = run(place, 'prepare_data.py', '--dataset=custom', f'--input={name}.txt', '--tokenizer=char',
                   f'--out=data/{name}')
        assert done.returncode == 0, done.stderr
    train(place, 'base', '--dataset=prose', '--n_layer=2', '--n_head=4', '--n_embd=128', '--norm=rmsnorm',
          '--bias=false', '--position=rope', '--mlp=swiglu', '--optimizer=muon', '--learning_rate=4e-3',
          '--max_steps=250')
    return place


def train(place, out, *args, processes=1):
    done = run(place, 'train.py', f'--out_dir=out/{out}', *TINY, *args, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_adapters_of_under_two_percent_learn_another_text_and_every_script_uses_them(place):
    out = train(place, 'adapted', *ADAPTED, '--max_steps=150', '--eval_interval=75')
    trained, share = re.search(r'beside which ([\d,]+) are trained, ([\d.]+)%', out).groups()
    assert f'num decayed parameter tensors: 16, with {trained} parameters' in out and float(share) < 1.1
    first, *_, last = map(float, re.findall(r'^validation loss: ([\d.]+)', out, re.M))
    assert last < first - 0.3, (first, last)

    base = load_checkpoint(place / 'out/base/final_checkpoint.pt')['model']
    checkpoint = load_checkpoint(place / 'out/adapted/final_checkpoint.pt')
    assert all(torch.equal(checkpoint['model'][name], base[name]) for name in base)
    moments = [t for state in checkpoint['optimizer'][0]['state'].values() for t in state.values() if t.dim()]
    assert sum(t.numel() for t in moments) == 2 * int(trained.replace(',', ''))

    for form, folder in (('hf', 'hf'), ('int8', 'int8.pt'), ('lora', 'lora')):
        done = run(place, 'export.py', '--init_from=out/adapted', f'--format={form}')
        assert done.returncode == 0 and (place / 'out/adapted' / folder).exists(), done.stderr
    assert '--init_from=out/base --format=hf' in done.stdout        # where its base comes from
    assert (place / 'out/adapted/lora/adapter_model.safetensors').stat().st_size < 40_000
    texts = {run(place, 'sample.py', f'--init_from=out/adapted{form}', '--temperature=0', '--dtype=float32',
                 '--max_new_tokens=40', '--prompt=def ').stdout for form in ('', '/hf')}
    assert len(texts) == 1 and '[Sample 1] def' in texts.pop()
    assert '[Sample 1] def' in run(place, 'sample.py', '--init_from=out/adapted/int8.pt', '--prompt=def ').stdout
    idx = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart, merged = (build_model(checkpoint, merged=choice)(idx)[0] for choice in (False, True))
        there = build_model(load_published(str(place / 'out/adapted/hf')))(idx)[0]
    assert (merged - apart).abs().max() < 1e-4 and (there - merged).abs().max() < 1e-4


@pytest.mark.parametrize('options', [('--dropout=0.2',), ('--optimizer=muon',), ('--dtype=bfloat16',)], ids=' '.join)
def test_a_resumed_run_of_adapters_is_the_same_to_the_last_bit(place, options):
    name = '-'.join(options).replace('=', '')
    args = [*ADAPTED, '--max_steps=12', '--checkpoint_interval=5', '--keep_checkpoints=0', '--lora_targets=c_attn,c_fc']
    train(place, f'whole{name}', *args, *options)
    (place / f'out/cut{name}').mkdir()
    shutil.copy(place / f'out/whole{name}/checkpoint_iter_5.pt', place / f'out/cut{name}/checkpoint.pt')
    assert 'at step 5' in train(place, f'cut{name}', *args, *options)
    a, b = (load_checkpoint(place / f'out/{kind}{name}/final_checkpoint.pt') for kind in ('whole', 'cut'))
    assert any('lora_A' in key for key in a['model'])
    assert all(torch.equal(a['model'][key], b['model'][key]) for key in a['model'])
    assert a['best_val_loss'] == b['best_val_loss']


def test_two_processes_with_divided_state_give_the_adapters_of_one(place):
    args = [*ADAPTED, '--max_steps=4', '--batch_size=4', '--total_batch_size=512', '--optimizer=muon']
    train(place, 'one', *args)
    train(place, 'two', *args, '--zero=1', processes=2)
    a, b = (load_checkpoint(place / f'out/{name}/final_checkpoint.pt')['model'] for name in ('one', 'two'))
    assert all((a[key] - b[key]).abs().max() < 1e-3 for key in a)


def test_adapters_are_a_base_for_others_and_for_training_all_weights(place):
    train(place, 'first', *ADAPTED, '--max_steps=20')
    merged = build_model(load_checkpoint(place / 'out/first/final_checkpoint.pt')).state_dict()
    for name, *args in (['second', '--lora_rank=2'], ['all', '--lora_rank=0']):
        train(place, name, *ADAPTED, '--init_from=out/first', *args, '--max_steps=2')
        now = load_checkpoint(place / f'out/{name}/final_checkpoint.pt')['model']
        assert all(torch.equal(now[key], merged[key]) for key in merged) == (name == 'second')
        assert ('transformer.h.0.attn.c_attn.lora_A' in now) == (name == 'second')


@pytest.mark.parametrize('args, named', [
    (['--lora_targets=q_proj'], ["'q_proj'", 'c_attn, attn.c_attn, c_proj, attn.c_proj, c_fc, mlp.c_fc, mlp.c_proj']),
    (['--lora_rank=1000'], ['lora_rank', '1 to 128', '1000']), (['--lora_rank=-1'], ['lora_rank', '-1']),
    (['--lora_alpha=0'], ['lora_alpha', '0']), (['--init_from=scratch'], ['lora_rank=1', '--init_from=gpt2']),
    (['--target_modules=c_attn'], ['lora_targets'])], ids=str)
def test_wrong_settings_end_in_words(place, args, named):
    done = run(place, 'train.py', '--out_dir=out/new', *TINY, *ADAPTED, *args)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 2 and not [word for word in named if word not in done.stderr], done.stderr
    assert not (place / 'out/new').exists()


def test_a_run_goes_on_with_the_adapters_it_began_with(place):
    train(place, 'going', *ADAPTED, '--max_steps=2')
    for changed, was in (('--lora_rank=2', 'lora_rank=1'), ('--lora_alpha=8', 'lora_alpha=16'),
                         ('--lora_targets=c_attn', f'lora_targets={TARGETS}'), ('--lora_rank=0', 'lora_rank=1')):
        done = run(place, 'train.py', '--out_dir=out/going', *TINY, *ADAPTED, '--max_steps=4', changed)
        assert done.returncode == 2 and was in done.stderr and changed[2:] in done.stderr, done.stderr
    assert 'at step 2' in train(place, 'going', *ADAPTED, '--max_steps=4')
