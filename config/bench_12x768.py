# A shape for bench.py: 12 layers x 768, with tied weights and without biases, like nanoGPT.
# Hardware: any CPU, 16 GB. Data: WikiText-2 in GPT-2's tokens, from its text files:
# python data/text/prepare.py train.txt --val valid.txt --tokenizer=gpt2 --out=data/wikitext-2-gpt2
dataset = 'wikitext-2-gpt2'
n_layer = 12
n_embd = 768
block_size = 512
batch_tokens = 2 * 512
vocab_size = 50304
bias = False
tie_weights = True
