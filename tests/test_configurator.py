"""configurator.py: who wins, what a value may look like, what is said about a wrong one, and --help."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import configurator
from configurator import UserError, configure

ROOT = Path(configurator.__file__).resolve().parent
SCRIPT = '''"""Greet somebody."""
from configurator import configure

# whom
name = 'world'          # who is greeted
times = 3               # how often
# how
rate = 0.5              # greetings in a second
loud = False            # in capitals
quiet = True            # without a bell
config = configure(globals())
later = 'not a setting'
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that takes a command line and returns the settings it leads to; config files lie in its folder."""
    monkeypatch.chdir(tmp_path)
    Path('greet.py').write_text(SCRIPT, encoding='utf-8')

    def settings(*argv, **rules):
        namespace = dict(__name__='greet', __file__='greet.py', name='world', times=3, rate=0.5, loud=False, quiet=True)
        config = configure(namespace, argv, **rules)
        assert {key: namespace[key] for key in config} == config    # the globals are what the dict says
        return config

    return settings


def write(path, text):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(text, encoding='utf-8')
    return path


def message(run, *argv, **rules):
    with pytest.raises(UserError) as e:
        run(*argv, **rules)
    assert 1 <= len(str(e.value).splitlines()) <= 2
    return str(e.value)


# -----------------------------------------------------------------------------
# who wins

def test_without_arguments_the_defaults_stand(run):
    assert run() == {'name': 'world', 'times': 3, 'rate': 0.5, 'loud': False, 'quiet': True}


def test_the_later_wins_among_files_and_command_line(run):
    a, b = write('a.py', "name = 'a'\ntimes = 10\nrate = 1.0\n"), write('b.py', "name = 'b'\ntimes = 20\n")
    assert run(a, b)['name'] == 'b'
    assert run(b, a)['name'] == 'a'
    config = run(a, b, '--times=30')
    assert (config['name'], config['times'], config['rate']) == ('b', 30, 1.0)
    assert run('--times=30', a)['times'] == 10
    assert run('--times=30', '--times=31')['times'] == 31


# -----------------------------------------------------------------------------
# what a value may look like

@pytest.mark.parametrize('argv, name, value', [
    (['--times=5'], 'times', 5),
    (['--times', '5'], 'times', 5),
    (['--times=1e3'], 'times', 1000),
    (['--times=-4'], 'times', -4),
    (['--times', '-4'], 'times', -4),
    (['--times=12345678901234567'], 'times', 12345678901234567),    # more than a float holds
    (['--rate=1'], 'rate', 1.0),
    (['--rate', '6e-4'], 'rate', 6e-4),
    (['--rate', '-1.5'], 'rate', -1.5),
    (['--name=123'], 'name', '123'),
    (['--name', '123'], 'name', '123'),
    (['--name=true'], 'name', 'true'),
    (['--name='], 'name', ''),
    (['--name', ''], 'name', ''),
    (['--name=a=b=c'], 'name', 'a=b=c'),
    (['--name', 'a=b'], 'name', 'a=b'),
    (['--name=--times=5'], 'name', '--times=5'),
    (['--name', '-1'], 'name', '-1'),
    (['--name=你好'], 'name', '你好'),
    (['--loud'], 'loud', True),
    (['--loud=true'], 'loud', True),
    (['--loud=True'], 'loud', True),
    (['--loud=1'], 'loud', True),
    (['--loud', '1'], 'loud', True),
    (['--quiet=false'], 'quiet', False),
    (['--quiet=0'], 'quiet', False),
    (['--quiet', 'false'], 'quiet', False),
    (['--quiet', 'False'], 'quiet', False),
    (['--quiet', '0'], 'quiet', False),
])
def test_the_command_line_is_read_as_the_type_of_the_default(run, argv, name, value):
    got = run(*argv)[name]
    assert got == value and type(got) is type(value)


def test_a_lone_flag_does_not_swallow_what_follows(run):
    config = run('--loud', '--times=5')
    assert (config['loud'], config['times']) == (True, 5)
    config = run('--loud', write('a.py', 'times = 6\n'))
    assert (config['loud'], config['times']) == (True, 6)


def test_a_config_file_may_assign_tuples_and_compute(run):
    config = run(write('a.py', "name, times = 'pair', 7\nrate = 3 * 2 ** -2\nloud = not loud\n"))
    assert config == {'name': 'pair', 'times': 7, 'rate': 0.75, 'loud': True, 'quiet': True}


def test_a_config_file_may_use_the_settings_so_far(run):
    first, second = write('a.py', 'times = 4\n'), write('b.py', 'times = times * 10\nrate = 1 / times\n')
    assert run(first, second)['times'] == 40
    assert run('--times=5', second)['rate'] == 1 / 50


def test_a_config_file_may_import_and_define_helpers(run):
    config = run(write('a.py', 'import math\nfrom pathlib import Path\n\n_half = 0.5\n\n'
                               'def twice(x):\n    return 2 * x * _half * 2\n\n'
                               'times = int(twice(3))\nrate = math.sqrt(4)\nname = Path(__file__).stem\n'))
    assert (config['times'], config['rate'], config['name']) == (6, 2.0, 'a')


