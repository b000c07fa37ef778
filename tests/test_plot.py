"""plot.py: curves are the numbers of the runs, in pictures and in letters; attention is the model's own, and that of
transformers; and no picture, nor the lack of one, harms a run."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from configurator import UserError
from model import GPT, GPTConfig
from plot import (columns, cell, curve, draw_attention, in_letters, legible, look_inside, read_curves, read_metrics,
                  save_curves, save_picture, table, visible)
from scripts import patched, run
from tokenizer import train_bpe, train_char

WITHOUT = 'sys.modules["matplotlib"] = None'                # as where it is not installed
BROKEN = 'import matplotlib.figure\ndef broken(*_, **__): raise OSError(28, "No space left on device")\n' \
         'matplotlib.figure.Figure.savefig = broken'
TINY = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--total_batch_size=0', '--warmup_steps=2', '--eval_iters=2', '--device=cpu', '--dtype=float32',
        '--tensorboard=false', '--max_steps=12', '--eval_interval=4']


@pytest.fixture
def matplotlib():
    return pytest.importorskip('matplotlib')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a small data set, and a run in out/tiny."""
    place = tmp_path_factory.mktemp('plot')
    (place / 'text.txt').write_text('the cat sat on the mat. 猫坐在垫子上。\n' * 100, encoding='utf-8')
    for args in (['prepare_data.py', '--dataset=custom', '--input=text.txt', '--tokenizer=char', '--out=data/tiny'],
                 ['train.py', *TINY, '--out_dir=out/tiny']):
        done = run(place, *args)
        assert done.returncode == 0, done.stderr
    return place


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(folder)


def step(i, loss, tokens=10, seconds=0.5):
    return {'step': i, 'loss': loss, 'lr': 1e-3, 'tokens': (i + 1) * tokens, 'elapsed_s': (i + 1) * seconds}


@pytest.fixture
def two_runs(tmp_path):
    """Two runs' folders and what is in them: validation before steps 0, 2 and 4 of four, and before 0 of two."""
    a = [{'step': 0, 'val_loss': 5.0}, step(0, 4.9), step(1, 4.0), {'step': 2, 'val_loss': 3.5}, step(2, 3.4),
         step(3, 3.0), {'step': 4, 'val_loss': 2.9, 'ppl': 18.2}]
    b = [{'step': 0, 'val_loss': 5.1}, step(0, 5.0, tokens=20), step(1, float('nan'), tokens=20)]
    return [write_run(tmp_path / 'out/a', a), write_run(tmp_path / 'out/_b', b)]


def is_png(path, least=5000):
    content = path.read_bytes()
    return content[:8] == b'\x89PNG\r\n\x1a\n' and content[-8:-4] == b'IEND' and len(content) > least


# -----------------------------------------------------------------------------
# curves

EXPECTED = {        # x: run a's loss, run a's val_loss; an evaluation stands where the steps before it have led to
    'steps': ([0, 1, 2, 3], [0, 2, 4]),
    'tokens': ([10, 20, 30, 40], [0, 20, 40]),
    'seconds': ([0.5, 1.0, 1.5, 2.0], [0, 1.0, 2.0]),
}


@pytest.mark.parametrize('x', EXPECTED)
def test_curves_are_the_numbers_in_metrics_jsonl(two_runs, x):
    curves = read_curves(two_runs, '', x)
    loss, val_loss = EXPECTED[x]
    assert curves['a'] == {'loss': list(zip(loss, [4.9, 4.0, 3.4, 3.0], strict=True)),
                           'val_loss': list(zip(val_loss, [5.0, 3.5, 2.9], strict=True))}
    assert [len(points) for points in curves['_b'].values()] == [1, 1]       # what is not finite is nowhere
    assert read_curves(two_runs[:1], 'ppl', x) == {'a': {'ppl': [(val_loss[-1], 18.2)]}}


