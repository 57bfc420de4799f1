"""From an anime image site, a list of addresses or a folder of pictures to a folder of faces.

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
import functools
import glob
import hashlib
import html
import http.client
import io
import ipaddress
import itertools
import json
import os
import random
import re
import shlex
import socket
import ssl
import time
import warnings
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import SplitResult, quote, quote_plus, unquote, urljoin, urlsplit
from xml.etree import ElementTree

import torch
from PIL import Image
from torch import Tensor

import common  # common.py, which lies beside this file

AGENT = "crawl_anime"  # the name that a robots.txt can address
TRIES, REDIRECTS = 5, 5
FAILURES, REFUSALS = 10, 100  # without a picture between them, after which the source counts as broken
POSTS_PER_FACE = 10  # a crawl ends after this many new posts for each face asked for
TIMEOUT, DEADLINE, PATIENCE = 20, 120, 600  # seconds: socket timeout, whole answer, longest pause for a host
SLOWEST, GRACE = 2048, 10  # least bytes a second of an answer, after its first seconds
MAX_BYTES, MAX_PIXELS = 20 * 2**20, 40_000_000
MAX_SCANS, MAX_SEGMENTS = 50, 3000  # of a JPEG; libjpeg's own script has 10 scans, 26 in four colours
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # in a JPEG: a length follows, or it is the end
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif")
FIELDS = "site id page artist source rating outcome reason options crops boxes hashes".split()
HASH = "(h?[0-9a-f]{16})|md5-[0-9a-f]{32}"  # with a letter first, which no spreadsheet takes for a number
FORMULA = r"(^|;)(\s*[=+@\uff1d\uff0b\uff0d\uff20-])"  # what a spreadsheet would run; ; parts cells in half of Europe
RATINGS = ("general", "sensitive", "questionable", "explicit")
FACELESS_TAGS = {"photo_(medium)", "3d", "sketch", "lineart", "no_humans", "animated"}
MANGA_TAGS = {"monochrome", "greyscale", "comic"}  # faceless, too, but for --grey
OWN_REASONS = ("rating", "tag", "no picture", "forgotten")  # why a post is not asked for
OWN_WORDS = r"(?i)(^|[\s({])[-~]?(ord\w*|sort|random|id):"  # of a search, which the paging needs
RECHECKED = ("robots.txt", "not an address", "not an https address", "on a foreign host")  # for they cost no request
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


def may_find_more(args: argparse.Namespace, reasons: str, options: str) -> bool:
    """Whether a post that was left for these reasons, with the options of that cell, may give a crop now."""
    known = re.match(r"(lbp|none) (\d+) (\d(?:\.\d+)?) (\d+)\b", options)
    if reasons == "near-duplicate" or not known:
        return reasons != "near-duplicate"
    detector, min_face, margin, neighbours = known.groups()
    smaller = args.min_face < int(min_face)
    if reasons == "no face" and detector == "none":
        return smaller  # the whole picture was too small
    if smaller or args.detector != detector or "grey" in reasons and args.grey:
        return True
    other_crop = "blurred" in reasons and args.margin != float(margin)
    return args.detector == "lbp" and (other_crop or args.neighbours < int(neighbours))


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
        """Paging by id is never too deep, and new posts shift nothing."""
        if below and not self.below:
            tags = f"{tags} id:<{below}".strip()
        tags = quote_plus(tags, errors="surrogateescape")  # a terminal's bytes may be of any encoding
        return self.search.format(tags) + (self.below.format(below) if below else "")


GELBOORU = "/index.php?page=dapi&s=post&q=index&json=1&limit=100&pid=0&tags={}", "/index.php?page=post&s=view&id={}"
DANBOORU = "/posts.json?tags={}&limit=200", "/posts/{}", dict(zip("gsqe", RATINGS)), "rating:g", "&page=b{}"
MOEBOORU = "/post.json?tags={}&limit=100&page=1", "/post/show/{}", {"s": "general", "e": "explicit"}, "rating:s", "", ""
SITES = {
    "safebooru": Site("safebooru", "https://safebooru.org", *GELBOORU, dict(zip(RATINGS, RATINGS), safe="general")),
    "danbooru": Site("danbooru", "https://danbooru.donmai.us", *DANBOORU),
    "yandere": Site("yandere", "https://yande.re", *MOEBOORU),
    "konachan": Site("konachan", "https://konachan.net", *MOEBOORU),
}


def site_posts(fetcher: "Fetcher", site: Site, args: argparse.Namespace) -> Iterator[dict]:
    """All posts that the options ask for, newest first, as far as the source goes."""
    tags, below = site.tags if args.tags is None else args.tags, None
    tags = f"{tags} {site.general if args.rating == ['general'] else ''}".strip()
    while page := fetch_page(fetcher, site.home, site.query(tags, below)):
        posts = [post for raw in page if (post := read_post(site, args, raw))]
        lowest = min((int(post["id"]) for post in posts), default=None)
        if not lowest or below and lowest >= below:
            raise SourceError(f"{site.home} gives the same posts again: it does not page by id")
        yield from posts
        below = lowest


def fetch_page(fetcher: "Fetcher", home: str, query: str) -> list:
    """A page of posts. Sites have empty pages in the middle of a search: one is believed when it comes three times."""
    for attempt in range(3):
        fetcher.wait_at_least(2 * attempt * fetcher.delay)
        try:
            text = fetcher.fetch(home + query, is_picture=False).decode("utf-8-sig", "replace").strip()
            page = json.loads(text or "[]")
        except Unusable as error:
            raise SourceError(f"{home} refuses or fails: {error}") from error
        except (ValueError, RecursionError):
            page = None
        if page and isinstance(page, list):
            return page
    if page != []:
        why = complaint(text) or "is it down, or of another kind?"
        raise SourceError(f"{home} answers no list of posts in JSON: {why}")
    return page


def complaint(text: str) -> str:
    """What an answer that is no list of posts says, in JSON, XML or plain words; "" if it says nothing."""
    for name in ("message", "reason", "error"):  # Danbooru's "error" is a mere class
        if named := re.search(rf"""{name}["']?\s*[:=]\s*(["'])((?:\\.|[^\\])+?)\1""", text):
            return printable(named[2].replace('\\"', '"'))
    return "" if text.startswith(("<", "{", "[")) else printable(text)


def read_post(site: Site, args: argparse.Namespace, raw: object) -> dict | None:
    """The beginning of a row of metadata.csv, from JSON in which all may be missing or of any type; None without an id.

    `reason` says why the post is not worth a request. `files` is address -> MD5 or "", the smaller picture first.
    """
    items = raw.items() if isinstance(raw, dict) else ()
    field = collections.defaultdict(str, {key: str(value) for key, value in items if isinstance(value, str | int)})
    for key in ("tag_string_artist", "source", "tag_string", "tags"):  # &amp; once, and no &copy without a semicolon
        field[key] = re.sub(r"&#?\w{1,30};", lambda entity: html.unescape(entity[0]), field[key])
    if not re.fullmatch(r"[1-9]\d{0,15}", field["id"], re.ASCII):
        return None
    sample, original = field["sample_url"] or field["large_file_url"], field["file_url"]
    if not original and field["directory"] and field["image"]:  # Gelbooru's older answers give only parts
        folder, image = (quote(field[name], errors="replace") for name in ("directory", "image"))
        original = f"/images/{folder}/{image}"
        sample = f"/samples/{folder}/sample_{image.rpartition('.')[0]}.jpg" if raw.get("sample") else ""
    files = {}
    for address, md5 in ((sample, ""), (original, field["md5"] or field["hash"])):  # the MD5 is the original's
        with contextlib.suppress(ValueError):  # an address that is none
            if urlsplit(address := urljoin(site.home + "/", address)).path.lower().endswith(SUFFIXES):
                files[address] = f"md5-{md5.lower()}" if re.fullmatch("(?i)[0-9a-f]{32}", md5) else ""
    rating = site.ratings.get(field["rating"].lower(), "questionable")
    reason = "" if files else "no picture"
    tags = set((field["tag_string"] or field["tags"]).lower().split())
    if tags & FACELESS_TAGS or tags & MANGA_TAGS and not args.grey:
        reason = "tag"
    if rating not in args.rating:
        reason = "rating"
    credit = dict(artist=printable(field["tag_string_artist"]), source=printable(field["source"]), rating=rating)
    page = site.home + site.page.format(field["id"])
    return dict(site=site.name, id=field["id"], page=page, reason=reason, files=files) | credit


def printable(text: object, length: int = 300) -> str:
    """Remote text made harmless for files of lines and for terminals: one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:length])


# ----------------------------------------------------------------------------------------- fetching, politely


class Fetcher:
    """Gets one file at a time by the rules of manners and safety, with at least `delay` seconds between two starts.

    `hosts` are the source's own, with all below them. `trusted` are those that the user vouches for.
    """

    def __init__(self, hosts: set[str], trusted: Iterable[str], delay: float, contact: str = "none given"):
        self.hosts, self.trusted, self.delay = hosts, {origin(urlsplit(home)) for home in trusted}, delay
        self.agent = f"{AGENT}/1.0 (faces for a small generative model; at most a request a second; contact: {contact})"
        self.pace, self.next_start = delay, 0.0  # seconds between two starts at the moment; time of the next
        self.robots, self.crawl_delays = {}, {}  # of each host

    def fetch(self, address: str, is_picture: bool = True) -> bytes:
        """The body at an address. Raises Unusable, and SourceError for what ends the crawl."""
        for attempt in range(1, TRIES + 1):
            try:
                return self.get(address, is_picture)
            except Unusable as error:
                if not error.again or attempt == TRIES:
                    raise
                self.wait_at_least(self.delay * 2 ** (attempt - 1) * random.uniform(1, 2))

    def wait_at_least(self, seconds: float) -> None:
        self.next_start = max(self.next_start, time.monotonic() + seconds)

    def get(self, address: str, is_picture: bool) -> bytes:
        """One try. Each address that redirects lead through has to pass all rules."""
        for redirects in range(REDIRECTS + 1):
            parts, trusted, path = self.check(address, redirects == 0)
            home = f"{parts.scheme}://{parts.netloc}"
            try:
                # robots.txt holds for pictures, not for a documented API, which is made for programs.
                if is_picture and (reason := refusal(self.read_robots(home), path)):
                    raise Unusable(reason, final=True)
                time.sleep(max(0.0, self.next_start - time.monotonic()))
                self.next_start = time.monotonic() + max(self.pace, self.crawl_delays.get(home, 0.0))
                with ask(parts, trusted, path, self.agent) as response:
                    if response.status not in (301, 302, 303, 307, 308):
                        self.judge(response, parts.hostname, is_picture)
                        body = b"".join(iter(functools.partial(response.read, 2**16), b""))  # not what it claims
                        if response.length or is_picture and not body:
                            raise Unusable("broke off", again=True)
                        return body
            except Unusable:
                raise
            except SourceError as error:
                self.robots[home] = [("fault", str(error))]  # the host is not asked again
                raise
            except Exception as error:  # a network and an answer's bytes can lead to anything
                raise Unusable(f"no whole answer ({type(error).__name__})", again=True) from error
            with contextlib.suppress(ValueError):  # then it is the same address again
                address = urljoin(address, response.headers.get("Location", ""))
        raise Unusable("too many redirects")

    def check(self, address: str, is_own: bool) -> tuple[SplitResult, bool, str]:
        """An address's parts, whether its host is trusted, its path. A post's own bad address is no passing fault."""
        try:
            parts = urlsplit(address)
            scheme, host, port = origin(parts)
            path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
            path.encode() + host.encode("idna")  # or it raises
        except ValueError as error:
            raise Unusable("not an address", final=is_own) from error
        trusted = (scheme, host, port) in self.trusted
        if not trusted and not (scheme == "https" and port == 443 and "@" not in parts.netloc):
            raise Unusable("not an https address", final=is_own)
        if not trusted and not any(f".{host}".endswith(f".{own}") for own in self.hosts):
            raise Unusable("on a foreign host", final=is_own)
        return parts, trusted, path

    def judge(self, response: http.client.HTTPResponse, host: str, is_picture: bool) -> None:
        """Raises for a status or a header that says no, and slows down when asked to."""
        status, headers = response.status, response.headers
        if status in (403, 503) and "challenge" in headers.get("cf-mitigated", ""):
            raise SourceError(f"{host} asks to prove that a person is there, and a program must not")
        if status in (421, 429, 503):
            self.pace = max(self.delay, min(60, 2 * self.pace))
            pause, wish = 0.0, headers.get("Retry-After", "")
            with contextlib.suppress(Exception):  # nonsense, or none is given
                pause = float(wish) if wish.isdecimal() else parsedate_to_datetime(wish).timestamp() - time.time()
            if pause > PATIENCE:
                raise SourceError(f"{host} asks for a long pause ({pause / 60:,.0f} minutes): go on later")
            self.wait_at_least(pause)
        if status != 200:
            reason = f"HTTP {status}"
            if not is_picture:
                with contextlib.suppress(Exception):  # what it says may break off
                    reason = f"{reason}: {complaint(response.read(2**14).decode('utf-8-sig', 'replace').strip())}"
            again, final = status in (408, 421, 429) or status >= 500, status in (404, 410, 451)
            raise Unusable(reason.removesuffix(": "), again, final, status)
        self.pace = max(self.delay, 0.95 * self.pace)
        if headers.get("Content-Encoding", "").lower() not in ("", "identity", "none"):
            raise Unusable("compressed, though not asked for")
        for name, pattern in OPT_OUTS.items():
            if is_picture and re.search(pattern, ", ".join(headers.get_all(name, []))):
                raise Unusable(f"not for training ({name})", final=True)
        kind = headers.get("Content-Type") or "image/"
        if is_picture and not re.match(r"(?i)image/|(application|binary)/octet-stream", kind):
            raise Unusable("not a picture")
        if (response.length or 0) > MAX_BYTES:
            raise Unusable("more than 20 MiB", final=True)

    def read_robots(self, home: str) -> list[tuple[str, str]]:
        """The rules of a host's robots.txt, asked for once: none where there is no such file (RFC 9309, 2.3.1)."""
        if home not in self.robots:
            try:
                body = self.fetch(f"{home}/robots.txt", is_picture=False)
                self.robots[home] = parse_robots(read_text(body[: 500 * 1024]))
            except Unusable as error:
                is_absent = 400 <= error.status < 500 and not error.again
                self.robots[home] = [] if is_absent else [("fault", f"robots.txt can't be had: {error}")]
            waits = [re.match(r"\d+(\.\d+)?", value) for name, value in self.robots[home] if name == "crawl-delay"]
            seconds = max([float(wait[0]) for wait in waits if wait], default=0.0)
            if seconds > PATIENCE:
                raise SourceError(f"{home}/robots.txt asks for {seconds:,.0f} seconds between requests")
            self.crawl_delays[home] = seconds
            self.wait_at_least(seconds)
        return self.robots[home]


def origin(parts: SplitResult) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError."""
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


@contextlib.contextmanager
def ask(parts: SplitResult, trusted: bool, path: str, agent: str) -> Iterator[http.client.HTTPResponse]:
    """One request, whose answer's body is still to be read."""
    scheme, host, port = origin(parts)
    # The connection goes to the very address that is checked: looked up again, the name could lead elsewhere.
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not trusted and not all(map(is_public, found)):
        raise Unusable("on a private network")
    for address in found[:4]:  # each takes its time, and a name may have thousands
        with contextlib.suppress(OSError):
            connected = socket.create_connection((address, port), TIMEOUT)
            break
    else:
        raise ConnectionError
    if scheme == "https":
        connected = ssl.create_default_context().wrap_socket(connected, server_hostname=host)
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
            raise Unusable("more than 20 MiB", final=True)
        return received


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 address that an IPv6 one stands for, is on the public internet."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        is_nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
        ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if is_nat64 else ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast and (ip.version == 4 or ip in ipaddress.ip_network("2000::/3"))


def parse_robots(text: str) -> list[tuple[str, str]]:
    """The rules of a robots.txt for this program, or else for all programs: names and values (RFC 9309, 2.2)."""
    groups, agents, in_rules, in_groups = {}, {"*"}, True, False  # before all groups, opt-outs alone count, for all
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        name = name.lower()
        if name == "user-agent":
            agents = set() if in_rules else agents
            in_rules, in_groups = False, True
            agents |= {re.match(r"[*\w-]*", value)[0].lower()} & {AGENT, "*"}
            for agent in agents:
                groups.setdefault(agent, [])
        elif name in ("content-signal", "content-usage") or in_groups and name in ("allow", "disallow", "crawl-delay"):
            in_rules = in_rules or name != "crawl-delay"
            for agent in agents:
                groups.setdefault(agent, []).append((name, value))
    return groups.get(AGENT, groups.get("*", []))


def refusal(rules: list[tuple[str, str]], path: str) -> str:
    """Why a robots.txt keeps a path back, or "". Of the rules that match, the longest holds. Raises Unusable."""
    allowed, refused = [(0, True)], [(0, False)]
    for name, value in rules:
        pattern, preferences = re.fullmatch(r"([/*]\S*)?\s*(.*)", value).groups(default="")
        if name == "fault":  # which is soon over
            raise Unusable(value)
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
    pieces = [glob.escape(unquote(piece)) for piece in pattern.removesuffix("$").split("*")]
    return fnmatch.fnmatchcase(unquote(path), "*".join(pieces) + ("" if pattern.endswith("$") else "*"))


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


def decode(source: Path | bytes) -> Image.Image:
    """A picture as upright RGB on white, from its file or its bytes. Raises Unusable."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            check_parts(file)
            return common.open_picture(file)
    except OSError as error:
        raise Unusable(f"can't be read: {error.strerror}") from error
    except ValueError as error:
        raise Unusable(printable(error, 80), final="large" in str(error) or "exceeds" in str(error)) from error


def check_parts(file: BinaryIO) -> None:
    """Raises Unusable for more parts of a JPEG or a PNG than any encoder writes: a decoder's time grows with them."""
    start = file.read(2)
    data = file.read() if start in (b"\xff\xd8", b"\x89P") else b""
    scans, segments, place = data.count(b"iCCP"), data.count(b"IDAT") // 10, 0  # a PNG's profiles, pieces of its pixels
    while scans <= MAX_SCANS and segments <= MAX_SEGMENTS:
        marker = MARKER.search(data, place) if start == b"\xff\xd8" else None
        if not marker or marker[0] == b"\xff\xd9":  # the end
            return
        scans, segments = scans + (marker[0] == b"\xff\xda"), segments + 1
        place = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    raise Unusable("more parts than any encoder writes", final=True)


def crop_faces(image: Image.Image, args: argparse.Namespace) -> list[tuple]:
    """The faces of a picture, or its centre square without a detector, as `cut` gives them."""
    if args.detector == "none":
        side = min(image.size)
        box = (image.width - side) // 2, (image.height - side) // 2, side
        return [cut(image, box, 1, args.grey)] if side >= args.min_face else []
    scale = min(1.0, 1000 / max(image.size))  # the detector was measured at 1000 pixels, on faces of 48 and more
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    smallest = max(48, round(args.min_face * scale))
    found = find_faces(small, read_cascade(args.cascade), smallest, args.neighbours)
    return [cut(image, tuple(round(value / scale) for value in box), args.margin, args.grey) for box in sorted(found)]


def cut(image: Image.Image, box: tuple[int, int, int], margin: float, grey_too: bool) -> tuple[bytes, tuple, int, str]:
    """A square around a face, a little higher: its JPEG, the box, its hash and "grey", "blurred" or ""."""
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
    return jpeg.getvalue(), box, hash_crop(crop), flaw


def hash_crop(crop: Image.Image) -> int:
    """64 bits: whether each of 8x8 areas is darker than the next."""
    grey = to_tensor(crop.convert("L").resize((9, 8), Image.Resampling.BOX))[..., 0]
    bits = (grey[:, :-1] < grey[:, 1:]).flatten().tolist()
    return sum(bit << place for place, bit in enumerate(bits))


# ----------------------------------------------------------------------------------- the folder and its state


class Folder:
    """A folder of crops with its metadata.csv, a row a post. Crops are on the disk before their row is.

    outcome: "faces" (at least one crop), "none" (no crop, for the reason), "skipped" (not to be had or used), "failed"
    (worth a try in another crawl) or "forgotten".
    """

    def __init__(self, path: str):
        self.path, self.table, self.rows = Path(path), Path(path, "metadata.csv"), {}
        for leftover in (*self.path.glob(".*-*.jpg.*.tmp"), *self.path.glob(".metadata.csv.*.tmp")):
            leftover.unlink()  # of a crawl that was killed while it wrote
        for row in read_table(self.table):
            known = self.rows.get((row["site"], row["id"]))
            if not known or known["outcome"] != "forgotten":  # which no later row undoes
                self.rows[row["site"], row["id"]] = row
        self.faces, self.hashes, self.forgotten = 0, [], set()  # crops; their hashes; forgotten pictures' MD5s
        for row in self.rows.values():
            crops = row["crops"].split()
            words = self.mend_hashes(row["hashes"], crops)
            row["hashes"] = " ".join(words)
            self.faces += len(crops)
            self.hashes += [int(word[1:], 16) for word in words if word[0] == "h"]
            if row["outcome"] == "forgotten":
                self.forgotten.update(word for word in words if word[0] == "m")
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
        cells = [{name: re.sub(FORMULA, r"\1'\2", row.get(name, "")) for name in FIELDS} for row in rows]
        with open(table, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, FIELDS, lineterminator="\n").writerows(cells)
            file.flush()
            os.fsync(file.fileno())

    def choose(self, posts: Iterable[dict], args: argparse.Namespace) -> Iterator[dict]:
        """The posts that are new, or were left for a reason that may hold no more."""
        for post in posts:
            if not post["reason"] and self.forgotten.intersection(post["files"].values()):
                post["reason"] = "forgotten"  # the same picture under another name
            row = self.rows.get((post["site"], post["id"]))
            if not row or row["outcome"] == "failed" or row["reason"] in RECHECKED:
                yield post
            elif row["reason"] in OWN_REASONS and row["reason"] != post["reason"]:
                yield post
            elif row["outcome"] == "none" and not post["reason"] and may_find_more(args, row["reason"], row["options"]):
                yield post

    def add(self, row: dict, crops: list[tuple]) -> list[str]:
        """Save a post's crops, then its row. Returns why it, or some of its crops, was dropped."""
        names, boxes, dropped, hashes = [], [], [], [md5 for md5 in row["files"].values() if md5]
        for jpeg, box, hash, flaw in crops:
            if flaw or any((hash ^ known).bit_count() <= 4 for known in self.hashes):
                dropped.append(flaw or "near-duplicate")
                continue
            names.append(f"{row['site']}-{row['id']}-{len(names)}.jpg")
            with common.replacing(self.path / names[-1]) as temporary:
                temporary.write_bytes(jpeg)
            boxes.append("_".join(map(str, box)))
            hashes.append(f"h{hash:016x}")
            self.hashes.append(hash)
        row |= dict(crops=" ".join(names), boxes=" ".join(boxes), hashes=" ".join(hashes))
        if row["outcome"] == "faces" and not names:
            row |= dict(outcome="none", reason=", ".join(dict.fromkeys(dropped)) or "no face")
        self.rows[row["site"], row["id"]] = row
        self.faces += len(names)
        self.write(self.table, [row])
        return dropped or ([row["reason"]] if row["reason"] else [])

    def forget(self, posts: list[tuple[str, str]]) -> int:
        """Mark posts as never to be fetched, then delete their crops; returns how many. Their hashes stay known."""
        files = {(site, id): sorted(path.name for path in self.path.glob(f"{site}-{id}-*.jpg")) for site, id in posts}
        unknown = ["-".join(post) for post in posts if not files[post] and post not in self.rows]
        if unknown:
            raise common.UserError(f"neither {self.table} nor a crop there has a post {', '.join(unknown)}")
        for site, id in posts:
            hashes = self.mend_hashes(self.rows.get((site, id), {}).get("hashes", ""), files[site, id])
            self.rows[site, id] = dict(site=site, id=id, outcome="forgotten", hashes=" ".join(hashes))
        return self.settle()

    def mend_hashes(self, hashes: str, crops: list[str]) -> list[str]:
        """A row's hashes. Those of its crops are made anew from the files if a spreadsheet has rounded them."""
        words = [word.rjust(17, "h") for word in hashes.split() if re.fullmatch(HASH, word)]
        if sum(word[0] == "h" for word in words) < len(crops):
            words = [word for word in words if word[0] == "m"]
            for name in crops:
                with contextlib.suppress(OSError), Image.open(self.path / name, formats=["JPEG"]) as crop:
                    words.append(f"h{hash_crop(crop):016x}")
        return words


def read_table(path: Path) -> list[dict]:
    """The rows of a metadata.csv, also as editors and spreadsheets save it. Raises UserError."""
    text = re.sub("\r\n?", "\n", read_text(path.read_bytes()) if path.exists() else "")
    delimiter = next((mark for mark in ";\t" if mark in text.partition("\n")[0]), ",")
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(line)]
        fields = ",".join(lines[0] if lines else []).rstrip(",").split(",")  # a spreadsheet may add empty columns
        if text and set(fields) | {"options"} != set(FIELDS):
            raise ValueError("other columns")
        if lines and len(lines[-1]) < len(fields) and not text.endswith("\n"):
            del lines[-1]  # a kill or a full disk tore it
        if any(len(line) < len(fields) or any(line[len(fields) :]) for line in lines):
            raise ValueError("a row of other columns")
    except (csv.Error, ValueError) as error:
        raise common.UserError(f"{path} is damaged or another's ({error}): move it away") from error
    return [{"options": ""} | dict(zip(fields, line)) for line in lines if line != lines[0]]


