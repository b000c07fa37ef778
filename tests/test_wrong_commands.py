"""Wrong command lines: each ends in an error of one or two lines, exit status 2, and nothing written or lost."""

import argparse
import re
import shlex
import shutil

import pytest
import torch

from scripts import run

TRAIN = ('train.py --dataset=tiny --device=cpu --dtype=float32 --tensorboard=false --n_layer=1 --n_head=2 --n_embd=16 '
         '--block_size=16 --batch_size=4 --total_batch_size=0 --max_steps=2 --warmup_steps=1 --eval_iters=1 ')
NEW = TRAIN + '--out_dir=new '
SAMPLE = 'sample.py --device=cpu --dtype=float32 --max_new_tokens=4 --prompt=hello '
PREPARE = 'prepare_data.py --dataset=custom --tokenizer=char --out=new '

CASES = [       # the command, and what its message names
    # settings
    ('train.py --lerning_rate=1e-3', ['lerning_rate', 'learning_rate']),
    ('train.py --batch_size=many', ['batch_size', 'many', 'whole number']),
    ('train.py typo.py', ['typo.py', 'lerning_rate', 'learning_rate']),
    ('train.py config/no_such.py', ['config/no_such.py']),
    # train: what to compute with
    (NEW + '--device=tpu', ['tpu', 'cpu']),
    (NEW + '--device=cpu:x', ['cpu:x']),
    (NEW + '--dtype=int8', ['int8', 'bfloat16']),
    (NEW + '--seed=1e10', ['seed', '10000000000']),
    # train: batches and data
    (NEW + '--batch_size=0', ['batch_size', '0']),
    (NEW + '--total_batch_size=100', ['total_batch_size', '100', '64']),
    (NEW + '--block_size=10000', ['10000', 'tokens', '--block_size']),
    (NEW + '--dataset=nowhere', ['nowhere', 'python prepare_data.py --dataset=custom', '--out=data/nowhere']),
    (NEW + '--dataset=zh', ["'zh'", 'python prepare_zh.py']),
    (NEW + '--dataset=empty', ['empty', 'shards']),
    (NEW + '--dataset=half', ['half', 'half made']),
    (NEW + '--dataset=cut', ['train_000000.bin', 'cut short']),
    # train: the model and the optimizer
    (NEW + '--preset=gpt5', ['gpt5', 'gpt2']),
    (NEW + '--n_embd=15', ['n_embd 15', 'n_head 2']),
    (NEW + '--optimizer=sgd', ['sgd', 'adamw']),
    # train: going on from a checkpoint, and where to write
    (TRAIN + '--out_dir=out/tiny --n_embd=32', ['n_embd=16', 'n_embd=32']),
    (TRAIN + '--out_dir=out/tiny --dataset=other', ['tokenizer', 'other']),
    (TRAIN + '--out_dir=out/tiny --optimizer=muon', ['optimizer', 'muon']),
    (TRAIN + '--out_dir=out/tiny --max_steps=1', ['max_steps', 'step 2']),
    (TRAIN + '--out_dir=damaged', ['damaged']),
    (NEW + '--init_from=out/tiny --block_size=32', ['block_size', '32', '16']),
    (TRAIN + '--out_dir=hello.txt', ['hello.txt']),
    (TRAIN + '--out_dir=', ['out_dir']),
    (NEW + '--zero=2', ['zero', '2']),
    (NEW + '--hellaswag_interval=1 --hellaswag_data=nowhere.jsonl', ['nowhere.jsonl']),
    (NEW + '--hellaswag_interval=1 --hellaswag_data=questions.jsonl', ['HellaSwag', "'?at'"]),
    (NEW + '--init_from=gpt3', ['gpt3', 'gpt2-medium']),
    (NEW + '--init_from=outt/tiny', ['outt/tiny', 'did you mean out/tiny?']),
    (NEW + '--init_from=published', ['published', 'tokenizer.json']),
    # evaluate, and export
    ('hellaswag.py --init_from=out/tiny --device=cpu --data=questions.jsonl', ['HellaSwag', "'?at'"]),
    ('hellaswag.py --init_from=out/tiny --device=cpu --data=lines.jsonl', ['lines.jsonl:1', 'ctx', 'endings']),
    ('hellaswag.py --init_from=out/tiny --device=cpu --data=nowhere.jsonl', ['nowhere.jsonl']),
    ('hellaswag.py --init_from=out/tiny --limit=-1', ['limit', '-1']),
    ('export.py --init_from=out/tiny --format=onnx', ['onnx', 'int8', 'hf']),
    ('export.py --init_from=out/tiny --push=me/mine', ['push', '--format=hf']),
    ('export.py --init_from=out/tiny --format=hf --out=data', ['data', '--out']),
    ('export.py --init_from=out/tiny --format=hf --out=nowhere/new', ['nowhere']),
    ('export.py --init_from=out/tiny --format=lora', ['out/tiny', 'no adapters', '--lora_rank']),
    ('export.py --init_from=out/tiny --format=lora --out=data', ['data', '--out']),
    ('export.py --init_from=out/narrow --format=hf', ['n_kv_head=1', '2']),
    ('sample.py --init_from=published', ['published', 'tokenizer.json']),
    ('sample.py --init_from=scaled', ['scaled', 'yarn']),
    # sample
    (SAMPLE + '--out_dir=nowhere', ['nowhere', 'train first']),
    (SAMPLE + '--init_from=nowhere.pt', ['nowhere.pt']),
    ('HF_HUB_OFFLINE=1 ' + SAMPLE + '--init_from=some/model', ['some/model is no folder here', 'HF_HUB_OFFLINE']),
    (SAMPLE + '--init_from=damaged/checkpoint.pt', ['damaged/checkpoint.pt', 'is damaged']),
    (SAMPLE + '--init_from=object.pt', ['object.pt', 'more than']),
    (SAMPLE + '--style=bold', ['bold', 'balanced']),
    (SAMPLE + '--top_p=0', ['top_p', '0.0']),
    (SAMPLE + '--seed=1e30', ['seed']),
    (SAMPLE + '--prompt=hello#', ["'#'"]),
    (SAMPLE + '--prompts_file=nowhere.txt', ['nowhere.txt']),
    (SAMPLE + '--prompts_file=latin.txt', ['latin.txt', 'UTF-8']),
    (SAMPLE + '--output_file=nowhere/answers.txt', ['nowhere']),
    # plot
    ('plot.py out/tinny', ['out/tinny', 'python plot.py out/NAME']),
    ('plot.py --out_dir=nowhere', ['nowhere', 'python plot.py out/NAME']),
    ('plot.py out/tiny --y=los', ["'los'", 'loss', 'val_loss']),
    ('plot.py out/tiny --x=hours', ['hours', 'seconds']),
    ('plot.py out/tiny --y_max=0.001', ['y_max', '0.001', 'lowest']),
    ('plot.py garbled', ['garbled', 'line 2', 'delete that line']),
    ('plot.py out/tiny --output_file=loss.txt', ['loss.txt', '.png']),
    ('plot.py out/tiny --output_file=nowhere/loss.png', ['nowhere']),
    ('plot.py out/tiny --prompt=hello', ['--init_from=out/tiny']),
    ('plot.py --init_from=out/tiny --prompt=hello --layer=1', ['layer', '0', 'not 1']),
    ('plot.py --init_from=out/tiny --prompt="hello hello hello"', ['18', '16', 'shorten']),
    ('plot.py --init_from=out/tiny --prompt=hello#', ["'#'"]),
    # prepare_data
    ('prepare_data.py --dataset=shakspeare', ['shakspeare', 'shakespeare']),
    ('prepare_data.py --dataset=custom', ['--input']),
    ('prepare_data.py --dataset=shakespeare', ['raw.githubusercontent.com', '--input=FILE']),
    (PREPARE + '--input=nowhere.txt', ['nowhere.txt']),
    (PREPARE + '--input=,', ['input', "','"]),
    (PREPARE + '--input=picture.png', ['picture.png', '.txt']),
    (PREPARE + '--input=empty.txt', ['no text']),
    (PREPARE + '--input=latin.txt', ['latin.txt', '0xe9', 'convert']),
    (PREPARE + '--input=lines.jsonl', ['lines.jsonl:2', 'text']),
    (PREPARE + '--input=surrogate.jsonl', ['surrogate.jsonl']),
    (PREPARE + '--input=hello.txt --tokenizer=words', ['words', 'bpe']),
    (PREPARE + '--input=hello.txt --tokenizer=bpe --vocab_size=100', ['vocab_size', '100']),
    (PREPARE + '--input=hello.txt --val_fraction=1.5', ['val_fraction', '1.5']),
    (PREPARE + '--input=hello.txt --out=latin.txt', ['latin.txt', '--out']),
]


