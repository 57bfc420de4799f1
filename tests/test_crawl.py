"""The crawler against a local site: the right crops, counts and statuses, and no breach of its manners."""

import csv
import os
import random
import signal
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest
from PIL import Image

import common
import crawl_anime
from tests import fake_booru
from tests.conftest import Script
from tests.fake_booru import FakeBooru, challenge, draw, encode, picture, redirect, status

PNG = encode(draw(2))
JPEG = encode(draw(2, 256), "JPEG")


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


def options(server, folder, *more, site="safebooru"):
    shared = ["--base-url", server.url, "--to", folder, "--detector", "none", "--contact", "me@example.com"]
    return ["--site", site, *shared, "--min-face", 32, "--limit", 1000, *more]


def run(*argv) -> int:
    try:
        crawl_anime.main([str(option) for option in argv])
        return 0
    except SystemExit as end:
        return end.code


def crawl(server, folder, *more, site="safebooru") -> int:
    return run(*options(server, folder, *more, site=site))


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
    assert crawl(server, tmp_path, site=site) == 0
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items() if row["outcome"] != "faces"}
    assert reasons == {"7": "no picture", "6": "rating", "5": "rating"}
    assert sorted(crops(tmp_path)) == [f"127.0.0.1-{id}-0.jpg" for id in (1, 2, 3, 4, 8)]
    assert "/samples/7/sample_4.jpg" in server.pictures() and "/images/7/4.png" not in server.pictures()
    assert max(Counter(server.pictures()).values()) == 1
    assert all(row["page"].startswith(server.url) and id in row["page"] for id, row in rows(tmp_path).items())
    assert all(Image.open(tmp_path / name).size == (256, 256) for name in crops(tmp_path))


def test_ratings_tags_and_credits(server, tmp_path):
    server.add(9, encode(draw(9)), rating="q", artist="someone\x1b[31m", source="https://example.com/?a&amp;b\n")
    server.add(10, encode(draw(10)), rating="s")
    server.add(11, encode(draw(11)), tags="1girl Monochrome")
    assert crawl(server, tmp_path, "--rating", "general", "questionable", site="danbooru") == 0
    found = rows(tmp_path)
    assert (found["10"]["reason"], found["10"]["rating"], found["11"]["reason"]) == ("rating", "sensitive", "tag")
    assert found["9"]["outcome"] == "faces" and found["9"]["artist"] == "someone [31m"
    assert found["9"]["source"].rstrip() == "https://example.com/?a&b"
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert server.searches[0] == "1girl solo" and server.searches[-1] == "1girl solo rating:g"


def test_posts_with_missing_and_odd_fields(server, tmp_path):
    url = f"{server.url}/images/7/1.png"
    odd = [{}, None, 3, {"id": None}, {"id": "../../x"}, {"id": -4}, dict(id=50), dict(id=51, rating="safe")]
    odd += [dict(id=52, rating={"a": 1}, tags=["x"], file_url=url), dict(id=53, rating="safe", file_url="/movie.mp4")]
    odd += [dict(id=54, rating="safe", directory="7", image="2.png"), dict(id="55", rating="safe", file_url=url)]
    server.posts = [dict(id=99 - i, raw=raw) for i, raw in enumerate(odd)]
    assert crawl(server, tmp_path) == 0
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items()}
    assert reasons == {"50": "rating", "51": "no picture", "52": "rating", "53": "no picture", "54": "", "55": ""}


