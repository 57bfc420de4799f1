"""From an anime image site, or a folder of pictures, to a folder of faces.

    python crawl_anime.py --limit 2000                        # faces from safebooru.org into data/anime
    python crawl_anime.py --site danbooru --tags "solo smile" # another site, another search, the same folder
    python crawl_anime.py --from-dir pictures                 # crop pictures that are on this disk already
    python crawl_anime.py --forget safebooru-123              # delete a post's crops, never fetch it again
    python dcgan.py --dataset anime                           # train on the result

Each picture is fetched once. Its faces are cut out as 256x256 squares and noted in metadata.csv: the credit list, the
log and the place to go on from. The pictures belong to the artists who drew them: keep the crops to yourself, and take
out what an artist asks you to. The detector is OpenCV 4's detectMultiScale(equalizeHist(grey), 1.1, 4) in torch.
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
import glob
import hashlib
import html
import io
import json
import os
import re
import shlex
import socket
import time
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, quote_plus, unquote_to_bytes, urljoin, urlsplit
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor

import common  # common.py, which lies beside this file

AGENT = "crawl_anime"  # the name that a robots.txt can address
TRIES, REDIRECTS, FAILURES = 5, 5, 10  # of a request; after it; in a row, which end the crawl
POSTS_PER_FACE = 10  # a crawl ends after this many new posts for each face asked for
CONNECT_TIMEOUT, TIMEOUT, DEADLINE, PATIENCE = 5, 20, 120, 600  # seconds: to connect, for bytes, a body, a pause
MAX_BYTES, MAX_PIXELS = 20 * 2**20, 40_000_000
PICTURE = r"(?i)\.(jpe?g|jfif|png|webp|gif)([?#]|$)"  # how an address of a picture ends
FIELDS = "site id page artist source rating outcome reason crops boxes hashes".split()
RATINGS = ("general", "sensitive", "questionable", "explicit")
FACELESS_TAGS = {"photo_(medium)", "3d", "sketch", "lineart", "no_humans", "animated"}
MANGA_TAGS = {"monochrome", "greyscale", "comic"}  # faceless, too, but for --grey
OWN_REASONS = ("rating", "tag", "no picture")  # why no request is made for a post
HINTS = {"grey": " (--grey --again keeps them)", "near-duplicate": " (--duplicates --again keeps them)"}
OWN_WORDS = r"(?i)(^|[\s({])[-~]?(ord\w*|sort|random|id):"  # of a search, which the paging needs
TRAINING = r"(?i)(?<![\w-])(ai-train|train-(gen)?ai|(gen)?ai)\s*=\s*\"?"  # contentsignals.org and IETF's aipref
OPT_OUTS = {"X-Robots-Tag": r"(?i)\b(noai|noimageai|noml)\b", "TDM-Reservation": r"\b1\b"}
OPT_OUTS |= {"Content-Signal": TRAINING + "n", "Content-Usage": TRAINING + "n"}
CASCADE_FILE = "data/lbpcascade_animeface.xml"
CASCADE_HOME = "https://raw.githubusercontent.com/nagadomi/lbpcascade_animeface"
CASCADE_URL = f"{CASCADE_HOME}/4433ab1ae1166ea75acfe99eb0f18709dac329a0/lbpcascade_animeface.xml"
CASCADE_SHA256 = "9376d30ac38db6bda2a68b88b3b76bbd7e6aa33af47f7f5c76bc88ca75f1ce30"


class SourceError(common.UserError):
    status = 3  # the source refused or failed, which ends the crawl


class Unusable(Exception):
    """A picture can't be had or cropped. `again`: another try at once may help. `final`: another crawl won't help."""

    def __init__(self, reason: str, again: bool = False, final: bool = False, status: int = 0):
        super().__init__(reason)
        self.again, self.final, self.status = again, final, status  # HTTP's status, if any


# -------------------------------------------------------------------------------------------------- the sites
class Site(NamedTuple):
    """A site's address, and what its family of APIs calls things."""

    name: str
    home: str
    search: str  # path and query up to the tags
    page: str  # path of a post's page, with a place for its id
    ratings: dict[str, str]  # all others are questionable
    general: str = ""  # a tag that asks for the general rating alone
    tags: str = "1girl solo"
    below: str = "+id%3A%3C{}"  # goes on below an id: that is never too deep, and new posts shift nothing


