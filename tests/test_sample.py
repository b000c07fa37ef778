"""sample.py: the function that others import, and the script. checkpoint.py: what is loaded and what is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch

import hellaswag
from checkpoint import build_model, load_checkpoint, pick_checkpoint, save_checkpoint, tokenizer_of
from configurator import UserError
from model import GPT, GPTConfig
from sample import STYLES, generate_texts
from scripts import run
from tokenizer import train_bpe, train_char

TEXT = 'the cat sat on the mat. 猫坐在垫子上。🐈 ' * 20


def lively(vocab_size, **changes):
    torch.manual_seed(3)
    model = GPT(GPTConfig(**{**dict(block_size=32, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32), **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope='module')
def bpe():
    return train_bpe([TEXT], 300)


def sample(place, *args, stdin=''):
    return run(place, 'sample.py', '--device=cpu', *args, input=stdin)


@pytest.fixture(scope='module')
def place(tmp_path_factory, bpe):
    """A folder with a run in out/tiny whose checkpoint stands alone: no data set is there."""
    place = tmp_path_factory.mktemp('sample')
    model = lively(bpe.vocab_size)
    (place / 'out/tiny').mkdir(parents=True)
    save_checkpoint(place / 'out/tiny', {
        'model': model.state_dict(), 'model_args': model.model_args(), 'iter_num': 7, 'tokenizer': bpe.state(),
        'tokenizer_fingerprint': bpe.fingerprint}, ['checkpoint.pt', 'best_checkpoint.pt'])
    return place


# -----------------------------------------------------------------------------
# generate_texts

def test_the_same_seed_gives_the_same_texts_and_another_seed_others(bpe):
    model = lively(bpe.vocab_size)
    first, again, other = (generate_texts(['the', 'cat'], model, bpe, seed=s, max_new_tokens=20) for s in (1, 1, 2))
    assert first == again != other


def test_greedy_texts_do_not_depend_on_the_batch_or_the_order(bpe):
    model = lively(bpe.vocab_size)
    prompts = ['the cat', '猫', '', 'on the mat. the cat sat', 'a']
    together = generate_texts(prompts, model, bpe, temperature=0, max_new_tokens=40)
    assert together == [generate_texts([p], model, bpe, temperature=0, max_new_tokens=40)[0] for p in prompts]
    assert together == generate_texts(prompts, model, bpe, temperature=0, max_new_tokens=40, batch_size=2)
    assert together[::-1] == generate_texts(prompts[::-1], model, bpe, temperature=0, max_new_tokens=40)


def test_ever_new_shapes_do_not_meet_the_attention_that_plans_for_each():
    # cuDNN's, the first choice on new GPUs: a plan for every length would be most of the time of decoding
    chars, seen = train_char(['abc']), []
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=chars.vocab_size)).eval()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    generate_texts(['a'], model, chars, max_new_tokens=2)
    hellaswag.evaluate(model, [hellaswag.Question((0, 1), ((1,), (2,), (0,), (1, 2)), 0, {})])
    assert len(seen) >= 2 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_stop_string_ends_the_text_and_is_cut_from_it(bpe):
    model = lively(bpe.vocab_size)
    whole = generate_texts(['the'], model, bpe, temperature=0, max_new_tokens=30)[0]
    stop = whole[9:12]
    assert generate_texts(['the'], model, bpe, temperature=0, max_new_tokens=30, stop=stop)[0] == whole.split(stop)[0]


def test_streamed_text_only_grows_and_ends_as_the_returned_one(bpe):
    model = lively(bpe.vocab_size)
    for stop in ('', '。', 'mat'):
        heard = []
        texts = generate_texts(['猫'], model, bpe, temperature=1.0, max_new_tokens=60, stop=stop, seed=4,
                               on_text=lambda i, text, heard=heard: heard.append(text))
        assert all(b.startswith(a) for a, b in zip(heard, heard[1:], strict=False))
        assert texts[0].startswith(heard[-1]) and not any(text.endswith('\ufffd') for text in heard)
        assert len(set(heard)) > 3


def test_the_template_wraps_the_prompt(bpe):
    model, read = lively(bpe.vocab_size), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    generate_texts(['猫'], model, bpe, template='用户:{prompt}\n助手:', temperature=0, max_new_tokens=1)
    assert read[0].tolist() == [[bpe.eot, *bpe.encode('用户:猫\n助手:')]]


def test_ids_that_only_pad_the_vocabulary_never_come_out():
    chars = train_char(['abc'])
    model = lively(64)
    with torch.no_grad():
        model.lm_head.weight[4:] *= 100                 # the padding ids would win otherwise
    assert set(generate_texts(['a'] * 30, model, chars, max_new_tokens=10, temperature=1.0, top_p=1.0)[0]) <= set('abc')


# -----------------------------------------------------------------------------
# the script

def test_the_newest_run_is_found_and_the_output_is_in_the_documented_form(place):
    done = sample(place, '--prompt=the', '--style', 'creative', '--num_samples=3', '--max_new_tokens=8')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('[Sample 1] the') and '\n[Sample 3] the' in done.stdout
    assert done.stdout.endswith('✔ Generation complete.\n')


def test_prompts_from_a_file_go_to_a_file(place):
    (place / 'prompts.txt').write_text('\ufeffthe cat\n\n猫坐\n', encoding='utf-8')
    done = sample(place, '--prompts_file=prompts.txt', '--output_file=answers.jsonl', '--temperature=0',
                  '--dtype=float32')
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (place / 'answers.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [r['prompt'] for r in rows] == ['the cat', '猫坐']
    path, checkpoint = pick_checkpoint(str(place / 'out/tiny'), 'out')
    texts = generate_texts(['the cat', '猫坐'], build_model(checkpoint), tokenizer_of(checkpoint), temperature=0)
    assert [r['text'] for r in rows] == texts


def test_interactive_answers_until_the_input_ends(place):
    done = sample(place, '--interactive', '--max_new_tokens=5', stdin='the\ncat\n')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('[Sample 1]') == 2 and '[Sample 1] cat' in done.stdout


def test_a_setting_by_hand_wins_over_the_style(place):
    # wild keeps every token; with top_k=1 by hand it is greedy all the same
    wild = sample(place, '--style=wild', '--top_k=1', '--prompt=the', '--dtype=float32', '--max_new_tokens=20').stdout
    greedy = sample(place, '--temperature=0', '--prompt=the', '--dtype=float32', '--max_new_tokens=20').stdout
    assert wild == greedy
    assert STYLES['wild'] == (1.3, 0, 1.0) and STYLES['creative'] == (0.9, 100, 0.95)


# -----------------------------------------------------------------------------
# checkpoints

def test_nanogpts_own_checkpoint_loads_and_samples(tmp_path):
    """As nanoGPT writes them: torch.compile's prefix, its six model_args, characters in the data set's meta.pkl."""
    chars = sorted(set('abcdefgh \n'))
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, bias=False, vocab_size=len(chars), dropout=0.0)
    model = lively(len(chars), bias=False, mlp='gelu_erf')
    (tmp_path / 'data/letters').mkdir(parents=True)
    (tmp_path / 'out').mkdir()
    torch.save({'model': {'_orig_mod.' + k: v for k, v in model.state_dict().items()}, 'optimizer': {}, 'iter_num': 5,
                'model_args': args, 'best_val_loss': torch.tensor(1.5), 'config': {'dataset': 'letters'}},
               tmp_path / 'out/ckpt.pt')
    (tmp_path / 'data/letters/meta.pkl').write_bytes(pickle.dumps({
        'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}))
    loaded = build_model(load_checkpoint(tmp_path / 'out/ckpt.pt'))
    idx = torch.randint(len(chars), (2, 9))
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    done = sample(tmp_path, '--prompt=abc', '--max_new_tokens=5')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('[Sample 1] abc')


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path('sprung'),))


@pytest.mark.parametrize('content', ['trap', 'flipped', 'cut', 'empty', 'list', 'text'])
def test_what_is_not_a_whole_checkpoint_of_plain_data_is_refused(tmp_path, place, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = (place / 'out/tiny/checkpoint.pt').read_bytes()
    path = tmp_path / 'bad.pt'
    if content == 'trap':
        torch.save({'model': Trap(), 'model_args': {}}, path)
    elif content == 'list':
        torch.save([1, 2], path)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 4
        path.write_bytes({'flipped': bytes(flipped), 'cut': good[:-1000], 'empty': b'', 'text': b'hello'}[content])
    with pytest.raises(UserError, match='bad.pt'):
        load_checkpoint(path)
    assert not Path('sprung').exists()


def test_a_tokenizer_that_does_not_match_its_fingerprint_is_refused(bpe):
    with pytest.raises(UserError, match='fingerprint'):
        tokenizer_of({'tokenizer': bpe.state(), 'tokenizer_fingerprint': 'of another'})
