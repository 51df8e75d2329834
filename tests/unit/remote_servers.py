"""Remote storage that the tests really read from: an HTTP server with ranges, and file systems that are slow or fail."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class FileServer:
    """Serves a folder over HTTP on this machine; counts requests, and fails on demand."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, range) of each request."""
        self.fail_next = 0
        """Answer this many requests with 503."""
        self.cut_next = 0
        """Break off this many answers in the middle."""

    def answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        wanted = handler.headers.get("Range", "")
        self.requests.append((handler.command, handler.path, wanted))
        if self.fail_next > 0:
            self.fail_next -= 1
            return handler.send_error(503)
        if handler.path.endswith("/"):
            names = sorted(path.name for path in (self.folder / handler.path.strip("/")).iterdir())
            return self._send(handler, 200, "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode(), {}, with_body)
        file = self.folder / handler.path.lstrip("/")
        if not file.is_file():
            return handler.send_error(404)
        content = file.read_bytes()
        headers = {"ETag": f'"{file.stat().st_mtime_ns}-{len(content)}"'}
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if match and self.ranges:
            start, end = int(match[1]), min(int(match[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            return self._send(handler, 206, content[start:end], headers, with_body)
        return self._send(handler, 200, content, headers, with_body)

    def _send(self, handler: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if not with_body:
            return
        if self.cut_next > 0 and handler.command == "GET":
            self.cut_next -= 1
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
            return
        handler.wfile.write(body)


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[tuple[str, FileServer]]:
    """A running server: its URL, and itself."""
    files = FileServer(folder, ranges)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            files.answer(self, True)

        def do_HEAD(self) -> None:
            files.answer(self, False)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class SlowFileSystem(LocalFileSystem):
    """This machine's files behind `slow://`: every request waits, then takes its time by bandwidth."""

    protocol = "slow"
    latency_s = (0.02, 0.05)
    bytes_per_s = 100e6
    requests = reads = bytes_read = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("slow://"))  # type: ignore[no-any-return]

    def unstrip_protocol(self, name: str) -> str:
        return f"slow://{name}"

    def info(self, path: Any, **options: Any) -> Any:
        if not isinstance(path, os.DirEntry):  # which a listing has, without a request for each
            self._wait(0)
        return super().info(path, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        raw: bytes = super().cat_file(path, start=start, end=end, **options)
        type(self).reads += 1
        self._wait(len(raw))
        return raw

    def _wait(self, size: int) -> None:
        cls = type(self)
        cls.requests += 1
        cls.bytes_read += size
        low, high = cls.latency_s
        spread = (cls.requests * 0.6180339887) % 1.0  # even over the interval, without a random number
        time.sleep(low + (high - low) * spread + size / cls.bytes_per_s)


def register_slow() -> type[SlowFileSystem]:
    """Make `slow://` known, with its counters at 0."""
    fsspec.register_implementation("slow", SlowFileSystem, clobber=True)
    SlowFileSystem.requests = SlowFileSystem.reads = SlowFileSystem.bytes_read = 0
    return SlowFileSystem