def test_a_config_file_gives_an_int_for_a_float_and_a_whole_float_for_an_int(run):
    config = run(write('a.py', 'rate = 1\ntimes = 1e3\nname = 123\n'))
    assert [config[key] for key in ('rate', 'times', 'name')] == [1.0, 1000, '123']
    assert [type(config[key]) for key in ('rate', 'times', 'name')] == [float, int, str]


def test_a_preset_counts_where_it_stands_and_what_is_set_after_it_or_beside_it_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('shape.py', "preset = ''  # a shape\nlayers = 12  # how many\nmlp = 'gelu'  # which\nconfig = configure()\n")
    presets = {'small': {'layers': 4, 'mlp': 'silu'}, 'large': {'layers': 48}}

    def shape(*argv):
        namespace = dict(__name__='shape', __file__='shape.py', preset='', layers=12, mlp='gelu')
        config = configure(namespace, argv, presets=presets)
        return config['preset'], config['layers'], config['mlp']

    recipe = write('recipe.py', "preset = 'small'\n")
    assert shape(recipe) == ('small', 4, 'silu')
    assert shape(recipe, '--mlp=swiglu', '--layers=6') == ('small', 6, 'swiglu')
    assert shape('--mlp=swiglu', '--layers=6', recipe) == ('small', 4, 'silu')
    assert shape(recipe, '--preset=large') == ('large', 48, 'silu')
    assert shape(write('beside.py', "layers = 12\npreset = 'small'\n")) == ('small', 12, 'silu')
    assert shape(write('derived.py', "include('recipe.py')\nlayers = 12\n")) == ('small', 12, 'silu')
    with pytest.raises(UserError, match="no preset 'medium'.*small, large"):
        shape('--preset=medium')


def test_a_config_file_may_include_another_of_its_folder(run):
    write('config/base.py', "times, rate = 7, 2.0\nname = 'base'\n")
    config = run(write('config/derived.py', "include('base.py')\nrate = rate / 4\nname = 'derived'\n"))
    assert (config['times'], config['rate'], config['name']) == (7, 0.5, 'derived')
    write('config/base.py', 'times = 7\nrate = 1 / 0\n')
    assert 'config/base.py, line 2: ZeroDivisionError' in message(run, 'config/derived.py')
    write('config/base.py', 'times = = 7\n')
    assert 'config/base.py, line 1: SyntaxError' in message(run, 'config/derived.py')
    assert 'config/lost.py, line 1: FileNotFoundError' in message(run, write('config/lost.py', "include('not.py')\n"))


@pytest.mark.parametrize('arg, rules, said', [
    ('--times=-1', dict(negative=False), 'times must be at least 0, not -1'),
    ('--rate=nan', {}, "rate should be a number, not 'nan' (on the command line)"),
    ('--times=0', dict(at_least={'times': 1}), 'times must be at least 1, not 0'),
    ('--times=1001', dict(at_most={'times': 1000}), 'times must be at most 1,000, not 1001'),
    ('--name=moon', dict(one_of={'name': ('world', 'sun')}), "name 'moon' is not one of world, sun")])
def test_a_value_out_of_range_says_what_the_range_is(run, arg, rules, said):
    assert message(run, arg, **rules) == said
    run(**rules)


def test_a_setting_of_another_project_names_ours():
    for names in ('lr learning_rate', 'max_iters max_steps', 'start prompt', 'hidden_size n_embd',
                  'wandb_log tensorboard', 'gradient_accumulation_steps total_batch_size'):
        theirs, ours = names.split()
        with pytest.raises(UserError, match=f'unknown setting {theirs!r} here; did you mean {ours}'):
            configurator._must_exist(theirs, dict.fromkeys(('min_lr', 'batch_size', 'grad_clip', ours)), 'here')


def test_two_runs_do_not_see_each_other(run):
    assert run('--times=9')['times'] == 9
    assert run()['times'] == 3


# -----------------------------------------------------------------------------
# what is said about a wrong one

def test_an_unknown_key_names_the_nearest(run):
    assert "'tims'" in (text := message(run, '--tims=5')) and 'did you mean times?' in text
    text = message(run, write('a.py', 'nmae = 1\n'))
    assert "'nmae'" in text and 'a.py' in text and 'did you mean name?' in text
    assert '--help' in message(run, '--xyzzyxyzzy=5')


def test_what_is_below_the_configure_line_is_not_a_setting(run):
    assert "'later'" in message(run, '--later=1')


@pytest.mark.parametrize('arg, expected', [
    ('--times=many', 'a whole number'), ('--times=1.5', 'a whole number'), ('--times=', 'a whole number'),
    ('--times=inf', 'a whole number'), ('--times=nan', 'a whole number'), ('--rate=fast', 'a number'),
    ('--rate=1,5', 'a number'), ('--loud=maybe', 'true or false'), ('--loud=2', 'true or false')])
def test_a_wrong_type_on_the_command_line_says_what_was_expected(run, arg, expected):
    name, _, value = arg[2:].partition('=')
    text = message(run, arg)
    assert name in text and expected in text and repr(value) in text


