"""From an anime image site, a list of addresses or a folder of pictures to a folder of faces.

    python crawl_anime.py --limit 2000                        # faces from safebooru.org into data/anime
    python crawl_anime.py --site danbooru --tags "solo smile" # another site, another search, the same folder
    python crawl_anime.py --from-dir pictures                 # crop pictures that are on this disk already
    python crawl_anime.py --forget safebooru-123              # remove a post's crops, never fetch it again
    python dcgan.py --dataset anime                           # train on the result

Each picture is fetched once, its faces are cut out as 256x256 squares and noted in metadata.csv: the credit list, the
log and the place to go on from. The pictures belong to the artists who drew them: keep the crops to yourself, and take
out what an artist asks you to. The detector is OpenCV 4's detectMultiScale(equalizeHist(grey), 1.1, 5) in torch: on 79
illustrations of at most 1000 pixels it finds the same 48 faces (45 of them to the pixel), in 0.19 s of one core each
(AMD EPYC, Zen 4).
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pillow>=10.1"]
# ///

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
from torch import Tensor

import common

AGENT = "crawl_anime"  # the name that a robots.txt can address
TRIES, REDIRECTS = 5, 5
FAILURES = 10  # without a success between them, after which the source counts as broken
POSTS_PER_FACE = 10  # a crawl ends after this many new posts for each face asked for
TIMEOUT, DEADLINE, PATIENCE = 20, 120, 600  # seconds: for a wait, for an answer, and that Retry-After may ask for
SLOWEST, GRACE = 2048, 10  # bytes a second that an answer must come at, but for its first seconds
MAX_BYTES, MAX_PIXELS = 20 * 2**20, 40_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
FIELDS = "site id page artist source rating outcome reason crops boxes hashes".split()
RATINGS = ("general", "sensitive", "questionable", "explicit")
FACELESS_TAGS = set("photo_(medium) 3d monochrome greyscale sketch lineart comic no_humans animated".split())
CASCADE_FILE = "data/lbpcascade_animeface.xml"
CASCADE_HOME = "https://raw.githubusercontent.com/nagadomi/lbpcascade_animeface"
CASCADE_URL = f"{CASCADE_HOME}/4433ab1ae1166ea75acfe99eb0f18709dac329a0/lbpcascade_animeface.xml"
CASCADE_SHA256 = "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30"


class SourceError(common.UserError):
    status = 3  # the source refused or failed, which ends the crawl


class Unusable(Exception):
    """A picture that can't be had or cropped, and why. `again`: another try may help; `status`: HTTP's, if any."""

    def __init__(self, reason: str, again: bool = False, status: int = 0):
        super().__init__(reason)
        self.again, self.status = again, status


# -------------------------------------------------------------------------------------------------- the sites


class Site(NamedTuple):
    """A site's address, and what its family of APIs calls things."""

    name: str
    home: str
    search: str  # path and query, with a place for the tags
    page: str  # path of a post's page, with a place for its id
    ratings: dict[str, str]  # all others are questionable
    general: str = ""  # a tag that asks for the general rating alone
    below: str = ""  # what a query ends with to go on below an id; without it, a tag says so
    tags: str = "1girl solo"

    def query(self, tags: str, below: int | None) -> str:
        """Paging by id instead of by number is never too deep, and posts that arrive meanwhile shift nothing."""
        if below and not self.below:
            tags = f"{tags} id:<{below}".strip()
        return self.search.format(quote_plus(tags)) + (self.below.format(below) if below else "")


GELBOORU = "/index.php?page=dapi&s=post&q=index&json=1&limit=100&pid=0&tags={}", "/index.php?page=post&s=view&id={}"
DANBOORU = "/posts.json?tags={}&limit=200", "/posts/{}", dict(zip("gsqe", RATINGS)), "rating:g", "&page=b{}"
MOEBOORU = "/post.json?tags={}&limit=100&page=1", "/post/show/{}", {"s": "general", "e": "explicit"}, "rating:s", "", ""
SITES = {
    "safebooru": Site("safebooru", "https://safebooru.org", *GELBOORU, dict(zip(RATINGS, RATINGS), safe="general")),
    "danbooru": Site("danbooru", "https://danbooru.donmai.us", *DANBOORU),
    "yandere": Site("yandere", "https://yande.re", *MOEBOORU),
    "konachan": Site("konachan", "https://konachan.net", *MOEBOORU),
}


def site_posts(fetcher: "Fetcher", site: Site, tags: str, ratings: list[str]) -> Iterator[dict]:
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
        lowest = min((int(post["id"]) for post in posts), default=None)
        if not lowest or below and lowest >= below:
            raise SourceError(f"{site.home} gives the same posts again: it does not page by id")
        yield from posts
        below = lowest


