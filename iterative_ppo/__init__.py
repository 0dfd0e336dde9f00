"""Iterative PPO: multi-turn conversational outcomes by single-turn RL against a learned Q (Jiang et al. 2025)."""
