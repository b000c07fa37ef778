"""Writes the .jsonl files beside it from the .tsv and .txt files, the same bytes each time.

    python data/zh_qa/build.py
    python data/zh_qa/build.py my_facts.tsv data/mine_qa       questions about facts of your own, among those of the set

A fact is asked in some of the forms that its kind has, by one of its names; so a form is used by many facts and no fact
has them all: that is what makes a small model answer a question that it has never seen. README.md says what is in
which file.
"""

import itertools
import json
import os
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEN, MADE_UP, SLIPS = 20, 3, 16        # how often each fact is asked: in forms of the list, others, with a slip
TURNS = {'more': 14, 'use': 7, 'why': 7, 'how': 7, 'none': 3}      # how often each second question is asked
OTHERS = 2                  # in how many forms of the list each unknown topic is asked
TYPED = (0.0, 0.7)          # each line of small talk is taken so often, with a slip by these chances
OFTEN, AMONG = 6, 8000      # of one's own facts: how often they are asked, and among how many questions of the set
UNKNOWN = '这个我还不会。'
FIELDS = {'define': 'x', 'diff': 'ab', 'why': 'sp', 'attr': 'saq', 'how': 'v', 'use': 'x'}    # what a topic's parts are
FILES = ('train', 'val', 'heldout', 'heldout_forms', 'heldout_unknown', 'heldout_slips', 'heldout_talk',
         'heldout_turns', 'heldout_near')
FIRST = {'注意力机制': '什么是{x}？', '蒸馏水|纯水': '解释{a}与{b}区别？'}      # everybody's first questions: held out
FOLLOW = '你说的是什么呢？请把它的名字也说出来。'             # asked for more, with nothing said before
NO_MORE = '我知道的就是这些了，可以换个问题问我。'            # asked for more, a use, a reason, that is no fact


def table(path, columns, optional=0):
    """The lines of a .tsv as lists; one that has not so many columns ends the program, with file and line."""
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        complain(path, 1, f'it cannot be read as UTF-8 text: {e}')
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith('#'):
            row = [part.strip() for part in line.split('\t')]
            if not columns <= len(row) <= columns + optional or not all(row):
                complain(path, number, f'{columns} columns are expected, with a tab between them, not {len(row)}: {line}')
            rows.append((number, row))
    return rows


def complain(path, number, what):
    print(f'{path}:{number}: {what}', file=sys.stderr)
    sys.exit(2)


class Fact:
    """names: for each part of the topic all that it is called, the one that the answer uses first."""

    def __init__(self, kind, topic, answer, more=''):
        self.kind, self.topic, self.answer, self.more = kind, topic, answer, more
        self.names = [part.split('=') for part in topic.split('|')]

    def keys(self):
        """All that it may be asked for by: (kind, name, ...)."""
        found = [(self.kind,)]
        for names in self.names if self.kind != 'attr' else self.names[:2]:
            found = [(*key, name) for key in found for name in names]
        return found

    def call(self, rng):
        """One name for each part, the first as often as all the others."""
        return [names[0] if len(names) == 1 or rng.random() < 0.5 else rng.choice(names[1:]) for names in self.names]


def read_facts(path, known=()):
    """The facts of a .tsv, none of which may be asked for by one of the keys `known`."""
    facts, asked, answers = [], dict.fromkeys(known, 'facts.tsv'), {}
    for number, (kind, topic, *answer) in table(path, 3, optional=1):
        if kind not in FIELDS:
            complain(path, number, f'{kind!r} is no kind of fact; there are {", ".join(FIELDS)}')
        if len(topic.split('|')) != len(FIELDS[kind]) or not all(topic.replace('=', '|').split('|')):
            complain(path, number, f'the topic of a {kind} has {len(FIELDS[kind])} parts, with | between them: {topic}')
        fact = Fact(kind, topic, *answer)
        for key in fact.keys():
            if key in asked:
                complain(path, number, f'{"|".join(key[1:])} is already a fact, in {asked[key]}')
        asked |= dict.fromkeys(fact.keys(), f'line {number}')
        for text in answer:
            if answers.setdefault(text, number) != number:
                complain(path, number, f'the answer is that of line {answers[text]}: {text}')
        facts.append(fact)
    return facts


