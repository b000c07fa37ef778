"""model.py held against transformers, plain formulas and plain loops."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import functions
import layers
import model
from functions import LinearCrossEntropy, dropout, rms_norm
from model import GPT, PRESETS, GPTConfig, KVCache, apply_rope, rope_table, sample_next

SMALL = dict(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
SHAPES = {
    'gpt2': {},
    'teaching': dict(norm='rmsnorm', position='rope', mlp='silu'),
    'llama': dict(norm='rmsnorm', position='rope', mlp='swiglu', bias=False, n_kv_head=2, tie_weights=False),
    'other': dict(mlp='relu2', qk_norm=True, n_kv_head=1, bias=False),
}


def lively(config, seed=0):
    """A model whose outputs are far from uniform, and whose biases and norms are not trivial."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def nanogpt_weights(theirs):
    """transformers' GPT-2 state under our names: its Conv1D keeps weights transposed."""
    ours = {k: v for k, v in theirs.state_dict().items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
    return {k: v.t() if any(k.endswith(f'{n}.weight') for n in ('c_attn', 'c_proj', 'c_fc')) else v
            for k, v in ours.items()}


@pytest.fixture(scope='module')
def gpt2_pair():
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = GPT(GPTConfig(**SMALL))
    ours.load_state_dict(nanogpt_weights(theirs))
    return ours, theirs


def test_logits_equal_transformers(gpt2_pair):
    ours, theirs = gpt2_pair
    idx = torch.randint(61, (3, 16))
    with torch.no_grad():
        assert (ours.eval()(idx)[0] - theirs.eval()(idx).logits).abs().max() < 1e-4


def test_training_loss_and_gradients_equal_transformers(gpt2_pair):
    ours, theirs = gpt2_pair
    idx = torch.randint(61, (3, 16))
    targets = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], dim=1)
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours.train()(idx, targets)[1]
    theirs_loss = theirs.train()(idx, labels=idx).loss
    assert abs(loss.item() - theirs_loss.item()) < 1e-5
    loss.backward()
    theirs_loss.backward()
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if name.startswith('lm_head'):
            continue
        grad = expected[name].t() if p.shape != expected[name].shape else expected[name]
        if any(name.endswith(f'{n}.weight') for n in ('c_attn', 'c_proj', 'c_fc')):
            grad = expected[name].t()
        assert (p.grad - grad).abs().max() < 1e-5, name


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_loss_in_slices_equals_cross_entropy_on_whole_logits(shape, reduction, monkeypatch):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    idx, targets = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    targets[0, :5] = -100
    whole = F.cross_entropy(model(idx)[0].view(-1, 61), targets.view(-1), ignore_index=-100, reduction=reduction)
    sliced = model(idx, targets, reduction=reduction)[1]
    assert sliced.item() == pytest.approx(whole.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(sliced, list(model.parameters())),
                    torch.autograd.grad(whole, list(model.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, whole.item()))


def test_loss_over_several_slices_never_holds_all_logits():
    # 512 rows a slice: 600 rows of 50,304 ids come in two
    x = torch.randn(600, 8, requires_grad=True)
    w = torch.randn(50304, 8, requires_grad=True)
    targets = torch.randint(50304, (600,))
    loss = LinearCrossEntropy.apply(x, w, targets, torch.float32, True)
    whole = F.cross_entropy(x @ w.t(), targets, reduction='sum')
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(whole, (x, w)), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_compiled_model_is_one_graph_with_the_loss_of_the_other(shape, dtype):
    shape = {**SMALL, **SHAPES[shape], 'document_token': 3}
    model = lively(GPTConfig(**shape)).train()
    idx, targets = torch.randint(61, (2, 3, 16))
    targets[:, ::3] = -100
    results = []
    for run in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            _, loss = run(idx, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    loose = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= loose * b.norm() + 1e-6


def test_gradients_in_float16_are_summed_over_few_enough_rows_not_to_overflow():
    x, weight = torch.full((60_000, 2), 5.0, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    LinearCrossEntropy.apply(x, weight, torch.zeros(60_000, dtype=torch.int64), torch.float16, True).backward()
    assert weight.grad.tolist() == [[-150_000] * 2, [150_000] * 2]      # softmax is a half; float16 ends at 65,504


def test_the_output_layers_gradient_is_made_only_if_it_is_asked_for():
    torch.manual_seed(0)
    x, weight, targets = torch.randn(7, 8), torch.randn(20, 8), torch.randint(20, (7,))
    grads = []
    for trained in (True, False):
        z, w = x.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        loss = LinearCrossEntropy.apply(z, w, targets, torch.float32, True)
        assert (loss.grad_fn.grads[1] is not None) == trained
        loss.backward()
        grads.append(z.grad)
        assert (w.grad is not None) == trained
    assert torch.equal(*grads)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_activations_made_twice_give_the_gradients_of_those_kept(shape, dtype, monkeypatch):
    gpt = GPT(GPTConfig(**{**SMALL, **SHAPES[shape]}, dropout=0.1)).train()
    x, y = torch.randint(61, (2, 3, 16))
    found = {}
    for large in (1 << 40, 1):
        monkeypatch.setattr(model, 'LARGE', large)
        gpt.zero_grad()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t), \
                torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            gpt(x, y)[1].backward()
        found[large] = [p.grad.clone() for p in gpt.parameters()], sum({t.data_ptr(): t.nbytes for t in kept}.values())
    (plain, all_kept), (again, fewer) = found.values()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert fewer < 0.8 * all_kept


@pytest.mark.parametrize('shape', SHAPES)
def test_losses_of_single_tokens_are_cross_entropys_terms(shape):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    idx, targets = torch.randint(61, (2, 16)), torch.randint(61, (2, 16))
    targets[0, :5] = -100
    whole = F.cross_entropy(model(idx)[0].transpose(1, 2), targets, ignore_index=-100, reduction='none')
    assert torch.allclose(model(idx, targets, reduction='none')[1], whole, atol=1e-5)


@pytest.mark.parametrize('shape', SHAPES)
def test_parts_of_a_row_with_positions_and_a_mask_are_as_each_alone(shape):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    before, one, two = torch.randint(61, (2, 4)), torch.randint(61, (2, 5)), torch.randint(61, (2, 6))
    positions = torch.tensor([[*range(4), *range(4, 9), *range(4, 10)]]).expand(2, -1)
    part = torch.tensor([0] * 4 + [1] * 5 + [2] * 6)
    mask = ((part[None, :] == 0) | (part[None, :] == part[:, None])).tril().expand(2, 1, 15, 15)
    row = model(torch.cat([before, one, two], 1), positions=positions, mask=mask)[0]
    assert torch.allclose(row[:, :9], model(torch.cat([before, one], 1))[0], atol=1e-5)
    assert torch.allclose(row[:, 9:], model(torch.cat([before, two], 1))[0][:, 4:], atol=1e-5)


def test_exact_parameter_counts(capsys):
    with torch.device('meta'):
        assert GPT(GPTConfig(vocab_size=50257)).num_params() == 124_439_808
        GPT(GPTConfig(vocab_size=50304)).configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
        V, L, d = 824, 4, 256
        teaching = GPT(GPTConfig(vocab_size=V, **PRESETS['teaching'])).num_params()
        sizes = {name: GPT(GPTConfig(vocab_size=50257, **PRESETS[name])).num_params() for name in PRESETS}
        assert GPT(GPTConfig(vocab_size=32768, **PRESETS['26m'])).num_params() == 26_976_000
    out = capsys.readouterr().out
    assert 'num decayed parameter tensors: 50, with 124,354,560 parameters' in out
    assert 'num non-decayed parameter tensors: 98, with 121,344 parameters' in out
    assert teaching == 3_368_192 == V * d + L * (12 * d * d + 11 * d) + d
    # as published: 355M, 774M and 1,558M
    assert (sizes['gpt2-medium'], sizes['gpt2-large'], sizes['gpt2-xl']) == (354_823_168, 774_030_080, 1_557_611_200)


def test_every_parameter_has_one_optimizer():
    model = GPT(GPTConfig(**SMALL))
    for kind in ('adamw', 'muon'):
        optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', kind, verbose=False)
        held = [p for o in optimizers for g in o.param_groups for p in g['params']]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
        for o in optimizers:
            for g in o.param_groups:
                assert all((p.dim() >= 2) == (g['weight_decay'] > 0) for p in g['params'])


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=1000, n_layer=8, n_head=4, n_embd=256, block_size=64))
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.03)
        elif name.endswith('bias'):
            assert p.abs().max() == 0


