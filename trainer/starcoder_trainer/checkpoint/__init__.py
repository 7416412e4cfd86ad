"""Checkpoints in a format of our own: any layout saves without communication, any layout loads.

What is saved is the optimizer's fp32 state: of each parameter the master weights (`param`) and the two moments
(`exp_avg`, `exp_avg_sq`). The model's weights follow from the masters. A *tensor* of a checkpoint is one state of one
parameter at one model-parallel position, flattened; data ranks hold ranges of it, the *pieces*. A tensor's name says
where it lies in the whole parameter (`names`), so that another layout can place it:

    exp_avg/decoder.layers.7.mlp.linear_fc1.weight@256_0x256_128

Each rank writes one safetensors file and, after it, a JSON manifest of its pieces.
"""
