"""How a model is made: one script per kind of training, all over one loop."""
