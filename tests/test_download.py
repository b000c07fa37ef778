"""download.py against a small HTTP server on this machine that misbehaves on demand. No network, no leftovers."""
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import deque
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from hub import Hub

import download as module
import files
from download import DownloadError, download, hub_download, hub_endpoint, hub_files, hub_url, request

BODY = random.Random(1).randbytes(400_000)
OTHER = random.Random(2).randbytes(400_000)
ROOT = Path(module.__file__).resolve().parent
TOKEN = 'hf_secret0123456789'


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Site:
    """A server of one file. `plan` holds, for each request to come, how it is to misbehave; after that it behaves."""

    def __init__(self):
        self.body, self.etag, self.default = BODY, '"v1"', {}
        self.plan = deque()
        self.log = []         # (path, request headers, status), one per request
        self.sent = 0         # bytes of bodies written
        self.gate = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self):
                try:
                    answer(site, self)
                except ConnectionError:
                    pass  # the client was killed, or has heard enough

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = False  # so that server_close() waits for them

        self.server = Server(('127.0.0.1', 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f'http://127.0.0.1:{self.port}'
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.01})
        self.thread.start()

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def asked(self, header):
        return [headers.get(header) for _, headers, _ in self.log]


def answer(site, handler):
    step = site.plan.popleft() if site.plan else site.default
    body, etag = step.get('body', site.body), step.get('etag', site.etag)
    wants, condition = handler.headers.get('Range'), handler.headers.get('If-Range')
    status, start, headers = step.get('status', 200), 0, {}
    if status != 200:
        body = b'no'
    elif wants and not step.get('ignore_range') and (condition in (None, etag) or step.get('ignore_if_range')):
        start = int(wants.removeprefix('bytes=').removesuffix('-'))
        status = 206 if start < len(body) else 416
        end = f'{start}-{len(body) - 1}' if status == 206 else '*'
        headers['Content-Range'] = f'bytes {end}/{len(body)}'
        body = body[start:]
    if etag:
        headers['ETag'] = etag
    if step.get('chunked'):
        headers['Transfer-Encoding'] = 'chunked'
    else:
        headers['Content-Length'] = len(body)
    headers |= step.get('headers', {})
    site.log.append((handler.path, dict(handler.headers), status))
    handler.send_response(status)
    handler.send_header('Connection', 'close')
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name, str(value))
    handler.end_headers()
    for i in range(0, len(body[:step.get('cut')]), 16384):
        piece = body[:step.get('cut')][i:i + 16384]
        if step.get('gate') and i >= len(body) // 2:
            site.gate.wait(20)
        time.sleep(step.get('pace', 0))
        site.sent += len(piece)  # before the client can have it
        handler.wfile.write(b'%x\r\n%s\r\n' % (len(piece), piece) if step.get('chunked') else piece)
    if step.get('chunked') and 'cut' not in step:
        handler.wfile.write(b'0\r\n\r\n')


@pytest.fixture(autouse=True)
def quiet_world(monkeypatch):
    """No settings from outside, short waits, and no thread that outlives its test."""
    for name in ('HF_TOKEN', 'HF_ENDPOINT', 'HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE', 'HTTP_PROXY', 'http_proxy',
                 'ALL_PROXY', 'all_proxy', 'NETRC'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, 'BACKOFF', 0.001)
    monkeypatch.setattr(files, 'LOCK_POLL', 0.01)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def site(quiet_world):
    site = Site()
    yield site
    site.close()


@pytest.fixture
def elsewhere(quiet_world):
    site = Site()
    yield site
    site.close()


@pytest.fixture
def naps(monkeypatch):
    """The waits that were asked for, none of them waited."""
    naps = []
    monkeypatch.setattr(module, 'sleep', naps.append)
    return naps


def leave_partial(path, data, etag='"v1"'):
    """What a download that was interrupted leaves behind."""
    Path(f'{path}.part').write_bytes(data)
    Path(f'{path}.part.json').write_text(json.dumps({'etag': etag}), encoding='utf-8')


def run_python(code, *args, **options):
    """A process of its own that has imported everything from download.py."""
    command = [sys.executable, '-c', 'import sys; from download import *; ' + code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True, **options)


def only(folder):
    return sorted(path.name for path in folder.iterdir())

# -----------------------------------------------------------------------------
# whole files

def test_a_file_arrives_whole_and_leaves_nothing_else_behind(site, tmp_path):
    path = download(site.url + '/f.bin', str(tmp_path / 'new' / 'folder' / 'f.bin'))
    assert isinstance(path, Path) and path.read_bytes() == BODY
    assert only(path.parent) == ['f.bin']
    assert site.asked('Accept-Encoding') == ['identity']


