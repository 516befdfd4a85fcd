"""
What a run does about signals and about a second process in its folder.
"""
import os
import signal
import time
from pathlib import Path

from filelock import FileLock, Timeout

from configurator import UserError

# Ctrl-C; kill, torchrun and most schedulers; what SLURM sends before it takes a machine away, if asked to
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name)]
SAME_S = 1.0  # torchrun may pass one signal on twice


class StopSignals:
    """While entered, the first stop signal is kept in `received`, for the loop to see; a second ends the process."""

    def __enter__(self):
        self.received, self.at = None, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            print(f'\n{signal.Signals(number).name}: finishing the step, then saving; again: at once', flush=True)
        elif time.monotonic() - self.at > SAME_S:
            os._exit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def lock(out_dir):
    """Takes a folder for this process, until it ends or the result is released. Raises UserError if it is taken.

    The system releases the lock of a process that dies; the empty file stays.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        held = FileLock(Path(out_dir, '.lock'))
        held.acquire(blocking=False)
    except Timeout:
        raise UserError(f"another process is training in '{out_dir}': wait for it, or use another --out_dir") from None
    except OSError as error:
        raise UserError(f"out_dir='{out_dir}' cannot be written: {error}") from None
    return held
