"""Every command of the README parses, every picture exists, is shown and is small."""

import importlib
import json
import re
import shlex

import pytest

import compare
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```(?:bash|python)\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if re.search(r"(\bpython|\buv run|\btorchrun|%run)\b.*\b\w+\.py", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path, monkeypatch):
    words = shlex.split(command.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, options = words[at], words[at + 1 :]
    assert (ROOT / script).is_file()
    if script.startswith("tests/"):
        return
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    if "--sample" in options or "--resume" in options or "--evaluate" in options:
        import common

        monkeypatch.setattr(common, "load_checkpoint", lambda *_: {"options": {}})
        monkeypatch.setattr(common, "adopt_options", lambda checkpoint, options, *_, **__: options)
    module.parse_args(options)


def test_every_picture_is_there_shown_and_small():
    shown = set(re.findall(r"assets/[\w./-]+\.(?:png|gif)", README))
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "assets").rglob("*") if p.suffix in (".png", ".gif")}
    assert shown == there
    assert [name for name in there if (ROOT / name).stat().st_size > 600_000] == []


def test_every_link_into_the_tree_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("results", sorted(path.stem for path in (ROOT / "assets").glob("results*.json")))
def test_the_results_are_those_that_were_measured(results):
    """Every row of the committed results stands in the README, figure by figure as compare.py prints it."""
    rows = json.loads((ROOT / f"assets/{results}.json").read_text())["rows"]
    for name in {row["dataset"] for row in rows}:
        for line in compare.lay_out([row for row in rows if row["dataset"] == name]).splitlines():
            assert line in README
