# Which learning rate, init and weight decay are best at the base of the evidence? 64 trials of Optuna's tpe:
# python sweep.py config/evidence_tune.py
# Hardware: any CPU. Time: 15 minutes on one core.
from evidence_base import *

out_dir = 'out/evidence_tune'
search = 'tpe'
trials = 64
learning_rate = [2.0**-9, 2.0**-3]
init_std = [0.01, 0.5]
weight_decay = [0.003, 1.0]
