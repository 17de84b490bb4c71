"""Training objectives: pure functions of tensors, each with its paper, formula and shapes."""
