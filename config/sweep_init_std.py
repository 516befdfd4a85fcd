# init_std against depth: python sweep.py config/sweep_init_std.py (CompleteP, arXiv:2505.01618, Fig. 3)
# Hardware: any CPU. Time: 30 minutes on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_init_std'
parameterization = ['sp', 'mup', 'depth_mup', 'completep']
n_layer = [2, 8, 32]
init_std = [0.1 * 2.0**k for k in (-3, -2, -1, 0, 1, 2)]
seed = 1
