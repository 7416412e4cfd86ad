"""Trainer of StarCoder-like models: the agent of a Pod and the Megatron-core workers it supervises."""
