"""A page for the browser: show a model an image, talk about it, see which patches a word looked at."""
