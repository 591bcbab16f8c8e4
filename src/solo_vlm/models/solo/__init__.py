"""The model, with transformers' file names: exactly the modules that a published folder carries.

They import each other by relative names and nothing else of this package.
"""
