"""
Trains on two hosts, cuts the cable between them, and checks that the run says so, stops, and resumes when it is back.

    python tests/stress_hosts.py                                as root, on Linux

The hosts are network namespaces of this machine, joined by a veth pair; the commands are those of docs/scaling.md. In
the end weights, optimizer state and metrics.csv must equal those of a run without a cut, bit for bit. Exit code 1 if
anything differs; 0, with a reason, where namespaces cannot be made.
"""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from stress_faults import differences, squares  # first: it puts the repository on the path

from configurator import configure, flags_of
from nanop import run_log
from nanop.errors import UserError, exit_on_user_error, first_line, require_values
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES, CABLES, ADDRESSES = ('nanop-a', 'nanop-b'), ('nanop-va', 'nanop-vb'), ('10.213.77.1', '10.213.77.2')


@dataclass
class HostsConfig:
    out_dir: str = 'out/stress_hosts'      # holds both runs and their data; emptied first
    timeout_s: int = 10                    # of the runs
    parallel: str = 'ddp'                  # ddp, fsdp or hsdp
    cut_at_step: int = 30

    def __post_init__(self):
        require_values(self, at_least=dict(timeout_s=1, cut_at_step=1))


def ip(*words):
    """Run iproute2's `ip`."""
    try:
        result = subprocess.run(['ip', *words], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f'ip cannot be run: {error}') from None
    if result.returncode:
        raise UserError(f"ip {' '.join(words)}: {first_line(result.stderr)}")


def remove_hosts():
    for name in NAMES:
        subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def make_hosts():
    """Make two namespaces and a cable between them."""
    remove_hosts()
    for name in NAMES:
        ip('netns', 'add', name)
    ip('link', 'add', CABLES[0], 'netns', NAMES[0], 'type', 'veth', 'peer', 'name', CABLES[1], 'netns', NAMES[1])
    for name, cable, address in zip(NAMES, CABLES, ADDRESSES):
        ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', cable)
        ip('-n', name, 'link', 'set', cable, 'up')
        ip('-n', name, 'link', 'set', 'lo', 'up')


def launch(config, port):
    """Start torchrun on each host; returns {output file: process}."""
    hosts = {}
    for name, cable, address in zip(NAMES, CABLES, ADDRESSES):
        output = Path(f'{config.out_dir}-{name}-{port}.txt')
        command = [
            'ip', 'netns', 'exec', name, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2',
            '--nproc_per_node=1', '--rdzv_backend=c10d', f'--rdzv_endpoint={ADDRESSES[0]}:{port}', '--rdzv_id=1',
            # namespaces share the machine's name, from which torchrun would take its address and who hosts the meeting
            f'--local_addr={address}', f'--rdzv_conf=is_host={int(name == NAMES[0])}',
            ROOT / 'train.py', *flags_of(config)]
        hosts[output] = subprocess.Popen(
            command, stdout=open(output, 'w'), stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': cable})
    return hosts


def wait_until(condition, limit_s):
    """Wait until condition() is true; returns whether it came true within the limit."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def have_ended(hosts):
    return all(host.poll() is not None for host in hosts.values())


def end(hosts):
    """Kill torchrun and its workers, as far as they still run."""
    for name in NAMES:  # torchrun gives its workers sessions of their own
        for pid in subprocess.run(['ip', 'netns', 'pids', name], capture_output=True, text=True).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    for host in hosts.values():
        host.wait()


def succeed(config, port):
    """Run to the end on both hosts."""
    hosts = launch(config, port)
    wait_until(lambda: have_ended(hosts), 300)
    failed = [output for output, host in hosts.items() if host.poll() != 0]
    end(hosts)
    if failed:
        raise UserError(f'a host failed or did not end: see {failed[0]}')


def stress(config):
    """Train, cut, restore, resume; prints what happens and returns lines that say what is wrong."""
    shutil.rmtree(config.out_dir, ignore_errors=True)
    out_dir = Path(config.out_dir).resolve()
    undisturbed = TrainConfig(
        out_dir=str(out_dir / 'undisturbed'), init_from='auto', dataset=squares(out_dir / 'data'), block_size=16,
        batch_tokens=256, batch_size=4, max_iters=400, n_layer=2, n_embd=64, head_dim=16, base_n_embd=16,
        base_head_dim=16, density=0.5, parameterization='completep_supar', weight_decay=0.1, learning_rate=1e-2,
        eval_interval=10, eval_tokens=1024, log_interval=1, compile=False, dtype='float32', device='cpu',
        timeout_s=config.timeout_s, parallel=config.parallel)
    cut = replace(undisturbed, out_dir=str(out_dir / 'cut'))
    succeed(undisturbed, 29501)
    print(f'two hosts trained {undisturbed.max_iters} steps ({config.parallel})')

    hosts = launch(cut, 29502)

    def far_enough():
        return any(int(row['step']) >= config.cut_at_step for row in run_log.read_metrics(cut.out_dir))
    if not wait_until(lambda: have_ended(hosts) or far_enough(), 120) or have_ended(hosts):
        end(hosts)
        raise UserError(f'the run did not get to step {config.cut_at_step}: see {next(iter(hosts))}')
    ip('-n', NAMES[0], 'link', 'set', CABLES[0], 'down')
    cut_at, found = time.monotonic(), []

    def errors():
        return [line for output in hosts for line in output.read_text().splitlines() if line.startswith('error: ')]
    wait_until(lambda: len(errors()) == 2, 2 * config.timeout_s + 10)  # a checkpoint may have to time out first
    step = int(run_log.read_metrics(cut.out_dir)[-1]['step'])
    print(f'cut after step {step}; {time.monotonic() - cut_at:.0f} s later the hosts said\n' + '\n'.join(errors()))
    if len(errors()) != 2 or not all('lost contact' in line for line in errors()):
        found.append('no clear error on both hosts within the time-out')
    if step + 1 >= cut.max_iters:
        found.append('the run ended before the cut')
    wait_until(lambda: have_ended(hosts), 10)
    for name, host in zip(NAMES, hosts.values()):
        print(f'torchrun on {name}: ' + ('still waits, and is killed' if host.poll() is None else
                                         f'exit code {host.returncode}'))
    end(hosts)

    ip('-n', NAMES[0], 'link', 'set', CABLES[0], 'up')
    succeed(cut, 29503)
    found += differences(undisturbed.out_dir, cut.out_dir)
    same = 'weights, optimizer state and metrics equal those of the run without a cut'
    print(f"restored and resumed: {'DIFFERENT: ' + '; '.join(found[:5]) if found else same}")
    return found


def main():
    config = HostsConfig(**configure(HostsConfig, sys.argv[1:]))
    try:
        make_hosts()
    except UserError as error:
        print(f'skipped, no network namespaces here: {error}')
        remove_hosts()
        return 0
    try:
        return 1 if stress(config) else 0
    finally:
        remove_hosts()


if __name__ == '__main__':
    exit_on_user_error(main)
