"""Data, from files to packed batches.

Reading order: `sample`, `formats`, `sources`, `encode`, `packing`, `streams`, `collate`, `loader`. `catalog`
holds the paper's data sets, `survey` looks at data before training.

May import: models, utils.
"""
