"""From an anime image site, a list of addresses or a folder of pictures to a folder of faces.

    python crawl_anime.py --limit 2000                        # faces from safebooru.org into data/anime
    python crawl_anime.py --site danbooru --tags "solo smile" # another site, another search, the same folder
    python crawl_anime.py --from-dir pictures                 # crop pictures that are on this disk already
    python crawl_anime.py --forget safebooru-123              # remove a post's crops, never fetch it again
    python dcgan.py --dataset anime                           # train on the result

A site's public API lists posts, newest first; each picture is fetched once, its faces are found by nagadomi's cascade
of local binary patterns, cut out as 256x256 squares and noted in metadata.csv: the credit list, the log and the place
to go on from, wherever a crawl was stopped. The pictures belong to the artists who drew them: keep the crops to
yourself, and take out what an artist asks you to.

The detector is OpenCV 4's detectMultiScale(equalizeHist(grey), 1.1, 5) in torch: on 79 illustrations of at most 1000
pixels it finds the same 48 faces (45 of them to the pixel), in 0.19 s of one core each. With 0.6 usable faces a
picture, as there, and a picture a second, 2,000 faces take about an hour.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import fnmatch
import functools
import hashlib
import http.client
import io
import ipaddress
import json
import os
import random
import re
import shlex
import socket
import sqlite3
import ssl
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, quote, quote_plus, unquote, urljoin, urlsplit
from xml.etree import ElementTree

import torch
from PIL import Image

import common

AGENT = "crawl_anime"  # the name that a robots.txt can address
USER_AGENT = f"{AGENT}/1.0 (face crops for a small generative model; at most one request a second)"
TRIES, REDIRECTS = 5, 5
FAILURES = 10  # without a success between them, after which the source counts as broken
POSTS_PER_FACE = 10  # a crawl ends after this many new posts for each face asked for
TIMEOUT, DEADLINE = 20, 120  # seconds: for one operation on a socket, and for a whole answer
PATIENCE = 600  # seconds that a Retry-After may ask for before the crawl ends instead
SLOWEST, GRACE = 2048, 10  # bytes a second that an answer must come at, but for its first seconds
MAX_BYTES, MAX_PIXELS = 20 * 2**20, 40_000_000
FORMATS, SUFFIXES = ["JPEG", "PNG", "WEBP", "GIF"], (".jpg", ".jpeg", ".png", ".webp", ".gif")
RATINGS = ("general", "sensitive", "questionable", "explicit")
FACELESS_TAGS = set("photo_(medium) 3d monochrome greyscale sketch lineart comic no_humans animated".split())
CASCADE_FILE = "data/lbpcascade_animeface.xml"
CASCADE_HOME = "https://raw.githubusercontent.com/nagadomi/lbpcascade_animeface"
CASCADE_URL = f"{CASCADE_HOME}/4433ab1ae1166ea75acfe99eb0f18709dac329a0/lbpcascade_animeface.xml"
CASCADE_SHA256 = "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30"
DETECTION_SIZE, SMALLEST_FACE = 1000, 48  # pixels: what pictures are shrunk to, and what the detector was measured with
# Crops under these are dropped, as none to 0.3 % of 3,000 faces of the usual data set would be: mean of the largest
# less the smallest channel (of 255), variance of the Laplacian at 64x64, bits of 64 in which two hashes differ.
GREYEST, BLURRIEST, NEAREST = 8, 100, 4


class SourceError(common.UserError):
    """The source refused or failed: ends the crawl with exit status 3."""

    status = 3


class Unusable(Exception):
    """A picture that can't be had or cropped, and why. `again`: another try may help; `status`: HTTP's, if any."""

    def __init__(self, reason: str, again: bool = False, status: int = 0):
        super().__init__(reason)
        self.again, self.status = again, status


# -------------------------------------------------------------------------------------------------- the sites


class Post(NamedTuple):
    """One picture of a source, whatever the source calls its fields. Texts are printable or empty."""

    site: str
    id: str
    page: str
    files: dict[str, str]  # address or path -> MD5 or "", the smallest that still gives good faces first
    artist: str = ""
    source: str = ""  # where the site has it from: often the artist's own page
    rating: str = ""
    unwanted: str = ""  # "rating", "tag" or "": why it is not worth a request


class Site(NamedTuple):
    """A site's addresses, and what its family of APIs calls things."""

    name: str
    home: str
    search: str  # path and query, with a place for the tags
    page: str  # path of a post's page, with a place for its id
    ratings: dict[str, str]  # all others are questionable
    general: str = ""  # a tag that asks for the general rating alone
    before: str = ""  # what a query ends with to go on below an id; without it, a tag says so
    tags: str = "1girl solo"

    def query(self, tags: str, below: int | None) -> str:
        """Paging by id instead of by number is never too deep, and posts that arrive meanwhile shift nothing."""
        if below and not self.before:
            tags = f"{tags} id:<{below}".strip()
        return self.search.format(quote_plus(tags)) + (self.before.format(below) if below else "")


