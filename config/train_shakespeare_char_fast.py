# nanoGPT's headline, 1.47, on two CPU cores.  python train.py config/train_shakespeare_char_fast.py
# 3.3 minutes. First: python prepare_data.py --dataset=shakespeare_char.  What each switch is worth: BENCHMARKS.md.
# 1.44 in a quarter of an hour: --max_steps=2000 --dropout=0.15 --zero_init=false --weight_decay=0.5
include('train_shakespeare_char.py')    # the data and the GELU; and the modern recipe:

out_dir = 'out/shakespeare_char_fast'
eval_interval = 200
eval_iters = 28                 # 28 * 16 * 256 = 114,688 tokens: all of the validation split
log_interval = 50

batch_size, block_size = 16, 256
n_layer, n_head, n_embd = 6, 6, 192
dropout = 0.0
norm, position = 'rmsnorm', 'rope'
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate, min_lr = 6e-3, 0.0
weight_decay = 1.0              # ten times the usual: the text is seen more than three times
beta2 = 0.95
warmup_steps = 20
max_steps = 840                 # 840 * 16 * 256 = 3.4M tokens, 3.4 epochs; compiled, 1.4 times as fast
