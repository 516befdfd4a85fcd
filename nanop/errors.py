"""
Errors for users, and the checks that raise them.

Whatever a user can mend raises UserError, anywhere in this repository: one line that says what was given, what is
allowed and what to do. Scripts print it and exit with code 2.
"""
import importlib
import math
import sys
from contextlib import contextmanager

from nanop.terminal import lasting_output


class UserError(ValueError):
    """A mistake that the user can mend, in one line."""

    def __str__(self):
        return super().__str__().replace('\n', '\\n')  # from a name or value that the user gave


def first_line(error):
    """The first line of an exception's text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def explained(kinds, problem, use=''):
    """Turn exceptions of these kinds into a UserError: the problem, the exception's first line, what to do."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{problem} ({first_line(error)}){': ' if use else ''}{use}") from None


def import_optional(module, needed_by, package=''):
    """The module called `module`, of a package that nanoP runs without; `package` is its name for pip if it differs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = package or module if (error.name or module).startswith(module) else error.name
        raise UserError(f'{needed_by} needs {package}: pip install {package}') from None
    except Exception as error:  # whatever a broken installation raises
        raise UserError(f'{needed_by} needs {package or module}, which cannot be imported ({first_line(error)}): '
                        'install it again') from None


def require(config, key, ok, use):
    """Refuse config.key unless `ok`; `use` says what to do instead."""
    if not ok:
        raise UserError(f'{key}={getattr(config, key)!r} is not allowed: {use}')


def require_values(config, at_least={}, fractions=(), below_one=(), choices={}, factors={}):
    """Refuse a config with a value that is too small, infinite or nan, outside [0, 1] or [0, 1), or not a choice, or
    with a dict of factors that has an unknown name or a factor that is not a finite number above 0."""
    for key, lowest in at_least.items():
        value = getattr(config, key)
        ok = lowest <= value < (2**63 if isinstance(value, int) else math.inf)  # False for nan
        require(config, key, ok, f'use a finite value of at least {lowest}')
    for key in fractions:
        require(config, key, 0 <= getattr(config, key) <= 1, 'use a value in [0, 1]')
    for key in below_one:
        require(config, key, 0 <= getattr(config, key) < 1, 'use a value in [0, 1)')
    for key, allowed in choices.items():
        names = ', '.join(name or "''" for name in allowed)
        require(config, key, getattr(config, key) in allowed, f'use one of {names}')
    for key, names in factors.items():
        held = getattr(config, key)
        require(config, key, isinstance(held, dict), f'use a dict such as dict({next(iter(names))}=2.0)')
        for name, factor in held.items():
            require(config, key, name in names, f"{name!r} is unknown, use some of {', '.join(names)}")
            ok = type(factor) in (int, float) and 0 < factor < math.inf  # False for nan
            require(config, key, ok, f'use a finite number above 0 for {name}')


def require_acting(config, key, names):
    """Refuse a factor other than 1 in the dict config.key that would do nothing. Factors act on `names` alone."""
    for name, factor in getattr(config, key).items():
        require(config, key, name in names or factor == 1, f'it would do nothing for {name}, leave that out; here it '
                                                           f"acts on {', '.join(names) or 'no role'}")


def exit_on_user_error(main, if_stopped='stopped', goes_on=True):
    """Run main() and exit with the code it returns; with 2 and one line after a UserError; with 130 after Ctrl-C.
    Unless it `goes_on`, it also ends when its output can no longer be written."""
    with lasting_output(goes_on):
        try:
            code = main()
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
            code = 2
        except KeyboardInterrupt:
            print(f'\n{if_stopped}', file=sys.stderr)
            code = 130
    sys.exit(code if isinstance(code, int) else 0)
