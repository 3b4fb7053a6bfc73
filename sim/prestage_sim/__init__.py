"""Prestage without hardware: golden model, traces and reports."""
