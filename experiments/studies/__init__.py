"""Trainings that are compared: the parts of `findings.py` and `extension.py`."""
