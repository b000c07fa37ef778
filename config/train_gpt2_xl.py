# GPT-2 XL (1558M) on FineWeb-Edu, 10B tokens.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py
# 8 x H100 80 GB: about 9 hours at 40% MFU, 46 GB on each GPU (estimates: python bench.py --costs). OpenAI's own weights
# have HellaSwag 0.4889; what 10B tokens reach has not been measured here.
include('train_gpt2.py')        # all of it, but for:

out_dir, preset = 'out/gpt2_xl', 'gpt2-xl'
batch_size = 8                  # 524,288 = 8 * 1024 tokens * 8 processes * 8 micro-steps
eval_iters = 1280               # 1280 * 8 * 1024 = 10.5M tokens
learning_rate, min_lr = 2e-4, 2e-5      # GPT-3's for this size
zero = 1                        # AdamW's 12.5 GB, divided over the processes