# ----------------------------------------------------------------------------------------- faults of pictures
# name: the faults, one a request; the outcome or reason of the post; how often its picture is asked for
FAULTS = {
    "500 then success": ([status(500)], "faces", 2),
    "503 for ever": ([status(503)] * 9, "HTTP 503", 5),
    "429": ([status(429)], "faces", 2),
    "403": ([status(403)], "HTTP 403", 1),
    "404": ([status(404)], "HTTP 404", 1),
    "reset": ([fake_booru.reset], "faces", 2),
    "silence": ([fake_booru.silence], "faces", 2),
    "short body": ([fake_booru.short], "faces", 2),
    "endless body": ([fake_booru.endless], "more than 20 MiB", 1),
    "announced too large": ([picture(b"", Content_Length=str(21 * 2**20))], "more than 20 MiB", 1),
    "dripping body": ([fake_booru.drip], "faces", 2),
    "a page": ([picture(b"<html>", kind="text/html")], "not a picture", 1),
    "a redirect": ([redirect("/images/7/2.png?again")], "faces", 2),
    "a redirect loop": ([redirect("/images/7/2.png")] * 9, "too many redirects", 6),
    "a redirect to another host": ([redirect("https://example.com/1.png")], "on a foreign host", 1),
    "noai": ([picture(PNG, X_Robots_Tag="noindex, noai")], "not for training (X-Robots-Tag)", 1),
    "TDM reservation": ([picture(PNG, TDM_Reservation="1")], "not for training (TDM-Reservation)", 1),
    "Content-Signal": ([picture(PNG, Content_Signal="a=b, ai-train=no")], "not for training (Content-Signal)", 1),
    "Content-Usage": ([picture(PNG, Content_Usage="train-ai=n")], "not for training (Content-Usage)", 1),
    "fine: consent": ([picture(PNG, Content_Signal="ai-train=yes", X_Robots_Tag="noindex")], "faces", 1),
    "fine: binary": ([picture(PNG, kind="application/octet-stream")], "faces", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_picture_leaves_the_others_alone(server, tmp_path, name):
    faults, expected, requests = FAULTS[name]
    path = "/images/7/2.png"
    server.faults[path] = list(faults)
    assert crawl(server, tmp_path) == 0
    found = rows(tmp_path)
    assert (found["2"]["reason"] or found["2"]["outcome"]) == expected
    assert found["1"]["outcome"] == found["3"]["outcome"] == "faces" and list(found) == ["3", "2", "1"]
    assert len(server.requests(path)) == requests
    check_manners(server)


def check_manners(server):
    """One request at a time with a second between starts, an honest name, robots.txt before the first picture."""
    moments = [moment for moment, _ in server.log]  # which a busy machine notes late
    assert all(b - a > 0.5 for a, b in zip(moments, moments[1:]))
    agent = server.last_headers["User-Agent"]
    assert "crawl_anime" in agent and "contact: me@example.com" in agent and "Cookie" not in server.last_headers
    paths = [path for _, path in server.log]
    if server.pictures():
        assert paths.index("/robots.txt") < paths.index(server.pictures()[0])


@pytest.mark.parametrize("code, as_date", [(503, False), (429, True)])
def test_retry_after_is_obeyed(server, tmp_path, code, as_date):
    wish = formatdate(crawl_anime.time.time() + 60, usegmt=True) if as_date else "60"
    server.faults["/images/7/2.png"] = [status(code, Retry_After=wish)]
    assert crawl(server, tmp_path) == 0
    first, second = server.requests("/images/7/2.png")
    assert 50 < second - first < 70 and not [moment for moment, _ in server.log if first < moment < second]


def test_each_try_waits_longer(server, tmp_path):
    server.faults["/images/7/2.png"] = [status(500)] * 4
    assert crawl(server, tmp_path) == 0
    moments = server.requests("/images/7/2.png")
    assert all(2**i - 0.1 < b - a < 2 ** (i + 1) + 0.5 for i, (a, b) in enumerate(zip(moments, moments[1:])))


def test_slower_after_429_then_recovering(server, tmp_path):
    server.stock(25)
    server.faults["/images/7/25.png"] = [status(429)] * 2
    assert crawl(server, tmp_path) == 0
    moments = [moment for moment, path in server.log if path in server.files]
    pauses = [b - a for a, b in zip(moments, moments[1:])]
    assert pauses[2] > 3 and 1 < pauses[-1] < 2


def test_every_kind_of_picture(server, tmp_path):
    blurred = draw(50).resize((2, 2)).resize((256, 256), Image.Resampling.BICUBIC)
    kinds = {
        "42 million pixels": (encode(Image.new("P", (7000, 6000))), "too large"),
        "truncated PNG": (PNG[: len(PNG) // 2], "failed"),
        "truncated JPEG": (JPEG[: len(JPEG) // 2], "failed"),
        "a page that claims to be a picture": (b"<html>" * 99, "failed"),
        "PostScript": (encode(draw(51), "EPS"), "failed"),
        "16 bits of grey": (encode(Image.new("I;16", (64, 64))), "grey"),
        "grey": (encode(draw(52, mode="L")), "grey"),
        "grey in colour": (encode(draw(53, mode="L").convert("RGB")), "grey"),
        "blurred": (encode(blurred), "blurred"),
        "tiny": (encode(draw(54, 20)), "no face"),
        "one pixel high": (encode(draw(55).resize((500, 1))), "no face"),
        "palette with transparency": (encode(draw(56, mode="P"), transparency=3), "faces"),
        "RGBA": (encode(draw(57, mode="RGBA")), "faces"),
        "CMYK": (encode(draw(58, mode="CMYK"), "JPEG"), "faces"),
        "GIF": (encode(draw(59), "GIF"), "faces"),
        "WebP": (encode(draw(60), "WEBP"), "faces"),
    }
    server.stock(0)
    for number, (body, _) in enumerate(kinds.values(), start=1):
        server.add(number, body)
    assert crawl(server, tmp_path) == 0
    found = {}
    for name, row in zip(reversed(kinds), rows(tmp_path).values()):
        found[name] = row["outcome"] if row["outcome"] in ("faces", "failed") else row["reason"]
    assert found == {name: expected for name, (_, expected) in kinds.items()}


# --------------------------------------------------------------------------------------- faults of the source
@pytest.mark.parametrize(
    "fault, message",
    [
        (challenge(403), "prove that a person"),
        (challenge(503), "prove that a person"),
        (status(500), "HTTP 500"),
        (status(422, b'{"success": false, "message": "too many\\u001b[31m tags"}'), "too many\\u001b[31m tags"),
        (status(403, b"Too deep! Pull it back"), "HTTP 403: Too deep! Pull it back"),
        (status(200, b'<?xml version="1.0"?><response success="false" reason="API limited"/>'), "API limited"),
        (status(200, b"<html>maintenance"), "JSON"),
        (status(200, b'{"@attributes": {}, "post": []}'), "of another kind"),
        (status(200, b'[{"id": 5}]'), "the same posts again"),
        (status(429, Retry_After="86400"), "1,440 minutes"),
        (redirect("https://example.com/"), "foreign host"),
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
    assert (tmp_path / "metadata.csv").read_bytes().count(b"\n") == 16
    assert {row["outcome"] for row in rows(tmp_path).values()} == {"faces"}


MAINTENANCE = picture(b"<html>back soon", kind="text/html")


@pytest.mark.parametrize(
    "path, fault",
    [
        ("/robots.txt", status(503)),
        ("/robots.txt", status(200, b"User-agent: *\nDisallow: /")),
        ("", MAINTENANCE),
        ("", status(403)),
    ],
)
def test_a_passing_fault_loses_nothing(server, tmp_path, monkeypatch, capsys, path, fault):
    """The crawl says why and ends with 3, and when the fault is over it gets all pictures."""
    monkeypatch.setattr(crawl_anime, "TRIES", 2)
    server.stock(4)
    server.always |= {path: fault} if path else dict.fromkeys(server.files, fault)
    assert crawl(server, tmp_path) == 3
    assert "did not come" in capsys.readouterr().err and not crops(tmp_path)
    server.always.clear()
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 4


def test_a_source_that_recovers(server, tmp_path):
    """Also from an empty page in the middle of its posts."""
    server.stock(12, page=5)
    answer = fake_booru.Handler.answer_search
    server.faults["/index.php"] = [status(503), fake_booru.reset, MAINTENANCE, answer, status(200), status(200, b"[]")]
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 12


@pytest.mark.parametrize("fault", [status(404), status(410), picture(PNG, Content_Signal="ai-train=no")])
def test_what_is_gone_or_not_for_us_is_not_asked_for_again(server, tmp_path, fault):
    server.faults["/images/7/2.png"] = [fault]
    assert crawl(server, tmp_path) == crawl(server, tmp_path) == 0
    assert len(server.requests("/images/7/2.png")) == 1 and rows(tmp_path)["2"]["outcome"] == "skipped"


# ---------------------------------------------------------------------------------------- robots.txt, opt-outs
ALLOWED, FORBIDDEN, UNTRAINED = "", "robots.txt", "not for training (robots.txt)"


@pytest.mark.parametrize(
    "text, path, expected",
    [  # RFC 9309
        ("", "/a", ALLOWED),
        ("user-AGENT : * # all\ndisallow:/a", "/ab?c", FORBIDDEN),
        ("User-agent: *\nDisallow: /\nAllow: /a", "/ab", ALLOWED),
        ("User-agent: *\nDisallow: /*.png$", "/x.png.png", FORBIDDEN),
        ("User-agent: *\nDisallow: /*.json$", "/posts.json?tags=", ALLOWED),
        ("User-agent: *\nDisallow: /\n\nUser-agent: crawl_anime\nDisallow: /no", "/yes", ALLOWED),
        ("User-agent: *\nAllow: /\n\nUser-agent: Crawl_Anime/2.0\nDisallow: /no", "/no", FORBIDDEN),
        ("User-agent: crawl_anime\nUser-agent: other\nDisallow: /no\nUser-agent: x\nDisallow: /", "/yes", ALLOWED),
        ("User-agent: *\nCrawl-delay: 3\nSitemap: x\nDisallow: /a", "/a", FORBIDDEN),
        ("User-agent: *\nDisallow: /%7Ea", "/~a", FORBIDDEN),
        # opt-outs
        ("User-agent: *\nContent-Signal: search=yes,ai-train=no\nAllow: /", "/a", UNTRAINED),
        ("User-agent: *\nContent-Signal: search=no, ai-train=yes\nAllow: /", "/a", ALLOWED),
        ("User-agent: *\nContent-Usage: search=y, train-ai=n;exact", "/a", UNTRAINED),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /ok/ train-ai=y", "/ok/a", ALLOWED),
        ("User-agent: *\nContent-Usage: /no/*.png$ train-ai=n", "/no/a.png", UNTRAINED),
        ("User-agent: other\nContent-Signal: ai-train=no", "/a", ALLOWED),
        ("Content-Signal: ai-train=no\nUser-agent: other\nAllow: /", "/a", UNTRAINED),
    ],
)
def test_the_rules_of_robots_txt(text, path, expected):
    assert crawl_anime.refusal(crawl_anime.parse_robots(text), path) == expected


@pytest.mark.parametrize(
    "answer, fetched",
    [
        (status(200, b"\xef\xbb\xbfUser-agent: *\nDisallow: /images/7/2.png\n"), ["3.png", "1.png"]),
        (status(200, b"User-agent: *\nDisallow: /index.php\n"), ["3.png", "2.png", "1.png"]),  # an API is excepted
        (status(403), ["3.png", "2.png", "1.png"]),
    ],
)
def test_robots_of_the_site(server, tmp_path, answer, fetched):
    server.always["/robots.txt"] = answer
    assert crawl(server, tmp_path) == 0
    assert [path.rpartition("/")[2] for path in server.pictures()] == fetched
    assert all(row["reason"] == "robots.txt" for row in rows(tmp_path).values() if not row["crops"])
    assert len(server.requests("/robots.txt")) == 1


def test_opt_outs_in_the_picture_and_in_robots_txt_are_kept(server, tmp_path):
    """The first is the Data Mining property of IPTC and PLUS, in XMP."""
    xmp = b'<rdf:Description plus:DataMining="http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"/>'
    server.add(9, encode(draw(9), "JPEG", xmp=xmp))
    server.robots = "User-agent: *\nContent-Usage: /images/7/2 train-ai=n\nAllow: /"
    assert crawl(server, tmp_path) == 0
    server.robots = None
    assert crawl(server, tmp_path) == 0
    assert server.pictures() == ["/images/7/9.png", "/images/7/3.png", "/images/7/1.png"]
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items() if row["reason"]}
    assert reasons == {"9": "not for training (metadata)", "2": "not for training (robots.txt)"}


@pytest.mark.parametrize("delay, pause", [("7", 7), ("2.5", 2.5), ("0.1", 1), ("nonsense", 1), ("86400", None)])
def test_crawl_delay(server, tmp_path, capsys, delay, pause):
    server.robots = f"User-agent: *\nCrawl-delay: {delay}\nAllow: /"
    assert crawl(server, tmp_path) == (0 if pause else 3)
    if not pause:  # nobody waits for it
        assert "86,400 seconds" in capsys.readouterr().err and not server.pictures()
        return
    moments = [moment for moment, path in server.log if not path.startswith("/index")]
    assert all(pause - 0.1 < b - a < pause + 0.5 for a, b in zip(moments, moments[1:]))


def test_only_the_sites_own_hosts_are_asked():
    fetcher, _ = crawl_anime.find_posts(crawl_anime.parse_args(["--site", "danbooru"]))
    fetcher.check("https://cdn.donmai.us:443/a.png", True)
    for address in ("http://donmai.us/a", "https://evildonmai.us/a", "https://donmai.us@evil.com/a", "https://[::1"):
        with pytest.raises(crawl_anime.Unusable, match="address|foreign"):
            fetcher.fetch(address, is_picture=False)


# ------------------------------------------------------------------------------------------------------ state
def test_a_second_crawl_downloads_nothing_and_another_query_adds(server, tmp_path):
    assert crawl(server, tmp_path) == 0
    before, table = crops(tmp_path), (tmp_path / "metadata.csv").read_bytes()
    server.log.clear()
    assert crawl(server, tmp_path) == 0
    assert not server.pictures() and crops(tmp_path) == before and (tmp_path / "metadata.csv").read_bytes() == table
    server.add(9, encode(draw(9)))
    assert crawl(server, tmp_path, "--tags", "smile") == 0 and server.searches[-1].startswith("smile")
    assert server.pictures() == ["/images/7/9.png"] and set(crops(tmp_path)) > set(before)


def test_limit_stops_the_crawl_and_a_higher_one_goes_on(server, tmp_path, capsys):
    assert crawl(server, tmp_path, "--limit", 2) == 0
    assert len(crops(tmp_path)) == 2 and "reached the limit" in capsys.readouterr().out
    assert crawl(server, tmp_path, "--limit", 2) == 0 and len(server.pictures()) == 2
    assert crawl(server, tmp_path, "--limit", 3) == 0 and len(crops(tmp_path)) == 3


def test_a_crawl_without_faces_is_bounded(server, tmp_path, capsys):
    server.stock(0)
    assert crawl(server, tmp_path) == 0 and "there is no post of that search" in capsys.readouterr().out
    for number in range(1, 30):
        server.add(number, b"", rating="explicit")
    assert crawl(server, tmp_path, "--limit", 2) == 0
    assert len(rows(tmp_path)) == 20 and not server.pictures() and "no face yet" in capsys.readouterr().out


def test_near_duplicates_are_dropped(server, tmp_path, capsys):
    server.add(9, encode(draw(3).resize((200, 200)), "JPEG", quality=60))
    assert crawl(server, tmp_path) == 0
    assert rows(tmp_path)["3"]["reason"] == "near-duplicate" and "1 near-duplicate" in capsys.readouterr().out
    server.add(10, encode(draw(9)))
    server.add(11, encode(draw(9)))
    assert crawl(server, tmp_path) == 0  # against the crops of an earlier crawl, too
    assert len(crops(tmp_path)) == 4


def test_later_options_look_again_at_what_they_may_change(server, tmp_path):
    server.stock(1)
    server.add(2, encode(draw(2)), rating="explicit")
    server.add(3, encode(draw(3, 40)))  # too small for 64
    server.add(4, encode(draw(4, mode="L")))

    def asked(*more) -> list[str]:
        server.log.clear()
        assert crawl(server, tmp_path, *more) == 0
        return server.pictures()

    assert len(asked("--min-face", 64)) == 3
    reasons = {id: row["reason"] for id, row in rows(tmp_path).items()}
    assert reasons == {"1": "", "2": "rating", "3": "no face", "4": "grey"}
    assert asked("--min-face", 64) == []
    assert asked("--min-face", 64, "--rating", "explicit") == ["/images/7/2.png"]
    assert asked("--min-face", 64, "--grey") == ["/images/7/4.png"]
    assert asked("--min-face", 32) == ["/images/7/3.png"] and len(crops(tmp_path)) == 4


@pytest.mark.parametrize("torn", [b'127.0.0.1,2,"http://x', b"\xe3\x81"])
def test_a_torn_last_row_is_repaired(server, tmp_path, torn):
    assert crawl(server, tmp_path) == 0
    whole, table = (tmp_path / "metadata.csv").read_bytes(), tmp_path / "metadata.csv"
    last_row = whole.rindex(b"\n", 0, -1) + 1
    table.write_bytes(whole[:last_row] + torn)
    assert crawl(server, tmp_path) == 0
    assert table.read_bytes() == whole and len(crops(tmp_path)) == 3
    assert Counter(server.pictures()) == {"/images/7/3.png": 1, "/images/7/2.png": 1, "/images/7/1.png": 2}


@pytest.mark.parametrize("table", [b"a,b\n1,2\n", ",".join(crawl_anime.FIELDS).encode() + b"\n1,2\n"])
def test_a_foreign_table_is_left_alone(server, tmp_path, capsys, table):
    (tmp_path / "metadata.csv").write_bytes(table)
    assert crawl(server, tmp_path) == 2 and "metadata.csv" in capsys.readouterr().err
    assert (tmp_path / "metadata.csv").read_bytes() == table and not server.log


def test_a_table_that_a_spreadsheet_saved(server, tmp_path):
    """It neither runs a cell nor keeps the crawl from going on."""
    server.posts[0] |= dict(source="=1+1", artist="é")
    server.posts[1] |= dict(source="@SUM(A1)")
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert [row["source"] for row in rows(tmp_path).values()] == ["'=1+1", "'@SUM(A1)", ""]
    table, whole = tmp_path / "metadata.csv", (tmp_path / "metadata.csv").read_bytes()
    table.write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n"))
    server.log.clear()
    assert crawl(server, tmp_path, site="danbooru") == 0
    assert not server.pictures() and table.read_bytes() == whole


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


def test_a_full_disk_is_one_line(server, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        assert crawl(server, tmp_path) == 2 and "No space left" in capsys.readouterr().err
    assert crawl(server, tmp_path) == 0 and len(crops(tmp_path)) == 3


def stop_and_resume(server, tmp_path, posts: int, signals: list[int]):
    """Stop a crawl at random requests, then let it end: the same crops as an unbroken one, few fetched twice."""
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
        if number != signal.SIGKILL:
            assert run.err == "crawl_anime.py: interrupted: the same command goes on from here\n"
    run = Script("crawl_anime", *command, cwd=tmp_path)
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
    assert crawl(server, tmp_path) == 0
    assert server.pictures() == ["/images/7/99.png"] and len(crops(tmp_path)) == 10
    outcomes = {id: rows(tmp_path)[id]["outcome"] for id in ("1", "2", "99")}
    assert outcomes == {"1": "forgotten", "2": "forgotten", "99": "none"}


# ------------------------------------------------------------------------------------- lists, folders and crops
def test_a_list_goes_on_with_its_other_hosts(server, tmp_path):
    refusing = FakeBooru()
    refusing.always["/images/7/1.png"] = challenge(403)
    text = "".join(f"{host}/images/7/{number}.png\n" for number in (1, 2, 3) for host in (refusing.url, server.url))
    (tmp_path / "list").write_text(f"# mine\n\n{text}http://example.com/a.png\n")
    hosts = ("--base-url", server.url, "--file-host", refusing.url)
    assert run("--urls", tmp_path / "list", *hosts, "--to", tmp_path / "faces", "--detector", "none") == 0
    assert len(crops(tmp_path / "faces")) == 3 and refusing.pictures() == ["/images/7/1.png"]
    assert Counter(row["outcome"] for row in rows(tmp_path / "faces").values()) == dict(faces=3, failed=3, skipped=1)
    refusing.close()


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
    assert run(*command, tmp_path / "one", "--grey") == 0 and len(crops(tmp_path / "one")) == 17
    for _ in range(2):  # its own crops are not cropped again
        assert run(*command, pictures / "faces") == 0 and len(rows(pictures / "faces")) == 18
    assert "python dcgan.py --dataset '" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run("--from-dir", tmp_path / "empty", "--to", tmp_path / "faces") == 2
    assert "holds no picture" in capsys.readouterr().err


def test_known_crops(real_data, tmp_path):
    """The boxes that the detector finds in pictures on the disk, in their own pixels."""
    if not (real_data / "illustrations").is_dir():
        pytest.skip("DATA_DIR has no illustrations")
    (tmp_path / "pictures").mkdir()
    for name in ("cc_lovino_1.jpg", "cc_luffy_1.jpg", "cc_rin_1.png"):
        (tmp_path / "pictures" / name).write_bytes((real_data / "illustrations" / name).read_bytes())
    cascade = ("--cascade", real_data / "lbpcascade_animeface.xml")
    assert run("--from-dir", tmp_path / "pictures", "--to", tmp_path / "faces", *cascade) == 0
    boxes = [row["boxes"] or row["reason"] for row in rows(tmp_path / "faces").values()]
    assert boxes == ["192_196_248", "131_102_78", "no face"]


@pytest.mark.parametrize(
    "size, box, expected",
    [
        ((400, 300), (150, 100, 100), (125, 65, 150)),  # 1.5 sides around the middle, a tenth of the face higher
        ((400, 300), (0, 0, 100), (0, 0, 150)),  # moved in
        ((400, 300), (300, 200, 100), (250, 150, 150)),
        ((400, 120), (150, 10, 100), (140, 0, 120)),  # shrunk
    ],
)
def test_where_a_face_is_cut_out(size, box, expected):
    image = draw(1).resize(size)
    jpeg, kept_box, _, _ = crawl_anime.cut(image, box, 1.5, False)
    left, top, side = expected
    face = image.resize((256, 256), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    assert kept_box == box and jpeg == encode(face, "JPEG", quality=95)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--delay", "0.5"], "--delay"),
        (["--base-url", "ftp://x"], "--base-url"),
        (["--from-dir", "no such folder"], "no such folder"),
        (["--from-dir", ".", "--tags", "x"], "--tags"),
        (["--from-dir", ".", "--to", "."], "whose pictures are crops"),
        (["--tags", "smile Order:score"], "order:"),
        (["--contact", "a\nb"], "--contact"),
        (["--to", ""], "need a name"),
        (["--to", __file__], "test_crawl.py"),
        (["--limit", "0"], "--limit"),
        (["--site", "gelbooru"], "--site"),
        (["--forget", "../x"], "--forget"),
        (["--cascade", __file__], "cascade"),
    ],
)
def test_mistakes_get_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("crawl_anime.py: error: ") and error.count("\n") == 1


def test_the_detector_that_can_not_be_had(tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr(crawl_anime, "TRIES", 1)
    (tmp_path / "pictures").mkdir()
    draw(1).save(tmp_path / "pictures/1.png")
    assert run("--from-dir", "pictures") == 3 and "--detector none" in capsys.readouterr().err
    (tmp_path / "data/lbpcascade_animeface.xml").write_text("half of it")
    assert run("--from-dir", "pictures") == 2 and "not the author's" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- all faults at once
@pytest.mark.full
def test_every_fault_at_once(server, tmp_path, monkeypatch):
    """200 posts, each with a fault of its own: exactly the crops that are to be had, and the rest in the next crawl."""
    monkeypatch.setattr(crawl_anime, "TIMEOUT", 0.05)
    monkeypatch.setattr(crawl_anime, "DEADLINE", 0.1)
    server.stock(200, page=30)
    server.robots = "User-agent: *\nDisallow: /images/7/13.png\nContent-Usage: /images/7/17.png train-ai=n"
    kinds = {
        "good": [[]],
        "again": [FAULTS[name][0] for name in ("429", "reset", "silence", "dripping body")],
        "later": [[fault] * crawl_anime.TRIES for fault in (status(403), MAINTENANCE, fake_booru.short)],
        "never": [[status(404)], [picture(PNG, X_Robots_Tag="noai")], [fake_booru.endless]],
    }
    chance, chosen = random.Random(7), {}
    for number in set(range(1, 201)) - {13, 17}:
        chosen[str(number)] = kind = chance.choice(["good", "good", "again", "later", "never"])
        server.faults[f"/images/7/{number}.png"] = list(chance.choice(kinds[kind]))
    server.faults["/index.php"] = [status(200), status(503), fake_booru.reset, MAINTENANCE]
    server.faults["/robots.txt"] = [status(503), fake_booru.short]
    expected = {"good": "faces", "again": "faces", "later": "failed", "never": "skipped"}
    assert crawl(server, tmp_path) == 0
    found = {id: row["outcome"] for id, row in rows(tmp_path).items()}
    assert found == {id: expected[kind] for id, kind in chosen.items()} | {"13": "skipped", "17": "skipped"}
    server.faults.clear()
    assert crawl(server, tmp_path) == 0
    assert {name.split("-")[1] for name in crops(tmp_path)} == {id for id in chosen if chosen[id] != "never"}
