"""Documents: what is searched, and where it is read from."""