@pytest.mark.parametrize('line, expected', [
    ('times = 1.5', 'a whole number'), ('times = True', 'a whole number'), ('times = None', 'a whole number'),
    ('times = [1]', 'a whole number'), ("times = '12'", 'a whole number'), ('times = max', 'a whole number'),
    ("rate = '1e-3'", 'a number'), ('rate = (1, 2)', 'a number'), ('rate = False', 'a number'),
    ("loud = 'yes'", 'true or false'), ("loud = 'false'", 'true or false'), ('loud = None', 'true or false'),
    ('loud = []', 'true or false')])
def test_a_wrong_type_in_a_config_file_says_what_was_expected_and_where(run, line, expected):
    text = message(run, write('a.py', line + '\n'))
    assert line.split()[0] in text and expected in text and 'a.py' in text


def test_a_setting_without_its_value_is_an_error(run):
    assert '--times needs a value' in message(run, '--times')
    assert '--name needs a value' in message(run, '--name', '--loud')


@pytest.mark.parametrize('text, line, what', [
    ('times = 4\nrate = = 1\n', 2, 'SyntaxError'),
    ('times = 4\n\nrate = tims\n', 3, 'tims'),
    ('def f():\n    return 1 / 0\n\nrate = f()\n', 2, 'ZeroDivisionError'),
    ('import no_such_module_anywhere\n', 1, 'no_such_module_anywhere'),
    ("import json\n\nrate = json.loads('{')\n", 3, 'JSONDecodeError'),      # raised far inside a library
])
def test_a_config_file_that_fails_is_named_with_the_line(run, text, line, what):
    said = message(run, write('config/bad.py', text))
    assert f'config/bad.py, line {line}:' in said and what in said


def test_a_missing_config_file_hints_at_the_nearest_or_at_the_syntax(run):
    write('config/train_gpt2.py', '')
    assert 'did you mean config/train_gpt2.py?' in message(run, 'config/train_gtp2.py')
    text = message(run, 'times=5')
    assert "'times=5'" in text and '--key=value' in text


def test_an_error_changes_nothing(tmp_path):
    path = tmp_path / 'greet.py'
    path.write_text(SCRIPT, encoding='utf-8')
    namespace = dict(__name__='greet', __file__=str(path), name='world', times=3, rate=0.5, loud=False, quiet=True)
    with pytest.raises(UserError):
        configure(namespace, ['--times=5', '--rate=fast'])
    assert namespace['times'] == 3


# -----------------------------------------------------------------------------
# the script itself

def test_an_imported_script_keeps_its_defaults(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['main.py', '--times=5', '--no_such_setting=1'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    assert importlib.import_module('greet').times == 3
    monkeypatch.delitem(sys.modules, 'greet')
    monkeypatch.setattr(sys, 'argv', ['greet.py', '--times=5'])
    assert runpy.run_path('greet.py', run_name='__main__')['config']['times'] == 5


def test_help_is_read_from_the_source(run, capsys):
    with pytest.raises(SystemExit) as e:
        run('--help')
    assert not e.value.code
    out = capsys.readouterr().out
    assert out.startswith('Greet somebody.') and 'python greet.py' in out and 'later' not in out
    shown = re.findall(r'--(\w+)=(\S+) +(.+)', out.partition('whom')[2])
    assert shown == [('name', "'world'", 'who is greeted'), ('times', '3', 'how often'),
                     ('rate', '0.5', 'greetings in a second'), ('loud', 'False', 'in capitals'),
                     ('quiet', 'True', 'without a bell')]
    assert out.index('whom') < out.index('--name') < out.index('how\n') < out.index('--rate')


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'prepare_data.py', 'plot.py'])
def test_help_shows_every_setting_with_its_default_and_comment(script, tmp_path):
    done = subprocess.run([sys.executable, ROOT / script, '--help'], cwd=tmp_path, capture_output=True, text=True,
                          encoding='utf-8', timeout=60)
    assert done.returncode == 0 and done.stderr == ''
    source = (ROOT / script).read_text(encoding='utf-8').partition('config = configure(')[0]
    settings = re.findall(r'^([a-z]\w*) = (.*?)(?:\s+# (.+))?$', source, re.MULTILINE)
    assert len(settings) >= 8
    for name, default, comment in settings:
        assert comment, f'{name} has no comment'
        line = f'--{name}={ast.literal_eval(default)!r}'
        assert any(shown.split(maxsplit=1)[0] == line.split()[0] and line in shown and shown.endswith(comment)
                   for shown in done.stdout.splitlines() if shown.strip()), f'{line} is not in --help'
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_no_config_files_are_collected_where_a_script_wants_them(run, capsys):
    write('loud.py', 'loud = True\n')
    config = run('out/a', 'loud.py', '--times=2', 'out/b', collect='name')
    assert (config['name'], config['loud'], config['times']) == ('world,out/a,out/b', True, 2)
    assert "no config file 'out/a'" in message(run, 'out/a')
    with pytest.raises(SystemExit):
        run('--help', collect='name')
    assert 'usage: python greet.py [name ...] [config/file.py ...]' in capsys.readouterr().out
