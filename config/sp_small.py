# completep_small with the standard parameterization: the same base hyperparameters, blind to width and depth.
# Hardware, time, loss: TODO
from completep_small import *

out_dir = 'out/sp_small'
parameterization = 'sp'