def offline(place, words):
    """Run a script of the project in the folder `place`, with no way to the network."""
    words = shlex.split(words)
    variables = dict(word.split('=') for word in words if re.match('[A-Z_]+=', word))
    return run(place, *words[len(variables):], timeout=60, env={
        'PYTHONUTF8': '1', 'TIKTOKEN_CACHE_DIR': str(place / 'no_cache'), 'HTTP_PROXY': 'http://127.0.0.1:9',
        'HTTPS_PROXY': 'http://127.0.0.1:9', **variables})


def files(place, folders=False):
    return {p.relative_to(place).as_posix(): p.read_bytes() if p.is_file() else '' for p in place.rglob('*')
            if folders or p.is_file()}


def check(done, named):
    said = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr + done.stdout
    errors = [i for i, line in enumerate(said) if line.startswith('error:')]
    assert len(errors) == 1 and len(said) - errors[0] <= 2, done.stderr
    # before it, only warnings, and the line in which sample.py says what it has loaded
    assert all(line.startswith('warning:') or ': step ' in line or 'is the newest of 2 runs' in line
               for line in said[:errors[0]]), done.stderr
    message = '\n'.join(said[errors[0]:])
    assert [word for word in named if word not in message] == [], message


@pytest.fixture(scope='session')
def place(tmp_path_factory):
    """A folder with small data sets, a small checkpoint, and much that is wrong."""
    place = tmp_path_factory.mktemp('wrong')
    text = 'hello world.\n' * 300
    (place / 'hello.txt').write_text(text, encoding='utf-8')
    (place / 'loud.txt').write_text(text.upper(), encoding='utf-8')        # as many characters, but others
    good = 'prepare_data.py --dataset=custom --tokenizer=char '
    for line in (good + '--input=hello.txt --out=data/tiny', good + '--input=loud.txt --out=data/other',
                    TRAIN + '--out_dir=out/tiny'):
        done = offline(place, line)
        assert done.returncode == 0, done.stderr
    shutil.copytree(place / 'data/tiny', place / 'data/half')
    (place / 'data/half/meta.json').unlink()
    shutil.copytree(place / 'data/tiny', place / 'data/cut')
    shard = place / 'data/cut/train_000000.bin'
    shard.write_bytes(shard.read_bytes()[:-100])
    (place / 'data/empty').mkdir()
    (place / 'damaged').mkdir()
    damaged = bytearray((place / 'out/tiny/checkpoint.pt').read_bytes())
    damaged[len(damaged) // 2] ^= 1                                        # one bit
    (place / 'damaged/checkpoint.pt').write_bytes(damaged)
    torch.save({'model': {}, 'model_args': argparse.Namespace()}, place / 'object.pt')
    done = offline(place, TRAIN + '--out_dir=out/narrow --n_kv_head=1')
    assert done.returncode == 0, done.stderr
    (place / 'questions.jsonl').write_text('{"ctx": "what?", "endings": ["a", "b", "c", "d"], "label": 0}\n')
    done = offline(place, 'export.py --init_from=out/tiny --format=hf --out=published')
    assert done.returncode == 0, done.stderr
    (place / 'published/tokenizer.json').unlink()
    (place / 'scaled').mkdir()
    (place / 'scaled/config.json').write_text('{"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}')
    (place / 'garbled').mkdir()
    (place / 'garbled/metrics.jsonl').write_text('{"step": 0, "loss": 4.2}\n{"step": 1, "loss": \n{"step": 2}\n')
    (place / 'typo.py').write_text('lerning_rate = 1e-3\n', encoding='utf-8')
    (place / 'empty.txt').write_bytes(b'')
    (place / 'latin.txt').write_bytes('un café, deux cafés\n'.encode('latin-1'))
    (place / 'picture.png').write_bytes(b'\x89PNG')
    (place / 'lines.jsonl').write_text('{"text": "good"}\n{"txet": "bad"}\n', encoding='utf-8')
    (place / 'surrogate.jsonl').write_text('{"text": "half a pair: \\ud800, and more text"}\n', encoding='utf-8')
    return place


@pytest.mark.parametrize('command, named', CASES, ids=[c.replace(TRAIN, 'train.py ').replace(SAMPLE, 'sample.py ')
                                                       .replace(PREPARE, 'prepare_data.py ') for c, _ in CASES])
def test_a_wrong_command_says_in_a_line_or_two_what_is_wrong_and_writes_nothing(place, command, named):
    shutil.rmtree(place / 'new', ignore_errors=True)       # of a test that went wrong
    trains = command.startswith('train.py')                 # and so leaves not even an empty out_dir
    before = files(place, folders=trains)
    done = offline(place, command)
    check(done, named)
    after = files(place, folders=trains)
    assert after.keys() ^ before.keys() == set()
    assert [name for name in before if after[name] != before[name]] == []


@pytest.mark.parametrize('wrong', ['--input=lines.jsonl', '--input=hello.txt --tokenizer=bpe --vocab_size=100'])
def test_a_wrong_command_leaves_the_data_set_of_an_earlier_one_alone(place, tmp_path, wrong):
    shutil.copytree(place / 'data/tiny', tmp_path / 'tiny')
    before = files(tmp_path)
    done = offline(place, f'{PREPARE} --out={tmp_path.as_posix()}/tiny {wrong}')
    check(done, [])
    after = files(tmp_path)
    assert [name for name in before if after.get(name) != before[name]] == []


def test_a_damaged_checkpoint_is_passed_over_for_a_good_one(place, tmp_path):
    shutil.copytree(place / 'out/tiny', tmp_path / 'run')
    shutil.copy(place / 'damaged/checkpoint.pt', tmp_path / 'run' / 'best_checkpoint.pt')
    done = offline(place, f'{SAMPLE} --out_dir={tmp_path.as_posix()}/run')
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith('warning:') and 'best_checkpoint.pt is damaged' in done.stderr
    assert done.stdout.startswith('[Sample 1] hello')
