# 26M parameters by the modern recipe, in less than half of the time.  python train.py config/train_26m_fast.py
# First: as for train_26m.py.  8,000 steps should end where its 20,000 do, on one 24 GB GPU after 50 minutes: an
# estimate, from the tokens that 3.7M parameters need by either recipe (BENCHMARKS.md).
include('train_26m.py')                 # the data and the batch; and:

out_dir = 'out/26m_fast'
norm, position, mlp, bias = 'rmsnorm', 'rope', 'relu2', False
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate, min_lr = 6e-3, 0.0
warmup_steps = 50
max_steps = 8000                        # 8,000 * 131,072 = 1.0B tokens
