"""Every command that stands in a README's ```sh blocks, exactly as printed, in a fresh clone and a fresh environment.

    python tests/stress/readme_trial.py                 half an hour on two quiet cores; needs a package index
    python tests/stress/readme_trial.py --list          only says what would be run, and what not, and why

What needs a GPU, the hub or another machine is left out, and named. Files that a reader brings along are written first.
A command must end with status 0 and, where the README shows what it prints, print that.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = {                # what a command holds that cannot be had here, and why
    'nproc_per_node=8': 'eight GPUs', 'train_gpt2_smoke.py': 'hours without a GPU', '--nnodes': 'two machines',
    'fineweb.py': 'the hub', 'finetune_': 'the hub', 'eval_gpt2': 'the hub', '--init_from=gpt2': 'the hub',
    'HuggingFaceTB/': 'the hub', 'Qwen/': 'the hub', 'out/gpt2': 'a model of some hours', 'HF_ENDPOINT': 'a mirror',
    'out/shakespeare_lora': 'the hub', '--dataset=shakespeare': 'a download', 'train_shakespeare': 'a download',
    'llama-server': 'llama.cpp', 'lm_eval': 'the hub, for its questions', 'pytest': 'the tests run by themselves',
}
PRINTED = {                 # what a command prints, as the READMEs have it
    'sample.py --init_from=out/zh --prompt=什么是注意力机制？':
        '[Sample 1] 注意力机制让模型处理每个词时，按相关程度给各个词分配权重，再把它们的信息加权汇总。',
}
BROUGHT = {                 # the files of a reader
    'prompts.txt': 'The first\nThe second\n',
    'my_facts.tsv': 'define\t青团饼\t青团饼是用艾草汁和糯米做的点心。\n'
                    'define\t石板桥灯会\t石板桥灯会是村里每年正月办的灯会。\n',
    'my.jsonl': ''.join(json.dumps({'prompt': f'{i}号箱子里有什么？', 'completion': f'{i}号箱子里有{i}本书。'},
                                   ensure_ascii=False) + '\n' for i in range(200)),
    'poems.jsonl': ''.join(json.dumps({'text': f'春風吹又生，第{i}夜聽雨聲。'}, ensure_ascii=False) + '\n'
                           for i in range(400)),
}


def commands():
    """The lines of the READMEs' sh blocks, each once, in order, without comments."""
    found = []
    for name in ('README.md', 'README.zh.md'):
        for block in re.findall(r'^```sh\n(.*?)^```', (ROOT / name).read_text(encoding='utf-8'), re.M | re.S):
            found += [re.sub(r'\s{2,}#.*', '', line) for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(found))


def main():
    todo = []
    for command in commands():
        why = next((why for part, why in LEFT_OUT.items() if part in command), None)
        print(f'left out ({why}): {command}' if why else f'to run: {command}')
        todo += [] if why else [command]
    if '--list' in sys.argv:
        return
    place = Path(tempfile.mkdtemp()) / 'clone'
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(place)], check=True)
    for name, text in BROUGHT.items():
        (place / name).write_text(text, encoding='utf-8')
    env = {name: value for name, value in os.environ.items() if name not in ('VIRTUAL_ENV', 'PYTHONPATH')}
    active, failed = '', 0
    for command in todo:
        start = time.monotonic()
        done = subprocess.run(['bash', '-c', active + command], cwd=place, env=env, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=3600)
        expected = next((text for part, text in PRINTED.items() if command.endswith(part)), '')
        good = done.returncode == 0 and expected in done.stdout
        failed += not good
        print(f'{"ok" if good else "FAILED"} {time.monotonic() - start:6.0f} s  {command}', flush=True)
        if not good:
            print(done.stdout[-2000:], done.stderr[-2000:], sep='\n')
        active = '. .venv/bin/activate && '             # the first command makes it, and enters it
    print(f'{len(todo) - failed} of {len(todo)} commands do as printed')
    sys.exit(failed > 0)


if __name__ == '__main__':
    main()
