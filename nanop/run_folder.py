"""The folder of one training run: its lock, checkpoints and log. train() decides when they are read and written."""
import math
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from nanop import checkpoint
from nanop.dataset import content_differs
from nanop.errors import UserError, import_optional
from nanop.files import lock
from nanop.parallel import from_rank_0, say
from nanop.run_log import Metrics

NORMS_KEPT, NORMS_NEEDED = 50, 10  # gradient norms for a median
MOST_SKIPPED = 10                  # steps in a row


@dataclass
class Progress:
    """How far a run has come. A checkpoint keeps it."""
    step: int = 0
    tokens: int = 0                  # in the batches of these steps, whose size may have changed
    best_val_loss: float = math.inf
    grad_norms: list = field(default_factory=list)  # of the last steps that were not skipped
    skipped_steps: int = 0           # because of a large gradient
    skipped_in_a_row: int = 0

    @classmethod
    def of(cls, state):
        """The progress in the state of a checkpoint; without one, the start."""
        return cls(**{each.name: state[each.name] for each in fields(cls) if each.name in state}) if state else cls()

    def largest_norm(self, skip_grad_norm, warming_up):
        """The gradient norm above which a step is skipped: so many times the median of the last; infinity for none."""
        if not skip_grad_norm or warming_up or len(self.grad_norms) < NORMS_NEEDED:
            return math.inf
        return skip_grad_norm * statistics.median(self.grad_norms)

    def count(self, batch_tokens, grad_norm, largest, save):
        """Count a step, which was skipped if its gradient norm is above `largest`. After too many in a row, call save()
        and raise UserError."""
        self.step, self.tokens = self.step + 1, self.tokens + batch_tokens
        if math.isfinite(grad_norm) and grad_norm > largest:
            self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
            say(f'step {self.step - 1} skipped: its gradient norm {grad_norm:.4g} is above {largest:.4g}')
        else:
            self.skipped_in_a_row = 0
            self.grad_norms = [*self.grad_norms, *([grad_norm] if math.isfinite(grad_norm) else [])][-NORMS_KEPT:]
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.grad_norms, self.skipped_in_a_row = [], 0  # a resumed run measures anew
            save()
            raise UserError(f'{MOST_SKIPPED} steps in a row had a gradient norm above {largest:.4g} and were skipped, '
                            'the state is saved: go on with --init_from=resume and a lower learning_rate or '
                            '--skip_grad_norm=0')


def require_fit(init_from, values, tokenizer, meta):
    """Refuse a model unless it has the config's values, {key: (its, the config's)}, and the dataset's tokenizer."""
    values = values | {key: (tokenizer.get(key), meta.get(key)) for key in ('tokenizer', 'chars')}
    differ = [f'{key} is {its!r}, not {asked!r}' for key, (its, asked) in values.items()
              if its != asked and key != 'dropout']
    if differ:
        raise UserError(f"init_from='{init_from}' brings a model that this config does not describe: its "
                        f"{'; its '.join(differ)}")


