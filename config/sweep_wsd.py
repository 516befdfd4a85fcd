# Do the best learning rate and its transfer over depth hold under schedule=wsd, at two durations?
# python sweep.py config/sweep_wsd.py, with the data of evidence_base.py
# Hardware: any CPU. Time: not measured.
from evidence_base import *

out_dir = 'out/sweep_wsd'
parameterization = 'completep'
schedule = 'wsd'
decay_frac = 0.2
variants = [dict(max_iters=250), dict(max_iters=1000)]
shapes = [dict(n_layer=2), dict(n_layer=16)]
learning_rate = [2.0**k for k in range(-8, -3)]
seed = [1, 2]
