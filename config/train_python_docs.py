# A small GPT on the English of Python's own help texts, with no download.  python train.py config/train_python_docs.py
# First: python prepare_data.py --dataset=python_docs.  Two cores: 1.5 minutes, perplexity 58.
out_dir = 'out/python_docs'
dataset = 'python_docs'
eval_interval = 100
eval_iters = 20
log_interval = 20
sample_interval = 200
sample_prompt = 'The'

batch_size, block_size = 16, 128
total_batch_size = 0            # 16 * 128 = 2,048 tokens
n_layer, n_head, n_embd = 4, 4, 192
dropout = 0.1                   # the text is seen about ten times
norm, position, mlp = 'rmsnorm', 'rope', 'silu'
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate, min_lr = 6e-3, 0.0
weight_decay = 1.0              # ten times the usual, for the same reason: worth more than all the rest
max_steps = 600
warmup_steps = 40
