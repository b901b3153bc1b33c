"""The metrics server as scrapers, browsers, strangers and forked workers meet it."""

from __future__ import annotations

import errno
import http.client
import logging
import math
import os
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from torch.utils.data import DataLoader, Dataset
from waiting import wait_for

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring import exporter, machine
from obsinfra.monitoring.exporter import MetricsServer
from obsinfra.monitoring.exposition import SampleCollector
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.training_monitor import TrainingMonitor

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def fetch(url: str, accept: str = "*/*") -> tuple[str, str]:
    """Body and content type of a successful GET."""
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read().decode(), response.headers["Content-Type"]


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def bind_without_reuse(port: int) -> socket.socket | None:
    """Listen on `port` as a stranger would; None while somebody holds it."""
    stranger = socket.socket()
    try:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
    except OSError as error:
        stranger.close()
        assert error.errno == errno.EADDRINUSE
        return None
    return stranger


class Served:
    """A server over samples that a test can change while it runs."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, labels: dict[str, str] | None = None) -> None:
        self.samples: list[Sample] = []
        self.errors: list[Exception] = []
        self.asked: list[int] = []
        self.failure: Exception | None = None
        collector = SampleCollector({"run": "r"} if labels is None else labels, self._samples, list)
        self.server = MetricsServer(collector, self._live, host=host, port=port, on_error=self.errors.append)
        self.url = self.server.url

    def _samples(self) -> list[Sample]:
        if self.failure is not None:
            raise self.failure
        return self.samples

    def _live(self, since: int) -> dict[str, Any]:
        self.asked.append(since)
        return {"since": since}


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.stop()


# ---- what it says --------------------------------------------------------------------------------


def test_text_and_openmetrics_are_chosen_by_the_scraper(served: Served) -> None:
    served.samples = [Sample(catalog.STEPS, {}, 7.0), Sample(catalog.TRAIN_LOSS, {}, math.nan)]
    plain, plain_type = fetch(f"{served.url}/metrics")
    modern, modern_type = fetch(f"{served.url}/metrics", OPENMETRICS)
    assert plain_type.startswith("text/plain")
    assert modern_type.startswith("application/openmetrics-text")
    assert modern.endswith("# EOF\n")
    assert 'obsinfra_steps_total{run="r"} 7.0' in plain
    values = {sample.name: sample.value for family in parse_openmetrics(modern) for sample in family.samples}
    assert values["obsinfra_steps_total"] == 7
    assert math.isnan(values["obsinfra_train_loss"])


@pytest.mark.parametrize("value", ['say "hi"', "two\nlines", "back\\slash", "\\n", 'all \\"\n\\\\'])
def test_label_values_with_quotes_newlines_and_backslashes_survive_a_live_scrape(value: str) -> None:
    served = Served(labels={"run": value})
    try:
        served.samples = [Sample(catalog.VALIDATION_METRIC, {"metric": value}, 1.0)]
        for accept, parse in (("*/*", parse_text), (OPENMETRICS, parse_openmetrics)):
            (family,) = parse(fetch(f"{served.url}/metrics", accept)[0])
            assert family.samples[0].labels == {"run": value, "metric": value}
    finally:
        served.server.stop()


def test_unknown_paths_are_404_and_say_what_there_is(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{served.url}/nothing")
    assert refused.value.code == 404
    assert b"/metrics" in refused.value.read()
    assert status_of(f"{served.url}/../exporter.py") == 404
    assert status_of(f"{served.url}/healthz") == 200
    assert status_of(f"{served.url}/") == 200


def test_the_live_document_is_asked_for_with_a_number_or_from_the_start(served: Served) -> None:
    for text in ("7", "", "-3", "x", "%C2%B2", "%D9%A1", "1e3", "9" * 40, "5&since=6"):
        assert status_of(f"{served.url}/api/live?since={text}") == 200
    assert status_of(f"{served.url}/api/live") == 200
    assert served.asked == [7, 0, 0, 0, 0, 0, 0, 0, 5, 0]
    assert served.errors == []


def test_a_scrape_that_fails_is_told_and_reported_and_the_next_one_works(served: Served) -> None:
    served.failure = RuntimeError("no samples today")
    assert status_of(f"{served.url}/metrics") == 500
    assert served.errors == [served.failure]
    served.failure = None
    assert status_of(f"{served.url}/metrics") == 200


# ---- where it listens ----------------------------------------------------------------------------


def test_it_listens_on_the_loopback_address_only() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    with monitor:
        assert monitor.url is not None
        port = urlsplit(monitor.url).port
        assert urlsplit(monitor.url).hostname == "127.0.0.1"
        # Another loopback address of the same machine is already too far away.
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex(("127.0.0.2", port or 0)) == errno.ECONNREFUSED


def test_a_taken_port_gives_way_to_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = Served(port=port)
        try:
            assert port < served.server.port <= port + 200
            assert status_of(f"{served.url}/healthz") == 200
        finally:
            served.server.stop()


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("192.0.2.1", 0),
        ("no-such-host.invalid", 0),
        ("a" * 70 + ".example", 0),
        ("", -1),
        ("127.0.0.1", 99_999),
    ],
)
def test_an_impossible_address_is_the_users_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"metrics-port|listen on"):
        Served(host=host, port=port)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    try:
        served = Served(host="::1")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    try:
        assert served.url == f"http://[::1]:{served.server.port}"
        assert status_of(f"{served.url}/healthz") == 200
    finally:
        served.server.stop()


# ---- strangers -----------------------------------------------------------------------------------

GARBAGE = [
    b"",
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
    b"GET\r\n\r\n",
    b"GET /metrics HTTP/9.9\r\n\r\n",
    b"GET http://[broken/metrics HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"GET /metrics HTTP/1.1\r\nAccept: " + b"\xff,;=,q=" * 50 + b"\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999\r\n\r\nx",
    b"GET /%00%ff/..%2f HTTP/1.1\r\n\r\n",
    b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n",
]


def send(port: int, garbage: bytes) -> bytes:
    """Send and hang up; what was answered until then."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
        try:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while part := stranger.recv(65_536):
                answer += part
        except (BrokenPipeError, ConnectionResetError):
            pass
    return answer


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:24]))
def test_garbage_neither_kills_it_nor_counts_as_its_own_failure(served: Served, garbage: bytes) -> None:
    send(served.server.port, garbage)
    assert status_of(f"{served.url}/healthz") == 200
    assert served.errors == []


