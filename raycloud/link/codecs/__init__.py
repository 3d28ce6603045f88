"""Codecs of hidden states: tensors (n, width) to bytes and back.

Each hidden state is coded independently: (n, width) numbers become (n, bytes per hidden state) bytes, so that a
receiver can decode the tokens it works on without the whole payload. Casts need no calibration; the smaller codecs are
calibrated on a model's own hidden states at one cut (:mod:`raycloud.link.codecs.fitting`).
"""
