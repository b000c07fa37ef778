# GPT-2's size by the modern recipe.  torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
# First: python fineweb.py --fraction=0.3  (or python fineweb.py --pretokenized, which only downloads).
# Others report, on FineWeb, 3.28 after 19,560 steps of 524,288 tokens with AdamW and GPT-2's shape, after 6,200 with
# rotary positions and Muon, and after 5,100 with normalised queries and keys, squared ReLU and projections that begin
# as zeros: these. 5,100 steps: 8 x H100 a quarter of an hour, one H100 1.6 hours (estimates, at 40% MFU). Tried here
# with 3.7M parameters only: BENCHMARKS.md.
include('train_gpt2.py')                # the data, the batch and the evaluations; and:

out_dir = 'out/gpt2_fast'
norm, position, mlp, bias = 'rmsnorm', 'rope', 'relu2', False
qk_norm = True
zero_init = True

optimizer = 'muon'
learning_rate, min_lr = 4.5e-3, 0.0     # the steps of a published 0.025: here they are 0.2 * sqrt(longer side) as long
warmup_steps = 50
max_steps = 5100                        # 5,100 * 524,288 = 2.7 billion tokens
