"""An object store on this machine: as much of Google Cloud Storage's HTTP interface as its clients here need."""
import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
import zlib
from collections.abc import Iterator

PATH = re.compile(r'(?P<kind>/upload|/download|)/storage/v1/b/(?P<bucket>[^/]+)(/o(/(?P<name>.*))?)?')


class Store:
    """objects: the content of each by BUCKET/NAME.    requests: what was asked, in order.    address: of the server."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.requests: list[str] = []
        self.address, self._lock, self._count, self._uploads = '', threading.Lock(), 0, {}

    @property
    def environment(self) -> dict[str, str]:
        """What makes the clients talk to it, with no credentials."""
        return {'STORAGE_EMULATOR_HOST': self.address, 'TENSORSTORE_GCS_HTTP_URL': self.address,
                'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none', 'FSSPEC_GS_TOKEN': 'anon', 'FSSPEC_GCS_TOKEN': 'anon',
                'EPATH_USE_TF': 'false', 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'GCE_METADATA_HOST': '127.0.0.1:1'}

    def put(self, key: str, content: bytes) -> dict:
        with self._lock:
            self._count += 1
            self.objects[key], self.generations[key] = content, self._count
        return self.about(key)

    def about(self, key: str) -> dict:
        bucket, _, name = key.partition('/')
        content, place = self.objects[key], f'{bucket}/o/{urllib.parse.quote(name, safe="")}'
        generation = str(self.generations.get(key, 1))
        return {'kind': 'storage#object', 'bucket': bucket, 'name': name, 'size': str(len(content)),
                'generation': generation, 'metageneration': '1', 'id': f'{key}/{generation}', 'etag': generation,
                'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(),
                'timeCreated': '2026-01-01T00:00:00.000Z', 'updated': '2026-01-01T00:00:00.000Z',
                'mediaLink': f'{self.address}/download/storage/v1/b/{place}?alt=media'}

    def answer(self, method: str, url: str, headers, body: bytes) -> tuple[int, bytes, dict]:
        """(status, body, headers) of a request."""
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self.requests.append(f'{method} {url}')
        if parts.path.startswith('/batch'):
            return self._batch(headers, body)
        match = PATH.fullmatch(parts.path)
        if not match:
            return _json({'error': {'code': 404, 'message': 'no such place'}}, 404)
        bucket, name = match['bucket'], urllib.parse.unquote(match['name'] or '')
        if bucket == 'private':
            return _json({'error': {'code': 403, 'message': 'may not look at it'}}, 403)
        if match['kind'] == '/upload':
            return self._upload(method, bucket, query, headers, body)
        if not name:
            return self._list(bucket, query) if '/o' in parts.path[len('/storage/v1/b/'):] else _json(
                {'kind': 'storage#bucket', 'name': bucket, 'id': bucket, 'location': 'US', 'locationType': 'region'})
        key = f'{bucket}/{name}'
        if '/rewriteTo/b/' in key or '/copyTo/b/' in key:
            source, target = re.split(r'/(?:rewriteTo|copyTo)/b/', key)
            about = self.put(target.replace('/o/', '/', 1), self.objects[source])
            return _json({'done': True, 'resource': about, 'rewriteToken': ''})
        if key not in self.objects:
            return _json({'error': {'code': 404, 'message': 'No such object'}}, 404)
        if method == 'DELETE':
            with self._lock:
                self.objects.pop(key, None)
            return 204, b'', {}
        if 'alt' in query and query['alt'] == 'media':
            return self._content(key, query, headers)
        return _json(self.about(key))

    def _content(self, key: str, query: dict, headers) -> tuple[int, bytes, dict]:
        content, generation = self.objects[key], str(self.generations.get(key, 1))
        if query.get('ifGenerationNotMatch') == generation:
            return 304, b'', {}
        told = {'x-goog-generation': generation, 'Content-Type': 'application/octet-stream'}
        if span := re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('Range', '')):
            total, (first, last) = len(content), span.groups()
            begin = int(first) if first else max(total - int(last), 0)
            end = min(int(last) + 1 if first and last else total, total)
            if begin >= total:
                return 416, b'', {'Content-Range': f'bytes */{total}'}
            return 206, content[begin:end], told | {'Content-Range': f'bytes {begin}-{end - 1}/{total}'}
        return 200, content, told | {'x-goog-hash': f'crc32={zlib.crc32(content)}'}

    def _list(self, bucket: str, query: dict) -> tuple[int, bytes, dict]:
        prefix, mark = query.get('prefix', ''), query.get('delimiter', '')
        items, folders = [], set()
        for key in sorted(self.objects):
            owner, _, name = key.partition('/')
            if owner != bucket or not name.startswith(prefix):
                continue
            if mark and mark in name[len(prefix):]:
                folders.add(prefix + name[len(prefix):].split(mark)[0] + mark)
            else:
                items.append(self.about(key))
        return _json({'kind': 'storage#objects', 'items': items, 'prefixes': sorted(folders)})

    def _upload(self, method: str, bucket: str, query: dict, headers, body: bytes) -> tuple[int, bytes, dict]:
        kind = query['uploadType']
        if kind == 'multipart':
            boundary = re.search(r'boundary="?([^";]+)', headers['Content-Type'])[1].encode()
            about, content = (part.partition(b'\r\n\r\n' if b'\r\n\r\n' in part else b'\n\n')[2]
                              for part in body.split(b'--' + boundary)[1:3])
            content = content.removesuffix(b'\r\n') if content.endswith(b'\r\n') else content.removesuffix(b'\n')
            return _json(self.put(f'{bucket}/{json.loads(about)["name"]}', content))
        if kind == 'resumable' and 'upload_id' not in query:
            name = query.get('name') or json.loads(body)['name']
            number = str(len(self._uploads))
            self._uploads[number] = [f'{bucket}/{name}', b'']
            place = f'{self.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}'
            return 200, b'{}', {'Location': place}
        if kind == 'resumable':
            upload = self._uploads[query['upload_id']]
            upload[1] += body
            if headers.get('Content-Range', '').endswith('/*'):
                return 308, b'', {'Range': f'bytes=0-{len(upload[1]) - 1}'}
            return _json(self.put(*upload))
        key = f'{bucket}/{query["name"]}'
        wanted = query.get('ifGenerationMatch')
        there = str(self.generations[key]) if key in self.objects else '0'
        if wanted is not None and wanted != there:
            return _json({'error': {'code': 412, 'message': 'conditionNotMet'}}, 412)
        return _json(self.put(key, body))

    def _batch(self, headers, body: bytes) -> tuple[int, bytes, dict]:
        boundary = re.search(r'boundary="?([^";]+)', headers['Content-Type'])[1]
        parts = []
        for number, (method, url) in enumerate(re.findall(rb'(DELETE|GET) (\S+) HTTP', body)):
            status, content, _ = self.answer(method.decode(), url.decode(), {}, b'')
            parts.append(f'--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n'
                         f'HTTP/1.1 {status} told\r\nContent-Length: {len(content)}\r\n\r\n{content.decode()}\r\n')
        return 200, (''.join(parts) + f'--{boundary}--').encode(), {'Content-Type': f'multipart/mixed; boundary={boundary}'}


def _json(value: dict, status: int = 200) -> tuple[int, bytes, dict]:
    return status, json.dumps(value).encode(), {'Content-Type': 'application/json; charset=UTF-8'}


@contextlib.contextmanager
def serve() -> Iterator[Store]:
    """An empty store, reachable at its address while the block runs."""
    store = Store()

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def _answer(self) -> None:
            if self.headers.get('Transfer-Encoding') == 'chunked':
                body = b''
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
            status, content, headers = store.answer(self.command, self.path, self.headers, body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a client that is killed
                super().handle()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Answer) as server:
        server.daemon_threads = True
        store.address = f'http://127.0.0.1:{server.server_address[1]}'
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