GELBOORU = "/index.php?page=dapi&s=post&q=index&json=1&limit=100&pid=0&tags={}", "/index.php?page=post&s=view&id={}"
DANBOORU = "/posts.json?tags={}&limit=200", "/posts/{}", dict(zip("gsqe", RATINGS)), "rating:g", "&page=b{}"
MOEBOORU = "/post.json?tags={}&limit=100&page=1", "/post/show/{}", {"s": "general", "e": "explicit"}, "rating:s", "", ""
SITES = {
    "safebooru": Site("safebooru", "https://safebooru.org", *GELBOORU, dict(zip(RATINGS, RATINGS), safe="general")),
    "danbooru": Site("danbooru", "https://danbooru.donmai.us", *DANBOORU),
    "yandere": Site("yandere", "https://yande.re", *MOEBOORU),
    "konachan": Site("konachan", "https://konachan.net", *MOEBOORU),
}


def printable(text: object, length: int = 300) -> str:
    """Remote text made harmless for files of lines and for terminals: one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:length])


def read_post(site: Site, ratings: list[str], raw: object) -> Post | None:
    """A post from its JSON, in which any field may be missing or of another type; None without an id."""
    if not isinstance(raw, dict) or not re.fullmatch(r"[1-9]\d{0,15}", str(raw.get("id")), re.ASCII):
        return None
    texts = ((key, str(value)) for key, value in raw.items() if isinstance(value, str | int))
    field = collections.defaultdict(str, texts)
    sample, original = field["sample_url"] or field["large_file_url"], field["file_url"]
    if not original and field["directory"] and field["image"]:  # Gelbooru's older answers give only parts
        folder, image = quote(field["directory"]), quote(field["image"])
        original = f"/images/{folder}/{image}"
        sample = f"/samples/{folder}/sample_{image.rpartition('.')[0]}.jpg" if raw.get("sample") else ""
    files = {}
    for address, md5 in ((sample, ""), (original, field["md5"] or field["hash"])):  # the MD5 is the original's
        with contextlib.suppress(ValueError):  # an address that is none
            if urlsplit(address := urljoin(site.home + "/", address)).path.lower().endswith(SUFFIXES):
                files[address] = md5
    rating = site.ratings.get(field["rating"], "questionable")
    faceless = FACELESS_TAGS.intersection((field["tag_string"] or field["tags"]).split())
    unwanted = "rating" if rating not in ratings else "tag" if faceless else ""
    page, artist = site.home + site.page.format(field["id"]), printable(field["tag_string_artist"])
    return Post(site.name, field["id"], page, files, artist, printable(field["source"]), rating, unwanted)


def site_posts(fetcher: Fetcher, site: Site, tags: str, ratings: list[str]) -> Iterator[Post]:
    """All posts of a query, newest first, as far as the source goes."""
    below = None
    while True:
        try:
            body = fetcher.fetch(site.home + site.query(tags, below), is_picture=False)
            page = json.loads(body.strip() or "[]")
        except Unusable as error:
            raise SourceError(f"{site.home} refuses or fails: {error}") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{site.home} answers no JSON: it may be down, or no site of this kind") from error
        if not isinstance(page, list):
            message = page.get("message") or "an object instead of a list" if isinstance(page, dict) else page
            raise SourceError(f"{site.home} answers: {printable(message)}")
        if not page:
            return
        posts = [post for raw in page if (post := read_post(site, ratings, raw))]
        lowest = min((int(post.id) for post in posts), default=below)
        if not lowest or below and lowest >= below:
            raise SourceError(f"{site.home} gives the same posts again: it does not page by id")
        yield from posts
        below = lowest


def find_posts(args: argparse.Namespace) -> tuple[Fetcher | None, Iterable[Post]]:
    """Who fetches the pictures, unless they are on this disk, and all posts that the options ask for."""
    if args.from_dir:
        paths = [path for path in sorted(Path(args.from_dir).resolve().rglob("*")) if path.suffix.lower() in SUFFIXES]
        paths = [path for path in paths if Path(args.to).resolve() not in path.parents and path.is_file()]
        return None, [Post("file", digest(os.fsencode(path)), path.as_uri(), {str(path): ""}) for path in paths]
    if args.urls:
        lines = [line.strip() for line in Path(args.urls).read_text("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line and not line.startswith("#")]
        hosts = {host for line in lines for host in re.findall("^https://([^/:?#]+)", line.lower())}
        posts = [Post("url", digest(line.encode()), printable(line, 2000), {line: ""}) for line in lines]
        return Fetcher(hosts, args.base_url, args.delay), posts
    site = SITES[args.site]
    hosts = {urlsplit(site.home).hostname.removeprefix("danbooru.")}  # Danbooru's files are on cdn.donmai.us
    if args.base_url:
        name = re.sub(r"[^a-z0-9.]", "_", urlsplit(args.base_url).hostname)
        hosts, site = set(), site._replace(name=name, home=args.base_url)
    tags = site.tags if args.tags is None else args.tags
    tags = f"{tags} {site.general if args.rating == ['general'] else ''}".strip()
    fetcher = Fetcher(hosts, args.base_url, args.delay)
    return fetcher, site_posts(fetcher, site, tags, args.rating)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# ----------------------------------------------------------------------------------------- fetching, politely


class Fetcher:
    """Gets files under the rules of manners and safety, one request at a time.

    `hosts` are the source's own, with all below them; `base_url` names one more, which the user vouches for. `delay` is
    the time between the starts of two requests to a host, in seconds.
    """

    def __init__(self, hosts: set[str], base_url: str | None, delay: float):
        self.hosts, self.delay, self.bytes = hosts, delay, 0
        self.trusted = origin(urlsplit(base_url)) if base_url else None
        self.pace = collections.defaultdict(lambda: delay)  # seconds between two starts, by host
        self.next_start = collections.defaultdict(float)
        self.robots = functools.cache(self.fetch_robots)  # asked for once a host

    def fetch(self, address: str, is_picture: bool = True) -> bytes:
        """The body at an address. Raises Unusable, and SourceError for what ends the crawl. robots.txt holds for
        pictures, not for a documented API, made for programs with limits of its own, nor for the detector's one file.
        """
        for attempt in range(TRIES):
            try:
                return self.follow(address, is_picture)
            except Unusable as error:
                if not error.again or attempt == TRIES - 1:
                    raise
                pause = self.delay * 2**attempt * random.uniform(1, 2)
                self.hold(urlsplit(address).hostname, min(pause, PATIENCE))

    def follow(self, address: str, is_picture: bool) -> bytes:
        for _ in range(1 + REDIRECTS):
            parts = self.check(address)
            if is_picture and not allowed(self.robots(f"{parts.scheme}://{parts.netloc}"), parts):
                raise Unusable("robots.txt")
            answer = self.get(parts, is_picture)
            if isinstance(answer, bytes):
                return answer
            with contextlib.suppress(ValueError):  # then it is the same address again
                address = urljoin(address, answer)
        raise Unusable("too many redirects")

    def check(self, address: str) -> SplitResult:
        """The rule at every redirect: https, its usual port and one of the source's own hosts, or --base-url's."""
        try:
            parts = urlsplit(address)
            scheme, host, port = origin(parts)
        except ValueError as error:
            raise Unusable("not an address") from error
        if (scheme, host, port) == self.trusted:
            return parts
        if scheme != "https" or port != 443 or "@" in parts.netloc:
            raise Unusable("not an https address")
        if not any(f".{host}".endswith(f".{own}") for own in self.hosts):
            raise Unusable("on a foreign host")
        return parts

    def get(self, parts: SplitResult, is_picture: bool) -> bytes | str:
        """One request: the body, or where a redirect leads."""
        time.sleep(max(0.0, self.next_start[parts.hostname] - time.monotonic()))
        self.next_start[parts.hostname] = time.monotonic() + self.pace[parts.hostname]
        target = quote((parts.path or "/") + ("?" + parts.query if parts.query else ""), safe="/%:@!$&'()*+,;=~?[]")
        headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(contextlib.closing(self.connect(parts)))
                started, alarm = time.monotonic(), threading.Timer(DEADLINE, hang_up, [connection.sock])
                stack.callback(alarm.cancel)
                alarm.start()
                connection.request("GET", target, headers=headers)
                answer = self.read(stack.enter_context(connection.getresponse()), parts.hostname, is_picture)
                if time.monotonic() - started >= DEADLINE:  # what the alarm cut short can look whole
                    raise Unusable("too slow", again=True)
                return answer
        except ValueError as error:  # a host that can be no name
            raise Unusable("not an address") from error
        except (OSError, http.client.HTTPException) as error:
            raise Unusable(f"no answer ({type(error).__name__})", again=True) from error

    def connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        """A connection to the very address that was checked: looked up again, the name could lead elsewhere."""
        scheme, host, port = origin(parts)
        found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        public = [address.is_global and not address.is_multicast for address in map(ipaddress.ip_address, found)]
        if (scheme, host, port) != self.trusted and not all(public):
            raise Unusable("on a private network")
        connection = (http.client.HTTPConnection if scheme == "http" else http.client.HTTPSConnection)(host, port)
        for address in found:
            with contextlib.suppress(OSError):
                connection.sock = socket.create_connection((address, port), TIMEOUT)
                break
        else:
            raise ConnectionError
        if scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        return connection

    def read(self, response: http.client.HTTPResponse, host: str, is_picture: bool) -> bytes | str:
        """The body, as far as the status and the headers allow it, or where a redirect leads."""
        status, headers = response.status, response.headers
        if status in (301, 302, 303, 307, 308):
            return headers.get("Location", "")
        if status in (403, 503) and "challenge" in headers.get("cf-mitigated", ""):
            raise SourceError(f"{host} asks to prove that a person is there, and a program must not")
        if status in (421, 429, 503):
            self.pace[host] = max(self.delay, min(60, 2 * self.pace[host]))
            self.hold(host, retry_after(headers.get("Retry-After", "")))
        if status != 200:
            reason = f"HTTP {status}"
            if not is_picture:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # none is given
                    reason += f": {printable(json.loads(response.read(2000))['message'])}"
            raise Unusable(reason, again=status in (408, 421, 429) or status >= 500, status=status)
        self.pace[host] = max(self.delay, 0.95 * self.pace[host])
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Unusable("compressed, though not asked for")
        robots = " ".join(headers.get_all("X-Robots-Tag", [])) + " noai" * (headers.get("TDM-Reservation") == "1")
        if is_picture and re.search(r"\b(noai|noimageai|noml)\b", robots, re.IGNORECASE):
            raise Unusable("not for training (X-Robots-Tag)")
        kind = headers.get("Content-Type", "image/")
        if is_picture and not re.match(r"image/|application/octet-stream", kind, re.IGNORECASE):
            raise Unusable("not a picture")
        size, body, started = response.length or 0, bytearray(), time.monotonic()
        while size <= MAX_BYTES and (chunk := response.read1(65536)):
            body += chunk
            size = max(size, len(body))  # what was announced may be wrong, or nothing
            self.bytes += len(chunk)
            seconds = time.monotonic() - started
            if seconds > GRACE and len(body) / seconds < SLOWEST:
                raise Unusable("too slow", again=True)
        if size > MAX_BYTES:
            raise Unusable("more than 20 MiB")
        if len(body) < size:
            raise Unusable("broke off", again=True)
        return bytes(body)

    def hold(self, host: str, seconds: float) -> None:
        """No request to a host for a while."""
        if seconds > PATIENCE:
            pause = f"asks for a long pause ({seconds / 60:,.0f} minutes)"
            raise SourceError(f"{host} {pause}: the same command goes on later")
        self.next_start[host] = max(self.next_start[host], time.monotonic() + seconds)

    def fetch_robots(self, home: str) -> str:
        """A host's robots.txt, or what stands for one that isn't there or can't be had (RFC 9309, 2.3.1)."""
        try:
            return self.fetch(f"{home}/robots.txt", is_picture=False)[: 500 * 1024].decode("utf-8-sig", "replace")
        except Unusable as error:
            return "" if 400 <= error.status < 500 and not error.again else "User-agent: *\nDisallow: /"


def origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError."""
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)


def hang_up(connected: socket.socket) -> None:
    """End all waiting for a socket. SSLSocket's own shutdown would drop its state under the reader's feet."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def retry_after(text: str) -> float:
    """Seconds that a Retry-After of either form asks for; 0 without one."""
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return parsedate_to_datetime(text).timestamp() - time.time()
    return 0.0


def allowed(robots: str, parts: SplitResult) -> bool:
    """Whether a robots.txt lets this program, or else all programs, fetch an address (RFC 9309, 2.2). The longest rule
    that matches the path's beginning holds, of equals the friendlier; * is anything, a last $ is the path's end.
    """
    rules, agents, in_rules = [], [], False
    for line in robots.splitlines():
        key, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        if key.lower() == "user-agent":
            agents = ([] if in_rules else agents) + [value.partition("/")[0].lower()]
            rules.append((agents[-1], True, ""))  # without any other, all is allowed
            in_rules = False
        elif key.lower() in ("allow", "disallow"):
            rules += [(agent, key.lower() == "allow", unquote(value)) for agent in agents if value]
            in_rules = True
    path = unquote(parts.path or "/") + ("?" + unquote(parts.query) if parts.query else "")
    longest = (0, True)
    for _, allow, rule in [rule for rule in rules if rule[0] == AGENT] or [rule for rule in rules if rule[0] == "*"]:
        wildcards = (re.sub(r"[?[]", r"[\g<0>]", rule) + "*").removesuffix("$*")  # fnmatch has a meaning for ? and [
        if fnmatch.fnmatchcase(path, wildcards):
            longest = max(longest, (len(rule), allow))
    return longest[1]


