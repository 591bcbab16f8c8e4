"""Publication of a trained model: model card, self-contained folder, upload to the Hugging Face Hub.

May import: convert, data, evaluate, models, train, utils.
"""