@pytest.mark.skipif(not Path('/dev/fd').exists(), reason='nowhere to count them')
def test_no_file_or_connection_stays_open(site, tmp_path):
    before = len(os.listdir('/dev/fd'))
    site.plan.extend([{'cut': 100_000}, {'status': 503}, {'status': 302, 'headers': {'Location': '/there'}}])
    download(site.url, tmp_path / 'f')
    site.default = {'status': 404}
    with pytest.raises(DownloadError):
        download(site.url, tmp_path / 'g')
    for _ in range(100):  # the server lets go of its ends a moment later
        if len(os.listdir('/dev/fd')) <= before:
            break
        time.sleep(0.01)
    assert len(os.listdir('/dev/fd')) <= before


def test_an_empty_file_is_a_file(site, tmp_path):
    site.body = b''
    assert download(site.url, tmp_path / 'f', size=0).read_bytes() == b''


@pytest.mark.parametrize('given', [{}, {'size': len(BODY)}, {'sha256': sha(BODY).upper()}])
def test_a_whole_file_on_disk_needs_no_network(given, site, tmp_path):
    (tmp_path / 'f').write_bytes(BODY)
    download(site.url, tmp_path / 'f', **given)
    assert site.log == []


def test_a_wrong_file_on_disk_is_replaced_by_a_verified_one(site, tmp_path):
    (tmp_path / 'f').write_bytes(OTHER)
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)).read_bytes() == BODY


def test_a_wrong_file_on_disk_stays_while_there_is_no_better_one(site, tmp_path, monkeypatch):
    (tmp_path / 'f').write_bytes(b'old')
    site.default = {'body': OTHER}
    with pytest.raises(DownloadError):
        download(site.url, tmp_path / 'f', sha256=sha(BODY))
    assert (tmp_path / 'f').read_bytes() == b'old'

    # and at the moment of the exchange the new one is whole
    seen, replace = [], os.replace
    monkeypatch.setattr(os, 'replace',
                        lambda a, b: (seen.append((Path(a).read_bytes(), b.read_bytes())), replace(a, b)))
    site.default = {}
    download(site.url, tmp_path / 'f', sha256=sha(BODY))
    assert seen == [(BODY, b'old')]


def test_bytes_reach_the_disk_before_the_name(site, tmp_path, monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        do = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, do=do, name=name: (calls.append(name), do(*a)))
    download(site.url, tmp_path / 'f')
    assert calls == ['fsync', 'replace']

# -----------------------------------------------------------------------------
# going on

def test_a_partial_file_is_continued(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:300_000])
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert site.sent == 100_000 and only(tmp_path) == ['f']
    assert site.asked('Range') == ['bytes=300000-'] and site.asked('If-Range') == ['"v1"']


def test_a_cut_connection_is_continued_however_often_it_is_cut(site, tmp_path):
    site.plan.extend([{'cut': 30_000}] * (module.TRIES + 3))  # each of them brings something: none counts as failed
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert len(site.log) == module.TRIES + 4 and site.sent == len(BODY)


