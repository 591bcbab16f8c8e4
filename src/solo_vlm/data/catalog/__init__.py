"""The paper's data sets: where each comes from, how its raw rows look, and how they become samples."""