def test_an_evaluation_between_logged_steps_or_behind_the_last_is_placed_in_proportion(tmp_path):
    # every tenth step is logged; a step takes 7 tokens, and 2 seconds, from step 11 on 4
    rows = [step(0, 1.0, 7, 2.0), step(10, 1.0, 7, 2.0), {**step(20, 1.0, 7), 'elapsed_s': 62.0}]
    rows += [{'step': i, 'val_loss': 1.0} for i in (0, 5, 14, 30)]
    rows = read_metrics(write_run(tmp_path / 'run', rows))
    assert [at for at, _ in curve(rows, 'val_loss', 'tokens')] == pytest.approx([0, 35, 98, 210])
    assert [at for at, _ in curve(rows, 'val_loss', 'seconds')] == pytest.approx([0, 10, 34, 98])


def test_a_picture_has_these_curves_labels_and_units(two_runs, tmp_path, matplotlib):
    curves = read_curves(two_runs, '', 'tokens')
    figure, names = save_curves(tmp_path / 'loss.png', curves, '', 'tokens')
    assert is_png(tmp_path / 'loss.png')
    axes, = figure.axes
    lines = axes.get_lines()
    drawn = [list(map(tuple, line.get_xydata())) for line in lines]
    assert drawn == [points for run in curves.values() for points in run.values()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('training tokens', 'loss (nats per token)')
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names == ['a', '_b']
    a_loss, a_val, _, b_val = lines
    assert a_loss.get_linewidth() < 1 < a_val.get_linewidth() and a_loss.get_marker() == 'None'
    assert a_val.get_linestyle() != b_val.get_linestyle() and a_val.get_marker() != b_val.get_marker()
    assert a_val.get_color() != b_val.get_color() and a_val.get_color() == a_loss.get_color()


def test_letters_stand_where_the_curves_are(two_runs):
    width, height = 72, 13
    curves = read_curves(two_runs[:1], '', 'tokens')
    label, *rows, ruler, below, name, meaning = in_letters(curves, '', 'tokens', 0, width, height)
    assert (label, name) == ('loss (nats per token)', 'A = a') and 'training tokens' in below and 'capitals' in meaning
    assert below.split()[0] == '0' and below.split()[-1] == '40' and len(below) == len(ruler) == width - 1
    assert len(rows) == height and float(rows[0].split()[0]) == 5.0 and float(rows[-1].split()[0]) == 2.9
    found = {(letter, at * 40 / 59, 5 - i * (5 - 2.9) / (height - 1))
             for i, row in enumerate(rows) for at, letter in enumerate(row[11:]) if letter != ' '}
    expected = {('Aa'[key == 'loss'], at, value) for key, points in curves['a'].items() for at, value in points}
    for letter, at, value in expected:      # within half a character
        assert any(letter == f[0] and abs(at - f[1]) < 0.34 and abs(value - f[2]) < 0.088 for f in found), (letter, at)
    assert len(found) == len(expected) == 7
    _, *rows, _, _, _, _ = in_letters(curves, '', 'tokens', 3.5, width, height)
    assert float(rows[0].split()[0]) == 3.5 and sum(row[11:].lower().count('a') for row in rows) == 4


def test_what_is_above_y_max_is_cut_off(two_runs, tmp_path, matplotlib):
    curves = read_curves(two_runs)
    figure, _ = save_curves(tmp_path / 'loss.png', curves, y_max=3.5)
    bottom, top = figure.axes[0].get_ylim()
    assert top == 3.5 and 2.8 < bottom < 2.9
    assert len(figure.axes[0].get_lines()[0].get_xydata()) == 4     # the rest is outside, so that no line misses points


def test_a_line_that_is_being_written_is_left_out_and_a_damaged_one_named(tmp_path):
    log = tmp_path / 'metrics.jsonl'
    log.write_text('{"step": 0, "loss": 4.0}\n{"step": 1, "lo', encoding='utf-8')
    assert read_metrics(tmp_path) == [{'step': 0, 'loss': 4.0}]
    for bad in ('{"step": 1, "lo\n', '[1]\n', '{"loss": 1.0}\n', '{"step": 1, "loss": "low"}\n', '{"step": NaN}}\n'):
        log.write_text('{"step": 0, "loss": 4.0}\n' + bad + '{"step": 2}\n', encoding='utf-8')
        with pytest.raises(UserError, match='line 2 is damaged'):
            read_metrics(tmp_path)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no such device')
@pytest.mark.timeout(60)
def test_a_log_that_is_led_to_a_device_is_not_read_without_end(tmp_path):
    (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
    with pytest.raises(UserError, match='there is no file'):
        read_metrics(tmp_path)


def test_the_script_draws_a_run_several_and_the_newest(place, matplotlib):
    (place / 'out/tiny/loss.png').unlink(missing_ok=True)
    for args, made in ([['out/tiny'], 'out/tiny/loss.png'], [['--y=tok_per_sec', '--x=seconds'],
                        'out/tiny/tok_per_sec.png'], [['--runs=out/tiny,.', '--output_file=both.png'], 'both.png']):
        (place / 'metrics.jsonl').write_text('{"step": 0, "loss": 4.0}\n', encoding='utf-8')
        done = run(place, 'plot.py', *args)
        assert (done.returncode, done.stderr) == (0, ''), done.stderr
        assert is_png(place / made) and done.stdout == f'wrote {made}\n'
        (place / made).unlink()


def test_names_that_no_font_can_write_become_numbers(matplotlib):
    assert legible(['a', '_$\\frac$']) == (['DejaVu Sans'], ['a', '_$\\frac$'])
    assert legible(['a', '\ue123\U0010fffd']) == (['DejaVu Sans'], ['0', '1'])
    from matplotlib import font_manager, ft2font, get_data_path
    usual, other = (Path(get_data_path(), 'fonts/ttf', name) for name in ('DejaVuSans.ttf', 'STIXGeneral.ttf'))
    font_manager.fontManager.addfont(other)             # a list of fonts kept from another installation may lack it
    usual, other = (ft2font.FT2Font(path).get_charmap().keys() for path in (usual, other))
    rare = chr(min(other - usual - set(range(0x20))))           # both come with matplotlib
    (_, found), labels = legible(['a', rare])
    assert labels == ['a', rare]
    assert ord(rare) in ft2font.FT2Font(font_manager.findfont(found)).get_charmap()


def test_names_that_mean_something_to_matplotlib_are_only_names(tmp_path, matplotlib):
    folders = [write_run(tmp_path / name, [step(i, 4.0 - i) for i in range(3)]) for name in ('a$_$b', '_b', 'c%d')]
    figure, _ = save_curves(tmp_path / 'loss.png', read_curves(folders))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ['a$_$b', '_b', 'c%d']


# -----------------------------------------------------------------------------
# without matplotlib, and at the end of training

def test_without_matplotlib_there_is_a_chart_of_letters(place):
    before = sorted(p.name for p in (place / 'out/tiny').iterdir())
    script = patched(place, WITHOUT)
    done = run(place, script, 'plot.py', 'out/tiny', env={'COLUMNS': '60'})
    assert done.returncode == 0 and 'pip install matplotlib' in done.stderr and 'Traceback' not in done.stderr
    assert done.stdout.startswith('loss (nats per token)\n') and 'A = tiny' in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 60
    assert run(place, 'plot.py', 'out/tiny', '--terminal', env={'COLUMNS': '60'}).stdout == done.stdout
    done = run(place, script, 'plot.py', 'out/tiny', '--output_file=loss.png')
    assert done.returncode == 2 and 'pip install matplotlib' in done.stderr and 'Traceback' not in done.stderr
    done = run(place, script, 'plot.py', '--prompt=the cat', '--init_from=out/tiny')
    assert done.returncode == 0 and 'likely to follow' in done.stdout and 'Traceback' not in done.stderr
    assert sorted(p.name for p in (place / 'out/tiny').iterdir()) == before and not (place / 'attention.png').exists()


def test_a_run_ends_with_its_picture(place, matplotlib):
    done = run(place, 'train.py', *TINY, '--out_dir=out/drawn')
    assert (done.returncode, done.stderr) == (0, '') and is_png(place / 'out/drawn/loss.png')


@pytest.mark.parametrize('code', [WITHOUT, BROKEN], ids=['missing', 'broken'])
def test_a_run_is_not_harmed_by_a_picture_that_cannot_be(place, code):
    if code == BROKEN:
        pytest.importorskip('matplotlib')
    out = 'out/missing' if code == WITHOUT else 'out/broken'
    done = run(place, patched(place, code), 'train.py', *TINY, f'--out_dir={out}', processes=1 + (code == BROKEN))
    assert done.returncode == 0, done.stderr
    warnings = re.findall('^.*loss.png.*$', done.stderr, re.M)      # of one process of all
    assert warnings == [] if code == WITHOUT else len(warnings) == 1 and 'No space left' in warnings[0]
    assert 'Traceback' not in done.stderr and (place / out / 'final_checkpoint.pt').exists()
    assert not list((place / out).glob('loss.png*')) and not (place / out / 'run.lock').exists()


# -----------------------------------------------------------------------------
# a prompt in a model

LLAMA = dict(vocab_size=60, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)


@pytest.mark.parametrize('config', [GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=3, n_head=4),
                                    LlamaConfig(**LLAMA)], ids=['gpt2', 'llama'])
def test_attention_and_logits_are_those_of_transformers(config, tmp_path):
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)
    ours, ids = GPT.from_pretrained(str(tmp_path)), torch.randint(60, (20,)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids]), output_attentions=True)
    for layer in (0, 1, -1):
        logits, weights = look_inside(ours, ids, layer)
        assert weights.shape == (4, 20, 20) and expected.attentions[layer].std() > 0.05
        assert (weights - expected.attentions[layer][0]).abs().max() < 1e-5
        assert (logits - expected.logits[0]).abs().max() < 1e-4
        assert (weights.sum(-1) - 1).abs().max() < 1e-5 and weights.triu(1).abs().max() == 0


