"""The recipes in config/ and the README's table of their costs agree with the code, and with arithmetic."""

import re
from pathlib import Path

import pytest
import torch

import bench
from configurator import configure
from dataset import MADE_BY
from model import GPT, PRESETS, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
ROW = r'\| (gpt2\S*) \| ([\d,]+) \| ([\d.]+) \| (\d+) x 1024: (\d+) GB \| ([\d.]+) h \| ([\d.]+) h \|'
TABLE = {row[0]: row[1:] for row in re.findall(ROW, (ROOT / 'README.md').read_text(encoding='utf-8'))}


def settings_of(*configs, script='train.py'):
    """The settings that a script would have with these config files."""
    source = (ROOT / script).read_text(encoding='utf-8')
    end = source.index('\n# ---', source.index('config = configure('))
    namespace = {'__file__': str(ROOT / script), '__name__': 'tests', 'configure': configure, 'PRESETS': PRESETS,
                 'argv': [str(ROOT / 'config' / name) for name in configs]}
    exec(source[source.index('\n# ---'):end].replace('configure(globals()', 'configure(globals(), argv'), namespace)
    return namespace['config']


@pytest.mark.parametrize('config', sorted(p.name for p in (ROOT / 'config').glob('*.py')))
def test_every_recipe_has_only_real_settings_and_begins_with_its_command(config):
    settings = settings_of(config)
    assert settings['out_dir'] != 'out'
    script, *args = MADE_BY[settings['dataset']].split()        # so a missing data set's message says what helps
    assert (ROOT / script).is_file()
    made = 'dataset' if '--dataset=custom' not in args else 'out=data'
    assert script != 'prepare_data.py' or f'--{made}={settings["dataset"]}'.replace('data=', 'data/') in args
    head = (ROOT / 'config' / config).read_text(encoding='utf-8').split('\n\n')[0].split('\nout_dir')[0]
    assert f'train.py config/{config}' in head


@pytest.mark.parametrize('preset', ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'])
def test_the_table_of_costs_follows_from_the_formulas(preset):
    parameters, gflop, batch, gigabytes, hours, hours8 = TABLE[preset]
    with torch.device('meta'):
        n = sum(p.numel() for p in GPT(GPTConfig(**PRESETS[preset])).parameters())
    assert int(parameters.replace(',', '')) == n
    shape = PRESETS[preset]
    # 6 for each parameter that multiplies, 12 * layers * channels * context for attention
    flops = 6 * (n - 1024 * shape['n_embd']) + 12 * shape['n_layer'] * shape['n_embd'] * 1024
    assert float(gflop) == pytest.approx(flops / 1e9, abs=0.005)
    assert float(hours) == pytest.approx(flops * 10e9 / (989e12 * 0.4) / 3600, abs=0.051)
    assert float(hours8) == pytest.approx(float(hours) / 8, abs=0.06)
    # weights, gradients and two moments alone; and less than the memory there is
    assert 16 * n / 1e9 < int(gigabytes) < 80
    settings = settings_of(f'train_{preset.replace("-", "_")}.py')
    assert settings['batch_size'] == int(batch) and settings['preset'] == preset
    assert settings['total_batch_size'] % (8 * settings['batch_size'] * settings['block_size']) == 0
    assert settings['max_steps'] * settings['total_batch_size'] == pytest.approx(10e9, rel=1e-3)


@pytest.mark.parametrize('readme', ['README.md', 'README.zh.md'])
def test_the_batches_of_the_readmes_torchrun_commands_come_out_whole(readme):
    text = (ROOT / readme).read_text(encoding='utf-8')
    commands = re.findall(r'^torchrun (.*) train\.py config/(\S+)(.*)$', text, re.M)
    assert any('--nnodes=2' in launch for launch, *_ in commands)
    for launch, config, more in commands:
        processes = int(re.search(r'--nproc_per_node=(\d+)', launch)[1]) * (2 if '--nnodes=2' in launch else 1)
        settings = settings_of(config)
        batch_size = int((re.search(r'--batch_size=(\d+)', more) or [0, settings['batch_size']])[1])
        assert settings['total_batch_size'] % (processes * batch_size * settings['block_size']) == 0


def test_what_the_forward_pass_keeps_is_counted():
    # one block in bfloat16: residual stream and norms in float32, the rest in 2 bytes; a widely used estimate for
    # attention that is never whole in memory is 34 bytes a token and channel (Korthikanti et al. 2022)
    shape = PRESETS['gpt2']
    one, two = (bench.saved_bytes(shape, n, 2) - bench.saved_bytes(shape, n, 1) for n in (1, 2))
    assert (two - one) / 1024 / 768 == pytest.approx(34, rel=0.15)
