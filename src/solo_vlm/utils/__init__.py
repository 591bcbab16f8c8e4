"""Small and general: settings, files, JSON lines, pages, errors. No logic of ours; imports nothing of it."""
