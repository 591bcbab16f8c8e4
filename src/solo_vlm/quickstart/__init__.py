"""The whole recipe, small: embedded data, a decoder trained as an LLM, all stages, scores, report."""
