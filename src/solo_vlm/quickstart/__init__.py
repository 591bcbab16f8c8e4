"""The whole recipe, small: embedded data, a decoder trained as an LLM, all stages, scores, report.

May import: data, evaluate, generate, models, train, utils.
"""