def test_an_address_that_is_none_is_a_bad_request(served: Served) -> None:
    answer = send(served.server.port, b"GET http://[broken/metrics HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(garbage=st.binary(max_size=200))
def test_random_bytes_do_no_harm(served: Served, garbage: bytes) -> None:
    send(served.server.port, garbage)
    assert status_of(f"{served.url}/healthz") == 200
    assert served.errors == []


def test_a_scraper_that_hangs_up_early_is_no_failure(served: Served) -> None:
    served.samples = [Sample(catalog.VALIDATION_METRIC, {"metric": f"m{i}"}, 1.0) for i in range(20_000)]
    with socket.create_connection(("127.0.0.1", served.server.port)) as hasty:
        hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        hasty.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        hasty.recv(10)
    assert status_of(f"{served.url}/healthz") == 200
    assert served.errors == []


# ---- stopping ------------------------------------------------------------------------------------


def own_threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("obsinfra") or "process_request" in thread.name
    }


def test_a_connection_on_which_nothing_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SILENT_SECONDS", 1)
    served = Served()
    try:
        address = urlsplit(served.url)
        silent = socket.create_connection((address.hostname, address.port), timeout=60)
        halted = socket.create_connection((address.hostname, address.port), timeout=60)
        halted.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        for connection in (silent, halted):
            assert connection.recv(1) == b""
            connection.close()
        assert served.errors == []
    finally:
        served.server.stop()


