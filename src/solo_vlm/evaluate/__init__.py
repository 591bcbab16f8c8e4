"""Evaluation on benchmarks: rows, backend, predictions, scoring, report, comparison.

Reading order: `data` (rows of a benchmark), `backends`, `lmms_eval`, `stock_tasks` (prompts), `run`,
`predictions`, `scoring`, `report`, `compare`. `held_out` measures exact matches on your own samples;
`contamination` searches training data for benchmark rows.

May import: data, generate, models, utils.
"""