# --------------------------------------------------------------------------- faces, in torch, and their crops


class Stage(NamedTuple):
    """Stumps that each look up a local binary pattern of 3x3 cells, whose 4x4 corners are in window pixels."""

    rows: torch.Tensor  # int32 (4, stumps)
    columns: torch.Tensor  # int32 (4, stumps)
    votes: torch.Tensor  # float64 (stumps, 256): what each pattern is worth
    threshold: float


@functools.lru_cache(maxsize=1)
def read_cascade(path: str) -> tuple[int, list[Stage]]:
    """The window's side in pixels and the stages of an OpenCV cascade's XML file. Raises UserError."""
    try:
        root = ElementTree.parse(path).getroot().find("cascade")
        rectangles = torch.tensor([[int(n) for n in r.text.split()] for r in root.iterfind("features/_/rect")])
        stages = []
        for stage in root.iterfind("stages/_"):
            nodes = torch.tensor([[int(n) for n in node.text.split()] for node in stage.iter("internalNodes")])
            leaves = torch.tensor([[float(n) for n in leaf.text.split()] for leaf in stage.iter("leafValues")])
            left, top, width, height = rectangles[nodes[:, 2]].T.int()  # of the first of the 3x3 cells
            steps = torch.arange(4, dtype=torch.int32)[:, None]
            inside = (nodes[:, 3:, None] >> torch.arange(32) & 1).flatten(1).bool()  # (stumps, 256)
            votes = torch.where(inside, leaves[:, :1], leaves[:, 1:]).double()
            threshold = float(stage.findtext("stageThreshold")) - 1e-5  # OpenCV's own slack
            stages.append(Stage(top + steps * height, left + steps * width, votes, threshold))
        return int(root.findtext("width")), stages
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise common.UserError(f"{path} can't be read as a cascade of LBP stumps: {error}") from error


