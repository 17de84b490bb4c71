"""What all scripts of this repository share: errors for the user, arguments, files that are never half-written."""
