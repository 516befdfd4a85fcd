"""
Turns a command line of config files and --key=value flags into overrides for a dataclass of defaults.

    python train.py config/completep_small.py --n_layer=16 --learning_rate=0.004 --lr_mult.embedding=4

Files and flags apply from left to right. A key that is a dict of numbers, lr_mult = dict(embedding=4.0), is added to
entry by entry; --lr_mult.NAME=4 sets one, and --lr_mult.NAME+OTHER=4 sets several to the same number. A config file is
Python made of plain assignments; names that start with an underscore are its own. It runs as code: use files you trust.
"""
import ast
import difflib
import inspect
import os
import runpy
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import ModuleType

from nanop.errors import UserError


def field_types(keys):
    """{key: type} of a dataclass, or of none."""
    return {field.name: field.type if isinstance(field.type, type) else type(field.default)
            for field in fields(keys)} if keys else {}


def typed(key, value, types, where, axes=()):
    """`value` as the type of the default of `key`; ints become floats. A key of `axes` may hold a list of values."""
    if key in axes and isinstance(value, list):
        if not value:
            raise UserError(f'{where}: {key} is an empty list; give it at least one value')
        return [typed(key, one, types, where) for one in value]
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean '{near[0]}'?" if near else 'see --help for all keys'
        raise UserError(f"{where}: unknown key '{key}'; {hint}")
    expected = types[key]
    if expected is dict:
        return typed_entries(key, value, where, key in axes)
    if expected is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f'{where}: {key} must be {expected.__name__}, got {value!r} ({type(value).__name__})')
    return value


def typed_entries(key, value, where, listed):
    """`value` as a dict of floats. An entry a+b becomes two, a and b. If `listed`, an entry may hold a list of values,
    and a+b stays one entry, because it is one axis; nested() makes it two."""
    if type(value) is not dict:
        raise UserError(f'{where}: {key} holds a number for each name, got {value!r}: write {key} = dict(name=2.0), or '
                        f'--{key}.name=2')
    entries = {}
    for names, number in value.items():
        entry = f'{key}.{names}'
        number = typed(entry, number, {entry: float}, where, [entry] if listed else ())
        for name in [names] if listed else str(names).split('+'):
            if name in entries:
                raise UserError(f'{where}: {key}.{name} is set twice, leave one of them out')
            entries[name] = number
    return entries


def flat(values):
    """{key: value} in which every entry of a dict has a key of its own: lr_mult.embedding."""
    entries = {f'{key}.{name}': number for key, held in values.items() if isinstance(held, dict)
               for name, number in held.items()}
    return {key: value for key, value in values.items() if not isinstance(value, dict)} | entries


def flags_of(config):
    """All keys of a config as flags, except those that hold an empty text."""
    return [f'--{key}={value}' for key, value in flat(asdict(config)).items() if value != '']


def nested(values):
    """flat() undone. Refuses a name that is set twice, as in lr_mult.a and lr_mult.a+b."""
    found = {}
    for key, value in values.items():
        key, dot, names = key.partition('.')
        for name in names.split('+') if dot else ():
            entries = found.setdefault(key, {})
            if name in entries:
                raise UserError(f'{key}.{name} is set twice, leave one of them out')
            entries[name] = value
        if not dot:
            found[key] = value
    return found


def imported_names(path):
    """The names that a config imports one by one, from math import sqrt: they are its own unless they are keys."""
    imports = [node for node in ast.walk(ast.parse(Path(path).read_bytes())) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def read_file(path, types, axes=()):
    """The overrides in one config file."""
    if not Path(path).is_file():
        raise UserError(f"no file '{path}'; flags are written --key=value")
    folder, modules_before = str(Path(path).resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)  # so that `from completep_small import *` finds the file beside this one
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f'{path}, line {error.lineno}: {error.msg}') from None
    except (Exception, SystemExit) as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}') from None
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - modules_before:  # another folder may have a file of the same name
            if str(getattr(sys.modules[name], '__file__', None) or '').startswith(folder):
                del sys.modules[name]
    helpers = imported_names(path) | {key for key, value in names.items()
                                      if isinstance(value, ModuleType) or callable(value)}
    overrides = {key: typed(key, value, types, path, axes) for key, value in names.items()
                 if not key.startswith('_') and (key in types or key not in helpers)}
    if not overrides:  # YAML's `n_layer: 3`, for one, is valid Python that sets nothing
        raise UserError(f'{path}: sets no key; a config is Python, a line like n_layer = 3 for each key')
    return overrides


