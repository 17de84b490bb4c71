"""Reading of documents by many processes and machines, and what they leave for an index."""