GELBOORU = "/index.php?page=dapi&s=post&q=index&json=1&limit=100&pid=0&tags={}", "/index.php?page=post&s=view&id={}"
DANBOORU = "/posts.json?limit=200&tags={}", "/posts/{}", dict(zip("gsqe", RATINGS)), "rating:g"
MOEBOORU = "/post.json?limit=100&tags={}", "/post/show/{}", {"s": "general", "e": "explicit"}, "rating:s", ""
SITES = {
    "safebooru": Site("safebooru", "https://safebooru.org", *GELBOORU, dict(zip(RATINGS, RATINGS), safe="general")),
    "danbooru": Site("danbooru", "https://danbooru.donmai.us", *DANBOORU, below="&page=b{}"),
    "yandere": Site("yandere", "https://yande.re", *MOEBOORU),
    "konachan": Site("konachan", "https://konachan.net", *MOEBOORU),
}


def site_posts(fetcher: "Fetcher", args: argparse.Namespace) -> Iterator[dict]:
    """All posts that the options ask for, newest first, as far as the source goes."""
    site, below = args.site, None
    tags = site.tags if args.tags is None else args.tags
    tags = f"{tags} {site.general if args.rating == ['general'] else ''}".strip()
    search = site.search.format(quote_plus(tags, errors="surrogateescape"))  # a terminal's bytes are of any encoding
    while page := fetch_page(fetcher, search + (site.below.format(below) if below else "")):
        posts = [post for raw in page if (post := read_post(site, args, raw))]
        if not posts:
            raise SourceError(f"{site.home} gives posts without ids: is it of another kind?")
        lowest = min(int(post["id"]) for post in posts)
        if below and lowest >= below:
            raise SourceError(f"{site.home} gives the same posts again: it does not page by id")
        yield from posts
        below = lowest


def fetch_page(fetcher: "Fetcher", query: str) -> list:
    """A page of posts. Sites have empty pages in the middle of a search: one is believed when it comes three times."""
    for attempt in range(3):
        fetcher.wait_at_least(2 * attempt * fetcher.delay)
        try:
            text = fetcher.fetch(fetcher.home + query, is_picture=False).decode("utf-8-sig", "replace").strip()
            page = json.loads(text or "[]")
        except Unusable as error:
            raise SourceError(f"{fetcher.home} refuses or fails, try again later: {error}") from error
        except (ValueError, RecursionError):
            page = None
        if isinstance(page, list) and (page or attempt == 2):
            return page
    raise SourceError(f"{fetcher.home} answers no list of posts in JSON, try again later: {printable(text, 200)}")


def read_post(site: Site, args: argparse.Namespace, raw: object) -> dict | None:
    """The beginning of a row of metadata.csv, from JSON in which all may be missing or of any type; None without an id.

    `reason` says why the post is not worth a request. `address` is that of the sample, or else of the original.
    """
    items = raw.items() if isinstance(raw, dict) else ()
    field = collections.defaultdict(str, {key: str(value) for key, value in items if isinstance(value, str | int)})
    for key in ("tag_string_artist", "source", "tag_string", "tags"):  # &amp; once, and no &copy without a semicolon
        field[key] = re.sub(r"&#?\w{1,30};", lambda entity: html.unescape(entity[0]), field[key])
    if not re.fullmatch(r"[1-9]\d{0,15}", field["id"], re.ASCII):
        return None
    addresses = [field[name] for name in ("sample_url", "large_file_url", "file_url")]
    address = next((address for address in addresses if re.search(PICTURE, address)), "")
    rating = site.ratings.get(field["rating"].lower(), "questionable")
    reason = "" if address else "no picture"
    tags = set((field["tag_string"] or field["tags"]).lower().split())
    if tags & FACELESS_TAGS or tags & MANGA_TAGS and not args.grey:
        reason = "tag"
    if rating not in args.rating:
        reason = "rating"
    credit = dict(artist=printable(field["tag_string_artist"]), source=printable(field["source"]), rating=rating)
    page = site.home + site.page.format(field["id"])
    return dict(site=site.name, id=field["id"], page=page, reason=reason, address=address) | credit


