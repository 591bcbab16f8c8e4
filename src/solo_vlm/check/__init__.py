"""Certificates: checks that a model of any family computes what it should.

May import: data, generate, models, utils.
"""
