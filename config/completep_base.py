# The base shape, 2 layers x 256. Tune the base hyperparameters of completep_small at this shape.
# Hardware: any CPU. Time: 3 minutes on 2 cores. Loss to expect: 1.29 nats per byte, 1.86 bits per byte.
from completep_small import *

out_dir = 'out/completep_base'
n_layer = 2
n_embd = 256
