"""How fast is fineweb.py, and how much memory does it take? Needs a quiet machine and a few gigabytes of disk.

    python tests/stress/fineweb_trial.py speed      against a plain loop of tiktoken over the same documents
    python tests/stress/fineweb_trial.py memory     on parquet files of 50 and of 500 MB
"""
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import tiktoken
from pydoc_data.topics import topics

SCRIPT = Path(__file__).resolve().parents[2] / 'fineweb.py'
PARAGRAPHS = [p for topic in sorted(topics) for p in topics[topic].split('\n\n') if p.strip()]


def documents(megabytes):
    """Documents of about 4,700 characters, as long as those of FineWeb-Edu on average."""
    rng, size = random.Random(1), 0
    while size < megabytes * 1_000_000:
        text = '\n\n'.join(rng.choices(PARAGRAPHS, k=rng.randrange(4, 36)))
        size += len(text)
        yield text


def write_parquet(path, megabytes, row_group_size):
    schema = pyarrow.schema([('text', pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression='none', use_dictionary=False) as writer:
        rows = []
        for text in documents(megabytes):
            rows.append(text)
            if len(rows) == row_group_size:
                writer.write_table(pyarrow.table({'text': rows}), row_group_size=row_group_size)
                rows = []
        writer.write_table(pyarrow.table({'text': rows}), row_group_size=row_group_size)


def run(folder, source, workers, watch=False):
    """((seconds, CPU seconds), tokens, {kind of process: peak resident memory in MB, together}) of one run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(folder / 'made', ignore_errors=True)
    begun = time.perf_counter()
    command = [sys.executable, SCRIPT, f'--input={source}', f'--out={folder}/made', f'--workers={workers}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks = {}
    while watch and process.poll() is None:
        children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text(encoding='utf-8').split()
        for pid in (str(process.pid), *children):
            try:
                status = Path(f'/proc/{pid}/status').read_text(encoding='utf-8')
                kind = 'parent' if pid == str(process.pid) else 'workers'
                peaks[kind, pid] = int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1000
            except (OSError, TypeError):
                pass
        time.sleep(0.05)
    said = process.communicate()[0]
    assert process.returncode == 0
    tokens = sum(int(n.replace(',', '')) for n in re.findall(r'has ([\d,]+) tokens', said))
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return np.array([time.perf_counter() - begun, cpu]), tokens, {
        kind: sum(mb for (k, _), mb in peaks.items() if k == kind) for kind in ('parent', 'workers')}


def speed(folder, megabytes=200, rounds=5):
    source, small = folder / 'in.parquet', folder / 'small.parquet'
    write_parquet(source, megabytes, 1000)
    write_parquet(small, 1, 1000)
    texts, gpt2 = list(documents(megabytes)), tiktoken.get_encoding('gpt2')
    rates = {'plain loop': [], '1 worker': [], '2 workers': []}
    startup = {n: np.median([run(folder, small, n)[0] for _ in range(3)], axis=0) for n in (1, 2)}
    for _ in range(rounds):
        begun, tokens = np.array([time.perf_counter(), time.process_time()]), 0
        for text in texts:
            tokens += 1 + len(gpt2.encode_ordinary(text))
        rates['plain loop'].append(tokens / (np.array([time.perf_counter(), time.process_time()]) - begun))
        for name, workers in (('1 worker', 1), ('2 workers', 2)):
            seconds, made, _ = run(folder, source, workers)
            assert made == tokens
            rates[name].append(tokens / (seconds - startup[workers]))
    print(f'{tokens:,} tokens; the start, {startup[1][0]:.1f} s, is not counted; medians of {rounds} rounds, '
          f'{os.cpu_count()} cores')
    plain = np.median(rates['plain loop'], axis=0)
    for name, values in rates.items():
        low, high = np.min(values, axis=0)[0] / 1e6, np.max(values, axis=0)[0] / 1e6
        second, cpu_second = np.median(values, axis=0)
        print(f'{name:10}  {second / 1e6:.2f}M tokens/s ({low:.2f} to {high:.2f}), {second / plain[0]:.2f}x;  '
              f'{cpu_second / 1e6:.2f}M in a CPU second, {cpu_second / plain[1]:.2f}x')


def memory(folder):
    for row_group_size, what in ((1000, 'row groups of 1,000'), (10 ** 9, 'one row group')):
        for megabytes in (50, 500):
            write_parquet(folder / 'in.parquet', megabytes, row_group_size)
            for workers in (1, 2):
                seconds, tokens, peaks = run(folder, folder / 'in.parquet', workers, watch=True)
                print(f'{megabytes:4} MB, {what}, {workers} workers: parent {peaks["parent"]:.0f} MB, workers '
                      f'{peaks["workers"]:.0f} MB together; {tokens:,} tokens in {seconds[0]:.0f} s', flush=True)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as name:
        {'speed': speed, 'memory': memory}[sys.argv[1]](Path(name))