def fill(form, kind, parts):
    return form.format(**dict(zip(FIELDS[kind], parts, strict=True)))


class Writer:
    """Draws the questions, and keeps them: self.files, {name: [row]}."""

    def __init__(self, rng):
        self.rng, self.files, self.taken = rng, {name: [] for name in FILES}, set()
        self.held = set()                                   # names with a slip that are examined
        self.forms = {}                                     # {(kind, seen or unseen): [form]}
        for _, (kind, which, form) in table(HERE / 'forms.tsv', 3):
            self.forms.setdefault((kind, which), []).append(form)
        self.texts = [re.sub('{.}', '', form) for (_, which), forms in self.forms.items() if which == 'seen'
                      for form in forms if len(form) > 6]
        self.alike = {}                                     # characters that are taken for each other
        for _, (a, b) in table(HERE / 'slips.tsv', 2):
            self.alike.setdefault(a, []).append(b)
            self.alike.setdefault(b, []).append(a)
        self.traditional = str.maketrans({a: b for _, (a, b) in table(HERE / 'traditional.tsv', 2)})
        self.common = sorted(self.alike)

    def add(self, name, question, answer, before=(), also=()):
        """A row of file `name`, unless it is in one already. before: the question and the answer that came first.
        also: other answers that fit."""
        question = question.strip()
        if not question or (question, before) in self.taken:
            return
        self.taken.add((question, before))
        row = {'prompt': question, 'completion': answer} | ({'also': also} if also else {})
        if before:
            talk = zip(('user', 'assistant', 'user', 'assistant'), (*before, question, answer), strict=True)
            row = {'conversations': [{'role': role, 'content': text} for role, text in talk]}
        self.files[name].append(row)

    def write(self, folder):
        self.rng.shuffle(self.files['train'])
        for name, rows in self.files.items():
            if rows:
                text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
                unfinished = folder / f'{name}.jsonl.{os.getpid()}'
                unfinished.write_text(text, encoding='utf-8', newline='\n')
                unfinished.replace(folder / f'{name}.jsonl')
                print(f'{name}.jsonl: {len(rows):,} questions, {sum(UNKNOWN in row.values() for row in rows):,} unknown')

    def draw(self, kind, n, which='seen'):
        """n different forms; the first ones of the list come more often, as in life."""
        keyed = sorted((self.rng.random() ** ((1 + i) ** 0.8), form)
                       for i, form in enumerate(self.forms[kind, which]))
        drawn = [form for _, form in keyed[-n:]]
        self.rng.shuffle(drawn)
        return drawn

    def one(self, kind):
        return self.rng.choice(self.forms[kind, 'seen'])

    def loose(self, kind):
        """A form made up on the spot, such as people's remarks are."""
        before = self.one('before') if self.rng.random() < 0.8 else ''
        return before + self.one('bare ' + kind) + self.one('behind')

    def babbled(self, kind):
        """A topic between scraps of anything: whatever stands around it, the topic decides."""
        def scrap(longest):
            text = self.rng.choice(self.texts)
            i = self.rng.randrange(len(text))
            return text[i:i + self.rng.randint(0, longest)]
        return scrap(12) + self.rng.choice(['', '，', '：']) + self.one('bare ' + kind) + scrap(8)

    def mistyped(self, form):
        """The form with one character too many, too few or wrong, but not within the topic."""
        places = [i for i, c in enumerate(form) if '\u4e00' <= c <= '\u9fff']
        if not places:
            return form
        i = self.rng.choice(places)
        other = self.rng.choice(self.alike.get(form[i], self.common))
        return form[:i] + self.rng.choice(['', other, other, form[i] * 2, other + form[i]]) + form[i + 1:]

    def dressed(self, form):
        """Some questions begin or end with a few words more, miss their mark at the end, or are mistyped."""
        if self.rng.random() < 0.12:
            form = self.mistyped(form)
        if self.rng.random() < 0.15:
            form = self.one('opening') + form
        if self.rng.random() < 0.08:
            form += self.one('closing')
        return form.rstrip('。？') if self.rng.random() < 0.15 else form

    def slip(self, name):
        """The name with one slip of the pen: a character that sounds or looks alike, one doubled, one dropped, or all
        of it in Traditional characters; None if it is too short for that."""
        places = [i for i, c in enumerate(name) if '\u4e00' <= c <= '\u9fff']
        if len(places) < 3:
            return None
        kind, i = self.rng.random(), self.rng.choice(places)
        if kind < 0.15 and name.translate(self.traditional) != name:
            return name.translate(self.traditional)
        if kind < 0.25:
            return name[:i] + name[i] + name[i:]
        if kind < 0.35 and len(places) > 3:
            return name[:i] + name[i + 1:]
        places = [i for i in places if name[i] in self.alike]
        if not places:
            return None
        i = self.rng.choice(places)
        return name[:i] + self.rng.choice(self.alike[name[i]]) + name[i + 1:]

    def asked(self, fact):
        """A question about the fact, and the answer: what a second question may stand behind."""
        return fill(self.dressed(self.draw(fact.kind, 1)[0]), fact.kind, fact.call(self.rng)), fact.answer

    def slipped(self, fact):
        """The names of a fact, one with a slip; None if all are too short."""
        parts = fact.call(self.rng)
        places = [i for i in range(len(parts)) if FIELDS[fact.kind][i] not in 'qp']
        self.rng.shuffle(places)
        for i in places:
            name = self.slip(parts[i])
            if name:
                return [*parts[:i], name, *parts[i + 1:]]
        return None


