"""Shards byte for byte, other projects' shards, damaged ones; batches as a pure function of seed, step and layout."""
import io
import json
import os
import pickle
import random
import struct

import numpy as np
import pytest
import torch

from configurator import UserError
from dataset import (
    ShardWriter,
    TokenDataset,
    dataset_tokenizer,
    find_dataset,
    install_dataset,
    open_shard,
    read_meta,
    shuffled,
)
from files import sha256_of
from tokenizer import save_tokenizer, train_char

ROW = np.arange(3000) * 7 % 3000            # all different, so that a window can be told by its first token
T = 16


def shard_bytes(tokens, magic=20240520, version=1, dtype='<u2', count=None):
    """A shard as llm.c writes it, by hand."""
    header = struct.pack('<256i', magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + np.asarray(tokens).astype(dtype).tobytes()


def make_ours(folder, train=ROW, val=ROW[:100], shard_size=10 ** 8, mask=None, vocab_size=3000):
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, tokens in (('train', train), ('val', val)):
        writer = ShardWriter(folder, split, vocab_size, shard_size, with_mask=mask is not None)
        writer.write(tokens, None if mask is None else mask[:len(tokens)])
        shards[split] = writer.finish()
    install_dataset(folder, train_char(['abc']), shards, 'a test', 'none')
    return folder


def dataset(folder, split='train', batch_size=4, vocab_size=3000, **options):
    return TokenDataset(folder, split, T, vocab_size, batch_size, **options)


def starts_of(x, row=ROW):
    """Where in the long row each window of x begins."""
    place = {int(token): i for i, token in enumerate(row)}
    return [place[int(token)] for token in x[:, 0]]


def epoch_starts(data, epoch):
    steps = data.windows_per_epoch // data.batch_size
    assert steps * data.batch_size == data.windows_per_epoch
    return [s for step in range(epoch * steps, (epoch + 1) * steps) for s in starts_of(data.batch(step)[0])]


# -----------------------------------------------------------------------------
# the files

@pytest.mark.parametrize('vocab_size, magic, version, dtype', [
    (65536, 20240520, 1, '<u2'), (65537, 20240801, 7, '<u4')])
def test_a_shard_is_llm_c_s_layout_byte_for_byte(tmp_path, vocab_size, magic, version, dtype):
    tokens = [0, 1, 513, 40000, vocab_size - 1]
    writer = ShardWriter(tmp_path, 'train', vocab_size)
    writer.write(tokens[:2])
    writer.write(np.array(tokens[2:]))
    described = writer.finish()
    install_dataset(tmp_path, train_char(['abc']), {'train': described}, 'a test', 'none')
    path = tmp_path / 'train_000000.bin'
    assert path.read_bytes() == shard_bytes(tokens, magic, version, dtype)
    assert described == [{'file': path.name, 'tokens': 5, 'sha256': sha256_of(path)}]
    assert open_shard(path).tolist() == tokens
    assert open_shard(path).dtype == np.dtype(dtype)


def test_shards_are_as_large_as_asked_and_lose_nothing(tmp_path):
    writer = ShardWriter(tmp_path, 'train', 3000, shard_size=700)
    for i in range(0, 3000, 999):
        writer.write(ROW[i:i + 999])
    described = writer.finish()
    install_dataset(tmp_path, train_char(['abc']), {'train': described}, 'a test', 'none')
    assert [d['tokens'] for d in described] == [700, 700, 700, 700, 200]
    assert [d['file'] for d in described] == [f'train_{i:06d}.bin' for i in range(5)]
    assert np.concatenate([open_shard(tmp_path / d['file']) for d in described]).tolist() == ROW.tolist()


def test_unfinished_shards_do_not_look_whole(tmp_path):
    writer = ShardWriter(tmp_path, 'train', 3000, shard_size=700)
    writer.write(ROW)
    writer.finish()
    assert not list(tmp_path.glob('*.bin'))
    with pytest.raises(UserError, match='half made'):
        find_dataset(tmp_path)


def other_projects_folders(tmp_path, train, val):
    for name in ('nanogpt', 'build-nanogpt', 'llm.c', 'llm.c-wide'):
        (tmp_path / name).mkdir()
    for split, row in (('train', train), ('val', val)):
        row.astype('<u2').tofile(tmp_path / f'nanogpt/{split}.bin')
        for i, part in enumerate((row[:1234], row[1234:])):
            if len(part):
                np.save(tmp_path / f'build-nanogpt/edufineweb_{split}_{i + 1:06d}.npy', part.astype(np.uint16))
                (tmp_path / f'llm.c/fineweb_{split}_{i + 1:06d}.bin').write_bytes(shard_bytes(part))
                (tmp_path / f'llm.c-wide/fineweb_{split}_{i + 1:06d}.bin').write_bytes(
                    shard_bytes(part, 20240801, 7, '<u4'))
    return [tmp_path / name for name in ('nanogpt', 'build-nanogpt', 'llm.c', 'llm.c-wide')]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_the_same_tokens_give_the_same_batches_from_every_kind_of_shard(tmp_path, split):
    ours = dataset(make_ours(tmp_path / 'ours', shard_size=700), split)
    for folder in other_projects_folders(tmp_path, ROW, ROW[:100]):
        data = dataset(find_dataset(folder), split)
        assert data.n_tokens == ours.n_tokens
        for step in (0, 1, 50, 400):
            for mine, theirs in zip(ours.batch(step), data.batch(step), strict=True):
                assert torch.equal(mine, theirs)


def test_shards_without_meta_json_are_gpt2_s(tmp_path):
    for folder in other_projects_folders(tmp_path, ROW, ROW):
        assert dataset_tokenizer(folder).kind == 'gpt2'


def test_nanogpt_s_table_of_characters_is_read(tmp_path):
    chars = '\n !abc龍'
    table = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(table))
    tokenizer = dataset_tokenizer(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot) == ('char', len(chars), None)
    assert tokenizer.encode('ab龍 !') == [table['stoi'][c] for c in 'ab龍 !']


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_without_running(tmp_path):
    trap = str(tmp_path / 'trap')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': Malicious(trap), 'stoi': {}}))
    with pytest.raises(UserError, match='meta.pkl'):
        dataset_tokenizer(tmp_path)
    assert not os.path.exists(trap)
    pickle.loads((tmp_path / 'meta.pkl').read_bytes())                  # it is a real trap
    assert os.path.exists(trap)