def printable(text: object, length: int = 300) -> str:
    """Remote text made harmless for files of lines and for terminals: one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:length])


# ----------------------------------------------------------------------------------------- fetching, politely
class Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPErrorProcessor):
    """Connects within `CONNECT_TIMEOUT`, and hands on errors and redirects, which `Fetcher` judges."""

    def do_open(self, kind, request, **options):
        class Connection(kind):
            def connect(self):
                start = time.monotonic()
                super().connect()
                self.sock.settimeout(TIMEOUT)
                if (seconds := time.monotonic() - start) > CONNECT_TIMEOUT:  # some address of the name is dead
                    common.show_line(f"{AGENT}: waited {seconds:.0f} seconds to reach {self.host}", unfinished=True)

        return super().do_open(Connection, request, **options)

    def http_response(self, request, response):
        return response

    https_response = http_response


class Fetcher:
    """Gets one file at a time from a site's own domain by the rules of manners, `delay` seconds between two starts."""

    def __init__(self, home: str, delay: float, contact: str):
        # The registered domain, such as donmai.us or example.co.uk; an IP address or a local name is its own.
        domain = re.search(r"^[\d.]+$|[\w-]+(\.\w{1,3}\.\w\w|\.[\w-]+)$|^[\w-]+$", urlsplit(home).hostname)
        self.home, self.domain, self.delay = home, domain[0], delay
        self.agent = f"{AGENT}/1.0 (faces for a small generative model; at most a request a second; contact: {contact})"
        self.opener = urllib.request.build_opener(Handler)  # which knows the proxies of the environment
        self.pace, self.next_start = delay, 0.0  # seconds between two starts at the moment; time of the next
        self.robots = {}  # each host's rules

    def fetch(self, address: str, is_picture: bool = True) -> bytes:
        """The body at an address. Raises Unusable, and SourceError for what ends the crawl."""
        for attempt in range(1, TRIES + 1):
            try:
                return self.get(address, is_picture)
            except Unusable as error:
                if not error.again or attempt == TRIES:
                    raise
                host = urlsplit(urljoin(self.home, address)).netloc
                common.show_line(f"{AGENT}: waiting for {host}: {error}", unfinished=True)
                self.wait_at_least(min(PATIENCE, self.delay * 2 ** (attempt - 1)))

    def wait_at_least(self, seconds: float) -> None:
        self.next_start = max(self.next_start, time.monotonic() + seconds)

    def get(self, address: str, is_picture: bool) -> bytes:
        """One try. Each address that redirects lead through has to pass all rules."""
        for _ in range(REDIRECTS + 1):
            home, path = self.check(address)
            # robots.txt holds for pictures, not for a documented API, which is made for programs.
            if is_picture and (reason := refusal(self.read_robots(home), path)):
                raise Unusable(reason, final=reason != "robots.txt")
            time.sleep(max(0.0, self.next_start - time.monotonic()))
            self.next_start = time.monotonic() + max(self.pace, self.delay)
            request = urllib.request.Request(home + path, headers={"User-Agent": self.agent, "Accept": "*/*"})
            try:
                with self.opener.open(request, timeout=CONNECT_TIMEOUT) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        self.judge(response, home, is_picture)
                        return read_body(response)
                    address = urljoin(address, response.headers.get("Location", ""))
            except (Unusable, SourceError):
                raise
            except Exception as error:  # a network and an answer's bytes can lead to anything
                if isinstance(getattr(error, "reason", None), socket.gaierror):
                    raise Unusable(f"{request.host} can't be found", again=True) from error
                raise Unusable(f"no whole answer: {common.one_line(error)}", again=True) from error
        raise Unusable("too many redirects")

    def check(self, address: str) -> tuple[str, str]:
        """An address's scheme with its host, and its path as it is sent. Raises Unusable or ValueError."""
        parts = urlsplit(urljoin(self.home, address))
        home = f"{parts.scheme}://{parts.netloc}".lower()
        if home != self.home and not re.fullmatch(r"https://[\w.-]+(:443)?", home, re.ASCII):
            raise Unusable("not an https address")
        if not f".{parts.hostname}".endswith(f".{self.domain}"):
            raise Unusable("on a foreign host")
        return home, as_sent((parts.path or "/") + ("?" + parts.query if parts.query else ""))

    def judge(self, response, home: str, is_picture: bool) -> None:
        """Raises for a status or a header that says no, and slows down when asked to."""
        status, headers = response.status, response.headers
        if status in (403, 503) and "challenge" in headers.get("cf-mitigated", ""):
            raise SourceError(f"{home} asks for a proof that a person is there: try another --site")
        if status in (421, 429, 503):
            self.pace = max(self.delay, min(60, 2 * self.pace))
            pause, wish = 0.0, headers.get("Retry-After", "")
            with contextlib.suppress(Exception):  # nonsense, or none is given
                pause = float(wish) if wish.isdecimal() else parsedate_to_datetime(wish).timestamp() - time.time()
            if pause > PATIENCE:
                raise SourceError(f"{home} asks for a long pause ({pause / 60:,.0f} minutes): go on later")
            self.wait_at_least(pause)
        is_page = is_picture and headers.get("Content-Type", "").lower().startswith("text/")
        if status != 200 or is_page:
            words = " ".join(printable(response.read1(2**14).decode("utf-8-sig", "replace"), 2**14).split())[:200]
            reason = f"{'not a picture' if status == 200 else f'HTTP {status}'}: {words}".removesuffix(": ")
            raise Unusable(reason, status in (408, 421, 429) or status >= 500, status in (404, 410, 451), status)
        self.pace = max(self.delay, 0.95 * self.pace)
        for name, pattern in OPT_OUTS.items():
            if is_picture and re.search(pattern, ", ".join(headers.get_all(name, []))):
                raise Unusable(f"not for training ({name})", final=True)

    def read_robots(self, home: str) -> list[tuple[str, str]]:
        """The rules of a host's robots.txt, asked for once: none where there is no such file (RFC 9309, 2.3.1)."""
        if home not in self.robots:
            self.robots[home] = []
            try:
                body = self.fetch(f"{home}/robots.txt", is_picture=False)
                self.robots[home] = parse_robots(body[: 500 * 1024].decode("utf-8-sig", "replace"))
            except Unusable as error:
                if error.again or not 400 <= error.status < 500:
                    common.show_line(f"{AGENT}: {home}/robots.txt can't be had, which forbids everything: {error}")
                    self.robots[home] = [("disallow", "/")]
            waits = [re.match(r"\d+(\.\d+)?", value) for name, value in self.robots[home] if name == "crawl-delay"]
            seconds = max([float(wait[0]) for wait in waits if wait], default=0.0)
            if seconds > PATIENCE:
                raise SourceError(f"{home}/robots.txt asks for {seconds:,.0f} seconds between requests")
            self.delay = max(self.delay, seconds)
            self.wait_at_least(seconds)
        return self.robots[home]


