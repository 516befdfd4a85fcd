"""
What a sweep keeps on disk beside its study: trials.csv, a row for each point with its results, and sweep.json, which
says what the sweep is. Without the study they are enough to go on.
"""
import csv
import io
import json
import re
from pathlib import Path

from nanop.errors import UserError, explained
from nanop.files import write_atomically, write_rows

RESULTS = dict(val_loss=float, bits_per_byte=float, last_train_loss=float, diverged_at=int, tokens=int, params=int,
               seconds=float, stack=int, dtype=str, device=str, torch=str, trial=int)


def write_trials(path, rows):
    """Write all rows to a CSV file, first the keys of the points, then the results."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in RESULTS)
    text = io.StringIO(newline='')
    write_rows(text, rows, [*keys, *RESULTS])
    write_atomically(path, text.getvalue().encode())


def read_value(text, kind):
    """The value of a cell as its type. Spreadsheets write TRUE, and 2.0 for 2; 1E+06 may be rounded."""
    if kind is bool:
        return {'true': True, 'false': False}[text.lower()]
    value = int(re.sub(r'\.0*$', '', text)) if kind is int else kind(text)
    if value != value:
        raise ValueError(text)
    return value


def read_row(cells, keys, types, needed):
    """{key: value} of the cells of one line; None for an empty one."""
    if len(cells) != len(keys):
        raise ValueError(f'it has {len(cells)} cells, the first line has {len(keys)}')
    row = {}
    for key, cell in zip(keys, cells):
        kind = types.get(key, str)
        try:
            row[key] = read_value(cell, kind) if cell or key in needed else None
        except (ValueError, KeyError):
            raise ValueError(f'{key} must be {kind.__name__}, got {cell!r}') from None
        if key in RESULTS and kind is not str and row[key] is not None and row[key] < 0:
            raise ValueError(f'{key} must not be below 0, got {cell!r}')
    return row


def read_trials(path, types, needed=()):
    """The rows that write_trials() wrote, with values of the `types`, {key: type}; none if there is no file. Without a
    last row that was cut off. Refuses other text, rows that lack a loss or a `needed` key, results below 0, and two
    losses of one point."""
    path, types, needed = Path(path), RESULTS | types, (*needed, 'val_loss')
    rows, seen, use = [], {}, 'restore the file, or use another --out_dir'
    if not path.exists():
        return rows
    with explained(OSError, f"'{path}' cannot be read", use):
        content = path.read_bytes()
    try:
        text = content.decode('utf-8-sig')  # spreadsheets write a byte-order mark
        lines = csv.reader(io.StringIO(text, newline=''), strict=True)
        keys = next(lines, [])
        types = types | {key: float for key in keys if '.' in key}  # lr_mult.embedding
        missing = [key for key in needed if key not in keys]
        if keys and (missing or len(set(keys)) < len(keys)):
            problem = f"no column {', '.join(missing)}" if missing else 'the same column twice'
            raise ValueError(f"{problem} among columns separated by commas, {','.join(keys)[:60]!r}")
        cut = None if text.endswith(('\r', '\n')) else len(text.splitlines())
        for cells in filter(None, lines):
            if lines.line_num == cut and (len(cells) < len(keys) or keys[-1] != 'trial'):  # whose end nobody needs
                print(f"'{path}', line {cut}: this last row was cut off and is left out")
            else:
                row = read_row(cells, keys, types, needed)
                point = tuple(row[key] for key in keys if key in types and key not in RESULTS)
                number, loss = seen.setdefault(point, (lines.line_num, row['val_loss']))
                if loss != row['val_loss']:
                    raise ValueError(f"val_loss is {row['val_loss']}, but {loss} for the same point in line {number}")
                rows.append(row)
    except UnicodeDecodeError as error:
        number = content[:error.start].count(b'\n') + 1
        raise UserError(f"'{path}', line {number}: it is not UTF-8 text: {use}") from None
    except (csv.Error, ValueError) as error:
        raise UserError(f"'{path}', line {lines.line_num}: {error}: {use}") from None
    return rows


def read_facts(path):
    """What describes the sweep of a trials.csv: the facts that Sweep had, from the sweep.json next to it."""
    use = 'restore it, or use another --out_dir'
    with explained((OSError, ValueError), f"'{path}', which describes the trials.csv beside it, cannot be read", use):
        facts = json.loads(path.read_text(encoding='utf-8-sig'))
        if not (isinstance(facts, dict) and isinstance(facts.get('base'), dict) and isinstance(facts.get('search'), str)
                and isinstance(facts.get('differ'), list) and isinstance(facts.get('data', {}), dict)):
            raise ValueError('it does not hold base, differ, search and data')
    return facts
