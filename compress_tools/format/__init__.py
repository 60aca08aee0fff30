"""The on-disk format. SPEC.md is normative; writer and loaders use this package and only this."""
