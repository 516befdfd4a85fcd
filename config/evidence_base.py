# The base of the evidence (config/evidence_*.py): that of the sweeps with the paper's positions and activation, tuned.
# Hardware: any CPU. Time: 10 seconds on one core.
from sweep_base import *

out_dir = 'out/evidence_base'
pos = 'alibi'
activation = 'relu2'
learning_rate = 2**-5
init_std = 0.08
weight_decay = 0.6
