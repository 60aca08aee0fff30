"""The key of config.json by which a transformers that was not told of ResMoE refuses a checkpoint."""

# transformers loads a checkpoint of an unknown `quant_method` with a warning and random experts. But it takes
# `transformers_weights` for the name of the file to load, refuses any that is not a safetensors file, and prints it:
# so this sentence is what its user reads (5.0.0 to 5.19.0: "The transformers file in the config seems to be
# incorrect: ..."). ResMoE's quantizer takes the key away; vLLM does not read it.
GUARD_KEY = "transformers_weights"
GUARD_TEXT = (
    "this is a ResMoE checkpoint, whose experts are compressed. `pip install resmoe`, then run `import compress_tools; "
    "compress_tools.register_with_transformers()` before from_pretrained; or write a dense checkpoint with "
    "`resmoe restore SRC DST`"
)
