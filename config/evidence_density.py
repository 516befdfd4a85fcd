# Learning rate against density with the tuned base of the evidence: python sweep.py config/evidence_density.py
# Hardware: any CPU. Time: not measured.
from evidence_base import *

out_dir = 'out/evidence_density'
parameterization = ['sp', 'mup', 'supar']
n_embd = 128
density = [1.0, 0.5, 0.25, 0.125, 0.0625]
learning_rate = [2.0**k for k in range(-9, -2)]
seed = [1, 2, 3]
