# completep_small with the standard parameterization, which ignores width and depth; the same base hyperparameters.
# Hardware: any CPU. Time: about that of completep_small. Loss to expect: 1.31 nats per byte, 1.89 bits per byte.
from completep_small import *

out_dir = 'out/sp_small'
parameterization = 'sp'
