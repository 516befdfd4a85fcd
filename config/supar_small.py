# completep_small with SuPar: sees width and density, and trains a quarter of the attention and MLP weights.
# Hardware, time, loss: TODO
from completep_small import *

out_dir = 'out/supar_small'
parameterization = 'supar'
density = 0.25
