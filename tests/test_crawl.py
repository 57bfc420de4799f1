"""The crawler against a local site: the right crops, counts and statuses, and no breach of its manners."""

import csv
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

import common
import crawl_anime
from tests import fake_booru
from tests.conftest import Script
from tests.fake_booru import FakeBooru, challenge, draw, encode, picture, status, stream

PNG = encode(draw(2))
ALL = "User-agent: *\n"


@pytest.fixture
def server():
    server = FakeBooru()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The crawler's clock, on which a pause takes no time: all runs at the true one request a second."""
    skipped = [0.0]

    class Clock:
        monotonic = staticmethod(lambda: time.monotonic() + skipped[0])
        time = staticmethod(lambda: time.time() + skipped[0])

        @staticmethod
        def sleep(seconds):
            skipped[0] += seconds

    monkeypatch.setattr(FakeBooru, "clock", staticmethod(Clock.monotonic))
    monkeypatch.setenv("no_proxy", "*")  # whatever this machine uses
    for name, value in dict(time=Clock, CONNECT_TIMEOUT=0.1, TIMEOUT=0.5, DEADLINE=0.8).items():
        monkeypatch.setattr(crawl_anime, name, value)


def options(server, folder, *more, site="safebooru"):
    shared = ["--base-url", server.url, "--to", folder, "--detector", "none", "--contact", "me@example.com"]
    return ["--site", site, *shared, "--min-face", 32, "--limit", 1000, *more]


def run(*argv) -> int:
    try:
        return crawl_anime.main([str(option) for option in argv]) or 0
    except SystemExit as end:
        return end.code


def crawl(server, folder, *more, site="safebooru") -> int:
    return run(*options(server, folder, *more, site=site))


