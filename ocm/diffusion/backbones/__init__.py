"""Backbones: how they are called, what they are wrapped in, and where their features are."""
