# completep_small with muP: sees width, not depth.
# Hardware: any CPU. Time: the work of completep_small. Loss to expect: 1.33 nats per byte, 1.92 bits per byte.
from completep_small import *

out_dir = 'out/mup_small'
parameterization = 'mup'
