"""Row formats: raw rows of data sets, as they are found, to sample rows.

`rows` has the building blocks, `converters` one function per format, `row_format` the table of formats and
their recognition, `row_filter` the expressions that choose rows. Sources and `solo data convert` share them.
"""
