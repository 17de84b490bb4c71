"""Runs that are killed at random moments: each must end, when it is started again, as one that was left alone."""