def to_tensor(image: Image.Image) -> torch.Tensor:
    """int32 (H, W, 3), or (H, W, 1) of a grey image, in 0..255."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], -1).int()


def find_faces(image: Image.Image, cascade: tuple[int, list[Stage]], smallest: int) -> list[tuple[int, int, int]]:
    """Left, top and side of the faces of an RGB image, in pixels, none smaller than `smallest`."""
    weights = torch.tensor([4899, 9617, 1868], dtype=torch.int32)  # OpenCV's, of a sum of 2^14
    grey = ((to_tensor(image) * weights).sum(2, dtype=torch.int32) + 8192) >> 14  # (H, W)
    return merge(find_windows(equalize(grey), cascade, smallest))


def equalize(grey: torch.Tensor) -> torch.Tensor:
    """Histogram equalisation as OpenCV's: int32 (H, W) in 0..255, in and out."""
    counts = grey.flatten().bincount(minlength=256)
    counts[: grey.min() + 1] = 0
    rest = int(counts.sum())  # pixels that are not the darkest
    return (counts.cumsum(0).float() * (255 / rest)).round().int()[grey] if rest else grey


def shrink(grey: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear resizing in integers as OpenCV's INTER_LINEAR_EXACT: half-pixel centres, weights of 1/256."""

    def neighbours(source: int, target: int):
        place = ((torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5).clamp(0, source - 1)
        low = place.int()
        return low, (low + 1).clamp(max=source - 1), ((place - low) * 256).round().int()

    top, bottom, down = neighbours(grey.shape[0], height)
    left, right, across = neighbours(grey.shape[1], width)
    rows = grey[:, left] * (256 - across) + grey[:, right] * across  # (H, width)
    return (rows[top] * (256 - down)[:, None] + rows[bottom] * down[:, None] + 32768) >> 16  # (height, width)


def find_windows(grey: torch.Tensor, cascade: tuple[int, list[Stage]], smallest: int) -> list[tuple[int, int, int]]:
    """The windows that pass every stage, at all scales 1.1^k: left, top and side in pixels of `grey`."""
    (height, width), (window, stages) = grey.shape, cascade
    scales = [1.1**k for k in range(200) if smallest <= round(window * 1.1**k) <= min(height, width)]
    if not scales:
        return []
    # All levels lie one below the other on one canvas with one integral image: a stage runs once over all.
    levels = [shrink(grey, round(height / scale), round(width / scale)) for scale in scales]
    stride = levels[0].shape[1] + 1
    tops = torch.tensor([0] + [len(level) for level in levels]).cumsum(0)
    canvas = torch.zeros(int(tops[-1]) + 1, stride, dtype=torch.int32)
    places = []  # of the windows' top left corners in the flat canvas
    for scale, level, top in zip(scales, levels, tops.tolist()):
        canvas[top + 1 : top + 1 + level.shape[0], 1 : 1 + level.shape[1]] = level
        step = 1 if scale >= 2 else 2
        y, x = (torch.arange(0, side - window + 1, step, dtype=torch.int32) for side in level.shape)
        places.append(((top + y)[:, None] * stride + x).flatten())
    places = torch.cat(places)
    integral = canvas.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32).flatten()
    for stage in stages:
        places = places[stage_sums(stage, integral, stride, places) >= stage.threshold]
    y, x = places // stride, places % stride
    level = torch.bucketize(y, tops, right=True) - 1
    found = zip(x.tolist(), (y - tops[level]).tolist(), [scales[k] for k in level.tolist()])
    return [(round(x * scale), round(y * scale), round(window * scale)) for x, y, scale in found]


def stage_sums(stage: Stage, integral: torch.Tensor, stride: int, places: torch.Tensor) -> torch.Tensor:
    """The sum of a stage's votes for each window: float64 (windows,)."""
    corners = stage.rows[:, None] * stride + stage.columns  # (4, 4, stumps), places relative to a window's
    first = torch.arange(corners.shape[2], dtype=torch.int32)[:, None] * 256  # of each stump's votes, (stumps, 1)
    sums = []
    for some in places.split(2**19 // corners.numel() + 1):  # what a processor's cache holds
        values = integral.index_select(0, (corners[..., None] + some).flatten()).view(*corners.shape, -1)
        cells = values[1:, 1:] - values[:-1, 1:] - values[1:, :-1] + values[:-1, :-1]  # (3, 3, stumps, some)
        pattern = first
        # A bit for each neighbour that is at least the centre, clockwise from the top left (Liao 2007).
        for bit, cell in enumerate([(1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]):
            pattern = pattern + ((cells[cell] >= cells[1, 1]).int() << bit)
        sums.append(stage.votes.flatten()[pattern].sum(0))
    return torch.cat(sums)


def merge(windows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """OpenCV's groupRectangles with more than 5 neighbours: the means of clusters of similar windows."""

    def similar(a, b):
        slack = 0.2 * min(a[2], b[2])
        return all(abs(a[i] - b[i]) <= slack and abs(a[i] + a[2] - b[i] - b[2]) <= slack for i in (0, 1))

    def inside(a, b):
        slack = round(0.2 * b[2])
        return all(b[i] - slack <= a[i] and a[i] + a[2] <= b[i] + b[2] + slack for i in (0, 1))

    clusters: list[list] = []
    for window in windows:
        near = [cluster for cluster in clusters if any(similar(window, other) for other in cluster)]
        clusters = [cluster for cluster in clusters if cluster not in near] + [sum(near, [window])]
    strong = [(*(round(sum(v) / len(c)) for v in zip(*c)), len(c)) for c in clusters if len(c) > 5]
    return [a[:3] for a in strong if not any(a is not b and b[3] > max(3, a[3]) and inside(a, b) for b in strong)]


class Crop(NamedTuple):
    jpeg: bytes
    box: tuple[int, int, int]  # left, top and side of the face in the picture, pixels
    hash: int  # a difference hash: whether each of 8x8 grey areas is darker than the next one to the right
    flaw: str  # "grey", "blurred" or ""


def crop_faces(picture: bytes | str, cascade: str | None, min_face: int, margin: float) -> list[Crop]:
    """The faces of a picture (bytes or a path), or its centre square without a cascade. Raises Unusable."""
    image = decode(picture)
    if cascade:
        scale = min(1.0, DETECTION_SIZE / max(image.size))
        small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
        found = find_faces(small, read_cascade(cascade), max(SMALLEST_FACE, round(min_face * scale)))
        return [cut(image, tuple(round(value / scale) for value in box), margin) for box in sorted(found)]
    side = min(image.size)
    box = (image.width - side) // 2, (image.height - side) // 2, side
    return [cut(image, box, 1)] if side >= min_face else []


def decode(picture: bytes | str) -> Image.Image:
    """RGB, upright, on white. Raises Unusable."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns from here on, and refuses from twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS)
            image.load()  # before anything else, which might forgive a broken file
            return common.to_rgb(image)
    except Image.DecompressionBombError as error:
        raise Unusable("more than 40 million pixels") from error
    except Exception as error:  # decoders of broken files raise anything
        raise Unusable("not a whole picture") from error


def cut(image: Image.Image, box: tuple[int, int, int], margin: float) -> Crop:
    """A square around a face, a little higher; at the picture's edges it is moved, then shrunk, never padded."""
    left, top, face = box
    side = min(round(margin * face), *image.size)
    raised = 0.1 * face if margin > 1 else 0
    left = min(max(round(left + face / 2 - side / 2), 0), image.width - side)
    top = min(max(round(top + face / 2 - raised - side / 2), 0), image.height - side)
    crop = image.resize((256, 256), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    crop.save(jpeg := io.BytesIO(), "JPEG", quality=95)
    grey = to_tensor(crop.convert("L").resize((9, 8), Image.Resampling.BOX))[..., 0]
    bits = (grey[:, :-1] < grey[:, 1:]).flatten().tolist()
    return Crop(jpeg.getvalue(), box, sum(bit << place for place, bit in enumerate(bits)), flaw(crop))


def flaw(crop: Image.Image) -> str:
    """Why a crop is of no use, or nothing: too little colour, or too few edges, at the 64x64 of training."""
    small = crop.resize((64, 64), Image.Resampling.LANCZOS)
    pixels, grey = to_tensor(small).float(), to_tensor(small.convert("L"))[..., 0].float()  # (64, 64, 3), (64, 64)
    if (pixels.amax(2) - pixels.amin(2)).mean() < GREYEST:
        return "grey"
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return "blurred" if laplacian.clamp(-128, 127).var(correction=0) < BLURRIEST else ""


# ----------------------------------------------------------------------------------- the folder and its state


class Folder:
    """A folder of crops with its metadata.csv: a row a post, of which the last one holds.

    outcome: "faces" (at least one crop), "none" (no crop, for the reason), "skipped" (not to be had or used), "failed"
    (worth a try in another crawl) or "forgotten". Crops are on the disk before their row is.
    """

    FIELDS = ("site", "id", "page", "artist", "source", "rating", "outcome", "reason", "crops", "boxes", "hashes")

    def __init__(self, path: str):
        self.path, self.table = Path(path), Path(path, "metadata.csv")
        for leftover in (*self.path.glob(".*-*.jpg.*.tmp"), *self.path.glob(".metadata.csv.*.tmp")):
            leftover.unlink()  # of a crawl that was killed while it wrote
        if not self.table.exists():
            self.replace([])
        data = self.table.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # without a row that a kill or a full disk tore
        try:
            rows = list(reader := csv.DictReader(io.StringIO(whole.decode())))
            if tuple(reader.fieldnames or ()) != self.FIELDS or any(None in (*row, *row.values()) for row in rows):
                raise ValueError("other columns")
        except (csv.Error, ValueError) as error:
            raise common.UserError(f"{self.table} is damaged or another's ({error}): move it away") from error
        os.truncate(self.table, len(whole))
        self.rows = {(row["site"], row["id"]): row for row in rows}
        self.hashes = [int(word, 16) for row in self.rows.values() for word in row["hashes"].split()]
        self.faces = sum(len(row["crops"].split()) for row in self.rows.values())

    def replace(self, rows: Iterable[dict]) -> None:
        with common.replacing(self.table) as temporary:
            self.append(temporary, rows)

    def append(self, path: Path, rows: Iterable[dict]) -> None:
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.FIELDS, extrasaction="ignore", lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def knows(self, post: Post) -> bool:
        return self.rows.get((post.site, post.id), {}).get("outcome", "failed") != "failed"

    def add(self, post: Post, outcome: str, reason: str, crops: list[Crop]) -> list[str]:
        """Save a post's crops, then its row. Returns why it, or some of its crops, was dropped."""
        kept, dropped = {}, []
        for crop in crops:
            near = any((crop.hash ^ known).bit_count() <= NEAREST for known in self.hashes)
            if why := crop.flaw or ("near-duplicate" if near else ""):
                dropped.append(why)
                continue
            name = f"{post.site}-{post.id}-{len(kept)}.jpg"
            with common.replacing(self.path / name) as temporary:
                temporary.write_bytes(crop.jpeg)
            kept[name] = crop
            self.hashes.append(crop.hash)
        if outcome == "faces" and not kept:
            outcome, reason = "none", ", ".join(dict.fromkeys(dropped)) or "no face"
        boxes = " ".join(",".join(map(str, crop.box)) for crop in kept.values())
        hashes = " ".join(f"{crop.hash:016x}" for crop in kept.values())
        result = dict(outcome=outcome, reason=reason, crops=" ".join(kept), boxes=boxes, hashes=hashes)
        self.rows[post.site, post.id] = post._asdict() | result
        self.append(self.table, [self.rows[post.site, post.id]])
        self.faces += len(kept)
        return dropped or ([reason] if reason else [])

    def forget(self, names: list[tuple[str, str]]) -> int:
        """Mark posts as never to be fetched, then delete their crops; returns how many."""
        self.rows |= {(site, id): dict(site=site, id=id, outcome="forgotten") for site, id in names}
        self.replace(self.rows.values())
        crops = [path for site, id in names for path in self.path.glob(f"{site}-{id}-*.jpg")]
        for path in crops:
            path.unlink()
        return len(crops)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other crawls out of a folder: SQLite locks files on every system, and a killed process lets go of them."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = sqlite3.connect(folder / ".lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        why = f"another crawl writes to {folder}, or nobody can ({error})"
        raise common.UserError(f"{why}: wait, or choose another --to") from error
    with contextlib.closing(lock):
        yield


# ---------------------------------------------------------------------------------------------------- a crawl


def crawl(args: argparse.Namespace) -> None:
    """From the options to a folder of crops."""
    with locked(Path(args.to)):
        folder = Folder(args.to)
        if args.forget:
            print(f"{AGENT}: {len(args.forget)} posts forgotten, {folder.forget(args.forget)} crops deleted")
            return
        fetcher, posts = find_posts(args)
        how = (find_cascade(args.cascade) if args.detector == "lbp" else None, args.min_face, args.margin)
        print(f"{AGENT}: {args.to} has {folder.faces:,} faces of {len(folder.rows):,} posts", flush=True)
        new = (post for post in posts if not folder.knows(post))
        # Pictures are fetched one at a time, so that a killed crawl has fetched at most one in vain.
        results = common.map_in_processes(crop_post, new, 0 if fetcher else len(posts) // 8, fetcher, how)
        end = collect(results, folder, args.limit, 0 if args.limit else len(posts), fetcher)
        print(f"{AGENT}: reached {end}: {folder.faces:,} faces in {args.to}, credits in {folder.table}")
        name = "anime" if Path(args.to).resolve() == Path("data/anime").resolve() else shlex.quote(args.to)
        advice = f"next: python dcgan.py --dataset {name}" if folder.faces else "no face yet: try other --tags"
        print(f"{AGENT}: {advice}")


def crop_post(post: Post, fetcher: Fetcher | None, how: tuple) -> tuple:
    """A post with its outcome, reason and crops: what Folder.add takes."""
    if fetcher is None:
        torch.set_num_threads(1)  # more would be no faster, and a folder's pictures have a process on every core
    try:
        return post, "faces", "", crop_faces(fetch_picture(post, fetcher) if fetcher else next(iter(post.files)), *how)
    except Unusable as error:
        failed = error.again or error.status in (401, 403)
        return post, "failed" if failed else "skipped", str(error), []


def fetch_picture(post: Post, fetcher: Fetcher) -> bytes:
    """The first of a post's files that is there. Raises Unusable."""
    missing = Unusable(post.unwanted or "no picture")
    for address, md5 in () if post.unwanted else post.files.items():
        try:
            body = fetcher.fetch(address)
        except Unusable as error:
            if error.status not in (404, 410):
                raise
            missing = error
        else:
            if len(md5) == 32 and hashlib.md5(body, usedforsecurity=False).hexdigest() != md5.lower():
                raise Unusable("damaged: another MD5")
            return body
    raise missing


def collect(results: Iterator, folder: Folder, limit: int | None, total: int, fetcher: Fetcher | None) -> str:
    """Save results up to the limit of faces, with a line of progress; returns what ended it."""
    before, new, failures, counts = folder.faces, 0, 0, collections.Counter()
    progress = common.Progress(max(0, limit - before) if limit else total, "faces" if limit else "pictures")

    def summary() -> str:
        text = f"{folder.faces - before:,} faces of {new:,} posts"
        text += f", {fetcher.bytes / 1e6:.1f} MB" if fetcher else ""
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        return f"{text}; skipped: {skipped}" if skipped else text

    try:
        while not limit or folder.faces < limit:
            if limit and new >= POSTS_PER_FACE * limit:
                return f"{POSTS_PER_FACE} posts for each face asked for"
            if not (result := next(results, None)):
                return "the end of the source"
            new += 1
            counts.update(folder.add(*result))
            progress.update(folder.faces - before if limit else new, "· " + summary())
            failures = {"failed": failures + 1, "faces": 0}.get(result[1], failures)
            if failures == FAILURES:
                raise SourceError(f"{failures} pictures did not come, and none between them did ({result[2]})")
        return "the limit"
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on from here") from None
    finally:
        results.close()
        progress.close(f"{AGENT}: {summary()}")


def find_cascade(path: str | None) -> str:
    """The detector's file: the given one, or the author's own, downloaded once and checked."""
    if path:
        read_cascade(path)
        return path
    if not Path(CASCADE_FILE).exists():
        print(f"{AGENT}: downloading the face detector (MIT licence, nagadomi) to {CASCADE_FILE}", flush=True)
        try:
            data = Fetcher({urlsplit(CASCADE_URL).hostname}, None, 1.0).fetch(CASCADE_URL, is_picture=False)
        except Unusable as error:
            way_out = f"put {CASCADE_URL} into {CASCADE_FILE}, or try --detector none"
            raise SourceError(f"the face detector can't be had ({error}): {way_out}") from error
        with common.replacing(CASCADE_FILE) as temporary:
            temporary.write_bytes(data)
    if hashlib.sha256(Path(CASCADE_FILE).read_bytes()).hexdigest() != CASCADE_SHA256:
        raise common.UserError(f"{CASCADE_FILE} is not the author's: delete it, and it is downloaded again")
    return CASCADE_FILE


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(f"{AGENT}.py", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--site", choices=list(SITES), help="whose posts to look through (safebooru)")
    add("--tags", help="the site's search (1girl solo; all for yandere and konachan)")
    add("--urls", metavar="FILE", help="a list of picture addresses, one a line, instead of a site")
    add("--from-dir", metavar="DIR", help="a folder of pictures instead of a site")
    add("--base-url", type=web_address, metavar="URL", help="another host that speaks the site's API")
    add("--to", metavar="DIR", default="data/anime", help="folder of the crops (data/anime)")
    add("--limit", type=common.number(int, 1), metavar="N", help="faces in the folder at the end (2000 from a site)")
    ratings = f"what to take of {', '.join(RATINGS)} (general)"
    add("--rating", nargs="+", choices=RATINGS, default=["general"], metavar="RATING", help=ratings)
    add("--detector", choices=["lbp", "none"], default="lbp", help="find faces, or take the centre square (lbp)")
    add("--cascade", metavar="FILE", help=f"the detector's file, downloaded when absent ({CASCADE_FILE})")
    add("--min-face", type=common.number(int, 24), default=64, metavar="PIXELS", help="smallest face's side (64)")
    margins, pauses = common.number(float, 1, 4), common.number(float, 0)
    add("--margin", type=margins, default=1.5, metavar="RATIO", help="the crop's side in face sides (1.5)")
    add("--delay", type=pauses, default=1.0, metavar="SECONDS", help="between two requests to a host (1)")
    add("--forget", type=post_name, nargs="+", metavar="ID", help="delete these posts' crops, never fetch them again")
    args = parser.parse_args(argv)
    args.script = AGENT
    if sum(map(bool, (args.site, args.urls, args.from_dir))) > 1:
        parser.error("--site, --urls and --from-dir exclude each other")
    if (args.from_dir and args.base_url) or ((args.from_dir or args.urls) and args.tags is not None):
        parser.error("--tags goes with --site alone, --base-url with --site and --urls")
    if args.from_dir and not Path(args.from_dir).is_dir():
        parser.error(f"--from-dir {args.from_dir}: no such folder")
    if args.tags and re.search(r"(^|\s)-?(order|sort|id):", args.tags):
        parser.error("--tags: order:, sort: and id: can't be used, since the crawl itself goes by id")
    if args.delay < 1 and urlsplit(args.base_url or "").hostname not in ("localhost", "127.0.0.1", "::1"):
        parser.error("--delay: at least a second between two requests; less is for a --base-url on this machine")
    args.site, args.limit = args.site or "safebooru", args.limit or (None if args.urls or args.from_dir else 2000)
    args.forget = [(site or args.site, id) for site, id in args.forget or ()]
    return args


def web_address(text: str) -> str:
    """An argparse type: an http or https address without its last slash. Raises ValueError."""
    scheme, host, _ = origin(urlsplit(text))
    if scheme not in ("http", "https") or not host:
        raise ValueError(text)
    return text.rstrip("/")


def post_name(text: str) -> tuple[str, str]:
    """Site (if it is named) and id from "safebooru-123-0.jpg", "safebooru-123" or "123"."""
    found = re.fullmatch(r"(?:([a-z0-9._]+)-)?([0-9a-f]{1,16})(?:-\d+\.jpg)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no crop's file name, SITE-ID or ID of the --site")
    return found.groups()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    common.run_command(crawl, args)


if __name__ == "__main__":
    main()