@pytest.mark.parametrize('shape', SHAPES)
def test_greedy_decoding_with_the_cache_equals_a_plain_loop_past_block_size(shape):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    idx = torch.randint(61, (3, 5))
    expected = idx.clone()
    with torch.no_grad():
        for _ in range(30):
            logits = model(expected[:, -16:])[0][:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert len(set(expected[0].tolist())) > 5           # not a text of one token, which anything would equal
    assert torch.equal(model.generate(idx, 30, temperature=0), expected)
    assert torch.equal(model.generate(idx, 30, temperature=0, use_cache=False), expected)
    assert torch.equal(model.generate(idx[:1], 30, temperature=0), expected[:1])


@pytest.mark.parametrize('shape', ['gpt2', 'llama'])
def test_prompts_of_different_lengths_in_a_batch_continue_as_each_alone(shape):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    lengths = [9, 2, 5, 20]                             # one is longer than the context, too
    idx = torch.randint(61, (4, 20))
    together = [[] for _ in lengths]
    for tokens, fresh in model.stream(idx, lengths, 12, temperature=0):
        for b in range(4):
            together[b] += [tokens[b].item()] * fresh[b].item()
    for b, n in enumerate(lengths):
        alone = model.generate(idx[b:b + 1, :n], 12, temperature=0)[0, n:].tolist()
        assert together[b] == alone


@pytest.mark.parametrize('at_a_time', [1 << 26, 3000])
def test_muon_is_torchs_muon(at_a_time, monkeypatch):
    monkeypatch.setattr(functions, 'AT_A_TIME', at_a_time)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((48, 16), (16, 48), (48, 16), (16, 16), (64, 16), (48, 16))]
    mine, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    optimizers = (functions.Muon(mine, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'))
    for step in range(4):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape) if step or p is not mine[1] else None    # one has none at first
        for optimizer in optimizers:
            optimizer.step()
    for p, q, w in zip(mine, theirs, start, strict=True):
        assert (p - q).abs().max() < 0.02 * (q - w).abs().max()                             # bfloat16
    states = [o.state_dict() for o in optimizers]
    assert states[0]['param_groups'] == states[1]['param_groups']
    assert states[0]['state'].keys() == states[1]['state'].keys()


def test_one_prompt_of_several_rows_is_read_once_and_each_row_goes_its_own_way():
    model = lively(GPTConfig(**SMALL, **SHAPES['llama']))
    idx, read = torch.randint(61, (1, 9)), []
    alone = model.generate(idx, 12, temperature=0)
    model.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    assert torch.equal(model.generate(idx.expand(3, -1), 12, temperature=0), alone.expand(3, -1))
    assert read[:2] == [(1, 9), (3, 1)]
    assert len(model.generate(idx.expand(8, -1), 4, temperature=2.0).unique(dim=0)) > 1


def test_prompts_of_different_lengths_are_read_at_once():
    model, read = lively(GPTConfig(**SMALL, **SHAPES['gpt2'])), []
    model.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape)))
    list(model.stream(torch.randint(61, (2, 9)), [9, 3], 4))
    assert read == [(2, 9), (2, 1), (2, 1), (2, 1)]


