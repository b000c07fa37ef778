# OpenAI's GPT-2 1558M on our validation data and HellaSwag.  python train.py config/eval_gpt2_xl.py
# All as in eval_gpt2.py. Others report HellaSwag 0.4889 and 0.4893.
include('eval_gpt2.py')
out_dir, init_from, batch_size = 'out/eval_gpt2_xl', 'gpt2-xl', 4
