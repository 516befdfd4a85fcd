# Learning rate against depth: python sweep.py config/sweep_depth.py (CompleteP, arXiv:2505.01618, Fig. 2)
# Hardware: any CPU. Time: 25 minutes per seed on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_depth'
parameterization = ['sp', 'mup', 'depth_mup', 'completep']
n_layer = [2, 4, 8, 16, 32]
learning_rate = [2.0**k for k in range(-8, -2)]
seed = [1, 2, 3]
