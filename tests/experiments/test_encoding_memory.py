"""What the measurement of memory reports."""

from experiments.encoding_memory import WAYS, measure


def test_every_way_reads_the_texts_that_it_is_given():
    found = [measure({"way": way, "count": 30, "words": 20}) for way in WAYS]
    assert all(row == found[0] | {"mib": row["mib"]} for row in found)
    assert found[0]["megabytes"] > 0
