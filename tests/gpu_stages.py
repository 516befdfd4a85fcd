"""Stages for tests/test_gpu.py that end in every way. They run in processes of their own, which import this file."""
import os
import signal
import subprocess
import sys
import time

from tools.gpu_stage import Figure, NotRun


def works(setting):
    yield Figure('loss', 1.5, 2.0)


def finds_a_wrong_loss(setting):
    yield Figure('loss', 2.5, 2.0, note='of step 3')
    yield Figure('gradient', float('nan'), 1.0)
    yield Figure('steps', 3)


def crashes(setting):
    yield Figure('first', 1)
    raise RuntimeError('no kernel\nmore text')


def hangs(setting):
    """And so does a process that it has started, in a group of its own and deaf to SIGTERM."""
    code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'
    yield Figure('child', subprocess.Popen([sys.executable, '-c', code], start_new_session=True).pid)
    time.sleep(600)


def is_killed(setting):
    yield Figure('first', 1)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(setting):
    yield Figure('first', 1)
    print('the last words', flush=True)
    os._exit(0)


def cannot_run(setting):
    raise NotRun('no such thing here')
    yield
