"""General helpers, independent of the models: settings, files, JSON Lines, pages, errors.

May import: nothing of the project.
"""
