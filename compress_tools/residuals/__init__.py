"""Residuals made small: one method per file."""
