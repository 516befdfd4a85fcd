# Wide or deep at the same number of hidden weights and 20 tokens for each at the wide end, with the same base values:
# python sweep.py config/evidence_n_over_l.py (arXiv:2505.01618, Fig. 1)
# Hardware: any CPU. Time: not measured.
from evidence_base import *

out_dir = 'out/evidence_n_over_l'
parameterization = ['sp', 'mup', 'completep']
shapes = [dict(n_layer=2, n_embd=64), dict(n_layer=8, n_embd=32), dict(n_layer=32, n_embd=16)]
max_iters = 480
seed = [1, 2, 3]
