"""General helpers without logic of ours: settings, files, JSON lines, pages, errors.

May import: nothing of the project.
"""