class RunFolder:
    """Entered by every rank of a run, which all call the same methods; rank 0 keeps the lock and the log.

    `saved` is the state of the checkpoint to resume from, or None. With out_dir='' or eval_only nothing is written.
    An old run in the folder stays until the first step of the new one is done.
    """

    def __init__(self, config):
        self.out_dir, self.config = config.out_dir, config
        self.writes = bool(config.out_dir) and not config.eval_only
        self.log = self.checkpoints = self.begin = None

    def __enter__(self):
        c = self.config
        with ExitStack() as on_exit:
            def look():
                if self.writes:
                    on_exit.callback(lock(c.out_dir).release)
                found = checkpoint.find(c.out_dir)
                resumes = c.init_from == 'resume' or found and c.init_from == 'auto'
                if found and not (resumes or c.overwrite or c.eval_only):
                    raise UserError(f"'{c.out_dir}' holds the checkpoints of a run: use --init_from=resume to go on "
                                    'with it, another --out_dir, or --overwrite=True to lose them')
                if c.decay_steps:
                    return found, Path(c.init_from), checkpoint.state_in(Path(c.init_from))
                return found, *(checkpoint.newest(c.out_dir) if resumes else (None, None))
            self.found, self.path, self.saved = from_rank_0(look)
            if self.writes:
                self.checkpoints = checkpoint.Checkpoints(c.out_dir, c.timeout_s, c.keep_checkpoints)
                on_exit.callback(self.settle)
            self.on_exit = on_exit.pop_all()
        return self

    def __exit__(self, *error):
        return self.on_exit.__exit__(*error)

    def settle(self):
        """After an error, which must not be hidden by one of the checkpoint that is being written."""
        try:
            self.checkpoints.wait()
        except UserError as error:
            print(f'error: {error}', file=sys.stderr)
        if self.log:
            self.log.close()

    def resume(self, config, steps, data, model, optimizer, scaler):
        """Load the saved tensors, if any, and print which keys changed."""
        c = config
        if not self.saved:
            return
        held = asdict(type(model.config)(**self.saved['model_config']))  # keys added since then get their defaults
        require_fit(c.init_from, {key: (value, getattr(model.config, key)) for key, value in held.items()},
                    self.saved['meta'], data.meta)
        before = {**asdict(type(c)()), **self.saved['config']}
        trained, now = (f"optimizer='{name}'{' without momentum' if name == 'sgd' and not beta1 else ''}"
                        for name, beta1 in ((before['optimizer'], before['beta1']), (c.optimizer, c.beta1)))
        if trained != now:
            raise UserError(f"'{c.out_dir}' was trained with {trained}, whose state {now} cannot go on from: use the "
                            'same')
        other_data = content_differs(self.saved['meta'], data.meta)
        if other_data and not c.new_data:
            raise UserError(f"'{c.out_dir}' was trained on other data than dataset '{c.dataset}' holds now: its "
                            f"{'; its '.join(other_data)}. Restore it, or use --new_data=True to go on with this")
        if self.saved['step'] > steps:
            raise UserError(f"'{c.out_dir}' is at step {self.saved['step']}, past the end at {steps}: raise max_iters, "
                            'or train_tokens or tokens_per_param where they are set')
        checkpoint.restore(self.path, model, optimizer)
        if self.saved['scaler'] and scaler.is_enabled():
            scaler.load_state_dict(self.saved['scaler'])
        unsaid = 'init_from', 'out_dir', 'overwrite', 'new_data', 'decay_steps'  # which the schedule's keys explain
        changed = [f'{key} {before[key]} -> {value}' for key, value in asdict(c).items()
                   if before[key] != value and key not in unsaid]
        changed += ['other data'] if other_data else []
        say(f"resuming {self.path} at step {self.saved['step']}{', with ' if changed else ''}{', '.join(changed)}")

    def open_log(self, config, first_step, steps):
        """Make the log ready. Files of an old run are not touched before write_row(), after the first step."""
        def open_on_rank_0():
            self.log = Metrics(self.out_dir, first_step, steps)
            if config.wandb_log:
                wandb = import_optional('wandb', 'wandb_log=True')

                def init():
                    run = wandb.init(project=config.wandb_project, config=asdict(config),
                                     name=config.wandb_run_name or config.out_dir)
                    assert run is not None, 'init() returned no run'
                    return run
                self.log.wandb = self.log.to_wandb(init)

        def begin_on_rank_0():
            self.checkpoints.clean(first_step)
            if config.decay_steps:
                checkpoint.branch(self.path, self.out_dir, asdict(config))
            self.log.begin(asdict(config))

        if self.writes:
            from_rank_0(open_on_rank_0)
            self.begin = begin_on_rank_0
            if self.saved or not self.found:
                self.begin_now()

    def begin_now(self):
        """Remove what an old run has left, unless that is done."""
        begin, self.begin = self.begin, None
        if begin:
            from_rank_0(begin)

    def write_row(self, row):
        """Add a row to metrics.csv, unless it has nothing but its step and tokens. Raises the error of the checkpoint
        in the background, if it has failed."""
        self.begin_now()
        if self.writes and self.checkpoints.writing and self.checkpoints.writing.done():
            self.checkpoints.wait()
        if self.log and row['step'] == self.log.first_step:
            row = self.log.validated | row
        if self.log and len(row) > 2:
            self.log.write(row)

    def save(self, model, optimizer, progress, **state):
        if self.writes:
            if self.log:
                self.log.flush()  # so that the rows before a checkpoint are as safe as the checkpoint
            self.checkpoints.save(progress.step, model, optimizer, {**asdict(progress), **state})

    def discard(self, step):
        """Remove the checkpoint of this step, if this process has saved one."""
        if self.writes:
            self.checkpoints.discard(step)

    def finish(self, summary, grad_norm, row):
        """Say how the run ended and write its results, also the `row` of a step that was not taken. Returns the weights
        in model.safetensors, if there are any."""
        c, s, began = summary['config'], summary, self.writes and not self.begin
        if c['eval_only']:
            say(f"validation loss {s['val_loss']:.4f}, {s['bits_per_byte']:.4f} bits per byte")
        if began:
            self.checkpoints.wait()
        if began and s['diverged_at'] is not None:
            self.write_row(row)
        newest = next(iter(checkpoint.find(self.out_dir)), None) if began else None
        old = '' if began or not self.found else f"; the old run in '{self.out_dir}' is as it was"
        if s['stopped_by']:
            saved = f'saved in {newest}: go on with python train.py --out_dir={self.out_dir} --init_from=resume'
            say(f"stopped after {s['steps']} steps, {saved if newest else 'not saved'}{old}")
            return None
        if s['diverged_at'] is not None:
            taken = math.isfinite(s['last_train_loss']) and math.isfinite(grad_norm)
            what = 'the validation at step {} is not finite' if taken else 'step {} was not taken'
            say(f"{what.format(s['steps'])}: loss {s['last_train_loss']}, gradient norm {grad_norm}, "
                f"validation loss {s['val_loss']}. "
                f"{f'The last good checkpoint is {newest}. ' if newest else 'There is no checkpoint yet. '}"
                f'Try a lower learning_rate, a longer warmup_frac, a smaller grad_clip, or dtype=float32{old}')
            s.update(val_loss=math.inf, bits_per_byte=math.inf)
        if not self.log or not began:
            return None
        title = f"{c['parameterization']}, {c['n_layer']} layers x {c['n_embd']}, {s['params']:,} parameters"
        print(f'loss curve: {self.log.finish(summary, title)}')
        if s['diverged_at'] is not None or not newest:
            return None
        weights, state = checkpoint.load_weights(self.out_dir)
        print(f'weights: {checkpoint.write_weights(self.out_dir, weights, state)}')
        return weights
