"""HellaSwag: the same choices as a plain loop over transformers, however the work is cut up; and what may go wrong."""

import io
import json
import random
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from hub import Hub
from torch.nn import functional as F

import hellaswag
from checkpoint import save_checkpoint
from configurator import UserError
from hellaswag import FILE, N_OFFICIAL, count, count_right, evaluate, fit, load_questions, smallest
from layers import to_int8
from model import GPT, GPTConfig
from scripts import ROOT, run
from tokenizer import gpt2_tokenizer, train_char

SAMPLE = ROOT.parent / 'shared' / 'data' / 'hellaswag_val_sample.jsonl'
LLAMA = dict(norm='rmsnorm', position='rope', mlp='swiglu', n_kv_head=2, bias=False, tie_weights=False)


# -----------------------------------------------------------------------------
# the plain way, which shares nothing with hellaswag.py

def made_questions(n=48):
    """Questions of every length, from Python's own documentation: real prose on every machine."""
    from pydoc_data.topics import topics
    prose = ' '.join(' '.join(topics[name].split()) for name in sorted(topics))
    sentences = [s for s in re.split(r'(?<=\.) ', prose) if len(s) > 30]
    draw = random.Random(1)
    rows = []
    for i in range(n):
        at = draw.randrange(len(sentences) - 8)
        ctx = ' '.join(' '.join(sentences[at:at + 3]).split()[:draw.choice((1, 2, 5, 9, 9, 14, 14, 30))])
        endings = [' '.join(draw.choice(sentences).split()[:draw.randint(1, 25)]) for _ in range(4)]
        rows.append({'ind': i, 'ctx': ctx, 'endings': endings, 'label': draw.choice((i % 4, str(i % 4)))})
    rows[3]['endings'][2] = rows[3]['endings'][0]                   # equal ones: the first counts
    rows[5] = {**rows[5], 'ctx': rows[4]['ctx'], 'endings': rows[4]['endings'][::-1]}
    return rows


def real_questions():
    """The sample of the official questions where it is at hand, or else those of our own."""
    if not SAMPLE.exists():
        return made_questions()
    return [json.loads(line) for line in SAMPLE.read_text(encoding='utf-8').splitlines()]


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return str(path)


def transformers_model(ours):
    """GPT2LMHeadModel with the weights of our GPT-2: its Conv1D keeps matrices transposed."""
    c = ours.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)).eval()
    transposed = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    theirs.load_state_dict({k: v.t() if k.endswith(transposed) else v for k, v in ours.state_dict().items()})
    return theirs


@torch.inference_mode()
def plain_losses(logits_of, rows, encode):
    """-ln p of every ending, (sum, mean) each: one ending at a time, whole texts, no cache and no padding.
    logits_of(ids, n): the last n logits (1, n, V) after ids (1, T) int64."""
    losses = []
    for row in rows:
        losses.append([])
        for ending in row['endings']:
            context, continuation = encode(row['ctx']), encode(' ' + ending)
            ids = torch.tensor([context + continuation])
            logits = logits_of(ids, len(continuation) + 1)[0, :-1].float()
            loss = F.cross_entropy(logits, ids[0, len(context):], reduction='none').double()
            losses[-1].append((loss.sum().item(), loss.mean().item()))
    return losses


def choices_of(losses):
    """The endings chosen by sum and by mean, one pair a question."""
    return [tuple(min(range(4), key=lambda k: row[k][which]) for which in (0, 1)) for row in losses]


def choices(answers):
    return [(smallest(a.sums), smallest(a.means)) for a in sorted(answers)]


def agree(answers, losses):
    """The same choices, and losses within 1e-4, relative where they are above 1."""
    assert [a.index for a in sorted(answers)] == list(range(len(losses)))
    for a, plain in zip(sorted(answers), losses, strict=True):
        assert a.sums == pytest.approx([s for s, _ in plain], abs=1e-4, rel=2e-6)
        assert a.means == pytest.approx([m for _, m in plain], abs=1e-5)
    assert choices(answers) == choices_of(losses)


