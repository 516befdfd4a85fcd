"""The terminal of a script: output that outlives it, and the signals that stop a run."""
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress


class Lasting:
    """A text stream that its terminal cannot break. When it can no longer be written, what follows is dropped, after a
    warning if `goes_on`; else the process ends: nobody wants what it would print."""

    def __init__(self, stream, goes_on=True):
        self.stream, self.goes_on = stream, goes_on

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        try:
            return action(*arguments)
        except (OSError, ValueError) as error:  # a broken pipe, a full disk, a hang-up; a closed file
            with suppress(OSError, ValueError):  # what is still in the buffer is dropped, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, 'w')
            if self is sys.stdout and not (isinstance(error, BrokenPipeError) and not self.goes_on):
                print(f"{'warning' if self.goes_on else 'error'}: the output can no longer be written ({error})"
                      f"{', going on without it' if self.goes_on else ''}", file=sys.stderr)
            if not self.goes_on:
                sys.exit(141)  # as a shell reports a broken pipe


@contextmanager
def lasting_output(goes_on=True):
    """While entered, no fault of the terminal is an exception, and '?' replaces what its encoding cannot print."""
    before = sys.stdout, sys.stderr
    for number in (1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    out, err = (stream or open(os.devnull, 'w') for stream in before)
    if hasattr(out, 'reconfigure'):
        out.reconfigure(errors='replace')
    sys.stdout, sys.stderr = Lasting(out, goes_on), Lasting(err)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


# Signals: Ctrl-C; that of kill, torchrun and most schedulers; the one that SLURM sends before time is up, if asked to;
# a terminal that hangs up
STOP_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGHUP') if hasattr(signal, name)]
if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    STOP_SIGNALS.remove(signal.SIGHUP)  # nohup has asked for that
SAME_S = 1.0  # torchrun may pass one signal on twice within this time


class StopSignals:
    """While entered, keeps the first stop signal in `received`, for the training loop; a second ends the process."""

    def __enter__(self):
        self.received, self.at = None, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in STOP_SIGNALS}
        return self

    def handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            with suppress(RuntimeError):  # the signal came in the middle of another print
                print(f'\n{signal.Signals(number).name}: finishing the step, then saving; again: at once', flush=True)
        elif time.monotonic() - self.at > SAME_S:
            os._exit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
