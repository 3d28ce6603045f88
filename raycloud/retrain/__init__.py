"""Block retraining: on drift, the edge retrains only the blocks worth their cost, and the cloud learns from it.

These are the parts; no job joins them yet.
"""
