# Weight decay and learning rate at the base shape, to choose the best for a sweep over depth:
# python sweep.py config/sweep_weight_decay.py
# Hardware: any CPU. Time: 3 minutes per seed on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_weight_decay'
parameterization = 'completep'
learning_rate = [2.0**k for k in (-7, -6, -5)]
weight_decay = [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
seed = [1, 2]