def test_the_cache_takes_several_tokens_at_a_time():
    model = lively(GPTConfig(**SMALL, **SHAPES['llama']))
    idx = torch.randint(61, (2, 12))
    cache = KVCache(model.config, 2, 16)
    with torch.no_grad():
        parts = [model(idx[:, a:b], cache=cache)[0] for a, b in ((0, 4), (4, 9), (9, 10), (10, 12))]
        assert torch.allclose(torch.cat(parts, dim=1), model(idx)[0], atol=1e-4)


def test_rope_turns_pairs_by_position_and_keeps_relative_angles():
    cos, sin = rope_table(32, 8, 10000.0)
    q, k = torch.randn(8), torch.randn(8)
    turned_q = apply_rope(q.expand(1, 1, 32, 8), cos, sin)[0, 0]
    turned_k = apply_rope(k.expand(1, 1, 32, 8), cos, sin)[0, 0]
    # the plain formula: channel i and i + 4 are a complex number, turned by t * 10000^(-2i/8)
    for t in (0, 1, 17):
        z = (q[:4] + 1j * q[4:]).numpy() * np.exp(1j * t * 10000.0 ** (-np.arange(0, 8, 2) / 8))
        assert np.allclose(turned_q[t].numpy(), np.concatenate([z.real, z.imag]), atol=1e-5)
    assert (turned_q[9] @ turned_k[4]).item() == pytest.approx((turned_q[25] @ turned_k[20]).item(), abs=1e-4)


