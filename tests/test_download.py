"""download.py against a hub in miniature on this machine that misbehaves on demand. No network, no leftovers."""
import io
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub import Hub
from hub import sha256 as sha
from tqdm import tqdm

import download as module
import files
from download import DownloadError, download, hub_download, hub_endpoint, hub_files

BODY = random.Random(1).randbytes(400_000)
OTHER = random.Random(2).randbytes(400_000)
ROOT = Path(module.__file__).resolve().parent
TOKEN = 'hf_secret0123456789'
SMALL = {'a/c.json': b'{}', 'a/d/e.bin': b'6', 'f.bin': b'789'}


@pytest.fixture(autouse=True)
def quiet_world(monkeypatch, tmp_path_factory):
    """No settings from outside, and no thread that outlives its test."""
    for name in ('HF_TOKEN', 'HF_ENDPOINT', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HTTP_PROXY', 'http_proxy',
                 'ALL_PROXY', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HF_HOME', str(tmp_path_factory.getbasetemp() / 'hf_home'))
    monkeypatch.setattr(module, 'BACKOFF', 0.001)
    monkeypatch.setattr(files, 'LOCK_POLL', 0.01)
    monkeypatch.setattr(tqdm, 'monitor_interval', 0)        # no thread of its own
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def naps(monkeypatch):
    """The waits that the libraries asked for, none of them waited."""
    module.hub_library()
    import huggingface_hub.file_download
    import urllib3.util.retry
    naps = []
    clock = SimpleNamespace(sleep=naps.append, time=time.time)
    for library in (module, huggingface_hub.file_download, huggingface_hub.utils._http, urllib3.util.retry):
        monkeypatch.setattr(library, 'time', clock)
    return naps


@pytest.fixture
def hub(quiet_world, monkeypatch):
    with Hub({'models/a/b': {'f.bin': BODY, 'sub/c.json': b'{}'}, 'models/some/model': SMALL,
              'datasets/some/data': SMALL}, page_size=1) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture(params=['hub', 'plain'])
def fetch(request, hub):
    """Fetches the hub's a/b/f.bin to `folder`, in either way; `.url` is where from, in messages."""
    def fetch(folder, sha256=None, size=400_000):
        sha256 = sha256 or sha(BODY)
        if request.param == 'hub':
            return hub_download('a/b', 'f.bin', folder, sha256=sha256, size=size)
        return download(fetch.url + '?signature=secret', folder / 'f.bin', sha256=sha256, size=size)

    fetch.way = request.param
    fetch.url = f'{hub.endpoint}/a/b/resolve/main/f.bin' if fetch.way == 'hub' else f'{hub.store}/models/a/b/f.bin'
    return fetch


@pytest.fixture
def on_the_hub(hub):
    """Fetches the same, with no other knowledge of size and SHA-256 than the hub's own."""
    return lambda folder: hub_download('a/b', 'f.bin', folder)


def run_python(code, *args, **options):
    """A process of its own that has imported everything from download.py."""
    command = [sys.executable, '-c', 'import sys; from download import *; ' + code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, **options)


def only(folder):
    return sorted(path.name for path in folder.iterdir())


def gets(hub, header=None):
    """The requests for bytes of f.bin, or one header of each."""
    found = [r for r in hub.requests if r.method == 'GET' and 'f.bin' in r.path]
    return [r.headers.get(header) for r in found] if header else found

# -----------------------------------------------------------------------------
# whole files

def test_a_file_arrives_whole_and_leaves_nothing_else_behind(fetch, tmp_path):
    path = fetch(tmp_path / 'new' / 'folder')
    assert path == tmp_path / 'new' / 'folder' / 'f.bin' and path.read_bytes() == BODY
    assert only(path.parent) == ['f.bin']


def test_small_files_of_the_hub_keep_their_folder_and_may_have_another_name(hub, tmp_path):
    assert hub_download('a/b', 'sub/c.json', tmp_path) == tmp_path / 'sub' / 'c.json'
    assert hub_download('a/b', 'sub/c.json', str(tmp_path), name='c').read_bytes() == b'{}'
    assert only(tmp_path) == ['c', 'sub'] and only(tmp_path / 'sub') == ['c.json']


def test_a_whole_file_on_disk_needs_no_network_and_a_wrong_one_is_replaced(fetch, hub, tmp_path):
    (tmp_path / 'f.bin').write_bytes(BODY)
    fetch(tmp_path, sha256=sha(BODY).upper())
    assert hub.requests == []
    (tmp_path / 'f.bin').write_bytes(OTHER)
    assert fetch(tmp_path).read_bytes() == BODY


def test_a_wrong_file_on_disk_stays_until_a_verified_one_is_on_the_disk(fetch, hub, tmp_path, monkeypatch):
    (tmp_path / 'f.bin').write_bytes(b'old')
    hub.fail('f.bin', times=2, body=OTHER)
    with pytest.raises(DownloadError):
        fetch(tmp_path)
    assert (tmp_path / 'f.bin').read_bytes() == b'old' and only(tmp_path) == ['f.bin']

    seen, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: (seen.append('fsync'), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (seen.append((a.read_bytes(), b.read_bytes())), replace(a, b)))
    fetch(tmp_path)
    assert seen == ['fsync', (BODY, b'old')]


@pytest.mark.skipif(not Path('/dev/fd').exists(), reason='nowhere to count them')
def test_no_file_stays_open(fetch, hub, tmp_path, naps):
    fetch(tmp_path / 'once')            # from then on the libraries keep what they keep
    before = len(os.listdir('/dev/fd'))
    hub.fail('f.bin', cut=100_000)
    fetch(tmp_path)
    hub.fail('f.bin', status=404)
    with pytest.raises(DownloadError):
        fetch(tmp_path / 'new')
    for _ in range(100):                # the server lets go of its ends a moment later
        if len(os.listdir('/dev/fd')) <= before:
            break
        time.sleep(0.01)
    assert len(os.listdir('/dev/fd')) <= before

# -----------------------------------------------------------------------------
# going on

def test_a_cut_connection_ends_well(fetch, hub, tmp_path, naps):
    hub.fail('f.bin', times=2, cut=150_000)
    assert fetch(tmp_path).read_bytes() == BODY
    if fetch.way == 'hub':              # gone on with, but for what was on its way to the disk
        assert gets(hub, 'Range') == [None, 'bytes=131072-', 'bytes=262144-'] and hub.sent < 1.2 * len(BODY)


@pytest.mark.parametrize('reset', [False, True])
def test_a_connection_that_is_cut_more_often_than_there_are_tries_gets_there(reset, on_the_hub, hub, tmp_path, naps):
    hub.repos['models/a/b']['f.bin'] = body = BODY * 4
    hub.fail('f.bin', times=10, cut=140_000, reset=reset)
    assert on_the_hub(tmp_path).read_bytes() == body and hub.sent < (1.7 if reset else 1.3) * len(body)


def test_tries_without_progress_are_bounded_and_what_is_there_is_kept(on_the_hub, hub, tmp_path, naps):
    hub.fail('f.bin', cut=100_000)
    hub.fail('f.bin', times=99, cut=0)
    with pytest.raises(DownloadError, match='no answer .RemoteProtocolError.*\n.*HF_ENDPOINT'):
        on_the_hub(tmp_path)
    assert len(gets(hub)) < 40 and only(tmp_path) == ['f.bin.part']
    hub.faults.clear()
    assert on_the_hub(tmp_path).read_bytes() == BODY and gets(hub, 'Range')[-1] == 'bytes=65536-'
    assert only(tmp_path) == ['f.bin']


def test_a_plain_address_that_is_always_cut_is_given_up(hub, tmp_path):
    hub.fail('f.bin', times=99, cut=100_000)
    with pytest.raises(DownloadError, match='no answer'):
        download(f'{hub.store}/models/a/b/f.bin', tmp_path / 'f.bin', sha256=sha(BODY), size=len(BODY))
    assert len(gets(hub)) == module.TRIES and not (tmp_path / 'f.bin').exists()


def test_a_silent_connection_times_out_and_the_download_goes_on(fetch, hub, tmp_path, naps, monkeypatch):
    from huggingface_hub import constants
    assert module.TIMEOUT <= 30 and constants.HF_HUB_DOWNLOAD_TIMEOUT <= 30 and constants.HF_HUB_ETAG_TIMEOUT <= 30
    monkeypatch.setattr(module, 'TIMEOUT', 0.2)
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.2)
    hub.fail('f.bin', hold=threading.Event(), at_half=True)
    assert fetch(tmp_path).read_bytes() == BODY
    assert len(gets(hub)) == 2


