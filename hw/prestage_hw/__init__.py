"""Prestage RTL: an expert predictor and prefetch engine for Mixture-of-Experts models.

Only :mod:`prestage_hw.contract` is importable without Amaranth.
"""