@pytest.mark.parametrize('bias', [True, False])
def test_a_few_rows_in_decoding_are_multiplied_as_by_torchs_linear(bias, monkeypatch):
    torch.manual_seed(0)
    linear = layers.Linear(96, 160, bias=bias)
    exact = torch.nn.Linear(96, 160, bias=bias)
    exact.load_state_dict(linear.state_dict())
    exact, left_to_torch, theirs = exact.double(), [], torch.nn.Linear.forward
    few = [torch.randn(shape) for shape in ((96,), (1, 1, 96), (2, 1, 96), (1, 3, 96), (4, 96))]
    few.append(torch.randn(96, 4).t())                                      # not in one piece
    expected = [exact(x.double()) for x in few]

    def torchs(self, x):
        left_to_torch.append(x.shape)
        return theirs(self, x)
    monkeypatch.setattr(torch.nn.Linear, 'forward', torchs)
    with torch.inference_mode():
        for x, y in zip(few, expected, strict=True):
            assert linear(x).is_contiguous()
            assert torch.allclose(linear(x).double(), y, atol=1e-5) and linear(x).shape == y.shape
        assert not left_to_torch
        linear(torch.randn(5, 96))                                          # more of them are, and what is not float32
        with torch.autocast('cpu', torch.bfloat16):
            assert linear(few[1]).dtype == torch.bfloat16
    linear(few[1]).sum().backward()                                         # and what has a gradient
    assert len(left_to_torch) == 3 and linear.weight.grad is not None


def test_rmsnorm_divides_by_the_root_of_the_mean_square():
    model = GPT(GPTConfig(**SMALL, norm='rmsnorm', norm_eps=1e-6))
    x = torch.randn(5, 32) * 7
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(model.transformer.ln_f(x), expected, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('weighted', [True, False])
def test_rmsnorms_own_gradient_is_that_of_its_formula(weighted, dtype):
    torch.manual_seed(0)
    given = [torch.randn(3, 5, 48).to(dtype), torch.randn(48).to(dtype) if weighted else torch.ones(48).to(dtype)]
    x, weight = (z.clone().requires_grad_() for z in given)
    y, grad = rms_norm(x, weight if weighted else None, 1e-2), torch.randn(3, 5, 48).to(dtype)
    y.backward(grad)
    exact_x, exact_weight = (z.double().requires_grad_() for z in given)
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * exact_weight
    exact.backward(grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    pairs = [(y, exact), (x.grad, exact_x.grad)] + [(weight.grad, exact_weight.grad)] * weighted
    for ours, formula in pairs:
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), formula, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('p', [0.001, 0.2, 0.75])
def test_dropout_drops_at_its_rate_and_scales_up_the_rest_in_both_directions(p, compiled):
    torch.manual_seed(0)
    x = torch.ones(501, 1999, dtype=torch.bfloat16, requires_grad=True)
    y = (torch.compile(dropout) if compiled else dropout)(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y) and sorted(y.unique().tolist()) == [0.0, torch.tensor(1 / (1 - p)).bfloat16().item()]
    n = y.numel()
    assert abs((y == 0).sum().item() - p * n) < 5 * math.sqrt(n * p * (1 - p))          # five standard deviations
    alike = ((y[:, 1:] == 0) == (y[:, :-1] == 0)).double().mean().item()                # and none hangs on the next
    assert abs(alike - p * p - (1 - p) ** 2) < 0.005
    assert torch.equal(dropout(x, 0.0), x)


@pytest.mark.parametrize('shape', ['teaching', 'llama'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_isolated_documents_in_a_window_are_as_each_alone(shape, dtype):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape], document_token=0))
    documents = [torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, 61, (n,))]) for n in (4, 2, 6)]
    with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
        together = model(torch.cat(documents)[None])[0][0]             # with gradients: the way that training goes
        alone = torch.cat([model(d[None])[0][0] for d in documents])
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert (together - alone).abs().max() < tolerance * alone.abs().max().clamp(min=1)
    model.config.document_token = -1
    assert (model(torch.cat(documents)[None])[0][0] - alone).abs().max() > 0.5


