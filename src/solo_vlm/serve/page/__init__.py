"""The page: its static files, and attention over image patches. Otherwise it is a client of the API."""
