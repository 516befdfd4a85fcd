# completep_small with SuPar, which scales with width and density; a quarter of the attention and MLP weights are kept.
# Hardware: any CPU. Time: not measured separately. Loss to expect: 1.33 nats per byte, 1.93 bits per byte.
from completep_small import *

out_dir = 'out/supar_small'
parameterization = 'supar'
density = 0.25
