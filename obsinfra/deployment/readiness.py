"""Whether a program of the native stack answers. Asked by the supervisor and by who waits for the stack."""

from __future__ import annotations

import http.client

from obsinfra.deployment.stack_state import Program


def answers(program: Program, *, seconds: float = 2.0) -> bool:
    """Whether something on the program's address says that it is ready, within `seconds`."""
    # http.client, because a proxy set in the environment must not be asked for this machine's own ports.
    connection = http.client.HTTPConnection(program.url.removeprefix("http://"), timeout=seconds)
    try:
        connection.request("GET", program.ready_path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
