"""How the scripts fit together: imports run one way, and the README's map shows every file."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from scripts import ROOT

FILES = {path.stem: path for path in ROOT.glob('*.py')}


def imports(path):
    """The files of this project that a file imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FILES.keys()


def test_imports_make_no_circle():
    graph = {name: imports(path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()              # raises CycleError, which names the circle
    with pytest.raises(CycleError):
        TopologicalSorter(graph | {'files': {'checkpoint'}}).prepare()


def test_no_module_imports_a_script_but_these():
    scripts = {name for name, path in FILES.items()
               if name == 'train' or re.search('^if __name__ == ', path.read_text(encoding='utf-8'), re.M)}
    importing = {name: imports(path) & scripts for name, path in FILES.items()}
    assert {name: found for name, found in importing.items() if found} == {
        'train': {'hellaswag', 'eval_zh', 'plot', 'sample'}, 'eval_zh': {'sample'},
        'bench': {'hellaswag', 'peers'}}


def test_scripts_import_configurator_before_what_takes_long_to_load():
    scripts = {name: path.read_text(encoding='utf-8') for name, path in FILES.items() if name != 'configurator'}
    scripts = {name: text for name, text in scripts.items() if 'configure(globals()' in text}
    assert len(scripts) > 7
    for name, text in scripts.items():
        found = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                 for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert next(m for m in found if m.split('.')[0] not in sys.stdlib_module_names) == 'configurator', name


@pytest.mark.parametrize('chosen, expected', [({}, '10000'), ({'GOMP_SPINCOUNT': '7'}, '7'),
                                              ({'OMP_WAIT_POLICY': 'active'}, None)])
def test_how_threads_wait_is_chosen_before_torch_is_loaded_unless_the_user_has(chosen, expected):
    env = {name: value for name, value in os.environ.items() if name not in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')}
    code = 'import configurator, os, sys; print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**env, **chosen}, text=True, capture_output=True)
    assert done.stdout.split() == [str(expected), 'False']


def test_the_top_level_is_one_screen_of_files_and_the_readmes_map_has_them_all():
    assert len(FILES) <= 25
    rows = re.findall(r'^\| (`[^|]*) \|', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M)
    assert FILES.keys() <= set(re.findall(r'`(\w+)\.py`', ' '.join(rows)))


def test_every_test_that_reliability_md_names_is_there():
    rows = re.findall(r'^\| .* \| (`test_.*) \|$', (ROOT / 'RELIABILITY.md').read_text(encoding='utf-8'), re.M)
    assert len(rows) > 15
    for name in re.findall(r'`(\w+(?:\.py)?)`', ' '.join(rows)):
        if name.endswith('.py'):
            tests = re.findall(r'^def test_(\w+)', (ROOT / 'tests' / name).read_text(encoding='utf-8'), re.M)
        else:
            assert any(name in test for test in tests), name


def test_public_functions_say_their_types():
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding='utf-8'))
        parts = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != '_')]
        for function in (f for part in parts for f in part.body if isinstance(f, ast.FunctionDef)):
            if name == 'train' or function.name == 'main' or function.name[0] == '_' and function.name != '__init__':
                continue                                # those of train.py are part of its text
            arguments = [a for a in ast.walk(function.args) if isinstance(a, ast.arg)]
            lacking = {a.arg for a in arguments if a.annotation is None} - {'self', 'cls', 'ctx'}
            lacking -= {a.arg for a in (function.args.vararg, function.args.kwarg) if a}
            assert not lacking, f'{name}.py: {function.name}() does not say what {lacking} are'
            assert function.returns or function.name == '__init__', f'{name}.py: {function.name}() returns what?'


def test_the_workflow_runs_the_commands_that_contributing_md_and_the_readme_name():
    yaml = pytest.importorskip('yaml')              # huggingface_hub needs it
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yml').read_text(encoding='utf-8'))
    assert workflow['permissions'] == {'contents': 'read'}
    job = workflow['jobs']['test']
    told = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    commands = re.findall(r'^(python -m (?!venv).*?)(?:  .*)?$', told.split('```')[1], re.M)
    assert len(commands) == 4 and sorted(commands) == sorted(step['run'] for step in job['steps'] if 'run' in step)
    readme = re.search(r'^python -m venv \.venv (.*)$', (ROOT / 'README.md').read_text(encoding='utf-8')
                       .split('The tests, in an environment of their own')[1], re.M)[1]
    install, test = [command for command in commands if 'pip' in command or 'pytest' in command]
    assert readme == f'&& .venv/bin/{install} && .venv/bin/{test}'