def read_text(data: bytes) -> str:
    """A text as editors save it: UTF-8, or UTF-16 with its mark. Other bytes count as Latin-1."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    text = data.decode("utf-8-sig", "surrogateescape")  # another byte is now that byte + U+DC00
    return re.sub("[\udc80-\udcff]", lambda other: chr(ord(other[0]) - 0xDC00), text)


# ---------------------------------------------------------------------------------------------------- a crawl


def crawl(args: argparse.Namespace) -> None:
    """From the options to a folder of crops."""
    warnings.filterwarnings("ignore", module="PIL")  # about odd pictures: what matters is told in a line
    with common.locked(Path(args.to)):
        folder = Folder(args.to)
        if args.forget:
            deleted, names = folder.forget(args.forget), ", ".join(map("-".join, args.forget))
            common.show_line(f"{AGENT}: crops deleted: {deleted}; never to be fetched: {names}")
            return
        fetcher, posts = find_posts(args)
        if not posts:
            raise common.UserError(f"{args.urls or args.from_dir} holds no picture")
        if args.detector == "lbp":
            args.cascade = find_cascade(args.cascade)
        common.show_line(f"{AGENT}: {args.to} has {folder.faces:,} faces of {len(folder.rows):,} posts")
        if fetcher:  # pictures are fetched one at a time, so that a killed crawl has fetched at most one in vain
            results = (crop_post(post, fetcher, args) for post in folder.choose(posts, args))
        else:
            posts = list(folder.choose(posts, args))
            torch.set_num_threads(1)  # each: several pictures are searched beside each other
            results = common.in_threads(lambda post: crop_post(post, None, args), posts)
        end = collect(results, folder, args.limit, 0 if args.limit else len(posts))
        common.show_line(f"{AGENT}: reached {end}: {folder.faces:,} faces in {args.to}, credits in {folder.table}")
        why = "that table says why" if folder.rows else "there is no post of that search"
        hint = f"next: python dcgan.py --dataset {shlex.quote(args.to)}" if folder.faces else f"no face yet: {why}"
        common.show_line(f"{AGENT}: {hint}")


def find_posts(args: argparse.Namespace) -> tuple[Fetcher | None, Iterable[dict]]:
    """Who fetches the pictures, unless they are on this disk, and all posts that the options ask for."""
    if args.from_dir:
        folder, crops = Path(args.from_dir).resolve(), Path(args.to).resolve()
        paths = [folder / name for name in common.list_pictures(folder)]
        posts = [name_post("file", str(path), path.as_uri()) for path in paths if not path.is_relative_to(crops)]
        return None, posts
    if args.urls:
        lines = [line.strip() for line in read_text(Path(args.urls).read_bytes()).splitlines()]
        hosts = {host for line in lines for host in re.findall("^https://([^/:?#]+)", line.lower())}
        posts = [name_post("url", line, printable(line, 2000)) for line in lines if line and line[0] != "#"]
        return Fetcher(hosts | args.file_hosts, args.vouched, args.delay, args.contact), posts
    site = SITES[args.site]
    if args.base_url:
        name = re.sub(r"[^a-z0-9.]", "_", urlsplit(args.base_url).hostname)  # --forget parts site and id at the hyphen
        site = site._replace(name=name, home=args.base_url)
    hosts = find_domain(urlsplit(site.home).hostname)
    fetcher = Fetcher(hosts | args.file_hosts, args.vouched, args.delay, args.contact)
    return fetcher, site_posts(fetcher, site, args)


def find_domain(host: str) -> set[str]:
    """The registered domain of a host, such as donmai.us or example.co.uk; none of an IP address or a local name."""
    labels = host.split(".")
    if labels[-1].isdecimal() or ":" in host or len(labels) < 2:
        return set()
    is_national = len(labels[-1]) == 2 and len(labels[-2]) <= 3  # .co.uk, .com.br, .ne.jp
    return {".".join(labels[-3 if is_national else -2 :])}


def name_post(site: str, address: str, page: str) -> dict:
    """A post that no site names: its id is a digest of its address, and no number (12e34567...) to a spreadsheet."""
    digest = hashlib.sha256(os.fsencode(address)).hexdigest()
    id = next(part for part in (digest[i : i + 16] for i in range(48)) if re.search("[abcdf]", part))
    return dict(site=site, id=id, page=page, reason="", files={address: ""})


def crop_post(post: dict, fetcher: Fetcher | None, args: argparse.Namespace) -> tuple[dict, list[tuple]]:
    """A post's row as far as it is known, and its crops."""
    try:
        picture = fetch_picture(post, fetcher) if fetcher else Path(*post["files"])
        options = f"{args.detector} {args.min_face} {args.margin} {args.neighbours}"
        return post | dict(outcome="faces", options=options), crop_faces(decode(picture), args)
    except Unusable as error:
        return post | dict(outcome="skipped" if error.final else "failed", reason=str(error)), []
    except SourceError as error:
        if post["site"] != "url":  # a list goes on with its other hosts
            raise
        return post | dict(outcome="failed", reason=str(error)), []
    except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:  # a picture's sizes can lead to anything
        return post | dict(outcome="failed", reason=f"can't be cropped ({type(error).__name__})"), []


