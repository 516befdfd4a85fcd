"""Tests of README.md and docs/: every link leads somewhere, every command is one, every figure is that of a result."""
import csv
import json
import re
import shlex
from pathlib import Path

import pytest

import bench
import coord_check
import sample
import stress_faults
import stress_hosts
import sweep
from configurator import configure
from nanop.errors import UserError
from train import TrainConfig, read_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', *sorted(ROOT.glob('docs/*.md'))]


def text_of(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for text, target in re.findall(r'\[([^\]]*)\]\(([^)\s]+)\)', page.read_text()):
        if target.startswith('https://'):
            continue
        file, _, anchor = target.partition('#')
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), (text, target)
        if anchor and there.suffix == '.md':
            titles = re.findall(r'^#+ (.*)$|^\*\*(.*?)\*\*', there.read_text(), flags=re.M)
            anchors = {re.sub(r'[^\w -]', '', title).strip().lower().replace(' ', '-') for pair in titles
                       for title in pair if title}
            assert anchor in anchors, (target, anchors)


def commands():
    """(page, words) of every command in a plain code block, and in the first words of an inline one."""
    for page in PAGES:
        blocks = re.findall(r'^```\n(.*?)^```', page.read_text(), flags=re.S | re.M)
        lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
        lines += re.findall(r'`((?:python|torchrun|make|pip|sbatch) [^`]+)`', re.sub(r'\n', ' ', page.read_text()))
        for line in lines:
            if re.match(r'(python|torchrun|make|pip|sbatch|git) ', line.strip()):
                yield pytest.param(shlex.split(line, comments=True), id=f'{page.name}: {line.strip()[:70]}')


def check_flags(script, arguments):
    """Let the script read its command line; files that a command before it would have made are left out."""
    if arguments == ['--help']:
        return
    arguments = [word for word in arguments if not word.startswith('out/') and '..' not in word.partition('=')[2]]
    if script == 'train.py':
        if not any('resume' in word for word in arguments):
            read_config(arguments)
        configure(TrainConfig, arguments)
    elif script == 'sweep.py':
        sweep.read_sweep(arguments)
    elif script == 'bench.py':
        bench.read_bench(arguments)
    else:
        config = {'coord_check.py': coord_check.CoordCheckConfig, 'sample.py': sample.SampleConfig,
                  'tests/stress_faults.py': stress_faults.StressConfig,
                  'tests/stress_hosts.py': stress_hosts.HostsConfig}[script]
        config(**configure(config, arguments))


@pytest.mark.parametrize('words', commands())
def test_commands_are_commands(words):
    program, *words = words
    if program == 'make':
        assert f'\n{words[0]}: ' in text_of('Makefile')
    elif program == 'sbatch':
        assert (ROOT / words[0]).exists()
    elif program == 'pip':
        assert words[0] == 'install'
        assert words[1:] in (['.'], ['-r', 'requirements.txt']) or all(word.isidentifier() or '-' in word
                                                                      for word in words[1:])
    elif program == 'git':
        assert words == ['apply', '../nanoP/docs/nanogpt_completep.patch']
    elif words[:2] == ['-m', 'pytest']:
        assert all((ROOT / word).exists() for word in words if word.endswith('.py'))
    else:
        script = next(word for word in words if word.endswith('.py'))
        arguments = words[words.index(script) + 1:]
        assert (ROOT / script).exists(), script
        if script.startswith('data/') or 'train_shakespeare_char.py' in ' '.join(arguments) and '--base_n_layer=2' in \
                arguments:  # these parse their own flags; that one is for the patched nanoGPT
            return
        check_flags(script, arguments)
