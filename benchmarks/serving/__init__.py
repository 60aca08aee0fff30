"""A real `vllm serve` process: start, watch and stop it (`server`), ask it (`client`), load it (`bench_client`)."""
