"""General helpers: settings, files, JSON lines, pages, errors. Imports no other package of the project."""
