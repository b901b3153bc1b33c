"""The setting `checkpoint_remote`: what is committed is copied, and an empty machine goes on from there."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from eight_steps import state_of, trained
from s3_server import S3Server
from torch import nn
from waiting import wait_for

from obsinfra.backup.compare import differences
from obsinfra.backup.remote import Remote
from obsinfra.cli.main import main
from obsinfra.observation import observe
from obsinfra.run.folder import RunFolder

BUCKET = "runs"
SECRET = "hush-4711"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Down at first; the usual environment variables lead to it, as on a machine of one's own."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'obsinfra[s3]')")
    pytest.importorskip("moto.server", reason="moto's server is not installed (pip install 'moto[server]')")
    server = S3Server()
    for name, value in {
        "AWS_ENDPOINT_URL": server.options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # it keeps connections, whatever the address
    yield server
    server.kill()


def mirror_events(folder: RunFolder) -> list[str]:
    """What the mirror process noted after its trainer's end."""
    path = folder.logs / "mirror.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [str(json.loads(line)["event"]) for line in lines]


def manifests_of(folder: RunFolder) -> set[str]:
    return {path.name for path in (folder.checkpoints / "manifests").iterdir()}


def test_an_empty_machine_goes_on_from_what_the_mirror_copied(tmp_path: Path, server: S3Server) -> None:
    """From the URL of the setting itself, and from that of the run's folder below it."""
    server.start(BUCKET)
    url = f"s3://{BUCKET}/mine"
    whole = trained(tmp_path / "whole", 8)
    first = trained(tmp_path / "lost", 5, run="alpha", checkpoint_remote=url)
    wait_for(lambda: "all_copied" in mirror_events(first.folder), "the mirror ends when all is copied")
    assert set(Remote(f"{url}/alpha").manifests()) == manifests_of(first.folder)
    written = [path for path in first.folder.root.rglob("*") if path.is_file()]
    assert written and not any(SECRET.encode() in path.read_bytes() for path in written)
    shutil.rmtree(tmp_path / "lost")
    for number, place in enumerate((url, f"{url}/alpha")):
        second = trained(tmp_path / f"empty{number}", 8, resume=place)
        assert second.resumed is not None and second.resumed.info.step == 5
        assert differences(state_of(second), state_of(whole)) == []


def test_a_remote_down_during_a_whole_run_stops_nothing_and_the_next_run_catches_up(
    tmp_path: Path, server: S3Server
) -> None:
    url = f"s3://{BUCKET}/mine"
    how = {"run": "alpha", "checkpoint_remote": url}
    whole = trained(tmp_path / "whole", 8)
    first = trained(tmp_path / "runs", 5, **how)
    assert first.folder.read_info().state == "stopped" and first.folder.read_info().reason == "far enough"
    left = manifests_of(first.folder)
    assert left
    wait_for(lambda: list((first.folder.checkpoints / "outbox").rglob("*.json")), "what waits is on disk")
    server.start(BUCKET)
    second = trained(tmp_path / "runs", 8, resume="alpha", **how)
    assert second.folder.root == first.folder.root and second.resumed is not None
    copy = Remote(f"{url}/alpha")
    wait_for(lambda: copy.manifests().keys() >= manifests_of(second.folder), "the next run catches up")
    assert left & copy.manifests().keys()
    outbox = second.folder.checkpoints / "outbox"
    wait_for(lambda: not list(outbox.rglob("*.json")), "and nothing waits any more")
    wait_for(lambda: mirror_events(second.folder)[-1:] == ["all_copied"], "its mirror ends")
    assert differences(state_of(second), state_of(whole)) == []