def read_body(response) -> bytes:
    """A whole body, unless it is too large or too slow. Raises Unusable."""
    announced, body, end = response.length or 0, bytearray(), time.monotonic() + DEADLINE
    while max(len(body), announced) <= MAX_BYTES and (received := response.read1(2**16)):
        body += received
        if time.monotonic() > end:
            raise Unusable("too slow", again=True)
    if max(len(body), announced) > MAX_BYTES:
        raise Unusable("more than 20 MiB", final=True)
    if len(body) < announced:
        raise Unusable("broke off", again=True)
    return bytes(body)


def as_sent(path: str) -> str:
    """A path in ASCII, with all that has a %-code but needs none decoded (RFC 9309, 2.2.2): %2F stays, %7E is ~."""
    path = quote(path, safe="/%:@!$&'()*+,;=~?[]", errors="replace")
    return re.sub("%[0-9A-Fa-f]{2}", lambda code: quote(unquote_to_bytes(code[0]), safe=""), path)


def parse_robots(text: str) -> list[tuple[str, str]]:
    """The rules of a robots.txt for this program, or else for all programs: names and values (RFC 9309, 2.2)."""
    groups, agents, in_rules = {"*": []}, {"*"}, True  # what stands before all groups counts for all
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        name = name.lower()
        if name == "user-agent":
            agents, in_rules = set() if in_rules else agents, False
            agents |= {re.match(r"\*(?!\S)|[\w-]*", value)[0].lower()} & {AGENT, "*"}
            for agent in agents:
                groups.setdefault(agent, [])
        elif name in ("allow", "disallow", "crawl-delay", "content-signal", "content-usage"):
            in_rules = True
            for agent in agents:
                groups[agent].append((name, value))
    return groups.get(AGENT, groups["*"])


def refusal(rules: list[tuple[str, str]], path: str) -> str:
    """Why a robots.txt keeps a path back, or "". Of the rules that match, the longest holds."""
    allowed, refused = [(0, True)], [(0, False)]
    for name, value in rules:
        pattern, preferences = re.fullmatch(r"([/*]\S*)?\s*(.*)", value).groups(default="")
        if name in ("allow", "disallow") and value and matches(value, path):
            allowed.append((len(value), name == "allow"))
        if name.startswith("content-") and re.search(TRAINING + "[yn]", preferences) and matches(pattern, path):
            refused.append((len(pattern), bool(re.search(TRAINING + "n", preferences))))
    # Of equals the friendlier holds (RFC 9309, 2.2.2), on training the stricter (draft-ietf-aipref-attach, 3.1).
    if not max(allowed)[1]:
        return "robots.txt"
    return "not for training (robots.txt)" if max(refused)[1] else ""


def matches(pattern: str, path: str) -> bool:
    """Whether a path begins like a pattern, in which * stands for anything and a last $ for the path's end."""
    pieces = [glob.escape(piece) for piece in as_sent(pattern.removesuffix("$")).split("*")]
    return fnmatch.fnmatchcase(path, "*".join(pieces) + ("" if pattern.endswith("$") else "*"))


# --------------------------------------------------------------------------- faces, in torch, and their crops
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


