"""The suite data: what it measures in a process, and what it compares."""

import json

import pytest
from suites import data as suite

from ocm import data


@pytest.mark.soak
def test_a_process_loads_and_trains(tmp_path):
    suite.write_images(tmp_path / "images", 20, seed=0)
    suite.write_parquet(tmp_path / "images", tmp_path / "images.parquet")
    images = [
        data.load(str(tmp_path / name), cache_dir=tmp_path / "cache")
        for name in ("images", "images.parquet")
    ]
    assert images[0].shape == images[1].shape == (3, 64, 64)
    assert sorted(images[0].train_labels) == sorted(images[1].train_labels)
    sizes = suite.Sizes(num_steps=2, batch_size=4)
    found = suite.measured(tmp_path / "images.parquet", tmp_path / "cache", sizes)
    assert 0 < found["cpu_seconds_to_first_step"]
    assert 0 < found["seconds_to_first_step"] < 600
    assert found["own_megabytes"] + found["mapped_megabytes"] <= found["peak_megabytes"] + 64
    with pytest.raises(RuntimeError, match=r"(?s)training on .*an existing folder"):
        suite.measured(tmp_path / "absent.png/x", tmp_path / "cache", sizes)


def test_growth_is_of_the_same_source_and_cache():
    rows = [
        {"source": source, "cache": cache, "num_images": count, "peak_megabytes": peak}
        for source, cache, count, peak in (
            ("folder", "empty", 600, 100.0),
            ("parquet", "empty", 600, 200.0),
            ("folder", "empty", 60_000, 150.0),
            ("parquet", "empty", 60_000, 500.0),
        )
    ]
    found = suite.growth(rows)
    assert [(row["source"], row["megabytes"]) for row in found] == [
        ("folder", 50.0),
        ("parquet", 300.0),
    ]
    columns = ("own_megabytes", "mapped_megabytes", "seconds_to_first_step")
    extra = dict.fromkeys((*columns, "cpu_seconds_to_first_step"), 1.0)
    record = {
        "rows": [row | extra for row in rows],
        "growth": found,
        "sizes": {"num_steps": 200, "batch_size": 64},
    }
    text = suite.report(json.loads(json.dumps(record)))
    assert "| parquet | 60,000 | empty | 500 |" in text
    assert "over 600 images: 50 MB (folder, cache empty), 300 MB (parquet, cache empty)." in text