def test_a_remote_that_is_down_at_the_start_is_said_in_a_log_event(
    tmp_path: Path, server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    run = observe(
        nn.Linear(2, 1), run="alpha", output_dir=tmp_path, disable_monitoring=True,
        checkpoint_remote=f"s3://{BUCKET}/mine",
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "obsinfra.training"):
        wait_for(
            lambda: "checkpoint_remote_failing" in caplog.text and f"s3://{BUCKET}/mine/alpha" in caplog.text,
            "before anything was committed",
        )
        server.start(BUCKET)
        wait_for(lambda: "checkpoint_remote_recovered" in caplog.text, "and that it is back")
    run.finish()
    wait_for(lambda: mirror_events(run.folder)[-1:] == ["all_copied"], "the mirror ends")


def test_several_runs_share_a_remote_and_the_run_of_that_name_goes_on(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copies"
    for name, until in (("alpha", 3), ("beta", 6)):
        run = trained(tmp_path / "lost", until, run=name, checkpoint_remote=url)
        wait_for(lambda run=run: "all_copied" in mirror_events(run.folder), "it is copied")
    shutil.rmtree(tmp_path / "lost")
    back = trained(tmp_path / "empty", 8, resume=url, run="alpha", checkpoint_remote=url)
    assert back.resumed is not None and back.resumed.info.step == 3
    wait_for(lambda: "all_copied" in mirror_events(back.folder), "it is copied to the same place")
    assert max(Remote(f"{url}/alpha").manifests()).startswith("000000000008")


REFUSED = [
    ("bucket/folder", ["'bucket/folder' is no URL", "expected s3://bucket/folder"]),
    ("nonsense://x/y", ["nonsense"]),
    ("abfs://x/y", ["abfs:// cannot be used here", "fix: install"]),
    ("s3://", ["names no bucket", "expected s3://bucket/folder"]),
    ("s3:///folder", ["names no bucket"]),
    ("file://relative/folder", ["file:///an/absolute/folder"]),
    ("https://bucket.s3.amazonaws.com/x", ["cannot be written to", "s3://bucket/folder"]),
    ("memory://x", ["ends with its process"]),
    ("s3://AKIA:hidden@bucket/x", ["holds a user, password", "fix: give credentials in the environment"]),
    ("s3://bucket/x?secret=hidden", ["holds a user, password"]),
    ("AKIA:hidden@bucket", ["is no URL"]),
    ("s3://[hidden/x", ["malformed s3:// URL"]),
]


@pytest.mark.parametrize(("url", "said"), REFUSED, ids=[url for url, _ in REFUSED])
def test_a_url_that_cannot_work_is_one_line_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
    said: list[str],
) -> None:
    """And what may be a secret in it is not shown."""
    arguments = ["train", "--model-name=digits", "--max-steps=1", f"--checkpoint-remote={url}"]
    monkeypatch.setattr(sys, "argv", ["obsinfra", *arguments, f"--output-dir={tmp_path / 'runs'}"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and len(error.splitlines()) == 1
    assert all(words in error for words in said) and "hidden" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(Exception, match=r"fix: pip install 'obsinfra\[s3\]'") as raised:
        observe(nn.Linear(2, 1), output_dir=tmp_path, checkpoint_remote="s3://bucket/x")
    assert getattr(raised.value, "exit_code", None) == 2 and list(tmp_path.iterdir()) == []


def test_a_resumed_run_whose_own_settings_name_an_impossible_remote_is_refused(tmp_path: Path) -> None:
    """It was started where another package was there."""
    first = trained(tmp_path, 3, run="alpha")
    with first.folder.config_toml.open("a") as file:
        file.write('checkpoint_remote = "abfs://x/y"\n')
    done = train(tmp_path, "--resume=alpha")
    assert done.returncode == 2 and "abfs:// cannot be used here" in done.stderr
    assert first.folder.read_info().restarts == 0


def train(output: Path, *flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`obsinfra train` of the digits, as a process."""
    common = ["--model-name=digits", "--metrics-port=0", "--threads=1", f"--output-dir={output}"]
    return subprocess.run(
        [sys.executable, "-m", "obsinfra.cli.main", "train", *common, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_trainer_mirrors_by_one_variable_and_resumes_from_there(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/copies"
    env = {"CHECKPOINT_REMOTE": url}
    done = train(tmp_path / "runs", "--run=alpha", "--max-steps=20", env=env)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "runs" / "alpha")
    wait_for(lambda: "all_copied" in mirror_events(folder), "the mirror outlives the trainer's end")
    assert f'checkpoint_remote = "{url}"' in folder.config_toml.read_text()
    shutil.rmtree(tmp_path / "runs")
    again = train(tmp_path / "runs", "--run=alpha", f"--resume={url}", "--max-steps=30", env=env)
    assert again.returncode == 0, again.stderr
    assert "(step 20)" in again.stderr and "step 30" in again.stderr
    wait_for(lambda: "all_copied" in mirror_events(folder), "copied again")
    assert max(Remote(f"{url}/alpha").manifests()).startswith("000000000030")