def test_a_silent_listing_times_out_and_is_asked_for_again(hub, naps, monkeypatch):
    monkeypatch.setattr(module, 'TIMEOUT', 0.2)
    hub.fail('tree', hold=threading.Event())
    assert len(hub_files('some/model')) == 3 and len(hub.requests) == 4


@pytest.mark.parametrize('part, ranges, misbehaves', [
    (BODY[:300_000], ['bytes=300000-'], {}),
    (BODY[:300_000], ['bytes=300000-'], {'ignore_range': True}),
    (BODY, [], {}), (BODY + b'more', [None], {}), (OTHER, [None], {}), (OTHER[:300_000], ['bytes=300000-', None], {})],
    ids=['rest', 'range ignored', 'whole', 'too long', 'whole of another', 'part of another'])
def test_what_an_earlier_run_has_left_is_gone_on_with_or_found_out(on_the_hub, hub, tmp_path, part, ranges, misbehaves):
    (tmp_path / 'f.bin.part').write_bytes(part)
    if misbehaves:
        hub.fail('f.bin', **misbehaves)
    assert on_the_hub(tmp_path).read_bytes() == BODY and only(tmp_path) == ['f.bin']
    assert gets(hub, 'Range') == ranges


def test_a_part_that_no_checksum_could_tell_from_another_file_s_starts_over(hub, tmp_path):
    (tmp_path / 'c.json.part').write_bytes(b'[')
    assert hub_download('some/model', 'a/c.json', tmp_path, name='c.json').read_bytes() == b'{}'


