"""A SOLO model behind OpenAI's chat API, with limits on what a stranger may ask of it."""
