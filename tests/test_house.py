"""Tests of the house: what may import what, how long files and functions may be, that names are used once."""
import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {'sample', 'coord_check', 'sweep', 'bench', 'export_hf', 'gpu_check'}
EXAMPLES = {'plain_gpt', 'plain_gpt_completep'}  # of somebody else's code, so they know nothing of ours
AT_THE_ROOT = {path.stem for path in ROOT.glob('*.py')}
SOURCES = [*ROOT.glob('*.py'), *ROOT.glob('nanop/*.py'), *ROOT.glob('tools/*.py'), *ROOT.glob('data/*/*.py'),
           *ROOT.glob('examples/*.py'), *ROOT.glob('tests/*.py')]
ONCE = {'plan', 'run', 'check', 'measure', 'Report', 'read', 'write_csv', 'commit'}  # at most one definition


def imports(path):
    """The modules that a file imports anywhere in it, like nanop.errors."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def packages(path):
    return {name.split('.')[0] for name in imports(path)}


def test_the_library_imports_nothing_from_above():
    for path in ROOT.glob('nanop/*.py'):
        assert not packages(path) & {*AT_THE_ROOT, 'tools'}, path


def test_the_model_and_the_training_script_import_little():
    allowed = {'nanop', 'nanop.errors', 'nanop.layers', 'nanop.optimizers', 'nanop.sampling'}
    ours = {name for name in imports(ROOT / 'model.py') if name.startswith('nanop')}
    assert all(name in allowed or name.rpartition('.')[0] in allowed - {'nanop'} for name in ours), ours
    assert packages(ROOT / 'model.py') & AT_THE_ROOT == set()
    assert packages(ROOT / 'train.py') & {*AT_THE_ROOT, 'tools'} == {'model', 'configurator'}


def test_nobody_imports_a_script():
    for path in SOURCES:
        if path.parent.name != 'tests' and path.name != 'test_model.py':
            assert not packages(path) & {*SCRIPTS, 'measure'}, path
    for path in ROOT.glob('tools/*.py'):
        assert packages(path) & AT_THE_ROOT <= {'model', 'train', 'configurator'}, path


def test_the_examples_stand_alone():
    for name in EXAMPLES:
        assert packages(ROOT / 'examples' / f'{name}.py') <= {'torch', *sys.stdlib_module_names}
    ours = packages(ROOT / 'examples' / 'measure.py') - {'torch', *sys.stdlib_module_names}
    assert ours == {'nanop', 'tools', *EXAMPLES}


def test_the_root_is_small():
    assert AT_THE_ROOT >= {'model', 'train', 'configurator', 'test_model', *SCRIPTS} and len(AT_THE_ROOT) <= 10


@pytest.mark.parametrize('name, most', [('model.py', 420), ('train.py', 400), ('README.md', 200)])
def test_files_stay_readable(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


def definitions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def test_functions_stay_short():
    for path in SOURCES:
        for node in definitions(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f'{path.name}: {node.name}'


def test_one_name_is_one_thing():
    places = defaultdict(list)
    for path in SOURCES:
        if path.parent.name != 'tests' and path.name != 'test_model.py':
            for node in definitions(path):
                if node.name in ONCE:
                    places[node.name].append(path.name)
    assert all(len(where) == 1 for where in places.values()), dict(places)


def test_no_module_hides_one_of_the_standard_library():
    assert not {path.stem for path in SOURCES} & sys.stdlib_module_names


def test_every_folder_in_the_readme_exists():
    tree = re.search(r'## The files.*?```\n(.*?)```', (ROOT / 'README.md').read_text(), flags=re.S).group(1)
    names = re.findall(r'^([\w./]+)', tree, flags=re.M) + re.findall(r'\b(\w+/|\w+\.md)(?= |$)', tree, flags=re.M)
    assert len(names) > 12
    for name in names:
        assert (ROOT / name).exists(), name
