# The base run of the sweeps: 2 layers x 32, trained on a million bytes of WikiText-2.
# Hardware: any CPU. Time: 10 seconds on one core. Expected loss: 2.10 nats per byte. To prepare WikiText-2's files:
# python data/text/prepare.py train.txt --val valid.txt --tokenizer=byte --out=data/wikitext-2
out_dir = 'out/sweep_base'
dataset = 'wikitext-2'
block_size = 64
batch_tokens = 64 * 64
batch_size = 64
max_iters = 250
n_layer = base_n_layer = 2
n_embd = base_n_embd = 32
head_dim = base_head_dim = 16
learning_rate = 2**-6
init_std = 0.1
eval_tokens = 131072
compile = False  # compiling takes longer than it saves on such short runs
