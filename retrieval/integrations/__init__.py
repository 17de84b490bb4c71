"""Retrievers for other libraries, over an index of ours."""
