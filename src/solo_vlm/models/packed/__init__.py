"""Packed rows: layers of any decoder that keep the documents of a row apart."""
