"""From files to packed sequences: schema, sources, encode, packing, streams, collate."""