def parse(text, expected):
    """The text of a flag as the type `expected`, or unchanged if it is not one; typed() reports what was expected."""
    if expected is bool:
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return expected(text) if expected in (int, float) else text
    except ValueError:
        return text


def read_flag(argument, types, axes=(), switches=()):
    """{key: value} of one --key=value. A key of `axes` may have several values, a,b; a switch needs none."""
    key, equals, text = argument[2:].partition('=')
    if not equals and key in switches:
        return {key: True}
    if not equals:
        raise UserError(f"'{argument}' has no value; write {argument}=VALUE")
    key, dot, names = key.partition('.')
    kind = float if dot else types.get(key, str)
    values = [parse(part, kind) for part in (text.split(',') if key in axes else [text])]
    value = values if len(values) > 1 else values[0]
    return {key: typed(key, {names: value} if dot else value, types, f"'{argument}'", axes)}


def print_help(defaults):
    """The manual of a script: its docstring, then the source of its keys."""
    print(inspect.getsource(sys.modules[defaults.__module__]).split('"""')[1].strip() + '\n')
    classes = [keys for keys in defaults.__mro__[::-1] if is_dataclass(keys)]
    print('The keys and their defaults' + '; where two classes have a key, the lower one counts' * (len(classes) > 1))
    for keys in classes:
        print(inspect.getsource(keys).split('\n    def __post_init__')[0] + '\n')


def merge(earlier, later, defaults):
    """`earlier` overridden by `later`, dicts entry by entry. A group in defaults.one_of is of keys that set one thing:
    where `later` sets one of them, the others go back to their defaults."""
    one_of = getattr(defaults, 'one_of', ())
    replaced = {key: getattr(defaults, key) for group in one_of if any(later.get(key) for key in group)
                for key in group if key in earlier}
    dicts = {key: earlier[key] | value for key, value in later.items() if isinstance(value, dict) and key in earlier}
    return earlier | replaced | later | dicts


def configure(defaults, argv, axes=None, switches=()):
    """The overrides of the dataclass `defaults` on a command line; --help prints the manual and exits.

    `axes` is a second dataclass, whose keys may hold lists of values. `switches` are bool keys that a bare --key sets.
    """
    types, more = field_types(defaults), field_types(axes)
    listed = more.keys() - types.keys()
    types, overrides, flags = more | types, {}, {}
    rules = next((keys for keys in (axes, defaults) if hasattr(keys, 'one_of')), defaults)
    for argument in argv:
        if argument in ('-h', '--help'):
            print_help(defaults)
            sys.exit(0)
        is_flag = argument.startswith('--')
        later = read_flag(argument, types, listed, switches) if is_flag else read_file(argument, types, listed)
        flags |= later if is_flag else {}
        for group in getattr(rules, 'one_of', ()):
            both = [key for key in group if (flags | later).get(key)]
            if len(both) > 1:
                raise UserError(f"{argument}: {' and '.join(both)} set one thing: leave one of them out (a config may "
                                'del what it imports; a flag after a config replaces it)')
            lost = [key for key in group if overrides.get(key) and key not in later and key not in flags and both]
            if lost and os.environ.get('RANK', '0') == '0':
                print(f"{argument} replaces {', '.join(f'{key}={overrides[key]}' for key in lost)}")
        overrides = merge(overrides, later, rules)
    return overrides


def configure_both(own, other, argv, switches=()):
    """(overrides of the script's `own` dataclass, overrides of the `other` one, whose keys may hold lists)."""
    overrides = configure(own, argv, axes=other, switches=switches)
    mine = field_types(own)
    return ({key: value for key, value in overrides.items() if key in mine},
            {key: value for key, value in overrides.items() if key not in mine})
