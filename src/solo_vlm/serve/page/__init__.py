"""Web page: its static files, and attention over image patches. It is otherwise a client of the API."""
