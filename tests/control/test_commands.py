"""The codec of commands and acks: nothing that comes through a door raises anything but what is promised."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trainer_double import command, line

from obsinfra.catalog.actions import ACTIONS, Action, Argument
from obsinfra.control.command import (
    ACK_STATES,
    MAX_COMMAND_BYTES,
    MAX_LIFETIME_SECONDS,
    MAX_TEXT,
    Ack,
    Command,
    RefusedError,
    bounded,
    parse_ack,
    parse_command,
)
from obsinfra.errors import CommandError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
text = st.text(st.characters(codec="utf-8"), max_size=60)
ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,149}", fullmatch=True)


def fitting(argument: Argument) -> st.SearchStrategy[Any]:
    """Every value the table allows."""
    least, most = argument.minimum, argument.maximum
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "bool": st.booleans(),
        "str": text,
        "choice": st.sampled_from(argument.choices or ("",)),
        "int": st.integers(None if least is None else int(least), None if most is None else int(most)),
        "float": st.floats(least, most, allow_nan=False, allow_infinity=False),
    }
    return kinds[argument.kind] if argument.required else st.none() | kinds[argument.kind]


@st.composite
def commands(draw: st.DrawFn) -> Command:
    action = draw(st.sampled_from(sorted(ACTIONS)))
    args = {
        argument.name: draw(fitting(argument))
        for argument in ACTIONS[action].arguments
        if argument.required or draw(st.booleans())
    }
    now = time.time()
    return Command(
        id=draw(ids),
        run="r1",
        action=action,
        args=args,
        reason=draw(text),
        source=draw(text.filter(bool)),
        issued_at=now - draw(st.floats(0, 1000)),
        expires_at=now + draw(st.floats(1000, 2000)),
        traceparent=draw(st.none() | st.just(f"00-{'ab' * 16}-{'cd' * 8}-01")),
    )


def parse(raw: bytes) -> Command:
    return parse_command(raw, run="r1", now=time.time())


def refusal(**changes: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(line(command(), **changes))
    return caught.value


@given(st.binary(max_size=200))
def test_any_bytes_are_no_command_or_refused(raw: bytes) -> None:
    with pytest.raises(CommandError):
        parse(raw)
    with pytest.raises(CommandError):
        parse_ack(raw)


@given(json_values)
def test_any_json_is_no_command_or_refused(document: Any) -> None:
    with pytest.raises(CommandError):
        parse(json.dumps(document).encode())


@given(st.dictionaries(st.sampled_from([*Command.__dataclass_fields__, "more"]), json_values))
def test_a_command_with_any_values_in_its_fields_raises_only_what_is_promised(fields: dict[str, Any]) -> None:
    try:
        parsed = parse(line(command(), **fields))
    except CommandError as error:
        assert 0 < len(str(error)) < 1_000
    else:
        assert parsed.action in ACTIONS and parse(parsed.to_json().encode()) == parsed


@given(st.dictionaries(st.sampled_from([*Ack.__dataclass_fields__, "more"]), json_values))
def test_an_ack_with_any_values_in_its_fields_raises_only_what_is_promised(fields: dict[str, Any]) -> None:
    raw = json.dumps({**asdict(Ack("a", "done")), **fields}).encode()
    try:
        assert parse_ack(raw).state in ACK_STATES
    except CommandError as error:
        assert 0 < len(str(error)) < 1_000


@given(commands())
def test_a_valid_command_comes_back_as_it_went(sent: Command) -> None:
    assert parse(sent.to_json().encode()) == sent


@given(
    st.builds(
        Ack, ids, st.sampled_from(ACK_STATES), st.integers(0, 64), st.none() | st.integers(), error=text
    )
)
def test_an_ack_comes_back_as_it_went(sent: Ack) -> None:
    assert parse_ack(sent.to_json().encode()) == sent


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"id": "a", "reason": NaN}',
        b'{"id": "a", "issued_at": Infinity}',
        b'{"id": "a", "issued_at": 1e999}',
        b'{"id": "a", "issued_at": ' + b"9" * 5_000 + b"}",
        b'{"id": "a", "reason": "' + b"x" * (10 << 20) + b'"}',
        b"[" * 60_000,
        b'{"id":' * 10_000,
    ],
    ids=lambda raw: f"{raw[:24]!r}x{len(raw)}",
)
def test_what_is_no_command_is_not_answered_by_name(raw: bytes) -> None:
    with pytest.raises(CommandError) as caught:
        parse(raw)
    assert not isinstance(caught.value, RefusedError)


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_half_a_surrogate_pair_does_not_get_in(text: str) -> None:
    """It could not be written to run.json: a stop with it as a reason would end in an exception."""
    for field in ({"reason": text}, {"args": {"grace_seconds": text}}, {"source": text}):
        with pytest.raises(CommandError, match="surrogates not allowed"):
            parse(line(command("stop"), **field))


@pytest.mark.parametrize("template", ['{"id": %s}', '{"id":"a","version":%s}', '{"id":"a","args":%s}'])
def test_nesting_of_any_depth_is_refused_without_exhausting_the_stack(template: str) -> None:
    for depth in range(1, 1_100):
        with pytest.raises(CommandError):
            parse((template % ("[" * depth + "]" * depth)).encode())


@pytest.mark.parametrize(
    "id",
    ["", "a/b", "../x", "..", ".hidden", "a\0b", "-", "ä", "a" * 151, "a\n", "a b", 5, None, ["a"], True],
)
def test_an_id_that_is_no_file_name_is_no_command(id: Any) -> None:
    with pytest.raises(CommandError, match="expected 1 to 150 letters") as caught:
        parse(line(command(), id=id))
    assert not isinstance(caught.value, RefusedError)


def test_a_refusal_says_what_would_have_been_accepted() -> None:
    unknown = refusal(action="explode")
    assert unknown.state == "rejected" and "'explode'" in str(unknown)
    assert all(name in str(unknown) for name in ACTIONS)
    assert "expected 'r1'" in str(refusal(run="r2"))
    assert "expected 1" in str(refusal(version=2))
    assert "unknown argument 'depth'" in str(refusal(args={"depth": 1}))
    assert "expected an object" in str(refusal(args=[1]))
    assert "unknown field 'sudo'" in str(refusal(sudo=True))


@pytest.mark.parametrize("version", [True, "1", None, 2, [1], 1e300])
def test_only_version_1_is_understood(version: Any) -> None:
    assert str(refusal(version=version)).startswith("version ")


@pytest.mark.parametrize("value", [{"a": 1}, [1], "x" * (MAX_TEXT + 1), 10**2_001])
def test_an_argument_is_a_scalar_of_bounded_length(value: Any) -> None:
    assert refusal(action="stop", args={"grace_seconds": value}).state == "rejected"
    assert refusal(action="stop", args={"alert": value}).state == "rejected"


@given(st.sampled_from(sorted(ACTIONS)).map(ACTIONS.__getitem__), st.data())
def test_an_argument_is_accepted_exactly_if_the_table_allows_it(action: Action, data: st.DataObject) -> None:
    """Whatever JSON is given for it: the ack says which value, what was expected, and what to do."""
    argument = data.draw(st.sampled_from(action.arguments))
    value = data.draw(json_values | fitting(argument))
    others = {other.name: data.draw(fitting(other)) for other in action.arguments if other.required}
    try:
        raw = line(command(action.name, args={**others, argument.name: value}))
    except ValueError:
        return  # NaN and half surrogate pairs are no JSON to begin with
    kinds = {"bool": bool, "str": str, "choice": str, "int": int, "float": (int, float)}
    allowed = value is None and not argument.required
    if value is not None and isinstance(value, kinds[argument.kind]):
        allowed = isinstance(value, bool) == (argument.kind == "bool")
        if argument.kind in ("int", "float"):
            allowed = allowed and not (argument.minimum is not None and value < argument.minimum)
            allowed = allowed and not (argument.maximum is not None and value > argument.maximum)
        if argument.kind == "choice":
            allowed = value in argument.choices
    try:
        parsed = parse(raw)
    except RefusedError as error:
        assert not allowed and error.state == "rejected"
        assert argument.name in str(error) and action.name in str(error)
        assert "; expected " in str(error) and "; fix: " in str(error) and len(str(error)) < 600
    except CommandError:
        assert isinstance(value, (str, dict, list))  # text that cannot be written again
    else:
        assert allowed and parsed.args[argument.name] == value


def test_a_missing_argument_is_named_with_what_it_should_be() -> None:
    told = str(refusal(action="set_log_level", args={}))
    assert told == (
        "set_log_level without level; expected one of debug, info, warning, error; fix: add level=…"
    )


@pytest.mark.parametrize("moment", [True, "now", None, [], 10**400])
def test_moments_are_numbers(moment: Any) -> None:
    assert "seconds since the epoch" in str(refusal(issued_at=moment))
    assert "seconds since the epoch" in str(refusal(expires_at=moment))


def test_time_bounds_a_command() -> None:
    now = time.time()
    assert refusal(issued_at=now - 20, expires_at=now - 10).state == "expired"
    assert "in the future" in str(refusal(issued_at=now + 3_600, expires_at=now + 3_700))
    assert "lifetime" in str(refusal(expires_at=now + MAX_LIFETIME_SECONDS + 60))
    assert "lifetime" in str(refusal(issued_at=-1e308, expires_at=1e308))
    assert parse(line(command(), issued_at=now + 30)).issued_at == now + 30  # clocks differ a little


def test_a_command_of_the_greatest_size_is_read_and_one_byte_more_is_not() -> None:
    raw = line(command())
    assert parse(raw + b" " * (MAX_COMMAND_BYTES - len(raw))).action == "checkpoint"
    with pytest.raises(CommandError, match="expected at most 65536"):
        parse(raw + b" " * (MAX_COMMAND_BYTES - len(raw) + 1))


def test_long_texts_are_cut_and_a_malformed_trace_context_is_dropped() -> None:
    parsed = parse(line(command(), reason="x" * 5_000, traceparent="00-nonsense"))
    assert len(parsed.reason) == MAX_TEXT and parsed.traceparent is None


@pytest.mark.parametrize(
    "result", [{"x": float("nan")}, {"path": object()}, {"log": "x" * MAX_COMMAND_BYTES}, {"a": {1, 2}}]
)
def test_whatever_an_action_returned_its_ack_can_be_written_and_read(result: dict[str, Any]) -> None:
    sent = bounded(Ack("a", "failed", result=result, error="e" * 10 * MAX_COMMAND_BYTES))
    read = parse_ack(sent.to_json().encode())
    assert read == sent and read.result is not None and "unreadable" in read.result
    assert read.error == "e" * MAX_TEXT


def test_a_path_that_is_not_utf_8_survives_in_an_ack() -> None:
    sent = bounded(Ack("a", "done", result={"path": "runs/\udcff/m.json"}))
    assert parse_ack(sent.to_json().encode()) == sent
