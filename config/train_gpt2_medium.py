# GPT-2 medium (355M) on FineWeb-Edu, 10B tokens.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_medium.py
# First: python fineweb.py.  8 x H100 80 GB: about 2 hours at 40% MFU, 39 GB on each GPU (both estimates:
# python bench.py --costs); on one GPU eight times as long. OpenAI's own weights have HellaSwag 0.3752
# (config/eval_gpt2_medium.py); what 10B tokens reach has not been measured here.
out_dir = 'out/gpt2_medium'
dataset = 'fineweb_edu_10B'
eval_interval = 250
eval_iters = 320                # 320 * 32 * 1024 = 10.5M tokens, divided over the processes
hellaswag_interval = 250
checkpoint_interval = 5000
sample_interval = 250
sample_prompt = "Hello, I'm a language model,"
num_samples = 4

preset = 'gpt2-medium'
batch_size, block_size = 32, 1024
total_batch_size = 524288       # 32 * 1024 tokens * 8 processes * 2 micro-steps

learning_rate, min_lr = 3e-4, 3e-5 # GPT-3's for this size
weight_decay = 0.1
warmup_steps = 715              # 715 * 524,288 = 375M tokens, as GPT-3
max_steps = 19073               # 19,073 * 524,288 = 10 billion tokens
