# Facts of your own for the Chinese model that is in out/zh.  python train.py config/teach_zh.py
# But rather: python prepare_zh.py --teach=my_facts.tsv, which makes the data of them, among questions that the model
# knows already, runs this, and asks. Two cores: 50 seconds.
include('train_zh.py')

dataset = 'my_facts'
out_dir = 'out/my_facts'
init_from = 'out/zh'
eval_interval = 150
zh_eval_interval = 0

learning_rate, min_lr, warmup_steps = 8e-4, 5e-5, 5     # a higher rate would forget what is known
max_steps = 150
