"""The transformer: megatron-core's GPTModel in StarCoder's shape, its attention, initial weights and randomness."""