@pytest.mark.parametrize('T', [50, 131])            # whole, and in two halves
@pytest.mark.parametrize('masked', [False, True])
def test_attentions_two_ways_are_one(masked, T):
    from model import attention
    q, k, v = (torch.randn(2, n, T, 16, dtype=torch.bfloat16) for n in (4, 2, 2))
    mask = torch.ones(2, 1, T, T, dtype=torch.bool).tril() if masked else None
    if masked:
        mask[:, :, 30:, 10:20] = False
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=not masked, enable_gqa=True)
    fused, plain = attention(q, k, v, mask), attention(q.requires_grad_(), k, v, mask)
    assert 'Attention' not in plain.grad_fn.name()      # it did go the other way
    for y in (fused, plain):
        assert (y.float() - exact).abs().max() < 0.05


def test_both_ways_of_attention_drop_as_many_and_scale_up_the_rest():
    from model import attention
    torch.manual_seed(0)
    q = torch.zeros(50, 4, 64, 16)
    for x in (q, q.to(torch.bfloat16).requires_grad_()):        # fused, and plain
        y = attention(x, torch.zeros_like(x), torch.ones_like(x), p=0.25).float().detach()[..., 0]
        first = y[:, :, 0].flatten()                            # a first token attends to itself alone: all or nothing
        assert first[first > 0].tolist() == pytest.approx([1 / 0.75] * int((first > 0).sum()), rel=0.01)
        assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.1)
        assert y.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_is_off_in_evaluation():
    model = lively(GPTConfig(**SMALL, dropout=0.5))
    idx = torch.randint(61, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(idx)[0], model(idx)[0])
        model.train()
        assert not torch.equal(model(idx)[0], model(idx)[0])


def test_flops_per_token_follow_the_formula():
    model = GPT(GPTConfig(vocab_size=50304, n_layer=2, n_head=2, n_embd=64, block_size=128))
    n = sum(p.numel() for p in model.parameters()) - 128 * 64
    assert model.flops_per_token() == 6 * n + 12 * 2 * 64 * 128


@pytest.mark.parametrize('shape', ['gpt2', 'teaching'])
def test_a_cropped_model_says_the_same_about_short_texts(shape):
    model = lively(GPTConfig(**SMALL, **SHAPES[shape]))
    idx = torch.randint(61, (2, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(ValueError, match='cropped'):
        model.crop_block_size(9)
    with pytest.raises(ValueError, match='block_size'):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize('wrong', [dict(n_head=5), dict(n_kv_head=3), dict(norm='batch'), dict(position='sine'),
                                   dict(mlp='tanh'), dict(n_layer=0), dict(dropout=1.0),
                                   dict(n_embd=20, n_head=4, position='rope')])
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match='|'.join(wrong)):
        GPTConfig(**{**SMALL, **wrong})


# -----------------------------------------------------------------------------
# sampling

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.5]])


def drawn(n=4000, **options):
    g = torch.Generator().manual_seed(0)
    return set(sample_next(LOGITS.expand(n, -1), generator=g, **options).tolist())