def test_tries_without_progress_are_bounded_and_what_is_there_is_kept(site, tmp_path):
    site.plan.append({'cut': 100_000})
    site.default = {'cut': 0}
    with pytest.raises(DownloadError, match='connection was cut.*without progress'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == module.TRIES + 1
    assert (tmp_path / 'f.part').read_bytes() == BODY[:100_000] and not (tmp_path / 'f').exists()
    site.default = {}
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY and site.sent == len(BODY)


def test_a_server_that_always_starts_over_and_is_always_cut_does_not_hold_us_for_ever(site, tmp_path):
    site.default = {'cut': 100_000, 'ignore_range': True}
    with pytest.raises(DownloadError, match='without progress'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == module.TRIES + 1


def test_a_silent_connection_times_out_and_is_continued(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'TIMEOUT', (1, 0.2))
    site.plan.append({'gate': True})  # stops halfway, and nobody opens the gate
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert len(site.log) == 2 and site.sent < 1.3 * len(BODY)


def test_patience_has_limits_by_default():
    connect, read = module.TIMEOUT
    assert 0 < connect <= 10 and 0 < read <= 30


@pytest.mark.parametrize('changed', [{'etag': '"v2"'}, {'etag': '"v2"', 'ignore_if_range': True}])
def test_a_file_that_changed_meanwhile_starts_over(changed, site, tmp_path):
    site.default = {'body': OTHER, **changed}
    leave_partial(tmp_path / 'f', BODY[:300_000])
    assert download(site.url, tmp_path / 'f').read_bytes() == OTHER


def test_a_file_that_changes_during_the_download_starts_over(site, tmp_path):
    site.plan.append({'cut': 250_000})
    site.default = {'body': OTHER, 'etag': '"v2"'}
    assert download(site.url, tmp_path / 'f').read_bytes() == OTHER
    assert site.asked('If-Range') == [None, '"v1"']


def test_the_label_of_a_partial_file_is_that_of_its_bytes(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:300_000])
    site.plan.append({'body': OTHER, 'etag': '"v2"', 'cut': 100_000})
    site.default = {'body': OTHER, 'etag': '"v2"'}
    assert download(site.url, tmp_path / 'f').read_bytes() == OTHER
    assert site.asked('If-Range') == ['"v1"', '"v2"'] and site.sent == len(OTHER)


@pytest.mark.parametrize('etag', [None, 'W/"v1"'])
def test_without_a_strong_etag_only_a_checksum_allows_to_go_on(etag, site, tmp_path):
    site.etag = etag
    site.plan.append({'cut': 200_000})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert site.asked('Range') == [None, None]

    site.log.clear()
    site.plan.append({'cut': 200_000})
    assert download(site.url, tmp_path / 'g', sha256=sha(BODY)).read_bytes() == BODY
    assert site.asked('Range') == [None, 'bytes=200000-'] and site.asked('If-Range') == [None, None]


def test_a_partial_file_without_a_readable_label_starts_over(site, tmp_path):
    (tmp_path / 'f.part').write_bytes(OTHER[:300_000])
    (tmp_path / 'f.part.json').write_text('{"et', encoding='utf-8')
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY


def test_a_server_that_ignores_ranges_starts_over(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:300_000])
    site.default = {'ignore_range': True}
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert len(site.log) == 1


def test_a_range_that_starts_elsewhere_is_refused(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:300_000])
    site.plan.append({'headers': {'Content-Range': f'bytes 299000-399999/{len(BODY)}'}})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert site.asked('Range') == ['bytes=300000-', None]


def test_ranges_that_never_fit_end_in_words(site, tmp_path):
    site.default = {'status': 206}
    with pytest.raises(DownloadError, match='another piece'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == module.TRIES


def test_a_partial_file_that_was_whole_already_is_taken(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY)
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)).read_bytes() == BODY
    assert [status for *_, status in site.log] == [416]


@pytest.mark.parametrize('said', [f'bytes */{len(BODY)}', None, 'nonsense'])
def test_a_partial_file_that_is_too_long_starts_over(said, site, tmp_path):
    leave_partial(tmp_path / 'f', BODY + b'more')
    site.plan.append({'headers': {'Content-Range': said}})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY


def test_a_whole_partial_of_an_older_version_starts_over(site, tmp_path):
    leave_partial(tmp_path / 'f', OTHER)
    site.default = {'etag': '"v2"', 'ignore_if_range': True}  # same length: only the ETag of the 416 tells
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY


def test_a_416_to_no_range_ends_in_words(site, tmp_path):
    site.default = {'status': 416}
    with pytest.raises(DownloadError, match='times in a row'):
        download(site.url, tmp_path / 'f', size=0)


def test_chunked_bodies_are_taken_whole_and_continued_when_cut(site, tmp_path):
    site.plan.append({'chunked': True, 'cut': 200_000})
    site.default = {'chunked': True}
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert site.asked('Range')[0] is None and site.asked('Range')[1].startswith('bytes=')


@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL')
def test_a_killed_download_is_continued_by_the_next(site, tmp_path):
    site.plan.append({'pace': 0.02, 'gate': True})  # half of it, and then nothing until the gate opens
    child = run_python('download(sys.argv[1], sys.argv[2])', site.url, tmp_path / 'f', stderr=subprocess.DEVNULL)
    part = tmp_path / 'f.part'
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size >= 0.4 * len(BODY)):
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert only(tmp_path) == ['f.lock', 'f.part', 'f.part.json']  # the lock's file is left, its lock is not
    kept = part.stat().st_size
    site.gate.set()
    time.sleep(0.1)

    began = time.monotonic()
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert time.monotonic() - began < 2
    assert site.asked('Range') == [None, f'bytes={kept}-'] and kept >= 0.4 * len(BODY)
    assert only(tmp_path) == ['f'] and site.sent < 1.3 * len(BODY)

# -----------------------------------------------------------------------------
# verifying

