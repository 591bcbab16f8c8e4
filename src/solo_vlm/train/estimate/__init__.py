"""Plan of a run before anything is loaded: steps, memory and time."""
