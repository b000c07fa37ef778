"""bench.py: the same model on both sides, contestants that do not touch each other, figures that add up."""

import json

import pytest
import torch

import bench
from configurator import UserError
from model import GPT, GPTConfig
from peers import PlainGPT
from scripts import ROOT, run


def test_the_plain_script_trains_the_same_model():
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=61)
    ours, plain = GPT(GPTConfig(**shape, **bench.PLAINLY)), PlainGPT(**shape)
    assert sum(p.numel() for p in plain.parameters()) == ours.num_params()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn_like(p))
    names = {'attn.c_attn': 'c_attn', 'attn.c_proj': 'attn_proj', 'mlp.c_fc': 'c_fc', 'mlp.c_proj': 'mlp_proj'}
    weights = {}
    for name, value in ours.state_dict().items():
        name = name.removeprefix('transformer.')
        name = 'blocks.' + name[2:] if name.startswith('h.') else name
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    plain.load_state_dict(weights)
    x, y = torch.randint(61, (2, 3, 16))
    assert torch.allclose(plain(x)[:, 0], ours(x)[0][:, -1], atol=1e-4)
    assert plain(x, y).item() == pytest.approx(ours(x, y)[1].item(), abs=1e-4)


def test_each_contestant_has_its_turns_and_the_figures_add_up(tmp_path):
    done = run(tmp_path, 'bench.py', '--what=train', '--sizes=0.8M', '--turns=2', '--json=figures.json')
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / 'figures.json').read_text(encoding='utf-8'))['train']['0.8M']
    plain, ours = figures.values()
    assert plain['ratio'] == 1 and ours['ratio'] == pytest.approx(ours['rate'] / plain['rate'])
    assert ours['lowest'] <= ours['rate'] <= ours['highest'] and 0 < ours['MFU'] < 2
    assert len([line for line in done.stdout.splitlines() if line.startswith('training 0.8M')]) == 2


def test_a_contestant_that_cannot_start_is_named_and_left_out(capsys, monkeypatch):
    turn = 'from peers import serve\nserve(lambda: 5.0)'
    tired = 'from peers import serve\nn = []\nserve(lambda: n.append(1) or len(n) < 3 or 1 / 0)'
    contestants = {'well': turn, 'lame': 'raise SystemExit("no legs")', 'tired': tired}
    monkeypatch.chdir(ROOT)
    figures = bench.contest('race', 'm/s', {name: ['-c', code] for name, code in contestants.items()}, turns=3)
    assert figures['well']['rate'] == 5 and list(figures) == ['well']
    said = capsys.readouterr().out
    assert 'race: without lame: no legs' in said and 'race: without tired: ZeroDivisionError' in said
    with pytest.raises(UserError, match='nobody'):
        bench.contest('race', 'm/s', {'lame': ['-c', contestants['lame']]})


def test_our_settings_do_not_reach_a_peer(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('GOMP_SPINCOUNT', '10000')
    turn = ('import os, sys\nfrom peers import serve\n'
            'serve(lambda: 1 + ("GOMP_SPINCOUNT" in os.environ or "configurator" in sys.modules))')
    assert bench.contest('race', 'm/s', {'peer': ['-c', turn], 'other': ['-c', turn]})['peer']['rate'] == 1


def test_a_size_that_is_none_is_an_error(tmp_path):
    done = run(tmp_path, 'bench.py', '--what=train', '--sizes=0.8M,7B')
    assert done.returncode == 2 and "'7B'" in done.stderr