@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL')
def test_a_killed_download_is_continued_by_the_next(on_the_hub, hub, tmp_path):
    hub.fail('f.bin', hold=threading.Event(), at_half=True)         # half of it, and then nothing
    child = run_python('hub_download("a/b", "f.bin", sys.argv[1])', tmp_path, stderr=subprocess.DEVNULL)
    part = tmp_path / 'f.bin.part'
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size >= 0.4 * len(BODY)):
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert only(tmp_path) == ['f.bin.lock', 'f.bin.part']       # the lock's file is left, its lock is not
    kept, hub.sent = part.stat().st_size, 0
    assert on_the_hub(tmp_path).read_bytes() == BODY and only(tmp_path) == ['f.bin']
    assert gets(hub, 'Range') == [None, f'bytes={kept}-'] and kept >= 0.4 * len(BODY)
    assert hub.sent == len(BODY) - kept

# -----------------------------------------------------------------------------
# verifying

def test_a_download_that_was_corrupted_once_is_fetched_again_from_zero(fetch, hub, tmp_path):
    hub.fail('f.bin', body=BODY[:-1] + bytes([BODY[-1] ^ 1]))
    assert fetch(tmp_path).read_bytes() == BODY
    assert gets(hub, 'Range') == [None, None]


@pytest.mark.parametrize('wrong', [OTHER, OTHER[:-1], b'<html>please log in to this network</html>'])
def test_a_wrong_file_twice_is_an_error_that_names_both_and_keeps_nothing(fetch, hub, tmp_path, wrong):
    hub.fail('f.bin', times=2, body=wrong)
    with pytest.raises(DownloadError, match='twice(.|\n)*proxy') as error:
        fetch(tmp_path)
    both = (sha(wrong), sha(BODY)) if len(wrong) == len(BODY) else (f'{len(wrong):,} bytes', '400,000')
    assert all(words in str(error.value) for words in both) and len(gets(hub)) == 2 and only(tmp_path) == []


