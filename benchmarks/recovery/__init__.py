"""`make recovery`: what a compressed model keeps of its original's score on a task of the repository, through vLLM."""
