"""Pictures of studies: each states its numbers in words, and says what a table lacks."""

import pandas as pd
import pytest

import helpers

TABLE = pd.DataFrame(
    {"arm": ["one", "one", "two"], "seed": [0, 1, 0], "valid": [0.5, 0.7, None], "fcd": [1.0, 2.0, 30.0]}
)


@pytest.fixture
def shown(monkeypatch):
    kept = []
    monkeypatch.setattr("IPython.display.display", lambda *parts, **extra: kept.append((parts, extra)))
    return kept


def test_rows_with_their_seeds(shown):
    frames = pd.DataFrame({"valid": [0.6], "fcd": [4.0]}, index=["prior"])
    helpers.show_seeds(TABLE, "arm", {"valid": "valid", "fcd": "FCD"}, frames, "A caption.")
    (bundle,), extra = shown[0]
    assert "one: valid 0.6, fcd 1.5" in bundle["text/plain"]
    assert extra["metadata"]["image/png"]["alt"] == bundle["text/plain"]
    assert shown[1][0][0].data == "*A caption.*"


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'novel'; it has arm, seed, valid, fcd"):
        helpers.show_seeds(TABLE, "arm", {"novel": "novel"})


def test_the_two_stages(shown):
    helpers.show_two_stages()
    assert "denoiser at every step" in shown[0][0][0]["text/plain"]