def test_size_and_checksum_of_the_hub_are_held_where_the_caller_knows_none(on_the_hub, hub, tmp_path):
    for body, said in ((OTHER, f'{sha(OTHER)} instead of {sha(BODY)}'), (OTHER[:-1], '399,999 bytes instead of 400')):
        hub.fail('f.bin', times=2, body=body)
        with pytest.raises(DownloadError, match=said):
            on_the_hub(tmp_path)


def test_another_size_on_the_hub_is_seen_before_the_body_is_fetched(hub, tmp_path):
    (tmp_path / 'f.bin.part').write_bytes(BODY[:300_000])
    with pytest.raises(DownloadError, match='offers 400,000 bytes, not 400,001'):
        hub_download('a/b', 'f.bin', tmp_path, size=len(BODY) + 1)
    assert gets(hub) == [] and only(tmp_path) == ['f.bin.part']     # and costs nothing of what is there


def test_a_login_page_is_no_hub(hub, tmp_path):
    hub.page = b'<html>please log in to this network</html>'
    for ask in (lambda: hub_files('a/b', keep=tmp_path / 'list'), lambda: hub_download('a/b', 'f.bin', tmp_path)):
        with pytest.raises(DownloadError, match='HF_ENDPOINT(.|\n)*login page') as error:
            ask()
        assert len(str(error.value).splitlines()) <= 2 and only(tmp_path) == []
    with subprocess.Popen([sys.executable, ROOT / 'prepare_data.py', '--dataset=tinystories'], cwd=tmp_path,
                          stderr=subprocess.PIPE, text=True) as script:
        said = script.communicate(timeout=60)[1]
    assert script.returncode == 2 and len(said.splitlines()) <= 2
    assert re.search('HF_ENDPOINT(.|\n)*proxy or a login page', said)
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == []

# -----------------------------------------------------------------------------
# waiting, and not waiting

@pytest.mark.parametrize('method', ['GET', 'HEAD'])
@pytest.mark.parametrize('status', [429, 503])
def test_a_busy_server_is_waited_for(method, status, fetch, hub, tmp_path, naps):
    hub.fail('f.bin', times=3, status=status, method='GET' if fetch.way == 'plain' else method)
    assert fetch(tmp_path).read_bytes() == BODY
    assert len(naps) >= 2 and sum(naps) < 60        # one by one, they grow


@pytest.mark.parametrize('said, low, high', [('7', 7, 8), ('0', 0, 1), ('86400', 300, 301)])
def test_retry_after_is_obeyed_within_bounds(said, low, high, fetch, hub, tmp_path, naps):
    hub.fail('f.bin', status=429, headers={'Retry-After': said})
    fetch(tmp_path)
    assert low <= sum(naps) <= high


def test_the_hub_s_own_words_for_how_long_are_bounded_too(hub, naps):
    hub.fail('tree', status=429, headers={'RateLimit': '"api";r=0;t=86400', 'Retry-After': '86400'})
    hub.fail('tree', status=503, headers={'Retry-After': '86400'})
    assert len(hub_files('some/model')) == 3 and naps == [301, 301]


@pytest.mark.parametrize('method', ['GET', 'HEAD'])
def test_tries_are_bounded(method, fetch, hub, tmp_path, naps):
    hub.fail('f.bin', times=99, status=503, method='GET' if fetch.way == 'plain' else method)
    with pytest.raises(DownloadError, match='503|no answer'):
        fetch(tmp_path)
    assert len(hub.requests) <= 40 and sum(naps) < 120


def test_no_server_is_tried_again_and_then_told(fetch, hub, tmp_path, naps, monkeypatch):
    hub.__exit__()
    with pytest.raises(DownloadError, match='no answer (.|\n)*network') as error:
        fetch(tmp_path)
    assert ('HF_ENDPOINT' in str(error.value)) == (fetch.way == 'hub')          # a mirror of the hub has nothing else
    assert str(error.value).startswith(fetch.url + ':') and 1 <= len(naps) <= 10 and sum(naps) <= 60
    with pytest.raises(DownloadError, match='no answer'):
        hub_files('a/b')


