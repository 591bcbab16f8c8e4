"""Evaluation on the paper's benchmarks: rows -> backend -> predictions -> scoring -> report, comparison.

It imports models, data (schema and sources), generate and utils. Reading order: `data` (rows of a benchmark),
`backends`, `lmms_eval` (prompts), `run`, `predictions`, `scoring`, `report`, `compare`. `held_out` measures
exact matches on samples of one's own; `contamination` looks for benchmark rows in training data.
"""
