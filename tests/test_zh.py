"""The Chinese questions and answers: the data, their preparation, what is trained on, and how they are answered."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hub import Hub

from checkpoint import build_model, load_checkpoint, tokenizer_of
from dataset import TokenDataset, dataset_tokenizer, find_dataset, read_meta
from eval_zh import UNKNOWN, count, evaluate, load_questions
from model import GPT, GPTConfig
from sample import begins_badly, generate_texts, normalize_question, not_first
from scripts import ROOT, run
from tokenizer import train_bpe

DATA = ROOT / 'data' / 'zh_qa'
FILES = ('train', 'val', 'heldout', 'heldout_forms', 'heldout_unknown')


def rows(name, folder=DATA):
    return [json.loads(line) for line in (folder / f'{name}.jsonl').read_text(encoding='utf-8').splitlines()]


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
            assert row.keys() == {'prompt', 'completion'}
            assert all(isinstance(v, str) and v == v.strip() and v and '\n' not in v for v in row.values()), row
            assert row['completion'].endswith('。') and not begins_badly(row['completion'])
            assert len(row['completion']) <= 60


def test_no_question_is_in_two_files_or_twice():
    questions = [row['prompt'] for name in FILES for row in rows(name)]
    assert len(questions) == len(set(questions))


def test_there_are_400_facts_each_asked_in_six_ways_and_no_two_share_an_answer():
    facts = [line.split('\t') for line in (DATA / 'facts.tsv').read_text(encoding='utf-8').splitlines()]
    answers = [answer for _, _, answer in facts]
    assert len(facts) >= 400 and len(set(answers)) == len(facts)
    assert len({(kind, topic) for kind, topic, _ in facts}) == len(facts)
    asked = {name: {} for name in FILES}
    for name in FILES:
        for row in rows(name):
            asked[name].setdefault(row['completion'], set()).add(row['prompt'])
    for answer in answers:
        assert len(asked['train'][answer]) >= 4
        assert len(asked['val'][answer]) == len(asked['heldout'][answer]) == 1
    assert set(asked['train']) == {*answers, UNKNOWN}
    assert len(asked['heldout_forms']) >= 150 and set(asked['heldout_forms']) <= set(answers)


def test_at_least_150_questions_are_out_of_scope_and_others_of_them_held_out():
    assert sum(row['completion'] == UNKNOWN for row in rows('train')) >= 150
    held_out = rows('heldout_unknown')
    assert len(held_out) >= 100 and {row['completion'] for row in held_out} == {UNKNOWN}
    topics = [line.split('\t')[1] for line in (DATA / 'unknown_topics.tsv').read_text(encoding='utf-8').splitlines()]
    learned = {t for t in topics if any(t in row['prompt'] for row in rows('train'))}
    assert sum(any(t in row['prompt'] for t in topics if t not in learned) for row in held_out) >= 100


def test_everybodys_first_questions_are_asked_and_held_out():
    questions = {row['prompt'] for row in rows('heldout')}
    assert {'什么是注意力机制？', '解释蒸馏水与纯水区别？'} <= questions


def test_unseen_forms_are_in_no_question_of_training():
    spec = importlib.util.spec_from_file_location('build', DATA / 'build.py')
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    topics = {answer: (kind, topic) for kind, topic, answer in build.rows_of('facts.tsv')}
    forms = build.rows_of('forms.tsv')
    unseen = {kind: [form for k, which, form in forms if (k, which) == (kind, 'unseen')] for kind in build.FIELDS}
    for row in rows('heldout_forms'):
        kind, topic = topics[row['completion']]
        assert row['prompt'] in [build.fill(form, kind, topic) for form in unseen[kind]]
    for row in rows('train'):
        if row['completion'] != UNKNOWN:
            kind, topic = topics[row['completion']]
            assert not any(build.fill(form, kind, topic).rstrip('。？') in row['prompt'] for form in unseen[kind]), row


def test_the_files_are_what_build_py_makes_of_the_facts(tmp_path):
    for path in DATA.iterdir():
        if path.suffix in ('.tsv', '.txt', '.py'):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, str(tmp_path / 'build.py')], check=True, capture_output=True)
    for name in FILES:
        assert (tmp_path / f'{name}.jsonl').read_bytes() == (DATA / f'{name}.jsonl').read_bytes()


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
    assert f'{len(rows("train")):,} questions with answers' in out
    assert sorted(trained_texts(tmp_path / 'made')) == sorted(row['completion'] for row in rows('train'))
    assert sorted(trained_texts(tmp_path / 'made', 'val')) == sorted(row['completion'] for row in rows('val'))
    assert read_meta(tmp_path / 'made')['template'] == '用户:{prompt}\n助手:'
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
] * 10


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'gb18030'])
def test_every_form_of_record_is_read_in_every_encoding(tmp_path, encoding):
    lines = [json.dumps(talk, ensure_ascii=False) for talk in TALKS]
    (tmp_path / 'talks.jsonl').write_text('\n'.join(lines), encoding=encoding)
    made(tmp_path, '--input=talks.jsonl', '--vocab_size=400', '--val_fraction=0.2')
    texts = trained_texts(tmp_path / 'made') + trained_texts(tmp_path / 'made', 'val')
    assert sorted(texts) == sorted(['蓝色。', '你好！', '二。', '猫。', '从前有座山。'] * 10)
    folder = tmp_path / 'made'
    tokenizer = dataset_tokenizer(folder)
    tokens = np.fromfile(folder / 'train_000000.bin', dtype='<u2', offset=1024).tolist()
    documents = tokenizer.decode([i if i != tokenizer.eot else tokenizer.encode('|')[0] for i in tokens]).split('|')
    # a turn stands behind those before it
    assert '用户:简短。\n你好\n助手:你好！\n用户:一加一？\n助手:二。' in documents
    assert '用户:翻译\ncat\n助手:猫。' in documents


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


def test_the_count_says_right_wrong_fact_and_declined():
    results = {'heldout': [('a', 'A。', 'A。'), ('b', 'B。', 'A。'), ('c', 'C。', UNKNOWN), ('d', 'D。', '乱。')],
               'heldout_unknown': [('u', UNKNOWN, UNKNOWN), ('v', UNKNOWN, 'A。')]}
    assert count(results) == {'heldout': {'right': 1, 'other_fact': 1, 'declined': 1, 'total': 4},
                              'heldout_unknown': {'right': 1, 'other_fact': 1, 'declined': 1, 'total': 2}}


def test_the_work_of_evaluating_is_divided_without_loss(tmp_path):
    bpe = train_bpe([row['prompt'] for row in rows('val')], 500)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=bpe.vocab_size, n_layer=1, n_head=2, n_embd=16)).eval()
    questions = {'heldout': rows('heldout')[:9], 'heldout_unknown': rows('heldout_unknown')[:4]}
    whole = evaluate(model, bpe, '{prompt}', questions, max_new_tokens=4)
    halves = [evaluate(model, bpe, '{prompt}', questions, rank=r, world_size=2, max_new_tokens=4) for r in (0, 1)]
    for name in questions:
        assert sorted(whole[name]) == sorted(halves[0][name] + halves[1][name])


@pytest.mark.timeout(1200)
def test_the_default_recipe_answers_questions_it_has_never_seen(tmp_path):
    """The README's first command, with its figures lowered a little, since this is one seed on any machine."""
    (tmp_path / 'data').mkdir()
    assert prepare(tmp_path).returncode == 0
    done = run(tmp_path, 'train.py', ROOT / 'config/train_zh.py', '--zh_eval_interval=480', timeout=1000)
    assert done.returncode == 0, done.stderr
    assert 'held-out questions: ' in done.stdout and 'total time: ' in done.stdout
    checkpoint = load_checkpoint(tmp_path / 'out/zh/final_checkpoint.pt')
    model, tokenizer = build_model(checkpoint), tokenizer_of(checkpoint)
    n = count(evaluate(model, tokenizer, checkpoint['template'], load_questions()))
    share = {name: n[name]['right'] / n[name]['total'] for name in n}
    assert share['heldout'] >= 0.96 and share['heldout_forms'] >= 0.75 and share['heldout_unknown'] >= 0.75, n
    assert n['heldout']['declined'] <= 0.02 * n['heldout']['total']
    assert find_dataset(tmp_path / 'data/zh')
