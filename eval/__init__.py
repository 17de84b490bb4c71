"""Evaluation: MTEB tasks on long documents, baselines, synthetic tasks of any length, speed, tables and plots."""