@pytest.mark.parametrize('data', [b'', b'junk', pickle.dumps([]), pickle.dumps({'itos': {0: 1}}),
                                  pickle.dumps({'itos': {1: 'a'}})])
def test_a_damaged_table_of_characters_is_refused(tmp_path, data):
    (tmp_path / 'meta.pkl').write_bytes(data)
    with pytest.raises(UserError, match='meta.pkl'):
        dataset_tokenizer(tmp_path)


GOOD = shard_bytes(ROW)


@pytest.mark.parametrize('damage, says', [
    (shard_bytes(ROW, magic=20240521), 'magic'),
    (shard_bytes(ROW, version=2), 'version 2'),
    (shard_bytes(ROW, magic=20240801, version=1, dtype='<u4'), 'version 1'),
    (shard_bytes(ROW, count=2999), '2,999'),
    (shard_bytes(ROW, count=-3000), 'damaged'),
    (GOOD[:-2], '2,999.0'),
    (GOOD[:-1], 'damaged'),
    (GOOD + b'\0\0', 'damaged'),
    (GOOD[:1024], '3,000'),
    (GOOD[:1000], 'version|cut short'),
    (GOOD[:4], 'version|cut short'),
    (b'', 'magic none'),
    (b'\1\2\3', 'not a token shard'),
])
@pytest.mark.parametrize('ours', [True, False])
def test_a_damaged_shard_is_refused(tmp_path, damage, says, ours):
    folder = tmp_path / 'set'
    if ours:
        make_ours(folder)
        path = folder / 'train_000000.bin'
    else:
        folder.mkdir()
        path = folder / 'fineweb_train_000001.bin'
    path.write_bytes(damage)
    with pytest.raises(UserError, match=says) as error:
        dataset(folder)
    assert path.name in str(error.value)


def test_a_headerless_file_is_not_taken_for_a_shard_of_ours(tmp_path):
    make_ours(tmp_path)
    ROW.astype('<u2').tofile(tmp_path / 'train_000000.bin')
    with pytest.raises(UserError, match='not a token shard'):
        dataset(tmp_path)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize('data', [b'', b'junk', npy(ROW.astype(np.uint16))[:-10], npy(ROW.astype(np.float32)),
                                  npy(ROW.astype(np.uint16).reshape(2, -1)), npy(np.array([Malicious('trap')]))])
def test_a_damaged_npy_file_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x_train_000001.npy').write_bytes(data)
    with pytest.raises(UserError, match='x_train_000001.npy'):
        dataset(tmp_path)
    assert not (tmp_path / 'trap').exists()


