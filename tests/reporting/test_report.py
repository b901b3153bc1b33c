"""`obsinfra report`: what it says of real plain loops, that it stands alone, that no name becomes markup."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import obsinfra
from obsinfra.monitoring.performance_history import PerformanceHistory, read_history
from obsinfra.reporting.charts import MAX_POINTS, thinned
from obsinfra.reporting.compose import compose
from obsinfra.reporting.gather import Curve, gather
from obsinfra.reporting.html_form import to_html
from obsinfra.reporting.markdown_form import to_markdown
from obsinfra.run.folder import RunFolder

NASTY = '<img src="https://evil.example/x" onerror="alert(1)">|`</style><script>alert(2)</script>'


class Tags(html.parser.HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def loop(folder: Path, run: str, steps: int, resume: str | None = None, **settings: object) -> None:
    """A plain loop, by nobody's trainer: no logging is configured, yet its numbers are kept."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(steps * 4, 8), torch.randn(steps * 4, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    with obsinfra.observe(
        model, optimizer, run=run, resume=resume, output_dir=str(folder), metrics_port=0, sample_seconds=0.1,
        **settings,
    ) as observed:  # fmt: skip
        for inputs, targets in observed.steps(loader):
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            observed.record(loss=loss, grad_norm=norm, samples=4, learning_rate=0.1)
            if observed.step == steps // 2:
                observed.log_validation({"loss": 0.5, "accuracy": 0.25})
                observed.checkpoint(reason="half-way")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a plain loop, of different lengths and settings."""
    folder = tmp_path_factory.mktemp("runs")
    loop(folder, "first", 400)
    loop(folder, "second", 200, keep_checkpoints=7)
    return folder


def test_a_plain_loop_leaves_its_numbers_and_the_report_tells_them(runs: Path) -> None:
    story = gather(RunFolder(runs / "first"), None)
    loss = story.curves["loss"]
    assert loss.steps[-1] == 400 and list(loss.steps) == sorted(set(loss.steps))
    assert story.validation["accuracy"] == Curve((200,), (0.25,))
    assert story.account.goodput is not None and 0 < story.account.goodput < 1
    assert story.account.phases["checkpoint"] > 0
    assert [one.reason for one in story.checkpoints][:1] == ["half-way"]
    assert all(one.bytes_total for one in story.checkpoints)
    text = to_markdown(compose(story))
    assert (
        "| Steps | **400** |" in text and "half-way" in text and torch.__version__ in text.replace("\\", "")
    )
    assert re.search(r"\| Loss \| first \|.*[▁-█]", text)


def test_html_stands_alone_without_scripts_or_requests(runs: Path) -> None:
    stories = [gather(RunFolder(runs / name), None) for name in ("first", "second")]
    text = to_html(compose(*stories))
    tags = Tags(text).found
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in text.replace("url(#clip", "") and "@import" not in text
    drawings = [attributes for tag, attributes in tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) >= 7 and all(one["aria-label"] for one in drawings)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_second_run_beside_it_shows_numbers_and_differing_settings(runs: Path) -> None:
    stories = [gather(RunFolder(runs / name), None) for name in ("first", "second")]
    text = to_markdown(compose(*stories))
    assert "| steps | 400 | 200 | \\+100.0 % |" in text or "| steps | 400 | 200 | +100.0 % |" in text
    assert "| keep\\_checkpoints | 3 | 7 |" in text
    assert "loss at step 200, smoothed" in text
    assert "No setting differs" in to_markdown(compose(stories[0], stories[0]))


def test_a_restarted_run_is_one_story(tmp_path: Path) -> None:
    loop(tmp_path, "r", 100, max_steps=0)
    info = RunFolder(tmp_path / "r").read_info()
    loop(tmp_path, "r", 100, resume="r")
    story = gather(RunFolder(tmp_path / "r"), None)
    assert len(story.sessions) == 2 and story.info.started == info.started
    assert story.account.lost["between_processes"] > 0
    assert story.sessions[1].facts["resumed_from_step"] is not None


def test_names_and_reasons_never_become_markup(runs: Path) -> None:
    story = gather(RunFolder(runs / "first"), None)
    evil = replace(
        story,
        info=replace(story.info, id=NASTY, model=NASTY, host=NASTY, reason=NASTY, git_revision=NASTY),
        state=NASTY,
        config={NASTY: NASTY},
        validation={NASTY: story.curves["loss"]},
        checkpoints=tuple(replace(one, kind=NASTY, reason=NASTY) for one in story.checkpoints),
        events=tuple(replace(one, who=NASTY, what=NASTY, why=NASTY, outcome=NASTY) for one in story.events),
    )
    text = to_html(compose(evil, evil))
    assert not {"script", "img"} & {tag for tag, _ in Tags(text).found}
    assert text.count("</style>") == 1
    rows = [line for line in to_markdown(compose(evil)).splitlines() if "onerror" in line]
    assert rows and not any(re.search(r"(?<!\\)<", row) for row in rows)


def test_secrets_in_addresses_are_hidden(runs: Path) -> None:
    folder = RunFolder(runs / "second")
    kept = folder.config_toml.read_text()
    folder.config_toml.write_text(kept + 'checkpoint_remote = "s3://key:secret@host/bucket"\n')
    try:
        text = to_html(compose(gather(folder, None)))
    finally:
        folder.config_toml.write_text(kept)
    assert "s3://…@host/bucket" in text and "secret" not in text


def test_damaged_files_leave_gaps_not_errors(runs: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "broken")
    folder.create()
    folder.write_info(replace(RunFolder(runs / "first").read_info(), id="broken", state="failed"))
    (folder.checkpoints / "manifests").mkdir()
    (folder.checkpoints / "manifests" / "000000000007-regular-00.json").write_text("{torn")
    folder.history.write_bytes(b'{"kind":"point","at":1,"step":1,"loss":2.0}\n\xff\xfe\n{"kind":"po')
    folder.config_toml.write_text("= nonsense")
    story = gather(folder, None)
    assert story.curves["loss"] == Curve((1,), (2.0,)) and story.checkpoints[0].bytes_total is None
    assert "config.toml is not there" in to_markdown(compose(story))


def test_thinning_bounds_what_is_drawn_and_keeps_the_extremes() -> None:
    values = [float((i * 7919) % 1009) for i in range(10_000)]
    values[4_321], values[8_765] = 5_000.0, -5_000.0
    drawn = thinned(Curve(tuple(range(10_000)), tuple(values)))
    assert len(drawn.steps) <= MAX_POINTS and drawn.steps[0] == 0 and drawn.steps[-1] == 9_999
    assert max(drawn.values) == 5_000.0 and min(drawn.values) == -5_000.0


def test_a_long_run_keeps_ever_fewer_points_of_the_right_values(tmp_path: Path) -> None:
    now = [0.0]
    history = PerformanceHistory(tmp_path / "history.jsonl", 1, clock=lambda: now[0])
    history.start({})
    for second in range(60_000):
        now[0] = float(second)
        history.point({"step": second, "loss": float(second), "grad_norm": 9.0 if second == 50_001 else 1.0})
        if second % 1000 == 0:
            history.write()
    history.write()
    points = [one for one in read_history(tmp_path / "history-rank1.jsonl") if one["kind"] == "point"]
    assert 20_000 < len(points) < 30_000, len(points)
    assert max(point["grad_norm"] for point in points if point["step"] > 49_990) == 9.0
    mean = points[-1]["loss"]
    assert points[-2]["step"] < mean <= points[-1]["step"]


def test_the_file_that_cannot_be_written_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    with obsinfra.TrainingMonitor(
        "m", metrics_port=0, sample_seconds=60, history_file=tmp_path / "gone" / "history.jsonl"
    ) as monitor:
        with monitor.step():
            monitor.record(loss=1.0)
        monitor._tick()
        counted = {sample.labels.get("component"): sample.value for sample in monitor.samples()}
    assert counted["history_file"] >= 1


def test_the_command_writes_where_it_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from obsinfra.cli.main import app

    def ask(*words: str) -> str:
        found = CliRunner().invoke(app, ["report", *words, "--output-dir", str(runs)], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    target = runs / "both.html"
    ask("first", "--compare", "second", "--output", str(target))
    assert "first beside second" in target.read_text()
    ask("first", "--format", "markdown")
    assert (runs / "first" / "reports" / "report.md").read_text().startswith("# Linear · first")
    assert json.loads((runs / "first" / "run.json").read_text())["state"] == "finished"
