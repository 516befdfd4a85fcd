# Schedule against width: python sweep.py config/sweep_schedule.py (Tensor Programs V, arXiv:2203.03466, Fig. 4)
# Hardware: any CPU. Time: 10 minutes on 2 cores.
from sweep_base import *

out_dir = 'out/sweep_schedule'
parameterization = ['sp', 'mup']
n_embd = [32, 128]
schedule = ['linear', 'cosine', 'constant']
learning_rate = [2.0**k for k in range(-8, -3)]
seed = 1