def near_misses(writer, facts, n):
    """n (kind, parts) that nobody knows, each close to what is known: halves of two names, a name with a noun behind
    it, the attribute of one thing asked of another, sides of two comparisons or reasons."""
    rng, found = writer.rng, []
    by_kind = {kind: [fact for fact in facts if fact.kind == kind] for kind in FIELDS}
    all_names = {name for fact in facts for part in fact.names for name in part}
    names = [fact.names[0][0] for fact in by_kind['define']]
    names = [name for name in names if 3 <= len(name) <= 6 and all('\u4e00' <= c <= '\u9fff' for c in name)]
    while len(found) < n:
        kind = rng.choice(['define'] * 6 + ['attr'] * 2 + ['diff', 'why'])
        if kind == 'define':
            a, b = rng.sample(names, 2)
            name = rng.choice([a[:rng.randint(2, len(a) - 1)] + b[-rng.randint(1, len(b) - 1):], a + writer.one('noun')])
            parts = [name]
            if name in all_names or any(k in name for k in all_names if len(k) > max(2, len(name) - 2)):
                continue
        else:
            a, b = rng.sample(by_kind[kind], 2)
            parts = [rng.choice(a.names[0]), *(part[0] for part in b.names[1:])]
            others = [fact for fact in by_kind[kind] if parts[0] in fact.names[0] or parts[0] in fact.names[-1]]
            if any(parts[1] in part for fact in others for part in fact.names):
                continue
        if (kind, parts) not in found:
            found.append((kind, parts))
    return found


def examine_facts(writer, facts, known):
    """The questions of the examination, one in a form that others are learned in, one with a slip, one to validate on."""
    rng, forms, add = writer.rng, writer.forms, writer.add
    for number, fact in enumerate(facts):
        drawn = writer.draw(fact.kind, rng.randint(13, 16))
        if fact.topic in FIRST:
            drawn = [form for form in drawn if form != FIRST[fact.topic]] + [FIRST[fact.topic]]
        parts = [names[0] for names in fact.names] if fact.topic in FIRST else fact.call(rng)
        add('heldout', fill(drawn.pop(), fact.kind, parts), fact.answer)
        add('val', fill(drawn.pop(), fact.kind, fact.call(rng)), fact.answer)
        slip = writer.slipped(fact) if number % 3 == 0 else None
        if slip and (fact.kind, *slip[:2]) not in known:
            add('heldout_slips', fill(rng.choice(forms[fact.kind, 'seen'][:8]), fact.kind, slip), fact.answer)
            writer.held.add((fact.kind, *slip))


