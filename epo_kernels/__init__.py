"""Fused entropy-regularized policy-gradient losses for training LLM agents."""
