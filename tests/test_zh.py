"""The Chinese questions and answers: the data, their preparation, what is trained on, and how they are answered."""

import atexit
import functools
import importlib.util
import io
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import Hub

from checkpoint import (BEST, FINAL, LATEST, average_with, build_model, load_checkpoint, save_checkpoint,
                        tokenizer_of)
from dataset import TokenDataset, dataset_tokenizer, read_meta
from eval_zh import SETS, as_question, count, evaluate, load_questions, read_questions
from model import GPT, GPTConfig
import sample
from sample import begins_badly, generate_answers, generate_texts, manners, not_first, probabilities, undo_slips
from scripts import ROOT, run
from tokenizer import conversation, normalize_question, train_bpe

DATA = ROOT / 'data' / 'zh_qa'
FILES = ('train', 'val', *SETS)


def load_build():
    spec = importlib.util.spec_from_file_location('build', DATA / 'build.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


build = load_build()
UNKNOWN = build.UNKNOWN


def copy_of_the_set(place):
    for path in DATA.iterdir():
        if path.suffix in ('.tsv', '.txt', '.py'):
            (place / path.name).write_bytes(path.read_bytes())


@functools.cache
def built():
    """A folder with the set as build.py makes it."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place)
    copy_of_the_set(place)
    subprocess.run([sys.executable, str(place / 'build.py')], check=True, capture_output=True)
    return place


@functools.cache
def rows(name):
    """The lines of a file, as questions: of a conversation, {'prompt': [turns]}."""
    return [as_question(json.loads(line)) for line in (built() / f'{name}.jsonl').read_text('utf-8').splitlines()]


def asked(row):
    return row['prompt'] if isinstance(row['prompt'], str) else tuple(row['prompt'])


def prepare(place, *args):
    return run(place, 'prepare_zh.py', *args)


def made(place, *args, out='made'):
    done = prepare(place, f'--out={out}', *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -----------------------------------------------------------------------------
# the set that ships

def test_every_line_is_a_question_and_an_answer():
    for name in FILES:
        for row in rows(name):
            assert row.keys() - {'also'} == {'prompt', 'completion'} and ('also' not in row or name == 'heldout_talk')
            texts = [*([row['prompt']] if isinstance(row['prompt'], str) else row['prompt']), row['completion']]
            assert all(isinstance(v, str) and v == v.strip() and v and '\n' not in v for v in texts), row
            assert row['completion'][-1] in '。！？' and not begins_badly(row['completion'])
            assert len(row['completion']) <= 60


def test_no_question_is_in_two_files_or_twice():
    questions = [asked(row) for name in FILES for row in rows(name)]
    assert len(questions) == len(set(questions))


def test_there_are_1500_facts_each_asked_in_many_ways_and_no_two_share_an_answer():
    facts = build.read_facts(DATA / 'facts.tsv')
    answers = {fact.answer for fact in facts}
    assert len(facts) == len(answers) >= 1500
    ways = {name: {} for name in FILES}
    for name in FILES:
        for row in rows(name):
            ways[name].setdefault(row['completion'], set()).add(asked(row))
    for answer in answers:
        assert len(ways['train'][answer]) >= 4
        assert len(ways['val'][answer]) == len(ways['heldout'][answer]) == 1
    talk = {answer for _, (_, which, answer, *_) in build.table(DATA / 'smalltalk.tsv', 3, 1) if which == 'answer'}
    more = {fact.more for fact in facts} | {build.NO_MORE}
    assert set(ways['train']) <= {*answers, *talk, *more, UNKNOWN, build.FOLLOW}
    assert len(ways['heldout_forms']) >= 600 and set(ways['heldout_forms']) <= answers


def test_in_small_talk_another_answer_may_fit_as_well():
    answers = {row['completion'] for row in rows('heldout_talk')}
    also = [row for row in rows('heldout_talk') if 'also' in row]
    assert 20 <= len(also) <= len(rows('heldout_talk')) / 5         # it stays an exception
    for row in also:
        assert row['completion'] not in row['also'] and set(row['also']) <= answers and len(row['also']) <= 3


def test_what_is_asked_in_an_examination_is_enough():
    sizes = {name: len(rows(name)) for name in SETS}
    assert sizes['heldout_forms'] >= 600 and sizes['heldout_near'] >= 300 and sizes['heldout_slips'] >= 300, sizes
    assert sizes['heldout_talk'] >= 150 and sizes['heldout_turns'] >= 200 and sizes['heldout_unknown'] >= 200, sizes


def test_at_least_150_questions_are_out_of_scope_and_others_of_them_held_out():
    assert sum(row['completion'] == UNKNOWN for row in rows('train')) >= 150
    held_out = rows('heldout_unknown')
    assert len(held_out) >= 100 and {row['completion'] for row in held_out} == {UNKNOWN}
    topics = [topic for _, (_, topic) in build.table(DATA / 'unknown_topics.tsv', 2)]
    learned = {t for t in topics if any(t in row['prompt'] for row in rows('train') if isinstance(row['prompt'], str))}
    assert sum(any(t in row['prompt'] for t in topics if t not in learned) for row in held_out) >= 100


def test_everybodys_first_questions_are_asked_and_held_out():
    questions = {row['prompt'] for row in rows('heldout')}
    assert {'什么是注意力机制？', '解释蒸馏水与纯水区别？'} <= questions


def test_unseen_forms_are_in_no_question_of_training():
    """Nor are the held-out slips of the pen and near misses."""
    known = {fact.answer: fact for fact in build.read_facts(DATA / 'facts.tsv')}
    unseen = {}
    for _, (kind, which, form) in build.table(DATA / 'forms.tsv', 3):
        if which == 'unseen':
            unseen.setdefault(kind, []).append(form)

    def ways(fact):
        for form in unseen[fact.kind]:
            for parts in itertools.product(*fact.names):
                yield build.fill(form, fact.kind, parts)

    for row in rows('heldout_forms'):
        assert row['prompt'] in ways(known[row['completion']]), row
    for row in rows('train'):
        if row['completion'] in known and isinstance(row['prompt'], str):
            assert not any(way.rstrip('。？') in row['prompt'] for way in ways(known[row['completion']])), row


def test_the_files_that_ship_are_what_build_py_makes_of_the_facts():
    for name in ('val', *SETS):
        assert (built() / f'{name}.jsonl').read_bytes() == (DATA / f'{name}.jsonl').read_bytes()


@pytest.mark.parametrize('file, line, said', [
    ('facts.tsv', 'define 空格 空格不是制表符。', 'columns are expected'),
    ('facts.tsv', 'definition\t某物\t某物是一样东西。', 'no kind of fact'),
    ('facts.tsv', 'diff\t某物\t某物是一样东西。', 'parts'),
    ('facts.tsv', 'diff\t某物|\t某物是一样东西。', 'parts'),
    ('facts.tsv', 'define\t注意力机制\t注意力机制是另一样东西。', 'already a fact, in line'),
    ('smalltalk.tsv', 'hello\tunseen\t早安啊\tgreeting', 'needs an answer'),
    ('unknown_topics.tsv', 'define\t注意力机制', 'also among the facts')])
def test_a_mistake_in_the_facts_is_named_with_file_and_line(tmp_path, file, line, said):
    copy_of_the_set(tmp_path)
    lines = (tmp_path / file).read_text(encoding='utf-8').splitlines()
    (tmp_path / file).write_text('\n'.join([*lines, line]) + '\n', encoding='utf-8')
    done = subprocess.run([sys.executable, str(tmp_path / 'build.py')], capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert f'{file}:{len(lines) + 1}:' in done.stderr and said in done.stderr
    assert not list(tmp_path.glob('*.jsonl'))


# -----------------------------------------------------------------------------
# prepare_zh.py

def trained_texts(folder, split='train', block_size=128):
    """What an epoch trains on, decoded: the answers, each with the end-of-text behind it."""
    tokenizer = dataset_tokenizer(folder)
    data = TokenDataset(folder, split, block_size, tokenizer.vocab_size, batch_size=1)
    texts = []
    for step in range(data.n_windows):
        x, y = data.batch(step)
        ids = []
        for target in y[0].tolist():
            if target == tokenizer.eot:
                texts.append(tokenizer.decode(ids))
                ids = []
            elif target >= 0:
                ids.append(target)
        assert not ids                              # every answer ends in its window
    return texts


def test_exactly_the_answers_and_their_ends_are_trained_on(tmp_path):
    out = made(tmp_path)
    talks = sum(not isinstance(row['prompt'], str) for row in rows('train'))            # with two answers each
    assert f'{len(rows("train")) + talks:,} questions with answers' in out
    first = [row['prompt'][1] for row in rows('train') if not isinstance(row['prompt'], str)]      # of conversations
    assert sorted(trained_texts(tmp_path / 'made', block_size=160)) == sorted(
        [*first, *(row['completion'] for row in rows('train'))])
    assert sorted(trained_texts(tmp_path / 'made', 'val')) == sorted(row['completion'] for row in rows('val'))
    asked = manners(read_meta(tmp_path / 'made'))
    assert (asked['template'], asked['decline'], asked['follow']) == ('{prompt}\n', UNKNOWN, build.FOLLOW)
    assert '力里' in asked['alike'].split() and '机機' in asked['traditional'].split()
    # the same bytes again
    made(tmp_path, out='again')
    for path in (tmp_path / 'made').iterdir():
        assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes()


TALKS = [
    {'prompt': '天空是什么颜色？', 'completion': '蓝色。'},
    {'conversations': [{'role': 'system', 'content': '简短。'}, {'role': 'user', 'content': '你好'},
                       {'role': 'assistant', 'content': '你好！'}, {'role': 'user', 'content': '一加一？'},
                       {'role': 'assistant', 'content': '二。'}]},
    {'instruction': '翻译', 'input': 'cat', 'output': '猫。'},
    {'text': '从前有座山。'},
] * 30


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'gb18030'])
def test_every_form_of_record_is_read_in_every_encoding(tmp_path, encoding):
    lines = [json.dumps(talk, ensure_ascii=False) for talk in TALKS]
    (tmp_path / 'talks.jsonl').write_text('\n'.join(lines), encoding=encoding)
    made(tmp_path, '--input=talks.jsonl', '--vocab_size=400', '--val_fraction=0.2')
    texts = trained_texts(tmp_path / 'made') + trained_texts(tmp_path / 'made', 'val')
    assert sorted(texts) == sorted(['蓝色。', '你好！', '二。', '猫。', '从前有座山。'] * 30)
    folder = tmp_path / 'made'
    tokenizer = dataset_tokenizer(folder)
    tokens = np.fromfile(folder / 'train_000000.bin', dtype='<u2', offset=1024).tolist()
    documents = tokenizer.decode([i if i != tokenizer.eot else tokenizer.encode('|')[0] for i in tokens]).split('|')
    # a turn stands behind those before it
    assert '简短。\n你好\n你好！\n一加一？\n二。' in documents
    assert '翻译\ncat\n猫。' in documents


def test_poems_with_traditional_and_rare_characters_round_trip(tmp_path):
    poems = ['春眠不覺曉，處處聞啼鳥。\n夜來風雨聲，花落知多少。', '𠀀𪚥䶮㐂龘，齉爨鱻麤。',
             '綺殿千尋起，離宮百雉餘。'] * 20
    shared = ROOT.parent / 'shared' / 'data' / 'tang_poems.jsonl'
    if shared.exists():
        poems = [json.loads(line)['text'] for line in shared.read_text(encoding='utf-8').splitlines()]
    (tmp_path / 'poems.jsonl').write_text('\n'.join(json.dumps({'text': p}) for p in poems), encoding='utf-8')
    made(tmp_path, '--input=poems.jsonl', '--vocab_size=4096', '--val_fraction=0.1')
    folder = tmp_path / 'made'
    tokenizer = dataset_tokenizer(folder)
    back = []
    for split in ('train', 'val'):
        assert not list(folder.glob('*.mask.bin'))                  # language modelling: everything is trained on
        tokens = np.fromfile(folder / f'{split}_000000.bin', dtype='<u2', offset=1024)
        starts = np.flatnonzero(tokens == tokenizer.eot)
        back += [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts)[1:]]
    assert sorted(back) == sorted(poems)


def test_a_folder_of_train_and_val_may_hold_plain_texts(tmp_path):
    for name in ('train', 'val'):
        (tmp_path / f'{name}.jsonl').write_text('{"text": "從前有座山，山裏有座廟。"}\n' * 20, encoding='utf-8')
    made(tmp_path, f'--input={tmp_path}', '--vocab_size=300')
    assert not list((tmp_path / 'made').glob('*.mask.bin')) and read_meta(tmp_path / 'made')['template'] == ''


def test_weights_say_how_often_a_file_is_taken(tmp_path):
    for name, answer in (('a', '甲。'), ('b', '乙。'), ('c', '丙。')):
        lines = [json.dumps({'prompt': f'第{i}问？', 'completion': answer}) for i in range(40)]
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    made(tmp_path, '--input=a.jsonl,b.jsonl,c.jsonl', '--vocab_size=300', '--val_fraction=0.1', out='once')
    made(tmp_path, '--input=a.jsonl,b.jsonl,c.jsonl', '--weights=1,3,0.5', '--vocab_size=300', '--val_fraction=0.1')
    once, weighted = trained_texts(tmp_path / 'once'), trained_texts(tmp_path / 'made')
    for answer, weight in (('甲。', 1), ('乙。', 3), ('丙。', 0.5)):
        assert abs(weighted.count(answer) - weight * once.count(answer)) <= 1
    train = {q.split('\n')[0] for q in map(str, once)}
    assert train and trained_texts(tmp_path / 'made', 'val') != []


@pytest.mark.parametrize('content, said', [
    (b'', 'no text'), (b'{"prompt": "a"}\n', 'bad.jsonl:1'),
    (b'{"text": "ok"}\n{"prompt": 5, "completion": "b"}', 'bad.jsonl:2'),
    (b'{"text": "ok"}\nnot json', 'bad.jsonl:2'), (b'{"text": "ok"}\n{"text": "\xff\xff\xff"}', 'bad.jsonl:2'),
    (b'{"conversations": []}', 'bad.jsonl:1'), (b'{"prompt": "a", "completion": "  "}', 'bad.jsonl:1')])
def test_bad_input_is_named_with_file_and_line_and_nothing_is_made(tmp_path, content, said):
    (tmp_path / 'bad.jsonl').write_bytes(content)
    done = prepare(tmp_path, '--input=bad.jsonl', '--out=made')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert said in done.stderr and len(done.stderr.strip().splitlines()) <= 2
    assert not list(tmp_path.glob('made/*.bin')) and not (tmp_path / 'made/meta.json').exists()


@pytest.mark.parametrize('script', ['prepare_zh.py', 'prepare_data.py'])
@pytest.mark.parametrize('n', [10, 120])
def test_of_few_questions_none_is_kept_from_training(script, n, tmp_path):
    lines = [json.dumps({'prompt': f'第{i}号是谁？', 'completion': f'是{i}叔。'}, ensure_ascii=False) for i in range(n)]
    (tmp_path / 'mine.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    more = ['--dataset=custom', '--vocab_size=300'] if script == 'prepare_data.py' else ['--vocab_size=300']
    done = run(tmp_path, script, '--input=mine.jsonl', '--out=made', *more)
    assert done.returncode == 0, done.stderr
    codec = dataset_tokenizer(tmp_path / 'made')
    learned, kept = (codec.decode(np.fromfile(tmp_path / f'made/{split}_000000.bin', dtype='<u2', offset=1024).tolist())
                     for split in ('train', 'val'))
    missing = [i for i in range(n) if f'第{i}号' not in learned]
    assert bool(missing) == (n == 120) and ('only 10 questions' in done.stdout) == (n == 10)
    assert '第' in kept


def test_answers_longer_than_the_block_are_counted_and_left_out(tmp_path):
    lines = [json.dumps({'prompt': f'第{i}问？', 'completion': '短。'}) for i in range(50)]
    lines.insert(30, json.dumps({'prompt': '长？', 'completion': '长' * 3_500_000}))        # a single line of 21 MB
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    out = made(tmp_path, '--input=a.jsonl', '--vocab_size=300', '--val_fraction=0.1')
    assert '1 questions with answers were left out' in out
    assert set(trained_texts(tmp_path / 'made')) == {'短。'}


@pytest.mark.parametrize('corpus', ['belle', 'wikipedia'])
def test_an_open_corpus_comes_from_the_hub_or_its_mirror(tmp_path, monkeypatch, corpus):
    if corpus == 'belle':
        path = 'Belle_open_source_0.5M.json'
        lines = [json.dumps({'instruction': f'第{i}问', 'input': '', 'output': '好的。'}) for i in range(60)]
        body = '\n'.join(lines).encode()
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq
        path = '20231101.zh/train-00000-of-00001.parquet'
        pq.write_table(pa.table({'id': ['1'] * 60, 'text': ['数学是研究数量的学科。'] * 60}), tmp_path / 'p')
        body = (tmp_path / 'p').read_bytes()

    repo = 'BelleGroup/train_0.5M_CN' if corpus == 'belle' else 'wikimedia/wikipedia'
    with Hub({f'datasets/{repo}': {path: body, 'README.md': b''}}) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        made(tmp_path, f'--download={corpus}', '--vocab_size=300', '--val_fraction=0.1')
    assert (tmp_path / 'data' / corpus / 'source' / path).read_bytes() == body
    if corpus == 'belle':
        assert set(trained_texts(tmp_path / 'made')) == {'好的。'}
    else:
        assert not list((tmp_path / 'made').glob('*.mask.bin'))


# -----------------------------------------------------------------------------
# answers

@pytest.mark.parametrize('written, read', [
    ('什么是ＲｏＰＥ？', '什么是RoPE？'), (' 什么 是 注意力机制 ? ', '什么是注意力机制？'),
    ('１＋１　等于几', '1＋1等于几'), ('what is a GPT?', 'what is a GPT?'),
    ('什么是KV 缓存,它有什么用?', '什么是KV缓存，它有什么用？')])
def test_questions_are_written_as_in_training(written, read):
    assert normalize_question(written) == read


def test_an_answer_is_never_empty_and_never_begins_with_punctuation():
    bpe = train_bpe(['，。！？：你好，世界。用户:助手:' * 50], 300)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=bpe.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for text in '，。 \n！':
            for i in bpe.encode(text):
                model.lm_head.weight[i] += 0.05     # it would begin with one of these, or end at once
        model.lm_head.weight[bpe.eot] += 0.1
    for options in (dict(temperature=0), dict(temperature=1.5, top_k=0, top_p=1.0)):
        texts = generate_texts([f'问{i}' for i in range(60)], model, bpe, template='用户:{prompt}\n助手:',
                               max_new_tokens=5, **options)
        assert all(text and not begins_badly(text) and '<|endoftext|>' not in text for text in texts)
    assert bpe.eot in not_first(bpe)


def test_the_count_says_right_another_declined_and_noise():
    results = {'heldout': [('a', ['A。'], 'A。'), ('b', ['B。'], 'A。'), ('c', ['C。'], UNKNOWN),
                           ('d', ['D。'], '乱。'), ('e', ['E。'], build.FOLLOW), ('f', ['F。', 'A。'], 'A。'),
                           ('g', ['G。'], '学过。')],
               'heldout_unknown': [('u', [UNKNOWN], UNKNOWN), ('v', [UNKNOWN], 'A。')]}
    assert count(results, {'decline': UNKNOWN, 'follow': build.FOLLOW}, learned=['学过。']) == {
        'heldout': {'right': 2, 'other': 2, 'declined': 2, 'noise': 1, 'total': 7},
        'heldout_unknown': {'right': 1, 'other': 1, 'declined': 0, 'noise': 0, 'total': 2}}


def test_a_second_question_stands_behind_the_first_and_its_answer():
    template = '用户:{prompt}\n助手:'
    assert conversation(template, '什么是猫?') == '用户:什么是猫？\n助手:'
    assert conversation(template, ['什么是猫?', '一种动物。', '还有呢?']) == (
        '用户:什么是猫？\n助手:一种动物。\n用户:还有呢？\n助手:')


def test_an_answer_not_likelier_than_the_declining_one_is_declined():
    bpe = train_bpe(['你好，世界。用户:助手:不知道' * 50], 300)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=bpe.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    options = dict(template='{prompt}', temperature=0, max_new_tokens=2)
    [text] = generate_texts(['你好'], model, bpe, **options)

    def chance(answer):             # by a plain loop, a token at a time
        ids, product = bpe.start + bpe.encode('你好'), 1.0
        for token in answer:
            product *= model(torch.tensor([ids]))[0][0, -1].softmax(-1)[token].item()
            ids.append(token)
        return product

    ids = bpe.start + bpe.encode('你好')
    answer = model.generate(torch.tensor([ids]), 2, temperature=0, n_vocab=bpe.vocab_size)[0, len(ids):].tolist()
    assert bpe.decode(answer) == text
    margin = chance(answer) - chance(bpe.encode('不知道。') + [bpe.eot])
    assert 0 < margin < chance(answer) < 1
    for sure, expected in ((margin * 0.999, text), (margin * 1.001, '不知道。')):
        assert generate_texts(['你好'], model, bpe, decline='不知道。', sure=sure, **options) == [expected]


def test_a_conversation_keeps_its_subject_over_many_questions_that_name_nothing(monkeypatch, capsys):
    heard = []

    def answers(prompts, *_, on_follow, **__):
        heard.append(prompts[0])
        if prompts[0][-1] == '还有呢？':
            on_follow(0)
        return [f'答{len(heard)}。']

    bpe, model = train_bpe(['你好，世界。' * 50], 300), types.SimpleNamespace(config=GPTConfig(block_size=512))
    settings = {'template': '{prompt}\n', 'decline': '不知道。', 'follow': '什么？'}
    monkeypatch.setattr(sample, 'load_for_use', lambda *_: (model, bpe, settings, ''))
    monkeypatch.setattr(sample, 'generate_answers', answers)
    monkeypatch.setattr(sample, 'interactive', True)
    monkeypatch.setattr('sys.stdin', io.StringIO('天空？\n还有呢？\n还有呢？\n大海？\n还有呢？\n'))
    sample.main()
    sky, sea = ['天空？', '答1。'], ['大海？', '答4。']
    assert heard == [['天空？'], [*sky, '还有呢？'], [*sky, '还有呢？'], [*sky, '大海？'], [*sea, '还有呢？']]


def test_what_names_nothing_is_asked_again_behind_what_was_said(monkeypatch):
    said = {'还有呢？': '没有了。', '热干面？': '不知道。', ('天空？', '蓝色。', '还有呢？'): '傍晚是红色。',
            ('海？', '咸的。', '还有呢？'): '不知道。',
            ('天空？', '蓝色。', '热干面？'): '不知道。'}
    monkeypatch.setattr(sample, 'generate_texts', lambda prompts, *_, **__: [
        said[p if isinstance(p, str) else tuple(p)] for p in prompts])
    chances = {'还有呢？': 0.4, '热干面？': 0.01}
    monkeypatch.setattr(sample, 'probabilities', lambda _, questions, __: [
        chances[bpe.decode(q[1:]).strip()] for q in questions])
    bpe, sky = train_bpe(['还有呢？热干面' * 50], 300), ['天空？', '蓝色。']
    asked = ['还有呢？', [*sky, '还有呢？'], ['海？', '咸的。', '还有呢？'], [*sky, '热干面？']]
    followed = []
    options = dict(decline='不知道。', template='{prompt}\n')
    answers = generate_answers(asked, None, bpe, follow='没有了。', on_follow=followed.append, **options)
    assert answers == ['没有了。', '傍晚是红色。', '没有了。', '不知道。'] and followed == [1]
    said['还有呢？'] = '不知道。'               # a model that has not learned to tell the one from the other
    answers = generate_answers(asked, None, bpe, **options)
    assert answers == ['不知道。', '傍晚是红色。', '不知道。', '不知道。']


def test_a_slip_is_undone_in_every_way_it_may_have_come_about():
    assert undo_slips('注意里机制', '力里 机几 里理', '') == ['注意力机制', '注意理机制', '注意里几制']
    assert undo_slips('什麼是機器學習？', '', '么麼 机機 习習 学學') == ['什么是机器学习？']
    assert undo_slips('黑黑洞', '洞动', '') == ['黑黑动', '黑洞']
    assert undo_slips('学習', '习系', '习習') == ['学习', '学系']           # simplified first, then what it may be
    assert undo_slips('天空？', '力里', '机機') == []


def test_what_is_declined_is_asked_again_as_it_may_have_been_meant(monkeypatch):
    said = {'天空？': ('蓝色。', 0.5), '大梅？': ('不知道。', 1), '大海？': ('咸的。', 0.95), '禾苗？': ('不知道。', 1),
            '木苗？': ('绿的。', 0.85), '还有泥？': ('不知道。', 1), '还有呢？': ('什么？', 0.99)}
    asked = []

    def answers(prompts, *_, sure, **__):
        asked.append(prompts)
        return ['不知道。' if said[p][1] < sure else said[p][0] for p in prompts]

    monkeypatch.setattr(sample, 'generate_texts', answers)
    bpe = train_bpe(['还有呢？' * 50], 300)
    options = dict(decline='不知道。', follow='什么？', alike='天夭 海梅 禾木 呢泥', sure=0.1)
    found = generate_answers(['天空？', '大梅？', '禾苗？', '还有泥？'], None, bpe, **options)
    assert found == ['蓝色。', '咸的。', '不知道。', '不知道。']      # 0.85 is not sure enough, and 什么？ no answer
    assert asked[1] == ['大海？', '木苗？', '还有呢？']               # and nothing else


def test_the_work_of_evaluating_is_divided_without_loss(tmp_path):
    bpe = train_bpe([row['prompt'] for row in rows('val')], 500)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=bpe.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    questions = {'heldout': rows('heldout')[:9], 'heldout_unknown': rows('heldout_unknown')[:4]}
    whole = evaluate(model, bpe, {'template': '{prompt}'}, questions, max_new_tokens=4)
    halves = [evaluate(model, bpe, {'template': '{prompt}'}, questions, rank=r, world_size=2,
                       max_new_tokens=4) for r in (0, 1)]
    for name in questions:
        assert sorted(whole[name]) == sorted(halves[0][name] + halves[1][name])


def test_the_examination_stays_as_it_is_when_more_is_learned(tmp_path):
    copy_of_the_set(tmp_path)
    code = (tmp_path / 'build.py').read_text(encoding='utf-8')
    (tmp_path / 'build.py').write_text(code.replace('SEEN, MADE_UP, SLIPS = ', 'SEEN, MADE_UP, SLIPS = 5, 1, 0  # ')
                                       .replace('\nTYPED = ', '\nTYPED = (0.5,)  # '), encoding='utf-8')
    subprocess.run([sys.executable, str(tmp_path / 'build.py')], check=True, capture_output=True)
    for path in built().glob('*.jsonl'):
        assert (path.read_bytes() == (tmp_path / path.name).read_bytes()) == (path.name != 'train.jsonl'), path.name


def test_an_answer_longer_than_the_model_sees_is_doubted_by_its_end(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    prompt, answer = [1, 2, 3], list(range(4, 20))
    logits = model(torch.tensor([(prompt + answer)[-9:-1]]))[0].log_softmax(-1)[0]
    expected = sum(logits[i, token].item() for i, token in enumerate(answer[-8:]))
    assert math.log(probabilities(model, [prompt], [answer])[0]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.timeout(1200)
def test_the_recipe_answers_questions_it_has_never_seen(tmp_path):
    """README's way, with a tenth of the facts and fewer steps: this is one seed on any machine."""
    small = tmp_path / 'small'
    small.mkdir()
    copy_of_the_set(small)
    for file, n in (('facts.tsv', 180), ('unknown_topics.tsv', 700), ('smalltalk.tsv', 0)):
        lines = (small / file).read_text(encoding='utf-8').splitlines()[:n]
        (small / file).write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    subprocess.run([sys.executable, str(small / 'build.py')], check=True, capture_output=True)
    assert prepare(tmp_path, '--input=small', '--out=data/zh').returncode == 0
    done = run(tmp_path, 'train.py', ROOT / 'config/train_zh.py', '--max_steps=300', '--eval_interval=300',
               '--zh_eval_interval=0', timeout=1000)
    assert done.returncode == 0 and 'total time: ' in done.stdout, done.stderr
    checkpoint = load_checkpoint(tmp_path / 'out/zh/final_checkpoint.pt')
    model, tokenizer = build_model(checkpoint), tokenizer_of(checkpoint)
    asked = manners(checkpoint)
    learned = {row['completion'] for row in read_questions(small / 'train.jsonl')}
    n = count(evaluate(model, tokenizer, asked, load_questions(small)), asked, learned)
    share = {name: n[name]['right'] / n[name]['total'] for name in n}
    print(n)
    assert share['heldout'] >= 0.85 and share['heldout_forms'] >= 0.6 and share['heldout_unknown'] >= 0.6, n
    assert sum(of['noise'] for of in n.values()) <= 0.01 * sum(of['total'] for of in n.values()), n


def test_ones_own_facts_are_asked_in_many_ways_among_what_is_known(tmp_path):
    (tmp_path / 'mine.tsv').write_text('define\t小白\t小白是我家养的一只橘色的猫。\n'
                                       'attr\t我家|门牌号|是多少\t我家的门牌号是七百零三号。\n', encoding='utf-8')
    subprocess.run([sys.executable, str(built() / 'build.py'), str(tmp_path / 'mine.tsv'), str(tmp_path / 'qa')],
                   check=True, capture_output=True)
    train = [json.loads(line) for line in (tmp_path / 'qa/train.jsonl').read_text('utf-8').splitlines()]
    mine = [row['prompt'] for row in train if row.get('completion') == '小白是我家养的一只橘色的猫。']
    assert len(set(mine)) == len(mine) >= 30 and len(train) >= 3000
    held = load_questions(tmp_path / 'qa')
    assert held.keys() <= set(SETS) and len(held['heldout']) >= 2
    assert not {row['prompt'] for row in held['heldout']} & set(mine)


def test_teaching_takes_back_a_part_of_what_it_changed(tmp_path):
    files = LATEST, BEST, FINAL
    for name, value in (('before', 1.0), ('run', 3.0)):
        (tmp_path / name).mkdir()
        weights = {'a': torch.full((2,), value)}
        save_checkpoint(tmp_path / name, {'model': weights, 'model_args': {}, 'iter_num': 5}, files)
    average_with(tmp_path / 'before', tmp_path / 'run', 0.75)
    for file in files:
        assert load_checkpoint(tmp_path / 'run' / file)['model']['a'].tolist() == [2.5, 2.5]
        assert load_checkpoint(tmp_path / 'before' / file)['model']['a'].tolist() == [1.0, 1.0]


def test_ones_own_facts_that_cannot_be_read_end_in_a_line_and_leave_what_was_learned_before(tmp_path):
    (tmp_path / 'out/my_facts').mkdir(parents=True)
    done = prepare(tmp_path, '--teach=nowhere.tsv')
    assert done.returncode == 2 and 'Traceback' not in done.stderr and 'nowhere.tsv' in done.stderr
    assert (tmp_path / 'out/my_facts').is_dir()


def test_ones_own_facts_may_not_be_known_already(tmp_path):
    (tmp_path / 'mine.tsv').write_text('define\t注意力机制\t注意力机制是我说的。\n', encoding='utf-8')
    done = prepare(tmp_path, '--teach=mine.tsv')
    assert done.returncode == 2 and 'mine.tsv:1: ' in done.stderr and 'facts.tsv' in done.stderr
    assert not (tmp_path / 'data/my_facts').exists() or not list((tmp_path / 'data/my_facts').iterdir())
