"""HTTP server: OpenAI's chat API and the page in front of one engine, and the vLLM plug-in.

May import: data, generate, models, utils.
"""
