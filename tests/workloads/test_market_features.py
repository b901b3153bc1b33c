"""Nothing looks ahead: neither a feature, nor a training decision, nor anything training is fed."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from market_tables import bundled, cut, with_another_future

from obsinfra.errors import DataError
from obsinfra.workloads.market_data import (
    CLIP,
    FEATURES,
    MIN_BARS,
    TRAILING,
    Instrument,
    causal_features,
    split_date,
)
from obsinfra.workloads.tactical_mappo import TacticalMappo
from obsinfra.workloads.tactical_mappo.environment import WINDOW, Rules, build_market
from obsinfra.workloads.tactical_mappo.rollout import Schedule

seeds = st.integers(0, 2**32 - 1)


@given(which=st.integers(0, 1), first=st.integers(1, 5030), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_changing_future_bars_never_changes_past_features(which: int, first: int, seed: int) -> None:
    """Bit for bit, so not even rounding carries anything back."""
    instrument = bundled()[which]
    changed = causal_features(with_another_future(instrument, first, seed))
    original = causal_features(instrument)
    np.testing.assert_array_equal(changed[:first], original[:first])
    if first >= TRAILING:
        assert (changed[first] != original[first]).any(), "the change did not reach the features at all"


@given(which=st.integers(0, 1), last=st.integers(1, 5031))
@settings(max_examples=30, deadline=None)
def test_features_are_those_of_the_history_alone(which: int, last: int) -> None:
    """What a bar looked like on its day, before the following ones existed."""
    instrument = bundled()[which]
    np.testing.assert_array_equal(
        causal_features(cut(instrument, 0, last)), causal_features(instrument)[:last]
    )


def reference_features(instrument: Instrument, t: int) -> list[float]:
    """Features of bar `t`, from their definitions, in plain Python."""
    high, low, close, opening = (
        [math.log(value) for value in getattr(instrument, name)] for name in ("high", "low", "close", "open")
    )
    volume = [math.log1p(value) for value in instrument.volume]

    def log_return(i: int) -> float:
        return close[i] - close[i - 1]

    def rms(values: list[float]) -> float:
        return math.sqrt(fmean(value * value for value in values))

    def centred(i: int) -> float:
        window = volume[max(0, i - 59) : i + 1]
        return volume[i] - fmean(window)

    past = range(t - 59, t + 1)
    sigma = rms([log_return(i) for i in past])
    spread = high[t] - low[t]
    return [
        log_return(t) / sigma,
        (opening[t] - close[t - 1]) / sigma,
        spread / fmean(high[i] - low[i] for i in past) - 1,
        2 * (close[t] - (high[t] + low[t]) / 2) / spread,
        (close[t] - close[t - 20]) / (sigma * math.sqrt(20)),
        math.log(rms([log_return(i) for i in range(t - 19, t + 1)]) / sigma),
        centred(t) / rms([centred(i) for i in past]),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_features_are_what_their_description_says(which: int) -> None:
    instrument = bundled()[which]
    found = causal_features(instrument)
    assert found.shape == (len(instrument), len(FEATURES)) and found.dtype == np.float32
    for t in (200, 1234, 2500, 4000, 5030):
        expected = np.clip(reference_features(instrument, t), -CLIP, CLIP)
        np.testing.assert_allclose(found[t], expected, rtol=1e-4, atol=1e-5)


def test_features_are_bounded_and_absent_where_there_is_too_little_past() -> None:
    for instrument in bundled():
        found = causal_features(instrument)
        assert (found[:TRAILING] == 0).all() and np.abs(found).max() <= CLIP
        assert np.abs(found[TRAILING:].mean(0)).max() < 1 and found[TRAILING:].std(0).min() > 0.1


def test_a_market_that_stands_still_has_finite_features() -> None:
    flat = np.full(MIN_BARS, 100.0)
    instrument = Instrument(
        name="flat", dates=bundled()[0].dates[:MIN_BARS], open=flat, high=flat, low=flat, close=flat,
        volume=np.zeros(MIN_BARS), source="made up",
    )  # fmt: skip
    assert np.isfinite(causal_features(instrument)).all()


ranges = st.tuples(st.integers(0, 4000), st.integers(MIN_BARS, 2500)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], 5031))
)


@given(parts=st.lists(ranges, min_size=1, max_size=4), episode=st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_no_training_decision_earns_a_return_past_the_split(
    parts: list[tuple[int, int]], episode: int
) -> None:
    """Whatever histories are mixed: trained on is only what is known before the first validation decision."""
    instruments = [cut(bundled()[i % 2], *part) for i, part in enumerate(parts)]
    dates = np.concatenate([instrument.dates for instrument in instruments])
    owner = np.concatenate([np.full(len(part), i) for i, part in enumerate(instruments)])
    begin = np.concatenate([np.arange(len(part)) for part in instruments])
    try:
        market = build_market(instruments, Rules(episode_bars=episode))
    except DataError:
        return  # too little on one side; said so
    assert market.split == split_date(instruments)
    for span in market.training:
        assert dates[span.last + 1] < market.split
        assert len(span) >= episode
    for span in market.validation:
        assert dates[span.first] >= market.split
    for span in (*market.training, *market.validation):
        # Decision and return are within one instrument, and its window too, without bars that lack features.
        assert owner[span.first] == owner[span.last + 1]
        assert begin[span.first] - (WINDOW - 1) >= TRAILING


def test_the_split_is_one_date_after_four_fifths_of_all_dates() -> None:
    instruments = bundled()
    split = split_date(instruments)
    dates = instruments[0].dates
    assert (dates < split).sum() == int(0.8 * len(dates)) and split in dates


def test_windows_end_at_their_bar_and_returns_follow_it() -> None:
    instruments = bundled()
    market = build_market(instruments, Rules())
    features = np.concatenate([causal_features(instrument) for instrument in instruments])
    bars = torch.tensor([119, 1000, 5030, 5031 + 119, 5031 + 2000])
    windows = market.window(bars)
    assert windows.shape == (5, WINDOW, len(FEATURES))
    moved = market.to(torch.device("cpu"))
    for row, bar in enumerate(bars.tolist()):
        np.testing.assert_array_equal(windows[row], features[bar - WINDOW + 1 : bar + 1])
    assert torch.equal(moved.windows, market.windows)
    close = instruments[1].close
    assert market.next_return[5031 + 2000].item() == pytest.approx(close[2001] / close[2000] - 1, rel=1e-5)


def test_another_future_after_the_split_leaves_training_bit_for_bit_the_same() -> None:
    """Everything that training is fed, over rollouts and updates, with another market from the split on."""
    split = split_date(bundled())
    changed = [
        with_another_future(instrument, int(np.searchsorted(instrument.dates, split)), seed)
        for seed, instrument in enumerate(bundled())
    ]
    seen: list[list[torch.Tensor]] = []
    results = []
    for instruments in (list(bundled()), changed):
        workload = TacticalMappo(instruments, schedule=Schedule(accounts=64, bars=140, passes=1))
        torch.manual_seed(3)
        model = workload.build_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches = workload.train_batches(
            model, batch_size=2048, seed=3, num_workers=0, device=torch.device("cpu")
        )
        fed: list[torch.Tensor] = []
        for _ in range(2):
            for batch in batches:
                fed.extend(batch)
                optimizer.zero_grad()
                workload.training_step(model, batch).loss.backward()
                optimizer.step()
        seen.append(fed)
        with torch.inference_mode():
            results.append(workload.validate(model, torch.device("cpu"))["reward"])
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert results[0] != results[1], "the other future is not in the validation either"


def test_too_little_history_says_how_much_is_needed() -> None:
    with pytest.raises(DataError, match="enough bars for training") as caught:
        build_market([cut(bundled()[0], 0, MIN_BARS - 1)], Rules())
    assert "248 bars before" in caught.value.expected and "longer history" in caught.value.fix