def find_faces(image: Image.Image, cascade: tuple[int, list[tuple]], smallest: int, neighbours: int) -> list[tuple]:
    """Left, top and side of the faces of an RGB image, in pixels, none smaller than `smallest`."""
    weights = torch.tensor([4899, 9617, 1868], dtype=torch.int32)  # OpenCV's, of a sum of 2^14
    grey = ((to_tensor(image) * weights).sum(2, dtype=torch.int32) + 8192) >> 14  # (H, W)
    return merge(find_windows(equalize(grey), cascade, smallest), neighbours)


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


def merge(windows: Tensor, neighbours: int) -> list[tuple[int, int, int]]:
    """OpenCV's groupRectangles: the means of clusters of more than `neighbours` similar windows."""
    edges = torch.cat([windows[:, :2], windows[:, :2] + windows[:, 2:]], 1)
    cluster = torch.arange(len(windows))
    for window, edge in zip(windows, edges):  # all clusters that have a window like this one become one
        near = (5 * (edges - edge).abs() <= windows[:, 2:].minimum(window[2])).all(1)
        cluster[torch.isin(cluster, cluster[near])] = cluster[near][0]
    groups = [windows[cluster == number].double() for number in cluster.unique()]
    strong = [(tuple(group.mean(0).round().int().tolist()), len(group)) for group in groups if len(group) > neighbours]

    def inside(a, b):
        slack = round(0.2 * b[2])
        return all(b[i] - slack <= a[i] and a[i] + a[2] <= b[i] + b[2] + slack for i in (0, 1))

    return [a for a, votes in strong if not any(more > votes and inside(a, b) for b, more in strong)]


def crop_faces(image: Image.Image, args: argparse.Namespace) -> list[tuple]:
    """The faces of a picture, or its centre square without a detector, as `cut` gives them."""
    if args.detector == "none":
        side = min(image.size)
        box = (image.width - side) // 2, (image.height - side) // 2, side
        return [cut(image, box, 1, args.grey)] if side >= args.min_face else []
    scale = min(1.0, 1000 / max(image.size))  # the detector was measured at 1000 pixels, on faces of 48 and more
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    smallest = max(48, round(args.min_face * scale))
    found = find_faces(small, args.cascade, smallest, args.neighbours)
    return [cut(image, tuple(round(value / scale) for value in box), args.margin, args.grey) for box in sorted(found)]


