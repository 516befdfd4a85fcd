# completep_small with muP: sees width, not depth.
# Hardware, time, loss: TODO
from completep_small import *

out_dir = 'out/mup_small'
parameterization = 'mup'
