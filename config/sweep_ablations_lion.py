# The same question as in sweep_ablations.py of Lion, whose rates are lower: python sweep.py
# config/sweep_ablations_lion.py, data as in sweep_base.py; pip install lion-pytorch
# Hardware: any CPU. Time: 2 minutes on 2 cores.
from sweep_ablations import *

out_dir = 'out/sweep_ablations_lion'
learning_rate = [2.0**k for k in range(-12, -6)]
variants = [dict(optimizer='lion', beta2=0.98)]
