"""Servers on loopback: nginx, a proxy before it that counts and breaks, and a stand-in hub."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from http_tools import serve

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
CONFIG = """
daemon off; master_process off; pid {place}/nginx.pid; error_log {place}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off; client_body_temp_path {place}/body; proxy_temp_path {place}/proxy;
    fastcgi_temp_path {place}/fastcgi; uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
    gzip on; gzip_types application/json application/octet-stream text/plain;
    server {{ listen 127.0.0.1:{port}; root {root}; {extra} }}
}}
"""


@contextmanager
def nginx(root: Path, place: Path, extra: str = "") -> Iterator[int]:
    """A real nginx that serves `root`; gives its port."""
    if NGINX is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    place.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = place / "nginx.conf"
    config.write_text(CONFIG.format(place=place, port=port, root=root, extra=extra))
    process = subprocess.Popen(
        [NGINX, "-p", str(place), "-c", str(config)], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


Fault = Callable[[int, str, str], str | int | None]
"""(number of the GET, path, Range) -> what goes wrong: an integer drops the connection after so
many bytes of the body, a word names one of Proxy's tricks, None lets it pass."""


class Proxy:
    """An HTTP server before another that counts what it sends, and breaks what it is told to."""

    def __init__(self, port: int) -> None:
        self.upstream, self.fault = port, lambda *_: None
        self.sent = self.body = self.gets = self.drops = 0
        self.requests: list[tuple[str, str, str]] = []
        self.tokens: list[str] = []
        self.lock = threading.Lock()
        self.server = _start(type("Bound", (_Handler,), {"proxy": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    fault: Fault

    def reset(self, fault: Fault | None = None) -> None:
        """Count from nought; break by `fault`."""
        self.fault = fault or (lambda *_: None)
        self.sent = self.body = self.gets = self.drops = 0
        self.requests, self.tokens = [], []

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _start(handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    server, _ = serve(handler)
    server.handle_error = lambda *_: None  # a client that was killed is meant
    return server


def _trick(fault: str | int | None, asked: str, told: dict[str, str], body: bytes) -> bytes:
    """Change an answer as a fault says; gives its body."""
    if fault == "etag":
        told["ETag"] = '"another"'
    elif fault == "shifted":
        told["Content-Range"] = "bytes 1-2/" + told["Content-Range"].rpartition("/")[2]
    elif fault == "short":  # a whole answer, to a part of the range
        body = body[: max(1, len(body) // 2)]
        first = int(asked.removeprefix("bytes=").partition("-")[0])
        total = told["Content-Range"].rpartition("/")[2]
        told["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{total}"
        told["Content-Length"] = str(len(body))
    elif fault == "encoded":
        told["Content-Encoding"] = "gzip"
    elif fault == "flipped":
        body = bytes([body[0] ^ 1]) + body[1:]
    return body


class _Handler(BaseHTTPRequestHandler):
    """Answers of Proxy, one connection each."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._pass_on(None)

    def do_GET(self) -> None:
        with self.proxy.lock:
            number = self.proxy.gets
            self.proxy.gets += 1
        self._pass_on(self.proxy.fault(number, self.path, self.headers.get("Range", "")))

    def _pass_on(self, fault: str | int | None) -> None:
        asked = self.headers.get("Range", "")
        self.proxy.requests.append((self.command, self.path, asked))
        if "Authorization" in self.headers:
            self.proxy.tokens.append(self.headers["Authorization"])
        headers = dict(self.headers.items())
        headers.pop("Host", None)
        if fault == "whole":
            headers.pop("Range", None)
        if isinstance(fault, str) and fault.isdigit():
            self._send(int(fault), {"Content-Length": "0"}, b"", None)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream)
        upstream.request(self.command, self.path, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        told = dict(answer.getheaders())
        for name in ("Connection", "Date", "Transfer-Encoding"):
            told.pop(name, None)
        if self.command == "GET":
            told["Content-Length"] = str(len(body))
        body = _trick(fault, asked, told, body)
        upstream.close()
        self._send(answer.status, told, body, fault if isinstance(fault, int) else None)

    def _send(self, status: int, headers: dict, body: bytes, drop: int | None) -> None:
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        data = head.encode() + b"\r\n"
        if self.command == "HEAD":
            body = b""
        piece = body if drop is None else body[:drop]
        try:
            self.wfile.write(data + piece)
            self.wfile.flush()
        except OSError:  # the other side is gone
            self.close_connection = True
        with self.proxy.lock:
            self.proxy.sent += len(data) + len(piece)
            self.proxy.body += len(piece)
            if drop is not None and drop < len(body):
                self.proxy.drops += 1
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