@pytest.mark.parametrize('options', [dict(), dict(n_kv_head=1, position='rope', qk_norm=True, norm='rmsnorm'),
                                     dict(document_token=3)], ids=str)
@torch.no_grad()
def test_attention_times_the_values_is_what_the_model_goes_on_with(options):
    torch.manual_seed(2)
    config = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=4, n_embd=32, **options)
    model, seen = GPT(config).eval(), {}
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.3)
    attn = model.transformer.h[1].attn
    attn.c_attn.register_forward_hook(lambda _, args, output: seen.setdefault('qkv', output))
    attn.c_proj.register_forward_pre_hook(lambda _, args: seen.setdefault('heads', args[0]))
    ids = [3, 5, 7, 9, 3, 11, 13]
    _, weights = look_inside(model, ids, 1)
    assert len(attn._forward_pre_hooks) == 0                                    # the model is as it was
    values = seen['qkv'][0, :, (4 + config.n_kv_head) * 8:].view(7, config.n_kv_head, 8)
    heads = torch.stack([weights[h] @ values[:, h * config.n_kv_head // 4] for h in range(4)], dim=1)   # (T, nh, hs)
    assert (heads.reshape(7, 32) - seen['heads'][0]).abs().max() < 1e-5
    if options.get('document_token'):
        assert weights[:, 4:, :4].abs().max() == 0                              # another document


def test_the_likeliest_next_tokens_are_topk_of_a_plain_forward_pass(place):
    done = run(place, 'plot.py', '--prompt=the cat 猫', '--init_from=out/tiny', '--terminal')
    assert done.returncode == 0, done.stderr
    from checkpoint import load_for_use
    model, chars, *_ = load_for_use(str(place / 'out/tiny'), 'out', 'cpu', 'float32')
    ids = [chars.eot, *chars.encode('the cat 猫')]
    with torch.no_grad():
        p, likeliest = F.softmax(model(torch.tensor([ids]))[0][0], dim=-1).topk(5)
    head, *rows = done.stdout.splitlines()
    assert head.split() == ['place', 'token', 'likely', 'to', 'follow'] and len(rows) == len(ids)
    for i, row in enumerate(rows):
        named = {' ': '␣', '\n': '↵', '': '<eot>'}
        texts = [named.get(text, text) for text in map(chars.decode, [[id] for id in (ids[i], *likeliest[i].tolist())])]
        expected = [f'{text} {q:.1%}' for text, q in zip(texts[1:], p[i], strict=True)]
        assert row.split() == ' '.join([str(i), texts[0], *expected]).split()


def test_chinese_takes_two_columns_of_a_table():
    assert columns('猫a，é') == 6 and columns('e\u0301') == 1
    assert cell('猫猫猫', 5) == '猫猫…' and cell('猫猫猫', 4) == '猫… ' and cell('猫', 4) == '猫  '
    lines = table(['猫', 'on the mat', '猫猫猫猫猫猫猫猫猫'],
                  [[('的', 0.5), ('a', 0.25)], [('b', 1.0), ('猫猫', 0.0)], [('c', 1), ('d', 0)]])
    # GBK has two bytes where a terminal has two columns, also for the ellipsis, which takes only one
    assert len({len(line.replace('…', '.').encode('gbk')) for line in lines[1:]}) == 1


def test_tokens_show_white_space_and_what_is_no_character():
    bpe = train_bpe(['the cat\tsat\n\n猫'] * 9, 265)
    by_text = {bpe.decode([i]): i for i in range(bpe.vocab_size)}
    assert visible(bpe, bpe.eot) == '<eot>' and visible(bpe, by_text[' ']) == '␣' and visible(bpe, by_text['\n']) == '↵'
    first, *_ = bpe.encode('龍')                                                # a byte of three
    assert visible(bpe, first) == f'#{first}' and visible(bpe, by_text['\x00']) == '\\x00'
    assert all(visible(bpe, i).isprintable() for i in range(bpe.vocab_size))
    chars = train_char(['a\u3000\t'])
    assert [visible(chars, i) for i in range(chars.vocab_size)] == ['⇥', 'a', '\\u3000', '<eot>']


def test_the_map_of_attention_has_a_panel_a_head_and_the_tokens_on_its_axes(tmp_path, matplotlib):
    weights = torch.rand(5, 6, 6).tril()
    weights /= weights.sum(-1, keepdim=True)
    figure = save_picture(tmp_path / 'a.png', (6, 4), ['DejaVu Sans'], draw_attention, weights.numpy(), list('the␣ca'),
                          'layer 1')
    assert is_png(tmp_path / 'a.png', 10_000)
    panels = [axes for axes in figure.axes if axes.get_images()]
    assert [axes.get_title() for axes in panels] == [f'head {i}' for i in range(5)]
    for axes, expected in zip(panels, weights, strict=True):
        assert torch.equal(torch.tensor(axes.get_images()[0].get_array()), expected)
        assert axes.get_images()[0].get_clim() == (0, 1)
    labels = [[[text.get_text() for text in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)]
              for axes in panels]
    assert labels == [[[], list('the␣ca')], [[], []], [[], []], [list('the␣ca')] * 2, [list('the␣ca'), []]]


def test_the_script_writes_the_map_of_a_prompt(place, matplotlib):
    done = run(place, 'plot.py', '--prompt=the cat', '--layer=0', '--init_from=out/tiny')
    assert done.returncode == 0 and done.stdout.endswith('\nwrote attention.png\n'), done.stderr
    assert is_png(place / 'attention.png')
