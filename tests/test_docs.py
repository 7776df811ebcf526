"""What the documents say: their forks apply and run, the symbols they name exist, their links lead
somewhere.
"""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from config import ROOT

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICK = "--iterations 2 --envs 4 --batch 4 --minibatch 4 --segment 2 --env-workers 1 --eval-every 0"


def forks() -> list[tuple[str, str, str]]:
    """Title, diff and command of every section of docs/fork.md."""
    found = []
    for section in (ROOT / "docs" / "fork.md").read_text().split("\n## ")[1:]:
        diff = re.search(r"```diff\n(.*?)```", section, re.S)
        command = re.search(r"^    python (train\.py.*)$", section, re.M)
        found.append((section.splitlines()[0], diff[1], command[1]))
    return found


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the files that git knows, or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("title, diff, command", forks(), ids=lambda text: text[:24].split("\n")[0])
def test_a_fork_applies_and_trains(cli, checkout, title, diff, command):
    (checkout / "fork.diff").write_text(diff)
    applied = subprocess.run(
        ["git", "apply", "fork.diff"], cwd=checkout, capture_output=True, text=True
    )
    assert applied.returncode == 0, applied.stderr
    file, _, flags = command.partition(" ")
    run = checkout / "runs" / "fork"
    process = cli(checkout / file, f"{flags} {QUICK} --run {run}", cwd=checkout)
    status, output = process.finish(150.0)
    assert status == 0 and "2 iterations done" in output, output


def test_there_are_five_forks():
    assert len(forks()) == 5


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_mechanism_names_a_symbol_that_exists():
    """`module.Class.method` and `module.NAME`, as docs/paper.md writes them."""
    text = (ROOT / "docs" / "paper.md").read_text()
    symbols = {s for s in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text) if not s.endswith(FILES)}
    assert len(symbols) > 15
    for symbol in symbols:
        names = symbol.split(".")
        depth = 2 if names[0] in ("envs", "models", "planning", "benchmarks") else 1
        thing = importlib.import_module(".".join(names[:depth]))
        for name in names[depth:]:
            assert hasattr(thing, name), f"docs/paper.md names {symbol}, which does not exist"
            thing = getattr(thing, name)


FILES = (".py", ".md", ".jsonl", ".json", ".png", ".sh")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{page.name} links to {target}"
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", text):
        places = [ROOT / name, ROOT / "docs" / name, ROOT / "tests" / name, page.parent / name]
        known = any(p.is_file() for p in places) or [
            *ROOT.glob(f"*/{name}"),
            *ROOT.glob(f"*/*/{name}"),
        ]
        assert known or "fork.md" in page.name, f"{page.name} names {name}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text()):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
