"""The schedule of the learning rate, and where a decay may branch off a run."""
import math

from nanop.errors import UserError, require

SCHEDULES = {  # fraction of the way from the final to the peak learning rate, from the progress after the warm-up in
    # [0, 1), and wsd's from what is left of its decay: (0, 1] in the decay, more before
    'linear':   lambda progress, left: 1 - progress,
    'cosine':   lambda progress, left: 0.5 * (1 + math.cos(math.pi * progress)),
    'constant': lambda progress, left: 1.0,
    'wsd':      lambda progress, left: min(1.0, left),  # warm-up, stable, decay
}
STABLE = 'constant', 'wsd'
KEPT = 'max_iters', 'train_tokens', 'tokens_per_param', 'schedule', 'decay_frac', 'warmup_frac', 'batch_tokens'


def require_schedule(config):
    """Refuse keys of the schedule that do not fit together, or that would do nothing."""
    c = config
    require(c, 'final_lr_frac', not c.final_lr_frac or c.schedule != 'constant',
            "schedule='constant' ends at the peak, leave it at 0 or use another schedule")
    require(c, 'decay_frac', not c.decay_frac or c.schedule == 'wsd',
            f"schedule='{c.schedule}' has no decay of its own, leave it at 0 or use schedule=wsd")
    require(c, 'decay_frac', c.decay_frac or c.schedule != 'wsd',
            "schedule='wsd' needs it, use a value above 0, or schedule=constant")
    require(c, 'decay_frac', c.warmup_frac + c.decay_frac <= 1 + 1e-9,
            f'with warmup_frac={c.warmup_frac} it is more than the run, use less')
    for key in ('tau_ema', 'base_train_tokens'):
        require(c, 'decay_steps', not (c.decay_steps and getattr(c, key)),
                f'{key}={getattr(c, key)} sets values by the duration, which the decay would change in the middle of '
                'the run: leave it out and train the long run without it')
    require(c, 'overwrite', not (c.overwrite and c.decay_steps), 'a branch needs a new folder, use another out_dir')


def length_of_decay(config, steps):
    """The number of steps, of `steps`, in which wsd decays."""
    return max(1, round(config.decay_frac * steps)) if config.schedule == 'wsd' else 0


def lr_fraction(config, step, steps):
    """Fraction of the peak learning rate at `step` of `steps`, above zero at every step that is taken."""
    warmup = round(config.warmup_frac * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    left = (steps - step) / max(1, length_of_decay(config, steps))
    floor = 0.0 if config.schedule == 'constant' else config.final_lr_frac
    return floor + (1 - floor) * SCHEDULES[config.schedule](progress, left)


def branch_keys(config, steps, step, tokens, overrides):
    """The keys of a run that equals this one up to `step`, and decays in the overrides' decay_steps from there.

    `config` and `steps` are of the run to branch off, which came to `step` with `tokens`. Raises UserError if its
    learning rate is not at its peak there, or if the overrides hold what the branch keeps or sets.
    """
    decay, taken = overrides['decay_steps'], [key for key in KEPT if key in overrides]
    if taken:
        raise UserError(f"decay_steps={decay} sets or keeps {', '.join(taken)}: leave it out")
    c, use = config, 'train the long run with --schedule=constant or wsd'
    if c.schedule not in STABLE:
        raise UserError(f"no decay can branch off a run with schedule='{c.schedule}', whose learning rate falls all "
                        f'the time: {use}')
    position = tokens / c.batch_tokens  # in steps of this batch, if it was another before
    length = position + steps - step
    first, last = round(c.warmup_frac * length), length - length_of_decay(c, length)
    if not first <= position <= last:
        raise UserError(f'no decay can branch off step {step}, where the learning rate is not at its peak: use a '
                        f'checkpoint of steps {math.ceil(first + step - position)} to {int(last + step - position)}')
    return dict(train_tokens=tokens + decay * c.batch_tokens, tokens_per_param=0.0,
                max_iters=type(c).max_iters, schedule='wsd',  # the default: train_tokens sets the duration
                decay_frac=decay / (position + decay), warmup_frac=first / (position + decay))
