"""The model, with transformers' file names: exactly the modules of a published folder.

They import each other by relative names and nothing else of this package.
"""
