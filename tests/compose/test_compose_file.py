"""docker-compose.yml and what it mounts: published on loopback alone, confined, without secrets."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from obsinfra.catalog.policy import DEFAULT_POLICY
from obsinfra.control.sidecar import read_policy
from obsinfra.deployment.ports import DEFAULT_COMPOSE_PORTS
from obsinfra.deployment.stack_configuration import SERVICES

TOP = Path(__file__).parents[2]
DOCUMENT: dict[str, Any] = yaml.safe_load((TOP / "docker-compose.yml").read_text())
SERVICE: dict[str, dict[str, Any]] = DOCUMENT["services"]
AS_ROOT = {"dcgm-exporter"}
"""Reads the driver's counters; the file says so."""

WITHOUT_A_PROBE = {"otel-collector", "log-collector", "loki"}
"""Images that hold one program alone, which cannot ask itself; the file says so."""

each_service = pytest.mark.parametrize("name", SERVICE)


def defaults(text: str) -> str:
    """The text with each `${NAME:-default}` replaced by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_every_part_of_the_stack_is_there() -> None:
    assert set(SERVICE) == {
        *("prometheus", "alertmanager", "grafana", "otel-collector", "jaeger", "node-exporter", "sidecar"),
        *("mailpit", "loki", "log-collector", "dcgm-exporter", "trainer", "trainer-gpu"),
    }
    profiles = {name: part["profiles"] for name, part in SERVICE.items() if "profiles" in part}
    assert profiles == {
        "mailpit": ["dev"],
        "loki": ["logs"],
        "log-collector": ["logs"],
        "dcgm-exporter": ["gpu"],
        "trainer": ["train"],
        "trainer-gpu": ["train-gpu"],
    }


@each_service
def test_a_service_is_confined(name: str) -> None:
    """Read-only, no capabilities, not root, with limits, restarted, its log bounded, its image pinned."""
    part = SERVICE[name]
    assert part["read_only"] is True
    assert part["cap_drop"] == ["ALL"]
    assert part["security_opt"] == ["no-new-privileges:true"]
    assert part["restart"] in ("unless-stopped", "on-failure:3")
    assert part["logging"]["options"]["max-size"]
    assert "privileged" not in part and "network_mode" not in part and "devices" not in part
    assert "/var/run/docker.sock" not in str(part)
    uid = defaults(str(part["user"])).split(":")[0]
    assert (uid == "0") == (name in AS_ROOT)
    assert part.get("cap_add", []) == (["SYS_ADMIN"] if name in AS_ROOT else [])
    assert set(part["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    tag = defaults(part["image"]).rpartition(":")[2]
    assert re.search(r"\d+\.\d+", tag), f"{part['image']} is not pinned"


@each_service
def test_a_port_is_published_on_loopback_alone_and_known_to_ports_py(name: str) -> None:
    known = asdict(DEFAULT_COMPOSE_PORTS)
    for published in SERVICE[name].get("ports", ()):
        found = re.fullmatch(r"127\.0\.0\.1:\$\{OBSINFRA_PORT_([A-Z]+):-(\d+)\}:(\d+)", published)
        assert found is not None, published
        assert known[found[1].lower()] == int(found[2]) == int(found[3])


def test_every_port_of_ports_py_is_published_once() -> None:
    published = [port for part in SERVICE.values() for port in part.get("ports", ())]
    assert len(published) == len(asdict(DEFAULT_COMPOSE_PORTS))


@each_service
def test_a_service_says_when_it_is_well_and_waits_for_what_it_needs(name: str) -> None:
    part = SERVICE[name]
    assert ("healthcheck" in part) == (name not in WITHOUT_A_PROBE)
    for other, needed in part.get("depends_on", {}).items():
        expected = "service_healthy" if "healthcheck" in SERVICE[other] else "service_started"
        assert needed == {"condition": expected}, other
        assert SERVICE[other].get("profiles", part.get("profiles")) == part.get("profiles"), other


def test_no_secret_stands_in_the_tree() -> None:
    """Secrets are files that git ignores; whatever looks like one in an environment names a file."""
    for name, secret in DOCUMENT["secrets"].items():
        assert set(secret) == {"file"}, name
        ignored = subprocess.run(
            ["git", "check-ignore", "-q", defaults(secret["file"])], cwd=TOP, check=False, timeout=30
        )
        assert ignored.returncode == 0, secret
    for part in SERVICE.values():
        for variable, value in part.get("environment", {}).items():
            assert not re.search("PASSWORD|TOKEN|SECRET|KEY", variable) or variable.endswith("__FILE"), value
    assert not re.search(r"(?i)(password|token|secret|key)\w*\s*=\s*\S", (TOP / ".env.example").read_text())


def test_the_example_environment_names_only_variables_of_the_file_with_their_defaults() -> None:
    said = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (TOP / "docker-compose.yml").read_text()))
    lines = (TOP / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert example == {name: said[name] for name in example}


def test_what_is_mounted_from_the_tree_is_in_it_and_read_only() -> None:
    ours = ("./prometheus", "./alertmanager", "./deploy/compose")
    for name, part in SERVICE.items():
        for volume in part.get("volumes", ()):
            source, _, rest = defaults(volume).partition(":")
            if source.startswith(ours) and Path(source).name != "notify":
                assert (TOP / source).exists(), f"{name} mounts {source}"
            if source.startswith("./") and source != "./runs":
                assert rest.endswith(":ro"), f"{name} may write {source}"


def test_volumes_are_named_and_what_is_kept_is_bounded() -> None:
    mounted = {volume.split(":")[0] for part in SERVICE.values() for volume in part.get("volumes", ())}
    assert set(DOCUMENT["volumes"]) <= mounted
    prometheus = " ".join(SERVICE["prometheus"]["command"])
    assert "--storage.tsdb.retention.time=" in prometheus and "--storage.tsdb.retention.size=" in prometheus
    assert any("--data.retention" in word for word in SERVICE["alertmanager"]["command"])
    loki = read("deploy/compose/loki.yml")
    assert loki["limits_config"]["retention_period"] and loki["compactor"]["retention_enabled"]
    jaeger = read("deploy/compose/jaeger.yml")
    assert jaeger["extensions"]["jaeger_storage"]["backends"]["on_disk"]["badger"]["ttl"]["spans"]


def read(path: str) -> Any:
    return yaml.safe_load((TOP / path).read_text())


@pytest.mark.parametrize("path", ["otel-collector.yml", "otel-logs.yml", "jaeger.yml"])
def test_a_collectors_pipelines_use_what_is_declared_and_all_of_it(path: str) -> None:
    """The three programs share one form; what a pipeline names must exist, what exists must be used."""
    document = read(f"deploy/compose/{path}")
    service = document["service"]
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in service["pipelines"].values() for name in pipeline[kind]}
        assert used == set(document[kind]), kind
    assert set(service.get("extensions", ())) == set(document.get("extensions", ()))


def test_spans_go_from_the_trainer_through_the_collector_to_the_store() -> None:
    """Each sends to where the next one listens."""
    collector, jaeger = read("deploy/compose/otel-collector.yml"), read("deploy/compose/jaeger.yml")
    trainer = SERVICE["trainer"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    listens = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert trainer == listens.replace("0.0.0.0", "http://otel-collector")
    sends = collector["exporters"]["otlp/jaeger"]
    assert sends["endpoint"] == jaeger["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].replace(
        "0.0.0.0", "jaeger"
    )
    # A store that is away must not fill the collector's memory, nor stop what it receives for good.
    assert sends["sending_queue"]["queue_size"] and sends["retry_on_failure"]["max_elapsed_time"]
    assert collector["service"]["pipelines"]["traces"]["processors"][0] == "memory_limiter"
    stored = jaeger["exporters"]["jaeger_storage_exporter"]["trace_storage"]
    assert stored in jaeger["extensions"]["jaeger_storage"]["backends"]
    assert jaeger["extensions"]["jaeger_query"]["storage"]["traces"] == stored
    assert jaeger["extensions"]["healthcheckv2"]["http"]["endpoint"].endswith(":13133")
    assert ":13133/" in str(SERVICE["jaeger"]["healthcheck"])


def test_prometheus_scrapes_what_the_file_starts() -> None:
    prometheus = read("prometheus/prometheus.yml")
    [discovery] = [job for job in prometheus["scrape_configs"] if job["job_name"] == "trainers"]
    assert SERVICES["sidecar"] in discovery["http_sd_configs"][0]["url"]
    targets = [
        target
        for path in (TOP / "deploy/compose/targets").glob("*.yml")
        for group in yaml.safe_load(path.read_text())
        for target in group["targets"]
    ]
    assert {target.split(":")[0] for target in targets} <= set(SERVICE)
    names = [
        pattern
        for job in prometheus["scrape_configs"]
        for files in job.get("file_sd_configs", ())
        for pattern in files["files"]
        if pattern.startswith("/etc/obsinfra/targets/")
    ]
    mounted = [volume for volume in SERVICE["prometheus"]["volumes"] if "/etc/obsinfra/targets:ro" in volume]
    assert len(names) == 2 and len(mounted) == 1


def test_the_sidecars_policy_by_hand_is_the_default_one() -> None:
    assert read_policy(TOP / "deploy/compose/policy.toml") == DEFAULT_POLICY


def test_the_images_end_as_a_user_without_rights() -> None:
    """Both final stages; neither has a compiler, an index or a secret in its layers."""
    text = (TOP / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    final = {stage.split()[2]: stage for stage in stages if stage.split()[2] in ("sidecar", "trainer")}
    assert set(final) == {"sidecar", "trainer"}
    for stage in final.values():
        assert "USER 10001:10001" in stage and "RUN" not in stage and "ENTRYPOINT" in stage
    targets = {part["build"]["target"] for part in SERVICE.values() if "build" in part}
    assert targets == set(final)


def test_the_builds_context_is_a_list_of_what_may_enter_it() -> None:
    lines = (TOP / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and "**/secrets" in rules
    assert "!runs" not in rules and "!.env" not in rules and "!.git" not in rules
