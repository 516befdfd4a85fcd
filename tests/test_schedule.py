"""Tests of schedule=wsd and of decays that branch off a long run."""
import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from nanop import checkpoint
from nanop.errors import UserError
from nanop.schedule import lr_fraction
from tools.stack import train_stack
from train import TrainConfig, read_config, train

STABLE = dict(schedule='constant', warmup_frac=0.25, max_iters=12, eval_interval=2, keep_checkpoints=9)


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def rows_of(out_dir):
    with open(Path(out_dir, 'metrics.csv'), newline='') as file:
        return [{key: value for key, value in row.items() if key != 'tokens_per_s'} for row in csv.DictReader(file)]


def tensors_of(out_dir):
    """{name: tensor} of weights and moments in the newest checkpoint, and its step."""
    path, state = checkpoint.newest(out_dir)
    reader = checkpoint.HuggingFaceStorageReader(str(path))
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in reader.read_metadata().state_dict_metadata.items()}
    checkpoint.load_tensors(path, tensors)
    return tensors, state['step']


def require_equal(one, other):
    (a, step), (b, other_step) = tensors_of(one), tensors_of(other)
    assert step == other_step and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert rows_of(one) == rows_of(other)


@pytest.fixture(scope='module')
def long_run(data_dir, tmp_path_factory):
    """The config of a run of 12 steps with its peak from step 3 on and a checkpoint every 2 steps."""
    config = TrainConfig(
        out_dir=str(tmp_path_factory.mktemp('long') / 'run'), dataset=data_dir, block_size=16, batch_tokens=128,
        batch_size=4, n_layer=2, n_embd=32, head_dim=16, base_n_layer=1, base_n_embd=16, base_head_dim=16,
        learning_rate=1e-2, eval_tokens=512, log_interval=1, compile=False, dtype='float32', device='cpu', **STABLE)
    train(config)
    return config


def branch(config, step, decay, out_dir, *flags):
    source = checkpoint.path_of(config.out_dir, step)
    return read_config([f'--init_from={source}', f'--decay_steps={decay}', f'--out_dir={out_dir}', *flags])