def ask_facts(writer, facts, known):
    """What is learned of each fact: many forms, some made up on the spot, its name with a slip, a long question."""
    rng, forms = writer.rng, writer.forms
    for fact in facts:
        unseen = [fill(form, fact.kind, parts).rstrip('。？') for form in forms[fact.kind, 'unseen']
                  for parts in itertools.product(*fact.names)]
        drawn = [writer.dressed(form) for form in writer.draw(fact.kind, SEEN)]
        drawn += [make(fact.kind) for make in (writer.loose, writer.babbled) for _ in range(MADE_UP)]
        slips = [writer.dressed(writer.draw(fact.kind, 1)[0]) for _ in range(SLIPS)]
        questions = []
        for form in [*drawn, *slips]:               # the last ones, and some others, with a slip of the pen
            parts = writer.slipped(fact) if len(questions) >= len(drawn) or rng.random() < 0.25 else None
            if not parts or (fact.kind, *parts) in writer.held or (fact.kind, *parts[:2]) in known:
                parts = fact.call(rng)
            questions.append(fill(form, fact.kind, parts))
        if rng.random() < 0.4:
            question = fill(rng.choice(forms[fact.kind, 'seen'][:8]), fact.kind, fact.call(rng))
            questions.append(writer.one('long').replace('{q}', question))
        for question in questions:
            if not any(way in question for way in unseen):          # as a slip may have it
                writer.add('train', question, fact.answer)


def small_talk(writer):
    talk = table(HERE / 'smalltalk.tsv', 3, optional=1)
    answers = {'cannot': UNKNOWN} | {intent: text for _, (intent, which, text, *_) in talk if which == 'answer'}
    for number, (intent, which, text, *also) in talk:
        others = ' '.join(also).split()
        if not answers.keys() >= {intent, *others} or which not in ('answer', 'seen', 'unseen'):
            complain(HERE / 'smalltalk.tsv', number, f'{intent} {" ".join(others)}: each needs an answer, and {which!r} '
                     'should be answer, seen or unseen')
        if which == 'unseen':
            writer.add('heldout_talk', text, answers[intent], also=[answers[other] for other in others])
    for _, (intent, which, text, *_) in talk:
        if which == 'seen':
            for chance in TYPED:
                end = writer.rng.choice(['', '。', '？', '！', '~', '啊', '呀'])
                typed = writer.mistyped(text.rstrip('。？！') + end) if writer.rng.random() < chance else text
                writer.add('train', typed, answers[intent])


def second_questions(writer, facts):
    """(fact, kind, answer) of the questions that may follow on a fact, which name nothing: more, its use, why, how."""
    whole = {key: fact for fact in facts for key in fact.keys()}
    for fact in facts:
        if fact.more or writer.rng.random() < 0.25:
            yield fact, 'more', fact.more or NO_MORE
        for kind in ('use', 'why', 'how'):
            other = whole.get((kind, fact.names[0][0])) if fact.kind == 'define' else None
            if other or writer.rng.random() < 0.08:
                yield fact, kind, other.answer if other else NO_MORE


def examine_turns(writer, facts):
    for fact, kind, answer in second_questions(writer, facts):
        if writer.rng.random() < 0.35:
            form = writer.rng.choice(writer.forms['then ' + kind, 'unseen'])
            writer.add('heldout_turns', form, answer, writer.asked(fact))


def second_turns(writer, facts):
    """A second question, which names nothing: what was asked before says what it is about."""
    for fact, kind, answer in second_questions(writer, facts):
        for _ in range(TURNS['none' if answer == NO_MORE else kind]):
            writer.add('train', writer.one('then ' + kind), answer, writer.asked(fact))
    # by itself such a question gets an answer of its own; then sample.py asks it again, behind what was said before
    for kind in ('use', 'more', 'why', 'how'):
        for form in writer.forms['then ' + kind, 'seen']:
            for question in (form, form.rstrip('。？'), writer.mistyped(form), writer.dressed(form)):
                writer.add('train', question, FOLLOW)


