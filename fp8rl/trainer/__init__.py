"""The reference trainer: Megatron-core on a CPU, from its model to its optimizer steps."""
