# Output multiplier against width: python sweep.py config/sweep_output_mult.py (arXiv:2203.03466, Fig. 4)
# Hardware: any CPU. Time: 10 minutes on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_output_mult'
parameterization = ['sp', 'mup']
n_embd = [32, 128]
output_mult = [2.0**k for k in range(-4, 5)]
seed = 1
