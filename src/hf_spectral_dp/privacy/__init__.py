"""The guarantee: budget, Poisson sampling, per-example clipping, noise and ledger.

Knows tensors and privacy events; knows nothing of images or of Hugging Face. Each module can be read and used alone.
"""