def rows(folder) -> dict[str, dict]:
    with open(Path(folder, "metadata.csv"), newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def crops(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.jpg")}


def check_manners(server):
    """One request at a time with a second between starts, an honest name, robots.txt before the first picture."""
    moments = [moment for moment, _ in server.log]  # which a busy machine notes late
    assert all(b - a > 0.5 for a, b in zip(moments, moments[1:]))
    headers, paths = server.last_headers, [path for _, path in server.log]
    assert "crawl_anime" in headers["User-Agent"] and "me@example.com" in headers["User-Agent"]
    assert not server.pictures() or paths.index("/robots.txt") < paths.index(server.pictures()[0])


# ---------------------------------------------------------------------------------- three families, one crawl
@pytest.mark.parametrize("site", ["safebooru", "danbooru", "yandere", "konachan"])
def test_every_family_pages_to_its_end(server, tmp_path, site):
    server.stock(8, page=3)
    server.posts[1] |= dict(deleted=True)
    server.posts[2] |= dict(rating="e")
    server.posts[3] |= dict(rating="never heard of")
    server.posts[4] |= dict(sample="/samples/7/sample_4.jpg")
    server.files["/samples/7/sample_4.jpg"] = encode(draw(4), "JPEG")
    assert crawl(server, tmp_path, site=site) == 0
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items() if row["outcome"] != "faces"}
    assert reasons == {"7": "no picture", "6": "rating", "5": "rating"}
    assert sorted(crops(tmp_path)) == [f"127.0.0.1-{id}-0.jpg" for id in (1, 2, 3, 4, 8)]
    assert "/samples/7/sample_4.jpg" in server.pictures() and "/images/7/4.png" not in server.pictures()
    assert max(Counter(server.pictures()).values()) == 1
    assert all(row["page"].startswith(server.url) and id in row["page"] for id, row in rows(tmp_path).items())


def test_ratings_tags_and_credits(server, tmp_path):
    server.add(9, encode(draw(9)), rating="q", artist="someone\x1b[31m", source="https://example.com/?a&amp;b\n")
    server.add(10, encode(draw(10)), rating="s")
    server.add(11, encode(draw(11)), tags="1girl Monochrome")
    assert crawl(server, tmp_path, "--rating", "general", "questionable", site="danbooru") == 0
    found = rows(tmp_path)
    assert (found["10"]["reason"], found["10"]["rating"], found["11"]["reason"]) == ("rating", "sensitive", "tag")
    assert (found["9"]["artist"], found["9"]["source"]) == ("someone [31m", "https://example.com/?a&b ")
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert server.searches[0] == "1girl solo" and server.searches[-1] == "1girl solo rating:g"


def test_posts_with_missing_and_odd_fields(server, tmp_path):
    url = f"{server.url}/images/7/1.png"
    odd = [{}, None, 3, {"id": None}, {"id": "../../x"}, {"id": -4}, dict(id=50), dict(id=51, rating="safe")]
    odd += [dict(id=52, rating={"a": 1}, tags=["x"], file_url=url), dict(id=53, rating="safe", file_url="/movie.mp4")]
    odd += [dict(id=54, rating="safe", file_url="https://[::1/a.png"), dict(id="55", rating="safe", file_url=url)]
    server.posts = [dict(id=99 - i, raw=raw) for i, raw in enumerate(odd)]
    assert crawl(server, tmp_path) == 0 and list(rows(tmp_path)) == ["50", "51", "52", "53", "54", "55"]
    reasons = [row["reason"] for row in rows(tmp_path).values()]
    assert reasons == ["rating", "no picture", "rating", "no picture", "Invalid IPv6 URL", ""]


# ----------------------------------------------------------------------------------------- faults of pictures
GREY, SQUARE = encode(draw(53, mode="L").convert("RGB")), draw(2, 256)
BLURRED = encode(draw(50).resize((2, 2)).resize((256, 256), Image.Resampling.BICUBIC))
MAINTENANCE, SHORT = picture(b"<html>back soon", kind="text/html"), picture(PNG[:99], Content_Length="5000")
# name: the faults, one a request; the outcome or reason of the post; how often its picture is asked for
FAULTS = {
    "503 for ever": ([status(503)] * 9, "HTTP 503", 5),
    "429": ([status(429)], "faces", 2),
    "403": ([status(403, b"no\nhotlinks\x1b")], "HTTP 403: no hotlinks", 1),
    "404": ([status(404)], "HTTP 404", 1),
    "reset": ([fake_booru.reset], "faces", 2),
    "silence": ([lambda _: time.sleep(3)], "faces", 2),
    "short body": ([SHORT], "faces", 2),
    "endless body": ([stream(bytes(2**20))], "more than 20 MiB", 1),
    "announced too large": ([picture(b"", Content_Length=str(21 * 2**20))], "more than 20 MiB", 1),
    "dripping body": ([stream(b"x", 0.02)], "faces", 2),
    "a page": ([MAINTENANCE], "not a picture: <html>back soon", 1),
    "a redirect": ([status(302, Location="/images/7/2.png?again")], "faces", 2),
    "a redirect loop": ([status(301, Location="/images/7/2.png")] * 9, "too many redirects", 6),
    "a redirect to another host": ([status(302, Location="https://example.com/1.png")], "on a foreign host", 1),
    "noai": ([picture(PNG, X_Robots_Tag="noindex, noai")], "not for training (X-Robots-Tag)", 1),
    "TDM reservation": ([picture(PNG, TDM_Reservation="1")], "not for training (TDM-Reservation)", 1),
    "Content-Signal": ([picture(PNG, Content_Signal="a=b, ai-train=no")], "not for training (Content-Signal)", 1),
    "Content-Usage": ([picture(PNG, Content_Usage="train-ai=n")], "not for training (Content-Usage)", 1),
    "in XMP": ([picture(encode(SQUARE, "JPEG", xmp=b"DMI-PROHIBITED-AIML"))], "not for training (metadata)", 1),
    "fine: consent": ([picture(PNG, Content_Signal="ai-train=yes", kind="binary/octet-stream")], "faces", 1),
    "42 million pixels": ([picture(encode(Image.new("P", (7000, 6000))))], "too large", 1),
    "truncated JPEG": ([picture(encode(SQUARE, "JPEG")[:5000])], "image file is truncated", 1),
    "grey": ([picture(GREY)], "grey", 1),
    "blurred": ([picture(BLURRED)], "blurred", 1),
    "tiny": ([picture(encode(draw(54, 20)))], "no face", 1),
    "one pixel high": ([picture(encode(draw(55).resize((500, 1))))], "no face", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_picture_leaves_the_others_alone(server, tmp_path, name):
    faults, expected, requests = FAULTS[name]
    path = "/images/7/2.png"
    server.faults[path] = list(faults)
    assert crawl(server, tmp_path) == 0
    found = rows(tmp_path)
    assert (found["2"]["reason"] or found["2"]["outcome"]).startswith(expected)
    assert found["1"]["outcome"] == found["3"]["outcome"] == "faces" and list(found) == ["3", "2", "1"]
    assert len(server.requests(path)) == requests
    check_manners(server)
    server.faults.clear()
    assert crawl(server, tmp_path) == 0  # what is gone or not for us is not asked for again
    assert len(server.requests(path)) == requests + (found["2"]["outcome"] == "failed")


@pytest.mark.full
def test_every_fault_at_once(server, tmp_path, monkeypatch):
    """200 posts, half of them with a fault: exactly the crops that are to be had, and the rest in the next crawl."""
    monkeypatch.setattr(crawl_anime, "TIMEOUT", 0.05)
    monkeypatch.setattr(crawl_anime, "DEADLINE", 0.1)
    server.stock(200, page=30)
    robots = "Disallow: /images/7/14.png\nContent-Usage: /images/7/18.png train-ai=n"
    chance, names = random.Random(7), [name for name in FAULTS if not name.startswith(("fine", "a redirect"))]
    chosen = {str(number): FAULTS[chance.choice(names)] for number in set(range(1, 201, 2))}
    server.faults |= {f"/images/7/{number}.png": list(faults) for number, (faults, _, _) in chosen.items()}
    server.faults["/index.php"] = [status(200), status(503), fake_booru.reset, MAINTENANCE]
    server.faults["/robots.txt"] = [status(503), SHORT, status(200, (ALL + robots).encode())]
    assert crawl(server, tmp_path) == 0
    found = {id: row for id, row in rows(tmp_path).items() if row["outcome"] != "faces"}
    expected = {number: reason for number, (_, reason, _) in chosen.items() if reason != "faces"}
    expected |= {"14": "robots.txt", "18": "not for training (robots.txt)"}
    assert found.keys() == expected.keys()
    assert all(row["reason"].startswith(expected[id]) for id, row in found.items())
    failed = {id for id, row in found.items() if row["outcome"] == "failed"}
    server.faults.clear()
    assert crawl(server, tmp_path) == 0 and len(failed) > 20
    assert {name.split("-")[1] for name in crops(tmp_path)} == rows(tmp_path).keys() - found.keys() | failed


def test_waits_are_as_long_as_asked_for_and_grow(server, tmp_path):
    server.stock(30)
    later = formatdate(crawl_anime.time.time() + 200, usegmt=True)
    faults = [[status(500)] * 4, [status(429)] * 2, [status(503, Retry_After="60")], [status(429, Retry_After=later)]]
    server.faults |= {f"/images/7/{29 - i}.png": fault for i, fault in enumerate(faults)}
    assert crawl(server, tmp_path) == 0
    moments = [moment for moment, path in server.log if path in server.files]
    pauses = [round(b - a) for a, b in zip(moments, moments[1:])]
    assert pauses[:6] == [1, 1, 2, 4, 8, 1] and pauses[9] == 60 and 80 < pauses[11] < 125
    assert 3 < pauses[8] < pauses[12] > 2 * pauses[-1]


# --------------------------------------------------------------------------------------- faults of the source
@pytest.mark.parametrize(
    "fault, message",
    [
        (challenge(503), "a person is there"),
        (status(422, b'{"success": false,\n"message": "too many\x1b tags"}'), '"message": "too many tags"'),
        (status(403, b"Too deep! " + b"x" * 999), "HTTP 403: Too deep! " + "x" * 190 + "\n"),
        (status(200, b'<?xml version="1.0"?><response success="false" reason="API limited"/>'), "API limited"),
        (status(200, b'{"@attributes": {}, "post": []}'), "no list of posts"),
        (status(200, b'[{"id": 5}]'), "the same posts again"),
        (status(200, b'[{"name": 5}, {"name": 6}]'), "posts without ids"),
        (status(429, Retry_After="86400"), "1,440 minutes"),
        (status(302, Location="https://example.com/"), "foreign host"),
        (fake_booru.reset, "no whole answer"),
    ],
)
def test_a_source_that_refuses_ends_the_crawl_with_3(server, tmp_path, capsys, fault, message):
    server.always["/index.php"] = fault
    assert crawl(server, tmp_path) == 3
    error = capsys.readouterr().err
    assert message in error and error.startswith("crawl_anime.py: error: ") and error.count("\n") == 1
    assert "\x1b" not in error
    check_manners(server)
    server.always = {"/images/7/2.png": challenge(403)}
    assert crawl(server, tmp_path) == 3  # for a picture, too
    assert server.pictures() == ["/images/7/3.png", "/images/7/2.png"] and len(crops(tmp_path)) == 1


@pytest.mark.parametrize(
    "path, fault, reason",
    [
        ("", status(500, b"overloaded"), "HTTP 500: overloaded"),
        ("", MAINTENANCE, "not a picture: <html>back soon"),
        ("/robots.txt", status(503), "robots.txt"),
        ("/robots.txt", status(200, b"User-agent: *\nDisallow: /"), "robots.txt"),
    ],
)
def test_ten_failures_in_a_row_end_the_crawl_and_a_later_one_goes_on(server, tmp_path, capsys, path, fault, reason):
    server.stock(15)
    good = "/images/7/15.png"
    server.always = {path: fault} if path else dict.fromkeys(server.files.keys() - {good}, fault)
    assert crawl(server, tmp_path) == 3
    assert capsys.readouterr().err.endswith(f"10 pictures in a row failed, try later or another --site: {reason}\n")
    assert len(rows(tmp_path)) == 10 + (not path) and len(crops(tmp_path)) == (not path)
    assert crawl(server, tmp_path) == 0 and len(rows(tmp_path)) == 15  # old failures don't keep new posts away
    server.always.clear()
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 15 and len(server.requests(good)) == 1
    assert crawl(server, tmp_path) == 0 and (tmp_path / "metadata.csv").read_bytes().count(b"\n") == 16


def test_names_and_proxies(server, tmp_path, monkeypatch, capsys):
    """A name without an address; one whose first is dead, which costs the connect timeout; a proxy that knows it."""
    ports, lookup, here = [], socket.getaddrinfo, server.url

    def look_up(*_, **__):
        if not ports:
            raise socket.gaierror(-2, "Name or service not known")
        return [entry for port in ports for entry in lookup("127.0.0.1", port, type=socket.SOCK_STREAM)]

    server.url = "http://booru.test"
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert crawl(server, tmp_path / "1") == 3 and "booru.test can't be found" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for client in (first, second):  # more than its queue holds: it answers no other
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        ports += [full.getsockname()[1], server.server_port]
        assert crawl(server, tmp_path / "2") == 0 and "seconds to reach booru.test" in capsys.readouterr().out
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setenv("http_proxy", here)
    monkeypatch.setenv("no_proxy", "")
    assert crawl(server, tmp_path / "3") == 0 and crops(tmp_path / "2") == crops(tmp_path / "3") != {}


def test_only_the_sites_own_hosts_are_asked():
    fetcher = crawl_anime.Fetcher("https://danbooru.donmai.us", 1, "")
    assert fetcher.check("https://cdn.donmai.us:443/a é.png#b") == ("https://cdn.donmai.us:443", "/a%20%C3%A9.png")
    for address in ("http://donmai.us/a", "https://evildonmai.us/a", "https://donmai.us@evil.com/a", "file:///a"):
        with pytest.raises(crawl_anime.Unusable, match="address|foreign"):
            fetcher.fetch(address, is_picture=False)
    for host, domain in (("yande.re", "yande.re"), ("a.b.co.uk", "b.co.uk"), ("127.0.0.1", "127.0.0.1"), ("pc", "pc")):
        assert crawl_anime.Fetcher(f"https://{host}", 1, "").domain == domain


# ---------------------------------------------------------------------------------------- robots.txt, opt-outs
ALLOWED, FORBIDDEN, UNTRAINED = "", "robots.txt", "not for training (robots.txt)"


@pytest.mark.parametrize(
    "text, path, expected",
    [  # RFC 9309
        ("user-AGENT : * # all\ndisallow:/a", "/ab?c", FORBIDDEN),
        (ALL + "Disallow: /\nAllow: /a", "/ab", ALLOWED),
        (ALL + "Disallow: /\n\nUser-agent: crawl_anime\nDisallow: /no", "/yes", ALLOWED),
        (ALL + "Disallow: /\n\nUser-agent: crawl_anime*\nDisallow: /no", "/yes", ALLOWED),
        (ALL + "Allow: /\n\nUser-agent: Crawl_Anime/2.0\nDisallow: /no", "/no", FORBIDDEN),
        ("User-agent: crawl_anime\nUser-agent: other\nDisallow: /no\nUser-agent: x\nDisallow: /", "/yes", ALLOWED),
        (ALL + "Crawl-delay: 3\nSitemap: x\nDisallow: /a", "/a", FORBIDDEN),
        (ALL + "Crawl-delay: 10\n\nUser-agent: badbot\nDisallow: /", "/a", ALLOWED),
        (ALL + "Disallow: /%7Ea", "/~a", FORBIDDEN),
        (ALL + "Disallow: /é", "/%C3%A9", FORBIDDEN),
        (ALL + "Disallow: /*%2F*", "/images/7/1.png", ALLOWED),
        (ALL + "Disallow: /*%2f*", "/a%2Fb", FORBIDDEN),
        (ALL + "Disallow: /a\nAllow: /*%2F*", "/a/b", FORBIDDEN),
        # opt-outs
        (ALL + "Content-Signal: search=yes,ai-train=no\nAllow: /", "/a", UNTRAINED),
        (ALL + "Content-Signal: search=no, ai-train=yes\nAllow: /", "/a", ALLOWED),
        (ALL + "Content-Usage: search=y, train-ai=n;exact", "/a", UNTRAINED),
        (ALL + "Content-Usage: train-ai=n\nContent-Usage: /ok/ train-ai=y", "/ok/a", ALLOWED),
        (ALL + "Content-Usage: /no/*.png$ train-ai=n", "/no/a.png", UNTRAINED),
        ("User-agent: other\nContent-Signal: ai-train=no", "/a", ALLOWED),
        ("Content-Signal: ai-train=no\nUser-agent: other\nAllow: /", "/a", UNTRAINED),
    ],
)
def test_the_rules_of_robots_txt(text, path, expected):
    assert crawl_anime.refusal(crawl_anime.parse_robots(text), crawl_anime.as_sent(path)) == expected


@pytest.mark.parametrize(
    "answer, fetched, later",
    [  # what is fetched, and when the file is gone
        (status(200, b"\xef\xbb\xbfUser-agent: *\nDisallow: /images/7/2.png\n"), "31", "2"),
        (status(200, b"User-agent: *\nDisallow: /index.php\n"), "321", ""),  # an API is excepted
        (status(200, b"User-agent: *\nContent-Usage: /images/7/2 train-ai=n\nAllow: /"), "31", ""),
        (status(403), "321", ""),
    ],
)
def test_robots_of_the_site(server, tmp_path, answer, fetched, later):
    server.always["/robots.txt"] = answer
    assert crawl(server, tmp_path) == 0 and len(server.requests("/robots.txt")) == 1
    assert all("robots.txt" in row["reason"] for row in rows(tmp_path).values() if not row["crops"])
    server.always.clear()
    assert crawl(server, tmp_path) == 0 and server.pictures() == [f"/images/7/{n}.png" for n in fetched + later]


@pytest.mark.parametrize("delay, pause", [("7", 7), ("2.5", 2.5), ("0.1", 1), ("nonsense", 1), ("86400", None)])
def test_crawl_delay(server, tmp_path, capsys, delay, pause):
    server.always["/robots.txt"] = status(200, f"{ALL}Crawl-delay: {delay}\nAllow: /".encode())
    assert crawl(server, tmp_path) == (0 if pause else 3)
    moments = [moment for moment, path in server.log if not path.startswith("/index")]
    assert all(pause - 0.1 < b - a < pause + 0.5 for a, b in zip(moments, moments[1:]))
    assert (pause is None) == ("86,400 seconds" in capsys.readouterr().err)  # nobody waits for it


# ------------------------------------------------------------------------------------------------------ state
def test_a_second_crawl_downloads_nothing_and_another_query_adds(server, tmp_path):
    """The first one passes faults of the search, such as an empty page in the middle of its posts."""
    server.stock(12, page=5)
    answer = fake_booru.Handler.answer_search
    server.faults["/index.php"] = [status(503), fake_booru.reset, MAINTENANCE, answer, status(200), status(200, b"[]")]
    assert crawl(server, tmp_path) == 0
    before, table = crops(tmp_path), (tmp_path / "metadata.csv").read_bytes()
    server.log.clear()
    assert crawl(server, tmp_path) == 0 and len(before) == 12
    assert not server.pictures() and crops(tmp_path) == before and (tmp_path / "metadata.csv").read_bytes() == table
    server.add(99, encode(draw(99)))
    assert crawl(server, tmp_path, "--tags", "smile") == 0 and server.searches[-1].startswith("smile")
    assert server.pictures() == ["/images/7/99.png"] and len(crops(tmp_path)) == 13


def test_limits_count_what_is_on_the_disk(server, tmp_path, capsys):
    """A higher one goes on. What is deleted by hand is not fetched again. Without faces there is an end, too."""
    server.stock(15)
    for limit in (10, 10):
        assert crawl(server, tmp_path, "--limit", limit) == 0 and len(server.pictures()) == 10
        assert "reached the limit: 10 faces" in capsys.readouterr().out
    deleted = sorted(crops(tmp_path))[:6]
    for name in deleted:
        (tmp_path / name).unlink()
    assert crawl(server, tmp_path, "--limit", 9, "--again") == 0
    assert len(crops(tmp_path)) == 9 and not set(deleted) & set(crops(tmp_path))
    assert max(Counter(server.pictures()).values()) == 1
    server.stock(0)
    assert crawl(server, tmp_path / "none") == 0 and "there is no post of that search" in capsys.readouterr().out
    server.posts = [dict(id=id, path="/1.png", rating="explicit") for id in range(30, 0, -1)]
    assert crawl(server, tmp_path / "none", "--limit", 2) == 0 and len(rows(tmp_path / "none")) == 20
    assert "no face yet" in capsys.readouterr().out


def test_what_is_dropped_and_looked_at_again(server, tmp_path, capsys):
    """The summary names the options that keep it."""
    server.stock(1)
    server.add(2, encode(draw(2)), rating="explicit")
    server.add(3, encode(draw(3, 40)))  # too small for 64
    server.add(4, encode(draw(4, mode="L")))

    def asked(*more) -> list[str]:
        server.log.clear()
        assert crawl(server, tmp_path, *more) == 0
        return [path[10:-4] for path in server.pictures()]

    assert asked("--min-face", 64) == ["4", "3", "1"]
    server.add(9, encode(draw(1).resize((200, 200)), "JPEG", quality=60))
    assert asked("--rating", "general", "explicit", "--min-face", 64) == ["9"]
    assert [rows(tmp_path)[id]["reason"] for id in "94321"] == ["near-duplicate", "grey", "no face", "rating", ""]
    assert asked("--again") == ["9", "4", "3"]
    summary = "1 near-duplicate (--duplicates --again keeps them), 1 grey (--grey --again keeps them)"
    assert summary in capsys.readouterr().out and len(crops(tmp_path)) == 2
    assert asked("--again", "--rating", "explicit", "--grey", "--duplicates") == ["2"]
    assert asked("--again", "--grey", "--duplicates") == ["9", "4"] and len(crops(tmp_path)) == 5


def test_a_table_that_others_saved_or_a_kill_tore(server, tmp_path, capsys):
    """A spreadsheet runs no cell of it; the crawl goes on from its copy, and from a table of an earlier version."""
    server.posts[0] |= dict(source="=1+1", artist="é")
    server.posts[1] |= dict(source=" @SUM(A1)")
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert [row["source"] for row in rows(tmp_path).values()] == ["'=1+1", "' @SUM(A1)", ""]
    table, whole = tmp_path / "metadata.csv", (tmp_path / "metadata.csv").read_bytes()
    earlier, rest = re.sub(b"(?m),(?=[^,\n]*$)", b",options,", whole), whole[: whole.rindex(b"\n", 0, -1) + 1]
    saved = b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n")
    for copy, missing in ((saved, 0), (earlier, 0), (rest + b'127.0.0.1,2,"http://x', 1), (rest + b"\xe3\x81", 1)):
        server.log.clear()
        table.write_bytes(copy)
        assert crawl(server, tmp_path, site="danbooru") == 0
        assert server.pictures() == missing * ["/images/7/1.png"] and table.read_bytes() == whole
    for foreign in (b"", b"a,b\n1,2\n", whole + b"1,2\n", whole.replace("é".encode(), b"\xe9")):
        table.write_bytes(foreign)
        assert crawl(server, tmp_path) == 2 and "metadata.csv is damaged" in capsys.readouterr().err
        assert table.read_bytes() == foreign


def test_what_else_is_on_the_disk(server, tmp_path, capsys, monkeypatch):
    """Another crawl in the folder and a full disk are one line. Others' files stay."""
    with common.locked(tmp_path):
        assert crawl(server, tmp_path) == 2 and "another process" in capsys.readouterr().err
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        assert crawl(server, tmp_path) == 2 and "No space left" in capsys.readouterr().err
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    (tmp_path / "127.0.0.1-2-0.jpg").write_bytes(b"a crop whose row was lost")
    (tmp_path / ".127.0.0.1-2-0.jpg.99.tmp").write_bytes(b"half a crop")
    assert crawl(server, tmp_path) == 0
    assert (tmp_path / "mine.jpg").read_bytes() == b"mine" and len(crops(tmp_path)) == 4
    assert len(crops(tmp_path)["127.0.0.1-2-0.jpg"]) > 1000 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.full
def test_killed_twenty_times(server, tmp_path):
    """At random requests, then let end: the same crops as of an unbroken crawl, few fetched twice."""
    posts, signals = 200, [signal.SIGKILL] * 20 + [signal.SIGINT, signal.SIGTERM]
    chance = random.Random(posts)
    server.stock(posts, page=40)
    assert crawl(server, tmp_path / "whole") == 0
    server.log.clear()
    command = options(server, tmp_path / "stopped", "--delay", 0.01)
    for place, number in zip(sorted(chance.sample(range(2, posts - 8), len(signals))), signals):
        run = Script("crawl_anime", *command, cwd=tmp_path)
        before = len(server.log)
        while run.process.is_alive() and (len(set(server.pictures())) < place or len(server.log) < before + 2):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(run.process.pid, number)
        assert run.finish() == (-9 if number == signal.SIGKILL else 130)
        assert number == signal.SIGKILL or "interrupted: the same command goes on from here\n" in run.err
    run = Script("crawl_anime", *command, cwd=tmp_path)
    assert run.finish() == 0, run.err
    assert crops(tmp_path / "stopped") == crops(tmp_path / "whole")
    assert (tmp_path / "stopped/metadata.csv").read_bytes() == (tmp_path / "whole/metadata.csv").read_bytes()
    assert len(server.pictures()) <= posts + len(signals)


def test_forgotten_stays_forgotten(server, tmp_path, capsys):
    """Also when its crop or its picture comes back. Posts whose id begins alike stay."""
    server.stock(12)
    assert crawl(server, tmp_path) == 0
    crop = (tmp_path / "127.0.0.1-1-0.jpg").read_bytes()
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-1", "other.site-1") == 2
    assert "has a post other.site-1" in capsys.readouterr().err and len(crops(tmp_path)) == 12
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-1", "127.0.0.1-2-0.jpg") == 0
    assert "crops deleted: 2" in capsys.readouterr().out and len(crops(tmp_path)) == 10
    assert b"127.0.0.1-2-0" not in (tmp_path / "metadata.csv").read_bytes()
    server.log.clear()
    (tmp_path / "127.0.0.1-1-0.jpg").write_bytes(crop)
    server.add(99, encode(draw(2), "JPEG"))
    assert crawl(server, tmp_path, "--again", "--duplicates") == 0
    assert server.pictures() == ["/images/7/99.png"] and len(crops(tmp_path)) == 10
    assert [rows(tmp_path)[id]["outcome"] for id in ("1", "2", "99")] == ["forgotten", "forgotten", "none"]


# ----------------------------------------------------------------------------------- folders, the command line
def test_a_folder_of_pictures(tmp_path, monkeypatch, capsys):
    """At any depth, by their endings and then their content; several threads crop as one does."""
    pictures, command = tmp_path / "in it", ("--from-dir", tmp_path / "in it", "--detector", "none", "--to")
    (pictures / "below").mkdir(parents=True)
    for number, kind in enumerate(["JPEG", "PNG", "BMP", "TIFF", "WEBP"] * 3):
        (pictures / "below" / f"{number}.png").write_bytes(encode(draw(number), kind))
    draw(90).save(pictures / "a\nname\x1b.JPG", "JPEG")
    draw(91, mode="L").save(pictures / "manga.png")
    for name in ("notes.txt", "broken.jpg", ".hidden.png"):
        (pictures / name).write_bytes(b"no picture")
    for folder, threads in (("one", 1), ("many", 4)):
        monkeypatch.setattr(os, "cpu_count", lambda threads=threads: threads)
        assert run(*command, tmp_path / folder) == 0
    assert crops(tmp_path / "one") == crops(tmp_path / "many") and len(crops(tmp_path / "one")) == 16
    assert (tmp_path / "one/metadata.csv").read_bytes() == (tmp_path / "many/metadata.csv").read_bytes()
    assert Counter(row["outcome"] for row in rows(tmp_path / "one").values()) == dict(faces=16, failed=1, none=1)
    assert all("\n" not in row["page"] and "\x1b" not in row["page"] for row in rows(tmp_path / "one").values())
    assert run(*command, tmp_path / "one", "--grey", "--again") == 0 and len(crops(tmp_path / "one")) == 17
    for _ in range(2):  # its own crops are not cropped again
        assert run(*command, pictures / "faces") == 0 and len(rows(pictures / "faces")) == 18
    assert "python dcgan.py --dataset '" in capsys.readouterr().out


MISTAKES = [("--delay", "0.5"), ("--base-url", "ftp://x"), ("--tags", "smile Order:score"), ("--contact", "a\nb")]
MISTAKES += [("--to", ""), ("--to", __file__), ("--limit", "0"), ("--site", "gelbooru"), ("--forget", "../x")]
MISTAKES += [("--from-dir", "no such folder"), ("--from-dir", ".", "--site", "konachan"), ("--cascade", __file__)]
MISTAKES += [("--from-dir", ".", "--tags", "x"), ("--from-dir", ".", "--to", "."), ("--from-dir", ".", "--to", "x")]


@pytest.mark.parametrize("argv", MISTAKES)
def test_mistakes_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert argv[0] in error or argv[1] in error
    assert error.startswith("crawl_anime.py: error: ") and error.count("\n") == 1


def test_the_help_fits_a_screen_and_every_option_has_a_test(monkeypatch, capsys):
    monkeypatch.setattr(crawl_anime, "__doc__", None)  # as by python -OO
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  --")]
    tests = "".join((Path(__file__).parent / name).read_text("utf-8") for name in ("test_crawl.py", "test_detector.py"))
    assert len(lines) <= 24 and len(named) <= 18 and all(f'"{option}"' in tests for option in named)
