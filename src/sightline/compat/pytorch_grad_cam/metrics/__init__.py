"""Scores of maps by changed images."""