@pytest.mark.parametrize('status, said', [(401, 'HF_TOKEN(.|\n)*licence'), (403, 'HF_TOKEN(.|\n)*licence'),
                                          (404, 'not found.*revision.*mirror')])
def test_a_refusal_is_final_and_says_what_to_do(status, said, fetch, hub, tmp_path, naps):
    hub.fail('f.bin', status=status)
    with pytest.raises(DownloadError, match=said if fetch.way == 'hub' else f'HTTP {status}. Check the addr') as error:
        fetch(tmp_path)
    assert fetch.url in str(error.value) and len(str(error.value).splitlines()) <= 2
    assert len(hub.requests) == 1 and naps == [] and only(tmp_path) == []
    hub.fail('tree', status=status)
    with pytest.raises(DownloadError, match=said):
        hub_files('a/b')
    assert len(hub.requests) == 2 and naps == []


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/f', 'no address', 'http://', 'http://[::1/f', 'http://x:99999/f'])
def test_what_is_no_address_is_told_in_words(url, tmp_path, naps):
    with pytest.raises(DownloadError, match='address|network'):
        download(url, tmp_path / 'f', sha256=sha(BODY), size=len(BODY))
    assert sum(naps) < 60

# -----------------------------------------------------------------------------
# the hub: its address, its lists, its token

def test_hub_addresses(monkeypatch):
    assert hub_endpoint() == 'https://huggingface.co'
    monkeypatch.setenv('HF_ENDPOINT', 'https://mirror.example/hf/')
    assert hub_endpoint() == 'https://mirror.example/hf'
    monkeypatch.setenv('HF_ENDPOINT', 'mirror.example')
    for ask in (hub_endpoint, lambda: hub_files('a/b'), lambda: hub_download('a/b', 'f.bin', '.')):
        with pytest.raises(DownloadError, match='HF_ENDPOINT'):
            ask()


@pytest.mark.parametrize('name', ['../f', 'a/../../f', '/etc/f', 'a\\..\\f'])
def test_hub_download_stays_in_its_folder(name, hub, tmp_path):
    with pytest.raises(DownloadError, match='inside'):
        hub_download('a/b', name, tmp_path / 'in')
    assert hub.requests == [] and only(tmp_path) == []


LISTED = [{'path': 'a/c.json', 'size': 2, 'sha256': None}, {'path': 'a/d/e.bin', 'size': 1, 'sha256': sha(b'6')},
          {'path': 'f.bin', 'size': 3, 'sha256': sha(b'789')}]


@pytest.mark.parametrize('repo, repo_type', [('some/model', 'model'), ('some/data', 'dataset')])
def test_all_files_are_listed_however_many_pages_it_takes(hub, tmp_path, repo, repo_type):
    kept = tmp_path / 'new' / 'listing'
    assert hub_files(repo, repo_type=repo_type, keep=kept) == hub_files(repo, repo_type=repo_type) == LISTED
    assert hub_files(repo, 'a', repo_type=repo_type) == LISTED[:2]
    assert len(hub.requests) == 3 + 3 + 2 and only(kept.parent) == ['listing']


def test_a_kept_list_of_files_serves_offline_and_a_damaged_one_does_not(hub, tmp_path, monkeypatch):
    kept = tmp_path / 'listing'
    hub_files('some/model', keep=kept)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    hub.requests.clear()
    assert hub_files('some/model', keep=kept) == LISTED
    whole = kept.read_text(encoding='utf-8')
    for damaged in (whole[:-5], '', 'null', '{}', '[]', '[1]', whole.replace('path', 'name'), whole.replace('3', '""')):
        kept.write_text(damaged, encoding='utf-8')
        with pytest.raises(DownloadError, match='HF_HUB_OFFLINE=1'):
            hub_files('some/model', keep=kept)
    with pytest.raises(DownloadError, match='HF_HUB_OFFLINE=1'):
        hub_files('some/model')
    assert hub.requests == []


