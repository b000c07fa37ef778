# OpenAI's GPT-2 124M on our validation data and HellaSwag.  python train.py config/eval_gpt2.py
# First: python fineweb.py --fraction=0.02, or any data set in GPT-2's tokens (--dataset=...).
# Downloads the weights once, through HF_ENDPOINT if that is set. Others report a validation loss of 3.2924 on
# FineWeb-Edu, and HellaSwag 0.2955. The bits per byte that it prints compare with any model's on the same text,
# whatever its tokenizer; your own: python fineweb.py --input=my_text.txt --out=data/mine, and --dataset=mine.
out_dir = 'out/eval_gpt2'
init_from = 'gpt2'
dataset = 'fineweb_edu_10B'
max_steps = 0                   # only the evaluation that ends every run
eval_iters = 100
hellaswag_interval = 1
sample_interval = 1
sample_prompt = "Hello, I'm a language model,"

batch_size, block_size = 16, 1024
total_batch_size = 0
tensorboard = False
