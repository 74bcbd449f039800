"""What the documents name is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from kvkeep.config import STORE_SETTINGS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvkeep"
FAULTS = ROOT / "docs" / "reference" / "known-faults.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "reference").glob("*.md"),
]
FOLDERS = "|".join(sorted(file.parent.name for file in SOURCE.glob("*/__init__.py")))


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", FAULTS.read_text())
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing


def test_every_case_that_is_named_is_measured():
    cases = re.findall(r"cases? ((?:`[\w-]+`(?:, )?)+)", FAULTS.read_text())
    source = "".join(file.read_text() for file in (ROOT / "src" / "kvkeep" / "bench").glob("*.py"))
    assert len(cases) == 3
    for name in re.findall(r"`([\w-]+)`", " ".join(cases)):
        assert f'"{name}"' in source, name


def files_named(text: str) -> set[str]:
    """The files and folders of src/kvkeep that a text names in code, as `engine/x.py` or `engine/{x,y}.py`."""
    found: set[str] = set()
    for name in re.findall(rf"`((?:{FOLDERS})/[\w/{{}},]*(?:\.py)?)`", text):
        before, names, after = re.fullmatch(r"([^{]*)(?:\{([^}]*)\})?(.*)", name).groups()
        found |= {f"{before}{part}{after}" for part in (names or "").split(",")}
    return found


def exists(dotted: str) -> bool:
    """Whether a name like kvkeep.engine.plan.StepPlan is a package, a module or stands in one."""
    file, parts = SOURCE, dotted.split(".")[1:]
    while parts and file.is_dir() and ((file / parts[0]).is_dir() or (file / f"{parts[0]}.py").is_file()):
        name = parts.pop(0)
        file = file / name if (file / name).is_dir() else file / f"{name}.py"
    text = (file / "__init__.py" if file.is_dir() else file).read_text()
    return not parts or re.search(rf"\b{parts[0]}\b", text) is not None


def anchors(page: Path) -> list[str]:
    """What a link to a heading of this page may end with."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert [name for name in files_named(text) if not (SOURCE / name).exists() and not (ROOT / name).exists()] == []
    names = set(re.findall(r"\bkvkeep(?:\.[A-Za-z_]\w*)+", text))
    assert [name for name in names if not exists(name) and not name.endswith((".json", ".toml"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert "://" in target or file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_serve_that_a_page_writes_is_one(page: Path) -> None:
    right = {"--socket", "--config", *(f"--{name.replace('_', '-')}" for name in STORE_SETTINGS)}
    lines = [line.partition("kvkeep serve")[2] for line in page.read_text().splitlines()]
    assert {option for line in lines for option in re.findall(r"--[a-z][a-z-]*", line)} <= right


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = [page.relative_to(ROOT / "docs") for page in PAGES if page.parent != ROOT and page.name != "README.md"]
    assert [page for page in pages if f"({page})" not in index] == [], "give it a line in docs/README.md"


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    figures = runpy.run_path(str(ROOT / "scripts" / "figures.py"))
    text = (ROOT / "README.md").read_text()
    assert figures["written"](text) == text, "python scripts/figures.py writes them"


def test_every_test_and_script_that_the_makefile_names_exists() -> None:
    named = set(re.findall(r"\b(?:tests|bench|scripts|demo)/[\w/]+\.\w+", (ROOT / "Makefile").read_text()))
    assert len(named) > 10
    assert [
        name for name in sorted(named) if not (ROOT / name).exists() and not name.startswith("bench/results/")
    ] == []
