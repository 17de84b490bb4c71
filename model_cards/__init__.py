"""What is published: for each released model a folder with its card, its recipe and its weights, and what builds it."""
