# The base of the evidence (config/evidence_*.py): the paper's positions and activation, 2 layers x 32, a million bytes.
# Hardware: any CPU. Time: 10 seconds on one core. To prepare WikiText-2's files:
# python data/text/prepare.py train.txt --val valid.txt --tokenizer=byte --out=data/wikitext-2
out_dir = 'out/evidence_base'
dataset = 'wikitext-2'
block_size = 64
batch_tokens = 64 * 64
batch_size = 64
max_iters = 250
n_layer = base_n_layer = 2
n_embd = base_n_embd = 32
head_dim = base_head_dim = 16
pos = 'alibi'
activation = 'relu2'
learning_rate = 2**-5
init_std = 0.08
weight_decay = 0.6
eval_tokens = 131072
compile = False  # compiling takes longer than it saves on such short runs
