"""What the README, the study and the crawler's page say: commands, cells, links, quotations, pictures and tables."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import common
import compare
from tests.conftest import ROOT, SCRIPTS

NAMES = ("README.md", "assets/study.md", "assets/crawler.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README, STUDY, _ = PAGES.values()
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.S)
CODE = [code for language, code in BLOCKS if language == "python"]
OWN_CODE = [code for code in CODE if "import torch" in code]
CELLS = [code for code in CODE if code not in OWN_CODE]
LINES = [line.split("  #")[0].strip() for _, code in BLOCKS for line in code.splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
COMMANDS = [line for line in LINES + INLINE if re.search(r"(\bpython|\buv run|\btorchrun|%run)\b.*\b\w+\.py", line)]
COMMANDS += [f"gan.py {shlex.join(map(str, json.loads(words)))}" for words in re.findall(r"main\((\[.*?\])\)", TEXT)]
OF_A_TRAINED_RUN = r"--(resume|evaluate|(sample|walk|to|label)[= ]\S+)"  # options of no training


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
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
    of_the_training = shlex.split(re.sub(OF_A_TRAINED_RUN, "", shlex.join(options)))
    if of_the_training != options and script.removesuffix(".py") in SCRIPTS:
        trained = common.run_options(module.parse_args(of_the_training))
        monkeypatch.setattr(common, "load_checkpoint", lambda *_: {"options": trained, "optimizers": {"adam": {}}})
        monkeypatch.setattr(Path, "exists", lambda path: True)
        assert module.parse_args(options).checkpoint["options"] == trained
    else:
        module.parse_args(options)


@pytest.mark.full
def test_the_code_of_ones_own_runs(trainings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/vae-guo-digits").symlink_to(trainings.finished("vae-guo"))
    names = {}
    for code in OWN_CODE:
        exec(code, names)
    assert Path("grid.png").exists() and names["walk"].shape == (9, 1, 28, 28)
    latents = torch.randn(1, 2)
    drawn = names["exported"].module()(latents).sigmoid()
    torch.testing.assert_close(drawn, names["sampler"].generate(latents))


@pytest.mark.full
def test_the_notebook_cells_run_in_an_empty_folder(tmp_path):
    """As in Colab: pasted, then uploaded. The epochs and the data set are made small, the upload is a copy."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    small = {
        "gan.py": ("epochs=200, batch_size=100", "epochs=2, batch_size=1000"),
        "dcgan.py": ("epochs=100, batch_size=128", "epochs=1, batch_size=1000"),
    }

    def text(name: str) -> str:
        code = (ROOT / name).read_text(encoding="utf-8")
        if name in small:
            assert small[name][0] in code and 'default="mnist"' in code
            code = code.replace(*small[name]).replace('default="mnist"', 'default="digits"')
        return code

    uploads = tmp_path / "uploads"
    uploads.mkdir()
    for name in ("common.py", "dcgan.py"):
        (uploads / name).write_text(text(name), encoding="utf-8")
    stand_in = f"import shutil; shutil.copytree({str(uploads)!r}, '.', dirs_exist_ok=True)"
    cells = []
    for cell in CELLS:
        cell = re.sub(r"# the text of (\w+\.py)", lambda found: text(found[1]), cell)
        cell = re.sub(r"from google\.colab .*", lambda _: stand_in, cell)
        cells.append(cell.replace('"--epochs", 20', '"--epochs", 2').replace("--epochs 10", "--epochs 1"))
    assert len(cells) == 4 and "%%writefile common.py\n" in cells[0] and "def train(" in cells[1]
    folder = tmp_path / "empty"
    folder.mkdir()
    cells.insert(3, "import sys; (parse_args().epochs, sys.argv)")  # the notebook's own arguments are ignored
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    *trained, parsed, uploaded = [cell.outputs for cell in notebook.cells[1:]]
    for outputs in (*trained, uploaded):  # one picture, which is replaced after every epoch
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 1, outputs
    assert re.match(r"\(2,\s+\['.*',\s+'(-f|--f=)", parsed[-1].data["text/plain"]), parsed
    for run in ("gan-guo-digits", "gan-guo-digits-1", "dcgan-guo-digits"):
        assert (folder / "runs" / run / "progress.gif").exists()


