"""`vllm serve` behind the server of lmtune: https://docs.vllm.ai."""