@pytest.mark.parametrize('vocab_size', [2999, 100])
def test_an_id_outside_the_vocabulary_is_refused_and_its_shard_named(tmp_path, vocab_size):
    row = np.arange(3000) % 64
    row[2047] = vocab_size
    data = dataset(make_ours(tmp_path, row, shard_size=1000), vocab_size=vocab_size)
    with pytest.raises(UserError, match='train_000002.bin') as error:
        for step in range(data.windows_per_epoch):
            data.batch(step)
    assert str(vocab_size) in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    make_ours(tmp_path, shard_size=1000)
    (tmp_path / 'train_000001.bin').unlink()
    with pytest.raises(UserError, match='train_000001.bin'):
        dataset(tmp_path)


def test_a_shard_left_over_beside_ours_is_not_read(tmp_path):
    make_ours(tmp_path)
    (tmp_path / 'train_000001.bin').write_bytes(GOOD)
    assert dataset(tmp_path).n_tokens == 3000


def test_a_half_made_folder_is_refused(tmp_path):
    make_ours(tmp_path)
    (tmp_path / 'meta.json').unlink()
    with pytest.raises(UserError, match='half made'):
        find_dataset(tmp_path)


def test_a_data_set_is_found_by_name_or_path_or_the_error_lists_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_ours(tmp_path / 'data' / 'mine')
    assert find_dataset('mine').resolve() == find_dataset(tmp_path / 'data' / 'mine').resolve()
    with pytest.raises(UserError, match='mine'):
        find_dataset('yours')


def test_no_shards_or_too_few_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match='train'):
        dataset(tmp_path)
    make_ours(tmp_path, ROW[:T])
    with pytest.raises(UserError, match='block_size'):
        dataset(tmp_path)
    make_ours(tmp_path, ROW[:T + 1])
    x, y = dataset(tmp_path, batch_size=1).batch(0)
    assert x[0].tolist() == ROW[:T].tolist() and y[0].tolist() == ROW[1:T + 1].tolist()


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"tokenizer": "gpt2"}'])
def test_a_damaged_meta_json_is_refused(tmp_path, text):
    (tmp_path / 'meta.json').write_text(text, encoding='utf-8')
    with pytest.raises(UserError, match='meta.json'):
        read_meta(tmp_path)


def test_another_tokenizer_than_the_one_that_made_the_shards_is_refused(tmp_path):
    make_ours(tmp_path)
    assert dataset_tokenizer(tmp_path).encode('cab') == [2, 0, 1]
    save_tokenizer(train_char(['abd']), tmp_path)
    with pytest.raises(UserError, match='tokenizer.json'):
        dataset_tokenizer(tmp_path)


def test_meta_json_counts_tokens_and_has_the_shards_sha256(tmp_path):
    make_ours(tmp_path, shard_size=1000)
    meta = json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    assert [s['tokens'] for s in meta['shards']['train']] == [1000, 1000, 1000]
    assert [s['sha256'] for s in meta['shards']['train']] == [sha256_of(tmp_path / f'train_00000{i}.bin')
                                                              for i in range(3)]


# -----------------------------------------------------------------------------
# the batches

@pytest.mark.parametrize('shard_size', [10 ** 8, 700, 7])       # 7 is less than a window, so many borders in each
def test_targets_are_inputs_shifted_by_one_across_shard_borders_too(tmp_path, shard_size):
    data = dataset(make_ours(tmp_path, shard_size=shard_size), batch_size=2)
    for step in [*range(95), 500, 12345]:
        x, y = data.batch(step)
        assert x.shape == y.shape == (2, T) and x.dtype == y.dtype == torch.int64
        for b, start in enumerate(starts_of(x)):
            assert x[b].tolist() == ROW[start:start + T].tolist()
            assert y[b].tolist() == ROW[start + 1:start + T + 1].tolist()


def test_every_window_comes_once_an_epoch(tmp_path):
    data = dataset(make_ours(tmp_path), batch_size=2)
    assert data.windows_per_epoch >= (len(ROW) - 1) // T - 1
    for epoch in range(4):
        starts = sorted(epoch_starts(data, epoch))
        assert 0 <= starts[0] < T
        assert starts == list(range(starts[0], starts[0] + data.windows_per_epoch * T, T))
        assert starts[-1] + T < len(ROW)
    assert min(epoch_starts(data, 0)) == 0


def test_a_short_text_has_every_window_once_an_epoch(tmp_path):
    data = dataset(make_ours(tmp_path, ROW[:10 * T + 1]), batch_size=2)
    for epoch in range(3):
        assert sorted(epoch_starts(data, epoch)) == list(range(0, 10 * T, T))


