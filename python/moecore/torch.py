"""`import moecore.torch` registers `torch.ops.moecore.*`; see moecore.torch_ops."""

from moecore import torch_ops as torch_ops
