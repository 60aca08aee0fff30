"""The directory to be written: what goes in, put together beside it, renamed when whole."""
