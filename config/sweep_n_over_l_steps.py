# How many steps completep needs, from wide to deep, to reach the final loss of mup (arXiv:2505.01618, Fig. 1):
# python sweep.py config/sweep_n_over_l_steps.py; compare with results/sweep_n_over_l
# Hardware: any CPU. Time: 10 minutes on 2 cores.
from sweep_n_over_l import *

out_dir = 'out/sweep_n_over_l_steps'
parameterization = 'completep'
shapes = [dict(n_layer=5, n_embd=80), dict(n_layer=8, n_embd=64), dict(n_layer=14, n_embd=48),
          dict(n_layer=32, n_embd=32)]
max_iters = [100, 125, 150, 175, 200, 225]
