"""`resmoe calibrate`: what errors of a model's experts count, measured on a text, layer by layer."""
