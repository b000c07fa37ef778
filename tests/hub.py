"""A Hugging Face hub in miniature, on this machine, for the tests of whatever downloads.

    with Hub({'datasets/HuggingFaceFW/fineweb-edu': {'sample/10BT/000_00000.parquet': data},
              'models/openai-community/gpt2': {'config.json': data, 'model.safetensors': data}}) as hub:
        environment |= hub.environment          # HF_ENDPOINT, and no proxy in between

As on the real one, the list of files comes in pages; files of git itself (.json, .md) are sent by the hub, while large
ones are redirected, with a signed address, to a store that is another host and must not see the token. The store also
serves them as plain addresses: hub.store/datasets/OWNER/NAME/PATH.
"""
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

Request = namedtuple('Request', 'host method path headers status')     # host is 'hub' or 'store'; status of the answer


class Server(ThreadingHTTPServer):
    daemon_threads = False              # so that server_close() waits for them


class Hub:
    """repos: {'datasets/OWNER/NAME' or 'models/OWNER/NAME': {path: bytes}}; page_size: entries in a page of a list."""

    def __init__(self, repos, page_size=2):
        self.repos, self.page_size = repos, page_size
        self.requests = []              # all that was asked, in order
        self.sent = 0                   # bytes of files that were sent
        self.page = None                # what a login page answers, whatever is asked
        self.xet = None                 # (address of a Xet service, {path: hash there}), for the headers that name it
        self.faults = []                # (pattern, what is to go wrong), each for one request
        self.closing = threading.Event()
        self.servers = {host: self._serve(host) for host in ('hub', 'store')}
        self.endpoint = f'http://127.0.0.1:{self.servers["hub"][0].server_port}'
        self.store = f'http://localhost:{self.servers["store"][0].server_port}'
        self.environment = {'HF_ENDPOINT': self.endpoint, 'NO_PROXY': '127.0.0.1,localhost',
                            'no_proxy': '127.0.0.1,localhost'}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server, thread in self.servers.values():
            server.shutdown()
            server.server_close()
            thread.join()

    def fail(self, pattern, times=1, **fault):
        """The next requests, to either host, whose path the pattern is found in go wrong. fault: status=, headers={},
        method= of these alone; and for requests that are not HEAD: body= instead of the file, ignore_range=True,
        cut= after so many bytes (by a reset if reset=True), hold= an Event to wait for before the body, or after half
        of it if at_half=True."""
        self.faults += [(pattern, fault)] * times

    def fetched(self):
        """The paths of the files that were asked for, in order and with repetitions."""
        return [unquote(re.sub('.*/resolve/[^/]*/', '', r.path)) for r in self.requests
                if '/resolve/' in r.path and r.method == 'HEAD']        # each begins with the question what it is

    def _serve(self, host):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self):
                try:
                    hub._answer(host, self)
                except ConnectionError:
                    pass                # the client was killed, or has heard enough
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        server = Server(('127.0.0.1', 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
        thread.start()
        return server, thread

    def _answer(self, host, handler):
        head = handler.command == 'HEAD'
        hit = next((f for f in self.faults if re.search(f[0], handler.path)
                    and f[1].get('method', handler.command) == handler.command
                    and not (head and {'body', 'cut', 'hold', 'ignore_range'} & f[1].keys())), None)
        if hit:
            self.faults.remove(hit)
        fault = hit[1] if hit else {}
        status, headers, body = self._hub(handler) if host == 'hub' else self._store(handler)
        if self.page is not None:
            status, headers, body = 200, {'Content-Type': 'text/html'}, self.page
        body = fault.get('body', body)
        if 'status' in fault:
            status, body = fault['status'], b'no'
        elif 'ETag' in headers and not fault.get('ignore_range'):
            status, body = self._range(handler, headers, body)
        headers = {'Connection': 'close', 'Content-Length': len(body), **headers, **fault.get('headers', {})}
        sent = {name.title(): value for name, value in handler.headers.items()}
        self.requests.append(Request(host, handler.command, handler.path, sent, status))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        half = len(body) // 2 if fault.get('at_half') else 0
        self._send(handler, body[:half])
        while 'hold' in fault and not fault['hold'].wait(0.01) and not self.closing.is_set():
            pass
        if not head:
            self._send(handler, body[half:fault.get('cut')])
        if fault.get('reset'):
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            handler.connection.close()

    def _send(self, handler, body):
        for i in range(0, len(body), 16384):
            self.sent += len(body[i:i + 16384])             # before the client can have it
            handler.wfile.write(body[i:i + 16384])

    def _hub(self, handler):
        """(status, headers, body) for the tree API and for files."""
        path, query = unquote(urlsplit(handler.path).path), parse_qs(urlsplit(handler.path).query)
        if path == '/xet-token':
            headers = {'X-Xet-Cas-Url': self.xet[0], 'X-Xet-Access-Token': 't', 'X-Xet-Token-Expiration': 1 << 40}
            return 200, headers, b''
        for repo, files in self.repos.items():
            if path.startswith(f'/api/{repo}/tree/main'):
                folder = path.removeprefix(f'/api/{repo}/tree/main').strip('/')
                entries = [self._entry(name, data) for name, data in sorted(files.items())
                           if name.startswith(folder and folder + '/')]
                at = int(query.get('cursor', ['0'])[0])
                following = f'{self.endpoint}{quote(path)}?recursive=true&cursor={at + self.page_size}'
                more = {'Link': f'<{following}>; rel="next"'} if at + self.page_size < len(entries) else {}
                found = entries or path.endswith('/main')
                return (200, more, json.dumps(entries[at:at + self.page_size]).encode()) if found else (404, {}, b'no')
            start = f'/{repo.removeprefix("models/")}/resolve/main/'
            if path.startswith(start) and path.removeprefix(start) in files:
                name = path.removeprefix(start)
                data, headers = files[name], {'X-Repo-Commit': '0' * 40}
                if not is_large(name):
                    return 200, {**headers, 'ETag': f'"{hashlib.sha1(data).hexdigest()}"'}, data
                if self.xet:
                    headers |= {'X-Xet-Hash': self.xet[1].get(name, sha256(data)),
                                'Link': f'<{self.endpoint}/xet-token>; rel="xet-auth"'}
                return 302, {**headers, 'X-Linked-Size': len(data), 'X-Linked-ETag': f'"{sha256(data)}"',
                             'Location': f'{self.store}/{quote(repo)}/{quote(name)}?signature={time.time()}'}, b''
        return 404, {}, b'no'

    def _store(self, handler):
        path = unquote(urlsplit(handler.path).path)
        for repo, files in self.repos.items():
            data = files.get(path.removeprefix(f'/{repo}/'))
            if data is not None and is_large(path):
                return 200, {'ETag': f'"{sha256(data)}"'}, data
        return 404, {}, b'no'

    @staticmethod
    def _range(handler, headers, body):
        wanted = re.fullmatch(r'bytes=(\d+)-', handler.headers.get('Range', ''))
        if not wanted or handler.headers.get('If-Range') not in (None, headers['ETag']):
            return 200, body
        start, size = int(wanted[1]), len(body)
        headers['Content-Range'] = f'bytes {start}-{size - 1}/{size}' if start < size else f'bytes */{size}'
        return (206, body[start:]) if start < size else (416, b'')

    @staticmethod
    def _entry(name, data):
        lfs = {'lfs': {'oid': sha256(data), 'size': len(data), 'pointerSize': 134}} if is_large(name) else {}
        return {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest(), **lfs}


def is_large(name):
    return not name.endswith(('.json', '.md'))


def sha256(data):
    return hashlib.sha256(data).hexdigest()
