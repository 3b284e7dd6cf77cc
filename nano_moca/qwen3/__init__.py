"""Qwen3-VL (2B, 4B, 8B): what it does otherwise than Qwen2.5-VL, and nothing else.

    config.py    its config.json: more sizes, other defaults, always nested
    model.py     its vision tower, with DeepStack, and its decoder

All that MoCa does (masking, losses, pooling, both stages) is the same code for both.
"""
