"""What a run will read, need and take, worked out before anything is loaded."""
