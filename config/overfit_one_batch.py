# Does the machinery learn at all? One batch, again and again.  python train.py config/overfit_one_batch.py
# First: python prepare_data.py --dataset=python_docs.  Two cores: half a minute; the loss falls below 0.05.
out_dir = 'out/overfit_one_batch'
init_from = 'scratch'           # this is a test: start over each time
dataset = 'python_docs'
one_batch = True
eval_interval = 0               # the validation loss can only get worse
eval_iters = 2
log_interval = 20

batch_size, block_size = 8, 64
total_batch_size = 0
n_layer, n_head, n_embd = 4, 4, 128
weight_decay = 0.0

learning_rate, min_lr = 3e-3, 3e-4
max_steps = 200
warmup_steps = 10
