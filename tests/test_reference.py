"""The published numbers agree with the averages that their source prints."""

import pytest

from saftnb.reference import VISION8, learned_merging, vision8_merging


def test_rows_average_to_the_published_averages():
    table = vision8_merging()
    assert list(table.columns) == list(VISION8)
    printed = {"zero-shot": 48.2, "individual": 90.3, "average": 66.5, "task_arithmetic": 68.0, "ties": 72.2}
    for model, average in printed.items():
        assert 100 * table.loc[model].mean() == pytest.approx(average, abs=0.11), model


def test_learned_rows_average_to_their_means():
    table = learned_merging().dropna()
    assert len(table) == 2
    for learned, row in table.iterrows():
        assert row[list(VISION8)].mean() == pytest.approx(row["mean"], abs=0.06), learned