def test_a_list_that_fails_on_the_way_leaves_the_kept_one_as_it_was(hub, tmp_path):
    hub_files('a/b', keep=tmp_path / 'listing')
    kept = (tmp_path / 'listing').read_bytes()
    hub.fail('cursor=2', status=404)
    with pytest.raises(DownloadError):
        hub_files('some/model', keep=tmp_path / 'listing')
    assert only(tmp_path) == ['listing'] and (tmp_path / 'listing').read_bytes() == kept
    with pytest.raises(DownloadError, match='listing/x: cannot be written'):
        hub_files('some/model', keep=tmp_path / 'listing' / 'x')


def test_the_token_goes_to_the_hub_and_not_along_a_redirect(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', f' {TOKEN}\n')
    hub_download('a/b', 'f.bin', tmp_path)
    hub_download('a/b', 'sub/c.json', tmp_path)
    hub_files('a/b')
    download(f'{hub.endpoint}/a/b/resolve/main/sub/c.json', tmp_path / 'g', sha256=sha(b'{}'), size=2)
    sent = [(r.host, r.headers.get('Authorization')) for r in hub.requests]
    bearer = ('hub', f'Bearer {TOKEN}')
    assert sent == [bearer, ('store', None), bearer, bearer, bearer, bearer, ('hub', None)]


@pytest.mark.parametrize('to', ['http://127.0.0.1:{other}\\@127.0.0.1:{home}/models/a/b/f.bin',
                                'http://127.0.0.1:{home}@127.0.0.1:{other}/models/a/b/f.bin',
                                'http://localhost:{home}/models/a/b/f.bin', '//localhost:{other}/models/a/b/f.bin'])
def test_an_address_that_parsers_read_differently_does_not_get_the_token(hub, tmp_path, monkeypatch, to, naps):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    home, other = (hub.servers[host][0].server_port for host in ('hub', 'store'))
    hub.fail('resolve', headers={'Location': to.format(home=home, other=other)})
    try:
        assert hub_download('a/b', 'f.bin', tmp_path).read_bytes() == BODY
    except DownloadError:
        pass                                            # well, if it is not asked at all
    assert all(TOKEN not in str(r.headers) for r in hub.requests[1:]) and TOKEN in str(hub.requests[0].headers)


def test_the_next_page_of_a_list_gets_no_token_elsewhere(hub, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    hub.fail('tree', headers={'Link': f'<{hub.store}/x>; rel="next"'})
    with pytest.raises(DownloadError):
        hub_files('some/model')
    assert [r.host for r in hub.requests] == ['hub', 'store'] and TOKEN not in str(hub.requests[1].headers)


def test_a_stored_token_is_not_for_mirrors(hub, tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: TOKEN)
    hub_download('a/b', 'f.bin', tmp_path)
    hub_files('a/b')
    assert TOKEN not in str(hub.requests)
    monkeypatch.delenv('HF_ENDPOINT')
    assert module.hub_token() == TOKEN


def test_a_token_with_a_stray_character_is_not_repeated(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN + '\nX: y')
    for ask in (lambda: hub_download('a/b', 'f.bin', tmp_path), lambda: hub_files('a/b')):
        with pytest.raises(DownloadError, match='HF_TOKEN') as error:
            ask()
        assert TOKEN not in str(error.value) and hub.requests == []


@pytest.mark.parametrize('fault', [
    {'status': 401}, {'status': 404}, {'status': 410}, {'status': 503}, {'cut': 0}, {'body': OTHER},
    {'status': 302, 'headers': {'Location': 'ftp://me:secret@x/?signature=secret'}},
    {'status': 302, 'headers': {'Location': 'http://127.0.0.1:9/?signature=secret'}}])
def test_no_message_tells_a_secret(fault, fetch, hub, tmp_path, monkeypatch, naps):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setenv('HF_ENDPOINT', hub.endpoint.replace('//', '//me:secret@'))
    said = io.StringIO()
    for handler in module.logging.getLogger('huggingface_hub').handlers:
        monkeypatch.setattr(handler, 'stream', said)
    if 'Location' in fault.get('headers', {}) and fetch.way == 'hub':       # with all that a hub says besides
        fault = {'headers': fault['headers']}
    hub.fail('f.bin', times=99, **fault)
    with pytest.raises(DownloadError) as error:
        fetch(tmp_path)
    said = said.getvalue() + str(error.value)
    assert 'secret' not in said and 'signature' not in said and TOKEN not in said
    assert len(str(error.value).splitlines()) <= 2 and (error.value.__suppress_context__ or not error.value.__context__)


def test_a_long_wait_is_announced_without_secrets(hub, tmp_path, naps, monkeypatch):
    said = io.StringIO()
    for handler in module.logging.getLogger('huggingface_hub').handlers:
        monkeypatch.setattr(handler, 'stream', said)
    hub.fail('signature', status=429, headers={'Retry-After': '60'})
    hub_download('a/b', 'f.bin', tmp_path)
    assert f'{hub.store}/models/a/b/f.bin\n' in said.getvalue() and 'Waiting 61.0s' in said.getvalue()


def test_redirects_are_bounded(fetch, hub, tmp_path, naps):
    hub.fail('f.bin', times=99, status=302, headers={'Location': fetch.url})
    with pytest.raises(DownloadError, match='TooManyRedirects|302'):
        fetch(tmp_path)
    assert len(hub.requests) < 40 and naps == []

# -----------------------------------------------------------------------------
# Xet

@pytest.fixture
def xet(hub, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    monkeypatch.setattr(module, 'HUB', hub.endpoint)
    hub.xet = ('http://127.0.0.1:9', {})        # nobody listens there
    return constants


def test_where_no_xet_can_be_reached_http_remains_and_soon(xet, on_the_hub, hub, tmp_path, capsys):
    began = time.monotonic()
    assert on_the_hub(tmp_path).read_bytes() == BODY and only(tmp_path) == ['f.bin']
    assert time.monotonic() - began < 5 and 'f.bin: no way to Xet' in capsys.readouterr().err
    hub.requests.clear()
    assert on_the_hub(tmp_path / 'new').read_bytes() == BODY
    assert [r.method for r in hub.requests] == ['HEAD', 'GET']      # and it is not tried again


@pytest.mark.parametrize('mirror', [False, True])
def test_xet_can_be_disabled_and_is_not_asked_behind_a_mirror(mirror, xet, on_the_hub, hub, tmp_path, capsys,
                                                              monkeypatch):
    monkeypatch.setattr(*(module, 'HUB', 'https://huggingface.co') if mirror else (xet, 'HF_HUB_DISABLE_XET', True))
    if not mirror:
        (tmp_path / 'f.bin.part.xet' / 'left by a killed process').mkdir(parents=True)
    assert on_the_hub(tmp_path).read_bytes() == BODY and only(tmp_path) == ['f.bin']
    assert [r.method for r in hub.requests] == ['HEAD', 'GET'] and 'Xet' not in capsys.readouterr().err


def test_a_file_comes_by_xet_where_there_is_one_and_is_verified(xet, on_the_hub, hub, tmp_path):
    hf_xet = pytest.importorskip('hf_xet')
    service = f'local://{tmp_path / "xet"}'     # the library's own service in a folder
    (tmp_path / 'xet').mkdir()
    hashes = []
    for data in (BODY, OTHER):
        with hf_xet.XetSession().new_upload_commit(endpoint=service) as commit:
            handle = commit.start_upload_bytes(data, sha256=hf_xet.COMPUTE_SHA256)
        hashes.append(handle.result().xet_info.hash)
    hub.xet = (service, {'f.bin': hashes[0]})
    assert on_the_hub(tmp_path / 'new').read_bytes() == BODY and only(tmp_path / 'new') == ['f.bin']
    assert gets(hub) == [] and hub.sent == 0
    hub.xet = (service, {'f.bin': hashes[1]})
    with pytest.raises(DownloadError, match=f'SHA-256 {sha(OTHER)}'):
        on_the_hub(tmp_path / 'wrong')

# -----------------------------------------------------------------------------
# offline

@pytest.mark.parametrize('name', ['HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'])
@pytest.mark.parametrize('value', ['1', 'true', 'YES', 'on'])
def test_offline_uses_what_is_there_or_says_what_is_missing(name, value, fetch, hub, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    (tmp_path / 'f.bin').write_bytes(BODY)
    assert fetch(tmp_path) == tmp_path / 'f.bin'
    with pytest.raises(DownloadError, match=f'is missing.*{name}(.|\n)*unset') as error:
        fetch(tmp_path / 'sub')
    assert str(tmp_path / 'sub' / 'f.bin') in str(error.value) and fetch.url.split('/a/b')[0] in str(error.value)
    with pytest.raises(DownloadError, match='is not the file it should be'):
        fetch(tmp_path, sha256=sha(OTHER))
    assert hub.requests == [] and only(tmp_path) == ['f.bin'] and (tmp_path / 'f.bin').read_bytes() == BODY


def test_offline_can_be_denied(monkeypatch):
    for value in ('', '0', 'false', 'no', 'off'):
        monkeypatch.setenv('HF_HUB_OFFLINE', value)
        assert module.offline() is None

# -----------------------------------------------------------------------------
# the disk, and sharing it

def test_a_folder_that_cannot_be_written_is_told_in_words(fetch, tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(DownloadError, match='cannot be written'):
        fetch(tmp_path / 'file')
    (tmp_path / 'f.bin').mkdir()
    with pytest.raises(DownloadError, match='is a folder'):
        fetch(tmp_path)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is always full')
def test_a_full_disk_is_told_in_words(fetch, hub, tmp_path, naps):
    (tmp_path / 'f.bin.part').symlink_to('/dev/full')
    with pytest.raises(DownloadError, match='No space left.*Make room'):
        fetch(tmp_path)
    assert len(gets(hub)) == 1 and not (tmp_path / 'f.bin').exists()


@pytest.mark.parametrize('fails', [False, True])
def test_eight_processes_share_one_download(hub, tmp_path, fails):
    gate = threading.Event()
    hub.fail('f.bin', hold=gate, at_half=True, **({'status': 404} if fails else {}))
    code = 'print(hub_download("a/b", "f.bin", sys.argv[1]).stat().st_size)'
    with open(tmp_path / 'said', 'a', encoding='utf-8') as said:
        children = [run_python(code, tmp_path / 'new', stdout=said, stderr=said) for _ in range(8)]
    waiting = 'f.bin: waiting for another process that is fetching it\n'
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and waiting not in (said := (tmp_path / 'said').read_text(encoding='utf-8')):
        time.sleep(0.01)
    gate.set()
    assert waiting in said
    assert sorted(child.wait(timeout=30) for child in children) == [0] * (8 - fails) + [2] * fails
    assert (tmp_path / 'said').read_text(encoding='utf-8').count('400000\n') == 8 - fails
    assert hub.sent == len(BODY) + fails * len(b'no') and only(tmp_path / 'new') == ['f.bin']   # a second tries itself
    assert all('f.bin' in request.path for request in hub.requests)         # the library asks for nothing of its own

# -----------------------------------------------------------------------------
# showing

def test_a_transfer_shows_a_bar_on_a_terminal_alone(on_the_hub, hub, tmp_path, monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, 'stderr', terminal)
    on_the_hub(tmp_path / 'log')
    assert terminal.getvalue() == ''
    terminal.isatty = lambda: True
    (tmp_path / 'f.bin.part').write_bytes(BODY[:100_000])
    on_the_hub(tmp_path)
    assert 'f.bin' in terminal.getvalue() and '400k/400k' in terminal.getvalue().splitlines()[-1]
    assert capsys.readouterr().out == ''


def test_who_downloads_nothing_does_not_pay_for_it(tmp_path):
    (tmp_path / 'f.bin').write_bytes(BODY)
    code = ('hub_download("a/b", "f.bin", sys.argv[1]); '
            'print([name for name in ("requests", "huggingface_hub", "urllib3", "tqdm") if name in sys.modules])')
    with run_python(code, tmp_path, stdout=subprocess.PIPE) as child:
        assert child.communicate(timeout=20)[0] == '[]\n'
