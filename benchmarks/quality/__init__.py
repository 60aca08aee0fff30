"""What compression costs in quality, measured on models trained here."""
