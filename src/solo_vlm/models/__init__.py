"""SOLO models: registration with transformers, making one from an LLM, loading, counting, inspecting.

Imports `utils` only.
"""
