"""What the scripts share: user errors, command-line arguments, atomic files, and the encoding of texts."""
