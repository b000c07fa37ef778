"""Writes the .jsonl files beside it from facts.tsv, forms.tsv, unknown_topics.tsv and unknown_questions.txt.

    python data/zh_qa/build.py

Every fact draws some of the seen forms, so that a form is used by many facts and no fact has them all: that is what
makes a small model answer a question that it has never seen. Unseen forms are for heldout_forms.jsonl alone.
The same files give the same bytes.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
UNKNOWN = '这个问题我还没有学过。'

FIELDS = {'define': 'x', 'diff': 'ab', 'why': 'sp', 'attr': 'saq', 'how': 'v', 'use': 'x'}    # what a topic's parts are
# a topic by itself, as it stands within a longer remark, and what may be said before and behind it
BARE = {'define': ['{x}', '什么是{x}', '{x}是什么'], 'diff': ['{a}和{b}', '{a}和{b}的区别', '{a}与{b}的不同', '{b}和{a}'],
        'why': ['{s}{p}', '为什么{s}{p}', '{s}为什么{p}'], 'attr': ['{s}的{a}', '{s}的{a}{q}'],
        'how': ['{v}', '怎么{v}', '如何{v}'], 'use': ['{x}的作用', '{x}有什么用', '{x}的用处']}
BEFORE = ['今天想聊聊', '电视里提到', '弟弟的作业里有', '我查了半天', '群里在讨论', '据说很重要，', '课本上写着', '好多人问', '面试被问到',
          '刚才听到', '帮我看看', '老板让我查', '晚饭时说起', '在网上看到', '妹妹想知道', '我就问一个，', '第二题：', '突然冒出来一个问题，',
          '记不起来了，', '有点糊涂，', '你学过没有，', '别的先不说，', '说真的，', '下一个，', '我猜你知道', '路上有人提起', '翻到一页讲', '啥也不懂，', '我给忘了，', '没招了，',
          '为啥老有人问', '咋也想不起来，', '群里老在说', '跟你打听个事，', '哈，', '孩子作业写到', '我是小白，',
          '挺好奇的，', '麻烦看一下', '搞清楚一下', '听同事说', '不明白，', '你跟我讲，', '一直想弄清楚', '有件小事，', '词条：', '这个嘛，']
BEHIND = ['，怎么讲？', '，求教。', '，谁懂？', '，是怎么一回事？', '，一头雾水。', '，快告诉我。', '，三句话以内。', '……', '，好奇得很。',
          '，该怎么答？', '，你说说看。', '，能讲透吗？', '，我没有头绪。', '，想听听你的讲法。', '，帮我想想。', '。', '？', '，行吗？', '，一定要讲清楚。',
          '，老师没讲。', '，咋讲？', '，讲讲呗。', '，说的是啥？', '，咋答呢？', '，我忘光了。', '，支个招。', '，给说道说道。', '，哪儿不懂问哪儿。', '，讲讲嘛。',
          '，干嘛的？', '，说的是什么嘛？', '，非要弄懂。', '，有何意义？', '，说清楚吧。', '，总也弄不明白。', '，孩子等着呢。']
OPENINGS = ['你好，', '您好，', '请教一下，', '不好意思，', '打扰了，', '对了，', '嗯，', '那个，', '我在自学，', '上课没听清，',
            '刚看到一本书，', '朋友问我，', '昨天有人问我，', '作业题：', '在线等，', '急，', '有个小问题，', '帮个忙，',
            '弱弱地问一句，', '突然想到，', '我是初中生，', '助手，', '机器人，', '亲，', '哎，']
CLOSINGS = ['谢谢。', '谢谢！', '多谢。', '麻烦了。', '简单说说就行。', '我是新手。', '讲明白点。', '想听你说。', '可以吗？', '好吗？']
SLIPS = ('的了是个吗呢嘛啊哦呀么这那我你他在有不就也很都要会说上下来去一二大小多少好人天啥咋呗哈唉哇跟还又再让给被把从到想问看听讲写学'
         '懂忘记老同家门口手头心里外面前后左右高低快慢新旧长短真假事物东西南北早晚今明昨年月日时分秒点号次回遍声句字词本页课题目道理由'
         '法招窍差别处儿边起开关出入过得着地为因所以但如果虽然而且或者吧嗯哼喂')
NOUNS = ['游戏', '公司', '大赛', '餐厅', '协会', '的故事', '之歌', '手机壳', '纪录片', '漫画', '博物馆', '主题曲', '火锅', '面霜', '乐队', '杂志',
         '小镇', '夏令营', '玩具', '咖啡', '战队', '奖学金', '俱乐部', '饼干', '号飞船', '摄影', '二手车', '考试', '壁纸', '猫']
FIRST = {'注意力机制': '什么是{x}？', '蒸馏水|纯水': '解释{a}与{b}区别？'}      # everybody's first questions: held out


def fill(form, kind, topic):
    return form.format(**dict(zip(FIELDS[kind], topic.split('|'), strict=True)))


def rows_of(name):
    lines = (HERE / name).read_text(encoding='utf-8').splitlines()
    return [line.split('\t') for line in lines if line.strip() and not line.startswith('#')]


def draw(rng, forms, n):
    """n different forms; the first ones of the list come more often, as in life."""
    keyed = sorted((rng.random() ** ((1 + i) ** 0.35), form) for i, form in enumerate(forms))
    return [form for _, form in keyed[-n:]]


def loose(rng, kind):
    """A form made up on the spot, such as people's remarks are."""
    before = rng.choice(BEFORE) if rng.random() < 0.8 else ''
    return before + rng.choice(BARE[kind]) + rng.choice(BEHIND)


