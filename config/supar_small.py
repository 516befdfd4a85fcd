# completep_small with SuPar: sees width and density, and trains a quarter of the attention and MLP weights.
# Hardware: any CPU. Time: not measured by itself. Loss to expect: 1.33 nats per byte, 1.93 bits per byte.
from completep_small import *

out_dir = 'out/supar_small'
parameterization = 'supar'
density = 0.25
