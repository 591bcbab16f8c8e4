"""Scores of a model on the paper's benchmarks: tasks, predictions, scores, comparison."""