def test_temperature_zero_takes_the_likeliest():
    assert drawn(temperature=0) == {0}


def test_top_k_keeps_k():
    assert drawn(top_k=2) == {0, 4}
    assert drawn(top_k=0) == drawn(top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_token_that_crosses_the_threshold():
    p = LOGITS.softmax(-1)[0]                           # 0.46, 0.17, 0.06, 0.02, 0.28
    assert drawn(top_p=p[0].item() - 0.01) == {0}
    assert drawn(top_p=p[0].item() + 0.01) == {0, 4}
    assert drawn(top_p=(p[0] + p[4]).item() + 0.01) == {0, 4, 1}


def test_frequencies_follow_the_softmax():
    g = torch.Generator().manual_seed(0)
    ids = sample_next(LOGITS.expand(40000, -1), temperature=0.7, generator=g)
    expected = (LOGITS[0] / 0.7).softmax(-1)
    assert torch.allclose(torch.bincount(ids, minlength=5) / 40000, expected, atol=0.01)


class Fixed(GPT):
    """A GPT that always answers with the same logits."""

    def forward(self, idx, targets=None, cache=None, last_only=False, reduction='mean'):
        if cache is not None:
            cache.length += idx.size(1)
        return self.fixed.expand(idx.size(0), 1, -1), None


def fixed(logits):
    model = Fixed(GPTConfig(**{**SMALL, 'vocab_size': len(logits)}))
    model.fixed = torch.tensor(logits)
    return model


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once_per_token():
    # token 0 came three times: 4 / 2 = 2 is still above 1.9; were it divided three times, token 1 would win
    assert fixed([4.0, 1.9]).generate(torch.tensor([[0, 0, 0]]), 1, temperature=0, repetition_penalty=2.0)[0, -1] == 0
    # negative ones fall: -1 * 2 = -2 is below -1.5
    assert fixed([-1.0, -1.5]).generate(torch.tensor([[0]]), 1, temperature=0, repetition_penalty=2.0)[0, -1] == 1
    assert fixed([-1.0, -1.5]).generate(torch.tensor([[0]]), 1, temperature=0)[0, -1] == 0


def test_padding_and_suppressed_ids_are_never_sampled():
    model = fixed([0.0, 1.0, 9.0, 9.0])
    for options in (dict(n_vocab=2), dict(suppress=[2, 3])):
        assert set(model.generate(torch.zeros(64, 1, dtype=torch.int64), 5, temperature=2.0, **options)[:, 1:]
                   .flatten().tolist()) == {0, 1}


def test_a_row_ends_at_end_of_text_and_the_batch_when_all_have():
    model = fixed([0.0, 0.0, 0.0, 3.0])
    stream = model.stream(torch.zeros(8, 1, dtype=torch.int64), [1] * 8, 200, eot=3,
                          generator=torch.Generator().manual_seed(1))
    steps = [(t.tolist(), f.tolist()) for t, f in stream]
    assert len(steps) < 200
    for b in range(8):
        mine = [t[b] for t, f in steps if f[b]]
        assert mine.index(3) == len(mine) - 1


def test_rows_that_nothing_is_asked_of_are_left_out_in_few_sizes(monkeypatch):
    """Each number of rows would have a product of its own in oneDNN, which is made and kept."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=65, n_layer=1, n_head=2, n_embd=16))
    sizes, apply = set(), LinearCrossEntropy.apply
    monkeypatch.setattr(LinearCrossEntropy, 'apply', lambda x, *args: sizes.add(len(x)) or apply(x, *args))
    for share in (0.1, 0.3, 0.5, 0.7, 1.0):
        idx, targets = torch.randint(65, (2, 8, 128))
        targets[torch.rand(8, 128) > share] = -100
        _, loss = model(idx, targets)
        logits = model(idx)[0].view(-1, 65)
        assert torch.allclose(loss, F.cross_entropy(logits, targets.view(-1), ignore_index=-100), atol=1e-5)
    assert sizes == {256, 512, 768, 1024}