def cut(image: Image.Image, box: tuple[int, int, int], margin: float, grey_too: bool) -> tuple[bytes, tuple, int, str]:
    """A square around a face, a little higher: its JPEG, the box, a hash of 64 bits and "grey", "blurred" or ""."""
    left, top, face = box
    side = min(round(margin * face), *image.size)  # at the picture's edges it is moved, then shrunk, never padded
    raised = 0.1 * face if margin > 1 else 0
    left = min(max(round(left + face / 2 - side / 2), 0), image.width - side)
    top = min(max(round(top + face / 2 - raised - side / 2), 0), image.height - side)
    crop = image.resize((256, 256), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    crop.save(jpeg := io.BytesIO(), "JPEG", quality=95)
    small = crop.resize((64, 64), Image.Resampling.LANCZOS)  # as in training
    pixels, grey = to_tensor(small).float(), to_tensor(small.convert("L"))[..., 0].float()  # (64, 64, 3), (64, 64)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    # Either bound would drop none to 0.3 % of 3,000 faces of the usual data set.
    flaw = "blurred" if laplacian.clamp(-128, 127).var(correction=0) < 100 else ""
    if not grey_too and (pixels.amax(2) - pixels.amin(2)).mean() < 8:
        flaw = "grey"
    areas = to_tensor(crop.convert("L").resize((9, 8), Image.Resampling.BOX))[..., 0]  # (8, 9)
    bits = (areas[:, :-1] < areas[:, 1:]).flatten().tolist()  # whether each is darker than the next
    return jpeg.getvalue(), box, sum(bit << place for place, bit in enumerate(bits)), flaw


# ----------------------------------------------------------------------------------- the folder and its state
class Folder:
    """A folder of crops with its metadata.csv, a row a post. Crops are on the disk before their row is.

    outcome: "faces" (at least one crop), "none" (no crop, for the reason), "skipped" (not to be had or used), "failed"
    (worth a try in another crawl) or "forgotten".
    """

    def __init__(self, path: str, duplicates: bool):
        self.path, self.table, self.duplicates = Path(path), Path(path, "metadata.csv"), duplicates
        for leftover in (*self.path.glob(".*-*.jpg.*.tmp"), *self.path.glob(".metadata.csv.*.tmp")):
            leftover.unlink()  # of a crawl that was killed while it wrote
        self.rows = {(row["site"], row["id"]): row for row in read_table(self.table)}
        self.hashes, self.faces = [], 0  # hashes: those that no other crop may be like
        here = {path.name for path in self.path.iterdir()}
        for row in self.rows.values():
            self.faces += len(here.intersection(row["crops"].split()))  # others have been deleted by hand
            if row["outcome"] == "forgotten" or not duplicates:
                self.hashes += [int(digits, 16) for digits in re.findall(r"\bh([0-9a-f]{16})\b", row["hashes"])]
        self.settle()

    def settle(self) -> int:
        """Write the table anew and delete all crops of forgotten posts; returns how many."""
        with common.replacing(self.table) as temporary:
            self.write(temporary, [dict(zip(FIELDS, FIELDS)), *self.rows.values()])
        forgotten = {f"{site}-{id}" for (site, id), row in self.rows.items() if row["outcome"] == "forgotten"}
        crops = [path for path in self.path.glob("*-*-*.jpg") if path.name.rpartition("-")[0] in forgotten]
        for path in crops:
            path.unlink()
        return len(crops)

    def write(self, table: Path, rows: list[dict]) -> None:
        # A spreadsheet runs a cell that begins with one of these signs, but not after an apostrophe.
        cells = [{name: re.sub(r"^\s*[=+@-]", r"'\g<0>", row.get(name, "")) for name in FIELDS} for row in rows]
        with open(table, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(cells)
            file.flush()
            os.fsync(file.fileno())

    def choose(self, posts: Iterable[dict], again: bool) -> Iterator[dict]:
        """The posts that are new or failed; `again` also those that gave no crop, if they are worth a request now."""
        for post in posts:
            outcome = self.rows.get((post["site"], post["id"]), {"outcome": "failed"})["outcome"]
            if outcome == "failed" or again and outcome in ("none", "skipped") and not post["reason"]:
                yield post

    def add(self, row: dict, crops: list[tuple]) -> list[str]:
        """Save a post's crops, then its row. Returns why it, or some of its crops, was dropped."""
        names, boxes, hashes, dropped = [], [], [], []
        for jpeg, box, hash, flaw in crops:
            if flaw or any((hash ^ known).bit_count() <= 4 for known in self.hashes):
                dropped.append(flaw or "near-duplicate")
                continue
            names.append(f"{row['site']}-{row['id']}-{len(names)}.jpg")
            with common.replacing(self.path / names[-1]) as temporary:
                temporary.write_bytes(jpeg)
            boxes.append("_".join(map(str, box)))
            hashes.append(f"h{hash:016x}")  # with a letter first, which no spreadsheet takes for a number
            self.hashes += [] if self.duplicates else [hash]
        row |= dict(crops=" ".join(names), boxes=" ".join(boxes), hashes=" ".join(hashes))
        if row["outcome"] == "faces" and not names:
            row |= dict(outcome="none", reason=", ".join(dict.fromkeys(dropped)) or "no face")
        self.rows[row["site"], row["id"]] = row
        self.faces += len(names)
        self.write(self.table, [row])
        return dropped or ([row["reason"]] if row["reason"] else [])

    def forget(self, posts: list[tuple[str, str]]) -> int:
        """Mark posts as never to be fetched, then delete their crops; returns how many. Their hashes stay known."""
        for site, id in posts:
            row = self.rows.get((site, id), {})
            if not row and not any(self.path.glob(f"{site}-{id}-*.jpg")):
                raise common.UserError(f"neither {self.table} nor a crop there has a post {site}-{id}")
            self.rows[site, id] = dict(site=site, id=id, outcome="forgotten", hashes=row.get("hashes", ""))
        return self.settle()


def read_table(path: Path) -> list[dict]:
    """The rows of a metadata.csv. Raises UserError."""
    if not path.exists():
        return []
    whole, newline, last = path.read_bytes().rpartition(b"\n")
    try:
        text = (whole + newline).decode("utf-8-sig") + last.decode("utf-8", "replace")
        fields, *lines = filter(None, csv.reader(io.StringIO(text, newline="")))
        if lines and last and len(lines[-1]) < len(fields):
            del lines[-1]  # a kill or a full disk tore it
        if set(fields) - {"options"} != set(FIELDS) or any(len(line) != len(fields) for line in lines):
            raise ValueError("other columns")  # earlier tables had options, too
    except (csv.Error, ValueError) as error:
        raise common.UserError(f"{path} is damaged or another's ({error}): move it away") from error
    return [dict(zip(fields, line)) for line in lines]


# ---------------------------------------------------------------------------------------------------- a crawl
def crawl(args: argparse.Namespace) -> None:
    """From the options to a folder of crops."""
    warnings.filterwarnings("ignore", module="PIL")  # about odd pictures: what matters is told in a line
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with common.locked(Path(args.to)):
        folder = Folder(args.to, args.duplicates)
        if args.forget:
            deleted, names = folder.forget(args.forget), ", ".join(map("-".join, args.forget))
            common.show_line(f"{AGENT}: crops deleted: {deleted}; never to be fetched: {names}")
            return
        fetcher = None if args.from_dir else Fetcher(args.site.home, args.delay, args.contact)
        posts = folder.choose(site_posts(fetcher, args) if fetcher else find_files(args), args.again)
        if args.detector == "lbp":
            args.cascade = find_cascade(args.cascade)
        common.show_line(f"{AGENT}: {args.to} has {folder.faces:,} faces of {len(folder.rows):,} posts")
        if fetcher:  # one at a time, so that a killed crawl has fetched at most one in vain
            results, total = (crop_post(post, fetcher, args) for post in posts), 0
        else:
            posts = list(posts)
            torch.set_num_threads(1)  # each: several pictures are searched beside each other
            results, total = common.in_threads(lambda post: crop_post(post, None, args), posts), len(posts)
        is_full = args.limit and folder.faces >= args.limit
        end = "the limit" if is_full else collect(results, folder, args.limit, total)
        common.show_line(f"{AGENT}: reached {end}: {folder.faces:,} faces in {args.to}, credits in {folder.table}")
        why = "that table says why" if folder.rows else "there is no post of that search"
        hint = f"next: python dcgan.py --dataset {shlex.quote(args.to)}" if folder.faces else f"no face yet: {why}"
        common.show_line(f"{AGENT}: {hint}")


def find_files(args: argparse.Namespace) -> list[dict]:
    """A post for each picture in --from-dir that is not a crop. Raises UserError."""
    folder, crops, posts = Path(args.from_dir).resolve(), Path(args.to).resolve(), []
    for path in (folder / name for name in common.list_pictures(folder)):
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()
        id = re.search("(?=.{0,15}[abcdf]).{16}", digest)[0]  # no number (12e34567...) to a spreadsheet
        if not path.is_relative_to(crops):
            posts.append(dict(site="file", id=id, page=path.as_uri(), reason="", address=path))
    if not posts:
        raise common.UserError(f"{args.from_dir} holds no picture")
    return posts


def crop_post(post: dict, fetcher: Fetcher | None, args: argparse.Namespace) -> tuple[dict, list[tuple]]:
    """A post's row as far as it is known, and its crops."""
    if post["reason"]:
        return post | dict(outcome="skipped"), []
    try:
        body = fetcher.fetch(post["address"]) if fetcher else post["address"].read_bytes()
        if fetcher and b"DMI-PROHIBITED" in body:  # IPTC's and PLUS's property for data mining
            raise Unusable("not for training (metadata)", final=True)
        return post | dict(outcome="faces"), crop_faces(common.open_picture(io.BytesIO(body)), args)
    except Unusable as error:
        reason, final = str(error), error.final
    except (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError) as error:  # bytes can lead to anything
        reason, final = printable(common.one_line(error), 80), bool(re.search("large|exceeds", str(error)))
    return post | dict(outcome="skipped" if final else "failed", reason=reason), []


def collect(results: Iterator, folder: Folder, limit: int | None, total: int) -> str:
    """Save results up to the limit of faces; returns what ended it. SourceError after `FAILURES` pictures in a row."""
    before, failures, counts, summary = folder.faces, 0, collections.Counter(), "nothing new"
    progress = common.Progress(limit - before if limit else total, "faces" if limit else "pictures")
    try:
        for new, (row, crops) in enumerate(results, start=1):
            if row["outcome"] == "faces":
                failures = 0
            elif row["site"] != "file" and row["reason"] not in OWN_REASONS:
                failures += (row["site"], row["id"]) not in folder.rows  # old ones don't keep new posts away
            counts.update(why.partition(":")[0] for why in folder.add(row, crops))
            faces = folder.faces - before
            skipped = ", ".join(f"{count:,} {why}{HINTS.get(why, '')}" for why, count in counts.most_common())
            summary = f"{faces:,} faces of {new:,} posts; skipped: {skipped or 'none'}"
            progress.update(faces if limit else new, f" ({summary})")
            if limit and folder.faces >= limit:
                return "the limit"
            if limit and new == POSTS_PER_FACE * limit:
                return f"{POSTS_PER_FACE} posts for each face asked for"
            if failures == FAILURES:
                raise SourceError(f"{FAILURES} pictures in a row failed, try later or another --site: {row['reason']}")
        return "the end of the source"
    finally:
        common.show_line(f"{AGENT}: {summary}")


def find_cascade(path: str | None) -> tuple[int, list[tuple]]:
    """The given detector, or the author's own, downloaded once."""
    file = Path(path or CASCADE_FILE)
    if not path and not file.exists():
        common.show_line(f"{AGENT}: downloading the face detector (MIT licence, nagadomi) to {file}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CASCADE_URL, str(file), hash_prefix=CASCADE_SHA256, progress=False)
        except Exception as error:  # no network, or another file
            way_out = f"put {CASCADE_URL} into {file}, or try --detector none"
            raise SourceError(f"the face detector can't be had ({common.one_line(error)}): {way_out}") from error
    return read_cascade(str(file))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.Parser(f"{AGENT}.py", __doc__, usage="%(prog)s [options]")
    add, number = parser.add_argument, common.number
    add("--site", choices=list(SITES), metavar="SITE", help=f"{', '.join(SITES)} (safebooru)")
    add("--from-dir", metavar="DIR", help="a folder of pictures instead of a site")
    add("--tags", help="the site's search (1girl solo; yandere, konachan: all)")
    add("--base-url", metavar="URL", help="a mirror of the site's API, as http(s)://HOST:PORT")
    add("--to", metavar="DIR", default="data/anime", help="folder of the crops (data/anime)")
    add("--limit", type=number(int, 1), metavar="N", help="faces in the folder at the end (2000 from a site)")
    ratings = f"{', '.join(RATINGS)} (general)"
    add("--rating", nargs="+", choices=RATINGS, default=["general"], metavar="R", help=ratings)
    add("--detector", choices=["lbp", "none"], default="lbp", metavar="NAME", help="lbp, or none: centre squares (lbp)")
    add("--cascade", metavar="FILE", help="the detector's file (the author's, downloaded once)")
    add("--neighbours", type=number(int, 0), default=4, metavar="N", help="of a face's windows, more than N agree (4)")
    add("--min-face", type=number(int, 24), default=64, metavar="PIXELS", help="smallest face's side (64)")
    add("--margin", type=number(float, 1, 4), default=1.5, metavar="RATIO", help="the crop's side in face sides (1.5)")
    add("--grey", action="store_true", help="keep grey crops and manga, too")
    add("--duplicates", action="store_true", help="keep near-duplicates, too")
    add("--again", action="store_true", help="look again at the posts that gave no crop")
    add("--delay", type=number(float, 0), default=1.0, metavar="SECONDS", help="between two requests (1)")
    add("--contact", default="none given", metavar="TEXT", help="your page or mail address, which Danbooru asks for")
    add("--forget", nargs="+", default=[], metavar="ID", help="delete these posts' crops, never fetch them again")
    args = parser.parse_args(argv)
    names = [re.fullmatch(r"(?:([a-z0-9._]+)-)?([0-9a-f]{1,16})(?:-\d+\.jpg)?", Path(t).name) for t in args.forget]
    home = (args.base_url or "https://x").rstrip("/").lower()
    is_here = re.fullmatch(r"https?://(localhost|127\.0\.0\.1)(:\d+)?", home)
    is_in_crops = args.from_dir and Path(args.from_dir).resolve().is_relative_to(Path(args.to).resolve())
    for mistake, message in (
        ("" in (args.from_dir, args.to), "--from-dir and --to need a name"),
        (args.from_dir and (args.site or args.tags or args.base_url), "--from-dir goes without --site and its options"),
        (not re.fullmatch(r"https?://[a-z0-9.-]+(:\d{1,5})?", home), "--base-url is http(s)://HOST:PORT"),
        (args.from_dir and not Path(args.from_dir).is_dir(), f"--from-dir {args.from_dir}: no such folder"),
        (is_in_crops, f"--from-dir {args.from_dir} lies in --to, whose pictures are crops"),
        (re.search(OWN_WORDS, args.tags or ""), "--tags: order:, sort: and id: are the crawl's own"),
        (args.delay < 1 and not is_here, "--delay: less than a second is for a --base-url on this machine"),
        (not re.fullmatch("[ -~]{1,200}", args.contact), "--contact is a page or a mail address in ASCII"),
        (not all(names), "--forget takes a crop's file name, SITE-ID or the ID of a --site's post"),
    ):
        if mistake:
            parser.error(message)
    args.limit = args.limit or (None if args.from_dir else 2000)
    args.site = SITES[args.site or "safebooru"]
    if args.base_url:  # whose crops have its host in their names; --forget parts site and id at the hyphen
        args.site = args.site._replace(name=urlsplit(home).hostname.replace("-", "_"), home=home)
    args.forget = [(name[1] or args.site.name, name[2]) for name in names]
    return args


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors(f"{AGENT}.py"):
        try:
            crawl(parse_args(argv))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted: the same command goes on from here") from None


if __name__ == "__main__":
    main()
