"""The report: one page with everything in it, in which nothing of a stranger becomes markup."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.run_records import make_run
from unit.test_watch import START, started_run

from dbmpi.checkpoint.run_lock import locked
from dbmpi.cli.main import main
from dbmpi.formats import report
from dbmpi.formats.html import table, tag, text
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.records import read_records

pytest.importorskip("matplotlib", reason="drawing needs the extra [plot]")

EVIL = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


class Page(HTMLParser):
    """A page as a browser takes it apart; errors in its structure are errors here."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def check(self) -> None:
        """Nothing is loaded, nothing is run, and every link leads somewhere on the page."""
        names = {attributes.get("id") for _, attributes in self.tags}
        assert not {"script", "link", "iframe", "object", "base", "form"} & {name for name, _ in self.tags}
        for name, attributes in self.tags:
            assert not any(key.startswith("on") for key in attributes)
            if name == "img":
                assert attributes["src"].startswith("data:image/png;base64,")
                assert attributes["alt"]
            if name == "a":
                assert attributes["href"][1:] in names
        assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in self.tags)


@given(st.text(), st.text())
def test_text_is_never_markup(content, value):
    page = Page(tag("p", content, tag("b", content), title=value))
    (_, attributes), (inner, _) = page.tags
    assert inner == "b"
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in content)
    assert "".join(page.words) == 2 * shown
    assert attributes["title"] == "".join(x if x.isprintable() or x == "\n" else "\ufffd" for x in value)
    assert text(tag("p")) == "<p></p>"
    Page(table((content, value), [(value, content)]))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with two sessions, a checkpoint, and a configuration."""
    directory = make_run(tmp_path / "run")
    checkpoint = {
        "kind": "checkpoint", "role": "shard", "number": 0, "session": 2, "time": 2e9, "elapsed": 4.0,
        "name": "step-7.h5", "bytes": 4096, "seconds": 0.5, "rested": 0.0, "waited": 0.0,
    }  # fmt: skip
    with (directory / "records" / "shard-0.jsonl").open("a") as file:
        for session in (1, 2):
            start = START | {"session": session, "configuration": '{"network": {"loss": "softmax"}}'}
            file.write(json.dumps(start) + "\n")
        file.write(json.dumps(checkpoint) + "\n")
        about = {"shard": 0, "step": 9, "updates": 3, "repeated": 0, "name": "step-9.h5", "seconds": 0.1}
        file.write(json.dumps(checkpoint | {"kind": "rescue"} | about) + "\n")
    return directory


EVALUATION = {
    "checkpoint": "run/step-7.h5", "step": 7, "data": "test.h5", "samples": 10, "loss": 0.5, "accuracy": 0.9,
    "details": {
        "classes": [
            {"class": number, "label": label, "samples": 5, "precision": 0.9, "recall": 0.8, "f1": None, "auc": 0.7}
            for number, label in enumerate(("cat", EVIL))
        ],
        "mean": {"precision": 0.9, "recall": 0.8, "f1": 0.85, "auc": 0.7},
        "weighted_mean": {"precision": 0.9, "recall": 0.8, "f1": 0.85, "auc": 0.7},
        "mistakes": [{"class": 0, "taken_for": None, "samples": 1}, {"class": 1, "taken_for": 0, "samples": 2}],
        "confusion_matrix": [[4, 0], [2, 3]],
    },
}  # fmt: skip


def test_everything_is_in_the_report(run, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert main(["report", str(run), "--evaluation", str(tmp_path / "evaluation.json")]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert sorted(path.name for path in run.iterdir()) == ["records", "report.html"]
    page = Page((run / "report.html").read_text())
    page.check()
    for words in (
        "A training by Downpour SGD of 1,234 parameters on 3 ranks",
        "90.00 % test accuracy",
        "It was started 2 times",
        "session 2 goes on",
        "step-7.h5: 0.0 MiB in 0.50 s",
        "shard 0; its mirror is in step-9.h5, without 3 updates",
        '"loss": "softmax"',
        "4 evaluations",
        "worker 1",
        "weighted by samples",
        "no number",
        EVIL,
    ):
        assert words in page.text, words
    assert sum(name == "img" for name, _ in page.tags) == 9
    assert (run / "report.html").stat().st_size < 2e6


def test_names_and_texts_of_strangers_are_text(tmp_path):
    """In whichever field of the records they come, and in the name of the run."""
    run = started_run(tmp_path / "run")
    path = run / "records" / "shard-0.jsonl"
    evil = json.dumps(EVIL)[1:-1]
    for field in ("downpour", "apply", "0.1"):
        path.write_text(path.read_text().replace(f'"{field}"', f'"{evil}"'))
    path.write_text(path.read_text().replace('"configuration": ""', f'"configuration": "{evil}"'))
    history = RunHistory(read_records(run))
    page = Page(report.page(history, EVIL, working=False))
    page.check()
    assert page.text.count("alert(1)") >= 3


def test_a_run_of_values_that_goes_on_and_has_little_to_say(tmp_path):
    run = make_run(tmp_path / "run", workers=1, shards=0, sessions=1, classes=False)
    with locked(run, print):
        assert main(["report", str(run), "--out", str(tmp_path / "out.html")]) == 0
    page = Page((tmp_path / "out.html").read_text())
    page.check()
    assert "and still goes on" in page.text
    assert "accuracy over" not in page.text
    assert "The records do not hold it" in page.text


def test_a_report_of_many_ranks_and_events_stays_short(tmp_path):
    run = make_run(tmp_path / "run", workers=300, shards=2, sessions=1)
    page = Page(report.page(RunHistory(read_records(run)), "run", working=False))
    page.check()
    assert "260 more" in page.text
    assert sum(name == "tr" for name, _ in page.tags) < 200


def test_a_report_is_replaced_whole_or_not_at_all(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder").mkdir()
    assert main(["report", str(run), "--out", str(tmp_path / "folder")]) == 2
    assert "folder: is a directory; expected the name of a file" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "x.html: is in a directory that does not exist" in capsys.readouterr().err
    monkeypatch.setattr(report, "page", lambda *_, **__: "the new one")
    out = tmp_path / "out.html"
    out.write_text("the one before")

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert out.read_text() == "the one before"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"null", b"{}", b'{"details": 3}', b'{"details": {"classes": [1]}}', b"[" * 100_000],
)
def test_what_is_no_evaluation_is_named(run, tmp_path, capsys, content):
    path = tmp_path / "evaluation.json"
    path.write_bytes(content)
    assert main(["report", str(run), "--evaluation", str(path)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "evaluation.json: is no evaluation; expected what `dbmpi evaluate" in message
    assert not (run / "report.html").exists()


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "no")]) == 2
    assert "is missing" in capsys.readouterr().err


@pytest.mark.skipif("DBMPI_BROWSER_TESTS" not in os.environ, reason="starts a browser: make test-browser")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it_without_a_network(run, tmp_path, width, scheme):
    """It fits, loads nothing, runs nothing, reports no error, and its pictures are there."""
    api = pytest.importorskip("playwright.sync_api", reason="make test-browser installs Playwright")
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    evil = run.rename(tmp_path / EVIL.replace("/", "\u2044"))
    out = tmp_path / "out.html"
    assert main(["report", str(evil), "--out", str(out), "--evaluation", str(tmp_path / "evaluation.json")]) == 0
    here = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    with api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=here, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            problems: list[str] = []
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda one: one.url.startswith(("file:", "data:")) or problems.append(one.url))
            page.goto(out.as_uri())
            assert page.title().startswith(EVIL[:10])
            page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            broken = page.eval_on_selector_all("img", "all => all.filter(one => !one.naturalWidth).length")
            assert broken == 0
            assert page.locator("img").count() == 9
            assert page.locator("h2").count() == 7
            assert problems == []
        finally:
            browser.close()