def test_wsd_by_hand():
    config = TrainConfig(schedule='wsd', warmup_frac=0.2, decay_frac=0.4)
    assert [lr_fraction(config, step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    ends_above = replace(config, final_lr_frac=0.2)
    assert lr_fraction(ends_above, 9, 10) == pytest.approx(0.2 + 0.8 * 0.25)
    assert min(lr_fraction(replace(config, decay_frac=0.8), step, 10) for step in range(10)) > 0


@pytest.mark.parametrize('keys, message', [
    (dict(decay_frac=0.2), "decay_frac=0.2 is not allowed: schedule='linear' has no decay of its own"),
    (dict(decay_frac=0.2, schedule='constant'), "decay_frac=0.2 is not allowed: schedule='constant' has no decay"),
    (dict(schedule='wsd'), "decay_frac=0.0 is not allowed: schedule='wsd' needs it"),
    (dict(schedule='wsd', decay_frac=1.5), 'decay_frac=1.5 is not allowed: use a value in [0, 1]'),
    (dict(schedule='wsd', decay_frac=0.8, warmup_frac=0.3), 'decay_frac=0.8 is not allowed: with warmup_frac=0.3'),
    (dict(decay_steps=5), 'decay_steps=5 is not allowed: it needs init_from=FOLDER/ckpt_..'),
    (dict(decay_steps=-1), 'decay_steps=-1 is not allowed'),
    (dict(init_from='out/ckpt_000000005'), 'this is a checkpoint, set decay_steps'),
    (dict(init_from='out/ckpt_000000005', decay_steps=5, tau_ema=0.1), 'tau_ema=0.1 sets values by the duration'),
    (dict(init_from='out/ckpt_000000005', decay_steps=5, base_train_tokens=9), 'base_train_tokens=9 sets values by'),
    (dict(init_from='out/ckpt_000000005', decay_steps=5, overwrite=True), 'overwrite=True is not allowed: a branch'),
])
def test_keys_that_do_not_fit_together(keys, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**keys)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('changes', [
    dict(optimizer='muon'), dict(weight_decay=0.3, weight_decay_mode='independent', dropout=0.1,
                                         skip_grad_norm=50.0, lr_mult=dict(embedding=4.0)),
    dict(max_iters=TrainConfig.max_iters, train_tokens=12 * 128, base_batch_tokens=64),
    dict(max_iters=TrainConfig.max_iters, tokens_per_param=12 * 128 / 42752, schedule='wsd', decay_frac=0.25)])
def test_a_branch_is_the_run_of_that_length(tiny, tmp_path, changes):
    """Bit for bit: weights, moments and the log, at two durations from one long run, which is left as it was."""
    config = replace(tiny, **STABLE | dict(eval_interval=6) | changes)
    assert train(config)['steps'] == 12
    before = contents(config.out_dir)
    for step, decay in ((6, 3), (12, 6))[:2 if config.schedule == 'constant' else 1]:
        end, out_dir = step + decay, tmp_path / f'branch{step}'
        branched = branch(config, step, decay, out_dir)
        assert train(branched)['steps'] == end
        tokens = end * 128 if config.base_batch_tokens else 0
        once = replace(config, schedule='wsd', decay_frac=decay / end, warmup_frac=3 / end, train_tokens=tokens,
                       max_iters=TrainConfig.max_iters if tokens else end, tokens_per_param=0.0,
                       out_dir=str(tmp_path / f'once{step}'))
        train(once)
        require_equal(out_dir, once.out_dir)
        in_tokens = dict(max_iters=TrainConfig.max_iters, train_tokens=end * 128)
        assert replace(branched, init_from='scratch', decay_steps=0, out_dir='', vocab_size=0, real_vocab_size=0) == \
            replace(once, out_dir='', **in_tokens)  # the config of the branch says the same
    assert contents(config.out_dir) == before


def test_a_branch_resumes_in_the_middle_of_its_decay(long_run, tmp_path, capsys):
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    train(branch(long_run, 6, 6, whole))
    train(branch(long_run, 6, 6, stopped))
    for path in [*checkpoint.find(stopped)]:
        if checkpoint.step_of(path) > 8:
            shutil.rmtree(path)
    resumed = read_config([f'--out_dir={stopped}', '--init_from=resume'])
    assert (resumed.schedule, resumed.decay_steps) == ('wsd', 0)
    capsys.readouterr()
    train(resumed)
    assert 'resuming' in (said := capsys.readouterr().out) and 'decay_steps' not in said  # the decay goes on
    require_equal(whole, stopped)


def test_a_branch_that_died_at_once_goes_on_as_the_branch(long_run, tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / 'branch'
    config = branch(long_run, 6, 2, out_dir)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr('train.evaluate', lambda *args: exec('raise RuntimeError'))
        train(config)
    assert 'step 6, with' in (text := capsys.readouterr().out) and 'schedule constant -> wsd' in text
    assert [path.name for path in checkpoint.find(out_dir)] == ['ckpt_000000006']
    with pytest.raises(UserError, match='holds the checkpoints of a run: use --init_from=resume'):
        train(config)
    assert train(read_config([f'--out_dir={out_dir}', '--init_from=resume']))['steps'] == 8
    train(branch(long_run, 6, 2, tmp_path / 'again'))
    require_equal(out_dir, tmp_path / 'again')


def test_without_an_out_dir_a_branch_writes_nothing(long_run, tmp_path):
    written = train(branch(long_run, 6, 2, tmp_path / 'branch'))
    before = contents(tmp_path)
    assert train(branch(long_run, 6, 2, ''))['val_loss'] == written['val_loss']
    assert contents(tmp_path) == before


@pytest.mark.parametrize('step, flags, message', [
    (2, (), 'no decay can branch off step 2, where the learning rate is not at its peak: use a checkpoint of steps 3 '),
    (7, (), 'is no checkpoint that can be used'),
    (6, ('--max_iters=9',), 'decay_steps=3 sets or keeps max_iters: leave it out'),
    (6, ('--schedule=linear', '--batch_tokens=64'), 'sets or keeps schedule, batch_tokens: leave it out'),
    (6, ('--tau_ema=0.1',), 'tau_ema=0.1 sets values by the duration'),
    (6, ('--base_train_tokens=9',), 'base_train_tokens=9 sets values by the duration'),
    (6, ('--overwrite=True',), 'a branch needs a new folder'),
    (6, ('--n_layer=3',), 'brings a model that this config does not describe: its n_layer is 2, not 3'),
    (6, ('--lr_mult.embedding=3',), "its lr_mult is {}, not {'embedding': 3.0}"),
])
def test_what_cannot_branch_is_one_line_and_leaves_nothing(long_run, tmp_path, step, flags, message):
    before = contents(long_run.out_dir)
    with pytest.raises(UserError) as error:
        train(branch(long_run, step, 3, tmp_path / 'branch', *flags))
    assert message in str(error.value) and '\n' not in str(error.value)
    assert contents(long_run.out_dir) == before and {path.name for path in contents(tmp_path)} <= {'.lock'}


def test_a_branch_never_goes_into_the_folder_of_its_run(long_run):
    before = contents(long_run.out_dir)
    with pytest.raises(UserError, match='holds the checkpoints of a run'):
        train(branch(long_run, 6, 3, long_run.out_dir))
    assert contents(long_run.out_dir) == before


def test_a_falling_rate_has_no_branches(tiny, tmp_path):
    train(tiny)
    with pytest.raises(UserError, match="off a run with schedule='linear', whose learning rate falls all the time"):
        branch(tiny, 4, 2, tmp_path / 'branch')
    decayed = replace(tiny, schedule='wsd', decay_frac=0.5, eval_interval=1, keep_checkpoints=9,
                      out_dir=str(tmp_path / 'decayed'))
    train(decayed)
    branch(decayed, 4, 2, tmp_path / 'branch')
    with pytest.raises(UserError, match='step 5, where the learning rate is not at its peak: .* of steps 1 to 4'):
        branch(decayed, 5, 2, tmp_path / 'branch')


def test_a_damaged_checkpoint_is_not_branched_off(long_run, tmp_path):
    shutil.copytree(long_run.out_dir, tmp_path / 'run')
    path = checkpoint.path_of(tmp_path / 'run', 6)
    config = branch(replace(long_run, out_dir=str(tmp_path / 'run')), 6, 2, tmp_path / 'branch')
    file = next(path.glob('*.safetensors'))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match='changed after it was written'):
        train(config)
    assert not list((tmp_path / 'branch').glob('ckpt_*'))


def test_stacked_runs_follow_their_own_decay(tiny):
    configs = [replace(tiny, out_dir='', max_iters=12, schedule='wsd', decay_frac=frac, eval_interval=12)
               for frac in (0.25, 0.75)]
    stacked = [summary['val_loss'] for summary in train_stack(configs)]
    assert stacked == pytest.approx([train(config)['val_loss'] for config in configs], abs=1e-4)
    assert stacked[0] != pytest.approx(stacked[1], abs=1e-4)


def test_the_long_run_says_what_a_branch_is(long_run, tmp_path):
    config = branch(long_run, 6, 2, tmp_path / 'branch')
    assert (config.schedule, config.train_tokens, config.decay_steps) == ('wsd', 8 * 128, 2)
    train(config)
    assert json.loads((tmp_path / 'branch' / 'config.json').read_text()) == asdict(config)
