"""`lakehouse report`: one page that says what the lake says, also of an empty one; and how it looks, in a real browser."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Ran

from lakehouse.lake import open_lake
from lakehouse.queries import query
from lakehouse.report import load_page, money, render
from lakehouse.settings import ROOT, load_settings
from tests.browser import Tab, browsing, find_browser

PAGE = load_page(ROOT / "report")
DECIMALS = {"jpy": 0, "kwd": 3}


@pytest.fixture(scope="module")
def page(demo_run: tuple[Path, Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the small world."""
    home, ran = demo_run
    ran.fine()
    made = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAKEHOUSE_HOME", str(home))
        from lakehouse.cli.explore import road
        from lakehouse.cli.report import _compared, _received

        lake = open_lake(load_settings())
        made.write_text(render(lake, _received(lake, road(lake)), _compared(lake)), "utf-8")
    return made


def text_of(page: str) -> str:
    """What a reader reads: without drawings, style and tags, spaces as one."""
    bare = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def test_it_writes_a_page_and_says_where(call: Callable[..., Ran], world: Path, tmp_path: Path) -> None:
    there = call("report", "--to", str(tmp_path / "new" / "r.html"), "--json").fine().json
    assert there == {"file": str(tmp_path / "new" / "r.html"), "bytes": (tmp_path / "new" / "r.html").stat().st_size}
    assert "report.html" in call("report").fine().out
    assert (world / "report.html").exists()
    call("report", "--to", str(tmp_path)).failed(2, "a folder; name a file in it")


@pytest.mark.usefixtures("world")
def test_its_figures_are_those_of_the_marts(page: Path) -> None:
    read, lake = text_of(page.read_text("utf-8")), open_lake(load_settings())
    found = query(
        lake,
        """SELECT currency, CAST(sum(change_minor) AS BIGINT) AS minor FROM marts.mrr_movements GROUP BY currency
           UNION ALL
           SELECT currency, CAST(sum(leakage_minor) AS BIGINT) FROM marts.delinquent_feature_usage
           WHERE usage_date >= (SELECT date_trunc('month', max(usage_date)) FROM marts.delinquent_feature_usage)
           GROUP BY currency, billing_status""",
    ).to_pylist()
    assert found
    assert [row for row in found if money(row["minor"], row["currency"], {}) not in read] == []


def test_it_says_of_every_section_what_it_means_and_until_when_it_is_complete(page: Path) -> None:
    whole = page.read_text("utf-8")
    for section in PAGE.sections:
        part = re.search(rf'<section id="{section.name}".*?</section>', whole, re.DOTALL)
        assert part, section.name
        assert section.title in part[0]
        assert 'href="#def-' in part[0]
        if section.name != "road":
            assert re.search(r"(complete until <strong>\d{4}-|holds\s+what was received up to \d{4}-)", part[0]), section.name
    assert "All of it agrees" in whole
    anchors, links = set(re.findall(r'id="([^"]+)"', whole)), set(re.findall(r'href="#([^"]+)"', whole))
    assert links - anchors == set()


def test_an_empty_lake_gives_a_page_that_says_so(call: Callable[..., Ran], tmp_path: Path) -> None:
    call("report", "--to", str(tmp_path / "r.html")).fine()
    read = text_of((tmp_path / "r.html").read_text("utf-8"))
    assert "The lake is empty" in read
    assert "no simulated world to compare with" in read
    blocks = [b for s in PAGE.sections for b in s.blocks]
    assert read.count("is declared but holds nothing yet") == len(blocks)