def mistyped(rng, form):
    """The form with one character too many, too few or wrong, but not within the topic."""
    places = [i for i, c in enumerate(form) if '\u4e00' <= c <= '\u9fff']
    if not places:
        return form
    i = rng.choice(places)
    return form[:i] + rng.choice(['', rng.choice(SLIPS), form[i] * 2, rng.choice(SLIPS) + form[i]]) + form[i + 1:]


def dressed(rng, form):
    """Some questions begin or end with a few words more, miss their mark at the end, or are mistyped."""
    if rng.random() < 0.15:
        form = mistyped(rng, form)
    if rng.random() < 0.2:
        form = rng.choice(OPENINGS) + form
    if rng.random() < 0.1:
        form += rng.choice(CLOSINGS)
    return form.rstrip('。？') if rng.random() < 0.1 else form


def hybrids(rng, facts, n):
    """n topics that do not exist, each made of the halves of two that do, and n / 2 of one that does with a noun behind
    it: knowing half a name is not knowing it."""
    names = [topic for kind, topic, _ in facts if kind == 'define' and len(topic) >= 3 and not topic.isascii()]
    known = {part for _, topic, _ in facts for part in topic.split('|')}
    made = []
    while len(made) < n:
        a, b = rng.sample(names, 2)
        name = a[:rng.randint(2, len(a) - 1)] + b[-rng.randint(1, len(b) - 1):]
        if len(name) <= 7 and not any(k in name for k in known if len(k) > len(name) - 2) and name not in made:
            made.append(name)
    names = [name for name in names if len(name) <= 6]
    return made + [rng.choice(names) + rng.choice(NOUNS) for _ in range(n // 2)]


def main():
    rng = random.Random(20240520)
    files = {name: [] for name in ('train', 'val', 'heldout', 'heldout_forms', 'heldout_unknown')}
    taken = set()

    def add(name, question, answer):
        if question in taken:
            return False
        taken.add(question)
        files[name].append({'prompt': question, 'completion': answer})
        return True

    # 1) what it knows: some forms to learn from, one to validate on, one held out; and for some one that is no one's else
    facts = rows_of('facts.tsv')
    seen, unseen = ({kind: [form for k, which, form in rows_of('forms.tsv') if (k, which) == (kind, name)]
                     for kind in FIELDS} for name in ('seen', 'unseen'))
    for kind, topic, answer in facts:
        forms = draw(rng, seen[kind], rng.randint(11, 15))
        rng.shuffle(forms)
        if topic in FIRST:
            forms = [form for form in forms if form != FIRST[topic]] + [FIRST[topic]]
        add('heldout', fill(forms.pop(), kind, topic), answer)
        add('val', fill(forms.pop(), kind, topic), answer)
        for form in [dressed(rng, form) for form in forms] + [loose(rng, kind) for _ in range(rng.randint(4, 7))]:
            add('train', fill(form, kind, topic), answer)
    for kind, topic, answer in rng.sample(facts, 260):
        add('heldout_forms', fill(rng.choice(unseen[kind]), kind, topic), answer)

    # 2) what it does not: other topics in the same forms, and questions of any form
    unknown = rows_of('unknown_topics.tsv')
    rng.shuffle(unknown)
    for i, (kind, topic) in enumerate(unknown):
        name = 'heldout_unknown' if i < 160 else 'val' if i < 220 else 'train'
        if name == 'train':
            forms = [dressed(rng, draw(rng, seen[kind], 1)[0]), loose(rng, kind)]
        else:
            forms = draw(rng, seen[kind], 1)
        for form in forms:
            add(name, fill(form, kind, topic), UNKNOWN)
    for topic in hybrids(rng, facts, 700):
        add('train', fill(dressed(rng, draw(rng, seen['define'], 1)[0]), 'define', topic), UNKNOWN)
    free = [line for line, in rows_of('unknown_questions.txt')]
    rng.shuffle(free)
    for i, question in enumerate(free):
        add('heldout_unknown' if i < 40 else 'val' if i < 60 else 'train', question, UNKNOWN)

    for name, rows in files.items():
        if name == 'train':
            rng.shuffle(rows)
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
        (HERE / f'{name}.jsonl').write_text(text, encoding='utf-8', newline='\n')
        print(f'{name}.jsonl: {len(rows):,} questions, {sum(r["completion"] == UNKNOWN for r in rows):,} unknown')


if __name__ == '__main__':
    main()