def fetch_picture(post: dict, fetcher: Fetcher) -> bytes:
    """A post's sample, or its original if the sample is gone. Raises Unusable."""
    if post["reason"]:
        raise Unusable(post["reason"], final=True)
    *_, original = post["files"]
    for address in post["files"]:
        try:
            body = fetcher.fetch(address)
            break
        except Unusable as error:
            if error.status not in (404, 410) or address == original:
                raise
    if b"DMI-PROHIBITED" in body:  # IPTC's and PLUS's property for data mining
        raise Unusable("not for training (metadata)", final=True)
    if post["files"][address] not in ("", "md5-" + hashlib.md5(body, usedforsecurity=False).hexdigest()):
        raise Unusable("damaged: another MD5")
    return body


def collect(results: Iterator, folder: Folder, limit: int | None, total: int) -> str:
    """Save results up to the limit of faces, with a line of progress. Returns what ended it. Raises SourceError."""
    before, new, counts, summary = folder.faces, 0, collections.Counter(), "nothing new"
    most = POSTS_PER_FACE * limit if limit else None
    results = watch(itertools.islice(results, most), folder)
    progress = common.Progress(max(0, limit - before) if limit else total, "faces" if limit else "pictures")
    try:
        while not limit or folder.faces < limit:
            if not (result := next(results, None)):
                return f"{POSTS_PER_FACE} posts for each face asked for" if new == most else "the end of the source"
            new += 1
            counts.update(why.partition(":")[0] for why in folder.add(*result))
            faces = folder.faces - before
            summary = f"{faces:,} faces of {new:,} posts"
            if counts:
                summary += "; skipped: " + ", ".join(f"{count:,} {why}" for why, count in counts.most_common())
            progress.update(faces if limit else new, f" ({summary})")
        return "the limit"
    finally:
        common.show_line(f"{AGENT}: {summary}")


