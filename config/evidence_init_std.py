# init_std against depth with the tuned base of the evidence: python sweep.py config/evidence_init_std.py
# Hardware: any CPU. Time: a run takes 3 seconds a layer on one core.
from evidence_base import *

out_dir = 'out/evidence_init_std'
parameterization = ['sp', 'mup', 'depth_mup', 'completep']
n_layer = [2, 8, 32]
init_std = [0.08 * 2.0**k for k in (-3, -2, -1, 0, 1, 2)]
seed = [1, 2, 3]
