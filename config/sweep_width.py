# Learning rate against width: python sweep.py config/sweep_width.py (Tensor Programs V, arXiv:2203.03466, Figs. 1, 3)
# Hardware: any CPU. Time: 15 minutes per seed on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_width'
parameterization = ['sp', 'mup', 'completep']
n_embd = [32, 64, 128, 256]
learning_rate = [2.0**k for k in range(-9, -3)]
seed = [1, 2, 3]
