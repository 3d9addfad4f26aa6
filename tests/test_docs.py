"""The code in the README and the docs runs."""

import re
from pathlib import Path

import pytest

import pyro_vi_kit as vi

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def code(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what a reader sees is a reader's, warnings too
@pytest.mark.parametrize("page", [p for p in PAGES if code(p)], ids=lambda p: p.name)
def test_every_block_runs_after_the_one_before(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import pyro

    names = {"__name__": "readme"}
    with pyro.get_param_store().scope():
        for block in code(page):
            exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_names_what_is_registered():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in [*vi.guides.names(), *vi.objectives.names()]:
        assert name in text
