"""The index: shards of documents on disk, and the three ways to score them."""
