# Learning rate at 2 and 4 times the base's duration, with more and more of the rules of arXiv:2512.22382, Table 1, at a
# tuned weight decay: python sweep.py config/sweep_duration_pieces.py
# Hardware: any CPU. Time: 40 minutes on one core.
from sweep_base import *

out_dir = 'out/sweep_duration_pieces'
parameterization = 'completep'
weight_decay = 0.3
base_train_tokens = 250 * 64 * 64
variants = [dict(base_train_tokens=0), dict(rescale='lr'), dict(rescale='lr,weight_decay'),
            dict(rescale='lr,weight_decay,eps,beta2'), dict(rescale='lr,weight_decay,eps,beta1,beta2')]
shapes = [dict(train_tokens=factor * base_train_tokens) for factor in (1, 2, 4)]
learning_rate = [2.0**k for k in range(-7, -3)]
seed = [1, 2, 3]
