"""The whole recipe on a small scale: embedded data, a tiny LLM, all training stages, scores, a report.

May import: data, evaluate, generate, models, train, utils.
"""
