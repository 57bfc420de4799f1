"""The crawler against a local site: the right crops, counts and statuses, and no breach of its manners."""

import csv
import gzip
import io
import os
import random
import signal
import ssl
import struct
import time
import zlib
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest
from PIL import Image, features

import common
import crawl_anime
from tests import fake_booru
from tests.conftest import Script
from tests.fake_booru import FakeBooru, challenge, draw, encode, picture, redirect, status


@pytest.fixture
def server():
    server = FakeBooru()
    yield server
    server.close()


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

    monkeypatch.setattr(crawl_anime, "time", Clock)
    monkeypatch.setattr(FakeBooru, "clock", staticmethod(Clock.monotonic))
    monkeypatch.setattr(crawl_anime, "TIMEOUT", 0.5)
    monkeypatch.setattr(crawl_anime, "DEADLINE", 0.8)
    return Clock


def options(server, folder, *more, site="safebooru"):
    shared = ["--base-url", server.url, "--to", folder, "--detector", "none"]
    return ["--site", site, *shared, "--min-face", 32, "--limit", 1000, *more]


def run(*argv) -> int:
    try:
        crawl_anime.main([str(option) for option in argv])
        return 0
    except SystemExit as end:
        return end.code


def crawl(server, folder, *more, site="safebooru") -> int:
    return run(*options(server, folder, *more, site=site))


def crawl_list(server, folder, text: bytes) -> int:
    """Crawl a list of addresses that stands beside the folder."""
    (folder.parent / "list").write_bytes(text)
    shared = ["--base-url", server.url, "--to", folder, "--detector", "none"]
    return run("--urls", folder.parent / "list", *shared, "--delay", 0.01)


def crop(pictures, folder, *more) -> int:
    """Crop a folder of pictures."""
    return run("--from-dir", pictures, "--to", folder, "--detector", "none", *more)


def rows(folder) -> dict[str, dict]:
    with open(Path(folder, "metadata.csv"), newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def crops(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.jpg")}


# ---------------------------------------------------------------------------------- three families, one crawl


@pytest.mark.parametrize("site", ["safebooru", "danbooru", "yandere", "konachan"])
def test_every_family_pages_to_its_end(server, tmp_path, site):
    server.stock(8, page=3)
    server.posts[1] |= dict(deleted=True, path="/images/7/gone.webm")
    server.posts[2] |= dict(rating="e")
    server.posts[3] |= dict(rating="never heard of")
    server.posts[4] |= dict(sample="/samples/7/sample_4.jpg")
    server.files["/samples/7/sample_4.jpg"] = encode(draw(4), "JPEG")
    assert crawl(server, tmp_path / "faces", site=site) == 0
    found = rows(tmp_path / "faces")
    reasons = {id: row["reason"] for id, row in found.items() if row["outcome"] != "faces"}
    assert reasons == {"7": "no picture", "6": "rating", "5": "rating"}
    assert sorted(crops(tmp_path / "faces")) == [f"127.0.0.1-{id}-0.jpg" for id in (1, 2, 3, 4, 8)]
    assert "/samples/7/sample_4.jpg" in server.pictures() and "/images/7/4.png" not in server.pictures()
    assert max(Counter(server.pictures()).values()) == 1
    for row in found.values():
        assert row["page"].startswith(server.url) and row["id"] in row["page"]
    assert all(Image.open(io.BytesIO(jpeg)).size == (256, 256) for jpeg in crops(tmp_path / "faces").values())


def test_ratings_and_faceless_tags(server, tmp_path):
    server.add(9, encode(draw(9)), rating="questionable")
    server.add(10, encode(draw(10)), tags="1girl Monochrome")
    server.add(11, encode(draw(11)), tags="1girl photo_&#40;medium&#41;", rating="Safe")
    assert crawl(server, tmp_path, "--rating", "general", "questionable") == 0
    assert rows(tmp_path)["9"]["outcome"] == "faces" and rows(tmp_path)["10"]["reason"] == "tag"
    assert rows(tmp_path)["11"]["reason"] == "tag"


def test_danbooru_sensitive_is_not_general_and_the_query_says_so(server, tmp_path):
    server.posts[0] |= dict(rating="s", artist="someone\x1b[31m\u202e", source="https://example.com/\n1")
    assert crawl(server, tmp_path, site="danbooru") == 0
    row = rows(tmp_path)["3"]
    assert server.searches == ["1girl solo rating:g"] * 4  # the empty page is asked for again
    assert row["reason"] == "rating" and row["rating"] == "sensitive"
    assert row["artist"] == "someone [31m " and row["source"] == "https://example.com/ 1"


def test_the_site_table_asks_for_what_the_families_know():
    danbooru, moebooru, gelbooru = (crawl_anime.SITES[name].query for name in ("danbooru", "yandere", "safebooru"))
    assert danbooru("a b", 7) == "/posts.json?tags=a+b&limit=200&page=b7"
    assert moebooru("", 7) == "/post.json?tags=id%3A%3C7&limit=100&page=1"
    assert gelbooru("a", None) == "/index.php?page=dapi&s=post&q=index&json=1&limit=100&pid=0&tags=a"


def test_posts_with_missing_and_odd_fields(server, tmp_path):
    odd = [{}, None, 3, "text", [], {"id": None}, {"id": "../../x"}, {"id": -4}, {"id": True}, {"id": 1.5}]
    url = f"{server.url}/images/7/1.png"
    odd += [dict(id=50), dict(id=51, file_url=[url]), dict(id=52, file_url="http://[bad"), dict(id="53", file_url=url)]
    odd += [dict(id=54, rating={"a": 1}, tags=["x"], file_url=url), dict(id=55, rating="safe", file_url="/movie.mp4")]
    odd += [dict(id=56, rating="safe", file_url="//images/7/2.png?56"), dict(id=57, rating="safe", file_url=3)]
    odd += [dict(id=58, rating="safe", directory="../..", image="x/../../1.png")]
    odd += [dict(id=59, rating="safe", directory="\ud800", image="\udfff")]
    odd += [dict(id=60, rating="safe", source="&#" + "9" * 5000)]
    odd += [dict(id=61, rating="safe", file_url="/\ud800.png")]
    odd += [dict(id=62, rating="safe", source="\ud800", file_url=url)]
    server.posts = [dict(id=99 - i, raw=raw) for i, raw in enumerate(odd)]
    assert crawl(server, tmp_path / "faces") == 0
    reasons = {id: row["reason"] or row["outcome"] for id, row in rows(tmp_path / "faces").items()}
    assert reasons == {
        "50": "rating", "51": "rating", "52": "rating", "53": "rating", "54": "rating",
        "55": "no picture", "56": "not an https address", "57": "no picture", "58": "HTTP 404",
        "59": "no picture", "60": "no picture", "61": "not an address", "62": "faces",
    }  # fmt: skip
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == [".lock", "127.0.0.1-62-0.jpg", "faces", "metadata.csv"]


# ----------------------------------------------------------------------------------------- faults of pictures

PNG = encode(draw(2))
JPEG = encode(draw(2, 256), "JPEG")
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + (header := b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0))
    + struct.pack(">I", zlib.crc32(header[4:]))
    + b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"
)
SMALLER_BOMB = encode(Image.new("P", (7000, 6000)))


def try_later(code):
    """Retry-After as a date, half a minute from now on the crawler's clock."""
    return lambda handler: handler.answer(code, Retry_After=formatdate(crawl_anime.time.time() + 30, usegmt=True))