def test_what_a_query_finds_cannot_become_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "definitions.md").write_text("# D\n\n## Things: x\n\n<script>1</script> [a link](http://example.org)\n", "utf-8")
    (tmp_path / "q.sql").write_text(
        "SELECT '<script>alert(1)</script>' AS name, 1234567 AS n, CAST(NULL AS VARCHAR) AS currency, 5 AS cost_minor", "utf-8"
    )
    (tmp_path / "none.sql").write_text("SELECT 1 AS n WHERE false", "utf-8")
    (tmp_path / "report.yaml").write_text(
        """
title: T <b>
about: A
definitions: definitions.md
sections:
  - name: one
    title: One
    about: B
    definition: Things
    blocks:
      - query: q.sql
        title: "Of {name}"
        each: name
        columns: {name: name, n: n, cost_minor: cost}
      - query: none.sql
        title: "None, {n}"
        each: n
        columns: {n: n}
        empty: Nothing there.
""",
        "utf-8",
    )
    made = render(open_lake(load_settings().model_copy(update={"report_dir": tmp_path})), [], "no truth")
    assert "<script" not in made
    assert "<b>" not in made
    assert "example.org" not in made
    read = text_of(made)
    assert "1,234,567 0.05" in read
    assert "None Nothing there." in read


@pytest.mark.parametrize(
    ("minor", "currency", "said"),
    [
        (0, "usd", "0.00"),
        (-5, "usd", "−0.05"),
        (123456789012345678, "eur", "1,234,567,890,123,456.78"),
        (1234567, "jpy", "1,234,567"),
        (1234567, "kwd", "1,234.567"),
        (100, None, "1.00"),
    ],
)
def test_money_is_shown_exactly_in_the_units_of_its_currency(minor: int, currency: str | None, said: str) -> None:
    assert money(minor, currency, DECIMALS) == said


def test_a_declaration_that_is_wrong_is_named(call: Callable[..., Ran], tmp_path: Path) -> None:
    call("report", LAKEHOUSE_REPORT_DIR=str(tmp_path)).failed(1, "report.yaml: no such file", "LAKEHOUSE_REPORT_DIR")
    (tmp_path / "report.yaml").write_text("title: only\n", "utf-8")
    call("report", LAKEHOUSE_REPORT_DIR=str(tmp_path)).failed(1, "report.yaml", "`about`")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a real browser."""
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome on the PATH: how the page looks was not tested")
    with browsing(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


# of the visible drawings: the least scale at which one is shown; of colours: the least contrast with their card (WCAG 2.2)
SCALE = """Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width
  / s.viewBox.baseVal.width).filter(w => w > 0))"""
CONTRAST = """(() => {
  const light = c => { const v = c.match(/\\d+/g).slice(0, 3).map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
  const colour = e => light(getComputedStyle(e).color);
  const card = light(getComputedStyle(document.querySelector('section')).backgroundColor);
  return Math.min(...['p', '.soft', 'th', 'td', 'a', 'summary'].map(s => {
    const c = colour(document.querySelector('section ' + s));
    return (Math.max(c, card) + 0.05) / (Math.min(c, card) + 0.05) }))
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_how_it_looks(tab: Tab, page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    tab.show(page, width, dark=dark)
    assert tab.requests == [page.as_uri()]  # nothing else is asked of anybody
    assert tab.complaints == []
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.querySelectorAll('figure').length") >= 12
    assert tab.value(SCALE) > 0.95  # letters keep their size
    assert tab.value(CONTRAST) >= 4.5
    paper = tab.value("getComputedStyle(document.body).backgroundColor")
    ink = tab.value("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert (sum(map(int, re.findall(r"\d+", paper))) < sum(map(int, re.findall(r"\d+", ink)))) == dark
    tab.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000  # an empty page compresses to less
    opened = "[...document.querySelectorAll('details')].every(d => { d.open = true; return d.scrollHeight > 0 })"
    assert tab.value(opened)
    assert tab.value("document.documentElement.scrollWidth") <= width  # with all tables open, too


def test_the_test_of_how_it_looks_can_fail(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<div style='width:900px'>wide</div><img src='missing.png'><script>console.error('no'); throw new Error('bad')</script>",
        "utf-8",
    )
    tab.show(tmp_path / "bad.html", 390)
    assert tab.value("document.documentElement.scrollWidth") > 390
    assert len(tab.requests) == 2
    assert len(tab.complaints) >= 2
