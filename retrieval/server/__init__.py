"""The server: `/v1/embeddings` and `/search` for programs, and the page for people."""
