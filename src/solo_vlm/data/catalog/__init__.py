"""The paper's data sets: source, raw format and conversion to samples."""