# name: the faults, one a request; the outcome or reason of the post; how often its picture is asked for
FAULTS = {
    "500 then success": ([status(500)], "faces", 2),
    "502 four times": ([status(502)] * 4, "faces", 5),
    "503 for ever": ([status(503)] * 9, "HTTP 503", 5),
    "408": ([status(408)], "faces", 2),
    "421": ([status(421)], "faces", 2),
    "429": ([status(429)], "faces", 2),
    "429 with seconds": ([status(429, Retry_After="1")], "faces", 2),
    "429 with a date": ([try_later(429)], "faces", 2),
    "429 with a date gone by": ([status(429, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT")], "faces", 2),
    "429 with nonsense": ([status(429, Retry_After="²"), status(429, Retry_After="-5")], "faces", 3),
    "400": ([status(400)], "HTTP 400", 1),
    "403": ([status(403)], "HTTP 403", 1),
    "404": ([status(404)], "HTTP 404", 1),
    "410": ([status(410)], "HTTP 410", 1),
    "204": ([status(204)], "HTTP 204", 1),
    "206": ([status(206, PNG[:99])], "HTTP 206", 1),
    "reset": ([fake_booru.reset], "faces", 2),
    "hang-up": ([fake_booru.hang_up], "faces", 2),
    "silence": ([fake_booru.silence], "faces", 2),
    "no HTTP": ([fake_booru.garbage], "faces", 2),
    "short body": ([fake_booru.short], "faces", 2),
    "short body for ever": ([fake_booru.short] * 9, "broke off", 5),
    "broken chunks": ([fake_booru.broken_chunks], "faces", 2),
    "endless body": ([fake_booru.endless], "more than 20 MiB", 1),
    "announced too large": ([picture(b"", Content_Length=str(21 * 2**20))], "more than 20 MiB", 1),
    "dripping body": ([fake_booru.drip], "faces", 2),
    "dripping body without length": ([fake_booru.drip_without_length], "faces", 2),
    "dripping headers": ([fake_booru.drip_headers], "faces", 2),
    "a page": ([picture(b"<html>", kind="text/html")], "not a picture", 1),
    "a page that claims to be a picture": ([picture(b"<html>" * 99)], "damaged: another MD5", 1),
    "compressed": ([picture(gzip.compress(PNG), Content_Encoding="gzip")], "compressed, though not asked for", 1),
    "a bomb": ([picture(gzip.compress(bytes(10**8)), Content_Encoding="br")], "compressed, though not asked for", 1),
    "a redirect to itself under another name": ([redirect("/images/7/2.png?again")], "faces", 2),
    "a permanent redirect": ([redirect("/images/7/2.png?again", 308)], "faces", 2),
    "a redirect loop": ([redirect("/images/7/2.png")] * 9, "too many redirects", 6),
    "a redirect nowhere": ([status(302)] * 9, "too many redirects", 6),
    "a redirect to nonsense": ([redirect("http://[")] * 9, "too many redirects", 6),
    "a redirect to another host": ([redirect("http://example.com/images/7/1.png")], "not an https address", 1),
    "a redirect to another https host": ([redirect("https://example.com/1.png")], "on a foreign host", 1),
    "a redirect to another port": ([redirect("http://127.0.0.1:9/1.png")], "not an https address", 1),
    "a redirect to a user's password": ([redirect("https://a:b@example.com/")], "not an https address", 1),
    "a redirect to a file": ([redirect("file:///etc/passwd")], "not an https address", 1),
    "a redirect to ftp": ([redirect("ftp://127.0.0.1/1.png")], "not an https address", 1),
    "a redirect to a link-local address": ([redirect("http://169.254.169.254/latest")], "not an https address", 1),
    "a redirect to a private address": ([redirect("https://10.0.0.1/1.png")], "on a foreign host", 1),
    "noai": ([picture(PNG, X_Robots_Tag="noindex, noai")], "not for training (X-Robots-Tag)", 1),
    "noimageai": ([picture(PNG, X_Robots_Tag="otherbot: NoImageAI")], "not for training (X-Robots-Tag)", 1),
    "TDM reservation": ([picture(PNG, TDM_Reservation="1")], "not for training (TDM-Reservation)", 1),
    "Content-Signal": ([picture(PNG, Content_Signal="a=b, ai-train=no")], "not for training (Content-Signal)", 1),
    "Content-Usage": ([picture(PNG, Content_Usage="train-ai=n")], "not for training (Content-Usage)", 1),
    "fine: consent": ([picture(PNG, Content_Signal="ai-train=yes", Content_Usage="train-ai=y, a=n")], "faces", 1),
    "fine: not compressed": ([picture(PNG, Content_Encoding="none")], "faces", 1),
    "fine: noindex alone": ([picture(PNG, X_Robots_Tag="noindex")], "faces", 1),
    "fine: bytes without a type": ([picture(PNG, kind=None)], "faces", 1),
    "fine: bytes of an empty type": ([picture(PNG, kind="")], "faces", 1),
    "fine: binary": ([picture(PNG, kind="binary/octet-stream")], "faces", 1),
    "fine: application": ([picture(PNG, kind="application/octet-stream")], "faces", 1),
    "fine: a picture of any kind": ([picture(PNG, kind="IMAGE/X")], "faces", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_picture_leaves_the_others_alone(server, tmp_path, name):
    faults, expected, requests = FAULTS[name]
    path = "/images/7/2.png"
    server.faults[path] = list(faults)
    assert crawl(server, tmp_path / "faces") == 0
    found = rows(tmp_path / "faces")
    assert (found["2"]["reason"] or found["2"]["outcome"]) == expected
    assert found["1"]["outcome"] == found["3"]["outcome"] == "faces" and list(found) == ["3", "2", "1"]
    assert len(server.requests(path)) == requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]
    check_manners(server)


def check_manners(server):
    """One request at a time with a second between starts, an honest name, robots.txt before the first picture."""
    moments = [moment for moment, _, _ in server.log]  # which a busy machine notes late
    assert all(b - a > 0.5 for a, b in zip(moments, moments[1:]))
    assert "crawl_anime" in server.last_headers["User-Agent"]
    assert server.last_headers["Accept-Encoding"] == "identity" and "Cookie" not in server.last_headers
    paths = [path for _, path, _ in server.log]
    if server.pictures():
        assert paths.index("/robots.txt") < paths.index(server.pictures()[0]) and paths.count("/robots.txt") >= 1
    assert all(host == server.url.removeprefix("http://") for _, _, host in server.log)


@pytest.mark.parametrize("fault", [status(503, Retry_After="30"), try_later(503)])
def test_retry_after_is_obeyed(server, tmp_path, fault):
    server.faults["/images/7/2.png"] = [fault]
    assert crawl(server, tmp_path) == 0
    first, second = server.requests("/images/7/2.png")
    assert 28 < second - first < 40 and not [moment for moment, _, _ in server.log if first < moment < second]


def test_slower_after_429_then_recovering(server):
    fetcher = crawl_anime.Fetcher(set(), [server.url], 1)
    server.faults["/images/7/1.png"] = [status(429), status(429)]
    fetcher.fetch(f"{server.url}/images/7/1.png")
    slow = fetcher.pace
    assert 3 < slow <= 4
    fetcher.fetch(f"{server.url}/images/7/2.png")
    assert 1 < fetcher.pace < slow


def test_backoff_grows(server, tmp_path):
    server.faults["/images/7/2.png"] = [status(500)] * 4
    crawl(server, tmp_path)
    moments = server.requests("/images/7/2.png")
    assert all(2**i - 0.1 < b - a < 2 ** (i + 1) + 0.5 for i, (a, b) in enumerate(zip(moments, moments[1:])))


def test_minimum_speed(server, monkeypatch):
    monkeypatch.setattr(crawl_anime, "GRACE", 0.1)
    monkeypatch.setattr(crawl_anime, "TRIES", 1)
    server.always["/slow.png"] = fake_booru.drip
    server.always["/robots.txt"] = status(404)
    with pytest.raises(crawl_anime.Unusable, match="too slow"):
        crawl_anime.Fetcher(set(), [server.url], 0.01).fetch(f"{server.url}/slow.png")


BROKEN = {
    "pixel bomb": (BOMB, "too large"),
    "42 million pixels": (SMALLER_BOMB, "too large"),
    "truncated PNG": (PNG[: len(PNG) // 2], "damaged: "),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], "damaged: "),
    "empty": (b"", "broke off"),
    "TIFF": (encode(draw(2), "TIFF"), "faces"),
    "PostScript": (encode(draw(2), "EPS"), "no image"),
    "BMP": (encode(draw(2), "BMP"), "faces"),
    "16 bits of grey": (encode(Image.new("I;16", (64, 64))), "grey"),
    "1 bit": (encode(draw(2, mode="1")), "grey"),
    "grey": (encode(draw(2, mode="L")), "grey"),
    "grey in colour": (encode(draw(2, mode="L").convert("RGB")), "grey"),
    "grey and alpha": (encode(draw(2, mode="LA")), "grey"),
    "blurred": (encode(draw(2).resize((2, 2)).resize((256, 256), Image.Resampling.BICUBIC)), "blurred"),
    "one colour": (encode(Image.new("RGB", (99, 99), "red")), "blurred"),
    "tiny": (encode(draw(2, 20)), "no face"),
    "one pixel high": (encode(draw(2).resize((500, 1))), "no face"),
    "palette": (encode(draw(2, mode="P")), "faces"),
    "palette with transparency": (encode(draw(2, mode="P"), transparency=3), "faces"),
    "RGBA": (encode(draw(2, mode="RGBA")), "faces"),
    "CMYK": (encode(draw(2, mode="CMYK"), "JPEG"), "faces"),
    "YCbCr": (encode(draw(2, mode="YCbCr"), "JPEG"), "faces"),
    "GIF": (encode(draw(2), "GIF", save_all=True, append_images=[draw(5)]), "faces"),
    "WebP": (encode(draw(2), "WEBP"), "faces"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_picture(server, tmp_path, name):
    body, expected = BROKEN[name]
    server.add(7, body)
    server.posts.pop()  # a post may not differ from one that is there already
    server.posts.pop()
    assert crawl(server, tmp_path) == 0
    row = rows(tmp_path)["7"]
    assert (row["reason"] or row["outcome"]).startswith(expected)
    assert rows(tmp_path)["3"]["outcome"] == "faces"


def test_corrupted_original_is_found_by_its_md5(server, tmp_path):
    body = bytearray(JPEG)
    body[len(body) // 2] ^= 255
    server.files["/images/7/2.png"] = bytes(body)
    assert crawl(server, tmp_path) == 0
    assert rows(tmp_path)["2"]["reason"] == "damaged: another MD5" and len(crops(tmp_path)) == 2


def test_a_sample_that_is_gone_gives_way_to_the_original(server, tmp_path):
    server.posts[0] |= dict(sample="/samples/7/gone.jpg")
    assert crawl(server, tmp_path, site="yandere") == 0
    assert server.pictures()[:2] == ["/samples/7/gone.jpg", "/images/7/3.png"] and len(crops(tmp_path)) == 3


def test_orientation_is_heeded():
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image = crawl_anime.decode(encode(draw(1).resize((60, 40)), "JPEG", exif=exif))
    assert image.size == (40, 60)


# --------------------------------------------------------------------------------------- faults of the source


@pytest.mark.parametrize(
    "fault, message",
    [
        (challenge(403), "prove that a person"),
        (challenge(503), "prove that a person"),
        (status(403, b"no"), "HTTP 403"),
        (status(422, b'{"success": false, "message": "too many\\u001b[31m tags"}'), "too many\\u001b[31m tags"),
        (status(422, b'{"error": "TagLimitError", "message": "\\"a\\" is one too many"}'), '"a" is one too many'),
        (status(200, b'{"message": "' + b"\\" * 9999), "of another kind"),
        (status(401, b"x"), "HTTP 401"),
        (status(500), "HTTP 500"),
        (status(200, b"<html>maintenance"), "JSON"),
        (status(200, b'[{"id": 1'), "JSON"),
        (status(200, b"[" * 100_000), "JSON"),
        (status(200, b'"Search error: too deep"'), "Search error: too deep"),
        (status(200, b'{"@attributes": {}, "post": []}'), "of another kind"),
        (status(200, b"Too deep! Pull it back"), "Too deep! Pull it back"),
        (status(403, b"Too deep! Pull it back"), "HTTP 403: Too deep! Pull it back"),
        (status(422, b'{"success": false, "reason": "tag limit"}'), "HTTP 422: tag limit"),
        (status(200, b'{"success": false, "reason": "tag limit"}'), "in JSON: tag limit"),
        (status(200, b'<?xml version="1.0"?><response success="false" reason="API limited"/>'), "API limited"),
        (status(500, b'{"message": ' + b"[" * 9000), "HTTP 500"),
        (fake_booru.chunk_of(b"f" * 20), "refuses or fails: no whole answer"),
        (fake_booru.chunk_of(b"-2"), "refuses or fails"),
        (status(429, Retry_After="86400"), "1,440 minutes"),
        (status(429, Retry_After="9" * 400), "long pause"),
        (redirect("https://example.com/"), "foreign host"),
        (fake_booru.reset, "no whole answer"),
        (status(200, b'[{"id": 5}]'), "the same posts again"),
        (status(200, b'[{"no": 5}]'), "the same posts again"),
    ],
)  # fmt: skip
def test_a_source_that_refuses_ends_the_crawl_with_3(server, tmp_path, capsys, fault, message):
    server.always["/index.php"] = fault
    assert crawl(server, tmp_path) == 3
    error = capsys.readouterr().err
    assert message in error and error.startswith("crawl_anime.py: error: ") and error.count("\n") == 1
    assert "\x1b" not in error
    check_manners(server)


def test_a_challenge_for_a_picture_ends_the_crawl(server, tmp_path):
    server.always["/images/7/2.png"] = challenge(403)
    assert crawl(server, tmp_path) == 3
    assert server.pictures() == ["/images/7/3.png", "/images/7/2.png"] and len(crops(tmp_path)) == 1


def test_a_server_that_is_down_ends_the_crawl_and_the_next_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(crawl_anime, "TRIES", 2)
    server.stock(15)
    server.always |= {path: status(500) for path in server.files if path != "/images/7/15.png"}
    assert crawl(server, tmp_path) == 3
    assert len(server.pictures()) == 1 + 2 * crawl_anime.FAILURES
    server.always.clear()
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 15
    assert len(server.requests("/images/7/15.png")) == 1
    assert crawl(server, tmp_path) == 0  # which leaves one row of each post, the last
    assert (tmp_path / "metadata.csv").read_bytes().count(b"\n") == 16 and len(rows(tmp_path)) == 15
    assert {row["outcome"] for row in rows(tmp_path).values()} == {"faces"}


def test_a_source_that_recovers(server, tmp_path):
    server.faults["/index.php"] = [status(503), fake_booru.short, fake_booru.reset]
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 3


def test_no_server(tmp_path, capsys):
    server = FakeBooru()
    server.close()
    assert crawl(server, tmp_path) == 3 and "refuses or fails: no whole answer" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- robots.txt


ALLOWED, FORBIDDEN, UNTRAINED = "", "robots.txt", "not for training (robots.txt)"


@pytest.mark.parametrize(
    "text, path, expected",
    [  # RFC 9309
        ("", "/a", ALLOWED),
        ("User-agent: *\nDisallow:", "/a", ALLOWED),
        ("User-agent: *\nDisallow: /", "/a", FORBIDDEN),
        ("user-AGENT : * # all\ndisallow:/a", "/ab?c", FORBIDDEN),
        ("User-agent: *\nDisallow: /\nAllow: /a", "/ab", ALLOWED),
        ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", ALLOWED),
        ("User-agent: *\nDisallow: /*.json", "/posts.json?tags=", FORBIDDEN),
        ("User-agent: *\nDisallow: /*.json$", "/posts.json?tags=", ALLOWED),
        ("User-agent: *\nDisallow: /*.png$", "/x.png.png", FORBIDDEN),
        ("User-agent: *\nDisallow: *a*b", "/xxaxxb", FORBIDDEN),
        ("User-agent: *\nDisallow: /a*a$", "/a", ALLOWED),
        ("User-agent: *\nDisallow: /\n\nUser-agent: crawl_anime\nDisallow: /no", "/yes", ALLOWED),
        ("User-agent: *\nAllow: /\n\nUser-agent: Crawl_Anime/2.0\nDisallow: /no", "/no", FORBIDDEN),
        ("User-agent: crawl_anime\nUser-agent: other\nDisallow: /no\nUser-agent: x\nDisallow: /", "/yes", ALLOWED),
        ("User-agent: crawl_anime\nDisallow: /a\n\nUser-agent: crawl_anime\nDisallow: /b", "/b", FORBIDDEN),
        ("User-agent: crawl_anime\nDisallow:\n\nUser-agent: *\nDisallow: /", "/a", ALLOWED),
        ("Disallow: /\nnonsense\n:\n", "/a", ALLOWED),
        ("User-agent: *\nCrawl-delay: 3\nSitemap: x\nDisallow: /a", "/a", FORBIDDEN),
        ("User-agent: *\nDisallow: /%7Ea", "/~a", FORBIDDEN),
        ("User-agent: *\nDisallow: /" + "*a" * 3000 + "b", "/" + "a" * 5000, ALLOWED),
        ("User-agent: *\rDisallow: /a\r\n", "/a", FORBIDDEN),
        # opt-outs
        ("User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /", "/a", UNTRAINED),
        ("User-agent: *\nContent-Signal: search=yes, ai-train=yes\nAllow: /", "/a", ALLOWED),
        ("User-agent: *\nContent-Signal: search=no, ai-input=no", "/a", ALLOWED),
        ("user-agent: *\nCONTENT-SIGNAL: AI-Train = NO", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: train-ai=n", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: search=y, train-ai=n;exact", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: ai=n", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: genai=n", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: train-ai=y, search=n", "/a", ALLOWED),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /ok/ train-ai=y", "/ok/a", ALLOWED),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /ok/ train-ai=y", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: /no/*.png$ train-ai=n", "/no/a.png", UNTRAINED),
        ("User-agent: *\nContent-Usage: /no/*.png$ train-ai=n", "/no/a.png?x", ALLOWED),
        ("User-agent: *\nContent-Usage: /a train-ai=y\nContent-Usage: /a train-ai=n", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /a search=y", "/a", UNTRAINED),
        ("User-agent: other\nContent-Signal: ai-train=no", "/a", ALLOWED),
        ("User-agent: crawl_anime\nContent-Signal: ai-train=no\nUser-agent: *\nAllow: /", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: train-ai=n\nUser-agent: crawl_anime\nContent-Usage: train-ai=y", "/a", ALLOWED),
        ("User-agent: *\nContent-Signal: ai-train=no\nUser-agent: x\nContent-Signal: ai-train=yes", "/a", UNTRAINED),
        ("Content-Signal: ai-train=no\nUser-agent: other\nAllow: /", "/a", UNTRAINED),
        ("# Content-Signal: ai-train=no", "/a", ALLOWED),
    ],
)  # fmt: skip
def test_the_rules_of_robots_txt(text, path, expected):
    assert crawl_anime.refusal(crawl_anime.parse_robots(text), path) == expected


@pytest.mark.parametrize(
    "answer, fetched",
    [
        (status(200, b"\xef\xbb\xbfUser-agent: *\nDisallow: /images/7/2.png\n"), ["3.png", "1.png"]),
        (status(200, "User-agent: *\nDisallow: /images/7/2.png\n".encode("utf-16")), ["3.png", "1.png"]),
        (status(200, b"User-agent: *\nDisallow: /index.php\n"), ["3.png", "2.png", "1.png"]),  # an API is excepted
        (status(403), ["3.png", "2.png", "1.png"]),
        (status(200, b"\xff\xfe\x00" * 1000), ["3.png", "2.png", "1.png"]),
    ],
)  # fmt: skip
def test_robots_of_the_site(server, tmp_path, answer, fetched):
    server.always["/robots.txt"] = answer
    assert crawl(server, tmp_path) == 0
    assert [path.rpartition("/")[2] for path in server.pictures()] == fetched
    assert all(row["reason"] == "robots.txt" for row in rows(tmp_path).values() if not row["crops"])
    assert len(server.requests("/robots.txt")) == 1


def test_robots_txt_has_a_bound_in_time():
    before = time.process_time()
    for text in ("User-agent: a\n" * 30_000 + "User-agent: *\n", "User-agent: *\nUser-agent: x\n" * 9000):
        rules = crawl_anime.parse_robots(text + "Disallow: /x*y$\n" * 8000)
        assert len(rules) == 8000 and crawl_anime.refusal(rules, "/a") == ""
    assert time.process_time() - before < 5


# ----------------------------------------------------------------------------------------------------- safety


@pytest.mark.parametrize(
    "address, reason",
    [
        ("http://safebooru.org/a.png", "not an https address"),
        ("https://safebooru.org:8443/a.png", "not an https address"),
        ("https://safebooru.org.evil.com/a.png", "on a foreign host"),
        ("https://evilsafebooru.org/a.png", "on a foreign host"),
        ("https://safebooru.org@evil.com/a.png", "not an https address"),
        ("https://127.0.0.1/a.png", "on a foreign host"),
        ("https:///a.png", "on a foreign host"),
        ("https://[::1", "not an address"),
        ("https://safebooru.org:99999/", "not an address"),
        ("javascript:alert(1)", "not an https address"),
        ("data:image/png;base64,AAAA", "not an https address"),
        ("https://a..b.safebooru.org/a.png", "not an address"),
        (f"https://{'a' * 64}.safebooru.org/a.png", "not an address"),
        ("https://\udcff.safebooru.org/a.png", "not an address"),
        ("https://safebooru.org/a", ""),
        ("https://IMG.safebooru.org:443/a", ""),
        ("http://LOCALHOST:1234/a", ""),
    ],
)  # fmt: skip
def test_addresses(address, reason):
    fetcher = crawl_anime.Fetcher({"safebooru.org"}, ["http://localhost:1234"], 1)
    if reason:
        with pytest.raises(crawl_anime.Unusable, match=reason):
            fetcher.fetch(address, is_picture=False)
    else:
        fetcher.check(address, True)


PRIVATE = (
    "10.0.0.1 169.254.169.254 127.0.0.1 ::1 fe80::1%eth0 ::ffff:10.0.0.1 fd00::1 0.0.0.0 224.0.0.1 100.64.0.1 "
    "2001:db8::1 64:ff9b::10.0.0.1 ::10.0.0.1 2002:a00:1:: 2002:7f00:1:: ::ffff:0:10.0.0.1 64:ff9b::127.0.0.1 "
    "64:ff9b:1::1 fec0::1 fe00::1 4000::1"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_a_name_that_leads_into_a_private_network_is_refused(monkeypatch, address):
    found = [(0, 0, 0, "", ("93.184.215.14", 443)), (0, 0, 0, "", (address, 443))]
    monkeypatch.setattr(crawl_anime.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(crawl_anime.socket, "create_connection", lambda *_: pytest.fail("connected"))
    with pytest.raises(crawl_anime.Unusable, match="private network"):
        crawl_anime.Fetcher({"safebooru.org"}, [], 0).fetch("https://safebooru.org/a.png", is_picture=False)


def test_a_name_of_many_addresses_has_a_bound_in_time(monkeypatch):
    found, tried = [(0, 0, 0, "", (f"93.184.215.{number}", 443)) for number in range(100)], []

    def connect(address, *_):
        tried.append(address)
        raise OSError("no route")

    monkeypatch.setattr(crawl_anime.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(crawl_anime.socket, "create_connection", connect)
    with pytest.raises(crawl_anime.Unusable, match="no whole answer"):
        crawl_anime.Fetcher({"safebooru.org"}, [], 0).fetch("https://safebooru.org/a.png", is_picture=False)
    assert len(tried) == 4 * crawl_anime.TRIES


def test_a_certificate_that_does_not_hold_is_no_answer(monkeypatch):
    """OpenSSL's error for it is a ValueError, too."""

    class Context:
        def wrap_socket(self, *_, **__):
            raise ssl.SSLCertVerificationError("self-signed")

    monkeypatch.setattr(crawl_anime.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.215.14", 443))])
    monkeypatch.setattr(crawl_anime.socket, "create_connection", lambda *_: None)
    monkeypatch.setattr(crawl_anime.ssl, "create_default_context", Context)
    with pytest.raises(crawl_anime.Unusable, match="no whole answer .SSLCertVerificationError"):
        crawl_anime.Fetcher({"safebooru.org"}, [], 0).fetch("https://safebooru.org/a.png", is_picture=False)


def test_a_base_urls_crops_can_be_forgotten_and_its_usual_port_may_be_left_out():
    args = crawl_anime.parse_args(["--base-url", "https://my-mirror.example:443", "--forget", "my_mirror.example-12"])
    fetcher, posts = crawl_anime.find_posts(args)
    assert posts.gi_frame.f_locals["site"].name == "my_mirror.example" == args.forget[0][0]
    _, trusted, _ = fetcher.check("https://my-mirror.example/a.png", True)
    assert trusted
    assert crawl_anime.parse_args(["--base-url", "http://[::1]:8000", "--delay", "0"]).delay == 0


def test_the_connection_goes_to_the_very_address_that_was_checked(monkeypatch):
    """A name that leads elsewhere when it is looked up again (DNS rebinding) finds nobody who looks."""
    answers, connected, names = [["93.184.215.14", "93.184.215.15"], ["10.0.0.1"]], [], []

    def look_up(host, port, **_):
        return [(0, 0, 0, "", (address, port)) for address in answers.pop(0)]

    def connect(address, *_):
        connected.append(address)
        if len(connected) == 1:
            raise OSError("the first address is down")
        return "socket"

    class Context:
        def wrap_socket(self, connection, server_hostname):
            names.append(server_hostname)
            raise OSError("far enough")

    monkeypatch.setattr(crawl_anime.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(crawl_anime.socket, "create_connection", connect)
    monkeypatch.setattr(crawl_anime.ssl, "create_default_context", Context)
    monkeypatch.setattr(crawl_anime.http.client, "HTTPSConnection", crawl_anime.http.client.HTTPConnection)
    monkeypatch.setattr(crawl_anime, "TRIES", 1)
    with pytest.raises(crawl_anime.Unusable, match="no whole answer"):
        crawl_anime.Fetcher({"safebooru.org"}, [], 0).fetch("https://safebooru.org/a.png", is_picture=False)
    assert connected == [("93.184.215.14", 443), ("93.184.215.15", 443)]
    assert names == ["safebooru.org"] and answers == [["10.0.0.1"]]


# ------------------------------------------------------------------------------------------------------ state


def test_a_second_crawl_downloads_nothing_and_another_query_adds(server, tmp_path):
    assert crawl(server, tmp_path) == 0
    before, table = crops(tmp_path), (tmp_path / "metadata.csv").read_bytes()
    server.log.clear()
    assert crawl(server, tmp_path) == 0
    assert not server.pictures() and crops(tmp_path) == before and (tmp_path / "metadata.csv").read_bytes() == table
    server.add(9, encode(draw(9)))
    assert crawl(server, tmp_path, "--tags", "smile \udcff") == 0  # a byte of another encoding
    assert server.pictures() == ["/images/7/9.png"] and set(crops(tmp_path)) > set(before)


def test_limit_stops_the_crawl_and_a_higher_one_goes_on(server, tmp_path, capsys):
    assert crawl(server, tmp_path, "--limit", 2) == 0
    assert len(crops(tmp_path)) == 2 and "reached the limit" in capsys.readouterr().out
    assert crawl(server, tmp_path, "--limit", 2) == 0 and len(server.pictures()) == 2
    assert crawl(server, tmp_path, "--limit", 3) == 0 and len(crops(tmp_path)) == 3


def test_a_crawl_without_faces_is_bounded(server, tmp_path, capsys):
    server.stock(0)
    for number in range(1, 30):
        server.add(number, b"", rating="explicit")
    assert crawl(server, tmp_path, "--limit", 2) == 0
    assert len(rows(tmp_path)) == 20 and not server.pictures() and "no face yet" in capsys.readouterr().out


def test_a_search_without_posts(server, tmp_path, capsys):
    server.stock(0)
    assert crawl(server, tmp_path) == 0 and "there is no post of that search" in capsys.readouterr().out


def test_near_duplicates_are_dropped(server, tmp_path, capsys):
    server.add(9, encode(draw(3).resize((200, 200)), "JPEG", quality=60))
    assert crawl(server, tmp_path) == 0
    assert rows(tmp_path)["3"]["reason"] == "near-duplicate" and "1 near-duplicate" in capsys.readouterr().out
    server.add(10, encode(draw(9)))
    server.add(11, encode(draw(9)))
    assert crawl(server, tmp_path) == 0  # against the crops of an earlier crawl, too
    assert len(crops(tmp_path)) == 4


@pytest.mark.parametrize("torn", [b"127.0.0.1,2,http", b'127.0.0.1,2,"http://x', b"\xe3\x81", b"x" * 5000])
def test_a_torn_last_row_is_repaired(server, tmp_path, torn):
    assert crawl(server, tmp_path) == 0
    whole, table = (tmp_path / "metadata.csv").read_bytes(), tmp_path / "metadata.csv"
    last_row = whole.rindex(b"\n", 0, -1) + 1
    table.write_bytes(whole[:last_row] + torn)
    assert crawl(server, tmp_path) == 0
    assert table.read_bytes() == whole and len(crops(tmp_path)) == 3
    assert Counter(server.pictures()) == {"/images/7/3.png": 1, "/images/7/2.png": 1, "/images/7/1.png": 2}


FIELDS = ",".join(crawl_anime.FIELDS).encode()


@pytest.mark.parametrize(
    "table",
    [
        b"a,b\n1,2\n",
        b"\0\0\0\n",
        b"\xff\xfe\n",
        b"\n",
        FIELDS + b"\n1,2\n",
        FIELDS + b"\n" + b"1," * 12 + b"note\n",
        FIELDS.replace(b",page", b",,page") + b"\n" + b"1," * 12 + b"\n",
    ],
)
def test_a_foreign_table_is_left_alone(server, tmp_path, capsys, table):
    (tmp_path / "metadata.csv").write_bytes(table)
    assert crawl(server, tmp_path) == 2 and "metadata.csv" in capsys.readouterr().err
    assert (tmp_path / "metadata.csv").read_bytes() == table and not server.log


def test_forget(server, tmp_path, capsys):
    assert crawl(server, tmp_path) == 0
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-2-0.jpg", "127.0.0.1-3") == 0
    assert list(crops(tmp_path)) == ["127.0.0.1-1-0.jpg"] and "crops deleted: 2" in capsys.readouterr().out
    assert b"127.0.0.1-2" not in (tmp_path / "metadata.csv").read_bytes()
    server.log.clear()
    assert crawl(server, tmp_path) == 0
    assert not server.pictures() and len(crops(tmp_path)) == 1


def test_forgetting_one_post_keeps_those_whose_id_begins_alike(server, tmp_path):
    server.stock(12)
    crawl(server, tmp_path)
    crawl(server, tmp_path, "--forget", "127.0.0.1-1")
    assert len(crops(tmp_path)) == 11


def test_one_process_a_folder(server, tmp_path, capsys):
    with common.locked(tmp_path):
        assert crawl(server, tmp_path) == 2 and "another process" in capsys.readouterr().err
    assert crawl(server, tmp_path) == 0


def test_other_files_in_the_folder_stay(server, tmp_path):
    (tmp_path / "mine.jpg").write_bytes(b"mine")
    (tmp_path / "127.0.0.1-2-0.jpg").write_bytes(b"a crop whose row was lost")
    (tmp_path / ".127.0.0.1-2-0.jpg.99.tmp").write_bytes(b"half a crop")
    assert crawl(server, tmp_path) == 0
    assert (tmp_path / "mine.jpg").read_bytes() == b"mine" and len(crops(tmp_path)) == 4
    assert len(crops(tmp_path)["127.0.0.1-2-0.jpg"]) > 1000 and not list(tmp_path.glob("*.tmp"))


def start(server, folder) -> Script:
    return Script("crawl_anime", *options(server, folder, "--delay", 0.01), cwd=folder.parent)


def stop_and_resume(server, tmp_path, posts: int, signals: list[int]):
    """Stop a crawl at random requests, then let it end: the same crops as an unbroken one, nothing fetched in vain."""
    chance = random.Random(posts)
    server.stock(posts, page=40)
    assert crawl(server, tmp_path / "whole") == 0
    server.log.clear()
    for place, number in zip(sorted(chance.sample(range(2, posts - 8), len(signals))), signals):
        run = start(server, tmp_path / "stopped")
        before = len(server.log)
        while run.process.is_alive() and (len(set(server.pictures())) < place or len(server.log) < before + 2):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        os.kill(run.process.pid, number)
        assert run.finish() == (-9 if number == signal.SIGKILL else 130)
        if number != signal.SIGKILL:
            assert run.err == "crawl_anime.py: interrupted: the same command goes on from here\n"
    run = start(server, tmp_path / "stopped")
    assert run.finish() == 0, run.err
    assert crops(tmp_path / "stopped") == crops(tmp_path / "whole")
    assert (tmp_path / "stopped/metadata.csv").read_bytes() == (tmp_path / "whole/metadata.csv").read_bytes()
    assert len(server.pictures()) <= posts + len(signals)


@pytest.mark.full
def test_stopped_and_resumed(server, tmp_path):
    stop_and_resume(server, tmp_path, 30, [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])


@pytest.mark.soak
def test_killed_twenty_times(server, tmp_path):
    stop_and_resume(server, tmp_path, 200, [signal.SIGKILL] * 20)


# ------------------------------------------------------------------------------------------ lists and folders


def test_a_list_of_addresses(server, tmp_path):
    text = (
        f"# mine\n\n{server.url}/images/7/1.png\n {server.url}/images/7/2.png \nhttp://example.com/a.png\n"
        f"{server.url}/images/7/1.png\nnonsense\nfile:///etc/passwd\n{server.url}/gone.png\n\udcff\x1b[31m\n"
    )
    assert crawl_list(server, tmp_path / "faces", text.encode(errors="surrogateescape")) == 0
    assert len(crops(tmp_path / "faces")) == 2 and all(name.startswith("url-") for name in crops(tmp_path / "faces"))
    reasons = Counter(row["reason"] for row in rows(tmp_path / "faces").values())
    assert reasons == {"": 2, "not an https address": 4, "HTTP 404": 1}
    assert b"\x1b" not in (tmp_path / "faces/metadata.csv").read_bytes()


@pytest.mark.parametrize("fault", [challenge(403), status(503, Retry_After="86400")])
def test_a_list_goes_on_with_its_other_hosts(server, tmp_path, fault):
    refusing = FakeBooru()
    refusing.always["/images/7/1.png"] = fault
    text = "".join(f"{host}/images/7/{number}.png\n" for number in (1, 2, 3) for host in (refusing.url, server.url))
    (tmp_path / "list").write_text(text)
    hosts = ("--base-url", server.url, "--file-host", refusing.url)
    assert run("--urls", tmp_path / "list", *hosts, "--to", tmp_path / "faces", "--detector", "none") == 0
    assert len(crops(tmp_path / "faces")) == 3 and refusing.pictures() == ["/images/7/1.png"]
    assert Counter(row["outcome"] for row in rows(tmp_path / "faces").values()) == {"faces": 3, "failed": 3}
    refusing.close()


def test_a_folder_of_pictures(tmp_path, capsys):
    pictures = tmp_path / "in it"
    (pictures / "below").mkdir(parents=True)
    for number in range(3):
        draw(number).save(pictures / "below" / f"{number}.png")
    draw(9).save(pictures / "a\nname\x1b.jpg")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("no picture")
    assert crop(pictures, pictures / "faces") == 0
    assert len(crops(pictures / "faces")) == 4 and len(rows(pictures / "faces")) == 5
    assert "python dcgan.py --dataset '" in capsys.readouterr().out
    assert (
        crop(pictures, pictures / "faces") == 0 and len(rows(pictures / "faces")) == 5
    )  # its own crops are not cropped again
    assert all("\n" not in row["page"] and "\x1b" not in row["page"] for row in rows(pictures / "faces").values())


@pytest.mark.full
def test_several_processes_give_what_one_gives(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number in range(70):
        draw(number).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    assert crop(tmp_path / "pictures", tmp_path / "many") == 0
    monkeypatch.setattr(crawl_anime.common, "map_in_workers", lambda function, items, workers: iter(function(items)))
    assert crop(tmp_path / "pictures", tmp_path / "one") == 0
    assert crops(tmp_path / "one") == crops(tmp_path / "many") and len(crops(tmp_path / "one")) == 70
    assert Path(tmp_path, "one/metadata.csv").read_bytes() == Path(tmp_path, "many/metadata.csv").read_bytes()


# --------------------------------------------------------------------------------------------- crops, options


@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((400, 300), (150, 100, 100), (125, 65, 150)),  # 1.5 sides around the middle, a tenth of the face higher
        ((400, 300), (0, 0, 100), (0, 0, 150)),  # moved in
        ((400, 300), (300, 200, 100), (250, 150, 150)),
        ((400, 120), (150, 10, 100), (140, 0, 120)),  # shrunk
    ],
)  # fmt: skip
def test_where_a_face_is_cut_out(monkeypatch, size, box, expected):
    image, cuts = draw(1).resize(size), []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *rest, **named: cuts.append(rest) or resize(self, *rest, **named)
    )
    jpeg, kept_box, _, _ = crawl_anime.cut(image, box, 1.5, False)
    left, top, side = expected
    assert cuts[0][2] == (left, top, left + side, top + side)
    assert kept_box == box and Image.open(io.BytesIO(jpeg)).size == (256, 256)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--delay", "0.5"], "--delay"),
        (["--delay", "0", "--base-url", "http://10.0.0.1"], "--delay"),
        (["--base-url", "ftp://x"], "--base-url"),
        (["--base-url", "https://"], "--base-url"),
        (["--base-url", "https://x:65536"], "--base-url"),
        (["--base-url", "http://["], "--base-url"),
        (["--base-url", "http://x", "--from-dir", "."], "--base-url"),
        (["--from-dir", "no such folder"], "no such folder"),
        (["--from-dir", ".", "--urls", "x"], "not allowed with"),
        (["--from-dir", ".", "--tags", "x"], "--tags"),
        (["--tags", "smile order:score"], "order:"),
        (["--tags", "smile Order:score"], "order:"),
        (["--tags", "ID:5"], "order:"),
        (["--tags", "random:5"], "order:"),
        (["--tags", "smile -id:5"], "order:"),
        (["--file-host", "localhost"], "--file-host"),
        (["--file-host", "ftp://x.org"], "--file-host"),
        (["--file-host", "*.x.org"], "--file-host"),
        (["--file-host", "x.org", "--delay", "0.1", "--base-url", "http://localhost:1"], "--delay"),
        (["--file-host", "x.org", "--from-dir", "."], "--file-host"),
        (["--contact", "a\nb"], "--contact"),
        (["--neighbours", "-1"], "--neighbours"),
        (["--from-dir", ".", "--to", "."], "whose pictures are crops"),
        (["--urls", "no such file"], "no such file"),
        (["--urls", os.devnull], "holds no picture"),
        (["--urls", ""], "need a name"),
        (["--from-dir", ""], "need a name"),
        (["--to", ""], "need a name"),
        (["--limit", "0"], "--limit"),
        (["--margin", "nan"], "--margin"),
        (["--min-face", "3"], "--min-face"),
        (["--site", "gelbooru"], "--site"),
        (["--forget", "../x"], "--forget"),
        (["--forget", "a*-1"], "--forget"),
        (["--cascade", "no such file"], "no such file"),
        (["--cascade", __file__], "cascade"),
        (["--to", __file__], "test_crawl.py"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("crawl_anime.py: error: ") and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.jpg"))


def test_the_detector_that_can_not_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(crawl_anime.socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(crawl_anime, "TRIES", 1)
    (tmp_path / "pictures").mkdir()
    draw(1).save(tmp_path / "pictures/1.png")
    assert run("--from-dir", "pictures") == 3 and "--detector none" in capsys.readouterr().err
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/lbpcascade_animeface.xml").write_text("half of it")
    assert run("--from-dir", "pictures") == 2 and "not the author's" in capsys.readouterr().err


def test_a_full_disk_is_one_line(server, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        assert crawl(server, tmp_path) == 2 and "No space left" in capsys.readouterr().err
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 3


# --------------------------------------------------------------------------------------- what another crawl mends

MAINTENANCE = picture(b"<html>back soon", kind="text/html")
PASSING = {
    "robots.txt answers 503": ("/robots.txt", status(503)),
    "robots.txt answers 429": ("/robots.txt", status(429)),
    "robots.txt never ends": ("/robots.txt", fake_booru.endless),
    "robots.txt is on another host": ("/robots.txt", redirect("https://example.com/robots.txt")),
    "robots.txt breaks off": ("/robots.txt", fake_booru.short),
    "robots.txt has a chunk of nonsense": ("/robots.txt", fake_booru.chunk_of(b"f" * 20)),
    "robots.txt forbids all for a while": ("/robots.txt", status(200, b"User-agent: *\nDisallow: /")),
    "a maintenance page": ("", MAINTENANCE),
    "a maintenance page as a picture": ("", picture(b"<html>back soon")),
    "another MD5": ("", picture(encode(draw(99), "JPEG"))),
    "half a picture": ("", fake_booru.cut_off(encode(draw(98))[:900])),
    "nothing": ("", picture(b"")),
    "a chunk of nonsense": ("", fake_booru.chunk_of(b"f" * 20)),
    "a large chunk": ("", fake_booru.chunk_of(b"7fffffffff")),
    "a negative chunk": ("", fake_booru.chunk_of(b"-5")),
    "a redirect to a login": ("", redirect("https://login.example.com/")),
    "a redirect loop": ("", redirect("/images/7/1.png")),
    "not allowed": ("", status(403)),
    "no answer of a known kind": ("", status(418)),
    "partial content": ("", status(206, b"half")),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_loses_nothing(server, tmp_path, monkeypatch, capsys, name):
    """The crawl says why and ends with 3, and when the fault is over it gets all pictures."""
    monkeypatch.setattr(crawl_anime, "TRIES", 2)
    path, fault = PASSING[name]
    server.stock(4)
    server.always |= {path: fault} if path else dict.fromkeys(server.files, fault)
    for _ in range(2):
        assert crawl(server, tmp_path) == 3
        output = capsys.readouterr()
        assert "did not come" in output.err and "--tags" not in output.out and not crops(tmp_path)
    server.always.clear()
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 4


def test_failures_of_old_do_not_keep_a_crawl_from_its_new_posts(server, tmp_path):
    server.stock(25)
    server.always |= {f"/images/7/{number}.png": status(403) for number in range(6, 26)}
    assert [crawl(server, tmp_path) for _ in range(3)] == [3, 3, 0]  # ten posts more each time
    assert len(crops(tmp_path)) == 5


OPT_OUT = picture(PNG, Content_Signal="ai-train=no")


@pytest.mark.parametrize("fault", [status(404), status(410), status(451), OPT_OUT, fake_booru.endless])
def test_what_is_gone_or_not_for_us_is_not_asked_for_again(server, tmp_path, fault):
    server.faults["/images/7/2.png"] = [fault]
    assert crawl(server, tmp_path) == crawl(server, tmp_path) == 0
    assert len(server.requests("/images/7/2.png")) == 1 and rows(tmp_path)["2"]["outcome"] == "skipped"


def test_few_pictures_are_enough_when_they_reach_the_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(crawl_anime, "POSTS_PER_FACE", 100)
    server.stock(30)
    server.always |= {f"/images/7/{number}.png": status(404) for number in range(3, 31)}
    assert crawl(server, tmp_path / "all", "--limit", 9) == 3 and len(crops(tmp_path / "all")) == 2
    assert crawl(server, tmp_path / "two", "--limit", 2) == 0


def test_a_hundred_refusals_end_a_crawl(server, tmp_path, capsys):
    server.stock(0)
    for number in range(1, 120):
        server.add(number, b"never asked for")
    server.robots = "User-agent: *\nContent-Signal: ai-train=no"
    assert crawl(server, tmp_path) == 3 and not server.pictures()
    assert "100 pictures did not come" in capsys.readouterr().err and len(rows(tmp_path)) == 100


def test_pictures_without_a_face_come_too(server, tmp_path):
    server.stock(0)
    for number in range(1, 25):
        server.add(number, encode(draw(number, 20)))
        server.add(100 + number, encode(draw(100 + number)))
        server.always[f"/images/7/{100 + number}.png"] = status(403)
    server.posts.sort(key=lambda post: post["id"] % 100)
    server.posts = [post | dict(id=100 - place) for place, post in enumerate(server.posts)]
    assert crawl(server, tmp_path) == 0 and len(rows(tmp_path)) == 48


def test_an_empty_page_in_the_middle(server, tmp_path, capsys):
    server.stock(12, page=5)
    empty, mid = status(200, b"[]"), [status(200, b""), status(200, b"[]")]
    server.faults["/index.php"] = [empty, MAINTENANCE, lambda handler: handler.answer_search(), *mid]
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 12


# ------------------------------------------------------------------------------------------------------ opt-outs


def test_opt_outs_in_the_picture_itself(server, tmp_path):
    """The Data Mining property of IPTC and PLUS, in XMP."""
    xmp = b'<rdf:Description plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"/>'
    server.add(9, encode(draw(9), "JPEG", xmp=xmp))
    assert crawl(server, tmp_path) == 0 and rows(tmp_path)["9"]["reason"] == "not for training (metadata)"


def test_an_opt_out_in_robots_txt_is_kept(server, tmp_path, capsys):
    server.robots = "User-agent: *\nContent-Usage: /images/7/2 train-ai=n\nAllow: /"
    assert crawl(server, tmp_path) == 0
    server.robots = None
    assert crawl(server, tmp_path) == 0
    assert server.pictures() == ["/images/7/3.png", "/images/7/1.png"]
    assert rows(tmp_path)["2"]["reason"] == "not for training (robots.txt)"


@pytest.mark.parametrize("delay, pause", [("7", 7), ("2.5", 2.5), ("0.1", 1), ("nonsense", 1), ("-5", 1)])
def test_crawl_delay(server, tmp_path, delay, pause):
    server.robots = f"User-agent: *\nCrawl-delay: {delay}\nAllow: /"
    assert crawl(server, tmp_path) == 0
    moments = [moment for moment, path, _ in server.log if not path.startswith("/index")]
    assert all(pause - 0.1 < b - a < pause + 0.5 for a, b in zip(moments, moments[1:]))


def test_a_crawl_delay_that_nobody_waits_for(server, tmp_path, capsys):
    server.robots = "User-agent: *\nCrawl-delay: 86400"
    assert crawl(server, tmp_path) == 3 and "86,400 seconds" in capsys.readouterr().err and not server.pictures()


def test_contact(server, tmp_path):
    assert crawl(server, tmp_path, "--contact", "https://example.com/faces") == 0
    assert "contact: https://example.com/faces" in server.last_headers["User-Agent"]


# ----------------------------------------------------------------------------------------------- what is forgotten


def test_forgotten_stays_forgotten(server, tmp_path, capsys):
    """By an editor that strips the last line's end, by a stale row behind it, by a crop that comes back."""
    assert crawl(server, tmp_path) == 0
    table, stale = tmp_path / "metadata.csv", rows(tmp_path)["1"]
    lines, crop = table.read_bytes().splitlines(), (tmp_path / "127.0.0.1-1-0.jpg").read_bytes()
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-1") == 0 and rows(tmp_path)["1"]["outcome"] == "forgotten"
    server.log.clear()
    for text in (table.read_bytes().rstrip(), table.read_bytes() + lines[-1] + b"\n", table.read_bytes() + lines[-1]):
        table.write_bytes(text)
        (tmp_path / "127.0.0.1-1-0.jpg").write_bytes(crop)
        assert crawl(server, tmp_path) == 0 and not server.pictures()
        assert len(crops(tmp_path)) == 2 and rows(tmp_path)["1"]["hashes"] == stale["hashes"]


@pytest.mark.parametrize("name", ["0001", "77", "other.site-1", "127.0.0.1-1-5.png", "127.0.0.1-01"])
def test_forgetting_what_is_not_there_is_a_mistake(server, tmp_path, capsys, name):
    assert crawl(server, tmp_path) == 0
    before = (tmp_path / "metadata.csv").read_bytes()
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-2", name) == 2
    assert "forget" in (error := capsys.readouterr().err) or "has a post" in error
    assert (tmp_path / "metadata.csv").read_bytes() == before and len(crops(tmp_path)) == 3


def test_a_forgotten_picture_under_another_name(server, tmp_path):
    """By its MD5 without a request, else by its crop's hash; a crop without a row can be forgotten, too."""
    assert crawl(server, tmp_path) == 0
    (tmp_path / "url-abcdef-0.jpg").write_bytes((tmp_path / "127.0.0.1-3-0.jpg").read_bytes())
    server.posts = [post for post in server.posts if post["id"] != 3]
    assert crawl(server, tmp_path, "--forget", "127.0.0.1-2", "url-abcdef") == 0
    table = (tmp_path / "metadata.csv").read_text().splitlines(keepends=True)
    (tmp_path / "metadata.csv").write_text("".join(line for line in table if "127.0.0.1,3," not in line))
    (tmp_path / "127.0.0.1-3-0.jpg").unlink()
    server.add(8, server.files["/images/7/2.png"])
    server.add(9, encode(draw(2), "JPEG"))
    server.add(10, server.files["/images/7/3.png"])
    server.log.clear()
    assert crawl(server, tmp_path) == 0
    assert server.pictures() == ["/images/7/10.png", "/images/7/9.png"]
    found = {id: row["reason"] for id, row in rows(tmp_path).items()}
    assert found == {"1": "", "2": "", "abcdef": "", "8": "forgotten", "9": "near-duplicate", "10": "near-duplicate"}
    assert list(crops(tmp_path)) == ["127.0.0.1-1-0.jpg"]


# ------------------------------------------------------------------------------------------------- the table


def as_excel(table: bytes) -> bytes:
    return b"\xef\xbb\xbf" + table.replace(b"\n", b"\r\n")


@pytest.mark.parametrize(
    "change",
    [
        as_excel,
        lambda table: as_excel(table).rstrip(),
        lambda table: as_excel(table).replace(b",", b";").replace(b"a;b", b'"a;b"'),
        lambda table: table.decode().replace(",", "\t").encode("utf-16"),
        lambda table: table.replace("é".encode(), b"\xe9"),
        lambda table: table + b",,,,,,,,,,,,,,\n\n",
        lambda table: table.replace(b"\n", b",,\n"),  # two more columns, of nothing
        lambda table: table.replace(b"\n", b"\r"),
        lambda table: table + table,  # two tables put together
    ],
)
def test_a_table_that_a_spreadsheet_saved(server, tmp_path, change):
    server.posts[0] |= dict(source="é")
    server.posts[1] |= dict(source="a;b")
    assert crawl(server, tmp_path, site="danbooru") == 0
    table, whole = tmp_path / "metadata.csv", (tmp_path / "metadata.csv").read_bytes()
    table.write_bytes(change(whole))
    server.log.clear()
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert not server.pictures() and table.read_bytes() == whole


def test_a_table_of_before(server, tmp_path):
    """Without a column for options, with hashes that look like numbers, of which a spreadsheet has rounded one."""
    assert crawl(server, tmp_path) == 0
    table, found = tmp_path / "metadata.csv", rows(tmp_path)
    fields = [name for name in crawl_anime.FIELDS if name != "options"]
    old = [row | dict(hashes=row["hashes"].split()[-1][1:]) for row in found.values()]
    old[1]["hashes"] = "1.23457E+15"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, fields, extrasaction="ignore").writerows([dict(zip(fields, fields)), *old])
    server.log.clear()
    server.add(9, server.files["/images/7/2.png"])
    assert crawl(server, tmp_path) == 0
    assert server.pictures() == ["/images/7/9.png"] and rows(tmp_path)["9"]["reason"] == "near-duplicate"
    assert [row["hashes"].split()[0][0] for row in rows(tmp_path).values()] == ["h", "h", "h", "m"]


def test_cells_that_no_spreadsheet_runs_or_counts(server, tmp_path):
    sources = [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "&#61;1",
        "\uff1d1",
        "a?b=1&amp;lt;&copy=2&quot;",
        "plain",
        "\t=1",
        "a;=1",
    ]
    for number, source in enumerate(sources, start=11):
        server.add(number, encode(draw(number)), source=source, artist=source)
    assert crawl(server, tmp_path, site="danbooru") == crawl(server, tmp_path, site="danbooru") == 0
    found = rows(tmp_path)
    written = [found[str(number)]["source"] for number in range(11, 21)]
    assert written == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@SUM(A1)",
        "'=1",
        "'\uff1d1",
        'a?b=1&lt;&copy=2"',
        "plain",
        "' =1",
        "a;'=1",
    ]
    for row in found.values():
        for cell in (row["hashes"], row["boxes"], row["crops"], row["options"]):
            assert not cell.replace(",", "").replace(".", "").isdecimal()


def test_ids_that_look_like_no_number():
    ids = {crawl_anime.name_post("url", str(number), "")["id"] for number in range(20_000)}
    assert len(ids) == 20_000 and not [id for id in ids if id.replace("e", "", 1).isdecimal()]


# ------------------------------------------------------------------------------------- options that change later


def test_a_later_option_reconsiders_what_it_may_change(server, tmp_path):
    server.posts.clear()
    server.add(1, encode(draw(1)), rating="explicit")
    server.add(2, encode(draw(2, 40)))  # too small for 64
    server.add(3, encode(draw(3, mode="L")))
    server.add(4, encode(draw(4).resize((2, 2)).resize((256, 256), Image.Resampling.BICUBIC)))
    server.add(5, encode(draw(5)), tags="1girl Monochrome Comic")
    server.add(6, encode(draw(6)))

    def asked(*more) -> list[str]:
        server.log.clear()
        assert crawl(server, tmp_path, *more) == 0
        return server.pictures()

    base = ("--min-face", 64)
    assert len(asked(*base)) == 4
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items()}
    assert reasons == {"1": "rating", "2": "no face", "3": "grey", "4": "blurred", "5": "tag", "6": ""}
    assert asked(*base) == [] == asked("--min-face", 80)
    assert asked(*base, "--rating", "explicit") == ["/images/7/1.png"]
    assert asked(*base, "--margin", 2) == []  # the whole picture is blurred
    assert asked(*base, "--margin", 2, "--grey") == ["/images/7/5.png", "/images/7/3.png"]
    assert asked("--min-face", 32, "--margin", 2, "--grey") == ["/images/7/4.png", "/images/7/2.png"]
    assert {id for id, row in rows(tmp_path).items() if row["outcome"] == "faces"} == set("12356")


@pytest.mark.parametrize(
    "reasons, before, expected",  # with lbp 64 1.5 4
    [
        ("no face", "lbp 64 1.5 4", False),
        ("no face", "lbp 65 1.5 4", True),
        ("no face", "lbp 63 1.5 4", False),
        ("no face", "lbp 64 1.5 5", True),
        ("no face", "lbp 64 1.5 3", False),
        ("no face", "lbp 64 2 4", False),
        ("no face", "none 64 1.5 4", False),  # smaller than 64 pixels
        ("no face", "none 65 1.5 4", True),
        ("blurred", "lbp 64 2 4", True),
        ("blurred", "none 64 1.5 4", True),
        ("blurred, near-duplicate", "lbp 64 2 4", True),
        ("near-duplicate", "lbp 80 2 5", False),
        ("grey", "lbp 64 1.5 4", False),
        ("grey", "lbp 64 1.5 4 and more", False),
        ("no face", "1.5", True),  # a damaged cell
    ],
)
def test_what_other_options_may_find(reasons, before, expected):
    assert crawl_anime.may_find_more(crawl_anime.parse_args([]), reasons, before) is expected
    if before == "lbp 64 1.5 4":
        assert crawl_anime.may_find_more(crawl_anime.parse_args(["--grey"]), reasons, before) is (reasons == "grey")


def test_another_detector_reconsiders_pictures_without_a_face(server, real_data, tmp_path):
    server.stock(1)
    cascade = ("--detector", "lbp", "--cascade", real_data / "lbpcascade_animeface.xml")
    assert crawl(server, tmp_path, "--min-face", 64, *cascade) == 0 and rows(tmp_path)["1"]["reason"] == "no face"
    assert crawl(server, tmp_path, "--min-face", 64, *cascade, "--neighbours", 6) == 0 and len(server.pictures()) == 1
    assert crawl(server, tmp_path, "--min-face", 64, *cascade, "--neighbours", 3) == 0 and len(server.pictures()) == 2
    assert crawl(server, tmp_path, "--min-face", 64) == 0 and len(server.pictures()) == 3 and len(crops(tmp_path)) == 1


# ----------------------------------------------------------------------------------------- time, hosts, addresses


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    body = encode(draw(1), "JPEG", progressive=True)
    last = body.rindex(b"\xff\xda")
    return body[:last] + body[last:-2] * count + body[-2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_more_parts_than_any_encoder_writes():
    assert crawl_anime.decode(scans(20)).size == (96, 96)
    with pytest.raises(crawl_anime.Unusable, match="more parts") as caught:
        crawl_anime.decode(scans(200))
    assert caught.value.final
    thumbnail = b"\xff\xe1" + (2 + 60 * 4).to_bytes(2, "big") + b"\xff\xda\x00\x02" * 60  # in a segment of its own
    body = encode(draw(1), "JPEG")
    assert crawl_anime.decode(body[:2] + thumbnail + body[2:]).size == (96, 96)
    assert crawl_anime.decode(body + b"\xff\xda\x00\x02" * 90).size == (96, 96)  # behind its end
    crawl_anime.check_parts(io.BytesIO(PNG + scans(200)))  # of another kind
    for many in (
        body[:2] + b"\xff\xe0\0\2" * 20_000 + body[2:],
        PNG[:33] + chunk(b"IDAT", b"") * 50_000 + PNG[33:],
        PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20))) * 60 + PNG[33:],
    ):
        with pytest.raises(crawl_anime.Unusable, match="more parts"):
            crawl_anime.decode(many)


@pytest.mark.parametrize("body", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xda", b"\xff\xd8\xff\xda\0\0\xff\xda"])
def test_counting_scans_of_torn_files_ends(body):
    crawl_anime.check_parts(io.BytesIO(body))


@pytest.mark.parametrize(
    "address", "93.184.215.14 2606:4700::1 64:ff9b::5db8:d70e ::ffff:93.184.215.14 2002:5db8:d70e::".split()
)
def test_public_addresses(address):
    assert crawl_anime.is_public(address)


@pytest.mark.parametrize(
    "host, domain",
    [
        ("danbooru.donmai.us", {"donmai.us"}),
        ("booru.example.org", {"example.org"}),
        ("img.booru.example.co.uk", {"example.co.uk"}),
        ("yande.re", {"yande.re"}),
        ("localhost", set()),
        ("127.0.0.1", set()),
        ("::1", set()),
    ],
)
def test_registered_domains(host, domain):
    assert crawl_anime.find_domain(host) == domain


def test_a_mirror_with_hosts_of_its_own(server, tmp_path):
    files = FakeBooru()
    server.posts = [dict(id=1, raw=dict(id=1, rating="g", file_url=f"{files.url}/images/7/1.png"))]
    assert crawl(server, tmp_path, site="danbooru") == 3 and rows(tmp_path)["1"]["reason"] == "not an https address"
    assert crawl(server, tmp_path, "--file-host", files.url, site="danbooru") == 0
    assert files.pictures() == ["/images/7/1.png"] and files.log[0][1] == "/robots.txt" and len(crops(tmp_path)) == 1
    fetcher, _ = crawl_anime.find_posts(
        crawl_anime.parse_args(["--base-url", "https://booru.mirror.example", "--file-host", "cdn.example.net"])
    )
    for address in ("https://img3.mirror.example/a", "https://a.cdn.example.net/a"):
        fetcher.check(address, True)
    with pytest.raises(crawl_anime.Unusable, match="foreign"):
        fetcher.check("https://mirror.example.evil.com/a", True)
    files.close()


# ----------------------------------------------------------------------------------- files of other programs


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_lists_of_any_editor(server, tmp_path, encoding):
    text = f"# größe\r\n{server.url}/images/7/1.png\r\n{server.url}/images/7/2.png"
    assert crawl_list(server, tmp_path / "faces", text.encode(encoding)) == 0 and len(crops(tmp_path / "faces")) == 2


def test_pictures_by_content(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    (pictures / ".thumbnails").mkdir()
    (tmp_path / "elsewhere").mkdir()
    kinds = {"a.jfif": "JPEG", "b": "PNG", "c.bmp": "BMP", "below/d.tif": "TIFF", "e.txt": "WEBP"}
    kinds |= {"g.avif": "AVIF"} if features.check("avif") else {}
    for number, (name, kind) in enumerate(kinds.items()):
        (pictures / name).write_bytes(encode(draw(number), kind))
    draw(50).save(tmp_path / "elsewhere/linked.png")
    draw(51).save(pictures / ".thumbnails/x.png")
    (pictures / ".hidden.png").write_bytes(b"x")
    (pictures / "torn.TIF").write_bytes(encode(draw(60), "TIFF")[:99])  # a picture by its name alone
    for name in ("notes.txt", "metadata.csv", "Thumbs.db", "a.json", "empty"):
        (pictures / name).write_bytes(b"no picture" * (name != "empty"))
    (pictures / "loop").symlink_to(pictures)
    (pictures / "link").symlink_to(tmp_path / "elsewhere")
    (pictures / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(pictures / "pipe.png")
    assert crop(pictures, tmp_path / "faces") == 0
    assert len(crops(tmp_path / "faces")) == len(kinds) + 1 == len(rows(tmp_path / "faces")) - 1
    (tmp_path / "empty").mkdir()
    assert crop(tmp_path / "empty", tmp_path / "faces") == 2
    assert "holds no picture" in capsys.readouterr().err


def test_damages_of_a_kind_are_counted_together(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for part in (2, 3, 4):
        (tmp_path / f"pictures/{part}.jpg").write_bytes(JPEG[: len(JPEG) // part])
    assert crop(tmp_path / "pictures", tmp_path / "faces") == 0
    assert "0 faces of 3 posts; skipped: 3 damaged\n" in capsys.readouterr().out
    assert len({row["reason"] for row in rows(tmp_path / "faces").values()}) > 1


def test_grey_pictures_can_be_kept(tmp_path):
    (tmp_path / "manga").mkdir()
    draw(1, mode="L").save(tmp_path / "manga/1.png")
    assert crop(tmp_path / "manga", tmp_path / "faces") == 0 and not crops(tmp_path / "faces")
    assert crop(tmp_path / "manga", tmp_path / "faces", "--grey") == 0 and len(crops(tmp_path / "faces")) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp1252"])
def test_a_terminal_with_few_letters(server, tmp_path, monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", out)
    assert crawl(server, tmp_path / "Größe 顔 \udcff") == 0
    out.flush()
    assert b"\\udcff" in out.buffer.getvalue() and b"reached the end" in out.buffer.getvalue()
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------- all faults at once


@pytest.mark.full
def test_every_fault_at_once(server, tmp_path, monkeypatch):
    """200 posts, each with a fault of its own: exactly the crops that are to be had, and the rest in the next crawl."""
    monkeypatch.setattr(crawl_anime, "TIMEOUT", 0.05)
    monkeypatch.setattr(crawl_anime, "DEADLINE", 0.1)
    chance = random.Random(7)
    server.stock(200, page=30)
    server.robots = "User-agent: *\nDisallow: /images/7/13.png\nContent-Usage: /images/7/17.png train-ai=n"
    others = ("fine", "a redirect to", "a permanent")  # which give another picture
    again = [fault[0] for name, fault in FAULTS.items() if fault[1] == "faces" and not name.startswith(others)]
    later = [fault for path, fault in PASSING.values() if not path]
    never = [status(404), status(410), status(451), picture(PNG, X_Robots_Tag="noai"), fake_booru.endless]
    expected, postponed = set(), set()
    for number in chance.sample(range(1, 201), 200):
        path, kind = f"/images/7/{number}.png", chance.choice(["again", "later", "never", "good", "good"])
        if number in (13, 17):
            continue
        if kind == "again":
            server.faults[path] = list(chance.choice(again))
        if kind == "later":
            server.faults[path] = [chance.choice(later)] * crawl_anime.TRIES
            postponed.add(str(number))
        if kind == "never":
            server.faults[path] = [chance.choice(never)]
        if kind in ("again", "good"):
            expected.add(str(number))
    server.faults["/index.php"] = [status(200, b""), status(503), fake_booru.chunk_of(b"f" * 20), MAINTENANCE]
    server.faults["/robots.txt"] = [status(503), fake_booru.short]
    assert crawl(server, tmp_path) == 0
    found = {id: row["outcome"] for id, row in rows(tmp_path).items()}
    assert {id for id, outcome in found.items() if outcome == "faces"} == expected
    assert {id for id, outcome in found.items() if outcome == "failed"} == postponed and len(found) == 200
    server.faults.clear()
    assert crawl(server, tmp_path) == 0
    assert {name.split("-")[1] for name in crops(tmp_path)} == expected | postponed
