"""
Turns a command line of config files and --key=value flags into a dict of overrides for a dataclass of defaults.

    python train.py config/completep_small.py --n_layer=16 --learning_rate=0.004

Files and flags apply from left to right. A config file is Python made of plain assignments; names that start with an
underscore are its own. It runs as code: use files you trust.
"""
import difflib
import inspect
import math
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from types import FunctionType, ModuleType


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what was given, what is allowed and what to do."""


def require_at_least(config, **least):
    """Raises UserError for a key of `config` that is below its least value, infinite or not a number."""
    for key, lowest in least.items():
        value = getattr(config, key)
        if not lowest <= value < (2**63 if isinstance(value, int) else math.inf):  # refuses nan, too
            raise UserError(f'{key}={value} is not allowed: use a finite value of at least {lowest}')


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_on_user_error(main, if_stopped='stopped'):
    """Runs main() and exits, with its code if it returns one; a UserError is one line and code 2, Ctrl-C 130."""
    try:
        code = main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f'\n{if_stopped}', file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def check(key, value, types, where):
    """Returns `value` as the type of the default of `key`; ints become floats. Raises UserError."""
    if key not in types:
        near = difflib.get_close_matches(key, types, n=1)
        hint = f"did you mean '{near[0]}'?" if near else 'see --help for all keys'
        raise UserError(f"{where}: unknown key '{key}'; {hint}")
    expected = types[key]
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f'{where}: {key} must be {expected.__name__}, got {value!r} ({type(value).__name__})')
    return value


def check_values(key, value, types, where, axes):
    """check(), and for the keys of `axes` a list of values instead of one. Raises UserError."""
    if key not in axes or not isinstance(value, list):
        return check(key, value, types, where)
    if not value:
        raise UserError(f'{where}: {key} is an empty list; give it at least one value')
    return [check(key, one, types, where) for one in value]


def read_file(path, types, axes=()):
    """Overrides from one config file. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"no file '{path}'; flags are written --key=value")
    folder = str(Path(path).resolve().parent)
    modules_before = set(sys.modules)
    sys.path.insert(0, folder)  # so that `from completep_small import *` works in a file beside it
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise UserError(f'{path}, line {error.lineno}: {error.msg}') from None
    except Exception as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}') from None
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - modules_before:  # another folder may have a file of the same name
            if str(getattr(sys.modules[name], '__file__', None) or '').startswith(folder):
                del sys.modules[name]
    overrides = {key: check_values(key, value, types, path, axes) for key, value in names.items()
                 if not key.startswith('_') and not isinstance(value, (ModuleType, FunctionType))}
    if not overrides:  # YAML's `n_layer: 3`, for one, is valid Python that sets nothing
        raise UserError(f'{path}: sets no key; a config is Python, a line like n_layer = 3 for each key')
    return overrides


def parse(text, expected):
    """The text of a flag as the type `expected`, or as it is where it is none: check() says what was expected."""
    if expected is bool:
        return {'true': True, 'false': False}.get(text.lower(), text)
    try:
        return expected(text) if expected in (int, float) else text
    except ValueError:
        return text


def read_flag(argument, types, axes=()):
    """The (key, value) of one --key=value; for the keys of `axes` also --key=value,value. Raises UserError."""
    key, equals, text = argument[2:].partition('=')
    if not equals:
        raise UserError(f"'{argument}' has no value; write {argument}=VALUE")
    values = [parse(part, types.get(key, str)) for part in (text.split(',') if key in axes else [text])]
    return key, check_values(key, values if len(values) > 1 else values[0], types, f"'{argument}'", axes)


def configure(defaults, argv, axes=None):
    """Overrides of the dataclass `defaults` from the arguments `argv`; --help prints its source, which is the manual.

    `axes` is a second dataclass, whose keys are known too and may hold a list of values. Raises UserError for whatever
    it cannot use.
    """
    types, more = ({field.name: field.type if isinstance(field.type, type) else type(field.default)
                    for field in fields(keys)} if keys else {} for keys in (defaults, axes))
    axes = more.keys() - types.keys()
    types |= more
    overrides = {}
    for argument in argv:
        if argument in ('-h', '--help'):
            print(inspect.getsource(sys.modules[defaults.__module__]).split('"""')[1].strip() + '\n')
            print(inspect.getsource(defaults).split('    def __post_init__')[0])
            sys.exit(0)
        if argument.startswith('--'):
            key, value = read_flag(argument, types, axes)
            overrides[key] = value
        else:
            overrides.update(read_file(argument, types, axes))
    return overrides
