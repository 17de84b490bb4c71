"""How a model is judged: MTEB tasks on long documents, baselines, synthetic tasks of any length, tables and plots."""
