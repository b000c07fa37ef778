# OpenAI's GPT-2 355M on our validation data and HellaSwag.  python train.py config/eval_gpt2_medium.py
# First: python fineweb.py --fraction=0.02, or any data set in GPT-2's tokens (--dataset=...).
# Downloads the weights once, through HF_ENDPOINT if that is set. Others report HellaSwag 0.3752.
out_dir = 'out/eval_gpt2_medium'
init_from = 'gpt2-medium'
dataset = 'fineweb_edu_10B'
max_steps = 0                   # only the evaluation that ends every run
eval_iters = 100
hellaswag_interval = 1
sample_interval = 1
sample_prompt = "Hello, I'm a language model,"

batch_size, block_size = 8, 1024
total_batch_size = 0
tensorboard = False
