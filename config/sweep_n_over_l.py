# Wide or deep at the same number of hidden weights, with the same base hyperparameters (arXiv:2505.01618, Fig. 1):
# python sweep.py config/sweep_n_over_l.py
# Hardware: any CPU. Time: 6 minutes per seed on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_n_over_l'
parameterization = ['mup', 'completep']
shapes = [dict(n_layer=2, n_embd=128), dict(n_layer=5, n_embd=80), dict(n_layer=8, n_embd=64),
          dict(n_layer=14, n_embd=48), dict(n_layer=32, n_embd=32)]
seed = [1, 2, 3]