def read_post(site: Site, ratings: list[str], raw: object) -> dict | None:
    """The beginning of a row of metadata.csv, from JSON in which anything may be missing or of another type; None
    without an id. Its reason says why the post is not worth a request; its files are address -> MD5 or "", the smallest
    that still gives good faces first.
    """
    items = raw.items() if isinstance(raw, dict) else ()
    field = collections.defaultdict(str, {key: str(value) for key, value in items if isinstance(value, str | int)})
    if not re.fullmatch(r"[1-9]\d{0,15}", field["id"], re.ASCII):
        return None
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
    reason = "rating" if rating not in ratings else "tag" if faceless else "" if files else "no picture"
    names = dict(site=site.name, id=field["id"], page=site.home + site.page.format(field["id"]))
    credit = dict(artist=printable(field["tag_string_artist"]), source=printable(field["source"]))
    return names | credit | dict(rating=rating, reason=reason, files=files)


def printable(text: object, length: int = 300) -> str:
    """Remote text made harmless for files of lines and for terminals: one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:length])


# ----------------------------------------------------------------------------------------- fetching, politely


class Fetcher:
    """Gets files by the rules of manners and safety, one at a time: from `hosts`, which are the source's own, and all
    below them, and from `base_url`, which the user vouches for, with at least `delay` seconds between two starts.
    """

    def __init__(self, hosts: set[str], base_url: str | None, delay: float):
        self.hosts, self.base_url, self.delay = hosts, base_url, delay
        self.pace, self.next_start, self.bytes = delay, 0.0, 0
        self.robots = functools.cache(self.fetch_robots)  # asked for once a host

    def fetch(self, address: str, is_picture: bool = True) -> bytes:
        """The body at an address. Raises Unusable, and SourceError for what ends the crawl. robots.txt holds for
        pictures, not for a documented API, made for programs with limits of its own, nor for the detector's one file.
        """
        for attempt in range(TRIES):
            try:
                return self.get(address, is_picture)
            except Unusable as error:
                if not error.again or attempt == TRIES - 1:
                    raise
                pause = self.delay * 2**attempt * random.uniform(1, 2)
                self.next_start = max(self.next_start, time.monotonic() + pause)

    def get(self, address: str, is_picture: bool, redirects: int = 0) -> bytes:
        """One try: each address that it leads through has to pass all rules."""
        try:
            parts, trusted = self.check(address)
            path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
            if is_picture and not allowed(self.robots(f"{parts.scheme}://{parts.netloc}"), path):
                raise Unusable("robots.txt")
            time.sleep(max(0.0, self.next_start - time.monotonic()))
            self.next_start = time.monotonic() + self.pace
            with ask(parts, trusted, path) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    self.judge(response, parts.hostname, is_picture)
                    self.bytes += len(body := response.read())
                    return body
        except http.client.IncompleteRead as error:
            raise Unusable("broke off", again=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unusable(f"no answer ({type(error).__name__})", again=True) from error
        except ValueError as error:  # after OSError: a certificate that does not hold is both
            raise Unusable("not an address") from error
        if redirects == REDIRECTS:
            raise Unusable("too many redirects")
        with contextlib.suppress(ValueError):  # then it is the same address again
            address = urljoin(address, response.headers.get("Location", ""))
        return self.get(address, is_picture, redirects + 1)

    def check(self, address: str) -> tuple[SplitResult, bool]:
        """An address's parts, and whether it is --base-url's. All others are on the source's own hosts, by https."""
        parts = urlsplit(address)
        scheme, host, port = origin(parts)
        trusted = bool(self.base_url) and (scheme, host, port) == origin(urlsplit(self.base_url))
        is_https = scheme == "https" and port == 443 and "@" not in parts.netloc
        if not trusted and not is_https:
            raise Unusable("not an https address")
        if not trusted and not any(f".{host}".endswith(f".{own}") for own in self.hosts):
            raise Unusable("on a foreign host")
        return parts, trusted

    def judge(self, response: http.client.HTTPResponse, host: str, is_picture: bool) -> None:
        """Raises for a status or a header that says no, and slows down when asked to."""
        status, headers = response.status, response.headers
        if status in (403, 503) and "challenge" in headers.get("cf-mitigated", ""):
            raise SourceError(f"{host} asks to prove that a person is there, and a program must not")
        if status in (421, 429, 503):
            self.pace = max(self.delay, min(60, 2 * self.pace))
            pause, wish = 0.0, headers.get("Retry-After", "")
            with contextlib.suppress(ValueError, TypeError, OverflowError):  # nonsense, or none is given
                pause = float(wish) if wish.isdecimal() else parsedate_to_datetime(wish).timestamp() - time.time()
            if pause > PATIENCE:
                raise SourceError(f"{host} asks for a long pause ({pause / 60:,.0f} minutes): go on later")
            self.next_start = max(self.next_start, time.monotonic() + pause)
        if status != 200:
            reason = f"HTTP {status}"
            if not is_picture:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # none is given
                    reason += f": {printable(json.loads(response.read(2000))['message'])}"
            raise Unusable(reason, again=status in (408, 421, 429) or status >= 500, status=status)
        self.pace = max(self.delay, 0.95 * self.pace)
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Unusable("compressed, though not asked for")
        wishes = " ".join(headers.get_all("X-Robots-Tag", [])) + " noai" * (headers.get("TDM-Reservation") == "1")
        if is_picture and re.search(r"(?i)\b(noai|noimageai|noml)\b", wishes):
            raise Unusable("not for training (X-Robots-Tag)")
        if is_picture and not re.match(r"(?i)image/|application/octet-stream", headers.get("Content-Type", "image/")):
            raise Unusable("not a picture")
        if (response.length or 0) > MAX_BYTES:
            raise Unusable("more than 20 MiB")

    def fetch_robots(self, home: str) -> str:
        """A host's robots.txt, or what stands for one that isn't there or can't be had (RFC 9309, 2.3.1)."""
        try:
            return self.fetch(f"{home}/robots.txt", is_picture=False)[: 500 * 1024].decode("utf-8-sig", "replace")
        except Unusable as error:
            return "" if 400 <= error.status < 500 and not error.again else "User-agent: *\nDisallow: /"


def origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError."""
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@contextlib.contextmanager
def ask(parts: SplitResult, trusted: bool, path: str) -> Iterator[http.client.HTTPResponse]:
    """One request, whose answer's body is still to be read. The connection is made to the very address that was
    checked: looked up again, the name could lead elsewhere.
    """
    scheme, host, port = origin(parts)
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    public = [address.is_global and not address.is_multicast for address in map(ipaddress.ip_address, found)]
    if not trusted and not all(public):
        raise Unusable("on a private network")
    for address in found:
        with contextlib.suppress(OSError):
            connected = socket.create_connection((address, port), TIMEOUT)
            break
    else:
        raise ConnectionError
    if scheme == "https":
        connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
    agent = f"{AGENT}/1.0 (face crops for a small generative model; at most one request a second)"
    headers = {"User-Agent": agent, "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
    with connected:
        connection = http.client.HTTPConnection(parts.netloc)
        connection.sock = connected
        connection.request("GET", quote(path, safe="/%:@!$&'()*+,;=~?[]"), headers=headers)
        with http.client.HTTPResponse(Stream(connected), method="GET") as response:
            response.begin()
            yield response


class Stream(io.RawIOBase):
    """What a socket receives, as long as it is not too slow, too long or too much."""

    def __init__(self, connected: socket.socket):
        self.connected, self.started, self.size = connected, time.monotonic(), 0

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        seconds = time.monotonic() - self.started
        if seconds >= DEADLINE or seconds > GRACE and self.size < SLOWEST * seconds:
            raise Unusable("too slow", again=True)
        self.connected.settimeout(min(TIMEOUT, DEADLINE - seconds))
        received = self.connected.recv_into(buffer)
        self.size += received
        if self.size > MAX_BYTES + 2**16:  # the headers count as well
            raise Unusable("more than 20 MiB")
        return received


def allowed(robots: str, path: str) -> bool:
    """Whether a robots.txt lets this program, or else all programs, fetch a path (RFC 9309, 2.2). The longest rule that
    matches the path's beginning holds, of equals the friendlier; * is anything, a last $ is the path's end.
    """
    groups, agents, in_rules = {}, [], False
    for line in robots.splitlines():
        key, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        if key.lower() == "user-agent":
            agents = ([] if in_rules else agents) + [groups.setdefault(value.partition("/")[0].lower(), [])]
            in_rules = False
        elif key.lower() in ("allow", "disallow"):
            in_rules = True
            for rules in agents:
                rules.append((unquote(value), key.lower() == "allow"))
    longest = (0, True)
    for rule, allow in groups.get(AGENT, groups.get("*", [])):
        wildcards = (re.sub(r"[?[]", r"[\g<0>]", rule) + "*").removesuffix("$*")  # fnmatch has a meaning for ? and [
        if rule and fnmatch.fnmatchcase(unquote(path), wildcards):
            longest = max(longest, (len(rule), allow))
    return longest[1]


# --------------------------------------------------------------------------- faces, in torch, and their crops


@functools.lru_cache(maxsize=1)
def read_cascade(path: str) -> tuple[int, list[tuple]]:
    """An OpenCV cascade's window side in pixels and its stages of stumps. Raises UserError.

    A stump looks up what the local binary pattern of 3x3 cells is worth. A stage is the rows and the columns of the
    cells' 4x4 corners, in window pixels, int32 (4, stumps); votes, float64 (stumps, 256); and their least sum.
    """
    try:
        root, stages, steps = ElementTree.parse(path).getroot().find("cascade"), [], torch.arange(4).int()[:, None]
        rectangles = torch.tensor([[int(n) for n in r.text.split()] for r in root.iterfind("features/_/rect")])
        for stage in root.iterfind("stages/_"):
            nodes = torch.tensor([[int(n) for n in node.text.split()] for node in stage.iter("internalNodes")])
            leaves = torch.tensor([[float(n) for n in leaf.text.split()] for leaf in stage.iter("leafValues")])
            left, top, width, height = rectangles[nodes[:, 2]].T.int()  # of the first of the 3x3 cells
            inside = (nodes[:, 3:, None] >> torch.arange(32) & 1).flatten(1).bool()  # (stumps, 256)
            votes = torch.where(inside, leaves[:, :1], leaves[:, 1:]).double()
            threshold = float(stage.findtext("stageThreshold")) - 1e-5  # OpenCV's own slack
            stages.append((top + steps * height, left + steps * width, votes, threshold))
        return int(root.findtext("width")), stages
    except Exception as error:  # a file can be wrong in any way
        raise common.UserError(f"{path} can't be read as a cascade of LBP stumps: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """int32 (H, W, 3), or (H, W, 1) of a grey image, in 0..255."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size[::-1], -1).int()


