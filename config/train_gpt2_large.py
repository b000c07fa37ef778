# GPT-2 large (774M) on FineWeb-Edu, 10B tokens.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_large.py
# 8 x H100 80 GB: about 4.6 hours at 40% MFU, 37 GB on each GPU (estimates: python bench.py --costs). OpenAI's weights
# have HellaSwag 0.4320; what 10B tokens reach has not been measured here.
include('train_gpt2.py')        # all of it, but for:

out_dir, preset = 'out/gpt2_large', 'gpt2-large'
batch_size = 16                 # 524,288 = 16 * 1024 tokens * 8 processes * 4 micro-steps
eval_iters = 640                # 640 * 16 * 1024 = 10.5M tokens
learning_rate, min_lr = 2.5e-4, 2.5e-5  # GPT-3's for this size
