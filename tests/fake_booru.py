"""A local image site that speaks three families of APIs, plays faults, and notes every request."""

import contextlib
import hashlib
import io
import json
import random
import socket
import struct
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image


def draw(seed: int, size: int = 96, mode: str = "RGB") -> Image.Image:
    """A colourful picture like no other: 16x16 random colours, enlarged."""
    colours = random.Random(seed).randbytes(3 * 16 * 16)
    return Image.frombytes("RGB", (16, 16), colours).resize((size, size), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class FakeBooru(ThreadingHTTPServer):
    """`posts` are dicts with an id and whatever a test wants to differ; `faults[path]` are played one a request,
    before the normal answer; `always[path]` is played every time. `log` has each request's time, path, host."""

    daemon_threads = True
    clock = staticmethod(time.monotonic)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.log, self.faults, self.always = [], defaultdict(list), {}
        self.robots: str | None = None
        self.searches: list[str] = []
        self.stock(3)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stock(self, count: int, page: int = 100) -> None:
        """Let the site have these posts alone, so many on a page."""
        self.posts: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.page = page
        for number in range(1, count + 1):
            self.add(number, encode(draw(number)))

    def add(self, number: int, body: bytes, name: str | None = None, **fields) -> str:
        """One more post; returns its picture's path."""
        path = f"/images/7/{name or f'{number}.png'}"
        self.files[path] = body
        self.posts.insert(0, dict(id=number, path=path, md5=hashlib.md5(body).hexdigest()) | fields)
        return path

    def requests(self, path: str) -> list[float]:
        return [moment for moment, asked, _ in self.log if asked == path]

    def pictures(self) -> list[str]:
        return [path for _, path, _ in self.log if path.startswith(("/images", "/samples"))]

    def handle_error(self, *_):
        pass  # clients that go away are part of the play

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, urlsplit(self.path).path
        server.log.append((server.clock(), path, self.headers["Host"]))
        self.server.last_headers = dict(self.headers)
        with contextlib.suppress(OSError):
            if server.faults[path]:
                server.faults[path].pop(0)(self)
            elif path in server.always:
                server.always[path](self)
            elif path == "/robots.txt":
                self.answer(200 if server.robots is not None else 404, (server.robots or "").encode(), "text/plain")
            elif path in ("/posts.json", "/post.json", "/index.php"):
                self.answer_search()
            elif path in server.files:
                self.answer(200, server.files[path], "image/png")
            else:
                self.answer(404)
        self.close_connection = True

    def answer_search(self):
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.answer(200, self.api(parts.path, query), "application/json")

    def api(self, path: str, query: dict) -> bytes:
        """What the family that owns the path answers, quirks included."""
        danbooru, moebooru = path == "/posts.json", path == "/post.json"
        self.server.searches.append(query["tags"])
        words = query["tags"].split()
        below = [int(word[4:]) for word in words if word.startswith("id:<")]
        if danbooru and query.get("page", "").startswith("b"):
            below.append(int(query["page"][1:]))
        limit = min(self.server.page, int(query["limit"]), 200 if danbooru else 100)
        posts = [post for post in self.server.posts if all(post["id"] < number for number in below)][:limit]
        if not danbooru and not moebooru and not posts:
            return b""  # no results: an empty body
        give = self.danbooru if danbooru else self.moebooru if moebooru else self.gelbooru
        return json.dumps([post["raw"] if "raw" in post else give(post) for post in posts]).encode()

    def danbooru(self, post: dict) -> dict:
        raw = dict(id=post["id"], rating=post.get("rating", "g"), tag_string=post.get("tags", "1girl solo"))
        raw |= dict(tag_string_artist=post.get("artist", ""), source=post.get("source", ""))
        return raw | self.addresses(post, "large_file_url", post.get("path"))

    def moebooru(self, post: dict) -> dict:
        raw = dict(id=post["id"], rating=post.get("rating", "s"), tags=post.get("tags", "smile"))
        return raw | dict(source=post.get("source", "")) | self.addresses(post, "sample_url", None)

    def addresses(self, post: dict, sample: str, usual: str | None) -> dict:
        """A post's file, unless it was deleted, and its sample, which is the `usual` one if it has none."""
        found = {} if post.get("deleted") else dict(file_url=self.server.url + post["path"], md5=post["md5"])
        place = post.get("sample") or (usual if found else None)
        return found | ({sample: self.server.url + place} if place else {})

    def gelbooru(self, post: dict) -> dict:
        """An older answer: no addresses, only their parts."""
        folder, image = post["path"].removeprefix("/images/").rsplit("/", 1)
        raw = dict(
            id=post["id"], rating=post.get("rating", "general"), tags=post.get("tags", "1girl solo"), hash=post["md5"]
        )
        return raw | dict(directory=folder, image=image, sample=bool(post.get("sample")))

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain", **headers):
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), "Content-Type": kind}
        for name, value in (fields | {name.replace("_", "-"): value for name, value in headers.items()}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


# Faults: each gets the handler of the request that it spoils.


def status(code: int, body: bytes = b"", **headers):
    return lambda handler: handler.answer(code, body, **headers)


def redirect(place: str, code: int = 302):
    return lambda handler: handler.answer(code, b"moved", Location=place)


def picture(body: bytes, **headers):
    return lambda handler: handler.answer(200, body, **({"kind": "image/png"} | headers))


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def garbage(handler):
    handler.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")


def short(handler):
    handler.answer(200, b"\x89PNG only the beginning", "image/png", Content_Length="5000")


def broken_chunks(handler):
    handler.answer(200, b"ffff\r\nfour", "image/png", Content_Length=None, Transfer_Encoding="chunked")


def chunk_of(size: bytes):
    """A chunk that claims a size in hexadecimal digits."""

    def fault(handler):
        handler.answer(200, size + b"\r\nfour", "image/png", Content_Length=None, Transfer_Encoding="chunked")

    return fault


def cut_off(body: bytes):
    """An answer without a length that ends too early: nothing but its content tells."""
    return lambda handler: handler.answer(200, body, "image/png", Content_Length=None)


def endless(handler):
    handler.answer(200, b"", "image/png", Content_Length=None)
    while True:
        handler.wfile.write(bytes(2**20))


def drip(handler, length: str | None = "100000"):
    handler.answer(200, b"", "image/png", Content_Length=length)
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def drip_without_length(handler):
    drip(handler, None)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silence(handler):
    time.sleep(3)


def challenge(code: int):
    return status(code, b"<html>Just a moment", kind="text/html", Server="cloudflare", cf_mitigated="challenge")