def test_a_download_that_was_corrupted_once_is_fetched_again_from_zero(site, tmp_path):
    site.plan.append({'body': BODY[:-1] + bytes([BODY[-1] ^ 1])})
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)).read_bytes() == BODY
    assert site.asked('Range') == [None, None]


def test_a_partial_file_gone_bad_is_found_out_by_the_checksum(site, tmp_path):
    leave_partial(tmp_path / 'f', b'x' * 300_000)
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)).read_bytes() == BODY
    assert site.asked('Range') == ['bytes=300000-', None]


def test_a_wrong_checksum_twice_is_an_error_that_names_both(site, tmp_path):
    site.default = {'body': OTHER}
    with pytest.raises(DownloadError) as error:
        download(site.url + '/f', tmp_path / 'f', sha256=sha(BODY))
    assert sha(BODY) in str(error.value) and sha(OTHER) in str(error.value) and site.url + '/f' in str(error.value)
    assert len(site.log) == 2 and not (tmp_path / 'f').exists() and not (tmp_path / 'f.part').exists()


def test_a_wrong_size_is_seen_before_the_body_is_fetched(site, tmp_path):
    with pytest.raises(DownloadError, match='offers 400,000 bytes, not 400,001'):
        download(site.url, tmp_path / 'f', size=len(BODY) + 1)
    assert len(site.log) == 2 and not (tmp_path / 'f').exists() and not (tmp_path / 'f.part').exists()


def test_a_page_in_place_of_the_file_costs_nothing_of_what_is_there(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:300_000])
    site.default = {'body': b'<html>please log in to this network</html>', 'etag': None}
    with pytest.raises(DownloadError, match='offers 42 bytes'):
        download(site.url, tmp_path / 'f', size=len(BODY))
    site.default = {}
    assert download(site.url, tmp_path / 'f', size=len(BODY)).read_bytes() == BODY
    assert site.asked('Range') == ['bytes=300000-'] * 3


def test_a_wrong_size_is_seen_when_the_server_names_none(site, tmp_path):
    site.default = {'chunked': True}
    with pytest.raises(DownloadError, match='400,000 bytes instead of 399,999'):
        download(site.url, tmp_path / 'f', size=len(BODY) - 1)
    assert only(tmp_path) in ([], ['f.part.json'])


def test_a_server_that_promises_more_than_it_sends_is_asked_again(site, tmp_path):
    site.plan.append({'body': BODY[:200_000], 'headers': {'Content-Length': len(BODY)}})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY


def test_a_server_that_sends_less_than_there_is_is_found_out_by_the_checksum(site, tmp_path):
    site.plan.append({'headers': {'Content-Length': 100_000}})
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)).read_bytes() == BODY


def test_a_short_range_is_continued(site, tmp_path):
    leave_partial(tmp_path / 'f', BODY[:100_000])
    site.plan.append({'cut': 50_000, 'headers': {'Content-Length': 50_000,
                                                 'Content-Range': f'bytes 100000-149999/{len(BODY)}'}})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert site.asked('Range') == ['bytes=100000-', 'bytes=150000-']


def test_the_checksum_that_the_hub_publishes_is_held(site, elsewhere, tmp_path):
    site.default = {'status': 302, 'headers': {'Location': elsewhere.url + '/blob', 'X-Linked-ETag': f'"{sha(BODY)}"'}}
    elsewhere.plan.append({'body': OTHER})
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    elsewhere.default = {'body': OTHER}
    with pytest.raises(DownloadError, match='SHA-256'):
        download(site.url, tmp_path / 'g')


def test_the_size_that_the_hub_publishes_is_held(site, elsewhere, tmp_path):
    site.default = {'status': 302, 'headers': {'Location': elsewhere.url + '/blob', 'X-Linked-Size': len(BODY)}}
    elsewhere.default = {'body': OTHER[:-1]}
    with pytest.raises(DownloadError, match='399,999 bytes, not 400,000'):
        download(site.url, tmp_path / 'f')


def test_the_etag_of_a_small_hub_file_is_no_sha256(site, tmp_path):
    site.default = {'headers': {'X-Linked-ETag': f'"{sha(OTHER)[:40]}"'}}
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY

# -----------------------------------------------------------------------------
# waiting, and not waiting

def test_503_is_tried_again_with_growing_waits(site, tmp_path, naps, monkeypatch):
    monkeypatch.setattr(module, 'BACKOFF', 1)
    site.plan.extend([{'status': 503}] * 4)
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert len(naps) == 4 and all(2 ** i / 2 <= nap <= 2 ** i for i, nap in enumerate(naps))


