# The question of sweep_ablations.py for Lion, which needs lower learning rates (pip install lion-pytorch):
# python sweep.py config/sweep_ablations_lion.py, with the data of sweep_base.py
# Hardware: any CPU. Time: 2 minutes on 2 cores.
from sweep_ablations import *

out_dir = 'out/sweep_ablations_lion'
learning_rate = [2.0**k for k in range(-12, -6)]
variants = [dict(optimizer='lion', beta2=0.98)]