def read_unknown(writer, known):
    """(topics, questions) of what it does not know, in any order: [(kind, parts)], [question]."""
    topics = []
    for number, (kind, topic) in table(HERE / 'unknown_topics.tsv', 2):
        if any(key in known for key in Fact(kind, topic, '').keys()):
            complain(HERE / 'unknown_topics.tsv', number, f'{topic} is also among the facts')
        topics.append((kind, topic.split('|')))
    questions = (HERE / 'unknown_questions.txt').read_text(encoding='utf-8').splitlines()
    writer.rng.shuffle(topics)
    writer.rng.shuffle(questions)
    return topics, questions


def examine_unknown(writer, topics, questions, near):
    for i, (kind, parts) in enumerate(topics):
        writer.add('heldout_unknown' if i < 220 else 'val', fill(writer.draw(kind, 1)[0], kind, parts), UNKNOWN)
    for i, question in enumerate(questions):
        writer.add('heldout_unknown' if i < 60 else 'val', question, UNKNOWN)
    for kind, parts in near:
        writer.add('heldout_near', fill(writer.rng.choice(writer.forms[kind, 'seen'][:8]), kind, parts), UNKNOWN)
    for line in (HERE / 'near_misses.txt').read_text(encoding='utf-8').splitlines():
        writer.add('heldout_near', line, UNKNOWN)


def ask_unknown(writer, topics, questions, near):
    """What it does not know: other topics in the same forms, near misses, noise, and questions of any form."""
    rng = writer.rng
    for kind, parts in topics:
        forms = [writer.dressed(form) for form in writer.draw(kind, OTHERS)]
        forms.append(rng.choice([writer.loose, writer.babbled])(kind))
        if rng.random() < 0.15:
            forms.append(writer.one('long').replace('{q}', writer.draw(kind, 1)[0]))
        for form in forms:
            writer.add('train', fill(form, kind, parts), UNKNOWN)
    for kind, parts in near:
        writer.add('train', fill(writer.dressed(writer.draw(kind, 1)[0]), kind, parts), UNKNOWN)
    for question in [*(noise(writer) for _ in range(300)), *questions]:
        writer.add('train', question, UNKNOWN)


def noise(writer):
    """What a cat types: characters, letters, digits or marks without a meaning."""
    rng = writer.rng
    letters = rng.choice([writer.common, writer.common, 'abcdefghijklmnopqrstuvwxyz', '0123456789', '。？！，…~'])
    text = ''.join(rng.choice(letters) for _ in range(rng.randint(2, 12)))
    return text * rng.choice([1, 1, 1, 2]) + rng.choice(['', '', '是什么？', '？'])


def main(own='', folder=HERE):
    """All files; or those about the facts in the file `own`, into `folder`, with some of the set's among them."""
    facts = read_facts(HERE / 'facts.tsv')
    known = {key for fact in facts for key in fact.keys()}
    writer = Writer(random.Random(20240520))
    if own:
        mine, folder = read_facts(own, known), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(OFTEN):
            examine_facts(writer, mine, known)
        for _ in range(OFTEN):
            ask_facts(writer, mine, known)
        if not (HERE / 'train.jsonl').exists():
            main()
        lines = (HERE / 'train.jsonl').read_text(encoding='utf-8').splitlines()
        writer.files['train'] += map(json.loads, writer.rng.sample(lines, AMONG))
        writer.write(folder)
    else:
        # first the examination, so that it stays as it is when the same things are asked more, or less, in training
        examine_facts(writer, facts, known)
        for fact in writer.rng.sample(facts, min(640, len(facts))):
            form = writer.rng.choice(writer.forms[fact.kind, 'unseen'])
            writer.add('heldout_forms', fill(form, fact.kind, fact.call(writer.rng)), fact.answer)
        examine_turns(writer, facts)
        near = near_misses(writer, facts, 600)
        topics, questions = read_unknown(writer, known)
        examine_unknown(writer, topics[:280], questions[:80], near[:200])
        ask_facts(writer, facts, known)
        small_talk(writer)
        second_turns(writer, facts)
        ask_unknown(writer, topics[280:], questions[80:], near[200:])
        writer.write(HERE)


if __name__ == '__main__':
    main(*sys.argv[1:3])