@pytest.mark.parametrize('status', [429, 500, 502, 503, 504])
def test_tries_are_bounded(status, site, tmp_path, naps):
    site.default = {'status': status}
    with pytest.raises(DownloadError, match=f'HTTP {status}'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == module.TRIES and len(naps) == module.TRIES - 1


@pytest.fixture
def far_east(monkeypatch):
    """A local time that is not UTC."""
    monkeypatch.setenv('TZ', 'XST-8')
    if hasattr(time, 'tzset'):
        time.tzset()
    yield
    monkeypatch.undo()
    if hasattr(time, 'tzset'):
        time.tzset()


@pytest.mark.parametrize('value, low, high', [
    ('7', 7, 7),
    ('0', 0, 0),
    ('86400', 300, 300),
    (lambda: format_datetime(datetime.now(timezone.utc) + timedelta(seconds=20), usegmt=True), 18, 20),
    (lambda: (datetime.now(timezone.utc) + timedelta(seconds=20)).strftime('%a, %d %b %Y %H:%M:%S -0000'), 18, 20),
    ('Wed, 21 Oct 2015 07:28:00 GMT', 0, 0),
    ('soon', 0, 0.001),
    ('-5', 0, 0.001),
])
@pytest.mark.parametrize('status', [429, 503])
def test_retry_after_is_obeyed_as_seconds_or_as_a_date(status, value, low, high, site, tmp_path, naps, far_east):
    site.plan.append({'status': status, 'headers': {'Retry-After': value() if callable(value) else value}})
    download(site.url, tmp_path / 'f')
    assert len(naps) == 1 and low <= naps[0] <= high


def test_a_long_wait_is_announced(site, tmp_path, naps, capsys):
    site.plan.append({'status': 429, 'headers': {'Retry-After': '60'}})
    download(site.url + '/f?key=secret', tmp_path / 'f')
    assert capsys.readouterr() == ('', f'{site.url}/f: HTTP 429, trying again in 60 s\n')


def test_jitter_leaves_the_seeded_generator_alone(site, tmp_path, naps):
    site.plan.append({'status': 503})
    random.seed(5)
    state = random.getstate()
    download(site.url, tmp_path / 'f')
    assert len(naps) == 1 and random.getstate() == state


def test_no_server_is_tried_again_and_then_told(tmp_path, naps):
    dead = 'http://127.0.0.1:9/f?signature=secret'  # the discard port: nobody listens
    with pytest.raises(DownloadError, match='no answer .*times in a row') as error:
        download(dead, tmp_path / 'f')
    assert len(naps) == module.TRIES - 1
    assert 'http://127.0.0.1:9/f' in str(error.value) and 'secret' not in str(error.value)


@pytest.mark.parametrize('status', [401, 403])
def test_no_access_fails_at_once_and_says_what_to_do(status, site, tmp_path, naps):
    site.default = {'status': status}
    with pytest.raises(DownloadError, match='HF_TOKEN(.|\n)*licence'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == 1 and naps == []


def test_not_found_fails_at_once_and_names_the_address(site, tmp_path, naps):
    site.default = {'status': 404}
    with pytest.raises(DownloadError, match='404') as error:
        download(site.url + '/gone.bin', tmp_path / 'f')
    assert site.url + '/gone.bin' in str(error.value) and len(site.log) == 1 and naps == []
    assert only(tmp_path) == []


@pytest.mark.parametrize('status', [204, 304, 400, 410])
def test_other_answers_are_no_file(status, site, tmp_path, naps):
    site.default = {'status': status}
    with pytest.raises(DownloadError, match=f'HTTP {status}'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == 1 and only(tmp_path) == []


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/f', 'no address', 'http://', 'http://[::1/f', 'http://x:99999/f'])
def test_what_is_no_address_is_told_in_words(url, tmp_path, naps):
    with pytest.raises(DownloadError, match='address'):
        download(url, tmp_path / 'f')
    assert naps == []

# -----------------------------------------------------------------------------
# the hub: its address, its token, its redirects

def test_hub_addresses(monkeypatch):
    assert hub_endpoint() == 'https://huggingface.co'
    assert hub_url('a/b', 'model.bin') == 'https://huggingface.co/a/b/resolve/main/model.bin'
    monkeypatch.setenv('HF_ENDPOINT', 'https://mirror.example/hf/')
    assert hub_endpoint() == 'https://mirror.example/hf'
    assert (hub_url('a/b', 'x y/z#1.parquet', 'dataset', 'refs/convert/parquet')
            == 'https://mirror.example/hf/datasets/a/b/resolve/refs%2Fconvert%2Fparquet/x%20y/z%231.parquet')
    monkeypatch.setenv('HF_ENDPOINT', 'mirror.example')
    with pytest.raises(DownloadError, match='HF_ENDPOINT'):
        hub_endpoint()


def test_hub_download_puts_the_file_into_the_folder(site, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url + '/')
    path = hub_download('a/b', 'sub/f.bin', tmp_path, repo_type='dataset', size=len(BODY))
    assert path == tmp_path / 'sub' / 'f.bin' and path.read_bytes() == BODY
    assert site.log[0][0] == '/datasets/a/b/resolve/main/sub/f.bin'


@pytest.mark.parametrize('name', ['../f', 'a/../../f', '/etc/f', 'a\\..\\f'])
def test_hub_download_stays_in_its_folder(name, site, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    with pytest.raises(DownloadError, match='inside'):
        hub_download('a/b', name, tmp_path / 'in')
    assert site.log == [] and only(tmp_path) == []


FILES = {'a/b.bin': b'12345', 'a/c.json': b'{}', 'a/d/e.bin': b'6', 'f.bin': b'789'}
LISTED = [{'path': 'a/b.bin', 'size': 5, 'sha256': sha(b'12345')}, {'path': 'a/c.json', 'size': 2, 'sha256': None},
          {'path': 'a/d/e.bin', 'size': 1, 'sha256': sha(b'6')}, {'path': 'f.bin', 'size': 3, 'sha256': sha(b'789')}]


@pytest.fixture
def hub(quiet_world, monkeypatch):
    with Hub({'models/some/model': FILES, 'datasets/some/data': FILES}, page_size=1) as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.mark.parametrize('repo, repo_type', [('some/model', 'model'), ('some/data', 'dataset')])
@pytest.mark.parametrize('keep', [True, False])
def test_all_files_are_listed_however_many_pages_it_takes(hub, tmp_path, repo, repo_type, keep):
    kept = tmp_path / 'new' / 'listing' if keep else None
    assert hub_files(repo, repo_type=repo_type, keep=kept) == LISTED
    assert hub_files(repo, 'a', repo_type=repo_type, keep=kept) == LISTED[:3]
    assert len(hub.requests) == 4 + 3
    assert not keep or only(kept.parent) == ['listing']


def test_a_kept_list_of_files_serves_offline_and_a_damaged_one_does_not(hub, tmp_path, monkeypatch):
    kept = tmp_path / 'listing'
    hub_files('some/model', keep=kept)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    hub.requests.clear()
    assert hub_files('some/model', keep=kept) == LISTED
    whole = kept.read_text(encoding='utf-8')
    for damaged in (whole[:-5], '', 'null', '{}', '[]', '[1]', whole.replace('path', 'name'), whole.replace('5', '""')):
        kept.write_text(damaged, encoding='utf-8')
        with pytest.raises(DownloadError, match='HF_HUB_OFFLINE=1'):
            hub_files('some/model', keep=kept)
    with pytest.raises(DownloadError, match='HF_HUB_OFFLINE=1'):
        hub_files('some/model')
    assert hub.requests == []


def test_a_list_that_fails_on_the_way_leaves_the_kept_one_as_it_was(hub, tmp_path, naps):
    hub_files('some/model', keep=tmp_path / 'listing')
    hub.fail('cursor=2', times=99, status=404)
    with pytest.raises(DownloadError):
        hub_files('some/model', 'a', keep=tmp_path / 'listing')
    assert only(tmp_path) == ['listing'] and json.loads((tmp_path / 'listing').read_text(encoding='utf-8')) == LISTED


def test_a_list_that_cannot_be_kept_is_told_in_words(hub, tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(DownloadError, match='file/listing: cannot be written'):
        hub_files('some/model', keep=tmp_path / 'file' / 'listing')


def test_the_token_goes_to_the_hub_and_not_along_a_redirect(site, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_TOKEN', f' {TOKEN}\n')
    site.plan.append({'status': 307, 'headers': {'Location': '/moved'}})  # the hub to itself: the token stays
    site.plan.append({'status': 302, 'headers': {'Location': elsewhere.url + '/blob?signature=1'}})
    assert download(site.url + '/f', tmp_path / 'f').read_bytes() == BODY
    assert [path for path, *_ in site.log] == ['/f', '/moved']
    assert site.asked('Authorization') == [f'Bearer {TOKEN}'] * 2
    assert [path for path, *_ in elsewhere.log] == ['/blob?signature=1']
    assert elsewhere.asked('Authorization') == [None] and TOKEN not in str(elsewhere.log)


def test_the_token_does_not_go_to_the_same_port_of_another_name_nor_to_others(site, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    download(f'http://localhost:{site.port}/f', tmp_path / 'f')
    download(elsewhere.url + '/g', tmp_path / 'g')
    assert site.asked('Authorization') == [None] and elsewhere.asked('Authorization') == [None]


def test_an_address_that_parsers_read_differently_does_not_get_the_token(site, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    target = f'http://127.0.0.1:{elsewhere.port}\\@127.0.0.1:{site.port}/f'
    site.plan.append({'status': 302, 'headers': {'Location': target}})
    download(site.url, tmp_path / 'f')
    assert len(elsewhere.log) == 1 and elsewhere.asked('Authorization') == [None]


def test_a_range_travels_along_a_redirect(site, elsewhere, tmp_path):
    site.default = {'status': 302, 'headers': {'Location': elsewhere.url}}
    leave_partial(tmp_path / 'f', BODY[:300_000])
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY
    assert elsewhere.sent == 100_000


def test_netrc_and_passwords_in_addresses_are_not_sent(site, elsewhere, tmp_path, monkeypatch):
    (tmp_path / 'netrc').write_text('machine 127.0.0.1 login me password hush\n', encoding='utf-8')
    (tmp_path / 'netrc').chmod(0o600)
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    assert requests.get(site.url, timeout=5).request.headers['Authorization']  # what it is all about
    site.log.clear()
    site.plan.append({'status': 302, 'headers': {'Location': elsewhere.url}})
    download(site.url, tmp_path / 'f')
    download(site.url.replace('//', '//me:hush@'), tmp_path / 'g')
    assert site.asked('Authorization') == [None, None] and elsewhere.asked('Authorization') == [None]


@pytest.mark.parametrize('step', [{'status': 401}, {'status': 404}, {'status': 410}, {'status': 503}, {'cut': 0},
                                  {'body': OTHER}, {'status': 302, 'headers': {'Location': '/?signature=secret'}},
                                  {'status': 302, 'headers': {'Location': 'ftp://me:secret@x/?signature=secret'}},
                                  {'status': 302, 'headers': {'Location': 'http://127.0.0.1:9/?signature=secret'}}])
def test_no_message_tells_a_secret(step, site, tmp_path, monkeypatch, naps, capsys):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    site.default = step
    url = site.url.replace('//', '//me:secret@') + '/f?signature=secret#secret'
    with pytest.raises(DownloadError) as error:
        download(url, tmp_path / 'f', sha256=sha(BODY))
    said = ''.join(capsys.readouterr()) + str(error.value)
    assert 'secret' not in said and TOKEN not in said and site.url + '/f' in said
    assert len(str(error.value).splitlines()) <= 2
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_a_token_with_a_stray_character_is_not_repeated(site, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', site.url)
    monkeypatch.setenv('HF_TOKEN', TOKEN + '\nX: y')
    with pytest.raises(DownloadError, match='HF_TOKEN') as error:
        download(site.url, tmp_path / 'f')
    assert TOKEN not in str(error.value) and site.log == []


def test_redirects_are_bounded(site, tmp_path, naps):
    site.default = {'status': 302, 'headers': {'Location': '/again'}}
    with pytest.raises(DownloadError, match='redirects'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == module.MAX_REDIRECTS + 1 and naps == []


def test_request_serves_small_answers_too(site):
    site.body = b'[1, 2]'
    site.plan.append({'status': 503})
    assert request(site.url + '/api', headers={'X-Mine': '1'}).json() == [1, 2]
    assert site.asked('X-Mine') == ['1', '1']

# -----------------------------------------------------------------------------
# offline

@pytest.mark.parametrize('name', ['HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'])
@pytest.mark.parametrize('value', ['1', 'true', 'YES', 'on'])
def test_offline_uses_what_is_there_or_says_what_is_missing(name, value, site, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    (tmp_path / 'f').write_bytes(BODY)
    assert download(site.url, tmp_path / 'f', sha256=sha(BODY)) == tmp_path / 'f'
    with pytest.raises(DownloadError, match=f'is missing.*{name}') as error:
        download(site.url + '/g.bin', tmp_path / 'sub' / 'g')
    assert str(tmp_path / 'sub' / 'g') in str(error.value) and site.url + '/g.bin' in str(error.value)
    with pytest.raises(DownloadError, match='is not the file it should be'):
        download(site.url, tmp_path / 'f', sha256=sha(OTHER))
    assert site.log == [] and only(tmp_path) == ['f'] and (tmp_path / 'f').read_bytes() == BODY


@pytest.mark.parametrize('value', ['', '0', 'false', 'no', 'off'])
def test_offline_can_be_denied(value, site, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', value)
    assert download(site.url, tmp_path / 'f').read_bytes() == BODY

# -----------------------------------------------------------------------------
# the disk

def test_a_folder_that_cannot_be_written_is_told_in_words(site, tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    with pytest.raises(DownloadError, match='cannot be written'):
        download(site.url, tmp_path / 'file' / 'f')
    with pytest.raises(DownloadError, match='is a folder'):
        download(site.url, tmp_path)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is always full')
def test_a_full_disk_is_told_in_words(site, tmp_path, naps):
    (tmp_path / 'f.part').symlink_to('/dev/full')
    with pytest.raises(DownloadError, match='No space left.*Make room'):
        download(site.url, tmp_path / 'f')
    assert len(site.log) == 1 and not (tmp_path / 'f').exists()

# -----------------------------------------------------------------------------
# sharing

def test_two_processes_share_one_download(site, tmp_path):
    site.default = {'gate': True}  # stops halfway, until the second process is seen to wait
    code = 'print(download(sys.argv[1], sys.argv[2], sha256=sys.argv[3]))'
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    first = run_python(code, site.url, tmp_path / 'f', sha(BODY), **options)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not site.log:
        time.sleep(0.01)
    second = run_python(code, site.url, tmp_path / 'f', sha(BODY), **options)
    try:
        line = second.stderr.readline()
    finally:
        site.gate.set()
    for child in (first, second):
        out, err = child.communicate(timeout=20)
        assert (child.returncode, out.strip()) == (0, str(tmp_path / 'f')), err
    assert line == 'f: waiting for another process that is fetching it\n'
    assert site.sent == len(BODY) and len(site.log) == 1
    assert (tmp_path / 'f').read_bytes() == BODY and only(tmp_path) == ['f']


def test_the_second_tries_itself_when_the_first_fails(site, tmp_path):
    site.plan.append({'status': 404})
    results = []

    def work():
        try:
            results.append(download(site.url, tmp_path / 'f', progress=False).read_bytes())
        except DownloadError:
            results.append(None)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(BODY) == 5 and results.count(None) == 1
    assert site.sent == len(BODY) + len(b'no') and only(tmp_path) == ['f']

# -----------------------------------------------------------------------------
# showing

class Terminal(io.StringIO):
    def isatty(self):
        return True


def watch(monkeypatch):
    """A terminal as standard error. To be called in the test itself: pytest sets its own just before it."""
    if module.tqdm:
        monkeypatch.setattr(module.tqdm, 'monitor_interval', 0)  # no thread of its own
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stderr', terminal)
    return terminal


def test_a_long_transfer_shows_a_bar_on_standard_error(site, tmp_path, monkeypatch, capsys):
    pytest.importorskip('tqdm')
    terminal = watch(monkeypatch)
    monkeypatch.setattr(module, 'BAR_DELAY', 0.1)
    leave_partial(tmp_path / 'f.bin', BODY[:100_000])
    site.plan.append({'cut': 100_000})
    site.default = {'pace': 0.03}
    download(site.url, tmp_path / 'f.bin')
    assert 'f.bin' in terminal.getvalue() and '400k/400k' in terminal.getvalue().splitlines()[-1]
    assert capsys.readouterr().out == ''


def test_a_short_transfer_shows_none(site, tmp_path, monkeypatch):
    terminal = watch(monkeypatch)
    download(site.url, tmp_path / 'f')
    assert terminal.getvalue() == ''


@pytest.mark.parametrize('bar', [True, False])
def test_no_progress_is_shown_to_those_who_want_none(bar, site, tmp_path, monkeypatch):
    terminal = watch(monkeypatch)
    monkeypatch.setattr(module, 'BAR_DELAY', 0)
    monkeypatch.setattr(terminal, 'isatty', lambda: bar)
    download(site.url, tmp_path / 'f', progress=False)
    assert terminal.getvalue() == ''
    download(site.url, tmp_path / 'g')
    assert terminal.getvalue() != ''


@pytest.mark.parametrize('without', ['tqdm', 'terminal'])
def test_where_no_bar_can_be_there_is_a_plain_line(without, site, tmp_path, monkeypatch):
    terminal = watch(monkeypatch)
    monkeypatch.setattr(module, 'BAR_DELAY', 0)
    if without == 'tqdm':
        monkeypatch.setattr(module, 'tqdm', None)
    else:
        monkeypatch.setattr(terminal, 'isatty', lambda: False)
    site.body = BODY * 5
    download(site.url, tmp_path / 'f')
    assert terminal.getvalue() == 'f: 0.1 of 2.0 MB\n'
