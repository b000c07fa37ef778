# GPT-2 medium (355M) on FineWeb-Edu, 10B tokens.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_medium.py
# 8 x H100 80 GB: about 2 hours at 40% MFU, 34 GB on each GPU (estimates: python bench.py --costs). OpenAI's own weights
# have HellaSwag 0.3752; what 10B tokens reach has not been measured here.
include('train_gpt2.py')        # all of it, but for:

out_dir, preset = 'out/gpt2_medium', 'gpt2-medium'
batch_size = 32                 # 524,288 = 32 * 1024 tokens * 8 processes * 2 micro-steps
eval_iters = 320                # 320 * 32 * 1024 = 10.5M tokens
learning_rate, min_lr = 3e-4, 3e-5      # GPT-3's for this size