def test_the_test_command_is_one_line_under_its_marker():
    assert re.search(r"<!-- test -->\n```bash\npip install [^\n]+ && python -m pytest\n```", README)


def links(page: str) -> list[str]:
    """All targets of a page's links and pictures, outside its code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.S))


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_picture_is_there_shown_and_small():
    shown = {(ROOT / page).parent / link for page in PAGES for link in links(page) if link.endswith((".png", ".gif"))}
    there = {path for path in (ROOT / "assets").rglob("*") if path.suffix in (".png", ".gif")}
    assert shown == there
    assert [path.name for path in there if path.stat().st_size > 600_000] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    local = [link for link in links(page) if "://" not in link]
    assert local
    for link in local:
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.relative_to(ROOT).as_posix()), link


def claims(page: str) -> list[str]:
    """The cells of the column "claim" of a page's tables."""
    cells, column = [], None
    for line in PAGES[page].splitlines():
        row = [cell.strip() for cell in line.split("|")]
        if "claim" in row:
            column = row.index("claim")
        elif len(row) == 1:
            column = None
        elif column and "---" not in row:
            cells.append(row[column])
    return cells


def test_claims_are_quoted_word_for_word(real_data):
    reports = real_data.parent / "reports"
    if not reports.is_dir():
        pytest.skip("the reports do not lie beside the data")
    said = {name: " ".join((reports / f"{name.lower()}.md").read_text("utf-8").split()) for name in ("Guo", "Banerjee")}
    assert len(claims("assets/study.md")) == 20
    for claim in claims("README.md") + claims("assets/study.md"):
        parts = re.findall(r"(.*?)\((Guo|Banerjee)\b[^)]*\)", claim)
        assert parts, claim
        for text, name in parts:
            quotes = re.findall(r'"([^"]+)"', text)
            assert quotes and all(quote in said[name] for quote in quotes), (name, quotes)


def test_the_readme_is_read_in_minutes():
    assert len(README.split()) <= 1700 and len(README.splitlines()) <= 190


def read_tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Tables whose first column is "run", with bars or in aligned columns: of each, by run, the cells by column."""
    tables, columns = [], None
    for line in text.splitlines():
        cells = re.split(r"\s*\|\s*|\s{2,}", line.strip(" |"))
        if cells[0] == "run":
            columns = cells[1:]
            tables.append({})
        elif len(cells) == 1:
            columns = None
        elif columns and cells[0] != "---":
            tables[-1][cells[0]] = dict(zip(columns, cells[1:] + [""] * len(columns)))
    return tables


@pytest.mark.parametrize("results", sorted(path.stem for path in (ROOT / "assets").glob("results*.json")))
def test_the_results_are_those_that_were_measured(results):
    """Every row and column of the committed results stands in the study, figure by figure as compare.py prints it."""
    rows = json.loads((ROOT / f"assets/{results}.json").read_text(encoding="utf-8"))["rows"]
    (measured,) = read_tables(compare.lay_out(rows))
    assert [table for table in read_tables(STUDY) if rows[-1]["run"] in table] == [measured]


def test_the_readme_shows_a_part_of_the_results():
    """The README may leave out rows, columns and deviations."""
    rows = json.loads((ROOT / "assets/results.json").read_text(encoding="utf-8"))["rows"]
    (measured,) = read_tables(compare.lay_out(rows))
    (shown,) = read_tables(README)
    assert shown["real images"]
    for run, cells in shown.items():
        assert {"Frechet", "precision", "recall"} <= cells.keys() and len(cells) < 8
        assert cells == {column: measured[run][column].partition(" ± ")[0] for column in cells}
