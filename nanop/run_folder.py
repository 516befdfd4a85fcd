"""The folder of one training run: its lock, checkpoints and log. train() decides when they are read and written."""
import math
import sys
from contextlib import ExitStack
from dataclasses import asdict

from nanop import checkpoint
from nanop.errors import UserError, import_optional
from nanop.files import lock
from nanop.parallel import from_rank_0, say
from nanop.run_log import Metrics


class RunFolder:
    """Entered by every rank of a run, which all call the same methods; rank 0 keeps the lock and the log.

    `saved` is the state of the checkpoint to resume from, or None. With out_dir='' or eval_only nothing is written.
    """

    def __init__(self, config):
        self.out_dir, self.config = config.out_dir, config
        self.writes = bool(config.out_dir) and not config.eval_only
        self.log = self.checkpoints = None

    def __enter__(self):
        c = self.config
        with ExitStack() as on_exit:
            def look():
                if self.writes:
                    on_exit.callback(lock(c.out_dir).release)
                found = checkpoint.find(c.out_dir)
                resumes = c.init_from == 'resume' or found and c.init_from == 'auto'
                return found, *(checkpoint.newest(c.out_dir) if resumes else (None, None))
            found, self.path, self.saved = from_rank_0(look)
            if found and not (self.saved or c.overwrite or c.eval_only):
                raise UserError(f"'{c.out_dir}' holds the checkpoints of a run: use --init_from=resume to go on with "
                                'it, another --out_dir, or --overwrite=True to lose them')
            if self.writes:
                self.checkpoints = checkpoint.Checkpoints(c.out_dir, c.timeout_s)
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

    def resume(self, config, steps, model, optimizer, scaler):
        """Load the saved tensors, if any, and print which keys changed. Returns (first step, best validation loss)."""
        c, first_step, best_val_loss = config, 0, math.inf
        if self.saved:
            first_step, best_val_loss = self.saved['step'], self.saved['best_val_loss']
            before = {**asdict(type(c)()), **self.saved['config']}  # keys added since it was saved get their defaults
            trained, now = (f"optimizer='{name}'{' without momentum' if name == 'sgd' and not beta1 else ''}"
                            for name, beta1 in ((before['optimizer'], before['beta1']), (c.optimizer, c.beta1)))
            if trained != now:
                raise UserError(f"'{c.out_dir}' was trained with {trained}, whose state {now} cannot go on from: use "
                                'the same')
            if first_step > steps:
                raise UserError(f"'{c.out_dir}' is at step {first_step}, past the end at {steps}: raise max_iters, "
                                'or train_tokens or tokens_per_param where they are set')
            checkpoint.restore(self.path, model, optimizer)
            if self.saved['scaler'] and scaler.is_enabled():
                scaler.load_state_dict(self.saved['scaler'])
            changed = [f'{key} {before[key]} -> {value}' for key, value in asdict(c).items()
                       if before[key] != value and key not in ('init_from', 'out_dir', 'overwrite')]
            say(f"resuming {self.path} at step {first_step}{', with ' if changed else ''}{', '.join(changed)}")
        return first_step, best_val_loss

    def open_log(self, config, first_step, steps):
        def open_on_rank_0():
            self.checkpoints.clean(first_step)
            self.log = Metrics(self.out_dir, first_step, steps, asdict(config))
            if config.wandb_log:
                self.log.wandb = import_optional('wandb', 'wandb_log=True').init(
                    project=config.wandb_project, name=config.wandb_run_name or config.out_dir, config=asdict(config))
        if self.writes:
            from_rank_0(open_on_rank_0)

    def write_row(self, row):
        """Add a row to metrics.csv, unless it has nothing but its step and tokens."""
        if self.log and len(row) > 2:
            self.log.write(row)

    def save(self, step, model, optimizer, **state):
        if self.writes:
            if self.log:
                self.log.flush()  # so that the rows before a checkpoint are as safe as the checkpoint
            self.checkpoints.save(step, model, optimizer, state)

    def raise_if_failed(self):
        """Raise the error of the checkpoint in the background, if it has failed."""
        if self.writes and self.checkpoints.writing and self.checkpoints.writing.done():
            self.checkpoints.wait()

    def finish(self, summary, grad_norm):
        """Say how the run ended and write its results. Returns the weights in model.safetensors, if there are any."""
        if self.writes:
            self.checkpoints.wait()
        c, s = summary['config'], summary
        newest = next(iter(checkpoint.find(self.out_dir)), None)
        if s['stopped_by']:
            saved = f'saved in {newest}: go on with python train.py --out_dir={self.out_dir} --init_from=resume'
            say(f"stopped after {s['steps']} steps, {saved if newest else 'not saved'}")
            return None
        if s['diverged_at'] is not None:
            say(f"step {s['steps']} was not taken: loss {s['last_train_loss']}, gradient norm {grad_norm}, validation "
                f"loss {s['val_loss']}. "
                f"{f'The last good checkpoint is {newest}. ' if newest else 'There is no checkpoint yet. '}"
                'Try a lower learning_rate, a longer warmup_frac, a smaller grad_clip, or dtype=float32.')
            s.update(val_loss=math.inf, bits_per_byte=math.inf)
        if not self.log:
            return None
        title = f"{c['parameterization']}, {c['n_layer']} layers x {c['n_embd']}, {s['params']:,} parameters"
        print(f'loss curve: {self.log.finish(summary, title)}')
        if s['diverged_at'] is not None or not newest:
            return None
        weights, state = checkpoint.load_weights(self.out_dir)
        print(f'weights: {checkpoint.write_weights(self.out_dir, weights, state)}')
        return weights
