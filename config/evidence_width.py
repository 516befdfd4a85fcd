# Learning rate against width with the tuned base of the evidence: python sweep.py config/evidence_width.py
# Hardware: any CPU. Time: not measured.
from evidence_base import *

out_dir = 'out/evidence_width'
parameterization = ['sp', 'mup', 'completep']
n_embd = [32, 64, 128, 256]
learning_rate = [2.0**k for k in range(-8, -1)]
seed = [1, 2, 3]
