"""Chinese questions and answers, and Chinese text -> tokenizer, token shards and masks, in data/zh/ or another folder.

    python prepare_zh.py                                        the set that ships with the project
    python prepare_zh.py --input=poems.jsonl --out=data/poems   your own text
    python prepare_zh.py --input=data/zh_qa/train.jsonl,my_facts.jsonl --weights=1,3 --out=data/mine
    python prepare_zh.py --download=belle --out=data/belle      an open corpus, from the hub or its mirror (HF_ENDPOINT)
    python prepare_zh.py --teach=my_facts.tsv                   your own facts, added to what the model in out/zh knows

--input takes .jsonl with {"prompt", "completion"}, {"conversations": [{"role", "content"}, ...]}, {"instruction",
"input", "output"} or {"text"} on each line, and plain .txt; of a folder with a train.jsonl and a val.jsonl, these two.
Only answers, and the end-of-text token behind each, are trained on; of plain text, everything is.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from configurator import UserError, configure
from corpus import (count_questions, find_inputs, read_documents, shuffled_rows, split_pieces, split_rule, too_few,
                    write_dataset)
from dataset import start_dataset
from download import hub_download, hub_files
from tokenizer import load_tokenizer, train_bpe

# -----------------------------------------------------------------------------
input = ''                  # your own files, a folder, or several with commas; '' = the set in data/zh_qa
weights = ''                # how often each of the inputs is taken, such as 1,3 or 1,0.5; '' = each once
download = ''               # an open corpus instead: wikipedia (1.4 million articles) or belle (500,000 instructions)
teach = ''                  # facts of your own, as data/zh_qa/README.md has them: prepare, train and ask, all in one
out = 'data/zh'             # the folder to make
tokenizer = ''              # a tokenizer.json to be used; '' = a BPE learns from the text
vocab_size = 0              # ids of that BPE; 0 = 4096 for such a folder, as the set that ships, 8192 for others
single_han = 'auto'         # the BPE keeps each Chinese character by itself: true, false; auto = if nothing is asked
val_fraction = 0.05         # the part of the inputs kept for validation
encoding = 'auto'           # auto (UTF-8, or else GB18030), utf-8, gb18030, ...
template = '{prompt}\n'          # what a question is put into, in training and in sampling
decline = '这个我还不会。'     # the answer instead of one that the model is not sure of; '' = none
follow = '你说的是什么呢？请把它的名字也说出来。'     # the data's answer to 还有呢？ by itself
block_size = 160            # questions with answers that have more tokens than this are left out, and counted
seed = 1337                 # of the order of the rows
config = configure(globals(), negative=False, at_least={'block_size': 8},
                   one_of={'single_han': ('auto', 'true', 'false')})
# -----------------------------------------------------------------------------

CORPORA = {                 # repository on the hub, how its files begin, how they end
    'wikipedia': ('wikimedia/wikipedia', '20231101.zh/', '.parquet'),
    'belle': ('BelleGroup/train_0.5M_CN', 'Belle_open_source_0.5M', '.json'),
}
KEPT = 0.8          # of what teaching changed in the weights: the last fifth costs more known facts than it is worth
SHIPPED = Path(__file__).resolve().parent / 'data' / 'zh_qa'


def fetch_corpus(name: str) -> list[Path]:
    """Download an open corpus once, into data/<name>/source; returns its files. Raises UserError."""
    if name not in CORPORA:
        raise UserError(f'there is no corpus {name!r} to download; choose one of {", ".join(CORPORA)}')
    repo, begins, ends = CORPORA[name]
    files = [f for f in hub_files(repo, repo_type='dataset')
             if f['path'].startswith(begins) and f['path'].endswith(ends)]
    if not files:
        raise UserError(f'{repo} has no file {begins}*{ends} any more; download another, or use --input')
    return [hub_download(repo, f['path'], Path('data', name, 'source'), repo_type='dataset', sha256=f['sha256'],
                         size=f['size']) for f in files]


def repeated(pieces_again: Callable, weight_of: list[float]) -> Iterator[tuple]:
    """The (split, piece) pairs of pieces_again(), each training document as often as its file's weight says.

    Weight 2.5 takes every document twice and every other once more. A document for validation is taken once.
    """
    for turn in range(max(1, -int(-max(weight_of) // 1))):
        numbers = [-1] * len(weight_of)
        for name, piece in pieces_again():
            numbers[piece.file] += piece.starts and name == 'train'
            i, weight = numbers[piece.file], weight_of[piece.file]
            copies = int((i + 1) * weight) - int(i * weight) if name == 'train' else int(weight > 0)
            if turn < copies:
                yield name, piece


def pairs_in(name: str) -> str:
    """The pairs of characters in a table of the set that ships, as sample.undo_slips() takes them."""
    lines = (SHIPPED / name).read_text(encoding='utf-8').splitlines()
    return ' '.join(line.replace('\t', '') for line in lines)


def run(*command: str | Path) -> None:
    """A script of this project, in a process of its own; if it fails, this one ends with its exit status."""
    done = subprocess.run([sys.executable, *map(str, command)])
    if done.returncode:
        sys.exit(done.returncode)


def teach_facts(facts: str) -> None:
    """Adds the facts in a file to the model in out/zh, which makes another one, in out/my_facts, each time anew: four
    commands, each of which may be given by itself, and an average of the weights."""
    from checkpoint import average_with         # with PyTorch, which no other preparation waits for

    here, own = Path(__file__).resolve().parent, 'data/my_facts'
    run(SHIPPED / 'build.py', facts, own)
    run(here / 'prepare_zh.py', f'--input={own}', '--tokenizer=data/zh/tokenizer.json', f'--out={own}')
    shutil.rmtree('out/my_facts', ignore_errors=True)
    run(here / 'train.py', here / 'config/teach_zh.py')
    average_with('out/zh', 'out/my_facts', KEPT)
    run(here / 'eval_zh.py', '--init_from=out/my_facts', f'--data={own}', '--show')


def main():
    if teach:
        return teach_facts(teach)
    if '{prompt}' not in template:
        raise UserError("template must contain {prompt}, which the question takes the place of")
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction must be between 0 and 1, not {val_fraction}')
    if not input and not download:
        run(SHIPPED / 'build.py')
    paths, named = [Path(input or SHIPPED, f'{name}.jsonl') for name in ('train', 'val')], [Path(input or SHIPPED)]
    divided = not download and all(path.is_file() for path in paths)        # a folder that says what is for validation
    if not divided:
        named = [Path(t) for t in input.split(',')] if input and not Path(input).exists() else [Path(input)]
        paths = fetch_corpus(download) if download else find_inputs(input)
    try:
        given = [float(w) for w in weights.split(',')] if weights else [1.0] * len(paths)
    except ValueError:
        given = []
    if len(given) != len(paths) or min(given, default=-1) < 0 or max(given, default=0) <= 0:
        raise UserError(f'weights {weights!r} should be a number, not negative, for each of the {len(paths)} input '
                        'files, such as --weights=1,3')
    start_dataset(out)

    def documents(doing):
        return read_documents(paths, template=template, encoding=encoding, doing=doing)

    rule = ('files', None) if divided else split_rule(documents('reading'), val_fraction)
    questions = count_questions(documents('looking for questions'))
    few = not divided and too_few(questions)

    def split_documents(doing='encoding'):
        if divided:
            return ((('train', 'val')[piece.file], piece) for piece in documents(doing))
        return split_pieces(documents(doing), val_fraction, *rule, few)

    # the tokenizer learns from what is trained on; if that has no questions, it is language modelling, without masks
    with_masks = questions > 0
    if tokenizer:
        codec = load_tokenizer(tokenizer)
    else:
        # answers are learned sooner in words, two thirds as many tokens; plain text has too many words for so few ids
        alone = single_han == 'true' or (single_han == 'auto' and not with_masks)
        codec = train_bpe((text for name, piece in split_documents('training the tokenizer') if name == 'train'
                           for text, _ in piece.segments), vocab_size or (4096 if divided else 8192), alone)
    print(f'tokenizer: {codec.kind}, {codec.vocab_size:,} ids')
    pairs = repeated(split_documents, given)
    if with_masks:
        pairs = shuffled_rows(pairs, random.Random(seed))
    asked = {}
    if with_masks:
        asked = {'template': template, 'decline': decline, 'alike': pairs_in('slips.tsv'),
                 'traditional': pairs_in('traditional.tsv')}
    if with_masks and any((follow, True) in piece.segments for piece in documents('looking for second questions')):
        asked['follow'] = follow
    write_dataset(out, codec, pairs, ', '.join(p.name for p in named[:5]) or download,
                  f'{rule[0]}; val_fraction={val_fraction}', asked, with_masks, block_size)


if __name__ == '__main__':
    main()
