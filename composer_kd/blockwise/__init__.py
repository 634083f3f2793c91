"""Blockwise distillation: each block of a student learns from the teacher's block, and blocks share out the devices."""
