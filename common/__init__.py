"""What all scripts of this repository share: errors for the user, arguments, whole files, texts as vectors."""