def watch(results: Iterator, folder: Folder) -> Iterator:
    """The results. Raises SourceError when too many pictures in a row, or nearly all, did not come."""
    came, lost, in_a_row = 0, collections.Counter(), collections.Counter()
    for row, crops in results:
        is_new = (row["site"], row["id"]) not in folder.rows
        yield row, crops
        if row["site"] == "file" or row["reason"] in OWN_REASONS:
            continue
        if row["outcome"] in ("faces", "none"):
            came += 1  # also without a face
            in_a_row.clear()
            continue
        in_a_row[row["outcome"]] += is_new  # old failures don't end a crawl before its new posts
        lost[row["reason"]] += is_new or row["outcome"] == "failed" or not folder.faces
        if in_a_row["failed"] == FAILURES or in_a_row["skipped"] == REFUSALS:
            raise SourceError(f"{in_a_row.total()} pictures did not come, and none between them did ({row['reason']})")
    if lost.total() > 9 * came and (lost.total() > 2 or not folder.faces):
        why, count = lost.most_common(1)[0]
        raise SourceError(f"{lost.total()} of {lost.total() + came} pictures did not come ({count} times: {why})")


def find_cascade(path: str | None) -> str:
    """The detector's file: the given one, or the author's own, downloaded once and checked."""
    file = Path(path or CASCADE_FILE)
    if not path and not file.exists():
        common.show_line(f"{AGENT}: downloading the face detector (MIT licence, nagadomi) to {file}")
        try:
            data = Fetcher({urlsplit(CASCADE_URL).hostname}, [], 1.0).fetch(CASCADE_URL, is_picture=False)
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
    parser = common.Parser(f"{AGENT}.py", __doc__)
    add, number = parser.add_argument, common.number
    source = parser.add_mutually_exclusive_group().add_argument
    source("--site", choices=list(SITES), default="safebooru", help="whose posts to look through (safebooru)")
    source("--urls", metavar="FILE", help="a list of picture addresses, one a line, instead of a site")
    source("--from-dir", metavar="DIR", help="a folder of pictures instead of a site")
    add("--tags", help="the site's search (1girl solo; all for yandere and konachan)")
    add("--base-url", type=read_home, metavar="URL", help="a mirror of the site's API, as http(s)://HOST:PORT")
    add("--file-host", type=read_host, nargs="+", default=[], metavar="HOST", help="of its files: a host, or its URL")
    add("--to", metavar="DIR", default="data/anime", help="folder of the crops (data/anime)")
    add("--limit", type=number(int, 1), metavar="N", help="faces in the folder at the end (2000 from a site)")
    ratings = f"what to take of {', '.join(RATINGS)} (general)"
    add("--rating", nargs="+", choices=RATINGS, default=["general"], metavar="RATING", help=ratings)
    add("--detector", choices=["lbp", "none"], default="lbp", help="find faces, or take the centre square (lbp)")
    add("--cascade", metavar="FILE", help=f"the detector's file, downloaded when absent ({CASCADE_FILE})")
    add("--neighbours", type=number(int, 0), default=4, metavar="N", help="of a face's windows, more than N agree (4)")
    add("--min-face", type=number(int, 24), default=64, metavar="PIXELS", help="smallest face's side (64)")
    add("--margin", type=number(float, 1, 4), default=1.5, metavar="RATIO", help="the crop's side in face sides (1.5)")
    add("--grey", action="store_true", help="keep grey crops and manga, too")
    add("--delay", type=number(float, 0), default=1.0, metavar="SECONDS", help="between two requests (1)")
    add("--contact", default="none given", metavar="TEXT", help="your page or mail address, which Danbooru asks for")
    add("--forget", nargs="+", default=[], metavar="ID", help="delete these posts' crops, never fetch them again")
    args = parser.parse_args(argv)
    name = r"(?:([a-z0-9._]+)-)?([0-9a-f]{1,16})(?:-\d+\.jpg)?"
    names = [re.fullmatch(name, Path(text).name) for text in args.forget]
    args.file_hosts = {host for host in args.file_host if "/" not in host}
    args.vouched = [host for host in (args.base_url or "", *args.file_host) if "/" in host]
    here = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
    is_here = args.vouched and not args.file_hosts and all(re.fullmatch(here, home) for home in args.vouched)
    is_site = args.urls is None and args.from_dir is None
    is_in_crops = args.from_dir and Path(args.from_dir).resolve().is_relative_to(Path(args.to).resolve())
    for mistake, message in (
        ("" in (args.urls, args.from_dir, args.to), "--urls, --from-dir and --to need a name"),
        (args.tags is not None and not is_site, "--tags goes with --site alone"),
        ((args.base_url or args.file_host) and args.from_dir, "--base-url and --file-host go with --site and --urls"),
        (args.from_dir and not Path(args.from_dir).is_dir(), f"--from-dir {args.from_dir}: no such folder"),
        (is_in_crops, f"--from-dir {args.from_dir} lies in --to, whose pictures are crops"),
        (re.search(OWN_WORDS, args.tags or ""), "--tags: order:, sort: and id: are the crawl's own"),
        (args.delay < 1 and not is_here, "--delay: less than a second is for a --base-url on this machine"),
        (not re.fullmatch("[ -~]{1,200}", args.contact), "--contact is a page or a mail address in ASCII"),
        (not all(names), "--forget takes a crop's file name, SITE-ID or the ID of a --site's post"),
    ):
        if mistake:
            parser.error(message)
    args.limit = args.limit or (2000 if is_site else None)
    args.forget = [(name[1] or args.site, name[2]) for name in names]
    return args


def read_home(text: str) -> str:
    """An argparse type: http://HOST:PORT or https://HOST, without anything behind it."""
    match = re.fullmatch(r"(https?://(?:[a-z0-9.-]+|\[[0-9a-f:]+\])(?::(\d{1,5}))?)/?", text.lower())
    if not match or int(match[2] or 0) >= 2**16:
        raise argparse.ArgumentTypeError(f"must be http://HOST:PORT or https://HOST, not {text!r}")
    return match[1]


def read_host(text: str) -> str:
    """An argparse type: the name of a host, or its home."""
    return text.lower() if re.fullmatch(r"[\w.-]+", text, re.ASCII) and find_domain(text) else read_home(text)


def main(argv: list[str] | None = None) -> None:
    with common.reporting_errors(f"{AGENT}.py"):
        try:
            crawl(parse_args(argv))
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted: the same command goes on from here") from None


if __name__ == "__main__":
    main()
