# Facts of your own for the Chinese model that is in out/zh.  python prepare_zh.py --teach=my_facts.tsv
# That makes the data of them, among questions that the model knows already, runs this, and asks.
include('train_zh.py')

dataset = 'my_facts'
out_dir = 'out/my_facts'
init_from = 'out/zh'
eval_interval = 60
zh_eval_interval = 0

learning_rate, warmup_steps = 2e-3, 5
max_steps = 60
