# Learning rate against depth in the paper's own architecture: python sweep.py config/evidence_depth.py
# Hardware: any CPU. Time: a run takes 3 seconds a layer on one core.
from evidence_base import *

out_dir = 'out/evidence_depth'
n_layer = [2, 8, 32]
parameterization = ['sp', 'completep']
learning_rate = [2.0**k for k in range(-8, -1)]
seed = [1, 2, 3]