def test_an_answer_is_one_write(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system call may cost a scrape 5 ms beside a busy loop, which then has the interpreter's lock."""
    written: list[int] = []
    write = socket.SocketIO.write

    def counted(self: socket.SocketIO, data: Any) -> int | None:
        written.append(len(data))
        return write(self, data)

    monkeypatch.setattr(socket.SocketIO, "write", counted)
    served.samples = [Sample(catalog.VALIDATION_METRIC, {"metric": f"{n}"}, float(n)) for n in range(500)]
    text, _ = fetch(f"{served.url}/metrics")
    assert len(written) == 1 and written[0] > len(text) > 8_192, written


def test_an_answer_larger_than_one_write_arrives_whole(served: Served) -> None:
    served.samples = [
        Sample(catalog.VALIDATION_METRIC, {"metric": f"{number}" + "x" * 1_000}, float(number))
        for number in range(2 * exporter.WHOLE_ANSWER_BYTES // 1_000)
    ]
    (family,) = parse_text(fetch(f"{served.url}/metrics")[0])
    assert [sample.value for sample in family.samples] == list(map(float, range(len(served.samples))))


def test_stopping_ends_threads_and_idle_connections_and_frees_the_port() -> None:
    """A scraper keeps its connection open between scrapes: it must see the end, not yesterday's values."""
    before = own_threads()
    monitor = TrainingMonitor("m", metrics_port=0)
    monitor.start_monitoring()
    assert monitor.url is not None
    port = urlsplit(monitor.url).port or 0
    scraper = http.client.HTTPConnection("127.0.0.1", port, timeout=15)  # less than the server waits
    scraper.request("GET", "/metrics")
    assert scraper.getresponse().read()
    assert scraper.sock is not None
    assert {thread.name for thread in own_threads() - before} >= {"obsinfra-metrics", "obsinfra-monitor"}
    assert bind_without_reuse(port) is None

    monitor.stop_monitoring()
    assert scraper.sock.recv(1) == b""
    scraper.close()
    wait_for(lambda: own_threads() <= before, "all threads to end")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
    monitor.stop_monitoring()  # once more does nothing


def test_monitoring_can_start_again_after_it_stopped() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    for _ in range(2):
        monitor.start_monitoring()
        monitor.start_monitoring()  # already running
        assert status_of(f"{monitor.url}/healthz") == 200
        monitor.stop_monitoring()


class SocketsOfWorker(Dataset[Any]):
    """Each item tells the inodes of the sockets that the loading process holds."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return os.getpid(), sorted(socket_inodes())


def socket_inodes() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to see a worker's sockets")
def test_forked_loader_workers_hold_neither_the_port_nor_connections() -> None:
    monitor = TrainingMonitor("m", metrics_port=0)
    monitor.start_monitoring()
    assert monitor.url is not None
    port = urlsplit(monitor.url).port or 0
    scraper = http.client.HTTPConnection("127.0.0.1", port, timeout=15)  # less than the server waits
    scraper.request("GET", "/metrics")
    scraper.getresponse().read()
    assert scraper.sock is not None
    own = {os.fstat(scraper.sock.fileno()).st_ino}
    servers_own = socket_inodes() - own

    loader = DataLoader(
        SocketsOfWorker(),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    iterator = iter(loader)
    workers = dict([next(iterator) for _ in range(8)])
    assert len(workers) == 2
    assert os.getpid() not in workers
    listening, accepted = inodes_of_port(port)
    assert listening <= servers_own
    assert accepted
    for pid, held in workers.items():
        assert not (listening | accepted) & set(held), f"worker {pid} holds the server's sockets"

    monitor.stop_monitoring()
    assert scraper.sock.recv(1) == b""  # a worker with a copy would keep the connection open
    scraper.close()
    assert all(os.path.isdir(f"/proc/{pid}") for pid in workers)
    second = Served(port=port)
    assert second.server.port == port
    second.server.stop()


def inodes_of_port(port: int) -> tuple[set[int], set[int]]:
    """Inodes of the sockets that listen on a loopback port, and of the connections accepted there."""
    listening, accepted = set(), set()
    with open("/proc/net/tcp") as table:
        for row in list(table)[1:]:
            fields = row.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                (listening if fields[3] == "0A" else accepted).add(int(fields[9]))
    return listening, accepted


def test_a_child_program_does_not_hold_the_port() -> None:
    served = Served()
    port = served.server.port
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        served.server.stop()
        stranger = bind_without_reuse(port)
        assert stranger is not None
        stranger.close()
        assert child.poll() is None


# ---- failures of the telemetry itself ------------------------------------------------------------


class FailingSampler:
    """A host sampler whose reading raises each time."""

    def __init__(self) -> None:
        self.calls = 0

    def sample(self) -> list[Sample]:
        self.calls += 1
        raise RuntimeError("the sensor fell off")


def test_a_failing_sampler_is_counted_logged_once_and_training_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = FailingSampler()
    monkeypatch.setattr(machine, "HostSampler", lambda disk_path: sampler)
    monitor = TrainingMonitor("m", metrics_port=0, sample_seconds=0.01)
    with caplog.at_level(logging.ERROR), monitor:
        wait_for(lambda: sampler.calls >= 3, "three failed readings")
        with monitor.step():
            monitor.record(loss=torch.tensor(1.0), samples=4)
        wait_for(lambda: monitor.history.since(0)["series"]["step"][-1:] == [1], "history of the step")
        body, _ = fetch(f"{monitor.url}/metrics")
    failures = [
        sample
        for family in parse_text(body)
        for sample in family.samples
        if sample.name == "obsinfra_telemetry_errors_total" and sample.labels["component"] == "samplers"
    ]
    assert len(failures) == 1
    assert failures[0].value >= 3
    said = [record.getMessage() for record in caplog.records if "telemetry_failed" in record.getMessage()]
    assert len(said) == 1
    assert "the sensor fell off" in said[0]
    steps = [
        sample for family in parse_text(body) for sample in family.samples if "steps_total" in sample.name
    ]
    assert [sample.value for sample in steps] == [1]
