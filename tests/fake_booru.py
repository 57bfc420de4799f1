"""A local image site that speaks three families of APIs, plays faults, and notes every request."""

import contextlib
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
    """`posts` are dicts with an id and whatever a test wants to differ, newest first.

    `faults[path]` are played one a request, before the normal answer; `always[path]` is played every time.
    `log` has each request's time and path, `searches` the tags of each search.
    """

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

    def add(self, number: int, body: bytes, **fields) -> None:
        """One more post, the newest."""
        path = f"/images/7/{number}.png"
        self.files[path] = body
        self.posts.insert(0, dict(id=number, path=path) | fields)

    def requests(self, path: str) -> list[float]:
        return [moment for moment, asked in self.log if asked == path]

    def pictures(self) -> list[str]:
        return [path for _, path in self.log if path.startswith(("/images", "/samples"))]

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
        server.log.append((server.clock(), path))
        server.last_headers = dict(self.headers)
        with contextlib.suppress(OSError):
            if server.faults[path]:
                server.faults[path].pop(0)(self)
            elif path in server.always:
                server.always[path](self)
            elif path == "/robots.txt":
                self.answer(200 if server.robots is not None else 404, (server.robots or "").encode())
            elif path in ("/posts.json", "/post.json", "/index.php"):
                self.answer_search()
            elif path in server.files:
                self.answer(200, server.files[path], "image/png")
            else:
                self.answer(404)
        self.close_connection = True

    def answer_search(self):
        """What the family that owns the path answers, quirks included."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        danbooru, gelbooru = parts.path == "/posts.json", parts.path == "/index.php"
        self.server.searches.append(query["tags"])
        below = [int(word[4:]) for word in query["tags"].split() if word.startswith("id:<")]
        if danbooru and query.get("page", "").startswith("b"):
            below.append(int(query["page"][1:]))
        limit = min(self.server.page, int(query["limit"]), 200 if danbooru else 100)
        posts = [post for post in self.server.posts if all(post["id"] < number for number in below)][:limit]
        if gelbooru and not posts:
            return self.answer(200)  # no results: an empty body
        describe = self.danbooru if danbooru else self.gelbooru if gelbooru else self.moebooru
        page = [post["raw"] if "raw" in post else describe(post) for post in posts]
        self.answer(200, json.dumps(page).encode(), "application/json")

    def danbooru(self, post: dict) -> dict:
        raw = dict(id=post["id"], rating=post.get("rating", "g"), tag_string=post.get("tags", "1girl solo"))
        raw |= dict(tag_string_artist=post.get("artist", ""), source=post.get("source", ""))
        return raw | self.addresses(post, "large_file_url", post["path"])

    def moebooru(self, post: dict, rating: str = "s") -> dict:
        raw = dict(id=post["id"], rating=post.get("rating", rating), tags=post.get("tags", "smile"))
        return raw | dict(source=post.get("source", "")) | self.addresses(post, "sample_url", None)

    def gelbooru(self, post: dict) -> dict:
        return self.moebooru(post, "general")

    def addresses(self, post: dict, sample: str, usual: str | None) -> dict:
        """A post's file, unless it was deleted, and its sample, which is the `usual` one if it has none."""
        found = {} if post.get("deleted") else {"file_url": self.server.url + post["path"]}
        place = post.get("sample") or (usual if found else None)
        return found | ({sample: self.server.url + place} if place else {})

    def answer(self, status: int, body: bytes = b"", kind: str | None = "text/plain", **headers):
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
    return status(code, b"moved", Location=place)


def picture(body: bytes, **headers):
    return status(200, body, **({"kind": "image/png"} | headers))


def challenge(code: int):
    return status(code, b"<html>Just a moment", kind="text/html", Server="cloudflare", cf_mitigated="challenge")


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def short(handler):
    handler.answer(200, b"\x89PNG only the beginning", "image/png", Content_Length="5000")


def endless(handler):
    handler.answer(200, b"", "image/png", Content_Length=None)
    while True:
        handler.wfile.write(bytes(2**20))


def drip(handler):
    handler.answer(200, b"", "image/png", Content_Length="100000")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silence(handler):
    time.sleep(3)
