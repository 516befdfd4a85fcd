# completep_small with muP, which scales with width but ignores depth.
# Hardware: any CPU. Time: about that of completep_small. Loss to expect: 1.33 nats per byte, 1.92 bits per byte.
from completep_small import *

out_dir = 'out/mup_small'
parameterization = 'mup'