def find_faces(image: Image.Image, cascade: tuple[int, list[tuple]], smallest: int) -> list[tuple[int, int, int]]:
    """Left, top and side of the faces of an RGB image, in pixels, none smaller than `smallest`."""
    weights = torch.tensor([4899, 9617, 1868], dtype=torch.int32)  # OpenCV's, of a sum of 2^14
    grey = ((to_tensor(image) * weights).sum(2, dtype=torch.int32) + 8192) >> 14  # (H, W)
    return merge(find_windows(equalize(grey), cascade, smallest))


def equalize(grey: Tensor) -> Tensor:
    """Histogram equalisation as OpenCV's: int32 (H, W) in 0..255, in and out."""
    counts = grey.flatten().bincount(minlength=256)
    counts[: grey.min() + 1] = 0
    rest = int(counts.sum())  # pixels that are not the darkest
    return (counts.cumsum(0).float() * (255 / rest)).round().int()[grey] if rest else grey


def shrink(grey: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resizing in integers as OpenCV's INTER_LINEAR_EXACT: half-pixel centres, weights of 1/256."""
    for side in (height, width):  # (H, W) -> (W, height) -> (height, width): rows are the fast ones to gather
        last = len(grey) - 1
        place = ((torch.arange(side).double() + 0.5) * (last + 1) / side - 0.5).clamp(0, last)
        low, weight = place.int(), (place.frac() * 256).round().int()[:, None]
        grey = (grey[low] * (256 - weight) + grey[(low + 1).clamp(max=last)] * weight).T
    return (grey + 32768) >> 16


def find_windows(grey: Tensor, cascade: tuple[int, list[tuple]], smallest: int) -> Tensor:
    """The windows that pass every stage, at all scales 1.1^k: left, top and side in pixels of `grey`, (windows, 3)."""
    (height, width), (window, stages) = grey.shape, cascade
    scales = [1.1**k for k in range(200) if smallest <= round(window * 1.1**k) <= min(height, width)]
    if not scales:
        return torch.empty(0, 3)
    # All levels lie one below the other on one canvas with one integral image: a stage runs once over all.
    levels = [shrink(grey, round(height / scale), round(width / scale)) for scale in scales]
    stride = levels[0].shape[1] + 1
    tops = torch.tensor([0] + [len(level) for level in levels]).cumsum(0)
    canvas = torch.zeros(int(tops[-1]) + 1, stride, dtype=torch.int32)
    places = []  # of the windows' top left corners in the flat canvas
    for scale, level, top in zip(scales, levels, tops.tolist()):
        canvas[top + 1 : top + 1 + level.shape[0], 1 : 1 + level.shape[1]] = level
        y, x = (torch.arange(0, side - window + 1, 1 if scale >= 2 else 2).int() for side in level.shape)
        places.append(((top + y)[:, None] * stride + x).flatten())
    places = torch.cat(places)
    integral = canvas.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32).flatten()
    for rows, columns, votes, threshold in stages:
        corners = rows[:, None] * stride + columns  # (4, 4, stumps), from a window's place
        some = places.split(2**19 // corners.numel() + 1)  # what a processor's cache holds
        sums = torch.cat([sum_votes(integral, corners[..., None] + part, votes) for part in some])
        places = places[sums >= threshold]
    y, x = places // stride, places % stride
    level = torch.bucketize(y, tops, right=True) - 1
    windows = torch.stack([x, y - tops[level], torch.full_like(x, window)], 1)
    return (windows * torch.tensor(scales, dtype=torch.float64)[level, None]).round().int()


def sum_votes(integral: Tensor, corners: Tensor, votes: Tensor) -> Tensor:
    """The sum of a stage's votes for each window: corners (4, 4, stumps, windows) -> float64 (windows,)."""
    values = integral.index_select(0, corners.flatten()).view(corners.shape)
    cells = values[1:, 1:] - values[:-1, 1:] - values[1:, :-1] + values[:-1, :-1]  # (3, 3, stumps, windows)
    pattern = torch.arange(0, votes.numel(), 256, dtype=torch.int32)[:, None]  # where each stump's votes begin
    # A bit for each neighbour that is at least the centre, clockwise from the top left (Liao 2007).
    for bit, cell in enumerate([(1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]):
        pattern = pattern + ((cells[cell] >= cells[1, 1]).int() << bit)
    return votes.flatten()[pattern].sum(0)


def merge(windows: Tensor) -> list[tuple[int, int, int]]:
    """OpenCV's groupRectangles with more than 5 neighbours: the means of clusters of similar windows."""
    edges = torch.cat([windows[:, :2], windows[:, :2] + windows[:, 2:]], 1)
    cluster = torch.arange(len(windows))
    for window, edge in zip(windows, edges):  # all clusters that have a window like this one become one
        near = (5 * (edges - edge).abs() <= windows[:, 2:].minimum(window[2])).all(1)
        cluster[torch.isin(cluster, cluster[near])] = cluster[near][0]
    groups = [windows[cluster == number].double() for number in cluster.unique()]
    strong = [(tuple(group.mean(0).round().int().tolist()), len(group)) for group in groups if len(group) > 5]

    def inside(a, b):
        slack = round(0.2 * b[2])
        return all(b[i] - slack <= a[i] and a[i] + a[2] <= b[i] + b[2] + slack for i in (0, 1))

    return [a for a, votes in strong if not any(more > votes and inside(a, b) for b, more in strong)]


def decode(picture: bytes | str) -> Image.Image:
    """RGB, upright, on white. Raises Unusable."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns from here on, and refuses from twice as many
    try:
        with warnings.catch_warnings(record=True):  # which nobody reads
            source = io.BytesIO(picture) if isinstance(picture, bytes) else picture
            image = Image.open(source, formats=["JPEG", "PNG", "WEBP", "GIF"])
            image.load()  # before anything else, which might forgive a broken file
            return common.to_rgb(image)
    except Image.DecompressionBombError as error:
        raise Unusable("more than 40 million pixels") from error
    except Exception as error:  # decoders of broken files raise anything
        raise Unusable("not a whole picture") from error


def crop_faces(image: Image.Image, cascade: str | None, min_face: int, margin: float) -> list[tuple]:
    """The faces of a picture, or its centre square without a cascade, as `cut` gives them."""
    if not cascade:
        side = min(image.size)
        box = (image.width - side) // 2, (image.height - side) // 2, side
        return [cut(image, box, 1)] if side >= min_face else []
    scale = min(1.0, 1000 / max(image.size))  # the detector was measured at 1000 pixels, on faces of 48 and more
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    found = find_faces(small, read_cascade(cascade), max(48, round(min_face * scale)))
    return [cut(image, tuple(round(value / scale) for value in box), margin) for box in sorted(found)]


def cut(image: Image.Image, box: tuple[int, int, int], margin: float) -> tuple[bytes, tuple, int, str]:
    """A square around a face, a little higher; at the picture's edges it is moved, then shrunk, never padded. Returns
    the JPEG, the box, a hash (whether each of 8x8 areas is darker than the next) and "grey", "blurred" or "".
    """
    left, top, face = box
    side = min(round(margin * face), *image.size)
    raised = 0.1 * face if margin > 1 else 0
    left = min(max(round(left + face / 2 - side / 2), 0), image.width - side)
    top = min(max(round(top + face / 2 - raised - side / 2), 0), image.height - side)
    crop = image.resize((256, 256), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    crop.save(jpeg := io.BytesIO(), "JPEG", quality=95)
    grey = to_tensor(crop.convert("L").resize((9, 8), Image.Resampling.BOX))[..., 0]
    bits = (grey[:, :-1] < grey[:, 1:]).flatten().tolist()
    small = crop.resize((64, 64), Image.Resampling.LANCZOS)  # as in training
    pixels, grey = to_tensor(small).float(), to_tensor(small.convert("L"))[..., 0].float()  # (64, 64, 3), (64, 64)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    # Either bound would drop none to 0.3 % of 3,000 faces of the usual data set.
    flaw = "blurred" if laplacian.clamp(-128, 127).var(correction=0) < 100 else ""
    flaw = "grey" if (pixels.amax(2) - pixels.amin(2)).mean() < 8 else flaw
    return jpeg.getvalue(), box, sum(bit << place for place, bit in enumerate(bits)), flaw


# ----------------------------------------------------------------------------------- the folder and its state


class Folder:
    """A folder of crops with its metadata.csv, a row a post. Crops are on the disk before their row is.

    outcome: "faces" (at least one crop), "none" (no crop, for the reason), "skipped" (not to be had or used), "failed"
    (worth a try in another crawl) or "forgotten".
    """

    def __init__(self, path: str):
        self.path, self.table = Path(path), Path(path, "metadata.csv")
        for leftover in (*self.path.glob(".*-*.jpg.*.tmp"), *self.path.glob(".metadata.csv.*.tmp")):
            leftover.unlink()  # of a crawl that was killed while it wrote
        data = self.table.read_bytes() if self.table.exists() else b""
        try:  # without a last row that a kill or a full disk tore
            rows = list(reader := csv.DictReader(io.StringIO(data[: data.rfind(b"\n") + 1].decode())))
            if data and reader.fieldnames != FIELDS or any(None in (*row, *row.values()) for row in rows):
                raise ValueError("other columns")
        except (csv.Error, ValueError) as error:
            raise common.UserError(f"{self.table} is damaged or another's ({error}): move it away") from error
        self.rows = {(row["site"], row["id"]): row for row in rows}
        self.hashes = [int(word, 16) for row in self.rows.values() for word in row["hashes"].split()]
        self.rewrite()

    def rewrite(self) -> None:
        with common.replacing(self.table) as temporary:
            self.write(temporary, [dict(zip(FIELDS, FIELDS)), *self.rows.values()])

    def write(self, table: Path, rows: list[dict]) -> None:
        with open(table, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n").writerows(rows)
            file.flush()
            os.fsync(file.fileno())

    def knows(self, post: dict) -> bool:
        return self.rows.get((post["site"], post["id"]), {}).get("outcome", "failed") != "failed"

    def add(self, row: dict, crops: list[tuple]) -> list[str]:
        """Save a post's crops, then its row. Returns why it, or some of its crops, was dropped."""
        kept, dropped = [], []
        for jpeg, box, hash, flaw in crops:
            if flaw or any((hash ^ known).bit_count() <= 4 for known in self.hashes):
                dropped.append(flaw or "near-duplicate")
                continue
            name = f"{row['site']}-{row['id']}-{len(kept)}.jpg"
            with common.replacing(self.path / name) as temporary:
                temporary.write_bytes(jpeg)
            kept.append((name, ",".join(map(str, box)), f"{hash:016x}"))
            self.hashes.append(hash)
        row |= dict(zip(("crops", "boxes", "hashes"), map(" ".join, zip(*kept))))
        if row["outcome"] == "faces" and not kept:
            row |= dict(outcome="none", reason=", ".join(dict.fromkeys(dropped)) or "no face")
        self.rows[row["site"], row["id"]] = row
        self.write(self.table, [row])
        return dropped or [row["reason"]] * bool(row["reason"])

    def forget(self, names: list[tuple[str, str]]) -> int:
        """Mark posts as never to be fetched, then delete their crops; returns how many."""
        self.rows |= {(site, id): dict(site=site, id=id, outcome="forgotten") for site, id in names}
        self.rewrite()
        crops = [path for site, id in names for path in self.path.glob(f"{site}-{id}-*.jpg")]
        for path in crops:
            path.unlink()
        return len(crops)


def locked(folder: Path) -> contextlib.closing:
    """Keep other crawls out of a folder: SQLite locks files on every system, and a killed process lets go of them."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = sqlite3.connect(folder / ".lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        why = f"another crawl writes to {folder}, or nobody can ({error})"
        raise common.UserError(f"{why}: wait, or choose another --to") from error
    return contextlib.closing(lock)


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
        print(f"{AGENT}: {args.to} has {len(folder.hashes):,} faces of {len(folder.rows):,} posts", flush=True)
        new = (post for post in posts if not folder.knows(post))
        # Pictures are fetched one at a time, so that a killed crawl has fetched at most one in vain.
        results = common.map_in_processes(crop_post, new, 0 if fetcher else len(posts) // 8, fetcher, *how)
        end = collect(results, folder, args.limit, 0 if args.limit else len(posts), fetcher)
        print(f"{AGENT}: reached {end}: {len(folder.hashes):,} faces in {args.to}, credits in {folder.table}")
        name = "anime" if args.to == "data/anime" else shlex.quote(args.to)
        advice = f"next: python dcgan.py --dataset {name}"
        print(f"{AGENT}: {advice if folder.hashes else 'no face yet: try other --tags'}")


def find_posts(args: argparse.Namespace) -> tuple[Fetcher | None, Iterable[dict]]:
    """Who fetches the pictures, unless they are on this disk, and all posts that the options ask for."""
    if args.from_dir:
        paths = [path for path in sorted(Path(args.from_dir).resolve().rglob("*")) if path.suffix.lower() in SUFFIXES]
        paths = [path for path in paths if Path(args.to).resolve() not in path.parents and path.is_file()]
        return None, [name_post("file", str(path), path.as_uri()) for path in paths]
    if args.urls:
        lines = [line.strip() for line in Path(args.urls).read_text("utf-8", "replace").splitlines()]
        hosts = {host for line in lines for host in re.findall("^https://([^/:?#]+)", line.lower())}
        posts = [name_post("url", line, printable(line, 2000)) for line in lines if line and line[0] != "#"]
        return Fetcher(hosts, args.base_url, args.delay), posts
    site = SITES[args.site]
    hosts = {urlsplit(site.home).hostname.removeprefix("danbooru.")}  # Danbooru's files are on cdn.donmai.us
    if args.base_url:
        name = re.sub(r"[^a-z0-9.]", "_", urlsplit(args.base_url).hostname)  # --forget parts site and id at the hyphen
        hosts, site = set(), site._replace(name=name, home=args.base_url)
    tags = site.tags if args.tags is None else args.tags
    tags = f"{tags} {site.general if args.rating == ['general'] else ''}".strip()
    fetcher = Fetcher(hosts, args.base_url, args.delay)
    return fetcher, site_posts(fetcher, site, tags, args.rating)


def name_post(site: str, address: str, page: str) -> dict:
    """A post that no site names: its id is a digest of its address."""
    id = hashlib.sha256(os.fsencode(address)).hexdigest()[:16]
    return dict(site=site, id=id, page=page, reason="", files={address: ""})


def crop_post(post: dict, fetcher: Fetcher | None, *how) -> tuple[dict, list[tuple]]:
    """A post's row as far as it is known, and its crops."""
    try:
        if not fetcher:
            torch.set_num_threads(1)  # more would be no faster, and there is a process on every core
        picture = fetch_picture(post, fetcher) if fetcher else next(iter(post["files"]))
        return post | dict(outcome="faces"), crop_faces(decode(picture), *how)
    except Unusable as error:
        failed = error.again or error.status in (401, 403)
        return post | dict(outcome="failed" if failed else "skipped", reason=str(error)), []


def fetch_picture(post: dict, fetcher: Fetcher) -> bytes:
    """The first of a post's files that is there. Raises Unusable."""
    missing = Unusable(post["reason"])
    for address, md5 in () if post["reason"] else post["files"].items():
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
    before, new, failures, counts, summary = len(folder.hashes), 0, 0, collections.Counter(), "nothing new"
    progress = common.Progress(max(0, limit - before) if limit else total, "faces" if limit else "pictures")
    try:
        while not limit or len(folder.hashes) < limit:
            if limit and new >= POSTS_PER_FACE * limit:
                return f"{POSTS_PER_FACE} posts for each face asked for"
            if not (result := next(results, None)):
                return "the end of the source"
            new += 1
            counts.update(folder.add(*result))
            faces, skipped = len(folder.hashes) - before, [f"{count:,} {why}" for why, count in counts.most_common()]
            summary = f"{faces:,} faces of {new:,} posts" + (f", {fetcher.bytes / 1e6:.1f} MB" if fetcher else "")
            summary += f"; skipped: {', '.join(skipped)}" if skipped else ""
            progress.update(faces if limit else new, f"· {summary}")
            failures = {"failed": failures + 1, "faces": 0}.get(result[0]["outcome"], failures)
            if failures == FAILURES:
                why = result[0]["reason"]
                raise SourceError(f"{failures} pictures did not come, and none between them did ({why})")
        return "the limit"
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: the same command goes on from here") from None
    finally:
        results.close()
        progress.close(f"{AGENT}: {summary}")


def find_cascade(path: str | None) -> str:
    """The detector's file: the given one, or the author's own, downloaded once and checked."""
    file = Path(path or CASCADE_FILE)
    if not path and not file.exists():
        print(f"{AGENT}: downloading the face detector (MIT licence, nagadomi) to {file}", flush=True)
        try:
            data = Fetcher({urlsplit(CASCADE_URL).hostname}, None, 1.0).fetch(CASCADE_URL, is_picture=False)
        except Unusable as error:
            way_out = f"put {CASCADE_URL} into {file}, or try --detector none"
            raise SourceError(f"the face detector can't be had ({error}): {way_out}") from error
        with common.replacing(file) as temporary:
            temporary.write_bytes(data)
    if not path and hashlib.sha256(file.read_bytes()).hexdigest() != CASCADE_SHA256:
        raise common.UserError(f"{file} is not the author's: delete it, and it is downloaded again")
    read_cascade(str(file))  # a mistake shows before the first request
    return str(file)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(f"{AGENT}.py", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    add, number = parser.add_argument, common.number
    add("--site", choices=list(SITES), help="whose posts to look through (safebooru)")
    add("--tags", help="the site's search (1girl solo; all for yandere and konachan)")
    add("--urls", metavar="FILE", help="a list of picture addresses, one a line, instead of a site")
    add("--from-dir", metavar="DIR", help="a folder of pictures instead of a site")
    add("--base-url", metavar="URL", help="another host that speaks the site's API, as http(s)://HOST:PORT")
    add("--to", metavar="DIR", default="data/anime", help="folder of the crops (data/anime)")
    add("--limit", type=number(int, 1), metavar="N", help="faces in the folder at the end (2000 from a site)")
    ratings = f"what to take of {', '.join(RATINGS)} (general)"
    add("--rating", nargs="+", choices=RATINGS, default=["general"], metavar="RATING", help=ratings)
    add("--detector", choices=["lbp", "none"], default="lbp", help="find faces, or take the centre square (lbp)")
    add("--cascade", metavar="FILE", help=f"the detector's file, downloaded when absent ({CASCADE_FILE})")
    add("--min-face", type=number(int, 24), default=64, metavar="PIXELS", help="smallest face's side (64)")
    add("--margin", type=number(float, 1, 4), default=1.5, metavar="RATIO", help="the crop's side in face sides (1.5)")
    add("--delay", type=number(float, 0), default=1.0, metavar="SECONDS", help="between two requests (1)")
    add("--forget", nargs="+", default=[], metavar="ID", help="delete these posts' crops, never fetch them again")
    args = parser.parse_args(argv)
    base = re.fullmatch(r"(https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?)/?", (args.base_url or "").lower())
    names = [re.fullmatch(r"(?:([a-z0-9._]+)-)?([0-9a-f]{1,16})(?:-\d+\.jpg)?", text) for text in args.forget]
    is_site, is_here = not (args.urls or args.from_dir), base and base[2] in ("localhost", "127.0.0.1", "[::1]")
    for mistake, message in (
        (args.from_dir and args.urls or args.site and not is_site, "--site, --urls and --from-dir exclude each other"),
        (args.tags is not None and not is_site, "--tags goes with --site alone"),
        (args.base_url and args.from_dir, "--base-url goes with --site and --urls"),
        (args.base_url and not (base and int(base[3] or 0) < 2**16), "--base-url is http://HOST:PORT or https://HOST"),
        (args.from_dir and not Path(args.from_dir).is_dir(), f"--from-dir {args.from_dir}: no such folder"),
        (re.search(r"(^|\s)-?(order|sort|id):", args.tags or ""), "--tags: order:, sort: and id: are the crawl's own"),
        (args.delay < 1 and not is_here, "--delay: less than a second is for a --base-url on this machine"),
        (not all(names), "--forget takes a crop's file name, SITE-ID or the ID of a --site's post"),
    ):
        if mistake:
            parser.error(message)
    args.script, args.base_url, args.site = AGENT, base and base[1], args.site or "safebooru"
    args.limit = args.limit or (2000 if is_site else None)
    args.forget = [(name[1] or args.site, name[2]) for name in names]
    return args


def main(argv: list[str] | None = None) -> None:
    common.run_command(crawl, parse_args(argv))


if __name__ == "__main__":
    main()
