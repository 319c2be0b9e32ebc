"""Google Cloud Storage as far as Arrow's client asks for it, in memory: objects of one bucket over the JSON API."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

_BUCKET = "/storage/v1/b/bucket"
_OBJECTS = f"{_BUCKET}/o"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    marks: dict[str, Any]
    """Metadata of objects: Arrow marks so what it made as a folder."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._asked()
        if path == _BUCKET:
            self._answer(200, {"kind": "storage#bucket", "id": "bucket", "name": "bucket"})
            return
        if path == _OBJECTS:
            self._answer(200, self._listed(query))
            return
        found = re.match(rf"(?:/download)?{_OBJECTS}/(.+)|/bucket/(.+)", path)
        name = unquote(found[1] or found[2]) if found else ""
        if name not in self.objects:
            self._answer(404, {"error": {"code": 404, "message": "no such object"}})
        elif query.get("alt") == "media" or (found and found[2]):
            self._content(self.objects[name])
        else:
            self._answer(200, self._about(name))

    def do_POST(self) -> None:
        _, query = self._asked()
        body = self._body()
        if query["uploadType"] == "resumable":
            about = json.loads(body or b"{}")
            name = query.get("name") or about["name"]
            self.objects.pop(name, None)
            self.marks[name] = about.get("metadata", {})
            self._answer(200, {}, Location=f"http://{self.headers['Host']}/upload/{quote(name, safe='')}")
            return
        assert query["uploadType"] == "multipart"
        boundary = self.headers["Content-Type"].split("boundary=")[1].strip('"')
        _, about, content, *_ = body.split(f"--{boundary}".encode())
        told = json.loads(about.split(b"\r\n\r\n", 1)[1])
        name = query.get("name") or told["name"]
        self.marks[name] = told.get("metadata", {})
        self.objects[name] = content.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
        self._answer(200, self._about(name))

    def do_PUT(self) -> None:
        """A part of a resumable upload."""
        name = unquote(self._asked()[0].removeprefix("/upload/"))
        self.objects[name] = self.objects.get(name, b"") + self._body()
        if self.headers.get("Content-Range", "").endswith("/*"):
            self._answer(308, b"", Range=f"bytes=0-{len(self.objects[name]) - 1}")
        else:
            self._answer(200, self._about(name))

    def do_DELETE(self) -> None:
        there = self.objects.pop(unquote(self._asked()[0].removeprefix(f"{_OBJECTS}/")), None)
        self._answer(404 if there is None else 204, b"")

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, dict(parse_qsl(url.query))

    def _listed(self, query: dict[str, str]) -> dict[str, Any]:
        """What lies behind a prefix; behind the delimiter prefixes alone, which Arrow does not look at."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        marked = query.get("includeTrailingDelimiter") == "true"
        behind = {name: name.removeprefix(prefix) for name in sorted(self.objects) if name.startswith(prefix)}
        deeper = {name: rest for name, rest in behind.items() if delimiter and delimiter in rest}
        prefixes = sorted({prefix + rest.split(delimiter)[0] + delimiter for rest in deeper.values()})
        shown = {n for n, rest in deeper.items() if marked and rest.index(delimiter) == len(rest) - len(delimiter)}
        items = [self._about(name) for name in behind if name not in deeper or name in shown]
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}

    def _about(self, name: str) -> dict[str, Any]:
        time = "2026-01-01T10:00:00.000Z"
        of = {"id": f"bucket/{name}/1", "name": name, "bucket": "bucket", "size": str(len(self.objects[name]))}
        versions = {"generation": "1", "metageneration": "1", "timeCreated": time, "updated": time}
        return {"kind": "storage#object", "metadata": self.marks.get(name, {})} | of | versions

    def _content(self, data: bytes) -> None:
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            part = data[first : last + 1]
            span = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            self._answer(206, part, **{"Content-Range": span, "x-goog-generation": "1"})
        else:
            self._answer(200, data, **{"x-goog-generation": "1"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, content: bytes | dict[str, Any], **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def gcs_server() -> Iterator[str]:
    """Serves an empty bucket; yields the URI of a folder in it."""
    handler = type("Handler", (_Handler,), {"objects": {}, "marks": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"127.0.0.1%3A{server.server_port}"
        yield f"gs://anonymous@bucket/runs?scheme=http&endpoint_override={endpoint}&retry_limit_seconds=5"
    finally:
        server.shutdown()
        server.server_close()