# -----------------------------------------------------------------------------
# models

def small_gpt2():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50257, block_size=256, n_layer=2, n_head=2, n_embd=64)).eval()


def trained_gpt2():
    """A little of AdamW on the documentation of Python, so that losses differ as those of real models do."""
    from pydoc_data.topics import topics
    model = small_gpt2()
    ids = torch.tensor(gpt2_tokenizer().encode('\n'.join(topics[name] for name in sorted(topics)[:30])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        windows = ids[step * 260 % (len(ids) - 260):][:260].view(4, 65)
        _, loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 8                          # ln 50257 = 10.8
    return model


@pytest.fixture(scope='module', params=['random', 'trained'])
def asked(request, tmp_path_factory):
    """(folder with a checkpoint and questions.jsonl, our model, rows, the plain loop's losses)."""
    place = tmp_path_factory.mktemp(request.param)
    model = small_gpt2() if request.param == 'random' else trained_gpt2()
    rows = real_questions()
    write(place / 'questions.jsonl', rows)
    tokenizer = gpt2_tokenizer()
    save_checkpoint(place, {'model': model.state_dict(), 'model_args': model.model_args(), 'iter_num': 7,
                            'tokenizer': tokenizer.state()}, ['checkpoint.pt'])
    import tiktoken
    theirs = transformers_model(model)
    return place, model, rows, plain_losses(lambda ids, n: theirs(ids, logits_to_keep=n).logits, rows,
                                            tiktoken.get_encoding('gpt2').encode_ordinary)


def script(place, *args, processes=1):
    return run(place, 'hellaswag.py', '--device=cpu', *args, processes=processes)


def shown(out):
    """What --show printed: per question the right ending and the ones chosen by sum and by mean, and the losses."""
    lines = re.findall(r'^  ([ ✔]) +(\d+\.\d{4})([ ←]) +(\d+\.\d{4})([ ←]) ', out, re.M)
    assert len(lines) % 4 == 0
    questions = [lines[i:i + 4] for i in range(0, len(lines), 4)]
    marks = [tuple([line[column] != ' ' for line in four].index(True) for column in (0, 2, 4)) for four in questions]
    return marks, [[(float(line[1]), float(line[3])) for line in four] for four in questions]


# -----------------------------------------------------------------------------
# the same choices

@pytest.mark.parametrize('processes', [1, 2])
def test_the_script_chooses_what_a_plain_loop_over_transformers_chooses(asked, processes):
    place, _, rows, plain = asked
    n = len(rows)
    done = script(place, '--init_from=.', '--data=questions.jsonl', '--dtype=float32', f'--limit={n}', f'--show={n}',
                  processes=processes)
    assert done.returncode == 0, done.stderr
    marks, losses = shown(done.stdout)
    assert [m[0] for m in marks] == [int(row['label']) for row in rows]
    assert [m[1:] for m in marks] == choices_of(plain)
    for ours, theirs in zip(losses, plain, strict=True):
        assert [v for pair in ours for v in pair] == pytest.approx([v for pair in theirs for v in pair], abs=2e-4)
    by_sum, by_mean = (sum(pair[which] == int(row['label']) for pair, row in zip(choices_of(plain), rows, strict=True))
                       for which in (0, 1))
    *_, described, both, third, last = done.stdout.splitlines()
    per_character = [[float(whole) / len(text) for (whole, _), text in zip(pairs, row['endings'], strict=True)]
                     for pairs, row in zip(plain, rows, strict=True)]
    right = sum(min(range(4), key=p.__getitem__) == int(row['label'])
                for p, row in zip(per_character, rows, strict=True))
    assert third == f'acc_norm per character, as lm-evaluation-harness has it: {right}/{n}={right / n:.4f}'
    assert re.fullmatch(rf'checkpoint\.pt: step 7 \(cpu, float32\): {n} questions in \d+\.\d s', described)
    assert both == f'acc: {by_sum}/{n}={by_sum / n:.4f} | acc_norm: {by_mean}/{n}={by_mean / n:.4f}'
    assert last == f'HellaSwag accuracy: {by_mean}/{n}={by_mean / n:.4f}'


def test_losses_are_those_of_the_plain_loop_whatever_the_batch_size_and_the_number_of_processes(asked):
    place, model, _, plain = asked
    n = 24
    questions, plain = load_questions(gpt2_tokenizer(), place / 'questions.jsonl', limit=n), plain[:n]
    told = []
    answers = evaluate(model, questions, progress=told.extend)
    agree(answers, plain)
    assert told == answers
    agree(evaluate(model, questions, batch_size=3), plain)
    for world_size in (2, 3):
        shares = [evaluate(model, questions, rank=r, world_size=world_size) for r in range(world_size)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        agree(sum(shares, []), plain)
    halves = [count_right(model, questions, rank=r, world_size=2) for r in (0, 1)]
    assert tuple(map(sum, zip(*halves, strict=True))) == count(answers, questions)


@pytest.mark.parametrize('shape', [{}, LLAMA, {**LLAMA, 'qk_norm': True, 'document_token': 50256}],
                         ids=['gpt2', 'llama', 'questions'])
@pytest.mark.parametrize('batch_size', [1, 128])
def test_contexts_of_one_token_and_endings_of_any_length_are_scored_as_whole_texts(tmp_path, shape, batch_size):
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=50304, block_size=256, n_layer=2, n_head=4, n_embd=32, **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rows = made_questions()
    tokenizer = gpt2_tokenizer()
    questions = load_questions(tokenizer, write(tmp_path / 'q.jsonl', rows))
    assert {len(q.context) for q in questions} >= {1, 2} and {len(e) for q in questions for e in q.endings} >= {1, 2}
    plain = plain_losses(lambda ids, n: model(ids)[0][:, -n:], rows, tokenizer.encode)
    agree(evaluate(model, questions, batch_size=batch_size), plain)


def test_what_does_not_fit_into_the_block_is_cut_and_scored(tmp_path):
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=50257, block_size=32, n_layer=2, n_head=2, n_embd=32)).eval()
    rows = made_questions() + [{'ctx': 'one two three ' * n, 'endings': ['a ' * n, 'b', 'c ' * 40, 'd d'], 'label': 1}
                               for n in (1, 20, 100)]
    tokenizer = gpt2_tokenizer()
    questions = load_questions(tokenizer, write(tmp_path / 'q.jsonl', rows))
    answers = sorted(evaluate(model, questions))
    cut = 0
    for question, answer in zip(questions, answers, strict=True):
        context, endings = fit(question, 32)
        cut += (context, endings) != question[:2]
        assert context and question.context[-len(context):] == context
        assert max(map(len, endings)) <= 32 and all(e == whole[:32] for e, whole in zip(endings, question.endings,
                                                                                        strict=True))
        # all of the context that there is room for: with the longest ending, 32 tokens are read
        assert context == question.context or len(context) + max(map(len, endings)) - 1 == 32
        for ending, loss in zip(endings, answer.sums, strict=True):
            ids = torch.tensor([context + ending])
            with torch.inference_mode():
                logits = model(ids[:, :-1])[0][0, len(context) - 1:]
            assert loss == pytest.approx(F.cross_entropy(logits, ids[0, len(context):], reduction='sum').item(), 1e-5)
    assert cut > 3
    model.crop_block_size(1)
    assert len(evaluate(model, questions)) == len(questions)


def test_equal_endings_count_for_the_first():
    tokenizer = train_char(['ab '])
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    q = hellaswag.Question((0, 1), ((2, 0), (2, 1, 1), (2, 0), (2, 1, 1)), 0, {})
    for answer in evaluate(model, [q] * 7, batch_size=2):
        assert answer.sums[:2] == answer.sums[2:] and smallest(answer.sums) < 2 and smallest(answer.means) < 2
    assert smallest([2.0, 1.0, 1.0, 3.0]) == 1 and tokenizer.vocab_size == 4


def test_acc_norm_goes_by_the_loss_per_token_or_character_and_acc_by_all_of_it():
    text = {'endings': ['a', 'bb' * 20, 'c', 'd']}
    questions = [hellaswag.Question((0,), ((1,),) * 4, label, text) for label in (3, 3, 0, 1)]
    answers = [hellaswag.Answer(i, [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) for i in range(4)]
    assert count(answers, questions) == (2, 1, 1, 4)        # right per token, whole, per character; answered


def test_it_runs_within_training_and_in_lower_precision():
    """As train.py calls it, under autocast between two steps; and as the script does, with weights in bfloat16."""
    endings = (1, 2), (3,), (4, 5, 6), (7, 8)
    questions = [hellaswag.Question(tuple(range(n % 5 + 1)), endings, 0, {}) for n in range(9)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=16, n_layer=2, n_head=2, n_embd=32, **{**LLAMA, 'n_kv_head': 1}))
    exact = sorted(evaluate(model.eval(), questions))
    for _ in range(2):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            close = sorted(evaluate(model.eval(), questions))
            _, loss = model.train()(torch.arange(16)[None], torch.arange(16)[None])
        loss.backward()
    other = sorted(evaluate(model.eval().bfloat16(), questions))
    eight = sorted(evaluate(to_int8(model.float()), questions))
    for a, *others in zip(exact, close, other, eight, strict=True):
        assert all(b.sums == pytest.approx(a.sums, rel=0.02) for b in others)


def test_a_tokenizers_beginning_of_text_stands_in_front(tmp_path):
    path = write(tmp_path / 'q.jsonl', made_questions(8))
    tokenizer = gpt2_tokenizer()
    without = load_questions(tokenizer, path)
    tokenizer.bos = 50256
    assert [q.context for q in load_questions(tokenizer, path)] == [(50256, *q.context) for q in without]


# -----------------------------------------------------------------------------
# the questions

def parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def many(n):
    """n questions with the columns that the official file has, and labels that are strings, as there."""
    return [{'ind': i, 'activity_label': 'Talking', 'ctx_a': 'A', 'ctx_b': '', 'ctx': f'A man says {i}.',
             'endings': ['and sits.', 'and stands.', 'he is.', 'no.'], 'source_id': '', 'split': 'val',
             'split_type': 'indomain', 'label': str(i % 4)} for i in range(n)]


def test_the_official_questions_come_from_the_hub_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = gpt2_tokenizer()
    with Hub({'datasets/Rowan/hellaswag': {FILE: parquet(many(N_OFFICIAL))}}) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        questions = load_questions(tokenizer)
        assert hub.fetched() == [FILE]
        assert len(questions) == N_OFFICIAL and [q.label for q in questions[:5]] == [0, 1, 2, 3, 0]
        assert tokenizer.decode(questions[17].context) == 'A man says 17.'
        assert tokenizer.decode(questions[17].endings[3]) == ' no.'
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        assert load_questions(tokenizer, limit=3) == questions[:3] and len(hub.fetched()) == 1
    next(Path('data/hellaswag').rglob('*.parquet')).unlink()
    with pytest.raises(UserError, match='HF_HUB_OFFLINE=1 forbids the network'):
        load_questions(tokenizer)


@pytest.mark.parametrize('content, said', [
    (parquet(many(N_OFFICIAL - 1)), 'has 10,041 questions, not 10,042; delete it'),
    (parquet([{'text': 'of another kind'}]), 'row 0 is no question'),
    (b'not parquet at all', 'cannot be read as questions')])
def test_an_official_file_that_is_not_whole_is_refused(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    with Hub({'datasets/Rowan/hellaswag': {FILE: content}}) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=said):
            load_questions(gpt2_tokenizer())


def test_a_file_of_ones_own_may_be_jsonl_or_parquet_and_have_any_number_of_questions(tmp_path):
    rows = many(6)
    (tmp_path / 'q.parquet').write_bytes(parquet(rows))
    tokenizer = train_char([' '.join([row['ctx'], *row['endings']]) for row in rows])
    tabled = load_questions(tokenizer, tmp_path / 'q.parquet')
    assert len(tabled) == 6
    assert load_questions(tokenizer, write(tmp_path / 'q.jsonl', rows)) == tabled
    (tmp_path / 'bom.jsonl').write_bytes(b'\xef\xbb\xbf' + (tmp_path / 'q.jsonl').read_bytes() + b'\n\n')
    assert load_questions(tokenizer, tmp_path / 'bom.jsonl') == tabled
    assert load_questions(tokenizer, tmp_path / 'q.jsonl', limit=4) == tabled[:4]
    with pytest.raises(UserError, match="HellaSwag cannot be put to this model: .* does not have 'quz'"):
        load_questions(tokenizer, write(tmp_path / 'r.jsonl', [{**rows[0], 'ctx': 'quiz'}]))


GOOD = json.dumps(many(1)[0])


@pytest.mark.parametrize('line', [
    '{"ctx": "a"', '"text"', '[]', 'null', '{"ctx": "a", "endings": ["b", "c", "d", "e"]}',
    '{"ctx": "", "endings": ["b", "c", "d", "e"], "label": 1}',
    '{"ctx": 5, "endings": ["b", "c", "d", "e"], "label": 1}',
    '{"ctx": "a", "endings": ["b", "c", "d"], "label": 1}', '{"ctx": "a", "endings": "bcde", "label": 1}',
    '{"ctx": "a", "endings": ["b", "c", "d", 5], "label": 1}', '{"ctx": "a", "endings": null, "label": 1}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": ""}',
    '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": true}', '\udcff', '[' * 100_000],
    ids=lambda line: line[:50])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / 'bad.jsonl'
    path.write_text(f'{GOOD}\n\n{line}\n{GOOD}\n', encoding='utf-8', errors='surrogateescape')
    with pytest.raises(UserError, match=re.escape(f'{path}:3')) as error:
        load_questions(gpt2_tokenizer(), path)
    assert len(str(error.value).splitlines()) <= 2 and len(str(error.value)) < 400


@pytest.mark.parametrize('args, said', [
    (['--data=missing.jsonl'], 'missing.jsonl'), (['--data=.'], 'cannot be read as questions'),
    (['--data=words.jsonl'], 'HellaSwag cannot be put to this model: the vocabulary of 3 characters does not have'),
    (['--data=empty.jsonl'], 'empty.jsonl has 0 questions'), (['--data=bad.parquet'], 'bad.parquet'),
    (['--limit=-1'], 'limit must be at least 0'), (['--batch_size=0'], 'batch_size must be at least 1'),
    (['--show=-2'], 'show must be at least 0'), (['--init_from=nowhere'], 'nowhere')])
def test_a_wrong_command_ends_in_two_lines(tmp_path, args, said):
    model = GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=8))
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_args': model.model_args(),
                               'tokenizer': train_char(['abc']).state()}, ['checkpoint.pt'])
    (tmp_path / 'empty.jsonl').write_text('\n', encoding='utf-8')
    (tmp_path / 'bad.parquet').write_bytes(b'PAR1')
    write(tmp_path / 'words.jsonl', many(1))
    done = script(tmp_path, '--init_from=.', *args)
    assert done.returncode == 2 and said in done.stderr and 'Traceback' not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2 and done.stdout == ''
