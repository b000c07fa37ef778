# The whole of GPT-2 124M with small batches, to try everything out.  python train.py config/train_gpt2_smoke.py
# This is the recipe for a Mac, too, and for any laptop: 8,192 tokens a step instead of half a million. A Mac's GPU is
# found by itself (device mps, float32; try --dtype=bfloat16), and with 16 GB or more --batch_size=16 is faster.
# First: python prepare_data.py --dataset=shakespeare, or python fineweb.py --fraction=0.001 and here
# --dataset=fineweb_edu_10B, or any other data set in GPT-2's tokens. With HellaSwag on the way:
# --hellaswag_interval=250 --hellaswag_limit=200. Two CPU cores: 17 s a step (torch 2.13, bfloat16).
out_dir = 'out/gpt2_smoke'
dataset = 'shakespeare'
eval_interval = 250
eval_iters = 20
sample_interval = 250
sample_prompt = "Hello, I'm a language model,"

preset = 'gpt2'
batch_size, block_size = 4, 128
total_batch_size = 8192         # 4 * 128 * 16 micro-steps

learning_rate, min_lr = 6e-4, 6e-5
warmup_steps = 100
max_steps = 2000
