"""Schemathesis against the sidecar's own OpenAPI: it answers any request, sound or not, as it says there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from sidecar_face import Face
from sidecar_tools import TOKEN
from trainer_double import run_folder, trainer
from waiting import wait_for

FEW, MANY = 15, 650
"""Cases for each route and mode: in every run, and in the long one, which is 10,000 together."""

ROUTES = 12
ANSWER_SECONDS = 300
"""The client's patience: server, trainer and Hypothesis share this process and perhaps a busy machine."""

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
UNSAID = [positive_data_acceptance, negative_data_rejection]
"""Whether a sound request succeeds also depends on the run, which need not exist, or live. And one may break
the description and be fine: the token is sent with each, and what is wrong with a query may be gone from its
URL (an empty list). That wrong parameters are refused is tested in test_sidecar_api.py."""


@contextlib.contextmanager
def served(face: Face) -> Iterator[str]:
    """The face behind a real server of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(face.app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started, "serving")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
        listener.close()


def fuzz(tmp_path: Path, examples: int) -> int:
    """So many cases, sound ones and mutated ones, for each route; their number."""
    load_all_checks()
    ran = 0
    with trainer(run_folder(tmp_path)):
        face = Face(tmp_path, webhooks_per_second=1e9, requests_per_second=1e9)
        try:
            with served(face) as url, requests.Session() as session:
                session.trust_env = False
                schema = schemathesis.openapi.from_dict(face.app.openapi())
                operations = [found.ok() for found in schema.get_all_operations()]
                assert len(operations) == ROUTES + 1  # commands are given and asked for
                for operation in operations:
                    modes = [GenerationMode.POSITIVE]
                    if any(operation.iter_parameters()) or operation.body:
                        modes.append(GenerationMode.NEGATIVE)
                    for mode in modes:

                        @settings(
                            max_examples=examples,
                            deadline=None,
                            database=None,
                            suppress_health_check=list(HealthCheck),
                            phases=(Phase.generate, Phase.shrink),
                        )
                        @given(case=operation.as_strategy(generation_mode=mode))
                        def check(case: Case) -> None:
                            nonlocal ran
                            ran += 1
                            case.call_and_validate(
                                base_url=url,
                                session=session,
                                headers=HEADERS,
                                timeout=ANSWER_SECONDS,
                                excluded_checks=UNSAID,
                            )

                        check()
                assert session.get(f"{url}/healthz").json()["ok"] is True
        finally:
            face.sidecar.stop()
    return ran


def test_a_few_hundred_cases_are_answered_as_the_description_says(tmp_path: Path) -> None:
    assert fuzz(tmp_path, FEW) >= 200


@pytest.mark.slow
@pytest.mark.skipif(
    "OBSINFRA_LONG_TESTS" not in os.environ, reason="takes ten minutes: set OBSINFRA_LONG_TESTS=1"
)
@pytest.mark.timeout(3_600)
def test_ten_thousand_cases_are_answered_as_the_description_says(tmp_path: Path) -> None:
    assert fuzz(tmp_path, MANY) >= 10_000
