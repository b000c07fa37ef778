"""lm-evaluation-harness takes an exported folder as it is, and chooses what hellaswag.py chooses, question by question.

    python -m pip install lm-eval       some 40 packages beside those of requirements-dev.txt, 430 MB, one minute; that
                                        is much, so the tests here are skipped where it is missing
Its own HellaSwag task is what runs, process_docs and all, with no more changed than where the questions come from.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import save_checkpoint
from hellaswag import count, evaluate, load_questions
from model import GPT, GPTConfig
from scripts import run
from test_hellaswag import LLAMA, SAMPLE, made_questions, trained_gpt2, write
from tokenizer import gpt2_tokenizer, train_bpe

lm_eval = pytest.importorskip('lm_eval')


def rows():
    """60 questions, made and real ones, with the columns of the official file that lm_eval reads."""
    real = SAMPLE.read_text(encoding='utf-8').splitlines() if SAMPLE.exists() else []
    found = [json.loads(line) for line in real[:30]]
    made = [row for row in made_questions(99) if not any('[' in ending for ending in row['endings'])]
    return [{'ind': i, 'activity_label': row.get('activity_label', 'Python [title] and  more'), 'ctx_a': row['ctx'],
             'ctx_b': ('', 'a man', '[step] it')[i % 3], 'endings': row['endings'], 'label': str(row['label'])}
            for i, row in enumerate([*found, *made][:60])]


def llama_with_a_bpe():
    tokenizer = train_bpe([' '.join([row['ctx_a'], *row['endings']]) for row in rows()], 1000)
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=1024, block_size=512, n_layer=2, n_head=4, n_embd=32, **LLAMA)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, tokenizer


def harness(place, folder):
    """(what lm_eval says of its HellaSwag task, and of every question) for the model in `folder`, without a network."""
    official = Path(lm_eval.__file__).parent / 'tasks' / 'hellaswag' / 'hellaswag.yaml'
    (place / 'tasks').mkdir()
    (place / 'tasks' / 'local.yaml').write_text(
        f'include: {json.dumps(str(official))}\ntask: local_hellaswag\ndataset_path: json\ntraining_split: null\n'
        f'dataset_kwargs: {{data_files: {{validation: {json.dumps(str(place / "rows.jsonl"))}}}}}\n', encoding='utf-8')
    env = {**os.environ, 'HF_HOME': str(place / 'home'), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, '-m', 'lm_eval', '--model', 'hf', '--model_args',
         f'pretrained={folder},add_bos_token=False,dtype=float32', '--tasks', 'local_hellaswag', '--include_path',
         'tasks', '--device', 'cpu', '--batch_size', '8', '--output_path', 'said', '--log_samples'],
        cwd=place, env=env, text=True, encoding='utf-8', capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results, = (place / 'said').rglob('results_*.json')
    samples, = (place / 'said').rglob('samples_*.jsonl')
    return (json.loads(results.read_text(encoding='utf-8'))['results']['local_hellaswag'],
            [json.loads(line) for line in samples.read_text(encoding='utf-8').splitlines()])


def chosen(answer, question, which):
    """The ending that hellaswag.py counts as right by its norm `which` (1: whole, 2: per character)."""
    return next(k for k in range(4) if count([answer._replace(index=0)], [question._replace(label=k)])[which])


@pytest.mark.parametrize('shape', ['gpt2', 'llama'])
def test_an_export_gets_the_same_choices_from_lm_eval_as_its_checkpoint_from_hellaswag_py(shape, tmp_path):
    model, tokenizer = (trained_gpt2(), gpt2_tokenizer()) if shape == 'gpt2' else llama_with_a_bpe()
    save_checkpoint(tmp_path, {'model': model.state_dict(), 'model_args': model.model_args(), 'iter_num': 7,
                               'tokenizer': tokenizer.state()}, ['checkpoint.pt'])
    done = run(tmp_path, 'export.py', '--init_from=.', '--format=hf', '--out=exported')
    assert done.returncode == 0, done.stderr
    write(tmp_path / 'rows.jsonl', rows())
    results, samples = harness(tmp_path, tmp_path / 'exported')
    samples = sorted(samples, key=lambda sample: sample['doc_id'])
    assert len(samples) == 60

    # the same texts, as lm_eval has made them of the rows
    questions = load_questions(tokenizer, write(tmp_path / 'tidy.jsonl', [
        {'ctx': sample['doc']['query'], 'endings': sample['doc']['choices'], 'label': sample['doc']['gold']}
        for sample in samples]))
    answers = sorted(evaluate(model, questions))
    for answer, question, sample in zip(answers, questions, samples, strict=True):
        theirs = [float(said[0]) for said, in sample['resps']]                  # ln p of the four endings
        assert answer.sums == pytest.approx([-p for p in theirs], rel=1e-4)
        per_character = [p / len(text) for p, text in zip(theirs, question.text['endings'], strict=True)]
        assert chosen(answer, question, 1) == theirs.index(max(theirs))
        assert chosen(answer, question, 2) == per_character.index(max(per_character))
        assert count([answer._replace(index=0)], [question])[1:3] == (sample['acc'], sample['acc_norm'])
    _, right, right_per_character, n = count(answers, questions)
    assert results['acc,none'] == pytest.approx(right / n)
    assert results['acc_norm,none'] == pytest.approx(right_per_character / n)
