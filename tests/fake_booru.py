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
        self.log, self.faults, self.always, self.searches = [], defaultdict(list), {}, []
        self.stock(3)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stock(self, count: int, page: int = 100) -> None:
        """Let the site have these posts alone, so many on a page."""
        self.posts, self.files, self.page = [], {}, page
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
        if danbooru and "page" in query:
            below.append(int(query["page"].removeprefix("b")))
        limit = min(self.server.page, int(query["limit"]), 200 if danbooru else 100)
        posts = [post for post in self.server.posts if all(post["id"] < number for number in below)][:limit]
        if gelbooru and not posts:
            return self.answer(200)  # no results: an empty body
        page = [post["raw"] if "raw" in post else self.describe(post, danbooru, gelbooru) for post in posts]
        self.answer(200, json.dumps(page).encode(), "application/json")

    def describe(self, post: dict, danbooru: bool, gelbooru: bool) -> dict:
        """A post in its family's words. Danbooru gives a sample always, the others if it differs."""
        raw = dict(id=post["id"], rating="g" if danbooru else "general" if gelbooru else "s", source="")
        raw |= {key: post[key] for key in ("rating", "source") if key in post}
        raw["tag_string" if danbooru else "tags"] = post.get("tags", "1girl solo")
        raw |= dict(tag_string_artist=post.get("artist", "")) if danbooru else {}
        if post.get("deleted"):
            return raw
        sample = post.get("sample", post["path"] if danbooru else None)
        raw |= {"large_file_url" if danbooru else "sample_url": self.server.url + sample} if sample else {}
        return raw | {"file_url": self.server.url + post["path"]}

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


def picture(body: bytes, **headers):
    return status(200, body, **({"kind": "image/png"} | headers))


def challenge(code: int):
    return status(code, b"<html>Just a moment", kind="text/html", Server="cloudflare", cf_mitigated="challenge")


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stream(piece: bytes, pause: float = 0):
    """A picture without an end."""

    def play(handler):
        handler.answer(200, b"", "image/png", Content_Length=None)
        while True:
            handler.wfile.write(piece)
            time.sleep(pause)

    return play
