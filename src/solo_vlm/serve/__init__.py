"""One server: OpenAI's chat API and the page in front of one engine; and the plug-in for vLLM.

May import: data, generate, models, utils.
"""
