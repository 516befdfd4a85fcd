"""Tests of gpu_check.py: its stages on a GPU (pytest -m gpu) and dry on the CPU, planted faults, stages that break."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from gpu_stages import cannot_run, crashes, exits, finds_a_wrong_loss, hangs, is_killed, works

import gpu_check
import model
from gpu_check import STAGES, GpuCheckConfig, lacking, print_table
from nanop import layers, machine
from nanop.errors import UserError
from tools import gpu_checks, gpu_speed, gpu_stage
from tools.gpu_stage import Figure, NotRun, Setting, Stage, make_dataset, marked, run_stage

ROOT = Path(__file__).resolve().parents[1]
CORRECTNESS = [stage for stage in STAGES if stage.kind == 'correctness']


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu_data')
    make_dataset(folder)
    return str(folder)


@pytest.fixture
def dry(tmp_path, dataset):
    return Setting(str(tmp_path), dataset, 'cpu', dry=True)


def wrong(figures):
    return [figure.why_wrong for figure in figures if figure.why_wrong]


# -----------------------------------------------------------------------------
# The stages
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('stage', CORRECTNESS, ids=lambda stage: stage.name)
def test_stage_on_a_gpu(stage, tmp_path, dataset):
    assert wrong(stage.function(Setting(str(tmp_path), dataset))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_planted_fault_is_found_on_a_gpu(tmp_path, dataset, monkeypatch):
    plant_gradient_fault(monkeypatch, only_on='cuda')
    device = machine.set_up('cuda', 'float32')
    assert wrong(gpu_checks.parity_of_variants(Setting(str(tmp_path), dataset), device))


@pytest.mark.parametrize('stage', [stage for stage in STAGES if stage.name != 'tests'], ids=lambda stage: stage.name)
def test_stage_dry(stage, dry, monkeypatch):
    """The code of every stage, on the CPU. A stage of speed has no figures there, and no stage has one of time."""
    if stage.name == 'memory':
        monkeypatch.setenv('MALLOC_MMAP_THRESHOLD_', '')  # measure_memory() sets it; this restores it afterwards
    figures = list(stage.function(dry))
    assert wrong(figures) == [] and figures
    if stage.kind == 'speed':
        assert not any(isinstance(figure.value, float) for figure in figures)
    assert not any('/s' in figure.name and figure.value for figure in figures)


def test_the_repeated_tests_need_a_gpu_and_pytest(dry, monkeypatch):
    with pytest.raises(NotRun, match='a dry run has no GPU'):
        list(gpu_speed.tests(dry))
    monkeypatch.setattr(gpu_speed, 'find_spec', lambda name: None)
    dry.dry = False
    with pytest.raises(NotRun, match='pytest is not installed'):
        list(gpu_speed.tests(dry))


def test_kernels_are_counted_once_and_named():
    times, busy = gpu_speed.kernel_times([(0, 4, 'ampere_sgemm_64x64'), (2, 6, 'pytorch_flash::flash_fwd_kernel'),
                                          (10, 11, 'triton_red_fused_native_layer_norm_0'), (3, 4, 'unknown')])
    assert busy == 7 and times == {'matrix products': 4, 'attention': 4, 'fused by the compiler': 1, 'others': 1}
    for name, kind in {'nvjet_tst_128x256_64x4_2x1_v_bz_TNT': 'matrix products',
                       'Memcpy HtoD (Pinned -> Device)': 'copies',
                       'cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16': 'attention',
                       'triton_tem_fused_flex_attention_0': 'attention', 'fmha_cutlassF_bf16_aligned': 'attention',
                       'void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>': 'optimizer'}.items():
        assert gpu_speed.kind_of(name) == kind, name


# -----------------------------------------------------------------------------
# Planted faults: the second of two runs plays the GPU
def plant_gradient_fault(monkeypatch, only_on=None):
    """From the second call of three_steps() on, or on one kind of device, the gradient of one tensor is off by 1e-3."""
    three_steps, calls = gpu_checks.three_steps, []

    def faulty(config, machine, data, weights):
        calls.append(0)
        losses, gradients, moved = three_steps(config, machine, data, weights)
        if (machine.device.type == only_on if only_on else len(calls) > 1):
            gradients['transformer.h.1.mlp.c_fc.weight'] *= 1.001
        return losses, gradients, moved
    monkeypatch.setattr(gpu_checks, 'three_steps', faulty)


def parity_of_one_variant(dry, monkeypatch):
    monkeypatch.setattr(gpu_checks, 'VARIANTS', {'completep': {}})
    return wrong(gpu_checks.parity_of_variants(dry, machine.set_up('cpu', 'float32')))


def test_a_gradient_that_is_off_by_a_thousandth_is_found(dry, monkeypatch):
    assert parity_of_one_variant(dry, monkeypatch) == []
    plant_gradient_fault(monkeypatch)
    found = parity_of_one_variant(dry, monkeypatch)
    assert len(found) == 2 and 'must be at most 0.0001 (transformer.h.1.mlp.c_fc.weight)' in found[0]


def test_a_wrong_loss_is_found(dry, monkeypatch):
    """The loss of the second and later models is off by 2e-5; so are their gradients, too little to be seen."""
    calls, loss = [], layers.cross_entropy

    def faulty(logits, targets):
        calls.append(0)
        return loss(logits, targets) * (1 + 2e-5 * (len(calls) > 5))  # three_steps() computes five losses
    monkeypatch.setattr(layers, 'cross_entropy', faulty)
    found = parity_of_one_variant(dry, monkeypatch)
    assert len(found) == 2 and all(text.startswith('losses, completep') for text in found)


def test_steps_that_differ_are_found(dry, monkeypatch):
    make, calls = gpu_checks.make_optimizer, []

    def faulty(model, config, device_type):
        optimizer = make(model, config, device_type)
        calls.append(0)
        for group in optimizer.param_groups:
            group['lr'] *= 1 + 0.02 * (len(calls) > 1)
        return optimizer
    monkeypatch.setattr(gpu_checks, 'make_optimizer', faulty)
    assert any(text.startswith('weights after 3 steps') for text in parity_of_one_variant(dry, monkeypatch))


def test_a_wrong_rate_of_dropout_is_found(dry, monkeypatch):
    """cuDNN of torch 2.11 rounds 0.2 to 3/16."""
    attention = layers.causal_attention
    monkeypatch.setattr(model, 'causal_attention', lambda q, k, v, scale, dropout, alibi: attention(
        q, k, v, scale, round(16 * dropout) / 16, alibi))
    found = gpu_checks.dropout_rate(dry, machine.set_up('cpu', 'float32')) - 0.2
    assert found == pytest.approx(-0.0125, abs=1e-3) and Figure('dropout', found, 0.002).why_wrong


def test_what_a_figure_calls_wrong():
    for right in (Figure('a', -1.0, 1.0), Figure('a', 'text'), Figure('a', None), Figure('a', 0, wanted=0)):
        assert not right.why_wrong
    for bad in (Figure('a', float('nan'), 1.0), Figure('a', -1.1, 1.0), Figure('a', 1, wanted=0),
                Figure('a', float('inf'), 9.0)):
        assert bad.why_wrong


# -----------------------------------------------------------------------------
# Stages that end badly
def run(function, dry, monkeypatch, limit_s=60.0, left=100.0):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join((str(ROOT), str(ROOT / 'tests'))))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    dry.folder += f'/{function.__name__}'
    row = run_stage(Stage(function.__name__, limit_s, function, 'correctness'), dry, left)
    assert row['stage'] == function.__name__
    return row


@pytest.mark.parametrize('function, ok, error, values', [
    (works, True, '', {'loss': 1.5}),
    (finds_a_wrong_loss, False, 'loss is 2.5, must be at most 2 (of step 3); 1 more',
     {'loss': 2.5, 'gradient': 'nan', 'steps': 3}),
    (crashes, False, 'RuntimeError: no kernel', {'first': 1}),
    (is_killed, False, 'killed by SIGKILL', {'first': 1}),
    (exits, False, 'ended early with exit code 0: the last words', {'first': 1}),
    (cannot_run, None, 'no such thing here', {})])
def test_how_a_stage_ends(function, ok, error, values, dry, monkeypatch):
    row = run(function, dry, monkeypatch)
    assert (row['ok'], row['error'], row['values']) == (ok, error, values)
    json.loads(json.dumps(row, allow_nan=False))


def is_alive(pid):
    with suppress(OSError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


def test_a_stage_that_hangs_is_stopped_with_all_its_processes(dry, monkeypatch):
    row = run(hangs, dry, monkeypatch, limit_s=10.0)  # long enough to start on a busy machine
    assert row['ok'] is False and row['error'] == 'stopped at its limit of 10 s' and row['seconds'] < 30
    assert row['values']['child'] and not is_alive(row['values']['child'])


def test_a_stage_that_the_end_of_the_time_cuts_off_has_not_failed(dry, monkeypatch):
    row = run(hangs, dry, monkeypatch, left=2.0)
    assert row['ok'] is None and row['error'] == 'not finished in the last 2 s of --seconds'


# -----------------------------------------------------------------------------
# The command
def run_main(monkeypatch, stages, *flags):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join((str(ROOT), str(ROOT / 'tests'))))
    monkeypatch.setattr(gpu_check, 'STAGES', stages)
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', '--dry', *flags])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        return gpu_check.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_command_goes_on_after_a_failure_and_says_so(tmp_path, monkeypatch, capsys):
    stages = [Stage('env', 60, crashes, 'correctness'), Stage('speed', 60, works, 'speed')]
    out = tmp_path / 'gpu_check.json'
    assert run_main(monkeypatch, stages, f'--out={out}') == 1
    text = capsys.readouterr().out
    assert 'RuntimeError: no kernel' in text and text.endswith('FAIL: env\n')
    rows = json.loads(out.read_text())['stages']
    assert [(row['stage'], row['ok']) for row in rows] == [('env', False), ('speed', True)]
    assert '12 x 768, T 1024: fraction of peak' in text and 'not run  0.45' in text


def test_results_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
    write, calls = gpu_check.write_atomically, []

    def full_disk(path, content):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, 'No space left on device')
        write(path, content)
    monkeypatch.setattr(gpu_check, 'write_atomically', full_disk)
    assert run_main(monkeypatch, [Stage('env', 60, works, 'correctness')], f'--out={tmp_path}/a.json') == 1
    shown = capsys.readouterr()
    assert 'cannot be written ([Errno 28] No space left' in shown.err and '"values": {"loss": 1.5}' in shown.out
    with pytest.raises(UserError, match='cannot be written'):
        run_main(monkeypatch, [], f'--out={tmp_path}/missing/a.json')


def test_the_exit_code_counts_what_was_not_run():
    def row(kind, ok):
        return dict(stage=kind, kind=kind, ok=ok)
    assert lacking([row('correctness', True), row('speed', False), row('repeat', None)]) == []
    assert lacking([row('correctness', None), row('repeat', False)]) == ['correctness', 'repeat']


def test_the_table_shows_the_bars(capsys):
    values = {'fraction of peak': 0.451, 'times as fast as the peer': 'not compared: no --peer'}
    print_table([dict(stage='speed', kind='speed', ok=True, seconds=9.0, values=values, error='')])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['0.451', '0.45'] in [line[-2:] for line in lines] and ['run', '0.4'] in [line[-2:] for line in lines]
    assert ['--peer', '1.1'] in [line[-2:] for line in lines]


@pytest.mark.parametrize('number, code', [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_check_that_is_stopped_leaves_no_process(number, code, tmp_path):
    """The stage `processes` has torchruns with workers, which are in groups of their own."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TMPDIR': str(tmp_path)}
    command = [sys.executable, 'gpu_check.py', '--dry', '--stages=processes', f'--out={tmp_path}/a.json']
    check = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def started():  # what runs with a temporary folder of this check
        return [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc'))) if is_ours(pid)]

    def is_ours(pid):
        with suppress(OSError):
            return f'{tmp_path}/gpu_check_'.encode() in Path(f'/proc/{pid}/environ').read_bytes()
    end = time.monotonic() + 120
    while len(started()) < 6:  # the stage, three torchruns, workers
        assert time.monotonic() < end and check.poll() is None, check.communicate()
        time.sleep(0.05)
    check.send_signal(number)
    check.communicate(timeout=60)
    assert check.returncode == code and not started() and not list(tmp_path.glob('gpu_check_*'))


def test_keys_that_are_wrong(tmp_path):
    for changes, message in ((dict(peer=str(tmp_path)), 'it has no model.py'),
                             (dict(stages='envy'), 'use some of env,'), (dict(seconds=0), 'at least 1'),
                             (dict(out=str(tmp_path)), 'does not exist yet')):
        with pytest.raises(UserError, match=message):
            GpuCheckConfig(**dict(dry=True) | changes)


def test_a_machine_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['gpu_check.py', f'--out={tmp_path}/a.json'])
    with pytest.raises(UserError, match='no CUDA device here, use --dry'):
        gpu_check.main()
    assert not list(tmp_path.iterdir())


def test_the_module_of_a_stage_needs_no_optional_package():
    """A bare GPU machine has neither Optuna nor tiktoken nor transformers."""
    code = ("import sys; sys.modules.update(dict.fromkeys(('optuna', 'sqlalchemy', 'tiktoken', 'transformers')));"
            "import gpu_check, bench, coord_check, train")
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_a_mark_is_that_of_one_stage():
    mark = f'{gpu_stage.MARK}-of-nobody'
    assert list(marked(mark)) == []
    with subprocess.Popen(['sleep', '60'], env={**os.environ, gpu_stage.MARK: mark}) as process:
        assert list(marked(mark)) == [process.pid]
        process.kill()
