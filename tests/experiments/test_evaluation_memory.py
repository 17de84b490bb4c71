"""What the measurement of an evaluation's memory reports."""

from experiments.evaluation_memory import measure


def test_documents_are_kept_as_the_settings_say():
    """16 dimensions of two bytes, or of one bit, for each of 40 tokens."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    for settings, size in (("@tokens", 2 * 16), ("@tokens:precision=binary", 16 / 8)):
        found = measure({"count": 3, "tokens": 40, "settings": settings}, **shape)
        assert found["kilobytes"] == 40 * size / 1000
        assert found["mib"] >= 0
