# Learning rate at 4 times the base's batch or duration, with and without the rules of arXiv:2512.22382, Table 1:
# python sweep.py config/sweep_batch_and_duration.py
# Hardware: any CPU. Time: 4 minutes on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_batch_and_duration'
parameterization = 'completep'
base_batch_tokens = 64 * 64
base_train_tokens = 250 * base_batch_tokens
variants = [dict(), dict(base_batch_tokens=0, base_train_tokens=0)]
shapes = [dict(batch_tokens=base_batch_tokens, train_tokens=base_train_tokens),
          dict(batch_tokens=4 * base_batch_tokens, train_tokens=base_train_tokens),
          dict(batch_tokens=base_batch_tokens, train_tokens=4 * base_train_tokens)]
learning_rate = [2.0**k for k in range(-9, -3)]
seed = 1
