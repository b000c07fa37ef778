# A 26M-parameter GPT in about two hours on one 24 GB GPU.  python train.py config/train_26m.py
# First: python prepare_data.py --dataset=tinystories, or your own 200 to 500 MB of text (and --dataset= here):
#   python prepare_data.py --dataset=custom --input=my_text.txt --tokenizer=bpe --vocab_size=32768 --val_fraction=0.1
#
# Where the parameters are:   embedding, which is the output layer, too    32,768 * 384 = 12,582,912
#                             positions                                       512 * 384 =    196,608
#                             8 blocks of (12 * 384 + 13) * 384            8 * 1,774,464 = 14,195,712
#                             the last layer norm                               2 * 384 =        768
#                                                                                         26,976,000
# The time is an estimate: 20,000 steps * 131,072 tokens * 0.18 GFLOP = 4.7e17, at 40% of an RTX 4090's 165 TFLOP/s.
out_dir = 'out/26m'
dataset = 'tinystories'
eval_interval = 500
eval_iters = 50
log_interval = 10
checkpoint_interval = 1000
sample_interval = 1000
sample_prompt = 'Once upon a time'

batch_size, block_size = 32, 512
total_batch_size = 131072       # 32 * 512 * 8 micro-steps
n_layer, n_head, n_embd = 8, 6, 384
dropout = 0.0

learning_rate, min_lr = 3e-4, 3e-5
warmup_steps = 2000
max_steps = 20000               # 20,000 * 131,072 = 2.6B tokens
