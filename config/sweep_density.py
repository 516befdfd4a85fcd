# Learning rate against density: python sweep.py config/sweep_density.py (SuPar, arXiv:2405.15743, Fig. 6)
# Hardware: any CPU. Time: 35 minutes on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_density'
parameterization = ['sp', 'mup', 'supar']
n_embd = 128
density = [1.0, 0.5, 0.25, 0.125]
learning_rate = [2.0**k for k in range(-9, -3)]
seed = 1
