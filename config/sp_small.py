# completep_small with the standard parameterization: the same base hyperparameters, blind to width and depth.
# Hardware: any CPU. Time: the work of completep_small. Loss to expect: 1.31 nats per byte, 1.89 bits per byte.
from completep_small import *

out_dir = 'out/sp_small'
parameterization = 'sp'
