"""int8 weights: how far from the float ones, how large, and that they are used as any other checkpoint."""

import pytest
import torch

import layers
from checkpoint import build_model, load_checkpoint, save_checkpoint
from layers import Int8Linear, quantize_rows, to_int8
from model import GPT, PRESETS, GPTConfig, KVCache
from scripts import run
from tokenizer import train_bpe

SHAPES = {'teaching': PRESETS['teaching'], 'gpt2': dict(n_layer=2, n_head=4, n_embd=128, block_size=64),
          'llama': dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=128, block_size=64, norm='rmsnorm', position='rope',
                        mlp='swiglu', bias=False, tie_weights=False)}


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    weight = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    whole, scale = quantize_rows(weight)
    assert whole.dtype == torch.int8 and whole.abs().amax(1).tolist() == [127] * 7
    assert ((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize('way', ['fast', 'reduced', 'plain'])
def test_a_layer_is_within_two_percent_of_its_float_self(way, monkeypatch):
    if way == 'plain':
        monkeypatch.setattr(layers, 'pack', lambda *_: None)   # as on a CPU without the kernel
    monkeypatch.setattr(layers, 'REDUCE_RANGE', way == 'reduced')         # as on one without VNNI
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 300)
    layer = Int8Linear(linear)
    for shape in ((1, 256), (5, 256), (2, 3, 256)):
        x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]  # rows of very different size
        y, exact = layer(x), linear(x)
        assert y.shape == exact.shape
        assert ((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.02


def test_without_a_kernel_the_float_weights_are_made_once(monkeypatch):
    monkeypatch.setattr(layers, 'pack', lambda *_: None)
    layer = Int8Linear(torch.nn.Linear(256, 300))
    first = layer(torch.ones(1, 256))
    layer.scale.mul_(2)                                     # nobody looks at this any more
    assert torch.equal(layer(torch.ones(1, 256)), first)


@pytest.mark.parametrize('shape', SHAPES)
def test_the_distribution_over_next_tokens_is_nearly_the_same(shape):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, **SHAPES[shape])).eval()
    idx = torch.randint(512, (2, 40))
    with torch.no_grad():
        exact = model(idx)[0]
        small = to_int8(model)(idx)[0]
    assert ((small - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize('shape', SHAPES)
def test_keys_and_values_kept_in_bfloat16_change_little(shape, monkeypatch):
    torch.manual_seed(0)
    model = to_int8(GPT(GPTConfig(vocab_size=512, **SHAPES[shape])))
    idx = torch.randint(512, (2, 40))
    cache = KVCache(model.config, 2, 40, torch.bfloat16)
    with torch.no_grad():
        parts = [model(part, cache=cache)[0] for part in idx.split([20, 1, 19], dim=1)]
        exact = model(idx)[0]
    assert cache.layers[0][0].dtype == torch.bfloat16 and parts[0].dtype == torch.float32
    assert ((torch.cat(parts, dim=1) - exact).norm() / exact.norm()) < 0.02
    made = []
    monkeypatch.setattr('model.KVCache', lambda *args: made.append(args[3]) or KVCache(*args))
    model.generate(idx, 2)
    assert made == [torch.bfloat16]


@pytest.mark.parametrize('shape', SHAPES)
def test_the_exported_checkpoint_is_small_and_used_as_any_other(tmp_path, shape):
    torch.manual_seed(0)
    bpe = train_bpe(['the cat sat on the mat, 猫坐在垫子上。' * 20], 300)
    model = GPT(GPTConfig(vocab_size=2048, **SHAPES[shape]))
    (tmp_path / 'out').mkdir()
    save_checkpoint(tmp_path / 'out', {'model': model.state_dict(), 'model_args': model.model_args(), 'iter_num': 3,
                                       'best_val_loss': 1.0, 'tokenizer': bpe.state(), 'config': {},
                                       'tokenizer_fingerprint': bpe.fingerprint}, ['checkpoint.pt'])
    done = run(tmp_path, 'export.py', '--init_from=out', '--format=int8')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out/int8.pt').stat().st_size <= 0.35 * 4 * model.num_params()
    loaded = build_model(load_checkpoint(tmp_path / 'out/int8.pt'))
    idx = torch.randint(2048, (1, 9))
    assert torch.equal(loaded.generate(idx, 20, temperature=0), to_int8(model).generate(idx, 20, temperature=0))
    done = run(tmp_path, 'sample.py', '--init_from=out/int8.pt', '--prompt=the', '--max_new_tokens=5')
    assert done.returncode == 0 and '[Sample 1] the' in done.stdout and 'int8)' in done.stderr
    # a folder's own checkpoint stays the one to resume from, and int8 weights are no start for training
    assert run(tmp_path, 'sample.py', '--init_from=out', '--max_new_tokens=2').stderr.startswith('out/checkpoint.pt')
    assert run(tmp_path, 'export.py', '--init_from=out/int8.pt').returncode == 2