@pytest.mark.parametrize('n', [*range(T + 1, 3 * T), *range(16 * T - 2, 18 * T + 3)])
def test_no_length_of_text_makes_a_window_reach_beyond_it(tmp_path, n):
    data = dataset(make_ours(tmp_path, ROW[:n]), batch_size=1)
    for step in range(6 * data.windows_per_epoch):
        x, y = data.batch(step)
        assert (y >= 0).all()
        assert starts_of(x)[0] + T < n


def test_another_epoch_or_seed_has_another_order(tmp_path):
    make_ours(tmp_path)
    orders = [epoch_starts(dataset(tmp_path, batch_size=2, seed=seed), epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    places = [[s // T for s in order] for order in orders]
    assert len({tuple(p) for p in places}) == 6
    assert all(p != sorted(p) for p in places)
    assert epoch_starts(dataset(tmp_path, batch_size=2, seed=1), 2) == orders[2]


def test_an_epoch_after_the_first_cuts_the_text_elsewhere(tmp_path):
    data = dataset(make_ours(tmp_path), batch_size=2)
    assert len({min(epoch_starts(data, epoch)) for epoch in range(8)}) > 3


def test_batch_is_a_pure_function_of_the_step(tmp_path):
    make_ours(tmp_path)
    one, other = dataset(tmp_path, grad_accum_steps=2), dataset(tmp_path, grad_accum_steps=2)
    calls = [(step, micro) for step in range(60) for micro in range(2)]
    first = {call: one.batch(*call) for call in calls}
    random.Random(1).shuffle(calls)
    for call in calls:
        list(other.eval_batches(2))
        assert all(torch.equal(a, b) for a, b in zip(first[call], other.batch(*call), strict=True))


@pytest.mark.parametrize('masked', [False, True])
def test_one_two_or_four_processes_see_the_same_global_batch(tmp_path, masked):
    mask = (ROW % 3 == 0).astype(np.uint8)
    row = np.where(np.arange(3000) % 12 == 0, ROW[0], ROW)
    make_ours(tmp_path, row if masked else ROW, mask=mask if masked else None)

    def rows(step, world, accum, batch_size):
        parts = [dataset(tmp_path, batch_size=batch_size, grad_accum_steps=accum, rank=rank, world_size=world)
                 .batch(step, micro) for micro in range(accum) for rank in range(world)]
        return sorted((*x.tolist(), *y.tolist()) for part in parts for x, y in zip(*part, strict=True))

    for step in (0, 3, 77):
        alone = rows(step, 1, 1, 8)
        assert len(alone) == 8
        for layout in ((1, 2, 4), (1, 8, 1), (2, 1, 4), (2, 2, 2), (4, 1, 2), (4, 2, 1)):
            assert rows(step, *layout) == alone


@pytest.mark.parametrize('eval_iters', [1, 5, 10, 1000])
def test_evaluation_reads_fixed_evenly_spread_windows_whatever_the_layout(tmp_path, eval_iters):
    make_ours(tmp_path)
    alone = dataset(tmp_path)
    before = [s for x, _ in alone.eval_batches(eval_iters) for s in starts_of(x)]
    alone.batch(99)
    assert [s for x, _ in dataset(tmp_path, seed=5).eval_batches(eval_iters) for s in starts_of(x)] == before
    assert [s for x, _ in alone.eval_batches(eval_iters) for s in starts_of(x)] == before
    assert len(before) == min(4 * eval_iters, alone.n_windows) and len(set(before)) == len(before)
    gaps = np.diff([*before, alone.n_windows * T]) // T
    assert before[0] == 0 and gaps.max() - gaps.min() <= 1
    for world in (2, 4):
        ranks = [dataset(tmp_path, rank=rank, world_size=world).eval_batches(eval_iters) for rank in range(world)]
        assert sorted(s for rank in ranks for x, _ in rank for s in starts_of(x)) == before


def test_evaluation_targets_are_inputs_shifted_by_one(tmp_path):
    for x, y in dataset(make_ours(tmp_path, shard_size=100)).eval_batches(10 ** 6):
        for b, start in enumerate(starts_of(x)):
            assert x[b].tolist() == ROW[start:start + T].tolist()
            assert y[b].tolist() == ROW[start + 1:start + T + 1].tolist()


# -----------------------------------------------------------------------------
# masks

EOT = 0


def documents_with_masks(lengths, seed=1):
    """(row, mask): documents of so many tokens behind an end-of-text token each; no other token comes twice."""
    rng = np.random.default_rng(seed)
    row, fresh = [], iter(range(1, 60000))
    for length in lengths:
        row += [EOT, *(next(fresh) for _ in range(length))]
    return np.array(row), rng.integers(0, 2, len(row)).astype(np.uint8)


def make_masked(folder, lengths, shard_size=10 ** 8):
    row, mask = documents_with_masks(lengths)
    make_ours(folder, row, row[:50], shard_size, mask, vocab_size=60000)
    return row, mask


def masked(folder, **options):
    return dataset(folder, vocab_size=60000, **{'batch_size': 1, **options})


@pytest.mark.parametrize('shard_size', [10 ** 8, 40])
def test_every_trained_token_of_every_whole_document_is_a_target_once_an_epoch(tmp_path, shard_size):
    lengths = np.random.default_rng(2).integers(1, T, 200)
    row, mask = make_masked(tmp_path, lengths, shard_size)
    data = masked(tmp_path)
    assert data.windows_per_epoch < len(lengths)                        # documents share a row where they fit
    for epoch in range(3):
        targets = []
        for step in range(epoch * data.n_windows, (epoch + 1) * data.n_windows):
            x, y = data.batch(step)
            assert x[0, 0] == EOT
            targets += y[y >= 0].tolist()
        # the first end-of-text token has nothing before it, so it is nobody's target
        assert sorted(targets) == sorted(row[1:][mask[1:] == 1].tolist())


def test_targets_are_minus_100_where_the_mask_is_0_and_beyond_the_documents(tmp_path):
    row, mask = make_masked(tmp_path, np.random.default_rng(3).integers(1, T, 100))
    data = masked(tmp_path)
    place = {int(t): i for i, t in enumerate(row) if t != EOT}
    for step in range(data.n_windows):
        x, y = data.batch(step)
        x, y = x[0].tolist(), y[0].tolist()
        n = max(t for t in range(T) if x[t]) + 1                            # the padding behind the documents is 0
        for t in range(n):
            here = place[x[t]] if x[t] != EOT else place[x[t + 1]] - 1      # where in the long row this token stands
            assert y[t] == (int(row[here + 1]) if here + 1 < len(row) and mask[here + 1] else -100)
        assert y[n:] == [-100] * (T - n)


def test_a_document_too_long_for_a_row_fills_several_and_loses_nothing(tmp_path):
    row, mask = make_masked(tmp_path, [5, 100, 5, T, T - 1, T + 1, 3, 50])
    data = masked(tmp_path)
    seen = [t for step in range(data.n_windows) for t in data.batch(step)[1].flatten().tolist() if t > EOT]
    assert sorted(seen) == sorted(int(t) for t, m in zip(row, mask, strict=True) if m and t != EOT)


def test_targets_in_counts_the_targets_of_the_whole_step(tmp_path):
    make_masked(tmp_path / 'masked', np.random.default_rng(4).integers(1, 2 * T, 150))
    make_ours(tmp_path / 'plain', vocab_size=60000)
    for folder in (tmp_path / 'masked', tmp_path / 'plain'):
        for world, accum in ((1, 1), (2, 3), (4, 1)):
            ranks = [masked(folder, batch_size=3, grad_accum_steps=accum, rank=rank, world_size=world)
                     for rank in range(world)]
            for step in (0, 1, 40):
                count = sum(int((r.batch(step, micro)[1] >= 0).sum()) for r in ranks for micro in range(accum))
                assert {r.targets_in(step) for r in ranks} == {count}


def test_a_mask_of_another_length_is_refused(tmp_path):
    make_masked(tmp_path, [5] * 20)
    path = tmp_path / 'train_000000.mask.bin'
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match='mask'):
        masked(tmp_path)


# -----------------------------------------------------------------------------
# the permutation

def test_shuffled_is_a_permutation():
    for n in range(1, 301):
        assert sorted(shuffled(np.arange(n), n, key=n * 31).tolist()) == list(range(n))


def test_shuffled_gives_the_same_entries_one_by_one():
    whole = shuffled(np.arange(1000), 1000, key=5)
    assert [int(shuffled(np.array([i]), 1000, key=5)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_shuffled_looks_random():
    n = 20000
    orders = [shuffled(np.arange(n), n, key=key) for key in range(5)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.03
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
        assert (order == np.arange(n)).sum() < 10                       # 1 is expected
        assert (np.diff(order) == 1).sum() < 10
        assert np.abs(np.histogram(order[:2000], 10, (0, n))[0] - 200).max() < 80
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 0.03
    many = np.array([shuffled(np.arange(4), 4, key=key) for key in range(2400)])
    counts = np.unique(many, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 50 and counts.max() < 160       # each of 4! orders, 100 times or so
